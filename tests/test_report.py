"""The report: all tensors with their outcomes, one page without network, whatever their names; and it works."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from run_ckpt.cli.main import main
from run_ckpt.contract.file_names import MAP_NAME
from run_ckpt.contract.module_names import block_pattern, split_name
from run_ckpt.tools.publish.error_map import SMALLEST_SPAN_DB, color_ranges, draw_errors, make_grids
from run_ckpt.tools.publish.push import Target, card_files
from run_ckpt.tools.publish.report import make_report, report_data
from run_ckpt.tools.publish.rows import read_result
from tests.converted import FLUX_DIGITS, convert, edit_manifest

HOSTILE = "</script><script>document.title = 'broken'</script><!-- \u2028 & <b>"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    return {name: convert(FLUX_DIGITS, folder / name, format=name) for name in ("mxfp4", "fp8")}


def page_data(page: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert text
    data: dict[str, Any] = json.loads(text[1])
    return data


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("transformer_blocks.12.attn.to_out.0", ("transformer_blocks", 12, "attn.to_out.0")),
        ("model.layers.3.mlp.experts.7.w1", ("model.layers", 3, "mlp.experts.7.w1")),
        ("proj_out", ("", None, "proj_out")),
        ("0.linear", ("", 0, "linear")),
        ("time_text_embed.timestep_embedder.linear_1", ("", None, "time_text_embed.timestep_embedder.linear_1")),
    ],
)
def test_a_name_is_cut_at_its_first_number(module: str, parts: tuple[str, int | None, str]) -> None:
    assert split_name(module) == parts


def test_like_modules_of_all_blocks_share_a_pattern() -> None:
    assert (
        block_pattern("blocks.3.ff.net.0.proj") == block_pattern("blocks.12.ff.net.0.proj") == "blocks.*.ff.net.0.proj"
    )
    assert block_pattern("to_out.0") == "to_out.0"


def test_every_tensor_of_the_source_has_a_row_with_its_outcome(outputs: dict[str, Path]) -> None:
    results = {name: read_result(path) for name, path in outputs.items()}
    data = report_data(results)
    assert len(data["rows"]) == 90  # README: 23 of 90 tensors
    outcomes = [[outcome[0] for outcome in row[-1]] for row in data["rows"]]
    assert outcomes.count(["mxfp4", "fp8"]) == 23
    assert outcomes.count(["BF16", "BF16"]) == 67
    assert all(outcome[1] or outcome[0] in ("mxfp4", "fp8") for row in data["rows"] for outcome in row[-1])


def test_a_tensor_kept_without_a_reason_is_still_kept(tmp_path: Path) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    edit_manifest(output, lambda manifest: manifest["kept"]["proj_out.weight"].update(reason=""))
    components = read_result(output)
    (row,) = [row for row in components[0].rows if row.name == "proj_out"]
    assert (row.is_linear, row.is_quantized, row.stored_as) == (True, False, "BF16")
    assert report_data({"it": components})["results"][0]["n_layers"] == 23


def test_the_output_error_and_how_codes_were_chosen_are_in_the_row(tmp_path: Path) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    calibrated = {"method": "gptq", "output_sqnr_db": {"rtn": 20.5, "gptq": 26.25}}
    edit_manifest(
        output, lambda manifest: manifest["layers"]["single_transformer_blocks.0.proj_out"].update(calibrated)
    )
    data = report_data({"it": read_result(output)})
    outcomes = {row[1]: row[-1][0] for row in data["rows"]}
    assert outcomes["single_transformer_blocks.0.proj_out"][6:] == [26.25, "gptq"]
    assert outcomes["single_transformer_blocks.1.proj_out"][6:] == [None, None]
    assert data["results"][0]["is_calibrated"]


def test_sizes_add_up_to_the_files(outputs: dict[str, Path]) -> None:
    for name, path in outputs.items():
        (result,) = report_data({name: read_result(path)})["results"]
        parts = sum(result[key] for key in ("weight_nbytes", "scale_nbytes", "kept_nbytes"))
        files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert 0 < files - parts < 30_000  # the headers
        assert result["output_nbytes"] == sum(
            entry["nbytes"] for entry in json.loads((path / "quantization_manifest.json").read_text())["files"].values()
        )


def test_layers_of_one_format_share_a_scale_that_does_not_dramatize(outputs: dict[str, Path]) -> None:
    rows = [row for path in outputs.values() for component in read_result(path) for row in component.rows]
    ranges = color_ranges(rows)
    assert ranges.keys() == {"mxfp4", "fp8"}
    assert all(high - low >= SMALLEST_SPAN_DB for low, high in ranges.values())


def test_the_picture_is_the_same_every_time(outputs: dict[str, Path]) -> None:
    (component,) = read_result(outputs["mxfp4"])
    grids = make_grids(component.rows)
    assert [grid.stack for grid in grids] == ["single_transformer_blocks", "transformer_blocks"]
    picture = draw_errors(grids, color_ranges(component.rows))
    assert picture == draw_errors(grids, color_ranges(component.rows))
    drawn = [cell.attrib for cell in ElementTree.fromstring(picture).iter() if "data-layer" in cell.attrib]
    assert {cell["data-layer"] for cell in drawn} == {row.path for grid in grids for row in grid.cells.values()}
    assert {cell["data-layer"] for cell in drawn if cell["class"] == "kept"} == {
        row.path for grid in grids for row in grid.cells.values() if not row.is_quantized
    }
    # 18.97 dB, where 19.72 is the strongest: three quarters up the smallest span.
    assert [cell["class"] for cell in drawn if cell["data-layer"].endswith("blocks.2.proj_out")] == ["s8"]


def test_card_and_page_show_one_picture(outputs: dict[str, Path]) -> None:
    components = read_result(outputs["mxfp4"])
    (picture,) = (
        file.content
        for file in card_files(components, Target("me/x", tool_url="https://example.org/x"), None)
        if file.name == MAP_NAME
    )
    assert isinstance(picture, bytes)
    assert picture.decode() in make_report({"mxfp4": components})


def test_two_results_have_a_map_of_what_the_second_gains(outputs: dict[str, Path]) -> None:
    page = make_report({name: read_result(path) for name, path in outputs.items()})
    _, gains = page.split('<div id="difference-maps">')
    assert gains.count('data-layer="') == 32  # 6 x 3 and 14 x 1
    assert len(re.findall(r">\+12\.\d</text>", gains)) > 15


def test_the_page_names_nothing_to_fetch(outputs: dict[str, Path]) -> None:
    page = make_report({"a": read_result(outputs["mxfp4"])})
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "url(" not in page
    assert "@import" not in page


def test_no_name_can_end_the_data(outputs: dict[str, Path], tmp_path: Path) -> None:
    page = make_report({HOSTILE: read_result(hostile(outputs["mxfp4"], tmp_path))})
    data = page_data(page)
    assert data["results"][0]["name"] == HOSTILE
    assert any(HOSTILE in outcome[1] for row in data["rows"] for outcome in row[-1])
    assert page.count("</script>") == make_report({"a": read_result(outputs["mxfp4"])}).count("</script>")


def test_the_command_writes_a_page_for_several_results(
    outputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    main_returns(["report", *map(str, outputs.values()), "--output", str(file)])
    assert [result["name"] for result in page_data(file.read_text(encoding="utf-8"))["results"]] == ["mxfp4", "fp8"]
    assert str(file) in capsys.readouterr().out


def hostile(output: Path, folder: Path) -> Path:
    """Return a copy whose manifest gives a reason that tries to break out of the page."""
    copy = shutil.copytree(output, folder / "hostile")
    edit_manifest(copy, lambda manifest: manifest["kept"]["x_embedder.weight"].update(reason=HOSTILE))
    return copy


def main_returns(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code


# Runs in the page: clicks and types as a reader would, and leaves what it saw in <html data-seen> of the
# page around, which is there because chromium has no window of a phone's width.
_READER = """
const column = (title) => [...$("head").cells].findIndex((cell) => cell.textContent === title);
const cells = (at) => [...$("body").rows].map((row) => row.cells[at].textContent).filter(Boolean);
const press = (at) => $("head").cells[at].querySelector("button").click();
const seen = { title: document.title, all: $("body").rows.length };
const sqnr = column("SQNR");
press(sqnr); seen.rising = cells(sqnr); seen.sort = $("head").cells[sqnr].getAttribute("aria-sort");
press(sqnr); seen.falling = cells(sqnr);
const enter = (id, kind, value) => { $(id).value = value; $(id).dispatchEvent(new Event(kind)); };
enter("which", "change", "kept"); seen.kept = cells(column("why kept"));
enter("which", "change", "all"); enter("filter", "input", "PROJ_OUT"); seen.filtered = cells(0);
const grid = document.querySelector(".map"), first = grid.querySelector("[tabindex='0']");
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
first.focus(); key("ArrowRight"); key("ArrowDown");
seen.focused = document.activeElement.getAttribute("aria-label"); seen.tip = $("tip").textContent;
key("Enter"); seen.found = cells(0);
seen.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
seen.width = innerWidth;
seen.scrollsSideways = document.documentElement.scrollWidth > document.documentElement.clientWidth;
parent.document.documentElement.dataset.seen = JSON.stringify(seen);
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
def test_in_a_real_browser_it_sorts_filters_and_fetches_nothing(
    outputs: dict[str, Path], tmp_path: Path, width: int
) -> None:
    page = make_report({HOSTILE: read_result(hostile(outputs["mxfp4"], tmp_path))})
    file = tmp_path / "page.html"
    inner = escape(page.replace("</body>", f"<script>{_READER}</script></body>"))
    frame = f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{inner}"></iframe>'
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}', encoding="utf-8")
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--enable-logging=stderr"]
    command = ["chromium", *switches, *profile, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found
    seen = json.loads(unescape(found[1]))
    assert seen["title"].startswith("</script><script>")
    assert seen["all"] == 40  # linear layers
    assert len(seen["rising"]) == 23
    assert [float(text) for text in seen["rising"]] == sorted(float(text) for text in seen["rising"])
    assert [float(text) for text in seen["falling"]] == sorted(map(float, seen["rising"]), reverse=True)
    assert seen["sort"] == "ascending"
    assert len(seen["kept"]) == 17
    assert HOSTILE in seen["kept"]
    assert {"proj_out", "proj_out.bias", "single_transformer_blocks.2.proj_out"} <= set(seen["filtered"])
    assert seen["focused"].startswith("single_transformer_blocks.1.attn.to_q: mxfp4, SQNR 19.")
    assert "256 × 256" in seen["tip"]
    assert seen["found"] == ["single_transformer_blocks.1.attn.to_q"]
    assert seen["fetched"] == []
    assert seen["width"] == width
    assert not seen["scrollsSideways"]
