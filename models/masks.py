"""Who may look at whom, as boolean masks in which True means visible.

All are `[batch or 1, heads or 1, queries or 1, keys]`, what `attend` takes as `visible`, and
combine by `&`: `causal(t, t) & padding([3, 5], t)`. The queries are the last of the tokens whose
keys are given: behind a cached prefix query 0 stands at key `num_keys - num_queries`.
(torch's scaled_dot_product_attention has the same polarity, but its `is_causal` puts query 0 at
key 0; torch.nn.MultiheadAttention has the opposite polarity.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention_checks import check_window
from models.errors import ConfigError, MaskError
from models.scoring import Scoring


def causal(num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> Tensor:
    """A query sees its own key and those before it: `[1, 1, queries, keys]`.

    Raises:
        ConfigError: more queries than keys; the first would have no key of their own.
    """
    return Scoring(1.0, causal=True).visible(*_positions(num_queries, num_keys, device))


def sliding_window(
    num_queries: int,
    num_keys: int,
    window: int | Sequence[int | None],
    *,
    sink_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A query sees the keys nearer than `window`, on both sides: `[1, heads or 1, queries, keys]`.

    With `causal`, that is `window` keys, its own included.

    Args:
        window: one for all heads, or one for each; None is all.
        sink_tokens: the first so many keys are seen from everywhere (Xiao et al. 2023).

    Raises:
        ConfigError: a window or a number of sink tokens that cannot be; more queries than keys.
    """
    each = window if isinstance(window, int) else tuple(window)
    check_window(each, 1 if isinstance(each, int) else len(each))
    if sink_tokens < 0:
        raise ConfigError("sink_tokens", sink_tokens, "0 or more")
    scoring = Scoring(1.0, causal=False, window=each, sink_tokens=sink_tokens)
    return scoring.visible(*_positions(num_queries, num_keys, device))


def prefix_lm(
    num_queries: int,
    num_keys: int,
    prefix_lengths: int | Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Causal, but everybody sees the whole prefix: `[batch or 1, 1, queries, keys]`.

    Args:
        prefix_lengths: tokens of the prefix, one number or one for each batch entry.

    Raises:
        ConfigError: a prefix longer than the keys; more queries than keys.
    """
    lengths = (prefix_lengths,) if isinstance(prefix_lengths, int) else prefix_lengths
    in_prefix = _first(lengths, num_keys, "prefix_lengths", device)
    return causal(num_queries, num_keys, device=device) | in_prefix


def padding(
    lengths: Sequence[int], num_keys: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The first `lengths` keys of each batch entry are real: `[batch, 1, 1, keys]`.

    `.flip(-1)` is padding in front.

    Raises:
        ConfigError: a length beyond the keys.
    """
    return _first(lengths, num_keys, "lengths", device)


def documents(segment_ids: Tensor) -> Tensor:
    """A token sees its own document of those packed in one row: `[batch, 1, tokens, tokens]`.

    Args:
        segment_ids: integers `[batch, tokens]`, equal within a document.

    Raises:
        MaskError: not integers, or not two axes.
    """
    if segment_ids.dim() != 2 or segment_ids.is_floating_point():
        raise MaskError(
            "segment_ids",
            f"has shape {list(segment_ids.shape)} of {segment_ids.dtype}",
            "integers [batch, tokens]",
            "segment_ids[None]" if segment_ids.dim() == 1 else None,
        )
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def _positions(
    num_queries: int, num_keys: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Positions `[1, queries]` and `[1, keys]`."""
    if not 1 <= num_queries <= num_keys:
        raise ConfigError("num_queries", num_queries, f"1 to num_keys={num_keys}")
    keys = torch.arange(num_keys, device=device)[None]
    return keys[:, num_keys - num_queries :], keys


def _first(
    lengths: Sequence[int], num_keys: int, field: str, device: torch.device | str | None
) -> Tensor:
    """The first keys of each batch entry, `[batch, 1, 1, keys]`."""
    for index, length in enumerate(lengths):
        if not 0 <= length <= num_keys:
            raise ConfigError(f"{field}[{index}]", length, f"0 to num_keys={num_keys}")
    ends = torch.tensor(lengths, device=device)[:, None, None, None]
    return torch.arange(num_keys, device=device) < ends
