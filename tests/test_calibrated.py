"""convert-ckpt --calibration DIR: GPTQ's codes and static scales from statistics, for whole checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from convert_ckpt.cli import cli
from convert_ckpt.methods.gptq import factorize, round_rows
from convert_ckpt.methods.grid import Grid
from run_ckpt.contract.codec import dequantize, quantize
from run_ckpt.contract.elements import decode_e8m0
from run_ckpt.contract.errors import CheckpointError, FaultsError, PartialRunError, UsageError
from run_ckpt.contract.formats import PLAIN_MXFP4
from run_ckpt.contract.manifest import Layer
from run_ckpt.progress import Silent
from run_ckpt.storage.components import open_checkpoint
from run_ckpt.storage.layer_statistics import LayerIdentity, pack_below_diagonal, write_statistics
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.rows import decode_rows
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.converted import SCHEMES, edit_manifest, edit_tensor, reseal

QKV = tuple(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
DOWN = "model.layers.0.mlp.down_proj"
SIZES = {**dict.fromkeys(QKV, (256, 512)), DOWN: (1056, 256)}
INPUTS = (QKV, (DOWN,))
MODEL = "LlamaForCausalLM"


def make_hessian(K: int, seed: int) -> np.ndarray:
    """float32 [K, K] of inputs that are correlated, and the same for every seed but for the samples."""
    mixing = np.random.default_rng(K).standard_normal((K, K)) / np.sqrt(K) + np.eye(K)
    x = np.random.default_rng(seed).standard_normal((4 * K, K)) @ mixing
    return (x.T @ x / len(x)).astype(np.float32)


def correlations(hessian: np.ndarray, block_size: int) -> np.ndarray:
    roots = np.sqrt(hessian.diagonal())
    scaled = (hessian / roots / roots[:, None]).astype(np.float16)
    corners = [slice(i, i + block_size) for i in range(0, len(hessian), block_size)]
    return np.concatenate([pack_below_diagonal(scaled[corner, corner]) for corner in corners])


def write_input(
    folder: Path,
    source: Path,
    layers: tuple[str, ...],
    hessian: np.ndarray,
    held_out: np.ndarray,
    *,
    block_size: int | None = None,
    model: str = MODEL,
    amax: float = 3.0,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write the statistics of one input; weights are those of ``source``."""
    K = len(hessian)
    block_size = K if block_size is None else block_size
    folder.mkdir(exist_ok=True)
    weights = load_all(source)
    tensors = {
        "n_rows": np.array([100, 50]),
        "mean": np.zeros(K),
        "amax": np.full(K, amax),
        "weight_amax": np.ones(K),
        "hessian.diagonal": hessian.diagonal(),
        "held_out.diagonal": held_out.diagonal(),
        "hessian.correlations": correlations(hessian, block_size) if block_size else np.empty(0),
        "held_out.correlations": correlations(held_out, block_size) if block_size else np.empty(0),
    }
    identities = {name: identity_of(weights[f"{name}.weight"]) for name in layers}
    write_statistics(folder, tensors, model=model, layers=identities, block_size=block_size, settings=settings or {})


def identity_of(weight: torch.Tensor) -> LayerIdentity:
    from run_ckpt.statistics.record import _identity

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    return _identity(layer)


def write_all(folder: Path, source: Path, **options: Any) -> Path:
    for layers in INPUTS:
        K = SIZES[layers[0]][1]
        write_input(folder, source, layers, make_hessian(K, 1), make_hessian(K, 2), **options)
    return folder


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {
        f"{name}.weight": random_weight(*size, request.param, seed=i) for i, (name, size) in enumerate(SIZES.items())
    }
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    return save_checkpoint(tmp_path_factory.mktemp("source") / "in", [weights], config)


@pytest.fixture(scope="module")
def stats(source: Path) -> Path:
    return write_all(source.parent / "stats", source)


def decoded(output: Path) -> dict[str, torch.Tensor]:
    """Return layer -> float32 [N, K]."""
    with open_checkpoint(output) as checkpoint:
        layers = checkpoint.manifest.layers
        return {name: decode_rows(checkpoint.reader, layer, 0, layer.N) for name, layer in layers.items()}


def layers_of(output: Path) -> dict[str, Layer]:
    return read_manifest(output).layers


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_uncorrelated_inputs_give_the_files_of_rounding_to_nearest(
    scheme: dict[str, str], source: Path, tmp_path: Path
) -> None:
    for layers in INPUTS:
        K = SIZES[layers[0]][1]
        write_input(tmp_path / "stats", source, layers, np.eye(K, dtype=np.float32), make_hessian(K, 2))
    convert(source, tmp_path / "rtn", **scheme)
    convert(source, tmp_path / "gptq", **scheme, calibration=tmp_path / "stats")
    files = [path.name for path in (tmp_path / "rtn").glob("*.safetensors")]
    assert files
    for name in files:
        assert (tmp_path / "gptq" / name).read_bytes() == (tmp_path / "rtn" / name).read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_manifest_says_by_layer_the_method_and_both_output_errors(
    scheme: dict[str, str], source: Path, stats: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "rtn", **scheme)
    convert(source, tmp_path / "gptq", **scheme, calibration=stats)
    weights = load_all(source)
    values = {"rtn": decoded(tmp_path / "rtn"), "gptq": decoded(tmp_path / "gptq")}
    for name, layer in layers_of(tmp_path / "gptq").items():
        weight = weights[f"{name}.weight"].double().numpy()
        held_out = make_hessian(layer.K, 2).astype(np.float64)
        signal = np.einsum("nk,kl,nl->", weight, held_out, weight, optimize=True)
        assert layer.method == "gptq"
        assert layer.output_sqnr_db is not None
        for method, layers in values.items():
            error = layers[name].double().numpy() - weight
            expected = 10 * np.log10(signal / np.einsum("nk,kl,nl->", error, held_out, error, optimize=True))
            assert layer.output_sqnr_db[method] == pytest.approx(expected, abs=0.02)  # float16 correlations
        assert layer.output_sqnr_db["gptq"] > layer.output_sqnr_db["rtn"] + 1


def test_codes_are_those_of_the_method(source: Path, stats: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    from run_ckpt.storage.layer_statistics import read_statistics

    weight = load_all(source)[f"{DOWN}.weight"].float()
    scales = decode_e8m0(quantize(weight, PLAIN_MXFP4, "even")[1])
    found = read_statistics(stats)[DOWN]
    grid = Grid("e2m1", np.ascontiguousarray(scales.T.numpy()), np.arange(256) // 32)
    factors = [factorize(block) for block in found.hessian()]
    rows = weight[:1024].numpy(), Grid("e2m1", np.ascontiguousarray(grid.scales[:, :1024]), grid.scale_rows)
    expected = round_rows(*rows, factors, found.hessian(held_out=True)).decoded
    actual = decoded(tmp_path / "out")[DOWN][:1024].numpy()
    # BLAS may sum in another order with another number of threads.
    assert (actual == expected).mean() > 0.999


def test_scales_stay_those_of_rounding_to_nearest(source: Path, stats: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "rtn", format="mxfp4")
    convert(source, tmp_path / "gptq", format="mxfp4", calibration=stats)
    before, after = load_all(tmp_path / "rtn"), load_all(tmp_path / "gptq")
    for name in SIZES:
        assert torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"])
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])


def test_a_layer_that_held_out_samples_find_worse_is_rounded_to_nearest(source: Path, tmp_path: Path) -> None:
    # Of uncorrelated inputs rounding to nearest has the least error of all codes.
    for layers in INPUTS:
        K = SIZES[layers[0]][1]
        held_out = np.eye(K, dtype=np.float32) if layers == (DOWN,) else make_hessian(K, 2)
        write_input(tmp_path / "stats", source, layers, make_hessian(K, 1), held_out)
    convert(source, tmp_path / "rtn", format="mxfp4")
    convert(source, tmp_path / "gptq", format="mxfp4", calibration=tmp_path / "stats")
    methods = {name: layer.method for name, layer in layers_of(tmp_path / "gptq").items()}
    assert methods == {**dict.fromkeys(QKV, "gptq"), DOWN: "rtn"}
    before, after = load_all(tmp_path / "rtn"), load_all(tmp_path / "gptq")
    assert torch.equal(after[f"{DOWN}.weight"], before[f"{DOWN}.weight"])
    assert layers_of(tmp_path / "gptq")[DOWN].sqnr_db == layers_of(tmp_path / "rtn")[DOWN].sqnr_db


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_any_number_of_workers_writes_the_same_files(
    weight_format: str, source: Path, stats: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / str(n) for n in (1, 2, 4)]
    for output in outputs:
        convert(source, output, int(output.name), format=weight_format, calibration=stats)
    for path in outputs[0].iterdir():
        assert all((output / path.name).read_bytes() == path.read_bytes() for output in outputs), path.name


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_verify_finds_no_fault_in_codes_that_are_not_the_nearest(
    scheme: dict[str, str], source: Path, stats: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", **scheme, calibration=stats)
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert not report.faults


def test_verify_finds_scales_that_are_not_the_rules(source: Path, stats: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats, scale_rule="floor")
    edit_manifest(tmp_path / "out", lambda manifest: manifest["layers"][DOWN].update(scale_rule="even"))
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert any(f"{DOWN}: " in fault and "scales are not those of rule even" in fault for fault in report.faults)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_verify_finds_fp8_scales_that_are_not_the_rules(
    granularity: str, source: Path, stats: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", format="fp8", granularity=granularity, calibration=stats, static=False)
    layer = QKV[0]
    (scale,) = (name for name in load_all(tmp_path / "out") if name.startswith(f"{layer}.weight_scale"))

    def edit(data: bytearray) -> None:
        data[0] ^= 1

    edit_tensor(tmp_path / "out", scale, edit)
    reseal(tmp_path / "out")
    (report,) = verify_output(tmp_path / "out", source, Silent())
    wanted = "its weight_scale is" if granularity == "tensor" else "1 scales are not those of rule amax_over_448"
    assert any(f"{layer}: {wanted}" in fault for fault in report.faults)


@pytest.mark.parametrize("block_size", [None, 96], ids=["whole", "blocks"])
@pytest.mark.parametrize("options", [{"format": "mxfp4"}, {"format": "fp8", "static": True}], ids=["mxfp4", "static"])
def test_verify_measures_output_errors_and_ranges_by_the_statistics(
    options: dict[str, Any], block_size: int | None, source: Path, tmp_path: Path
) -> None:
    stats = write_all(tmp_path / "stats", source, block_size=block_size)
    convert(source, tmp_path / "out", **options, calibration=stats)

    def faults() -> tuple[str, ...]:
        (report,) = verify_output(tmp_path / "out", source, Silent(), statistics=stats)
        return report.faults

    assert not faults()
    write_all(stats, source, amax=5.0, block_size=block_size)  # 1.5 times 3 do not reach them
    assert bool(faults()) == options.get("static", False)
    write_input(stats, source, (DOWN,), make_hessian(256, 1), make_hessian(256, 3))
    assert any(f"{DOWN}: output SQNR is " in fault for fault in faults())
    remove_down(stats)
    assert any(f"{DOWN}: the statistics are not of it" in fault for fault in faults())


def test_statistics_alone_measure_nothing(source: Path, stats: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    with pytest.raises(UsageError, match="goes with --source"):
        verify_output(tmp_path / "out", None, Silent(), statistics=stats)


def test_a_method_whose_own_errors_speak_against_it_is_a_fault(source: Path, stats: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    edit_manifest(tmp_path / "out", lambda manifest: manifest["layers"][DOWN].update(method="rtn"))
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert "speak for the other" in report.faults[0]


def test_blocks_of_columns_have_their_own_correlations(source: Path, tmp_path: Path) -> None:
    stats = write_all(tmp_path / "stats", source, block_size=96)
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    assert all(layer.method == "gptq" for layer in layers_of(tmp_path / "out").values())


def test_static_scales_have_headroom_and_one_value_in_a_group(source: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    for name, amax in zip(SIZES, (1.0, 5.0, 2.0, 7.0), strict=True):
        K = SIZES[name][1]
        write_input(stats, source, (name,), make_hessian(K, 1), make_hessian(K, 2), amax=amax)
    convert(source, tmp_path / "out", format="fp8", calibration=stats, static=True)
    tensors = load_all(tmp_path / "out")
    found = {name: tensors[f"{name}.input_scale"].item() for name in SIZES}
    assert found == pytest.approx({**dict.fromkeys(QKV, 1.5 * 5 / 448), DOWN: 1.5 * 7 / 448}, rel=1e-6)
    assert read_manifest(tmp_path / "out").dialect == "modelopt"
    assert {layer.method for layer in layers_of(tmp_path / "out").values()} == {"gptq"}


def test_static_scales_need_no_correlations(source: Path, tmp_path: Path) -> None:
    stats = write_all(tmp_path / "stats", source, block_size=0)
    convert(source, tmp_path / "out", format="fp8", calibration=stats, static=True)
    assert f"{DOWN}.input_scale" in load_all(tmp_path / "out")
    assert {layer.method for layer in layers_of(tmp_path / "out").values()} == {None}


# Faults


def remove_down(stats: Path) -> None:
    (stats / f"{DOWN}.safetensors").unlink()


def indefinite(K: int) -> np.ndarray:
    """Correlations that no inputs have: two that are 1 with a third, and -1 with each other."""
    hessian = np.eye(K, dtype=np.float32)
    for i, j, value in ((0, 1, 1), (1, 2, 1), (0, 2, -1)):
        hessian[i, j] = hessian[j, i] = value
    return (
        hessian
        * np.where(np.arange(K) < 3, 100, 1).astype(np.float32)[:, None] ** 0.5
        * (np.where(np.arange(K) < 3, 100, 1).astype(np.float32) ** 0.5)
    )


Break = Callable[[Path, Path], object]
FAULTS: dict[str, tuple[Break, type[Exception], str]] = {
    "missing layer": (lambda stats, source: remove_down(stats), FaultsError, "holds no statistics of it"),
    "other model": (
        lambda stats, source: write_all(stats, source, model="QwenForCausalLM"),
        FaultsError,
        "statistics are of QwenForCausalLM",
    ),
    "other K": (
        lambda stats, source: write_input(stats, source, (DOWN,), make_hessian(512, 1), make_hessian(512, 2)),
        FaultsError,
        r"\[1056, 512\], the weight is of LlamaForCausalLM, \[1056, 256\]",
    ),
    "no correlations": (
        lambda stats, source: write_all(stats, source, block_size=0),
        UsageError,
        "needs correlations",
    ),
    "not positive definite": (
        lambda stats, source: write_input(stats, source, (DOWN,), indefinite(256), make_hessian(256, 2)),
        CheckpointError,
        "not positive definite",
    ),
    "NaN": (
        lambda stats, source: write_input(stats, source, (DOWN,), make_hessian(256, 1) * np.nan, make_hessian(256, 2)),
        UsageError,
        "NaN or Inf",
    ),
    "truncated": (
        lambda stats, source: (stats / f"{DOWN}.safetensors").write_bytes(
            (stats / f"{DOWN}.safetensors").read_bytes()[:-1]
        ),
        UsageError,
        "truncated",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_statistics_that_do_not_fit_are_refused_and_nothing_is_written(
    damage: Break, error: type[Exception], message: str, source: Path, tmp_path: Path
) -> None:
    stats = write_all(tmp_path / "stats", source)
    damage(stats, source)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_statistics_of_the_same_model_with_other_weights_are_refused(source: Path, stats: Path, tmp_path: Path) -> None:
    weights = {name: weight + 1 for name, weight in load_all(source).items()}
    config = json.loads((source / "config.json").read_text())
    other = save_checkpoint(tmp_path / "other", [weights], config)
    for options in ({"format": "mxfp4"}, {"format": "fp8", "static": True, "method": "rtn"}):
        with pytest.raises(FaultsError, match=r"4 found(.|\n)*other weights"):
            convert(other, tmp_path / "out", **options, calibration=stats)
    # Their first rows are read before anything is written.
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_stopped_run_does_not_go_on_with_other_statistics(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = write_all(tmp_path / "stats", source)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("convert_ckpt.run.component.write_side_files", stop)
        convert(source, tmp_path / "out", format="mxfp4", calibration=stats)
    write_all(stats, source, amax=2.0)
    with pytest.raises(PartialRunError, match="calibration"):
        convert(source, tmp_path / "out", format="mxfp4", calibration=stats)


WRONG: dict[str, tuple[list[str], str]] = {
    "gptq without statistics": (["--format", "mxfp4", "--method", "gptq"], "--calibration DIR"),
    "static without statistics": (["--format", "fp8", "--static"], "--calibration DIR"),
    "nothing to do": (["--format", "mxfp4", "--method", "rtn", "--calibration", "STATS"], "decides nothing"),
    "static mxfp4": (["--format", "mxfp4", "--static", "--calibration", "STATS"], "only for --format fp8"),
    "gptq with ranges": (["--format", "fp8", "--method", "gptq", "--calibration", "FILE"], "is a file of ranges"),
    "no size": (["--format", "mxfp4", "--calibration", "STATS", "--max-memory", "much"], "no size"),
    "too small": (["--format", "mxfp4", "--calibration", "STATS", "--max-memory", "1MB"], "Raise --max-memory"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, source: Path, stats: Path, tmp_path: Path
) -> None:
    paths = {"STATS": str(stats), "FILE": str(source / "config.json")}
    arguments = [paths.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(cli, [str(source), str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, CheckpointError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_plan_states_the_memory(source: Path, stats: Path) -> None:
    result = CliRunner().invoke(cli, [str(source), "--format", "mxfp4", "--calibration", str(stats), "--dry-run"])
    # Ten arrays of 1024 rows and three matrices of K = 512, float32; the weight in BF16 or F32, twice its codes.
    assert "GPTQ chooses the codes of 4 layers; one in work takes up to 24." in result.output


def test_statistics_of_a_pipeline_are_found_by_component(source: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("transformer", "transformer_2"):
        shutil.copytree(source, tmp_path / "pipeline" / name)
        (tmp_path / "stats").mkdir(exist_ok=True)
        write_all(tmp_path / "stats" / name, source)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    convert(tmp_path / "pipeline", tmp_path / "out", format="mxfp4", calibration=tmp_path / "stats")
    assert layers_of(tmp_path / "out" / "transformer_2")[DOWN].method == "gptq"
    remove_down(tmp_path / "stats" / "transformer_2")
    with pytest.raises(FaultsError, match="holds no statistics"):
        convert(tmp_path / "pipeline", tmp_path / "out2", format="mxfp4", calibration=tmp_path / "stats")


def test_decoded_weights_of_gptq_are_what_the_loader_computes_with(source: Path, stats: Path, tmp_path: Path) -> None:
    from run_ckpt import load_quantized

    convert(source, tmp_path / "out", format="mxfp4", layout="plain", calibration=stats)
    model = torch.nn.Module()
    for name, (N, K) in SIZES.items():
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.add_module(name.rpartition(".")[2], torch.nn.Linear(K, N, bias=False, device="meta"))
    loaded = load_quantized(tmp_path / "out", model=model)
    tensors = load_all(tmp_path / "out")
    weight = dequantize(tensors[f"{DOWN}.weight"], tensors[f"{DOWN}.weight_scale"], PLAIN_MXFP4)
    assert torch.equal(loaded.get_submodule(DOWN)(torch.eye(256)), weight.T)
