"""False sums are marked where they stand, and nowhere else."""

from __future__ import annotations

import pytest

from study.responses import false_spans, marked, marked_tokens
from tasks.expressions import false_sums


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        ("3 + 5 = 9, 9 * 2 = 18", ["3 + 5 = 9"]),
        ("25+10=35,35-19=17,17+3=20 no\n25-10=16 ok\n</think> 1+1=3", ["35-19=17", "25-10=16"]),
        ("a 2*6=4*3 b 2*6=4*4", ["2*6=4*4"]),
        ("So (44 - 19) * 2 = 51. Then", ["(44 - 19) * 2 = 51"]),
        ("2 + 3 = 5 = 6", []),
        ("no sum at all = 3", []),
        ("", []),
        ("\U0001f642 3 + 5 = 9", ["3 + 5 = 9"]),
    ],
)
def test_false_sums_are_found_with_both_sides(response, wrong):
    assert [response[start:end] for start, end in false_spans(response)] == wrong
    pieces = marked(response)
    assert "".join(text for text, _ in pieces) == response
    assert [text for text, is_wrong in pieces if is_wrong] == wrong
    assert bool(wrong) == bool(false_sums(response.partition("</think>")[0])[0])


def test_the_tokens_of_a_false_sum_are_marked():
    tokens = ["3", " +", " 5", " =", " 9", ",", " ok", "<end>"]
    assert marked_tokens(tokens, "3 + 5 = 9, ok") == [0, 1, 2, 3, 4]
    assert marked_tokens(tokens, "3 + 5 = 8, ok") == []  # the tokens do not spell this response
    assert marked_tokens([], "3 + 5 = 9") == []
