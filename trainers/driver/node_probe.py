"""Runs functions on every machine of a cluster, and measures clocks and transfers between machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamfleet.datasets.environment import apply_variables
from dreamfleet.datasets.storage.probe import probe_storage
from dreamfleet.trainers.driver import node_facts
from dreamfleet.trainers.driver.session import Node

SECONDS = 120
TRANSFER_BYTES = 256 * 2**20
CLOCK_CALLS = 5


@dataclass(frozen=True)
class Failed:
    """The reason why a machine gave no answer."""

    reason: str


@dataclass(frozen=True)
class Transfer:
    """Bytes sent between two machines through Ray's object store, and the seconds that it took."""

    source: Node
    target: Node
    size: int
    seconds: float


class Probes:
    """One actor on every machine, without reserved resources; they end with :meth:`close`."""

    def __init__(self, nodes: Sequence[Node]):
        import ray
        from ray import cloudpickle
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cloudpickle.register_pickle_by_value(node_facts)
        self.nodes = list(nodes)
        facts, read_clock = node_facts.node_facts, node_facts.now

        class Probe:  # defined here, so that it is sent by value too
            def facts(self) -> dict[str, Any]:
                return facts()

            def now(self) -> float:
                return read_clock()

            def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
                return function(*arguments)

            def make(self, size: int) -> Any:
                return bytearray(size)

            def receive(self, box: list[Any]) -> tuple[int, float]:
                import time as clock

                import ray as here

                began = clock.perf_counter()
                content = here.get(box[0])
                return len(content), clock.perf_counter() - began

        actor = ray.remote(num_cpus=0, max_restarts=0)(Probe)
        self._actors = {
            node.node_id: actor.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ).remote()
            for node in self.nodes
        }

    def close(self) -> None:
        """End the actors."""
        import ray
        from ray import cloudpickle

        for actor in self._actors.values():
            ray.kill(actor)
        cloudpickle.unregister_pickle_by_value(node_facts)

    def facts(self) -> dict[Node, dict[str, Any] | Failed]:
        """Return what :func:`node_facts.node_facts` finds on every machine."""
        return self._gather({node: self._actors[node.node_id].facts.remote() for node in self.nodes})

    def storage(self, url: str, sent: Mapping[str, str]) -> dict[Node, dict[str, Any] | Failed]:
        """Return what :func:`probe_storage` finds on every machine; ``sent`` holds secrets, which are not logged."""
        asked = {}
        for number, node in enumerate(self.nodes):
            asked[node] = self._actors[node.node_id].call.remote(
                _probe_there, url, f"node-{number}", dict(sent)
            )
        return self._gather(asked)

    def clock_offsets(self) -> dict[Node, tuple[float, float] | Failed]:
        """Return for every machine its clock minus this one's, and the uncertainty, in seconds."""
        return {node: self._clock_offset(node) for node in self.nodes}

    def transfers(self, size: int = TRANSFER_BYTES) -> list[Transfer | Failed]:
        """Send ``size`` bytes from each machine to the next, one after the other; [] for a single machine."""
        if len(self.nodes) < 2:
            return []
        ring = zip(self.nodes, [*self.nodes[1:], self.nodes[0]], strict=True)
        return [self._transfer(source, target, size) for source, target in ring]

    def _clock_offset(self, node: Node) -> tuple[float, float] | Failed:
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_CALLS):
            before = time.time()
            there = _answer(self._actors[node.node_id].now.remote())
            after = time.time()
            if isinstance(there, Failed):
                return there
            uncertainty = (after - before) / 2
            if best is None or uncertainty < best[1]:
                best = there - (before + after) / 2, uncertainty
        assert best is not None
        return best

    def _transfer(self, source: Node, target: Node, size: int) -> Transfer | Failed:
        made = self._actors[source.node_id].make.remote(size)
        found = _answer(self._actors[target.node_id].receive.remote([made]))
        if isinstance(found, Failed):
            return Failed(f"{source.address} to {target.address}: {found.reason}")
        return Transfer(source, target, *found)

    @staticmethod
    def _gather(asked: Mapping[Node, Any]) -> dict[Node, Any]:
        return {node: _answer(reference) for node, reference in asked.items()}


def _answer(reference: Any) -> Any:
    """Return the result of a call; Failed with the reason of an error."""
    import ray

    try:
        return ray.get(reference, timeout=SECONDS)
    except ray.exceptions.GetTimeoutError:
        return Failed(f"no answer within {SECONDS} seconds")
    except ray.exceptions.RayError as error:
        return Failed(str(error).strip().splitlines()[-1][:300])


def _probe_there(url: str, name: str, sent: dict[str, str]) -> dict[str, Any]:
    apply_variables(sent)
    return probe_storage(url, name)
