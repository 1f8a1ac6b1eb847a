"""alexnet.py: the network against the paper and stock PyTorch, pictures against torchvision."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from benchmark import stock_alexnet
from conftest import full_disk, link
from draw_flowers import draw_flower
from PIL import Image, PngImagePlugin, features
from torch import Tensor, nn

import alexnet
from alexnet import AlexNet, InputError, LocalResponseNorm, read_image


@pytest.mark.parametrize("groups, parameters", [(2, 60_965_224), (1, 62_378_344)])
def test_the_table_of_layers_counts_parameters_and_products(capsys, groups, parameters):
    assert alexnet.main(["--groups", str(groups)]) == 0
    _, *rows, total = (line.split() for line in capsys.readouterr().out.splitlines())
    assert rows[2][:7] == ["96", "x", "55", "x", "55", "0", "0"]
    # Section 3.5: the values of each layer, and what each of them sees.
    sees = [11 * 11 * 3, 5 * 5 * 96 // groups, 9 * 256, 9 * 384 // groups, 9 * 384 // groups]
    values = [55 * 55 * 96, 27 * 27 * 256, 13 * 13 * 384, 13 * 13 * 384, 13 * 13 * 256]
    products = [n * k for n, k in zip(values, sees, strict=True)]
    products += [256 * 6 * 6 * 4096, 4096 * 4096, 4096 * 1000]
    assert total[:2] == [f"{parameters:,}", f"{sum(products):,}"]
    with pytest.raises(SystemExit):
        alexnet.main(["--classes", "0"])


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_and_gradients_equal_those_of_stock_pytorch(groups):
    torch.manual_seed(0)
    net, stock = AlexNet(7, groups), stock_alexnet(7, groups)
    net.initialize("default")
    net.mean.copy_(torch.tensor([0.4, 0.5, 0.6])[:, None, None])
    net.std.fill_(0.2)
    stock[0].load_state_dict(net.features.state_dict())
    stock[2].load_state_dict(net.classifier.state_dict())
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([3, 5])
    padded = images.new_zeros(2, 3, 227, 227)  # the paper's 224 is 227 with zeros on the far edges
    padded[:, :, :224, :224] = (images - net.mean) / 0.2
    torch.manual_seed(1)
    ours = net(images)
    torch.manual_seed(1)  # for the same dropout
    theirs = stock(padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    nn.functional.cross_entropy(ours, labels).backward()
    nn.functional.cross_entropy(theirs, labels).backward()
    for (name, parameter), other in zip(net.named_parameters(), stock.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() < 1e-4 * scale, name
    hidden = stock.eval()[2][:-1](stock[:2](padded))
    torch.testing.assert_close(net.eval().hidden(images), hidden, rtol=1e-4, atol=1e-4)


def test_weights_start_by_he_s_rule_or_as_in_the_paper():
    net = AlexNet(1000)
    net.initialize("default")
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    inputs = (48 * 25, 256 * 9, 192 * 9, 192 * 9, 9216, 4096, 4096)  # of a unit, from conv2 on
    he = [0.01, *((2 / n) ** 0.5 for n in inputs)]
    assert [x.weight.std().item() for x in layers] == pytest.approx(he, rel=0.02)
    assert not any(x.bias.any() for x in layers)
    net.initialize("paper")
    paper = [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]
    assert [x.weight.std().item() for x in layers] == pytest.approx(paper, rel=0.02)
    assert [x.bias.unique().tolist() for x in layers] == [[b] for b in (0, 1, 0, 1, 1, 1, 1, 0)]
    assert (1 / net.std).flatten().tolist() == pytest.approx([255] * 3)


stock_norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def value_and_gradient(norm: Callable, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), *torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n, channels", [(5, 96), (4, 256), (9, 7), (1, 1), (2, 3), (0, 7)])
def test_local_response_norm_equals_stock_in_value_and_gradient(n, channels, training, layout):
    torch.manual_seed(0)
    x = (100 * torch.randn(n, channels, 5, 6)).to(memory_format=layout)
    grad = torch.randn(n, channels, 5, 6)
    ours = value_and_gradient(LocalResponseNorm().train(training), x, grad)
    torch.testing.assert_close(ours, value_and_gradient(stock_norm, x, grad), rtol=1e-5, atol=1e-5)
    assert ours[0].is_contiguous(memory_format=layout) or not n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("largest", [3, 300, 3000])
@pytest.mark.parametrize("training", [True, False])
def test_large_activations_in_half_precision_are_normalised_as_in_float32(dtype, largest, training):
    torch.manual_seed(0)
    x = (largest * torch.empty(5, 96, 4, 4).uniform_(-1, 1)).to(dtype)
    x[0, :, 0, 0] = largest
    grad = torch.randn(x.shape).to(dtype)
    ours = value_and_gradient(LocalResponseNorm().train(training), x, grad)
    theirs = value_and_gradient(stock_norm, x.float(), grad.float())
    for half, exact in zip(ours, theirs, strict=True):
        error = (half.float() - exact).abs().max() / exact.abs().max()
        assert half.dtype == dtype and error < 4 * torch.finfo(dtype).eps


def test_local_response_norm_passes_gradcheck_and_ignores_autocast():
    torch.manual_seed(0)
    x = 100 * torch.randn(5, 6, 1, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(LocalResponseNorm(), x.requires_grad_())
    norm, x, grad = LocalResponseNorm(), *(100 * torch.randn(2, 2, 7, 3, 3))
    plain = value_and_gradient(norm, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, value_and_gradient(norm, x, grad)))


def test_the_network_can_be_traced_and_exported_for_any_batch(tmp_path):
    torch.manual_seed(0)
    net, images = AlexNet(3).eval(), torch.rand(3, 3, 224, 224)
    torch.jit.save(torch.jit.trace(net, images[:2]), tmp_path / "x.pt")
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(net, (images[:2],), dynamic_shapes=batch).module()
    for taken in (torch.jit.load(tmp_path / "x.pt"), exported):
        for n in (1, 2, 3):
            torch.testing.assert_close(taken(images[:n]), net(images[:n]), rtol=1e-4, atol=1e-5)


def test_probabilities_are_the_mean_of_the_softmax_of_torchvision_s_views():
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 3))
    pixels = torch.randint(256, (70, 256, 256, 3), dtype=torch.uint8)
    pixels[:, 20:90, 40:100] = 0  # no view is like another
    images = TF.to_dtype(pixels.permute(0, 3, 1, 2), torch.float32, scale=True)
    torch.testing.assert_close(alexnet.to_float(pixels), images)
    center = alexnet.predict_probabilities(net, images, ten_views=False)
    ten = alexnet.predict_probabilities(net, images[:7], ten_views=True)
    with torch.inference_mode():
        torch.testing.assert_close(center, net(TF.center_crop(images, 224)).softmax(1))
        each = [net(view).softmax(1) for view in TF.ten_crop(images[:7], 224)]
    torch.testing.assert_close(ten, sum(each) / 10, rtol=1e-5, atol=0)


def reread(folder: Path, image: Image.Image, name: str = "x.png", **options) -> Image.Image:
    image.save(folder / name, **options)
    return read_image(folder / name)


def test_transparency_becomes_white_and_colours_stay(tmp_path):
    image = Image.new("RGBA", (4, 2), (200, 40, 10, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for changed in (image, image.convert("LA"), image.quantize()):
        assert reread(tmp_path, changed).getpixel((0, 0)) == (255, 255, 255)
    assert reread(tmp_path, image).getpixel((1, 0)) == (127, 127, 127)
    plain = Image.new("RGB", (16, 16), (200, 40, 10))
    assert reread(tmp_path, plain, transparency=(200, 40, 10)).getpixel((3, 1))[2] == 255
    for changed in (image, plain, plain.quantize(4)):
        assert reread(tmp_path, changed).getpixel((3, 1)) == (200, 40, 10)
    cmyk = reread(tmp_path, plain.convert("CMYK"), "x.jpg", quality=100)
    assert np.abs(np.subtract(cmyk.getpixel((3, 1)), (200, 40, 10))).max() <= 3


@pytest.mark.parametrize(
    "kind, low, high", [("uint16", 0, 4095), ("int32", -1000, 3000), ("float32", -0.5, 2.0)]
)
def test_grey_of_more_than_8_bits_spans_its_own_range_and_says_so(tmp_path, kind, low, high):
    shades = Image.fromarray(np.linspace(low, high, 256).astype(kind)[None])
    flat = Image.fromarray(np.full((2, 2), high, kind))
    for name in ("x.tiff", "x.png", "x.pgm")[: 3 if kind == "uint16" else 1]:
        with pytest.warns(UserWarning, match="from darkest to brightest"):
            seen = np.asarray(reread(tmp_path, shades, name))[0].astype(int)
            assert reread(tmp_path, flat, name).getpixel((0, 0)) == (0, 0, 0)
        assert np.abs(seen - np.arange(256)[:, None]).max() <= 1
    if kind == "float32":
        with pytest.raises(InputError, match="no numbers"):
            reread(tmp_path, Image.fromarray(np.full((2, 2), np.nan, kind)), "x.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path, orientation):
    corners = Image.new("RGB", (30, 20), "black")
    corners.paste("red", (0, 0, 10, 10))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that hides the corner
    stored = corners.transpose(undo[orientation]) if orientation > 1 else corners
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(reread(tmp_path, stored, exif=exif), corners)
    assert np.array_equal(reread(tmp_path, stored, exif=b"Exif\0\0II*\0\xff"), stored)  # broken


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path, monkeypatch):
    draw_flower("daisy", random.Random(0)).save(tmp_path / "bomb.jpg")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would run a program
    files = {"text.jpg": b"hello", "empty.png": b"", "eps.jpg": postscript}
    files["cut.jpg"] = (tmp_path / "bomb.jpg").read_bytes()[:2000]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    link(tmp_path / "loop.jpg", "loop.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")  # to open it would block
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path in (*tmp_path.iterdir(), tmp_path / "missing.jpg"):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: [^\n]+$") as caught:
            read_image(path)
        assert ("too large" in str(caught.value)) == (path.name in ("bomb.jpg", "cut.jpg"))


def test_an_alpha_channel_of_zeros_alone_means_nothing(tmp_path):
    image = Image.new("RGBA", (20, 10), (200, 40, 10, 0))
    assert reread(tmp_path, image).getpixel((3, 1)) == (200, 40, 10)
    image.putpixel((0, 0), (0, 0, 0, 1))
    assert reread(tmp_path, image).getpixel((3, 1)) == (255, 255, 255)


def test_a_png_may_hold_megabytes_of_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", " " * 2_000_000, zip=True)
    assert reread(tmp_path, Image.new("RGB", (20, 10), "red"), pnginfo=info).size == (20, 10)


def test_ctrl_c_does_not_wait_for_the_photos_that_are_left(tmp_path, monkeypatch):
    def read(path: Path) -> np.ndarray:
        started.append(path)
        if len(started) > 1:
            time.sleep(0.2)
        return np.zeros(1)

    started: list[Path] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(alexnet, "read_square", read)
    photos = alexnet.read_squares([tmp_path] * 200, "reading")
    with pytest.raises(KeyboardInterrupt):
        for _ in photos:
            raise KeyboardInterrupt
    photos.close()
    assert len(started) < 100


@pytest.mark.parametrize(
    "suffixes", "jpeg jpg, png, webp, avif, tiff tif, bmp, gif, ppm".split(", ")
)
def test_the_formats_of_the_readme_are_found_and_told_by_their_content(tmp_path, suffixes):
    kind = suffixes.split()[0].upper()
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow cannot write it")
    names = [f"x.{suffix}" for suffix in (*suffixes.split(), "wrong.jpg")]
    for name in names:
        Image.new("RGB", (20, 10), (200, 30, 40)).save(tmp_path / name, format=kind)
    found = alexnet.image_files(tmp_path)
    assert [path.name for path in found] == sorted(names)
    for path in found:
        assert np.allclose(alexnet.read_square(path, 8), (200, 30, 40), atol=5)


def test_the_central_square_is_what_cropping_and_resizing_give(tmp_path):
    bicubic, rng, path = TF.InterpolationMode.BICUBIC, random.Random(0), tmp_path / "x.png"
    for width, height in ((640, 480), (300, 512), (256, 256), (101, 33), (640, 427)):
        image = draw_flower("sunflowers", rng, width, height)
        image.save(path)
        stock = TF.resize(TF.center_crop(image, min(width, height)), [256, 256], bicubic)
        difference = np.abs(alexnet.read_square(path) - np.asarray(stock, dtype=float)).mean()
        # Where an odd number of pixels is cut off, torchvision's square lies half a pixel aside.
        assert difference < (2 if (width - height) % 2 else 0.1)
    Image.new("RGB", (1, 5000), "blue").save(path)
    assert np.array_equal(alexnet.read_square(path, 32), np.full((32, 32, 3), (0, 0, 255)))


def test_pictures_are_found_in_sorted_order_behind_links_too_and_hidden_ones_are_not(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["b/2.jpg", "b/1.JFIF", "a/x.txt", "a/.h.jpg", ".git/3.jpg", "0.avif", "a/deep/4.gif"]
    for name in (*names, "../elsewhere/5.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, target in (("c", "../elsewhere"), ("a/top", ".."), ("b/self", "."), ("x", "none")):
        link(folder / name, target)
    found = [path.relative_to(folder).as_posix() for path in alexnet.image_files(folder)]
    assert found == ["0.avif", "a/deep/4.gif", "b/1.JFIF", "b/2.jpg", "c/5.jpg"]
    link(folder / "a" / "b", "../b")  # two folders that hold links to each other
    link(folder / "b" / "a", "../a")
    assert len(alexnet.image_files(folder)) < 12


def thin_state(**changes: object) -> dict[str, object]:
    """The tensors of an AlexNet of 3 classes, each of one number in a file."""
    with torch.device("meta"):
        state = AlexNet(3).state_dict()
    state = {name: torch.zeros(()).expand(x.shape) for name, x in state.items()}
    return state | {name.replace("__", "."): x for name, x in changes.items()}


def test_weights_come_back_from_a_file(tmp_path):
    net, images, path = AlexNet(3, groups=1).eval(), torch.rand(1, 3, 224, 224), tmp_path / "x.pth"
    net.mean.fill_(0.3)
    torch.save(net.state_dict(), path)
    again = alexnet.load_network(path)
    assert not again.training and torch.equal(again(images), net(images))
    torch.save(thin_state(std=torch.ones(3, 1, 1).half()), tmp_path / "half.pth")
    assert alexnet.load_network(tmp_path / "half.pth").std.dtype == torch.float32


@pytest.mark.parametrize(
    "content",
    [
        *([1, 2], {}, thin_state(surplus=torch.zeros(1)), dict([*thin_state().items()][1:])),
        *(thin_state(classifier__6__weight=x) for x in ("weights", torch.zeros(3, 7))),
        *(thin_state(features__5__weight=torch.zeros(n)) for n in ((), (256, 0), (256, 99))),
        thin_state(classifier__6__weight=torch.zeros(3, 4096).int()),
    ],
)
def test_what_is_no_state_dict_of_this_network_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"^[^\n]*x\.pth [^\n]+$"):
        alexnet.load_network(tmp_path / "x.pth")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_cut_foreign_and_hostile_weights_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("x.pth")
    torch.save(thin_state(), path)
    whole = path.read_bytes()
    torch.save(thin_state(std=Bomb()), path)
    for content in (path.read_bytes(), b"", whole[:900], whole[99:], b"\x80\2text", whole[:-99]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pth is cut short, or no file of train\.py"):
            alexnet.load_network(path)
    with pytest.raises(InputError, match=r"there is no missing\.pth"):
        alexnet.load_network(Path("missing.pth"))
    assert os.listdir() == ["x.pth"]


def test_a_full_memory_is_not_taken_for_a_broken_file(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"")
    for read, module, name in ((read_image, Image, "open"), (alexnet.load_tensors, torch, "load")):
        monkeypatch.setattr(module, name, Mock(side_effect=MemoryError()))
        with pytest.raises(MemoryError):
            read(tmp_path / "x")


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "meta", "hpu", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name}: .*--device cpu works"):
        alexnet.pick_device(name)


@pytest.mark.parametrize("write", [torch.save, lambda x, file: file.write(x.numpy().tobytes())])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, write):
    path = tmp_path / "[a].pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), alexnet.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with full_disk(10**6), pytest.raises(OSError) as caught, alexnet.replacing(path) as file:
        write(torch.zeros(10**6), file)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    with alexnet.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]
    assert path.name in str(caught.value)
    try:
        raise KeyboardInterrupt("goes on")  # which the error that follows does not have as cause
    except KeyboardInterrupt:
        with pytest.raises(OSError, match=r"x.pt cannot be written: .*No such file"):
            alexnet.replacing(tmp_path / "missing" / "x.pt").__enter__()


def test_out_of_memory_while_writing_is_not_called_a_disk_s_fault(tmp_path):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(torch.OutOfMemoryError), alexnet.replacing(tmp_path / "a.pt"):
        raise full
    assert not os.listdir(tmp_path)


def test_a_file_that_another_program_holds_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "in use")] * 3
    monkeypatch.setattr(time, "sleep", lambda seconds: refusals.pop())

    def busy(source: Path, target: Path) -> None:
        if refusals:
            raise refusals[-1]
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with alexnet.replacing(tmp_path / "a.pt") as file:
        file.write(b"new")
    assert (tmp_path / "a.pt").read_bytes() == b"new"
    refusals += [PermissionError(13, "in use")] * 99
    with pytest.raises(OSError, match=r"a\.pt cannot be written: .*in use"):
        with alexnet.replacing(tmp_path / "a.pt") as file:
            file.write(b"newer")
    assert (tmp_path / "a.pt").read_bytes() == b"new" and len(os.listdir(tmp_path)) == 1


def test_what_killed_programs_left_is_removed_when_it_is_a_day_old(tmp_path):
    dead = ["a.pt.unfinished-0123abcd", "a.pt.unfinished-ffffffff"]
    kept = ["a.pt", "a.pt.20240101.tmp", "a.pt.unfinished-0123abc", "b.pt.unfinished-0123abcd"]
    (tmp_path / dead[1]).mkdir()
    for name in (dead[0], f"{dead[1]}/photo.jpg", *kept, "young.unfinished-01234567"):
        (tmp_path / name).write_bytes(b"")
    for name in (*dead, *kept):
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    with alexnet.replacing(tmp_path / "a.pt"), alexnet.replacing(tmp_path / "young"):
        pass
    assert sorted(os.listdir(tmp_path)) == [*kept, "young", "young.unfinished-01234567"]


@pytest.mark.parametrize(
    "error, message",
    [
        (InputError("no such\nphoto"), "error: no such photo"),
        (OSError(28, "No space left", "a.pt"), "error: [Errno 28] No space left: 'a.pt'"),
        (MemoryError(), "error: out of memory; do less"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: out of memory; do less"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "error: out of memory; do less"),
        (RuntimeError("not enough memory: you tried"), "error: out of memory; do less"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error, message):
    with pytest.raises(SystemExit) as caught, alexnet.one_line_errors("do less"):
        raise error
    assert caught.value.code == message


def test_a_real_lack_of_memory_is_one_line_and_a_mistake_in_the_code_is_none():
    with pytest.raises(SystemExit, match="out of memory"), alexnet.one_line_errors():
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="must match"), alexnet.one_line_errors():
        torch.ones(2) + torch.ones(3)
