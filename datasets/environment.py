"""Sends environment variables to other machines, and keeps the secrets among them out of Ray's logs.

Ray copies environment variables of the driver into the processes that it starts and into runtime environments, which it
logs on every machine. Secrets are therefore sent inside pickled functions, and hidden while Ray copies the environment.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
# AWS variables that refer to roles and files of one machine.
_MACHINE_SPECIFIC = re.compile(
    r"AWS_(CONTAINER_|ROLE_|WEB_IDENTITY_|EXECUTION_ENV|CONFIG_FILE|SHARED_CREDENTIALS_FILE|CA_BUNDLE|(DEFAULT_)?PROFILE)"
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Variables that name files and folders; they are only set on machines where these exist.
PATHS = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
)
_SECRET_WORDS = {
    "TOKEN",
    "SECRET",
    "KEY",
    "APIKEY",
    "PASSWORD",
    "PASSWD",
    "PASS",
    "CREDENTIAL",
    "CREDENTIALS",
}
_LOCATION_SUFFIXES = (
    "_FILE",
    "_PATH",
    "_DIR",
    "_URI",
)  # endings of variables that name the location of a secret instead of the secret
_LOGIN_IN_ADDRESS = re.compile(r"://[^/\s@]+@")

# The variables that are temporarily removed from os.environ; global, as os.environ is.
_hidden: dict[str, str] = {}
_hiders = 0
_lock = threading.Lock()


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable is a secret, judging by its name or a login in a URL; Ray's own variables never are."""
    if name.startswith(("RAY_", "DREAMFLEET_")):
        return False
    if _LOGIN_IN_ADDRESS.search(value):
        return True
    return not name.upper().endswith(_LOCATION_SUFFIXES) and not _SECRET_WORDS.isdisjoint(
        name.upper().split("_")
    )


def masked(text: str) -> str:
    """Return a text with the user names and passwords in URLs masked."""
    return _LOGIN_IN_ADDRESS.sub("://***@", text)


@contextmanager
def secrets_hidden() -> Iterator[None]:
    """Remove secrets from os.environ while Ray copies it; :func:`variable` still returns them."""
    global _hiders
    with _lock:
        _hiders += 1
        _hidden.update({name: value for name, value in os.environ.items() if is_secret(name, value)})
        for name in _hidden:
            os.environ.pop(name, None)
    try:
        yield
    finally:
        with _lock:
            _hiders -= 1
            if not _hiders:
                for name, value in _hidden.items():
                    os.environ.setdefault(name, value)
                _hidden.clear()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set those of the variables that are not set, within this context."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def variable(name: str) -> str | None:
    """Return an environment variable of this process, even while :func:`secrets_hidden` hides it."""
    return os.environ.get(name) or _hidden.get(name)


def variables_to_send(*, buckets: bool) -> dict[str, str]:
    """Return the environment variables that other machines need. They contain secrets: never log the result.

    These are proxies, the token and settings of the Hugging Face hub and, with ``buckets``, the AWS settings. AWS
    profiles and hub logins are files of this machine, so their keys and token are sent instead.
    """
    with _lock:
        here = {**_hidden, **os.environ}
    names = [*HUB, *PATHS, *PROXIES, *(name.lower() for name in PROXIES)]
    sent = {name: here[name] for name in names if here.get(name)}
    for name in list(sent):
        # A proxy on this machine's loopback address is not reachable from other machines.
        if name.upper() in PROXIES[:3] and _is_loopback(sent[name]) and not is_secret(name, sent[name]):
            del sent[name]
    if "HF_TOKEN" not in sent and (token := _stored_token(here)):
        sent["HF_TOKEN"] = token
    if buckets:
        sent |= {n: v for n, v in here.items() if n.startswith("AWS_") and not _MACHINE_SPECIFIC.match(n)}
        if "AWS_ACCESS_KEY_ID" not in sent:
            sent = _of_profile() | sent
    return sent


def apply_variables(sent: Mapping[str, str]) -> None:
    """Set the variables that :func:`variables_to_send` returned on another machine.

    Variables that are already set keep their values (proxies as a group), and paths are set only if they exist. The AWS
    keys and settings replace all of this machine's, since the run's bucket was opened with them. If this machine has
    the profile that the keys come from, the profile is used instead, since it can renew them.
    """
    others = {name: value for name, value in sent.items() if not name.startswith("AWS_") or name in PATHS}
    own_proxies = any(os.environ.get(name) or os.environ.get(name.lower()) for name in PROXIES)
    for name, value in others.items():
        if name.upper() in PROXIES:
            if not own_proxies:
                os.environ[name] = value
        elif name not in PATHS or os.path.exists(value):
            os.environ.setdefault(name, value)
    aws = {name: value for name, value in sent.items() if name not in others}
    profile = aws.pop("AWS_PROFILE", None)
    if "AWS_ACCESS_KEY_ID" in aws:
        for name in (*AWS_KEYS, *PROFILES):
            os.environ.pop(name, None)
        if profile is not None and has_profile(profile):
            aws = {name: value for name, value in aws.items() if name not in AWS_KEYS}
            aws["AWS_PROFILE"] = profile
    os.environ.update(aws)


def has_profile(name: str) -> bool:
    """Return whether an AWS profile is defined in this machine's configuration files."""
    return name in _session().available_profiles


def _is_loopback(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _stored_token(here: Mapping[str, str]) -> str | None:
    """Return the token that `hf auth login` stored, found as by huggingface_hub; None without one."""
    if here.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() in ("1", "true", "yes", "on"):
        return None
    cache = here.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.path.expanduser(here.get("HF_HOME") or os.path.join(cache, "huggingface"))
    try:
        with open(here.get("HF_TOKEN_PATH") or os.path.join(home, "token"), encoding="utf-8") as file:
            return file.read().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _of_profile() -> dict[str, str]:
    """Return keys, region and endpoint of the active AWS profile as variables; {} if the keys are not in a file."""
    files = ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config")
    if not any(os.path.exists(os.path.expanduser(os.environ.get(name) or usual)) for name, usual in files):
        return {}
    try:
        session = _session()
        for machine in ("iam-role", "container-role", "assume-role-with-web-identity"):
            session.get_component("credential_provider").remove(machine)
        found = session.get_credentials()
        keys = found.get_frozen_credentials() if found is not None else None
        if keys is None:
            return {}
        named = {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_SESSION_TOKEN": keys.token,
            "AWS_DEFAULT_REGION": session.get_config_variable("region"),
            "AWS_ENDPOINT_URL_S3": None if variable("AWS_ENDPOINT_URL") else _endpoint_of(session),
            "AWS_PROFILE": session.profile or "default",
        }
    except Exception as error:  # noqa: BLE001 - botocore's errors share no class; opening the bucket reports them better
        log.debug("no keys could be read from the AWS profile: %s", type(error).__name__)
        return {}
    if keys.token:
        log.warning(
            "the keys of AWS profile %s are temporary; machines without the profile cannot renew them during the run",
            named["AWS_PROFILE"],
        )
    return {name: str(value) for name, value in named.items() if value}


def _endpoint_of(session: Any) -> str | None:
    profile = session.get_scoped_config()
    service = session.full_config.get("services", {}).get(profile.get("services"), {}).get("s3", {})
    return service.get("endpoint_url") or profile.get("endpoint_url")


def _session() -> Any:
    import botocore.session

    return botocore.session.Session()
