"""Runs made by hand, for the tests of report.py and of the modules that read a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from run.config import Config, save_yaml

EVIL = "</script><img src=x onerror=alert(1)> \x1b[2J \ud800 & <b>"


def sample(step: int, group: int, i: float, by_token: bool = True, **changes: Any) -> dict[str, Any]:
    """A line of samples.jsonl; `i` is 1 for a right answer."""
    record = {
        "step": step, "group_id": group, "problem": f"problem {group}", "prompt": "p", "response": f"answer {i}",
        "reward": float(i), "reward_parts": {"format": 1.0, "answer": float(i)}, "advantage": i - 0.5,
        "finish_reason": "stop", "response_tokens": 2,
    }  # fmt: skip
    if by_token:
        record |= {
            "tokens": ["answer", f" {i}"],
            "token_logprobs": [-0.1, -2.0],
            "token_ids": [1, 2],
            "prompt_ids": [3],
        }
    return record | changes


def write_run(folder: Path, metrics=None, samples=None, held_out=None, **config: Any) -> Path:
    """A run of two steps with 2 x 2 responses each and an evaluation before, in between and after."""
    folder.mkdir()
    save_yaml(Config(prompts_per_step=2, group_size=2, eval_problems=50, **config), folder / "config.yaml")
    metrics = metrics or [
        {"step": 0, "eval_solved": 0.2, "eval_greedy_solved": 0.3},
        {"step": 1, "reward": 0.1, "solved": 0.25, "rewards/format/mean": 0.9, "entropy": 1.0, "step_time": 61.0},
        {"step": 2, "reward": 0.5, "solved": 0.75, "entropy": None, "eval_solved": 0.6, "rewards/format/mean": 1.0,
         "step_time": 65.0},
    ]  # fmt: skip
    if samples is None:
        samples = [sample(s, g, i) for s in (1, 2) for g in (s * 10, s * 10 + 1) for i in (0, 1)]
    held_out = held_out or [sample(0, 7, 0), sample(1, 8, 0), sample(2, 7, 1)]
    for name, records in (("metrics", metrics), ("samples", samples), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "machine.json").write_text('{"machine": "two cores"}\n')
    return folder
