"""--sensitivities: what each format of a group of layers was measured to cost, instead of a prediction.

A TOML file, or the same as JSON: for every layer that a budget may choose for, the signal-to-noise ratio in dB that the
model's output has against the source's where that layer (or all of a group that shares a format) alone is stored so:

    [snr_db]
    "transformer_blocks.0.attn.to_q" = { mxfp4 = 31.2, fp8 = 45.0 }

Any member names its group; damages of several add up. In a pipeline the component stands before: "transformer/...".
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_ckpt.plan.candidates import Group, Prediction
from convert_ckpt.source.toml_files import read_toml
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.file_names import join_names
from run_ckpt.storage.files import read_text

_TABLE = "snr_db"
_MAX_DB = 1000  # beyond what float64 can measure


def read_sensitivities(path: Path, groups: Sequence[Group]) -> Prediction:
    """Return the damages of groups as measured.

    Raises UsageError for a file of another kind, FaultsError with everything that is wrong with its entries.
    """
    table = _read_table(path)
    faults: list[str] = []
    damages = []
    for group in groups:
        entries = {name: table.pop(name) for name in _names(group) if name in table}
        found = [fault for name, entry in entries.items() for fault in _entry_faults(name, entry, group)]
        faults += found if entries else [f"{_names(group)[0]}: missing, or name another layer of its group."]
        if not found:
            damages.append(
                {
                    candidate: math.fsum(10 ** (-entry[candidate] / 10) for entry in entries.values())
                    for candidate in group.layers
                }
            )
    faults += [f"{name}: no layer whose format a budget chooses; --dry-run lists the names." for name in table]
    if faults:
        raise FaultsError(f"--sensitivities {path}: can't be used", faults)
    return Prediction(f"sensitivities measured in {path.name}", "the model's output, as measured", damages)


def _names(group: Group) -> list[str]:
    return [join_names(group.component, member) for member in group.members]


def _read_table(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            document = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not a readable JSON file ({error}).") from error
    else:
        document = read_toml(path)
    table = document.get(_TABLE) if isinstance(document, dict) else None
    if not isinstance(table, dict) or len(document) > 1:
        raise UsageError(f"{path}: expected one table, [{_TABLE}], that maps layers to their formats' dB.")
    return dict(table)


def _entry_faults(name: str, entry: object, group: Group) -> Iterator[str]:
    values: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    wanted = " and ".join(group.layers)
    if values.keys() != group.layers.keys():
        yield f"{name}: gives {', '.join(values) or 'no formats'}, needs dB for {wanted}."
    for candidate, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_DB:  # NaN too
            yield f"{name}: {candidate} is {reprlib.repr(value)}, not a number of dB."
