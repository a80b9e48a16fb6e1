"""Experts whose codes are stored one below the other (gpt-oss), as a layer for each; and stored so again."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.contract.formats import MX_BLOCK_SIZE
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, KeptTensor, Layer
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.views import View

# What a layer of one expert calls its tensors -> how those of all are called in a checkpoint of gpt-oss.
_STACKED = {WEIGHT: "_blocks", WEIGHT_SCALE: "_scales", "bias": "_bias"}


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a layer EXPERTS.NUMBER.NAME, weight [N, K], for each expert of those in one tensor.

    Each is a part of that tensor's bytes, and so is its bias.
    """
    stacked = [layer for layer in checkpoint.manifest.layers.values() if layer.n_stacked]
    if not stacked:
        return checkpoint
    layers, kept = dict(checkpoint.manifest.layers), dict(checkpoint.manifest.kept)
    views = {spec.name: checkpoint.reader.view(spec.name) for spec in checkpoint.reader.specs()}
    for layer in stacked:
        del layers[layer.module]
        experts = list(_layers(layer))
        layers |= {each.module: each for each in experts}
        for role, name in layer.tensors.items():
            views |= _cut(views.pop(name), [each.tensors[role] for each in experts], experts[0].specs()[role].shape)
        bias = kept.get(f"{layer.module}_bias")
        if bias and bias.spec.shape[:1] == (layer.n_stacked,):
            del kept[bias.spec.name]
            cut = _cut(views.pop(bias.spec.name), [f"{each.module}.bias" for each in experts], bias.spec.shape[1:])
            views |= cut
            kept |= {name: KeptTensor(view.spec, bias.reason, bias.decided_by) for name, view in cut.items()}
    manifest = replace(checkpoint.manifest, layers=layers, kept=kept)
    return replace(checkpoint, manifest=manifest, reader=checkpoint.reader.seen_as(views.values()))


def _layers(layer: Layer) -> Iterator[Layer]:
    """Yield the layers of single experts."""
    assert layer.n_stacked
    experts, _, leaf = layer.module.rpartition(".")
    rows, columns = layer.N // layer.n_stacked, layer.scale_shape[-1]
    for number in range(layer.n_stacked):
        module = f"{experts}.{number}.{leaf}"
        tensors = {role: f"{module}.{role}" for role in layer.tensors}
        yield replace(layer, module=module, N=rows, tensors=tensors, scale_shape=(rows, columns), n_stacked=None)


def _cut(view: View, names: list[str], shape: tuple[int, ...]) -> dict[str, View]:
    """Return views of as many equal parts of a tensor, one behind the other."""
    each = view.nbytes // len(names)
    return {
        name: View(TensorSpec(name, view.spec.dtype, shape), view.shard, view.offset + i * each, each)
        for i, name in enumerate(names)
    }


def stack_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Mapping[str, Any]) -> None:
    """Put the tensors of all experts of ``module`` into one each, as on disk: a hook of state_dict, which copies them.

    Its children are the experts, "0", "1", ..., and theirs the linears.
    """
    experts = dict(module.named_children())
    for leaf, _linear in next(iter(experts.values())).named_children():
        for suffix, stored in _STACKED.items():
            names = [f"{prefix}{number}.{leaf}.{suffix}" for number in experts]
            if all(name in state for name in names):
                state[f"{prefix}{leaf}{stored}"] = _stack([state.pop(name) for name in names], suffix)


def _stack(parts: list[Tensor], suffix: str) -> Tensor:
    stacked = torch.stack(parts)
    return stacked.reshape(*stacked.shape[:-1], -1, MX_BLOCK_SIZE // 2) if suffix == WEIGHT else stacked
