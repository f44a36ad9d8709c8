"""Test the streaming of images through a local Ray in plan order, from disk and from S3."""

import io
import itertools
import tarfile
import time

import numpy as np
import pytest
from faulty_proxy import faulty_proxy
from image_files import image, put
from servers import s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import DataError, ResourceError, StorageError
from dreamfleet.datasets.images.images import fit_image, open_image
from dreamfleet.datasets.images.masks import ImageView
from dreamfleet.datasets.index.index import Index, build_index
from dreamfleet.datasets.json_text import json_text
from dreamfleet.datasets.serve import decode_job
from dreamfleet.datasets.serve.decode_job import DecodeJob, DecodeOptions, Times, decode_chunk
from dreamfleet.datasets.serve.stream import AHEAD_BYTES, ImageStream
from dreamfleet.datasets.storage.storage import Storage, read_uri
from dreamfleet.trainers.report.report import write_report

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


def test_a_chunk_is_decoded_without_ray(tmp_path):
    for seed in range(2):
        put(tmp_path, f"{seed}.png", image(seed, size=(40, 30)))
    put(tmp_path, "cut.png", image(5, size=(90, 90))[:2000])
    index = build_index(str(tmp_path), verify=False)
    views = [ImageView(row, (0.9, 0.1) if row == 1 else None, row == 1, (SIDE, SIDE)) for row in range(3)]
    jobs = [DecodeJob(row.uri, row.sha256, None, view) for row, view in zip(index.rows(), views, strict=True)]
    options = DecodeOptions("lanczos", max_pixels=10_000)
    got = decode_chunk(jobs, options)
    assert got.failure == "" and got.times.decode > 0
    for job, pixels, error in zip(jobs, got.images, got.errors, strict=True):
        if "cut.png" in job.uri:
            assert pixels is None and "truncated" in error
        else:
            assert error == ""
            np.testing.assert_array_equal(pixels, directly(index, job.view))
    replaced = decode_chunk([jobs[0], jobs[1]._replace(sha256=jobs[0].sha256)], options)
    assert replaced.images[1] is None and replaced.images[0] is not None
    assert jobs[1].uri in replaced.errors[1] and "replaced after it was indexed" in replaced.errors[1]
    missing = decode_chunk([jobs[0], jobs[1]._replace(uri=str(tmp_path / "none.png"))], options)
    assert "does not exist" in missing.failure and missing.images == []


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
        with ImageStream(index, draws, resolution=SIDE, resampling="lanczos", window=40) as stream:
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
        with ImageStream(index, draws, resolution=SIDE, resampling="lanczos", window=20) as stream:
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

    def test_a_shard_that_is_replaced_while_training_runs_is_reported(self, folder):
        def shard(seeds):
            with io.BytesIO() as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for number, seed in enumerate(seeds):
                        data = image(seed, kind="BMP")  # of one size, so that all members keep their places
                        member = tarfile.TarInfo(f"{number}.bmp")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                return file.getvalue()

        folder.write_bytes("a.tar", shard([0, 1, 2, 3]))
        index = build_index(folder.path("a.tar"))
        uri = next(row.uri for row in index.rows() if row.uri.endswith("#2.bmp"))
        draws = [ImageView(row % 4) for row in range(200)]
        with ImageStream(index, draws, resolution=SIDE, resampling="lanczos", window=16) as stream:
            next(stream)
            folder.write_bytes("a.tar", shard([0, 1, 99, 3]))
            assert len(list(stream)) == 199
        assert list(stream.bad) == [uri] and "replaced after it was indexed" in stream.bad[uri]
        assert stream.replaced > 40

    def test_an_endless_plan_is_read_ahead_to_a_limit(self, folder):
        folder.write_bytes("a.png", image(0))
        taken = itertools.count()
        last = [0]

        def endless():
            while True:
                last[0] = next(taken)
                yield ImageView(0)

        with ImageStream(
            build_index(folder), endless(), resolution=SIDE, resampling="lanczos", window=16
        ) as stream:
            for _ in range(20):
                assert next(stream).shape == (SIDE, SIDE, 3)
            time.sleep(0.5)
            assert last[0] < 20 + 3 * 16
        assert list(stream) == []  # closed

    def test_decoded_images_are_limited_in_bytes(self, folder):
        folder.write_bytes("a.png", image(0))
        draws = [ImageView(0, size=(2048, 2048))] * 200
        with ImageStream(build_index(folder), draws, resolution=SIDE, resampling="lanczos") as stream:
            assert AHEAD_BYTES <= sum(pending.num_bytes for pending in stream._pending) < 1.2 * AHEAD_BYTES

    def test_a_slow_chunk_delays_only_its_own_images(self, tmp_path):
        for seed in range(3):
            put(tmp_path, f"{seed}.png", image(seed, size=(30, 30)))
        index, first, later = build_index(str(tmp_path)), tmp_path / "first", tmp_path / "later"

        def fit(opened):
            if first.exists():
                later.touch()
                return opened
            first.touch()
            for _ in range(600):  # the first chunk ends only after another one has begun
                if later.exists():
                    return opened
                time.sleep(0.1)
            raise AssertionError("no other chunk is decoded meanwhile")

        draws = [ImageView(row) for row in [0, *[1, 2] * 40]]
        with ImageStream(index, draws, resolution=SIDE, resampling="lanczos", fit=fit, window=16) as stream:
            assert [stream.row for _ in stream] == [draw.row for draw in draws]


def test_a_wait_is_attributed_to_what_happened_meanwhile(local_ray, tmp_path):
    put(tmp_path, "a.png", image(0))
    with ImageStream(build_index(str(tmp_path)), [], resolution=SIDE, resampling="lanczos") as stream:
        times = Times(started=102.0, ended=110.0, read=1.0, decode=2.0, resize=1.0)
        stream._count_wait(times, 100.0, 101.0, 113.0)
        assert stream.waits == {"cpu": 1.0, "read": 2.0, "decode": 4.0, "resize": 2.0, "transport": 3.0}
        stream._count_wait(times, 100.0, 120.0, 120.5)  # it was ready before
        assert stream.waits["transport"] == 3.5 and stream.waits["decode"] == 4.0


class Clock:
    """Stands for the module `time`; only what is made slow takes time."""

    def __init__(self):
        self.now = 100.0

    def time(self):
        return self.now

    perf_counter = time


@pytest.mark.parametrize(
    ("slow", "cause", "words"),
    [
        ("read_uri", "read", "reading files"),
        ("open_view", "decode", "decoding"),
        ("cut_opened", "resize", "resizing"),
        ("", "transport", "transport between machines"),
    ],
)
def test_each_slow_step_is_named_in_the_report(local_ray, tmp_path, monkeypatch, slow, cause, words):
    clock = Clock()
    monkeypatch.setattr(decode_job, "time", clock)
    for seed in range(3):
        put(tmp_path, f"{seed}.png", image(seed))
    index = build_index(str(tmp_path))
    jobs = [
        DecodeJob(row.uri, row.sha256, None, ImageView(number, size=(SIDE, SIDE)))
        for number, row in enumerate(index.rows())
    ]
    if slow:
        step = getattr(decode_job, slow)

        def slowly(*arguments, **options):
            clock.now += 1.0
            return step(*arguments, **options)

        monkeypatch.setattr(decode_job, slow, slowly)
    chunk = decode_chunk(jobs, DecodeOptions("lanczos"))
    assert all(pixels is not None for pixels in chunk.images)
    arrived = chunk.times.ended + (0.0 if slow else 3.0)
    with ImageStream(index, [], resolution=SIDE, resampling="lanczos") as stream:
        stream._count_wait(chunk.times, 100.0, 100.0, arrived)
        assert {name: seconds for name, seconds in stream.waits.items() if seconds} == {cause: 3.0}
        run = Storage(str(tmp_path / "run"))
        run.write_text("recipe.yaml", "{}")
        summary = {"figures": {"data_wait_fraction": 0.5}, "data_waits": stream.waits}
        run.write_text("summary.json", json_text(summary))
    write_report(run, describe=lambda *arguments, **options: None)
    assert f"of training time; mostly for {words}" in run.read_text("report.html")


@pytest.mark.cluster
@pytest.mark.s3
class TestFailingBucket:
    """Test streams from a bucket behind a proxy that lets reads of objects fail."""

    @pytest.fixture
    def index(self, local_ray, s3_server, monkeypatch):  # noqa: F811
        s3_server.set_environment(monkeypatch)
        folder = Storage(s3_server.new_folder())
        for seed in range(8):
            folder.write_bytes(f"{seed}.png", image(seed, size=(20 + seed, 40)))
        return build_index(folder)

    def test_slow_cut_and_refused_reads_change_nothing(self, index, s3_server, monkeypatch):  # noqa: F811
        def rule(name, earlier, total):
            return ("busy", "cut", "slow", "")[int(name[0]) % 4] if earlier == 0 else ""

        draws = random_draws(index, 40)
        expected = [directly(index, draw) for draw in draws]
        with faulty_proxy(s3_server.endpoint, rule) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            with ImageStream(index, draws, resolution=SIDE, resampling="lanczos") as stream:
                for pixels, wanted in zip(stream, expected, strict=True):
                    np.testing.assert_array_equal(pixels, wanted)
        assert min(proxy.faults[fault] for fault in ("busy", "cut", "slow")) == 2
        assert stream.bad == {} and stream.replaced == 0
        assert stream.waits["read"] > 0.5

    def test_a_lost_permission_ends_the_stream_with_its_reason(self, index, s3_server, monkeypatch):  # noqa: F811
        draws = random_draws(index, 100)
        expected = [directly(index, draw) for draw in draws]
        with faulty_proxy(s3_server.endpoint, lambda *read: "denied" if read[2] >= 30 else "") as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            got = []
            with (
                ImageStream(index, draws, resolution=SIDE, resampling="lanczos") as stream,
                pytest.raises(StorageError, match=r"cannot read s3://\S+\.png: access denied"),
            ):
                got.extend(stream)
        for pixels, wanted in zip(got, expected, strict=False):
            np.testing.assert_array_equal(pixels, wanted)
        assert stream.replaced == 0  # no other image instead

    def test_an_object_that_is_replaced_while_training_runs_is_reported(self, index, caplog):
        draws = [ImageView(row % 8) for row in range(400)]
        uri = index.row(3).uri
        with ImageStream(index, draws, resolution=SIDE, resampling="lanczos", window=32) as stream:
            rows = [next(stream) is not None and stream.row for _ in range(8)]
            folder, _, name = uri.rpartition("/")
            Storage(folder).write_bytes(name, image(99, size=(50, 50)))
            rows += [stream.row for _ in stream]
        assert rows[:8] == list(range(8)) and len(rows) == 400
        late = rows[320:]
        assert late == [4 if row % 8 == 3 else row % 8 for row in range(320, 400)]
        assert list(stream.bad) == [uri] and "replaced after it was indexed" in stream.bad[uri]
        assert sum("left out" in record.message for record in caplog.records) == 1


@pytest.mark.cluster
@pytest.mark.s3
def test_no_decodable_image_and_a_missing_file(local_ray, tmp_path):
    put(tmp_path, "a.png", image(0))
    put(tmp_path, "b.png", image(1))
    index = build_index(str(tmp_path))
    put(tmp_path, "a.png", b"broken now")
    put(tmp_path, "b.png", b"")
    with pytest.raises(DataError, match="none of the 2"):
        list(ImageStream(index, [ImageView(0)], resolution=SIDE, resampling="lanczos"))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(StorageError, match="does not exist"):
        list(ImageStream(index, [ImageView(0)], resolution=SIDE, resampling="lanczos"))


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
                build_index(str(tmp_path)),
                [ImageView(0)],
                resolution=SIDE,
                resampling="lanczos",
                stall_seconds=2,
            ) as stream,
        ):
            next(stream)
    finally:
        local_ray.kill(hog)
