"""What check_vllm.py and check_sglang_llm.py share: small language models, their conversion, loading and comparing.

A server's Python imports this too, which has no tests and no converter: it calls load_each(), fork_each() and save().
"""

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Tensors = dict[str, torch.Tensor]

# As in check_sglang.py; products are BF16, so that their weights have eight bits.
MAX_ERRORS = {"mxfp4": 0.13, "nvfp4": 0.13, "mxfp8": 0.032, "fp8": 0.032}
MAX_BF16_ROUNDING = 2**-8
# What a server's process writes beside a folder: what its loader put into parameters, and what it made of that.
LOADED, HELD = "loaded", "held"


@dataclass(frozen=True)
class Server:
    """A server to check: its target, the script that loads, the ways to convert for it, and what else to compare."""

    target: str
    script: str
    environment: Mapping[str, str]
    variants: Mapping[str, Mapping[str, object]]
    compare: Callable[["Report", Tensors], None] = lambda report, held: None


@dataclass(frozen=True)
class Converted:
    """A result. ``plain`` is its folder dequantized; ``reason`` says why it is not for its target, if it is not."""

    folder: Path
    plain: Path
    kind: str
    max_error: float
    reason: str | None
    modules: Sequence[str]


def run(server: Server) -> int:
    """Parse the command line, check, and return 1 where anything is wrong or the manifest says otherwise."""
    all_models = _builders()
    parser = argparse.ArgumentParser(description=f"Check what {server.target} loads, for small language models.")
    parser.add_argument("python", type=Path, help="the Python that has it, made by a script for set-up")
    parser.add_argument("--models", nargs="+", choices=all_models, default=list(all_models))
    parser.add_argument("--variants", nargs="+", choices=server.variants, default=list(server.variants))
    arguments = parser.parse_args()
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        results: dict[Path, Converted] = {}
        for name in arguments.models:
            source = Path(folder) / name / "bf16"
            all_models[name](source)
            for variant in arguments.variants:
                result = _convert(source, variant, server)
                if isinstance(result, str):
                    print(f"{name:12} {variant}: not written: {result}", flush=True)
                else:
                    results[result.folder] = result
        for path, error in _load(arguments.python, server, list(results)):
            n_wrong += _judge(server, results[path], error)
    print(f"{n_wrong} wrong" if n_wrong else "all right")
    return 1 if n_wrong else 0


def _builders() -> dict[str, Callable[[Path], object]]:
    from tests.experts import BUILDERS, save_experts
    from tests.models import MODELS, save

    def save_dense(name: str, folder: Path) -> None:
        save(MODELS[name], MODELS[name].build(), str(folder))

    dense = {name: partial(save_dense, name) for name in ("llama", "qwen3")}
    return {**dense, **{name: partial(save_experts, name) for name in BUILDERS}}


def _convert(source: Path, variant: str, server: Server) -> Converted | str:
    """Return the result, or why none was written."""
    from convert_ckpt.options import Options
    from convert_ckpt.pipeline import convert_checkpoint
    from run_ckpt.contract.errors import CheckpointError
    from run_ckpt.progress import Silent
    from run_ckpt.storage.manifest_file import read_manifest
    from run_ckpt.tools.rewrite.dequantize import dequantize

    output, plain = source.parent / variant, source.parent / f"{variant}-plain"
    options = Options(**server.variants[variant])
    try:
        convert_checkpoint(source, output, options, n_workers=2, restart=True, progress=Silent())
    except CheckpointError as error:
        return str(error)
    manifest = read_manifest(output)
    dequantize(output, plain, dtype="bfloat16", progress=Silent())
    kind = f"{manifest.dialect}, {next(iter(manifest.layers.values())).scheme}"
    reason = manifest.targets[options.target or server.target]
    return Converted(output, plain, kind, MAX_ERRORS[options.format], reason, list(manifest.layers))


def _load(python: Path, server: Server, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Let the server load each folder; yield it and the last words of its process as soon as that is done."""
    with tempfile.TemporaryDirectory() as start:
        # Python runs this in each of the server's processes, before anything is imported.
        (Path(start) / "sitecustomize.py").write_text(_AT_START)
        paths = [start, *(str(ROOT / part) for part in ("scripts", "runtime")), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **server.environment, "PYTHONPATH": os.pathsep.join(paths)}
        command = [str(python), server.script, "--load", *map(str, folders)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith(_DONE):
                    folder = Path(line.removeprefix(_DONE).strip())
                    log = _beside(folder, "log")
                    said = log.read_text().splitlines() if log.exists() else ["no word"]
                    yield folder, ([line for line in said if "Error" in line] or said)[-1]
    if process.returncode:
        sys.exit(f"{server.script}: {process.returncode}")


_DONE = "done: "
_AT_START = """
from missing_libraries import fill_in_torchaudio, fill_in_torchvision

fill_in_torchvision()
fill_in_torchaudio()
"""


def _judge(server: Server, result: Converted, error: str) -> int:
    """Print the verdict; return 1 where anything is wrong that the manifest does not say."""
    source = result.folder.with_name("bf16")
    title = f"{source.parent.name:12} {result.folder.name}"
    files = {which: _beside(result.folder, which) for which in (LOADED, HELD)}
    held = {which: load_file(path) for which, path in files.items() if path.exists()}
    said = f"the manifest says: {result.reason}" if result.reason else "which is new"
    if not held:
        print(f"{title}: REFUSED, {said}: {error}", flush=True)
        return 0 if result.reason else 1
    wanted, stored = (fuse(read_tensors(folder)) for folder in (source, result.plain))
    report = Report(wanted, stored, result.max_error)
    for tensors in held.values():
        report.compare_linears(tensors)
    report.compare_experts(held.get(LOADED, {}), read_tensors(result.folder))
    if HELD in held:
        server.compare(report, held[HELD])
    # vLLM's linears are read when they can multiply, its experts when they are loaded.
    report.miss(module for module in result.modules if HELD in held or ".experts." in module)
    for defect in report.defects:
        print(f"DEFECT {defect}")
    verdict = "WRONG" if report.defects else "RIGHT" if HELD in held else "LOADED right"
    more = [*([said] if result.reason else []), *([f"not run: {error}"] if HELD not in held else [])]
    print(f"{title}: {'; '.join([f'{verdict} ({result.kind}), worst error {report.worst:.4f}', *more])}", flush=True)
    return int(bool(report.defects) != bool(result.reason)) if HELD in held else len(report.defects[:1])


def load_each(folders: Sequence[str], load: Callable[[Path], None]) -> None:
    """Call ``load`` with each folder; what it raises goes into the folder's log."""
    for folder in map(Path, folders):
        try:
            load(folder)
        except BaseException:
            _beside(folder, "log").write_text(traceback.format_exc())
        print(f"{_DONE}{folder}", flush=True)


def fork_each(folders: Sequence[str], load: Callable[[Path], None]) -> None:
    """The same, each in a process of its own, which starts with all that is imported by now."""
    for folder in folders:
        process = os.fork()
        if process:
            os.waitpid(process, 0)
            continue
        load_each([folder], load)
        os._exit(0)


def save(tensors: Tensors, folder: Path, which: str) -> None:
    """Write what a server has of a folder: LOADED or HELD."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _beside(folder, which))


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}-{what}")


@dataclass
class Report:
    """What is wrong with what a server holds, and the largest relative error of a linear against the source.

    wanted, stored: module -> weight [N, K] of the source and of the converted file, fused as servers fuse.
    """

    wanted: Tensors
    stored: Tensors
    max_error: float
    defects: list[str] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)
    worst: float = 0.0

    def compare_linears(self, tensors: Tensors) -> None:
        """Compare the weights [N, K] of linears with the source's and with the converted file's."""
        for module, value in tensors.items():
            if (name := in_file(self.wanted, module)) in self.wanted:
                error, added = (relative_error(value, weights[name]) for weights in (self.wanted, self.stored))
                is_right = error <= self.max_error and added <= MAX_BF16_ROUNDING
                self.note(module, error, None if is_right else f"{added:.4g} from the converted file")
                self.compared |= {name, *parts_of(name)}
            elif not is_of_experts(module):
                self.defects.append(f"{module}: the source has no such weight")

    def compare_experts(self, tensors: Tensors, file: Tensors) -> None:
        """Compare parameters of experts, [experts, ...], byte for byte with the converted file's tensors."""
        for name, tensor in tensors.items():
            which, _, role = name.rpartition(".")[2].partition("_")
            if which not in _PARTS or role not in _ROLES:
                continue
            prefix = in_file(file, name.rpartition(".")[0].removesuffix(".routed_experts"))
            for number, found in enumerate(tensor):
                wanted = _expert(file, prefix, number, which, role, found.shape)
                self.compared |= {prefix, f"{prefix}.{number}"}
                if wanted is None or not torch.equal(_bytes(found), _bytes(wanted)):
                    self.defects.append(f"{prefix}.{number}: {which}_{role} is not what the file holds")

    def miss(self, modules: Iterable[str]) -> None:
        """Note the quantized modules of which nothing was compared."""
        for module in modules:
            if not self.compared & {module, module.rpartition(".")[0]}:
                self.defects.append(f"{module}: the server has no such weight")

    def note(self, module: str, error: float, fault: str | None) -> None:
        self.worst = max(self.worst, error)
        if fault:
            self.defects.append(f"{module}: off by {error:.4g} from the source, {fault}")


# Of experts in a server: gate and up of an expert as one, and down. Part -> their names, one by one and all in one.
_PARTS = {"w13": (("gate_proj", "up_proj"), ("w1", "w3"), "gate_up_proj"), "w2": (("down_proj",), ("w2",), "down_proj")}
# What a parameter of experts ends in -> what its parts may end in, in a file.
_ROLES = {
    "weight": ("weight", "weight_packed"),
    "weight_packed": ("weight_packed",),
    "weight_scale": ("weight_scale", "weight_scale_inv"),
    "weight_scale_inv": ("weight_scale_inv",),
    "weight_global_scale": ("weight_global_scale",),
}


def _expert(file: Tensors, prefix: str, number: int, which: str, role: str, shape: torch.Size) -> torch.Tensor | None:
    """Return what a file holds for a parameter of one expert, which a server holds in ``shape``."""
    *separate, stacked = _PARTS[which]
    for end in ("_scales" if "scale" in role else "_blocks", ""):
        if f"{prefix}.{stacked}{end}" in file:
            together = file[f"{prefix}.{stacked}{end}"][number]
            is_transposed = together.dim() == 2 and together.t().shape == shape
            return together.t() if is_transposed else together
    for names in separate:
        for end in _ROLES[role]:
            parts = [f"{prefix}.{number}.{name}.{end}" for name in names]
            if all(part in file for part in parts):
                return torch.cat([file[part].reshape(-1) for part in parts])
    return None


# A server's name of a part of a model -> the checkpoint's.
_RENAMED = {
    "language_model.model.": "model.language_model.",
    "model.layers.": "model.language_model.layers.",
    "visual.": "model.visual.",
    ".attn.qkv_proj": ".attn.qkv",
    ".mlp.": ".block_sparse_moe.",
}


def in_file(tensors: Tensors, module: str) -> str:
    """Return the name in a checkpoint of what a server's model calls ``module``."""
    names = [module]
    for theirs, ours in _RENAMED.items():
        names += [name.replace(theirs, ours) for name in names if theirs in name]
    return next((name for name in names if any(key == name or key.startswith(f"{name}.") for key in tensors)), module)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def is_of_experts(name: str) -> bool:
    """Return whether a server's name is that of a parameter of experts, or of what they got and gave."""
    return name.rpartition(".")[2].startswith((*(f"{part}_" for part in _PARTS), "experts_"))


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the difference, relative to the norm of what is wanted, infinite where the shapes differ."""
    wanted = wanted.float()
    same = value.shape == wanted.shape
    return float((value.float() - wanted).norm() / wanted.norm().clamp_min(1e-30)) if same else float("inf")


def read_tensors(folder: Path) -> Tensors:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


# Module that a server fuses -> its parts, in the checkpoint's names.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def parts_of(module: str) -> list[str]:
    """Return the modules of a checkpoint that a server fuses as ``module``."""
    before, _, last = module.rpartition(".")
    return [f"{before}.{member}" for member in _FUSED.get(last, ())]


def fuse(tensors: Tensors) -> Tensors:
    """Return module -> weight of each linear, those that servers fuse as one."""
    weights = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    for fused, members in _FUSED.items():
        for name in [name for name in weights if name.endswith(f".{members[0]}")]:
            before = name.removesuffix(members[0])
            if all(before + member in weights for member in members):
                weights[before + fused] = torch.cat([weights[before + member] for member in members])
    return weights
