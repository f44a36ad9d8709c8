"""The source of single images at http(s) addresses: each is fetched once into this machine's cache, with its hash."""

from __future__ import annotations

import hashlib
import http.client
import netrc
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from dreamfleet.datasets.errors import DataError, StorageError
from dreamfleet.datasets.index.sources import Listing, ScanOptions, Source, SourceImage
from dreamfleet.datasets.index.url_policy import check_url, is_web, resolve
from dreamfleet.datasets.storage.disk import atomic_write, explain_errors
from dreamfleet.datasets.storage.node_cache import cache_folder

SCHEME, PRIVATE = "url", "private/"
MOST_BYTES = 512 * 2**20  # of one file that is fetched
MOST_REDIRECTS = 5
SECONDS = 60.0  # without an answer
ATTEMPTS, PAUSE = 4, 0.5  # a failed request is repeated after PAUSE seconds, then after twice as many ...
_DIGEST = 64  # a cached file begins with the hex digits of the hash of the rest
_KEPT = "/%?&=:@!$'()*+,;~-._[]"  # characters of an address that are not escaped
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}


class UrlSource(Source):
    """Reads `url://https://host/image.jpg`, which tables of addresses list, and single https addresses of images."""

    reads_web = True

    def matches(self, url: str) -> bool:
        """Return whether a URL is the web address of an image; tables and shards have sources of their own."""
        return is_web(url) and not urlsplit(url).path.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv"))

    def scan(self, url: str, options: ScanOptions) -> Listing:
        """List the one image. Raises DataError for an address that may not be read."""
        check_url(url, allow_private=options.allow_private)
        name = urlsplit(url).path.rpartition("/")[2]
        return Listing([SourceImage(url_uri(url, allow_private=options.allow_private), name=name)])

    def read(self, uri: str) -> bytes:
        """Return the content at an address, from the cache if it was fetched before. Raises StorageError."""
        url = uri.removeprefix(f"{SCHEME}://")
        return fetch(url.removeprefix(PRIVATE), allow_private=url.startswith(PRIVATE))


def url_uri(url: str, *, allow_private: bool) -> str:
    """Return the URI in an index of the file at a web address."""
    return f"{SCHEME}://{PRIVATE if allow_private else ''}{url}"


def fetch(url: str, *, allow_private: bool) -> bytes:
    """Return the content at a web address, fetched once per machine. Raises StorageError with the reason.

    The cached copy is checked by its hash, and fetched again if it is damaged.
    """
    name = hashlib.sha256(url.encode()).hexdigest()
    path = cache_folder() / "urls" / name[:2] / name
    if (kept := _kept(path)) is not None:
        return kept
    data = _download(url, allow_private=allow_private)
    with explain_errors("write", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path), durable=False) as temporary:
            Path(temporary).write_bytes(hashlib.sha256(data).hexdigest().encode() + data)
    return data


def _kept(path: Path) -> bytes | None:
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    data = whole[_DIGEST:]
    return data if hashlib.sha256(data).hexdigest().encode() == whole[:_DIGEST] else None


def _download(url: str, *, allow_private: bool) -> bytes:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, allow_private=allow_private)
        except _Again as error:
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"cannot read {url}: {error}, {ATTEMPTS} times. Try again later"
                ) from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
        except DataError as error:
            raise StorageError(f"cannot read {url}: {error}") from error
    raise AssertionError


class _Again(Exception):
    """A failure that may be temporary."""


def _follow(url: str, *, allow_private: bool) -> bytes:
    """Return the content at an address, following redirects, each of which is checked as the address itself."""
    place = url
    for _ in range(MOST_REDIRECTS + 1):
        check_url(place, allow_private=allow_private)
        status, headers, data = _request(place, allow_private=allow_private)
        if status not in _REDIRECTS:
            break
        place = urljoin(place, headers.get("location", ""))
        if not is_web(place):
            raise StorageError(f"cannot read {url}: it redirects to {place[:80]!r}")
    else:
        raise StorageError(f"cannot read {url}: more than {MOST_REDIRECTS} redirects")
    if status in _AGAIN:
        raise _Again(f"the server answers {status}")
    if status != 200:
        raise StorageError(
            f"cannot read {url}: the server answers {status} {http.client.responses.get(status, '')}"
        )
    return data


def _request(url: str, *, allow_private: bool) -> tuple[int, Mapping[str, str], bytes]:
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme.lower() == "https"
    port = parts.port or (443 if secure else 80)
    connection = _Connection(host, port, secure=secure, allow_private=allow_private)
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    try:
        connection.request(
            "GET",
            target if target.isascii() else quote(target, safe=_KEPT),
            headers={"User-Agent": "dreamfleet", "Accept": "*/*", **_login(host)},
        )
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        if answer.status != 200:
            return answer.status, headers, b""
        data = answer.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _Again(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if len(data) > MOST_BYTES:
        raise StorageError(f"cannot read {url}: it has more than {MOST_BYTES:,} bytes")
    return 200, headers, data


def _login(host: str) -> dict[str, str]:
    """Return the header with the login for a host in ~/.netrc, if there is one."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    return {"Authorization": f"Basic {b64encode(f'{found[0]}:{found[2]}'.encode()).decode()}"}


class _Connection(http.client.HTTPConnection):
    """A connection to the IP address that was checked, with TLS for the name of the host."""

    def __init__(self, host: str, port: int, *, secure: bool, allow_private: bool):
        super().__init__(host, port, timeout=SECONDS)
        self._secure, self._allow_private = secure, allow_private

    def connect(self) -> None:
        """Connect to the host."""
        family, number = resolve(self.host, self.port, allow_private=self._allow_private)
        found = socket.socket(family, socket.SOCK_STREAM)
        found.settimeout(SECONDS)
        found.connect((number, self.port))
        self.sock = (
            ssl.create_default_context().wrap_socket(found, server_hostname=self.host)
            if self._secure
            else found
        )
