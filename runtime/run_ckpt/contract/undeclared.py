"""FP8 that no quantization_config declares: ComfyUI's files with scales, and casts of a whole model without any.

Source: ComfyUI, comfy/utils.py (convert_old_quants), QUANTIZATION.md, and comfy-kitchen 0.2.40, tensor/fp8.py.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.foreign import BEYOND, SCALE_SUFFIXES, ForeignTensors, read_layer
from run_ckpt.contract.formats import E4M3, F32, TENSOR_FP8
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import INPUT_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.source_formats import COMFY_MARK, E5M2, FP8_E5M2, UNKNOWN_RULE, blocked_layer, int8_layer
from run_ckpt.contract.tensors import TensorSpec

COMFYUI, CAST = "ComfyUI", "a cast to FP8"
# ComfyUI's older names; its newer ones are those of ModelOpt.
_SCALE_WEIGHT, _SCALE_INPUT = ".scale_weight", ".scale_input"
# Says of a whole file that it has such scales.
_FILE_MARK = "scaled_fp8"
_CASTS = {E4M3.dtype: TENSOR_FP8, E5M2.dtype: FP8_E5M2.scheme()}
_SCALES = (*SCALE_SUFFIXES, _SCALE_WEIGHT)
_INPUT_SCALES = (f".{INPUT_SCALE}", _SCALE_INPUT)
# How names of tensors end -> what other tools' codes are that names, dtypes and shapes don't say all of.
_UNREAD = {
    ".qzeros": "integers with zero points, packed in the order of their kernels (AWQ, GPTQ)",
    ".absmax": "codebooks (bitsandbytes)",
}
# What may lie beside a weight that has no scale.
_PLAIN_LEAVES = {"weight", "bias", COMFY_MARK, _FILE_MARK, INPUT_SCALE, "scale_input"}


def is_undeclared(specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether tensors are FP8, or named as ComfyUI and other tools name what they quantized."""
    ends = (f".{COMFY_MARK}", *_UNREAD)
    return any(spec.dtype in _CASTS or name.endswith(ends) for name, spec in specs.items())


def read_undeclared(specs: Mapping[str, TensorSpec], source_dtype: str) -> tuple[str, ForeignTensors]:
    """Return what quantized a checkpoint, and what its tensors are, told by names, dtypes and shapes.

    A weight in F8_E4M3 or F8_E5M2 has a scale beside it, or stands for its codes' own values, as other tensors do. One
    that ComfyUI marked may be INT8, or NVFP4 or MXFP8 in its order.
    source_dtype: of the weights that they stand for. Raises FaultsError with a sentence for each that can't be read.
    """
    for end, why in _UNREAD.items():
        if found := [name for name in specs if name.endswith(end)]:
            raise FaultsError("the quantized weights can't be read", [f"{min(found)}: its weights are {why}."])
    leaves = defaultdict(set)
    for name in specs:
        module, _, leaf = name.rpartition(".")
        leaves[module].add(leaf)
    marked = {module for module, found in leaves.items() if COMFY_MARK in found}
    layers: dict[str, Layer] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    faults, claimed = [], set()
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        is_packed = name != module and module in marked and spec.dtype in ("U8", "I8")
        if not (spec.dtype in _CASTS or is_packed) or _is_mark(name) or name.endswith(_SCALES):
            continue
        scales = [module + end for end in _SCALES if name != module and module + end in specs]
        claimed |= {name, *scales}
        odd = sorted(leaves[module] - _PLAIN_LEAVES - {scale.rpartition(".")[2] for scale in scales})
        if beyond := [end for end in BEYOND if name != module and f"{module}.{end}" in specs]:
            faults.append(f"{name}: {BEYOND[beyond[0]]}. It can't be read.")
        elif len(scales) > 1:
            faults.append(f"{name}: {len(scales)} weight scales beside it, one is needed. Fetch the checkpoint again.")
        elif module in layers:
            faults.append(f"{name}: a weight, and a tensor of the name {module}. Rename one.")
        elif scales:
            try:
                layers[module] = _read_scaled(name, module, scales[0], specs, is_marked=module in marked)
            except ValueError as error:
                faults.append(f"{name}: {error}.")
        elif name != module and odd:
            faults.append(f"{name}: {spec.dtype} without a scale, but with {module}.{odd[0]}, which is not known here.")
        elif not spec.nbytes:
            faults.append(f"{name}: {spec.dtype} {list(spec.shape)} holds nothing. Fetch the checkpoint again.")
        else:
            layers[module] = _read_cast(name, module, spec)
            shapes[module] = spec.shape
    faults += [
        f"{name}: a scale without a weight in FP8. Give the original checkpoint."
        for name in sorted(specs)
        if name.endswith(_SCALES) and name not in claimed
    ]
    if faults:
        raise FaultsError("the quantized weights can't be read", faults)
    unused = frozenset(name for name in specs if _is_mark(name) or name.endswith(_INPUT_SCALES))
    used = {name for layer in layers.values() for name in layer.tensors.values()}
    layers = {module: replace(layer, source_dtype=source_dtype) for module, layer in layers.items()}
    is_scaled = any(WEIGHT_SCALE in layer.tensors for layer in layers.values())
    return COMFYUI if is_scaled else CAST, ForeignTensors(layers, unused - used, shapes)


def _is_mark(name: str) -> bool:
    return name.rpartition(".")[2] in (_FILE_MARK, COMFY_MARK)


def _read_scaled(name: str, module: str, scale: str, specs: Mapping[str, TensorSpec], *, is_marked: bool) -> Layer:
    """Raises ValueError where the weight and its scales don't fit.

    ComfyUI marks weights whose scales lie in cuBLAS' order; nothing tells the order where there is no mark.
    """
    tensors = {WEIGHT: name, WEIGHT_SCALE: scale}
    if input_scales := [module + end for end in _INPUT_SCALES if module + end in specs]:
        tensors[INPUT_SCALE] = input_scales[0]
    if specs[scale].dtype in F32.readable and specs[name].dtype in _CASTS:
        return read_layer(module, tensors, specs, PLAIN)
    if not is_marked:
        raise ValueError(f"nothing says in which order the scales in {scale} lie")
    if specs[name].dtype == "I8":
        return int8_layer(tensors | {COMFY_MARK: f"{module}.{COMFY_MARK}"}, specs, "BF16")
    second = f"{module}.{TENSOR_SCALE}"
    return blocked_layer(tensors | ({TENSOR_SCALE: second} if second in specs else {}), specs)


def _read_cast(name: str, module: str, spec: TensorSpec) -> Layer:
    N = spec.shape[0] if spec.shape else 1
    return Layer(
        module=module,
        scheme=_CASTS[spec.dtype],
        N=N,
        K=spec.nbytes // N,
        source_tensor=name,
        source_dtype="BF16",
        scale_rule=UNKNOWN_RULE,
        tensors={WEIGHT: name},
        scale_shape=(1,),
    )
