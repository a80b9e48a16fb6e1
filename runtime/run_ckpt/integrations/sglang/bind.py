"""Give each linear of a new SGLang model what the manifest says: its method, its parameters, its share of a rank."""

from collections.abc import Mapping
from functools import partial

import torch
from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger
from torch import Tensor, nn

from run_ckpt.backends.backend import Device, describe_device
from run_ckpt.backends.choose import Choice
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.manifest import Manifest
from run_ckpt.integrations.serving.backend import choose, summarize
from run_ckpt.integrations.serving.share import Share, Target, cut_evenly
from run_ckpt.integrations.sglang.config import PendingLinearMethod
from run_ckpt.integrations.sglang.method import PlainLinear, QuantizedLinearMethod
from run_ckpt.integrations.sglang.targets import Rename, find_targets, rename_tensors
from run_ckpt.storage.rows import STORED_DTYPES

logger = init_logger(__name__)


def bind(model: nn.Module, manifest: Manifest, rename: Rename) -> Rename:
    """Prepare a model on the meta device for its checkpoint, and return the map of names to load it with.

    rename: SGLang's own map for this model. Linears that the manifest does not list become
    unquantized ones. Raises FaultsError with every layer that the model has no linear for.
    """
    _refuse_fsdp(model)
    names = {name for name, _ in model.named_parameters()}
    targets = find_targets(manifest, _as_loaded(rename, names))
    device = describe_device(get_local_torch_device())
    modules = dict(model.named_modules())
    faults, choices = [], []
    for target in targets.values():
        try:
            choices.append(_install(_linear(modules, target), target, device))
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise FaultsError("SGLang can't hold the quantized layers of this checkpoint", faults)
    for module in modules.values():
        if isinstance(module, LinearBase) and isinstance(module.quant_method, PendingLinearMethod):
            module.quant_method = UnquantizedLinearMethod()
    logger.info("convert-ckpt: %s", summarize(choices, device))
    return rename_tensors(manifest, targets, rename)


def _as_loaded(rename: Rename, names: set[str]) -> Rename:
    """SGLang keeps a name that the model has where its map leads to one that the model lacks."""
    return lambda name: (name, None, None) if name in names and rename(name)[0] not in names else rename(name)


def _linear(modules: Mapping[str, nn.Module], target: Target) -> LinearBase:
    module = modules.get(target.module)
    if type(module) is nn.Linear:
        parent, _, leaf = target.module.rpartition(".")
        linear = PlainLinear(module)
        setattr(modules[parent], leaf, linear)
        return _of_size(linear, target)
    members = ", ".join(layer.module for layer in target.layers)
    if not isinstance(module, LinearBase) or not isinstance(module.quant_method, PendingLinearMethod):
        kind = "has no such module" if module is None else f"builds it as a {type(module).__name__}"
        raise CheckpointError(
            f"{members}: SGLang {kind} ({target.module}), which can't be quantized."
            " Convert again and keep it (convert-ckpt --ignore)."
        )
    return _of_size(module, target)


def _of_size(linear: LinearBase, target: Target) -> LinearBase:
    if (linear.output_size, linear.input_size) != (target.N, target.K):
        raise CheckpointError(
            f"{target.module}: [N, K] is [{target.N}, {target.K}] in the checkpoint, [{linear.output_size},"
            f" {linear.input_size}] in SGLang. Is this checkpoint for this model?"
        )
    return linear


def _install(linear: LinearBase, target: Target, device: Device) -> Choice:
    """Replace the placeholder by the parameters of this rank; return which backend will multiply."""
    share = _share_of(linear, target)
    layer = share.layer()
    choice = choose(layer, device)
    for role, spec in layer.specs().items():
        empty = torch.empty(spec.shape, dtype=STORED_DTYPES[spec.dtype], device="meta")
        parameter = nn.Parameter(empty, requires_grad=False)
        parameter.weight_loader = partial(_load, share, role)  # type: ignore[attr-defined]
        # A missing scale becomes 1.0 in SGLang unless the parameter says otherwise.
        parameter.missing_param_init = "error"  # type: ignore[attr-defined]
        parameter.checkpoint_mapping_unsafe = True  # type: ignore[attr-defined]
        linear.register_parameter(role, parameter)
    linear.quant_method = QuantizedLinearMethod(layer, choice)
    return choice


def _share_of(linear: LinearBase, target: Target) -> Share:
    if isinstance(linear, RowParallelLinear):
        sizes = linear.input_sizes or [linear.input_size]
        return Share(target, columns=cut_evenly(sizes, linear.tp_rank, linear.tp_size))
    if isinstance(linear, ColumnParallelLinear):
        sizes = getattr(linear, "output_sizes", [linear.output_size])
        return Share(target, rows=cut_evenly(sizes, linear.tp_rank, linear.tp_size))
    return Share(target)


def _load(share: Share, role: str, parameter: Tensor, loaded: Tensor) -> None:
    """SGLang's weight_loader: ``loaded`` holds the tensors of all members, one below the other."""
    tensor = share.take(role, loaded)
    assert parameter.shape == tensor.shape, (parameter.shape, tensor.shape)
    parameter.data.copy_(tensor)


def _refuse_fsdp(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise CheckpointError(
            "FSDP can't shard a quantized checkpoint of convert-ckpt. Start SGLang without --use-fsdp-inference;"
            " --tp-size shards it."
        )
