"""Load converted language models in vLLM 0.30.0 on a CPU, compare every linear with its source, and generate.

    scripts/setup_vllm_omni.sh DIR
    .venv/bin/python scripts/check_vllm.py DIR/bin/python [--models llama qwen3 qwen3-moe] [--variants fp8-block]

Converts the small Llama and Qwen3 of tests/models.py, and the small mixtures of experts of tests/experts.py, in every
way that is meant for vLLM, and loads each by the LLM class of its build for CPUs. A linear is read by multiplying the
identity with it, by vLLM's own kernel, whatever that made of the weight, and is compared with the source's and with the
converted file's weights (run-ckpt dequantize). What it has for GPUs alone, MXFP4 and the requantizing of FP8, is
replaced as said in vllm_stand_ins.py. Experts are compared byte for byte: codes and scales as vLLM's loader put them,
with the file's, before its kernels change their order; and Qwen3's by what they make of a prompt too, with torch and
the source's weights. Ten tokens are generated. What our plug-in holds is also loaded by 2 and 4 emulated
ranks, whose parts must be the same weights. Prints a line for each; exit 1 on a defect, or where the manifest says
otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Tensors = dict[str, torch.Tensor]

# As in check_sglang.py; products are BF16, so that their weights have eight bits.
MAX_ERRORS = {"mxfp4": 0.13, "nvfp4": 0.13, "mxfp8": 0.032, "fp8": 0.032}
MAX_BF16_ROUNDING = 2**-8
# Of what experts put out: three weights and the activations before each are quantized.
MAX_EXPERTS_ERROR = 0.1
# What its loader put into the parameters of experts, before anything was made of that.
EXPERTS_NAME = "experts.safetensors"
# The target that our plug-in serves, and the plug-in's entry point.
PLUGIN, ENTRY_POINT = "vllm+plugin", "convert-ckpt"
# Emulated ones, of which each holds its share of the plug-in's linears.
RANKS = (2, 4)
PROMPT = list(range(1, 13))
N_TOKENS = 10

VARIANTS = {
    "mxfp4-quark": {"format": "mxfp4", "target": "vllm"},
    "mxfp4-compressed-tensors": {
        "format": "mxfp4",
        "layout": "plain",
        "dialect": "compressed-tensors",
        "target": "vllm",
    },
    "nvfp4-compressed-tensors": {"format": "nvfp4"},
    "mxfp8-compressed-tensors": {"format": "mxfp8"},
    "mxfp4-plugin": {"format": "mxfp4", "target": "vllm+plugin"},
    "mxfp4-row-major-plugin": {"format": "mxfp4", "layout": "plain", "target": "vllm+plugin"},
    "fp8": {"format": "fp8", "target": "vllm"},
    "fp8-channel": {"format": "fp8", "granularity": "channel", "target": "vllm"},
    "fp8-block": {"format": "fp8", "granularity": "block", "target": "vllm"},
    "fp8-tensor-fp8": {"format": "fp8", "granularity": "tensor", "dialect": "fp8"},
    "fp8-tensor-quark": {"format": "fp8", "granularity": "tensor", "dialect": "quark"},
    "fp8-tensor-compressed-tensors": {"format": "fp8", "granularity": "tensor", "dialect": "compressed-tensors"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what vLLM loads, for small language models.")
    parser.add_argument("python", type=Path, help="the Python made by setup_vllm_omni.sh")
    parser.add_argument("--models", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    n_wrong = 0
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "bf16"
            BUILDERS[name](source)
            for variant in arguments.variants:
                n_wrong += check(arguments.python, name, source, variant)
    print(f"{n_wrong} wrong" if n_wrong else "all right")
    return 1 if n_wrong else 0


def save_llama(folder: Path) -> None:
    _save("llama", folder)


def save_qwen3(folder: Path) -> None:
    _save("qwen3", folder)


def _save(name: str, folder: Path) -> None:
    from tests.models import MODELS, save

    save(MODELS[name], MODELS[name].build(), str(folder))


def _builders() -> dict[str, Callable[[Path], object]]:
    from tests.experts import BUILDERS as EXPERTS
    from tests.experts import save_experts

    return {"llama": save_llama, "qwen3": save_qwen3, **{name: partial(save_experts, name) for name in EXPERTS}}


# vLLM's Python, which runs --load, has no tests.
BUILDERS = {} if sys.argv[1:2] == ["--load"] else _builders()


def check(python: Path, name: str, source: Path, variant: str) -> int:
    """Convert, load, compare; print a line and return 1 where anything is wrong."""
    from convert_ckpt.options import Options
    from convert_ckpt.pipeline import convert_checkpoint
    from run_ckpt.contract.errors import CheckpointError
    from run_ckpt.progress import Silent
    from run_ckpt.storage.manifest_file import read_manifest
    from run_ckpt.tools.rewrite.dequantize import dequantize

    output, plain = source.parent / variant, source.parent / f"{variant}-plain"
    options = Options(**VARIANTS[variant])
    try:
        convert_checkpoint(source, output, options, n_workers=2, restart=True, progress=Silent())
    except CheckpointError as error:
        print(f"{name:12} {variant}: not written: {error}", flush=True)
        return 0
    manifest = read_manifest(output)
    dequantize(output, plain, dtype="bfloat16", progress=Silent())
    said = manifest.targets[options.target or "vllm"]
    try:
        held = load(python, output, with_plugin=options.target == PLUGIN)
    except RuntimeError as error:
        experts = output.parent / EXPERTS_NAME
        if not said and experts.exists():  # this build lacks what comes after loading: kernels for GPUs
            defects = compare_experts(load_file(experts), read_tensors(output))
            for defect in defects:
                print(f"DEFECT {defect}")
            print(f"{name:12} {variant}: {'WRONG' if defects else 'LOADED right'}, not run: {error}", flush=True)
            return 1 if defects else 0
        known = "as the manifest says" if said else "which is new"
        print(f"{name:12} {variant}: REFUSED, {known}: {error}", flush=True)
        return 0 if said else 1
    defects, worst = compare(held, fuse(read_tensors(source)), fuse(read_tensors(plain)), MAX_ERRORS[options.format])
    experts = output.parent / EXPERTS_NAME
    defects += compare_experts(load_file(experts), read_tensors(output)) if experts.exists() else []
    if said and not defects:
        defects.append(f"it is right, but the manifest says: {said}")
    kind = f"{manifest.dialect}, {next(iter(manifest.layers.values())).scheme}"
    for defect in defects:
        print(f"DEFECT {defect}")
    print(f"{name:12} {variant}: {'WRONG' if defects else 'RIGHT'} ({kind}), worst error {worst:.4f}", flush=True)
    return 1 if defects else 0


def compare(held: Tensors, wanted: Tensors, stored: Tensors, limit: float) -> tuple[list[str], float]:
    """Return what is wrong, and the largest relative error of a linear against the source.

    held: what load_here() wrote; wanted, stored: the source's and the converted file's weights, fused as vLLM fuses.
    """
    defects, worst = [], 0.0
    for name in sorted(held):
        if name.endswith(".experts_in"):
            module = name.removesuffix(".experts_in")
            output = run_experts(wanted, module, held[name].float())
            error, added = relative_error(held[f"{module}.experts_out"], output), 0.0
            limit_here = MAX_EXPERTS_ERROR
        elif name.endswith(".experts_out"):
            continue
        else:
            error, added = relative_error(held[name], wanted[name]), relative_error(held[name], stored[name])
            limit_here = limit
        worst = max(worst, error)
        if not error <= limit_here or not added <= MAX_BF16_ROUNDING:
            defects.append(f"{name}: off by {error:.4g} from the source, {added:.4g} from the converted file")
    return defects, worst


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_AT_START = """
from missing_libraries import fill_in_torchaudio, fill_in_torchvision

fill_in_torchvision()
fill_in_torchaudio()
"""


def fuse(tensors: Tensors) -> Tensors:
    """Return module -> weight of each linear, those that vLLM fuses as one."""
    weights = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    for fused, members in {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }.items():
        for name in [name for name in weights if name.endswith(members[0])]:
            before = name.removesuffix(members[0])
            weights[before + fused] = torch.cat([weights[before + member] for member in members])
    return weights


def compare_experts(held: Tensors, stored: Tensors) -> list[str]:
    """Return what of experts is not, byte for byte, what the file holds. held: [experts, ...] as vLLM names them."""
    defects, n_compared = [], 0
    for name, tensor in held.items():
        prefix, _, leaf = name.rpartition(".")
        prefix = prefix.removesuffix(".routed_experts")
        which, _, role = leaf.partition("_")
        ends = _ROLES.get(role)
        if ends is None:
            continue
        for number, found in enumerate(tensor):
            stacked = stored.get(f"{prefix}.{_STACKED[which]}_{'scales' if 'scale' in role else 'blocks'}")
            wanted = _expert(stored, f"{prefix}.{number}", which, ends) if stacked is None else stacked[number]
            n_compared += 1
            if wanted is None or wanted.numel() != found.numel() or not torch.equal(_bytes(found), _bytes(wanted)):
                defects.append(f"{prefix}.{number}: {leaf} is not what the file holds")
    return defects if n_compared else ["no experts to compare"]


# gpt-oss's, all experts in one tensor.
_STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}
# What a parameter of experts ends in -> what its parts may end in, in a file.
_ROLES = {
    "weight": ("weight", "weight_packed"),
    "weight_packed": ("weight_packed",),
    "weight_scale": ("weight_scale", "weight_scale_inv"),
    "weight_scale_inv": ("weight_scale_inv",),
    "weight_global_scale": ("weight_global_scale",),
}


def _expert(stored: Tensors, expert: str, which: str, ends: tuple[str, ...]) -> torch.Tensor | None:
    for names in (("gate_proj", "up_proj"), ("w1", "w3")) if which == "w13" else (("down_proj",), ("w2",)):
        for end in ends:
            parts = [f"{expert}.{name}.{end}" for name in names]
            parts = [_as_in_vllm(stored, part) for part in parts]
            if all(part in stored for part in parts):
                return torch.cat([stored[part].reshape(-1) for part in parts])
    return None


def _as_in_vllm(stored: Tensors, name: str) -> str:
    """Return the name in the file of what vLLM's model calls ``name``."""
    for theirs, ours in (("language_model.model.", "model.language_model."), (".mlp.", ".block_sparse_moe.")):
        if name not in stored and name.replace(theirs, ours) in stored:
            return name.replace(theirs, ours)
    return name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def run_experts(weights: Tensors, module: str, x: torch.Tensor) -> torch.Tensor:
    """Return the output [tokens, K] of Qwen3's mixture of experts, in float32: the two best, weights not normalized."""
    shares = (x @ weights[f"{module}.gate"].float().t()).softmax(-1)
    best = shares.topk(2)
    output = torch.zeros_like(x)
    for expert in range(shares.shape[1]):
        gate, up, down = (weights[f"{module}.experts.{expert}.{name}_proj"].float() for name in ("gate", "up", "down"))
        share = torch.where(best.indices == expert, best.values, 0.0).sum(-1, keepdim=True)
        output += share * ((F.silu(x @ gate.t()) * (x @ up.t())) @ down.t())
    return output


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.float()
    return float((value.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def read_tensors(folder: Path) -> Tensors:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def load(python: Path, folder: Path, *, with_plugin: bool) -> Tensors:
    """Return what vLLM holds of a folder, as load_here() writes it.

    Raises RuntimeError with vLLM's last words where it does not load.
    """
    result, start = folder.parent / "held.safetensors", folder.parent / "start"
    result.unlink(missing_ok=True)
    (folder.parent / EXPERTS_NAME).unlink(missing_ok=True)
    # Python runs this in each of vLLM's processes, before anything is imported.
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(_AT_START)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": ENTRY_POINT if with_plugin else "none of them",
        "PYTHONPATH": f"{start}:{ROOT / 'scripts'}:{ROOT / 'runtime'}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [str(python), str(Path(__file__).resolve()), "--load", str(folder), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if not result.exists():
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError((lines or done.stderr.splitlines() or ["no word"])[-1])
    return load_file(result)


def load_here(folder: str, result: str) -> None:
    """In vLLM's Python: load, generate, and write the weight [N, K] of each linear, and what experts got and gave."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ranks import read, read_joined
    from vllm_stand_ins import (
        stand_in_for_block_kernel,
        stand_in_for_fp8_rounding,
        stand_in_for_mxfp4,
        stand_in_for_mxfp4_experts,
    )

    stand_in_for_fp8_rounding()
    stand_in_for_block_kernel()
    stand_in_for_mxfp4()
    stand_in_for_mxfp4_experts()
    keep_experts(Path(result).with_name(EXPERTS_NAME))
    llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=2)

    seen: Tensors = {}

    def watch(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if type(module).__name__.endswith("SparseMoeBlock"):
                module.register_forward_hook(partial(keep, name))

    def keep(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if f"{name}.experts_in" not in seen and inputs[0].shape[0] == len(PROMPT):
            seen.update({f"{name}.experts_in": inputs[0].clone(), f"{name}.experts_out": output.clone()})

    def read_all(model: torch.nn.Module) -> Tensors:
        return {name: read(module) for name, module in model.named_modules() if isinstance(module, LinearBase)}

    llm.apply_model(watch)
    (weights,) = llm.apply_model(read_all)
    sampling = SamplingParams(temperature=0.0, max_tokens=N_TOKENS, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling)
    assert len(answer.outputs[0].token_ids) == N_TOKENS, answer
    for n_ranks in RANKS if os.environ["VLLM_PLUGINS"] == ENTRY_POINT else ():
        joined = read_joined(llm.llm_engine.vllm_config, n_ranks)
        changed = [name for name, weight in joined.items() if not torch.equal(weight, weights[name])]
        assert joined, "no linear is the plug-in's"
        assert not changed, f"{n_ranks} ranks hold something else of {changed}"
    save_file({**weights, **seen}, result)


def keep_experts(path: Path) -> None:
    """In vLLM's Python: write the parameters of experts as its loader filled them."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def keep_then_process(model: torch.nn.Module, *arguments: object) -> None:
        found = {
            name: parameter.data.contiguous()
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2].startswith(("w13_", "w2_"))
        }
        if found:
            save_file(found, path)
        process(model, *arguments)

    base_loader.process_weights_after_loading = keep_then_process


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_here(*sys.argv[2:])
    else:
        sys.exit(main())
