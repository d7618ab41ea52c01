"""The same small task for many files: here, in threads, or in processes; results in order, never too far ahead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def process_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to the one that started them, and do not outlive it."""
    pool = ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_depend_on_parent
    )
    with _starting_without_interrupts():
        for _ in range(num_workers):
            pool.submit(_begin)
    return pool


def thread_pool(num_workers: int) -> ThreadPoolExecutor:
    """Threads, for tasks that wait or that leave Python's lock to others."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="files")


def in_order(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], pool: Executor, *, num_ahead: int
) -> Iterator[tuple[_Task, _Result]]:
    """Yield every task with its result, in order, while later ones are being done.

    At most `num_ahead` tasks are begun and not yet taken: that bounds the memory of their results.
    """
    pending: deque[tuple[_Task, Future[_Result]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(function, task)))
            if len(pending) >= num_ahead:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for _, future in pending:
            future.cancel()


@contextmanager
def _starting_without_interrupts() -> Iterator[None]:
    """A Ctrl-C goes to all processes of a terminal, also to one that is still starting and cannot ignore it yet: it
    inherits that the signal is held back."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """The first task of a process, so that it is started."""


def _depend_on_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_it, daemon=True).start()
