"""How long work tells its reader how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Told what happens; may be called from any thread."""

    def start(self, label: str, nbytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def start(self, label: str, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass
