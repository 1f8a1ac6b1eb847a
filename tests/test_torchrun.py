"""torchrun train.py: two processes on the CPU do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import FILES, history_of

import alexnet

# train.py without dropout, whose draws depend on how the batch is shared out.
WITHOUT_DROPOUT = """
import sys
import torch
torch.nn.Dropout.forward = lambda self, x: x
sys.path.insert(0, sys.argv.pop(1))
import train
sys.exit(train.main())
"""


def run_train(processes: int, script: Path, data: Path, output: Path, *options: str) -> str:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start = [*torchrun, str(script)] if processes > 1 else [str(script)]
    argv = [str(ROOT), "--data", str(data), "--output", str(output), "--batch-size", "5"]
    argv += ["--precision", "float32", "--device", "cpu", "--lr", "1e-5", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *start, *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_equal_one_and_one_resumes_what_two_began(tmp_path):
    pixels = np.random.default_rng(0)  # of noise: equal pixels would make rounding choose
    # 16 photos in batches of 5 are shared out as 3 + 2, the last as 1 + 0; 3 of val as 2 + 1.
    for name, n in (("train/a", 8), ("train/b", 8), ("val/a", 1), ("val/b", 2)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(n):
            noise = pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    script = tmp_path / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    one, two = tmp_path / "one", tmp_path / "two"
    run_train(1, script, tmp_path / "data", one, "--epochs", "2")
    printed = run_train(2, script, tmp_path / "data", two, "--epochs", "1")
    assert printed.count("best epoch on val") == 1  # process 0 alone speaks
    run_train(1, script, tmp_path / "data", two, "--epochs", "2", "--resume")
    assert {path.name for path in two.iterdir()} == FILES
    for ours, theirs in zip(history_of(two), history_of(one), strict=True):
        for name, value in theirs.items():
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-4), name
    ours, theirs = (alexnet.load_tensors(folder / "last.pt", mmap=False) for folder in (two, one))
    assert ours["net"].keys() == alexnet.AlexNet(2).state_dict().keys()
    # Momentum is the gradients of all steps, and the weights their sum.
    for a, b in zip(momenta(ours), momenta(theirs), strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()
    torch.testing.assert_close(ours["net"], theirs["net"], rtol=1e-4, atol=1e-6)


def momenta(checkpoint: dict) -> list[torch.Tensor]:
    return [state["momentum_buffer"] for state in checkpoint["optimizer"]["state"].values()]
