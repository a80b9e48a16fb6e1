"""A Hub repo as SOURCE: the bytes of the local conversion, little disk, whatever the line does."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert_ckpt.run.partial_output import Staging
from run_ckpt.contract.errors import CheckpointError, FaultsError, FetchError
from run_ckpt.progress import Silent
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import convert, folder_bytes, load_all, random_weight, save_checkpoint
from tests.foreign import write_foreign
from tests.hub_fixtures import Lines, assert_same_but_for_the_source, convert_remote, hub, make_llm
from tests.hub_server import TOKEN, Fault, HubServer, read_files
from tests.test_gguf import write as write_gguf

__all__ = ["hub"]
COMMAND = "import sys; from convert_ckpt.cli import main; sys.argv[0] = 'convert-ckpt'; main()"
SHARD = "model-0000{}-of-00005.safetensors"


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm")


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_repo_gives_the_bytes_of_the_local_copy(
    hub: HubServer, llm: Path, tmp_path: Path, weight_format: str
) -> None:
    commit = hub.add_repo("me/llm", read_files(llm))
    convert_remote("me/llm@main", tmp_path / "out", format=weight_format)
    convert(llm, tmp_path / "local", format=weight_format)
    source = assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert (source["name"], source["revision"]) == ("me/llm", commit)
    for name, entry in source["files"].items():
        assert entry["sha256"] == hashlib.sha256((llm / name).read_bytes()).hexdigest()
    assert verify_output(tmp_path / "out", None, Silent())[0].faults == ()
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "out", "local"}


@pytest.mark.parametrize("weight_format", ["mxfp4", "nvfp4"])
def test_a_quantized_repo_whose_scales_lie_in_another_shard_gives_the_bytes_of_the_local_copy(
    hub: HubServer, tmp_path: Path, weight_format: str
) -> None:
    source, _ = write_foreign(tmp_path / "llm", "modelopt-nvfp4")
    hub.add_repo("me/llm", read_files(source))
    convert_remote("me/llm", tmp_path / "out", format=weight_format)
    convert(source, tmp_path / "local", format=weight_format)
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize("reference", ["me/gguf", "hf://me/gguf/flux-Q8_0.gguf"])
def test_a_gguf_file_gives_the_bytes_of_the_local_copy(
    hub: HubServer, tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.source.skeleton._HEADER_GUESS_NBYTES", 1000)
    pytest.importorskip("gguf")
    file, _ = write_gguf(tmp_path / "flux-Q8_0.gguf", quantized="Q8_0")
    hub.add_repo("me/gguf", {file.name: file.read_bytes(), "README.md": b"no card"})
    lines = Lines()
    convert_remote(reference, tmp_path / "out", format="fp8", preset=None, progress=lines)
    (fetched,) = [line for line in lines.lines if line.startswith("fetched ")]
    ranges = [request.range for request in hub.requests if request.path.endswith(".gguf") and request.range]
    assert fetched.startswith("fetched flux-Q8_0.gguf")
    assert {"bytes=0-999", "bytes=1000-1999"} <= set(ranges)
    convert(file, tmp_path / "local", format="fp8", preset=None)
    source = assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert source["name"] == reference.removeprefix("hf://")
    assert not list(tmp_path.rglob("*.gguf"))[1:]


def test_of_several_models_in_a_repo_one_has_to_be_named(hub: HubServer, tmp_path: Path) -> None:
    names = [f"flux-{kind}" for kind in ("Q4_0", "Q8_0")]
    hub.add_repo("me/gguf", {f"{name}.gguf": b"GGUF, not read" for name in names})
    with pytest.raises(FaultsError, match=r"flux-Q4_0\.gguf, flux-Q8_0\.gguf: each is a model of its own"):
        convert_remote("me/gguf", tmp_path / "out", format="fp8")
    assert not any(request.path.endswith(".gguf") for request in hub.requests)
    for name in names:
        save_file({"x.weight": torch.ones(2, 2), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    hub.add_repo("me/flux", read_files(tmp_path))
    with pytest.raises(FaultsError, match=r"Give one of these files: .*hf://owner/name/flux-Q4_0\.safetensors"):
        convert_remote("me/flux", tmp_path / "out", format="fp8")


@pytest.mark.parametrize("data", [b"GGUF", b"GGUF\3\0\0\0", b"not at all"])
def test_a_gguf_file_that_is_none_is_refused_as_one_here_is(hub: HubServer, tmp_path: Path, data: bytes) -> None:
    hub.add_repo("me/gguf", {"it.gguf": data})
    with pytest.raises(FaultsError, match=r"it\.gguf: the header of this GGUF file"):
        convert_remote("me/gguf", tmp_path / "out", format="fp8")


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_at_most_two_shards_are_here_at_once(hub: HubServer, llm: Path, tmp_path: Path, weight_format: str) -> None:
    hub.add_repo("me/llm", read_files(llm))
    sizes = {path.name: path.stat().st_size for path in llm.glob("*.safetensors")}
    folder = tmp_path / "out.partial" / "fetched"
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(here())

    def here(coming: str | None = None) -> int:
        names = {name for _, _, files in os.walk(folder) for name in files}
        return sum(sizes[name] for name in names | ({coming} if coming else set()))

    def count(path: str) -> None:
        if "/cdn/" in path and folder.exists():  # the headers came before
            seen.append(here(path.rpartition("/")[2]))

    hub.on_request = count
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert_remote("me/llm", tmp_path / "out", format=weight_format)
    done.set()
    watcher.join()
    assert len([nbytes for nbytes in seen if nbytes]) >= 5
    assert max(seen) <= sum(sorted(sizes.values())[-2:])


def test_a_group_in_three_shards_keeps_them_and_the_plan_says_so(hub: HubServer, tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    shards = [{f"model.layers.0.self_attn.{name}.weight": random_weight(256, 512)} for name in names]
    llm = save_checkpoint(tmp_path / "llm", shards, {"architectures": ["LlamaForCausalLM"]})
    hub.add_repo("me/llm", read_files(llm))
    shard_nbytes = (llm / "model-00001-of-00004.safetensors").stat().st_size
    for weight_format, n_shards in (("fp8", 3), ("mxfp4", 2)):
        lines = Lines()
        convert_remote("me/llm", tmp_path / weight_format, format=weight_format, progress=lines)
        at_once = f"at most {n_shards * shard_nbytes / 1000:.0f} kB of it at once"
        assert any(at_once in line for line in lines.lines)
        convert(llm, tmp_path / f"{weight_format}-local", format=weight_format)
        assert_same_but_for_the_source(tmp_path / weight_format, tmp_path / f"{weight_format}-local")


def test_the_disk_check_counts_the_shards_that_come(
    hub: HubServer, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    hub.add_repo("me/llm", read_files(llm))
    output = sum(path.stat().st_size for path in llm.glob("*.safetensors")) // 3  # about what mxfp4 takes
    shard = (llm / SHARD.format(1)).stat().st_size
    small = 2**20 + 2048 * len(load_all(llm))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=small + output + shard))
    with pytest.raises(CheckpointError, match=r"needed, .* free"):
        convert_remote("me/llm", tmp_path / "out", format="mxfp4")
    assert not hub.sent[SHARD.format(1)] > 2**17
    convert(llm, tmp_path / "local", format="mxfp4")  # the local copy needs none of that


def test_a_dry_run_moves_headers_alone(
    hub: HubServer, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add_repo("me/llm", read_files(llm))
    assert run_command(monkeypatch, "me/llm", "--dry-run", "--format", "mxfp4") == 0
    assert f"From hf://me/llm at commit {commit}" in capsys.readouterr().out
    assert all(nbytes <= 2**17 for nbytes in hub.sent.values())
    assert {path.name for path in tmp_path.iterdir()} == {"llm"}


def test_a_header_longer_than_the_first_request_is_read_to_its_end(hub: HubServer, tmp_path: Path) -> None:
    weights = {f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i) for i in range(2)}
    norms = {f"norms.{i}.{'long' * 20}.weight": torch.ones(2) for i in range(1000)}
    source = save_checkpoint(tmp_path / "in", [weights | norms], {"_class_name": "Unknown"})
    hub.add_repo("me/model", read_files(source))
    convert_remote("me/model", tmp_path / "out", format="mxfp4", preset="generic")
    convert(source, tmp_path / "local", format="mxfp4")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


def test_cut_connections_cost_only_the_bytes_that_did_not_come(
    hub: HubServer, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.source.download._PART_NBYTES", 400_000)  # several ranges a shard
    hub.add_repo("me/llm", read_files(llm))
    moments = random.Random(0)
    header_nbytes = 2**17
    hub.faults = [Fault("/cdn/", times=40, cut_after=lambda: moments.randrange(1, 200_000))]
    convert_remote("me/llm", tmp_path / "out", format="fp8")
    convert(llm, tmp_path / "local", format="fp8")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert hub.faults[0].times == 0
    for path in llm.glob("*.safetensors"):
        assert hub.sent[path.name] == path.stat().st_size + header_nbytes


def test_kill_9_while_fetching_loses_only_what_is_not_finished(hub: HubServer, llm: Path, tmp_path: Path) -> None:
    commit = hub.add_repo("me/llm", read_files(llm))
    output = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "me/llm@main", str(output), "--format", "fp8", "--quiet"]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    process = subprocess.Popen(command, env=environment)

    def kill() -> int:
        process.send_signal(signal.SIGKILL)
        return 100_000

    body = f"/cdn/.*{SHARD.format(4)}"
    hub.faults = [Fault(body, times=1), Fault(body, times=1, cut_after=kill)]  # the header's request passes
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    hub.commit("me/llm", {"moved": b"on"})  # main is elsewhere from now on
    hub.faults = []
    hub.forget()
    finished = set(Staging(output).read_records("root"))
    assert TOKEN not in "".join(path.read_text() for path in (tmp_path / "out.partial").rglob("*.json"))
    subprocess.run(command, env=environment, check=True)
    assert all(hub.sent[name] <= 2**17 for name in finished)
    convert(llm, tmp_path / "local", format="fp8")
    source = assert_same_but_for_the_source(output, tmp_path / "local")
    assert source["revision"] == commit
    assert not (tmp_path / "out.partial").exists()


def test_kill_9_in_the_middle_of_a_shard_costs_no_byte_that_was_written(
    hub: HubServer, llm: Path, tmp_path: Path
) -> None:
    hub.add_repo("me/llm", read_files(llm))
    small_parts = "import convert_ckpt.source.download as d; d._PART_NBYTES, d._REQUESTS_AT_ONCE = 200_000, 2; "
    command = [
        sys.executable,
        "-c",
        small_parts + COMMAND,
        "me/llm",
        str(tmp_path / "out"),
        "--format",
        "fp8",
        "--quiet",
    ]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.Popen(command, env=environment)
    partial = tmp_path / "out.partial" / "fetched" / "root" / SHARD.format(2)

    def kill_once_a_part_is_written(path: str) -> None:
        if path.endswith(SHARD.format(2)) and partial.exists() and partial.stat().st_size:
            process.send_signal(signal.SIGKILL)
            process.wait()

    hub.on_request = kill_once_a_part_is_written
    assert process.wait(60) == -signal.SIGKILL
    n_written = partial.stat().st_size
    assert 0 < n_written < (llm / SHARD.format(2)).stat().st_size
    hub.on_request = lambda _: None
    hub.forget()
    subprocess.run(command, env=environment, check=True)
    starts = [
        int(asked.range.partition("=")[2].partition("-")[0])
        for asked in hub.requests
        if asked.range and asked.path.endswith(SHARD.format(2))
    ]
    assert min(start for start in starts if start) == n_written
    assert starts.count(0) == 2  # the header, which takes two answers: where it lies, and it
    convert(llm, tmp_path / "local", format="fp8")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


def test_a_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add_repo("me/gated", read_files(llm), "gated")
    lines = Lines()
    convert_remote("me/gated", tmp_path / "out", format="mxfp4", progress=lines)
    assert all(request.has_token for request in hub.requests if "/resolve/" in request.path)
    assert not any(request.has_token for request in hub.requests if "/cdn/" in request.path)
    assert not any(TOKEN in line for line in lines.lines)
    assert not any(TOKEN.encode() in data for data in folder_bytes(tmp_path / "out").values())


def stop_at(shard: int, hub: HubServer, source: str, output: Path, **options: object) -> None:
    """Run until the hub forbids a shard's body."""
    bodies = iter([False, True])

    def forbid(path: str) -> None:
        if "/cdn/" in path and path.endswith(SHARD.format(shard)) and next(bodies, True):
            hub.faults = [Fault("/cdn/", status=403)]

    hub.on_request = forbid
    with pytest.raises(FetchError, match="403"):
        convert_remote(source, output, **options)
    hub.on_request = lambda _: None
    hub.faults = []


def test_a_branch_that_moves_is_pinned_for_the_run_and_its_resume(hub: HubServer, llm: Path, tmp_path: Path) -> None:
    first = hub.add_repo("me/llm", read_files(llm))
    stop_at(4, hub, "me/llm@main", tmp_path / "out", format="mxfp4")
    other = make_llm(tmp_path / "other", n_shards=2)
    second = hub.commit("me/llm", read_files(other))
    lines = Lines()
    convert_remote("me/llm@main", tmp_path / "out", format="mxfp4", progress=lines)
    assert any(f"has moved to {second}; this run goes on with {first}" in line for line in lines.lines)
    convert(llm, tmp_path / "local", format="mxfp4")
    source = assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert source["revision"] == first


def test_a_pinned_commit_that_is_gone_is_an_error_and_restart_takes_the_new_one(
    hub: HubServer, llm: Path, tmp_path: Path
) -> None:
    first = hub.add_repo("me/llm", read_files(llm))
    stop_at(4, hub, "me/llm", tmp_path / "out", format="mxfp4")
    other = make_llm(tmp_path / "other", n_shards=2)
    second = hub.commit("me/llm", read_files(other))
    del hub.repos["me/llm"].commits[first]
    with pytest.raises(FetchError, match=rf"has moved to {second}, and {first}.* is gone.*--restart"):
        convert_remote("me/llm", tmp_path / "out", format="mxfp4")
    convert_remote("me/llm", tmp_path / "out", format="mxfp4", restart=True)
    convert(other, tmp_path / "local", format="mxfp4")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


def test_kept_sources_lie_in_the_hubs_cache_and_are_not_fetched_again(
    hub: HubServer, llm: Path, tmp_path: Path
) -> None:
    commit = hub.add_repo("me/llm", read_files(llm))
    convert_remote("me/llm", tmp_path / "out", format="mxfp4", keep_source=True)
    snapshot = tmp_path / "hub-cache" / "models--me--llm" / "snapshots" / commit
    assert {path.name for path in snapshot.iterdir()} == {SHARD.format(i) for i in range(1, 6)}
    for keep_source in (True, False):  # what is there is used in any case, and stays
        hub.forget()
        output = tmp_path / f"again-{keep_source}"
        convert_remote("me/llm", output, format="mxfp4", keep_source=keep_source)
        assert set(hub.sent.values()) == {2**17}  # the headers
        assert folder_bytes(output) == folder_bytes(tmp_path / "out")
        assert len(list(snapshot.iterdir())) == 5
    blob = (snapshot / SHARD.format(2)).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(FetchError, match=r"00002-of-00005.*sha256.*lies in the Hub cache; remove it there"):
        convert_remote("me/llm", tmp_path / "damaged", format="mxfp4")


def test_components_of_a_pipeline_are_selected_and_a_single_file_beside_them_is_not_taken(
    hub: HubServer, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2", "vae"):
        save_checkpoint(pipeline / name, [{"blocks.0.proj.weight": random_weight(256, 256)}], {"_class_name": name})
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "README.md").write_text("---\nlicense: mit\n---\n")
    (pipeline / "all-in-one.safetensors").write_bytes((pipeline / "vae" / "model.safetensors").read_bytes())
    hub.add_repo("me/pipeline", read_files(pipeline))
    convert_remote("me/pipeline", tmp_path / "both", format="mxfp4", preset="generic")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"transformer", "transformer_2"}
    hub.forget()
    convert_remote("me/pipeline", tmp_path / "one", format="mxfp4", preset="generic", components=("transformer_2",))
    convert(pipeline / "transformer_2", tmp_path / "local", format="mxfp4")
    source = assert_same_but_for_the_source(tmp_path / "one" / "transformer_2", tmp_path / "local")
    assert source["name"] == "me/pipeline/transformer_2"
    asked = {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.requests} - {""}
    of_the_pipeline = {"README.md", "model_index.json"}
    assert asked == of_the_pipeline | {"transformer_2/config.json", "transformer_2/model.safetensors"}
    hub.forget()
    convert_remote("hf://me/pipeline/transformer_2", tmp_path / "folder", format="mxfp4", preset="generic")
    assert {request.path.rpartition("/")[2] for request in hub.requests} >= of_the_pipeline
    assert folder_bytes(tmp_path / "folder") == folder_bytes(tmp_path / "one" / "transformer_2")
    with pytest.raises(CheckpointError, match=r"--component vae: not in SOURCE.*transformer, transformer_2"):
        convert_remote("me/pipeline", tmp_path / "none", format="mxfp4", preset="generic", components=("vae",))


def test_one_file_of_a_repo_is_a_source(hub: HubServer, tmp_path: Path) -> None:
    local = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": random_weight(256, 256)}])
    hub.add_repo("me/files", {"a/model.safetensors": (local / "model.safetensors").read_bytes(), "b.txt": b""})
    convert_remote("hf://me/files/a/model.safetensors", tmp_path / "out", format="mxfp4", preset="generic")
    convert(local / "model.safetensors", tmp_path / "local", format="mxfp4")
    source = assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert source["name"] == "me/files/a/model.safetensors"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    from convert_ckpt.cli import main

    monkeypatch.setattr(sys, "argv", ["convert-ckpt", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
