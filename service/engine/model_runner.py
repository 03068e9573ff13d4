"""A step plan to tensors, through the model, to sampled tokens."""

import itertools
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from models.cpu.linear import WeightDType
from models.gpu.decode_graphs import Decode, DecodeGraphs
from models.kv_cache import KVCache
from models.sampler import NOTHING, Choice, choose
from models.transfer import Received, send
from models.transformer import Transformer
from service.engine.batch import Batch, describe
from service.engine.plan import Result, ScheduledSequence, StepPlan, StepResult
from service.engine.sampling_rows import SamplingRows
from service.engine.sequence import Pooling, SequenceStatus, TokenLogprobs

# Rows of logits that exist at once while scoring: bounds memory for large vocabularies.
_SCORING_ROWS = 128
_FAILED = StepResult(failed=True)


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that a device computes.

    Attributes:
        sampled: which of the planned sequences get a token, in the order of `choice`.
        unsampled: the others.
        hidden: `[tokens, hidden]`.
        broken: whether each token's hidden state is not finite; None where `choice` tells.
    """

    plan: StepPlan
    sampled: SequenceOf[int] = ()
    unsampled: SequenceOf[int] = ()
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
        self._sampling_rows = SamplingRows(eos_token_ids)
        # A cap makes logits finite again.
        self._logits_tell = model.config.logit_softcap is None
        self._rope_depends_on_length = model.config.rope_depends_on_length
        self._is_on_cpu = model.device.type == "cpu"
        # Of the last step, if another may go on with it: the plan, the batch, the tokens it chose.
        self._decoded: tuple[StepPlan, Batch, Tensor] | None = None

    def run(self, plan: StepPlan) -> list[Result]:
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
        is_decode = plan.is_decode
        if self.graphs is not None and is_decode:
            return self._launch_recorded(self.graphs, plan, after)
        assert after is None, "only decodes are foreseen"
        batch = self._build_batch(plan)
        lengths = self._rope_lengths(plan.scheduled, batch.positions)
        hidden = self.model(
            batch.input_ids, batch.positions, self.kv_cache, batch.metadata, lengths
        )
        if is_decode:
            everyone = range(len(plan.scheduled))
            choice = self._choose(plan, everyone, hidden)
            self._decoded = (plan, batch, choice.tokens) if self._is_on_cpu else None
            if self._logits_tell:
                return RunningStep(plan, everyone, (), choice)
            return RunningStep(plan, everyone, (), choice, hidden, Received(broken_rows(hidden)))
        broken = Received(broken_rows(hidden))
        sampled = [index for index, item in enumerate(plan.scheduled) if item.samples]
        unsampled = [index for index, item in enumerate(plan.scheduled) if not item.samples]
        if not sampled:
            return RunningStep(plan, sampled, unsampled, None, hidden, broken)
        ends = _ends(plan.scheduled)
        last_rows = torch.tensor([ends[index] - 1 for index in sampled], dtype=torch.int64)
        rows = hidden.index_select(0, send(last_rows, hidden.device))
        choice = self._choose(plan, sampled, rows)
        return RunningStep(plan, sampled, unsampled, choice, hidden, broken)

    def _build_batch(self, plan: StepPlan) -> Batch:
        """The batch of the last step, one token later, where the plan goes on with it."""
        decoded, self._decoded = self._decoded, None
        if plan.changed is None or not self._is_on_cpu:
            return Batch(plan, self.kv_cache)
        assert decoded is not None, "a plan goes on with the step before"
        before, batch, tokens = decoded
        assert plan.scheduled is before.scheduled, "and with no other step"
        batch.advance(tokens, plan.changed)
        return batch

    def _choose(self, plan: StepPlan, sampled: SequenceOf[int], hidden: Tensor) -> Choice:
        """A token for each row of `[rows, hidden]`."""
        rows = self._sampling_rows.of(plan, sampled)
        if rows is None:
            return Choice.of(self.model.most_likely(hidden))
        return choose(self.model.project_to_vocab(hidden), rows)

    def _launch_recorded(
        self, graphs: DecodeGraphs, plan: StepPlan, after: RunningStep | None
    ) -> RunningStep:
        scheduled, starts = plan.scheduled, plan.starts
        before = None
        if after is None:
            tokens = [item.seq.token_ids[at] for item, at in zip(scheduled, starts, strict=True)]
        else:
            assert after.choice is not None, "a foreseen plan follows tokens"
            before = after.choice.tokens
            rows = {id(after.plan.scheduled[at].seq): row for row, at in enumerate(after.sampled)}
            tokens = [rows[id(item.seq)] for item in scheduled]
        decoded = graphs.run(
            [
                Decode(token, start, item.seq.block_tables)
                for token, start, item in zip(tokens, starts, scheduled, strict=True)
            ],
            before,
        )
        sampled = range(len(scheduled))
        options = self._sampling_rows.of(plan, sampled)
        choice = Choice.of(decoded.tokens) if options is None else choose(decoded.logits, options)
        return RunningStep(plan, sampled, choice=choice)

    def collect(self, step: RunningStep) -> list[Result]:
        """What a step computed, as soon as it has; one result per scheduled sequence, in order."""
        plan, scheduled = step.plan, step.plan.scheduled
        tokens = [] if step.choice is None else _token_results(step.choice)
        if len(tokens) == len(scheduled):
            results = tokens
        else:
            results = [StepResult()] * len(scheduled)
            for index, result in zip(step.sampled, tokens, strict=True):
                results[index] = result
        if step.broken is not None:
            assert step.hidden is not None, "whose rows are broken"
            (broken,) = step.broken.wait()
            rows: list[bool] = broken.tolist()
            if step.unsampled or any(rows):
                ends = _ends(scheduled)
                for index in step.unsampled:
                    first = ends[index] - scheduled[index].num_tokens
                    results[index] = self._read(plan, index, step.hidden[first : ends[index]])
                for index, (item, end) in enumerate(zip(scheduled, ends, strict=True)):
                    if any(rows[end - item.num_tokens : end]):
                        results[index] = _FAILED
        failed = [
            index
            for index, result in enumerate(results)
            if not isinstance(result, int) and result.failed
        ]
        if failed:
            self._clear(plan, failed)
        return results

    @torch.inference_mode()
    def _read(self, plan: StepPlan, index: int, hidden: Tensor) -> StepResult:
        """What is to be known of `[tokens, hidden]` of a sequence that gets no token."""
        item, start = plan.scheduled[index], plan.starts[index]
        if item.seq.pooling is not None:
            return StepResult(pooled=_pool(item, start, hidden))
        if item.seq.params is None:
            scores = self._score(item, start, hidden)
            return StepResult(prompt_logprobs=scores, failed=not all(map(math.isfinite, scores)))
        return StepResult()

    @torch.inference_mode()
    def _clear(self, plan: StepPlan, failed: SequenceOf[int]) -> None:
        """Make the cache slots finite again of what failed.

        A later owner of the block reads them under a mask, and 0 times NaN is NaN. Whoever has
        ended meanwhile has no blocks any more: their next owner may have written there already,
        and steps are foreseen for kernels only that read nothing under a mask.
        """
        still = [
            index
            for index in failed
            if plan.scheduled[index].seq.status is not SequenceStatus.FINISHED
        ]
        if still:
            items = [plan.scheduled[index] for index in still]
            metadata = describe(items, [plan.starts[index] for index in still], self.kv_cache)
            for part in itertools.chain(*self.kv_cache.layers):
                part.clear(metadata.groups[part.part.group].slot_mapping)

    def _rope_lengths(
        self, scheduled: SequenceOf[ScheduledSequence], positions: Tensor
    ) -> Tensor | None:
        """How long each token's sequence is in its eyes, where the rotation depends on it: as
        long as the prompt for the prompt's tokens, then growing token by token."""
        if not self._rope_depends_on_length:
            return None
        shortest = torch.tensor(
            [item.seq.min_rope_length for item in scheduled for _ in range(item.num_tokens)]
        )
        return torch.maximum(send(shortest, positions.device), positions + 1)

    def _score(self, item: ScheduledSequence, start: int, hidden: Tensor) -> tuple[float, ...]:
        """Log-probability of each token that follows one of the computed ones."""
        targets = item.seq.token_ids[start + 1 : start + 1 + item.num_tokens]
        logprobs: list[float] = []
        for first in range(0, len(targets), _SCORING_ROWS):
            part = targets[first : first + _SCORING_ROWS]
            rows = hidden[first : first + len(part)]
            scores = self.model.project_to_vocab(rows).log_softmax(dim=-1)
            chosen = torch.tensor(part, dtype=torch.int64, device=scores.device)
            logprobs.extend(scores.gather(1, chosen[:, None]).squeeze(1).tolist())
        return tuple(logprobs)


def broken_rows(hidden: Tensor) -> Tensor:
    """Which rows of `[tokens, hidden]` hold something that is not finite."""
    return (hidden * 0).sum(dim=-1) != 0  # 0 times what is not finite is no number


def _pool(item: ScheduledSequence, start: int, hidden: Tensor) -> tuple[float, ...]:
    """What these `[tokens, hidden]` contribute to the sequence's embedding."""
    seq = item.seq
    match seq.pooling:
        case Pooling.MEAN:
            pooled = hidden.double().sum(dim=0) / seq.num_tokens
        case Pooling.FIRST if start == 0:
            pooled = hidden[0]
        case Pooling.LAST if start + item.num_tokens == seq.num_tokens:
            pooled = hidden[-1]
        case _:
            return ()
    return tuple(pooled.tolist())


def _ends(scheduled: SequenceOf[ScheduledSequence]) -> list[int]:
    """For each sequence, the row of the packed step behind its last."""
    return list(itertools.accumulate([item.num_tokens for item in scheduled]))


def _token_results(choice: Choice) -> list[Result]:
    """One for each sequence that was to get a token."""
    token_ids, reported = choice.read()
    results: list[Result] = [*token_ids]
    for row, (token_id, logprob, top) in reported.items():
        assert logprob is not None, "it is reported"
        results[row] = StepResult(token_id, TokenLogprobs(logprob, top))
    if NOTHING in token_ids:
        results = [_FAILED if result == NOTHING else result for result in results]
    return results
