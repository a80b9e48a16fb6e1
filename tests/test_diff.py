"""run-ckpt diff: every difference of two results once, and no other."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from run_ckpt.cli.main import run_ckpt
from run_ckpt.cli.names import fold_name
from run_ckpt.storage.manifest_file import read_manifest
from tests.converted import FLUX_DIGITS, convert


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> result: MXFP4, the same with a block kept, the same by another scale rule, and FP8."""
    folder = tmp_path_factory.mktemp("diff")
    options: dict[str, dict[str, Any]] = {
        "mxfp4": {"format": "mxfp4"},
        "kept": {"format": "mxfp4", "ignore": ("transformer_blocks.0.attn.to_out.0",)},
        "floor": {"format": "mxfp4", "scale_rule": "floor"},
        "fp8": {"format": "fp8"},
    }
    return {name: convert(FLUX_DIGITS, folder / name, **chosen) for name, chosen in options.items()}


def diff(*arguments: object) -> str:
    result = CliRunner().invoke(run_ckpt, ["diff", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def diff_json(results: dict[str, Path], a: str, b: str) -> Any:
    return json.loads(diff(results[a], results[b], "--json"))


def test_a_result_does_not_differ_from_itself(results: dict[str, Path]) -> None:
    found = diff_json(results, "mxfp4", "mxfp4")
    assert (found["options"], found["differences"], found["n_same"]) == ({}, [], 90)


def test_a_layer_that_only_one_result_keeps_is_the_only_difference(results: dict[str, Path]) -> None:
    found = diff_json(results, "mxfp4", "kept")
    (difference,) = found["differences"]
    assert difference["name"] == "transformer_blocks.0.attn.to_out.0"
    assert difference["a"]["stored_as"] == "mxfp4"
    # [256, 256]: half a byte an element and a scale for 32; two bytes in BF16.
    assert difference["a"]["nbytes"] == 256 * 256 // 2 + 256 * 256 // 32
    assert difference["b"] == {"stored_as": "BF16", "nbytes": 256 * 256 * 2, "sqnr_db": None}
    assert found["n_same"] == 89
    assert found["options"].keys() == {"ignore", "rules"}
    sizes = [
        sum(path.stat().st_size for path in results[name].glob("*") if path.suffix != ".json")
        for name in ("mxfp4", "kept")
    ]
    assert found["b_nbytes"] - found["a_nbytes"] == pytest.approx(sizes[1] - sizes[0], abs=2000)  # json files


def test_errors_that_differ_are_differences_of_layers_stored_alike(results: dict[str, Path]) -> None:
    found = diff_json(results, "mxfp4", "floor")
    assert found["options"] == {"scale_rule": ["even", "floor"]}
    layers = [read_manifest(results[name]).layers for name in ("mxfp4", "floor")]
    expected = {name for name in layers[0] if layers[0][name].sqnr_db != layers[1][name].sqnr_db}
    assert {row["name"] for row in found["differences"]} == expected
    for row in found["differences"]:
        assert row["a"]["nbytes"] == row["b"]["nbytes"]
        assert [row[side]["sqnr_db"] for side in "ab"] == [layer[row["name"]].sqnr_db for layer in layers]


def test_like_blocks_share_a_row_with_their_sum_and_worst(results: dict[str, Path]) -> None:
    text = diff(results["mxfp4"], results["fp8"])
    assert "format: mxfp4 -> fp8" in text
    assert "single_transformer_blocks.*.attn.to_q" in text
    assert "23 tensors differ, 67 are alike" in text
    layers = [read_manifest(results[name]).layers for name in ("mxfp4", "fp8")]
    like = [name for name in layers[0] if name.startswith("single_") and name.endswith("attn.to_q")]
    worst = [min(layer[name].sqnr_db or 0 for name in like) for layer in layers]
    assert f"{worst[0]:.2f} -> {worst[1]:.2f}" in text


@given(st.from_regex(r"[a-z_0-9]{1,12}([./][a-z_0-9]{1,12}){0,6}", fullmatch=True), st.integers(14, 80))
def test_a_long_name_folds_at_dots_and_loses_nothing(name: str, width: int) -> None:
    lines = list(fold_name(name, width))
    assert "".join(lines) == name
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith(".") or before.endswith(("/", "_")) for before, line in pairwise(lines))
