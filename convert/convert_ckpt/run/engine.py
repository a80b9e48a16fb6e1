"""Run a plan's slabs on worker threads: read, hash, quantize, write; shards finish as they fill up.

    slabs in one order: shard by shard, each shard byte by byte, the second reading of a scale group after its first
      |
      |  taken one at a time, small ones together
      v
    worker x N     read -------> hash -------------> quantize or copy ---> write
                   waits until   waits until the     an encode waits       waits until nobody
                   the shard     bytes before are    for all scans of      else writes to
                   is here       hashed              its group             that file
                     ^                                                        |  all slabs of a file written
                     |  one shard ahead                                       v
    fetch x 1      source/shards.py (a remote source)      finish x 2     read back and hash, fsync, rename, record
                   waits until shards before are                          (and fdatasync of every 64 MiB while
                   done, so that two are here at once                      a file is written)

The main thread starts the workers and waits for them, then for the files. The first failure, in whatever thread, ends
every wait (wait.Signal). No worker waits for a slab that nobody has taken: slabs are taken in order, and a slab waits
only for slabs that stand before it. So of those taken, the first one waits for no other, and the run goes on.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from convert_ckpt.plan.plan import FilePlan, Plan
from convert_ckpt.run.buffers import Buffers
from convert_ckpt.run.decode import EncodedRows, decode, has_nan, read_rows, store_rows, to_plain_bytes
from convert_ckpt.run.folded import fold_bits
from convert_ckpt.run.identity import identity_fault
from convert_ckpt.run.nonfinite import NonFiniteElements
from convert_ckpt.run.output_files import FileRecord, OutputFiles
from convert_ckpt.run.readers import ShardReaders
from convert_ckpt.run.schedule import Slab, list_turns, scale_group
from convert_ckpt.run.slab import (
    ErrorSums,
    TensorWrite,
    is_finite,
    largest_magnitude,
    quantize,
    tensor_scale,
    to_float,
    weight_bits,
)
from convert_ckpt.run.wait import Signal
from convert_ckpt.source.shards import ShardProvider
from run_ckpt.contract.errors import CheckpointError, NonFiniteError
from run_ckpt.contract.manifest import INPUT_SCALE, Layer, sqnr_db
from run_ckpt.progress import Progress
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.shards import Shard

if TYPE_CHECKING:  # see _make_calibrated
    from convert_ckpt.run.calibrated import CalibratedQuantizer

# All workers' slabs together.
_IN_FLIGHT_NBYTES = 384 * 2**20


class Engine:
    """The making of a plan's files in ``folder``: of a whole component, or of a share of one (schedule.narrow).

    ``group_amax`` maps scale groups to the float32 bits of their amax, as far as they are known. ``on_file`` is called
    for each finished file, from any thread; ``progress`` is told the work_nbytes of each slab. ``provider`` brings the
    shards. ``made`` are the bytes of output tensors that are there already.
    """

    def __init__(
        self,
        plan: Plan,
        slabs: list[Slab],
        shards: Iterable[Shard],
        folder: Folder,
        group_amax: Mapping[str, int],
        on_file: Callable[[str, FileRecord], None],
        progress: Progress,
        provider: ShardProvider,
        made: Mapping[str, np.ndarray],
    ):
        self._plan = plan
        self._on_file = on_file
        self._progress = progress
        self._amax = dict(group_amax)
        self._turns = list_turns(slabs)
        self._n_taken = 0
        self._unscanned = Counter(scale_group(slab.tensor) for slab in slabs if slab.action == "scan")
        self._quantized = plan.quantized_by_file()
        self._errors: defaultdict[str, list[ErrorSums]] = defaultdict(list)
        self._measured: dict[str, dict[str, Any]] = {}
        self._calibrated = _make_calibrated(slabs)
        self._nonfinite = NonFiniteElements()
        self._signal = Signal()
        self._readers = ShardReaders(shards, provider, slabs, self._signal)
        self._outputs = OutputFiles(plan, folder, slabs, self._signal, self._record, made)

    def run(self, n_workers: int) -> dict[str, int]:
        """Make all files; return the amax of all scale groups known now. Raises the first error of any thread.

        Weights that hold NaN or infinity are an error when all have been looked at: nothing is written any more then.
        """
        slabs = chain.from_iterable(self._turns)
        largest = max((slab.nbytes for slab in slabs if not slab.tensor.statistics), default=1)
        n_workers = max(1, min(n_workers, _IN_FLIGHT_NBYTES // max(largest, 1)))
        workers = ThreadPoolExecutor(n_workers, thread_name_prefix="worker")
        try:
            self._readers.start()
            self._outputs.start()
            with self._calibrated or nullcontext():
                for _ in range(n_workers):
                    workers.submit(self._work)
                workers.shutdown()
            if refusal := self._nonfinite.refusal():
                raise NonFiniteError(refusal)
            self._outputs.wait()
        except BaseException as error:  # Ctrl-C too
            self._fail(error)
        finally:
            workers.shutdown()  # so that no file is closed under a worker
            self._outputs.close()
            self._readers.close()
        if self._signal.failure:
            raise self._signal.failure
        for note in self._nonfinite.notes():
            self._progress.log(note)
        return self._amax

    def _work(self) -> None:
        buffers = Buffers()
        try:
            while turn := self._take():
                self._process(turn, buffers)
        except BaseException as error:
            self._fail(error)

    def _take(self) -> list[Slab] | None:
        with self._signal.notify():
            if self._signal.failure or self._n_taken == len(self._turns):
                return None
            self._n_taken += 1
            return self._turns[self._n_taken - 1]

    def _fail(self, error: BaseException) -> None:
        self._signal.fail(error)
        self._readers.stop()

    def _process(self, turn: list[Slab], buffers: Buffers) -> None:
        raws = buffers.get_parts("source", [slab.nbytes for slab in turn])
        self._readers.read(turn, raws)
        self._readers.hash(turn, raws)
        for slab, raw in zip(turn, raws, strict=True):
            self._convert(slab, raw, buffers)
        self._progress.advance(sum(slab.work_nbytes for slab in turn))
        self._readers.count(turn)
        if not self._nonfinite.is_refused:
            self._outputs.count(turn)

    def _convert(self, slab: Slab, raw: np.ndarray, buffers: Buffers) -> None:
        match slab.action:
            case "copy":
                self._copy(slab, raw)
            case "decode":
                self._decode(slab, raw)
            case "store":
                self._store(slab, raw)
            case "scan":
                self._scan(slab, raw)
            case "quantize" | "encode":
                self._quantize(slab, raw, buffers)

    def _copy(self, slab: Slab, raw: np.ndarray) -> None:
        self._nonfinite.look_at_copy(slab, raw)
        if not self._nonfinite.is_refused:
            bits = self._bits(slab, raw) if slab.tensor.fold else raw
            self._outputs.write(slab.tensor.spec.name, slab.start, bits)

    def _bits(self, slab: Slab, raw: np.ndarray) -> np.ndarray:
        """Return the bits of a slab's rows, as folds leave them."""
        return fold_bits(self._unfolded_bits(slab, raw), slab.tensor.fold, slab.row)

    def _unfolded_bits(self, slab: Slab, raw: np.ndarray) -> np.ndarray:
        """Return the bits of a slab's rows, see weight_bits: decoded where they are codes."""
        spec = slab.tensor.spec
        if slab.tensor.encoded:
            return decode(self._encoded_rows(slab, raw)).view(np.int32)
        return weight_bits(raw, spec.dtype, math.prod(spec.shape[1:]))

    def _encoded_rows(self, slab: Slab, raw: np.ndarray) -> EncodedRows:
        assert slab.tensor.encoded is not None
        return read_rows(slab.tensor.encoded, slab.row, slab.offset, raw, self._readers.read_part)

    def _decode(self, slab: Slab, raw: np.ndarray) -> None:
        spec = slab.tensor.spec
        data = to_plain_bytes(decode(self._encoded_rows(slab, raw)), spec.dtype)
        self._nonfinite.look_at_copy(slab, data.reshape(-1))
        if not self._nonfinite.is_refused:
            self._outputs.write(spec.name, slab.row * spec.nbytes // spec.shape[0], data)

    def _store(self, slab: Slab, raw: np.ndarray) -> None:
        """Write codes that are in the layer's format already."""
        layer, rows = slab.tensor.layer, self._encoded_rows(slab, raw)
        assert layer is not None
        if has_nan(rows):
            self._nonfinite.add(slab, decode(rows).view(np.int32))
        if self._nonfinite.is_refused:
            return
        self._write(slab, layer, store_rows(rows, layer), ErrorSums(0.0, 0.0, 0.0))

    def _scan(self, slab: Slab, raw: np.ndarray) -> None:
        largest = self._look(slab, self._bits(slab, raw))
        group = scale_group(slab.tensor)
        assert group is not None
        with self._signal.notify():
            self._amax[group] = max(self._amax.get(group, 0), largest)
            self._unscanned[group] -= 1

    def _look(self, slab: Slab, bits: np.ndarray) -> int:
        """Return the float32 bits of the largest magnitude; NaN and infinity are noted."""
        largest = largest_magnitude(bits)
        if not is_finite(largest):
            self._nonfinite.add(slab, bits)
        return largest

    def _quantize(self, slab: Slab, raw: np.ndarray, buffers: Buffers) -> None:
        layer = slab.tensor.layer
        assert layer is not None
        unfolded = self._unfolded_bits(slab, raw)
        is_first = self._plan.statistics and slab.row == 0
        if is_first and (fault := identity_fault(self._plan, slab.tensor, to_float(unfolded[:1]))):
            raise CheckpointError(fault)
        bits = fold_bits(unfolded, slab.tensor.fold, slab.row)
        is_seen = slab.action == "encode" and slab.hash_order is None  # when it was scanned
        group = scale_group(slab.tensor)
        if group and slab.action == "quantize":  # it is all of its group
            self._amax[group], is_seen = self._look(slab, bits), True
        scale = self._tensor_scale(group, layer) if group else None
        if self._nonfinite.is_refused:
            if not is_seen:
                self._look(slab, bits)
            return
        if self._calibrated and slab.tensor.statistics:
            done = self._calibrated.quantize(bits, slab.tensor, buffers, scale)
            writes, errors, largest = done.writes, done.errors, done.largest
            self._measured[layer.module] = done.measured
        else:
            writes, errors, largest = quantize(bits, layer, slab.row, buffers, scale)
        if not is_finite(largest):
            self._nonfinite.add(slab, bits)
            return
        if not math.isfinite(errors.largest):
            raise NonFiniteError(
                f"{slab.tensor.shard}: {slab.tensor.spec.name}: its largest magnitude rounds to a value beyond float32."
                " Repair the source, or keep this layer with --ignore."
            )
        self._write(slab, layer, writes, errors)

    def _write(self, slab: Slab, layer: Layer, writes: list[TensorWrite], errors: ErrorSums) -> None:
        if slab.row == 0 and INPUT_SCALE in layer.tensors:
            writes.append(TensorWrite(INPUT_SCALE, 0, self._plan.input_scales[layer.module].reshape(1)))
        for write in writes:
            self._outputs.write(layer.tensors[write.role], write.offset, write.data)
        with self._signal.notify():
            self._errors[layer.module].append(errors)

    def _tensor_scale(self, group: str, layer: Layer) -> np.ndarray:
        self._signal.wait_until(lambda: self._unscanned[group] == 0)
        return tensor_scale(self._amax[group], layer)

    def _record(self, file: FilePlan, entry: dict[str, Any]) -> None:
        """Report a finished file; ``entry`` is what the manifest says of it."""
        tensors = self._quantized[file.name]
        record = FileRecord(
            file=entry,
            layers={t.layer.module: self._measure(t.layer.module) for t in tensors if t.layer},
            sources={name: self._readers.describe(name) for name in file.source_shards},
            group_amax={group: self._amax[group] for t in tensors if (group := scale_group(t))},
        )
        self._on_file(file.name, record)

    def _measure(self, module: str) -> dict[str, Any]:
        errors = self._errors.pop(module)
        # fsum is exact, so that the order in which the slabs were done leaves no trace.
        signal = math.fsum(part.squared_signal for part in errors)
        error = math.fsum(part.squared_error for part in errors)
        measured = {"sqnr_db": sqnr_db(signal, error), "max_abs_error": max(part.largest for part in errors)}
        return {**measured, **self._measured.get(module, {})}


def _make_calibrated(slabs: list[Slab]) -> "CalibratedQuantizer | None":
    if not any(slab.tensor.statistics for slab in slabs):
        return None
    from convert_ckpt.run.calibrated import CalibratedQuantizer  # its kernels are nothing that a plan needs

    return CalibratedQuantizer()
