"""Repositories of the hub, against a small server of our own that answers like it.

Nothing leaves this machine. The server keeps the list of files that were fetched from it, which is what most laws
here are about.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models import hub as hub_module
from simpletuner.models.hub import Download, Hub, RepoRef, fetch
from simpletuner.models.weights import PipelineFiles, resolve_file, resolve_pipeline
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.problems import ExitCode, ModelError

REPO = "Tongyi-MAI/Z-Image"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories as folders, served the way the hub serves them."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.refuse: tuple[int, str] | None = None  # HTTP status and error code of every answer
        self.log: list[tuple[str, str]] = []  # repository and name of every file whose contents were sent
        self.num_requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def fetched(self) -> list[str]:
        return [name for _, name in self.log]

    def fetched_from(self, repo: str) -> list[str]:
        return [name for owner, name in self.log if owner == repo]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def answer(self, *, with_body: bool) -> None:
                outer.num_requests += 1
                path = unquote(urlsplit(self.path).path)
                if outer.refuse is not None:
                    self.send(outer.refuse[0], b"", {"X-Error-Code": outer.refuse[1]}, with_body)
                elif path.startswith("/api/models/"):
                    self.answer_api(path.removeprefix("/api/models/"), with_body)
                else:
                    self.answer_file(path.lstrip("/"), with_body)

            def answer_api(self, path: str, with_body: bool) -> None:
                owner, name, *rest = path.split("/")
                folder = outer.repos.get(f"{owner}/{name}")
                revision = rest[1] if len(rest) > 1 else "main"
                if folder is None:
                    self.send(401, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
                elif revision not in ("main", COMMIT):
                    self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
                elif rest[:1] == ["tree"]:
                    self.send(
                        200, json.dumps([entry(folder, file) for file in files_of(folder)]).encode(), {}, with_body
                    )
                else:
                    siblings = [{"rfilename": name} for name in files_of(folder)]
                    info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                    self.send(200, json.dumps(info).encode(), {}, with_body)

            def answer_file(self, path: str, with_body: bool) -> None:
                owner, name, _, _, *file = path.split("/")
                folder = outer.repos.get(f"{owner}/{name}")
                target = folder and folder.joinpath(*file)
                if not target or not target.is_file():
                    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                    self.send(404, b"", headers, with_body)
                    return
                contents = target.read_bytes()
                if with_body:
                    outer.log.append((f"{owner}/{name}", "/".join(file)))
                etag = f'"{hashlib.sha256(contents).hexdigest()}"'
                self.send(200, contents, {"ETag": etag, "X-Repo-Commit": COMMIT}, with_body)

            def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        return Handler


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def entry(folder: Path, name: str) -> dict[str, object]:
    contents = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(contents), "oid": hashlib.sha1(contents).hexdigest()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(endpoint=server.url, cache_dir=tmp_path / "cache")


@pytest.fixture
def repo(pipeline_dir: Path, pipeline: Any, server: FakeHub, tmp_path: Path) -> Path:
    """The tiny pipeline as a published repository: with shards, other formats, a variant, samples and a card."""
    folder = tmp_path / "repo"
    shutil.copytree(pipeline_dir, folder)
    shutil.rmtree(folder / "text_encoder")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    for part in ("vae", "transformer"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        shutil.copy(weights, weights.with_suffix(".bin"))
        shutil.copy(weights, folder / part / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "assets").mkdir()
    (folder / "assets" / "gallery.png").write_bytes(b"x" * 1000)
    (folder / "README.md").write_text("# Z-Image", encoding="utf-8")
    server.repos[REPO] = folder
    return folder


def problem_of(call: Any) -> tuple[str, str]:
    """The code and the English text of the one problem of a call that fails for the hub's sake."""
    with pytest.raises(ModelError) as caught:
        call()
    (problem,) = caught.value.problems
    assert caught.value.exit_code == ExitCode.HUB
    texts = [render_problem(problem, language) for language in LANGUAGES]
    assert all(hint and "{" not in title + hint for title, hint in texts)
    return problem.code, "\n".join(text or "" for text in texts[0])


def weights_in(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith((".safetensors", ".bin", ".png"))}


def expected_text_shards(repo: Path) -> set[str]:
    index = json.loads((repo / "text_encoder" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    unused = ("model.layers.2.", "model.norm.", "lm_head.")
    return {f"text_encoder/{shard}" for name, shard in index["weight_map"].items() if not name.startswith(unused)}


# What is fetched


def test_only_what_is_used_is_fetched_and_only_once(server: FakeHub, hub: Hub, repo: Path) -> None:
    announced: list[Download] = []
    files = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, on_download=announced.append)
    expected = expected_text_shards(repo) | {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert weights_in(server.fetched) == expected
    assert len(server.fetched) == len(set(server.fetched))
    assert "README.md" not in server.fetched
    sizes = [(repo / name).stat().st_size for name in expected]
    assert announced[0] == Download(repo=REPO, num_files=len(expected), size_bytes=sum(sizes), done_bytes=0)
    assert announced[-1].done_bytes == sum(sizes)
    assert [told.done_bytes for told in announced] == sorted(told.done_bytes for told in announced)
    assert files.source == f"{REPO}@{COMMIT}"
    for path in (*files.transformer.shards, *files.text_encoder.shards, *files.vae.shards, files.scheduler_config):
        assert path is not None
        assert path.is_file()


def test_what_the_cache_has_is_used_without_a_single_request(server: FakeHub, hub: Hub, repo: Path) -> None:
    first = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub)
    server.num_requests = 0
    assert resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub) == first
    assert server.num_requests == 0


def test_an_interrupted_download_goes_on_where_it_was(server: FakeHub, hub: Hub, repo: Path) -> None:
    files = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub)
    lost = files.text_encoder.shards[0]
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    server.log.clear()
    assert resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub) == files
    assert server.fetched == [f"text_encoder/{lost.name}"]


def test_a_part_that_comes_from_elsewhere_is_not_fetched(
    server: FakeHub, hub: Hub, repo: Path, pipeline_dir: Path
) -> None:
    files = resolve_pipeline(
        REPO,
        spec=Z_IMAGE,
        hub=hub,
        transformer=str(pipeline_dir / "transformer" / "diffusion_pytorch_model.safetensors"),
        vae=str(pipeline_dir),
    )
    assert weights_in(server.fetched) == expected_text_shards(repo)
    assert files.vae.shards[0].parent == pipeline_dir / "vae"


def test_a_transformer_from_another_repository(server: FakeHub, hub: Hub, repo: Path, pipeline_dir: Path) -> None:
    server.repos["someone/finetune"] = pipeline_dir
    files = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, transformer="someone/finetune")
    assert "models--someone--finetune" in str(files.transformer.shards[0])
    assert "models--Tongyi-MAI--Z-Image" in str(files.vae.shards[0])
    assert set(server.fetched_from("someone/finetune")) == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "vae/config.json",
    }
    assert not any(name.startswith("transformer/diffusion") for name in server.fetched_from(REPO))


def test_a_repository_with_nothing_but_one_file_means_that_file(
    server: FakeHub, hub: Hub, repo: Path, pipeline_dir: Path, tmp_path: Path
) -> None:
    """As fine-tunes are published for ComfyUI; the sizes are the pipeline's. Fetched once, then used offline."""
    custom = tmp_path / "custom"
    custom.mkdir()
    shutil.copy(next((pipeline_dir / "transformer").glob("*.safetensors")), custom / "tuned.safetensors")
    (custom / "README.md").write_text("a fine-tune")
    server.repos["owner/custom"] = custom
    files = resolve_pipeline(REPO, spec=Z_IMAGE, transformer="owner/custom", hub=hub)
    assert [shard.name for shard in files.transformer.shards] == ["tuned.safetensors"]
    assert files.transformer.config_path.parent.name == "transformer"
    assert "tuned.safetensors" in server.fetched_from("owner/custom")
    server.num_requests = 0
    assert resolve_pipeline(REPO, spec=Z_IMAGE, transformer="owner/custom", hub=hub) == files
    assert server.num_requests == 0


def test_one_file_of_a_repository(server: FakeHub, hub: Hub, repo: Path, tmp_path: Path) -> None:
    other = tmp_path / "comfy"
    (other / "split_files").mkdir(parents=True)
    shutil.copy(repo / "transformer" / "diffusion_pytorch_model.safetensors", other / "split_files" / "z.safetensors")
    (other / "split_files" / "other.safetensors").write_bytes(b"x")
    server.repos["someone/comfy"] = other
    name = "someone/comfy/split_files/z.safetensors"
    files = resolve_pipeline(name, spec=Z_IMAGE, hub=hub, companion=REPO)
    assert files.transformer.shards[0].name == "z.safetensors"
    assert "models--Tongyi-MAI--Z-Image" in str(files.transformer.config_path)
    assert "split_files/other.safetensors" not in server.fetched
    server.num_requests = 0
    assert resolve_pipeline(name, spec=Z_IMAGE, hub=hub, companion=REPO) == files
    assert server.num_requests == 0


def test_an_adapter_is_one_file_of_its_repository(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name in ("v1.safetensors", "v2.safetensors"):
        (adapters / name).write_bytes(name.encode())
    server.repos["someone/adapters"] = adapters
    for name in ("someone/adapters", "someone/adapters/v2.safetensors"):
        path = resolve_file(name, file_name="v2.safetensors", part="adapter", option="assistant_lora_path", hub=hub)
        assert path.read_bytes() == b"v2.safetensors"
    assert server.fetched == ["v2.safetensors"]


def test_a_vae_repository_may_have_its_files_in_the_root(server: FakeHub, hub: Hub, repo: Path) -> None:
    server.repos["someone/vae"] = repo / "vae"
    files = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, vae="someone/vae")
    assert "models--someone--vae" in str(files.vae.shards[0])
    server.num_requests = 0
    assert resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, vae="someone/vae") == files
    assert server.num_requests == 0


def test_a_variant_is_fetched_instead_of_the_plain_file(server: FakeHub, hub: Hub, repo: Path) -> None:
    (repo / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, variant="fp16")
    assert weights_in(server.fetched) - expected_text_shards(repo) == {
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_revision_is_used(server: FakeHub, hub: Hub, repo: Path) -> None:
    assert resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, revision=COMMIT).source == f"{REPO}@{COMMIT}"


def resolve_in_subprocess(server: FakeHub, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from simpletuner.models.weights import resolve_pipeline\n"
        "from simpletuner.models.z_image.spec import Z_IMAGE\n"
        f"print(resolve_pipeline({REPO!r}, spec=Z_IMAGE).transformer.shards[0])"
    )
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environ}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_hf_endpoint_and_hf_home_are_honoured(server: FakeHub, repo: Path, tmp_path: Path) -> None:
    done = resolve_in_subprocess(server, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "home" / "hub"))
    done = resolve_in_subprocess(server, tmp_path / "other home", HF_HUB_OFFLINE="1")
    assert "E-HUB-OFFLINE" in done.stderr


# What is said


def test_an_unknown_repository(server: FakeHub, hub: Hub) -> None:
    code, text = problem_of(lambda: resolve_pipeline("nobody/nothing", spec=Z_IMAGE, hub=hub))
    assert code == "E-HUB-NOT-FOUND"
    assert "There is no folder nobody/nothing here" in text
    assert server.url in text


def test_a_name_that_no_repository_can_have(server: FakeHub, hub: Hub) -> None:
    assert problem_of(lambda: resolve_pipeline("a--b/c..d", spec=Z_IMAGE, hub=hub))[0] == "E-HUB-NOT-FOUND"


def test_an_unknown_revision(server: FakeHub, hub: Hub, repo: Path) -> None:
    code, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub, revision="v9"))
    assert code == "E-HUB-REVISION"
    assert f"{REPO} has no revision v9" in text


@pytest.mark.parametrize(
    ("status", "error_code", "code", "words"),
    [
        (403, "GatedRepo", "E-HUB-GATED", "accept terms first"),
        (403, "", "E-HUB-DENIED", "refuses access"),
        (401, "", "E-HUB-DENIED", "hf auth login"),
        (400, "", "E-HUB-FAILED", "with HTTP 400"),
        (500, "", "E-HUB-FAILED", "with HTTP 500"),
    ],
)
def test_a_refusal(server: FakeHub, hub: Hub, status: int, error_code: str, code: str, words: str) -> None:
    server.refuse = (status, error_code)
    found, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub))
    assert (found, words in text) == (code, True), text


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    hub = Hub(endpoint=endpoint, cache_dir=tmp_path)
    code, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub))
    assert code == "E-HUB-UNREACHABLE"
    assert f"{endpoint} cannot be reached" in text
    assert "HF_ENDPOINT" in text


def test_a_cached_pipeline_needs_no_hub(server: FakeHub, hub: Hub, repo: Path) -> None:
    first: PipelineFiles = resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub)
    server.refuse = (503, "")
    assert resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub) == first


def test_missing_weights_in_a_repository_name_what_it_has(server: FakeHub, hub: Hub, repo: Path) -> None:
    weights = repo / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("mine.safetensors"))
    code, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub))
    assert code == "E-MODEL-NO-WEIGHTS"
    assert "transformer/mine.safetensors" in text
    code, text = problem_of(lambda: resolve_pipeline(f"{REPO}/gone.safetensors", spec=Z_IMAGE, hub=hub, companion=REPO))
    assert code == "E-MODEL-NO-WEIGHTS"
    assert "looked for gone.safetensors" in text


def test_a_full_disk_is_noticed_before_the_download(
    server: FakeHub, hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_RESERVE_BYTES", 1 << 60)
    code, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub))
    assert code == "E-HUB-DISK"
    assert "Not enough disk space" in text
    assert not weights_in(server.fetched)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(errno.ENOSPC, "E-HUB-DISK", "Not enough disk space"), (errno.EROFS, "E-HUB-CACHE", "cannot be stored")],
)
def test_a_cache_that_cannot_be_written(
    server: FakeHub, hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    fetch(hub, RepoRef(name=REPO, revision=None, option="pretrained_model_name_or_path"), ["*.json"])
    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", fail)
    found, text = problem_of(lambda: resolve_pipeline(REPO, spec=Z_IMAGE, hub=hub))
    assert found == code
    assert words in text
