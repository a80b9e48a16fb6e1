"""msModelSlim's exports: quant_model_description.json says of each tensor what it is.

Source: what loads them in SGLang 0.5.23, multimodal_gen/runtime/layers/quantization/modelslim*.py,
srt/layers/quantization/modelslim and multimodal_gen/tools/wan_repack.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.foreign import ForeignTensors, read_layer
from run_ckpt.contract.formats import MXFP8
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.source_formats import WEIGHT_OFFSET, int8_layer
from run_ckpt.contract.tensors import TensorSpec

MODELSLIM = "msModelSlim"
_PLAIN = "FLOAT"
# What is said of a weight -> why that can't be had exactly.
_REFUSED = {
    "W8A8": "its bias is folded into integers (quant_bias). Export it as W8A8_DYNAMIC",
    "W4A4_DYNAMIC": "its weights are rotated or packed in an order that nothing here says",
    "W4A4_MXFP4": "nothing says in which order its 4 bit codes lie",
    "W4A4_MXFP4_DUALSCALE": "nothing says in which order its 4 bit codes lie",
}
# Beside a weight, what makes it another one than its codes and scales say.
_SMOOTHED = ("div.mul_scale", "mul_scale")


def read_modelslim(
    description: Mapping[str, Any], specs: Mapping[str, TensorSpec], source_dtype: str
) -> ForeignTensors:
    """Return what the tensors of an export are. source_dtype: of the weights that they stand for.

    Raises FaultsError with a sentence for each weight that can't be read.
    """
    layers: dict[str, Layer] = {}
    faults = []
    for name in sorted(specs):
        kind, module = str(description.get(name, _PLAIN)), name.removesuffix(".weight")
        if kind == _PLAIN or name == module:
            continue
        smoothed = [end for end in _SMOOTHED if f"{module.removesuffix('.linear')}.{end}" in specs]
        tensors = {WEIGHT: name, WEIGHT_SCALE: f"{module}.{WEIGHT_SCALE}"}
        if f"{module}.{WEIGHT_OFFSET}" in specs:
            tensors[WEIGHT_OFFSET] = f"{module}.{WEIGHT_OFFSET}"
        if kind not in _READERS:
            faults.append(f"{name}: {kind}: {_REFUSED.get(kind, 'is not known here')}.")
        elif smoothed:
            faults.append(f"{name}: its inputs are scaled by channel ({smoothed[0]}). It can't be read.")
        elif tensors[WEIGHT_SCALE] not in specs:
            faults.append(f"{name}: no {tensors[WEIGHT_SCALE]}. Fetch the checkpoint again.")
        else:
            try:
                layers[module] = _READERS[kind](tensors, specs, source_dtype)
            except ValueError as error:
                faults.append(f"{name}: {error}.")
    if faults or not layers:
        raise FaultsError("the quantized weights can't be read", faults or ["there is none among the tensors."])
    return ForeignTensors(layers)


def _mxfp8_layer(tensors: dict[str, str], specs: Mapping[str, TensorSpec], source_dtype: str) -> Layer:
    layer = read_layer(tensors[WEIGHT].removesuffix(".weight"), tensors, specs, PLAIN)
    if layer.format != MXFP8 or WEIGHT_OFFSET in tensors:
        raise ValueError(f"{specs[tensors[WEIGHT_SCALE]].dtype} scales, which are no MXFP8")
    return replace(layer, source_dtype=source_dtype)


_READERS = {"W8A8_DYNAMIC": int8_layer, "W8A8_MXFP8": _mxfp8_layer}
