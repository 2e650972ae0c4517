"""Checks on JSON that anybody may have written: what a checkpoint's config says."""

from __future__ import annotations

import reprlib
import sys
from typing import Any

# Levels of lists and objects in a `quantization_config`; the report's rows are at the fourth.
DEPTH = 64
# Characters of a module path.
PATH = 1000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 6, 6, 6
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 60


def short(value: Any) -> str:
    """What a message shows of a value that may be as large as the file it came from."""
    return _SHORT.repr(value)


def is_nested_deeper(value: Any, depth: int = DEPTH) -> bool:
    """Whether JSON is nested deeper than what walks it may recurse; itself it does not recurse."""
    waiting = [(value, 0)]
    while waiting:
        found, level = waiting.pop()
        if not isinstance(found, (dict, list, tuple)):
            continue
        if level >= depth:
            return True
        waiting.extend((inner, level + 1) for inner in (found.values() if isinstance(found, dict) else found))
    return False


def is_integer(value: Any, least: int, largest: int) -> bool:
    """Whether a value is a whole number from `least` to `largest`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= largest


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; true and false are none."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def is_path(value: Any) -> bool:
    """Whether a value can be a module path."""
    return isinstance(value, str) and 0 < len(value) <= PATH


def plain_text(value: str) -> str:
    """A string that a terminal or a page shows as it is: without control characters, changes of direction and
    halves of characters."""
    return "".join(character if character.isprintable() else " " for character in value)
