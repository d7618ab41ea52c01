"""Services that a test starts for itself: a web server that misbehaves on request, and an S3 server."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest


@dataclass
class Site:
    """`files`: path -> body. `faults`: path -> what happens at the 1st, 2nd, ... request before the body is given:
    a status, "cut" (half of the body, then the line goes dead), or "sleep" (nothing for a while). `behind`: the server
    that is asked where `files` has nothing; it is sent what was asked. `pause_s`: what every answer takes at least."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    pause_s: float = 0
    num_now: int = 0
    most_at_once: int = 0
    behind: str = ""


def forwarded(server: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection(server.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        kept = {name: value for name, value in answer.getheaders() if name.lower() in ("etag", "content-range")}
        kept["Content-Type"] = answer.getheader("Content-Type") or ""
        return answer.status, kept, answer.read()
    finally:
        connection.close()


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Run a server for `site` on a free port; sets its url."""

    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                site.num_now += 1
                site.most_at_once = max(site.most_at_once, site.num_now)
            time.sleep(site.pause_s)
            try:
                self.answer()
            finally:
                with lock:
                    site.num_now -= 1

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            site.asked[path] += 1
            faults = site.faults.get(path, [])
            number = site.asked[path]
            fault = faults[number - 1] if number <= len(faults) else None
            if isinstance(fault, int):
                self.send_error(fault)
                return
            if fault == "sleep":
                time.sleep(1)
            body = site.files.get(path)
            status, headers = 200, {}
            if body is None and site.behind:
                status, headers, body = forwarded(site.behind, self.path, dict(self.headers))
            if body is None:
                self.send_error(404)
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server without files."""
    with serving(Site()) as found:
        yield found


@pytest.fixture
def gone_url() -> str:
    """Where nobody answers any more."""
    with serving(Site()) as found:
        pass
    return found.url


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 server, and the keys to it. `client` may do everything."""

    endpoint_url: str
    name: str
    client: Any
    key: str = "the-key"
    secret: str = "the-secret"

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 server that lists two objects per request."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "nowhere")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture(scope="module")
def s3_client(s3_url: str) -> Any:
    """What fills the buckets of the server."""
    import boto3

    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=s3_url, **keys)


@pytest.fixture
def bucket(s3_url: str, s3_client: Any) -> Bucket:
    """An empty bucket of its own."""
    name = f"bucket-{uuid4().hex}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(s3_url, name, s3_client)
