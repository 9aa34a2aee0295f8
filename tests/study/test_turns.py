"""A response that calls a tool, as a run writes it and as a page shows it."""

import json

import pytest
from report_fixtures import sample

from data_types import Episode, Turn
from run.config import Config
from run.run_log import RunLog
from study.turns import pieces, sampled_mask, turns_of

IDS = [ord(letter) for letter in "2*3?6!"]
SAMPLED = [True, True, True, True, False, True]
TURNS = [Turn("2*3?", False), Turn("6", True), Turn("!", False)]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def written(folder, **changes) -> dict:
    with RunLog(folder, Config(), total_steps=1) as log:
        log.log_samples(1, [Episode(0, [65], IDS, [-0.5] * 6, decode(IDS), "stop", 1.0, **changes)], decode)
    return json.loads((folder / "samples.jsonl").read_text())


def test_a_sample_has_its_turns_and_its_mask(tmp_path):
    record = written(tmp_path, sampled=SAMPLED, turns=TURNS)
    assert record["response"] == "2*3?6!"
    assert record["response_tokens"] == 5
    assert turns_of(record) == TURNS
    assert sampled_mask(record) == SAMPLED


def test_a_sample_without_a_tool_is_as_it_was(tmp_path):
    record = written(tmp_path)
    assert not {"turns", "token_sampled"} & record.keys()
    assert turns_of(record) == [("2*3?6!", False)]
    assert sampled_mask(record) is None


def test_pieces_tell_false_sums_from_text_of_the_tool():
    texts = [("3 + 5 = 9 <b>", False), ("2 + 2 = 5", True), ("!", False)]
    turns = [{"text": text, "given": given} for text, given in texts]
    record = sample(1, 0, 1, response="3 + 5 = 9 <b>2 + 2 = 5!", turns=turns)
    assert pieces(record) == [
        ("3 + 5 = 9", True, False), (" <b>", False, False), ("2 + 2 = 5", False, True), ("!", False, False)
    ]  # fmt: skip


def test_a_response_without_a_tool_is_sampled_in_all_its_pieces():
    record = sample(1, 0, 1, response="so 3 + 5 = 9")
    assert pieces(record) == [("so ", False, False), ("3 + 5 = 9", True, False)]


def test_turns_that_do_not_spell_the_response_are_left_out():
    record = sample(1, 0, 1, response="4", turns=[{"given": True, "text": "5"}])
    assert pieces(record) == [("4", False, False)]


@pytest.mark.parametrize("turns", [None, [], "x", [1], [{"text": "x"}], [{"text": 3, "given": True}]])
def test_turns_that_do_not_fit_are_left_out(turns):
    record = sample(1, 0, 1, turns=turns)
    assert turns_of(record) == [(record["response"], False)]


@pytest.mark.parametrize("mask", [None, "xx", [True], [True, 0], [True, False, True]])
def test_a_mask_that_does_not_fit_is_left_out(mask):
    assert sampled_mask(sample(1, 0, 1, token_sampled=mask)) is None
