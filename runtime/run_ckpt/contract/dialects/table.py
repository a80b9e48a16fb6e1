"""The table of the dialects, and the choice among them."""

from collections.abc import Sequence
from typing import Any

from run_ckpt.contract.dialects import compressed_tensors, fp8, gpt_oss, modelopt, mxfp4, quark, rowwise, vllm_omni
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import TENSOR_FP8, Scheme
from run_ckpt.contract.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest

PRIVATE_KEY = "convert_ckpt"

DIALECTS: dict[str, Dialect] = {
    module.DIALECT.name: module.DIALECT
    for module in (mxfp4, fp8, modelopt, quark, compressed_tensors, rowwise, vllm_omni, gpt_oss)
}


def choose_dialect(
    schemes: Sequence[Scheme],
    naming: str,
    *,
    asked: str | None = None,
    static: bool = False,
    of_joint_experts: bool = False,
) -> Dialect:
    """Return the dialect that was asked for by name, or the one that the usual consumers of such layers read.

    schemes: one for each format among the layers, all different. static: activations have an input_scale.
    of_joint_experts: of gpt-oss, whose experts are stored all in one tensor.
    Raises UsageError where the dialect can't say all that, or no dialect can.
    """
    if static and list(schemes) != [TENSOR_FP8]:
        raise UsageError("--static: static activations exist only for --format fp8 --granularity tensor.")
    dialect = DIALECTS[asked] if asked else _usual_dialect(schemes, naming, static=static)
    fault = dialect_fault(dialect, schemes, static=static)
    if dialect.experts_only and not of_joint_experts:
        fault = "is for experts that are stored all in one tensor, those of gpt-oss. Leave it out."
    if fault:
        raise UsageError(f"--dialect {dialect.name}: {fault}")
    return dialect


def dialect_fault(dialect: Dialect, schemes: Sequence[Scheme], *, static: bool) -> str | None:
    """Return why the dialect can't say that all layers are stored in these ways, or None."""
    is_static = any(scheme in dialect.static for scheme in schemes)
    if is_static != static:
        fix = (
            f"leave --dialect out or say {_list(_that(is_static=True))}"
            if static
            else "give --calibration DIR --static"
        )
        return f"its activations are {'static' if is_static else 'dynamic'}; {fix}."
    if len(schemes) > 1 and not dialect.is_mixed:
        formats = " and some ".join(scheme.format.name for scheme in schemes)
        return f"can't say that some layers are {formats}. Use --dialect {_list(_that(is_mixed=True))}."
    for scheme in schemes:
        if scheme not in dialect.schemes:
            able = _list([other for other in DIALECTS.values() if scheme in other.schemes and not other.experts_only])
            return f"can't say {scheme}. Choose one of {able}."
    return None


def header_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the safetensors ``__metadata__`` of every shard."""
    return DIALECTS[manifest.dialect].metadata(manifest)


def quantization_config(manifest: Manifest) -> dict[str, Any] | None:
    """Return what config.json's ``quantization_config`` says, or None where the dialect has none."""
    dialect = DIALECTS[manifest.dialect]
    if dialect.config is None:
        return None
    if not dialect.is_open:
        return dialect.config(manifest)
    private = {
        "schema_version": SCHEMA_VERSION,
        "manifest": MANIFEST_NAME,
        "quantized_modules": {name: layer.format.name for name, layer in sorted(manifest.layers.items())},
        "fused_scales": sorted(manifest.fused_scales),
    }
    return {**dialect.config(manifest), PRIVATE_KEY: private}


def _usual_dialect(schemes: Sequence[Scheme], naming: str, *, static: bool) -> Dialect:
    if static or len(schemes) > 1:
        return _that(is_static=static, is_mixed=not static)[0]
    return next(dialect for dialect in DIALECTS.values() if naming in dialect.schemes.get(schemes[0], ()))


def _that(*, is_static: bool = False, is_mixed: bool = False) -> list[Dialect]:
    return [d for d in DIALECTS.values() if (bool(d.static), d.is_mixed) == (is_static, is_mixed)]


def _list(dialects: Sequence[Dialect]) -> str:
    return ", ".join(dialect.name for dialect in dialects)
