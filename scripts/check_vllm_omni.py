"""Load a converted transformer in unmodified vLLM-Omni 0.30.0 on a CPU and compare every weight with its BF16 source.

vLLM-Omni reports little that is wrong with a checkpoint: FP8 codes without its flag are taken for weights, a missing
scale is -3.4e38, codes of a linear that it builds plain lose their scales. So this runs its own reading of config.json,
the pipeline's own construction, its loader, adapters and process_weights_after_loading, and compares what the model
holds with the source and with the converted file, each loaded by the same code. Prints one line per linear and a
verdict; exit 1 on a defect.

    scripts/setup_vllm_omni.sh DIR
    DIR/bin/python scripts/check_vllm_omni.py CONVERTED... BF16 [--tp 1 2 4]

MXFP4 comes in by the plug-in, which vLLM-Omni finds by its entry point. GPU and ranks are EMULATIONS, see
vllm_omni_on_cpu.py: this says nothing about speed, GPU kernels or activations.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from check_sglang import MAX_E2M1_ERROR, MAX_QUANTIZATION_ERROR, decode_layer, join_ranks, relative_error
from torch import nn
from vllm_omni_on_cpu import Loaded, VllmOmni

from run_ckpt.contract.formats import E2M1, FP8_BLOCK_SIZE, MXFP4
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize

# Half of BF16's last step: the converted file's numbers, as BF16 weights hold them.
MAX_BF16_ROUNDING = 2**-8


@dataclass
class Report:
    """Lines for each linear, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    worst: float = 0.0
    n_by_plugin: int = 0
    n_weights: int = 0


def main() -> int:
    """Print the reports; return 1 where vLLM-Omni holds something else than the source says."""
    parser = argparse.ArgumentParser(description="Compare what vLLM-Omni loads from CONVERTED with BF16.")
    parser.add_argument("converted", type=Path, nargs="+", help="outputs of the converter for one model")
    parser.add_argument("bf16", type=Path, help="the folder they were made from")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="numbers of ranks to emulate (default: 1)")
    parser.add_argument("--without-plugins", action="store_true", help="leave out the plug-ins that are installed")
    parser.add_argument("--quiet", action="store_true", help="print defects and the verdicts alone")
    arguments = parser.parse_args()
    omni = VllmOmni(plugins=not arguments.without_plugins)
    source = dict(omni.load(arguments.bf16).model.named_parameters())
    return max(
        [check(omni, folder, source, n_ranks, arguments) for folder in arguments.converted for n_ranks in arguments.tp]
    )


def check(
    omni: VllmOmni, folder: Path, source: dict[str, nn.Parameter], n_ranks: int, arguments: argparse.Namespace
) -> int:
    """Print the report for one folder and number of ranks; return 1 where anything is wrong."""
    where = f"{folder.name}: tp {n_ranks}, emulated"
    try:
        ranks = [omni.load(folder, rank, n_ranks) for rank in range(n_ranks)]
        with tempfile.TemporaryDirectory() as plain:
            dequantize(folder, Path(plain) / "plain", dtype="bfloat16", progress=Silent())
            stored = dict(omni.load(Path(plain) / "plain").model.named_parameters())
    except Exception as error:
        if not arguments.quiet:
            import traceback

            traceback.print_exc()
        print(f"REFUSED ({where}): {type(error).__name__}: {error}")
        return 1
    report = compare(ranks, source, stored)
    wanted = sum(layer.N * layer.K for layer in read_manifest(folder).layers.values())
    if report.n_weights != wanted:
        report.defects.append(f"{report.n_weights:,} weights are held quantized, the manifest says {wanted:,}")
    for line in [] if arguments.quiet else report.lines:
        print(line)
    for defect in report.defects:
        print(f"DEFECT {defect}")
    verdict = f"WRONG, {len(report.defects)} defects" if report.defects else "RIGHT"
    print(
        f"{verdict} ({where}): {len(report.lines)} quantized linears, {report.n_by_plugin} by the plug-in,"
        f" worst error {report.worst:.4f}"
    )
    return 1 if report.defects else 0


def compare(ranks: list[Loaded], source: dict[str, nn.Parameter], stored: dict[str, nn.Parameter]) -> Report:
    """Compare every weight that the ranks hold, joined, with the source and with the converted file's."""
    report = Report()
    linears = [dict(rank.linears()) for rank in ranks]
    if len(ranks) == 1:
        for name, parameter in ranks[0].model.named_parameters():
            if name.rpartition(".")[0] not in linears[0] and not torch.equal(parameter, source[name]):
                report.defects.append(f"{name}: is not what the source says")
    before = {name: [decode(rank[name]) for rank in linears] for name in linears[0] if not is_ours(linears[0][name])}
    for rank in ranks:
        rank.process()
    for name in linears[0]:
        parts = [rank[name] for rank in linears]
        values = before.get(name) or [decode_ours(part) for part in parts]
        value, key = join(parts, values), f"{name}.weight"
        _compare_linear(report, key, parts[0], value, source[key], stored[key])
        if name in before and not torch.equal(decode(parts[0]), values[0]):
            report.defects.append(f"{key}: process_weights_after_loading changes it")
    return report


def is_ours(linear: nn.Module) -> bool:
    return type(linear.quant_method).__module__.startswith("run_ckpt.")


def decode(linear: nn.Module) -> torch.Tensor:
    """Return the float32 [N, K] of FP8 codes and their scales: by tensor, a part each, by row or by block.

    vLLM keeps a view [K, N] for the product.
    """
    weight = (linear.weight if linear.weight.is_contiguous() else linear.weight.t()).float()
    N, K = weight.shape
    if hasattr(linear, "weight_scale_inv"):
        scale = linear.weight_scale_inv.repeat_interleave(FP8_BLOCK_SIZE, 0)[:N]
        return weight * scale.repeat_interleave(FP8_BLOCK_SIZE, 1)[:, :K]
    scale = linear.weight_scale.float().flatten()
    if scale.numel() not in (1, N):
        scale = scale.repeat_interleave(torch.tensor(linear.logical_widths))
    return weight * scale[:, None] if scale.numel() > 1 else weight * scale


def decode_ours(linear: nn.Module) -> torch.Tensor:
    """Return the float32 of what our plug-in holds, its operands put back into the order on disk first."""
    method = linear.quant_method
    tensors = method.choice.backend.restore(method.layer, method.operands(linear))
    return decode_layer(method.layer, tensors)


def join(linears: list[nn.Module], values: list[torch.Tensor]) -> torch.Tensor:
    """Return the whole weight of the ranks' parts; where each holds all of it, one of them."""
    if values[0].shape == (linears[0].output_size, linears[0].input_size):
        return values[0]
    if len(linears) > 1 and not hasattr(linears[0], "output_sizes"):
        linears[0].output_sizes = [linears[0].output_size]
    return join_ranks(linears, values)


def _compare_linear(
    report: Report, key: str, linear: nn.Module, value: torch.Tensor, source: torch.Tensor, stored: torch.Tensor
) -> None:
    error, added = relative_error(value, source), relative_error(value, stored)
    report.worst = max(report.worst, error)
    report.n_weights += value.numel()
    kind = type(linear.quant_method).__name__
    report.lines.append(f"{key}  {kind} {list(value.shape)}  error {error:.4f}  added by loading {added:.1e}")
    ours = is_ours(linear)
    report.n_by_plugin += ours
    is_e2m1 = ours and linear.quant_method.layer.format.element == E2M1
    if not error <= (MAX_E2M1_ERROR if is_e2m1 else MAX_QUANTIZATION_ERROR):
        report.defects.append(f"{key}: off by {error:.4g} from the source")
    # E2M1 times a power of two is exact in BF16, a code times a float is not.
    is_exact = ours and linear.quant_method.layer.format == MXFP4
    if not added <= (0 if is_exact else MAX_BF16_ROUNDING):
        report.defects.append(f"{key}: off by {added:.4g} from the converted file")
    if ours and value.shape == (linear.quant_method.layer.N, linear.quant_method.layer.K):
        _compare_product(report, key, linear, value)


def _compare_product(report: Report, key: str, linear: nn.Module, weight: torch.Tensor) -> None:
    """vLLM's own forward of the linear against F.linear with the decoded weight, both in BF16."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1]).bfloat16()
    with torch.no_grad():
        product = linear(x)
    product = product[0] if isinstance(product, tuple) else product
    bias = None if linear.skip_bias_add else linear.bias
    if not torch.equal(product, F.linear(x, weight.bfloat16(), bias)):
        report.defects.append(f"{key}: multiplies to something else than its decoded weight does")


if __name__ == "__main__":
    sys.exit(main())
