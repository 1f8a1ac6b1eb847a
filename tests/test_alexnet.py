"""alexnet.py: the network against the paper and stock PyTorch, pictures against torchvision."""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from benchmark import stock_alexnet
from draw_flowers import draw_flower
from PIL import Image
from torch import nn

import alexnet
from alexnet import AlexNet, InputError, LocalResponseNorm, center_square, read_image

# ------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "num_classes, groups, parameters, multiply_adds",
    [
        (1000, 2, "60,965,224", "724,406,816"),
        (1000, 1, "62,378,344", "1,135,256,096"),
        (5, 2, "56,888,709", "720,331,296"),
        (5, 1, "58,301,829", "1,131,180,576"),
    ],
)
def test_the_layer_table(capsys, num_classes, groups, parameters, multiply_adds):
    assert alexnet.main(["--num-classes", str(num_classes), "--groups", str(groups)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["total", parameters, multiply_adds]
    convolutions = [re.search(r"\d+ x \d+ x \d+", x)[0] for x in lines if x.startswith("Conv2d")]
    expected = ["96 x 55 x 55", "256 x 27 x 27", *["384 x 13 x 13"] * 2, "256 x 13 x 13"]
    assert convolutions == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_and_gradients_equal_those_of_stock_pytorch(groups):
    torch.manual_seed(0)
    net = AlexNet(7, groups, dropout=0.0)
    net.mean.copy_(torch.tensor([0.4, 0.5, 0.6])[:, None, None])
    net.std.fill_(0.2)
    stock = stock_alexnet(7, groups, dropout=0.0)
    stock[0].load_state_dict(net.features.state_dict())
    stock[2].load_state_dict(net.classifier.state_dict())
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([3, 5])
    padded = torch.zeros(2, 3, 227, 227)  # the paper's 224 is 227 with zeros on the far edges
    padded[:, :, :224, :224] = (images - net.mean) / 0.2
    ours, theirs = net(images), stock(padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    nn.functional.cross_entropy(ours, labels).backward()
    nn.functional.cross_entropy(theirs, labels).backward()
    for (name, parameter), other in zip(net.named_parameters(), stock.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() < 1e-4 * scale, name


def test_dropout_acts_on_the_outputs_of_the_two_hidden_linear_layers():
    torch.manual_seed(0)
    net = AlexNet(3)
    inputs = []
    for index in (3, 6):  # the linear layers behind the two hidden ones
        net.classifier[index].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    images = torch.rand(2, 3, 224, 224)
    net(images)
    net.eval()(images)
    zeros = [(x == 0).float().mean().item() for x in inputs]
    assert all(
        train > evaluation + 0.15 for train, evaluation in zip(zeros[:2], zeros[2:], strict=False)
    )


@pytest.mark.parametrize(
    "size, beta, k", [(5, 0.75, 2.0), (3, 0.75, 1.0), (4, 0.5, 1.0), (9, 1, 2)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_local_response_norm_equals_stock_in_value_and_gradient(size, beta, k, layout):
    torch.manual_seed(0)
    for channels in (1, 3, 7, 96):
        x = (3 * torch.randn(2, channels, 5, 6)).to(memory_format=layout).requires_grad_()
        grad = torch.randn(2, channels, 5, 6)
        results = []
        for norm in (LocalResponseNorm, nn.LocalResponseNorm):
            y = norm(size, alpha=0.3, beta=beta, k=k)(x)
            (gradient,) = torch.autograd.grad(y, x, grad)
            results.append((y, gradient))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_local_response_norm_passes_gradcheck(size):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(size, alpha=0.5, beta=0.75, k=1.5), x)
    assert torch.autograd.gradcheck(LocalResponseNorm(size, alpha=0.5, beta=0.6, k=1.5), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_local_response_norm_in_half_precision_is_float32_rounded_once(dtype, layout):
    torch.manual_seed(0)
    x = (30 * torch.randn(2, 96, 5, 5)).to(dtype).to(memory_format=layout).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    norm = LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
    y, exact = norm(x), norm(exact_x)
    grad = torch.randn(y.shape).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, grad)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, grad.float())
    assert y.dtype == gradient.dtype == dtype
    assert y.stride() == gradient.stride() == x.stride()
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=0, atol=0)


def test_local_response_norm_is_the_formula_of_the_paper():
    a = torch.tensor([10.0, -20, 30, 0, 50, 60, -70]).reshape(1, 7, 1, 1)
    b = LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(a).flatten().tolist()
    for i in range(7):
        total = sum(a[0, j].item() ** 2 for j in range(max(0, i - 2), min(6, i + 2) + 1))
        assert b[i] == pytest.approx(a[0, i].item() / (2 + 1e-4 * total) ** 0.75, rel=1e-5)


def test_the_weights_start_with_he_s_deviations_but_those_of_conv1_with_the_paper_s():
    layers = [x for x in AlexNet(1000).modules() if isinstance(x, nn.Conv2d | nn.Linear)]
    inputs = (None, 48 * 25, 256 * 9, 192 * 9, 192 * 9, 9216, 4096, 4096)  # of a unit
    expected = [0.01 if n is None else (2 / n) ** 0.5 for n in inputs]
    assert [x.weight.std().item() for x in layers] == pytest.approx(expected, rel=0.02)
    assert not any(x.bias.any() for x in layers)


def test_a_network_is_rebuilt_from_its_tensors_alone():
    net = AlexNet(3, groups=1).eval()
    net.mean.fill_(0.3)
    again = AlexNet.from_state_dict(net.state_dict()).eval()
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(again(images), net(images))
    assert all(p.requires_grad for p in again.parameters())


def test_what_is_no_state_dict_of_ours_is_refused():
    state = AlexNet(3).state_dict()
    last = "classifier.6.weight"
    for wrong in (
        {},
        {"classifier.6.weight": torch.zeros(3, 4096)},
        {name: tensor for name, tensor in state.items() if name != "std"},
        state | {"surplus": torch.zeros(1)},
        state | {last: state[last].half()},
        state | {last: torch.zeros(3, 7)},
        state | {last: "weights"},
        state | {"features.5.weight": torch.zeros(())},
        nn.Linear(2, 2).state_dict(),
    ):
        with pytest.raises(InputError, match=r"^[^\n]+$"):
            AlexNet.from_state_dict(wrong)


# ------------------------------------------------------------------------------- views


def test_the_ten_views_are_those_of_the_paper():
    images = torch.rand(2, 3, 256, 256)
    views = alexnet.ten_crop(images)
    stock = torch.stack(TF.ten_crop(images, 224), dim=1)  # corners and centre, then their mirrors
    assert views.shape == (2, 10, 3, 224, 224)
    for image in range(2):
        ours = {view.numpy().tobytes() for view in views[image]}
        assert ours == {view.numpy().tobytes() for view in stock[image].contiguous()}
    assert torch.equal(alexnet.center_crop(images)[:, 0], TF.center_crop(images, 224))


def test_probabilities_are_the_mean_of_the_softmax_of_the_views():
    torch.manual_seed(0)
    net = AlexNet(3).eval()
    images = torch.rand(2, 3, 256, 256)
    ours = alexnet.predict_probabilities(net, images, "ten-crop")
    with torch.inference_mode():
        each = [net(view).softmax(1) for view in alexnet.ten_crop(images).unbind(1)]
    torch.testing.assert_close(ours, sum(each) / 10)
    torch.testing.assert_close(ours.sum(1), torch.ones(2))


# ------------------------------------------------------------------------------- pictures


def saved(image: Image.Image, kind: str = "png", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_transparency_becomes_white():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for changed in (image, image.convert("LA"), image.quantize()):
        found = read_image(saved(changed))
        assert found.mode == "RGB" and found.getpixel((0, 0)) == (255, 255, 255)
    assert read_image(saved(image)).getpixel((1, 0)) == (127, 127, 127)
    assert read_image(saved(image)).getpixel((3, 1)) == (255, 0, 0)


def test_sixteen_bit_grey_keeps_its_shades():
    shades = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("png", "tiff"):
        found = read_image(saved(Image.fromarray(shades), kind))
        assert np.asarray(found)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_of_unknown_scale_are_refused():
    for value, kind in ((0.5, np.float32), (70_000, np.int32), (-5, np.int32)):
        with pytest.raises(InputError):
            read_image(saved(Image.fromarray(np.array([[value]], dtype=kind)), "tiff"))


def test_palette_grey_one_bit_and_cmyk_come_out_right():
    image = Image.new("RGB", (16, 16), (200, 40, 10))
    assert read_image(saved(image.quantize(4))).getpixel((3, 3)) == (200, 40, 10)
    assert read_image(saved(image.convert("L"))).getpixel((3, 3)) == (84, 84, 84)
    assert read_image(saved(Image.new("1", (2, 2), 1))).getpixel((1, 1)) == (255, 255, 255)
    cmyk = read_image(saved(image.convert("CMYK"), "jpeg", quality=100))
    assert np.abs(np.subtract(cmyk.getpixel((3, 3)), (200, 40, 10))).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(orientation):
    corners = Image.new("RGB", (30, 20), "black")
    corners.paste("red", (0, 0, 10, 10))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that hides the corner
    stored = corners.transpose(undo[orientation]) if orientation > 1 else corners
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(saved(stored, "png", exif=exif))
    assert np.array_equal(np.asarray(found), np.asarray(corners))


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path, monkeypatch):
    good = saved(draw_flower("daisy", random.Random(0)), "jpeg").getvalue()
    for name, data in (("text.jpg", b"hello"), ("empty.png", b""), ("cut.jpg", good[:2000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"^.*{name}: [^\n]+$"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(InputError):
        read_image(tmp_path)
    (tmp_path / "bomb.jpg").write_bytes(good)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb.jpg: [^\n]+$"):
        read_image(tmp_path / "bomb.jpg")


def test_the_central_square_is_what_resizing_and_cropping_give():
    rng = random.Random(0)
    for width, height in ((640, 427), (300, 512), (256, 256), (1023, 777)):
        image = draw_flower("sunflowers", rng, width, height)
        ours = np.asarray(center_square(image), dtype=float)
        bicubic = TF.InterpolationMode.BICUBIC
        stock = TF.center_crop(TF.resize(image, 256, interpolation=bicubic), 256)
        assert ours.shape == (256, 256, 3)
        assert np.abs(ours - np.asarray(stock, dtype=float)).mean() < 3  # half a pixel aside
    assert center_square(Image.new("RGB", (1, 5000), "blue")).getpixel((9, 9)) == (0, 0, 255)


# ------------------------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError), alexnet.replacing(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    with alexnet.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_pictures_are_found_in_sorted_order_and_hidden_ones_are_not(tmp_path):
    for name in (
        "b/2.jpg",
        "b/1.PNG",
        "a/x.txt",
        "a/.h.jpg",
        ".git/3.jpg",
        "0.webp",
        "a/deep/4.gif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in alexnet.image_files(tmp_path)]
    assert found == ["0.webp", "a/deep/4.gif", "b/1.PNG", "b/2.jpg"]


def test_pictures_in_a_linked_folder_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(b"")
    (tmp_path / "train").mkdir()
    try:
        (tmp_path / "train" / "cats").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("links need a right that this user lacks")
    assert alexnet.image_files(tmp_path / "train") == [tmp_path / "train" / "cats" / "1.jpg"]


def test_a_hostile_weights_file_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"features.1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError):
        alexnet.load_tensors(tmp_path / "bomb.pth", mmap=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "meta-l"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="--device"):
        alexnet.pick_device(name)
