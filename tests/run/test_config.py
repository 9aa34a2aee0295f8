"""The configuration: layers, one-line errors, and the YAML round trip."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run import config as config_module
from run.config import Config, config_files, load_config, new_run_dir, parse_args, preset_for, resumed_run, save_yaml
from run.config import validate as validate_config
from run.flags import parse_flags, take_flag, yaml_flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str, name: str = "my.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def error_line(call, *args, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


# --- layers


def test_flags_win_over_files_and_files_over_defaults(yaml_file):
    low, high = yaml_file("lr: 3e-5\nsteps: 7\ngroup_size: 4\n"), yaml_file("steps: 8\n", "high.yaml")
    config = parse_args(["--group-size=6", "--config", low, f"--config={high}"])
    assert (config.lr, config.steps, config.group_size) == (3e-5, 8, 6)
    assert config.max_new_tokens == Config.max_new_tokens  # no preset lies under a file that was named


def test_the_last_of_a_repeated_flag_wins():
    assert parse_args(["--steps", "3", "--steps=5"]).steps == 5


def test_without_a_file_the_preset_fits_checkpoint_and_device(monkeypatch):
    assert config_files([]) == [preset_for("countdown-tiny")] == [ROOT / "configs/countdown-tiny.yaml"]
    assert preset_for("Qwen2.5-0.5B-Instruct", "cpu").name == "cpu.yaml"
    assert preset_for("Qwen2.5-0.5B-Instruct", "cuda").name == "qwen2.5-0.5b.yaml"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert config_files(["--ckpt", "some/folder"])[0].name == "qwen2.5-0.5b.yaml"
    assert config_files(["--ckpt=some/folder", "--device", "cpu"])[0].name == "cpu.yaml"


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_parses(preset):
    config = load_config(preset)
    changed = [f.name for f in dataclasses.fields(Config) if getattr(config, f.name) != f.default]
    assert changed  # a preset that changes nothing was not read


def test_underscores_dashes_lists_switches_and_none():
    words = ["--numbers", "3", "--no_gradient_checkpointing", "--amsgrad", "--delta", "None", "--betas", "0.8", "0.9"]
    config = parse_args([*words, "--lora_targets=q_proj"])
    assert config.numbers == (3,)
    assert (config.gradient_checkpointing, config.amsgrad, config.delta) == (False, True, None)
    assert config.betas == (0.8, 0.9)
    assert config.lora_targets == ("q_proj",)


# --- the YAML round trip

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: text != "None")


@settings(max_examples=60, deadline=None)
@given(FINITE, FINITE, TEXT, st.lists(st.integers(), max_size=3), st.booleans(), st.none() | FINITE)
def test_save_and_load_give_the_same_config_to_the_last_bit(tmp_path_factory, lr, eps, text, numbers, flag, delta):
    config = Config(lr=lr, betas=(lr, eps), ckpt=text, run_dir=text, numbers=tuple(numbers), amsgrad=flag, delta=delta)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_yaml(config, path)
    loaded = parse_flags(Config, yaml_flags(path, Config))  # load_config without validation
    assert dataclasses.asdict(loaded) == dataclasses.asdict(config)
    assert repr(loaded) == repr(config)  # -0.0 is equal to 0.0, but not printed like it


def test_a_line_separator_in_a_name_survives_the_yaml(tmp_path):
    save_yaml(Config(run_dir="a\x85b\u2028c"), tmp_path / "x.yaml")
    assert parse_flags(Config, yaml_flags(tmp_path / "x.yaml", Config)).run_dir == "a\x85b\u2028c"


def test_floats_that_yaml_takes_for_text(yaml_file):
    assert load_config(yaml_file("lr: 1e-6\neps: 1e-08\nkl_target: 3\n")).lr == 1e-6


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lo-rank", "3"], "unknown option --lo-rank, the nearest known one is --lora-rank"),
        (["--group_sise=4"], "nearest known one is --group-size"),
        (["--no-gradient-checkpointin"], "nearest known one is --gradient-checkpointing"),
        (["--lr", "fast"], "--lr"),
        (["--device", "gpu"], "('auto', 'cpu', 'cuda', 'mps')"),
        (["--steps"], "--steps"),
        (["--steps", "3", "4"], "unexpected argument '4'"),
        (["--betas", "0.9"], "--betas"),
        (["--config"], "--config needs a value"),
        (["--config", "--steps", "3"], "--config needs a value"),
        (["--group-size", "1"], "a group of one"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, said):
    """CHECKLIST 46: unknown keys and wrong values."""
    assert said in error_line(parse_args, argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("group_sise: 4", "unknown option group_sise, the nearest known one is group_size"),
        ("lr: fast", "--lr"),
        ("steps: 3.5", "--steps"),
        ("steps: [3]", "steps: expected one value, found [3]"),
        ("numbers: 3", "numbers: expected a list of values, found 3"),
        ("numbers: [[3]]", "numbers: expected a list"),
        ("amsgrad: 1", "amsgrad: expected true or false, found 1"),
        ("lr: true", "lr: expected one value"),
        ("loss_type: null", "--loss-type"),
        ("- lr", "found list"),
        ("", "found NoneType"),
        ("lr: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("!!python/object/apply:os.system [true]", "not YAML"),
        ("ckpt: 2020-99-99", "not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(yaml_file, text, said):
    """CHECKLIST 46: a YAML file has the same errors as the flags, and its name in front."""
    path = yaml_file(text)
    line = error_line(parse_args, ["--config", path])
    assert line.startswith(path)
    assert said in line


def test_missing_and_binary_files(tmp_path):
    assert "nowhere.yaml" in error_line(parse_args, ["--config", "nowhere.yaml"], kind=FileNotFoundError)
    (tmp_path / "weights.yaml").write_bytes(bytes(range(256)))
    assert "not YAML" in error_line(load_config, tmp_path / "weights.yaml")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"group_size": 1}, "a group of one has no baseline"),
        ({"group_size": 0}, "--group-size 0: expected 1 or more"),
        ({"prompts_per_step": 0}, "--prompts-per-step"),
        ({"prompts_per_step": 2**31}, "--prompts-per-step 2147483648: expected 1 or more, at most 2147483647"),
        ({"seed": 2**32}, "--seed 4294967296: expected a number from 0 to 4294967295"),
        ({"lr": 1e10}, "expected a number above 0, at most 1000000000"),
        ({"temperature": 0.0}, "--temperature 0: expected a number above 0"),
        ({"temperature": float("inf")}, "expected a finite number"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p 1.5: expected a number above 0 and up to 1"),
        ({"epsilon_low": 1.5}, "--epsilon-low"),
        ({"epsilon_high": -0.1}, "--epsilon-high"),
        ({"numbers": (3, 0)}, "--numbers 0"),
        ({"numbers": ()}, "--numbers is empty"),
        ({"min_number": 9, "max_number": 3}, "--max-number 3 is below --min-number 9"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"delta": 1.1}, "--delta 1.1"),
        ({"delta": 3.0, "loss_type": "cispo"}, "--loss-type cispo"),
        ({"kl": "ot", "kl_in": "reward"}, "--kl ot"),
        ({"lora_rank": 4, "lora_targets": ()}, "--lora-targets"),
        ({"warmup_steps": 9, "steps": 3}, "--warmup-steps 9"),
        ({"ckpt": " "}, "--ckpt"),
    ],
)
def test_values_that_cannot_work_are_refused(fields, said):
    """CHECKLIST 46: a group of one and other impossible numbers, refused by name."""
    validate_config(Config())
    assert said in error_line(validate_config, Config(**fields))


def test_limits_themselves_are_allowed():
    validate_config(Config(group_size=2, top_p=1.0, epsilon_low=1.0, beta=0.0, eval_every=0, eval_samples=0, delta=1.3))
    validate_config(Config(warmup_steps=3, steps=3, min_number=5, max_number=5, betas=(0.0, 0.0)))


# --- help


def test_help_names_every_field_under_its_title():
    """And exits with 0, also where the terminal knows no box drawing."""
    code = "import sys; from run.config import parse_args; parse_args(sys.argv[1:])"
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        shown = subprocess.run([sys.executable, "-c", code, "--help"], env=environment, capture_output=True)
        assert shown.returncode == 0
        text = shown.stdout.decode(encoding)
        assert all("--" + f.name.replace("_", "-") in text for f in dataclasses.fields(Config))
    assert (
        text.index("Task and reward")
        < text.index("--task")
        < text.index("─ Rollout ─".encode(encoding, "replace").decode(encoding))
        < text.index("--top-k")
    )
    assert "(default: 192)" in text  # the defaults shown are those of the preset


# --- runs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working folder with two runs that have checkpoints. B is the newer one."""
    monkeypatch.chdir(tmp_path)
    for age, name in ((200, "a"), (100, "b")):
        latest = tmp_path / "runs" / name / "checkpoints" / "latest"
        latest.parent.mkdir(parents=True)
        latest.write_text("step-000001")
        os.utime(latest, (1e9 - age, 1e9 - age))
        save_yaml(Config(run_dir=f"moved/{name}", steps=70, lr=0.5), latest.parent.parent / "config.yaml")
    return tmp_path / "runs"


def test_resume_brings_the_config_of_the_run_it_continues(runs):
    config = parse_args(["--resume", "--lr", "0.25"])
    assert (config.resume, config.run_dir, config.steps, config.lr) == ("latest", "runs/b", 70, 0.25)
    assert parse_args(["--resume", "--run_dir=runs/a"]).run_dir == "runs/a"
    assert parse_args(["--resume", "runs/a"]).run_dir == "runs/a"
    config = parse_args(["--steps", "90", "--resume", "runs/a/checkpoints/step-000001"])
    assert (config.steps, Path(config.run_dir)) == (90, runs / "a")


def test_resume_with_a_file_uses_the_file(runs, yaml_file):
    config = parse_args(["--resume", "--config", yaml_file("steps: 3")])
    assert (config.steps, config.run_dir) == (3, "runs/b")
    assert parse_args(["--config", "runs/a/config.yaml", "--resume"]).run_dir == "moved/a"


def test_resume_without_a_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run with a checkpoint" in error_line(parse_args, ["--resume"], kind=FileNotFoundError)
    assert "no config.yaml" in error_line(resumed_run, "elsewhere", kind=FileNotFoundError)


def test_a_new_run_gets_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "RUNS", tmp_path)
    config = Config(ckpt="Qwen/Qwen2.5-0.5B", task="my/tasks.py:Sums")
    assert new_run_dir(config) == tmp_path / "Qwen2.5-0.5B-my-tasks.py-Sums-001"
    for number in ("009", "x"):
        (tmp_path / f"Qwen2.5-0.5B-my-tasks.py-Sums-{number}").mkdir()
    assert new_run_dir(config).name == "Qwen2.5-0.5B-my-tasks.py-Sums-010"
    assert new_run_dir(Config(run_dir="here")) == Path("here")


def test_take_flag_leaves_the_rest_in_order():
    assert take_flag(["--a", "1", "--b=2", "c", "--a=3"], "--a") == (["1", "3"], ["--b=2", "c"])


@pytest.mark.parametrize(("value", "place"), [("true", "host"), ("false", "device")])
def test_the_config_of_an_old_run_is_read_with_the_new_name(value, place, tmp_path, caplog):
    """Every config.yaml of an older version has cpu_optimizer, and its run can still be resumed."""
    file = tmp_path / "config.yaml"
    file.write_text(f"lr: 1e-5\ncpu_optimizer: {value}\n")
    assert load_config(file).optimizer_state == place
    (record,) = caplog.records
    assert "cpu_optimizer is now optimizer_state" in record.getMessage()


@pytest.mark.parametrize("flag", ["--cpu-optimizer", "--no-cpu-optimizer"])
def test_an_old_flag_names_the_new_one(flag):
    with pytest.raises(ValueError, match="is now --optimizer-state, with one of host, device"):
        parse_args([flag])


def test_an_old_name_with_a_wrong_value_names_the_new_one(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("cpu_optimizer: maybe\n")
    with pytest.raises(ValueError, match="is now optimizer_state"):
        load_config(file)
