"""`run-ckpt diff`: what two results made of the same tensors, from their manifests alone (no torch)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from run_ckpt.tools.publish.rows import ConvertedComponent, TensorRow


@dataclass(frozen=True)
class Outcome:
    """What one result made of a tensor; ``sqnr_db`` is None where it is not quantized."""

    stored_as: str
    nbytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Difference:
    """A tensor, or ``count`` of like blocks ("*"), that the results store or measured differently.

    ``a`` and ``b`` are None where a result lacks it. Bytes are sums, SQNR is the worst of all blocks.
    """

    name: str
    count: int
    a: Outcome | None
    b: Outcome | None


@dataclass(frozen=True)
class ResultDiff:
    """Two results. ``options``: what was asked for differently, option -> (in a, in b), of all components.

    ``n_same`` tensors are stored alike and, where measured, as exactly.
    """

    options: dict[str, tuple[Any, Any]]
    a_nbytes: int
    b_nbytes: int
    n_same: int
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diff_results(a: Sequence[ConvertedComponent], b: Sequence[ConvertedComponent], *, every_layer: bool) -> ResultDiff:
    """Return how result ``b`` differs from ``a``. every_layer: one row for each tensor, nothing collapsed."""
    rows_a, rows_b = _rows(a), _rows(b)
    names = list(dict.fromkeys([*rows_a, *rows_b]))
    groups: dict[tuple[object, ...], list[tuple[TensorRow | None, TensorRow | None]]] = {}
    n_same = 0
    for name in names:
        pair = (rows_a.get(name), rows_b.get(name))
        outcomes = tuple(map(_outcome, pair))
        if outcomes[0] == outcomes[1]:
            n_same += 1
            continue
        kind = name if every_layer else next(row.kind for row in pair if row)
        groups.setdefault((kind, *(outcome and outcome.stored_as for outcome in outcomes)), []).append(pair)
    return ResultDiff(
        _options(a, b),
        _nbytes(a),
        _nbytes(b),
        n_same,
        tuple(_difference(str(key[0]), pairs) for key, pairs in groups.items()),
    )


def _rows(components: Sequence[ConvertedComponent]) -> dict[str, TensorRow]:
    return {row.path: row for component in components for row in component.rows}


def _nbytes(components: Sequence[ConvertedComponent]) -> int:
    return sum(component.summary.output_nbytes for component in components)


def _outcome(row: TensorRow | None) -> Outcome | None:
    return Outcome(row.stored_as, row.output_nbytes, row.sqnr_db) if row else None


def _difference(kind: str, pairs: list[tuple[TensorRow | None, TensorRow | None]]) -> Difference:
    rows_a, rows_b = ([row for row in rows if row] for rows in zip(*pairs, strict=True))
    name = kind if len(pairs) > 1 else next(row.path for row in pairs[0] if row)
    return Difference(name, len(pairs), _sum(rows_a), _sum(rows_b))


def _sum(rows: list[TensorRow]) -> Outcome | None:
    if not rows:
        return None
    worst = min((row.sqnr_db for row in rows if row.sqnr_db is not None), default=None)
    return Outcome(rows[0].stored_as, sum(row.output_nbytes for row in rows), worst)


def _options(a: Iterable[ConvertedComponent], b: Iterable[ConvertedComponent]) -> dict[str, tuple[Any, Any]]:
    recipes_b = {component.name: component.manifest.recipe for component in b}
    different = {}
    for component in a:
        recipe_a, recipe_b = component.manifest.recipe, recipes_b.get(component.name, {})
        different.update(
            {
                key: (recipe_a.get(key), recipe_b.get(key))
                for key in [*recipe_a, *(key for key in recipe_b if key not in recipe_a)]
                if recipe_a.get(key) != recipe_b.get(key)
            }
        )
    return different
