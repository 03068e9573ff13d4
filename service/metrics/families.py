"""Numbers by label values, as families of prometheus-client."""

from collections.abc import Mapping
from typing import TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric

from service.metrics.histogram import Histogram

# Values of the labels, in their order.
Key: TypeAlias = tuple[str, ...]


def counter(
    name: str, text: str, values: Mapping[Key, float], labels: tuple[str, ...] = ()
) -> Metric:
    """A counter, without its suffix `_total`."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def gauge(
    name: str, text: str, values: Mapping[Key, float], labels: tuple[str, ...] = ()
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def histogram(
    name: str, text: str, values: Mapping[Key, Histogram], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value.buckets(), value.sum)  # type: ignore[arg-type]
    return family


def info(name: str, text: str, facts: Mapping[str, str]) -> Metric:
    """Facts as labels of a series that is always 1; without its suffix `_info`."""
    return InfoMetricFamily(name, text, value=dict(facts))
