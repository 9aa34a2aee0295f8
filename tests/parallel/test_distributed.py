"""Two and three processes equal one: the same rollouts, gradients, refusals. When one dies, the others say so
and end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from ranks import run_ranks, values_of
from test_grpo import EvenLetters, Recorder, make_episodes, near

import grpo
from data_types import MiniBatch, Reward
from grpo import GRPO, compute_advantages, rollout, update_policy
from parallel import distributed, sharding
from rollout.sampling import SamplingParams
from run.config import Config, parse_args
from run.run_log import NoLog, RunLog
from tokenizer import Tokenizer

ROOT = Path(distributed.__file__).resolve().parent.parent
RTOL = 1e-5  # of a tensor's largest entry, in fp32: sums are made in another order
TIMING = re.compile("time|per_second|memory")


# ---------------------------------------------------------------------------------------------------------------------
# What every rank does, and one process alone


def uneven_episodes() -> list:
    """Five groups of 6, 5, 4, 3 and 2 answers."""
    seen: dict[int, int] = {}
    kept = []
    for e in make_episodes(groups=5, n=6):
        seen[e.group_id] = seen.get(e.group_id, 0) + 1
        if seen[e.group_id] <= 6 - e.group_id:
            kept.append(e)
    return compute_advantages(kept)


def gradients(episodes, **options) -> dict:
    model = make_model()
    recorder = Recorder(model)
    metrics = update_policy(model, recorder, near(model, episodes), max_grad_norm=1e9, micro_batch_tokens=40, **options)
    return {"gradients": recorder.seen, "metrics": metrics, "weights": dict(model.named_parameters())}


def one_group_learns() -> list:
    return [dataclasses.replace(e, advantage=e.advantage if e.group_id == 1 else 0.0) for e in uneven_episodes()]


def nothing_to_learn() -> list:
    return [dataclasses.replace(e, advantage=0.0) for e in uneven_episodes()]


def one_infinite() -> list:
    first, *others = uneven_episodes()
    return [dataclasses.replace(first, advantage=float("inf")), *others]


def out_of_memory() -> dict:
    """The first rank that gets a micro-batch of more than 30 tokens has no room for it."""
    real, sizes, real_halving = grpo.micro_batch_loss, [], sharding.halve_when_out_of_memory

    def small(o, model, reference, micro, *others):
        if len(micro.ids) > 30 and distributed.is_main():
            raise MemoryError
        return real(o, model, reference, micro, *others)

    def watched(work, size):
        return real_halving(lambda tokens: sizes.append(tokens) or work(tokens), size)

    grpo.micro_batch_loss = small
    grpo.halve_when_out_of_memory = sharding.halve_when_out_of_memory = watched
    try:
        return gradients(uneven_episodes()) | {"sizes": sizes}
    finally:
        grpo.micro_batch_loss = real
        grpo.halve_when_out_of_memory = sharding.halve_when_out_of_memory = real_halving


class FirstLetter(EvenLetters):
    """Half of all groups of two have equal rewards."""

    def reward(self, problem, response) -> Reward:
        return Reward(float(ord(response[:1] or " ") % 2), {})


def steps(folder: Path, task=None, reference=None, **settings) -> dict:
    """Three GRPO steps: rollouts, metrics of every step, and the weights they lead to. AdamW's epsilon is large, or its
    first step would have the size of the learning rate however small the gradient, and show nothing but its sign."""
    base = {"prompts_per_step": 5, "group_size": 3, "max_new_tokens": 6, "lr": 1.0, "eps": 1.0, "prompt_style": "short"}
    config = Config(**(base | settings))
    trainer = GRPO(
        config, model=make_model(), tokenizer=Tokenizer.from_pretrained(folder), task=task or EvenLetters(),
        reference=reference,
    )  # fmt: skip
    tokens, metrics = [], []
    for step in range(3):
        problems = trainer.task.problems("train", config.prompts_per_step, start=step * config.prompts_per_step)
        episodes, of_step = trainer.step(MiniBatch.from_problems(problems, trainer.tokenizer))
        tokens.append([(e.group_id, e.response_ids) for e in episodes])
        metrics.append(of_step)
    return {"tokens": tokens, "metrics": metrics, "weights": dict(trainer.model.named_parameters())}


def rollouts(folder: Path) -> list:
    """Seven prompts, of which the first five come again: copies get answers of their own, on any rank."""
    tokenizer = Tokenizer.from_pretrained(folder)
    batch = MiniBatch.from_problems(EvenLetters().problems("train", 7), tokenizer)
    episodes = rollout(make_model(), tokenizer, EvenLetters(), batch, SamplingParams(2, 12), seed=3, first_group_id=40)
    return [(e.group_id, e.response_ids, e.text, e.reward, e.problem.id) for e in episodes]


def small_things() -> dict:
    """Messages between ranks."""
    rank, n = distributed.rank(), distributed.world_size()
    weights = [torch.arange(6.0).view(2, 3), torch.ones(3, dtype=torch.bfloat16)]
    distributed.check_equal_weights(weights, 1)
    if rank == n - 1:
        weights[0].view(-1)[4:] = torch.tensor([5.0, 4.0])  # the same numbers in another order
    try:
        distributed.check_equal_weights(weights, 7)
        odd = None
    except distributed.RankError as error:
        odd = str(error)
    mine, none = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)
    mine.grad = torch.full((2,), 1.0 + rank).bfloat16()
    none.grad = torch.ones(3) if rank == 0 else None
    distributed.sum_gradients([mine, none])
    return {
        "share": list(distributed.share(7)), "gathered": distributed.gather([rank] * rank), "odd weights": odd,
        "from main": distributed.from_main(lambda: rank), "sums": [mine.grad.tolist(), none.grad.tolist()],
    }  # fmt: skip


RUNS = ["dropped and refilled", "batch statistics", "transport"]
RUNS += ["adapters and their reference", "divergence in the reward"]


def everything(folder: Path) -> dict:
    reference = make_model(seed=5)
    dapo_as_published = {"drop_zero_variance": True, "refill_rounds": 2, "epsilon_high": 0.28, "overlong_buffer": 3}
    batch_statistics = {
        "advantage_estimator": "reinforce_pp", "advantage_scale": "batch", "top_entropy_share": 0.4,
        "updates_per_rollout": 2, "importance_correction": "truncate_token", "entropy_target": 10.0,
    }  # fmt: skip
    return {
        "dapo": gradients(uneven_episodes()),
        "grpo": gradients(uneven_episodes(), loss_type="grpo", beta=0.1, entropy_coef=0.01, reference=reference),
        "gspo": gradients(uneven_episodes(), loss_type="gspo", mask_truncated=True),
        "one group learns": gradients(one_group_learns()),
        "nothing to learn": gradients(nothing_to_learn()),
        "one infinite": gradients(one_infinite()),
        "out of memory": out_of_memory(),
        "rollouts": rollouts(folder),
        "dropped and refilled": steps(folder, FirstLetter(), group_size=2, **dapo_as_published),
        "batch statistics": steps(folder, **batch_statistics),
        "transport": steps(folder, beta=0.1, kl="ot", updates_per_rollout=2),
        "adapters and their reference": steps(folder, prompts_per_step=2, lora_rank=2, beta=0.1),
        "divergence in the reward": steps(folder, beta=0.1, kl_in="reward", kl="k1", reference=reference),
        "small things": small_things(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """Number of processes -> the results of each."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return {1: [everything(folder)]} | {n: values_of(run_ranks(n, everything, folder)) for n in (2, 3)}


def assert_close(found, expected, where: str) -> None:
    """Tensors to RTOL of their largest entry, numbers to 1e-5 of themselves, the rest exactly. Times are left out."""
    if isinstance(expected, dict):
        for key in expected:
            if not TIMING.search(str(key)):
                assert_close(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=RTOL * max(1e-3, expected.abs().max().item()), msg=where
        )
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-6, nan_ok=True), where
    elif isinstance(expected, list) and expected and isinstance(expected[0], dict):
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{where}, {i}")
    else:
        assert found == expected, where


# ---------------------------------------------------------------------------------------------------------------------
# The same as one process


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "one group learns"])
def test_gradients_and_metrics_are_those_of_one_process(results, n, name):
    """CHECKLIST 17: uneven groups, and one group alone that learns, so that the other ranks have nothing to do."""
    [expected] = (result[name] for result in results[1])
    assert all(grad.abs().max() > 0 for grad in expected["gradients"].values())
    for rank, result in enumerate(results[n]):
        assert_close(result[name], expected, f"rank {rank} of {n}, {name}")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["nothing to learn", "one infinite"])
def test_all_ranks_refuse_the_same_step(results, n, name):
    """CHECKLIST 19, 44: a rank whose own part is finite, too."""
    start = dict(make_model().named_parameters())
    for result in results[1] + results[n]:
        assert result[name]["metrics"]["update/skipped"] == 1
        assert result[name]["gradients"] is None
        assert all(torch.equal(p, start[key]) for key, p in result[name]["weights"].items())


@pytest.mark.parametrize("n", [2, 3])
def test_when_one_rank_has_no_memory_all_halve_and_the_gradient_stays(results, n):
    [alone] = (result["out of memory"] for result in results[1])
    for result in results[n]:
        assert result["out of memory"]["sizes"] == alone["sizes"] == [40, 20]
        assert_close(result["out of memory"]["gradients"], results[1][0]["dapo"]["gradients"], f"{n} ranks")


@pytest.mark.parametrize("n", [2, 3])
def test_rollouts_are_the_same_token_for_token(results, n):
    """CHECKLIST 38: for copies of a prompt as well, and every rank has all of them."""
    [expected] = (result["rollouts"] for result in results[1])
    assert expected[0][1] != expected[10][1]  # the first prompt's answers and its copy's
    for result in results[n]:
        assert result["rollouts"] == expected


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_three_steps_lead_where_those_of_one_process_lead(results, n, name):
    """Groups that are dropped and drawn again, statistics over the batch, a share of all tokens, two updates a rollout,
    adapters, references, and fewer prompts than ranks."""
    [expected] = (result[name] for result in results[1])
    for rank, result in enumerate(results[n]):
        assert_close(result[name], expected, f"rank {rank} of {n}, {name}")


def test_the_cases_are_what_they_say(results):
    """Else equality would be cheap."""
    alone = results[1][0]
    assert {m["update/skipped"] for name in ("batch statistics", "transport") for m in alone[name]["metrics"]} == {0}
    dropped = alone["dropped and refilled"]
    assert any(0 < m["frac_reward_zero_std"] < 1 for m in dropped["metrics"])
    assert any(len(step) > 10 for step in dropped["tokens"])  # refilled
    assert (
        alone["batch statistics"]["metrics"][0]["entropy_coef"]
        != alone["batch statistics"]["metrics"][1]["entropy_coef"]
    )
    start = dict(make_model().named_parameters())
    moved = [(p - start[key]).abs().max() for key, p in alone["dropped and refilled"]["weights"].items()]
    assert min(moved) > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks say to one another


@pytest.mark.parametrize("n", [2, 3])
def test_what_the_ranks_say_to_one_another(results, n):
    every = [result["small things"] for result in results[n]]
    assert [i for one in every for i in one["share"]] == list(range(7))
    assert all(one["gathered"] == [rank for rank in range(n) for _ in range(rank)] for one in every)
    assert {one["from main"] for one in every} == {0}
    total = float(sum(range(1, n + 1)))
    assert all(one["sums"] == [[total] * 2, [1.0] * 3] for one in every)


@pytest.mark.parametrize("n", [2, 3])
def test_weights_that_differ_are_found_and_the_rank_is_named(results, n):
    for result in results[n]:
        assert (
            f"after step 7 the weights of rank {n - 1} are not those of rank 0" in result["small things"]["odd weights"]
        )
    assert results[1][0]["small things"]["odd weights"] is None


def gradients_on_a_gpu() -> dict:
    """The summed gradient and weights of a model on this rank's GPU. The process's own number is its device's."""
    model = make_model().cuda()
    recorder = Recorder(model)
    update_policy(model, recorder, uneven_episodes(), max_grad_norm=1e9, micro_batch_tokens=40)
    distributed.check_equal_weights(model.parameters(), 1)
    return {"device": model.device.index, "gradients": {name: g.cpu() for name, g in recorder.seen.items()}}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gradients_over_nccl_are_those_of_one_process():
    model = make_model()
    recorder = Recorder(model)
    update_policy(model, recorder, uneven_episodes(), max_grad_norm=1e9)
    for rank, result in enumerate(values_of(run_ranks(2, gradients_on_a_gpu, device="cuda"))):
        assert result["device"] == rank
        for name, grad in recorder.seen.items():
            torch.testing.assert_close(result["gradients"][name], grad, rtol=0, atol=1e-3 * grad.abs().max().item())


def test_groups_go_to_the_ranks_by_their_tokens(monkeypatch):
    """Every group to one rank. None has more than another by a group. Those that learn are even by themselves."""
    episodes = make_episodes(groups=9, n=3)
    learning = {0, 3, 4, 7}
    episodes = [dataclasses.replace(e, advantage=float(e.group_id in learning)) for e in episodes]
    size = dict.fromkeys(range(9), 0)
    for e in episodes:
        size[e.group_id] += len(e.response_ids) + (0 if size[e.group_id] else len(e.prompt_ids))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        parts.append(distributed.my_groups(episodes))
    assert sorted(g for part in parts for g in part) == list(range(9))
    for counted in (learning, set(range(9))):
        loads = [sum(size[g] for g in part & counted) for part in parts]
        assert max(loads) - min(loads) <= max(size[g] for g in counted)


def test_no_log_has_what_a_log_has():
    public = {name for name in vars(RunLog) if not name.startswith("_")} - {"close"}
    assert public == {name for name in vars(NoLog) if not name.startswith("_")}


# ---------------------------------------------------------------------------------------------------------------------
# When a rank dies


def die(how: str) -> None:
    distributed.LAST_WORDS = 2.0
    distributed.gather_each(1)
    if distributed.rank() == 1 and how == "says why":
        raise ValueError("the data set of rank 1 is empty")
    if distributed.rank() == 1 and how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if distributed.rank() == 1 and how == "hangs":
        time.sleep(30)
    distributed.gather_each(2)


@pytest.mark.parametrize("how", ["says why", "is killed", "hangs"])
def test_the_others_end_and_name_the_rank_that_died(how):
    """Within a bounded time: at once where the connection breaks, after the timeout where a rank hangs."""
    started = time.monotonic()
    first, second, third = run_ranks(3, die, how, timeout_s=3.0)
    assert time.monotonic() - started < 60
    expected = {
        "says why": "rank 1 ended with ValueError: the data set of rank 1 is empty",
        "is killed": "rank 1 left no message: killed, or it hangs",
        "hangs": "rank 1 left no message: killed, or it hangs",
    }
    for survivor in (first, third):
        assert isinstance(survivor, distributed.RankError)
        assert str(survivor) == expected[how]
    assert isinstance(second, ValueError) if how == "says why" else True


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_resume_auto_goes_on_or_begins(tmp_path):
    with pytest.raises(ValueError, match="--run-dir"):
        parse_args(["--resume", "auto"])
    assert parse_args(["--resume", "auto", "--run-dir", str(tmp_path / "new"), "--seed", "3"]).seed == 3
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    assert parse_args(["--resume", "auto", "--run-dir", str(tmp_path)]).seed == 5


MAIN = """
import os, signal, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
import train
from test_grpo import EvenLetters
train.task_from_config = lambda config: EvenLetters(seed=config.seed)
step = train.GRPO.step
def dies_once(trainer, *args, **options):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.step_count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == "1" and trainer.step_count == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(trainer, *args, **options)
train.GRPO.step = dies_once
sys.exit(train.main())
"""


def test_torchrun_a_death_a_restart_and_a_signal(checkpoint_folder, tmp_path):
    """Rank 1 is killed in step 3. torchrun starts both again, they go on from step 2. In step 5 rank 1 alone is asked
    to stop, and both stop after it, with a checkpoint."""
    main, run_dir = tmp_path / "main.py", tmp_path / "run"
    main.write_text(MAIN.format(root=str(ROOT), tests=str(ROOT / "tests")))
    small = ["--prompt-style", "short", "--max-new-tokens", "8", "--group-size", "4", "--prompts-per-step", "3"]
    small += ["--eval-problems", "3", "--device", "cpu", "--dtype", "fp32", "--lr", "1e-2", "--eval-every", "0"]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    words += ["--standalone", main, "--ckpt", checkpoint_folder, "--run-dir", run_dir, "--resume", "auto"]
    words += ["--steps", "50", "--save-every", "2", "--checksum-every", "1", *small]
    done = subprocess.run(
        list(map(str, words)), cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    assert "train.py: rank 1 left no message: killed, or it hangs" in done.stderr, done.stderr
    again = f"torchrun --nproc-per-node 2 train.py --resume {run_dir}"
    assert f"stopped by SIGTERM after step 5; go on with: {again}" in done.stdout, done.stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-000005\n"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert len((run_dir / "samples.jsonl").read_text().splitlines()) == 5 * 3 * 4  # by one rank only
    assert done.stdout.count("step 1/50") == 1
