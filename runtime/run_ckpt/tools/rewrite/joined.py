"""Matrices that a source held together in 3-D tensors, experts above all: put back where they were."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.errors import ManifestError
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.contract.tensors import DTYPE_BITS, TensorSpec
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.rows import TORCH_DTYPES, decode_rows_as
from run_ckpt.storage.views import Rows
from run_ckpt.tools.rewrite.files import TensorWriter

# Of a transposed matrix each slab is written in K pieces, so it has many rows: 16 MiB in float32.
_SLAB_ELEMENTS = 2**22
# Whatever a kept tensor is, only the width of its elements matters.
_OF_WIDTH = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class Part:
    """Rows ``first``.. of the weight ``name`` [N, K] are ``rows`` of a matrix; its columns where these have a step."""

    name: str
    first: int
    rows: Rows


@dataclass(frozen=True)
class Joined:
    """A tensor ``spec`` [matrices, rows, columns] that ``parts`` fill."""

    spec: TensorSpec
    parts: tuple[Part, ...]

    @property
    def names(self) -> list[str]:
        """The weights that it is made of, as the source's tensors are called."""
        return list(dict.fromkeys(part.name for part in self.parts))


def join_weights(manifest: Manifest, dtype: str | None) -> list[Joined]:
    """Return the tensors whose matrices a result has as weights of their own, or one below the other.

    dtype: what quantized weights become, None for the source's. A tensor of which a part was kept has the source's.
    Raises ManifestError where the record of the source's tensors does not fit the result's.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for name, of_weight in _recorded(manifest).items():
        first = 0
        for rows in of_weight:
            parts[rows.tensor].append(Part(name, first, rows))
            first += rows.stop - rows.start
    weights = {layer.source_tensor: layer for layer in manifest.layers.values()}
    specs = {name: kept.spec for name, kept in manifest.kept.items()}
    specs |= {name: TensorSpec(name, layer.source_dtype, (layer.N, layer.K)) for name, layer in weights.items()}
    joined = []
    for name, its in parts.items():
        if (spec := _spec(name, its, specs)) is None:
            raise ManifestError(f"{name}: its parts are not as the manifest records them. Convert the source again.")
        is_all_coded = all(part.name in weights for part in its)
        joined.append(Joined(TensorSpec(name, (is_all_coded and dtype) or spec.dtype, spec.shape), tuple(its)))
    return joined


def _recorded(manifest: Manifest) -> dict[str, list[Rows]]:
    """Return weight -> the matrices, or parts of one, that its rows are."""
    recorded = {
        name: rows
        for name, parts in (manifest.source.get("tensors") or {}).items()
        if (rows := [Rows(*part) for part in parts]) and rows[0].matrix is not None
    }
    for layer in manifest.layers.values():
        if layer.n_stacked:  # gpt-oss has each matrix transposed where it is numbers
            n_rows = layer.N // layer.n_stacked
            recorded[layer.source_tensor] = [Rows(layer.module, 0, n_rows, i, 1) for i in range(layer.n_stacked)]
    return recorded


def _spec(name: str, parts: list[Part], specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return what ``parts`` make, None where they don't fit each other or leave a gap."""
    n_rows: dict[str, int] = defaultdict(int)
    for part in parts:
        n_rows[part.name] += part.rows.stop - part.rows.start
    whole = [specs.get(weight) for weight in n_rows]
    if any(spec is None or spec.shape[:-1] != (n_rows[spec.name],) for spec in whole):
        return None
    kinds = {(spec.dtype, spec.shape[1]) for spec in whole if spec}
    steps = {part.rows.step for part in parts}
    width = max(part.rows.stop for part in parts)
    spans = sorted((part.rows.matrix or 0, part.rows.start, part.rows.stop) for part in parts)
    at = (0, 0)
    for matrix, start, stop in spans:
        if (matrix, start) != at or stop <= start:
            return None
        at = (matrix, stop) if stop < width else (matrix + 1, 0)
    if len(kinds) > 1 or steps not in ({None}, {1}) or at[1]:
        return None
    ((dtype, K),) = kinds
    return TensorSpec(name, dtype, (at[0], *((width, K) if steps == {None} else (K, width))))


def write_joined(reader: TensorReader, layers: Mapping[str, Layer], joined: Joined, writer: TensorWriter) -> None:
    """Write a joined tensor, at most a slab of it in memory. layers: source's weight -> layer, of those in codes."""
    spec = joined.spec
    itemsize, (_, height, width) = DTYPE_BITS[spec.dtype] // 8, spec.shape
    for part in joined.parts:
        rows, layer = part.rows, layers.get(part.name)
        K = width if rows.step is None else height
        matrix = (rows.matrix or 0) * height * width
        for start, stop in _slabs(rows.stop - rows.start, K, layer.scheme.row_multiple if layer else 1):
            values = _read(reader, part.name, layer, spec, (part.first + start, part.first + stop, K))
            at = matrix + (rows.start + start) * (K if rows.step is None else 1)
            if rows.step is None:
                writer.write(spec.name, at * itemsize, values.numpy().data)
                continue
            for k, row in enumerate(values.T.contiguous().numpy()):
                writer.write(spec.name, (at + k * width) * itemsize, row.data)


def _slabs(n_rows: int, K: int, multiple: int) -> Iterator[tuple[int, int]]:
    step = max(1, _SLAB_ELEMENTS // (K * multiple)) * multiple
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _read(
    reader: TensorReader, name: str, layer: Layer | None, spec: TensorSpec, where: tuple[int, int, int]
) -> Tensor:
    """Return rows start..stop of a weight with K columns, elements as integers of their width."""
    start, stop, K = where
    bits = DTYPE_BITS[spec.dtype]
    if layer:
        return decode_rows_as(reader, layer, start, stop, TORCH_DTYPES[spec.dtype]).view(_OF_WIDTH[bits])
    row_nbytes = K * bits // 8
    return reader.read(name, start * row_nbytes, (stop - start) * row_nbytes).view(_OF_WIDTH[bits]).reshape(-1, K)
