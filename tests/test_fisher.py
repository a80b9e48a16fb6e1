"""record_statistics(fisher=True): what an error in a layer's output does to the model's, from gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from run_ckpt import record_statistics
from run_ckpt.contract.codec import dequantize, quantize
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.formats import PLAIN_MXFP4
from run_ckpt.storage.layer_statistics import InputStatistics, fisher_name, read_statistics, rounding_name
from tests.models import MODELS, ModelCase
from tests.test_calibrate import calibrate, make_pipeline
from tests.test_statistics import make_block, record, rewrite

K, HIDDEN, N_TOKENS, N_SAMPLES = 32, 64, 24, 20


class Residual(nn.Module):
    """What a transformer's block does: a norm, up, an activation, down, a residual; ``aside`` changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(K), nn.Linear(K, K)
        self.up, self.down, self.aside = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, K), nn.Linear(K, 4)

    def forward(self, x: Tensor, steps: Tensor | None = None) -> tuple[Tensor]:
        x = self.first(x)
        x += 0.1  # in place, on what a linear layer returned
        self.aside(x)
        return (x + self.down(nn.functional.gelu(self.up(self.norm(x)))),)


def make_residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, N_TOKENS, K, generator=generator) for _ in range(N_SAMPLES)]


def record_fisher(model: nn.Module, folder: Path, mode: Any = torch.inference_mode, **options: Any) -> None:
    with mode(), record_statistics(model, folder, fisher=True, **options) as recorder:
        for x in inputs():
            recorder.next_sample()
            model(x)


def fisher_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: found.read(fisher_name(name)) for name, found in read_statistics(folder).items()}


def test_of_the_layer_that_makes_the_output_it_is_one_over_the_energy(tmp_path: Path) -> None:
    model = make_residual()
    record_fisher(model, tmp_path)
    with torch.no_grad():
        energies = [model(x)[0].square().sum() for x in inputs()[:16]]
    # A sign for each of 48 rows, whose square is 1.
    expected = float(torch.stack([2 * N_TOKENS / energy for energy in energies]).mean())
    np.testing.assert_allclose(fisher_of(tmp_path)["down"], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["first", "up"])
def test_it_predicts_what_noise_in_a_layer_does_to_the_output(name: str, tmp_path: Path) -> None:
    model = make_residual()
    record_fisher(model, tmp_path)
    fisher = fisher_of(tmp_path)[name]
    deviations = torch.linspace(1e-4, 3e-3, len(fisher))
    predicted = float((fisher * deviations.square().numpy()).sum())
    generator = torch.Generator().manual_seed(2)

    def add_noise(_layer: nn.Module, _args: Any, y: Tensor) -> Tensor:
        return y + deviations * torch.randn(y.shape, generator=generator)

    changes = []
    with torch.no_grad():
        clean = [model(x)[0] for x in inputs()]
        model.get_submodule(name).register_forward_hook(add_noise)
        for x, expected in zip(inputs(), clean, strict=True):
            changes.append((model(x)[0] - expected).square().sum() / expected.square().sum())
    # 32 draws of signs for each of 48 rows, and as much noise.
    assert predicted == pytest.approx(float(torch.stack(changes).mean()), rel=0.1)


def test_a_layer_that_changes_nothing_has_none(tmp_path: Path) -> None:
    record_fisher(make_residual(), tmp_path)
    assert not fisher_of(tmp_path)["aside"].any()


def test_what_rounding_the_input_costs_is_recorded_beside_it(tmp_path: Path) -> None:
    model = make_residual()
    rows: list[Tensor] = []
    model.down.register_forward_hook(lambda _layer, args, _y: rows.append(args[0].flatten(0, -2)))
    record_fisher(model, tmp_path, torch.no_grad)
    assert len(rows) == N_SAMPLES + 16  # once more with gradients
    plain = [x for n, x in enumerate(rows) if n >= 32 or n % 2 == 0]
    x = torch.cat(plain[::8]).bfloat16().float()  # every eighth call; all of its 48 rows
    found = read_statistics(tmp_path)["down"]
    scale = x.abs().amax(1, keepdim=True) / 448
    by_token = (x / scale).to(torch.float8_e4m3fn).float() * scale
    in_blocks = dequantize(*quantize(x, PLAIN_MXFP4, "even"), PLAIN_MXFP4)
    for name, rounded in {"fp8": by_token, "mxfp4": in_blocks}.items():
        np.testing.assert_allclose(found.read(rounding_name(name)), (rounded - x).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_it_does_not_depend_on_the_mode_in_which_the_model_runs(mode: Any, tmp_path: Path) -> None:
    record_fisher(make_residual(), tmp_path / "here", mode)
    record_fisher(make_residual(), tmp_path / "inference")
    for name, fisher in fisher_of(tmp_path / "here").items():
        np.testing.assert_array_equal(fisher, fisher_of(tmp_path / "inference")[name])


def test_all_else_that_is_recorded_stays_the_same(tmp_path: Path) -> None:
    record_fisher(make_residual(), tmp_path / "with")
    with torch.no_grad(), record_statistics(make_residual(), tmp_path / "without") as recorder:
        model = recorder._model
        for x in inputs():
            recorder.next_sample()
            model(x)
    plain = read_statistics(tmp_path / "without")
    for name, found in read_statistics(tmp_path / "with").items():
        for tensor in plain[name].header.tensors:
            np.testing.assert_array_equal(found.read(tensor.spec.name), plain[name].read(tensor.spec.name))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_residual()
    model.up.weight.requires_grad_(False)
    record_fisher(model, tmp_path)
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {"up.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_passes_that_fit_a_memory_write_the_same_files(tmp_path: Path) -> None:
    record_fisher(make_residual(), tmp_path / "whole")
    for _ in range(4):
        record_fisher(make_residual(), tmp_path / "passes", memory=40_000)
    files = [path.name for path in (tmp_path / "whole").iterdir()]
    for name in files:
        assert (tmp_path / "passes" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_without_gradients_is_named(tmp_path: Path) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()

    with pytest.raises(CheckpointError, match="Rounded: no gradient comes back"):
        record_fisher(Rounded(), tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_every_class_of_ours_gives_it(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    with torch.no_grad(), record_statistics(model, tmp_path, hessian="none", fisher=True) as recorder:
        for _ in range(2):
            recorder.next_sample()
            model(**case.inputs(), return_dict=False)
    fisher = fisher_of(tmp_path)
    assert sum(values.any() for values in fisher.values()) > len(fisher) / 2


def test_a_folder_without_it_is_not_added_to(tmp_path: Path) -> None:
    record(make_block(), tmp_path)
    with pytest.raises(CheckpointError, match="Choose another folder"):
        record(make_block(), tmp_path, fisher=True)


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, InputStatistics]:
    record_fisher(make_residual(), tmp_path)
    return read_statistics(tmp_path)


BROKEN = {
    "NaN": (torch.full((K,), torch.nan), r"fisher\.down: 32 of 32 channels are NaN"),
    "negative": (-torch.ones(K), r"fisher\.down: some channels are negative"),
    "shape": (torch.ones(K + 1), r"\['fisher\.down'\]: not as"),
}


@pytest.mark.parametrize(("fisher", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_information_is_refused(fisher: Tensor, message: str, recorded: dict[str, InputStatistics]) -> None:
    path = recorded["down"].path
    rewrite(path, {fisher_name("down"): fisher})
    with pytest.raises(FaultsError, match=message):
        read_statistics(path.parent)


def test_the_command_records_it_for_every_layer_of_a_pipeline(tmp_path: Path) -> None:
    make_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    result = calibrate(tmp_path, tmp_path / "stats", "--fisher", "--samples", 2)
    assert result.exit_code == 0, result.output
    fisher = fisher_of(tmp_path / "stats" / "transformer")
    assert len(fisher) > 20
    assert all(values.any() for name, values in fisher.items())
