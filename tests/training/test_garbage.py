"""The garbage collector during training: not in the middle of a step, and as before afterwards."""

from __future__ import annotations

import gc
import weakref

from gendistill.training.garbage import Garbage


class _Knot:
    def __init__(self):
        self.itself = self


def test_what_refers_to_itself_goes_between_steps_and_only_when_it_is_time():
    garbage = Garbage(seconds=0.0)
    with garbage.left_alone():
        assert not gc.isenabled()
        knot = weakref.ref(_Knot())
        assert knot() is not None
        garbage.collect()
        assert knot() is None
        patient = Garbage(seconds=1000.0)
        knot = weakref.ref(_Knot())
        patient.collect()
        assert knot() is not None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_was_in_use_at_one_collection_goes_at_a_later_one():
    garbage = Garbage(seconds=0.0, whole=3)
    with garbage.left_alone():
        used = _Knot()
        knot = weakref.ref(used)
        garbage.collect()
        del used
        garbage.collect()
        assert knot() is not None, "nothing is proved if it goes by itself"
        garbage.collect()
        assert knot() is None


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with Garbage().left_alone():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
