"""A PNG of sampled digits, one row for each transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from digits import to_pixels
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

# In pixels of the PNG. Twice what a README shows, for dense screens; a whole number for each
# sampled pixel, so that none is blurred.
_ZOOM = 14
_GAP = 16
_MARGIN = 20
_LABEL_WIDTH = 440
_TITLE_SIZE = 32
_SUBTITLE_SIZE = 26
_LINE_SPACING = 1.4
_DPI = 100
# Read well on white and on black, as the background is transparent.
_TITLE_COLOR = "#757d89"
_SUBTITLE_COLOR = "#7f8793"
_PAPER = np.array([24, 28, 40])
_INK = np.array([255, 244, 214])


@dataclass(frozen=True)
class Row:
    """One row of the picture: what is written to its left, and its images [columns, 1, 8, 8]."""

    title: str
    subtitle: str
    images: Tensor


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of ``rows``, from top to bottom, to ``path``."""
    strips = [_strip(row.images) for row in rows]
    strip_height, strip_width = strips[0].shape[:2]
    width = _LABEL_WIDTH + strip_width + _MARGIN
    height = 2 * _MARGIN + len(rows) * (strip_height + _GAP) - _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    for number, (row, strip) in enumerate(zip(rows, strips, strict=True)):
        bottom = height - _MARGIN - strip_height - number * (strip_height + _GAP)
        figure.figimage(strip, _LABEL_WIDTH, bottom, origin="upper")
        _write(figure, row, (bottom + strip_height / 2) / height, width)
    figure.savefig(path, transparent=True)


def difference(reference: Tensor, images: Tensor, times: int) -> Tensor:
    """Return images of how far ``images`` [B, 1, 8, 8] are from ``reference``: ink is 1 / ``times`` of black."""
    return (images - reference).abs() * times - 1


def _strip(images: Tensor) -> NDArray[np.uint8]:
    """Return uint8 RGBA [height, width, 4]: the images side by side, transparent between them."""
    darkness = to_pixels(images)[..., None] / 16
    colors = np.round(_PAPER + darkness * (_INK - _PAPER)).astype(np.uint8)
    tiles = colors.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2)
    opaque = np.concatenate([tiles, np.full_like(tiles[..., :1], 255)], axis=-1)
    spaced = np.pad(opaque, [(0, 0), (0, 0), (0, _GAP), (0, 0)])
    return np.concatenate(list(spaced), axis=1)[:, :-_GAP]


def _write(figure: Figure, row: Row, middle: float, width: int) -> None:
    left = _MARGIN / width
    points = 72 / _DPI
    title, subtitle = f"{row.title}\n", f"\n{row.subtitle}"
    style: dict[str, Any] = {"va": "center", "linespacing": _LINE_SPACING}
    figure.text(left, middle, title, weight="bold", size=_TITLE_SIZE * points, color=_TITLE_COLOR, **style)
    figure.text(left, middle, subtitle, size=_SUBTITLE_SIZE * points, color=_SUBTITLE_COLOR, **style)
