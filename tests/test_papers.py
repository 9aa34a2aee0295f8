"""docs/papers.md: every command of the table can be given, and the names that people ask for are in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from run.config import parse_args

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] != "name"]
COMMANDS = {row[0]: row[1].strip("`") for row in ROWS if row[1].startswith("`--")}
NAMES = (
    "GSPO", "CISPO", "SAPO", "DPPO", "VESPO", "LUSPO", "GMPO", "Clip-Cov", "OPO", "OTB", "ScaleRL", "2-GRPO", "JustRL",
    "TIS", "MIS", "Dr. GRPO", "DAPO", "REINFORCE++", "RLOO", "MaxRL", "GDPO", "pass@k", "DeepSeek-V3.2", "TinyLoRA",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_in_the_table(name):
    assert any(name in row[0] for row in ROWS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_flags_of_a_paper_can_be_given(name):
    config = parse_args(shlex.split(COMMANDS[name]))
    for flag in re.findall(r"--([\w-]+)", COMMANDS[name]):
        assert hasattr(config, flag.replace("-", "_"))


def test_every_row_says_how_or_why_not():
    assert len(COMMANDS) > 20
    for row in ROWS:
        assert row[1].startswith(("`--", "`benchmarks/", "not offered")), row
        assert row[1].startswith("`--") or len(row[2]) > 20, row
    for script in re.findall(r"`((?:benchmarks|recipes)/[\w.-]+)", PAGE):
        assert (ROOT / script).is_file(), script
