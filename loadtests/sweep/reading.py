"""From a sweep file to its plan; every mistake is found before anything starts."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from loadtests.sweep.checks import check_plan
from loadtests.sweep.configurations import (
    Configuration,
    expand,
    read_checkpoint,
    same_parameters,
)
from loadtests.sweep.plan import Load, Plan
from loadtests.sweep.quality import HeldOutText
from loadtests.sweep.source import Place, Source, SweepError
from loadtests.sweep.spec import (
    MAX_CONFIGURATIONS,
    MAX_POINTS,
    Checkpoint,
    EngineSection,
    LoadSection,
    QualitySection,
    Shape,
    SweepFile,
)
from service.engine.config import EngineConfig

# A prompt is computed in steps of so many tokens, unless more sequences than that decode.
_BATCHED_TOKENS = 512


def read_plan(source: Source, name: str) -> Plan:
    """The sweep that a file or flags describe.

    Args:
        name: of the sweep, unless the file gives it one.

    Raises:
        SweepError: it cannot run; one line per mistake, with its line in the file.
    """
    file = source.section(SweepFile, source.values, ())
    entries = source.values if isinstance(source.values, dict) else {}
    loads = _loads(source, entries.get("loads"))
    max_len = max((load.prompt + load.output for load in loads), default=1)
    configurations = _configurations(source, entries.get("configurations"), max_len)
    engine, all_cores = _engine(source, entries, loads)
    text = _text(source, entries, configurations)
    if file is None or engine is None or text is None or not (configurations and loads):
        source.raise_if_mistaken()
        raise SweepError("nothing to measure")
    plan = Plan(
        name=file.name or name,
        runtime=file.runtime,
        repeats=file.repeats,
        seed=file.seed,
        port=file.port,
        http_port=file.http_port,
        metrics_port=file.metrics_port,
        engine=engine,
        all_cores=all_cores,
        configurations=tuple(configurations),
        loads=tuple(loads),
        text=text,
    )
    check_plan(plan, source)
    source.raise_if_mistaken()
    return plan


def _entries(value: object, most: int) -> list[Any]:
    """The entries of a list; none of one that is too long, which is refused as a whole."""
    return value if isinstance(value, list) and len(value) <= most else []


def _loads(source: Source, entries: object) -> list[Load]:
    loads: dict[str, Load] = {}
    total = 0
    for index, entry in enumerate(_entries(entries, MAX_POINTS)):
        section = source.section(LoadSection, entry, ("loads", index))
        if section is None:
            continue
        total += section.num_combinations
        if total > MAX_POINTS:
            message = f"brings the loads to {total}; allowed: at most {MAX_POINTS}"
            source.refuse(("loads", index), message)
            return []
        for prompt, clients in itertools.product(section.prompt, section.clients):
            load = Load(clients, prompt, section.output, section.waves, section.waiting)
            if load.name in loads:
                source.refuse(("loads", index), f"repeats {load.name}")
            loads[load.name] = load
    return list(loads.values())


def _configurations(source: Source, entries: object, max_len: int) -> list[Configuration]:
    found: list[Configuration] = []
    references: dict[str, str] = {}
    total = 0
    for index, entry in enumerate(_entries(entries, MAX_CONFIGURATIONS)):
        place: Place = ("configurations", index)
        section: Checkpoint | Shape | None
        if isinstance(entry, dict) and "checkpoint" in entry:
            section = source.section(Checkpoint, entry, place)
        else:
            section = source.section(Shape, entry, place)
        if section is None:
            continue
        total += section.num_combinations
        if total > MAX_CONFIGURATIONS:
            message = f"brings the configurations to {total}; allowed: at most {MAX_CONFIGURATIONS}"
            source.refuse(place, message)
            return []
        if isinstance(section, Checkpoint):
            one = read_checkpoint(section, place, source)
            found += [one] if one else []
            continue
        expanded = list(expand(section, place, source, max_len))
        found += expanded
        if section.same_parameters_as is not None:
            references |= {one.name: section.same_parameters_as for one in expanded}
    for name, count in Counter(one.name for one in found).items():
        if count > 1:
            last = [one for one in found if one.name == name][-1]
            source.refuse(last.place, f"is another {name!r}; allowed: names that differ")
    return same_parameters(found, references, source)


def _engine(
    source: Source, entries: dict[str, Any], loads: Iterable[Load]
) -> tuple[EngineConfig | None, bool]:
    """What every engine gets, and whether its threads are all cores."""
    if "engine" not in entries:  # said of the whole file
        return None, False
    section = source.section(EngineSection, entries["engine"], ("engine",))
    if section is None:
        return None, False
    most = max((load.clients for load in loads), default=1)
    most_tokens = max((load.clients * (load.prompt + load.output) for load in loads), default=1)
    max_num_seqs = section.max_num_seqs or most
    for load in loads:
        if load.clients > max_num_seqs and not load.waiting:
            source.refuse(
                ("engine", "max_num_seqs"),
                f"is {max_num_seqs}; load {load.name} needs {load.clients}, or `waiting: true`",
            )
    try:
        engine = EngineConfig(
            block_size=section.block_size,
            kv_cache_bytes=section.kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens
            or max(_BATCHED_TOKENS, max_num_seqs),
            max_waiting_requests=most,
            max_waiting_tokens=most_tokens,
            num_threads=section.num_threads or len(os.sched_getaffinity(0)),
        )
    except ValueError as error:
        field, _, message = str(error).partition(" ")
        source.refuse(("engine", field), message)
        return None, False
    return engine, section.num_threads is None


def _text(
    source: Source, entries: dict[str, Any], configurations: list[Configuration]
) -> HeldOutText | None:
    """What checkpoints are measured on; None, and a mistake, if it cannot be read."""
    if "quality" not in entries:
        return HeldOutText()
    section = source.section(QualitySection, entries["quality"], ("quality",))
    if section is None:
        return None
    if all(one.directory is None for one in configurations):
        source.refuse(("quality",), "is of checkpoints, of which there is none")
        return None
    text = HeldOutText(section.text, section.bytes)
    try:
        documents = text.read()
    except (OSError, UnicodeDecodeError) as error:
        source.refuse(("quality", "text"), f"is {str(section.text)!r}: {error}")
        return None
    if not any(documents):
        source.refuse(("quality",), "is of no text; allowed: one character or more")
        return None
    return text
