"""Shares of the work: which output files one of several runs makes, as a pure function of the plan."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from re import fullmatch

from convert_ckpt.plan.plan import ComponentPlan, Plan
from run_ckpt.contract.errors import UsageError


@dataclass(frozen=True)
class Share:
    """Share ``number`` of ``count``, counted from 1; number 0 is none of the work but to publish what is done."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


NOTHING = Share(0, 1)


def parse_share(text: str) -> Share:
    """Return the share that "3/16" stands for. Raises UsageError."""
    match = fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {text}: is no part. Give its number and how many there are, from 1/16 to 16/16.")
    return Share(int(match[1]), int(match[2]))


def files_of_share(plans: list[ComponentPlan], share: Share | None) -> dict[str, set[str]]:
    """Return component -> the files that a share makes; None is all of them.

    A share is a row of neighbours: a file belongs to the share in which its middle falls when the source's bytes are
    cut into equal shares. Layers that have a scale in common are mostly neighbours, so that few are scanned twice.
    """
    sizes = [(planned.name, *size) for planned in plans for size in _sizes(planned.plan)]
    total = sum(nbytes for _, _, nbytes in sizes)
    names: dict[str, set[str]] = {planned.name: set() for planned in plans}
    before = 0
    for component, file, nbytes in sizes:
        if share is None or (2 * before + nbytes) * share.count // (2 * total) == share.number - 1:
            names[component].add(file)
        before += nbytes
    return names


def _sizes(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield each file and the bytes that it is made of; at least 1, as a shard without bytes is some work too."""
    nbytes: Counter[str] = Counter()
    for tensor in plan.tensors:
        nbytes[tensor.shard] += tensor.spec.nbytes
    for file in plan.files:
        yield file.name, 1 + sum(nbytes[shard] for shard in file.source_shards)
