"""Continuous batching over a paged KV cache: who runs next, and with which blocks."""

from service.engine.config import EngineConfig as EngineConfig
from service.engine.engine import Engine as Engine
from service.engine.engine import EngineRequest as EngineRequest
from service.engine.engine import RequestOutput as RequestOutput
from service.engine.sampling_params import SamplingParams as SamplingParams
from service.engine.sequence import FinishReason as FinishReason
