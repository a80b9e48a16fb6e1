"""What a run says: before it begins, at its end, and when it is asked for again."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convert_ckpt import FaultsError, Options, UsageError, convert, plan_conversion
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.units import format_nbytes
from tests.checkpoints import FLUX_DIGITS, folder_bytes, random_weight, save_checkpoint
from tests.converted import edit_tensor
from tests.hub_fixtures import Lines

LLM: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def make_llm(folder: Path, K: int = 256, seed: int = 0) -> Path:
    names = [f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"]
    tensors = {name: random_weight(256, K, seed=seed + i) for i, name in enumerate(names)}
    return save_checkpoint(folder, [tensors | {"model.norm.weight": torch.ones(8)}], LLM)


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm")


def lines_of(source: Path, output: Path, **options: Any) -> list[str]:
    """Return what a run logs."""
    progress = Lines()
    convert(source, output, progress=progress, **options)
    return progress.lines


# Before it begins


def test_a_local_run_says_which_preset_and_why_and_which_dialect(llm: Path, tmp_path: Path) -> None:
    first, *_ = lines_of(llm, tmp_path / "class", format="fp8")
    assert first == "llm: LlamaForCausalLM, preset dense-llm (by its class), dialect compressed-tensors"
    first, *_ = lines_of(llm, tmp_path / "asked", format="fp8", preset="generic")
    assert "preset generic (by --preset)" in first


def test_what_is_kept_is_said_with_its_bytes_and_the_option_that_would_change_it(tmp_path: Path) -> None:
    shapes = {"q": 256, "k": 256, "v": 256, "o": 320}
    tensors = {f"model.layers.0.self_attn.{name}_proj.weight": random_weight(256, K) for name, K in shapes.items()}
    tensors["model.norm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    source = save_checkpoint(tmp_path / "in", [tensors], LLM)
    lines = lines_of(source, tmp_path / "out", format="mxfp4")
    weight, norm = 256 * 320 * 2, 256 * 2
    # Half a byte an element; a scale for 32, padded to [256, 16].
    saved = weight - 256 * 320 // 2 - 256 * 16
    assert lines[1:4] == [
        f"kept as they are: 2 tensors, {format_nbytes(weight + norm)}",
        f"  1 linear layer, {format_nbytes(weight)}: K = 320 is not a multiple of 256 (see --allow-unaligned-k);"
        f" --allow-unaligned-k saves {format_nbytes(saved)}",
        f"  1 tensor, {format_nbytes(norm)}: no weights of linear layers",
    ]


def test_warnings_of_the_plan_are_said_by_a_local_run(llm: Path, tmp_path: Path) -> None:
    (llm / "README.md").write_text("# The source")
    assert any(line.startswith("note: README.md: left out") for line in lines_of(llm, tmp_path / "out", format="fp8"))


def test_a_preset_of_another_class_is_noted(llm: Path, tmp_path: Path) -> None:
    lines = lines_of(llm, tmp_path / "out", format="fp8", preset="z-image", dialect="compressed-tensors")
    assert "note: preset z-image does not speak of LlamaForCausalLM; dense-llm does" in lines


def test_an_alignment_that_nothing_asks_for_is_noted(llm: Path, tmp_path: Path) -> None:
    lines = lines_of(llm, tmp_path / "out", format="fp8", allow_unaligned_k=True)
    assert any(line.startswith("note: --allow-unaligned-k has no effect") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "mxfp4", "granularity": "tensor"}, "--granularity tensor: has no effect on mxfp4, only on fp8"),
        ({"format": "fp8", "layout": "aiter"}, "--layout aiter: has no effect on fp8, only on mxfp4"),
        ({"format": "fp8", "scale_rule": "even"}, "--scale-rule even: has no effect on fp8"),
        ({"format": "mxfp8", "scale_rule": "mse"}, "mxfp8 knows roundup, floor"),
    ],
    ids=["granularity", "layout", "scale-rule", "rule-of-another"],
)
def test_an_option_without_effect_is_wrong_usage(
    llm: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        convert(llm, tmp_path / "out", **options)  # type: ignore[arg-type]


def test_an_option_for_the_format_of_a_recipe_has_an_effect(llm: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text('[[rules]]\nmatch = "*.o_proj"\nformat = "mxfp4"')
    options = {"recipe": tmp_path / "mixed.toml", "scale_rule": "mse", "layout": "plain"}
    convert(llm, tmp_path / "out", format="fp8", **options)  # type: ignore[arg-type]
    layers = read_manifest(tmp_path / "out").layers
    assert {layer.scale_rule for layer in layers.values() if layer.format.name == "mxfp4"} == {"mse"}


# At its end


def test_the_last_lines_say_the_result_its_errors_where_it_is_and_what_to_do_next(llm: Path, tmp_path: Path) -> None:
    output = tmp_path / "my out"
    summary = convert(llm, output, format="mxfp4")
    layers = read_manifest(output).layers
    values = [layer.sqnr_db or 0 for layer in layers.values()]
    worst = min(layers, key=lambda name: layers[name].sqnr_db or 0)
    result, errors, right_for, where, command, expect = str(summary).splitlines()
    assert result.startswith("Converted 8 of 9 tensors to mxfp4: ")
    assert errors == f"SQNR mean {sum(values) / len(values):.2f} dB, worst {min(values):.2f} dB in {worst}"
    assert right_for == f"Right for: {', '.join(summary.targets)}"
    assert (where, command) == (f"It is in {output}. Check it:", f"  run-ckpt verify '{output}' --source {llm}")
    assert f"--expect {summary.hash}" in expect


def test_a_mixed_result_says_how_many_layers_have_which_format(llm: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text('[[rules]]\nmatch = "*.o_proj"\nformat = "fp8"')
    summary = convert(llm, tmp_path / "out", format="mxfp4", recipe=tmp_path / "mixed.toml", layout="plain")
    assert "tensors to fp8 (2) and mxfp4 (6): " in str(summary)
    assert summary.to_json()["n_layers"] == {"mxfp4": 6, "fp8": 2}


def test_all_components_share_one_bar(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        make_llm(tmp_path / "in" / name)
    (tmp_path / "in" / "model_index.json").write_text("{}")

    class Steps(Lines):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, tuple[int, int]] = {}

        def start(self, label: str, nbytes: int) -> None:
            self.label = label
            self.steps[label] = (nbytes, 0)

        def advance(self, nbytes: int) -> None:
            total, done = self.steps[self.label]
            self.steps[self.label] = (total, done + nbytes)

    progress = Steps()
    convert(tmp_path / "in", tmp_path / "out", format="fp8", progress=progress)
    nbytes = 2 * (8 * 256 * 256 * 2 + 8 * 4)
    assert progress.steps["convert"] == (nbytes, nbytes)
    assert [label for label in progress.steps if "transformer" in label] == []


# When it is asked for again


def test_the_same_command_again_says_complete_and_changes_nothing(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    summary = convert(llm, tmp_path / "out", format="mxfp4")
    assert summary.was_complete
    assert str(summary).startswith("Complete: this command was done before.\nConverted 8 of 9 tensors to mxfp4: ")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert not (tmp_path / "out.partial").exists()


def change_source(llm: Path, output: Path) -> None:
    """Change a byte, and put the time of the file back."""
    path = llm / "model.safetensors"
    stat = path.stat()
    edit_tensor(llm, "model.norm.weight", lambda data: data.__setitem__(0, data[0] ^ 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def another_version(llm: Path, output: Path) -> None:
    from tests.converted import edit_manifest

    edit_manifest(output, lambda manifest: manifest["tool"].update(version="0.0.1"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda llm, output: None,
            {"scale_rule": "mse"},
            "holds another result (recipe.scale_rule was 'even', now 'mse')",
        ),
        (lambda llm, output: None, {"ignore": "*.o_proj"}, "holds another result (recipe.ignore was [], now"),
        (another_version, {}, "holds another result (tool.version was '0.0.1', now"),
        (change_source, {}, "model.safetensors: is not the file that the result was made from"),
        (lambda llm, output: (output / "config.json").unlink(), {}, "config.json: is missing or of another size"),
        (lambda llm, output: (output / MANIFEST_NAME).unlink(), {}, "is not empty"),
    ],
    ids=["options", "ignore", "version", "source", "file", "no-manifest"],
)
def test_another_result_is_refused_with_what_differs_and_stays(
    llm: Path, tmp_path: Path, change: Callable[[Path, Path], object], options: dict[str, Any], message: str
) -> None:
    output = tmp_path / "out"
    convert(llm, output, format="mxfp4")
    change(llm, output)
    before = folder_bytes(output)
    with pytest.raises(FaultsError, match=re.escape(message)):
        convert(llm, output, format="mxfp4", **options)
    assert folder_bytes(output) == before


def test_a_plan_takes_an_output_that_is_there(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4")
    preview = plan_conversion(llm, Options(format="fp8"), output=tmp_path / "out")
    assert str(preview).splitlines()[-1] == f"note: {tmp_path / 'out'} is there already and holds a finished result"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "holds other files" in str(plan_conversion(llm, Options(format="fp8"), output=tmp_path / "out"))


def test_the_plan_of_flux_digits_gives_each_reason_one_line() -> None:
    lines = str(plan_conversion(FLUX_DIGITS, Options(format="mxfp4"))).splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("kept as they are: 67 tensors")]
    assert [line.split(",")[0].strip() for line in lines[first + 1 : first + 4]] == [
        "13 linear layers",
        "4 linear layers",
        "50 tensors",
    ]


def test_the_json_of_a_run_holds_what_its_last_lines_say(llm: Path, tmp_path: Path) -> None:
    values = json.loads(json.dumps(convert(llm, tmp_path / "out", format="mxfp4").to_json()))
    assert values["output"] == str(tmp_path / "out")
    assert values["worst_sqnr_db"] <= values["mean_sqnr_db"]


def test_another_calibration_under_the_same_name_is_another_result(llm: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{name}_proj.input_amax" for i in range(2) for name in "qkvo"]
    options: dict[str, Any] = {"format": "fp8", "calibration": tmp_path / "ranges.safetensors"}
    save_file({name: torch.tensor([2.0]) for name in names}, options["calibration"])
    convert(llm, tmp_path / "out", **options)
    assert convert(llm, tmp_path / "out", **options).was_complete
    save_file({name: torch.tensor([3.0]) for name in names}, options["calibration"])
    with pytest.raises(FaultsError, match=r"holds another result \(recipe\.calibration_blake3 was '.*, now '"):
        convert(llm, tmp_path / "out", **options)
