"""Training in two processes of four devices each: the same losses, the same stop, and resumed on any other pod."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from derta_jax.config import RunConfig, dump_config
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.loop import train
from tests.training.conftest import losses_of, metrics_of
from tests.training.pod.start import end_pod, run_pod, start_pod, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def pod_config(run_config, tmp_path):
    """A config, and the file it is written to for the command line."""

    def make(name: str, **sections) -> tuple[RunConfig, Path]:
        config = run_config(name, **sections)
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_config(config))
        return config, file

    return make


COUNTS = ("tokens", "useful_tokens", "labelled_tokens", "attended_tokens")


def counts_of(config: RunConfig) -> list[tuple]:
    return [tuple(record[name] for name in COUNTS) for record in metrics_of(config)]


def test_two_processes_train_stop_and_resume_anywhere_with_the_losses_of_one(pod_config, run_config, console, tmp_path):
    steps = {"steps": 40}
    whole = run_config("whole", train=steps)
    train(whole, console)

    config, file = pod_config("pod", train=steps, checkpoint={"every_steps": 5})
    pod = start_pod(["train", str(file)], tmp_path / "first")
    wait_until(lambda: (Path(config.train.output) / "metrics.jsonl").is_file() and len(metrics_of(config)) >= 4)
    pod[1].send_signal(signal.SIGTERM)
    assert end_pod(pod) == [75, 75], (tmp_path / "first" / "0.log").read_text()
    stopped = metrics_of(config)[-1]["step"]
    assert stopped < 40
    with Checkpoints(Path(config.train.output) / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step == stopped
    np.testing.assert_allclose(losses_of(config), losses_of(whole)[:stopped], rtol=1e-6)
    assert counts_of(config) == counts_of(whole)[:stopped]

    alone = run_config("alone", train=steps)
    shutil.copytree(config.train.output, alone.train.output)
    assert train(alone, console)["resumed_from"] == stopped
    np.testing.assert_allclose(losses_of(alone), losses_of(whole), rtol=1e-6)

    shape = ["mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"]
    assert run_pod(["train", str(file), *shape], tmp_path / "second") == [0, 0]
    np.testing.assert_allclose(losses_of(config), losses_of(whole), rtol=1e-6)
    assert "resumed" in (tmp_path / "second" / "0.log").read_text()
