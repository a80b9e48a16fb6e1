"""The work of a plan as an ordered list of slabs: what to read, and what to do with it."""

import math
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.run.copies import join_copies
from convert_ckpt.run.places import Places
from convert_ckpt.source.shards import FetchStep
from run_ckpt.contract.manifest import WEIGHT
from run_ckpt.storage.reader import cut_bytes

# Unless one tile of rows is larger: large enough to hide the cost of a call, small enough that what one core reads,
# hashes, quantizes and writes stays in its share of the caches (per-tensor FP8: 8 MiB took 60 % more CPU time).
SLAB_NBYTES = 2 * 2**20
# A weight that is stored transposed is read in more at once: a column for each row of it, so the longer the better.
_SLABS_OF_COLUMNS = 4
# What one preadv fills: Linux takes 1024 buffers. A hundred already hide the cost of a turn.
_SLABS_AT_ONCE = 128
# Two encodes per scan, so the backlog shrinks.
_ENCODES_PER_SCAN = 2

Action = Literal["copy", "quantize", "scan", "encode", "decode", "store", "hash"]


@dataclass(frozen=True, slots=True)
class Slab:
    """``nbytes`` bytes of a source tensor from byte ``start``; rows from ``row`` on if it is a weight or folded.

    They lie at ``offset`` in the shard. copy and quantize read and write; a weight with a scale of its own that is no
    single slab, or shares that scale, is read twice, to scan its amax and to encode it; codes that are there already
    are decoded, or stored as they are, with scales that are read beside them; hash reads what has no place in the
    output. ``hash_order`` numbers the slabs that together are all bytes of a source shard; it is None for a second
    reading, and for one of a shard that is no file of the plan. A weight that is stored transposed is read twice, as
    its rows are no bytes in order: its matrix is hashed, then its columns are read. ``outputs`` are the files it
    writes to, or that wait for its hash: none if only the scan is needed, two where another file repeats its scale. A
    layer with statistics is quantized or encoded as one slab. ``others`` are whole tensors that are copied with it: in
    the shard and in the file they lie one behind the other, and have the same dtype.
    """

    action: Action
    tensor: TensorPlan
    start: int
    nbytes: int
    row: int
    offset: int
    hash_order: int | None
    outputs: tuple[str, ...]
    others: tuple[TensorPlan, ...] = ()

    def separate(self, data: np.ndarray) -> Iterator[tuple["Slab", np.ndarray]]:
        """Yield a slab for each tensor, with its part of ``data``, uint8, which was made of the slab."""
        if not self.others:
            yield self, data
            return
        start = 0
        for tensor in (self.tensor, *self.others):
            nbytes = tensor.view.nbytes
            part = replace(self, tensor=tensor, nbytes=nbytes, offset=self.offset + start, others=())
            yield part, data[start : start + nbytes]
            start += nbytes

    @property
    def shards(self) -> frozenset[str]:
        """What it reads: its own shard, and those with the scales of its codes."""
        encoded = self.tensor.encoded
        return encoded.shards if encoded else frozenset({self.tensor.shard})

    @property
    def work_nbytes(self) -> int:
        """What it counts for in the progress: what is only scanned or hashed is no work of its own."""
        return 0 if self.action in ("scan", "hash") else self.nbytes


def narrow(plan: Plan, names: Collection[str], known_groups: Collection[str]) -> Plan:
    """Return what of a plan it takes to make the files ``names``: their tensors, and others that they depend on.

    These are the layers whose scale one of the files repeats, and the members of a scale group whose amax isn't known.
    Statistics choose no codes of theirs.
    """
    files = tuple(file for file in plan.files if file.name in names)
    shards = {shard for file in files for shard in file.source_shards}
    stored = {tensor.spec.name for file in files for tensor in file.header.tensors}
    fused = {name: scale for name, scale in plan.manifest.fused_scales.items() if name in stored}
    repeated = {member for scale in fused.values() for member in scale.members}

    def is_needed(tensor: TensorPlan) -> bool:
        return tensor.shard in shards or bool(tensor.layer and tensor.layer.module in repeated)

    groups = {scale_group(tensor) for tensor in plan.tensors if is_needed(tensor)} - {None, *known_groups}
    tensors = tuple(
        tensor if tensor.shard in shards else replace(tensor, statistics=None)
        for tensor in plan.tensors
        if is_needed(tensor) or scale_group(tensor) in groups
    )
    layers = {tensor.layer.module: tensor.layer for tensor in tensors if tensor.layer}
    manifest = replace(plan.manifest, layers=layers, fused_scales=fused, kept={}, unquantized_linears={})
    unused = tuple(tensor for tensor in plan.unused if tensor.shard in shards)
    statistics = {module: found for module, found in plan.statistics.items() if module in layers}
    return replace(plan, tensors=tensors, files=files, manifest=manifest, unused=unused, statistics=statistics)


def scale_group(tensor: TensorPlan) -> str | None:
    """Return the name under which a weight shares the scale of the whole tensor, None where there is none."""
    layer = tensor.layer
    if layer is None or not layer.scheme.has_tensor_scale or tensor.is_passed_through:
        return None
    return layer.fused_group or layer.module


def list_slabs(plan: Plan, known_groups: Collection[str]) -> list[Slab]:
    """Return the slabs of all files of a plan, shard by shard.

    The bytes of each shard that becomes one of the files are hashed once and in order. The encoding of a scale group
    follows the scan of its last member, so that a worker that waits for a scan waits for a slab that was taken before.
    known_groups: groups whose amax is known, so that nothing is scanned.
    """
    places = Places(plan)
    hashed: dict[str, list[str]] = {}
    for file in plan.files:
        for shard in file.source_shards:
            hashed.setdefault(shard, []).append(file.name)
    unused = {tensor.spec.name for tensor in plan.unused}
    slabs: list[Slab] = []
    encodes: dict[str, list[Slab]] = {}
    n_hashed: Counter[str] = Counter()
    n_members = Counter(map(scale_group, plan.tensors))
    for tensor, *others in join_copies(plan, SLAB_NBYTES):
        names = tensor.layer.tensors.values() if tensor.layer else [tensor.spec.name]
        files = tuple(dict.fromkeys(place.file for name in names for place in places.find(name)))
        is_unused = tensor.spec.name in unused
        group, whole = None if is_unused else scale_group(tensor), bool(tensor.statistics)
        action: Action = "encode" if group else _action(tensor)
        # Each file made of a shard waits for all of its bytes, since it states the hash.
        waiting = tuple(dict.fromkeys([*files, *hashed.get(tensor.shard, ())]))
        if is_unused or not (files or (group and group not in known_groups)):
            if tensor.shard not in hashed:
                continue
            action = "hash"
        if group and group not in known_groups and files and n_members[group] == 1 and not whole and _is_small(tensor):
            action = "quantize"
        elif group and group not in known_groups:
            if files:
                encodes.setdefault(group, []).extend(
                    Slab("encode", tensor, *part, None, files) for part in split(tensor, whole=whole)
                )
            action, whole = "scan", False
        if tensor.view.columns and tensor.shard in hashed:
            for offset, nbytes in _matrix_ranges(tensor):
                slabs.append(Slab("hash", tensor, 0, nbytes, 0, offset, n_hashed[tensor.shard], waiting))
                n_hashed[tensor.shard] += 1
            if action == "hash":
                continue
        for part in split(tensor, others, whole=whole):
            order = n_hashed[tensor.shard] if tensor.shard in hashed and not tensor.view.columns else None
            slabs.append(Slab(action, tensor, *part, order, waiting, tuple(others)))
            n_hashed[tensor.shard] += order is not None
    return _with_encodes(slabs, encodes)


def _matrix_ranges(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield (offset, nbytes) of all bytes of the matrix whose columns a weight is; once for all weights of a matrix."""
    columns, spec = tensor.view.columns, tensor.spec
    if columns and columns.first == 0:
        nbytes = spec.nbytes // spec.shape[0] * columns.width * columns.n_matrices
        for start, count in cut_bytes(nbytes):
            yield columns.offset + start, count


def list_turns(slabs: list[Slab]) -> list[list[Slab]]:
    """Return the slabs in the same order, cut into what a worker takes at once: small ones of the same shards together.

    A shard may be fetched only once an earlier one is released, which the end of a turn does: no turn has both.
    """
    turns: list[list[Slab]] = []
    nbytes = 0
    for slab in slabs:
        is_full = not turns or nbytes + slab.nbytes > SLAB_NBYTES or len(turns[-1]) == _SLABS_AT_ONCE
        if is_full or slab.shards != turns[-1][0].shards:
            turns.append([])
            nbytes = 0
        turns[-1].append(slab)
        nbytes += slab.nbytes
    return turns


def _action(tensor: TensorPlan) -> Action:
    """Return what is done with a tensor that is read once."""
    if tensor.encoded and tensor.layer is None:
        return "decode"
    if tensor.is_passed_through:
        return "store"
    return "quantize" if tensor.layer else "copy"


def list_scans(plan: Plan, known_groups: Collection[str]) -> list[Plan]:
    """Return the scans, shard by shard, of those scale groups that lie in several files and whose amax isn't known.

    After them each file can be made by itself, and so can the layers of one input (layers.set_apart); each weight of
    these groups is still read twice.
    """
    file_of = plan.file_of_tensors()
    places: dict[str, set[tuple[str | None, Path | None]]] = {}
    for tensor in plan.tensors:
        if tensor.layer and (group := scale_group(tensor)) and group not in known_groups:
            path = tensor.statistics.path if tensor.statistics else None
            places.setdefault(group, set()).add((file_of.get(tensor.layer.tensors[WEIGHT]), path))
    by_shard: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if len(places.get(scale_group(tensor) or "", ())) > 1:
            by_shard.setdefault(tensor.shard, []).append(replace(tensor, statistics=None))
    nothing = narrow(plan, (), known_groups)
    return [replace(nothing, tensors=tuple(tensors)) for tensors in by_shard.values()]


def list_fetches(slabs: list[Slab]) -> list[FetchStep]:
    """Return the shards that ``slabs`` read, in order; each is fetched while the one before is worked on.

    So two are here at once. A scale group in three shards or more keeps its first ones here until its last
    has been scanned.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, slab in enumerate(slabs):
        for shard in sorted(slab.shards, key=lambda shard: shard != slab.tensor.shard):
            first.setdefault(shard, i)
            last[shard] = i
    order = list(first)
    return [
        FetchStep(shard, frozenset(done for done in order[: max(0, i - 1)] if last[done] < first[shard]))
        for i, shard in enumerate(order)
    ]


def largest_at_once(steps: list[FetchStep], nbytes: Mapping[str, int]) -> int:
    """Return how many bytes of shards are here at once, at most. ``nbytes`` maps a shard to its size."""
    here = ([step.shard for step in steps[: i + 1] if step.shard not in steps[i].after] for i in range(len(steps)))
    return max((sum(nbytes[shard] for shard in shards) for shards in here), default=0)


def _with_encodes(slabs: list[Slab], encodes: dict[str, list[Slab]]) -> list[Slab]:
    """Insert the encoding slabs of each group after its last scan, a few after each slab.

    So there is something to encode and to write while the next bytes of a shard are scanned.
    """
    last_scan = {scale_group(slab.tensor): i for i, slab in enumerate(slabs) if slab.action == "scan"}
    waiting: deque[Slab] = deque()
    merged = []
    for i, slab in enumerate(slabs):
        merged.append(slab)
        group = scale_group(slab.tensor)
        if group and last_scan.get(group) == i:
            waiting += encodes.get(group, ())
        merged += [waiting.popleft() for _ in range(min(_ENCODES_PER_SCAN, len(waiting)))]
    return [*merged, *waiting]


def _is_small(tensor: TensorPlan) -> bool:
    """True where a tensor is one slab, whatever becomes of it."""
    return not tensor.view.pieces and 2 * max(tensor.view.nbytes, tensor.spec.nbytes) <= SLAB_NBYTES


def split(
    tensor: TensorPlan, others: Sequence[TensorPlan] = (), *, whole: bool = False
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (start, nbytes, row, offset in the shard) of the slabs of a tensor, in the order of the shard.

    others: those of the one slab that it is copied in. whole: as one slab. An empty tensor is one too.
    """
    if others:
        yield 0, sum(each.view.nbytes for each in (tensor, *others)), 0, tensor.view.offset
        return
    if _is_small(tensor):
        yield 0, tensor.view.nbytes, 0, tensor.view.offset
        return
    step, row_nbytes = SLAB_NBYTES, 0
    layers = [layer for layer in (tensor.layer, tensor.encoded and tensor.encoded.layer) if layer]
    if tensor.view.columns:
        step *= _SLABS_OF_COLUMNS
    if layers or tensor.fold or tensor.view.columns:
        n_rows = tensor.spec.shape[0]
        row_nbytes = tensor.view.nbytes // n_rows
        multiple = math.lcm(*(layer.scheme.row_multiple for layer in layers))
        # As many rows of codes as of what they stand for.
        step = max(1, step // (tensor.spec.nbytes // n_rows * multiple)) * multiple * row_nbytes
    if whole:
        step = max(1, tensor.view.nbytes)
    first_bytes = accumulate((length for _, length in tensor.view.ranges), initial=0)
    for (offset, length), first in sorted(zip(tensor.view.ranges, first_bytes, strict=False)):
        for at in range(0, max(length, 1), step):
            row = (first + at) // row_nbytes if row_nbytes else 0
            yield first + at, min(step, length - at), row, offset + at
