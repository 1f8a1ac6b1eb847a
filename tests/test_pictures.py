"""The figures of train.py and predict.py: what stands in them, and where they are written."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import font_manager, pyplot, rc_context, rcParams
from matplotlib.figure import Figure

import alexnet
import predict
import train


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that predict.py draws from now on."""
    drawn = []
    for name in ("draw_predictions", "draw_confusion"):
        draw = getattr(predict, name)

        def spy(figure: Figure, *what: Any, draw: Callable[..., Figure] = draw) -> Figure:
            drawn.append(draw(figure, *what))
            return figure

        monkeypatch.setattr(predict, name, spy)
    return drawn


@pytest.fixture
def photo(data) -> Path:
    return alexnet.image_files(data / "val")[0]


def run_predict(trained: Path, *argv: str | Path) -> int:
    return predict.main([*map(str, argv), "--weights", str(trained / "AlexNet.pth")])


def test_curves_mark_the_drops_the_best_epoch_and_the_largest_class():
    rates = [0.005, 0.01, 0.01, 0.001, 0.0001]
    accuracies = [0.2, 0.5, 0.9, 0.7, 0.8]
    history = [
        {"epoch": i + 1, "lr": lr, "val_accuracy": a, "val_loss": 1 - a}
        | {"train_loss": 0.5, "train_accuracy": 0.5}
        for i, (lr, a) in enumerate(zip(rates, accuracies, strict=True))
    ]
    figure = train.draw_curves(history, 0.245, history[2])
    for axis, value in zip(figure.axes, (0.1, 0.9), strict=True):
        assert [text.get_text().strip() for text in axis.texts] == ["lr 0.001", "lr 0.0001"]
        assert [text.get_position()[0] for text in axis.texts] == [3.5, 4.5]
        (star,) = (line for line in axis.lines if line.get_marker() == "*")
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (3, pytest.approx(value))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "best on val: epoch 3, accuracy 0.900" in labels
    (line,) = (line for line in figure.axes[1].lines if "largest" in line.get_label())
    assert set(line.get_ydata()) == {0.245}


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_stand_16_a_row_on_one_scale_and_the_halves_apart(groups):
    weight = torch.randn(96, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    picture = train.draw_kernels(weight, groups)
    scaled = (weight - weight.min()) / (weight.max() - weight.min())
    for number in (0, 15, 16, 47, 48, 95):
        row, column = divmod(number, 16)
        y, x = 5 + 60 * row, 5 + 60 * column
        if groups == 2 and row >= 3:
            y += 5 + 20
        assert torch.equal(picture[:, y : y + 55 : 5, x : x + 55 : 5], scaled[number])
        assert (picture[:, y - 5 : y, x : x + 55] == 1).all()  # white above each
    assert picture.shape == (3, 5 + 60 * 6 + (25 if groups == 2 else 0), 5 + 60 * 16)


def test_one_photo_is_drawn_beside_its_classes(trained, photo, tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert run_predict(trained, photo, "--center-crop") == 0
    left, right = figures[0].axes
    assert len(left.images) == 1 and left.get_title() == photo.name
    assert right.get_title() == f"the folder says {photo.parent.name}"
    bars = [bar for bar in right.patches if bar.get_width() < 1]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(1, abs=1e-3)
    names = [text.get_text() for text in right.texts[::2]]
    assert sorted(names) == ["daisy", "roses", "tulips"]
    for name, bar, value in zip(names, bars, right.texts[1::2], strict=True):
        assert value.get_text() == f"{bar.get_width():.3f}"
        red, green, blue, _ = bar.get_facecolor()
        assert (green > max(red, blue)) == (name == photo.parent.name)


def test_of_many_photos_the_24_most_doubtful_are_drawn(
    trained, data, tmp_path, monkeypatch, figures, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_predict(trained, data, data / "train", "--save", "grid.png") == 0
    out, err = capsys.readouterr()
    assert "the first 24 of the table's 29 photos" in err
    grid, matrix = figures
    drawn = [axis.get_title() for axis in grid.axes if axis.images]
    assert drawn == [Path(line.split()[2]).name for line in out.splitlines()[:24]]
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "confusion_matrix.png"}
    assert len(matrix.axes[0].texts) == np.count_nonzero(matrix.axes[0].images[0].get_array())


def test_a_window_opens_for_photos_that_are_named_and_never_for_a_folder(
    trained, data, photo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    canvas = pyplot.figure().canvas
    monkeypatch.setattr(type(canvas), "required_interactive_framework", "a display")
    for photos, n_drawn in (([photo], [1]), ([photo, photo], [2]), ([photo.parent, photo], [])):
        shown = []
        assert run_predict(trained, *photos, "--center-crop") == 0
        assert [sum(len(axis.images) for axis in figure.axes) for figure in shown] == n_drawn
        assert (tmp_path / "confusion_matrix.png").exists() == (not shown)
    pyplot.close("all")


def test_a_folder_gives_a_confusion_matrix_unless_it_is_not_wanted(
    trained, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for option in ("--no-figure", "--json"):
        assert run_predict(trained, data / "val", option) == 0 and not list(tmp_path.iterdir())
    (tmp_path / "unsorted").mkdir()
    for path in alexnet.image_files(data / "val"):
        (tmp_path / "unsorted" / path.name).write_bytes(path.read_bytes())
    assert run_predict(trained, "unsorted") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["unsorted"]


def test_the_confusion_matrix_holds_counts_and_rates_of_the_row():
    answers = [
        *([("a", "a")] * 3 + [("a", "b")] * 1),  # true class, answer
        *([("b", "b")] * 1 + [("b", "c")] * 2),
        *([(None, "a")] * 5),
    ]
    predictions = [predict.Prediction(Path("x"), [(answer, 0.5)], true) for true, answer in answers]
    figure = predict.draw_confusion(Figure(), predictions, ["a", "b", "c"])
    axis = figure.axes[0]
    expected = [[3 / 4, 1 / 4, 0], [0, 1 / 3, 2 / 3], [0, 0, 0]]
    assert np.allclose(axis.images[0].get_array(), expected)
    found = {text.get_position(): text.get_text() for text in axis.texts}  # column, row
    assert found == {(0, 0): "3\n75%", (1, 0): "1\n25%", (1, 1): "1\n33%", (2, 1): "2\n67%"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a (4)", "b (3)", "c (0)"]
    assert axis.get_title() == "4 of 7 photos right: 0.571"


def test_102_classes_are_coloured_and_all_named():
    classes = [f"kind {i}" for i in range(102)]
    predictions = [predict.Prediction(Path("x"), [(name, 0.5)], name) for name in classes]
    figure = predict.draw_confusion(Figure(layout="constrained"), predictions, classes)
    figure.canvas.draw()
    axis = figure.axes[0]
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert len(boxes) == 102 and not axis.texts
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))  # none over the next


def test_names_that_no_font_has_are_drawn_without_warnings(photo, recwarn, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    name = "\U0010fffd $\\frac$ \udcff {"  # a letter of no font, no formula, half a letter
    prediction = predict.Prediction(photo, [(name, 0.9), ("roses", 0.1)], name, [(1.5, photo)])
    for draw in (predict.draw_predictions, predict.draw_similar):
        draw(Figure(), [prediction]).savefig(io.BytesIO())
    predict.draw_confusion(Figure(), [prediction], [name, "roses"]).savefig(io.BytesIO())
    assert not recwarn.list


def test_an_installed_font_lends_the_letters_that_are_missing(tmp_path, monkeypatch):
    new = shutil.copy(font_manager.findfont("STIXGeneral"), tmp_path / "new.ttf")
    fonts = [font_manager.findfont("DejaVu Serif"), str(new), str(tmp_path / "none.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    listed = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    with rc_context():
        before = rcParams["font.family"]
        predict.setup_fonts("Löwenzahn")
        assert rcParams["font.family"] == before
        for _ in range(2):
            predict.setup_fonts("\N{POSTAL MARK}")
            assert rcParams["font.family"] == [*before, "STIXGeneral"]
    assert str(new) in {entry.fname for entry in listed}
