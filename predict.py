"""Say what is on photos, with the weights that train.py saved.

    python predict.py photo.jpg                        # its classes, by ten views; a figure
    python predict.py photo.jpg --similar data/train   # and the training photos most like it
    python predict.py data/val                         # a table, the accuracy, a confusion matrix
    python predict.py data/val --json > answers.jsonl  # one JSON object a line

The innermost folder named like a class tells a photo's true class. A table begins with the surest
wrong answers, where wrong labels show. A file that is no picture is named on stderr, the others
are answered, and the exit status is 1.
"""

import glob
import itertools
import json
import logging
import math
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

import alexnet
from alexnet import AlexNet, InputError, image_files

NEAREST = 6  # training photos that --similar finds
MOST_DRAWN = 24  # photos in a figure
FIGURE = Path("prediction.png")  # where neither a display nor --save is
CONFUSION = Path("confusion_matrix.png")

# Fonts, where installed, for letters that matplotlib's own lacks.
CJK = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic")
matplotlib.rcParams |= {"font.family": ["sans-serif", *CJK], "text.parse_math": False}
if "IPython" not in sys.modules and os.environ.get("MPLBACKEND", "").startswith("module:"):
    matplotlib.use("agg")  # a notebook's own, inherited, may be missing here
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "Glyph .* missing from")

# What --json prints of a photo: path, class, probability, top (classes and probabilities),
# true_class where a folder tells it, similar (paths and distances).
Answer = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with alexnet.one_line_errors("end other programs, or leave the card with --device cpu"):
        device = alexnet.pick_device(args.device)
        net = alexnet.load_network(args.weights)
        classes = alexnet.load_classes(args.weights, net)
        net.to(device, memory_format=alexnet.pick_layout(device))
        files = [file for path in args.photos for file in files_of(path)]
        training = files_of(args.similar) if args.similar else []
        if args.similar and not args.similar.is_dir():
            raise InputError(f"--similar {args.similar} is no folder")
        any_folder = any(path.is_dir() for path in args.photos)
        if not args.json:
            figures = [args.save or FIGURE] if args.save or not any_folder else []
            figures += [CONFUSION] if any_folder else []
            check_figures(figures, [*files, *training, args.weights])
        views = args.views or ("center" if any_folder else "ten")
        found = predict(net, classes, files, views == "ten", args.top_k)
        if training:
            found = find_similar(net, list(found), training)
        answers = []
        for answer in found:
            answers.append(answer)
            if args.json:
                print(json.dumps(answer), flush=True)
        answers.sort(key=doubt)
        if answers and not args.json:
            print_answers(answers, len(classes))
            if args.save or not any_folder:
                show(draw_answers(answers[:MOST_DRAWN]), args.save)
            if any_folder and any("true_class" in answer for answer in answers):
                show(draw_confusion(answers, classes), CONFUSION)
        return int(len(answers) < len(files))


def files_of(path: Path) -> list[Path]:
    """The file, the pictures in a folder, or those of a pattern, which Windows leaves to us."""
    if path.is_dir():
        if not (files := image_files(path)):
            raise InputError(f"there are no pictures in the folder {path}")
        return files
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path)))) or [path]


def check_figures(figures: list[Path], read: list[Path]) -> None:
    """Refuse to write a figure over a file that is read, however it is spelled."""
    for figure in filter(Path.exists, figures):
        if any(path.exists() and path.samefile(figure) for path in read):
            way = "give another name by --save, or start this in another folder"
            raise InputError(f"the figure {figure} would replace a file that is read: {way}")


def read_batches(files: list[Path], net: AlexNet) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and images (n, 3, 256, 256), n up to 64, of the files that can be read."""
    photos = alexnet.read_squares(files, "reading")
    while batch := list(itertools.islice(photos, 64)):
        paths, pixels = zip(*batch, strict=True)
        yield list(paths), alexnet.to_float(torch.from_numpy(np.stack(pixels)).to(net.mean.device))


def predict(
    net: AlexNet, classes: list[str], files: list[Path], ten_views: bool, top_k: int
) -> Iterator[Answer]:
    """Answer photo by photo, in the order of the files."""
    for paths, images in read_batches(files, net):
        probabilities = alexnet.predict_probabilities(net, images, ten_views)
        best = probabilities.cpu().topk(min(top_k, len(classes)))
        for path, indices, values in zip(paths, best.indices, best.values, strict=True):
            top = [
                {"class": classes[i], "probability": round(p, 6)}
                for i, p in zip(indices, values.tolist(), strict=True)
            ]
            answer = {"path": str(path), **top[0], "top": top}
            folders = (alexnet.class_of(folder.name) for folder in path.absolute().parents)
            if true_class := next((name for name in folders if name in classes), None):
                answer["true_class"] = true_class
            yield answer


@torch.inference_mode()
def find_similar(net: AlexNet, answers: list[Answer], training: list[Path]) -> list[Answer]:
    """Add the NEAREST training photos by their last hidden activations (section 6.1)."""
    asked, found = [Path(answer["path"]) for answer in answers], []
    queries = [net.hidden(*alexnet.views_of(x, ten=False)) for _, x in read_batches(asked, net)]
    for paths, images in read_batches(training if asked else [], net):
        activations = net.hidden(*alexnet.views_of(images, ten=False))
        # Not by a matrix product, which loses small distances.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(activations, torch.cat(queries), compute_mode=mode).tolist()
        found += zip(paths, distances, strict=True)
    # `found`: (path, its distances to all that was asked).
    for number, answer in enumerate(answers):
        nearest = sorted(found, key=lambda item: item[1][number])[: NEAREST + 1]
        others = [(p, d[number]) for p, d in nearest if not p.samefile(answer["path"])][:NEAREST]
        answer["similar"] = [{"path": str(path), "distance": round(d, 4)} for path, d in others]
    return answers


# ----- on the screen
def is_wrong(answer: Answer) -> bool:
    return answer.get("true_class", answer["class"]) != answer["class"]


def doubt(answer: Answer) -> tuple[bool, float]:
    """Sorts the surest wrong answers first, then the least sure of the others."""
    return (False, -answer["probability"]) if is_wrong(answer) else (True, answer["probability"])


def print_answers(answers: list[Answer], n_classes: int) -> None:
    """Of one photo its likeliest classes; of several a table, and the accuracy if known."""
    for answer in answers:
        if len(answers) == 1:
            print(f"class: {answer['class']}, probability: {answer['probability']:.3f}")
            for other in answer["top"][1:]:
                print(f"       {other['probability']:.3f}  {other['class']}")
        else:
            note = f"  (the folder says {answer['true_class']})" if is_wrong(answer) else ""
            print(f"{answer['probability']:.3f}  {answer['class']}  {answer['path']}{note}")
        for similar in answer.get("similar", ()):
            print(f"       like it, at {similar['distance']:.2f}: {similar['path']}")
    known = [answer for answer in answers if "true_class" in answer]
    if len(answers) > 1 and known:
        totals = Counter(answer["true_class"] for answer in known)
        right = Counter(answer["true_class"] for answer in known if not is_wrong(answer))
        for label in sorted(totals):
            print(f"{right[label] / totals[label]:.4f}  {label}: {right[label]} of {totals[label]}")
        mean = sum(right[label] / totals[label] for label in totals) / len(totals)
        print(f"{mean:.4f}  mean over the classes")
        if n_classes > 5 <= len(known[0]["top"]):  # the paper's measure
            among = [a["true_class"] in [guess["class"] for guess in a["top"][:5]] for a in known]
            print(f"{sum(among) / len(known):.4f}  top-5 accuracy")
        print(f"{right.total() / len(known):.4f}  accuracy: {right.total()} of {len(known)}")


# ----- figures
def show(figure: Figure, save: Path | None) -> None:
    """Into the file `save`, or else in a window, or else into prediction.png."""
    if not save and figure.canvas.required_interactive_framework:
        pyplot.show()
        return
    path = save or FIGURE
    with alexnet.replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])
    pyplot.close(figure)
    print(f"the figure is in {path}", file=sys.stderr)


def draw_answers(answers: list[Answer]) -> Figure:
    """Photos beside their likeliest classes and what is similar (the paper's figure 4)."""
    n_similar = max(len(answer.get("similar", ())) for answer in answers)
    columns = 1 if n_similar else min(3, math.ceil(len(answers) ** 0.5))
    rows = math.ceil(len(answers) / columns)
    widths = [1, 1.25, *[1] * n_similar] * columns
    figure = pyplot.figure(figsize=(max(2.2 * sum(widths), 7), 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    places = axes.reshape(rows * columns, -1)  # one for each answer
    for axis in axes.flat:
        axis.set_axis_off()
    for answer, (photo, bars, *others) in zip(answers, places, strict=False):
        for axis, item in zip([photo, *others], [answer, *answer.get("similar", ())], strict=False):
            path = Path(item["path"])
            title = short(path.name)
            if "distance" in item:
                title = f"{short(path.parent.name)}\nat {item['distance']:.2f}"
            axis.imshow(alexnet.read_square(path, 400))
            axis.set_title(title, fontsize=9)
        true_class = answer.get("true_class")
        for row, guess in enumerate(answer["top"][:5]):
            color = "#98d594" if guess["class"] == true_class else "#a6cbe8"
            bars.barh(row, guess["probability"], color=color)
            text = f"{guess['probability']:.3f}  {short(guess['class'])}"
            bars.text(0.02, row, text, va="center", fontsize=9)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6))
        if true_class:
            color = "tab:red" if is_wrong(answer) else "tab:green"
            bars.set_title(f"the folder says {short(true_class)}", fontsize=9, color=color)
    return figure


def short(name: str) -> str:
    """A name for a figure: of a long one both ends; half letters of odd files as ?."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"


def draw_confusion(answers: list[Answer], classes: list[str]) -> Figure:
    """How often which class (row) was taken for which (column), coloured by share."""
    counts = np.zeros([len(classes)] * 2, int)
    for answer in answers:
        if "true_class" in answer:
            counts[classes.index(answer["true_class"]), classes.index(answer["class"])] += 1
    totals, right = counts.sum(1), np.trace(counts)
    side = min(0.5 * len(classes), 40)  # inches
    figure, axis = pyplot.subplots(figsize=(side + 3.5, side + 2.5), layout="constrained")
    shares = counts / totals.clip(1)[:, None]
    axis.imshow(shares**0.5, "Blues", vmin=0, vmax=1)  # the root lets rare mistakes be seen
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.3 else "black"
        axis.text(column, row, counts[row, column], ha="center", va="center", color=color)
    names = [short(label) for label in classes]
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), [f"{x} ({n})" for x, n in zip(names, totals, strict=True)])
    title = f"{right} of {totals.sum()} photos right: {right / totals.sum():.3f}"
    axis.set(xlabel="answer", ylabel="true class (photos)", title=title)
    return figure


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="photos, or folders of photos")
    add("--weights", type=Path, default=Path("AlexNet.pth"), help="(default: AlexNet.pth)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    views = "the centre, or the mean of ten (default: ten for photos, center for folders)"
    add("--views", choices=("center", "ten"), help=views)
    add("--top-k", type=int, default=5, help="classes told of a photo (default: 5)")
    add("--similar", type=Path, metavar="FOLDER", help="find the photos in it most like these")
    add("--json", action="store_true", help="print one JSON object a line, and draw nothing")
    save = f"draw the photos, {MOST_DRAWN} at most, into this .png, .pdf or .svg, not a window"
    add("--save", type=Path, metavar="FILE", help=save)
    args = parser.parse_args(argv)
    if args.top_k < 1:
        parser.error("--top-k must be at least 1")
    if args.save and args.save.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--save {args.save}: give a name ending in .png, .pdf or .svg")
    return args


if __name__ == "__main__":
    sys.exit(main())
