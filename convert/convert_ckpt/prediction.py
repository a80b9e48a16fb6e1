"""Predict what each format costs each group of layers, by one pass over the weights of all components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert_ckpt.options import Options
from convert_ckpt.plan.calibration import calibration_faults, read_calibration
from convert_ckpt.plan.candidates import FISHER, OUTPUTS, WEIGHTS, Group, Prediction, predict
from convert_ckpt.plan.decisions import choose_rules
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.memory import n_workers_within
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.errors import FaultsError
from run_ckpt.progress import Progress
from run_ckpt.storage.layer_statistics import InputStatistics


@dataclass(frozen=True)
class Predictor:
    """How a pass is run. fetched: folder for shards of a remote source; max_memory: of layers with statistics."""

    opened: OpenedSource
    options: Options
    fetched: Path
    n_workers: int
    max_memory: int
    progress: Progress

    def predict(self, components: Sequence[ComponentPlan], groups: Sequence[Group]) -> Prediction:
        """Return the damage of each group in each of its formats, by the best that statistics allow.

        Raises FaultsError where statistics choose codes, but of some layers there are none.
        """
        from convert_ckpt.run.damage import measure_damages  # its kernels are nothing that other plans need

        statistics = {planned.name: self._read_statistics(planned, groups) for planned in components}
        measured = {}
        for planned in components:
            own = [group for group in groups if group.component == planned.name]
            shards, folder = planned.source.folder.shards, self.fetched / (planned.name or "root")
            provider = self.opened.provide_shards(planned.name, shards, folder, self.progress)
            n_workers = n_workers_within(self.max_memory, planned.plan, self.n_workers)
            found = statistics[planned.name]
            measured[planned.name] = measure_damages(
                planned.plan.tensors, own, found, provider, n_workers, self.progress
            )
        every = [found for of_component in statistics.values() for found in of_component.values()]
        proxy = FISHER if all(found.has_fisher for found in every) else OUTPUTS
        return predict(proxy if every else WEIGHTS, groups, measured)

    def _read_statistics(self, planned: ComponentPlan, groups: Sequence[Group]) -> Mapping[str, InputStatistics]:
        """Return the statistics of the candidates of a component, {} where none choose codes."""
        calibration = read_calibration(choose_rules(planned.source, self.options)[0])
        layers = {
            layer.module: layer
            for group in groups
            if group.component == planned.name
            for candidates in group.layers.values()
            for layer in candidates
        }
        if not calibration.gptq:
            return {}
        if faults := calibration_faults(calibration, planned.source, layers):
            raise FaultsError(f"{planned.source.name}: can't be converted as asked", faults)
        return {module: calibration.statistics[module] for module in layers}
