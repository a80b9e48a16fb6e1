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

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from language_models import (
    HELD,
    LOADED,
    Report,
    Server,
    Tensors,
    fork_each,
    in_file,
    is_of_experts,
    relative_error,
    run,
    save,
)

# Of what experts put out: three weights and the activations before each are quantized.
MAX_EXPERTS_ERROR = 0.1
# Of the folders that it is for; the plug-in's entry point.
BY_PLUGIN, ENTRY_POINT = "-plugin", "convert-ckpt"
# Emulated ones, of which each holds its share of the plug-in's linears.
RANKS = (2, 4)
PROMPT = list(range(1, 13))
N_TOKENS = 10

MIXED = Path(__file__).with_name("mixed_language_model.toml")
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
    "mxfp8-plugin": {"format": "mxfp8", "target": "vllm+plugin"},
    "fp8-tensor-plugin": {"format": "fp8", "target": "vllm+plugin"},
    "mixed-plugin": {"format": "mxfp4", "target": "vllm+plugin", "recipe": MIXED},
    "fp8": {"format": "fp8", "target": "vllm"},
    "fp8-channel": {"format": "fp8", "granularity": "channel", "target": "vllm"},
    "fp8-block": {"format": "fp8", "granularity": "block", "target": "vllm"},
    "fp8-tensor-fp8": {"format": "fp8", "granularity": "tensor", "dialect": "fp8"},
    "fp8-tensor-quark": {"format": "fp8", "granularity": "tensor", "dialect": "quark"},
    "fp8-tensor-compressed-tensors": {"format": "fp8", "granularity": "tensor", "dialect": "compressed-tensors"},
}
VARIANTS |= {f"{name}-first-kept": {**VARIANTS[name], "keep_first": 1} for name in ("mxfp4-quark", "fp8", "fp8-block")}


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def compare_outputs(report: Report, held: Tensors) -> None:
    """Compare what Qwen3's mixtures of experts made of a prompt with what the source's weights make of it in torch."""
    for name in held:
        if name.endswith(".experts_in"):
            module = name.removesuffix(".experts_in")
            # A source with experts in 3-D tensors has none by themselves.
            weights = report.wanted if f"{module}.experts.0.up_proj" in report.wanted else report.stored
            wanted = run_experts(weights, in_file(weights, module), held[name].float())
            error = relative_error(held[f"{module}.experts_out"], wanted)
            report.note(module, error, None if error <= MAX_EXPERTS_ERROR else "as experts")


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


def load_here(folder: Path) -> None:
    """In vLLM's Python: load, generate, and save the weight [N, K] of each linear, and what experts got and gave."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ranks import read, read_joined

    has_plugin = folder.name.endswith(BY_PLUGIN)
    os.environ["VLLM_PLUGINS"] = ENTRY_POINT if has_plugin else "none of them"
    keep_experts(folder)
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    # A processor of pictures wants a tokenizer.
    llm = LLM(str(folder), skip_tokenizer_init=True, limit_mm_per_prompt={"image": 0, "video": 0}, **options)

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
    for n_ranks in RANKS if has_plugin else ():
        joined = read_joined(llm.llm_engine.vllm_config, n_ranks)
        changed = [name for name, weight in joined.items() if not torch.equal(weight, weights[name])]
        assert joined, "no linear is the plug-in's"
        assert not changed, f"{n_ranks} ranks hold something else of {changed}"
    save({**weights, **seen}, folder, HELD)


def keep_experts(folder: Path) -> None:
    """In vLLM's Python: save the parameters of experts as its loader filled them."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def keep_then_process(model: torch.nn.Module, *arguments: object) -> None:
        found = {name: parameter.data for name, parameter in model.named_parameters() if is_of_experts(name)}
        if found:
            save(found, folder, LOADED)
        process(model, *arguments)

    base_loader.process_weights_after_loading = keep_then_process


def load_all_here(folders: list[str]) -> None:
    """In vLLM's Python: import once what loading imports, then load each folder in a process of its own."""
    import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors
    import vllm.v1.worker.cpu_worker  # noqa: F401
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
    fork_each(folders, load_here)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_all_here(sys.argv[2:])
    else:
        sys.exit(run(Server("vllm", __file__, ENVIRONMENT, VARIANTS, compare_outputs)))
