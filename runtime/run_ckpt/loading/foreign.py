"""The layers of a checkpoint that has no manifest: from its quantization_config, with shapes or headers."""

import math
from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects.dialect import NAMINGS, usual_scale_shape
from run_ckpt.contract.dialects.table import DIALECTS, PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.formats import FORMATS, Scheme
from run_ckpt.contract.layouts import LAYOUTS, PLAIN, Layout
from run_ckpt.contract.manifest import (
    INPUT_SCALE,
    INVERSE_TENSOR_SCALE,
    SCHEMA_VERSION,
    TENSOR_SCALE,
    WEIGHT,
    WEIGHT_SCALE,
    Layer,
)
from run_ckpt.contract.tensors import TensorSpec

# A quant_method is the name of the dialect.
READABLE_METHODS = tuple(name for name, dialect in DIALECTS.items() if dialect.config and dialect.is_open)
_CODE_DTYPES = {quant_format.element.dtype for quant_format in FORMATS.values()}
_SPELLINGS = [
    dialect.suffixes(scheme, naming)
    for dialect in DIALECTS.values()
    for scheme in dialect.schemes
    for naming in NAMINGS
]
_WEIGHT_SUFFIXES = tuple(sorted({f".{suffixes[WEIGHT]}" for suffixes in _SPELLINGS}))
_SCALE_SUFFIXES = tuple(sorted({f".{suffixes[WEIGHT_SCALE]}" for suffixes in _SPELLINGS}))
# Beside a weight and its scale; named as their roles.
_MORE_SCALES = (TENSOR_SCALE, INVERSE_TENSOR_SCALE, INPUT_SCALE)


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
        declared = config[PRIVATE_KEY]["quantized_modules"].items()
        formats = {module: FORMATS[name] for module, name in declared if module in shapes}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config: {PRIVATE_KEY} is damaged ({error}). Fetch it again.") from error
    dialect = DIALECTS[config["quant_method"]]
    layout, granularity = _layout(config), dialect.granularity(config)
    layers = {}
    for module, quant_format in formats.items():
        scheme = quant_format.scheme(layout.name, granularity)
        tensors = dialect.tensor_names(module, scheme, naming)
        if scheme in dialect.static:
            tensors[INPUT_SCALE] = f"{module}.{INPUT_SCALE}"
        scales = dialect.scale_shape(*shapes[module], scheme)
        layers[module] = _record(module, scheme, shapes[module], tensors, scales)
    return layers


def layers_in_headers(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Layer]:
    """Return module -> layer for every quantized weight among ``specs``, whoever wrote them.

    MXFP4 is a weight U8 [N, K/2] with a scale U8 [N, K/32] (padded in layout ``aiter``, which the config
    must declare); FP8 is F8_E4M3 [N, K] with a float scale: one number, N, or one for each 128 x 128.
    Raises CheckpointError for an unknown quant_method, FaultsError with a sentence for each weight or
    scale that is neither or has no partner.
    """
    _check(config)
    layers, faults, scales = {}, [], set()
    for name, spec in specs.items():
        suffix = next((suffix for suffix in _WEIGHT_SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or spec.dtype not in _CODE_DTYPES:
            continue
        module = name.removesuffix(suffix)
        beside = [module + end for end in _SCALE_SUFFIXES if module + end in specs]
        scales |= set(beside)
        if len(beside) != 1:
            faults.append(f"{name}: {len(beside)} weight scales beside it, one is needed. Fetch the checkpoint again.")
            continue
        tensors = {WEIGHT: name, WEIGHT_SCALE: beside[0]}
        tensors |= {role: f"{module}.{role}" for role in _MORE_SCALES if f"{module}.{role}" in specs}
        try:
            layers[module] = _read_layer(module, tensors, specs, _layout(config))
        except ValueError as error:
            faults.append(f"{name}: {error}.")
    orphans = sorted(name for name in specs if name.endswith(_SCALE_SUFFIXES) and name not in scales)
    faults += [f"{name}: a scale without a quantized weight. Fetch the checkpoint again." for name in orphans]
    if faults or not layers:
        raise FaultsError("the quantized weights can't be read", faults or ["there is none among the tensors."])
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


def _layout(config: Mapping[str, Any]) -> Layout:
    name = config.get("layout", PLAIN.name) if is_ours(config) else PLAIN.name
    if name not in LAYOUTS:
        raise CheckpointError(f"quantization_config: layout {name!r} is none of {', '.join(LAYOUTS)}.")
    # Where no padding is needed, shapes can't tell the layouts apart.
    for key, order in LAYOUTS[name].facts.items():
        if config.get(key, order) != order:
            raise CheckpointError(
                f"quantization_config: layout {name!r} contradicts {key} {config[key]!r}. Fetch config.json again."
            )
    return LAYOUTS[name]


def _read_layer(module: str, tensors: dict[str, str], specs: Mapping[str, TensorSpec], layout: Layout) -> Layer:
    """Raises ValueError where weight and scale do not make a layer."""
    weight, scale = specs[tensors[WEIGHT]], specs[tensors[WEIGHT_SCALE]]
    if len(weight.shape) != 2:
        raise ValueError(f"has {len(weight.shape)} dimensions, a linear weight has 2")
    candidates = [quant_format for quant_format in FORMATS.values() if quant_format.element.dtype == weight.dtype]
    known, is_two_level = [], not {TENSOR_SCALE, INVERSE_TENSOR_SCALE}.isdisjoint(tensors)
    for scheme in (candidate.scheme(layout.name, key) for candidate in candidates for key in candidate.blocks):
        N, K = weight.shape[0], weight.shape[1] * scheme.format.element.per_byte
        rows, cols = scheme.alignment
        shape = _stored_scale_shape(N, K, scheme, scale.shape)
        is_stored = scale.dtype in scheme.format.scale.readable and is_two_level == scheme.format.is_two_level
        if is_stored and shape and N % rows == K % cols == 0:
            return _record(module, scheme, (N, K), tensors, shape)
        known.append(f"{scheme.format.scale.dtype} {list(usual_scale_shape(N, K, scheme))}")
    labels = " or ".join(candidate.label for candidate in candidates)
    raise ValueError(
        f"{weight.dtype} {list(weight.shape)} with a scale {scale.dtype} {list(scale.shape)} is no {labels} in layout"
        f" {layout}, whose scale is {' or '.join(known)}"
    )


def _stored_scale_shape(N: int, K: int, scheme: Scheme, stored: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return ``stored`` where it is a spelling of the scheme's scales, else None. One number may be []."""
    if scheme.is_per_tensor:
        return (stored or (1,)) if math.prod(stored) == 1 else None
    spellings = [usual_scale_shape(N, K, scheme)] + [scheme.scale_grid(N, K)] * (scheme.layout == PLAIN)
    return stored if stored in spellings else None


def _record(
    module: str, scheme: Scheme, shape: tuple[int, int], tensors: dict[str, str], scales: tuple[int, ...]
) -> Layer:
    return Layer(
        module=module,
        scheme=scheme,
        N=shape[0],
        K=shape[1],
        source_tensor=f"{module}.weight",
        source_dtype="BF16",
        scale_rule="unknown",
        tensors=tensors,
        scale_shape=scales,
    )
