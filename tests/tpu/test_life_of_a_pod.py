"""From asking for a pod to its deletion, with the real worker.sh on every worker of a cloud that stands in."""

import re
import signal
import subprocess
from typing import Any

import pytest

from tests.tpu.conftest import QUEUE, Cloud

pytestmark = pytest.mark.slow

RUN = ("run", "--with", "train.sh", "bash", "train.sh")


def nothing_is_left(cloud: Cloud) -> bool:
    cloud.wait_for(lambda: not cloud.processes())
    return not cloud.request


def test_create_setup_run_preempted_resumed_finished_deleted(cloud: Cloud) -> None:
    cloud.plays({"states": QUEUE, "preempt_when": "gs://my-bucket/runs/x/step"}, {"states": QUEUE})
    created = cloud.pod("create")
    assert created.returncode == 0, created.stderr
    assert "$19.20 an hour for 16 chips" in created.stdout
    assert "gcloud compute tpus queued-resources delete derta-8b" in created.stdout
    assert cloud.pod("create").stdout.startswith("derta-8b is there already; nothing is asked for twice")
    fitted = cloud.pod("setup")
    assert fitted.returncode == 0, fitted.stderr
    assert fitted.stdout.count("derta 0.1.0") == 2
    ran = cloud.pod(*RUN)
    assert ran.returncode == 0, ran.stderr + cloud.outputs()
    assert "derta-8b: preempted; going on (1 of 5)" in ran.stdout
    assert int(re.findall(r"begins at (\d)", ran.stdout)[-1]) > 0
    assert "step 5" in ran.stdout
    assert cloud.object("runs/x/step").read_text() == "5\n"
    assert "nothing of it is billed any more" in ran.stdout
    assert len(cloud.calls("queued-resources create")) == 2
    assert "derta-attempt=2" in cloud.calls("queued-resources create")[1]
    assert nothing_is_left(cloud)


def test_run_alone_does_all_of_it(cloud: Cloud) -> None:
    cloud.plays(ssh_failures=2)
    ran = cloud.pod(*RUN)
    assert ran.returncode == 0, ran.stderr + cloud.outputs()
    assert "taking along: train.sh" in ran.stdout
    assert re.search(r"job [\d-]+ is done", ran.stdout)
    assert nothing_is_left(cloud)


def test_every_worker_of_every_slice_runs_the_job_once(cloud: Cloud) -> None:
    cloud.settings(SLICE="2xv5e-16")
    ran = cloud.pod(*RUN)
    assert ran.returncode == 0, ran.stderr + cloud.outputs()
    logs = sorted(path.name for path in cloud.object("pods/derta-8b/jobs").glob("*/logs/1/s*"))
    assert logs == ["s0-w0.log", "s0-w1.log", "s1-w0.log", "s1-w1.log"]
    (created,) = cloud.calls("queued-resources create")
    assert "--node-count 2 --node-prefix derta-8b --accelerator-type v5litepod-16" in created
    assert nothing_is_left(cloud)


def test_a_failed_job_shows_the_end_of_its_log_and_deletes_the_pod(cloud: Cloud) -> None:
    ran = cloud.pod("run", "bash", "-c", "echo out of luck; exit 3")
    assert ran.returncode == 1
    assert "the job failed (exit codes 3)\n  out of luck\nall of it: gcloud storage cat" in ran.stderr
    assert nothing_is_left(cloud)


def test_a_failed_job_leaves_the_pod_where_it_should_stay(cloud: Cloud) -> None:
    failed = cloud.pod("run", "--keep", "bash", "-c", "exit 3")
    assert failed.returncode == 1, failed.stdout + failed.stderr + cloud.outputs()
    assert cloud.request
    again = cloud.pod("run", "--keep", *RUN[1:])
    assert again.returncode == 0, again.stderr
    assert cloud.request
    assert len(cloud.calls("queued-resources create")) == 1
    assert "SUSPENDED" not in cloud.pod("status").stdout
    assert cloud.pod("delete").returncode == 0
    assert nothing_is_left(cloud)


@pytest.mark.parametrize("command", [("setup",), RUN], ids=["setup", "run"])
def test_an_installation_that_fails_deletes_the_pod(cloud: Cloud, command: tuple[str, ...]) -> None:
    cloud.plays(installation_fails=True)
    assert cloud.pod("create").returncode == 0
    cloud.object("pods/derta-8b/current").unlink(missing_ok=True)
    if command == RUN:
        assert cloud.pod("delete").returncode == 0
    ran = cloud.pod(*command)
    assert ran.returncode == 1
    assert "a command failed on a worker" in ran.stderr
    assert nothing_is_left(cloud)


def test_a_request_that_fails_is_deleted_and_says_why(cloud: Cloud) -> None:
    cloud.plays({"states": ["CREATING", "FAILED"]}, why="no capacity before the deadline")
    ran = cloud.pod("create")
    assert ran.returncode == 1
    assert "the request for derta-8b is FAILED: no capacity before the deadline" in ran.stderr
    assert nothing_is_left(cloud)


@pytest.mark.parametrize("command", [("create",), RUN], ids=["create", "run"])
def test_a_request_that_is_refused_shows_what_gcloud_says(cloud: Cloud, command: tuple[str, ...]) -> None:
    cloud.plays(refuse_create="RESOURCE_EXHAUSTED: quota TPUV5sLitepodPerProjectPerZone exceeded")
    ran = cloud.pod(*command)
    assert ran.returncode == 1
    assert "quota TPUV5sLitepodPerProjectPerZone exceeded" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert nothing_is_left(cloud)


def test_a_job_that_was_told_to_stop_goes_on_where_it_is(cloud: Cloud) -> None:
    stopped_twice = "echo >> ~/starts; [ $(wc -l < ~/starts) -gt 2 ] || exit 75"
    ran = cloud.pod("run", "bash", "-c", stopped_twice)
    assert ran.returncode == 0, ran.stderr + cloud.outputs()
    assert "stopped, everything saved; going on (1 of 5)" in ran.stdout
    assert len(cloud.calls("queued-resources create")) == 1
    assert nothing_is_left(cloud)


def test_a_pod_that_someone_deletes_is_not_asked_for_again(cloud: Cloud) -> None:
    follower = cloud.start("run", "bash", "-c", "sleep 60")
    cloud.wait_for(lambda: list(cloud.object("pods/derta-8b/jobs").glob("*/ready/1/s0-w1")))
    assert cloud.pod("delete").returncode == 0
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 1
    assert "derta-8b is gone: " in err
    assert len(cloud.calls("queued-resources create")) == 1
    assert nothing_is_left(cloud)


def test_too_many_preemptions_end_it_with_everything_saved(cloud: Cloud) -> None:
    cloud.settings(MAX_TRIES="1")
    cloud.plays({"states": ["ACTIVE"], "preempt_when": "gs://my-bucket/runs/x/step"})
    ran = cloud.pod(*RUN)
    assert ran.returncode == 75, ran.stderr
    assert "preempted 2 times (MAX_TRIES=1); run the same again to go on" in ran.stderr
    assert nothing_is_left(cloud)


def test_a_slice_that_is_lost_counts_as_preempted_though_the_request_is_active(cloud: Cloud) -> None:
    cloud.settings(MAX_TRIES="0")
    cloud.plays({"states": ["ACTIVE", "ACTIVE", "ACTIVE"], "node_state": "PREEMPTED"})
    ran = cloud.pod("create")
    assert ran.returncode == 1
    assert "PREEMPTED" in ran.stderr
    assert nothing_is_left(cloud)


def test_a_cloud_that_does_not_answer_is_asked_again_and_the_job_goes_on(cloud: Cloud) -> None:
    away = {"describe_fails": ["ServiceException: 503 UNAVAILABLE", 4]}
    cloud.plays({"states": QUEUE}, **away)
    ran = cloud.pod(*RUN)
    assert ran.returncode == 0, ran.stderr + cloud.outputs()
    assert "the cloud does not answer, asking again" in ran.stdout
    assert nothing_is_left(cloud)


def test_a_cloud_that_never_answers_leaves_the_pod_and_says_so(cloud: Cloud) -> None:
    follower = cloud.start("run", "bash", "-c", "sleep 60")
    cloud.wait_for(lambda: list(cloud.object("pods/derta-8b/jobs").glob("*/ready/1/s0-w1")))
    cloud.plays(describe_fails=["Temporary failure in name resolution", 10_000])
    out, err = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert "derta-8b is left as it is" in err
    assert cloud.request
    cloud.plays()
    assert cloud.pod("delete").returncode == 0
    assert nothing_is_left(cloud)


def test_an_account_without_rights_is_told_at_once(cloud: Cloud) -> None:
    cloud.plays(describe_fails=["PERMISSION_DENIED: Cloud TPU API has not been used in project my-project", 1])
    ran = cloud.pod("create")
    assert ran.returncode == 1
    assert "PERMISSION_DENIED" in ran.stderr
    assert not cloud.calls("create")


def test_a_pod_lives_only_so_long(cloud: Cloud) -> None:
    cloud.settings(MAX_HOURS=str(4 / 3600))
    ran = cloud.pod("run", "bash", "-c", "sleep 60")
    assert ran.returncode == 1
    assert "has lived its" in ran.stderr
    assert cloud.calls("queued-resources delete", on_worker=True)
    assert nothing_is_left(cloud)


def test_detached_the_pod_deletes_itself(cloud: Cloud) -> None:
    left = cloud.pod("run", "--detach", *RUN[1:])
    assert left.returncode == 0, left.stderr
    assert "follow it with: tpu/pod run" in left.stdout
    cloud.wait_for(lambda: not cloud.request)
    assert cloud.object("runs/x/step").read_text() == "5\n"
    assert not cloud.calls("queued-resources delete")
    assert nothing_is_left(cloud)


def test_who_lost_their_terminal_goes_on_with_run(cloud: Cloud) -> None:
    cloud.plays({"states": QUEUE, "preempt_when": "gs://my-bucket/runs/x/step"}, {"states": QUEUE})
    first = cloud.start(*RUN)
    cloud.wait_for(lambda: cloud.object("runs/x/step").exists())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert "SUSPENDED" in cloud.pod("status").stdout
    again = cloud.pod("run")
    assert again.returncode == 0, again.stderr + cloud.outputs()
    assert "step 5" in again.stdout
    assert [line for line in cloud.calls("queued-resources create") if "derta-attempt=2" in line]
    assert nothing_is_left(cloud)


def test_one_job_at_a_time(cloud: Cloud) -> None:
    first = cloud.start("run", "bash", "-c", "sleep 60")
    cloud.wait_for(lambda: list(cloud.object("pods/derta-8b/jobs").glob("*/ready/1/s0-w1")))
    second = cloud.pod(*RUN)
    assert second.returncode == 2
    assert "another job is running: bash -c 'sleep 60'" in second.stderr
    state = cloud.pod("status").stdout
    assert "derta-8b: ACTIVE, attempt 1, $19.20 an hour" in state
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert cloud.request


def test_status_joins_state_logs_and_checkpoints(cloud: Cloud) -> None:
    assert "there is none; nothing is billed" in cloud.pod("status").stdout
    derta = ("derta", "train", "train.output=gs://my-bucket/runs/x")
    assert cloud.pod("run", "--keep", *derta).returncode == 0
    checkpoint = cloud.object("runs/x/checkpoints/12/manifest.json")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    state = cloud.pod("status").stdout
    assert "job " in state
    assert "derta train train.output=gs://my-bucket/runs/x" in state
    assert "s0-w0: derta 0.1.0" in state
    assert "s0-w1: derta 0.1.0" in state
    assert "ended: 2 workers, exit codes 0" in state
    assert "newest checkpoint: step 12 in gs://my-bucket/runs/x" in state
    assert cloud.pod("logs", "--worker", "s0-w1").stdout.strip() == "derta 0.1.0"
    assert cloud.pod("ssh", "--worker", "1", "--", "echo", "here").returncode == 0
    assert cloud.pod("delete").returncode == 0
    assert "is not there" in cloud.pod("delete").stdout


STAGES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "asking": (("create",), {"hang": ["create"]}, "hanging"),
    "waiting": (("create",), {"requests": [{"states": ["WAITING_FOR_RESOURCES"]}]}, "request.json"),
    "installing": (RUN, {"hang": ["ssh"]}, "hanging"),
    "following": (("run", "bash", "-c", "sleep 60"), {}, "vms/derta-8b-w0/root/job.log"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_cleanup_command_that_works(cloud: Cloud, stage: str, stop: signal.Signals) -> None:
    words, scenario, sign = STAGES[stage]
    requests = scenario.get("requests", [{"states": ["ACTIVE"]}])
    cloud.plays(*requests, **{key: value for key, value in scenario.items() if key != "requests"})
    process = cloud.start(*words)
    cloud.wait_for(lambda: (cloud.folder / sign).exists())
    process.send_signal(stop)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    (line,) = re.findall(r"^Delete it:\s+(gcloud .*)$", err, re.MULTILINE)
    cloud.plays(*requests)
    subprocess.run(line, shell=True, env=cloud.environment, capture_output=True)
    assert nothing_is_left(cloud)
