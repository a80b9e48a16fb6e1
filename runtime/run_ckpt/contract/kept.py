"""Why tensors stay as they are, what that costs, and which option would change it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from run_ckpt.contract.decided_by import (
    BOTH,
    BUDGET,
    EDGE,
    FUSED,
    IGNORE,
    NOT_LINEAR,
    PRESET,
    RECIPE,
    SHAPE,
    TARGET,
    UNKNOWN_CLASS,
)
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.formats import FORMATS, Scheme
from run_ckpt.contract.manifest import KeptTensor, Manifest
from run_ckpt.contract.shape_limits import reason_to_keep
from run_ckpt.contract.tensors import TensorSpec


@dataclass(frozen=True)
class Remedy:
    """What would quantize a tensor that is kept, in the words of the command, and the bytes which that would save."""

    what: str
    saved_nbytes: int


@dataclass(frozen=True)
class KeptGroup:
    """Tensors that are kept for one reason. ``remedy`` is "" where nothing would change it."""

    reason: str
    is_linear: bool
    n_tensors: int
    nbytes: int
    remedy: str
    saved_nbytes: int


def kept_groups(manifest: Manifest) -> list[KeptGroup]:
    """Return a group for each reason, those that keep most bytes first; tensors of no linear layer come last."""
    groups: dict[tuple[str, bool], list[KeptTensor]] = {}
    for kept in manifest.kept.values():
        is_linear = kept.decided_by.by != NOT_LINEAR
        groups.setdefault((kept.reason if is_linear else "no weights of linear layers", is_linear), []).append(kept)
    found = [
        KeptGroup(*key, len(members), sum(kept.spec.nbytes for kept in members), *_best(members, manifest.recipe))
        for key, members in groups.items()
    ]
    return sorted(found, key=lambda group: (not group.is_linear, -group.nbytes))


def _best(members: Iterable[KeptTensor], recipe: Mapping[str, Any]) -> tuple[str, int]:
    """Return what saves most among the first remedies of each, and how much that is for all that it reaches."""
    # Remedies do not depend on names; there may be very many tensors of few shapes.
    alike = Counter((kept.spec.dtype, kept.spec.shape, kept.decided_by) for kept in members)
    saved: Counter[str] = Counter()
    for (dtype, shape, decided_by), count in alike.items():
        for remedy in islice(remedies(KeptTensor(TensorSpec("", dtype, shape), "", decided_by), recipe), 1):
            saved[remedy.what] += count * remedy.saved_nbytes
    return next(iter(saved.most_common(1)), ("", 0))


def remedies(kept: KeptTensor, recipe: Mapping[str, Any]) -> Iterator[Remedy]:
    """Yield what would quantize a tensor that is kept, the smallest change first.

    recipe: the manifest's, which says what was asked for.
    """
    if DIALECTS[recipe["dialect"]].experts_only:
        return
    rule = kept.decided_by.rule
    if kept.decided_by.by == SHAPE:
        for option, scheme in _ways_to_take(kept.spec, recipe):
            yield Remedy(option, _saved_nbytes(kept.spec, scheme))
        return
    words = {
        IGNORE: f"--ignore {rule} left out",
        RECIPE: f"another rule than {rule} in the recipe",
        PRESET: "a rule in a --recipe",
        TARGET: "--target run-ckpt",
        BOTH: "--target run-ckpt with a rule in a --recipe",
        UNKNOWN_CLASS: "a rule in a --recipe",
        FUSED: f"quantizing {rule} too",
        EDGE: "fewer blocks by --keep-first and --keep-last",
        BUDGET: f"less than {rule}",
    }
    scheme = _asked_scheme(recipe)
    if kept.decided_by.by in words and not _reason_to_keep(kept.spec, scheme, recipe):
        yield Remedy(words[kept.decided_by.by], _saved_nbytes(kept.spec, scheme))


def _ways_to_take(spec: TensorSpec, recipe: Mapping[str, Any]) -> Iterator[tuple[str, Scheme]]:
    """Yield (option, scheme) of every other way to store a weight [N, K] that takes its shape."""
    asked = _asked_scheme(recipe)
    ways = [("--allow-unaligned-k", asked)] if not recipe["allow_unaligned_k"] else []
    ways += [(f"--layout {layout}", replace(asked, layout=layout)) for layout in asked.format.layouts]
    ways += [(f"--granularity {name}", replace(asked, granularity=name)) for name in asked.format.blocks]
    ways += [(str(scheme), scheme) for scheme in (other.scheme() for other in FORMATS.values())]
    for option, scheme in ways:
        aligned = recipe["allow_unaligned_k"] or option == "--allow-unaligned-k"
        if not _reason_to_keep(spec, scheme, {**recipe, "allow_unaligned_k": aligned}):
            yield option, scheme


def _reason_to_keep(spec: TensorSpec, scheme: Scheme, recipe: Mapping[str, Any]) -> str | None:
    return reason_to_keep(spec, scheme, recipe["naming"], allow_unaligned_k=recipe["allow_unaligned_k"])


def _asked_scheme(recipe: Mapping[str, Any]) -> Scheme:
    return FORMATS[recipe["format"]].scheme(recipe["layout"], recipe["granularity"])


def _saved_nbytes(spec: TensorSpec, scheme: Scheme) -> int:
    return spec.nbytes - scheme.nbytes(*spec.shape)
