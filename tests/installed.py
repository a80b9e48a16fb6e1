"""Packages put on sys.path for one test, with the metadata that pip would have written."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from run_ckpt.backends import packages

_PROBES = (packages.why_no_aiter, packages.why_no_petit, packages.why_no_triton)

# Module -> its text. What AITER and Petit run on a GPU is a stand-in from the tests.
AITER_FILES = {
    "aiter/__init__.py": "from tests.aiter_stand_in import gemm_a4w4, gemm_a8w8_bpreshuffle\n",
    "aiter/ops/__init__.py": "",
    "aiter/utility/__init__.py": "",
    "aiter/utility/fp4_utils.py": "from tests.aiter_stand_in import dynamic_mxfp4_quant\n",
}
PETIT_FILES = {"petit_kernel/__init__.py": "from tests.petit_stand_in import *\n"}


class Installer:
    """Writes packages into a folder that is on sys.path."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, files: dict[str, str], distribution: str | None = None, version: str = "") -> None:
        for name, text in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if distribution is not None:
            info = self._folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        _forget()

    def aiter(self, version: str = "0.1.14") -> None:
        self(AITER_FILES, "amd-aiter", version)

    def petit(self, version: str = "0.0.3") -> None:
        self(PETIT_FILES, "petit-kernel", version)


@pytest.fixture(name="install")
def install_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    _forget()
    yield Installer(folder)
    _forget()


def _forget() -> None:
    for probe in _PROBES:
        probe.cache_clear()
    for name in list(sys.modules):
        if name.partition(".")[0] in ("aiter", "petit_kernel"):
            del sys.modules[name]
