"""The effect of a step on each token of a response, and that of the other losses.

    microscope(run)["steps"][0]["responses"][0]      # tokens, ratios, entropies, weights and coefficients, for the page

A run keeps numbers of its updates in samples.jsonl (update/token_traces.py). The coefficient of the run's own loss is
the gradient that autograd computed in the step. Those of the other losses are computed here: the kept log-probabilities
are put into the loss that training uses (update/objective.py), and autograd differentiates it. No formula is copied.

All tokens of a response have the same weight in the step's loss, so a coefficient is weight * unit, and `unit` is the
coefficient at weight 1. grpo, bnpo, dr_grpo and dapo have the same units and differ in the weight.

Shape letters: M tokens of all responses of a step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from model.layout import Layout
from run.options import LossOptions
from study.run_files import UPDATE_LISTS, Record, Run, loss_options
from update.losses import POLICY_LOSSES, token_weights
from update.objective import LossParts, loss_of_scores
from update.packing import MicroBatch, Scores
from update.token_traces import significant

MOST_TOKENS = 40_000  # shown by default: about 4 MB of the page
UNITS = {name: function.__name__ for name, function in POLICY_LOSSES.items()}  # losses of the same name have one unit


def microscope(run: Run, asked: Collection[int] = (), most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
    """The steps that the page shows, each with its responses, and one sentence about which ones these are.

    asked: steps of which all responses are shown. Empty: the first and the last one, and the first group of others.
    Raises ValueError if a step that was asked for has no numbers of its update.
    """
    found: dict[int, list[Record]] = defaultdict(list)
    for sample in run.samples:
        if "update" in sample:
            found[sample["step"]].append(sample)
    if missing := sorted(set(asked) - set(found)):
        there = f"steps {min(found)} to {max(found)}" if found else "none"
        raise ValueError(f"{run.folder}: step {missing[0]} has no numbers of its update; expected one of: {there}")
    if not found:
        said = "This run kept no numbers of its updates: it is older than the microscope, or has --log-tokens 0."
        return {"steps": [], "note": said}
    chosen = choose(found, set(asked) or {min(found), max(found)}, most_tokens)
    whole = [step for step in chosen if len(chosen[step]) == len(found[step])]
    return {"steps": [of_step(run, step, chosen[step]) for step in chosen], "note": _note(found, chosen, whole)}


def choose(found: dict[int, list[Record]], whole: set[int], most_tokens: int) -> dict[int, list[Record]]:
    """All responses of the steps in `whole`, and the first group of as many other steps as have room, evenly spread."""
    first = {step: [r for r in records if r["group_id"] == records[0]["group_id"]] for step, records in found.items()}
    room = most_tokens - sum(len(r["tokens"]) for step in whole for r in found[step])
    others = [step for step in sorted(found) if step not in whole]
    size = sum(len(r["tokens"]) for step in others for r in first[step])
    every = max(1, math.ceil(size / room)) if room > 0 else len(others) + 1
    shown = whole | set(others[every - 1 :: every])
    return {step: found[step] if step in whole else first[step] for step in sorted(shown)}


def _note(found: dict[int, list[Record]], chosen: dict[int, list[Record]], whole: list[int]) -> str:
    steps = ", ".join(map(str, whole[:9])) + (", ..." if len(whole) > 9 else "")
    said = f"All responses that were kept of step{'s' if len(whole) > 1 else ''} {steps}"
    if len(chosen) > len(whole):
        said += f", and the first group of {len(chosen) - len(whole)} others"
    return said + ("." if len(whole) == len(found) else ". Another step, whole: report.py --step N.")


def of_step(run: Run, step: int, records: list[Record]) -> dict[str, Any]:
    """One step: the facts of its loss, and its responses."""
    facts = records[0]["update"]["step"]
    o = loss_options(facts)
    numbered = defaultdict(list)
    for record in records:
        numbered[record["group_id"]].append(record)
    responses = [_response(r, numbered[r["group_id"]].index(r) + 1, o) for r in records]
    computed = [(r, shown) for r, shown in zip(records, responses) if "left_out" not in shown]
    for record, shown in computed[1:]:
        if record["update"].keys() != computed[0][0]["update"].keys() or record["update"]["step"] != facts:
            shown["left_out"] = "its numbers do not belong to the same update as the others of the step"
    computed = [pair for pair in computed if "left_out" not in pair[1]]
    if computed:
        _add_losses(o, *map(list, zip(*computed)))
    norm = run.metrics["grad_norm"].get(step, math.nan) if "grad_norm" in run.metrics else math.nan
    return {
        "step": step, "loss_type": o.loss_type, "facts": facts, "options": _options_said(o), "entropy_coef":
        o.entropy_coef, "grad_norm": norm, "max_grad_norm": run.config.max_grad_norm, "responses": responses,
        "transport": o.divergence_in_loss and o.kl == "ot", "rollout": o.importance_correction != "none",
    }  # fmt: skip


def _options_said(o: LossOptions) -> str:
    """The options of the loss that are not the default, for readers."""
    defaults = LossOptions()
    return ", ".join(f"{name} {value}" for name, value in vars(o).items() if value != getattr(defaults, name))


def _response(record: Record, number: int, o: LossOptions) -> dict[str, Any]:
    """The facts of a response without its log-probabilities. Tokens of a response that is left out move nothing."""
    update = record["update"]
    n, facts = len(record["tokens"]), update["step"]
    shown = {
        "group": record["group_id"], "problem": record["problem"], "number": number, "reward": record["reward"],
        "right": record["reward_parts"].get("answer") == 1.0, "advantage": record["advantage"],
        "tokens": record["tokens"], "drawn": record["token_logprobs"],
        "weights": {name: _weight(name, n, facts["tokens"], facts["responses"], facts["longest"]) for name in UNITS},
    }  # fmt: skip
    numbers = [update[name] for name in UPDATE_LISTS if name in update]
    if not numbers:
        cut = o.mask_truncated and record["finish_reason"] == "length"
        shown["left_out"] = (
            "it was cut, and this run leaves such responses out" if cut else "its advantage is 0, so no token moves"
        )
        if cut:
            shown["weights"] = dict.fromkeys(UNITS, 0.0)
    elif any(None in values for values in [*numbers, record["token_logprobs"]]) or record["advantage"] is None:
        shown["left_out"] = "its numbers are not finite, so the step was refused"
    elif o.needs_reference and o.divergence_in_loss and "ref_logp" not in update:
        shown["left_out"] = "its log-probabilities under the reference are missing"
    return shown


@lru_cache(maxsize=10_000)
def _weight(loss_type: str, n: int, tokens: int, responses: int, longest: int) -> float:
    """Weight of each token of a response of n tokens, in a step of so many tokens and responses."""
    if not n or not 0 < responses < 1_000_000 or not 0 < tokens < 10_000_000:
        return 0.0
    lengths = torch.zeros(responses, dtype=torch.long)  # only n, their sum and their number matter
    lengths[0] = n
    lengths[-1] += max(0, tokens - n)
    return float(token_weights(loss_type, lengths, longest)[0])


def _add_losses(o: LossOptions, records: list[Record], responses: list[dict[str, Any]]) -> None:
    """Ratio, clipping and unit of every token under every loss, and the step's own coefficients."""
    sizes = [len(r["tokens"]) for r in records]
    for record, shown in zip(records, responses):
        shown |= {name: record["update"][name] for name in ("logp", "entropy", "coefficient")}
        if "mask" in record["update"]:
            shown["mask"] = record["update"]["mask"]
        shown["units"] = {}
    for loss_type, name in UNITS.items():
        if name in responses[0]["units"]:
            continue
        parts, units = coefficients(replace(o, loss_type=cast(Any, loss_type)), records)
        clipped = parts.terms.clipped_low + 2 * parts.terms.clipped_high.int()
        pieces = (x.split(sizes) for x in (significant(units), significant(parts.terms.ratio), clipped))
        for shown, unit, ratio, cut in zip(responses, *pieces):
            sequence = name == "sequence_surrogate"
            shown["units"][name] = {
                "unit": unit.tolist(), "clipped": "".join(map(str, cut.tolist())),
                **({"ratio": ratio[0].item()} if sequence else {}),
            }  # fmt: skip
            if not sequence:
                shown["ratio"] = ratio.tolist()
    for record, shown in zip(records, responses):
        shown["difference"] = _difference(o, record, shown)


def coefficients(o: LossOptions, records: list[Record]) -> tuple[LossParts, Tensor]:
    """The loss at weight 1 of each token, and its derivatives with respect to the log-probabilities [M], in fp64.

    It covers the policy loss and a divergence by token. Entropy and optimal transport do not act through the
    log-probability of the token: they have derivatives with respect to the logits and the hidden states.
    """
    o = replace(o, entropy_coef=0.0, beta=0.0 if o.kl == "ot" else o.beta)
    logp = _flat(records, "logp").requires_grad_()
    mask, ref_logp = (_flat(records, n) if n in records[0]["update"] else None for n in ("mask", "ref_logp"))
    parts = loss_of_scores(o, _micro_batch(records), logp, torch.zeros_like(logp), logp, ref_logp, mask)
    return parts, torch.autograd.grad(parts.loss, logp)[0]


def _flat(records: list[Record], name: str) -> Tensor:
    return torch.tensor([x for r in records for x in r["update"][name]], dtype=torch.float64)


def _micro_batch(records: list[Record]) -> MicroBatch:
    """The responses as the loss wants them. It reads no ids."""
    nothing = torch.zeros(0, dtype=torch.long)
    drawn = torch.tensor([x for r in records for x in r["token_logprobs"]], dtype=torch.float64)
    before = None
    if "rollout_logp" in records[0]["update"]:
        before = [Scores(torch.tensor(r["update"]["rollout_logp"], dtype=torch.float64)) for r in records]
    return MicroBatch(
        ids=nothing, positions=nothing, layout=Layout.shared_prefix([1], [[]]), predicting_rows=nothing,
        targets=nothing, old_logp=drawn, weights=torch.ones_like(drawn), mean_weights=torch.ones_like(drawn),
        advantages=torch.tensor([r["advantage"] for r in records], dtype=torch.float64),
        lengths=torch.tensor([len(r["tokens"]) for r in records]), answer_weight=0.0, temperature=1.0, vocab_size=None,
        kept=None, numbers=list(range(len(records))), before=before,
    )  # fmt: skip


def _difference(o: LossOptions, record: Record, shown: dict[str, Any]) -> float:
    """Largest difference of the step's own coefficients and those computed here, both at weight 1."""
    weight, units = shown["weights"][o.loss_type], shown["units"][UNITS[o.loss_type]]["unit"]
    if not weight:
        return 0.0
    return max((abs(a / weight - unit) for a, unit in zip(record["update"]["coefficient"], units)), default=0.0)
