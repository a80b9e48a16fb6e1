"""The bytes of a conversion stay what they were: every format, layout, dialect and granularity of flux-digits.

``golden/flux_digits_sha256.json`` was made before the house was rebuilt. To make it anew after a change of bytes that
is meant: ``python -m tests.test_same_bytes``.
"""

import hashlib
import itertools
import json
import tempfile
from pathlib import Path

import pytest

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.formats import SCALE_RULES
from run_ckpt.contract.manifest import MANIFEST_NAME
from tests import checkpoints

GOLDEN = Path(__file__).parent / "golden" / "flux_digits_sha256.json"
RECIPES = Path(__file__).parents[1] / "examples"


def combinations() -> dict[str, dict[str, object]]:
    """Return a name -> options of the command for each way to convert that differs in its bytes."""
    choices: list[dict[str, object]] = [
        {"format": "mxfp4", "layout": layout, "scale_rule": rule}
        for layout, rule in itertools.product(("aiter", "plain"), SCALE_RULES)
    ]
    choices += [{"format": "fp8", "granularity": granularity} for granularity in ("tensor", "channel", "block")]
    dialects = [{**choice, "dialect": dialect} for choice in choices for dialect in DIALECTS]
    recipes = [
        {"format": "mxfp4", "recipe": RECIPES / "all-layers-mxfp4.toml"},
        {"format": "fp8", "recipe": RECIPES / "all-layers-fp8.toml"},
        {"format": "mxfp4", "allow_unaligned_k": True},
        {"format": "mxfp4", "ignore": ("transformer_blocks.0.*",)},
    ]
    return {" ".join(_word(value) for value in options.values()): options for options in choices + dialects + recipes}


def _word(value: object) -> str:
    return value.stem if isinstance(value, Path) else str(value)


def hash_result(options: dict[str, object], output: Path) -> dict[str, str] | None:
    """Return file -> SHA-256 of a conversion without its manifest, None where the options contradict each other."""
    try:
        checkpoints.convert(checkpoints.FLUX_DIGITS, output, **options)
    except UsageError:
        return None
    files = {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name != MANIFEST_NAME}
    return {name: hashlib.sha256(_comparable(name, data)).hexdigest() for name, data in files.items()}


def _comparable(name: str, data: bytes) -> bytes:
    """Return the bytes to compare: config.json without the version of the manifest that it points to."""
    if name != CONFIG_NAME:
        return data
    config = json.loads(data)
    config.get("quantization_config", {}).get("convert_ckpt", {}).pop("schema_version", None)
    return json.dumps(config).encode()


def make_golden() -> dict[str, dict[str, str]]:
    """Return the hashes of every combination that converts."""
    hashes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, options) in enumerate(combinations().items()):
            try:
                hashed = hash_result(options, Path(scratch) / str(i))
            except Exception as error:  # a combination that is refused
                print(f"{name}: {error}")
                continue
            if hashed:
                hashes[name] = hashed
    return hashes


@pytest.mark.parametrize("name", json.loads(GOLDEN.read_text()) if GOLDEN.exists() else [])
def test_a_conversion_of_flux_digits_gives_the_bytes_it_gave(name: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[name]
    assert hash_result(combinations()[name], tmp_path / "output") == expected


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make_golden(), indent=1) + "\n")
