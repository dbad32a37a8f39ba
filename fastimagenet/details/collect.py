"""Collect what an evaluation gives for each image, on any number of processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastimagenet.details.outcomes import Outcomes
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.world import World
from fastimagenet.training.evaluation import best_classes


class Collector:
    """A consumer of `evaluate`: keeps five numbers an image on the device, without a wait."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        """(5, B) each, float64, which holds float32 and labels exactly."""

    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch of logits (B, C) float32 and labels (B,)."""
        best, p = best_classes(logits, 1)[:, 0], logits.softmax(dim=1)
        rows = (
            labels,
            best,
            p.gather(1, best.clamp(min=0)[:, None])[:, 0],
            p.gather(1, labels[:, None])[:, 0],
            cross_entropy(logits, labels, reduction="none"),
        )
        self.batches.append(torch.stack([row.double() for row in rows]))

    def outcomes(self, world: World, classes: tuple[str, ...]) -> Outcomes:
        """Gather those of all processes, in the order of the split; each has to call it."""
        own = torch.cat([torch.zeros(5, 0).double(), *(batch.cpu() for batch in self.batches)], 1)
        parts = gather_objects(own.numpy(), world, "the outcomes of all images")
        labels, predicted, p, p_true, loss = np.concatenate(parts, axis=1)
        return Outcomes(
            classes=classes,
            labels=labels.astype(np.int64),
            predicted=predicted.astype(np.int64),
            p=p,
            p_true=p_true,
            loss=loss,
        )
