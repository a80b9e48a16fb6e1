"""Statistics of what goes into linear layers: a folder with one safetensors file for each distinct input.

Layers that are given the same tensor (q, k and v; gate and up) share a file, named for the first of them:

    n_rows                I64 [2]   rows summed up, and rows held out
    mean                  F32 [K]   of each channel, all rows together
    amax                  F32 [K]   largest magnitude of each channel, all rows together
    weight_amax           F32 [K]   largest magnitude of each column of the layers' weights, all layers together (0: not
                                    known)
    hessian.diagonal      F32 [K]   mean square of each channel, of the rows summed up
    hessian.correlations  F16 [C]   mean(x_i x_j) / sqrt(diagonal_i diagonal_j) for j < i, row by row: of the whole
                                    matrix, or of one block of columns after the other; C = 0 without
    held_out.diagonal, held_out.correlations: the same of the rows held out
    fisher.<layer>        F32 [N]   of each layer, where it was recorded: what an error of the layer's output does to
                                    the model's. That changes by the sum over n of fisher_n mean(e_n^2) of its energy,
                                    e [rows, N] the error, the mean over rows (run_ckpt.statistics.fisher)
    rounding.<format>     F32 [K]   beside it: the mean squared error of each channel where rows are rounded to the
                                    format, of every format that takes K

``__metadata__``: ``statistics_version``; ``model``, the class; ``layers``, JSON {name: {N, first_row_sha256}}, the hash
being that of row 0 of the weight as BF16 (null where it could not be read); ``block_size``, how many columns a block
has (K: the whole matrix, 0: no correlations); ``settings``, JSON, what else decided the numbers.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from run_ckpt.contract.errors import CheckpointError, FaultsError, HeaderError
from run_ckpt.contract.file_names import SUFFIX
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.folders import open_folder
from run_ckpt.storage.header import Header, build_header, read_header
from run_ckpt.storage.reader import read_fully

VERSION = "1"
_VERSION_KEY = "statistics_version"
_SUMS = ("hessian", "held_out")
_DTYPES = {"I64": np.int64, "F32": np.float32, "F16": np.float16}
# Rows at a time that are copied from below the diagonal to above it: some that fit into the cache.
_MIRRORED = 256
_REMEDY = "Record it again with run-ckpt calibrate."


@dataclass(frozen=True)
class LayerIdentity:
    """What tells a linear layer from another of its name: its rows, and the hash of its first row."""

    N: int
    first_row_sha256: str | None


@dataclass(frozen=True)
class InputStatistics:
    """One file: what went into ``layers``. The sums are read when they are asked for."""

    path: Path
    model: str
    layers: Mapping[str, LayerIdentity]
    K: int
    block_size: int
    settings: Mapping[str, Any]
    header: Header

    def hessian(self, *, held_out: bool = False) -> list[np.ndarray]:
        """Return the diagonal blocks of mean(x x'), float32 [n, n] each, which together are all K columns.

        Raises CheckpointError where the file has no correlations, or they are damaged.
        """
        if not self.block_size:
            raise CheckpointError(f"{self.path.name}: holds no correlations (recorded with hessian none). {_REMEDY}")
        name = _SUMS[held_out]
        diagonal, correlations = self.read(f"{name}.diagonal"), self.read(f"{name}.correlations")
        if not np.abs(correlations).max(initial=0) <= 1:  # NaN too
            raise CheckpointError(f"{self.path.name}: {name}.correlations: some are not within 1. {_REMEDY}")
        blocks, first = [], 0
        for start, stop in block_ranges(self.K, self.block_size):
            count = n_below_diagonal(stop - start)
            blocks.append(_to_matrix(diagonal[start:stop], correlations[first : first + count]))
            first += count
        return blocks

    def read(self, name: str) -> np.ndarray:
        """Return one of the file's tensors."""
        stored = next(tensor for tensor in self.header.tensors if tensor.spec.name == name)
        data = np.empty(stored.spec.shape, _DTYPES[stored.spec.dtype])
        fd = open_to_read(self.path)
        try:
            read_fully(fd, data.reshape(-1).view(np.uint8).data, stored.offset, self.path.name)
        finally:
            os.close(fd)
        return data

    @property
    def has_fisher(self) -> bool:
        """True where the Fisher information of its layers was recorded."""
        return any(tensor.spec.name == fisher_name(layer) for tensor in self.header.tensors for layer in self.layers)

    @cached_property
    def amax(self) -> float:
        """The largest magnitude of all channels."""
        return float(self.read("amax").max())


def read_statistics(folder: Path) -> dict[str, InputStatistics]:
    """Return layer -> statistics of a folder, all files checked but for their correlations.

    Raises FaultsError with every fault: no statistics, a truncated or foreign file, other shapes than its K implies,
    NaN, no rows, two models or settings in one folder, a layer in two files.
    """
    paths = sorted(folder.glob("*" + SUFFIX))
    faults = [] if paths else ["it holds no .safetensors file. Give the folder that run-ckpt calibrate wrote."]
    inputs = []
    for path in paths:
        try:
            inputs.append(_read_input(path))
        except (HeaderError, OSError) as error:
            faults.append(str(error))
        else:
            faults += [f"{path.name}: {fault} {_REMEDY}" for fault in _value_faults(inputs[-1])]
    faults += _folder_faults(inputs)
    if faults:
        raise FaultsError(f"{folder}: not usable statistics", faults)
    return {layer: statistics for statistics in inputs for layer in statistics.layers}


def find_statistics(folder: Path, component: str) -> Path:
    """Return where the statistics of a component are: in ``folder``, or in its folder of that name, or its only one."""
    if any(folder.glob("*" + SUFFIX)):
        return folder
    inside = {path.parent for path in folder.glob("*/*" + SUFFIX)}
    if folder / component in inside:
        return folder / component
    return inside.pop() if len(inside) == 1 else folder


def write_statistics(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    model: str,
    layers: Mapping[str, LayerIdentity],
    block_size: int,
    settings: Mapping[str, Any],
) -> Path:
    """Write the file of one input, which appears whole or not at all, and return its path.

    tensors: as in the table above.
    """
    metadata = {
        _VERSION_KEY: VERSION,
        "model": model,
        "layers": json.dumps({name: asdict(layer) for name, layer in layers.items()}),
        "block_size": str(block_size),
        "settings": json.dumps(dict(settings), sort_keys=True),
    }
    specs = _specs(len(tensors["mean"]), block_size, layers, has_fisher=fisher_name(next(iter(layers))) in tensors)
    header = build_header(specs.values(), metadata)
    name = next(iter(layers)) + SUFFIX
    with open_folder(folder) as opened, opened.replace(name) as fd, open(fd, "wb", closefd=False) as file:
        file.write(header.data)
        for stored in header.tensors:
            array = np.ascontiguousarray(tensors[stored.spec.name], _DTYPES[stored.spec.dtype])
            assert array.shape == stored.spec.shape
            file.write(array.data)
    return folder / name


def fisher_name(layer: str) -> str:
    """Return the tensor that holds the Fisher information of a layer."""
    return f"fisher.{layer}"


def rounding_name(format_name: str) -> str:
    """Return the tensor that holds what rounding an input to a format costs."""
    return f"rounding.{format_name}"


def rounded_formats(K: int) -> list[str]:
    """Return the formats whose whole blocks make up K."""
    return [name for name, quant_format in FORMATS.items() if K % quant_format.K_granule == 0]


def block_ranges(K: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield the columns [start, stop) of each block; none without correlations."""
    for start in range(0, K if block_size else 0, block_size or 1):
        yield start, min(start + block_size, K)


def n_below_diagonal(n: int) -> int:
    """How many elements of an n x n matrix lie below its diagonal."""
    return n * (n - 1) // 2


def pack_below_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Return the elements of [n, n] below the diagonal, row by row."""
    return np.concatenate([row[:i] for i, row in enumerate(matrix)])


def _to_matrix(diagonal: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the symmetric float32 [n, n] with this diagonal and these correlations below it."""
    n = len(diagonal)
    roots = np.sqrt(diagonal)
    matrix = np.empty((n, n), np.float32)
    first = 0
    for i in range(n):
        np.multiply(below[first : first + i], roots[:i], out=matrix[i, :i])
        matrix[i, :i] *= roots[i]
        first += i
    for start in range(0, n, _MIRRORED):
        rows = slice(start, start + _MIRRORED)
        matrix[:start, rows] = matrix[rows, :start].T
        corner = np.tril(matrix[rows, rows], -1)
        matrix[rows, rows] = corner + corner.T + np.diag(diagonal[rows])
    return matrix


def _specs(K: int, block_size: int, layers: Mapping[str, LayerIdentity], *, has_fisher: bool) -> dict[str, TensorSpec]:
    count = sum(n_below_diagonal(stop - start) for start, stop in block_ranges(K, block_size))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"n_rows": ("I64", (2,)), "mean": ("F32", (K,))}
    shapes["amax"] = shapes["weight_amax"] = ("F32", (K,))
    for name in _SUMS:
        shapes[f"{name}.diagonal"] = ("F32", (K,))
        shapes[f"{name}.correlations"] = ("F16", (count,))
    if has_fisher:
        shapes |= {fisher_name(layer): ("F32", (identity.N,)) for layer, identity in layers.items()}
        shapes |= {rounding_name(name): ("F32", (K,)) for name in rounded_formats(K)}
    return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()}


def _read_input(path: Path) -> InputStatistics:
    """Return the statistics whose header is in order. Raises HeaderError."""
    header = read_header(path)
    metadata = header.metadata
    if metadata.get(_VERSION_KEY) != VERSION:
        raise HeaderError(
            f"{path.name}: {_VERSION_KEY} is {metadata.get(_VERSION_KEY)!r}, this version reads {VERSION}. {_REMEDY}"
        )
    stored = {tensor.spec.name: tensor.spec for tensor in header.tensors}
    try:
        layers = {name: LayerIdentity(**entry) for name, entry in json.loads(metadata["layers"]).items()}
        block_size, settings, model = int(metadata["block_size"]), json.loads(metadata["settings"]), metadata["model"]
        (K,) = stored["mean"].shape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise HeaderError(f"{path.name}: no header of statistics ({fault}). {_REMEDY}") from error
    expected = _specs(K, block_size, layers, has_fisher=any(name.startswith(fisher_name("")) for name in stored))
    if stored != expected or not layers:
        wrong = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise HeaderError(f"{path.name}: {wrong or 'layers'}: not as K = {K}, blocks of {block_size} imply. {_REMEDY}")
    return InputStatistics(path, model, layers, K, block_size, settings, header)


def _value_faults(statistics: InputStatistics) -> Iterator[str]:
    """Yield what is wrong with the small tensors; a NaN in the input is always in a diagonal too."""
    for count, what in zip(statistics.read("n_rows"), ("summed up", "held out"), strict=True):
        if count <= 0:
            yield f"no rows were {what}."
    fisher: list[str] = []
    if statistics.has_fisher:
        fisher = [*map(fisher_name, statistics.layers), *map(rounding_name, rounded_formats(statistics.K))]
    for name in ("mean", "amax", "weight_amax", *(f"{name}.diagonal" for name in _SUMS), *fisher):
        values = statistics.read(name)
        n_bad = int(np.count_nonzero(~np.isfinite(values)))
        if n_bad:
            yield f"{name}: {n_bad} of {len(values)} channels are NaN or Inf: the model overflowed while it was run."
        elif name != "mean" and (values < 0).any():
            yield f"{name}: some channels are negative."


def _folder_faults(inputs: list[InputStatistics]) -> Iterator[str]:
    for what, values in (
        ("models", {statistics.model for statistics in inputs}),
        ("settings", {json.dumps(statistics.settings, sort_keys=True) for statistics in inputs}),
    ):
        if len(values) > 1:
            yield f"its files are of several {what}: {', '.join(sorted(values))}. Use one folder for each."
    seen: dict[str, str] = {}
    for statistics in inputs:
        for layer in statistics.layers:
            if layer in seen:
                yield f"{layer}: in {seen[layer]} and in {statistics.path.name}. Remove one."
            seen[layer] = statistics.path.name
