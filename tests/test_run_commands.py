"""run-ckpt generate, bench and inspect --device, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.tools.bench import LayerTime
from tests.checkpoints import convert
from tests.converted import FLUX_DIGITS
from tests.pipelines import FLOAT32, make_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BF16 pipeline folder and what convert-ckpt makes of it."""
    root = tmp_path_factory.mktemp("pipeline")
    base = make_pipeline(root / "base")
    convert(base, root / "out", format="mxfp4")
    return base, root / "out"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "out"
    convert(FLUX_DIGITS, out, format="mxfp4")
    return out


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_ckpt, [str(argument) for argument in arguments])


def run_generate(base: Path, out: Path, output: Path, *more: object) -> Result:
    size = ("--height", 32, "--width", 32, "--steps", 2, *FLOAT32)
    paths = ("--model-path", base, "--transformer-path", out / "transformer", "--output", output)
    return run("generate", *paths, "--prompt", "a cat", *size, *more)


def test_generate_writes_an_image_and_says_what_it_loaded(pipeline: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_generate(*pipeline, tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "cat.png").size == (32, 32)
    assert "loaded transformer (FluxTransformer2DModel)" in result.output
    assert "18 mxfp4 layers on reference" in result.output
    assert "s a step" in result.output
    assert "peak memory" in result.output


def test_generate_never_reads_the_weights_it_replaces(pipeline: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(pipeline[0], tmp_path / "base")
    for shard in (base / "transformer").glob("*.safetensors*"):
        shard.unlink()
    result = run_generate(base, pipeline[1], tmp_path / "cat.png")
    assert result.exit_code == 0, result.output


def test_equal_seeds_give_equal_images(pipeline: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert run_generate(*pipeline, tmp_path / name, "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


@pytest.mark.parametrize(
    ("name", "says"),
    [("cat.txt", "must end in one of .png"), ("gone/cat.png", "its folder does not exist")],
)
def test_a_bad_output_is_refused_before_anything_is_loaded(
    pipeline: tuple[Path, Path], tmp_path: Path, name: str, says: str
) -> None:
    result = run_generate(Path("gone"), pipeline[1], tmp_path / name)
    assert isinstance(result.exception, CheckpointError)
    assert says in str(result.exception)


@pytest.mark.parametrize("index", [None, "[]", '{"_class_name": "FluxPipeline", "transformer": 5, "vae": [[[]]]}'])
def test_a_base_that_is_no_pipeline_is_named(pipeline: tuple[Path, Path], tmp_path: Path, index: str | None) -> None:
    if index:
        (tmp_path / "model_index.json").write_text(index)
    result = run_generate(tmp_path, pipeline[1], tmp_path / "cat.png")
    assert isinstance(result.exception, CheckpointError)
    assert ("no pipeline that diffusers can load" if index else "it is no pipeline") in str(result.exception)


def test_an_option_the_pipeline_lacks_is_named(pipeline: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_generate(*pipeline, tmp_path / "cat.png", "--num-frames", 3)
    assert isinstance(result.exception, UsageError)
    assert "num_frames" in str(result.exception)


def bench(out: Path, *more: object) -> Any:
    result = run("bench", out, "--device", "cpu", "--rows", "1,4", "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_bench_times_every_shape_and_loading(digits: Path) -> None:
    measured = bench(digits)
    rows = [LayerTime(**row) for row in measured["layers"]]
    assert {(row.N, row.K, row.M) for row in rows} == {
        (N, K, M) for N, K in ((256, 256), (1024, 256), (256, 1280)) for M in (1, 4)
    }
    assert sum(row.count for row in rows if row.M == 1) == 23
    for row in rows:
        assert row.backend == "reference"
        assert row.ratio == pytest.approx(row.bf16_seconds / row.seconds)
        assert row.tflops == pytest.approx(2 * row.M * row.N * row.K / row.seconds / 1e12)
    load = measured["load"]
    assert load["ratio"] == pytest.approx(load["seconds"] / load["read_seconds"])
    assert load["model_nbytes"] < FLUX_DIGITS_BF16_NBYTES


FLUX_DIGITS_BF16_NBYTES = sum(path.stat().st_size for path in FLUX_DIGITS.glob("*.safetensors"))


def test_bench_takes_the_backend_asked_for_and_prints_a_table(digits: Path) -> None:
    result = run("bench", digits, "--device", "cpu", "--rows", "1", "--backend", "dequantize")
    assert result.exit_code == 0, result.output
    assert "dequantize" in result.stdout
    assert "times reading the files" in result.stdout


def test_bench_multiplies_by_the_activations_asked_for(digits: Path) -> None:
    assert {row["activations"] for row in bench(digits)["layers"]} == {"bf16"}
    assert {row["activations"] for row in bench(digits, "--activations", "mxfp8")["layers"]} == {"mxfp8"}


def test_bench_refuses_rows_that_are_no_numbers(digits: Path) -> None:
    assert run("bench", digits, "--rows", "1,many").exit_code == 2


def test_inspect_says_which_backend_would_run_on_a_device(digits: Path) -> None:
    survey = json.loads(run("inspect", digits, "--device", "cpu", "--json").stdout)
    assert survey["device"] == "cpu"
    rows = {row["name"]: row for row in survey["rows"]}
    assert rows["reference"]["n_layers"] == 23
    assert sum(rows["dequantize"]["reasons"].values()) == 23
    assert rows["reference"]["activations"] == {"mxfp4": ["bf16", "fp8", "mxfp8", "nvfp4", "mxfp4"]}
    assert rows["aiter"]["activations"] == {}
    assert "reference" in run("inspect", digits, "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("format_", "device", "backend"),
    [
        ("mxfp4", "gfx950", "aiter"),
        ("mxfp4", "gfx942", "petit"),
        ("mxfp4", "gfx1201", "triton"),
        ("mxfp4", "sm90", "triton"),
        ("mxfp4", "sm120", "triton"),
        ("mxfp4", "cpu", "reference"),
        ("fp8", "gfx950", "aiter"),
        ("fp8", "gfx942", "aiter"),
        ("fp8", "sm90", "scaled_mm"),
        ("fp8", "sm80", "triton"),
    ],
)
def test_inspect_says_what_would_run_on_a_gpu_that_is_not_here(
    digits: Path, tmp_path: Path, format_: str, device: str, backend: str
) -> None:
    """README's table of backends, for the architectures it names."""
    output = digits
    if format_ == "fp8":
        output = tmp_path / "fp8"
        convert(FLUX_DIGITS, output, format="fp8", granularity="channel")
    found = json.loads(run("inspect", output, "--device", device, "--json").stdout)
    assert {row["name"]: row["n_layers"] for row in found["rows"] if row["n_layers"]} == {backend: 23}
    assert found["is_here"] is (device == "cpu")
    stored = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert 0 < stored - found["weights_nbytes"] < 30_000  # headers
    assert found["weights_nbytes"] < found["load_nbytes"] < found["weights_nbytes"] * 1.1


def test_inspect_says_where_nothing_runs_unasked(digits: Path) -> None:
    result = run("inspect", digits, "--device", "sm75")
    assert "23 layers run on none of them unless it is asked for by name." in result.stdout


def test_inspect_refuses_a_device_that_is_none(digits: Path) -> None:
    result = run("inspect", digits, "--device", "mi350")
    assert isinstance(result.exception, UsageError)
    assert "architecture such as gfx950" in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that must be missing")
def test_inspect_refuses_a_device_that_is_not_there(digits: Path) -> None:
    result = run("inspect", digits, "--device", "cuda")
    assert isinstance(result.exception, UsageError)
    assert "--device cuda" in str(result.exception)
