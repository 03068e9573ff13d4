"""What a server says of itself at its metrics port, as plain numbers that can be subtracted."""

import dataclasses
import http.client
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters of one replica since it started.

    Attributes:
        decode_steps, decode_seconds, decode_sequences, decode_kv_bytes: steps in which every
            sequence computes one token; the sequences in them; the keys and values they read.
        prefill_steps, prefill_seconds: all other steps.
        prompt_tokens, generation_tokens: computed, and given out.
        preemptions: sequences that lost their KV blocks.
    """

    decode_steps: float = 0
    decode_seconds: float = 0
    decode_sequences: float = 0
    decode_kv_bytes: float = 0
    prefill_steps: float = 0
    prefill_seconds: float = 0
    prompt_tokens: float = 0
    generation_tokens: float = 0
    preemptions: float = 0

    def since(self, before: "Counters") -> "Counters":
        """What was counted after `before`."""
        return Counters(
            **{
                field.name: getattr(self, field.name) - getattr(before, field.name)
                for field in dataclasses.fields(Counters)
            }
        )


# The series of each number: its name and, where it has phases, the phase.
_SERIES = {
    ("headroom_step_duration_seconds_count", "decode"): "decode_steps",
    ("headroom_step_duration_seconds_sum", "decode"): "decode_seconds",
    ("headroom_batch_size_sum", "decode"): "decode_sequences",
    ("headroom_step_kv_bytes_total", "decode"): "decode_kv_bytes",
    ("headroom_step_duration_seconds_count", "prefill"): "prefill_steps",
    ("headroom_step_duration_seconds_sum", "prefill"): "prefill_seconds",
    ("headroom_prompt_tokens_total", ""): "prompt_tokens",
    ("headroom_generation_tokens_total", ""): "generation_tokens",
    ("headroom_preemptions_total", ""): "preemptions",
}


def read_counters(port: int) -> Counters:
    """Scrape a loopback port.

    Raises:
        OSError: nothing answers there, or not with metrics.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise OSError(f"127.0.0.1:{port}/metrics answers {response.status}")
    return parse_counters(text)


def parse_counters(text: str) -> Counters:
    """The numbers in a Prometheus text exposition; a series that is missing is 0."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = _SERIES.get((sample.name, sample.labels.get("phase", "")))
            if name is not None:
                values[name] = values.get(name, 0.0) + sample.value
    return Counters(**values)
