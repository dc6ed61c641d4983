"""Prometheus' text format for processes that must start fast: a dozen lines instead of a library.

Services with many metrics use `excimer.service.metrics`. The format is
https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class PlainMetric:
    """One sample. Samples of one name follow each other."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def render_plain(metrics: Iterable[PlainMetric]) -> bytes:
    lines = []
    previous = ""
    for metric in metrics:
        if metric.name != previous:
            lines.append(f"# HELP {metric.name} {_escape(metric.description)}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            previous = metric.name
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in metric.labels.items())
        lines.append(
            f"{metric.name}{{{labels}}} {metric.value!r}" if labels else f"{metric.name} {metric.value!r}"
        )
    return "".join(line + "\n" for line in lines).encode()


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
