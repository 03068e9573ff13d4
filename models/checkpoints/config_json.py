"""Reading config.json: one typed accessor for both dialects that checkpoints are written in.

transformers 5 nests rotary settings under `rope_parameters` and says `dtype`; version 4, which
most published checkpoints use, says `rope_theta`, `rope_scaling` and `torch_dtype`.
"""

import json
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

from models.config import DTypeName
from models.errors import CheckpointError, ConfigError

# Layers, or heads of a layer; far above every model in use, and checked before any is made.
MAX_COUNT = 4096

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object")
    return content


class ConfigFields:
    """The fields of a config.json, each checked for its type when it is read."""

    def __init__(self, fields: dict[str, Any], prefix: str = "") -> None:
        self._fields = fields
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        self._read.add(name)
        return self._fields.get(name) is not None

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._fields

    def raw(self, name: str) -> Any:
        return self._fields[name]

    def changed_by(self, others: "ConfigFields", **defaults: Any) -> "ConfigFields":
        """These fields, where `others` do not say something else; `defaults` fill gaps."""
        merged = self._fields | others._fields
        gaps = {name: value for name, value in defaults.items() if merged.get(name) is None}
        return ConfigFields(merged | gaps, self._prefix)

    def refuse_others(self, *known: str) -> None:
        """Refuse every field but these."""
        for name in self._fields:
            if name not in known:
                raise ConfigError(self._prefix + name, self._fields[name], ", ".join(known))

    def refuse_unread(self, *names: str) -> None:
        """Refuse those of some fields that are there, not off, and that nobody has asked for."""
        for name in names:
            if name not in self._read:
                self.refuse_unless(name, False)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > sys.maxsize:
            raise ConfigError(self._prefix + name, value, "an integer")
        return value

    def count(self, name: str) -> int:
        """How many layers or heads: things that are made one by one."""
        value = self.integer(name)
        if not 1 <= value <= MAX_COUNT:
            raise ConfigError(self._prefix + name, value, f"1 to {MAX_COUNT}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max
        ):
            raise ConfigError(self._prefix + name, value, "a finite number")
        return float(value)

    def spelling(self, *names: str) -> str:
        """The first of several names of one field that is there, else the first."""
        return next((name for name in names if name in self), names[0])

    def integer_or_none(self, name: str, default: int | None) -> int | None:
        """An integer, where null is a value of its own, not the default: the feature is off."""
        if name not in self and (self.has(name) or default is None):
            return None
        return self.integer(name, default)

    def number_or_none(self, name: str, default: float | None) -> float | None:
        """A number, where null is a value of its own, not the default: the feature is off."""
        if name not in self and (self.has(name) or default is None):
            return None
        return self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(self._prefix + name, value, "true or false")
        return value

    def choice(self, name: str, allowed: dict[str, T], default: str) -> T:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(self._prefix + name, value, ", ".join(allowed))
        return allowed[value]

    def refuse_unless(self, name: str, *supported: object) -> None:
        """Refuse a field whose feature is not supported, naming it, unless it is off."""
        self._read.add(name)
        value = self._fields.get(name)
        if value is not None and value not in supported:
            raise ConfigError(
                self._prefix + name,
                value,
                " or ".join(repr(option) for option in (*supported, "absent")),
            )

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids or nothing."""
        value = self._fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ConfigError(self._prefix + name, value, "a token id or a list of token ids")
        return tuple(ids)

    def dtype(self) -> DTypeName:
        name = "dtype" if "dtype" in self else "torch_dtype"
        value = self._get(name, "float32")
        for known in get_args(DTypeName):
            if value == known:
                return known  # type: ignore[no-any-return]
        raise ConfigError(self._prefix + name, value, ", ".join(get_args(DTypeName)))

    def nested(self, name: str) -> "ConfigFields":
        """The fields of an object; none if it is absent."""
        value = self._fields.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(self._prefix + name, value, "an object")
        return ConfigFields(value, prefix=f"{self._prefix}{name}.")

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, None)
        if not isinstance(value, list):
            raise ConfigError(self._prefix + name, value, "a list of numbers")
        return tuple(ConfigFields({name: number}, self._prefix).number(name) for number in value)

    def strings(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None if it is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(self._prefix + name, value, "a list of strings")
        return tuple(value) or None

    def _get(self, name: str, default: object) -> object:
        self._read.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is None:
                raise ConfigError(self._prefix + name, None, "a value; the field is missing")
            return default
        return value
