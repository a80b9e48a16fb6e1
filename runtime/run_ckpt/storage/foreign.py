"""A quantized checkpoint, of convert-ckpt or of another tool, opened to be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError, ManifestError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME
from run_ckpt.contract.foreign import ForeignTensors, dialect_name, read_tensors
from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.checks import header_faults
from run_ckpt.storage.components import Checkpoint, find_components, open_checkpoint
from run_ckpt.storage.json_files import read_config, read_json_object
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import TensorFolder, read_folder

# What ModelOpt writes beside config.json, and older versions of it instead of config.json's key.
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
# Files beside config.json that say how weights are quantized, and say nothing of weights that are not.
ABOUT_QUANTIZATION = (HF_QUANT_CONFIG_NAME, MANIFEST_NAME)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@contextmanager
def open_quantized(path: Path) -> Iterator[Checkpoint]:
    """Yield the component in folder ``path``, whoever wrote it. Raises as open_checkpoint and open_foreign do."""
    with open_checkpoint(path) if (path / MANIFEST_NAME).exists() else open_foreign(path) as checkpoint:
        yield checkpoint


@contextmanager
def open_foreign(path: Path) -> Iterator[Checkpoint]:
    """Yield the component in folder ``path``, which has no manifest: its config and headers must agree.

    Its manifest holds what they say. Raises CheckpointError, FaultsError with every fault.
    """
    folder, declared, found = _read(path)
    with TensorReader(folder) as reader:
        yield Checkpoint(path, _as_manifest(declared, found, folder), folder, reader, found.unused, found.stacked)


def read_foreign_manifest(path: Path) -> Manifest:
    """Return the manifest that open_foreign makes, with the sizes of the shards; raises as that does."""
    folder, declared, found = _read(path)
    files = {shard.name: {"nbytes": shard.header.file_nbytes} for shard in folder.shards}
    return replace(_as_manifest(declared, found, folder), files=files)


def _read(path: Path) -> tuple[TensorFolder, dict[str, Any], ForeignTensors]:
    components = find_components(path)
    if "" not in components:
        raise CheckpointError(f"{path}: holds {', '.join(components)}. Load one of them: {path / min(components)}.")
    config = read_config(path) or {}
    declared = declared_quantization(path, config)
    if declared is None:
        raise CheckpointError(
            f"{path}: no {MANIFEST_NAME}, and no usable {CONFIG_KEY} in {CONFIG_NAME}."
            " Give the folder of a quantized component."
        )
    folder = read_folder(path)
    return folder, declared, read_foreign(path, config, declared, folder)


def find_quantized(path: Path, config: dict[str, Any], folder: TensorFolder) -> tuple[str, ForeignTensors] | None:
    """Return what quantized the checkpoint at ``path`` and what its tensors are; None where nothing says that it is.

    Raises CheckpointError, FaultsError with a sentence for each tensor that can't be read.
    """
    if not path.is_dir():
        return None
    if (path / MANIFEST_NAME).exists():
        manifest = read_checked_manifest(path)
        if faults := header_faults(manifest, folder):
            raise FaultsError(f"{path}: not the checkpoint that its manifest describes", faults)
        return manifest.tool["name"], ForeignTensors(manifest.layers, frozenset(manifest.fused_scales))
    declared = declared_quantization(path, config)
    if declared is None:
        return None
    return dialect_name(declared), read_foreign(path, config, declared, folder)


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


def read_foreign(path: Path, config: dict[str, Any], declared: dict[str, Any], folder: TensorFolder) -> ForeignTensors:
    """Return what the tensors of another tool's checkpoint are; ``path`` is for messages. Raises CheckpointError."""
    try:
        return read_tensors(declared, _specs(folder), weight_dtype(config))
    except FaultsError as error:
        raise FaultsError(f"{path}: the quantized weights can't be read", error.faults) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def weight_dtype(config: dict[str, Any]) -> str:
    """Return the dtype that the weights of a model have where they are not quantized, as its config says."""
    named = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(named).removeprefix("torch."), "BF16")


def _specs(folder: TensorFolder) -> dict[str, TensorSpec]:
    return {tensor.spec.name: tensor.spec for _, tensor in folder.tensors()}


def _as_manifest(declared: dict[str, Any], found: ForeignTensors, folder: TensorFolder) -> Manifest:
    """Return a manifest that says of another tool's checkpoint what can be known of it."""
    coded = {name for layer in found.layers.values() for name in layer.tensors.values()} | found.unused
    return Manifest(
        tool={"name": dialect_name(declared), **_version(declared)},
        source={"name": "not stated", "files": {}},
        recipe={"dialect": dialect_name(declared)},
        layers=found.layers,
        kept={name: KeptTensor(spec, "not quantized") for name, spec in _specs(folder).items() if name not in coded},
        fused_scales={},
        unquantized_linears={},
    )


def _version(declared: dict[str, Any]) -> dict[str, str]:
    producer = declared.get("producer")
    return {"version": str(producer.get("version"))} if isinstance(producer, dict) else {}
