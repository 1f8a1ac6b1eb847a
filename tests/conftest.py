"""What the tests share: small drawn photos, a split of them, and a run trained on it."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows cannot do this")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="for names that others do not allow")
CLOCK = {"seconds", "images_per_second"}

from draw_flowers import draw_flower  # noqa: E402

import split_data  # noqa: E402
import train  # noqa: E402


def draw_photos(folder: Path, classes: dict[str, int], kinds: tuple[str, ...] = ()) -> Path:
    """classes: {name: number of photos}; drawn as `kinds`, or else all as tulips."""
    for number, (label, n) in enumerate(classes.items()):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            kind = kinds[number] if kinds else "tulips"
            image = draw_flower(kind, random.Random(f"{label} {i}"), 80, 60)
            image.save(folder / label / f"{i:02d}.jpg")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes}; of empty folders, too."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    return files | {name: b"" for name, x in found.items() if x.is_dir() and not os.listdir(x)}


def link(path: Path, target: Path | str) -> None:
    """A symbolic link; skips the test where Windows lets only developers make one."""
    try:
        path.symlink_to(target)
    except OSError as error:
        pytest.skip(str(error))


def history_of(output: Path) -> list[dict[str, str]]:
    """history.csv without what depends on the clock."""
    with open(output / "history.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def same(a: Any, b: Any) -> bool:
    """Whether two files' contents are equal to the bit, but for what the clock says."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - CLOCK)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def error_of(main: Callable[[list[str]], int], *argv: str | Path) -> str:
    """The one line with which a script refuses; its exit status is not zero."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in argv])
    message = caught.value.code  # a string is printed on stderr, and the status is 1
    assert isinstance(message, str) and message.startswith("error: "), message
    assert "\n" not in message
    return message


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk; Python ignores the signal."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 drawings: 6 daisies, 5 roses, 5 tulips."""
    folder = tmp_path_factory.mktemp("photos") / "flowers"
    classes = {"daisy": 6, "roses": 5, "tulips": 5}
    return draw_photos(folder, classes, kinds=tuple(classes))


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of two classes: 6 drawings to train, 3 to val."""
    folder = tmp_path_factory.mktemp("few")
    for side, classes in (("train", {"a": 3, "b": 3}), ("val", {"a": 2, "b": 1})):
        draw_photos(folder / side, classes, kinds=("daisy", "tulips"))
    return folder


@pytest.fixture(scope="session")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawings split: 13 to train, 3 to val."""
    output = tmp_path_factory.mktemp("split") / "data"
    argv = ["--source", str(photos), "--output", str(output), "--val-rate", "0.2"]
    assert split_data.main(argv) == 0
    return output


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    output = tmp_path_factory.mktemp("run")
    argv = ["--data", str(data), "--output", str(output), "--epochs", "2", "--device", "cpu"]
    assert train.main(argv) == 0
    return output


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What CUDA's driver tells of two cards that are not there; it may be changed.

    The driver's calls are replaced, no function of torch.cuda; tensors are fake meanwhile.
    """
    told = SimpleNamespace(free=5000, major=8, minor=0, name="a card")
    memory = SimpleNamespace(cudaMemGetInfo=lambda index: (told.free, 10_000))
    cuda = {"_initialized": True, "_cached_device_count": 2, "_cudart": memory}
    for name, answer in (cuda | {"_get_device_properties": lambda index: told}).items():
        monkeypatch.setattr(torch.cuda, name, answer, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    precision = torch.get_float32_matmul_precision()  # which pick_device changes, like cudnn's
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.backends.cudnn.flags(enabled=True), fake:
        yield told
    torch.set_float32_matmul_precision(precision)
