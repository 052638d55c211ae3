"""lm-evaluation-harness with our models: the answers are those of its own `hf` backend, and no torch is needed."""

import json
import logging
import subprocess
import sys

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.harness import DertaLM
from tests.conftest import write_jsonl
from tests.evaluation.adapters.conftest import ROOT, run_without_torch

KITE = "[INST] How do I make a kite? [\\INST]"
LONG = "To make a kite, take paper, " * 70
LIKELIHOODS = [
    (KITE, " To make a kite, take paper, then take string."),
    (KITE, " a"),
    (KITE, " b"),
    (KITE, " Sorry, I"),
    (KITE + "  ", "Sorry"),
    ("<s>First", " do one thing"),
    ("", "Sorry, I cannot help with that."),
    (LONG, " then take two sticks."),
    ("東京 😀", " café"),
]
ROLLING = ["First do one thing,\nthen another thing.", LONG, "a"]
CONTEXTS = [KITE, "First do one thing", LONG, "a", "東京", "Café naïve 東京", "b", "To make a kite, take paper"]


def instances(kind, arguments):
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def ask(lm, contexts, **arguments):
    requests = [(context, {"max_gen_toks": 24} | arguments) for context in contexts]
    return lm.generate_until(instances("generate_until", requests), disable_tqdm=True)


@pytest.fixture(scope="module", params=["tiny_llama", "with_bos"])
def directory(request):
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def ours(directory):
    return DertaLM(pretrained=directory, dtype="float32", batch_size=4, mesh="fsdp=4,tensor=2")


@pytest.fixture(scope="module")
def theirs(directory):
    return HFLM(pretrained=directory, dtype="float32", batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def talking(chatting):
    return DertaLM(pretrained=str(chatting), dtype="float32", batch_size=4)


# The same figures as hf


def test_log_likelihoods_are_those_of_hf(ours, theirs):
    requests = instances("loglikelihood", LIKELIHOODS)
    expected, actual = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [total for total, _ in actual] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_says_is_greedy_for_both(ours, theirs):
    contexts = [context for context in CONTEXTS if context != LONG]
    said = [(context, text) for context, text in zip(contexts, ask(theirs, contexts, max_gen_toks=1), strict=True)]
    said = [pair for pair in said if pair[1].isascii() and pair[1]]
    assert said
    expected, actual = (lm.loglikelihood(instances("loglikelihood", said)) for lm in (theirs, ours))
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in actual)


def test_rolling_log_likelihoods_are_those_of_hf_beyond_the_models_length_too(ours, theirs):
    requests = instances("loglikelihood_rolling", [(text,) for text in ROLLING])
    expected, actual = theirs.loglikelihood_rolling(requests), ours.loglikelihood_rolling(requests)
    assert len(ours.tok_encode(LONG)) > 2 * ours.max_length
    assert actual == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("stops", [[], ["e"], ["kit", "\n", " a"]])
def test_generated_texts_are_those_of_hf(ours, theirs, stops):
    texts = ask(ours, CONTEXTS, until=stops)
    assert texts == ask(theirs, CONTEXTS, until=stops)
    assert not any(stop in text for text in texts for stop in stops)


def test_conversations_are_those_of_hf(talking, chatting):
    theirs = HFLM(pretrained=str(chatting), dtype="float32", device="cpu")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    begun = [*turns, {"role": "assistant", "content": "To make"}]
    for history, answers in ((turns, True), (begun, False)):
        text = talking.apply_chat_template(history, add_generation_prompt=answers)
        assert text == theirs.apply_chat_template(history, add_generation_prompt=answers)
        assert ask(talking, [text]) == ask(theirs, [text])
    assert talking.chat_template(True) == theirs.chat_template(True)


# What is ours alone


def test_a_request_that_is_too_long_is_cut_on_the_left_and_counted(ours, caplog):
    with caplog.at_level(logging.WARNING):
        ours.loglikelihood(instances("loglikelihood", [(LONG, " then"), (KITE, " then"), (LONG * 2, " then")]))
    (message,) = [record.getMessage() for record in caplog.records if "derta_jax" in record.name]
    assert message.startswith("2 of 3 requests were too long for max_length=256")


def test_a_sample_is_the_same_whatever_is_asked_beside_it(tiny_llama):
    def sampled(contexts, seed=1):
        lm = DertaLM(pretrained=str(tiny_llama), dtype="float32", batch_size=4, seed=seed)
        return ask(lm, contexts, do_sample=True, temperature=1.0)

    first, second, other = sampled([KITE, KITE, "a"])
    assert first != second
    assert sampled(["b", KITE, "c", KITE])[1::2] == [first, second]
    assert sampled([KITE], seed=2) != [first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.95}, "top_p=0.95 is not supported"),
        ({"num_beams": 4}, "num_beams=4 is not supported, only until, max_gen_toks, do_sample and temperature are"),
        ({"do_sample": True}, "do_sample=True needs a temperature"),
        ({"max_gen_toks": 256}, "max_gen_toks=256 must be at least 1, and less than max_length=256"),
    ],
)
def test_an_argument_that_would_be_ignored_is_an_error(ours, arguments, message):
    with pytest.raises(UserError, match=message):
        ask(ours, [KITE], **arguments)


@pytest.mark.parametrize("arguments", [{"top_p": 0.9, "do_sample": False}, {"num_beams": 1}, {"temperature": 0.0}])
def test_an_argument_that_changes_nothing_is_none(ours, arguments):
    assert ask(ours, [KITE], **arguments) == ask(ours, [KITE])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtyp": "float32"}, "unknown model argument 'dtyp'; did you mean 'dtype'"),
        ({"dtype": "float16"}, "dtype is 'float16': it must be float32 or bfloat16"),
        ({"batch_size": "auto"}, "batch_size is 'auto': it must be a number"),
        ({"mesh": "tensor=3"}, "tensor"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wrong_model_argument_is_named(tiny_llama, arguments, message):
    with pytest.raises(UserError, match=message):
        DertaLM.create_from_arg_obj({"pretrained": str(tiny_llama)} | arguments, {"batch_size": 1, "device": "cuda:0"})


def test_a_continuation_of_no_tokens_is_named(ours):
    with pytest.raises(UserError, match="there is nothing to score"):
        ours.loglikelihood(instances("loglikelihood", [(KITE, "")]))


def test_bos_is_added_to_every_text_but_those_that_bring_it_or_to_none(tiny_llama):
    with_bos, without = (DertaLM(str(tiny_llama), "float32", add_bos_token=choice) for choice in (True, False))
    assert with_bos.tok_encode("a") == [1, *without.tok_encode("a")]
    assert with_bos.tok_encode("<s>a") == without.tok_encode("<s>a") == [1, *without.tok_encode("a")]


# A benchmark from end to end

GSM8K = {
    "task": "gsm8k_five",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "num_fewshot": 1,
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer.split('#### ')[-1]}}",
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 16},
    "filter_list": [
        {
            "name": "flexible",
            "filter": [{"function": "regex", "regex_pattern": "(-?[0-9.,]+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def tasks(shared_data, tmp_path_factory):
    """A directory with GSM8K's first questions as a task of lm-eval, and two invented ones with choices."""
    place = tmp_path_factory.mktemp("tasks")
    lines = (shared_data / "gsm8k_500.jsonl").read_text(encoding="utf-8").splitlines()
    questions = write_jsonl(place / "questions.jsonl", [json.loads(line) for line in lines[:5]])
    sizes = write_jsonl(
        place / "sizes.jsonl",
        [{"question": "A kite is", "choices": ["light", "a very heavy thing"], "answer": i % 2} for i in range(4)],
    )
    gsm8k = GSM8K | {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
    choices = {
        "task": "kites",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(sizes)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    for task in (gsm8k, choices):
        (place / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return place


@pytest.mark.slow
def test_the_command_runs_tasks_without_torch(tasks, chatting, tmp_path):
    printed = run_without_torch(
        "derta_jax.evaluation.adapters.harness_command",
        f"run --model derta --model_args pretrained={chatting},dtype=float32,batch_size=8 --tasks gsm8k_five,kites "
        f"--include_path {tasks} --apply_chat_template --output_path out --log_samples",
        tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert "gsm8k_five" in printed
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["n-samples"]["gsm8k_five"]["effective"] == 5
    assert results["config"]["model_dtype"] == "float32"
    assert results["results"]["kites"]["acc,none"] == 0.5
    (samples,) = (tmp_path / "out").rglob("samples_gsm8k_five_*.jsonl")
    (first, *_) = [json.loads(line) for line in samples.read_text().splitlines()]
    prompt = first["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<s>user: Question:")
    assert prompt.endswith("Answer:</s><s>assistant: ")


@pytest.mark.slow
def test_the_command_tells_a_mistake_in_one_line(tasks, tiny_llama):
    arguments = (
        f"run --model derta --model_args pretrained={tiny_llama},dtyp=float32 --tasks kites --include_path {tasks}"
    )
    command = [sys.executable, "-m", "derta_jax.evaluation.adapters.harness_command", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "derta-lm-eval: unknown model argument 'dtyp'; did you mean 'dtype'?"
    )
