"""PromQL of the dashboard, narrowed by what is chosen in it."""

TARGETS = 'job=~"$job",application=~"$application",instance=~"$instance"'
SERIES = f'{TARGETS},model=~"$model",head_config=~"$head_config"'
DECODE = ',phase="decode"'


def rate(metric: str, matchers: str = "") -> str:
    """Per second; Grafana chooses a window of at least four scrapes."""
    return f"rate({metric}{{{SERIES}{matchers}}}[$__rate_interval])"


def per_config(expr: str, *labels: str) -> str:
    """The sum of each model and head configuration, and of the labels besides."""
    return f"sum by ({', '.join(('model', 'head_config', *labels))}) ({expr})"


def ratio(numerator: str, denominator: str, *labels: str) -> str:
    return f"{per_config(numerator, *labels)} / {per_config(denominator, *labels)}"


def mean(histogram: str, matchers: str = "", *labels: str) -> str:
    """Mean of what a histogram observed: its sum by its count."""
    total, count = (rate(f"{histogram}_{part}", matchers) for part in ("sum", "count"))
    return ratio(total, count, *labels)


def quantile(q: float, histogram: str, *labels: str) -> str:
    buckets = per_config(rate(f"{histogram}_bucket"), "le", *labels)
    return f"histogram_quantile({q}, {buckets})"
