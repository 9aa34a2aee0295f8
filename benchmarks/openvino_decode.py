"""Rollout, ours beside OpenVINO GenAI's continuous batching: the same weights, prompts and lengths, taking turns.

    pip install openvino-genai                                          # measured with 2026.4.1
    python benchmarks/openvino_decode.py --ckpt models/Qwen2.5-0.5B-Instruct --openvino models/qwen-openvino

The exported model is made once, in an environment of its own (optimum-intel 2.2.0, openvino and openvino-tokenizers
2026.4.1, torch 2.13.0, transformers 5.5.4, and no torchvision, because it is not needed and may ask for another torch):

    pip install "torch<=2.13.0" optimum-intel openvino openvino-tokenizers
    optimum-cli export openvino --model models/Qwen2.5-0.5B-Instruct --task text-generation-with-past
        --weight-format fp16 models/qwen-openvino           # one line

That converts the tokenizer as well (if it does not: `convert_tokenizer FOLDER --with-detokenizer -o OUT`).

Prompts are random ids, `--group-size` answers each. Nothing ends an answer early, and both sample at temperature 1 from
the whole vocabulary. OpenVINO is asked for a group by `num_return_sequences`, so that it, too, runs and keeps a prompt
once. Its settings are its own choice but for `--property`, and they are printed: on a processor with bf16 it
computes in bf16, and keeps keys and values in 16 bits, as the export asks. Each side has a process with all threads of
the machine, and one waits while the other works. A rollout is the whole call, prefill included. `decode` is the
rest without a call that stops at the first token. Medians over `--repeats` turns, after `--warmup` for each number
of rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import common
import torch

from rollout.generation import generate
from rollout.sampling import SamplingParams
from run.pretrained import load_pretrained, locate_pretrained

SHAPE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
Prompts = list[list[int]]


# ---------------------------------------------------------------------------------------------------------------------
# The sides (the protocol is common.take_turns'); work: the prompts of each turn


def ours(pipe: Connection, args: argparse.Namespace, work: list[Prompts]) -> None:
    model, _ = load_pretrained(args.ckpt, common.DTYPES[args.dtype])
    tokenizer = common.endless_tokenizer(args.ckpt)

    def sample(prompts: Prompts, new_tokens: int, seed: int) -> list[int]:
        params = SamplingParams(n=args.group_size, max_new_tokens=new_tokens)
        rows = len(prompts) * args.group_size
        answers = generate(model, prompts, params, tokenizer=tokenizer, seed=seed, max_rows=rows)
        return [len(answer.response_ids) for answer in answers]

    take_part(pipe, args, work, sample)
    pipe.send({"weights": args.dtype, "threads": torch.get_num_threads(), "peak_gib": common.peak_gib()})


def openvino(pipe: Connection, args: argparse.Namespace, work: list[Prompts]) -> None:
    import numpy as np
    import openvino_genai
    from openvino import Core, Tensor, __version__

    properties = dict(args.property)
    scheduler = openvino_genai.SchedulerConfig()  # memory for keys and values grows as it is needed
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(args.openvino), scheduler, "CPU", properties)

    def sample(prompts: Prompts, new_tokens: int, seed: int) -> list[int]:
        config = openvino_genai.GenerationConfig()  # neither top-k nor top-p, and none of the checkpoint's penalties
        config.do_sample, config.temperature, config.rng_seed = True, 1.0, seed
        config.max_new_tokens, config.ignore_eos = new_tokens, True
        config.num_return_sequences = args.group_size
        inputs = [Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [len(ids) for result in results for ids in result.m_generation_ids]

    take_part(pipe, args, work, sample)
    peak = common.peak_gib()
    # The pipeline does not tell its settings; the same model compiled with the same properties does.
    compiled = Core().compile_model(str(args.openvino / "openvino_model.xml"), "CPU", properties)
    pipe.send({
        "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "keys_and_values": compiled.get_property("KV_CACHE_PRECISION").get_type_name(),
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
        "peak_gib": peak,
        "openvino": __version__,
        "openvino_genai": openvino_genai.__version__,
    })  # fmt: skip


def take_part(
    pipe: Connection, args: argparse.Namespace, work: list[Prompts], sample: Callable[[Prompts, int, int], list[int]]
) -> None:
    """`sample(prompts, new_tokens, seed)` returns the answers' lengths in tokens."""
    pipe.send("ready")
    for turn, prompts in enumerate(work):
        pipe.recv()
        lengths: list[int] = []
        first_s = common.seconds(lambda p=prompts, t=turn: sample(p, 1, t))
        whole_s = common.seconds(lambda p=prompts, t=turn, n=lengths: n.extend(sample(p, args.new_tokens, t)))
        pipe.send({"whole_s": whole_s, "first_s": first_s, "answers": len(lengths), "tokens": sum(lengths)})


SIDES = {"ours": ours, "openvino": openvino}

# ---------------------------------------------------------------------------------------------------------------------
# Results


def prompts_of_turns(args: argparse.Namespace, vocab_size: int) -> list[Prompts]:
    """Other prompts each turn, so that none is found in a cache: the warm-up and the repeats of each number of rows."""
    turns = [rows for rows in args.rows for _ in range(args.warmup + args.repeats)]
    return [
        common.random_prompts(rows // args.group_size, args.prompt_tokens, vocab_size, args.seed + turn)
        for turn, rows in enumerate(turns)
    ]


def summarise(turns: dict[str, list[dict]], args: argparse.Namespace) -> list[dict]:
    """For each number of rows, medians of each side and how many times faster we are (above 1: we are faster).

    Raises ValueError where a side did not sample rows x new_tokens tokens.
    """
    summary = []
    for i, rows in enumerate(args.rows):
        start, tokens = i * (args.warmup + args.repeats), rows * args.new_tokens
        speeds, decode_speeds = {}, {}
        for name, all_turns in turns.items():
            counted = all_turns[start + args.warmup : start + args.warmup + args.repeats]
            for t in counted:
                if (t["answers"], t["tokens"]) != (rows, tokens):
                    raise ValueError(
                        f"{name} sampled {t['tokens']} tokens in {t['answers']} answers; expected {tokens} in {rows}"
                    )
            speeds[name] = tokens / statistics.median(t["whole_s"] for t in counted)
            decode_speeds[name] = (tokens - rows) / statistics.median(t["whole_s"] - t["first_s"] for t in counted)
        summary.append({
            "rows": rows, "rollout_tok_s": speeds, "decode_tok_s": decode_speeds,
            "rollout_ratio": speeds["ours"] / speeds["openvino"],
            "decode_ratio": decode_speeds["ours"] / decode_speeds["openvino"],
        })  # fmt: skip
    return summary


def check_export(openvino: Path, ckpt: Path) -> None:
    """Raises FileNotFoundError or ValueError where the folder is no export of a model of the checkpoint's shape, and
    ModuleNotFoundError where there is nothing to run it with."""
    if importlib.util.find_spec("openvino_genai") is None:
        raise ModuleNotFoundError("openvino_genai is not installed; run: pip install openvino-genai")
    for name in ("openvino_model.xml", "config.json"):
        if not (openvino / name).is_file():
            raise FileNotFoundError(f"--openvino {openvino}: no {name} there; export the model as --help says")
    theirs, mine = (json.loads((folder / "config.json").read_text()) for folder in (openvino, ckpt))
    for key in SHAPE_KEYS:
        found, expected = theirs.get(key), mine.get(key)
        if found != expected:
            raise ValueError(
                f"--openvino {openvino}: {key} is {found}, but {expected} in {ckpt}; export that checkpoint"
            )


def key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}; expected KEY=VALUE")
    return key, value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint folder or name")
    parser.add_argument("--openvino", required=True, type=Path, help="folder of the exported model")
    parser.add_argument("--dtype", default="bf16", choices=common.DTYPES, help="of our weights (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=134)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="turns that are not counted, for each number of rows")
    parser.add_argument(
        "--property", type=key_and_value, nargs="*", default=[], metavar="KEY=VALUE",
        help="of OpenVINO's CPU device, as KV_CACHE_PRECISION=u8",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if any(rows < 1 or rows % args.group_size for rows in args.rows):
        parser.error("expected --rows that are multiples of --group-size")
    if args.new_tokens < 2 or args.repeats < 1 or args.warmup < 0:
        parser.error("expected --new-tokens of at least 2, --repeats of at least 1 and --warmup of at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        args.ckpt = locate_pretrained(args.ckpt)
        check_export(args.openvino, args.ckpt)
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        print(f"openvino_decode.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    work = prompts_of_turns(args, common.endless_tokenizer(args.ckpt).vocab_size)
    found = common.take_turns(SIDES, len(work), args, work)
    summary = summarise({name: f["turns"] for name, f in found.items()}, args)
    for name, f in found.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in f["last"].items()
            )
        )
    print(common.table(
        ("rows", "ours tok/s", "OpenVINO tok/s", "ratio", "ours decode", "OpenVINO decode", "ratio"),
        [(str(r["rows"]), *r["rollout_tok_s"].values(), r["rollout_ratio"], *r["decode_tok_s"].values(),
          r["decode_ratio"]) for r in summary],
    ), "\n")  # fmt: skip
    args.ckpt, args.openvino = args.ckpt.resolve().name, args.openvino.resolve().name  # no paths of one machine
    common.print_json(args, {"rows": summary, "sides": found})


if __name__ == "__main__":
    main()
