"""Ctrl-C between two steps, where the state and the place in the data belong together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C has come in the block, which goes on. A second one is raised at once.

    It comes as ever where it is ignored, and outside a program's main thread.
    """
    pressed = threading.Event()

    def take(*_: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        # No stream's own write, which the signal may have come in the midst of.
        os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again: at once, without.\n")

    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    signal.signal(signal.SIGINT, take)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
