"""Why SGD gets stuck at the share of the largest class: from a tutorial's recipe to ours.

    python tests/ablation.py --data data                     # hours on a CPU: 16 rows
    python tests/ablation.py --data data --epochs 3 --rows tutorial ours

A person runs this. The data, the augmentation, the batch and the network are ours throughout; what
changes is the starting point, the learning rate and what lowers it, one thing at a time. (The
tutorial's patience is not known; it gets ours.) Each row is printed when it is done, as a line of a
Markdown table, with what explains it, measured on 256 photos of val: `spread`: the standard
deviation of a logit from photo to photo, mean over the classes, before training and after it (0:
the network answers the same whatever it is shown); `dead`: the share of the hidden linear layers'
ReLUs that are 0 for every photo.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import alexnet  # noqa: E402
import train  # noqa: E402

TUTORIAL = {
    "scheduler": "on val accuracy",  # from the first epoch on, where a tie counts as a bad epoch
    "lr": 1e-4,
    "output bias": 1.0,
    "hidden biases": 1.0,  # of the linear layers
    "input": "(x - 0.5) / 0.5",
    "linear weights": "N(0, 0.01)",
    "conv weights": "He, fan_out",
    "warm-up": 0,  # epochs
}
OURS = {
    "scheduler": "on val loss",  # once the network has beaten the largest class
    "lr": 1e-2,
    "output bias": 0.0,
    "hidden biases": 0.0,
    "input": "(x - mean) / std",
    "linear weights": "He",
    "conv weights": "He, conv1's N(0, 0.01)",
    "warm-up": train.WARMUP_EPOCHS,
}


def recipes() -> dict[str, dict]:
    """The tutorial's, then one change after the other until it is ours; then each change alone."""
    rows = {"tutorial": dict(TUTORIAL)}
    for name, value in OURS.items():
        last = list(rows.values())[-1]
        rows[f"+ {name}"] = last | {name: value}
    rows["ours"] = rows.pop(f"+ {name}")
    for name in list(OURS)[1:]:  # the first change alone is the second row
        rows[f"tutorial, but {name}"] = TUTORIAL | {name: OURS[name]}
    return rows


def set_start(net: alexnet.AlexNet, recipe: dict) -> None:
    """Weights, biases and input scale of a recipe, in place of ours."""
    linear = [layer for layer in net.classifier if isinstance(layer, nn.Linear)]
    if recipe["linear weights"] == "N(0, 0.01)":
        for layer in linear:
            nn.init.normal_(layer.weight, std=0.01)
    if recipe["conv weights"] == "He, fan_out":
        for layer in net.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if recipe["input"] == TUTORIAL["input"]:
        net.mean.fill_(0.5)
        net.std.fill_(0.5)
    for layer in linear[:-1]:
        nn.init.constant_(layer.bias, recipe["hidden biases"])
    nn.init.constant_(linear[-1].bias, recipe["output bias"])


@torch.inference_mode()
def diagnose(run: train.Run) -> tuple[float, float]:
    """(spread of the logits over photos, share of dead ReLUs in the hidden linear layers)."""
    run.net.eval()
    rows = torch.randperm(len(run.val_set), generator=torch.Generator().manual_seed(0))[:256]
    hidden: list[Tensor] = []
    logits = []
    hooks = [
        run.net.classifier[i].register_forward_hook(lambda layer, x, y: hidden.append(y > 0))
        for i in (1, 4)
    ]
    for piece in rows.split(64):
        images = alexnet.to_float(torch.from_numpy(run.val_set.photos[piece.numpy()]))
        logits.append(run.net(alexnet.center_crop(images.to(run.device)).flatten(0, 1)).float())
    for hook in hooks:
        hook.remove()
    alive = [torch.cat(hidden[layer::2]).any(0) for layer in (0, 1)]
    dead = 1 - torch.cat(alive).float().mean().item()
    return torch.cat(logits).std(0).mean().item(), dead


def run_row(args: argparse.Namespace, recipe: dict) -> list[str]:
    """Train one row; returns its cells."""
    argv = ["--data", str(args.data), "--lr", str(recipe["lr"]), "--seed", str(args.seed)]
    argv += ["--ema", "0", "--label-smoothing", "0", "--cutmix", "0"]
    options = train.parse_args(argv)
    train_set = train.pack(args.data / "train", args.data)
    val_set = train.pack(args.data / "val", args.data, train_set.classes)
    device = alexnet.pick_device("auto")
    # As the tutorial's, in float32: beside constants of 1 bfloat16 would round 0.004 away.
    run = train.Run(options, train_set, val_set, device, torch.float32)
    set_start(run.net, recipe)
    train.WARMUP_EPOCHS = recipe["warm-up"]
    on_accuracy = ReduceLROnPlateau(run.optimizer, "max", train.LR_FACTOR, options.patience, eps=0)
    before = diagnose(run)
    accuracies = []
    for epoch in range(1, args.epochs + 1):
        loss, _ = train.train_one_epoch(run, epoch)
        val_loss, accuracy = train.evaluate(run, "center-crop")
        accuracies.append(accuracy)
        after = diagnose(run)
        line = f"  {epoch}: lr {run.lr:.2g}, {loss:.4f}, val {accuracy:.4f}, spread {after[0]:.3g}"
        print(line, file=sys.stderr)
        if recipe["scheduler"] == TUTORIAL["scheduler"]:
            on_accuracy.step(accuracy)
        elif epoch > recipe["warm-up"] and max(accuracies) > val_set.largest_share():
            run.scheduler.step(val_loss)
    return [
        f"{max(accuracies):.3f}",
        f"{accuracies[-1]:.3f}",
        *(f"{x:.3g} -> {y:.3g}" for x, y in zip(before, after, strict=True)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="(default: data)")
    parser.add_argument("--epochs", type=int, default=10, help="of each row (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--rows", nargs="+", choices=[*recipes()], metavar="ROW", help="only these")
    args = parser.parse_args(argv)
    train.keep_large_blocks()
    print("| recipe | best val accuracy | last | spread of the logits | dead ReLUs |")
    print("|---|---|---|---|---|", flush=True)
    for name, recipe in recipes().items():
        if not args.rows or name in args.rows:
            print(f"| {' | '.join([name, *run_row(args, recipe)])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
