"""What a run did, as a record and in the lines that end it."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.share import Share
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.targets import TARGETS
from run_ckpt.storage.manifest_file import read_manifest, result_hash
from run_ckpt.storage.reference import Reference
from run_ckpt.storage.units import format_nbytes

if TYPE_CHECKING:
    from run_ckpt.tools.publish.push import Pushed


@dataclass(frozen=True)
class RunSummary:
    """What a run did, all components together.

    ``n_converted`` of ``n_tensors`` tensors were quantized, the others copied; ``n_layers`` counts them by format,
    ``format`` is the one that was asked for, ``targets`` are those that the result is right for. Sizes are those of all
    shards. SQNR is over layers, unweighted, in dB; None where nothing was measured.
    ``n_files_resumed`` shards were finished by an earlier, stopped run; ``was_complete``: all that was asked for was
    there before. ``hash`` is the one that verify --expect takes. ``share`` is None where OUTPUT is published; else the
    share that was made, after which ``n_files_missing`` were still to come. ``pushed`` says what was uploaded.
    """

    source: str
    output: str
    format: str
    n_layers: dict[str, int]
    targets: tuple[str, ...]
    n_converted: int
    n_tensors: int
    source_nbytes: int
    output_nbytes: int
    mean_sqnr_db: float | None
    worst_sqnr_db: float | None
    worst_layer: str | None
    n_files_resumed: int
    was_complete: bool
    seconds: float
    hash: str | None = None
    share: Share | None = None
    n_files_missing: int = 0
    pushed: Pushed | None = None

    def __str__(self) -> str:
        if self.share:
            rest = f"{self.n_files_missing} files are to come" if self.n_files_missing else "other runs are at work"
            return f"Part {self.share} of {self.output} is finished in {self.seconds:.3g} s; {rest}, the last publishes"
        lines = [self._result(), *([str(self.pushed)] if self.pushed else [])]
        if self.worst_sqnr_db is not None:
            lines.append(
                f"SQNR mean {self.mean_sqnr_db:.2f} dB, worst {self.worst_sqnr_db:.2f} dB in {self.worst_layer}"
            )
        mixed = "Formats are mixed; right" if len(self.n_layers) > 1 else "Right"
        lines.append(f"{mixed} for: {', '.join(self.targets)}")
        expect = f"A copy is this result if run-ckpt verify COPY --expect {self.hash} finds no fault"
        if "://" in self.output:
            return "\n".join([*lines, f"It is in {self.output}.", expect])
        check = shlex.join(["run-ckpt", "verify", self.output, "--source", self.source])
        return "\n".join([*lines, f"It is in {self.output}. Check it:", f"  {check}", expect])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; of the push its URL."""
        values = asdict(replace(self, pushed=None))
        del values["pushed"]
        values["share"] = str(self.share) if self.share else None
        return {**values, **({"pushed_to": self.pushed.url} if self.pushed else {})}

    def _result(self) -> str:
        formats = next(iter(self.n_layers), self.format)
        if len(self.n_layers) > 1:
            formats = " and ".join(f"{name} ({count})" for name, count in sorted(self.n_layers.items()))
        what = (
            f"{self.n_converted} of {self.n_tensors} tensors to {formats}:"
            f" {format_nbytes(self.source_nbytes)} -> {format_nbytes(self.output_nbytes)}"
        )
        if self.was_complete:
            return f"Complete: this command was done before.\nConverted {what}"
        resumed = f", {self.n_files_resumed} finished files taken over" if self.n_files_resumed else ""
        return f"Converted {what} in {self.seconds:.3g} s{resumed}"


def summarize_run(
    reference: Reference,
    output: Path,
    weight_format: str,
    plans: Sequence[ComponentPlan],
    *,
    started: float,
    n_files_resumed: int = 0,
    was_complete: bool = False,
    share: Share | None = None,
    n_files_missing: int = 0,
    manifests: Mapping[str, Manifest] | None = None,
) -> RunSummary:
    """Return the summary of a run. started: by time.monotonic().

    manifests: those of the result; default: of a ``share``, as planned, else as they are at ``output``.
    """
    digest = None if share else result_hash({planned.name: output / planned.name for planned in plans})
    manifests = manifests or {
        planned.name: planned.plan.manifest if share else read_manifest(output / planned.name) for planned in plans
    }
    layers = {
        join_names(name, module): layer for name, found in manifests.items() for module, layer in found.layers.items()
    }
    sqnr_db = {path: layer.sqnr_db for path, layer in layers.items() if layer.sqnr_db is not None}
    worst = min(sqnr_db, key=sqnr_db.__getitem__, default=None)
    return RunSummary(
        source=str(reference),
        output=os.fspath(output),
        format=weight_format,
        n_layers=dict(Counter(layer.format.name for layer in layers.values())),
        targets=tuple(name for name in TARGETS if all(found.targets[name] is None for found in manifests.values())),
        n_converted=len(layers),
        n_tensors=sum(len(planned.plan.tensors) for planned in plans),
        source_nbytes=sum(shard.header.file_nbytes for planned in plans for shard in planned.source.folder.shards),
        output_nbytes=sum(planned.plan.output_nbytes for planned in plans),
        mean_sqnr_db=round(fmean(sqnr_db.values()), 2) if sqnr_db else None,
        worst_sqnr_db=sqnr_db[worst] if worst else None,
        worst_layer=worst,
        n_files_resumed=n_files_resumed,
        was_complete=was_complete,
        hash=digest,
        share=share,
        n_files_missing=n_files_missing,
        seconds=time.monotonic() - started,
    )
