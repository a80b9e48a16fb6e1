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
