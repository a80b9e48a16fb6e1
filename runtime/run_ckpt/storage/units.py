"""Sizes as people read them."""


def format_nbytes(nbytes: int) -> str:
    """Return a size in decimal units, three digits: "12.3 GB"."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
