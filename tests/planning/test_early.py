"""What is read of a compilation that is still going on; real ones are in `test_plan.py`."""

import threading
from pathlib import Path

import pytest

from derta_jax.planning.early import memory_seen

REPORT = """Memory Space: default (color=0)
Total bytes: 12668420608 (11.80GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list

Memory Space: vmem (color=1)
Total bytes: 67108864 (64.00MiB)
"""


def test_it_is_told_while_the_compilation_goes_on():
    told = threading.Event()
    with memory_seen(lambda size: told.set()) as options:
        (Path(str(options["xla_dump_to"])) / "a-memory-usage-report.txt").write_text(REPORT)
        assert told.wait(10)


def test_the_total_of_hbm_is_told_once():
    told: list[float] = []
    with memory_seen(told.append) as options:
        directory = Path(str(options["xla_dump_to"]))
        for number in (1, 2):
            (directory / f"module_000{number}.after_optimizations-memory-usage-report.txt").write_text(REPORT)
    assert told == [12_668_420_608]
    assert not directory.exists()


@pytest.mark.parametrize("text", ["", "Memory Space: vmem (color=1)\nTotal bytes: 64\n", "Total bytes: many"])
def test_a_report_of_something_else_is_none(text):
    told: list[float] = []
    with memory_seen(told.append) as options:
        (Path(str(options["xla_dump_to"])) / "a-memory-usage-report.txt").write_text(text)
    assert told == []


def test_a_compilation_that_fails_leaves_nothing_behind():
    with pytest.raises(ValueError, match="no"), memory_seen(print) as options:
        raise ValueError("no")
    assert not Path(str(options["xla_dump_to"])).exists()
