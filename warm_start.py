"""Supervised warm start: a model learns the form of a search from written examples, before GRPO trains it.

    python warm_start.py --out assets/countdown-tiny                  # the bundled tiny model, from scratch, in minutes
    python warm_start.py --ckpt FOLDER --out models/cold-started      # an existing checkpoint with its own chat format
    python warm_start.py --ckpt FOLDER --out models/worked --task arithmetic
    python warm_start.py --out models/calls --task calculator         # traces that call a calculator (docs/tools.md)

From scratch: a small byte-pair tokenizer is trained on example responses, called traces (search_traces.py for
Countdown, sum_traces.py for arithmetic). Then a Qwen2 of 0.83 M parameters is trained on a stream of traces that
never repeats. With `--ckpt`, the checkpoint's own tokenizer and chat template and the full prompt style are used, and
far fewer traces are enough. The traces are imperfect on purpose. They teach the form, correct arithmetic and many
habits of search. GRPO (train.py) then reinforces the habits that solve problems.

The loss is the mean over response tokens, the stop token included. The prompt and the results of calls have no loss.
Texts lie end to end without padding. If prompts are longer than traces, use `--traces-per-problem`: several traces then
share one prompt, which is computed once. The same options and seed give the same weights on the same machine with the
same thread count.
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
from typing import Annotated, Literal

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from data_types import Problem, Turn
from math_task import ArithmeticTask, CalculatorTask, CountdownTask
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
from rollout.tool_turns import Environment
from run.flags import one_line, parse_flags
from run.options import Count, NumberOrNone, Positive, Range, Seed, check_ranges
from run.pretrained import locate_pretrained
from run.terminal import complain, printable, run_program, say
from tasks.calculator import CALL_CLOSE, CALL_OPEN, RESULT_CLOSE, RESULT_OPEN
from tasks.call_traces import draw_call_habits, write_calls
from tasks.search_traces import draw_searcher, write_trace
from tasks.sum_traces import draw_habits, write_working
from tasks.task_base import Task
from tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, but ordinary text: decoding shows them
CALL_TAGS = (CALL_OPEN, CALL_CLOSE, RESULT_OPEN, RESULT_CLOSE)
# Patterns that cut text before byte pairs are merged. The tokenizer is saved with Qwen2's own pattern, because
# transformers always uses that one for Qwen2. Merges are learned within finer pieces, so no token joins two signs.
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
RETURN_EVERY = 8  # optimizer steps of a large model between two returns of free memory to the system


Threads = Annotated[int, Range(1, 1024)]


@dataclass
class Options:
    """If a help text gives two defaults, the first is for a new model and the second for --ckpt."""

    out: str = "runs/warm-start"
    """Folder to write the checkpoint to."""
    ckpt: str | None = None
    """Checkpoint to start from, as train.py takes it; None: a new tiny model with a new tokenizer."""
    tokens: Count | None = None
    """Tokens to train on, prompts included; None: 12 M or 300,000."""
    batch_tokens: Count = 3000
    """Tokens per optimizer step. Small batches stay in the CPU's cache and are twice as fast."""
    lr: Positive | None = None
    """Highest learning rate: a short warm-up, then cosine to 0. None: 3e-3 or 1e-5."""
    traces_per_problem: Count = 1
    """Traces per prompt, each with its own habits. The prompt is computed and counted once."""
    room: Count | None = None
    """Longest response, in tokens, its stop token included. Keep it below --max-new-tokens of the later run. None: 172,
    or 256 for arithmetic."""
    task: Literal["countdown", "arithmetic", "calculator"] = "countdown"
    """Task of the examples."""
    numbers: tuple[Count, ...] = (3, 4)
    """Countdown: possible counts of numbers in a problem. A repeated count is drawn more often."""
    max_number: Count = 25
    """Countdown: largest number of a problem."""
    orderly: bool = False
    """Countdown: a search tries all attempts in order from a random first one. Without it, every attempt is random."""
    num_terms: tuple[Count, ...] = (2, 3)
    """Arithmetic and calculator: possible counts of terms in a question."""
    num_digits: tuple[Count, ...] = (1, 2)
    """Arithmetic and calculator: possible counts of digits in a term."""
    operators: str = "+-*"
    """Arithmetic and calculator: the signs between the terms, some of + - *."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights. Masters and moments are always fp32."""
    threads: Threads = 1
    """CPU threads. Another number changes the rounding, and so the model."""
    eval_problems: NumberOrNone = 512
    """Held-out problems of the evaluation at the end; 0: none."""
    seed: Seed = 0
    """Seed of weights, problems and traces."""

    def __post_init__(self) -> None:
        self.tokens = self.tokens or (300_000 if self.ckpt else 12_000_000)
        self.lr = self.lr or (1e-5 if self.ckpt else 3e-3)
        self.room = self.room or (172 if self.task == "countdown" else 256)


# --- the tokenizer and the new model


def make_tokenizer(folder: Path, texts: Iterator[str], vocab_size: int = 576, tags: tuple[str, ...] = TAGS) -> None:
    """Train a byte-level BPE on `texts` and write the tokenizer's files. transformers can open the folder, too.

    tags: one token each, inside of `vocab_size`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _cut(FINER_PIECES)
    backend.decoder = decoders.ByteLevel()
    n_merged = vocab_size - len(SPECIAL_TOKENS) - len(tags)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # with all bytes in the vocabulary, any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=n_merged, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = _cut(QWEN2_PIECES)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
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
    """Configuration of the tiny model, about 0.83 M parameters."""
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
    """Prompts and traces as plain text. `room` counts characters here, because there are no tokens yet."""
    rng = random.Random(f"tokenizer {seed}")
    for index in range(n):
        problem = task.train_problem(index)
        roles = "system\nuser\nassistant\n"
        yield roles + problem.messages[-1]["content"] + "\n"
        yield "".join(turn.text for turn in trace(task, problem, rng, room=400, count_tokens=len))


# --- examples and batches


@dataclass(frozen=True)
class Example:
    """A prompt and the responses to learn, their stop tokens included.

    given: for each response, the indices of tokens without a loss, which a calculator gave. None: there are none.
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    given: list[set[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.responses))


def trace(
    task: Task,
    problem: Problem,
    rng: random.Random,
    room: int,
    count_tokens: Callable[[str], int],
    orderly: bool = False,
) -> list[Turn]:
    """A response to learn, with newly drawn habits. Raises ValueError if it is longer than `room` tokens."""
    if isinstance(task, CountdownTask):
        numbers, target = problem.target["numbers"], problem.target["target"]
        return [Turn(write_trace(numbers, target, draw_searcher(rng, orderly), rng, room, count_tokens), False)]
    expression = problem.messages[-1]["content"].removeprefix("What is ").partition("?")[0]
    if isinstance(task, CalculatorTask):
        turns = write_calls(expression, draw_call_habits(rng))
    else:
        turns = [Turn(write_working(expression, draw_habits(rng)), False)]
    if sum(count_tokens(turn.text) for turn in turns) > room:
        raise ValueError(f"{room} tokens are too few for the working of {expression}; give more --room")
    return turns


def examples(task: Task, tokenizer: Tokenizer, options: Options) -> Iterator[Example]:
    """An endless stream of training problems, each with its traces."""
    named = tokenizer.special_tokens.get("eos_token")
    stop = tokenizer.encode(named) if named else [tokenizer.eos_token_ids[0]]
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
    room = options.room
    assert room is not None  # set by Options.__post_init__

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(opening + text)) + len(stop)

    responses, masks = [], []
    for _ in range(options.traces_per_problem):
        response: list[int] = []
        given: set[int] = set()
        for i, turn in enumerate(trace(task, problem, rng, room, count_tokens, options.orderly)):
            ids = tokenizer.encode(turn.text if i else opening + turn.text)  # turn by turn, as a rollout encodes
            given |= set(range(len(response), len(response) + len(ids))) if turn.given else set()
            response += ids
        responses.append(response + stop)
        masks.append(given)
    return Example(tokenizer.encode(prompt), responses, masks if any(masks) else None)


def batches(stream: Iterator[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Batches of whole examples, each of at least `batch_tokens` tokens."""
    batch: list[Example] = []
    size = 0
    for example in stream:
        batch.append(example)
        size += len(example)
        if size >= batch_tokens:
            yield batch
            batch, size = [], 0


# --- training


def response_loss(model: Qwen2ForCausalLM, batch: list[Example]) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats.

    The first response directly follows its prompt. The other responses to the prompt come after it. Each attends to the
    prompt and to itself, not to another response.
    """
    ids: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    runs: list[Run] = []
    for example in batch:
        start, n_prompt = len(ids), len(example.prompt_ids)
        ids += example.prompt_ids
        for response, given in zip(example.responses, example.given or [set()] * len(example.responses)):
            at = len(ids)
            first = at == start + n_prompt
            runs.append(Run(start, n_prompt + len(response)) if first else Run(at, len(response), start, n_prompt))
            before = [start + n_prompt - 1, *range(at, at + len(response) - 1)]  # token t from the row of t - 1
            rows += [row for t, row in enumerate(before) if t not in given]
            targets += [token for t, token in enumerate(response) if t not in given]
            ids += response
    layout = Layout(runs)
    ids_N, targets_M, rows_M = (torch.tensor(numbers, device=model.device) for numbers in (ids, targets, rows))
    hidden_ND = model.hidden_states(ids_N, layout.positions(model.device), PackedAttention(layout))
    logp, _ = token_logprobs(hidden_ND[rows_M], model.head_weight, targets_M)
    return -logp.mean()


def cosine(done: float, warmup: float = 0.02) -> float:
    """Learning rate as a share of the highest one. `done`: share of the training that is over, 0 to 1."""
    return min(done / warmup, 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Qwen2ForCausalLM, stream: Iterator[Example], options: Options) -> None:
    """Train on `options.tokens` tokens of the stream. Progress is printed every 500 steps, with --ckpt every 10."""
    tokens, lr = options.tokens, options.lr
    assert tokens is not None  # both are set by Options.__post_init__
    assert lr is not None
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    seen, began = 0, time.perf_counter()
    recent: list[float] = []
    for step, batch in enumerate(batches(stream, options.batch_tokens)):
        if seen >= tokens:
            return
        seen += sum(map(len, batch))
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(seen / tokens)
        if options.ckpt and step % RETURN_EVERY == 0:
            return_free_memory()
        with gradients_in_place(options.ckpt is not None):  # saves memory, but the tiny model keeps autograd's rounding
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
    """Rates over the first `n` held-out problems, with one response each."""
    problems = task.test_problems(n)
    prompts = [tokenizer.render_chat(task.prompt(p)) + p.response_prefix for p in problems]
    sampling = SamplingParams(n=1, max_new_tokens=max_new_tokens, temperature=temperature)
    environment = Environment.of(task, problems)
    responses = generate(model, prompts, sampling, tokenizer=tokenizer, seed=0, environment=environment)
    rewards = [
        task.reward(p, r.text) if r.turns is None else task.reward_turns(p, r.turns)
        for p, r in zip(problems, responses, strict=True)
    ]
    sums = [task.diagnostics(p, r.text) for p, r in zip(problems, responses, strict=True)]
    written = sum(s["sums"] for s in sums)
    return {
        "solved": sum(r.parts["answer"] for r in rewards) / n,
        "format": sum(r.parts["format"] for r in rewards) / n,
        "false_sums": sum(s["false_sums"] * s["sums"] for s in sums) / max(written, 1),
        "mean_length": sum(len(r.response_ids) if r.sampled is None else sum(r.sampled) for r in responses) / n,
        "truncated": sum(r.finish_reason == "length" for r in responses) / n,
        "example": responses[0].text,
    }


def report(model, tokenizer: Tokenizer, task: Task, options: Options) -> None:
    """Print the rates of sampled and of greedy responses to held-out problems, each with an example."""
    assert options.room is not None  # set by Options.__post_init__
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        rates = evaluate(model, tokenizer, task, options.eval_problems, options.room + 20, temperature)
        example = rates.pop("example")
        print(f"{name:8}", "  ".join(f"{key} {value:.4f}" for key, value in rates.items()))
        print("        " + printable(example).replace("\n", "\n        "))


def make_task(options: Options) -> Task:
    style = "full" if options.ckpt else "short"
    if options.task == "countdown":
        return CountdownTask(
            numbers=options.numbers, max_number=options.max_number, prompt_style=style, seed=options.seed
        )
    if "/" in options.operators:
        raise ValueError(f"--operators {options.operators!r}: worked examples are written for + - * only")
    return (CalculatorTask if options.task == "calculator" else ArithmeticTask)(
        num_terms=options.num_terms, num_digits=options.num_digits, operators=options.operators,
        prompt_style=style, seed=options.seed,
    )  # fmt: skip


def main(options: Options) -> None:
    check_ranges(options)
    torch.set_num_threads(options.threads)
    task = make_task(options)
    out, dtype = Path(options.out), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder to write to")
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written fails now, not after the training
    if options.ckpt:
        folder = locate_pretrained(options.ckpt)
        tokenizer = Tokenizer.from_pretrained(folder)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        tags = TAGS + CALL_TAGS if options.task == "calculator" else TAGS
        make_tokenizer(out, tokenizer_texts(task, options.seed), tags=tags)
        tokenizer = Tokenizer.from_pretrained(out)
        model = Qwen2ForCausalLM.from_config(tiny_config(tokenizer), dtype=dtype, seed=options.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters, {tokenizer.vocab_size} tokens in the vocabulary")
    train(model, examples(task, tokenizer, options), options)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"written to {out}")
    if options.eval_problems:
        report(model, tokenizer, task, options)


def program(argv: list[str]) -> int:
    try:
        main(parse_flags(Options, argv))
    except (ValueError, OSError) as error:
        complain(f"warm_start.py: {one_line(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_program("warm_start.py", program))
