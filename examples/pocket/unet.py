"""Trains the pocket model's U-Net with dreamfleet's method, engine, loop and noise code."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from backgrounds import KEYS
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from export import build_scheduler, split_clip
from images import Bank, draw_caption, open_bank
from latents import open_latents
from subjects import CACHE, SET_ASIDE
from training import pick_device
from transformers import CLIPModel, CLIPTokenizer
from vae import load_vae

from dreamfleet.datasets.plan import BatchPlan
from dreamfleet.datasets.rng import numpy_rng
from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.config.engine import EngineConfig
from dreamfleet.trainers.config.method import MethodConfig
from dreamfleet.trainers.config.optimizer import OptimizerConfig
from dreamfleet.trainers.distributed.process_group import leave_group
from dreamfleet.trainers.engines.passes import drive
from dreamfleet.trainers.engines.torch_engine import TorchEngine
from dreamfleet.trainers.loop import Hooks, Schedule, train
from dreamfleet.trainers.methods.base import Batch, Setting
from dreamfleet.trainers.methods.diffusion_method import DiffusionMethod
from dreamfleet.trainers.models.stable_diffusion.model import StableDiffusion
from dreamfleet.trainers.optim.param_group import ParamGroup
from dreamfleet.trainers.report.metrics_log import MetricsLog
from dreamfleet.trainers.run.checkpoint import Checkpoints

STEPS = int(os.environ.get("POCKET_STEPS", "9000"))
# From this step on, subjects are upright and centred (the bank `steady`), so that the U-Net learns shapes.
FINISH = 4800
WORKERS = int(os.environ.get("POCKET_WORKERS", str(min(2, os.cpu_count() or 1))))
BATCH = 32
RATE = 8e-4
WARM_UP = 200
SEED = 13
EMPTY_SHARE = 0.1
FOLDER = CACHE / "unet"


def build_unet(context_width: int) -> UNet2DConditionModel:
    """Build a U-Net for 16 x 16 latents; 16 x 16 has only convolutions, for speed, 8 x 8 and 4 x 4 also attention."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Pretraining(DiffusionMethod):
    """Trains all parameters of a U-Net from scratch with the standard diffusion loss on captioned latents."""

    name = "pocket_pretraining"

    def __init__(self, model: StableDiffusion, setting: Setting) -> None:
        super().__init__(MethodConfig(name=self.name), model, setting)
        self.learning = model.unet.requires_grad_(True).train()

    def groups(self) -> list[ParamGroup]:
        """Return one parameter group with all parameters of the U-Net."""
        return [ParamGroup("unet", dict(self.learning.named_parameters()))]


def assemble(unet: UNet2DConditionModel | None = None) -> StableDiffusion:
    """Return a frozen StableDiffusion of the trained components; without `unet`, with a new random U-Net."""
    tokenizer = CLIPTokenizer.from_pretrained(CACHE / "folder" / "tokenizer")
    text, _, _ = split_clip(CLIPModel.from_pretrained(CACHE / "clip_model", dtype=torch.float32))
    if unet is None:
        torch.manual_seed(4)
        unet = build_unet(text.config.hidden_size)
    model = StableDiffusion(tokenizer, text, unet, load_vae(), build_scheduler(), str(CACHE), "")
    model.freeze()
    return model


def choose_rows(bank: Bank) -> np.ndarray:
    """Return the indices of the images that the U-Net trains on: its subjects on plain colours and scenes."""
    subjects = np.array([name not in SET_ASIDE for name in bank.names])
    keys = np.array([key.startswith(("plain", "scene")) for key in KEYS])
    return np.flatnonzero(subjects[bank.subjects] & keys[bank.backgrounds])


class Batches:
    """Batches of a run; each depends on its step only, so that a resumed run continues with the same ones."""

    def __init__(self, model: StableDiffusion, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.model, self.device, self.rank, self.world = model, device, rank, world
        self.parts = {}
        for name in ("narrow", "steady"):
            bank = open_bank(name)
            rows = choose_rows(bank)
            plan = BatchPlan([0] * len(rows), seed=SEED, global_batch=BATCH)
            self.parts[name] = (bank, open_latents(name), rows, plan)

    def draw(self, step: int) -> Batch:
        """Return latents, text encodings, noise and timesteps of this rank's part of batch `step`."""
        name = "narrow" if step < FINISH else "steady"
        bank, latents, chosen, plan = self.parts[name]
        draws = plan.draws(step, unit=self.rank, num_units=self.world)
        rows = [int(chosen[draw.row]) for draw in draws]
        keys = [(name, SEED, draw.epoch, row) for draw, row in zip(draws, rows, strict=True)]
        noise, timesteps = self.model.draw_noise(keys, (4, 16, 16))
        prompts = [
            self._word(bank, row, numpy_rng("prompt", *key)) for row, key in zip(rows, keys, strict=True)
        ]
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            context = self.model.encode_text(self.model.tokenize(prompts).to(self.device)).float()
        values = np.stack([latents[row] for row in rows]).astype(np.float32)
        return {
            "latents": torch.from_numpy(values),
            "noise": noise,
            "timesteps": timesteps,
            "context": context,
            "weights": torch.ones(len(draws)),
            "num_instances": len(draws),
        }

    def stream(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches from `start_step` on."""
        return map(self.draw, itertools.count(start_step))

    def _word(self, bank: Bank, index: int, rng: np.random.Generator) -> str:
        if rng.random() < EMPTY_SHARE:
            return ""
        return draw_caption(bank.names[bank.subjects[index]], KEYS[bank.backgrounds[index]], rng)


def scale_rate(step: int) -> float:
    """Return the learning rate's factor: warm-up, constant, then linear decay over the last sixth of the run."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (STEPS - step) / (STEPS / 6)))


def train_unet() -> None:
    """Run the stage `unet`: one process on a GPU, else up to `WORKERS` processes with one thread each.

    On a machine with other load, several processes of one thread are faster than one process whose threads
    all wait for the slowest.
    """
    if torch.cuda.is_available() or WORKERS == 1:
        return run_worker(0, 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()), "OMP_NUM_THREADS": "1"}
    running = torch.multiprocessing.start_processes(
        run_worker, args=(WORKERS,), nprocs=WORKERS, join=False, start_method="spawn"
    )

    def pass_on(number: int, frame: object) -> None:
        for pid in running.pids():
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    while not running.join():
        pass


def find_port() -> int:
    """Return a free port for the process group of the workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_worker(rank: int, world: int) -> None:
    """Train from the newest complete checkpoint as one of `world` ranks; SIGTERM saves a checkpoint and stops."""
    stopping: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    device = pick_device()
    model = assemble()
    # Fused attention has a slow backward pass on CPUs.
    model.unet.set_attn_processor(AttnProcessor())
    model.to(device)
    # No min-SNR weights: with v-prediction they nearly remove the noisy half of the timesteps, which
    # determines shapes.
    method = Pretraining(model, Setting())
    run = Storage(str(FOLDER))
    checkpoints, start = Checkpoints(run, limit=2), 0
    last = checkpoints.load_latest()
    if last:
        method.load_state(last.learned)
        start = last.step
    engine = TorchEngine(
        method,
        config=EngineConfig(use_ema=True, ema_decay=0.995),
        optimizer=OptimizerConfig(learning_rate=RATE),
        mixed_precision="bf16",
        device=device,
        rank=rank,
        world=world,
        num_units=world,
    )
    if last:
        engine.load_state(last.engine)
    metrics = MetricsLog(run, start_step=start) if rank == 0 else None

    def log(line: dict[str, Any]) -> None:
        if metrics:
            metrics.log(line)
            print("unet", {name: line[name] for name in ("step", "loss", "step_seconds")}, flush=True)

    def save(step: int) -> None:
        if rank == 0:
            checkpoints.save(step, learned=method.state(), engine=engine.state(), meta={})

    drive(
        train(
            engine,
            Batches(model, device, rank, world).stream(start),
            lambda batch: batch,
            rates={"unet": lambda step: RATE * scale_rate(step)},
            schedule=Schedule(total=STEPS, save_every=200, sample_every=STEPS, log_every=50),
            seed=SEED,
            start_step=start,
            hooks=Hooks(log=log, save=save, should_stop=lambda: bool(stopping)),
        )
    )
    engine.close()
    if world > 1:
        leave_group()


def load_unet() -> UNet2DConditionModel:
    """Load the averaged U-Net of the newest complete checkpoint. Raises SystemExit if there is none."""
    last = Checkpoints(Storage(str(FOLDER))).load_latest()
    if last is None:
        raise SystemExit("no checkpoint of the U-Net yet: run the stage `unet`")
    context_width = json.loads((CACHE / "clip_model" / "config.json").read_text())["text_config"][
        "hidden_size"
    ]
    unet = build_unet(context_width)
    unet.load_state_dict(last.engine["ema"])
    return unet.eval()


def build_pipeline(unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """Return a diffusers pipeline with a U-Net; by default the one of the newest checkpoint."""
    model = assemble(unet or load_unet())
    return StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
