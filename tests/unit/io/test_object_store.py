"""Object stores: every body keeps the same promises."""

import threading
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from excimer.base.errors import RefusedError
from excimer.io.object_store import (
    FaultyObjectStore,
    MemoryObjectStore,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    ObjectStore,
    ObjectStoreError,
)
from excimer.io.object_store_options import panics_are
from excimer.io.obstore_object_store import PART_SIZE_BYTES, ObstoreObjectStore


@pytest.fixture(params=["file", "memory url", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return ObstoreObjectStore(f"file://{tmp_path}/with%20space")
    return MemoryObjectStore() if request.param == "memory" else ObstoreObjectStore("memory:///")


def test_objects_are_created_once_and_read_whole_or_in_part(store: ObjectStore) -> None:
    store.put("a/b/one", b"0123456789")
    with pytest.raises(ObjectExistsError):
        store.put("a/b/one", b"other")
    assert store.get("a/b/one") == b"0123456789"
    assert store.get_range("a/b/one", 2, 5) == b"234"
    store.delete("a/b/one")
    store.delete("a/b/one")
    with pytest.raises(ObjectMissingError):
        store.get("a/b/one")
    with pytest.raises(ObjectMissingError):
        store.get_range("a/b/one", 0, 1)


def test_listing_is_by_directory_and_sorted(store: ObjectStore) -> None:
    assert store.list("a") == []
    for name in ("a/2", "a/1/x", "ab/3", "c"):
        store.put(name, name.encode())
    assert store.list("a") == [ObjectInfo("a/1/x", 5), ObjectInfo("a/2", 3)]
    assert [info.name for info in store.list("")] == ["a/1/x", "a/2", "ab/3", "c"]


@pytest.mark.parametrize("size_bytes", [0, 5, 2 * PART_SIZE_BYTES + 3])
def test_files_are_streamed_into_objects(store: ObjectStore, tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    content = (b"0123456789abcdef" * (size_bytes // 16 + 1))[:size_bytes]
    path.write_bytes(content)
    for _ in range(2):  # a retry puts the same bytes
        store.put_file("a/layer", path)
    assert store.size_bytes("a/layer") == size_bytes
    assert store.get("a/layer") == content
    store.copy("a/layer", "b/copy")
    assert store.get("b/copy") == content
    with pytest.raises(FileNotFoundError):
        store.put_file("c", tmp_path / "none")
    with pytest.raises(ObjectMissingError):
        store.copy("none", "c")
    assert store.size_bytes("c") is None


def test_a_range_beyond_the_end_is_an_error(store: ObjectStore) -> None:
    store.put("short", b"12345")
    with pytest.raises(ObjectStoreError):
        store.get_range("short", 3, 9)


def test_many_are_deleted_at_once(store: ObjectStore) -> None:
    for name in ("a/1", "a/2", "a/3"):
        store.put(name, b"")
    store.delete_many(["a/1", "a/none", "a/3"])
    assert store.list("") == [ObjectInfo("a/2", 0)]
    store.delete_many([])


def test_one_of_many_writers_wins(store: ObjectStore) -> None:
    won = []

    def write(number: int) -> None:
        try:
            store.put("contested", b"%d" % number)
        except ObjectExistsError:
            return
        won.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [b"%d" % number for number in won] == [store.get("contested")]


def test_a_store_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="nonsense://"):
        ObstoreObjectStore("nonsense://x")
    with pytest.raises(RefusedError, match="colour"):
        ObstoreObjectStore("s3://bucket", {"colour": "red"})
    with pytest.raises(RefusedError, match="no options"):
        ObstoreObjectStore(f"file://{tmp_path}", {"region": "x"})


def test_an_unreachable_directory_is_retryable(tmp_path: Path) -> None:
    store = ObstoreObjectStore(f"file://{tmp_path}/store")
    (tmp_path / "store" / "file").write_bytes(b"")
    with pytest.raises(ObjectStoreError):
        store.put("file/below", b"x")


def test_a_faulty_store_fails_before_or_after_the_act() -> None:
    def fail(operation: str, name: str) -> None:
        raise ObjectStoreError(f"{operation} {name}")

    inner = MemoryObjectStore()
    with pytest.raises(ObjectStoreError, match="put x"):
        FaultyObjectStore(inner, fail).put("x", b"")
    assert inner.list("") == []
    with pytest.raises(ObjectStoreError, match="put x"):
        FaultyObjectStore(inner, fail, lose_answer=True).put("x", b"")
    assert inner.get("x") == b""


def test_a_stale_listing_shows_what_was_there() -> None:
    store = FaultyObjectStore(MemoryObjectStore(), lambda operation, name: None)
    store.put("a/old", b"")
    store.stale_listings = True
    store.put("a/new", b"")
    assert [info.name for info in store.list("a")] == ["a/old"]
    assert store.get("a/new") == b""
    store.stale_listings = False
    assert [info.name for info in store.list("a")] == ["a/new", "a/old"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"region": 5}, "region is a number"),
        ({"region": None}, "region is nothing"),
        ({"endpoint": ["http://a"]}, "endpoint is a list"),
        ({3: "x"}, "option 3 is not a text"),
        ({"endpoint": "not a url"}, "endpoint is 'not a url'"),
        ({"endpoint": "http://"}, "endpoint is 'http://'"),
        ({"endpoint": "ftp://host"}, "endpoint is"),
        ({"endpoint": "http://[::1"}, "endpoint is"),
        ({"endpoint": "http://host:99999"}, "endpoint is"),
        ({"access_key_id": "a\nb", "secret_access_key": "x"}, "access_key_id has a line break"),
        ({"region": "r", "timeout": "ten"}, "timeout: "),
        ({"region": "r", "skip_signature": "perhaps"}, "skip_signature: "),
        ({"nope": "1"}, "nope"),
    ],
    ids=str,
)
def test_an_option_of_the_wrong_kind_is_one_line_that_names_it(options: object, named: str) -> None:
    """Some of these are panics of the library, which are no `Exception`."""
    with pytest.raises(RefusedError) as caught:
        ObstoreObjectStore("s3://bucket/prefix", options)  # type: ignore[arg-type]
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://", "gs://", "az://", "http://host", "file://relative", "file:relative", "x", "s3://[/x"]
)
def test_a_url_of_no_store_is_refused_in_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be opened") as caught:
        ObstoreObjectStore(url)
    assert "\n" not in str(caught.value)


def test_a_wrong_endpoint_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(RefusedError, match="environment variable AWS_ENDPOINT_URL"):
        ObstoreObjectStore("s3://bucket/prefix")


class PanicException(BaseException):
    """As a library in Rust raises it."""


def test_a_panic_in_any_call_is_an_error_of_the_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None is known to be left; should there be one, it is handled like any failure of the store."""
    store = ObstoreObjectStore(f"file://{tmp_path}")
    store.put("there", b"x")
    (tmp_path / "source").write_bytes(b"x")

    def panics(*_: object, **__: object) -> None:
        raise PanicException("request valid: InvalidUri\nmore")

    for name in ("put", "copy", "get", "get_range", "head", "list", "delete"):
        monkeypatch.setattr(obstore, name, panics)
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", b"x"),
        lambda: store.put_file("a", tmp_path / "source"),
        lambda: store.copy("there", "a"),
        lambda: store.get("there"),
        lambda: store.get_range("there", 0, 1),
        lambda: store.size_bytes("there"),
        lambda: store.list(""),
        lambda: store.delete("there"),
        lambda: store.delete_many(["there"]),
    ]
    for call in calls:
        with pytest.raises(ObjectStoreError, match=r"failed inside: request valid: InvalidUri\Z"):
            call()


def test_what_is_no_panic_passes() -> None:
    with pytest.raises(KeyboardInterrupt), panics_are(ObjectStoreError):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="other"), panics_are(ObjectStoreError):
        raise ValueError("other")


def test_ranges_that_http_cannot_express_are_not_asked_for(tmp_path: Path) -> None:
    real = ObstoreObjectStore(f"file://{tmp_path}")
    real.put("name", b"content")
    assert real.get_range("name", 3, 3) == b""
    for start, end in [(5, 2), (-1, 3), (0, 1 << 70)]:
        with pytest.raises(ValueError, match="no range"):
            real.get_range("name", start, end)


@pytest.mark.parametrize("name", ["a//b", "a/../b", "a\nb"])
def test_a_name_that_no_store_takes_is_refused(tmp_path: Path, name: str) -> None:
    store = ObstoreObjectStore(f"file://{tmp_path}")
    for call in (lambda: store.get(name), lambda: store.put(name, b"x"), lambda: store.delete(name)):
        with pytest.raises(RefusedError):
            call()


def test_an_answer_of_another_length_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ObstoreObjectStore(f"file://{tmp_path}")
    store.put("name", b"content")
    whole = obstore.get(store._store, "name")

    class Short:
        meta = whole.meta

        def bytes(self) -> bytes:
            return b"cont"

    monkeypatch.setattr(obstore, "get", lambda *_: Short())
    monkeypatch.setattr(obstore, "get_range", lambda *_, **__: b"co")
    with pytest.raises(ObjectStoreError, match="4 bytes of name, which has 7"):
        store.get("name")
    with pytest.raises(ObjectStoreError, match="2 bytes of name for 3"):
        store.get_range("name", 0, 3)
