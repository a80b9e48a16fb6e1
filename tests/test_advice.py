"""What the report advises: figures that are measured again, and effects that come true."""

from pathlib import Path

import pytest
import torch

from convert_ckpt import Options, plan_conversion
from run_ckpt.contract.codec import dequantize, quantize
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.kept import kept_groups
from run_ckpt.contract.manifest import sqnr_db
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.advice import GAUSSIAN_SQNR_DB, kept_lines, list_advice, usual_lines
from run_ckpt.tools.publish.report import report_data
from run_ckpt.tools.publish.rows import read_result
from tests.converted import FLUX_DIGITS, convert, edit_manifest


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(FLUX_DIGITS, tmp_path_factory.mktemp("advice") / "out", format="mxfp4")


def test_every_format_and_rule_has_its_figure() -> None:
    kinds = {(name, rule) for name, quant_format in FORMATS.items() for rule in quant_format.scale_rules}
    assert kinds == set(GAUSSIAN_SQNR_DB)


@pytest.mark.parametrize(("name", "rule"), [kind for kind in GAUSSIAN_SQNR_DB if not FORMATS[kind[0]].is_two_level])
def test_the_figure_is_what_normally_distributed_weights_have(name: str, rule: str) -> None:
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    scheme = FORMATS[name].scheme("plain")
    error = weight - dequantize(*quantize(weight, scheme, rule), scheme)
    # Within 0.1 dB: other weights differ in the second decimal, 512 x 4096 of them.
    assert sqnr_db(float(weight.square().sum()), float(error.square().sum())) == pytest.approx(
        GAUSSIAN_SQNR_DB[name, rule], abs=0.1
    )


def test_a_usual_result_is_said_to_be_normal_and_outliers_are_counted(output: Path, tmp_path: Path) -> None:
    (line,) = usual_lines(read_result(output))
    assert line == "mxfp4: 19.27 dB on average, where normally distributed weights have 19: normal"
    import shutil

    copy = shutil.copytree(output, tmp_path / "copy")
    edit_manifest(copy, lambda manifest: manifest["layers"]["transformer_blocks.0.attn.to_q"].update(sqnr_db=12.0))
    (line,) = usual_lines(read_result(copy))
    assert line.endswith("1 of 23 layers are over 1 dB under it, by outliers")


def test_keeping_the_weakest_layers_costs_and_gains_what_is_said(output: Path, tmp_path: Path) -> None:
    advice = list_advice(read_result(output))[0]
    (tmp_path / "kept.toml").write_text(advice.recipe)
    kept = convert(FLUX_DIGITS, tmp_path / "kept", format="mxfp4", recipe=tmp_path / "kept.toml")
    before, after = (read_result(path)[0] for path in (output, kept))
    cost = sum(row.output_nbytes for row in after.rows) - sum(row.output_nbytes for row in before.rows)
    worst = [min(row.sqnr_db for row in part.rows if row.sqnr_db is not None) for part in (before, after)]
    assert advice.what == f"Keep these 3: +{format_nbytes(cost)}, worst {worst[0]:.2f} -> {worst[1]:.2f} dB"
    assert worst[1] > worst[0]


def test_the_report_says_what_is_kept_and_what_to_do(output: Path) -> None:
    components = read_result(output)
    (result,) = report_data({"it": components})["results"]
    assert result["kept"] == list(kept_lines(components))
    assert any("--target run-ckpt saves" in line for line in result["kept"])
    assert result["advice"][0]["recipe"].count("[[rules]]") == 3


def test_the_plan_as_json_says_what_the_terminal_says() -> None:
    preview = plan_conversion(FLUX_DIGITS, Options(format="mxfp4"))
    (plan,) = preview.components
    shown = "\n".join(preview.lines)
    assert f"preset flux1 ({plan['preset_from']})" in shown
    assert [group["n_tensors"] for group in plan["kept"]] == [13, 4, 50]
    # The preset keeps the first ones for every target.
    remedies = ["--target run-ckpt with a rule in a --recipe", "--target run-ckpt", ""]
    assert [group["remedy"] for group in plan["kept"]] == remedies
    for group in plan["kept"][:2]:
        assert f"{group['reason']}; {group['remedy']} saves {format_nbytes(group['saved_nbytes'])}" in shown


def test_what_a_target_costs_is_saved_by_the_other(output: Path, tmp_path: Path) -> None:
    saved = sum(
        group.saved_nbytes for group in kept_groups(read_manifest(output)) if group.remedy == "--target run-ckpt"
    )
    other = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4", target="run-ckpt")
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (output, other)]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.01)  # headers


def test_two_results_are_shown_as_a_difference(output: Path, tmp_path: Path) -> None:
    other = convert(FLUX_DIGITS, tmp_path / "fp8", format="fp8")
    data = report_data({"a": read_result(output), "b": read_result(other)})
    assert (data["difference"]["n_different"], data["difference"]["n_same"]) == (23, 67)
    assert data["difference"]["options"]["format"] == ("mxfp4", "fp8")
    assert report_data({"a": read_result(output)})["difference"] is None
