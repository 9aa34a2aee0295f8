"""Tokens that the small files of a checkpoint declare, registered with the tokenizer as transformers does it.

tokenizer.json holds the vocabulary and most added tokens. Other files declare tokens too: `added_tokens_decoder`,
`extra_special_tokens` (old name `additional_special_tokens`) and named tokens (`bos_token`, `image_token`, ...) in
tokenizer_config.json, and the older special_tokens_map.json and added_tokens.json. A token that is only declared there
would be split into letters, so each one is registered. Afterwards every declared token must encode to exactly its id.
If one does not, the folder is refused: a chat template writes these tokens into every prompt.

Source: `_from_pretrained` and `TokenizersBackend.__init__` of transformers 5.

    backend = register(backend, DeclaredTokens.read(files, folder))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
VOCABULARY = "tokenizer.json"


@dataclass
class DeclaredTokens:
    """Every token that some file declares.

    named: {"eos_token": token, ...}
    extra: special tokens without a name
    by_id: {id: token}, from the files that give ids
    promises: (text, id or None, where it is written), for each declaration
    """

    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    promises: list[tuple[str, int | None, str]] = field(default_factory=list)

    @classmethod
    def read(cls, files: dict[str, dict[str, Any]], folder: Path) -> DeclaredTokens:
        """From the parsed JSON files of a folder. Raises ValueError if an entry is not a token.

        The order is that of transformers, because it decides between files that contradict each other.
        """
        declared, raw = cls(), files.get(CONFIG, {})
        found = declared._tokens_of(raw, folder / CONFIG)
        if not found.get(EXTRA) and OLD_EXTRA in found:
            found[EXTRA] = found.pop(OLD_EXTRA)
        own = {name: token for name, token in found.items() if name not in NAMED and isinstance(raw.get(name), str)}
        own |= found.pop(EXTRA) if isinstance(found.get(EXTRA), dict) else {}
        if "added_tokens_decoder" in raw:
            declared._read_decoder(raw["added_tokens_decoder"], folder / CONFIG)
        else:  # folders of old releases
            special_map = files.get(MAP, {})
            later = declared._tokens_of(special_map, folder / MAP, special=True)
            if isinstance(later.get(EXTRA), list):
                later[EXTRA] = [*(found.get(EXTRA) or []), *later[EXTRA]]
            found |= later
            own |= found.pop(EXTRA) if isinstance(found.get(EXTRA), dict) else {}
            declared._read_added(files.get(ADDED, {}), folder / ADDED, _special_texts(raw, special_map))
        declared.extra = list(found.get(EXTRA, found.get(OLD_EXTRA)) or [])
        found = {name: token for name, token in found.items() if isinstance(token, AddedToken)} | own
        order = [name for name in NAMED if name in found]  # a later name's flags win
        declared.named = {name: found[name] for name in dict.fromkeys([*order, *found])}
        declared._read_vocabulary(files[VOCABULARY], folder / VOCABULARY, old="added_tokens_decoder" not in raw)
        return declared

    def _tokens_of(self, settings: dict[str, Any], path: Path, special: bool = False) -> dict[str, Any]:
        """The keys that declare tokens: name -> a token or None, and the extra ones, a list or {name: token}.

        special: every token is special (special_tokens_map.json).
        """
        found: dict[str, Any] = {}
        for key, value in settings.items():
            where = f"{key} in {path}"
            if key in NAMED and value in (None, ""):
                found[key] = None
            elif key in NAMED or (key.endswith("_token") and (_is_text(value) or isinstance(value, dict))):
                found[key] = self._token(value, where, special)  # also image_token and other names
            elif key in (EXTRA, OLD_EXTRA) and isinstance(value, dict):
                found[key] = {str(name): self._token(token, where, special) for name, token in value.items()}
            elif key in (EXTRA, OLD_EXTRA) and isinstance(value, list):
                found[key] = [self._token(token, where, special) for token in value]
            elif key in (EXTRA, OLD_EXTRA) and value is not None:
                raise ValueError(f"{where}: found {short(value)}, expected a list of tokens or an object")
        return found

    def _read_decoder(self, entries: Any, path: Path) -> None:
        where = f"added_tokens_decoder in {path}"
        if not isinstance(entries, dict):
            raise ValueError(f"{where}: found {short(entries)}, expected an object of ids and tokens")
        for key, entry in entries.items():
            if not key.isdecimal() or len(key) > 18 or not isinstance(entry, dict):
                raise ValueError(f"{where}: found {short(key)}: {short(entry)}, expected an id and a token's object")
            self.by_id[int(key)] = self._token(entry, where, token_id=int(key))

    def _read_added(self, entries: dict[str, Any], path: Path, special: set[str]) -> None:
        for text, token_id in entries.items():
            if type(token_id) is not int:
                raise ValueError(f"{path}: found {short(token_id)} for {short(text)}, expected an id")
            entry = {"content": text, "special": text in special, "normalized": text not in special}
            self.by_id[token_id] = self._token(entry, str(path), token_id=token_id)

    def _read_vocabulary(self, vocabulary: dict[str, Any], path: Path, old: bool) -> None:
        """`added_tokens` of tokenizer.json. The library has added them, but if an id is not free it takes another.

        In folders of old releases their flags win over those of the other files.
        """
        where = f"added_tokens in {path}"
        for entry in vocabulary.get("added_tokens") or []:
            token_id = entry.get("id") if isinstance(entry, dict) else None
            if type(token_id) is not int:
                raise ValueError(f"{where}: found {short(entry)}, expected a token with its id")
            token = self._token(entry, where, token_id=token_id)
            if old:
                self.by_id[token_id] = token

    def _token(self, value: Any, where: str, special: bool = False, token_id: int | None = None) -> AddedToken:
        """A token is written as its text, or as an object with the text in `content` and flags beside it."""
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or not _is_text(text):
            raise ValueError(f"{where}: found {short(value)}, expected text, an object with 'content', or null")
        flags = {key: value[key] for key in FLAGS if key in value} if isinstance(value, dict) else {"special": True}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise ValueError(f"{where}: found {short(flags)} for {short(text)}, expected flags that are true or false")
        self.promises.append((text, token_id, where))
        return AddedToken(text, **(flags | {"special": True} if special else flags))


def _special_texts(config: dict[str, Any], special_map: dict[str, Any]) -> set[str]:
    """Tokens of added_tokens.json that are special. This file has no flags, so other files decide.

    transformers compares texts before it reads the objects of tokenizer_config.json as tokens. A token that is an
    object there is therefore not among them.
    """
    extra, more = config.get(EXTRA) or config.get(OLD_EXTRA), special_map.get(EXTRA)
    tokens = [special_map.get(name, config.get(name)) for name in NAMED] + (extra if isinstance(extra, list) else [])
    texts = {token for token in tokens if isinstance(token, str)}
    tokens = [special_map.get(name) for name in NAMED] + (more if isinstance(more, list) else [])
    return texts | {token if isinstance(token, str) else str(token["content"]) for token in tokens if token}


def register(backend: Tokenizer, declared: DeclaredTokens, as_qwen2: bool = False) -> Tokenizer:
    """Add every declared token that the tokenizer lacks, and give the declared flags to those that it has.

    as_qwen2: do as Qwen2Tokenizer of transformers. Named and extra tokens become special, whatever their flags, and
    other tokens are special only if `added_tokens_decoder` says so.
    Returns the tokenizer, which may be another object. Raises ValueError if a declared token does not encode to exactly
    its id.
    """
    if as_qwen2:
        backend = _without_special(backend, {token.content for token in declared.by_id.values() if not token.special})
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in declared.by_id.values()}
    in_use = (*declared.named.values(), *declared.extra)
    adding = [token for _, token in sorted(declared.by_id.items())]
    new: dict[str, AddedToken] = {}
    for token in in_use:
        if token.content not in known:
            new.setdefault(repr(token), token)  # of several declarations with other flags, the last one wins
    adding += new.values()
    names = {token.content for token in declared.named.values()}
    for token in adding:
        token.special = token.special or token.content in names
    backend.add_tokens(adding)
    if as_qwen2:
        special = {token.content for token in in_use}
        backend.add_tokens([AddedToken(text, special=True) for text in sorted(special)])
    # One file may name another token than a second file, which wins. In the vocabulary, both are tokens.
    known |= {token.content for token in in_use}
    lost = {text for text, _, _ in declared.promises if text not in known and backend.token_to_id(text) is not None}
    backend.add_tokens([AddedToken(text, special=True) for text in sorted(lost)])
    for text, declared_id, where in declared.promises:
        _check(backend, text, declared_id, where)
    return backend


def _without_special(backend: Tokenizer, texts: set[str]) -> Tokenizer:
    """The same tokenizer, in which these tokens are not special. The library can only make tokens special."""
    if not texts & {token.content for token in backend.get_added_tokens_decoder().values() if token.special}:
        return backend
    content = json.loads(backend.to_str())
    for entry in content["added_tokens"]:
        entry["special"] = entry["special"] and entry["content"] not in texts
    return Tokenizer.from_str(json.dumps(content))


def _check(backend: Tokenizer, text: str, declared_id: int | None, where: str) -> None:
    found, ids = backend.token_to_id(text), backend.encode(text, add_special_tokens=False).ids
    if declared_id not in (None, found):
        raise ValueError(f"{where}: {short(text)} is declared as token {declared_id}, but the tokenizer gives it the "
                         f"id {found}; the files do not belong together")  # fmt: skip
    if found is not None and ids != [found]:
        raise ValueError(f"{where}: {short(text)} is token {found}, but encodes to {short(ids)}; does tokenizer.json "
                         "change the text before it looks for tokens?")  # fmt: skip


def _is_text(value: Any) -> bool:
    """Text that UTF-8 can hold: half of a surrogate pair, from broken JSON, cannot be encoded."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def short(value: Any) -> str:
    """A value as one short line."""
    text = repr(value) if not isinstance(value, str) or len(value) < 60 else repr(value[:60]) + "..."
    return text if len(text) <= 120 else text[:120] + "..."
