"""What Prometheus reads of metrics."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


def samples(metrics: Collector) -> Samples:
    """Return what Prometheus reads, by its strict parser."""
    registry = CollectorRegistry()
    registry.register(metrics)
    generate_latest(registry)
    families = text_string_to_metric_families(generate_openmetrics(registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
