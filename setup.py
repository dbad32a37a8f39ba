"""Metadata of the package; tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "fastimagenet/__init__.py").read_text())
assert version is not None
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "safetensors>=0.5", "timm>=1.0.17"]

setup(
    name="fastimagenet",
    version=version.group(1),
    description="From a folder of JPEGs to a trained image classifier: DALI, 1cycle, DDP",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # By name, so that nothing else of the clone is shipped.
    packages=[
        "fastimagenet",
        *(f"fastimagenet.{name}" for name in ("details", "distributed", "lr_finder", "models")),
        *(f"fastimagenet.{name}" for name in ("recipes", "report", "training")),
        "pipelines",
        *(f"pipelines.{name}" for name in ("augment", "backends", "backends.dali", "datasets")),
        *(f"pipelines.{name}" for name in ("parity", "prepare")),
    ],
    # An editable install is then a path of Python's, behind which no folder called pipelines in the
    # working directory hides ours.
    package_dir={"": "."},
    package_data={"": ["*.jinja", "py.typed"]},
    entry_points={"console_scripts": ["fastimagenet=fastimagenet.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=2.0",
        "pillow>=10.0",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tomli-w>=1.0",
    ],
    extras_require={
        # Both give the module nvidia.dali: install one of the two, never both.
        "dali": ["nvidia-dali-cuda120>=2.0"],
        "dali-cuda13": ["nvidia-dali-cuda130>=2.0"],
        "digits": ["scikit-learn>=1.4"],
        # Of fastimagenet.export; timm loads its folders.
        "export": EXPORT,
        # Shards at a URL: s3:// with this, gs:// with gcsfs, hf:// with huggingface_hub beside it.
        "remote": ["fsspec>=2024.6", "s3fs>=2024.6"],
        # What train --log writes to.
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.14"],
        # Networks of timm, model = "timm:NAME".
        "timm": ["timm>=1.0"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "setuptools>=77",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-tqdm",
            # Runs the notebooks in examples/.
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "scikit-learn>=1.4",
            "torchmetrics>=1.4",
            "tensorboard>=2.16",
            "wandb>=0.17",
            "mlflow-skinny>=2.14",
            *EXPORT,
            # A client and a server of the S3 protocol.
            "s3fs>=2024.6",
            "moto[s3]>=5.0",
            "flask>=3.0",
            "flask-cors>=5.0",
            # Reads the Kubernetes job in examples/.
            "pyyaml>=6.0",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
