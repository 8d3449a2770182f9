"""A model hub that does not answer is found out once, in seconds, not by each file's retries."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

# To wait for a connection.
SECONDS = 5.0
# Environment variables that name a proxy.
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")


@contextlib.contextmanager
def asked_or_cached() -> Iterator[None]:
    """Where the hub does not answer, let the libraries inside look into their caches alone.

    They then say at once what is missing. Behind a proxy nothing is tried out, and the libraries do
    as they would.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def answers(address: str, seconds: float = SECONDS) -> bool:
    """Whether something listens at an address; taken for granted behind a proxy.

    Args:
        address: Such as ``https://host:port``; without a port it is that of the scheme.
        seconds: To wait for a connection.
    """
    if any(os.environ.get(name) for name in PROXIES):
        return True
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


def refuse_revision(name: str, revision: str | None) -> None:
    """ValueError if a revision is named of a model that comes from no hub.

    Args:
        name: Of the model.
        revision: What was asked for; None is right.
    """
    if revision is not None:
        raise ValueError(
            f"revision applies to hub ids only, got revision {revision!r} for {name!r}"
        )
