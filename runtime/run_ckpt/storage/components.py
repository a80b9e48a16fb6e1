"""A conversion's result: which components it holds, and one of them opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch

from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.file_names import CONFIG_NAME, GGUF_SUFFIX, INDEX_SUFFIX, SUFFIX, TEXT_ENCODER
from run_ckpt.contract.foreign import ForeignTensors
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.storage.checks import header_faults
from run_ckpt.storage.containers import describe_container
from run_ckpt.storage.files import similar_path
from run_ckpt.storage.json_files import read_json_object
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import TensorFolder, read_folder

# What diffusers writes at the root of a pipeline.
PIPELINE_INDEX_NAME = "model_index.json"


def find_components(path: Path, *, with_text_encoders: bool = False) -> dict[str, Path]:
    """Return component name -> folder or file, of a source or a result. A single component has the name "".

    A pipeline's folder gives each ``transformer*`` folder in it, also where the same weights lie beside these folders
    in one file (FLUX repos hold both); and each ``text_encoder*`` that is a result, or all if they are asked for.
    Raises CheckpointError where there is nothing.
    """
    if path.is_file():
        if path.suffix not in (SUFFIX, GGUF_SUFFIX):
            raise CheckpointError(describe_container(path) or f"{path}: not a {SUFFIX} file. {_what_to_give(path)}")
        return {"": path}
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such file or folder{similar_path(path)}. Give a checkpoint folder or a {SUFFIX} file."
        )
    encoders = [
        entry for entry in path.glob(f"{TEXT_ENCODER}*") if with_text_encoders or (entry / MANIFEST_NAME).is_file()
    ]
    components = {entry.name: entry for entry in sorted([*path.glob("transformer*"), *encoders]) if entry.is_dir()}
    if odd := [name for name in components if not fullmatch(r"[\w.-]+", name)]:
        raise CheckpointError(f"{path}: {odd[0]!r}: no name of a component. Rename that folder.")
    if not components and (path / PIPELINE_INDEX_NAME).is_file():
        raise CheckpointError(_no_transformer(path))
    has_weights = any(path.glob("*" + SUFFIX)) or any(path.glob("*" + INDEX_SUFFIX))
    if not components or (has_weights and not (path / PIPELINE_INDEX_NAME).is_file()):
        return {"": path}
    return components


def _what_to_give(path: Path) -> str:
    if path.suffix == ".json":  # config.json, an index, model_index.json
        return f"Give its folder: {path.parent}."
    return f"Give a checkpoint folder or a {SUFFIX} file."


def _no_transformer(path: Path) -> str:
    index, _ = read_json_object(path / PIPELINE_INDEX_NAME)
    holds = ", ".join(sorted(entry.name for entry in path.iterdir() if (entry / CONFIG_NAME).is_file()))
    return (
        f"{path.name}: a pipeline ({(index or {}).get('_class_name', 'of no class')}) without a transformer; it holds"
        f" {holds or 'no model'}. Give a pipeline with one: UNets and VAEs are not converted."
    )


@dataclass(frozen=True)
class Checkpoint:
    """A quantized component, open. From open_checkpoint its headers are exactly what its manifest implies.

    ``unused`` are tensors that no weight needs; ``foreign`` is what its tensors are where another tool wrote it.
    """

    path: Path
    manifest: Manifest
    folder: TensorFolder
    reader: TensorReader
    unused: frozenset[str] = frozenset()
    foreign: ForeignTensors | None = None


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Yield the converted component in folder ``path``, strictly checked but for its tensors' bytes.

    Raises ManifestError, or FaultsError with every fault of manifest and headers.
    """
    manifest = read_checked_manifest(path)
    folder = read_folder(path)
    faults = header_faults(manifest, folder)
    if faults:
        raise FaultsError(f"{path}: not the checkpoint that its manifest describes", faults)
    with TensorReader(folder) as reader:
        yield Checkpoint(path, manifest, folder, reader)
