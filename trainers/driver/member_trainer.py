"""A Ray Train trainer whose workers come and go; see :mod:`~dreamfleet.trainers.driver.member_controller`."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer

from dreamfleet.trainers.driver.member_controller import MemberController, scaling_policy
from dreamfleet.trainers.driver.ray_internals import get_env_vars_to_propagate


class LocalTrainer(TorchTrainer):
    """A TorchTrainer without placement group cleaner if Ray is private: such a Ray ends with this process."""

    def __init__(self, *args: Any, private: bool, **kwargs: Any):
        self._private = private
        super().__init__(*args, **kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner takes seconds to start and, without a dashboard, logs a warning every second.
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not self._private or type(callback).__name__ != "PlacementGroupCleanerCallback"
        ]


class MemberTrainer(LocalTrainer):
    """Runs :class:`MemberController`; ``coordinator``: address and key of the run's coordinator."""

    def __init__(self, *args: Any, coordinator: tuple[tuple[str, int], bytes], most: int, **kwargs: Any):
        self._coordinator, self._most = coordinator, most
        super().__init__(*args, **kwargs)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # As Ray's method, but with our controller, and without a handler for SIGINT: it runs in a thread.
        options["scaling_policy"] = scaling_policy(self.scaling_config)
        on_this_node = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        environment = {"env_vars": get_env_vars_to_propagate()}
        kind = ray.remote(num_cpus=0, label_selector=on_this_node, runtime_env=environment)(MemberController)
        controller = kind.remote(coordinator=self._coordinator, most=self._most, **options)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
