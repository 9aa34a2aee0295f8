"""GSM8K and MATH: the released schemas, from files. An optional library judges MATH."""

import json
import time

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from math_task import make_task
from tasks import dataset_tasks
from tasks.dataset_tasks import Gsm8kTask, MathTask, last_boxed


def respond(answer: str) -> str:
    return f" hm </think>\n<answer> {answer} </answer>"


def write_rows(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k_rows(n: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"Q{i}?", "answer": f"It is <<2*{i}={2 * i}>>so.\n#### {2 * i:,}"} for i in range(start, start + n)
    ]


# GSM8K ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_gsm8k_reads_its_released_folder(tmp_path, suffix):
    """The Hub's layout: main/ and socratic/, a train and a test file in each. Only main is read."""
    for subset, first in (("main", 0), ("socratic", 9000)):
        write_rows(tmp_path / subset / f"train-00000-of-00001{suffix}", gsm8k_rows(5, first + 1000))
        write_rows(tmp_path / subset / f"test-00000-of-00001{suffix}", gsm8k_rows(3, first))
    task = make_task("gsm8k", data=str(tmp_path))
    assert [p.target for p in task.test_problems(10)] == ["0", "2", "4"]
    assert sorted(p.target for p in task.problems("train", 5)) == ["2,000", "2,002", "2,004", "2,006", "2,008"]
    problem = task.train_problem(0)
    assert task.reward(problem, respond(problem.target.replace(",", ""))).parts == {"format": 1.0, "answer": 1.0}
    assert task.reward(problem, respond("7")).parts["answer"] == 0.0


def test_one_file_holds_out_its_last_rows(tmp_path):
    task = Gsm8kTask(data=str(write_rows(tmp_path / "all.jsonl", gsm8k_rows(20))), n_test=2)
    assert [p.target for p in task.test_problems(10)] == ["36", "38"]
    assert "36" not in {p.target for p in task.problems("train", 40)}


def test_test_rows_alone_are_never_trained_on(tmp_path):
    task = Gsm8kTask(data=str(write_rows(tmp_path / "test.jsonl", gsm8k_rows(3))))
    assert len(task.test_problems(10)) == 3
    with pytest.raises(ValueError, match="no training rows"):
        task.train_problem(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "answer": "42"}, "row 1: no final answer in answer: ...'42'"),
        ({"question": "Q?", "answer": "#### forty"}, "row 1: no final answer"),
        ({"question": "Q?", "answer": "42"}, "if this is the answer itself, take --task jsonl"),
        ({"question": "Q?", "answer": None}, "row 1: expected text in question and answer"),
        ({"problem": "Q?", "solution": "5"}, "no column question, answer; found problem, solution"),
    ],
)
def test_rows_of_another_schema_are_one_line(tmp_path, row, message):
    """CHECKLIST 46."""
    with pytest.raises(ValueError, match=r"a\.jsonl") as error:
        Gsm8kTask(data=str(write_rows(tmp_path / "a.jsonl", [row])))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    write_rows(tmp_path / "main" / "train.jsonl", gsm8k_rows(30))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert len(Gsm8kTask().test_problems(99)) == 3
    assert asked == [(("openai/gsm8k",), {"repo_type": "dataset", "allow_patterns": ["*.parquet", "*.jsonl"]})]


def test_no_network_and_no_copy_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"openai/gsm8k: .*no route.*; download it .* --data FOLDER") as error:
        Gsm8kTask()
    assert "\n" not in str(error.value)


# MATH -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ {2} }", "{2}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$ done", "5"),
        (r"\boxed{1", None),
        (r"\boxed{}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.fixture(scope="module")
def math_task(tmp_path_factory):
    pytest.importorskip("math_verify")
    rows = [{"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"}] * 4
    return MathTask(data=str(write_rows(tmp_path_factory.mktemp("math") / "algebra" / "train.parquet", rows)))


@pytest.mark.parametrize(
    ("target", "answer", "right"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", True),
        (r"\frac{1}{2}", r"$\dfrac12$", True),
        ("5", r"\[5\]", True),
        ("5", r"\( 5 \)", True),
        ("5", "**5**", True),
        ("5", r"\[\boxed{5}\].", True),
        ("5", r"The answer is \(5\).", True),
        ("5", "The answer is $5$.", True),
        ("5", r"\(6\) or \(5\)", False),
        ("5", "$6$ or $5$", False),
        (r"\frac{1}{2}", r"\[\frac{1}{2}\]", True),
        (r"\frac{1}{2}", r"\[ \frac{1}{3} \]", False),
        (r"\$18.90", r"\$18.90", True),
        (r"\$18.90", "18.90", True),
        (r"\$18.90", "$18.9", True),
        (r"\$18.90", r"\(\$18.90\)", True),
        (r"\$18.90", r"\$18.91", False),
        ("18.90", r"\$18.90", True),
        ("-5", "-$5", True),
        ("-5", "\u22125", True),
        ("-5", "+5", False),
        ("1,234", r"1\,234", True),
        ("[2,5)", r"\[[2,5)\]", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\[\begin{pmatrix} 1 \\ 2 \end{pmatrix}\]", True),
        ("-3", "\u20133", True),  # an en dash
        ("-3", "\u2212$3$", True),
        ("5.", r"\[5\]", True),
        ("5", r"\\[5\\]", True),  # escaped twice
        ("5", r"\begin{equation}5\end{equation}", True),
        ("5", r"\begin{align*}6\end{align*}", False),
        ("5", "__5__", True),
        ("5", "```latex\n5\n```", True),
        ("5", "\u200b5", True),
        (r"\$18.90", "18.90 dollars", True),
        (r"10\frac{1}{2}", "10 1/2", True),
        ("x^2+1", "x**2 + 1", True),
        (r"\frac{1}{2}", "2", False),
        (r"\frac{1}{2}", "", False),
        ("x^2 - 1", "(x-1)(x+1)", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("(3, 4)", "(3,4)", True),
        (r"\text{Tuesday}", r"\text{Tuesday}", True),
        ("10", "1" * 1000, False),
        ("10", "\x00" + "{" * 400, False),
    ],
)
def test_math_answers_are_compared_as_mathematics(math_task, target, answer, right):
    """CHECKLIST 61."""
    problem = math_task.problem_from("What is it?", target)
    assert math_task.reward(problem, respond(answer)).parts["answer"] == float(right)


def test_math_problems_ask_for_an_answer_in_tags(math_task):
    problem = math_task.train_problem(0)
    assert problem.target == r"\frac{1}{2}"
    assert problem.messages[1]["content"].endswith(r"for example <answer> \frac{1}{2} </answer>.")


def test_an_answer_that_keeps_the_checker_busy_is_wrong(math_task, monkeypatch):
    """CHECKLIST 39 for MATH: the checker has a deadline, and works on afterwards."""
    monkeypatch.setattr(math_task._worker, "deadline_s", 0.3)
    start = time.monotonic()
    assert math_task.is_correct(math_task.problem_from("What is it?", "1"), "9^{9^{9^{9}}}") is False
    assert time.monotonic() - start < 5
    monkeypatch.setattr(math_task._worker, "deadline_s", 30.0)
    assert math_task.is_correct(math_task.problem_from("What is it?", "3"), "6/2") is True


@pytest.mark.parametrize(("name", "package"), [("math", "math-verify"), ("reasoning_gym:chain_sum", "reasoning-gym")])
def test_a_missing_library_is_one_line(monkeypatch, name, package):
    """CHECKLIST 46."""
    monkeypatch.setattr(dataset_tasks.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"needs {package}, which is not installed: pip install {package}"):
        make_task(name)
