"""How other tools' options name a model, its mesh and its template."""

import shutil

import pytest

from derta_jax.config import RunConfig, dump_config
from derta_jax.evaluation.adapters.opening import conversation_template, open_model


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", ["data=2", "fsdp=2", "tensor=2"], {"data": 2, "tensor": 2}])
def test_a_mesh_may_be_a_text_or_what_a_command_line_makes_of_it(tiny_llama, mesh):
    subject = open_model(str(tiny_llama), 1, "float32", None, mesh)
    assert dict(subject.mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}


def test_a_model_that_derta_trained_is_asked_in_the_template_it_was_trained_with(chatting, tmp_path):
    directory = shutil.copytree(chatting, tmp_path / "exported")
    raw = {
        "model": {"path": "base"},
        "data": {"path": "rows", "template": "Q: {prompt} A:"},
        "train": {"output": "runs/first", "steps": 1},
    }
    (directory / "derta_config.yaml").write_text(dump_config(RunConfig.model_validate(raw)))
    patterns = {
        asked: conversation_template(open_model(str(directory), 1, "float32", asked, None), asked).pattern
        for asked in (None, "chat", "> {prompt}")
    }
    assert patterns == {None: "Q: {prompt} A:", "chat": "chat", "> {prompt}": "> {prompt}"}


def test_any_other_model_is_asked_in_its_chat_template(chatting):
    subject = open_model(str(chatting), 1, "float32", None, None)
    assert conversation_template(subject, None).pattern == "chat"
