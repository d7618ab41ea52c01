"""Datasets of a hub that is a real server, also one that breaks off, is busy or refuses."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from simpletuner.data.hashing import content_hash

pytestmark = pytest.mark.slow
COMMIT = "a" * 40
FILE = "data/train.parquet"
IMAGES = [b"image %d" % number * 50 for number in range(9)]
FAULTS = {"o/cut": ["cut"], "o/busy": [500], "o/closed": [403] * 99}


@pytest.fixture
def hub() -> Iterator[str]:
    """A server with one dataset in several repositories, which answer the first requests for it with FAULTS."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    cells = [{"bytes": image, "path": None} for image in IMAGES]
    pq.write_table(pa.table({"image": cells, "caption": [f"caption {n}" for n in range(9)]}), stream)
    body = stream.getvalue()
    asked: Counter[tuple[str, bool]] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path, _, query = self.path.partition("?")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"] and "tree" in parts:
                files = parts[-1] == "data" or "recursive=true" in query.lower()
                folder = {"type": "directory", "path": "data", "oid": "b" * 40, "size": 0}
                file = {"type": "file", "path": FILE, "oid": "c" * 40, "size": len(body)}
                self.send_json([file if files else folder])
            elif parts[:2] == ["api", "datasets"]:
                name = "/".join(parts[2:4])
                self.send_json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": FILE}], "private": False})
            elif path.endswith(FILE):
                self.send_file("/".join(parts[1:3]))
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def send_file(self, name: str) -> None:
            part = self.headers.get("Range")
            first, last = (part.removeprefix("bytes=") if part else "0-").split("-")
            wanted = body[int(first) : int(last) + 1 if last else None]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if part:
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(wanted) - 1}/{len(body)}"
            fault: int | str | None = None
            if self.command == "GET":
                faults = FAULTS[name]
                fault = faults[asked[name, bool(part)]] if asked[name, bool(part)] < len(faults) else None
                asked[name, bool(part)] += 1
            if isinstance(fault, int):
                self.send(fault, b"", {})
            else:
                self.send(206 if part else 200, wanted, headers, cut=fault == "cut")

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if cut else content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_rows_of_a_hub_come_whole_or_with_one_message(hub, tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub_child.py")), str(tmp_path), *FAULTS],
        env={**environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "a-token"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert [(found["name"], found["streaming"]) for found in results] == [(n, s) for n in FAULTS for s in (True, False)]
    for found in results:
        if found["name"] == "o/closed":
            assert found["code"] == "E-STORAGE-DATASET"
            assert "403" in found["reason"]
            assert "o/closed" in found["place"]
        else:
            assert found["images"] == [content_hash(image) for image in IMAGES], found
            assert found["captions"] == [[f"caption {number}"] for number in range(9)]
    assert "a-token" not in child.stdout
