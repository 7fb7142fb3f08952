"""Every baseline trains what it says, is as large as it says, and starts as the backbone."""

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from bayes_lora.errors import InputError
from bayes_lora.inference import train_baseline
from bayes_lora.inference.backbone import Backbone
from bayes_lora.inference.baselines import BASELINES, ORTHOGONALITY, Setting, build
from bayes_lora.inference.cells import train_cell
from bayes_lora.inference.config import parse
from bayes_lora.inference.published import SCORES, TASKS, as_published
from bayes_lora.inference.truncation import truncate
from bayes_lora.layers import TENSORS
from bayes_lora.network import AdaptedNetwork


@pytest.fixture
def made(backbone, batch):
    """Build a baseline of rank 3 on a tiny BERT, for so many steps."""

    def make(method, steps=100, calibrations=(1,), **setting):
        where = Backbone(backbone(), None, ()), 3, 6.0, "all-linear"
        return build(method, Setting(*where, steps, lambda: [batch], calibrations, **setting))

    return make


def trained(baseline):
    return {n: p for n, p in baseline.network.named_parameters() if p.requires_grad}


# per block: four 16 x 16 and two 16 x 24 matrices; two blocks; the head is 16 x 2 and 2
HEAD = 16 * 2 + 2
LINEAR = 2 * (4 * 16 * 16 + 2 * 16 * 24)
LORA = 2 * 3 * (4 * 32 + 2 * 40)
FULL_RANK = LINEAR + LORA + 2 * 6 * 3  # with e


@pytest.mark.parametrize(
    ("method", "parameters", "macs"),
    [
        ("lora", LORA, LORA),
        # one bottleneck a block of 1248 / 64 -> 20 units, or two of 10, and their bias
        ("pfeiffer", 2 * (2 * 16 * 20 + 20 + 16), 2 * 2 * 16 * 20),
        ("houlsby", 4 * (2 * 16 * 10 + 10 + 16), 4 * 2 * 16 * 10),
        ("bitfit", 16 + 2 * (5 * 16 + 24 + 2 * 16) + 16, 0),
    ],
)
def test_sizes_by_hand(method, parameters, macs, made):
    baseline = made(method)
    names = trained(baseline)
    assert sum(p.numel() for p in names.values()) == parameters + HEAD
    assert baseline.relative_bops() == pytest.approx((LINEAR + macs) / FULL_RANK)


def test_full_fine_tuning_trains_everything(made):
    baseline = made("full")
    assert all(p.requires_grad for p in baseline.network.parameters())
    assert baseline.relative_bops() == pytest.approx(LINEAR / FULL_RANK)


@pytest.mark.parametrize("method", sorted(BASELINES))
def test_it_starts_as_the_backbone_and_every_trained_parameter_has_a_gradient(
    method, made, backbone, batch
):
    baseline = made(method)
    baseline.network.eval()
    logits = baseline.network(**batch).logits
    torch.testing.assert_close(logits, backbone().eval()(**batch).logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # off the start, where half of every adapter has no gradient
        for parameter in trained(baseline).values():
            parameter += 0.1 * torch.randn_like(parameter)
    baseline.network(**batch).logits[:, 0].sum().backward()
    grads = {n: p.grad for n, p in trained(baseline).items()}
    if method in ("full", "bitfit"):  # softmax does not feel a shift of all keys
        grads = {n: g for n, g in grads.items() if "key.bias" not in n}
        grads = {n: g for n, g in grads.items() if "embeddings" not in n}
    assert [n for n, g in grads.items() if g is None or not g.any()] == []


def test_adalora_ends_with_the_ranks_of_its_budget(made, batch):
    baseline = made("adalora", steps=40)
    optimizer = torch.optim.Adam(trained(baseline).values(), 0.01)
    labels = torch.arange(len(batch["input_ids"])) % 2
    for step in range(40):
        logits = baseline.network(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits, labels) + baseline.penalty()
        loss.backward()
        optimizer.step()
        baseline.after_step(step)
        optimizer.zero_grad()
    ranks = baseline.ranks()
    assert sum(ranks) == 12 * 3  # of 12 layers; it began with ranks of 4 or 5
    assert len(set(ranks)) > 1
    sizes = [16 + 1 + 16] * 4 + [16 + 1 + 24] * 2
    macs = sum(r * n for r, n in zip(ranks, 2 * sizes, strict=True))
    assert baseline.relative_bops() == pytest.approx((LINEAR + macs) / FULL_RANK)


def test_adaloras_penalty_is_the_one_that_peft_adds_to_its_loss(made, batch):
    baseline = made("adalora")
    labels = torch.arange(len(batch["input_ids"])) % 2
    inner = baseline.network.eval().base_model
    inner.peft_config["default"].orth_reg_weight = ORTHOGONALITY
    output = inner(**batch, labels=labels)
    likelihood = torch.nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(likelihood + baseline.penalty(), output.loss)


def test_adaloras_published_settings_reach_peft(made, tmp_path):
    config = parse(["--task", "rte", "--output_dir", str(tmp_path), "--epochs", "2"])
    changed, pruning = as_published(config)
    found = changed.training.learning_rate, changed.training.epochs, changed.network.alpha
    assert (*found, changed.data.max_length) == (1.2e-3, 50, 32, 320)
    baseline = made("adalora_published", steps=2500, pruning=pruning)
    peft = baseline.network.peft_config["default"]
    assert (peft.init_r, peft.target_r, peft.tinit, peft.tfinal, peft.deltaT) == (
        2,
        1,
        600,
        1800,
        1,
    )
    matrices = [
        p for n, p in baseline.network.named_parameters() if ".lora_A." in n or ".lora_B." in n
    ]
    grams = [p @ p.T if len(p) == 2 else p.T @ p for p in matrices]
    norms = [torch.linalg.matrix_norm(gram - torch.eye(2)) for gram in grams]
    torch.testing.assert_close(baseline.penalty(), 0.3 * torch.stack(norms).mean())


def test_published_means_are_those_that_the_authors_state():
    stated = {"full": 0.8809, "lora": 0.8834, "adalora": 0.8931}
    for method, scores in SCORES.items():
        assert sum(scores) / len(TASKS) == pytest.approx(stated[method], abs=1e-4)  # two digits


def test_bitfit_needs_biases(made, monkeypatch):
    monkeypatch.setattr(
        BertForSequenceClassification, "named_parameters", lambda *_, **__: iter(())
    )
    with pytest.raises(InputError, match="no bias vectors"):
        made("bitfit")


def test_adalora_needs_steps_to_prune_in(made):
    with pytest.raises(InputError, match="cannot prune within 1 steps"):
        made("adalora", steps=1)


def test_uniform_bits_begin_and_have_their_ranges_set_when_they_are_told_to(made, batch):
    baseline = made("lora_4bit", steps=8, calibrations=[2, 5])
    network = baseline.network.eval()
    before = network(**batch).logits
    baseline.after_step(0)
    torch.testing.assert_close(network(**batch).logits, before)
    baseline.after_step(1)
    assert (network(**batch).logits - before).abs().max() > 0.01
    assert baseline.relative_bops() == pytest.approx(1 / 64)
    assert baseline.bits == dict.fromkeys(TENSORS, 4)
    ranges = {n: b.clone() for n, b in network.named_buffers() if n.endswith("_limits")}

    def moved():
        return [n for n, b in network.named_buffers() if n in ranges and not b.equal(ranges[n])]

    with torch.no_grad():
        network.weights *= 3.0
    baseline.after_step(3)
    assert moved() == []
    baseline.after_step(4)
    assert moved()


def test_uniform_bits_are_of_the_tensors_that_are_quantized(made):
    baseline = made("lora_8bit", quantized_tensors=["weight", "A"])
    assert baseline.bits == {"weight": 8, "A": 8}
    assert list(baseline.network.network.quantized_tensors) == ["weight", "A"]
    assert 8 / 32 < baseline.relative_bops() < 1.0  # activations are in full precision


def test_truncation_keeps_the_largest_singular_values_of_all_layers(backbone):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "intermediate.dense"])
    network = get_peft_model(backbone(), config)
    layers = [m for m in network.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    scale = [3.0, 1.0, 0.1, 2.0]
    for layer, size in zip(layers, scale, strict=True):
        for part in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(part["default"].weight, std=size)
    before = [layer.get_delta_weight("default").detach().clone() for layer in layers]
    ranks = list(truncate(network, 5 * 36.0).values())
    after = [layer.get_delta_weight("default").detach() for layer in layers]
    values = [torch.linalg.svdvals(delta)[:4] for delta in before]
    kept = torch.cat(values).sort(descending=True).values[: sum(ranks)].min()
    assert 4 <= sum(ranks) <= 6  # components have 32 or 40 entries
    for rank, delta, whole, singular in zip(ranks, after, before, values, strict=True):
        assert rank == int((singular >= kept * (1 - 1e-5)).sum())
        u, s, vh = torch.linalg.svd(whole)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(delta, best, atol=1e-4, rtol=1e-4)


def test_calibrations_are_where_the_phases_of_finetune_have_them(
    small_run, few_draws, tmp_path, monkeypatch
):
    """Counted in the steps that each has done, over all calls."""
    words = [f for n, v in small_run.items() for f in (f"--{n}", str(v))]
    words += ["--epochs", "3", "--batch_size", "20", "--draws", "2", "--refine_epochs", "0"]
    steps = []

    def counted(function):
        def count(self, *arguments, **named):
            steps.append(1)
            return function(self, *arguments, **named)

        return count

    calibrated = {}
    for method in ("qr", "lora_8bit"):
        found = calibrated[method] = []
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step))
            calibrate = AdaptedNetwork.calibrate

            def spy(network, *arguments, found=found, calibrate=calibrate):
                found.append(len(steps))
                calibrate(network, *arguments)

            patch.setattr(AdaptedNetwork, "calibrate", spy)
            train_cell(method, words, tmp_path / method)
    assert calibrated["qr"] == calibrated["lora_8bit"]
    assert len(set(calibrated["qr"])) == 3


def test_a_baseline_is_judged_without_autocast(small_run, tmp_path, monkeypatch):
    words = [f for n, v in small_run.items() for f in (f"--{n}", str(v))]
    types, judge = {}, train_baseline.judge

    def dtype_in(when):
        def note(module, inputs, output):
            types.setdefault(when[0], set()).add(output.dtype)

        return note

    when = ["training"]

    def judged(baseline, data):
        when[0] = "judging"
        return judge(baseline, data)

    fit = train_baseline._fit

    def fitted(baseline, config, data):
        next(
            m for m in baseline.network.modules() if isinstance(m, torch.nn.Linear)
        ).register_forward_hook(dtype_in(when))
        return fit(baseline, config, data)

    monkeypatch.setattr(train_baseline, "judge", judged)
    monkeypatch.setattr(train_baseline, "_fit", fitted)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train_cell("full", [*words, "--mixed_precision", "bf16"], tmp_path / "run")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert types == {"training": {torch.bfloat16}, "judging": {torch.float32}}
