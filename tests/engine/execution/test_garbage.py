"""The collector leaves alone what exists while the engine runs, and rests while programs are traced; only then."""

import gc
import weakref

import pytest

from sparsejax.engine.execution.garbage import FROZEN_AT_START, no_collection, quiet_collector


class Cycle:
    def __init__(self):
        self.itself = self


def test_old_garbage_waits_and_new_garbage_is_collected():
    old = Cycle()
    gone = weakref.ref(old)
    with quiet_collector():
        del old
        new = Cycle()
        gone_too = weakref.ref(new)
        del new
        gc.collect()
        assert gone() is not None
        assert gone_too() is None
    gc.collect()
    assert gone() is None


def test_ends_with_an_error_and_nests():
    def fail():
        with quiet_collector():
            with quiet_collector():
                pass
            assert gc.get_freeze_count() > FROZEN_AT_START
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert gc.get_freeze_count() <= FROZEN_AT_START


def test_what_the_caller_froze_stays_frozen():
    gc.freeze()
    try:
        with quiet_collector():
            pass
        assert gc.get_freeze_count() > FROZEN_AT_START
    finally:
        gc.unfreeze()


def test_collection_pauses_and_goes_on():
    with no_collection(), no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()  # as the caller had it
    finally:
        gc.enable()
