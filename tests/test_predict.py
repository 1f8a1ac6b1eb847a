"""predict.py: answers, tables, figures and refusals, with the weights of a short run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import POSIX, ROOT, error_of, link
from matplotlib import pyplot
from PIL import Image

import alexnet
import predict

CLASSES = ["daisy", "roses", "tulips"]


@pytest.fixture(autouse=True)
def no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a case writes goes to a folder of its own, and no window opens."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def answer(trained: Path, capsys: pytest.CaptureFixture[str]) -> Callable:
    """A function that runs predict.py on the trained weights: (status, stdout, stderr)."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        weights = ["--weights", str(trained / "AlexNet.pth"), "--device", "cpu"]
        status = predict.main([*weights, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def photo(data: Path) -> Path:
    return alexnet.image_files(data / "val")[0]


def read(photo: Path) -> torch.Tensor:
    """The central square in 0..1, (1, 3, 256, 256)."""
    return torch.from_numpy(alexnet.read_square(photo).copy()).permute(2, 0, 1)[None] / 255


def probabilities_of(trained: Path, photo: Path, ten_views: bool) -> dict[str, float]:
    """The answer worked out anew, by the function that test_alexnet.py checks."""
    net = alexnet.load_network(trained / "AlexNet.pth")
    probabilities = alexnet.predict_probabilities(net, read(photo), ten_views)
    return dict(zip(CLASSES, probabilities[0].tolist(), strict=True))


def test_one_photo_is_answered_by_ten_views_and_drawn(answer, trained, photo):
    status, out, err = answer(photo)
    expected = probabilities_of(trained, photo, ten_views=True)
    best = max(expected, key=expected.get)
    assert status == 0 and err == "the figure is in prediction.png\n"
    assert out.splitlines()[0] == f"class: {best}, probability: {expected[best]:.3f}"
    found = {name: value for value, name in map(str.split, out.splitlines()[1:])}
    assert found == {name: f"{p:.3f}" for name, p in expected.items() if name != best}
    with Image.open("prediction.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_json_gives_one_object_a_line_in_the_order_of_the_files(answer, trained, data, photo):
    others = [path for path in alexnet.image_files(data / "val") if path != photo]
    files = [*others, photo]
    status, out, err = answer(*files, "--json", "--views", "center", "--top-k", "2")
    assert (status, err) == (0, "") and not list(Path().iterdir())  # nothing is drawn
    answers = [json.loads(line) for line in out.splitlines()]
    assert [found["path"] for found in answers] == [*map(str, files)]
    expected, last = probabilities_of(trained, photo, ten_views=False), answers[-1]
    names = sorted(expected, key=expected.get, reverse=True)[:2]
    assert (last["class"], last["true_class"]) == (names[0], photo.parent.name)
    assert [row["class"] for row in last["top"]] == names
    for row in last["top"]:
        assert row["probability"] == pytest.approx(expected[row["class"]], abs=1e-5)


def test_a_folder_gives_a_table_the_accuracy_and_a_confusion_matrix(answer, trained, data):
    status, out, _ = answer(data / "val")
    wrong, right = [], []
    for path in alexnet.image_files(data / "val"):
        expected, label = probabilities_of(trained, path, ten_views=False), path.parent.name
        best = max(expected, key=expected.get)
        line = f"{expected[best]:.3f}  {best}  {path}"
        if best == label:
            right.append(line)
        else:
            wrong.append(f"{line}  (the folder says {label})")
    lines = out.splitlines()
    assert status == 0 and lines[:3] == sorted(wrong, reverse=True) + sorted(right)
    assert lines[-1] == f"{len(right) / 3:.4f}  accuracy: {len(right)} of 3"
    assert {path.name for path in Path().iterdir()} == {"confusion_matrix.png"}


def test_the_surest_mistakes_come_first_and_then_the_most_doubtful(capsys):
    answers = []
    for name, probability, true_class in (
        *(("sure", 0.9, "rose"), ("wrong", 0.4, "tulip"), ("unknown", 0.8, None)),
        *(("doubtful", 0.3, "rose"), ("surely wrong", 0.7, "tulip")),
        *(("x", 0.95, "rose"), ("y", 0.96, "rose")),
    ):
        top = {"class": "rose", "probability": probability}
        known = {"true_class": true_class} if true_class else {}
        answers.append({"path": name, **top, "top": [top], **known})
    answers.sort(key=predict.review_order)
    names = ["surely wrong", "wrong", "doubtful", "unknown", "sure", "x", "y"]
    assert [answer["path"] for answer in answers] == names
    known = [answer for answer in answers if "true_class" in answer]
    predict.print_scores(known, 3)
    assert capsys.readouterr().out.splitlines() == [
        "recall  precision",
        "1.0000     0.6667  rose: 4 of 4 right, named 6 times",
        "0.0000          -  tulip: 0 of 2 right, named 0 times",
        *("0.5000  mean recall over the classes", "0.6667  accuracy: 4 of 6"),
    ]
    for answer in answers:
        others = ["a", "b", "c", "tulip" if answer["path"] == "wrong" else "d", "tulip"]
        answer["top"] += [{"class": name, "probability": 0.01} for name in others]
    predict.print_scores(known, 6)
    assert "0.8333  top-5 accuracy" in capsys.readouterr().out.splitlines()


def test_patterns_are_expanded_and_the_innermost_class_folder_is_true(answer, photo, trained):
    link(Path("AlexNet.pth"), trained / "AlexNet.pth")
    index = {"0": "daisy", "1": "rose\u0301", "2": "tulips"}  # as another program may write it
    Path("class_idx.json").write_text(json.dumps(index))
    folder = Path("tulips", "rose\u0301", "2019 [x]")  # the same name, as macOS may write it
    folder.mkdir(parents=True)
    for path in (folder / "2.jpg", folder / "1.jpg", folder / "[1].jpg", "3.jpg", "tulips/4.jpg"):
        shutil.copy(photo, path)
    given = ["1.jpg", "2.jpg", "[1].jpg"]
    for pattern, names, true_class in (
        (folder, given, None),  # classes above what was given do not count
        (folder.parent, given, "ros\u00e9"),
        (folder / "?.jpg", ["1.jpg", "2.jpg"], None),
        (folder / "[1].jpg", ["[1].jpg"], None),
        ("tul*/?.jpg", ["4.jpg"], "tulips"),
        ("tulips/ros*", given, "ros\u00e9"),  # a folder, as if it was given
        ("3.jpg", ["3.jpg"], None),
    ):
        _, out, _ = answer(pattern, "--json", "--weights", "AlexNet.pth")
        found = [json.loads(line) for line in out.splitlines()]
        assert [Path(x["path"]).name for x in found] == names
        assert {x.get("true_class") for x in found} == {true_class}
    for missing in ("a**b.jpg", "tulips/[4].jpg"):
        status, out, err = answer(missing, "--json", "--weights", "AlexNet.pth")
        assert (status, out) == (1, "") and f"{missing}: no such photo" in err.replace("\\", "/")


def test_a_bad_file_is_named_and_the_others_are_answered(answer, photo):
    Path("text.jpg").write_text("no picture")
    long = f"{'x' * 300}.jpg"
    status, out, err = answer("text.jpg", photo, "missing.jpg", long, "--json")
    assert status == 1
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(photo)]
    for name in ("text.jpg", "missing.jpg", long):
        assert any(x.startswith("cannot be read: ") and name in x for x in err.splitlines())
    assert answer("text.jpg")[:2] == (1, "")


def test_similar_finds_the_nearest_training_photos_but_not_itself(answer, trained, data, photo):
    training, hidden = alexnet.image_files(data / "train"), {}
    net = alexnet.load_network(trained / "AlexNet.pth")
    for path in [photo, *training]:
        with torch.inference_mode():
            hidden[path] = net.hidden(read(path)[:, :, 16:240, 16:240]).double()
    _, out, _ = answer(photo, training[3], "--similar", data / "train", "--json")
    for query, line in zip([photo, training[3]], out.splitlines(), strict=True):
        distances = {p: (hidden[p] - hidden[query]).norm().item() for p in training if p != query}
        nearest = sorted(distances, key=distances.get)[:6]
        similar = json.loads(line)["similar"]
        assert [found["path"] for found in similar] == [str(path) for path in nearest]
        for path, found in zip(nearest, similar, strict=True):
            assert found["distance"] == pytest.approx(distances[path], rel=1e-3, abs=1e-3)
    _, printed, err = answer(training[3], "--similar", data / "train", "--save", "similar.png")
    lines = [line.split("at ")[1] for line in printed.splitlines() if "like it" in line]
    assert lines == [f"{found['distance']:.2f}: {found['path']}" for found in similar]
    assert err == "the figure is in similar.png\n" and Path("similar.png").stat().st_size > 5000


def test_the_figure_shows_the_answer(answer, photo):
    _, out, _ = answer(photo, "--json")
    figure = predict.draw_answers([json.loads(out)])
    left, right = figure.axes
    assert len(left.images) == 1 and left.get_title() == photo.name
    assert right.get_title() == f"the folder says {photo.parent.name}"
    bars = [bar for bar in right.patches if bar.get_width() < 1]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(1, abs=1e-3)
    names = [text.get_text().split()[1] for text in right.texts]
    assert sorted(names) == CLASSES
    for name, bar, text in zip(names, bars, right.texts, strict=True):
        assert text.get_text() == f"{bar.get_width():.3f}  {name}"
        red, green, blue, _ = bar.get_facecolor()
        assert (green > max(red, blue)) == (name == photo.parent.name)


def test_of_many_photos_the_24_most_doubtful_are_drawn(answer, data, monkeypatch):
    drawn = []
    draw = predict.draw_answers
    monkeypatch.setattr(predict, "draw_answers", lambda x: drawn.append(draw(x)) or drawn[0])
    shutil.copytree(data / "train", "more")
    _, out, _ = answer(data, "more", "--save", "grid.pdf")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.images]
    assert titles == re.findall(r"\d+\.jpg", out)[:24]
    assert Path("grid.pdf").read_bytes().startswith(b"%PDF")
    assert not pyplot.get_fignums()


def test_a_window_opens_for_named_photos_and_never_for_a_folder(answer, photo, monkeypatch):
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    canvas = pyplot.figure().canvas
    monkeypatch.setattr(type(canvas), "required_interactive_framework", "a display")
    two, folder = alexnet.image_files(photo.parents[1])[:2], [photo.parent, photo]
    for photos, n_drawn in (([photo], [1]), (two, [2]), (folder, [])):
        shown.clear()
        assert answer(*photos, "--views", "center")[0] == 0
        assert [sum(len(axis.images) for axis in figure.axes) for figure in shown] == n_drawn
    assert {path.name for path in Path().iterdir()} == {"confusion_matrix.png"}


def test_the_confusion_matrix_counts_answers():
    pairs = [*[("a", "a")] * 3, ("a", "b"), ("b", "b"), *[("b", "c")] * 2]
    answers = [{"class": guess, "true_class": true} for true, guess in pairs]
    figure = predict.draw_confusion(answers, ["a", "b", "c"])
    axis = figure.axes[0]
    expected = [[3 / 4, 1 / 4, 0], [0, 1 / 3, 2 / 3], [0, 0, 0]]
    assert np.allclose(axis.images[0].get_array() ** 2, expected)
    found = {text.get_position(): text.get_text() for text in axis.texts}  # column, row
    assert found == {(0, 0): "3", (1, 0): "1", (1, 1): "1", (2, 1): "2"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a (4)", "b (3)", "c (0)"]
    assert axis.get_title() == "4 of 7 photos right: 0.571"


def test_names_that_no_font_has_are_drawn_without_warnings(photo):
    name = "\U0010fffd $\\frac$ \udcff {"  # a letter of no font, no formula, half a letter
    top = {"class": name, "probability": 0.9}
    answer = {"path": str(photo), **top, "top": [top], "true_class": name}
    answer["similar"] = [{"path": str(photo), "distance": 1.5}]
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import predict
predict.show(predict.draw_answers([{answer!a}]), pathlib.Path("a.png"))
predict.show(predict.draw_confusion([{answer!a}], [{name!a}]), pathlib.Path("b.svg"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        encoding="utf-8",
    )
    expected = "the figure is in a.png\nthe figure is in b.svg\n"
    assert (done.returncode, done.stderr) == (0, expected)


def test_no_figure_replaces_what_is_read(answer, trained, photo, data):
    Path("photos/tulips").mkdir(parents=True)
    names = ["prediction.png", "confusion_matrix.png", "photos/tulips/1.png"]
    for name in names:
        shutil.copy(photo, name)
    link(Path("link.png"), names[2])
    before = {name: Path(name).read_bytes() for name in names}
    for argv in (
        ["prediction.png"],
        ["prediction.png", "--save", Path("prediction.png").absolute()],
        ["link.png", "--save", names[2]],
        ["photos", "--save", f"photos/../{names[2]}"],
        [photo, "--similar", "photos", "--save", names[2]],
        ["photos", "confusion_matrix.png"],
    ):
        weights = ("--weights", trained / "AlexNet.pth", "--device", "cpu")
        message = error_of(predict.main, *argv, *weights)
        assert "would replace a file that is read: " in message
        assert ("--save" in message) == ("confusion_matrix.png" not in argv)
    assert answer("prediction.png", "--json")[0] == 0  # which draws nothing
    assert answer("prediction.png", "--save", "other.png")[0] == 0
    assert answer(photo)[0] == 0 and answer("photos")[0] == 0  # figures of ours are replaced
    assert {name: Path(name).read_bytes() == content for name, content in before.items()} == {
        "prediction.png": False, "confusion_matrix.png": False, "photos/tulips/1.png": True,
    }  # fmt: skip


def test_no_figure_lies_among_the_photos(trained, photo, monkeypatch):
    shutil.copytree(photo.parent, "photos")
    before = sorted(os.listdir("photos"))
    weights = ("--weights", trained / "AlexNet.pth", "--device", "cpu")
    message = error_of(predict.main, "photos", "--save", "photos/all.png", *weights)
    assert "would lie among the photos" in message
    monkeypatch.chdir("photos")
    for argv in (["."], [before[0], "--similar", ".."]):
        assert "among the photos" in error_of(predict.main, *argv, *weights)
    assert predict.main([".", "--json", *map(str, weights)]) == 0
    assert sorted(os.listdir()) == before


def test_hidden_photos_are_left_out_and_named(answer, photo):
    for name in ("photos/1.jpg", "photos/.old/1.jpg", "photos/.old/2.jpg", "photos/._1.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, name)
    _, out, err = answer("photos", "photos/1.jpg", "--json")  # once, though it is given twice
    assert len(out.splitlines()) == 1
    assert err == f"skipped, its name begins with a dot: {Path('photos/.old')} (2 photos)\n"
    shutil.copy(photo, "photos/2.jpg")
    _, out, _ = answer("photos")  # of no class: there is nothing to count
    assert len(out.splitlines()) == 2 and not [*Path().glob("*.png")]
    shutil.copytree(photo.parent, Path("photos", photo.parent.name))
    Path("photos/notes.txt").touch()
    _, out, err = answer("photos")
    assert "not counted, in no folder named like a class: 2 photos" in out.splitlines()
    assert "skipped, no pictures, in photos: 1 .txt\n" in err


def test_options_that_cannot_be(answer, photo, capsys):
    for option, value in (("--save", "x.xyz"), ("--save", "no/x.png"), ("--top-k", "0")):
        with pytest.raises(SystemExit) as caught:
            answer(photo, option, value)
        last = capsys.readouterr().err.splitlines()[-1]  # below the usage, which has all options
        assert caught.value.code == 2 and option in last


def test_folders_without_pictures(trained, photo):
    weights = ("--weights", trained / "AlexNet.pth", "--device", "cpu")
    Path("empty").mkdir()
    assert "empty" in error_of(predict.main, "empty", *weights)
    assert "empty" in error_of(predict.main, photo, "--similar", "empty", *weights)


def test_a_class_list_that_does_not_fit(trained, photo):
    link(Path("AlexNet.pth"), trained / "AlexNet.pth")
    message = error_of(predict.main, photo, "--device", "cpu")
    assert "class_idx.json" in message  # there is none
    for content in ('{"0": "a", "1": "b"}', "[]", '{"0": "a", "1": "b", "3": "c"}', "[[1", "3"):
        Path("class_idx.json").write_text(content)
        assert "class_idx.json" in error_of(predict.main, photo, "--device", "cpu")


def test_weights_that_cannot_answer_are_named(trained, photo):
    folder = error_of(predict.main, photo, "--weights", trained, "--device", "cpu")
    assert f"is a folder; give the file {trained / 'AlexNet.pth'}" in folder
    state = torch.load(trained / "AlexNet.pth")
    state["classifier.6.bias"][0] = float("nan")
    torch.save(state, "broken.pth")
    shutil.copy(trained / "class_idx.json", ".")
    assert "not finite" in error_of(
        predict.main, photo, "--weights", "broken.pth", "--device", "cpu"
    )


def test_out_of_memory_names_the_option_that_helps(trained, photo, monkeypatch):
    monkeypatch.setattr(alexnet, "predict_probabilities", Mock(side_effect=MemoryError()))
    options = ("--weights", trained / "AlexNet.pth", "--device", "cpu")
    assert "--device cpu" in error_of(predict.main, photo, *options)


@POSIX
def test_a_reader_that_has_seen_enough_is_no_error(trained, photo):
    command = [sys.executable, ROOT / "predict.py", photo, "--json"]
    command += ["--weights", trained / "AlexNet.pth", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
