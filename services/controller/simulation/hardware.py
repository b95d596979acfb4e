"""What simulated hosts and models are made of: capacities, bandwidths, and how long a model computes.

Service times are a roofline: decoding reads all weights once a token, prefill does two operations per
parameter and token. The two efficiencies are fitted to measurements (Vidur's operator times of Llama-2-7b on
an A40, plus 10 % for attention: 26 ms a token, 285 ms for 2,048 prompt tokens) and hold within 10 % for
CodeLlama-34b at two and four devices from the same source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stoker.ids import ModelName
from stoker.units import GB

MEMORY_SHARE = 0.735
"""Of a device's memory bandwidth that decoding reaches."""
COMPUTE_SHARE = 0.64
"""Of a device's half-precision peak that prefill reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A GPU: bytes, bytes per second, floating-point operations per second."""

    kind: str
    memory_bytes: int
    memory_bytes_per_second: float
    operations_per_second: float
    bus_bytes_per_second: float
    """Host to device, pinned."""


A40 = DeviceSpec(
    kind="A40",
    memory_bytes=48 * GB,
    memory_bytes_per_second=696 * GB,
    operations_per_second=149.7e12,
    bus_bytes_per_second=25 * GB,
)
H100 = DeviceSpec(
    kind="H100",
    memory_bytes=80 * GB,
    memory_bytes_per_second=3350 * GB,
    operations_per_second=989e12,
    bus_bytes_per_second=55.5 * GB,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A host.

    Attributes:
        device: Its kind of device.
        device_count: How many.
        dram_bytes: Memory for checkpoints.
        disk_bytes: Local disk for checkpoints.
        disk_bytes_per_second: Reading.
        network_bytes_per_second: Payload, each way.
        worker_start_seconds: A worker that was not pre-started.
        overhead_seconds: Of every start: attaching, skeleton, first pass; not bytes.
    """

    device: DeviceSpec
    device_count: int
    dram_bytes: int
    disk_bytes: int
    disk_bytes_per_second: float
    network_bytes_per_second: float
    worker_start_seconds: float = 0.0
    overhead_seconds: float = 0.1


PAPER_NODE = NodeSpec(
    device=A40,
    device_count=4,
    dram_bytes=400 * GB,
    disk_bytes=4000 * GB,
    disk_bytes_per_second=6.5 * GB,
    network_bytes_per_second=1.18 * GB,
)
"""One of the four servers of ServerlessLLM's scheduling experiments (OSDI '24, section 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that is served.

    Attributes:
        name: Its name.
        weight_bytes: Of its checkpoint.
        parameters: Count.
        kv_bytes_per_token: Cache of one token.
        concurrency: Sessions per replica at a time.
        max_replicas: Never more than these.
        keep_alive_seconds: An unused replica lives this long; None = as long as a load from disk takes (the
            paper's rule), under every policy alike.
    """

    name: ModelName
    weight_bytes: int
    parameters: int
    kv_bytes_per_token: int
    concurrency: int = 1
    max_replicas: int = 1_000_000
    keep_alive_seconds: float | None = None

    def kept_seconds(self, node: NodeSpec) -> float:
        """Return how long an unused replica is kept on such a node."""
        if self.keep_alive_seconds is not None:
            return self.keep_alive_seconds
        return self.weight_bytes / node.disk_bytes_per_second

    def devices_on(self, device: DeviceSpec) -> int:
        """Return how many devices hold the weights and a context of cache."""
        context_tokens = 2048
        need_bytes = self.weight_bytes + self.concurrency * context_tokens * self.kv_bytes_per_token
        return max(1, math.ceil(need_bytes / (0.95 * device.memory_bytes)))

    def prefill_seconds(self, device: DeviceSpec, tokens: int) -> float:
        """Return how long `tokens` prompt tokens take, at least one pass over the weights."""
        compute = self.compute_seconds(device, tokens, self.devices_on(device))
        return max(compute, self.token_seconds(device))

    def compute_seconds(self, device: DeviceSpec, tokens: int, count: int) -> float:
        """Return how long the operations of `tokens` prompt tokens take on so many devices."""
        return 2 * self.parameters * tokens / (COMPUTE_SHARE * device.operations_per_second * count)

    def token_seconds(self, device: DeviceSpec) -> float:
        """Return how long one more token takes."""
        count = self.devices_on(device)
        return self.weight_bytes / (MEMORY_SHARE * device.memory_bytes_per_second * count)


OPT_SIZES: dict[str, tuple[int, int, int]] = {
    "opt-6.7b": (13_316_947_968, 6_658_473_984, 524_288),
    "opt-13b": (25_706_946_560, 12_853_473_280, 819_200),
    "opt-30b": (59_949_080_576, 29_974_540_288, 1_376_256),
}
"""Weight bytes (fp16), parameters, cache bytes per token; from the models' published configurations."""


def opt_models(size: str, count: int) -> list[ModelSpec]:
    """Return `count` models of one of the paper's sizes, named `opt-6.7b-00` and so on."""
    weight_bytes, parameters, kv_bytes = OPT_SIZES[size]
    return [
        ModelSpec(
            name=ModelName(f"{size}-{index:02d}"),
            weight_bytes=weight_bytes,
            parameters=parameters,
            kv_bytes_per_token=kv_bytes,
        )
        for index in range(count)
    ]
