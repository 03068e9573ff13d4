"""The synchronous heart: add requests, step, collect tokens. Knows no thread and no transport."""

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from models.gpu.decode_graphs import Capture
from models.kv_cache import KVCache
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from service.engine.block_manager import BlockManager
from service.engine.config import EngineConfig
from service.engine.errors import InvalidRequestError, Violation
from service.engine.graphs import record_decodes
from service.engine.kv_reads import KVReads
from service.engine.memory import (
    block_groups,
    load_configured_model,
    num_blocks_for,
    served_config,
)
from service.engine.model_runner import ModelRunner, RunningStep
from service.engine.plan import StepPlan
from service.engine.sampling_params import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import (
    Finish,
    FinishReason,
    Pooling,
    Sequence,
    SequenceOutput,
    SequenceStatus,
    TokenLogprobs,
)
from service.engine.stats import EngineLoad, StepStats
from service.engine.stop_strings import stop_matcher
from service.engine.support import check_cache_is_read, check_supported, max_model_len
from service.engine.validation import (
    ModelLimits,
    prompt_violations,
    require_decoder,
    validate_generation,
)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a caller wants: to continue a prompt, to embed it, or (with neither) to score it.

    Attributes:
        params: how to continue it.
        pooling: how to embed it.
        timeout: seconds from arrival until the request ends with what it has.
        cache_namespace: requests share cached prefixes only within one namespace.
        request_id: by which listeners are told of it.
    """

    prompt_token_ids: SequenceOf[int]
    params: SamplingParams | None
    priority: int = 0
    timeout: float | None = None
    cache_namespace: bytes = b""
    pooling: Pooling | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A whole generation."""

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]


class Engine:
    """A model, its KV cache and the requests that share them.

    Args:
        model: the model to run; the engine packs its weights (see `Transformer.pack_weights`).
        config: limits.
        tokenizer: needed for stop strings only.
        on_step: told about every step.
        on_finish: told the end of every request, before its caller is.
        clock: monotonic seconds; deadlines and timings are measured with it.
        capture: how decode steps are recorded; None is as CUDA graphs, on a GPU.

    Attributes:
        served_config: the model's configuration, with the types of its computation and cache.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        *,
        tokenizer: Tokenizer | None = None,
        on_step: Callable[[StepStats], None] = lambda stats: None,
        on_finish: Callable[[Finish], None] = lambda finish: None,
        clock: Callable[[], float] = time.monotonic,
        capture: Capture | None = None,
    ) -> None:
        check_supported(model.config, config)
        check_cache_is_read(model.kernel_name, config)
        self.model_config = model.config
        self.served_config = served_config(model, config)
        self.config = config
        self.max_model_len = max_model_len(config, model.config)
        self.kv_cache = KVCache(
            self.served_config,
            num_pages=num_blocks_for(model, config, self.max_model_len),
            block_size=config.block_size,
            dtype=model.dtype,
            device=model.device,
        )
        self.on_step = on_step
        eos_token_ids = frozenset(model.config.eos_token_ids)
        self.limits = ModelLimits(
            model.config.vocab_size, self.max_model_len, eos_token_ids, model.config.is_causal
        )
        block_manager = BlockManager(
            self.kv_cache.num_pages,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            groups=block_groups(self.served_config, config.block_size),
        )
        self.scheduler = Scheduler(
            config,
            block_manager,
            max_model_len=self.max_model_len,
            eos_token_ids=eos_token_ids,
            rope_switch_length=model.config.rope_switch_length,
            whole_prompts=not model.config.is_causal,
            on_finish=on_finish,
            clock=clock,
        )
        self.model_runner = ModelRunner(
            model,
            self.kv_cache,
            eos_token_ids=eos_token_ids,
            weight_dtype=config.weight_dtype,
            batch_invariant=config.batch_invariant,
        )
        self.model_runner.graphs = record_decodes(
            model, self.kv_cache, config, self.max_model_len, capture
        )
        self._foreseen: RunningStep | None = None
        self._kv_reads = KVReads(self.served_config)
        self._tokenizer = tokenizer
        self._clock = clock
        self._seq_ids = itertools.count()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        *,
        on_step: Callable[[StepStats], None] = lambda stats: None,
    ) -> "Engine":
        """An engine for the model in a Hugging Face directory.

        Raises:
            CheckpointError, ConfigError, TokenizerError: see `models.load_model`.
        """
        config = config or EngineConfig()
        model = load_configured_model(path, config)
        has_tokenizer = (Path(path) / "tokenizer.json").is_file()
        tokenizer = Tokenizer.for_model(path, model.config) if has_tokenizer else None
        return cls(model, config, tokenizer=tokenizer, on_step=on_step)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes until it leaves the window of any head."""
        return self.served_config.kv_bytes_per_token()

    @property
    def backend(self) -> str:
        """What attends (see `Transformer.kernel_name`), and whether decode steps are recorded."""
        name = self.model_runner.model.kernel_name
        return name if self.model_runner.graphs is None else f"{name} (graphs)"

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    @property
    def load(self) -> EngineLoad:
        manager = self.scheduler.block_manager
        return EngineLoad(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_blocks_total=manager.num_pages,
            kv_blocks_used=manager.num_used_pages,
            kv_blocks_cached=manager.num_cached_pages,
        )

    def add(self, request: EngineRequest) -> int:
        """Queue a request and return its id, which grows with arrival.

        Raises:
            InvalidRequestError: a field is wrong.
            EncoderModelError: an encoder is to generate or score.
            NeverFitsError, QueueFullError: see `Scheduler.add`.
        """
        self._validate(request)
        now = self._clock()
        params = request.params
        seq = Sequence(
            seq_id=next(self._seq_ids),
            token_ids=list(request.prompt_token_ids),
            params=params,
            arrival_time=now,
            pooling=request.pooling,
            priority=request.priority,
            deadline=None if request.timeout is None else now + request.timeout,
            cache_namespace=request.cache_namespace,
            request_id=request.request_id,
            match_stop=self._stop_matcher(request),
        )
        self.scheduler.add(seq)
        return seq.seq_id

    def abort(
        self, seq_id: int, reason: FinishReason = FinishReason.CANCELLED
    ) -> SequenceOutput | None:
        """End a request now; None if it has ended already."""
        return self.scheduler.abort(seq_id, reason)

    def step(self) -> list[SequenceOutput]:
        """Run one step for all requests; returns what is new for each.

        Where decode steps are recorded, the next one is launched before the tokens of this one are
        waited for, so that a GPU computes while the host delivers and plans.
        """
        started = self._clock()
        step = self._take_foreseen() or self.model_runner.launch(self.scheduler.schedule())
        if self.model_runner.graphs is not None:
            following = self.scheduler.foresee(step.plan)
            if following is not None:
                self._foreseen = self.model_runner.launch(following, after=step)
        outputs = self.scheduler.update(step.plan, self.model_runner.collect(step))
        self.on_step(self._stats(step.plan, self._clock() - started))
        return outputs

    def _take_foreseen(self) -> RunningStep | None:
        """The step that runs already; None if there is none, or nobody it is for any more."""
        step, self._foreseen = self._foreseen, None
        if step is None or all(
            item.seq.status is SequenceStatus.FINISHED for item in step.plan.scheduled
        ):
            return None
        return step

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
    ) -> list[RequestOutput]:
        """Continue all prompts; returns when the last has ended.

        Args:
            prompts: token ids of each prompt.
            params: for all prompts, or one for each.

        Raises:
            InvalidRequestError, NeverFitsError: one of the requests can never be served; nothing
                of the batch was run.
            RuntimeError: the engine has other requests.
        """
        if self.has_unfinished:
            raise RuntimeError("generate() needs an engine without other requests")
        each = params if isinstance(params, list) else [params] * len(prompts)
        requests = [
            EngineRequest(prompt, settings) for prompt, settings in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self._validate(request)
            self.scheduler.check_fits(len(request.prompt_token_ids), request.params)
        collected: dict[int, list[SequenceOutput]] = {}
        pending = iter(requests)
        upcoming = next(pending, None)
        while upcoming is not None or self.has_unfinished:
            while upcoming is not None and self.scheduler.has_room_for(
                len(upcoming.prompt_token_ids)
            ):
                collected[self.add(upcoming)] = []
                upcoming = next(pending, None)
            for output in self.step():
                collected[output.seq_id].append(output)
        return [_request_output(SequenceOutput.merge(outputs)) for outputs in collected.values()]

    def _validate(self, request: EngineRequest) -> None:
        assert request.params is None or request.pooling is None, "a request wants one thing"
        if request.pooling is None:
            require_decoder(self.limits)
        if request.params is not None:
            validate_generation(request.prompt_token_ids, request.params, self.limits)
            if request.params.stop and self._tokenizer is None:
                raise InvalidRequestError(
                    [Violation("sampling.stop", "set", "empty; this engine has no tokenizer")]
                )
            return
        violations = list(
            prompt_violations(request.prompt_token_ids, self.limits, max_len=self.max_model_len)
        )
        if violations:
            raise InvalidRequestError(violations)

    def _stop_matcher(self, request: EngineRequest) -> Callable[[int], str | None] | None:
        params = request.params
        if params is None or not params.stop:
            return None
        assert self._tokenizer is not None, "a validated request with stop strings"
        return stop_matcher(self._tokenizer, params, request.prompt_token_ids)

    def _stats(self, plan: StepPlan, seconds: float) -> StepStats:
        num_tokens = plan.num_tokens
        return StepStats(
            num_tokens=num_tokens,
            num_sequences=len(plan.scheduled),
            num_preempted=plan.num_preempted,
            seconds=seconds,
            kv_bytes=self._kv_reads.count(plan.starts, num_tokens),
            progress=self.scheduler.progress,
            load=self.load,
        )


def _request_output(output: SequenceOutput) -> RequestOutput:
    assert output.finish is not None, "a collected request has ended"
    return RequestOutput(
        token_ids=list(output.token_ids),
        finish_reason=output.finish.reason,
        logprobs=list(output.logprobs),
    )
