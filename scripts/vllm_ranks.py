"""The ranks of vLLM 0.30.0, emulated one after the other in one process: what each holds of our plug-in's linears.

vLLM's tensor parallel group is told its size and rank; its construction of the model, its loader and
process_weights_after_loading are its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from check_sglang import join_ranks
from torch import nn


def read_joined(config: Any, n_ranks: int) -> dict[str, torch.Tensor]:
    """Return name -> weight [N, K] of each linear that the plug-in holds, its ranks' parts joined.

    config: vLLM's own for a model that it has loaded here.
    """
    ranks = [_load(config, rank, n_ranks) for rank in range(n_ranks)]
    return {name: join_ranks([rank[name] for rank in ranks], [read(rank[name]) for rank in ranks]) for name in ranks[0]}


def read(linear: nn.Module) -> torch.Tensor:
    """Return the weight [N, K] that a linear multiplies by, in BF16."""
    identity = torch.eye(linear.input_size_per_partition if hasattr(linear, "tp_rank") else linear.input_size)
    with torch.no_grad():
        weight: torch.Tensor = linear.quant_method.apply(linear, identity.bfloat16(), None).t().contiguous()
    return weight


def is_ours(module: nn.Module) -> bool:
    """Return whether a module is a linear that the plug-in holds."""
    return type(getattr(module, "quant_method", None)).__module__.startswith("run_ckpt.")


def _load(config: Any, rank: int, n_ranks: int) -> dict[str, nn.Module]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    # The model that was loaded before has layers of these names.
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), as_rank(rank, n_ranks):
        model = get_model(vllm_config=config)
    return {name: module for name, module in model.named_modules() if is_ours(module)}


@contextmanager
def as_rank(rank: int, n_ranks: int) -> Iterator[None]:
    """Tell vLLM's tensor parallel group its size and rank for a while."""
    from vllm.distributed import parallel_state

    group = parallel_state.get_tp_group()
    before = group.world_size, group.rank_in_group
    group.world_size, group.rank_in_group = n_ranks, rank
    try:
        yield
    finally:
        group.world_size, group.rank_in_group = before
