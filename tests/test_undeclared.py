"""FP8 files that no config declares: ComfyUI's, with and without scales, under BFL's names, in E4M3 and E5M2."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from run_ckpt import load_quantized
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.undeclared import CAST, COMFYUI
from run_ckpt.progress import Silent
from run_ckpt.storage.components import open_checkpoint
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.rows import decode_rows
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.summary import inspect_component
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.foreign import Encoded, modelopt_nvfp4, mxfp8, scales
from tests.models import MODELS
from tests.test_originals import PREFIX, map_of, to_original

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The tensors of a file, and the float32 values that they stand for, given those of an unquantized one.
Quantized = tuple[dict[str, Tensor], dict[str, Tensor]]


def cast(original: dict[str, Tensor], dtype: torch.dtype = E4M3) -> Quantized:
    """Every tensor, norms and biases too, as ``*_fp8_e4m3fn.safetensors`` has it."""
    codes = {name: tensor.to(dtype) for name, tensor in original.items()}
    return codes, {name: tensor.float() for name, tensor in codes.items()}


def scaled(original: dict[str, Tensor], names: tuple[str, str], dtype: torch.dtype = E4M3) -> Quantized:
    """The weights of linear layers with scales beside them; all else stays BF16."""
    stored, values = {}, {}
    for name, tensor in original.items():
        stored[name], values[name] = tensor, tensor.float()
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / torch.finfo(dtype).max
            stored[name] = (tensor.float() / scale).to(dtype)
            values[name] = stored[name].float() * scale
            module = name.removesuffix(".weight")
            stored[f"{module}.{names[0]}"], stored[f"{module}.{names[1]}"] = scale, torch.tensor(1.0)
    return stored, values


def older_comfy(original: dict[str, Tensor]) -> Quantized:
    stored, values = scaled(original, ("scale_weight", "scale_input"))
    return {**stored, f"{PREFIX}scaled_fp8": torch.empty(2, dtype=E4M3)}, values


def newer_comfy(original: dict[str, Tensor]) -> Quantized:
    stored, values = scaled(original, ("weight_scale", "input_scale"))
    mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marks = {
        name.replace(".weight_scale", ".comfy_quant"): mark.clone() for name in stored if name.endswith(".weight_scale")
    }
    return stored | marks, values


def blocked(scales: Tensor) -> Tensor:
    """Scales [N, K] as cuBLAS wants them: row 32 i + j of a tile of [128, 4] at [j, i], tiles one after the other."""
    padded = torch.zeros(-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    stored = torch.empty_like(padded).flatten()
    for n in range(padded.shape[0]):
        first = (n // 128) * 128 * padded.shape[1] + (n % 32) * 16 + n % 128 // 32 * 4
        for k in range(0, padded.shape[1], 4):
            stored[first + k // 4 * 512 :][:4] = padded[n, k : k + 4]
    return stored.reshape(padded.shape)


def comfy_blocks(original: dict[str, Tensor], encode: Callable[[int, int, int], Encoded]) -> Quantized:
    """ComfyUI's NVFP4 or MXFP8: codes of another tool, the even k above and the scales in tiles."""
    stored, values = dict(original), {name: tensor.float() for name, tensor in original.items()}
    for seed, name in enumerate(key for key in original if key.endswith("blocks.0.linear1.weight")):
        tensors, values[name] = encode(*original[name].shape, seed)
        codes, module = tensors["weight"], name.removesuffix(".weight")
        stored[name] = codes << 4 | codes >> 4 if codes.dtype == torch.uint8 else codes
        stored[f"{module}.weight_scale"] = blocked(tensors["weight_scale"]).view(tensors["weight_scale"].dtype)
        if "weight_scale_2" in tensors:
            stored[f"{module}.weight_scale_2"] = tensors["weight_scale_2"]
        stored[f"{module}.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    return stored, values


def comfy_int8(original: dict[str, Tensor], *, rotated: bool) -> Quantized:
    """ComfyUI's INT8, with one scale; or by row, its columns rotated 256 at a time."""
    stored, values = dict(original), {name: tensor.float() for name, tensor in original.items()}
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    rotation = torch.kron(torch.kron(h4, h4), torch.kron(h4, h4))
    mark = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": 256} if rotated else {})}
    for seed, name in enumerate(key for key in original if key.endswith("blocks.0.linear1.weight")):
        N, K = original[name].shape
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
        scale = scales(N, 1, seed=seed) if rotated else scales(seed=seed)
        whole = (codes.double().reshape(-1, 256) @ rotation).reshape(N, K) if rotated else codes.double()
        values[name] = (whole * scale.double()).float()  # rounded once: codes and rotation are exact in float64
        module = name.removesuffix(".weight")
        stored |= {name: codes, f"{module}.weight_scale": scale}
        stored[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    return stored, values


FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Quantized]]] = {
    "cast": (CAST, cast),
    "cast-e5m2": (CAST, lambda original: cast(original, E5M2)),
    "older-comfy": (COMFYUI, older_comfy),
    "newer-comfy": (COMFYUI, newer_comfy),
    "comfy-nvfp4": (COMFYUI, lambda original: comfy_blocks(original, modelopt_nvfp4)),
    "comfy-mxfp8": (COMFYUI, lambda original: comfy_blocks(original, mxfp8)),
    "comfy-int8": (COMFYUI, lambda original: comfy_int8(original, rotated=False)),
    "comfy-int8-rotated": (COMFYUI, lambda original: comfy_int8(original, rotated=True)),
    "comfy-e5m2": (COMFYUI, lambda original: scaled(original, ("scale_weight", "scale_input"), E5M2)),
}


STORED = {
    "cast-e5m2": "fp8_e5m2",
    "comfy-e5m2": "fp8_e5m2",
    "comfy-nvfp4": "nvfp4_blocked",
    "comfy-mxfp8": "mxfp8_blocked",
    "comfy-int8": "int8",
    "comfy-int8-rotated": "int8",
}


def write(path: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """Write FLUX.1 in one file; return it and the values of its tensors, float32, under BFL's names."""
    model = MODELS["flux1"].build()
    original = to_original(model.state_dict(), map_of("FluxTransformer2DModel"))
    stored, values = FILES[name][1]({PREFIX + key: tensor for key, tensor in original.items()})
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, path)
    return path, values


@pytest.mark.parametrize("name", FILES)
def test_dequantized_tensors_are_the_files_own_rounded_to_bfloat16(tmp_path: Path, name: str) -> None:
    file, values = write(tmp_path / "flux.safetensors", name)
    dequantize(file, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = load_all(tmp_path / "plain")
    assert plain.keys() == values.keys()
    for key, value in values.items():
        assert_bits_equal(plain[key], value.bfloat16())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [{"format": "fp8"}, {"format": "mxfp4", "layout": "plain"}], ids=["fp8", "mxfp4"])
def test_a_result_has_diffusers_names_and_the_values_of_the_file(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    file, values = write(tmp_path / "flux.safetensors", name)
    expected = diffusers_form({key.removeprefix(PREFIX): value for key, value in values.items()})
    convert(file, tmp_path / "out", preset=None, target="run-ckpt", **options)
    manifest = read_manifest(tmp_path / "out")
    kept = load_all(tmp_path / "out")
    for key in manifest.kept:
        assert_bits_equal(kept[key], expected[key].bfloat16())
    stored = STORED.get(name, "fp8")
    is_passed_through = (options["format"], stored) == ("fp8", "fp8")
    if is_passed_through:
        with open_checkpoint(tmp_path / "out") as checkpoint:
            for layer in manifest.layers.values():
                assert_bits_equal(decode_rows(checkpoint.reader, layer, 0, layer.N), expected[layer.source_tensor])
    counts = manifest.source["quantized"]["weights"]
    assert counts[f"{stored} {'passed through' if is_passed_through else 'requantized'}"] > 0
    assert manifest.source["quantized"]["by"] == FILES[name][0]
    (report,) = verify_output(tmp_path / "out", file, Silent())
    assert report.faults == ()


def diffusers_form(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as diffusers has them, by the map that test_originals.py compares with its converter."""
    hidden, named = original["img_in.weight"].shape[0], {}
    for name, tensor in original.items():
        rule, targets = map_of("FluxTransformer2DModel").find_rule(name) or pytest.fail(name)
        whole = torch.cat([*tensor.chunk(2)][::-1]) if rule.is_swapped else tensor
        sizes = [hidden] * (len(targets) - 1)
        named |= dict(zip(targets, whole.split([*sizes, len(tensor) - sum(sizes)]), strict=True))
    return {name: tensor.contiguous() for name, tensor in named.items()}


def test_inspect_shows_them_and_load_quantized_says_the_way(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "flux.safetensors", "cast")
    summary = inspect_component("", file, every_layer=True).summary
    assert (summary.tool, summary.format) == (CAST, "fp8")
    with pytest.raises(CheckpointError, match="FP8 without a scale, which no layer here takes; convert-ckpt does"):
        load_quantized(file, model=torch.nn.Module())


Q = "model.layers.0.self_attn.q_proj"
CODES = torch.ones(256, 256).to(E4M3)
REFUSED = {
    "an unknown tensor beside it": ({f"{Q}.weight": CODES, f"{Q}.magnitude": torch.ones(1)}, "q_proj.magnitude"),
    "two scales": (
        {f"{Q}.weight": CODES, f"{Q}.weight_scale": torch.ones(1), f"{Q}.scale_weight": torch.ones(1)},
        "2 weight scales beside it",
    ),
    "a scale of another shape": ({f"{Q}.weight": CODES, f"{Q}.weight_scale": torch.ones(7)}, "is no MXFP8 or FP8"),
    "a scale without a weight": ({f"{Q}.scale_weight": torch.ones(1), "x.weight": CODES}, "a scale without a weight"),
    "smoothed inputs": (
        {f"{Q}.weight": CODES, f"{Q}.weight_scale": torch.ones(1), f"{Q}.pre_quant_scale": torch.ones(256)},
        "its inputs are scaled by channel",
    ),
    "unmarked blocks": (
        {f"{Q}.weight": CODES, f"{Q}.weight_scale": torch.ones(256, 8, dtype=torch.uint8)},
        "nothing says in which order the scales",
    ),
    "INT8 with a scale for each 64": (
        {
            f"{Q}.weight": torch.ones(256, 256, dtype=torch.int8),
            f"{Q}.weight_scale": torch.ones(256, 4),
            f"{Q}.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        },
        "no INT8 weight with a scale for each row",
    ),
    "AWQ": ({f"{Q}.qweight": torch.ones(8, 8).int(), f"{Q}.qzeros": torch.ones(1, 8).int()}, "(AWQ, GPTQ)"),
    "nothing": ({f"{Q}.weight": torch.empty(0, 256).to(E4M3)}, "holds nothing"),
    "a name twice": ({Q: CODES.clone(), f"{Q}.weight": CODES}, "a weight, and a tensor of the name"),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_had_exactly_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    config: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    source = save_checkpoint(tmp_path / "source", [{**tensors, "a.weight": torch.ones(2, 2)}], config)
    with pytest.raises(FaultsError, match=re.escape(message)):
        dequantize(source, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    with pytest.raises(FaultsError, match=re.escape(message)):
        convert(source, tmp_path / "out", format="fp8")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (b"{}", "no mark of ComfyUI's"),
        (b"\xff[", "no mark of ComfyUI's"),
        (b'{"format": "convrot_w4a4"}', "'convrot_w4a4', I8 codes that are not read here"),
        (
            b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 32}',
            "256 columns rotated 32 at a time",
        ),
        (
            b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1024}',
            "256 columns rotated 1024 at a time",
        ),
    ],
)
def test_a_mark_that_says_something_else_is_refused(tmp_path: Path, mark: bytes, message: str) -> None:
    tensors = {
        f"{Q}.weight": torch.ones(256, 256, dtype=torch.int8),
        f"{Q}.weight_scale": torch.ones(256, 1),
        f"{Q}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
    }
    source = save_checkpoint(tmp_path / "source", [tensors], {"model_type": "llama"})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        dequantize(source, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(source, tmp_path / "out", format="fp8", preset="generic")
    assert not (tmp_path / "plain").exists()
