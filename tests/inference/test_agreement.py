"""The generator, judged by a parser of its sentences and by its statistics."""

import math

import numpy as np
import pytest

from bayes_lora.errors import InputError
from bayes_lora.inference.agreement import (
    BEST_ACCURACY,
    BEST_NLL,
    LABEL_NOISE,
    MAX_EXAMPLES,
    VOCABULARIES,
    generate,
)

FUNCTION_WORDS = {"the", "that", "a", ".", "is", "are", "has", "have"}
FUNCTION_WORDS |= {"near", "behind", "beside", "with", "in"}
SPLITS = ["train", "validation"]
N = 10_000


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def examples(split):
    return generate(N, seed=0, split=split)


def words_of(example):
    return example["sentence"].lower().split()


def parse(words, split):
    """Whether subject, attractors and main verb are plural, and the same of a clause's verb."""
    vocabulary = VOCABULARIES[split]
    nouns = {stem + s: s == "s" for stem in vocabulary.nouns for s in ("", "s")}
    stems = vocabulary.intransitive_verbs
    verbs = {stem + s: s == "" for stem in stems for s in ("", "s")}
    verbs |= {"is": False, "are": True, "has": False, "have": True}
    inner = {stem + s: s == "" for stem in vocabulary.transitive_verbs for s in ("", "s")}
    [verb] = [i for i, word in enumerate(words) if word in verbs]
    places = [i for i, word in enumerate(words) if word in nouns]
    assert places[-1] < verb
    subject, *attractors = (nouns[words[i]] for i in places)
    clause = [inner[word] for word in words if word in inner]
    return subject, attractors, verbs[words[verb]], clause


def is_near(count, n, probability):
    """Within four standard errors."""
    return abs(count / n - probability) < 4 * math.sqrt(probability * (1 - probability) / n)


def test_seeds_decide_and_fewer_are_the_first_of_more(split):
    examples = generate(50, seed=3, split=split)
    assert examples == generate(60, seed=3, split=split)[:50]
    assert examples != generate(50, seed=4, split=split)


def test_columns(examples):
    assert [example["idx"] for example in examples] == list(range(N))
    assert {tuple(example) for example in examples} == {("sentence", "label", "idx", "clean_label")}
    assert {(type(e["label"]), e["label"]) for e in examples} == {(int, 0), (int, 1)}


def test_the_splits_share_function_words_only():
    train, validation = (
        {word for example in generate(N, seed=0, split=split) for word in words_of(example)}
        for split in SPLITS
    )
    assert train & validation == FUNCTION_WORDS
    stems = [
        {stem for stems in vocabulary for stem in stems} for vocabulary in VOCABULARIES.values()
    ]
    assert not stems[0] & stems[1]


def test_no_sentence_comes_twice(examples):
    assert len({example["sentence"] for example in examples}) == N


def test_sentences_look_like_sentences(examples):
    for example in examples:
        sentence = example["sentence"]
        assert sentence.startswith("The ")
        assert sentence.endswith(" .")
        assert sentence[1:] == sentence[1:].lower()
        assert sentence.split() == sentence.split(" ")
        assert 5 <= len(sentence.split()) <= 20


def test_acceptable_is_agreement_of_subject_and_main_verb(examples, split):
    for example in examples:
        subject, _, verb, _ = parse(words_of(example), split)
        assert example["clean_label"] == int(subject == verb), example


def test_the_verb_of_a_clause_always_agrees_with_its_own_subject(examples, split):
    kinds = set()
    for example in examples:
        words = words_of(example)
        subject, attractors, _, clause = parse(words, split)
        if "that" in words:
            is_object_relative = words[words.index("that") + 1] == "the"
            kinds.add(is_object_relative)
            assert clause == [attractors[0] if is_object_relative else subject], example
        else:
            assert clause == []
    assert kinds == {True, False}


def test_no_noun_comes_twice_in_a_sentence(examples, split):
    for example in examples:
        stems = [word.removesuffix("s") for word in words_of(example)]
        nouns = [stem for stem in stems if stem in VOCABULARIES[split].nouns]
        assert 1 <= len(nouns) == len(set(nouns)) <= 3, example


def test_number_and_acceptability_are_independent_fair_coins(examples, split):
    parsed = [parse(words_of(example), split) for example in examples]
    clean = np.array([example["clean_label"] for example in examples], dtype=bool)
    subject = np.array([p[0] for p in parsed])
    verb = np.array([p[2] for p in parsed])
    assert is_near(clean.sum(), N, 0.5)
    assert is_near(subject.sum(), N, 0.5)
    assert is_near((clean == subject).sum(), N, 0.5)
    assert is_near((clean == verb).sum(), N, 0.5)
    for position in (0, 1):
        rows = np.array([len(p[1]) > position for p in parsed])
        attractor = np.array([p[1][position] for p in parsed if len(p[1]) > position])
        for other in (clean, subject, verb):
            assert is_near((attractor == other[rows]).sum(), rows.sum(), 0.5)


def test_neither_the_noun_before_the_verb_nor_the_majority_decides(examples, split):
    nearest, majority = [], []
    for example in examples:
        subject, attractors, verb, _ = parse(words_of(example), split)
        if attractors:
            nouns = [subject, *attractors]
            is_tie = 2 * sum(nouns) == len(nouns)
            most = 2 * sum(nouns) > len(nouns)
            right = (most == verb) == example["clean_label"]
            nearest.append((nouns[-1] == verb) == example["clean_label"])
            majority.append(0.5 if is_tie else float(right))
    assert 0.7 < len(nearest) / N < 0.9
    assert is_near(sum(nearest), len(nearest), 1 / 2)
    standard_error = np.std(majority) / math.sqrt(len(majority))
    assert abs(np.mean(majority) - 3 / 4) < 4 * standard_error


@pytest.mark.parametrize("noise", [LABEL_NOISE, 0.3])
def test_labels_are_flipped_independently(noise):
    examples = generate(N, seed=1, split="train", label_noise=noise)
    flipped = np.array([e["label"] != e["clean_label"] for e in examples])
    clean = np.array([e["clean_label"] for e in examples])
    plural = np.array([parse(words_of(e), "train")[0] for e in examples])
    for group in (clean == 0, clean == 1, plural, ~plural):
        assert is_near(flipped[group].sum(), group.sum(), noise)
    # neighbours: a flip says nothing about the next one
    assert is_near((flipped[1:] & flipped[:-1]).sum(), N - 1, noise**2)


def test_without_noise_nothing_is_flipped():
    examples = generate(N, seed=1, split="train", label_noise=0.0)
    assert all(e["label"] == e["clean_label"] for e in examples)


def test_the_best_expected_scores_are_those_of_the_true_probability():
    assert pytest.approx(0.95) == BEST_ACCURACY
    assert pytest.approx(0.1985, abs=5e-5) == BEST_NLL
    p = np.arange(1, 1000) / 1000
    expected_nll = -(1 - LABEL_NOISE) * np.log(p) - LABEL_NOISE * np.log(1 - p)
    assert p[expected_nll.argmin()] == pytest.approx(1 - LABEL_NOISE)
    assert expected_nll.min() == pytest.approx(BEST_NLL)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_examples": 0}, "num_examples is 0; give 1 to"),
        ({"num_examples": MAX_EXAMPLES + 1}, "num_examples is 20001"),
        ({"split": "test"}, "unknown split 'test'; there are train, validation"),
        ({"label_noise": 0.51}, "label_noise is 0.51"),
        ({"label_noise": -0.01}, "label_noise is -0.01"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(InputError, match=says):
        generate(**{"num_examples": 1, "seed": 0, "split": "train", **arguments})
