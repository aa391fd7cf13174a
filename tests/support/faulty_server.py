"""A chat server on loopback that fails in the ways that real ones do, as the test scripts it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One scripted reply. `declared_length` above the body's cuts it; `delay_s` comes before the status."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}
    content_type: str = "application/json"
    declared_length: int | None = None
    delay_s: float = 0.0
    pause_between_bytes_s: float = 0.0
    hang_up: bool = False  # without a word


def completion(text: str = "fine", *, finish_reason: Any = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion as the protocol has it."""
    message = {"role": "assistant", "content": text}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        **more,
    }


def as_json(value: Any, **more: Any) -> Fault:
    """A reply of JSON."""
    return Fault(body=json.dumps(value).encode(), **more)


class FaultyServer:
    """Answers each request by `answer(body)`, but for as many `faults` as there are, which come first."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: completion(
            f"re: {body['messages'][-1]['content']}"
        )
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.pop(0) if self.faults else None
        try:
            reply = fault or as_json(self.answer(body))
        finally:
            with self._lock:  # before it is sent: who has the reply may ask again at once
                self._at_once -= 1
        _send(handler, reply)


def _send(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    time.sleep(fault.delay_s)
    handler.close_connection = True
    if fault.hang_up:
        return
    handler.send_response(fault.status)
    handler.send_header("Content-Type", fault.content_type)
    handler.send_header("Content-Length", str(fault.declared_length or len(fault.body)))
    for name, value in fault.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if not fault.pause_between_bytes_s:
        handler.wfile.write(fault.body)
        return
    for at in range(len(fault.body)):
        handler.wfile.write(fault.body[at : at + 1])
        time.sleep(fault.pause_between_bytes_s)


@contextmanager
def serving(server: FaultyServer) -> Iterator[FaultyServer]:
    """Run it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                server(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up, as some tests want it to

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
