"""YAML files that people write by hand, read as plain values with the line of each part for error messages.

A duplicate key is an error: YAML's own loaders silently take the last one.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.errors import MissingExtraError, StoryError
from model.validation import read_number

Place = tuple[str | int, ...]
"""Keys and indexes that lead to a part of the file."""


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A file's content, and where each part of it stands."""

    path: Path
    content: bytes
    value: Any
    lines: dict[Place, int]
    """Line (from 1) of each part; of an entry of a mapping, its key's."""

    def line(self, place: Place) -> int:
        """The line of a part; of one that is not there, the line of what it would stand in."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def at(self, place: Place) -> str:
        return f"{self.path}, line {self.line(place)}"

    def blame(self, error: ValidationError, place: Place) -> str:
        """What is first wrong with the part at `place`, in words: `FILE, line N: key is missing`."""
        fault = error.errors()[0]
        place = (*place, *fault["loc"])
        if fault["type"] == "value_error":
            name, _, message = str(fault["ctx"]["error"]).partition(": ")
            return f"{self.at((*place, name))}: {message}"
        name = str(fault["loc"][-1]) if fault["loc"] else ""
        known = {"missing": "is missing", "extra_forbidden": "is not known here", "model_type": "must be a mapping"}
        message = known.get(fault["type"], fault["msg"][:1].lower() + fault["msg"][1:])
        return f"{self.at(place)}: {f'{name} {message}'.strip()}"


def read_yaml(path: Path, error: type[StoryError], what: str) -> YamlFile:
    """Read a file of `what` ("thresholds").

    Raises:
        StoryError: of the kind `error`, with the file's name and the line: it cannot be read, or is not YAML.
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"reading {what}", "train") from missing
    try:
        content = path.read_bytes()
        root = yaml.compose(content.decode(), Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        value = None if root is None else _plain(root, (), lines, path, error)
    except OSError as fault:
        raise error(f"{path}: {(fault.strerror or 'cannot be read').lower()}") from None
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise error(f"{path}, line {line}: not UTF-8 text") from None
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        problem = getattr(fault, "problem", None) or str(fault)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise error(f"{path}{at}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as fault:  # a date that is none, an alias that holds itself
        raise error(f"{path}: not usable YAML: {fault}") from None
    return YamlFile(path, content, value, lines)


def _plain(node: Any, place: Place, lines: dict[Place, int], path: Path, error: type[StoryError]) -> Any:
    """A node of the document as plain values; `lines` learns where each of its parts stands."""
    import yaml

    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(inner, (*place, number), lines, path, error) for number, inner in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        # PyYAML follows YAML 1.1, in which 1e-3 is a text, 010 is 8 and 1:30 is 90.
        plain = node.style is None
        if plain and (number := read_number(node.value)) is not None:
            return number
        value = yaml.SafeLoader("").construct_object(node)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return node.value if plain and is_number and math.isfinite(value) else value
    values: dict[str, Any] = {}
    for key, inner in node.value:
        name = str(key.value)
        if name in values:
            raise error(f"{path}, line {key.start_mark.line + 1}: {name} is given twice")
        lines[(*place, name)] = key.start_mark.line + 1
        values[name] = _plain(inner, (*place, name), lines, path, error)
    return values
