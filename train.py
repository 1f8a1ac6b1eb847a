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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.utils import save_image
from tqdm import tqdm

import alexnet
from alexnet import CROP_SIZE, IMAGE_SIZE, AlexNet, InputError, replacing

# What --recipe paper sets besides the first weights, their biases and raw pixels.
PAPER = {
    "batch_size": 128,
    "ema": 0.0,
    "label_smoothing": 0.0,
    "crop_area": 0.0,
    "rotation": 0.0,
    "jitter": 0.0,
    "mix": 0.0,
}
# What --resume takes from the command line; all other options are those in last.pt.
FREE = {"data", "output", "resume", "overwrite", "accumulate", "device", "precision"}
WARMUP_EPOCHS = 3  # the rate rises to --lr over these
RAMP_EPOCHS = 60  # --rotation and --jitter rise over these, as in full they slow the start
MAX_LR_DROPS = 3  # section 5: by 10 each, where val stalls; a fourth ends the run
AVERAGE_EVERY = 8  # steps; at each it took 3 % of a CPU's time
SAVE_PAUSE = 9  # times as long as saving took: a card's epoch is a second
OTHER_VERSION = "is of another version of train.py: go on with that, or take another --output"
NAMES = "epoch lr train_loss train_accuracy val_loss val_accuracy seconds images_per_second".split()

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor written


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    less = f"--accumulate {4 * args.accumulate} computes the same batch in smaller pieces"
    with alexnet.one_line_errors(less):
        train(args)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
    return 0


def train(args: Namespace) -> None:
    alexnet.keep_large_blocks()
    connect_processes(args)
    checkpoint = open_checkpoint(args)
    if RANK:
        wait_for_others()  # process 0 decodes the photos
    train_set = Photos(args.data / "train", args.output)
    folders = [args.data / name for name in alexnet.VAL_FOLDERS]
    val = next(filter(Path.is_dir, folders), folders[0])
    val_set = Photos(val, args.output, train_set.classes)
    if broken := train_set.broken + val_set.broken:
        raise InputError(f"{broken} photos, named above, cannot be read; remove them")
    if not RANK:
        wait_for_others()
    run = Run(args, train_set, val_set)
    print(f"device   {run.hardware}")
    print(f"photos   {len(train_set):,} to train, {len(val_set):,} to val")
    counts = train_set.counts
    print(f"classes  {len(counts)}, of {min(counts):,} to {max(counts):,} photos", end="; ")
    print(f"always the likeliest: accuracy {max(run.shares):.4f}")
    print(f"network  {sum(p.numel() for p in run.net.parameters()):,} parameters")
    if args.mix and round(args.batch_size // WORLD_SIZE * args.mix) < 4:  # see make_batch
        enough = WORLD_SIZE * math.ceil(3.5 / args.mix)
        print(f"note: too few photos for mixup; --batch-size {enough} or more trains as meant")
    if checkpoint:
        resume(run, checkpoint)
        checkpoint = None  # frees 0.7 GB
        if run.is_over and not run.unsaved and (args.output / "run.json").exists():
            way = "; --epochs with more goes on" if len(run.history) >= args.epochs else ""
            print(f"this run has ended, after epoch {len(run.history)}: nothing is left to do{way}")
            return
    elif args.init:
        start_from(run)
    try:
        train_epochs(run)
        report(run)
    except KeyboardInterrupt:
        left = "no epoch of this run is saved yet"
        if run.epochs_saved:
            left = f"--resume goes on after epoch {run.epochs_saved}"
        raise KeyboardInterrupt(left) from None
    finally:
        if not RANK:
            save_best(run)


def train_epochs(run: Run) -> None:
    """Train to the end of the run, and save it from time to time."""
    args, train_set = run.args, run.train_set
    print("epoch       lr   train loss  accuracy   val loss  accuracy   seconds  images/s")
    while not run.is_over:
        epoch, start = len(run.history) + 1, time.perf_counter()
        trained = train_one_epoch(run, epoch)
        speed = len(train_set) / (time.perf_counter() - start)
        validated = evaluate(run, run.average)
        values = epoch, run.lr, *trained, *validated, time.perf_counter() - start, speed
        row = dict(zip(NAMES, values, strict=True))
        run.history.append(row)
        # On the starting plateau epochs tie, which would lower the rate just where it is needed.
        if epoch > WARMUP_EPOCHS and not is_on_plateau(run):
            run.scheduler.step(row["val_loss"])
        if is_best := row["val_loss"] < run.lowest:
            run.lowest, run.unsaved = row["val_loss"], run.average_on_host()
        if not (RANK or run.is_over) and time.perf_counter() > run.next_save:  # else report saves
            save(run)
        line = "{:5} {:8.2g}   {:10.4f}  {:8.4f}   {:8.4f}  {:8.4f}   {:7.1f}  {:8.1f}"
        print(line.format(*values) + ("  best" if is_best else ""), flush=True)
        if epoch == 2 * WARMUP_EPOCHS and is_on_plateau(run):
            print(f"hint: nothing is learnt yet; try --lr {args.lr / 3:.2g} or --batch-size 16")
    if len(run.history) < args.epochs:
        print("ended: the val loss no longer falls")


def open_checkpoint(args: Namespace) -> dict[str, Any] | None:
    """last.pt for --resume; sets the options of the run in `args`."""
    last, best = args.output / "last.pt", args.output / "AlexNet.pth"
    if not args.resume:
        ways = "--overwrite replaces it, another --output keeps it"
        for path, way in ((last, "--resume goes on with it, "), (best, "its last.pt is gone, ")):
            if path.exists() and not args.overwrite:
                raise InputError(f"{path} is an earlier run's: {way}{ways}")
        args.output.mkdir(parents=True, exist_ok=True)
        return None
    if not last.exists():
        raise InputError(f"there is no {last} to go on with; run without --resume")
    checkpoint = alexnet.load_tensors(last)
    try:
        options = {name: checkpoint["options"][name] for name in args.kept}
    except (KeyError, TypeError):
        raise InputError(f"{last} {OTHER_VERSION}") from None
    for name, value in args.typed.items():
        if options[name] != value and name != "epochs":
            option = f"--{name.replace('_', '-')} {options[name]}"
            raise InputError(f"{last} is of a run with {option}; leave the option out")
    vars(args).update(options | args.typed)
    return checkpoint


# ----- the photos
class Photos:
    """The photos folder/CLASS/*, decoded once into a memory-mapped file."""

    def __init__(self, folder: Path, output: Path, classes: list[str] | None = None) -> None:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; split_data.py makes it, or fix --data")
        names = alexnet.list_photos(folder, alexnet.visible_files(folder))
        files, labels = [folder / name for name in names], [*map(alexnet.class_of, names)]
        self.classes = classes or sorted(set(labels))
        if len(self.classes) < 2 or not files:
            raise InputError(f"{folder} has photos of {len(set(labels))} classes, and 2 are needed")
        if unknown := sorted(set(labels).difference(self.classes)):
            way = "remove it, or put photos of it into train"
            raise InputError(f"{folder} has a class that train lacks, {', '.join(unknown)}: {way}")
        index = {label: i for i, label in enumerate(self.classes)}
        self.labels = torch.tensor([index[label] for label in labels])  # int64 (N,)
        self.counts = torch.bincount(self.labels, minlength=len(index)).tolist()  # by class
        # Runs know photos by name and size, as copying changes times; the .npy goes by times, too.
        stats = [path.stat() for path in files]
        facts = [(name, s.st_size) for name, s in zip(names, stats, strict=True)]
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        version = repr([alexnet.READER, self.digest, *(s.st_mtime_ns for s in stats)]).encode()
        path = folder.parent / f"{folder.name}-{hashlib.sha256(version).hexdigest()[:12]}.npy"
        if not path.exists() and not os.access(folder.parent, os.W_OK):
            path = output / path.name
        # How many cannot be read; if none, pixels are uint8 (N, 256, 256, 3).
        self.broken = 0 if path.exists() else write_pixels(path, files)
        if not self.broken:  # "r": what may be changed has to fit into memory
            self.pixels = torch.from_numpy(np.load(path, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.labels)

    def move_to(self, device: torch.device) -> None:
        """Keep the pixels on a CUDA card if they take less than a quarter of what is free."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            free = min(free, total * torch.cuda.get_per_process_memory_fraction(device))
            if self.pixels.nbytes < free / 4:
                self.pixels = self.pixels.to(device)

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels (n, 256, 256, 3) and labels (n,) of these photos."""
        # A card need not end its last step first; on MPS such a copy could outlive its source.
        no_wait = device.type == "cuda"
        pixels = self.pixels[indices.to(self.pixels.device, non_blocking=no_wait)]
        labels = self.labels[indices].to(device, non_blocking=no_wait)
        return pixels.to(device), labels


def write_pixels(path: Path, files: list[Path]) -> int:
    """Write the .npy file, remove older ones; or return how many photos cannot be read."""
    n, shape = 0, (len(files), IMAGE_SIZE, IMAGE_SIZE, 3)
    with contextlib.suppress(InputError), replacing(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _, pixels in alexnet.read_squares(files, f"packing {path.stem}"):
            file.write(pixels.tobytes())
            n += 1
        if n < len(files):
            raise InputError("broken photos")  # so that no file comes of it
    for old in path.parent.glob(f"{path.stem[:-12]}{'[0-9a-f]' * 12}.npy"):
        if n == len(files) and old != path:
            with contextlib.suppress(OSError):  # on Windows one that is open
                old.unlink()
    return len(files) - n


# ----- augmentation (section 4.1)
def make_batch(run: Run, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 224, 224) around 0..1 and targets (n, classes), augmented, on the device."""
    n = len(indices)
    pixels, labels = run.train_set.take(indices, run.device)
    strength = min(1, len(run.history) / RAMP_EPOCHS)
    crops = draw_crops(n, run.args.crop_area, strength * run.args.rotation, run.device)
    colors = draw_colors(n, run.color_axes, strength * run.args.jitter)
    images = augment(alexnet.to_float(pixels), crops, *colors)
    targets = F.one_hot(labels, len(run.train_set.classes)).float()
    if k := round(n * run.args.mix):  # half get a window that shows another, half are blended
        first = k - k // 2 if k > 3 else k  # one alone would be mixed with itself
        for part, mix in ((slice(first), CutMix()), (slice(first, k), MixUp(alpha=0.2))):
            images[part], targets[part] = mix(images[part], targets[part])
    return images, targets


def draw_crops(n: int, crop_area: float, rotation: float, device: torch.device) -> Tensor:
    """Affine matrices (n, 2, 3) from crops to their places in the photos, both in -1..1."""
    with device:  # where all is drawn
        if crop_area:  # crop_area to 1 of the photo, at an aspect of 3/4 to 4/3
            area = torch.empty(n).uniform_(crop_area, 1)
            aspect = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
            size = torch.stack([area * aspect, area / aspect]).sqrt().clamp(max=1)
            place = torch.rand(2, n)
        else:  # the paper's: 224 x 224 of 256 x 256, at one of 33 x 33 places
            size = torch.full((2, n), CROP_SIZE / IMAGE_SIZE)
            place = torch.randint(IMAGE_SIZE - CROP_SIZE + 1, (2, n)) / (IMAGE_SIZE - CROP_SIZE)
        mirror, turn = torch.randint(2, (n,)) * 2 - 1, rotation * (2 * torch.rand(n) - 1)
        (width, height), (x, y) = size, (2 * place - 1) * (1 - size)  # x, y: the centre
        sin, cos = turn.deg2rad().sin(), turn.deg2rad().cos()
        rows = mirror * width * cos, -height * sin, x, mirror * width * sin, height * cos, y
        return torch.stack(rows, dim=1).view(n, 2, 3)


def draw_colors(n: int, axes: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Matrices (n, 3, 3) and shifts (n, 3, 1) that change the colours of n photos; white is 1."""
    with axes.device:
        shifts = 0.1 * torch.randn(n, 3) @ axes.T  # the paper's
        brightness, contrast, saturation = 1 + jitter * (2 * torch.rand(3, n, 1, 1) - 1)
        matrices = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) / 3)
        return matrices, shifts[:, :, None] + brightness * (1 - contrast) / 2


def augment(images: Tensor, crops: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """Cut crops (n, 2, 3) out of images (n, 3, 256, 256), scale them to 224, change colours."""
    if not len(images):  # a process's share of a very small batch
        return images.new_empty(0, 3, CROP_SIZE, CROP_SIZE)
    grid = F.affine_grid(crops, [len(images), 3, CROP_SIZE, CROP_SIZE], align_corners=False)
    # Beyond its edges a photo goes on mirrored.
    # MPS lacks padding_mode="reflection", and wants contiguous images.
    grid = 2 * grid.clamp(1 / IMAGE_SIZE - 1, 1 - 1 / IMAGE_SIZE) - grid
    views = F.grid_sample(images.contiguous(), grid, align_corners=False)
    return torch.baddbmm(shifts, matrices, views.flatten(2)).view_as(views)


# ----- training (section 5)
class Run:
    """A training run as it stands between two epochs."""

    PARTS = ("net", "average", "optimizer", "scheduler", "scaler")  # which training changes

    def __init__(self, args: Namespace, train_set: Photos, val_set: Photos) -> None:
        self.args, self.train_set, self.val_set = args, train_set, val_set
        self.device = device = alexnet.pick_device(args.device)
        self.photos = [train_set.digest, val_set.digest]
        self.options = {name: getattr(args, name) for name in args.kept}
        # What a photo of each class counts on val, 1 on average, and the classes' shares.
        counts = torch.tensor(val_set.counts, dtype=torch.float64)
        weights = counts.clip(1) ** -args.balance
        weights *= len(val_set) / (weights @ counts)
        self.class_weights = weights.float().to(device)
        self.shares = (weights * counts / len(val_set)).tolist()
        self.history: list[dict[str, float]] = []  # a row an epoch
        self.lowest = math.inf  # val loss, of the best weights
        self.unsaved: dict[str, Tensor] | None = None  # these, until AlexNet.pth has them
        self.epochs_saved = 0  # in last.pt
        self.next_save = 0.0  # on time.perf_counter()
        # Every 64th pixel of 2,000 photos, RGB in 0..1.
        some = train_set.pixels[:: math.ceil(len(train_set) / 2000), ::8, ::8].reshape(-1, 3) / 255
        covariance = torch.cov(some.T.double())
        # Section 4.1: colours shift along the principal components of the pixels, by their
        # deviations as in the 2012 source; the paper prints variances.
        values, vectors = torch.linalg.eigh(covariance)
        self.color_axes = (vectors * values.clip(0).sqrt()).float().to(device)
        train_set.move_to(device)
        val_set.move_to(device)
        torch.manual_seed(args.seed)
        self.net = AlexNet(len(train_set.classes), args.groups)
        self.net.initialize(args.recipe)
        self.net.mean.copy_(some.mean(0)[:, None, None])
        if args.recipe == "default":  # drawings may have no deviation
            std = covariance.diagonal().clip(1 / 255**2).sqrt()
            self.net.std.copy_(std[:, None, None])
        self.net.to(device, memory_format=alexnet.pick_layout(device))
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)  # evaluated, saved
        settings = {"momentum": args.momentum, "weight_decay": args.weight_decay}
        settings["fused"] = device.type != "mps"  # where it ignored the scaler (pytorch 186360)
        self.optimizer = torch.optim.SGD(self.net.parameters(), args.lr, **settings)
        for p in self.net.parameters():  # unset where the scaler skips the first step
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        rule = {"patience": args.patience, "threshold": 0.01, "eps": 0}  # slower: a drop gains more
        self.scheduler = ReduceLROnPlateau(self.optimizer, **rule)
        precision = alexnet.pick_precision(args.precision, device)
        half = precision != torch.float32
        self.autocast = torch.autocast(device.type, precision if half else None, enabled=half)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.hardware = name_hardware(device, precision)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def is_over(self) -> bool:
        lowest = self.args.lr * 0.1 ** (MAX_LR_DROPS + 0.5)  # above it up to the last drop
        return len(self.history) >= self.args.epochs or self.lr < lowest

    def average_on_host(self) -> dict[str, Tensor]:
        """A copy of the average of the weights, which a machine without the device can load."""
        return {name: x.to("cpu", copy=True) for name, x in self.average.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        facts = {"options": self.options, "photos": self.photos, "history": self.history}
        return facts | {name: getattr(self, name).state_dict() for name in self.PARTS}


def name_hardware(device: torch.device, precision: torch.dtype) -> str:
    """What a run's figures depend on besides its options."""
    name, products = platform.machine(), ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if precision == torch.float32 and torch.cuda.get_device_capability(device)[0] >= 8:
            products = " with products in TF32"  # as pick_device asks for it
    return f"{name}, {device.type}, {precision}{products}, torch {torch.__version__}"


def best_epoch(history: list[dict[str, float]]) -> dict[str, float]:
    """The row of the lowest val loss."""
    return min(history, key=lambda row: row["val_loss"])


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Set a run to where last.pt left it; its best weights are in AlexNet.pth."""
    last = run.args.output / "last.pt"
    if checkpoint.get("photos") != run.photos:
        way = "give its --data as it was, or another --output"
        raise InputError(f"{last} is of a run on other photos to train or val; {way}")
    try:
        for name in run.PARTS:
            if checkpoint[name]:  # empty: of a scaler that was off
                getattr(run, name).load_state_dict(checkpoint[name])
        # From a Mac it comes in another layout, and a CPU's fused SGD would mix the elements.
        for p, state in run.optimizer.state.items():
            state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])
        run.history = list(checkpoint["history"])
    except Exception as error:  # whatever it may hold
        if alexnet.is_out_of_memory(error):
            raise
        raise InputError(f"{last} {OTHER_VERSION}") from error
    run.epochs_saved = len(run.history)
    try:
        run.lowest, _ = evaluate(run, best_network(run))
    except InputError as error:
        print(f"{error}; the last epoch's weights take its place")
        run.lowest = run.history[-1]["val_loss"]
        run.unsaved = run.average_on_host()


def start_from(run: Run) -> None:
    """Take over the weights of --init; of its last layer only for the same classes."""
    path = Path(run.args.init)
    net = alexnet.load_network(path)
    state = net.state_dict()
    if alexnet.load_classes(path, net) != run.train_set.classes:
        del state["classifier.6.weight"], state["classifier.6.bias"]
    try:
        run.net.load_state_dict(state, strict=False)
        run.average.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"{path} is of a run with other --groups; give its") from error


def best_network(run: Run) -> AlexNet:
    """The network in AlexNet.pth; raises InputError if it is not of this run."""
    path = run.args.output / "AlexNet.pth"
    net = alexnet.load_network(path)
    if [p.shape for p in net.parameters()] != [p.shape for p in run.net.parameters()]:
        raise InputError(f"{path} holds the weights of another network")
    return net.to(run.device, memory_format=alexnet.pick_layout(run.device))


def train_one_epoch(run: Run, epoch: int) -> tuple[float, float]:
    """One pass over the photos; returns the mean loss and accuracy, in training mode."""
    # Seed and epoch tell all that is random, so resuming needs no other state.
    args = run.args
    # Every photo once, in random order; by --balance those of rare classes more often.
    weights = torch.tensor(run.train_set.counts)[run.train_set.labels] ** -args.balance
    generator = torch.Generator().manual_seed(seed_of(args.seed, epoch))
    order = weights.multinomial(len(weights), args.balance > 0, generator=generator)
    torch.manual_seed(seed_of(args.seed, epoch, RANK + 1))  # for crops, colours and dropout
    batches = order.split(args.batch_size)
    totals, seen = torch.zeros(2, device=run.device), 0
    run.net.train()
    bar = tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False, disable=NO_BAR)
    for number, batch in enumerate(bar, 1):
        if epoch <= WARMUP_EPOCHS:
            warm = (epoch - 1 + number / len(batches)) / WARMUP_EPOCHS
            run.optimizer.param_groups[0]["lr"] = args.lr * warm
        totals += train_one_batch(run, batch)
        if number % AVERAGE_EVERY == 0 or number == len(batches):
            n = (number - 1) % AVERAGE_EVERY + 1  # steps since the last time
            update_average(run, n, total=(epoch - 1) * len(batches) + number)
        seen += len(batch)
        if number % 20 == 0 or number == len(batches):  # this waits for the device
            loss, accuracy = mean_over_processes(totals, seen, f"epoch {epoch}, lr {run.lr:g}")
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    return loss, accuracy


def seed_of(*numbers: int) -> int:
    """A seed for these numbers; of longer ones a CPU's generator sees the lower 32 bits alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train_one_batch(run: Run, batch: Tensor) -> Tensor:
    """One step of SGD on these photos; returns (loss, right answers), summed."""
    totals = torch.zeros(2, device=run.device)
    images, targets = make_batch(run, batch[RANK::WORLD_SIZE])
    pieces = run.args.accumulate
    if run.device.type == "cpu":  # 64 at once are as fast as more, in less memory
        pieces = max(pieces, math.ceil(len(images) / 64))
    with run.autocast:  # around all pieces: the weights are cast once
        for x, y in zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
            logits, smoothing = run.net(x).float(), run.args.label_smoothing
            loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing)
            # By the size of the whole batch, so that the pieces' gradients add up.
            run.scaler.scale(loss / len(batch)).backward()
            totals += torch.stack([loss.detach(), (logits.argmax(1) == y.argmax(1)).sum()])
    if WORLD_SIZE > 1:
        for p in run.net.parameters():
            dist.all_reduce(p.grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return totals


@torch.no_grad()
def update_average(run: Run, steps: int, total: int) -> None:
    """Move the average of the weights on by some steps: at a high rate they circle it."""
    decay = min(run.args.ema, total / (10 + total)) ** steps  # soon forgets the start
    averages, weights = list(run.average.parameters()), list(run.net.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)


def evaluate(run: Run, net: AlexNet, ten_views: bool = False) -> tuple[float, float]:
    """Loss and accuracy on val, by the central view or the mean of ten."""
    photos, totals = run.val_set, torch.zeros(2, device=run.device)
    batches = torch.arange(len(photos))[RANK::WORLD_SIZE].split(64)
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=NO_BAR):
        pixels, labels = photos.take(batch, run.device)
        with run.autocast:
            probabilities = alexnet.predict_probabilities(net, alexnet.to_float(pixels), ten_views)
        losses = F.nll_loss(probabilities.clamp(min=1e-12).log(), labels, reduction="none")
        found = torch.stack([losses, probabilities.argmax(1) == labels])
        totals += (found * run.class_weights[labels]).sum(1)
    return mean_over_processes(totals, len(photos), "validation")


def is_on_plateau(run: Run) -> bool:
    """Whether no epoch beat the answer that needs no photo, the classes' shares."""
    # Its loss is their entropy; accuracy alone never tells where one class has 95 %.
    entropy = -sum(share * math.log(share) for share in run.shares if share)
    lowest = best_epoch(run.history)["val_loss"]
    highest = max(row["val_accuracy"] for row in run.history)
    return lowest >= 0.98 * entropy and highest <= max(run.shares) + 1e-6 < 1


# ----- files
def save_best(run: Run) -> None:
    """Write the best weights and the names of their classes, if AlexNet.pth lacks them."""
    if run.unsaved:
        with replacing(run.args.output / "AlexNet.pth") as file:
            torch.save(run.unsaved, file)
        names = json.dumps(dict(enumerate(run.train_set.classes)), indent=1)
        with replacing(run.args.output / "class_idx.json") as file:  # an older run's may be there
            file.write(names.encode())
        run.unsaved = None


def save(run: Run) -> None:
    """Write new best weights, then last.pt: a kill in between repeats epochs."""
    output, start = run.args.output, time.perf_counter()
    save_best(run)
    with replacing(output / "last.pt") as file:
        torch.save(run.state_dict(), file)
    run.epochs_saved = len(run.history)
    for name in ("run.json", "kernels.png"):  # of an earlier run, or of this before it went on
        with contextlib.suppress(OSError):
            (output / name).unlink()
    rows = [NAMES, *([f"{x:.6g}" for x in row.values()] for row in run.history)]
    try:
        with replacing(output / "history.csv") as file:
            file.writelines(f"{','.join(row)}\n".encode() for row in rows)
        with replacing(output / "curves.png") as file:
            draw_curves(run.history, max(run.shares)).savefig(file, format="png")
    except OSError as error:  # on Windows one that is open elsewhere
        print(f"warning: {error}", file=sys.stderr)
    run.next_save = time.perf_counter() + SAVE_PAUSE * (time.perf_counter() - start)


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
    label = f"always the largest class: {share:.3f}"
    accuracy.axhline(share, color="tab:red", linestyle="--", linewidth=1, label=label)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def report(run: Run) -> None:
    """Evaluate AlexNet.pth by both kinds of views; write run.json and kernels.png."""
    weights = run.args.output / "AlexNet.pth"
    if not RANK:
        save(run)
    wait_for_others()
    net = best_network(run)
    center, ten = (evaluate(run, net, ten_views)[1] for ten_views in (False, True))
    if RANK:
        return
    # The paper's figure 3: the 96 kernels of conv1, 16 a row, the upper 48 of one GPU.
    kernels = F.interpolate(net.features[1].weight, scale_factor=5.0)  # 55 pixels a side
    with replacing(weights.with_name("kernels.png")) as file:
        save_image(kernels, file, format="png", nrow=16, padding=5, pad_value=1, normalize=True)
    facts = {
        "options": run.options,
        "photos": {"train": run.train_set.counts, "val": run.val_set.counts},
        "epochs": len(run.history),
        "best_epoch": best_epoch(run.history)["epoch"],
        "val_accuracy": {"center-crop": center, "ten-crop": ten},
        "hardware": run.hardware,
    }
    with replacing(weights.with_name("run.json")) as file:
        file.write(json.dumps(facts, indent=1).encode())
    print(f"{weights}: accuracy on val {center:.4f} by center-crop, {ten:.4f} by ten-crop")
    print(f"now classify a photo: python predict.py PHOTO --weights {weights}")


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Tells each default, and leaves the lines of the description as they are."""


def parse_args(argv: list[str] | None) -> Namespace:
    """All options; `kept` names those of a run, and `typed` are those of them that were given."""
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    share, count = number_within(0.0, 1.0), number_within(1, 2**20)

    # These may be others when a run is resumed.
    add = parser.add_argument
    add("--data", type=Path, default="data", help="the folder that split_data.py made")
    add("--output", type=Path, default=".", help="the folder to write into")
    way = parser.add_mutually_exclusive_group().add_argument
    way("--resume", action="store_true", help="go on with the run in --output, with its options")
    way("--overwrite", action="store_true", help="replace the run in --output")
    add("--accumulate", type=count, default=1, help="pieces of a batch, to save memory")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: the fastest there is")
    precisions = ("auto", "float32", "bfloat16", "float16")
    auto = "auto: bfloat16 where it is native, float16 on older CUDA cards"
    add("--precision", choices=precisions, default="auto", help=auto)

    # These are stored in last.pt and restored by --resume.
    paper = "--recipe paper: " + ", ".join(f"{name} {value}" for name, value in PAPER.items())
    add = parser.add_argument_group("options of a run", paper.replace("_", "-")).add_argument
    add("--recipe", choices=("default", "paper"), default="default", help="the paper's start, too")
    add("--init", default="", help="an AlexNet.pth to start from; other classes: a new last layer")
    add("--epochs", type=count, default=90, help="passes over the photos; --resume takes more")
    add("--batch-size", type=count, default=32, help="photos a step, of all processes together")
    add("--lr", type=number_within(1e-12, 1e9), default=0.01, help="learning rate of SGD")
    add("--momentum", type=share, default=0.9, help="of SGD")
    add("--weight-decay", type=share, default=0.0005, help="of SGD")
    add(
        "--ema",
        type=share,
        default=0.99,
        help="decay of the average of the weights, which is saved",
    )
    add("--label-smoothing", type=share, default=0.1, help="share of the answer spread over all")
    patience = "divide lr by 10 after this many epochs without a 1 %% lower val loss"
    add("--patience", type=number_within(0, 2**20), default=10, help=patience)
    crop_area = "smallest part of a photo in a crop; 0: 224 x 224 of 256 x 256"
    add("--crop-area", type=share, default=0.25, help=crop_area)
    rotation = "degrees by which crops turn at most; grows over 60 epochs"
    add("--rotation", type=number_within(0.0, 180.0), default=30.0, help=rotation)
    jitter = "largest change of brightness, contrast and saturation; grows, too"
    add("--jitter", type=share, default=0.4, help=jitter)
    mix = "share of photos mixed with others, by CutMix and by mixup"
    add("--mix", type=share, default=0.5, help=mix)
    balance = "1: every class counts alike; 0: every photo; also between"
    add("--balance", type=share, default=0.0, help=balance)
    groups = "2: as on the paper's two GPUs; 1: merged, for 1.4 times the time"
    add("--groups", type=int, choices=(1, 2), default=2, help=groups)
    seed = "of weights, order, crops and dropout"
    add("--seed", type=number_within(0, 2**32), default=0, help=seed)

    args = parser.parse_args(argv)
    kept = [name for name in vars(args) if name not in FREE]
    # Parsed once more without defaults, what was not typed is None.
    blank = Namespace(**dict.fromkeys(vars(args)))
    again = vars(parser.parse_args(argv, blank))
    typed = {name: again[name] for name in kept if again[name] is not None}
    if args.recipe == "paper":
        vars(args).update(PAPER | typed)
    args.kept, args.typed = kept, typed
    return args


def number_within(least: float, most: float) -> Callable[[str], float]:
    """A type of argparse: numbers of the limits' own type."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not least <= value <= most:
            raise ArgumentTypeError(f"must be within {least} to {most}")
        return value

    return number


# ----- several processes, a card each, by torchrun
# Each takes every WORLD_SIZE-th photo of a batch; process 0 alone writes and prints.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
NO_BAR = RANK > 0 or None  # None: a bar where somebody watches


def connect_processes(args: Namespace) -> None:
    """NCCL carries the gradients between CUDA cards, gloo between CPUs (and cards of Windows)."""
    if WORLD_SIZE > 1:
        patience = timedelta(days=1)  # decoding may take hours
        if torch.cuda.is_available() and args.device != "cpu":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        elif args.device in ("auto", "cpu"):  # gloo knows no MPS
            args.device = "cpu"
        else:
            raise InputError(f"--device {args.device}: torchrun needs CUDA cards, or CPUs")
        device = alexnet.pick_device(args.device)
        if device.type == "cuda" and dist.is_nccl_available():  # Windows has none
            dist.init_process_group("nccl", timeout=patience, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=patience)
        atexit.register(leave_others)
    if RANK:
        sys.stdout = open(os.devnull, "w")


def leave_others() -> None:
    """End a process that failed: to take leave of the others would wait for them, for ever."""
    if dist.is_initialized():  # main did not come to its end
        sys.stderr.flush()
        os._exit(1)


def wait_for_others() -> None:
    if WORLD_SIZE > 1:
        dist.barrier()


def mean_over_processes(totals: Tensor, n: int, where: str) -> tuple[float, float]:
    """Loss and accuracy from the sums over n photos; raises InputError if they are nan."""
    totals = totals.clone()
    if WORLD_SIZE > 1:
        dist.all_reduce(totals)
    # In float32 three of five would be more than 0.6, the largest class's share.
    loss, accuracy = (total / n for total in totals.tolist())
    if not math.isfinite(loss):
        raise InputError(f"the loss is no number ({where}); start with a lower --lr")
    return loss, accuracy


if __name__ == "__main__":
    sys.exit(main())
