"""run-ckpt compare: its figures against arithmetic, and whole comparisons as a user runs them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from transformers import PreTrainedTokenizerFast

from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.tools.compare.figures import PIPELINE_FIGURES, TEXT_FIGURES, PipelineErrors, SampleErrors, parse_limits
from run_ckpt.tools.compare.metrics import psnr_db, ssim, sum_errors, sum_text_errors
from run_ckpt.tools.compare.trajectory import Sample, read_samples
from tests.checkpoints import convert
from tests.pipelines import FLOAT32, make_language_model, make_pipeline


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_ckpt, [str(argument) for argument in arguments])


def frames(*values: int) -> torch.Tensor:
    """Return one grey uint8 frame [1, 16, 16, 3] for each value."""
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 16, 16, 3)


# Figures


def test_the_figures_of_two_vectors_are_those_of_arithmetic() -> None:
    sums = sum_errors(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.5, -1.0]))
    assert sums.mae == pytest.approx(1.5 / 3)
    assert sums.rmse == pytest.approx(math.sqrt(1.25 / 3))
    assert sums.max_abs == 1
    assert sums.snr_db == pytest.approx(10 * math.log10(25 / 1.25))
    assert sums.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25 + 1)))


def test_sums_of_two_samples_are_those_of_both_in_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(50, generator=generator) for _ in range(4))
    both, joined = sum_errors(a, b) + sum_errors(c, d), sum_errors(torch.cat([a, c]), torch.cat([b, d]))
    for figure in ("n", "mae", "rmse", "max_abs", "snr_db", "cosine"):
        assert getattr(both, figure) == pytest.approx(getattr(joined, figure))


def test_equal_tensors_have_no_error_and_no_finite_snr() -> None:
    sums = sum_errors(torch.ones(4), torch.ones(4))
    assert (sums.cosine, sums.mae, sums.rmse, sums.max_abs, sums.snr_db) == (1, 0, 0, 0, math.inf)
    assert sum_errors(torch.zeros(4), torch.zeros(4)).cosine == 1


def test_psnr_is_of_255_over_the_error_of_all_frames() -> None:
    # Of two frames one is 5 off: the mean square is 12.5.
    assert psnr_db(frames(100, 100), frames(100, 105)) == pytest.approx(10 * math.log10(255**2 / 12.5))
    assert psnr_db(frames(100), frames(100)) == math.inf


def test_ssim_of_flat_frames_is_its_luminance_term() -> None:
    # Wang et al. 2004: without variance only (2 r x + C1) / (r^2 + x^2 + C1) is left, C1 = (0.01 * 1)^2.
    r, x, c1 = 100 / 255, 150 / 255, 1e-4
    expected = (2 * r * x + c1) / (r * r + x * x + c1)
    assert ssim(frames(100), frames(150)) == pytest.approx(expected, rel=1e-5)
    assert ssim(frames(100, 100), frames(150, 100)) == pytest.approx((expected + 1) / 2, rel=1e-5)


def test_kl_and_likelihoods_of_a_coin_are_those_of_arithmetic() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.4, 0.6]])
    # Logits are log-probabilities up to a constant.
    sums = sum_text_errors(p.log() + 3, q.log() - 2, torch.tensor([1]))
    assert sums.base_nll == pytest.approx(-math.log(0.25), rel=1e-5)
    assert sums.nll == pytest.approx(-math.log(0.6), rel=1e-5)
    assert sums.kl == pytest.approx(0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.6), rel=1e-5)
    assert (sums.n, sums.n_same_top) == (1, 0)


def test_json_says_null_where_nothing_differs() -> None:
    sums = sum_errors(torch.ones(4), torch.ones(4))
    same = PipelineErrors("x", (SampleErrors(Sample("a cat", 0), (sums,), math.inf, 1.0, None),), ())
    document = json.loads(json.dumps(same.to_json(), allow_nan=False))
    assert document["figures"]["snr"] is document["figures"]["psnr"] is document["steps"][0]["snr_summed"] is None
    assert document["figures"]["ssim"] == 1


@pytest.mark.parametrize(
    ("under", "over", "says"),
    [
        (["psnr"], [], "no number"),
        (["psnr=high"], [], "no number"),
        (["beauty=1"], [], "is none of snr, "),
        (["mae=1"], [], "is none of snr, "),
        ([], ["psnr=30"], "is none of mae, "),
        (["same_top=1"], [], "is none of snr, "),
        (["lpips=1"], [], "is none of snr, "),
    ],
)
def test_a_limit_that_means_nothing_is_refused(under: list[str], over: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_limits(PIPELINE_FIGURES, under, over)


def test_limits_bound_what_should_be_high_below_and_what_should_be_low_above() -> None:
    limits = parse_limits(TEXT_FIGURES, ["same_top=0.9"], ["kl=0.1"])
    assert [limit.fault("x", {"same_top": 0.9, "kl": 0.1}) for limit in limits] == [None, None]
    assert limits[0].fault("x", {"same_top": 0.89}) == "x: same_top 0.89 is under 0.9"
    assert limits[1].fault("x", {"kl": 0.2}) == "x: kl 0.2 is over 0.1"


def test_samples_take_the_prompts_in_turn_and_a_seed_each(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog  \n")
    assert read_samples(tmp_path / "prompts.txt", None, 5) == (Sample("a cat", 5), Sample("a dog", 6))
    assert [sample.prompt for sample in read_samples(tmp_path / "prompts.txt", 3, 0)] == ["a cat", "a dog", "a cat"]


# Pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline "base", and what convert-ckpt makes of it: "mxfp4" and "fp8"."""
    root = tmp_path_factory.mktemp("pipeline")
    base = make_pipeline(root / "base")
    for format_ in ("mxfp4", "fp8"):
        convert(base, root / format_, format=format_)
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return root


def compare(root: Path, *more: object, prompts: str = "prompts.txt") -> Result:
    size = ("--height", 32, "--width", 32, "--steps", 3, *FLOAT32)
    return run("compare", "--model-path", root / "base", "--prompts", root / prompts, *size, *more)


@pytest.fixture(scope="module")
def compared(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The JSON of comparing mxfp4 and fp8 with base, and the folder that was written."""
    folder = tmp_path_factory.mktemp("comparison") / "deep" / "folder"
    results = ("--transformer-path", pipeline / "mxfp4", pipeline / "fp8" / "transformer")
    result = compare(pipeline, *results, "--output", folder, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder


def test_every_step_of_every_result_is_measured(compared: tuple[Any, Path], pipeline: Path) -> None:
    document = compared[0]
    assert [result["name"] for result in document["results"]] == [
        str(pipeline / "mxfp4"),
        str(pipeline / "fp8" / "transformer"),
    ]
    for result in document["results"]:
        assert len(result["steps"]) == 3
        assert [sample["prompt"] for sample in result["samples"]] == ["a cat", "a dog"]
        assert [sample["seed"] for sample in result["samples"]] == [0, 1]
        # From one noise; each step adds error of its own.
        assert 0 < result["steps"][0]["rmse"] < result["steps"][-1]["rmse"]
    mxfp4, fp8 = (result["figures"] for result in document["results"])
    for figure in ("snr", "snr_summed", "cosine", "psnr", "ssim"):
        assert mxfp4[figure] < fp8[figure], figure


def test_figures_are_of_what_the_pipelines_themselves_compute(compared: tuple[Any, Path], pipeline: Path) -> None:
    """Final latents by diffusers alone, output_type="latent", base against the mxfp4 folder."""
    from diffusers import FluxPipeline

    from run_ckpt import load_quantized

    mxfp4 = load_quantized(pipeline / "mxfp4" / "transformer", dtype=torch.float32)
    finals = []
    for parts in ({}, {"transformer": mxfp4}):
        flux = FluxPipeline.from_pretrained(pipeline / "base", torch_dtype=torch.float32, **parts)
        options = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
        finals.append(
            [
                flux(prompt=prompt, generator=torch.Generator().manual_seed(seed), **options).images.double()
                for seed, prompt in enumerate(("a cat", "a dog"))
            ]
        )
    signal = [base.square().sum() for base in finals[0]]
    noise = [(base - ours).square().sum() for base, ours in zip(*finals, strict=True)]
    figures = compared[0]["results"][0]["figures"]
    assert figures["snr_summed"] == pytest.approx(float(10 * torch.log10(sum(signal) / sum(noise))))
    own = [float(10 * torch.log10(s / n)) for s, n in zip(signal, noise, strict=True)]
    assert figures["snr"] == pytest.approx(sum(own) / 2)


def test_the_folder_holds_the_figures_and_a_picture_of_all_rows(compared: tuple[Any, Path]) -> None:
    document, folder = compared
    assert json.loads((folder / "comparison.json").read_text()) == document
    picture = Image.open(folder / "comparison.png")
    # BASE, then two results with a row of what differs each; two samples of 32 x 32 in a row.
    assert picture.size == (480, 5 * (22 + 32 + 8))
    tiles = [[picture.crop((8 + 40 * x, 62 * y + 22, 40 + 40 * x, 62 * y + 54)) for x in (0, 1)] for y in range(5)]
    for column in (0, 1):
        base, ours, difference = (torch.tensor(list(tiles[row][column].tobytes())) for row in (0, 1, 2))
        assert torch.equal(difference, ((ours - base).abs() * 10).clamp(max=255))


def test_fail_under_exits_1_and_names_the_figure(pipeline: Path) -> None:
    result = compare(pipeline, "--transformer-path", pipeline / "mxfp4", "--samples", 1, "--fail-under", "psnr=99")
    assert result.exit_code == 1
    assert "psnr" in result.stderr
    assert "is under 99" in result.stderr
    assert "latents after each step" in result.stdout
    passing = ("--fail-under", "psnr=1", "--fail-over", "mae=99")
    assert compare(pipeline, "--transformer-path", pipeline / "mxfp4", "--samples", 1, *passing).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--fail-under", "psnr"], UsageError, "no number"),
        (["--num-frames", 3], UsageError, "has no num_frames"),
        (["--text", "prompts.txt"], UsageError, "either --prompts"),
    ],
    ids=["limit", "option", "both"],
)
def test_wrong_usage_is_named(pipeline: Path, arguments: list[object], error: type, says: str) -> None:
    if arguments[0] == "--text":
        arguments = ["--text", pipeline / "prompts.txt"]
    result = compare(pipeline, "--transformer-path", pipeline / "mxfp4", *arguments)
    assert isinstance(result.exception, error)
    assert says in str(result.exception)


def test_prompts_without_a_prompt_are_refused(pipeline: Path) -> None:
    (pipeline / "empty.txt").write_text("\n \n")
    result = compare(pipeline, "--transformer-path", pipeline / "mxfp4", prompts="empty.txt")
    assert isinstance(result.exception, UsageError)
    assert "holds no prompt" in str(result.exception)


# Language models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama "base" that reads letters, and "mxfp4" of it."""
    root = tmp_path_factory.mktemp("llama")
    make_language_model(root / "base")
    convert(root / "base", root / "mxfp4", format="mxfp4")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 4)
    return root


def compare_text(root: Path, *more: object) -> Result:
    paths = ("--model-path", root / "base", "--transformer-path", root / "mxfp4", "--text", root / "text.txt")
    return run("compare", *paths, *more)


def test_perplexity_and_kl_are_those_of_the_models_own_logits(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    from run_ckpt import load_quantized

    result = compare_text(llama, "--context", 64, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama / "base")
    tokens = tokenizer((llama / "text.txt").read_text(), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
    ours = load_quantized(llama / "mxfp4", dtype=torch.float32)
    nll, base_nll, kl = [], [], []
    for part in tokens.split(63):
        ids = torch.cat([torch.tensor([0]), part])[None]
        with torch.inference_mode():
            # transformers' own loss is the mean of -log p over the predicted tokens.
            base_nll.append(base(input_ids=ids, labels=ids).loss * len(part))
            nll.append(ours(input_ids=ids, labels=ids).loss * len(part))
            p, q = (torch.distributions.Categorical(logits=m(input_ids=ids).logits[0, :-1]) for m in (base, ours))
            kl.append(torch.distributions.kl_divergence(p, q).sum())
    figures = document["results"][0]["figures"]
    assert document["n_tokens"] == len(tokens)
    assert document["base_perplexity"] == pytest.approx(math.exp(sum(base_nll) / len(tokens)), rel=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nll) / len(tokens)), rel=1e-4)
    assert figures["kl"] == pytest.approx(float(sum(kl)) / len(tokens), rel=1e-3)
    assert figures["kl_worst"] >= figures["kl"] > 0


def test_a_text_comparison_prints_a_row_and_can_fail(llama: Path) -> None:
    result = compare_text(llama, "--fail-over", "kl=1e-9")
    assert result.exit_code == 1
    assert "perplexity" in result.stdout
    assert "is over 1e-09" in result.stderr


def test_a_text_of_one_token_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    paths = ("--model-path", llama / "base", "--transformer-path", llama / "mxfp4", "--text", tmp_path / "empty.txt")
    result = run("compare", *paths)
    assert isinstance(result.exception, UsageError)
    assert "longer text" in str(result.exception)


def test_a_language_model_with_prompts_is_pointed_to_text(llama: Path, pipeline: Path) -> None:
    paths = ("--model-path", llama / "base", "--transformer-path", llama / "mxfp4")
    result = run("compare", *paths, "--prompts", pipeline / "prompts.txt")
    assert isinstance(result.exception, CheckpointError)
