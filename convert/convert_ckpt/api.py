"""The command's options as Python arguments: ``convert`` and ``plan_conversion``."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from convert_ckpt.options import Options
from convert_ckpt.pipeline import Preview, convert_checkpoint, preview_checkpoint
from convert_ckpt.run.cluster import ENGINES, LOCAL, Cluster
from convert_ckpt.run.share import NOTHING, Share, parse_share
from convert_ckpt.run_summary import RunSummary
from convert_ckpt.source.opened import Selection
from run_ckpt.contract.errors import UsageError
from run_ckpt.progress import Progress, Silent
from run_ckpt.storage.components import find_components
from run_ckpt.storage.pipelines import link_rest, pipeline_folder
from run_ckpt.storage.reference import Reference, UrlRef, parse_reference
from run_ckpt.storage.units import parse_nbytes


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    format: str,
    target: str | None = None,
    layout: str | None = None,
    granularity: str | None = None,
    scale_rule: str | None = None,
    dialect: str | None = None,
    preset: str | None = None,
    recipe: str | PathLike[str] | None = None,
    ignore: str | Sequence[str] = (),
    calibration: str | PathLike[str] | None = None,
    method: str | None = None,
    static: bool = False,
    fold: bool = False,
    shard_size: int | str | None = None,
    max_size: int | str | None = None,
    min_sqnr: float | None = None,
    sensitivities: str | PathLike[str] | None = None,
    keep_first: int = Options.keep_first,
    keep_last: int = Options.keep_last,
    allow_unaligned_k: bool = False,
    swap_weight_nibbles: bool = False,
    component: str | Sequence[str] = (),
    keep_source: bool = False,
    whole_pipeline: bool = False,
    restart: bool = False,
    workers: int | None = None,
    max_memory: int | str | None = None,
    part: str | None = None,
    finalize: bool = False,
    engine: str = LOCAL,
    ray_address: str | None = None,
    ray_workers: int | None = None,
    push_to_hub: str | None = None,
    push_at_end: bool = False,
    revision: str | None = None,
    private: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    tool_url: str | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Convert the checkpoint ``source``, write it to the folder ``output``, and return what was done.

    ``output`` appears complete or not at all. A call that was stopped is continued by the same call. It may be a URL
    that fsspec opens: then it is built in the folder NAME.upload of the current one, and uploaded, the manifest last.

    source: a folder with config.json and safetensors shards, a pipeline folder, one .safetensors file,
    owner/name[@revision] on the Hugging Face Hub, or a URL that fsspec opens. It is only read.

    format to swap_weight_nibbles decide the bytes: the fields of Options say what each does.
    component: transformers of a pipeline to convert, by name or pattern. Default: all of them.
    keep_source: keep what is fetched, in the Hub's own cache. Default: a shard is removed once it is converted.
    whole_pipeline: link all else of a pipeline into ``output``, so that it loads whole; of the Hub, from its cache.
    restart: throw away what a stopped run left in OUTPUT.partial.
    workers: threads. Default: one more than there are cores, at most 8.
    max_memory: bytes, or a size such as "8GB", that layers may take together whose codes are chosen by statistics.
        Default: half of the machine's.
    part: make this share of the shards, such as "3/16", and leave the others to calls on other machines that share
        ``output``, in any order. The one that finds all shards finished publishes.
    finalize: make nothing, publish what the parts made; the call for when no part found all shards finished.
    engine: "local", or "ray": tasks on a Ray cluster whose machines share ``output``, and ``source`` if that is a path.
    ray_address: of the cluster, "auto" for the one that this machine is part of. Default: RAY_ADDRESS, or a cluster of
        this machine alone.
    ray_workers: tasks at once, with ``workers`` threads each (default: up to 4). Default: as many as fit.

    push_to_hub: repo owner/name to upload the result to, each shard as soon as it is finished.
    push_at_end: upload all shards at the end instead.
    revision: branch to push to, made if missing. Default: main.
    private: make a new repo private.
    commit_message: title of the last commit.
    overwrite: replace what the repo holds.
    base_model: what the model card names as base. Default: ``source``, if that is on the Hub.
    tool_url: where the model card says this tool is. Default: $CONVERT_CKPT_URL, or what the installed package says.

    progress: what the run reports to, from any of its threads. Default: nothing.

    Raises UsageError for arguments that contradict each other, FaultsError with every reason why the source
    can't be converted, other kinds of CheckpointError (FetchError, PublishError, ...) and OSError.
    """
    options = Options(
        format=format,
        target=target,
        layout=layout,
        granularity=granularity,
        scale_rule=scale_rule,
        dialect=dialect,
        preset=preset,
        recipe=_path(recipe),
        ignore=_strings(ignore),
        calibration=_path(calibration),
        method=method,
        static=static,
        fold=fold,
        shard_size=shard_size,
        max_size=max_size,
        min_sqnr=min_sqnr,
        sensitivities=_path(sensitivities),
        keep_first=keep_first,
        keep_last=keep_last,
        allow_unaligned_k=allow_unaligned_k,
        swap_weight_nibbles=swap_weight_nibbles,
    )
    progress = progress or Silent()
    run = partial(
        convert_checkpoint,
        parse_reference(os.fspath(source)),
        options=options,
        n_workers=_count_workers(workers),
        max_memory=parse_nbytes(max_memory) if isinstance(max_memory, str) else max_memory,
        restart=restart,
        progress=progress,
        selection=Selection(_strings(component), keep_source),
        share=_choose_share(part, finalize, restart=restart, push_to_hub=push_to_hub, ray_address=ray_address),
        cluster=_choose_cluster(engine, ray_address, ray_workers, workers),
    )
    place = {"revision": revision, "private": private, "commit_message": commit_message, "overwrite": overwrite}
    place["tool_url"] = tool_url
    if whole_pipeline:
        if push_to_hub or part or finalize:
            raise UsageError("--whole-pipeline is for a run of its own: leave out --push-to-hub, --part, --finalize.")
        if url := _url(output):
            raise UsageError(f"--whole-pipeline: needs a folder here as OUTPUT, not {url}.")
        run = partial(_with_rest, run, parse_reference(os.fspath(source)), _strings(component))
    if push_to_hub is None:
        _refuse_unused({"push_at_end": push_at_end, "base_model": base_model, **place})
        if url := _url(output):
            from convert_ckpt.upload import convert_and_upload

            if part or finalize:
                raise UsageError("--part, --finalize: need a folder as OUTPUT that all machines share.")
            return convert_and_upload(run, url, progress)
        return run(output=_output(output))
    if url := _url(output):
        raise UsageError(f"--push-to-hub: needs a folder here as OUTPUT, not {url}.")
    from convert_ckpt.push import convert_and_push

    place["repo_id"] = push_to_hub
    run = partial(run, output=_output(output))
    return convert_and_push(run, _output(output), place, base_model=base_model, at_end=push_at_end, progress=progress)


def _with_rest(
    run: Callable[..., RunSummary], reference: Reference, components: tuple[str, ...], *, output: Path
) -> RunSummary:
    """Run, then link the rest of the pipeline, which is looked for first."""
    base = pipeline_folder(reference, components or ("transformer*",))
    summary = run(output=output)
    link_rest(base, output, find_components(output))
    return summary


def plan_conversion(
    source: str | PathLike[str],
    options: Options,
    *,
    output: str | PathLike[str] | None = None,
    component: str | Sequence[str] = (),
    keep_source: bool = False,
    progress: Progress | None = None,
) -> Preview:
    """Return what each tensor of ``source`` would become and why, with exact sizes; write nothing.

    It reads headers and small files only; within a budget without sensitivities all weights, too. ``output``, if given,
    is checked as a place to write to, and its disk for space. The other arguments and what is raised are as for
    ``convert``.
    """
    return preview_checkpoint(
        parse_reference(os.fspath(source)),
        None if output is None or _url(output) else _output(output),
        options,
        n_workers=_count_workers(None),
        selection=Selection(_strings(component), keep_source),
        progress=progress or Silent(),
    )


def _output(output: str | PathLike[str]) -> Path:
    if not os.fspath(output):
        raise UsageError("OUTPUT is empty. Give a folder; . is the current one.")
    return Path(output)


def _url(output: str | PathLike[str]) -> UrlRef | None:
    """Return OUTPUT as a URL of an object store, None for a folder here."""
    scheme, separator, _ = os.fspath(output).partition("://")
    if scheme == "hf":
        raise UsageError(f"{output}: give a folder, and the repo with --push-to-hub OWNER/NAME.")
    return UrlRef(os.fspath(output)) if separator else None


def _path(path: str | PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _strings(values: str | Sequence[str]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else tuple(values)


def _count_workers(workers: int | None) -> int:
    if workers is None:
        return min(8, (os.cpu_count() or 1) + 1)
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one thread is needed.")
    return workers


def _choose_share(part: str | None, finalize: bool, **others: object) -> Share | None:
    if part is None and not finalize:
        return None
    asked = "finalize" if finalize else "part"
    for name, value in {**others, **({"part": part} if finalize else {})}.items():
        if value:
            raise UsageError(f"--{asked}: does not go with --{name.replace('_', '-')}.")
    return parse_share(part) if part else NOTHING


def _choose_cluster(engine: str, address: str | None, n_tasks: int | None, n_threads: int | None) -> Cluster | None:
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: unknown. Choose one of {', '.join(ENGINES)}.")
    if engine == LOCAL and (address or n_tasks):
        raise UsageError("--ray-address, --ray-workers: go with --engine ray.")
    if address and address.startswith("ray://"):
        raise UsageError(f"--ray-address {address}: run this on a machine of the cluster, with auto or HOST:PORT.")
    if n_tasks is not None and n_tasks < 1:
        raise UsageError(f"--ray-workers {n_tasks}: at least one is needed.")
    return None if engine == LOCAL else Cluster(address, n_tasks, n_threads)


def _refuse_unused(push_options: dict[str, Any]) -> None:
    for name, value in push_options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} goes with --push-to-hub OWNER/NAME.")
