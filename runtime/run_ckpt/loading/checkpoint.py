"""The checkpoint to load: of convert-ckpt with its manifest, or of another tool with its quantization_config."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError, ManifestError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX, SUFFIX
from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.loading.foreign import layers_in_headers
from run_ckpt.storage.checks import config_faults
from run_ckpt.storage.components import Checkpoint, find_components, open_checkpoint
from run_ckpt.storage.hashing import describe_file
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import read_folder


@contextmanager
def open_to_load(path: Path) -> Iterator[Checkpoint]:
    """Yield the component in folder ``path``, checked but for the bytes of its tensors.

    With a manifest: that, every header, every shard's size, and the hash of config.json and index are as it says.
    Without one (Quark, compressed-tensors, save_pretrained): config.json and the headers must agree.
    Raises CheckpointError; FaultsError with every fault.
    """
    if (path / MANIFEST_NAME).exists():
        with open_checkpoint(path) as checkpoint:
            faults = _changed_files(checkpoint)
            if faults:
                raise FaultsError(f"{path}: changed since its manifest was written", faults)
            yield checkpoint
        return
    components = find_components(path)
    if "" not in components:
        raise CheckpointError(f"{path}: holds {', '.join(components)}. Load one of them: {path / min(components)}.")
    config = _read_quantization_config(path)
    folder = read_folder(path)
    manifest = _declared_manifest(path, config, {tensor.spec.name: tensor.spec for _, tensor in folder.tensors()})
    with TensorReader(folder) as reader:
        yield Checkpoint(path, manifest, folder, reader)


def _changed_files(checkpoint: Checkpoint) -> list[str]:
    """Return a fault for each file that matters here; hashing the shards is run-ckpt verify's work."""
    files = checkpoint.manifest.files
    faults = [
        f"{name}: missing, or not the file that the manifest describes. Fetch it again, or convert again."
        for name in sorted(files)
        if (name == CONFIG_NAME or name.endswith(INDEX_SUFFIX))
        and not ((checkpoint.path / name).is_file() and describe_file(checkpoint.path / name) == files[name])
    ]
    faults += config_faults(checkpoint.path, checkpoint.manifest)
    for shard in checkpoint.folder.shards:
        listed = files.get(shard.name, {}).get("nbytes")
        if listed != shard.header.file_nbytes:
            faults.append(
                f"{shard.name}: {shard.header.file_nbytes:,} bytes, the manifest says {listed}. Fetch it again."
            )
    listed_shards = {name for name in files if name.endswith(SUFFIX)}
    faults += [
        f"{name}: the manifest lists it, the checkpoint does not use it. Fetch the folder again."
        for name in sorted(listed_shards - {shard.name for shard in checkpoint.folder.shards})
    ]
    return faults


def _read_quantization_config(path: Path) -> dict[str, Any]:
    config = (read_config(path) or {}).get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: no {MANIFEST_NAME}, and no usable {CONFIG_KEY} in {CONFIG_NAME}."
            " Give the folder of a quantized component."
        )
    private = config.get(PRIVATE_KEY, {})
    if not isinstance(private, dict):
        raise CheckpointError(f"{path}: {CONFIG_KEY}: {PRIVATE_KEY} is not an object. Fetch {CONFIG_NAME} again.")
    if "manifest" in private:
        raise ManifestError(f"{path}: lacks its {MANIFEST_NAME}. Fetch the whole folder, or convert again.")
    return config


def _declared_manifest(path: Path, config: dict[str, Any], specs: dict[str, TensorSpec]) -> Manifest:
    """Return a manifest that says of another tool's checkpoint what loading needs to know."""
    try:
        layers = layers_in_headers(config, specs)
    except FaultsError as error:
        raise FaultsError(f"{path}: the quantized weights can't be read", error.faults) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    coded = {name for layer in layers.values() for name in layer.tensors.values()}
    return Manifest(
        tool={"name": str(config["quant_method"])},
        source={},
        recipe={"dialect": config["quant_method"]},
        layers=layers,
        kept={name: KeptTensor(spec, "not quantized") for name, spec in specs.items() if name not in coded},
        fused_scales={},
        unquantized_linears={},
    )
