r"""The embedded task: is the sentence grammatical? Subject-verb agreement across attractors.

A sentence is a subject noun phrase, a modifier that puts one or two *attractors* (nouns that the
verb must not agree with) between subject and verb, and a predicate in the present tense::

    The teacher near the tall lawyers is happy .                  1  acceptable
    The teacher that the lawyers behind the nurse trust are happy .    0  unacceptable

An unacceptable sentence differs from an acceptable one by the number of its main verb and by nothing
else. The numbers of the subject, of every attractor and the acceptability are independent fair
coins, so neither the words as a bag, nor the verb, nor the noun next to it tells the label: the
subject has to be found. Validation draws its nouns, verbs, adjectives, objects and places from a
vocabulary that training never sees.

A share :math:`\varepsilon` of the labels is flipped, independently of everything else. No model can
then be better, in expectation, than the one that puts :math:`1 - \varepsilon` on the clean label:

.. math:: H(\varepsilon) = -\varepsilon \log \varepsilon - (1 - \varepsilon) \log (1 - \varepsilon)

is the lowest possible negative log likelihood and :math:`1 - \varepsilon` the highest accuracy; for
:math:`\varepsilon = 0.05` they are 0.1985 nats and 0.95.

The construction follows Linzen, Dupoux and Goldberg (2016), *Assessing the ability of LSTMs to learn
syntax-sensitive dependencies*, TACL 4, and Marvin and Linzen (2018), *Targeted syntactic evaluation
of language models*, EMNLP; the words are our own.
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

MAX_EXAMPLES = 100_000
"""Most examples of one split; far fewer than there are sentences, so that each can be new."""


class Vocabulary(NamedTuple):
    """Open-class words of one split, nouns and verbs without the regular ``-s`` of inflection.

    Examples
    --------
    >>> set(VOCABULARIES["train"].nouns) & set(VOCABULARIES["validation"].nouns)
    set()
    """

    nouns: tuple[str, ...]
    transitive_verbs: tuple[str, ...]
    intransitive_verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    objects: tuple[str, ...]
    places: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VOCABULARIES = {
    "train": Vocabulary(
        nouns=_words(
            "teacher doctor farmer painter lawyer driver singer baker nurse pilot gardener student "
            "neighbor tailor plumber waiter actor dancer soldier reporter manager writer uncle girl"
        ),
        transitive_verbs=_words("admire follow help like visit trust know remember"),
        intransitive_verbs=_words("work sing wait sleep eat rest smile play live read"),
        adjectives=_words(
            "tall young tired happy quiet kind rich busy clever polite famous strong"
        ),
        objects=_words("bicycle dog piano boat letter hammer basket garden"),
        places=_words("kitchen park village hotel school office bank church theater farm"),
    ),
    "validation": Vocabulary(
        nouns=_words(
            "sailor cousin carpenter tourist banker author runner boy aunt hunter mayor engineer "
            "butler librarian captain friend"
        ),
        transitive_verbs=_words("love meet call see thank avoid"),
        intransitive_verbs=_words("talk walk stay laugh sit swim travel shop"),
        adjectives=_words("old short angry proud brave shy lazy honest cheerful calm"),
        objects=_words("car cat camera tent lamp violin"),
        places=_words("library station market museum harbor hospital castle bakery"),
    ),
}
"""Words of each split: no open-class word is in both."""

_PREPOSITIONS = _words("near behind beside with")
_LOCATIVES = _words("in near behind")


class Example(TypedDict):
    """One row, in CoLA's columns and the label before the flip.

    ``sentence`` is the text, ``label`` is 1 where it is given out as acceptable and 0 where not,
    ``idx`` is the row number from 0, and ``clean_label`` is the truth about the sentence.

    Examples
    --------
    >>> Example(sentence="The nurse near the girls is kind .", label=1, idx=0, clean_label=1)["label"]
    1
    """

    sentence: str
    label: int
    idx: int
    clean_label: int


def _noun(rng: random.Random, words: Vocabulary, plural: bool) -> str:
    adjective = rng.choice(words.adjectives) + " " if rng.random() < 0.3 else ""
    return f"the {adjective}{rng.choice(words.nouns)}{'s' if plural else ''}"


def _verb(stem: str, plural: bool) -> str:
    return stem if plural else stem + "s"


def _modifier(rng: random.Random, words: Vocabulary, subject_plural: bool) -> str:
    """Draw what stands between subject and verb; every verb in it agrees with its own subject."""
    attractor_plural = rng.random() < 0.5
    attractor = _noun(rng, words, attractor_plural)
    if rng.random() < 0.5:
        attractor += f" {rng.choice(_PREPOSITIONS)} {_noun(rng, words, rng.random() < 0.5)}"
    kind = rng.choice(("prepositional", "object relative", "subject relative"))
    if kind == "prepositional":
        return f"{rng.choice(_PREPOSITIONS)} {attractor}"
    stem = rng.choice(words.transitive_verbs)
    if kind == "object relative":
        return f"that {attractor} {_verb(stem, attractor_plural)}"
    # Without this third kind the relative clause's own verb would tell which noun is no subject.
    return f"that {_verb(stem, subject_plural)} {attractor}"


def _predicate(rng: random.Random, words: Vocabulary, plural: bool) -> str:
    place = f"{rng.choice(_LOCATIVES)} the {rng.choice(words.places)}"
    kind = rng.choice(("adjective", "place", "possession", "activity"))
    if kind == "adjective":
        return f"{'are' if plural else 'is'} {rng.choice(words.adjectives)}"
    if kind == "place":
        return f"{'are' if plural else 'is'} {place}"
    if kind == "possession":
        return f"{'have' if plural else 'has'} a {rng.choice(words.objects)}"
    return f"{_verb(rng.choice(words.intransitive_verbs), plural)} {place}"


def generate(
    num_examples: int,
    *,
    seed: int,
    split: Literal["train", "validation"],
    label_noise: float = LABEL_NOISE,
) -> list[Example]:
    """Generate different sentences, half of them acceptable, with a known share of wrong labels.

    Parameters
    ----------
    num_examples : int
        How many, from 1 to `MAX_EXAMPLES`.
    seed : int
        The same seed, split and noise give the same rows, and fewer rows are a prefix of more.
    split : {"train", "validation"}
        Which vocabulary; the two share function words only, so no sentence is in both.
    label_noise : float
        Probability that a label is flipped, from 0 to 0.5.

    Returns
    -------
    list of Example
        Rows with ``sentence``, ``label``, ``idx`` and ``clean_label``.

    Raises
    ------
    InputError
        If the number of examples, the split or the noise is outside its range.

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
    rng = random.Random(f"{split} {seed}")
    words = VOCABULARIES[split]
    examples: dict[str, Example] = {}
    while len(examples) < num_examples:
        subject_plural, acceptable = rng.random() < 0.5, rng.random() < 0.5
        subject = _noun(rng, words, subject_plural)
        modifier = _modifier(rng, words, subject_plural)
        predicate = _predicate(rng, words, plural=subject_plural == acceptable)
        sentence = f"{subject} {modifier} {predicate} .".capitalize()
        clean_label, idx = int(acceptable), len(examples)
        label = clean_label ^ int(rng.random() < label_noise)
        row = Example(sentence=sentence, label=label, idx=idx, clean_label=clean_label)
        examples.setdefault(sentence, row)
    return list(examples.values())
