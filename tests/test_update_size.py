"""benchmarks/update_size.py: the few shared numbers, the evolution strategies, runs and the report. Tiny."""

from __future__ import annotations

import json

import pytest
import torch
from test_benchmarks import load


@pytest.fixture(scope="module")
def script():
    return load("update_size")


def test_thirteen_numbers_get_the_gradient_of_autograd(script):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(6, 4, generator=generator).requires_grad_(),
        torch.randn(3, 5, generator=generator).requires_grad_(),
    ]
    optimizer = script.TiedUpdate(weights, numbers=13, rank=2, lr=0.1)
    start = [w.detach().clone() for w in weights]
    targets = [torch.randn(w.shape, generator=generator) for w in weights]

    def loss(matrices):
        return sum((w * t).sum() + w.square().sum() for w, t in zip(matrices, targets))

    v = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    moved = [
        w.double() + left @ torch.einsum("n,nij->ij", v, P) @ right
        for w, (left, P, right) in zip(start, optimizer.bases)
    ]
    (wanted,) = torch.autograd.grad(loss(moved), v)
    loss(weights).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.v.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optimizer.v, -0.1 * wanted.sign(), rtol=1e-3, atol=1e-3)  # Adam's first step
    for w, first, basis in zip(weights, start, optimizer.bases):
        torch.testing.assert_close(w.detach(), first + optimizer.update_of(basis).float())
        change = torch.linalg.svdvals((w - first).detach().double())
        assert (change > 1e-6).sum() <= 2


def test_evolution_moves_along_the_noise_by_standardized_fitness(script):
    p, q = torch.zeros(3), torch.ones(2, 2)
    search = script.Evolution([p, q], sigma=0.1, lr=0.5)
    seen = []
    fitness = search.step(lambda: seen.append((p.clone(), q.clone())) or float(p.sum()), seeds=[1, 2, 3])
    assert fitness == [float(a.sum()) for a, _ in seen]
    for (a, b), seed in zip(seen, [1, 2, 3]):
        noise = search.noise(seed)
        torch.testing.assert_close(a, 0.1 * noise[0])
        torch.testing.assert_close(b, 1 + 0.1 * noise[1])
    f = torch.tensor(fitness)
    z = (f - f.mean()) / f.std(correction=0)
    torch.testing.assert_close(p, sum(0.5 / 3 * z[i] * search.noise(i + 1)[0] for i in range(3)))


def test_equal_fitness_changes_nothing_and_an_error_leaves_the_weights(script):
    p = torch.tensor([0.1, 0.2, 0.7])
    before = p.clone()
    search = script.Evolution([p], sigma=0.3, lr=1.0)
    assert search.step(lambda: 0.1, seeds=[1, 2]) == [0.1, 0.1]
    assert torch.equal(p, before)
    with pytest.raises(ZeroDivisionError):
        search.step(lambda: 1 / 0, seeds=[1])
    assert torch.equal(p, before)


def test_evolution_climbs(script):
    p = torch.zeros(5)
    search = script.Evolution([p], sigma=0.1, lr=0.1)
    target = torch.linspace(-1, 1, 5)
    for step in range(100):
        search.step(lambda: -float((p - target).square().sum()), seeds=range(step * 16, step * 16 + 16))
    assert (p - target).square().sum() < 0.1


@pytest.mark.parametrize("way", ["tied", "evolution"])
def test_a_run_is_made_once_and_reported(script, way, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(script.compare, "RUNS", tmp_path / "compare")
    small = [way, "--seed", "3", "--steps", "1", "--eval-problems", "2", "--population", "2", "--flags"]
    small += ["--max-new-tokens", "8", "--prompts-per-step", "2", "--group-size", "2"]
    script.main(small)
    records = script.compare.read(tmp_path / "runs" / f"{way}-seed-3")
    assert [r["step"] for r in records] == [0, 1]
    assert "eval_solved" in records[0] and "eval_solved" in records[1]  # noqa: PT018
    assert records[0]["trained_numbers"] == (
        13 if way == "tied" else sum(p.numel() for p in script.GRPO().model.parameters())
    )
    capsys.readouterr()
    script.main(small)
    assert "is finished" in capsys.readouterr().out
    script.main(["report", "--seeds", "3", "--out", str(tmp_path / "out")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["way"] for r in last["results"]] == [way]
    assert "cpu" in last["hardware"]
    assert (tmp_path / "out" / "update-size.png").is_file()
    assert len((tmp_path / "out" / "update-size.jsonl").read_text().splitlines()) == 1


def test_a_lower_rank_trains_fewer_numbers(script):
    counts = [script.trained_numbers(flags) for flags in script.compare.SWEEPS["update-size"].values()]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert counts[1] == 32 * counts[3]
