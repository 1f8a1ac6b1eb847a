"""Parts of stress.py at small counts; `python tests/stress.py` does all of them at full ones."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import alexnet
import predict
import split_data
import train

if sys.platform != "linux":
    pytest.skip("signals, limits and /proc as Linux has them", allow_module_level=True)

import stress


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, their split `data` and a run of four epochs, `trained`."""
    folder = tmp_path_factory.mktemp("small")
    argv = ("--data", stress.make_split(folder), "--output", folder / "trained", "--epochs", "4")
    stress.run(train.main, *argv).succeeded()
    return folder


def test_train_that_is_killed_and_resumed_is_train_that_never_stopped(tmp_path, rng):
    assert "kills of train.py" in stress.kill_train(tmp_path, 2, rng)


def test_split_data_that_is_killed_leaves_the_old_split_or_the_new(tmp_path):
    assert "8 kills" in stress.kill_split(tmp_path / "split", 8)


def test_a_full_disk_is_one_line_and_leaves_whole_files(small, tmp_path, rng):
    stress.full_disk(tmp_path, small / "data", 2, rng)
    os.symlink(small / "photos", tmp_path / "photos")
    stress.full_disk_elsewhere(tmp_path, small / "data", small / "trained")


def test_what_may_not_be_written_or_read_is_one_line(small, tmp_path):
    shutil.copytree(small / "photos", tmp_path / "photos")
    stress.no_permission(tmp_path, small / "data", small / "trained")


def test_hostile_images(small, tmp_path, rng):
    assert stress.hostile_images(tmp_path, small / "trained", 30, rng)


def test_hostile_weights(small, tmp_path, rng):
    assert "refused" in stress.hostile_weights(tmp_path, small / "trained", 3, rng)


def test_hostile_archives(tmp_path):
    assert stress.hostile_archives(tmp_path)


def test_memory_stays_flat_and_nothing_is_left(tmp_path, rng):
    assert "no child" in stress.long(tmp_path, 4, rng)


def test_downloads_that_fail_and_go_on(tmp_path, rng):
    assert "resumed" in stress.downloads(tmp_path, 4, rng)


# ----------------------------------------------------------- what stress.py found, one by one


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"a.csv.{dead.pid}.tmp", f"a.csv.{os.getppid()}.tmp", f"b.csv.{dead.pid}.tmp", "a.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    train.write_text(tmp_path / "a.csv", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", *names[1:]}


def test_a_record_older_than_last_pt_is_written_anew(small, tmp_path):
    output = shutil.copytree(small / "trained", tmp_path / "run")
    (output / "run.json").write_text("{}")
    os.utime(output / "run.json", (1, 1))
    argv = ["--data", str(small / "data"), "--output", str(output), "--epochs", "4", "--resume"]
    assert train.main(argv) == 0
    assert json.loads((output / "run.json").read_text())["epochs"] == 4


def test_the_largest_class_alone_is_its_share_exactly(monkeypatch, small):
    """In float32 three of five are more than 0.6, and the plateau would seem to be left."""
    args = train.parse_args(["--data", str(small / "data"), "--output", str(small)])
    sets = [train.pack(small / "data" / side, small) for side in ("train", "val")]
    run = train.Run(args, *sets, torch.device("cpu"), torch.float32)
    run.val_set.labels = torch.tensor([0, 0, 0, 1, 1])
    run.val_set.photos = sets[0].photos[:5]
    answer = torch.tensor([[0.9, 0.1]])
    monkeypatch.setattr(train, "predict_probabilities", lambda net, x, views: answer.expand(5, 2))
    assert train.evaluate(run, "center-crop")[1] == run.val_set.largest_share() == 0.6


def test_json_stays_json_on_a_console_that_lacks_the_letters(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", console)
    predict.print_json(predict.Prediction(Path("🌼.jpg"), [("蒲公英", 1.0)], None))
    console.flush()
    assert json.loads(console.buffer.getvalue())["path"] == "🌼.jpg"


def test_a_class_whose_name_looks_like_a_formula_is_drawn(small, tmp_path):
    photo = next((small / "photos").rglob("*.jpg"))
    with contextlib.redirect_stderr(io.StringIO()):
        answers = [predict.Prediction(photo, [("$\\x$", 1.0)], None)]
        draw = functools.partial(predict.draw_predictions, predictions=answers)
        predict.show(draw, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_compressed_weights_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(99)}, tmp_path / "stored.pt")
    assert alexnet.load_tensors(tmp_path / "stored.pt", mmap=False).keys() == {"a"}
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    with pytest.raises(alexnet.InputError, match=r"a\.pt is cut short or no file"):
        alexnet.load_tensors(tmp_path / "a.pt", mmap=False)


def test_a_folder_to_unpack_into_that_is_not_ours_is_refused(tmp_path):
    folder = tmp_path / "data.split_data.unpacked"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with (
        pytest.raises(SystemExit, match="move it away"),
        split_data.scratch_folder(tmp_path / "data"),
    ):
        pass
    assert (folder / "mine.txt").read_text() == "mine"


def test_odd_options_in_last_pt_set_nothing_else(small, tmp_path):
    output = shutil.copytree(small / "trained", tmp_path / "run")
    checkpoint = stress.thin(stress.read(output / "last.pt"))
    checkpoint["options"] |= {"output": str(tmp_path / "elsewhere"), "batch_size": "7"}
    torch.save(checkpoint, output / "last.pt")
    args = train.parse_args(["--output", str(output), "--resume"])
    train.open_checkpoint(args)
    assert args.output == output and args.batch_size == 7
