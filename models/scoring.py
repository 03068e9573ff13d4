"""Everything between query · key and the softmax, in one description that all kernels read."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.config import MAX_WINDOW
from models.positions import Alibi


@dataclass(frozen=True, slots=True)
class HeadNumbers:
    """What differs between query heads, as kernels want it: one number for each.

    Attributes:
        windows: `MAX_WINDOW` where all keys are seen.
        slopes: of a bias that grows with the position of a key; empty if there is none.
    """

    scales: list[float]
    windows: list[int]
    slopes: list[float]
    _tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same as tensors `[heads]` (float32, int32, float32), copied once."""
        if device not in self._tensors:
            self._tensors[device] = (
                torch.tensor(self.scales, dtype=torch.float32, device=device),
                torch.tensor(self.windows, dtype=torch.int32, device=device),
                torch.tensor(self.slopes, dtype=torch.float32, device=device),
            )
        return self._tensors[device]


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """How the query heads of a layer turn scores into weights.

    In this order: scale, soft-cap, position bias, mask, softmax with the sink logit.

    Attributes:
        scale: factor on query · key; one number, or `[heads]`.
        causal: a query sees no later key.
        window: a query sees keys nearer than this, its own included; one number, or one for each
            head; None is all.
        sink_tokens: keys at positions below this are seen in spite of the window.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        alibi: linear position bias.
        sinks: `[heads]` logits that take part in the softmax and contribute no value.
    """

    scale: float | Tensor
    causal: bool = True
    window: int | tuple[int | None, ...] | None = None
    sink_tokens: int = 0
    softcap: float | None = None
    alibi: Alibi | None = None
    sinks: Tensor | None = None
    _numbers: dict[int, HeadNumbers] = field(default_factory=dict, init=False)

    def numbers(self, num_heads: int) -> HeadNumbers:
        """Scale, window and slope of each of so many heads; computed once."""
        if num_heads not in self._numbers:
            window, scale = self.window, self.scale
            windows = window if isinstance(window, tuple) else [window] * num_heads
            scales = scale.tolist() if isinstance(scale, Tensor) else [scale] * num_heads
            slopes: list[float] = []
            if self.alibi is not None:
                factors = scales if self.alibi.before_scale else [1.0] * num_heads
                slopes = [a * b for a, b in zip(self.alibi.slopes, factors, strict=True)]
            self._numbers[num_heads] = HeadNumbers(
                scales, [MAX_WINDOW if size is None else size for size in windows], slopes
            )
        return self._numbers[num_heads]

    def is_plain(self, length: int) -> bool:
        """Whether nothing but causality decides what is seen within so many positions."""
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        return (
            self.causal
            and self.alibi is None
            and all(window is None or window >= length for window in windows)
        )

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Which query may look at which key.

        Args:
            query_positions: int64 `[batch, queries]`.
            key_positions: int64 `[batch, keys]`; negative ones are padding that nobody sees.

        Returns:
            bool `[batch, heads or 1, queries, keys]`.
        """
        queries = query_positions[:, None, :, None]
        keys = key_positions[:, None, None, :]
        seen = keys >= 0
        if self.causal:
            seen = seen & (keys <= queries)
        if self.window is not None:
            near = (queries - keys).abs() < self._window_tensor(keys.device)
            seen = seen & (near | (keys < self.sink_tokens))
        return seen.expand(-1, -1, query_positions.shape[-1], -1)

    def bias(self, key_positions: Tensor) -> Tensor | None:
        """Position bias in float32 (added to scaled scores), `[batch, heads, 1, keys]`."""
        if self.alibi is None:
            return None
        slopes = torch.tensor(self.alibi.slopes, device=key_positions.device)
        keys = key_positions[:, None, :]
        if self.alibi.bfloat16:
            bias = (slopes.bfloat16()[:, None] * keys.bfloat16()).float()
        else:
            bias = slopes[:, None] * keys
        if self.alibi.before_scale:
            bias = bias * self.head_scale(bias, dims=1)
        return bias[:, :, None]

    def head_scale(self, like: Tensor, dims: int) -> float | Tensor:
        """The scale as a factor on a tensor whose head axis has so many axes behind it."""
        if isinstance(self.scale, float):
            return self.scale
        return self.scale.to(like).view(-1, *[1] * dims)

    def of_heads(self, heads: list[int]) -> "Scoring":
        """The description of some of the heads."""

        def pick(value: Tensor) -> Tensor:
            return value[heads]

        return Scoring(
            scale=self.scale if isinstance(self.scale, float) else pick(self.scale),
            causal=self.causal,
            window=tuple(self.window[h] for h in heads)
            if isinstance(self.window, tuple)
            else self.window,
            sink_tokens=self.sink_tokens,
            softcap=self.softcap,
            alibi=None
            if self.alibi is None
            else Alibi(
                tuple(self.alibi.slopes[h] for h in heads),
                self.alibi.before_scale,
                self.alibi.bfloat16,
            ),
            sinks=None if self.sinks is None else pick(self.sinks),
        )

    def _window_tensor(self, device: torch.device) -> Tensor | int:
        if not isinstance(self.window, tuple):
            assert self.window is not None, "only a window is asked for"
            return self.window
        unlimited = torch.iinfo(torch.int64).max
        sizes = [unlimited if window is None else window for window in self.window]
        return torch.tensor(sizes, device=device)[:, None, None]
