"""Ctrl-C as a request, not as an accident.

First Ctrl-C: finish the step and save. Second: leave without saving. Third: the process ends at once. SIGTERM and a
closed terminal count as the first. A thread hears the signals through a socket, so the answer comes at once and the
third one works even while the main thread is deep inside a kernel.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal, TypeAlias

from simpletuner.problems import ExitCode

SAVE, LEAVE, KILL = 1, 2, 3
Source: TypeAlias = Literal["keyboard", "signal", "command"]
_GENTLE_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")
_CLOSE = b"\0"
_NOTIFY_TIMEOUT_S = 1.0


class StopRequest:
    """Whether somebody wants the run to end. The training loop polls `level` between steps."""

    def __init__(self) -> None:
        self._level = 0
        self._installed = False
        self._interruptible = False
        self._interrupted = False  # KeyboardInterrupt was raised in the main thread
        self._own_signals = 0  # signals that we sent to the main thread and that are not requests
        self._listeners: list[Callable[[int, Source], None]] = []
        self._lock = threading.Lock()

    @property
    def level(self) -> int:
        """0: go on; 1: finish the step, save, end; 2: end without saving."""
        return self._level

    def check(self, level: int = LEAVE) -> None:
        """Raise KeyboardInterrupt if the request is at least `level`. For long work between two polls."""
        if self._level >= level:
            raise KeyboardInterrupt

    def request(self, level: int, source: Source = "command") -> None:
        """Raise the level; a lower one than the present is ignored. At KILL the process ends here. Any thread."""
        with self._lock:
            if self._interruptible or self._interrupted:
                level = max(level, LEAVE)
            if level <= self._level:
                return
            self._level = level
            interrupt = self._interruptible and self._installed and source == "command"
        self._notify(level, source)
        if level >= KILL:
            os._exit(ExitCode.INTERRUPTED)
        if interrupt:
            self._interrupt_main_thread()

    def subscribe(self, listener: Callable[[int, Source], None]) -> None:
        """Call `listener(level, source)` on each rise, within a second."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For phases with nothing to save that cannot poll (loading, downloading): a stop raises KeyboardInterrupt."""
        self.check(SAVE)
        outer, self._interruptible = self._interruptible, True
        try:
            yield
        finally:
            self._interruptible = outer

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals during the block. Only the main thread can; elsewhere this changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous_handlers = {number: signal.signal(number, self._on_signal) for number in _signals()}
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if hasattr(os, "register_at_fork"):  # a forked worker gets the Ctrl-C too; it must not count a second time
            os.register_at_fork(after_in_child=_forget_wakeup)
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        self._installed = True
        try:
            yield self
        finally:
            self._installed = False
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
            writer.send(_CLOSE)
            thread.join()
            reader.close()
            writer.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two bytecodes; the counting happens in `_listen`."""
        del number, frame
        if self._interruptible:
            self._interrupted = True
            raise KeyboardInterrupt

    def _listen(self, reader: socket.socket) -> None:
        gentle = {int(number) for number in _signals()} - {int(signal.SIGINT)}
        while (byte := reader.recv(1)) not in (_CLOSE, b""):
            if byte[0] in gentle:
                self.request(SAVE, "signal")
            elif byte[0] == signal.SIGINT and self._own_signals:
                self._own_signals -= 1
            elif byte[0] == signal.SIGINT:
                self.request(self._level + 1, "keyboard")

    def _notify(self, level: int, source: Source) -> None:
        """Tell the listeners, but wait no longer than a moment: one may hang on a terminal that takes no more text."""
        listeners = tuple(self._listeners)

        def tell() -> None:
            for listener in listeners:
                listener(level, source)

        thread = threading.Thread(target=tell, name="stop-listeners", daemon=True)
        thread.start()
        thread.join(_NOTIFY_TIMEOUT_S)

    def _interrupt_main_thread(self) -> None:
        self._own_signals += 1
        main = threading.main_thread().ident
        if sys.platform != "win32" and main is not None:
            signal.pthread_kill(main, signal.SIGINT)  # also ends a system call that the main thread waits in
        else:
            _thread.interrupt_main()


def ignore_interrupts() -> None:
    """For the start of worker processes: Ctrl-C reaches the whole process group, and only the trainer decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _signals() -> list[signal.Signals]:
    """SIGINT and those that ask gently, without the gentle ones that the parent chose to ignore (nohup)."""
    gentle = [getattr(signal, name) for name in _GENTLE_SIGNALS if hasattr(signal, name)]
    return [signal.SIGINT, *(number for number in gentle if signal.getsignal(number) != signal.SIG_IGN)]


def _forget_wakeup() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
