"""quantization_manifest.json: what was converted, from what, how, and what every byte means."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from run_ckpt.contract.decided_by import BY_FORMAT, BY_KIND, DecidedBy
from run_ckpt.contract.errors import ManifestError
from run_ckpt.contract.folds import Fold, FoldedRows
from run_ckpt.contract.formats import QuantFormat, Scheme, read_scheme
from run_ckpt.contract.manifest_text import is_sealed, seal_manifest
from run_ckpt.contract.manifest_types import type_faults
from run_ckpt.contract.tensors import TensorSpec, one_shape

SCHEMA_VERSION = 3
MANIFEST_NAME = "quantization_manifest.json"

WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
INPUT_SCALE = "input_scale"
# The scale of the whole tensor in a format of two levels, as ModelOpt spells it, or its inverse, as compressed-tensors.
TENSOR_SCALE = "weight_scale_2"
INVERSE_TENSOR_SCALE = "weight_global_scale"

# How codes are chosen: rounding to nearest, or by convert_ckpt.methods.gptq.
RTN, GPTQ = METHODS = ("rtn", "gptq")
# What the manifest leaves out of a layer that has none.
_OPTIONAL = ("method", "output_sqnr_db", "n_stacked")


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantized linear layer, stored as ``scheme`` says. Its weight is [N, K], K the reduction axis.

    ``tensors`` maps a role (weight, weight_scale, weight_scale_2, ...) to the tensor that plays it.
    ``scale_shape`` is the weight scale's shape on disk, which consumers spell differently.
    ``decided_by`` says why it has this format. ``sqnr_db`` is that of the decoded weight, see sqnr_db().
    ``method`` says how its codes were chosen where statistics of its input were given, ``output_sqnr_db`` maps each
    method to the SQNR of the layer's output on held out samples. ``n_stacked``: its rows are those of so many matrices
    one below the other (the experts of gpt-oss), which its tensors on disk have as their first axis.
    """

    module: str
    scheme: Scheme
    N: int
    K: int
    source_tensor: str
    source_dtype: str
    scale_rule: str
    tensors: dict[str, str]
    scale_shape: tuple[int, ...]
    fused_group: str | None = None
    decided_by: DecidedBy = BY_FORMAT
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    method: str | None = None
    output_sqnr_db: dict[str, float | None] | None = None
    n_stacked: int | None = None

    @property
    def format(self) -> QuantFormat:
        return self.scheme.format

    def specs(self) -> dict[str, TensorSpec]:
        """Return role -> spec of the tensors on disk."""
        element, scale = self.format.element, self.format.scale
        weight_shape: tuple[int, ...] = (self.N, self.K // element.per_byte)
        scale_shape = self.scale_shape
        if self.n_stacked:
            block = self.scheme.block[1] or self.K or 1
            scale_shape = (self.n_stacked, self.N // self.n_stacked, self.K // block)
            weight_shape = (*scale_shape, block // element.per_byte)
        by_role: dict[str, tuple[str, tuple[int, ...]]] = {
            WEIGHT: (element.dtype, weight_shape),
            WEIGHT_SCALE: (scale.dtype, scale_shape),
            **dict.fromkeys((TENSOR_SCALE, INVERSE_TENSOR_SCALE, INPUT_SCALE), ("F32", (1,))),
        }
        return {role: TensorSpec(name, *by_role[role]) for role, name in self.tensors.items()}

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        fields |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        derived = {"scale_shape": list(self.scale_shape), "decided_by": self.decided_by.to_json()}
        return {**fields, **derived, **_facts(self.scheme)}


# What is the same in the manifest.
_PLAIN_FIELDS = tuple(
    name for name in Layer.__dataclass_fields__ if name not in {"scheme", "scale_shape", "decided_by", *_OPTIONAL}
)


@cache
def _facts(scheme: Scheme) -> dict[str, Any]:
    """Return what is said of each layer that is stored so."""
    layout = scheme.layout
    names = {"format": scheme.format.name, "layout": layout.name, "granularity": scheme.granularity}
    return {**names, **scheme.format.facts, **layout.facts, "target_arch": layout.target_arch}


def sqnr_db(squared_signal: float, squared_error: float) -> float | None:
    """Return 10 log10(sum w^2 / sum (w - decoded)^2) to two decimals, in dB.

    None where either sum is zero; -inf where the error is infinite or NaN, which no converted weight is.
    """
    if squared_signal == 0 or squared_error == 0:
        return None
    if not math.isfinite(squared_error):
        return -math.inf
    return round(10 * math.log10(squared_signal / squared_error), 2)


@dataclass(frozen=True, slots=True)
class FusedScale:
    """A tensor that repeats the scales of ``members`` one after the other, for a consumer that fuses."""

    spec: TensorSpec
    role: str
    members: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return _spec_json(self.spec, role=self.role, members=list(self.members))


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor copied bit for bit, but for what a fold changes, and why."""

    spec: TensorSpec
    reason: str
    decided_by: DecidedBy = BY_KIND

    def to_json(self) -> dict[str, Any]:
        return _spec_json(self.spec, reason=self.reason, decided_by=self.decided_by.to_json())


@dataclass(frozen=True)
class Manifest:
    """Everything about a converted checkpoint but its tensor bytes.

    ``unquantized_linears`` maps each linear layer left alone to its name in the target's runtime, or
    to None where that would not quantize it anyway (then no ignore list needs it).
    ``targets`` maps a target to the reason why this result is not for it, None where it is.
    ``files`` maps each file of the folder but the manifest to its size (``nbytes``) and hash (``blake3``), and so
    does ``source["files"]`` each source shard; with its ``sha256`` too where a store stated that.
    ``folds`` say where values are not the source's.
    """

    tool: dict[str, str]
    source: dict[str, Any]
    recipe: dict[str, Any]
    layers: dict[str, Layer]
    kept: dict[str, KeptTensor]
    fused_scales: dict[str, FusedScale]
    unquantized_linears: dict[str, str | None]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, str | None] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()

    @property
    def dialect(self) -> str:
        return str(self.recipe["dialect"])

    @property
    def target(self) -> str | None:
        """The target that was asked for, None where the usual ones are meant."""
        return self.recipe.get("target")

    @property
    def source_quantization(self) -> str | None:
        """What became of the weights of a source that was quantized already, None where it was not."""
        found = self.source.get("quantized")
        if not isinstance(found, dict) or not isinstance(weights := found.get("weights"), dict):
            return None
        counts = ", ".join(f"{count} {became}" for became, count in weights.items())
        return f"quantized already by {found.get('by')}; its weights: {counts}"

    def specs(self) -> dict[str, TensorSpec]:
        """Return name -> spec of every tensor of the checkpoint."""
        specs = {kept.spec.name: kept.spec for kept in self.kept.values()}
        specs.update({fused.spec.name: fused.spec for fused in self.fused_scales.values()})
        for layer in self.layers.values():
            specs.update({spec.name: spec for spec in layer.specs().values()})
        return specs

    def to_json(self) -> Iterator[bytes]:
        """Yield the parts of the file's text: equal manifests are equal bytes."""
        return seal_manifest(self.document())

    def document(self) -> dict[str, Any]:
        """Return the file's content; entries of layers, kept tensors and fused scales as records with to_json()."""
        return {
            "schema_version": SCHEMA_VERSION,
            "tool": self.tool,
            "source": self.source,
            "recipe": self.recipe,
            "layers": self.layers,
            "kept": self.kept,
            "fused_scales": self.fused_scales,
            "unquantized_linears": self.unquantized_linears,
            "targets": self.targets,
            "files": self.files,
            **({"folds": [_fold_to_json(fold) for fold in self.folds]} if self.folds else {}),
        }


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """Return the manifest in the file ``path``, which holds ``data``.

    Raises ManifestError where it is damaged, changed in any byte, of an unknown schema version,
    or where a derived fact (tie rule, layout name, ...) is not the one this version knows.
    """
    try:
        document = json.loads(data.decode())
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{path}: schema version {version!r}; this version reads {SCHEMA_VERSION}."
                " Convert the source again with this version, or use the version of the tool that the manifest names."
            )
        if not is_sealed(data):
            raise ManifestError(f"{path}: was changed after it was written. Fetch it again, or convert again.")
        if wrong := next(type_faults(document), None):
            raise ValueError(f"{wrong}: is of the wrong type")
        return _from_json(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"{path}: damaged ({type(error).__name__}: {error}). Convert again or fetch the file again."
        ) from error


def _from_json(document: dict[str, Any]) -> Manifest:
    return Manifest(
        tool=document["tool"],
        source=document["source"],
        recipe=document["recipe"],
        layers={name: _layer_from_json(entry) for name, entry in document["layers"].items()},
        kept={
            name: KeptTensor(_spec(name, entry), sys.intern(entry["reason"]), _decided_by(**entry["decided_by"]))
            for name, entry in document["kept"].items()
        },
        fused_scales={
            name: FusedScale(_spec(name, entry), entry["role"], tuple(entry["members"]))
            for name, entry in document["fused_scales"].items()
        },
        unquantized_linears=document["unquantized_linears"],
        files=document["files"],
        targets=document["targets"],
        folds=tuple(_fold_from_json(entry) for entry in document.get("folds", [])),
    )


def _layer_from_json(entry: dict[str, Any]) -> Layer:
    scheme = read_scheme(entry["format"], entry["layout"], entry["granularity"])
    absent = {"scheme", *(name for name in _OPTIONAL if name not in entry)}
    fields = {name: entry[name] for name in Layer.__dataclass_fields__.keys() - absent}
    parsed = {
        "scheme": scheme,
        "scale_shape": tuple(entry["scale_shape"]),
        "decided_by": _decided_by(**entry["decided_by"]),
    }
    layer = Layer(**{**fields, **parsed})
    expected = layer.to_json()
    if expected != entry:
        wrong = sorted(key for key in expected.keys() | entry.keys() if expected.get(key) != entry.get(key))
        raise ManifestError(
            f"layer {layer.module}: {wrong} hold values this version does not know"
            f" ({ {key: entry.get(key) for key in wrong} }). Use the tool version that the manifest names."
        )
    return layer


def _fold_to_json(fold: Fold) -> dict[str, Any]:
    """Its channels in one line: a list would take one for each."""
    writers = [asdict(part) for part in fold.writers]
    return {"exponents": " ".join(map(str, fold.exponents)), "writers": writers, "readers": list(fold.readers)}


def _fold_from_json(entry: dict[str, Any]) -> Fold:
    exponents = tuple(map(int, entry["exponents"].split()))
    return Fold(exponents, tuple(FoldedRows(**part) for part in entry["writers"]), tuple(entry["readers"]))


def _spec(name: str, entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(name, sys.intern(entry["dtype"]), one_shape(entry["shape"]))


# There may be very many tensors, kept for few reasons: equal ones are one object.
_decided_by = lru_cache(1024)(DecidedBy)


def _spec_json(spec: TensorSpec, **facts: Any) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape), **facts}
