"""What benchmarks/scale.py counts, against closed forms and counts by hand."""

import pytest
import torch
from activations import RANK, SETTINGS, Setting, adapted, counted, forward, saved_storages
from scale import NETWORKS, Llama, deberta, seconds, sizes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bayes_lora.layers import AdaptedLinear, LayerLatents

TINY = {"width": 12, "inner": 20, "blocks": 3, "heads": 3, "keys": 1, "words": 50}
FLOAT = 4  # bytes


@pytest.fixture
def fake():
    """Make an adapted network that has shapes only."""

    def make(build):
        with FakeTensorMode():
            return adapted(build)

    return make


@pytest.mark.parametrize(
    ("build", "width", "inner", "blocks", "share", "words"),
    [
        (Llama(**TINY), 12, 20, 3, 1 / 3, 50),
        (NETWORKS["7B"], 4096, 11_008, 32, 1, 32_000),
        (NETWORKS["70B"], 8192, 28_672, 80, 1 / 8, 32_000),
    ],
)
def test_a_llama_has_the_parameters_of_its_closed_form(
    fake, build, width, inner, blocks, share, words
):
    network = fake(build)
    found = sizes(network)
    keys = round(width * share)
    frozen = 2 * width * width + 2 * width * keys + 3 * width * inner
    assert found["parameters"] == blocks * (frozen + 2 * width) + width + 2 * words * width
    assert found["copies fp32"] == FLOAT * blocks * frozen
    ends = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, inner)] * 3
    ones = sum(RANK * (a + b + 1) for a, b in ends)
    assert found["adapter parameters"] == blocks * ones
    assert found["head parameters"] == 0
    assert found["gates"] == blocks * 7 * (RANK + 6 * 3)
    assert found["trained"] == FLOAT * (blocks * ones + found["gates"])
    assert found["gathered"] == FLOAT * (2 * (frozen + 2 * width) + width + 2 * words * width)
    operations = seconds(network, False) * 150e12 / (8 * 512)
    assert operations == pytest.approx(blocks * (4 * frozen + 6 * ones), rel=1e-6)
    more = seconds(network, True) * 150e12 / (8 * 512) - operations
    assert more == pytest.approx(blocks * 2 * (frozen + ones), rel=1e-6)


def test_deberta_trains_its_head_too(fake):
    found = sizes(fake(deberta))
    head = (768 + 2) * (768 + 1)  # pooler and classifier
    assert found["head parameters"] == head
    assert found["adapter parameters"] == 1_327_104 + 8 * 72
    assert found["trained"] == FLOAT * (1_327_104 + 8 * 72 + head + 72 * (8 + 18))


def test_storages_of_two_layers_by_hand():
    first, second = nn.Linear(5, 3), nn.Linear(3, 2)
    x = torch.randn(7, 5)
    with saved_storages([x, *first.parameters(), *second.parameters()]) as found:
        # tanh saves its result, of which the second layer has a view; the first one has x
        second(first(x).tanh().view(7, 3)).sum()
    assert [storage.nbytes() for storage in found] == [FLOAT * 7 * 3]


def test_storages_of_two_adapted_layers_by_hand():
    layers = [AdaptedLinear(nn.Linear(a, b), 2.0, 3) for a, b in ((5, 3), (3, 4))]
    given = [torch.randn(7, 5)]
    for layer in layers:
        rows, columns = layer.weight.shape
        ours = [torch.randn(s, requires_grad=True) for s in ((2, columns), (2,), (rows, 2))]
        layer.latents = LayerLatents(*ours)
        given += [*ours, layer.weight, layer.bias]
    with saved_storages(given) as found:
        layers[1](layers[0](given[0]))
    # hidden, gain and their product in both; the input of the second, for its A
    assert sum(s.nbytes() for s in found) == FLOAT * (2 * (7 * 2 + 2 + 7 * 2) + 7 * 3)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fake_tensors_count_as_real_ones(setting):
    build, shape = Llama(**TINY), (2, 5)
    real = [
        forward(adapted(build, again, num_hidden_layers=blocks), shape, setting)[1]
        for again, blocks in ((setting.again, 3), (False, 2), (False, 1))
    ]
    block = real[1] - real[2] if setting.again else 0
    assert counted(build, shape, setting) == real[0] + block > 0


def test_grids_keep_a_copy_of_every_weight():
    build = Llama(**TINY)
    few, many = (
        counted(build, shape, Setting("decided")) - counted(build, shape, Setting("open"))
        for shape in ((1, 2), (1, 3))
    )
    with FakeTensorMode():
        network = adapted(build)
    copies = sizes(network)["copies fp32"]
    # so much is left of the difference without any token, but for A, e and B on their grids
    assert copies < few - 2 * (many - few) < copies + 4 * FLOAT * network.num_adapter_weights
