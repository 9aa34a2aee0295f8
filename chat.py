"""Talk to a checkpoint in the terminal, token by token.

    python chat.py --ckpt Qwen2.5-0.5B-Instruct --temperature 0.7 --top-p 0.9
    python chat.py                                     # the bundled model: it knows Countdown and nothing else
    echo "[3, 5, 2] = 13" | python chat.py             # one line of standard input is one message

Lines that begin with a slash are for the program: /reset forgets the conversation, /system TEXT sets the system message
(and forgets), /exit leaves, as does the end of the input. Ctrl-C ends the answer and not the program.

The conversation is rendered by the checkpoint's own chat template, whole, at every turn, and an answer is what
`generate` would say to it with the same seed: same prompt, same numbers drawn, one row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from data_types import Message
from model.attention import KVCache
from qwen2_llm import Qwen2ForCausalLM
from rollout.decoding import prefill_prompts
from rollout.generation import check_room, uniform_numbers
from rollout.sampling import SamplingParams, sample
from run.config import Config
from run.flags import one_line, parse_flags
from run.pretrained import load_policy, locate_pretrained
from run.terminal import complain, run_program, say, write_error
from tasks.task_base import RESPONSE_PREFIXES
from tokenizer import IncrementalDecoder, Tokenizer

SMALL_VOCABULARY = 1000  # the bundled model has some 300 ids; it has read nothing but Countdown


@dataclass
class Options:
    """Talk to a checkpoint in the terminal."""

    ckpt: str = "countdown-tiny"
    """Checkpoint: a folder, a name under models/, or a Hugging Face repo id."""
    system: str | None = None
    """System message; None: the chat template's own."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: off."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability; 1: off."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability; 0: off."""
    seed: int = 0
    """Seed of what is drawn; the same conversation with the same seed gets the same answers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights on the device; auto is bf16 for models that are not tiny."""


@torch.inference_mode()
def stream(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams, seed: int = 0
) -> Iterator[int]:
    """The ids of one answer as they are drawn, the stop id included: those that `generate` returns.

    Raises ValueError where the prompt is empty or leaves no room for max_new_tokens, or the logits are not finite.
    """
    check_room([prompt_ids], params.max_new_tokens, model.config.max_position_embeddings)
    model.eval()
    hidden, prefill = prefill_prompts(model, [prompt_ids])
    cache = KVCache.from_prefill(prefill, 1, params.max_new_tokens)
    for u in uniform_numbers([prompt_ids], params, seed)[0]:
        token, logprob = sample(model.logits(hidden), u[None].to(model.device), params, tokenizer.vocab_size)
        if logprob.isnan():
            raise ValueError("the model's logits are not finite: its weights hold NaN or infinity, or overflow")
        yield int(token)
        if int(token) in tokenizer.eos_token_ids:
            return
        hidden = model.hidden_states(token, cache.positions().flatten(), cache.attend)
        cache.advance()


class Chat:
    """A conversation with one checkpoint."""

    def __init__(self, options: Options):
        self.options = options
        config = Config(ckpt=options.ckpt, device=options.device, dtype=options.dtype)
        self.model, self.tokenizer = load_policy(config, locate_pretrained(options.ckpt))
        self.params = SamplingParams(
            1, options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.min_p
        )
        self.only_countdown = self.tokenizer.vocab_size < SMALL_VOCABULARY
        self.system = options.system
        self.messages: list[Message] = []

    def greeting(self) -> str:
        if self.only_countdown:
            return (
                "This small model has read Countdown problems and nothing else; give it one:\n"
                "[3, 5, 2] = 13 asks for 13 from 3, 5 and 2, each used once."
            )
        return f"Talking to {self.options.ckpt}. /reset, /system TEXT, /exit; Ctrl-C ends an answer."

    def prompt_ids(self, text: str) -> list[int]:
        """The conversation with `text` as its next message. The Countdown model has never seen a second turn."""
        past = [] if self.only_countdown else self.messages
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = self.tokenizer.render_chat([*system, *past, {"role": "user", "content": text}])
        return self.tokenizer.encode(prompt + (RESPONSE_PREFIXES["short"] if self.only_countdown else ""))

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer, whole characters each. What was said is remembered, also of an answer that was cut."""
        ids, said = self.prompt_ids(text), ""
        decoder = IncrementalDecoder(self.tokenizer)
        try:
            for token in stream(self.model, self.tokenizer, ids, self.params, self.options.seed):
                piece = decoder.push(token)
                said += piece
                yield piece
            rest = decoder.flush()
            said += rest
            yield rest
        finally:
            if said:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

    def command(self, line: str) -> str | None:
        """Do what a line that begins with a slash asks for; what to print, None to leave. ValueError: not known."""
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return None
        if word not in ("/reset", "/system"):
            raise ValueError(f"{word}: expected /reset, /system TEXT or /exit")
        if word == "/system":
            self.system = rest.strip() or None
        self.messages.clear()
        return "(a new conversation)"


def talk(chat: Chat, ask: bool) -> None:
    """Read lines until the input ends, or the output has no reader. `ask`: show a prompt, as to a person."""
    while not write_error(sys.stdout):
        try:
            line = input("> " if ask else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return
                say(said)
                continue
            for piece in chat.answer(line):
                say(piece, end="")
                if write_error(sys.stdout):
                    return
            say("")
        except KeyboardInterrupt:
            say(" (stopped)")
        except ValueError as error:  # too long for the context: the conversation goes on without this message
            complain(f"chat.py: {one_line(error)}")


def main(argv: list[str]) -> int:
    try:
        chat = Chat(parse_flags(Options, argv))
    except (ValueError, OSError) as error:
        complain(f"chat.py: {one_line(error)}")
        return 2
    ask = sys.stdin.isatty()
    for file in (sys.stdin, sys.stdout):  # a character that the terminal's encoding lacks becomes a question mark
        file.reconfigure(errors="replace")
    if ask:
        say(chat.greeting())
    talk(chat, ask)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("chat.py", main))
