"""Keeps Python's garbage collector from holding up the steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FROZEN_AT_START = gc.get_freeze_count()  # some hundreds of the interpreter's own from Python 3.12 on


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Within it, what exists already is not searched for garbage.

    Traced and compiled programs are millions of objects that stay. A full collection over them takes 0.4 s, in which
    no step is dispatched, and it may come at any allocation. What is allocated within is collected as ever, and what
    exists once it ends. (Freezing costs nothing: it only moves objects from one list to another.)
    """
    if gc.get_freeze_count() > FROZEN_AT_START:  # by the caller, who will want it kept so; or we are nested
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def no_collection() -> Iterator[None]:
    """Within it, no garbage is collected, for work that makes millions of objects and drops few.

    Python searches all of them each time their number has grown by a quarter: a fifth of the time that tracing takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
