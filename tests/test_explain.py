"""run-ckpt explain: who decided what became of a tensor, and what would change it, by how much."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.kept import kept_groups
from run_ckpt.storage.manifest_file import read_manifest
from tests.checkpoints import random_weight, save_checkpoint
from tests.converted import FLUX_DIGITS, convert, edit_manifest

NARROW = "model.layers.0.mlp.down_proj"


def explain(output: Path, name: str) -> Any:
    result = CliRunner().invoke(run_ckpt, ["explain", str(output), name, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def the_one(output: Path, name: str) -> Any:
    (explanation,) = explain(output, name)
    return explanation


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block whose down_proj has a K that MXFP4's tuned kernels do not take, and a head."""
    shapes = {f"model.layers.0.self_attn.{name}_proj": (256, 256) for name in "qkvo"}
    shapes |= {NARROW: (256, 320), "model.layers.0.mlp.small": (128, 256), "lm_head": (512, 256)}
    tensors = {f"{name}.weight": random_weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    folder = tmp_path_factory.mktemp("explain") / "llm"
    return save_checkpoint(folder, [tensors], {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


@pytest.fixture(scope="module")
def results(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what converts the model once for each set of options."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(options)
        if key not in made:
            made[key] = convert(llm, tmp_path_factory.mktemp("explain") / "out", **({"format": "mxfp4"} | options))
        return made[key]

    return make


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_format_decides_where_no_rule_does(results: Callable[..., Path]) -> None:
    found = the_one(results(), "model.layers.0.self_attn.o_proj")
    assert found["decided_by"] == "--format mxfp4, as no rule says otherwise"
    assert found["stored"] == "mxfp4, layout aiter, scale rule even"
    assert found["changes"][0] == "--ignore model.layers.0.self_attn.o_proj keeps it"
    assert found["sqnr_db"] == read_manifest(results()).layers["model.layers.0.self_attn.o_proj"].sqnr_db


def test_layers_that_are_fused_at_load_are_named(results: Callable[..., Path]) -> None:
    others = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    assert the_one(results(), "model.layers.0.self_attn.k_proj")["fused_with"] == others


@pytest.mark.parametrize(
    ("options", "name", "decider", "change"),
    [
        ({}, "lm_head", "the rule lm_head of preset dense-llm: ", "a rule in a --recipe"),
        ({}, NARROW, "its shape: K = 320 is not a multiple of 256", "--allow-unaligned-k"),
        (
            {"ignore": ("*.o_proj",)},
            "model.layers.0.self_attn.o_proj",
            "--ignore *.o_proj",
            "--ignore *.o_proj left out",
        ),
        (
            {"ignore": ("*.q_proj",)},
            "model.layers.0.self_attn.k_proj",
            "fused with model.layers.0.self_attn.q_proj, which is kept",
            "quantizing model.layers.0.self_attn.q_proj too",
        ),
    ],
    ids=["preset", "shape", "ignore", "fused"],
)
def test_a_kept_layer_says_who_kept_it_and_what_would_quantize_it(
    results: Callable[..., Path], options: dict[str, Any], name: str, decider: str, change: str
) -> None:
    found = the_one(results(**options), name)
    assert found["stored"] == "BF16"
    assert found["decided_by"].startswith(decider)
    assert found["changes"][0].startswith(f"{change} saves ")


def test_a_rule_of_a_recipe_is_named_with_the_file(llm: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.toml", '[[rules]]\nmatch = "*.o_proj"\nformat = "keep"\nreason = "fragile"')
    found = the_one(convert(llm, tmp_path / "out", format="mxfp4", recipe=recipe), "model.layers.0.self_attn.o_proj")
    assert found["decided_by"] == "the rule *.o_proj of mine.toml: fragile"


def test_nothing_changes_what_no_format_takes_nor_what_is_no_linear_layer(results: Callable[..., Path]) -> None:
    assert the_one(results(), "model.layers.0.mlp.small")["changes"][0].startswith("--format nvfp4 saves ")
    bias = the_one(convert_flux(results), "proj_out.bias")
    assert (bias["decided_by"], bias["changes"]) == ("it is no 2-D weight of a linear layer", [])


def convert_flux(results: Callable[..., Path]) -> Path:
    folder = results().parent / "flux"
    return folder if folder.exists() else convert(FLUX_DIGITS, folder, format="mxfp4")


def test_like_blocks_are_one_answer_with_their_sum_and_worst(results: Callable[..., Path]) -> None:
    output = convert_flux(results)
    found = the_one(output, "single_transformer_blocks.*.proj_mlp")
    layers = [layer for name, layer in read_manifest(output).layers.items() if name.endswith("proj_mlp")]
    assert (found["name"], found["count"]) == ("single_transformer_blocks.*.proj_mlp", len(layers))
    assert found["sqnr_db"] == min(layer.sqnr_db or 0 for layer in layers)
    assert found["nbytes"] == sum(spec.nbytes for layer in layers for spec in layer.specs().values())


def test_an_unknown_name_gets_the_nearest_ones(results: Callable[..., Path]) -> None:
    done = CliRunner().invoke(run_ckpt, ["explain", str(results()), "model.layers.0.self_attn.o_prj"])
    assert "Nearest: model.layers.0.self_attn.o_proj" in str(done.exception)


def sizes(output: Path) -> int:
    return sum(spec.nbytes for spec in read_manifest(output).specs().values())


@pytest.mark.parametrize("option", [{"allow_unaligned_k": True}, {"layout": "plain"}], ids=["unaligned", "plain"])
def test_what_an_option_is_said_to_save_is_what_it_saves(results: Callable[..., Path], option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    word = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    (change,) = [change for change in the_one(results(), NARROW)["changes"] if change.startswith(f"{word} saves")]
    # All else is stored in the same number of bytes: only this layer's K is not a multiple of 256.
    assert change == f"{word} saves {(sizes(results()) - sizes(results(**option))) / 1000:.3g} kB"


def test_the_reasons_together_keep_every_byte_that_is_kept(results: Callable[..., Path]) -> None:
    manifest = read_manifest(convert_flux(results))
    groups = kept_groups(manifest)
    assert sum(group.n_tensors for group in groups) == len(manifest.kept) == 67
    assert sum(group.nbytes for group in groups) == sum(kept.spec.nbytes for kept in manifest.kept.values())
    assert [group.is_linear for group in groups] == sorted((group.is_linear for group in groups), reverse=True)


def test_a_recipe_quantizes_what_lies_outside_of_the_blocks_of_an_unknown_class(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": random_weight(256, 256) for name in ("head", "blocks.0.up")}
    source = save_checkpoint(tmp_path / "in", [tensors], {"_class_name": "TinyModel"})
    recipe = write(tmp_path / "all.toml", '[[rules]]\nmatch = "head"\nformat = "mxfp4"')
    assert set(read_manifest(convert(source, tmp_path / "kept", format="mxfp4")).layers) == {"blocks.0.up"}
    assert set(read_manifest(convert(source, tmp_path / "all", format="mxfp4", recipe=recipe)).layers) == {
        "blocks.0.up",
        "head",
    }


def test_a_manifest_with_an_unknown_decider_is_damaged(results: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    output = shutil.copytree(results(), tmp_path / "copy")
    edit_manifest(output, lambda m: m["kept"]["lm_head.weight"].update(decided_by={"by": "fate", "rule": None}))
    done = CliRunner().invoke(run_ckpt, ["explain", str(output), "lm_head"])
    assert "decided_by 'fate' is unknown" in str(done.exception)
