"""Talk to a checkpoint in the terminal, token by token.

    python chat.py --ckpt Qwen2.5-0.5B-Instruct --temperature 0.7 --top-p 0.9
    python chat.py                                     # the bundled model, which only knows Countdown
    echo "[3, 5, 2] = 13" | python chat.py             # one line of standard input is one message

Lines that begin with a slash are commands: /reset forgets the conversation, /system TEXT sets the system message and
forgets the conversation, /exit ends the program, like the end of the input. Ctrl-C ends the response, not the program.

At every turn the checkpoint's chat template renders the whole conversation. A response is equal to that of `generate`
with the same prompt and seed.
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
from rollout.sampling import SamplingParams, sample, wide_dtype
from run.config import Config
from run.flags import one_line, parse_flags
from run.options import Count, NotNegative, NumberOrNone, PositiveShare, Seed, Share, check_ranges
from run.pretrained import load_policy
from run.terminal import complain, run_program, say, write_error
from tasks.task_base import RESPONSE_PREFIXES
from tokenizer import IncrementalDecoder, Tokenizer

SMALL_VOCABULARY = 1000  # the bundled model has about 300 ids and was trained on Countdown only


@dataclass
class Options:
    """Talk to a checkpoint in the terminal."""

    ckpt: str = "countdown-tiny"
    """Checkpoint: a folder, a name under models/, or a Hugging Face repo id."""
    system: str | None = None
    """System message. None: the chat template's own."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    temperature: NotNegative = 0.7
    """Sampling temperature. 0: the likeliest token each time."""
    top_k: NumberOrNone = 0
    """Sample from the k likeliest tokens only. 0: off."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this probability. 1: off."""
    min_p: Share = 0.0
    """Leave out tokens below this share of the likeliest token's probability. 0: off."""
    seed: Seed = 0
    """Seed of the sampling. The same conversation with the same seed gets the same responses."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the weights. auto: fp32 for tiny models, else the 16-bit type that the device computes in."""


@torch.inference_mode()
def stream(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompt_ids: list[int], params: SamplingParams, seed: int = 0
) -> Iterator[int]:
    """Sample the ids of one response, the stop id included. They are equal to those of `generate`.

    Raises ValueError if the prompt is empty or leaves no room for max_new_tokens, or if the logits are not finite.
    """
    check_room([prompt_ids], params.max_new_tokens, model.config.max_position_embeddings)
    model.eval()
    hidden, prefill = prefill_prompts(model, [prompt_ids])
    cache = KVCache.from_prefill(prefill, 1, params.max_new_tokens)
    uniforms = uniform_numbers([prompt_ids], params, seed)[0]
    # The type changes before the move: MPS has no fp64.
    for u in uniforms.to(wide_dtype(model.device)).to(model.device):
        token, logprob = sample(model.logits(hidden), u[None], params, tokenizer.vocab_size)
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
        self.model, self.tokenizer = load_policy(config, options.ckpt)
        self.params = SamplingParams(
            1, options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.min_p
        )
        self.only_countdown = self.tokenizer.vocab_size < SMALL_VOCABULARY
        self.system = options.system
        self.messages: list[Message] = []

    def greeting(self) -> str:
        if self.only_countdown:
            return (
                "This small model was trained on Countdown problems only. Write one:\n"
                "[3, 5, 2] = 13 asks for 13 from 3, 5 and 2, each used once."
            )
        return f"Talking to {self.options.ckpt}. /reset, /system TEXT, /exit; Ctrl-C ends a response."

    def prompt_ids(self, text: str) -> list[int]:
        """The conversation with `text` as its next message. The Countdown model knows a single turn only."""
        past = [] if self.only_countdown else self.messages
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = self.tokenizer.render_chat([*system, *past, {"role": "user", "content": text}])
        return self.tokenizer.encode(prompt + (RESPONSE_PREFIXES["short"] if self.only_countdown else ""))

    def answer(self, text: str) -> Iterator[str]:
        """Yield pieces of the response, of whole characters. The conversation keeps them, also of a cut response."""
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
        """Run a command. Returns the text to print, None to leave. Raises ValueError for an unknown command."""
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
    """Read lines until the input ends, or the output has no reader. ask: print a prompt."""
    while not write_error(sys.stdout):
        try:
            line = input("> " if ask else "").strip()
        except (EOFError, OSError):  # OSError: the terminal was closed
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
        options = parse_flags(Options, argv)
        check_ranges(options)
        chat = Chat(options)
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
