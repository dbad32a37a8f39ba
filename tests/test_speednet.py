"""The record holders' network: its whitening against numpy, its initialisation, its layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from fastimagenet.models.speednet import WhiteningConv2d
from tests.networks import make_model


def images(count: int, size: int) -> Tensor:
    """Smooth noise, with channels that depend on one another as colours do."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    mixed = torch.einsum(
        "bchw,cd->bdhw", noise, torch.tensor([[1, 0.8, 0.7], [0, 1, 0.9], [0, 0, 1]])
    )
    return nn.functional.avg_pool2d(mixed, 3, 1) + 0.5


def patches_of(pixels: np.ndarray) -> np.ndarray:
    """(patches, 12): channel, row, column, as a filter has them."""
    windows = sliding_window_view(pixels, (2, 2), axis=(2, 3))  # B, 3, H - 1, W - 1, 2, 2
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)


def test_whitening_is_that_of_numpys_covariance() -> None:
    pixels = images(40, 12)
    layer = WhiteningConv2d()
    layer.whiten(iter(pixels.split(15)))
    filters = layer.weight.detach().double().numpy().reshape(24, 12)
    values, vectors = np.linalg.eigh(np.cov(patches_of(pixels.double().numpy()).T, bias=True))
    expected = vectors.T / np.sqrt(values + 5e-4)[:, None]
    signs = np.sign((filters[:12] * expected).sum(1))
    np.testing.assert_allclose(filters[:12], signs[:, None] * expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(filters[12:], -filters[:12])
    covariance = np.cov(layer(pixels)[:, :12].detach().transpose(0, 1).flatten(1).numpy())
    np.testing.assert_allclose(covariance, np.diag(values / (values + 5e-4)), atol=1e-3)
    assert not layer.weight.requires_grad and not layer.bias.any()


@pytest.mark.parametrize("name", ["speednet", "smallnet"])
def test_dirac_convolutions_hand_on_their_input(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, 10, dirac_init=True)
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            given = torch.randn(2, module.in_channels, 6, 6)
            result = module(given)
            assert torch.equal(result[:, : module.in_channels], given)
            rest = result[:, module.in_channels :]
            assert not rest.numel() or rest.std() > 0.1, "what is left is drawn"
            found += 1
    assert found >= 6


@pytest.mark.parametrize("whitening", [True, False])
def test_logits_at_every_size(whitening: bool) -> None:
    model = make_model("speednet", 7, whitening=whitening).to(memory_format=torch.channels_last)
    for size in (16, 24, 32, 64):
        assert model(images(3, size + 2)).shape == (3, 7)


def test_its_published_number_of_parameters() -> None:
    """airbench94: 1.97 million."""
    filters = 24 * 12 + 9 * (24 * 64 + 64**2 + 64 * 256 + 256**2 + 2 * 256**2)
    others = 24 + 2 * 2 * (64 + 256 + 256) + 2560
    assert sum(p.numel() for p in make_model("speednet", 10).parameters()) == filters + others
