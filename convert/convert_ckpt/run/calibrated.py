"""A layer whose codes are chosen by statistics of its input: by GPTQ, where they are better than the nearest ones."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from convert_ckpt.methods.gptq import Factor, NotPositiveDefiniteError, Rounded, factorize, round_rows
from convert_ckpt.methods.grid import ROWS_AT_ONCE, Grid
from convert_ckpt.plan.candidates import Damage
from convert_ckpt.plan.plan import TensorPlan
from convert_ckpt.run.buffers import Buffers
from convert_ckpt.run.folded import scale_hessian
from convert_ckpt.run.slab import ErrorSums, TensorWrite, decode_grid, encode_on_grid, is_finite, quantize, to_float
from run_ckpt.contract.errors import StatisticsError
from run_ckpt.contract.folds import TensorFold
from run_ckpt.contract.manifest import GPTQ, RTN, WEIGHT, WEIGHT_SCALE, Layer, sqnr_db
from run_ckpt.storage.layer_statistics import InputStatistics, block_ranges, fisher_name, rounding_name

# Layers that share an input follow each other, and workers are few.
_INPUTS_KEPT = 2


@dataclass(frozen=True)
class Calibrated:
    """What a layer became; ``measured`` is what the manifest says of it, ``largest`` as from slab.quantize."""

    writes: list[TensorWrite]
    errors: ErrorSums
    largest: int
    measured: dict[str, Any]


@dataclass(frozen=True)
class _Input:
    """The factors of an input, and H of its held out samples, block by block."""

    factors: Sequence[Factor]
    held_out: Sequence[np.ndarray]


class CalibratedQuantizer:
    """Quantizes layers, from any thread; those that share an input share its factors.

    A context manager: BLAS has one thread from its start to its end, as each layer has a worker of its own, and as sums
    have other bits with another number of threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inputs: dict[Path, Future[_Input]] = {}

    def __enter__(self) -> None:
        self._limits = threadpool_limits(1, user_api="blas")

    def __exit__(self, *_: object) -> None:
        self._limits.restore_original_limits()

    def quantize(
        self,
        bits: np.ndarray,
        tensor: TensorPlan,
        buffers: Buffers,
        tensor_scale: np.ndarray | None,
    ) -> Calibrated:
        """Return the codes of GPTQ, or the nearest ones where the held out samples say that these are better.

        bits, tensor_scale: of the whole weight, as for slab.quantize. Raises CheckpointError where the statistics are
        not positive definite.
        """
        layer = tensor.layer
        assert layer is not None
        writes, errors, largest = quantize(bits, layer, 0, buffers, tensor_scale)
        if not is_finite(largest):
            return Calibrated(writes, errors, largest, {})
        codes, total = self._round(bits, tensor, writes, tensor_scale)
        measured = {
            "output_sqnr_db": {
                RTN: sqnr_db(total.signal, total.nearest_error),
                GPTQ: sqnr_db(total.signal, total.output_error),
            }
        }
        if not total.output_error < total.nearest_error:
            return Calibrated(writes, errors, largest, {**measured, "method": RTN})
        writes = [TensorWrite(w.role, w.offset, codes if w.role == WEIGHT else w.data) for w in writes]
        errors = ErrorSums(total.squared_error, errors.squared_signal, total.largest_error)
        return Calibrated(writes, errors, largest, {**measured, "method": GPTQ})

    def measure(
        self, bits: np.ndarray, tensor: TensorPlan, buffers: Buffers, tensor_scale: np.ndarray | None
    ) -> Damage:
        """Return what the layer's output loses by quantize() on held out samples; bits are finite.

        With Fisher information, it is the model's output: error is what part of its energy is lost, and signal is 1. It
        holds what rounding the activations to the same format costs too, as the format's kernels do.
        """
        assert tensor.layer is not None
        fisher = _read_fisher(tensor)
        writes, _, _ = quantize(bits, tensor.layer, 0, buffers, tensor_scale)
        _, total = self._round(bits, tensor, writes, tensor_scale, fisher)
        error = min(total.output_error, total.nearest_error)
        if fisher is None:
            return Damage(error, total.signal)
        return Damage(error + _activation_error(bits, tensor, fisher), 1.0)

    def _round(
        self,
        bits: np.ndarray,
        tensor: TensorPlan,
        writes: list[TensorWrite],
        tensor_scale: np.ndarray | None,
        row_weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Rounded]:
        """Return GPTQ's codes under the scales that are to be written, and the sums over all rows."""
        assert tensor.layer is not None
        assert tensor.statistics is not None
        known = self._input(tensor.statistics, tensor.fold)
        scales = next(write.data for write in writes if write.role == WEIGHT_SCALE)
        grid = decode_grid(bits, tensor.layer, scales, tensor_scale)
        codes = np.empty_like(next(write.data for write in writes if write.role == WEIGHT))
        return codes, _round_all(bits, tensor.layer, grid, known, (scales, tensor_scale), codes, row_weights)

    def _input(self, statistics: InputStatistics, fold: TensorFold | None) -> _Input:
        path = statistics.path
        with self._lock:
            future = self._inputs.get(path)
            mine = future is None
            if future is None:
                future = self._inputs[path] = Future()
                while len(self._inputs) > _INPUTS_KEPT:
                    del self._inputs[next(iter(self._inputs))]
        if mine:
            try:
                future.set_result(_read_input(statistics, fold))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def _read_fisher(tensor: TensorPlan) -> np.ndarray | None:
    """Return float32 [N], None where it was not recorded. An output that a fold makes larger counts the less."""
    assert tensor.layer is not None
    assert tensor.statistics is not None
    if not tensor.statistics.has_fisher:
        return None
    fisher = tensor.statistics.read(fisher_name(tensor.layer.module))
    for part, exponents in tensor.fold.rows if tensor.fold else ():
        fisher[part.first : part.first + len(exponents)] *= np.exp2(2 * np.array(exponents, np.float32))
    return fisher


def _activation_error(bits: np.ndarray, tensor: TensorPlan, fisher: np.ndarray) -> float:
    """Return the sum over n of fisher_n mean((W e)_n^2) for errors e of rounding the input, as if independent."""
    assert tensor.layer is not None
    assert tensor.statistics is not None
    errors = tensor.statistics.read(rounding_name(tensor.layer.format.name)).astype(np.float64)
    if tensor.fold and tensor.fold.columns:
        errors *= np.exp2(-2 * np.array(tensor.fold.columns, np.float64))
    total = 0.0
    for start in range(0, len(bits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        total += float(fisher[rows] @ np.square(to_float(bits[rows])) @ errors)
    return total


def _read_input(statistics: InputStatistics, fold: TensorFold | None) -> _Input:
    """All layers of a file are in the same fold, see plan/folds.py."""
    try:
        factors = [factorize(block) for block in _read_hessian(statistics, fold, held_out=False)]
    except NotPositiveDefiniteError as error:
        raise StatisticsError(
            f"{statistics.path.name}: not positive definite, as no sum of squares is. Record it again with run-ckpt"
            " calibrate."
        ) from error
    return _Input(factors, _read_hessian(statistics, fold, held_out=True))


def _read_hessian(statistics: InputStatistics, fold: TensorFold | None, *, held_out: bool) -> list[np.ndarray]:
    blocks = statistics.hessian(held_out=held_out)
    if fold is None or fold.columns is None:
        return blocks
    columns = (fold.columns[start:stop] for start, stop in block_ranges(statistics.K, statistics.block_size))
    return [scale_hessian(block, part) for block, part in zip(blocks, columns, strict=True)]


def _round_all(
    bits: np.ndarray,
    layer: Layer,
    grid: Grid,
    known: _Input,
    scales: tuple[np.ndarray, np.ndarray | None],
    codes: np.ndarray,
    row_weights: np.ndarray | None,
) -> Rounded:
    """Fill ``codes``; return the sums over all rows. scales: as written, and that of the whole tensor."""
    sums, largest_error = np.zeros(4), 0.0
    flat = codes.reshape(-1)
    for start in range(0, layer.N, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, layer.N))
        part = Grid(grid.element, np.ascontiguousarray(grid.scales[:, rows]), grid.scale_rows)
        weights = None if row_weights is None else row_weights[rows]
        done = round_rows(to_float(bits[rows]), part, known.factors, known.held_out, weights)
        place = slice(rows.start * flat.size // layer.N, rows.stop * flat.size // layer.N)
        encode_on_grid(done.decoded, layer, start, *scales, flat[place])
        sums += [done.signal, done.output_error, done.nearest_error, done.squared_error]
        largest_error = max(largest_error, done.largest_error)
    signal, output_error, nearest_error, squared_error = sums.tolist()
    return Rounded(np.empty(0), signal, output_error, nearest_error, squared_error, largest_error)
