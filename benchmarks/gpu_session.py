"""Runs every check and measurement that needs a GPU within some minutes, for a GPU that is lent by the minute.

Jobs are separate processes with a time limit each. Those that measure no time run side by side; then the timed ones run
one after the other, while nothing else does. Results are appended to OUT/results.json as they come, all output
to OUT/log, so that a session that is cut off keeps what it found.

    PYTHONPATH=site python3 benchmarks/gpu_session.py --out OUT [--minutes 8] [--jobs curve,matrix] [--list]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import CASES
from gpu_curves import RECIPES

HERE = Path(__file__).parent
ROOT = HERE.parent
SIDE_BY_SIDE = 7  # jobs at once: a process of the pocket model keeps two cores busy
HEAVY = 2  # of these, jobs that fill tens of GB of host memory
FOR_TIMED = 190  # seconds of a session that are kept for the jobs that run alone
SMALL_RUN = (
    "train.max_train_steps=4",
    "train.checkpointing_steps=2",
    "validation.steps=4",
    "validation.num_images=1",
    "validation.num_inference_steps=4",
    "report_to=[]",
)
MATRIX_PARTS = 4


@dataclass(frozen=True)
class Job:
    """A process: its command without the interpreter, time limit in seconds, and whether it must run ``alone``."""

    name: str
    words: tuple[str, ...]
    limit: int = 200
    alone: bool = False
    heavy: bool = False


def jobs() -> list[Job]:
    """Return every job, the most valuable first."""
    curves = [Job(f"curve-{name}", (f"{HERE}/gpu_curves.py", name), 260) for name in RECIPES]
    memory = [
        Job(
            f"memory-{name}",
            (f"{HERE}/gpu.py", "--case", name),
            150,
            alone=name == "sdxl-dreambooth-offload-12g",  # 78 GiB of host memory
            heavy="offload_optimizer_device" in case.engine or "auto" in name,
        )
        for name, case in CASES.items()
    ]
    timed = [
        ("pcie", ("--case", "pcie"), 40),
        ("speed", ("--case", "speed", "--batches", "4,16", "--ways", "plain,channels_last"), 120),
        (
            "speed-compiled",
            ("--case", "speed", "--batches", "16", "--ways", "compiled,compiled_channels_last"),
            150,
        ),
    ]
    alone = [Job(name, (f"{HERE}/gpu.py", *words), limit, alone=True) for name, words, limit in timed]
    last = sorted([*memory, *alone], key=lambda job: "sdxl-dreambooth-offload" in job.name)
    return [*curves, *_on_ray(), *last, *_matrix()]


def _on_ray() -> list[Job]:
    """Return jobs on a private Ray of this machine, if Ray is there: a worker with the GPU, and trials with shares."""
    if importlib.util.find_spec("ray") is None:
        return []
    command = ("-m", "dreamfleet.cluster.cli")
    folder = tempfile.mkdtemp(prefix="df-")
    recipes = ROOT / "recipes"
    train = ("train", f"{recipes}/cat-lora.yaml", "scaling.num_workers=1", "method.num_class_images=4")
    search = ("tune", f"{recipes}/cat-search.yaml", "search.num_trials=4", "search.max_concurrent_trials=2")
    return [
        Job("ray-train", (*command, *train, *SMALL_RUN, f"output_dir={folder}/train"), 150),
        Job("ray-search", (*command, *search, *SMALL_RUN, f"output_dir={folder}/search"), 200),
    ]


def _matrix() -> list[Job]:
    """Return the jobs of the test-suite's GPU cases: every method, family and precision on tiny models."""
    support = ROOT / "tests" / "support"
    if not support.exists():
        return []
    parts = [
        Job(f"matrix-{part + 1}", ("-m", "simulated_gpu.runs", f"part:{part + 1}/{MATRIX_PARTS}"), 280)
        for part in range(MATRIX_PARTS)
    ]
    return [*parts, Job("matrix-special", ("-m", "simulated_gpu.runs", "special"), 150)]


class Session:
    """Runs jobs and keeps their results in files."""

    def __init__(self, out: Path, *, seconds: float):
        self.out, self.end = out, time.monotonic() + seconds
        self.results: dict[str, Any] = {}
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log").open("w")

    def run(self, job: Job) -> None:
        """Run one job within its limit and what is left of the session, and write its result."""
        started = time.monotonic()
        left = min(job.limit, self.end - started - (0 if job.alone else FOR_TIMED))
        if left < 10:
            self._keep(job, {"failed": "not started: the session's time was over"}, "")
            return
        process = subprocess.Popen(
            [sys.executable, *job.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        late = threading.Timer(left, lambda: os.killpg(process.pid, signal.SIGKILL))
        late.start()
        output, _ = process.communicate()
        late.cancel()
        lines = [line for line in output.splitlines() if line.startswith("{")]
        record: dict[str, Any] = {"found": [_parsed(line) for line in lines]}
        record["seconds"] = round(time.monotonic() - started, 1)
        if process.returncode:
            why = (
                f"killed after {left:.0f} s"
                if record["seconds"] >= left
                else f"exit code {process.returncode}"
            )
            record["failed"] = f"{why}: {output.strip()[-1500:]}"
        self._keep(job, record, output)

    def _keep(self, job: Job, record: dict[str, Any], output: str) -> None:
        with self.lock:
            self.results[job.name] = record
            text = json.dumps(self.results, indent=1)
            (self.out / "results.new").write_text(text)
            (self.out / "results.new").replace(self.out / "results.json")
            self.log.write(f"======== {job.name} ({record.get('seconds')} s)\n{output[-200_000:]}\n")
            self.log.flush()
            errors = [one.get("case", "?") for one in record.get("found", []) if one.get("error")]
            state = "FAILED" if "failed" in record else f"{len(errors)} errors" if errors else "ok"
            print(
                f"{job.name:<28} {record.get('seconds')!s:>6} s  {state} {' '.join(errors)[:300]}", flush=True
            )


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {"error": f"no JSON: {line[:200]}"}


def _environment() -> dict[str, str]:
    paths = [str(ROOT / "tests" / "support"), *(path for path in sys.path if path), str(HERE)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def main() -> None:
    """Run the chosen jobs: first those side by side, then those alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--jobs", default="", help="beginnings of job names, such as curve,memory-sd15")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    wanted = tuple(asked.jobs.split(",")) if asked.jobs else ("",)
    chosen = [job for job in jobs() if job.name.startswith(wanted)]
    if asked.list:
        print("\n".join(f"{job.name:<28} {job.limit:>4} s {'alone' if job.alone else ''}" for job in chosen))
        return
    from measure import describe_machine

    session = Session(asked.out, seconds=asked.minutes * 60)
    session.results["machine"] = describe_machine()
    beside = [job for job in chosen if not job.alone]
    with ThreadPoolExecutor(HEAVY) as heavy, ThreadPoolExecutor(SIDE_BY_SIDE - HEAVY) as light:
        for job in beside:
            (heavy if job.heavy else light).submit(session.run, job)
    for job in chosen:
        if job.alone:
            session.run(job)
    print(f"results: {asked.out / 'results.json'}")


if __name__ == "__main__":
    main()
