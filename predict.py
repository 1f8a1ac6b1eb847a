"""Say what is on photos, with the weights that train.py saved.

    python predict.py photo.jpg                        # its classes, by ten views; a figure
    python predict.py photo.jpg --similar data/train   # and the training photos most like it
    python predict.py data/val                         # a table, the accuracy, a confusion matrix
    python predict.py data/val --json > answers.jsonl  # one JSON object a line

The innermost folder with the name of a class tells a photo's true class. A table begins with the
answers that are wrong, the surest first, which is where wrong labels show; the others follow, the
most doubtful first. Photos that are named appear in a window, without a display in prediction.png;
those of a folder are drawn for --save alone, but their confusion_matrix.png is written to the
current folder. A file that is no picture is named on stderr, the others are answered, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from alexnet import (
    AlexNet,
    InputError,
    center_crop,
    center_square,
    describe,
    image_files,
    is_out_of_memory,
    load_tensors,
    photos_at_once,
    pick_device,
    predict_probabilities,
    read_image,
    replacing,
    setup_console,
    to_float,
)

if TYPE_CHECKING:  # matplotlib is imported where something is drawn: it would delay every start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 24  # photos in a figure
MOST_ROWS = 5  # photos in the figure of --similar, as many as the paper's figure 4 has
NEAREST = 6  # training photos that --similar finds


@dataclass
class Prediction:
    """The answer for one photo."""

    path: Path
    top: list[tuple[str, float]]  # class and probability, the likeliest first
    true_class: str | None  # the innermost folder that is a class
    similar: list[tuple[float, Path]] = field(default_factory=list)  # distance and training photo

    def is_wrong(self) -> bool:
        return self.true_class not in (None, self.top[0][0])

    def doubt(self) -> tuple[bool, float]:
        """Sorts the surest wrong answers first, then the others, the least sure of them first."""
        probability = self.top[0][1]
        return (False, -probability) if self.is_wrong() else (True, probability)


def main(argv: list[str] | None = None) -> int:
    setup_console()
    args = parse_args(argv)
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except BrokenPipeError:  # `| head` has seen enough
        return 1
    except OSError as error:
        raise SystemExit(f"error: {describe(error)}") from error
    except (MemoryError, RuntimeError) as error:  # a card may be full of another program's run
        if not is_out_of_memory(error):
            raise
        message = "error: out of memory; end other programs, or leave the card with --device cpu"
        raise SystemExit(message) from error
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    net, classes = load_network(args.weights, args.classes)
    net.to(device, memory_format=torch.channels_last).eval()
    files = find_files(args.photos)
    training = image_files(args.similar) if args.similar else []
    if args.similar and not training:
        raise InputError(f"--similar {args.similar} is no folder of photos")
    any_folder = any(path.is_dir() for path in args.photos)
    views = args.views or ("center-crop" if any_folder else "ten-crop")
    answers = predict(net, classes, files, views, args.top_k)
    if args.similar:
        answers = find_similar(net, list(answers), training)
    predictions = []
    for prediction in answers:
        predictions.append(prediction)
        if args.json:
            print_json(prediction)
    predictions.sort(key=Prediction.doubt)
    if not args.json:
        print_answers(predictions, classes)
    if predictions and (args.save or not (args.json or any_folder or args.no_figure)):
        draw, most = (draw_similar, MOST_ROWS) if args.similar else (draw_predictions, MOST_DRAWN)
        if len(predictions) > most:
            first = f"the first {most} of the table's {len(predictions)} photos"
            print(f"the figure shows {first}", file=sys.stderr)
        show(lambda figure: draw(figure, predictions[:most]), args.save)
    if any_folder and any(p.true_class for p in predictions) and not (args.json or args.no_figure):
        matrix = Path("confusion_matrix.png")
        show(lambda figure: draw_confusion(figure, predictions, classes), matrix)
    return 0 if len(predictions) == len(files) else 1


def load_network(weights: Path, classes_file: Path | None) -> tuple[AlexNet, list[str]]:
    """The network on the CPU and its class names; raises InputError if they do not fit."""
    try:
        net = AlexNet.from_state_dict(load_tensors(weights, mmap=True))
    except InputError as error:
        raise InputError(f"{error}; train.py makes one, --weights tells where it is") from error
    path = classes_file or weights.with_name("class_idx.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        classes = [str(index[str(i)]) for i in range(len(index))]
    except OSError as error:
        raise InputError(f"cannot read the class names: {describe(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path} is no list of classes like {{"0": "daisy", ...}}') from error
    outputs = net.classifier[-1].out_features
    if len(classes) != outputs:
        raise InputError(f"{weights} knows {outputs} classes, but {path} names {len(classes)}")
    return net, classes


def find_files(arguments: list[Path]) -> list[Path]:
    """The files named, and the pictures in the folders named, in sorted order."""
    files = []
    for argument in arguments:
        found = image_files(argument) if argument.is_dir() else [argument]
        if not found:
            raise InputError(f"there are no pictures in the folder {argument}")
        files += found
    return files


def load_photos(files: list[Path], step: int, title: str) -> Iterator[tuple[list[Path], Tensor]]:
    """The photos as (paths, uint8 (n, 256, 256, 3)), n up to `step`, with a bar.

    Those that cannot be read are named on stderr.
    """

    def load(path: Path) -> np.ndarray | InputError:
        try:
            return np.asarray(center_square(read_image(path)))
        except InputError as error:
            return error

    options = {"desc": title, "unit": "photo", "leave": False, "disable": len(files) < 2 or None}
    with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(total=len(files), **options) as bar:
        for start in range(0, len(files), step):
            paths, photos = [], []
            batch = files[start : start + step]
            for path, photo in zip(batch, threads.map(load, batch), strict=True):
                if isinstance(photo, InputError):
                    tqdm.write(f"error: {photo}", file=sys.stderr)
                else:
                    paths.append(path)
                    photos.append(photo)
            if photos:
                yield paths, torch.from_numpy(np.stack(photos))
            bar.update(len(batch))


def predict(
    net: AlexNet, classes: list[str], files: list[Path], views: str, top_k: int
) -> Iterator[Prediction]:
    """Answer photo by photo, in the order of the files."""
    for paths, photos in load_photos(files, photos_at_once(views), "predicting"):
        images = to_float(photos.to(net.mean.device))
        probabilities = predict_probabilities(net, images, views).cpu()
        if not probabilities.isfinite().all():
            raise InputError("these weights do not give numbers; train again")
        best = probabilities.topk(min(top_k, len(classes)))
        for path, indices, values in zip(paths, best.indices, best.values, strict=True):
            names = [classes[i] for i in indices]
            top = list(zip(names, values.tolist(), strict=True))
            folders = (folder.name for folder in path.absolute().parents)
            yield Prediction(path, top, next((name for name in folders if name in classes), None))


@torch.inference_mode()
def last_hidden(net: AlexNet, photos: Tensor) -> Tensor:
    """The last hidden activations of the central views of (N, 256, 256, 3), (N, 4096)."""
    views = center_crop(to_float(photos.to(net.mean.device)))[:, 0]
    views = views.contiguous(memory_format=torch.channels_last)
    return net.classifier[:-1](net.features((views - net.mean) / net.std).flatten(1))


def find_similar(
    net: AlexNet, predictions: list[Prediction], training: list[Path]
) -> list[Prediction]:
    """Give every prediction its NEAREST training photos, itself left out (section 6.1).

    Near is a small Euclidean distance between the last hidden activations.
    """
    asked = [prediction.path for prediction in predictions]
    own = [path.resolve() for path in asked]
    step = photos_at_once("center-crop")
    queries = [last_hidden(net, photos) for _, photos in load_photos(asked, step, "predicting")]
    for paths, photos in load_photos(training, step, "comparing") if queries else ():
        # Not by way of a matrix product, which loses the small distances.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(torch.cat(queries), last_hidden(net, photos), compute_mode=exact)
        resolved = [path.resolve() for path in paths]
        for prediction, itself, row in zip(predictions, own, distances.tolist(), strict=True):
            found = zip(row, paths, resolved, strict=True)
            others = [(distance, path) for distance, path, real in found if real != itself]
            prediction.similar = heapq.nsmallest(NEAREST, prediction.similar + others)
    return predictions


# ------------------------------------------------------------------------------- on the screen


def print_json(prediction: Prediction) -> None:
    (label, probability), *_ = prediction.top
    answer = {
        "path": str(prediction.path),
        "class": label,
        "probability": round(probability, 6),
        "top": [{"class": name, "probability": round(p, 6)} for name, p in prediction.top],
    }
    if prediction.true_class is not None:
        answer["true_class"] = prediction.true_class
    if prediction.similar:
        found = [{"distance": round(d, 4), "path": str(path)} for d, path in prediction.similar]
        answer["similar"] = found
    # Elsewhere the console would write \U0001f33c for a letter that it lacks, which is no JSON.
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    tqdm.write(json.dumps(answer, ensure_ascii=not utf8))  # which steps around the bar
    sys.stdout.flush()


def print_answers(predictions: list[Prediction], classes: list[str]) -> None:
    """One photo: its likeliest classes. Several: a table, and the accuracy if folders tell it."""
    if len(predictions) == 1:
        top = predictions[0].top
        print(f"class: {top[0][0]}, probability: {top[0][1]:.3f}")
        labels = pad([label for label, _ in top])
        for label, (_, probability) in zip(labels[1:], top[1:], strict=True):
            print(f"       {label}  {probability:.3f}")
        print_similar(predictions[0])
        return
    labels = pad([prediction.top[0][0] for prediction in predictions])
    for label, prediction in zip(labels, predictions, strict=True):
        probability = prediction.top[0][1]
        note = f"  (the folder says {prediction.true_class})" if prediction.is_wrong() else ""
        print(f"{label}  {probability:.3f}  {prediction.path}{note}")
        print_similar(prediction)
    print_accuracy([p for p in predictions if p.true_class], classes)


def print_similar(prediction: Prediction) -> None:
    for number, (distance, path) in enumerate(prediction.similar):
        print(f"{'' if number else 'similar:':8} {distance:7.2f}  {path}")


def print_accuracy(known: list[Prediction], classes: list[str]) -> None:
    """The share of right answers of each class and of all, if there are photos of known class."""
    totals = Counter(p.true_class for p in known)
    right = Counter(p.true_class for p in known if not p.is_wrong())
    lines = [(label, right[label], totals[label]) for label in classes if label in totals]
    lines += [("accuracy", right.total(), len(known))] if known else []
    labels = pad([label for label, _, _ in lines])
    for label, (_, n_right, n) in zip(labels, lines, strict=True):
        print(f"{label}  {n_right / n:.4f}  ({n_right} of {n})")


def pad(names: list[str]) -> list[str]:
    """Names filled up with spaces to one width on a console, where CJK letters take two columns."""
    widths = [len(name) + wide_letters(name) for name in names]
    return [name + " " * (max(widths) - width) for name, width in zip(names, widths, strict=True)]


def wide_letters(name: str) -> int:
    return sum(unicodedata.east_asian_width(letter) in "FW" for letter in name)


# ------------------------------------------------------------------------------- figures


def show(draw: Callable[[Figure], Figure], save: Path | None) -> None:
    """Draw into the file `save`; if none is given, in a window or else into prediction.png."""
    from matplotlib.figure import Figure

    if not save:
        from matplotlib import pyplot as plt

        figure = plt.figure(layout="constrained")
        if figure.canvas.required_interactive_framework:
            draw(figure)
            plt.show()
            return
        plt.close(figure)
        save = Path("prediction.png")
    figure = draw(Figure(layout="constrained"))
    with replacing(save) as file:
        figure.savefig(file, format=save.suffix[1:], dpi=100)
    print(f"the figure is in {save}", file=sys.stderr)


def draw_predictions(figure: Figure, predictions: list[Prediction]) -> Figure:
    """Photos beside their five likeliest classes, the true one green (the paper's figure 4)."""
    setup_fonts(str(predictions))
    n = len(predictions)
    columns = min(4, math.ceil(math.sqrt(n)))
    rows, width, size = math.ceil(n / columns), 13.5 if n > 1 else 9, 10 if columns < 3 else 8
    figure.set_size_inches(width, 0.43 * width / columns * rows)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(1, 1.25) * columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for prediction, (left, right) in zip(predictions, axes.reshape(-1, 2), strict=False):
        draw_photo(left, prediction.path, printable(prediction.path.name, 20), "black", size)
        top = prediction.top[:5]
        for row, (label, probability) in enumerate(top):
            color = "#98d594" if label == prediction.true_class else "#a6cbe8"
            right.barh(row, 1, color="#f3f3f3")
            right.barh(row, probability, color=color)
            right.text(0.02, row, printable(label, 26), va="center", fontsize=size)
            right.text(0.98, row, f"{probability:.3f}", va="center", ha="right", fontsize=size)
        right.set(xlim=(0, 1), ylim=(max(len(top), 5) - 0.4, -0.6))
        if prediction.true_class is not None:
            color = "tab:red" if prediction.is_wrong() else "tab:green"
            title = f"the folder says {printable(prediction.true_class, 20)}"
            right.set_title(title, fontsize=size, color=color)
    return figure


def draw_similar(figure: Figure, predictions: list[Prediction]) -> Figure:
    """A row a photo: itself, and the training photos most like it (the paper's figure 4, right)."""
    setup_fonts(str(predictions))
    figure.set_size_inches(13, 2.2 * len(predictions))
    figure.set_layout_engine("constrained", h_pad=0.1)  # inches: else titles touch the edge
    widths = (1, 0.15, *[1] * NEAREST)  # a gap behind the photo itself
    axes = figure.subplots(len(predictions), len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for prediction, (left, _, *others) in zip(predictions, axes, strict=True):
        label, probability = prediction.top[0]
        name, answer = printable(prediction.path.name, 22), printable(f"{label} {probability:.3f}")
        color = "tab:red" if prediction.is_wrong() else "black"
        draw_photo(left, prediction.path, f"{name}\n{answer}", color, 9)
        for axis, (distance, path) in zip(others, prediction.similar, strict=False):
            same = prediction.true_class in (None, path.parent.name)
            title = f"{printable(path.parent.name, 22)}\nat {distance:.2f}"
            draw_photo(axis, path, title, "black" if same else "tab:red", 9)
    return figure


def draw_photo(axis: Axes, path: Path, title: str, color: str, size: int) -> None:
    axis.imshow(center_square(read_image(path), 400))
    axis.set_title(title, fontsize=size, color=color)


def draw_confusion(figure: Figure, predictions: list[Prediction], classes: list[str]) -> Figure:
    """How often which class (row) was taken for which (column): counts, and rates of the row."""
    from matplotlib.colors import PowerNorm  # the square root, which lets rare mistakes be seen

    setup_fonts("".join(classes))
    n, known = len(classes), [p for p in predictions if p.true_class]
    counts = np.zeros((n, n), int)
    for prediction in known:
        counts[classes.index(prediction.true_class), classes.index(prediction.top[0][0])] += 1
    totals = counts.sum(1)
    rates = counts / totals.clip(1)[:, None]
    has_text = n <= 24  # more would not be read
    side = max(3.5, n * (0.6 if has_text else 0.15))
    figure.set_size_inches(side + 3.5, side + 2)
    axis = figure.subplots()
    image = axis.imshow(rates, "Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(image, shrink=0.6, label="share of the row")
    for row, column in np.argwhere(counts) if has_text else ():
        color = "white" if rates[row, column] > 0.3 else "black"
        text = f"{counts[row, column]}\n{rates[row, column]:.0%}"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    names, size = [printable(label, 24) for label in classes], 10 if has_text else 7
    rows = [f"{name} ({total})" for name, total in zip(names, totals, strict=True)]
    slant = {"rotation": 45 if has_text else 90, "rotation_mode": "anchor"}
    axis.set_xticks(range(n), names, fontsize=size, ha="right", va="center", **slant)
    axis.set_yticks(range(n), rows, fontsize=size)
    right = np.trace(counts)
    title = f"{right} of {len(known)} photos right: {right / len(known):.3f}"
    axis.set(xlabel="answer", ylabel="true class (photos)", title=title)
    return figure


def setup_fonts(text: str) -> None:
    """Let figures fall back on an installed font for letters that matplotlib's own lacks."""
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    def lacking(path: str) -> tuple[int, bool, str]:
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # a font that matplotlib cannot use
            return len(letters), True, path
        n = sum(not font.get_char_index(letter) for letter in letters)
        return n, font.style_name != "Regular", path

    # Where no font has a letter a box stands for it: no need for a warning each.
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    letters = {ord(letter) for letter in text}
    own = font_manager.findfont(font_manager.FontProperties())
    if lacking(own)[0]:
        # Asked of the system, as matplotlib's own list misses what was installed lately. macOS has
        # a font of boxes for all letters there are.
        fonts = [path for path in font_manager.findSystemFonts() if "LastResort" not in path]
        path = min(map(lacking, [own, *fonts]))[2]
        font_manager.fontManager.addfont(path)
        families = [*rcParams["font.family"], FT2Font(path).family_name]
        rcParams["font.family"] = list(dict.fromkeys(families))


def printable(name: str, most: int = 1000) -> str:
    """A name for a figure: its middle left out if it is long, its dollars no formula."""
    name = name.encode("utf-8", "replace").decode()  # half letters, of odd file names
    most = max(most // 2, most - wide_letters(name))
    if len(name) > most:
        name = f"{name[: most // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - most // 2 :]}"
    return name.replace("$", r"\$")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="photos, or folders of photos")

    group = parser.add_argument_group("the network")
    add = group.add_argument
    weights = "what train.py made (default: %(default)s)"
    add("--weights", type=Path, metavar="FILE", default=Path("AlexNet.pth"), help=weights)
    names = "class names (default: class_idx.json beside the weights)"
    add("--classes", type=Path, metavar="FILE", help=names)
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add = group.add_mutually_exclusive_group().add_argument
    ten = "mean over corners, centre and mirror images (default, but for folders)"
    add("--ten-crop", dest="views", action="store_const", const="ten-crop", help=ten)
    center = "the central view alone, for a tenth of the work (default for folders)"
    add("--center-crop", dest="views", action="store_const", const="center-crop", help=center)

    add = parser.add_argument_group("the answers").add_argument
    top_k = "classes told of a photo; figures show 5 at most (default: %(default)s)"
    add("--top-k", type=int, metavar="K", default=5, help=top_k)
    similar = f"find the {NEAREST} photos below FOLDER whose last hidden activations are nearest"
    add("--similar", type=Path, metavar="FOLDER", help=similar)
    add(
        "--json",
        action="store_true",
        help="print one JSON object a line, in the order of the files",
    )

    add = parser.add_argument_group("figures").add_mutually_exclusive_group().add_argument
    most = f"{MOST_DRAWN} at most, {MOST_ROWS} with --similar"
    save = f"draw the photos ({most}) into FILE (.png, .pdf, .svg), not a window"
    add("--save", type=Path, metavar="FILE", help=save)
    add("--no-figure", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error("--top-k must be at least 1")
    if args.save and args.save.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--save {args.save}: the name must end in .png, .pdf or .svg")
    return args


if __name__ == "__main__":
    sys.exit(main())
