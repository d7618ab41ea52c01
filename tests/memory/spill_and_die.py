"""Spill groups of weights into a folder, slowly, saying after each how many there are. Started to be killed.

Arguments: folder, key, number of groups."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from simpletuner.memory.spill import SpillStore
from tests.memory.test_spill import group_names, tensors

if __name__ == "__main__":
    folder, key, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    store = SpillStore(folder, key, group_names(count))
    for group in range(count):
        store.put(group, tensors(group))
        print(group, flush=True)
        time.sleep(0.02)
    store.finish()
    print("done", flush=True)
    time.sleep(60)
