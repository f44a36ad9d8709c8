"""A run's result in a notebook."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from dreamfleet.trainers.launch import FitResult
from dreamfleet.trainers.run.summary import Summary


def make_summary(**changed: Any) -> Summary:
    fields: dict[str, Any] = {
        "run": "my-dog", "method": "dreambooth", "exit_reason": "completed", "steps": 100, "start_step": 0,
        "images_seen": 400, "workers": 2, "global_batch": 4, "device": "cpu", "wall_seconds": 75.0,
        "start_up_seconds": 5.0, "train_seconds": 60.0, "best_checkpoint": None, "exports": ["my-dog.safetensors"],
        "figures": {"holdout_loss": 0.4142, "clip_i": 0.5, "images_per_second": 12.0, "device_name": "x"},
    }  # fmt: skip
    return Summary(**fields | changed)


def test_a_run_shows_its_images_metrics_and_artifacts(tmp_path: Path) -> None:
    samples = tmp_path / "my-dog" / "samples"
    samples.mkdir(parents=True)
    for step in (0, 50, 100):
        Image.new("RGB", (64, 64), (step, 0, 0)).save(samples / f"step-{step:06d}.png")
        cell = {"prompt": "a <dog>", "seed": 0, "row": 0, "column": 0, "width": 64, "height": 64}
        (samples / f"step-{step:06d}.jsonl").write_text(json.dumps(cell))
    real = Image.new("RGB", (64, 64), "white")  # four training images of 32 pixels
    for n in range(4):
        real.paste(Image.linear_gradient("L").resize((32, 32)), (32 * (n % 2), 32 * (n // 2)))
    real.save(samples / "real.png")
    (tmp_path / "my-dog" / "recipe.yaml").write_text("data: {resolution: 32}")
    html = FitResult(make_summary(), str(tmp_path / "my-dog"))._repr_html_()
    for text in ("my-dog", "completed · 100 steps · 1 min 15 s · 2 × cpu", "held-out loss", "0.4142", "images / s",
                 "exports/my-dog.safetensors", "report.html"):  # fmt: skip
        assert text in html, text
    captions = [part.split("</figcaption>")[0].rpartition(">")[2] for part in html.split("<figcaption")[1:]]
    assert captions == ["base", "step 100", "training images"] and html.count("data:image/webp") == 3
    last = html.split('src="data:image/webp;base64,')[3].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(last))) as shown:  # two of each in a row, with a gap
        assert shown.size == (65, 65)
    assert len(html) < 50_000 and "device_name" not in html


def test_a_run_without_images_or_figures(tmp_path: Path) -> None:
    html = FitResult(
        make_summary(figures={}, exports=[], exit_reason="interrupted"), str(tmp_path)
    )._repr_html_()
    assert "<img" not in html and "<table" not in html and "interrupted" in html
