"""Keeps Python's garbage collector from holding up the steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Within it, what exists already is not searched for garbage.

    Traced and compiled programs are millions of objects that stay. A full collection over them takes 0.4 s, in which
    no step is dispatched, and it may come at any allocation. What is allocated within is collected as ever.
    """
    if gc.get_freeze_count():  # by the caller, who will want it kept so; or we are nested
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
