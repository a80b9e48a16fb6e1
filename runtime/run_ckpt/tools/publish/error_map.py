"""SQNR by block and projection: the grid, and its picture (SVG) for the model card and the report (pure)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from run_ckpt.tools.publish.rows import TensorRow

# Layers of one format lie within some tenths of a dB when all is well: let that look even.
SMALLEST_SPAN_DB = 3.0

_N_WORST = 10
# Up to so many blocks the cells are wide enough for their numbers.
_MOST_WIDE_BLOCKS = 12
# Sizes are pixels.
_LINE, _GAP, _LETTER, _SWATCH = 22, 2, 6.2, 14
# From the weakest to the strongest layer: magma, in eleven steps that are even in Oklab, so that every kind of colour
# vision tells them apart; on a dark page the other way round, so that the weak stand out in both.
_LIGHT = "3b0f70 572372 773072 983b71 ba436d de4968 e76872 ee857c f59f86 fab990 fed39a"
_DARK = "fcfdbf f2d7b2 e6b1a4 d88b96 c96388 b73779 993472 7c306c 602a64 45235d 2b1a55"
_N_STEPS = 11
_FIRST_STRONG_STEP = 4


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


@dataclass(frozen=True)
class _Cell:
    """``share``: where its colour lies between the weakest (0) and the strongest (1); None for a hatched one."""

    share: float | None
    text: str
    is_marked: bool = False


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


def draw_errors(grids: Sequence[Grid], ranges: Mapping[str, tuple[float, float]]) -> str:
    """Return the SVG of each layer's SQNR, "" where no layer is in a numbered block."""
    rows = [row for grid in grids for row in grid.cells.values()]
    measured = sorted((row.sqnr_db, row.path) for row in rows if row.sqnr_db is not None)
    worst = {path for _, path in measured[:_N_WORST]}

    def cell(row: TensorRow) -> _Cell:
        if row.sqnr_db is None:
            return _Cell(None, "")
        weakest, strongest = ranges[row.stored_as]
        share = (row.sqnr_db - weakest) / (strongest - weakest)
        return _Cell(share, f"{row.sqnr_db:.1f}", row.path in worst)

    here = {row.stored_as for row in rows}
    scales = [(name, f"{low:.1f}", f"{high:.1f} dB") for name, (low, high) in ranges.items() if name in here]
    keys = ("kept as it was", f"one of the {_N_WORST} weakest")
    return _draw("SQNR of each layer", grids, cell, scales, keys)


def draw_gains(grids: Sequence[Grid], gains: Mapping[str, float]) -> str:
    """Return the SVG of how much SQNR each layer gained. gains: path of a row -> dB, of those that have both."""
    largest = max([0.5, *map(abs, gains.values())])

    def cell(row: TensorRow) -> _Cell:
        gain = gains.get(row.path)
        return _Cell(None, "") if gain is None else _Cell(0.5 + gain / (2 * largest), f"{gain:+.1f}")

    scale = ("gain", f"{-largest:+.1f}", f"{largest:+.1f} dB")
    return _draw("SQNR that each layer gained", grids, cell, [scale], ("not quantized in both", ""))


def _draw(
    title: str,
    grids: Sequence[Grid],
    cell: Callable[[TensorRow], _Cell],
    scales: Sequence[tuple[str, str, str]],
    keys: tuple[str, str],
) -> str:
    """Return the SVG of the grids one below the other. Each cell names its layer, for what the report lays over it.

    scales: of each the name, and its weakest and strongest value. keys: what a hatched cell is, and a marked one.
    """
    if not grids:
        return ""
    left = _LETTER * max(len(name) for grid in grids for name in grid.projections) + 10
    parts, top, width = _draw_legend(scales, *keys)
    for grid in grids:
        drawn, height, grid_width = _draw_grid(grid, cell, left)
        parts.append(f'<g transform="translate(0 {top})">{drawn}</g>')
        top, width = top + height, max(width, grid_width)
    size = f'viewBox="0 0 {width:.0f} {top}" width="{width:.0f}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="map" {size} role="group" aria-label={quoteattr(title)}>'
    return f"{head}<style>{_style()}</style>{''.join(parts)}</svg>"


def _draw_legend(scales: Sequence[tuple[str, str, str]], hatched: str, marked: str) -> tuple[list[str], int, float]:
    """Return the lines of the legend, and how high and wide it is."""
    left = _LETTER * max(len(f"{name} {low}") for name, low, _ in scales) + 10
    parts, width = [], 0.0
    for line, (name, low, high) in enumerate(scales):
        y = line * _LINE
        parts.append(_text(left - 6, y, f"{name} {low}", "end"))
        parts += [_rect(left + i * _SWATCH, y, _SWATCH, f"s{i}") for i in range(_N_STEPS)]
        parts.append(_text(left + _N_STEPS * _SWATCH + 6, y, high))
        width = max(width, left + _N_STEPS * _SWATCH + 6 + _LETTER * len(high))
    y = len(scales) * _LINE
    parts += [_rect(left, y, _SWATCH, "kept"), _hatch([(left, y)], _SWATCH), _text(left + _SWATCH + 6, y, hatched)]
    x = left + _SWATCH + 6 + _LETTER * (len(hatched) + 3)
    parts += [_dot(x, y, "mark"), _text(x + 8, y, marked)] if marked else []
    return parts, (len(scales) + 1) * _LINE + 8, max(width, x + 8 + _LETTER * len(marked))


def _draw_grid(grid: Grid, cell: Callable[[TensorRow], _Cell], left: float) -> tuple[str, int, float]:
    """Return a grid's title, blocks and cells, and how high and wide it is."""
    is_wide = len(grid.blocks) <= _MOST_WIDE_BLOCKS
    cell_width = 54 if is_wide else 14
    step = 1 if is_wide else 5
    places = {block: left + i * (cell_width + _GAP) for i, block in enumerate(grid.blocks)}
    parts = [f'<text class="title" x="0" y="15">{escape(grid.title)}</text>'] if grid.title else []
    parts += [_text(places[block] + cell_width / 2, _LINE, str(block), "middle") for block in grid.blocks[::step]]
    kept: list[tuple[float, int]] = []
    for line, projection in enumerate(grid.projections):
        y = (line + 2) * _LINE
        parts.append(_text(left - 8, y, projection, "end"))
        for block, x in places.items():
            if row := grid.cells.get((projection, block)):
                drawn = cell(row)
                step_name = "kept" if drawn.share is None else f"s{_step(drawn.share)}"
                parts.append(_rect(x, y, cell_width, step_name, row.path))
                kept += [(x, y)] if drawn.share is None else []
                ink = "weak" if drawn.share is not None and _step(drawn.share) < _FIRST_STRONG_STEP else "strong"
                parts += [_text(x + cell_width / 2, y, drawn.text, "middle", ink)] if is_wide and drawn.text else []
                parts += [_dot(x + cell_width - 6, y - 5, ink)] if drawn.is_marked else []
    parts.append(_hatch(kept, cell_width))
    return "".join(parts), (len(grid.projections) + 2) * _LINE + 8, left + len(places) * (cell_width + _GAP)


def _step(share: float) -> int:
    return round(min(1.0, max(0.0, share)) * (_N_STEPS - 1))


def _rect(x: float, y: int, width: int, step: str, name: str = "") -> str:
    layer = f" data-layer={quoteattr(name)}" if name else ""
    return f'<rect class="{step}" x="{x:g}" y="{y}" width="{width}" height="{_LINE - _GAP}"{layer}/>'


def _text(x: float, y: int, text: str, anchor: str = "start", ink: str = "label") -> str:
    return f'<text class="{ink}" x="{x:g}" y="{y + 14}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: int, ink: str) -> str:
    return f'<circle class="{ink}" cx="{x:g}" cy="{y + 10}" r="2.5"/>'


def _hatch(corners: Sequence[tuple[float, int]], width: int) -> str:
    """Return strokes from the lower left of each cell to the upper right."""
    side = _LINE - _GAP
    steps = range(0, width, 7)
    lines = (f"M{x + i:g} {y + side}l{min(7, width - i)} -{side}" for x, y in corners for i in steps)
    return f'<path class="hatch" d="{"".join(lines)}"/>' if corners else ""


def _style() -> str:
    """Return the style of the picture, which follows the reader's theme also where it is an image of a card."""
    light = _colors(_LIGHT, weak="#fff", strong="#1d1b22", label="#625d6b", kept="#f1eff3", hatch="#cfcad4")
    dark = _colors(_DARK, weak="#17141c", strong="#fff", label="#a8a2b0", kept="#24202b", hatch="#57505f")
    return (
        ".map{font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}.map .title{font-size:13px}"
        f".map text,.map path,.map circle{{pointer-events:none}}{light}@media(prefers-color-scheme:dark){{{dark}}}"
    )


def _colors(steps: str, *, weak: str, strong: str, label: str, kept: str, hatch: str) -> str:
    fills = {f"s{i}": f"#{color}" for i, color in enumerate(steps.split())}
    fills |= {"weak": weak, "strong": strong, "label": label, "title": label, "mark": label, "kept": kept}
    rules = "".join(f".map .{name}{{fill:{color}}}" for name, color in fills.items())
    return f"{rules}.map .hatch{{stroke:{hatch};fill:none}}"
