r"""The embedded task: is the sentence grammatical? Subject-verb agreement across attractors.

A sentence is a subject, mostly a modifier that puts one or two *attractors* (nouns that the verb
must not agree with) between subject and verb, and a predicate in the present tense::

    The teacher near the tall lawyers is happy .                       1  acceptable
    The teacher that the lawyers behind the nurse trust are happy .    0  unacceptable

An unacceptable sentence differs from an acceptable one by the number of its main verb, in nothing
else. Acceptability and the numbers of subject and attractors are independent fair coins: no word by
itself tells anything about the label. Where there is a modifier, who matches the verb with the noun
before it is right for 1 in 2, and with the majority of the nouns for 3 in 4; the subject has to be
found. The nouns, verbs, adjectives, objects and places of validation are not in training.

A share :math:`\varepsilon` of the labels is flipped, independently of everything else. The best
possible prediction puts :math:`1 - \varepsilon` on the clean label; its accuracy is
:math:`1 - \varepsilon`, and its negative log likelihood the entropy

.. math:: H(\varepsilon) = -\varepsilon \log \varepsilon - (1 - \varepsilon) \log(1 - \varepsilon),

for :math:`\varepsilon = 0.05` 0.95 and 0.1985 nats, in expectation over the flips.

The design follows Linzen, Dupoux and Goldberg (2016, TACL 4) and Marvin and Linzen (2018, EMNLP);
grammar and words are our own.
"""

from __future__ import annotations

import math
import random
from typing import Literal, NamedTuple, TypedDict

from bayes_lora.errors import InputError

LABEL_NOISE = 0.05
"""Share of the labels that is flipped (probability)."""

BEST_ACCURACY = 1 - LABEL_NOISE
"""Highest possible expected accuracy on the flipped labels: 0.95."""

BEST_NLL = -LABEL_NOISE * math.log(LABEL_NOISE) - (1 - LABEL_NOISE) * math.log(1 - LABEL_NOISE)
"""Lowest possible expected negative log likelihood of the flipped labels: 0.1985 nats."""

MAX_EXAMPLES = 20_000
"""Most examples of a split: all different, and short sentences must not run out."""


class Vocabulary(NamedTuple):
    """Words of one split; nouns and verbs take a plain ``-s``.

    Examples
    --------
    >>> set(VOCABULARIES["train"].nouns) & set(VOCABULARIES["validation"].nouns)
    set()
    """

    nouns: list[str]
    transitive_verbs: list[str]
    intransitive_verbs: list[str]
    adjectives: list[str]
    objects: list[str]
    places: list[str]


def _words(text: str) -> list[str]:
    return text.split()


VOCABULARIES = {
    "train": Vocabulary(
        nouns=_words(
            "teacher doctor lawyer driver singer pilot student neighbor actor dancer soldier "
            "farmer manager writer uncle girl artist officer visitor builder painter nurse"
        ),
        transitive_verbs=_words("follow help like visit trust remember"),
        intransitive_verbs=_words("work sing wait sleep eat smile"),
        adjectives=_words(
            "tall young tired happy quiet kind rich busy clever polite famous strong"
        ),
        objects=_words("bicycle dog piano boat letter basket"),
        places=_words("kitchen park village hotel school garden"),
    ),
    "validation": Vocabulary(
        nouns=_words(
            "sailor cousin tourist author runner hunter mayor engineer captain friend sister "
            "reporter stranger scientist customer queen"
        ),
        transitive_verbs=_words("love meet call thank avoid"),
        intransitive_verbs=_words("talk walk stay laugh sit travel"),
        adjectives=_words("old short angry proud brave shy lazy honest cheerful calm"),
        objects=_words("car cat camera tent lamp violin"),
        places=_words("library station market museum harbor hospital"),
    ),
}
"""The words of each split; none is in both."""

PREPOSITIONS = ["near", "behind", "beside", "with"]


class Example(TypedDict):
    """One row, in CoLA's columns ``sentence``, ``label`` (1: acceptable) and ``idx``.

    ``clean_label`` is the label before the flip: the truth to judge calibration by.

    Examples
    --------
    >>> Example(sentence="The nurse is kind .", label=0, idx=0, clean_label=1)["clean_label"]
    1
    """

    sentence: str
    label: int
    idx: int
    clean_label: int


def generate(
    num_examples: int,
    *,
    seed: int,
    split: Literal["train", "validation"],
    label_noise: float = LABEL_NOISE,
) -> list[Example]:
    """Generate different sentences, acceptable by a fair coin, with a known share of wrong labels.

    Parameters
    ----------
    num_examples : int
        From 1 to `MAX_EXAMPLES`.
    seed : int
        The same seed gives the same rows, and fewer rows are the first of more.
    split : {"train", "validation"}
        Which vocabulary. The two share only function words, so that no sentence is in both.
    label_noise : float
        Probability that a label is flipped, from 0 to 0.5.

    Returns
    -------
    list of Example
        Rows with ``sentence``, ``label``, ``idx`` and ``clean_label``.

    Raises
    ------
    InputError
        If the number of examples, the split or the noise is not one of these.

    Examples
    --------
    >>> row = generate(3, seed=0, split="train", label_noise=0.0)[0]
    >>> row["sentence"].startswith("The "), row["label"] == row["clean_label"]
    (True, True)
    """
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise InputError(f"num_examples is {num_examples}; give 1 to {MAX_EXAMPLES}")
    if split not in VOCABULARIES:
        raise InputError(f"unknown split {split!r}; there are {', '.join(VOCABULARIES)}")
    if not 0 <= label_noise <= 0.5:
        raise InputError(f"label_noise is {label_noise}; give a probability from 0 to 0.5")
    rng, words = random.Random(f"{split} {seed}"), VOCABULARIES[split]
    examples: dict[str, Example] = {}
    while len(examples) < num_examples:
        acceptable, plural = rng.random() < 0.5, rng.random() < 0.5
        subject, *attractors = rng.sample(words.nouns, 3)
        parts = [_noun(rng, words, subject, plural)]
        # Without a modifier, agreement is easy: it is learned there first, then across attractors.
        if rng.random() < 0.6:
            parts.append(_modifier(rng, words, attractors, plural))
        parts.append(_predicate(rng, words, plural if acceptable else not plural))
        sentence = f"{' '.join(parts)} .".capitalize()
        label = acceptable != (rng.random() < label_noise)
        row = Example(
            sentence=sentence, label=int(label), idx=len(examples), clean_label=int(acceptable)
        )
        examples.setdefault(sentence, row)
    return list(examples.values())


def _noun(rng: random.Random, words: Vocabulary, stem: str, plural: bool) -> str:
    adjective = f"{rng.choice(words.adjectives)} " if rng.random() < 0.1 else ""
    return f"the {adjective}{stem}{'s' if plural else ''}"


def _verb(stem: str, plural: bool) -> str:
    return stem if plural else f"{stem}s"


def _modifier(rng: random.Random, words: Vocabulary, nouns: list[str], subject_plural: bool) -> str:
    """What stands between subject and verb; a verb in it agrees with its own subject."""
    plural = rng.random() < 0.5
    attractor = _noun(rng, words, nouns[0], plural)
    if rng.random() < 0.25:
        another = _noun(rng, words, nouns[1], plural=rng.random() < 0.5)
        attractor = f"{attractor} {rng.choice(PREPOSITIONS)} {another}"
    kinds = ["prepositional phrase", "object relative", "subject relative"]
    [kind] = rng.choices(kinds, weights=[4, 1, 1])
    stem = rng.choice(words.transitive_verbs)
    if kind == "object relative":
        return f"that {attractor} {_verb(stem, plural)}"
    if kind == "subject relative":  # without it, no noun in a relative clause were ever a subject
        return f"that {_verb(stem, subject_plural)} {attractor}"
    return f"{rng.choice(PREPOSITIONS)} {attractor}"


def _predicate(rng: random.Random, words: Vocabulary, plural: bool) -> str:
    place = f"{rng.choice(['in', 'near', 'behind'])} the {rng.choice(words.places)}"
    kinds = ["adjective", "place", "possession", "activity"]
    [kind] = rng.choices(kinds, weights=[6, 4, 1, 1])
    if kind == "adjective":
        return f"{'are' if plural else 'is'} {rng.choice(words.adjectives)}"
    if kind == "place":
        return f"{'are' if plural else 'is'} {place}"
    if kind == "possession":
        return f"{'have' if plural else 'has'} a {rng.choice(words.objects)}"
    return f"{_verb(rng.choice(words.intransitive_verbs), plural)} {place}"
