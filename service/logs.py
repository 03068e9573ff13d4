"""How log lines look: for people or for machines, on standard error."""

import logging
import sys
from typing import Literal, TextIO, TypeAlias

import structlog

LogFormat: TypeAlias = Literal["text", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]

# Local variables hold prompts; both renderers would print them.
_WITHOUT_LOCALS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


class _Forward(logging.Handler):
    """Lines of the engine, which needs no structlog, among all others."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def configure_logs(form: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """For this process, once, before it logs anything.

    Args:
        stream: where lines go, if not to what `sys.stderr` is when each is written.
    """
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
        exceptions: list[structlog.typing.Processor] = [_WITHOUT_LOCALS]
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=(stream or sys.stderr).isatty(),
            exception_formatter=structlog.dev.plain_traceback,
        )
        exceptions = []
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *exceptions,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: structlog.WriteLogger(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    engine = logging.getLogger("service.engine")
    engine.handlers = [_Forward()]
    engine.setLevel(level.upper())
