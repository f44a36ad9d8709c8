"""The description of a cluster for `plan --cluster`: GPUs, links, storage, and how often a node fails."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from dreamfleet.datasets.errors import ResourceError

EXAMPLE = "64xH100@400Gb,per_node=8,mtbf=150d"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, after its data sheet.

    ``flops``: dense 16-bit matrix operations per second; ``bus``: bytes per second between the GPUs of a node, in each
    direction: NVLink where the GPU has it, else PCIe; ``host``: bytes per second to the host's memory.
    """

    name: str
    flops: float
    bus: float
    host: float


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("B200", 2.25e15, 900e9, 54e9),
        Gpu("H200", 9.89e14, 450e9, 54e9),
        Gpu("H100", 9.89e14, 450e9, 54e9),  # host: measured, benchmarks/results/gpu.json
        Gpu("A100", 3.12e14, 300e9, 25e9),
        Gpu("L40S", 3.62e14, 25e9, 25e9),
        Gpu("4090", 1.65e14, 25e9, 25e9),
        Gpu("V100", 1.25e14, 150e9, 12e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes; rates in bytes per second, times in seconds.

    ``link``: a node's network in each direction, all its cards together; ``bus``: between the GPUs of a node;
    ``latency``: of one message on the network, and ``bus_latency`` inside a node. ``mtbf``: mean time between two
    failures of one node, infinite for none. ``storage``: what the storage of checkpoints takes from one writer.
    ``restart``: from a failure to the next new step when all workers start again, without reading the model and the
    checkpoint; ``regroup``: when the survivors keep their state. ``overlap``: share of the backward pass (for ZeRO-3 of
    both passes) during which communication proceeds. ``utilisation``: share of the data sheet's operations per second
    that training reaches. ``step``: seconds that a GPU computes in one step; None: from the operations of the model.
    """

    gpus: int
    gpu: Gpu = GPUS["h100"]
    per_node: int = 8
    link: float = 400e9 / 8
    bus: float | None = None
    latency: float = 10e-6
    bus_latency: float = 2e-6
    mtbf: float = 150 * 86_400.0  # 6.5 failures in 1,000 node-days: Kokolis et al. 2024, arXiv:2410.21680
    storage: float = 1e9
    restart: float = (
        25.0  # a killed worker in the laboratory on a busy host: 26 s, with a model of 8 M parameters
    )
    regroup: float = 5.0  # assumed; benchmarks/scale.py measures the time in the laboratory
    overlap: float = 0.8
    utilisation: float = 0.19  # measured: 24% of 792 TFLOP/s on an H100, benchmarks/results/gpu.json
    step: float | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.gpus / self.per_node)

    @property
    def rate(self) -> float:
        """Bytes per second that a ring over all GPUs carries: those of its slowest edge."""
        inside = self.gpu.bus if self.bus is None else self.bus
        return inside if self.nodes == 1 else min(inside, self.link)

    @property
    def circle(self) -> float:
        """Seconds of a small message from GPU to GPU once around the ring, which crosses each node's network once."""
        crossings = self.nodes if self.nodes > 1 else 0
        return (self.gpus - crossings) * self.bus_latency + crossings * self.latency

    @property
    def all_reduce_wait(self) -> float:
        """Seconds of a small all-reduce: twice around the ring, or up and down NCCL's tree of nodes if that is less."""
        members = min(self.gpus, self.per_node)
        tree = math.ceil(math.log2(self.nodes)) * self.latency + (members - 1) * self.bus_latency
        return 2 * min(self.circle, tree)

    @property
    def all_to_all_wait(self) -> float:
        """Seconds of a small all-to-all: one message after the other to every GPU, and the way of the last."""
        return (self.gpus - 1) * self.bus_latency + (self.latency if self.nodes > 1 else 0.0)

    def all_to_all_seconds(self, size: float) -> float:
        """Return the seconds in which each GPU sends an equal part of ``size`` bytes to each GPU.

        A part for another node crosses its own node's link, which all GPUs of the node share; a ring crosses it once.
        """
        inside = size * (self.gpus - 1) / self.gpus / (self.gpu.bus if self.bus is None else self.bus)
        members = min(self.gpus, self.per_node)
        across = members * size * (self.gpus - members) / self.gpus / self.link
        return max(inside, across)

    @property
    def failure_interval(self) -> float:
        """Mean seconds between two failures of any node."""
        return self.mtbf / self.nodes

    def of(self, gpus: int) -> Cluster:
        """Return the same cluster with another number of GPUs."""
        return replace(self, gpus=gpus)


def parse_cluster(text: str) -> Cluster:
    """Return the cluster that ``64xH100@400Gb,per_node=8,mtbf=150d`` describes.

    The first part is GPUs, kind (default H100) and a node's link; each may be given as ``gpus=``, ``gpu=`` and
    ``link=`` instead. Raises ResourceError, which names the faulty part, and what it may be.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    settings: dict[str, str] = {}
    if "=" in first:
        rest.insert(0, first)
    else:
        head = re.fullmatch(r"(\d+)(?:x(\w+))?(?:@(.+))?", first)
        if head is None:
            raise ResourceError(f"--cluster {first!r} is no cluster; write it like {EXAMPLE}")
        named = dict(zip(("gpus", "gpu", "link"), head.groups(), strict=True))
        settings = {name: value for name, value in named.items() if value is not None}
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals or name not in READERS:
            near = get_close_matches(name, READERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(READERS)}"
            raise ResourceError(f"--cluster: {part!r} is not known; {hint}")
        if name in settings:
            raise ResourceError(f"--cluster: {name} is given twice")
        settings[name] = value
    if "gpus" not in settings:
        raise ResourceError(f"--cluster {text!r} names no number of GPUs; write it like {EXAMPLE}")
    return Cluster(**{name: READERS[name](name, value) for name, value in settings.items()})  # type: ignore[arg-type]


def _count(name: str, text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ResourceError(f"--cluster {name}={text!r} is no number above 0")
    return int(text)


def _share(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ResourceError(f"--cluster {name}={text!r} is no number from 0 to 1")
    return value


def _gpu(name: str, text: str) -> Gpu:
    if text.lower() not in GPUS:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ResourceError(f"--cluster: no figures of the GPU {text!r}; known are {known}")
    return GPUS[text.lower()]


def _rate(name: str, text: str) -> float:
    """Return bytes per second of ``400Gb`` (bits, as links are sold) or ``50GB`` (bytes); ``/s`` may follow."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(b|B)(?:/s|ps)?", text)
    if match is None or float(match[1]) == 0:
        raise ResourceError(
            f"--cluster {name}={text!r} is no rate; write it like 400Gb (bits) or 50GB (bytes) a second"
        )
    return float(match[1]) * 1000 ** ("KMGT".index(match[2]) + 1) / (8 if match[3] == "b" else 1)


def _time(name: str, text: str) -> float:
    """Return the seconds of ``90s``, ``5m``, ``12h``, ``150d``, ``20us`` or ``never``."""
    if text == "never":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|m|h|d)", text)
    if match is None or (float(match[1]) == 0 and name == "mtbf"):
        raise ResourceError(
            f"--cluster {name}={text!r} is no time; write it like 20us, 0.4s, 5m, 12h or 150d"
        )
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


READERS: dict[str, Callable[[str, str], object]] = {
    "gpus": _count,
    "gpu": _gpu,
    "link": _rate,
    "per_node": _count,
    "bus": _rate,
    "latency": _time,
    "bus_latency": _time,
    "mtbf": _time,
    "storage": _rate,
    "restart": _time,
    "regroup": _time,
    "overlap": _share,
    "utilisation": _share,
    "step": _time,
}
