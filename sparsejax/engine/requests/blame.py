"""Which requests an exception is about, where only some of a step's requests can have caused it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax

from sparsejax.engine.requests.request import Request

_NAME = "sparsejax_requests"


def blame(error: Exception, requests: Iterable[Request]) -> None:
    """Marks an exception with the requests that it was raised for. The innermost mark stays, while they are unfinished.

    Errors of the device, such as too little memory, are nobody's fault.
    """
    before = blamed_requests(error)  # of an exception that is raised again, they may have ended long ago
    if isinstance(error, jax.errors.JaxRuntimeError) or any(not each.finished for each in before):
        return
    blamed = list(requests)
    setattr(error, _NAME, blamed)
    error.add_note("raised for request " + ", ".join(repr(each.request_id) for each in blamed))


@contextmanager
def blaming(requests: Iterable[Request]) -> Iterator[None]:
    """Marks an exception that leaves the block."""
    try:
        yield
    except Exception as error:
        blame(error, requests)
        raise


def blamed_requests(error: BaseException) -> list[Request]:
    """The requests that an exception is marked with."""
    return getattr(error, _NAME, [])
