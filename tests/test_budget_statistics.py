"""Budgets with statistics: the damage is what the layers' outputs lose, and with Fisher information the model's."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.formats import FORMATS
from run_ckpt.progress import Silent
from run_ckpt.storage.layer_statistics import fisher_name, rounding_name, write_statistics
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.test_calibrated import DOWN, INPUTS, MODEL, QKV, SIZES, correlations, decoded, identity_of, make_hessian

# Bytes: all layers in MXFP4 take 0.35 MB, in FP8 0.67 MB.
BUDGETS = (450_000, 550_000, 700_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {f"{name}.weight": random_weight(*size, seed=i) for i, (name, size) in enumerate(SIZES.items())}
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    return save_checkpoint(tmp_path_factory.mktemp("source") / "in", [weights], config)


def make_fisher(name: str) -> np.ndarray:
    """float32 [N]: orders of magnitude apart."""
    N = SIZES[name][0]
    return np.logspace(-6, -3, N, dtype=np.float32) * (1 if name == DOWN else 1e-2)


def make_rounding(format_name: str, K: int) -> np.ndarray:
    """float32 [K]: a mean square of 1 less 19 or 31 dB, more in some channels."""
    return np.linspace(0.5, 1.5, K, dtype=np.float32) * (0.0125 if format_name == "mxfp4" else 0.0008)


def write_stats(folder: Path, source: Path, *, fisher: bool) -> Path:
    folder.mkdir()
    weights = load_all(source)
    for layers in INPUTS:
        K = SIZES[layers[0]][1]
        tensors: dict[str, Any] = {"n_rows": np.array([100, 50]), "mean": np.zeros(K), "amax": np.full(K, 3.0)}
        tensors["weight_amax"] = np.ones(K)
        for name, seed in (("hessian", 1), ("held_out", 2)):
            hessian = make_hessian(K, seed)
            tensors |= {f"{name}.diagonal": hessian.diagonal(), f"{name}.correlations": correlations(hessian, K)}
        if fisher:
            tensors |= {fisher_name(name): make_fisher(name) for name in layers}
            tensors |= {rounding_name(name): make_rounding(name, K) for name in FORMATS}
        identities = {name: identity_of(weights[f"{name}.weight"]) for name in layers}
        write_statistics(folder, tensors, model=MODEL, layers=identities, block_size=K, settings={})
    return folder


def lost_outputs(weights: dict[str, torch.Tensor], values: dict[str, torch.Tensor], _: dict[str, str]) -> float:
    """The squared error of all layers' outputs on held out samples, relative to their squares, in float64."""
    error = signal = 0.0
    for name, (_, K) in SIZES.items():
        weight, held_out = weights[f"{name}.weight"].double().numpy(), make_hessian(K, 2).astype(np.float64)
        signal += float(np.einsum("nk,kl,nl->", weight, held_out, weight, optimize=True))
        if name in values:
            difference = values[name].double().numpy() - weight
            error += float(np.einsum("nk,kl,nl->", difference, held_out, difference, optimize=True))
    return error / signal


def lost_of_the_model(
    weights: dict[str, torch.Tensor], values: dict[str, torch.Tensor], formats: dict[str, str]
) -> float:
    """The sum over output channels of Fisher information times squared error, of weights and of activations."""
    lost = 0.0
    for name, value in values.items():
        difference = value.double().numpy() - weights[f"{name}.weight"].double().numpy()
        held_out = make_hessian(SIZES[name][1], 2).astype(np.float64)
        by_channel = np.einsum("nk,kl,nl->n", difference, held_out, difference, optimize=True)
        weight = weights[f"{name}.weight"].double().numpy()
        by_channel += np.square(weight) @ make_rounding(formats[name], SIZES[name][1])
        lost += float(by_channel @ make_fisher(name))
    return lost


Lost = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]], float]


@pytest.mark.parametrize(
    ("fisher", "lost", "by"),
    [
        (False, lost_outputs, "output error of the layers on held out samples"),
        (
            True,
            lost_of_the_model,
            "errors of layers' weights and activations on held out samples times Fisher information",
        ),
    ],
    ids=["outputs", "fisher"],
)
def test_the_prediction_is_what_the_result_then_loses(
    fisher: bool, lost: Lost, by: str, source: Path, tmp_path: Path
) -> None:
    stats = write_stats(tmp_path / "stats", source, fisher=fisher)
    chosen = set()
    for budget in BUDGETS:
        output = tmp_path / str(budget)
        convert(source, output, format="mxfp4", calibration=stats, max_size=budget)
        recipe = read_manifest(output).recipe
        assert recipe["budget"]["by"] == by
        layers = read_manifest(output).layers
        formats = {name: layer.format.name for name, layer in layers.items()}
        expected = -10 * math.log10(lost(load_all(source), decoded(output), formats))
        # float16 correlations, and an FP8 scale of a layer alone.
        assert recipe["budget"]["predicted_sqnr_db"] == pytest.approx(expected, abs=0.05)
        chosen.add(tuple(formats.get(name, "keep") for name in SIZES))
        assert {layer.method for layer in layers.values()} == {"gptq"}
    assert len(chosen) == len(BUDGETS)


def test_information_decides_where_it_differs_from_the_outputs_error(source: Path, tmp_path: Path) -> None:
    plain = write_stats(tmp_path / "plain", source, fisher=False)
    fisher = write_stats(tmp_path / "fisher", source, fisher=True)
    formats = {}
    for stats in (plain, fisher):
        convert(source, tmp_path / f"out-{stats.name}", format="mxfp4", calibration=stats, max_size=BUDGETS[1])
        layers = read_manifest(tmp_path / f"out-{stats.name}").layers
        formats[stats.name] = {name: layers[name].format.name for name in (QKV[0], DOWN)}
    assert formats["fisher"] != formats["plain"]


def test_a_result_verifies(source: Path, tmp_path: Path) -> None:
    stats = write_stats(tmp_path / "stats", source, fisher=True)
    convert(source, tmp_path / "out", format="mxfp4", calibration=stats, min_sqnr=25)
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert not report.faults


def test_the_codes_of_layers_are_those_of_one_format(source: Path, tmp_path: Path) -> None:
    stats = write_stats(tmp_path / "stats", source, fisher=True)
    convert(source, tmp_path / "mixed", format="mxfp4", calibration=stats, max_size=BUDGETS[1])
    layers, mixed = read_manifest(tmp_path / "mixed").layers, load_all(tmp_path / "mixed")
    for name in {layer.format.name for layer in layers.values()}:
        convert(source, tmp_path / name, format=name, calibration=stats)
        single = load_all(tmp_path / name)
        for module in (module for module, layer in layers.items() if layer.format.name == name):
            assert torch.equal(
                mixed[f"{module}.weight"].view(torch.uint8), single[f"{module}.weight"].view(torch.uint8)
            )


def test_missing_statistics_of_a_layer_that_only_fp8_takes_are_an_error(source: Path, tmp_path: Path) -> None:
    narrow = "model.layers.0.mlp.up_proj"
    weights = {**load_all(source), f"{narrow}.weight": random_weight(64, 512)}  # N is too small for MXFP4
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    other = save_checkpoint(tmp_path / "in", [weights], config)
    stats = write_stats(tmp_path / "stats", source, fisher=False)
    with pytest.raises(FaultsError) as raised:
        convert(other, tmp_path / "out", format="mxfp4", calibration=stats, min_sqnr=25)
    (fault,) = raised.value.faults
    assert fault == f"{narrow}: stats holds no statistics of it. Calibrate it or --ignore it."


def test_statistics_of_other_weights_are_refused_before_anything_is_chosen(source: Path, tmp_path: Path) -> None:
    stats = write_stats(tmp_path / "stats", source, fisher=False)
    weights = {name: weight + 1 for name, weight in load_all(source).items()}
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    other = save_checkpoint(tmp_path / "in", [weights], config)
    with pytest.raises(CheckpointError, match="other weights"):
        convert(other, tmp_path / "out", format="mxfp4", calibration=stats, min_sqnr=25)
