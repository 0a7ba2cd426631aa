"""A judge on a real server, behind `make soak`: a model of 135M parameters judges badly, and nothing is guessed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from made_run import answered
from memreason.core.labelling import load_label_recipe
from memreason.data.atlas import make_atlas
from memreason.encode.base import pull
from memreason.measure.attribute import attribute, readable
from memreason.measure.judge import FAULTS, attribute_by_judge
from memreason.measure.ways import compare_ways
from real_servers import transformers_serve

pytestmark = pytest.mark.soak
COUNT = 20


def test_a_real_judge_names_or_leaves_unjudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    exact = [attribute(answered(trace, draw)) for trace in make_atlas("train", 400)]
    wrong = [one for one in exact if one.wrong and readable(one.trace, one.score)][:COUNT]
    assert len(wrong) == COUNT
    model = str(pull("smollm2-135m"))
    with transformers_serve(model) as url:
        endpoint = {"base_url": url, "in_flight": 2}
        teacher = {"model": model, "endpoints": [endpoint], "max_tokens": 64, "timeout": 900}
        recipe = load_label_recipe(None, {"attempts": 1, "teacher": teacher})
        judged, told = attribute_by_judge([one.trace for one in wrong], recipe, tmp_path / "judge.sqlite")
    (pair,) = compare_ways({"exact": wrong, "judge": judged})
    print({**told, "agreement": pair["agreement"], "confusion": pair["confusion"]})
    unjudged = [one for one in judged if one.verdict == "unjudged"]
    assert told["asked"] == told["replies"] == COUNT and told["unjudged"] == len(unjudged)
    assert sum(told["failures"].values()) == len(unjudged)  # one try each: a reply fits, or its reason is counted
    assert all(one.evidence["failed"][0]["reasons"] for one in unjudged)
    assert all(one.verdict in FAULTS and one.evidence["why"] for one in judged if one.verdict != "unjudged")
    assert pair["agreement"]["n"] == COUNT - len(unjudged)
