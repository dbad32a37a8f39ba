"""`--deterministic`: the same bits from every run, or one line that says what cannot give them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from fastimagenet.recipes.recipe import Recipe
from pipelines.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that cuBLAS reads when CUDA starts."""
REPEATABLE = (":4096:8", ":16:8")
"""Its values with which cuBLAS repeats itself."""
NO_IMPLEMENTATION = re.compile(r"(\S+) does not have a deterministic implementation")
"""Words of torch's error, which has no class of its own."""


@contextmanager
def deterministic(asked: bool, recipe: Recipe) -> Iterator[None]:
    """Have torch repeat itself bit for bit in the block, if `asked`; restores its settings.

    On the same machine, that is, with the same number of processes and threads. Has to begin before
    CUDA does. Raises UserError where torch has one algorithm only and that one does not repeat
    itself, with the name of the operation.
    """
    if not asked:
        yield
        return
    set_before = os.environ.get(WORKSPACE)
    if set_before is not None and set_before not in REPEATABLE:
        raise UserError(
            f"environment variable {WORKSPACE} must be {' or '.join(REPEATABLE)} for "
            f"--deterministic, not {set_before!r}"
        )
    import torch

    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    was_on = torch.are_deterministic_algorithms_enabled()
    os.environ[WORKSPACE] = set_before or REPEATABLE[0]
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    except Exception as error:
        if (operation := without_algorithm(error)) is None:
            raise
        raise UserError(
            f"--deterministic: torch has no deterministic {operation}, which recipe field model = "
            f"{recipe.model!r} needs on this device: --set model= another network, or leave "
            "--deterministic out"
        ) from error
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(was_on)
        if set_before is None:
            del os.environ[WORKSPACE]


def without_algorithm(error: BaseException) -> str | None:
    """Name the operation of which the error, or one that led to it, says that it does not repeat
    itself; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if found := NO_IMPLEMENTATION.search(str(seen)):
            return found[1]
        seen = seen.__cause__ or seen.__context__
    return None
