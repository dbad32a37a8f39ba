"""Shards, order and random numbers, from the numbers alone: every combination, no files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import ATTEMPTS, BatchSampler, Stream, crop_box, draw_crops


def numbered(count: int) -> Split:
    """A split whose image i has the path and the label i."""
    return Split(whole_files(str(i) for i in range(count)), list(range(count)), ("a",))


def samplers(
    count: int, shards: int, batch_size: int, training: bool, seed: int = 0
) -> list[BatchSampler]:
    stages = (Stage(epochs=1, image_size=8, batch_size=batch_size),)
    return [
        BatchSampler(
            LoaderSpec(
                split=numbered(count),
                stages=stages,
                training=training,
                shard_id=shard,
                num_shards=shards,
                seed=seed,
            )
        )
        for shard in range(shards)
    ]


def epoch_of(order: BatchSampler, epoch: int) -> list[list[int]]:
    steps = order.spec.steps_at(epoch)
    return [order.batch(epoch, step).labels.tolist() for step in range(steps)]


def test_batches_that_are_added_up_are_those_of_as_many_shards() -> None:
    (one,), two = samplers(29, 1, 3, True), samplers(29, 2, 3, True)
    one = BatchSampler(replace(one.spec, accumulation=2))
    for epoch in range(2):
        assert one.spec.steps_at(epoch) == 2 * two[0].spec.steps_at(epoch) == 8
        for step in range(8):
            ours, theirs = one.batch(epoch, step), two[step % 2].batch(epoch, step // 2)
            assert ours.indices.tolist() == theirs.indices.tolist()
            assert ours.crops is not None and theirs.crops is not None
            assert np.array_equal(ours.crops.area, theirs.crops.area)
    with pytest.raises(UserError, match="at most 9"):
        BatchSampler(replace(samplers(29, 1, 14, True)[0].spec, accumulation=3))


def test_every_stream_of_random_numbers_is_its_own() -> None:
    """Also where keys end in zeros, with which NumPy pads short ones, and for long seeds."""
    for seed in (0, 1, 2**32 - 1, 2**32, 2**63 - 1):
        firsts = {
            tuple(stream.generator(seed, *[0] * (length - 1)).integers(0, 2**62, 4))
            for stream in Stream
            for _, length in [stream.value]
        }
        assert len(firsts) == len(Stream) == 8
    with pytest.raises(AssertionError, match="FLIPS"):
        Stream.FLIPS.generator(0, 0)


def test_the_streams_are_those_of_earlier_versions() -> None:
    """Numbers that seeds of published runs have drawn."""
    first = {
        stream.name: int(stream.generator(7, *range(1, stream.value[1])).integers(0, 1000))
        for stream in Stream
        if stream is not Stream.SHARD_SHUFFLE
    }
    assert first == {
        "PERMUTATION": 624,
        "CROPS": 116,
        "FLIPS": 530,
        "AUTO": 150,
        "JITTER": 846,
        "ERASE": 760,
        "MIX": 352,
    }


CASES = [(n, w, b) for n in (*range(1, 25), 97) for w in range(1, 9) for b in (1, 2, 3, 7)]
CASES += [(397, 4, 3), (397, 4, 33), (397, 4, 99)]


def test_training_shards_are_equal_long_and_disjoint() -> None:
    for count, shards, batch_size in CASES:
        if batch_size * shards > count:
            continue
        every = samplers(count, shards, batch_size, training=True)
        for epoch in range(2):
            batches = [epoch_of(order, epoch) for order in every]
            assert {len(part) for part in batches} == {count // (batch_size * shards)}
            assert all(len(batch) == batch_size for part in batches for batch in part)
            read = [label for part in batches for batch in part for label in batch]
            assert len(read) == len(set(read)) > count - batch_size * shards


def test_validation_reads_every_image_once() -> None:
    for count, shards, batch_size in CASES:
        batches = [epoch_of(order, 0) for order in samplers(count, shards, batch_size, False)]
        assert [x for part in batches for batch in part for x in batch] == list(range(count))
        for part in batches:
            assert all(len(batch) == batch_size for batch in part[:-1])


def test_the_order_is_new_each_epoch_and_with_each_seed() -> None:
    (order,) = samplers(50, 1, 50, training=True)
    (other,) = samplers(50, 1, 50, training=True, seed=1)
    read = [epoch_of(order, 0)[0], epoch_of(order, 1)[0], epoch_of(other, 0)[0], list(range(50))]
    assert all(a != b for i, a in enumerate(read) for b in read[:i])
    assert epoch_of(order, 0)[0] == read[0], "going back gives the same again"


def test_one_global_batch_holds_the_same_images_at_every_world_size() -> None:
    for step in range(4):
        batches = []
        for shards in (1, 2, 4):
            every = samplers(50, shards, 12 // shards, training=True)
            batches.append(sorted(x for order in every for x in epoch_of(order, 2)[step]))
        assert batches[0] == batches[1] == batches[2]


@pytest.mark.parametrize("shards", [1, 2])
def test_alternating_flips_show_each_image_both_ways(shards: int) -> None:
    flipped = np.full((4, 200), -1)
    for order in samplers(200, shards, 5, True):
        order = BatchSampler(replace(order.spec, alternating_flip=True))
        for epoch in (2, 0, 3, 1):  # in any order: nothing is remembered
            for step in range(order.spec.steps_at(epoch)):
                batch = order.batch(epoch, step)
                assert batch.crops is not None and batch.crops.mirror.dtype == np.int32
                flipped[epoch, batch.indices] = batch.crops.mirror
    assert set(flipped[0]) == {0, 1} and 70 < flipped[0].sum() < 130
    assert (flipped[1] == 1 - flipped[0]).all()
    assert (flipped[2:] == flipped[:2]).all()
    other = BatchSampler(replace(order.spec, seed=1))
    assert (other.first_flips != flipped[0]).sum() > 50


def test_alternating_flips_leave_the_crops_alone() -> None:
    (plain,) = samplers(20, 1, 5, True)
    ours = BatchSampler(replace(plain.spec, alternating_flip=True)).batch(1, 2)
    theirs = plain.batch(1, 2)
    assert ours.crops is not None and theirs.crops is not None
    assert ours.indices.tolist() == theirs.indices.tolist()
    assert np.array_equal(ours.crops.offset, theirs.crops.offset)


def test_a_batch_that_is_too_large_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"batch_size 13 .* 4 processes .* 50 .* at most 12"):
        samplers(50, 4, 13, training=True)
    samplers(50, 4, 12, training=True)
    samplers(3, 4, 13, training=False)


def test_random_crops_have_the_statistics_of_torchvision() -> None:
    """Area shares, aspect ratios, offsets and flips of 4,000 crops of a 500 x 375 image."""
    (order,) = samplers(4000, 1, 4000, training=True)
    crops = draw_crops(order.spec, np.random.default_rng(0), 4000, 0.25)
    assert crops.area.shape == crops.ratio.shape == (4000, ATTEMPTS)
    ours = [crop_box(375, 500, crops, i, (3 / 4, 4 / 3)) for i in range(4000)]
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = [RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    statistics = (
        lambda top, left, high, wide: high * wide / (375 * 500),
        lambda top, left, high, wide: np.log(wide / high),
        lambda top, left, high, wide: top / (375 - high) if high < 375 else 0.5,
        lambda top, left, high, wide: left / (500 - wide) if wide < 500 else 0.5,
    )
    for statistic in statistics:
        a = np.sort([statistic(*box) for box in ours])
        b = np.sort([statistic(*box) for box in theirs])
        grid = np.concatenate([a, b])
        share_a = np.searchsorted(a, grid, side="right") / len(a)
        share_b = np.searchsorted(b, grid, side="right") / len(b)
        # Kolmogorov-Smirnov: beyond 1.95 * sqrt(2 / n) by chance once in a thousand times.
        assert np.abs(share_a - share_b).max() < 1.95 * np.sqrt(2 / 4000)
    assert abs(crops.mirror.mean() - 0.5) < 0.03


def test_an_image_too_long_for_any_crop_gives_the_centre() -> None:
    (order,) = samplers(8, 1, 8, training=True)
    crops = draw_crops(order.spec, np.random.default_rng(0), 8, 0.9)
    assert crop_box(20, 1000, crops, 0, (3 / 4, 4 / 3)) == (0, 486, 20, 27)
    assert crop_box(1000, 30, crops, 0, (3 / 4, 4 / 3)) == (480, 0, 40, 30)
