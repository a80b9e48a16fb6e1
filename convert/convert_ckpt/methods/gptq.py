"""GPTQ: codes that make up for each other's errors, from what the inputs of a layer were.

The output error of a layer is tr(D H D'): D is decoded - weight, H the mean of x x' over its inputs x. Columns are
rounded one after the other, each after what the errors of those before it do to its part of the output has been
subtracted from it. How much that is follows from H = L C L', L unit lower triangular, C diagonal, columns from the last
to the first: in exact arithmetic the codes are those of the published algorithm, which inverts H (Chee et al., QuIP,
arXiv 2307.13304, theorem 6), at a third of its work. Columns go by falling diagonal of H. Scales are those of rounding
to nearest, so that uncorrelated inputs give its codes.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convert_ckpt.kernels.feedback import LANES, round_columns
from convert_ckpt.methods.grid import Grid

# Added to the diagonal, in units of its mean; if H is not positive definite, the next one. 0.001 to 0.03 are as good.
_DAMPINGS = (0.01, 0.1, 1.0)
# Columns between two products with all the errors so far.
_PANEL = 128
# Rows of H at a time where errors are measured.
_BAND = 512


class NotPositiveDefiniteError(ValueError):
    """No damping makes H positive definite."""


@dataclass(frozen=True)
class Factor:
    """L of one block of columns: float32 [n, n], below the diagonal, its rows and columns in ``order`` (int64 [n])."""

    order: np.ndarray
    lower: np.ndarray
    damping: float


@dataclass(frozen=True)
class Rounded:
    """Rows of a weight as decoded, float32 [n, K], and what they lose, in float64.

    signal is tr(W H W'), output_error tr(D H D'), nearest_error the same for codes rounded to nearest, where rows have
    weights each row of W and D times the root of its own. H is that of the held out samples. squared_error and
    largest_error are of the weight.
    """

    decoded: np.ndarray
    signal: float
    output_error: float
    nearest_error: float
    squared_error: float
    largest_error: float


def factorize(block: np.ndarray) -> Factor:
    """Return the factor of H, float32 [n, n], of all columns or of one block of them.

    A channel that was always zero has no say in the others, whatever its diagonal. Raises NotPositiveDefiniteError.
    """
    diagonal = block.diagonal()
    mean = diagonal.mean(dtype=np.float64)
    diagonal = np.where(diagonal > 0, diagonal, np.float32(1))
    order = np.argsort(-diagonal, kind="stable")[::-1]
    for damping in _DAMPINGS:
        lower = block[order][:, order]
        np.fill_diagonal(lower, diagonal[order] + np.float32(damping * mean))
        try:
            _factorize_in_place(lower)
        except np.linalg.LinAlgError:
            continue
        return Factor(order, lower, damping)
    raise NotPositiveDefiniteError


def _factorize_in_place(matrix: np.ndarray) -> None:
    """Turn what is below the diagonal of a symmetric matrix into L. Raises LinAlgError if it is not positive definite.

    A panel at a time, so that nearly all of the work is one product each; twice as fast as numpy's Cholesky.
    """
    pivots = np.empty(len(matrix), matrix.dtype)
    for start in range(0, len(matrix), _PANEL):
        panel = slice(start, min(start + _PANEL, len(matrix)))
        matrix[start:, panel] -= matrix[start:, :start] @ (matrix[panel, :start] * pivots[:start]).T
        corner = np.linalg.cholesky(matrix[panel, panel])
        roots = corner.diagonal().copy()
        pivots[panel] = roots * roots
        matrix[panel, panel] = corner / roots
        matrix[panel.stop :, panel] = matrix[panel.stop :, panel] @ (np.linalg.inv(corner).T / roots)


def round_rows(
    weight: np.ndarray,
    grid: Grid,
    factors: Sequence[Factor],
    held_out: Sequence[np.ndarray],
    row_weights: np.ndarray | None = None,
) -> Rounded:
    """Round rows of a weight, float32 [n, K].

    factors: of the blocks of columns, one after the other. held_out: H of the same blocks, float32 [k, k]. row_weights:
    float32 [n], how much a row's output counts in what is lost; None: all alike.
    """
    n_rows = len(weight)
    columns = _pad_rows(np.ascontiguousarray(weight.T), 0.0)
    scales = _pad_rows(grid.scales, 1.0)
    roots = np.float32(1) if row_weights is None else np.sqrt(_pad_rows(row_weights[None], 0.0))
    decoded, sums, largest_error, start = np.empty_like(columns), np.zeros(4), 0.0, 0
    for factor, block in zip(factors, held_out, strict=True):
        part = slice(start, start + len(factor.order))
        start = part.stop
        scale_rows = grid.scale_rows[part]
        decoded[part], errors = _round_block(grid.element, columns[part], factor, scales, scale_rows)
        nearest_errors = _nearest_errors(grid.element, columns[part], scales[scale_rows])
        forms = [_quadratic_form(x * roots, block) for x in (columns[part], errors, nearest_errors)]
        sums += [*forms, np.square(errors).sum(dtype=np.float64)]
        largest_error = max(largest_error, float(np.abs(errors).max()))
    signal, output_error, nearest_error, squared_error = sums.tolist()
    rows = np.ascontiguousarray(decoded[:, :n_rows].T)
    return Rounded(rows, signal, output_error, nearest_error, squared_error, largest_error)


def _pad_rows(columns: np.ndarray, value: float) -> np.ndarray:
    """Return [k, n] with n a multiple of LANES."""
    missing = -columns.shape[1] % LANES
    return np.pad(columns, ((0, 0), (0, missing)), constant_values=value) if missing else columns


def _round_block(
    element: str, columns: np.ndarray, factor: Factor, scales: np.ndarray, scale_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the decoded columns and their errors, float32 [k, n]."""
    values = columns[factor.order]
    errors = np.zeros_like(values)
    scale_rows = scale_rows[factor.order]
    for stop in range(len(values), 0, -_PANEL):
        panel = slice(max(0, stop - _PANEL), stop)
        if stop < len(values):
            np.matmul(factor.lower[stop:, panel].T, errors[stop:], out=errors[panel])
        coefficients = np.ascontiguousarray(factor.lower[panel, panel])
        round_columns(element, values[panel], errors[panel], coefficients, scales, scale_rows[panel])
    back = np.argsort(factor.order)
    return values[back], errors[back]


def _nearest_errors(element: str, columns: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return decoded - weight, float32 [k, n], of the nearest codes; each element has its scale."""
    values, errors = columns.reshape(1, -1).copy(), np.zeros((1, columns.size), np.float32)
    nothing = np.zeros((1, 1), np.float32)
    round_columns(element, values, errors, nothing, scales.reshape(1, -1), np.zeros(1, np.int64))
    return errors.reshape(columns.shape)


def _quadratic_form(x: np.ndarray, block: np.ndarray) -> float:
    """Return tr(x' H x) for x float32 [k, n]; of a symmetric H only the lower half is read."""
    total = 0.0
    for start in range(0, len(block), _BAND):
        band = slice(start, start + _BAND)
        product = 2 * (block[band, :start] @ x[:start]) + block[band, band] @ x[band]
        total += float(np.einsum("kn,kn->k", product, x[band]).sum(dtype=np.float64))
    return total
