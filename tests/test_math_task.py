"""Tasks: problems by index, prompts, and rewards that no text can fool, crash or slow down."""

import ast
import dataclasses
import json
import random
import time
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from math_task import ArithmeticTask, CountdownTask, main, make_task, task_from_config, task_options, write_math_tasks
from run.config import Config
from tasks.dataset_tasks import MathDataset
from tasks.expressions import MAX_CHARS, MAX_DEPTH, ExpressionError, evaluate_expression
from tasks.rewards import answer_block, format_reward
from tasks.task_base import QuestionTask, is_held_out

TASK = CountdownTask()
PROBLEM = TASK.problem([3, 5, 2], target=13)


def respond(answer: str, thought: str = " 3 + 5 * 2 ") -> str:
    return f"{thought}</think>\n<answer>{answer}</answer>"


def answer_reward(answer: str, problem=PROBLEM) -> float:
    return TASK.reward(problem, respond(answer)).parts["answer"]


# Reward ---------------------------------------------------------------------------------------------------------------


def test_right_answer_in_full_format_earns_everything():
    total, parts = TASK.reward(PROBLEM, respond(" 3 + 5 * 2 "))
    assert parts == {"format": 1.0, "answer": 1.0}
    assert total == pytest.approx(0.1 * 1.0 + 1.0)


def test_weights_scale_their_own_part():
    task = CountdownTask(format_weight=0.25, answer_weight=2.0)
    assert task.reward(PROBLEM, respond("3 + 5 * 2")).total == pytest.approx(2.25)
    assert task.reward(PROBLEM, respond("3 + 5 + 2")).total == pytest.approx(0.25)


def test_equal_responses_earn_equal_rewards():
    """CHECKLIST 25: nothing in the reward depends on length or on chance."""
    answers = [respond("3 + 5 + 2", thought="word " * n) for n in (0, 1, 7, 500)]
    assert len({TASK.reward(PROBLEM, response).total for response in answers for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>\n<answer>1</answer>", 1.0),
        ("<think>a</think><answer>1</answer>", 1.0),  # no white space is white space too
        ("<think>a\nb</think> \n\t<answer>1\n</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a</think>\n<answer>1</answer>\n", 0.6),  # nothing after, not even a line break
        ("<think>a</think>\n<answer>1</answer> so", 0.6),
        ("<think>a</think> so <answer>1</answer>", 0.6),
        ("so <think>a</think><answer>1</answer>", 0.6),
        ("<think>a</think></think><answer>1</answer>", 0.6),
        ("<think>a</think><answer>1</answer><answer>1</answer>", 0.6),
        ("<think>a<answer>1</answer></think><answer>1</answer>", 0.6),
        ("<think>a</think>", 0.1),
        ("<think>a<answer>1</answer>", 0.5),
        ("<answer>1</answer>", 0.5),
        ("</think><think></answer><answer>", 0.0),
        ("<think>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text, expected):
    assert format_reward(text) == pytest.approx(expected)


def test_prefilled_think_tag_is_counted_once():
    """The response prefix ends with <think>. A response that opens it again is no worse."""
    assert TASK.reward(PROBLEM, respond("1")).parts["format"] == 1.0
    assert TASK.reward(PROBLEM, "<think>" + respond("1")).parts["format"] == 1.0
    without_prefix = dataclasses.replace(PROBLEM, response_prefix="")
    assert TASK.reward(without_prefix, respond("3")).parts["format"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "answer", ["3 + 5 * 2", "(5*2)+3", "3+(5*2)", "\n3 +\t5 * 2\r\n", "((3)) + 5*2", "-(-3) + 5 * 2"]
)
def test_right_answers(answer):
    assert answer_reward(answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "13",
        "3 + 5 + 2",  # another value
        "3 + 5 + 5",  # 5 used twice, 2 left out
        "5 + 5 + 3",
        "3 + 5 * 2 + 3 - 3",  # 3 used three times
        "3 + 10",  # a number that was not given
        "35 - 22",  # digits glued together
        "3 + 5 * 2 = 13",
        "13 = 3 + 5 * 2",
        "3 + 5 * 2.0",
        "3 + 5 × 2",
        "3 + 5 x 2",
        "(1 + 2) / 3",  # the prompt's own example
        "3 + 5 * 2 </think>",
        "<answer>3 + 5 * 2",  # nested tags
        "<answer>3 + 5 * 2</answer>",
        "3 + 5 * 2</answer><answer>3 + 5 * 2",  # two answer blocks
        "[3 + 5 * 2]",
        "3 + 5 * 2 # yes",
        "__import__('os')",
    ],
)
def test_wrong_answers(answer):
    """CHECKLIST 40: reused or missing numbers, the prompt example, nested tags, two blocks: no answer reward."""
    assert answer_reward(answer) == 0.0


def test_prompt_example_is_judged_as_any_other_answer():
    """CHECKLIST 40."""
    assert answer_reward("(1 + 2) / 3", TASK.problem([1, 2, 3], target=1)) == 1.0
    assert answer_reward("(1 + 2) / 3", TASK.problem([1, 2, 3], target=2)) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "b"),
        ("<think><answer>a</answer></think>", None),  # in the thought only
        ("<think><answer>a</answer></think><answer>b</answer>", "b"),  # the one behind the thought
        ("<think><answer>a</answer>", None),  # the thought never ends
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think>a</think><answer>b</answer></think><answer>c</answer>", None),
        ("<think>a</think> <think>b</think><answer>c</answer>", None),  # it thinks again
        ("<think>a</think><answer>b</answer></think>", None),
        ("<think>a</think></answer><answer>", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think><answer>b</answer> and more", "b"),  # costs the format, not the answer
        ("<answer>b</answer>", "b"),  # no think tags at all
    ],
)
def test_answer_block_rule(text, expected):
    """CHECKLIST 40: an answer in the think block does not count, two behind it are no answer."""
    assert answer_block(text) == expected


def test_division_is_exact():
    """8 / (3 - 8 / 3) = 24 is out of reach of floats compared with ==; 1/3 * 3 is exactly 1."""
    assert answer_reward("8 / (3 - 8 / 3)", TASK.problem([3, 3, 8, 8], 24)) == 1.0
    assert answer_reward("7 / 2", TASK.problem([7, 2], 3)) == 0.0  # no integer division


HOSTILE = {
    "power tower": "95**96**97",
    "open parentheses": "(" * 100_000,
    "parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "minus signs": "-" * 100_000 + "1",
    "arabic digits": "٣ + ٥ * ٢",
    "superscript": "3² + 4",
    "fullwidth digits": "３ + ５ * ２",
    "underscore": "1_000 + 3",
    "floor division": "3 // 5 // 2",
    "division by zero": "3 / (5 - 5 * 1)",
    "zero": "3 / 0",
    "leading zero": "03 + 5 * 2",
    "long number": "9" * 1_000_000,
    "long sum": "1+" * 500_000 + "1",
    "spaces": " " * 1_000_000,
    "nested tags": "<answer>" * 125_000,
    "think tags": "<think>" * 140_000,
    "closed tags": "</think><answer></answer>" * 40_000,
    "almost tags": "<answe" * 160_000,
    "equals signs": "1+1=2 " * 160_000,
    "only equals signs": "=" * 1_000_000,
    "sums without end": "3+5-2*" * 160_000 + "=",
    "null bytes": "\x00" * 1_000_000,
    "lone surrogate": "\ud800" * 1000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("place", ["answer", "thought", "whole"])
def test_hostile_text_earns_nothing_and_takes_no_time(text, place):
    """CHECKLIST 39: answer reward 0 in under 10 ms, for the reward and for the diagnostics."""
    response = {"answer": respond(text), "thought": respond("1", thought=text), "whole": text}[place]
    seconds = []
    for call in (TASK.reward, TASK.diagnostics):
        seconds.append(min(timed(call, PROBLEM, response) for _ in range(5)))
    assert TASK.reward(PROBLEM, response).parts["answer"] == 0.0
    assert max(seconds) < 0.010


def timed(call, *arguments) -> float:
    """Seconds of this thread: what other programs do on the machine does not count."""
    start = time.thread_time()
    call(*arguments)
    return time.thread_time() - start


# Expressions ----------------------------------------------------------------------------------------------------------


def slow_value(text: str) -> Fraction:
    """The obvious reference: Python's own grammar, walked with exact fractions."""

    def walk(node):
        match node:
            case ast.Constant(value=int(value)):
                return Fraction(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = walk(left), walk(right)
                return {
                    ast.Add: lambda: a + b,
                    ast.Sub: lambda: a - b,
                    ast.Mult: lambda: a * b,
                    ast.Div: lambda: a / b,
                }[type(op)]()
        raise ValueError(ast.dump(node))

    return walk(ast.parse(text, mode="eval").body)


spaces = st.sampled_from(["", " ", "  "])
expressions = st.recursive(
    st.integers(0, 120).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, spaces, st.sampled_from("+-*/"), spaces, inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-({text})"),
        inner.map(lambda text: f"( {text} )"),
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(expressions)
def test_values_equal_those_of_python(text):
    """Any expression that both grammars know has the same value; `2--(3)` is written with one sign, so both know it."""
    try:
        expected = slow_value(text.strip())
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            evaluate_expression(text)
        return
    value, numbers = evaluate_expression(text)
    assert value == expected
    assert sorted(numbers) == sorted(n.value for n in ast.walk(ast.parse(text.strip())) if isinstance(n, ast.Constant))


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(alphabet="0123456789+-*/() .=_", max_size=40), st.text(max_size=60)))
def test_any_text_is_a_value_or_a_refusal(text):
    """CHECKLIST 39: never another exception, and what is accepted has the value that Python gives it."""
    try:
        value, _ = evaluate_expression(text)
    except ExpressionError:
        return
    assert value == slow_value(" ".join(text.split()))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="<>/thinkanswer 0123+-*/()=", max_size=200))
def test_any_response_has_a_reward(response):
    total, parts = TASK.reward(PROBLEM, response)
    assert 0 <= total <= 1.1
    assert set(parts) == {"format", "answer"}
    assert 0 <= TASK.diagnostics(PROBLEM, response)["false_sums"] <= 1


def test_a_hundred_thousand_expressions():
    """CHECKLIST 39: pieces of expressions in any order. No exception, and none takes 10 ms."""
    generator = random.Random(0)
    pieces = [
        *"0123456789+-*/()",
        " ",
        "**",
        "//",
        "1_0",
        ".5",
        "9" * 30,
        "(" * 30,
        "-" * 30,
        "٣",
        "=",
        "</answer>",
        "\n",
    ]
    slow = []
    for _ in range(100_000):
        response = respond("".join(generator.choices(pieces, k=generator.randrange(1, 25))))
        if timed(TASK.reward, PROBLEM, response) > 0.010:
            slow.append(response)
    assert [response for response in slow if min(timed(TASK.reward, PROBLEM, response) for _ in range(5)) > 0.010] == []


def test_limits_of_length_and_depth():
    assert evaluate_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)[0] == 1
    with pytest.raises(ExpressionError, match="nested deeper"):
        evaluate_expression("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1))
    assert evaluate_expression("1".ljust(MAX_CHARS))[0] == 1
    with pytest.raises(ExpressionError, match="characters"):
        evaluate_expression("1".ljust(MAX_CHARS + 1))


@pytest.mark.parametrize(("text", "value"), [("-3 + 5", 2), ("5 * -2", -10), ("5 - -2", 7), ("-(2 + 3)", -5)])
def test_one_minus_sign_is_arithmetic(text, value):
    assert evaluate_expression(text)[0] == value


@pytest.mark.parametrize("text", ["--3", "+3", "5 + +2", "1 2", "3 +", "(3", "3)", "()", "3(2)", "1.5"])
def test_what_is_no_expression(text):
    with pytest.raises(ExpressionError):
        evaluate_expression(text)


def test_diagnostics_read_the_thought_only():
    found = TASK.diagnostics(PROBLEM, respond("3 + 5 * 2", thought="3 + 5 = 9 no, 5 * 2 = 10"))
    assert found == {"solved": 1.0, "full_format": 1.0, "sums": 2.0, "false_sums": 0.5}
    found = TASK.diagnostics(PROBLEM, respond("3 + 5 = 9", thought="hm"))
    assert found == {"solved": 0.0, "full_format": 1.0, "sums": 0.0, "false_sums": 0.0}


def test_diagnostics_tell_the_whole_format_from_credit_for_parts_of_it():
    """A format reward of .74 may be a third of whole formats: .34 + .6 * .66."""
    response = " 3 + 5 = 8 </think>\n8 + 8 = 16\n<answer> 3 + 5 * 2 </answer>"
    assert TASK.reward(PROBLEM, response).parts["format"] == pytest.approx(0.6)
    assert TASK.diagnostics(PROBLEM, response)["full_format"] == 0.0


# Problems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        [44, 19, 35],
        (44, 19, 35),
        np.array([44, 19, 35]),
        torch.tensor([44, 19, 35]),
        [np.int64(44), 19.0, np.float32(35)],
    ],
)
def test_numbers_in_prompts_are_plain(numbers):
    """CHECKLIST 41."""
    problem = TASK.problem(numbers, target=np.int64(60))
    assert "Using the numbers [44, 19, 35], create an equation that equals 60." in TASK.prompt(problem)[-1]["content"]
    assert problem.target == {"numbers": [44, 19, 35], "target": 60}
    assert type(problem.target["target"]) is int


def test_prompt_styles():
    assert [m["role"] for m in PROBLEM.messages] == ["system", "user"]
    assert PROBLEM.response_prefix == "Let me solve this step by step.\n<think>"
    short = CountdownTask(prompt_style="short").problem([3, 5, 2], 13)
    assert short.messages == [{"role": "user", "content": "[3, 5, 2] = 13"}]
    assert short.response_prefix == "<think>\n"
    with pytest.raises(ValueError, match="prompt_style is 'tiny'; expected 'full' or 'short'"):
        CountdownTask(prompt_style="tiny")


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Every value of every expression over all the numbers: the slow, obvious search."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
                for c in {a + b, a - b, a * b} | ({a / b} if b else set()):
                    values |= reachable([*rest, c])
    return values


def test_generated_problems_are_solvable_and_within_their_settings():
    task = CountdownTask(numbers=(2, 3), min_number=2, max_number=12, target_range=(5, 40), seed=3)
    found = task.problems("train", 150) + task.test_problems(50)
    assert {len(p.target["numbers"]) for p in found} == {2, 3}
    assert {n for p in found for n in p.target["numbers"]} == set(range(2, 13))
    for problem in found:
        assert 5 <= problem.target["target"] <= 40
        assert problem.target["target"] in reachable([Fraction(n) for n in problem.target["numbers"]])


def key(problem) -> tuple:
    return tuple(sorted(problem.target["numbers"])), problem.target["target"]


def test_splits_are_disjoint_whatever_the_seed():
    """One small space, so that seeds meet the same problems again and again. Order of the numbers does not matter."""
    tasks = [CountdownTask(numbers=(3,), max_number=9, seed=seed) for seed in range(4)]
    train = {key(problem) for task in tasks for problem in task.problems("train", 1500)}
    test = {key(problem) for task in tasks for problem in task.test_problems(300)}
    assert len(train) > 1000
    assert len(test) > 100
    assert not train & test


def test_problems_depend_on_seed_split_and_index_only():
    """CHECKLIST 42: a resumed run sees the data it would have seen."""
    first, again = CountdownTask(seed=5), CountdownTask(seed=5)
    expected = [problem.id for problem in first.problems("train", 20)]
    again.test_problems(7)
    assert [again.train_problem(i).id for i in reversed(range(20))] == expected[::-1]
    assert [p.id for p in again.problems("train", 5, start=15)] == expected[15:]
    assert [p.id for p in CountdownTask(seed=6).problems("train", 20)] != expected
    assert len(set(expected)) == 20


def test_generation_is_stable_across_machines():
    """The very problems of seed 0, so that a change of the generator is noticed: runs would no longer be comparable."""
    assert CountdownTask(seed=0).train_problem(0).id == "countdown [91, 59, 38] = 70"
    assert CountdownTask(seed=0).test_problem(0).id == "countdown [45, 24, 6] = 75"
    assert [n for n in range(60) if is_held_out(str(n))] == [1, 2, 7, 30, 48, 52]


def test_generator_is_fast():
    seconds = min(timed(TASK.problems, "train", 500) for _ in range(3))
    assert 500 / seconds > 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": ()}, "expected how many numbers"),
        ({"numbers": (3, 9)}, "expected how many numbers"),
        ({"min_number": 5, "max_number": 4}, "expected 0 <= min <= max"),
        ({"max_number": 3, "target_range": (900, 999)}, "too few problems"),
    ],
)
def test_settings_that_cannot_work_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        CountdownTask(**options)
    assert "\n" not in str(error.value)


# Data sets ------------------------------------------------------------------------------------------------------------


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path)
    return path


def countdown_file(path, n=50):
    return write_parquet(path, nums=[[i, i + 1, 2] for i in range(n)], target=list(range(10, 10 + n)))


def test_countdown_parquet_holds_out_the_last_rows(tmp_path):
    countdown_file(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    for data in (tmp_path / "set", tmp_path / "set" / "data" / "train-00000-of-00001.parquet"):
        task = CountdownTask(data=str(data), n_test=8)
        assert [p.target["target"] for p in task.test_problems(100)] == list(range(52, 60))
        epoch = [p.target["target"] for p in task.problems("train", 42)]
        second = [p.target["target"] for p in task.problems("train", 42, start=42)]
        assert sorted(epoch) == sorted(second) == list(range(10, 52))
        assert epoch != second
        assert epoch != sorted(epoch)
    assert task.train_problem(0).target["numbers"] == [epoch[0] - 10, epoch[0] - 9, 2]


def test_countdown_training_rows_never_repeat_a_held_out_one(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", nums=[[1, 2], [3, 4], [5, 6], [2, 1]], target=[3, 7, 11, 3])
    task = CountdownTask(data=str(path), n_test=1)
    assert {key(p) for p in task.problems("train", 10)} == {((3, 4), 7), ((5, 6), 11)}


def test_countdown_reads_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"nums": [1, 2], "target": 3}\n\n{"nums": [3, 4], "target": 7, "note": "x"}\n')
    task = CountdownTask(data=str(tmp_path / "a.jsonl"), n_test=1)
    assert task.test_problem(0).target == {"numbers": [3, 4], "target": 7}


def bad_files(folder):
    """(path, part of the one line it must give)"""
    folder.joinpath("empty-folder").mkdir()
    folder.joinpath("garbage.parquet").write_bytes(b"PAR1 but not really")
    folder.joinpath("note.txt").write_text("hello")
    texts = {
        "empty.jsonl": ("", "no rows; expected columns nums, target"),
        "broken.jsonl": ('{"nums": [1], "target": 1}\n{"nums": [1', "line 2: not JSON"),
        "list.jsonl": ("[1, 2]\n", "line 1: found list, expected an object"),
        "keys.jsonl": ('{"numbers": [1], "target": 1}\n', "line 1: no column nums; found numbers, target"),
        "text.jsonl": ('{"nums": "1 2", "target": 3}\n', "row 1: expected whole numbers"),
        "null.jsonl": ('{"nums": [1, null], "target": 3}\n', "row 1: expected whole numbers"),
        "bool.jsonl": ('{"nums": [true, 2], "target": 3}\n', "row 1: expected whole numbers"),
        "half.jsonl": ('{"nums": [1, 2.5], "target": 3}\n', "row 1: expected whole numbers"),
        "deep.jsonl": ("[" * 100_000, "line 1: not JSON"),
        "digits.jsonl": ('{"nums": [' + "1" * 10_000 + "]}", "line 1: not JSON"),
        "wide.jsonl": (json.dumps({"nums": "1" * 10**6, "target": 3}), "row 1: expected whole numbers"),
    }
    for name, (text, _) in texts.items():
        folder.joinpath(name).write_text(text)
    folder.joinpath("latin.jsonl").write_bytes(b'{"nums": "\xff\xfe"}')
    write_parquet(folder / "columns.parquet", question=["a"], answer=["b"])
    write_parquet(folder / "rows.parquet", nums=pa.array([], pa.list_(pa.int64())), target=pa.array([], pa.int64()))
    countdown_file(folder / "good.parquet", n=5)
    yield from ((folder / name, message) for name, (_, message) in texts.items())
    yield folder / "nowhere", "no such data file or folder"
    yield folder / "empty-folder", "holds no .parquet or .jsonl file"
    yield folder / "note.txt", "expected a file that ends in .parquet or .jsonl"
    yield folder / "garbage.parquet", "not a readable parquet file"
    yield folder / "latin.jsonl", "not UTF-8 text"
    yield folder / "columns.parquet", "no column nums, target; found question, answer"
    yield folder / "rows.parquet", "no rows; expected columns nums, target"
    yield folder / "good.parquet", "n_test is 9, expected 0 to 4"


def test_bad_data_is_one_line_that_names_the_place(tmp_path):
    """CHECKLIST 46."""
    for path, message in bad_files(tmp_path):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            CountdownTask(data=str(path), n_test=9)
        line = str(error.value)
        assert message in line, path
        assert str(path) in line
        assert "\n" not in line
        assert len(line) < 500


# Arithmetic and files of questions ------------------------------------------------------------------------------------


def test_arithmetic_questions_and_answers():
    task = ArithmeticTask(mix=((2, 1), (4, 3)), operators="+-*/", seed=1)
    rows = [task.row("train", i) for i in range(200)]
    assert {(row["num_terms"], row["num_digits"]) for row in rows} == {(2, 1), (4, 3)}
    for row in rows:
        text = row["question"].removeprefix("What is ").removesuffix("?")
        assert Fraction(row["answer"]) == slow_value(text)
        terms = [word for word in text.split() if word.isdigit()]
        assert len(terms) == row["num_terms"]
        assert {len(term) for term in terms} == {row["num_digits"]}
    assert any("/" in row["answer"] for row in rows)


def test_arithmetic_splits_are_disjoint_whatever_the_seed():
    tasks = [ArithmeticTask(mix=((2, 1),), seed=seed) for seed in range(3)]
    train = {p.messages[1]["content"] for task in tasks for p in task.problems("train", 1000)}
    test = {p.messages[1]["content"] for task in tasks for p in task.test_problems(300)}
    assert len(train) > 150
    assert len(test) > 10
    assert not train & test


@pytest.mark.parametrize(
    ("target", "answer", "right"),
    [
        ("33", " 33 ", True),
        ("33", "33.0", True),
        ("1234", "1,234", True),
        ("7/2", "3.5", True),
        ("-5", "-5", True),
        ("33", "34", False),
        ("33", "30 + 3", False),
        ("33", "33 = 33", False),
        ("33", "", False),
        ("33", "٣٣", False),
        ("Paris", " Paris\n", True),
        ("Paris", "Rome", False),
    ],
)
def test_question_answers(target, answer, right):
    task = QuestionTask()
    problem = task.problem_from("What is it?", target)
    assert problem.messages[1]["content"].startswith("What is it? Show your work")
    assert task.reward(problem, respond(answer)).parts == {"format": 1.0, "answer": float(right)}


def test_math_dataset_iterates_and_is_a_task(tmp_path):
    path = tmp_path / "math_tasks.jsonl"
    write_math_tasks(path, n=40)
    dataset = MathDataset(path)
    pairs = list(dataset)
    assert len(pairs) == len(dataset) == 40
    assert pairs[0] == (dataset.rows[0]["question"], dataset.rows[0]["answer"])
    held_out = [p.target for p in dataset.test_problems(99)]
    assert held_out == [answer for _, answer in pairs[-4:]]  # a tenth
    assert sorted(p.target for p in dataset.problems("train", 36)) == sorted(answer for _, answer in pairs[:36])
    problem = dataset.problem_from(*pairs[0])
    assert dataset.reward(problem, respond(pairs[0][1])).parts["answer"] == 1.0


def test_math_dataset_filters_by_terms_and_digits(tmp_path):
    path = tmp_path / "a.jsonl"
    write_math_tasks(path, n=60)
    assert {row["num_terms"] for row in MathDataset(path).rows} == {2, 3}
    assert {row["num_digits"] for row in MathDataset(path, max_terms=3, max_digits=1).rows} == {1}
    with pytest.raises(ValueError, match="no question with max_terms 1"):
        MathDataset(path, max_terms=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "1 + 1?"}', "line 1: no column answer; found question"),
        ('{"question": 5, "answer": "2"}', "row 1: question is 5, expected text"),
        ('{"question": "1 + 1?", "answer": null}', "row 1: answer is None"),
        ('{"question": "1 + 1?", "answer": "2", "num_terms": "two"}', "row 1: num_terms is 'two'"),
        ("not json", "line 1: not JSON"),
        ("", "no rows"),
    ],
)
def test_math_dataset_lines_are_checked(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        MathDataset(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)


def test_missing_math_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; `python math_task.py .*math_tasks.jsonl` writes one"):
        MathDataset(tmp_path / "math_tasks.jsonl")


# By name --------------------------------------------------------------------------------------------------------------


def test_make_task_gives_each_named_task(tmp_path):
    write_math_tasks(tmp_path / "a.jsonl", n=20)
    assert type(make_task("countdown", numbers=(3,), seed=2)) is CountdownTask
    assert type(make_task("arithmetic", num_terms=(2,))) is ArithmeticTask
    assert type(make_task("jsonl", data=str(tmp_path / "a.jsonl"))) is MathDataset
    assert make_task("countdown", seed=2).train_problem(4) == CountdownTask(seed=2).train_problem(4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwon", {}, "task 'countdwon' is not known; did you mean countdown?"),
        (
            "zzz",
            {},
            "task 'zzz' is not known; known are arithmetic, calculator, countdown, gsm8k, jsonl, math, path/to/file.py",
        ),
        ("countdown", {"max_numbers": 3}, "task countdown has no option max_numbers; did you mean max_number?"),
        ("path/to/file.py:MyTask", {}, "path/to/file.py: no such file"),
        ("math_task.py", {}, "expected path/to/file.py:MyTask"),
        ("gsm8k", {"data": "nowhere.jsonl"}, "nowhere.jsonl: no such data file or folder"),
    ],
)
def test_make_task_errors_name_what_was_meant(name, options, message):
    """CHECKLIST 46."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make_task(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_task_from_config_takes_what_the_task_knows():
    config = Config(
        task="countdown", numbers=(4,), min_number=2, max_number=11, prompt_style="short", answer_weight=3.0
    )
    task = task_from_config(config)
    assert (task.numbers, task.min_number, task.max_number, task.seed) == ((4,), 2, 11, config.seed)
    assert (task.prompt_style, task.answer_weight, task.data) == ("short", 3.0, None)
    arithmetic = task_from_config(Config(task="arithmetic", num_terms=(5,), num_digits=(1,), operators="-"))
    row = arithmetic.row("train", 0)
    assert row["num_terms"] == 5
    assert row["question"].count("-") == 4


def test_every_task_field_of_the_config_is_an_option_of_some_task():
    """A flag that no task takes would be silently without effect."""
    fields = {"data", "numbers", "min_number", "max_number", "num_terms", "num_digits", "operators", "prompt_style"}
    fields |= {"format_weight", "answer_weight", "seed"}
    assert fields <= {option for name in ("countdown", "arithmetic") for option in task_options(name)}


def test_arithmetic_mix_replaces_the_combinations():
    rows = [ArithmeticTask(mix=((2, 2), (3, 1))).row("train", i) for i in range(50)]
    assert {(row["num_terms"], row["num_digits"]) for row in rows} == {(2, 2), (3, 1)}
    rows = [ArithmeticTask().row("train", i) for i in range(100)]
    assert {(row["num_terms"], row["num_digits"]) for row in rows} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    with pytest.raises(ValueError, match="expected pairs, each number from 1 to 12"):
        ArithmeticTask(mix=((2, 0),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python math_task.py FILE.jsonl"),
        (["-x"], "usage: python math_task.py FILE.jsonl"),
        (["~nosuchuser/a.jsonl"], "there is no user"),
        (["a.jsonl", "b.jsonl"], "usage"),
        (["mine.jsonl"], "is there already and stays"),
        (["no/folder/a.jsonl"], "No such file"),
        (["\x1b[2J/a.jsonl"], "No such file"),
    ],
)
def test_the_program_that_writes_questions_says_its_mistakes_in_one_line(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("mine")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert main(["new.jsonl"]) == 0
    assert len(MathDataset(tmp_path / "new.jsonl")) == 1000
