"""A step plan to tensors, through the model, to sampled tokens."""

import itertools
import math
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata
from models.cpu.linear import WeightDType
from models.kv_cache import KVCache
from models.sampler import SampledToken, SamplingRow, sample
from models.transformer import Transformer
from service.engine.plan import ScheduledSequence, StepPlan, StepResult
from service.engine.sequence import Pooling, Sequence, TokenLogprobs

# Rows of logits that exist at once while scoring: bounds memory for large vocabularies.
_SCORING_ROWS = 128
# Most rows of many a load: made once, since a row has more fields than it takes time to look at.
_GREEDY = SamplingRow(temperature=0.0)


class ModelRunner:
    """Owns the model and its KV cache; the only part of the engine that touches tensors."""

    def __init__(
        self,
        model: Transformer,
        kv_cache: KVCache,
        *,
        eos_token_ids: frozenset[int],
        weight_dtype: WeightDType = "auto",
        batch_invariant: bool = False,
    ) -> None:
        model.pack_weights(weight_dtype, batch_invariant=batch_invariant)
        self.model = model
        self.kv_cache = kv_cache
        self._eos_token_ids = tuple(sorted(eos_token_ids))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[StepResult]:
        """Compute the planned tokens; one result per scheduled sequence, in order."""
        if not plan.scheduled:
            return []
        input_ids, positions, metadata = self._build_batch(plan.scheduled)
        lengths = self._rope_lengths(plan.scheduled, positions)
        hidden = self.model(input_ids, positions, self.kv_cache, metadata, lengths)
        failed_rows = self._clear_failed(hidden, metadata)
        results = [StepResult()] * len(plan.scheduled)
        last_rows: list[int] = []
        sampled: list[int] = []
        start = 0
        for index, item in enumerate(plan.scheduled):
            end = start + item.num_tokens
            if failed_rows and any(start <= row < end for row in failed_rows):
                results[index] = StepResult(failed=True)
            elif item.samples:
                last_rows.append(end - 1)
                sampled.append(index)
            elif item.seq.pooling is not None:
                results[index] = StepResult(pooled=_pool(item, hidden[start:end]))
            elif item.seq.params is None:
                scores = self._score(item, hidden[start:end])
                results[index] = StepResult(
                    prompt_logprobs=scores, failed=not all(map(math.isfinite, scores))
                )
            start = end
        if sampled:
            logits = self.model.project_to_vocab(hidden[last_rows])
            rows = [self._sampling_row(plan.scheduled[index].seq) for index in sampled]
            for index, token in zip(sampled, sample(logits, rows), strict=True):
                results[index] = _result(token)
        return results

    def _clear_failed(self, hidden: Tensor, metadata: AttentionMetadata) -> list[int]:
        """Rows whose hidden state is not finite; their cache slots are made finite again.

        A later owner of the block reads them under a mask, and 0 times NaN is NaN.
        """
        # 0 times what is not finite is no number.
        failed: list[int] = (hidden * 0).sum(dim=-1).nonzero().flatten().tolist()
        if failed:
            for part in itertools.chain(*self.kv_cache.layers):
                part.clear(metadata.groups[part.part.group].slot_mapping[failed])
        return failed

    def _rope_lengths(
        self, scheduled: SequenceOf[ScheduledSequence], positions: Tensor
    ) -> Tensor | None:
        """How long each token's sequence is in its eyes, where the rotation depends on it: as
        long as the prompt for the prompt's tokens, then growing token by token."""
        if not self.model.config.rope_depends_on_length:
            return None
        shortest = torch.tensor(
            [item.seq.min_rope_length for item in scheduled for _ in range(item.num_tokens)],
            device=positions.device,
        )
        return torch.maximum(shortest, positions + 1)

    def _build_batch(
        self, scheduled: SequenceOf[ScheduledSequence]
    ) -> tuple[Tensor, Tensor, AttentionMetadata]:
        input_ids: list[int] = []
        positions: list[int] = []
        for item in scheduled:
            start = item.seq.num_computed_tokens
            end = start + item.num_tokens
            input_ids.extend(item.seq.token_ids[start:end])
            positions.extend(range(start, end))
        device = self.model.device
        metadata = AttentionMetadata.build(
            block_tables=[item.seq.block_tables for item in scheduled],
            num_computed_tokens=[item.seq.num_computed_tokens for item in scheduled],
            num_new_tokens=[item.num_tokens for item in scheduled],
            block_size=self.kv_cache.block_size,
            device=device,
            tokens_per_gather=self.kv_cache.tokens_per_gather,
        )
        return (
            torch.tensor(input_ids, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            metadata,
        )

    def _score(self, item: ScheduledSequence, hidden: Tensor) -> tuple[float, ...]:
        """Log-probability of each token that follows one of the computed ones."""
        start = item.seq.num_computed_tokens + 1
        targets = item.seq.token_ids[start : start + item.num_tokens]
        logprobs: list[float] = []
        for first in range(0, len(targets), _SCORING_ROWS):
            part = targets[first : first + _SCORING_ROWS]
            rows = hidden[first : first + len(part)]
            scores = self.model.project_to_vocab(rows).log_softmax(dim=-1)
            chosen = torch.tensor(part, dtype=torch.int64, device=scores.device)
            logprobs.extend(scores.gather(1, chosen[:, None]).squeeze(1).tolist())
        return tuple(logprobs)

    def _sampling_row(self, seq: Sequence) -> SamplingRow:
        params = seq.params
        assert params is not None, "only generations sample"
        if params.is_plainly_greedy and seq.num_output_tokens >= params.min_tokens:
            return _GREEDY
        suppressed: tuple[int, ...] = ()
        if seq.num_output_tokens < params.min_tokens:
            suppressed = params.stop_token_ids
            if not params.ignore_eos:
                suppressed += self._eos_token_ids
        return SamplingRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            suppressed_token_ids=suppressed,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens]
            if params.repetition_penalty != 1.0
            else (),
            output_token_ids=seq.token_ids[seq.num_prompt_tokens :]
            if _uses_output(params.repetition_penalty, params.presence_penalty,
                            params.frequency_penalty)
            else (),
            uniform=0.0 if seq.rng is None else seq.rng.random(),
            num_logprobs=params.logprobs,
        )  # fmt: skip


def _pool(item: ScheduledSequence, hidden: Tensor) -> tuple[float, ...]:
    """What these `[tokens, hidden]` contribute to the sequence's embedding."""
    seq = item.seq
    match seq.pooling:
        case Pooling.MEAN:
            pooled = hidden.double().sum(dim=0) / seq.num_tokens
        case Pooling.FIRST if seq.num_computed_tokens == 0:
            pooled = hidden[0]
        case Pooling.LAST if item.num_tokens == seq.num_uncomputed_tokens:
            pooled = hidden[-1]
        case _:
            return ()
    return tuple(pooled.tolist())


def _uses_output(repetition: float, presence: float, frequency: float) -> bool:
    return repetition != 1.0 or presence != 0.0 or frequency != 0.0


def _result(token: SampledToken) -> StepResult:
    logprobs = None if token.logprob is None else TokenLogprobs(token.logprob, token.top_logprobs)
    return StepResult(token_id=token.token_id, logprobs=logprobs, failed=token.token_id is None)
