"""--max-size and --min-sqnr: the formats of layers within a budget, against all there are; the result loads."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner

from convert_ckpt import Options, plan_conversion
from convert_ckpt.cli import cli
from convert_ckpt.plan.policy import Choice
from convert_ckpt.planning import _choose
from run_ckpt import load_quantized
from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import CheckpointError, FaultsError, PartialRunError, UsageError
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import FLUX_DIGITS, convert, folder_bytes, load_all, random_weight, save_checkpoint
from tests.hub_fixtures import convert_remote
from tests.models import MODELS, save

QKV = tuple(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
OUT, DOWN, NEXT = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
SIZES = {**dict.fromkeys(QKV, (256, 512)), OUT: (512, 256), DOWN: (512, 1024), NEXT: (512, 1024)}
UNITS = (QKV, (OUT,), (DOWN,), (NEXT,))
FORMATS = ("mxfp4", "fp8", "keep")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; layers differ in how well a format fits them."""
    weights = {f"{name}.weight": random_weight(*size, seed=i) for i, (name, size) in enumerate(SIZES.items())}
    weights[f"{DOWN}.weight"] = (torch.randn(512, 1024).sign() * 0.5).bfloat16()  # nothing is lost
    weights[f"{NEXT}.weight"] *= torch.logspace(-6, 0, 1024).bfloat16()  # outliers in each block
    config: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    names = list(weights)
    shards = [{name: weights[name] for name in part} for part in (names[:4], names[4:])]
    return save_checkpoint(tmp_path_factory.mktemp("source") / "llm", shards, config)


@pytest.fixture(scope="module")
def damages(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Format -> layer -> relative error, as conversions to one format measured them."""
    output = tmp_path_factory.mktemp("single")
    found: dict[str, dict[str, float]] = {"keep": dict.fromkeys(SIZES, 0.0)}
    for name in FORMATS[:2]:
        convert(llm, output / name, format=name)
        layers = read_manifest(output / name).layers
        found[name] = {module: relative_error(layers[module]) for module in SIZES}
    return found


def relative_error(layer: Layer) -> float:
    return 0.0 if layer.sqnr_db is None else 10 ** (-layer.sqnr_db / 10)


def formats_of(manifest: Manifest) -> dict[str, str]:
    return {name: manifest.layers[name].format.name if name in manifest.layers else "keep" for name in SIZES}


def damage_of(formats: dict[str, str], damages: dict[str, dict[str, float]]) -> float:
    return sum(damages[formats[name]][name] for name in SIZES) / len(SIZES)


def all_combinations(source: Path, folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the size of all shards, and the formats, of each way to store the source, by recipes."""
    for number, chosen in enumerate(itertools.product(FORMATS, repeat=len(UNITS))):
        if set(chosen) == {"keep"}:
            continue
        formats = {name: format_ for unit, format_ in zip(UNITS, chosen, strict=True) for name in unit}
        rules = [f'[[rules]]\nmatch = "{name}"\nformat = "{format_}"\n' for name, format_ in formats.items()]
        recipe = folder / f"{number}.toml"
        recipe.write_text("".join(rules))
        dialect = None if "mxfp4" in chosen else "mxfp4"
        preview = plan_conversion(source, Options(format="mxfp4", recipe=recipe, dialect=dialect))
        yield preview.components[0]["output_nbytes"], formats


def shard_nbytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_no_way_to_store_it_in_that_size_loses_less(
    llm: Path, damages: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    combinations = list(all_combinations(llm, tmp_path))
    sizes = sorted({nbytes for nbytes, _ in combinations})
    for budget in (sizes[0], sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-2]):
        output = tmp_path / str(budget)
        convert(llm, output, format="mxfp4", max_size=budget)
        least = min(damage_of(formats, damages) for nbytes, formats in combinations if nbytes <= budget)
        assert shard_nbytes(output) <= budget
        # A manifest rounds to 0.01 dB.
        assert damage_of(formats_of(read_manifest(output)), damages) == pytest.approx(least, rel=3e-3)


def test_no_smaller_way_to_store_it_loses_as_little(
    llm: Path, damages: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    combinations = list(all_combinations(llm, tmp_path))
    for min_sqnr in (22, 30, 38):
        output = tmp_path / str(min_sqnr)
        convert(llm, output, format="mxfp4", min_sqnr=min_sqnr)
        formats = formats_of(read_manifest(output))
        smallest = min(nbytes for nbytes, other in combinations if damage_of(other, damages) <= 10 ** (-min_sqnr / 10))
        assert damage_of(formats, damages) <= 10 ** (-min_sqnr / 10)
        # Headers differ by the names of scales.
        assert shard_nbytes(output) == pytest.approx(smallest, abs=1000)


def test_layers_that_a_server_fuses_get_one_format(llm: Path, tmp_path: Path) -> None:
    for budget in ("1.1MB", "1.4MB", "1.8MB"):
        convert(llm, tmp_path / budget, format="mxfp4", max_size=budget)
        formats = formats_of(read_manifest(tmp_path / budget))
        assert len({formats[name] for name in QKV}) == 1


def test_what_is_stored_smaller_without_loss_is_not_raised(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4", max_size="1.8MB")
    formats = formats_of(read_manifest(tmp_path / "out"))
    assert formats[DOWN] == "mxfp4"
    assert set(formats.values()) > {"mxfp4"}


def test_components_of_a_pipeline_share_the_budget(llm: Path, tmp_path: Path) -> None:
    config = json.loads((llm / "config.json").read_text())
    save_checkpoint(tmp_path / "in" / "transformer", [load_all(llm)], config)
    easy = {name: weight.sign() * 0.5 for name, weight in load_all(llm).items()}  # nothing is lost in any format
    save_checkpoint(tmp_path / "in" / "transformer_2", [easy], config)
    convert(llm, tmp_path / "one", format="mxfp4", max_size="1.6MB")
    convert(tmp_path / "in", tmp_path / "out", format="mxfp4", max_size=1_600_000 + 900_000)
    first, second = (read_manifest(tmp_path / "out" / name) for name in ("transformer", "transformer_2"))
    assert set(formats_of(second).values()) == {"mxfp4"}
    assert formats_of(first) == formats_of(read_manifest(tmp_path / "one"))
    assert sum(map(shard_nbytes, (tmp_path / "out").iterdir())) <= 2_500_000


def test_the_manifest_says_who_decided_and_what_was_predicted(
    llm: Path, damages: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    convert(llm, tmp_path / "out", format="mxfp4", max_size="1.9MB")
    manifest = read_manifest(tmp_path / "out")
    recipe = manifest.recipe
    assert (recipe["max_size"], recipe["budget"]["by"]) == ("1.9MB", "relative error of the weights")
    expected = -10 * math.log10(damage_of(formats_of(manifest), damages))
    assert recipe["budget"]["predicted_sqnr_db"] == pytest.approx(expected, abs=0.02)
    kept = [manifest.kept[f"{name}.weight"] for name, found in formats_of(manifest).items() if found == "keep"]
    assert kept
    assert {tensor.reason for tensor in kept} == {"--max-size 1.9MB"}


def test_a_mixed_result_verifies_and_computes_what_its_weights_say(tmp_path: Path) -> None:
    summary = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4", max_size="8.3MB")
    assert len(summary.n_layers) == 2
    assert "Formats are mixed; right for: " in str(summary)
    (report,) = verify_output(tmp_path / "out", FLUX_DIGITS, Silent())
    assert not report.faults
    assert len(report.measured) == 23
    model = load_quantized(tmp_path / "out")
    layers = read_manifest(tmp_path / "out").layers
    assert {type(model.get_submodule(name)).__name__ for name in layers} == {"QuantizedLinear"}


@pytest.mark.parametrize(("source", "max_size"), [("flux", "8.3MB"), ("llm", "1.6MB")])
def test_a_mixed_result_is_right_for_whom_one_format_is(source: str, max_size: str, llm: Path, tmp_path: Path) -> None:
    folder = FLUX_DIGITS if source == "flux" else llm
    convert(folder, tmp_path / "single", format="mxfp4")
    convert(folder, tmp_path / "mixed", format="mxfp4", max_size=max_size)
    single, mixed = (read_manifest(tmp_path / name) for name in ("single", "mixed"))
    assert len({layer.format.name for layer in mixed.layers.values()}) == 2
    assert right_for(mixed) == right_for(single)


def right_for(manifest: Manifest) -> set[str]:
    return {name for name, reason in manifest.targets.items() if reason is None}


def test_one_format_is_not_called_mixed(tmp_path: Path) -> None:
    assert "mixed" not in str(convert(FLUX_DIGITS, tmp_path / "out", format="fp8"))


def test_nvfp4_is_raised_too(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="nvfp4", max_size="1.6MB")
    assert {"nvfp4", "fp8"} <= set(formats_of(read_manifest(tmp_path / "out")).values())


def test_explain_names_the_budget(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4", max_size="9.5MB", keep_last=1)
    result = run_command(tmp_path / "out", "single_transformer_blocks.0.proj_out")
    assert "--max-size 9.5MB, by relative error of the weights" in result
    result = run_command(tmp_path / "out", "single_transformer_blocks.2.proj_out")
    assert "--keep-last 1: single_transformer_blocks.2.*" in result


def run_command(output: Path, name: str) -> str:
    return str(CliRunner().invoke(run_ckpt, ["explain", str(output), name]).output)


def test_fp8_may_only_be_raised_to_what_it_was(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="fp8", max_size="2.4MB")
    assert set(formats_of(read_manifest(tmp_path / "out")).values()) == {"fp8", "keep"}


def test_a_dialect_that_says_one_format_keeps_to_it(llm: Path, tmp_path: Path) -> None:
    options = {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"}
    convert(llm, tmp_path / "out", **options, max_size="1.8MB")
    assert set(formats_of(read_manifest(tmp_path / "out")).values()) == {"mxfp4", "keep"}


def test_rules_go_before_the_budget(llm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[rules]]\nmatch = "{DOWN}"\nformat = "fp8"\n')
    convert(llm, tmp_path / "out", format="mxfp4", max_size="1.8MB", recipe=recipe, ignore=("*.o_proj",))
    formats = formats_of(read_manifest(tmp_path / "out"))
    assert (formats[DOWN], formats[OUT]) == ("fp8", "keep")


def test_first_and_last_blocks_of_each_stack_stay(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4", keep_first=1, keep_last=1)
    manifest = read_manifest(tmp_path / "out")
    assert {name.partition(".attn")[0].partition(".proj")[0] for name in manifest.layers} == {
        "single_transformer_blocks.1"
    }
    reasons = {kept.reason for name, kept in manifest.kept.items() if ".attn.to_q.weight" in name}
    assert reasons == {"--keep-first 1", "--keep-last 1"}


def test_no_layer_stays_that_its_runtime_would_cast_silently(tmp_path: Path) -> None:
    case = MODELS["ltx2"]  # SGLang gives its linears no names, so that no ignore list of FP8 reaches them
    save(case, case.build(), str(tmp_path / "in"))
    with pytest.raises(UsageError, match="nothing is left to choose"):
        convert(tmp_path / "in", tmp_path / "out", format="fp8", min_sqnr=33)
    convert(tmp_path / "in", tmp_path / "mixed", format="mxfp4", min_sqnr=24)


def test_an_sqnr_that_no_choice_has_is_refused_with_the_highest(tmp_path: Path) -> None:
    choices = [[Choice("mxfp4", 10, 0.02), Choice("fp8", 20, 0.001)], [Choice("mxfp4", 10, 0.01)]]
    with pytest.raises(UsageError, match=r"--min-sqnr 30: 19\.6 dB is the highest"):
        _choose(choices, 0, Options(format="mxfp4", min_sqnr=30), lambda formats: [])


def test_a_remote_source_gives_the_bytes_of_the_local_copy(llm: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(llm), "/budget/llm", recursive=True)
    convert_remote("memory://budget/llm", tmp_path / "out", format="mxfp4", max_size="1.6MB")
    convert(llm, tmp_path / "local", format="mxfp4", max_size="1.6MB")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    again = run("memory://budget/llm", tmp_path / "out", "--format", "mxfp4", "--max-size", "1.6MB")
    assert "is not empty" in str(again.exception)
    result = run("memory://budget/llm", "--format", "mxfp4", "--max-size", "1.6MB", "--dry-run")
    assert "would be fetched" in str(result.exception)


def test_a_stopped_run_goes_on_without_predicting_again(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Silent):
        def log(self, line: str) -> None:
            if line.startswith("wrote"):
                raise KeyboardInterrupt

    from convert_ckpt import convert as convert_api

    options: dict[str, Any] = {"format": "mxfp4", "max_size": "1.6MB"}
    with pytest.raises(KeyboardInterrupt):
        convert_api(llm, tmp_path / "out", **options, progress=Stop())
    with pytest.raises(PartialRunError, match=r"max_size was '1.6MB', now '1.65MB'"):
        convert(llm, tmp_path / "out", format="mxfp4", max_size="1.65MB")
    with monkeypatch.context() as patch:
        patch.setattr("convert_ckpt.pipeline.Predictor.predict", None)
        convert_api(llm, tmp_path / "out", **options)
    convert_api(llm, tmp_path / "at once", **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "at once")


def test_the_command_converts_and_says_that_formats_are_mixed(llm: Path, tmp_path: Path) -> None:
    result = run(llm, tmp_path / "out", "--format", "mxfp4", "--max-size", "1.6MB")
    assert result.exit_code == 0, result.output
    assert "Formats are mixed; right for: vllm+plugin, transformers, run-ckpt" in result.output.splitlines()
    assert shard_nbytes(tmp_path / "out") <= 1_600_000


def test_a_dry_run_shows_the_curve(llm: Path, tmp_path: Path) -> None:
    result = run(llm, "--format", "mxfp4", "--max-size", "1.6MB", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    (header,) = (n for n, line in enumerate(lines) if line.split()[:3] == ["size", "SQNR", "dB"])
    assert sum(line.startswith(">") for line in lines) == 1
    assert sum("O" in line.partition("|")[2] for line in lines[header:]) == 1
    as_json = run(llm, "--format", "mxfp4", "--max-size", "1.6MB", "--dry-run", "--json")
    (component,) = json.loads(as_json.output)
    curve = component["budget"]["curve"]
    assert [point["nbytes"] for point in curve] == sorted(point["nbytes"] for point in curve)
    assert component["budget"]["chosen"]["nbytes"] == component["output_nbytes"] <= 1_600_000
    convert(llm, tmp_path / "out", format="mxfp4", max_size="1.6MB")
    assert shard_nbytes(tmp_path / "out") == component["output_nbytes"]


def test_an_impossible_size_names_the_smallest_and_writes_nothing(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "smallest", format="mxfp4")
    nbytes = shard_nbytes(tmp_path / "smallest")
    with pytest.raises(UsageError, match=rf"\({nbytes:,} bytes\) is the smallest size possible"):
        convert(llm, tmp_path / "out", format="mxfp4", max_size=nbytes - 1)
    convert(llm, tmp_path / "out", format="mxfp4", max_size=nbytes)
    assert shard_nbytes(tmp_path / "out") == nbytes
    assert not (tmp_path / "out.partial").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fits as it is": ({"max_size": "1GB"}, "fits as it is"),
    "both": ({"max_size": "1GB", "min_sqnr": 20}, "Give either"),
    "no size": ({"max_size": "much"}, "no size"),
    "no dB": ({"min_sqnr": math.nan}, "not a number of dB"),
    "negative": ({"keep_first": -1}, "not a number of blocks"),
    "no budget": ({"sensitivities": Path("x.toml")}, "decides nothing without --max-size"),
    "nothing to choose": ({"max_size": "2MB", "ignore": ("*.self_attn.*",), "recipe": "all"}, "nothing is left"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_budgets_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, llm: Path, tmp_path: Path
) -> None:
    if "recipe" in options:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text('[[rules]]\nmatch = "*.down_proj"\nformat = "mxfp4"\n')
        options = {**options, "recipe": recipe}
    with pytest.raises(UsageError, match=message):
        convert(llm, tmp_path / "out", format="mxfp4", **options)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_holds_nan_is_named(tmp_path: Path) -> None:
    weight = random_weight(256, 256)
    weight[3, 5] = torch.nan
    config: dict[str, object] = {"architectures": ["LlamaForCausalLM"]}
    source = save_checkpoint(tmp_path / "in", [{f"{OUT}.weight": weight}], config)
    with pytest.raises(CheckpointError, match=rf"{OUT}\.weight holds NaN"):
        convert(source, tmp_path / "out", format="mxfp4", min_sqnr=25)


# Sensitivities

MEASURED: dict[str, Any] = {
    QKV[1]: {"mxfp4": 50.0, "fp8": 60.0},
    OUT: {"mxfp4": 10.0, "fp8": 40.0},
    DOWN: {"mxfp4": 12.0, "fp8": 12.5},
    NEXT: {"mxfp4": 45.0, "fp8": 55.0},
}


def write_toml(path: Path, table: dict[str, Any]) -> Path:
    lines = (f'"{name}" = {{ {", ".join(f"{k} = {v}" for k, v in entry.items())} }}' for name, entry in table.items())
    path.write_text("[snr_db]\n" + "\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_what_was_measured_decides(suffix: str, llm: Path, tmp_path: Path) -> None:
    path = tmp_path / f"measured{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({"snr_db": MEASURED}))
    else:
        write_toml(path, MEASURED)
    convert(llm, tmp_path / "out", format="mxfp4", max_size="1.7MB", sensitivities=path)
    manifest = read_manifest(tmp_path / "out")
    assert formats_of(manifest) == {**dict.fromkeys(QKV, "mxfp4"), OUT: "fp8", DOWN: "keep", NEXT: "mxfp4"}
    assert manifest.recipe["budget"]["by"] == f"sensitivities measured in {path.name}"
    # 50, 40, infinite and 45 dB together.
    expected = -10 * math.log10(10**-5 + 10**-4 + 10**-4.5)
    assert manifest.recipe["budget"]["predicted_sqnr_db"] == pytest.approx(expected, abs=0.005)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({OUT: None}, f"{OUT}: missing"),
    "unknown layer": ({"model.nothing": {"mxfp4": 1.0, "fp8": 1.0}}, "model.nothing: no layer whose format"),
    "a format is missing": ({OUT: {"mxfp4": 10.0}}, f"{OUT}: gives mxfp4, needs dB for mxfp4 and fp8"),
    "unknown format": ({OUT: {"mxfp4": 1.0, "fp8": 1.0, "int4": 1.0}}, "gives mxfp4, fp8, int4"),
    "no number": ({OUT: {"mxfp4": "much", "fp8": 1.0}}, "mxfp4 is 'much', not a number"),
    "no table": ({OUT: 12}, "gives no formats"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_of_sensitivities_are_named(change: dict[str, Any], message: str, llm: Path, tmp_path: Path) -> None:
    table = {name: entry for name, entry in {**MEASURED, **change}.items() if entry is not None}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"snr_db": table}))
    with pytest.raises(FaultsError, match="can't be used") as raised:
        convert(llm, tmp_path / "out", format="mxfp4", max_size="1.7MB", sensitivities=path)
    assert any(message in fault for fault in raised.value.faults)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"snr_db": 3}', '{"snr_db": {}, "more": 1}'])
def test_files_that_are_no_sensitivities_are_refused(text: str, llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"measured\.json: "):
        convert(llm, tmp_path / "out", format="mxfp4", max_size="1.7MB", sensitivities=path)
