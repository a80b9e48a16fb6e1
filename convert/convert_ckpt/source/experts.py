"""Experts that a source holds in 3-D tensors, as one weight for each expert and projection: what servers quantize."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convert_ckpt.source.original import Translation
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.views import Rows, View, all_rows, make_view

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_FUSED = re.compile(rf"(?P<experts>.+\.experts)\.({GATE_UP}|{DOWN})")


def separate_experts(views: Iterable[View], config: dict[str, Any] | None) -> Translation | None:
    """Return the checkpoint with a weight [N, K] for each expert and projection, None where no experts are fused.

    Fused are [experts, 2 N, K] with [experts, K, N], or both transposed (Llama 4, Qwen3-VL): the shapes tell.
    Transposed ones with biases, whose gate and up are interleaved (gpt-oss), become one weight, all experts one below
    the other, as servers read these.
    """
    whole = {view.spec.name: view for view in views}
    specs = {name: view.spec for name, view in whole.items()}
    parts: dict[str, dict[str, list[Rows]]] = {
        name: dict(_cut(match["experts"], name, specs)) for name in specs if (match := _FUSED.fullmatch(name))
    }
    parts = {name: weights for name, weights in parts.items() if weights}
    if not parts:
        return None
    separate: list[View] = []
    for name, view in whole.items():
        weights = parts.get(name) or {name: [all_rows(view)]}
        separate += [make_view(weight, rows, whole) for weight, rows in weights.items()]
    separate.sort(key=lambda view: (view.shard, view.offset))
    n_weights = sum(map(len, parts.values()))
    note = f"{len(parts)} tensors of fused experts are read as {n_weights} weights"
    return Translation(tuple(separate), config or {}, (), note)


def _cut(experts: str, name: str, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, list[Rows]]]:
    """Yield the weights that a tensor holds; none where it and its partner are no experts."""
    gate_up, down = (specs.get(f"{experts}.{leaf}") for leaf in (GATE_UP, DOWN))
    if not (gate_up and down and len(gate_up.shape) == len(down.shape) == 3 and gate_up.shape[0] == down.shape[0]):
        return
    (n_experts, *upper), lower = gate_up.shape, list(down.shape[1:])
    if upper == [2 * lower[1], lower[0]]:
        step, n_inner, n_outer = None, lower[1], lower[0]
    elif upper == [lower[1], 2 * lower[0]]:
        step, n_inner, n_outer = 1, lower[0], lower[1]
    else:
        return
    if f"{name}_bias" in specs:
        n_columns = specs[name].shape[2]
        if step:
            yield f"{name}.weight", [Rows(name, 0, n_columns, number, step) for number in range(n_experts)]
        return
    for number in range(n_experts):
        weight = f"{experts}.{number}."
        if name.endswith(GATE_UP):
            yield f"{weight}gate_proj.weight", [Rows(name, 0, n_inner, number, step)]
            yield f"{weight}up_proj.weight", [Rows(name, n_inner, 2 * n_inner, number, step)]
        else:
            yield f"{weight}{DOWN}.weight", [Rows(name, 0, n_outer, number, step)]
