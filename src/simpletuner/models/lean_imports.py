"""diffusers and transformers without the libraries that they import merely because they are installed.

Both look for packages of number formats and import those that they find, seconds and some fifty megabytes, also in a
run that uses none. What a run does use, it imports itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNASKED = ("bitsandbytes", "torchao")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within, these packages cannot be found, unless they are imported already. diffusers and transformers remember
    what they did not find."""
    hidden = [name for name in _UNASKED if name not in sys.modules]
    # None is Python's own mark of a module that cannot be imported; the type of sys.modules leaves it out.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
