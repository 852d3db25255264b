"""What a stream's client has received."""

from __future__ import annotations

from blip2_serve.stages.progress import Progress
from blip2_serve.types import TokenEvent


def test_nothing_was_sent_before_the_first_event() -> None:
    assert Progress(3).sent() == ()


def test_the_tokens_of_each_answer_add_up_and_finished_answers_have_none() -> None:
    progress = Progress(3)
    progress.add(TokenEvent((1, 2), " a", index=0))
    progress.add(TokenEvent((9,), " b", "stop", index=2))
    progress.add(TokenEvent((3,), " c", index=0))

    assert progress.sent() == ((1, 2, 3), (), None)


def test_nothing_is_left_to_send_once_all_answers_are_finished() -> None:
    progress = Progress(2)
    progress.add(TokenEvent((1,), " a", "length", index=0))
    assert progress.sent() == (None, ())
    progress.add(TokenEvent((2,), " b", "stop", index=1))
    assert progress.sent() is None


def test_the_first_event_of_an_attempt_that_goes_on_is_marked() -> None:
    progress = Progress(1)
    assert progress.begin() == ()
    assert not progress.add(TokenEvent((1,), " a")).resumed
    assert progress.begin() == ((1,),)
    marks = [progress.add(TokenEvent((i,), " b")).resumed for i in (2, 3)]
    assert marks == [True, False]


def test_an_attempt_that_begins_before_the_client_has_anything_is_not_marked() -> None:
    progress = Progress(1)
    progress.begin()
    progress.begin()
    assert not progress.add(TokenEvent((1,), " a")).resumed
