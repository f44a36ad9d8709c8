"""Files of buckets are downloaded once per machine, by one process while the others wait."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from servers import S3Server, s3_server  # noqa: F401 - a fixture

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.storage import node_cache
from dreamfleet.datasets.storage.node_cache import node_copy
from dreamfleet.datasets.storage.storage import Storage


@pytest.fixture
def model(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:  # noqa: F811
    s3_server.set_environment(monkeypatch)
    monkeypatch.setenv(node_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    storage = Storage(f"{s3_server.new_folder()}/model")
    storage.write_bytes("unet/weights.bin", b"1" * 1000)
    storage.write_text("index.json", "{}")
    return storage


def read(address: str) -> tuple[str, bytes]:
    with node_copy(address) as path:
        return str(path), (path / "unet" / "weights.bin").read_bytes()


def count(address: str, queue: "multiprocessing.Queue[int]") -> None:
    downloads = 0
    usual = Storage.download

    def download(self: Storage, rel: str, local_path: "str | os.PathLike[str]") -> None:
        nonlocal downloads
        downloads += 1
        time.sleep(0.5)
        usual(self, rel, local_path)

    Storage.download = download  # type: ignore[method-assign]
    read(address)
    queue.put(downloads)


def test_processes_share_one_download(model: Storage) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=count, args=(model.url, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(queue.get(timeout=120) for _ in processes) == [0, 0, 1]
    for process in processes:
        process.join()


def test_a_changed_file_is_downloaded_again_and_the_outdated_copy_removed(
    model: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, content = read(model.url)
    assert content == b"1" * 1000
    assert read(model.url)[0] == before
    model.write_bytes("unet/weights.bin", b"2" * 1000)  # same size, other ETag
    after, content = read(model.url)
    assert content == b"2" * 1000 and after != before and Path(before).exists()
    monkeypatch.setattr(node_cache, "KEPT_SECONDS", 0.0)
    model.write_bytes("unet/weights.bin", b"3" * 1000)
    assert read(model.url)[1] == b"3" * 1000
    assert not Path(before).exists() and not Path(after).exists()


def test_an_interrupted_download_is_repeated(model: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Storage, rel: str, local_path: "str | os.PathLike[str]") -> None:
        Path(local_path).mkdir(parents=True)
        Path(local_path, "unet").write_text("incomplete")
        raise StorageError("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "download", fail)
        with pytest.raises(StorageError, match="away"):
            read(model.url)
    assert read(model.url)[1] == b"1" * 1000


def test_a_model_that_changes_during_the_download_is_refused(
    model: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Storage.download

    def download(self: Storage, rel: str, local_path: "str | os.PathLike[str]") -> None:
        usual(self, rel, local_path)
        model.write_bytes("unet/weights.bin", b"other")

    monkeypatch.setattr(Storage, "download", download)
    with pytest.raises(StorageError, match="changed while"):
        read(model.url)


def test_one_file_and_a_missing_address(model: Storage) -> None:
    with node_copy(f"{model.url}/index.json") as path:
        assert path.name == "index.json" and path.read_text() == "{}"
    with pytest.raises(StorageError, match="does not exist"), node_copy(f"{model.url}/nothing"):
        pass


def test_a_folder_that_cannot_be_written_gives_a_temporary_copy(
    model: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(node_cache.FOLDER_VARIABLE, str(tmp_path / "file"))
    with node_copy(model.url) as path:
        assert (path / "index.json").exists()
    assert not path.exists() and "cannot be used as a cache" in caplog.text


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with node_copy(str(tmp_path)) as path:
        assert path == tmp_path
