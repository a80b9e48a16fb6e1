"""--fold moves channels' sizes between layers and changes nothing that the model computes, class by class."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from convert_ckpt.cli import cli
from convert_ckpt.plan.preset import load_preset, preset_names
from run_ckpt import load_quantized, record_statistics
from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.contract.folds import Fold
from run_ckpt.progress import Silent
from run_ckpt.storage.layer_statistics import read_statistics
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.converted import edit_manifest, edit_tensor, reseal
from tests.hub_fixtures import assert_same_but_for_the_source, convert_remote, hub
from tests.hub_server import HubServer, read_files
from tests.model_classes import CLASSES
from tests.models import MODELS, ModelCase, run, save

__all__ = ["hub"]

# Case -> how many folds it has: blocks times those of each.
FOLDED = {
    "z-image": 4 * 2,
    "flux1": 1 * 2 + 2,
    "hunyuan-video": 1 * 4 + 2,
    "hunyuan-image": 1 * 4 + 1,
    "hunyuan-video-1.5": 1 * 4,
    "qwen-image": 2 * 4,
    "wan-2.2": 2,
    "wan-2.1-i2v": 2,
    "wan-vace": 1,
    "wan-animate": 1,
    "llama": 2 * 2,
    "qwen3": 2 * 2,
}
# A power of two in a norm's weight commutes with every rounding after it.
NORMS_ONLY = {"z-image", "wan-2.2", "wan-2.1-i2v", "wan-vace", "wan-animate", "llama", "qwen3"}
N_SAMPLES = 4
CASES = {**MODELS, **CLASSES}


def uneven(model: nn.Module) -> nn.Module:
    """Give norms, modulations and weights channels of different sizes, as trained models have them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sizes = torch.exp(torch.randn(parameter.shape[-1:], generator=generator) * 0.7).to(parameter.dtype)
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            if is_norm or (parameter.ndim == 2 and "embed" not in name):
                parameter.mul_(sizes)
    return model


class Source:
    """A small model on disk, and statistics of its own runs."""

    def __init__(self, case: ModelCase, folder: Path):
        self.case, self.folder, self.stats = case, folder / "bf16", folder / "stats"
        self.model = uneven(case.build())
        save(case, self.model, str(self.folder))
        record(self.model, case, self.stats)


def record(model: nn.Module, case: ModelCase, folder: Path) -> None:
    with torch.no_grad(), record_statistics(model, folder) as recorder:
        for sample in range(N_SAMPLES):
            recorder.next_sample()
            torch.manual_seed(sample)
            model(**case.inputs())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    made: dict[str, Source] = {}

    def make(name: str) -> Source:
        if name not in made:
            made[name] = Source(CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


def powers(fold: Fold) -> Tensor:
    return torch.ldexp(torch.ones(len(fold.exponents)), torch.tensor(fold.exponents))


def folded_model(source: Source, output: Path) -> nn.Module:
    """Return BASE with what was folded and nothing quantized: kept tensors of the result, and weights times d."""
    manifest, tensors = read_manifest(output), load_all(source.folder)
    kept = load_all(output)
    tensors.update({name: kept[name] for name in manifest.kept})
    for fold in manifest.folds:
        for name in fold.readers:
            if name not in manifest.kept:
                tensors[name] = (tensors[name].float() * powers(fold)).to(tensors[name].dtype)
    model = source.case.build()
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return model


def largest_spread(folds: tuple[Fold, ...]) -> int:
    return max(-min(fold.exponents) for fold in folds)


def run_in_float32(case: ModelCase, model: nn.Module) -> Tensor:
    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    inputs = lambda: {name: widen(value) for name, value in case.inputs().items()}  # noqa: E731
    return run(replace(case, inputs=inputs), uneven(model).float())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_every_class_with_folds_is_here() -> None:
    presets = {CASES[name].preset for name in FOLDED}
    # Chroma has FLUX.1's blocks, but no modulations in them; gpt-oss is none of the classes that dense-llm folds.
    assert presets | {"chroma", "gpt-oss"} == {name for name in preset_names() if load_preset(name).folds}


@pytest.mark.parametrize("name", FOLDED)
def test_the_folded_model_computes_what_base_computes(
    name: str, sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources(name)
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True, method="rtn")
    folds = read_manifest(tmp_path / "out").folds
    assert len(folds) == FOLDED[name]
    assert largest_spread(folds) >= 2
    model = folded_model(source, tmp_path / "out")
    base, folded = run(source.case, source.model), run(source.case, model)
    if name in NORMS_ONLY:
        assert torch.equal(folded, base)
        return
    # What BF16 itself costs BASE: the same weights in float32.
    exact = run_in_float32(source.case, source.case.build())
    assert 0 < relative_error(folded, exact) < 1.25 * relative_error(base, exact)


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
@pytest.mark.parametrize("name", ["z-image-wide", "flux1", "hunyuan-video", "qwen-image", "llama"])
def test_the_result_verifies_loads_and_dequantizes(
    name: str, weight_format: str, sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources(name)
    options = {"format": weight_format, "calibration": source.stats, "fold": True}
    convert(source.folder, tmp_path / "out", **options)
    (report,) = verify_output(tmp_path / "out", source.folder, Silent(), statistics=source.stats)
    assert not report.faults
    assert read_manifest(tmp_path / "out").folds
    loaded = run(source.case, load_quantized(tmp_path / "out", model=source.case.build()))
    # Rounding random weights costs as much as without a fold; a fold in the wrong place costs all.
    assert relative_error(loaded, run(source.case, source.model)) < {"mxfp4": 0.8, "fp8": 0.25}[weight_format]
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = source.case.build()
    plain.load_state_dict(load_all(tmp_path / "plain"), strict=False)
    assert relative_error(run(source.case, plain), loaded) < 0.05


def test_the_loader_and_the_card_say_that_loras_do_not_fit(
    sources: Callable[[str], Source], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = sources("llama")
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)
    load_quantized(tmp_path / "out", model=source.case.build())
    assert "a LoRA that was trained on the source does not fit" in caplog.text
    card = make_card(read_result(tmp_path / "out"), "me/llama")
    assert "bit for bit those of the source, but for norms and modulations" in card
    assert "--calibration stats --fold" in card


def test_the_consumers_own_code_decodes_a_folded_result(sources: Callable[[str], Source], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = sources("llama")
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", quantization_config=config)
    assert torch.equal(run(source.case, loaded), run(source.case, plain))


@pytest.mark.parametrize("options", [{"format": "mxfp4"}, {"format": "fp8", "static": True}], ids=["mxfp4", "fp8"])
def test_folding_while_converting_is_converting_the_folded_model_with_its_own_statistics(
    options: dict[str, Any], sources: Callable[[str], Source], tmp_path: Path
) -> None:
    """Norms alone are folded in this class, so that all of it is exact: GPTQ's Hessian, ranges, scales and codes."""
    source = sources("llama")
    convert(source.folder, tmp_path / "out", **options, calibration=source.stats, fold=True)
    model = folded_model(source, tmp_path / "out")
    save(source.case, model, str(tmp_path / "folded"))
    record(model, source.case, tmp_path / "stats")
    convert(tmp_path / "folded", tmp_path / "expected", **options, calibration=tmp_path / "stats")
    expected, actual = load_all(tmp_path / "expected"), load_all(tmp_path / "out")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert "gptq" in {layer.method for layer in read_manifest(tmp_path / "out").layers.values()}


def test_channels_are_divided_by_the_root_of_activation_over_weight_as_a_power_of_two(
    sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources("llama")
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)
    statistics, weights = read_statistics(source.stats), load_all(source.folder)
    for fold in read_manifest(tmp_path / "out").folds:
        amax = statistics[fold.readers[0].removesuffix(".weight")].read("amax").astype(np.float64)
        columns = torch.cat([weights[name] for name in fold.readers]).abs().amax(0).double().numpy()
        wanted = 0.5 * np.log2(amax / columns)
        difference = np.array(fold.exponents) - (wanted - np.round(wanted).max())
        assert np.abs(difference).max() <= 0.5
        assert max(fold.exponents) == 0


def test_a_kept_layer_that_reads_the_same_input_is_folded_too(sources: Callable[[str], Source], tmp_path: Path) -> None:
    source, kept = sources("flux1"), "single_transformer_blocks.0.proj_mlp"
    options = {"format": "mxfp4", "calibration": source.stats, "fold": True, "ignore": (kept,)}
    convert(source.folder, tmp_path / "out", **options)
    (fold,) = (fold for fold in read_manifest(tmp_path / "out").folds if f"{kept}.weight" in fold.readers)
    weight = load_all(source.folder)[f"{kept}.weight"]
    assert torch.equal(load_all(tmp_path / "out")[f"{kept}.weight"], (weight * powers(fold)).bfloat16())
    (report,) = verify_output(tmp_path / "out", source.folder, Silent())
    assert not report.faults


def test_a_modulation_that_is_quantized_itself_is_left_alone(sources: Callable[[str], Source], tmp_path: Path) -> None:
    source = sources("flux1")
    (tmp_path / "recipe.toml").write_text('[[rules]]\nmatch = "*.norm.linear"\nformat = "mxfp4"\n')
    options = {"format": "mxfp4", "calibration": source.stats, "fold": True, "recipe": tmp_path / "recipe.toml"}
    convert(source.folder, tmp_path / "out", **options)
    writers = {part.tensor for fold in read_manifest(tmp_path / "out").folds for part in fold.writers}
    assert writers == {
        f"transformer_blocks.0.{norm}.linear.{part}"
        for norm in ("norm1", "norm1_context")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("n_workers", [1, 4])
def test_any_number_of_workers_writes_the_same_files(
    n_workers: int, sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources("flux1")
    for name, workers in (("two", 2), ("other", n_workers)):
        options = {"format": "fp8", "calibration": source.stats, "fold": True}
        convert(source.folder, tmp_path / name, workers, **options)
    for path in (tmp_path / "two").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_repo_of_the_hub_is_folded_alike_and_told_from_one_with_other_weights(
    hub: HubServer, sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources("llama")
    options = {"format": "mxfp4", "calibration": source.stats, "fold": True}
    hub.add_repo("me/llama", read_files(source.folder))
    convert_remote("me/llama", tmp_path / "out", **options)
    convert(source.folder, tmp_path / "local", **options)
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    other = {name: tensor + 1 for name, tensor in load_all(source.folder).items()}
    save_checkpoint(tmp_path / "other", [other], json.loads((source.folder / "config.json").read_text()))
    hub.add_repo("me/other", read_files(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="other weights"):
        convert_remote("me/other", tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


# Faults


def spoil_norm(output: Path) -> None:
    def edit(data: bytearray) -> None:
        data[0] ^= 1

    edit_tensor(output, "model.layers.0.input_layernorm.weight", edit)
    reseal(output)


def spoil_exponents(output: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        exponents = manifest["folds"][0]["exponents"].split()
        exponents[5] = str(int(exponents[5]) - 1)
        manifest["folds"][0]["exponents"] = " ".join(exponents)

    edit_manifest(output, edit)


def leave_out_folds(output: Path) -> None:
    edit_manifest(output, lambda manifest: manifest.pop("folds"))


@pytest.mark.parametrize("damage", [spoil_norm, spoil_exponents, leave_out_folds])
def test_verify_finds_what_is_not_the_folded_source(
    damage: Callable[[Path], None], sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources("llama")
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)
    damage(tmp_path / "out")
    (report,) = verify_output(tmp_path / "out", source.folder, Silent())
    assert any("input_layernorm.weight: differs from the source" in fault for fault in report.faults)


@pytest.mark.parametrize(
    "wrong",
    [{"exponents": "0 0 0"}, {"exponents": " ".join(["1"] * 256)}, {"readers": ["model.nothing.weight"]}],
    ids=["too few channels", "above 0", "unknown reader"],
)
def test_a_fold_that_contradicts_the_manifest_is_a_fault(
    wrong: dict[str, Any], sources: Callable[[str], Source], tmp_path: Path
) -> None:
    source = sources("llama")
    convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)
    edit_manifest(tmp_path / "out", lambda manifest: manifest["folds"][0].update(wrong))
    with pytest.raises(CheckpointError, match="a fold of"):
        load_quantized(tmp_path / "out", model=source.case.build())


def test_blocks_that_share_a_modulation_are_not_folded(sources: Callable[[str], Source], tmp_path: Path) -> None:
    source = sources("flux2")
    with pytest.raises(FaultsError, match="nothing to fold: preset flux2 names none that is exact in Flux2"):
        convert(source.folder, tmp_path / "out", format="fp8", calibration=source.stats, fold=True)


def test_a_class_whose_norm_adds_one_is_not_folded(sources: Callable[[str], Source], tmp_path: Path) -> None:
    source = sources("llama")
    config = json.loads((source.folder / "config.json").read_text())
    config["architectures"] = ["GemmaForCausalLM"]
    save_checkpoint(tmp_path / "in", [load_all(source.folder)], config)
    for path in source.stats.iterdir():
        (tmp_path / "stats").mkdir(exist_ok=True)
        (tmp_path / "stats" / path.name).write_bytes(
            path.read_bytes().replace(b"LlamaForCausalLM", b"GemmaForCausalLM")
        )
    with pytest.raises(FaultsError, match="exact in GemmaForCausalLM"):
        convert(tmp_path / "in", tmp_path / "out", format="fp8", calibration=tmp_path / "stats", fold=True)


def test_a_norm_that_another_layer_reads_is_left_alone_and_said_so(tmp_path: Path) -> None:
    case = MODELS["llama"]

    model = uneven(case.build())
    block = model.model.layers[0]
    block.add_module("probe", nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    block.mlp.register_forward_pre_hook(lambda _, args: (block.probe(args[0]), None)[1])
    with torch.no_grad(), record_statistics(model, tmp_path / "stats") as recorder:
        for sample in range(N_SAMPLES):
            recorder.next_sample()
            torch.manual_seed(sample)
            model(**case.inputs())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    save_checkpoint(tmp_path / "in", [tensors], config)
    convert(tmp_path / "in", tmp_path / "out", format="fp8", calibration=tmp_path / "stats", fold=True)
    readers = [name for fold in read_manifest(tmp_path / "out").folds for name in fold.readers]
    assert "model.layers.0.mlp.up_proj.weight" not in readers
    assert "model.layers.1.mlp.up_proj.weight" in readers


@pytest.mark.parametrize("calibration", [None, "ranges.safetensors"])
def test_folds_need_statistics(calibration: str | None, sources: Callable[[str], Source], tmp_path: Path) -> None:
    path = tmp_path / calibration if calibration else None
    with pytest.raises(UsageError, match="--fold"):
        convert(sources("llama").folder, tmp_path / "out", format="fp8", calibration=path, fold=True)


def test_the_plan_lists_what_is_folded(sources: Callable[[str], Source]) -> None:
    source = sources("llama")
    arguments = [str(source.folder), "--format", "fp8", "--calibration", str(source.stats), "--fold", "--dry-run"]
    result = CliRunner().invoke(cli, arguments)
    assert "note: 4 inputs are smoothed by folds; a LoRA that was trained on the source does not fit" in result.output
    (line,) = (line for line in result.output.splitlines() if "input_layernorm" in line)
    assert "folded" in line
