"""The file of bearer tokens: one that cannot be used, or lets nobody in, is better known before."""

from collections.abc import Iterator

from service.auth.tokens import TokenFileError, read_tokens
from service.config import ServiceConfig
from service.doctor.finding import Finding, private_file


def examine_tokens(config: ServiceConfig) -> Iterator[Finding]:
    """Findings for `tokens`; none without it."""
    if config.tokens is None:
        return
    try:
        entries = read_tokens(config.tokens)
    except TokenFileError as error:
        advice = "write what `headroom token NAME` prints into it"
        yield Finding("tokens", "error", str(error), advice)
        return
    yield private_file("tokens", config.tokens, f"{len(entries)} in {config.tokens}")
    expired = [entry.name for entry in entries if entry.has_expired]
    if expired:
        advice = "remove them, or let `headroom token` make new ones"
        yield Finding("tokens time", "warning", f"expired: {', '.join(expired)}", advice)
    else:
        yield Finding("tokens time", "ok", "none has expired")
