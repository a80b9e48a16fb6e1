"""NaN and infinity in a source: all are named at once, nothing is left in the way; what is copied may have them."""

import re
from pathlib import Path

import pytest
import torch

from run_ckpt.contract.errors import NonFiniteError
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.hub_fixtures import Lines, convert_remote

LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_UP, _Q, _V = (f"model.layers.{name}" for name in ("0.mlp.up_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["mxfp4", "mxfp8", "fp8"])
def weight_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three bad weights in two shards, cut into slabs of 32 rows, among good ones."""
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 32 * 256 * 2)
    up, q, v = (random_weight(256, 256, seed=seed) for seed in range(3))
    up[7, 9] = up[200, 3] = NAN
    q[255, 255] = -INF
    v[3, 5] = INF
    good = random_weight(256, 256)
    first = {f"{_UP}.weight": up, "model.layers.0.mlp.gate_proj.weight": good, f"{_Q}.weight": q}
    second = {f"{_V}.weight": v, "model.layers.1.self_attn.k_proj.weight": good.clone()}
    second["model.layers.1.mlp.down_proj.weight"] = good.clone()
    return save_checkpoint(tmp_path / "in", [first, second], LLAMA)


@pytest.mark.parametrize("n_workers", [1, 4])
def test_all_are_named_with_first_index_and_count(
    source: Path, tmp_path: Path, weight_format: str, n_workers: int
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        convert(source, tmp_path / "out", n_workers, format=weight_format)
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "NaN and infinity, for which no code stands. Repair the source, or keep these layers:"
        f" --ignore {_UP} --ignore {_Q} --ignore {_V}",
        f"- model-00001-of-00002.safetensors: {_UP}.weight[7, 9] is nan, the first of 2",
        f"- model-00001-of-00002.safetensors: {_Q}.weight[255, 255] is -inf",
        f"- model-00002-of-00002.safetensors: {_V}.weight[3, 5] is inf",
    ]


def test_the_command_that_is_advised_works_at_once(source: Path, tmp_path: Path, weight_format: str) -> None:
    with pytest.raises(NonFiniteError) as caught:
        convert(source, tmp_path / "made" / "out", format=weight_format)
    assert not (tmp_path / "made").exists()
    advised = tuple(re.findall(r"--ignore (\S+)", str(caught.value)))
    assert len(advised) == 3
    convert(source, tmp_path / "out", format=weight_format, ignore=advised)
    assert_bits_equal(load_all(tmp_path / "out")[f"{_UP}.weight"], load_all(source)[f"{_UP}.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("index", [3, 40], ids=["in a vector", "behind the last one"])
def test_in_a_tensor_that_is_copied_they_are_a_note(tmp_path: Path, dtype: torch.dtype, index: int) -> None:
    mask = torch.zeros(2, 21, dtype=dtype)
    mask.view(-1)[index] = -INF
    tensors = {f"{_UP}.weight": random_weight(256, 256), "model.mask": mask, "model.step": torch.ones(3).long()}
    source = save_checkpoint(tmp_path / "in", [tensors], LLAMA)
    lines = Lines()
    convert_remote(str(source), tmp_path / "out", format="mxfp4", progress=lines)
    place = [index // 21, index % 21]
    assert f"note: model.safetensors: model.mask{place} is -inf; copied as it is" in lines.lines
    assert_bits_equal(load_all(tmp_path / "out")["model.mask"], mask)


def test_of_small_tensors_that_are_copied_together_each_is_named(tmp_path: Path) -> None:
    norms = {f"model.norm_{i}.weight": torch.arange(21 + i).bfloat16() for i in range(5)}
    norms["model.norm_1.weight"][5] = -INF
    norms["model.norm_3.weight"][-2:] = INF
    tensors = {f"{_UP}.weight": random_weight(256, 256), **norms}
    source = save_checkpoint(tmp_path / "in", [tensors], LLAMA)
    lines = Lines()
    convert_remote(str(source), tmp_path / "out", format="mxfp4", progress=lines)
    assert [line for line in lines.lines if line.startswith("note: ")] == [
        "note: model.safetensors: model.norm_1.weight[5] is -inf; copied as it is",
        "note: model.safetensors: model.norm_3.weight[22] is inf, the first of 2; copied as it is",
    ]
    copied = load_all(tmp_path / "out")
    assert all(torch.equal(copied[name], norm) for name, norm in norms.items())
