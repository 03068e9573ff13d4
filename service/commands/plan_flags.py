"""What flags of `headroom plan` say in words of their own."""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from service.client.planning import Shape
from service.console import fail


def read_shapes(text: str) -> list[Shape]:
    """Prompt, output and share of each part of a mix; ends the command if it is wrong."""
    shapes: list[Shape] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})/(\d{1,9})(?::(\d{1,9}))?\s*", part)
        if match is None:
            fail(f"mix is {text!r}; allowed: PROMPT/OUTPUT:SHARE joined by commas", code=2)
        prompt, output, share = match.groups(default="1")
        shapes.append((int(prompt), int(output), int(share)))
    return shapes


def read_num_bytes(text: str | None) -> int | None:
    """Bytes of a number, with or without a unit; ends the command if it is none."""
    if text is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        fail(f"memory is {text!r}; allowed: a number of bytes, or with a unit, as 8GiB", code=2)
