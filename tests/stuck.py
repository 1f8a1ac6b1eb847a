"""Why SGD gets stuck at the share of the largest class: from the tutorial's start to ours.

    python tests/stuck.py --data data    # 22 epochs in float32

A person runs this. Each row changes one thing more; none has average, smoothing, mixing or turns.
"""

import sys
from pathlib import Path

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from alexnet import AlexNet, one_line_errors, pick_device

# Epochs, learning rate, bias of the hidden linear layers, the pixels' own statistics, He's weights.
ROWS = {
    "the tutorial's": (10, 1e-4, 1.0, False, False),
    "+ rate 0.01": (3, 1e-2, 1.0, False, False),
    "+ biases of 0 in the hidden layers": (3, 1e-2, 0.0, False, False),
    "+ the pixels' own mean and deviation": (3, 1e-2, 0.0, True, False),
    "+ He's weights: ours": (3, 1e-2, 0.0, True, True),
}


def set_start(net: AlexNet, bias: float, own_statistics: bool, he: bool) -> None:
    """Give a network with our start that of a row."""
    if not own_statistics:
        net.mean.fill_(0.5)
        net.std.fill_(0.5)
    linear = [layer for layer in net.classifier if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        nn.init.constant_(layer.bias, bias)
    if not he:
        for layer in linear:
            nn.init.normal_(layer.weight, std=0.01)
        for layer in net.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


with one_line_errors():
    print("| recipe | epochs | val accuracy, best | last |\n|---|---|---|---|", flush=True)
    train.WARMUP_EPOCHS = 0
    for name, (epochs, lr, *start) in ROWS.items():
        options = f"--lr {lr} --ema 0 --label-smoothing 0 --mix 0 --rotation 0 --jitter 0".split()
        args = train.parse_args([*options, "--precision", "float32", *sys.argv[1:]])
        run = train.Run(args, pick_device("auto"), *train.open_photos(args))
        run.history = [{}] * train.RAMP_EPOCHS  # as from then on, with crops and dropout in full
        set_start(run.net, *start)
        accuracies = []
        scheduler = ReduceLROnPlateau(run.optimizer, "max", patience=3)  # on the accuracy
        for epoch in range(1, epochs + 1):
            train.train_one_epoch(run, epoch)
            accuracies.append(train.evaluate(run, run.net.eval())[1])
            scheduler.step(accuracies[-1])
        print(f"| {name} | {epochs} | {max(accuracies):.3f} | {accuracies[-1]:.3f} |", flush=True)
