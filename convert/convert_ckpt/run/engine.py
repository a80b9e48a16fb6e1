"""Run a plan's slabs on worker threads: read, hash, quantize, write; shards finish as they fill up."""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert_ckpt.plan.plan import FilePlan, Plan, TensorPlan
from convert_ckpt.run.buffers import Scratch
from convert_ckpt.run.digest import choose_hasher
from convert_ckpt.run.finish import FileHashing
from convert_ckpt.run.readers import Sources
from convert_ckpt.run.schedule import (
    Batch,
    Slab,
    fused_places,
    list_batches,
    list_slabs,
    scale_group,
    still_finished,
)
from convert_ckpt.run.slab import (
    Errors,
    Piece,
    fp8_scales,
    is_finite,
    largest_magnitude,
    quantize,
    weight_bits,
)
from convert_ckpt.run.wait import Gate
from convert_ckpt.source.shards import LocalShards, ShardProvider
from run_ckpt.contract.errors import NonFiniteError
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, sqnr_db
from run_ckpt.progress import Progress
from run_ckpt.storage.shards import Shard
from run_ckpt.storage.writer import ShardWriter

# All workers' slabs together.
_IN_FLIGHT_NBYTES = 384 * 2**20
# How many batches ahead of the workers the disk is told what will be read.
_READ_AHEAD = 16
# Output shards that are made durable side by side.
_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class FileRecord:
    """What is known of a finished output file: what the manifest needs, and the amax of its groups."""

    file: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    sources: dict[str, dict[str, Any]]
    group_amax: dict[str, int]


class Engine:
    """One component's conversion. ``on_file`` is called for each finished file; ``progress`` is told the rest.

    ``supply`` brings the shards; by default they are where they say.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Iterable[Shard],
        folder: Path,
        finished: dict[str, FileRecord],
        on_file: Callable[[str, FileRecord], None],
        progress: Progress,
        supply: ShardProvider | None = None,
    ):
        shards = tuple(shards)
        supply = supply or LocalShards(shards)
        self._plan = plan
        self._folder = folder
        self._on_file = on_file
        self._progress = progress
        done = still_finished(plan, set(finished))
        self._files = {file.name: file for file in plan.files if file.name not in done}
        self._amax = {group: bits for record in finished.values() for group, bits in record.group_amax.items()}
        self._hasher = choose_hasher(1 if supply.one_at_a_time else len(self._files))
        n_at_once = 1 if supply.one_at_a_time else self._hasher.n_lanes * self._hasher.n_chains
        self._slabs = list_slabs(plan, done, set(self._amax), n_at_once)
        self._batches = list_batches(self._slabs, self._hasher.n_lanes)
        self._fused = {name: place for name, place in fused_places(plan).items() if place.file in self._files}

        self._gate = Gate()
        self._lock = threading.Lock()
        self._sources = Sources(shards, supply, self._hasher, self._slabs, self._gate)
        self._next_batch = 0
        self._unscanned = Counter(_group(slab) for slab in self._slabs if slab.action == "scan")
        self._unfinished = Counter(name for slab in self._slabs for name in slab.outputs)
        self._errors: defaultdict[str, list[Errors]] = defaultdict(list)
        self._writers: dict[str, ShardWriter] = {}
        self._finishing: list[Future[None]] = []

    @property
    def progress_nbytes(self) -> int:
        """The sum of what ``progress`` will be told."""
        return sum(_progress(slab) for slab in self._slabs)

    def run(self, n_workers: int) -> None:
        """Convert everything that is not finished. Raises the first error of any worker."""
        largest = max((sum(slab.nbytes for slab in batch) for batch in self._batches), default=1)
        n_workers = max(1, min(n_workers, _IN_FLIGHT_NBYTES // max(largest, 1)))
        self._sources.start()
        try:
            # Leaving waits for whatever is still being finished, so that no file is closed under it.
            with (
                ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="flush") as self._background,
                FileHashing(self._hasher) as self._hashing,
                ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="finish") as self._finisher,
            ):
                for batch in self._batches[:_READ_AHEAD]:
                    self._sources.announce(batch)
                threads = [threading.Thread(target=self._work, daemon=True) for _ in range(n_workers)]
                for thread in threads:
                    thread.start()
                self._wait(threads)
        finally:
            self._sources.close()
            for writer in self._writers.values():
                writer.close()
        if self._gate.failure:
            raise self._gate.failure

    def _wait(self, threads: list[threading.Thread]) -> None:
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
            for future in self._finishing:
                future.result()
        except BaseException as error:  # Ctrl-C too: let the workers end before files are closed
            self._fail(error)
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        scratch = Scratch()
        while batch := self._take():
            try:
                self._process(batch, scratch)
            except BaseException as error:
                self._fail(error)

    def _take(self) -> Batch:
        with self._gate.changing():
            if self._gate.failure or self._next_batch == len(self._batches):
                return ()
            self._next_batch += 1
            position = self._next_batch - 1
        for batch in self._batches[position + _READ_AHEAD : position + _READ_AHEAD + 1]:
            self._sources.announce(batch)
        return self._batches[position]

    def _fail(self, error: BaseException) -> None:
        self._gate.fail(error)
        self._sources.stop()

    def _process(self, batch: Batch, scratch: Scratch) -> None:
        raws = [scratch.take_to_read(f"source {i}", slab.nbytes, slab.offset) for i, slab in enumerate(batch)]
        for slab, raw in zip(batch, raws, strict=True):
            self._sources.read(slab, raw)
        self._sources.hash(batch, raws)
        for slab, raw in zip(batch, raws, strict=True):
            if slab.action == "copy":
                self._write(slab, slab.tensor.spec.name, slab.start, raw)
            elif slab.action == "scan":
                self._scan(slab, raw)
            else:
                self._quantize(slab, raw, scratch)
            self._progress.advance(_progress(slab))
            self._sources.count(slab)
            for name in slab.outputs:
                self._count_down(name)

    def _scan(self, slab: Slab, raw: np.ndarray) -> None:
        assert slab.tensor.layer is not None
        largest = largest_magnitude(weight_bits(raw, slab.tensor.spec.dtype, slab.tensor.layer.K))
        self._check_finite(slab.tensor, largest)
        group = _group(slab)
        with self._gate.changing():
            self._amax[group] = max(self._amax.get(group, 0), largest)
            self._unscanned[group] -= 1

    def _quantize(self, slab: Slab, raw: np.ndarray, scratch: Scratch) -> None:
        layer = slab.tensor.layer
        assert layer is not None
        bits = weight_bits(raw, slab.tensor.spec.dtype, layer.K)
        file_offset = self._writer(slab.outputs[0]).offset(layer.tensors[WEIGHT])
        scale = self._tensor_scale(slab) if slab.action == "encode" else None
        pieces, errors, largest = quantize(bits, layer, slab.row, scratch, file_offset, scale)
        self._check_finite(slab.tensor, largest)
        if not math.isfinite(errors.largest):
            raise NonFiniteError(
                f"{slab.tensor.shard}: {slab.tensor.spec.name}: its largest magnitude rounds to a value beyond float32."
                " Repair the source, or keep this layer with --ignore."
            )
        if slab.row == 0 and INPUT_SCALE in layer.tensors:
            pieces.append(Piece(INPUT_SCALE, 0, self._plan.input_scales[layer.module].reshape(1)))
        for piece in pieces:
            self._write(slab, layer.tensors[piece.role], piece.offset, piece.data)
        with self._lock:
            self._errors[layer.module].append(errors)

    def _tensor_scale(self, slab: Slab) -> np.ndarray:
        group = _group(slab)
        self._gate.wait_until(lambda: self._unscanned[group] == 0)
        return fp8_scales(np.array([self._amax[group]], np.uint32))

    def _write(self, slab: Slab, name: str, offset: int, data: np.ndarray) -> None:
        """Write to the tensor, and to the fused tensor that repeats it if there is one."""
        self._writer(slab.outputs[0]).write(name, offset, data.data)
        if name in self._fused:
            place = self._fused[name]
            self._writer(place.file).write(place.tensor, place.offset + offset, data.data)

    def _writer(self, name: str) -> ShardWriter:
        with self._lock:
            if name not in self._writers:
                path = self._folder / name
                self._writers[name] = ShardWriter(path, self._files[name].header, self._background)
            return self._writers[name]

    def _check_finite(self, tensor: TensorPlan, largest: int) -> None:
        if not is_finite(largest):
            raise NonFiniteError(self._sources.describe_nonfinite(tensor))

    def _count_down(self, name: str) -> None:
        with self._lock:
            self._unfinished[name] -= 1
            if self._unfinished[name] == 0:
                self._finishing.append(self._finisher.submit(self._finish, self._files[name]))

    def _finish(self, file: FilePlan) -> None:
        """Close an output file whose slabs are all written, and report it."""
        try:
            nbytes, digest = self._writer(file.name).finish(self._hashing.hash_file)
            tensors = [t for t in self._plan.tensors if t.shard in file.source_shards and t.layer]
            record = FileRecord(
                file={"nbytes": nbytes, "sha256": digest},
                layers={t.layer.module: _measure(self._errors[t.layer.module]) for t in tensors if t.layer},
                sources={name: self._sources.describe(name) for name in file.source_shards},
                group_amax={group: self._amax[group] for t in tensors if (group := scale_group(t))},
            )
            self._on_file(file.name, record)
        except BaseException as error:
            self._fail(error)
            raise


def _group(slab: Slab) -> str:
    group = scale_group(slab.tensor)
    assert group is not None
    return group


def _progress(slab: Slab) -> int:
    """A weight that is read twice counts by halves."""
    return slab.nbytes // 2 if slab.action in ("scan", "encode") else slab.nbytes


def _measure(errors: list[Errors]) -> dict[str, Any]:
    # fsum is exact, so that the order in which the slabs were done leaves no trace.
    signal = math.fsum(part.squared_signal for part in errors)
    error = math.fsum(part.squared_error for part in errors)
    return {"sqnr_db": sqnr_db(signal, error), "max_abs_error": max(part.largest for part in errors)}
