"""The thread that owns the devices: who gets a slot, who waits, who is let go, and what happens when things end."""

import queue
import time

import jax
import pytest

from derta_jax.evaluation.generate import Batch, Request, generate
from derta_jax.evaluation.serving.engine import Broken, Closing, Engine, Job, NoRoom, alike
from tests.evaluation.serving.conftest import CONTEXT, SLOTS

LONG = 1000
SHORT = 5
SOON = 10.0


class Listener:
    """Hears of one job."""

    def __init__(self, request: Request):
        self.news: queue.SimpleQueue = queue.SimpleQueue()
        self.job = Job(request, self.news.put)

    def end(self):
        """Token ids and finish reason, or what it broke off for."""
        token_ids = []
        while True:
            news = self.news.get(timeout=SOON)
            if isinstance(news, Broken):
                return news
            token_ids += news.token_ids
            if news.finish_reason:
                return token_ids, news.finish_reason

    def begin(self):
        return self.news.get(timeout=SOON)


def new_engine(subject, waiting: int) -> Engine:
    def new_batch() -> Batch:
        return Batch(subject.model, subject.params, (), SLOTS, CONTEXT)

    return Engine(new_batch, subject.mesh, waiting)


@pytest.fixture
def engine(subject):
    engine = new_engine(subject, waiting=2)
    engine.start()
    yield engine
    engine.close(0)
    engine.join()


def ask(engine, *limits):
    """Listeners to requests of these lengths, which were submitted together."""
    listeners = [Listener(Request([5, 6, 7], limit)) for limit in limits]
    engine.submit([listener.job for listener in listeners])
    return listeners


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_job_is_told_what_generation_alone_gives(engine, subject):
    with jax.set_mesh(subject.mesh):
        (alone,) = generate(subject.model, subject.params, [[5, 6, 7]], SHORT, ())
    (listener,) = ask(engine, SHORT)
    assert listener.end() == (alone.token_ids, "length")
    until(lambda: engine.load.running == 0)


def test_a_job_joins_while_others_run(engine):
    (long,) = ask(engine, LONG)
    long.begin()
    (short,) = ask(engine, SHORT)
    assert short.end()[1] == "length"
    assert engine.load.running == 1


def test_no_more_wait_than_may(engine):
    listeners = ask(engine, *[LONG] * SLOTS)
    until(lambda: engine.load.running == SLOTS)
    ask(engine, SHORT, SHORT)
    with pytest.raises(NoRoom):
        ask(engine, SHORT)
    assert (engine.load.running, engine.load.waiting) == (SLOTS, 2)
    engine.cancel([listeners[0].job])
    until(lambda: engine.load.waiting < 2)
    ask(engine, SHORT)


def test_all_of_several_jobs_are_taken_or_none(engine):
    with pytest.raises(NoRoom):
        ask(engine, *[SHORT] * (SLOTS + 3))
    assert engine.load.running == engine.load.waiting == 0
    assert engine.places == SLOTS + 2


def test_a_job_that_nobody_waits_for_gives_its_slot_to_the_next(engine):
    listeners = ask(engine, *[LONG] * SLOTS)
    until(lambda: engine.load.running == SLOTS)
    (waiting,) = ask(engine, SHORT)
    engine.cancel([listeners[3].job])
    assert waiting.end()[1] == "length"
    assert engine.load.running == SLOTS - 1


def test_a_job_that_still_waits_is_let_go_at_once(engine):
    ask(engine, *[LONG] * SLOTS)
    until(lambda: engine.load.running == SLOTS)
    (waiting,) = ask(engine, SHORT)
    engine.cancel([waiting.job])
    assert engine.load.waiting == 0
    assert waiting.news.empty()


def test_letting_a_finished_job_go_changes_nothing(engine):
    (listener,) = ask(engine, SHORT)
    listener.end()
    engine.cancel([listener.job])
    assert ask(engine, SHORT)[0].end()[1] == "length"


def test_closing_takes_no_more_and_finishes_what_is_there(subject):
    engine = new_engine(subject, waiting=2)
    over = []
    engine.start(when_over=lambda: over.append(True))
    listeners = ask(engine, *[50] * SLOTS, SHORT)
    engine.close()
    with pytest.raises(Closing):
        ask(engine, SHORT)
    assert {listener.end()[1] for listener in listeners} == {"length"}
    engine.join()
    assert over == [True]
    assert engine.failure is None


def test_what_is_not_finished_in_time_breaks_off(subject):
    engine = new_engine(subject, waiting=1)
    engine.start()
    listeners = ask(engine, *[CONTEXT - 3] * SLOTS, SHORT)
    listeners[0].begin()
    engine.close(grace=0.1)
    assert {listener.end() for listener in listeners} == {Broken("stopping")}
    engine.join()
    assert (engine.load.running, engine.load.waiting) == (0, 0)


BROKEN = Request(["no token"], SHORT)  # type: ignore[list-item]


def test_jobs_that_the_devices_fail_on_are_told_so_and_the_next_ones_get_slots(engine, caplog):
    listeners = [*ask(engine, LONG, LONG), Listener(BROKEN)]
    listeners[0].begin()
    engine.submit([listeners[2].job])
    assert [listener.end() for listener in listeners] == [Broken("failed")] * 3
    assert ask(engine, SHORT)[0].end()[1] == "length"
    assert "the devices failed on 3 requests" in caplog.text
    assert engine.failure is None


def test_an_engine_that_gets_no_new_batch_ends(subject, caplog):
    room = iter([True])

    def new_batch() -> Batch:
        if not next(room, False):
            raise MemoryError("no room for another")
        return Batch(subject.model, subject.params, (), SLOTS, CONTEXT)

    engine, over = Engine(new_batch, subject.mesh, 2), []
    engine.start(when_over=lambda: over.append(True))
    requests = [*[Request([5], LONG)] * (SLOTS - 1), BROKEN, Request([5], SHORT)]  # the last one waits
    listeners = [Listener(request) for request in requests]
    engine.submit([listener.job for listener in listeners])
    assert {listener.end() for listener in listeners} == {Broken("failed")}
    engine.join()
    assert over == [True]
    assert isinstance(engine.failure, MemoryError)
    with pytest.raises(Closing):
        ask(engine, SHORT)


def test_nothing_is_compiled_for_requests_like_those_of_the_warm_up(subject):
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int | float) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    engine = new_engine(subject, waiting=2)
    engine.warm_up([1, 20])
    engine.start()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = [Listener(Request([5] * length, 20, temperature)) for length in (3, 30, 16) for temperature in (0, 1)]
        engine.submit([listener.job for listener in first])
        first[0].begin()
        engine.cancel([first[0].job])
        second = ask(engine, *[20] * 4)
        assert {listener.end()[1] for listener in first[1:] + second} == {"length"}
        assert not compiled
        (other,) = [Listener(Request([5] * 40, 2))]
        engine.submit([other.job])
        other.end()
        assert compiled  # another length of prompts is another program
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        engine.close(0)
        engine.join()


def test_jobs_of_one_padded_length_enter_together_but_never_more_than_half_of_the_slots():
    lengths = [3, 40, 16, 33, 1, 17, 2, 5, 6]
    jobs = [Job(Request([0] * length, 1), print) for length in lengths]
    groups = [[len(job.request.prompt_ids) for job in group] for group in alike(jobs, 4)]
    assert groups == [[3, 16, 1, 2], [5, 6], [17], [40, 33]]
