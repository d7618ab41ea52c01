"""The same small task for many files: here, in threads, or in processes; results in order, never too far ahead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from simpletuner.problems import ExitCode, Problem, SimpletunerError

_Args = ParamSpec("_Args")
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


class ThreadPool(Executor):
    """Threads, for tasks that wait or that leave Python's lock to others. An interrupted program does not wait for
    them at its end, for a task may be waiting minutes for a server."""

    def __init__(self, num_workers: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="files", daemon=True) for _ in range(num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, function: Callable[_Args, _Result], /, *args: _Args.args, **kwargs: _Args.kwargs
    ) -> Future[_Result]:
        """See `Executor`."""
        future: Future[_Result] = Future()
        self._tasks.put((future, partial(function, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor`."""
        if cancel_futures:
            with suppress(Empty):
                while (task := self._tasks.get_nowait()) is not None:
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 (it is raised where the result is asked for)
                future.set_exception(error)
            del task, future, function  # and the memory of a result that was taken


@contextmanager
def until_done(pool: Executor) -> Iterator[None]:
    """Shut `pool` down after the block. If the block fails, tasks that are not begun are dropped; threads that are at
    work then end by themselves."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=not isinstance(pool, ThreadPool), cancel_futures=True)
        raise
    pool.shutdown(cancel_futures=True)


def in_order(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], pool: Executor, *, num_ahead: int
) -> Iterator[tuple[_Task, _Result]]:
    """Yield every task with its result, in order, while later ones are being done.

    At most `num_ahead` tasks are begun and not yet taken: that bounds the memory of their results.
    Raises: SimpletunerError: a process was ended from outside.
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
    except BrokenProcessPool as error:
        raise SimpletunerError(Problem(code="E-WORKER-ENDED"), ExitCode.ENVIRONMENT) from error
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
