"""Who may import whom, what starts fast, and how long a module may get."""

import ast
import builtins
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.layouts import LAYOUTS
from tests.converted import make_linear

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT / top).as_posix() for top in ("convert", "runtime") for path in (ROOT / top).rglob("*.py")
)
CONTRACT = [module for module in MODULES if module.startswith("run_ckpt/contract/")]
MAX_LINES = 300

# Package -> the files (or folders, with a slash) that may import it.
HOMES: dict[str, tuple[str, ...]] = {
    "blake3": (
        "run_ckpt/contract/manifest_text.py",
        "run_ckpt/storage/hashing.py",
        "convert_ckpt/run/fingerprint.py",
        "convert_ckpt/run/readers.py",
    ),
    "llvmlite": ("convert_ckpt/kernels/",),
    "ray": ("convert_ckpt/run/fleet.py",),
    "gguf": ("run_ckpt/storage/decoders.py",),
    "click": ("convert_ckpt/cli.py", "run_ckpt/cli/"),
    "rich": ("run_ckpt/cli/",),
    "aiter": ("run_ckpt/backends/",),
    "petit_kernel": ("run_ckpt/backends/",),
    "triton": ("run_ckpt/backends/triton/",),
    "huggingface_hub": (
        "convert_ckpt/source/hub.py",
        "run_ckpt/storage/hub_client.py",
        "run_ckpt/storage/pipelines.py",
        "run_ckpt/storage/reference.py",
        "run_ckpt/storage/snapshots.py",
        "run_ckpt/tools/publish/metadata.py",
        "run_ckpt/tools/publish/repository.py",
    ),
    "yaml": ("convert_ckpt/source/source_card.py",),
    "fsspec": ("convert_ckpt/source/url.py",),
    "diffusers": ("run_ckpt/integrations/", "run_ckpt/loading/build.py", "run_ckpt/tools/generate.py"),
    "transformers": ("run_ckpt/integrations/", "run_ckpt/loading/build.py", "run_ckpt/tools/compare/text.py"),
    "torchmetrics": ("run_ckpt/tools/compare/metrics.py",),
    "PIL": ("run_ckpt/tools/compare/picture.py",),
    "sglang": ("run_ckpt/integrations/sglang/",),
    "vllm": ("run_ckpt/integrations/vllm/", "run_ckpt/integrations/vllm_omni/"),
    "vllm_omni": ("run_ckpt/integrations/vllm_omni/",),
    "accelerate": ("run_ckpt/integrations/", "run_ckpt/loading/build.py"),
}
# Room -> the rooms whose modules it may import, itself aside. What stands in no room (cli, pipeline, push) is free.
ROOMS: dict[str, set[str]] = {
    "run_ckpt/contract": set(),
    "run_ckpt/storage": {"run_ckpt/contract"},
    "run_ckpt/backends": {"run_ckpt/contract", "run_ckpt/storage"},
    "run_ckpt/statistics": {"run_ckpt/contract", "run_ckpt/storage"},
    "run_ckpt/loading": {"run_ckpt/contract", "run_ckpt/storage", "run_ckpt/backends"},
    "run_ckpt/integrations": {"run_ckpt/contract", "run_ckpt/storage", "run_ckpt/backends", "run_ckpt/loading"},
    "run_ckpt/tools": {
        "run_ckpt/contract",
        "run_ckpt/storage",
        "run_ckpt/statistics",
        "run_ckpt/backends",
        "run_ckpt/loading",
    },
    "convert_ckpt/kernels": {"run_ckpt/contract"},
    "convert_ckpt/methods": {"convert_ckpt/kernels"},
    "convert_ckpt/source": {"run_ckpt/contract", "run_ckpt/storage"},
    "convert_ckpt/plan": {"run_ckpt/contract", "run_ckpt/storage", "convert_ckpt/source"},
    "convert_ckpt/run": {
        "run_ckpt/contract",
        "run_ckpt/storage",
        "convert_ckpt/source",
        "convert_ckpt/plan",
        "convert_ckpt/kernels",
        "convert_ckpt/methods",
    },
}

_HEAVY = {"numpy", "llvmlite", "torch", "rich", "huggingface_hub", "fsspec", "safetensors"}

_CONVERSION = """
import json, sys
from pathlib import Path
import convert_ckpt.cli, convert_ckpt.run.engine, convert_ckpt.pipeline
sys.argv = ["convert-ckpt", *json.loads(sys.argv[1])]
try:
    convert_ckpt.cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("MODULES", json.dumps(sorted(sys.modules)))
"""
_HELP = _CONVERSION.replace(", convert_ckpt.run.engine, convert_ckpt.pipeline", "")


def source_of(module: str) -> Path:
    return ROOT / {"convert_ckpt": "convert", "run_ckpt": "runtime"}[module.partition("/")[0]] / module


def imports(module: str) -> Iterator[str]:
    """Yield the dotted name of each import that runs, wherever in the file; not those for type checkers."""
    pending: list[ast.AST] = [ast.parse(source_of(module).read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from convert_ckpt import x` may name a module too.
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


def loaded_modules(code: str, *arguments: str) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the top-level packages it had loaded at its end."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.rpartition("MODULES ")[2])
    return {name.partition(".")[0] for name in names}


def ours(module: str) -> set[str]:
    """Return the rooms, or top-level modules, of ours that a module imports: "run_ckpt/contract"."""
    parts = [name.split(".") for name in imports(module)]
    return {"/".join(part[:2]) for part in parts if part[0] in ("convert_ckpt", "run_ckpt") and len(part) > 1}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("run_ckpt/")])
def test_the_loader_never_imports_the_converter(module: str) -> None:
    assert "convert_ckpt" not in packages(module)


@pytest.mark.parametrize("module", CONTRACT)
def test_contract_imports_only_torch_blake3_and_the_standard_library(module: str) -> None:
    assert not packages(module) - sys.stdlib_module_names - {"torch", "blake3", "run_ckpt"}


# A Triton kernel can't take a record: what it decodes is a constant of its compilation.
_BY_NAME = {*CONTRACT, "run_ckpt/backends/triton/decode.py"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in _BY_NAME])
def test_formats_layouts_and_dialects_are_told_apart_by_their_records(module: str) -> None:
    names = {*FORMATS, *LAYOUTS, *DIALECTS}
    compared = [
        constant.value
        for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    ]
    assert not names & set(compared)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_below_it(room: str) -> None:
    rooms = {*ROOMS, "run_ckpt/cli"}
    for module in MODULES:
        if module.startswith(f"{room}/"):
            assert ours(module) & rooms - {room} <= ROOMS[room], module


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("convert_ckpt/")])
def test_the_converter_takes_from_the_loader_only_contract_and_storage(module: str) -> None:
    shared = {"run_ckpt/contract", "run_ckpt/storage", "run_ckpt/version", "run_ckpt/progress"}
    # --push-to-hub is run-ckpt push, begun while shards are still being made; both commands show progress alike.
    shared |= {"convert_ckpt/push.py": {"run_ckpt/tools"}, "convert_ckpt/cli.py": {"run_ckpt/cli"}}.get(module, set())
    assert {name for name in ours(module) if name.startswith("run_ckpt/")} <= shared


@pytest.mark.parametrize("package", HOMES)
def test_package_is_imported_only_where_it_is_at_home(package: str) -> None:
    users = [module for module in MODULES if package in packages(module)]
    assert [user for user in users if not user.startswith(HOMES[package])] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("convert_ckpt/")])
def test_convert_never_imports_torch_itself(module: str) -> None:
    assert "torch" not in packages(module)


@pytest.mark.parametrize("format_", ["mxfp4", "fp8"])
def test_a_conversion_runs_without_torch(format_: str, tmp_path: Path) -> None:
    source, output = make_linear(tmp_path / "source", 256, 256), tmp_path / "output"
    loaded = loaded_modules(_CONVERSION, str(source), str(output), "--format", format_)
    assert not loaded & {"torch", "huggingface_hub", "fsspec"}
    assert (output / "model.safetensors").is_file()


def test_a_plan_needs_no_kernels(tmp_path: Path) -> None:
    source = make_linear(tmp_path / "source", 256, 256)
    loaded = loaded_modules(_CONVERSION, str(source), "--format", "mxfp4", "--dry-run")
    assert not loaded & {"torch", "llvmlite", "rich", "huggingface_hub", "fsspec"}


def test_the_table_of_backends_loads_none_of_their_packages() -> None:
    code = "import json, sys, run_ckpt.backends.choose\nprint('MODULES', json.dumps(sorted(sys.modules)))"
    assert not loaded_modules(code) & {"aiter", "petit_kernel", "triton", "llvmlite", "convert_ckpt"}


def test_the_loader_needs_only_torch_and_blake3() -> None:
    code = "import json, sys, run_ckpt\nrun_ckpt.load_quantized\nprint('MODULES', json.dumps(sorted(sys.modules)))"
    unwanted = {*HOMES} - {"blake3"} | {"convert_ckpt", "safetensors", "scipy"}
    assert not loaded_modules(code) & unwanted


def test_help_imports_nothing_heavy() -> None:
    assert not loaded_modules(_HELP, "--help") & _HEAVY


@pytest.mark.parametrize("module", MODULES)
def test_module_is_at_most_300_lines(module: str) -> None:
    assert len(source_of(module).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_called_like_a_builtin_or_a_standard_module(module: str) -> None:
    taken = {*dir(builtins), *sys.stdlib_module_names}
    body = ast.parse(source_of(module).read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not names & taken


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_called_like_one_of_the_standard_library(module: str) -> None:
    assert Path(module).stem not in sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_module_says_its_job_in_a_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse(source_of(module).read_text(encoding="utf-8")))


def test_the_map_in_the_readme_names_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(
        r"^( {4,6})(\S+) ", readme.partition("## Where things are")[2].partition("\n## ")[0], re.MULTILINE
    )
    top, missing = ROOT, []
    for indent, place in places:
        top = ROOT / place if len(indent) == 4 else top
        path = top if len(indent) == 4 else top / place
        missing += [] if path.exists() else [path]
    assert (len(places) > 10, missing) == (True, [])
