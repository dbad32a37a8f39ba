"""Facts of the data sets that recipes are made for; channel statistics are of pixels in 0..1."""

from __future__ import annotations

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""As torchvision and every published ResNet-50 use them; 1,281,167 and 50,000 images."""
CIFAR10_MEAN = (0.4914, 0.48216, 0.44653)
CIFAR10_STD = (0.24703, 0.24349, 0.26159)
"""Of the 50,000 training images; 10,000 for validation."""
CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


def dataset_name(classes: tuple[str, ...]) -> str | None:
    """Return DAWNBench's name of the data set with these classes, None for any other."""
    if classes == CIFAR10_CLASSES:
        return "CIFAR10"
    if len(classes) == 1000 and classes[0] == "n01440764":
        return "ImageNet"
    return None


AUTO, ORIGINAL = "auto", "original"
"""`Stage.data` for the copy that serves best, and for the split itself."""
