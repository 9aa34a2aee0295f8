"""The configuration of a run: the dataclass `Config`, the YAML file and the command line have the same options.

Every field of the groups in options.py is a flag of the same name (`prompts_per_step` -> `--prompts-per-step`). YAML
files hold the same options and are read by the same parser (flags.py).

Later layers win:  dataclass defaults  <  file  <  flags.  The file is

* what `--config FILE` names (repeat it to lay several on top of each other);
* else, with `--resume`, the config.yaml of the run that is continued;
* else the preset in configs/ that fits `--ckpt` and the machine.

How to call it:

    config = parse_args(sys.argv[1:])       # ValueError or FileNotFoundError with one clear line
    config = Config(steps=3, task="gsm8k")  # in Python; validate(config) if in doubt
    save_yaml(config, "config.yaml"); config = load_config("config.yaml")
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from run.flags import normalise, parse_flags, take_flag, yaml_flags
from run.options import (
    BUNDLED_CKPT,
    AdvantageOptions,
    Conflicts,
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    ProcessOptions,
    RolloutOptions,
    RunOptions,
    ScheduleOptions,
    TaskOptions,
    UpdateOptions,
    check_ranges,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = Path("runs")


@dataclass
class Config(  # dataclasses take fields from the last base to the first, so the order of options is bottom up
    ProcessOptions, ScheduleOptions, LoraOptions, OptimizerOptions, UpdateOptions, LossOptions, AdvantageOptions,
    RolloutOptions, TaskOptions, RunOptions,
):  # fmt: skip
    """Train a language model with GRPO on rewards that can be checked.

    --config FILE reads the same options from YAML (repeatable); flags win over it. Without it a preset from configs/
    is taken: the bundled model's own, one for a 24 GB GPU, or one for a CPU.
    """

    def conflicts(self) -> Conflicts:
        return [
            (
                self.warmup_steps > self.steps,
                f"--warmup-steps {self.warmup_steps} is longer than the run, --steps {self.steps}",
            ),
            (
                self.overlong_buffer > self.max_new_tokens,
                f"--overlong-buffer {self.overlong_buffer} is longer than a response, --max-new-tokens "
                f"{self.max_new_tokens}",
            ),
            (
                self.random_reward > 0 and self.advantage_estimator == "gdpo",
                "--random-reward replaces the whole reward, and --advantage-estimator gdpo trains on its parts; take "
                "another estimator",
            ),
            (
                self.advantage_estimator == "pass_at_k" and self.pass_k >= self.group_size,
                f"--pass-k {self.pass_k} and --group-size {self.group_size}: the best of the whole group is the same "
                "for all of its responses; take a smaller --pass-k",
            ),
        ]


# --- from the command line and from files


def parse_args(argv: list[str]) -> Config:
    """Read a command line (without the program's name) over the YAML files that lie under it.

    Raises ValueError (unknown or wrong option) or FileNotFoundError (a file that is not there), each with one line.
    `--help` prints and exits with code 0.
    """
    argv = normalise(argv, bare={"--resume": "latest"})
    files = config_files(argv)
    config = Config()
    for file in files:
        config = _lay_over(config, yaml_flags(file, Config), source=str(file))
    named, argv = take_flag(argv, "--config")
    if not named and _last(argv, "--resume") not in (None, "auto"):
        config.run_dir = str(files[0].parent)  # not what the file says: the folder may have been moved since
    config = _lay_over(config, argv)
    if config.resume == "auto" and config.run_dir is None:
        raise ValueError("--resume auto continues what --run-dir holds: name it")
    if config.resume == "latest" and config.run_dir is None:
        config.run_dir = str(resumed_run("latest"))
    validate(config)
    return config


def _lay_over(config: Config, flags: list[str], source: str = "command line") -> Config:
    """`config` with flags over it. A new task without levels ends the curriculum that a lower layer asked for."""
    new = parse_flags(Config, flags, default=config, source=source)
    if config.curriculum and config.has_levels and not new.has_levels and "--curriculum" not in flags:
        new.curriculum = False
    return new


def config_files(argv: list[str]) -> list[Path]:
    """The YAML files that lie under a command line's flags, lowest first; the rule is in the module docstring."""
    named, argv = take_flag(normalise(argv, bare={"--resume": "latest"}), "--config")
    if named:
        return [Path(file) for file in named]
    resume, run_dir = _last(argv, "--resume"), _last(argv, "--run-dir")
    if resume == "auto":
        resume = run_dir if run_dir and (Path(run_dir) / "config.yaml").is_file() else None
    if resume:
        return [resumed_run(resume, run_dir) / "config.yaml"]
    return [preset_for(_last(argv, "--ckpt") or Config.ckpt, _last(argv, "--device") or Config.device)]


def preset_for(ckpt: str, device: str = "auto") -> Path:
    """The preset in configs/ that fits a checkpoint and a device."""
    if Path(ckpt).name == BUNDLED_CKPT:
        return CONFIGS / "countdown-tiny.yaml"
    if device == "auto":
        import torch  # only here: --help and the bundled model need not wait for it

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return CONFIGS / ("qwen2.5-0.5b.yaml" if device == "cuda" else "cpu.yaml")


def resumed_run(resume: str, run_dir: str | None = None) -> Path:
    """The run that `--resume` means: the folder named, the one that holds the checkpoint named, or the newest run."""
    if resume != "latest":
        run = Path(resume)
        if run.absolute().parent.name == "checkpoints":
            run = run.absolute().parent.parent
    elif run_dir:
        run = Path(run_dir)
    else:
        found = sorted(RUNS.glob("*/checkpoints/latest"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"--resume: no run with a checkpoint under {RUNS}/; name one: --resume RUN_FOLDER")
        run = found[-1].parent.parent
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume: {run} is no run folder, it has no config.yaml")
    return run


def load_config(path: str | Path) -> Config:
    """Read one YAML file over the dataclass defaults. Raises like `parse_args`."""
    config = parse_flags(Config, yaml_flags(path, Config), source=str(path))
    validate(config)
    return config


def save_yaml(config: Config, path: str | Path) -> None:
    """Write every field, so that `load_config` gives an equal Config, floats to the last bit."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    # ASCII: what lies beyond is escaped, for YAML would fold a line separator inside a text into a blank.
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def new_run_dir(config: Config) -> Path:
    """The folder this run writes to: the one named, or the first free runs/<ckpt>-<task>-<number>."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    name = re.sub(r"[^\w.-]+", "-", f"{Path(config.ckpt).name}-{config.task}-")
    numbers = [path.name.removeprefix(name) for path in RUNS.glob(f"{name}*")]
    return RUNS / f"{name}{max((int(n) for n in numbers if n.isdecimal()), default=0) + 1:03d}"


def _last(argv: list[str], flag: str) -> str | None:
    return next(reversed(take_flag(argv, flag)[0]), None)


# --- checks


def validate(config: Config) -> None:
    """Refuse options that cannot work, before time is spent. Raises ValueError with one line."""
    check_ranges(config)
    for group in type(config).__mro__:
        if "conflicts" in vars(group):
            for wrong, message in group.conflicts(config):
                if wrong:
                    raise ValueError(message)
