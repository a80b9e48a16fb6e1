"""What the source's tensors are after the folds that the manifest lists."""

import math

import torch
from torch import Tensor

from run_ckpt.contract.folds import TensorFold
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.rows import TORCH_DTYPES


def fold_rows(rows: Tensor, fold: TensorFold | None, start: int) -> Tensor:
    """Return rows ``start``.. of a tensor, float32 [n, width], as folds leave them before they are rounded."""
    if fold is None:
        return rows
    rows = rows * _powers(fold.columns) if fold.columns else rows.clone()
    for part, exponents in fold.rows:
        first, stop = max(part.first, start), min(part.first + len(exponents), start + len(rows))
        if first < stop:
            inside, one = rows[first - start : stop - start], float(part.plus_one)
            inside.add_(one).div_(_powers(exponents[first - part.first : stop - part.first])[:, None]).sub_(one)
    return rows


def fold_stored(data: Tensor, spec: TensorSpec, fold: TensorFold, start: int) -> Tensor:
    """Return the bytes of a kept tensor from row ``start`` on, given the source's."""
    rows = data.view(TORCH_DTYPES[spec.dtype]).reshape(-1, math.prod(spec.shape[1:]))
    return fold_rows(rows.float(), fold, start).to(rows.dtype).flatten().view(torch.uint8)


def _powers(exponents: tuple[int, ...]) -> Tensor:
    return torch.ldexp(torch.ones(len(exponents)), torch.tensor(exponents, dtype=torch.int32))
