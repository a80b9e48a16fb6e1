"""The sums over the rows of one input, in float32."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from run_ckpt.statistics.rounding import RoundingSums
from run_ckpt.storage.layer_statistics import block_ranges, pack_below_diagonal

_F32_NBYTES = 4


class InputSums:
    """Sums over rows [n, K] of BF16 activations; ``held_out`` ones are kept apart.

    Products of BF16 are exact in TF32 too, and are summed in float32 in the order of the calls: a Hessian summed in
    BF16 is not positive definite.
    """

    def __init__(self, K: int, block_size: int, device: torch.device, *, rounding: bool = False):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.K = K
        self.block_size = block_size
        self._n_rows = [0, 0]
        self._sum, self._amax = zeros(K), zeros(K)
        self._rounding = RoundingSums(K) if rounding else None
        self._ranges = list(block_ranges(K, block_size))
        self._squares = [zeros(K), zeros(K)]
        self._products = [[zeros(stop - start, stop - start) for start, stop in self._ranges] for _ in range(2)]

    def add(self, rows: Tensor, *, held_out: bool) -> None:
        """Add rows [n, K]."""
        x = rows.bfloat16().float()
        self._n_rows[held_out] += len(x)
        if self._rounding:
            self._rounding.add(x)
        self._sum += x.sum(0)
        self._amax = torch.maximum(self._amax, x.abs().amax(0))
        self._squares[held_out] += x.square().sum(0)
        for (start, stop), products in zip(self._ranges, self._products[held_out], strict=True):
            block = x[:, start:stop]
            products.addmm_(block.T, block)

    def tensors(self) -> Mapping[str, np.ndarray]:
        """Return the arrays of storage.layer_statistics' table."""
        arrays = {
            "n_rows": np.array(self._n_rows, np.int64),
            "mean": (self._sum / sum(self._n_rows)).cpu().numpy(),
            "amax": self._amax.cpu().numpy(),
        }
        for held_out, name in enumerate(("hessian", "held_out")):
            squares = self._squares[held_out]
            correlations = [
                _correlations(products, squares[start:stop])
                for (start, stop), products in zip(self._ranges, self._products[held_out], strict=True)
            ]
            arrays[f"{name}.diagonal"] = (squares / max(1, self._n_rows[held_out])).cpu().numpy()
            arrays[f"{name}.correlations"] = np.concatenate([np.empty(0, np.float16), *correlations])
        return {**arrays, **(self._rounding.tensors() if self._rounding else {})}

    @property
    def n_rows(self) -> tuple[int, int]:
        """Rows summed up, and rows held out."""
        return self._n_rows[0], self._n_rows[1]


def sums_nbytes(K: int, block_size: int) -> int:
    """Return the memory that the sums of one input take."""
    n_products = sum((stop - start) ** 2 for start, stop in block_ranges(K, block_size))
    return _F32_NBYTES * (2 * n_products + 4 * K)


def _correlations(products: Tensor, squares: Tensor) -> np.ndarray:
    roots = squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    correlations = (products / roots[:, None] / roots).clamp(-1, 1)
    return pack_below_diagonal(correlations.half().cpu().numpy())
