"""Inspect with our models: requests at the same time, each answered as if it were alone."""

import json
import tomllib

import anyio
import pytest
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
)
from inspect_ai.tool import ToolInfo

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.inspect_api import DertaAPI
from derta_jax.evaluation.generate import generate
from tests.evaluation.adapters.conftest import ROOT, run_without_torch

QUESTIONS = ["How do I make a kite?", "a", "First do one thing", "How?", "東京", "Where is the kite?"]


@pytest.fixture(scope="module")
def api(chatting):
    api = DertaAPI(str(chatting), dtype="float32", batch_size=4)
    yield api
    api.close()


def asked(api, *conversations, tools=(), **config):
    """The outputs to conversations that are begun at the same time."""
    outputs = [None] * len(conversations)

    async def one(place, turns):
        turns = [ChatMessageUser(content=turns)] if isinstance(turns, str) else turns
        outputs[place] = await api.generate(list(turns), list(tools), "auto", GenerateConfig(**config))

    async def all_of_them():
        async with anyio.create_task_group() as group:
            for place, turns in enumerate(conversations):
                group.start_soon(one, place, turns)

    try:
        anyio.run(all_of_them)
    except* UserError as errors:
        raise errors.exceptions[0] from None
    return outputs


def greedy(api, text, tokens):
    """What our own generation says to a text."""
    subject = api.subject
    prompt_ids = subject.tokenizer.prompt_ids(text)
    (answer,) = generate(subject.model, subject.params, [prompt_ids], tokens, subject.stop_ids, 1)
    return subject.tokenizer.decode(answer.token_ids), answer.finish_reason, len(prompt_ids)


def test_concurrent_requests_are_answered_as_if_each_were_alone(api):
    outputs = asked(api, *QUESTIONS, max_tokens=20)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        text, reason, read = greedy(api, f"<s>user: {question}</s><s>assistant: ", 20)
        assert output.completion == text
        assert output.stop_reason == {"stop": "stop", "length": "max_tokens"}[reason]
        assert output.usage.input_tokens == read
        assert output.usage.total_tokens == read + output.usage.output_tokens


def test_a_request_has_its_own_length_whatever_came_before(api):
    (short,) = asked(api, QUESTIONS[0], max_tokens=3)
    (long,) = asked(api, QUESTIONS[0], max_tokens=40)
    assert (short.usage.output_tokens, short.stop_reason) == (3, "max_tokens")
    assert long.completion.startswith(short.completion.rstrip("\ufffd"))


def test_an_answer_ends_before_a_stop_sequence(api):
    (whole,) = asked(api, QUESTIONS[0], max_tokens=40)
    stop = whole.completion[5:8]
    (output,) = asked(api, QUESTIONS[0], max_tokens=40, stop_seqs=["never said", stop])
    assert output.completion == whole.completion.split(stop)[0]
    assert output.stop_reason == "stop"
    assert output.usage.output_tokens <= whole.usage.output_tokens


def test_a_conversation_that_fills_the_model_says_so(api):
    fits = ChatMessageUser(content="a, " * 100)
    (output,) = asked(api, [fits], max_tokens=500)
    positions = api.subject.source.config.max_positions
    assert output.stop_reason == "model_length"
    assert output.usage.total_tokens == positions
    (output,) = asked(api, "a, " * 500)
    assert output.stop_reason == "model_length"
    assert output.error.endswith("and the model has 256 positions")


def test_a_last_turn_of_the_assistant_is_gone_on_with(api):
    turns = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content="How?"),
        ChatMessageAssistant(content="To make a kite,"),
    ]
    (output,) = asked(api, turns, max_tokens=10)
    text = "<s>system: Be brief.</s><s>user: How?</s><s>assistant: To make a kite,"
    assert output.completion == greedy(api, text, 10)[0]


def test_epochs_are_sampled_differently_and_a_seed_gives_the_same_samples_again(chatting):
    def sampled(seed):
        api = DertaAPI(str(chatting), dtype="float32", batch_size=4)
        outputs = asked(api, *[QUESTIONS[0]] * 3, max_tokens=12, temperature=1.0, seed=seed)
        api.close()
        return {output.completion for output in outputs}

    assert len(sampled(1)) == 3
    assert sampled(1) == sampled(1) != sampled(2)


def test_a_request_that_nobody_waits_for_leaves_the_others_alone(api):
    async def impatient():
        with anyio.move_on_after(0.05):
            await api.generate([ChatMessageUser(content="a")], [], "auto", GenerateConfig(max_tokens=200))
        return await api.generate([ChatMessageUser(content=QUESTIONS[0])], [], "auto", GenerateConfig(max_tokens=9))

    output = anyio.run(impatient)
    assert output.completion == greedy(api, f"<s>user: {QUESTIONS[0]}</s><s>assistant: ", 9)[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9: not supported, only max_tokens, seed, stop_seqs, temperature are"),
        ({"num_choices": 2, "logprobs": True}, "num_choices=2, logprobs=True: not supported"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(api, config, message):
    with pytest.raises(UserError, match=message):
        asked(api, "a", **config)


def test_options_that_change_nothing_or_are_inspects_own_are_none(api):
    (output,) = asked(api, "a", max_tokens=5, top_p=1.0, num_choices=1, max_retries=3, max_connections=8)
    assert output.completion == asked(api, "a", max_tokens=5)[0].completion


def test_tools_are_an_error_that_names_them(api):
    with pytest.raises(UserError, match="calls no tools, but the task offers ruler"):
        asked(api, "a", tools=[ToolInfo(name="ruler", description="measures")])


def test_pictures_are_an_error(api):
    with pytest.raises(UserError, match="holds image: only text is supported"):
        asked(api, [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batchsize": 4}, "unknown model argument 'batchsize'; did you mean 'batch_size'"),
        ({"dtype": "float16"}, "it must be float32 or bfloat16"),
        ({"template": "no place for it"}, "must be `chat` or contain {prompt} once"),
    ],
)
def test_a_wrong_model_argument_is_named(chatting, arguments, message):
    with pytest.raises(UserError, match=message):
        DertaAPI(str(chatting), **arguments)


def test_a_model_that_says_nowhere_how_conversations_are_written_needs_a_template(tiny_llama):
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        DertaAPI(str(tiny_llama))
    api = DertaAPI(str(tiny_llama), dtype="float32", template="Q: {prompt} A:")
    (output,) = asked(api, "How?", max_tokens=5)
    assert output.completion == greedy(api, "Q: How? A:", 5)[0]


TASK = """
import json, pathlib
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match

@task
def kites():
    rows = json.loads(pathlib.Path(__file__).with_name("rows.json").read_text())
    return Task(dataset=[Sample(**row) for row in rows], scorer=match("exact"))
"""


@pytest.fixture
def installed(tmp_path):
    """A place where our package looks installed, with the entry points that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    directory = tmp_path / "derta_jax_of_the_test-0.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text("Metadata-Version: 2.1\nName: derta-jax-of-the-test\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["inspect_ai"].items()]
    (directory / "entry_points.txt").write_text("\n".join(["[inspect_ai]", *lines]))
    return directory.parent


@pytest.mark.slow
def test_the_command_runs_a_task_without_torch(api, chatting, installed, tmp_path):
    outputs = asked(api, *QUESTIONS, max_tokens=8)
    rows = [
        {"input": question, "target": output.completion if place % 2 else "another answer"}
        for place, (question, output) in enumerate(zip(QUESTIONS, outputs, strict=True))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "task.py").write_text(TASK)
    run_without_torch(
        "inspect_ai",
        f"eval task.py --model derta/{chatting} -M dtype=float32 -M mesh=fsdp=4,tensor=2 --max-tokens 8 "
        "--display plain --log-dir logs",
        installed,
        ignored="The 'initial' parameter is deprecated:DeprecationWarning",  # Inspect gives it to tenacity
        XDG_DATA_HOME=str(tmp_path / "data"),
    )
    (file,) = (tmp_path / "logs").iterdir()
    log = read_eval_log(file)
    assert log.status == "success", log.error
    assert log.results
    assert log.samples
    assert log.results.scores[0].metrics["accuracy"].value == 0.5
    assert [sample.output.completion for sample in log.samples] == [output.completion for output in outputs]
