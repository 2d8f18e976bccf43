import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hsmwrap import forks
from hsmwrap.errors import BackendClosed
from hsmwrap.gate import Gate


@pytest.fixture
def gate():
    return Gate("test backend")


def test_counts_those_inside(gate):
    with gate.enter(), gate.enter():
        assert gate.in_flight == 2
    assert gate.in_flight == 0


def test_an_exception_leaves_too(gate):
    with pytest.raises(ZeroDivisionError), gate.enter():
        _ = 1 / 0
    assert gate.in_flight == 0


def test_closed_gate_lets_no_call_in(gate):
    assert gate.close()
    with pytest.raises(BackendClosed, match="test backend"), gate.enter():
        pytest.fail("inside a closed gate")
    assert gate.in_flight == 0
    assert gate.close()


def test_close_waits_for_those_inside(gate):
    entered, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def stay():
        with gate.enter():
            entered.set()
            leave.wait(60)

    def close():
        gate.close()
        closed.set()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(stay)
        assert entered.wait(60)
        pool.submit(close)
        assert not gate.close(timeout=0.05)
        assert not closed.is_set()
        leave.set()
        assert closed.wait(60)
    assert gate.in_flight == 0


def test_threads_are_counted_exactly(gate):
    def pass_through(_):
        with gate.enter():
            return gate.in_flight >= 1

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(pass_through, range(4000)))
    assert gate.in_flight == 0


def test_child_starts_with_no_call_inside(gate, in_child):
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with gate.enter():
            entered.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stay)
        assert entered.wait(60)
        assert in_child(lambda: (gate.in_flight, gate.close(timeout=0), gate.in_flight)) == (
            0,
            True,
            0,
        )
        assert gate.in_flight == 1
        leave.set()
    assert not gate.closed


def test_child_of_a_process_that_held_the_lock(gate, in_child):
    held, let_go = threading.Event(), threading.Event()

    def hold():
        with gate._calls._changed:
            held.set()
            return let_go.wait(60)

    def use():
        with gate.enter():
            return gate.in_flight

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        assert held.wait(60)
        assert in_child(use) == 1
        let_go.set()
        assert holding.result(), "the fork waited for the lock"


def test_call_that_forks_leaves_in_the_child_without_being_counted(gate, in_child):
    stack = gate.enter()
    stack.__enter__()

    def leave():
        stack.__exit__(None, None, None)
        return gate.in_flight

    assert in_child(leave) == 0
    stack.__exit__(None, None, None)
    assert gate.in_flight == 0


def test_closed_stays_closed_in_the_child(gate, in_child):
    gate.close()

    def enter():
        try:
            with gate.enter():
                return "inside"
        except BackendClosed:
            return "closed"

    assert in_child(enter) == "closed"


def test_registration_keeps_no_gate_alive():
    before = len(forks._registered)
    Gate()
    gc.collect()
    assert len(forks._registered) <= before


def test_repr_shows_state(gate):
    assert repr(gate) == "<Gate test backend open in_flight=0>"
    gate.close()
    assert repr(gate) == "<Gate test backend closed in_flight=0>"
