"""Decides which http(s) addresses may be read: none of private networks, and none with a login in it."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from dreamfleet.datasets.errors import DataError, StorageError

WEB = ("http", "https")


def is_web(text: str) -> bool:
    """Return whether a text is an http or https address."""
    return text.partition("://")[0].lower() in WEB and "://" in text


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise DataError for an address with a login or without a host, or of a private network given by its number."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DataError(f"{url[:80]!r} is not a valid address ({error})") from error
    if not host:
        raise DataError(f"{url[:80]!r} names no host")
    if parts.username is not None or parts.password is not None:
        raise DataError(
            f"the address at {host} has a login in it, which would be stored in tables and logs. Remove it, and put "
            "the login into ~/.netrc of every machine"
        )
    if any(character.isspace() or not character.isprintable() for character in url):
        raise DataError(f"{url[:80]!r} contains spaces or control characters. Escape them, as in %20")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not allow_private and host.lower().rstrip(".") == "localhost":
            raise _private(host) from None
        return
    if not allow_private and not is_public(address):
        raise _private(host)


def resolve(host: str, port: int, *, allow_private: bool) -> tuple[int, str]:
    """Return the family and the number of an address of a host. Raises StorageError if one of them is private.

    The connection must be made to this number: another look-up of the name could return another one.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StorageError(f"host {host} is unknown ({error}). Check the address and the network") from error
    numbers = [(int(family), str(place[0])) for family, _, _, _, place in found]
    if not allow_private:
        for _, number in numbers:
            if not is_public(ipaddress.ip_address(number.partition("%")[0])):
                raise StorageError(str(_private(f"{host} ({number})")))
    return numbers[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an IP address is one of the public Internet, also inside an IPv6 address that wraps IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None:
            return is_public(inner)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast


def _private(host: str) -> DataError:
    return DataError(
        f"{host} is in a private network. Set data.allow_private_urls: true if you trust the table of addresses"
    )
