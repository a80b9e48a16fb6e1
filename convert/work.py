"""The work of a plan as an ordered list of slabs: what to read, and what to do with it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from convert.plan import Plan, TensorPlan
from convert.quantize import slab_row_multiple
from runtime.contract.header import DTYPE_BITS

# Large enough to hide the cost of a call, small enough to stay in a core's share of cache and RAM.
SLAB_NBYTES = 8 * 2**20

Action = Literal["copy", "quantize", "scan", "encode"]


@dataclass(frozen=True)
class Slab:
    """``nbytes`` bytes of a source tensor from byte ``start``; rows from ``row`` on if it is a weight.

    copy and quantize read and write; a per-tensor FP8 weight is read twice, to scan its amax and to
    encode it. ``turn`` numbers the slabs that together are all bytes of a source shard, in order; it
    is None for a second reading. ``output`` is the output file, None if only the scan is needed.
    """

    action: Action
    tensor: TensorPlan
    start: int
    nbytes: int
    row: int
    turn: int | None
    output: str | None


def scale_group(tensor: TensorPlan) -> str | None:
    """Return the name under which a per-tensor FP8 weight shares its scale, None for all others."""
    layer = tensor.layer
    if layer is None or layer.granularity != "tensor":
        return None
    return layer.fused_group or layer.module


def list_slabs(plan: Plan, finished: set[str], known_groups: set[str]) -> list[Slab]:
    """Return the slabs of all output files that are not ``finished``, in reading order.

    Shard by shard and by offset, so that a shard's bytes pass by once and in order; the encoding of a
    scale group follows the scan of its last member. known_groups: groups whose amax is known.
    """
    output_of = {shard: file.name for file in plan.files for shard in file.source_shards}
    members: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        group = scale_group(tensor)
        if group:
            members.setdefault(group, []).append(tensor)
    wanted = {g: any(output_of[t.shard] not in finished for t in tensors) for g, tensors in members.items()}
    slabs: list[Slab] = []
    turns: dict[str, int] = {}
    for tensor in plan.tensors:
        output = output_of[tensor.shard]
        group = scale_group(tensor)
        if output not in finished:
            action: Action = "copy" if tensor.layer is None else "scan" if group else "quantize"
            for slab in _cut(action, tensor):
                turn = turns.get(tensor.shard, 0)
                turns[tensor.shard] = turn + 1
                slabs.append(Slab(*slab, turn, output))
        elif group and wanted[group] and group not in known_groups:
            slabs += [Slab(*slab, None, None) for slab in _cut("scan", tensor)]
        if group and tensor is members[group][-1]:
            for member in members[group]:
                member_output = output_of[member.shard]
                if member_output not in finished:
                    slabs += [Slab(*slab, None, member_output) for slab in _cut("encode", member)]
    return slabs


def _cut(action: Action, tensor: TensorPlan) -> Iterator[tuple[Action, TensorPlan, int, int, int]]:
    """Yield (action, tensor, start, nbytes, row). An empty tensor is one empty slab."""
    nbytes = tensor.spec.nbytes
    step, row_nbytes = SLAB_NBYTES, 0
    if tensor.layer:
        row_nbytes = tensor.layer.K * DTYPE_BITS[tensor.spec.dtype] // 8
        multiple = slab_row_multiple(tensor.layer)
        step = max(1, SLAB_NBYTES // (row_nbytes * multiple)) * multiple * row_nbytes
    for start in range(0, max(nbytes, 1), step):
        row = start // row_nbytes if row_nbytes else 0
        yield action, tensor, start, min(step, nbytes - start), row


def largest_slab_nbytes(slabs: list[Slab]) -> int:
    return max((slab.nbytes for slab in slabs), default=0)


def sqnr_db(squared_signal: float, squared_error: float) -> float | None:
    """Return 10 log10(signal / error) to two decimals, None where either is zero."""
    if squared_signal == 0 or squared_error == 0:
        return None
    return round(10 * math.log10(squared_signal / squared_error), 2)
