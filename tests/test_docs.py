"""The pages are true: their code prints their output, their commands parse, and their references exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from math_task import write_math_tasks
from run.config import CONFIGS, Config, parse_args, save_yaml
from run.flags import take_flag
from update import losses

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
NOT_RUN: dict[str, int] = {}  # page -> number of Python blocks with <!-- not run: reason --> in the line before
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")

# Code that a page needs before its first block.
BEFORE = {
    "README.md": """
from run.config import load_config, preset_for
from data_types import MiniBatch
from grpo import GRPO, compute_advantages, rollout, update_policy
from rollout.sampling import SamplingParams
small = GRPO()
model, tokenizer, task, optimizer = small.model, small.tokenizer, small.task, small.optimizer
batch = MiniBatch.from_problems(task.problems("train", 2), tokenizer)
sampling = SamplingParams(n=4, max_new_tokens=24)
""",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[re.Match]:
    return list(FENCE.finditer(page.read_text(encoding="utf-8")))


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if any(fence["kind"] == kind for fence in fences(page))]


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------------- Python blocks


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_every_python_block_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """A page is one namespace, top to bottom. A block of text after a block of Python is its output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # blocks read the raw files in docs/results
    write_math_tasks("math_tasks.jsonl", n=2)
    space: dict = {"__name__": "page"}
    exec(BEFORE.get(name(page), ""), space)
    torch.manual_seed(0)
    printed = None
    for fence in fences(page):
        if fence["kind"] == "text" and printed is not None:
            assert_same_output(printed, fence["text"], name(page))
        printed = None
        if fence["kind"] == "python" and not fence["mark"]:
            line = page.read_text(encoding="utf-8")[: fence.start("text")].count("\n")
            code = compile("\n" * line + fence["text"], str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, space)
            printed = out.getvalue()


def assert_same_output(printed: str, written: str, where: str) -> None:
    """Equal words, and numbers equal up to rounding, which depends on the processor."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", written).split(), f"{where} prints\n{printed}"
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True)
    for found, wanted in pairs:
        assert float(found) == pytest.approx(float(wanted), rel=0.02, abs=2e-3), f"{where} prints\n{printed}"


def test_what_is_not_run_is_counted():
    found = {name(p): sum(f["kind"] == "python" and bool(f["mark"]) for f in fences(p)) for p in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def test_the_readme_has_both_of_its_python_blocks_and_the_pages_theirs():
    """The pattern finds every fence. None is skipped for its form."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == sum(f["kind"] == "python" for f in fences(page)), page
        assert text.count("```") == 2 * len(fences(page)), page


# ------------------------------------------------------------------------------------------------- commands, references


def commands(page: Path) -> list[str]:
    """Every `python FILE.py ...` of a page: in shell blocks, indented lines, and code in a sentence."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```python\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?:^|[`&] ?|\s{4})(python [\w/]+\.py[^`\n&|]*)", text, re.MULTILINE)
    return [command.split("#")[0].strip() for command in found]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_a_page_can_be_given(page, tmp_path, monkeypatch):
    """The programs exist, and the parsers of train.py and evaluate.py read their options."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    run = tmp_path / "runs" / "some" / "checkpoints" / "latest"
    run.mkdir(parents=True)
    save_yaml(Config(), tmp_path / "runs" / "some" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        _, file, *options = shlex.split(command.replace("...", ""))
        assert (ROOT / file).is_file(), command
        if file == "evaluate.py":
            for flag in ("--samples", "--after", "--json"):
                _, options = take_flag(options, flag)
        if file in ("train.py", "evaluate.py") and "--help" not in options:
            parse_args(options)


def test_commands_are_found():
    found = [command for page in PAGES for command in commands(page)]
    assert "python train.py --ckpt Qwen2.5-0.5B-Instruct" in found
    assert "python train.py --resume" in found
    assert len(found) > 12


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_reference_to_code_leads_to_it(page):
    """`update/losses.py:policy_loss` is a name that losses.py defines."""
    find_line = hooks().find_line
    for file, symbol in re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", page.read_text(encoding="utf-8")):
        assert find_line(file, symbol) > 0


def test_a_reference_to_nothing_is_an_error():
    find_line = hooks().find_line
    losses, head = (
        (ROOT / name).read_text(encoding="utf-8").splitlines()
        for name in ("update/losses.py", "model/head_logprobs.py")
    )
    assert losses[find_line("update/losses.py", "policy_loss") - 1].startswith("def policy_loss(")
    assert "def forward" in head[find_line("model/head_logprobs.py", "_TokenLogprobs.forward") - 1]
    assert "delta" in losses[find_line("update/losses.py", "PolicyInputs.delta") - 1]
    with pytest.raises(ValueError, match=r"update/losses\.py defines no 'policy_los'"):
        find_line("update/losses.py", "policy_los")


# ------------------------------------------------------------------------------------------- the table of docs/kl.md


def expectation_gradient(logits, sampler, term, where: str):
    """Gradient in `logits` [V] of a penalty, averaged over tokens drawn from `sampler` [V]: a finite sum over V.

    `loss`: the term is differentiated at fixed tokens. `reward`: it is a number that multiplies grad log pi.
    """
    logp = logits.log_softmax(-1)
    value = (sampler * (term(logp) if where == "loss" else term(logp).detach() * logp)).sum()
    return torch.autograd.grad(value, logits)[0]


def gradient_of(f, logits):
    return torch.autograd.grad(f(logits.log_softmax(-1)), logits)[0]


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def test_the_gradient_column_of_the_divergence_table():
    """docs/kl.md, row by row. Expectations over six tokens are exact, and autograd runs through the project's code."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)  # the reference, or the rollout policy
    policy = logits.detach().log_softmax(-1)
    forward, backward = gradient_of(lambda p: kl(p, other), logits), gradient_of(lambda p: kl(other, p), logits)
    assert (forward - backward).abs().max() > 0.05  # else no row below could tell them apart

    def penalty(estimator, **options):
        return lambda logp: losses.kl_penalty(logp, other, estimator, **options)

    def on_policy(estimator, where):
        return expectation_gradient(logits, policy.exp(), penalty(estimator), where)

    d = other - policy
    second_order = gradient_of(lambda p: (policy.exp() * d.square() / 2 * p).sum(), logits)
    same = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(on_policy("k1", "loss"), torch.zeros(6, dtype=torch.float64), **same)
    torch.testing.assert_close(on_policy("k2", "loss"), forward, **same)
    torch.testing.assert_close(on_policy("k3", "loss"), backward, **same)
    torch.testing.assert_close(on_policy("k1", "reward"), forward, **same)
    torch.testing.assert_close(on_policy("k2", "reward"), second_order, **same)
    torch.testing.assert_close(on_policy("k3", "reward"), forward - backward, **same)

    # kl and approx_kl: the other policy is the rollout's, and the tokens are its own.
    target = float(d[d > 0].median())
    pulled = other.exp() * (d > target)
    assert 0 < (d > target).sum() < (d > 0).sum()
    kl_loss = expectation_gradient(logits, other.exp(), penalty("kl", kl_target=target), "loss")
    torch.testing.assert_close(kl_loss, gradient_of(lambda p: -(pulled * p).sum(), logits), **same)
    approx = expectation_gradient(logits, other.exp(), penalty("approx_kl"), "loss")
    wanted = gradient_of(lambda p: ((2 * other - p).exp().sum() - 1) - kl(other, p), logits)
    torch.testing.assert_close(approx, wanted, **same)


def test_k3_in_the_reward_has_almost_no_gradient_near_the_reference():
    """docs/kl.md: its gradient vanishes to first order, that of k1 does not."""
    draw = torch.Generator().manual_seed(3)
    start, direction = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    pull = {}
    for step in (1e-2, 1e-3):
        logits = (start + step * direction).requires_grad_()
        sampler, other = logits.detach().softmax(-1), start.log_softmax(-1)
        for name_ in ("k1", "k3"):
            gradient = expectation_gradient(logits, sampler, lambda p: losses.kl_penalty(p, other, name_), "reward")  # noqa: B023
            pull[name_, step] = gradient.norm()
    assert pull["k1", 1e-2] / pull["k1", 1e-3] == pytest.approx(10, rel=0.1)
    assert pull["k3", 1e-2] / pull["k3", 1e-3] == pytest.approx(100, rel=0.1)


def test_transport_reaches_the_hidden_states_and_not_the_head():
    """The last row: its gradient is that of the cost in the hidden states of the new policy only."""
    draw = torch.Generator().manual_seed(1)
    new, old = (torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda h: losses.transport_cost(h, old.detach(), window=2), (new,))
    losses.transport_cost(new, old, window=2).backward()
    assert new.grad.abs().max() > 0
    assert old.grad is None


def test_the_figure_of_optimal_transport_is_what_the_page_says(tmp_path):
    """Its plan is that of the loss and finds the moved steps, and its numbers are those of the page."""
    spec = importlib.util.spec_from_file_location("illustrations", ROOT / "docs" / "illustrations.py")
    illustrations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(illustrations)
    c = illustrations.compare()
    assert sorted(c.tokens) == sorted(c.reordered) != c.reordered
    cut, again = c.tokens.index("\n") + 1, c.reordered.index("\n") + 1
    first, second = c.plan[:cut, again : again + cut], c.plan[cut : cut + again, :again]
    assert min(block.diagonal().mean() for block in (first, second)) > 0.65
    assert [round(x.sum().item(), 1) for x in (c.unmoved, c.moved)] == [10.5, 0.7]
    assert c.rigid.sum().item() == pytest.approx(134, abs=1)

    torch.manual_seed(0)
    new, old = torch.randn(2, 6, 8)
    cost = 1 - torch.nn.functional.normalize(new, dim=-1) @ torch.nn.functional.normalize(old, dim=-1).T
    mine = (illustrations.sinkhorn(cost) * cost).sum() / 6
    torch.testing.assert_close(mine, losses.transport_cost(new, old, window=6, iterations=200), rtol=1e-4, atol=1e-5)
    illustrations.draw(c, tmp_path / "images" / "figure.png")
    assert (tmp_path / "images" / "figure.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------ figures, raw files


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_raw_file_of_a_page_is_there(page):
    """Paths in backticks: `docs/results/...`, or `results/...` in the pages themselves. Links are checked by mkdocs."""
    for path in re.findall(r"`(?:docs/)?results/([^`]+)`", page.read_text(encoding="utf-8")):
        assert list((ROOT / "docs" / "results").glob(path.rstrip("/"))), path


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"- {page.name}\n" not in navigation + "\n"]
    assert not missing


def written(path: Path, values: dict[str, list[float]]) -> dict[str, list[dict]]:
    """Records of a run with one evaluation per value, as figures.py reads them."""
    records = [{"step": i} | {key: v[i] for key, v in values.items()} for i in range(len(next(iter(values.values()))))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {path.stem: records}


def test_a_figure_has_no_empty_panel_and_no_line_through_two_points(tmp_path, monkeypatch):
    figures = script("figures", monkeypatch)
    drawn = []
    monkeypatch.setattr(figures.plt.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for count in (2, 3):
        values = {"eval_solved": [0.2, 0.4, 0.6][:count], "eval_false_sums": [0.0] * count, "reward": [1.0] * count}
        figures.draw(written(tmp_path / f"{count}.jsonl", values), tmp_path / "x.png", problems=100)
    two, three = (list(figure.axes) for figure in drawn)
    assert [axis.get_title() for axis in two] == ["held out: solved, sampled", "training: reward"]
    styles = [axes[0].containers[0].lines[0].get_linestyle() for axes in (two, three)]
    assert styles == ["None", "-"]
    bars = three[0].containers[0].lines[2][0].get_segments()
    assert bars[0][0][1] == pytest.approx(0.1334, abs=1e-3)  # Wilson's interval of 20 of 100
    assert bars[0][1][1] == pytest.approx(0.2888, abs=1e-3)
    caption = drawn[1].get_suptitle()
    assert "one seed" in caption
    assert "100 problems" in caption
    assert "mean of the last 10 steps" in caption


def test_the_figure_of_pass_at_k_reads_all_files_and_refuses_other_problems(tmp_path, monkeypatch):
    pass_at_k = script("pass_at_k", monkeypatch)

    def report(seed: int, before: float) -> None:
        level = {"value": before, "low": 0.0, "high": 1.0}
        gain = {"value": 0.1, "low": 0.0, "high": 0.2}
        results = {"countdown-tiny": {"greedy": level, "pass@1": level}}
        differences = {f"runs/tiny-{seed}/checkpoints/last - countdown-tiny": {"greedy": gain, "pass@1": gain}}
        (tmp_path / f"{seed}.json").write_text(json.dumps({"results": results, "differences": differences}))

    report(0, 0.25)
    report(1, 0.25)
    before, gains = pass_at_k.read(tmp_path)
    assert list(gains) == ["tiny-0", "tiny-1"]
    assert pass_at_k.table(before, gains)[2] == "| 1 | 0.250 | +0.100 [+0.000, +0.200] | +0.100 [+0.000, +0.200] |"
    pass_at_k.draw(before, gains, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    report(1, 0.5)
    with pytest.raises(ValueError, match=r"1\.json has other numbers for countdown-tiny"):
        pass_at_k.read(tmp_path)


def script(name: str, monkeypatch):
    """A program of docs/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module(name)


def test_workings_are_told_apart_and_counted(tmp_path, monkeypatch, capsys):
    workings = script("workings", monkeypatch)
    answers = [
        (1, "12 + 34 - 5", "12 + 34 = 46\n46 - 5 = 41", 1.0),
        (1, "7 * 12", "7 * 12 = 7 * 10 + 7 * 2 = 84", 1.0),  # not a large one
        (9, "5 + 65 * 95", "65 * 95 = 6175\n5 + 6175 = 6180", 1.0),
        (9, "5 + 65 * 95", "5 + 65 * 95 = 6180", 0.0),
        (10, "65 * 90", "65 * 90 = 60 * 90 + 5 * 90 = 5850", 1.0),
        (11, "65 * 90", "65 * 90 = 60 * 90 + 5 * 90 = 5900", 0.0),
    ]
    lines = [
        {
            "step": step,
            "prompt": f"<x>What is {q}? Show it",
            "response": r,
            "reward_parts": {"format": 1.0, "answer": a},
        }
        for step, q, r, a in answers
    ]
    samples, kept = tmp_path / "samples.jsonl", tmp_path / "kept.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = "| 1 to 10 | 1.00 of 2 | 1.00 of 1 | 0.50 of 2 |\n| 11 to 20 |  | 0.00 of 1 |  |\n"
    for arguments in ([samples, "--keep", kept], [kept]):
        monkeypatch.setattr("sys.argv", ["workings.py", *map(str, arguments)])
        workings.report(workings.__doc__, workings.short, workings.table)
        assert capsys.readouterr().out.endswith(wanted)


def test_searches_are_counted(tmp_path, monkeypatch, capsys):
    searches = script("searches", monkeypatch)
    right = "7-5=2,2*3=6 no\n7-3=4,4*5=20 ok\n</think>\n<answer>5*(7-3)</answer>"
    circles = "7*3=21,21+5=27 no\n7*3=21,21+5=27 no\n7/3 no\n7*3=21,21+5=27 no\n7*3=21,21-5=16"
    claims = "7+5=12,12+3=20 ok\n</think>\n<answer>7+5+3</answer>"
    lines = [
        {
            "step": step,
            "problem": "countdown [7, 3, 5] = 20",
            "prompt": "...",
            "response": f"\n{text}",
            "response_tokens": tokens,
            "reward_parts": {"format": 1.0, "answer": solved},
        }
        for step, text, tokens, solved in ((1, right, 40, 1.0), (10, circles, 80, 0.0), (12, claims, 30, 0.0))
    ]
    samples, kept = tmp_path / "samples.jsonl", tmp_path / "kept.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # six attempts, two of them a second and third time; three of twelve sums are false; 21+5 is not the way to 20
    wanted = "| 1 to 10 | 0.50 of 2 | 3.0 | 0.33 | 0.50 | 0.25 | 0.00 | 60 |\n"
    wanted += "| 11 to 20 | 0.00 of 1 | 1.0 | 0.00 | 1.00 | 0.50 | 1.00 | 30 |\n"
    for arguments in ([samples, "--keep", kept], [kept]):
        monkeypatch.setattr("sys.argv", ["searches.py", *map(str, arguments)])
        searches.report(searches.__doc__, searches.short, searches.table)
        assert capsys.readouterr().out.endswith(wanted)
    assert searches.noticed("7+5=12,12/3=4 no", target=4)
    assert not searches.noticed("7+5=12,12-3=9 no", target=4)
    monkeypatch.setattr("sys.argv", ["searches.py", "nowhere.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        searches.report(searches.__doc__, searches.short, searches.table)
    assert "nowhere.jsonl is no file; expected" in capsys.readouterr().err
