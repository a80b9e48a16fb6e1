"""Experts as linear layers of their own, where transformers 5 holds those of a block in 3-D parameters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.loading.stacked import stack_state

# An expert's linear in a checkpoint. (gate, up, down) are called either way, some classes have no gate; of gpt-oss
# gate and up are one, see stacked.py.
_EXPERT = re.compile(r"(?P<expert>(?P<experts>.+)\.\d+)\.(gate_up|gate|up|down|w[123])(_proj)?")
_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"))


class SeparateExperts(nn.Module):
    """What stands in place of ``fused``, a module of transformers with all experts of a block in 3-D parameters.

    Its children are "0", "1", ..., each with linears [N, K], called as in the checkpoint; on the meta device at first.
    They run one after the other: each expert sees the tokens that were sent to it.

    spelling: names of gate, up and down; or, with biases, of gate and up together and down.
    """

    def __init__(self, fused: nn.Module, spelling: tuple[str, ...]):
        super().__init__()
        has_gate, is_joint = "gate_up_proj" in fused._parameters, len(spelling) == 2
        # Where one linear gives both, gate and up come as the class wants them.
        self._is_interleaved = not (is_joint or getattr(fused, "is_concatenated", True))
        own: Any = getattr(fused, "_apply_gate", None)
        act_fn: Any = fused.act_fn if own is None or not has_gate else None
        self._activate: Callable[[Tensor], Tensor] = (own or _Gate(act_fn)) if has_gate else act_fn
        self._inner, self._down = spelling[:-1] if has_gate else spelling[-2:-1], spelling[-1]
        self.n_experts, hidden, inner, dtype = _sizes(fused)
        for number in range(self.n_experts):
            expert = nn.Module()
            for name in self._inner:
                expert.add_module(name, _empty_linear(2 * inner if is_joint else inner, hidden, dtype, is_joint))
            expert.add_module(self._down, _empty_linear(hidden, inner, dtype, is_joint))
            self.add_module(str(number), expert)
        if is_joint:
            self.register_state_dict_post_hook(stack_state)  # type: ignore[no-untyped-call]

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
        parts = [getattr(expert, name)(x) for name in self._inner]
        inner = torch.stack(parts, -1).flatten(-2) if self._is_interleaved else torch.cat(parts, -1)
        return getattr(expert, self._down)(self._activate(inner))  # type: ignore[no-any-return]


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
    modules, linears = dict(model.named_modules()), dict.fromkeys(linears)
    found = next((match for name in linears if (match := _missing_expert(name, modules))), None)
    if found is None:
        return False
    spelling = next((known for known in _SPELLINGS if f"{found['expert']}.{known[-2]}" in linears), ())
    if not _is_fused(experts := modules[found["experts"]], spelling):
        raise CheckpointError(
            f"{found['experts']}: a {type(experts).__name__}, whose experts are more than two or three linear layers."
            " Such are not run here: run-ckpt dequantize writes a checkpoint that transformers loads."
        )
    for name, fused in modules.items():
        if _is_fused(fused, spelling):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SeparateExperts(fused, spelling).train(fused.training))
    return True


def _missing_expert(name: str, modules: Mapping[str, nn.Module]) -> re.Match[str] | None:
    """Return the match of an expert's linear that ``modules`` lack though they have its experts."""
    match = _EXPERT.fullmatch(name)
    return match if match and name not in modules and match["experts"] in modules else None


def _is_fused(module: nn.Module, spelling: tuple[str, ...]) -> bool:
    """True for experts in 3-D parameters that are no more than linears called so, each."""
    down = module._parameters.get("down_proj")
    biases = {"gate_up_proj_bias", "down_proj_bias"} if len(spelling) == 2 else set()
    extras = module._parameters.keys() - {"gate_up_proj", "up_proj", "down_proj", *biases}
    is_known = _is_llama4(module) or (hasattr(module, "is_transposed") and not module.has_post_expert_norm)
    has_all = len(spelling) > 0 and biases <= module._parameters.keys()
    return is_known and has_all and down is not None and down.dim() == 3 and not extras


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


def _empty_linear(N: int, K: int, dtype: torch.dtype, has_bias: bool) -> nn.Linear:
    # nn.Linear's own numbers are not wanted: drawing them takes most of its time, even on meta.
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, K, N, bias=has_bias, dtype=dtype, device="meta")  # type: ignore[no-untyped-call]
    return linear
