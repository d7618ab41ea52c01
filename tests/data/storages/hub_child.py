"""Reads datasets of the hub at HF_ENDPOINT in a process of its own: FOLDER NAME... Prints a JSON object for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from simpletuner.data.hashing import content_hash
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.hub import HubStorage
from simpletuner.data.storages.patience import Patience


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        for streaming in (True, False):
            storage = HubStorage(
                dataset_name=name,
                caption_column="caption",
                streaming=streaming,
                stream_dir=Path(folder),
                patience=Patience(num_attempts=2, first_pause_s=0.01),
            )
            try:
                images = [content_hash(storage.read(file)) for file in storage.list_files().images]
                found = {"images": images, "captions": [texts for _, texts in storage.captions()]}
            except StorageError as error:
                found = {"code": error.code, "reason": error.reason, "place": error.place}
            print(json.dumps({"name": name, "streaming": streaming, **found}), flush=True)


main()
