"""docs/your-own.md: every command of the page trains for a step. (tests/test_docs.py runs its Python blocks.)"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-own.md"
COMMANDS = re.findall(r"^python train\.py (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
FEW = [
    "--prompts-per-step",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "16",
    "--eval-problems",
    "2",
    "--eval-every",
    "0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the page writes."""
    folder = tmp_path_factory.mktemp("your-own")
    text = PAGE.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        space: dict = {}
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(block, space)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_trains(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = shlex.split(command)
    if "--steps" in words:
        words[words.index("--steps") + 1] = "1"
    run_dir = folder / re.sub(r"\W+", "-", command)
    assert train.main([*words, *FEW, "--steps", "1", "--run-dir", str(run_dir)]) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 1
    assert "frac_reward_missing" not in lines[-1]
    if "--reward" in words:
        assert "rewards/custom/mean" in lines[-1]
    if "--data" in words:
        assert "data: training " in capsys.readouterr().out


def test_the_page_has_its_commands():
    assert len(COMMANDS) == 5
