"""Kill, starve and deceive the scripts, and see that nothing is lost; a person runs this on Linux.

    python tests/stress.py                  # every part, some twenty minutes on two cores
    python tests/stress.py images --seed 3

One line a part says what was done; the exit status is 1 if any part failed.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the process that is forked from
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # which misses the locks of the killed

from conftest import contents, history_of, same  # noqa: E402

import alexnet  # noqa: E402
import predict  # noqa: E402
import split_data  # noqa: E402
import train  # noqa: E402

train.SAVE_PAUSE = 0  # all is saved after every epoch
FORKS = multiprocessing.get_context("forkserver")  # importing torch takes seconds
FORKS.set_forkserver_preload(["stress"])
Result = tuple[int, str]  # exit status (-9: killed) and stderr


# ------------------------------------------------------------------------- scripts as processes


def work(main: Callable, argv: list[str], before: tuple, log: str) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(Path(log).parent)
    for call, *arguments in before:
        call(*arguments)
    sys.exit(main(argv))


def run(main: Callable, *argv: object, before: tuple = (), seconds: float = 0) -> Result:
    """main(argv) in a process that calls each of `before` first, or is killed after `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = FORKS.Process(target=work, args=(main, [*map(str, argv)], before, str(log)))
        process.start()
        process.join(seconds or 300)
        assert seconds or process.exitcode is not None, f"{argv} hangs"
        process.kill()
        process.join()
        return process.exitcode, log.read_text(errors="replace") if log.exists() else ""


def fine(result: Result) -> None:
    assert result[0] == 0, result


def fine_or_refused(result: Result) -> bool:
    """Status 0, or 1 after lines of which each is one sentence; returns whether it was fine."""
    status, err = result
    assert status in (0, 1) and "Traceback" not in err, result
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "cannot be read: "))]
    assert status == 0 or lines, result
    return status == 0


def die_at(number: int, folder: str) -> None:
    """Kill this process at its file operation of that number below the folder."""
    operations, left = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}, [number]

    def count(event: str, arguments: tuple) -> None:
        if event in operations and folder in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ------------------------------------------------------------------------- data, and what is whole


def draw(folder: Path, n: int) -> Path:
    """Pictures of noise, all different, n of each of two classes."""
    for i in range(2 * n):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (40, 32), random.Random(i).randbytes(40 * 32 * 3)).save(path)
    return folder


def make_data(folder: Path) -> Path:
    photos = draw(folder / "photos", 6)
    fine(run(split_data.main, "--source", photos, "--output", folder / "data", "--val-rate", 0.34))
    return folder / "data"


def essence(output: Path) -> dict[str, Any]:
    """What two equal runs have in common; to read it shows that the files are whole."""
    found: dict[str, Any] = {}
    for path in output.iterdir():
        if path.suffix in (".pth", ".pt"):
            found[path.name] = alexnet.load_tensors(path)
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".csv":
            found[path.name] = history_of(output)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return found


# ------------------------------------------------------------------------------- the parts


def kill_split(folder: Path, rng: random.Random) -> str:
    """At every file operation: no half split, the photos untouched, and the next start works."""
    photos = draw(folder / "photos", 4)
    before = contents(photos)
    argv = ("--source", photos, "--output", folder / "data", "--val-rate", 0.25)
    fine(run(split_data.main, *argv))
    whole = contents(folder / "data")
    for number in range(1, 1000):
        shutil.rmtree(folder / "data")
        status, _ = run(split_data.main, *argv, before=((die_at, number, str(folder / "data")),))
        if status == 0:
            break
        assert status == -9 and contents(photos) == before
        assert not (folder / "data").exists() or contents(folder / "data") == whole
        fine(run(split_data.main, *argv))
        assert contents(folder / "data") == whole
    return f"{number - 1} kills, one at every file operation"


def kill_train(folder: Path, rng: random.Random) -> str:
    """At file operations and at any moment: whole files, and resumed it ends as never stopped."""
    argv = ("--data", make_data(folder), "--epochs", 3, "--batch-size", 4, "--device", "cpu")
    start = time.perf_counter()
    fine(run(train.main, *argv, "--output", folder / "unbroken"))
    duration = time.perf_counter() - start
    expected = essence(folder / "unbroken")
    killed = resumed = 0
    for number in [*[0] * 8, *range(1, 300, 3)]:  # 0: at any moment
        output = folder / "run"
        how = {"before": ((die_at, number, str(output)),)} if number else {}
        seconds = 0 if number else rng.uniform(0.2, 1) * duration
        status, _ = run(train.main, *argv, "--output", output, seconds=seconds, **how)
        killed += status == -9
        essence(output) if output.exists() else None
        resumed += (output / "last.pt").exists()
        way = "--resume" if (output / "last.pt").exists() else "--overwrite"
        fine(run(train.main, *argv, "--output", output, way))
        assert same(essence(output), expected), output
        shutil.rmtree(output)
        if number and status == 0:
            break
    return f"{killed} kills, {resumed} resumed, all ended as if never stopped"


def full_disk(folder: Path, rng: random.Random) -> str:
    """One line, the files of before are whole, and with room the run goes on."""
    data = make_data(folder)
    argv = ("--data", data, "--batch-size", 4, "--output", folder / "run")
    fine(run(train.main, *argv, "--epochs", 1))
    before = contents(folder / "run")
    limits = [300, 5000, 10**6, *(rng.randrange(10**6, 6 * 10**8) for _ in range(12))]
    for limit in limits:
        result = run(train.main, *argv, "--epochs", 2, "--resume", before=((limit_files, limit),))
        assert not fine_or_refused(result), limit
        after = contents(folder / "run")
        assert after["last.pt"] == before["last.pt"] and after.keys() == before.keys()
        essence(folder / "run")
    fine(run(train.main, *argv, "--epochs", 2, "--resume"))
    split = ("--source", folder / "photos", "--output", folder / "other")
    assert not fine_or_refused(run(split_data.main, *split, before=((limit_files, 999),)))
    assert not [path for path in folder.iterdir() if path.name.startswith("other")]
    return f"{len(limits) + 1} times"


def mutate(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    mutable = bytearray(data)
    for _ in range(rng.randrange(1, 20)):
        mutable[rng.randrange(min(len(data), 600))] = rng.randrange(256)
    return bytes(mutable)


def images(folder: Path, rng: random.Random) -> str:
    """What split_data.py takes, train.py and predict.py take; nothing ends in a traceback."""
    photos, n = draw(folder / "photos", 6), 400
    kinds = "RGB JPEG, CMYK JPEG, L PNG, RGBA PNG, LA PNG, I;16 PNG, P GIF, 1 TIFF, I TIFF, F TIFF"
    for number in range(n):
        mode, kind = rng.choice(f"{kinds}, RGB BMP, RGB WEBP, L PPM".split(", ")).split()
        data, size = io.BytesIO(), (rng.randrange(1, 50), rng.randrange(1, 50))
        Image.new(mode, size).save(data, kind)
        content = mutate(data.getvalue(), rng)
        (photos / rng.choice("ab") / f"x{number}.{kind.lower()}").write_bytes(content)
    output = folder / "data"
    fine(run(split_data.main, "--source", photos, "--output", output))
    taken = len(json.loads((output / "split.json").read_text())["files"])
    argv = ("--data", output, "--output", folder / "run", "--epochs", 1, "--batch-size", 64)
    fine(run(train.main, *argv))
    weights = ("--weights", folder / "run" / "AlexNet.pth", "--json")
    fine(run(predict.main, output, *weights))
    assert not fine_or_refused(run(predict.main, photos, *weights))
    return f"{n} damaged pictures; of {n + 12} {taken} were read, by all three scripts alike"


def weights(folder: Path, rng: random.Random) -> str:
    """Damaged AlexNet.pth, class_idx.json and last.pt: an answer, or one line."""
    data = make_data(folder)
    argv = ("--data", data, "--output", folder / "run", "--batch-size", 4)
    fine(run(train.main, *argv, "--epochs", 1))
    photo, good, refused = next(data.rglob("*.png")), contents(folder / "run"), 0
    for name in ("AlexNet.pth", "class_idx.json", "last.pt") * 10:
        path = folder / "run" / name
        whole, head = good[name], 4000
        content = mutate(whole[:head], rng) + whole[head:]
        if rng.random() < 0.5:  # the directory of the archive stands at its end
            content = whole[:-head] + mutate(whole[-head:], rng)
        path.write_bytes(content)
        result = run(predict.main, photo, "--json", "--weights", folder / "run" / "AlexNet.pth")
        refused += not fine_or_refused(result)
        refused += not fine_or_refused(run(train.main, *argv, "--epochs", 1, "--resume"))
        for changed, content in good.items():
            (folder / "run" / changed).write_bytes(content)
    return f"30 damaged files, {refused} times refused in one line"


PARTS = {f.__name__: f for f in (kill_split, kill_train, full_disk, images, weights)}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failed = False
    for name in args.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="stress.") as folder:
            try:
                done = PARTS[name](Path(folder), random.Random(args.seed))
                print(f"{name}: {done}", flush=True)
            except AssertionError:
                failed = True
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
