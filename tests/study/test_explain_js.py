"""pages/qwen2.js without a browser, in Node: every family's logits, and the tokenizer on whatever text there is."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model

import explain
from qwen2_llm import Qwen2ForCausalLM
from run.pretrained import locate_pretrained
from study.live import live, reads_like_qwen2
from tokenizer import Tokenizer

NODE = shutil.which("node")
PAGES = Path(explain.__file__).parent / "study" / "pages"
pytestmark = pytest.mark.skipif(NODE is None, reason="no Node on this machine")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
ALPHABET = "abzAZ019 \t\n\r'.,!?<>|=+*/()[]{}_-éßñ½²٣你好🙂\u0301\u00a0\u0085\u2028\u200d\ufeff"


def run_node(body: str, given: dict) -> object:
    """The result of the function body for `given`, with the names of qwen2.js in reach."""
    script = f"""
        const {{ Qwen2, fp32, BPE, filtered }} = require({json.dumps(str(PAGES / "qwen2.js"))});
        const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
        process.stdout.write(JSON.stringify((() => {{ {body} }})()));
    """
    done = subprocess.run([NODE, "-e", script], input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"model_type": "qwen3", "qk_norm": True, "attention_bias": False},
     {"model_type": "llama", "attention_bias": True, "rope_scaling": LLAMA3}, {"num_key_value_heads": 1}],
)  # fmt: skip
def test_logits_of_every_family_are_pytorchs(changes):
    model: Qwen2ForCausalLM = make_model(make_config(**changes))
    tokenizer = Tokenizer.from_pretrained(locate_pretrained("countdown-tiny"))
    facts = live([model], tokenizer, {}, ("", "", ""))
    ids = torch.randint(275, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = run_node(
        """const model = new Qwen2(given.config, given.live, fp32(given.live.weights[0])), cache = model.newCache();
           return given.ids.map((id) => Array.from(model.step(id, cache).logits));""",
        {"config": model.config.to_dict(), "live": facts, "ids": ids},
    )
    torch.testing.assert_close(torch.tensor(logits), model(torch.tensor([ids]))[0], atol=1e-4, rtol=1e-4)


def test_ids_of_random_texts_are_pythons():
    folder = locate_pretrained("countdown-tiny")
    rng = random.Random(0)
    special = ["<|im_end|>", "<think>", "</answer>", " answer", "assistant", " ok", "I'll", "WE'VE"]
    texts = ["".join(rng.choice([*ALPHABET, *special]) for _ in range(rng.randrange(30))) for _ in range(500)]
    ids = run_node(
        "const bpe = new BPE(given.tokenizer); return given.texts.map((text) => bpe.encode(text));",
        {"tokenizer": json.loads((folder / "tokenizer.json").read_text()), "texts": texts},
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    for text, found in zip(texts, ids):
        assert found == tokenizer.encode(text), ascii(text)


def test_only_tokenizers_that_the_page_can_read_make_it_live():
    description = json.loads((locate_pretrained("countdown-tiny") / "tokenizer.json").read_text())
    assert reads_like_qwen2(description)
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
    for change in ({"normalizer": None}, {"pre_tokenizer": digits}, {"pre_tokenizer": {"type": "ByteLevel"}},
                   {"model": {"type": "Unigram"}}):  # fmt: skip
        assert not reads_like_qwen2(description | change)
