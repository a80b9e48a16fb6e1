"""Values <-> codes <-> bytes of E2M1 and E8M0, in plain torch."""

import torch
from torch import Tensor

from run_ckpt.contract.formats import E2M1_MIDPOINTS, E2M1_TIE_ROUNDS_UP, E2M1_VALUES, E8M0_BIAS

E8M0_VALUES = [2.0 ** (code - E8M0_BIAS) for code in range(255)] + [float("nan")]


def encode_e2m1(x: Tensor) -> Tensor:
    """Round each element to the nearest E2M1 value and return its code.

    x: finite float64 [...], already divided by the block scale.
    Returns uint8 [...], code in bits 0-2, sign in bit 3 (kept for zero). Ties go to the even
    code, |x| > 6 saturates. NaN, which has no code, would give a zero: no caller passes one.
    Source: OCP MX v1.0, 5.3.3.
    """
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint, tie_rounds_up in zip(E2M1_MIDPOINTS, E2M1_TIE_ROUNDS_UP, strict=True):
        code += (magnitude >= midpoint) if tie_rounds_up else (magnitude > midpoint)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return float32 values of E2M1 codes uint8 [...] (bits 0-3)."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def decode_e8m0(codes: Tensor) -> Tensor:
    """Return float32 2^(code - 127) of E8M0 codes uint8 [...]; 255 gives NaN."""
    return torch.tensor(E8M0_VALUES, dtype=torch.float32, device=codes.device)[codes.long()]


def scale_to_units(blocks: Tensor, scale_codes: Tensor) -> Tensor:
    """Return float64 blocks / 2^(code - 127), exact. blocks [..., 32], scale_codes uint8 [...]."""
    exponents = E8M0_BIAS - scale_codes.to(torch.int32)
    return torch.ldexp(blocks.double(), exponents.unsqueeze(-1))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return uint8 [..., K/2] from codes uint8 [..., K]; the low nibble is the even k."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return codes uint8 [..., K] from bytes uint8 [..., K/2]; the inverse of pack_nibbles."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
