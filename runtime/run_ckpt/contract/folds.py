"""Folds: channels of activations made smaller or larger by what writes them, and the weights that read them in return.

Channel k becomes x_k / d_k, and column k of every weight that reads it W_nk d_k, so that the layers' outputs stay what
they were. Each d_k = 2^e_k, e_k <= 0, so that these products are exact in any floating-point format.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FoldedRows:
    """K rows of ``tensor`` from row ``first`` on, which write the channels: row k is divided by d_k.

    plus_one: the model adds 1 to what it reads (AdaLN multiplies by 1 + scale), so b becomes (b + 1) / d_k - 1. This
    alone is rounded: to the tensor's dtype, from float32.
    """

    tensor: str
    first: int = 0
    plus_one: bool = False


@dataclass(frozen=True)
class Fold:
    """One tensor of activations. ``exponents``: e_k of each of its K channels; ``readers``: the weights [N, K]."""

    exponents: tuple[int, ...]
    writers: tuple[FoldedRows, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class TensorFold:
    """What becomes of one tensor: e_k of its columns if it is a reader, and each part that is a writer."""

    columns: tuple[int, ...] | None = None
    rows: tuple[tuple[FoldedRows, tuple[int, ...]], ...] = field(default=())


def folds_by_tensor(folds: Iterable[Fold]) -> dict[str, TensorFold]:
    """Return tensor -> what all folds together do to it; nothing for the other tensors."""
    found: dict[str, TensorFold] = {}
    for fold in folds:
        for name in fold.readers:
            found[name] = TensorFold(columns=fold.exponents)
        for part in fold.writers:
            before = found.get(part.tensor, TensorFold())
            found[part.tensor] = TensorFold(before.columns, (*before.rows, (part, fold.exponents)))
    return found
