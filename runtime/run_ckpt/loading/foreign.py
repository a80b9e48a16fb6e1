"""The layers of a checkpoint that has no manifest: from its quantization_config, with shapes or headers."""

import math
from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects import PRIVATE_KEY, Scheme, layout_names, scale_shape, tensor_names
from run_ckpt.contract.errors import CheckpointError, ProblemsError
from run_ckpt.contract.formats import LAYOUTS
from run_ckpt.contract.manifest import INPUT_SCALE, SCHEMA_VERSION, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.manifest_checks import alignment
from run_ckpt.contract.tensors import TensorSpec

READABLE_METHODS = ("mxfp4", "fp8", "modelopt", "quark", "compressed-tensors")
_WEIGHT_SUFFIXES = (".weight", ".weight_packed")
_SCALE_SUFFIXES = (".weight_scale", ".weight_scale_inv", ".weight_quantizer.scale")


def is_ours(config: Mapping[str, Any]) -> bool:
    """True where convert-ckpt wrote the quantization_config."""
    return PRIVATE_KEY in config


def layers_in_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], naming: str) -> dict[str, Layer]:
    """Return module -> layer as a quantization_config of ours declares them.

    shapes: [N, K] of the model's linear layers; a declared module that is not among them is left out.
    naming: "diffusers" or "transformers". Raises CheckpointError for a config this version can't read.
    """
    _check(config)
    try:
        formats = dict(config[PRIVATE_KEY]["quantized_modules"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"quantization_config: {PRIVATE_KEY} is damaged ({error}). Fetch it again.") from error
    method = config["quant_method"]
    granularity = "block" if config.get("weight_block_size") else _strategy(config)
    layers = {}
    for module, format_ in formats.items():
        if module in shapes:
            mxfp4 = format_ == "mxfp4"
            scheme = Scheme(format_, _layout(config) if mxfp4 else "plain", "group" if mxfp4 else granularity)
            tensors = tensor_names(module, scheme, method, naming)
            if method == "modelopt":
                tensors[INPUT_SCALE] = f"{module}.input_scale"
            layers[module] = _record(
                module, scheme, shapes[module], tensors, scale_shape(*shapes[module], scheme, method)
            )
    return layers


def layers_in_headers(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Layer]:
    """Return module -> layer for every quantized weight among ``specs``, whoever wrote them.

    MXFP4 is a weight U8 [N, K/2] with a scale U8 [N, K/32] (padded in layout ``aiter``, which the config
    must declare); FP8 is F8_E4M3 [N, K] with a float scale: one number, N, or one for each 128 x 128.
    Raises CheckpointError for an unknown quant_method, ProblemsError with a sentence for each weight or
    scale that is neither or has no partner.
    """
    _check(config)
    layers, faults, scales = {}, [], set()
    for name, spec in specs.items():
        suffix = next((suffix for suffix in _WEIGHT_SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or spec.dtype not in ("U8", "F8_E4M3"):
            continue
        module = name.removesuffix(suffix)
        beside = [module + end for end in _SCALE_SUFFIXES if module + end in specs]
        scales |= set(beside)
        if len(beside) != 1:
            faults.append(f"{name}: {len(beside)} weight scales beside it, one is needed. Fetch the checkpoint again.")
            continue
        tensors = {WEIGHT: name, WEIGHT_SCALE: beside[0]}
        if f"{module}.input_scale" in specs:
            tensors[INPUT_SCALE] = f"{module}.input_scale"
        try:
            layers[module] = _read_layer(module, tensors, specs, _layout(config))
        except ValueError as error:
            faults.append(f"{name}: {error}.")
    orphans = sorted(name for name in specs if name.endswith(_SCALE_SUFFIXES) and name not in scales)
    faults += [f"{name}: a scale without a quantized weight. Fetch the checkpoint again." for name in orphans]
    if faults or not layers:
        raise ProblemsError("the quantized weights can't be read", faults or ["there is none among the tensors."])
    return layers


def _check(config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if method not in READABLE_METHODS:
        raise CheckpointError(f"quant_method {method!r} is none that is read here: {', '.join(READABLE_METHODS)}.")
    version = config[PRIVATE_KEY].get("schema_version") if is_ours(config) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"quantization_config: schema version {version!r}, this version reads {SCHEMA_VERSION}."
            " Update the package, or convert again."
        )


def _layout(config: Mapping[str, Any]) -> str:
    layout = config.get("layout", "plain") if is_ours(config) else "plain"
    if layout not in LAYOUTS:
        raise CheckpointError(f"quantization_config: layout {layout!r} is none of {', '.join(LAYOUTS)}.")
    # Where no padding is needed, shapes can't tell the layouts apart.
    for key, name in layout_names(layout).items():
        if config.get(key, name) != name:
            raise CheckpointError(
                f"quantization_config: layout {layout!r} contradicts {key} {config[key]!r}. Fetch config.json again."
            )
    return str(layout)


def _strategy(config: Mapping[str, Any]) -> str:
    """The granularity of FP8 scales, which compressed-tensors names its strategy."""
    groups = config.get("config_groups") or {}
    return str(groups["group_0"]["weights"]["strategy"]) if "group_0" in groups else "tensor"


def _read_layer(module: str, tensors: dict[str, str], specs: Mapping[str, TensorSpec], layout: str) -> Layer:
    """Raises ValueError where weight and scale do not make a layer."""
    weight, scale = specs[tensors[WEIGHT]], specs[tensors[WEIGHT_SCALE]]
    if len(weight.shape) != 2:
        raise ValueError(f"has {len(weight.shape)} dimensions, a linear weight has 2")
    N, width = weight.shape
    if weight.dtype == "U8":
        scheme, shape = Scheme("mxfp4", layout, "group"), (N, 2 * width)
        rows, cols = alignment(scheme)
        expected = scale_shape(*shape, scheme, "mxfp4")
        if N % rows or shape[1] % cols or (scale.dtype, scale.shape) != ("U8", expected):
            raise ValueError(
                f"U8 {list(weight.shape)} with a scale {scale.dtype} {list(scale.shape)} is no MXFP4 in layout"
                f" {layout}, whose scale is U8 {list(expected)}"
            )
        return _record(module, scheme, shape, tensors, expected)
    if scale.dtype not in ("F32", "BF16", "F16"):
        raise ValueError(f"its scale is {scale.dtype}, FP8 has a float scale")
    scheme = Scheme("fp8", "plain", _granularity(weight.shape, scale.shape))
    return _record(module, scheme, (N, width), tensors, scale.shape or (1,))


def _granularity(weight: tuple[int, ...], scale: tuple[int, ...]) -> str:
    if math.prod(scale) == 1:
        return "tensor"
    if scale in ((weight[0],), (weight[0], 1)):
        return "channel"
    block = Scheme("fp8", "plain", "block")
    if scale == scale_shape(weight[0], weight[1], block, "fp8"):
        return "block"
    raise ValueError(f"a scale {list(scale)} is neither one number, one a row, nor one for each 128 x 128")


def _record(
    module: str, scheme: Scheme, shape: tuple[int, int], tensors: dict[str, str], scales: tuple[int, ...]
) -> Layer:
    return Layer(
        module=module,
        format=scheme.format,
        N=shape[0],
        K=shape[1],
        source_tensor=f"{module}.weight",
        source_dtype="BF16",
        layout=scheme.layout,
        granularity=scheme.granularity,
        scale_rule="unknown",
        tensors=tensors,
        scale_shape=scales,
    )
