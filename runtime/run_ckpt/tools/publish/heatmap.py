"""SQNR by block and projection: the grid (pure), and its picture for the model card."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from run_ckpt.tools.publish.rows import TensorRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

# Layers of one format lie within some tenths of a dB when all is well: let that look even.
SMALLEST_SPAN_DB = 3.0

_CELL_INCHES = 0.22
_MOST_BLOCK_LABELS = 24


@dataclass(frozen=True)
class Grid:
    """The linear layers of one stack of blocks: a line of cells for each projection, one for each block.

    ``cells`` maps (projection, block) to the row of that layer; a pair that is not in it does not exist.
    """

    component: str
    stack: str
    projections: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: Mapping[tuple[str, int], TensorRow]

    @property
    def title(self) -> str:
        return "/".join(filter(None, (self.component, self.stack)))


def make_grids(rows: Iterable[TensorRow]) -> list[Grid]:
    """Return a grid for each stack that holds a quantized layer, in the order of the rows."""
    stacks: dict[tuple[str, str], dict[tuple[str, int], TensorRow]] = {}
    for row in rows:
        if row.is_linear and row.block is not None:
            stacks.setdefault((row.component, row.stack), {})[row.projection, row.block] = row
    return [
        Grid(
            component,
            stack,
            tuple(dict.fromkeys(projection for projection, _ in cells)),
            tuple(sorted({block for _, block in cells})),
            cells,
        )
        for (component, stack), cells in stacks.items()
        if any(row.is_quantized for row in cells.values())
    ]


def color_ranges(rows: Iterable[TensorRow]) -> dict[str, tuple[float, float]]:
    """Return format -> (weakest, strongest) SQNR that colours tell apart: each format has its own usual level."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.sqnr_db is not None:
            values.setdefault(row.stored_as, []).append(row.sqnr_db)
    return {
        name: (min(*sqnr, max(sqnr) - SMALLEST_SPAN_DB), max(sqnr))
        for name, sqnr in sorted(values.items(), reverse=True)
    }


def draw_heatmap(grids: list[Grid]) -> bytes | None:
    """Return the grids as one PNG, None where there is nothing to draw or matplotlib is not installed.

    The colours are cividis, even in lightness and the same for colour-blind eyes; the darkest cell is
    the weakest layer. Kept layers are hatched.
    """
    ranges = color_ranges(row for grid in grids for row in grid.cells.values())
    if not ranges or not can_draw():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    heights = [len(grid.projections) for grid in grids]
    n_columns = max(len(grid.blocks) for grid in grids)
    size = (max(6.5, 3.2 + n_columns * _CELL_INCHES), 0.5 * len(grids) + sum(heights) * _CELL_INCHES + 0.2)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(grids), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    norms = {name: Normalize(*limits) for name, limits in ranges.items()}
    for axes, grid in zip(all_axes, grids, strict=True):
        _draw_grid(axes, grid, norms, n_columns)
    for name, norm in norms.items():
        colours = figure.colorbar(ScalarMappable(norm, "cividis"), ax=list(all_axes), aspect=40, pad=0.01)
        colours.set_label(f"SQNR of {name} in dB (dark is weak; hatched was kept)", fontsize=8)
        colours.ax.tick_params(labelsize=7)
    file = io.BytesIO()
    # Without matplotlib's version in it, one result gives one picture.
    figure.savefig(file, format="png", dpi=140, metadata={"Software": None})
    return file.getvalue()


def can_draw() -> bool:
    """True where matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _draw_grid(axes: Axes, grid: Grid, norms: Mapping[str, Normalize], n_columns: int) -> None:
    shades = [[_shade(grid.cells.get((name, block)), norms) for block in grid.blocks] for name in grid.projections]
    n_rows, n_blocks = len(grid.projections), len(grid.blocks)
    axes.pcolormesh(shades, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    for (name, block), row in grid.cells.items():
        if not row.is_quantized:
            corner = (grid.blocks.index(block), grid.projections.index(name))
            axes.add_patch(_kept_cell(corner))
    axes.set(xlim=(0, n_columns), ylim=(n_rows, 0))
    axes.set_title(grid.title, loc="left", fontsize=9)
    axes.set_yticks([i + 0.5 for i in range(n_rows)], grid.projections, fontsize=7)
    step = -(-n_blocks // _MOST_BLOCK_LABELS)
    axes.set_xticks([i + 0.5 for i in range(0, n_blocks, step)], [str(b) for b in grid.blocks[::step]], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _shade(row: TensorRow | None, norms: Mapping[str, Normalize]) -> float:
    """Return 0 for the weakest layer of its format to 1 for the strongest, NaN where there is none."""
    return float("nan") if row is None or row.sqnr_db is None else float(norms[row.stored_as](row.sqnr_db))


def _kept_cell(corner: tuple[int, int]) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor="#eeeeee", edgecolor="#aaaaaa", hatch="////", linewidth=0)
