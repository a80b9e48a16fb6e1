"""What a dialect is: one consumer's names, scale shapes and quantization_config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Manifest
from run_ckpt.contract.tensors import PT_METADATA

# Whose names the tensors and config.json of a checkpoint have.
NAMINGS = ("diffusers", "transformers")


def usual_suffixes(scheme: Scheme, naming: str) -> dict[str, str]:
    """Return role -> what follows the module in a tensor's name, as most consumers have it."""
    scale = "weight_scale_inv" if scheme.granularity == "block" else "weight_scale"
    second = {TENSOR_SCALE: "weight_scale_2"} if scheme.format.is_two_level else {}
    return {WEIGHT: "weight", WEIGHT_SCALE: scale, **second}


def usual_scale_shape(N: int, K: int, scheme: Scheme) -> tuple[int, ...]:
    """Return the scale's shape on disk as most consumers have it: [1], [N], or the padded grid."""
    grid = scheme.scale_grid(N, K)
    return grid[:1] if scheme.block[1] is None else scheme.layout.scale.padded_shape(*grid)


@dataclass(frozen=True)
class Dialect:
    """One consumer's vocabulary. ``naming`` is one of NAMINGS, that of the checkpoint.

    ``schemes`` are those it can say, each with the namings for which this is the usual dialect.
    ``config`` returns config.json's quantization_config, without our private key; None where there is none.
    ``suffixes`` returns role -> tensor name after the module's and a ``joint``, ``scale_shape`` the scale's shape on
    disk for (N, K, scheme), ``granularity`` what a quantization_config says of the formats that leave a choice.
    ``metadata`` returns the ``__metadata__`` of every shard.
    ``static``: the schemes whose activations are quantized by an input_scale.
    ``is_mixed``: layers may differ in format.
    ``file_name``: all tensors go into one file of this name; None where the shards stay those of the source.
    ``experts_only``: of experts that are stored all in one tensor; its consumers read nothing else quantized.
    ``is_open``: config may hold keys of others too; ours lie there, and ``name`` is its quant_method.
    """

    name: str
    schemes: Mapping[Scheme, tuple[str, ...]]
    config: Callable[[Manifest], dict[str, Any]] | None
    suffixes: Callable[[Scheme, str], dict[str, str]] = usual_suffixes
    scale_shape: Callable[[int, int, Scheme], tuple[int, ...]] = usual_scale_shape
    granularity: Callable[[Mapping[str, Any]], str] = lambda config: "tensor"
    metadata: Callable[[Manifest], dict[str, str]] = lambda manifest: PT_METADATA
    static: tuple[Scheme, ...] = ()
    is_mixed: bool = False
    file_name: str | None = None
    experts_only: bool = False
    is_open: bool = True
    joint: str = "."

    def tensor_names(self, module: str, scheme: Scheme, naming: str) -> dict[str, str]:
        """Return role -> tensor name of one layer (weight and weight scales)."""
        return {role: f"{module}{self.joint}{suffix}" for role, suffix in self.suffixes(scheme, naming).items()}


def common_scheme(manifest: Manifest) -> Scheme:
    """Return the scheme of every layer, in a dialect that is not mixed."""
    return next(iter(manifest.layers.values())).scheme


def ignore_list(manifest: Manifest) -> list[str]:
    """Return both spellings of the linears that the target's runtime would quantize but that were left alone.

    A linear without a name there (prefix "") is listed only by its own: "" would match everything.
    """
    named = {module: prefix for module, prefix in manifest.unquantized_linears.items() if prefix is not None}
    return sorted({*named, *filter(None, named.values())})


# Linear of a language model in a server -> its parts in a checkpoint. SGLang 0.5.23 takes few of these names apart: the
# others it builds quantized where all their parts are ignored, and loads their BF16 weights as FP8 without a scale.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def ignore_list_with_fused(manifest: Manifest) -> list[str]:
    """Return the linears that were left alone, and the names of what servers fuse of them."""
    ignored = set(manifest.unquantized_linears)
    for fused, (first, *others) in _FUSED.items():
        parents = {module.removesuffix(first) for module in ignored if module.endswith(f".{first}")}
        ignored |= {parent + fused for parent in parents if all(parent + other in ignored for other in others)}
    return sorted(ignored)
