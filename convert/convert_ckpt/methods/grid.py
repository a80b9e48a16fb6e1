"""The values that a weight may take once its scales are chosen."""

from dataclasses import dataclass

import numpy as np

# Rows are independent of each other; so many are rounded at a time, which bounds the memory.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Grid:
    """The values that rows of a weight, [n, K], may take: ``element`` (such as ``e2m1``) times a scale.

    scales: float32 [n_scales, n], positive. scale_rows: int64 [K], the row of ``scales`` that holds a column's.
    """

    element: str
    scales: np.ndarray
    scale_rows: np.ndarray
