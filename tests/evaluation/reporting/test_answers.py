"""Every answer inside a page: nothing is lost, nothing ends the script tag, nothing is stored twice."""

import json

from derta_jax.evaluation.reporting.answers import pack, unpack


def row(**changes):
    plain = {"id": "q1", "group": "attacks", "name": "code", "prompt": "how?", "prefill": None, "response": "so"}
    return {**plain, "verdict": "safe", "refused_at": None, **changes}


def test_answers_come_back_as_they_were():
    answers = {
        "a": [row(), row(id="q2", verdict=None, response=""), row(verdict="refused", refused_at=7)],
        "ب": [row(response="שלום 🦙 \u2028 \0 \\ \"quoted\" 'too'\r\n", prefill="Sure:")],
    }
    assert list(unpack(pack(answers))) == [(model, row) for model, rows in answers.items() for row in rows]


def test_no_text_can_end_the_script_tag():
    hostile = "</script><script>alert(1)</script><!--<script>"
    packed = pack({hostile: [row(response=hostile, id=hostile, verdict=hostile)]})
    assert "<" not in packed
    ((model, back),) = unpack(packed)
    assert model == back["response"] == back["id"] == back["verdict"] == hostile


def test_a_text_is_stored_once():
    prompt = "a long prompt " * 100
    packed = pack({model: [row(prompt=prompt, name=name) for name in ("x", "y")] for model in ("a", "b")})
    assert packed.count(prompt) == 1


def test_other_fields_stay_outside():
    packed = json.loads(pack({"a": [row(response_token_ids=[1, 2], helpful=True)]}))
    assert len(packed["rows"][0]) == 9
    assert "response_token_ids" not in packed["strings"]


def test_ids_that_are_numbers_become_text():
    ((_, back),) = unpack(pack({"a": [row(id=7)]}))
    assert back["id"] == "7"
