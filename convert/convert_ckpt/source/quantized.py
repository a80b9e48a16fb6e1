"""A source that is quantized already: which tensors are codes, what they stand for, and where their scales lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import CheckpointError, FaultsError, MissingPackageError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME
from run_ckpt.contract.foreign import ForeignTensors
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.storage.foreign import find_quantized
from run_ckpt.storage.header import StoredTensor
from run_ckpt.storage.shards import TensorFolder
from run_ckpt.storage.views import View, whole_views

_PURE_CODES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_NAMES = re.compile(
    r".*\.(weight_scale|weight_scale_inv|weight_scale_2|weight_packed|input_scale|qweight|qzeros|scales|absmax"
    r"|weight_quantizer\..*|SCB|quant_state\..*)"
)


@dataclass(frozen=True)
class EncodedWeight:
    """A weight in codes: its layer as stored, and where each tensor of it lies, role -> (shard, tensor)."""

    layer: Layer
    parts: Mapping[str, tuple[str, StoredTensor]]

    def stored_row(self, offset: int) -> int:
        """Return the row whose codes begin at byte ``offset`` of their shard."""
        return self.n_rows(offset - self.parts[WEIGHT][1].offset)

    def n_rows(self, nbytes: int) -> int:
        """Return how many rows so many bytes of codes are."""
        return nbytes * self.layer.N // self.parts[WEIGHT][1].spec.nbytes

    @property
    def shards(self) -> frozenset[str]:
        return frozenset(shard for shard, _ in self.parts.values())


@dataclass(frozen=True)
class Quantization:
    """How a source is quantized: ``by`` what, its tensors as numbers, and the stored ones that are left out.

    ``weights`` maps the name of a view to the weight whose codes lie there.
    """

    by: str
    views: tuple[View, ...]
    unused: tuple[View, ...]
    weights: Mapping[str, EncodedWeight]


def read_quantization(path: Path, config: dict[str, Any], folder: TensorFolder) -> Quantization | None:
    """Return how the source at ``path`` is quantized, None where it is not.

    Raises FaultsError with a sentence for all that is quantized in a way that can't be read exactly.
    """
    try:
        found = find_quantized(path, config, folder)
    except MissingPackageError:
        raise
    except CheckpointError as error:
        reasons = error.faults if isinstance(error, FaultsError) else [str(error)]
        faults = [f"{_already(config)}{reason} Convert the original checkpoint." for reason in reasons]
        raise FaultsError(f"{path.name}: can't be converted", faults) from error
    if found is None:
        if faults := _undeclared_faults(folder):
            raise FaultsError(f"{path.name}: can't be converted", faults)
        return None
    by, tensors = found
    return _locate(by, tensors, folder)


def _already(config: dict[str, Any]) -> str:
    declared = config.get(CONFIG_KEY)
    if not isinstance(declared, dict):
        return ""
    return f"{CONFIG_NAME}: already quantized (quant_method {declared.get('quant_method', 'unnamed')}). "


def _locate(by: str, found: ForeignTensors, folder: TensorFolder) -> Quantization:
    places = {stored.spec.name: (shard.name, stored) for shard, stored in folder.tensors()}
    weights = {
        layer.tensors[WEIGHT]: EncodedWeight(layer, {role: places[name] for role, name in layer.tensors.items()})
        for layer in found.layers.values()
    }
    plain = found.plain_specs({name: stored.spec for name, (_, stored) in places.items()})
    stored_views = whole_views(folder)
    views = tuple(replace(view, spec=plain[view.spec.name]) for view in stored_views if view.spec.name in plain)
    unused = tuple(view for view in stored_views if view.spec.name not in plain)
    return Quantization(by, views, unused, {weight.layer.source_tensor: weight for weight in weights.values()})


def _undeclared_faults(folder: TensorFolder) -> list[str]:
    """Return a sentence where tensors look like those of a quantized checkpoint, and nothing says how to read them."""
    marked = [
        stored.spec.name
        for _, stored in folder.tensors()
        if stored.spec.dtype in _PURE_CODES or _SCALE_NAMES.fullmatch(stored.spec.name)
    ]
    if not marked:
        return []
    more = f" and {len(marked) - 1} more tensors" if len(marked) > 1 else ""
    return [
        f"{marked[0]}{more}: already quantized. Convert the original checkpoint. It is read where {CONFIG_NAME} has the"
        f" {CONFIG_KEY} that says how."
    ]
