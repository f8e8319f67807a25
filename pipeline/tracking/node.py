"""What a node does beside its tensors: processors, memory, disk, network, GPUs, by MLflow's own meters."""

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import psutil


class NodeMonitor:
    """Reads this node's meters at each log interval; in one process of each node.

    Args:
        active: False on every other rank, whose readings are empty.
    """

    def __init__(self, active: bool) -> None:
        self._process = psutil.Process()
        self._meters: list[Any] = _meters() if active else []
        self.read()  # a processor's use is that since the reading before

    def read(self) -> dict[str, float]:
        """MLflow's names: `cpu_utilization_percentage`, `gpu_0_utilization_percentage`, …."""
        found: dict[str, float] = {}
        for meter in self._meters:
            meter.collect_metrics()
            found |= meter.aggregate_metrics()
            meter.clear_metrics()
        return found

    def host_bytes(self) -> int:
        """Memory of the node that this process holds."""
        return int(self._process.memory_info().rss)


def _meters() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    meters = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA driver, or no library that asks it
        meters.append(GPUMonitor())
    return meters


def node_name() -> str:
    return os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or platform.node()


def system_metrics(by_node: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """As MLflow's pages look for them: `system/…`, with several nodes `system/NODE/…`.

    Args:
        by_node: name and reading of each rank; the readings of ranks that read nothing are empty.
    """
    read = [(name, values) for name, values in by_node if values]
    if len(read) == 1:
        return {f"system/{key}": value for key, value in read[0][1].items()}
    return {f"system/{name}/{key}": value for name, values in read for key, value in values.items()}
