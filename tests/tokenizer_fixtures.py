"""Checkpoint folders with a small tokenizer and no weights, for the tests of the tokenizer."""

import json
from pathlib import Path

import tokenizers

CHATML = (
    "{%- for message in messages %}\n    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
MESSAGES = [{"role": "user", "content": 'Use [3, 5] & <b>"é"</b>.'}, {"role": "assistant", "content": "so\n 8 🙂"}]
TEXTS = [
    "",
    " ",
    "a  b\n\n\tc",
    "12345 ten",
    "日本語 🙂 é",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|endoftext|><|im_end|>y",
    "\x00",
]


def write_checkpoint(folder, template=CHATML, config=None, generation=None, adds_bos=False, **tokenizer_config):
    """A checkpoint folder with a byte-level BPE tokenizer of 259 + some tokens and the ChatML tokens. No weights."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the user and the assistant use numbers " * 3], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if adds_bos:
        bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
        backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [bos])
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"chat_template": template, **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def id_of(folder, token):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
