"""AlexNet: the network of Krizhevsky, Sutskever and Hinton (2012), and what it looks at.

    python alexnet.py                           # the layers: output, parameters, multiply-adds
    python alexnet.py --num-classes 5 --groups 1

The paper is "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012; section
numbers below are its own. `train.py` and `predict.py` share whatever stands here: how a file
becomes 256 x 256 pixels, which views of them are evaluated, and how files are read and written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 256  # pixels a side of every stored photo (section 2)
CROP_SIZE = 224  # pixels a side of what the network sees (section 4.1)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # by content; EPS runs a program


class InputError(ValueError):
    """Something that the user can put right; the message is one sentence that says what and how."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names may hold line breaks


# ------------------------------------------------------------------------------- the network


class LocalResponseNormFunction(torch.autograd.Function):
    """y = x * d^-beta with d = k + alpha / size * (sum of x^2 over `size` neighbouring channels).

    Stock PyTorch keeps three more tensors of the input's size for the backward pass; this keeps
    the input alone and computes d again. With e = x * g * d^(-beta - 1), g the gradient of y, the
    gradient of x is g * d^-beta - 2 * alpha * beta / size * x * (sum of e over the neighbours).
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = size, alpha / size, beta, k
        y = torch.empty_like(x)
        for x_piece, y_piece in zip(_pieces(x), _pieces(y), strict=True):
            x_float = x_piece.to(torch.promote_types(x.dtype, torch.float32))
            y_piece.copy_(_denominator(x_float, *ctx.settings)[1].mul_(x_float))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.settings
        grad_x = torch.empty_like(x)
        for x_piece, g_piece, out in zip(_pieces(x), _pieces(grad_y), _pieces(grad_x), strict=True):
            wide = torch.promote_types(x.dtype, torch.float32)  # half precision is not enough
            x_float, g_float = x_piece.to(wide), g_piece.to(wide)
            d, power = _denominator(x_float, size, alpha, beta, k)
            scaled = power.mul_(g_float)  # g * d^-beta
            e = torch.mul(scaled, x_float).div_(d)
            # A neighbour is affected by x through the mirror image of its own window.
            total = _window_sum(e, (size - 1) // 2, size // 2)
            out.copy_(scaled.addcmul_(total, x_float, value=-2 * alpha * beta))
        return grad_x, None, None, None, None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The batch an image at a time on a CPU, so that its buffers stay in cache; else whole."""
    return x.split(1) if x.device.type == "cpu" else (x,)


def _denominator(
    x: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    """D and d^-beta of the class above, for (N, C, ...)."""
    d = _window_sum(x.square(), size // 2, (size - 1) // 2).mul_(alpha).add_(k)
    if beta == 0.75:  # with r = d^-1/2, r * sqrt(r): a fraction of the cost of pow
        r = d.rsqrt()
        return d, r.sqrt().mul_(r)
    return d, d.pow(-beta)


def _window_sum(x: Tensor, before: int, after: int) -> Tensor:
    """Sum over the channels i - before ... i + after of (N, C, ...), zero outside."""
    channels = x.shape[1]
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (before, after))
    total = padded[:, :channels].clone()
    for shift in range(1, before + after + 1):
        total.add_(padded[:, shift : shift + channels])
    return total


class LocalResponseNorm(nn.Module):
    """Local response normalisation (section 3.3), a drop-in for torch.nn.LocalResponseNorm.

    Same convention: alpha times the MEAN of the squares over `size` channels. The paper prints
    alpha = 1e-4 times their SUM, which is alpha = 5e-4 here. Input and output (N, C, ...).
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return LocalResponseNormFunction.apply(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class AlexNet(nn.Module):
    """The eight layers of the paper: five convolutional, three fully connected (section 3).

    Input: float images in 0..1, (N, 3, 224, 224); output: logits, (N, num_classes). The network
    normalises its input itself, with the buffers `mean` and `std` that training measures: they
    are stored with the weights, so training and prediction cannot disagree.

    groups=2 is the connectivity of the paper's two GPUs (section 3.2: conv2, conv4 and conv5 see
    the maps of their own GPU alone; 60,965,224 parameters at 1000 classes); groups=1 merges the
    two (62,378,344). torchvision's AlexNet is another network: the single tower of 2014, no LRN.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int = 1000, groups: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        # Section 3.3: local response normalisation follows the ReLU of the first two layers.
        lrn = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.features = nn.Sequential(
            # 224 becomes 55 because the last filters of the 2012 code hang over the right and the
            # bottom edge: three pixels of zeros there, which gives what others call 227.
            nn.ZeroPad2d((0, 3, 0, 3)),  #                             (N,   3, 227, 227)
            nn.Conv2d(3, 96, 11, stride=4),  #                         (N,  96,  55,  55)
            nn.ReLU(inplace=True),  # section 3.1
            LocalResponseNorm(**lrn),
            nn.MaxPool2d(3, stride=2),  # section 3.4, overlapping     (N,  96,  27,  27)
            nn.Conv2d(96, 256, 5, padding=2, groups=groups),  #        (N, 256,  27,  27)
            nn.ReLU(inplace=True),
            LocalResponseNorm(**lrn),
            nn.MaxPool2d(3, stride=2),  #                              (N, 256,  13,  13)
            nn.Conv2d(256, 384, 3, padding=1),  # sees both GPUs       (N, 384,  13,  13)
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=groups),  #       (N, 384,  13,  13)
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=groups),  #       (N, 256,  13,  13)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  #                              (N, 256,   6,   6)
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),  #                           (N, 4096)
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),  # section 4.2: on the outputs of the two hidden layers
            nn.Linear(4096, 4096),  #                                  (N, 4096)
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),  #                           (N, num_classes)
        )
        if not self.mean.is_meta:  # which has no weights, and whose normal_() takes a second
            self.initialize()

    def initialize(self) -> None:
        """Draw weights by He's rule, conv1's from the paper's N(0, 0.01); set all biases to 0.

        He's deviation in conv1, 0.074, is noise seven times as strong: after 15 epochs its
        kernels (section 6.1) still showed little else.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.features[1].weight, std=0.01)

    def initialize_as_2012(self) -> None:
        """Draw the weights of section 5: N(0, 0.01), biases 1 where ReLUs should start alive.

        conv3, conv4 and conv5 get 0.03, as in the 2012 source (layers-145.cfg). All of it presumes
        raw pixels of 0..255 less their mean: on normalised ones, 60 times smaller, the biases
        drown the image and the network stays stuck. So `std` becomes 1 / 255.
        """
        self.std.fill_(1 / 255)
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        deviations = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)
        biases = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
        for layer, deviation, bias in zip(layers, deviations, biases, strict=True):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.constant_(layer.bias, bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features((images - self.mean) / self.std)
        return self.classifier(torch.flatten(x, 1))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> AlexNet:
        """The network that `state` belongs to: classes and groups follow from its tensors.

        Raises InputError with a sentence for anything else than a state_dict of this class.
        """
        try:
            num_classes = state["classifier.6.weight"].shape[0]
            groups = 96 // state["features.5.weight"].shape[1]
            # Sparse tensors and those of the meta device, which have no content, load as well.
            plain = all(x.layout == torch.strided and not x.is_meta for x in state.values())
            is_float = all(tensor.dtype == torch.float32 for tensor in state.values())
            if num_classes < 1 or groups not in (1, 2) or not is_float or not plain:
                raise ValueError("not as this class has them")
            with torch.device("meta"):  # no memory, and no drawing of 58 million numbers
                net = cls(num_classes, groups)
            net.load_state_dict(state, assign=True)
        except Exception as error:  # whatever such a file may hold in their place
            raise InputError("it does not hold the weights of this AlexNet") from error
        return net


# --------------------------------------------------------------------- what the network looks at


def read_image(path: str | Path) -> Image.Image:
    """Any picture that Pillow opens, as RGB: turned as its EXIF says, transparency on white.

    Raises InputError with a sentence if the file is no picture, is broken or is absurdly large.
    """
    named = isinstance(path, str | os.PathLike)
    if named and os.path.exists(path) and not os.path.isfile(path):  # a pipe may block for ever
        raise InputError(f"{path}: no file, but a folder, a pipe or a device")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF: the picture is whole all the same
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                wide = np.asarray(image)
                if wide.max() > 65535 or wide.min() < 0:
                    raise ValueError("32 bits a pixel are too many")
                image = Image.fromarray((wide >> 8).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are fractions, of nobody knows what")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except Exception as error:  # on a broken file Pillow raises almost any type
        reason = "no picture that Pillow can read"
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: {reason}") from error


def center_square(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
    """The central square of a picture, scaled to size x size (section 2: shorter side to 256)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_float(photos: Tensor) -> Tensor:
    """uint8 pixels (N, H, W, 3) as float images in 0..1, (N, 3, H, W), channels last in memory."""
    return photos.permute(0, 3, 1, 2).float().div_(255)


def center_crop(images: Tensor) -> Tensor:
    """The central 224 x 224 view of (N, 3, 256, 256), as (N, 1, 3, 224, 224)."""
    margin = (IMAGE_SIZE - CROP_SIZE) // 2
    return images[:, None, :, margin : margin + CROP_SIZE, margin : margin + CROP_SIZE]


def ten_crop(images: Tensor) -> Tensor:
    """The ten views of section 4.1 of (N, 3, 256, 256), as (N, 10, 3, 224, 224).

    The four corners and the centre, and their mirror images.
    """
    far = IMAGE_SIZE - CROP_SIZE
    corners = [(0, 0), (0, far), (far // 2, far // 2), (far, 0), (far, far)]
    views = [images[:, :, y : y + CROP_SIZE, x : x + CROP_SIZE] for y, x in corners]
    return torch.stack(views + [view.flip(3) for view in views], dim=1)


VIEWS = {"center-crop": center_crop, "ten-crop": ten_crop}


def photos_at_once(views: str) -> int:
    """How many photos make a batch of 64 views or so."""
    return {"center-crop": 64, "ten-crop": 6}[views]


@torch.inference_mode()
def predict_probabilities(net: AlexNet, images: Tensor, views: str) -> Tensor:
    """Class probabilities of (N, 3, 256, 256), (N, num_classes): the mean of the views' softmax."""
    crops = VIEWS[views](images)
    logits = net(crops.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return logits.float().softmax(1).unflatten(0, crops.shape[:2]).mean(1)


# ------------------------------------------------------------------------ device and files


def pick_device(name: str) -> torch.device:
    """The device that is asked for; `auto` takes CUDA before MPS before the CPU."""
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1).item()  # fails on a card that torch has no code for
    except (RuntimeError, AssertionError, ImportError) as error:
        if "no kernel image" in str(error):
            card = torch.cuda.get_device_name(device)
            raise InputError(
                f"this torch has no code for your {card}; --device cpu works, and so may a torch "
                "that was built for an older CUDA"
            ) from error
        raise InputError(f"--device {name} cannot be used here; --device cpu can") from error
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # most batches have one shape: trying ways pays
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def setup_console() -> None:
    """Let a console that cannot print a letter print its code instead of failing.

    Pillow's remarks on odd files stay off it: a file is read, or one line says why not. The window
    of a notebook, which passes its MPLBACKEND on, gives way where this environment lacks it.
    """
    backend = os.environ.get("MPLBACKEND", "")
    if backend.startswith("module://") and not find_spec(backend[9:].split(".")[0]):
        os.environ["MPLBACKEND"] = "agg"
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def describe(error: OSError) -> str:
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def image_files(folder: Path) -> list[Path]:
    """The picture files below a folder, in sorted order, hidden files and folders left out."""
    files = []

    def fail(error: OSError) -> None:  # else what may not be read would be missed in silence
        raise error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(root, name)
            for name in sorted(names)
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` once it is whole.

    Whatever goes wrong meanwhile, `path` stays as it was; raises OSError on a full disk. Every
    process writes to a file of its own, so two that write `path` at once do not mix.
    """
    remove_leftovers(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a full disk does not say where
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left of `path`; a living one keeps its own."""
    for name in os.listdir(path.parent):
        match = re.fullmatch(re.escape(path.name) + r"\.(\d{1,9})\.tmp", name)
        if match and not is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.with_name(name).unlink()


def is_alive(pid: int) -> bool:
    if os.name != "posix":  # os.kill would end it; but there no file that is open can be removed
        return False
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else it is somebody else's
    return True


def load_tensors(path: Path, mmap: bool) -> dict:
    """The dictionary that torch.save wrote to `path`, on the CPU; `mmap` maps rather than reads.

    Only tensors and plain values are unpickled, so a hostile file runs no code. Raises InputError
    with a sentence for a file that is absent, cut short or foreign.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on tensors of kinds that are refused later
            if zipfile.is_zipfile(path):  # torch.save never compresses
                with zipfile.ZipFile(path) as archive:
                    if any(record.compress_type for record in archive.infolist()):
                        raise ValueError("a small file could fill the memory")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError:
        raise
    except Exception as error:  # unpickling what anybody may have written raises almost any type
        raise InputError(f"{path} is cut short or no file of train.py") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no file of train.py")
    return content


# ------------------------------------------------------------------------------- the layer table


def layer_table(num_classes: int, groups: int) -> str:
    """Every layer with its output shape, parameters and multiply-adds for one image."""
    lines = [f"{'layer':<20}{'output':>16}{'parameters':>14}{'multiply-adds':>17}"]
    totals = [0, 0]

    def add_line(layer: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        parameters = sum(p.numel() for p in layer.parameters())
        # Every weight is used once for each position of the output; biases are not counted.
        positions = output[0, 0].numel()
        multiply_adds = layer.weight.numel() * positions if parameters else 0
        shape = " x ".join(map(str, output.shape[1:]))
        lines.append(f"{type(layer).__name__:<20}{shape:>16}{parameters:>14,}{multiply_adds:>17,}")
        totals[0] += parameters
        totals[1] += multiply_adds

    with torch.device("meta"):  # shapes without arithmetic
        net = AlexNet(num_classes, groups).eval()
        for layer in [*net.features, *net.classifier]:
            layer.register_forward_hook(add_line)
        net(torch.empty(1, 3, CROP_SIZE, CROP_SIZE))
    lines.append(f"{'total':<36}{totals[0]:>14,}{totals[1]:>17,}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-classes", type=int, default=1000, help="(default: %(default)s)")
    groups = "2: the connectivity of the paper's two GPUs; 1: merged (default: %(default)s)"
    parser.add_argument("--groups", type=int, choices=(1, 2), default=2, help=groups)
    args = parser.parse_args(argv)
    if args.num_classes < 1:
        parser.error("--num-classes must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(layer_table(args.num_classes, args.groups))
    return 0


if __name__ == "__main__":
    sys.exit(main())
