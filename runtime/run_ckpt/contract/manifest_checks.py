"""What a manifest implies of itself: every contradiction, as sentences."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.file_names import unsafe_file_name
from run_ckpt.contract.manifest import (
    INPUT_SCALE,
    MANIFEST_NAME,
    METHODS,
    WEIGHT,
    Layer,
    Manifest,
)
from run_ckpt.contract.shape_limits import QUANTIZABLE_DTYPES
from run_ckpt.contract.tensors import METADATA_KEY, TensorSpec

_RECIPE_KEYS = ("format", "dialect", "naming", "layout", "granularity", "scale_rule", "preset")
_ADVICE = "The manifest was edited or damaged: fetch it again, or convert again."


def manifest_faults(manifest: Manifest) -> list[str]:
    """Return a sentence for everything in a manifest that contradicts the rest of it or the contract."""
    recipe = manifest.recipe
    missing = [key for key in _RECIPE_KEYS if not isinstance(recipe.get(key), str)]
    if missing:
        return [f"{MANIFEST_NAME}: the recipe lacks {missing}. {_ADVICE}"]
    if recipe["dialect"] not in DIALECTS:
        known = ", ".join(DIALECTS)
        return [f"{MANIFEST_NAME}: dialect {recipe['dialect']!r} is unknown; known are {known}. {_ADVICE}"]
    if not manifest.layers:
        return [f"{MANIFEST_NAME}: lists no quantized layer. {_ADVICE}"]
    faults = [*_file_table_faults("files", manifest.files, {"nbytes", "blake3"})]
    faults += _file_table_faults("source.files", manifest.source.get("files"), {"nbytes", "blake3", "sha256"})
    for name, layer in manifest.layers.items():
        faults += [f"{MANIFEST_NAME}: layer {name}: {fault}. {_ADVICE}" for fault in _layer_faults(name, layer, recipe)]
    if not faults:
        faults += [f"{MANIFEST_NAME}: {fault}. {_ADVICE}" for fault in _reference_faults(manifest)]
    return faults


def repeated_names(manifest: Manifest) -> list[str]:
    """Return the names that two tensors have: of the result, or of the source, where ``__metadata__`` is none."""
    kept = [*manifest.kept, METADATA_KEY]
    stored = [name for layer in manifest.layers.values() for name in layer.tensors.values()]
    stored += [*kept, *manifest.fused_scales]
    read = [*kept, *(layer.source_tensor for layer in manifest.layers.values())]
    return sorted({name for names in (stored, read) for name in _repeated(names)})


def _repeated(names: list[str]) -> list[str]:
    if len(set(names)) == len(names):
        return []
    return [name for name, count in Counter(names).items() if count > 1]


def spec_faults(
    expected: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec], shard_of: Mapping[str, str], authority: str
) -> list[str]:
    """Return a sentence for every tensor that is missing, not expected or of another dtype or shape."""
    faults = [
        f"{name}: {authority} lists it ({_describe(expected[name])}), but no shard holds it. Fetch or convert again."
        for name in sorted(expected.keys() - stored.keys())
    ]
    faults += [
        f"{shard_of[name]}: {name}: not in {authority}. Remove it or convert again."
        for name in sorted(stored.keys() - expected.keys())
    ]
    faults += [
        f"{shard_of[name]}: {name}: is {_describe(stored[name])}, {authority} says {_describe(expected[name])}."
        " Convert again."
        for name in sorted(stored.keys() & expected.keys())
        if stored[name] != expected[name]
    ]
    return faults


def _file_table_faults(table: str, files: Any, known: set[str]) -> list[str]:
    if not isinstance(files, dict):
        return [f"{MANIFEST_NAME}: {table} is missing. {_ADVICE}"]
    faults = []
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"nbytes", "blake3"} <= set(entry) <= known or not _are_facts(**entry):
            faults.append(f"{MANIFEST_NAME}: {table}: {name}: needs nbytes and blake3 and nothing else. {_ADVICE}")
        if unsafe_file_name(name) or not name.isprintable():
            faults.append(f"{MANIFEST_NAME}: {table}: {name!r} is not the name of a file of the folder. {_ADVICE}")
    return faults


def _layer_faults(name: str, layer: Layer, recipe: Mapping[str, Any]) -> Iterator[str]:
    if layer.module != name:
        yield f"calls itself {layer.module}"
    if not _is_size(layer.N) or not _is_size(layer.K):
        yield f"N = {layer.N!r}, K = {layer.K!r} are no sizes"
        return
    if layer.source_tensor != f"{name}.{WEIGHT}":
        yield f"source_tensor is {layer.source_tensor}"
    if layer.source_dtype not in QUANTIZABLE_DTYPES:
        yield f"source_dtype {layer.source_dtype!r} is none of {', '.join(QUANTIZABLE_DTYPES)}"
    scheme, dialect = layer.scheme, DIALECTS[recipe["dialect"]]
    if scheme not in dialect.schemes:
        yield f"the {dialect.name} dialect can't say {scheme}"
        return
    rows, cols = scheme.alignment
    if layer.N % rows or layer.K % cols:
        yield f"[{layer.N}, {layer.K}] is not a multiple of [{rows}, {cols}], as {scheme} needs"
    names = dialect.tensor_names(name, scheme, recipe["naming"])
    if set(layer.tensors) - {INPUT_SCALE} != set(names) or not names.items() <= layer.tensors.items():
        yield f"its tensors are {layer.tensors}, the {dialect.name} dialect names them {names}"
    shape = dialect.scale_shape(layer.N, layer.K, scheme)
    if layer.scale_shape != shape:
        yield f"scale_shape is {list(layer.scale_shape)}, it should be {list(shape)}"
    measured = layer.output_sqnr_db or {}
    numbers = [value for value in measured.values() if value is not None]
    if layer.method not in (None, *METHODS) or (layer.method and set(measured) != set(METHODS)):
        yield f"method {layer.method!r}, output_sqnr_db {measured}: not as any version writes it"
    elif layer.method and len(numbers) == len(METHODS) and measured[layer.method] != max(numbers):
        yield f"method {layer.method}, though the output errors {measured} speak for the other"


def _reference_faults(manifest: Manifest) -> Iterator[str]:
    sources = {
        layer.source_tensor: TensorSpec(layer.source_tensor, "", (layer.N, layer.K))
        for layer in manifest.layers.values()
    }
    sources |= {name: kept.spec for name, kept in manifest.kept.items()}
    for fold in manifest.folds:
        K = len(fold.exponents)
        wrong = [name for name in fold.readers if name not in sources or sources[name].shape[1:] != (K,)]
        wrong += [
            part.tensor
            for part in fold.writers
            if part.tensor not in manifest.kept or not 0 <= part.first <= sources[part.tensor].shape[0] - K
        ]
        if wrong or max(fold.exponents, default=1) > 0:
            yield f"a fold of {K} channels does not fit {wrong or 'any layer'}"
    for name in repeated_names(manifest):
        yield f"{name} is listed more than once"
    for name, fused in manifest.fused_scales.items():
        unknown = [
            member
            for member in fused.members
            if member not in manifest.layers or fused.role not in manifest.layers[member].tensors
        ]
        if unknown or not fused.members:
            yield f"fused scale {name}: {unknown or 'its member list'} holds no quantized layer with a {fused.role}"


def _are_facts(nbytes: object, **hashes: object) -> bool:
    return type(nbytes) is int and all(isinstance(value, str) for value in hashes.values())


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
