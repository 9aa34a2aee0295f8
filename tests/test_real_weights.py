"""Released checkpoints against transformers. Opt-in: NANOGRPO_CHECKPOINTS=FOLDER pytest -m weights -s

FOLDER holds checkpoint folders, such as Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct. Every one is tested.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from model.attention import EagerAttention, KVCache, PrefillAttention
from model.layout import Layout
from qwen2_llm import Qwen2ForCausalLM
from rollout.generation import generate
from rollout.sampling import SamplingParams
from tokenizer import Tokenizer

pytestmark = pytest.mark.weights
ROOT = os.environ.get("NANOGRPO_CHECKPOINTS")
FOLDERS = sorted(path.parent for path in Path(ROOT).glob("*/config.json")) if ROOT else []
TEXTS = [
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Using the numbers [44, 19, 35], create an equation that equals 98. Show your work in <think> </think> tags.",
]


@pytest.fixture(scope="module", params=FOLDERS or [None], ids=lambda folder: folder.name if folder else "none")
def folder(request) -> Path:
    if request.param is None:
        pytest.fail("set NANOGRPO_CHECKPOINTS to a folder that holds checkpoint folders")
    return request.param


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, torch.float32)


@pytest.fixture(scope="module")
def theirs(folder) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    chat = tokenizer.render_chat([{"role": "user", "content": TEXTS[2]}])
    return [tokenizer.encode(text) for text in (*TEXTS, chat)]


def test_token_ids_equal_transformers(folder, tokenizer):
    """CHECKLIST 12. PreTrainedTokenizerFast reads tokenizer.json as it is, for any class that the folder names."""
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": TEXTS[2]}]
    chat = tokenizer.render_chat(messages)
    assert chat == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for text in (*TEXTS, chat, "日本語 🙂\n\n  12345"):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


@torch.no_grad()
def test_fp32_logits_equal_transformers(ours, theirs, prompts):
    """CHECKLIST 26. Within 2e-3, the shorter ones padded in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    logits = ours(ids, mask)
    worst = 0.0
    for row, prompt in enumerate(prompts):
        expected = theirs(input_ids=torch.tensor([prompt])).logits[0]
        worst = max(worst, (logits[row, -len(prompt) :] - expected).abs().max().item())
    print(f"\nlargest difference of fp32 logits: {worst:.2e}")
    assert worst < 2e-3


@torch.no_grad()
def test_the_same_64_greedy_tokens(ours, theirs, tokenizer, prompts):
    """CHECKLIST 26, CHECKLIST 27. All prompts decoded in one ragged batch, against transformers one by one."""
    params = SamplingParams(n=1, max_new_tokens=64, temperature=0.0)
    compared = 0
    for completion in generate(ours, prompts, params, tokenizer=tokenizer):
        prompt = torch.tensor([completion.prompt_ids])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, temperature=None,
            top_p=None, top_k=None, repetition_penalty=1.0, eos_token_id=list(tokenizer.eos_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert completion.response_ids == expected[0, prompt.shape[1] :].tolist()
        compared += len(completion.response_ids)
    print(f"\n{compared} greedy tokens of {len(prompts)} prompts are the same")
    assert compared >= 64


@torch.no_grad()
def test_cached_equals_uncached(ours, prompts):
    """CHECKLIST 27. The last 8 tokens of each prompt through the cache in chunks of 3, 4 and 1, eager as reference."""
    starts = [prompt[:-8] or prompt[:1] for prompt in prompts if len(prompt) > 9]
    ends = [prompt[-8:] for prompt in prompts if len(prompt) > 9]
    prefill = PrefillAttention([len(start) for start in starts])
    flat = torch.tensor([token for start in starts for token in start])
    ours.hidden_states(flat, prefill.layout.positions(), prefill)
    cache, new, parts = KVCache.from_prefill(prefill, copies=1, room=8), torch.tensor(ends), []
    for part in new.split([3, 4, 1], dim=1):
        hidden = ours.hidden_states(part.flatten(), cache.positions(part.shape[1]).flatten(), cache.attend)
        parts.append(ours.logits(hidden).unflatten(0, part.shape))
        cache.advance(part.shape[1])
    worst = 0.0
    for mine, start, end in zip(torch.cat(parts, dim=1), starts, ends, strict=True):
        layout = Layout.causal([len(start) + 8])
        hidden = ours.hidden_states(torch.tensor(start + end), layout.positions(), EagerAttention(layout.mask()))
        worst = max(worst, (mine - ours.logits(hidden[-8:])).abs().max().item())
    print(f"\nlargest difference of cached and uncached fp32 logits: {worst:.2e}")
    assert worst < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_samplers_logprobs_are_the_trainers(dtype, folder, ours, tokenizer, prompts):
    """CHECKLIST 2. Cached, packed decoding against one forward of the whole text, at temperature 0.9."""
    model = ours if dtype == torch.float32 else Qwen2ForCausalLM.from_pretrained(folder, dtype)
    params, differences = SamplingParams(n=2, max_new_tokens=24, temperature=0.9), []
    for completion in generate(model, prompts, params, tokenizer=tokenizer):
        ids = completion.prompt_ids + completion.response_ids
        logits = model(torch.tensor([ids]))[0, len(completion.prompt_ids) - 1 : -1, : tokenizer.vocab_size]
        rows = (logits.float() / 0.9).log_softmax(dim=-1)
        expected = rows.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
        differences.append((torch.tensor(completion.logprobs) - expected).abs())
    differences = torch.cat(differences)
    print(
        f"\n{dtype}: log-probabilities differ by {differences.mean():.1e} on average, {differences.max():.1e} at most"
    )
    assert differences.max() < (1e-3 if dtype == torch.float32 else 0.5)
