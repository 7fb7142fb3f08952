"""causal_lm from text files to exports, against what transformers itself computes of the texts."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.bundle import read_bundle
from bayes_lora.inference.cli import main
from bayes_lora.inference.config import DataConfig
from bayes_lora.inference.data import load_task
from bayes_lora.inference.encoding import encode, encode_dataset
from bayes_lora.inference.tasks import TASKS
from bayes_lora.next_tokens import IGNORED

LENGTH = 8  # tokens, so that most texts are of several pieces


@pytest.fixture
def texts(inputs, tmp_path):
    """Files of lines, an empty one among them; options that train on them."""
    for split in ("train", "validation"):
        rows = map(json.loads, (inputs / f"{split}.jsonl").read_text().splitlines())
        lines = [row["sentence"] for row in rows]
        lines.insert(1, "")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    return {
        "task": "causal_lm", "text_columns": None, "max_length": LENGTH,
        "train_file": tmp_path / "train.txt", "validation_file": tmp_path / "validation.txt",
    }  # fmt: skip


@pytest.fixture
def written(texts, pretrained, decided_run, tmp_path):
    """Folder of a run of a kind, decided at random, and the lines it is judged by."""

    def make(kind, **changes):
        options = texts | {"backbone": pretrained(kind), "epochs": 6} | changes
        lines = (tmp_path / "validation.txt").read_text().splitlines()
        return decided_run(**options), [line for line in lines if line]

    return make


@torch.no_grad()
def log_probability(model, tokenizer, line):
    """Of the pieces of a text, and how many tokens, one call of transformers for each."""
    ids = tokenizer(line)["input_ids"]
    total, tokens = 0.0, 0
    for start in range(0, len(ids), LENGTH):
        piece = torch.tensor([ids[start : start + LENGTH]])
        if piece.shape[1] > 1:
            loss = model(input_ids=piece, labels=piece).loss
            total -= float(loss) * (piece.shape[1] - 1)
            tokens += piece.shape[1] - 1
    return total, tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_token_is_judged_as_transformers_does(kind, written, tmp_path):
    """Weights alone are quantized, and so the merged export computes what the run does."""
    folder, lines = written(kind, quantized_tensors="weight A e B")
    before = json.loads((folder / "metrics.json").read_text())
    assert before["perplexity"] == pytest.approx(math.exp(before["nll"]))
    assert main(["export", str(folder), "--format", "merged", "--to", str(tmp_path / "to")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to")
    wanted = [log_probability(model, tokenizer, line) for line in lines]
    assert any(len(tokenizer(line)["input_ids"]) > LENGTH for line in lines)
    found = bayes_lora.load(folder).predict(lines)
    assert found["log_probability"] == pytest.approx([p for p, _ in wanted], abs=1e-3)
    assert found["tokens"].tolist() == [tokens for _, tokens in wanted]
    assert found["deviation_posterior"].tolist() == [0.0] * len(lines)
    report = json.loads((tmp_path / "to" / "merge_report.json").read_text())
    per_token = -sum(p for p, _ in wanted) / sum(tokens for _, tokens in wanted)
    assert report["nll"] == pytest.approx(per_token, abs=1e-4)
    assert report["exported_nll"] == pytest.approx(per_token, abs=1e-4)
    assert report["exported_perplexity"] == pytest.approx(math.exp(per_token), rel=1e-3)
    assert report["largest_logit_change"] < 1e-3


@pytest.mark.slow
def test_all_commands_work_for_texts(written, texts, tmp_path, capsys):
    refined = {"quantized_tensors": "weight A e B", "refine_epochs": 1}
    folder, lines = written("llama", weight_posterior="normal", draws=3, **refined)
    model, tokenizer, _ = load_backbone(str(tmp_path / "llama"), None, "causal_lm")
    both = [log_probability(model, tokenizer, line) for line in lines]
    base = -sum(p for p, _ in both) / sum(tokens for _, tokens in both)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["nll"] < base - 0.1  # it has learned
    assert metrics["averaged_perplexity"] < math.exp(base)
    bundle = read_bundle(folder / "posterior.nc")
    assert "posterior_predictive" not in bundle.groups()
    each = bundle["predictions"]["log_probability"].to_numpy()[0]
    tokens = bundle["predictions_constant_data"]["label"].to_numpy()
    mixture = np.log(np.exp(each).mean(0))
    assert metrics["averaged_nll"] == pytest.approx(-mixture.sum() / tokens.sum(), rel=1e-5)
    assert main(["diagnose", str(folder)]) == 0
    assert "Terms of the ELBO" in (report := (folder / "report.html").read_text())
    assert "Reliability" not in report
    assert main(["decide", str(folder)]) == 0
    assert "perplexity" in capsys.readouterr().out
    run = bayes_lora.load(folder)
    wanted = run.predict(lines[:9])
    for words in (["packed"], ["packed", "--with_base"]):
        to = tmp_path / f"packed{len(words)}"
        assert main(["export", str(folder), "--format", *words, "--to", str(to)]) == 0
        found = bayes_lora.load(to).predict(lines[:9])
        assert found["log_probability"] == pytest.approx(wanted["log_probability"], abs=1e-4)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": line} for line in lines[:9]] + [{"text": 3}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", str(source), "--output", str(target), "--draws", "4", "--seed", "2"]
    assert main(["predict", str(folder), *words]) == 0
    *good, bad = map(json.loads, target.read_text().splitlines())
    over = run.predict(lines[:9], draws=4, seed=2)
    assert [row["log_probability"] for row in good] == over["log_probability"].tolist()
    assert (over["deviation_posterior"] > 0).all()
    assert "error" in bad
    mixed, nothing = run.predict([lines[0], "", lines[1]]), run.predict(["", ""])
    assert mixed["log_probability"] == pytest.approx(
        [wanted["log_probability"][0], 0.0, wanted["log_probability"][1]], abs=1e-4
    )
    assert nothing["tokens"].tolist() == nothing["log_probability"].tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_peft_loads_the_adapter_of_a_language_model(kind, written, tmp_path):
    """As the card says."""
    folder, lines = written(kind, quantized_tensors="A e B")
    to = tmp_path / "to"
    assert main(["export", str(folder), "--format", "peft", "--to", str(to)]) == 0
    config = json.loads((to / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    card = (to / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"BACKBONE"', repr(str(tmp_path / kind)))
    names = {}
    exec(code.replace("FOLDER", str(to)), names)
    tokenizer = AutoTokenizer.from_pretrained(to)
    wanted = [log_probability(names["model"].eval(), tokenizer, line)[0] for line in lines[:9]]
    for run in (folder, to):
        found = bayes_lora.load(run).predict(lines[:9])
        assert found["log_probability"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_baselines_are_trained_on_texts_too(
    texts, small_run, inputs, backbone, tmp_path, cells_here
):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    for part in (tokenizer, backbone("llama writes", vocab_size=len(tokenizer))):
        part.save_pretrained(tmp_path / "llama")
    options = small_run | texts | {"backbone": tmp_path / "llama", "epochs": 2, "rank": 2}
    options.pop("task")
    words = [w for n, v in options.items() if v is not None for w in (f"--{n}", str(v))]
    methods = ["lora", "lora_8bit"]
    words += ["--methods", *methods, "--seeds", "0", "--learning_rates", "0.01"]
    out = tmp_path / "out"
    assert main(["compare", "--tasks", "causal_lm", *words, "--output_dir", str(out)]) == 0
    for method in methods:
        path = out / "causal_lm" / method / "seed-0" / "metrics.json"
        found = json.loads(path.read_text())
        assert found["score"] == -found["nll"] < -1


def test_long_texts_become_pieces_and_none_is_lost(tokenizer):
    texts = ["a b c", "a b c d e f g h a b c d e", "h"]
    pieces = encode({"text": texts}, TASKS["causal_lm"], tokenizer, max_length=8)
    assert pieces.text == [0, 1, 1, 1, 2]
    ids = pieces.columns["input_ids"]
    assert pieces.columns["labels"] == [[IGNORED, *text[1:]] for text in ids]
    words = [tokenizer.decode(text, skip_special_tokens=False) for text in ids]
    assert words[1:4] == [
        "[CLS] a b c d e f [SEP]", "[CLS] g h a b c d [SEP]", "[CLS] e [SEP]"
    ]  # fmt: skip


def test_texts_without_a_token_to_predict_are_left_out_or_refused(tokenizer, tmp_path):
    bare = tokenizer
    bare.backend_tokenizer.post_processor = None
    task = TASKS["causal_lm"]
    path = tmp_path / "a.txt"
    path.write_text("a b\nc\n\nd e f\n")
    config = DataConfig(task="causal_lm", train_file=str(path), validation_file=str(path))
    found, train, _ = load_task(config, seed=0)
    assert (found, train["text"][:]) == (task, ["a b", "c", "d e f"])
    assert [len(ids) for ids in encode_dataset(train, task, bare, 8)["labels"]] == [2, 3]
    path.write_text("a\nb\n")
    train = load_task(config, seed=0)[1]
    with pytest.raises(InputError, match="no text of causal_lm has two tokens"):
        encode_dataset(train, task, bare, 8)


def test_a_model_that_looks_ahead_is_refused(inputs, backbone, tmp_path):
    with pytest.raises(InputError, match=r"is no language model: its cls\..* is not pretrained"):
        load_backbone(str(inputs / "model"), None, "causal_lm")
    config = AutoConfig.from_pretrained(inputs / "model")
    for part in (
        AutoModelForCausalLM.from_config(config),  # an encoder, with a head for words
        AutoTokenizer.from_pretrained(inputs / "model"),
    ):
        part.save_pretrained(tmp_path / "both ways")
    with pytest.raises(InputError, match="is no causal language model: it looks at the tokens"):
        load_backbone(str(tmp_path / "both ways"), None, "causal_lm")
    model = backbone("llama", vocab_size=60)
    for part in (model, AutoTokenizer.from_pretrained(inputs / "model")):
        part.save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"lm_head\.weight is not pretrained"):
        load_backbone(str(tmp_path / "classifier"), None, "causal_lm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "y"}, "causal_lm has no label but the text"),
        ({"problem": "regression"}, "causal_lm has no label but the text"),
        ({"text_columns": ["a", "b"]}, "causal_lm has no label but the text"),
        ({"text_columns": ["a"]}, "has no column 'a'"),
        ({"train_file": None, "validation_file": None}, "causal_lm needs examples of your own"),
    ],
)
def test_what_texts_are_is_said_wrongly(changes, message, texts, error_of):
    given = {n: str(v) for n, v in texts.items() if n in ("task", "train_file", "validation_file")}
    assert message in error_of(DataConfig(**given | changes))


def test_the_column_of_text_is_found_or_asked_for(tmp_path, error_of):
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,a b\n2,c d\n")
    config = DataConfig(task="causal_lm", train_file=str(path), validation_file=str(path))
    assert load_task(config, seed=0)[0].text_columns == ("body",)
    path.write_text("title,body\na,a b\nb,c d\n")
    assert "has 2 columns of text; name one as text_columns" in error_of(config)
