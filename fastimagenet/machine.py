"""What a command sets for its process before torch is imported: memory, threads, messages."""

from __future__ import annotations

import ctypes
import logging
import os

from pipelines.cgroup import cpu_quota
from pipelines.workers import num_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As <malloc.h> has them."""


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation; without glibc do nothing.

    By default it gives large blocks back, and the kernel maps and clears their pages anew: every
    activation of every step. speednet in batches of 1,000 in bf16, two cores of an AMD EPYC: 534
    images/s in place of 468 at 32 px, 989 in place of 889 at 24 px (2026-11-26).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def spin_briefly() -> None:
    """Have OpenMP's threads, torch's on a CPU, sleep soon while they wait for one another.

    By default they spin 300,000 times first (libgomp), which on a loaded machine takes the cores
    from those that they wait for; 1,000 times cover the gaps within a step. Does nothing where the
    user has set how they wait; has to come before torch is imported. The digits' step (smallnet,
    24 px, batch 64, two threads on two cores of an AMD EPYC without AVX-512, torch 2.14.1), against
    the default: .97 and 1.04 of its time on an idle machine, .66 beside three busy processes
    (2026-11-29).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


ASKED_THREADS = os.environ.get("OMP_NUM_THREADS")
"""What the user has set, if anything."""


def share_out_quota() -> None:
    """Have OpenMP start no more threads than a container's CPU quota feeds.

    It counts the host's cores, and threads beyond the quota are stopped for most of every tenth of
    a second. Has to come before torch is imported.
    """
    if ASKED_THREADS is None and cpu_quota() is not None:
        os.environ["OMP_NUM_THREADS"] = str(num_cores())


def silence_libraries() -> None:
    """Have the C++ of torch and gloo keep to themselves what they say of connections.

    They warn of every process that ends before another one, with stack traces, and what matters
    comes as an exception. Does nothing where the user has set a level; has to come before torch is
    imported. torch's compiler says that there is no CUDA, matplotlib that there is no home.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for name in ("torch.utils.cpp_extension", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
