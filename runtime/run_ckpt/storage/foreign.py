"""A quantized checkpoint, of convert-ckpt or of another tool, opened to be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError, ManifestError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME, GGUF_SUFFIX
from run_ckpt.contract.foreign import ForeignTensors, dialect_name, read_tensors
from run_ckpt.contract.ggml import read_ggml
from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Manifest
from run_ckpt.contract.modelslim import MODELSLIM, read_modelslim
from run_ckpt.contract.nunchaku import NUNCHAKU, is_nunchaku, read_nunchaku
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.contract.torchao import TORCHAO, is_torchao, read_torchao
from run_ckpt.contract.undeclared import is_undeclared, read_undeclared
from run_ckpt.extras import require_packages
from run_ckpt.storage.checks import header_faults
from run_ckpt.storage.components import Checkpoint, find_components, open_checkpoint
from run_ckpt.storage.gguf import SHAPE_KEY, TYPE_KEY
from run_ckpt.storage.json_files import read_config, read_json_object
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import TensorFolder, read_folder

# What ModelOpt writes beside config.json, and older versions of it instead of config.json's key.
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
# msModelSlim's, with the kind of its quantization in the name.
_DESCRIPTIONS = "quant_model_description*.json"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def is_about_quantization(name: str) -> bool:
    """True for files beside config.json that say how weights are quantized, and nothing of weights that are not."""
    return name in (HF_QUANT_CONFIG_NAME, MANIFEST_NAME) or fnmatchcase(name, _DESCRIPTIONS)


@contextmanager
def open_quantized(path: Path) -> Iterator[Checkpoint]:
    """Yield the component in folder ``path``, whoever wrote it. Raises as open_checkpoint and open_foreign do."""
    with open_checkpoint(path) if (path / MANIFEST_NAME).exists() else open_foreign(path) as checkpoint:
        yield checkpoint


@contextmanager
def open_foreign(path: Path) -> Iterator[Checkpoint]:
    """Yield the component at ``path``, a folder or a file, which has no manifest: its config and headers must agree.

    Its manifest holds what they say. Raises CheckpointError, FaultsError with every fault.
    """
    folder, manifest, found = _read(path)
    with TensorReader(folder) as reader:
        yield Checkpoint(path, manifest, folder, reader, found.unused, found)


def read_foreign_manifest(path: Path) -> Manifest:
    """Return the manifest that open_foreign makes, with the sizes of the shards; raises as that does."""
    folder, manifest, _ = _read(path)
    return replace(manifest, files={shard.name: {"nbytes": shard.header.file_nbytes} for shard in folder.shards})


def _read(path: Path) -> tuple[TensorFolder, Manifest, ForeignTensors]:
    components = find_components(path)
    if "" not in components:
        raise CheckpointError(f"{path}: holds {', '.join(components)}. Load one of them: {path / min(components)}.")
    config = (read_config(path) if path.is_dir() else None) or {}
    folder = read_folder(path)
    found = find_quantized(path, config, folder)
    if found is None:
        raise CheckpointError(
            f"{path}: no {MANIFEST_NAME}, and no usable {CONFIG_KEY} in {CONFIG_NAME}."
            " Give the folder of a quantized component."
        )
    by, tensors = found
    declared = (declared_quantization(path, config) if path.is_dir() else None) or {}
    return folder, _as_manifest({"name": by, **_version(declared)}, tensors, folder), tensors


def find_quantized(path: Path, config: dict[str, Any], folder: TensorFolder) -> tuple[str, ForeignTensors] | None:
    """Return what quantized the checkpoint at ``path`` and what its tensors are; None where nothing says that it is.

    Raises CheckpointError, FaultsError with a sentence for each tensor that can't be read.
    """
    if (path / MANIFEST_NAME).exists():
        manifest = read_checked_manifest(path)
        if faults := header_faults(manifest, folder):
            raise FaultsError(f"{path}: not the checkpoint that its manifest describes", faults)
        return manifest.tool["name"], ForeignTensors(manifest.layers, frozenset(manifest.fused_scales))
    declared = declared_quantization(path, config) if path.is_dir() else None
    specs, dtype = {tensor.spec.name: tensor.spec for _, tensor in folder.tensors()}, weight_dtype(config)
    try:
        metadata = {key: value for shard in folder.shards for key, value in shard.header.metadata.items()}
        if any(shard.path.suffix == GGUF_SUFFIX for shard in folder.shards):
            return _read_gguf(metadata, specs, dtype)
        if is_torchao(metadata):
            return TORCHAO, read_torchao(metadata, specs, dtype)
        if (description := _find_description(path)) is not None:
            return MODELSLIM, read_modelslim(description, specs, dtype)
        if declared is not None:
            return dialect_name(declared), read_tensors(declared, specs, dtype)
        if is_nunchaku(specs):
            return NUNCHAKU, read_nunchaku(specs, dtype)
        return read_undeclared(specs, dtype) if is_undeclared(specs) else None
    except FaultsError as error:
        raise FaultsError(f"{path}: the quantized weights can't be read", error.faults) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _find_description(path: Path) -> dict[str, Any] | None:
    """Return what msModelSlim says of the tensors in a folder, None where it says nothing. Raises CheckpointError."""
    names = sorted(entry.name for entry in path.glob(_DESCRIPTIONS)) if path.is_dir() else []
    if len(names) > 1:
        raise CheckpointError(f"{', '.join(names)}: several describe the weights. Leave the one that belongs to them.")
    if not names:
        return None
    description, faults = read_json_object(path / names[0])
    if description is None:
        raise FaultsError(f"{path}: the quantized weights can't be read", faults)
    return description


def _read_gguf(metadata: dict[str, str], specs: dict[str, TensorSpec], dtype: str) -> tuple[str, ForeignTensors]:
    require_packages("reading GGUF", "gguf")
    types = {key.removeprefix(TYPE_KEY): value for key, value in metadata.items() if key.startswith(TYPE_KEY)}
    shapes = {name: tuple(map(int, metadata[SHAPE_KEY + name].split())) for name in types}
    return "GGUF", read_ggml(specs, types, shapes, dtype)


def declared_quantization(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what says how the component in folder ``path`` is quantized, None where nothing does.

    Raises ManifestError where convert-ckpt wrote it and its manifest is lost.
    """
    declared = config.get(CONFIG_KEY)
    if declared is None:
        declared = read_json_object(path / HF_QUANT_CONFIG_NAME)[0]
    if not isinstance(declared, dict):
        return None
    private = declared.get(PRIVATE_KEY, {})
    if not isinstance(private, dict):
        raise CheckpointError(f"{path}: {CONFIG_KEY}: {PRIVATE_KEY} is not an object. Fetch {CONFIG_NAME} again.")
    if "manifest" in private:
        raise ManifestError(f"{path}: lacks its {MANIFEST_NAME}. Fetch the whole folder, or convert again.")
    return declared


def weight_dtype(config: dict[str, Any]) -> str:
    """Return the dtype that the weights of a model have where they are not quantized, as its config says."""
    named = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(named).removeprefix("torch."), "BF16")


def _as_manifest(tool: dict[str, str], found: ForeignTensors, folder: TensorFolder) -> Manifest:
    """Return a manifest that says of another tool's checkpoint what can be known of it."""
    coded = {name for layer in found.layers.values() for name in layer.tensors.values()} | found.unused
    specs = {tensor.spec.name: tensor.spec for _, tensor in folder.tensors()}
    return Manifest(
        tool=tool,
        source={"name": "not stated", "files": {}},
        recipe={"dialect": tool["name"]},
        layers=found.layers,
        kept={name: KeptTensor(spec, "not quantized") for name, spec in specs.items() if name not in coded},
        fused_scales={},
        unquantized_linears={},
    )


def _version(declared: dict[str, Any]) -> dict[str, str]:
    producer = declared.get("producer")
    return {"version": str(producer.get("version"))} if isinstance(producer, dict) else {}
