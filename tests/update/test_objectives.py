"""Every option of the objective: its effect on loss, reward or rollout, against the slow way written out."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from conftest import make_model

from data_types import Episode, MiniBatch, Problem, Reward
from grpo import GRPO, SPARE_PROBLEMS, compute_advantages, rollout, update_policy
from math_task import task_from_config
from model.lora import add_lora, has_lora, lora_layers
from rollout.sampling import SamplingParams
from run.config import Config, parse_args, validate
from run.options import LossOptions
from tasks.task_base import Task
from update import losses
from update.scoring import score_episodes
from update.shaping import drop_zero_variance, penalise_divergence, penalise_length

RNG = torch.Generator().manual_seed(11)
PROMPTS = [[40, 41, 42], [50, 51, 52, 53]]
ANSWERS = [torch.randint(256, (length,), generator=RNG).tolist() for length in (5, 2, 7, 4)]
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)


def logprobs_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The slow way: one whole forward pass, whole logits."""
    logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def entropy_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logp = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def make_episodes(sampler, noise: float = 0.0) -> list[Episode]:
    """Two groups of two, of ragged lengths, as `sampler` would have drawn them."""
    episodes = []
    for i, (answer, advantage) in enumerate(zip(ANSWERS, ADVANTAGES)):
        with torch.no_grad():
            logp = logprobs_of(sampler, PROMPTS[i // 2], answer)
        logp += noise * torch.randn(len(logp), generator=torch.Generator().manual_seed(i))
        episodes.append(
            Episode(i // 2, PROMPTS[i // 2], answer, logp.tolist(), "", "stop", float(i), advantage=advantage)
        )
    return episodes


@pytest.fixture(scope="module")
def models():
    """A policy, the one it was in the rollout, and a reference: all different, none far away."""
    policy, sampler, reference = make_model(), make_model(), make_model()
    for number, model in enumerate((sampler, reference)):
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy.eval(), sampler.eval(), reference.eval()


def update(model, episodes, **options) -> dict[str, float]:
    """The metrics of an update that leaves the weights alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return update_policy(model, optimizer, episodes, **options)


def flat(function, *arguments) -> torch.Tensor:
    return torch.cat([function(*arguments, PROMPTS[i // 2], answer) for i, answer in enumerate(ANSWERS)]).detach()


class Lively(Task):
    """Pays by a checksum of the answer: no two rewards of a group are equal."""

    def train_problem(self, index: int) -> Problem:
        return Problem(str(index), [{"role": "user", "content": f"{index}"}], index)

    def reward(self, problem: Problem, response: str) -> Reward:
        paid = zlib.crc32(response.encode()) % 10_000 / 10_000
        return Reward(paid, {"answer": paid})


class Moody(Lively):
    """The same, but even problems pay everybody alike."""

    def reward(self, problem: Problem, response: str) -> Reward:
        return super().reward(problem, response) if problem.target % 2 else Reward(0.1, {"answer": 0.1})


def trainer_for(checkpoint_folder, *flags: str, **objects) -> GRPO:
    words = ["--ckpt", str(checkpoint_folder), "--task", "arithmetic", "--prompt-style", "short", "--lr", "1e-2"]
    words += ["--max-new-tokens", "6", "--group-size", "3", "--prompts-per-step", "2"]
    words += ["--device", "cpu", "--dtype", "fp32"]
    return GRPO(parse_args([*words, *flags]), **({"task": Lively()} | objects))


def one_step(trainer: GRPO, step: int = 1):
    P = trainer.config.prompts_per_step
    problems = trainer.task.problems("train", P, start=(step - 1) * P)
    return trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))


# --- options and their names


def test_every_option_of_the_loss_is_a_flag_and_an_unknown_one_is_an_error():
    assert issubclass(Config, LossOptions)
    with pytest.raises(TypeError, match="epsilon_lo"):
        update(make_model(), [], epsilon_lo=0.1)


def test_the_trainer_hands_its_options_to_the_update(checkpoint_folder):
    """CISPO's cap stands for all of them: it changes the loss of a second update."""
    metrics = []
    for cap in ("5.0", "0.01"):
        flags = ("--loss-type", "cispo", "--cispo-epsilon-max", cap, "--updates-per-rollout", "2")
        metrics.append(one_step(trainer_for(checkpoint_folder, *flags, "--advantage-scale", "none"))[1])
    assert abs(metrics[0]["grad_norm"]) > 10 * abs(metrics[1]["grad_norm"]) > 0


# --- divergence in the loss

BY_HAND = {
    "k1": lambda d, target: -d,
    "k2": lambda d, target: d**2 / 2,
    "k3": lambda d, target: d.exp() - d - 1,
    "kl": lambda d, target: (d - target).clamp(min=0),
    "approx_kl": lambda d, target: d.exp() - d - 1,
}


@pytest.mark.parametrize(
    ("kl", "against", "target"),
    [
        ("k1", "reference", 0.0),
        ("k2", "reference", 0.0),
        ("k3", "reference", 0.0),
        ("k1", "rollout", 0.0),
        ("k2", "rollout", 0.0),
        ("k3", "rollout", 0.0),
        ("kl", "reference", 0.0),  # kl and approx_kl compare with the rollout policy whatever is said
        ("kl", "rollout", 0.02),
        ("approx_kl", "rollout", 0.0),
    ],
)
def test_divergence_in_the_loss(models, kl, against, target):
    policy, sampler, reference = models
    episodes = make_episodes(sampler)
    to_reference = against == "reference" and kl.startswith("k") and kl[1:].isdigit()
    other = flat(logprobs_of, reference if to_reference else sampler)
    expected = BY_HAND[kl](other - flat(logprobs_of, policy), target).mean()
    metrics = update(
        policy, episodes, beta=0.5, kl=kl, kl_against=against, kl_target=target,
        reference=reference if to_reference else None, micro_batch_tokens=12,
    )  # fmt: skip
    assert expected.abs() > 1e-4
    torch.testing.assert_close(metrics["kl"], expected.item(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(metrics["loss"] - metrics["policy_loss"], 0.5 * expected.item(), atol=1e-6, rtol=1e-3)


def test_a_reference_is_loaded_only_where_it_is_asked(checkpoint_folder):
    for flags in ((), ("--beta", "0.1", "--kl", "kl"), ("--beta", "0.1", "--kl-against", "rollout")):
        assert trainer_for(checkpoint_folder, *flags).reference is None
    assert trainer_for(checkpoint_folder, "--beta", "0.1").reference is not None
    assert trainer_for(checkpoint_folder, "--beta", "0.1", "--kl", "k1", "--kl-in", "reward").reference is not None
    with pytest.raises(ValueError, match="no reference policy"):
        update(make_model(), [], beta=0.1)


OT = {"ot_window": 1, "ot_regularization": 0.3, "ot_iterations": 3, "ot_target": 0.05}
OT_BY_HAND = {"window": 1, "regularisation": 0.3, "iterations": 3}


def hidden_of(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    from model.attention import PackedAttention
    from model.layout import Layout

    layout = Layout.causal([len(prompt + answer)])
    states = model.hidden_states(torch.tensor(prompt + answer), layout.positions(), PackedAttention(layout))
    return states[len(prompt) - 1 : -1]


def transport_by_hand(policy, rollout_policy) -> float:
    costs = []
    for i, answer in enumerate(ANSWERS):
        new, old = (hidden_of(model, PROMPTS[i // 2], answer) for model in (policy, rollout_policy))
        costs.append(max(0.0, losses.transport_cost(new, old, **OT_BY_HAND).item() - 0.05))
    return sum(costs) / len(costs)


def test_transport_is_from_the_hidden_states_of_the_rollout_policy(models):
    """In the first update these are the policy's own. In later ones they come from `score_episodes`."""
    policy, sampler, _ = models
    episodes = make_episodes(sampler)
    first = update(policy, episodes, beta=2.0, kl="ot", micro_batch_tokens=12, **OT)
    before = score_episodes(sampler, episodes, keep_hidden=True, micro_batch_tokens=9)
    second = update(policy, episodes, beta=2.0, kl="ot", before=before, micro_batch_tokens=12, **OT)
    for metrics, other in ((first, policy), (second, sampler)):
        torch.testing.assert_close(metrics["kl"], transport_by_hand(policy, other), atol=1e-5, rtol=1e-3)
        assert metrics["loss"] - metrics["policy_loss"] == pytest.approx(2 * metrics["kl"], abs=1e-5)
    assert second["kl"] > first["kl"] + 1e-3


def test_the_trainer_keeps_the_rollouts_hidden_states_for_later_updates(checkpoint_folder):
    """After the first update the policy has moved, and the transport cost with it."""
    kl = []
    for updates in ("1", "2"):
        flags = ("--beta", "0.001", "--kl", "ot", "--updates-per-rollout", updates, "--lr", "3e-2")
        kl.append(one_step(trainer_for(checkpoint_folder, *flags))[1]["kl"])
    assert kl[1] > kl[0] + 0.01


# --- divergence and length in the reward


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_divergence_in_the_reward(models, kl):
    _, sampler, reference = models
    episodes = make_episodes(sampler)
    penalised = penalise_divergence(reference, episodes, 0.5, kl, micro_batch_tokens=12)
    for i, (old, new) in enumerate(zip(episodes, penalised, strict=True)):
        logps = (logprobs_of(model, PROMPTS[i // 2], ANSWERS[i]).detach() for model in (reference, sampler))
        expected = BY_HAND[kl](next(logps) - next(logps), 0.0).sum().item()
        assert new.reward_parts["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert new.reward == pytest.approx(old.reward - 0.5 * expected, rel=1e-3, abs=1e-5)


def test_divergence_in_the_reward_comes_before_the_advantages_and_leaves_the_loss_alone(checkpoint_folder):
    trainer = trainer_for(checkpoint_folder, "--beta", "3.0", "--kl", "k1", "--kl-in", "reward")
    with torch.no_grad():  # away from the reference
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    episodes, metrics = one_step(trainer)
    assert "kl" not in metrics
    assert metrics["rewards/kl/std"] > 0
    for e in episodes:
        assert e.reward == pytest.approx(e.reward_parts["answer"] - 3.0 * e.reward_parts["kl"], abs=1e-5)
    assert [e.advantage for e in episodes] == [e.advantage for e in compute_advantages(episodes)]
    assert any(e.advantage for e in episodes)


def test_soft_overlong_penalty_counts_tokens(checkpoint_folder, models):
    episodes = make_episodes(models[1])  # of 5, 2, 7 and 4 tokens
    penalised = penalise_length(episodes, max_new_tokens=7, buffer=4)
    assert [e.reward_parts["overlong"] for e in penalised] == [-0.5, 0.0, -1.0, -0.25]
    assert [e.reward for e in penalised] == [0 - 0.5, 1.0, 2 - 1.0, 3 - 0.25]
    _, metrics = one_step(trainer_for(checkpoint_folder, "--overlong-buffer", "6"))
    assert -1 <= metrics["rewards/overlong/mean"] < 0


# --- importance weights


@pytest.mark.parametrize("mode", ["truncate_token", "mask_token", "truncate_sequence", "mask_sequence"])
def test_importance_correction_weighs_by_rollout_policy_over_sampler(models, mode):
    """The ratio is then policy / rollout policy by the trainer's own code, and the policy term times the weight."""
    policy, sampler, _ = models
    episodes = make_episodes(sampler, noise=0.5)  # the sampler's numbers are off
    stored = torch.cat([torch.tensor(e.logprobs) for e in episodes])
    lengths = torch.tensor([len(a) for a in ANSWERS])
    before = score_episodes(sampler, episodes, micro_batch_tokens=9)
    for given, rollout_policy in ((None, policy), (before, sampler)):
        old = flat(logprobs_of, rollout_policy)
        gap = old - stored
        if mode.endswith("sequence"):
            gap = torch.cat([part.sum().expand(len(part)) for part in gap.split(lengths.tolist())])
        weight = gap.exp().clamp(max=1.1) if mode.startswith("truncate") else gap.exp() * (gap.exp() <= 1.1)
        assert (gap.exp() > 1.1).any()
        ratio = (flat(logprobs_of, policy) - old).exp()
        advantage = torch.tensor(ADVANTAGES).repeat_interleave(lengths)
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        metrics = update(
            policy, episodes, before=given, importance_correction=mode, importance_cap=1.1, micro_batch_tokens=12
        )
        assert metrics["loss"] == pytest.approx(-(weight * surrogate).mean().item(), abs=1e-5)
        prefix = "sampling/importance_sampling_ratio"
        found = [metrics[f"{prefix}/{what}"] for what in ("min", "mean", "max")]
        assert found == pytest.approx([weight.min().item(), weight.mean().item(), weight.max().item()], abs=1e-4)
        assert metrics["ratio/mean"] == pytest.approx(ratio.mean().item(), abs=1e-4)


def test_the_trainer_scores_the_rollout_policy_once_for_all_updates(checkpoint_folder):
    """Without it the second update would take itself for the rollout policy, and its ratio would be 1."""
    flags = ("--importance-correction", "mask_token", "--updates-per-rollout", "2")
    _, metrics = one_step(trainer_for(checkpoint_folder, *flags))
    assert abs(metrics["ratio/mean"] - 1) > 1e-4
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4  # of the first update


def test_ratio_statistics(models):
    policy, sampler, _ = models
    ratio = (flat(logprobs_of, policy) - flat(logprobs_of, sampler)).exp()
    metrics = update(policy, make_episodes(sampler), micro_batch_tokens=12)
    found = [metrics[f"ratio/{what}"] for what in ("min", "mean", "max")]
    assert found == pytest.approx([ratio.min().item(), ratio.mean().item(), ratio.max().item()], rel=1e-4)


# --- entropy


@pytest.mark.parametrize("micro_batch_tokens", [9, 1000])
def test_only_tokens_of_highest_entropy_teach_the_policy(models, micro_batch_tokens):
    """The share is of the step, however it is cut. Denominators stay those of all tokens."""
    policy, sampler, _ = models
    entropy = flat(entropy_of, policy)
    teaches = entropy >= entropy.sort(descending=True).values[3]  # 4 of 18: the quantile at 1 - 0.2 lies below them
    ratio = (flat(logprobs_of, policy) - flat(logprobs_of, sampler)).exp()
    advantage = torch.tensor(ADVANTAGES).repeat_interleave(torch.tensor([len(a) for a in ANSWERS]))
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    metrics = update(
        policy, make_episodes(sampler), top_entropy_share=0.2, beta=0.5, kl="approx_kl",
        micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip
    assert metrics["policy_loss"] == pytest.approx(-(surrogate * teaches).mean().item(), abs=1e-5)
    whole = update(policy, make_episodes(sampler), beta=0.5, kl="approx_kl")
    assert metrics["kl"] == pytest.approx(whole["kl"], abs=1e-6)  # the divergence is of all tokens
    assert abs(metrics["policy_loss"] - whole["policy_loss"]) > 1e-3


def test_the_entropy_coefficient_follows_its_target(checkpoint_folder):
    """A random model's entropy is near log 259: below a target of 9 the weight rises, above one of 1 it rests."""
    rising = trainer_for(checkpoint_folder, "--entropy-target", "9", "--entropy-coef-step", "0.25")
    found = []
    for step in (1, 2, 3):
        _, metrics = one_step(rising, step)
        found.append((metrics["entropy_coef"], metrics["loss"] - metrics["policy_loss"]))
    assert [coef for coef, _ in found] == [0.0, 0.25, 0.5]
    assert abs(found[0][1]) < 1e-6
    assert found[2][1] < found[1][1] < -0.25  # the term is -coefficient * entropy
    falling = trainer_for(
        checkpoint_folder, "--entropy-target", "0.1", "--entropy-coef", "0.3", "--entropy-coef-step", "0.1"
    )
    applied = [one_step(falling, step)[1]["entropy_coef"] for step in (1, 2)]
    assert applied == [0.3, 0.0]  # above the target: nothing is applied, and the weight falls
    assert falling.entropy_coef == pytest.approx(0.1)


def test_the_entropy_coefficient_rises_where_no_group_has_a_signal(checkpoint_folder):
    """A policy that has collapsed has equal rewards everywhere. That is when the bonus is needed."""
    task = Moody()
    trainer = trainer_for(checkpoint_folder, "--entropy-target", "9", "--prompts-per-step", "1", task=task)
    _, metrics = trainer.step(MiniBatch.from_problems([task.train_problem(0)], trainer.tokenizer))
    assert metrics["frac_reward_zero_std"] == 1
    assert trainer.entropy_coef == trainer.config.entropy_coef_step


def test_the_entropy_coefficient_is_part_of_the_state(checkpoint_folder):
    flags = ("--entropy-target", "9", "--entropy-coef-step", "0.25")
    trainer, resumed = trainer_for(checkpoint_folder, *flags), trainer_for(checkpoint_folder, *flags)
    one_step(trainer)
    resumed.load_state_dict(trainer.state_dict())
    assert one_step(resumed, 2)[1]["entropy_coef"] == 0.25


# --- data hygiene


def test_dropping_leaves_nan_rewards_out_of_account(models):
    episodes = make_episodes(models[1])
    for episode, reward in zip(episodes, (0.1, math.nan, 0.1, 0.2)):
        episode.reward = reward
    kept, dropped = drop_zero_variance(episodes)
    assert [e.group_id for e in kept] == [1, 1]
    assert [e.group_id for e in dropped] == [0, 0]


def test_dropped_groups_are_out_of_the_denominators(checkpoint_folder):
    """CHECKLIST 14. dapo divides by the step's tokens: half of them gone, the gradient doubles."""
    norms, counts = [], []
    for flags in ((), ("--drop-zero-variance",)):
        trainer = trainer_for(checkpoint_folder, *flags, "--max-grad-norm", "1e9", task=Moody())
        trainer.tokenizer.eos_token_ids = ()  # every answer has 6 tokens
        episodes, metrics = one_step(trainer)
        norms.append(metrics["grad_norm"])
        counts.append(metrics["frac_reward_zero_std"])
        assert len(episodes) == 6
        assert [e.group_id for e in episodes] == sorted(e.group_id for e in episodes)
        assert all(e.advantage == 0 for e in episodes[:3])
        assert all(e.advantage != 0 for e in episodes[3:])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)
    assert counts == [0.5, 0.5]  # the metric still says what was sampled


def test_dropped_groups_are_replaced_by_further_problems_up_to_the_cap(checkpoint_folder):
    alive = {SPARE_PROBLEMS + 3, SPARE_PROBLEMS + 6}

    class Rare(Lively):
        def reward(self, problem: Problem, response: str) -> Reward:
            return super().reward(problem, response) if problem.target in alive else Reward(0.1, {})

    rounds = []
    for cap in ("0", "1", "2", "9"):
        flags = ("--drop-zero-variance", *(("--refill-rounds", cap) if cap != "0" else ()))
        trainer = trainer_for(checkpoint_folder, *flags, task=Rare())
        episodes, _ = one_step(trainer)
        problems = list(dict.fromkeys(e.problem.target for e in episodes))
        groups = {e.group_id for e in episodes}
        trained = {e.problem.target for e in episodes if e.advantage}
        rounds.append((len(problems), len(trained)))
        assert len(groups) == len(problems)  # none sampled twice, and each with a group of its own
        assert len(episodes) == 3 * len(groups)
        assert trained == alive & set(problems)
    # Problems 0 and 1; then the first two spare ones, the next two, and one a round when one is missing.
    assert rounds == [(2, 0), (4, 0), (6, 1), (8, 2)]
    again, _ = one_step(trainer_for(checkpoint_folder, *flags, task=Rare()))
    assert [e.response_ids for e in again] == [e.response_ids for e in episodes]


def test_a_prompt_that_is_drawn_again_gets_other_answers(checkpoint_folder):
    class Same(Moody):
        def train_problem(self, index: int) -> Problem:
            return Problem(str(index), [{"role": "user", "content": "the same"}], 0)

    flags = ("--drop-zero-variance", "--refill-rounds", "1")
    episodes, _ = one_step(trainer_for(checkpoint_folder, *flags, task=Same()))
    assert len({tuple(e.response_ids) for e in episodes}) == len(episodes) == 12


def test_a_step_in_which_everything_was_dropped_changes_nothing(checkpoint_folder, caplog):
    trainer = trainer_for(checkpoint_folder, "--drop-zero-variance", "--prompts-per-step", "1", task=Moody())
    before = [p.clone() for p in trainer.model.parameters()]
    _, metrics = one_step(trainer)
    assert metrics["update/skipped"] == 1
    assert "no episode has a gradient" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_the_preset_of_correct_format_and_language():
    """The set known from the field: correct +1.0, format +0.25, language +0.10."""
    task = task_from_config(parse_args(["--task", "arithmetic", "--reward-preset", "correct-format-language"]))
    problem = task.problem_from("What is 1 + 1?", "2")
    good = "one and one are two</think>\n<answer>2</answer>"
    assert task.reward(problem, good).total == pytest.approx(1.35)
    assert task.reward(problem, good.replace("one and one are two", "один и один")).total == pytest.approx(1.25)
    single = task_from_config(parse_args(["--task", "arithmetic", "--language-weight", "0.5", "--language", "greek"]))
    assert single.reward(problem, good).total == pytest.approx(1.1)
    assert single.reward(problem, good).parts["language"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_in": "reward", "kl": "ot", "beta": 0.1}, "--kl ot"),
        ({"kl_in": "reward", "kl_against": "rollout"}, "rollout policy from itself is 0"),
        ({"overlong_buffer": 2000}, "--overlong-buffer 2000"),
        ({"refill_rounds": 2}, "--drop-zero-variance"),
        ({"top_entropy_share": 0.0}, "--top-entropy-share 0"),
    ],
)
def test_options_that_cannot_work_together_are_refused(changes, said):
    with pytest.raises(ValueError) as error:
        validate(Config(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# --- adapters


def test_with_adapters_the_reference_is_the_model_itself(checkpoint_folder):
    """No second model: its KL is that to a model without adapters, and only the adapters move."""
    flags = ("--lora-rank", "2", "--beta", "0.5", "--lora-targets", "q_proj", "down_proj")
    trainer = trainer_for(checkpoint_folder, *flags)
    assert trainer.reference is trainer.model
    assert has_lora(trainer.model)
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for layer in lora_layers(trainer.model).values() for p in (layer.lora_A, layer.lora_B)
    }
    plain = make_model()
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    _, first = one_step(trainer, 1)
    assert first["kl"] == 0  # B is 0
    _, second = one_step(trainer, 2)
    assert second["kl"] > 1e-6
    for name, parameter in trainer.model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, base[name])
    episodes = make_episodes(make_model(seed=4))
    own = update(trainer.model, episodes, beta=0.5, reference=trainer.model)
    other = update(trainer.model, episodes, beta=0.5, reference=plain)
    assert own["kl"] == pytest.approx(other["kl"], rel=1e-4)


def test_scoring_has_no_dropout_and_leaves_the_mode_as_it_was(models):
    model = add_lora(make_model(), 4, dropout=0.5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    episodes = make_episodes(models[1])
    first, second = score_episodes(model, episodes), score_episodes(model, episodes)
    assert model.training
    assert all(torch.equal(a.logp, b.logp) for a, b in zip(first, second, strict=True))


def test_rollout_shapes_no_rewards(checkpoint_folder):
    """Evaluations call `rollout`: penalties of training do not reach them."""
    trainer = trainer_for(checkpoint_folder, "--overlong-buffer", "6")
    batch = MiniBatch.from_problems(trainer.task.problems("train", 2), trainer.tokenizer)
    episodes = rollout(trainer.model, trainer.tokenizer, trainer.task, batch, SamplingParams(2, 6))
    assert all("overlong" not in e.reward_parts for e in episodes)
