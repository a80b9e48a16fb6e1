"""The header of a GGUF file, with every check: the tensors it places, and the bytes between them.

Source: ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

from run_ckpt.contract.errors import HeaderError
from run_ckpt.contract.ggml import GGML_TYPES, PADDING, GgmlType
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.header import MAX_FILE_NBYTES, MAX_HEADER_NBYTES, Header, StoredTensor

# Keys of Header.metadata, followed by a tensor's name: its type in ggml's words, its shape as ComfyUI-GGUF keeps it.
TYPE_KEY, SHAPE_KEY = "ggml_type.", "comfy.gguf.orig_shape."
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_SPLIT_KEY = "split.count"
_MAX_DIMENSIONS = 8
# Type of a value -> how struct reads it.
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_gguf_header(path: Path) -> Header:
    """Return the checked header of a GGUF file as if it were one of safetensors.

    Codes are U8 [bytes]; ``metadata`` says of each what it is in ggml's words, and what it stands for.
    Bytes between tensors are tensors too, named by PADDING. Raises HeaderError.
    """
    with open(open_to_read(path), "rb") as file:
        return parse_gguf_header(path.name, file.read, os.fstat(file.fileno()).st_size)


def parse_gguf_header(name: str, read: Callable[[int], bytes], file_nbytes: int) -> Header:
    """Return what read_gguf_header does, of a file whose next bytes ``read`` returns, so many as it is asked for."""
    cursor = _Cursor(name, read, file_nbytes)
    try:
        return _read(cursor)
    except (struct.error, UnicodeDecodeError) as error:
        raise cursor.error(f"is damaged ({error})") from error


class _Cursor:
    """Reads a header from its start on, up to the end of the file or the largest that is taken."""

    def __init__(self, name: str, read: Callable[[int], bytes], file_nbytes: int):
        self.name, self.data = name, bytearray()
        self._read = read
        self.file_nbytes = file_nbytes

    def take(self, nbytes: int) -> bytes:
        end = len(self.data) + nbytes
        if end > MAX_HEADER_NBYTES:
            raise self.error(f"takes more than {MAX_HEADER_NBYTES:,} bytes")
        if end > self.file_nbytes:
            raise self.error("is truncated")
        data = self._read(nbytes)
        self.data += data
        return data

    def scalar(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value) if math.isfinite(value) else 0

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode()

    def error(self, what: str) -> HeaderError:
        return HeaderError(f"{self.name}: the header of this GGUF file {what}. Fetch it again.")


def _read(cursor: _Cursor) -> Header:
    if cursor.take(4) != _MAGIC:
        raise cursor.error("does not begin with GGUF")
    if (version := cursor.scalar("<I")) not in _VERSIONS:
        raise cursor.error(f"is of version {version}, {' and '.join(map(str, _VERSIONS))} are read here")
    n_tensors, n_values = cursor.scalar("<Q"), cursor.scalar("<Q")
    values = dict(_read_value(cursor) for _ in range(n_values))
    if (n_parts := _number(values, _SPLIT_KEY, 1)) > 1:
        raise HeaderError(f"{cursor.name}: is one of {n_parts} parts. Merge them: llama-gguf-split --merge.")
    metadata: dict[str, str] = {}
    placed = [_read_tensor(cursor, values, metadata) for _ in range(n_tensors)]
    if len({tensor.spec.name for tensor in placed}) != len(placed):
        raise cursor.error("names a tensor more than once")
    alignment = _number(values, _ALIGNMENT_KEY, _ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"says {_ALIGNMENT_KEY} {alignment}, no power of two")
    if placed:
        cursor.take(-len(cursor.data) % alignment)
    return Header(bytes(cursor.data), _place(cursor, placed, alignment), metadata)


def _number(values: dict[str, list[int]], key: str, default: int) -> int:
    return (values.get(key) or [default])[0]


def _read_value(cursor: _Cursor) -> tuple[str, list[int]]:
    """Return a key and its value as numbers; none for text."""
    key, kind = cursor.text(), cursor.scalar("<I")
    if kind != _ARRAY:
        return key, _read_items(cursor, kind, 1)
    kind, count = cursor.scalar("<I"), cursor.scalar("<Q")
    return key, _read_items(cursor, kind, count)


def _read_items(cursor: _Cursor, kind: int, count: int) -> list[int]:
    if kind == _STRING:
        for _ in range(count):
            cursor.take(cursor.scalar("<Q"))
        return []
    if kind not in _SCALARS:
        raise cursor.error(f"holds a value of type {kind}, which is not known here")
    if count > _MAX_DIMENSIONS:
        cursor.take(count * struct.calcsize(_SCALARS[kind]))
        return []
    return [cursor.scalar(_SCALARS[kind]) for _ in range(count)]


def _read_tensor(cursor: _Cursor, values: dict[str, list[int]], metadata: dict[str, str]) -> StoredTensor:
    """Return a tensor with its offset from the first byte of data, and note its type where it is codes."""
    name, n_dimensions = cursor.text(), cursor.scalar("<I")
    if n_dimensions > _MAX_DIMENSIONS:
        raise cursor.error(f"gives {name!r} {n_dimensions} dimensions")
    # The first is the one whose elements lie side by side.
    shape = [cursor.scalar("<Q") for _ in range(n_dimensions)][::-1]
    found = GGML_TYPES.get(number := cursor.scalar("<I"))
    if found is None:
        raise HeaderError(
            f"{cursor.name}: {name!r}: ggml's type {number} is not read here. Give the original checkpoint."
        )
    offset, n_elements = cursor.scalar("<Q"), math.prod(shape)
    if max([n_elements, offset]) > MAX_FILE_NBYTES or (shape or [1])[-1] % found.block:
        raise cursor.error(f"places {name!r}, {found.name} {shape}, where no file holds it")
    original = values.get(SHAPE_KEY + name, shape)
    shape = original if math.prod(original) == n_elements and min(original, default=0) >= 0 else shape
    return StoredTensor(_spec(name, shape, found, metadata), offset)


def _spec(name: str, shape: list[int], found: GgmlType, metadata: dict[str, str]) -> TensorSpec:
    if found.dtype:
        return TensorSpec(name, found.dtype, tuple(shape))
    metadata[TYPE_KEY + name] = found.name
    metadata[SHAPE_KEY + name] = " ".join(map(str, shape))
    return TensorSpec(name, "U8", (math.prod(shape) // found.block * found.nbytes,))


def _place(cursor: _Cursor, placed: list[StoredTensor], alignment: int) -> tuple[StoredTensor, ...]:
    """Return tensors and padding by rising offset from the start of the file, so that they fill it."""
    tensors, end = [], len(cursor.data)
    ordered = sorted(placed, key=lambda tensor: (tensor.offset, tensor.end))
    starts = [len(cursor.data) + tensor.offset for tensor in ordered]
    for start, tensor in zip([*starts, cursor.file_nbytes], [*ordered, None], strict=True):
        if not 0 <= start - end < alignment:
            where = f"{tensor.spec.name!r}" if tensor else "the end of the file"
            raise cursor.error(f"leaves {start - end} bytes before {where}: it is truncated, or damaged")
        if start > end:
            tensors.append(StoredTensor(TensorSpec(PADDING.format(end), "U8", (start - end,)), end))
        if tensor:
            tensors.append(StoredTensor(tensor.spec, start))
            end = tensors[-1].end
    return tuple(tensors)
