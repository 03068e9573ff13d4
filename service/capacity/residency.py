"""What one request takes of the KV cache while it lives, asked of the scheduler itself.

A lone request is run through the real scheduler and block manager, without a model, and its
blocks are counted after every step was planned. No rule of theirs is repeated here.
"""

import functools
import statistics
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from models.config import ModelConfig
from service.engine.block_manager import BlockManager
from service.engine.config import EngineConfig
from service.engine.group_pool import BlockGroup, pages_for
from service.engine.kv_reads import KVReads
from service.engine.plan import StepResult
from service.engine.sampling_params import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import RELEASED, Sequence

Blocks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Requests of one size.

    Attributes:
        prompt, output: tokens of each, at least two of output.
        share: of all requests, relative to the other shapes'; at one time there are more of
            those that stay longer.
    """

    prompt: int
    output: int
    share: int = 1

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache when the last one is sampled."""
        return SamplingParams(max_tokens=self.output).max_kv_tokens(self.prompt)

    @property
    def num_decodes(self) -> int:
        """Decode steps; the first token comes from the step that completes the prompt."""
        return self.output - 1


@dataclass(frozen=True, slots=True)
class Residency:
    """Blocks of each group of heads that one request takes.

    Attributes:
        start: that must be there for it to be admitted.
        held: most that it holds at one time.
        claimed: most that the scheduler counts for it at one time: those that it holds and those
            that it keeps free for its next steps.
        mean_held, mean_claimed: the same on average over its decode steps.
    """

    start: Blocks
    held: Blocks
    claimed: Blocks
    mean_held: tuple[float, ...]
    mean_claimed: tuple[float, ...]


@functools.lru_cache(maxsize=1024)
def residency(
    prompt: int, output: int, groups: tuple[BlockGroup, ...], block_size: int, max_new_tokens: int
) -> Residency:
    """Follow a request from its admission to its end.

    Args:
        prompt, output: tokens.
        max_new_tokens: tokens of one step, over all sequences.
    """
    # Enough for it, and for the blocks that are kept free beside it.
    num_pages = pages_for(groups, block_size, prompt + output + block_size, max_new_tokens)
    manager = BlockManager(num_pages, block_size, enable_prefix_caching=False, groups=groups)
    scheduler = Scheduler(
        EngineConfig(block_size=block_size, max_num_seqs=1, max_num_batched_tokens=max_new_tokens),
        manager,
        max_model_len=prompt + output,
        eos_token_ids=frozenset(),
        clock=lambda: 0.0,
    )
    params = SamplingParams(max_tokens=output)
    seq = Sequence(seq_id=0, token_ids=[0] * prompt, params=params, arrival_time=0.0)
    scheduler.add(seq)
    held: list[Blocks] = []
    claimed: list[Blocks] = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        now = tuple(len(table) - table.count(RELEASED) for table in seq.block_tables)
        kept_free = manager.outstanding(scheduler.running, max_new_tokens)
        held.append(now)
        claimed.append(tuple(own + free for own, free in zip(now, kept_free, strict=True)))
        scheduler.update(plan, [0 if plan.scheduled[0].samples else StepResult()])
    num_decodes = output - 1
    return Residency(
        start=tuple(group.blocks_at_once(block_size, prompt, max_new_tokens) for group in groups),
        held=tuple(map(max, zip(*held, strict=True))),
        claimed=tuple(map(max, zip(*claimed, strict=True))),
        mean_held=_means(held[-num_decodes:]),
        mean_claimed=_means(claimed[-num_decodes:]),
    )


@functools.lru_cache(maxsize=256)
def mean_kv_bytes(shape: RequestShape, model: ModelConfig) -> float:
    """Keys and values that a decode step of such a request reads, on average."""
    starts = range(shape.prompt, shape.prompt + shape.num_decodes)
    return KVReads(model).count(starts, shape.num_decodes) / shape.num_decodes


def _means(counts: SequenceOf[Blocks]) -> tuple[float, ...]:
    return tuple(statistics.fmean(group) for group in zip(*counts, strict=True))
