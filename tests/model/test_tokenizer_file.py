"""tokenizer_file.py: a hostile tokenizer.json ends in one line. The bundled file needs no child process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model import limited, tokenizer_file
from model.tokenizer_file import load_backend

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz !"


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def write_file(folder: Path, **parts) -> Path:
    """A tokenizer.json of letters, with some parts of one's own."""
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(LETTERS)}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


# Each of these ends the process, never returns, fills the memory, or raises an error of its own kind.
HOSTILE = {
    "a regex that backtracks": {"pre_tokenizer": split(r"(a+)+$")},
    "on spaces": {"pre_tokenizer": split(r"(\s+)+$")},
    "on words": {"pre_tokenizer": split(r"(\w+\s?)+$")},
    "on a letter of its own": {"pre_tokenizer": split(r"(q+q+)+z")},
    "in a look-ahead": {"pre_tokenizer": split(r"(?=(a+)+b)")},
    "in a normalizer": {"normalizer": replace({"Regex": r"(a|aa)+$"}, "x")},
    "a regex that is too deep": {"pre_tokenizer": split("(" * 50_000 + "a" + ")" * 50_000)},
    "a regex that calls itself": {"pre_tokenizer": split(r"(?<x>\g<x>a)")},
    "a regex that is broken": {"pre_tokenizer": split("(")},
    "a normalizer that makes ten of each letter": {
        "normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 10)] * 12}
    },
    "a normalizer of a thousand prefixes": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1000}] * 1000}
    },
    "a table that ends the process": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 100).decode()}
    },
    "an empty table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a decoder that cuts too much": {"decoder": {"type": "Strip", "content": "a", "start": 10**8, "stop": 10**8}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_soon_in_one_line(name, tmp_path, monkeypatch):
    """CHECKLIST 69: and this process holds none of their memory."""
    monkeypatch.setattr(tokenizer_file, "TRIAL_CPU_S", 1)
    path = write_file(tmp_path, **HOSTILE[name])
    before, start = psutil.Process().memory_info().rss, time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer \(.*fetch it again") as caught:
        load_backend(path.read_bytes(), path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 5  # of this process
    assert psutil.Process().memory_info().rss - before < 200 << 20


def test_honest_files_are_tried_once(tmp_path, monkeypatch):
    path = write_file(tmp_path)
    expected = load_backend(path.read_bytes(), path).encode("hello world").ids
    monkeypatch.setattr(tokenizer_file, "call_limited", lambda *_, **__: pytest.fail("tried again"))
    assert load_backend(path.read_bytes(), path).encode("hello world").ids == expected


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "=" * 100_000 + "!", "a b" * 50_000])
def test_the_bundled_file_is_honest_on_long_texts(text):
    path = ROOT / "assets" / "countdown-tiny" / "tokenizer.json"
    backend = load_backend(path.read_bytes(), path)
    start = time.process_time()
    assert len(backend.encode(text).ids) > 0
    assert time.process_time() - start < 5


def test_the_bundled_checkpoint_starts_no_child_process():
    """The default run, whose files are known by their hashes, also works if no process can be started."""
    program = """if True:
        from model import limited
        from tokenizer import Tokenizer
        tokenizer = Tokenizer.from_pretrained("assets/countdown-tiny")
        print(len(tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "Hi"}]))), limited._child)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["None"]


def test_the_child_does_not_grow_from_trial_to_trial(tmp_path):
    """Its limit on memory counts from the present use, so memory of earlier calls must not add up."""
    sizes = []
    for n in range(6):
        path = write_file(tmp_path)
        path.write_text(path.read_text() + " " * n)  # another hash
        load_backend(path.read_bytes(), path)
        assert limited._child is not None
        sizes.append(limited._child.used.memory_info().rss)
    assert sizes[-1] < sizes[1] + (20 << 20)
