"""A weight of the source that a layer was made from: plain, folded, or stored as codes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.folds import TensorFold
from run_ckpt.contract.foreign import is_stored_alike
from run_ckpt.contract.manifest import Layer
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.rows import decode_rows, read_source_rows
from run_ckpt.storage.views import Rows
from run_ckpt.tools.verify.folded import fold_rows


@dataclass(frozen=True)
class Decoded:
    """A weight of the source that is stored as codes: ``parts`` are the rows of ``stored`` that it is made of."""

    codes: TensorReader
    stored: Layer
    parts: tuple[Rows, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop of the weight, float32."""
        decoded, first = [], 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.stop - part.start)
            if begin < end:
                decoded.append(decode_rows(self.codes, self.stored, part.start + begin, part.start + end))
            first += part.stop - part.start
        return torch.cat(decoded)


@dataclass(frozen=True)
class Original:
    """A weight of the source: ``decoded`` is it where that is stored as codes, ``fold`` what changes its values."""

    source: TensorReader
    decoded: Decoded | None = None
    fold: TensorFold | None = None

    def rows(self, layer: Layer, start: int, stop: int) -> Tensor:
        """Return rows of the weight that ``layer`` was made from, float32."""
        if self.decoded:
            return self.decoded.rows(start, stop)
        return fold_rows(read_source_rows(self.source, layer, start, stop).float(), self.fold, start)

    def row_multiple(self, layer: Layer) -> int:
        """Return what both can be cut at."""
        return math.lcm(layer.scheme.row_multiple, self.decoded.stored.scheme.row_multiple if self.decoded else 1)

    def gives_scales(self, layer: Layer) -> bool:
        """True where the layer's scales follow from the weight; those of codes that are passed through need not."""
        return self.decoded is None or not is_stored_alike(self.decoded.stored, layer)
