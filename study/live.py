"""A checkpoint as pages/qwen2.js runs it in a browser, and a problem that shows something.

facts["live"] = live([model], tokenizer, description, ("<|im_start|>user\\n", "[3, 5, 2] = 13", "..."))
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_types import Problem
from math_task import CountdownTask
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from run import snapshots
from run.config import load_config, preset_for
from run.options import BUNDLED_CKPT
from run.pretrained import locate_pretrained
from tokenizer import Tokenizer

LIVE_PARAMETERS = 5_000_000  # a page with more weights would take a browser too long
ALPHABET = "0123456789[], ="  # letters of the bundled model's problems
LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", dtype=np.uint8)
CANDIDATES = 24  # problems among which one is looked for


def why_not_live(parameters: int, description: dict[str, Any]) -> str | None:
    """Why a browser cannot run a checkpoint, in words; None: it can. `description`: its tokenizer.json."""
    if parameters > LIVE_PARAMETERS:
        return f"the model has {parameters:,} parameters, and a page can run at most {LIVE_PARAMETERS:,}"
    if not reads_like_qwen2(description):
        return "the model's tokenizer is of another kind than Qwen2's, and the page's script reads no other"
    return None


def reads_like_qwen2(description: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of the kind that qwen2.js reads: NFC, one split, bytes as letters, merges."""
    normalizer, splits = description.get("normalizer") or {}, description.get("pre_tokenizer") or {}
    kinds = [part.get("type") for part in splits.get("pretokenizers", [])]
    model = description["model"]
    plain = model.get("type") == "BPE" and not model.get("ignore_merges")
    return plain and normalizer.get("type") == "NFC" and kinds == ["Split", "ByteLevel"]


def live(
    models: Sequence[Qwen2ForCausalLM], tokenizer: Tokenizer, description: dict[str, Any], prompt: tuple[str, str, str],
    trained: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that qwen2.js and live.js need; weights are base64 of little-endian fp32.

    prompt: the text before the question, the question, the text behind it. trained: `countdown_form` of the model.
    """
    names = sorted(dict(models[0].named_parameters()))
    return {
        "tokenizer": description,
        "stop": list(tokenizer.eos_token_ids),
        "vocab_size": tokenizer.vocab_size,
        "before": prompt[0],
        "question": prompt[1],
        "after": prompt[2],
        "trained": trained,
        "frequencies": models[0].model.rope.compute_frequencies().tolist(),
        "shapes": [[name, list(models[0].get_parameter(name).shape)] for name in names],
        "weights": [base64_fp32(m.get_parameter(name) for name in names) for m in models],
    }


def scrubbed(run: Path, model: Qwen2ForCausalLM) -> dict[str, Any] | None:
    """The snapshots of a run as scrub.js reads them; None if the run kept none. `model` is the first one of the page.

    Weights are in the order of `live`'s shapes. A number of 12 bits is two base64 letters, the more significant first.
    Raises ValueError for damaged snapshots, and for those of another model.
    """
    if not (run / snapshots.FOLDER / snapshots.START).is_file():
        return None
    first, start, changes = snapshots.read(run)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if {name: w.shape for name, w in start.items()} != shapes:
        raise ValueError(
            f"{run / snapshots.FOLDER} is of another model than --ckpt; expected the checkpoint that the run began with"
        )
    names = sorted(shapes)
    same = all(torch.equal(start[name].float(), model.get_parameter(name)) for name in names)
    return {
        "steps": [first, *changes],
        "start": None if same else base64_fp32(start[name] for name in names),
        "frames": [
            {
                "numbers": "".join(two_characters(change[name].numbers) for name in names),
                "scales": base64_fp32(change[name].scale for name in names),
            }
            for change in changes.values()
        ],
    }


def two_characters(numbers: torch.Tensor) -> str:
    """Whole numbers from -2048 to 2047 as two base64 letters each."""
    values = numbers.flatten().to(torch.int32) + 2048
    pairs = torch.stack([values >> 6, values & 63], dim=-1).flatten()
    return LETTERS[pairs.numpy()].tobytes().decode("ascii")


def base64_fp32(tensors: Iterable[torch.Tensor]) -> str:
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Problems of the bundled model


def countdown_form(description: dict[str, Any]) -> dict[str, Any] | None:
    """The form of problem that the bundled model was trained on: letters of a question, how many numbers, their range.

    description: a checkpoint's tokenizer.json. None if it is not the bundled model's, so that nothing is known.
    """
    bundled = json.loads((locate_pretrained(BUNDLED_CKPT) / "tokenizer.json").read_text(encoding="utf-8"))
    if description["model"] != bundled["model"]:
        return None
    preset = load_config(preset_for(BUNDLED_CKPT))
    return {
        "alphabet": ALPHABET,
        "counts": [min(preset.numbers), max(preset.numbers)],
        "range": [preset.min_number, preset.max_number],
    }


def refuse_unknown_letters(question: str, trained: dict[str, Any] | None) -> None:
    """Raises ValueError for a question with letters that a model has seen in no problem. trained: `countdown_form`."""
    foreign = [c for c in dict.fromkeys(question) if trained and c not in trained["alphabet"]]
    if foreign:
        raise ValueError(
            f"--prompt: the model has never seen {' '.join(map(ascii, foreign[:8]))} in a problem; expected one such as"
            ' --prompt "[3, 5, 2] = 13". With --raw it reads any text'
        )


def telling_problem(models: Sequence[Qwen2ForCausalLM], tokenizer: Tokenizer) -> Problem:
    """A held-out problem whose greedy responses show something, for the page to open with.

    One model: it solves the problem, and of those that it solves it writes the most sums for this one. Two: the first
    model's answer is wrong and the second one's is right. If there is no such problem, then one that the last model
    solves, and otherwise the first of all.
    """
    preset = load_config(preset_for(BUNDLED_CKPT))
    task = CountdownTask(
        numbers=preset.numbers, min_number=preset.min_number, max_number=preset.max_number, prompt_style="short"
    )
    problems = task.test_problems(CANDIDATES)
    prompts = [tokenizer.render_chat(p.messages) + p.response_prefix for p in problems]
    greedy = SamplingParams(n=1, max_new_tokens=96, temperature=0.0)
    texts = [[c.text for c in generate(model, prompts, greedy, tokenizer=tokenizer)] for model in models]
    right = [[task.reward(p, text).parts["answer"] == 1.0 for p, text in zip(problems, column)] for column in texts]
    solved = [i for i in range(len(problems)) if right[-1][i]]
    telling = [i for i in solved if not right[0][i]]
    if len(models) == 1:
        telling = sorted(solved, key=lambda i: -texts[0][i].count("="))
    return problems[next(iter([*telling, *solved]), 0)]
