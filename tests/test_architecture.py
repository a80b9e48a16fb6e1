"""Who may import whom, what starts fast, and how long a module may get."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converted import make_linear

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("convert", "runtime") for path in (ROOT / top).rglob("*.py")
)
CONTRACT = [module for module in MODULES if module.startswith("runtime/contract/")]
MAX_LINES = 300

# Package -> the files (or folders, with a slash) that may import it.
HOMES: dict[str, tuple[str, ...]] = {
    "llvmlite": ("convert/kernels/",),
    "click": ("convert/cli.py", "runtime/cli.py", "runtime/cli_publish.py", "runtime/cli_run.py"),
    "matplotlib": ("runtime/publish/heatmap.py",),
    "rich": ("convert/cli.py", "convert/progress.py", "runtime/cli.py", "runtime/tables.py"),
    "aiter": ("runtime/backends/",),
    "petit_kernel": ("runtime/backends/",),
    "triton": ("runtime/kernels/",),
    "huggingface_hub": ("convert/hub.py", "runtime/publish/repository.py"),
    "yaml": ("convert/source_card.py", "runtime/publish/card_metadata.py"),
    "fsspec": ("convert/url_store.py",),
    "diffusers": ("runtime/integrations/",),
    "transformers": ("runtime/integrations/",),
    "sglang": ("runtime/integrations/sglang/",),
    "accelerate": ("runtime/integrations/",),
}

_HEAVY = {"numpy", "llvmlite", "torch", "rich", "huggingface_hub", "fsspec", "safetensors"}

_CONVERSION = """
import json, sys
from pathlib import Path
import convert.cli, convert.engine, convert.pipeline
sys.argv = ["convert-ckpt", *json.loads(sys.argv[1])]
try:
    convert.cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("MODULES", json.dumps(sorted(sys.modules)))
"""
_HELP = _CONVERSION.replace(", convert.engine, convert.pipeline", "")


def imports(module: str) -> Iterator[str]:
    """Yield the dotted name of each import that runs, wherever in the file; not those for type checkers."""
    pending: list[ast.AST] = [ast.parse((ROOT / module).read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from convert import x` may name a module too.
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


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("runtime/")])
def test_runtime_never_imports_convert(module: str) -> None:
    assert "convert" not in packages(module)


@pytest.mark.parametrize("module", CONTRACT)
def test_contract_imports_torch_and_the_standard_library_alone(module: str) -> None:
    foreign = packages(module) - sys.stdlib_module_names - {"torch", "runtime"}
    assert not foreign


@pytest.mark.parametrize("module", CONTRACT)
def test_contract_imports_nothing_else_of_ours(module: str) -> None:
    ours = {name for name in imports(module) if name.startswith("runtime.")}
    assert all(name.startswith("runtime.contract.") for name in ours)


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("convert/")])
def test_convert_takes_from_runtime_the_contract_and_the_version_alone(module: str) -> None:
    taken = {name for name in imports(module) if name.startswith("runtime")}
    shared = ("runtime.contract.", "runtime.version.")
    # --push-to-hub is run-ckpt push, begun while shards are still being made.
    push = ("runtime.publish.", "runtime.progress.") if module == "convert/push.py" else ()
    assert all(name.startswith(shared + push) for name in taken)


@pytest.mark.parametrize("package", HOMES)
def test_package_is_imported_only_where_it_is_at_home(package: str) -> None:
    users = [module for module in MODULES if package in packages(module)]
    assert [user for user in users if not user.startswith(HOMES[package])] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("convert/")])
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
    code = "import json, sys, runtime.backends.table\nprint('MODULES', json.dumps(sorted(sys.modules)))"
    assert not loaded_modules(code) & {"aiter", "petit_kernel", "triton", "llvmlite", "convert"}


def test_the_loader_needs_torch_alone() -> None:
    code = "import json, sys, runtime\nruntime.load_quantized\nprint('MODULES', json.dumps(sorted(sys.modules)))"
    unwanted = {*HOMES} | {"convert", "safetensors", "scipy"}
    assert not loaded_modules(code) & unwanted


def test_help_imports_nothing_heavy() -> None:
    assert not loaded_modules(_HELP, "--help") & _HEAVY


@pytest.mark.parametrize("module", MODULES)
def test_module_is_at_most_300_lines(module: str) -> None:
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_module_says_its_job_in_a_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8")))
