"""The JSON types of a manifest's fields: whoever reads one further can trust them."""

import math
from collections.abc import Callable, Iterator, Mapping
from re import fullmatch
from typing import Any

from run_ckpt.contract.tensors import DTYPE_BITS

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _sentence(value: Any) -> bool:
    """Words of a recipe or of the source's card; cleaned where they are shown."""
    return isinstance(value, str)


def _class_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _revision(value: Any) -> bool:
    return isinstance(value, str) and fullmatch(r"[\w.-]+", value) is not None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _fact(value: Any) -> bool:
    return _sentence(value) or (isinstance(value, list) and all(map(_sentence, value)))


def _rows(value: Any) -> bool:
    """What storage.views.Rows has: a tensor and at least first and last row."""
    return isinstance(value, list) and 3 <= len(value) <= 5 and _text(value[0]) and all(map(_integer, value[1:]))


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPE_BITS


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _map_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(_text, value)) and all(map(check, value.values()))


_SPEC: dict[str, Check] = {"dtype": _dtype, "shape": _list_of(_count)}
_LAYER: dict[str, Check] = {
    **dict.fromkeys(
        ("module", "source_tensor", "source_dtype", "scale_rule", "format", "layout", "granularity"), _text
    ),
    "sqnr_db": _optional(_number),
    "max_abs_error": _number,
    "tensors": _map_of(_text),
    "scale_shape": _list_of(_count),
    "fused_group": _optional(_text),
    "method": _optional(_text),
    "n_stacked": _optional(lambda value: _count(value) and value > 0),
    "decided_by": _map_of(_optional(_text)),
    "output_sqnr_db": _optional(_map_of(_optional(_number))),
}
_RECIPE: dict[str, Check] = {
    **dict.fromkeys(("format", "layout", "granularity", "scale_rule", "dialect", "naming", "preset"), _optional(_text)),
    **dict.fromkeys(("recipe", "calibration", "calibration_blake3", "method", "target"), _optional(_text)),
    "class_name": _optional(_class_name),
    "max_size": _optional(lambda value: _text(value) or _count(value)),
    "min_sqnr": _optional(_number),
    "sensitivities": _optional(_text),
    **dict.fromkeys(("keep_first", "keep_last"), _optional(_count)),
    "budget": _optional(lambda value: isinstance(value, dict) and _text(value.get("by"))),
    "calibrated_with": _optional(lambda value: isinstance(value, dict)),
    **dict.fromkeys(("static", "fold", "allow_unaligned_k", "swap_weight_nibbles"), _optional(_flag)),
    "ignore": _optional(_list_of(_text)),
    "rules": _optional(_list_of(_list_of(_text))),
}
_SOURCE: dict[str, Check] = {
    "name": _text,
    "revision": _optional(_revision),
    "card": _optional(_map_of(_fact)),
    "tensors": _optional(_map_of(_list_of(_rows))),
}
# Table of the manifest -> the fields of each of its entries.
_TABLES: dict[str, dict[str, Check]] = {
    "layers": _LAYER,
    "kept": {**_SPEC, "reason": _sentence, "decided_by": _map_of(_optional(_text))},
    "fused_scales": {**_SPEC, "role": _text, "members": _list_of(_text)},
}


def type_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a manifest, as JSON, holds a value of another type than its field has.

    A field that may be missing may be null. Entries of a table may be records with to_json().
    Raises KeyError for a table that is missing.
    """
    yield from _fields("tool", document["tool"], {"name": _text, "version": _text})
    yield from _fields("source", document["source"], _SOURCE)
    yield from _fields("recipe", document["recipe"], _RECIPE)
    for table in ("unquantized_linears", "targets"):
        if not _map_of(_optional(_text))(document[table]):
            yield table
    for table, checks in _TABLES.items():
        entries = document[table]
        if not isinstance(entries, dict):
            yield table
            continue
        if not all(map(_text, entries)):
            yield f"a name in {table}"
        for name, entry in entries.items():
            yield from _fields(f"{table}: {name}", entry.to_json() if hasattr(entry, "to_json") else entry, checks)


def _fields(where: str, entry: Any, checks: Mapping[str, Check]) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield where
        return
    for key, check in checks.items():
        if not check(entry.get(key)):
            yield f"{where}: {key}"
