"""From a sweep file to its plan; every mistake is found before anything starts."""

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
from loadtests.sweep.source import Place, Source, SweepError
from loadtests.sweep.spec import (
    MAX_CONFIGURATIONS,
    Checkpoint,
    EngineSection,
    LoadSection,
    Shape,
    SweepFile,
)
from service.engine.config import EngineConfig


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
    engine = _engine(source, entries, loads)
    if file is None or engine is None or not (configurations and loads):
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
        configurations=tuple(configurations),
        loads=tuple(loads),
    )
    check_plan(plan, source)
    source.raise_if_mistaken()
    return plan


def _loads(source: Source, entries: object) -> list[Load]:
    loads: list[Load] = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        section = source.section(LoadSection, entry, ("loads", index))
        if section is None:
            continue
        for prompt in section.prompt:
            for clients in section.clients:
                load = Load(clients, prompt, section.output, section.waves, section.waiting)
                if load.name in (one.name for one in loads):
                    source.refuse(("loads", index), f"repeats {load.name}")
                loads.append(load)
    return loads


def _configurations(source: Source, entries: object, max_len: int) -> list[Configuration]:
    found: list[Configuration] = []
    references: dict[str, str] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        place: Place = ("configurations", index)
        if isinstance(entry, dict) and "checkpoint" in entry:
            checkpoint = source.section(Checkpoint, entry, place)
            one = checkpoint and read_checkpoint(checkpoint, place, source)
            found += [one] if one else []
            continue
        shape = source.section(Shape, entry, place)
        if shape is not None:
            expanded = list(expand(shape, place, source, max_len))
            found += expanded
            if shape.same_parameters_as is not None:
                references |= {one.name: shape.same_parameters_as for one in expanded}
    for name, count in Counter(one.name for one in found).items():
        if count > 1:
            last = [one for one in found if one.name == name][-1]
            source.refuse(last.place, f"is another {name!r}; allowed: names that differ")
    if len(found) > MAX_CONFIGURATIONS:
        source.refuse(
            ("configurations",),
            f"are {len(found)}; allowed: at most {MAX_CONFIGURATIONS}",
        )
        return []
    return same_parameters(found, references, source)


def _engine(source: Source, entries: dict[str, Any], loads: Iterable[Load]) -> EngineConfig | None:
    section = source.section(EngineSection, entries.get("engine", {}), ("engine",))
    if section is None:
        return None
    most = max((load.clients for load in loads), default=1)
    most_tokens = max((load.clients * (load.prompt + load.output) for load in loads), default=1)
    max_num_seqs = section.max_num_seqs or most
    try:
        return EngineConfig(
            block_size=section.block_size,
            kv_cache_bytes=section.kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(section.max_num_batched_tokens, max_num_seqs),
            max_waiting_requests=most,
            max_waiting_tokens=most_tokens,
            num_threads=section.num_threads or len(os.sched_getaffinity(0)),
        )
    except ValueError as error:
        source.refuse(("engine",), str(error))
        return None
