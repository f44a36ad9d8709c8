"""The ``scaling:`` section: the workers of a run and their resources, computed from those of the cluster's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AliasChoices, Field, field_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import ResourceError

Resources = Mapping[str, float]

# More threads hardly speed up one worker's small matrices, and slow it down if they compete with others.
MAX_THREADS = 32


class ScalingConfig(Section):
    """The ``scaling:`` section: workers, their resources, and how often failed ones are restarted."""

    num_workers: Annotated[int, Field(ge=0)] | tuple[int, int] = Field(
        1,
        validation_alias=AliasChoices("num_workers", "num_processes"),
        description="number of training processes, or [min, max]: the run continues with as few as min while machines "
        "are missing, and with more as soon as there is room, at an unchanged global batch (of max workers); 0 = train "
        "in this process, without Ray",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="auto = a GPU for each worker if the cluster has any"
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs reserved for a worker; default: an equal share"
    )
    resources_per_worker: dict[str, float] | None = Field(
        None, description="Ray resources of a worker, such as {CPU: 4, GPU: 1}"
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="how Ray places workers on machines"
    )
    slots_per_worker: int | Literal["auto"] = Field(
        "auto",
        description="trainings of a search or a fleet that share one process and one copy of the frozen model, if the "
        "method allows it; 1 = one after the other; auto = as many as fit, up to 32 on a GPU and 8 on a CPU",
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="failures of workers that are survived between two checkpoints; preemptions do not count, and an "
        "error that repeats at the same step ends the run at once; -1 = no limit",
    )
    hang_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds without progress within a step after which workers are started again; default: 10 times "
        "the slowest of the last 100 steps, at least 60",
    )
    wait_minutes: int = Field(
        15, ge=1, description="minutes that workers wait for busy machines and for machines that are starting"
    )

    @field_validator("num_workers")
    @classmethod
    def _check_range(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and not 1 <= value[0] <= value[1]:
            raise ValueError(
                f"[{value[0]}, {value[1]}] is no range of workers; give [min, max] with 1 <= min <= max, or one number"
            )
        return value

    @property
    def min_workers(self) -> int:
        """The smallest number of training processes that the run continues with; at least 1."""
        return max(1, self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers)

    @property
    def max_workers(self) -> int:
        """The largest number of training processes, which determines the global batch; at least 1."""
        return max(1, self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers < self.max_workers

    @property
    def is_local(self) -> bool:
        """Whether the run trains in the calling process, without Ray."""
        return self.num_workers == 0

    @property
    def pool_size(self) -> int:
        """The number of processes where it does not change, as in searches and for caches; 0: in this process."""
        return 0 if self.is_local else self.max_workers

    @property
    def words(self) -> str:
        """The number of workers as text: ``4``, or ``2 to 4``."""
        if not self.is_elastic:
            return str(self.max_workers)
        return f"{self.min_workers} to {self.max_workers}"


class WorkerShare(NamedTuple):
    """The resources that Ray reserves for one worker, and the number of its torch threads."""

    resources: dict[str, float]
    threads: int

    @property
    def uses_gpu(self) -> bool:
        """Whether the worker uses a GPU."""
        return self.resources.get("GPU", 0) > 0

    @property
    def gpu_share(self) -> float:
        """The worker's fraction of a GPU's memory."""
        return min(1.0, self.resources.get("GPU", 1.0))

    def backend(self, num_workers: int) -> str:
        """Return the torch.distributed backend: NCCL on GPUs; gloo on CPUs and for workers that may share a GPU.

        Ray may place workers with a fraction of a GPU on the same GPU, and NCCL rejects two ranks on one GPU.
        """
        if not self.uses_gpu or (num_workers > 1 and self.gpu_share < 1):
            return "gloo"
        return "nccl"


def worker_resources(
    scaling: ScalingConfig, nodes: Sequence[Resources], *, limit: Resources | None = None
) -> WorkerShare:
    """Return the resources of each worker on a cluster whose machines have ``nodes`` (their total resources).

    ``limit``: the maximum size of an autoscaling cluster; its GPUs count even if no machine has one yet.

    A GPU worker reserves one GPU and one CPU; the other CPUs read and decode images. A CPU worker reserves an equal
    share of the CPUs minus about an eighth (at least one CPU, if it has two) for Ray's own tasks, and uses threads for
    the whole share. The share is that of the largest number of workers. ``resources_per_worker`` and
    ``cpus_per_worker`` override this. Raises ResourceError if GPUs are requested and there are none or too few.
    """
    share = _fair_cpus(nodes, scaling.max_workers)
    wanted = dict(scaling.resources_per_worker or {})
    if "GPU" not in wanted and _wants_gpu(scaling, nodes, limit or {}):
        wanted["GPU"] = 1.0
    uses_gpu = wanted.get("GPU", 0) > 0
    threads = share
    if "CPU" not in wanted:
        if scaling.cpus_per_worker is not None:
            wanted["CPU"] = scaling.cpus_per_worker
            threads = scaling.cpus_per_worker
        elif uses_gpu:
            wanted["CPU"] = min(1.0, share)
        else:
            wanted["CPU"] = share if share < 2 else share - max(1, share // 8)
    else:
        threads = wanted["CPU"] or share
    return WorkerShare(
        {name: amount for name, amount in wanted.items() if amount > 0},
        min(MAX_THREADS, max(1, int(threads))),
    )


def workers_that_fit(resources: Resources, nodes: Sequence[Resources], strategy: str = "PACK") -> int:
    """Return the number of workers with these ``resources`` that fit on idle machines."""
    rooms = [_room(resources, node) for node in nodes]
    if not rooms:
        return 0
    if strategy == "STRICT_PACK":
        return max(rooms)
    if strategy == "STRICT_SPREAD":
        return sum(1 for room in rooms if room > 0)
    return sum(rooms)


def refuse_impossible(
    scaling: ScalingConfig,
    resources: Resources,
    nodes: Sequence[Resources],
    *,
    limit: Resources | None = None,
) -> None:
    """Raise ResourceError if the smallest number of workers can never be placed: Ray would wait for resources forever.

    ``limit``: the maximum size of an autoscaling cluster (totals by resource); None if it does not grow.
    """
    needed = scaling.min_workers
    wanted = f"scaling.num_workers {scaling.words} with {describe(resources)} each"
    if limit:
        for name, amount in resources.items():
            total = amount * needed
            if total > limit.get(name, 0):
                raise ResourceError(
                    f"{wanted} needs {_number(total)} {name}, but this cluster grows to "
                    f"at most {_number(limit.get(name, 0))} {name}. {_remedy(scaling)}"
                )
        return
    fits = workers_that_fit(resources, nodes, scaling.placement_strategy)
    if fits < needed:
        have = "; ".join(describe(node) for node in nodes) or "no machines"
        under = f" under {scaling.placement_strategy}" if "STRICT" in scaling.placement_strategy else ""
        raise ResourceError(
            f"{wanted} does not fit{under}: the cluster has {len(nodes)} machine{'s' * (len(nodes) != 1)} "
            f"({have}), room for {fits} such worker{'s' * (fits != 1)}. {_remedy(scaling)}"
        )


def refuse_shared_gpus(scaling: ScalingConfig, share: WorkerShare, *, engine: str) -> None:
    """Raise ResourceError if workers may share a GPU; ``engine`` is the setting that requires a GPU per worker."""
    if share.uses_gpu and share.backend(scaling.max_workers) == "gloo":
        raise ResourceError(
            f"{engine} needs a whole GPU for each of the {scaling.words} workers, and "
            f"scaling.resources_per_worker gives {_number(share.resources['GPU'])}: use the engine torch "
            "(engine.zero_stage: auto, engine.name: auto), or fewer workers with a GPU each"
        )


def describe(resources: Resources) -> str:
    """Return resources as text, such as ``2 CPU, 1 GPU``, without Ray's internal resources."""
    shown = [
        f"{_number(amount)} {name}"
        for name, amount in sorted(resources.items())
        if name not in ("memory", "object_store_memory") and not name.startswith("node:")
    ]
    return ", ".join(shown) or "nothing"


def _wants_gpu(scaling: ScalingConfig, nodes: Sequence[Resources], limit: Resources) -> bool:
    gpus = max(sum(node.get("GPU", 0) for node in nodes), limit.get("GPU", 0))
    if scaling.use_gpu == "auto":
        if not gpus:
            return False
        if gpus < scaling.min_workers:
            raise ResourceError(
                f"scaling.num_workers {scaling.words} need a GPU each, but the cluster has {_number(gpus)}. "
                f"Set scaling.num_workers={int(gpus) or 1}, or scaling.use_gpu=false to train on CPUs, "
                "or share one GPU with scaling.resources_per_worker='{GPU: 0.5}'."
            )
        return True
    if scaling.use_gpu and not gpus:
        raise ResourceError(
            "scaling.use_gpu is true, but the cluster has no GPU. "
            "Set scaling.use_gpu=false (or auto), or connect to a cluster with GPUs (--address)."
        )
    return bool(scaling.use_gpu)


def _fair_cpus(nodes: Sequence[Resources], num_workers: int) -> float:
    """Return the largest number of whole CPUs with which all workers fit; a fraction if there are fewer CPUs."""
    cpus = [node.get("CPU", 0.0) for node in nodes]
    for share in range(int(max(cpus, default=0)), 0, -1):
        if sum(int(have // share) for have in cpus) >= num_workers:
            return float(share)
    total = sum(cpus)
    # Ray counts resources in units of 0.0001; two decimals, rounded down, keep the sum below the total.
    return max(0.01, int(100 * total / num_workers) / 100) if total else 1.0


def _room(resources: Resources, node: Resources) -> int:
    asked = [(name, amount) for name, amount in resources.items() if amount > 0]
    if not asked:
        return 1_000_000
    return min(int((node.get(name, 0.0) + 1e-9) // amount) for name, amount in asked)


def _remedy(scaling: ScalingConfig) -> str:
    if scaling.resources_per_worker:
        return (
            "Lower scaling.num_workers or scaling.resources_per_worker, or use a larger cluster (--address)."
        )
    if scaling.cpus_per_worker:
        return "Lower scaling.num_workers or scaling.cpus_per_worker, or use a larger cluster (--address)."
    return "Lower scaling.num_workers, or use a larger cluster (--address)."


def _number(amount: float) -> str:
    return f"{amount:g}"
