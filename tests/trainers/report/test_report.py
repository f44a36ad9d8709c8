"""report.html of a run: complete, self-contained, and with every text escaped."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.artifacts.usage import describe
from dreamfleet.trainers.report.preview_grid import read_preview_grids, read_real_images
from dreamfleet.trainers.report.report import render as render_page
from dreamfleet.trainers.report.report import write_report

SIZE, GAP = 16, 2
PROMPTS = ["a sks cat", 'a "sks" cat <script>alert(1)</script> & more']
VOID = {"meta", "img", "input", "br", "link", "path"}


class Reader(HTMLParser):
    """Collects tags and text; fails if tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def render(run: Storage) -> str:
    return render_page(run, describe=describe)


def colour(step: int, row: int, column: int) -> tuple[int, int, int]:
    return (step % 256, 40 + 60 * row, 40 + 60 * column)


def image(*rows: list[tuple[int, int, int]]) -> bytes:
    columns = max(map(len, rows))
    size = (columns * (SIZE + GAP) - GAP, len(rows) * (SIZE + GAP) - GAP)
    grid = Image.new("RGB", size, "white")
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            cell = Image.new("RGB", (SIZE, SIZE), value)
            cell.putpixel((0, 0), (0, 0, 0))
            grid.paste(cell, (c * (SIZE + GAP), r * (SIZE + GAP)))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """The folder of a finished run."""
    run = Storage(tmp_path / "my-cat")
    for step in (0, 50, 100):
        rows = [[colour(step, r, c) for c in range(2)] for r in range(len(PROMPTS))]
        run.write_bytes(f"samples/step-{step:06d}.png", image(*rows))
        cells = [
            {
                "prompt": p,
                "seed": c,
                "row": r,
                "column": c,
                "width": SIZE,
                "height": SIZE,
                "scores": {"clip_t": 0.25},
            }
            for r, p in enumerate(PROMPTS)
            for c in range(2)
        ]
        run.write_text(f"samples/step-{step:06d}.jsonl", "".join(json.dumps(cell) + "\n" for cell in cells))
    run.write_bytes("samples/real.png", image([(200, 10, 10)] * 3, [(10, 200, 10)]))
    lines = [{"step": 0, "holdout_loss": 0.2}]
    lines += [
        {"step": s, "loss": 1 / s, "lr": {"unet": 5e-6}, "step_seconds": 0.25} for s in range(10, 101, 10)
    ]
    lines += [{"step": 100, "holdout_loss": 0.1}, {"step": 100, "loss": float("nan")}]
    run.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    run.write_text("recipe.yaml", f"method: {{name: dreambooth}}\ndata: {{resolution: {SIZE}}}\n")
    run.write_bytes("exports/my-cat.safetensors", b"0" * 2_000_000)
    run.write_bytes("exports/diffusers/unet/model.safetensors", b"0" * 3_000_000)
    run.write_bytes("checkpoints/step-000100/state.pt", b"0" * 1_000_000)
    summary = {
        "run": "my-cat", "method": "dreambooth", "exit_reason": "completed", "steps": 100, "images_seen": 800,
        "workers": 2, "device": "cpu", "wall_seconds": 214.0, "start_up_seconds": 30.0, "train_seconds": 150.0,
        "figures": {"images_per_second": 31.25, "peak_memory_bytes": 2_100_000_000, "data_wait_fraction": 0.004},
        "data_waits": {"read": 0.2, "decode": 1.5, "transport": 0.0},
        "best_checkpoint": "step-000100", "exports": ["diffusers", "my-cat.safetensors"],
        "bad_files": [{"uri": "cat/<b>.png", "reason": "truncated"}],
    }  # fmt: skip
    run.write_text("summary.json", json.dumps(summary))
    return run


def test_report_contains_every_result_of_a_run(run: Storage) -> None:
    write_report(run, describe=describe)
    page = read(run.read_text("report.html"))
    text = re.sub(r"\s+", " ", page.text)
    for part in (
        "my-cat", "DreamBooth", "completed", "100 optimizer steps", "800 images seen", "2 workers", "3 min 34 s",
        "31.2", "2.1 GB", "0.4 %", "of training time; mostly for decoding", "base 0.2",
        "base", "tuned", "real", "CLIP-T 0.25",
        "Training loss", "Held-out loss", "Learning rate", "my-cat.safetensors", "2.0 MB", "3.0 MB", "webui",
        "step-000100", "best held-out loss", "cat/<b>.png", "name: dreambooth",
    ):  # fmt: skip
        assert part in text, part


def test_report_is_self_contained(run: Storage) -> None:
    html = render(run)
    for _, attributes in read(html).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|//cdn|@import", html)
    assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)\)", html))


def test_user_text_is_escaped(run: Storage) -> None:
    html = render(run)
    assert "<script>alert" not in html and "cat/<b>" not in html
    page = read(html)
    assert PROMPTS[1] in page.text
    assert any(PROMPTS[1] in (attributes.get("alt") or "") for _, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_images_of_a_preview_grid_are_read_back(run: Storage) -> None:
    grids = read_preview_grids(run, most=5)
    assert [grid.step for grid in grids] == [0, 50, 100]
    for grid in grids:
        for cell in grid.cells:
            assert cell.image.size == (SIZE, SIZE)
            assert cell.image.getpixel((0, 0)) == (0, 0, 0)
            assert cell.image.getpixel((SIZE - 1, SIZE - 1)) == colour(grid.step, cell.row, cell.column)
    assert [grid.step for grid in read_preview_grids(run, most=2)] == [0, 100]
    real = read_real_images(run, SIZE)
    assert [p.getpixel((5, 5)) for p in real] == [(200, 10, 10)] * 3 + [
        (10, 200, 10)
    ]  # without the two empty cells


def test_slider_has_the_steps_of_the_tuned_model(run: Storage) -> None:
    page = read(render(run))
    sliders = [attributes for tag, attributes in page.tags if tag == "input"]
    assert [slider["data-steps"] for slider in sliders] == ["50,100"]
    hidden = [a for tag, a in page.tags if "data-frame" in a and "hidden" in a]
    assert len(hidden) == len(PROMPTS)  # step 50 of each prompt; without JavaScript the last step is visible


@pytest.mark.parametrize(
    "gone", ["samples", "summary.json", "metrics.jsonl", "recipe.yaml", "exports", "checkpoints"]
)
def test_report_leaves_out_missing_files(run: Storage, gone: str) -> None:
    run.remove(gone)
    page = read(render(run))
    assert "my-cat" in page.text
    assert ("in progress" in page.text) == (gone == "summary.json")


def test_report_of_an_empty_folder_and_of_corrupt_files(tmp_path: Path) -> None:
    assert "new" in read(render(Storage(tmp_path / "new"))).text
    run = Storage(tmp_path / "corrupt")
    run.write_text("summary.json", "{")
    run.write_text("recipe.yaml", "a: [")
    run.write_text("metrics.jsonl", "[]\nnull\n3\n")
    run.write_bytes("samples/step-000010.png", b"not an image")
    run.write_bytes("samples/step-000020.png", image([(1, 2, 3)]))
    run.write_text("samples/step-000020.jsonl", '{"prompt": "no more"}\n')
    run.write_bytes("samples/real.png", b"")
    assert "corrupt" in read(render(run)).text


def test_report_of_an_interrupted_run_names_the_resume_option(run: Storage) -> None:
    summary = json.loads(run.read_text("summary.json"))
    run.write_text("summary.json", json.dumps({**summary, "exit_reason": "interrupted"}))
    assert "--resume" in read(render(run)).text


@pytest.mark.parametrize(
    ("method", "name", "words"),
    [
        ("dreambooth", "diffusers", "from_pretrained"),
        ("dreambooth", "my-cat.safetensors", "models/Stable-diffusion/"),
        ("dreambooth", "pytorch_lora_weights.safetensors", "load_lora_weights"),
        ("textual_inversion", "my-cat.pt", "embeddings/"),
        ("textual_inversion", "my-cat.safetensors", 'token="<cat>"'),
        ("prompt_tuning", "my-cat-neg.pt", "negative prompt"),
        ("hypernetwork", "my-cat.pt", "<hypernet:my-cat:1>"),
        ("aesthetic_gradients", "my-cat.pt", "aesthetic_embeddings/"),
    ],
)
def test_every_artifact_has_a_usage_text(method: str, name: str, words: str) -> None:
    recipe = {"method": {"name": method, "placeholder_token": "<cat>"}}
    hint = describe(name, run_name="my-cat", recipe=recipe)
    assert hint.what and words in " ".join(use.text for use in hint.uses)


def test_the_timeline_shows_effective_training_time_and_what_failed(run: Storage) -> None:
    assert "effective training time" not in read(render(run)).text, "a run without events has no timeline"
    lines = [
        {"kind": "start", "at": "2026-01-01T00:00:10+00:00", "step": 0, "seconds": 10.0},
        {"kind": "ready", "at": "2026-01-01T00:00:20+00:00", "step": 0},
        {"kind": "steps", "at": "2026-01-01T00:01:20+00:00", "step": 60, "count": 60, "seconds": 60.0},
        {
            "kind": "failure",
            "at": "2026-01-01T00:01:25+00:00",
            "step": 64,
            "cause": "hung",
            "rank": 1,
            "node": "<b>",
        },
        {"kind": "start", "at": "2026-01-01T00:01:30+00:00", "step": 60, "seconds": 10.0},
        {"kind": "ready", "at": "2026-01-01T00:01:40+00:00", "step": 60},
        {"kind": "end", "at": "2026-01-01T00:01:40+00:00", "step": 60},
    ]
    run.write_text("events/controller.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = read(render(run))
    words = " ".join(page.text.split())
    assert "60 % effective training time" in words
    assert "worker hungworker 1 on <b>1 min 25 s64420 s" in words
    assert "Steps over time" in words
    assert any("band" in (attributes.get("class") or "") for tag, attributes in page.tags if tag == "path")
    run.write_text("events/controller.jsonl", json.dumps({**lines[0], "step": "none"}) + "\n")
    assert "effective training time" not in read(render(run)).text
