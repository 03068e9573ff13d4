"""The results of a run as a page and as a picture."""

from typing import Any

from models.train.chart import Line, line_chart

_COLOURS = ("#4477AA", "#EE6677", "#228833")


def chart(document: dict[str, Any], shape: str, batch: int) -> str | None:
    """Steps of so many sequences by context, and below each line what the bytes would take, as SVG;
    None if two contexts were not measured."""
    rows = [row for row in document["decode"] if (row["shape"], row["batch"]) == (shape, batch)]
    contexts = sorted({row["context"] for row in rows})
    if len(contexts) < 2:
        return None
    lines = []
    heads = dict.fromkeys(row["kv_heads"] for row in rows)
    for colour, kv_heads in zip(_COLOURS, heads, strict=False):
        mine = sorted(
            (row for row in rows if row["kv_heads"] == kv_heads), key=lambda row: row["context"]
        )
        for name, key, dashes in (("", "step_ms", ""), (", bytes", "floor_ms", "4 4")):
            points = [(row["context"], row[key]) for row in mine]
            lines.append(Line(f"{kv_heads} kv heads{name}", points, colour, dashes))
    return line_chart(
        lines,
        title=f"{shape}, {batch} sequences on one {document['machine']['device']}",
        x_name="tokens of each sequence",
        y_name="milliseconds of a step",
        x_ticks=contexts,
        log_x=True,
    )


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"`{document['command']}`, {document['date']}: {machine['device']}, torch "
        f"{machine['torch']}, Triton {document['triton']}; a copy moves "
        f"{document['copy_bandwidth_gb_per_s']:,} GB/s.",
    ]
    if document["correctness"]:
        lines += ["", "| correct | error | allowed | |", "|---|---|---|---|"]
    for row in document["correctness"].get("attention", ()):
        lines.append(
            f"| attention, {row['heads']}, {row['dtype']} | {row['ours']:.2e} "
            f"| {row['bound']:.2e} | {_passed(row)} |"
        )
    for row in document["correctness"].get("products", ()):
        what = f"{row['what']}, {row['rows']} rows, {row['weight']}, {row['dtype']}"
        lines.append(f"| {what} | {row['ours']:.2e} | {row['bound']:.2e} | {_passed(row)} |")
    for row in document["correctness"].get("engine", ()):
        lines.append(
            f"| engine, {row['model']}, {row['backend']} | {row['worst_logit_gap']:.2e} "
            f"| 1.00e-03 | {_passed(row)} |"
        )
    lines += [
        "",
        "| model | sequences x context | step, ms | floor, ms | of the copy's bandwidth "
        "| tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["decode"]:
        lines.append(
            f"| {row['shape']}, {row['kv_heads']} key/value heads | {row['batch']} x "
            f"{row['context']} | {row['step_ms']} | {row['floor_ms']} "
            f"| {row['share_of_copy_bandwidth']} | {row['tokens_per_s']:,} |"
        )
    lines += [
        "",
        "| times as slow as one head | sequences x context | measured | by bytes | off by |",
        "|---|---|---|---|---|",
    ]
    for row in document["ratios"]:
        lines.append(
            f"| {row['shape']}, {row['kv_heads']} | {row['batch']} x {row['context']} "
            f"| {row['measured']} | {row['predicted']} | {row['off_by']:+.1%} |"
        )
    lines += [
        "",
        "| a step of | us | without a kernel, us | kernels |",
        "|---|---|---|---|",
    ]
    for row in document["profile"]:
        lines.append(
            f"| {row['model']}, {row['batch']} x {row['context']} | {row['step_us']} "
            f"| {row['outside_kernels_us']} | {row['kernels_per_step']} |"
        )
    for name, peers in document["peers"].items():
        lines += [
            "",
            f"| {name}: load | ours, tokens/s | transformers {peers['transformers']} "
            "| times as fast |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {load} | {row['headroom']:,} | {row['transformers']:,} | {row['times_as_fast']} |"
            for load, row in peers["tokens_per_s"].items()
        ]
    if document["left_out"]:
        lines += ["", "Left out:", "", *(f"- {line}" for line in document["left_out"])]
    return "\n".join(lines) + "\n"


def _passed(row: dict[str, Any]) -> str:
    return "yes" if row["passed"] else "NO"
