"""Draw a stand-in for the flower photos, for the times when no photos are at hand.

    python tests/draw_flowers.py drawn/flower_photos --per-class 70

Five kinds that differ in shape; size, place, angle, colours and background vary within each. What
a network scores on these drawings says nothing about photos.
"""

from __future__ import annotations

import argparse
import colorsys
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
SCALE = 2  # everything is drawn twice as large, for smooth edges


def bright(rng: random.Random) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.7, 1))
    return int(255 * red), int(255 * green), int(255 * blue)


def dark(rng: random.Random) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(
        rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.1, 0.45)
    )
    return int(255 * red), int(255 * green), int(255 * blue)


def ring(x: float, y: float, radius: float, n: int, turn: float) -> list[tuple[float, float]]:
    """N points on a circle."""
    angles = [turn + 2 * math.pi * i / n for i in range(n)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, **kwargs) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), **kwargs)


def daisy(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    """Separate thin petals around a small centre."""
    color, turn = bright(rng), rng.uniform(0, 7)
    for px, py in ring(x, y, r, rng.randint(9, 13), turn):
        draw.line((x, y, px, py), fill=color, width=int(r * 0.18))
        disc(draw, px, py, r * 0.09, fill=color)
    disc(draw, x, y, r * 0.25, fill=bright(rng))


def dandelion(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    """A globe of hairlines with a dot at each end."""
    color, turn = bright(rng), rng.uniform(0, 7)
    for part in (0.55, 0.8, 1):
        for px, py in ring(x, y, r * part, int(30 * part), turn + part):
            draw.line((x, y, px, py), fill=color, width=SCALE)
            disc(draw, px, py, r * 0.045, fill=color)


def rose(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    """A full round flower of petals that wind inwards."""
    color, line, turn = bright(rng), dark(rng), rng.uniform(0, 7)
    for step in range(14):
        radius = r * (1 - step / 15)
        ((px, py),) = ring(x, y, r * 0.12, 1, turn + 2.4 * step)
        disc(draw, px, py, radius, fill=color, outline=line, width=int(r * 0.05))


def sunflower(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    """A large dark disc in a crown of pointed petals."""
    color, turn, n = bright(rng), rng.uniform(0, 7), rng.randint(15, 19)
    inner = ring(x, y, r * 0.6, n, turn)
    outer = ring(x, y, r, n, turn + math.pi / n)
    draw.polygon([point for pair in zip(inner, outer, strict=True) for point in pair], fill=color)
    disc(draw, x, y, r * 0.62, fill=dark(rng))


def tulip(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, rng: random.Random) -> None:
    """A cup with three points, on a stem with two leaves."""
    color, green = bright(rng), (30, rng.randint(90, 160), 50)
    lean = rng.uniform(-0.3, 0.3) * r
    draw.line((x, y, x + lean, y + 1.9 * r), fill=green, width=int(r * 0.14))
    for side in (-1, 1):
        tip = (x + side * r * 0.8, y + r * 0.7)
        draw.polygon([(x + lean, y + 1.9 * r), tip, (x + lean * 0.8, y + 1.4 * r)], fill=green)
    w = 0.7 * r
    points = [(-w, -r), (-w / 2, -r * 0.4), (0, -r), (w / 2, -r * 0.4), (w, -r), (w, 0)]
    cup = [(w * 0.6, r * 0.5), (-w * 0.6, r * 0.5), (-w, 0)]
    draw.polygon([(x + dx, y + dy) for dx, dy in points + cup], fill=color)


KINDS: dict[str, Callable] = {
    "daisy": daisy,
    "dandelion": dandelion,
    "roses": rose,
    "sunflowers": sunflower,
    "tulips": tulip,
}


def draw_flower(kind: str, rng: random.Random, width: int = 320, height: int = 240) -> Image.Image:
    """One flower on a blurred background, RGB, width x height pixels."""
    w, h = width * SCALE, height * SCALE
    image = Image.new("RGB", (w, h), dark(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        disc(draw, rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0.05, 0.3) * w, fill=dark(rng))
    image = image.filter(ImageFilter.GaussianBlur(6 * SCALE))
    radius = rng.uniform(0.22, 0.4) * h
    if kind == "tulips":  # which stand on a stem
        radius *= 0.75
    x = w / 2 + rng.uniform(-0.12, 0.12) * h
    y = h / 2 + rng.uniform(-0.12, 0.12) * h - (0.35 * radius if kind == "tulips" else 0)
    KINDS[kind](ImageDraw.Draw(image), x, y, radius, rng)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the folder to write class folders into")
    parser.add_argument("--per-class", type=int, default=70, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for kind in KINDS:
        (args.output / kind).mkdir(parents=True, exist_ok=True)
        for i in range(args.per_class):
            rng = random.Random(f"{args.seed} {kind} {i}")
            draw_flower(kind, rng).save(args.output / kind / f"{i:04d}.jpg", quality=90)
    print(f"drew {args.per_class} each of {', '.join(KINDS)} into {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
