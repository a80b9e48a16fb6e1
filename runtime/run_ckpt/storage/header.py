"""The safetensors header: parsed with every check, and built byte for byte as the library does.

Source: the format's README and safetensors/src/tensor.rs (0.8).
"""

import json
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import HeaderError
from run_ckpt.contract.tensors import DTYPE_BITS, METADATA_KEY, PT_METADATA, TensorSpec, one_shape
from run_ckpt.storage.containers import describe_container
from run_ckpt.storage.files import open_to_read

_DTYPE_ORDER = {dtype: order for order, dtype in enumerate(DTYPE_BITS)}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000  # MAX_HEADER_SIZE in tensor.rs
MAX_FILE_NBYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; ``offset`` counts bytes from the start of the file."""

    spec: TensorSpec
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes


@dataclass(frozen=True)
class Header:
    """A header as stored (length prefix included) and the tensors it places, by rising offset."""

    data: bytes
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]

    @property
    def file_nbytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.data)


def build_header(specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> Header:
    """Return the header that safetensors itself would write for these tensors.

    metadata: written in the given key order; default ``{"format": "pt"}``.
    """
    metadata = PT_METADATA if metadata is None else metadata
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    by_name = sorted(specs, key=attrgetter("name"))
    ordered = sorted(by_name, key=lambda spec: -_DTYPE_ORDER[spec.dtype])
    entries = [f"{encode(METADATA_KEY)}:{encode(metadata)}"]
    relative = 0
    for spec in ordered:
        end = relative + spec.nbytes
        shape = ",".join(map(str, spec.shape))
        fields = f'"dtype":"{spec.dtype}","shape":[{shape}],"data_offsets":[{relative},{end}]'
        entries.append(f"{encode(spec.name)}:{{{fields}}}")
        relative = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(LENGTH_NBYTES, "little") + text
    return Header(data, _place(ordered, len(data)), dict(metadata))


def read_header(path: Path) -> Header:
    """Return the checked header of a safetensors file.

    Raises HeaderError that lists every fault found: absurd length, bad JSON, repeated names,
    unknown dtypes, sizes that contradict shapes, holes, overlaps, a truncated or overlong file.
    """
    return parse_header(path.name, *_read_bytes(path))


def confirm_header(path: Path, written: Header) -> Header:
    """Return the header of a safetensors file: ``written``, which build_header made, if that is what the file holds.

    Raises HeaderError as read_header.
    """
    data, file_nbytes = _read_bytes(path)
    is_same = data == written.data and file_nbytes == written.file_nbytes
    return written if is_same else parse_header(path.name, data, file_nbytes)


def parse_header(file_name: str, data: bytes, file_nbytes: int) -> Header:
    """Return the checked header from its bytes (length prefix included). Raises HeaderError."""
    entries = _load_json(file_name, data[LENGTH_NBYTES:])
    metadata = entries.pop(METADATA_KEY, {})
    faults: list[str] = []
    if not _is_text_map(metadata):
        faults.append(f"{METADATA_KEY} is not a map of text to text")
    placed = []
    for name, entry in entries.items():
        fault = _entry_fault(name, entry)
        if fault:
            faults.append(fault)
        else:
            spec = TensorSpec(name, sys.intern(entry["dtype"]), one_shape(entry["shape"]))
            placed.append(StoredTensor(spec, len(data) + entry["data_offsets"][0]))
    placed.sort(key=lambda tensor: (tensor.offset, tensor.end))
    if not faults:
        faults += _placement_faults(placed, len(data), file_nbytes)
    if faults:
        raise HeaderError(f"{file_name}: " + "; ".join(faults) + ". Fetch or write this file again.")
    return Header(data, tuple(placed), metadata)


def _read_bytes(path: Path) -> tuple[bytes, int]:
    """Return the bytes of a header, length prefix included, and the size of its file."""
    with open(open_to_read(path), "rb") as file:
        file_nbytes = os.fstat(file.fileno()).st_size
        prefix = file.read(LENGTH_NBYTES)
        length = int.from_bytes(prefix, "little")
        _check_length(path, len(prefix), length, file_nbytes)
        return prefix + file.read(length), file_nbytes


def _place(ordered: list[TensorSpec], start: int) -> tuple[StoredTensor, ...]:
    placed = []
    for spec in ordered:
        placed.append(StoredTensor(spec, start))
        start += spec.nbytes
    return tuple(placed)


def _check_length(path: Path, n_prefix: int, length: int, file_nbytes: int) -> None:
    if n_prefix < LENGTH_NBYTES:
        raise HeaderError(f"{path.name}: {file_nbytes} bytes is too short for a safetensors file. Fetch it again.")
    if length <= min(MAX_HEADER_NBYTES, file_nbytes - LENGTH_NBYTES):
        return
    if container := describe_container(path):
        raise HeaderError(container)
    if length > MAX_HEADER_NBYTES:
        raise HeaderError(
            f"{path.name}: the header claims {length:,} bytes, more than the {MAX_HEADER_NBYTES:,} the format allows."
            " This is no safetensors file, or a damaged one; fetch it again."
        )
    raise HeaderError(
        f"{path.name}: the header claims {length:,} bytes but the file has only {file_nbytes:,}:"
        " truncated. Fetch it again."
    )


def _load_json(file_name: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            shown = f"{repeated[:3]}{f' and {len(repeated) - 3} more' if len(repeated) > 3 else ''}"
            raise HeaderError(f"{file_name}: the header names {shown} more than once. Write this file again.")
        return entries

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{file_name}: the header is not valid JSON ({error}). Fetch this file again.") from error
    if not isinstance(entries, dict):
        raise HeaderError(f"{file_name}: the header is not a JSON object. Fetch this file again.")
    return entries


def _entry_fault(name: str, entry: Any) -> str | None:
    if not _is_encodable(name):
        return f"{name!r}: a name with half a surrogate pair, which UTF-8 can't hold"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return f"{name!r}: an entry must hold dtype, shape and data_offsets and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"{name!r}: unknown dtype {dtype!r}"
    if not _is_counts(shape):
        return f"{name!r}: shape {reprlib.repr(shape)} is not a list of sizes"
    if not _is_counts(offsets) or len(offsets) != 2:
        return f"{name!r}: data_offsets {reprlib.repr(offsets)} is not a pair of positions"
    n_bits = _count_elements(shape) * DTYPE_BITS[dtype]
    if n_bits % 8 or offsets[1] - offsets[0] != n_bits // 8:
        return (
            f"{name!r}: {dtype} {reprlib.repr(shape)} takes {n_bits / 8:g} bytes but data_offsets {offsets}"
            f" span {offsets[1] - offsets[0]}"
        )
    return None


def _count_elements(shape: list[int]) -> int:
    """Return the product of the sizes, or one that is too large for any file."""
    count = int(0 not in shape)
    for size in shape:
        if count > MAX_FILE_NBYTES:
            break
        count *= size
    return count


def _placement_faults(placed: list[StoredTensor], start: int, file_nbytes: int) -> list[str]:
    faults = []
    end = start
    for tensor in placed:
        if tensor.offset < end:
            faults.append(f"{tensor.spec.name!r} overlaps the tensor before it")
        elif tensor.offset > end:
            faults.append(f"{tensor.offset - end} unclaimed bytes before {tensor.spec.name!r}")
        end = max(end, tensor.end)
    if end > file_nbytes:
        faults.append(f"truncated: the header places tensors up to byte {end:,} but the file has {file_nbytes:,}")
    elif end < file_nbytes:
        faults.append(f"{file_nbytes - end:,} bytes follow the last tensor")
    return faults


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - half the time of all(), for every tensor of every file
        if type(item) is not int or not 0 <= item <= MAX_FILE_NBYTES:
            return False
    return True


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
