"""One model replica from settings: engine, tokenizer, limits. The same in both runtimes."""

from typing import TYPE_CHECKING

from models.checkpoints.loader import check_checkpoint
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from service.attention.limits import AttentionLimits
from service.auth.gate import Gate
from service.auth.tokens import TokenStore
from service.certificates import CertificateFiles
from service.config import ServiceConfig
from service.engine.async_engine import AsyncEngine
from service.engine.engine import Engine
from service.engine.memory import check_kv_cache_bytes, load_configured_model, resolve_device
from service.engine.support import as_served, check_supported, max_model_len
from service.metrics.engine import EngineMetrics

if TYPE_CHECKING:
    from service.tracing import Tracing


def check_model(config: ServiceConfig) -> ModelConfig:
    """Find out without loading weights whether a replica could start.

    Raises:
        ModelError: the checkpoint or its tokenizer cannot be served.
        ValueError: the engine's limits do not fit the model or the machine.
    """
    model_config = check_checkpoint(config.model_path)
    Tokenizer.for_model(config.model_path, model_config)
    check_supported(model_config, config.engine)
    max_model_len(config.engine, model_config)
    check_kv_cache_bytes(as_served(model_config, config.engine), config.engine)
    resolve_device(config.engine.device)
    return model_config


async def start_engine(
    config: ServiceConfig, metrics: EngineMetrics
) -> tuple[AsyncEngine, Tokenizer]:
    """Load model and tokenizer, and start the engine thread.

    Args:
        metrics: listens to the engine.

    Raises:
        ModelError: the checkpoint or its tokenizer cannot be served.
        ValueError: the engine's limits do not fit the model or the machine.
    """
    tokenizer = Tokenizer.for_model(config.model_path, check_checkpoint(config.model_path))

    def build() -> Engine:
        model = load_configured_model(config.model_path, config.engine)
        return Engine(
            model,
            config.engine,
            tokenizer=tokenizer,
            on_step=metrics.on_step,
            on_finish=metrics.on_finish,
        )

    engine = AsyncEngine(
        build, num_threads=config.engine.num_threads, stall_seconds=config.stall_seconds
    )
    await engine.start()
    return engine, tokenizer


def certificate_files(config: ServiceConfig) -> CertificateFiles | None:
    """The server's certificate; None if it serves in the clear.

    Raises:
        CertificateError: the files make no TLS server.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    return CertificateFiles(config.tls_cert, config.tls_key, config.client_ca)


def make_gate(config: ServiceConfig) -> Gate | None:
    """Who admits the callers of an application; None if nobody asks.

    Raises:
        TokenFileError: the token file cannot be used.
    """
    if config.tokens is None:
        return None
    own = () if config.own_token is None else (config.own_token,)
    return Gate(TokenStore(config.tokens, own))


def make_tracing(config: ServiceConfig) -> "Tracing | None":
    """Where the spans of an application's RPCs go; None if nothing is traced."""
    if config.otlp_endpoint is None:
        return None
    # Only who traces needs OpenTelemetry.
    from service.tracing import Tracing

    return Tracing(
        config.otlp_endpoint,
        sample_ratio=config.trace_sample_ratio,
        resource={"headroom.application": config.application},
    )


def attention_limits(config: ServiceConfig) -> AttentionLimits:
    return AttentionLimits(config.attend_max_bytes, config.max_message_bytes)
