"""The network of the CIFAR-10 speed records, with whitening and Dirac initialisation.

It is that of cifar10-airbench (github.com/KellerJordan/cifar10-airbench) and its paper "94 % on
CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv:2404.00498); figures are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastimagenet.models.resnet import conv

EPSILON = 5e-4
"""Added to the eigenvalues before the square root (arXiv:2404.00498)."""


class WhiteningConv2d(nn.Conv2d):
    """A 2x2 convolution of 3 channels to 24, with bias, that whitens patches of 2x2 pixels.

    Its filters are the eigenvectors of the patches' covariance, each divided by the root of its
    eigenvalue, and their negatives, so that both signs pass the nonlinearity. They are
    set by `whiten` and do not learn (Page 2019, "How to train your ResNet 8";
    arXiv:2404.00498). The optimizer stops its bias after a few epochs.
    """

    def __init__(self) -> None:
        super().__init__(3, 24, 2)
        self.weight.requires_grad_(False)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def whiten(self, images: Iterable[Tensor]) -> None:
        """Compute the filters from batches of images (B, 3, H, W), normalised."""
        count, total, products = 0, torch.zeros(12).double(), torch.zeros(12, 12).double()
        for batch in images:
            patches = F.unfold(batch.cpu().float(), 2).transpose(0, 1).flatten(1).double()
            count += patches.shape[1]
            total += patches.sum(1)
            products += patches @ patches.T
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
        filters = (vectors / (values + EPSILON).sqrt()).T.view(12, 3, 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))


class SpeedBlock(nn.Module):
    """Convolution, max-pool, BN, GELU, convolution, BN, GELU; both convolutions 3x3.

    BN has no scale, only a bias, and keeps 60 % of its statistics at every update: a short
    training needs recent ones.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels, momentum=0.4)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels, momentum=0.4)
        for bn in (self.bn1, self.bn2):
            bn.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


class SpeedNet(nn.Module):
    """Seven convolutions for images of 16 to 64 px: airbench94's layers and widths.

    2x2 to 24 channels, three `SpeedBlock`s of 64, 256 and 256, a global max-pool, a linear layer
    whose logits are divided by 9. 118 million multiply-adds at 32 px.
    `whitening`: the first convolution is a `WhiteningConv2d`, on which `whiten` is to be called.
    """

    def __init__(self, num_classes: int, whitening: bool = False) -> None:
        super().__init__()
        self.first = WhiteningConv2d() if whitening else nn.Conv2d(3, 24, 2)
        self.blocks = nn.Sequential(SpeedBlock(24, 64), SpeedBlock(64, 256), SpeedBlock(256, 256))
        self.fc = nn.Linear(256, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.first(images)))
        return self.fc(x.amax(dim=(2, 3))) / 9


def use_dirac(model: nn.Module) -> None:
    """Initialise every odd-sized convolution to pass its input on, as far as its channels go.

    The first filters, as many as there are input channels, become the identity; the others stay
    as they were drawn. For networks without shortcuts, which then start as shallow ones
    (Zagoruyko and Komodakis 2017, arXiv:1706.00388; in part: arXiv:2404.00498).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] % 2:
            with torch.no_grad():
                nn.init.dirac_(module.weight[: module.in_channels])
