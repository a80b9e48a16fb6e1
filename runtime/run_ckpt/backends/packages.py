"""Which optional packages are installed, told without importing them (AITER compiles at import)."""

from contextlib import suppress
from functools import cache
from importlib import metadata, util
from pathlib import Path

from packaging.version import InvalidVersion, Version

# 0.1.14 is the first whose dynamic_mxfp4_quant(shuffle=True) gives the scale rows their padded pitch
# where K is not a multiple of 256 (ROCm/aiter #2900).
AITER_MINIMUM = Version("0.1.14")
# 0.0.3 is the first with MXFP4.
PETIT_MINIMUM = Version("0.0.3")


@cache
def why_no_aiter() -> str | None:
    """Return why AMD's AITER can't be used, None where it can."""
    spec = util.find_spec("aiter")
    if spec is None:
        return f"AITER is not installed (package amd-aiter {AITER_MINIMUM} or newer)"
    if not any((Path(folder) / "ops").is_dir() for folder in spec.submodule_search_locations or ()):
        return (
            'the package "aiter" that is installed has nothing to do with AMD\'s AITER;'
            " uninstall it and install amd-aiter"
        )
    return _why_too_old("AITER", "amd-aiter", AITER_MINIMUM)


@cache
def why_no_petit() -> str | None:
    """Return why petit_kernel can't be used, None where it can."""
    if util.find_spec("petit_kernel") is None:
        return f"petit_kernel is not installed ({PETIT_MINIMUM} or newer is needed)"
    return _why_too_old("petit_kernel", "petit-kernel", PETIT_MINIMUM)


@cache
def why_no_triton() -> str | None:
    """Return why Triton can't be used, None where it can. Any version that torch 2.6 or newer brings will do."""
    return "Triton is not installed" if util.find_spec("triton") is None else None


def _why_too_old(name: str, distribution: str, minimum: Version) -> str | None:
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"the version of {name} is unknown: the package {distribution} is not installed by pip"
    with suppress(InvalidVersion):
        if Version(version) >= minimum:
            return None
    return f"{name} {version} is installed, {minimum} or newer is needed"
