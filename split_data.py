"""Split a folder of photos, one folder a class, into data/train, data/val and perhaps data/test.

    python split_data.py                                        # downloads the flower photos first
    python split_data.py --source my_photos --val-rate 0.2
    python split_data.py --source photos.zip --test-rate 0.1 --output other_data

Every class is split at the same rate. One seed gives one split on any machine. Photos are copied,
never moved; identical ones go to one side, unreadable ones are left out and named. Nothing is
replaced: an --output that holds something else is refused.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import sys
import tarfile
import zipfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.hub
from tqdm import tqdm

import alexnet
from alexnet import InputError, class_of, listed, path_of, quoted

# Of TensorFlow's examples: 3,670 photos, 5 classes, CC BY 2.0, 229 MB.
ARCHIVE = Path("flower_photos.tgz")
URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"

# Folders of a set that is split already: train, test1, valid_images.
SIDE = re.compile(r"(train|val|valid|test)(ing|idation)?[\W_]*(\d*|data|images|set)", re.IGNORECASE)
ZIP_UTF8 = 0x800  # the flag of a .zip for a name in UTF-8


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with alexnet.one_line_errors():
        check_places(args.source, args.output)
        if args.source == ARCHIVE and not ARCHIVE.exists():
            download()

        # The split is built beside the output, and becomes the output by one renaming. Resolved,
        # so that of a link the target is replaced and not the link.
        output = args.output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = alexnet.temporary_path(output)
        scratch.mkdir()
        try:
            split(args, scratch, output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        train = f"python train.py --data {quoted(args.output)}"
        print(f"the split is in {args.output}; now run `{train}`")
    return 0


def split(args: Namespace, scratch: Path, output: Path) -> None:
    """Find the photos, check them, draw their sides, and copy them there."""
    # folder: where the files lie; shown: its name for the user; source: where the classes are.
    folder = shown = args.source
    if not folder.is_dir():
        folder = unpack(args.source, scratch / "photos")
        # Where the user would unpack it.
        shown = Path(str(args.source.with_suffix("")).removesuffix(".tar"))
    files = alexnet.visible_files(folder)
    pictures = list(filter(alexnet.is_picture, files))
    source = find_classes(folder, pictures)
    shown /= source.relative_to(folder)
    if source != folder and shown.exists():  # of an archive this is no surprise
        print(f"the classes are the folders in {shown}")
    others = [path for path in files if source not in path.parents and not alexnet.is_picture(path)]
    if others:  # find_classes() names the pictures
        print(f"skipped, outside {shown}: {alexnet.kinds_of(others)}")

    photos = alexnet.list_photos(source, [path for path in files if source in path.parents])
    check_classes(photos, shown, hint_of(pictures))
    digests = check_photos(source, photos)

    rates = {"val": args.val_rate, "test": args.test_rate}
    side_of = assign_sides(digests, {x: rate for x, rate in rates.items() if rate}, args.seed)
    print_counts(side_of)

    record = {"seed": args.seed, "val_rate": args.val_rate, "test_rate": args.test_rate}
    record["files"] = {f"{side}/{name}": digests[name] for name, side in side_of.items()}
    if not already_made(args.output, record):
        copy_photos(source, side_of, scratch / "split")
        (scratch / "split" / "split.json").write_bytes(as_json(record))
        if output.exists():
            output.rmdir()  # it is empty, and Windows would not replace it
        alexnet.replace_file(scratch / "split", output)


def check_places(source: Path, output: Path) -> None:
    """Refuse what is no source, and an output that is neither empty nor a split."""
    if not source.exists() and source != ARCHIVE:
        raise InputError(f"--source {source} does not exist")
    is_tar = not source.is_dir() and source.suffix.lower() != ".zip"
    if is_tar and not hasattr(tarfile, "data_filter"):
        way = "take 3.10.12, 3.11.4 or later, or unpack it by hand, and give the folder as --source"
        raise InputError(f"this Python cannot unpack {source} safely: {way}")
    if output.resolve().is_relative_to(source.resolve()):
        raise InputError(f"--output {output} lies in --source {source}; give one outside")
    if os.path.ismount(output) or output.resolve() == Path.cwd():  # neither can be replaced
        found = f"--output {output} is a mount point, or the folder you are in"
        raise InputError(f"{found}; give a folder in it")
    taken = os.listdir(output) if output.is_dir() else os.path.lexists(output)
    if taken and not (output / "split.json").is_file():
        found = f"{output} exists, and is no split made by this script"
        raise InputError(f"{found}; give another --output")


def download() -> None:
    print(f"downloading {URL}")
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        torch.hub.download_url_to_file(URL, str(ARCHIVE), SHA256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, HTTPException, ValueError) as error:
        way = f"try again, or fetch {URL} elsewhere and put it here as {ARCHIVE}"
        raise InputError(f"the download failed or was cut ({error}); {way}") from error


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tgz, .tar or .zip into the new `folder`; returns that."""
    folder.mkdir()
    try:
        # A .tar that ends with a .zip passes for a .zip, too.
        is_zip = zipfile.is_zipfile(archive) and not tarfile.is_tarfile(archive)
        if is_zip or archive.suffix.lower() == ".zip":
            unpack_zip(archive, folder)
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
                # tarfile takes a damaged header for the end, which is a block of zeros.
                file.fileobj.seek(file.offset)
                if file.fileobj.read(512) != bytes(512):
                    raise ValueError("it is damaged, or cut")
        for path in folder.rglob("*"):
            path.name.encode()  # this fails on a name that tarfile could not decode
    except UnicodeError as error:  # a name that nobody typed would become a class
        way = "unpack it by hand, and give the folder as --source"
        raise InputError(f"names in {archive} are not Unicode; {way}") from error
    except Exception as error:  # the decompressors raise almost any type
        way = "give what it holds, unpacked, as --source"
        if archive == ARCHIVE:
            way = "remove it, and it is downloaded"
        found = f"{archive} is no folder, and cannot be unpacked ({error})"
        raise InputError(f"{found}; {way}") from error
    return folder


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack all that a .zip holds; names that lead out of the folder lose their ".."."""
    with zipfile.ZipFile(archive) as file:
        n_files = 0
        for member in file.infolist():
            # zipfile reads names without the UTF-8 flag as code page 437, but macOS writes UTF-8
            # without setting it. What is not UTF-8 either is refused in unpack(). Some programs of
            # Windows write backslashes.
            if not member.flag_bits & ZIP_UTF8:
                with contextlib.suppress(UnicodeEncodeError):  # the name is of a Unicode field
                    member.filename = member.filename.encode("cp437").decode()
            member.filename = member.filename.replace("\\", "/")
            file.extract(member, folder)
            n_files += not member.is_dir()
    lost = n_files - sum(path.is_file() for path in folder.rglob("*"))
    if lost:
        raise ValueError(f"{lost} of its files would overwrite others")


def find_classes(folder: Path, pictures: list[Path]) -> Path:
    """The folder of the class folders: the one given, or the only one deeper in it."""
    places = [path.relative_to(folder).parts[:-1] for path in pictures]
    while True:
        inner = {place[0] for place in places if place}
        # A single folder is no class if its pictures lie in folders of its own.
        if len(inner) != 1 or max(map(len, places)) < 2:
            return folder
        loose = places.count(())
        if loose:
            print(f"skipped, in no folder of a class: {loose} photos in {folder.resolve().name}")
        places = [place[1:] for place in places if place]
        folder /= inner.pop()


def check_classes(photos: list[str], folder: Path, hint: str) -> None:
    """Refuse folders that are no classes, and a single class."""
    folders_in: dict[str, set[str]] = {}  # the folders in each class, at any depth
    for name in photos:
        label, *inner = name.split("/")[:-1]
        folders_in.setdefault(label, set()).update(inner)
    way = (
        "at least 2 are needed: one folder per class, with .jpg, .png or other photos in it" + hint
    )

    sides = list(filter(SIDE.fullmatch, folders_in))
    train = next((side for side in sides if side.lower().startswith("train")), None)
    held_out = [side for side in sides if side != train]
    if train and held_out:
        if not folders_in[train]:
            found = f"{folder} holds {train} and {held_out[0]}, which are no classes"
            raise InputError(f"{found}; {way}")
        do = f"`--source {quoted(folder / train)}` splits that, predict.py tests on {held_out[0]}"
        if train == "train" and set(held_out).intersection(alexnet.VAL_FOLDERS):
            do = f"`python train.py --data {quoted(folder)}` takes it as it is"
        unpack_it = "" if folder.exists() else "unpack it, "
        raise InputError(f"{folder} is split already: {unpack_it}{do}")

    for label, inner in folders_in.items():
        if len(inner & folders_in.keys()) > 1:
            do = "remove it, or give it as --source"
            raise InputError(f"{folder / label} seems to be a copy of all classes: {do}")

    common = set.intersection(*folders_in.values()) if folders_in else set()
    if len(common) > 1:  # as under folders of days, cameras or persons
        found = f"all folders of {folder} hold the same folders, {listed(sorted(common))}"
        do = "if these are the classes, join all photos of each in one folder"
        raise InputError(f"{found}: {do}; if not, put a class's photos directly into its folder")

    if len(folders_in) < 2:
        raise InputError(f"{folder} has photos of {len(folders_in)} classes, and {way}")


def hint_of(pictures: list[Path]) -> str:
    """What the names of files tell, where folders tell no class: cat.0.jpg, dog.0.jpg."""
    words = Counter(re.match(r"[^\W\d_]*", path.name)[0] for path in pictures)
    common = sorted(word for word, n in words.items() if word and n > 1)
    if not 1 < len(common) <= 10:
        return ""
    return f"; names of files begin with {listed(common)}: are these the classes?"


def check_photos(source: Path, photos: list[str]) -> dict[str, str]:
    """{photo: SHA-256} of those that can be read; names what is there twice."""
    digests, first = {}, {}  # {photo: digest}, {digest: its first photo}
    conflicts, copies = [], []
    for path, _ in alexnet.read_squares([source / name for name in photos], "checking"):
        name = path.relative_to(source).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        digests[name] = digest
        original = first.setdefault(digest, name)
        if class_of(original) != class_of(name):
            conflicts.append(f"{original} = {name}")
        elif original != name:
            copies.append(f"{original} = {name}")
    if conflicts:
        print(f"conflict, one photo under two classes: {listed(conflicts)}")
    if copies:
        print(f"the same photo twice, kept on one side: {listed(copies)}")
    unreadable = {*map(class_of, photos)}.difference(map(class_of, digests))
    if unreadable:
        names = listed(sorted(unreadable))
        raise InputError(f"no photo can be read of {names}; remove these folders")
    return digests


def assign_sides(digests: dict[str, str], rates: dict[str, float], seed: int) -> dict[str, str]:
    """{photo: side}, with a share of every class on each side; copies of a photo stay together."""
    rng = random.Random(seed)
    side_of: dict[str, str] = {}  # by digest
    too_few = []
    for label, names in groupby(digests, class_of):  # names are sorted
        different = list(dict.fromkeys(digests[name] for name in names))
        shuffled = rng.sample(different, len(different))
        # A photo that is under two classes may have its side already.
        drawn = [digest for digest in shuffled if digest not in side_of]
        sides = []
        for side, rate in rates.items():
            # 0.29 * 100 is 28.999999999999996, which is meant to be 29.
            sides += [side] * max(1, int(len(different) * rate + 1e-9))
        if len(drawn) <= len(sides):
            too_few.append(f"{label} ({len(drawn)})")
        sides += ["train"] * len(drawn)  # more than are left; zip stops after the last photo
        side_of.update(zip(drawn, sides, strict=False))
    if too_few:
        found = f"too few different photos for every side: {listed(too_few)}"
        way = "add photos, remove these folders, or change --val-rate and --test-rate"
        raise InputError(f"{found}; {way}")
    return {name: side_of[digest] for name, digest in digests.items()}


def print_counts(side_of: dict[str, str]) -> None:
    """How many photos of each class lie on each side."""
    rows = [(label, [side_of[x] for x in names]) for label, names in groupby(side_of, class_of)]
    rows.append(("total", list(side_of.values())))
    for label, sides in rows:
        counts = [f"{sides.count(side):8,} {side}" for side in ("train", "val", "test")]
        print(*counts, f" {label}")


def already_made(output: Path, record: dict[str, Any]) -> bool:
    """Whether the output is this very split; raises InputError if it is another."""
    path = output / "split.json"
    if not path.exists():
        return False
    whole = all((output / name).is_file() for name in record["files"])
    if path.read_bytes() != as_json(record) or not whole:
        why = "of other photos, by other options, or not whole; give another --output"
        raise InputError(f"{output} holds another split, {why}, or remove it")
    return True


def as_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def copy_photos(source: Path, side_of: dict[str, str], folder: Path) -> None:
    """Copy the photos to folder/SIDE/CLASS/.../NAME."""
    for name, side in tqdm(side_of.items(), desc="copying", unit="photo", disable=None):
        target = folder / side / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--source",
        type=path_of,
        default=ARCHIVE,
        help="folder of class folders, or .tgz, .tar or .zip of one (default: the flower photos)",
    )
    add("--output", type=path_of, default=Path("data"), help="the folder to make (default: data)")
    add(
        "--val-rate",
        type=float,
        default=0.1,
        help="share of each class for validation (default: 0.1)",
    )
    add("--test-rate", type=float, default=0.0, help="share of each class for a test (default: 0)")
    add("--seed", type=int, default=0, help="another seed draws another split (default: 0)")
    args = parser.parse_args(argv)
    if not 0 < args.val_rate <= args.val_rate + args.test_rate < 1:
        parser.error("--val-rate must be above 0, --test-rate 0 or more, and both together below 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
