"""The network of Krizhevsky, Sutskever and Hinton 2012, and below it what the scripts share.

    python alexnet.py               # its layers: output shapes, parameters, multiply-adds
    python alexnet.py --groups 1    # the same, not divided for two GPUs

Sections in comments are those of the paper.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import io
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

IMAGE_SIZE = 256  # pixels a side of a stored photo (section 2)
CROP_SIZE = 224  # of what the network sees of it (section 4.1)
ROOT_ALPHA = 0.01  # the root of the normalisation's alpha, 1e-4 (section 3.3)


class AlexNet(nn.Module):
    """The paper's five convolutional and three fully connected layers (section 3).

    From images in 0..1, (N, 3, 224, 224), it makes logits, (N, num_classes). It normalises the
    images by its buffers `mean` and `std`, which training measures and stores with the weights.

    groups=2: as on the paper's two GPUs, conv2, conv4 and conv5 see half of the maps (section 3.2;
    60,965,224 parameters at 1000 classes); groups=1: they see all (62,378,344). torchvision's
    AlexNet is another network: the single tower of 2014, without LRN.
    """

    def __init__(self, num_classes: int = 1000, groups: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.features = nn.Sequential(
            # In the 2012 code the last filters hang over the right and bottom edges by 3 pixels.
            nn.ZeroPad2d((0, 3, 0, 3)),  #                             (N,   3, 227, 227)
            nn.Conv2d(3, 96, 11, stride=4),  #                   conv1 (N,  96,  55,  55)
            nn.ReLU(inplace=True),  # section 3.1
            LocalResponseNorm(),
            nn.MaxPool2d(3, stride=2),  # section 3.4                  (N,  96,  27,  27)
            nn.Conv2d(96, 256, 5, padding=2, groups=groups),  #  conv2 (N, 256,  27,  27)
            nn.ReLU(inplace=True),
            LocalResponseNorm(),
            nn.MaxPool2d(3, stride=2),  #                              (N, 256,  13,  13)
            nn.Conv2d(256, 384, 3, padding=1),  # sees both GPUs conv3 (N, 384,  13,  13)
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=groups),  # conv4 (N, 384,  13,  13)
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=groups),  # conv5 (N, 256,  13,  13)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  #                              (N, 256,   6,   6)
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),  # section 4.2: after both hidden layers
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )

    def initialize(self, recipe: str) -> None:
        """Draw the weights to start from.

        "default": He's rule, biases 0; but conv1 N(0, 0.01), as stronger noise is never trained
        away, and would show in the kernels.
        "paper": section 5, with conv3 to conv5 as in the 2012 source (layers-145.cfg). It also sets
        `std` so that pixels keep their scale of 0..255: smaller ones would be lost beside biases of
        1.
        """
        layers = [x for x in self.modules() if isinstance(x, nn.Conv2d | nn.Linear)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(layers[0].weight, std=0.01)
        if recipe == "paper":
            self.std.fill_(1 / 255)
            stds = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)
            biases = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
            for layer, std, bias in zip(layers, stds, biases, strict=True):
                nn.init.normal_(layer.weight, std=std)
                nn.init.constant_(layer.bias, bias)

    def hidden(self, images: Tensor) -> Tensor:
        """The activations of the last hidden layer, (N, 4096)."""
        x = self.features((images - self.mean) / self.std)
        return self.classifier[:-1](torch.flatten(x, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier[-1](self.hidden(images))


class LocalResponseNorm(nn.Module):
    """Section 3.3 as printed: y = x / (2 + alpha * sum of x^2 over 5 neighbouring channels)^0.75.

    alpha is 1e-4. The same as nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2), but faster;
    PyTorch divides alpha by the 5.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # plain operations can be exported
            return normalize_channels(x)
        # A few photos at a time, as the backward pass makes seven temporary tensors. A card gets
        # more at once, since each of its kernels takes time to start.
        parts = x.split(4 if x.device.type == "cpu" else 32)
        return torch.cat([NormalizeChannels.apply(part) for part in parts])


def normalize_channels(x: Tensor) -> Tensor:
    root = denominator(x).rsqrt()
    return x * (root * root.sqrt())  # d^-0.75 = d^-0.5 * d^-0.25, cheaper than a power


def denominator(x: Tensor) -> Tensor:
    """d = 2 + alpha * the sum of x^2 over the neighbours."""
    # Scaled by the root of alpha first: in float16, 300 squared is infinite.
    return sum_over_neighbors((ROOT_ALPHA * x).square(), 2.0)


def sum_over_neighbors(x: Tensor, start: float = 0.0) -> Tensor:
    """`start` + the sum of (N, C, H, W) over channels i - 2 to i + 2."""
    # As a 1 x 1 convolution, which is fast everywhere; its weights are 1 for the neighbours.
    n_channels = x.shape[1]
    ones = x.new_ones(n_channels, n_channels).tril(2).triu(-2)
    return F.conv2d(x, ones[:, :, None, None], x.new_full((n_channels,), start))


class NormalizeChannels(torch.autograd.Function):
    """`normalize_channels`, whose gradient here needs x alone; autograd would keep five tensors.

    g is the gradient of the loss by y, and the sums run over channel i and its neighbours j:

        y_i = x_i d_i^-0.75, where d_i = 2 + alpha * sum of x_j^2.
        x_i changes y_i directly: dy_i / dx_i = d_i^-0.75; and by every d_j near it:
        dd_j / dx_i = 2 alpha x_i, and dy_j / dd_j = -0.75 x_j d_j^-1.75. Together:
        gradient by x_i = g_i d_i^-0.75 - 1.5 alpha x_i * sum of g_j x_j d_j^-1.75.

    Channel j is near i exactly where i is near j, so one function sums for both directions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):  # all in the type of x
            return normalize_channels(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d = denominator(x)
            root = d.rsqrt()
            direct = root.sqrt().mul_(root).mul_(g)  # g * d^-0.75
            # The root of alpha stands inside the sum, for float16 as above, and again outside it.
            total = sum_over_neighbors((ROOT_ALPHA * x).mul_(direct).div_(d))
            return torch.addcmul(direct, total, x, value=-1.5 * ROOT_ALPHA)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) as floats in 0..1, (N, 3, H, W), channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def views_of(images: Tensor, ten: bool) -> list[Tensor]:
    """The central 224 x 224 of (N, 3, 256, 256); ten: the corners, too, and all mirrored (4.1)."""
    places = ((16, 16), (0, 0), (0, 32), (32, 0), (32, 32))[: 5 if ten else 1]
    views = [images[:, :, y : y + CROP_SIZE, x : x + CROP_SIZE] for y, x in places]
    return views + [view.flip(3) for view in views if ten]


@torch.inference_mode()
def predict_probabilities(net: AlexNet, images: Tensor, ten_views: bool) -> Tensor:
    """Class probabilities of (N, 3, 256, 256), (N, classes): the mean of the views' softmax."""
    found = []
    for some in images.split(6 if ten_views else 64):
        views = views_of(some, ten_views)
        probabilities = net(torch.cat(views)).float().softmax(1)
        found.append(probabilities.unflatten(0, (len(views), -1)).mean(0))
    return torch.cat(found)


# ===== Here the network ends. What follows is shared by the scripts: photos, device, files, errors.
VAL_FOLDERS = ("val", "valid", "validation")  # the names that data sets give it
# What systems keep for themselves is nobody's photo: a Mac adds a ._x.jpg to x.jpg, a NAS keeps
# small copies of all photos in @eaDir. PRIVATE holds beginnings of names, SYSTEM whole names.
PRIVATE = ("._", ".ipynb_checkpoints", ".git", ".Trash", ".thumbnails", ".cache")
SYSTEM = {"@eaDir", "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"}
SYSTEM |= {"System Volume Information"}
READER = 4  # to be raised when read_square changes, so that train.py decodes anew
SUFFIXES = "jpg jpeg jpe jfif jfi jif pjpeg png bmp gif tif tiff webp avif ppm pgm".split()
# Not EPS, for which Pillow would start another program, Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB; 1 MB is too little
warnings.filterwarnings("ignore", module="PIL")  # a file is read, or one line says why not
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")  # torch 2.9


# ----- photos
def visible_files(folder: Path, above: Iterable[Path] = ()) -> list[Path]:
    """The files below a folder, sorted; links are followed.

    What belongs to a system is left out. Other hidden names, and folders that may not be read, are
    left out and reported.
    """
    here, files = folder.resolve(), []
    above = {*above, here, *here.parents}  # to follow a link to one of these would never end
    try:
        paths = sorted(folder.iterdir())
    except PermissionError as error:
        print(f"skipped, no permission to read: {folder} ({error.strerror})", file=sys.stderr)
        return []
    for path in paths:
        if path.name in SYSTEM or path.name.startswith(PRIVATE):
            continue
        if path.name[0] == ".":
            tell_hidden(path)
        elif not os.path.isdir(path):  # where Path.is_dir() may raise a PermissionError
            files.append(path)
        elif path.resolve() not in above:
            files += visible_files(path, above)
    return sorted(files, key=Path.as_posix)  # Windows sorts paths without case


def tell_hidden(path: Path) -> None:
    """Say on stderr how many pictures are left out with this hidden file or folder."""
    if n := sum(map(is_picture, [path, *path.rglob("*")])):
        print(f"skipped, its name begins with a dot: {path} ({n} photos)", file=sys.stderr)


def is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The pictures in a folder; says on stderr what else is there."""
    files = visible_files(folder)
    others = [path for path in files if not is_picture(path)]
    if others:
        print(f"skipped, no pictures, in {folder}: {kinds_of(others)}", file=sys.stderr)
    return list(filter(is_picture, files))


def kinds_of(files: Iterable[Path]) -> str:
    """How many there are of each suffix."""
    kinds = Counter(path.suffix or path.name for path in sorted(files))
    return listed([f"{n} {kind}" for kind, n in kinds.most_common()])


def list_photos(folder: Path, files: list[Path]) -> list[str]:
    """Which of the `files` in `folder` are photos, as CLASS/.../NAME; prints what else is there.

    Raises InputError where two classes have one name.
    """
    here = folder.resolve().name  # that of "." is empty
    photos = [path for path in files if is_picture(path) and path.parent != folder]
    names = [path.relative_to(folder).as_posix() for path in photos]

    classes = {name.split("/")[0] for name in names}
    folders = {path.name for path in filter(os.path.isdir, folder.iterdir()) if path.name[0] != "."}
    empty = sorted(folders - classes - SYSTEM)
    if empty:
        print(f"no photos in these folders of {here}: {listed(empty)}")

    others = set(files).difference(photos)
    if others:
        print(f"skipped, no photos in a class folder, in {here}: {kinds_of(others)}")

    # Names that differ in case or composition are one folder on Windows or macOS.
    spellings = Counter(class_of(label).casefold() for label in classes)
    alike = sorted(x for x in classes if spellings[class_of(x).casefold()] > 1)
    if alike:
        raise InputError(f"{listed(alike)}: one name on Windows or macOS; rename or join them")
    return names


def listed(names: list[str]) -> str:
    """The first ten, and how many more there are."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join(names[:10] + more)


def class_of(name: str) -> str:
    """The class of CLASS/.../NAME or CLASS, composed: macOS may give é as two characters."""
    return unicodedata.normalize("NFC", name.split("/")[0])


def read_image(path: Path) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency on white; raises InputError."""
    if not os.path.isfile(path):  # a pipe might block for ever
        raise InputError(f"{path}: no such photo, or no permission to see it")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # where the EXIF alone is broken
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "FI":  # F, I, I;16: more than 8 bits
                image = to_8_bits(image)
            # An alpha channel of zeros alone is an unused byte, as in some BMP files.
            unused = "A" in image.getbands() and image.getchannel("A").getextrema() == (0, 0)
            if image.has_transparency_data and not unused:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large to open safely; scale it down") from error
    except Exception as error:  # on a broken file Pillow raises almost any type
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: {str(error) or type(error).__name__}") from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, stretched to 0..255; convert() would clip it."""
    # The file does not state its range: it may be 12 bits of 16, signed, any float.
    warnings.warn("more than 8 bits, scaled from darkest to brightest", stacklevel=1)
    pixels = np.asarray(image, np.float64)
    low, high = pixels.min(), pixels.max()
    if not math.isfinite(high - low):
        raise ValueError("its pixels are no numbers")
    pixels = (pixels - low) * (255 / max(high - low, 1e-9))
    return Image.fromarray(pixels.round().astype(np.uint8))


def read_square(path: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """The central square of a picture (section 2): uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(read_image(path), (size, size), Image.Resampling.BICUBIC))


def read_squares(files: list[Path], title: str) -> Iterator[tuple[Path, np.ndarray]]:
    """Read photos on all cores, in order; what cannot be read is named on stderr."""
    bar = tqdm(total=len(files), desc=title, leave=False, disable=len(files) < 2 or None)
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        for start in range(0, len(files), 256):  # so many wait in memory, at most
            block = files[start : start + 256]
            jobs = [threads.submit(read_square, path) for path in block]
            for path, job in zip(block, jobs, strict=True):
                try:
                    yield path, job.result()
                except InputError as error:
                    tqdm.write(f"cannot be read: {error}", file=sys.stderr)
                bar.update()
    finally:  # also by Ctrl-C
        bar.close()
        threads.shutdown(cancel_futures=True)


# ----- device, files, errors
def path_of(text: str) -> Path:
    """A path as it was typed; a ~ in quotes, which the shell leaves, is the user's folder."""
    return Path(os.path.expanduser(text))


def quoted(path: Path) -> str:
    """A path for a command that is printed."""
    return str(path) if re.fullmatch(r"[\w./\\:+,@-]+", str(path)) else f'"{path}"'


class InputError(Exception):
    """What the user can put right: the message says what is wrong and what helps."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the host or of a device, by whatever type of error."""
    signs = (
        "out of memory",
        "ALLOC_FAILED",
        "can't allocate memory",
        "not enough memory",
        "Invalid buffer size",  # on MPS
    )
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def one_line_errors(out_of_memory: str = "close other programs") -> Iterator[None]:
    """Turn errors that the user can mend, and Ctrl-C, into one line without a traceback.

    A KeyboardInterrupt's argument is printed, too.
    """
    for name in ("stdout", "stderr"):  # under pythonw and some services there is none
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is another type
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the console lacks
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed it; at its exit Python writes what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))  # names may hold line breaks
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory; {out_of_memory}")
    except KeyboardInterrupt as stop:
        print("\n" + "; ".join(["stopped", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """The device, made ready; "auto" is torch's accelerator, CUDA or MPS, or else the CPU.

    It has its index, which torch.cuda.set_device needs.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        probe = torch.ones(1, 1, 1, 1, device=name)
        # This fails on a card for which this torch, or its cuDNN, has no code.
        F.conv2d(probe, probe).add_(1).item()
    except Exception as error:  # of almost any type
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {name}: {reason}; --device cpu works everywhere") from error
    if probe.device.type == "cuda":
        # autocast asks the current card what it can, whichever card the tensors are on.
        torch.cuda.set_device(probe.device)
        torch.backends.cudnn.benchmark = True  # this pays, as most batches have one shape
        torch.set_float32_matmul_precision("high")  # TF32
    return probe.device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products: half as wide as float32 where the hardware has it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major == 7:  # Volta and Turing
            return torch.float16
        return torch.bfloat16 if major >= 8 else torch.float32
    # get_capabilities came with torch 2.11. Builds for Macs lack oneDNN (mkldnn), without which
    # bfloat16 is slower than float32.
    tells = hasattr(torch.cpu, "get_capabilities") and torch.backends.mkldnn.is_available()
    if device.type == "cpu" and tells:
        has = torch.cpu.get_capabilities()
        if any(map(has.get, ("avx512_bf16", "amx_bf16", "bf16"))):
            return torch.bfloat16
    return torch.float32


def pick_layout(device: torch.device) -> torch.memory_format:
    """The memory format in which convolutions are fastest (on MPS: pytorch issue 193349)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_large_blocks() -> None:
    """Have glibc keep the memory of large tensors. To map it anew takes a tenth of a CPU's step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GB may stay free in the process


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` once it is whole and on the disk."""
    partial = temporary_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(partial, path)
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        # torch.save hides an OSError behind a RuntimeError.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written: {cause}") from error
    finally:
        partial.unlink(missing_ok=True)


def replace_file(partial: Path, path: Path) -> None:
    """os.replace, tried for 5 s: Windows refuses it while a scanner holds either file."""
    for _ in range(10):
        with contextlib.suppress(PermissionError):
            return os.replace(partial, path)
        time.sleep(0.5)
    os.replace(partial, path)


def temporary_path(path: Path) -> Path:
    """A new name beside `path`; removes what killed programs left there a day ago or earlier."""
    for old in path.parent.glob(f"{glob.escape(path.name)}.unfinished-{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError):
            if old.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path.with_name(f"{path.name}.unfinished-{os.urandom(4).hex()}")


def load_tensors(path: Path) -> dict[str, Any]:
    """What torch.save wrote, on the CPU: tensors and plain values, no code."""
    if not path.exists():
        raise InputError(f"there is no {path}; train.py makes it")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the file {path / 'AlexNet.pth'}")
    with open(path, "rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # unpickling raises almost any type
            if is_out_of_memory(error):
                raise
            raise InputError(f"{path} is cut short, or no file of train.py") from error


def load_network(path: Path) -> AlexNet:
    """The network of AlexNet.pth, on the CPU, in eval mode."""
    state = load_tensors(path)
    try:
        num_classes = len(state["classifier.6.bias"])
        groups = 96 // state["features.5.weight"].shape[1]
        with torch.device("meta"):  # so that no weights are drawn, only to be replaced
            net = AlexNet(num_classes, groups)
        net.load_state_dict(state, assign=True)
    except Exception as error:  # a foreign file may raise any type
        raise InputError(f"{path} is no AlexNet.pth of train.py") from error
    if not all(x.isfinite().all() for x in net.state_dict().values()):
        raise InputError(f"{path} holds numbers that are not finite; train anew with a lower --lr")
    return net.float().eval()


def load_classes(weights: Path, net: AlexNet) -> list[str]:
    """The classes of these weights, from the class_idx.json beside them."""
    path, n = weights.with_name("class_idx.json"), net.classifier[-1].out_features
    try:
        index = json.loads(path.read_bytes())
        names = [str(index[str(i)]) for i in range(len(index))]
        classes = [unicodedata.normalize("NFC", name) for name in names]  # as class_of does
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        classes = []  # it is missing, or no such file
    if len(classes) != n:
        way = "put back the one that train.py wrote, or remove it and run train.py --resume"
        raise InputError(f"{path} does not name the {n} classes of {weights}; {way}")
    return classes


# ----- python alexnet.py
def main(argv: list[str] | None = None) -> int:
    """Print each layer with its output, its parameters and its multiply-adds for one image."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000, help="(default: 1000)")
    groups = "2: divided for two GPUs as in the paper; 1: not (default: 2)"
    parser.add_argument("--groups", type=int, choices=(1, 2), default=2, help=groups)
    args = parser.parse_args(argv)
    if args.classes < 1:
        parser.error("--classes must be at least 1")

    with one_line_errors():
        with torch.device("meta"):  # which knows shapes, and computes nothing
            net = AlexNet(args.classes, args.groups).eval()
            x = torch.empty(1, 3, CROP_SIZE, CROP_SIZE)
        parameters, products = [], []
        print(f"{'output':>13} {'parameters':>12} {'multiply-adds':>14}  layer")
        for layer in [*net.features, nn.Flatten(), *net.classifier]:
            x = layer(x)
            parameters.append(sum(p.numel() for p in layer.parameters()))
            # Each weight is used once at each place of the output.
            products.append(layer.weight.numel() * x[0, 0].numel() if parameters[-1] else 0)
            shape = " x ".join(map(str, x.shape[1:]))
            print(f"{shape:>13} {parameters[-1]:12,} {products[-1]:14,}  {layer}")
        print(f"{'':13} {sum(parameters):12,} {sum(products):14,}  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
