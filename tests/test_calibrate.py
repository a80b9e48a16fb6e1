"""run-ckpt calibrate records what goes into the transformers of a pipeline, or into a language model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import UsageError
from run_ckpt.storage.layer_statistics import fisher_name, read_statistics
from run_ckpt.storage.units import parse_nbytes
from run_ckpt.tools.calibrate import DEFAULT_PROMPTS, hold_out, sizes_in_turn
from run_ckpt.tools.compare.trajectory import Sample, read_samples
from tests.pipelines import FLOAT32, make_language_model, make_pipeline

SMALL = ("--height", 32, "--width", 32, "--steps", 2, "--samples", 4, *FLOAT32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline and prompts."""
    root = tmp_path_factory.mktemp("base")
    make_pipeline(root / "pipeline")
    (root / "prompts.txt").write_text("a\nb\nc\nd\n")
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_ckpt, [str(argument) for argument in arguments])


def calibrate(base: Path, output: Path, *more: object) -> Result:
    options = ("--model-path", base / "pipeline", "--prompts", base / "prompts.txt", "--output", output)
    return run("calibrate", *options, *SMALL, *more)


def test_the_statistics_of_a_pipeline_are_those_of_its_own_calls(base: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    result = calibrate(base, tmp_path / "stats")
    assert result.exit_code == 0, result.output
    statistics = read_statistics(tmp_path / "stats" / "transformer")

    flux = FluxPipeline.from_pretrained(base / "pipeline", torch_dtype=torch.float32)
    rows: list[torch.Tensor] = []
    flux.transformer.single_transformer_blocks[0].proj_mlp.register_forward_hook(
        # Recorded inputs are rounded to BF16.
        lambda _module, args, _output: rows.append(args[0].bfloat16().double().flatten(0, -2))
    )
    for n, prompt in enumerate("acd"):  # b is held out
        generator = torch.Generator().manual_seed(1000 + "abcd".index(prompt))
        flux(prompt, height=32, width=32, num_inference_steps=2, generator=generator, output_type="latent")
        assert len(rows) == 2 * (n + 1)
    x = torch.cat(rows)
    found = statistics["single_transformer_blocks.0.proj_mlp"]
    assert "single_transformer_blocks.0.attn.to_q" in found.layers
    assert found.model == "FluxTransformer2DModel"
    expected = (x.T @ x / len(x)).numpy()
    # float16's step below 1, times what the correlations are multiplied with.
    np.testing.assert_allclose(found.hessian()[0], expected, atol=2.0**-11 * expected.diagonal().max())


def test_passes_that_fit_a_memory_write_the_same_files(base: Path, tmp_path: Path) -> None:
    whole = calibrate(base, tmp_path / "whole")
    passes = calibrate(base, tmp_path / "passes", "--memory", "20MB")
    assert passes.output.count("wait for the next pass") >= 1 > whole.output.count("wait for the next pass")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "passes" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_samples_have_several_sizes_by_turns(base: Path, tmp_path: Path) -> None:
    options = ("--model-path", base / "pipeline", "--prompts", base / "prompts.txt", "--steps", 2, "--samples", 4)
    result = run("calibrate", *options, *FLOAT32, "--output", tmp_path, "--size", "32x32", "--size", "32x64")
    assert result.exit_code == 0, result.output
    statistics = read_statistics(tmp_path / "transformer")["transformer_blocks.0.attn.to_q"]
    # Patches of 2 x 2 pixels: 256 and 512 tokens, in two steps each; the second sample is held out.
    assert statistics.read("n_rows").tolist() == [2 * (256 + 256 + 512), 2 * 512]
    assert statistics.settings["sizes"] == ["32x32", "32x64"]


@pytest.mark.parametrize("n_sizes", [1, 2, 3, 4])
def test_held_out_samples_have_every_size(n_sizes: int) -> None:
    sizes = [(n, n) for n in range(1, n_sizes + 1)]
    found = list(sizes_in_turn(32, sizes))
    held_out = [size["width"] for n, size in enumerate(found) if n % 4 == 1]
    assert set(held_out) == {n for n, _ in sizes}
    assert list(sizes_in_turn(2, ())) == [{}, {}]


@pytest.mark.parametrize("more", [("--size", "32"), ("--size", "0x4"), ("--size", "32x32", "--width", 32)])
def test_sizes_that_make_no_sense_are_refused(more: tuple[object, ...], base: Path, tmp_path: Path) -> None:
    result = run("calibrate", "--model-path", base / "pipeline", "--output", tmp_path / "stats", *more)
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "stats").exists()


def test_a_language_model_reads_windows_of_the_text(tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    options = ("--text", tmp_path / "text.txt", "--context", 64, "--samples", 8, "--output", tmp_path / "stats")
    options += ("--fisher",)
    result = run("calibrate", "--model-path", model, *options)
    assert result.exit_code == 0, result.output
    statistics = read_statistics(tmp_path / "stats")
    attention = statistics["model.layers.0.self_attn.q_proj"]
    assert {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"} < set(attention.layers)
    assert attention.read("n_rows").tolist() == [6 * 64, 2 * 64]
    assert all(found.read(fisher_name(name)).any() for name, found in statistics.items())


def test_a_prompt_is_held_out_with_all_its_samples() -> None:
    samples = [Sample("abcde"[n % 5], n) for n in range(15)]
    assert [sample.prompt for sample, out in zip(samples, hold_out(samples), strict=True) if out] == ["b"] * 3
    assert list(hold_out([Sample("a", n) for n in range(4)])) == [False, True, False, False]


def test_there_is_a_prompt_for_each_default_sample() -> None:
    samples = read_samples(DEFAULT_PROMPTS, 32, 0)
    assert len({sample.prompt for sample in samples}) == 32


def test_prompts_and_text_exclude_each_other(base: Path, tmp_path: Path) -> None:
    result = calibrate(base, tmp_path, "--text", base / "prompts.txt")
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize(("text", "nbytes"), [("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), ("77", 77), ("2kB", 2000)])
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "4 gigabytes", "-1GB", "4XB", "nan", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_nbytes(text)
