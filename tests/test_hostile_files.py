"""Files of strangers, broken or hostile in any way: one clear line and exit code 2, or a run that works."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train import SMALL, refused

from qwen2_llm import Qwen2ForCausalLM
from run.config import load_config
from tasks.task_files import read_rows
from tokenizer import Tokenizer

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
HUGE = [10**400, 2**63, 2**31, 1e308, -1, 0, float("nan"), float("inf"), "x" * 100_000]
WRONG = [None, True, "", "text\nof two lines", "\ud800", [], [[]], {}, {"a": None}, [None], *HUGE]
wrong = st.sampled_from(WRONG) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("whole"))
    make_model().save_pretrained(folder)
    return folder


def harmless_or_one_line(load, *names: object) -> None:
    """It works, or says in one line what is wrong with which file."""
    said = None
    try:
        load()
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    if said is not None:
        assert len(said.splitlines()) == 1, said[:300]
        assert any(str(name) in said for name in names), said[:300]


def copy_of(folder: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder with links to the files, to be replaced one at a time."""
    temporary = tempfile.TemporaryDirectory()
    for path in folder.iterdir():
        os.symlink(path, Path(temporary.name) / path.name)
    return temporary


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def spoil(data: st.DataObject, value):
    """A JSON value with one thing in it deleted, or replaced by something of another kind or size."""
    value = json.loads(json.dumps(value))
    here = value
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(min(len(here), 5)))
        if not keys:
            return data.draw(wrong)
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        if data.draw(st.booleans()) or not isinstance(here, dict):
            here[key] = data.draw(wrong)
        else:
            del here[key]
        return value


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
@FUZZ
@given(data=st.data())
def test_any_change_of_a_json_file_is_harmless_or_told(whole, name, data):
    """CHECKLIST 46: one value missing, null, huge, or of a wrong type, anywhere in the file."""
    with copy_of(whole) as folder:
        path = Path(folder) / name
        content = json.loads(path.read_text())
        replace(path, json.dumps(spoil(data, content)).encode("ascii"))
        if name == "config.json":
            harmless_or_one_line(lambda: Qwen2ForCausalLM.from_pretrained(folder), Path(folder))
        harmless_or_one_line(lambda: Tokenizer.from_pretrained(folder).encode("3 + 5"), Path(folder))


BYTES = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "half": b'{"model_type": "qwen2", "hidden_',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a deep one": b"[" * 100_000,
    "a deep object": b'{"a":' * 100_000,
    "a number of 10^5 digits": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
    "zeros": b"\x00" * 1000,
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", BYTES)
def test_a_file_that_is_no_json_is_told_by_the_program(whole, tmp_path, capsys, name, content):
    """CHECKLIST 46: exit code 2, one line, and the name of the file."""
    with copy_of(whole) as folder:
        replace(Path(folder) / name, BYTES[content])
        line = refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)
        assert name in line
        assert len(line) < 1000


# --- weights


def with_header(header: dict | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


WEIGHTS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": with_header(b"{}", length=2**40),
    "a header of 2^64": with_header(b"{}", length=2**64 - 1),
    "a header that is no JSON": with_header(b"nonsense"),
    "a header of null": with_header(b"null"),
    "a deep header": with_header(b"[" * 50_000),
    "a shape that lies": with_header(tensor([1000], 0, 128), bytes(128)),
    "a shape of 2^62": with_header(tensor([2**31, 2**31], 0, 128), bytes(128)),
    "a negative shape": with_header(tensor([-32], 0, 128), bytes(128)),
    "offsets beyond the end": with_header(tensor([32], 0, 128), bytes(64)),
    "offsets turned round": with_header(tensor([32], 128, 0), bytes(128)),
    "offsets that overlap": with_header(
        tensor([32], 0, 128) | {"x": tensor([32], 64, 192)["model.norm.weight"]}, bytes(192)
    ),
    "an unknown dtype": with_header(tensor([32], 0, 128, "F7"), bytes(128)),
    "integers": with_header(tensor([32], 0, 128, "I32"), bytes(128)),
    "a pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
}


@pytest.mark.parametrize("content", WEIGHTS)
def test_weights_that_lie_are_told_by_the_program(whole, tmp_path, capsys, content):
    """CHECKLIST 46"""
    with copy_of(whole) as folder:
        replace(Path(folder) / "model.safetensors", WEIGHTS[content])
        line = refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)
        assert folder in line
        assert len(line) < 1000


@FUZZ
@given(at=st.integers(0, 4000), new=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_any_bytes_in_the_header_are_harmless_or_told(whole, at, new, cut):
    """CHECKLIST 46: a few bytes replaced, or all from there on missing."""
    with copy_of(whole) as folder:
        path = Path(folder) / "model.safetensors"
        content = path.read_bytes()
        replace(path, content[:at] if cut else content[:at] + new + content[at + len(new) :])
        harmless_or_one_line(lambda: Qwen2ForCausalLM.from_pretrained(folder), Path(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(whole, tmp_path, capsys, value, dtype):
    """CHECKLIST 46, 44: before the run, not by refusing all of its steps."""
    with copy_of(whole) as folder:
        path = Path(folder) / "model.safetensors"
        tensors = {name: t.to(dtype) for name, t in load_file(path).items()}
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        path.unlink()
        save_file(tensors, path)
        line = refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)
        assert "model.layers.1.mlp.down_proj.weight" in line
        assert "not finite" in line


INDEXES = {
    "a path that climbs out": {"weight_map": {"model.norm.weight": "../outside.safetensors"}},
    "an absolute path": {"weight_map": {"model.norm.weight": "/etc/passwd"}},
    "an empty name": {"weight_map": {"model.norm.weight": ""}},
    "a folder": {"weight_map": {"model.norm.weight": "."}},
    "a null byte": {"weight_map": {"model.norm.weight": "a\x00b"}},
    "a missing shard": {"weight_map": {"model.norm.weight": "gone.safetensors"}},
    "a tensor that is not there": {"weight_map": {"nothing": "one.safetensors"}},
    "a null map": {"weight_map": None},
    "a list": {"weight_map": ["one.safetensors"]},
    "no map": {},
    "numbers": {"weight_map": {"model.norm.weight": 3}},
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_that_lies_is_told_by_the_program(whole, tmp_path, capsys, index):
    """CHECKLIST 46: no file outside the folder is opened, and the line names the one that is wrong."""
    with copy_of(whole) as folder:
        (Path(folder) / "model.safetensors").rename(Path(folder) / "one.safetensors")
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(INDEXES[index]))
        line = refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)
        assert folder in line


def test_links_into_a_cache_are_followed_and_dangling_ones_are_told(whole, tmp_path, capsys):
    """The Hub's cache is made of links. What they point to may have been deleted. A pipe is no file: nothing waits."""
    with copy_of(whole) as folder:
        assert Qwen2ForCausalLM.from_pretrained(folder).config.vocab_size == 275
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            path = Path(folder) / name
            target = path.readlink()
            for spoiled in (lambda path=path: os.symlink("nowhere", path), lambda path=path: os.mkfifo(path)):
                path.unlink()
                spoiled()
                assert name in refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)
            path.unlink()
            os.symlink(target, path)


# --- chat templates: the walls and the budget are tested in test_chat_template.py; here, that the program tells it


FRAGMENTS = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m %}",
    "{% endif %}",
    "{{ messages|tojson }}",
    "{{ m.role }}",
]
FRAGMENTS += [
    "{% set x = 'a' * 9999 %}",
    "{{ x * 9999 }}",
    "{% for i in range(99999) %}",
    "{{ ''.__class__ }}",
    "{{ x ~ x }}",
]
FRAGMENTS += [
    "{% macro f(x) %}",
    "{{ f(x) }}",
    "{% endmacro %}",
    "{% else %}",
    "{{ loop.index }}",
    "{{ m|attr('__init__') }}",
]
FRAGMENTS += [
    "{{ range.__globals__ }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% include 'x' %}",
    "{% raw %}",
    "{% endraw %}",
    "{#",
    "}}",
    "\n",
]


@FUZZ
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_any_chat_template_ends_and_is_harmless_or_told(whole, source):
    with copy_of(whole) as folder:
        (Path(folder) / "chat_template.jinja").write_text(source)
        messages = [{"role": "user", "content": "3 + 5"}]
        harmless_or_one_line(lambda: Tokenizer.from_pretrained(folder).render_chat(messages), Path(folder))


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}", "{% if %}"]
)
def test_a_hostile_chat_template_is_told_by_the_program(whole, tmp_path, capsys, source):
    with copy_of(whole) as folder:
        (Path(folder) / "chat_template.jinja").write_text(source)
        assert "chat template" in refused(capsys, "--ckpt", folder, "--run-dir", tmp_path / "run", *SMALL)


# --- data


LONG = "7 " * 500_000
DATA = {
    "empty": "",
    "blank lines": "\n\n\n",
    "a missing column": '{"question": "2 + 2"}\n',
    "null": '{"question": null, "answer": "4"}\n',
    "a number": '{"question": 3, "answer": "4"}\n',
    "no answer": '{"question": "2 + 2", "answer": null}\n',
    "no object": "[1, 2]\n",
    "half a line": '{"question": "2 + 2", "ans',
    "a deep line": "[" * 100_000 + "\n",
    "a lone surrogate": '{"question": "\\ud800", "answer": "4"}\n' * 20,
    "10^6 characters": json.dumps({"question": LONG, "answer": "4"}) + "\n",
    "10^6 characters in a late row": '{"question": "2 + 2", "answer": "4"}\n' * 99
    + json.dumps({"question": LONG, "answer": "4"})
    + '\n{"question": "2 + 2", "answer": "4"}' * 20,
}


@pytest.mark.parametrize("content", DATA)
def test_data_that_cannot_be_trained_on_is_told_by_the_program(whole, tmp_path, capsys, content):
    """CHECKLIST 46: before the first step, also where the row would come late in the run."""
    path = tmp_path / "data.jsonl"
    path.write_text(DATA[content])
    words = ["--ckpt", whole, "--run-dir", tmp_path / "run", "--task", "jsonl", "--data", path, *SMALL]
    line = refused(capsys, *words)
    assert not (tmp_path / "run").exists()
    assert len(line) < 1000
    if "10^6" not in content and "surrogate" not in content:
        assert "data.jsonl" in line


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | st.just(b'{"question": "a", "answer": 1}\n'))
def test_any_bytes_as_data_are_rows_or_told(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data.jsonl", "data.parquet"):
            path = Path(folder) / name
            path.write_bytes(content)
            harmless_or_one_line(lambda path=path: read_rows(path, ("question", "answer")), path)


# --- YAML


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
BOMB += "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl"))
YAML = {
    "an alias bomb": BOMB,
    "an alias bomb as one value": "numbers: [" + ", ".join(line[3:] for line in BOMB.splitlines()) + "]\n",
    "a bomb in a known key": "numbers: &a [1, 1]\n"
    + BOMB.replace("a: &a [x", "ckpt: &a [x").replace("l: &l", "lr: &l"),
    "a list that holds itself": "numbers: &a [*a]\n",
    "a mapping that holds itself": "&a {ckpt: *a}\n",
    "a Python object": "ckpt: !!python/object/apply:os.system ['true']\n",
    "an unknown tag": "ckpt: !thing 3\n",
    "bytes": "lr: !!binary aGVsbG8=\n",
    "a set": "numbers: !!set {1, 2}\n",
    "a date": "lr: 2020-01-01\n",
    "a list": "- 1\n- 2\n",
    "text": "just text\n",
    "two documents": "lr: 1\n---\nlr: 2\n",
    "a wrong type": "group_size: many\n",
    "a list for a number": "group_size: [4, 5]\n",
    "null for a number": "group_size: null\n",
    "an unknown key": "group_sise: 4\n",
    "a key that is no text": "[1, 2]: 3\n",
    "a number of 10^5 digits": "seed: " + "9" * 100_000 + "\n",
    "deep brackets": "numbers: " + "[" * 5000 + "\n",
    "a tab": "lr:\t1\n\t- x",
    "control characters": "ckpt: \x00\x07\n",
    "much": "# " + "x" * 3_000_000 + "\n",
}


@pytest.mark.parametrize("content", YAML)
def test_settings_that_cannot_be_read_are_told_by_the_program(whole, tmp_path, capsys, content):
    """CHECKLIST 46"""
    path = tmp_path / "settings.yaml"
    path.write_text(YAML[content])
    line = refused(capsys, "--config", path, "--ckpt", whole, "--run-dir", tmp_path / "run", *SMALL)
    assert "settings.yaml" in line
    assert len(line) < 1000


@FUZZ
@given(data=st.data())
def test_any_settings_are_a_config_or_told(data):
    keys = st.sampled_from(
        ["lr", "steps", "numbers", "betas", "ckpt", "amsgrad", "delta", "loss_type", "group-size", "x"]
    )
    content = data.draw(st.dictionaries(keys, wrong, max_size=3).map(json.dumps) | st.text(max_size=60))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
        harmless_or_one_line(lambda: load_config(path), path, "--")  # a range is told by the name of the flag
