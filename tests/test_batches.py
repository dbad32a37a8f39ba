"""The page of images as the network gets them, which are those of a run."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastimagenet.batches import look, named
from fastimagenet.config import DataConfig, RunConfig
from fastimagenet.recipes import toml
from tests.commands import ROOT, output_of

RECIPE = replace(toml.load(ROOT / "tests/small.toml"), reflect_pad=0)


def test_every_back_end_shows_the_same(cifar10: Path) -> None:
    """Crops within what their decoders differ by; the validation images, too."""
    found = {}
    for backend in ("dali", "torchvision"):
        data = DataConfig(folder=cifar10, backend=backend)
        found[backend] = look(RunConfig(recipe=RECIPE, data=data, seed=3), 6)
    assert [len(seen.training) for seen in found["dali"]] == [6, 6, 6]
    for ours, theirs in zip(*found.values(), strict=True):
        for a, b in zip(
            ours.training + ours.validation, theirs.training + theirs.validation, strict=True
        ):
            assert a.label == b.label and a.pixels.shape == b.pixels.shape
            assert np.abs(a.pixels.astype(int) - b.pixels).mean() < 2
    sizes = [(s.training[0].pixels.shape, s.validation[0].pixels.shape) for s in found["dali"]]
    assert sizes == [((8, 8, 3), (12, 12, 3)), ((12, 12, 3),) * 2, ((16, 16, 3),) * 2]
    labels = [picture.label for picture in found["dali"][0].validation]
    assert len(set(labels)) == 6  # across the classes


def test_they_are_the_first_batch_of_a_run(cifar10: Path) -> None:
    import fastimagenet

    config = RunConfig(recipe=RECIPE, data=DataConfig(folder=cifar10, backend="torchvision"))
    seen = look(config, 4)[0]
    spec = RECIPE.transforms()
    loader = fastimagenet.loader(
        cifar10, image_size=8, batch_size=50, backend="torchvision", num_threads=0, **spec
    )
    images, labels = next(iter(loader))
    loader.close()
    mean, std = (np.array(each, np.float32) for each in (RECIPE.mean, RECIPE.std))
    pixels = (images.permute(0, 2, 3, 1).numpy() * std + mean) * 255
    classes = sorted(path.name for path in (cifar10 / "train").iterdir())
    for picture, expected, label in zip(seen.training, pixels, labels, strict=False):
        assert np.array_equal(picture.pixels, expected.round().clip(0, 255).astype(np.uint8))
        assert picture.label == classes[label]


def test_the_page_holds_them(cifar10: Path, tmp_path: Path) -> None:
    out, _ = output_of(
        "fastimagenet.batches",
        *("--data", cifar10, "--recipe", "tests/small.toml", "--images", 5, "--set", "mixup=0.4"),
        *("--output", tmp_path),
    )
    assert out.strip() == str(tmp_path / "batches.html")
    page = (tmp_path / "batches.html").read_text()
    codes = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(codes) == 3 * 2 * 5
    sizes = [Image.open(io.BytesIO(base64.b64decode(code))).size for code in codes]
    assert sizes[:5] == [(8, 8)] * 5 and sizes[5:10] == [(12, 12)] * 5
    assert "epoch 3" in page and re.search(r"\d+% \w+, \d+% \w+", page)  # mixed


@pytest.mark.parametrize(
    "shares, text", [([0, 1.0, 0], "b"), ([0.3, 0.7, 0.0], "70% b, 30% a"), ([0.5, 0.5, 0], None)]
)
def test_mixed_labels_are_named_by_their_shares(shares: list[float], text: str | None) -> None:
    import torch

    found = named(torch.tensor(shares), "abc")
    assert found == text or (text is None and set(found.split(", ")) == {"50% a", "50% b"})
