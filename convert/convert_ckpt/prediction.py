"""Predict what each format costs each group of layers, by one pass over the weights of all components."""

from collections.abc import Sequence
from pathlib import Path

from convert_ckpt.plan.candidates import Group, Prediction, predict_by_weights
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.progress import Progress


def predict_damages(
    opened: OpenedSource,
    fetched: Path,
    n_workers: int,
    progress: Progress,
    components: Sequence[ComponentPlan],
    groups: Sequence[Group],
) -> Prediction:
    """Return the damage of each group in each of its formats. fetched: folder for shards of a remote source."""
    from convert_ckpt.run.damage import measure_damages  # its kernels are nothing that other plans need

    measured = {}
    for planned in components:
        own = [group for group in groups if group.component == planned.name]
        shards = planned.source.folder.shards
        provider = opened.provide_shards(planned.name, shards, fetched / (planned.name or "root"), progress)
        measured[planned.name] = measure_damages(planned.source, own, provider, n_workers, progress)
    return predict_by_weights(groups, measured)
