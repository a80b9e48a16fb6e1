"""What is asked for as engine: this machine, or a Ray cluster."""

from dataclasses import dataclass

# What --engine may say.
LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)


@dataclass(frozen=True)
class Cluster:
    """The ``address`` of a Ray cluster, None for RAY_ADDRESS or a cluster on this machine alone.

    At most ``n_tasks`` run at once, None for as many as fit; each has ``n_threads``, None for up to four.
    """

    address: str | None = None
    n_tasks: int | None = None
    n_threads: int | None = None
