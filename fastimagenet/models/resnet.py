"""torchvision's ResNets, with what later work has changed in them, and the ResNet-56 that it lacks.

All take images (B, 3, H, W), best in channels_last memory, and return logits (B, num_classes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet


def conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias (BN follows) with ceil(H / stride) output rows."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, channels, kernel_size, stride, padding, bias=False)


def conv_bn(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Make such a convolution and its BN."""
    return nn.Sequential(conv(in_channels, channels, kernel_size, stride), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """ReLU(conv-BN-ReLU-conv-BN + shortcut), both 3x3; the first convolution has the stride.

    The shortcut is the identity or, where the shape changes, a 1x1 convolution and BN.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        same_shape = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same_shape else conv_bn(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))


def initialise(model: nn.Module, zero_init_last_gamma: bool) -> None:
    """Initialise as torchvision's ResNets: He et al. 2015 (arXiv:1502.01852), fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock) and zero_init_last_gamma:
            nn.init.zeros_(module.bn2.weight)


class ResNet56(nn.Module):
    """ResNet-56 of the super-convergence study on CIFAR-10, for 32-px images.

    A 3x3 convolution to 16 channels, BN, ReLU; three groups of 9 `BasicBlock`s of 16, 32 and 64
    channels, the second and third starting at stride 2; global average pool; linear. The study's
    "1x1 conv + BN shortcut" is read as He et al. 2016 (arXiv:1512.03385) do: only in the two
    blocks that change the shape, all others add their input unchanged.
    """

    def __init__(self, num_classes: int, zero_init_last_gamma: bool) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3)
        blocks = []
        for in_channels, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks.append(BasicBlock(in_channels, channels, stride))
            blocks += [BasicBlock(channels, channels) for _ in range(8)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_last_gamma)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(images)))
        return self.fc(x.mean(dim=(2, 3)))


def torchvision_resnet(name: str, num_classes: int, zero_init_last_gamma: bool) -> ResNet:
    """Make torchvision's network of that name, without trained weights."""
    model = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, zero_init_residual=zero_init_last_gamma
    )
    assert isinstance(model, ResNet)
    return model


def use_small_stem(model: ResNet) -> None:
    """Make the first convolution 3x3 with stride 1 and drop the max-pool: H and W are kept."""
    model.conv1 = conv(3, 64, 3)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def use_resnet_d(model: ResNet) -> None:
    """Make it a ResNet-D of He et al. 2018, "Bag of Tricks" (arXiv:1812.01187).

    Three 3x3 convolutions to 32, 32 and 64 channels in place of the 7x7; a shortcut that shrinks
    the image averages 2x2 pixels, where a 1x1 convolution of stride 2 drops three of four. The
    parameters have the names of timm's resnet18d and so on.
    """
    stem: list[nn.Module] = []
    for in_channels, channels, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
        stem += [conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels), nn.ReLU()]
        nn.init.kaiming_normal_(stem[-3].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    model.conv1 = nn.Sequential(*stem[:-2])  # bn1 and ReLU follow
    for module in model.modules():
        shortcut = getattr(module, "downsample", None)
        if shortcut is not None:
            first, bn = shortcut
            pool = nn.Identity() if first.stride == (1, 1) else nn.AvgPool2d(2, ceil_mode=True)
            first.stride = (1, 1)
            module.downsample = nn.Sequential(pool, first, bn)


def use_silu(model: ResNet) -> None:
    """Take SiLU (Elfwing et al. 2017, arXiv:1702.03118) for every ReLU."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())


class Blur(nn.Module):
    """Filters each channel by the 3x3 binomial (1 2 1; 2 4 2; 1 2 1) / 16, zero-padded.

    (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)). No parameters, nothing saved.
    """

    kernel: Tensor

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        line = torch.tensor([1.0, 2.0, 1.0])
        kernel = (line.outer(line) / 16).repeat(channels, 1, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=self.stride, padding=1, groups=x.shape[1])


class BlurredConv2d(nn.Conv2d):
    """Filters, then convolves with stride 2; the weight is named as a plain convolution's."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        # A 1x1 convolution reads every second pixel only: filter just those, a quarter of the work.
        blur_stride, stride = (2, 1) if kernel_size == 1 else (1, 2)
        super().__init__(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.blur = Blur(in_channels, blur_stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blur(x))


def add_blur(model: ResNet) -> None:
    """Put a low-pass filter before every strided convolution but the first, and in the max-pool.

    Against aliasing: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"
    (arXiv:1904.11486). The max-pool is his: stride 1, then filter and subsample. A strided
    convolution he makes stride 1 and filters its output; here its input is filtered and the
    stride stays, which costs far less and is how fast ImageNet recipes use it. The first
    convolution sees the image unfiltered, as in his released networks. The parameters keep their
    names.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2) and child is not first:
                blurred = BlurredConv2d(child.in_channels, child.out_channels, child.kernel_size[0])
                blurred.weight = child.weight
                setattr(parent, name, blurred)
    if isinstance(model.maxpool, nn.MaxPool2d):
        model.maxpool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Blur(64, stride=2))
