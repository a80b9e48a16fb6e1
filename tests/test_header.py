"""The safetensors header: built byte for byte as the library builds it, and read with every lie found."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from run_ckpt.contract.errors import HeaderError
from run_ckpt.contract.tensors import DTYPE_BITS, TensorSpec
from run_ckpt.storage.header import Header, build_header, parse_header, read_header

FILE = "weights.safetensors"
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# Lone surrogates have no UTF-8, so no file can hold them.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TORCH_SETS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES) | st.tuples(st.just("F4"), SHAPES.map(lambda s: (*s, 8))),
    max_size=8,
)
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), NAMES, min_size=1)
# Sub-byte types need a last dimension that fills whole bytes.
ANY_SETS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), SHAPES.map(lambda s: (*s, 8))), max_size=8
)

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that every example of a property test may write to."""
    return tmp_path_factory.mktemp("header") / FILE


def specs_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]


def make_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == "F4":  # torch counts pairs, the header elements
        return torch.zeros((*shape[:-1], shape[-1] // 2), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    return torch.zeros(shape, dtype=TORCH_DTYPES[dtype])


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A file with ``header`` (JSON text, or an object to dump) and ``data`` behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def fault(content: bytes, tmp_path: Path) -> str:
    """The message with which a file of these bytes is refused."""
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    return str(caught.value)


def assert_tiles_the_file(header: Header, file_nbytes: int) -> None:
    end = len(header.data)
    for tensor in header.tensors:
        assert tensor.offset == end
        end = tensor.end
    assert end == file_nbytes


@settings(max_examples=150, deadline=None)
@given(tensors=TORCH_SETS)
def test_built_header_is_the_one_that_save_file_writes(
    scratch_file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    saved = {name: make_tensor(dtype, shape) for name, (dtype, shape) in tensors.items()}
    save_file(saved, scratch_file, metadata={"format": "pt"})
    content = scratch_file.read_bytes()
    header = build_header(specs_of(tensors))
    assert header.data == content[: len(header.data)]
    assert header.file_nbytes == len(content)


@settings(max_examples=100, deadline=None)
@given(tensors=ANY_SETS)
def test_library_reads_what_a_built_header_says_in_every_dtype(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    header = build_header(specs_of(tensors))
    content = header.data + bytes(header.file_nbytes - len(header.data))
    read = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in safetensors.deserialize(content)}
    assert read == tensors


@settings(max_examples=150, deadline=None)
@given(tensors=TORCH_SETS, metadata=st.none() | METADATA)
def test_every_file_that_save_file_writes_is_read(
    scratch_file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    saved = {name: make_tensor(dtype, shape) for name, (dtype, shape) in tensors.items()}
    save_file(saved, scratch_file, metadata=metadata)
    header = read_header(scratch_file)
    assert {tensor.spec for tensor in header.tensors} == set(specs_of(tensors))
    assert header.metadata == (metadata or {})
    assert_tiles_the_file(header, scratch_file.stat().st_size)


def test_offsets_lead_to_the_bytes_that_were_saved(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(7, dtype=torch.int64), "a": torch.arange(5, dtype=torch.uint8), "c": torch.randn(2, 3)}
    save_file(tensors, tmp_path / FILE)
    content = (tmp_path / FILE).read_bytes()
    found = {t.spec.name: content[t.offset : t.end] for t in read_header(tmp_path / FILE).tensors}
    assert found == {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_built_header_reads_back_as_itself() -> None:
    specs = [TensorSpec("w", "U8", (4, 16)), TensorSpec("s", "F32", ()), TensorSpec("empty", "BF16", (0, 8))]
    built = build_header(specs)
    assert parse_header(FILE, built.data, built.file_nbytes) == built


def test_metadata_keeps_its_given_order() -> None:
    header = build_header([], {"z": "1", "a": "2"})
    assert header.data[8:].rstrip() == b'{"__metadata__":{"z":"1","a":"2"}}'


@pytest.mark.parametrize("content", [b"", b"\x10", b"\x10\0\0\0\0\0\0"], ids=["empty", "1-byte", "7-bytes"])
def test_file_shorter_than_the_length_prefix_is_refused(content: bytes, tmp_path: Path) -> None:
    message = fault(content, tmp_path)
    assert message.startswith(f"{FILE}: {len(content)} bytes is too short")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1], ids=["over-limit", "2^63", "2^64-1"])
def test_absurd_header_length_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    message = fault(length.to_bytes(8, "little") + b"{}", tmp_path)
    assert message.startswith(f"{FILE}: the header claims {length:,} bytes, more than")


def test_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    message = fault((3).to_bytes(8, "little") + b"{}", tmp_path)
    assert message.startswith(f"{FILE}: the header claims 3 bytes but the file has only 10: truncated")


@pytest.mark.parametrize(
    "text",
    [
        b'{"\xff\xfe": 1}',
        b"",
        b"{",
        b"not json",
        b"{'a': 1}",
        b'{"a": }',
        b"[" * 200_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"1" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
    ids=["not-utf-8", "empty", "cut", "prose", "single-quotes", "no-value", "deep-nesting", "5000-digit-number"],
)
def test_header_that_is_not_json_is_refused(text: bytes, tmp_path: Path) -> None:
    assert fault(file_bytes(text), tmp_path).startswith(f"{FILE}: the header is not valid JSON")


@pytest.mark.parametrize("text", [b"[]", b"1", b'"text"', b"null", b"true"])
def test_header_that_is_not_an_object_is_refused(text: bytes, tmp_path: Path) -> None:
    assert fault(file_bytes(text), tmp_path).startswith(f"{FILE}: the header is not a JSON object")


def test_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(ENTRY)
    message = fault(file_bytes(f'{{"block.w": {entry}, "block.w": {entry}}}'.encode(), bytes(24)), tmp_path)
    assert message.startswith(f"{FILE}: the header names ['block.w'] more than once")


def test_name_that_utf_8_cannot_hold_is_refused(tmp_path: Path) -> None:
    # JSON can spell half of a surrogate pair; the library refuses it, and no output header could say it.
    text = json.dumps({"w\ud800": ENTRY}).encode()
    assert FILE in fault(file_bytes(text, bytes(24)), tmp_path)


ENTRY_FAULTS: dict[str, tuple[object, str]] = {
    "not-an-object": ([1], "an entry must hold dtype, shape and data_offsets"),
    "null": (None, "an entry must hold dtype, shape and data_offsets"),
    "missing-key": ({"dtype": "F32", "shape": [2, 3]}, "an entry must hold dtype, shape and data_offsets"),
    "extra-key": (ENTRY | {"stride": [3, 1]}, "an entry must hold dtype, shape and data_offsets"),
    "unknown-dtype": (ENTRY | {"dtype": "F128"}, "unknown dtype 'F128'"),
    "lower-case-dtype": (ENTRY | {"dtype": "f32"}, "unknown dtype 'f32'"),
    "dtype-not-text": (ENTRY | {"dtype": ["F32"]}, "unknown dtype ['F32']"),
    "negative-size": (ENTRY | {"shape": [-2, -3]}, "shape [-2, -3] is not a list of sizes"),
    "float-size": (ENTRY | {"shape": [2.0, 3]}, "shape [2.0, 3] is not a list of sizes"),
    "bool-size": (ENTRY | {"shape": [True, 6]}, "shape [True, 6] is not a list of sizes"),
    "nan-size": (ENTRY | {"shape": [float("nan")]}, "shape [nan] is not a list of sizes"),
    "shape-not-a-list": (ENTRY | {"shape": 6}, "shape 6 is not a list of sizes"),
    "negative-offset": (ENTRY | {"data_offsets": [-24, 0]}, "data_offsets [-24, 0] is not a pair"),
    "float-offset": (ENTRY | {"data_offsets": [0, 24.0]}, "data_offsets [0, 24.0] is not a pair"),
    "bool-offset": (ENTRY | {"data_offsets": [False, 24]}, "data_offsets [False, 24] is not a pair"),
    "one-offset": (ENTRY | {"data_offsets": [24]}, "data_offsets [24] is not a pair"),
    "three-offsets": (ENTRY | {"data_offsets": [0, 12, 24]}, "data_offsets [0, 12, 24] is not a pair"),
    "span-too-long": (ENTRY | {"data_offsets": [0, 28]}, "F32 [2, 3] takes 24 bytes but data_offsets [0, 28] span 28"),
    "span-too-short": (ENTRY | {"data_offsets": [4, 24]}, "F32 [2, 3] takes 24 bytes but data_offsets [4, 24] span 20"),
    "span-backwards": (ENTRY | {"data_offsets": [24, 0]}, "takes 24 bytes but data_offsets [24, 0] span -24"),
    "half-a-byte": ({"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}, "F4 [3] takes 1.5 bytes"),
    "size-beyond-64-bits": (ENTRY | {"shape": [2**62, 2**62]}, "but data_offsets [0, 24] span 24"),
}


@pytest.mark.parametrize(("entry", "says"), ENTRY_FAULTS.values(), ids=ENTRY_FAULTS)
def test_wrong_entry_is_refused_by_file_and_tensor(entry: object, says: str, tmp_path: Path) -> None:
    message = fault(file_bytes({"block.w": entry}, bytes(24)), tmp_path)
    assert message.startswith(f"{FILE}: 'block.w'")
    assert says in message


def entry_at(first: int, last: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}


PLACEMENT_FAULTS: dict[str, tuple[dict[str, tuple[int, int]], int, str]] = {
    "overlap": ({"a": (0, 8), "b": (4, 12)}, 12, "'b' overlaps the tensor before it"),
    "same-place": ({"a": (0, 8), "b": (0, 8)}, 8, "'b' overlaps the tensor before it"),
    "inside": ({"a": (0, 12), "b": (4, 8)}, 12, "'b' overlaps the tensor before it"),
    "hole": ({"a": (0, 4), "b": (8, 12)}, 12, "4 unclaimed bytes before 'b'"),
    "hole-at-start": ({"b": (8, 12)}, 12, "8 unclaimed bytes before 'b'"),
    "truncated": ({"a": (0, 8), "b": (8, 16)}, 15, "truncated: the header places tensors up to byte"),
    "out-of-range": ({"a": (0, 8), "b": (8, 10**15)}, 16, "truncated: the header places tensors up to byte"),
    "trailing": ({"a": (0, 8)}, 13, "5 bytes follow the last tensor"),
    "trailing-without-tensors": ({}, 3, "3 bytes follow the last tensor"),
}


@pytest.mark.parametrize(("places", "nbytes", "says"), PLACEMENT_FAULTS.values(), ids=PLACEMENT_FAULTS)
def test_misplaced_tensor_is_refused(
    places: dict[str, tuple[int, int]], nbytes: int, says: str, tmp_path: Path
) -> None:
    message = fault(file_bytes({name: entry_at(*place) for name, place in places.items()}, bytes(nbytes)), tmp_path)
    assert message.startswith(f"{FILE}: ")
    assert says in message
    assert "; " not in message, "one fault, one sentence"


@pytest.mark.parametrize("metadata", [None, [], "text", {"format": 1}, {"format": None}, {"a": {"b": "c"}}], ids=str)
def test_metadata_that_is_not_a_map_of_text_is_refused(metadata: object, tmp_path: Path) -> None:
    message = fault(file_bytes({"__metadata__": metadata, "w": ENTRY}, bytes(24)), tmp_path)
    assert message.startswith(f"{FILE}: __metadata__ is not a map of text to text")


def test_all_faults_of_a_file_come_in_one_message(tmp_path: Path) -> None:
    header = {"a": ENTRY | {"dtype": "F128"}, "b": ENTRY | {"shape": [-1]}, "__metadata__": 1}
    message = fault(file_bytes(header, bytes(24)), tmp_path)
    assert all(part in message for part in ("'a': unknown dtype", "'b': shape [-1]", "__metadata__ is not"))


def _valid_file() -> bytes:
    specs = [
        TensorSpec("blocks.0.weight", "BF16", (4, 8)),
        TensorSpec("blocks.0.bias", "F32", (4,)),
        TensorSpec("blocks.0.packed", "F4", (4, 2)),
        TensorSpec("größe", "U8", ()),
    ]
    header = build_header(specs)
    return header.data + bytes(header.file_nbytes - len(header.data))


VALID_FILE = _valid_file()
HEADER_END = int.from_bytes(VALID_FILE[:8], "little") + 8
EDITS = st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=600, deadline=None)
@given(edits=EDITS)
def test_damaged_header_is_refused_or_still_describes_the_file(
    scratch_file: Path, edits: list[tuple[int, int]]
) -> None:
    header = _read_damaged(scratch_file, edits)
    if header:
        assert_tiles_the_file(header, len(VALID_FILE))


@settings(max_examples=600, deadline=None)
@given(edits=EDITS)
def test_damaged_header_that_is_accepted_is_also_accepted_by_the_library(
    scratch_file: Path, edits: list[tuple[int, int]]
) -> None:
    if _read_damaged(scratch_file, edits):
        safetensors.deserialize(scratch_file.read_bytes())


def _read_damaged(path: Path, edits: list[tuple[int, int]]) -> Header | None:
    content = bytearray(VALID_FILE)
    for position, value in edits:
        content[position] = value
    path.write_bytes(content)
    try:
        return read_header(path)
    except HeaderError:
        return None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)
ODD_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 2**70), min_size=2, max_size=2) | JSON_VALUES,
    }
)


@settings(max_examples=300, deadline=None)
@given(entries=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ODD_ENTRIES | JSON_VALUES, max_size=3))
def test_no_json_value_anywhere_makes_the_parser_crash(entries: dict[str, Any]) -> None:
    content = file_bytes(entries)
    try:
        header = parse_header(FILE, content, len(content))
    except HeaderError:
        return
    assert_tiles_the_file(header, len(content))
