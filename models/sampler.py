"""Logits to token ids. Each row is treated on its own, so batch mates cannot change a result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.cpu import fused
from models.transfer import Received, send

NEGATIVE_INFINITY = float("-inf")
# In place of a token that could not be chosen.
NOTHING = -1
# Smaller ones are 0 in float32.
_MIN_TEMPERATURE = 1e-38
# Tokens whose probabilities are first looked at together.
_PART = 256
_NO_REPORTS: Mapping[int, tuple[Tensor, Tensor, Tensor]] = {}


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


class SampledToken(NamedTuple):
    """A chosen token, and what was asked about its probability.

    Attributes:
        token_id: None if nothing could be chosen: the logits were not finite, or no id was left.
    """

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen tokens, still on the device, and on their way to the host.

    Attributes:
        tokens: int64 `[rows]`, `NOTHING` where nothing could be chosen.
        asked: rows that report log-probabilities.
    """

    tokens: Tensor
    asked: tuple[int, ...]
    _arriving: Received

    @staticmethod
    def of(
        tokens: Tensor, reported: Mapping[int, tuple[Tensor, Tensor, Tensor]] = _NO_REPORTS
    ) -> "Choice":
        """Args:
        reported: of rows that ask: log-probability of the chosen token `[1]`, then those of the
            most likely tokens, and these tokens.
        """
        numbers = [number for row in reported.values() for number in row]
        return Choice(tokens, tuple(reported), Received(tokens, *numbers))

    def read(self) -> tuple[list[int], dict[int, SampledToken]]:
        """The token of each row, `NOTHING` where none could be chosen, and those of which more is
        reported, by their rows; as soon as they have arrived."""
        arrived, *numbers = self._arriving.wait()
        token_ids: list[int] = arrived.tolist()
        reported: dict[int, SampledToken] = {}
        for index, row in enumerate(self.asked):
            logprob, values, ids = numbers[3 * index : 3 * index + 3]
            if token_ids[row] != NOTHING:
                top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
                reported[row] = SampledToken(token_ids[row], logprob.item(), top)
        return token_ids, reported


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Choose one token per row of float32 logits `[rows, vocab]`, which may be overwritten."""
    token_ids, reported = choose(logits, rows).read()
    return [
        reported.get(row, SampledToken(None if token_id == NOTHING else token_id))
        for row, token_id in enumerate(token_ids)
    ]


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Choice:
    """`sample` without waiting for a device."""
    best, tokens = _largest(logits)
    usable = best.isfinite()
    logprobs = {
        index: logits[index].log_softmax(dim=-1)
        for index, row in enumerate(rows)
        if row.num_logprobs is not None
    }
    edited = [index for index, row in enumerate(rows) if row.edits_logits]
    if edited:
        for index in edited:
            _edit(logits[index], rows[index])
        where = _sent(edited, torch.int64, logits)
        highest, theirs = logits.index_select(0, where).max(dim=-1)
        tokens = tokens.index_copy(0, where, theirs)
        usable = usable.index_copy(0, where, usable.index_select(0, where) & highest.isfinite())
    random = [index for index, row in enumerate(rows) if row.temperature > 0]
    if random:
        random_rows = [rows[index] for index in random]
        where = _sent(random, torch.int64, logits)
        if len(random) < len(rows):
            logits = logits.index_select(0, where)
        drawn = _draw(_filtered_weights(logits, random_rows), random_rows)
        tokens = tokens.index_copy(0, where, drawn)
    tokens = tokens.where(usable, NOTHING)
    return Choice.of(
        tokens,
        {
            index: (
                row.gather(0, tokens[index, None].clamp(min=0)),
                *_most_likely(row, rows[index]),
            )
            for index, row in logprobs.items()
        },
    )


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row, `NOTHING` where the logits are not finite; int64
    `[rows]`."""
    best, tokens = _largest(logits)
    return tokens.masked_fill(best * 0 != 0, NOTHING)  # 0 times what is not finite is no number


def _most_likely(logprobs: Tensor, row: SamplingRow) -> tuple[Tensor, Tensor]:
    assert row.num_logprobs is not None, "only rows that ask"
    values, tokens = logprobs.topk(row.num_logprobs)
    return values, tokens


def _sent(numbers: Sequence[float], dtype: torch.dtype, to: Tensor) -> Tensor:
    return send(torch.tensor(numbers, dtype=dtype), to.device)


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
    temperatures = _sent(
        [max(row.temperature, _MIN_TEMPERATURE) for row in rows], torch.float32, logits
    )
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = logits.sub_(logits.max(dim=-1, keepdim=True)[0]).div_(temperatures[:, None])
    for index, row in enumerate(rows):
        if row.filters:
            _filter(scaled[index], row)
    return scaled.exp_()


def _edit(logits: Tensor, row: SamplingRow) -> None:
    if row.allowed_token_ids:
        allowed = _sent(row.allowed_token_ids, torch.int64, logits)
        kept = logits[allowed]
        logits.fill_(NEGATIVE_INFINITY)
        logits[allowed] = kept
    if row.suppressed_token_ids:
        suppressed = _sent(row.suppressed_token_ids, torch.int64, logits)
        logits.index_fill_(0, suppressed, NEGATIVE_INFINITY)
    if row.logit_bias:
        biased = _sent(tuple(row.logit_bias), torch.int64, logits)
        logits[biased] += _sent(tuple(row.logit_bias.values()), torch.float32, logits)
    if row.repetition_penalty != 1.0:
        seen = _sent(sorted({*row.prompt_token_ids, *row.output_token_ids}), torch.int64, logits)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / row.repetition_penalty, values * row.repetition_penalty
        )
    if row.presence_penalty or row.frequency_penalty:
        counted = Counter(row.output_token_ids)
        tokens = _sent(tuple(counted), torch.int64, logits)
        counts = _sent(tuple(counted.values()), torch.int64, logits)
        logits[tokens] -= row.presence_penalty + row.frequency_penalty * counts


def _filter(scaled: Tensor, row: SamplingRow) -> None:
    if 0 < row.top_k < scaled.shape[-1]:
        threshold = scaled.topk(row.top_k)[0][-1]
        scaled.masked_fill_(scaled < threshold, NEGATIVE_INFINITY)
    if row.top_p < 1.0:
        ascending, order = scaled.sort()
        # Drop the tail whose total probability is at most 1 - top_p; the last one always stays.
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - row.top_p
        tail[-1] = False
        scaled.scatter_(0, order, ascending.masked_fill_(tail, NEGATIVE_INFINITY))
    if row.min_p:
        probabilities = scaled.softmax(dim=-1)
        scaled.masked_fill_(probabilities < row.min_p * probabilities.max(), NEGATIVE_INFINITY)


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Invert each row's cumulative distribution at its uniform number; int64 `[rows]`. Of weights
    that are no numbers, any token.

    First the part of the vocabulary, by the sums of all parts, then the token in it: a running sum
    over a whole vocabulary in float64 would take longer than everything else here.
    """
    uniform = _sent([row.uniform for row in rows], torch.float64, weights)
    padded = pad(weights, (0, -weights.shape[1] % _PART))
    parts = padded.unflatten(-1, (-1, _PART))
    sums = parts.sum(dim=-1, dtype=torch.float64)
    part, left = _invert(sums, uniform * sums.sum(dim=-1))
    chosen = parts[torch.arange(len(rows), device=part.device), part].double()
    token, _ = _invert(chosen, left)
    return part * _PART + token


def _invert(shares: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where in each row of `[rows, n]` the running sum passes the target, which is never a share of
    0, and how much of the target is left there."""
    cumulative = shares.cumsum(dim=-1)
    most = cumulative[:, -1].nextafter(torch.zeros_like(targets))  # sums are rounded
    targets = targets.minimum(most)[:, None]
    found = torch.searchsorted(cumulative, targets, right=True)
    found = found.clamp_(max=shares.shape[-1] - 1)  # what is no number is behind the end
    before = (cumulative - shares).gather(1, found)
    return found.squeeze(-1), (targets - before).clamp(min=0).squeeze(-1)
