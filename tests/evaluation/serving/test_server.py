"""A real server, asked by OpenAI's own client: answers, streams, and what is refused."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import openai
import pytest

from derta_jax.evaluation.generate import generate
from tests.evaluation.serving.conftest import CONTEXT, QUEUE, SLOTS, running

USER = [{"role": "user", "content": "How do I make kite 1?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def asked(content):
    return [{"role": "user", "content": content}]


def alone(subject, texts, max_tokens):
    """What generation without a server answers, greedily: text, number of tokens, finish reason."""
    with jax.set_mesh(subject.mesh):
        prompts = [subject.tokenizer.prompt_ids(text) for text in texts]
        answers = generate(subject.model, subject.params, prompts, max_tokens, subject.stop_ids, SLOTS)
    return [
        (subject.tokenizer.decode(answer.token_ids), len(answer.token_ids), answer.finish_reason) for answer in answers
    ]


def told(completion):
    """The same of an answer's only choice."""
    (choice,) = completion.choices
    text = choice.message.content if hasattr(choice, "message") else choice.text
    return text, completion.usage.completion_tokens, choice.finish_reason


def test_chat_answers_what_generation_alone_does(client, subject):
    completion = client.chat.completions.create(model="talker", messages=USER, max_tokens=40, temperature=0)
    prompt = subject.template.render(USER[0]["content"])
    assert [told(completion)] == alone(subject, [prompt], 40)
    assert completion.choices[0].message.role == "assistant"
    assert completion.usage.prompt_tokens == len(subject.tokenizer.prompt_ids(prompt))
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_raw_text_is_gone_on_with(client, subject):
    completion = client.completions.create(model="talker", prompt="To make a kite,", max_tokens=40, temperature=0)
    assert [told(completion)] == alone(subject, ["To make a kite,"], 40)


def test_token_ids_are_a_prompt_too(client, subject):
    token_ids = subject.tokenizer.prompt_ids("To make a kite,")
    options = {"model": "talker", "max_tokens": 10, "temperature": 0}
    assert told(client.completions.create(prompt=token_ids, **options)) == told(
        client.completions.create(prompt="To make a kite,", **options)
    )


def test_a_system_message_and_earlier_turns_go_into_the_chat_template(client, subject):
    turns: list[dict] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "With paper."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]},
    ]
    text = "<s>[system] Be kind.\n[user] How?\n[assistant] With paper.\n[user] And then?\n[assistant] "
    completion = client.chat.completions.create(model="talker", messages=turns, max_tokens=20, temperature=0)
    assert [told(completion)] == alone(subject, [text], 20)
    turns[0]["role"] = "developer"
    again = client.chat.completions.create(model="talker", messages=turns, max_tokens=20, temperature=0)
    assert told(again) == told(completion)


def test_an_answer_that_is_begun_is_gone_on_with(client, subject):
    turns = [*asked("How?"), {"role": "assistant", "content": "First do"}]
    options = {"model": "talker", "max_tokens": 20, "temperature": 0}
    completion = client.chat.completions.create(
        messages=turns, extra_body={"continue_final_message": True, "add_generation_prompt": False}, **options
    )
    assert [told(completion)] == alone(subject, ["<s>[user] How?\n[assistant] First do"], 20)


def test_a_model_with_a_text_template_takes_one_message_and_the_beginning_of_its_answer(instructed_server, instructed):
    with instructed_server.client() as client:
        options = {"model": "talker", "max_tokens": 20, "temperature": 0}
        plain = client.chat.completions.create(messages=asked("How?"), **options)
        kind = [{"role": "system", "content": ""}, *asked("How?")]
        assert told(client.chat.completions.create(messages=kind, **options)) == told(plain)
        begun = client.chat.completions.create(
            messages=[*asked("How?"), {"role": "assistant", "content": "First do"}],
            extra_body={"continue_final_message": True},
            **options,
        )
        texts = ["[INST] How? [\\INST]", "[INST] How? [\\INST] First do"]
        assert [told(plain), told(begun)] == alone(instructed, texts, 20)
        with pytest.raises(openai.BadRequestError, match=r"place for one message, of the user, not for system, user: "):
            client.chat.completions.create(
                messages=[{"role": "system", "content": "Be kind."}, *asked("How?")], **options
            )


def test_32_requests_at_a_time_get_the_answers_that_each_gets_alone(client, subject):
    contents = [f"How do I make kite {number}? " + "Take string. " * (number % 5) for number in range(32)]

    def ask(content):
        return told(
            client.chat.completions.create(model="talker", messages=asked(content), max_tokens=240, temperature=0)
        )

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, contents))
    assert answers == alone(subject, [subject.template.render(content) for content in contents], 240)
    assert {answer[2] for answer in answers} == {"stop", "length"}


# Streams


def streamed(chunks):
    """Role, text, finish reason and usage of a stream with one choice."""
    role, text, reason, usage = None, "", None, None
    for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            assert reason is None
            role = choice.delta.role or role
            text += choice.delta.content or ""
            reason = choice.finish_reason
    return role, text, reason, usage


@pytest.mark.parametrize("content", [f"How do I make kite {number}?" for number in range(4)])
def test_a_stream_is_the_answer_in_parts(client, content):
    options = {"model": "talker", "messages": asked(content), "max_tokens": 300, "temperature": 0}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    role, text, reason, usage = streamed(chunks)
    assert (role, text, reason) == ("assistant", whole.choices[0].message.content, whole.choices[0].finish_reason)
    assert usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(chunks) > 10


def test_a_stream_has_usage_only_where_it_is_asked_for(client):
    with client.completions.create(model="talker", prompt="Take", max_tokens=9, temperature=0, stream=True) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    whole = client.completions.create(model="talker", prompt="Take", max_tokens=9, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_a_stream_is_server_sent_events_and_ends_with_done(server):
    body = {"prompt": "Take", "max_tokens": 3, "stream": True, "temperature": 0}
    response = server.post(COMPLETIONS, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


# How an answer is made


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(client, stream):
    options = {"model": "talker", "messages": USER, "max_tokens": 200, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    for start, length in ((20, 3), (61, 12), (90, 1)):
        stop = whole[start : start + length]
        answer = client.chat.completions.create(**options, stop=["never said", stop], stream=stream)
        if stream:
            with answer:
                _, text, reason, _ = streamed(answer)
        else:
            text, tokens, reason = told(answer)
            assert tokens < 200
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_stopped_answer_gives_its_slot_back(server, client):
    options = {"model": "talker", "messages": USER, "temperature": 0, "max_tokens": 1500}
    first = client.chat.completions.create(**options | {"max_tokens": 20}).choices[0].message.content
    client.chat.completions.create(**options, stop=first[5:8])
    assert server.wait_for(lambda load: load["running"] == 0, seconds=3)["waiting"] == 0


def test_several_choices_and_several_prompts_are_told_apart(client):
    options = {"model": "talker", "max_tokens": 12}
    chat = client.chat.completions.create(messages=USER, n=3, seed=5, temperature=1.5, **options)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in chat.choices]
    assert len(set(texts)) == 3
    greedy = client.completions.create(prompt=["Take", "First"], n=2, temperature=0, **options)
    one_by_one = [client.completions.create(prompt=prompt, temperature=0, **options) for prompt in ("Take", "First")]
    expected = [each.choices[0].text for each in one_by_one for _ in range(2)]
    assert [choice.text for choice in greedy.choices] == expected
    assert greedy.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in one_by_one)
    with client.chat.completions.create(messages=USER, n=3, seed=5, temperature=1.5, stream=True, **options) as stream:
        parts = ["", "", ""]
        for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index] += choice.delta.content or ""
    assert parts == texts


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -3])
def test_a_seed_repeats_a_sample(client, seed):
    options = {"model": "talker", "messages": USER, "max_tokens": 20, "temperature": 1.0}
    first, again, other = (client.chat.completions.create(**options, seed=number) for number in (seed, seed, seed + 1))
    assert told(first) == told(again) != told(other)


def test_without_a_seed_samples_differ_and_the_temperature_is_one(client):
    first, again = (client.chat.completions.create(model="talker", messages=USER, max_tokens=20) for _ in range(2))
    assert told(first) != told(again)


def test_a_seed_means_what_it_means_to_derta_generate(client, subject):
    with jax.set_mesh(subject.mesh):
        prompt_ids = subject.tokenizer.prompt_ids(subject.template.render(USER[0]["content"]))
        (answer,) = generate(subject.model, subject.params, [prompt_ids], 20, subject.stop_ids, SLOTS, 1.0, 9)
    completion = client.chat.completions.create(model="talker", messages=USER, max_tokens=20, temperature=1.0, seed=9)
    assert told(completion)[0] == subject.tokenizer.decode(answer.token_ids)


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client):
    turns = asked("kite " * 400)
    completion = client.chat.completions.create(model="talker", messages=turns, temperature=0)
    assert completion.usage.prompt_tokens > 300
    if completion.choices[0].finish_reason == "length":
        assert completion.usage.total_tokens == CONTEXT
    short = client.completions.create(model="talker", prompt="Take", temperature=0)
    assert short.usage.completion_tokens <= 16


def test_the_model_is_listed(client, server):
    (model,) = client.models.list().data
    assert model.id == "talker"
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == CONTEXT
    assert "talker answers at " + server.url in server.said.getvalue()


# Clients that go, and queues that are full


def test_a_client_that_leaves_a_stream_frees_its_slot(server, client):
    options = {"model": "talker", "messages": USER, "temperature": 0, "max_tokens": 1500}
    with client.chat.completions.create(**options, stream=True) as stream:
        next(iter(stream))
        assert server.load()["running"] == 1
    server.wait_for(lambda load: load["running"] == 0, seconds=3)


def test_a_client_that_leaves_a_whole_answer_frees_its_slot(server):
    body = {"messages": USER, "max_tokens": 1500, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + CHAT, json=body, timeout=0.2)
    server.wait_for(lambda load: load["running"] == 0, seconds=3)


def test_a_client_that_leaves_while_it_waits_gives_up_its_place(server):
    async def leave_while_waiting():
        body = {"messages": USER, "max_tokens": 1900, "temperature": 0, "n": SLOTS}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            running = asyncio.create_task(client.post(CHAT, json=body))
            while server.load()["running"] < SLOTS:
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(client.post(CHAT, json=body | {"n": 3, "stream": True}))
            while server.load()["waiting"] < 3:
                await asyncio.sleep(0.01)
            waiting.cancel()
            while server.load()["waiting"]:
                await asyncio.sleep(0.01)
            assert server.load()["running"] == SLOTS
            running.cancel()

    asyncio.run(asyncio.wait_for(leave_while_waiting(), 30))
    server.wait_for(lambda load: load["running"] == 0, seconds=3)


def test_a_full_queue_is_429_with_a_time_to_wait(server):
    body = {"messages": USER, "max_tokens": 1900, "temperature": 0}

    async def fill_the_queue():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            filling = asyncio.create_task(client.post(CHAT, json=body | {"n": SLOTS + QUEUE - 1}))
            while server.load()["waiting"] < QUEUE - 1:
                await asyncio.sleep(0.01)
            full = await client.post(CHAT, json=body | {"n": 2})
            async with server.async_client() as ours:
                with pytest.raises(openai.RateLimitError, match="too many requests are waiting"):
                    await ours.chat.completions.create(model="talker", messages=USER, n=2)
            filling.cancel()
            return full

    full = asyncio.run(asyncio.wait_for(fill_the_queue(), 30))
    assert full.status_code == 429
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "queue_full"
    server.wait_for(lambda load: load["running"] == load["waiting"] == 0, seconds=3)
    assert server.post(CHAT, body | {"n": 2, "max_tokens": 1}).status_code == 200


def test_more_choices_than_there_are_places_are_never_taken(server):
    response = server.post(CHAT, {"messages": USER, "n": SLOTS + QUEUE + 1})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"at most {SLOTS + QUEUE} choices at a time, not {SLOTS + QUEUE + 1}"


def test_health_answers_while_a_program_is_compiled(subject):
    with running(subject, context=CONTEXT - 16) as fresh, ThreadPoolExecutor(1) as pool:
        long = pool.submit(fresh.post, COMPLETIONS, {"prompt": "kite " * 600, "max_tokens": 2})
        answers = 0
        while not long.done():
            answers += fresh.load()["status"] == "ok"
        assert long.result().status_code == 200
        assert answers > 3
