"""What an image costs by size, batch and number of images: the command, and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.research import growth
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.files import read_object
from pipelines.prepare.__main__ import main as prepare

FLAGS = ["--recipe", "tests/small.toml", "--device", "cpu", "--set", "reflect_pad=0"]
SMALL = ["--set", "phases.*.batch_size=50", "--rounds", "2", "--seconds", "0.05"]
LIMITS = ("product", "decode")
ENDS = ("limit: decode", "limit: product")


def one_call(call: Callable[[], object], *_: object) -> float:
    """A clock by which every call takes a second."""
    call()
    return 1.0


def test_all_axes_are_measured_and_drawn(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.common.rates.MATRIX", {"cpu": 64})
    monkeypatch.setattr(growth, "calls_per_sec", one_call)
    monkeypatch.setattr(growth, "warm_up_batches", lambda _: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # spends less on so small images
    axes = ["--sizes", "16", "8", "--batches", "25", "100", "--counts", "50", "150"]
    flags = ["--data", str(cifar10), "--output", str(tmp_path), *FLAGS, *SMALL, *axes]
    try:
        assert growth.main(flags) == 0
    finally:
        torch.set_num_threads(threads)
    result = read_object(tmp_path / "growth.json")
    size, batch, count = result["axes"]
    assert [size["x"], batch["x"], count["x"]] == [[8, 16], [25, 100], [50, 150]]
    # A convolution costs as much as its image has pixels; a batch costs an image nothing.
    assert size["flops_per_image"][1] / size["flops_per_image"][0] == pytest.approx(4, rel=0.05)
    assert batch["flops_per_image"][0] == pytest.approx(batch["flops_per_image"][1])
    for axis in (size, batch, count):
        product, decoded = (axis["parts"][f"limit: {name}"]["rounds"] for name in LIMITS)
        for row in product:
            assert row[0] / row[1] == pytest.approx(
                axis["flops_per_image"][0] / axis["flops_per_image"][1]
            )
        assert decoded == [pytest.approx([1 / 50, 1 / 50])] * 2
    assert list(size["parts"]) == list(batch["parts"]) == ["loader", "network", "training", *ENDS]
    assert list(count["parts"]) == ["loader", "training", "index", "index again", *ENDS]
    for part in ("loader", "network", "training"):  # a second each
        assert size["parts"][part]["rounds"] == [pytest.approx([1 / 50, 1 / 50])] * 2
        assert batch["parts"][part]["rounds"] == [pytest.approx([1 / 25, 1 / 100])] * 2
        assert batch["parts"][part]["exponent"]["mean"] == pytest.approx(-1)
    for part in ("loader", "training"):  # whole epochs
        assert count["parts"][part]["rounds"] == [pytest.approx([1 / 50, 1 / 150])] * 2
    assert all(min(row) > 0 for row in count["parts"]["index again"]["rounds"])
    text = (tmp_path / "table.md").read_text()
    assert "## image size, px (batch 50)" in text
    assert "## images of the data set (8 px, batch 50)" in text
    picture = (tmp_path / "growth.svg").read_text()
    assert all(f">{name}</text>" in picture for name in growth.LOOKS)
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_a_data_set_of_any_number_has_all_classes_alike(cifar10: Path, tmp_path: Path) -> None:
    train = read_split(cifar10, "train")
    for count in (20, 1010):
        images = growth.spread(train, count)
        assert np.bincount(images.labels).tolist() == [count // 10] * 10
        found = growth.read_folder(growth.make_links(images, tmp_path / str(count)))
        links = read_split(tmp_path / str(count) / "data", "train")
        assert len(links) == count and links.classes == train.classes and min(found.values()) > 0


def test_exponents_by_hand() -> None:
    found = growth.power_law([2, 4, 8], [[3.0 * x**2 for x in (2, 4, 8)]] * 2)
    assert found["exponent"]["mean"] == pytest.approx(2) and found["off"] < 1e-9
    assert found["exponent"]["high"] == pytest.approx(2)
    found = growth.power_law([2, 4], [[2.0, 4.0], [2.0, 16.0]])  # 1 and 3
    assert found["exponent"]["mean"] == pytest.approx(2)
    assert found["exponent"]["high"] == pytest.approx(2 + 12.706)
    # Logarithms 0, a, 0: a flat line at a / 3, which the middle is 2 a / 3 above.
    found = growth.power_law([1, 2, 4], [[1.0, 8.0, 1.0]] * 2)
    assert found["exponent"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["off"] == pytest.approx(math.exp(2 / 3 * math.log(8)) - 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "7", "16"], "--sizes: must be at least 8, not 7"),
        (["--sizes", "16", "16"], "--sizes: name at least two different numbers"),
        (["--batches", "1", "2"], "--batches: must be at least 2, not 1"),
        (["--batches", "10", "501"], "--batches: must be at most the 500 training images, not 501"),
        (["--counts", "100"], "--counts: name at least two different numbers"),
        (["--counts", "10", "100"], "--counts 10: must be at least the 50 images"),
        (["--rounds", "1"], "--rounds: must be at least 2, not 1"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, cifar10: Path, tmp_path: Path
) -> None:
    own = ["--data", str(cifar10), "--output", str(tmp_path / "out"), *FLAGS, *SMALL]
    with pytest.raises(UserError, match=message):
        growth.main([*own, *flags])


def test_data_that_growth_cannot_be_measured_on_is_named(
    cifar10: Path, digits: Path, tmp_path: Path
) -> None:
    prepare(["shard", str(cifar10), str(tmp_path / "shards")])
    for data, message in (
        (digits, "--data .*: there are no JPEGs to decode"),
        (tmp_path / "shards", "--data .* holds shards: name a folder of images"),
    ):
        flags = ["--data", str(data), "--output", str(tmp_path / "out"), *FLAGS, *SMALL]
        with pytest.raises(UserError, match=message):
            growth.main(flags)
