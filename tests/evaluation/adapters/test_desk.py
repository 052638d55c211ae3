"""The thread that answers: who comes late, who leaves, what goes wrong."""

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.desk import Desk, Seeds
from derta_jax.evaluation.adapters.texts import Question, cut
from derta_jax.evaluation.generate import Request, generate

PROMPTS = [[5, 6, 7], [9], [200, 100], [8, 8], list(range(3, 20)), [7]]


@pytest.fixture
def desk(subject):
    with Desk(subject, 4) as desk:
        yield desk


def alone(subject, prompt, tokens):
    (answer,) = generate(subject.model, subject.params, [prompt], tokens, subject.stop_ids, 1)
    return subject.tokenizer.decode(answer.token_ids)


def test_questions_of_all_lengths_are_answered_as_if_each_were_alone(subject, desk):
    lengths = (8, 8, 3, 1, 8, 5)
    futures = [desk.ask(Question(Request(prompt, n))) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    for future, prompt, n in zip(futures, PROMPTS, lengths, strict=True):
        assert future.result().text == alone(subject, prompt, n)


def test_the_batch_grows_for_a_longer_question(subject, desk):
    assert desk.ask(Question(Request(PROMPTS[0], 8))).result().tokens == 8
    assert desk.ask(Question(Request(PROMPTS[4], 16))).result().text == alone(subject, PROMPTS[4], 16)
    assert desk.ask(Question(Request(PROMPTS[0], 8))).result().text == alone(subject, PROMPTS[0], 8)


def test_a_stop_may_be_spread_over_tokens_and_the_text_ends_before_the_first(subject, desk):
    whole = desk.ask(Question(Request(PROMPTS[0], 32))).result()
    early, late = whole.text[6:10], whole.text[20:22]
    reply = desk.ask(Question(Request(PROMPTS[0], 32), (late, early))).result()
    assert reply.text == cut(whole.text, [early, late])
    assert reply.finish_reason == "stop"
    assert reply.tokens < whole.tokens


def test_a_stop_that_does_not_come_changes_nothing(desk):
    replies = [desk.ask(Question(Request(PROMPTS[0], 8), stops)).result() for stops in ((), ("never said",))]
    assert replies[0] == replies[1]
    assert replies[0].finish_reason == "length"


def test_what_goes_wrong_is_told_to_those_it_happened_to_and_the_next_is_answered(subject, desk):
    broken = desk.ask(Question(Request(PROMPTS[0], 8, seed=(2**70, 0))))
    with pytest.raises(OverflowError):
        broken.result()
    assert desk.ask(Question(Request(PROMPTS[0], 8))).result().text == alone(subject, PROMPTS[0], 8)


def test_a_cancelled_question_makes_room_for_the_others(subject, desk):
    futures = [desk.ask(Question(Request([7], 32))) for _ in range(8)]
    for future in futures:
        future.cancel()
    assert desk.ask(Question(Request(PROMPTS[2], 8))).result().text == alone(subject, PROMPTS[2], 8)


def test_closing_cancels_what_is_not_answered_and_takes_no_more(subject):
    desk = Desk(subject, 1)
    futures = [desk.ask(Question(Request([7], 32))) for _ in range(3)]
    desk.close()
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        desk.ask(Question(Request([7], 2)))


def test_text_is_cut_before_the_stop_that_comes_first():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one two", []) == cut("one two", ["four"]) == "one two"


def test_each_time_a_prompt_is_asked_it_has_another_seed():
    seeds, again = Seeds(1), Seeds(1)
    first, second = seeds.next([1, 2]), seeds.next([1, 2])
    assert first != second
    again.next([3])
    assert [again.next([1, 2]), again.next([1, 2])] == [first, second]
    with pytest.raises(UserError, match="seed is -1"):
        Seeds(-1)
