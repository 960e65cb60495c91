"""Groups of local processes for the tests end in order, and fail nothing once their answers are here."""

import os
import signal
import threading

import pytest

from .distributed import ending
from .distributed.group import FailedError

pytestmark = pytest.mark.xdist_group("processes")
WORLD = 3  # a group of its own: other tests use two and four


def test_members_meet_and_then_leave_their_group(groups, folder):
    groups.run(WORLD, ending.notes_how_it_ends, str(folder))
    groups.end(WORLD)
    left = {path.name for path in folder.iterdir()}
    assert left == {f"{step} {rank}" for step in ("met", "left") for rank in range(WORLD)}


def test_a_member_that_dies_after_its_answer_fails_nothing(groups):
    assert groups.run(WORLD, ending.dies_at_the_end, 1) == [0, 1, 2]
    groups.end(WORLD)
    assert groups.run(WORLD, ending.rank) == [0, 1, 2]  # of a new group
    groups.end(WORLD)


def test_a_member_that_dies_before_its_answer_is_an_error(groups):
    with pytest.raises(FailedError, match=r"ranks \[0, 1, 2\] of 3: it died"):
        groups.run(WORLD, ending.dies)


def test_members_that_die_with_an_unread_task_are_an_error(groups):
    groups.run(WORLD, ending.rank)
    members = [process for process, _ in groups._members[WORLD]]

    def send(number):
        for process in members:
            os.kill(process, number)

    send(signal.SIGSTOP)
    death = threading.Timer(0.2, send, [signal.SIGKILL])
    death.start()
    with pytest.raises(FailedError, match=r"ranks \[0, 1, 2\] of 3: it died"):
        groups.run(WORLD, ending.rank)
    death.join()


def test_one_thread_runs_the_collectives_of_a_group(groups):
    """Two of gloo's overwrite each other's notes (`distributed.worker`)."""
    assert groups.run(2, ending.threads) == [[1, 1, 1]] * 2
