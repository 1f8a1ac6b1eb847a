"""Train AlexNet from scratch on data/train, watch it on data/val, keep the best weights.

    python train.py                                   # 90 epochs at most; Ctrl-C stops it
    python train.py --resume                          # goes on after the epoch saved last
    python train.py --data my_data --output my_run --epochs 30 --batch-size 128
    torchrun --nproc-per-node 4 train.py --batch-size 128     # on four cards

Writes into --output: AlexNet.pth (the best epoch's weights), class_idx.json, last.pt (for
--resume), history.csv, curves.png, at the end run.json and kernels.png; beside the data the decoded
photos, train-*.npy and val-*.npy.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from argparse import (
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.utils import save_image
from tqdm import tqdm

import alexnet
from alexnet import CROP_SIZE, IMAGE_SIZE, AlexNet, InputError, listed, path_of, quoted, replacing

if os.name == "nt":
    import msvcrt
else:
    import fcntl

WARMUP_EPOCHS = 3  # the learning rate rises from 0 to --lr over these
RAMP_EPOCHS = 30  # crops, turns, jitter, mixing and dropout grow over these; see Run.strength
FIRST_DROP_BY = 0.8  # of --epochs; then the rate is divided by 10, if val has not stalled before
MAX_LR_DROPS = 3  # the rate may be divided by 10 so often (section 5); the next drop ends the run
AVERAGE_EVERY = 8  # steps between updates of the average; at every step it costs 3 % on a CPU
FEW_PHOTOS = 50  # per class; 20 taught this network little more than to guess, 100 much more
RUN_VERSION = 3  # of last.pt; raise it when the code would go on with an old run differently
SAVE_PAUSE = 60  # seconds between saves: on a GPU, an epoch may take less time than saving

# What --recipe paper sets. It also initialises the weights as the paper did, and only subtracts the
# mean from the pixels. The rate still warms up, and falls as in the default recipe.
PAPER = {
    "batch_size": 128,
    "ema": 0.0,
    "label_smoothing": 0.0,
    "crop_area": 0.0,
    "rotation": 0.0,
    "jitter": 0.0,
    "mix": 0.0,
}
# last.pt stores all options but these, which a resumed run takes from the command line.
NOT_STORED = {"data", "output", "resume", "overwrite", "accumulate", "device", "precision"}
HEADER = "epoch       lr   train loss  accuracy   val loss  accuracy   seconds  images/s  min left"
LINE = (
    "{epoch:5} {lr:8.2g}   {train_loss:10.4f}  {train_accuracy:8.4f}   "
    "{val_loss:8.4f}  {val_accuracy:8.4f}   {seconds:7.1f}  {images_per_second:8.1f}  {left:8.1f}"
)
CUTMIX, MIXUP = CutMix(), MixUp(alpha=0.2)

# torch warns that a tensor could write to the read-only file of decoded photos; none does.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

# Under torchrun each of n processes (ranks) trains on every n-th photo of a batch, and their
# gradients are summed. Process 0 alone decodes, writes files and prints to stdout.


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    smaller = f"--accumulate {4 * args.accumulate} computes the same batch in smaller pieces"
    with alexnet.one_line_errors(out_of_memory=smaller):
        alexnet.keep_large_blocks()
        device = connect_processes(args.device)

        checkpoint = None
        if args.resume:
            checkpoint = load_checkpoint(args)
            args = parse_args(argv, checkpoint["options"])
        else:
            prepare_output(args)
        with only_run_in(args.output):
            train_set, val_set = open_photos(args)
            run = Run(args, device, train_set, val_set)
            print_setup(run)
            if checkpoint:
                resume(run, checkpoint)
                checkpoint = None  # it takes 0.7 GB
            elif args.init:
                start_from(run)

            if is_reported(run):
                print(f"this run has ended, after epoch {len(run.history)}: {why_over(run)}")
            else:
                train(run)
                report(run)
        disconnect_processes()
    return 0


# ----- the options
class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Tells each default, and leaves the lines of the description as they are."""


def parse_args(argv: list[str] | None, kept: dict[str, Any] | None = None) -> Namespace:
    """All options. A resumed run has its `kept` ones; raises InputError where argv has others."""
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    share, count = number_within(0.0, 1.0), number_within(1, 2**20)

    # A resumed run may have other values of these.
    add = parser.add_argument
    add("--data", type=path_of, default="data", help="the folder that split_data.py made")
    add("--output", type=path_of, default=".", help="the folder to write into")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on with the run in --output, by its options")
    either("--overwrite", action="store_true", help="replace the run in --output")
    add("--accumulate", type=count, default=1, help="pieces to compute a batch in, to save memory")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: the fastest there is")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: bfloat16 where it is native, float16 on older CUDA cards",
    )

    # These are stored in last.pt and restored by --resume.
    paper = ", ".join(f"{name} {value}" for name, value in PAPER.items()).replace("_", "-")
    group = parser.add_argument_group(
        "options of a run",
        f"Dropout, crops, rotation, jitter and mix reach their full strength after {RAMP_EPOCHS}\n"
        f"epochs. --recipe paper: full strength at once, {paper},\n"
        "the paper's initial weights, unscaled pixels.",
    )
    add = group.add_argument
    add("--recipe", choices=("default", "paper"), default="default", help="paper: see above")
    # A str, not a Path, which last.pt could not store.
    add("--init", help="an AlexNet.pth to start from; other classes: a new last layer")
    add("--epochs", type=count, default=90, help="passes over the photos; --resume takes more")
    add("--batch-size", type=count, default=32, help="photos per step, of all processes together")
    add("--lr", type=number_within(1e-12, 1e9), default=0.01, help="learning rate of SGD")
    add("--momentum", type=share, default=0.9, help="of SGD")
    add("--weight-decay", type=share, default=0.0005, help="of SGD")
    add(
        "--ema",
        type=share,
        default=0.99,
        help="decay of the average of the weights, which is what is saved",
    )
    add(
        "--label-smoothing",
        type=share,
        default=0.1,
        help="part of the target spread over all classes",
    )
    add(
        "--patience",
        type=number_within(0, 2**20),
        default=10,
        help="epochs without a 1 %% lower val loss, at full strength, before lr is divided by 10;"
        " the first time, that comes after 4/5 of --epochs at the latest",
    )
    add(
        "--crop-area",
        type=share,
        default=0.25,
        help="smallest share of a photo's area in a crop; 0: 224 x 224 pixels of 256 x 256",
    )
    add(
        "--rotation",
        type=number_within(0.0, 180.0),
        default=30.0,
        help="degrees by which crops turn at most",
    )
    add(
        "--jitter",
        type=share,
        default=0.4,
        help="largest change of brightness, contrast and saturation",
    )
    add(
        "--mix",
        type=share,
        default=0.5,
        help="part of the photos mixed with others, by CutMix and by mixup",
    )
    add(
        "--balance",
        action="store_true",
        help="count every class alike: photos of rare ones are drawn more often, some repeatedly",
    )
    add(
        "--groups",
        type=int,
        choices=(1, 2),
        default=2,
        help="2: as on the paper's two GPUs; 1: not divided, which takes 1.4 times as long",
    )
    add(
        "--seed",
        type=number_within(0, 2**32),
        default=0,
        help="of the first weights, the order of photos, augmentation and dropout",
    )

    # The run to go on with, or the recipe, sets other defaults; what is typed overrides them.
    args = parser.parse_args(argv)
    if kept:
        parser.set_defaults(**kept)
    elif args.recipe == "paper":
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)

    for name, value in (kept or {}).items():
        if name != "epochs" and getattr(args, name) != value:  # --epochs may be raised
            option = f"--{name.replace('_', '-')} {value}"
            last = args.output / "last.pt"
            raise InputError(f"{last} is of a run with {option}; omit that option to resume it")
    return args


def options_of(args: Namespace) -> dict[str, Any]:
    """The options by which a run is known, and which last.pt keeps."""
    return {name: value for name, value in vars(args).items() if name not in NOT_STORED}


def number_within(least: float, most: float) -> Callable[[str], float]:
    """A type for argparse: int or float, like the limits, and within them."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not least <= value <= most:
            raise ArgumentTypeError(f"must be within {least} to {most}")
        return value

    return number


def prepare_output(args: Namespace) -> None:
    """Make the folder of a new run; refuse that of another run, unless --overwrite is given."""
    last, best = args.output / "last.pt", args.output / "AlexNet.pth"
    ways = "--overwrite replaces it, another --output keeps it"
    if not args.overwrite:
        if last.exists():
            raise InputError(f"{last} is an earlier run's: --resume goes on with it, {ways}")
        if best.exists():
            raise InputError(f"{best} is an earlier run's: its last.pt is gone, {ways}")
    args.output.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder; raises InputError if one is in it.

    The operating system locks an open file, and unlocks it when this process ends, however it ends.
    """
    if get_rank() > 0:  # process 0 locks it for all
        yield
        return
    path = output / "train.lock"
    with open(path, "w") as file:
        try:
            if os.name == "nt":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another run writes to {output}; choose another --output") from None
        except OSError:
            pass  # on a drive that has no locks
        try:
            yield
        finally:
            if os.name == "nt":
                file.close()  # as Windows removes no open file
            with contextlib.suppress(OSError):
                path.unlink()


def load_checkpoint(args: Namespace) -> dict[str, Any]:
    """What last.pt holds; raises InputError if that is not this program's."""
    last = args.output / "last.pt"
    if not last.exists():
        raise InputError(f"there is no {last} to go on with; run without --resume")
    checkpoint = alexnet.load_tensors(last)
    options = checkpoint.get("options")
    if checkpoint.get("version") != RUN_VERSION or options.keys() != options_of(args).keys():
        raise other_version(last)
    return checkpoint


def other_version(last: Path) -> InputError:
    way = "go on with that version, or choose another --output"
    return InputError(f"{last} is of another version of train.py: {way}")


# ----- the photos
class Photos:
    """The photos folder/CLASS/.../NAME, with their labels."""

    def __init__(self, folder: Path, classes: list[str] | None = None) -> None:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; split_data.py makes it, or fix --data")
        names = alexnet.list_photos(folder, alexnet.visible_files(folder))
        labels = [alexnet.class_of(name) for name in names]
        self.files = [folder / name for name in names]
        self.classes = classes or sorted(set(labels))
        if len(self.classes) < 2 or not names:
            found = f"{folder} has photos of {len(set(labels))} classes"
            raise InputError(f"{found}; train needs 2, val needs 1")
        if unknown := sorted(set(labels).difference(self.classes)):
            way = "remove it, or put photos of it into train"
            raise InputError(f"{folder} has a class that train lacks, {listed(unknown)}: {way}")

        index = {label: i for i, label in enumerate(self.classes)}
        self.labels = torch.tensor([index[label] for label in labels])  # int64 (N,)
        self.counts = torch.bincount(self.labels, minlength=len(index)).tolist()  # by class

        # A run knows its photos by their names and sizes, as copying changes their times.
        stats = [file.stat() for file in self.files]
        sizes = [(name, stat.st_size) for name, stat in zip(names, stats, strict=True)]
        self.digest = hashlib.sha256(repr(sizes).encode()).hexdigest()

        # The name of the file of decoded photos tells their times and the decoder, too. Whoever
        # edits a photo may set its mtime back, but not its ctime (which on Windows is the time of
        # its creation).
        times = [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
        facts = repr([alexnet.READER, self.digest, times])
        version = hashlib.sha256(facts.encode()).hexdigest()[:12]
        self.cache = folder.parent / f"{folder.name}-{version}.npy"

    def __len__(self) -> int:
        return len(self.labels)

    def open_pixels(self, output: Path) -> None:
        """Open the decoded photos, uint8 (N, 256, 256, 3); decode them if that was not done yet."""
        cache = self.cache
        if not cache.exists() and not os.access(cache.parent, os.W_OK):
            cache = output / cache.name
        if not cache.exists():
            write_pixels(cache, self.files)
        try:  # mapped read-only ("r"), the file may be larger than the memory
            pixels = np.load(cache, mmap_mode="r")
        except OSError:  # some network drives allow private maps only ("c")
            pixels = np.load(cache, mmap_mode="c")
        self.pixels = torch.from_numpy(pixels)

    def move_to(self, device: torch.device) -> None:
        """Keep all on a CUDA card if that takes less than a quarter of its free memory."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.pixels.nbytes < free / 4:
                self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels (n, 256, 256, 3) and labels (n,) of these photos, on the device."""
        # non_blocking: where the photos are on the card, the CPU can prepare this step while the
        # card still works on the last one.
        indices = indices.to(self.pixels.device, non_blocking=True)
        return self.pixels[indices].to(device), self.labels[indices].to(device)


def open_photos(args: Namespace) -> tuple[Photos, Photos]:
    """The photos to train on, and those to watch the training on."""
    train_set = Photos(args.data / "train")
    folders = [args.data / name for name in alexnet.VAL_FOLDERS]
    val_folder = next(filter(Path.is_dir, folders), folders[0])
    val_set = Photos(val_folder, train_set.classes)

    # Process 0 decodes; the others wait here until it has done so, and then open what it wrote.
    if get_rank() > 0:
        wait_for_others()
    problems = []  # of both, so that the user sees all at once
    for photos in (train_set, val_set):
        try:
            photos.open_pixels(args.output)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    if get_rank() == 0:
        wait_for_others()  # who now may go on
    return train_set, val_set


def write_pixels(path: Path, files: list[Path]) -> None:
    """Decode photos into a .npy file, and remove older ones; raises InputError if any is broken."""
    side, _ = path.stem.rsplit("-", 1)
    shape = (len(files), IMAGE_SIZE, IMAGE_SIZE, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    n = 0
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, pixels in alexnet.read_squares(files, f"decoding {side}"):
            file.write(pixels.tobytes())
            n += 1
        if n < len(files):
            broken = f"{len(files) - n} of the photos in {side}"
            raise InputError(f"cannot read {broken}, named above; remove them")

    for old in path.parent.glob(f"{side}-{'[0-9a-f]' * 12}.npy"):
        if old != path:
            with contextlib.suppress(OSError):  # Windows keeps a file that is in use
                old.unlink()


def pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (3,), standard deviation (3,) and principal axes (3, 3) of RGB in 0..1."""
    # Every 64th pixel of some 2,000 photos is enough.
    sample = pixels[:: math.ceil(len(pixels) / 2000), ::8, ::8].reshape(-1, 3) / 255
    covariance = torch.cov(sample.T.double())
    std = covariance.diagonal().clip(1 / 255**2).sqrt()  # a channel of one value has variance 0

    # Section 4.1 shifts colours along the principal axes of the pixels. Their lengths are standard
    # deviations, as in the 2012 source; the paper prints variances.
    variances, vectors = torch.linalg.eigh(covariance)
    axes = vectors * variances.clip(0).sqrt()
    return sample.mean(0), std, axes.float()


# ----- the run
class Run:
    """A training run as it stands between two epochs."""

    PARTS = ("net", "average", "optimizer", "scheduler", "scaler")  # which training changes

    def __init__(
        self, args: Namespace, device: torch.device, train_set: Photos, val_set: Photos
    ) -> None:
        self.args, self.device = args, device
        self.train_set, self.val_set = train_set, val_set
        mean, std, axes = pixel_statistics(train_set.pixels)
        self.color_axes = axes.to(device)
        train_set.move_to(device)
        val_set.move_to(device)

        # By --balance every class counts alike on val, however many photos it has.
        counts = torch.tensor(val_set.counts, dtype=torch.float64)
        weights = 1 / counts.clip(1) if args.balance else torch.ones_like(counts)
        weights *= len(val_set) / (weights @ counts)
        self.class_weights = weights.float().to(device)  # of a photo of each class, 1 on average
        self.class_shares = (weights * counts / len(val_set)).tolist()

        torch.manual_seed(args.seed)
        self.net = AlexNet(len(train_set.classes), args.groups)
        self.net.initialize(args.recipe)
        self.net.mean.copy_(mean[:, None, None])
        if args.recipe == "default":  # the paper's network sees raw pixels, less their mean
            self.net.std.copy_(std[:, None, None])
        self.net.to(device, memory_format=alexnet.pick_layout(device))

        # The average of the weights is what is evaluated and saved.
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = build_optimizer(self.net, args, device)
        # Gains under 1 % count as none, as a lower rate gains more.
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, patience=args.patience, threshold=0.01, eps=0
        )
        precision = alexnet.pick_precision(args.precision, device)
        self.hardware = name_hardware(device, precision)
        half = precision != torch.float32
        self.autocast = torch.autocast(device.type, precision if half else None, enabled=half)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

        self.history: list[dict[str, float]] = []  # a row for each epoch
        self.epochs_saved = 0  # of which last.pt knows
        self.best_loss = math.inf  # the val loss of the best weights
        self.unsaved: dict[str, Tensor] | None = None  # the best weights, if not yet written

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate

    @property
    def strength(self) -> float:
        """How far crops, turns, jitter, mixing and dropout have grown, 0..1; the paper's do not.

        From easy photos a network learns sooner; hard ones keep it from learning them by heart.
        """
        if self.args.recipe == "paper":
            return 1.0
        return min(1.0, len(self.history) / RAMP_EPOCHS)

    def average_on_host(self) -> dict[str, Tensor]:
        """A copy of the average of the weights, which a machine without the device can load."""
        return {name: x.to("cpu", copy=True) for name, x in self.average.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What last.pt holds."""
        return {
            "version": RUN_VERSION,
            "options": options_of(self.args),
            "photos": [self.train_set.digest, self.val_set.digest],
            "history": self.history,
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
        }


def build_optimizer(net: AlexNet, args: Namespace, device: torch.device) -> torch.optim.SGD:
    """The paper's SGD, with momentum and weight decay (section 5)."""
    optimizer = torch.optim.SGD(
        net.parameters(),
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=device.type != "mps",  # where the fused one ignored the scaler (pytorch 186360)
    )
    # Fused SGD would leave momentum uninitialised if the scaler skipped the first step.
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def name_hardware(device: torch.device, precision: torch.dtype) -> str:
    """What a run's figures depend on besides its options."""
    name, products = platform.machine(), ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if precision == torch.float32 and torch.cuda.get_device_capability(device)[0] >= 8:
            products = " with products in TF32"  # as pick_device asks for it
    return f"{name}, {device.type}, {precision}{products}, torch {torch.__version__}"


def print_setup(run: Run) -> None:
    """Print what is going to be trained, on what."""
    counts = run.train_set.counts
    print(f"device   {run.hardware}")
    print(f"photos   {len(run.train_set):,} to train, {len(run.val_set):,} to val")
    print(f"classes  {len(counts)}, of {min(counts):,} to {max(counts):,} photos", end="; ")
    print(f"baseline (largest class): accuracy {max(run.class_shares):.4f}")
    print(f"network  {sum(p.numel() for p in run.net.parameters()):,} parameters")

    if run.args.device == "auto" and lacks_cuda(torch.version.cuda or torch.version.hip):
        way = "pytorch.org/get-started tells how to install the build for its driver"
        print(f"hint: this computer has an NVIDIA card, which this torch cannot use; {way}")
    if min(counts) < FEW_PHOTOS and not run.args.init:
        way = "a pretrained network, fine-tuned, needs fewer"
        print(f"hint: classes of under {FEW_PHOTOS} photos are hardly learnt from scratch; {way}")


def lacks_cuda(built_for: str | None) -> bool:
    """Whether torch is built for CPUs alone, as pip installs it on Windows, beside a card."""
    return built_for is None and shutil.which("nvidia-smi") is not None


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Set a run to where last.pt left it. Its best weights are in AlexNet.pth."""
    last = run.args.output / "last.pt"
    if checkpoint.get("photos") != [run.train_set.digest, run.val_set.digest]:
        way = "give its --data as it was, or another --output"
        raise InputError(f"{last} is of a run on other photos to train or val; {way}")
    try:
        for name in run.PARTS:
            if checkpoint[name]:  # a scaler that was off has no state
                getattr(run, name).load_state_dict(checkpoint[name])
        # On a Mac SGD is not fused, and weights have another memory format. Fused SGD pairs
        # elements by their place in memory, so momentum is copied into the format of its weights.
        run.optimizer.param_groups[0]["fused"] = run.device.type != "mps"
        for p, state in run.optimizer.state.items():
            state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])
        run.history = list(checkpoint["history"])
        run.epochs_saved = len(run.history)
    except Exception as error:  # a foreign file may raise any type
        if alexnet.is_out_of_memory(error):
            raise
        raise other_version(last) from error

    # The score to beat is that of AlexNet.pth, which a kill may have left newer than last.pt.
    try:
        run.best_loss, _ = evaluate(run, best_network(run))
    except InputError as error:
        print(f"{error}; the last epoch's weights take its place")
        run.best_loss = run.history[-1]["val_loss"]
        run.unsaved = run.average_on_host()


def start_from(run: Run) -> None:
    """Take over the weights of --init; of its last layer only for the same classes."""
    path = path_of(run.args.init)
    net = alexnet.load_network(path)
    state = net.state_dict()
    if alexnet.load_classes(path, net) != run.train_set.classes:
        del state["classifier.6.weight"], state["classifier.6.bias"]
    try:
        run.net.load_state_dict(state, strict=False)
        run.average.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{path} is of a run with other --groups; give the same") from error


def best_network(run: Run) -> AlexNet:
    """The network in AlexNet.pth; raises InputError if its shapes are not this run's."""
    path = run.args.output / "AlexNet.pth"
    net = alexnet.load_network(path)
    if [p.shape for p in net.parameters()] != [p.shape for p in run.net.parameters()]:
        raise InputError(f"{path} holds the weights of another network")
    return net.to(run.device, memory_format=alexnet.pick_layout(run.device))


# ----- training (section 5)
def train(run: Run) -> None:
    """Train epoch by epoch to the end of the run, and save it from time to time."""
    next_save = 0.0  # by time.perf_counter()
    print(HEADER)
    try:
        while not is_over(run):
            epoch, start = len(run.history) + 1, time.perf_counter()
            train_loss, train_accuracy = train_one_epoch(run, epoch)
            images_per_second = len(run.train_set) / (time.perf_counter() - start)
            val_loss, val_accuracy = evaluate(run, run.average)
            row = {
                "epoch": epoch,
                "lr": run.lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "seconds": time.perf_counter() - start,
                "images_per_second": images_per_second,
            }
            run.history.append(row)
            lower_rate_where_val_stalls(run)
            is_best = val_loss < run.best_loss
            if is_best:
                run.best_loss = val_loss
                if get_rank() == 0:
                    run.unsaved = run.average_on_host()

            mark = "  best" if is_best else ""
            minutes_left = (run.args.epochs - epoch) * row["seconds"] / 60
            print(LINE.format(**row, left=minutes_left) + mark, flush=True)
            if epoch == 2 * WARMUP_EPOCHS and is_guessing(run):
                lower = f"--lr {run.args.lr / 3:.2g}"
                print(f"hint: nothing is learnt yet; try {lower} or --batch-size 16")

            if get_rank() == 0 and time.perf_counter() > next_save and not is_over(run):
                save_checkpoint(run)
                next_save = time.perf_counter() + SAVE_PAUSE
        if len(run.history) < run.args.epochs:
            print(f"ended: {why_over(run)}")
        if get_rank() == 0:
            save_checkpoint(run)
    except KeyboardInterrupt:
        if get_rank() > 0:
            raise
        left = "no epoch of this run is saved yet"
        if run.epochs_saved:
            left = f"--resume goes on after epoch {run.epochs_saved}"
        raise KeyboardInterrupt(left) from None
    finally:
        # Until the first save, last.pt may be of the run that --overwrite is to replace.
        if get_rank() == 0 and run.epochs_saved:
            save_weights(run)


def train_one_epoch(run: Run, epoch: int) -> tuple[float, float]:
    """One pass over the photos; returns the mean loss and accuracy, in training mode."""
    args, train_set = run.args, run.train_set

    # Every epoch is seeded by (seed, epoch), so resuming needs no state of a generator. All
    # processes draw the same order of photos, and each its own augmentation and dropout.
    generator = torch.Generator().manual_seed(seed_of(args.seed, epoch))
    torch.manual_seed(seed_of(args.seed, epoch, get_rank() + 1))

    # All photos in random order; with --balance as many draws, in which every class is as likely.
    chances = torch.ones(len(train_set))
    if args.balance:
        chances /= torch.tensor(train_set.counts)[train_set.labels.cpu()]
    repeats = bool(args.balance)  # an older last.pt may have 0 or 1
    order = chances.multinomial(len(chances), replacement=repeats, generator=generator)
    batches = order.split(args.batch_size)

    totals = torch.zeros(2, device=run.device)
    seen = steps_to_average = 0
    run.net.train()
    for layer in run.net.classifier:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5 * run.strength  # section 4.2
    hide = get_rank() > 0 or None  # None: tqdm hides the bar where nobody watches
    bar = tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False, disable=hide)
    for number, batch in enumerate(bar, 1):
        warm_up(run, epoch - 1 + number / len(batches))
        totals += train_one_batch(run, batch)
        seen += len(batch)

        is_last = number == len(batches)
        steps_to_average += 1
        if steps_to_average == AVERAGE_EVERY or is_last:
            update_average(run, steps_to_average, total=(epoch - 1) * len(batches) + number)
            steps_to_average = 0
        if number % 20 == 0 or is_last:  # reading the totals waits for the device
            loss, accuracy = loss_and_accuracy(totals, seen, f"epoch {epoch}, lr {run.lr:g}")
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    return loss, accuracy


def seed_of(*numbers: int) -> int:
    """One seed for several numbers: 32 bits, as a CPU's generator uses no more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train_one_batch(run: Run, batch: Tensor) -> Tensor:
    """One step of SGD on these photos; returns this process's sums (loss, right answers)."""
    args, totals = run.args, torch.zeros(2, device=run.device)
    images, targets = make_batch(run, batch[get_rank() :: get_world_size()])
    pieces = args.accumulate
    if run.device.type == "cpu":  # 64 photos at once are as fast as more, in less memory
        pieces = max(pieces, math.ceil(len(images) / 64))

    # Around all pieces and their backward passes, so that on a CPU the weights are cast once.
    with run.autocast:
        for x, y in zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
            logits = run.net(x).float()
            loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=args.label_smoothing)
            # Divided by the whole batch's size, the gradients of all pieces add up to its mean.
            run.scaler.scale(loss / len(batch)).backward()
            right = (logits.argmax(1) == y.argmax(1)).sum()
            totals += torch.stack([loss.detach(), right])

    if is_distributed():
        for p in run.net.parameters():
            dist.all_reduce(p.grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return totals


def make_batch(run: Run, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 224, 224) around 0..1 and targets (n, classes), augmented, on the device."""
    args = run.args
    pixels, labels = run.train_set.take(indices, run.device)
    strength = run.strength
    crop_area = args.crop_area
    if crop_area:  # 0 stands for the paper's crops
        crop_area = 1 - strength * (1 - crop_area)
    images = alexnet.to_float(pixels)
    images = random_crop(images, crop_area, strength * args.rotation)
    images = random_colors(images, run.color_axes, strength * args.jitter)
    targets = F.one_hot(labels, len(run.train_set.classes)).float()

    # CutMix puts a window of another photo into the first half of those to mix; mixup blends the
    # second half with another. The other is of the same half, which so needs two photos; with three
    # or fewer to mix, all get CutMix.
    n_mixed = round(len(indices) * strength * args.mix)
    n_cutmix = math.ceil(n_mixed / 2) if n_mixed > 3 else n_mixed
    if n_mixed:  # else both would draw random numbers for nothing
        for mix, part in ((CUTMIX, slice(n_cutmix)), (MIXUP, slice(n_cutmix, n_mixed))):
            images[part], targets[part] = mix(images[part], targets[part])
    return images, targets


def random_crop(images: Tensor, crop_area: float, rotation: float) -> Tensor:
    """A crop of each photo (n, 3, 256, 256), turned and perhaps mirrored: (n, 3, 224, 224)."""
    n = len(images)
    if n == 0:  # a process's share of a very small batch
        return images.new_empty(0, 3, CROP_SIZE, CROP_SIZE)
    with images.device:
        matrices = draw_crops(n, crop_area, rotation)
    grid = F.affine_grid(matrices, [n, 3, CROP_SIZE, CROP_SIZE], align_corners=False)

    # A turned crop may reach beyond the photo. There it shows the photo mirrored at its edge (the
    # centres of the outermost pixels): a point as far beyond the edge is read as far before it. MPS
    # lacks padding_mode="reflection", which would do this, and wants contiguous images.
    edge = 1 - 1 / IMAGE_SIZE
    grid = 2 * grid.clamp(-edge, edge) - grid
    return F.grid_sample(images.contiguous(), grid, align_corners=False)


def draw_crops(n: int, crop_area: float, rotation: float) -> Tensor:
    """Affine matrices (n, 2, 3) from each point of a crop to its place in the photo, in -1..1."""
    # Sizes of the crops as parts of the photo's, and their places in 0..1, (width, height) by n.
    if crop_area:  # of crop_area to 1 of the photo's area, at an aspect of 3/4 to 4/3
        area = torch.empty(n).uniform_(crop_area, 1)
        aspect = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
        size = torch.stack([area * aspect, area / aspect]).sqrt().clamp(max=1)
        place = torch.rand(2, n)
    else:  # section 4.1: 224 x 224 of 256 x 256 pixels; at 33 x 33 places (the paper: 32 x 32)
        size = torch.full((2, n), CROP_SIZE / IMAGE_SIZE)
        place = torch.randint(IMAGE_SIZE - CROP_SIZE + 1, (2, n)) / (IMAGE_SIZE - CROP_SIZE)
    mirror = torch.randint(2, (n,)) * 2 - 1
    angle = (rotation * (2 * torch.rand(n) - 1)).deg2rad()

    # Scale to the crop's size, mirror, turn, and move to its centre (x, y).
    width, height = size
    x, y = (2 * place - 1) * (1 - size)
    sin, cos = angle.sin(), angle.cos()
    rows = mirror * width * cos, -height * sin, x, mirror * width * sin, height * cos, y
    return torch.stack(rows, dim=1).view(n, 2, 3)


def random_colors(images: Tensor, axes: Tensor, jitter: float) -> Tensor:
    """Change the colours of each image (n, 3, H, W)."""
    n = len(images)
    with images.device:
        shifts = 0.1 * torch.randn(n, 3) @ axes.T  # section 4.1
        brightness, contrast, saturation = 1 + jitter * (2 * torch.rand(3, n, 1, 1) - 1)
        # Saturation draws R, G and B away from their mean, or to it; contrast draws all away from
        # middle grey; brightness multiplies. Together: one 3 x 3 matrix an image, and a shift.
        matrices = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) / 3)
    shifts = shifts[:, :, None] + brightness * (1 - contrast) / 2
    return torch.baddbmm(shifts, matrices, images.flatten(2)).view_as(images)


@torch.no_grad()
def update_average(run: Run, steps: int, total: int) -> None:
    """Let the average follow the last `steps` of the `total` steps so far.

    At a high rate the weights oscillate around their average, so that is the better network.
    """
    decay = min(run.args.ema, total / (10 + total))  # at first less, to forget the initial weights
    pairs = zip(run.average.parameters(), run.net.parameters(), strict=True)
    for average, weight in pairs:
        average.lerp_(weight, 1 - decay**steps)


def evaluate(run: Run, net: AlexNet, ten_views: bool = False) -> tuple[float, float]:
    """Loss and accuracy on val, by the central view or the mean of ten."""
    val_set, totals = run.val_set, torch.zeros(2, device=run.device)
    batches = torch.arange(len(val_set))[get_rank() :: get_world_size()].split(64)
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=get_rank() > 0 or None):
        pixels, labels = val_set.take(batch, run.device)
        with run.autocast:
            probabilities = alexnet.predict_probabilities(net, alexnet.to_float(pixels), ten_views)
        losses = F.nll_loss(probabilities.clamp(min=1e-12).log(), labels, reduction="none")
        right = probabilities.argmax(1) == labels
        totals += (torch.stack([losses, right]) * run.class_weights[labels]).sum(1)
    return loss_and_accuracy(totals, len(val_set), "validation")


# ----- the learning rate (section 5)
def warm_up(run: Run, epochs_done: float) -> None:
    """Over the first epochs the rate rises from 0 to --lr."""
    if epochs_done <= WARMUP_EPOCHS:
        run.lr = run.args.lr * (epochs_done / WARMUP_EPOCHS)


def lower_rate_where_val_stalls(run: Run) -> None:
    """Let ReduceLROnPlateau see the last val loss, and lower the rate by 4/5 of the epochs."""
    # While the network guesses, losses hardly change; the rate must not fall then.
    epochs_done = len(run.history)
    if epochs_done <= WARMUP_EPOCHS or is_guessing(run):
        return
    if run.strength == 1:  # while the photos get harder, val may stall by that
        run.scheduler.step(run.history[-1]["val_loss"])

    # A lower rate gains a lot in few epochs, so it has to come before the last of them, even if
    # val has not stalled, and the rate is still --lr.
    drop_by = round(FIRST_DROP_BY * run.args.epochs)
    if drop_by <= epochs_done < run.args.epochs and run.lr == run.args.lr:
        run.lr /= 10
        run.scheduler.num_bad_epochs = 0


def is_over(run: Run) -> bool:
    """Whether all epochs are done, or the rate fell once more than MAX_LR_DROPS."""
    # `end` lies between the rates after the last allowed drop and after one more, so that rounding
    # cannot matter.
    end = run.args.lr * 0.1 ** (MAX_LR_DROPS + 0.5)
    return len(run.history) >= run.args.epochs or run.lr < end


def why_over(run: Run) -> str:
    """Why a run has ended, and how it would go on."""
    if len(run.history) >= run.args.epochs:
        return "all its epochs are done; --resume with more --epochs would go on"
    return "the val loss no longer falls"


def is_reported(run: Run) -> bool:
    """Whether there is nothing left to train, to write or to report."""
    files = [run.args.output / name for name in ("class_idx.json", "run.json")]
    return is_over(run) and not run.unsaved and all(map(Path.exists, files))


def is_guessing(run: Run) -> bool:
    """Whether the network is still no better than to predict the classes' frequencies, always."""
    # The loss of that answer is the entropy of the shares, its accuracy the largest of them. The
    # accuracy alone would hardly tell where one class has 95 %.
    shares = run.class_shares
    entropy = -sum(share * math.log(share) for share in shares if share)
    best_loss = best_epoch(run.history)["val_loss"]
    best_accuracy = max(row["val_accuracy"] for row in run.history)
    no_better_loss = best_loss >= 0.98 * entropy
    no_better_accuracy = best_accuracy <= max(shares) + 1e-5  # for rounding
    return no_better_loss and no_better_accuracy and max(shares) < 1


def best_epoch(history: list[dict[str, float]]) -> dict[str, float]:
    """The row of the lowest val loss."""
    return min(history, key=lambda row: row["val_loss"])


# ----- files
def save_weights(run: Run) -> None:
    """Write the best weights, if that was not done yet."""
    output = run.args.output
    if run.unsaved:
        with replacing(output / "AlexNet.pth") as file:
            torch.save(run.unsaved, file)
            # They may not lie beside files of a run that --overwrite replaces, not even after a
            # kill; and while the disk may turn out to be full, that run stays whole.
            if len(run.history) == 1 and not run.args.resume:
                file.flush()
                for name in ("last.pt", "class_idx.json"):
                    (output / name).unlink(missing_ok=True)
        run.unsaved = None


def save_checkpoint(run: Run) -> None:
    """Write new best weights and the names of the classes, then last.pt, history and curves.

    After a kill between them, --resume repeats the epochs since the last save.
    """
    output, history = run.args.output, run.history
    save_weights(run)
    names = json.dumps(dict(enumerate(run.train_set.classes)), indent=1)
    with replacing(output / "class_idx.json") as file:
        file.write(names.encode())
    with replacing(output / "last.pt") as file:
        torch.save(run.state_dict(), file)
    run.epochs_saved = len(history)

    # These are of an earlier run, or of this one before it went on.
    for name in ("run.json", "kernels.png"):
        with contextlib.suppress(OSError):
            (output / name).unlink()

    header = list(history[-1])
    rows = [header, *([f"{x:.6g}" for x in row.values()] for row in history)]
    try:
        with replacing(output / "history.csv") as file:
            file.writelines(f"{','.join(row)}\n".encode() for row in rows)
        with replacing(output / "curves.png") as file:
            draw_curves(history, max(run.class_shares)).savefig(file, format="png")
    except OSError as error:  # Windows refuses while another program has one open
        print(f"warning: {error}", file=sys.stderr)


def draw_curves(history: list[dict[str, float]], share: float) -> Figure:
    """Loss and accuracy of both sets by epoch, and the best epoch."""
    figure, best = Figure(figsize=(11, 4.5), layout="constrained"), best_epoch(history)
    loss, accuracy = figure.subplots(1, 2)
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        for side in ("train", "val"):
            values = [row[f"{side}_{name}"] for row in history]
            axis.plot(range(1, len(history) + 1), values, ".-", label=side)
        label = f"best on val: epoch {best['epoch']}, accuracy {best['val_accuracy']:.3f}"
        axis.plot(best["epoch"], best[f"val_{name}"], "k*", markersize=13, label=label)
        axis.set(xlabel="epoch", title=name)
        axis.locator_params("x", integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
    label = f"baseline (largest class): {share:.3f}"
    accuracy.axhline(share, color="tab:red", linestyle="--", linewidth=1, label=label)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def report(run: Run) -> None:
    """Evaluate AlexNet.pth by both kinds of views; write run.json and kernels.png."""
    path = run.args.output / "AlexNet.pth"
    wait_for_others()  # process 0 has just written it
    net = best_network(run)
    _, center = evaluate(run, net)
    _, ten = evaluate(run, net, ten_views=True)
    if get_rank() > 0:
        return

    # The paper's figure 3: the 96 kernels of conv1, 16 a row, the upper 48 of one GPU.
    kernels = F.interpolate(net.features[1].weight, scale_factor=5.0)  # 55 pixels a side
    with replacing(path.with_name("kernels.png")) as file:
        save_image(kernels, file, format="png", nrow=16, padding=5, pad_value=1, normalize=True)
    facts = {
        "options": options_of(run.args),
        "photos": {"train": run.train_set.counts, "val": run.val_set.counts},
        "epochs": len(run.history),
        "best_epoch": best_epoch(run.history)["epoch"],
        "val_accuracy": {"center-crop": center, "ten-crop": ten},
        "hardware": run.hardware,
    }
    with replacing(path.with_name("run.json")) as file:
        file.write(json.dumps(facts, indent=1).encode())
    print(f"{path}: accuracy on val {center:.4f} by center-crop, {ten:.4f} by ten-crop")
    print(f"now classify a photo: python predict.py PHOTO --weights {quoted(path)}")


# ----- several processes, started by torchrun, one for each card
def connect_processes(device_name: str) -> torch.device:
    """Connect to the other processes, if torchrun started this one; returns its device.

    NCCL carries the gradients between CUDA cards, gloo between CPUs (and cards of Windows).
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return alexnet.pick_device(device_name)
    if torch.cuda.is_available() and device_name != "cpu":
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif device_name == "auto":  # gloo knows no MPS
        device_name = "cpu"
    elif device_name != "cpu":
        raise InputError(f"--device {device_name}: torchrun needs CUDA cards, or CPUs")
    device = alexnet.pick_device(device_name)

    line = "waiting for all {WORLD_SIZE} processes at {MASTER_ADDR}:{MASTER_PORT}"
    print(line.format(**os.environ), file=sys.stderr)
    patience = timedelta(days=1)  # decoding may take hours
    try:
        if device.type == "cuda" and dist.is_nccl_available():  # Windows has none
            dist.init_process_group("nccl", timeout=patience, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=patience)
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"the processes cannot be connected: {reason}") from error
    atexit.register(leave_at_once)
    if get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def wait_for_others() -> None:
    if is_distributed():
        dist.barrier()


def loss_and_accuracy(totals: Tensor, n: int, where: str) -> tuple[float, float]:
    """Loss and accuracy from all processes' sums over n photos; raises InputError if not finite."""
    totals = totals.clone()
    if is_distributed():
        dist.all_reduce(totals)
    # Divided in float64, as in float32 3 / 5 is more than a class's share of 0.6.
    loss, accuracy = (total / n for total in totals.tolist())
    if not math.isfinite(loss):
        way = "start with a lower --lr; on an older card, with --precision float32"
        raise InputError(f"the loss is not finite ({where}); {way}")
    return loss, accuracy


def disconnect_processes() -> None:
    if is_distributed():
        dist.destroy_process_group()


def leave_at_once() -> None:
    """End a process that failed: an orderly exit would wait for the others, for ever."""
    if is_distributed():  # main did not come to its end
        if get_rank() > 0:  # torchrun kills all once one has ended, and process 0 may be saving
            time.sleep(10)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
