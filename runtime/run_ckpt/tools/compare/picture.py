"""BASE and the results side by side, each with what differs, as one picture."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from run_ckpt.tools.compare.pipelines import PipelineComparison

DIFFERENCE_FACTOR = 10
# In pixels. A tile is shrunk to this side, never blown up.
_MAX_TILE = 512
_MIN_WIDTH = 480
_MARGIN = 8
_TITLE_HEIGHT = 22
_PAPER, _INK = "white", "#333333"


def draw_comparison(comparison: PipelineComparison) -> Image.Image:
    """Return a row of BASE's samples, then for each result a row of its own and a row of |difference| x 10."""
    base = [_array(picture) for picture in comparison.pictures]
    rows = [(comparison.base, base)]
    for result in comparison.results:
        ours = [_array(picture) for picture in result.pictures]
        figures = result.figures
        title = f"{result.name}: PSNR {figures['psnr']:.1f} dB, latent SNR {figures['snr']:.1f} dB (medians)"
        rows.append((title, ours))
        rows.append(
            (f"difference, times {DIFFERENCE_FACTOR}", [_difference(r, x) for r, x in zip(base, ours, strict=True)])
        )
    return _stack(rows)


def _stack(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]]) -> Image.Image:
    tiles = [(title, [_tile(pixels) for pixels in arrays]) for title, arrays in rows]
    width, height = tiles[0][1][0].size
    row_height = _TITLE_HEIGHT + height + _MARGIN
    full_width = max(_MIN_WIDTH, len(tiles[0][1]) * (width + _MARGIN) + _MARGIN)
    canvas = Image.new("RGB", (full_width, len(tiles) * row_height), _PAPER)
    brush = ImageDraw.Draw(canvas)
    for number, (title, images) in enumerate(tiles):
        top = number * row_height
        brush.text((_MARGIN, top + 4), title, fill=_INK, font=ImageFont.load_default(13))
        for column, image in enumerate(images):
            canvas.paste(image, (_MARGIN + column * (width + _MARGIN), top + _TITLE_HEIGHT))
    return canvas


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((_MAX_TILE, _MAX_TILE))
    return image


def _difference(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tenfold = np.abs(other.astype(np.int32) - reference.astype(np.int32)) * DIFFERENCE_FACTOR
    return tenfold.clip(max=255).astype(np.uint8)


def _array(picture: Tensor) -> NDArray[np.uint8]:
    """uint8 [H, W, C] of one or three channels -> [H, W, 3]."""
    return picture.expand(*picture.shape[:2], 3).numpy()
