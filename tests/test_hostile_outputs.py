"""Where commands write besides a conversion's OUTPUT: nothing of others is replaced, removed or written through."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.tools.assemble import assemble
from run_ckpt.tools.generate import check_output
from tests.attack.injector import CRASHED, DONE, run_in_child
from tests.checkpoints import convert
from tests.converted import FLUX_DIGITS
from tests.test_hostile_files import write_through_a_device, write_through_a_link


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A result, and the folder of the pipeline that it is of."""
    root = tmp_path_factory.mktemp("parts")
    (root / "base" / "vae").mkdir(parents=True)
    (root / "base" / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "x"]}))
    (root / "base" / "loop").symlink_to("loop")
    convert(FLUX_DIGITS, root / "out", format="fp8")
    return root / "out", root / "base"


def test_assemble_keeps_a_folder_of_somebody_else(parts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "whole.partial").mkdir()
    (tmp_path / "whole.partial" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="in the way and not ours"):
        assemble(parts[0], tmp_path / "whole", str(parts[1]))
    assert (tmp_path / "whole.partial" / "mine").read_text() == "precious"


@pytest.mark.parametrize("mode", ["kill after", "EIO"])
def test_assemble_goes_on_after_a_fault_at_any_step(parts: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    def work() -> None:
        assemble(parts[0], tmp_path / "whole", str(parts[1]))

    ended, n_steps = run_in_child(work)
    assert ended == DONE
    whole = {entry.name: entry.readlink() for entry in (tmp_path / "whole").iterdir()}
    assert whole.keys() == {"transformer", "vae", "loop", "model_index.json"}
    for at in range(1, n_steps + 1):
        for entry in (tmp_path / "whole").iterdir():
            entry.unlink()
        assert run_in_child(work, mode, at)[0] != CRASHED
        assert run_in_child(work)[0] == DONE, at
        assert {entry.name: entry.readlink() for entry in (tmp_path / "whole").iterdir()} == whole
        assert not (tmp_path / "whole.partial").exists(), at


@pytest.mark.parametrize("index", [b"[]", b"\xff", b"{" * 100_000, b"{}"])
def test_assemble_refuses_an_index_that_is_none(parts: tuple[Path, Path], tmp_path: Path, index: bytes) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match="nothing was written"):
        assemble(parts[0], tmp_path / "whole", str(tmp_path / "base"))


def test_assemble_does_not_write_into_the_pipeline(parts: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="lies in the source"):
        assemble(parts[0], parts[1] / "whole", str(parts[1]))


@pytest.mark.parametrize("plant", [write_through_a_device, write_through_a_link, os.mkfifo, os.mkdir])
def test_generate_replaces_only_files(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "cat.png")
    with pytest.raises(CheckpointError, match="Give the name of a file"):
        check_output(tmp_path / "cat.png")
