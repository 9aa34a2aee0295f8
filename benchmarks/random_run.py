"""Trained by the reliability scripts: a random two-layer model, and a task on which its answers differ.

checkpoint = write_checkpoint(folder)
train.task_from_config = lambda config: EvenLetters(seed=config.seed)
train.main(["--ckpt", str(checkpoint), "--run-dir", ..., *QUICK])
"""

from __future__ import annotations

from pathlib import Path

import common

from data_types import Problem, Reward
from model.qwen2_config import Qwen2Config
from qwen2_llm import Qwen2ForCausalLM
from tasks.task_base import Task

VOCABULARY = 320
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
QUICK = ["--prompt-style", "short", "--max-new-tokens", "8", "--group-size", "4", "--prompts-per-step", "2"]
QUICK += ["--eval-problems", "2", "--device", "cpu", "--lr", "1e-2"]


class EvenLetters(Task):
    """Pays for the share of letters with an even code: random answers differ, so that every step has a gradient."""

    def train_problem(self, index: int) -> Problem:
        return Problem(f"train {index}", [{"role": "user", "content": f"number {index}"}], None)

    def test_problem(self, index: int) -> Problem:
        return Problem(f"test {index}", [{"role": "user", "content": f"question {index}"}], None)

    def reward(self, problem: Problem, response: str) -> Reward:
        share = sum(ord(letter) % 2 == 0 for letter in response) / max(1, len(response))
        return Reward(share, {"answer": share})


def write_checkpoint(folder: Path) -> Path:
    """Two layers of random weights and a tokenizer of bytes."""
    sizes = Qwen2Config(VOCABULARY, 32, 48, 2, 4, 2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True)
    folder.mkdir(parents=True, exist_ok=True)
    common.write_tokenizer(folder, VOCABULARY)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    Qwen2ForCausalLM.from_config(sizes).save_pretrained(folder)
    return folder
