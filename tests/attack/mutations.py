"""Mutations that leave a file well-formed, so that what is behind its parser is reached."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from run_ckpt.storage.header import LENGTH_NBYTES

# In place of whatever a file says.
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2, 16, 31, 127, 2**31, 2**63, 10**40, 0.0, -0.5, 1e308, 1e-320, float("nan"), float("inf")),
    *("", ".", "..", "/", "a/b", "../x", "\0", "\x1b[2J", "a\nb", "\ud800", "é", "x" * 300, "weight", "*", "<b>"),
    *([], {}, [[]], [0], [-1], [2**62, 2**62], [1, 1, 1], [None], {"": ""}, {"a": {"b": []}}),
)

Mutate = Callable[[bytes, int], bytes]


def mutate_json(data: bytes, max_size: int, seed: int, mutate_bytes: Mutate) -> bytes:
    """Return a JSON document with some of its values or keys changed, or now and then bytes that may be none."""
    random = Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, max_size)
    if random.random() < 0.2:
        return mutate_bytes(data, max_size)
    for _ in range(random.randint(1, 3)):
        document = _change(document, random, mutate_bytes)
    try:
        changed = json.dumps(document).encode()
    except (ValueError, RecursionError):  # a number of too many digits for Python
        return data
    return changed if len(changed) <= max_size else data


def mutate_header(data: bytes, max_size: int, seed: int, mutate_bytes: Mutate) -> bytes:
    """Return a safetensors file whose header is mutated as JSON, mostly with the length that it then has."""
    length = int.from_bytes(data[:LENGTH_NBYTES], "little")
    text, rest = data[LENGTH_NBYTES : LENGTH_NBYTES + length], data[LENGTH_NBYTES + length :]
    random = Random(seed)
    if random.random() < 0.1:
        return mutate_bytes(data, max_size)
    if random.random() < 0.2:
        return data[: LENGTH_NBYTES + length] + mutate_bytes(rest, max(1, max_size - len(text) - LENGTH_NBYTES))
    text = mutate_json(text, max_size - LENGTH_NBYTES - len(rest), seed, mutate_bytes)
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text + rest


def _change(document: Any, random: Random, mutate_bytes: Mutate) -> Any:
    """Return the document with one value replaced, moved, repeated or removed, or one key renamed."""
    places = list(_places(document))
    if not places:
        return copy.deepcopy(random.choice(_ODD))
    holder, key = random.choice(places)
    value = holder[key]
    how = random.randrange(6)
    if how == 0:
        holder[key] = copy.deepcopy(random.choice(_ODD))
    elif how == 1:
        other, other_key = random.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif how == 2:
        del holder[key]
    elif how == 3 and isinstance(holder, dict):
        new = random.choice([*filter(lambda odd: isinstance(odd, str), _ODD), f"{key}x", *map(str, _keys(places))])
        holder[new] = holder.pop(key)
    elif how == 4 and isinstance(value, str):
        holder[key] = mutate_bytes(value.encode(errors="replace"), len(value) + 8).decode(errors="replace")
    elif type(value) is int:
        holder[key] = random.choice([value + 1, value - 1, -value, value * 2, value * 2**32, float(value), str(value)])
    else:
        holder[key] = [value, value]
    return document


def _places(value: Any) -> Any:
    """Yield (holder, key) of all values of a document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _keys(places: list[tuple[Any, Any]]) -> list[Any]:
    return [key for _, key in places[:50]]
