"""Split a folder of photos, one folder a class, into data/train, data/val and perhaps data/test.

    python split_data.py                                        # downloads the flower photos first
    python split_data.py --source my_photos --val-rate 0.2
    python split_data.py --source photos.zip --test-rate 0.1 --output other_data

Every class is split at the same rate. One seed gives one split on any machine. Photos are copied,
never moved; identical ones go to one side, unreadable ones are left out and named. Nothing is
replaced: an --output that holds something else is refused.
"""

import hashlib
import json
import os
import random
import shutil
import socket
import sys
import zipfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from http.client import HTTPException
from itertools import groupby
from pathlib import Path

import torch.hub
from tqdm import tqdm

import alexnet
from alexnet import InputError, class_of

# Of TensorFlow's examples: 3,670 photos, 5 classes, CC BY 2.0, 229 MB.
ARCHIVE = Path("flower_photos.tgz")
URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with alexnet.one_line_errors():
        check_places(args.source, args.output)
        if args.source == ARCHIVE and not ARCHIVE.exists():
            download()
        output = args.output.resolve()  # a link to a folder stays one
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = alexnet.temporary_path(output)  # beside it: one rename makes it the output
        scratch.mkdir()
        try:
            split(args, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        print(f"the split is in {args.output}; now run `python train.py --data {args.output}`")
    return 0


def check_places(source: Path, output: Path) -> None:
    """Refuse what is no source, and an output that is neither empty nor a split."""
    if not source.exists() and source != ARCHIVE:
        raise InputError(f"--source {source} does not exist")
    if output.resolve().is_relative_to(source.resolve()):
        raise InputError(f"--output {output} lies in --source {source}; give one outside")
    if os.path.ismount(output):  # nothing can be renamed to it
        raise InputError(f"--output {output} is a mount point; give a folder in it")
    taken = os.listdir(output) if output.is_dir() else os.path.lexists(output)
    if taken and not (output / "split.json").is_file():
        raise InputError(f"{output} is there already, and no split; give another --output")


def download() -> None:
    print(f"downloading {URL}")
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        torch.hub.download_url_to_file(URL, str(ARCHIVE), SHA256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, HTTPException, ValueError) as error:
        way = f"try again, or fetch {URL} elsewhere and put it here as {ARCHIVE}"
        raise InputError(f"the download failed or was cut ({error}); {way}") from error


def split(args: Namespace, scratch: Path) -> None:
    top = place = args.source
    if not top.is_dir():
        top, place = unpack(top, scratch / "photos"), top.with_suffix("")
    files = alexnet.visible_files(top)
    source = find_classes(top, filter(alexnet.is_picture, files))
    place /= source.relative_to(top)  # where the user has it, or would unpack it
    if source != top and place.exists():  # of an archive that is no surprise
        print(f"the classes are the folders in {place}")
    photos = alexnet.list_photos(source, [path for path in files if source in path.parents])
    check_classes(photos, place)
    digests = check_photos(source, photos)
    rates = {"val": args.val_rate} | ({"test": args.test_rate} if args.test_rate else {})
    sides = assign_sides(digests, rates, args.seed)
    print_counts(sides)
    record = {name: getattr(args, name) for name in ("seed", "val_rate", "test_rate")}
    record["files"] = {f"{side}/{name}": digests[name] for name, side in sides.items()}
    text = json.dumps(record, indent=1).encode()
    if (args.output / "split.json").exists():
        same = (args.output / "split.json").read_bytes() == text
        if not same or not all((args.output / name).is_file() for name in record["files"]):
            why = "of other photos, by other options, or not whole; give another --output"
            raise InputError(f"{args.output} holds another split, {why}, or remove it")
        return  # all is there
    for name, side in tqdm(sides.items(), desc="copying", unit="photo", disable=None):
        target = scratch / "split" / side / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    (scratch / "split" / "split.json").write_bytes(text)
    output = args.output.resolve()
    if output.exists():
        output.rmdir()  # it is empty; Windows would not replace it
    os.rename(scratch / "split", output)


def find_classes(folder: Path, pictures: Iterable[Path]) -> Path:
    """The folder of the class folders: the one given, or the only one deeper in it."""
    places = [path.relative_to(folder).parts[:-1] for path in pictures]
    while True:
        inner = {place[0] for place in places if place}
        # A single folder is no class if its pictures lie in folders of its own.
        if len(inner) != 1 or max(map(len, places)) < 2:
            return folder
        if loose := places.count(()):
            print(f"skipped, in no folder of a class: {loose} photos in {folder.name}")
        places = [place[1:] for place in places if place]
        folder /= inner.pop()


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tgz, .tar or .zip into the new `folder`; return that."""
    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            unpack_zip(archive, folder)
        else:
            shutil.unpack_archive(archive, folder, filter="data")
    except Exception as error:  # the decompressors raise almost any type
        way = f"cannot be unpacked ({error}); give what it holds, unpacked, as --source"
        raise InputError(f"{archive} is no folder, and {way}") from error
    return folder


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack all that a .zip holds; names that lead out of the folder lose their ".."."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
        n_files = sum(not member.is_dir() for member in file.infolist())
    lost = n_files - sum(path.is_file() for path in folder.rglob("*"))
    if lost:
        raise ValueError(f"{lost} of its files have the names of others")


def check_classes(photos: list[str], root: Path) -> None:
    """Refuse what is split already, what holds a copy of itself, and a single class."""
    inner: dict[str, set[str]] = {}  # {class: folders in it}
    for label, *rest in (name.split("/") for name in photos):
        inner.setdefault(label, set()).update(rest[:-1][:1])
    kinds = {label.lower(): label for label in inner}
    train = kinds.get("train") or kinds.get("training")
    held_out = [kinds[x] for x in (*alexnet.VAL_FOLDERS, "test", "testing") if x in kinds]
    if train and held_out:
        way = f"`--source {root / train}` splits that, predict.py tests on {held_out[0]}"
        if train == "train" and held_out[0] in alexnet.VAL_FOLDERS:
            way = f"`python train.py --data {root}` takes it as it is"
        unpack = "" if root.exists() else "unpack it, "
        raise InputError(f"{root} is split already: {unpack}{way}")
    for label, folders in inner.items():
        if len(folders & inner.keys()) > 1:
            way = "remove it, or give it as --source"
            raise InputError(f"{root / label} seems to be a copy of all classes: {way}")
    if len(inner) < 2:
        way = "at least 2 are needed: a folder a class, with .jpg, .png or other photos"
        raise InputError(f"{root} has photos of {len(inner)} classes, and {way}")


def check_photos(source: Path, photos: list[str]) -> dict[str, str]:
    """{photo: SHA-256} of those that can be read; names what is there twice."""
    digests, first = {}, {}  # {photo: digest}, {digest: its first photo}
    for path, _ in alexnet.read_squares([source / name for name in photos], "checking"):
        name = path.relative_to(source).as_posix()
        digests[name] = digest = hashlib.sha256(path.read_bytes()).hexdigest()
        original = first.setdefault(digest, name)
        if class_of(original) != class_of(name):
            print(f"conflict, one photo under two classes: {original} = {name}")
        elif original != name:
            print(f"the same photo twice, kept on one side: {original} = {name}")
    if lost := {*map(class_of, photos)}.difference(map(class_of, digests)):
        raise InputError(f"no photo can be read of {', '.join(sorted(lost))}; remove these folders")
    return digests


def assign_sides(digests: dict[str, str], rates: dict[str, float], seed: int) -> dict[str, str]:
    """{photo: side}, with a share of every class on each side; copies of a photo stay together."""
    rng, side_of, too_few = random.Random(seed), {}, []
    for label, names in groupby(digests, class_of):  # names are sorted
        different = list(dict.fromkeys(digests[name] for name in names))
        # A photo of two classes may have its side already.
        drawn = [d for d in rng.sample(different, len(different)) if d not in side_of]
        sides = []
        for side, rate in rates.items():
            sides += [side] * max(1, int(len(different) * rate + 1e-9))  # 0.29 * 100 is 28.99...
        if len(drawn) <= len(sides):
            too_few.append(f"{label} ({len(drawn)})")
        sides += ["train"] * len(drawn)
        side_of |= zip(drawn, sides, strict=False)
    if too_few:
        way = "add photos, remove these folders, or change --val-rate and --test-rate"
        raise InputError(f"too few different photos for every side: {', '.join(too_few)}; {way}")
    return {name: side_of[digest] for name, digest in digests.items()}


def print_counts(sides: dict[str, str]) -> None:
    rows = [(label, [sides[name] for name in names]) for label, names in groupby(sides, class_of)]
    for label, drawn in [*rows, ("total", list(sides.values()))]:
        counts = [f"{drawn.count(side):8,} {side}" for side in ("train", "val", "test")]
        print(*counts, f" {label}")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = "folder of class folders, or .tgz, .tar or .zip of one (default: the flower photos)"
    add("--source", type=Path, default=ARCHIVE, help=source)
    add("--output", type=Path, default=Path("data"), help="the folder to make (default: data)")
    add("--val-rate", type=float, default=0.1, help="share to watch training on (default: 0.1)")
    add("--test-rate", type=float, default=0.0, help="share set aside for a test (default: 0)")
    add("--seed", type=int, default=0, help="another seed draws another split (default: 0)")
    args = parser.parse_args(argv)
    if not 0 < args.val_rate <= args.val_rate + args.test_rate < 1:
        parser.error("--val-rate must be above 0, and together with --test-rate below 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
