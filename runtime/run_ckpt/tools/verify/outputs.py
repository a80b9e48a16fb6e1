"""The recorded errors of layers' outputs and the reach of input scales, measured anew by their statistics."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from run_ckpt.contract.formats import E4M3_MAX
from run_ckpt.contract.manifest import INPUT_SCALE, Layer, sqnr_db
from run_ckpt.storage.layer_statistics import InputStatistics, block_ranges
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.rows import cut_rows, decode_rows, read_scalar
from run_ckpt.tools.verify.original import Original
from run_ckpt.tools.verify.tensors import agree_db

_REMEDY = "Give the statistics it was converted with, or convert again."


def output_faults(
    reader: TensorReader, original: Original, layer: Layer, statistics: Mapping[str, InputStatistics]
) -> list[str]:
    """Return a sentence if a static scale does not reach all inputs, and if the recorded output error is another one.

    Nothing is said of a layer that statistics did not decide. Raises CheckpointError for damaged statistics.
    """
    is_static = INPUT_SCALE in layer.tensors
    if not (is_static or layer.method):
        return []
    found = statistics.get(layer.module)
    if found is None or (found.layers[layer.module].N, found.K) != (layer.N, layer.K):
        return [f"{layer.module}: the statistics are not of it. {_REMEDY}"]
    faults = []
    columns = original.fold.columns if original.fold else None
    powers = np.ldexp(np.float32(1), np.array(columns or [0] * layer.K, np.int32))
    largest = float((found.read("amax") / powers).max())
    if is_static and read_scalar(reader, layer, INPUT_SCALE) * E4M3_MAX < largest:
        reach = read_scalar(reader, layer, INPUT_SCALE) * E4M3_MAX
        faults.append(f"{layer.module}: its static scale reaches {reach:g}, inputs were up to {largest:g}. {_REMEDY}")
    if layer.method and layer.output_sqnr_db:
        measured, stated = _measure_output(reader, original, layer, found, powers), layer.output_sqnr_db[layer.method]
        if not agree_db(measured, stated):
            faults.append(f"{layer.module}: output SQNR is {measured} dB, the manifest says {stated}. {_REMEDY}")
    return faults


def _measure_output(
    reader: TensorReader, original: Original, layer: Layer, found: InputStatistics, powers: np.ndarray
) -> float | None:
    """Return tr(W H W') over tr(D H D') in dB, D = decoded - weight, H of the held out samples."""
    signals: list[float] = []
    errors: list[float] = []
    ranges = list(block_ranges(layer.K, found.block_size))
    blocks = [
        torch.from_numpy(block / powers[first:last] / powers[first:last, None])
        for (first, last), block in zip(ranges, found.hessian(held_out=True), strict=True)
    ]
    for start, stop in cut_rows(layer, original.row_multiple(layer)):
        weight = original.rows(layer, start, stop)
        difference = weight - decode_rows(reader, layer, start, stop)
        for (first, last), block in zip(ranges, blocks, strict=True):
            for rows, sums in ((weight[:, first:last], signals), (difference[:, first:last], errors)):
                sums.append(float(((rows @ block) * rows).sum(dtype=torch.float64)))
    return sqnr_db(math.fsum(signals), math.fsum(errors))
