"""The kept sampling mask: the sampler and the trainer use the distribution over the same ids."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import make_model

from data_types import MiniBatch
from grpo import GRPO, compute_advantages, rollout, update_policy
from model.head_logprobs import token_logprobs
from rollout.generation import generate
from rollout.sampling import SamplingParams, sample_kept
from run.config import Config, parse_args
from update.scoring import score_episodes

PROMPTS = [[5, 6, 7], [9, 8]]


def restricted(logits, kept) -> torch.Tensor:
    """The slow way: log_softmax over complete logits [M, V], with every id that is not kept at -inf."""
    mask = torch.full_like(logits, -math.inf)
    for row, ids in enumerate(kept):
        mask[row, [i for i in ids if i >= 0]] = 0.0
    return (logits + mask).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 7, 20, None])
def test_log_probability_entropy_and_gradients_are_those_over_the_kept_ids(chunk, temperature):
    """CHECKLIST 66: slices of the vocabulary without a kept id, rows of different numbers of ids, one id alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    kept = [[0, 19, 3], [4, -1, -1], [18, 17, 16], [1, 2, -1], [12, 0, 5]]
    targets = torch.tensor([19, 4, 16, 1, 0])
    found = token_logprobs(hidden, weight, targets, temperature, chunk=chunk, kept_MK=torch.tensor(kept))
    logp = restricted(hidden @ weight.T / temperature, kept)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    wanted = logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], entropy, atol=1e-5, rtol=1e-5)
    coefficients = torch.randn(2, 5, generator=generator)
    logp = restricted(hidden @ weight.T / temperature, kept).clamp(min=-1e4)  # 0 * inf has no gradient
    chosen, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    slow = (coefficients[0] * chosen + coefficients[1] * entropy).sum()
    expected = torch.autograd.grad(slow, [hidden, weight])
    loss = (coefficients[0] * found[0]).sum() + (coefficients[1] * found[1]).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, [hidden, weight]), expected):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_every_id_kept_is_the_whole_distribution():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 8, generator=generator), torch.randn(20, 8, generator=generator)
    targets, everything = torch.tensor([1, 5, 19, 0]), torch.arange(20).expand(4, 20)
    for kept, whole in zip(
        token_logprobs(hidden, weight, targets, kept_MK=everything), token_logprobs(hidden, weight, targets)
    ):
        torch.testing.assert_close(kept, whole)


def test_what_is_kept_is_what_the_filters_left():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0]]).repeat(4, 1)
    params = SamplingParams(top_k=3, top_p=0.95, keep_mask=True)
    ids, logprobs, kept = sample_kept(logits, torch.linspace(0, 0.999, 12), params, None)
    assert sorted(kept[0].tolist()) == [1, 2, 3]
    assert sorted(kept[1].tolist())[0] >= 0  # four equal logits, of which three are kept
    assert kept[2].tolist() == [0, -1, -1]
    assert logprobs[2] == 0
    for row in range(12):
        assert ids[row] in kept[row]
        wanted = restricted(logits[row : row + 1], [kept[row].tolist()])[0, ids[row]]
        assert logprobs[row] == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_k": 6, "top_p": 0.8}, {"top_k": 500, "min_p": 0.2}])
def test_the_trainer_scores_what_the_sampler_drew_from(tiny_model, tokenizer, settings):
    """CHECKLIST 66: the ratio of a first update is 1, which it is not over the whole vocabulary."""
    params = SamplingParams(n=3, max_new_tokens=12, temperature=0.9, keep_mask=True, **settings)
    trainer = GRPO(Config(prompt_style="short", device="cpu"), model=tiny_model, tokenizer=tokenizer)
    batch = MiniBatch.from_problems(trainer.task.problems("train", 2), tokenizer)
    episodes = rollout(tiny_model, tokenizer, trainer.task, batch, params)
    assert all(len(e.kept) == len(e.response_ids) for e in episodes)
    assert all(token in kept for e in episodes for token, kept in zip(e.response_ids, e.kept))
    for scores, e in zip(score_episodes(tiny_model, episodes, micro_batch_tokens=30), episodes):
        torch.testing.assert_close(scores.logp, torch.tensor(e.logprobs), atol=1e-4, rtol=0)
    whole = [dataclasses.replace(e, kept=None) for e in episodes]
    gap = max(
        (scores.logp - torch.tensor(e.logprobs)).abs().max()
        for scores, e in zip(score_episodes(tiny_model, whole), whole)
    )
    assert gap > 0.1
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    metrics = update_policy(tiny_model, optimizer, [dataclasses.replace(e, advantage=1.0) for e in episodes])
    assert metrics["ratio/max"] == pytest.approx(1, abs=1e-4)
    assert metrics["grad_norm"] > 0


def test_episodes_with_and_without_a_mask_do_not_mix(tiny_model, tokenizer):
    params = SamplingParams(n=2, max_new_tokens=4, top_k=4, keep_mask=True)
    trainer = GRPO(Config(prompt_style="short", device="cpu"), model=tiny_model, tokenizer=tokenizer)
    batch = MiniBatch.from_problems(trainer.task.problems("train", 1), tokenizer)
    one, two = compute_advantages(rollout(tiny_model, tokenizer, trainer.task, batch, params))
    for wrong in (dataclasses.replace(one, kept=None), dataclasses.replace(one, kept=one.kept[1:])):
        with pytest.raises(ValueError, match="lacks a sampling mask"):
            score_episodes(tiny_model, [wrong, two])


def test_responses_do_not_depend_on_how_many_rows_decode(tiny_model, tokenizer):
    params = SamplingParams(n=3, max_new_tokens=10, top_k=5, keep_mask=True)
    together = generate(tiny_model, PROMPTS, params, tokenizer=tokenizer, seed=3)
    few = generate(tiny_model, PROMPTS, params, tokenizer=tokenizer, seed=3, max_rows=3)
    assert [c.response_ids for c in together] == [c.response_ids for c in few]
    assert [sorted(map(tuple, c.kept)) for c in together] == [sorted(map(tuple, c.kept)) for c in few]
    assert generate(tiny_model, PROMPTS, SamplingParams(top_k=5), tokenizer=tokenizer)[0].kept is None


def test_a_run_with_the_mask_trains_and_one_without_top_k_is_refused(tokenizer, caplog):
    with pytest.raises(ValueError, match=r"--keep-sampling-mask stores the ids .* needs --top-k"):
        parse_args(["--keep-sampling-mask", "--top-p", "0.9"])
    for wrong in ({"top_p": 0.5}, {"top_k": 5, "temperature": 0.0}):
        with pytest.raises(ValueError, match="keep_mask with top_k="):
            SamplingParams(keep_mask=True, **wrong)
    config = parse_args(["--keep-sampling-mask", "--top-k", "5", "--updates-per-rollout", "2", "--lr", "1e-3"])
    config = dataclasses.replace(config, group_size=4, max_new_tokens=8, dtype="fp32", device="cpu")
    trainer = GRPO(config, model=make_model(), tokenizer=tokenizer)
    _, metrics = trainer.step(MiniBatch.from_problems(trainer.task.problems("train", 2), tokenizer))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-3
    assert "biases the ratio" not in caplog.text
