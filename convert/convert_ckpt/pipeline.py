"""The story of a conversion: open, plan, check, run, finish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from convert_ckpt.options import Options
from convert_ckpt.plan.candidates import Group, Prediction
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.plan.target_costs import target_costs
from convert_ckpt.planning import plan_checkpoint
from convert_ckpt.prediction import Predictor
from convert_ckpt.preview import plan_json, plan_lines, run_notes
from convert_ckpt.run.assignment import Maker, ThisMachine
from convert_ckpt.run.cluster import Cluster
from convert_ckpt.run.component import Conversion, ShardListener
from convert_ckpt.run.disk import check_disk
from convert_ckpt.run.fingerprint import fingerprint
from convert_ckpt.run.finished import is_published, is_result, result_faults
from convert_ckpt.run.memory import check_memory, default_max_memory
from convert_ckpt.run.partial_output import PREDICTION, Staging
from convert_ckpt.run.share import NOTHING, Share
from convert_ckpt.run_summary import RunSummary, summarize_run
from convert_ckpt.source.opened import EVERYTHING, Selection, open_source
from run_ckpt.contract.errors import (
    CheckpointError,
    FaultsError,
    MissingPackageError,
    NonFiniteError,
    StatisticsError,
    UsageError,
)
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.progress import Progress
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.reference import Reference

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Preview:
    """What a run would do: ``lines`` for people, and a JSON object for each of ``components``.

    ``summary`` are the lines that are not about one tensor.
    """

    lines: tuple[str, ...]
    summary: tuple[str, ...]
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

    An ``output`` that is there already is only noted: a plan takes nothing away.
    Raises UsageError where a remote source would have to be fetched to predict damages.
    """
    is_taken = output is not None and output.is_dir() and any(output.iterdir())
    if output is not None and not is_taken:
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
        predictor = Predictor(opened, options, Path(scratch), n_workers, default_max_memory(), progress)
        planned = plan_checkpoint(opened, options, predictor.predict)
        taken: tuple[str, ...] = ()
        if output is not None and is_taken:
            found = "a finished result" if is_result(output) else "other files"
            taken = (f"note: {output} is there already and holds {found}",)
        elif output is not None:
            check_disk(opened, planned.components, Staging(output))
        costs = {}
        if planned.budget is None:
            costs = {part.name: target_costs(part.source, options) for part in planned.components}
        lines, summary = (plan_lines(opened, planned, costs, tensors=tensors) for tensors in (True, False))
        return Preview((*lines, *taken), (*summary, *taken), plan_json(opened, planned, costs))


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
    cluster: Cluster | None = None,
) -> RunSummary:
    """Convert SOURCE to OUTPUT, going on where an earlier run of the same command was stopped.

    Where OUTPUT is the result of the same command, nothing is done.
    max_memory: bytes for layers whose codes are chosen by statistics; default: half of the machine's.
    listener: gets each shard as soon as it is finished, those of the earlier run first.
    share: what to make of the files; other runs make the others, at the same time or not, and the last one publishes.
    cluster: makes the files, in place of this machine.
    """
    started = time.monotonic()
    max_memory = max_memory or default_max_memory()
    staging = Staging(output, shared=share is not None)
    summarize = partial(summarize_run, reference, output, options.format, started=started)
    # What a budget chose of a remote source could be told only by fetching all of it once more.
    is_cheap = isinstance(reference, Path) or not options.has_budget or options.sensitivities
    if is_cheap and not restart and is_result(output) and not staging.folder.exists():
        plans = _find_complete(reference, output, options, selection, n_workers, max_memory, progress)
        return summarize(plans, was_complete=True)
    if restart or not staging.may_be_published():
        check_output(reference, output)
    with staging, ExitStack() as on_exit:
        pinned_revision = None if restart else staging.pinned_revision(str(reference))
        with open_source(reference, selection, progress.log, staging.skeleton, pinned_revision) as opened:
            predictor = Predictor(opened, options, staging.fetched, n_workers, max_memory, progress)
            predict = partial(_predict, reference, staging, predictor, restart)
            try:
                checkpoint = plan_checkpoint(opened, options, predict)
            except (FaultsError, UsageError):  # of a budget, after what was predicted for it
                if staging.is_adopted:
                    staging.give_up()
                raise
            plans = checkpoint.components
            if staging.may_be_published() and all(is_published(staging.output, planned) for planned in plans):
                staging.remove()
                return summarize(plans)
            check_output(reference, output)
            check_disk(opened, plans, staging, fetches=cluster is None)
            check_memory(plans, max_memory)
            for line in run_notes(opened, checkpoint):
                progress.log(line)
            maker = on_exit.enter_context(_open_maker(cluster, n_workers, max_memory))
            conversion = Conversion(opened, plans, staging, maker, progress, listener)
            if share == NOTHING and (missing := conversion.missing()):
                faults = [
                    f"{name}: no run has finished it. Run its part, or all of it without --part." for name in missing
                ]
                raise FaultsError("nothing was published", faults)
            if listener:
                names = [join_names(planned.name, file.name) for planned in plans for file in planned.plan.files]
                listener.start(names, {planned.name: planned.plan.manifest for planned in plans})
            identity = fingerprint(opened, plans, options)
            staging.adopt(identity, restart=restart and not options.has_budget)
            staging.share()
            try:
                n_resumed = conversion.make(share)
            except (NonFiniteError, StatisticsError):  # the way out is another option, which can't go on from here
                staging.give_up()
                raise
            if share:
                missing = conversion.missing()
                if missing or not staging.take_alone():
                    if share == NOTHING:
                        raise CheckpointError(
                            f"{staging.folder}: others are at work on it; the last of them publishes."
                        )
                    return summarize(plans, n_files_resumed=n_resumed, share=share, n_files_missing=len(missing))
                conversion.make()  # nothing but a look at what the others made
            manifests = conversion.complete(identity)
            if listener:
                listener.stop()
            staging.publish()
    return summarize(plans, n_files_resumed=n_resumed, manifests=manifests)


def _find_complete(
    reference: Reference,
    output: Path,
    options: Options,
    selection: Selection,
    n_workers: int,
    max_memory: int,
    progress: Progress,
) -> list[ComponentPlan]:
    """Return the plans that ``output`` is the finished result of. Raises FaultsError where it is another result."""
    with (
        TemporaryDirectory(prefix="convert-ckpt-") as scratch,
        open_source(reference, selection, progress.log, Path(scratch) / "skeleton") as opened,
    ):
        predictor = Predictor(opened, options, Path(scratch), n_workers, max_memory, progress)
        plans = plan_checkpoint(opened, options, predictor.predict).components
        if not all((output / planned.name / MANIFEST_NAME).is_file() for planned in plans):
            check_output(reference, output)
        faults = result_faults(output, opened, plans, progress)
    if faults:
        raise FaultsError("nothing was written", faults)
    return plans


@contextmanager
def _open_maker(cluster: Cluster | None, n_workers: int, max_memory: int) -> Iterator[Maker]:
    """Yield what makes the files: a Ray cluster, or this machine."""
    if cluster is None:
        yield ThisMachine(n_workers, max_memory)
        return
    try:
        from convert_ckpt.run.fleet import Fleet
    except ModuleNotFoundError as error:
        raise MissingPackageError("--engine ray needs ray: pip install 'convert-ckpt[ray]'", name="ray") from error
    with Fleet(cluster, max_memory) as fleet:
        yield fleet


def _predict(
    reference: Reference,
    staging: Staging,
    predictor: Predictor,
    restart: bool,
    components: Sequence[ComponentPlan],
    groups: Sequence[Group],
) -> Prediction:
    """Return what an earlier run predicted, or predict it and keep it for the next."""
    if not staging.may_be_published():
        check_output(reference, staging.output)
        check_disk(predictor.opened, components, staging)
        check_memory(components, predictor.max_memory)
    staging.adopt(fingerprint(predictor.opened, components, predictor.options), restart=restart)
    known = staging.read_records(PREDICTION)
    if known:
        return Prediction(**known[PREDICTION])
    prediction = predictor.predict(components, groups)
    staging.write_record(PREDICTION, PREDICTION, asdict(prediction))
    return prediction


def check_output(reference: Reference, output: Path) -> None:
    """Raise FaultsError with every reason why OUTPUT is not a place to write to."""
    faults = target_faults(reference if isinstance(reference, Path) else None, output)
    if faults:
        raise FaultsError("nothing was written", faults)
