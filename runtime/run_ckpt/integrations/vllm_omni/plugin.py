"""The entry point: our builder for the methods that our checkpoints declare. What is not ours is built as before."""

from collections.abc import Callable
from functools import partial
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY


def register() -> None:
    """Register the builders; vLLM-Omni calls this in every process (group ``vllm_omni.general_plugins``)."""
    from vllm_omni.quantization import register_quantization_override

    for method, stock in {"mxfp4": _mxfp4, "fp8": _fp8}.items():
        register_quantization_override(method, partial(_build, method, stock))


def _build(method: str, stock: Callable[..., Any], **declared: Any) -> Any:
    """Return the config for a checkpoint. declared: its quantization_config, without the method."""
    if PRIVATE_KEY not in declared:
        return stock(**declared)
    from run_ckpt.integrations.vllm.config import CheckpointConfig

    return CheckpointConfig({"quant_method": method, **declared})


def _mxfp4(**declared: Any) -> Any:
    from vllm_omni.quantization.mxfp4_config import DiffusionMXFP4Config

    return DiffusionMXFP4Config(**declared)


def _fp8(**declared: Any) -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config(**declared)
