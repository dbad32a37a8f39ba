"""Facts of the data sets that recipes are made for; channel statistics are of pixels in 0..1."""

from __future__ import annotations

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""As torchvision and every published ResNet-50 use them."""
IMAGENET_CLASSES, IMAGENET_COUNTS = 1000, {"train": 1_281_167, "val": 50_000}
"""Number of classes, and of images by split."""
CIFAR10_MEAN = (0.4914, 0.48216, 0.44653)
CIFAR10_STD = (0.24703, 0.24349, 0.26159)
"""Of the training images."""
CIFAR10_COUNTS = {"train": 50_000, "val": 10_000}
CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


def dataset_name(classes: tuple[str, ...]) -> str | None:
    """Return DAWNBench's name of the data set with these classes, None for any other."""
    if classes == CIFAR10_CLASSES:
        return "CIFAR10"
    if len(classes) == IMAGENET_CLASSES and classes[0] == "n01440764":
        return "ImageNet"
    return None


AUTO, ORIGINAL = "auto", "original"
"""`Stage.data` for the copy that serves best, and for the split itself."""
