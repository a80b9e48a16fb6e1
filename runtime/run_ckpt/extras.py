"""Optional packages: which extra brings each, and one line for one that is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from run_ckpt.contract.errors import MissingPackageError

# Import name -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "torch": "runtime",
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "PIL": "compare",
    "safetensors": "compare",
    "torchmetrics": "compare",
    "torchvision": "lpips",
    "s3fs": "s3",
    "gcsfs": "gs",
    "adlfs": "az",
    "ray": "ray",
    "gguf": "gguf",
}


@contextmanager
def naming_extras(user: str, extra: str | None = None) -> Iterator[None]:
    """Raise MissingPackageError where the body imports a package of an extra that is not installed.

    user: what needs the package, for the message. extra: the one that holds all it needs; default: that of
    the package. Works as a decorator too.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing(user, package, extra or EXTRAS[package]) from error


def require_packages(user: str, *packages: str) -> None:
    """Raise MissingPackageError unless all of these packages are installed; imports none of them."""
    for package in packages:
        if find_spec(package) is None:
            raise _missing(user, package, EXTRAS[package])


def _missing(user: str, package: str, extra: str) -> MissingPackageError:
    return MissingPackageError(f"{user} needs {package}: pip install 'convert-ckpt[{extra}]'", name=package)
