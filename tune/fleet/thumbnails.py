"""Makes the thumbnail of a subject from the images in its run folder."""

from __future__ import annotations

import io
import logging

from PIL import Image, ImageOps

from dreamfleet.datasets.storage.storage import Storage
from dreamfleet.trainers.report.preview_grid import Cell, PreviewGrid, read_preview_grids, read_real_images
from dreamfleet.tune.fleet.rows import SubjectImages

SIDE = 256  # of each square in pixels; smaller images are not enlarged
LOSSLESS = 160  # the side up to which compression artifacts would be visible

log = logging.getLogger(__name__)


def write_thumbnail(fleet: Storage, name: str, run_folder: str, *, resolution: int) -> SubjectImages | None:
    """Write ``thumbnails/NAME.webp`` from the ``samples/`` of a run; return the paths of its images, None without any.

    The thumbnail shows the first prompt and seed as the untuned and the tuned model draw them, and the first training
    image. ``run_folder`` is relative to ``fleet``; ``resolution`` is the run's ``data.resolution``. Images that cannot
    be read are logged and left out.
    """
    run = fleet.child(run_folder)
    grids = read_preview_grids(run, 2)
    base = grids[0] if grids and grids[0].step == 0 else None
    tuned = grids[-1] if grids and grids[-1].step > 0 else None
    real = read_real_images(run, resolution)
    shown = [cell.image for cell in (_first(base), _first(tuned)) if cell] + real[:1]
    if not shown:
        return None
    path = f"thumbnails/{name}.webp"
    fleet.write_bytes(path, _encode(shown))
    cell = _first(tuned or base)
    return SubjectImages(
        prompt=cell.prompt if cell else "",
        seed=cell.seed if cell else None,
        base=f"{run_folder}/samples/step-{base.step:06d}.png" if base else None,
        tuned=f"{run_folder}/samples/step-{tuned.step:06d}.png" if tuned else None,
        real=f"{run_folder}/samples/real.png" if real else None,
        thumbnail=path,
    )


def _first(grid: PreviewGrid | None) -> Cell | None:
    return min(grid.cells, key=lambda cell: (cell.row, cell.column)) if grid else None


def _encode(images: list[Image.Image]) -> bytes:
    side = min(SIDE, max(min(image.size) for image in images))
    strip = Image.new("RGB", (side * len(images), side))
    for n, image in enumerate(images):
        strip.paste(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS), (n * side, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", lossless=side <= LOSSLESS, quality=80)
    return buffer.getvalue()
