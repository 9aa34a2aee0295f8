"""Text to token ids and back, and messages to a prompt, as the files of a checkpoint folder say.

The `tokenizers` library splits the text (tokenizer.json). This file reads the small files around it. Three things
differ from the tokenizers of transformers:

- `encode` never adds a special token. A prompt is text that a chat template has already completed, and a second BOS in
  front of it is a fault that is easy to miss. Special tokens *written in* the text (`<|im_start|>`) become their ids.
- `eos_token_ids` holds every stop id that any file of the folder names: Qwen stops at 151645 and at 151643.
- generation_config.json is read for stop ids only. A repetition penalty made for chatting would change the policy that
  is being trained.

`vocab_size` counts the ids that the tokenizer can produce, and not the rows of the embedding (Qwen2.5: 151,665 and
151,936), because ids beyond it must never be sampled.

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

from tokenizers.decoders import DecodeStream

from data_types import Message
from model.added_tokens import DeclaredTokens, register, short
from model.chat_template import ChatTemplate, normalize_messages
from model.tokenizer_file import load_backend, no_panic, obey_prefix_space

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in use has some 35 MB
MAX_TEMPLATES = 100

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
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


class Tokenizer:
    """A checkpoint's tokenizer, chat templates and stop ids.

    vocab_size: highest id the tokenizer can produce, plus 1.
    eos_token_ids: tuple of every stop id, ascending; never empty.
    pad_token_id: the id that fills padded rows. It is never a mask: masks come from lengths.
    special_tokens: {"eos_token": "<|im_end|>", ...}, the variables of that name in the chat template.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    special_tokens: dict[str, str]

    def __init__(self, files: dict[str, bytes], model_config: dict[str, Any], folder: Path):
        self._files, self._folder = files, folder
        parsed = {name: _parse_object(files[name], folder / name) for name in TOKEN_FILES if name in files}
        settings = parsed.get("tokenizer_config.json", {})
        kind = _transformers_class(settings, model_config)
        self._backend = load_backend(files["tokenizer.json"], folder / "tokenizer.json")
        obey_prefix_space(self._backend, settings, parsed["tokenizer.json"], kind, folder)
        self._register(DeclaredTokens.read(parsed, folder), as_qwen2=kind == "Qwen2Tokenizer")
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_ids = self._stop_ids(model_config)
        self.pad_token_id = self._pad_id(model_config)
        self._sources = _template_sources(files, settings, folder)
        self._templates: dict[str, ChatTemplate] = {}
        if "default" in self._sources:
            self._template("default")  # a broken template is an error now, not at the first prompt

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it.

        Raises FileNotFoundError if the folder or its tokenizer.json is missing. Raises ValueError if a file is not what
        it should be, in one line with the file's name.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"no tokenizer: looked for {folder / 'tokenizer.json'}, but {_instead(folder)}; "
                "give the folder of a complete checkpoint, with its tokenizer.json"
            )
        files = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
        more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        files |= {f"{MORE_TEMPLATES}/{path.name}": _read(path) for path in more[:MAX_TEMPLATES] if path.is_file()}
        config = folder / "config.json"
        return cls(files, _parse_object(_read(config), config) if config.is_file() else {}, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files as they were read, so that the folder is a checkpoint that transformers opens.

        `auto_map` of tokenizer_config.json is left out: it names Python files of the source, which are not saved.
        """
        folder, files = Path(folder), dict(self._files)
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        if settings.pop("auto_map", None) is not None:
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and of nothing else: no BOS, no EOS. Special tokens written in the text become their ids."""
        try:
            with no_panic():
                return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair, from broken JSON: no UTF-8 can hold it
            raise ValueError(f"cannot encode {short(ascii(text))}: expected text that UTF-8 can hold") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD, and ids that are no tokens become nothing."""
        with no_panic():
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: list[Message], add_generation_prompt: bool = True, **template_variables: Any
    ) -> str:
        """The prompt of a conversation, by the checkpoint's chat template, special tokens written out as text.

        With `add_generation_prompt` it ends where the assistant begins to speak. Further keywords are variables of the
        template (`tools`, `enable_thinking`, ...). With `tools`, the template named "tool_use" is taken if there is
        one. Raises ValueError without a template, or if it fails (its limits are in chat_template.py).
        """
        if not messages:
            raise ValueError("cannot render an empty conversation: expected at least one message")
        variables = {"tools": None, "documents": None, **self.special_tokens, **template_variables}
        use_tools = variables["tools"] is not None and "tool_use" in self._sources
        template = self._template("tool_use" if use_tools else "default")
        plain = normalize_messages(messages)
        try:
            return template.render(messages=plain, add_generation_prompt=add_generation_prompt, **variables)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error

    def _template(self, name: str) -> ChatTemplate:
        """The template of that name, compiled at its first use."""
        if name not in self._sources:
            others = f" (only {', '.join(sorted(self._sources))})" if self._sources else ""
            raise ValueError(
                f"no chat template: {self._folder} has neither chat_template.jinja nor a 'chat_template' in "
                f"tokenizer_config.json{others}; take an instruct checkpoint, or put a chat_template.jinja there"
            )
        if name not in self._templates:
            try:
                self._templates[name] = ChatTemplate(self._sources[name])
            except ValueError as error:
                raise ValueError(f"{self._folder}: {error}") from error
        return self._templates[name]

    def _register(self, declared: DeclaredTokens, as_qwen2: bool) -> None:
        self.special_tokens = {name: token.content for name, token in declared.named.items()}
        with_id = {token.content for token in declared.by_id.values()}
        for name in ("eos_token", "pad_token"):
            text = self.special_tokens.get(name)
            if text is not None and text not in with_id and self._backend.token_to_id(text) is None:
                raise ValueError(
                    f"{self._folder / 'tokenizer_config.json'} has {name} {short(text)}, which is no token of "
                    "tokenizer.json; the two files do not belong together"
                )
        with no_panic():
            self._backend = register(self._backend, declared, as_qwen2)

    def _stop_ids(self, model_config: dict[str, Any]) -> tuple[int, ...]:
        """Every stop id, from the three files that may name one."""
        generation = self._folder / "generation_config.json"
        generation_config = _parse_object(self._files.get(generation.name, b"{}"), generation)
        found = self._ids(generation_config.get("eos_token_id"), f"eos_token_id in {generation}")
        found |= self._ids(model_config.get("eos_token_id"), f"eos_token_id in {self._folder / 'config.json'}")
        if "eos_token" in self.special_tokens:
            found.add(self._id_of("eos_token"))
        if not found:
            raise ValueError(
                f"no stop token: no generation_config.json, config.json or tokenizer_config.json in {self._folder} "
                "names one; put eos_token_id into generation_config.json, or answers would never end"
            )
        return tuple(sorted(found))

    def _pad_id(self, model_config: dict[str, Any]) -> int:
        """pad_token of tokenizer_config.json, pad_token_id of config.json, or the first stop id: any id will do."""
        if "pad_token" in self.special_tokens:
            return self._id_of("pad_token")
        found = self._ids(model_config.get("pad_token_id"), f"pad_token_id in {self._folder / 'config.json'}")
        return min(found, default=self.eos_token_ids[0])

    def _id_of(self, name: str) -> int:
        token_id = self._backend.token_to_id(self.special_tokens[name])
        assert token_id is not None, f"{name} was registered"
        return token_id

    def _ids(self, value: Any, where: str) -> set[int]:
        """An id, a list of ids, or None, as a set; each must be an id of this tokenizer. -1 stands for none."""
        ids = value if isinstance(value, list) else [] if value is None else [value]
        ids = [token_id for token_id in ids if type(token_id) is not int or token_id != -1]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{where}: found {short(token_id)}, expected ids from 0 to {self.vocab_size - 1}")
        return set(ids)


class IncrementalDecoder:
    """Text of a growing answer, piece by piece: `push(id)` returns the new text, `flush()` the text held back.

    A character may be spread over several tokens, so a piece is held back until its characters are whole. The pieces,
    joined, are the text that `decode` gives for all ids. One case is different: if the byte tokens of a sentencepiece
    tokenizer are not UTF-8, `decode` also replaces the whole characters in front of them, and these were given before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []  # ids since the last piece

    def push(self, token_id: int) -> str:
        """Take one more id. Returns the text that is certain now, often ""."""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer._backend, token_id)
        except Exception:  # the bare class: a broken byte changed text that was given before
            return self.flush()
        if text is not None:
            self._held = []
        return text or ""

    def flush(self) -> str:
        """The rest, if no id will follow."""
        text = self._tokenizer.decode(self._held, self._skip)
        self._held = []
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        return text


def _transformers_class(settings: dict[str, Any], model_config: dict[str, Any]) -> str:
    """The class that AutoTokenizer of transformers takes, as far as it changes ids."""
    kind = settings.get("tokenizer_class")
    family = model_config.get("model_type")
    if family == "qwen2" or (family == "qwen3" and kind is None):
        return "Qwen2Tokenizer"
    return kind.removesuffix("Fast") if isinstance(kind, str) else ""


def _instead(folder: Path) -> str:
    """What there is, if there is no tokenizer.json."""
    if not folder.is_dir():
        return "there is no such folder"
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "qwen.tiktoken"):
        if (folder / name).is_file():
            return f"the folder has {name} only, an older format: load it in transformers and save it again"
    return "the folder has none"


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size >> 20} MiB; at most {MAX_FILE_BYTES >> 20} MiB are read")
    return path.read_bytes()


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({short(str(error))}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {short(value)}, expected a JSON object; fetch it again")
    return value


def _template_sources(files: dict[str, bytes], settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """Name -> source of every chat template.

    Templates in files go first, as in transformers: chat_template.jinja is "default", and the folder
    additional_chat_templates holds others. Without them, `chat_template` of tokenizer_config.json counts: a text, or
    [{name, template}, ...].
    """
    names = {name: Path(name).stem for name in files if name.startswith(MORE_TEMPLATES)}
    if "chat_template.jinja" in files:
        names["chat_template.jinja"] = "default"
    if names:
        return {names[name]: _template_text(files[name], folder / name) for name in sorted(names)}
    template = settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    named = {}
    for entry in template if isinstance(template, list) else [template]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(
                f"chat_template in {folder / 'tokenizer_config.json'}: found {short(template)}, expected text, or a "
                "list of {name, template}"
            )
        named[name] = source
    return named


def _template_text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({short(str(error))})") from error
