"""Stand-ins for calls of vLLM 0.30.0 that exist for GPUs alone, so that its loading can be run on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# OCP MX v1.0, FP4 E2M1: the code's lowest three bits, the fourth is the sign.
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def stand_in_for_fp8_rounding() -> None:
    """Round to the nearest code in torch, where fused linears are requantized to one scale."""
    from vllm import _custom_ops

    def scaled_fp8_quant(tensor: torch.Tensor, scale: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        return torch.clamp(tensor.float() / scale, -largest, largest).to(torch.float8_e4m3fn), scale

    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


def stand_in_for_block_kernel() -> None:
    """Let the only kernel that takes block scales on a CPU take them without AMX; its product is torch's here."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    def multiply(self: Any, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> Any:
        N, K = layer.weight.shape
        scale = layer.weight_scale_inv.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
        return F.linear(x, (layer.weight.float() * scale).to(x.dtype), bias)

    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, capability=None: (True, None))
    CPUFp8BlockScaledMMKernel.process_weights_after_loading = lambda self, layer: None
    CPUFp8BlockScaledMMKernel.apply_weights = multiply


def stand_in_for_mxfp4() -> None:
    """Register vLLM's emulation for GPUs; its decoder is torch here, and activations stay as they are."""
    from quark.torch.kernel import mx
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    def decode(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """codes: uint8 [N, K / 2], low nibble first; scale: uint8 [N, K / 32], E8M0."""
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
        return (values[pairs].unflatten(-1, (-1, 32)) * 2.0 ** (scale.float() - 127)[..., None]).flatten(-2).to(dtype)

    mx.dq_mxfp4, mx.qdq_mxfp4 = decode, lambda x, mode="even": x.clone()
    linear.register_linear_kernel(linear.EmulationMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")


def stand_in_for_mxfp4_experts() -> None:
    """Let vLLM choose its emulation of MXFP4 experts on a CPU: they are loaded, and its kernel for GPUs is not run."""
    from vllm.model_executor.layers.fused_moe.experts.ocp_mx_emulation_moe import (
        OCP_MXQuantizationEmulationTritonExperts,
    )

    OCP_MXQuantizationEmulationTritonExperts._supports_current_device = staticmethod(lambda: True)
