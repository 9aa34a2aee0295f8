"""The README's small API, as it is written there."""

from __future__ import annotations

import json

import torch

from grpo import GRPO
from tasks.dataset_tasks import MathDataset


def test_the_snippet_works_as_written(tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is {a} + 7?", "answer": str(a + 7), "num_terms": 2, "num_digits": 1} for a in (1, 2)]
    (tmp_path / "math_tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    started = [p.clone() for p in GRPO().model.parameters()]
    seen = []

    trainer = GRPO()
    trainer.config.max_new_tokens = 24  # not in the snippet: only the test's time
    dataset = MathDataset("math_tasks.jsonl")
    for question, answer in dataset:
        loss = trainer.train_step(question, answer)
        print(trainer.step_count, loss)
        seen.append((question, answer, loss))

    assert [(q, a) for q, a, _ in seen] == [("What is 1 + 7?", "8"), ("What is 2 + 7?", "9")]
    assert all(isinstance(loss, float) for *_, loss in seen)
    assert capsys.readouterr().out == "".join(f"{i} {loss}\n" for i, (*_, loss) in enumerate(seen, start=1))
    assert any(not torch.equal(a, b) for a, b in zip(started, trainer.model.parameters(), strict=True))
    assert type(trainer.task).__name__ == "CountdownTask"  # the question was a visitor


def test_the_answer_that_is_given_is_the_one_that_is_rewarded(monkeypatch):
    trainer = GRPO()
    trainer.config.max_new_tokens, judged = 16, []
    monkeypatch.setattr("grpo.rollout", lambda *args, **kw: judged.append((args[2], args[3])) or [])
    monkeypatch.setattr(trainer, "update", lambda episodes: {"loss": 0.5})
    monkeypatch.setattr("grpo.reward_metrics", lambda *args: {})
    assert trainer.train_step("What is 12 + 7 * 3?", 33) == 0.5
    task, batch = judged[0]
    assert "What is 12 + 7 * 3?" in batch.prompts[0]
    assert task.reward(batch.problems[0], "1</think>\n<answer>33</answer>").parts["answer"] == 1
    assert task.reward(batch.problems[0], "1</think>\n<answer>34</answer>").parts["answer"] == 0
