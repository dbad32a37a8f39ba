"""`SmallNet`, a residual network for small images on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastimagenet.models.resnet import conv


class SmoothBlock(nn.Module):
    """Adds to its input two 3x3 convolutions, each followed by BN and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.silu(self.bn1(self.conv1(x)))
        return x + F.silu(self.bn2(self.conv2(residual)))


class GlobalMaxPool(nn.AdaptiveMaxPool2d):
    """The largest value of each channel: (B, C, H, W) -> (B, C, 1, 1).

    torch's own does not repeat itself on a GPU; the other way gives the same bits, more slowly.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            return F.max_pool2d(x, x.shape[-2:])
        return super().forward(x)


class SmallNet(nn.Module):
    """A nine-layer residual network for images of 8 to 64 px, quick on a CPU.

    In the manner of the CIFAR-10 speed records: few wide layers, max-pools in place of strides, a
    global max-pool, and logits scaled down by 8. 81 million multiply-adds at 32 px. Pooling comes
    before BN and SiLU, which then process a quarter of the pixels. torch's own
    initialisation.
    """

    def __init__(self, num_classes: int, zero_init_last_gamma: bool) -> None:
        super().__init__()

        def layer(in_channels: int, channels: int, shrink: bool) -> nn.Sequential:
            pool = [nn.MaxPool2d(2)] if shrink else []
            bn = nn.BatchNorm2d(channels)
            return nn.Sequential(conv(in_channels, channels, 3), *pool, bn, nn.SiLU())

        self.features = nn.Sequential(
            layer(3, 32, shrink=True),
            layer(32, 64, shrink=False),
            layer(64, 128, shrink=True),
            SmoothBlock(128),
            layer(128, 256, shrink=True),
            SmoothBlock(256),
            GlobalMaxPool(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(256, num_classes, bias=False)
        if zero_init_last_gamma:
            for module in self.features:
                if isinstance(module, SmoothBlock):
                    nn.init.zeros_(module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images)) / 8
