"""What each way to quantize costs a trained language model, on text it never saw."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from run_ckpt.cli.main import run_ckpt
from tests.converted import convert
from tests.language_model import N_CONTEXT, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model "bf16" and "unseen.txt"."""
    folder = tmp_path_factory.mktemp("language-model")
    train(folder)
    return folder


def figures(model: Path, *results: Path) -> list[dict[str, float]]:
    """Return the figures of run-ckpt compare on the text the model never saw."""
    paths = ("--model-path", model / "bf16", "--transformer-path", *results, "--text", model / "unseen.txt")
    arguments = ["compare", *map(str, paths), "--context", str(N_CONTEXT), "--dtype", "float32", "--json"]
    done = CliRunner().invoke(run_ckpt, arguments)
    assert done.exit_code == 0, done.output
    document: Any = json.loads(done.stdout)
    # Of 97 letters a guess is right once; 12 kB of text, so that chance is no matter.
    assert document["base_perplexity"] < 7
    assert document["n_tokens"] > 10_000
    return [result["figures"] for result in document["results"]]


def calibrate(model: Path) -> Path:
    """Record statistics on text that the model was trained on."""
    paths = ("--model-path", model / "bf16", "--text", model / "seen.txt", "--output", model / "stats")
    arguments = ["calibrate", *map(str, paths), "--samples", "64", "--context", str(N_CONTEXT), "--dtype", "float32"]
    done = CliRunner().invoke(run_ckpt, arguments)
    assert done.exit_code == 0, done.output
    return model / "stats"


def test_gptq_and_folds_bring_the_model_closer_to_its_source_on_text_it_never_saw(model: Path) -> None:
    options = {"calibration": calibrate(model)}
    ways: dict[str, dict[str, Any]] = {
        "MXFP4, to nearest": {"format": "mxfp4"},
        "MXFP4, GPTQ": {"format": "mxfp4", **options},
        "MXFP4, GPTQ, fold": {"format": "mxfp4", **options, "fold": True},
        "FP8, to nearest": {"format": "fp8"},
        "FP8, GPTQ": {"format": "fp8", **options},
    }
    results = [convert(model / "bf16", model / f"{i}", **way) for i, way in enumerate(ways.values())]
    found = dict(zip(ways, figures(model, *results), strict=True))
    for title, figure in found.items():
        print(f"{title:20}", figure)  # what the README says
    kl = {title: figure["kl"] for title, figure in found.items()}
    # One run: 6.3e-4, 1.8e-5, 1.8e-5; 2.2e-5, 1e-6.
    assert kl["MXFP4, GPTQ"] < kl["MXFP4, to nearest"] / 10
    assert kl["MXFP4, GPTQ, fold"] < kl["MXFP4, to nearest"] / 10
    assert kl["FP8, GPTQ"] < kl["FP8, to nearest"] / 4
    for title in ("MXFP4, GPTQ", "MXFP4, GPTQ, fold"):
        distance = abs(found[title]["perplexity_ratio"] - 1)
        assert distance < (found["MXFP4, to nearest"]["perplexity_ratio"] - 1) / 4


def test_rounding_to_nearest_costs_little_and_fp8_an_order_less(model: Path) -> None:
    mxfp4, fp8 = figures(
        model,
        convert(model / "bf16", model / "mxfp4", format="mxfp4"),
        convert(model / "bf16", model / "fp8", format="fp8"),
    )
    # 12.5 dB less weight error is 18 times less KL, which is quadratic in it.
    assert 5 < mxfp4["kl"] / fp8["kl"] < 40
    assert 0 < mxfp4["kl"] < 0.01
    assert mxfp4["perplexity_ratio"] < 1.01
    assert mxfp4["same_top"] < fp8["same_top"] < 1
