"""What comes right before a product, in the words of the operations that do both at once."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Before:
    """What is done to each row right before it is multiplied, in the same operation: one of both.

    Attributes:
        norm: weight `[inputs]` of an RMS norm, of the type of the rows.
        swiglu: rows are twice as long; silu of the first half times the second is multiplied.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    swiglu: bool = False


NOTHING = Before()
