"""Work on several tensors at once: one Python thread a core, one torch thread in each."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# Bounds the memory for slabs; beyond this the disk is the limit.
_MOST_THREADS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return ``function`` of every item, in order. Raises the first error.

    torch's own threads are off meanwhile: on a slab of a MiB their hand-over costs more than it
    saves, and where other processes share the cores it was measured 10 times slower.
    """
    n_torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(n_torch_threads)
