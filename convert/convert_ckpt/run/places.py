"""Where the bytes of output tensors are stored in the files of a plan."""

from collections.abc import Iterator
from dataclasses import dataclass

from convert_ckpt.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an output tensor are stored: from byte ``offset`` of ``tensor`` in ``file`` on."""

    file: str
    tensor: str
    offset: int = 0


class Places:
    """Where the output tensors are in the files of ``plan``: each in its own place, some in one that repeats it too."""

    def __init__(self, plan: Plan):
        self._file_of = plan.file_of_tensors()
        self._repeated: dict[str, list[Place]] = {}
        for fused in plan.manifest.fused_scales.values():
            offset = 0
            for member in fused.members:
                spec = plan.manifest.layers[member].specs()[fused.role]
                place = Place(self._file_of[fused.spec.name], fused.spec.name, offset)
                self._repeated.setdefault(spec.name, []).append(place)
                offset += spec.nbytes

    def find(self, tensor: str) -> Iterator[Place]:
        """Yield the places of an output tensor."""
        if file := self._file_of.get(tensor):
            yield Place(file, tensor)
        yield from self._repeated.get(tensor, ())
