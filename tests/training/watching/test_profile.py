import io

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console

from derta_jax.training.watching.profile import FOLDER, Profile
from tests.training.bucket import bucket

__all__ = ["bucket"]


def run_steps(output, first, count, steps=8):
    """A loop that has one step in flight; returns what the user reads."""
    console = Console(record=True, file=io.StringIO(), width=200)
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.ones((64, 64))
    with Profile(output, first, count, console) as profile:
        for number in range(1, steps + 1):
            before = x
            with profile.step(number):
                x = step(x)
            before.block_until_ready()
    return console.export_text()


def traces(output):
    return list((epath.Path(output) / FOLDER).glob("plugins/profile/*/*.xplane.pb"))


def test_a_trace_of_the_steps_asked_for_appears(tmp_path):
    text = run_steps(tmp_path, first=3, count=2)
    (trace,) = traces(tmp_path)
    content = trace.read_bytes()
    assert content.count(b"step_num") >= 1
    planes = jax.profiler.ProfileData.from_serialized_xspace(content).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    assert sorted(dict(event.stats)["step_num"] for event in events)[:2] == [3, 4]
    assert "steps 3 to 4" in text
    assert f"xprof --logdir {tmp_path / FOLDER}" in text


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    run_steps(tmp_path, first=7, count=5)
    assert len(traces(tmp_path)) == 1


def test_without_steps_to_trace_nothing_is_written(tmp_path):
    assert run_steps(tmp_path, first=3, count=0) == ""
    assert not list(tmp_path.iterdir())


def test_a_trace_reaches_the_bucket(bucket):
    run_steps(bucket, first=2, count=1)
    assert any(epath.Path(bucket).glob("profile/plugins/profile/*/*"))
