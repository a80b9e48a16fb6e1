"""Formats that are only read: a weight in one of them is decoded, and never written."""

import math

from run_ckpt.contract.formats import F32, FP8, ElementFormat, QuantFormat
from run_ckpt.contract.layouts import PLAIN

BY_ROW = "row"
# The scale rule of a layer whose scales another tool chose.
UNKNOWN_RULE = "unknown"


def opaque_format(name: str, label: str, row_multiple: int = 1) -> QuantFormat:
    """Return a format whose rows storage/decoders.py knows; ``row_multiple`` of them are decoded together."""
    return _read_only(name, label, ElementFormat(name, "U8", 1, math.inf, None), {BY_ROW: (row_multiple, None)})


def _read_only(
    name: str, label: str, element: ElementFormat, blocks: dict[str, tuple[int | None, int | None]]
) -> QuantFormat:
    return QuantFormat(
        name=name,
        label=label,
        element=element,
        scale=F32,
        blocks=blocks,
        layouts=(PLAIN,),
        scale_rules=(UNKNOWN_RULE,),
        K_granule=1,
        min_N=1,
        N_multiple=1,
        K_multiple=1,
        summary=label,
        machines="",
    )


# OFP8, E5M2: the upper byte of a float16; it has infinities.
E5M2 = ElementFormat("e5m2", "F8_E5M2", per_byte=1, largest=57344.0, nan_magnitude=None)
FP8_E5M2 = _read_only("fp8_e5m2", "FP8 (E5M2)", E5M2, FP8.blocks)
