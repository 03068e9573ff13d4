"""What the dashboard shows of calls and of processes, whatever they serve."""

from deploy.grafana.panels import Query, graph
from deploy.grafana.promql import TARGETS, rate

RPC = (
    graph(
        "Calls started",
        "By method.",
        "reqps",
        f"sum by (grpc_method) ({rate('grpc_server_started_total')}) > 0",
        legend="{{grpc_method}}",
        width=6,
    ),
    graph(
        "Calls handled",
        "By method and status code.",
        "reqps",
        f"sum by (grpc_method, grpc_code) ({rate('grpc_server_handled_total')}) > 0",
        legend="{{grpc_method}} {{grpc_code}}",
        width=6,
    ),
    graph(
        "Call duration, p95",
        "By method; of a stream, until it ends.",
        "s",
        "histogram_quantile(0.95, sum by (le, grpc_method) "
        f"({rate('grpc_server_handling_seconds_bucket')}))",
        legend="{{grpc_method}}",
        width=6,
    ),
    graph(
        "Messages",
        "Messages per second; a stream sends one for each step.",
        "ops",
        Query(f"sum({rate('grpc_server_msg_received_total')})", "received"),
        Query(f"sum({rate('grpc_server_msg_sent_total')})", "sent"),
        width=6,
    ),
)

PROCESS = (
    graph(
        "Memory",
        "Resident memory of each replica.",
        "bytes",
        f"process_resident_memory_bytes{{{TARGETS}}}",
        legend="{{instance}}",
    ),
    graph(
        "CPU",
        "Cores that each replica keeps busy.",
        "short",
        f"rate(process_cpu_seconds_total{{{TARGETS}}}[$__rate_interval])",
        legend="{{instance}}",
    ),
    graph(
        "Open files",
        "Open file descriptors of each replica, connections included.",
        "short",
        f"process_open_fds{{{TARGETS}}}",
        legend="{{instance}}",
    ),
)
