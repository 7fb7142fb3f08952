"""Costs of a network that has no weights, against published counts and counts by hand."""

import json

import pytest
from transformers import (
    AlbertConfig,
    DebertaV2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MixtralConfig,
    ViTConfig,
    ViTMAEConfig,
)

from bayes_lora.inference.cli import main
from bayes_lora.inference.costs import costs, meta_network


@pytest.fixture
def deberta(tmp_path):
    """Configuration of DeBERTaV3-base, as a file."""
    DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512, relative_attention=True,
        position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path / "config.json")


def test_deberta_v3_base_has_its_known_size(deberta):
    network = meta_network(deberta, 8, "all-linear")
    assert network.device.type == "meta"
    found = costs(network, [32, 8])
    whole = found["network"]
    assert round(whole["encoder_parameters"] / 1e6) == 184
    assert whole["adapted_layers"] == len(found["layers"]) == 72
    assert whole["lora_parameters"] == 1_327_104
    assert whole["trainable_parameters"] == 1_327_104 + 8 * 72 + whole["head_parameters"]
    # 12 blocks of four 768 x 768 and two 768 x 3072 matrices; e is used once a component
    assert whole["macs"] == 12 * (4 * 768**2 + 2 * 768 * 3072) + 1_327_104 + 8 * 72
    assert whole["at_bits"][32]["bit_operations"] == pytest.approx(1024 * whole["macs"], rel=1e-6)
    assert whole["at_bits"][8]["relative_bops_32"] == pytest.approx(1 / 16)
    assert whole["at_bits"][8]["adapter_bytes"] == 1_327_104 + 8 * 72


def test_query_key_and_value_alone(deberta):
    network = meta_network(deberta, 8, r".*(query|key|value)_proj")
    whole = costs(network, [4])["network"]
    assert (whole["adapted_layers"], whole["lora_parameters"]) == (36, 442_368)
    adapted = 36 * 768**2 + 442_368 + 8 * 36
    rest = whole["macs"] - adapted
    assert rest == 12 * (768**2 + 2 * 768 * 3072)
    share = (adapted * 16 + rest * 1024) / (1024 * (adapted + rest))
    assert whole["at_bits"][4]["relative_bops_32"] == pytest.approx(share)
    assert whole["at_bits"][4]["relative_bops_16"] == pytest.approx(4 * share)


def test_a_decoder_of_a_billion_parameters(tmp_path, capsys):
    """Grouped queries: keys and values of 8 heads, queries of 32."""
    LlamaConfig(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    file = tmp_path / "costs.json"
    words = ["--backbone", str(tmp_path / "config.json"), "--json", str(file)]
    assert main(["costs", *words]) == 0
    whole = json.loads(file.read_text())["network"]
    sizes = [(2048, 2048)] * 2 + [(2048, 512)] * 2 + [(2048, 8192)] * 3
    frozen = 16 * sum(rows * columns for rows, columns in sizes)
    adapters = 16 * 8 * sum(rows + columns for rows, columns in sizes)
    norms = (2 * 16 + 1) * 2048
    assert whole["encoder_parameters"] == 128256 * 2048 + frozen + norms
    assert whole["lora_parameters"] == adapters
    assert whole["scale_parameters"] == 8 * 16 * 7
    assert whole["head_parameters"] == 2 * 2048
    assert whole["macs"] == frozen + adapters + 8 * 16 * 7
    assert f"{whole['encoder_parameters']:,} parameters" in capsys.readouterr().out


def test_a_shared_block_counts_at_every_depth(tmp_path):
    """ALBERT-base: one block, twelve times."""
    AlbertConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=12
    ).save_pretrained(tmp_path)
    whole = costs(meta_network(str(tmp_path), 8, "all-linear"), [32])["network"]
    block = 4 * 768**2 + 2 * 768 * 3072
    adapter = 8 * (4 * (768 + 1 + 768) + 2 * (768 + 1 + 3072))
    assert whole["lora_parameters"] + whole["scale_parameters"] == adapter
    assert whole["macs"] == 12 * (block + adapter)
    assert whole["at_bits"][32]["bit_operations"] == pytest.approx(1024 * whole["macs"], rel=1e-6)


def test_images_and_language_models_have_costs_too(tmp_path):
    """One block of each, by hand; a vision transformer, GPT-NeoX, and Marian's two stacks."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    block = 4 * 16 * 16 + 2 * 16 * 24
    paired = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    for name, config, macs in (
        ("vit", ViTConfig(**size, intermediate_size=24), block),
        ("neox", GPTNeoXConfig(**size, intermediate_size=24, vocab_size=60), block),
        ("marian", MarianConfig(d_model=16, **paired), 2 * block + 4 * 16 * 16),
    ):
        config.save_pretrained(tmp_path / name)
        network = meta_network(str(tmp_path / name), 2, "all-linear")
        adapters = sum(spec.num_weights(2) for spec in network.specs)
        assert costs(network, [32])["network"]["macs"] == macs + adapters


def test_an_architecture_that_does_neither_is_refused(tmp_path, capsys):
    ViTMAEConfig().save_pretrained(tmp_path)
    assert main(["costs", "--backbone", str(tmp_path)]) == 2
    assert "vit_mae neither classifies nor writes" in capsys.readouterr().err


def test_the_command_prints_and_writes(inputs, tmp_path, capsys):
    file = tmp_path / "costs.json"
    words = ["--backbone", str(inputs / "model"), "--rank", "3", "--bits", "2"]
    tensors = ["--quantized_tensors", "weight", "input"]
    assert main(["costs", *words, *tensors, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "attention.self.query" in printed
    assert "2 bits" in printed
    found = json.loads(file.read_text())
    layer = found["layers"]["bert.encoder.layer.0.intermediate.dense"]
    assert (layer["in"], layer["out"]) == (16, 24)
    assert layer["macs"] == 24 * 16 + 3 * (16 + 1 + 24)
    at = layer["at_bits"]["2"]
    assert at["weight_bytes"] == 24 * 16 / 4
    assert at["adapter_bytes"] == 4 * 3 * (16 + 1 + 24)  # neither A, e nor B is quantized
    assert at["bit_operations"] == 24 * 16 * 4 + 3 * (16 * 32 * 2 + (1 + 24) * 32 * 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backbone", "/nowhere"], "cannot build backbone '/nowhere'"),
        (["--rank", "0"], "rank is 0"),
        (["--bits", "3"], "invalid choice: 3"),
        (["--target_modules", "x"], "matches no linear layer"),
        (["--quantized_tensors", "bias"], "no such tensor"),
        (["--json", "/nowhere/costs.json"], "cannot write /nowhere/costs.json"),
    ],
)
def test_errors_are_one_line(words, said, inputs, capsys):
    options = [] if "--backbone" in words else ["--backbone", str(inputs / "model")]
    assert main(["costs", *options, *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_experts_in_a_stack_are_said_not_to_be_counted(tmp_path, capsys):
    MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    target = tmp_path / "costs.json"
    assert main(["costs", "--backbone", str(tmp_path), "--json", str(target)]) == 0
    stacked = 2 * 4 * 3 * 32 * 64
    assert json.loads(target.read_text())["network"]["stacked_parameters"] == stacked
    assert f"Not counted: {stacked:,} parameters" in capsys.readouterr().out


def test_layers_that_are_used_more_or_less_often_have_lines_of_their_own(tmp_path, capsys):
    AlbertConfig(
        vocab_size=60, embedding_size=16, hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_hidden_groups=2, num_attention_heads=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert main(["costs", "--backbone", str(tmp_path), "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert "Not counted" not in out
    once = 32 * 32 + 4 * (32 + 32 + 1)
    lines = [line.split() for line in out.splitlines() if "attention.query" in line]
    assert sorted((int(n), int(macs.replace(",", ""))) for n, *_, macs, _ in lines) == [
        (1, once), (1, 2 * once)
    ]  # fmt: skip
