"""How is one JSON request answered over a network that fails: classify, wait, ask again, give up clearly."""

from __future__ import annotations

import html
import http.client
import json
import logging
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

from shared.errors import UserError

BACKOFF_CAP_S = 60.0
LONGEST_WAIT_S = 600.0  # a server that asks for more has run out of quota, not of breath
MAX_REPLY_BYTES = 32 << 20
MAX_ERROR_BYTES = 64 << 10

_PASSING_STATUS = {408, 425, 429}  # and 500 to 599
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}  # OpenAI's 429s that no waiting mends
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}

T = TypeVar("T")
log = logging.getLogger(__name__)


class ServerError(UserError):
    """A server that refuses a request, or that does not answer however often it is asked."""


class MalformedReplyError(Exception):
    """A reply that is not what was asked for, which another attempt may mend."""


class Cancelled(Exception):
    """The caller has no more use for the answer."""


class Answer(NamedTuple, Generic[T]):
    """A parsed reply. `seconds` is of the attempt that succeeded."""

    value: T
    seconds: float
    attempts: int


class _PassingError(Exception):
    """A failure worth another attempt, perhaps not before `wait_s`."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Endpoint:
    """One URL that takes JSON by POST and answers with a JSON object.

    429, 5xx, timeouts, broken connections and malformed replies are tried again, with exponential backoff,
    jitter and the server's own Retry-After; every other refusal ends at once. Redirects are not followed,
    since that would hand the key to another host. Proxies are taken from the environment, except on this
    machine. The key never appears in messages, not even where the server repeats it.
    """

    def __init__(
        self,
        url: str,
        *,
        key: SecretStr | None = None,
        timeout_s: float = 600.0,
        attempts: int = 8,
        backoff_s: float = 1.0,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self._url = url
        self._key = key
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._max_reply_bytes = max_reply_bytes
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def ask(
        self, payload: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T], cancelled: threading.Event
    ) -> Answer[T]:
        """Send `payload` until `parse` accepts the reply.

        Args:
            payload: The request, as JSON.
            parse: Reads the reply; raises MalformedReplyError for one that must be asked for again.
            cancelled: Ends a wait between attempts.

        Raises:
            ServerError: refused, or every attempt failed.
            Cancelled: `cancelled` was set.
        """
        body = json.dumps(payload).encode()
        for attempt in range(1, self._attempts + 1):
            started = time.monotonic()
            try:
                value = parse(self._post(body, deadline=started + self._timeout_s))
                return Answer(value, time.monotonic() - started, attempt)
            except MalformedReplyError as error:
                failure = _PassingError(self._clean(str(error)))
            except _PassingError as error:
                failure = error
            if attempt < self._attempts:
                wait_s = self._wait_s(attempt, failure)
                level = logging.INFO if attempt == 1 else logging.WARNING  # one slip is nobody's business
                log.log(
                    level, "%s: %s; attempt %d follows in %.1f s", self._url, failure, attempt + 1, wait_s
                )
                if cancelled.wait(wait_s):
                    raise Cancelled
        raise ServerError(
            f"{self._url}: gave up after {self._attempts} attempt(s). The last one: {failure}. Check the "
            "server, then run the same command again to go on from there."
        ) from None

    def _wait_s(self, attempt: int, failure: _PassingError) -> float:
        backoff_s = min(BACKOFF_CAP_S, self._backoff_s * 2.0 ** (attempt - 1))
        # the jitter keeps clients that failed together from coming back together
        return max(backoff_s * random.uniform(0.5, 1.0), failure.wait_s)

    def _post(self, body: bytes, *, deadline: float) -> Mapping[str, Any]:
        request = urllib.request.Request(self._url, data=body, method="POST", headers=self._headers())
        try:
            with self._opener.open(request, timeout=self._timeout_s) as reply:
                return self._read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                failure: Exception = self._refusal(error)
        except urllib.error.URLError as error:
            failure = self._unreachable(error.reason)
        except (OSError, http.client.HTTPException) as error:
            failure = self._unreachable(error)
        raise failure from None  # the original holds the request with its headers

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        return headers

    def _read(self, reply: http.client.HTTPResponse, deadline: float) -> Mapping[str, Any]:
        if reply.headers.get_content_type() == "text/html":
            raise ServerError(
                f"{self._url} is a web page, not an API. Check the base URL: most end in /v1, as in "
                "http://localhost:8000/v1."
            )
        content = bytearray()
        while piece := reply.read1(1 << 16):
            content += piece
            if len(content) > self._max_reply_bytes:
                raise ServerError(
                    f"{self._url}: the reply is longer than {self._max_reply_bytes} bytes, and no answer is."
                )
            if time.monotonic() > deadline:
                raise _PassingError(f"the reply took longer than {self._timeout_s:g} s")
        try:
            value = json.loads(content)
        except ValueError as error:
            raise _PassingError(
                f"the reply ({len(content)} bytes) is cut or no JSON: {self._clean(str(error))}"
            ) from None
        if not isinstance(value, dict):
            raise _PassingError(f"the reply is a JSON {type(value).__name__}, not an object")
        return value

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        said, code = self._said(error)
        message = f"HTTP {error.code}{f': {said}' if said else ''}"
        wait_s = _retry_after_s(error.headers.get("Retry-After"))
        passing = error.code in _PASSING_STATUS or error.code >= 500
        if passing and code not in _SPENT and wait_s <= LONGEST_WAIT_S:
            return _PassingError(message, wait_s)
        hint = _HINTS.get(error.code, "Change the request or the server's settings")
        if passing and wait_s > LONGEST_WAIT_S:
            hint = f"It asks to wait {wait_s:.0f} s: run the same command again then, to go on from there"
        elif 300 <= error.code < 400:
            hint = (
                f"It redirects to {self._clean(error.headers.get('Location', 'nowhere'))}: give that address"
            )
        return ServerError(f"{self._url}: {message}. {hint}.")

    def _said(self, error: urllib.error.HTTPError) -> tuple[str, str | None]:
        """The server's own words and its error code, as the usual servers write them."""
        try:
            content = error.read(MAX_ERROR_BYTES).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return "", None
        try:
            value = json.loads(content)
        except ValueError:
            title = re.search(r"<title[^>]*>(.*?)</title>", content, re.IGNORECASE | re.DOTALL)
            return self._clean(html.unescape(title[1]) if title else re.sub(r"<[^>]*>", " ", content)), None
        return self._clean(error_text(value)), _error_code(value)

    def _unreachable(self, cause: object) -> Exception:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ServerError(
                f"{self._url}: its certificate is not trusted ({cause.verify_message}). Check the address, "
                "or set SSL_CERT_FILE to your authority's certificates."
            )
        if isinstance(cause, TimeoutError):
            return _PassingError(f"no answer within {self._timeout_s:g} s")
        return _PassingError(f"the connection failed ({self._clean(str(cause)) or type(cause).__name__})")

    def _clean(self, text: str) -> str:
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else f"{text[:297]}..."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


_HINTS = {
    401: "Set api_key_env to the name of the environment variable that holds the key",
    403: "The key, where there is one, does not allow this: check api_key_env and the model's name",
    404: "Check the base URL (most end in /v1) and the model's name",
    413: "Send smaller images or shorter prompts",
    429: "The account's quota is spent",
}


def error_text(value: Any) -> str:
    """What an error object says: OpenAI's `error.message`, FastAPI's `detail`, or all of it."""
    if isinstance(value, dict):
        for key in ("error", "detail", "message"):
            if value.get(key):
                return error_text(value[key])
    return value if isinstance(value, str) else json.dumps(value)


def _error_code(value: Any) -> str | None:
    inner = value.get("error") if isinstance(value, dict) else None
    code = inner.get("code") if isinstance(inner, dict) else None
    return code if isinstance(code, str) else None


def _retry_after_s(header: str | None) -> float:
    """Seconds or an HTTP date (RFC 9110, section 10.2.3); 0 for none or nonsense."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
