"""Train AlexNet from scratch on data/train, watch it on data/val, keep the best weights.

    python train.py                                   # 90 epochs at most; Ctrl-C stops it
    python train.py --resume                          # goes on after the last whole epoch
    python train.py --data my_data --output my_run --epochs 30 --batch-size 128
    torchrun --nproc-per-node 4 train.py --batch-size 128     # on four cards

Writes into --output: last.pt (what --resume needs), AlexNet.pth (the best epoch's weights),
class_idx.json, history.csv, curves.png, and at the end run.json and kernels.png. The decoded
photos are kept beside the data, as train.packed.npy and val.packed.npy.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import io
import itertools
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from alexnet import (
    CROP_SIZE,
    IMAGE_SIZE,
    AlexNet,
    InputError,
    center_square,
    describe,
    image_files,
    is_out_of_memory,
    load_tensors,
    photos_at_once,
    pick_device,
    predict_probabilities,
    read_image,
    remove_leftovers,
    replacing,
    setup_console,
    to_float,
)

if TYPE_CHECKING:  # imported where something is drawn, when setup_console has had its say
    from matplotlib.figure import Figure

WARMUP_EPOCHS = 3  # the learning rate rises to --lr over these
LR_FACTOR = 0.1  # section 5: divided by 10 when the validation error stops improving,
MAX_LR_DROPS = 3  # and three times in all
STUCK_EPOCHS = 6  # as many on the starting plateau, and the user is told
COLOR_NOISE = 0.1  # section 4.1: standard deviation of the random weights
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of the random crops
CPU_PIECE = 64  # photos that a CPU takes at once
CHECK_EVERY = 20  # batches between two looks at the loss, each of which waits for the device
COLUMNS = (  # of a row of the history, behind the epoch
    "lr train_loss train_accuracy val_loss val_accuracy seconds images_per_second"
).split()
# torchrun starts many processes, a card each; alone, this is process 0 of 1. All draw the same
# epoch and take every WORLD_SIZE-th photo of a batch; process 0 writes, the others wait for it.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
NO_BAR = RANK > 0 or None  # None: a bar where somebody watches
# What --resume takes from last.pt; everything else comes from the command line.
RUN_OPTIONS = (
    "recipe batch_size lr momentum weight_decay ema label_smoothing patience crop_area cutmix "
    "groups seed"
).split()
# The defaults of --recipe paper; its weights and biases are AlexNet.initialize_as_2012.
PAPER = {"batch_size": 128, "ema": 0.0, "label_smoothing": 0.0, "crop_area": 0.0, "cutmix": 0.0}


def main(argv: list[str] | None = None) -> int:
    setup_console()
    args = parse_args(argv)
    try:
        with processes(args.device):
            train(args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {describe(error)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(
            f"error: out of memory at --batch-size {args.batch_size} --accumulate "
            f"{args.accumulate}; a larger --accumulate computes the same batch in smaller pieces"
        ) from error
    except KeyboardInterrupt:
        saved = (args.output / "last.pt").exists()
        how = "--resume goes on with the run in last.pt" if saved else "no epoch was whole yet"
        print(f"\nstopped; {how}", file=sys.stderr)
        return 130
    return 0


def keep_large_blocks() -> None:
    """Have glibc keep the memory of large tensors, instead of giving it back after each use.

    The kernel maps and zeroes fresh memory page by page, a tenth of a training step on a CPU.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GB may lie free


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Connect the processes of torchrun; all but process 0 are silent. Nothing where there is one.

    NCCL carries the gradients between CUDA cards, gloo between CPUs.
    """
    if WORLD_SIZE == 1:
        yield
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    a_day = datetime.timedelta(days=1)  # packing may take hours, and the others wait for it
    dist.init_process_group("nccl" if cuda else "gloo", timeout=a_day)
    quiet = contextlib.redirect_stdout(open(os.devnull, "w")) if RANK else contextlib.nullcontext()
    with quiet:
        yield
    dist.destroy_process_group()


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Process 0 goes through the block before the others do."""
    if RANK:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and not RANK:
        dist.barrier()


def sum_over_processes(numbers: Tensor) -> Tensor:
    if WORLD_SIZE > 1:
        numbers = numbers.clone()
        dist.all_reduce(numbers)
    return numbers


def train(args: argparse.Namespace) -> None:
    keep_large_blocks()
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    checkpoint = open_checkpoint(args)
    with process_0_first():
        train_set = pack(args.data / "train", args.output)
        val_set = pack(args.data / "val", args.output, train_set.classes)
    run = Run(args, train_set, val_set, device, precision)
    if checkpoint:
        load_checkpoint(run, checkpoint)
    print_facts(run)
    if RANK == 0:
        prepare_output(run)
        if checkpoint:
            write_results(run)
    if run.has_ended():
        print(f"nothing left to do: the run has ended after epoch {len(run.history)}")
    else:
        print("epoch       lr   train loss  accuracy   val loss  accuracy   images/s  seconds")
    while not run.has_ended():
        run_epoch(run)
        if RANK == 0:
            save_checkpoint(run)
            (args.output / "run.json").unlink(missing_ok=True)
            write_results(run)
            print_epoch(run)
    report(run)


# ------------------------------------------------------------------------------- precision


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products: bfloat16 where it is native, unless told otherwise."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"):
            return torch.bfloat16
    return torch.float32


# ------------------------------------------------------------------------------- the photos


@dataclass
class Pack:
    """A folder of photos, decoded, in a file that is mapped into memory rather than read."""

    photos: np.ndarray  # uint8 (N, 256, 256, 3)
    labels: Tensor  # int64 (N,), indices into classes
    classes: list[str]
    mean: Tensor  # float32 (3,), of the RGB values in 0..1
    covariance: Tensor  # float32 (3, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> list[int]:
        """Photos of each class."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def largest_share(self) -> float:
        """The accuracy of always answering the largest class."""
        return max(self.counts()) / len(self)


def pack(folder: Path, output: Path, classes: list[str] | None = None) -> Pack:
    """The photos folder/CLASS/*, decoded once into a .npy beside it (or in `output`).

    `classes` are the training set's, among which the photos' own must be. Raises InputError.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; run split_data.py first, or give --data")
    files = [path for path in image_files(folder) if path.parent != folder]
    names = [path.relative_to(folder).as_posix() for path in files]
    own_classes = sorted({name.split("/")[0] for name in names})
    if len(own_classes) < (1 if classes else 2):
        raise InputError(f"{folder} holds photos of {len(own_classes)} classes, which is too few")
    classes = classes or own_classes
    if unknown := set(own_classes) - set(classes):
        raise InputError(f"{folder} has a class that train lacks: {', '.join(sorted(unknown))}")
    stats = [path.stat() for path in files]
    facts = [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)]
    places = [place / f"{folder.name}.packed.npy" for place in (folder.parent, output)]
    found = [(p, record) for p in places if (record := read_record(p)).get("files") == facts]
    array, record = found[0] if found else make_pack(files, facts, places)
    return Pack(
        photos=np.load(array, mmap_mode="r"),
        labels=torch.tensor([classes.index(name.split("/")[0]) for name in names]),
        classes=classes,
        mean=torch.tensor(record["mean"]),
        covariance=torch.tensor(record["covariance"]),
    )


def read_record(array: Path) -> dict[str, Any]:
    """What the pack `array` was made from; empty if it is not whole."""
    try:
        record = json.loads(array.with_suffix(".json").read_text(encoding="utf-8"))
        shape = (len(record["files"]), IMAGE_SIZE, IMAGE_SIZE, 3)
        pixels = np.load(array, mmap_mode="r")
        numbers = np.array([record["mean"], *record["covariance"]], dtype=float)
        whole = pixels.shape == shape and pixels.dtype == np.uint8 and numbers.shape == (4, 3)
        return record if whole and np.isfinite(numbers).all() else {}
    except Exception:  # whatever may stand in such files; the photos are there to make them again
        return {}


def make_pack(
    files: list[Path], facts: list[list], places: list[Path]
) -> tuple[Path, dict[str, Any]]:
    """Write the pack to the first of `places` whose folder can be written; (place, record)."""
    array = places[0]
    if not can_write(array.parent):
        array = places[1]
        print(f"{places[0].parent} cannot be written to, so the packed photos go to {array}")
        array.parent.mkdir(parents=True, exist_ok=True)
    # An array without its record counts for nothing, so the record goes first and comes last.
    array.with_suffix(".json").unlink(missing_ok=True)
    with replacing(array) as file:
        total, products = write_photos(file, files, array)
    n = len(files) * IMAGE_SIZE**2
    mean = total / n
    covariance = products / n - np.outer(mean, mean)
    scaled = {"mean": (mean / 255).tolist(), "covariance": (covariance / 255**2).tolist()}
    record = {"files": facts} | scaled
    write_text(array.with_suffix(".json"), json.dumps(record))
    return array, record


def can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_photos(file: Any, files: list[Path], array: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode on all cores and write in order; returns the sums of RGB and of their products.

    The sums are of integers below 2^53 in float64, so exact, whatever the order.
    """

    def decode(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
        try:
            pixels = np.asarray(center_square(read_image(path)))
        except InputError as error:
            raise InputError(f"{error}; take it away, or run split_data.py again") from error
        values = pixels.reshape(-1, 3).astype(np.float64)
        return pixels.tobytes(), values.sum(0), values.T @ values

    shape = (len(files), IMAGE_SIZE, IMAGE_SIZE, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    total, products = np.zeros(3), np.zeros((3, 3))
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(files), desc=f"packing {array.stem}", unit="photo", disable=NO_BAR) as bar,
    ):
        for start in range(0, len(files), 256):  # no more than these wait to be written
            for data, photo_total, photo_products in threads.map(
                decode, files[start : start + 256]
            ):
                file.write(data)
                total += photo_total
                products += photo_products
                bar.update()
    return total, products


# ------------------------------------------------------------------- augmentation (section 4.1)


@dataclass
class Draws:
    """All that is random in the input of one epoch, for n photos in the order of their turn."""

    order: Tensor  # int64 (n,), indices of photos
    boxes: Tensor  # float32 (n, 4): left, top, width, height of the crop, in pixels of 256
    flips: Tensor  # bool (n,)
    noise: Tensor  # float32 (n, 3), added to RGB in 0..1
    windows: Tensor  # float32 (n, 4): left, top, right, bottom, in pixels of the crop
    partners: Tensor  # int64 (n,): the row whose crop is seen in the window


def draw_epoch(
    train_set: Pack, seed: int, epoch: int, crop_area: float, cutmix: float = 0.0
) -> Draws:
    """Draw from a generator that (seed, epoch) alone determine, so resuming needs no state."""
    n = len(train_set)
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return Draws(
        order=torch.randperm(n, generator=generator),
        boxes=draw_boxes(n, crop_area, generator),
        flips=torch.rand(n, generator=generator) < 0.5,
        noise=draw_color_noise(n, train_set.covariance, generator),
        windows=draw_windows(n, cutmix, generator),
        partners=torch.randperm(n, generator=generator),
    )


def epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_000 + epoch


def draw_boxes(n: int, crop_area: float, generator: torch.Generator) -> Tensor:
    """Crops of the 256 square, (n, 4): area from crop_area to 1 of it, aspect 3/4 to 4/3.

    crop_area = 0 draws the paper's: a 224 square at one of 33 x 33 places.
    """
    if not crop_area:
        corners = torch.randint(IMAGE_SIZE - CROP_SIZE + 1, (n, 2), generator=generator).float()
        return torch.cat([corners, torch.full((n, 2), float(CROP_SIZE))], dim=1)
    tries = 10
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    area = torch.empty(n, tries).uniform_(crop_area, 1, generator=generator) * IMAGE_SIZE**2
    aspect = torch.empty(n, tries).uniform_(low, high, generator=generator).exp()
    sizes = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=2)  # width, height
    fits = (sizes <= IMAGE_SIZE).all(2)
    first = fits.float().argmax(1)
    chosen = sizes[torch.arange(n), first]
    chosen[~fits.any(1)] = IMAGE_SIZE
    corners = torch.rand(n, 2, generator=generator) * (IMAGE_SIZE - chosen)
    return torch.cat([corners, chosen], dim=1)


def draw_color_noise(n: int, covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts of RGB along the principal components p_i of the training set's pixels, (n, 3).

    Their size is a_i * sqrt(lambda_i), a_i from N(0, 0.1), as in the 2012 source: 7 of 255 grey
    levels or so. The paper prints a_i * lambda_i, which depends on the scale of the pixels.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    axes = (eigenvectors * eigenvalues.clamp(min=0).sqrt()).float()  # columns
    return COLOR_NOISE * torch.randn(n, 3, generator=generator) @ axes.T


def draw_windows(n: int, share: float, generator: torch.Generator) -> Tensor:
    """CutMix (Yun and others 2019): squares to be covered by another photo, (n, 4).

    Their areas are uniform in 0..1 of the crop, their centres in it, and its edges cut them off.
    All but a share of the photos have a window without area.
    """
    center = torch.rand(n, 2, generator=generator) * CROP_SIZE
    half = torch.rand(n, 1, generator=generator).sqrt() * CROP_SIZE / 2
    half *= torch.rand(n, 1, generator=generator) < share
    return torch.cat([center - half, center + half], dim=1).round().clamp(0, CROP_SIZE)


def augment(images: Tensor, boxes: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
    """Cut, scale to 224, flip and shift in colour a batch (N, 3, 256, 256) on its device."""
    left, top, width, height = boxes.T[:, :, None] / IMAGE_SIZE  # each (N, 1)
    # Where in the photo, in -1..1, the crop's columns and rows lie, each (N, 224).
    steps = (2 * torch.arange(CROP_SIZE, device=images.device) + 1) / CROP_SIZE - 1
    x = 2 * left + width - 1 + torch.where(flips[:, None], -width, width) * steps
    y = 2 * top + height - 1 + height * steps
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    # Clamping is padding_mode="border", which MPS lacks; there it wants contiguous images, too.
    grid = grid.clamp(1 / IMAGE_SIZE - 1, 1 - 1 / IMAGE_SIZE)
    crops = F.grid_sample(images.contiguous(), grid, align_corners=False)
    return crops.add_(noise[:, :, None, None])


def make_batch(
    train_set: Pack, draws: Draws, rows: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The images (n, 3, 224, 224) in 0..1 of some rows of the draws, and targets (n, classes).

    A target is what the pixels belong to: shares of 1, of two classes behind CutMix.
    """
    images, labels = make_crops(train_set, draws, rows, device)
    targets = F.one_hot(labels, len(train_set.classes)).float()
    windows = draws.windows[rows]
    areas = (windows[:, 2:] - windows[:, :2]).prod(1) / CROP_SIZE**2
    if covered := areas.nonzero()[:, 0].tolist():
        others, labels = make_crops(train_set, draws, draws.partners[rows[covered]], device)
        windows, areas = (x[covered].to(device, non_blocking=True) for x in (windows, areas))
        left, top, right, bottom = windows.T[:, :, None]  # each (N, 1)
        steps = torch.arange(CROP_SIZE, device=device)
        across, down = (steps >= left) & (steps < right), (steps >= top) & (steps < bottom)
        inside = down[:, None, :, None] & across[:, None, None, :]
        images[covered] = torch.where(inside, others, images[covered])
        other_targets = F.one_hot(labels, len(train_set.classes)).float()
        targets[covered] = targets[covered].lerp(other_targets, areas[:, None])
    return images, targets


def make_crops(
    train_set: Pack, draws: Draws, rows: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The images (n, 3, 224, 224) in 0..1, none covered, and labels (n,) of some rows."""
    order = draws.order[rows]
    photos = torch.from_numpy(train_set.photos[order.numpy()])
    parts = [draws.boxes[rows], draws.flips[rows], draws.noise[rows], train_set.labels[order]]
    if device.type == "cuda":
        photos = photos.pin_memory()  # else the copy would wait for the device
    photos, *parts, labels = (x.to(device, non_blocking=True) for x in (photos, *parts))
    return augment(to_float(photos), *parts), labels


# ------------------------------------------------------------------------ training (section 5)


class Run:
    """A training run, as it stands between two epochs; new ones stand at their start."""

    def __init__(
        self,
        args: argparse.Namespace,
        train_set: Pack,
        val_set: Pack,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self.args, self.train_set, self.val_set = args, train_set, val_set
        self.device, self.precision = device, precision
        self.history: list[dict[str, float]] = []  # a row an epoch
        torch.manual_seed(args.seed)
        self.net = AlexNet(len(train_set.classes), args.groups)
        self.net.mean.copy_(train_set.mean[:, None, None])
        variance = train_set.covariance.diagonal().clamp(min=1 / 255**2)  # drawings may have none
        self.net.std.copy_(variance.sqrt()[:, None, None])
        if args.recipe == "paper":
            self.net.initialize_as_2012()
        self.net.to(device, memory_format=torch.channels_last)
        self.model = self.net  # as training calls it
        if WORLD_SIZE > 1:
            self.model = DistributedDataParallel(self.net, broadcast_buffers=False)
        # The average of the weights over the last steps, which is evaluated and saved.
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        parameters = list(self.net.parameters())
        self.optimizer = torch.optim.SGD(
            parameters, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
        )
        for parameter in parameters:  # garbage, if the scaler skips the first step
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, factor=LR_FACTOR, patience=args.patience, eps=0
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def best(self) -> dict[str, float]:
        """The row of the best epoch: highest validation accuracy, the lower loss of equal ones."""
        return max(self.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))

    def has_ended(self) -> bool:
        """Whether all epochs are done, or another drop of the learning rate would be due."""
        epochs = len(self.history)
        drops = round(math.log(self.lr / self.args.lr, LR_FACTOR)) if epochs >= WARMUP_EPOCHS else 0
        return epochs >= self.args.epochs or drops > MAX_LR_DROPS


def run_epoch(run: Run) -> None:
    """Train, evaluate, lower the learning rate if it is time to."""
    epoch = len(run.history) + 1
    start = time.perf_counter()
    train_loss, train_accuracy = train_one_epoch(run, epoch)
    train_seconds = time.perf_counter() - start
    val_loss, val_accuracy = evaluate(run, "center-crop")
    run.history.append(
        {
            "epoch": epoch,
            "lr": run.lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": time.perf_counter() - start,
            "images_per_second": len(run.train_set) / train_seconds,
        }
    )
    # While a net answers the largest class alone its epochs tie, and a tie counts as a bad epoch:
    # the learning rate would be lowered just where it is needed.
    has_left_plateau = run.best()["val_accuracy"] > run.val_set.largest_share()
    if epoch > WARMUP_EPOCHS and has_left_plateau:
        run.scheduler.step(val_loss)


def train_one_epoch(run: Run, epoch: int) -> tuple[float, float]:
    """One pass over the training set; returns its mean loss and accuracy, in training mode."""
    args, n = run.args, len(run.train_set)
    draws = draw_epoch(run.train_set, args.seed, epoch, args.crop_area, args.cutmix)
    torch.manual_seed(epoch_seed(args.seed, epoch) + (RANK << 40))  # for dropout
    run.net.train()
    batches = torch.arange(n).split(args.batch_size)
    totals = torch.zeros(2, device=run.device)  # loss and right answers, summed over photos
    with tqdm(total=n, desc=f"epoch {epoch}", unit="image", leave=False, disable=NO_BAR) as bar:
        for number, batch in enumerate(batches, start=1):
            if epoch <= WARMUP_EPOCHS:
                warm = (epoch - 1 + number / len(batches)) / WARMUP_EPOCHS
                run.optimizer.param_groups[0]["lr"] = args.lr * warm
            totals += train_one_batch(run, draws, batch)
            update_average(run, steps=(epoch - 1) * len(batches) + number)
            bar.update(len(batch))
            if number % CHECK_EVERY == 0 or number == len(batches):
                seen = min(number * args.batch_size, n)
                loss, accuracy = (sum_over_processes(totals) / seen).tolist()
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss is no longer a number in epoch {epoch}, batch {number}, at the "
                        f"learning rate {run.lr:g}; start again with a lower --lr"
                    )
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    return loss, accuracy


def train_one_batch(run: Run, draws: Draws, batch: Tensor) -> Tensor:
    """A step of SGD on some rows of the draws; returns (loss, right answers), summed."""
    totals = torch.zeros(2, device=run.device)
    pieces = run.args.accumulate
    if run.device.type == "cpu":  # which is as fast on a few photos, in a fraction of the memory
        pieces = max(pieces, math.ceil(len(batch) / CPU_PIECE))
    with run.autocast():  # around all pieces, so that the weights are cast once
        for piece in batch[RANK::WORLD_SIZE].tensor_split(pieces):
            images, targets = make_batch(run.train_set, draws, piece, run.device)
            logits = run.model(images)
            smoothing = run.args.label_smoothing
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # Summed over the piece and divided by the batch: pieces add up to its gradient. Over
            # processes the gradients are averaged, hence their number.
            run.scaler.scale(loss * (WORLD_SIZE / len(batch))).backward()
            totals += torch.stack([loss.detach(), (logits.argmax(1) == targets.argmax(1)).sum()])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return totals


@torch.no_grad()
def update_average(run: Run, steps: int) -> None:
    """Move the exponential moving average of the weights on, after so many steps in all.

    At a high learning rate the weights circle around a good place; their average lies in it.
    """
    decay = min(run.args.ema, steps / (10 + steps))  # forgets the first steps soon
    for average, parameter in zip(run.average.parameters(), run.net.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def evaluate(run: Run, views: str) -> tuple[float, float]:
    """Loss and accuracy on the validation set, by the mean of the views' probabilities."""
    totals = torch.zeros(2, device=run.device)
    rows = torch.arange(len(run.val_set))[RANK::WORLD_SIZE].split(photos_at_once(views))
    for batch in tqdm(rows, desc=f"evaluating, {views}", leave=False, disable=NO_BAR):
        photos = torch.from_numpy(run.val_set.photos[batch.numpy()]).to(run.device)
        labels = run.val_set.labels[batch].to(run.device)
        with run.autocast():
            probabilities = predict_probabilities(run.average, to_float(photos), views)
        loss = F.nll_loss(probabilities.clamp(min=1e-12).log(), labels, reduction="sum")
        totals += torch.stack([loss, (probabilities.argmax(1) == labels).sum()])
    # Divided in Python: in float32 three of five are more than 0.6, the largest class's share.
    totals = sum_over_processes(totals)
    loss, accuracy = (total / len(run.val_set) for total in totals.tolist())
    if not math.isfinite(loss):
        raise InputError("the validation loss is not a number; start again with a lower --lr")
    return loss, accuracy


# ------------------------------------------------------------------------------- files


def open_checkpoint(args: argparse.Namespace) -> dict[str, Any] | None:
    """last.pt, if --resume asks for it; its options replace those of the command line.

    Raises InputError where there is none, or where a fresh run would replace an earlier one.
    """
    last, best = args.output / "last.pt", args.output / "AlexNet.pth"
    if not args.resume:
        if not args.overwrite and (last.exists() or best.exists()):
            raise InputError(
                f"{args.output} holds an earlier run; --resume goes on with it, --output writes "
                "elsewhere, --overwrite replaces it"
            )
        return None
    if not last.exists():
        raise InputError(f"there is no {last} to go on with; run without --resume")
    checkpoint = load_tensors(last, mmap=False)
    parts = dict.fromkeys(("options", "net", "average", "optimizer", "scheduler", "scaler"), dict)
    parts |= {"classes": list, "history": list}
    try:
        if not all(isinstance(checkpoint.get(name), kind) for name, kind in parts.items()):
            raise ValueError("parts are missing")
        options = checkpoint["options"]
        argv = [f"--{name.replace('_', '-')}={options[name]}" for name in RUN_OPTIONS]
        with contextlib.redirect_stderr(io.StringIO()):  # the same ranges hold as for the user
            parsed = parse_args(argv)
    except (Exception, SystemExit) as error:  # whatever such a file may hold in their place
        raise InputError(f"{last} is no checkpoint of train.py") from error
    for name in RUN_OPTIONS:
        saved = getattr(parsed, name)
        if name in args.given and getattr(args, name) != saved:
            raise InputError(
                f"{last} is of a run with --{name.replace('_', '-')} {saved}; leave the option "
                "out, or start another run with another --output"
            )
        setattr(args, name, saved)
    return checkpoint


def load_checkpoint(run: Run, checkpoint: dict[str, Any]) -> None:
    """Set a run to where the checkpoint left it; raises InputError if it does not fit."""
    last = run.args.output / "last.pt"
    if checkpoint["classes"] != run.train_set.classes:
        classes = ", ".join(map(str, checkpoint["classes"]))
        raise InputError(
            f"{last} is of a run with other classes than {run.args.data} has ({classes}); give "
            "its own --data, or another --output"
        )
    try:
        take_over(run, checkpoint)
    except Exception as error:  # whatever such a file may hold in their place
        raise InputError(f"{last} is of another network; start again with --overwrite") from error
    tensors = [*run.net.state_dict().values(), *run.average.state_dict().values()]
    tensors += [state["momentum_buffer"] for state in run.optimizer.state.values()]
    numbers = [value for row in run.history for value in row.values()]
    finite = all(map(math.isfinite, numbers)) and all(x.isfinite().all() for x in tensors)
    if not (run.history and 0 < run.lr < math.inf and finite):
        raise InputError(f"{last} holds no run that can go on; start again with --overwrite")
    if not torch.allclose(run.net.mean.flatten().cpu(), run.train_set.mean, rtol=0, atol=1e-5):
        raise InputError(f"{run.args.data} does not hold the photos that {last} was trained on")


def take_over(run: Run, checkpoint: dict[str, Any]) -> None:
    """Take what training changes, and only as what it should be: the file may be anybody's."""
    run.net.load_state_dict(checkpoint.pop("net"))  # popped, so that no tensor is held twice
    run.average.load_state_dict(checkpoint.pop("average"))
    optimizer, scheduler = checkpoint.pop("optimizer"), checkpoint["scheduler"]
    for number, parameter in enumerate(run.net.parameters()):
        buffer = run.optimizer.state[parameter]["momentum_buffer"]
        # dict(): a tensor there would take any index
        buffer.copy_(dict(dict(optimizer["state"])[number])["momentum_buffer"])
    run.optimizer.param_groups[0]["lr"] = float(dict(optimizer["param_groups"][0])["lr"])
    kinds = {"best": float, "num_bad_epochs": int, "last_epoch": int}
    run.scheduler.load_state_dict({name: kind(scheduler[name]) for name, kind in kinds.items()})
    if run.scaler.is_enabled() and checkpoint["scaler"]:
        own = run.scaler.state_dict()
        saved = {name: type(own[name])(checkpoint["scaler"][name]) for name in own}
        run.scaler.load_state_dict(saved)
    for epoch, row in enumerate(checkpoint["history"], start=1):
        values = {name: float(dict(row)[name]) for name in COLUMNS}
        run.history.append({"epoch": epoch} | values)


def prepare_output(run: Run) -> None:
    """Make sure that the files have room; write class_idx.json."""
    output = run.args.output
    output.mkdir(parents=True, exist_ok=True)
    large = (output / "last.pt", output / "AlexNet.pth")
    for path in large:
        remove_leftovers(path)
    old = [path for path in large if path.exists()]
    free = shutil.disk_usage(output).free + sum(path.stat().st_size for path in old)
    if free < disk_needed(run):
        needed = f"{disk_needed(run) / 1e9:.1f}"
        raise InputError(f"{output} has {free / 1e9:.1f} GB free, and the run needs {needed}")
    if not old:  # an earlier run's files stand until an epoch of this one is whole
        write_classes(run)


def write_classes(run: Run) -> None:
    index = {str(i): label for i, label in enumerate(run.train_set.classes)}
    write_text(run.args.output / "class_idx.json", json.dumps(index, indent=1, ensure_ascii=False))


def disk_needed(run: Run) -> int:
    """Bytes: AlexNet.pth; last.pt (weights, their average, momentum), twice while replaced."""
    return (1 + 3 + 3) * 4 * sum(p.numel() for p in run.net.parameters())


def save_checkpoint(run: Run) -> None:
    """Write last.pt, which makes an epoch count: the other files follow from it."""
    checkpoint = {
        "options": {name: getattr(run.args, name) for name in RUN_OPTIONS},
        "classes": run.train_set.classes,
        "net": run.net.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "history": run.history,
    }
    save_tensors(run.args.output / "last.pt", checkpoint)


def write_results(run: Run) -> None:
    """Write what follows from last.pt; a resumed run does so first, in case it was killed here."""
    output = run.args.output
    write_classes(run)
    if run.best() is run.history[-1]:
        save_tensors(output / "AlexNet.pth", run.average.state_dict())
    write_text(output / "history.csv", history_text(run.history))
    with replacing(output / "curves.png") as file:
        figure = draw_curves(run.history, run.val_set.largest_share(), run.best())
        figure.savefig(file, format="png")


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch puts its own in place of the file's: a full disk
            raise OSError(f"{path} cannot be written: {error.__context__ or error}") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # odd names on disk


def history_text(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in history)
    return text.getvalue()


def draw_curves(
    history: list[dict[str, float]], largest_share: float, best: dict[str, float]
) -> Figure:
    """Loss and accuracy of both sets by epoch; the drops of the learning rate, the best epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    loss, accuracy = figure.subplots(1, 2)
    # Curves of the loss leave the top free, those of the accuracy the bottom.
    for axis, name, free in ((loss, "loss", "top"), (accuracy, "accuracy", "bottom")):
        for side in ("train", "val"):
            axis.plot(epochs, [row[f"{side}_{name}"] for row in history], label=side, marker=".")
        for before, after in itertools.pairwise(history):
            if after["lr"] < before["lr"]:
                x, text = before["epoch"] + 0.5, f" lr {after['lr']:.2g} "
                axis.axvline(x, color="gray", linewidth=0.8)
                place = {"transform": axis.get_xaxis_transform(), "rotation": 90, "va": free}
                axis.text(x, float(free == "top"), text, color="gray", fontsize=9, **place)
        label = f"best on val: epoch {best['epoch']}, accuracy {best['val_accuracy']:.3f}"
        star = {"marker": "*", "markersize": 13, "linestyle": "", "zorder": 3, "color": "black"}
        axis.plot(best["epoch"], best[f"val_{name}"], label=label, **star)
        axis.set(xlabel="epoch", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
    label = f"always the largest class: {largest_share:.3f}"
    accuracy.axhline(largest_share, color="tab:red", linestyle="--", linewidth=1, label=label)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_kernels(weight: Tensor, groups: int) -> Tensor:
    """The 96 kernels of the first layer as a picture (3, H, W) in 0..1 (the paper's figure 3).

    16 a row, on one common scale; with groups=2 a wider gap parts the 48 of each GPU.
    """
    low, high = weight.aminmax()
    kernels = F.interpolate((weight - low) / (high - low), scale_factor=5.0)  # 55 pixels a side
    halves = kernels.split(len(kernels) // groups)
    grids = [make_grid(half, nrow=16, padding=5, pad_value=1) for half in halves]
    gap = 20
    return torch.cat([F.pad(grid, (0, 0, 0, gap), value=1) for grid in grids], dim=1)[:, :-gap]


def report(run: Run) -> None:
    """Evaluate the best weights by ten views too; write run.json and kernels.png."""
    output, best = run.args.output, run.best()
    try:
        with process_0_first():
            best_net = AlexNet.from_state_dict(load_tensors(output / "AlexNet.pth", mmap=False))
        run.average.load_state_dict(best_net.state_dict())
    except (InputError, RuntimeError) as error:
        raise InputError(
            f"{output / 'AlexNet.pth'} no longer holds the weights of this run's best epoch; train "
            "again with --overwrite"
        ) from error
    ten_crop = evaluate(run, "ten-crop")[1]
    if RANK:
        return
    with replacing(output / "kernels.png") as file:
        kernels = run.average.features[1].weight.cpu()
        save_image(draw_kernels(kernels, run.args.groups), file, format="png")
    facts = {
        "options": {name: getattr(run.args, name) for name in RUN_OPTIONS},
        "classes": run.train_set.classes,
        "split": read_split(run.args.data),
        "photos": {"train": run.train_set.counts(), "val": run.val_set.counts()},
        "epochs": len(run.history),
        "best_epoch": best["epoch"],
        "val_accuracy": {"center-crop": best["val_accuracy"], "ten-crop": ten_crop},
        "seconds": sum(row["seconds"] for row in run.history),
        "hardware": hardware(run),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_text(output / "run.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(
        f"best epoch on val: {best['epoch']} of {len(run.history)}, "
        f"accuracy {best['val_accuracy']:.4f} by center-crop, {ten_crop:.4f} by ten-crop"
    )
    print(f"now classify a photo: python predict.py PHOTO --weights {output / 'AlexNet.pth'}")


def read_split(data: Path) -> dict[str, Any]:
    """How split_data.py drew the photos; empty where another hand laid them out."""
    try:
        record = json.loads((data / "split.json").read_text(encoding="utf-8"))
        return {name: record[name] for name in ("seed", "val_rate", "test_rate")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# ------------------------------------------------------------------------------- on the screen


def hardware(run: Run) -> str:
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if run.device.type != "cpu":
        cuda = run.device.type == "cuda"
        name = torch.cuda.get_device_name(run.device) if cuda else run.device.type
    return f"{name}, {str(run.precision).removeprefix('torch.')}"


def print_facts(run: Run) -> None:
    """Say what is about to happen."""
    parameters = sum(p.numel() for p in run.net.parameters())
    steps = math.ceil(len(run.train_set) / run.args.batch_size)
    print(f"device   {hardware(run)}")
    for side, photos in (("train", run.train_set), ("val", run.val_set)):
        counts = [f"{name} {n}" for name, n in zip(photos.classes, photos.counts(), strict=True)]
        more = [f"... {len(counts)} classes"] if len(counts) > 12 else []
        print(f"{side:<9}{len(photos):,} photos: {', '.join(counts[:12] + more)}")
    print(
        f"         always answering the largest class: accuracy {run.val_set.largest_share():.4f}"
    )
    print(f"network  {parameters:,} parameters, {len(run.train_set.classes)} classes")
    print(f"epochs   {run.args.epochs} at most, {steps} steps of {run.args.batch_size} photos each")
    print(f"disk     {disk_needed(run) / 1e9:.1f} GB in {run.args.output} at most", flush=True)


def print_epoch(run: Run) -> None:
    row = run.history[-1]
    line = (
        "{epoch:5} {lr:8.2g}   {train_loss:10.4f}  {train_accuracy:8.4f}   {val_loss:8.4f}  "
        "{val_accuracy:8.4f}   {images_per_second:8.1f}  {seconds:7.1f}"
    )
    print(line.format_map(row) + ("  best" if run.best() is row else ""))
    left = run.args.epochs - row["epoch"]
    if row["epoch"] == 1 and left:
        minutes = round(left * row["seconds"] / 60)
        print(f"      about {minutes // 60} h {minutes % 60:02} min for the other epochs")
    share = run.val_set.largest_share()
    if row["epoch"] == STUCK_EPOCHS and run.best()["val_accuracy"] < share + 0.01:
        print(
            f"      hint: after {STUCK_EPOCHS} epochs no better than always answering the largest "
            f"class; try --lr {run.args.lr / 3:.2g}, with few photos --batch-size 16 or more "
            "epochs, and see whether the folders hold what their names say"
        )
    sys.stdout.flush()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows the defaults, and leaves the text above as it is."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_options(parser)
    # Parsed first without defaults: what was given on the command line.
    bare = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(RUN_OPTIONS)))
    if bare.recipe == "paper":
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite contradict each other")
    args.given = {name for name in RUN_OPTIONS if getattr(bare, name) is not None}
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    count, rate = within(int, 1, 10**9), within(float, 0.0, 1.0)

    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, default=Path("data"), help="the folder that split_data.py made")
    add("--output", type=Path, default=Path(), help="the folder to write into")
    add("--resume", action="store_true", help="go on with the run in --output, with its options")
    add("--overwrite", action="store_true", help="replace the run in --output by a new one")

    add = parser.add_argument_group("training, in brackets what the paper did").add_argument
    recipe = "paper: start from the paper's weights and biases on raw pixels, with its options"
    add("--recipe", choices=("default", "paper"), default="default", help=recipe)
    add("--epochs", type=count, default=90, help="passes over the training set, at most [90]")
    add("--batch-size", type=count, default=32, help="photos a step [128]")
    add("--lr", type=within(float, 1e-12, 1e12), default=0.01, help="learning rate [0.01]")
    add("--momentum", type=rate, default=0.9, help="of SGD [0.9]")
    add("--weight-decay", type=rate, default=0.0005, help="of SGD [0.0005]")
    ema = "decay of the moving average of the weights, which is evaluated and saved [0: none]"
    add("--ema", type=rate, default=0.99, help=ema)
    smoothing = "share of the answer spread over all classes in the training loss [0]"
    add("--label-smoothing", type=rate, default=0.1, help=smoothing)
    patience = "epochs without a lower validation loss that are borne; one more divides lr by 10"
    add("--patience", type=within(int, 0, 10**9), default=3, help=patience)
    crop = "smallest part of a photo that a random crop keeps; 0: 224 x 224 of 256 x 256 [0]"
    add("--crop-area", type=rate, default=0.25, help=crop)
    cutmix = "share of the photos of which a random window is covered by another photo [0]"
    add("--cutmix", type=rate, default=0.5, help=cutmix)
    groups = "2: as on the paper's two GPUs; 1: all maps see all below, 1.4 times the time [2]"
    add("--groups", type=int, choices=(1, 2), default=2, help=groups)
    add("--seed", type=within(int, 0, 2**32), default=0, help="of weights, order, crops, dropout")

    add = parser.add_argument_group("hardware, which may change when a run resumes").add_argument
    add("--accumulate", type=count, default=1, help="pieces of a batch, to save memory [1]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, or the fastest that is there")
    precision = "of the products; auto: bfloat16 where it is native, float16 on older CUDA cards"
    choices = ("auto", "float32", "bfloat16", "float16")
    add("--precision", choices=choices, default="auto", help=precision)


def within(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A parser of numbers that refuses those outside low ... high."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's word for what is no number
    return parse


if __name__ == "__main__":
    sys.exit(main())
