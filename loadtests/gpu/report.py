"""The results of a run as a page."""

from typing import Any


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"`{document['command']}`, {document['date']}: {machine['device']}, torch "
        f"{machine['torch']}, Triton {document['triton']}; a copy moves "
        f"{document['copy_bandwidth_gb_per_s']:,} GB/s.",
        "",
        "| correct | error | allowed | |",
        "|---|---|---|---|",
    ]
    for row in document["correctness"].get("attention", ()):
        lines.append(
            f"| attention, {row['heads']}, {row['dtype']} | {row['ours']:.2e} "
            f"| {row['bound']:.2e} | {_passed(row)} |"
        )
    for row in document["correctness"].get("products", ()):
        lines.append(
            f"| {row['what']}, rows: {row['rows']}, {row['dtype']} | {row['ours']:.2e} "
            f"| {row['bound']:.2e} | {_passed(row)} |"
        )
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
