"""Test file storage on disk and on a real S3 server through one interface."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from servers import S3Server, s3_server  # noqa: F401  (a fixture)

from dreamfleet.datasets.errors import StorageError
from dreamfleet.datasets.index.index import build_index
from dreamfleet.datasets.storage import retry
from dreamfleet.datasets.storage.storage import Storage, read_uri


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return Storage(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return Storage(server.new_folder()).child("some/prefix")


@pytest.fixture
def s3(s3_server, monkeypatch):  # noqa: F811
    s3_server.set_environment(monkeypatch)
    return s3_server


def test_write_read_list_remove(storage):
    assert not storage.exists("a/b.txt")
    assert storage.list("", recursive=True) == []
    assert storage.list_dirs() == []
    storage.write_text("a/b.txt", "héllo")
    storage.write_bytes("a/c/d.bin", b"\0" * 1000)
    storage.write_bytes("top", b"")
    assert storage.read_text("a/b.txt") == "héllo"
    assert storage.read_bytes("top") == b""
    assert storage.exists("a")
    assert storage.exists("a/c/d.bin")
    assert not storage.exists("a/c/d")
    assert storage.list() == ["top"]
    assert storage.list("a") == ["b.txt"]
    assert storage.list("", recursive=True) == ["a/b.txt", "a/c/d.bin", "top"]
    assert storage.list_dirs() == ["a"]
    assert storage.list_dirs("a") == ["c"]
    assert storage.child("a", "c").list() == ["d.bin"]
    assert storage.size("a/c/d.bin") == 1000
    assert storage.size("a") == 1006
    assert read_uri(storage.path("a", "b.txt")) == "héllo".encode()
    storage.write_text("a/b.txt", "new")
    assert storage.read_text("a/b.txt") == "new"
    storage.remove("a/b.txt")
    storage.remove("a/b.txt")
    assert not storage.exists("a/b.txt")
    storage.remove("a")
    assert storage.list("", recursive=True) == ["top"]


def test_empty_folders_do_not_exist(storage, tmp_path):
    """Test that folders without files do not exist, on disk and as S3 markers of a console or Hadoop."""
    assert not storage.has_files()
    storage.write_text("gone/below/a.txt", "x")
    assert storage.has_files() and storage.has_files("gone")
    storage.remove("gone/below/a.txt")
    if storage.is_local:
        (tmp_path / "store/made/by hand").mkdir(parents=True)
    else:
        bucket = Storage(storage.url.rpartition("/")[0])
        for name in ("prefix/", "prefix/made/", "prefix/made/by hand/", "prefix/old_$folder$"):
            bucket._on_bucket("write", "", lambda fs, key, name=name: put_marker(fs, f"{key}/{name}"))
        assert storage.list_dirs() == [] and not storage.exists("made") and not storage.exists()
    assert not storage.has_files() and not storage.has_files("gone")
    assert storage.list("", recursive=True) == storage.list() == storage.list("made") == []
    assert storage.size("made") == 0
    storage.download("made", tmp_path / "copy")
    storage.write_text("made/by hand/b.txt", "x")
    assert storage.list("", recursive=True) == ["made/by hand/b.txt"]
    assert storage.list_dirs("made") == ["by hand"] and storage.exists("made")
    storage.remove("made")
    assert not storage.has_files()


def put_marker(fs, key):
    bucket, _, name = key.partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=name, Body=b"")


def test_names_with_spaces_and_symbols(storage):
    names = ["10_sks dog/ä #1+2 %41?.png", "a=b&c.txt", "semi;colon.txt"]
    for name in names:
        storage.write_text(name, name)
    assert storage.list("", recursive=True) == sorted(names)
    assert all(storage.read_text(name) == name for name in names)


def test_names_that_leave_the_folder_are_refused(storage, tmp_path):
    storage.write_text("in/a.txt", "x")
    inner = storage.child("in")
    for act in (
        lambda: inner.write_text("../b.txt", "x"),
        lambda: inner.read_bytes("c/../../in/a.txt"),
        lambda: inner.remove("../in"),
        lambda: inner.child(".."),
        lambda: inner.download("../in", tmp_path / "copy"),
    ):
        with pytest.raises(StorageError, match="leaves its folder"):
            act()
    assert storage.list("", recursive=True) == ["in/a.txt"]
    inner.write_text("a..b/..c", "two dots in a name are a name")


def test_the_longest_name_of_the_file_system(tmp_path):
    name = "猫" * 83 + ".txt"  # 253 of at most 255 bytes
    Storage(tmp_path).write_text(name, "x")
    assert Storage(tmp_path).list() == [name]


def test_append(storage):
    for number in range(3):
        storage.append_text("log/metrics.jsonl", f"{number}\n")
    other = pickle.loads(pickle.dumps(storage))
    other.append_text("log/metrics.jsonl", "3\n")
    assert storage.read_text("log/metrics.jsonl") == "0\n1\n2\n3\n"


def test_upload_download_and_local_copy(storage, tmp_path):
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "in" / "b.bin").write_bytes(os.urandom(300_000))
    storage.upload(source, "up")
    assert storage.list("up", recursive=True) == ["a.txt", "in/b.bin"]
    storage.download("up", tmp_path / "down")
    assert (tmp_path / "down" / "in" / "b.bin").read_bytes() == (source / "in" / "b.bin").read_bytes()
    storage.upload(source / "a.txt", "one/renamed.txt")
    storage.download("one/renamed.txt", tmp_path / "x" / "a.txt")
    assert (tmp_path / "x" / "a.txt").read_text() == "a"
    with storage.local_copy("up") as path:
        assert sorted(item.name for item in path.iterdir()) == ["a.txt", "in"]
    with storage.local_copy("up/a.txt") as path:
        assert path.read_text() == "a"
        assert path.suffix == ".txt"
    assert path.exists() == storage.is_local


def test_staged_files_appear_only_when_complete(storage):
    storage.write_text("model.bin", "old")
    staged = storage.staging("model.bin")
    staged.__enter__().write_text("half")
    assert not staged.__exit__(KeyError, KeyError(), None)
    assert storage.read_text("model.bin") == "old"
    with storage.staging("model.bin") as path:
        path.write_text("whole")
    with storage.staging("folder/of/files") as path:
        path.mkdir()
        (path / "a").write_text("1")
    assert storage.list("", recursive=True) == ["folder/of/files/a", "model.bin"]
    assert storage.read_text("model.bin") == "whole"


def test_missing_file(storage):
    storage.write_text("there", "x")
    for act in (storage.read_bytes, storage.size):
        with pytest.raises(StorageError, match=r"nothing\.txt: .*does not exist"):
            act("nothing.txt")
    with pytest.raises(StorageError, match="does not exist"), storage.local_copy("nothing.txt"):
        pass


def test_text_that_is_not_utf8(storage):
    storage.write_bytes("a.txt", b"ab\xff")
    with pytest.raises(StorageError, match=r"0xff .*2"):
        storage.read_text("a.txt")


def test_pickled_storage_works(storage):
    storage.write_text("a", "1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert copy.read_text("a") == "1"


def test_index_of_images(storage):
    from image_files import image as make

    for seed in range(4):
        storage.write_bytes(f"set/{seed}.png", make(seed))
    storage.write_bytes("set/cut.png", make(9, size=(90, 90))[:2000])
    storage.write_text("set/1.txt", "one")
    index = build_index(storage.child("set"))
    assert len(index) == 4
    assert sorted(row.uri for row in index.rows()) == [
        storage.path("set", f"{seed}.png") for seed in range(4)
    ]
    assert [row.caption for row in index.rows() if row.caption] == ["one"]
    assert [item.uri for item in index.bad] == [storage.path("set/cut.png")]
    assert index.content_hash == build_index(storage.path("set")).content_hash


# ---- disk only ------------------------------------------------------------------------------------------


def test_relative_paths_are_made_absolute_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("here")
    monkeypatch.chdir("/")
    storage.write_text("a", "1")
    assert (tmp_path / "here" / "a").read_text() == "1"
    assert Storage(f"file://{tmp_path}/here").read_text("a") == "1"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "ftp://"),
        ("s3://", "no bucket"),
        ("", "empty path"),
        ("s3://key:verysecret@bucket/x", "keys inside"),
    ],
)
def test_invalid_addresses_are_refused(url, message):
    with pytest.raises(StorageError, match=message) as caught:
        Storage(url)
    assert "verysecret" not in str(caught.value)


def test_unfinished_writes_are_not_listed_and_leave_nothing(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write_text("a.txt", "old")
    (tmp_path / ".b.txt.tmp-0123456789ab").write_text("left by a killed process")
    assert storage.list() == ["a.txt"]

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="disk is full"):
        storage.write_text("a.txt", "new")
    assert storage.read_text("a.txt") == "old"
    assert storage.list() == ["a.txt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    code = (
        "import os, sys\n"
        "from dreamfleet.datasets.storage.storage import Storage\n"
        "os.replace = lambda *names: os.kill(os.getpid(), 9)\n"
        f"Storage({str(tmp_path)!r}).write_text('a.txt', 'new')\n"
    )
    (tmp_path / "a.txt").write_text("old")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert Storage(tmp_path).read_text("a.txt") == "old"
    assert Storage(tmp_path).list() == ["a.txt"]


@pytest.fixture
def small_disk():
    """Mount a file system of 64 KiB; yield its path.

    The path is outside pytest's folders, which a concurrent pytest run may remove.
    """
    place = Path(tempfile.mkdtemp(prefix="dreamfleet-small-"))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
    place.rmdir()


def test_full_disk(small_disk):
    storage = Storage(small_disk)
    storage.write_bytes("a.bin", b"old")
    with pytest.raises(StorageError, match=r"a\.bin: .*disk is full"):
        storage.write_bytes("a.bin", b"x" * 200_000)
    assert storage.read_bytes("a.bin") == b"old"
    with pytest.raises(StorageError, match="disk is full"), storage.staging("b/c.bin") as path:
        path.write_bytes(b"x" * 200_000)
    with pytest.raises(StorageError, match="disk is full"):
        storage.append_text("log", "x" * 200_000)
    assert [item.name for item in small_disk.iterdir() if item.name.startswith(".")] == []
    storage.remove("log")
    storage.write_bytes("d.bin", b"x" * 20_000)  # incomplete writes leave no data on the disk


def test_full_disk_hidden_by_a_library(small_disk):
    storage = Storage(small_disk)
    torch = pytest.importorskip("torch")
    with pytest.raises(StorageError, match="disk is full"), storage.staging("w.pt") as path:
        torch.save({"w": torch.zeros(100_000)}, path)
    with pytest.raises(RuntimeError, match="other"), storage.staging("w.pt"):
        raise RuntimeError("other")
    assert storage.list() == []


def test_other_disk_errors_name_the_remedy(tmp_path):
    storage = Storage(tmp_path)
    storage.write_text("file", "x")
    with pytest.raises(StorageError, match="file is in the way"):
        storage.write_text("file/below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        storage.read_bytes("folder")
    with pytest.raises(StorageError, match="too long"):
        storage.write_text("n" * 300, "x")


# ---- buckets only ---------------------------------------------------------------------------------------


@pytest.mark.s3
def test_missing_bucket(s3):
    storage = Storage("s3://no-such-bucket-here/x")
    for act in (
        lambda: storage.read_bytes("a"),
        lambda: storage.list("", recursive=True),
        lambda: storage.list_dirs(),
        lambda: storage.write_bytes("a", b"x"),
    ):
        with pytest.raises(StorageError, match=r"'no-such-bucket-here' does not exist"):
            act()


@pytest.mark.s3
def test_wrong_keys_are_reported_and_not_printed(s3, monkeypatch):
    storage = Storage(s3.new_folder())
    storage.write_text("a", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quite-wrong-secret")
    for act in (lambda s: s.read_bytes("a"), lambda s: s.write_bytes("a", b"2"), lambda s: s.list()):
        with pytest.raises(StorageError, match=r"access denied at http://127\.0\.0\.1") as caught:
            act(Storage(storage.url))
        assert "quite-wrong-secret" not in str(caught.value)
    assert "secret" not in repr(pickle.dumps(storage)).lower()


@pytest.mark.s3
def test_no_keys(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"AWS_ACCESS_KEY_ID|access denied"):
        Storage(s3.new_folder()).write_text("a", "1")


@pytest.mark.s3
def test_a_missing_server_is_reported_soon(s3, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 .*AWS_ENDPOINT_URL"):
        Storage("s3://bucket/x").read_bytes("a")


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_survives_a_fork(s3):
    storage = Storage(s3.new_folder())
    storage.write_text("a", "1")
    child = os.fork()
    if child == 0:
        try:
            Storage(storage.url).write_text("b", "from the child")
            storage.write_text("c", "through the parent's object")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert storage.list() == ["a", "b", "c"]


@pytest.mark.s3
def test_a_login_in_an_endpoint_is_never_printed(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9") as reported:
        Storage("s3://bucket/x").read_bytes("a")
    assert "hush" not in str(reported.value)


@pytest.mark.s3
def test_large_object(s3, tmp_path):
    storage = Storage(s3.new_folder())
    data = os.urandom(1 << 20) * 24
    storage.write_bytes("big.bin", data)
    assert storage.size("big.bin") == len(data)
    storage.download("big.bin", tmp_path / "big.bin")
    assert (tmp_path / "big.bin").read_bytes() == data
