"""Every fast path against textbook.py, on tiny random models.

The textbook runs on an fp64 copy of the model. In fp64, attention takes one sequence at a time, with a mask. The flash
kernel and the shared prompts are therefore compared with an independent implementation.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, write_tokenizer

import textbook
from data_types import Episode, MiniBatch, Problem, Reward
from grpo import compute_advantages, rollout, update_policy
from math_task import task_from_config
from model.head_logprobs import token_logprobs
from optimizer import MemoryEfficientAdamW
from rollout.generation import generate, uniform_numbers
from rollout.sampling import SamplingParams
from run.config import Config, load_config, preset_for
from run.pretrained import locate_pretrained
from tasks.task_base import Task
from tokenizer import Tokenizer
from update.scoring import score_episodes

VOCAB, TEMPERATURE = 259, 0.8  # ids of the tokenizer; the model has 275
PROMPTS = [[72, 101, 108], [10], [72, 101, 108, 108, 111, 44, 32, 119, 111], [5, 6]]
MICRO_BATCH_TOKENS = [1, 40, 10**6]  # one response; parts of groups; all of them


@pytest.fixture(autouse=True)
def _several_slices_of_the_vocabulary(monkeypatch):
    """The chunked head takes the vocabulary in slices, and a slice in tiles of a few rows."""
    monkeypatch.setitem(token_logprobs.__globals__, "LOGITS_AT_ONCE", 2000)
    monkeypatch.setitem(token_logprobs.__globals__, "CPU_TILE", 100)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    """Untied: the ids beyond the tokenizer's vocabulary are by far the likeliest. A missing cut shows."""
    model = make_model(make_config(tie_word_embeddings=request.param))
    if not request.param:
        with torch.no_grad():
            model.lm_head.weight[VOCAB:] = 20 * model.lm_head.weight[: 275 - VOCAB]
    return model


def exact(model):
    return copy.deepcopy(model).double()


def make_episodes(model, groups: int = 3, n: int = 4, noise: float = 0.3) -> list[Episode]:
    """Random prompts and responses of different lengths. The groups are interleaved.

    The sampler's log-probabilities are the model's with some noise, so that ratios lie on both sides of the clip range.
    """
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(3 + 4 * g)] for g in range(groups)]
    episodes = []
    for _ in range(n):
        for g, prompt in enumerate(prompts):
            ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
            e = Episode(g, prompt, ids, [], "", "stop", rng.random(), temperature=TEMPERATURE, vocab_size=VOCAB)
            with torch.no_grad():
                e.logprobs = [x + rng.gauss(0, noise) for x in textbook.token_logprobs(model, e).tolist()]
            episodes.append(e)
    return compute_advantages(episodes)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given, and changes no weight."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=1.0)
        self.named, self.gradients = dict(model.named_parameters()), {}

    def step(self, closure=None):
        self.gradients = {name: p.grad.clone() for name, p in self.named.items()}


def fast_gradients(model, episodes, **options) -> dict[str, torch.Tensor]:
    recorder = Recorder(model)
    update_policy(model, recorder, episodes, max_grad_norm=1e9, **options)
    return recorder.gradients


def textbook_gradients(model, loss) -> dict[str, torch.Tensor]:
    """`loss` is a function of the model, and the gradients are those of its fp64 copy."""
    model = exact(model)
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected) -> None:
    """Each within 1e-5 of its own norm. Hence all of them together, too."""
    assert found.keys() == expected.keys()
    norms = {name: g.norm().item() for name, g in expected.items()}
    errors = {name: (found[name].double() - g).norm().item() for name, g in expected.items()}
    assert min(norms.values()) > 0
    assert {name: errors[name] / norms[name] for name in norms if not errors[name] <= 1e-5 * norms[name]} == {}


# --- advantages


def test_advantages_are_those_of_the_textbook():
    """Random rewards in groups of different sizes that are interleaved. One group has equal rewards."""
    rng = random.Random(0)
    for _ in range(20):
        groups = [g for g in range(5) for _ in range(rng.randint(1, 9))]
        rng.shuffle(groups)
        rewards = [0.1 if g == 4 else rng.choice([0.0, 0.1, 1.1, rng.gauss(0, 3)]) for g in groups]
        episodes = [Episode(g, [1], [2], [-1.0], "", "stop", r) for g, r in zip(groups, rewards)]
        found = [e.advantage for e in compute_advantages(episodes)]
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            expected = textbook.group_advantages([rewards[i] for i in members])
            assert [found[i] for i in members] == pytest.approx(expected, rel=1e-9, abs=1e-9)


# --- log-probabilities


@pytest.mark.parametrize("micro_batch_tokens", MICRO_BATCH_TOKENS)
def test_log_probabilities_of_every_token_are_those_of_the_textbook(model, micro_batch_tokens):
    """Chunked head, packed rows, shared prompts."""
    episodes = make_episodes(model)
    for e, scores in zip(episodes, score_episodes(model, episodes, micro_batch_tokens=micro_batch_tokens), strict=True):
        expected = textbook.token_logprobs(exact(model), e).detach()
        torch.testing.assert_close(scores.logp, expected, rtol=0, atol=1e-5)


# --- sampling


def stop_early(model, folder: Path) -> Tokenizer:
    """A tokenizer whose stop id ends some greedy responses to PROMPTS early, and others not."""
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(folder))
    greedy = [textbook.sample(exact(model), tokenizer, prompt, torch.zeros(12), 0.0).response_ids for prompt in PROMPTS]
    inside = [i for ids in greedy for i in ids[1:-1] if not all(i in other for other in greedy)]
    tokenizer.eos_token_ids = (inside[0],)
    return tokenizer


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("n", "max_new_tokens", "max_rows"), [(1, 12, 512), (3, 12, 512), (3, 12, 4), (2, 1, 512)])
def test_responses_are_those_of_the_textbook_token_by_token(model, tmp_path, temperature, n, max_new_tokens, max_rows):
    """Prompts and responses of different lengths. With few rows, prompts wait until responses have ended."""
    tokenizer = stop_early(model, tmp_path)
    params = SamplingParams(n, max_new_tokens, temperature)
    completions = generate(model, PROMPTS, params, tokenizer=tokenizer, seed=3, max_rows=max_rows)
    uniforms = uniform_numbers(PROMPTS, params, seed=3)
    for i, (completion, u) in enumerate(zip(completions, uniforms, strict=True)):
        expected = textbook.sample(exact(model), tokenizer, PROMPTS[i // n], u, temperature)
        assert completion.response_ids == expected.response_ids
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
        assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason)
    if temperature == 0 and max_new_tokens == 12:
        assert {c.finish_reason for c in completions} == {"stop", "length"}
        assert min(len(c.response_ids) for c in completions) < 12


class EvenLetters(Task):
    """The reward is the share of letters with an even code."""

    def train_problem(self, index: int) -> Problem:
        return Problem(f"train {index}", [{"role": "user", "content": "x" * (1 + index)}], None, "<think>")

    def reward(self, problem, response) -> Reward:
        share = sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))
        return Reward(share, {"answer": share})


@pytest.mark.parametrize(("temperature", "n"), [(0.0, 2), (0.8, 1), (0.8, 5)])
def test_episodes_are_those_of_the_textbook(model, tokenizer, temperature, n):
    """Prompt, response, text, reward and advantage, for problems of different lengths."""
    task, params = EvenLetters(), SamplingParams(n, 16, temperature)
    batch = MiniBatch.from_problems(task.problems("train", 4), tokenizer)
    episodes = compute_advantages(rollout(model, tokenizer, task, batch, params, seed=5, first_group_id=70))
    uniforms = uniform_numbers(batch.prompt_ids, params, seed=5).split(n)
    expected = []
    for group, (problem, u) in enumerate(zip(batch.problems, uniforms)):
        expected += textbook.sample_group(exact(model), tokenizer, task, problem, u, temperature, 70 + group)
    names = ["group_id", "prompt_ids", "response_ids", "text", "finish_reason", "reward", "reward_parts"]
    for e, reference in zip(episodes, expected, strict=True):
        for name in [*names, "temperature", "vocab_size"]:
            assert getattr(e, name) == getattr(reference, name), name
        assert e.logprobs == pytest.approx(reference.logprobs, abs=2e-5)
        assert e.advantage == pytest.approx(reference.advantage, abs=1e-9)
    assert len({len(e.prompt_ids) for e in episodes}) == 4
    assert n == 1 or temperature == 0 or any(e.advantage for e in episodes)


# --- the gradient


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("micro_batch_tokens", MICRO_BATCH_TOKENS)
def test_the_gradient_is_that_of_the_textbook(model, micro_batch_tokens, beta, shared_prompt):
    """Clipped surrogate, with and without KL. A prompt is shared within a group, so groups of one share nothing."""
    episodes, reference = make_episodes(model), make_model(model.config, seed=1) if beta else None
    if not shared_prompt:
        for i, e in enumerate(episodes):
            e.group_id = i
    options = {"beta": beta, "reference": reference, "micro_batch_tokens": micro_batch_tokens}
    expected = textbook_gradients(model, lambda m: textbook.policy_loss(m, episodes, reference, beta))
    assert_same_gradients(fast_gradients(model, episodes, **options), expected)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_the_gradient_of_other_denominators_is_built_from_the_textbook(model, loss_type):
    """The loss of one episode is the mean over its tokens. These losses weigh the episodes differently."""
    episodes, cap = make_episodes(model), 20
    tokens = sum(len(e.response_ids) for e in episodes)
    weights = {
        "dapo": [len(e.response_ids) / tokens for e in episodes],
        "bnpo": [len(e.response_ids) / tokens for e in episodes],
        "grpo": [1 / len(episodes) for e in episodes],
        "dr_grpo": [len(e.response_ids) / (len(episodes) * cap) for e in episodes],
    }[loss_type]

    def loss(model):
        return sum(w * textbook.policy_loss(model, [e]) for w, e in zip(weights, episodes))

    found = fast_gradients(model, episodes, loss_type=loss_type, max_new_tokens=cap, micro_batch_tokens=40)
    expected = textbook_gradients(model, loss)
    assert_same_gradients(found, expected)


# --- a whole step


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.1])
def test_the_weights_after_three_steps_are_those_of_the_textbook(model, max_grad_norm):
    """AdamW with decay. With a small limit the gradient is scaled down. eps is large enough that the sign of a gradient
    that is nothing but rounding does not decide the step."""
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    reference, episodes = exact(model), make_episodes(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = MemoryEfficientAdamW(model.parameters(), **options)
    plain = torch.optim.AdamW(reference.parameters(), **options)
    for _ in range(3):
        update_policy(model, ours, episodes, max_grad_norm=max_grad_norm, micro_batch_tokens=40)
        textbook.train_step(reference, plain, episodes, max_grad_norm)
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        moved = (expected[name] - before[name]).norm()
        assert moved > 0, name
        assert (p - expected[name]).norm() < 1e-4 * moved, name


# --- the page itself


def test_the_page_has_at_most_120_lines():
    assert len(Path(textbook.__file__).read_text(encoding="utf-8").splitlines()) <= 120


def test_the_program_prints_a_reward(tmp_path):
    """From another folder. One step of one problem with four responses."""
    command = [sys.executable, textbook.__file__, "1", "1", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"step 1  reward (-?\d\.\d{3})  solved (\d\.\d{3})  \d+\.\d s\n", done.stdout)
    assert found, done.stdout
    assert -0.3 < float(found[1]) <= 1.1
    assert 0 <= float(found[2]) <= 1


def test_settings_are_those_of_the_default_run(monkeypatch):
    """Those of the preset, except problems per step and the number of steps, and the defaults of Config."""
    seen, config = {}, load_config(preset_for(Config.ckpt))

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert default(textbook.sample_group, "temperature") == config.temperature
    assert default(textbook.policy_loss, "epsilon") == config.epsilon_low == config.epsilon_high
    assert default(textbook.policy_loss, "beta") == config.beta
    assert default(textbook.train_step, "max_grad_norm") == config.max_grad_norm
    assert (config.loss_type, config.advantage_estimator, config.advantage_scale) == ("dapo", "group_mean", "group")

    def sample_group(model, tokenizer, task, problem, uniforms, group_id):
        seen.update(task=task, uniforms=uniforms)
        return [Episode(group_id, [1], [2], [-1.0], "", "stop", 0.0, {"answer": 0.0})]

    monkeypatch.setattr(textbook, "sample_group", sample_group)
    monkeypatch.setattr(textbook, "train_step", lambda model, optimizer, episodes: seen.update(optimizer.defaults))
    textbook.main(1)
    assert locate_pretrained(config.ckpt) == textbook.CHECKPOINT
    assert seen["task"] == task_from_config(config)
    assert seen["uniforms"].shape == (config.group_size, config.max_new_tokens)
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert seen[name] == getattr(config, name), name
