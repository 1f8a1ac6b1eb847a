"""split_data.py: what goes where, what is refused, and what is never lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import draw_photos, error_of
from PIL import Image

import split_data


def split(source: Path, output: Path, *options: str) -> dict[str, bytes]:
    argv = ["--source", str(source), "--output", str(output), *options]
    assert split_data.main(argv) == 0
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos", {"a": 12, "b": 10})


def test_every_class_is_split_at_the_rate_and_no_photo_is_lost(twelve, tmp_path):
    files = split(twelve, tmp_path / "data", "--val-rate", "0.25", "--test-rate", "0.1")
    record = json.loads(files.pop("split.json"))
    counts = Counter(tuple(name.split("/")[:2]) for name in files)
    assert counts == {
        ("train", "a"): 8, ("val", "a"): 3, ("test", "a"): 1,
        ("train", "b"): 7, ("val", "b"): 2, ("test", "b"): 1,
    }  # fmt: skip
    assert {name.split("/", 1)[1]: data for name, data in files.items()} == contents(twelve)
    assert record["files"] == {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
    assert record["seed"] == 0 and record["val_rate"] == 0.25 and record["test_rate"] == 0.1
    assert record["counts"]["val"] == {"a": 3, "b": 2}


def test_the_split_follows_from_the_seed_not_from_the_order_of_files(twelve, tmp_path, monkeypatch):
    first = split(twelve, tmp_path / "first")
    walk = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(walk(path), reverse=True))
    copy = tmp_path / "elsewhere"
    for name in sorted(contents(twelve), reverse=True):  # made in another order too
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(twelve / name, copy / name)
    again = split(copy, tmp_path / "again")
    assert set(again) == set(first)
    assert set(split(twelve, tmp_path / "other", "--seed", "1")) != set(first)


def test_equal_photos_stay_on_one_side_and_a_conflict_is_named(tmp_path, capsys):
    photos = draw_photos(tmp_path / "photos", {"a": 20, "b": 20})
    for i in range(6):
        shutil.copyfile(photos / "a" / f"{i:02d}.jpg", photos / "a" / f"copy{i}.jpg")
    shutil.copyfile(photos / "a" / "10.jpg", photos / "b" / "same.jpg")
    for seed in range(8):
        files = split(photos, tmp_path / "data", "--val-rate", "0.3", "--seed", str(seed))
        sides: dict[bytes, set[str]] = {}
        for name, data in files.items():
            sides.setdefault(data, set()).add(name.split("/")[0])
        assert all(len(found) == 1 for found in sides.values())
        n_val = Counter(name.split("/")[1] for name in files if name.startswith("val/"))
        assert n_val == {"a": 7, "b": 6}  # the rate is kept all the same
    printed = capsys.readouterr().out
    assert "conflict, one photo under two classes: a/10.jpg = b/same.jpg" in printed
    assert "a/00.jpg = a/copy0.jpg" in printed


def test_what_is_no_photo_is_skipped_and_named(twelve, tmp_path, capsys):
    (twelve / "LICENSE.txt").write_text("CC")
    (twelve / "empty").mkdir()
    (twelve / ".hidden").mkdir()
    shutil.copyfile(twelve / "a" / "00.jpg", twelve / ".hidden" / "00.jpg")
    shutil.copyfile(twelve / "a" / "00.jpg", twelve / "a" / "._00.jpg")
    (twelve / "a" / "notes.txt").write_text("x")
    (twelve / "a" / "broken.jpg").write_bytes((twelve / "a" / "00.jpg").read_bytes()[:700])
    files = split(twelve, tmp_path / "data")
    assert len(files) == 22 + 1 and not any("broken" in name for name in files)
    printed = capsys.readouterr().out
    for name in ("LICENSE.txt", "empty/", ".hidden", "a/._00.jpg", "a/notes.txt", "a/broken.jpg"):
        assert name in printed


def test_a_folder_that_may_not_be_read_is_no_empty_one(twelve, tmp_path, monkeypatch):
    (twelve / "a" / "2019").mkdir()
    iterdir = Path.iterdir

    def refuse(path: Path):
        if path.name == "2019":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    message = error_of(split_data.main, "--source", twelve, "--output", tmp_path / "data")
    assert "Permission denied" in message and "2019" in message


def test_an_archive_is_a_source_too(twelve, tmp_path):
    for name, folder in (("nested.tgz", "photos"), ("flat.tar", ".")):
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("tgz") else "w") as tar:
            tar.add(twelve, arcname=folder)
        files = split(tmp_path / name, tmp_path / "data")
        assert set(files) == set(split(twelve, tmp_path / "direct"))
    assert not list(tmp_path.glob("*unpacked*"))


def test_an_archive_writes_nothing_outside_its_folder(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "png")
    for name in ("../evil/x.png", "/tmp/evil_split_test/x.png"):
        with tarfile.open(tmp_path / "evil.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
        error_of(split_data.main, "--source", tmp_path / "evil.tar", "--output", tmp_path / "data")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar"]
        assert not Path("/tmp/evil_split_test").exists()


@pytest.mark.parametrize("n, rates", [(3, ("0.1", "0")), (3, ("0.4", "0.1")), (1, ("0.5", "0"))])
def test_a_class_with_too_few_photos_is_named(tmp_path, n, rates):
    photos = draw_photos(tmp_path / "photos", {"many": 20, "few": n})
    options = ("--output", tmp_path / "data", "--val-rate", rates[0], "--test-rate", rates[1])
    assert "few" in error_of(split_data.main, "--source", photos, *options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("val, test", [("0", "0"), ("1", "0"), ("-0.1", "0"), ("0.6", "0.4")])
def test_rates_that_make_no_sense(tmp_path, capsys, val, test):
    with pytest.raises(SystemExit) as caught:
        split_data.main(["--val-rate", val, "--test-rate", test])
    assert caught.value.code == 2 and "-rate" in capsys.readouterr().err


def test_sources_that_are_none(tmp_path):
    (tmp_path / "text.txt").write_text("not an archive")
    (tmp_path / "empty").mkdir()
    draw_photos(tmp_path / "single", {"a": 3})
    output = ("--output", tmp_path / "data")
    for name, reason in (
        ("missing", "does not exist"),
        ("text.txt", "neither a folder nor"),
        ("empty", "0 classes"),
        ("single", "1 classes"),
    ):
        assert reason in error_of(split_data.main, "--source", tmp_path / name, *output)
    (tmp_path / "cut.tgz").write_bytes(archive_of(tmp_path / "single")[:600])
    error_of(split_data.main, "--source", tmp_path / "cut.tgz", *output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.tgz", "empty", "single", "text.txt"
    ]  # fmt: skip


def test_output_and_source_do_not_meet(twelve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = split(twelve, tmp_path / "data")
    for source, output in (
        *(("photos", "photos"), ("photos", "photos/data"), ("data/train", "data"), (".", "data")),
        *(("data", "data2"), ("photos", "photos/../photos")),
    ):
        error_of(split_data.main, "--source", source, "--output", output)
    for output in (".", "..", "/", ""):
        with pytest.raises(SystemExit) as caught:
            split_data.main(["--source", "photos", "--output", output])
        assert caught.value.code == 2
    assert contents(tmp_path / "data") == before and len(contents(twelve)) == 22


def test_a_folder_that_something_else_made_is_refused(twelve, tmp_path):
    output = tmp_path / "data"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    message = error_of(split_data.main, "--source", twelve, "--output", output)
    assert str(output) in message
    assert contents(output) == {"thesis.txt": b"years of work"}


def test_an_own_folder_is_replaced_unless_a_foreign_file_is_in_it(twelve, tmp_path):
    output = tmp_path / "data"
    first = split(twelve, output)
    for pack in ("train.packed.npy", "train.packed.json", "val.packed.npy", "val.packed.json"):
        (output / pack).write_bytes(b"made by train.py")
    second = split(twelve, output, "--seed", "3")
    assert set(second) != set(first) and not (output / "train.packed.npy").exists()
    (output / "train" / "a" / "mine.jpg").write_bytes(b"x")
    before = contents(output)
    assert "mine.jpg" in error_of(split_data.main, "--source", twelve, "--output", output)
    assert contents(output) == before
    for record in ('{"files": 5}', '{"files": [1]}', "{}", "[]", "{"):
        (output / "split.json").write_text(record)
        error_of(split_data.main, "--source", twelve, "--output", output)


def test_names_that_are_no_unicode_are_kept(tmp_path):
    photos = draw_photos(tmp_path / "photos", {"a": 4, "b": 4})
    try:
        os.rename(photos / "a" / "00.jpg", os.fsencode(photos / "a") + b"/\xff.jpg")
    except OSError:
        pytest.skip("this file system takes no such names")
    files = split(photos, tmp_path / "data", "--val-rate", "0.5")
    del files["split.json"]
    assert {name.split("/", 1)[1] for name in files} == set(contents(photos))
    assert len(split(photos, tmp_path / "data", "--val-rate", "0.5")) == len(files) + 1


def test_a_failure_while_copying_leaves_the_old_split(twelve, tmp_path, monkeypatch):
    output = tmp_path / "data"
    before = split(twelve, output)
    copy = shutil.copyfile

    def fail_late(source, target):
        if "val" in str(target):
            raise OSError(28, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail_late)
    message = error_of(split_data.main, "--source", twelve, "--output", output, "--seed", "5")
    assert "No space left on device" in message
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos"]


def test_a_class_of_copies_alone_is_too_few(tmp_path):
    photos = draw_photos(tmp_path / "photos", {"a": 10, "b": 1})
    for i in range(9):
        shutil.copyfile(photos / "b" / "00.jpg", photos / "b" / f"copy{i}.jpg")
    message = error_of(split_data.main, "--source", photos, "--output", tmp_path / "data")
    assert "class b has 1 different" in message


def test_a_kill_while_the_old_split_is_removed_is_put_right(twelve, tmp_path, monkeypatch):
    output = tmp_path / "data"
    split(twelve, output)
    remove = split_data.remove

    def killed(folder):
        if folder.name != "data.split_data.old":
            return remove(folder)
        shutil.rmtree(folder / "train")
        raise KeyboardInterrupt

    monkeypatch.setattr(split_data, "remove", killed)
    argv = ["--source", str(twelve), "--output", str(output), "--seed", "2"]
    assert split_data.main(argv) == 130
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data",
        "data.split_data.old",
        "photos",
    ]
    after = contents(output)
    split_data.recover(output)
    assert contents(output) == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos"]


def test_a_kill_between_the_renames_is_put_right_by_the_next_start(twelve, tmp_path):
    output = tmp_path / "data"
    before = split(twelve, output)
    os.rename(
        output, tmp_path / "data.split_data.old"
    )  # killed just after the old split was set aside
    shutil.copytree(tmp_path / "data.split_data.old", tmp_path / "data.split_data.new")
    split_data.recover(output)
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos"]


# ------------------------------------------------------------------------------- the download


def archive_of(folder: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(folder, arcname="flower_photos")
    return data.getvalue()


@pytest.fixture
def served(twelve, tmp_path, monkeypatch):
    """A local server that sends `reply["body"]`, and an empty folder to work in."""
    archive = archive_of(twelve)
    reply = {"body": archive, "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(reply["status"])
            self.send_header("Content-Length", str(len(reply["body"])))
            self.end_headers()
            self.wfile.write(reply["body"])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/flower_photos.tgz"
    monkeypatch.setattr(split_data, "ARCHIVE_URL", url)
    monkeypatch.setattr(split_data, "ARCHIVE_SIZE", len(archive))
    monkeypatch.setattr(split_data, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield reply
    server.shutdown()
    server.server_close()


def test_the_missing_default_source_is_downloaded(served, twelve, tmp_path):
    assert split_data.main([]) == 0
    assert contents(Path("flower_photos")) == contents(twelve)
    assert set(contents(Path("data"))) == set(split(twelve, tmp_path / "direct"))
    served["status"] = 500  # not asked again
    assert split_data.main(["--seed", "1"]) == 0


def test_a_download_that_is_not_the_archive_is_thrown_away(served):
    good = served["body"]
    for body in (b"<html>an error page</html>", good[:-1] + bytes([good[-1] ^ 1])):
        served["body"] = body
        assert "not the expected archive" in error_of(split_data.main)
        assert not list(Path().iterdir())


def test_without_a_network_a_sentence_says_how_to_go_on(served):
    served["status"] = 404
    message = error_of(split_data.main)
    assert split_data.ARCHIVE_URL in message and "--source" in message
    assert not list(Path().iterdir())
