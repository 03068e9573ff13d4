"""A YAML file and its mistakes, each with the line that it is on."""

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_MAX_BYTES = 1024 * 1024
_MAX_SHOWN = 80
_SHOULD = re.compile(r"^(Input|String|List) should (be |have )?")
Place = tuple[str | int, ...]
_Section = TypeVar("_Section", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Plain values only, each written where it stands: a few aliases of aliases can stand for more
    values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class SweepError(ValueError):
    """A sweep that cannot run; the message has one line per mistake."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a file says, where it says it, and what is wrong with it.

    Attributes:
        name: of the file, as the user gave it; empty for what flags say.
        values: plain dictionaries, lists and scalars.
        mistakes: (line, message), in the order they were found.
    """

    name: str
    values: Any
    node: yaml.Node
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, place: Place, message: str) -> None:
        """Remember a mistake; the message goes on after the name of its place."""
        self.mistakes.append((self.line_of(place), f"{_dotted(place)} {message}".strip()))

    def line_of(self, place: Place) -> int:
        """The line of a place, or of what encloses it."""
        node, line = self.node, self.node.start_mark.line
        for part in place:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == part), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return line + 1

    def section(self, model: type[_Section], values: object, place: Place) -> _Section | None:
        """A part of the file; None, and mistakes remembered, if it is not as it must be."""
        try:
            return model.model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                inside = (*place, *_written(values, problem["loc"]))
                if problem["type"] == "extra_forbidden":
                    known = ", ".join(model.model_fields)
                    self.refuse(inside, f"is not known; allowed: {known}")
                elif problem["type"] == "model_type":
                    fields = ", ".join(model.model_fields)
                    self.refuse(inside, f"is {_shown(problem['input'])}; allowed: fields {fields}")
                elif problem["type"] == "missing":
                    self.refuse(inside, "is missing")
                else:
                    allowed = _allowed(problem)
                    self.refuse(inside, f"is {_shown(problem['input'])}; allowed: {allowed}")
            return None

    def raise_if_mistaken(self) -> None:
        """Raise SweepError with all mistakes, in the order of their lines."""
        if self.mistakes:
            unique = dict.fromkeys(sorted(self.mistakes))
            where = f"{self.name}:{{}}: " if self.name else ""
            raise SweepError("\n".join(where.format(line) + text for line, text in unique))


def read_source(path: Path) -> Source:
    """Read a YAML file without running anything that it names.

    Raises:
        SweepError: it is missing, too large, no YAML, no mapping, has aliases, or gives a key
            twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise SweepError(f"{path} has more than {_MAX_BYTES} bytes")
    return parse_source(data, str(path))


def parse_source(data: str | bytes, name: str) -> Source:
    """As `read_source`; without a name, mistakes have no line.

    Raises:
        SweepError: see `read_source`.
    """
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise SweepError(f"{name}:{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # characters, numbers, depth
        raise SweepError(f"{name} cannot be read: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise SweepError(f"{name}:1: a sweep is a mapping with configurations, loads and engine")
    source = Source(name, values, node)
    source.mistakes.extend(_repeated_keys(node))
    source.raise_if_mistaken()
    return source


def _repeated_keys(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """YAML readers keep the last of two equal keys, which hides a mistake."""
    seen: set[Hashable] = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(node, yaml.MappingNode):
            key, child = child
            if key.value in seen:
                yield key.start_mark.line + 1, f"{key.value} is given twice"
            if isinstance(key.value, Hashable):
                seen.add(key.value)
        yield from _repeated_keys(child)


def _allowed(problem: ErrorDetails) -> str:
    match problem["type"]:
        case "too_short":
            return f"entries, at least {problem['ctx']['min_length']}"
        case "too_long":
            return f"entries, at most {problem['ctx']['max_length']}"
        case _:
            return _SHOULD.sub("", problem["msg"])


def _written(values: object, place: Sequence[str | int]) -> Iterator[str | int]:
    """The parts of a place that are in the file: one value may stand where a list could be."""
    for part in place:
        if isinstance(part, int) and not isinstance(values, list):
            continue
        yield part
        try:
            values = values[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            values = None


def _shown(value: object) -> str:
    text = _in_yaml(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _in_yaml(value: object) -> str:
    match value:
        case None | bool():
            return json.dumps(value)
        case list():
            return f"[{', '.join(map(_in_yaml, value))}]"
        case dict():
            entries = (f"{_in_yaml(key)}: {_in_yaml(entry)}" for key, entry in value.items())
            return f"{{{', '.join(entries)}}}"
        case date():
            return str(value)
        case _:
            return repr(value)


def _dotted(place: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")
