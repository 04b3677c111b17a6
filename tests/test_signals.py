"""Signals that would end a process, held back for a while."""

import os
import signal
import threading

import pytest

from megaslm.signals import ENDING_SIGNALS, signals_held


def test_signals_are_held_and_not_lost():
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            reached = True
    assert reached and signal.getsignal(signal.SIGINT) is before


def test_one_that_a_thread_takes_is_held_too():
    """A signal to the process goes to any thread whose mask lets it through."""
    reached, rest = False, threading.Event()
    thread = threading.Thread(target=rest.wait)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            with signals_held():
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(0.2)
                reached = True
    finally:
        rest.set()
        thread.join()
    assert reached and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & ENDING_SIGNALS
