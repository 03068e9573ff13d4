"""Logits to token ids. Each row is treated on its own, so batch mates cannot change a result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.cpu import fused

NEGATIVE_INFINITY = float("-inf")
# Smaller ones are 0 in float32.
_MIN_TEMPERATURE = 1e-38
# Tokens whose probabilities are first looked at together.
_PART = 256


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How the next token of one sequence is chosen.

    Logits are edited in this order: allowed ids, suppressed ids, bias, penalties; then
    temperature, top_k, top_p and min_p filter the distribution, as in transformers.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that reaches this probability.
        min_p: drop tokens less likely than `min_p` times the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur
            in prompt or output (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of
            the output.
        suppressed_token_ids: may not be chosen now.
        uniform: a number in [0, 1) that decides the draw.
        num_logprobs: report the chosen token's log-probability and this many most likely
            tokens; None reports nothing. Log-probabilities are the model's own, before any edit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    suppressed_token_ids: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    uniform: float = 0.0
    num_logprobs: int | None = None

    @property
    def edits_logits(self) -> bool:
        return bool(
            self.allowed_token_ids
            or self.suppressed_token_ids
            or self.logit_bias
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def filters(self) -> bool:
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)


class SampledToken(NamedTuple):  # made for every token, in half the time of a frozen dataclass
    """A chosen token, and what was asked about its probability.

    Attributes:
        token_id: None if nothing could be chosen: the logits were not finite, or no id was left.
    """

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Choose one token per row of float32 logits `[rows, vocab]`, which may be overwritten."""
    best, greedy = _largest(logits)
    broken = (~best.isfinite()).tolist()
    reported = _logprob_rows(logits, rows)
    edited = [index for index, row in enumerate(rows) if row.edits_logits]
    for index in edited:
        _edit(logits[index], rows[index])
    chosen: list[int] = greedy.tolist()
    if edited:
        highest, tokens = logits[edited].max(dim=-1)
        usable: list[bool] = highest.isfinite().tolist()
        for index, is_usable, token_id in zip(edited, usable, tokens.tolist(), strict=True):
            chosen[index] = token_id
            broken[index] = broken[index] or not is_usable
    random = [i for i, row in enumerate(rows) if row.temperature > 0 and not broken[i]]
    if random:
        random_rows = [rows[index] for index in random]
        if len(random) < len(rows):
            logits = logits.index_select(0, torch.tensor(random, device=logits.device))
        weights = _filtered_weights(logits, random_rows)
        for index, token_id in zip(random, _draw(weights, random_rows), strict=True):
            chosen[index] = token_id
    return [
        _result(index, None if broken[index] else chosen[index], rows[index], reported)
        for index in range(len(rows))
    ]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, NaN if one of them is, and its token."""
    if fused.can_fuse(logits):  # torch's own takes several times as long as the logits to read
        return fused.largest(logits)
    best, tokens = logits.max(dim=-1)
    return best, tokens


def filtered_probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Probabilities `[rows, vocab]` after temperature, top_k, top_p and min_p.

    Args:
        logits: float32 `[rows, vocab]`, which are overwritten: a vocabulary for each row is too
            much memory to ask for several times. Every row's temperature is above 0.
    """
    weights = _filtered_weights(logits, rows)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _filtered_weights(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Probabilities but for a factor of each row. A sum in float32 over a whole vocabulary may be
    taken in another order for one row than for several, so it has no part in a draw."""
    temperatures = torch.tensor(
        [max(row.temperature, _MIN_TEMPERATURE) for row in rows],
        dtype=torch.float32,
        device=logits.device,
    )
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = logits.sub_(logits.max(dim=-1, keepdim=True)[0]).div_(temperatures[:, None])
    for index, row in enumerate(rows):
        if row.filters:
            _filter(scaled[index], row)
    return scaled.exp_()


def _edit(logits: Tensor, row: SamplingRow) -> None:
    if row.allowed_token_ids:
        allowed = torch.tensor(row.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(NEGATIVE_INFINITY)
        logits[allowed] = kept
    if row.suppressed_token_ids:
        logits[torch.tensor(row.suppressed_token_ids, device=logits.device)] = NEGATIVE_INFINITY
    for token_id, bias in row.logit_bias.items():
        logits[token_id] += bias
    if row.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({*row.prompt_token_ids, *row.output_token_ids}),
            dtype=torch.int64,
            device=logits.device,
        )
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / row.repetition_penalty, values * row.repetition_penalty
        )
    if row.presence_penalty or row.frequency_penalty:
        output = torch.tensor(row.output_token_ids, dtype=torch.int64, device=logits.device)
        tokens, counts = output.unique(return_counts=True)
        logits[tokens] -= row.presence_penalty + row.frequency_penalty * counts


def _filter(scaled: Tensor, row: SamplingRow) -> None:
    if 0 < row.top_k < scaled.shape[-1]:
        threshold = scaled.topk(row.top_k)[0][-1]
        scaled[scaled < threshold] = NEGATIVE_INFINITY
    if row.top_p < 1.0:
        ascending, order = scaled.sort()
        # Drop the tail whose total probability is at most 1 - top_p; the last one always stays.
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - row.top_p
        tail[-1] = False
        scaled[order[tail]] = NEGATIVE_INFINITY
    if row.min_p:
        probabilities = scaled.softmax(dim=-1)
        scaled[probabilities < row.min_p * probabilities.max()] = NEGATIVE_INFINITY


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Invert each row's cumulative distribution at its uniform number.

    First the part of the vocabulary, by the sums of all parts, then the token in it: a running sum
    over a whole vocabulary in float64 would take longer than everything else here.
    """
    uniform = torch.tensor(
        [row.uniform for row in rows], dtype=torch.float64, device=weights.device
    )
    padded = pad(weights, (0, -weights.shape[1] % _PART))
    parts = padded.unflatten(-1, (-1, _PART))
    sums = parts.sum(dim=-1, dtype=torch.float64)
    part, left = _invert(sums, uniform * sums.sum(dim=-1))
    chosen = parts[torch.arange(len(rows), device=part.device), part].double()
    token, _ = _invert(chosen, left)
    return (part * _PART + token).tolist()


def _invert(shares: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where in each row of `[rows, n]` the running sum passes the target, which is never a share of
    0, and how much of the target is left there."""
    cumulative = shares.cumsum(dim=-1)
    most = cumulative[:, -1].nextafter(torch.zeros_like(targets))  # sums are rounded
    targets = targets.minimum(most)[:, None]
    found = torch.searchsorted(cumulative, targets, right=True)
    before = (cumulative - shares).gather(1, found)
    return found.squeeze(-1), (targets - before).clamp(min=0).squeeze(-1)


def _logprob_rows(
    logits: Tensor, rows: Sequence[SamplingRow]
) -> dict[int, tuple[Tensor, tuple[tuple[int, float], ...]]]:
    """Of rows that ask: log-probabilities `[vocab]` and the most likely tokens."""
    reported: dict[int, tuple[Tensor, tuple[tuple[int, float], ...]]] = {}
    for index, row in enumerate(rows):
        if row.num_logprobs is not None:
            logprobs = logits[index].log_softmax(dim=-1)
            values, tokens = logprobs.topk(row.num_logprobs)
            reported[index] = (
                logprobs,
                tuple(zip(tokens.tolist(), values.tolist(), strict=True)),
            )
    return reported


def _result(
    index: int,
    token_id: int | None,
    row: SamplingRow,
    reported: dict[int, tuple[Tensor, tuple[tuple[int, float], ...]]],
) -> SampledToken:
    if index not in reported or token_id is None:
        return SampledToken(token_id)
    logprobs, top = reported[index]
    return SampledToken(token_id, float(logprobs[token_id]), top)
