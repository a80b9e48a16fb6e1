"""What each target would make of a planned result: what it can't read, and what it would load silently wrong."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from convert_ckpt.plan.context import PlanContext
from convert_ckpt.plan.preset import GENERIC
from convert_ckpt.plan.runtime_names import find_entries, ignore_entries, overmatched
from run_ckpt.contract.formats import BLOCK_FP8, PLAIN_NVFP4, Scheme
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.module_names import matches_pattern
from run_ckpt.contract.reading import Reading, Target
from run_ckpt.contract.targets import TARGETS


@dataclass(frozen=True)
class Verdict:
    """What a target does with a result. It is right for the target where there is neither ``refusal`` nor ``wrong``.

    ``refusal`` says why it does not load it at all, ``wrong`` what it loads silently wrong, ``notes`` what it loads
    right but not as asked.
    """

    refusal: str | None = None
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str | None:
        """Why the result is not for the target, None where it is."""
        return self.refusal or next(iter(self.wrong), None)


def judge_targets(context: PlanContext, manifest: Manifest, *, has_fused_scales: bool) -> dict[str, Verdict]:
    """Return target -> verdict. has_fused_scales: the preset knows scales that some runtime wants once more."""
    judge = _Judge(context, manifest, has_fused_scales)
    return {name: judge.verdict(target) for name, target in TARGETS.items()}


def target_faults(context: PlanContext, verdicts: Mapping[str, Verdict]) -> list[str]:
    """Return why a result must not be made: nobody reads it, the target asked for does not, or it would do so wrong."""
    verdict = verdicts[context.target.name]
    if context.options.target and verdict.refusal:
        return [f"--target {context.target.name}: {verdict.refusal}. Leave --target out to write it all the same."]
    if all(other.reason for other in verdicts.values()) and not verdict.wrong:
        return [f"no one reads this: {'; '.join(str(other.reason) for other in verdicts.values())}."]
    return list(verdict.wrong)


def target_notes(context: PlanContext, verdicts: Mapping[str, Verdict]) -> list[str]:
    """Return what is worth knowing: how the target loads it, and who else of the usual would load it silently wrong."""
    notes = list(verdicts[context.target.name].notes)
    if not context.options.target and context.naming == "transformers":
        others = (verdict for name, verdict in verdicts.items() if name != context.target.name)
        notes += [sentence for verdict in others for sentence in verdict.wrong[:1]]
    return notes


# Targets of which presets say what they make of a class's linears.
_RUNTIMES = ("sglang", "sglang+plugin", "vllm-omni")
_UNKNOWN_CLASS = (
    "no preset knows this class: where SGLang builds a linear of it as a plain one, it takes the codes without their"
    " block scales; scripts/check_sglang.py tells, {} is safe"
)


def _unseen(target: Target, class_name: str) -> str:
    return f"no preset knows what {target.title} makes of a {class_name}"


def _safe_instead(schemes: Collection[Scheme]) -> str | None:
    """Return what to use where scales of a plain linear would be dropped; None where they would not."""
    options = {BLOCK_FP8: "--granularity tensor", PLAIN_NVFP4: "--format fp8"}
    return next((option for scheme, option in options.items() if scheme in schemes), None)


@dataclass(frozen=True)
class _Judge:
    context: PlanContext
    manifest: Manifest
    has_fused_scales: bool

    @cached_property
    def schemes(self) -> set[Scheme]:
        return {layer.scheme for layer in self.manifest.layers.values()}

    def verdict(self, target: Target) -> Verdict:
        context, manifest = self.context, self.manifest
        class_name, preset = context.source.class_name or "model of unknown class", context.preset.name
        for pattern, reason in context.preset.runtime(target.name).refuses.items():
            if any(matches_pattern(pattern, view.spec.name) for view in context.source.views):
                return Verdict(refusal=f"{target.title} {reason}")
        schemes = self.schemes
        reading = target.find_reading(context.kind, preset, class_name, manifest.dialect, schemes)
        if isinstance(reading, str):
            return Verdict(refusal=reading)
        faults = [
            f"dialect {manifest.dialect}: {target.title} {fault}."
            for fault in reading.faults(class_name, context.source.config or {}, manifest.kept)
        ]
        faults += self._plain(target, reading)
        if refusal := reading.refusal(manifest.layers):
            return Verdict(refusal=f"{target.title}: {refusal}")
        overmatches = self._overmatches(target, reading)
        if reading.matching:
            faults += self._cast(target, reading.matching)
            if not schemes <= set(reading.dequantizes):
                remedy = f"Quantize what is ignored, or use {_safe_instead(schemes) or '--dialect mxfp4'}."
                faults += [f"{sentence}, and without the block scales. {remedy}" for sentence in overmatches]
        if self.has_fused_scales and reading.fused_scales not in (None, bool(manifest.fused_scales)):
            needs = "needs the scales under the fused names too" if reading.fused_scales else "takes no fused scales"
            faults.append(f"{target.title} {needs}.")
        unknown = None
        if context.naming == "diffusers" and target.name in _RUNTIMES and target.name not in context.preset.runtimes:
            is_seen = context.preset.name != GENERIC
            unknown = f"{target.title} has no {class_name}" if is_seen else _unseen(target, class_name)
        if reading.is_loud:
            return Verdict(refusal=faults[0].rstrip(".") if faults else unknown)
        notes = overmatches
        safe = _safe_instead(schemes)
        if safe and context.preset.name == GENERIC and context.naming == "diffusers":
            notes = [*notes, _UNKNOWN_CLASS.format(safe)]
        return Verdict(unknown, tuple(faults), tuple(notes))

    def _plain(self, target: Target, reading: Reading) -> Iterator[str]:
        """Quantized linears that the runtime builds as plain ones."""
        layers = self.manifest.layers
        for module, name in self.context.names(layers, target).items():
            if reading.keeps_names and name not in (module, None):
                yield f"{module}: has another name in {target.title} ({name}), whose rowwise reader needs the same one."
            if name is None and layers[module].scheme not in reading.dequantizes:
                safe = _safe_instead({layers[module].scheme})
                kind, remedy = ("block scales", f", or use {safe}") if safe else ("scales", "")
                yield (
                    f"{module}: {target.title} builds it as a plain linear and would take its codes without their"
                    f" {kind}. Keep it with --ignore{remedy}."
                )

    def _cast(self, target: Target, matching: str) -> Iterator[str]:
        """Kept linears that the runtime would quantize all the same."""
        kept, context = self.manifest.unquantized_linears, self.context
        entries, runtime = ignore_entries(kept), context.preset.runtime(target.name)
        for module, name in context.names(kept, target).items():
            if name is None or (runtime.ignores and find_entries(entries, name, matching)):
                continue
            gives = f"its ignore list lacks {name}" if runtime.ignores else "gives the linears of its class no names"
            tensor = self.manifest.kept[context.linears[module].name]
            yield (
                f"{module}: would stay {tensor.spec.dtype} ({tensor.reason}), but {target.title}: {gives}, so it would"
                " cast this one to FP8 with scale 1.0 and say nothing. Quantize it, or use --dialect mxfp4."
            )

    def _overmatches(self, target: Target, reading: Reading) -> list[str]:
        if not reading.matching:
            return []
        quantized = self.context.names(self.manifest.layers, target)
        return overmatched(self.manifest.unquantized_linears, quantized, reading.matching, target.title)
