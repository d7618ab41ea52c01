"""Objects of a bucket, against a real S3 server, also behind a line that breaks."""

from __future__ import annotations

import io
import pickle
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest

from simpletuner.data.storage import ChangedFileError
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.patience import Patience
from simpletuner.data.storages.s3 import S3Storage

QUICK = Patience(num_attempts=3, first_pause_s=0.01, timeout_s=0.5)


def storage_of(bucket, **options) -> S3Storage:
    options = {"endpoint_url": bucket.endpoint_url, "region_name": "us-east-1", "patience": QUICK, **options}
    return S3Storage(bucket=bucket.name, access_key_id=bucket.key, secret_access_key=bucket.secret, **options)


@contextmanager
def breaking(site, bucket):
    """The bucket behind a server that breaks as it is told."""
    site.behind = bucket.endpoint_url
    yield storage_of(bucket, endpoint_url=site.url)


def code_of(call) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value


def test_what_was_put_is_listed_and_read(bucket):
    bodies = {f"train/{name}": name.encode() * 9 for name in ("b.jpg", "a b/ü+%.PNG", "a.webp", "c.jpeg", "empty.jpg")}
    bodies["train/empty.jpg"] = b""
    for key, body in {
        **bodies,
        "train/b.txt": b"a cat",
        "train/x.mp4": b"",
        "other/z.jpg": b"",
        "trainee.jpg": b"",
    }.items():
        bucket.put(key, body)
    bucket.put("train/", b"")
    bucket.put("train/.hidden/a.jpg", b"")
    storage = storage_of(bucket, prefix="/train/")
    listing = storage.list_files()
    assert {f"train/{file.key}": storage.read(file) for file in listing.images} == bodies
    assert [file.key for file in listing.images] == sorted(file.key for file in listing.images)
    assert {file.key: file.size_bytes for file in listing.images}["b.jpg"] == len(bodies["train/b.jpg"])
    assert {key: storage.read(file) for key, file in listing.texts.items()} == {"b.txt": b"a cat"}
    assert {(other.extension, other.count) for other in listing.others} == {(".txt", 1), (".mp4", 1)}
    assert storage.shown("b.jpg") == f"s3://{bucket.name}/train/b.jpg"


def test_a_stream_reads_like_a_file_and_fetches_little(bucket, site):
    body = bytes(range(251)) * 4000
    bucket.put("a.jpg", body)
    with breaking(site, bucket) as storage:
        (file,) = storage.list_files().images
        site.asked.clear()
        with storage.open(file) as stream, io.BytesIO(body) as reference:
            for offset, whence, length in ((0, 0, 10), (-12, 2, 12), (100_000, 0, 5000), (-3, 1, 7), (0, 2, 4)):
                assert stream.seek(offset, whence) == reference.seek(offset, whence)
                assert stream.read(length) == reference.read(length)
        assert sum(site.asked.values()) <= 4
        with storage.open(file) as stream:
            assert stream.read() == body


def test_another_upload_is_another_version_and_is_not_mixed_up(bucket):
    bucket.put("a.jpg", b"one")
    storage = storage_of(bucket)
    (before,) = storage.list_files().images
    bucket.put("a.jpg", b"two")
    with pytest.raises(ChangedFileError):
        storage.read(before)
    (after,) = storage.list_files().images
    assert after.version != before.version
    assert storage.read(after) == b"two"


def test_an_object_that_is_gone_is_a_changed_file(bucket):
    bucket.put("a.jpg", b"one")
    storage = storage_of(bucket)
    (file,) = storage.list_files().images
    with pytest.raises(ChangedFileError):
        storage.read(replace(file, key="b.jpg"))


@pytest.mark.parametrize("faults", [[503, 429], ["cut", 500], ["sleep"]])
def test_what_passes_is_waited_for(bucket, site, faults):
    body = bytes(range(256)) * 999
    bucket.put("a.jpg", body)
    with breaking(site, bucket) as storage:
        site.faults = {f"/{bucket.name}": faults, f"/{bucket.name}/a.jpg": faults}
        (file,) = storage.list_files().images
        assert storage.read(file) == body
        assert site.asked[f"/{bucket.name}/a.jpg"] == len(faults) + 1


@pytest.mark.parametrize("fault", [500, "cut"])
def test_what_does_not_pass_ends_half_way_with_one_message(bucket, site, fault):
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        bucket.put(key, key.encode() * 99)
    with breaking(site, bucket) as storage:
        listing = storage.list_files()
        site.asked.clear()
        site.faults = {f"/{bucket.name}": [None, fault, fault, fault], f"/{bucket.name}/b.jpg": [fault] * 3}
        listing_error = code_of(storage.list_files)
        assert (listing_error.code, listing_error.place) == ("E-STORAGE-NETWORK", storage.id)
        reading_error = code_of(lambda: [storage.read(file) for file in listing.images])
        assert (reading_error.code, reading_error.place) == ("E-STORAGE-NETWORK", storage.shown("b.jpg"))
        assert reading_error.params["attempts"] == 3
        assert reading_error.reason


def test_a_server_that_is_gone(bucket, gone_url):
    error = code_of(storage_of(bucket, endpoint_url=gone_url).list_files)
    assert error.code == "E-STORAGE-NETWORK"
    assert gone_url in error.place


def test_a_bucket_that_does_not_exist(bucket):
    assert code_of(storage_of(replace(bucket, name="no-such-bucket")).list_files).code == "E-STORAGE-BUCKET"


def test_no_credentials_anywhere(bucket):
    storage = S3Storage(bucket=bucket.name, endpoint_url=bucket.endpoint_url, patience=QUICK)
    assert code_of(storage.list_files).code == "E-STORAGE-CREDENTIALS"


def test_credentials_of_the_environment(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert S3Storage(bucket=bucket.name, endpoint_url=bucket.endpoint_url).list_files().images == ()


@pytest.fixture
def strict(bucket):
    """The bucket on a server that checks who asks; the keys of its user."""
    import boto3

    client = boto3.client(
        "iam",
        endpoint_url=bucket.endpoint_url,
        aws_access_key_id="k",
        aws_secret_access_key="s",
        region_name="us-east-1",
    )
    name = f"user-{bucket.name}"
    client.create_user(UserName=name)
    keys = client.create_access_key(UserName=name)["AccessKey"]
    set_checks(bucket.endpoint_url, after_requests=0)
    yield replace(bucket, key=keys["AccessKeyId"], secret=keys["SecretAccessKey"])
    set_checks(bucket.endpoint_url, after_requests=10**9)


def set_checks(url, *, after_requests):
    headers = {"Content-Type": "text/plain"}
    data = str(after_requests).encode()
    request = urllib.request.Request(f"{url}/moto-api/reset-auth", data=data, headers=headers, method="POST")
    urllib.request.urlopen(request).close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "AKIAUNKNOWN"}, "InvalidAccessKeyId"),
        ({"secret": "my-wrong-secret"}, "SignatureDoesNotMatch"),
        ({}, "AccessDenied"),
    ],
)
def test_credentials_that_are_refused(strict, change, reason):
    storage = storage_of(replace(strict, **change))
    error = code_of(storage.list_files)
    assert error.code == "E-STORAGE-REFUSED"
    assert error.reason.startswith(reason)
    assert storage.secret_access_key not in f"{error} {error.params} {storage} {storage.id}"


def test_many_threads_and_a_copy_read_the_same(bucket):
    bodies = [str(number).encode() * 50 for number in range(6)]
    for number, body in enumerate(bodies):
        bucket.put(f"{number:02}.jpg", body)
    storage = storage_of(bucket)
    files = storage.list_files().images
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(storage.read, files)) == bodies
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert [copy.read(file) for file in files] == bodies


def test_the_name_tells_servers_apart_and_no_password():
    names = [
        S3Storage(bucket="b", prefix="p", endpoint_url=url).id
        for url in (None, "https://one", "https://two", "https://me:word@two")
    ]
    assert names == ["s3://b/p", "s3://b/p (https://one)", "s3://b/p (https://two)", "s3://b/p (https://two)"]
