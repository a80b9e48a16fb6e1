"""--calibration backbone.pt: the static scales of ModelOpt's own calibration, and nothing that its pickle could do.

The slow test makes the file with the package itself: MODELOPT_PYTHON=DIR/bin/python, where DIR is an environment with
nvidia-modelopt, diffusers and torch.
"""

import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.storage.manifest_file import read_manifest
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all
from tests.converted import LINEAR, make_linear
from tests.models import MODELS, save
from tests.test_extras import run_without

AMAX = ".input_quantizer._amax"
PYTHON = os.environ.get("MODELOPT_PYTHON")

# Calibrate two models as ModelOpt's diffusers example does; beside each backbone.pt the scales of its exporter.
_CALIBRATE = """
import json, sys
from pathlib import Path
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from modelopt.torch.export.quant_utils import get_activation_scaling_factor
from tests.models import MODELS, run

for name in sys.argv[2:]:
    case, folder = MODELS[name], Path(sys.argv[1]) / name
    model = mtq.quantize(case.build(), mtq.FP8_DEFAULT_CFG, lambda model: run(case, model))
    mto.save(model, folder / "backbone.pt")
    scales = {
        name: get_activation_scaling_factor(module).float().view(-1).tolist()
        for name, module in model.named_modules()
        if getattr(getattr(module, "input_quantizer", None), "amax", None) is not None
    }
    (folder / "scales.json").write_text(json.dumps(scales))
"""


def write_backbone(path: Path, ranges: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a file as mto.save() does."""
    state = {f"{name}{AMAX}": torch.as_tensor(amax, dtype=torch.bfloat16) for name, amax in ranges.items()}
    state |= {f"{name}.weight": weight for name, weight in (weights or {}).items()}
    torch.save({"modelopt_state": {"modelopt_version": "0.47.0"}, "model_state_dict": state}, path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="MODELOPT_PYTHON does not name a Python with nvidia-modelopt")
def test_scales_are_those_of_modelopts_own_exporter(tmp_path: Path) -> None:
    names = ("flux1", "hunyuan-video")
    for name in names:
        save(MODELS[name], MODELS[name].build(), tmp_path / name / "bf16")
    assert PYTHON
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([PYTHON, "-c", _CALIBRATE, tmp_path, *names], check=True, env=environment)
    for name in names:
        output = tmp_path / name / "out"
        backbone = tmp_path / name / "backbone.pt"
        # ModelOpt's own defaults leave whatever is called proj_out alone.
        convert(tmp_path / name / "bf16", output, format="fp8", calibration=backbone, ignore=("*proj_out",))
        expected = json.loads((tmp_path / name / "scales.json").read_text())
        tensors, layers = load_all(output), read_manifest(output).layers
        groups: dict[str, float] = {}
        for module, layer in layers.items():
            (scale,) = expected[module]
            group = layer.fused_group or module
            groups[group] = max(scale, groups.get(group, 0.0))
        assert len(layers) > 10
        assert len(groups) < len(layers)
        for module, layer in layers.items():
            scale = torch.tensor([groups[layer.fused_group or module]])
            assert_bits_equal(tensors[f"{module}.input_scale"], scale)


def test_the_scale_is_amax_over_448_without_headroom(tmp_path: Path) -> None:
    source = make_linear(tmp_path / "in", 256, 256)
    backbone = write_backbone(tmp_path / "backbone.pt", {LINEAR: 3.5}, {LINEAR: torch.zeros(256, 256)})
    convert(source, tmp_path / "out", format="fp8", calibration=backbone)
    assert_bits_equal(load_all(tmp_path / "out")[f"{LINEAR}.input_scale"], torch.tensor([3.5]) / 448)
    assert read_manifest(tmp_path / "out").dialect == "modelopt"


# The original code numbers both kinds of block from 0; SGLang's has a module around it.
@pytest.mark.parametrize("outer", ["", "Hunyuan."])
def test_layers_that_hunyuanvideos_own_code_fuses_are_found_by_its_names(outer: str, tmp_path: Path) -> None:
    save(MODELS["hunyuan-video"], MODELS["hunyuan-video"].build(), tmp_path / "in")
    double = ("img_attn_qkv", "img_attn_proj", "img_mlp.fc_in", "img_mlp.fc_out")
    names = [f"double_blocks.0.{name.replace('img', stream)}" for stream in ("img", "txt") for name in double]
    names += [f"single_blocks.{block}.{name}" for block in (0, 1) for name in ("linear1", "linear2")]
    amax = {f"{outer}{name}": float(i + 1) for i, name in enumerate([*names, "img_in.proj"])}
    backbone = write_backbone(tmp_path / "backbone.pt", amax)
    convert(tmp_path / "in", tmp_path / "out", format="fp8", calibration=backbone)
    tensors = load_all(tmp_path / "out")
    for module, name in (
        ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn_qkv"),
        ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.fc_out"),
        ("single_transformer_blocks.1.proj_mlp", "single_blocks.1.linear1"),
    ):
        assert tensors[f"{module}.input_scale"].item() == pytest.approx(amax[outer + name] / 448)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["MODELOPT_TEST_FOLDER"],))


def pickle_code(path: Path) -> None:
    torch.save({"model_state_dict": {f"{LINEAR}{AMAX}": torch.ones(())}, "modelopt_state": _Code()}, path)


def _state(amax: object, weight: object = None) -> dict[str, object]:
    return {
        "model_state_dict": {f"{LINEAR}{AMAX}": amax, **({f"{LINEAR}.weight": weight} if weight is not None else {})}
    }


def write_compressed(path: Path) -> None:
    """A few MB that unfold to gigabytes are made in the same way."""
    write_backbone(path, {LINEAR: 1.0})
    with zipfile.ZipFile(path) as stored:
        contents = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, data in contents.items():
            compressed.writestr(name, data)


Write = Callable[[Path], object]
FAULTS: dict[str, tuple[Write, type[Exception], str]] = {
    "code": (pickle_code, UsageError, "a pickle with code in it"),
    "bare pickle with code": (lambda path: path.write_bytes(pickle.dumps(_Code())), UsageError, "a pickle with code"),
    "no pickle": (lambda path: path.write_bytes(b"PK" * 100), UsageError, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), UsageError, "damaged"),
    "truncated": (
        lambda path: path.write_bytes(write_backbone(path, {LINEAR: 1.0}).read_bytes()[:-100]),
        UsageError,
        "damaged",
    ),
    "weights alone": (lambda path: torch.save({LINEAR: torch.ones(1)}, path), UsageError, "mto.save"),
    "list": (lambda path: torch.save([1], path), UsageError, "mto.save"),
    "other layers": (lambda path: write_backbone(path, {"proj": 1.0}), FaultsError, rf"holds no {LINEAR}{AMAX}"),
    "other K": (
        lambda path: write_backbone(path, {LINEAR: 1.0}, {LINEAR: torch.zeros(256, 512)}),
        UsageError,
        r"has K = 512, model.layers.0.mlp.down_proj has 256",
    ),
    "by channel": (lambda path: write_backbone(path, {LINEAR: [1.0, 2.0]}), UsageError, "FP8_DEFAULT_CFG"),
    "a number, no tensor": (lambda path: torch.save(_state(1.0), path), UsageError, "is no number"),
    "complex": (lambda path: torch.save(_state(torch.tensor(1j)), path), UsageError, "is no number"),
    "weight of no dimension": (
        lambda path: torch.save(_state(torch.ones(()), torch.ones(())), path),
        UsageError,
        "weight no matrix",
    ),
    "compressed": (write_compressed, UsageError, "damaged"),
    "pipe": (os.mkfifo, UsageError, "is a pipe"),
    "zero": (lambda path: write_backbone(path, {LINEAR: 0.0}), FaultsError, "not a positive number"),
    "NaN": (lambda path: write_backbone(path, {LINEAR: float("nan")}), FaultsError, "not a positive number"),
}


@pytest.mark.parametrize(("write", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_such_file_is_refused_runs_nothing_and_nothing_is_written(
    write: Write, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPT_TEST_FOLDER", str(tmp_path / "code-ran"))
    source = make_linear(tmp_path / "in", 256, 256)
    write(tmp_path / "backbone.pt")
    with pytest.raises(error, match=message) as raised:
        convert(source, tmp_path / "out", format="fp8", calibration=tmp_path / "backbone.pt")
    assert isinstance(raised.value, CheckpointError)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "code-ran").exists()


def test_without_torch_one_line_says_what_to_install(tmp_path: Path) -> None:
    source, backbone = make_linear(tmp_path / "in", 256, 256), write_backbone(tmp_path / "b.pt", {LINEAR: 1.0})
    command = "sys.argv = ['convert-ckpt', *sys.argv[1:]]; import convert_ckpt.cli; convert_ckpt.cli.main()"
    done = run_without("torch", command, source, tmp_path / "out", "--format", "fp8", "--calibration", backbone)
    assert done.returncode == 1
    assert "torch: pip install 'convert-ckpt[runtime]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
