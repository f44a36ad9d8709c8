"""Test the streaming of images through a local Ray in plan order, from disk and from S3."""

import itertools
import time

import numpy as np
import pytest
from image_files import image, put
from servers import s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import DataError, ResourceError, StorageError
from dreamfleet.datasets.images.images import fit_image, open_image
from dreamfleet.datasets.index.index import Index, build_index
from dreamfleet.datasets.serve.decode_job import decode_batch
from dreamfleet.datasets.serve.stream import READY_BYTES, WINDOW, ImageStream, ImageView, queue_length
from dreamfleet.datasets.storage.storage import Storage, read_uri

SIDE = 16


def random_draws(index: Index, count: int, seed: int = 0) -> list[ImageView]:
    rng = np.random.default_rng(seed)
    return [
        ImageView(
            int(rng.integers(len(index))),
            None if rng.random() < 0.3 else (float(rng.random()), float(rng.random())),
            bool(rng.integers(2)),
        )
        for _ in range(count)
    ]


def directly(index: Index, draw: ImageView, row: int | None = None) -> np.ndarray:
    uri = index.row(draw.row if row is None else row).uri
    opened = open_image(read_uri(uri), uri=uri)
    return fit_image(opened, SIDE, center=draw.crop is None, crop_key=draw.crop, flip=draw.flip)


def test_a_batch_is_decoded_without_ray(tmp_path):
    for seed in range(2):
        put(tmp_path, f"{seed}.png", image(seed, size=(40, 30)))
    put(tmp_path, "cut.png", image(5, size=(90, 90))[:2000])
    index = build_index(str(tmp_path), verify=False)
    batch = {
        "position": np.arange(3),
        "uri": np.array(index.column("uri"), dtype=object),
        "center": np.array([True, False, True]),
        "x": np.array([0.0, 0.9, 0.0]),
        "y": np.array([0.0, 0.1, 0.0]),
        "flip": np.array([False, True, False]),
        "mask": np.array(["", "", ""], dtype=object),
        "width": np.full(3, SIDE),
        "height": np.full(3, SIDE),
    }
    got = decode_batch(batch, max_pixels=10_000)
    for row, error in enumerate(got["error"]):
        if "cut.png" in index.row(row).uri:
            assert "truncated" in error
        else:
            assert error == ""
            draw = ImageView(row, (0.9, 0.1) if row == 1 else None, row == 1)
            pixels = np.frombuffer(got["pixels"][row], np.uint8).reshape(SIDE, SIDE, 3)
            np.testing.assert_array_equal(pixels, directly(index, draw))


def test_the_queue_of_decoded_images_is_limited_in_bytes():
    assert queue_length((64, 64), WINDOW) == WINDOW
    for side in (512, 1024, 4096):
        assert 0.9 * READY_BYTES < queue_length((side, side), WINDOW) * side * side * 4 <= READY_BYTES
    assert queue_length((16384, 16384), WINDOW) == 1


@pytest.fixture(scope="module")
def local_ray(s3_server):  # noqa: F811
    import ray

    # Without the bucket's keys: the stream sends them to the tasks.
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.mark.cluster
@pytest.mark.s3
class TestOnRay:
    @pytest.fixture(params=["disk", "s3"])
    def folder(self, request, tmp_path, local_ray, s3_server, monkeypatch):  # noqa: F811
        s3_server.set_environment(monkeypatch)
        return Storage(tmp_path if request.param == "disk" else s3_server.new_folder())

    def test_plan_order_over_several_windows(self, folder):
        for seed in range(7):
            folder.write_bytes(f"{seed}.png", image(seed, size=(20 + seed, 40)))
        index = build_index(folder)
        draws = random_draws(index, 100)
        with ImageStream(index, draws, resolution=SIDE, window=40) as stream:
            got = list(stream)
        assert len(got) == 100
        for pixels, draw in zip(got, draws, strict=True):
            np.testing.assert_array_equal(pixels, directly(index, draw))
        assert stream.replaced == 0
        assert stream.bad == {}

    def test_bad_images_are_replaced_by_the_next_in_order(self, folder, caplog):
        for seed in range(5):
            folder.write_bytes(f"{seed}.png", image(seed, size=(30, 30)))
        for seed in (10, 11):
            folder.write_bytes(f"{seed}.png", image(seed, size=(90, 90))[:2000])
        index = build_index(folder, verify=False)
        bad = {row for row in range(7) if index.row(row).uri.endswith(("10.png", "11.png"))}
        draws = random_draws(index, 60)
        with ImageStream(index, draws, resolution=SIDE, window=20) as stream:
            got = [(pixels, stream.row) for pixels in stream]
        for (pixels, reported), draw in zip(got, draws, strict=True):
            row = draw.row
            while row in bad:
                row = (row + 1) % 7
            assert reported == row
            np.testing.assert_array_equal(pixels, directly(index, draw, row))
        assert stream.replaced == sum(draw.row in bad for draw in draws)
        assert set(stream.bad) == {index.row(row).uri for row in bad}
        assert sum("left out" in record.message for record in caplog.records) == 2

    def test_an_endless_plan_is_read_ahead_to_a_limit(self, folder):
        folder.write_bytes("a.png", image(0))
        taken = itertools.count()
        last = [0]

        def endless():
            while True:
                last[0] = next(taken)
                yield ImageView(0)

        with ImageStream(build_index(folder), endless(), resolution=SIDE, window=16) as stream:
            for _ in range(20):
                assert next(stream).shape == (SIDE, SIDE, 3)
            time.sleep(0.5)
            assert last[0] < 20 + 3 * 16
        assert not stream._thread.is_alive()


@pytest.mark.cluster
@pytest.mark.s3
def test_no_decodable_image_and_a_missing_file(local_ray, tmp_path):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "b.png", image(1))
    index = build_index(str(tmp_path))
    put(tmp_path, "a.png", b"broken now")
    put(tmp_path, "b.png", b"")
    with pytest.raises(DataError, match="none of the 2"):
        list(ImageStream(index, [ImageView(0)], resolution=SIDE))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(StorageError, match="does not exist"):
        list(ImageStream(index, [ImageView(0)], resolution=SIDE))


@pytest.mark.cluster
@pytest.mark.s3
def test_a_cluster_without_a_free_cpu_is_reported(local_ray, tmp_path):
    @local_ray.remote(num_cpus=2)
    class Hog:
        def here(self):
            return True

    put(tmp_path, "a.png", image(0))
    hog = Hog.remote()
    local_ray.get(hog.here.remote())
    try:
        with (
            pytest.raises(ResourceError, match=r"1\.0 CPU.*0\.0"),
            ImageStream(
                build_index(str(tmp_path)), [ImageView(0)], resolution=SIDE, stall_seconds=2
            ) as stream,
        ):
            next(stream)
    finally:
        local_ray.kill(hog)
    stream._thread.join(timeout=30)  # a CPU is free now, so the abandoned window can finish
    assert not stream._thread.is_alive()
