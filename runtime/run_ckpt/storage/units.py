"""Sizes as people read and write them."""

from run_ckpt.contract.errors import UsageError

_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_nbytes(nbytes: int) -> str:
    """Return a size in decimal units, three digits: "12.3 GB"."""
    value, units = float(nbytes), list(_UNITS)
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def parse_nbytes(text: str) -> int:
    """Return the bytes of a size such as "4GB", "1.5 TB" or "300000". Raises UsageError."""
    number = text.strip().rstrip("".join(set("".join(_UNITS))) + " ")
    unit = text.strip()[len(number) :].strip() or "B"
    try:
        nbytes = float(number) * 1000 ** _UNITS.index(unit)
    except ValueError as error:
        raise UsageError(f"{text!r} is no size. Write 4GB, say.") from error
    if not 1 <= nbytes < 2**63:
        raise UsageError(f"{text!r} is no size. Write 4GB, say.")
    return int(nbytes)
