"""predict.py: answers, tables, figures and refusals, with the weights of a short run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of
from PIL import Image

import alexnet
import predict


@pytest.fixture
def answer(trained, capsys):
    """A function that runs predict.py on the trained weights: (status, stdout, stderr)."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        weights = ["--weights", str(trained / "AlexNet.pth")]
        status = predict.main([*map(str, argv), *weights])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def photo(data) -> Path:
    return alexnet.image_files(data / "val")[0]


def probabilities_of(trained: Path, photo: Path, views: str) -> dict[str, float]:
    """The answer worked out anew: reading, views, softmax, mean."""
    net = alexnet.AlexNet.from_state_dict(torch.load(trained / "AlexNet.pth")).eval()
    image = alexnet.center_square(alexnet.read_image(photo))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    image = pixels.reshape(256, 256, 3).permute(2, 0, 1) / 255
    corners = [(16, 16)]
    if views == "ten-crop":
        corners += [(0, 0), (0, 32), (32, 0), (32, 32)]
    crops = [image[:, y : y + 224, x : x + 224] for y, x in corners]
    if views == "ten-crop":
        crops += [crop.flip(2) for crop in crops]
    with torch.inference_mode():
        mean = net(torch.stack(crops)).softmax(1).mean(0).tolist()
    return dict(zip(["daisy", "roses", "tulips"], mean, strict=True))


def test_one_photo_is_answered_by_ten_views(answer, trained, photo):
    status, out, _ = answer(photo, "--no-figure")
    expected = probabilities_of(trained, photo, "ten-crop")
    best = max(expected, key=expected.get)
    assert status == 0
    assert out.splitlines()[0] == f"class: {best}, probability: {expected[best]:.3f}"
    found = dict(line.split() for line in out.splitlines()[1:])
    assert found == {name: f"{p:.3f}" for name, p in expected.items() if name != best}


@pytest.mark.parametrize("views", ["ten-crop", "center-crop"])
def test_json_gives_one_object_a_line(answer, trained, photo, views):
    status, out, _ = answer(photo, photo, "--json", f"--{views}", "--top-k", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    expected = probabilities_of(trained, photo, views)
    names = sorted(expected, key=expected.get, reverse=True)[:2]
    assert status == 0 and len(lines) == 2 and lines[0] == lines[1]
    assert lines[0]["path"] == str(photo) and lines[0]["class"] == names[0]
    assert lines[0]["true_class"] == photo.parent.name
    assert [row["class"] for row in lines[0]["top"]] == names
    for row in lines[0]["top"]:
        assert row["probability"] == pytest.approx(expected[row["class"]], abs=1e-5)


def test_a_folder_gives_a_table_and_the_accuracy(answer, trained, data):
    status, out, _ = answer(data / "val", "--no-figure")
    wrong, right = [], []
    for path in alexnet.image_files(data / "val"):
        expected = probabilities_of(trained, path, "center-crop")
        best = max(expected, key=expected.get)
        row = (expected[best], [best, f"{expected[best]:.3f}", str(path)])
        (right if best == path.parent.name else wrong).append(row)
    table = [row for _, row in sorted(wrong, reverse=True) + sorted(right)]
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[:3]] == table
    assert ["(the folder says" in line for line in out.splitlines()[:3]] == [
        *([True] * len(wrong)),
        *([False] * len(right)),
    ]
    accuracy = ["accuracy", f"{len(right) / 3:.4f}", f"({len(right)}", "of", "3)"]
    assert out.splitlines()[-1].split() == accuracy


def test_the_innermost_folder_that_is_a_class_is_the_true_class(answer, photo, tmp_path):
    for folder in ("tulips/daisy/2019", "2019"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(photo, tmp_path / folder)
    _, out, _ = answer(tmp_path, "--json")
    first, second = map(json.loads, out.splitlines())
    assert "true_class" not in first and second["true_class"] == "daisy"


def test_the_table_puts_the_surest_mistakes_first_and_then_the_most_doubtful(capsys):
    def prediction(name: str, probability: float, true_class: str | None) -> predict.Prediction:
        return predict.Prediction(Path(name), [("rose", probability)], true_class)

    predictions = [
        *(prediction("sure", 0.9, "rose"), prediction("wrong", 0.4, "tulip")),
        *(prediction("unknown", 0.8, None), prediction("doubtful", 0.3, "rose")),
        prediction("surely wrong", 0.7, "tulip"),
    ]
    predictions.sort(key=predict.Prediction.doubt)
    predict.print_answers(predictions, ["rose", "tulip", "daisy"])
    names = [p.path.name for p in predictions]
    assert names == ["surely wrong", "wrong", "doubtful", "unknown", "sure"]
    *table, rose, tulip, accuracy = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2] for line in table] == names
    assert [line.split("  ", 1)[1].strip() for line in (rose, tulip, accuracy)] == [
        *("1.0000  (2 of 2)", "0.0000  (0 of 2)", "0.5000  (2 of 4)")
    ]


def test_columns_stand_straight_behind_letters_of_two_columns():
    assert predict.pad(["daisy", "玫瑰", ""]) == ["daisy", "玫瑰 ", "     "]


def test_a_bad_file_is_named_and_the_others_are_answered(answer, photo, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    status, out, err = answer(tmp_path / "text.jpg", photo, tmp_path / "missing.jpg", "--json")
    assert status == 1
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(photo)]
    for name in ("text.jpg", "missing.jpg"):
        assert any(x.startswith("error: ") and name in x for x in err.splitlines())


def test_without_a_display_the_figure_is_saved(answer, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    status, _, err = answer(photo)
    assert status == 0 and "prediction.png" in err
    status, _, _ = answer(photo, "--save", tmp_path / "figure.pdf")
    assert status == 0 and (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    with Image.open("prediction.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 20)) > 100
    assert {path.name for path in tmp_path.iterdir()} == {"prediction.png", "figure.pdf"}


@pytest.mark.parametrize("script", ["predict.py", "train.py"])
def test_the_backend_of_a_notebook_may_be_missing(trained, data, photo, tmp_path, script):
    argv = [photo, "--weights", trained / "AlexNet.pth"]
    if script == "train.py":  # which writes its curves again, and nothing else
        argv = ["--data", data, "--output", trained, "--resume", "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, argv)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "module://lacking_inline.backend_inline"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def test_figures_that_cannot_be(answer, photo, capsys):
    for options in (["--save", "x.xyz"], ["--save", "."], ["--save", "x.png", "--no-figure"]):
        with pytest.raises(SystemExit) as caught:
            answer(photo, *options)
        assert caught.value.code == 2 and "--save" in capsys.readouterr().err


def test_json_alone_draws_nothing(answer, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = answer(photo, "--json")
    assert (status, len(out.splitlines()), err) == (0, 1, "") and not list(tmp_path.iterdir())


def test_json_of_a_folder_is_in_the_order_of_the_files(answer, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = answer(data, "--json")
    paths = [json.loads(line)["path"] for line in out.splitlines()]
    assert paths == [str(path) for path in alexnet.image_files(data)]
    assert not list(tmp_path.iterdir())  # nor a confusion matrix


def hidden_of(trained: Path, photo: Path) -> torch.Tensor:
    """The last hidden activations worked out anew, (4096,)."""
    net = alexnet.AlexNet.from_state_dict(torch.load(trained / "AlexNet.pth")).eval()
    found = []
    net.classifier[6].register_forward_hook(lambda _, inputs, __: found.append(inputs[0][0]))
    image = alexnet.center_square(alexnet.read_image(photo)).crop((16, 16, 240, 240))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    with torch.inference_mode():
        net(pixels.reshape(1, 224, 224, 3).permute(0, 3, 1, 2) / 255)
    return found[0].double()


def test_similar_finds_the_nearest_training_photos_but_not_the_photo_itself(
    answer, trained, data, photo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "photos_at_once", lambda views: 4)  # several batches
    training = alexnet.image_files(data / "train")
    hidden = {path: hidden_of(trained, path) for path in [photo, *training]}
    _, out, _ = answer(photo, training[3], "--similar", data / "train", "--json")
    for query, line in zip([photo, training[3]], out.splitlines(), strict=True):
        distances = {p: (hidden[p] - hidden[query]).norm().item() for p in training if p != query}
        nearest = sorted(distances, key=distances.get)[:6]
        similar = json.loads(line)["similar"]
        assert [found["path"] for found in similar] == [str(path) for path in nearest]
        for path, found in zip(nearest, similar, strict=True):
            assert found["distance"] == pytest.approx(distances[path], rel=1e-3, abs=1e-3)
    _, printed, err = answer(training[3], "--similar", data / "train", "--save", "similar.png")
    lines = [line.removeprefix("similar:").split() for line in printed.splitlines()[-6:]]
    assert lines == [[f"{found['distance']:.2f}", found["path"]] for found in similar]
    assert err == "the figure is in similar.png\n" and Path("similar.png").stat().st_size > 5000
    _, _, err = answer(
        *training[:6], "--center-crop", "--similar", photo.parent, "--save", "similar.png"
    )
    assert "the first 5 of the table's 6 photos" in err


def test_similar_to_what_is_no_folder_of_photos(answer, trained, photo, tmp_path):
    options = ("--weights", trained / "AlexNet.pth", "--no-figure")
    for folder in (tmp_path, tmp_path / "none", photo):
        assert str(folder) in error_of(predict.main, photo, "--similar", folder, *options)
    status, out, err = answer(tmp_path / "none.jpg", "--similar", photo.parent, "--json")
    assert (status, out) == (1, "") and err.count("error: ") == 1


def test_a_reader_that_has_seen_enough_is_no_error(trained, photo):
    command = [sys.executable, ROOT / "predict.py", photo, "--json"]
    command += ["--weights", trained / "AlexNet.pth"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_odd_pictures_are_answered_as_the_plain_one_is(answer, photo, tmp_path):
    with Image.open(photo) as image:
        image.save(tmp_path / "plain.png")
        image.convert("RGBA").save(tmp_path / "alpha.png")
        image.convert("L").save(tmp_path / "grey.png")
        image.convert("L").convert("RGB").save(tmp_path / "grey in colour.png")
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned(6))
    _, out, _ = answer(*sorted(tmp_path.iterdir()), "--json")
    tops = {Path(x["path"]).stem: x["top"] for x in map(json.loads, out.splitlines())}
    assert tops["alpha"] == tops["plain"] == tops["turned"]
    assert tops["grey"] == tops["grey in colour"]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_weights_that_are_none(trained, photo, tmp_path):
    weights = tmp_path / "w.pth"
    options = (photo, "--no-figure", "--weights", weights)
    shutil.copyfile(trained / "class_idx.json", tmp_path / "class_idx.json")
    assert "no such file" in error_of(predict.main, *options)
    whole = (trained / "AlexNet.pth").read_bytes()
    for content in (b"", b"not weights", whole[: len(whole) // 2], whole[:-30]):
        weights.write_bytes(content)
        assert str(weights) in error_of(predict.main, *options)
    torch.save(torch.nn.Linear(2, 2).state_dict(), weights)
    error_of(predict.main, *options)
    torch.save([1, 2], weights)
    error_of(predict.main, *options)
    state = torch.load(trained / "AlexNet.pth")
    state["classifier.6.bias"][0] = float("nan")
    torch.save(state, weights)
    assert "numbers" in error_of(predict.main, *options)


@pytest.mark.parametrize(
    "content", ['{"0": "a", "1": "b"}', "[]", "", '{"0": "a", "1": "b", "3": "c"}', "[[1", "3"]
)
def test_a_class_list_that_does_not_fit(trained, photo, tmp_path, content):
    classes = tmp_path / "class_idx.json"
    classes.write_text(content)
    options = ("--weights", trained / "AlexNet.pth", "--classes", classes)
    assert str(classes) in error_of(predict.main, photo, *options)
    assert str(tmp_path / "none") in error_of(
        predict.main, photo, *options[:2], "--classes", tmp_path / "none"
    )


def test_out_of_memory_names_the_option_that_helps(trained, photo, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(predict, "predict_probabilities", fail)
    message = error_of(predict.main, photo, "--weights", trained / "AlexNet.pth")
    assert "--device cpu" in message


def test_a_folder_without_pictures(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    options = ("--weights", trained / "AlexNet.pth")
    assert str(tmp_path / "empty") in error_of(predict.main, tmp_path / "empty", *options)
