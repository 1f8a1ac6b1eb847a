"""Stop, starve and deceive the scripts, and see that nothing is lost; a person runs this on Linux.

    python tests/stress.py                         # every part at its full count, half an hour
    python tests/stress.py kills hostile --count 10
    python tests/stress.py odd --seed 3

One line a part says what was done; the exit status is 1 if any part failed. Scripts run in forks of
a process that has imported them, which saves the seconds that importing torch takes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the process that is forked from
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # which misses the locks of the killed

import alexnet  # noqa: E402
import predict  # noqa: E402
import split_data  # noqa: E402
import train  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["stress"])
CLOCK = {"seconds", "images_per_second"}  # what two equal runs may differ in
PEAK = 2048  # MiB that a script may take, whatever it is given


# ------------------------------------------------------------------------- scripts as processes


@dataclass
class Result:
    """How a process ended."""

    code: int  # -9: by SIGKILL
    out: str
    err: str
    peak: int  # MiB, 0 if it was killed

    def __repr__(self) -> str:
        return f"status {self.code}, {self.peak} MiB, {self.out[-300:]}{self.err[-600:]}"

    def succeeded(self) -> Result:
        assert self.code == 0 and "Traceback" not in self.err, self
        return self

    def refused(self, *words: str) -> Result:
        """Status 1 and one line, in which one of `words` stands."""
        assert self.code == 1 and re.fullmatch(r"error: [^\n]+\n", self.err), self
        assert not words or any(word in self.err for word in words), self
        return self


def start(main: Callable, *argv: object, before: tuple = (), cwd: Path | None = None) -> Any:
    """A process that calls each of `before`, then main(argv) as the script would."""
    log = tempfile.mkdtemp(prefix="stress.log.")
    process = FORKS.Process(target=work, args=(main, [*map(str, argv)], before, cwd, log))
    process.log = Path(log)
    process.start()
    return process


def work(main: Callable, argv: list[str], before: tuple, cwd: Path | None, log: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}/{name}", os.O_CREAT | os.O_WRONLY, 0o600), number)
    os.chdir(cwd or log)
    for prepare in before:
        prepare()
    try:
        sys.exit(main(argv))
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        Path(log, "peak").write_text(str(peak))


def finish(process: Any, seconds: float = 300) -> Result:
    """Wait for the end; one that takes longer than `seconds` hangs, which is a failure."""
    process.join(seconds)
    hangs = process.exitcode is None
    process.kill()
    process.join()
    texts = {path.name: path.read_text(errors="replace") for path in process.log.glob("*")}
    shutil.rmtree(process.log)
    result = Result(
        process.exitcode, texts.get("out", ""), texts.get("err", ""), int(texts.get("peak", 0))
    )
    assert not hangs, f"it hangs: {result}"
    return result


def run(main: Callable, *argv: object, before: tuple = (), cwd: Path | None = None) -> Result:
    return finish(start(main, *argv, before=before, cwd=cwd))


def draw(folder: Path, classes: dict[str, int], size: tuple[int, int] = (48, 40)) -> Path:
    """Photos of noise around a class's own colour."""
    for number, (label, n) in enumerate(classes.items()):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng([number, i]).integers(0, 120, (*size[::-1], 3))
            pixels[..., number % 3] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.jpg")
    return folder


def make_split(folder: Path, side: int = 48) -> Path:
    photos = draw(folder / "photos", {"daisy": 5, "roses": 4}, (side, side))
    options = ("--source", photos, "--output", folder / "data", "--val-rate", "0.3")
    run(split_data.main, *options).succeeded()
    return folder / "data"


# ------------------------------------------------------------------------------- what is whole


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path: Path) -> Any:
    """The whole content of a file that train.py writes; raises if the file is half."""
    if path.suffix in (".pt", ".pth"):
        return alexnet.load_tensors(path, mmap=False)
    if path.suffix == ".csv":
        text = path.read_text()
        assert text.endswith("\n"), path
        return list(csv.DictReader(io.StringIO(text), strict=True))
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".npy":
        return np.load(path)
    with Image.open(path) as image:
        return np.asarray(image)


def plain(value: Any) -> Any:
    """`value` without the clock, its tensors as digests: what two equal runs agree in."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items() if name not in CLOCK}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        value = value.contiguous().numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value)).digest()
    return value


def essence(folder: Path) -> dict[str, Any]:
    """{file: its content without the clock}; raises for a half file or a temporary one."""
    return {path.name: plain(read(path)) for path in folder.iterdir() if path.is_file()}


def check_whole(*folders: Path) -> None:
    """Nothing but temporary files may be half."""
    for path in itertools.chain(*(folder.glob("*.*") for folder in folders)):
        if path.suffix != ".tmp":
            read(path)


# ------------------------------------------------------------------------------- 1. kills


def die_at(number: int, folder: Path) -> None:
    """SIGKILL this process before its number-th change of a file in `folder`; 0: count them."""
    changes = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
    numbers = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        of_rmtree = event in ("os.remove", "os.rmdir") and not os.path.isabs(args[0])
        if event not in changes or not (of_rmtree or str(args[0]).startswith(str(folder))):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if not number:
            os.write(1, b"#")

    sys.addaudithook(hook)


def kill_when(process: Any, moment: Callable[[], bool]) -> None:
    while process.is_alive() and not moment():
        time.sleep(0.0003)
    process.kill()


def kill_once(
    rng: random.Random, folder: Path, argv: list[object], kind: str, number: int
) -> tuple[str, Result]:
    """Start train.py and kill it at some instant, if it does not end before.

    kind: a file while it grows, the number-th change of a file, or the clock; empty: any of them.
    """
    kind = kind or rng.choice(["last.pt", "AlexNet.pth", "packed", "clock", "change"])
    number, wait, part = number or rng.randint(1, 16), rng.uniform(0.1, 3), rng.random()
    before = (partial(die_at, number, folder),) if kind == "change" else ()
    begin = time.monotonic()
    for path in folder.rglob("*.tmp"):  # left by the kill before; what grows below is new
        os.truncate(path, 0)
    process = start(train.main, *argv, before=before)
    size = part * {"last.pt": 466e6, "AlexNet.pth": 233e6}.get(kind, 1.2e6)

    def grown() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_size > size for path in folder.rglob(f"*{kind}*.tmp"))
        return False

    if kind != "change":
        kill_when(process, grown if kind != "clock" else lambda: time.monotonic() > begin + wait)
    return kind, finish(process)


def kill_train(folder: Path, count: int, rng: random.Random) -> str:
    data = make_split(folder, side=1500)  # so large that the pack takes long enough to be hit
    output, runs = folder / "killed", {0: 1, 1: 2}  # seed: epochs
    options = ("--data", data, "--batch-size", "4")
    whole, kinds = {}, []
    for chain in itertools.count():
        if len(kinds) >= count:
            break
        seed = chain % 2  # each run replaces the one before, which stands until then
        # The changes of files of a first start: 12 of the packs, 15 behind them.
        kind, number = ("change", 13 + chain % 15) if chain % 4 else ("packed", 0)
        if seed not in whole:
            never = folder / f"whole{seed}"
            argv = [*options, "--output", never, "--seed", seed, "--epochs", runs[seed]]
            run(train.main, *argv).succeeded()
            whole[seed] = essence(never) | {"data": contents(data)}
            shutil.rmtree(never)
        for pack in data.glob("*.packed.*"):
            pack.unlink()
        code = -9
        while code:
            last = output / "last.pt"
            own = last.exists() and alexnet.load_tensors(last, True)["options"]["seed"] == seed
            argv = [*options, "--output", output, "--epochs", runs[seed]]
            argv += ["--resume"] if own else ["--overwrite", "--seed", seed]
            kind, result = kill_once(rng, folder, argv, kind, number)
            if (code := result.code) == -9:
                kinds.append(kind)
                kind, number = "", 0
                check_whole(data, output)
            else:
                result.succeeded()
        found = essence(output) | {"data": contents(data)}
        assert found == whole[seed], f"seed {seed} differs after {kinds}"
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{len(kinds)} kills of train.py ({counts})"


def kill_split(folder: Path, count: int) -> str:
    """Kill before each change of a file in turn; a start that is refused puts things right."""
    folder.mkdir()
    photos = draw(folder / "photos", {"a": 4, "b": 3})
    with tarfile.open(folder / "photos.tgz", "w:gz") as tar:
        tar.add(photos, arcname="photos")
    shutil.rmtree(photos)
    output = folder / "data"
    argv = ["--source", folder / "photos.tgz", "--output", output, "--val-rate", "0.4"]
    wholes = []
    for seed in (0, 1):
        changes = run(split_data.main, *argv, "--seed", seed, before=(partial(die_at, 0, folder),))
        wholes.append(contents(output))
    n = changes.succeeded().out.count("#")
    numbers = sorted({round(1 + i * (n - 1) / max(count - 1, 1)) for i in range(count)})
    for number in numbers:
        run(split_data.main, *argv).succeeded()
        killed = run(split_data.main, *argv, "--seed", 1, before=(partial(die_at, number, folder),))
        assert killed.code == -9, killed
        run(split_data.main, *argv, "--val-rate", "0.001").refused("too few")
        assert contents(output) in wholes, number
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["data", "photos.tgz"], (number, left)
    return f"{len(numbers)} kills of split_data.py, at {len(numbers)} of its {n} changes of files"


def kills(folder: Path, count: int, rng: random.Random) -> str:
    return f"{kill_split(folder / 'split', count)}; {kill_train(folder / 'train', count, rng)}"


# ------------------------------------------------------------------------------- 2. disk


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A tmpfs on `folder`; False where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    """A ballast that leaves `free` bytes of the disk of `folder`."""
    with open(folder / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - free)


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes: what a user who cannot mount has for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def see_room() -> None:
    """Let train.py believe that there is room, so that it meets the end of the disk."""
    usage = shutil.disk_usage("/")._replace(free=10**12)
    shutil.disk_usage = lambda path: usage


def bow_to_modes() -> None:
    """Give up root's right to read and write whatever it likes."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0, os.strerror(ctypes.get_errno())


def full_disk(folder: Path, data: Path, count: int, rng: random.Random) -> str:
    """Train until the disk is full, `count` times; then with room, where an epoch was whole."""
    disk = folder / "small"
    with small_disk(disk, 1300) as mounted:
        ends = []
        for i in range(count):
            # Room for nothing; half of last.pt; it but not AlexNet.pth; an epoch; all.
            low, high = [(0, 9), (0, 460), (470, 690), (710, 1160), (1170, 1300)][i % 5]
            free = rng.randint(low * 10**6, high * 10**6)
            before = [see_room] if mounted else [see_room, partial(limit_files, free)]
            if mounted:
                fill(disk, free)
            argv = ["--data", data, "--output", disk / "run", "--epochs", "2"]
            result = run(train.main, *argv, before=(*before,))
            if result.code:
                result.refused("No space left", "cannot be written", "too large")
            check_whole(disk / "run")
            left = {path.name for path in (disk / "run").iterdir()}
            assert not any(name.endswith(".tmp") for name in left), left
            ends.append("last.pt" in left)
            if "last.pt" in left:
                (disk / "ballast").unlink(missing_ok=True)
                run(train.main, *argv, "--resume").succeeded()
            shutil.rmtree(disk / "run")
    how = f"{count} full disks" if mounted else f"{count} limits on files (no right to mount)"
    return f"{how}, {sum(ends)} of them after a whole epoch, which was resumed"


def full_disk_elsewhere(folder: Path, data: Path, trained: Path) -> str:
    """split_data.py, the pack and predict.py's figure on a full disk."""
    disk = folder / "tiny"
    with small_disk(disk, 1) as mounted:
        if not mounted:
            return "split and pack on a full disk skipped: no right to mount"
        argv = ["--source", folder / "photos", "--output", disk / "data", "--val-rate", "0.3"]
        run(split_data.main, *argv).succeeded()
        photo = next((disk / "data" / "val").rglob("*.jpg"))
        before = contents(disk)
        fill(disk, 0)
        run(split_data.main, *argv, "--seed", 1).refused("No space left")
        run(train.main, "--data", disk / "data", "--output", folder / "o").refused("packed.npy")
        weights = ("--weights", trained / "AlexNet.pth")
        run(predict.main, photo, *weights, "--save", disk / "a.png").refused("a.png")
        (disk / "ballast").unlink()
        assert contents(disk) == before
    return "split, pack and figure on a full one"


def no_permission(folder: Path, data: Path, trained: Path) -> str:
    """Folders and files that may not be written or read."""
    bow, locked = (bow_to_modes,), folder / "locked"
    argv = ["--data", data, "--epochs", "1", "--output"]
    shutil.copytree(data, locked, ignore=shutil.ignore_patterns("*packed*"))
    before = contents(locked)
    locked.chmod(0o555)
    result = run(train.main, *argv, folder / "run", "--data", locked, before=bow).succeeded()
    assert "cannot be written to, so the packed photos go to" in result.out
    run(train.main, *argv, locked, before=bow).refused("Permission denied")
    run(train.main, *argv, locked / "new", before=bow).refused("Permission denied")
    split = ("--source", folder / "photos", "--output")
    run(split_data.main, *split, locked / "new", before=bow).refused("Permission denied")
    photo, *others = sorted((folder / "photos" / "daisy").iterdir())
    weights = ("--weights", trained / "AlexNet.pth")
    save = ("--save", locked / "a.png")
    run(predict.main, photo, *weights, *save, before=bow).refused("Permission denied")
    locked.chmod(0o755)
    assert contents(locked) == before
    photo.chmod(0)
    answers = run(predict.main, photo, *others, *weights, "--json", before=bow)
    assert answers.code == 1 and answers.err.count("\n") == 1, answers
    assert "Permission denied" in answers.err and answers.out.count("\n") == len(others), answers
    photo.chmod(0o644)
    (locked / "train" / "daisy").chmod(0)
    run(train.main, *argv, folder / "run2", "--data", locked, before=bow).refused("Permission")
    (locked / "train" / "daisy").chmod(0o755)
    (folder / "run" / "last.pt").chmod(0)
    run(train.main, *argv, folder / "run", "--resume", before=bow).refused("Permission denied")
    return "9 refusals of permission; a read-only data folder trained"


def disk(folder: Path, count: int, rng: random.Random) -> str:
    data, trained = make_split(folder), folder / "trained"
    run(train.main, "--data", data, "--output", trained, "--epochs", "1").succeeded()
    said = full_disk(folder, data, count, rng)
    elsewhere = full_disk_elsewhere(folder, data, trained)
    return f"{said}; {elsewhere}; {no_permission(folder, data, trained)}"


# ------------------------------------------------------------------------------- 3. hostile files


def forbid_code(marker: Path) -> None:
    """End this process with status 99 when it runs a program or connects to anything."""
    bad = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}

    def hook(event: str, args: tuple) -> None:
        if event in bad or (event == "open" and args[0] == str(marker)):
            os.write(2, f"CODE RUN: {event} {args}\n".encode())
            os._exit(99)

    sys.addaudithook(hook)


def judge(result: Result, what: str) -> bool:
    """A hostile file is answered (True) or refused in lines that say why; nothing else."""
    assert result.code in (0, 1), (what, result)
    # libtiff writes remarks of its own on stderr, past Python.
    lines = re.sub(r"^.*(TIFF|Decode|tempfile\.tif).*\n", "", result.err, flags=re.M).splitlines()
    surplus = [line for line in lines if not line.startswith("error: ")]
    assert not surplus, (what, surplus)
    assert result.code == 0 or lines, (what, result)
    assert result.peak < PEAK, (what, result)
    return result.code == 0


def encode(rng: random.Random, bad_modes: bool = True) -> bytes:
    """A picture in one of the formats that are read, perhaps of fractions, which are refused."""
    kind = rng.choice(alexnet.FORMATS)
    modes = {"PNG": "RGB RGBA P L LA 1 I;16".split(), "TIFF": "RGB CMYK F I I;16".split()}
    image = Image.effect_noise((rng.randint(1, 90), rng.randint(1, 90)), 90)
    mode = rng.choice(modes.get(kind, ["RGB"]))
    mode = "RGB" if mode == "F" and not bad_modes else mode
    image = image.convert(mode)
    options = {"exif": b"Exif\0\0" + rng.randbytes(60)} if kind in ("JPEG", "WEBP") else {}
    if kind == "TIFF":
        options = {"compression": rng.choice(["raw", "tiff_lzw", "tiff_deflate", "packbits"])}
    if kind == "GIF":
        options = {"save_all": True, "append_images": [image.rotate(90)] * 2}
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def huge_headers() -> list[bytes]:
    """Pictures that say that they are enormous."""
    png, big = bytearray(encode_as("PNG")), (10**5).to_bytes(4, "big")
    png[16:24] = big * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    bmp, gif = bytearray(encode_as("BMP")), bytearray(encode_as("GIF"))
    bmp[18:26] = (13000).to_bytes(4, "little") * 2
    gif[6:10] = b"\xff\xff\xff\xff"
    jpeg = bytearray(encode_as("JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = b"\x33\x00\x33\x00"  # 13056 x 13056, below Pillow's limit
    return [bytes(png), bytes(bmp), bytes(gif), bytes(jpeg), b"P6 99999 99999 255\n", b"P5 13000 "
            b"13000 65535\n" + bytes(999)]  # fmt: skip


def encode_as(kind: str) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 48), 90).convert("RGB").save(data, kind)
    return data.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut short, with bytes changed, zeroed, doubled or taken out."""
    way, n = rng.randrange(5), len(data)
    where, length = rng.randrange(n), rng.randint(1, max(n // 4, 1))
    if way == 0:
        return data[:where]
    if way == 1:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):  # the header is where it hurts
            changed[rng.randrange(rng.choice([n, min(n, 64)]))] = rng.randrange(256)
        return bytes(changed)
    between = [b"", bytes(length), data[where : where + length] * 2][way - 2]
    return data[:where] + between + data[where + length :]


def hostile_images(folder: Path, trained: Path, count: int, rng: random.Random) -> str:
    marker = folder / "marker"
    code = f"touch {marker}"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{code}) (w) file\n".encode()
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><script>{code}</script></svg>'.encode()
    fixed = [b"", b"\0", b"plain text\n" * 99, script, svg, b"<html></html>", *huge_headers()]
    fixed += [encode_as("JPEG") + b"PK\5\6" + bytes(18), b"GIF89a/*" + script, b"BM" + svg]
    photos = folder / "photos"
    for label in ("a", "b"):
        (photos / label).mkdir(parents=True)
    good = []
    for i in range(count):
        suffix = rng.choice(alexnet.IMAGE_SUFFIXES)  # wrong ones, too
        data = fixed[i] if i < min(len(fixed), count // 2) else mutate(encode(rng), rng)
        (photos / "ab"[i % 2] / f"bad{i}{suffix}").write_bytes(data)
        if i % 10 < 2:
            good.append(photos / "ab"[i % 2] / f"good{i}{suffix}")
            good[-1].write_bytes(encode(rng, bad_modes=False))
    os.mkfifo(photos / "a" / "pipe.jpg")
    (photos / "a" / "zero.jpg").symlink_to("/dev/zero")
    (photos / "a" / "nothing.jpg").symlink_to("nowhere")
    before = (partial(forbid_code, marker),)
    weights = ("--weights", trained / "AlexNet.pth", "--json")
    result = run(predict.main, photos, *weights, before=before)
    judge(result, "images")
    answered = {json.loads(line)["path"] for line in result.out.splitlines()}
    assert {str(path) for path in good} <= answered
    n_bad = result.err.count("error: ")
    assert len(answered) + n_bad == count + len(good) + 3, result
    split = ("--source", photos, "--output", folder / "data", "--val-rate", "0.3")
    judge(run(split_data.main, *split, before=before), "split")
    argv = ("--data", folder / "data", "--output", folder / "o", "--epochs", "1", "--lr", "1e-6")
    run(train.main, *argv, before=before).succeeded()  # whatever split_data.py let through
    kept = {Path(name).name for name in contents(folder / "data")}
    assert {path.name for path in good} <= kept
    return f"{count} images ({n_bad} refused), {len(good)} good ones answered, {result.peak} MiB"


class Code:
    """Pickled, it asks whoever unpickles it to make the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def thin(value: Any) -> Any:
    """`value` with large tensors replaced by one number seen as often as needed: small files."""
    if isinstance(value, dict):
        return {name: thin(v) for name, v in value.items()}
    if isinstance(value, list):
        return [thin(v) for v in value]
    if isinstance(value, torch.Tensor) and value.numel() > 9:
        return torch.zeros(1).expand(value.shape)
    return value


def bad_values(marker: Path) -> dict[str, Any]:
    """What may stand where something else is expected."""
    nan = torch.full((3, 1, 1), float("nan"))
    return {
        "number": 5, "minus": -1, "word": "x", "none": None, "list": [], "dict": {}, "nan": nan,
        "infinite": float("inf"), "huge": 10**30, "shape": torch.zeros(2, 3),
        "bytes": nan.to(torch.int8), "double": nan.double(), "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"), "wide": torch.zeros(1).expand(2**50, 4096),
        "code": Code(marker),
    }  # fmt: skip


def places(value: Any, so_far: tuple = ()) -> Iterator[tuple]:
    """The keys and indices that lead to each part of nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        yield (*so_far, key)
        if isinstance(part, dict | list):
            yield from places(part, (*so_far, key))


def replace(value: Any, place: tuple, new: Any) -> Any:
    """A copy with one part replaced; `Ellipsis` takes it out."""
    copy = value.copy()
    key, *rest = place
    if rest:
        copy[key] = replace(value[key], tuple(rest), new)
    elif new is ...:
        del copy[key]
    else:
        copy[key] = new
    return copy


def damage(path: Path, whole: Path, rng: random.Random) -> str:
    """Write `whole` to `path` cut short, with bits turned, inflated when read, or as code."""
    way = rng.choice(["cut", "bits", "bits", "zipped", "code", "old code", "bare"])
    if way in ("cut", "bits"):
        shutil.copyfile(whole, path)
        size = path.stat().st_size
        if way == "cut":
            os.truncate(path, rng.choice([rng.randrange(size), size - rng.randint(1, 99)]))
            return way
        with open(path, "r+b") as file:
            for _ in range(30):  # the names and shapes are at both ends
                place = rng.choice([rng.randrange(size), rng.randrange(4000), size - 4000])
                file.seek(place + rng.randrange(1000))
                file.write(rng.randbytes(1))
    elif way == "zipped":  # some megabytes that inflate to more than a script may take
        small = io.BytesIO()
        torch.save(thin(read(whole)), small)
        zipped = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        with zipfile.ZipFile(small) as source, zipped as target:
            for name in source.namelist():
                with target.open(name, "w", force_zip64=True) as record:
                    record.write(source.read(name))
                    for _ in range(PEAK + 512 if name.endswith("data/0") else 0):
                        record.write(bytes(1 << 20))
    elif way == "code":
        torch.save({"net": Code(path.with_name("marker"))}, path)
    elif way == "old code":
        path.write_bytes(pickle.dumps(Code(path.with_name("marker"))))
    else:
        torch.save(rng.choice([5, [1], torch.zeros(3), "text", None]), path)
    return way


def hostile_weights(folder: Path, trained: Path, count: int, rng: random.Random) -> str:
    """Half of the files are weights for predict.py, half checkpoints for train.py --resume."""
    data, photo = trained.parent / "data", next((trained.parent / "photos").rglob("*.jpg"))
    marker, bad, output = folder / "marker", bad_values(folder / "marker"), folder / "run"
    shutil.copytree(trained, output)
    before, answered = (partial(forbid_code, marker),), 0
    wholes = {name: thin(read(trained / name)) for name in ("AlexNet.pth", "last.pt")}
    for i in range(count):
        name = ("AlexNet.pth", "last.pt")[i % 2]
        if i % 5 == 0:
            what = damage(output / name, trained / name, rng)
        else:
            place = rng.choice(list(places(wholes[name])))
            what, new = rng.choice([*bad.items(), ("gone", ...), ("gone", ...)])
            what = f"{what} at {place}"
            torch.save(replace(wholes[name], place, new), output / name)
            if "code" in what:  # what torch.save wrote is a link to this class; nothing ran here
                assert not marker.exists()
        argv = [photo, "--weights", output / name, "--no-figure"]
        if name == "last.pt":
            argv = ["--data", data, "--output", output, "--resume", "--epochs", "5"]
        main = predict.main if name == "AlexNet.pth" else train.main
        answered += judge(run(main, *argv, before=before), what)
        assert not marker.exists(), what
    for name, whole in wholes.items():  # what was mutated is otherwise accepted
        torch.save(whole, output / name)
    argv = ["--data", data, "--output", output, "--resume", "--epochs", "5"]
    run(train.main, *argv).succeeded()
    run(predict.main, photo, "--weights", output / "AlexNet.pth", "--no-figure").succeeded()
    return f"{count} weights and checkpoints ({count - answered} refused)"


def hostile_archives(folder: Path) -> str:
    """Archives that want to write elsewhere; what stands elsewhere stays as it is."""
    box, inner = folder / "box", folder / "box" / "in"
    inner.mkdir(parents=True)
    (box / "mine.jpg").write_bytes(b"mine")
    photo = encode_as("JPEG")
    link, hard, device = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE
    cases = {
        "absolute": [(str(box / "evil.jpg"), None, "")],
        "parent": [("../../evil.jpg", None, ""), ("p/a/../../../../evil.jpg", None, "")],
        "link": [("p/out", link, str(box)), ("p/out/evil.jpg", None, "")],
        "relative link": [("p/out", link, "../../.."), ("p/out/evil.jpg", None, "")],
        "file link": [("p/a/x.jpg", link, str(box / "mine.jpg")), ("p/a/x.jpg", None, "")],
        "hard link": [("p/a/x.jpg", hard, str(box / "mine.jpg")), ("p/a/x.jpg", None, "")],
        "hard link up": [("p/a/x.jpg", hard, "../../../mine.jpg"), ("p/a/x.jpg", None, "")],
        "device": [("p/a/x.jpg", device, "")],
        "pipe": [("p/a/x.jpg", tarfile.FIFOTYPE, "")],
    }
    for name, members in cases.items():
        archive = inner / "photos.tar"
        with tarfile.open(archive, "w") as tar:
            for label, i in itertools.product("ab", range(4)):
                members = [*members, (f"p/{label}/{i}.jpg", None, "")]
            for path, kind, target in members:
                info = tarfile.TarInfo(path)
                info.type, info.linkname = kind or tarfile.REGTYPE, target
                info.size = 0 if kind else len(photo)
                tar.addfile(info, None if kind else io.BytesIO(photo))
        result = run(split_data.main, "--source", archive, "--output", inner / "data")
        judge(result, name)
        shutil.rmtree(inner / "data", ignore_errors=True)
        archive.unlink()
        assert contents(box) == {"mine.jpg": b"mine"}, (name, contents(box).keys())
        assert not list(inner.iterdir()), (name, list(inner.iterdir()))
    return f"{len(cases)} archives wrote nothing elsewhere"


def hostile_records(folder: Path, trained: Path) -> str:
    """What is kept beside the photos and the weights as JSON and .npy, with odd content."""
    data, output = shutil.copytree(trained.parent / "data", folder / "data"), folder / "o"
    deep, photo = "[" * 10**5, next(data.rglob("*.jpg"))
    texts = ["", "5", "[]", "{}", "null", deep, '{"0": "a"}', '{"files": 5}', "\0\xff"]
    classes = folder / "classes.json"
    options = ("--weights", trained / "AlexNet.pth", "--classes", classes, "--no-figure")
    for text in texts:
        classes.write_text(text, encoding="latin-1")
        run(predict.main, photo, *options).refused()
        (data / "split.json").write_text(text, encoding="latin-1")
        split = ("--source", trained.parent / "photos", "--output", data)
        run(split_data.main, *split).refused()
    whole = (data / "train.packed.json").read_text()
    record, npy = json.loads(whole), (data / "train.packed.npy").read_bytes()
    odd = [{"mean": "x"}, {"mean": [float("nan")] * 3}, {"covariance": []}, {"files": []}]
    packs = [*((json.dumps(record | part), npy) for part in odd), (deep, npy)]
    packs += [(whole, part) for part in (npy.replace(b"|u1", b"|i1"), b"PK\3\4", npy[:100])]
    for text, array in packs:
        (data / "train.packed.json").write_text(text)
        (data / "train.packed.npy").write_bytes(array)
        argv = ("--data", data, "--output", output, "--epochs", "1", "--overwrite")
        run(train.main, *argv).succeeded()  # the pack is made again
        assert (data / "train.packed.npy").read_bytes() == npy
    return f"{2 * len(texts) + len(packs)} odd records"


def hostile(folder: Path, count: int, rng: random.Random) -> str:
    data, trained = make_split(folder), folder / "trained"
    run(train.main, "--data", data, "--output", trained, "--epochs", "4").succeeded()
    said = hostile_images(folder / "images", trained, count, rng)
    (folder / "weights").mkdir()
    said += "; " + hostile_weights(folder / "weights", trained, max(count // 4, 5), rng)
    said += "; " + hostile_archives(folder / "archives")
    return said + "; " + hostile_records(folder / "records", trained)


# ------------------------------------------------------------------------------- 4. odd but right


ODD_NAMES = ("a b", "it's", 'say "so"', "-dash", "100%", "%s", "蒲公英", "🌼 Löwenzahn", "$\\x$",
             "{0}", "~", "#1", "a;b&c", "x" * 200)  # fmt: skip


def console(script: str, *argv: object, cwd: Path) -> str:
    """Run a script on a console that has ASCII alone, as a user does; returns what it printed."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, timeout=600, text=True
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result
    return result.stdout


def odd_photos(folder: Path, n_classes: int) -> tuple[Path, int]:
    """Photos in classes with odd names, of odd sizes, among links, hidden and empty folders."""
    names = [*ODD_NAMES, *(f"class {i:03}" for i in range(n_classes - len(ODD_NAMES)))]
    photos = draw(folder / "-my 'photos' 🌷%", dict.fromkeys(names, 4), size=(40, 30))
    first, second = photos / names[0], photos / names[1]
    for number, size in enumerate([(1, 1), (1, 5000), (5000, 1), (8000, 8000)]):
        Image.effect_noise(size, 50).save(first / f"odd {number}.png", compress_level=1)
    (first / ("y" * 240 + ".jpg")).write_bytes((first / "0.jpg").read_bytes() + b"longer name")
    for name in ("2.jpg", "3.jpg"):
        (second / name).unlink()  # leaves a class of one training photo
    (photos / "linked").symlink_to(draw(folder / "far", {"away": 4}) / "away")
    (photos / names[2] / "link.jpg").symlink_to(folder / "far" / "away" / "0.jpg")
    (photos / ".hidden").mkdir()
    shutil.copy(first / "0.jpg", photos / ".hidden")
    (photos / "empty" / "empty too").mkdir(parents=True)
    return photos, len(names) + 1


def odd(folder: Path, count: int, rng: random.Random) -> str:
    """Everything with `count` classes; and two runs that make one pack at the same time."""
    photos, n_classes = odd_photos(folder, count)
    data, output = folder / "-data 🌷 %d", folder / "-out it's"
    split = ("--source", photos, f"--output={data.name}", "--val-rate", "0.5")
    console("split_data.py", *split, cwd=folder)
    argv = (f"--data={data.name}", "--epochs", "1", "--lr", "1e-4")
    printed = console("train.py", *argv, f"--output={output.name}", cwd=folder)
    assert f"{n_classes} classes" in printed, printed
    classes = json.loads((output / "class_idx.json").read_text("utf-8"))
    names = {path.name for path in photos.iterdir()} - {".hidden", "empty"}
    assert {*classes.values()} == names and len(classes) == n_classes
    weights = ("--weights", output / "AlexNet.pth")
    printed = console("predict.py", *weights, "--json", data / "val", data / "train", cwd=folder)
    answers = {json.loads(line)["path"] for line in printed.splitlines()}
    every = {str(path) for path in alexnet.image_files(data)}
    assert answers == every, answers ^ every
    console("predict.py", *weights, data / "val", cwd=folder)
    for name in ODD_NAMES:
        photo = next((data / "val" / name).iterdir())
        save = folder / f"{name[:50]}.png"
        top = n_classes if "$" in name else 5  # which would be read as a formula
        run(predict.main, photo, *weights, "--top-k", top, f"--save={save}").succeeded()
        assert read(save).shape[1] == 900
    for pack in data.glob("*.packed.*"):
        pack.unlink()
    both = [folder / "one", folder / "two"]
    argv = ("--data", data, *argv[1:])
    for result in [finish(p) for p in [start(train.main, *argv, "--output", o) for o in both]]:
        result.succeeded()
    last = [{k: v for k, v in essence(o).items() if k != "curves.png"} for o in (output, *both)]
    assert last[0] == last[1] == last[2]
    assert not list(data.glob("*.tmp"))
    return f"{n_classes} classes, names and sizes; two runs at once are the run alone"


# ------------------------------------------------------------------------------- 7. downloads


class Handler(BaseHTTPRequestHandler):
    """Answers each request by the next of the server's `replies`; the last one stays."""

    def do_GET(self) -> None:
        replies = self.server.replies
        reply = {"status": 200, "ranges": True, "headers": {}, "cut": None, "stall": False}
        reply |= replies.pop(0) if len(replies) > 1 else replies[0]
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        body, status = reply.get("body", self.server.archive), reply["status"]
        self.server.asked.append(asked and int(asked[1]))
        if asked and reply["ranges"] and status == 200:
            body, status = body[int(asked[1]) :], 206
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | reply["headers"]).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: reply["cut"]])
            self.wfile.flush()
            while reply["stall"] and not self.server.over:
                time.sleep(0.05)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(archive: bytes) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.archive, server.replies, server.asked, server.over = archive, [{}], [], False
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over = True
        server.shutdown()
        server.server_close()


def point_to(port: int, archive: bytes) -> None:
    split_data.ARCHIVE_URL = f"http://127.0.0.1:{port}/flower_photos.tgz"
    split_data.ARCHIVE_SIZE = len(archive)
    split_data.ARCHIVE_SHA256 = hashlib.sha256(archive).hexdigest()
    split_data.TIMEOUT = 1


def server_failures(archive: bytes) -> dict[str, dict[str, Any]]:
    """{name: a reply, as Handler gives it}."""
    size, other = len(archive), bytes(255 - b for b in archive)
    page, chunked = b"<html>busy</html>" * 99, {"Content-Length": None}
    return {
        "short": {"body": archive[:-1]}, "long": {"body": archive + b"x"}, "other": {"body": other},
        "longer than said": {"body": archive * 9, "headers": chunked},
        "page": {"body": page}, "page of no length": {"body": page, "headers": chunked},
        "404": {"status": 404}, "500": {"status": 500, "body": page}, "503": {"status": 503},
        "loop": {"status": 302, "headers": {"Location": "/again"}},
        "to a file": {"status": 302, "headers": {"Location": "file:///etc/passwd"}},
        "to nowhere": {"status": 302, "headers": {"Location": "http://[/"}},
        "stall": {"cut": size // 2, "stall": True}, "stall at once": {"cut": 0, "stall": True},
    }  # fmt: skip


def downloads(folder: Path, count: int, rng: random.Random) -> str:
    """Servers that fail once; the next start, from a good one, ends with the right photos."""
    photos = draw(folder / "flower_photos", {"a": 10, "b": 10})
    with tarfile.open(folder / "archive.tgz", "w:gz") as tar:
        tar.add(photos, arcname="flower_photos")
    archive = (folder / "archive.tgz").read_bytes()
    failures = server_failures(archive)
    for i in range(count):
        cut = rng.randrange(len(archive))
        failures[f"broken off, {i}"] = {"cut": cut, "ranges": bool(i % 2)}
    with served(archive) as server:
        before, resumed = (partial(point_to, server.server_port, archive),), 0
        for number, (name, reply) in enumerate(failures.items()):
            work = folder / f"work{number}"
            work.mkdir()
            server.replies, server.asked = [reply], []
            run(split_data.main, before=before, cwd=work).refused("download", "expected archive")
            left = {path.name for path in work.iterdir()}
            assert left <= {"flower_photos.tgz.part"}, (name, left)
            moved = {"status": 302, "headers": {"Location": "/moved"}}
            good = {"ranges": reply.get("ranges", True)}
            server.replies, server.asked = [moved, good] if number % 2 else [good], []
            again = run(split_data.main, before=before, cwd=work)
            if again.code:  # it went on behind bytes that were none of the archive's
                assert name in ("page of no length",), (name, again)
                again = run(split_data.main, before=before, cwd=work)
            again.succeeded()
            resumed += bool(server.asked[-1]) and good["ranges"]
            assert contents(work / "flower_photos") == contents(photos), name
            assert {path.name for path in work.iterdir()} == {
                "data", "flower_photos", "flower_photos.tgz"
            }  # fmt: skip
    assert resumed >= count // 2
    return f"{len(failures)} failures, {resumed} of them resumed behind what was there"


# ------------------------------------------------------------------------------- 5. long work


def watch_memory(log: Path) -> None:
    """Append RssAnon in MiB, the threads and the child processes to `log` after each epoch."""
    print_epoch = train.print_epoch

    def watch(run: train.Run) -> None:
        print_epoch(run)
        status = Path("/proc/self/status").read_text()
        memory = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1024
        tasks = [*Path("/proc/self/task").iterdir()]
        children = sum(len((task / "children").read_text().split()) for task in tasks)
        with open(log, "a") as file:
            print(memory, len(tasks), children, file=file)

    train.print_epoch = watch


def long(folder: Path, count: int, rng: random.Random) -> str:
    data, output, log = make_split(folder), folder / "run", folder / "memory.txt"
    argv = ["--data", data, "--output", output, "--epochs", count, "--patience", 10**6]
    argv += ["--lr", "1e-4", "--batch-size", "4"]
    before = (partial(watch_memory, log),)
    process = start(train.main, *argv, before=before)
    finish(process, 60 + 60 * count).succeeded()
    rows = [[int(word) for word in line.split()] for line in log.read_text().splitlines()]
    memory, tasks, children = zip(*rows, strict=True)
    assert len(rows) == count and not any(children), rows
    first = min(20, count // 2)
    growth = max(memory[-5:]) - max(memory[max(first - 5, 0) : first])
    # The heap takes some epochs to its final size; a network kept would be 222 MiB an epoch.
    assert growth <= (16 if first == 20 else 150), f"RssAnon grows: {memory}"
    assert len(set(tasks[first:])) == 1, f"threads: {tasks}"
    assert {path.name for path in output.iterdir()} == set(essence(output))
    large = {path.name for path in output.iterdir() if path.stat().st_size > 10**6}
    assert large == {"last.pt", "AlexNet.pth"}, large
    packs = {f"{side}.packed.{end}" for side in ("train", "val") for end in ("npy", "json")}
    assert {path.name for path in data.iterdir()} == {"train", "val", "split.json"} | packs
    return (
        f"{count} epochs, RssAnon {memory[first - 1]} MiB after {first} of them, {memory[-1]} MiB "
        f"at the end, {tasks[-1]} threads, no child"
    )


# ------------------------------------------------------------------------------- 6. numbers


def compare_threads_and_pieces(argv: list[str]) -> int:
    """One step in float64 without dropout, by 1 and 2 threads, in 1 and 3 pieces."""
    args = train.parse_args(argv)
    sets = [train.pack(args.data / side, args.output) for side in ("train", "val")]
    run = train.Run(args, *sets, torch.device("cpu"), torch.float32)
    run.net.double().train()
    for layer in run.net.classifier:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    begin = [p.detach().clone() for p in run.net.parameters()]
    draws, updates = train.draw_epoch(run.train_set, 0, 1, 0.35), []
    for threads, pieces in itertools.product((1, 2), (1, 3)):
        torch.set_num_threads(threads)
        run.args.accumulate = pieces
        with torch.no_grad():
            for parameter, value in zip(run.net.parameters(), begin, strict=True):
                parameter.copy_(value)
        run.optimizer.state.clear()
        train.train_one_batch(run, draws, torch.arange(len(run.train_set)))
        changes = zip(run.net.parameters(), begin, strict=True)
        updates.append(torch.cat([(p.detach() - b).flatten() for p, b in changes]))
    worst = max((u - updates[0]).norm() / updates[0].norm() for u in updates[1:]).item()
    assert 0 < updates[0].norm() and worst < 1e-9, worst
    print(f"{worst:.0e}")
    return 0


def lose_the_loss(batch: int) -> None:
    """The loss is no number from the given batch on."""
    numbers, step = itertools.count(1), train.train_one_batch
    factor = lambda: float("nan") if next(numbers) >= batch else 1.0  # noqa: E731
    train.train_one_batch = lambda *args: step(*args) * factor()


def ties(folder: Path, photo: Path) -> None:
    """One photo in two classes: nothing can be learnt but the larger one, and no rate may fall."""
    same = folder / "same"
    for i in range(5):
        for side in ("train", "val"):
            label = same / side / ("a" if i < 3 else "b")
            label.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, label / f"{i}.jpg")
    options = ["--data", same, "--output", folder / "plateau", "--epochs", "9", "--lr", "1e-3"]
    run(train.main, *options, "--patience", "0").succeeded()
    rates = {row["lr"] for row in read(folder / "plateau" / "history.csv")[3:]}
    accuracies = {row["val_accuracy"] for row in read(folder / "plateau" / "history.csv")[3:]}
    assert rates == {"0.001"} and accuracies <= {"0.6", "0.4"}, (rates, accuracies)


def numbers(folder: Path, count: int, rng: random.Random) -> str:
    data, argv = make_split(folder), ["--batch-size", "4", "--seed", count, "--data"]
    options = [*argv, data, "--epochs", "2", "--output"]
    for name in ("one", "two"):
        run(train.main, *options, folder / name).succeeded()
    assert essence(folder / "one") == essence(folder / "two")
    before = contents(folder / "one")
    goes_on = [*argv, data, "--epochs", "9", "--resume", "--output", folder / "one"]
    run(train.main, *goes_on, before=(partial(lose_the_loss, 1),)).refused("epoch 3, batch")
    assert contents(folder / "one") == before
    fresh = [*options, folder / "new"]
    run(train.main, *fresh, before=(partial(lose_the_loss, 2),)).refused("epoch 1, batch")
    run(train.main, *fresh, "--lr", "1e9").refused("no longer a number")
    assert {path.name for path in (folder / "new").iterdir()} == {"class_idx.json"}
    worst = run(compare_threads_and_pieces, "--data", data, "--output", folder).succeeded().out
    ties(folder, next((data / "train" / "daisy").iterdir()))
    return f"equal runs; rounding {worst.strip()} by threads and pieces; 3 losses of the loss; ties"


# ------------------------------------------------------------------------------- all parts


PARTS: dict[str, tuple[Callable[[Path, int, random.Random], str], int]] = {
    "kills": (kills, 100),  # of each script
    "disk": (disk, 15),  # full disks that train.py meets
    "hostile": (hostile, 200),  # images, and a quarter as many weights
    "odd": (odd, 200),  # classes
    "long": (long, 100),  # epochs
    "numbers": (numbers, 1),  # the seed
    "downloads": (downloads, 20),  # that break off
}


def run_part(name: str, count: int, seed: int) -> str:
    """What a part has done, in a line; raises AssertionError if something was lost."""
    with tempfile.TemporaryDirectory(prefix="stress.") as folder:
        return PARTS[name][0](Path(folder), count, random.Random(seed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--count", type=int, help="instead of a part's full count")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    failed = False
    for name in args.parts or PARTS:
        begin = time.monotonic()
        try:
            outcome = run_part(name, args.count or PARTS[name][1], args.seed)
        except Exception:
            failed, outcome = True, f"FAILED\n{traceback.format_exc()}"
        print(f"{name} ({time.monotonic() - begin:.0f} s): {outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
