"""Training from a bucket: the steps of a local folder, also interrupted, and without the server once all is cached."""

from __future__ import annotations

import json
import logging

import pytest

pytestmark = pytest.mark.slow
SECRET = "a-secret-that-is-in-no-file"


@pytest.fixture
def server(monkeypatch):
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    yield found
    found.stop()


def fill_bucket(server, folder):
    import boto3

    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="pictures")
    for path in folder.iterdir():
        client.put_object(Bucket="pictures", Key=f"subject/{path.name}", Body=path.read_bytes())
    return url


def use_bucket(project, url):
    path = project.root / "config" / "multidatabackend.json"
    datasets = json.loads(path.read_text())
    del datasets[0]["instance_data_dir"]
    datasets[0] |= {
        "type": "aws",
        "aws_bucket_name": "pictures",
        "aws_data_prefix": "subject",
        "aws_endpoint_url": url,
        "aws_region_name": "us-east-1",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "{env:BUCKET_SECRET}",
        "preserve_data_backend_cache": True,
    }
    path.write_text(json.dumps(datasets))


def test_a_bucket_trains_like_a_folder_and_is_not_needed_once_all_is_cached(project, server):
    assert project.run("train", "--output_dir", "local").returncode == 0
    reference = project.losses(project.root / "local")
    use_bucket(project, fill_bucket(server, project.root / "datasets" / "subject"))

    first = project.run("train", "--max_train_steps", "3", BUCKET_SECRET=SECRET)
    assert first.returncode == 0, first.stderr
    server.stop()
    resumed = project.run("train", BUCKET_SECRET=SECRET)
    assert resumed.returncode == 0, resumed.stderr
    losses = project.losses()
    assert sorted(losses) == list(range(1, 7))
    assert losses == reference

    project.set_dataset(preserve_data_backend_cache=False)
    refused = project.run("train", "--max_train_steps", "9", BUCKET_SECRET=SECRET)
    assert refused.returncode == 5
    assert "E-STORAGE-NETWORK" in refused.stderr
    assert "Traceback" not in refused.stderr

    told = "".join(done.stdout + done.stderr for done in (first, resumed, refused))
    written = b"".join(path.read_bytes() for path in project.output.rglob("*") if path.is_file())
    assert SECRET not in told
    assert SECRET.encode() not in written
