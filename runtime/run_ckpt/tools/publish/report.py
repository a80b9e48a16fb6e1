"""`run-ckpt report`: results as one HTML page that needs nothing else (pure)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from run_ckpt.contract.manifest import WEIGHT
from run_ckpt.tools.diff import diff_results
from run_ckpt.tools.publish.advice import kept_lines, list_advice, usual_lines
from run_ckpt.tools.publish.error_map import color_ranges, draw_errors, draw_gains, make_grids
from run_ckpt.tools.publish.rows import ConvertedComponent, TensorRow

_TEMPLATE = Path(__file__).with_name("report.html")
# In JSON these mean the same, and no text of a manifest can end the element that holds it.
_ESCAPES: dict[str, str | int | None] = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def make_report(results: Mapping[str, Sequence[ConvertedComponent]]) -> str:
    """Return the page of one result, or of several to compare. results: label -> components."""
    text = json.dumps(report_data(results), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    filled = {
        "__MAPS__": _maps(results),
        "__GAINS__": _gains(*results.values()) if len(results) == 2 else "",
        "__DATA__": text.translate(str.maketrans(_ESCAPES)),
    }
    page = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("|".join(filled), lambda found: filled[found[0]], page)


def report_data(results: Mapping[str, Sequence[ConvertedComponent]]) -> dict[str, Any]:
    """Return what the page shows: a summary of each result, and a row for each tensor with what it became in each.

    Rows are lists, in the order in which report.html takes them apart.
    """
    by_name = [
        {(row.component, row.name): row for component in components for row in component.rows}
        for components in results.values()
    ]
    names = dict.fromkeys(name for rows in by_name for name in rows)
    return {
        "results": [_summary(label, components) for label, components in results.items()],
        "difference": _difference(*results.values()) if len(results) == 2 else None,
        "rows": [_row([rows.get(name) for rows in by_name]) for name in names],
    }


def _maps(results: Mapping[str, Sequence[ConvertedComponent]]) -> str:
    """Return the error map of each result; formats have one scale in all of them."""
    ranges = color_ranges(row for components in results.values() for row in _rows(components))
    parts = []
    for i, (label, components) in enumerate(results.items()):
        parts += [f"<h3>{escape(label)}</h3>"] if len(results) > 1 else []
        drawn = draw_errors(make_grids(_rows(components)), ranges) or "<p>No layer lies in a numbered block.</p>"
        parts.append(f'<div class="scroll" data-result="{i}">{drawn}</div>')
    return "".join(parts)


def _gains(a: Sequence[ConvertedComponent], b: Sequence[ConvertedComponent]) -> str:
    before = {row.path: row.sqnr_db for row in _rows(a) if row.sqnr_db is not None}
    after = {row.path: row.sqnr_db for row in _rows(b) if row.sqnr_db is not None}
    gains = {path: sqnr_db - before[path] for path, sqnr_db in after.items() if path in before}
    return f'<div class="scroll">{draw_gains(make_grids(_rows(b)), gains)}</div>'


def _rows(components: Sequence[ConvertedComponent]) -> list[TensorRow]:
    return [row for component in components for row in component.rows]


def _difference(a: Sequence[ConvertedComponent], b: Sequence[ConvertedComponent]) -> dict[str, Any]:
    found = diff_results(a, b, every_layer=True)
    return {"options": found.options, "n_different": len(found.differences), "n_same": found.n_same}


def _summary(label: str, components: Sequence[ConvertedComponent]) -> dict[str, Any]:
    rows = _rows(components)
    measured = {row.path: row.sqnr_db for row in rows if row.sqnr_db is not None}
    worst = min(measured, key=measured.__getitem__, default=None)
    weights = sum(
        layer.specs()[WEIGHT].nbytes for component in components for layer in component.manifest.layers.values()
    )
    fused = sum(fused.spec.nbytes for component in components for fused in component.manifest.fused_scales.values())
    quantized = [row for row in rows if row.is_quantized]
    n_parameters = sum(_count(row) for row in rows)
    first = components[0].summary
    return {
        "name": label,
        "source": first.source,
        "revision": first.source_revision,
        "tool": first.tool,
        "format": ", ".join(dict.fromkeys(f"{c.summary.format}, layout {c.summary.layout}" for c in components)),
        "target_arch": first.target_arch,
        "dialect": ", ".join(dict.fromkeys(component.summary.dialect for component in components)),
        "source_nbytes": sum(component.summary.source_nbytes for component in components),
        "output_nbytes": sum(component.summary.output_nbytes for component in components),
        "weight_nbytes": weights,
        "scale_nbytes": sum(row.output_nbytes for row in quantized) - weights + fused,
        "kept_nbytes": sum(row.output_nbytes for row in rows if not row.is_quantized),
        "n_layers": len(quantized),
        "is_calibrated": any(row.method for row in quantized),
        "share": sum(_count(row) for row in quantized) / max(1, n_parameters),
        "mean_sqnr_db": fmean(measured.values()) if measured else None,
        "worst_sqnr_db": measured[worst] if worst else None,
        "worst_layer": worst,
        "usual": list(usual_lines(components)),
        "kept": list(kept_lines(components)),
        "advice": [asdict(advice) for advice in list_advice(components)],
    }


def _row(rows: Sequence[TensorRow | None]) -> list[Any]:
    row = next(row for row in rows if row is not None)
    return [
        row.component,
        row.name,
        row.stack,
        row.block,
        row.projection,
        row.is_linear,
        row.shape,
        row.source_nbytes,
        [
            None
            if row is None
            else [
                *(row.stored_as, row.reason, row.output_nbytes, row.sqnr_db, row.max_abs_error, row.is_quantized),
                *(row.output_sqnr_db, row.method),
            ]
            for row in rows
        ],
    ]


def _count(row: TensorRow) -> int:
    return math.prod(row.shape)
