"""split_data.py: what goes where, what is refused, and what is never lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import LINUX, POSIX, contents, draw_photos, error_of, full_disk, link
from PIL import Image

import split_data


def split(source: Path, output: Path, *options: str) -> dict[str, bytes]:
    argv = ["--source", str(source), "--output", str(output), *options]
    assert split_data.main(argv) == 0
    return contents(output)


def refusal(source: Path, output: Path, *options: str) -> str:
    """What split_data.py says; nothing on the disk may have changed, or be left behind."""
    before = contents(output.parent)
    message = error_of(split_data.main, "--source", source, "--output", output, *options)
    assert contents(output.parent) == before
    return message


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos", {"a": 12, "b": 10})


def test_every_class_is_split_at_the_rate_and_no_photo_is_lost(twelve, tmp_path, capsys):
    (twelve / "b" / "deep").mkdir()
    os.rename(twelve / "b" / "00.jpg", twelve / "b" / "deep" / "x.JPG")
    before = contents(twelve)
    files = split(twelve, tmp_path / "data", "--val-rate", "0.25", "--test-rate", "0.05")
    record = json.loads(files.pop("split.json"))
    counts = Counter(tuple(name.split("/")[:2]) for name in files)
    assert counts == {
        ("train", "a"): 8, ("val", "a"): 3, ("test", "a"): 1,  # 1 at least
        ("train", "b"): 7, ("val", "b"): 2, ("test", "b"): 1,
    }  # fmt: skip
    assert {name.split("/", 1)[1]: data for name, data in files.items()} == before
    assert contents(twelve) == before
    assert record["files"] == {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
    assert (record["seed"], record["val_rate"], record["test_rate"]) == (0, 0.25, 0.05)
    table = [line.split()[::2] for line in capsys.readouterr().out.splitlines()[:3]]
    assert table == [["8", "3", "1", "a"], ["7", "2", "1", "b"], ["15", "5", "2", "total"]]


def test_the_split_follows_from_the_seed_not_from_the_order_of_files(twelve, tmp_path, monkeypatch):
    first = split(twelve, tmp_path / "first")
    val = {name for name in first if name.startswith("val/")}
    assert val == {"val/a/06.jpg", "val/b/04.jpg"}  # on any machine
    backwards = lambda path: sorted(map(path.joinpath, os.listdir(path)), reverse=True)  # noqa: E731
    monkeypatch.setattr(Path, "iterdir", backwards)
    assert split(twelve, tmp_path / "again") == first
    assert set(split(twelve, tmp_path / "other", "--seed", "1")) != set(first)


def test_equal_photos_stay_on_one_side_and_a_conflict_is_named(tmp_path, capsys):
    photos = draw_photos(tmp_path / "photos", {"a": 20, "b": 20})
    for i in range(6):
        shutil.copyfile(photos / "a" / f"{i:02d}.jpg", photos / "a" / f"copy{i}.jpg")
    shutil.copyfile(photos / "a" / "10.jpg", photos / "b" / "same.jpg")
    for seed in "0123":
        files = split(photos, tmp_path / f"data{seed}", "--val-rate", "0.3", "--seed", seed)
        places = {(name.split("/")[0], data) for name, data in files.items()}
        assert len(places) == len(set(files.values()))
        val = {(name.split("/")[1], data) for name, data in files.items() if name[:4] == "val/"}
        counts = Counter(label for label, _ in val)
        assert counts["a"] == 6 and counts["b"] in (6, 7)  # of different photos
    printed = capsys.readouterr().out
    assert "conflict, one photo under two classes: a/10.jpg = b/same.jpg" in printed
    assert "a/00.jpg = a/copy0.jpg" in printed


def test_what_is_no_photo_is_left_out_and_named(twelve, tmp_path, capsys):
    good = (twelve / "a" / "00.jpg").read_bytes()
    for folder in ("empty", ".hidden", "odd", ".git"):
        (twelve / folder).mkdir()
    files = {"LICENSE.txt": b"CC", "top.jpg": good, ".hidden/00.jpg": good, "a/._00.jpg": good}
    files |= {".hidden/01.jpg": good, "a/.x.jpg": good, ".git/y.jpg": good, ".hidden/z.txt": b"z"}
    files |= {"a/notes.txt": b"x", "odd/1.heic": b"x", "a/broken.jpg": good[:700]}
    for name, data in files.items():
        (twelve / name).write_bytes(data)
    pipe = twelve / "a" / "pipe.jpg"
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)  # to open it would block
    else:
        pipe.touch()
    found = split(twelve, tmp_path / "data")
    assert len(found) == 22 + 1 and not {"broken", "pipe", "top"} & {Path(x).stem for x in found}
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "no photos in these folders of photos: empty, odd"
    first, *kinds = lines[1].split(", 1 ")
    assert first == "skipped, no photos in a class folder, in photos: 2 .txt"
    assert sorted(kinds) == [".heic", ".jpg"]
    hidden = [line for line in printed.err.splitlines() if "begins with a dot" in line]
    assert [line.split(": ")[1] for line in hidden] == [
        f"{twelve / '.hidden'} (2 photos)",
        f"{twelve / 'a' / '.x.jpg'} (1 photos)",
    ]
    for name in ("a/broken.jpg", "a/pipe.jpg"):
        assert f"cannot be read: {twelve / name}: " in printed.err
    for label in ("c", "empty"):
        (twelve / label).mkdir(exist_ok=True)
        (twelve / label / "1.jpg").write_bytes(b"broken")
    assert "no photo can be read of c, empty;" in refusal(twelve, tmp_path / "other")


def test_a_folder_that_may_not_be_read_is_no_empty_one(twelve, tmp_path, monkeypatch, capsys):
    def iterdir(path: Path) -> Iterator[Path]:
        if path in closed:
            raise PermissionError(13, "not allowed")
        return whole(path)

    whole, closed = Path.iterdir, [twelve / "a" / "inner"]
    shutil.copytree(twelve / "b", twelve / "a" / "inner")
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert len(split(twelve, tmp_path / "data")) == 23
    told = f"skipped, no permission to read: {closed[0]} (not allowed)"
    assert told in capsys.readouterr().err
    closed.append(twelve)
    assert "not allowed" in refusal(twelve, tmp_path / "other")


@POSIX
def test_photos_that_may_not_be_seen_are_named(twelve, tmp_path, monkeypatch, capsys):
    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(closed):
            raise PermissionError(13, "not allowed")
        return whole(path, **options)

    whole, closed = os.stat, str(twelve / "a" / "0")  # ten of twelve
    monkeypatch.setattr(os, "stat", stat)
    assert len(split(twelve, tmp_path / "data")) == 13
    monkeypatch.undo()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and all("no permission to see it" in line for line in lines)


def test_what_lies_beside_the_only_folder_with_photos_is_named(twelve, tmp_path, capsys):
    (tmp_path / "top" / "dogs").mkdir(parents=True)
    os.rename(twelve, tmp_path / "top" / "cats")
    (tmp_path / "top" / "dogs" / "1.heic").write_bytes(b"x")
    split(tmp_path / "top", tmp_path / "data")
    assert f"skipped, outside {tmp_path / 'top' / 'cats'}: 1 .heic" in capsys.readouterr().out


@LINUX
def test_names_that_are_no_unicode_and_linked_folders_and_photos_are_read(tmp_path):
    photos = draw_photos(tmp_path / "photos", {"ä b": 4, "[*]\n?": 4})
    os.rename(photos / "ä b" / "00.jpg", os.fsencode(photos / "ä b") + b"/\xff.jpg")
    os.rename(draw_photos(tmp_path / "far", {"c": 4}), tmp_path / "near")
    (photos / "c").symlink_to("../near/c")
    (photos / "ä b" / "link.jpg").symlink_to("../../near/c/00.jpg")
    rate = ("--val-rate", "0.75")  # one photo of four is left for train
    files = split(photos, tmp_path / "data", *rate)
    del files["split.json"]
    expected = contents(photos) | {f"c/{n}": d for n, d in contents(photos / "c").items()}
    assert {name.split("/", 1)[1]: data for name, data in files.items()} == expected
    assert not any(path.is_symlink() for path in (tmp_path / "data").rglob("*"))
    assert split(photos, tmp_path / "data", *rate).keys() - files == {"split.json"}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize(
    "sides, way",
    [
        (("train", "valid", "test"), "`python train.py --data {}` takes it as it is"),
        (("Training", "Testing"), f"`--source {{}}{os.sep}Training`"),
        (("train", "test"), f"`--source {{}}{os.sep}train`"),
    ],
)
def test_what_is_split_already_is_told_how_to_use_it(twelve, tmp_path, sides, way, suffix):
    for side in sides:
        shutil.copytree(twelve, tmp_path / "sets" / "x-rays" / side)
    source, place = tmp_path / "sets", tmp_path / "sets" / "x-rays"
    if suffix:
        source = Path(shutil.make_archive(str(source), "zip", source))
        shutil.rmtree(tmp_path / "sets")
    message = refusal(source, tmp_path / "data").replace('"', "")
    assert way.format(place) in message and ("unpack it" in message) == bool(suffix)


def test_classes_are_found_deeper_and_a_copy_of_them_is_refused(twelve, tmp_path, capsys):
    deep = shutil.copytree(twelve, tmp_path / "down" / "load" / "photos")
    files = split(tmp_path / "down", tmp_path / "data")
    assert f"the classes are the folders in {deep}\n" in capsys.readouterr().out
    direct = split(twelve, tmp_path / "direct")
    assert files == direct
    # A picture beside the class folders, or beside what holds them, is none of a class.
    for place, named in ((deep, ".jpg"), (deep.parent, "1 photos in load")):
        shutil.copyfile(twelve / "a/00.jpg", place / "preview.jpg")
        zipped = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "down"))
        for n, source in enumerate((tmp_path / "down", zipped)):
            assert split(source, tmp_path / f"{place.name}{n}") == direct
            printed = capsys.readouterr().out
            assert any("skipped" in x and named in x for x in printed.splitlines()), printed
    shutil.copytree(twelve, deep / "photos")
    copy = Path("load", "photos", "photos")
    assert f"{copy} seems to be a copy" in refusal(tmp_path / "down", tmp_path / "new")


@LINUX
@pytest.mark.parametrize("names", [("Rosé", "rosé"), ("ros\u00e9", "rose\u0301")])
def test_names_that_are_one_on_other_machines_are_refused(tmp_path, names):
    photos = draw_photos(tmp_path / "photos", dict.fromkeys((*names, "tulip"), 4))
    message = refusal(photos, tmp_path / "data")
    assert all(name in message for name in names) and "tulip" not in message


@pytest.mark.parametrize("val, test", [("0.1", "0"), ("0.4", "0.1"), ("0.5", "0.2")])
def test_classes_with_too_few_photos_are_named_in_one_line(tmp_path, val, test):
    photos = draw_photos(tmp_path / "photos", {"many": 20, "copies": 1, "few": 1 + (test > "0")})
    for i in range(9):
        shutil.copyfile(photos / "copies" / "00.jpg", photos / "copies" / f"{i}.jpg")
    message = refusal(photos, tmp_path / "data", "--val-rate", val, "--test-rate", test)
    assert "copies (1), few (" in message and "many" not in message


def test_folders_that_hold_the_classes_again_and_again_are_no_classes(twelve, tmp_path):
    for day in ("2024-05-01", "2024-05-02"):
        for label in ("a", "b"):
            shutil.copytree(twelve / label, tmp_path / "days" / day / "north" / label)
    message = refusal(tmp_path / "days", tmp_path / "data")
    assert "all folders of" in message and "hold the same folders, a, b, north:" in message
    for label in ("a", "b"):  # one folder that comes again says nothing
        (twelve / label).rename(tmp_path / label)
        (twelve / label).mkdir()
        (tmp_path / label).rename(twelve / label / "images")
    assert len(split(twelve, tmp_path / "data")) == 23


def test_classes_in_the_names_of_files_are_told(twelve, tmp_path):
    flat = tmp_path / "flat"
    (flat / "train").mkdir(parents=True)
    (flat / "test1").mkdir()
    for i, path in enumerate(sorted((twelve / "a").iterdir())):
        shutil.copy(path, flat / "train" / f"{'cat' if i % 2 else 'dog'}.{i}.jpg")
        shutil.copy(path, flat / "test1" / f"{i}.jpg")
    message = refusal(flat, tmp_path / "data")
    assert "holds train and test1, which are no classes" in message
    for source in (flat, flat / "train"):
        hint = "names of files begin with cat, dog: are these the classes?"
        assert refusal(source, tmp_path / "data").endswith(hint)


def test_what_a_system_keeps_for_itself_is_no_photo(twelve, tmp_path, capsys):
    files = split(twelve, tmp_path / "clean")
    for name in ("@eaDir/00.jpg", "a/@eaDir/00.jpg", "$RECYCLE.BIN/x", "lost+found", "__MACOSX/a"):
        (twelve / name).mkdir(parents=True)
        shutil.copy(twelve / "a" / "01.jpg", twelve / name / "SYNOPHOTO_THUMB_M.jpg")
    capsys.readouterr()
    assert split(twelve, tmp_path / "data") == files
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "no photos" not in printed


@pytest.mark.parametrize("val, test", ["00", "10", ("-1", "0"), (".6", ".4"), ("nan", "0")])
def test_rates_that_make_no_sense(capsys, val, test):
    with pytest.raises(SystemExit) as caught:
        split_data.main(["--val-rate", val, "--test-rate", test])
    assert caught.value.code == 2 and "-rate" in capsys.readouterr().err.splitlines()[-1]


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of those files."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix.lower() == ".tgz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["x.tgz", "x.tar", "x.zip", "X.ZIP", "x.TGZ"])
@pytest.mark.parametrize("top", ["", "./", "flowers/"])
def test_an_archive_is_a_source_too(twelve, tmp_path, name, top):
    files = {f"{top}{name}": data for name, data in contents(twelve).items()}
    files |= {f"__MACOSX/{top}a/._00.jpg": b"x", f"{top}LICENSE.txt": b"CC"}
    archive = pack(tmp_path / name, files)
    assert split(archive, tmp_path / "data") == split(twelve, tmp_path / "direct")
    assert sorted(os.listdir(tmp_path)) == sorted(["data", "direct", "photos", name])
    archive.write_bytes(archive.read_bytes()[:700])
    assert f"{name} is no folder" in refusal(archive, tmp_path / "other")


@pytest.mark.parametrize("name", ["x.tgz", "x.tar"])
def test_no_damage_is_taken_for_the_end_of_an_archive(twelve, tmp_path, name):
    pack(tmp_path / "whole.tar", contents(twelve))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        start = tar.getmembers()[20].offset
    data = (tmp_path / "whole.tar").read_bytes()
    for damaged in (data[:start], data[: start + 99], data[:start] + b"x" + data[start + 1 :]):
        archive = tmp_path / name
        archive.write_bytes(gzip.compress(damaged) if name == "x.tgz" else damaged)
        assert "(it is damaged, or cut)" in refusal(archive, tmp_path / "data")


def test_a_tar_is_one_even_if_it_ends_with_a_zip(twelve, tmp_path):
    inner = pack(tmp_path / "inner.zip", {"x/1.jpg": b"x", "y/1.jpg": b"y"}).read_bytes()
    archive = pack(tmp_path / "x.tar", contents(twelve) | {"z.zip": inner})
    assert zipfile.is_zipfile(archive)
    assert split(archive, tmp_path / "data") == split(twelve, tmp_path / "direct")


def test_an_archive_writes_nothing_outside_its_folder(twelve, tmp_path):
    photos, jpeg = contents(twelve), (twelve / "a" / "00.jpg").read_bytes()
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    archive = pack(tmp_path / "outside.tar", photos | {"../../evil.jpg": jpeg})
    assert "cannot be unpacked" in refusal(archive, tmp_path / "data")
    archive = pack(tmp_path / "link.tar", photos)
    with tarfile.open(archive, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.REGTYPE):  # a file, written where the link points to
            member = tarfile.TarInfo("a/x.jpg")
            member.type, member.linkname = kind, "../../../mine.jpg"
            tar.addfile(member)
    assert "cannot be unpacked" in refusal(archive, tmp_path / "data")
    outside = {"../../a/evil.jpg": jpeg, "/b/rooted.jpg": jpeg, "a/two..dots.jpg": jpeg}
    archive = pack(tmp_path / "outside.zip", photos | outside)
    found = split(archive, tmp_path / "data")
    names = {name.split("/", 1)[1] for name in found if "/" in name}
    assert names == {*photos, "a/evil.jpg", "b/rooted.jpg", "a/two..dots.jpg"}
    assert not [*tmp_path.parent.glob("*/evil.jpg"), *tmp_path.glob("a")]
    archive = pack(tmp_path / "twice.zip", photos | {"../a/00.jpg": jpeg, "/a/00.jpg": jpeg})
    assert "2 of its files would overwrite others" in refusal(archive, tmp_path / "other")


class OldInfo(zipfile.ZipInfo):
    """A member whose name is in another encoding, and has no flag that tells which."""

    def __init__(self, name: str, encoding: str) -> None:
        super().__init__(name)
        self.filename, self.encoding = name, encoding  # as it is: a backslash, too

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


def test_names_in_a_zip_are_what_was_typed_or_it_is_refused(twelve, tmp_path):
    files = contents(twelve)
    for label, encoding, ok in (("p\u00e2t\u00e9", "utf-8", True), ("\u8349", "gbk", False)):
        archive = tmp_path / f"{encoding}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in files.items():
                member = OldInfo(f"photos/{name}".replace("/a/", f"/{label}/"), encoding)
                member.filename = member.filename.replace("/", "\\")
                file.writestr(member, data)
        if ok:
            names = split(archive, tmp_path / "data")
            assert {name.split("/")[1] for name in names if "/" in name} == {label, "b"}
        else:
            assert "names in" in refusal(archive, tmp_path / "x")
    if sys.platform != "darwin":  # which refuses to write such a name
        archive = pack(tmp_path / "old.tar", {"\udcb2/1.jpg": b"x"})
        assert "are not Unicode; unpack it by hand" in refusal(archive, tmp_path / "x")


def test_a_python_that_cannot_unpack_safely_says_what_to_do(twelve, tmp_path, monkeypatch):
    archive = pack(tmp_path / "x.tar", contents(twelve))
    monkeypatch.delattr(tarfile, "data_filter")
    message = refusal(archive, tmp_path / "data")
    assert message.startswith(f"error: this Python cannot unpack {archive} safely: take 3.10.12")
    monkeypatch.chdir(tmp_path)
    assert "cannot unpack flower_photos.tgz" in error_of(split_data.main)  # before the download
    assert split(twelve, tmp_path / "data")


def test_long_lists_and_blanks_in_names_stay_readable(twelve, tmp_path, monkeypatch, capsys):
    for i in range(30):
        shutil.copy(twelve / "a" / "00.jpg", twelve / "a" / f"copy{i}.jpg")
        (twelve / f"odd.{i}").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    argv = ["--source", "~/photos", "--output", "~/cats&dogs"]
    assert split_data.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count(",") == 12 and lines[0].endswith("and 20 more")
    assert lines[1].count("=") == 10 and lines[1].endswith("and 20 more")
    assert lines[-1].endswith(f'`python train.py --data "{tmp_path / "cats&dogs"}"`')


def test_a_source_that_is_none_is_named(twelve, tmp_path):
    assert "does not exist" in refusal(tmp_path / "missing", tmp_path / "data")
    shutil.rmtree(twelve / "b")
    assert "photos of 1 classes" in refusal(twelve, tmp_path / "data")


def test_the_same_command_changes_nothing_and_another_is_refused(twelve, tmp_path):
    output = tmp_path / "data"
    before = split(twelve, output, "--seed", "3")
    (output / "train-0123456789ab.npy").write_bytes(b"made by train.py")
    assert split(twelve, output, "--seed", "3").items() >= before.items()
    for options in ("--seed 4", "--seed 3 --val-rate 0.2", "--seed 3 --test-rate 0.2"):
        assert "holds another split" in refusal(twelve, output, *options.split())
    (output / "split.json").write_text("{}")
    assert "holds another split" in refusal(twelve, output, "--seed", "3")
    (output / "split.json").write_bytes(before["split.json"])
    next((output / "val").rglob("*.jpg")).unlink()
    assert "or not whole" in refusal(twelve, output, "--seed", "3")
    (twelve / "a" / "00.jpg").unlink()
    assert "of other photos" in refusal(twelve, output, "--seed", "3")


def test_output_and_source_do_not_meet(twelve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split(twelve, tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    link(tmp_path / "gone", "nowhere")
    before = contents(tmp_path)
    for output in ("photos/../photos", "photos/data", ".", "mine", "mine/thesis.txt", "gone", "/"):
        message = error_of(split_data.main, "--source", "photos", "--output", output)
        assert "--output" in message and ("mount point" in message) == (output in ("/", "."))
    assert "--output" in error_of(split_data.main, "--source", "data/train", "--output", "data")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # which a shell could not leave for the new one
    assert "you are in" in error_of(split_data.main, "--source", "../photos", "--output", ".")


def test_an_empty_output_folder_is_used_or_stays_as_it_is(twelve, tmp_path):
    (tmp_path / "empty").mkdir()
    files = split(twelve, tmp_path / "empty")
    assert split(twelve, tmp_path / "x" / "y" / "z") == files and len(files) == 23
    (tmp_path / "other").mkdir()
    assert "0 classes" in refusal(twelve / "a", tmp_path / "other")
    link(tmp_path / "link", "other")
    assert split(twelve, tmp_path / "link") == files == contents(tmp_path / "other")


def test_a_full_disk_and_ctrl_c_leave_nothing(twelve, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (1000, 500)).save(twelve / "b" / "large.bmp")  # 1.5 MB
    with full_disk(10**6):
        assert "too large" in refusal(twelve, tmp_path / "data")
    monkeypatch.setattr(shutil, "copyfile", Mock(side_effect=[None, None, KeyboardInterrupt]))
    with pytest.raises(SystemExit) as caught:
        split_data.main(["--source", str(twelve), "--output", str(tmp_path / "data")])
    assert caught.value.code == 130 and "stopped" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["photos"] and len(contents(twelve)) == 23


@pytest.fixture
def served(twelve, tmp_path, monkeypatch) -> Iterator[dict]:
    """What a local server sends, body and status, and an empty folder to work in."""
    files = {f"flower_photos/{name}": data for name, data in contents(twelve).items()}
    body = pack(tmp_path / "x.tgz", files).read_bytes()
    reply = {"body": body, "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(reply["status"])
            self.send_header("Content-Length", str(len(body)))  # that of the whole archive
            self.end_headers()
            self.wfile.write(reply["body"])

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/flower_photos.tgz"
    monkeypatch.setattr(split_data, "URL", url)
    monkeypatch.setattr(split_data, "SHA256", hashlib.sha256(body).hexdigest())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield reply
    socket.setdefaulttimeout(None)
    server.shutdown()
    server.server_close()


def test_the_missing_default_source_is_downloaded_whole_and_once(served, twelve, tmp_path):
    good = dict(served)
    for change in (
        *({"body": good["body"][:-1] + b"x"}, {"body": good["body"][:1000]}),
        *({"body": b""}, {"status": 404}),
    ):
        served.update(good | change)
        message = error_of(split_data.main)
        assert split_data.URL in message and "try again" in message, change
        assert not os.listdir()
    served.update(good)
    assert split_data.main([]) == 0
    assert contents(Path("data")) == split(twelve, tmp_path / "direct")
    served["status"] = 500  # not asked again
    assert split_data.main(["--seed", "1", "--output", "other"]) == 0
    assert sorted(os.listdir()) == ["data", "flower_photos.tgz", "other"]
    Path("flower_photos.tgz").write_text("<html>")  # what a browser may have saved
    assert "; remove it, and it is downloaded" in error_of(split_data.main)
