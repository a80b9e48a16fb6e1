"""OUTPUT.partial: only what is ours is taken over, written to or removed, and only as we left it."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from convert_ckpt.run.partial_output import Staging
from run_ckpt.contract.errors import CheckpointError, PartialRunError
from run_ckpt.storage.partial import PartialFolder
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint
from tests.test_resume import COMMAND

OPTIONS = {"format": "mxfp4"}


class StoppedError(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards and a small file beside them."""
    shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i)} for i in range(3)]
    folder = save_checkpoint(tmp_path / "in", shards, {"_class_name": "SomeTransformer"})
    (folder / "scheduler.txt").write_text("beside")
    return folder


@pytest.fixture
def stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return OUTPUT.partial of a run that was stopped after two of three shards."""
    write_record = Staging.write_record
    lock = threading.Lock()

    def write_then_stop(self: Staging, component: str, file_name: str, record: dict[str, object]) -> None:
        with lock:
            if len(self.read_records(component)) == 2:
                raise StoppedError
            write_record(self, component, file_name, record)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Staging, "write_record", write_then_stop)
        convert(source, tmp_path / "out", 1, **OPTIONS)
    return tmp_path / "out.partial"


def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(source, tmp_path / "whole", **OPTIONS)
    return folder_bytes(tmp_path / "whole")


def finished_shard(partial: Path) -> Path:
    return partial / "result" / min((partial / "records" / "root").iterdir()).stem


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["mine"],
        ["lock", "result/mine"],
        ["fingerprint.json", "lock", "result/model.safetensors", "records/root/model.safetensors.json"],
        ["quantization_manifest.json", "model.safetensors"],
    ],
)
def test_a_folder_of_somebody_else_is_refused_and_kept(
    source: Path, tmp_path: Path, names: list[str], restart: bool
) -> None:
    for name in names:
        path = tmp_path / "out.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    before = folder_bytes(tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match="not ours"):
        convert(source, tmp_path / "out", restart=restart, **OPTIONS)
    assert folder_bytes(tmp_path / "out.partial") == before
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_called_partial_is_kept(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.partial", **OPTIONS)
    before = folder_bytes(tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match="not ours"):
        convert(source, tmp_path / "out", **OPTIONS)
    assert folder_bytes(tmp_path / "out.partial") == before


def test_an_empty_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    convert(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_rewrite_is_not_taken_over(source: Path, tmp_path: Path) -> None:
    with PartialFolder(tmp_path / "out", "run-ckpt"):
        pass
    with pytest.raises(CheckpointError, match="not ours"):
        convert(source, tmp_path / "out", **OPTIONS)


def test_the_folder_is_private_and_the_result_is_not(source: Path, tmp_path: Path, stopped: Path) -> None:
    assert stat.S_IMODE(stopped.stat().st_mode) == 0o700
    mask = os.umask(0o027)
    try:
        convert(source, tmp_path / "other", **OPTIONS)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "other" / "config.json").stat().st_mode) == 0o640


def test_a_folder_that_others_may_write_to_is_refused(source: Path, tmp_path: Path, stopped: Path) -> None:
    stopped.chmod(0o770)
    with pytest.raises(CheckpointError, match="others may write to it"):
        convert(source, tmp_path / "out", **OPTIONS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_folder_of_another_user_is_refused(source: Path, tmp_path: Path, stopped: Path) -> None:
    os.chown(stopped, 12345, 12345)
    with pytest.raises(CheckpointError, match="not ours"):
        convert(source, tmp_path / "out", **OPTIONS)


def link_folder(path: Path, victim: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(victim, target_is_directory=True)


def link_file(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(victim / "precious")


def hard_link(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.hardlink_to(victim / "precious")


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("result", link_folder),
        ("records", link_folder),
        ("records/root", link_folder),
        ("fingerprint.json", link_file),
        ("convert-ckpt.lock", link_file),
        ("convert-ckpt.lock", hard_link),
        ("result/config.json", link_file),
        ("result/model-00003-of-00003.safetensors", link_file),
        ("result/model-00003-of-00003.safetensors", hard_link),
        ("result/.0123456789abcdef.part", link_file),
        ("fetched", lambda path, victim: path.symlink_to(victim)),
        ("skeleton", lambda path, victim: path.symlink_to(victim)),
        ("result/pipe", lambda path, victim: os.mkfifo(path)),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_nothing_is_written_through_a_link(
    source: Path, tmp_path: Path, stopped: Path, name: str, plant: Callable[[Path, Path], None], restart: bool
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    plant(stopped / name, victim)
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", restart=restart, **OPTIONS)
    assert folder_bytes(victim) == {"precious": b"precious"}
    assert not (tmp_path / "out").exists()


def test_a_partial_folder_that_is_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"out\.partial"):
        convert(source, tmp_path / "out", **OPTIONS)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, 100),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_finished_shard_that_is_no_longer_as_it_was_is_converted_again(
    source: Path, tmp_path: Path, stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(finished_shard(stopped))
    assert convert(source, tmp_path / "out", **OPTIONS).n_files_resumed == 1
    assert folder_bytes(tmp_path / "out") == whole(source, tmp_path)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_no_record(
    source: Path, tmp_path: Path, stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(min((stopped / "records" / "root").iterdir()))
    assert convert(source, tmp_path / "out", **OPTIONS).n_files_resumed == 1
    assert folder_bytes(tmp_path / "out") == whole(source, tmp_path)


def test_a_record_counts_only_for_its_file(source: Path, tmp_path: Path, stopped: Path) -> None:
    first, second = sorted((stopped / "records" / "root").iterdir())
    shutil.copyfile(first, second)
    shutil.copyfile(finished_shard(stopped), stopped / "result" / second.stem)
    assert convert(source, tmp_path / "out", **OPTIONS).n_files_resumed == 1
    assert folder_bytes(tmp_path / "out") == whole(source, tmp_path)


def test_a_record_with_another_number_is_no_record(source: Path, tmp_path: Path, stopped: Path) -> None:
    path = min((stopped / "records" / "root").iterdir())
    entry = json.loads(path.read_text())
    (layer,) = entry["record"]["layers"].values()
    layer["sqnr_db"] = 99.0
    path.write_text(json.dumps(entry))
    convert(source, tmp_path / "out", **OPTIONS)
    assert folder_bytes(tmp_path / "out") == whole(source, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"files": 1}', '{"files": {"": []}}', "[" * 100_000])
def test_a_damaged_fingerprint_is_refused_with_the_way_out(
    source: Path, tmp_path: Path, stopped: Path, text: str
) -> None:
    (stopped / "fingerprint.json").write_text(text)
    with pytest.raises(PartialRunError, match="Remove"):
        convert(source, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    "name",
    [
        "mine",
        "result/mine",
        "result/extra.safetensors",
        "result/sub/mine",
        "records/mine",
        "records/root/ghost.safetensors.json",
        "records/transformer/model.safetensors.json",
        "fetched/root/mine",
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_files_of_others_in_our_folder_are_refused_and_kept(
    source: Path, tmp_path: Path, stopped: Path, name: str, restart: bool
) -> None:
    path = stopped / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    with pytest.raises(PartialRunError, match=f"no run put there: .*{name.removesuffix('/mine')}"):
        convert(source, tmp_path / "out", restart=restart, **OPTIONS)
    assert path.read_text() == "precious"
    path.unlink()
    assert not (tmp_path / "out").exists()


def test_restart_throws_away_a_run_with_another_plan(source: Path, tmp_path: Path, stopped: Path) -> None:
    convert(source, tmp_path / "out", restart=True, format="fp8")
    convert(source, tmp_path / "whole", format="fp8")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_file_that_a_killed_run_did_not_complete_is_removed(source: Path, tmp_path: Path, stopped: Path) -> None:
    for name in (".0123456789abcdef.part", "result/.fedcba9876543210.part", "records/root/.0000000000000000.part"):
        (stopped / name).write_text("half")
    convert(source, tmp_path / "out", **OPTIONS)
    assert folder_bytes(tmp_path / "out") == whole(source, tmp_path)
    assert not stopped.exists()


@pytest.mark.parametrize("shard", [1, 3])
def test_a_source_shard_replaced_by_one_of_the_same_size_and_time_is_noticed(
    source: Path, tmp_path: Path, stopped: Path, shard: int
) -> None:
    path = source / f"model-0000{shard}-of-00003.safetensors"
    status = path.stat()
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(PartialRunError, match=rf"{path.name}.*A shard of another ctime may hold other bytes"):
        convert(source, tmp_path / "out", **OPTIONS)


@pytest.mark.skipif(os.geteuid() != 0, reason="root may mount")
def test_output_where_a_disk_is_mounted_is_refused_at_once(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is mounted|is not empty"):
        convert(source, Path("/proc"), **OPTIONS)


def test_a_partial_folder_where_a_disk_is_mounted_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir(0o700)
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    script = 'mount -t tmpfs -o mode=700 none "$1" && shift && exec "$@"'
    options = [str(source), str(tmp_path / "out"), "--format", "mxfp4", "--preset", "generic", "--quiet"]
    command = [*unshare, script, "sh", str(tmp_path / "out.partial"), sys.executable, "-c", COMMAND, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "out.partial: is in the way" in done.stderr) == (1, True), done.stderr


def test_output_that_cannot_be_a_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for output in (Path("/"), tmp_path / "a" / "out", tmp_path / ("x" * 250), tmp_path / ("x" * 300) / "out"):
        with pytest.raises(CheckpointError, match="Choose"):
            convert(source, output, **OPTIONS)
