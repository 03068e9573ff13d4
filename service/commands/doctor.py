"""`headroom doctor`: what stands between this machine and a server, and what to do about it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.commands.options import Json
from service.console import fail, models_by_application, out


def doctor(
    model: Annotated[
        list[str] | None, typer.Option(help="As of `headroom serve`. [default: demo]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    as_json: Json = False,
) -> None:
    """Check versions, settings, ports, memory, tokens, certificates and Ray before a server starts.

    Settings come from flags, then HEADROOM_* variables, then --config, then defaults. The exit code
    is 1 if a server could not start, or no client would trust it.
    """
    from service.config import SettingsError, load_config
    from service.doctor import examine

    try:
        settings = load_config(config, model=models_by_application(model or []))
    except SettingsError as error:
        fail(str(error), code=2)
    findings = list(examine(settings, os.environ))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        table = Table(box=None, header_style="bold")
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            mark = {"ok": "ok", "warning": "warn", "error": "FAIL"}[finding.level]
            table.add_row(mark, finding.check, finding.fact, finding.advice)
        out.print(table)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
