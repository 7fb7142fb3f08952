"""Predictions over draws, against closed forms and Monte Carlo within its standard error."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from bayes_lora.inference.batches import evaluation_batches
from bayes_lora.inference.predict import predict, predict_draws
from bayes_lora.inference.predictive import (
    ClassProbabilities,
    NormalPredictions,
    TextProbabilities,
)
from bayes_lora.models.guides import GateGuide
from bayes_lora.models.likelihoods import Classification
from bayes_lora.models.model import BayesianLoRA, Gates
from bayes_lora.models.priors import Priors


def test_every_draw_is_predicted_with_its_own_gates_and_weights(network, batch, adapter_weights):
    model = BayesianLoRA(network, Classification(), Priors(), num_examples=5)
    guide = GateGuide(model, adapter_weights(network))
    loader = DataLoader(range(5), batch_size=5, collate_fn=lambda _: dict(batch))
    generator = torch.Generator().manual_seed(0)
    draws = [
        Gates(*(torch.randint(2, s, generator=generator).float()
                for s in (network.rank_gate_shape, network.bit_gate_shape)))
        for _ in range(3)
    ]  # fmt: skip
    weights = [adapter_weights(network, seed) for seed in (5, 6, 7)]
    (found,) = predict_draws(model, guide, loader, draws, weights)
    assert found.shape == (3, 5, 2)
    for s in range(3):
        (alone,) = predict(model, guide, loader, draws[s], weights[s])
        assert np.array_equal(found[s], alone)
    assert not np.allclose(found[0], found[1])


def test_predictions_of_batches_of_like_length_are_in_the_order_of_the_data(
    network, batch, adapter_weights
):
    model = BayesianLoRA(network, Classification(), Priors(), num_examples=5)
    guide = GateGuide(model, adapter_weights(network))
    gates = Gates(torch.ones(network.rank_gate_shape), torch.ones(network.bit_gate_shape))
    lengths = [6, 3, 5, 4, 2]
    rows = [batch["input_ids"][i, :length].tolist() for i, length in enumerate(lengths)]
    data = Dataset.from_dict({"input_ids": rows})

    def collate(examples):
        tokens = [torch.tensor(example["input_ids"]) for example in examples]
        mask = [torch.ones_like(each) for each in tokens]
        return {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }

    loader = evaluation_batches(data, collate, batch_size=2)
    assert [len(b["input_ids"][0]) for b in loader] == [3, 5, 6]
    (found,) = predict(model, guide, loader, gates)
    (expected,) = predict(model, guide, DataLoader(data, collate_fn=collate), gates)
    assert np.allclose(found, expected, atol=1e-5)
    assert len(np.unique(found.round(4), axis=0)) == 5


def test_log_likelihood_is_that_of_scipy():
    mean, deviation = np.array([[0.5, -1.0], [2.0, 0.0]]), np.array([[1.0, 2.0], [0.5, 3.0]])
    labels = np.array([0.2, 0.7])
    expected = stats.norm(mean, deviation).logpdf(labels)
    assert np.allclose(NormalPredictions(mean, deviation).log_likelihood(labels), expected)
    p = np.array([[[0.2, 0.8], [1.0, 0.0]]])
    found = ClassProbabilities(p).log_likelihood(np.array([1, 1]))
    assert found[0, 0] == pytest.approx(np.log(0.8))
    assert np.isfinite(found).all()


def test_averages_of_a_mixture_of_normals_by_monte_carlo():
    generator = np.random.default_rng(0)
    mean, deviation = np.array([[0.0], [1.5], [4.0]]), np.array([[0.5], [1.0], [2.0]])
    found, spread = NormalPredictions(mean, deviation).averaged()
    part = generator.integers(3, size=200_000)
    draws = generator.normal(mean[part, 0], deviation[part, 0])
    assert found[0] == pytest.approx(draws.mean(), abs=4.5 * draws.std() / 200_000**0.5)
    centred = (draws - draws.mean()) ** 2
    assert spread[0] ** 2 == pytest.approx(centred.mean(), abs=4.5 * centred.std() / 200_000**0.5)


def test_labels_are_drawn_with_their_probabilities():
    p = np.array([0.1, 0.65, 0.25])
    labels = ClassProbabilities(np.tile(p, (1, 40_000, 1))).draw_labels(np.random.default_rng(0))
    shares = np.bincount(labels[0], minlength=3) / 40_000
    assert (abs(shares - p) < 4.5 * (p * (1 - p) / 40_000) ** 0.5).all()


def test_texts_are_averaged_by_their_probability_and_come_from_their_pieces():
    pieces = np.log([[0.5, 0.2, 0.1], [0.1, 0.9, 0.3]])
    whole = TextProbabilities(pieces).of_whole_texts([0, 0, 1], number=2)
    assert np.allclose(np.exp(whole.averaged().log_probability), [(0.1 + 0.09) / 2, 0.2])
    far = TextProbabilities(np.array([[-1000.0], [-1001.0]])).averaged()  # no underflow
    assert far.log_probability[0] == pytest.approx(-1000 + np.log((1 + np.exp(-1)) / 2))
