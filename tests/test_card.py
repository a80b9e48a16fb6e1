"""The model card: metadata the Hub takes, numbers that are the manifest's, commands that work as printed."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from convert_ckpt.source.source_card import card_facts
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.publish.tool_url import PLACEHOLDER
from tests.checkpoints import folder_bytes, random_weight, save_checkpoint
from tests.converted import FLUX_DIGITS, SCHEMES, convert, edit_manifest, make_linear
from tests.hub_fixtures import convert_remote
from tests.hub_upload_server import serve_hub
from tests.test_extras import PROJECT
from tests.test_run_ckpt_cli import run

REVISION = "0ef5fff789c832c5c7f4e127f94c8b54bbcced44"
SOURCE_CARD = """---
license: other
license_name: some-licence
license_link: LICENSE.md
language: [en, de]
library_name: diffusers
pipeline_tag: text-to-image
tags: [image-generation, flux, diffusion-single-file, "base_model:x/y"]
model-index: [{name: x, results: []}]
date: 2026-01-01
---
# The source, in BF16
"""


@pytest.fixture
def hub_source(tmp_path: Path) -> Path:
    """A component in the Hub's cache, as hf download leaves it, with the repo's card."""
    snapshot = tmp_path / "hub" / "models--maker--flux" / "snapshots" / REVISION
    tensors = {f"blocks.0.{name}.weight": random_weight(256, 256) for name in ("up", "down")}
    save_checkpoint(snapshot / "transformer", [tensors], {"_class_name": "TinyModel"}, "diffusion_pytorch_model")
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "README.md").write_text(SOURCE_CARD)
    return snapshot


def card_of(output: Path, repo_id: str = "me/it-mxfp4", **options: Any) -> str:
    return make_card(read_result(output), repo_id, **options)


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def test_metadata_is_what_the_hub_wants_and_carries_over_what_still_holds(hub_source: Path, tmp_path: Path) -> None:
    card = ModelCard(card_of(convert(hub_source / "transformer", tmp_path / "out", format="mxfp4")))
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "some-licence",
        "license_link": "https://huggingface.co/maker/flux/blob/main/LICENSE.md",
        "language": ["en", "de"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "maker/flux",
        "base_model_relation": "quantized",
        "tags": ["image-generation", "flux", "mxfp4", "quantized", "convert-ckpt"],
    }


def test_the_metadata_validates(hub_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    card = ModelCard(card_of(convert(hub_source / "transformer", tmp_path / "out", format="fp8")))
    with serve_hub() as hub:  # a stand-in: it checks what it can without the Hub's own rules
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        card.validate()


def test_without_a_card_nothing_is_claimed(tmp_path: Path) -> None:
    card = ModelCard(card_of(convert(make_linear(tmp_path / "source", 256, 256), tmp_path / "out", format="fp8")))
    assert not {"license", "base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert card.data.library_name == "transformers"


def test_a_base_model_can_be_named(tmp_path: Path) -> None:
    output = convert(make_linear(tmp_path / "source", 256, 256), tmp_path / "out", format="fp8")
    assert "BASE" not in card_of(output, base_model="maker/llm")
    assert ModelCard(card_of(output, base_model="maker/llm")).data.base_model == "maker/llm"


@pytest.mark.parametrize(
    "text",
    ["", "# no metadata", "---\nlicense: mit\n", "---\n- a list\n---\n", "---\n{ not: [yaml\n---\n", "---\n---\n"],
    ids=["empty", "none", "unclosed", "list", "broken", "blank"],
)
def test_a_card_without_readable_metadata_gives_no_facts(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_facts(tmp_path / "README.md") == {}


def test_the_sources_card_is_not_taken_for_ours(tmp_path: Path) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    assert not (output / "README.md").exists()
    assert "README.md" not in read_result(output)[0].manifest.files


def test_numbers_follow_the_manifest(tmp_path: Path) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    name = "transformer_blocks.0.attn.to_q"
    edit_manifest(output, lambda manifest: manifest["layers"][name].update(sqnr_db=3.21))
    card = card_of(output)
    worst = card.partition("The 10 worst layers:")[2].splitlines()[4]
    assert worst.startswith(f"| `{name}` | 3.21 dB |")
    assert "SGLang builds it as a plain linear" in card
    for file, entry in read_result(output)[0].manifest.files.items():
        assert f"| `{file}` | {entry['nbytes']:,} | `{entry['blake3']}` |" in card


@pytest.mark.parametrize("has_map", [False, True])
def test_the_picture_is_linked_only_where_there_is_one(tmp_path: Path, has_map: bool) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="fp8")
    assert ("](sqnr_map.svg)" in card_of(output, has_map=has_map)) == has_map


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [make_linear, lambda folder, N, K: FLUX_DIGITS], ids=["llm", "flux"])
def test_every_dialect_has_commands_that_parse(scheme: str, make: Callable[..., Path], tmp_path: Path) -> None:
    output = convert(make(tmp_path / "source", 256, 256), tmp_path / "out", **SCHEMES[scheme])
    card = card_of(output)
    assert card.count("\n**") >= 2  # a consumer, and the hardware
    assert "{" not in "".join(code_blocks(card, "sh"))
    for block in code_blocks(card, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("scheme", ["fp8-channel-compressed-tensors", "mxfp4-compressed-tensors", "fp8-block"])
@pytest.mark.usefixtures("own_tables")
def test_the_transformers_block_runs_as_printed(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models import MODELS, save

    save(MODELS["llama"], MODELS["llama"].build(), str(tmp_path / "bf16"))
    convert(tmp_path / "bf16", tmp_path / "out", **SCHEMES[scheme])
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks(card_of(tmp_path / "out", "out"), "python")
    names: dict[str, Any] = {}
    exec(block, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("scheme", ["fp8-channel-compressed-tensors", "mxfp4-aiter"])
@pytest.mark.usefixtures("own_tables")
def test_a_text_encoder_is_loaded_by_its_class_and_served_by_nobody(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.models import MODELS, save

    save(MODELS["t5"], MODELS["t5"].build(), str(tmp_path / "bf16"))
    convert(tmp_path / "bf16", tmp_path / "out", **SCHEMES[scheme])
    monkeypatch.chdir(tmp_path)
    card = card_of(tmp_path / "out", "out")
    (block,) = code_blocks(card, "python")
    names: dict[str, Any] = {}
    exec(block, names)
    assert type(names["model"]).__name__ == "T5EncoderModel"
    for word in ("AutoModelForCausalLM", "vllm serve", "launch_server"):
        assert word not in card


def test_a_pipeline_with_text_encoders_has_commands_for_each_of_them(tmp_path: Path) -> None:
    from tests.models import MODELS, save

    save(MODELS["flux1"], MODELS["flux1"].build(), str(tmp_path / "source" / "transformer"))
    save(MODELS["t5"], MODELS["t5"].build(), str(tmp_path / "source" / "text_encoder_2"))
    (tmp_path / "source" / "model_index.json").write_text("{}")
    components = ("transformer", "text_encoder_2")
    convert_remote(str(tmp_path / "source"), tmp_path / "out", format="mxfp4", components=components)
    card = card_of(tmp_path / "out")
    assert "The `FluxTransformer2DModel` of" in card
    assert "--transformer-path me/it-mxfp4/transformer --prompt" in card
    assert "--text-encoder" not in card
    assert "**transformers**, `text_encoder_2` (" in card
    assert 'T5EncoderModel.from_pretrained("me/it-mxfp4", subfolder="text_encoder_2", dtype="auto")' in card


@pytest.mark.parametrize(("config", "stem"), [({}, "diffusion_pytorch_model"), ({"model_type": "x"}, "model")])
def test_a_card_names_no_class_where_there_is_none(config: dict[str, object], stem: str, tmp_path: Path) -> None:
    weights = {"blocks.0.up.weight": random_weight(256, 256)}
    card = card_of(convert(save_checkpoint(tmp_path / "in", [weights], config, stem), tmp_path / "out", format="mxfp4"))
    assert "None" not in card
    assert code_blocks(card, "python") == []
    assert "`run_ckpt.load_quantized(FOLDER, model=MODEL)`" in card


def test_a_recipe_over_the_keep_list_has_no_command_for_a_loader_that_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[[rules]]\nmatch = "*.norm1.linear"\nformat = "mxfp4"\n')
    usual = card_of(convert(FLUX_DIGITS, tmp_path / "usual", format="mxfp4"))
    over = card_of(convert(FLUX_DIGITS, tmp_path / "over", format="mxfp4", recipe=tmp_path / "recipe.toml"))
    assert ("sglang generate" in usual, "sglang generate" in over) == (True, False)
    assert "run-ckpt generate" in over


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "fp8-tensor"])
@pytest.mark.usefixtures("own_tables")
def test_the_diffusers_block_runs_as_printed(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", **SCHEMES[scheme])
    monkeypatch.chdir(tmp_path)
    (block, _) = code_blocks(card_of(tmp_path / "out", "out"), "python")
    names: dict[str, Any] = {}
    exec(block.partition("\npipeline = ")[0], names)  # there is no pipeline around this transformer
    assert sum(type(module).__name__ == "QuantizedLinear" for module in names["transformer"].modules()) == 23


@pytest.mark.parametrize("component", ["", "transformer"], ids=["pipeline", "component"])
def test_the_printed_command_gives_the_same_bytes(component: str, hub_source: Path, tmp_path: Path) -> None:
    output = convert(hub_source / component, tmp_path / "first", format="mxfp4", layout="plain", ignore=("*.up",))
    command = code_blocks(card_of(output), "sh")[-1]
    assert f"hf download -q maker/flux --revision {REVISION} " in command
    rerun(command, tmp_path, snapshot=hub_source)
    assert folder_bytes(tmp_path / "OUTPUT") == folder_bytes(output)


def test_the_command_for_a_local_source_gives_the_same_bytes(tmp_path: Path) -> None:
    output = convert(make_linear(tmp_path / "my source", 256, 256), tmp_path / "first", format="fp8")
    rerun(code_blocks(card_of(output), "sh")[-1], tmp_path, snapshot=tmp_path)
    assert folder_bytes(tmp_path / "OUTPUT") == folder_bytes(output)


def test_what_statistics_did_stands_beside_the_weights_errors(tmp_path: Path) -> None:
    from tests.test_calibrated import DOWN, MODEL, SIZES, write_all

    weights = {f"{name}.weight": random_weight(*size) for name, size in SIZES.items()}
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    source = save_checkpoint(tmp_path / "source", [weights], config)
    stats = write_all(tmp_path / "stats", source, settings={"n_samples": 32, "prompt": "a `|` b"})
    output = convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    edit_manifest(output, lambda manifest: manifest["layers"][DOWN]["output_sqnr_db"].update(gptq=23.45))
    card = card_of(output)
    assert "The statistics, `stats`, were recorded with `n_samples 32, prompt \"a '|' b\"`." in card
    (kind,) = (line for line in card.splitlines() if line.startswith("| `model.layers.*.mlp.down_proj` |"))
    assert kind.endswith("| GPTQ | 23.45 dB |")
    (row,) = (line for line in card.splitlines() if line.startswith(f"| `{DOWN}` |"))
    assert row.endswith("| GPTQ | 23.45 dB |")
    assert "output SQNR" not in card_of(convert(source, tmp_path / "rtn", format="mxfp4"))


def test_the_command_for_a_budget_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(FLUX_DIGITS)
    options: dict[str, Any] = {"format": "mxfp4", "max_size": "9.5MB", "keep_last": 1}
    output = convert(tmp_path / "source", tmp_path / "first", **options)
    card = card_of(output)
    assert "chosen to meet --max-size 9.5MB, by relative error of the weights" in card
    rerun(code_blocks(card, "sh")[-1], tmp_path, snapshot=tmp_path)
    assert folder_bytes(tmp_path / "OUTPUT") == folder_bytes(output)


def rerun(command: str, folder: Path, *, snapshot: Path) -> None:
    """Run what the card prints; a stand-in for hf download names the snapshot that is there already."""
    commands = {"hf": f"echo '{snapshot}'", "convert-ckpt": f"'{sys.executable}' -c '{_CONVERT}' \"$@\""}
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    root = Path(__file__).parents[1]
    script = f'export PATH="{folder}:$PATH" PYTHONPATH="{root}/convert:{root}/runtime"\n{command}'
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, timeout=120)


_CONVERT = "from convert_ckpt.cli import main; main()"


def test_a_pipeline_has_one_card_that_tells_its_components_apart(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        make_linear(tmp_path / "source" / name, 256, 256)
    output = convert(tmp_path / "source", tmp_path / "out", format="mxfp4")
    card = card_of(output)
    assert "| `transformer_2` |" in card
    assert "`transformer_2/model.layers.*.mlp.down_proj`" in card


def test_the_source_is_named_with_its_component_and_memory_is_said(hub_source: Path, tmp_path: Path) -> None:
    output = convert(hub_source / "transformer", tmp_path / "out", format="mxfp4")
    card = card_of(output)
    assert "of [`maker/flux/transformer`](https://huggingface.co/maker/flux) at commit" in card
    # Two layers [256, 256]: half a byte an element, a scale for 32.
    layer = 256 * 256 // 2 + 256 * 256 // 32
    assert f"It takes {format_nbytes(2 * layer)} of memory, and about {format_nbytes(3 * layer)} while" in card
    assert "at commit e4048607a535" in card


def test_the_card_says_how_to_get_the_tool(tmp_path: Path) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    assert "For a checkout of convert-ckpt: `git clone https://example.org/it`." in card_of(
        output, url="https://example.org/it"
    )
    assert PROJECT["urls"]["Repository"] == PLACEHOLDER


def test_the_command_prints_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "digits-mxfp4", format="mxfp4")
    assert run("card", output, "--repo", "me/digits") == 0
    assert capsys.readouterr().out == card_of(output, "me/digits")


def test_the_card_says_how_codes_were_chosen(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(convert(FLUX_DIGITS, tmp_path / "rtn", format="fp8"), folder)
    assert "rounded to nearest, without calibration data." in make_card(read_result(folder), "me/x")

    def calibrate(manifest: dict[str, Any]) -> None:
        manifest["recipe"] |= {"calibration": "stats", "static": True, "method": "gptq"}
        for name, layer in list(manifest["layers"].items())[:20]:
            layer |= {"method": "gptq", "output_sqnr_db": {"rtn": 1.0, "gptq": 2.0}}
            layer["tensors"]["input_scale"] = f"{name}.input_scale"

    edit_manifest(folder, calibrate)
    card = make_card(read_result(folder), "me/x")
    assert (
        "GPTQ chose the codes of 20 layers by statistics of their inputs; those of the other 3 are the nearest" in card
    )
    assert "--calibration stats --method gptq --static" in card
