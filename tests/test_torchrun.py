"""torchrun train.py: two processes on the CPU do what one does."""

from __future__ import annotations

import atexit
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POSIX, ROOT, error_of, history_of
from PIL import Image
from test_train import FILES, NarrowLinear

import alexnet
import train

# What torchrun starts: train.py, made as simple as the process that it is compared with.
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_torchrun, train
test_torchrun.simplify(setattr)
sys.exit(train.main())
"""


def simplify(replace: Callable[[Any, str, Any], None]) -> None:
    """Have a narrow network, and nothing drawn in a step: processes draw numbers of their own."""

    def central(images: torch.Tensor, *limits: float) -> torch.Tensor:
        return images[:, :, 16:240, 16:240]

    replace(torch.nn, "Linear", NarrowLinear)
    replace(torch.nn.Dropout, "forward", lambda self, x: x)
    replace(train, "random_crop", central)
    replace(train, "random_colors", lambda images, *limits: images)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_processes_are_connected_on_the_cpu_alone(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "RANK": "0"}
    places |= {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}  # as torchrun sets them
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        alexnet.InputError, match="--device mps: torchrun needs CUDA cards, or CPUs"
    ):
        train.connect_processes("mps")
    device = train.connect_processes("auto")
    atexit.unregister(train.leave_at_once)
    assert device == torch.device("cpu") and torch.distributed.get_backend() == "gloo"
    train.disconnect_processes()
    assert not train.is_distributed()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_processes_are_connected_under_torchrun_alone(tmp_path, monkeypatch):
    places = {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (places | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)  # as a cluster may have left them
    assert train.connect_processes("cpu") == torch.device("cpu") and not train.is_distributed()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "cannot be connected" in error_of(train.main, "--device", "cpu", "--data", tmp_path)


@POSIX  # torchrun needs libuv, which builds for Windows lack
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_equal_one_and_one_resumes_what_two_began(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0)  # of noise: equal pixels would make rounding choose
    # 11 photos in batches of 5 are shared out as 3 + 2, the last as 1 + 0; 3 of val as 2 + 1.
    for name, n in (("train/a", 5), ("train/b", 6), ("val/a", 1), ("val/b", 2)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(n):
            noise = pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ["--data", str(tmp_path / "data"), "--batch-size", "5", "--mix", "0"]
    options += ["--precision", "float32", "--device", "cpu", "--lr", "1e-5", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    command = [*torchrun, *options, str(two), "--epochs", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("now classify a photo") == 1  # process 0 alone speaks
    assert {path.name for path in two.iterdir()} == FILES
    simplify(monkeypatch.setattr)
    assert train.main([*options, str(two), "--epochs", "2", "--resume"]) == 0
    assert train.main([*options, str(one), "--epochs", "2"]) == 0
    for ours, theirs in zip(history_of(two), history_of(one), strict=True):
        for name, value in theirs.items():
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-4), name
    ours, theirs = (alexnet.load_tensors(folder / "last.pt") for folder in (two, one))
    assert ours["net"].keys() == theirs["net"].keys()  # no names of a wrapper around it
    for number, state in theirs["optimizer"]["state"].items():  # the gradients of all steps
        momentum = ours["optimizer"]["state"][number]["momentum_buffer"]
        difference = momentum - state["momentum_buffer"]
        assert difference.norm() < 5e-3 * state["momentum_buffer"].norm()
