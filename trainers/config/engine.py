"""The ``engine:`` section of a recipe: how the parameters are trained, sharded and offloaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from dreamfleet.datasets.config_base import Section
from dreamfleet.datasets.errors import ResourceError
from dreamfleet.datasets.path_field import PathField
from dreamfleet.trainers.config.units import parse_size

# Keys with DeepSpeed's names; those that are set are passed to DeepSpeed.
ZERO_KEYS = (
    "overlap_comm",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
)


class EngineConfig(Section):
    """The ``engine:`` section."""

    name: str = Field(
        "auto",
        exclude_if=lambda name: name == "auto",
        description="auto: torch, or zero where zero_stage or deepspeed_config is given; torch; zero; or the engine of "
        "an installed package",
    )
    options: dict[str, Any] = Field(
        {},
        exclude_if=lambda options: not options,
        description="settings of an engine from an installed package, under that engine's own keys",
    )
    gradient_exchange: Literal["auto", "unit", "step"] = Field(
        "auto",
        exclude_if=lambda how: how == "auto",
        description="when workers exchange gradients (engine torch). unit: after each micro-batch, so that the sum is "
        "equal in every bit on any number of workers; step: once per step, which sends less with gradient "
        "accumulation; auto: unit if scaling.num_workers is a range, else step",
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="auto: torch alone, or the cheapest setting that fits if the GPU is too small for that. 0 to 3: "
        "DeepSpeed, which shards nothing (0), the optimizer states (1), also the gradients (2), also the weights (3) "
        "over "
        "the workers",
    )
    offload_optimizer_device: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: optimizer states and optimizer step in host memory (zero_stage 1 to 3); nvme: the states in "
        "files (zero_stage 3)",
    )
    offload_param_device: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: weights, including frozen ones, in host memory until a layer needs them (zero_stage 3); "
        "nvme: "
        "in files (16 bits only)",
    )
    nvme_path: Annotated[
        str | None, PathField("folder", must_exist=False, compared=False, per_machine=True)
    ] = Field(
        None,
        validation_alias=AliasChoices("nvme_path", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
        description="a folder on a fast local disk of every machine, for offloading to nvme",
    )
    gpu_memory: str | None = Field(
        None,
        description="limit of GPU memory for the run, such as 12GiB; zero_stage: auto plans for it",
    )
    pin_memory: bool | None = Field(
        None, description="page-locked host memory for offloading; default: DeepSpeed's, which is true"
    )
    overlap_comm: bool | None = Field(
        None, description="reduce gradients during the backward pass (DeepSpeed)"
    )
    reduce_bucket_size: int | None = Field(
        None,
        ge=2,
        description="elements per message when gradients are reduced; default: at most 50 million",
    )
    allgather_bucket_size: int | None = Field(
        None, ge=2, description="elements per message when weights are gathered; default: at most 50 million"
    )
    stage3_prefetch_bucket_size: int | None = Field(
        None, ge=0, description="elements of weights that are prefetched (zero_stage 3)"
    )
    stage3_param_persistence_threshold: int | None = Field(
        None, ge=0, description="tensors with fewer elements are not sharded (zero_stage 3)"
    )
    stage3_max_live_parameters: int | None = Field(
        None, ge=0, description="upper limit of gathered weights, in elements (zero_stage 3)"
    )
    stage3_max_reuse_distance: int | None = Field(
        None,
        ge=0,
        description="weights that are used again within so many elements stay gathered (zero_stage 3)",
    )
    zero_hpz_partition_size: int | None = Field(
        None,
        ge=1,
        description="ZeRO++: size of the group of workers on one machine that keeps a second copy of the weights "
        "(zero_stage 3)",
    )
    zero_quantized_weights: bool | None = Field(
        None, description="ZeRO++: weights are sent in 8 bits (zero_stage 3, GPU)"
    )
    zero_quantized_gradients: bool | None = Field(
        None, description="ZeRO++: gradients are sent in 4 bits (zero_stage 3, GPU)"
    )
    deepspeed_config: Annotated[str | None, PathField("file")] = Field(
        None,
        description="your own DeepSpeed JSON file: its stage and offload settings are used and other keys passed on; "
        "keys "
        "that the recipe sets must agree, or be auto",
    )
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA GPUs")
    cudnn_benchmark: bool = Field(
        False,
        description="let cuDNN measure its convolution algorithms and use the fastest, for each image size",
    )
    channels_last: bool = Field(
        False, description="the channels-last memory format for the U-Net's convolutions"
    )
    torch_compile: bool = Field(
        False,
        description="compile the U-Net's transformer and residual blocks: the first steps are slow, later ones faster",
    )
    dynamo_backend: Literal["inductor", "aot_eager", "eager"] = Field(
        "inductor", description="backend of torch_compile"
    )
    use_ema: bool = Field(
        False,
        description="keep an exponential moving average of the weights, and use it for previews and exports",
    )
    ema_decay: float = Field(0.9999, gt=0, lt=1, description="decay of that average per step")

    @field_validator("gpu_memory")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_size(value, option="gpu_memory")
            except ResourceError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _check_offload(self) -> EngineConfig:
        if self.offload_param_device != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_param_device: {self.offload_param_device} needs zero_stage: 3, which shards the weights; "
                "set it, or offload_param_device: none"
            )
        if self.offload_optimizer_device != "none" and self.zero_stage in ("auto", 0):
            raise ValueError(
                f"offload_optimizer_device: {self.offload_optimizer_device} needs zero_stage: 1, 2 or 3, which shard "
                "the optimizer; set one (2 suits most models), or offload_optimizer_device: none"
            )
        return self

    @model_validator(mode="after")
    def _check_nvme(self) -> EngineConfig:
        if "nvme" not in (self.offload_optimizer_device, self.offload_param_device):
            return self
        if self.zero_stage != 3:
            raise ValueError("offloading to nvme needs zero_stage: 3; set it, or offload to cpu")
        if self.nvme_path is None or not self.nvme_path.startswith("/"):
            raise ValueError(
                f"offloading to nvme needs nvme_path, an absolute folder on a fast local disk of every machine (here: "
                f"{self.nvme_path})"
            )
        if self.use_ema and self.offload_optimizer_device == "nvme":
            raise ValueError(
                "use_ema would read every weight back from the disk at every step; set use_ema: false, or "
                "offload_optimizer_device: cpu"
            )
        return self

    @model_validator(mode="after")
    def _check_name(self) -> EngineConfig:
        staged = self.zero_stage != "auto" or self.deepspeed_config is not None
        if self.name == "zero" and not staged:
            raise ValueError("name: zero needs zero_stage: 0, 1, 2 or 3; set one, or name: auto")
        if self.name not in ("auto", "zero") and staged:
            raise ValueError(
                f"zero_stage and deepspeed_config configure the engine zero, and name is {self.name}; set name: auto, "
                "or leave them out"
            )
        return self

    @property
    def is_auto(self) -> bool:
        """Whether the memory plan may choose a ZeRO stage if the run uses GPUs."""
        return self.name == "auto" and self.zero_stage == "auto"

    @property
    def gpu_limit(self) -> int | None:
        """``gpu_memory`` in bytes."""
        return None if self.gpu_memory is None else parse_size(self.gpu_memory, option="gpu_memory")
