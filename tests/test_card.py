"""train.py and predict.py on an NVIDIA card: what can be seen without one, and on one."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import draw_photos, history_of
from test_train import NarrowLinear, narrow, new_run, run_train, update_of  # noqa: F401
from torch import Tensor

import alexnet
import predict
import train

has_card, no_build = torch.cuda.is_available(), torch.version.cuda is None
without = pytest.mark.skipif(has_card or no_build, reason="for a CUDA build without a card")
# In torch 2.9 even a fake tensor of a card calls its driver; 2.14 is the first seen not to.
not_in_old_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="for torch 2.14 or later"
)
card = pytest.mark.skipif(not has_card, reason="there is no card")


@without
@pytest.mark.parametrize("free, fits", [(5000, True), (3999, False)])
def test_a_device_has_its_index_and_keeps_pixels_that_fit(driver, free, fits):
    for name, index in (("cuda", 0), ("cuda:1", 1)):
        device = alexnet.pick_device(name)
        assert device == torch.device("cuda", index)
        pixels, driver.free = torch.zeros(1000, dtype=torch.uint8), free
        photos = SimpleNamespace(pixels=pixels, labels=torch.arange(10))
        train.Photos.move_to(photos, device)
        expected = {device if fits else torch.device("cpu")}
        assert {photos.pixels.device, photos.labels.device} == expected


@without
def test_the_precision_is_what_the_card_has_and_tf32_is_told(driver):
    device = alexnet.pick_device("cuda:1")
    for driver.major, name in ((6, "float32"), (7, "float16"), (8, "bfloat16")):
        assert alexnet.pick_precision("auto", device) == getattr(torch, name)
        found = train.name_hardware(device, alexnet.pick_precision("float32", device))
        assert found.startswith("a card, cuda, torch.float32")
        assert (" with products in TF32, torch " in found) == (driver.major >= 8)


@without
@not_in_old_torch
@pytest.mark.parametrize("pixels_on, pieces", [("cuda", 1), ("cuda", 2), ("cpu", 1), ("cpu", 2)])
def test_all_of_a_step_lies_on_the_card(driver, monkeypatch, pixels_on, pieces):
    """But for the backward pass, which asks the driver from C++, and CutMix, which reads values."""
    run, photos = object.__new__(train.Run), object.__new__(train.Photos)
    options = {"accumulate": pieces, "crop_area": 0.25, "rotation": 30.0, "jitter": 0.4, "mix": 0}
    run.args = SimpleNamespace(**options, label_smoothing=0.1, ema=0.99, recipe="default")
    photos.pixels = torch.zeros(100, 256, 256, 3, dtype=torch.uint8, device=pixels_on)
    photos.labels = torch.zeros(100, dtype=torch.int64, device=pixels_on)
    photos.classes, run.train_set, run.history = list("abcde"), photos, [{}] * 40
    run.device, run.color_axes = torch.device("cuda:0"), torch.zeros(3, 3, device="cuda:0")
    run.autocast = torch.autocast("cpu", enabled=False)
    with run.device:
        run.net, run.average = alexnet.AlexNet(5), alexnet.AlexNet(5).requires_grad_(False)
    run.optimizer = torch.optim.SGD(run.net.parameters(), 0.01, momentum=0.9)
    run.scaler, losses = torch.amp.GradScaler("cuda", enabled=False), []

    def backward(loss):
        losses.append(loss)
        for p in run.net.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(Tensor, "backward", backward)
    totals = train.train_one_batch(run, torch.arange(32))
    train.update_average(run, 8, 100)
    images, labels = photos.take(torch.arange(64), run.device)
    found = alexnet.predict_probabilities(run.average, alexnet.to_float(images), ten_views=True)
    assert {x.device for x in (totals, labels, found, *losses)} == {run.device}
    assert len(losses) == pieces and found.shape == (64, 5)


@card
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_run_on_a_card_can_be_stopped_resumed_and_used(few, tmp_path, monkeypatch, precision):
    options = ["--device", "cuda", "--precision", precision, "--epochs", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_train(few, whole, *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "evaluate", Mock(side_effect=[(0.7, 0.5), KeyboardInterrupt]))
        run_train(few, broken, *options)
    run_train(few, broken, *options, "--resume")
    losses = [float(history_of(folder)[1]["val_loss"]) for folder in (whole, broken)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    weights = broken / "AlexNet.pth"
    assert {x.device.type for x in torch.load(weights).values()} == {"cpu"}
    options = ["--weights", str(weights), "--device", "cuda", "--similar", str(few / "train")]
    assert predict.main([str(few / "val"), *options, "--json"]) == 0


@card
def test_pixels_on_the_card_and_on_the_host_give_one_batch(few, tmp_path):
    run, batches = new_run(few, tmp_path, "--device", "cuda"), []
    photos, run.history = run.train_set, [{}] * train.RAMP_EPOCHS
    for device in ("cuda", "cpu"):
        photos.pixels, photos.labels = photos.pixels.to(device), photos.labels.to(device)
        torch.manual_seed(0)
        batches.append(train.make_batch(run, torch.arange(6)))
    torch.testing.assert_close(*batches, rtol=0, atol=0)


@card
def test_twenty_steps_lose_what_they_lose_on_the_cpu(few, tmp_path, monkeypatch):
    """In float32, without TF32; rounding may grow to a hundredth of the loss."""
    runs = [new_run(few, tmp_path, "--device", name, "--lr", "0.001") for name in ("cpu", "cuda")]
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    batches = [train.make_batch(runs[0], torch.randperm(6)) for _ in range(20)]
    losses = []
    for run in runs:
        made = iter([[x.to(run.device) for x in batch] for batch in batches])
        monkeypatch.setattr(train, "make_batch", lambda *_: next(made))  # noqa: B023
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            losses.append([train.train_one_batch(run, torch.arange(6))[0].item() for _ in batches])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@card
def test_a_step_in_float16_that_overflows_changes_nothing(few, tmp_path):
    run = new_run(few, tmp_path, "--device", "cuda", "--precision", "float16")
    run.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    assert update_of(run, 0, 1, 2).any()
    momenta = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    before = [momentum.clone() for momentum in momenta]
    run.scaler.update(2.0**40)  # which makes every gradient infinite
    assert not update_of(run, 3, 4, 5).any()
    torch.testing.assert_close(momenta, before, rtol=0, atol=0)


@card
def test_a_batch_of_128_in_float32_fits_4_gb_with_the_context(tmp_path, monkeypatch):
    for side, n in (("train", 64), ("val", 2)):
        draw_photos(tmp_path / side, {"a": n, "b": n})
    monkeypatch.setattr(torch.nn, "Linear", NarrowLinear.__base__)  # the whole network
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3.5e9 / torch.cuda.mem_get_info()[1])
    run_train(tmp_path, tmp_path, *"--device cuda --epochs 1 --batch-size 128".split())
    torch.cuda.set_per_process_memory_fraction(1.0)
