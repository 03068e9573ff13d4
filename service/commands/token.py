"""`headroom token`: a new bearer token, and the entry that admits its owner."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
import yaml

from service.auth.tokens import Scope, TokenEntry, digest_of, new_token
from service.console import err, fail


def token(
    name: Annotated[str, typer.Argument(help="Whose it is; written in logs.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it allows; may be repeated. [default: generate]"),
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Calls that may be open at once, of each replica.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and answers, of each replica.")
    ] = None,
) -> None:
    """Make a bearer token.

    The token goes to standard error, once. Its entry goes to standard output, to be appended to the
    file of `headroom serve --tokens`; the file holds no token, and is read again when it changes.
    """
    secret = new_token()
    expires = None
    if days is not None:
        expires = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    try:
        entry = TokenEntry(
            name=name,
            sha256=digest_of(secret),
            scopes=tuple(dict.fromkeys(scope or [Scope.GENERATE])),
            expires=expires,
            max_concurrent=max_concurrent,
            tokens_per_minute=tokens_per_minute,
        )
    except ValueError:
        fail(f"NAME is {name!r}; allowed: 1 to 64 letters, digits and _.@-", code=2)
    err.print(secret)
    fields = entry.model_dump(mode="json", exclude_none=True)
    print(yaml.safe_dump([fields], sort_keys=False), end="")
