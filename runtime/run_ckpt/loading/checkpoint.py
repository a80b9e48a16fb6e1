"""The checkpoint to load: of convert-ckpt with its manifest, or of another tool with its quantization_config."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.file_names import CONFIG_NAME, INDEX_SUFFIX, SUFFIX
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.manifest import MANIFEST_NAME, WEIGHT_SCALE
from run_ckpt.loading.stacked import unstacked
from run_ckpt.storage.checks import config_faults
from run_ckpt.storage.components import Checkpoint, open_checkpoint
from run_ckpt.storage.foreign import open_foreign
from run_ckpt.storage.hashing import describe_file


@contextmanager
def open_to_load(path: Path) -> Iterator[Checkpoint]:
    """Yield the component in folder ``path``, checked but for the bytes of its tensors.

    With a manifest: that, every header, every shard's size, and the hash of config.json and index are as it says.
    Without one (Quark, compressed-tensors, save_pretrained): config.json and the headers must agree.
    Experts that are stacked are seen one by one. Raises CheckpointError; FaultsError with every fault.
    """
    if (path / MANIFEST_NAME).exists():
        with open_checkpoint(path) as checkpoint:
            faults = _changed_files(checkpoint)
            if faults:
                raise FaultsError(f"{path}: changed since its manifest was written", faults)
            yield unstacked(checkpoint)
        return
    with open_foreign(path) as checkpoint:
        if why := _reason_not_to_load(checkpoint):
            raise CheckpointError(f"{path}: {why} run-ckpt dequantize writes them as numbers.")
        yield unstacked(checkpoint)


def _reason_not_to_load(checkpoint: Checkpoint) -> str | None:
    """Return why no layer here takes the weights of another tool's checkpoint, None where they are taken."""
    assert checkpoint.foreign
    unfit = [
        layer
        for layer in checkpoint.manifest.layers.values()
        if layer.format.name not in FORMATS or WEIGHT_SCALE not in layer.tensors
    ]
    if not unfit:
        return None
    scale = "" if WEIGHT_SCALE in unfit[0].tensors else " without a scale"
    return (
        f"{unfit[0].module} is stored as {unfit[0].format.label}{scale}, which no layer here takes; convert-ckpt does."
    )


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
