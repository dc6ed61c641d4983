"""The node's metrics."""

from excimer.compute_node.shell import ComputeNode
from excimer.service.plain_metrics import PlainMetric, render_plain


def read_metrics(node: ComputeNode, capacity: int) -> bytes:
    name = "excimer_compute_node"
    return render_plain(
        [
            PlainMetric(f"{name}_awake", "gauge", "Endpoints whose manager runs", node.awake),
            PlainMetric(f"{name}_capacity", "gauge", "How many may", capacity),
            PlainMetric(f"{name}_starting", "gauge", "Starts under way", node.starting),
            PlainMetric(f"{name}_waiting", "gauge", "Starts that wait for others", node.waiting),
            PlainMetric(f"{name}_starts_total", "counter", "Managers forked", node.starts),
            PlainMetric(
                f"{name}_failed_starts_total", "counter", "Starts that came to nothing", node.failures
            ),
            PlainMetric(f"{name}_ends_total", "counter", "Managers that ended", node.ends),
        ]
    )
