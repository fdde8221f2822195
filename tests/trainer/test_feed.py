"""Batches made ahead are those that would be made when they are asked for."""

import gc
import threading

import pytest
import torch
from small_model import build_batch
from waiting import until

from minbert.trainer.feed import Feed

CPU = torch.device("cpu")


def test_what_follows_is_made_in_a_thread_and_once():
    made = []
    feed = Feed(lambda key: made.append((key, threading.current_thread().name[:7])) or key, CPU)
    found = list(feed.each(range(6)))
    assert found == [*range(6)]
    assert sorted(key for key, _ in made) == [*range(6)]
    assert [name for key, name in sorted(made) if key] == ["batches"] * 5 and sorted(made)[0][1] == "MainThr"


def test_what_nobody_asks_for_is_forgotten():
    feed = Feed(lambda key: key, CPU)
    assert feed(0, [1, 2]) == 0 and feed(7, [8, 9]) == 7 and feed(8, [9, 10]) == 8
    assert {*feed._made} == {9, 10}


def test_an_error_comes_where_the_batch_is_asked_for():
    def make(key: int) -> int:
        if key == 2:
            raise OSError("the disk is gone")
        return key

    feed = Feed(make, CPU)
    batches = feed.each(range(4))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_the_thread_ends_with_the_feed():
    def started() -> tuple[Feed, threading.Thread]:
        feed = Feed(lambda key: key, CPU)
        feed(0, [1])
        (thread,) = feed._thread._threads
        assert thread.is_alive()
        return feed, thread

    feed, thread = started()
    feed.close()
    until(lambda: not thread.is_alive(), "the thread's end")
    feed, thread = started()
    del feed
    gc.collect()
    until(lambda: not thread.is_alive(), "the thread's end")


def test_elsewhere_a_batch_comes_packed():
    feed = Feed(lambda key: build_batch(), torch.device("meta"))
    batches = list(feed.each([0, 1]))
    assert all(batch.sentences.input_ids.device.type == "meta" for batch in batches)
