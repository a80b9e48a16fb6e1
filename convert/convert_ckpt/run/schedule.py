"""The work of a plan as an ordered list of slabs: what to read, and what to do with it."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.source.shards import FetchStep
from run_ckpt.contract.tensors import DTYPE_BITS

# Unless one tile of rows is larger: large enough to hide the cost of a call, small enough for the caches.
SLAB_NBYTES = 8 * 2**20
# More than one, so that what waits to be encoded becomes less.
_ENCODES_PER_SCAN = 2

Action = Literal["copy", "quantize", "scan", "encode"]


@dataclass(frozen=True)
class Slab:
    """``nbytes`` bytes of a source tensor from byte ``start``; rows from ``row`` on if it is a weight.

    copy and quantize read and write; a per-tensor FP8 weight is read twice, to scan its amax and to
    encode it. ``turn`` numbers the slabs that together are all bytes of a source shard, in order; it
    is None for a second reading. ``outputs`` are the files it writes to, its own first: none if only the
    scan is needed, two where another file repeats its scale.
    """

    action: Action
    tensor: TensorPlan
    start: int
    nbytes: int
    row: int
    turn: int | None
    outputs: tuple[str, ...]

    @property
    def offset(self) -> int:
        """Where the slab begins in its shard."""
        return self.tensor.stored.offset + self.start

    @property
    def replaced(self) -> range:
        """The bytes of its shard that may leave the page cache once it is done: as many as its tensor becomes.

        They begin before the slab, as the kernel keeps a group of pages of which it is told to drop a part.
        """
        if self.action == "scan":
            return range(0)
        first = self.tensor.stored.offset
        stop = min(self.start + self.nbytes, self.tensor.output_nbytes)
        return range(first + max(0, self.start - SLAB_NBYTES), first + stop) if stop > self.start else range(0)


Batch = tuple[Slab, ...]


@dataclass(frozen=True)
class FusedPlace:
    """Where a scale is repeated: at byte ``offset`` of the fused ``tensor`` in ``file``."""

    file: str
    tensor: str
    offset: int


def fused_places(plan: Plan) -> dict[str, FusedPlace]:
    """Return scale tensor -> the place that repeats it (manifest.fused_scales)."""
    file_of = plan.file_of_tensors()
    places = {}
    for fused in plan.manifest.fused_scales.values():
        offset = 0
        for member in fused.members:
            spec = plan.manifest.layers[member].specs()[fused.role]
            places[spec.name] = FusedPlace(file_of[fused.spec.name], fused.spec.name, offset)
            offset += spec.nbytes
    return places


def still_finished(plan: Plan, finished: set[str]) -> set[str]:
    """Return the finished files less those that have yet to repeat a scale in an unfinished one."""
    file_of = plan.file_of_tensors()
    owing = {file_of[name] for name, place in fused_places(plan).items() if place.file not in finished}
    return finished - owing


def scale_group(tensor: TensorPlan) -> str | None:
    """Return the name under which a per-tensor FP8 weight shares its scale, None for all others."""
    layer = tensor.layer
    if layer is None or not layer.scheme.has_tensor_scale:
        return None
    return layer.fused_group or layer.module


def list_slabs(plan: Plan, finished: set[str], known_groups: set[str], n_at_once: int) -> list[Slab]:
    """Return the slabs of all output files that are not ``finished``, in reading order.

    Each shard's bytes pass by once and in order; the encoding of a scale group follows the scan of
    its last member, so that whoever waits for a scan waits for a slab that was taken before.
    known_groups: groups whose amax is known from an earlier run. n_at_once: how many shards are read side by side.
    """
    output_of = {shard: file.name for file in plan.files for shard in file.source_shards}
    places = fused_places(plan)

    def outputs(tensor: TensorPlan) -> tuple[str, ...]:
        names = tensor.layer.tensors.values() if tensor.layer else ()
        repeated = [places[name].file for name in names if name in places and places[name].file not in finished]
        return tuple(dict.fromkeys([output_of[tensor.shard], *repeated]))

    members: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if group := scale_group(tensor):
            members.setdefault(group, []).append(tensor)
    rescanned = {
        group
        for group, tensors in members.items()
        if group not in known_groups and any(output_of[tensor.shard] not in finished for tensor in tensors)
    }
    by_shard: dict[str, list[Slab]] = {}
    encodes: dict[str, list[Slab]] = {group: [] for group in members}
    for tensor in plan.tensors:
        slabs = by_shard.setdefault(tensor.shard, [])
        group = scale_group(tensor)
        if output_of[tensor.shard] not in finished:
            files = outputs(tensor)
            action: Action = "copy" if tensor.layer is None else "scan" if group else "quantize"
            slabs += [Slab(*cut, turn, files) for turn, cut in enumerate(_cut(action, tensor), len(slabs))]
            if group:
                encodes[group] += [Slab(*cut, None, files) for cut in _cut("encode", tensor)]
        elif group in rescanned:
            slabs += [Slab(*cut, None, ()) for cut in _cut("scan", tensor)]
    return _with_encodes(_interleave(list(by_shard.values()), n_at_once), encodes, n_at_once)


def list_batches(slabs: list[Slab], n_lanes: int) -> list[Batch]:
    """Return the slabs, in order, in batches of up to ``n_lanes`` that are hashed in one step.

    Those are of different shards; what is not hashed is a batch of its own.
    """
    batches: list[list[Slab]] = []
    for slab in slabs:
        last = batches[-1] if batches else []
        joins = 0 < len(last) < n_lanes and slab.turn is not None and last[0].turn is not None
        if joins and slab.tensor.shard not in {other.tensor.shard for other in last}:
            last.append(slab)
        else:
            batches.append([slab])
    return [tuple(batch) for batch in batches]


def list_fetches(slabs: list[Slab]) -> list[FetchStep]:
    """Return the shards that ``slabs`` read, in order; each is fetched while the one before is worked on.

    So two are here at once. A scale group in three shards or more keeps its first ones here until its last
    has been scanned.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, slab in enumerate(slabs):
        first.setdefault(slab.tensor.shard, i)
        last[slab.tensor.shard] = i
    order = list(first)
    return [
        FetchStep(shard, frozenset(done for done in order[: max(0, i - 1)] if last[done] < first[shard]))
        for i, shard in enumerate(order)
    ]


def largest_at_once(steps: list[FetchStep], nbytes: Mapping[str, int]) -> int:
    """Return how many bytes of shards are here at once, at most. ``nbytes`` maps a shard to its size."""
    here = ([step.shard for step in steps[: i + 1] if step.shard not in steps[i].after] for i in range(len(steps)))
    return max((sum(nbytes[shard] for shard in shards) for shards in here), default=0)


def _interleave(lists: list[list[Slab]], n_at_once: int) -> list[Slab]:
    """Merge by taking turns among ``n_at_once`` lists; one that ends makes room for the next."""
    waiting = [iter(slabs) for slabs in lists]
    active = [waiting.pop(0) for _ in range(min(n_at_once, len(waiting)))]
    merged = []
    while active:
        for slabs in list(active):
            slab = next(slabs, None)
            if slab is not None:
                merged.append(slab)
            else:
                active.remove(slabs)
                active += [waiting.pop(0)] if waiting else []
    return merged


def _with_encodes(slabs: list[Slab], encodes: dict[str, list[Slab]], n_at_once: int) -> list[Slab]:
    """Insert the encoding slabs of each group after its last scan, a few after each round of ``n_at_once`` slabs.

    So there is something to encode and to write while a shard's next bytes are hashed. Groups take turns, as they
    often write to different files.
    """
    last_scan = {scale_group(slab.tensor): i for i, slab in enumerate(slabs) if slab.action == "scan"}
    waiting: deque[Iterator[Slab]] = deque()

    def take_turns() -> Iterator[Slab]:
        while waiting:
            group = waiting.popleft()
            for slab in islice(group, 1):
                waiting.append(group)
                yield slab

    merged = []
    for i, slab in enumerate(slabs):
        merged.append(slab)
        group = scale_group(slab.tensor)
        if group and last_scan.get(group) == i:
            waiting.append(iter(encodes[group]))
        if (i + 1) % n_at_once == 0:
            merged += islice(take_turns(), _ENCODES_PER_SCAN * n_at_once)
    return [*merged, *take_turns()]


def _cut(action: Action, tensor: TensorPlan) -> Iterator[tuple[Action, TensorPlan, int, int, int]]:
    """Yield (action, tensor, start, nbytes, row). An empty tensor is one empty slab."""
    nbytes = tensor.spec.nbytes
    step, row_nbytes = SLAB_NBYTES, 0
    if tensor.layer:
        row_nbytes = tensor.layer.K * DTYPE_BITS[tensor.spec.dtype] // 8
        multiple = tensor.layer.scheme.row_multiple
        step = max(1, SLAB_NBYTES // (row_nbytes * multiple)) * multiple * row_nbytes
    for start in range(0, max(nbytes, 1), step):
        row = start // row_nbytes if row_nbytes else 0
        yield action, tensor, start, min(step, nbytes - start), row
