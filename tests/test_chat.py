"""Chatting is `generate`, a token at a time. The conversation survives interruptions and bad input."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import chat
from chat import Chat, Options, main, stream, talk
from rollout.generation import generate
from rollout.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bundled():
    return Chat(Options(max_new_tokens=40))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}, {"min_p": 0.1}]
)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_answer_is_that_of_generate(bundled, settings, seed):
    params = SamplingParams(max_new_tokens=40, **settings)
    ids = bundled.prompt_ids("[3, 5, 2] = 13")
    streamed = list(stream(bundled.model, bundled.tokenizer, ids, params, seed))
    assert streamed == generate(bundled.model, [ids], params, tokenizer=bundled.tokenizer, seed=seed)[0].response_ids


def test_the_pieces_make_the_text_and_are_remembered(bundled):
    pieces = list(bundled.answer("[3, 5, 2] = 13"))
    ids = bundled.prompt_ids("[3, 5, 2] = 13")
    text = generate(bundled.model, [ids], bundled.params, tokenizer=bundled.tokenizer)[0].text
    assert "".join(pieces) == text
    assert bundled.messages == [
        {"role": "user", "content": "[3, 5, 2] = 13"},
        {"role": "assistant", "content": text},
    ]


def test_the_conversation_is_in_the_next_prompt_of_a_model_that_talks(bundled):
    bundled.only_countdown = False
    bundled.messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    bundled.system = "be kind"
    prompt = bundled.tokenizer.decode(bundled.prompt_ids("three"), skip_special_tokens=False)
    where = [prompt.index(word) for word in ("be kind", "one", "two", "three")]
    assert where == sorted(where)


def test_the_countdown_model_is_asked_as_it_was_taught(bundled):
    bundled.messages = [{"role": "user", "content": "one"}]
    prompt = bundled.tokenizer.decode(bundled.prompt_ids("[1, 2] = 3"), skip_special_tokens=False)
    assert prompt == "<|im_start|>user\n[1, 2] = 3<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert "Countdown" in bundled.greeting()


def test_an_answer_that_was_interrupted_is_remembered_as_far_as_it_went(bundled):
    answer = bundled.answer("[3, 5, 2] = 13")
    said = next(answer) + next(answer)
    answer.close()
    assert bundled.messages[-1]["content"] == said


def lines(monkeypatch, *said):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in said)))


def test_ctrl_c_ends_the_answer_and_not_the_program(bundled, monkeypatch, capsys):
    plain, calls = chat.sample, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(chat, "sample", interrupted)
    lines(monkeypatch, "[3, 5, 2] = 13", "[1, 2] = 3")
    talk(bundled, ask=False)
    assert "(stopped)" in capsys.readouterr().out
    assert len(bundled.messages) == 4
    assert len(calls) > 4


def test_commands(bundled, monkeypatch, capsys):
    bundled.messages = [{"role": "user", "content": "x"}]
    lines(monkeypatch, "/system be kind", "/what", "", "/exit", "never read")
    talk(bundled, ask=False)
    assert (bundled.system, bundled.messages) == ("be kind", [])
    assert "/what: expected /reset" in capsys.readouterr().err
    assert bundled.command("/system") is not None
    assert bundled.system is None


def test_a_message_that_is_too_long_is_one_line_and_the_conversation_goes_on(bundled, monkeypatch, capsys):
    lines(monkeypatch, "1 " * 3000, "[1, 2] = 3")
    talk(bundled, ask=False)
    said = capsys.readouterr()
    assert "do not fit the model's context" in said.err
    assert said.err.count("\n") == 1
    assert [m["role"] for m in bundled.messages] == ["user", "assistant"]


def test_logits_that_are_not_finite_are_an_error(bundled):
    with torch.no_grad():
        bundled.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        list(bundled.answer("[1, 2] = 3"))


def test_an_answer_cannot_steer_the_terminal(bundled, monkeypatch, capsys):
    monkeypatch.setattr(bundled, "answer", lambda line: iter(["a\x1b[2Jb\n", "\tc\u202e é"]))
    lines(monkeypatch, "hello")
    talk(bundled, ask=False)
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\\u202e é\n"


def test_a_character_spread_over_tokens_comes_whole(bundled, monkeypatch):
    ids = bundled.tokenizer.encode("né 🙂")
    monkeypatch.setattr(chat, "stream", lambda *args: iter(ids))
    pieces = list(bundled.answer("x"))
    assert "".join(pieces) == "né 🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_standard_input_that_is_no_terminal():
    done = subprocess.run([sys.executable, "chat.py", "--temperature", "0"], input="[1, 2] = 3\n", cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<answer>" in done.stdout
    assert "> " not in done.stdout.splitlines()[0]


def test_bytes_that_are_no_text_and_an_encoding_without_the_characters():
    """ASCII both ways: bytes beyond it come in, an escape and an accent go out."""
    program = (
        "import chat; chat.stream = lambda model, tokenizer, *rest: iter(tokenizer.encode('\\x1b é.')); chat.main([])"
    )
    done = subprocess.run([sys.executable, "-c", program], input=b"\xff\xfe\n[1, 2] = 3\n", cwd=ROOT, timeout=120,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"\\x1b ?.\n" * 2


def test_a_reader_that_goes_ends_the_program_without_a_traceback():
    with subprocess.Popen([sys.executable, "chat.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=ROOT) as program:  # fmt: skip
        program.stdout.close()
        _, error = program.communicate(b"[1, 2] = 3\n", timeout=120)
    assert (program.returncode, error) == (0, b"")


MISTAKES = [
    (["--ckpt", "no/such"], "no/such"),
    (["--top-p", "2"], "--top-p 2: expected a number above 0 and up to 1"),
    (["--temp", "1"], "temp"),
    (["--temperature", "-1"], "--temperature -1: expected 0 or more"),
    (["--temperature", "nan"], "--temperature nan: expected a finite number"),
    (["--seed", "1" + "0" * 22], "--seed 1000"),
    (["--seed", "1" + "0" * 5000], "--seed"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
    (["--max-new-tokens", "1" + "0" * 12], "--max-new-tokens 1000"),
    (["--top-k", "-1"], "--top-k -1: expected 0 or more"),
]


@pytest.mark.parametrize(("argv", "said"), MISTAKES, ids=lambda x: " ".join(x)[:24] if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(argv, said, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
