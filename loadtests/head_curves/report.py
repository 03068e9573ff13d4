"""What was measured as pictures and tables."""

import math
from statistics import fmean
from typing import Any

from loadtests.head_curves.removal import COMPARED
from models.train.chart import Line, line_chart

_LOSS = "held-out loss, nats per token"
_METHODS = {
    ("first", False): ("first head", "#EE6677", "2 3"),
    ("mean", False): ("mean", "#CCBB44", "7 3"),
    ("align", False): ("aligned, then mean", "#4477AA", ""),
    ("align", True): ("aligned, uptrained", "#228833", ""),
}
_RANKINGS = {
    "ablation": ("#4477AA", ""),
    "gradient": ("#228833", "7 3"),
    "gates": ("#AA3377", ""),
    "entropy": ("#EE6677", "2 3"),
    "weights": ("#CCBB44", "7 3"),
}


def kv_bytes_picture(document: dict[str, Any]) -> str:
    """Loss against bytes of the key/value cache per token, an SVG."""
    points = document["merging"]
    lines: list[Line] = []
    for (method, is_uptrained), look in _METHODS.items():
        own = _merged(points, method, is_uptrained=is_uptrained)
        if own:
            places = [(point["kv_bytes_per_token"], point["loss"]) for point in own]
            name, colour, dashes = look
            lines.append(Line(name, places, colour, dashes))
    return line_chart(
        lines,
        title=f"{document['model']}: key/value heads merged",
        x_name=f"bytes of keys and values per token ({_head_counts(points)} key/value heads)",
        y_name=_LOSS,
        x_ticks=sorted({point["kv_bytes_per_token"] for point in points}),
        y_from=math.floor(min(point["loss"] for point in points)),
        log_x=True,
    )


def heads_removed_picture(document: dict[str, Any]) -> str:
    """Loss against heads removed by each ranking, draws as a band, an SVG."""
    removal = document["removal"]
    counts, drawn = removal["counts"], list(zip(*removal["drawn"], strict=True))
    lines = [
        Line(
            f"random, mean of {len(removal['drawn'])}",
            list(zip(counts, map(fmean, drawn), strict=True)),
            "#777777",
            band=[(min(losses), max(losses)) for losses in drawn],
        )
    ]
    for name, (colour, dashes) in _RANKINGS.items():
        points = list(zip(counts, removal["losses"][name], strict=True))
        lines.append(Line(name, points, colour, dashes))
    return line_chart(
        lines,
        title=f"{document['model']}: heads removed, the least important first",
        x_name=f"key/value heads removed, of {document['num_heads']}",
        y_name=_LOSS,
        x_ticks=counts,
        y_from=math.floor(min(map(min, (*removal["losses"].values(), *removal["drawn"])))),
    )


def markdown(document: dict[str, Any]) -> str:
    """Both tables, and which rankings are better than draws."""
    machine = document["machine"]
    lines = [
        f"# Loss against heads, {document['date']}",
        "",
        f"{document['model']}, {document['heads']}; losses in nats per token of "
        f"{document['held_out_tokens']:,} held-out tokens of {document['text']}, calibrated and "
        f"ranked with {document['calibration_tokens']:,} others. The original's loss is "
        f"{document['original_loss']:.4f}. {machine['cpu']}, threads: {machine['threads']}, torch "
        f"{machine['torch']}, Python {machine['python']}.",
        "",
        f"`{document['command']}`",
        "",
        "## Key/value heads merged",
        "",
        "![loss against bytes per token](kv-bytes.svg)",
        "",
        *_merging_table(document),
        "",
        "## Heads removed",
        "",
        "![loss against heads removed](heads-removed.svg)",
        "",
        *_removal_table(document["removal"]),
        "",
        *_verdict(document["removal"]),
    ]
    return "\n".join(lines) + "\n"


def beaten_draws(removal: dict[str, Any], ranking: str) -> list[int]:
    """How many of the draws cost more than a ranking, at each number of heads above 0."""
    drawn = list(zip(*removal["drawn"], strict=True))
    return [
        sum(loss < other for other in others)
        for loss, others in list(zip(removal["losses"][ranking], drawn, strict=True))[1:]
    ]


def lost_counts(removal: dict[str, Any], ranking: str) -> list[int]:
    """Numbers of heads above 0 at which a ranking costs no less than draws do on average."""
    drawn = list(zip(*removal["drawn"], strict=True))
    of_ranking = zip(removal["counts"], removal["losses"][ranking], drawn, strict=True)
    return [count for count, loss, others in list(of_ranking)[1:] if loss >= fmean(others)]


def _merging_table(document: dict[str, Any]) -> list[str]:
    points = document["merging"]
    shown = {
        key: look for key, look in _METHODS.items() if key[1] <= bool(document["uptrain_tokens"])
    }
    names = [name for name, _, _ in shown.values()]
    lines = [
        f"| key/value heads | bytes per token | {' | '.join(names)} |",
        "|" + "---|" * (2 + len(names)),
    ]
    columns = [_merged(points, method, is_uptrained=trained) for method, trained in shown]
    for row in zip(*columns, strict=True):
        losses = " | ".join(f"{point['loss']:.4f}" for point in row)
        lines.append(f"| {row[0]['kv_heads']} | {row[0]['kv_bytes_per_token']:,} | {losses} |")
    if document["uptrain_tokens"]:
        lines += [
            "",
            f"Uptrained: {document['uptrain_tokens']:,} tokens of the text that was calibrated "
            "with; where no heads were merged, the gain is that of more training.",
        ]
    return lines


def _removal_table(removal: dict[str, Any]) -> list[str]:
    lines = [
        f"| heads removed | {' | '.join(COMPARED)} | random: mean of {len(removal['drawn'])} | "
        "lowest | highest |",
        "|" + "---|" * (4 + len(COMPARED)),
    ]
    drawn = zip(*removal["drawn"], strict=True)
    for index, (count, losses) in enumerate(zip(removal["counts"], drawn, strict=True)):
        own = [removal["losses"][name][index] for name in COMPARED]
        cells = [f"{loss:.4f}" for loss in (*own, fmean(losses), min(losses), max(losses))]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    correlations = [f"{removal['spearman'][name]:+.2f}" for name in COMPARED]
    return [*lines, f"| Spearman with ablation | {' | '.join(correlations)} | | | |"]


def _verdict(removal: dict[str, Any]) -> list[str]:
    counts, lines = removal["counts"][1:], list[str]()
    for name in COMPARED:
        lost = lost_counts(removal, name)
        won = [count for count in counts if count not in lost]
        verdict = "beats the mean of the draws at every point"
        if lost and won:
            verdict = (
                f"beats the mean of the draws with {_listed(won)} heads removed, and **not** with "
                f"{_listed(lost)}"
            )
        elif lost:
            verdict = "beats the mean of the draws at **no** point"
        draws = _listed(beaten_draws(removal, name))
        lines.append(f"- `{name}` {verdict}; it beats {draws} of {len(removal['drawn'])} draws.")
    losers = [name for name in COMPARED if lost_counts(removal, name)]
    if losers:
        return [f"**Not every ranking beats random: {', '.join(losers)}.**", "", *lines]
    return ["Every ranking beats random at every point.", "", *lines]


def _merged(
    points: list[dict[str, Any]], method: str, *, is_uptrained: bool
) -> list[dict[str, Any]]:
    return [
        p for p in points if p["method"] == method and bool(p["uptrain_tokens"]) == is_uptrained
    ]


def _head_counts(points: list[dict[str, Any]]) -> str:
    return _listed(sorted({point["kv_heads"] for point in points}))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
