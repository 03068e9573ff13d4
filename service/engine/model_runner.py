"""A step plan to tensors, through the model, to sampled tokens."""

import itertools
import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata
from models.cpu.linear import WeightDType
from models.gpu.decode_graphs import Decode, DecodeGraphs
from models.kv_cache import KVCache
from models.sampler import Choice, SampledToken, SamplingRow, choose
from models.transfer import Received, send
from models.transformer import Transformer
from service.engine.plan import ScheduledSequence, StepPlan, StepResult
from service.engine.sequence import Pooling, SequenceStatus, TokenLogprobs

# Rows of logits that exist at once while scoring: bounds memory for large vocabularies.
_SCORING_ROWS = 128
# Most rows of many a load: made once, since a row has more fields than it takes time to look at.
_GREEDY = SamplingRow(temperature=0.0)


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that a device computes.

    Attributes:
        sampled: which of the planned sequences get a token, in the order of `choice`.
        unsampled: the others.
        hidden: `[tokens, hidden]`, where more than tokens is asked for.
        broken: whether each token's hidden state is not finite; None where `choice` tells.
    """

    plan: StepPlan
    sampled: tuple[int, ...] = ()
    unsampled: tuple[int, ...] = ()
    choice: Choice | None = None
    hidden: Tensor | None = None
    broken: Received | None = None


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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # Triton launches on the device of the thread
        model.pack_weights(weight_dtype, batch_invariant=batch_invariant)
        self.model = model
        self.kv_cache = kv_cache
        self.graphs = graphs
        self._eos_token_ids = tuple(sorted(eos_token_ids))

    def run(self, plan: StepPlan) -> list[StepResult]:
        """Compute the planned tokens; one result per scheduled sequence, in order."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan, after: RunningStep | None = None) -> RunningStep:
        """Begin to compute the planned tokens; on a GPU, without waiting for anything.

        Args:
            after: the step before, if the plan was foreseen from it.
        """
        if not plan.scheduled:
            return RunningStep(plan)
        if self.graphs is not None and all(
            item.num_tokens == 1 and item.samples for item in plan.scheduled
        ):
            return self._launch_decodes(self.graphs, plan, after)
        assert after is None, "only decodes are foreseen"
        input_ids, positions, metadata = self._build_batch(plan.scheduled)
        lengths = self._rope_lengths(plan.scheduled, positions)
        hidden = self.model(input_ids, positions, self.kv_cache, metadata, lengths)
        broken = Received(broken_rows(hidden))
        sampled = [index for index, item in enumerate(plan.scheduled) if item.samples]
        unsampled = [index for index, item in enumerate(plan.scheduled) if not item.samples]
        choice = None
        if sampled:
            ends = _ends(plan.scheduled)
            last_rows = array("q", [ends[index] - 1 for index in sampled])
            rows = send(torch.frombuffer(last_rows, dtype=torch.int64), hidden.device)
            logits = self.model.project_to_vocab(hidden.index_select(0, rows))
            choice = choose(logits, [self._sampling_row(plan.scheduled[at]) for at in sampled])
        return RunningStep(plan, tuple(sampled), tuple(unsampled), choice, hidden, broken)

    def _launch_decodes(
        self, graphs: DecodeGraphs, plan: StepPlan, after: RunningStep | None
    ) -> RunningStep:
        scheduled = plan.scheduled
        before = None
        if after is None:
            tokens = [item.seq.token_ids[item.start] for item in scheduled]
        else:
            assert after.choice is not None, "a foreseen plan follows tokens"
            before = after.choice.tokens
            rows = {id(after.plan.scheduled[at].seq): row for row, at in enumerate(after.sampled)}
            tokens = [rows[id(item.seq)] for item in scheduled]
        decoded = graphs.run(
            [
                Decode(token, item.start, item.seq.block_tables)
                for token, item in zip(tokens, scheduled, strict=True)
            ],
            before,
        )
        options = [self._sampling_row(item) for item in scheduled]
        if all(row is _GREEDY for row in options):
            choice = Choice.of(decoded.tokens)
        else:
            choice = choose(decoded.logits, options)
        return RunningStep(plan, tuple(range(len(scheduled))), choice=choice)

    @torch.inference_mode()
    def collect(self, step: RunningStep) -> list[StepResult]:
        """What a step computed, as soon as it has; one result per scheduled sequence, in order."""
        scheduled = step.plan.scheduled
        results = [StepResult()] * len(scheduled)
        if step.choice is not None:
            for index, token in zip(step.sampled, step.choice.read(), strict=True):
                results[index] = _result(token)
        if step.broken is not None:
            assert step.hidden is not None, "whose rows are broken"
            (broken,) = step.broken.wait()
            rows: list[bool] = broken.tolist()
            if step.unsampled or any(rows):
                ends = _ends(scheduled)
                for index in step.unsampled:
                    item, end = scheduled[index], ends[index]
                    results[index] = self._read(item, step.hidden[end - item.num_tokens : end])
                for index, (item, end) in enumerate(zip(scheduled, ends, strict=True)):
                    if any(rows[end - item.num_tokens : end]):
                        results[index] = StepResult(failed=True)
        if any(result.failed for result in results):
            self._clear_failed(scheduled, results)
        return results

    def _read(self, item: ScheduledSequence, hidden: Tensor) -> StepResult:
        """What is to be known of `[tokens, hidden]` of a sequence that gets no token."""
        if item.seq.pooling is not None:
            return StepResult(pooled=_pool(item, hidden))
        if item.seq.params is None:
            scores = self._score(item, hidden)
            return StepResult(prompt_logprobs=scores, failed=not all(map(math.isfinite, scores)))
        return StepResult()

    def _clear_failed(
        self, scheduled: SequenceOf[ScheduledSequence], results: SequenceOf[StepResult]
    ) -> None:
        """Make the cache slots finite again of what failed.

        A later owner of the block reads them under a mask, and 0 times NaN is NaN. Whoever has
        ended meanwhile has no blocks any more: their next owner may have written there already,
        and steps are foreseen for kernels only that read nothing under a mask.
        """
        failed = [
            item
            for item, result in zip(scheduled, results, strict=True)
            if result.failed and item.seq.status is not SequenceStatus.FINISHED
        ]
        if failed:
            metadata = self._describe(failed)
            for part in itertools.chain(*self.kv_cache.layers):
                part.clear(metadata.groups[part.part.group].slot_mapping)

    def _rope_lengths(
        self, scheduled: SequenceOf[ScheduledSequence], positions: Tensor
    ) -> Tensor | None:
        """How long each token's sequence is in its eyes, where the rotation depends on it: as
        long as the prompt for the prompt's tokens, then growing token by token."""
        if not self.model.config.rope_depends_on_length:
            return None
        shortest = torch.tensor(
            [item.seq.min_rope_length for item in scheduled for _ in range(item.num_tokens)]
        )
        return torch.maximum(send(shortest, positions.device), positions + 1)

    def _build_batch(
        self, scheduled: SequenceOf[ScheduledSequence]
    ) -> tuple[Tensor, Tensor, AttentionMetadata]:
        input_ids, positions = array("q"), array("q")
        for seq, num_tokens, start, _ in scheduled:
            input_ids.extend(seq.token_ids[start : start + num_tokens])
            positions.extend(range(start, start + num_tokens))
        device = self.model.device
        return (
            send(torch.frombuffer(input_ids, dtype=torch.int64), device),
            send(torch.frombuffer(positions, dtype=torch.int64), device),
            self._describe(scheduled),
        )

    def _describe(self, scheduled: SequenceOf[ScheduledSequence]) -> AttentionMetadata:
        return AttentionMetadata.build(
            block_tables=[item.seq.block_tables for item in scheduled],
            num_computed_tokens=[item.start for item in scheduled],
            num_new_tokens=[item.num_tokens for item in scheduled],
            block_size=self.kv_cache.block_size,
            device=self.model.device,
            tokens_per_gather=self.kv_cache.tokens_per_gather,
        )

    def _score(self, item: ScheduledSequence, hidden: Tensor) -> tuple[float, ...]:
        """Log-probability of each token that follows one of the computed ones."""
        start = item.start + 1
        targets = item.seq.token_ids[start : start + item.num_tokens]
        logprobs: list[float] = []
        for first in range(0, len(targets), _SCORING_ROWS):
            part = targets[first : first + _SCORING_ROWS]
            rows = hidden[first : first + len(part)]
            scores = self.model.project_to_vocab(rows).log_softmax(dim=-1)
            chosen = torch.tensor(part, dtype=torch.int64, device=scores.device)
            logprobs.extend(scores.gather(1, chosen[:, None]).squeeze(1).tolist())
        return tuple(logprobs)

    def _sampling_row(self, item: ScheduledSequence) -> SamplingRow:
        seq, params = item.seq, item.seq.params
        assert params is not None, "only generations sample"
        is_early = (
            params.min_tokens > 0 and seq.num_output_tokens + item.num_unknown < params.min_tokens
        )
        if params.is_plainly_greedy and not is_early:
            return _GREEDY
        suppressed: tuple[int, ...] = ()
        if is_early:
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
            output_token_ids=seq.token_ids[seq.num_prompt_tokens :] if params.uses_output else (),
            uniform=0.0 if seq.rng is None else seq.rng.random(),
            num_logprobs=params.logprobs,
        )


def broken_rows(hidden: Tensor) -> Tensor:
    """Which rows of `[tokens, hidden]` hold something that is not finite."""
    return (hidden * 0).sum(dim=-1) != 0  # 0 times what is not finite is no number


def _pool(item: ScheduledSequence, hidden: Tensor) -> tuple[float, ...]:
    """What these `[tokens, hidden]` contribute to the sequence's embedding."""
    seq = item.seq
    match seq.pooling:
        case Pooling.MEAN:
            pooled = hidden.double().sum(dim=0) / seq.num_tokens
        case Pooling.FIRST if item.start == 0:
            pooled = hidden[0]
        case Pooling.LAST if item.end == seq.num_tokens:
            pooled = hidden[-1]
        case _:
            return ()
    return tuple(pooled.tolist())


def _ends(scheduled: SequenceOf[ScheduledSequence]) -> list[int]:
    """For each sequence, the row of the packed step behind its last."""
    return list(itertools.accumulate([item.num_tokens for item in scheduled]))


def _result(token: SampledToken) -> StepResult:
    token_id, logprob, top = token
    if token_id is None:
        return StepResult(failed=True)
    return StepResult(token_id, None if logprob is None else TokenLogprobs(logprob, top))
