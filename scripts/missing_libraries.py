"""Stand-ins for libraries that servers import and that do not load beside a CPU build of torch."""

import importlib.machinery
import sys
import types

import torch


def fill_in_torchvision() -> None:
    """Declare the operators whose library does not load beside a CPU build of torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(library)


_KEPT_ALIVE: list[object] = []


def fill_in_torchaudio() -> None:
    """Put an empty torchaudio in place: it is imported, and never used to load a transformer."""

    class Stub(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return Stub(f"{self.__name__}.{name}")

    stub = Stub("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None, is_package=True)
    sys.modules["torchaudio"] = stub
