"""Load a converted transformer in unmodified SGLang 0.5.23 on a CPU and compare every weight with its BF16 source.

SGLang reports little that is wrong with a checkpoint: a missing scale becomes 1.0, a key it does not know is
a line in a log. So this runs SGLang's own ServerArgs, TransformerLoader, name mapping, loading and
process_weights_after_loading, decodes what the model then holds, and compares it with the source. Fused
linears are compared as SGLang fuses them. Prints one line per linear and a verdict; exit 1 on a defect.

    scripts/setup_sglang.sh DIR
    DIR/bin/python scripts/check_sglang.py CONVERTED... BF16 [--persona h100|b200|mi300x|mi355x] [--tp 1 2 4]

MXFP4 comes in by the plug-in, which SGLang finds by its entry point. What its linears hold is decoded and
multiplied by the reference backend. ``--tp N`` loads every rank of N, one after the other, and joins their
parts; there the layers that the plug-in does not hold are left out.

GPU and ranks are EMULATIONS, see sglang_on_cpu.py: this says nothing about speed, GPU kernels or activations.

SGLang reads Z-Image's sizes under names of its own. A Z-Image in other than the published size needs
num_layers, num_attention_heads and out_channels beside n_layers, n_heads and in_channels in both config.json.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from sglang_on_cpu import PERSONAS, Loaded, SGLang, Tensors

from run_ckpt.contract.codec import dequantize, tensor_scale
from run_ckpt.contract.formats import AITER_MXFP4, E2M1, MX_BLOCK_SIZE, PLAIN_NVFP4
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.storage.manifest_file import read_manifest

# Rounding to e4m3 with one scale per tensor or block costs 0.026 of a matrix of normal numbers, to e2m1
# with one scale for 32 values 0.112, for 16 values 0.095.
MAX_QUANTIZATION_ERROR = 0.032
MAX_E2M1_ERROR = 0.13
# What SGLang holds beside the codes and scales of an NVFP4 linear. The input_scale is 1.0 where the file has none.
OF_NVFP4 = ("weight_scale_2", "weight_scale_interleaved", "alpha", "input_scale_inv")
# What loading may add to that: MI300X requantizes fused linears through FP16.
MAX_LOADING_ERROR = 1e-3


@dataclass
class Report:
    """Lines for each linear, what is wrong, and what is worth knowing but not wrong."""

    lines: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    worst: float = 0.0
    n_plugin: int = 0


def main() -> int:
    """Print the report; return 1 where SGLang holds something else than the source says."""
    parser = argparse.ArgumentParser(description="Compare what SGLang loads from CONVERTED with BF16.")
    parser.add_argument("converted", type=Path, nargs="+", help="outputs of the converter for one model")
    parser.add_argument("bf16", type=Path, help="the folder they were made from")
    parser.add_argument("--persona", choices=PERSONAS, default="h100", help="GPU to emulate (default: h100)")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="numbers of ranks to emulate (default: 1)")
    parser.add_argument("--component", default="transformer", help="its name in the pipeline (default: transformer)")
    parser.add_argument("--without-plugins", action="store_true", help="leave out the plug-ins that are installed")
    parser.add_argument("--quiet", action="store_true", help="print defects and the verdicts alone")
    arguments = parser.parse_args()
    sglang = SGLang(arguments.bf16, PERSONAS[arguments.persona], plugins=not arguments.without_plugins)
    return max(
        [check(sglang, folder, arguments, n_ranks) for folder in arguments.converted for n_ranks in arguments.tp]
    )


def check(sglang: SGLang, folder: Path, arguments: argparse.Namespace, n_ranks: int) -> int:
    """Print the report for one folder and number of ranks; return 1 where anything is wrong."""
    component = arguments.component
    where = f"{folder.name}: {component}, {arguments.persona}, tp {n_ranks}, emulated"
    config_bytes = (folder / "config.json").read_bytes()
    try:
        ranks = [sglang.load(folder, rank, n_ranks, component) for rank in range(n_ranks)]
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"REFUSED ({where}): {type(error).__name__}: {error}")
        return 1
    report = compare(ranks, folder, read_tensors(arguments.bf16))
    if (folder / "config.json").read_bytes() != config_bytes:
        report.defects.append("config.json: SGLang rewrote it in place")
    for line in [] if arguments.quiet else [*report.lines, *report.notes]:
        print(line)
    for defect in report.defects:
        print(f"DEFECT {defect}")
    verdict = f"WRONG, {len(report.defects)} defects" if report.defects else "RIGHT"
    print(
        f"{verdict} ({where}): {len(report.lines)} linears, {report.n_plugin} by the plug-in,"
        f" worst error {report.worst:.4f}"
    )
    return 1 if report.defects else 0


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of a folder: those of the index where there is one, else of every shard."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


# Comparing


def compare(ranks: list[Loaded], folder: Path, source: Tensors) -> Report:
    """Compare every parameter that SGLang holds with the source, and quantized ones with the converted file too."""
    report = Report()
    converted = read_tensors(folder)
    loaded = ranks[0]
    held = loaded.to_runtime(converted)
    wanted = loaded.to_runtime(source)
    stored = loaded.to_runtime(decode_stored(folder, converted))
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    # SGLang then measures each input, and uses no input_scale.
    unused = INPUT_SCALE if declared.get("dynamic_input_scale") else None
    _compare_keys(report, loaded, held, wanted, unused)
    by_plugin = _compare_plugin(report, ranks, wanted, stored)
    if len(ranks) > 1:
        return report
    seen = {f"{name}.weight" for name in by_plugin}
    for module_name, module in loaded.model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if name.rpartition(".")[2] in OF_NVFP4 or name.endswith((".weight_scale", ".weight_scale_inv")):
                continue
            if module_name in by_plugin and not name.endswith(".bias"):
                continue
            if name.endswith(".input_scale"):
                _compare_input_scale(report, name, parameter, converted, loaded)
                continue
            seen.add(name)
            if name not in wanted:
                report.defects.append(f"{name}: the source has no such weight")
            elif parameter.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
                _compare_quantized(report, name, module, decode_fp8(module), wanted[name], stored[name])
            elif parameter.dtype == torch.uint8:
                _compare_quantized(report, name, module, decode_nvfp4(module), wanted[name], stored[name])
            else:
                is_linear = parameter.ndim == 2 and name.endswith(".weight")
                is_fp8_on_disk = held[name].dtype == torch.float8_e4m3fn
                _compare_plain(report, name, parameter, wanted[name], is_linear=is_linear, dequantized=is_fp8_on_disk)
    seen |= {name for name, _ in loaded.model.named_buffers()}
    report.defects += [f"{name}: no parameter of the model holds this tensor" for name in sorted(wanted.keys() - seen)]
    return report


def decode_stored(folder: Path, converted: Tensors) -> Tensors:
    """Return the converted file's tensors under the source's names, quantized weights as float32."""
    manifest = read_manifest(folder)
    decoded = {name: converted[name] for name in manifest.kept}
    for layer in manifest.layers.values():
        tensors = {role: converted[name] for role, name in layer.tensors.items()}
        decoded[layer.source_tensor] = decode_layer(layer, tensors)
    return decoded


def decode_layer(layer: Layer, tensors: Tensors) -> torch.Tensor:
    """Return the float32 [N, K] of a layer, given its tensors by role, by the contract alone."""
    weight, scale = tensors[WEIGHT], tensors[WEIGHT_SCALE]
    if layer.scheme == AITER_MXFP4:
        weight = AITER_WEIGHT.unshuffle(weight)
        scale = AITER_SCALE.unshuffle(scale)[: layer.N, : layer.K // MX_BLOCK_SIZE]
    return dequantize(weight, scale, layer.scheme, tensor_scale(tensors))


def _compare_plugin(report: Report, ranks: list[Loaded], wanted: Tensors, stored: Tensors) -> list[str]:
    """Compare the linears that the plug-in holds, joined over the ranks; return their names."""
    from run_ckpt.integrations.sglang.method import QuantizedLinearMethod

    modules = [dict(rank.model.named_modules()) for rank in ranks]
    names = [
        name
        for name, module in modules[0].items()
        if isinstance(getattr(module, "quant_method", None), QuantizedLinearMethod)
    ]
    for name in names:
        linears = [rank[name] for rank in modules]
        key = f"{name}.weight"
        value = join_ranks(linears, [_decode_part(linear) for linear in linears])
        error = relative_error(value, wanted[key])
        layer, backend = linears[0].quant_method.layer, linears[0].quant_method.choice.backend.name
        layouts = "+".join(sorted({linear.quant_method.layer.scheme.layout.name for linear in linears}))
        report.worst = max(report.worst, error)
        report.n_plugin += 1
        report.lines.append(
            f"{key}  {layer.format} {layouts} {[layer.N, layer.K]} a rank, {backend}  error {error:.4f}"
        )
        if not torch.equal(value, stored[key]):
            report.defects.append(f"{key}: is not what the converted file says")
        if error > (MAX_E2M1_ERROR if layer.format.element == E2M1 else MAX_QUANTIZATION_ERROR):
            report.defects.append(f"{key}: off by {error:.4g} from the source")
        if len(ranks) == 1:
            _compare_product(report, key, linears[0], value)
    return names


def _decode_part(linear: torch.nn.Module) -> torch.Tensor:
    """Return the float32 of what a rank holds, its operands put back into the order on disk first."""
    method = linear.quant_method
    return decode_layer(method.layer, method.choice.backend.restore(method.layer, method.operands(linear)))


def join_ranks(linears: list[torch.nn.Module], parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the whole weight of the ranks' parts, segment by segment, as SGLang shards this kind of linear."""
    if len(parts) == 1 or not hasattr(linears[0], "tp_size"):
        return parts[0]
    is_row_parallel = type(linears[0]).__name__ == "RowParallelLinear"
    axis = 1 if is_row_parallel else 0
    sizes = getattr(linears[0], "input_sizes" if is_row_parallel else "output_sizes", None)
    if sizes is None:
        return torch.cat(parts, axis)
    shares = [part.split([size // len(parts) for size in sizes], axis) for part in parts]
    # Where there are fewer heads of k and v than ranks, neighbours hold the same ones.
    steps = [1, *[getattr(linears[0], "num_kv_head_replicas", 1)] * (len(sizes) - 1)]
    return torch.cat([torch.cat([share[i] for share in shares[::step]], axis) for i, step in enumerate(steps)], axis)


def _compare_product(report: Report, key: str, linear: torch.nn.Module, weight: torch.Tensor) -> None:
    """SGLang's own forward of the linear against F.linear with the decoded weight, both in BF16."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1]).bfloat16()
    bias = None if linear.skip_bias_add else linear.bias
    with torch.no_grad():
        product = linear(x)
    product = product[0] if isinstance(product, tuple) else product
    if not torch.equal(product, F.linear(x, weight.bfloat16(), bias)):
        report.defects.append(f"{key}: multiplies to something else than its decoded weight does")


def decode(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 [N, K] that FP8 codes [N, K] stand for.

    scale: one value, one per row [N, 1], or one per block of 128 x 128.
    """
    N, K = weight.shape
    scale = scale.float()
    if scale.ndim == 2 and scale.shape != (N, 1):
        scale = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return weight.float() * scale


def decode_fp8(module: torch.nn.Module) -> torch.Tensor:
    """Return the float32 [N, K] of a linear that SGLang holds in FP8."""
    if hasattr(module, "weight_scale_inv"):
        return decode(module.weight, module.weight_scale_inv)
    return decode(module.weight.t(), module.weight_scale)  # SGLang transposes per-tensor weights


def decode_nvfp4(module: torch.nn.Module) -> torch.Tensor:
    """Return the float32 [N, K] of a linear that SGLang holds in NVFP4, its own padding and order of scales undone."""
    from sglang.multimodal_gen.runtime.layers.quantization.modelopt_quant import _swizzled_nvfp4_scales_to_linear

    N, K = module.output_size_per_partition, module.input_size_per_partition
    scales = _swizzled_nvfp4_scales_to_linear(module.weight_scale_interleaved)[:N, : K // 16]
    return dequantize(module.weight[:N, : K // 2], scales, PLAIN_NVFP4, module.weight_scale_2.max().reshape(1))


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.float()
    return float((value.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _compare_keys(report: Report, loaded: Loaded, held: Tensors, wanted: Tensors, unused: str | None) -> None:
    report.notes += [f"unexpected key, ignored by SGLang: {name}" for name in sorted(held.keys() - loaded.expected)]
    for name in sorted(loaded.expected - held.keys()):
        # A buffer that no checkpoint holds (rope tables) is no defect, a scale that SGLang makes up is.
        leaf = name.rpartition(".")[2]
        if "scale" in leaf and leaf != unused and name not in wanted:
            report.defects.append(f"{name}: missing, SGLang filled in 1.0")
        elif name in wanted:
            report.defects.append(f"{name}: missing in the converted folder")
        else:
            report.notes.append(f"missing key, also in the source: {name}")


def _compare_quantized(
    report: Report, name: str, module: torch.nn.Module, value: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor
) -> None:
    error, added = relative_error(value, wanted), relative_error(value, stored)
    report.worst = max(report.worst, error)
    report.lines.append(f"{name}  {module.weight.dtype}  error {error:.4f}  added by loading {added:.1e}")
    limit = MAX_E2M1_ERROR if module.weight.dtype == torch.uint8 else MAX_QUANTIZATION_ERROR
    if not (error <= limit and added <= MAX_LOADING_ERROR):
        report.defects.append(f"{name}: off by {error:.4g} from the source, {added:.4g} from the converted file")


def _compare_plain(
    report: Report, name: str, value: torch.Tensor, wanted: torch.Tensor, *, is_linear: bool, dequantized: bool
) -> None:
    same_shape = value.shape == wanted.shape
    exact = same_shape and torch.equal(value.float(), wanted.to(value.dtype).float())
    error = 0.0 if exact else relative_error(value, wanted) if same_shape else float("inf")
    report.worst = max(report.worst, error)
    if is_linear:
        report.lines.append(f"{name}  {value.dtype}  error {error:.4f}")
    if dequantized and error <= MAX_QUANTIZATION_ERROR:
        report.notes.append(f"{name}: FP8 on disk, but SGLang holds it in {value.dtype}: right, no saving")
    elif not exact:
        report.defects.append(f"{name}: {value.dtype}, off by {error:.4g} from the source and should be equal")


def _compare_input_scale(report: Report, name: str, value: torch.Tensor, converted: Tensors, loaded: Loaded) -> None:
    """The largest of the fused members' scales, or twice that where the codes are e4m3fnuz."""
    module = name.removesuffix(".input_scale")
    members = [
        tensor
        for key, tensor in converted.items()
        if key.endswith(".input_scale")
        and loaded.to_name(f"{key.removesuffix('.input_scale')}.weight") == f"{module}.weight"
    ]
    if not members:  # then it is reported as missing
        return
    is_fnuz = loaded.model.get_parameter(f"{module}.weight").dtype == torch.float8_e4m3fnuz
    wanted = max(float(tensor.max()) for tensor in members) * (2 if is_fnuz else 1)
    if float(value) != wanted:
        report.defects.append(f"{name}: {float(value):.6g}, should be {wanted:.6g}")


if __name__ == "__main__":
    sys.exit(main())
