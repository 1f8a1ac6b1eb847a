"""train.py: photos, augmentation, steps, resuming, files and refusals, on nine drawings."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import POSIX, contents, draw_photos, error_of, full_disk, history_of, same
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import alexnet
import train
from train import Photos

FILES = {*"AlexNet.pth class_idx.json curves.png history.csv kernels.png last.pt run.json".split()}
CPU = torch.device("cpu")


class NarrowLinear(nn.Linear):
    """16 hidden units for 4096: a run saves 40 MB instead of 900, and is the same otherwise."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(*(16 if n == 4096 else n for n in (n_in, n_out)))


FULL_AFTER = train.RAMP_EPOCHS  # before narrow() shortens it


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "Linear", NarrowLinear)
        patch.setattr(train, "SAVE_PAUSE", 0)  # after every epoch
        patch.setattr(train, "RAMP_EPOCHS", 1)  # so that a second epoch has everything
        yield


@pytest.fixture(scope="module")
def two(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs; tests change copies of it."""
    return run_train(few, tmp_path_factory.mktemp("two"), "--epochs", "2")


@pytest.fixture
def run(few, tmp_path, monkeypatch) -> train.Run:
    """A run at its start, whose batches always show the same views of the photos."""
    run = new_run(few, tmp_path)
    fixed = train.make_batch(run, torch.arange(6))
    batch_of = lambda run, batch: [x[batch].to(run.net.mean.dtype) for x in fixed]  # noqa: E731
    monkeypatch.setattr(train, "make_batch", batch_of)
    return run


def new_run(data: Path, output: Path, *options: str, photos: Photos | None = None) -> Any:
    """A run at its start, with dropout off; `photos` are then those of both sides."""
    args = train.parse_args(argv_of(data, output, *options))
    train.prepare_output(args)
    sets = (photos, photos) if photos else train.open_photos(args)
    run = train.Run(args, alexnet.pick_device(args.device), *sets)
    run.net.train().classifier[2].p = run.net.classifier[5].p = 0.0
    return run


def open_photos(data: Path, output: Path) -> tuple[Photos, Photos]:
    return train.open_photos(train.parse_args(argv_of(data, output)))


def photos_of(pixels: Tensor, labels: Tensor, n_classes: int) -> Photos:
    """Photos that lie in no folder."""
    photos = Photos.__new__(Photos)
    photos.pixels, photos.labels = pixels, labels
    photos.classes = [*map(str, range(n_classes))]
    photos.counts = torch.bincount(labels, minlength=n_classes).tolist()
    photos.digest = ""
    photos.open_pixels = lambda output: None
    return photos


def argv_of(data: Path, output: Path, *options: str) -> list[str]:
    fixed = ["--device", "cpu", "--precision", "float32", "--batch-size", "4"]
    return ["--data", str(data), "--output", str(output), *fixed, *options]


def run_train(data: Path, output: Path, *options: str) -> Path:
    assert train.main(argv_of(data, output, *options)) == 0
    return output


def refusal(data: Path, output: Path, *options: str) -> str:
    return error_of(train.main, *argv_of(data, output, *options))


def copy_of(data: Path, folder: Path) -> Path:
    return shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.npy"))


def test_the_pack_is_made_once_and_anew_when_a_file_changes(few, tmp_path, monkeypatch):
    data = copy_of(few, tmp_path / "data")
    for side, photos in zip(("train", "val"), open_photos(data, tmp_path), strict=True):
        files = alexnet.image_files(data / side)
        assert np.array_equal(photos.pixels, np.stack([*map(alexnet.read_square, files)]))
        assert [photos.classes[i] for i in photos.labels] == [path.parent.name for path in files]
    old, kept = sorted(path.name for path in data.glob("*.npy"))
    assert re.fullmatch(r"train-[0-9a-f]{12}\.npy val-[0-9a-f]{12}\.npy", f"{old} {kept}")
    foreign = {"train-mine.npy", "train-0123456789abc.npy", "test-0123456789ab.npy"}
    for name in foreign:
        (data / name).write_text("mine")
    shutil.copyfile(data / "train/a/00.jpg", data / "train/b/02.jpg")
    train_set, _ = open_photos(data, tmp_path)
    assert np.array_equal(train_set.pixels[5], train_set.pixels[0])
    names = {path.name for path in data.glob("*.npy")}
    assert foreign | {kept} < names and len(names) == 5 and old not in names
    os.utime(data / "train/a/00.jpg", (1, 1))  # now where the data may not be written
    monkeypatch.setattr(os, "access", lambda path, mode: path != data)
    open_photos(data, tmp_path)
    assert names == {path.name for path in data.glob("*.npy")}
    assert len([*tmp_path.glob("*.npy")]) == 1
    monkeypatch.setattr(alexnet, "read_squares", None)  # nor need photos be read again
    assert np.array_equal(open_photos(data, tmp_path)[0].pixels, train_set.pixels)


@POSIX
def test_a_photo_edited_in_place_is_decoded_anew(few, tmp_path):
    data = copy_of(few, tmp_path / "data")
    before, _ = open_photos(data, tmp_path)
    path, other = data / "train/a/00.jpg", (data / "train/b/00.jpg").read_bytes()
    stat, size = path.stat(), path.stat().st_size
    time.sleep(0.05)  # longer than a step of a file system's clock
    path.write_bytes(other[:size].ljust(size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, _ = open_photos(data, tmp_path)
    assert not np.array_equal(before.pixels[0], after.pixels[0])


def test_a_drive_without_shared_maps_is_read(few, tmp_path, monkeypatch):
    class NoSharedMap(mmap.mmap):
        def __new__(cls, *argv: Any, access: int = mmap.ACCESS_DEFAULT, **options: Any) -> Any:
            if access != mmap.ACCESS_COPY:
                raise OSError(19, "No such device")
            return super().__new__(cls, *argv, access=access, **options)

    expected, _ = open_photos(few, tmp_path)
    monkeypatch.setattr(mmap, "mmap", NoSharedMap)
    photos, _ = open_photos(few, tmp_path)
    assert np.array_equal(photos.pixels, expected.pixels)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_val_may_have_another_name(few, tmp_path, name):
    data = copy_of(few, tmp_path / "data")
    (data / "val").rename(data / name)
    assert len(open_photos(data, tmp_path)[1]) == 3


def test_two_runs_do_not_write_into_one_folder(few, tmp_path, monkeypatch):
    output, messages = tmp_path / "run", []

    def second_run(run: train.Run, batch: Tensor) -> Tensor:
        messages.append(refusal(few, output, "--overwrite"))
        return torch.zeros(2)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_batch", second_run)
        run_train(few, output, "--epochs", "1")
    assert {f"another run writes to {output}" in message for message in messages} == {True}
    (output / "train.lock").touch()  # as a kill leaves it
    run_train(few, output, "--epochs", "1", "--overwrite")
    assert {path.name for path in output.iterdir()} == FILES


def test_a_class_whose_name_begins_with_a_dot_is_left_out_and_named(few, tmp_path, capsys):
    data = copy_of(few, tmp_path / "data")
    draw_photos(data / "train", {".net": 2})
    train_set, _ = open_photos(data, tmp_path)
    assert train_set.classes == ["a", "b"]
    assert f"{data / 'train' / '.net'} (2 photos)" in capsys.readouterr().err


@POSIX
def test_a_set_may_be_larger_than_the_memory(few, tmp_path, monkeypatch):
    def write_empty(path: Path, files: list[Path]) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        shape = (3 * memory // 256**2, 256, 256, 3)
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + math.prod(shape))  # which takes no room on the disk

    monkeypatch.setattr(train, "write_pixels", write_empty)
    photos, _ = open_photos(copy_of(few, tmp_path / "data"), tmp_path)
    assert photos.take(torch.tensor([0, 5]), CPU)[0].shape == (2, 256, 256, 3)


def test_data_that_cannot_be_trained_on(tmp_path, capsys):
    data, sides = tmp_path / "data", (tmp_path / "data/train", tmp_path / "data/val")
    assert "split_data.py" in refusal(data, tmp_path)
    draw_photos(sides[0], {"a": 2})
    assert f"{sides[0]} has photos of 1 classes" in refusal(data, tmp_path)
    draw_photos(sides[0], {"b": 2})
    assert f"there is no folder {sides[1]}" in refusal(data, tmp_path)
    sides[1].mkdir()
    assert f"{sides[1]} has photos of 0 classes" in refusal(data, tmp_path)
    draw_photos(sides[1], {"a": 2})
    broken = [data / name for name in ("train/a/00.jpg", "train/b/01.jpg", "val/a/01.jpg")]
    for path in broken:
        path.write_text("no photo")
    message, printed = refusal(data, tmp_path), capsys.readouterr().err
    assert "2 of the photos in train" in message and "1 of the photos in val" in message
    assert all(str(path) in printed for path in broken)
    assert not [*tmp_path.rglob("*.npy*")]
    for path in broken[:2]:
        path.unlink()
    assert "cannot read 1 of the photos in val" in refusal(data, tmp_path)
    draw_photos(sides[1], {"c": 1})
    assert "a class that train lacks, c:" in refusal(data, tmp_path)


def test_a_crop_equals_brute_force(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 256, 256)
    plain, mirrored = [[0.875, 0, 0.05], [0, 0.875, -0.125]], [[-0.7, 0, 0.2], [0, 0.6, -0.4]]
    turned = [[0.8, -0.5, 0.2], [0.4, 0.7, -0.1]]  # beyond the photo, which goes on mirrored there
    crops = torch.tensor([plain, mirrored, [[1.0, 0, 0], [0, 1, 0]], turned])
    monkeypatch.setattr(train, "draw_crops", lambda *limits: crops)
    views = train.random_crop(images, 0.25, 30).numpy()
    for i in range(4):
        for row, column in ((0, 0), (223, 223), (17, 200), (111, 5)):
            u, v = (2 * column + 1) / 224 - 1, (2 * row + 1) / 224 - 1
            place = 128 * (crops[i].double().numpy() @ (u, v, 1) + 1) - 0.5
            x, y = 255 - abs(255 - abs(place))
            x0, y0 = min(int(x), 254), min(int(y), 254)
            corners = images[i, :, y0 : y0 + 2, x0 : x0 + 2].double().numpy()
            weights = np.outer((1 - y + y0, y - y0), (1 - x + x0, x - x0))
            expected = (corners * weights).sum((1, 2))
            assert views[i, :, row, column] == pytest.approx(expected, abs=1e-4)


def test_the_crops_of_the_paper_copy_pixels_at_33_x_33_places(monkeypatch):
    crops, images = train.draw_crops(20_000, 0, 0), torch.rand(1, 3, 256, 256)
    corners = (128 * (crops[:, :, 2] + 1) - 112).round().int().tolist()
    assert {*map(tuple, corners)} == {(x, y) for x in range(33) for y in range(33)}
    assert (crops[:, 0, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    for crop, (x, y) in zip(crops[:8], corners[:8], strict=True):
        expected = images[:, :, y : y + 224, x : x + 224]
        expected = expected.flip(3) if crop[0, 0] < 0 else expected
        monkeypatch.setattr(train, "draw_crops", lambda *limits: crop[None])  # noqa: B023
        view = train.random_crop(images, 0, 0)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


def test_random_crops_lie_in_the_photo_and_areas_and_aspects_in_range():
    torch.manual_seed(0)
    least = 0.1
    crops = train.draw_crops(20_000, least, 0)
    width, height, x, y = crops[:, 0, 0].abs(), crops[:, 1, 1], *crops[:, :, 2].T
    assert (x.abs() + width).max() <= 1 + 1e-6 and (y.abs() + height).max() <= 1 + 1e-6
    area, aspect = width * height, width / height
    assert area.min() >= least - 1e-6 and aspect.log().mean().abs() < 0.01
    assert aspect.min() >= 3 / 4 - 1e-6 and aspect.max() <= 4 / 3 + 1e-6
    assert (area < 0.7).float().mean() == pytest.approx((0.7 - least) / (1 - least), abs=0.02)
    small = area < 0.7  # these lie anywhere in the room that they leave
    for place, room in ((x, 1 - width), (y, 1 - height)):
        assert (place / room)[small].abs().mean() == pytest.approx(0.5, abs=0.02)


def photos_of_one_color_each(colors: np.ndarray, size: int) -> Photos:
    """Every photo is a class of its own."""
    n, pixels = len(colors), colors.astype(np.uint8)[:, None, None]
    return photos_of(torch.tensor(pixels).expand(n, size, size, 3), torch.arange(n), n)


def test_color_shifts_have_a_hundredth_of_the_covariance_of_the_pixels(few, tmp_path, monkeypatch):
    covariance = [[900, 700, 500], [700, 800, 600], [500, 600, 1000]]
    colors = np.random.default_rng(0).multivariate_normal([128] * 3, covariance, 40)
    photos = photos_of_one_color_each(colors.clip(0, 255), 1)
    monkeypatch.setattr(train, "random_crop", lambda images, *limits: 0 * images)
    run = new_run(few, tmp_path, "--mix", "0", photos=photos)
    images, _ = train.make_batch(run, torch.arange(40).repeat(2500))
    shifts = images.flatten(1)  # of one black pixel each
    expected = torch.from_numpy(np.cov(photos.pixels[:, 0, 0].T / 255)) / 100
    torch.testing.assert_close(shifts.T.cov().double(), expected, rtol=0.05, atol=0)
    assert shifts.mean(0).abs().max() < 1e-3


def test_crops_turns_colors_and_mixing_reach_full_strength_after_30_epochs(
    few, tmp_path, monkeypatch
):
    def record(images: Tensor, *limits: float) -> Tensor:
        """Of each photo a black, a red, a green and a blue pixel, (n, 3, 1, 4)."""
        drawn_crops.append(train.draw_crops(len(images), *limits))
        smallest.append(limits[0])
        pixels = torch.cat([torch.zeros(3, 1), torch.eye(3)], dim=1)
        return pixels[None, :, None].repeat(len(images), 1, 1, 1)

    drawn_crops: list[Tensor] = []
    smallest: list[float] = []
    monkeypatch.setattr(train, "RAMP_EPOCHS", 30)
    photos = photos_of_one_color_each(np.array([[0, 0, 0], [50, 100, 150]]), 1)
    monkeypatch.setattr(train, "random_crop", record)
    run = new_run(few, tmp_path, *"--mix 0 --rotation 40 --jitter 0.3".split(), photos=photos)
    run.color_axes.zero_()
    for epochs, strength in ((0, 0), (15, 0.5), (90, 1)):
        run.history = [{}] * epochs
        images, _ = train.make_batch(run, torch.arange(2).repeat(10_000))
        crops, (shifts, colors) = drawn_crops[-1], images.squeeze(2).split([1, 3], dim=2)
        colors = colors - shifts
        right, down = crops[:, :, 0], crops[:, :, 1]  # of the crop, in the photo
        assert (right * down).sum(1).abs().max() < 1e-6
        scale = colors.sum(2)[:, :1]  # of grey, of which black becomes the shift
        brightness = scale + 2 * shifts[:, 0]
        saturation = (colors[:, :1, 0] - colors[:, :1, 1]) / scale
        contrast, turn = scale / brightness, torch.atan2(-down[:, :1], down[:, 1:]).rad2deg() / 40
        drawn = torch.cat([turn, *((x - 1) / 0.3 for x in (brightness, contrast, saturation))], 1)
        assert drawn.abs().amax(0) == pytest.approx([strength] * 4, rel=0.01, abs=1e-5)
        expected = torch.eye(4) * strength**2 / 3  # uniform, each of its own
        torch.testing.assert_close(drawn.T.cov(), expected, rtol=0.03, atol=0.01)
        colors -= (scale * (1 - saturation) / 3)[:, :, None]
        torch.testing.assert_close(colors, (scale * saturation)[:, :, None] * torch.eye(3))
    assert smallest == [1, 1 - 0.5 * 0.75, 0.25]

    run.args.mix = 0.5
    for epochs, n_mixed in ((0, 0), (15, 500), (60, 1000)):
        run.history = [{}] * epochs
        torch.manual_seed(0)
        _, targets = train.make_batch(run, torch.arange(2).repeat(1000))
        assert (targets[n_mixed:].amax(1) == 1).all()
        # Images of 1 x 4 pixels are too small for CutMix; each blend is with the other class.
        assert (targets[n_mixed // 2 : n_mixed].amax(1) < 1).all()


@pytest.mark.parametrize(("recipe", "p"), [("default", [0, 0.25, 0.5]), ("paper", [0.5] * 3)])
def test_dropout_grows_but_for_the_paper(few, tmp_path, monkeypatch, recipe, p):
    monkeypatch.setattr(train, "RAMP_EPOCHS", 30)
    monkeypatch.setattr(train, "train_one_batch", lambda run, batch: torch.zeros(2))
    run = new_run(few, tmp_path, "--recipe", recipe)
    found = []
    for epochs in (0, 15, 50):
        run.history = [{}] * epochs
        train.train_one_epoch(run, epochs + 1)
        found.append([layer.p for layer in run.net.modules() if isinstance(layer, nn.Dropout)])
    assert found == [[x, x] for x in p]


def test_two_of_five_show_a_window_of_another_two_are_blended_and_targets_tell_it(few, tmp_path):
    colors = torch.tensor([[0, 0, 0], [50, 100, 150], [100, 0, 200], [255, 255, 0], [9, 9, 9]])
    photos = photos_of_one_color_each(colors.numpy(), 256)
    run = new_run(few, tmp_path, "--mix", "0.8", "--jitter", "0", photos=photos)
    run.history = [{}] * 40
    run.color_axes.zero_()
    torch.manual_seed(0)
    n_mixed = torch.zeros(5)
    for _ in range(40):
        batch = torch.randperm(5)
        images, targets = train.make_batch(run, batch)
        torch.testing.assert_close(images.mean((2, 3)), targets @ (colors / 255), rtol=0, atol=1e-4)
        assert (targets.sum(1) - 1).abs().max() < 1e-5
        differences = images[:2].permute(0, 2, 3, 1)[..., None, :] - colors / 255
        assert differences.abs().amax(-1).amin(-1).max() < 1e-4  # each pixel is of one photo
        assert images[2:].std((2, 3)).max() < 1e-4  # each pixel is of both
        for pair in (slice(2), slice(2, 4)):
            others = [i for i in range(5) if i not in batch[pair]]
            assert targets[pair][:, others].max() == 0
        assert targets[4, batch[4]] == 1
        n_mixed += targets.max(1)[0] < 0.999
    # A window may also be empty, or the whole photo, and a blend nearly one of the two.
    assert (n_mixed[:2] > 30).all() and (n_mixed[2:4] > 15).all()
    few_targets = [train.make_batch(run, torch.arange(4))[1] for _ in range(20)]
    assert min(targets[2].max() for targets in few_targets) < 0.9  # of three, all show a window


def test_warm_up_and_draws_follow_from_the_seed_and_the_epoch(few, tmp_path, monkeypatch):
    def record(run: train.Run, batch: Tensor) -> Tensor:
        rates.append(run.lr)
        drawn[-1].append((batch, *train.make_batch(run, batch)))
        return torch.zeros(2)

    rates, drawn = [], []
    monkeypatch.setattr(train, "train_one_batch", record)
    for options, epochs in (((), (1, 2, 3, 4)), ((), (1, 2)), (("--seed", "1"), (1,))):
        run = new_run(few, tmp_path, *options)
        torch.rand(1 + len(drawn))  # drawn by something else
        for epoch in epochs:
            drawn.append([])
            train.train_one_epoch(run, epoch)
    assert rates[:8] == pytest.approx([0.01 * n / 6 for n in range(1, 7)] + [0.01] * 2)
    assert sorted(i for batch, *_ in drawn[0] for i in batch.tolist()) == [*range(6)]
    assert [same(drawn[0], other) for other in drawn[3:]] == [False, True, False, False]
    assert same(drawn[1], drawn[5])


def test_balance_counts_every_class_alike(tmp_path, monkeypatch):
    labels = torch.tensor([0] * 90 + [1] * 10)
    photos = photos_of(torch.zeros((100, 256, 256, 3), dtype=torch.uint8), labels, 2)
    drawn = []
    monkeypatch.setattr(train, "train_one_batch", lambda run, x: drawn.append(x) or torch.zeros(2))
    answer = torch.tensor([[0.8, 0.2]])  # always the first class
    answers = lambda net, images, ten_views: answer.expand(len(images), 2)  # noqa: E731
    monkeypatch.setattr(alexnet, "predict_probabilities", answers)
    by_photo, by_class = -math.log(0.8**9 * 0.2) / 10, -math.log(0.8 * 0.2) / 2
    for options, share, loss in (((), 0.9, by_photo), (("--balance",), 0.5, by_class)):
        run = new_run(tmp_path, tmp_path, *options, photos=photos)
        drawn.clear()
        for epoch in range(1, 11):
            train.train_one_epoch(run, epoch)
        rare = labels[torch.cat(drawn)].float().mean().item()
        assert rare == pytest.approx(1 - share, abs=0.06 if options else 1e-6)
        assert run.class_shares == pytest.approx([share, 1 - share])
        assert train.evaluate(run, run.average) == pytest.approx((loss, share))


def test_a_run_can_start_from_another_one_s_weights(two, few, tmp_path, capsys):
    state = torch.load(two / "AlexNet.pth")
    data = copy_of(few, tmp_path / "data")
    options = ("--init", str(two / "AlexNet.pth"))
    for classes in ("a b", "a c"):
        for side in ("train", "val"):
            (data / side / "b").rename(data / side / classes[2])
        (run := new_run(data, tmp_path, *options)).args.lr = 0.0
        train.start_from(run)
        for ours in (run.net.state_dict(), run.average.state_dict()):
            other = [name for name in state if not torch.equal(ours[name], state[name])]
            last_layer = ["classifier.6.weight", "classifier.6.bias"]
            assert other == ([] if classes == "a b" else last_layer)
    assert "--groups" in refusal(data, tmp_path / "x", *options, "--groups", "1")
    run_train(data, tmp_path / "y", *options, "--epochs", "1")
    assert "--init" in refusal(data, tmp_path / "y", "--resume", "--init", "other.pth")
    run_train(data, tmp_path / "y", "--resume", "--epochs", "2")
    unbroken = run_train(data, tmp_path / "z", *options, "--epochs", "2")
    ours, theirs = ([row["val_loss"] for row in history_of(x)] for x in (tmp_path / "y", unbroken))
    assert ours == theirs


def update_of(run: train.Run, *batch: int) -> Tensor:
    """What one step changes, in all weights."""
    before = torch.cat([p.detach().flatten() for p in run.net.parameters()])
    train.train_one_batch(run, torch.tensor(batch))
    return torch.cat([p.detach().flatten() for p in run.net.parameters()]) - before


def test_accumulation_gives_the_update_of_the_whole_batch(run):
    run.net.double()  # in float32 rounding decides which of two equal pixels of a pool is larger
    start, updates = {k: x.clone() for k, x in run.net.state_dict().items()}, []
    sizes: list[int] = []
    run.net.register_forward_hook(lambda net, x, logits: sizes.append(len(logits)))
    for pieces in (1, 2, 8):  # of five photos: some pieces stay empty
        run.net.load_state_dict(start)
        run.optimizer.state.clear()
        run.args.accumulate = pieces
        updates.append(update_of(run, 4, 0, 5, 1, 3))
        assert (updates[-1] - updates[0]).norm() < 1e-6 * updates[0].norm()
    assert sizes == [5, *(3, 2), *(1, 1, 1, 1, 1, 0, 0, 0)]


def test_steps_are_those_of_the_paper(run):
    """v <- 0.9 v - 0.0005 lr w - lr gradient; w <- w + v (section 5), twice."""
    weights = [*run.net.double().parameters()]  # double, to see the decay of 5e-6 of a weight
    run.optimizer.state.clear()
    speeds = [torch.zeros_like(w) for w in weights]
    for batch in (torch.tensor([0, 3, 4]), torch.tensor([5, 1])):
        images, targets = train.make_batch(run, batch)
        loss = F.cross_entropy(run.net(images).float(), targets, label_smoothing=0.1)
        gradients = torch.autograd.grad(loss, weights)
        for v, w, g in zip(speeds, weights, gradients, strict=True):
            v.copy_(0.9 * v - 0.0005 * 0.01 * w.detach() - 0.01 * g)
        expected = [w.detach() + v for v, w in zip(speeds, weights, strict=True)]
        train.train_one_batch(run, batch)
        torch.testing.assert_close([w.detach() for w in weights], expected, rtol=0, atol=2e-9)


def test_the_average_of_the_weights_is_that_of_the_formula(run):
    bias, average = run.net.classifier[6].bias, run.average.classifier[6].bias
    cases = (0.5, 1, 1, 1 / 11), (0.5, 2, 2, (2 / 12) ** 2), (0.5, 4, 999, 0.5**4), (0.0, 9, 9, 0)
    for ema, steps, total, decay in cases:
        expected = decay * average + (1 - decay) * nn.init.normal_(bias).detach()
        run.args.ema = ema
        train.update_average(run, steps, total)
        torch.testing.assert_close(average, expected)


def test_the_average_is_up_to_date_at_the_end_of_an_epoch(few, tmp_path, monkeypatch):
    run, moved = new_run(few, tmp_path, "--batch-size", "1"), []
    monkeypatch.setattr(train, "AVERAGE_EVERY", 4)
    monkeypatch.setattr(train, "train_one_batch", lambda run, batch: torch.zeros(2))
    move = lambda run, steps, total: moved.append((steps, total))  # noqa: E731
    monkeypatch.setattr(train, "update_average", move)
    for epoch in (1, 2):
        train.train_one_epoch(run, epoch)
    assert moved == [(4, 4), (2, 6), (4, 10), (2, 12)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_in_half_precision_goes_where_float32_goes(few, tmp_path, run, precision):
    """Autocast and, with float16, the scaler of the loss; emulated where the CPU has neither."""
    half = new_run(few, tmp_path, "--precision", precision)
    assert half.scaler.is_enabled() == (precision == "float16")
    if precision == "float16":
        half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # no gradient is finite
        assert not update_of(half, 0, 1, 2).any()  # so the step is skipped
        half.scaler.update(2.0**10)
    exact, ours = update_of(run, 0, 1, 2), update_of(half, 0, 1, 2)
    assert 0.98 < torch.cosine_similarity(exact, ours, dim=0) and not torch.equal(exact, ours)
    assert ours.norm() == pytest.approx(exact.norm().item(), rel=0.1)


def test_evaluation_equals_the_mean_over_the_photos(run):
    photos = run.train_set.pixels[:5]
    views = photos[:, 16:240, 16:240].permute(0, 3, 1, 2) / 255
    logits = run.average(views)
    labels = logits.argmax(1) ^ torch.tensor([0, 0, 0, 1, 1])  # three of five answers are right
    ten = alexnet.predict_probabilities(run.average, alexnet.to_float(photos), ten_views=True)
    run.val_set = photos_of(photos, labels, 2)
    loss, accuracy = train.evaluate(run, run.average)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert accuracy == 0.6  # to the bit: the share of a class is compared with it
    loss, _ = train.evaluate(run, run.average, ten_views=True)
    assert loss == pytest.approx(F.nll_loss(ten.log(), labels).item(), rel=1e-4)


def test_the_defaults_are_those_of_the_published_runs():
    args = train.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.ema) == (90, 32, 0.01, 0.99)
    assert (args.patience, FULL_AFTER, train.FIRST_DROP_BY) == (10, 30, 0.8)
    assert (args.crop_area, args.rotation, args.jitter, args.mix) == (0.25, 30, 0.4, 0.5)
    assert (args.label_smoothing, args.weight_decay, args.groups) == (0.1, 0.0005, 2)
    assert train.parse_args(["--recipe", "paper"]).batch_size == 128


def test_the_recipe_of_the_paper_sets_its_options_and_its_start(few, tmp_path):
    run = new_run(few, tmp_path, "--recipe", "paper")
    args = run.args
    assert args.batch_size == 4  # what is given counts
    assert (args.crop_area, args.rotation, args.jitter, args.mix) == (0, 0, 0, 0)
    assert args.ema == args.label_smoothing == 0
    assert (run.net.features[5].bias == 1).all()  # test_alexnet.py looks at the other layers
    assert run.net.std.flatten().tolist() == pytest.approx([1 / 255] * 3)


def rates_of(
    results: list,
    folder: Path,
    patch: pytest.MonkeyPatch,
    n_large: int = 12,
    first_drop_by: float = 1.0,
    recipe: str = "default",
) -> list[float]:
    """Learning rates by epoch, given loss and accuracy on 20 photos, n_large of one class."""
    labels, report = (torch.arange(20) >= n_large).long(), Mock()
    photos = photos_of(torch.zeros((20, 8, 8, 3), dtype=torch.uint8), labels, 2)
    patch.setattr(train, "Photos", Mock(return_value=photos))
    patch.setattr(train, "train_one_epoch", lambda run, epoch: (1.0, 0.5))
    patch.setattr(train, "evaluate", Mock(side_effect=results))
    patch.setattr(train, "save_weights", Mock())
    patch.setattr(train, "save_checkpoint", Mock())
    patch.setattr(train, "report", report)
    patch.setattr(train, "FIRST_DROP_BY", first_drop_by)
    options = ("--recipe", recipe, "--patience", "2", "--epochs", str(len(results)))
    run_train(folder, folder, *options)
    return [row["lr"] for row in report.call_args.args[0].history]


@pytest.mark.parametrize("n_large", [12, 19])
def test_ties_on_the_starting_plateau_do_not_lower_the_rate(tmp_path, monkeypatch, n_large):
    share, run = n_large / 20, (tmp_path, monkeypatch, n_large)
    blind = -share * math.log(share) - (1 - share) * math.log(1 - share)
    for stuck in ((blind, share), (1.5 * blind, share), (blind, 0.1)):
        assert rates_of([stuck] * 12, *run) == [0.01] * 12
    for left in ((0.9 * blind, share), (blind, share + 0.05)):  # by the loss, by the accuracy
        assert rates_of([left] * 9, *run) == pytest.approx([0.01] * 7 + [0.001] * 2)


def test_the_rate_drops_where_the_loss_stalls_and_a_plateau_is_told(tmp_path, monkeypatch, capsys):
    for factor, last in ((0.998, 0.001), (0.995, 0.01)):  # 1/100 takes six epochs, three
        rates = rates_of([(0.5 * factor**i, 0.9) for i in range(8)], tmp_path, monkeypatch)
        assert rates[-1] == pytest.approx(last)
    results = [*((0.5 - 0.05 * i, 0.9) for i in range(5)), *[(0.4, 0.9)] * 40]
    rates = rates_of(results, tmp_path, monkeypatch)  # a fourth drop ends the run
    assert rates == pytest.approx([0.01] * 8 + [1e-3] * 3 + [1e-4] * 3 + [1e-5] * 3)
    stuck, learning = (0.7, 0.4), (0.4, 0.4)
    for results, n in (([stuck] * 5, 0), ([stuck] * 9, 1), ([*[stuck] * 5, learning, stuck], 0)):
        rates_of(results, tmp_path, monkeypatch)
        assert capsys.readouterr().out.count("hint: nothing is learnt") == n


def test_a_stall_counts_once_the_photos_get_no_harder(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RAMP_EPOCHS", 6)
    for recipe, n_high in (("default", 9), ("paper", 7)):  # the paper's are as hard from the start
        rates = rates_of([(0.5, 0.9)] * 10, tmp_path, monkeypatch, recipe=recipe)
        assert rates == pytest.approx([0.01] * n_high + [0.001] * (10 - n_high))


def test_the_rate_falls_after_four_fifths_of_the_epochs_if_it_has_not_before(tmp_path, monkeypatch):
    assert train.FIRST_DROP_BY == 0.8
    learning = [(0.6 * 0.98**i, 0.9) for i in range(20)]
    for stalled in ((), [(0.6, 0.9)] * 8):
        results = [*stalled, *learning][:20]
        rates = rates_of(results, tmp_path, monkeypatch, first_drop_by=0.8)
        n_high = 7 if stalled else 16
        assert rates == pytest.approx([0.01] * n_high + [0.001] * (20 - n_high))
    # The plateau counts anew after that drop: three more bad epochs, and not one, lower it again.
    results = [(0.6, 0.9)] * 3 + [(0.5, 0.9)] + [(0.51, 0.9)] * 6
    rates = rates_of(results, tmp_path, monkeypatch, first_drop_by=0.6)
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 3 + [0.0001])
    stuck = [(0.7, 0.4)] * 10
    assert rates_of(stuck, tmp_path, monkeypatch, first_drop_by=0.8) == [0.01] * 10


def test_hints_at_the_start(few, tmp_path, monkeypatch, capsys):
    def hints(run: train.Run) -> list[str]:
        train.print_setup(run)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint: ")]

    run = new_run(few, tmp_path)  # of 3 photos a class
    assert len(hints(run)) == 1 and "under 50 photos" in hints(run)[0]
    run.train_set.counts = [50, 70]
    assert hints(run) == []

    # A torch for CPUs alone, beside the driver of a card.
    run.args.device = "auto"
    program = tmp_path / ("nvidia-smi.exe" if os.name == "nt" else "nvidia-smi")
    program.touch(0o755)
    built_for = torch.version.cuda or torch.version.hip
    for path, beside_a_card in ((tmp_path, True), (tmp_path / "none", False)):
        monkeypatch.setenv("PATH", str(path))
        assert train.lacks_cuda(None) == beside_a_card and not train.lacks_cuda("13.0")
        found = hints(run)
        assert len(found) == train.lacks_cuda(built_for) == ("NVIDIA" in "".join(found))
    monkeypatch.setenv("PATH", str(tmp_path))
    run.args.device = "cpu"
    assert hints(run) == []


def test_a_run_leaves_its_files_and_nothing_else(two, few):
    assert {path.name for path in two.iterdir()} == FILES
    assert json.loads((two / "class_idx.json").read_text()) == {"0": "a", "1": "b"}
    header = "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds,images_per_second\n"
    assert (two / "history.csv").read_text().startswith(header)
    first, last = ({name: float(x) for name, x in row.items()} for row in history_of(two))
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert all(map(math.isfinite, [*first.values(), *last.values()]))
    best = min(first, last, key=lambda row: row["val_loss"])
    facts = json.loads((two / "run.json").read_text())
    assert facts["val_accuracy"]["center-crop"] == pytest.approx(best["val_accuracy"], abs=1e-6)
    assert (facts["epochs"], facts["best_epoch"]) == (2, best["epoch"])
    assert facts["photos"] == {"train": [3, 3], "val": [2, 1]}
    with Image.open(two / "curves.png") as image:
        assert image.width >= 600 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    state, files = alexnet.load_tensors(two / "AlexNet.pth"), alexnet.image_files(few / "train")
    values = np.stack([*map(alexnet.read_square, files)]).reshape(-1, 3) / 255
    assert state["mean"].flatten().numpy() == pytest.approx(values.mean(0), abs=0.01)
    assert state["std"].flatten().numpy() == pytest.approx(values.std(0), abs=0.01)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch is better than the last."""
    evaluate = train.evaluate

    def by_bias(run: train.Run, net: nn.Module, ten_views: bool = False) -> tuple[float, float]:
        return 1 / (1 + net.classifier[6].bias.norm().item()), evaluate(run, net, ten_views)[1]

    monkeypatch.setattr(train, "evaluate", by_bias)


def test_a_run_that_ends_is_killed_and_resumed_equals_an_unbroken_one(
    few, tmp_path, monkeypatch, growing
):
    unbroken = run_train(few, tmp_path / "unbroken", "--epochs", "4")
    broken = run_train(few, tmp_path / "broken", "--epochs", "2")
    before = (broken / "AlexNet.pth").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Run, "state_dict", Mock(side_effect=KeyboardInterrupt))
        run_train(few, broken, "--epochs", "4", "--resume")
    assert (broken / "AlexNet.pth").read_bytes() != before and len(history_of(broken)) == 2
    data = copy_of(few, tmp_path / "data")
    os.utime(data / "train/a/00.jpg", (1, 1))  # copied photos may have other times
    run_train(data, broken, "--epochs", "4", "--resume")
    assert {path.name for path in broken.iterdir()} == FILES
    assert history_of(broken) == history_of(unbroken)
    for name in ("AlexNet.pth", "last.pt"):
        assert same(*(alexnet.load_tensors(x / name) for x in (broken, unbroken))), name
    before = (broken / "AlexNet.pth").read_bytes()
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[(0.8, 0), (0.9, 1), (1, 0), (1, 0)]))
    run_train(data, broken, "--epochs", "5", "--resume")  # an epoch that is worse
    assert (broken / "AlexNet.pth").read_bytes() == before


def test_a_run_resumed_after_the_forced_drop_goes_on_at_the_lower_rate(few, tmp_path, monkeypatch):
    def stop_at_4(run: train.Run, epoch: int) -> tuple[float, float]:
        if epoch == 4:
            raise KeyboardInterrupt
        return train_one_epoch(run, epoch)

    for name, value in (("WARMUP_EPOCHS", 1), ("FIRST_DROP_BY", 0.5)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "is_guessing", lambda run: False)
    train_one_epoch = train.train_one_epoch
    unbroken = run_train(few, tmp_path / "unbroken", "--epochs", "4")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_one_epoch", stop_at_4)
        run_train(few, tmp_path / "broken", "--epochs", "4")
    assert len(history_of(tmp_path / "broken")) == 3  # saved after every epoch
    broken = run_train(few, tmp_path / "broken", "--resume")
    rates = [float(row["lr"]) for row in history_of(broken)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert same(*(alexnet.load_tensors(x / "last.pt") for x in (broken, unbroken)))


@pytest.mark.parametrize("kind, epochs", [("gone", "2"), ("of other classes", "3")])
def test_resuming_goes_on_without_the_best_weights(two, few, tmp_path, capsys, kind, epochs):
    output = shutil.copytree(two, tmp_path / "run")
    weights = output / "AlexNet.pth"
    for name in FILES - {"last.pt"}:
        (output / name).unlink()
    if kind != "gone":
        torch.save(alexnet.AlexNet(5).state_dict(), weights)
    run_train(few, output, "--resume", "--epochs", epochs)
    lines = [x for x in capsys.readouterr().out.splitlines() if "weights take its place" in x]
    assert len(lines) == 1 and str(weights) in lines[0]
    assert {path.name for path in output.iterdir()} == FILES
    losses = [float(x["val_loss"]) for x in history_of(output)[1:]]
    assert len(losses) == int(epochs) - 1
    best = (two, output)[losses.index(min(losses))]  # that of the second epoch, or the third
    average = alexnet.load_tensors(best / "last.pt")["average"]
    assert same(dict(alexnet.load_network(weights).state_dict()), dict(average))


def test_within_a_pause_the_best_weights_wait_in_memory(few, tmp_path, monkeypatch):
    """All is written at the end, when AlexNet.pth is evaluated by both kinds of views."""
    monkeypatch.setattr(train, "SAVE_PAUSE", 1e9)
    results = [(0.9, 0.5), (0.2, 0.6), (0.3, 0.7), (0.2, 0.6), (0.2, 0.6)]  # then of both views
    averages, written, views = [], [], []

    def evaluate(run: train.Run, net: nn.Module, ten_views: bool = False) -> tuple[float, float]:
        averages.append({name: x.clone() for name, x in net.state_dict().items()})
        written.append({path.name for path in tmp_path.iterdir()} - {"train.lock"})
        views.append(ten_views)
        return results[len(averages) - 1]

    monkeypatch.setattr(train, "evaluate", evaluate)
    run_train(few, tmp_path, "--epochs", "3")
    assert same(torch.load(tmp_path / "AlexNet.pth"), averages[1])
    assert same(averages[3], averages[1]) and same(averages[4], averages[1])
    assert views == [False] * 4 + [True]
    first = FILES - {"run.json", "kernels.png"}
    assert written == [set(), first, first, first, first]
    assert len(torch.load(tmp_path / "last.pt")["history"]) == len(history_of(tmp_path)) == 3


def test_overwriting_keeps_a_run_until_an_epoch_is_whole(two, few, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(two, tmp_path / "run")
    evaluate = train.evaluate
    for epochs, says in ((0, "no epoch of this run is saved yet"), (1, "goes on after epoch 1")):
        results = [(0.5, 0.5)] * epochs + [KeyboardInterrupt]
        monkeypatch.setattr(train, "evaluate", Mock(side_effect=results))
        with pytest.raises(SystemExit) as caught:
            run_train(few, output, "--overwrite", "--seed", "1")
        printed = capsys.readouterr().err
        assert caught.value.code == 130 and printed.endswith(f"{says}\n")
        assert ("--resume" in printed) == bool(epochs)
        assert (contents(output) == contents(two)) == (not epochs)
    names = {path.name for path in output.iterdir()}
    assert names == FILES - {"run.json", "kernels.png"}  # which were the earlier run's
    monkeypatch.setattr(train, "evaluate", evaluate)
    run_train(few, output, "--overwrite", "--epochs", "1", "--seed", "1")
    assert {path.name for path in output.iterdir()} == FILES and len(history_of(output)) == 1
    assert (output / "AlexNet.pth").read_bytes() != (two / "AlexNet.pth").read_bytes()


def test_stopping_while_curves_are_drawn_names_the_epoch_saved(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Figure, "savefig", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as caught:
        run_train(few, tmp_path)
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith("--resume goes on after epoch 1\n")


def test_a_kill_while_overwriting_mixes_no_two_runs(two, few, tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def kill(partial: Path, path: Path) -> None:
        replace(partial, path)
        raise Kill

    output, replace = shutil.copytree(two, tmp_path / "run"), alexnet.replace_file
    monkeypatch.setattr(alexnet, "replace_file", kill)  # once the new weights are there
    with pytest.raises(Kill):
        run_train(few, output, "--overwrite", "--seed", "1")
    assert (output / "AlexNet.pth").read_bytes() != (two / "AlexNet.pth").read_bytes()
    assert not {"last.pt", "class_idx.json"} & {path.name for path in output.iterdir()}


@pytest.mark.parametrize("epochs", ["2", "3"])
def test_lost_names_of_the_classes_are_written_anew(two, few, tmp_path, monkeypatch, epochs):
    output = shutil.copytree(two, tmp_path / "run")
    (output / "class_idx.json").unlink()
    losses = iter([0.5, 0.9])  # of AlexNet.pth, and of a third epoch, which is worse
    monkeypatch.setattr(train, "evaluate", lambda *argv, **options: (next(losses, 0.5), 0.5))
    run_train(few, output, "--resume", "--epochs", epochs)
    for name in ("class_idx.json", "AlexNet.pth"):
        assert (output / name).read_bytes() == (two / name).read_bytes()


@POSIX
def test_overwriting_keeps_a_run_where_nobody_reads_the_output(two, few, tmp_path, monkeypatch):
    output = shutil.copytree(two, tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)  # as `| true` does
    with open(writer, "w") as stdout, pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(sys, "stdout", stdout)
        run_train(few, output, "--overwrite", "--seed", "1")
    assert caught.value.code == 1 and contents(output) == contents(two)


def test_ctrl_c_in_an_epoch_keeps_the_best_weights_and_changes_no_result(
    few, tmp_path, monkeypatch, growing
):
    three = run_train(few, tmp_path / "three", "--epochs", "3")
    unbroken = run_train(few, tmp_path / "unbroken", "--epochs", "4")
    monkeypatch.setattr(train, "SAVE_PAUSE", 1e9)  # last.pt is written after the first epoch
    broken, step, calls = tmp_path / "broken", train.train_one_batch, []

    def stop_in_the_fourth_epoch(run: train.Run, batch: Tensor) -> Tensor:
        calls.append(batch)
        if len(calls) == 8:  # the second batch
            raise KeyboardInterrupt
        return step(run, batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_one_batch", stop_in_the_fourth_epoch)
        run_train(few, broken, "--epochs", "4")
    assert len(history_of(broken)) == 1
    best = [alexnet.load_tensors(folder / "AlexNet.pth") for folder in (broken, three)]
    assert same(*best)  # though epochs 2 and 3 are in no last.pt
    run_train(few, broken, "--resume")
    assert history_of(broken) == history_of(unbroken)
    for name in ("AlexNet.pth", "last.pt"):
        assert same(*(alexnet.load_tensors(x / name) for x in (broken, unbroken))), name


def test_the_number_of_epochs_is_kept_and_can_be_raised(two, few, tmp_path, capsys):
    output = shutil.copytree(two, tmp_path / "run")
    run_train(few, output, "--resume")
    assert (
        "ended, after epoch 2: all its epochs are done; --resume with more"
        in capsys.readouterr().out
    )
    assert contents(output) == contents(two)
    run_train(few, output, "--resume", "--epochs", "4")
    assert len(history_of(output)) == 4
    assert alexnet.load_tensors(output / "last.pt")["options"]["epochs"] == 4
    for name in ("run.json", "kernels.png"):
        (output / name).unlink()  # as after a kill at the end of the last epoch
    run_train(few, output, "--resume")
    assert {path.name for path in output.iterdir()} == FILES and len(history_of(output)) == 4


def test_a_full_memory_while_resuming_is_no_reason_to_overwrite(two, few, tmp_path, monkeypatch):
    output = shutil.copytree(two, tmp_path / "run")
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", full)
    message = refusal(few, output, "--resume", "--epochs", "3")
    assert message.startswith("error: out of memory;") and "--overwrite" not in message
    assert contents(output) == contents(two)


def test_a_momentum_of_another_layout_is_the_same(two, few, tmp_path):
    outputs = [shutil.copytree(two, tmp_path / name) for name in ("here", "from a Mac")]
    last = alexnet.load_tensors(outputs[1] / "last.pt")
    for state in last["optimizer"]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    last["optimizer"]["param_groups"][0]["fused"] = False
    torch.save(last, outputs[1] / "last.pt")
    for output in outputs:
        run_train(few, output, "--resume", "--epochs", "3")
    first, second = (alexnet.load_tensors(output / "last.pt") for output in outputs)
    assert same(first["net"], second["net"])
    assert second["optimizer"]["param_groups"][0]["fused"]


def test_photos_added_to_val_are_another_scale(two, few, tmp_path):
    data = copy_of(few, tmp_path / "data")
    shutil.copyfile(data / "train/a/00.jpg", data / "val/a/new.jpg")
    assert "other photos to train or val" in refusal(data, two, "--resume", "--epochs", "3")


def test_the_order_of_photos_and_their_crops_are_drawn_from_two_streams(few, tmp_path, monkeypatch):
    orders, draws = [], []

    def record(run: train.Run, batch: Tensor) -> Tensor:
        orders.append(batch)
        draws.append(torch.empty(6).exponential_())  # from which multinomial makes an order
        return torch.zeros(2)

    monkeypatch.setattr(train, "train_one_batch", record)
    for rank in (0, 1):  # whose order is the same, and whose draws are not
        monkeypatch.setattr(train, "get_rank", lambda rank=rank: rank)
        for epoch in (1, 2, 3):
            train.train_one_epoch(new_run(few, tmp_path, "--batch-size", "6"), epoch)
    ours = [(1 / draw).argsort(descending=True).tolist() for draw in draws]
    assert all(order.tolist() != mine for order, mine in zip(orders, ours, strict=True))
    assert same(orders[:3], orders[3:]) and not same(draws[0], draws[3])


def test_a_full_disk_is_one_line_and_leaves_whole_files(two, few, tmp_path, monkeypatch):
    output, data = shutil.copytree(two, tmp_path / "run"), copy_of(few, tmp_path / "data")
    half, names = (output / "last.pt").stat().st_size // 2, output / "class_idx.json"
    monkeypatch.setattr(train, "train_one_epoch", lambda run, epoch: (1.0, 0.5))
    for photos, size in ((data, 10**6), (few, 10**4), (few, 10**6), (few, half)):
        results = [(1.0, 0.5), (0.5, 1.0)]  # of AlexNet.pth, and of a better epoch
        monkeypatch.setattr(train, "evaluate", Mock(side_effect=results))
        names.write_text("{}")  # as of other weights; new names wait for theirs
        with full_disk(size):
            assert "too large" in refusal(photos, output, "--resume", "--epochs", "3")
        assert (names.read_text() == "{}") == (size < half)
    assert (output / "last.pt").read_bytes() == (two / "last.pt").read_bytes()
    assert len(alexnet.load_network(output / "AlexNet.pth").classifier[6].bias) == 2
    assert {path.name for path in output.iterdir()} == FILES and not [*data.glob("*.npy*")]


def test_a_full_disk_while_overwriting_leaves_the_earlier_run(two, few, tmp_path):
    output = shutil.copytree(two, tmp_path / "run")
    with full_disk(10**6):
        assert "too large" in refusal(few, output, "--overwrite", "--seed", "1")
    assert contents(output) == contents(two)


def test_curves_mark_the_best_epoch_and_the_largest_class():
    names = ("epoch", "val_accuracy", "val_loss", "train_accuracy", "train_loss")
    columns = (range(1, 5), [0.2, 0.5, 0.7, 0.9], [3, 5, 1, 4], [0.4] * 4, [6] * 4)
    history = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    figure = train.draw_curves(history, 0.245)
    for axis, name in zip(figure.axes, ("loss", "accuracy"), strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for side in ("train", "val"):
            assert lines[side] == [[row["epoch"], row[f"{side}_{name}"]] for row in history]
        assert lines["best on val: epoch 3, accuracy 0.700"] == [[3, history[2][f"val_{name}"]]]
    assert {y for _, y in lines["baseline (largest class): 0.245"]} == {0.245}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*lines}


def test_kernels_stand_16_a_row_on_one_scale(two):
    weight = alexnet.load_tensors(two / "AlexNet.pth")["features.1.weight"]
    scaled = (weight - weight.min()) / (weight.max() - weight.min()) * 255
    picture = torch.from_numpy(np.array(Image.open(two / "kernels.png"))).permute(2, 0, 1)
    assert picture.shape == (3, 5 + 60 * 6, 5 + 60 * 16)
    for number, kernel in enumerate(scaled):
        y, x = 5 + 60 * (number // 16), 5 + 60 * (number % 16)
        shown = picture[:, y : y + 55 : 5, x : x + 55 : 5]
        torch.testing.assert_close(shown.float(), kernel, rtol=0, atol=0.51)
        assert (picture[:, y - 5 : y, x : x + 55] == 255).all()  # white above each


@pytest.mark.parametrize("left", [["AlexNet.pth"], ["AlexNet.pth", "last.pt"]])
def test_a_fresh_run_does_not_replace_an_earlier_one(few, tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    message = refusal(few, tmp_path)
    assert all(text in message for text in (str(tmp_path / left[-1]), "--overwrite", "--output"))
    assert ("--resume" in message) == ("last.pt" in left)
    assert contents(tmp_path) == dict.fromkeys(left, b"")


def test_resuming_what_does_not_fit(two, few, tmp_path):
    last = tmp_path / "last.pt"
    assert f"there is no {last}" in refusal(few, tmp_path, "--resume")
    whole = contents(two)
    for content in (whole["last.pt"][: 10**6], b"text", whole["AlexNet.pth"]):
        last.write_bytes(content)
        assert str(last) in refusal(few, tmp_path, "--resume")
        assert contents(tmp_path) == {"last.pt": content}
    assert "--groups 2" in refusal(few, two, "--resume", "--groups", "1")
    assert "--recipe default" in refusal(few, two, "--resume", "--recipe", "paper")
    older = alexnet.load_tensors(two / "last.pt") | {"version": 1}
    (tmp_path / "older").mkdir()
    torch.save(older, tmp_path / "older" / "last.pt")
    assert "is of another version of train.py" in refusal(few, tmp_path / "older", "--resume")
    fewer, other = copy_of(few, tmp_path / "fewer"), copy_of(few, tmp_path / "other")
    (fewer / "train/a/00.jpg").unlink()
    for side in ("train", "val"):
        (other / side / "b").rename(other / side / "c")
    for data in (fewer, other):
        assert "other photos" in refusal(data, two, "--resume")
    assert contents(two) == whole


def test_a_loss_that_is_no_number_and_a_full_memory_name_options(few, tmp_path, monkeypatch):
    message = refusal(few, tmp_path / "run", "--lr", "1e9", "--batch-size", "2")
    assert "--lr" in message and "epoch 1" in message and not [*(tmp_path / "run").iterdir()]
    monkeypatch.setattr(train, "train_one_batch", Mock(side_effect=MemoryError()))
    assert "--accumulate 32 " in refusal(few, tmp_path, "--accumulate", "8")


def test_options_out_of_range(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = "epochs 0, accumulate 0, batch-size x, seed -1, lr -1, lr nan, momentum 2, groups 3, "
    wrong += "ema 1.1, patience -1, precision half, recipe thesis, recipe napkin"
    for option, value in (words.split() for words in wrong.split(", ")):
        with pytest.raises(SystemExit) as caught:
            train.main([f"--{option}", value])
        last = capsys.readouterr().err.splitlines()[-1]  # below the usage, which has all options
        assert caught.value.code == 2 and f"--{option}" in last


def test_the_precision_is_half_where_the_cpu_has_it(monkeypatch):
    if hasattr(torch.cpu, "get_capabilities"):
        for name, expected in (("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
            able = {"amx_bf16": False, name: True}  # as the processor tells it
            monkeypatch.setattr(torch._C._cpu, "_get_cpu_capability", lambda able=able: able)
            torch.cpu.get_capabilities.cache_clear()
            assert alexnet.pick_precision("auto", CPU) == expected
            assert alexnet.pick_precision("float32", CPU) == torch.float32
            with monkeypatch.context() as build:  # one for Macs
                build.setattr(torch._C, "_has_mkldnn", False)
                assert alexnet.pick_precision("auto", CPU) == torch.float32
        torch.cpu.get_capabilities.cache_clear()
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert alexnet.pick_precision("auto", CPU) == torch.float32  # this torch cannot tell
