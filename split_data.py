"""Split a folder of photos, one folder a class, into data/train, data/val and perhaps data/test.

    python split_data.py                                        # downloads the flower photos first
    python split_data.py --source my_photos --val-rate 0.2
    python split_data.py --source photos.tgz --test-rate 0.1 --output other_data

Every class is split at the same rate. One seed gives one split on any machine. Photos are copied,
never moved; those that do not decode are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tarfile
import urllib.request
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# The flower photos of TensorFlow's examples: 3,670 photos, 5 classes, CC BY 2.0.
DEFAULT_SOURCE = "flower_photos"
ARCHIVE_URL = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
ARCHIVE_SIZE = 228_813_984  # bytes
ARCHIVE_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # by content; EPS runs a program
TIMEOUT = 30  # seconds without a byte
SIDES = ("train", "val", "test")
RECORD = "split.json"
# What train.py keeps beside the folders that it reads, to be made again when they change.
PACK = re.compile(r"(train|val|test)\.packed\.(npy|json)((\.\d+)?\.tmp)?")


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a letter shows another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    try:
        run(args)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise SystemExit(f"error: {error.strerror or error}{where}") from error
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    check_places(args.source, args.output)
    recover(args.output)
    is_missing = args.source == Path(DEFAULT_SOURCE) and not args.source.exists()
    beside = args.source if is_missing else args.output
    with scratch_folder(beside) as scratch:
        if is_missing:
            unpack(download(Path(f"{DEFAULT_SOURCE}.tgz")), scratch)
            os.rename(class_root(scratch), args.source)
        source = args.source
        if not source.is_dir():
            unpack(source, scratch)
            source = class_root(scratch)
        classes = list_photos(source)
        digests = check_photos(source, classes)
        print_copies(digests)
        sides = assign_sides(classes, digests, args.val_rate, args.test_rate, args.seed)
        write_split(args, source, sides, digests)
    print_counts(count(sides), args.output)


# ------------------------------------------------------------------------------- the source


def check_places(source: Path, output: Path) -> None:
    """Refuse a source that is none, and an output that is not this script's to replace."""
    if not source.exists() and source != Path(DEFAULT_SOURCE):
        raise SystemExit(f"error: --source {source} does not exist")
    if (source / RECORD).exists():
        raise SystemExit(f"error: --source {source} is a split; give the photos it was made from")
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise SystemExit(f"error: --output {output} and --source {source} lie in one another")
    for folder in (output, new_folder(output), old_folder(output)):
        if os.path.lexists(folder) and (name := foreign_file(folder)):
            raise SystemExit(
                f"error: split_data.py did not put {name} into {folder}; move it away, or give "
                "another --output"
            )


def download(archive: Path) -> Path:
    """Fetch the flower photos to `archive`, by way of a .part file that is checked first."""
    if archive.exists():
        if sha256(archive) == ARCHIVE_SHA256:
            return archive
        raise SystemExit(f"error: {archive} is not the archive that is expected; move it away")
    part = archive.with_name(archive.name + ".part")
    print(f"downloading {ARCHIVE_URL}")
    try:
        fetch(part)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: sent on to an odd address
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(
            f"error: the download failed ({reason}); run this again to go on with it, or fetch "
            f"{ARCHIVE_URL} elsewhere and run `python split_data.py --source {archive.name}`"
        ) from error
    if part.stat().st_size != ARCHIVE_SIZE or sha256(part) != ARCHIVE_SHA256:
        size = part.stat().st_size
        part.unlink()
        raise SystemExit(
            f"error: what {ARCHIVE_URL} sent ({size:,} bytes) is not the expected archive "
            f"({ARCHIVE_SIZE:,} bytes, SHA-256 {ARCHIVE_SHA256[:16]}...); try again later"
        )
    os.replace(part, archive)
    return archive


def fetch(part: Path) -> None:
    """Download the archive to `part`, behind what is there of it if the server can do that."""
    have = part.stat().st_size if part.exists() else 0
    if have >= ARCHIVE_SIZE:
        return
    request = urllib.request.Request(ARCHIVE_URL)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        have = have if response.status == 206 else 0  # 206: the rest, 200: all of it
        length = response.headers.get("Content-Length")
        if length and have + int(length) != ARCHIVE_SIZE:
            raise OSError(
                f"{have + int(length):,} bytes are not the expected archive of {ARCHIVE_SIZE:,}"
            )
        bar = tqdm(total=ARCHIVE_SIZE, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            while (chunk := response.read(1 << 16)) and file.tell() <= ARCHIVE_SIZE:
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < ARCHIVE_SIZE:
        raise OSError(f"it broke off after {part.stat().st_size:,} bytes")


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder to unpack into, on the disk of `beside`; what a killed run left of it goes first."""
    scratch = beside.absolute().with_name(beside.name + ".split_data.unpacked")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(scratch):
        empty = scratch.is_dir() and not any(scratch.iterdir())
        if scratch.is_symlink() or not (empty or (scratch / RECORD).exists()):
            raise SystemExit(f"error: split_data.py did not make {scratch}; move it away")
        remove(scratch)
    scratch.mkdir()
    try:
        (scratch / RECORD).touch()  # known by it as ours
        (scratch / "photos").mkdir()
        yield scratch / "photos"
    finally:
        remove(scratch)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tgz or .tar; the `data` filter keeps everything inside `folder`."""
    if not hasattr(tarfile, "data_filter"):
        raise SystemExit(
            "error: this Python cannot unpack archives safely (3.10.12, 3.11.4 or later can); "
            "unpack it yourself and give the folder as --source"
        )
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except Exception as error:  # tarfile and the decompressors raise almost any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(
            f"error: {archive} is neither a folder nor a whole .tgz or .tar of one ({reason})"
        ) from error


def class_root(folder: Path) -> Path:
    """The folder of class folders in an unpacked archive, which often has one folder on top."""
    folders = [path for path in folder.iterdir() if path.is_dir()]
    if len(folders) == 1 and any(path.is_dir() for path in folders[0].iterdir()):
        return folders[0]
    return folder


# ------------------------------------------------------------------------------- the photos


def list_photos(source: Path) -> dict[str, list[str]]:
    """{class: its photos, as sorted paths relative to the source}; what is skipped is named."""
    classes, skipped = {}, []
    for folder in sorted(source.iterdir(), key=lambda path: path.name):
        if not folder.is_dir() or folder.name.startswith("."):
            skipped.append(folder.name)
            continue
        photos = []
        # as_posix: sorting Path objects ignores case on Windows
        for path in sorted(everything_in(folder), key=lambda path: path.as_posix()):
            name = path.relative_to(source).as_posix()
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden and name.lower().endswith(IMAGE_SUFFIXES):
                photos.append(name)
            elif path.is_symlink() or not path.is_dir():
                skipped.append(name)
        if photos:
            classes[folder.name] = photos
        else:
            skipped.append(f"{folder.name}/ (no photos)")
    if skipped:
        print_names("skipped, no photos of a class:", skipped)
    if len(classes) < 2:
        raise SystemExit(
            f"error: {source} holds photos of {len(classes)} classes, and at least 2 are needed: "
            f"one folder a class, with photos ({', '.join(IMAGE_SUFFIXES[:3])}, ...) in each"
        )
    return classes


def everything_in(folder: Path) -> Iterator[Path]:
    """All below a folder; unlike rglob() it raises what may not be read."""
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from everything_in(path)


def print_names(title: str, names: list[str], most: int = 10) -> None:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    print(f"{title} {', '.join(names[:most])}{more}")


def check_photos(source: Path, classes: dict[str, list[str]]) -> dict[str, str]:
    """Decode every photo once; {photo: SHA-256}, from which the broken ones are missing.

    Broken photos are named, and taken out of `classes`.
    """

    def check(name: str) -> tuple[str, str | None, str]:
        try:
            with Image.open(source / name, formats=FORMATS) as image:
                image.load()
                if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
                    raise ValueError("its pixels are no grey levels of 16 bits")
        except Exception as error:  # on a broken file Pillow raises almost any type
            return name, None, str(error).splitlines()[0] if str(error) else type(error).__name__
        return name, sha256(source / name), ""

    names = [name for photos in classes.values() for name in photos]
    bar = {"desc": "checking", "unit": "photo", "disable": None}  # None: no bar if nobody watches
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked = thread_map(check, names, max_workers=os.cpu_count(), **bar)
    digests = {name: digest for name, digest, _ in checked if digest}
    broken = [f"{name} ({reason})" for name, digest, reason in checked if not digest]
    if broken:
        print_names("left out, they do not decode:", broken, most=len(broken))
    for label, photos in classes.items():
        classes[label] = [name for name in photos if name in digests]
    return digests


# ------------------------------------------------------------------------------- the split


def assign_sides(
    classes: dict[str, list[str]],
    digests: dict[str, str],
    val_rate: float,
    test_rate: float,
    seed: int,
) -> dict[str, str]:
    """{photo: side}: int(n * rate) photos of every class to val and to test, the rest to train."""
    rng = random.Random(seed)
    rates = {"val": val_rate, "test": test_rate}
    sides: dict[str, str] = {}
    # Copies of one photo on two sides would test the network on what it was shown, so what is
    # drawn is a digest with all its copies; a copy in another class follows the first one.
    side_of: dict[str, str] = {}
    for label, photos in classes.items():
        copies: dict[str, list[str]] = {}
        for name in photos:
            copies.setdefault(digests[name], []).append(name)
        wanted = {side: int(len(photos) * rate + 1e-9) for side, rate in rates.items()}
        drawn = rng.sample(list(copies), len(copies))
        for digest in sorted(drawn, key=lambda digest: digest not in side_of):  # placed ones first
            n = len(copies[digest])
            free = [side for side in ("val", "test") if wanted[side] >= n]
            side = side_of.setdefault(digest, free[0] if free else "train")
            wanted[side] = wanted.get(side, 0) - n
            sides.update(dict.fromkeys(copies[digest], side))
        for side, rate in (rates | {"train": 1 - val_rate - test_rate}).items():
            if rate and side not in {sides[name] for name in photos}:
                raise SystemExit(
                    f"error: class {label} has {len(copies)} different photos, too few to put one "
                    f"into {side}: add photos, or change --val-rate and --test-rate"
                )
    return sides


def print_copies(digests: dict[str, str]) -> None:
    """Name the photos that are there more than once: the data may have a wrong label there."""
    first: dict[str, str] = {}
    for name in sorted(digests):
        original = first.setdefault(digests[name], name)
        if original.split("/")[0] != name.split("/")[0]:
            print(f"conflict, one photo under two classes: {original} = {name}")
        elif original != name:
            print(f"the same photo twice, kept on one side: {original} = {name}")


def count(sides: dict[str, str]) -> dict[str, dict[str, int]]:
    """{side: {class: photos}}, without sides that are not used."""
    counts: dict[str, dict[str, int]] = {}
    for name, side in sorted(sides.items()):
        of_side = counts.setdefault(side, {})
        label = name.split("/")[0]
        of_side[label] = of_side.get(label, 0) + 1
    return {side: counts[side] for side in SIDES if side in counts}


def print_counts(counts: dict[str, dict[str, int]], output: Path) -> None:
    print("".join(f"{side:>8}" for side in counts))
    for label in sorted(counts["train"]):  # last, as letters may be one or two columns wide
        print("".join(f"{c.get(label, 0):>8,}" for c in counts.values()) + f"  {label}")
    print("".join(f"{sum(c.values()):>8,}" for c in counts.values()) + "  total")
    print(f"written to {output}; now run `python train.py --data {output}`")


# ------------------------------------------------------------------------------- the output


def new_folder(output: Path) -> Path:
    return output.with_name(output.name + ".split_data.new")


def old_folder(output: Path) -> Path:
    return output.with_name(output.name + ".split_data.old")


def recover(output: Path) -> None:
    """Put right what a run that was killed has left behind."""
    if old_folder(output).exists() and not output.exists():
        os.rename(old_folder(output), output)
    for leftover in (new_folder(output), old_folder(output)):
        if leftover.exists():
            remove(leftover)


def remove(folder: Path) -> None:
    """Remove a folder of ours, its record last, so that what a kill leaves is known as ours."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
    shutil.rmtree(folder)


def foreign_file(folder: Path) -> str | None:
    """The name of something in `folder` that neither this script nor train.py put there."""
    record = folder / RECORD
    known = {folder / name for name in (RECORD, RECORD + ".tmp")}
    if folder.is_symlink() or not folder.is_dir():
        return folder.name
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"] if record.exists() else []
        for name in files:
            known |= {folder / name, *(folder / name).parents}
    except (ValueError, KeyError, TypeError, RecursionError):
        return RECORD
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path not in known]
    return min((name for name in found if not PACK.fullmatch(name)), default=None)


def write_split(
    args: argparse.Namespace, source: Path, sides: dict[str, str], digests: dict[str, str]
) -> None:
    """Copy the photos to a folder beside the output, then swap it in with two renames."""
    new, old = new_folder(args.output), old_folder(args.output)
    record = {
        "source": str(args.source),
        "seed": args.seed,
        "val_rate": args.val_rate,
        "test_rate": args.test_rate,
        "counts": count(sides),
        "files": {f"{side}/{name}": digests[name] for name, side in sorted(sides.items())},
    }
    try:
        new.mkdir()
        # The record comes first, so that a folder which was never finished is known as ours.
        partial = new / (RECORD + ".tmp")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, new / RECORD)
        for name, side in tqdm(sorted(sides.items()), desc="copying", unit="photo", disable=None):
            target = new / side / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
        if args.output.exists():
            os.rename(args.output, old)
        os.rename(new, args.output)
    except BaseException:
        recover(args.output)
        raise
    if old.exists():
        remove(old)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = "a folder of class folders, or a .tgz or .tar of one (default: %(default)s, "
    source += "downloaded if it is not there: 229 MB)"
    add("--source", type=Path, default=Path(DEFAULT_SOURCE), help=source)
    output = "the folder to make (default: %(default)s); an earlier split in it is replaced"
    add("--output", type=Path, default=Path("data"), help=output)
    val_rate = "share of every class that training is watched on (default: %(default)s)"
    add("--val-rate", type=float, default=0.1, help=val_rate)
    test_rate = "share of every class set aside for a test (default: %(default)s)"
    add("--test-rate", type=float, default=0.0, help=test_rate)
    add("--seed", type=int, default=0, help="another seed draws another split (default: 0)")
    args = parser.parse_args(argv)
    if args.output.name in ("", ".."):
        parser.error(f"--output {args.output} has no name of its own; give a folder to make")
    if not 0 < args.val_rate < 1:
        parser.error(f"--val-rate must be above 0 and below 1, not {args.val_rate}")
    if not 0 <= args.test_rate < 1:
        parser.error(f"--test-rate must be at least 0 and below 1, not {args.test_rate}")
    if args.val_rate + args.test_rate >= 1:
        parser.error("--val-rate and --test-rate together must leave something for train")
    return args


if __name__ == "__main__":
    sys.exit(main())
