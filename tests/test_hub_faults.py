"""What a Hub can answer instead of a checkpoint: one clear line, exit 1, nothing half-done, and it goes on after."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from convert_ckpt.source.store import Retry
from run_ckpt.contract.errors import FetchError, TransientError
from tests.checkpoints import convert
from tests.hub_fixtures import assert_same_but_for_the_source, convert_remote, hub, make_llm
from tests.hub_server import TOKEN, Fault, HubServer, read_files
from tests.test_hub_source import SHARD, run_command

__all__ = ["hub"]


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm")


def lie_about_index(files: dict[str, bytes], edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    edit(index["weight_map"])
    files["model.safetensors.index.json"] = json.dumps(index).encode()


Q = "model.layers.0.self_attn.q_proj.weight"
BEFORE: dict[str, tuple[str, Callable[[HubServer, dict[str, bytes]], object], str]] = {
    "no repo": ("me/nothing", lambda hub, _: None, "me/nothing: no such path here, and no such repo .*hf auth login"),
    "private": ("me/private", lambda hub, _: None, "no such repo on the Hub, or a private one"),
    "gated": ("me/gated", lambda hub, _: None, "gated. Accept its terms on http.*/me/gated.*hf auth login"),
    "no revision": ("me/llm@v9", lambda hub, _: None, "me/llm: has no revision v9"),
    "no folder": ("hf://me/llm/nowhere", lambda hub, _: None, "no nowhere in this repo"),
    "401": ("me/llm", lambda hub, _: hub.faults.append(Fault("resolve", status=401)), r"token \(401\).*hf auth login"),
    "403": ("me/llm", lambda hub, _: hub.faults.append(Fault("resolve", status=403)), r"may not read it \(403\)"),
    "404": (
        "me/llm",
        lambda hub, _: hub.faults.append(Fault("resolve.*1-of", status=404, headers={"X-Error-Code": "EntryNotFound"})),
        r"model-00001-of-00005.safetensors: listed in the repo, but not there \(404\)",
    ),
    "429": ("me/llm", lambda hub, _: hub.faults.append(Fault("/api/models", status=429)), r"too many requests \(429\)"),
    "503": ("me/llm", lambda hub, _: hub.faults.append(Fault("/api/models", status=503)), r"not in order \(503\)"),
    "502 of a file": ("me/llm", lambda hub, _: hub.faults.append(Fault("config", status=502)), r"not in order \(502\)"),
    "418": ("me/llm", lambda hub, _: hub.faults.append(Fault("/api/models", status=418)), "answered 418"),
    "a login page": (
        "me/llm",
        lambda hub, _: hub.faults.append(Fault("/api/models", status=200, body=b"<html>Welcome to the hotel</html>")),
        "does not answer as the Hub does",
    ),
    "another API": (
        "me/llm",
        lambda hub, _: hub.faults.append(Fault("/api/models", status=200, body=b'{"error": "no such route"}')),
        "does not answer as the Hub does",
    ),
    "a repo without a commit": (
        "me/llm",
        lambda hub, _: hub.faults.append(Fault("/api/models", status=200, body=b'{"id": "me/llm", "siblings": []}')),
        "does not answer as the Hub does",
    ),
    "unreachable": ("me/llm", lambda hub, _: hub.stop(), "no full answer from .*refused"),
    "wrong size in the listing": (
        "me/llm",
        lambda hub, _: hub.lies.update({SHARD.format(2): {"size": 10_000_000}}),
        "bytes, but the repo lists 10,000,000",
    ),
    **{
        f"a listing of {lie}": (
            "me/llm",
            lambda hub, _, name=name, lie=lie: hub.lies.update({name: lie}),
            rf"{name}: listed with .* bytes and the checksum .*, which the Hub does not do",
        )
        for name, lie in (
            *(("config.json", {"size": size}) for size in ("2", -5, 2**63, 1e300)),
            ("config.json", {"blobId": 7}),
            (SHARD.format(1), {"lfs": {"sha256": 5, "size": 1, "pointerSize": 1}}),
        )
    },
    "a small file of a terabyte": (
        "me/llm",
        lambda hub, _: hub.lies.update({"config.json": {"size": 2**40}}),
        "config.json: listed with 1,099,511,627,776 bytes, more than any such file has",
    ),
    "damaged config": (
        "me/llm",
        lambda hub, _: hub.faults.append(Fault("config.json", edit=lambda data: data.replace(b"l", b"x"))),
        "config.json: the git-sha1 of what came",
    ),
    "index names another shard": (
        "me/llm",
        lambda _, files: lie_about_index(files, lambda index: index.update({Q: SHARD.format(3)})),
        f"{Q}: the index says {SHARD.format(3)}, but it is in {SHARD.format(1)}",
    ),
    "index names a file that is not there": (
        "me/llm",
        lambda _, files: files.pop(SHARD.format(3)),
        f"{SHARD.format(3)}: missing",
    ),
    "index leads out of the folder": (
        "me/llm",
        lambda _, files: lie_about_index(files, lambda index: index.update({Q: "../../x.safetensors"})),
        "not a file of this folder",
    ),
    "a shard cut short in the repo": (
        "me/llm",
        lambda _, files: files.update({SHARD.format(4): files[SHARD.format(4)][:-1000]}),
        f"{SHARD.format(4)}: truncated",
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_can_be_seen_before_is_one_line_and_leaves_nothing(
    hub: HubServer,
    llm: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, spoil, message = BEFORE[case]
    for repo, access in (("me/llm", "public"), ("me/gated", "gated"), ("me/private", "private")):
        files = read_files(llm)
        spoil(hub, files)
        hub.add_repo(repo, files, access)
    assert run_command(monkeypatch, source, str(tmp_path / "out"), "--format", "mxfp4") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)
    n_found = re.search(r"\((\d+) found\):", said)
    assert len(said.splitlines()) == 1 + (int(n_found[1]) if n_found else 0)
    assert sum(hub.sent.values()) <= 5 * 2**17
    assert {path.name for path in tmp_path.iterdir()} == {"llm"}


DURING: dict[str, tuple[Callable[[HubServer], object], str]] = {
    "wrong checksum": (
        lambda hub: hub.faults.append(Fault(f"/cdn/.*{SHARD.format(3)}", edit=lambda data: data[:-1] + b"x")),
        r"model-00003.*: the sha256 of what came is .*, the store says",
    ),
    "checksum that the listing lies about": (
        lambda hub: hub.lies.update({SHARD.format(3): {"lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 1}}}),
        "the store says 000000000000",
    ),
    "403": (lambda hub: hub.faults.append(Fault(f"/cdn/.*{SHARD.format(3)}", status=403)), r"may not read it \(403\)"),
    "416": (lambda hub: hub.faults.append(Fault(f"/cdn/.*{SHARD.format(3)}", status=416)), r"shorter on the Hub.*416"),
    "500": (lambda hub: hub.faults.append(Fault(f"/cdn/.*{SHARD.format(3)}", status=500)), r"\(500\). Gave up"),
    "no byte comes": (
        lambda hub: hub.faults.append(Fault(f"/cdn/.*{SHARD.format(3)}", cut_after=lambda: 0)),
        "no full answer from.*Gave up",
    ),
    "another header than before": (
        lambda hub: hub.faults.append(
            Fault(f"/cdn/.*{SHARD.format(3)}", edit=lambda data: data.replace(b"q_proj", b"x_proj"))
        ),
        "the sha256 of what came|is not the file whose header was read",
    ),
}


@pytest.mark.parametrize("case", DURING)
def test_what_is_seen_later_is_one_line_and_the_same_command_goes_on(
    hub: HubServer,
    llm: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, message = DURING[case]
    hub.add_repo("me/llm", read_files(llm))
    headers = {SHARD.format(i) for i in range(1, 6)}

    def spoil_bodies(path: str) -> None:
        name = path.rpartition("/")[2]
        if "/cdn/" in path and name in headers:
            headers.discard(name)
        elif "/cdn/" in path and not hub.faults:
            spoil(hub)

    if "lies" in case:
        spoil(hub)
    else:
        hub.on_request = spoil_bodies
    output = tmp_path / "out"
    assert run_command(monkeypatch, "me/llm", str(output), "--format", "fp8", "--quiet") == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    with pytest.raises(FetchError, match=message):
        raise FetchError(said)
    assert not output.exists()
    hub.on_request, hub.faults, hub.lies = (lambda _: None), [], {}
    if "lies" not in case:  # then the listing, and so the source, is another one
        convert_remote("me/llm", output, format="fp8")
        convert(llm, tmp_path / "local", format="fp8")
        assert_same_but_for_the_source(output, tmp_path / "local")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_tried_again(hub: HubServer, llm: Path, tmp_path: Path, status: int) -> None:
    hub.add_repo("me/llm", read_files(llm))
    hub.faults = [
        Fault(pattern, 1, status, {"Retry-After": "0"}) for pattern in ("/api/models", "config.json", "/cdn/")
    ]
    convert_remote("me/llm", tmp_path / "out", format="mxfp4")
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_host_that_ignores_ranges_serves_small_files_and_is_named_for_large_ones(
    hub: HubServer, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("me/llm", read_files(llm))
    hub.ignores_ranges = True
    convert_remote("me/llm", tmp_path / "small", format="mxfp4")
    convert(llm, tmp_path / "local", format="mxfp4")
    assert_same_but_for_the_source(tmp_path / "small", tmp_path / "local")
    monkeypatch.setattr("convert_ckpt.source.download._PART_NBYTES", 400_000)
    with pytest.raises(FetchError, match=r"model-00001.*does not answer range requests"):
        convert_remote("me/llm", tmp_path / "large", format="mxfp4")


def test_an_invalid_token_is_named_without_being_shown(
    hub: HubServer,
    llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add_repo("me/llm", read_files(llm))
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.faults = [Fault("/api/models", status=401, headers=headers)]
    assert run_command(monkeypatch, "me/llm", str(tmp_path / "out"), "--format", "mxfp4") == 1
    said = capsys.readouterr().err
    assert "does not accept your token" in said
    assert TOKEN not in said


def test_offline_mode_is_named(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
        convert_remote("me/llm", tmp_path / "out", format="mxfp4")


@pytest.mark.parametrize("is_offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_a_misspelt_path_does_not_blame_the_network_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    hub.stop()
    why = "HF_HUB_OFFLINE is set" if is_offline else "no full answer from"
    with pytest.raises(FetchError, match=f"^models/flux: no such path here, and {why}"):
        convert_remote("models/flux", tmp_path / "out", format="mxfp4")
    with pytest.raises(FetchError, match=f"^models/flux: {why}"):
        convert_remote("hf://models/flux", tmp_path / "out", format="mxfp4")


class Clock(threading.Event):
    """Notes how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0)
        return False


def fail_times(n_times: int, error: TransientError) -> Callable[[], str]:
    """Return a function that fails so many times, and then returns."""
    errors = iter([error] * n_times)

    def answer() -> str:
        for next_error in errors:
            raise next_error
        return "answer"

    return answer


def test_waits_double_and_start_anew_after_an_answer() -> None:
    clock, lines = Clock(), []  # type: ignore[var-annotated]
    retry = Retry(lines.append, clock)
    assert retry(fail_times(5, TransientError("no."))) == "answer"
    assert retry(fail_times(1, TransientError("no."))) == "answer"
    assert clock.waits == [0.5, 1, 2, 4, 8, 0.5]
    assert lines == ["no. Trying again in 8 s."]


def test_the_store_says_how_long_to_wait_but_not_for_hours() -> None:
    clock = Clock()
    retry = Retry(lambda _: None, clock)
    retry(fail_times(1, TransientError("busy.", 120)))
    assert clock.waits == [120]
    with pytest.raises(FetchError, match="Gave up"):
        retry(fail_times(1, TransientError("busy.", 3600)))


def test_patience_ends_and_sooner_before_the_first_answer() -> None:
    for first_contact, n_waits in ((True, 2), (False, 8)):
        clock = Clock()
        with pytest.raises(FetchError, match=f"after {n_waits + 1} tries"):
            Retry(lambda _: None, clock, first_contact)(fail_times(10, TransientError("no.")))
        assert len(clock.waits) == n_waits


def test_a_run_that_is_stopped_waits_for_no_store() -> None:
    retry = Retry(lambda _: None)
    retry.stopped.set()
    with pytest.raises(FetchError, match="the run was stopped"):
        retry(fail_times(1, TransientError("no.", 500)))
