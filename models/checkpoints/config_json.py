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

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(name, value, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max
        ):
            raise ConfigError(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(name, value, "true or false")
        return value

    def choice(self, name: str, allowed: dict[str, T], default: str) -> T:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(name, value, ", ".join(allowed))
        return allowed[value]

    def refuse_unless(self, name: str, *supported: object) -> None:
        """Refuse a field whose feature is not supported, naming it, unless it is off."""
        value = self._fields.get(name)
        if value is not None and value not in supported:
            raise ConfigError(
                name, value, " or ".join(repr(option) for option in (*supported, "absent"))
            )

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids or nothing."""
        value = self._fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ConfigError(name, value, "a token id or a list of token ids")
        return tuple(ids)

    def dtype(self) -> DTypeName:
        name = "dtype" if "dtype" in self else "torch_dtype"
        value = self._get(name, "float32")
        for known in get_args(DTypeName):
            if value == known:
                return known  # type: ignore[no-any-return]
        raise ConfigError(name, value, ", ".join(get_args(DTypeName)))

    def rope_theta(self, default: float) -> float:
        """Base of a plain rotary embedding, from either dialect.

        Raises:
            ConfigError: the rotary embedding is scaled, which is not supported.
        """
        parameters = self._fields.get("rope_parameters") or {}
        scaling = self._fields.get("rope_scaling") or {}
        for name, settings in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(settings, dict):
                raise ConfigError(name, settings, "an object")
            kind = settings.get("rope_type", settings.get("type", "default"))
            if kind != "default":
                raise ConfigError(f"{name}.rope_type", kind, "'default'")
        for name in ("partial_rotary_factor", "rotary_pct"):
            self.refuse_unless(name, 1, 1.0)
            if parameters.get(name) not in (None, 1, 1.0):
                raise ConfigError(f"rope_parameters.{name}", parameters[name], "1.0 or absent")
        source = ConfigFields(parameters) if "rope_theta" in parameters else self
        theta = source.number("rope_theta", default)
        if theta <= 0:
            raise ConfigError("rope_theta", theta, "more than 0")
        return theta

    def _get(self, name: str, default: object) -> object:
        value = self._fields.get(name)
        if value is None:
            if default is None:
                raise ConfigError(name, None, "a value; the field is missing")
            return default
        return value
