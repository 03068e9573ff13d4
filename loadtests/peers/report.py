"""One table of what was measured."""

import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from loadtests.peers.environments import OURS, PEERS
from loadtests.peers.samples import Sample
from service.bench import machine

RESULTS = Path(__file__).parents[1] / "results" / "peers"


def write_report(
    folder: Path, samples: Sequence[Sample], ready: dict[str, dict[str, Any]], command: str
) -> str:
    """Write `peers.json` and `peers.md`; gives the latter."""
    rows = _rows(samples)
    document = {
        "date": date.today().isoformat(),
        "command": command,
        "machine": machine(torch.device("cpu")),
        "rounds": 1 + max(sample.key.round for sample in samples),
        "peers": ready,
        "rows": rows,
    }
    (folder / "peers.json").write_text(json.dumps(document, indent=1) + "\n")
    text = _markdown(document)
    (folder / "peers.md").write_text(text)
    return text


def _rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    rows = []
    points = dict.fromkeys(sample.key[:3] for sample in samples)
    for layers, kv_heads, load in points:
        here = [sample for sample in samples if sample.key[:3] == (layers, kv_heads, load)]
        for peer in dict.fromkeys(sample.key.peer for sample in here):
            rates = _rates(here, peer)
            ours = _rates(here, peer if peer in OURS else PEERS[peer].against)
            starts = [
                sample.equal_starts
                for sample in here
                if sample.key.peer == peer and sample.equal_starts is not None
            ]
            rows.append(
                {
                    "layers": layers,
                    "kv_heads": kv_heads,
                    "load": load,
                    "peer": peer,
                    "tokens_per_s": round(statistics.median(rates), 1),
                    "range": [round(min(rates), 1), round(max(rates), 1)],
                    "ours_over_this": round(statistics.median(ours) / statistics.median(rates), 2),
                    "equal_starts": round(statistics.mean(starts), 3) if starts else None,
                }
            )
    return rows


def _rates(samples: Sequence[Sample], peer: str) -> list[float]:
    return [sample.tokens_per_s for sample in samples if sample.key.peer == peer]


def _markdown(document: dict[str, Any]) -> str:
    machine, rows = document["machine"], document["rows"]
    lines = [
        f"# Peers, {document['date']}",
        "",
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads; "
        f"all loaded at once, one at a time running; {document['rounds']} interleaved rounds. "
        "Output tokens per second of whole runs (sequences x prompt + output tokens): medians, "
        "ranges in brackets, and how many times as fast our engine is; ours with weights of 8 bits "
        "is compared with theirs. All others compute in bfloat16, but CTranslate2 in float32.",
        "",
        f"`{document['command']}`",
    ]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    for layers, kv_heads in dict.fromkeys((row["layers"], row["kv_heads"]) for row in rows):
        here = {
            (row["peer"], row["load"]): row
            for row in rows
            if (row["layers"], row["kv_heads"]) == (layers, kv_heads)
        }
        lines += [
            "",
            f"## {kv_heads} key/value heads of 12, {layers} layers",
            "",
            "| | " + " | ".join(loads) + " | same first token |",
            "|---" * (len(loads) + 2) + "|",
        ]
        for peer in dict.fromkeys(peer for peer, _ in here):
            cells = [_cell(here.get((peer, load))) for load in loads]
            starts = [here[peer, load]["equal_starts"] for load in loads if (peer, load) in here]
            known = [share for share in starts if share is not None]
            share = f"{statistics.mean(known):.0%}" if known else "–"
            lines.append(f"| {peer} | {' | '.join(cells)} | {share} |")
    lines += ["", "| | versions | loaded after, s |", "|---|---|---|"]
    for peer, facts in document["peers"].items():
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        lines.append(f"| {peer} | {versions} | {facts['seconds_to_ready']} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    low, high = row["range"]
    ratio = "" if row["peer"] in OURS else f", **{row['ours_over_this']:.2f}**"
    return f"{row['tokens_per_s']:.0f} ({low:.0f} to {high:.0f}){ratio}"
