"""Say what is on photos, with the weights that train.py saved.

    python predict.py photo.jpg                        # its classes, by ten views; a figure
    python predict.py photo.jpg --similar data/train   # and the training photos most like it
    python predict.py data/val                         # a table, the accuracy, a confusion matrix
    python predict.py data/val --json > answers.jsonl  # one JSON object a line

A photo's true class is the innermost folder around it that is named like a class, up to the folder
given here; of a photo given here, its own folder alone counts. A table begins with the surest wrong
answers, where wrong labels show. A picture that cannot be read is named on stderr, the others are
answered, and the exit status is 1.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import alexnet
from alexnet import AlexNet, InputError, image_files, path_of

NEAREST = 6  # training photos that --similar finds for each
MOST_DRAWN = 24  # photos in a figure, at most
FIGURE = Path("prediction.png")  # without a display and without --save
CONFUSION = Path("confusion_matrix.png")

# Fonts, where installed, for letters that matplotlib's own lacks.
CJK = ("Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic")
matplotlib.rcParams["font.family"] = ["sans-serif", *CJK]
matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
# A notebook hands its own backend down to what it starts, where that may be missing.
if "IPython" not in sys.modules and os.environ.get("MPLBACKEND", "").startswith("module:"):
    matplotlib.use("agg")
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "Glyph .* missing from")

# What --json prints of a photo: path, class, probability, top (classes and probabilities),
# true_class where a folder tells it, similar (paths and distances).
Answer = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with alexnet.one_line_errors("close other programs, or use --device cpu"):
        device = alexnet.pick_device(args.device)
        net = alexnet.load_network(args.weights)
        classes = alexnet.load_classes(args.weights, net)
        net.to(device, memory_format=alexnet.pick_layout(device))

        files = [file for path in args.photos for file in files_of(path)]
        files = list(dict.fromkeys(files))  # a photo may be given itself and in a folder
        training = files_of(args.similar) if args.similar else []
        check_figures(args, [*files, *training, args.weights])

        answers = predict(net, classes, files, args)
        if args.similar:
            answers = find_similar(net, list(answers), training)
        if args.json:
            n_answers = print_json(answers)
        else:
            n_answers = show_answers(args, answers, classes)
        return int(n_answers < len(files))  # 1, if a file could not be read


# ----- the files
def files_of(path: Path) -> list[Path]:
    """The pictures in a folder, or the file itself."""
    if not os.path.isdir(path):
        return [path]  # a file that is missing is named when it is read
    files = image_files(path)
    if not files:
        raise InputError(f"there are no pictures in the folder {path}")
    return files


def check_figures(args: Namespace, read: list[Path]) -> None:
    """Refuse to write a figure over a file that is read, or among the photos of a folder."""
    given = [*args.photos, args.similar] if args.similar else args.photos
    folders = [path.resolve() for path in filter(os.path.isdir, given)]
    for figure in [] if args.json else figures_of(args):
        way = "start this in another folder"
        if figure != CONFUSION:
            way = f"give another name by --save, or {way}"
        if figure.exists() and any(path.samefile(figure) for path in filter(os.path.exists, read)):
            raise InputError(f"the figure {figure} would replace a file that is read: {way}")
        if set(folders).intersection(figure.resolve().parents):
            raise InputError(f"the figure {figure} would lie among the photos: {way}")


def figures_of(args: Namespace) -> list[Path]:
    """The files that figures may be written to."""
    if not args.any_folder:
        return [args.save or FIGURE]
    return [CONFUSION, args.save] if args.save else [CONFUSION]


def read_batches(files: list[Path], net: AlexNet) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and images (n, 3, 256, 256), n up to 64, of the files that can be read."""
    photos = alexnet.read_squares(files, "reading")
    while batch := list(itertools.islice(photos, 64)):
        paths, squares = zip(*batch, strict=True)
        pixels = torch.from_numpy(np.stack(squares)).to(net.mean.device)
        yield list(paths), alexnet.to_float(pixels)


# ----- the answers
def predict(
    net: AlexNet, classes: list[str], files: list[Path], args: Namespace
) -> Iterator[Answer]:
    """Answer photo by photo, in the order of the files."""
    given = set(args.photos)
    for paths, images in read_batches(files, net):
        probabilities = alexnet.predict_probabilities(net, images, args.views == "ten")
        best = probabilities.cpu().topk(min(args.top_k, len(classes)))
        values, indices = best.values.tolist(), best.indices.tolist()
        for number, path in enumerate(paths):
            top = [
                {"class": classes[i], "probability": round(p, 6)}
                for i, p in zip(indices[number], values[number], strict=True)
            ]
            answer = {"path": str(path), **top[0], "top": top}
            if true_class := true_class_of(path, given, classes):
                answer["true_class"] = true_class
            yield answer


def true_class_of(path: Path, given: set[Path], classes: list[str]) -> str | None:
    """The innermost folder named like a class, up to the one given; of a photo given, its own."""
    for folder in path.parents:
        name = alexnet.class_of(os.path.basename(os.path.abspath(folder)))
        if name in classes:
            return name
        if folder in given or path in given:
            break
    return None


@torch.inference_mode()
def find_similar(net: AlexNet, answers: list[Answer], training: list[Path]) -> list[Answer]:
    """Add the NEAREST training photos by their last hidden activations (section 6.1)."""
    if not answers:
        return []
    asked = [Path(answer["path"]) for answer in answers]
    queries = torch.cat([hidden_of(net, images) for _, images in read_batches(asked, net)])

    # (distance, path) of the nearest so far to each photo; one more, as it may be among them.
    found: list[list[tuple[float, Path]]] = [[] for _ in answers]
    for paths, images in read_batches(training, net):
        hidden = hidden_of(net, images)
        # Not by a matrix product, which would lose small distances. A few at a time, as MPS keeps
        # all differences in memory, 1 MB for each of the `queries`.
        mode = "donot_use_mm_for_euclid_dist"
        distances = [torch.cdist(some, hidden, compute_mode=mode) for some in queries.split(64)]
        for nearest, row in zip(found, torch.cat(distances).tolist(), strict=True):
            nearest += zip(row, paths, strict=True)
            nearest.sort(key=lambda item: item[0])
            del nearest[NEAREST + 1 :]

    for answer, path, nearest in zip(answers, asked, found, strict=True):
        others = [item for item in nearest if not item[1].samefile(path)][:NEAREST]
        answer["similar"] = [{"path": str(p), "distance": round(d, 4)} for d, p in others]
    return answers


def hidden_of(net: AlexNet, images: Tensor) -> Tensor:
    """The last hidden activations by the central view, (N, 4096)."""
    (view,) = alexnet.views_of(images, ten=False)
    return net.hidden(view)


# ----- on the screen
def print_json(answers: Iterable[Answer]) -> int:
    """Print each answer as soon as it is there; returns their number."""
    n_answers = 0
    for answer in answers:
        print(json.dumps(answer), flush=True)
        n_answers += 1
    return n_answers


def show_answers(args: Namespace, answers: Iterable[Answer], classes: list[str]) -> int:
    """Print and draw all answers, those to look at first; returns their number."""
    answers = sorted(answers, key=review_order)
    known = [answer for answer in answers if "true_class" in answer]
    if len(answers) == 1:
        print_one(answers[0])
    else:
        print_table(answers)
    if known and len(answers) > 1:
        print_scores(known, len(classes))
        if len(known) < len(answers):
            n = len(answers) - len(known)
            print(f"not counted, in no folder named like a class: {n} photos")

    if answers and (args.save or not args.any_folder):
        show(draw_answers(answers[:MOST_DRAWN]), args.save)
    if known and args.any_folder:
        show(draw_confusion(known, classes), CONFUSION)
    return len(answers)


def is_wrong(answer: Answer) -> bool:
    return answer.get("true_class", answer["class"]) != answer["class"]


def review_order(answer: Answer) -> tuple[bool, float]:
    """Sorts the surest wrong answers first, then the least sure of the others."""
    if is_wrong(answer):
        return False, -answer["probability"]
    return True, answer["probability"]


def print_one(answer: Answer) -> None:
    """The likeliest classes of one photo."""
    print(f"class: {answer['class']}, probability: {answer['probability']:.3f}")
    for other in answer["top"][1:]:
        print(f"       {other['probability']:.3f}  {other['class']}")
    print_similar(answer)


def print_table(answers: list[Answer]) -> None:
    """A line for each photo."""
    for answer in answers:
        note = f"  (the folder says {answer['true_class']})" if is_wrong(answer) else ""
        print(f"{answer['probability']:.3f}  {answer['class']}  {answer['path']}{note}")
        print_similar(answer)


def print_similar(answer: Answer) -> None:
    for similar in answer.get("similar", ()):
        print(f"       like it, at {similar['distance']:.2f}: {similar['path']}")


def print_scores(known: list[Answer], n_classes: int) -> None:
    """Recall and precision by class, the mean recall, top-5, and the accuracy over all photos."""
    totals = Counter(answer["true_class"] for answer in known)
    answered = Counter(answer["class"] for answer in known)
    right = Counter(answer["true_class"] for answer in known if not is_wrong(answer))
    print("recall  precision")
    recalls = []
    for label, total in sorted(totals.items()):
        recalls.append(right[label] / total)
        precision = f"{right[label] / answered[label]:.4f}" if answered[label] else "     -"
        counts = f"{right[label]} of {total} right, named {answered[label]} times"
        print(f"{recalls[-1]:.4f}     {precision}  {label}: {counts}")
    print(f"{sum(recalls) / len(recalls):.4f}  mean recall over the classes")

    # The paper's measure; it needs five answers a photo, which --top-k may not leave.
    if n_classes > 5 and len(known[0]["top"]) >= 5:
        hits = 0
        for answer in known:
            names = [guess["class"] for guess in answer["top"][:5]]
            hits += answer["true_class"] in names
        print(f"{hits / len(known):.4f}  top-5 accuracy")
    n_right = right.total()
    print(f"{n_right / len(known):.4f}  accuracy: {n_right} of {len(known)}")


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
    # One answer a row where there are similar photos, else up to three.
    n_similar = max(len(answer.get("similar", ())) for answer in answers)
    columns = 1 if n_similar else min(3, math.ceil(len(answers) ** 0.5))
    rows = math.ceil(len(answers) / columns)
    widths = [1, 1.25, *[1] * n_similar] * columns  # photo, bars, similar photos
    size = max(2.2 * sum(widths), 7), 2.4 * rows  # inches
    figure = pyplot.figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    places = axes.reshape(rows * columns, -1)  # a row of them for each answer
    for answer, (photo, bars, *others) in zip(answers, places, strict=False):
        path = Path(answer["path"])
        draw_photo(photo, path, short(path.name))
        draw_bars(bars, answer)
        for axis, similar in zip(others, answer.get("similar", ()), strict=False):
            path = Path(similar["path"])
            title = f"{short(path.parent.name)}\nat {similar['distance']:.2f}"
            draw_photo(axis, path, title)
    return figure


def draw_photo(axis: Axes, path: Path, title: str) -> None:
    axis.imshow(alexnet.read_square(path, 400))
    axis.set_title(title, fontsize=9)


def draw_bars(axis: Axes, answer: Answer) -> None:
    """The likeliest classes; the true one, where it is known, is green."""
    true_class = answer.get("true_class")
    for row, guess in enumerate(answer["top"][:5]):
        color = "#98d594" if guess["class"] == true_class else "#a6cbe8"
        axis.barh(row, guess["probability"], color=color)
        text = f"{guess['probability']:.3f}  {short(guess['class'])}"
        axis.text(0.02, row, text, va="center", fontsize=9)
    axis.set(xlim=(0, 1), ylim=(4.6, -0.6))
    if true_class:
        color = "tab:red" if is_wrong(answer) else "tab:green"
        axis.set_title(f"the folder says {short(true_class)}", fontsize=9, color=color)


def short(name: str) -> str:
    """A name for a figure: of a long one both ends; half letters of odd files as ?."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"


def draw_confusion(known: list[Answer], classes: list[str]) -> Figure:
    """How often which true class (row) got which answer (column), coloured by share."""
    counts = np.zeros((len(classes), len(classes)), int)
    for answer in known:
        row, column = classes.index(answer["true_class"]), classes.index(answer["class"])
        counts[row, column] += 1
    totals, right = counts.sum(1), np.trace(counts)
    side = min(0.5 * len(classes), 40)  # inches
    figure, axis = pyplot.subplots(figsize=(side + 3.5, side + 2.5), layout="constrained")
    shares = counts / totals.clip(1)[:, None]
    axis.imshow(shares**0.5, "Blues", vmin=0, vmax=1)  # the root lets rare mistakes be seen
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.3 else "black"
        axis.text(column, row, counts[row, column], ha="center", va="center", color=color)
    names = [short(label) for label in classes]
    labels = [f"{name} ({total})" for name, total in zip(names, totals, strict=True)]
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), labels)
    n = totals.sum()
    title = f"{right} of {n} photos right: {right / n:.3f}"
    axis.set(xlabel="answer", ylabel="true class (photos)", title=title)
    return figure


def matches_of(path: Path) -> list[Path]:
    """What a pattern matches, which a shell of Windows leaves to us; else the path itself."""
    if os.path.exists(path):
        return [path]
    matches = glob.glob(str(path).replace("[", "[[]"))  # there, brackets are no pattern
    return sorted(map(Path, matches)) or [path]


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", nargs="+", type=path_of, metavar="PHOTO", help="photos, or folders of photos")
    add("--weights", type=path_of, default=Path("AlexNet.pth"), help="(default: AlexNet.pth)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add(
        "--views",
        choices=("center", "ten"),
        help="the centre, or the mean of ten (default: ten for photos, center for folders)",
    )
    add("--top-k", type=int, default=5, help="classes to report for a photo (default: 5)")
    add("--similar", type=path_of, metavar="FOLDER", help="find the photos in it most like these")
    add("--json", action="store_true", help="print one JSON object a line, and draw nothing")
    add(
        "--save",
        type=path_of,
        metavar="FILE",
        help=f"draw the photos, {MOST_DRAWN} at most, into this .png, .pdf or .svg, not a window",
    )
    args = parser.parse_args(argv)
    args.photos = [match for path in args.photos for match in matches_of(path)]
    args.any_folder = any(map(os.path.isdir, args.photos))
    args.views = args.views or ("center" if args.any_folder else "ten")
    if args.similar and not os.path.isdir(args.similar):
        parser.error(f"--similar {args.similar} is no folder")
    if args.top_k < 1:
        parser.error("--top-k must be at least 1")
    if args.save and not os.path.isdir(args.save.parent):
        parser.error(f"--save {args.save}: there is no folder {args.save.parent}")
    if args.save and args.save.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--save {args.save}: give a name ending in .png, .pdf or .svg")
    return args


if __name__ == "__main__":
    sys.exit(main())
