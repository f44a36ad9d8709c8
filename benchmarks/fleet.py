"""Measures fleets: subjects per hour against sequential `train` commands, and 1,000 tiny subjects that are killed.

Three parts, each of which can be an argument: ``embeddings`` (32 subjects of Textual Inversion), ``dreambooth`` (8
subjects, the full U-Net), ``many`` (1,000 subjects of a model of a few thousand parameters with two steps each,
killed three times and resumed). COUNT, STEPS and WORKERS (``scaling.num_workers``) change their sizes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from measure import write_result

ROOT = Path(__file__).parent.parent
CAT = sorted((ROOT / "examples/cat/train").glob("*.png"))
COMMAND = [sys.executable, "-m", "dreamfleet.cluster.cli"]
KILLS = 3

EMBEDDING = {
    "method": {"name": "textual_inversion", "placeholder_token": "<my-cat>", "initializer_token": "cat face"},
    "model": {"pretrained_model_name_or_path": "pocket"},
    "data": {"resolution": 64},
    "train": {"max_train_steps": 100, "train_batch_size": 1, "checkpointing_steps": 50},
    "optimizer": {"learning_rate": 1e-3},
    "scaling": {"num_workers": 0, "slots_per_worker": 32},
    "report_to": [],
}
DREAMBOOTH = {
    **EMBEDDING,
    "method": {
        "name": "dreambooth",
        "with_prior_preservation": True,
        "num_class_images": 48,
        "prior_generation_steps": 20,
        "sample_batch_size": 16,
    },
    "data": {"resolution": 64, "instance_prompt": "a sks cat face", "class_prompt": "a cat face"},
    "optimizer": {"learning_rate": 2e-4},
}


def compare(name: str, recipe: dict[str, Any], count: int, folder: Path) -> dict[str, Any]:
    """Train the same subjects as a fleet and one after the other; return the seconds and subjects per hour of both."""
    recipe = {**recipe, "train": {**recipe["train"], "max_train_steps": int(os.environ.get("STEPS", "100"))}}
    write(folder / "fleet.yaml", {**recipe, "output_dir": str(folder / "fleet")})
    write(
        folder / "one.yaml",
        {**recipe, "data": {**recipe["data"], "instance_data_dir": "x"}, "output_dir": "x"},
    )
    rows = []
    for number in range(count):
        images = [str(CAT[(number + place) % len(CAT)]) for place in range(3)]
        rows.append({"name": f"s{number:04d}", "images": images, "train.seed": number})
    (folder / "subjects.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    workers = os.environ.get("WORKERS", "1")
    began = time.perf_counter()
    run("fleet", folder / "subjects.jsonl", folder / "fleet.yaml", f"scaling.num_workers={workers}")
    together = time.perf_counter() - began
    began = time.perf_counter()
    for row in rows:
        images = json.dumps(f"list://{json.dumps(row['images'])}")
        changes = [f"output_dir={folder}/alone/{row['name']}", f"train.seed={row['train.seed']}"]
        run("train", folder / "one.yaml", f"data.instance_data_dir={images}", *changes)
    alone = time.perf_counter() - began
    return {
        "subjects": count,
        "fleet_seconds": together,
        "sequential_seconds": alone,
        "fleet_subjects_per_hour": 3600 * count / together,
        "sequential_subjects_per_hour": 3600 * count / alone,
        "ratio": alone / together,
    }


def kill_and_resume(count: int, folder: Path) -> dict[str, Any]:
    """Train ``count`` tiny subjects, kill the command and its workers three times, and resume each time."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    import tiny

    tree = tiny.make_recipe(folder, method__name="dreambooth", method__lora_rank=2, output_dir="fleet")
    tree["train"] |= {"max_train_steps": 2, "train_batch_size": 1}
    tree["scaling"] = {"num_workers": int(os.environ.get("WORKERS", "1"))}
    write(folder / "recipe.yaml", tree)
    lines = ["name,train.seed", *(f"s{number:04d},{number}" for number in range(count))]
    (folder / "subjects.csv").write_text("\n".join(lines) + "\n")
    command = [*COMMAND, "fleet", str(folder / "subjects.csv"), str(folder / "recipe.yaml"), "--json"]
    written: dict[str, int] = {}  # subject -> time of its summary when the command was killed
    repeated, seconds, peaks = 0, [], []
    for attempt in range(KILLS + 1):
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *(["--resume"] if attempt else [])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        target = count * (attempt + 1) // (KILLS + 1)
        peak = watch(process, folder, kill_at=target if attempt < KILLS else None)
        seconds.append(time.perf_counter() - began)
        peaks.append(peak)
        now = summaries(folder)
        repeated += sum(now.get(name) != when for name, when in written.items())
        written = now
    assert process.stdout is not None
    result = json.loads(process.stdout.read())
    fleet = folder / "fleet"
    recorded = [json.loads(line) for path in (fleet / "records").iterdir() for line in path.open()]
    names = [line["name"] for line in recorded if line["status"] == "completed"]
    page = [fleet / "index.html", *(fleet / "page").iterdir()]
    return {
        "subjects": count,
        "completed": result["completed"],
        "repeated": repeated,
        "recorded_twice": len(names) - len(set(names)),
        "kills": KILLS,
        "seconds": seconds,
        "seconds_a_subject": sum(seconds) / count,
        "driver_peak_mib": [round(peak / 2**20) for peak in peaks],
        "index_kib": round(sum(path.stat().st_size for path in page) / 1024),
        "table_kib": round((fleet / "fleet.parquet").stat().st_size / 1024),
        "record_files": len(list((fleet / "records").iterdir())),
    }


def watch(process: subprocess.Popen[bytes], folder: Path, *, kill_at: int | None) -> int:
    """Wait for a command and return its peak memory in bytes.

    ``kill_at``: completed subjects after which it is killed with its descendants; None to let it end.
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        if kill_at is not None and len(summaries(folder)) >= kill_at:
            for pid in [process.pid, *descendants(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
            return peak
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the fleet ended with exit code {process.returncode}")
    return peak


def memory(pid: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def descendants(pid: int) -> list[int]:
    """Return the processes below a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


def summaries(folder: Path) -> dict[str, int]:
    """Return the time at which the summary of each completed subject was written."""
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in (folder / "fleet/subjects").glob("*/summary.json")
    }


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write a recipe."""
    path.write_text(yaml.safe_dump(tree))


def run(*words: Any) -> None:
    """Run a command of dreamfleet; end with its output if it fails."""
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")


def main(parts: Sequence[str]) -> None:
    """Measure the named parts, by default all."""
    sizes = {"embeddings": 32, "dreambooth": 8, "many": 1000}
    result: dict[str, Any] = {}
    for part in parts or sizes:
        count = int(os.environ.get("COUNT", sizes[part]))
        with tempfile.TemporaryDirectory(prefix="bench-fleet-") as name:
            folder = Path(name)
            if part == "many":
                result[part] = kill_and_resume(count, folder)
            else:
                result[part] = compare(part, {"embeddings": EMBEDDING}.get(part, DREAMBOOTH), count, folder)
            print(json.dumps(result[part], indent=1), file=sys.stderr)
    write_result(
        "fleet" if not parts else f"fleet-{'-'.join(parts)}", result, how="python benchmarks/fleet.py"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
