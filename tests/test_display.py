"""Names are text: no command to a terminal, no element of a page, no line of code; and printing stops no work."""

import ast
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_ckpt.api import convert as convert_by_api
from run_ckpt.contract.display import shown
from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.manifest_text import seal_manifest
from run_ckpt.contract.module_names import matches_pattern, pattern_regex
from run_ckpt.storage.reference import parse_reference
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.rows import read_result
from tests.checkpoints import FLUX_DIGITS, convert, random_weight, save_checkpoint

CONVERT = "import sys; from convert_ckpt.cli import main; sys.argv[0] = 'convert-ckpt'; main()"
RUN = "import sys; from run_ckpt.cli.main import main; main(sys.argv[1:])"


def run(code: str, *arguments: object, shell: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; shell: what a shell would say behind it, such as 2>&-."""
    words = " ".join(f"'{argument}'" for argument in arguments)
    command = ["bash", "-c", f'exec "$0" -c "$1" {words} {shell}', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False, **options)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": random_weight(256, 256)}], {"_class_name": "A"})
    convert(source, tmp_path / "out", format="fp8")
    return tmp_path / "out"


@given(st.text())
def test_what_is_shown_is_printable_and_keeps_what_is(text: str) -> None:
    assert shown(text).isprintable()
    assert not text.isprintable() or shown(text) == text
    shown(text).encode()


def test_line_ends_stay_in_a_message_and_not_in_a_name() -> None:
    assert shown("a\nb\x1b[2J", lines=True) == "a\nb\\x1b[2J"
    assert shown("a\nb") == "a\\nb"


def test_a_file_name_commands_no_terminal(output: Path) -> None:
    (output / "\x1b[2Jgone\x07").write_text("")
    done = run(RUN, "verify", output)
    assert done.returncode == 1
    assert "\\x1b[2Jgone\\x07: not listed" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["2>&-", "2>&- >&- <&-", ">/dev/null 2>/dev/full", "2>&1 | true"])
def test_printing_stops_no_conversion(tmp_path: Path, shell: str) -> None:
    done = run(CONVERT, FLUX_DIGITS, tmp_path / "out", "--format", "fp8", shell=shell)
    assert done.returncode == 0
    assert run(RUN, "verify", tmp_path / "out").returncode == 0


def test_a_broken_pipe_hides_no_fault(output: Path) -> None:
    (output / "more").write_text("")
    done = run(RUN, "verify", output, shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["card", "inspect"])
def test_a_stream_of_few_characters_gets_what_it_can(output: Path, encoding: str, command: str) -> None:
    done = run(RUN, command, output, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("megabytes", [250, 400, 600])
def test_little_memory_is_an_error_of_one_line(tmp_path: Path, megabytes: int) -> None:
    shell = "--format fp8 --workers 16 || exit $?"
    words = f"ulimit -v {megabytes * 1024}; "
    command = ["bash", "-c", f'{words} exec "$0" -c "$1" {FLUX_DIGITS} {tmp_path / "out"} {shell}']
    done = subprocess.run([*command, sys.executable, CONVERT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr


def test_too_little_memory_for_torch_is_an_error_of_one_line(output: Path) -> None:
    command = ["bash", "-c", 'ulimit -v 300000; exec "$0" -c "$1" verify "$2"', sys.executable, RUN, output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.partition(". ")[0]) == (1, "error: out of memory")


def test_a_umask_that_locks_its_own_user_out_is_lifted_for_that_user(tmp_path: Path) -> None:
    options = [FLUX_DIGITS, str(tmp_path / "out"), "--format", "fp8", "--quiet"]
    done = subprocess.run(
        ["bash", "-c", 'umask 0727; exec "$@"', "bash", sys.executable, "-c", CONVERT, *options], check=False
    )
    assert done.returncode == 0
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "config.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("main", ["convert_ckpt.cli", "run_ckpt.cli.main"])
def test_a_user_that_the_machine_does_not_know_needs_no_home(output: Path, tmp_path: Path, main: str) -> None:
    unknown = "import os, pwd, sys; del os.environ['HOME']; pwd.getpwuid = {}.__getitem__; "
    command = ["inspect", output] if "run" in main else [FLUX_DIGITS, tmp_path / "new", "--format", "fp8", "--quiet"]
    done = run(f"{unknown} from {main} import main; main()", *command, env={**os.environ, "HOME": "/"})
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = 'a`</code></table><script>alert(1)</script>[x](javascript:1)"; import os; $(reboot) ${x} |'


def test_names_in_a_card_stay_names(output: Path) -> None:
    document = json.loads((output / MANIFEST_NAME).read_text())
    document["source"]["name"] = f"me/{HOSTILE}"
    document["source"]["revision"] = "0" * 40
    document["tool"]["version"] = HOSTILE
    document["recipe"]["calibration"] = document["recipe"]["recipe"] = HOSTILE
    spec = {"dtype": "F32", "shape": [4, 4], "reason": HOSTILE, "decided_by": {"by": "not linear", "rule": HOSTILE}}
    document["kept"][f"{HOSTILE}.weight"] = spec
    document["unquantized_linears"][HOSTILE] = None
    document["files"][f"{HOSTILE.replace('/', '')}.safetensors"] = {"nbytes": 1, "blake3": HOSTILE}
    (output / MANIFEST_NAME).write_bytes(b"".join(seal_manifest(document)))
    card = make_card(read_result(output), "me/model")
    text = re.sub(r"```\w+\n.*?\n```", "", card.partition("\n---\n")[2], flags=re.DOTALL)
    outside = re.sub(r"`[^`]*`", "", text)
    assert "<script" not in outside
    assert "[x](" not in outside.replace("\\[", "")
    for block in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL):
        calls = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        assert "os" not in calls
    for block in re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL):
        assert "$(reboot)" not in re.sub(r"'[^']*'", "", block)


@pytest.mark.parametrize("class_name", ["A\nimport os", "A; import os", "<b>", "A B", ""])
def test_a_class_that_is_no_name_is_refused_in_a_manifest(output: Path, class_name: str) -> None:
    document = json.loads((output / MANIFEST_NAME).read_text())
    document["recipe"]["class_name"] = class_name
    (output / MANIFEST_NAME).write_bytes(b"".join(seal_manifest(document)))
    with pytest.raises(CheckpointError, match="recipe: class_name"):
        read_result(output)


def test_a_component_folder_with_a_name_that_is_no_word_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "in" / "transformer$(reboot)", [{"a.weight": random_weight(256, 256)}], {})
    with pytest.raises(CheckpointError, match="no name of a component"):
        convert(tmp_path / "in", tmp_path / "out", format="fp8")


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
def test_a_pattern_matches_what_its_regular_expression_does(pattern: str, name: str) -> None:
    assert matches_pattern(pattern, name) == (pattern_regex(pattern).fullmatch(name) is not None)


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    started = time.monotonic()
    assert not matches_pattern("*a" * 25 + "*b", "a" * 100_000)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("arguments", [("", "out"), (FLUX_DIGITS, "")])
def test_an_empty_name_is_no_folder(
    tmp_path: Path, arguments: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is empty"):
        convert_by_api(*arguments, format="fp8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["zip://x::/etc/passwd", "zip://a::zip://b::/nowhere", "nowhere://x", "http://[", "s3://"]
)
def test_a_url_that_nothing_opens_is_an_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(CheckpointError):
        convert_by_api(url, tmp_path / "out", format="fp8")
    assert parse_reference(".") == Path()


@pytest.mark.parametrize("depth", [150, 600, 2000, 100_000])
def test_a_deeply_nested_config_is_refused_before_any_work(tmp_path: Path, depth: int) -> None:
    source = save_checkpoint(tmp_path / "in", [{"a.0.b.weight": random_weight(256, 256)}], {})
    (source / "config.json").write_text('{"a": ' * depth + "{}" + "}" * depth)
    with pytest.raises(FaultsError, match=r"config\.json: not readable"):
        convert(source, tmp_path / "out", format="fp8")


def test_too_many_open_files_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256)} for i in range(40)]
    convert(save_checkpoint(tmp_path / "in", shards, {"_class_name": "A"}), tmp_path / "out", format="fp8")
    words = f'ulimit -n 30; exec "$0" -c "$1" dequantize {tmp_path / "out"} {tmp_path / "plain"}'
    done = subprocess.run(["bash", "-c", words, sys.executable, RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Raise the limit of open files (ulimit -n).")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", ["not utf-8 \udcff", "no\u00a0break", "two\nlines", "\U0001f469\u200d\U0001f680"])
def test_a_source_of_any_name_and_any_card_is_converted_and_read_again(tmp_path: Path, name: str) -> None:
    source = save_checkpoint(tmp_path / name, [{"blocks.0.a.weight": random_weight(256, 256)}], {"_class_name": "A"})
    (source / "README.md").write_text(
        "---\nlicense: other\ntags: ['\U0001f469\u200d\U0001f680', 'no\u00a0break']\n---\n"
    )
    (tmp_path / f"{name}.toml").write_text('[[rules]]\nmatch = "*"\nformat = "fp8"\nreason = "no\u00a0break"\n')
    convert(source, tmp_path / "out", format="fp8", recipe=tmp_path / f"{name}.toml", preset="generic")
    (component,) = read_result(tmp_path / "out")
    assert component.manifest.source["name"] == shown(name)
    make_card([component], "me/model").encode()
