"""What the README prints works as it is typed."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from convert_ckpt.cli import cli as convert_ckpt
from run_ckpt.cli.command import run_command
from run_ckpt.cli.main import run_ckpt
from tests.converted import convert
from tests.models import MODELS, save
from tests.test_extras import PROJECT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python|toml)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    words
    for language, block in BLOCKS
    if language == "sh"
    for line in block.replace("\\\n", "").splitlines()
    if (words := shlex.split(line, comments=True))
]
OURS = {"convert-ckpt": convert_ckpt, "run-ckpt": run_ckpt}
# Which word of a command names the folder that it makes.
MAKES = {"convert-ckpt": 2, "dequantize": 3, "relayout": 3}


def is_local(command: list[str]) -> bool:
    """True for what runs on the checkpoint of the demo or what was made of it; the rest names models of the Hub."""
    goes_to_the_hub = "push" in command or "--push-to-hub" in command
    return command[0] in OURS and not goes_to_the_hub and any(re.match("examples/|digits-", word) for word in command)


LOCAL = [command for command in COMMANDS if is_local(command)]
ELSEWHERE = [command for command in COMMANDS if command[0] in OURS and not is_local(command)]


def made_by(commands: list[list[str]]) -> list[str]:
    """Return the folders that these commands make; a dry run makes none."""
    made = [command[MAKES[key]] for command in commands for key in command[:2] if key in MAKES]
    return [name for name in made if not name.startswith("--")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh checkout in which the local commands ran one after the other."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, *args in LOCAL:
            with pytest.raises(SystemExit) as stop:
                run_command(OURS[name], name, args)
            assert not stop.value.code, shlex.join([name, *args])
    return folder


def test_the_commands_on_the_checkpoint_of_the_demo_run_one_after_the_other(checkout: Path) -> None:
    assert len(LOCAL) > 10
    assert all((checkout / name / "config.json").is_file() for name in made_by(LOCAL))
    assert (checkout / "report.html").is_file()


@pytest.mark.parametrize("command", ELSEWHERE, ids=lambda command: " ".join(command[:4]))
def test_the_other_commands_parse(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "text.txt", "statistics"):
        (tmp_path / name).touch()
    found: click.Command | None = OURS[command[0]]
    if isinstance(found, click.Group):
        found = found.commands[command[1]]
        command = command[1:]
    assert found is not None
    found.make_context(command[0], command[1:])


def test_no_two_commands_write_to_the_same_place() -> None:
    made = made_by(COMMANDS) + re.findall(r"^summary = convert\(\"[^\"]+\", \"([^\"]+)\"", README, re.MULTILINE)
    assert len(made) > 5
    assert sorted({*made}) == sorted(made)


@pytest.mark.usefixtures("own_tables")
def test_the_python_blocks_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = MODELS["llama"]
    save(llama, llama.build(), str(checkout / "llama"))
    convert(checkout / "llama", checkout / "llama-fp8", format="fp8")
    monkeypatch.chdir(checkout)
    names: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(block, names)
    printed = re.search(r"print\(summary\)  # (Converted .*?) in ", README)
    assert printed is not None
    assert str(names["summary"]).startswith(printed[1])
    assert type(names["transformer"]).__name__ == "FluxTransformer2DModel"
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_what_is_named_beside_our_commands_is_there() -> None:
    others = {command[0] for command in COMMANDS if command[0] not in OURS}
    assert others == {"pip", "sglang", "vllm", "scripts/demo.sh", "scripts/test.sh"}
    for name in {*re.findall(r"\bscripts/\w+\.(?:sh|py)", README)}:
        assert (ROOT / name).is_file(), name
    for extra in {*re.findall(r"\"\.\[(\w+)\]\"", README)}:
        assert extra in PROJECT["optional-dependencies"], extra


def test_links_stay_on_the_page_or_are_absolute() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith("https://") and link not in anchors] == []
    assert [path for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("model", ["Z-Image-Turbo", "Qwen3-8B"])
def test_the_sizes_are_what_the_plans_say(model: str) -> None:
    sizes = load_script("model_sizes")
    assert f"\n{sizes.row(model, sizes.MODELS[model])}\n" in README


def test_what_a_terabyte_costs_is_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    scale = load_script("bench_scale")
    fitted = re.search(r"\((\S+) s fixed, (\S+) s a task, (\S+) s per GB", README)
    assert fitted is not None
    model = scale.Model(*map(float, fitted.groups()))
    for n_nodes in (1, 8, 64):
        row = scale.row(scale.Machines(n_nodes, 4, 4, 3.0, 20.0, 5.0, 0.266), model)
        assert f"\n| {' | '.join(row)} |\n" in README


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
