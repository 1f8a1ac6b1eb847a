"""Say what is on a photo, with the weights that train.py saved.

    python predict.py photo.jpg                   # ten views; the photo and its five best classes
    python predict.py data/val                    # a folder: central views, a table, the accuracy
    python predict.py a.jpg b.jpg --json          # one JSON object a line

A file that is no picture is named on stderr, the others are answered, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from alexnet import (
    AlexNet,
    InputError,
    center_square,
    describe,
    image_files,
    load_tensors,
    photos_at_once,
    pick_device,
    predict_probabilities,
    read_image,
    replacing,
    setup_console,
    to_float,
)


@dataclass
class Prediction:
    """The answer for one photo."""

    path: Path
    top: list[tuple[str, float]]  # class and probability, the likeliest first
    true_class: str | None  # the folder's name, if it is a class


def main(argv: list[str] | None = None) -> int:
    setup_console()
    args = parse_args(argv)
    try:
        return run(args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {describe(error)}") from error
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    net, classes = load_network(args.weights, args.classes)
    net.to(device, memory_format=torch.channels_last).eval()
    files = find_files(args.photos)
    if args.save and len(files) > 1:
        raise InputError(f"--save draws one photo, and {len(files)} were given")
    any_folder = any(path.is_dir() for path in args.photos)
    views = args.views or ("center-crop" if any_folder else "ten-crop")
    predictions = []
    for prediction in predict(net, classes, files, views, args.top_k):
        predictions.append(prediction)
        if args.json:
            print_json(prediction)
    if not args.json:
        print_answers(predictions, classes)
    if predictions and len(files) == 1 and not args.no_figure and (args.save or not args.json):
        show(predictions[0], args.save)
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


def predict(
    net: AlexNet, classes: list[str], files: list[Path], views: str, top_k: int
) -> Iterator[Prediction]:
    """Answer photo by photo; those that cannot be read are named on stderr."""
    step = photos_at_once(views)
    with tqdm(total=len(files), unit="photo", leave=False, disable=len(files) < 2 or None) as bar:
        for start in range(0, len(files), step):
            paths, photos = [], []
            for path in files[start : start + step]:
                try:
                    photos.append(np.asarray(center_square(read_image(path))))
                    paths.append(path)
                except InputError as error:
                    tqdm.write(f"error: {error}", file=sys.stderr)
            if photos:
                images = to_float(torch.from_numpy(np.stack(photos)).to(net.mean.device))
                probabilities = predict_probabilities(net, images, views).cpu()
                if not probabilities.isfinite().all():
                    raise InputError("these weights do not give numbers; train again")
                for path, row in zip(paths, probabilities, strict=True):
                    best = row.topk(min(top_k, len(classes)))
                    top = [
                        (classes[i], p)
                        for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    ]
                    folder = path.absolute().parent.name
                    yield Prediction(path, top, folder if folder in classes else None)
            bar.update(len(files[start : start + step]))


# ------------------------------------------------------------------------------- on the screen


def print_json(prediction: Prediction) -> None:
    (label, probability), *_ = prediction.top
    top = [{"class": name, "probability": round(p, 6)} for name, p in prediction.top]
    answer = {
        "path": str(prediction.path),
        "class": label,
        "probability": round(probability, 6),
        "top": top,
    }
    # Elsewhere the console would write \U0001f33c for a letter that it lacks, which is no JSON.
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(answer, ensure_ascii=not utf8), flush=True)


def print_answers(predictions: list[Prediction], classes: list[str]) -> None:
    """One photo: its likeliest classes. Several: a table, and the accuracy if folders tell it."""
    if len(predictions) == 1:
        top = predictions[0].top
        print(f"class: {top[0][0]}, probability: {top[0][1]:.3f}")
        width = max(len(label) for label, _ in top)
        for label, probability in top[1:]:
            print(f"       {label:<{width}}  {probability:.3f}")
        return
    width = max((len(p.top[0][0]) for p in predictions), default=0)
    for prediction in predictions:
        (label, probability), *_ = prediction.top
        wrong = prediction.true_class not in (None, label)
        note = f"  (the folder says {prediction.true_class})" if wrong else ""
        print(f"{label:<{width}}  {probability:.3f}  {prediction.path}{note}")
    known = [p for p in predictions if p.true_class]
    if known:
        totals = Counter(p.true_class for p in known)
        right = Counter(p.true_class for p in known if p.true_class == p.top[0][0])
        width = max(len(label) for label in [*totals, "accuracy"])
        for label in classes:
            if label in totals:
                n, n_right = totals[label], right[label]
                print(f"{label:<{width}}  {n_right / n:.4f}  ({n_right} of {n})")
        n, n_right = len(known), right.total()
        print(f"{'accuracy':<{width}}  {n_right / n:.4f}  ({n_right} of {n})")


def show(prediction: Prediction, save: Path | None) -> None:
    """Show the figure in a window; write it to `save`, or without a display to prediction.png."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a class may be called $x$
    if not save:
        from matplotlib import pyplot as plt

        figure = plt.figure(figsize=(9, 4), layout="constrained")
        if figure.canvas.required_interactive_framework:
            draw_prediction(figure, prediction)
            plt.show()
            return
        plt.close(figure)
        save = Path("prediction.png")
    figure = Figure(figsize=(9, 4), layout="constrained")
    draw_prediction(figure, prediction)
    with replacing(save) as file:
        figure.savefig(file, format=save.suffix[1:], dpi=100)
    print(f"the figure is in {save}", file=sys.stderr)


def draw_prediction(figure: Figure, prediction: Prediction) -> None:  # noqa: F821
    """The photo and its likeliest classes as bars (the paper's figure 4, left)."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    image = read_image(prediction.path)
    image.thumbnail((800, 800), Image.Resampling.BICUBIC)
    left.imshow(image)
    left.set_axis_off()
    left.set_title(prediction.path.name)
    labels, values = zip(*reversed(prediction.top), strict=True)
    colors = ["tab:green" if label == prediction.true_class else "tab:blue" for label in labels]
    right.barh(labels, values, color=colors)
    for row, value in enumerate(values):
        right.text(value + 0.01, row, f"{value:.3f}", va="center")
    right.set(xlim=(0, 1.12), xlabel="probability")
    right.spines[["top", "right"]].set_visible(False)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="photos, or folders of photos")
    add("--weights", type=Path, default=Path("AlexNet.pth"), help="(default: %(default)s)")
    add("--classes", type=Path, help="class names (default: class_idx.json beside the weights)")
    add("--top-k", type=int, default=5, help="classes told of a photo (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--json", action="store_true", help="print one JSON object a line")

    add = parser.add_mutually_exclusive_group().add_argument
    ten = "mean over corners, centre and mirror images (default, but for folders)"
    add("--ten-crop", dest="views", action="store_const", const="ten-crop", help=ten)
    center = "the central view alone, for a tenth of the work (default for folders)"
    add("--center-crop", dest="views", action="store_const", const="center-crop", help=center)

    add = parser.add_mutually_exclusive_group().add_argument
    save = "write one photo's figure to FILE (.png, .pdf, .svg) instead of showing it"
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
