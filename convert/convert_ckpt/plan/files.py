"""The output files of a plan: which tensors each holds, and under which names."""

import re
from collections.abc import Iterable, Iterator

from convert_ckpt.plan.plan import FilePlan, TensorPlan
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.table import DIALECTS, header_metadata
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import INDEX_SUFFIX, SUFFIX, as_safetensors
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import build_header
from run_ckpt.storage.shards import MAIN_STEMS

_NUMBER = re.compile(r"-\d+-of-\d+$")


def make_files(
    source: Component, tensors: tuple[TensorPlan, ...], manifest: Manifest, max_nbytes: int | None
) -> tuple[FilePlan, ...]:
    """One output shard per source shard, or a single file where the dialect wants one.

    max_nbytes: of tensors in a file; a source shard that gives more becomes several files. The tensors of a layer stay
    together, and one that is larger is a file of its own. A translated file gets the name that diffusers looks for.
    """
    fused: dict[str, list[TensorSpec]] = {}
    for scale in manifest.fused_scales.values():
        fused.setdefault(scale.members[0], []).append(scale.spec)
    outputs: dict[str, list[tuple[TensorSpec, ...]]] = {}
    for tensor in tensors:
        layer = tensor.layer
        specs = (*layer.specs().values(), *fused.get(layer.module, ())) if layer else (tensor.spec,)
        outputs.setdefault(tensor.shard, []).append(specs)
    metadata = header_metadata(manifest)
    file_name = DIALECTS[manifest.dialect].file_name
    if file_name and max_nbytes is not None:
        raise UsageError(f"--shard-size: dialect {manifest.dialect} is one file, {file_name}. Leave it out.")
    if source.translation and source.naming == "diffusers" and len(outputs) == 1:
        file_name = file_name or MAIN_STEMS[0] + SUFFIX
    parts = {shard: list(_cut(groups, max_nbytes)) for shard, groups in outputs.items()}
    n_files = sum(map(len, parts.values()))
    if (file_name and n_files == 1) or (file_name and max_nbytes is None):
        merged = [spec for cut in parts.values() for specs in cut for spec in specs]
        return (FilePlan(file_name, build_header(merged, metadata), tuple(outputs)),)
    # A shard of nothing but scales becomes no file; it is read, and hashed, with the first one.
    rest = tuple(shard.name for shard in source.folder.shards if source.quantization and shard.name not in outputs)
    first = next(iter(outputs))
    names = (
        map(as_safetensors, outputs)
        if n_files == len(outputs)
        else _numbered(_stem(source, file_name or as_safetensors(first)), n_files)
    )
    return tuple(
        FilePlan(next(names), build_header(specs, metadata), (shard, *(rest if shard == first else ())))
        for shard, cut in parts.items()
        for specs in cut
    )


def _cut(groups: Iterable[tuple[TensorSpec, ...]], max_nbytes: int | None) -> Iterator[list[TensorSpec]]:
    """Yield the tensors of each file, none of ``groups`` divided."""
    specs: list[TensorSpec] = []
    nbytes = 0
    for group in groups:
        more = 0 if max_nbytes is None else sum(spec.nbytes for spec in group)
        if specs and max_nbytes is not None and nbytes + more > max_nbytes:
            yield specs
            specs, nbytes = [], 0
        specs.extend(group)
        nbytes += more
    yield specs


def _stem(source: Component, name: str) -> str:
    """Return the name of the shards without their number, as the index has it."""
    index = source.folder.index_name
    return index.removesuffix(INDEX_SUFFIX) if index else _NUMBER.sub("", name.removesuffix(SUFFIX))


def _numbered(stem: str, n_files: int) -> Iterator[str]:
    return (f"{stem}-{number:05}-of-{n_files:05}{SUFFIX}" for number in range(1, n_files + 1))
