"""Predictions of files on a tiny model: order, bad rows, resumption, memory."""

import csv
import io
import json
import os

import numpy as np
import pytest

import bayes_lora
from bayes_lora.inference import predict_file
from bayes_lora.inference import rows as rows_module
from bayes_lora.inference.cli import main
from bayes_lora.inference.loading import FineTuned
from bayes_lora.inference.rows import Row, read_rows

TEXTS = [f"the {noun} {verb} {'here ' * (i % 3)}." for i in range(3)
         for noun in ("key", "dogs", "cabinet") for verb in ("is", "sing")]  # fmt: skip


@pytest.fixture
def run(command, tmp_path):
    code, _, err = command(price=3)
    assert code == 0, err
    return tmp_path / "run"


@pytest.fixture
def predict(run, tmp_path, capsys):
    """Run `bayes-lora predict` on a file; returns exit code, outputs and the rows written."""

    def call(source, suffix=".jsonl", *words):
        target = tmp_path / f"out{suffix}"
        arguments = ["--input", str(source), "--output", str(target), *words]
        capsys.readouterr()
        code = main(["predict", str(run), *arguments])
        printed = capsys.readouterr()
        rows = None
        if target.exists():
            with target.open() as file:
                rows = list(csv.DictReader(file)) if suffix == ".csv" else [*map(json.loads, file)]
        return code, printed.out, printed.err, rows

    return call


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_is_predicted_in_order(predict, run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_file, "CHUNK", 5)
    source = lines(tmp_path / "in.jsonl", [{"sentence": text, "other": 1} for text in TEXTS])
    code, out, _, rows = predict(source, ".jsonl", "--draws", "3")
    assert code == 0
    assert "18 rows, 0 of them" in out
    wanted = bayes_lora.load(run).predict(TEXTS, draws=3)
    assert [row["line"] for row in rows] == list(range(1, 19))
    assert [row["label"] for row in rows] == wanted["label"].tolist()
    for name in ("probability", "entropy", "entropy_data", "entropy_posterior"):
        np.testing.assert_allclose([row[name] for row in rows], wanted[name], atol=1e-6)
    assert min(row["entropy_posterior"] for row in rows) >= 0
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert not (tmp_path / "out.jsonl.settings").exists()


def test_csv_in_and_out(predict, tmp_path):
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "sentence"])
        table.writerows([[1, "the key is here ."], [2, "the dogs,\nsing"], [3, ""]])
        file.write('\n\n4,the key,sings\n5,the dogs sing\n6,"open to the end\n7,the key\n')
    code, out, err, rows = predict(source, ".csv")
    assert code == 0
    assert [row["line"] for row in rows] == ["2", "3", "5", "8", "9", "10", "11"]
    assert [bool(row["label"]) for row in rows] == [True, True, False, False, True, False, True]
    assert rows[2]["error"] == "sentence is empty"
    assert rows[3]["error"] == "3 values for 2"
    assert rows[5]["error"].startswith("not csv")
    assert "line 5: sentence is empty" in err
    assert "7 rows, 3 of them" in out


def rows_of(text, columns=("sentence",)):
    return [*read_rows(io.StringIO(text, newline=""), ".csv", columns)]


@pytest.mark.parametrize("closed", ["", '"b', 'b"c,9'])
@pytest.mark.parametrize("number", [5, 20_000])
def test_a_quote_that_is_not_closed_costs_one_line(number, closed):
    texts = [f"text {i}" for i in range(number)]
    many = "".join(f"{i},{text}\n" for i, text in enumerate(texts))
    rows = rows_of(f'id,sentence\n0,before\n1,"lost\n{many}{closed}\n')
    assert [row.texts[0] for row in rows[: number + 2] if not row.error] == ["before", *texts]
    assert (rows[1].line, rows[1].error.startswith("not csv")) == (3, True)
    assert len(rows) <= number + 3


def test_a_record_that_never_ends_is_bounded(monkeypatch):
    """Every line closes the quote of the one before and opens another."""
    monkeypatch.setattr(rows_module, "LONGEST", 1000)
    most, keep_one = [], rows_module._Lines.keep_one

    def counted(self):
        most.append(len(self.record))
        keep_one(self)

    monkeypatch.setattr(rows_module._Lines, "keep_one", counted)
    rows = rows_of("id,sentence\n" + "".join(f'{i}","text {i}\n' for i in range(300)))
    assert [row.line for row in rows] == list(range(2, 302))
    assert max(most) <= 1000 / 10


def test_a_row_of_several_lines_with_a_value_too_many_is_one_row():
    rows = rows_of('id,sentence\n1,"a\nb",extra\n2,fine\n')
    assert rows == [Row(2, (), "3 values for 2, in 2 lines"), Row(4, ("fine",))]


def test_lines_of_good_records_stay_together():
    rows = rows_of('id,sentence\n1,"a\n""b"",\nc"\n2,d\n')
    assert [(row.line, row.texts) for row in rows] == [(2, ('a\n"b",\nc',)), (5, ("d",))]


@pytest.mark.parametrize(
    ("header", "said"),
    [("id;sentence", "separated by commas; it has id;sentence"), ("sentence,sentence", "has 2")],
)
def test_a_header_that_does_not_name_the_column_once(header, said):
    with pytest.raises(bayes_lora.InputError, match=said):
        rows_of(f"{header}\n1,2\n")


def test_no_row_that_can_be_read_is_an_error(predict, tmp_path):
    code, out, err, rows = predict(lines(tmp_path / "in.jsonl", [{"text": "a"}, {"sentence": ""}]))
    assert code == 2
    assert "2 rows, 2 of them" in out
    assert "no row of" in err
    assert [row["error"] for row in rows] == ["sentence is missing", "sentence is empty"]


def test_bad_rows_are_counted_and_the_rest_is_predicted(predict, tmp_path):
    good = json.dumps({"sentence": "the key is here ."}).encode()
    bad = [
        b"{" + b"[" * 200_000, b"[1]", b'{"text": "a"}', b'{"sentence": 3}', b'{"sentence": null}',
        b'{"sentence": "\xff"}', b'{"sentence": "\\ud800"}',
    ]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([good, *bad, b"", good]) + b"\n")
    code, out, err, rows = predict(source)
    assert code == 0
    assert "9 rows, 7 of them could not be read" in out
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert [("error" in row) for row in rows] == [False] + [True] * 7 + [False]
    assert rows[0]["probability"] == pytest.approx(rows[-1]["probability"])
    for line, said in enumerate(
        ["not JSON", "not a JSON object", "is missing", "is no text", "is missing"], start=2
    ):
        assert any(f"line {line}:" in text and said in text for text in err.splitlines())
    assert err.count("not UTF-8") == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("torn", [0, 7])
def test_an_interrupted_file_is_gone_on_with(predict, tmp_path, monkeypatch, suffix, torn):
    monkeypatch.setattr(predict_file, "CHUNK", 4)
    rows = [{"sentence": text} for text in TEXTS]
    rows[2] = {"nothing": 1}
    source = lines(tmp_path / "in.jsonl", rows)
    code, whole_out, whole_err, whole = predict(source, suffix, "--draws", "2")
    (tmp_path / f"out{suffix}").unlink()
    calls, real = [], FineTuned.predict

    def stopping(self, texts, draws, seed):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, texts, draws, seed)

    monkeypatch.setattr(FineTuned, "predict", stopping)
    assert predict(source, suffix, "--draws", "2")[0] == 130
    partial = tmp_path / f"out{suffix}.partial"
    if torn:  # as if it had been killed while it wrote a row
        partial.write_bytes(partial.read_bytes()[:-torn])
    code, _, err, _ = predict(source, suffix, "--draws", "3")
    assert code == 2
    assert "is of another command" in err
    times = source.stat()
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # it was written to
    code, _, err, _ = predict(source, suffix, "--draws", "2")
    assert (code, "another state of the input" in err) == (2, True)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    del calls[:]
    monkeypatch.setattr(FineTuned, "predict", lambda *given: calls.append(1) or real(*given))
    code, out, err, rows = predict(source, suffix, "--draws", "2")
    assert (code, out, err) == (0, whole_out, whole_err)
    assert rows == whole
    assert len(calls) == (4 if torn else 3)


def test_rows_of_several_lines_are_counted_as_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(predict_file, "CHUNK", 2)
    path = tmp_path / "out.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["line", "label"])
        writer.writerows([number, f'one\nli"ne\r {number}'] for number in range(5))
    whole = path.read_text()
    with path.open("a+", encoding="utf-8", newline="") as out:
        out.write('5,"torn\n')
        assert predict_file._finished(out, header=True) == 4
    with path.open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["line", "0", "1", "2", "3"]
    assert whole.startswith(path.read_text())


def test_memory_is_that_of_a_chunk(run, tmp_path, monkeypatch):
    """However long the file is, no more rows are read than one chunk before they are written."""
    monkeypatch.setattr(predict_file, "CHUNK", 6)
    ahead, real = [], predict_file.read_rows

    def counted(*given):
        for row in real(*given):
            ahead.append(row)
            assert len(ahead) <= 6
            yield row

    monkeypatch.setattr(predict_file, "read_rows", counted)

    def answers(model, rows, draws, seed):
        del ahead[:]
        return [{"line": row.line} for row in rows]

    monkeypatch.setattr(predict_file, "answers", answers)
    source = lines(tmp_path / "in.jsonl", [{"sentence": "a"}] * 50)
    model = bayes_lora.load(run)
    total, bad, first = predict_file.predict_file(model, source, tmp_path / "out.jsonl")
    assert (total, bad, first) == (50, 0, [])


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("in.txt", [], "must end in .jsonl or .csv"),
        ("nosuch.jsonl", [], "there is no file"),
        ("in.csv", [], "has no column 'sentence', separated by commas; it has text"),
        ("bad.csv", [], "header of the input is no csv"),
        ("in.jsonl", ["--draws", "-1"], "draws must be at least 0"),
    ],
)
def test_wrong_input_is_one_line(predict, tmp_path, name, words, said):
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "bad.csv").write_text('"a"b,sentence\n')
    (tmp_path / "in.csv").write_text("text\na\n")
    lines(tmp_path / "in.jsonl", [{"sentence": "a"}])
    code, _, err, rows = predict(tmp_path / name, ".jsonl", *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert rows is None
    assert not list(tmp_path.glob("out*"))


def test_an_empty_file_has_no_rows(predict, tmp_path):
    code, out, _, rows = predict(lines(tmp_path / "in.jsonl", []))
    assert (code, rows) == (0, [])
    assert "0 rows" in out
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


def test_an_output_is_replaced_only_if_told_to(predict, tmp_path):
    source = lines(tmp_path / "in.jsonl", [{"sentence": "the key is here ."}])
    (tmp_path / "out.jsonl").write_text('{"mine": 1}\n')
    code, _, err, rows = predict(source)
    assert code == 2
    assert "is there already" in err
    assert rows == [{"mine": 1}]
    assert predict(source, ".jsonl", "--overwrite")[3][0]["line"] == 1
