"""vLLM's linear methods for our checkpoints: one that collects a linear's tensors, and one that multiplies."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from run_ckpt.backends.backend import describe_device
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.foreign import read_layer
from run_ckpt.contract.layouts import Layout
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.integrations.serving.backend import choose
from run_ckpt.integrations.serving.method import BackendProduct
from run_ckpt.integrations.serving.share import Share, Target, cut_evenly
from run_ckpt.storage.rows import STORED_DTYPES, TORCH_DTYPES

# What a fused linear calls the tensors of its parts; None is the one of a linear that is not fused.
ShardId = str | int | None
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class LoadingMethod(LinearMethodBase):  # type: ignore[misc]
    """Takes the tensors of one linear as they come, and gives way to what they make of it.

    Codes with their scales, of all parts that are fused: a QuantizedLinearMethod for this rank's share. Weights in
    BF16: vLLM's own method, to which they are handed on.
    """

    def __init__(self, layout: Layout, suffixes: Mapping[str, str], name: str):
        self._layout, self._suffixes, self._name = layout, suffixes, name
        self._parts: dict[ShardId, dict[str, Tensor]] = {}

    def create_weights(self, layer: nn.Module, *args: Any, **options: Any) -> None:
        """Register empty parameters, under which the models' maps of names find this linear."""
        self._plain_arguments = args, options
        for role, suffix in self._suffixes.items():
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self._load, layer, role)  # type: ignore[attr-defined]
            parameter.output_dim = 0  # type: ignore[attr-defined]
            layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        found = {shard: sorted(part) for shard, part in self._parts.items()}
        raise CheckpointError(
            f"{self._name}: needs {sorted(self._suffixes)} of each of its parts {_shards(layer)}, found"
            f" {found or 'nothing'}. Fetch the checkpoint again, or convert it with one rule for all parts."
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise AssertionError("nothing was loaded")

    def _load(self, layer: LinearBase, role: str, parameter: Tensor, loaded: Tensor, shard: ShardId = None) -> None:
        """vLLM's weight_loader. shard: which of the tensors fused here ``loaded`` belongs to.

        Some loaders of vLLM say it beside ``loaded``, others in it.
        """
        shard = getattr(loaded, "shard_id", shard)
        if role == WEIGHT and loaded.dtype in TORCH_DTYPES.values():
            self._load_plain(layer, parameter.device, loaded, *(() if shard is None else (shard,)))
            return
        if layer.quant_method is not self:
            raise CheckpointError(self._mixed())
        self._parts.setdefault(shard, {})[role] = loaded
        wanted = _shards(layer) if shard is not None else (None,)
        if all(self._parts.get(part, {}).keys() == self._suffixes.keys() for part in wanted):
            self._finish(layer, [self._parts[part] for part in wanted], parameter.device)

    def _load_plain(self, layer: LinearBase, device: torch.device, loaded: Tensor, *shard: ShardId) -> None:
        if self._parts:
            raise CheckpointError(self._mixed())
        if layer.quant_method is self:
            self._remove_parameters(layer)
            layer.quant_method = UnquantizedLinearMethod()
            args, options = self._plain_arguments
            with device:
                layer.quant_method.create_weights(layer, *args, **options)
        layer.weight.weight_loader(layer.weight, loaded, *shard)

    def _finish(self, layer: LinearBase, parts: list[dict[str, Tensor]], device: torch.device) -> None:
        """Give the linear this rank's share of its tensors, and its method."""
        target = Target(self._name, tuple(self._read(part) for part in parts))
        N = sum(_output_sizes(layer))
        if (N, layer.input_size) != (target.N, target.K):
            raise CheckpointError(
                f"{self._name}: [N, K] is [{target.N}, {target.K}], vLLM's is [{N}, {layer.input_size}]. Is this"
                " checkpoint for this model?"
            )
        share = _share_of(layer, target)
        kept = share.layer()
        self._remove_parameters(layer)
        for role in kept.tensors:
            tensor = share.take(role, torch.cat([part[role] for part in parts]))
            layer.register_parameter(role, nn.Parameter(tensor.to(device), requires_grad=False))
        layer.quant_method = QuantizedLinearMethod(kept, choose(kept, describe_device(device)))
        # The loader still holds the parameters that were removed, and by them these tensors.
        self._parts = {}

    def _read(self, part: Mapping[str, Tensor]) -> Layer:
        specs = {role: TensorSpec(role, _NAMES[tensor.dtype], tuple(tensor.shape)) for role, tensor in part.items()}
        try:
            return read_layer(self._name, {role: role for role in part}, specs, self._layout)
        except ValueError as error:
            raise CheckpointError(f"{self._name}: {error}.") from error

    def _mixed(self) -> str:
        fix = "Convert again with a rule that treats them alike."
        return f"{self._name}: fused of quantized and unquantized tensors. {fix}"

    def _remove_parameters(self, layer: nn.Module) -> None:
        for suffix in self._suffixes.values():
            delattr(layer, suffix)


class QuantizedLinearMethod(BackendProduct, LinearMethodBase):  # type: ignore[misc]
    """Multiplies what LoadingMethod put into the linear."""

    def create_weights(self, *args: Any, **options: Any) -> None:
        raise AssertionError("LoadingMethod makes the parameters")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.prepare(layer, layer.get_parameter(WEIGHT).device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.multiply(layer, x, bias)


def _shards(layer: nn.Module) -> tuple[ShardId, ...]:
    if isinstance(layer, QKVParallelLinear):
        return ("q", "k", "v")
    if isinstance(layer, MergedColumnParallelLinear):
        return tuple(range(len(layer.output_sizes)))
    return (None,)


def _share_of(layer: LinearBase, target: Target) -> Share:
    if isinstance(layer, RowParallelLinear):
        return Share(target, columns=cut_evenly([layer.input_size], layer.tp_rank, layer.tp_size))
    if isinstance(layer, ColumnParallelLinear):
        sizes = _output_sizes(layer)
        n_copies = [1, *[_n_holders(layer)] * (len(sizes) - 1)]
        return Share(target, rows=cut_evenly(sizes, layer.tp_rank, layer.tp_size, n_copies))
    return Share(target)


def _output_sizes(layer: LinearBase) -> list[int]:
    """Return N of each part of the whole linear. vLLM counts heads of k and v once for each rank that holds them."""
    query, *others = getattr(layer, "output_sizes", [layer.output_size])
    return [query, *(size // _n_holders(layer) for size in others)]


def _n_holders(layer: LinearBase) -> int:
    """Return how many ranks hold the same heads of k and v, where there are fewer of them than ranks."""
    return getattr(layer, "num_kv_head_replicas", 1)
