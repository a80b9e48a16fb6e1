"""Sources, results and files with something wrong with them, for the table of mistakes: name -> what makes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from run_ckpt.contract.manifest import MANIFEST_NAME
from tests.checkpoints import convert, random_weight, save_checkpoint
from tests.converted import edit_manifest, edit_tensor
from tests.odd_sources import ODD_SOURCES

LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_Q, _K, _V, _O = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
_SHARD = "model-0000{}-of-00002.safetensors"


def _good(folder: Path) -> None:
    """Two shards of one block of Llama."""
    shards = [{_Q: random_weight(256, 256), _K: random_weight(256, 256, seed=1)}]
    shards += [{_V: random_weight(256, 256, seed=2), _O: random_weight(256, 256, seed=3)}]
    save_checkpoint(folder, shards, LLAMA)


def _other(folder: Path) -> None:
    weights = {f"model.layers.0.mlp.{name}_proj.weight": random_weight(512, 256) for name in ("gate", "up")}
    save_checkpoint(folder, [weights], LLAMA)


def _pipeline(folder: Path) -> None:
    for name in ("transformer", "transformer_2"):
        _good(folder / name)
    (folder / "model_index.json").write_text("{}")


def _spoiled(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what makes a good source and then spoils it."""

    def make(folder: Path) -> None:
        _good(folder)
        spoil(folder)

    return make


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit_index(folder: Path, shard: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][_Q] = shard
    path.write_text(json.dumps(index))


def _one_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: save_checkpoint(folder, [{name: tensor}], LLAMA)


def _with_value(value: float) -> Callable[[Path], object]:
    weight = random_weight(256, 256)
    weight[3, 5] = value
    return _one_tensor(_O, weight)


def _result(spoil: Callable[[Path], object] = lambda folder: None, **options: object) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        convert(folder.with_name("good"), folder, **({"format": "mxfp4"} | options))
        spoil(folder)

    return make


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _flip_a_byte(folder: Path) -> None:
    edit_tensor(folder, _O, lambda data: data.__setitem__(0, data[0] ^ 1))


def _drop_the_dialect(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["recipe"].update(dialect="klingon"))


def _reword_the_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace("LlamaForCausalLM", "LlamaForCausalLL"))


# In an order in which what a result is made of comes before it.
THINGS: dict[str, Callable[[Path], object]] = {
    "good": _good,
    "other": _other,
    "pipeline": _pipeline,
    "empty": lambda folder: folder.mkdir(),
    "full": lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("mine"))[0],
    "file": _text("mine"),
    "model.txt": _text("weights, believe me"),
    "truncated": _spoiled(lambda folder: _truncate(folder / _SHARD.format(2))),
    "shard-missing": _spoiled(lambda folder: (folder / _SHARD.format(2)).unlink()),
    "unlisted-shard-missing": _spoiled(
        lambda folder: [(folder / name).unlink() for name in (_SHARD.format(2), "model.safetensors.index.json")]
    ),
    "index-broken": _spoiled(lambda folder: (folder / "model.safetensors.index.json").write_text("{")),
    "index-outside": _spoiled(lambda folder: _edit_index(folder, "../secret.safetensors")),
    "index-wrong": _spoiled(lambda folder: _edit_index(folder, _SHARD.format(2))),
    "twice": _spoiled(
        lambda folder: [
            (folder / "model.safetensors.index.json").unlink(),
            shutil.copy(folder / _SHARD.format(1), folder / _SHARD.format(2)),
        ]
    ),
    "web-page": _spoiled(lambda folder: (folder / _SHARD.format(1)).write_text("<!DOCTYPE html><html>" + " " * 99)),
    "config-broken": _spoiled(lambda folder: (folder / "config.json").write_text("{")),
    "config-quantized": _spoiled(
        lambda folder: (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    ),
    "fp8-weights": _one_tensor(_O, random_weight(256, 256).to(torch.float8_e4m3fnuz)),
    "int4-weights": _one_tensor(_O.replace("weight", "qweight"), torch.ones(8, 8, dtype=torch.int32)),
    "nan": _with_value(float("nan")),
    "inf": _with_value(float("inf")),
    "no-linear": _one_tensor("model.norm.weight", torch.ones(8)),
    "small": _one_tensor(_O, random_weight(128, 256)),
    "narrow": _one_tensor(_O, random_weight(256, 320)),
    "result": _result(),
    "result-plain": _result(layout="plain"),
    "result-fp8": _result(format="fp8"),
    "result-flipped": _result(_flip_a_byte),
    "result-file-missing": _result(lambda folder: (folder / "config.json").unlink()),
    "result-with-extra": _result(lambda folder: (folder / "notes.txt").write_text("mine")),
    "result-edited": _result(_reword_the_manifest),
    "result-contradicts": _result(_drop_the_dialect),
    "result-of-the-future": _result(
        lambda folder: edit_manifest(folder, lambda manifest: manifest.update(schema_version=99))
    ),
    "recipe-broken.toml": _text("[[rules"),
    "recipe-key.toml": _text('presett = "generic"'),
    "recipe-preset.toml": _text('preset = "fluxx"'),
    "recipe-format.toml": _text('[[rules]]\nmatch = "*"\nformat = "int4"'),
    "recipe-unmatched.toml": _text('[[rules]]\nmatch = "decoder.*"\nformat = "keep"'),
    "recipe-splits.toml": _text('[[rules]]\nmatch = "*.q_proj"\nformat = "fp8"'),
    "prompts.txt": _text("a cat\n"),
    **ODD_SOURCES,
}


def make_things(folder: Path) -> None:
    """Make all of them in ``folder``."""
    for name, make in THINGS.items():
        make(folder / name)
