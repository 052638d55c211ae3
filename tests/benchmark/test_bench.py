"""`derta bench`: four ways to take the same steps, which must learn the same."""

import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from derta_jax.benchmark import sweep
from derta_jax.benchmark.config import load_bench
from derta_jax.benchmark.contest import Contender, aside, check_losses, make_contender, run_bench
from derta_jax.benchmark.generation import bench_generation, generation_table
from derta_jax.benchmark.report import draw, markdown_of, table_of
from derta_jax.benchmark.work import NO_LABEL, make_work
from derta_jax.cli import main
from derta_jax.errors import RunFailed, UserError
from derta_jax.models.params import count_parameters
from tests.conftest import helpful, triple, write_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
RAW: dict[str, Any] = {
    "synthetic": {
        "architecture": ARCHITECTURE,
        "rows": 64,
        "prompt_tokens": [2, 6],
        "helpful_tokens": [4, 60],
        "safety_tokens": [4, 20],
        "safety_share": 0.5,
    },
    "train": {
        "batch_size": 8,
        "sequence_length": 48,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "dtype": "float32",
        "remat": "none",
    },
    "compile_torch": False,
    "repeats": 2,
}


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture
def write(tmp_path):
    """A config file with these sections merged in."""

    def write(**sections):
        file = tmp_path / "bench.yaml"
        raw = dict(RAW)
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
        file.write_text(yaml.safe_dump(raw))
        return file

    return write


@pytest.mark.parametrize("attention", ["xla", "blocks"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "mistral", "sliding_window": 7}],
    ids=lambda changes: changes.get("model_type", "llama"),
)
def test_all_four_learn_the_same_from_the_same_rows(changes, attention, write, tmp_path, console):
    sections = {"synthetic": {"architecture": ARCHITECTURE | changes}, "train": {"attention": attention}}
    work = make_work(load_bench(write(**sections)), tmp_path, console)
    racing: dict[str, Contender] = {name: make_contender(name, work) for name in work.bench.contenders}
    losses = {name: [contender.step(step) for step in (0, 1, 0)] for name, contender in racing.items()}
    check_losses(losses, 1e-5)
    assert losses["packed"][2] < losses["packed"][0]


def test_useful_tokens_are_the_same_for_all_and_padding_is_not(write, tmp_path, console):
    work = make_work(load_bench(write()), tmp_path, console)
    examples = work.examples(0)
    lengths = [len(ids) for ids, _ in examples]
    amounts = work.amounts(0)
    assert amounts.useful == sum(lengths)
    assert amounts.labelled == sum((labels != NO_LABEL).sum() for _, labels in examples)
    padded = {name: make_contender(name, work).padded_tokens(0) for name in work.bench.contenders}
    assert padded["torch"] == sum(lengths)
    assert padded["original"] == len(lengths) * max(lengths)
    assert padded["padded"] == len(lengths) * 48
    assert work.batches("rows").sequences < work.batches("none").sequences == len(lengths)


def test_half_of_the_safety_rows_teach_the_refusal_at_every_token(write, tmp_path, console):
    work = make_work(load_bench(write()), tmp_path, console)
    refusing = [labels for _, labels in work.examples(0) if set(labels) == {NO_LABEL, work.refusal_id}]
    assert {row.stream for row in work.rows} == {"mle", "rto"}
    assert refusing


@pytest.mark.slow
def test_the_command_races_them_in_processes_and_writes_what_people_read(write, tmp_path, capsys):
    assert main(["bench", str(write()), "--output", str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(results["contenders"]) == {"original", "torch", "padded", "packed"}
    for each in results["contenders"].values():
        speed = each["useful_tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        assert each["loss"] == pytest.approx(results["contenders"]["original"]["loss"], rel=1e-4)
        assert each["peak_bytes"] > 2**26
    ratio = results["ratios"]["packed/original"]
    assert f"JAX, packed is {ratio:.2f} × PyTorch, authors' way" in (tmp_path / "out" / "bench.md").read_text()
    assert (tmp_path / "out" / "bench.svg").read_text().count("JAX, packed") == 1


def test_another_loss_is_said():
    with pytest.raises(RunFailed, match=r"packed learns otherwise than torch: loss 2\.0 for 1\.0 in step 1"):
        check_losses({"torch": [1.0, 1.0], "packed": [1.0, 2.0]}, 1e-4)
    with pytest.raises(RunFailed):
        check_losses({"torch": [1.0], "packed": [np.nan]}, 1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthetic.safety_shares=1", "did you mean 'synthetic.safety_share'"),
        ("synthetic.architecture.vocab_sizes=8", "did you mean 'synthetic.architecture.vocab_size'"),
        ("train.accumulation=2", "no paper mode, lora, accumulation"),
        ("objective.rto_weight=0.5", "rto_weight 1"),
        ("objective.name=dpo", "the authors' loss is that of `derta`"),
        ("contenders=[tensorflow]", "contenders"),
    ],
)
def test_what_cannot_be_compared_is_refused(override, message, write):
    with pytest.raises(UserError, match=message):
        load_bench(write(), [override])


def test_the_configs_that_come_with_the_project_are_valid():
    bench = load_bench(CONFIGS / "bench_cpu.yaml")
    assert bench.contenders == ("original", "torch", "padded", "packed")
    assert bench.synthetic is not None
    assert bench.synthetic.model.vocab_size == 32_000
    on_gpu = load_bench(CONFIGS / "bench_gpu.yaml", ["synthetic.architecture.num_hidden_layers=32"])
    assert on_gpu.synthetic is not None
    assert count_parameters(on_gpu.synthetic.model) == 8_030_261_248


@pytest.mark.parametrize("key", sweep.SWEEPS)
def test_what_a_sweep_changes_can_be_changed(key):
    for value in sweep.SWEEPS[key]:
        load_bench(CONFIGS / "bench_cpu.yaml", [f"{key}={value}"])


def test_a_config_without_a_model_says_so(write):
    with pytest.raises(UserError, match=r"model: missing"):
        load_bench(write(synthetic=None))


def test_without_pytorch_ours_can_be_raced_alone(write, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "torch" else there(name, *args)
    )
    with pytest.raises(UserError, match=r"no PyTorch here: pip install 'derta-jax\[torch\]'"):
        load_bench(write())
    assert load_bench(write(contenders=["padded", "packed"])).contenders == ("padded", "packed")


def test_pytorchs_best_is_not_written_for_mixtures(write, tmp_path, console):
    mixture = ARCHITECTURE | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    bench = load_bench(write(synthetic={"architecture": mixture}))
    with pytest.raises(UserError, match="written for llama and mistral, not for mixtral"):
        make_contender("torch", make_work(bench, tmp_path, console))


def test_what_is_made_ready_by_a_process_that_dies_is_said():
    with pytest.raises(RunFailed, match="is gone; had it enough memory"):
        aside(os._exit, 1)


def test_a_contender_that_fails_ends_the_race_with_its_reason(write):
    mixture = ARCHITECTURE | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    bench = load_bench(write(synthetic={"architecture": mixture}, contenders=["torch"]))
    with pytest.raises(RunFailed, match="torch: PyTorch's best is written for"):
        run_bench(bench, Console(quiet=True))


def test_a_table_has_a_row_for_each():
    each = {
        name: {"median": 2.0, "low": 1.0, "high": 3.0}
        for name in ("step_seconds", "useful_tokens_per_second", "padded_tokens_per_second", "mfu")
    }
    contenders = {name: each | {"peak_bytes": 10**9, "loss": [2.0, 1.0]} for name in ("torch", "packed")}
    machine = {"processor": "a chip", "cores": 2, "accelerator": None, "peak_flops": {"torch": 1e11}}
    results = {"contenders": contenders, "ratios": {"packed/torch": 1.0}, "machine": machine, "versions": {"jax": "1"}}
    assert table_of(results).row_count == 2
    narrow = Console(width=80, file=io.StringIO(), record=True)
    narrow.print(table_of(results))
    assert "JAX, packed 2 2.00 200% 1.0 GB 1.00000" in " ".join(narrow.export_text().split())
    assert "| JAX, packed | 2 | 1–3 | 2.00 | 2 | 200% | 1.0 GB | 1.00000 |" in markdown_of(results)
    assert "\na chip, 2 cores; a plain product, GFLOP/s: torch 100. jax 1." in markdown_of(results)
    beside = results | {"machine": machine | {"accelerator": "a card"}}
    assert "\na card; a chip, 2 cores;" in markdown_of(beside)


def test_bars_are_drawn_as_the_file_is_named(tmp_path):
    speed = {"useful_tokens_per_second": {"median": 2.0, "low": 1.0, "high": 3.0}}
    draw({"contenders": {"torch": speed, "packed": speed}}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[1:4] == b"PNG"


def test_the_stages_of_data_are_timed(tiny_llama, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [triple(i) for i in range(6)] + [helpful(i) for i in range(10)])
    words = [str(TINY), f"model.path={tiny_llama}", f"data.path={rows}", "train.sequence_length=64"]
    assert main(["bench", "data", *words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["stages"]) == ["read", "tokenise", "pack", "batches"]
    assert results["rows"] == 22
    assert 0.5 < results["fill"] <= 1
    for each in results["stages"].values():
        assert each["rows_per_second"] == pytest.approx(22 / each["seconds"])
        assert each["tokens_per_second"] == pytest.approx(results["tokens"] / each["seconds"])
    assert main(["bench", "data", *words]) == 0
    assert "sequences are" in capsys.readouterr().out


def test_answers_are_those_of_transformers(write, capsys):
    small = {"prompts": 6, "prompt_tokens": [2, 9], "new_tokens": 12, "batch_size": 4, "stop_share": 0.05}
    assert main(["bench", "generate", str(write(answering=small, repeats=1)), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["same_answers"] == 1
    assert results["contenders"]["transformers"]["tokens"] == results["contenders"]["derta_jax"]["tokens"] > 6
    assert results["ratios"]["derta_jax/transformers"] > 0
    assert generation_table(results).row_count == 2


def test_answers_want_a_directory_that_pytorch_reads(write, tmp_path, console):
    bench = load_bench(write())
    nowhere = bench.model_copy(update={"synthetic": None, "model": bench.model.model_copy(update={"path": "nowhere"})})
    with pytest.raises(UserError, match="nowhere must be a Hugging Face directory"):
        bench_generation(nowhere, console)


@pytest.mark.slow
def test_a_sweep_has_a_point_for_each_value(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SWEEPS", {"train.batch_size": (4, 8), "synthetic.safety_share": (0.5,)})
    words = [str(write(repeats=1)), "--json", "--output", str(tmp_path / "sweep")]
    assert main(["bench", "sweep", *words]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [point["value"] for point in results["sweeps"]["train.batch_size"]] == [4, 8]
    # the config's own batch and share are one race
    own = [results["sweeps"]["train.batch_size"][1], results["sweeps"]["synthetic.safety_share"][0]]
    assert own[0]["useful_tokens_per_second"] == own[1]["useful_tokens_per_second"]
    fills = [point["fill"] for points in results["sweeps"].values() for point in points]
    # each is a quotient of two speeds, right to a rounding
    assert all(0 < fill["padded"] <= fill["packed"] + 1e-9 <= 1 for fill in fills)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == results
    assert (tmp_path / "sweep" / "sweep.svg").is_file()
    assert sweep.sweep_table(results).row_count == 3
