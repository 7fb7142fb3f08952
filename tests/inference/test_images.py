"""image_classification from folders to exports, against what transformers and Pillow compute."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import bayes_lora
from bayes_lora.errors import InputError
from bayes_lora.inference import checkpoint
from bayes_lora.inference.backbone import load_backbone
from bayes_lora.inference.cli import main
from bayes_lora.inference.config import DataConfig
from bayes_lora.inference.data import load_task
from bayes_lora.inference.encoding import collator, encode_dataset
from bayes_lora.inference.images import pixels, read_folder, why_unreadable

COLOURS = {"blue": (40, 60, 180), "red": (190, 50, 40)}
SIDE = 8  # pixels of what the tiny vision transformer reads


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noisy images in two colours, of different sizes and formats, in folders by class."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for split, size in (("train", 30), ("validation", 11)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(size + (name == "red")):  # the classes are not equally frequent
                shape = (*draw.integers(9, 30, size=2), 3)
                values = draw.normal(colour, 40, size=shape).clip(0, 255).astype(np.uint8)
                suffix = ("png", "jpg", "webp")[number % 3]
                Image.fromarray(values).save(folder / split / name / f"{number}.{suffix}")
    (folder / "train" / "notes.txt").write_text("no image")
    (folder / "train" / "red" / ".hidden.png").write_text("no image")
    for hidden in (".cache", "red/.ipynb_checkpoints"):
        (folder / "train" / hidden).mkdir()
        (folder / "train" / hidden / "1.png").write_text("no image")
    return folder


@pytest.fixture
def vit(backbone, tmp_path):
    """Folder of a tiny vision transformer and its processor."""
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model = backbone("vit", num_channels=3)
    del model.config.pad_token_id  # real ones have none
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def options(photos, vit):
    """What a run on these images is told."""
    return {
        "task": "image_classification", "data_dir": photos, "backbone": vit, "text_columns": None,
        "train_file": None, "validation_file": None, "max_length": None,
    }  # fmt: skip


def test_a_folder_is_read_by_class_and_what_is_no_image_left_out(photos):
    found = read_folder(photos / "train")
    assert found["label"] == ["blue"] * 30 + ["red"] * 31
    assert all(f"/{c}/" in path for c, path in zip(found["label"], found["image"], strict=True))


def test_a_batch_is_what_the_processor_of_transformers_makes(photos, vit):
    config = DataConfig(task="image_classification", data_dir=str(photos))
    task, train, _ = load_task(config, seed=0)
    processor = load_backbone(str(vit), 2, "image_classification").processor
    rows = [encode_dataset(train, task, processor, 128)[i] for i in (4, 40)]
    batch = collator(task, processor)(rows)
    assert batch["labels"].tolist() == [0, 1]
    for row, found in zip(rows, batch["pixel_values"], strict=True):
        # red, green, blue from 0 to 255 become -1 to 1
        resized = Image.open(row["image"]).convert("RGB").resize((SIDE, SIDE), Image.BILINEAR)
        wanted = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(found, wanted, atol=1e-5)


def test_an_image_is_turned_as_its_camera_says_and_has_three_colours(vit, tmp_path):
    values = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    image = Image.fromarray(values)  # grey
    image.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right-hand column
    image.save(tmp_path / "turned.png", exif=exif)
    processor = load_backbone(str(vit), 2, "image_classification").processor
    paths = [str(tmp_path / name) for name in ("plain.png", "turned.png")]
    plain, turned = pixels(paths, processor)
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain[1], plain[2])


def test_a_file_names_images_relative_to_itself(photos, tmp_path, monkeypatch):
    rows = {"blue": "train/blue/0.png", "red": "train/red/1.jpg"}
    for name in ("train.csv", "validation.csv"):
        with (photos / name).open("w", newline="") as file:
            csv.writer(file).writerows([("photo", "label"), *((p, c) for c, p in rows.items())])
    monkeypatch.chdir(tmp_path)
    files = [str(photos / name) for name in ("train.csv", "validation.csv")]
    task, train, _ = load_task(DataConfig("image_classification", None, *files), seed=0)
    assert task.text_columns == ("photo",)
    assert task.label_names == ("blue", "red")
    assert train["photo"][:] == [str(photos / path) for path in rows.values()]


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "png"), ("I;16", "tif"), ("F", "tif")])
def test_an_image_of_many_bits_is_refused_not_made_white(mode, kind, tmp_path):
    path = tmp_path / f"1.{kind}"
    Image.fromarray(np.full((9, 9), 40_000, np.uint16 if mode == "I;16" else np.float32)).save(path)
    assert why_unreadable(str(path)) == f"{path} has more than 8 bits a colour: convert it"


def test_a_file_that_a_program_would_run_is_no_image(tmp_path):
    path = tmp_path / "1.png"
    Image.new("RGB", (9, 9)).save(path, format="EPS")
    assert why_unreadable(str(path)) == f"{path} is no image"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read"),
        (lambda path: path.write_text("no image"), "is no image"),
        (lambda path: path.write_bytes(b""), "is no image"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_damaged_image_is_told_before_training(damage, message, suffix, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for split in ("train", "validation"):
        for name in COLOURS:
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / split / name / f"1.{suffix}")
    bad = tmp_path / "train" / "red" / f"1.{suffix}"
    assert why_unreadable(str(bad)) == ""
    damage(bad)
    with pytest.raises(InputError, match=message) as caught:
        load_task(DataConfig("image_classification", str(tmp_path)), seed=0)
    assert f"train, row 2: {bad}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_images_and_options_that_contradict(photos, tmp_path, error_of):
    def error(**options):
        return error_of(DataConfig(task="image_classification", **options))

    assert "has no images" in error(data_dir=str(tmp_path))
    assert "needs examples of your own" in error()
    files = {"train_file": "a.csv", "validation_file": "b.csv"}
    assert "leave out problem" in error(**files, problem="classification")
    assert "leave these out" in error(**files, data_dir=str(photos))
    (tmp_path / "train" / "one").mkdir(parents=True)
    (tmp_path / "validation" / "two").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "one" / "1.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "validation" / "two" / "1.png")
    assert "1 classes" in error(data_dir=str(tmp_path))
    (tmp_path / "train" / "three").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "three" / "1.png")
    assert "'two'; the classes are one, three" in error(data_dir=str(tmp_path))


def test_models_that_do_not_read_such_images_are_refused(inputs, vit, backbone, tmp_path):
    with pytest.raises(InputError, match="cannot load backbone"):
        load_backbone(str(inputs / "model"), 2, "image_classification")
    ViTImageProcessorPil(size={"height": 4 * SIDE, "width": SIDE}).save_pretrained(vit)
    with pytest.raises(InputError, match="does not read what its image processor makes"):
        load_backbone(str(vit), 2, "image_classification")
    grey = tmp_path / "grey"
    for part in (backbone("vit"), ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})):
        part.save_pretrained(grey)
    with pytest.raises(InputError, match="colour image"):
        load_backbone(str(grey), 2, "image_classification")
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_std=[0.0] * 3)
    processor.save_pretrained(vit)
    with pytest.raises(InputError, match="it is not finite"):
        load_backbone(str(vit), 2, "image_classification")


def test_a_model_saved_in_half_precision_is_read_in_full(vit):
    AutoModelForImageClassification.from_pretrained(vit).bfloat16().save_pretrained(vit)
    model = load_backbone(str(vit), 2, "image_classification").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_validation_file_without_the_column_is_told_so(photos, tmp_path, error_of):
    image = photos / "train" / "red" / "0.png"
    (tmp_path / "a.csv").write_text(f"photo,label\n{image},x\n{image},y\n")
    (tmp_path / "b.csv").write_text("picture,label\nb.png,x\n")
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    assert "has no column 'photo'" in error_of(DataConfig("image_classification", None, *files))


@pytest.mark.slow
def test_all_commands_work_for_images(command, options, photos, vit, tmp_path, capsys):
    code, _, err = command(
        **options, epochs=30, learning_rate=0.003, price=1, quantized_tensors="A e B"
    )
    assert code == 0, err
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9  # by colour alone they can be told
    assert main(["diagnose", str(folder)]) == 0
    assert main(["decide", str(folder), "--min_probability", "0.6"]) == 0
    paths = read_folder(photos / "validation")["image"]
    run = bayes_lora.load(folder)
    wanted = run.predict(paths)
    assert run.predict([photos / "validation/red/0.png"])["label"].tolist() == ["red"]
    assert run.predict(paths, draws=3)["entropy_posterior"].max() > 0
    processor = run.processor
    for form in ("peft", "merged", "packed"):
        to = tmp_path / form
        assert main(["export", str(folder), "--format", form, "--to", str(to)]) == 0
        found = bayes_lora.load(to).predict(paths)
        assert found["label"].tolist() == wanted["label"].tolist()
        assert np.abs(found["probabilities"] - wanted["probabilities"]).max() < 1e-5
        card = (to / "README.md").read_text()
        assert "pipeline_tag: image-classification" in card
        assert ("AutoModelForImageClassification" in card) != (form == "packed")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    stock = AutoModelForImageClassification.from_pretrained(vit)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "peft").eval()
    inputs = {"pixel_values": pixels(paths, processor)}
    with torch.no_grad():
        both = [model(**inputs).logits.softmax(-1) for model in (merged, adapted)]
    assert merged.config.id2label == {0: "blue", 1: "red"}
    assert torch.allclose(*both, atol=1e-5)
    source, target = photos / "in.jsonl", tmp_path / "out.jsonl"
    rows = ["validation/red/0.png", "validation/blue/2.webp", "train/notes.txt", "nowhere.png"]
    source.write_text("".join(json.dumps({"image": row}) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["predict", str(folder), "--input", str(source), "--output", str(target)]) == 0
    assert "nowhere.png cannot be read (No such file or directory)" in capsys.readouterr().err
    *good, text, absent = map(json.loads, target.read_text().splitlines())
    assert [row["label"] for row in good] == ["red", "blue"]
    assert "is no image" in text["error"]
    assert "cannot be read" in absent["error"]


@pytest.mark.slow
def test_a_run_on_images_goes_on_from_its_checkpoint(command, options, tmp_path, monkeypatch):
    """Bit for bit, as with texts; and not if an image has changed."""
    settings = options | {"epochs": 4, "save_steps": 5, "price": 1}
    assert command(**settings, output_dir=tmp_path / "whole")[0] == 0
    write = checkpoint._write

    def write_and_end(*arguments):
        write(*arguments)
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", write_and_end)
        with pytest.raises(SystemExit, match="killed"):
            command(**settings)
    image = next((options["data_dir"] / "train" / "red").glob("*.png"))
    content = image.read_bytes()
    image.write_bytes(content + b" ")  # after its end: the same pixels
    code, _, err = command(**settings, resume="")
    assert (code, "is of other data" in err) == (2, True)
    image.write_bytes(content)
    assert command(**settings, resume="")[0] == 0
    both = [(tmp_path / name / "guide.safetensors").read_bytes() for name in ("whole", "run")]
    assert both[0] == both[1]


@pytest.mark.slow
def test_methods_are_compared_on_images(options, run_compare, tmp_path):
    methods = ["full", "bitfit", "lora", "adalora", "lora_8bit", "qr"]
    words = ["--tasks", "image_classification", "--seeds", "0", "--learning_rates", "1e-3"]
    changes = options | {"task": None}
    code, _, err = run_compare(*words, "--methods", *methods, **changes)
    assert code == 0, err
    cells = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("method")
    assert set(cells.index) == set(methods)
    assert cells["score"].between(0, 1).all()
    assert cells["relative_bops_32"]["lora_8bit"] == pytest.approx(1 / 16, rel=0.05)
