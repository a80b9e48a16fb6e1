"""How formats were chosen within a budget, as lines: what was chosen, a table and a picture of the rest."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from convert_ckpt.planning import Budget, CurvePoint
from run_ckpt.storage.units import format_nbytes

_N_ROWS = 12
_WIDTH, _HEIGHT = 64, 14
# Of what is least: sums of floating-point numbers differ by as much.
_NO_GAP = 1e-9


def budget_line(budget: Budget) -> str:
    """Return what was chosen, by what, and how good that is."""
    layers = ", ".join(f"{name} {count}" for name, count in sorted(budget.chosen.n_layers.items()))
    best = "none is better" if budget.gap < _NO_GAP else f"the best is at most {budget.gap:.2%} better"
    return (
        f"{budget.asked}: layers by format: {layers}; {format_nbytes(budget.chosen.nbytes)}, SQNR"
        f" {_db(budget.chosen.sqnr_db)} dB of {budget.of_what}, predicted by {budget.by}; {best}"
    )


def curve_lines(budget: Budget) -> Iterator[str]:
    """Yield a table of sizes and what they cost, and the curve of all of them."""
    others = _spread_out(budget.curve, _N_ROWS)
    points = [budget.chosen, *(point for point in others if point.nbytes != budget.chosen.nbytes)]
    points.sort(key=lambda point: point.nbytes)
    formats = sorted({name for point in points for name in point.n_layers})
    rows = [("", "size", "SQNR dB", *formats)]
    for point in points:
        counts = [str(point.n_layers.get(name, 0)) for name in formats]
        rows.append((">" * (point is budget.chosen), format_nbytes(point.nbytes), _db(point.sqnr_db), *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield from _picture(budget)


def budget_json(budget: Budget) -> dict[str, Any]:
    """Return it as JSON values, with all points of the curve; an SQNR is None where nothing is lost."""
    return {
        "asked": budget.asked,
        "by": budget.by,
        "of_what": budget.of_what,
        "gap": budget.gap,
        "chosen": _point_json(budget.chosen),
        "curve": [_point_json(point) for point in budget.curve],
    }


def _picture(budget: Budget) -> Iterator[str]:
    """Yield the lines of a plot of SQNR over size, O where the choice is."""
    points = [point for point in (*budget.curve, budget.chosen) if math.isfinite(point.sqnr_db)]
    sizes, heights = [point.nbytes for point in points], [point.sqnr_db for point in points]
    if not points or min(sizes) == max(sizes) or min(heights) == max(heights):
        return
    cells = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for point in points:
        x = _scale(point.nbytes, sizes, _WIDTH)
        y = _scale(point.sqnr_db, heights, _HEIGHT)
        cells[_HEIGHT - 1 - y][x] = "O" if point is budget.chosen else "."
    labels = {0: _db(max(heights)), _HEIGHT - 1: _db(min(heights))}
    for n, row in enumerate(cells):
        yield f"{labels.get(n, ''):>7} |{''.join(row)}".rstrip()
    first, last = format_nbytes(min(sizes)), format_nbytes(max(sizes))
    yield f"     dB +{'-' * _WIDTH}"
    yield f"{'':8} {first}{last.rjust(_WIDTH - len(first))}"


def _scale(value: float, values: Sequence[float], n_cells: int) -> int:
    return round((value - min(values)) / (max(values) - min(values)) * (n_cells - 1))


def _spread_out(points: Sequence[CurvePoint], count: int) -> list[CurvePoint]:
    """Return at most ``count`` points, their sizes as evenly apart as there are some, the ends among them."""
    first, last = points[0].nbytes, points[-1].nbytes
    wanted = [first + (last - first) * i / (count - 1) for i in range(count)]
    nearest = [min(range(len(points)), key=lambda n: abs(points[n].nbytes - size)) for size in wanted]
    return [points[n] for n in dict.fromkeys(nearest)]


def _point_json(point: CurvePoint) -> dict[str, Any]:
    sqnr_db = round(point.sqnr_db, 2) if math.isfinite(point.sqnr_db) else None
    return {"nbytes": point.nbytes, "sqnr_db": sqnr_db, "n_layers": dict(point.n_layers)}


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"
