"""Split a folder of photos, one folder a class, into data/train, data/val and perhaps data/test.

    python split_data.py                                        # downloads the flower photos first
    python split_data.py --source my_photos --val-rate 0.2
    python split_data.py --source photos.tgz --test-rate 0.1 --output other_data

Every class is split at the same rate. One seed gives one split on any machine. Photos are copied,
never moved; those that do not decode are left out and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from PIL import Image
from tqdm import tqdm

# The flower photos of TensorFlow's examples: 3,670 photos, 5 classes, CC BY 2.0.
DEFAULT_SOURCE = "flower_photos"
ARCHIVE_URL = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
ARCHIVE_SIZE = 228_813_984  # bytes
ARCHIVE_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SIDES = ("train", "val", "test")
RECORD = "split.json"
# What train.py keeps beside the folders that it reads, to be made again when they change.
ENDINGS = (".npy", ".json", ".npy.tmp", ".json.tmp")
PACKS = tuple(f"{side}.packed{ending}" for side in SIDES for ending in ENDINGS)


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
        print("\nstopped; nothing was changed", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    recover(args.output)
    check_output(args.output)
    beside = args.output.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpacked.", dir=beside) as scratch:
        source = find_source(args.source, Path(scratch))
        classes = list_photos(source)
        digests = check_photos(source, classes)
        print_copies(digests)
        sides = assign_sides(classes, digests, args.val_rate, args.test_rate, args.seed)
        write_split(args, source, sides, digests)
    print_counts(count(sides), args.output)


# ------------------------------------------------------------------------------- the source


def find_source(source: Path, scratch: Path) -> Path:
    """The folder that holds the class folders, downloaded or unpacked first where need be."""
    if source == Path(DEFAULT_SOURCE) and not source.exists():
        archive = download(Path(f"{DEFAULT_SOURCE}.tgz"))
        unpack(archive, scratch)
        os.rename(class_root(scratch), source)
        return source
    if not source.exists():
        raise SystemExit(f"error: --source {source} does not exist")
    if source.is_dir():
        return source
    unpack(source, scratch)
    return class_root(scratch)


def download(archive: Path) -> Path:
    """Fetch the flower photos to `archive`, by way of a .part file that is checked first."""
    if archive.exists() and sha256(archive) == ARCHIVE_SHA256:
        return archive
    part = archive.with_name(archive.name + ".part")
    print(f"downloading {ARCHIVE_URL}")
    try:
        with urllib.request.urlopen(ARCHIVE_URL, timeout=30) as response, open(part, "wb") as file:
            with tqdm(total=ARCHIVE_SIZE, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, HTTPException) as error:
        part.unlink(missing_ok=True)
        raise SystemExit(
            f"error: the download failed ({error}); fetch {ARCHIVE_URL} elsewhere and run "
            f"`python split_data.py --source {archive.name}`"
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
    except tarfile.ReadError as error:
        raise SystemExit(
            f"error: --source {archive} is neither a folder nor a whole .tgz or .tar archive"
        ) from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise SystemExit(f"error: --source {archive} cannot be unpacked: {error}") from error


def class_root(folder: Path) -> Path:
    """The folder of class folders in an unpacked archive, which often has one folder on top."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir() and any(p.is_dir() for p in inside[0].iterdir()):
        return inside[0]
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
        for path in sorted(folder.rglob("*"), key=lambda path: path.as_posix()):
            name = path.relative_to(source).as_posix()
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden and name.lower().endswith(IMAGE_SUFFIXES):
                photos.append(name)
            elif not path.is_dir():
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


def print_names(title: str, names: list[str], most: int = 10) -> None:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    print(f"{title} {', '.join(names[:most])}{more}")


def check_photos(source: Path, classes: dict[str, list[str]]) -> dict[str, str]:
    """Decode every photo once; {photo: SHA-256}, from which the broken ones are missing.

    Broken photos are named, and taken out of `classes`.
    """

    def check(name: str) -> tuple[str, str | None, str]:
        try:
            with warnings.catch_warnings(), Image.open(source / name) as image:
                warnings.simplefilter("ignore")
                image.load()
        except Exception as error:  # on a broken file Pillow raises almost any type
            return name, None, str(error).splitlines()[0] if str(error) else type(error).__name__
        return name, sha256(source / name), ""

    names = [name for photos in classes.values() for name in photos]
    digests, broken = {}, []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, digest, reason in tqdm(
            threads.map(check, names),
            total=len(names),
            desc="checking",
            unit="photo",
            disable=None,  # no bar where nobody watches
        ):
            if digest:
                digests[name] = digest
            else:
                broken.append(f"{name} ({reason})")
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
    sides: dict[str, str] = {}
    # Copies of one photo on two sides would test the network on what it was shown, so what is
    # drawn is a digest with all its copies; a copy in another class follows the first one.
    side_of: dict[str, str] = {}
    for label, photos in classes.items():
        copies: dict[str, list[str]] = {}
        for name in photos:
            copies.setdefault(digests[name], []).append(name)
        wanted = {"val": int(len(photos) * val_rate), "test": int(len(photos) * test_rate)}
        for side, rate in (("val", val_rate), ("test", test_rate)):
            if rate and not wanted[side]:
                raise SystemExit(
                    f"error: class {label} has {len(photos)} photos, too few for a --{side}-rate "
                    f"of {rate:g}: add photos, or raise the rate"
                )
        drawn = rng.sample(list(copies), len(copies))
        for digest in sorted(drawn, key=lambda digest: digest not in side_of):  # placed ones first
            n = len(copies[digest])
            free = [side for side in ("val", "test") if wanted[side] >= n]
            side = side_of.setdefault(digest, free[0] if free else "train")
            wanted[side] = wanted.get(side, 0) - n
            sides.update(dict.fromkeys(copies[digest], side))
    for label in classes:
        if not any(s == "train" and name.split("/")[0] == label for name, s in sides.items()):
            raise SystemExit(
                f"error: class {label} has {len(classes[label])} photos, and none is left for train"
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
    labels = sorted(counts["train"])
    width = max(len(label) for label in [*labels, "total"])
    print(f"{'':<{width}}" + "".join(f"{side:>8}" for side in counts))
    for label in labels:
        print(f"{label:<{width}}" + "".join(f"{c.get(label, 0):>8,}" for c in counts.values()))
    print(f"{'total':<{width}}" + "".join(f"{sum(c.values()):>8,}" for c in counts.values()))
    print(f"written to {output}; now run `python train.py --data {output}`")


# ------------------------------------------------------------------------------- the output


def new_folder(output: Path) -> Path:
    return output.with_name(output.name + ".new")


def old_folder(output: Path) -> Path:
    return output.with_name(output.name + ".old")


def recover(output: Path) -> None:
    """Put right what a run that was killed has left behind."""
    if old_folder(output).exists() and not output.exists() and is_own(old_folder(output)):
        os.rename(old_folder(output), output)
    for leftover in (new_folder(output), old_folder(output)):
        if leftover.exists() and is_own(leftover):
            shutil.rmtree(leftover)


def is_own(folder: Path) -> bool:
    """Whether this script made `folder` and everything in it (train.py's packs may be there)."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return not any(folder.iterdir())  # empty: begun a moment before the record was written
    except (OSError, ValueError, KeyError, TypeError):
        return False
    known = {folder / RECORD} | {folder / pack for pack in PACKS}
    for name in files:
        known.add(folder / name)
        known.update((folder / name).parents)
    return all(path in known for path in folder.rglob("*"))


def check_output(output: Path) -> None:
    for folder in (output, new_folder(output), old_folder(output)):
        if folder.exists() and not is_own(folder):
            raise SystemExit(
                f"error: {folder} holds something that split_data.py did not put there; "
                "move it away, or give another --output"
            )


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
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (new / RECORD).write_text(text + "\n", encoding="utf-8")
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
        shutil.rmtree(old)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(DEFAULT_SOURCE),
        help="a folder of class folders, or a .tgz or .tar of one (default: %(default)s, "
        "downloaded if it is not there: 229 MB)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data"),
        help="the folder to make (default: %(default)s); an earlier split in it is replaced",
    )
    parser.add_argument(
        "--val-rate",
        type=float,
        default=0.1,
        help="share of every class that training is watched on (default: %(default)s)",
    )
    parser.add_argument(
        "--test-rate",
        type=float,
        default=0.0,
        help="share of every class set aside for a test (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws another split (default: 0)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.val_rate < 1:
        parser.error(f"--val-rate must be above 0 and below 1, not {args.val_rate}")
    if not 0 <= args.test_rate < 1:
        parser.error(f"--test-rate must be at least 0 and below 1, not {args.test_rate}")
    if args.val_rate + args.test_rate >= 1:
        parser.error("--val-rate and --test-rate together must leave something for train")
    return args


if __name__ == "__main__":
    sys.exit(main())
