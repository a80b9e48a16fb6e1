"""The layers of a checkpoint that has no manifest: from its quantization_config, with shapes or headers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from run_ckpt.contract.dialects.dialect import NAMINGS, usual_scale_shape
from run_ckpt.contract.dialects.table import DIALECTS, PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.formats import FORMATS, MX_BLOCK_SIZE, PLAIN_MXFP4, Scheme
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
from run_ckpt.contract.source_formats import FP8_E5M2, UNKNOWN_RULE
from run_ckpt.contract.tensors import TensorSpec

# A quant_method is the name of the dialect.
READABLE_METHODS = tuple(name for name, dialect in DIALECTS.items() if dialect.config and dialect.is_open)
# Names of other tools for what a dialect of ours spells alike: ModelOpt's own, and those of FBGEMM's FP8 by row.
_ALIASES = {"modelopt_fp8": "modelopt", "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt", "fbgemm_fp8": "fp8"}
_READABLE = (*FORMATS.values(), FP8_E5M2)
_CODE_DTYPES = {quant_format.element.dtype for quant_format in _READABLE}
# Of tensors that are nothing but codes: one of them without a scale can't be read.
_PURE_CODES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SPELLINGS = [
    dialect.suffixes(scheme, naming)
    for dialect in DIALECTS.values()
    for scheme in dialect.schemes
    for naming in NAMINGS
]
_WEIGHT_SUFFIXES = tuple(sorted({f".{suffixes[WEIGHT]}" for suffixes in _SPELLINGS}))
SCALE_SUFFIXES = tuple(sorted({f".{suffixes[WEIGHT_SCALE]}" for suffixes in _SPELLINGS}))
# Beside a weight and its scale; named as their roles.
_MORE_SCALES = (TENSOR_SCALE, INVERSE_TENSOR_SCALE, INPUT_SCALE)
# Scales of activations and of the KV cache: no part of a weight.
_OF_ACTIVATIONS = re.compile(
    r".*\.((input|output|[qkv]|kv|prob)_scale|input_global_scale|input_scale_ub|input_quantizer\..*"
    r"|output_quantizer\..*|[qkv]_bmm_quantizer\..*)"
)
# Beside a weight, what makes it another one than its codes and scales say.
BEYOND = {
    "pre_quant_scale": "its inputs are scaled by channel (AWQ, SmoothQuant)",
    "weight_zero_point": "it has zero points",
    "weight_g_idx": "its columns are permuted",
    "weight_quantizer.zero_point": "it has zero points",
}
# What of other methods codes and scales don't say, or the way.
_PACKED = "integers with zero points, packed in the order of its kernels"
_UNREAD = {
    "awq": _PACKED,
    "gptq": _PACKED,
    "auto-round": _PACKED,
    "hqq": "integers with zero points between them",
    "eetq": "integers in the order of its kernels",
    "aqlm": "codebooks",
    "nunchaku_lite": "codes in the order of Nunchaku's GPU kernels",
    "bitsandbytes": "codebooks or rows of outliers; transformers writes it as numbers:"
    " AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(OUT)",
}
# MXFP4 experts of gpt-oss: codes [experts, N, K / 32, 16] and scales [experts, N, K / 32] of a tensor [experts, K, N].
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class ForeignTensors:
    """What the tensors of a quantized checkpoint are, whoever wrote it.

    ``layers``: module -> layer; one stands for the tensor ``source_tensor``. ``unused``: tensors of quantization that
    no weight needs. ``shapes``: module -> shape of that tensor where it isn't [N, K].
    """

    layers: dict[str, Layer]
    unused: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def plain_specs(self, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return what the tensors stand for: name of a tensor of codes, or of one that is plain -> plain tensor."""
        coded = {name for layer in self.layers.values() for name in layer.tensors.values()} | self.unused
        weights = {
            layer.tensors[WEIGHT]: TensorSpec(
                layer.source_tensor, layer.source_dtype, self.shapes.get(module, (layer.N, layer.K))
            )
            for module, layer in self.layers.items()
        }
        return {name: spec for name, spec in stored.items() if name not in coded} | weights


def is_stored_alike(encoded: Layer, layer: Layer) -> bool:
    """True where two layers have the same codes for the same values, whatever their layout and spelling."""
    return encoded.format == layer.format and encoded.scheme.block == layer.scheme.block


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
    layout, granularity = declared_layout(config), dialect.granularity(config)
    layers = {}
    for module, quant_format in formats.items():
        scheme = quant_format.scheme(layout.name, granularity)
        tensors = dialect.tensor_names(module, scheme, naming)
        if scheme in dialect.static:
            tensors[INPUT_SCALE] = f"{module}.{INPUT_SCALE}"
        scales = dialect.scale_shape(*shapes[module], scheme)
        layers[module] = _record(module, scheme, shapes[module], tensors, scales)
    return layers


def read_tensors(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], source_dtype: str = "BF16"
) -> ForeignTensors:
    """Return what the tensors of a quantized checkpoint are, told by their names, dtypes and shapes.

    E2M1 codes are U8 [N, K/2], E4M3 codes F8_E4M3 [N, K]; which format that is, its scales say: U8, one for 32 along
    K (padded in layout ``aiter``, which a config of ours must declare), F8_E4M3, one for 16, or floats: one number, N,
    or one for each 128 x 128. source_dtype: of the weights that they stand for.
    Raises CheckpointError for an unknown quant_method, FaultsError with a sentence for each weight or scale that is
    none of these, has no partner, or is not all there is to its weight.
    """
    _check(config)
    layers, faults, claimed = {}, [], set()
    for name, spec in specs.items():
        found = _partners(name, specs) if spec.dtype in _CODE_DTYPES else None
        if found is None:
            continue
        module, beside = found
        claimed |= {name, *beside}
        if 0 in spec.shape:
            faults.append(f"{name}: {list(spec.shape)} is empty. Fetch the checkpoint again.")
            continue
        faults += [f"{name}: {why}. It can't be read." for end, why in BEYOND.items() if f"{module}.{end}" in specs]
        if len(beside) != 1:
            faults.append(f"{name}: {len(beside)} weight scales beside it, one is needed. Fetch the checkpoint again.")
            continue
        tensors = {WEIGHT: name, WEIGHT_SCALE: beside[0]}
        tensors |= {role: f"{module}.{role}" for role in _MORE_SCALES if f"{module}.{role}" in specs}
        try:
            if name.endswith(_BLOCKS):
                layers[module] = _read_experts(module, tensors, specs)
            else:
                layers[module] = read_layer(module, tensors, specs, declared_layout(config))
        except ValueError as error:
            faults.append(f"{name}: {error}.")
    for name, spec in sorted(specs.items()):
        if name not in claimed and name.endswith(SCALE_SUFFIXES):
            faults.append(f"{name}: a scale without a quantized weight. Fetch the checkpoint again.")
        elif name not in claimed and spec.dtype in _PURE_CODES:
            faults.append(f"{name}: {spec.dtype} {list(spec.shape)}, codes without a scale beside them.")
    if faults or not layers:
        raise FaultsError("the quantized weights can't be read", faults or ["there is none among the tensors."])
    layers = {module: replace(layer, source_dtype=source_dtype) for module, layer in layers.items()}
    coded = {name for layer in layers.values() for name in layer.tensors.values()}
    unused = frozenset(name for name in specs if name not in coded and _OF_ACTIVATIONS.fullmatch(name))
    return ForeignTensors(layers, unused)


def _partners(name: str, specs: Mapping[str, TensorSpec]) -> tuple[str, list[str]] | None:
    """Return the module of a tensor of codes and the weight scales beside it, None where its name is not a weight's."""
    if name.endswith(_BLOCKS):
        module = name.removesuffix(_BLOCKS)
        return module, [module + _SCALES] * (module + _SCALES in specs)
    suffix = next((suffix for suffix in _WEIGHT_SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        return None
    module = name.removesuffix(suffix)
    return module, [module + end for end in SCALE_SUFFIXES if module + end in specs]


def dialect_name(config: Mapping[str, Any]) -> str:
    """Return the dialect of ours that spells tensors as the writer of a quantization_config does."""
    producer = config.get("producer")
    by_producer = producer.get("name") if isinstance(producer, dict) else None
    method = str(config.get("quant_method") or by_producer)
    return _ALIASES.get(method, method)


def _check(config: Mapping[str, Any]) -> None:
    method = dialect_name(config)
    if method not in READABLE_METHODS:
        why = f" It has {_UNREAD[method]}." if method in _UNREAD else ""
        raise CheckpointError(f"quant_method {method!r} is none that is read here: {', '.join(READABLE_METHODS)}.{why}")
    version = config[PRIVATE_KEY].get("schema_version") if is_ours(config) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"quantization_config: schema version {version!r}, this version reads {SCHEMA_VERSION}."
            " Update the package, or convert again."
        )


def declared_layout(config: Mapping[str, Any]) -> Layout:
    """Return the storage order that a quantization_config declares. Raises CheckpointError for an unknown one."""
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


def read_layer(module: str, tensors: dict[str, str], specs: Mapping[str, TensorSpec], layout: Layout) -> Layer:
    """Return the layer that a weight and its scales make. tensors: role -> name in ``specs``.

    Raises ValueError where they make none.
    """
    weight, scale = specs[tensors[WEIGHT]], specs[tensors[WEIGHT_SCALE]]
    if len(weight.shape) != 2:
        raise ValueError(f"has {len(weight.shape)} dimensions, a linear weight has 2")
    candidates = [quant_format for quant_format in _READABLE if quant_format.element.dtype == weight.dtype]
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


def _read_experts(module: str, tensors: dict[str, str], specs: Mapping[str, TensorSpec]) -> Layer:
    """Return the layer of all experts, one below the other. Raises ValueError."""
    weight, scale = specs[tensors[WEIGHT]].shape, specs[tensors[WEIGHT_SCALE]].shape
    if len(weight) != 4 or weight[3] != MX_BLOCK_SIZE // 2 or scale != weight[:3]:
        raise ValueError(f"{list(weight)} with scales {list(scale)} are no experts in MXFP4")
    n_experts, rows, n_blocks, _ = weight
    layer = _record(
        module, PLAIN_MXFP4, (n_experts * rows, n_blocks * MX_BLOCK_SIZE), tensors, (n_experts * rows, n_blocks)
    )
    return replace(layer, n_stacked=n_experts)


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
        scale_rule=UNKNOWN_RULE,
        tensors=tensors,
        scale_shape=scales,
    )
