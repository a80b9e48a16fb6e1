"""torchao's safetensors: weights taken apart into tensors, and what they were in the file's metadata.

Source: torchao 0.18, prototype/safetensors, and the classes that it takes apart.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.foreign import ForeignTensors, read_layer
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.source_formats import WEIGHT_OFFSET, int8_layer
from run_ckpt.contract.tensors import TensorSpec

TORCHAO = "torchao"
_NAMES_KEY = "tensor_names"
# What a class calls its tensors -> their roles.
_ROLES = {"qdata": WEIGHT, "scale": WEIGHT_SCALE, "per_tensor_scale": TENSOR_SCALE, "zero_point": WEIGHT_OFFSET}
# Of activations: no part of a weight, but for the first, by which its columns were divided.
_SMOOTHING, _OF_ACTIVATIONS = "act_pre_scale", ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")
_INT8 = "Int8Tensor"
_READ = ("Float8Tensor", "MXTensor", "NVFP4Tensor", _INT8)
_PLAIN = "Tensor"


def is_torchao(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata of a file says that torchao took its tensors apart."""
    return _NAMES_KEY in metadata


def read_torchao(metadata: Mapping[str, str], specs: Mapping[str, TensorSpec], source_dtype: str) -> ForeignTensors:
    """Return what the tensors of a checkpoint are, given the metadata of all its files.

    source_dtype: of the weights that they stand for. Raises FaultsError with a sentence for each that can't be read.
    """
    layers: dict[str, Layer] = {}
    faults = []
    for name, text in sorted(metadata.items()):
        if not text.startswith("{") or name == _NAMES_KEY:
            continue
        try:
            if layer := _read(name, json.loads(text), specs):
                layers[layer.module] = replace(layer, source_tensor=name, source_dtype=source_dtype)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            faults.append(f"{name}: its metadata is damaged ({error!r}). Fetch the checkpoint again.")
        except ValueError as error:
            faults.append(f"{name}: {error}.")
    unused = frozenset(name for name in specs if name.endswith(tuple(f"_{part}" for part in _OF_ACTIVATIONS)))
    used = unused.union(*(layer.tensors.values() for layer in layers.values()))
    faults += [
        f"{name}: belongs to no weight that is known." for name in specs if "._weight_" in name and name not in used
    ]
    if faults or not layers:
        raise FaultsError("the quantized weights can't be read", faults or ["there is none among the tensors."])
    return ForeignTensors(layers, unused)


def _read(name: str, entry: dict[str, Any], specs: Mapping[str, TensorSpec]) -> Layer | None:
    """Raises ValueError where a weight can't be read, and as damaged JSON does."""
    kind = entry["_type"]
    if kind == _PLAIN:
        return None
    if kind not in _READ:
        raise ValueError(f"{kind} is not read here, as torchao's kernels have its codes in an order of their own")
    if entry["_data"].get("is_swizzled_scales"):
        raise ValueError(f"{kind} with scales in tiles is not read here")
    module, _, leaf = name.rpartition(".")
    parts = {part: f"{module}._{leaf}_{part}" for part in entry["_tensor_data_names"]}
    if missing := [stored for stored in parts.values() if stored not in specs]:
        raise ValueError(f"lacks {missing[0]}")
    if _SMOOTHING in parts:
        raise ValueError("its inputs are scaled by channel (SmoothQuant). It can't be read")
    if unknown := sorted(parts.keys() - {*_ROLES, *_OF_ACTIVATIONS}):
        raise ValueError(f"{kind} with {unknown[0]}, which is not known here")
    tensors = {role: parts[part] for part, role in _ROLES.items() if part in parts}
    if leaf != "weight" or not {WEIGHT, WEIGHT_SCALE} <= tensors.keys():
        raise ValueError(f"{kind} of {', '.join(parts)} is no weight with a scale")
    if kind == _INT8:
        return replace(int8_layer(tensors, specs, "BF16"), module=module)
    if WEIGHT_OFFSET in tensors:
        raise ValueError(f"{kind} with zero points")
    return read_layer(module, tensors, specs, PLAIN)
