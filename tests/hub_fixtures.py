"""Fixtures around the Hub's stand-in, and checkpoints whose fused groups cross shards."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert_ckpt.options import Options
from convert_ckpt.pipeline import convert_checkpoint
from convert_ckpt.run.share import Share
from convert_ckpt.run_summary import RunSummary
from convert_ckpt.source.opened import Selection
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.progress import Progress, Silent
from run_ckpt.storage.reference import parse_reference
from tests.checkpoints import folder_bytes, random_weight, save_checkpoint
from tests.hub_server import HubServer, serve_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A stand-in that huggingface_hub takes for the Hub in this process; nobody is logged in."""
    from huggingface_hub import constants

    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("convert_ckpt.source.store._FIRST_WAIT_SECONDS", 0.005)
        monkeypatch.setattr("convert_ckpt.source.store._TRIES", 4)
        yield server


def make_llm(folder: Path, n_shards: int = 5) -> Path:
    """Write one block a shard, but v_proj one shard later: each fused group lies in two neighbours."""
    shards: list[dict[str, object]] = [{} for _ in range(n_shards)]
    for i in range(n_shards):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            j = min(i + (name == "v_proj"), n_shards - 1)
            shards[j][f"model.layers.{i}.self_attn.{name}.weight"] = random_weight(256, 512, seed=10 * i + len(name))
    save_checkpoint(folder, shards, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})  # type: ignore[arg-type]
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


class Lines(Silent):
    """Keeps what would be printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def convert_remote(
    source: str,
    output: Path,
    *,
    restart: bool = False,
    progress: Progress | None = None,
    components: tuple[str, ...] = (),
    keep_source: bool = False,
    share: Share | None = None,
    **options: object,
) -> RunSummary:
    """Convert with the options of the command."""
    return convert_checkpoint(
        parse_reference(source),
        output,
        Options(**options),
        n_workers=2,
        restart=restart,
        progress=progress or Silent(),
        selection=Selection(components, keep_source),
        share=share,
    )


def assert_same_but_for_the_source(output: Path, local: Path) -> dict[str, object]:
    """Check that two results differ in the manifest's source block alone; return that of ``output``.

    Its shards may have the SHA-256 that the Hub states, too.
    """
    ours, expected = folder_bytes(output), folder_bytes(local)
    manifest, expected_manifest = (json.loads(files.pop(MANIFEST_NAME)) for files in (ours, expected))
    for document in (manifest, expected_manifest):
        del document["blake3_of_the_rest"]  # the source is part of that
    source, expected_source = manifest.pop("source"), expected_manifest.pop("source")
    assert ours == expected
    assert manifest == expected_manifest
    assert expected_source["files"] == {
        name: {key: value for key, value in entry.items() if key != "sha256"} for name, entry in source["files"].items()
    }
    return source
