"""A converted checkpoint written anew, shard by shard: the frame that dequantize and relayout share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.file_names import CARD_NAME, CONFIG_NAME, INDEX_SUFFIX, SUFFIX
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.checks import check_structure
from run_ckpt.storage.components import Checkpoint, find_components, open_checkpoint
from run_ckpt.storage.files import leads_outside, read_small
from run_ckpt.storage.folders import open_folder
from run_ckpt.storage.foreign import is_about_quantization
from run_ckpt.storage.hashing import describe_bytes
from run_ckpt.storage.header import Header, build_header
from run_ckpt.storage.json_files import config_text, index_parts, make_index
from run_ckpt.storage.partial import build_folder, remove_what_is_left
from run_ckpt.storage.reader import cut_bytes
from run_ckpt.storage.shards import Shard, read_folder
from run_ckpt.storage.side_files import is_side_file
from run_ckpt.storage.threads import map_threads
from run_ckpt.tools.rewrite.files import DiffersError, Files, FinishedFiles, NewFiles, TensorWriter
from run_ckpt.tools.verify.files import file_faults

_TOOL = "run-ckpt"


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one component.

    ``replaced`` maps a stored tensor to the specs that take its place, none to drop it; all other
    tensors are copied. ``writers`` maps a replaced tensor to what writes those in its place into its shard.
    ``rename`` gives a shard its new name. ``config`` is the new config.json, None for no such file;
    ``manifest`` gives the parts of the manifest for the table of files, None for none.
    """

    replaced: Mapping[str, tuple[TensorSpec, ...]]
    writers: Mapping[str, Callable[[TensorWriter], None]]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    rename: Callable[[str], str] = str
    manifest: Callable[[dict[str, dict[str, Any]]], Iterator[bytes]] | None = None


def rewrite(
    output: Path,
    target: Path,
    plan: Callable[[Checkpoint], Rewrite],
    progress: Progress,
    open_component: Callable[[Path], AbstractContextManager[Checkpoint]] = open_checkpoint,
) -> bool:
    """Write every component of ``output`` to ``target`` as ``plan`` says, which appears complete or not at all.

    Before a byte is written all components are planned, and their files hashed: a damaged shard must
    not come out with a fresh, matching manifest. Returns False where ``target`` was all that already, byte for byte.
    Raises CheckpointError.
    """
    remove_what_is_left(target, _TOOL)
    if _is_finished(output, target, plan, open_component, progress):
        return False
    faults = target_faults(output, target)
    if faults:
        raise FaultsError("nothing was written", faults)
    components = find_components(output)
    for name, path in components.items():
        with open_component(path) as checkpoint:
            plan(checkpoint)
            files = checkpoint.manifest.files
            progress.start(f"hash {name}".strip(), sum(entry["nbytes"] for entry in files.values()))
            faults += file_faults(path, files, "the manifest", progress)
    if faults:
        raise FaultsError("nothing was written: the checkpoint is damaged", faults)
    with build_folder(target, _TOOL) as result:
        for name, path in components.items():
            with open_component(path) as checkpoint, result.open_folder(name, make=True) as folder:
                progress.start(f"write {name}".strip(), sum(s.header.file_nbytes for s in checkpoint.folder.shards))
                steps = plan(checkpoint)
                with ThreadPoolExecutor(2, thread_name_prefix="flush") as background:
                    _write_component(checkpoint, NewFiles(folder, background), steps, progress)
                if steps.manifest:
                    check_structure(folder.path)
                else:
                    read_folder(folder.path)
    return True


def _is_finished(
    output: Path,
    target: Path,
    plan: Callable[[Checkpoint], Rewrite],
    open_component: Callable[[Path], AbstractContextManager[Checkpoint]],
    progress: Progress,
) -> bool:
    """True where ``target`` holds what a rewrite would write; mostly told by the first header that differs."""
    try:
        if not any(target.iterdir()):
            return False
        components = find_components(output)
        with open_folder(target) as finished:
            for name, path in components.items():
                with open_component(path) as checkpoint, finished.open_folder(name) as folder:
                    nbytes = sum(shard.header.file_nbytes for shard in checkpoint.folder.shards)
                    progress.start(f"compare {name}".strip(), nbytes)
                    _write_component(checkpoint, FinishedFiles(folder), plan(checkpoint), progress)
            return "" in components or set(finished.names()) == components.keys()
    except (OSError, ValueError, DiffersError):
        return False


def _write_component(checkpoint: Checkpoint, target: Files, steps: Rewrite, progress: Progress) -> None:
    headers = {shard.name: _new_header(shard, steps) for shard in checkpoint.folder.shards}
    headers = {name: header for name, header in headers.items() if header.tensors}
    files = {}
    for shard in checkpoint.folder.shards:
        if shard.name not in headers:  # its tensors became parts of others'
            continue
        name = steps.rename(shard.name)
        writer = target.open_shard(name, headers[shard.name])
        _write_tensors(checkpoint, shard, steps, writer, progress)
        files[name] = writer.finish()
    contents = _texts(checkpoint, headers, steps)
    for name in sorted(_side_files(checkpoint)):
        if name not in {*files, *contents, CONFIG_NAME} and not name.endswith((SUFFIX, INDEX_SUFFIX)):
            contents[name] = read_small(checkpoint.path / name)
    for name, data in contents.items():
        target.write_parts(name, [data])
        files[name] = describe_bytes(data)
    if steps.manifest:
        target.write_parts(MANIFEST_NAME, steps.manifest(files))
    target.finish([*files, *([MANIFEST_NAME] if steps.manifest else [])])


def _side_files(checkpoint: Checkpoint) -> Iterable[str]:
    """Return the names of files to copy: those that the manifest lists, or what lies beside another tool's shards."""
    if checkpoint.manifest.files:
        return checkpoint.manifest.files
    if checkpoint.path.is_file():
        return ()
    entries = [entry for entry in checkpoint.path.iterdir() if entry.is_file() and is_side_file(entry)]
    names = {entry.name for entry in entries if not leads_outside(entry)} - {CARD_NAME}
    return {name for name in names if not is_about_quantization(name)}


def _new_header(shard: Shard, steps: Rewrite) -> Header:
    specs: list[TensorSpec] = []
    for tensor in shard.header.tensors:
        specs += steps.replaced.get(tensor.spec.name, (tensor.spec,))
    return build_header(specs, steps.metadata)


def _write_tensors(
    checkpoint: Checkpoint, shard: Shard, steps: Rewrite, writer: TensorWriter, progress: Progress
) -> None:
    def write_tensor(spec: TensorSpec) -> None:
        if spec.name not in steps.replaced:
            for start, count in cut_bytes(spec.nbytes):
                writer.write(spec.name, start, checkpoint.reader.read(spec.name, start, count).numpy().data)
        elif spec.name in steps.writers:
            steps.writers[spec.name](writer)
        progress.advance(spec.nbytes)

    map_threads(write_tensor, [tensor.spec for tensor in shard.header.tensors])


def _texts(checkpoint: Checkpoint, headers: Mapping[str, Header], steps: Rewrite) -> dict[str, bytes]:
    """Return config.json and index, in the bytes convert-ckpt would write."""
    texts = {}
    if steps.config is not None:
        texts[CONFIG_NAME] = config_text(steps.config).encode()
    if checkpoint.folder.index_name:
        stored = [(tensor.spec, steps.rename(name)) for name, header in headers.items() for tensor in header.tensors]
        texts[checkpoint.folder.index_name] = b"".join(index_parts(make_index(stored)))
    return texts
