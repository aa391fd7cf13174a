"""What does an image's URL give? Fetched within limits of size and time, and from public addresses only.

A row of a data set may name any address. Those of this machine and of its network (loopback, private,
link-local, where clouds keep credentials) are refused at the moment of connecting, so that neither
a name nor a redirection leads there. Behind a proxy it is the proxy that connects.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from shared.config_data import ImagesConfig
from shared.data.images import ImageError

_CHUNK_BYTES = 1 << 16


def fetch(url: str, config: ImagesConfig) -> bytes:
    """What an http(s) URL gives, within the limits of size and time.

    Raises:
        ImageError: an error of the server or the network, or a limit is passed.
    """
    ends = time.monotonic() + config.timeout_s
    content = bytearray()
    try:
        with _opener(config).open(url, timeout=config.timeout_s) as answer:
            while chunk := answer.read1(_CHUNK_BYTES):
                content += chunk
                if len(content) > config.max_bytes:
                    raise ImageError(
                        f"more than images.max_bytes: {config.max_bytes}. Leave it out, or raise the limit."
                    )
                if time.monotonic() > ends:
                    raise TimeoutError("timed out")
    except TimeoutError:
        raise ImageError(
            f"took longer than images.timeout_s: {config.timeout_s:g}. Download it, or raise the limit."
        ) from None
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise ImageError(
                f"took longer than images.timeout_s: {config.timeout_s:g}. Download it, or raise the limit."
            ) from None
        raise ImageError(f"cannot be fetched ({error}). Download it, or skip the row.") from None
    return bytes(content)


def _opener(config: ImagesConfig) -> urllib.request.OpenerDirector:
    """Without the handlers of ftp, files and data, which a redirection could lead to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler() if config.allow_private else _PublicHTTP(),
        urllib.request.HTTPSHandler() if config.allow_private else _PublicHTTPS(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        kind = http.client.HTTPConnection if _is_proxied(request) else _PublicConnection
        return self.do_open(kind, request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if _is_proxied(request) else _PublicSecureConnection
        return self.do_open(kind, request)


class _PublicConnection(http.client.HTTPConnection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = _connect_publicly  # what `connect` calls


class _PublicSecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = _connect_publicly


def _connect_publicly(place: tuple[str, int], *args: Any) -> socket.socket:
    """A connection to the very address that was looked at: a name may mean another one the next time."""
    host, port = place
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    private = next((address for address in found if not _is_public(str(address))), None)
    if private is not None:
        raise ImageError(
            f"{host} is {private}, an address of this machine or its network. Download it, or set "
            "prompts.images.allow_private: true if you trust the rows."
        )
    return socket.create_connection((str(found[0]), port), *args)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_global


def _is_proxied(request: urllib.request.Request) -> bool:
    return request.host != urlsplit(request.full_url).netloc
