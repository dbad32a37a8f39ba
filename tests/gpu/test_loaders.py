"""Batches that are decoded on the GPU, or copied to it, against those of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.mixing import augment
from pipelines.backends import make_loader
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.loader import DaliSettings, LoaderSpec, Stage, Transforms


def test_dali_decodes_windows(windows_fail: str) -> None:
    """In a process of its own; what fails here is not tried again by the other tests."""
    assert windows_fail == ""


@pytest.mark.parametrize("backend", ["dali", "torchvision", "memory"])
@pytest.mark.parametrize(
    "training, half, reflect_pad", [(True, True, 0), (True, True, 4), (False, False, 0)]
)
def test_batches_on_the_gpu_are_those_of_the_cpu(
    backend: str, training: bool, half: bool, reflect_pad: int, photographs: Path
) -> None:
    """As near as the GPU's own JPEG decoder allows: 2 of 255 in the mean."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    split = read_split(photographs, "val").take(np.arange(5 * 32))
    stages = (Stage(epochs=1, image_size=224, batch_size=32),)
    on_cpu, on_gpu = (
        make_loader(
            backend,
            LoaderSpec(
                split=split,
                stages=stages,
                training=training,
                device=device,
                half=half and device != "cpu",
                reflect_pad=reflect_pad,
            ),
        )
        for device in ("cpu", "cuda:0")
    )
    for (images, labels), (fast, fast_labels) in zip(on_cpu, on_gpu, strict=True):
        assert fast.device == fast_labels.device == torch.device("cuda:0")
        assert fast.dtype == (torch.float16 if half else torch.float32)
        assert fast.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast_labels.cpu(), labels)
        difference = (fast.cpu().float() - images).abs().mean()
        assert difference * 255 * 0.226 < 2
    on_cpu.close()
    on_gpu.close()


def test_augmentation_is_that_of_the_cpu_and_waits_for_nothing() -> None:
    wanted = Transforms(
        auto_augment="rand", color_jitter=0.4, random_erasing=0.5, mixup=0.2, cutmix=1.0
    )
    spec = LoaderSpec(
        split=Split(whole_files([""]) * 64, [0] * 64, tuple("abcdefg")),
        stages=(Stage(epochs=1, image_size=64, batch_size=64),),
        training=True,
        **vars(wanted),
    )
    images = torch.randn(64, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(64) % 7
    fast, target = images.to("cuda:0"), labels.to("cuda:0")
    augment(fast, target, spec, 0, 0)
    for step in range(5):
        expected, expected_labels = augment(images, labels, spec, 0, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours, mixed = augment(fast, target, spec, 0, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mixed.cpu(), expected_labels)
        assert 255 * 0.226 * (ours.cpu() - expected).abs().mean() < 0.1


def test_float16_batches_are_handed_over_without_a_copy(photographs: Path) -> None:
    """DALI's own memory: torch's allocator, which any copy would take from, stays where it was."""
    pytest.importorskip("nvidia.dali")
    spec = LoaderSpec(
        split=read_split(photographs, "val"),
        stages=(Stage(epochs=1, image_size=224, batch_size=32),),
        training=True,
        device="cuda:0",
        half=True,
    )
    loader = make_loader("dali", spec)
    before = torch.cuda.memory_allocated()
    for step, (images, _) in enumerate(loader):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.cuda.memory_allocated() == before
        if step == 3:
            break
    loader.close()


@pytest.mark.parametrize("load", [0.0, DaliSettings.hw_decoder_load])
def test_a_batch_outlives_the_next_ones(load: float, photographs: Path) -> None:
    """Work that is queued on a batch sees its pixels, however late the GPU gets to it."""
    pytest.importorskip("nvidia.dali")
    spec = LoaderSpec(
        split=read_split(photographs, "val"),
        stages=(Stage(epochs=1, image_size=128, batch_size=16),),
        training=True,
        device="cuda:0",
        half=True,
        dali=DaliSettings(hw_decoder_load=load),
    )
    busy = torch.randn(4096, 4096, device="cuda:0")
    late, prompt = [], []
    for sums, wait in ((late, False), (prompt, True)):
        loader = make_loader("dali", spec)
        for step, (images, _) in enumerate(loader):
            for _ in range(20):  # a queue that the loader runs ahead of
                busy = busy @ busy / 64
            sums.append(images.double().abs().sum())
            del images
            if wait:
                torch.cuda.synchronize()
            if step == 9:
                break
        loader.close()
    # Not to the bit: the hardware decoder need not take the same images again.
    torch.testing.assert_close(torch.stack(late), torch.stack(prompt), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", ["dali", "torchvision", "memory"])
def test_sizes_change_and_passes_go_on_where_they_were_broken_off(
    backend: str, cifar10: Path
) -> None:
    spec = LoaderSpec(
        split=read_split(cifar10, "train"),
        stages=(
            Stage(epochs=1, image_size=16, batch_size=100),
            Stage(epochs=1, image_size=24, batch_size=50),
        ),
        training=True,
        device="cuda:0",
        half=True,
        reflect_pad=2,
    )
    loader = make_loader(backend, spec)
    next(iter(loader))
    shapes = [images.shape for _ in range(2) for images, _ in loader]
    assert shapes == [(100, 3, 16, 16)] * 4 + [(50, 3, 24, 24)] * 10
    loader.close()
