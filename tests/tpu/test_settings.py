"""The env file: what it means in `gcloud`'s words, and every mistake by file, line and key."""

from pathlib import Path

import pytest

from derta_jax.errors import UserError
from tests.tpu.conftest import ENV, ROOT
from tpu.settings import Pod, read_env


def env(tmp_path: Path, text: str) -> Pod:
    path = tmp_path / "env"
    path.write_text(text)
    return read_env(path)


def test_the_example_is_one() -> None:
    pod = read_env(ROOT / "tpu/env.example")
    assert (pod.name, pod.slice.chips, pod.max_hours, pod.max_tries) == ("derta-8b", 16, 24.0, 5)


@pytest.mark.parametrize(
    ("name", "accelerator", "runtime", "nodes", "dollars"),
    [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite", ["derta-8b"], 19.2),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite", ["derta-8b"], 19.2),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5", ["derta-8b"], 268.8),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e", ["derta-8b"], 21.6),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base", ["derta-8b"], 51.52),
        ("2xv5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite", ["derta-8b-0", "derta-8b-1"], 153.6),
    ],
)
def test_a_slice_in_the_words_of_gcloud(
    tmp_path: Path, name: str, accelerator: str, runtime: str, nodes: list[str], dollars: float
) -> None:
    pod = env(tmp_path, ENV.replace("v5e-16", name))
    assert (pod.accelerator_type, pod.runtime_version, pod.nodes) == (accelerator, runtime, nodes)
    assert pod.dollars_per_hour == pytest.approx(dollars)


def test_a_price_of_ones_own(tmp_path: Path) -> None:
    assert env(tmp_path, f"{ENV}DOLLARS=0.5\n").price == "$8.00 an hour for 16 chips (your price)"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("SLICE=v5e-16", "SLICE=v5e-17", "env:4: SLICE: no slice 'v5e-17'; did you mean 'v5e-16'?"),
        ("TIER=spot", "TIER=spto", "env:5: TIER: 'spto' is none of spot, on-demand, reserved; did you mean 'spot'?"),
        ("TIER=spot", "TEIR=spot", "env:5: 'TEIR=spot' is not KEY=VALUE with a known key; did you mean 'TIER'?"),
        ("TIER=spot", "spot", "env:5: 'spot' is not KEY=VALUE"),
        ("TIER=spot", "NAME=again", "env:5: NAME is there twice"),
        ("TIER=spot\n", "", "env: TIER must be given"),
        ("NAME=derta-8b", "NAME=Derta_8B", "env:1: NAME: 'Derta_8B' is not up to 48 small letters"),
        ("ZONE=us-west4-a", "ZONE=us-west4", "env:3: ZONE: 'us-west4' is not a zone, as us-west4-a"),
        ("BUCKET=gs://my-bucket", "BUCKET=my-bucket", "env:6: BUCKET: 'my-bucket' is not a bucket, as gs://my-bucket"),
        ("TIER=spot", "TIER=spot\nMAX_HOURS=0", "env:6: MAX_HOURS: 0 is not above 0"),
        ("TIER=spot", "TIER=spot\nMAX_HOURS=soon", "env:6: MAX_HOURS: could not convert"),
        ("TIER=spot", "TIER=spot\nMAX_TRIES=-1", "env:6: MAX_TRIES: '-1' is not a number of tries"),
        ("TIER=spot", "TIER=spot\nINTERNAL_IPS=true", "env:6: INTERNAL_IPS: 'true' is neither yes nor no"),
        ("TIER=spot", "TIER=spot\nNETWORK=$(rm -r .)", "env:6: NETWORK: '$(rm -r .)' has characters"),
    ],
)
def test_mistakes(tmp_path: Path, before: str, after: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        env(tmp_path, ENV.replace(before, after))
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not there: copy tpu/env\.example to it"):
        read_env(tmp_path / "env")
