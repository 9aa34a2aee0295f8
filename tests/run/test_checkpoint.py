"""Checkpoints are whole or absent, come back to the last bit, and never end a run that could go on."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.qwen2_config import Qwen2Config
from optimizer import MemoryEfficientAdamW
from qwen2_llm import Qwen2ForCausalLM
from run import checkpoint
from run.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    rewind,
    save_checkpoint,
    verify_checkpoint,
)
from run.random_states import random_states, set_random_states
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.from_pretrained(ROOT / "assets/countdown-tiny")


def small_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True))
    for parameter in model.parameters():  # and not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model


def train(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 5), generator=generator)
        model(ids).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entries in state.items() for name, value in entries.items()}


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def run(tmp_path):
    """A run folder, and a function that saves a small checkpoint of a step into it."""
    model = small_model()
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)

    def save(step: int, **more) -> Path:
        return save_checkpoint(
            tmp_path, step, model, TOKENIZER, optimizer.state_dict(), {"tag": f"saved {step}"}, **more
        )

    save.folder, save.optimizer = tmp_path, optimizer
    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- the round trip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path, dtype, amsgrad):
    """CHECKLIST 42 and 31: weights, fp32 masters and moments, settings, and three more steps give the same bits."""
    settings = {"lr": 1 / 3000, "betas": (0.85, 0.97), "weight_decay": 0.1, "amsgrad": amsgrad}
    model = small_model(dtype=dtype)
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 1e-3}, {"params": parameters[3:]}]
    optimizer = MemoryEfficientAdamW(groups, **settings)
    train(model, optimizer, 3)
    folder = save_checkpoint(tmp_path, 3, model, TOKENIZER, optimizer.state_dict(), {"seen": 0.1 + 0.2})

    model2 = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    parameters2 = list(model2.parameters())
    optimizer2 = MemoryEfficientAdamW([{"params": parameters2[:3]}, {"params": parameters2[3:]}], amsgrad=amsgrad)
    state = load_checkpoint(folder, optimizer2)
    assert state == {"seen": 0.1 + 0.2, "step": 3, "score": None}
    assert optimizer2.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert_bitwise_equal(flat_state(optimizer2), flat_state(optimizer))
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in flat_state(optimizer2).values())
    assert any(name.endswith(".master") for name in flat_state(optimizer2)) == (dtype == torch.bfloat16)

    for one, other in ((model, optimizer), (model2, optimizer2)):
        train(one, other, 3, seed=1)
    assert_bitwise_equal(dict(model2.named_parameters()), dict(model.named_parameters()))
    assert_bitwise_equal(flat_state(optimizer2), flat_state(optimizer))


def test_an_optimizer_of_torch_comes_back_too(tmp_path):
    model = small_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    folder = save_checkpoint(tmp_path, 2, model, TOKENIZER, optimizer.state_dict(), {})
    fresh = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.1)
    load_checkpoint(folder, fresh)
    assert_bitwise_equal(flat_state(fresh), flat_state(optimizer))
    assert fresh.param_groups[0]["lr"] == 0.1


def test_the_folder_opens_with_transformers_and_its_sums_with_sha256sum(run):
    transformers = pytest.importorskip("transformers")
    folder = run(7)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ours = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = dict(loaded.named_parameters())
    assert_bitwise_equal(dict(ours.named_parameters()), {name: theirs[name] for name, _ in ours.named_parameters()})
    assert transformers.AutoTokenizer.from_pretrained(folder)("3 + 5").input_ids == TOKENIZER.encode("3 + 5")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_no_file_is_a_pickle(run):
    endings = {path.suffix for path in run(1).iterdir()}
    assert endings <= {".json", ".safetensors", ".jinja", ".txt", ""}


def test_extra_files_are_part_of_the_checkpoint(run):
    folder = run(1, extra=lambda folder: (folder / "adapter.json").write_text("{}") and None)
    (folder / "adapter.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"adapter\.json"):
        verify_checkpoint(folder)


def test_random_states_go_through_json():
    """CHECKLIST 42: random states."""
    own = torch.Generator().manual_seed(5)
    torch.rand(3, generator=own)
    random.gauss(0, 1)  # Python's generator keeps the second of a pair

    def draw():
        return random.random(), random.gauss(0, 1), torch.rand(3).tolist(), torch.randn(9, generator=own).tolist()

    states = json.loads(json.dumps(random_states(own=own)))
    expected = draw()
    draw()
    set_random_states(states, own=own)
    assert draw() == expected


# --- which is which


def test_latest_run_folder_and_checkpoint_folder_are_found(run):
    first, second = run(1), run(2)
    assert second == run.folder / "checkpoints" / "step-000002"
    for where in ("latest", run.folder, run.folder / "checkpoints", run.folder / "checkpoints" / "latest", second):
        assert find_checkpoint(where, run.folder) == second
    assert find_checkpoint(first) == first
    assert load_checkpoint(first)["tag"] == "saved 1"


def test_the_newest_and_the_best_are_kept(run):
    scores = [float("nan"), 0.1, 0.9, None, 0.2, None, 0.9]
    for step, score in enumerate(scores):
        run(step, keep=2, score=score)
    assert names(run.folder) == ["latest", "step-000002", "step-000005", "step-000006"]
    assert load_checkpoint(run.folder / "checkpoints/step-000002")["score"] == 0.9
    run(7, keep=1, score=0.95)
    assert names(run.folder) == ["latest", "step-000007"]


def test_steps_are_ordered_as_numbers(run):
    for step in (999_999, 1_000_000, 1_000_001):
        run(step, keep=2)
    assert names(run.folder) == ["latest", "step-1000000", "step-1000001"]


def test_rewind_makes_another_future(run):
    """After a resume from step 2 the checkpoints 3 and 4 are neither latest nor counted, and go with the next save."""
    for step in (1, 2, 3, 4):
        run(step, keep=9)
    rewind(run.folder, 2)
    assert find_checkpoint("latest", run.folder).name == "step-000002"
    assert "step-000004" in names(run.folder)
    run(3, keep=9)
    assert names(run.folder) == ["latest", "step-000001", "step-000002", "step-000003"]
    assert find_checkpoint("latest", run.folder).name == "step-000003"


def test_a_first_save_that_was_killed_before_latest_was_written_is_found(run):
    final = run(1)
    (run.folder / "checkpoints" / "latest").unlink()
    assert find_checkpoint("latest", run.folder) == find_checkpoint(run.folder) == final
    rewind(run.folder, 1)
    assert names(run.folder) == ["latest", "step-000001"]


def test_a_resume_deletes_what_a_killed_save_did_not(run):
    """A process killed between the new checkpoint and the deletion of the old: at its end, a run saves no more."""
    for step in (1, 2, 3, 4):
        run(step, keep=9)
    rewind(run.folder, 2, keep=1)
    assert len(names(run.folder)) == 5, "what is after the step stays until the next save"
    rewind(run.folder, 4, keep=2)
    assert names(run.folder) == ["latest", "step-000003", "step-000004"]


def test_the_same_step_can_be_saved_again(run):
    run(1)
    run.optimizer.param_groups[0]["lr"] = 0.125
    folder = run(1)
    load_checkpoint(folder, run.optimizer)
    assert run.optimizer.param_groups[0]["lr"] == 0.125
    assert names(run.folder) == ["latest", "step-000001"]


# --- refused in one line


def refuse(kind: type[Exception], match: str, call, *args) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json"])
def test_one_flipped_bit_or_one_missing_byte_is_refused(run, name):
    """CHECKLIST 46 and 43: a damaged checkpoint is named, not loaded."""
    folder = run(1)
    good = (folder / name).read_bytes()
    damage_bit(folder / name)
    refuse(ValueError, f"{name} is not what was saved", load_checkpoint, folder, run.optimizer)
    (folder / name).write_bytes(good[:-1])
    refuse(ValueError, f"{name} is not what was saved", load_checkpoint, folder, run.optimizer)
    (folder / name).unlink()
    refuse(FileNotFoundError, f"{name} is missing", load_checkpoint, folder, run.optimizer)


def test_damaged_sums_are_refused(run):
    folder = run(1)
    sums = (folder / "SHA256SUMS").read_bytes()
    for content in (sums[: len(sums) // 2], b"", b"\xff\xfe", b"00  ../../secret\n" + sums):
        (folder / "SHA256SUMS").write_bytes(content)
        refuse((ValueError, FileNotFoundError), "SHA256SUMS|secret", load_checkpoint, folder)
    (folder / "SHA256SUMS").unlink()
    refuse(FileNotFoundError, "no SHA256SUMS", load_checkpoint, folder)


def test_a_state_that_does_not_fit_is_refused(run):
    folder = run(1)
    other = MemoryEfficientAdamW([torch.nn.Parameter(torch.zeros(3))])
    refuse(ValueError, "does not fit this model and optimizer", load_checkpoint, folder, other)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "[" * 9000, '{"state": 3, "step": 1, "score": 1, "optimizer": {}}', "nul"]
)
def test_a_hostile_state_with_right_sums_is_refused(run, text):
    folder = run(1)
    (folder / "trainer_state.json").write_text(text)
    digest = checkpoint._sha256(folder / "trainer_state.json")
    (folder / "SHA256SUMS").write_text(f"{digest}  trainer_state.json\n")
    refuse(ValueError, "not what save_checkpoint writes", load_checkpoint, folder)


def test_nothing_to_resume_from(run, tmp_path):
    refuse(FileNotFoundError, "no checkpoint in", find_checkpoint, "latest", tmp_path)
    refuse(FileNotFoundError, "no checkpoint in", find_checkpoint, ROOT / "assets/countdown-tiny")
    folder = run(1)
    (tmp_path / "checkpoints/latest").write_text("../checkpoints/step-000001")
    refuse(FileNotFoundError, "not a checkpoint", find_checkpoint, "latest", tmp_path)
    (tmp_path / "checkpoints/latest").write_text("step-000001")
    shutil.rmtree(folder)
    refuse(FileNotFoundError, "names 'step-000001', which is not a checkpoint", find_checkpoint, "latest", tmp_path)


# --- faults


def test_everything_is_synced_before_it_gets_its_name(run, monkeypatch):
    """CHECKLIST 43: each file and the folder, then the rename, then the folder above; `latest` last, and so too."""
    events = []
    real_sync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_sync(descriptor)

    def rename(source, target):
        events.append(("rename", Path(target).name))
        real_rename(source, target)

    def replace(source, target):
        events.append(("rename", Path(target).name))
        real_replace(source, target)

    for name, function in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, function)
    folder = run(1)
    named = events.index(("rename", "step-000001"))
    before = {name for event, name in events[:named] if event == "sync"}
    assert before >= {path.name for path in folder.iterdir()} | {".unfinished-step-000001"}
    after = [("sync", "checkpoints"), ("sync", ".unfinished-latest"), ("rename", "latest"), ("sync", "checkpoints")]
    assert events[named + 1 :] == after


CALLS = ["fsync", "rename", "replace", "open", "mkdir", "write_text", "save_file", "save_pretrained", "rmtree"]


def fail_at(monkeypatch, call: str, n: int) -> list[int]:
    """Let the n-th use of a call raise "disk full". The list that is returned has the number of uses so far."""
    owner = {"write_text": Path, "mkdir": Path, "save_file": checkpoint, "rmtree": shutil}.get(call, os)
    owner = Tokenizer if call == "save_pretrained" else owner
    real, uses = getattr(owner, call), [0]

    def failing(*args, **more):
        uses[0] += 1
        if uses[0] == n + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **more)

    monkeypatch.setattr(owner, call, failing)
    return uses


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:cannot delete the old checkpoint")
def test_a_disk_that_refuses_any_one_call_leaves_a_whole_checkpoint(run, monkeypatch, call, again):
    """CHECKLIST 43: every use of every call in turn. The previous or the new one loads, and the next save works."""
    step, n, failures = 1, 0, 0
    run(step)
    while True:
        step += not again
        with monkeypatch.context() as patch:
            uses = fail_at(patch, call, n)
            try:
                run(step, keep=1)
                refused = False
            except OSError:
                refused = True
        if uses[0] <= n:
            break
        failures += refused
        found = load_checkpoint(find_checkpoint("latest", run.folder))
        assert found["tag"] == f"saved {found['step']}"
        assert found["step"] in ((step - 1, step) if refused else (step,))
        run(step, keep=1)
        assert names(run.folder) == ["latest", f"step-{step:06d}"]
        n += 1
    assert n > 0
    assert failures > 0 or call == "rmtree"


def test_a_full_disk_is_an_oserror(run):
    """Real: the process may write no file beyond 4096 bytes."""
    run(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"large|full|space"):
            run(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(run.folder) == ["latest", "step-000001"]
    assert load_checkpoint(find_checkpoint("latest", run.folder))["tag"] == "saved 1"
    assert run(2).is_dir()


def test_a_run_folder_that_vanished_is_an_oserror(run):
    shutil.rmtree(run.folder)
    with pytest.raises(FileNotFoundError):
        run(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_is_an_oserror(run):
    run(1)
    (run.folder / "checkpoints").chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            run(2)
        assert load_checkpoint(find_checkpoint("latest", run.folder))["tag"] == "saved 1"
    finally:
        (run.folder / "checkpoints").chmod(0o700)


KILLS = '''
import functools, os, shutil, signal, sys, time, random
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from run import checkpoint
from optimizer import MemoryEfficientAdamW

os.fsync = lambda descriptor: None  # slow, and of no effect where a process dies and not the machine
READERS = ("_sha256", "_blocks", "_split", "_step", "_score", "<genexpr>", "<listcomp>", "<dictcomp>", "<lambda>")

class Model(torch.nn.Linear):
    def save_pretrained(self, folder):
        checkpoint.save_file({"weight": self.weight.detach()}, folder / "model.safetensors")

class NoTokenizer:
    def save_pretrained(self, folder): pass

@functools.cache
def trained(tag, size):
    model = Model(size, size, bias=False)
    torch.nn.init.constant_(model.weight, tag)
    optimizer = MemoryEfficientAdamW(model.parameters())
    model.weight.grad = torch.full_like(model.weight, tag)
    optimizer.step()
    return model, optimizer

def save(run, step, tag, size=3):
    model, optimizer = trained(tag, size)
    return checkpoint.save_checkpoint(run, step, model, NoTokenizer(), optimizer.state_dict(), {"tag": tag}, keep=1)

def check(run):
    """The checkpoint that `latest` means is whole and of one piece."""
    folder = checkpoint.find_checkpoint("latest", run)
    state = checkpoint.load_checkpoint(folder)
    moments = checkpoint.load_file(folder / "optimizer.safetensors")["0.exp_avg"]
    assert torch.allclose(moments, torch.full_like(moments, 0.1 * state["tag"])), (folder, state)
    return state["tag"]

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def die_at_line(n):
    left = [n]
    def trace(frame, event, argument):
        if frame.f_code.co_filename != checkpoint.__file__ or frame.f_code.co_name in READERS:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        return trace
    sys.settrace(trace)

base = Path(sys.argv[2])
trained(2, 3)  # here, and not in each child
for step in (2, 1):  # the checkpoint of the next step, and the same step again
    old = base / f"old-{step}"
    old.mkdir()
    save(old, 1, 1)
    tags, n, status = [], 0, 9
    while status:
        run = base / f"run-{step}-{n}"
        shutil.copytree(old, run)
        def work():
            die_at_line(n)
            save(run, step, 2)
        status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
        tags.append(check(run))
        save(run, 3, 3)
        assert check(run) == 3
        assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-000003"], os.listdir(run / "checkpoints")
        n += 1
    assert tags == sorted(tags) and set(tags) == {1, 2}, tags  # once it is the new one it stays the new one
    print("lines", n)

run, rng, killed = base / "timed", random.Random(0), 0
run.mkdir()
size = 800  # 8 MB in all: long enough to be killed inside a file
save(run, 1, 1, size)
begin = time.perf_counter()
save(run, 2, 2, size)
duration = time.perf_counter() - begin
tag, step = 2, 2
while killed < 8 and step < 60:  # what is true at every moment is looked at; how many of them hit a save is luck
    step += 1
    trained(step, size)
    pid = child(lambda: save(run, step, step, size))
    time.sleep(rng.uniform(0, 1.1 * duration))
    os.kill(pid, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL:
        killed += 1
    else:
        duration *= 0.9  # it was measured while the disk was busy
    found = check(run)
    assert found in (tag, step), (found, tag, step)
    tag = found
print("killed", killed)
'''


@pytest.mark.slow
def test_a_kill_at_any_line_or_moment_leaves_the_old_or_the_new_one(tmp_path):
    """CHECKLIST 43: the process dies at each line of a save in turn, and by SIGKILL at random moments."""
    command = [sys.executable, "-c", KILLS, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert counts[0] > 50
    assert counts[1] > 50
    assert counts[2] > 3


def test_a_full_disk_after_a_kill_between_two_renames(run, monkeypatch):
    """The checkpoint that had stepped aside for another of its step is still the one that is found."""
    folder = run(1)
    folder.rename(folder.with_name("step-000001.replaced"))
    assert load_checkpoint(find_checkpoint("latest", run.folder))["tag"] == "saved 1"
    fail_at(monkeypatch, "write_text", 0)
    with pytest.raises(OSError, match="No space left"):
        run(2)
    assert load_checkpoint(find_checkpoint("latest", run.folder))["tag"] == "saved 1"


def test_what_a_killed_save_left_is_cleared_by_the_next(run):
    unfinished = run.folder / "checkpoints/.unfinished-step-000001"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    run(1)
    assert names(run.folder) == ["latest", "step-000001"]


def test_a_save_that_fails_leaves_no_litter(run, monkeypatch):
    def sync(path: Path) -> None:
        if path.name == "SHA256SUMS":  # all files are written
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(checkpoint, "_sync", sync)
    with pytest.raises(OSError, match="I/O error"):
        run(1)
    assert names(run.folder) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "state"])
def test_nothing_that_is_not_finite_is_saved(tmp_path, value, where):
    """CHECKLIST 44: neither weights nor moments. The checkpoint before stays, and nothing is left over."""
    model = small_model()
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, model, TOKENIZER, optimizer.state_dict(), {})
    moments = optimizer.state[next(iter(optimizer.state))]["exp_avg_sq"]
    spoiled = model.model.norm.weight.data if where == "weight" else moments
    spoiled.view(-1)[-1] = value
    with pytest.raises(checkpoint.NotFiniteError, match="NaN or infinity") as caught:
        save_checkpoint(tmp_path, 2, model, TOKENIZER, optimizer.state_dict(), {}, keep=1)
    assert ("model.norm.weight" in str(caught.value)) == (where == "weight")
    assert names(tmp_path) == ["latest", "step-000001"]


def test_unsound_checkpoints_push_no_sound_one_out(run):
    """CHECKLIST 44: the newest are kept in any state, and `keep` sound ones with them."""
    for step, sound in enumerate([True, True, False, False, True, False]):
        run(step, keep=2, sound=sound)
    assert names(run.folder) == ["latest", "step-000001", "step-000004", "step-000005"]
    run(6, keep=2, sound=False)
    assert names(run.folder) == ["latest", "step-000001", "step-000004", "step-000005", "step-000006"]
    run(7, keep=1)
    assert names(run.folder) == ["latest", "step-000007"]


def test_state_must_be_json(run):
    with pytest.raises(TypeError):
        save_checkpoint(run.folder, 1, small_model(), TOKENIZER, run.optimizer.state_dict(), {"tensor": torch.zeros(1)})
    assert names(run.folder) == []


def test_masters_are_stored_in_fp32(run):
    """CHECKLIST 31: the disk has the master, not the bf16 weight."""
    tensors = load_file(run(1) / "optimizer.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in tensors.items() if name.endswith("master"))
