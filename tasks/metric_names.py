"""Names that a task may give to its reward parts and diagnostics: none that the run itself uses in metrics.jsonl.

A part is logged as `rewards/<part>/mean` and `eval_<part>`, a diagnostic under its own name and as `eval_<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable

# Metrics of a step without a group, the names behind `eval_`, and the parts that the trainer adds (shaping.py).
RUN_NAMES = frozenset([
    "step", "loss", "policy_loss", "kl", "entropy", "entropy_coef", "grad_norm", "learning_rate", "num_tokens",
    "step_time", "loss_scale", "reward", "reward_std", "frac_reward_zero_std", "frac_reward_missing", "mean_length",
    "clipped_ratio", "overlong", "random", "solved", "full_format", "sums", "false_sums", "greedy",
])  # fmt: skip
RUN_GROUPS = frozenset([
    "rewards", "completions", "clip_ratio", "ratio", "sampling", "update", "rollout", "memory", "rank", "curriculum",
    "tools",
])  # fmt: skip
TASK_DIAGNOSTICS = frozenset(["solved", "full_format", "sums", "false_sums"])  # of Task.diagnostics


def name_problem(name: object) -> str | None:
    """Why a reward part or a diagnostic cannot have this name. None: it can."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or name != name.strip():
        return f"the name {name!r:.60} is not readable text"
    if name in RUN_NAMES or name.startswith(("eval_", "greedy_", "pass@")) or name.partition("/")[0] in RUN_GROUPS:
        return f"the name {name} is one of the run's own metrics"
    return None


def check_names(kind: str, names: Iterable[object]) -> None:
    """Raise ValueError, in one line, for a name that would overwrite a metric of the run. `kind`: "reward part", ..."""
    for name in names:
        problem = name_problem(name)
        if problem:
            raise ValueError(f"{kind}: {problem}; choose another name")
