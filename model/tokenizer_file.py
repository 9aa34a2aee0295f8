"""Load tokenizer.json into the `tokenizers` library, safely and as transformers reads it.

The library panics on some files, and others make it loop or fill the memory: a regular expression that backtracks, a
normalizer that makes each letter ten, a broken table. So each file is loaded once in a child process with limits
(limited.py) and encodes a few texts there. If that works, the file is loaded here. A file
that fails on other texts only passes this trial.

    backend = load_backend(content, path)
    obey_prefix_space(backend, tokenizer_config, tokenizer_json, "Qwen2Tokenizer")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from model.limited import call_limited

TRIAL_CPU_S, TRIAL_MEMORY_MIB = 5, 512  # of a small file, in seconds of processor time and MiB
CPU_S_PER_MIB, MEMORY_PER_BYTE = 1.0, 64  # more for larger ones: the largest in use (35 MB) take 2 s and 1 GiB
SAMPLES = ("", "Hello, world! 3 + 5 = 8.\n", " \t\r\n  \n", "日本語 🙂 e\u0301 ﬁ", "\x00\x7f")
# A regular expression that backtracks is slow on a long run of one character and another character after it.
RUNS = "aA0_.= \n\u00e9\u65e5"
RUN_LENGTH = 60
# SHA-256 of files that were tried once and for all.
TRUSTED = {"d7df7ef274509ad4401602a8c2f4388514aead94c162e35827deb8ade3cb4308"}  # assets/countdown-tiny
# Source: models/qwen2/tokenization_qwen2.py of transformers.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_tried = set(TRUSTED)  # hashes of files that passed the trial


def load_backend(content: bytes, path: Path) -> Tokenizer:
    """The library's tokenizer, without the truncation and padding that a file may carry.

    Raises ValueError if the file is not a tokenizer, or if it fails or exceeds a limit on a few plain texts.
    """
    digest = hashlib.sha256(content).hexdigest()
    try:
        if digest not in _tried:
            mib = len(content) / 2**20
            cpu_s, memory_mib = round(TRIAL_CPU_S + CPU_S_PER_MIB * mib), TRIAL_MEMORY_MIB + int(MEMORY_PER_BYTE * mib)
            call_limited("model.tokenizer_file:try_file", str(path), cpu_s=cpu_s, memory_mib=memory_mib)
        with no_panic():
            backend = _load(content)
    except Exception as error:  # the library raises the bare class
        reason = " ".join(str(error)[:200].split())
        raise ValueError(
            f"{path} is not a tokenizer ({reason}); fetch it again, from the publisher of the model"
        ) from error
    _tried.add(digest)
    return backend


def try_file(path: str) -> None:
    """Runs in the child process: load a file, and encode and decode the samples."""
    content = Path(path).read_bytes()
    backend = _load(content)
    letters = "".join(dict.fromkeys(RUNS + "".join(_patterns(json.loads(content)))))[:200]
    runs = [letter * RUN_LENGTH + end for letter in letters for end in ("!", "\x00")]
    for text in (*SAMPLES, *runs):
        for skip in (True, False):
            backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=skip)


def _patterns(value: Any) -> Iterator[str]:
    """Every regular expression of a parsed tokenizer.json, outside its vocabulary."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        value = [part for key, part in value.items() if key not in ("vocab", "merges", "added_tokens")]
    for part in value if isinstance(value, list) else []:
        yield from _patterns(part)


def _load(content: bytes) -> Tokenizer:
    backend = Tokenizer.from_str(content.decode("utf-8"))
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """A panic inside the Rust library becomes a ValueError. It is no Exception, so it would end the program."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer failed: {' '.join(str(error)[:200].split())}") from None


def obey_prefix_space(
    backend: Tokenizer, settings: dict[str, Any], tokenizer_json: dict[str, Any], kind: str, folder: Path
) -> None:
    """Let `add_prefix_space` of tokenizer_config.json win over tokenizer.json, if transformers does so.

    kind: the name of the class that transformers takes. Three classes build their splitter anew, with the setting of
    tokenizer_config.json. Other classes take the splitter of tokenizer.json as it is, and releases differ in what they
    make of a contradiction, so it is refused.
    """
    wanted = settings.get("add_prefix_space")
    found = set(_prefix_spaces([tokenizer_json.get("normalizer"), tokenizer_json.get("pre_tokenizer")]))
    if not isinstance(wanted, bool) or not found or found == {wanted}:
        return
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated", invert=False)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=wanted, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    elif kind == "GPT2Tokenizer":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=wanted)
    elif kind == "LlamaTokenizer":
        scheme = "never" if not wanted else "always" if settings.get("legacy", False) else "first"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(pieces + ([decoders.Strip(content=" ", left=1)] if wanted else []))
    else:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has add_prefix_space {json.dumps(wanted)}, and tokenizer.json beside "
            "it says the opposite; make the two equal"
        )


def _prefix_spaces(value: Any) -> Iterator[bool]:
    """For each part of a normalizer or splitter that may put a space in front of a text: True if it does."""
    if isinstance(value, dict):
        kind = value.get("type")
        if kind == "ByteLevel":
            yield bool(value.get("add_prefix_space", True))
        elif kind == "Metaspace":
            yield value.get("prepend_scheme", "always") != "never" and bool(value.get("add_prefix_space", True))
        elif kind == "Prepend":
            yield True
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from _prefix_spaces(part)
