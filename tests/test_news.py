"""News for the main thread: no signal and no word is lost, whenever it comes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from relay.news import News


@pytest.fixture
def news() -> Iterator[News[str]]:
    """News that hears SIGUSR1."""
    made: News[str] = News()
    made.listen()
    previous = signal.signal(signal.SIGUSR1, lambda *_: made.tell("USR1"))
    yield made
    signal.signal(signal.SIGUSR1, previous)
    made.close()
    made.close()


def test_a_signal_at_any_moment_wakes(news: News[str]) -> None:
    """A signal that another thread sends around the moment of going to sleep is heard, 500 times out of 500."""
    generator = random.Random(1)
    for _ in range(500):
        pause = generator.random() * 1e-4

        def send(pause: float = pause) -> None:
            until = time.perf_counter() + pause
            while time.perf_counter() < until:
                pass
            os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=send)
        thread.start()
        assert news.wait(10.0) == "USR1"
        thread.join()


def test_words_come_in_order(news: News[str]) -> None:
    """What several calls told before anybody waited comes one by one, in order, then nothing."""
    for number in range(3):
        news.tell(str(number))
    assert [news.wait(1.0) for _ in range(3)] == ["0", "1", "2"]
    assert news.wait(0.0) is None


def test_more_words_than_the_pipe_holds(news: News[str]) -> None:
    """A full pipe loses no word."""
    for number in range(100_000):
        news.tell(str(number))
    assert [news.wait(0.0) for _ in range(100_000)] == [str(number) for number in range(100_000)]


def test_a_word_from_a_thread_wakes(news: News[str]) -> None:
    """A thread's word ends a wait without a timeout."""
    thread = threading.Thread(target=lambda: news.tell("done"))
    thread.start()
    assert news.wait() == "done"
    thread.join()
