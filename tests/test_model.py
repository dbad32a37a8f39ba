"""The networks: published sizes, layouts by hand, gradients, blur, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastimagenet.models.resnet import Blur, BlurredConv2d
from fastimagenet.recipes.recipe import MODELS, RESNETS, Phase, Recipe
from fastimagenet.training.optimizer import param_groups
from pipelines.errors import UserError
from tests.networks import make_model

# resnet56: stem 432 + 32; groups 42,048, 163,008 and 649,600; linear 650.
NUM_PARAMETERS = {
    ("resnet18", 1000): 11_689_512,
    ("resnet34", 1000): 21_797_672,
    ("resnet50", 1000): 25_557_032,
    ("resnet101", 1000): 44_549_160,
    ("resnet152", 1000): 60_192_808,
    ("resnet56", 10): 855_770,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers on a busy machine spend most of their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(num: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num, 3, size, size, generator=generator)
    return pixels.contiguous(memory_format=torch.channels_last)


def decaying(weight_decay: float) -> Recipe:
    phase = Phase(epochs=1, image_size=8, batch_size=1)
    return Recipe(name="", phases=(phase,), weight_decay=weight_decay)


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in model.modules()
        if type(m).__name__ in ("BasicBlock", "Bottleneck", "SmoothBlock")
    ]


def last_gamma(block: nn.Module) -> Tensor:
    return (block.bn3 if hasattr(block, "bn3") else block.bn2).weight


@pytest.mark.parametrize(("name", "num_classes"), NUM_PARAMETERS)
def test_published_number_of_parameters(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = make_model(name, num_classes)
    count = sum(p.numel() for p in model.parameters())
    assert count == NUM_PARAMETERS[name, num_classes]


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_every_size(name: str) -> None:
    """Shapes alone, without the arithmetic; the deep ones have resnet50's blocks, only more."""
    deep = name in ("resnet101", "resnet152")
    variants = [{}, {"blur_pool": True}, {"small_stem": True, "blur_pool": True}]
    for options in variants[2:] if deep else variants if name in RESNETS else [{}]:
        with torch.device("meta"):
            model = make_model(name, 7, **options)
            for size in (33,) if deep else (16, 33, 64) if name == "smallnet" else (16, 33, 288):
                assert model(torch.empty(2, 3, size, size + 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 96, {}),
        ("resnet18", 32, {"small_stem": True, "blur_pool": True}),
        ("resnet50", 16, {"blur_pool": True}),
        ("resnet56", 16, {}),
        ("smallnet", 16, {}),
        ("smallnet", 64, {}),
    ],
)
def test_every_parameter_gets_a_gradient(name: str, size: int, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = make_model(name, 7, zero_init_last_gamma=False, **options)
    model.to(memory_format=torch.channels_last)
    logits = model(images(2, size))
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["resnet18", "resnet56", "smallnet"])
def test_channels_last_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, 5, blur_pool=name in RESNETS).eval()
    expected = model(images(2, 24).contiguous())
    actual = model.to(memory_format=torch.channels_last)(images(2, 24))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("resnet18", 8), ("resnet50", 16), ("resnet56", 27), ("smallnet", 2)]
)
def test_zero_init_last_gamma(name: str, num_blocks: int) -> None:
    for zero in (True, False):
        blocks = residual_blocks(make_model(name, 3, zero_init_last_gamma=zero))
        assert len(blocks) == num_blocks
        for block in blocks:
            assert (last_gamma(block) == (0 if zero else 1)).all()
            assert (block.bn1.weight == 1).all()


def test_block_with_zero_gamma_is_its_shortcut() -> None:
    block = residual_blocks(make_model("resnet56", 10))[3]
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)


def test_resnet56_layout() -> None:
    model = make_model("resnet56", 10)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shortcuts = [m for m in weighted if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(shortcuts) == 56
    assert [m.weight.shape[:2] for m in shortcuts] == [(32, 16), (64, 32)]
    shapes: list[torch.Size] = []
    for block in residual_blocks(model):
        block.register_forward_hook(lambda _block, _input, output: shapes.append(output.shape[1:]))
    with torch.no_grad():
        model(images(1, 32))
    assert shapes == 9 * [(16, 32, 32)] + 9 * [(32, 16, 16)] + 9 * [(64, 8, 8)]
    for conv in weighted[:-1]:
        fan_out = conv.weight.shape[0] * conv.weight.shape[2] * conv.weight.shape[3]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert conv.bias is None


def test_smallnet_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = make_model("smallnet", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups(model, decaying(1e-4)), lr=0.05, momentum=0.9)
    batch, labels = images(10, 16), torch.arange(10)
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(batch).argmax(dim=1) == labels).all()


def test_small_stem_keeps_resolution_and_initialisation() -> None:
    torch.manual_seed(0)
    model = make_model("resnet18", 10, small_stem=True)
    shapes: list[torch.Size] = []
    for layer in (model.layer1, model.layer4):
        layer.register_forward_hook(lambda _layer, _input, output: shapes.append(output.shape[1:]))
    model(images(2, 32))
    assert shapes == [(64, 32, 32), (512, 4, 4)]
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def blurred(x: np.ndarray) -> np.ndarray:
    """The 3x3 binomial of (H, W) with zeros outside, written out."""
    rows, columns = x.shape
    padded = np.pad(x, 1)
    result = np.zeros_like(x)
    for dy, row_weight in enumerate((1, 2, 1)):
        for dx, column_weight in enumerate((1, 2, 1)):
            window = padded[dy : dy + rows, dx : dx + columns]
            result += row_weight * column_weight * window / 16
    return result


@pytest.mark.parametrize("size", [1, 6, 7])
def test_blur_against_numpy(size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    expected = np.array([[blurred(channel) for channel in image] for image in x.numpy()])
    np.testing.assert_allclose(Blur(3)(x).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(Blur(3, stride=2)(x).numpy(), expected[..., ::2, ::2], atol=1e-6)


def test_blur_removes_a_checkerboard_and_keeps_a_plane() -> None:
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    checkerboard, plane = (-1.0) ** (y + x), 3 * y + 2.0 * x
    result = Blur(2)(torch.stack([checkerboard, plane])[None])[0, :, 1:-1, 1:-1]
    assert (result[0] == 0).all()
    assert torch.equal(result[1], plane[1:-1, 1:-1])


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_blurred_convolution_is_blur_then_strided_convolution(kernel_size: int) -> None:
    plain = nn.Conv2d(4, 5, kernel_size, 2, kernel_size // 2, bias=False)
    conv = BlurredConv2d(4, 5, kernel_size)
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 9, 10)
    torch.testing.assert_close(conv(x), plain(Blur(4)(x)))
    assert conv.blur(x).shape[2:] == ((5, 5) if kernel_size == 1 else (9, 10))


@pytest.mark.parametrize(("name", "num_convs"), [("resnet18", 6), ("resnet50", 6)])
def test_blur_pool_surgery(name: str, num_convs: int) -> None:
    """Weights and names are torchvision's: only the six later strided layers and the pool blur."""
    plain = torchvision.models.get_model(name, num_classes=4)
    model = make_model(name, 4, blur_pool=True)
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sum(isinstance(m, BlurredConv2d) for m in model.modules()) == num_convs
    assert sum(isinstance(m, Blur) for m in model.modules()) == num_convs + 1
    assert type(model.conv1) is nn.Conv2d
    x = torch.randn(2, 64, 24, 24)
    pooled = nn.functional.max_pool2d(x, 3, stride=1, padding=1)
    assert torch.equal(model.maxpool(x), Blur(64)(pooled)[..., ::2, ::2])
    x = torch.rand(2, plain.layer1[-1].conv1.in_channels, 12, 12)
    assert model.layer2(x).shape == plain.layer2(x).shape


def test_blur_pool_starts_from_the_same_weights() -> None:
    torch.manual_seed(3)
    plain = make_model("resnet18", 4)
    torch.manual_seed(3)
    blur = make_model("resnet18", 4, blur_pool=True)
    for name, weight in plain.state_dict().items():
        assert torch.equal(blur.state_dict()[name], weight), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_d_is_that_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"resnet_d": True, "silu": True}
    ours = make_model(name, 5, zero_init_last_gamma=False, **options).eval()
    theirs = timm.create_model(f"{name}d", num_classes=5, act_layer=nn.SiLU).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 75, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    blurred = make_model(name, 5, blur_pool=True, **options)
    # The shortcuts average.
    assert sum(isinstance(m, BlurredConv2d) for m in blurred.modules()) == 3
    assert blurred(x).shape == (2, 5)
    with pytest.raises(UserError, match="field resnet_d must be false where small_stem is true"):
        make_model(name, 5, resnet_d=True, small_stem=True)


def test_unknown_names_and_options_are_named() -> None:
    near = r"resnet18, .*speednet \(perhaps resnet56\), not 'resnet51'$"
    with pytest.raises(UserError, match=r"field model .* " + near):
        make_model("resnet51", 10)
    for name in ("resnet56", "smallnet"):
        for option in ("blur_pool", "small_stem", "resnet_d", "silu"):
            with pytest.raises(UserError, match=f"field {option} must be false for model {name}"):
                make_model(name, 10, **{option: True})


@pytest.mark.parametrize("name", MODELS)
def test_param_groups_part_all_parameters(name: str) -> None:
    with torch.device("meta"):
        model = make_model(name, 10)
    decayed, plain = param_groups(model, decaying(1e-4))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    expected = [
        module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in expected}
    assert len(decayed["params"]) + len(plain["params"]) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )
    assert all(type(p) is nn.Parameter and p.ndim == 1 for p in plain["params"])


def test_empty_groups_are_left_out() -> None:
    recipe, layer = decaying(0.1), nn.Linear(2, 2, bias=False)
    assert [g["weight_decay"] for g in param_groups(layer, recipe)] == [0.1]
    assert [g["weight_decay"] for g in param_groups(nn.BatchNorm2d(2), recipe)] == [0.0]
    assert param_groups(nn.ReLU(), recipe) == []


def test_decay_shrinks_weights_and_spares_bn_and_bias() -> None:
    model = make_model("resnet56", 10)
    nn.init.ones_(model.fc.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(param_groups(model, decaying(0.5)), lr=0.1).step()
    for name, parameter in model.named_parameters():
        kept = 0.95 if before[name].ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept)
