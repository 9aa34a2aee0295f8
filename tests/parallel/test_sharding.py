"""Weights, gradients and optimizer state in slices (FSDP2): the same steps as one process with all of them, and
checkpoints that any number of processes goes on from."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, write_tokenizer
from ranks import run_ranks, values_of
from safetensors.torch import load_file
from test_distributed import FirstLetter, Recorder, assert_close, one_group_learns, steps, uneven_episodes
from test_grpo import EvenLetters, near

import grpo
import train
from grpo import update_policy
from model.lora import trainable
from parallel import distributed
from parallel.sharding import ShardedAdamW, is_sharded, shard, whole

UNEVEN = {"vocab_size": 275, "hidden_size": 32, "intermediate_size": 50}  # 275 and 50 do not divide by 2 or 3


class ShardedRecorder(ShardedAdamW):
    """Keeps the slices of the gradients that it is given, and moves nothing."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for p in self.slices]


def sliced_gradients(episodes, **options) -> dict:
    """The gradient of a sharded model, in one piece, and the metrics. Of one that is not, from the recorder."""
    model = make_model(make_config(**UNEVEN))
    model.model.gradient_checkpointing = options.pop("gradient_checkpointing", False)
    episodes = near(make_model(make_config(**UNEVEN)), episodes)
    shard(model)
    recorder = ShardedRecorder(trainable(model)) if is_sharded(model) else Recorder(model)
    metrics = update_policy(model, recorder, episodes, max_grad_norm=1e9, micro_batch_tokens=40, **options)
    if not is_sharded(model):
        return {"gradients": recorder.seen, "metrics": metrics}
    rows = {}
    for (name, p), mine in zip(model.named_parameters(), recorder.seen):
        parts = distributed.gather_each(mine)
        rows[name] = torch.cat(parts)
        assert len(parts) == distributed.world_size()
        assert rows[name].shape == p.shape
    return {"gradients": rows, "metrics": metrics}


def memory_of_a_rank() -> dict:
    """Bytes of weights, and of optimizer state, on this rank, and whether a whole copy is the model that was."""
    model = shard(make_model())
    optimizer = ShardedAdamW(trainable(model), lr=0.1)
    for p in optimizer.sharded:
        p.grad = torch.ones_like(p)
    optimizer.take_gradients()
    optimizer.step()
    copy, expected = whole(model), dict(make_model().named_parameters())
    return {
        "weights": sum(p.to_local().nbytes for p in model.parameters()),
        "state": optimizer.state_bytes(),
        "moved by": [round((expected[name] - p).abs().max().item(), 6) for name, p in copy.named_parameters()],
        "plain": not is_sharded(copy) and [n for n, _ in copy.named_parameters()] == list(expected),
    }


def runs_out_of_memory() -> str:
    def no_room(*args):
        raise MemoryError

    real, grpo.micro_batch_loss = grpo.micro_batch_loss, no_room
    try:
        sliced_gradients(uneven_episodes())
    except distributed.RankError as error:
        return str(error)
    finally:
        grpo.micro_batch_loss = real
    return "nothing"


def sliced_steps(folder: Path, **settings) -> dict:
    """`steps` of test_distributed with a sharded model. The weights in one piece."""
    kept, real = [], grpo.GRPO.__init__

    def remember(trainer, *args, **options):
        real(trainer, *args, **options)
        kept.append(trainer)

    grpo.GRPO.__init__ = remember
    try:
        result = steps(folder, shard_weights=True, **settings)
    finally:
        grpo.GRPO.__init__ = real
    return result | {"weights": dict(whole(kept[0].model).named_parameters())}


REFERENCED = {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.01}


CORRECTED = {"importance_correction": "mask_sequence", "top_entropy_share": 0.5}


def everything(folder: Path) -> dict:
    reference = make_model(make_config(**UNEVEN), seed=5)
    return {
        "dapo": sliced_gradients(uneven_episodes()),
        "checkpointed": sliced_gradients(uneven_episodes(), gradient_checkpointing=True),
        "one group learns": sliced_gradients(one_group_learns()),
        "with a reference": sliced_gradients(uneven_episodes(), reference=shard(reference), **REFERENCED),
        "dropped and refilled": sliced_steps(
            folder, task=FirstLetter(), group_size=2, drop_zero_variance=True, refill_rounds=2
        ),
        "all terms": sliced_steps(
            folder,
            beta=0.1,
            kl="ot",
            updates_per_rollout=2,
            importance_correction="mask_sequence",
            top_entropy_share=0.5,
        ),
        "adapters": sliced_steps(folder, prompts_per_step=2, lora_rank=3, beta=0.1),
    }


def in_slices_only() -> dict:
    return {"memory": memory_of_a_rank(), "no room": runs_out_of_memory()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return {1: [everything(folder)]} | {n: values_of(run_ranks(n, everything, folder)) for n in (2, 3)}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["dapo", "checkpointed", "one group learns", "with a reference"])
def test_gradients_in_slices_are_those_of_one_process(results, n, name):
    """Slices of unequal size, ranks with fewer micro-batches or none, a sharded reference."""
    [expected] = (result[name] for result in results[1])
    assert all(grad.abs().max() > 0 for grad in expected["gradients"].values())
    for rank, result in enumerate(results[n]):
        assert_close(result[name], expected, f"rank {rank} of {n}, {name}")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["dropped and refilled", "all terms", "adapters"])
def test_three_steps_in_slices_lead_where_those_of_one_process_lead(results, n, name):
    [expected] = (result[name] for result in results[1])
    assert all(not metrics["update/skipped"] for metrics in expected["metrics"])
    for rank, result in enumerate(results[n]):
        assert_close(result[name], expected, f"rank {rank} of {n}, {name}")


def test_a_rank_holds_its_slices_only_and_says_when_they_do_not_fit():
    whole_model = sum(p.nbytes for p in make_model().parameters())
    for rank, result in enumerate(values_of(run_ranks(3, in_slices_only))):
        memory = result["memory"]
        assert memory["weights"] < 0.36 * whole_model
        assert memory["state"] < 0.36 * 2 * whole_model + 4 * 100  # two moments; a step count each
        assert set(memory["moved by"]) == {0.1}
        assert memory["plain"]
        assert f"rank {rank} ran out of memory" in result["no room"]
        assert "--micro-batch-tokens" in result["no room"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


SMALL = ["--prompt-style", "short", "--max-new-tokens", "6", "--group-size", "3", "--prompts-per-step", "3"]
SMALL += ["--eval-problems", "0", "--device", "cpu", "--lr", "0.1", "--eps", "1.0", "--save-every", "2"]


def job(*words: object) -> int:
    train.task_from_config = lambda config: EvenLetters(seed=config.seed)
    return train.main([str(word) for word in words])


@pytest.fixture(autouse=True)
def _the_job_takes_over():
    """Ctrl-C, and here the task. Give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    task = train.task_from_config
    yield
    train.task_from_config = task
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_of(run_dir: Path, step: int) -> dict:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    state = json.loads((folder / "trainer_state.json").read_text())
    names = ["model.safetensors", "optimizer.safetensors"]
    names += ["adapter/adapter_model.safetensors"] if (folder / "adapter").is_dir() else []
    return {name: load_file(folder / name) for name in names} | {"settings": state["optimizer"]}


@pytest.mark.parametrize("settings", [["--dtype", "fp32"], ["--dtype", "fp32", "--lora-rank", 2]], ids=["all", "lora"])
def test_a_run_goes_on_with_another_number_of_processes(checkpoint_folder, tmp_path, settings):
    """Two sharded, then three sharded, then one: weights, moments and adapters are those of one process all along."""
    common = ["--ckpt", checkpoint_folder, *SMALL, *settings]
    assert job(*common, "--steps", 6, "--run-dir", tmp_path / "one") == 0
    begin = [*common, "--run-dir", tmp_path / "many", "--shard-weights", "--steps", 2]
    assert values_of(run_ranks(2, job, *begin)) == [0, 0]
    assert values_of(run_ranks(3, job, "--resume", tmp_path / "many", "--steps", 4)) == [0, 0, 0]
    assert job("--resume", tmp_path / "many", "--no-shard-weights", "--steps", 6) == 0
    for step in (2, 4, 6):
        found, expected = (end_of(tmp_path / name, step) for name in ("many", "one"))
        assert found["settings"] == expected["settings"]
        assert_close(found, {k: v for k, v in expected.items() if k != "settings"}, f"step {step}")
    rows = [json.loads(line)["step"] for line in (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]
