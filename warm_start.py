"""Supervised warm start: a model that has never searched learns the form of a search from written-out examples.

    python warm_start.py --out assets/countdown-tiny                  # the bundled tiny model, from nothing, in minutes
    python warm_start.py --ckpt FOLDER --out models/cold-started      # an existing checkpoint, in its own words
    python warm_start.py --ckpt FOLDER --out models/worked --task arithmetic

From nothing: a small byte-pair tokenizer is trained on traces (search_traces.py for Countdown, sum_traces.py for
arithmetic), and then a Qwen2 of 0.83 M parameters on a stream of them that never repeats. With `--ckpt`, the
checkpoint's own tokenizer, chat template and the full prompt style are used, and far fewer traces are enough. They
are imperfect on purpose: what is learnt here is the form, honest arithmetic and a wide mix of habits; which of them
solve problems is what GRPO finds out (train.py).

The loss is the mean over response tokens, the stop token included; the prompt is read and not learnt. Texts lie end to
end without padding. Where prompts are longer than traces, `--traces-per-problem` writes several under each, which is
read once for all of them. The same options and seed give the same weights on the same machine with the same thread
count.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import tyro
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from data_types import Problem
from math_task import ArithmeticTask, CountdownTask
from model.attention import PackedAttention
from model.head_logprobs import token_logprobs
from model.layout import Layout, Run
from model.linear import gradients_in_place
from model.memory import return_free_memory
from model.qwen2_config import Qwen2Config
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.flags import one_line
from run.pretrained import locate_pretrained
from run.terminal import complain, run_program
from tasks.search_traces import draw_searcher, write_trace
from tasks.sum_traces import draw_habits, write_working
from tasks.task_base import Task
from tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, but ordinary text: decoding shows them
# How text is cut before byte pairs are merged. The tokenizer is saved with Qwen2's own pattern, which transformers puts
# in place whatever the file says; merges are learnt within finer pieces, so that no two signs are ever glued together.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FINER_PIECES = r"\n|[0-9]| ?[A-Za-z]+| ?=|[^A-Za-z0-9]"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RETURN_EVERY = 8  # optimizer steps of a large model after which freed memory goes back to the system


@dataclass
class Options:
    """Where two defaults are given, the first is for a fresh model and the second for --ckpt."""

    out: str = "runs/warm-start"
    """Folder to write the checkpoint to."""
    ckpt: str | None = None
    """Checkpoint to start from, as train.py takes it; None: a fresh tiny model with a fresh tokenizer."""
    tokens: int | None = None
    """Tokens to train on, prompts included; None: 12 M or 300,000."""
    batch_tokens: int = 3000
    """Tokens an optimizer step; small batches stay in the cache and are twice as fast on a CPU."""
    lr: float | None = None
    """Highest learning rate, cosine to 0 after a short warm-up; None: 3e-3 or 1e-5."""
    traces_per_problem: int = 1
    """Traces under each prompt, with habits of their own; the prompt is computed and counted once."""
    room: int | None = None
    """Longest response, in tokens, its stop token included: less than the cap of the run that follows; None: 172, or
    256 for arithmetic, whose longest working has a size of its own."""
    task: Literal["countdown", "arithmetic"] = "countdown"
    """What the examples are of."""
    numbers: tuple[int, ...] = (3, 4)
    """Countdown: how many numbers a problem may have; repeat one to see it more often."""
    max_number: int = 25
    """Countdown: largest number of a problem."""
    orderly: bool = False
    """Countdown: searches go through the attempts in order from one drawn at random; without it, all are drawn."""
    num_terms: tuple[int, ...] = (2, 3)
    """Arithmetic: how many terms a question may have."""
    num_digits: tuple[int, ...] = (1, 2)
    """Arithmetic: how many digits a term may have."""
    operators: str = "+-*"
    """Arithmetic: the signs between the terms, some of + - *."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights; masters and moments are fp32 either way."""
    threads: int = 1
    """CPU threads. Another number gives other roundings and so another model."""
    eval_problems: int = 512
    """Held-out problems of the closing evaluation; 0: none."""
    seed: int = 0
    """Seed of weights, problems and traces."""

    def __post_init__(self):
        self.tokens = self.tokens or (300_000 if self.ckpt else 12_000_000)
        self.lr = self.lr or (1e-5 if self.ckpt else 3e-3)
        self.room = self.room or (256 if self.task == "arithmetic" else 172)


# --- the tokenizer and the fresh model


def make_tokenizer(folder: Path, texts: Iterator[str], vocab_size: int = 576) -> None:
    """Train a byte-level BPE on `texts` and write the tokenizer's files, so that transformers opens the folder."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _cut(FINER_PIECES)
    backend.decoder = decoders.ByteLevel()
    n_merged = vocab_size - len(SPECIAL_TOKENS) - len(TAGS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # any text can be encoded, byte by byte if need be
    trainer = trainers.BpeTrainer(vocab_size=n_merged, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = _cut(QWEN2_PIECES)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    end_of_text, _, im_end = (backend.token_to_id(token) for token in SPECIAL_TOKENS)
    generation = {"eos_token_id": [im_end, end_of_text], "pad_token_id": end_of_text, "do_sample": True}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", generation)


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tiny_config(tokenizer: Tokenizer) -> Qwen2Config:
    """About 0.83 M parameters."""
    im_end = tokenizer.encode("<|im_end|>")[0]
    return Qwen2Config.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": im_end,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )


def tokenizer_texts(task: Task, seed: int, n: int = 5000) -> Iterator[str]:
    """Prompts and traces in plain text. `room` is in characters here: there are no tokens yet."""
    rng = random.Random(f"tokenizer {seed}")
    for index in range(n):
        problem = task.train_problem(index)
        roles = "system\nuser\nassistant\n"
        yield roles + problem.messages[-1]["content"] + "\n"
        yield trace(task, problem, rng, room=400, count_tokens=len)


# --- examples and batches


@dataclass(frozen=True)
class Example:
    """A prompt and the responses to learn, their stop tokens included."""

    prompt_ids: list[int]
    responses: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.responses))


def trace(
    task: Task,
    problem: Problem,
    rng: random.Random,
    room: int,
    count_tokens: Callable[[str], int],
    orderly: bool = False,
) -> str:
    """The response to learn, with habits drawn anew. Raises ValueError where `room` tokens do not hold it."""
    if isinstance(task, CountdownTask):
        numbers, target = problem.target["numbers"], problem.target["target"]
        return write_trace(numbers, target, draw_searcher(rng, orderly), rng, room, count_tokens)
    expression = problem.messages[-1]["content"].removeprefix("What is ").partition("?")[0]
    text = write_working(expression, draw_habits(rng))
    if count_tokens(text) > room:
        raise ValueError(f"{room} tokens do not hold {expression} worked out; give more --room")
    return text


def examples(task: Task, tokenizer: Tokenizer, options: Options) -> Iterator[Example]:
    """An endless stream of training problems, each with its traces."""
    stop = tokenizer.encode(tokenizer.special_tokens["eos_token"])
    rng = random.Random(f"traces {options.seed}")
    index = 0
    while True:
        problem = task.train_problem(index)
        yield make_example(task, tokenizer, problem, rng, options, stop)
        index += 1


def make_example(
    task: Task, tokenizer: Tokenizer, problem: Problem, rng: random.Random, options: Options, stop: list[int]
) -> Example:
    prompt = tokenizer.render_chat(task.prompt(problem)) + problem.response_prefix
    opening = "" if prompt.endswith("\n") else "\n"

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(opening + text)) + len(stop)

    texts = [
        trace(task, problem, rng, options.room, count_tokens, options.orderly)
        for _ in range(options.traces_per_problem)
    ]
    return Example(tokenizer.encode(prompt), [tokenizer.encode(opening + text) + stop for text in texts])


def batches(stream: Iterator[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Batches of whole examples, each of at least `batch_tokens` tokens."""
    batch, size = [], 0
    for example in stream:
        batch.append(example)
        size += len(example)
        if size >= batch_tokens:
            yield batch
            batch, size = [], 0


# --- training


def response_loss(model: Qwen2ForCausalLM, batch: list[Example]) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats.

    The first response goes on from its prompt; its siblings lie behind it, and see the prompt and not each other.
    """
    ids, targets, rows, runs = [], [], [], []
    for example in batch:
        start, n_prompt = len(ids), len(example.prompt_ids)
        ids += example.prompt_ids
        for response in example.responses:
            at = len(ids)
            first = at == start + n_prompt
            runs.append(Run(start, n_prompt + len(response)) if first else Run(at, len(response), start, n_prompt))
            rows += [start + n_prompt - 1, *range(at, at + len(response) - 1)]  # token t from the row of t - 1
            targets += response
            ids += response
    layout = Layout(runs)
    ids, targets, rows = (torch.tensor(numbers, device=model.device) for numbers in (ids, targets, rows))
    hidden = model.hidden_states(ids, layout.positions(model.device), PackedAttention(layout))
    logp, _ = token_logprobs(hidden[rows], model.head_weight, targets)
    return -logp.mean()


def cosine(done: float, warmup: float = 0.02) -> float:
    """Share of the highest learning rate when the share `done` of the training is over."""
    return min(done / warmup, 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Qwen2ForCausalLM, stream: Iterator[Example], options: Options) -> None:
    """Train on `options.tokens` tokens of the stream, a line of progress every 500 steps, every 10 with --ckpt."""
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    seen, began, recent = 0, time.perf_counter(), []
    for step, batch in enumerate(batches(stream, options.batch_tokens)):
        if seen >= options.tokens:
            return
        seen += sum(map(len, batch))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine(seen / options.tokens)
        if options.ckpt and step % RETURN_EVERY == 0:
            return_free_memory()
        with gradients_in_place(options.ckpt is not None):  # memory; a fresh tiny model keeps autograd's own rounding
            loss = response_loss(model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % (10 if options.ckpt else 500) == 0:
            seconds = time.perf_counter() - began
            print(f"{seen / 1e6:7.2f} M tokens {seconds:6.0f} s  {seen / seconds:7.0f} tokens/s  "
                  f"loss {sum(recent) / len(recent):.4f}", flush=True)  # fmt: skip
            recent = []


# --- evaluation


def evaluate(model, tokenizer: Tokenizer, task: Task, n: int, max_new_tokens: int, temperature: float) -> dict:
    """Rates over the first `n` held-out problems, an answer each."""
    problems = task.test_problems(n)
    prompts = [tokenizer.render_chat(task.prompt(p)) + p.response_prefix for p in problems]
    sampling = SamplingParams(n=1, max_new_tokens=max_new_tokens, temperature=temperature)
    answers = generate(model, prompts, sampling, tokenizer=tokenizer, seed=0)
    rewards = [task.reward(p, a.text) for p, a in zip(problems, answers, strict=True)]
    sums = [task.diagnostics(p, a.text) for p, a in zip(problems, answers, strict=True)]
    written = sum(s["sums"] for s in sums)
    return {
        "solved": sum(r.parts["answer"] for r in rewards) / n,
        "format": sum(r.parts["format"] for r in rewards) / n,
        "false_sums": sum(s["false_sums"] * s["sums"] for s in sums) / max(written, 1),
        "mean_length": sum(len(a.response_ids) for a in answers) / n,
        "truncated": sum(a.finish_reason == "length" for a in answers) / n,
        "example": answers[0].text,
    }


def report(model, tokenizer: Tokenizer, task: Task, options: Options) -> None:
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        rates = evaluate(model, tokenizer, task, options.eval_problems, options.room + 20, temperature)
        example = rates.pop("example")
        print(f"{name:8}", "  ".join(f"{key} {value:.4f}" for key, value in rates.items()))
        print("        " + example.replace("\n", "\n        "))


def make_task(options: Options) -> Task:
    common = {"prompt_style": "full" if options.ckpt else "short", "seed": options.seed}
    if options.task == "countdown":
        return CountdownTask(numbers=options.numbers, max_number=options.max_number, **common)
    if "/" in options.operators:
        raise ValueError(f"--operators {options.operators!r}: worked examples are written for + - * only")
    return ArithmeticTask(
        num_terms=options.num_terms, num_digits=options.num_digits, operators=options.operators, **common
    )


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    task = make_task(options)
    if options.traces_per_problem < 1:
        raise ValueError(f"--traces-per-problem {options.traces_per_problem}, expected 1 or more")
    out, dtype = Path(options.out), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder to write to")
    out.mkdir(parents=True, exist_ok=True)  # what can not be written shows now, not after the training
    if options.ckpt:
        folder = locate_pretrained(options.ckpt)
        tokenizer = Tokenizer.from_pretrained(folder)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        make_tokenizer(out, tokenizer_texts(task, options.seed))
        tokenizer = Tokenizer.from_pretrained(out)
        model = Qwen2ForCausalLM.from_config(tiny_config(tokenizer), dtype=dtype, seed=options.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters, {tokenizer.vocab_size} tokens in the vocabulary")
    train(model, examples(task, tokenizer, options), options)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written to {out}")
    if options.eval_problems:
        report(model, tokenizer, task, options)


def program(argv: list[str]) -> int:
    try:
        main(tyro.cli(Options, args=argv, description=__doc__))
    except (ValueError, OSError) as error:
        complain(f"error: {one_line(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_program("warm_start.py", program))
