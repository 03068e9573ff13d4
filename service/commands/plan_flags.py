"""What flags of `headroom plan` say in words of their own, and what is wrong with them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ByteSize, TypeAdapter, ValidationError

from service.client.planning import Shape
from service.console import fail

# Of the fields that a question about capacity has, those whose flag has another name.
_FLAGS = {
    "num_heads": "--heads",
    "num_kv_heads": "--kv-heads",
    "target.concurrent": "--target-concurrency",
    "rotary_dim": "--head-dim",
}
_NUMBER_NAMES = re.compile(r"\b(num_heads|num_kv_heads|head_dim|max_num_seqs)(?==)")


@dataclass(frozen=True, slots=True)
class Written:
    """The flags whose words are not those of the question that is made of them."""

    memory: str | None
    kv_memory: str | None
    mix: str | None

    def num_bytes(self) -> int | None:
        """Bytes of the memory; ends the command if they are none."""
        text = self.kv_memory if self.memory is None else self.memory
        if text is None:
            return None
        try:
            return int(TypeAdapter(ByteSize).validate_python(text))
        except ValidationError:
            allowed = "a number of bytes, or with a unit, as 8GiB"
            fail(f"{self._flag('memory')} is {text!r}; allowed: {allowed}", code=2)

    def refuse(self, mistakes: Iterable[str]) -> NoReturn:
        """End the command; mistakes are `field is value; allowed: ...`, fields those of a
        question, and are shown as those of flags."""
        fail("\n".join(map(self._in_flags, mistakes)), code=2)

    def _in_flags(self, mistake: str) -> str:
        field, is_, rest = mistake.partition(" is ")
        if not is_ or " " in field:  # a sentence about something else
            return mistake
        value, semicolon, allowed = rest.partition("; ")
        if field == "memory":
            left = "" if value.isdecimal() else f", which leaves {value}"
            value = f"{self.kv_memory if self.memory is None else self.memory}{left}"
        allowed = _NUMBER_NAMES.sub(lambda match: _flag(match[1]), allowed)
        return f"{self._flag(field)}{is_}{value}{semicolon}{allowed}"

    def _flag(self, field: str) -> str:
        if field == "memory" and self.memory is None:
            return "--kv-memory"
        if self.mix is None and field in ("mix[0].prompt", "mix[0].output"):
            return _flag(field.removeprefix("mix[0]."))
        if field.startswith(("step_model.", "machine.")):
            return f"{field} of --fit"
        return _flag(field.removeprefix("heads."))


def _flag(field: str) -> str:
    return _FLAGS.get(field) or f"--{field.replace('target.', 'target-').replace('_', '-')}"


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def refuse_beside(beside: str, **values: Any) -> None:
    """End the command if any of these is given."""
    lines = [f"{_flag(name)} is given; allowed: nothing {beside}" for name in given(**values)]
    if lines:
        fail("\n".join(lines), code=2)


def read_shapes(text: str) -> list[Shape]:
    """Prompt, output and share of each part of a mix; ends the command if it is wrong."""
    shapes: list[Shape] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})/(\d{1,9})(?::(\d{1,9}))?\s*", part)
        if match is None:
            fail(f"--mix is {text!r}; allowed: PROMPT/OUTPUT:SHARE joined by commas", code=2)
        prompt, output, share = match.groups(default="1")
        shapes.append((int(prompt), int(output), int(share)))
    return shapes


def read_fit(path: Path) -> dict[str, Any]:
    """The step model of a sweep and, if it has them, the limits of its machine; ends the command
    if there is none."""
    allowed = "allowed: the sweep.json of a finished sweep"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"--fit is {path}, which cannot be read: {error.strerror}; {allowed}", code=2)
    except ValueError:
        fail(f"--fit is {path}, which is no JSON; {allowed}", code=2)
    if not isinstance(result, dict) or "step_model" not in result:
        fail(f"--fit is {path}, which has no step model; {allowed}", code=2)
    if result["step_model"] is None:
        reason = result.get("step_model_reason")
        fail(f"--fit is {path}, which has no step model: {reason}", code=2)
    return given(step_model=result["step_model"], machine=result.get("limits"))
