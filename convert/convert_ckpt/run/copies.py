"""Tensors that are copied together: in a checkpoint of very many small ones, one by one is most of the work."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from convert_ckpt.plan.plan import Plan, TensorPlan


def join_copies(plan: Plan, max_nbytes: int) -> Iterator[list[TensorPlan]]:
    """Yield the tensors by shard and offset: one by one, or as many as are copied as ``max_nbytes`` in a row."""
    tensors: Iterable[TensorPlan] = plan.tensors
    if plan.unused:
        tensors = sorted([*tensors, *plan.unused], key=lambda tensor: (tensor.shard, tensor.view.offset))
    behind = {a.spec.name: b.spec.name for file in plan.files for a, b in pairwise(file.header.tensors)}
    joined: list[TensorPlan] = []
    nbytes = 0
    for tensor in tensors:
        nbytes += tensor.view.nbytes
        if not joined or nbytes > max_nbytes or not _is_behind(joined[-1], tensor, behind):
            if joined:
                yield joined
            joined, nbytes = [], tensor.view.nbytes
        joined.append(tensor)
    if joined:
        yield joined


def _is_behind(before: TensorPlan, tensor: TensorPlan, behind: Mapping[str, str]) -> bool:
    """True where both are copied as they are, and the second lies right behind the first in its shard and its file."""
    return (
        before.view.offset + before.view.nbytes == tensor.view.offset
        and before.shard == tensor.shard
        and before.spec.dtype == tensor.spec.dtype
        and before.is_copy
        and tensor.is_copy
        and behind.get(before.spec.name) == tensor.spec.name
    )
