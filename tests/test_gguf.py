"""GGUF files: what ggml's blocks stand for, as diffusers decodes them; and headers that lie."""

import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_ckpt.source.component import open_component
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.ggml import GGML_FORMATS, GGML_TYPES
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.summary import inspect_component
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all
from tests.models import MODELS
from tests.test_originals import map_of, to_original

gguf = pytest.importorskip("gguf")
ggml = pytest.importorskip("diffusers.quantizers.gguf.utils")


def random_blocks(name: str, n_bytes: int, seed: int) -> torch.Tensor:
    """uint8 [n_bytes]: blocks of a type whose half precision numbers are small and finite."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = torch.randint(256, (n_bytes // size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    # Where any type has its scales in half precision; the upper byte holds sign and exponent.
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2)):
        data[:, place + 1] = data[:, place + 1] % 8 + 0x18
    return data.flatten()


def decode_by_diffusers(name: str, blocks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    rows = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    decoded = ggml.dequantize_functions[kind](rows, *gguf.GGML_QUANT_SIZES[kind], dtype=torch.float32)
    return decoded.reshape(shape)


def write(path: Path, *, quantized: str, arch: str = "flux") -> tuple[Path, dict[str, torch.Tensor]]:
    """Write FLUX.1 as city96's files are: matrices in blocks of a type, norms and biases F32; return its values."""
    model = MODELS["flux1"].build()
    original = to_original(model.state_dict(), map_of("FluxTransformer2DModel"))
    writer, values = gguf.GGUFWriter(path, arch), {}
    kind = gguf.GGMLQuantizationType[quantized]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for seed, (name, tensor) in enumerate(original.items()):
        if tensor.ndim == 2 and tensor.shape[1] % block == 0:
            blocks = random_blocks(quantized, tensor.numel() // block * size, seed)
            values[name] = decode_by_diffusers(quantized, blocks, tuple(tensor.shape))
            writer.add_tensor(name, blocks.reshape(len(tensor), -1).numpy(), raw_dtype=kind)
        elif tensor.ndim == 2:
            values[name] = tensor
            bits = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            values[name] = tensor.float()
            writer.add_tensor(name, values[name].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


def test_the_table_of_types_is_ggufs() -> None:
    for number, found in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (found.name, (found.block, found.nbytes))


@pytest.mark.parametrize("name", GGML_FORMATS.values())
def test_blocks_are_decoded_as_diffusers_does(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "flux")
    blocks = random_blocks(name, 24 * 512 // block * size, seed=1)
    writer.add_tensor("x.weight", blocks.reshape(24, -1).numpy(), raw_dtype=kind)
    writer.add_tensor("odd", torch.ones(3).numpy())  # so that padding follows
    writer.add_tensor("z", torch.ones(2, 5, dtype=torch.float16).numpy())
    for write_it in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_it()
    writer.close()
    dequantize(tmp_path / "it.gguf", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = load_file(tmp_path / "plain" / "it.safetensors")
    assert_bits_equal(plain["x.weight"], decode_by_diffusers(name, blocks, (24, 512)).bfloat16())
    assert plain.keys() == {"x.weight", "odd", "z"}


@pytest.mark.parametrize("quantized", ["Q8_0", "Q4_K"])
def test_a_result_is_that_of_a_file_with_the_same_values(tmp_path: Path, quantized: str) -> None:
    file, values = write(tmp_path / "flux-Q.gguf", quantized=quantized)
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "flux.safetensors")
    for source, output in ((file, "out"), (tmp_path / "flux.safetensors", "expected")):
        convert(source, tmp_path / output, format="mxfp4", preset=None)
    ours, expected = load_all(tmp_path / "out"), load_all(tmp_path / "expected")
    manifest = read_manifest(tmp_path / "out")
    for name, tensor in expected.items():
        kept = manifest.kept.get(name)
        wanted = tensor.bfloat16() if kept and "decoded" in kept.reason else tensor
        assert_bits_equal(ours[name].view(torch.uint8), wanted.view(torch.uint8))
    assert manifest.source["quantized"]["by"] == "GGUF"
    assert manifest.source["quantized"]["weights"][f"gguf_{quantized.lower()} requantized"] == len(manifest.layers) > 0
    (report,) = verify_output(tmp_path / "out", file, Silent())
    assert report.faults == ()
    summary = inspect_component("", file, every_layer=True).summary
    assert (summary.format, summary.output_nbytes) == (f"gguf_{quantized.lower()}", file.stat().st_size)


def test_a_folder_may_hold_one_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file, _ = write(tmp_path / "folder" / "flux-Q8_0.gguf", quantized="Q8_0")
    component = open_component(tmp_path / "folder")
    assert component.class_name == "FluxTransformer2DModel"
    assert not any("left out" in note for note in component.notes)
    file.with_name("flux-Q4_0.gguf").write_bytes(file.read_bytes())
    with pytest.raises(FaultsError, match=r"flux-Q4_0\.gguf, flux-Q8_0\.gguf: each is a model of its own"):
        open_component(tmp_path / "folder")


def test_a_language_model_is_refused_with_the_way(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(32, 32).numpy())
    for write_it in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_it()
    writer.close()
    with pytest.raises(FaultsError, match=r"under llama\.cpp's names.*gguf_file=FILE"):
        convert(tmp_path / "llama.gguf", tmp_path / "out", format="fp8")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(*tensors: bytes, values: tuple[bytes, ...] = (), count: int | None = None, version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors) if count is None else count, len(values))
    data = b"GGUF" + counts + b"".join(values) + b"".join(tensors)
    return data + bytes(-len(data) % 32)


GOOD = tensor("x.weight", (2, 32), 8, 0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "good": (header(GOOD) + bytes(68), ""),
    "no data": (header(GOOD), "leaves -68 bytes before the end"),
    "truncated": (header(GOOD)[:40], "is truncated"),
    "more behind it": (header(GOOD) + bytes(200), "leaves 132 bytes before the end"),
    "version": (header(GOOD, version=1), "is of version 1"),
    "2^60 tensors": (header(GOOD, count=2**60), "is truncated"),
    "a name of 2^63 bytes": (header(struct.pack("<Q", 2**63 - 1)), "takes more than 100,000,000 bytes"),
    "a list of 2^62 numbers": (
        header(values=(text("a") + struct.pack("<IIQ", 9, 4, 2**62),)),
        "takes more than 100,000,000 bytes",
    ),
    "a list of lists": (header(values=(text("a") + struct.pack("<IIQ", 9, 9, 1),)), "a value of type 9"),
    "half a character": (header(tensor("x", (2, 32), 8, 0).replace(b"x", b"\xff")), "is damaged"),
    "a type of the future": (header(tensor("x", (2, 32), 99, 0)), "ggml's type 99 is not read here"),
    "no whole block": (header(tensor("x", (2, 31), 8, 0)), "places 'x', Q8_0 [2, 31], where no file holds it"),
    "2^80 elements": (header(tensor("x", (2**40, 2**40), 0, 0)), "where no file holds it"),
    "30 dimensions": (header(tensor("x", (1,) * 30, 0, 0)), "gives 'x' 30 dimensions"),
    "two at one place": (header(GOOD, tensor("y", (2, 32), 8, 0)) + bytes(68), "leaves -68 bytes before 'y'"),
    "one name twice": (header(GOOD, GOOD) + bytes(68), "names a tensor more than once"),
    "alignment 0": (header(GOOD, values=(text("general.alignment") + struct.pack("<II", 4, 0),)), "no power of two"),
    "one of two parts": (header(GOOD, values=(text("split.count") + struct.pack("<IH", 2, 2),)), "one of 2 parts"),
    "a vector of codes": (header(tensor("x", (32,), 8, 0)) + bytes(34), "is no matrix in rows of blocks"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "it.gguf"
    file.write_bytes(data)
    plain = partial(dequantize, file, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    if not message:
        plain()
        return
    with pytest.raises(CheckpointError) as raised:
        plain()
    assert message in str(raised.value)
    assert not (tmp_path / "plain").exists()
