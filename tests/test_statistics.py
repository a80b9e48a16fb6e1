"""record_statistics sums up what goes into linear layers; read_statistics refuses what is not that."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from run_ckpt import record_statistics
from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.statistics.record import Recorder
from run_ckpt.storage.layer_statistics import InputStatistics, read_statistics

N_SAMPLES, N_TOKENS, K, HIDDEN = 8, 40, 64, 96


class Block(nn.Module):
    """Attention's shape of sharing: q, k and v see one tensor, up another, down a third. ``spare`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 32), nn.Linear(K, 32), nn.Linear(K, 16)
        self.up, self.down, self.spare = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, K), nn.Linear(K, K)
        self.seen: dict[str, list[Tensor]] = {"q": [], "up": [], "down": []}

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen["q"].append(x)
        self.q(x), self.k(x), self.v(x)
        y = x.tanh()
        self.seen["up"].append(y)
        hidden = self.up(y).relu()
        self.seen["down"].append(hidden)
        return self.down(hidden)


def make_block() -> Block:
    torch.manual_seed(0)
    return Block().bfloat16()


def samples(seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(N_SAMPLES):
        yield torch.randn(N_TOKENS, K, generator=generator).bfloat16()


def record(model: nn.Module, folder: Path, **options: Any) -> Recorder:
    with torch.inference_mode(), record_statistics(model, folder, **options) as recorder:
        for x in samples():
            recorder.next_sample()
            model(x)
    return recorder


def moments(tensors: list[Tensor], *, held_out: bool) -> np.ndarray:
    """mean(x x') in float64 of the second of every four samples, or of the others."""
    rows = torch.cat([x for i, x in enumerate(tensors) if (i % 4 == 1) == held_out]).double().numpy()
    return rows.T @ rows / len(rows)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Block, dict[str, InputStatistics]]:
    model = make_block()
    record(model, tmp_path / "stats")
    return model, read_statistics(tmp_path / "stats")


def test_layers_that_are_given_the_same_tensor_share_a_file(recorded: tuple[Block, dict[str, InputStatistics]]) -> None:
    _, statistics = recorded
    files = {layer: found.path.name for layer, found in statistics.items()}
    assert files == {"q": "q.safetensors", "k": "q.safetensors", "v": "q.safetensors"} | {
        name: f"{name}.safetensors" for name in ("up", "down")
    }


@pytest.mark.parametrize("held_out", [False, True], ids=["summed up", "held out"])
@pytest.mark.parametrize("layer", ["q", "up", "down"])
def test_the_hessian_is_the_mean_product_of_the_samples(
    layer: str, held_out: bool, recorded: tuple[Block, dict[str, InputStatistics]]
) -> None:
    model, statistics = recorded
    expected = moments(model.seen[layer], held_out=held_out)
    (actual,) = statistics[layer].hessian(held_out=held_out)
    roots = np.sqrt(np.maximum(expected.diagonal(), 1e-30))
    # Half a step of float16 below 1, and the rounding of the sums.
    assert np.abs((actual - expected) / roots / roots[:, None]).max() < 2.0**-12 + 1e-5
    np.testing.assert_allclose(actual.diagonal(), expected.diagonal(), rtol=1e-5)
    assert (actual == actual.T).all()


def test_mean_and_amax_are_those_of_all_samples(recorded: tuple[Block, dict[str, InputStatistics]]) -> None:
    model, statistics = recorded
    rows = torch.cat(model.seen["down"]).double()
    np.testing.assert_allclose(statistics["down"].read("mean"), rows.mean(0), atol=1e-6)
    np.testing.assert_array_equal(statistics["down"].read("amax"), rows.abs().amax(0))
    assert statistics["down"].read("n_rows").tolist() == [6 * N_TOKENS, 2 * N_TOKENS]


def test_the_largest_weight_of_a_column_is_that_of_all_layers_that_share_it(
    recorded: tuple[Block, dict[str, InputStatistics]],
) -> None:
    model, statistics = recorded
    columns = torch.cat([model.q.weight, model.k.weight, model.v.weight]).abs().amax(0)
    np.testing.assert_array_equal(statistics["k"].read("weight_amax"), columns.detach().float())


def test_the_file_names_the_model_and_its_weights(recorded: tuple[Block, dict[str, InputStatistics]]) -> None:
    model, statistics = recorded
    assert statistics["v"].model == "Block"
    assert statistics["v"].layers["v"].N == 16
    row = model.v.weight[0].detach().view(torch.int16).numpy().tobytes()
    assert statistics["v"].layers["v"].first_row_sha256 == hashlib.sha256(row).hexdigest()


def test_safetensors_reads_the_file(recorded: tuple[Block, dict[str, InputStatistics]]) -> None:
    _, statistics = recorded
    tensors = load_file(statistics["down"].path)
    assert tensors["hessian.correlations"].shape == (HIDDEN * (HIDDEN - 1) // 2,)
    assert tensors["hessian.correlations"].dtype == torch.float16


def test_blocks_are_the_corners_of_the_whole(
    recorded: tuple[Block, dict[str, InputStatistics]], tmp_path: Path
) -> None:
    _, statistics = recorded
    record(make_block(), tmp_path / "blocks", hessian="block=40")
    blocks = read_statistics(tmp_path / "blocks")["down"].hessian()
    (whole,) = statistics["down"].hessian()
    assert [len(block) for block in blocks] == [40, 40, 16]
    for start, block in zip((0, 40, 80), blocks, strict=True):
        # Another product shape may sum in another order.
        np.testing.assert_allclose(block, whole[start : start + 40, start : start + 40], atol=1e-3)


def test_large_inputs_are_recorded_in_blocks_by_default(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6144, 16), nn.Linear(16, 6176), nn.Linear(6176, 16))
    with record_statistics(model, tmp_path) as recorder:
        for _ in range(4):
            recorder.next_sample()
            model(torch.randn(2, 6144))
    statistics = read_statistics(tmp_path)
    assert [statistics[name].block_size for name in ("0", "1", "2")] == [6144, 16, 1024]


def test_statistics_without_correlations_say_so_when_asked(tmp_path: Path) -> None:
    record(make_block(), tmp_path, hessian="none")
    with pytest.raises(CheckpointError, match="hessian none"):
        read_statistics(tmp_path)["q"].hessian()


def test_memory_splits_the_work_into_passes_that_give_the_same_bytes(tmp_path: Path) -> None:
    model = make_block()
    record(model, tmp_path / "whole")
    n_passes, left_out = 0, ["all"]
    while left_out:
        left_out = record(model, tmp_path / "passes", memory=100_000).left_out
        n_passes += 1
    assert n_passes > 1
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "passes" / path.name).read_bytes() == path.read_bytes()


def test_memory_that_holds_no_input_is_an_error_with_the_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="K = 64"):
        record(make_block(), tmp_path, memory=1000)


def test_rows_of_padding_are_left_out(tmp_path: Path) -> None:
    model = make_block()
    mask = torch.ones(3, N_TOKENS, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.inference_mode(), record_statistics(model, tmp_path) as recorder:
        for x in samples():
            recorder.next_sample()
            padded = torch.stack([x, x.where(mask[1, :, None] > 0, 1000.0), x])
            model(padded, attention_mask=mask)
    statistics = read_statistics(tmp_path)["q"]
    assert statistics.read("n_rows").tolist() == [6 * (2 * N_TOKENS + 5), 2 * (2 * N_TOKENS + 5)]
    assert statistics.amax < 10


def test_layers_never_called_are_named(tmp_path: Path) -> None:
    assert record(make_block(), tmp_path).uncalled == ["spare"]


def test_an_input_changed_in_place_is_another_input(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> None:
            self.first(x)
            self.second(x.mul_(2))

    model = InPlace().bfloat16()
    with torch.no_grad(), record_statistics(model, tmp_path) as recorder:
        for x in samples():
            recorder.next_sample()
            model(x)
    statistics = read_statistics(tmp_path)
    assert statistics["second"].amax == 2 * statistics["first"].amax


def test_nothing_is_written_if_the_block_raises(tmp_path: Path) -> None:
    model = make_block()
    with pytest.raises(KeyboardInterrupt), record_statistics(model, tmp_path / "stats"):
        model(next(samples()))
        raise KeyboardInterrupt
    assert not (tmp_path / "stats").exists()
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_single_sample_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    model = make_block()
    with pytest.raises(CheckpointError, match="no rows were held out"), record_statistics(model, tmp_path / "stats"):
        model(next(samples()))
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("hessian", ["half", "block=0", "block=x", "block"])
def test_unknown_kinds_of_hessian_are_refused(hessian: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="full, block=N, none or auto"):
        record(make_block(), tmp_path, hessian=hessian)


def test_another_models_folder_is_not_added_to(tmp_path: Path) -> None:
    record(make_block(), tmp_path)
    other = make_block()
    nn.init.ones_(other.q.weight)
    with pytest.raises(CheckpointError, match="another model"):
        record(other, tmp_path)
    with pytest.raises(CheckpointError, match="Choose another folder"):
        record(make_block(), tmp_path, settings={"seed": 2})


def rewrite(path: Path, change: dict[str, Tensor], **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        save_file({**load_file(path), **change}, path, {**file.metadata(), **metadata})


BROKEN = {
    "NaN": ({"hessian.diagonal": torch.full((HIDDEN,), torch.nan)}, {}, "NaN or Inf"),
    "negative": ({"held_out.diagonal": -torch.ones(HIDDEN)}, {}, "negative"),
    "no rows": ({"n_rows": torch.tensor([5, 0])}, {}, "no rows were held out"),
    "wrong K": ({"amax": torch.ones(HIDDEN + 1)}, {}, "not as K = 96"),
    "other version": ({}, {"statistics_version": "9"}, "this version reads 1"),
    "no layers": ({}, {"layers": "{}"}, "layers"),
    "damaged layers": ({}, {"layers": "[1]"}, "no header of statistics"),
    "deep layers": ({}, {"layers": "[" * 10**5}, "no header of statistics"),
    "several models": ({}, {"model": "Other"}, "several models"),
    "layer in two files": ({}, {"layers": '{"q": {"N": 1, "first_row_sha256": null}}'}, "q: in "),
}


@pytest.mark.parametrize(("change", "metadata", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_statistics_are_refused(
    change: dict[str, Tensor],
    metadata: dict[str, str],
    message: str,
    recorded: tuple[Block, dict[str, InputStatistics]],
) -> None:
    path = recorded[1]["down"].path
    rewrite(path, change, **metadata)
    with pytest.raises(FaultsError, match=message):
        read_statistics(path.parent)


def test_truncated_statistics_are_refused(recorded: tuple[Block, dict[str, InputStatistics]]) -> None:
    path = recorded[1]["down"].path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FaultsError, match="truncated"):
        read_statistics(path.parent)


@pytest.mark.parametrize("value", [torch.nan, 2.0])
def test_correlations_that_are_none_are_refused_when_read(
    value: float, recorded: tuple[Block, dict[str, InputStatistics]]
) -> None:
    path = recorded[1]["down"].path
    correlations = load_file(path)["hessian.correlations"]
    correlations[7] = value
    rewrite(path, {"hessian.correlations": correlations})
    with pytest.raises(CheckpointError, match="not within 1"):
        read_statistics(path.parent)["down"].hessian()


def test_a_folder_of_pickles_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "statistics.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(FaultsError, match="holds no"):
        read_statistics(tmp_path)
