"""The story of a conversion: open, plan, check, run, finish."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from convert_ckpt.curve import budget_line
from convert_ckpt.options import Options
from convert_ckpt.plan.candidates import Group, Prediction
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.plan.target_costs import target_costs
from convert_ckpt.planning import Planned, plan_checkpoint
from convert_ckpt.prediction import predict_damages
from convert_ckpt.preview import plan_json, plan_lines
from convert_ckpt.run.component import Conversion, ShardListener, is_published
from convert_ckpt.run.disk import check_disk
from convert_ckpt.run.fingerprint import fingerprint
from convert_ckpt.run.memory import check_memory, default_max_memory, memory_lines
from convert_ckpt.run.partial_output import PREDICTION, Staging
from convert_ckpt.run.share import NOTHING, Share
from convert_ckpt.source.opened import EVERYTHING, OpenedSource, Selection, open_source
from convert_ckpt.source.reference import Reference
from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.targets import TARGETS
from run_ckpt.progress import Progress
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.checks import check_structure
from run_ckpt.storage.units import format_nbytes

if TYPE_CHECKING:
    from run_ckpt.tools.publish.push import Pushed


@dataclass(frozen=True)
class RunSummary:
    """What a run did, all components together.

    ``n_layers`` counts the quantized layers by format, ``format`` is the one that was asked for,
    ``targets`` are those that it is right for.
    ``n_converted`` of ``n_tensors`` tensors were quantized, the others copied. Sizes are those of all shards.
    ``n_files_resumed`` shards were finished by an earlier, stopped run. ``pushed`` says what was uploaded. ``share`` is
    None where OUTPUT is published; else the share that was made, after which ``n_files_missing`` were still to come.
    """

    output: str
    format: str
    n_layers: dict[str, int]
    targets: tuple[str, ...]
    n_converted: int
    n_tensors: int
    source_nbytes: int
    output_nbytes: int
    n_files_resumed: int
    seconds: float
    pushed: Pushed | None = None
    share: Share | None = None
    n_files_missing: int = 0

    def __str__(self) -> str:
        if self.share:
            rest = f"{self.n_files_missing} files are to come" if self.n_files_missing else "other runs are at work"
            return f"Part {self.share} of {self.output} is finished in {self.seconds:.3g} s; {rest}, the last publishes"
        formats = self.format
        if len(self.n_layers) > 1:
            formats = " and ".join(f"{name} ({count})" for name, count in sorted(self.n_layers.items()))
        resumed = f", {self.n_files_resumed} finished files taken over" if self.n_files_resumed else ""
        return (
            f"Converted {self.n_converted} of {self.n_tensors} tensors to {formats}:"
            f" {format_nbytes(self.source_nbytes)} -> {format_nbytes(self.output_nbytes)}"
            f" in {self.seconds:.3g} s{resumed}"
            + (f"\n{self.pushed}" if self.pushed else "")
            + (f"\nFormats are mixed; right for: {', '.join(self.targets)}" if len(self.n_layers) > 1 else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; of the push its URL."""
        values = asdict(replace(self, pushed=None))
        del values["pushed"]
        values["share"] = str(self.share) if self.share else None
        return {**values, **({"pushed_to": self.pushed.url} if self.pushed else {})}


@dataclass(frozen=True)
class Preview:
    """What a run would do: ``lines`` for people, and a JSON object for each of ``components``."""

    lines: tuple[str, ...]
    components: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def preview_checkpoint(
    reference: Reference,
    output: Path | None,
    options: Options,
    *,
    n_workers: int,
    selection: Selection,
    progress: Progress,
) -> Preview:
    """Plan a conversion and write nothing. ``output``, if given, is checked, and its disk for space.

    Raises UsageError where a remote source would have to be fetched to predict damages.
    """
    if output is not None:
        check_output(reference, output)
    with (
        TemporaryDirectory(prefix="convert-ckpt-") as scratch,
        open_source(reference, selection, progress.log, Path(scratch) / "skeleton") as opened,
    ):
        if opened.store and options.has_budget and not options.sensitivities:
            raise UsageError(
                f"--dry-run {options.budget}: all of {reference} would be fetched to predict what each format costs."
                " Copy it first, give --sensitivities, or convert without --dry-run."
            )
        planned = plan_checkpoint(opened, options, partial(predict_damages, opened, Path(scratch), n_workers, progress))
        if output is not None:
            check_disk(opened, planned.components, Staging(output))
        costs = {}
        if planned.budget is None:
            costs = {part.name: target_costs(part.source, options) for part in planned.components}
        return Preview(tuple(plan_lines(opened, planned, costs)), plan_json(planned, costs))


def convert_checkpoint(
    reference: Reference,
    output: Path,
    options: Options,
    *,
    n_workers: int,
    restart: bool,
    progress: Progress,
    selection: Selection = EVERYTHING,
    listener: ShardListener | None = None,
    max_memory: int | None = None,
    share: Share | None = None,
) -> RunSummary:
    """Convert SOURCE to OUTPUT, going on where an earlier run of the same command was stopped.

    max_memory: bytes for layers whose codes are chosen by statistics; default: half of the machine's.
    listener: gets each shard as soon as it is finished, those of the earlier run first.
    share: what to make of the files; other runs make the others, at the same time or not, and the last one publishes.
    """
    started = time.monotonic()
    max_memory = max_memory or default_max_memory()
    staging = Staging(output, shared=share is not None)
    if restart or not staging.may_be_published():
        check_output(reference, output)
    with staging:
        pinned_revision = None if restart else staging.pinned_revision(str(reference))
        with open_source(reference, selection, progress.log, staging.skeleton, pinned_revision) as opened:
            predict = partial(
                _predict, reference, opened, options, staging, n_workers, restart=restart, progress=progress
            )
            checkpoint = plan_checkpoint(opened, options, predict)
            plans = checkpoint.components
            if staging.may_be_published() and all(is_published(staging.output, planned) for planned in plans):
                staging.remove()
                return _summarize(output, options, plans, 0, time.monotonic() - started)
            check_output(reference, output)
            check_disk(opened, plans, staging)
            check_memory(plans, max_memory)
            for line in plan_lines(opened, checkpoint, {}) if opened.store else _short_lines(checkpoint):
                progress.log(line)
            conversion = Conversion(opened, plans, staging, n_workers, max_memory, progress, listener)
            if share == NOTHING and (missing := conversion.missing()):
                faults = [
                    f"{name}: no run has finished it. Run its part, or all of it without --part." for name in missing
                ]
                raise FaultsError("nothing was published", faults)
            staging.adopt(fingerprint(opened, plans, options), restart=restart and not options.has_budget)
            staging.share()
            if listener:
                listener.start(join_names(planned.name, file.name) for planned in plans for file in planned.plan.files)
            n_resumed = conversion.make(share)
            if share:
                missing = conversion.missing()
                if missing or not staging.take_alone():
                    if share == NOTHING:
                        raise CheckpointError(
                            f"{staging.folder}: others are at work on it; the last of them publishes."
                        )
                    summary = _summarize(output, options, plans, n_resumed, time.monotonic() - started)
                    return replace(summary, share=share, n_files_missing=len(missing))
                conversion.make()  # nothing but a look at what the others made
            conversion.complete()
            if listener:
                listener.stop()
            for planned in plans:
                check_structure(staging.result / planned.name)
            staging.publish()
    return _summarize(output, options, plans, n_resumed, time.monotonic() - started)


def _short_lines(checkpoint: Planned) -> Iterator[str]:
    yield from memory_lines(checkpoint.components)
    if checkpoint.budget:
        yield budget_line(checkpoint.budget)


def _predict(
    reference: Reference,
    opened: OpenedSource,
    options: Options,
    staging: Staging,
    n_workers: int,
    components: Sequence[ComponentPlan],
    groups: Sequence[Group],
    *,
    restart: bool,
    progress: Progress,
) -> Prediction:
    """Return what an earlier run predicted, or predict it and keep it for the next."""
    if not staging.may_be_published():
        check_output(reference, staging.output)
        check_disk(opened, components, staging)
    staging.adopt(fingerprint(opened, components, options), restart=restart)
    known = staging.read_records(PREDICTION)
    if known:
        return Prediction(**known[PREDICTION])
    prediction = predict_damages(opened, staging.fetched, n_workers, progress, components, groups)
    staging.write_record(PREDICTION, PREDICTION, asdict(prediction))
    return prediction


def check_output(reference: Reference, output: Path) -> None:
    """Raise FaultsError with every reason why OUTPUT is not a place to write to."""
    faults = target_faults(reference if isinstance(reference, Path) else None, output)
    if faults:
        raise FaultsError("nothing was written", faults)


def _summarize(
    output: Path, options: Options, plans: list[ComponentPlan], n_resumed: int, seconds: float
) -> RunSummary:
    return RunSummary(
        output=os.fspath(output),
        format=options.format,
        n_layers=dict(
            Counter(layer.format.name for planned in plans for layer in planned.plan.manifest.layers.values())
        ),
        targets=tuple(
            name for name in TARGETS if all(planned.plan.manifest.targets[name] is None for planned in plans)
        ),
        n_converted=sum(len(planned.plan.manifest.layers) for planned in plans),
        n_tensors=sum(len(planned.plan.tensors) for planned in plans),
        source_nbytes=sum(shard.header.file_nbytes for planned in plans for shard in planned.source.folder.shards),
        output_nbytes=sum(planned.plan.output_nbytes for planned in plans),
        n_files_resumed=n_resumed,
        seconds=seconds,
    )
