"""train.py: the pack, augmentation, resuming, files and refusals, on a handful of drawings."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photos, error_of
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import alexnet
import train

FILES = {
    *("AlexNet.pth", "class_idx.json", "curves.png", "history.csv", "kernels.png"),
    *("last.pt", "run.json"),
}


def args_of(*options: str) -> train.argparse.Namespace:
    return train.parse_args(list(options))


def history_of(output: Path) -> list[dict[str, str]]:
    """history.csv without what depends on the clock."""
    with open(output / "history.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return rows


# ------------------------------------------------------------------------------- the pack


def test_the_pack_holds_what_reading_each_photo_gives(data, tmp_path):
    pack = train.pack(data / "train", tmp_path)
    files = alexnet.image_files(data / "train")
    pixels = np.stack([alexnet.center_square(alexnet.read_image(path)) for path in files])
    assert np.array_equal(pack.photos, pixels)
    assert [pack.classes[i] for i in pack.labels] == [path.parent.name for path in files]
    values = torch.from_numpy(pixels).reshape(-1, 3).double() / 255
    torch.testing.assert_close(pack.mean.double(), values.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(pack.covariance.double(), values.T.cov(), rtol=1e-4, atol=1e-7)


def test_the_pack_is_made_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    folder = draw_photos(tmp_path / "train", {"a": 2, "b": 2})
    first = train.pack(folder, tmp_path)
    reads = []
    read_image = train.read_image
    monkeypatch.setattr(train, "read_image", lambda path: reads.append(path) or read_image(path))
    assert np.array_equal(train.pack(folder, tmp_path).photos, first.photos) and not reads
    shutil.copyfile(folder / "a" / "00.jpg", folder / "b" / "01.jpg")  # other pixels, same name
    os.utime(folder / "b" / "01.jpg", (1, 1))
    second = train.pack(folder, tmp_path)
    assert len(reads) == 4 and np.array_equal(second.photos[3], second.photos[0])
    (folder / "b" / "01.jpg").unlink()
    assert len(train.pack(folder, tmp_path)) == 3
    (tmp_path / "train.packed.npy").write_bytes(
        (tmp_path / "train.packed.npy").read_bytes()[:-1]
    )  # cut short
    assert len(train.pack(folder, tmp_path)) == 3 and len(reads) == 4 + 3 + 3


def test_where_the_data_cannot_be_written_the_pack_goes_to_the_output(data, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*packed*"))
    monkeypatch.setattr(train, "can_write", lambda folder: folder != copy)
    pack = train.pack(copy / "train", tmp_path / "output")
    assert (tmp_path / "output" / "train.packed.npy").exists() and not (
        copy / "train.packed.npy"
    ).exists()
    monkeypatch.setattr(train, "make_pack", None)  # it is found there by the next start
    assert np.array_equal(train.pack(copy / "train", tmp_path / "output").photos, pack.photos)


# ------------------------------------------------------------------------------- augmentation


def test_a_crop_equals_brute_force():
    torch.manual_seed(0)
    images = torch.rand(3, 3, 256, 256)
    boxes = torch.tensor([[10.0, 20, 224, 224], [3.7, 40.2, 180.5, 150.3], [0, 0, 256, 256]])
    flips = torch.tensor([False, True, False])
    noise = torch.tensor([[0.0, 0, 0], [0.1, -0.2, 0.3], [0, 0, 0]])
    ours = train.augment(images, boxes, flips, noise).numpy()
    for image in range(3):
        left, top, width, height = boxes[image].tolist()
        for y, x in ((0, 0), (223, 223), (17, 200), (111, 5)):
            column = 223 - x if flips[image] else x
            source_x = min(max(left + (column + 0.5) * width / 224 - 0.5, 0), 255)
            source_y = min(max(top + (y + 0.5) * height / 224 - 0.5, 0), 255)
            x0, y0 = min(int(source_x), 254), min(int(source_y), 254)
            fx, fy = source_x - x0, source_y - y0
            corner = images[image, :, y0 : y0 + 2, x0 : x0 + 2].double().numpy()
            rows = corner[:, :, 0] * (1 - fx) + corner[:, :, 1] * fx
            expected = rows[:, 0] * (1 - fy) + rows[:, 1] * fy + noise[image].numpy()
            assert ours[image, :, y, x] == pytest.approx(expected, abs=1e-4)


def test_the_crop_of_the_paper_copies_pixels_at_33_x_33_places():
    boxes = train.draw_boxes(20_000, 0, torch.Generator().manual_seed(0))
    assert {*map(tuple, boxes[:, 2:].tolist())} == {(224.0, 224.0)}
    places = {*map(tuple, boxes[:, :2].tolist())}
    assert places == {(float(x), float(y)) for x in range(33) for y in range(33)}
    images = torch.rand(1, 3, 256, 256)
    still = torch.zeros(1, 3)
    for flip in (False, True):
        crop = train.augment(images, boxes[:1], torch.tensor([flip]), still)
        x, y = (int(v) for v in boxes[0, :2])
        expected = images[:, :, y : y + 224, x : x + 224]
        torch.testing.assert_close(crop, expected.flip(3) if flip else expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("area", [0.1, 0.35, 1.0])
def test_random_crops_are_distributed_as_torchvisions(area):
    n = 4000
    ours = train.draw_boxes(n, area, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    image = torch.empty(1, 256, 256)
    draws = [RandomResizedCrop.get_params(image, [area, 1], [3 / 4, 4 / 3]) for _ in range(n)]
    stock = torch.tensor(draws, dtype=torch.float)[:, [1, 0, 3, 2]]
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 256.001).all()
    spread = stock.std(0).clamp(min=1) / math.sqrt(n)
    assert ((ours.mean(0) - stock.mean(0)).abs() < 6 * spread + 0.6).all()  # stock rounds to pixels
    assert ((ours.std(0) - stock.std(0)).abs() < 6 * spread + 0.6).all()


def test_color_noise_has_a_hundredth_of_the_covariance_of_the_pixels():
    axes = torch.tensor([[0.3, 0.1, 0], [0.2, 0.2, 0.05], [0.1, 0.3, 0.1]])
    covariance = axes @ axes.T
    noise = train.draw_color_noise(200_000, covariance, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.T.cov(), covariance / 100, rtol=0.03, atol=3e-5)
    torch.testing.assert_close(noise.mean(0), torch.zeros(3), rtol=0, atol=3e-4)


def test_an_epoch_is_drawn_from_seed_and_epoch_alone(data, tmp_path):
    pack = train.pack(data / "train", tmp_path)
    draws = [vars(train.draw_epoch(pack, *key, 0.35)) for key in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert sorted(draws[0]["order"].tolist()) == list(range(len(pack)))
    for name in draws[0]:
        assert torch.equal(draws[0][name], draws[1][name])
    for other in draws[2:]:
        assert not torch.equal(draws[0]["order"], other["order"])
        assert not torch.equal(draws[0]["boxes"], other["boxes"])


def test_a_batch_holds_the_photos_and_labels_of_its_rows(data, tmp_path):
    pack = train.pack(data / "train", tmp_path)
    draws = train.draw_epoch(pack, 0, 1, crop_area=0.0)
    draws.flips[:] = False
    draws.noise[:] = 0
    rows = torch.tensor([4, 0, 7])
    images, targets = train.make_batch(pack, draws, rows, torch.device("cpu"))
    for i, row in enumerate(rows):
        photo, (x, y) = draws.order[row], (int(v) for v in draws.boxes[row, :2])
        pixels = torch.from_numpy(pack.photos[photo, y : y + 224, x : x + 224].copy())
        torch.testing.assert_close(
            images[i] * 255, pixels.permute(2, 0, 1).float(), atol=0.1, rtol=0
        )
        assert targets[i].tolist() == [float(c == pack.labels[photo]) for c in range(3)]


def test_cutmix_covers_a_window_and_the_target_follows_its_area(data, tmp_path):
    pack = train.pack(data / "train", tmp_path)
    draws = train.draw_epoch(pack, 0, 1, crop_area=0.35, cutmix=0.5)
    whole = train.draw_epoch(pack, 0, 1, crop_area=0.35)  # the same but for the windows
    rows = torch.arange(len(pack))
    images, targets = train.make_batch(pack, draws, rows, torch.device("cpu"))
    plain, one_hot = train.make_batch(pack, whole, rows, torch.device("cpu"))
    covered = 0
    for row, (left, top, right, bottom) in enumerate(draws.windows.int().tolist()):
        image, target, partner = plain[row].clone(), one_hot[row], draws.partners[row]
        image[:, top:bottom, left:right] = plain[partner, :, top:bottom, left:right]
        share = (bottom - top) * (right - left) / 224**2
        covered += share > 0
        torch.testing.assert_close(images[row], image, rtol=0, atol=1e-6)
        expected = (1 - share) * target + share * one_hot[partner]
        torch.testing.assert_close(targets[row], expected)
    assert 0 < covered < len(pack)


def test_the_windows_of_cutmix():
    n = 100_000
    windows = train.draw_windows(n, 0.25, torch.Generator().manual_seed(0))
    width, height = (windows[:, 2:] - windows[:, :2]).T
    assert windows.min() >= 0 and windows.max() <= 224
    assert (width * height > 0).float().mean() == pytest.approx(0.25, abs=0.005)
    # Brute force: the area of a square of a share u of the crop, less what lies outside.
    u, x, y = np.random.default_rng(0).random((3, n))
    half = np.sqrt(u) / 2
    sides = [np.minimum(c + half, 1) - np.maximum(c - half, 0) for c in (x, y)]
    mean = (width * height).sum().item() / (width * height > 0).sum().item() / 224**2
    assert mean == pytest.approx((sides[0] * sides[1]).mean(), abs=0.01)


# ------------------------------------------------------------------------------- training


def test_a_run_leaves_its_files_and_nothing_else(trained, data):
    assert {path.name for path in trained.iterdir()} == FILES
    index = json.loads((trained / "class_idx.json").read_text(encoding="utf-8"))
    assert index == {"0": "daisy", "1": "roses", "2": "tulips"}
    rows = history_of(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    facts = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    best = max(float(row["val_accuracy"]) for row in rows)
    assert facts["val_accuracy"]["center-crop"] == pytest.approx(best, abs=1e-6)
    assert 0 <= facts["val_accuracy"]["ten-crop"] <= 1 and facts["epochs"] == 2
    assert facts["split"] == {"seed": 0, "val_rate": 0.2, "test_rate": 0.0}
    for name in ("curves.png", "kernels.png"):
        with Image.open(trained / name) as image:
            assert image.width >= 600 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_weights_carry_the_mean_and_deviation_of_the_training_set(trained, data, tmp_path):
    state = alexnet.load_tensors(trained / "AlexNet.pth", mmap=False)
    pack = train.pack(data / "train", tmp_path)
    assert torch.equal(state["mean"].flatten(), pack.mean)
    assert torch.equal(state["std"].flatten(), pack.covariance.diagonal().sqrt())
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in state)


def test_two_epochs_resumed_for_two_more_are_four_to_the_bit(trained, data, tmp_path):
    options = ["--data", str(data), "--epochs", "4"]
    resumed = shutil.copytree(trained, tmp_path / "resumed")
    assert train.main([*options, "--output", str(resumed), "--resume"]) == 0
    assert train.main([*options, "--output", str(tmp_path / "whole")]) == 0
    assert history_of(resumed) == history_of(tmp_path / "whole")
    assert history_of(resumed)[:2] == history_of(trained)
    for name in ("AlexNet.pth", "last.pt"):
        ours, theirs = (
            alexnet.load_tensors(folder / name, mmap=False)
            for folder in (resumed, tmp_path / "whole")
        )
        torch.testing.assert_close(ours.get("net", ours), theirs.get("net", theirs), rtol=0, atol=0)
        if name == "last.pt":
            a, b = ours["optimizer"]["state"], theirs["optimizer"]["state"]
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert ours["scheduler"] == theirs["scheduler"]


def test_a_finished_run_says_so(trained, data, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    argv = ["--data", str(data), "--output", str(trained), "--epochs", "2", "--resume"]
    assert train.main(argv) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_a_kill_behind_last_pt_is_put_right_by_resuming(trained, data, tmp_path):
    killed = shutil.copytree(trained, tmp_path / "killed")
    checkpoint = alexnet.load_tensors(killed / "last.pt", mmap=False)
    checkpoint["history"][-1]["val_accuracy"] = 1.0  # the last epoch is the best
    train.save_tensors(killed / "last.pt", checkpoint)
    for name in FILES - {"last.pt"}:
        (killed / name).unlink()
    argv = ["--data", str(data), "--output", str(killed), "--epochs", "2", "--resume"]
    assert train.main(argv) == 0
    assert {path.name for path in killed.iterdir()} == FILES
    state = alexnet.load_tensors(killed / "AlexNet.pth", mmap=False)
    torch.testing.assert_close(state, dict(checkpoint["average"]), rtol=0, atol=0)
    assert [row["val_accuracy"] for row in history_of(killed)][-1] == "1"


@pytest.fixture
def small_run(data, tmp_path) -> train.Run:
    """A run on the drawings that has not begun, with dropout off."""
    args = args_of("--data", str(data), "--output", str(tmp_path), "--lr", "0.01")
    sets = [train.pack(data / side, tmp_path) for side in ("train", "val")]
    run = train.Run(args, *sets, torch.device("cpu"), torch.float32)
    for layer in run.net.classifier:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return run


def test_accumulation_gives_the_update_of_the_whole_batch(small_run):
    run = small_run
    run.net.double()  # in float32 rounding decides which of two equal pixels of a pool is larger
    start = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    draws = train.draw_epoch(run.train_set, 0, 1, 0.35)
    updates = []
    for pieces in (1, 2, 4):  # 13 photos: the pieces are of unequal size
        run.net.load_state_dict(start)
        run.optimizer.state.clear()
        run.args.accumulate = pieces
        run.net.train()
        totals = train.train_one_batch(run, draws, torch.arange(13))
        update = torch.cat([(p - start[n]).flatten() for n, p in run.net.named_parameters()])
        updates.append((totals, update))
    for totals, update in updates[1:]:
        torch.testing.assert_close(totals, updates[0][0], rtol=1e-5, atol=1e-5)
        assert (update - updates[0][1]).norm() < 1e-9 * updates[0][1].norm()


def test_a_step_is_the_step_of_the_paper(small_run):
    """v <- 0.9 v - 0.0005 lr w - lr gradient; w <- w + v (section 5), twice."""
    run = small_run
    run.net.train()
    draws = train.draw_epoch(run.train_set, 0, 1, 0.35)
    bias = run.net.classifier[6].bias
    weight = run.net.classifier[6].weight
    v_weight, v_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for rows in (torch.arange(4), torch.arange(4, 8)):
        images, labels = train.make_batch(run.train_set, draws, rows, torch.device("cpu"))
        smoothing = {"label_smoothing": 0.1}  # the default
        loss = torch.nn.functional.cross_entropy(run.net(images), labels, **smoothing)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            v_weight = 0.9 * v_weight - 0.0005 * 0.01 * weight - 0.01 * gradients[0]
            v_bias = 0.9 * v_bias - 0.0005 * 0.01 * bias - 0.01 * gradients[1]
            expected = weight + v_weight, bias + v_bias
        train.train_one_batch(run, draws, rows)
        torch.testing.assert_close((weight, bias), expected, rtol=1e-4, atol=1e-6)


def test_evaluation_equals_one_pass_over_the_photos_one_by_one(small_run):
    run = small_run
    loss, accuracy = train.evaluate(run, "center-crop")
    run.net.eval()  # whose weights the average still has
    losses, right = [], []
    with torch.inference_mode():
        for photo, label in zip(run.val_set.photos, run.val_set.labels, strict=True):
            image = torch.from_numpy(photo[16:240, 16:240].copy()).permute(2, 0, 1)[None] / 255
            logits = run.net(image)
            losses.append(torch.nn.functional.cross_entropy(logits, label[None]).item())
            right.append(logits.argmax().item() == label)
    assert loss == pytest.approx(np.mean(losses), rel=1e-4) and accuracy == np.mean(right)


def test_the_average_of_the_weights_is_that_of_the_formula(small_run):
    run, bias = small_run, small_run.net.classifier[6].bias
    draws = train.draw_epoch(run.train_set, 0, 1, 0.35)
    for ema in (0.5, 0.0):
        run.args.ema = ema
        expected = run.average.classifier[6].bias.clone()
        for steps in (1, 2, 1000):
            train.train_one_batch(run, draws, torch.arange(2))
            train.update_average(run, steps)
            decay = min(ema, steps / (10 + steps))
            expected = decay * expected + (1 - decay) * bias.detach()
            torch.testing.assert_close(run.average.classifier[6].bias, expected)
    torch.testing.assert_close(dict(run.average.state_dict()), dict(run.net.state_dict()))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_goes_where_float32_goes(small_run, precision):
    """Autocast and, with float16, the scaler of the loss; emulated where the CPU has neither."""
    start = {name: tensor.clone() for name, tensor in small_run.net.state_dict().items()}
    draws = train.draw_epoch(small_run.train_set, 0, 1, 0.35)
    updates = []
    for dtype in (torch.float32, precision):
        sets = small_run.train_set, small_run.val_set
        run = train.Run(small_run.args, *sets, torch.device("cpu"), dtype)
        assert run.scaler.is_enabled() == (dtype == torch.float16)
        run.net.load_state_dict(start)
        run.net.eval()  # no dropout
        updates.append(torch.zeros(1))
        for _ in range(8):  # the scaler skips steps until its scale fits
            if not updates[-1].any():
                train.train_one_batch(run, draws, torch.arange(2))
                parameters = run.net.named_parameters()
                updates[-1] = torch.cat([(p.detach() - start[n]).flatten() for n, p in parameters])
        assert all(parameter.dtype == torch.float32 for parameter in run.net.parameters())
    assert torch.cosine_similarity(*updates, dim=0) > 0.98
    assert updates[1].norm() == pytest.approx(updates[0].norm().item(), rel=0.1)


def test_the_recipe_of_the_paper_sets_its_options_weights_and_biases(data, tmp_path):
    args = args_of("--recipe", "paper", "--data", str(data), "--batch-size", "64")
    assert (args.batch_size, args.crop_area, args.groups) == (64, 0.0, 2)  # what is given counts
    assert args.given == {"recipe", "batch_size"}
    sets = [train.pack(data / side, tmp_path) for side in ("train", "val")]
    net = train.Run(args, *sets, torch.device("cpu"), torch.float32).net
    layers = [net.features[i] for i in (1, 5, 9, 11, 13)] + [net.classifier[i] for i in (0, 3, 6)]
    deviations = [round(layer.weight.std().item(), 3) for layer in layers]
    assert deviations == [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]
    assert [layer.bias.unique().tolist() for layer in layers] == [
        *([0.0], [1.0], [0.0], [1.0], [1.0], [1.0], [1.0], [0.0])
    ]
    assert net.std.flatten().tolist() == pytest.approx([1 / 255] * 3)
    assert torch.equal(net.mean.flatten(), sets[0].mean)


# ------------------------------------------------------------- the learning rate, without training


@pytest.fixture
def scripted(small_run, monkeypatch):
    """A function that runs epochs whose validation results are given, and returns the run."""

    def run_epochs(results: list[tuple[float, float]], patience: int) -> train.Run:
        small_run.args.patience = small_run.scheduler.patience = patience
        small_run.args.epochs = 1000
        results = iter(results)
        monkeypatch.setattr(train, "train_one_epoch", lambda run, epoch: (1.0, 0.5))
        monkeypatch.setattr(train, "evaluate", lambda run, views: next(results))
        for result in iter(lambda: results.__length_hint__(), 0):
            assert result and not small_run.has_ended()
            train.run_epoch(small_run)
        return small_run

    return run_epochs


def test_ties_on_the_starting_plateau_do_not_lower_the_learning_rate(scripted, small_run):
    share = small_run.val_set.largest_share()
    run = scripted([(1.6, share)] * 30, patience=2)
    assert [row["lr"] for row in run.history] == [0.01] * 30


def test_a_user_whose_network_is_stuck_is_told_once(scripted, small_run, capsys):
    share = small_run.val_set.largest_share()
    for stuck in (True, False):
        small_run.history.clear()
        for epoch in range(1, 9):
            scripted([(1.6, share if stuck else 0.9)], patience=100)
            train.print_epoch(small_run)
            hinted = "largest class; try --lr" in capsys.readouterr().out
            assert hinted == (stuck and epoch == train.STUCK_EPOCHS)


def test_the_rate_drops_by_ten_when_the_loss_stalls_and_a_fourth_drop_ends_the_run(scripted):
    patience = 2
    better = [(1.5 - 0.1 * i, 0.9) for i in range(5)]
    run = scripted([*better, *[(1.4, 0.9)] * 4 * (patience + 1)], patience)
    rates = [row["lr"] for row in run.history]
    assert rates == pytest.approx([0.01] * 8 + [1e-3] * 3 + [1e-4] * 3 + [1e-5] * 3)
    assert run.has_ended() and run.best() is run.history[4]


def test_the_warm_up_rises_to_the_learning_rate(trained):
    rates = [float(row["lr"]) for row in history_of(trained)]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3], rel=1e-4)


# ------------------------------------------------------------------------------- refusals


def test_data_that_cannot_be_trained_on(data, tmp_path):
    output = ("--output", tmp_path / "out")
    assert "split_data.py" in error_of(train.main, "--data", tmp_path / "none", *output)
    draw_photos(tmp_path / "one" / "train", {"a": 2})
    assert "1 classes" in error_of(train.main, "--data", tmp_path / "one", *output)
    draw_photos(tmp_path / "two" / "train", {"a": 2, "b": 2})
    assert str(Path("two", "val")) in error_of(train.main, "--data", tmp_path / "two", *output)
    draw_photos(tmp_path / "two" / "val", {"a": 1, "c": 1})
    assert "that train lacks: c" in error_of(train.main, "--data", tmp_path / "two", *output)
    (tmp_path / "two" / "train" / "b" / "00.jpg").write_bytes(b"no longer a photo")
    message = error_of(train.main, "--data", tmp_path / "two", *output)
    assert str(Path("b", "00.jpg")) in message
    left = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert left <= {".jpg", ".npy", ".json"}  # packs may be there, half-written ones may not


def test_a_fresh_run_does_not_replace_an_earlier_one(trained, data):
    message = error_of(train.main, "--data", data, "--output", trained)
    assert all(option in message for option in ("--resume", "--output", "--overwrite"))
    assert {path.name for path in trained.iterdir()} == FILES


def test_resuming_what_does_not_fit(trained, data, tmp_path):
    resume = ("--data", data, "--resume", "--output")
    assert "no " in error_of(train.main, *resume, tmp_path)
    message = error_of(train.main, *resume, trained, "--groups", "1")
    assert "--groups 2" in message
    assert "--lr 0.01" in error_of(train.main, *resume, trained, "--lr", "0.5")
    draw_photos(tmp_path / "data" / "train", {"daisy": 2, "orchid": 2, "tulips": 2})
    draw_photos(tmp_path / "data" / "val", {"daisy": 1})
    options = ("--data", tmp_path / "data", "--resume", "--output", trained)
    assert "daisy, roses, tulips" in error_of(train.main, *options)
    shutil.copytree(data, tmp_path / "fewer", ignore=shutil.ignore_patterns("00.jpg", "*packed*"))
    options = ("--data", tmp_path / "fewer", "--resume", "--output", trained)
    assert "photos" in error_of(train.main, *options)
    for name, content in (("cut", (trained / "last.pt").read_bytes()[:100_000]), ("text", b"x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").write_bytes(content)
        error_of(train.main, *resume, tmp_path / name)
    (tmp_path / "weights").mkdir()
    shutil.copyfile(trained / "AlexNet.pth", tmp_path / "weights" / "last.pt")
    assert "no checkpoint" in error_of(train.main, *resume, tmp_path / "weights")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(data, tmp_path):
    options = ("--data", data, "--output", tmp_path, "--lr", "1e9", "--batch-size", "4")
    message = error_of(train.main, *options)
    assert "--lr" in message and "epoch 1" in message
    assert {path.name for path in tmp_path.iterdir()} == {"class_idx.json"}


def test_overwriting_keeps_the_earlier_run_until_an_epoch_is_whole(trained, data, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    error_of(train.main, "--data", data, "--output", copy, "--lr", "1e9", "--overwrite")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    argv = ["--data", str(data), "--output", str(copy), "--seed", "1", "--epochs", "1"]
    assert train.main([*argv, "--overwrite"]) == 0
    assert {path.name for path in copy.iterdir()} == FILES
    assert (copy / "AlexNet.pth").read_bytes() != before["AlexNet.pth"]
    assert len(history_of(copy)) == 1


def test_ctrl_c_says_how_to_go_on(trained, data, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = {name: (copy / name).read_bytes() for name in ("AlexNet.pth", "last.pt")}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_batch", interrupt)
    argv = ["--data", str(data), "--output", str(copy), "--resume"]
    assert train.main(argv) == 130
    assert "--resume" in capsys.readouterr().err
    assert {name: (copy / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]
)  # fmt: skip
def test_out_of_memory_names_the_option_that_helps(data, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(train, "train_one_batch", fail)
    message = error_of(train.main, "--data", data, "--output", tmp_path)
    assert "--accumulate" in message


def test_a_full_disk_is_said_and_the_earlier_files_stay(trained, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    resource = pytest.importorskip("resource")
    copy = shutil.copytree(trained, tmp_path / "run")
    before = (copy / "last.pt").read_bytes()
    content = alexnet.load_tensors(copy / "last.pt", mmap=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignore = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (10**4, 10**6, 3 * 10**8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="too large"):
                train.save_tensors(copy / "last.pt", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignore)
    assert (copy / "last.pt").read_bytes() == before and not list(copy.glob("*.tmp"))


def test_too_little_free_disk_is_said_before_anything_is_lost(trained, data, tmp_path, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free" in error_of(train.main, "--data", data, "--output", copy, "--overwrite")
    assert {path.name for path in copy.iterdir()} == FILES


@pytest.mark.parametrize(
    "option, value",
    [("--epochs", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--batch-size", "x"), ("--seed", "-1")],
)
def test_options_out_of_range(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([option, value])
    assert caught.value.code == 2 and option in capsys.readouterr().err


def test_bfloat16_is_chosen_where_the_cpu_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        able = {"avx512_bf16": has, "avx2": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert train.pick_precision("auto", cpu) == expected
    assert train.pick_precision("float32", cpu) == torch.float32
