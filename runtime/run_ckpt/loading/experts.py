"""Experts as linear layers of their own, where transformers 5 holds those of a block in 3-D parameters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError

# An expert's linear in a checkpoint. (gate, up, down) are called either way; some classes have no gate.
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<linear>(gate|up|down)_proj|w[123])")
_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class SeparateExperts(nn.Module):
    """What stands in place of ``fused``, a module of transformers with all experts of a block in 3-D parameters.

    Its children are "0", "1", ..., each with linears [N, K] without bias, called as in the checkpoint; on the meta
    device at first. They run one after the other: each expert sees the tokens that were sent to it.

    spelling: names of gate, up and down.
    """

    def __init__(self, fused: nn.Module, spelling: tuple[str, str, str]):
        super().__init__()
        self._has_gate = "gate_up_proj" in fused._parameters
        self._is_interleaved = not getattr(fused, "is_concatenated", True)
        act_fn: Any = fused.act_fn
        gate = getattr(fused, "_apply_gate", None) or _Gate(act_fn)
        self._activate: Callable[[Tensor], Tensor] = gate if self._has_gate else act_fn
        self._spelling = spelling
        self.n_experts, hidden, inner, dtype = _sizes(fused)
        for number in range(self.n_experts):
            expert = nn.Module()
            for name in spelling[:2] if self._has_gate else spelling[1:2]:
                expert.add_module(name, _empty_linear(inner, hidden, dtype))
            expert.add_module(spelling[2], _empty_linear(hidden, inner, dtype))
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states [tokens, hidden], top_k_* [tokens, k] -> [tokens, hidden], as transformers' eager experts do.

        Without top_k_*: [experts * tokens, hidden], the tokens of each expert one below the other (Llama 4).
        """
        if top_k_index is None or top_k_weights is None:
            parts = hidden_states.reshape(self.n_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._run(number, part) for number, part in enumerate(parts)])
        output = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            token, choice = torch.where(top_k_index == number)
            weighted = self._run(number, hidden_states[token]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    def _run(self, number: int, x: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        gate, up, down = self._spelling
        inner = getattr(expert, up)(x)
        if self._has_gate:
            pair = (getattr(expert, gate)(x), inner)
            inner = torch.stack(pair, -1).flatten(-2) if self._is_interleaved else torch.cat(pair, -1)
        return getattr(expert, down)(self._activate(inner))  # type: ignore[no-any-return]


class _Gate(nn.Module):
    """x [..., 2 N] -> activation(first half) * second half [..., N]."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return up * self._activation(gate)  # type: ignore[no-any-return]


def separate_experts(model: nn.Module, linears: Iterable[str]) -> bool:
    """Put SeparateExperts in place of all fused experts of ``model`` where a checkpoint holds experts one by one.

    linears: the names of its linears, as ``model`` would call them. Return whether anything was replaced.
    Raises CheckpointError where the model has experts that can't be taken apart.
    """
    modules = dict(model.named_modules())
    found = next((match for name in linears if (match := _missing_expert(name, modules))), None)
    if found is None:
        return False
    if not _is_fused(experts := modules[found["experts"]]):
        raise CheckpointError(
            f"{found['experts']}: a {type(experts).__name__}, whose experts are more than two or three linear layers."
            " Such are not run here: run-ckpt dequantize writes a checkpoint that transformers loads."
        )
    spelling = next(spelling for spelling in _SPELLINGS if found["linear"] in spelling)
    for name, fused in modules.items():
        if _is_fused(fused):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SeparateExperts(fused, spelling).train(fused.training))
    return True


def _missing_expert(name: str, modules: Mapping[str, nn.Module]) -> re.Match[str] | None:
    """Return the match of an expert's linear that ``modules`` lack though they have its experts."""
    match = _EXPERT.fullmatch(name)
    return match if match and name not in modules and match["experts"] in modules else None


def _is_fused(module: nn.Module) -> bool:
    """True for experts in 3-D parameters that are no more than two or three linears each."""
    down = module._parameters.get("down_proj")
    extras = module._parameters.keys() - {"gate_up_proj", "up_proj", "down_proj"}
    is_known = _is_llama4(module) or (hasattr(module, "is_transposed") and not module.has_post_expert_norm)
    return is_known and down is not None and down.dim() == 3 and not extras


def _is_llama4(fused: nn.Module) -> bool:
    """True for the one class that runs all experts on all tokens, by code of its own."""
    return type(fused).__name__ == "Llama4TextExperts"


def _sizes(fused: nn.Module) -> tuple[int, int, int, torch.dtype]:
    """Return the number of experts, hidden size, inner size, dtype."""
    down = fused.get_parameter("down_proj")
    n_experts, rows, columns = down.shape
    is_transposed = _is_llama4(fused) or fused.is_transposed
    hidden, inner = (columns, rows) if is_transposed else (rows, columns)
    return n_experts, hidden, inner, down.dtype


def _empty_linear(N: int, K: int, dtype: torch.dtype) -> nn.Linear:
    # nn.Linear's own numbers are not wanted: drawing them takes most of its time, even on meta.
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, K, N, bias=False, dtype=dtype, device="meta")  # type: ignore[no-untyped-call]
    return linear
