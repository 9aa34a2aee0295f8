"""GRPO on one page, without any fast path. Read this file first, and run it: python textbook.py [STEPS]

GRPO (DeepSeekMath, arXiv 2402.03300) samples a group of responses to each problem. Responses with a reward above the
mean of their group become more likely, those below less likely. This page is slow: for every sampled token, the model
runs on the whole sequence. grpo.py is fast, and tests/test_textbook.py checks that both agree up to rounding.
The columns are the function on this page, the fast function, and the numbers that the test compares:

    sample              generate              tokens and their log-probabilities
    sample_group        rollout               responses and rewards
    token_logprobs      score_episodes        log-probability of every token
    group_advantages    compute_advantages    advantages
    policy_loss         update_policy         gradient of every parameter
    train_step          update_policy         weights after a step of AdamW and MemoryEfficientAdamW

Shape letters: T tokens of prompt and response, R tokens of the response, G responses of a group, V vocabulary size.
"""

import sys
import time
from pathlib import Path

import torch

from data_types import Episode
from math_task import CountdownTask
from qwen2_llm import Qwen2ForCausalLM
from tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parent / "assets" / "countdown-tiny"


def all_logprobs(model, ids: list[int], temperature: float, vocab_size: int | None) -> torch.Tensor:
    """Row t: log-probability of every possible token after ids[: t + 1]. [T] -> [T, V] in fp32."""
    logits_TV = model(torch.tensor([ids]))[0, :, :vocab_size]  # without ids that the tokenizer does not have
    return torch.log_softmax(logits_TV.float() / temperature, dim=-1)


def token_logprobs(model, e: Episode) -> torch.Tensor:
    """Log-probability of each sampled token, given all tokens before it. [R] in fp32."""
    logp_TV = all_logprobs(model, e.prompt_ids + e.response_ids, e.temperature, e.vocab_size)
    logp_RV = logp_TV[len(e.prompt_ids) - 1 : -1]  # row t predicts token t + 1, so the last row is not needed
    return logp_RV.gather(1, torch.tensor(e.response_ids)[:, None])[:, 0][e.sampled_positions]


@torch.no_grad()
def sample(model, tokenizer, prompt_ids: list[int], uniforms: torch.Tensor, temperature=1.0, group_id=0) -> Episode:
    """Sample a response of at most len(uniforms) tokens, one random number from [0, 1) each. Temperature 0: greedy."""
    e = Episode(group_id, prompt_ids, [], [], "", "length", vocab_size=tokenizer.vocab_size)
    e.temperature = temperature or 1.0  # greedy: log-probabilities at temperature 1
    for u in uniforms:
        logp_V = all_logprobs(model, prompt_ids + e.response_ids, e.temperature, e.vocab_size)[-1]
        cumulative_V = logp_V.double().exp().cumsum(dim=0)
        drawn = (cumulative_V <= u * cumulative_V[-1]).sum()  # id of the first token with cumulative probability > u
        token = int(drawn if temperature > 0 else logp_V.argmax())
        e.response_ids.append(token)  # also the stop token, so that the model learns to stop
        e.logprobs.append(float(logp_V[token]))
        if token in tokenizer.eos_token_ids:
            e.finish_reason = "stop"
            break
    e.text = tokenizer.decode(e.response_ids[:-1] if e.finish_reason == "stop" else e.response_ids)
    return e


def sample_group(model, tokenizer, task, problem, uniforms, temperature=1.0, group_id=0) -> list[Episode]:
    """Sample G responses to a problem, with rewards and advantages. `uniforms`: [G, largest number of new tokens]."""
    prompt_ids = tokenizer.encode(tokenizer.render_chat(problem.messages) + problem.response_prefix)
    group = [sample(model, tokenizer, prompt_ids, u, temperature, group_id) for u in uniforms]
    for e in group:
        e.reward, e.reward_parts = task.reward(problem, e.text)
    for e, advantage in zip(group, group_advantages([e.reward for e in group])):
        e.advantage = advantage
    return group


def group_advantages(rewards: list[float]) -> list[float]:
    """(reward - mean) / standard deviation of one group. The 1e-4 avoids 0 / 0 for equal rewards. [G] -> [G]"""
    r = torch.tensor(rewards, dtype=torch.float64)
    return ((r - r.mean()) / (r.std(correction=0) + 1e-4)).tolist()


def policy_loss(model, episodes: list[Episode], reference=None, beta=0.0, epsilon=0.2) -> torch.Tensor:
    """Loss of one optimizer step: clipped surrogate (PPO, arXiv 1707.06347) + beta * KL divergence from `reference`."""
    loss, n_tokens = torch.zeros(()), sum(e.n_sampled for e in episodes)  # mean over all tokens of the step, as in DAPO
    for e in episodes:
        logp = token_logprobs(model, e)  # [R]
        ratio = torch.exp(logp - torch.tensor(e.sampled_logprobs))  # policy / sampler: 1 if both have equal weights
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)  # outside the range `clipped` is constant, with gradient 0
        loss = loss - torch.minimum(ratio * e.advantage, clipped * e.advantage).sum() / n_tokens
        if beta:
            d = token_logprobs(reference, e).detach() - logp
            loss = loss + beta * (d.exp() - d - 1).sum() / n_tokens  # k3: an estimate of KL that is never negative
    return loss


def train_step(model, optimizer: torch.optim.Optimizer, episodes: list[Episode], max_grad_norm: float = 1.0) -> None:
    """One update of all weights. If the gradient's norm exceeds `max_grad_norm`, it is scaled down to that norm."""
    optimizer.zero_grad()
    policy_loss(model, episodes).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()


def main(steps: int = 3, problems: int = 4, group_size: int = 8, max_new_tokens: int = 192, lr: float = 2e-4) -> None:
    torch.set_num_threads(1)  # the matrices are small: a second thread would mostly wait
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(CHECKPOINT), Tokenizer.from_pretrained(CHECKPOINT)
    task = CountdownTask(numbers=(3, 4), max_number=25, prompt_style="short", arithmetic_weight=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)  # as in the default run of train.py
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        start, episodes = time.perf_counter(), []
        for i in range((step - 1) * problems, step * problems):
            uniforms = torch.rand(group_size, max_new_tokens, generator=generator, dtype=torch.float64)
            episodes += sample_group(model, tokenizer, task, task.train_problem(i), uniforms, group_id=i)
        train_step(model, optimizer, episodes)
        reward, solved = torch.tensor([[e.reward, e.reward_parts["answer"]] for e in episodes]).mean(dim=0)
        print(f"step {step}  reward {reward:.3f}  solved {solved:.3f}  {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
