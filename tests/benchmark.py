"""Measure speed and memory beside stock PyTorch, on drawn photos; a person runs this.

    python tests/benchmark.py                      # about ten minutes on two CPU cores
    python tests/benchmark.py --rounds 5
    python tests/benchmark.py --device cuda        # not yet run on a card

Stock is the same network as a tutorial writes it: nn.LocalResponseNorm, contiguous float32
tensors, an ImageFolder with RandomResizedCrop, flip and ColorJitter, a DataLoader without workers,
one .item() a batch. Each measurement is a process of its own; ours and stock take turns, and the
table shows medians of the rounds and their ratio. Every step ends with a number that is read, so a
card has done its work by then. Memory is what tensors took at most on a card, else the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BATCH = 32  # the default of train.py
STEP_GFLOP = 4.11  # of a training step for one image: 3 x forward, less conv1's input gradient
# What train.py sets from inside, as environment variables for stock.
KEEP_BLOCKS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


# ------------------------------------------------------------------------- the plain version


def stock_alexnet(num_classes: int, groups: int = 2, dropout: float = 0.5) -> nn.Sequential:
    """The network in stock PyTorch; its images are normalised already, and padded to 227."""
    lrn = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
    features = nn.Sequential(
        nn.Identity(), nn.Conv2d(3, 96, 11, 4), nn.ReLU(), nn.LocalResponseNorm(**lrn),
        nn.MaxPool2d(3, 2), nn.Conv2d(96, 256, 5, padding=2, groups=groups), nn.ReLU(),
        nn.LocalResponseNorm(**lrn), nn.MaxPool2d(3, 2), nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(), nn.Conv2d(384, 384, 3, padding=1, groups=groups), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=groups), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Dropout(dropout), nn.Linear(4096, num_classes),
    )  # fmt: skip
    return nn.Sequential(features, nn.Flatten(), classifier)


# ------------------------------------------------------- what is measured, in a process of its own


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"error: no {name} in /proc/self/status; memory is measured on Linux alone")


def our_batches(
    data: Path, precision: str, batch_size: int, device: torch.device
) -> tuple[Callable[[], None], list]:
    """A function that trains on one batch, and the list it adds the seconds of input to."""

    import alexnet
    import train

    alexnet.keep_large_blocks()
    argv = ["--data", str(data), "--output", str(data / "run"), "--batch-size", str(batch_size)]
    args = train.parse_args([*argv, "--precision", precision, "--device", str(device)])
    run = train.Run(args, alexnet.pick_device(args.device), *train.open_photos(args))
    run.history = [{}] * train.RAMP_EPOCHS  # as from then on, when all augmentation is on
    run.net.train()
    make_batch, seconds = train.make_batch, []

    def timed(*arguments):
        start = time.perf_counter()
        batch = make_batch(*arguments)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
        return batch

    train.make_batch = timed
    batches = enumerate(torch.arange(len(run.train_set)).repeat(50).split(batch_size))

    def step() -> None:
        number, batch = next(batches)
        totals = train.train_one_batch(run, batch)
        if number % train.AVERAGE_EVERY == 0:
            train.update_average(run, train.AVERAGE_EVERY, total=1000)
        totals.tolist()

    return step, seconds


def stock_batches(
    data: Path, batch_size: int, device: torch.device
) -> tuple[Callable[[], None], list]:
    """The same for the plain version."""
    from torchvision import datasets, transforms

    dataset = datasets.ImageFolder(
        data / "train",
        transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.5, 0.5, 0.5, 0.5),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
                transforms.Pad((0, 0, 3, 3)),
            ]
        ),
    )
    dataset.samples *= 50
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size, shuffle=True))
    net = stock_alexnet(len(dataset.classes)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    seconds = []

    def step() -> None:
        start = time.perf_counter()
        images, labels = (x.to(device) for x in next(loader))
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step, seconds


def measure_speed(batches: tuple[Callable[[], None], list], n: int) -> dict[str, float]:
    step, input_seconds = batches
    for _ in range(3 if n > 5 else 1):  # a card tries its kernels first
        step()
    input_seconds.clear()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    total, input_time = sum(times), sum(input_seconds)
    images = n * BATCH
    return {
        "training": images / total,
        "steps": images / (total - input_time),
        "input share": input_time / total,
    }


def measure_memory(
    batches: tuple[Callable[[], None], list], device: torch.device
) -> dict[str, float]:
    before = 0.0 if device.type == "cuda" else memory_mib("VmRSS")
    for _ in range(3):
        batches[0]()
    if device.type == "cuda":
        return {"memory": torch.cuda.max_memory_allocated(device) / 2**20}
    return {"memory": memory_mib("VmHWM") - before}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_lrn(ours: bool, device: torch.device) -> dict[str, float]:

    import alexnet

    if ours:
        alexnet.keep_large_blocks()
    stock = torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)
    norm = alexnet.LocalResponseNorm() if ours else stock
    layout = torch.channels_last if ours else torch.contiguous_format
    total = 0.0
    for shape in ((BATCH, 96, 55, 55), (BATCH, 256, 27, 27)):
        x = torch.rand(shape, device=device).to(memory_format=layout).requires_grad_()
        gradient = torch.rand(shape, device=device).to(memory_format=layout)
        times = []
        for _ in range(5):
            wait_for(device)
            start = time.perf_counter()
            torch.autograd.grad(norm(x), x, gradient)
            wait_for(device)
            times.append(time.perf_counter() - start)
        total += statistics.median(times[1:])
    return {"lrn": 1000 * total}


def measure_products(precision: str, device: torch.device) -> dict[str, float]:
    """GFLOP/s of the product of two large square matrices."""

    import alexnet

    dtype = alexnet.pick_precision(precision, device)
    a = torch.randn(4096, 4096, device=device).to(dtype)
    a @ a
    wait_for(device)
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    wait_for(device)
    return {"products": 3 * 2 * 4096**3 / (time.perf_counter() - start) / 1e9}


def work(name: str, data: Path, device_name: str) -> dict[str, float]:
    """Measure one thing; `name` is a side (stock, kept or the precision of ours) and what."""
    import alexnet

    side, what = name.split()
    ours = side not in ("stock", "kept")
    device = torch.device(device_name)
    if ours:  # which allows TF32 on a card, as train.py does
        device = alexnet.pick_device(device_name)
    if what == "lrn":
        return measure_lrn(ours, device)
    if what == "products":
        return measure_products(side, device)
    size = 128 if what == "memory" else BATCH
    batches = our_batches(data, side, size, device) if ours else stock_batches(data, size, device)
    if what == "memory":
        return measure_memory(batches, device)
    return measure_speed(batches, n=30 if device.type == "cuda" else 5)


# ------------------------------------------------------------------------------- the table


def spawn(name: str, data: Path, device: torch.device) -> dict[str, float]:
    """Measure in a fresh process; start-up is timed from outside it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "OMP_", "KMP_"))}
    command = [sys.executable, __file__, "--work", name, "--data", data, "--device", device]
    if name == "stock start":
        command[1:] = ["-c", "import torch"]
    elif name.endswith("start"):
        command[1:] = [ROOT / "predict.py", data / "photo.jpg", "--save", data / "a.png"]
    start = time.perf_counter()
    result = subprocess.run(
        [*map(str, command)],
        env=clean | (KEEP_BLOCKS if name.startswith("kept") else {}),
        cwd=data,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    return {"start": seconds} if name.endswith("start") else json.loads(result.stdout)


def prepare(data: Path) -> None:
    """Drawn photos, and untrained weights for predict.py."""
    from draw_flowers import KINDS, draw_flower

    import alexnet

    for side, n in (("train", 52), ("val", 2)):
        for kind in KINDS:
            (data / side / kind).mkdir(parents=True)
            for i in range(n):
                image = draw_flower(kind, random.Random(f"{side} {kind} {i}"))
                image.save(data / side / kind / f"{i}.jpg", quality=90)
    image.save(data / "photo.jpg")
    torch.save(alexnet.AlexNet(5).state_dict(), data / "AlexNet.pth")
    names = {str(i): kind for i, kind in enumerate(KINDS)}
    (data / "class_idx.json").write_text(json.dumps(names))


def print_table(
    found: dict[str, dict[str, float]], precisions: list[str], device: torch.device
) -> None:
    where = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {where}")
    print(f"{'':<46}{'stock':>9}" + "".join(f"{p:>10}{'ratio':>7}" for p in precisions))
    rows = [
        ("whole training, images/s", "speed", "training", "stock"),
        ("  stock with our allocator settings", "speed", "training", "kept"),
        ("steps alone, images/s", "speed", "steps", "stock"),
        ("  stock with our allocator settings", "speed", "steps", "kept"),
        ("share of training spent on input", "speed", "input share", "stock"),
        ("LRN forward and backward, batch 32, ms", "lrn", "lrn", "stock"),
        ("peak memory at batch 128, MiB", "memory", "memory", "stock"),
        ("predict.py against import torch, s", "start", "start", "stock"),
    ]
    for title, what, key, side in rows:
        if f"{side} {what}" not in found:  # on a card stock has no allocator settings of ours
            continue
        stock = found[f"{side} {what}"][key]
        line = f"{title:<46}{stock:>9.3g}"
        for precision in precisions:
            ours = found.get(f"{precision} {what}", found.get(f"{precisions[0]} {what}"))[key]
            line += f"{ours:>10.3g}{ours / stock:>7.2f}"
        print(line)
    for precision in precisions:
        rate = found[f"{precision} products"]["products"]
        share = found[f"{precision} speed"]["steps"] * STEP_GFLOP / rate
        print(f"{precision} steps: {share:.2f} of the {rate:.0f} GFLOP/s of 4096 x 4096 products")


def main(argv: list[str] | None = None) -> int:
    import alexnet

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        print(json.dumps(work(args.work, args.data, args.device)))
        return 0
    device = alexnet.pick_device(args.device)
    native = str(alexnet.pick_precision("auto", device)).removeprefix("torch.")
    precisions = [native] if native == "float32" else [native, "float32"]
    names = ["stock speed", "stock lrn", "stock memory", "stock start"]
    names += [] if device.type == "cuda" else ["kept speed"]
    names += [f"{p} {what}" for p in precisions for what in ("speed", "memory", "products")]
    names += [f"{precisions[0]} {what}" for what in ("lrn", "start")]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare(data)
        rounds = []
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            rounds.append({name: spawn(name, data, device) for name in names})
    found = {
        name: {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        for name in names
    }
    print_table(found, precisions, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
