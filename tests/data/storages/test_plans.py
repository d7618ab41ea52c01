"""From places that are not folders to plans and latents: equal to those of the same images in a folder."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.latents import LatentSource, cache_latents, learn_latent_keys
from simpletuner.data.plan import build_plan, folder_problems
from simpletuner.data.spec import CaptionSpec, DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.hub import HubStorage
from simpletuner.data.storages.patience import Patience
from simpletuner.data.storages.s3 import S3Storage
from simpletuner.data.storages.urls import UrlStorage
from simpletuner.data.tables import CsvTable, HubTable, ParquetTable, UrlTable
from simpletuner.i18n import render_problem
from simpletuner.problems import DatasetError

QUICK = Patience(num_attempts=2, first_pause_s=0.01, timeout_s=0.5)
SIZES = [(96, 64), (64, 96), (64, 64), (128, 64), (96, 64), (64, 64)]
RESIZE = ResizeSpec(resolution=64, aspect_bucket_alignment=16)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(SIZES[number], Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


IMAGES = {f"{number}.jpg": jpeg(number) for number in range(len(SIZES))}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, body in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(body)
        (tmp_path / "images" / name).with_suffix(".txt").write_text(f"caption {name}")
    return tmp_path / "images"


@pytest.fixture
def plan_of(tmp_path):
    def make(spec, cache="cache", beside=()):
        specs = [replace(each, resize=RESIZE) for each in (spec, *beside)]
        progress = lambda done, total: None  # noqa: E731
        return build_plan(specs, batch_size=1, seed=1, cache_dir=tmp_path / cache, on_progress=progress)

    return make


@pytest.fixture
def latents_of(tmp_path, vae):
    def make(plan, cache="cache"):
        cache_dir = tmp_path / cache
        progress = lambda done, total: None  # noqa: E731
        keys = learn_latent_keys(plan, vae.id, cache_dir=cache_dir, on_progress=progress)
        return cache_latents(
            plan,
            LatentSource(id=vae.id, open=vae.open),
            keys,
            directory_of=lambda name: cache_dir / name,
            cache_dir=cache_dir,
            batch_size=2,
            on_progress=progress,
        )

    return make


def spec_of(storage, strategy="textfile", **options) -> DatasetSpec:
    return DatasetSpec(id="a", storage=storage, captions=CaptionSpec(caption_strategy=strategy), **options)


def s3_of(bucket, **options) -> S3Storage:
    keys = {"access_key_id": bucket.key, "secret_access_key": bucket.secret, "region_name": "us-east-1"}
    return S3Storage(bucket=bucket.name, patience=QUICK, **{"endpoint_url": bucket.endpoint_url, **keys, **options})


@pytest.fixture
def filled(bucket):
    for name, body in IMAGES.items():
        bucket.put(name, body)
        bucket.put(name.replace(".jpg", ".txt"), f"caption {name}".encode())
    return bucket


def in_urls(folder, site, tmp_path):
    site.files = {f"/{name}": body for name, body in IMAGES.items()}
    with (tmp_path / "list.csv").open("w", newline="") as stream:
        rows = [(f"{site.url}/{name}", f"caption {name}") for name in IMAGES]
        csv.writer(stream).writerows([("url", "caption"), *rows])
    storage = UrlStorage(csv_file=tmp_path / "list.csv", cache_dir=tmp_path / "urls", patience=QUICK)
    return spec_of(storage, "csv", table=UrlTable(storage=storage, caption_column="caption"))


def in_rows(tmp_path, *, streaming):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    cells = [{"bytes": body, "path": name} for name, body in IMAGES.items()]
    pq.write_table(pa.table({"image": cells, "caption": [f"caption {n}" for n in IMAGES]}), tmp_path / "rows.parquet")
    storage = HubStorage(
        dataset_name=str(tmp_path / "rows.parquet"),
        caption_column="caption",
        streaming=streaming,
        cache_dir=str(tmp_path / "hf"),
        stream_dir=tmp_path / "stream",
    )
    return spec_of(storage, "huggingface", table=HubTable(storage=storage))


@pytest.mark.parametrize("place", ["s3", "urls", "rows", "stream"])
def test_every_place_gives_the_images_of_a_folder(place, folder, filled, site, tmp_path, plan_of, latents_of, vae):
    spec = {
        "s3": lambda: spec_of(s3_of(filled)),
        "urls": lambda: in_urls(folder, site, tmp_path),
        "rows": lambda: in_rows(tmp_path, streaming=False),
        "stream": lambda: in_rows(tmp_path, streaming=True),
    }[place]()
    here, there = plan_of(spec_of(LocalStorage(folder=folder)), "local"), plan_of(spec)

    def content(plan, latents):
        return {s.captions[0]: (s.geometry, latents.get(s)) for s in plan.samples()}

    local, found = content(here, latents_of(here, "local")), content(there, latents_of(there))
    assert found.keys() == local.keys()
    for caption, (geometry, latent) in local.items():
        other_geometry, other = found[caption]
        # A random crop is a function of the key, which is another one elsewhere.
        assert other_geometry.target == geometry.target
        assert other.shape == latent.shape
        if other_geometry == geometry:
            assert other.equal(latent)
    vae.opened = 0
    again = plan_of(spec)
    assert again.fingerprint == there.fingerprint
    assert latents_of(again).get(again.samples()[0]).equal(found[again.samples()[0].captions[0]][1])
    assert vae.opened == 0


def test_warm_caches_of_a_bucket_ask_for_nothing_but_the_listing(filled, site, plan_of, latents_of, vae):
    site.behind = filled.endpoint_url
    spec = spec_of(s3_of(filled, endpoint_url=site.url))
    cold = plan_of(spec)
    latents_of(cold)
    asked_cold = {path for path in site.asked if path.endswith(".jpg")}
    assert len(asked_cold) == len(IMAGES)
    site.asked.clear()
    vae.opened = 0
    warm = plan_of(spec)
    latents_of(warm)
    assert {path for path in site.asked if path.endswith((".jpg", ".txt"))} == set()
    assert warm.fingerprint == cold.fingerprint
    assert vae.opened == 0


def test_answers_are_waited_for_at_once_however_few_processors_there_are(filled, site, tmp_path, vae):
    site.behind, site.pause_s = filled.endpoint_url, 0.1
    spec = replace(spec_of(s3_of(filled, endpoint_url=site.url)), resize=RESIZE)
    options = {"cache_dir": tmp_path / "cache", "on_progress": lambda done, total: None, "max_workers": 1}
    plan = build_plan([spec], batch_size=1, seed=1, **options)
    assert site.most_at_once == len(IMAGES)
    site.most_at_once = 0
    keys = learn_latent_keys(plan, vae.id, **options)
    source = LatentSource(id=vae.id, open=vae.open)
    cache_latents(plan, source, keys, directory_of=lambda name: tmp_path / "latents", batch_size=2, **options)
    assert site.most_at_once > 2


def test_a_kept_listing_needs_no_server_and_sees_no_new_files(filled, site, gone_url, plan_of, latents_of, told):
    site.behind = filled.endpoint_url
    spec = spec_of(s3_of(filled, endpoint_url=site.url), keeps_listing=True)
    cold = plan_of(spec)
    latents_of(cold)
    filled.put("new.jpg", IMAGES["0.jpg"])
    site.faults = {path: [500] * 99 for path in list(site.asked)}
    site.asked.clear()
    warm = plan_of(spec)
    latents_of(warm)
    assert warm.fingerprint == cold.fingerprint
    assert not site.asked
    with pytest.raises(DatasetError) as caught:
        plan_of(replace(spec, keeps_listing=False))
    assert told(caught.value) == ["E-STORAGE-NETWORK"]


def test_a_kept_listing_is_that_of_the_rows_of_a_csv(folder, site, tmp_path, plan_of, latents_of):
    spec = replace(in_urls(folder, site, tmp_path), keeps_listing=True)
    assert plan_of(spec).datasets[0].num_images == len(IMAGES)
    table = tmp_path / "list.csv"
    rows = table.read_text().splitlines()
    site.files["/new.jpg"] = IMAGES["1.jpg"]
    table.write_text("\n".join([*rows[:-2], f"{site.url}/new.jpg,new"]))
    storage = replace(spec.storage)
    plan = plan_of(replace(spec, storage=storage, table=UrlTable(storage=storage, caption_column="caption")))
    captions = sorted(sample.captions[0] for sample in plan.samples())
    assert captions == sorted(["new", *(row.partition(",")[2] for row in rows[1:-2])])
    latents_of(plan)


def test_a_listing_is_kept_as_long_as_all_datasets_of_a_folder_ask_for_it(folder, plan_of):
    keeps = spec_of(LocalStorage(folder=folder), keeps_listing=True)
    other = replace(keeps, id="b", keeps_listing=False)

    def counts(spec, *beside):
        return [dataset.num_images for dataset in plan_of(spec, beside=beside).datasets]

    def add(name):
        (folder / f"{name}.jpg").write_bytes(IMAGES["0.jpg"])
        (folder / f"{name}.txt").write_text(name)

    before = len(IMAGES)
    assert counts(keeps) == [before]
    add("x")
    assert counts(keeps) == [before]
    assert counts(keeps, other) == [before + 1, before + 1]
    assert counts(keeps) == [before + 1]
    add("y")
    assert counts(keeps) == [before + 1]


@pytest.mark.parametrize(
    ("when", "faults", "code"),
    [
        ("listing", [503, "cut"], "E-STORAGE-NETWORK"),
        ("header", ["cut", 500], "E-STORAGE-NETWORK"),
        ("caption", ["cut", 500], "E-STORAGE-NETWORK"),
        ("content", [503, "cut"], "E-STORAGE-NETWORK"),
        ("content", [403], "E-STORAGE-REFUSED"),
    ],
)
def test_a_bucket_that_fails_half_way_ends_with_one_message_and_goes_on_later(
    when, faults, code, filled, site, plan_of, latents_of, told
):
    site.behind = filled.endpoint_url
    spec = spec_of(s3_of(filled, endpoint_url=site.url))
    name = {"listing": "", "caption": "/3.txt"}.get(when, "/3.jpg")
    path = f"/{filled.name}{name}"
    good = {"listing": 1, "content": 1}.get(when, 0)
    site.faults = {path: [None] * good + faults}
    with pytest.raises(DatasetError) as caught:
        latents_of(plan_of(spec))
    assert told(caught.value) == [code]
    (problem,) = caught.value.problems
    assert problem.params["id"] == "a"
    assert name in str(problem.params["place"])
    plan = plan_of(spec)
    latents = latents_of(plan)
    assert len([latents.get(sample) for sample in plan.samples()]) == len(IMAGES)


def test_urls_that_are_refused_are_left_out_and_named(folder, site, tmp_path, plan_of):
    spec = in_urls(folder, site, tmp_path)
    del site.files["/3.jpg"]
    plan = plan_of(spec)
    assert plan.datasets[0].num_images == len(IMAGES) - 1
    assert [item.reason for item in plan.datasets[0].unreadable] == ["HTTP 404 Not Found"]


@pytest.fixture
def table(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def make(names=IMAGES, sizes=SIZES, **columns) -> ParquetTable:
        names = [name.removesuffix(".jpg") for name in names]
        rows = {
            "file": names,
            "caption": [f"caption {name}.jpg" for name in names],
            "w": [size[0] for size in sizes[: len(names)]],
            "h": [size[1] for size in sizes[: len(names)]],
            **columns,
        }
        pq.write_table(pa.table(rows), tmp_path / "table.parquet")
        return ParquetTable(
            path=tmp_path / "table.parquet",
            filename_column="file",
            caption_column="caption",
            width_column="w",
            height_column="h",
        )

    return make


def test_sizes_of_a_table_spare_the_headers_and_give_the_same(folder, filled, site, table, plan_of, latents_of, vae):
    site.behind = filled.endpoint_url
    storage = s3_of(filled, endpoint_url=site.url)
    told = plan_of(spec_of(storage, "parquet", table=table(), takes_sizes=True))
    assert not [path for path in site.asked if path.endswith(".jpg")]
    read = plan_of(spec_of(storage), "another")
    assert told.fingerprint == read.fingerprint
    first = latents_of(told)
    second = latents_of(read, "another")
    for one, other in zip(told.samples(), read.samples(), strict=True):
        assert first.get(one).equal(second.get(other))


def test_a_table_that_lies_about_a_size_is_found_out_and_forgiven_once_it_is_right(
    folder, table, plan_of, latents_of, told
):
    wrong = [*SIZES[:2], (256, 64), *SIZES[3:]]
    storage = LocalStorage(folder=folder)
    with pytest.raises(DatasetError) as caught:
        latents_of(plan_of(spec_of(storage, "parquet", table=table(sizes=wrong), takes_sizes=True)))
    assert told(caught.value) == ["E-TABLE-SIZE"]
    assert "2.jpg (64x64, not 256x64)" in str(caught.value.problems[0].params["files"])
    latents_of(plan_of(spec_of(storage, "parquet", table=table(), takes_sizes=True)))
    discovered = plan_of(spec_of(storage))
    assert {sample.record.size for sample in discovered.samples()} == set(SIZES)


def test_what_a_table_told_is_not_believed_once_the_table_is_not_asked(folder, table, plan_of):
    storage = LocalStorage(folder=folder)
    plan_of(spec_of(storage, "parquet", table=table(sizes=[(640, 64)] * 6), takes_sizes=True))
    sizes = {sample.record.key: sample.record.size for sample in plan_of(spec_of(storage)).samples()}
    assert sizes == {f"{number}.jpg": size for number, size in enumerate(SIZES)}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"names": ["0.jpg", "1.jpg"]}, "E-CAPTION-ROW"),
        ({"caption": ["a", "b", None, "", "c", "d"]}, "E-CAPTION-EMPTY"),
    ],
)
def test_images_without_a_row_or_a_caption(folder, table, plan_of, told, change, code):
    with pytest.raises(DatasetError) as caught:
        plan_of(spec_of(LocalStorage(folder=folder), "parquet", table=table(**change)))
    assert told(caught.value) == [code]
    assert "table.parquet" in str(caught.value.problems[0].params["table"])


def test_captions_of_a_csv_beside_a_folder(folder, tmp_path, plan_of):
    (tmp_path / "captions.csv").write_text("filename,caption\n" + "\n".join(f"{n},caption {n}" for n in IMAGES))
    table = CsvTable(path=tmp_path / "captions.csv", filename_column="filename", caption_column="caption")
    plan = plan_of(spec_of(LocalStorage(folder=folder), "csv", table=table))
    assert {s.record.key: s.captions for s in plan.samples()} == {name: (f"caption {name}",) for name in IMAGES}


def test_tables_are_looked_at_without_reading_an_image(folder, tmp_path, told):
    storage = LocalStorage(folder=folder)
    missing = ParquetTable(path=tmp_path / "none.parquet", filename_column="f")
    lacking = UrlStorage(csv_file=tmp_path / "list.csv", cache_dir=tmp_path / "urls")
    (tmp_path / "list.csv").write_text("link\nhttp://127.0.0.1:9/x.jpg\n")
    found = folder_problems([spec_of(storage, "parquet", table=missing), spec_of(lacking)])
    assert told(DatasetError(found)) == ["E-TABLE-MISSING", "E-TABLE-COLUMN"]
    assert not (tmp_path / "urls").exists()


ERRORS = {
    "E-STORAGE-NETWORK": {"attempts": 4},
    "E-STORAGE-CREDENTIALS": {},
    "E-STORAGE-REFUSED": {},
    "E-STORAGE-BUCKET": {},
    "E-STORAGE-ANSWER": {},
    "E-STORAGE-URLS": {"count": 2, "files": "http://h/a.jpg (HTTP 500)"},
    "E-STORAGE-DATASET": {},
    "E-TABLE-MISSING": {"key": "csv_file"},
    "E-TABLE-DAMAGED": {"key": "csv_file"},
    "E-TABLE-ENCODING": {"key": "csv_file"},
    "E-TABLE-COLUMN": {"key": "csv_file", "missing": "caption", "columns": "url"},
}


@pytest.mark.parametrize("code", ERRORS)
def test_every_message_names_the_dataset_and_the_place(code, told):
    error = StorageError(code, place="s3://cats/x", reason="why", params=ERRORS[code])
    assert told(DatasetError(error.problem("my-cats"))) == [code]
    for language in ("en", "es"):
        title, _ = render_problem(error.problem("my-cats"), language)
        assert "my-cats" in title and "s3://cats/x" in title


def test_the_same_files_make_the_same_plan_wherever_they_are(folder, filled, plan_of):
    assert plan_of(spec_of(s3_of(filled))).fingerprint == plan_of(spec_of(LocalStorage(folder=folder))).fingerprint
