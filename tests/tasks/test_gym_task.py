"""reasoning-gym: its problems, its scorers, and answers that its scorers must never see."""

import pytest

from math_task import make_task
from tasks.gym_task import EVALUATING, ReasoningGymTask, is_harmless


def respond(answer: str) -> str:
    return f" hm </think>\n<answer> {answer} </answer>"


def test_reasoning_gym_problems_and_scores():
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:chain_sum", config={"max_terms": 3}, seed=4)
    problem = task.train_problem(5)
    assert problem == make_task("reasoning_gym:chain_sum", config={"max_terms": 3}, seed=4).train_problem(5)
    assert problem.messages[1]["content"].startswith(problem.target["question"])
    assert task.reward(problem, respond(problem.target["answer"])).parts == {"format": 1.0, "answer": 1.0}
    assert task.reward(problem, respond("no idea")).parts["answer"] < 1.0
    train = {p.target["question"] for p in task.problems("train", 500)}
    test = {p.target["question"] for p in task.test_problems(100)}
    assert len(train) > 300
    assert not train & test


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "reasoning_gym:chain_sums: no such data set; did you mean chain_sum?"),
        ("chain_sum", {"config": {"terms": 3}}, "do not fit"),
        ("chain_sum", {"config": {"min_terms": 9, "max_terms": 2}}, "do not fit"),
    ],
)
def test_reasoning_gym_mistakes_are_one_line(name, options, message):
    """CHECKLIST 46."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="reasoning_gym") as error:
        make_task(f"reasoning_gym:{name}", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer", ["(1 + 2) * 3", "[[1, 2], [3]]", "['a', 'b']", "sqrt(x) + sin (2*x)/3", "1 2 3\n4 5 6", "_ Q\nQ _"]
)
def test_formulas_and_literals_are_harmless(answer):
    assert is_harmless(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('true')",
        "open(1)",
        "(open)(1)",
        "open (1)",
        "sin.__class__",
        "x.args",
        "[exit() for x in 'a']",
        "sqrt(exit())",
        "exp(chr)(1)",
        "lambda: 1",
        "f'{exit()}'",
        "1" * 3000,
    ],
)
def test_programs_are_not_harmless(answer):
    assert not is_harmless(answer)


def test_an_answer_is_never_run(tmp_path):
    """Several scorers of reasoning-gym call eval on the answer. A program gets no further than this file."""
    pytest.importorskip("reasoning_gym")
    proof = tmp_path / "was-here"
    for name in ("n_queens", "spiral_matrix", "puzzle24"):
        task = ReasoningGymTask(dataset=name)
        problem = task.train_problem(0)
        assert task.score(problem, f"open({str(proof)!r}, 'w')") == 0.0
        right = problem.target["answer"]
        assert right is None or task.score(problem, right) == 1.0
    assert not proof.exists()


def test_the_list_of_evaluating_scorers_is_complete():
    """A new release of reasoning-gym may add one: every scorer whose source evaluates is on the list."""
    pytest.importorskip("reasoning_gym")
    import inspect

    from reasoning_gym.factory import DATASETS

    calls = ("eval(", "exec(", "parse_expr(", "sympify(")
    scorers = {name: inspect.getsource(cls.score_answer) for name, (cls, _config) in DATASETS.items()}
    evaluating = {name for name, source in scorers.items() if any(call in source for call in calls)}
    # number_sorting evaluates its own answer, not the model's
    assert evaluating - {"number_sorting"} == EVALUATING
