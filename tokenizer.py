"""Text to token ids and back, and messages to a prompt: what a checkpoint folder says about its tokenizer.

The `tokenizers` library does the splitting (tokenizer.json); this room reads the small files around it. Where it
departs from transformers' tokenizers, and why:

- `encode` never adds a special token. A prompt is text that a chat template has already completed, and a second BOS in
  front of it is a fault nobody sees. Special tokens *written in* the text (`<|im_start|>`) become their ids.
- `eos_token_ids` holds every stop id that any file of the folder names: Qwen stops at 151645 and at 151643.
- `vocab_size` counts the ids that the tokenizer can produce, not the rows of the embedding (Qwen2.5: 151,665 against
  151,936), because ids beyond it must never be sampled.
- generation_config.json is read for stop ids and for nothing else: a repetition penalty made for chatting would bend
  the policy that is being trained.

    tokenizer = Tokenizer.from_pretrained(folder)
    prompt    = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    ids       = tokenizer.encode(prompt)
    text      = tokenizer.decode(ids)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from data_types import Message
from model.chat_template import ChatTemplate

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in use has some 35 MB

# What `save_pretrained` copies. generation_config.json is among them: the stop ids would be lost without it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop ids.

    vocab_size: highest id the tokenizer can produce, plus 1.
    eos_token_ids: tuple of every stop id, ascending; never empty.
    pad_token_id: what fills padded rows. Never a mask: masks come from lengths.
    special_tokens: {"eos_token": "<|im_end|>", ...}, the variables of that name in the chat template.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    special_tokens: dict[str, str]

    def __init__(self, files: dict[str, bytes], model_config: dict[str, Any], folder: Path):
        self._files, self._folder = files, folder
        self._backend = _load_backend(files["tokenizer.json"], folder / "tokenizer.json")
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        settings = _parse_object(files.get("tokenizer_config.json", b"{}"), folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(settings, folder)
        self.eos_token_ids = self._stop_ids(model_config)
        self.pad_token_id = self._pad_id(model_config)
        source = _template_source(files, settings, folder)
        self._template = None if source is None else _compile(source, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it.

        Raises FileNotFoundError where the folder or its tokenizer.json is missing, ValueError where a file is not what
        it should be; one line each, with the file's name.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            there = "the folder has none" if folder.is_dir() else "there is no such folder"
            raise FileNotFoundError(
                f"no tokenizer: looked for {folder / 'tokenizer.json'}, but {there}; "
                "give the folder of a complete checkpoint, with its tokenizer.json"
            )
        files = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
        config = folder / "config.json"
        return cls(files, _parse_object(_read(config), config) if config.is_file() else {}, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files as they were read, so that the folder is a checkpoint that transformers opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and of nothing else: no BOS, no EOS. Special tokens written in the text become their ids."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair, from broken JSON: no UTF-8 can hold it
            raise ValueError(f"cannot encode {_short(ascii(text))}: expected text that UTF-8 can hold") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that are no tokens become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: list[Message], add_generation_prompt: bool = True, **template_variables: Any
    ) -> str:
        """The prompt of a conversation, by the checkpoint's chat template, special tokens written out as text.

        With `add_generation_prompt` it ends where the assistant begins to speak. Further keywords are variables of the
        template (`tools`, `enable_thinking`, ...). Raises ValueError without a template, or where it fails (see
        chat_template.py for its bounds).
        """
        if self._template is None:
            raise ValueError(
                f"no chat template: {self._folder} has neither chat_template.jinja nor a 'chat_template' in "
                "tokenizer_config.json; take an instruct checkpoint, or put a chat_template.jinja there"
            )
        variables = {"tools": None, "documents": None, **self.special_tokens, **template_variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error

    def _stop_ids(self, model_config: dict[str, Any]) -> tuple[int, ...]:
        """Every stop id, from the three files that may name one."""
        generation = self._folder / "generation_config.json"
        generation_config = _parse_object(self._files.get(generation.name, b"{}"), generation)
        found = self._ids(generation_config.get("eos_token_id"), f"eos_token_id in {generation}")
        found |= self._ids(model_config.get("eos_token_id"), f"eos_token_id in {self._folder / 'config.json'}")
        if "eos_token" in self.special_tokens:
            found.add(self._special_id("eos_token"))
        if not found:
            raise ValueError(
                f"no stop token: no generation_config.json, config.json or tokenizer_config.json in {self._folder} "
                "names one; put eos_token_id into generation_config.json, or answers would never end"
            )
        return tuple(sorted(found))

    def _pad_id(self, model_config: dict[str, Any]) -> int:
        """pad_token of tokenizer_config.json, pad_token_id of config.json, or the first stop id: any id will do."""
        if "pad_token" in self.special_tokens:
            return self._special_id("pad_token")
        found = self._ids(model_config.get("pad_token_id"), f"pad_token_id in {self._folder / 'config.json'}")
        return min(found, default=self.eos_token_ids[0])

    def _special_id(self, name: str) -> int:
        """The id of the token that tokenizer_config.json names."""
        text = self.special_tokens[name]
        valid = not any("\ud800" <= letter <= "\udfff" for letter in text)  # half a pair: no UTF-8 can hold it
        token_id = self._backend.token_to_id(text) if valid else None
        if token_id is None:
            raise ValueError(
                f"{self._folder / 'tokenizer_config.json'} has {name} {_short(self.special_tokens[name])}, which is no "
                "token of tokenizer.json; the two files do not belong together"
            )
        return token_id

    def _ids(self, value: Any, where: str) -> set[int]:
        """An id, a list of ids, or None, as a set; each must be an id of this tokenizer."""
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{where}: found {_short(token_id)}, expected ids from 0 to {self.vocab_size - 1}")
        return set(ids)


class IncrementalDecoder:
    """Text of a growing answer, piece by piece: `push(id)` returns what is new, `flush()` what was held back.

    A character may be spread over several tokens; a piece that ends in U+FFFD is held back until it is whole. Each
    piece is decoded behind the one before it, as some tokenizers drop the space in front of a text's first word. The
    pieces, joined, are what `decode` says of all ids. Source: the streaming of text-generation-inference.
    """

    HOLD = 16  # tokens; a character has at most 4 bytes, so what is broken for longer is broken for good

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens)
        self._shown: list[int] = []  # the ids of the last piece
        self._held: list[int] = []  # ids since then

    def push(self, token_id: int) -> str:
        """Take one more id; the text that is certain now, often "" ."""
        self._held.append(token_id)
        text = self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]
        if text.endswith("\ufffd") and len(self._held) < self.HOLD:
            return ""
        self._shown, self._held = ([] if text.endswith("\ufffd") else self._held), []
        return text

    def flush(self) -> str:
        """The rest, once no id will follow."""
        text = self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]
        self._shown, self._held = [], []
        return text


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size >> 20} MiB; at most {MAX_FILE_BYTES >> 20} MiB are read")
    return path.read_bytes()


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({_short(str(error))}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_short(value)}, expected a JSON object; fetch it again")
    return value


def _load_backend(content: bytes, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the library, with the truncation and padding that a file may carry switched off."""
    _parse_object(content, path)  # the library's own words for a half-downloaded file are hard to read
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"{path} is not a tokenizer ({_short(str(error))}); fetch it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """name -> text; a file writes a token as text, as an AddedToken object with its text in `content`, or as null."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            tokens[name] = text
        elif token is not None:
            where = folder / "tokenizer_config.json"
            raise ValueError(
                f"{name} in {where}: found {_short(token)}, expected text, an object with 'content', or null"
            )
    return tokens


def _template_source(files: dict[str, bytes], settings: dict[str, Any], folder: Path) -> str | None:
    """chat_template.jinja goes first, as in transformers; then `chat_template`: text, or [{name, template}, ...]."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8 text ({_short(str(error))})") from error
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        template = named[-1] if named else template
    if template is None or isinstance(template, str):
        return template
    raise ValueError(
        f"chat_template in {folder / 'tokenizer_config.json'}: found {_short(template)}, expected text, or a list of "
        "{name, template} with one named 'default'"
    )


def _compile(source: str, folder: Path) -> ChatTemplate:
    try:
        return ChatTemplate(source)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _short(value: Any) -> str:
    """A value as one short line."""
    text = repr(value) if not isinstance(value, str) or len(value) < 60 else repr(value[:60]) + "..."
    return text if len(text) <= 120 else text[:120] + "..."
