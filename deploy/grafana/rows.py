"""What the dashboard shows.

Almost everything is grouped by model and head configuration, so that two applications of one
server can be read side by side.
"""

from deploy.grafana.panels import (
    CONFIGURATION,
    Panel,
    Query,
    bars,
    graph,
    heatmap,
    quantiles,
    stat,
    table,
)
from deploy.grafana.processes import PROCESS, RPC
from deploy.grafana.promql import DECODE, SERIES, TARGETS, mean, per_config, quantile, rate, ratio

_BY_PHASE = f"{{{{phase}}}} {CONFIGURATION}"
_FINISHED = "headroom_request_success_total"
_GENERATED = "headroom_generation_tokens_total"
_TTFT = "headroom_time_to_first_token_seconds"
_ITL = "headroom_inter_token_latency_seconds"
_STEP = "headroom_step_duration_seconds"
_KV_BYTES = "headroom_step_kv_bytes_total"
_HANDLED = "grpc_server_handled_total"
_IN_TIME = ',le="$ttft_target"'
# Health checks are answered even by a server that fails.
_WORK = ',grpc_service=~"headroom.v1.(Generation|Attention)Service"'
# Faults of the server, not of the request.
_FAULTS = f'{_WORK},grpc_code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"'
_COLUMNS = (
    "application, model, head_config, attention, num_layers, num_heads, num_kv_heads, head_dim, "
    "kv_bytes_per_token, num_parameters, family, dtype, device, backend"
)

_OVERVIEW = (
    stat("Requests", "Requests that ended, however.", "reqps", f"sum({rate(_FINISHED)})"),
    stat("Tokens", "Generated tokens per second.", "short", f"sum({rate(_GENERATED)})"),
    stat(
        "Goodput",
        "Requests per second whose first token came within the target chosen above.",
        "reqps",
        f"sum({rate(f'{_TTFT}_bucket', _IN_TIME)})",
    ),
    stat(
        "Error ratio",
        "Calls for work that ended by a fault of the server.",
        "percentunit",
        f"sum({rate(_HANDLED, _FAULTS)}) / sum({rate(_HANDLED, _WORK)})",
        alarm=0.01,
    ),
    stat("Replicas", "Replicas that answered the last scrape.", "short", f"sum(up{{{TARGETS}}})"),
    stat(
        "Alerts",
        "Alerts of deploy/prometheus/alerts.yml that fire, of all applications.",
        "short",
        'count(ALERTS{alertname=~"Headroom.+",alertstate="firing"}) or vector(0)',
        alarm=1,
    ),
    graph(
        "Requests by finish reason",
        "How requests ended.",
        "reqps",
        per_config(rate(_FINISHED), "finish_reason"),
        legend=f"{{{{finish_reason}}}} {CONFIGURATION}",
    ),
    graph(
        "Tokens over time",
        "Prompt tokens read and tokens generated, per second.",
        "short",
        Query(per_config(rate("headroom_prompt_tokens_total")), f"prompt {CONFIGURATION}"),
        Query(per_config(rate(_GENERATED)), f"generated {CONFIGURATION}"),
    ),
    graph(
        "Rejected requests",
        "Requests refused before admission, by reason.",
        "reqps",
        per_config(rate("headroom_requests_rejected_total"), "reason"),
        legend=f"{{{{reason}}}} {CONFIGURATION}",
    ),
)

_LATENCY = (
    quantiles("Time to first token", "From arrival to the first token, queue included.", _TTFT),
    quantiles("Inter-token latency", "Every gap between two tokens of one request.", _ITL),
    quantiles(
        "Time per output token",
        "Mean gap of each request: what one reader sees.",
        "headroom_request_time_per_output_token_seconds",
    ),
    quantiles(
        "End-to-end latency",
        "From arrival to the last token. Grows with the output; compare equal workloads.",
        "headroom_e2e_request_latency_seconds",
    ),
    quantiles(
        "Queue time",
        "From arrival to the first step that works on the request.",
        "headroom_request_queue_time_seconds",
    ),
    graph(
        "Lengths",
        "Mean prompt and output of finished requests, in tokens.",
        "short",
        Query(mean("headroom_request_prompt_tokens"), f"prompt {CONFIGURATION}"),
        Query(mean("headroom_request_generation_tokens"), f"output {CONFIGURATION}"),
    ),
)

# A heatmap draws one histogram, so each model has a row and each head configuration its panels.
_SPREAD = (
    heatmap("Time to first token, $head_config", "Requests in each bucket.", _TTFT),
    heatmap("Inter-token latency, $head_config", "Gaps in each bucket.", _ITL),
)

_ENGINE = (
    graph(
        "Step duration",
        "Mean time of a step. A prefill step computes more than one token of some sequence.",
        "s",
        mean(_STEP, "", "phase"),
        legend=_BY_PHASE,
    ),
    graph(
        "Step duration, p95",
        "The slow steps: long prompts and full batches.",
        "s",
        quantile(0.95, _STEP, "phase"),
        legend=_BY_PHASE,
    ),
    graph(
        "Batch size",
        "Mean number of sequences in a step.",
        "short",
        mean("headroom_batch_size", "", "phase"),
        legend=_BY_PHASE,
    ),
    graph(
        "Running and waiting",
        "Requests in the batch, and requests in the queue.",
        "short",
        Query(per_config(f"headroom_num_requests_running{{{SERIES}}}"), f"running {CONFIGURATION}"),
        Query(per_config(f"headroom_num_requests_waiting{{{SERIES}}}"), f"waiting {CONFIGURATION}"),
    ),
    graph(
        "Steps",
        "Engine steps per second.",
        "ops",
        per_config(rate(f"{_STEP}_count"), "phase"),
        legend=_BY_PHASE,
    ),
    graph(
        "Age of the current step",
        "How long each engine has worked on its step; 0 when idle. Grows without end if it hangs.",
        "s",
        f"headroom_engine_step_age_seconds{{{SERIES}}}",
        legend="{{instance}}",
    ),
)

_KV_CACHE = (
    graph(
        "KV cache in use",
        "Part of the blocks that running requests hold, by replica.",
        "percentunit",
        f"headroom_kv_cache_usage_ratio{{{SERIES}}}",
        legend=f"{CONFIGURATION} {{{{instance}}}}",
        alarm=0.9,
    ),
    graph(
        "Blocks",
        "Blocks by state: held by requests, kept for equal prompt beginnings, free.",
        "short",
        per_config(f"headroom_kv_blocks{{{SERIES}}}", "state"),
        legend=f"{{{{state}}}} {CONFIGURATION}",
    ),
    graph(
        "Preemptions",
        "Requests per second that lost their blocks and are computed again.",
        "ops",
        per_config(rate("headroom_preemptions_total")),
    ),
    graph(
        "Keys and values read",
        "Bytes of keys and values that the steps had to read, per second of wall time.",
        "Bps",
        per_config(rate(_KV_BYTES), "phase"),
        legend=_BY_PHASE,
    ),
    graph(
        "Keys and values read, per second of decode step",
        "Achieved bandwidth. What is missing to the memory's own goes to weights and overhead.",
        "Bps",
        ratio(rate(_KV_BYTES, DECODE), rate(f"{_STEP}_sum", DECODE)),
    ),
    graph(
        "Prefix cache hits",
        "Part of the prompt tokens that were found in the cache; empty while it is off.",
        "percentunit",
        ratio(
            rate("headroom_prefix_cache_hits_total"), rate("headroom_prefix_cache_queries_total")
        ),
    ),
)

_HEAD_CONFIGURATIONS = (
    table(
        "Served models",
        "Heads of every model; kv_bytes_per_token is what one token of context costs.",
        f"max by ({_COLUMNS}) (headroom_model_info{{{SERIES}}})",
    ),
    bars(
        "Tokens by configuration",
        "Generated tokens per second.",
        "short",
        per_config(rate(_GENERATED)),
    ),
    bars(
        "Decode step by configuration",
        "Mean time of a decode step; compare at equal batch size and context.",
        "s",
        mean(_STEP, DECODE),
    ),
    bars(
        "Keys and values read for one token",
        "Bytes read per sequence and decode step: visible context times bytes per token.",
        "bytes",
        ratio(rate(_KV_BYTES, DECODE), rate("headroom_batch_size_sum", DECODE)),
    ),
)

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": _OVERVIEW,
    "Latency": _LATENCY,
    "Latency of $model": _SPREAD,
    "Engine": _ENGINE,
    "KV cache": _KV_CACHE,
    "Head configurations": _HEAD_CONFIGURATIONS,
    "RPC": RPC,
    "Process": PROCESS,
}
