"""A converted checkpoint to read: manifest and headers now, rows of its tensors on demand."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from run_ckpt.contract.errors import CheckpointError, ProblemsError
from run_ckpt.contract.formats import E8M0_NAN, FP8_BLOCK_SIZE, MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer, Manifest, read_manifest
from run_ckpt.contract.manifest_checks import manifest_faults
from run_ckpt.contract.tensors import DTYPE_BITS, TensorSpec
from run_ckpt.storage.checks import header_faults
from run_ckpt.storage.shards import TensorFolder, read_folder

# A slab of a weight is 1 MiB in float32: it stays in cache, and torch's cost per call is small beside it
# (measured from 2**16 to 2**20, this was the fastest).
SLAB_ELEMENTS = 2**18
COPY_NBYTES = 8 * 2**20

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class TensorReader:
    """The bytes of the tensors of ``folder``: read() into memory of our own, from any thread, or mapped.

    A context manager: files are open from its start to its end.
    """

    def __init__(self, folder: TensorFolder):
        self._folder = folder
        self._places = {tensor.spec.name: (shard, tensor) for shard, tensor in folder.tensors()}
        self._fds: dict[str, int] = {}
        self._mapped: dict[str, Tensor] = {}

    def spec(self, name: str) -> TensorSpec | None:
        """Return the spec of a stored tensor, None where there is none of that name."""
        return self._places[name][1].spec if name in self._places else None

    def shard_name(self, name: str) -> str:
        return self._places[name][0].name

    def read(self, name: str, start: int, nbytes: int) -> Tensor:
        """Return uint8 [nbytes]: bytes ``start``.. of tensor ``name``. Raises CheckpointError if the file ends."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(name, start, data)
        return data

    def read_into(self, name: str, start: int, data: Tensor) -> None:
        """Fill ``data``, uint8 [nbytes] on the CPU, with bytes ``start``.. of tensor ``name``; raises as read."""
        shard, stored = self._places[name]
        view, offset = data.numpy().data, stored.offset + start
        while view:
            n_read = os.preadv(self._fds[shard.name], [view], offset)
            if n_read == 0:
                raise CheckpointError(f"{shard.name}: ended at byte {offset} while it was read. Fetch it again.")
            view, offset = view[n_read:], offset + n_read

    def map(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor, mapped from its file and read when it is used, as safetensors does.

        It outlives this reader. Overwriting the file in place would change it; replacing the file does not.
        """
        shard, stored = self._places[name]
        if shard.name not in self._mapped:
            access = mmap.PROT_READ | mmap.PROT_WRITE  # of pages that are our own as soon as they are written
            mapped = mmap.mmap(self._fds[shard.name], shard.header.file_nbytes, flags=mmap.MAP_PRIVATE, prot=access)
            self._mapped[shard.name] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._mapped[shard.name][stored.offset : stored.end]

    def read_all(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor. For scales of FP8 and other small ones."""
        return self.read(name, 0, self._places[name][1].spec.nbytes)

    def __enter__(self) -> "TensorReader":
        self._fds = {shard.name: os.open(shard.path, os.O_RDONLY) for shard in self._folder.shards}
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._mapped.clear()


@dataclass(frozen=True)
class Checkpoint:
    """A converted component, open. From open_checkpoint its headers are exactly what its manifest implies."""

    path: Path
    manifest: Manifest
    folder: TensorFolder
    reader: TensorReader


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Yield the converted component in folder ``path``, strictly checked but for its tensors' bytes.

    Raises ManifestError, or ProblemsError with every fault of manifest and headers.
    """
    manifest = read_manifest(path)
    problems = manifest_faults(manifest)
    if not problems:
        folder = read_folder(path)
        problems = header_faults(manifest, folder)
    if problems:
        raise ProblemsError(f"{path}: not the checkpoint that its manifest describes", problems)
    with TensorReader(folder) as reader:
        yield Checkpoint(path, manifest, folder, reader)


def cut_rows(layer: Layer, multiple: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the slabs of rows of a layer.

    multiple: start is a multiple of it; default: the rows that share scales or a tile.
    """
    multiple = multiple or _row_multiple(layer)
    step = max(1, SLAB_ELEMENTS // (layer.K * multiple)) * multiple
    for start in range(0, layer.N, step):
        yield start, min(start + step, layer.N)


def cut_bytes(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of the slabs of a tensor that is only copied or compared."""
    for start in range(0, nbytes, COPY_NBYTES):
        yield start, min(COPY_NBYTES, nbytes - start)


def read_packed(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the E2M1 codes of rows start..stop of an MXFP4 layer, uint8 [n, K/2], in logical order.

    Layout ``aiter``: start and stop are multiples of 16 (a tile of rows is contiguous).
    """
    width = layer.K // 2
    stored = reader.read(layer.tensors[WEIGHT], start * width, (stop - start) * width).reshape(-1, width)
    return AITER_WEIGHT.unshuffle(stored) if layer.layout == "aiter" else stored


def read_scale_codes(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the E8M0 codes of an MXFP4 layer, padding included, in logical order.

    uint8 [n, scale_shape[1]]. Layout ``aiter``: start and stop are multiples of 32. The scales are
    columns ..K/32 of rows ..N; all else is padding.
    """
    width = layer.scale_shape[1]
    stored = reader.read(layer.tensors[WEIGHT_SCALE], start * width, (stop - start) * width).reshape(-1, width)
    return AITER_SCALE.unshuffle(stored) if layer.layout == "aiter" else stored


def read_fp8_scale(reader: TensorReader, layer: Layer, role: str = WEIGHT_SCALE) -> Tensor:
    """Return a scale tensor of an FP8 layer, float32, in its shape on disk."""
    return reader.read_all(layer.tensors[role]).view(torch.float32).reshape(layer.specs()[role].shape)


def read_fp8_codes(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the E4M3 codes of rows start..stop of an FP8 layer, uint8 [n, K]."""
    return reader.read(layer.tensors[WEIGHT], start * layer.K, (stop - start) * layer.K).reshape(-1, layer.K)


def read_source_rows(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the weight a layer was made from, in its own dtype [n, K]."""
    row_nbytes = layer.K * DTYPE_BITS[layer.source_dtype] // 8
    raw = reader.read(layer.source_tensor, start * row_nbytes, (stop - start) * row_nbytes)
    return raw.view(TORCH_DTYPES[layer.source_dtype]).reshape(-1, layer.K)


def scale_rows(layer: Layer, scale: Tensor, start: int, stop: int) -> Tensor:
    """Return the part of an FP8 scale that belongs to rows start..stop, for codec.expand_fp8_scale."""
    if layer.granularity == "tensor":
        return scale
    if layer.granularity == "block":
        return scale[start // FP8_BLOCK_SIZE : -(-stop // FP8_BLOCK_SIZE)]
    return scale[start:stop]


def holds_nan_code(scale_codes: Tensor) -> bool:
    return bool((scale_codes == E8M0_NAN).any())


def _row_multiple(layer: Layer) -> int:
    if layer.format == "mxfp4":
        return MXFP4_BLOCK_SIZE
    return FP8_BLOCK_SIZE if layer.granularity == "block" else 1
