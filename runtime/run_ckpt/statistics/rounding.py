"""What is lost where the input of a layer is rounded as its weight is: kernels of these formats take both so."""

import numpy as np
import torch
from torch import Tensor

from run_ckpt.contract.codec import dequantize, nvfp4_tensor_scale, quantize
from run_ckpt.contract.formats import FORMATS
from run_ckpt.storage.layer_statistics import rounded_formats, rounding_name

# So many rows of every eighth call, as plain torch takes its time to round, and steps of a sampler are much alike.
_N_ROWS, _EVERY = 64, 8


class RoundingSums:
    """Sums over rows of one input of the squared errors of each channel, float32 [K], by format."""

    def __init__(self, K: int):
        self._sums = {name: torch.zeros(K) for name in rounded_formats(K)}
        self._n_rows = self._n_calls = 0

    def add(self, x: Tensor) -> None:
        """Add some rows of x [n, K], evenly apart, each rounded for itself under the format's usual scales."""
        self._n_calls += 1
        if self._n_calls % _EVERY != 1 or not len(x):
            return
        rows = x[:: -(-len(x) // _N_ROWS)].float().cpu()
        self._n_rows += len(rows)
        for name, total in self._sums.items():
            quant_format = FORMATS[name]
            # "channel": of the formats that leave it open, a scale for each row.
            scheme = quant_format.scheme(granularity="channel")
            second = nvfp4_tensor_scale(rows.abs().amax()) if quant_format.is_two_level else None
            codes, scales = quantize(rows, scheme, quant_format.scale_rules[0], second)
            total += (dequantize(codes, scales, scheme, second) - rows).square().sum(0)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the mean squared errors of each channel, by the names of layer_statistics' table."""
        return {rounding_name(name): (total / max(1, self._n_rows)).numpy() for name, total in self._sums.items()}
