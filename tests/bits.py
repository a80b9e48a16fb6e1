"""Exact comparison of tensors, with a message that says where they part."""

from typing import Any

import torch
from torch import Tensor


def assert_bits_equal(actual: Tensor, expected: Tensor) -> None:
    """Fail unless dtype, shape and every byte agree; the message names the first element that differs."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    differs = (_element_bytes(actual) != _element_bytes(expected)).any(-1)
    n_different = int(differs.sum())
    if n_different:
        flat_index = int(differs.nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), actual.shape)]
        raise AssertionError(
            f"{n_different} of {actual.numel()} elements differ, the first at {index}:"
            f" {_show(actual, flat_index)}, expected {_show(expected, flat_index)}"
        )


def _element_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _show(tensor: Tensor, flat_index: int) -> str:
    value: Any = tensor.reshape(-1)[flat_index]
    raw = bytes(value.reshape(1).view(torch.uint8).tolist())[::-1].hex()
    return f"{value.item()} (0x{raw})"
