"""Work on several tensors at once: one Python thread a core, one torch thread in each."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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
    todo = list(items)
    results: list[Any] = [None] * len(todo)
    # Each thread takes the next one: a future for each of very many small tensors is most of the work and memory.
    numbers = iter(range(len(todo)))

    def take_no_more() -> None:
        deque(numbers, maxlen=0)

    def work() -> None:
        try:
            for number in numbers:
                results[number] = function(todo[number])
        except BaseException:
            take_no_more()
            raise

    n_threads, n_torch_threads = min(_MOST_THREADS, os.cpu_count() or 1), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            try:
                for done in [pool.submit(work) for _ in range(n_threads)]:
                    done.result()
            finally:  # Ctrl-C too
                take_no_more()
    finally:
        torch.set_num_threads(n_torch_threads)
    return results
