"""A source that changes, or is taken away, while it is converted: refused, and whole again by the same command."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.readers import ShardReaders
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.storage.writer import ShardWriter
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint

SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i)} for i in range(3)]
    folder = save_checkpoint(tmp_path / "in", shards, {"_class_name": "SomeTransformer"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def link_to_a_secret(source: Path) -> None:
    (source.parent / "secret").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(source.parent / "secret")


def replace_by_another(source: Path) -> None:
    """Of the same size, with a tensor of another name."""
    shutil.copy(source / SHARD.format(2), source / "new")
    (source / "new").rename(source / SHARD.format(3))


def make_longer(source: Path) -> None:
    os.truncate(source / SHARD.format(3), (source / SHARD.format(3)).stat().st_size + 1)


def overwrite_what_was_read(source: Path) -> None:
    with open(source / SHARD.format(1), "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


# After the plan is made, and before anything is read by it.
MOMENTS = {"planned": (Staging, "adopt"), "reading": (ShardReaders, "read")}
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (shutil.rmtree, "No such file or directory"),
    "shard removed": (lambda source: (source / SHARD.format(3)).unlink(), "No such file or directory"),
    "shard truncated": (lambda source: os.truncate(source / SHARD.format(3), 500), "00003.*not the file whose header"),
    "shard longer": (make_longer, "00003.*not the file whose header"),
    "shard replaced": (replace_by_another, "00003.*not the file whose header"),
    "small file removed": (lambda source: (source / "tokenizer.json").unlink(), "No such file or directory"),
    "small file edited": (lambda source: (source / "tokenizer.json").write_text("[]"), "tokenizer.json: changed while"),
    "small file a link": (link_to_a_secret, "tokenizer.json: changed while"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, moment: str
) -> None:
    shutil.copytree(source, tmp_path / "kept")
    do, message = CHANGES[change]
    with monkeypatch.context() as patch:
        change_once(patch, *MOMENTS[moment], lambda: do(source))
        with pytest.raises((CheckpointError, OSError), match=message):
            convert(source, tmp_path / "out", 1, format="mxfp4")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", source)
    convert(source, tmp_path / "out", restart=True, format="mxfp4")
    convert(source, tmp_path / "whole", format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_bytes_that_were_read_already_are_missed_by_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        change_once(patch, ShardWriter, "finish", lambda: overwrite_what_was_read(source))
        with pytest.raises(CheckpointError, match=r"00001.*changed while it was converted"):
            convert(source, tmp_path / "out", 1, format="mxfp4")
    assert not (tmp_path / "out").exists()


def change_once(patch: pytest.MonkeyPatch, owner: type, name: str, change: Callable[[], object]) -> None:
    """Let ``change`` happen before the first call of a method."""
    method, left = getattr(owner, name), [change]

    def changed(self: Any, *args: Any, **keywords: Any) -> Any:
        if left:
            left.pop()()
        return method(self, *args, **keywords)

    patch.setattr(owner, name, changed)
