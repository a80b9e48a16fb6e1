"""What the same source and options would become for each target: sizes without a byte written."""

from dataclasses import dataclass, replace

from convert_ckpt.options import Options
from convert_ckpt.plan.make_plan import make_plan
from convert_ckpt.source.component import Component
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.targets import TARGETS


@dataclass(frozen=True)
class TargetCost:
    """How large a result for one target is, how many layers it quantizes, and in which dialect.

    ``reason`` says why there is none; the other fields are 0 and "" then.
    """

    output_nbytes: int = 0
    n_layers: int = 0
    dialect: str = ""
    reason: str | None = None


def target_costs(source: Component, options: Options) -> dict[str, TargetCost]:
    """Return target -> cost with these options, the dialect left to the target."""
    return {name: _cost(source, replace(options, target=name, dialect=None)) for name in TARGETS}


def _cost(source: Component, options: Options) -> TargetCost:
    try:
        plan = make_plan(source, options)
    except FaultsError as error:
        return TargetCost(reason=error.faults[0])
    except UsageError as error:
        return TargetCost(reason=str(error))
    return TargetCost(plan.output_nbytes, len(plan.manifest.layers), plan.manifest.dialect)
