"""Rows of files: which are training rows, and which rows are refused, with file and number."""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

import evaluate
from math_task import CountdownTask, MathDataset, make_task, task_from_config
from run.config import Config
from tasks.messages import closest, did_you_mean, first_line, home_path
from tasks.task_files import held_out_words, read_rows, read_splits

GSM8K = {"train": [{"question": f"Q{i}?", "answer": f"so\n#### {i}"} for i in range(20)]}
GSM8K["test"] = [{"question": f"T{i}?", "answer": f"so\n#### {100 + i}"} for i in range(5)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def targets(problems) -> set[str]:
    return {problem.target for problem in problems}


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize(
    "held_out",
    [
        "main/test/0000.parquet",
        "main/Test/0000.parquet",
        "TEST.jsonl",
        "gsm8k_test.jsonl",
        "gsm8kTest.jsonl",
        "data/test-00000-of-00001.parquet",
        "validation/0000.jsonl",
        "VALID.jsonl",
        "TEST.JSONL",
        "held_out/0.jsonl",
        "evals/0.jsonl",
        "split=test/0.jsonl",
        "Test Set/0.jsonl",
        "val.jsonl",
        "my-eval-set.jsonl",
        "dev/a/b/0000.jsonl",
        "a.dev.jsonl",
        "train/test/0.jsonl",
    ],
)
@pytest.mark.parametrize("task", ["gsm8k", "jsonl"])
def test_a_held_out_word_in_any_part_of_a_path_keeps_the_rows_out_of_training(tmp_path, held_out, task):
    """CHECKLIST 59."""
    rows = GSM8K if task == "gsm8k" else {
        split: [{"question": row["question"], "answer": row["answer"].split()[-1]} for row in rows]
        for split, rows in GSM8K.items()
    }  # fmt: skip
    write(tmp_path / "main" / "train" / "0000.jsonl", rows["train"])
    write(tmp_path / held_out, rows["test"])
    subset = {"subset": None} if task == "gsm8k" else {}  # it would read main/ only
    found = make_task(task, data=str(tmp_path), **subset)
    assert targets(found.problems("train", 60)) == {str(i) for i in range(20)}
    assert [p.target for p in found.test_problems(60)] == [str(100 + i) for i in range(5)]
    assert f"held out {held_out}: 5 rows" in found.data_summary
    assert "training main/train/0000.jsonl: 20 rows" in found.data_summary


@pytest.mark.parametrize(
    "name", ["latest.jsonl", "contest/0.jsonl", "device.jsonl", "evaluated.jsonl", "invalid.jsonl"]
)
def test_words_that_only_contain_a_held_out_word_are_training_files(tmp_path, name):
    assert not held_out_words(tmp_path / name, tmp_path)


def test_a_split_that_is_named_itself_is_never_trained_on(tmp_path):
    """`--data gsm8k/test`, the same with the file, and a folder above that has such a name."""
    file = write(tmp_path / "gsm8k" / "test" / "0000.jsonl", GSM8K["test"])
    for data in (file, file.parent):
        task = make_task("gsm8k", data=str(data))
        assert len(task.test_problems(9)) == 5
        with pytest.raises(ValueError, match=r"no training rows, only held-out ones; give a file or folder without"):
            task.train_problem(0)
    for name in ("gsm8k_test", "gsm8k-dev", "gsm8kTest", "held_out"):
        write(tmp_path / name / "0000.jsonl", GSM8K["test"])
        with pytest.raises(ValueError, match="no training rows"):
            make_task("gsm8k", data=str(tmp_path / name)).train_problem(0)
    home = write(tmp_path / "dev" / "me" / "questions.jsonl", GSM8K["train"])
    assert make_task("gsm8k", data=str(home)).train_problem(0)
    train = write(tmp_path / "dev" / "train.jsonl", GSM8K["train"])
    assert make_task("gsm8k", data=str(train)).train_problem(0)


def test_test_files_are_evaluated_and_validation_files_are_not_used(tmp_path):
    write(tmp_path / "train.jsonl", [*GSM8K["train"], {"question": "V?", "answer": "#### 777"}])
    write(tmp_path / "test.jsonl", GSM8K["test"])
    write(tmp_path / "validation.jsonl", [{"question": "v?", "answer": "#### 7"}])
    task = make_task("gsm8k", data=str(tmp_path))
    assert len(task.test_problems(99)) == 5
    assert "777" not in targets(task.problems("train", 60))
    assert task.data_summary == (
        "training train.jsonl: 20 rows; held out test.jsonl: 5 rows; "
        "left out of training, because held-out rows ask the same: 1 row; not used validation.jsonl: 1 row"
    )


def test_iteration_gives_no_row_of_a_held_out_file(tmp_path):
    """`for question, answer in MathDataset(folder): trainer.train_step(question, answer)` trains on these rows."""
    write(tmp_path / "a" / "train.jsonl", [{"question": f"{i}?", "answer": i} for i in range(5)])
    test = write(tmp_path / "a" / "Test" / "0.jsonl", [{"question": f"{i}?", "answer": i} for i in range(3, 9)])
    assert list(MathDataset(tmp_path / "a")) == [(f"{i}?", str(i)) for i in range(3)]
    assert len(MathDataset(tmp_path / "a")) == 3
    assert len(MathDataset(test)) == 6  # it was asked for by its name


@pytest.mark.parametrize("repeat", ["T1?", " t1? ", "T1 ?".replace(" ", "")])
def test_rows_on_both_sides_leave_the_training_side(tmp_path, repeat):
    write(tmp_path / "train.jsonl", [*GSM8K["train"], {"question": repeat, "answer": "#### 999"}])
    write(tmp_path / "test.jsonl", GSM8K["test"])
    assert "999" not in targets(make_task("gsm8k", data=str(tmp_path)).problems("train", 63))
    plain = [{"question": row["question"], "answer": "1"} for row in GSM8K["train"]]
    file = write(tmp_path / "all" / "a.jsonl", [{"question": "Q19?", "answer": "999"}, *plain])
    task = make_task("jsonl", data=str(file), n_test=1)
    assert targets(task.problems("train", 60)) == {"1"}
    assert len(list(task)) == 21  # iteration gives all rows


def test_countdown_knows_splits_and_leaves_out_rows_on_both_sides(tmp_path):
    write(tmp_path / "train" / "0.jsonl", [{"nums": [1, 2], "target": 3}, {"nums": [4, 2], "target": 6}])
    write(tmp_path / "test" / "0.jsonl", [{"nums": [2, 1], "target": 3}])
    task = CountdownTask(data=str(tmp_path))
    assert {tuple(p.target["numbers"]) for p in task.problems("train", 9)} == {(4, 2)}
    assert [p.target["numbers"] for p in task.test_problems(9)] == [[2, 1]]
    with pytest.raises(ValueError, match="no training rows"):
        CountdownTask(data=str(tmp_path / "test")).train_problem(0)


def test_training_rows_that_are_all_held_out_too_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K["test"])
    write(tmp_path / "test.jsonl", GSM8K["test"])
    with pytest.raises(ValueError, match="every training row repeats a held-out one"):
        make_task("gsm8k", data=str(tmp_path))


def test_hidden_files_are_left_out(tmp_path):
    write(tmp_path / ".cache" / "old.jsonl", GSM8K["test"])
    write(tmp_path / "a.jsonl", GSM8K["train"])
    assert len(read_rows(tmp_path, ("question", "answer"))) == 20


def test_a_row_that_parse_leaves_out_is_in_no_split(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"n": i} for i in range(30)])
    splits = read_splits(file, ("n",), lambda row: row["n"] if row["n"] % 2 else None, key=lambda n: n, n_test=3)
    assert splits.train == list(range(1, 24, 2))
    assert splits.test == [25, 27, 29]
    assert splits.rows == splits.train + splits.test


# ---------------------------------------------------------------------------------------------------------------------
# Rows that no response can match, or an empty one


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "answer is '', which an empty response would match"),
        (" \n\t", "which an empty response would match"),
        (float("nan"), "answer is nan, which no response can match"),
        (float("inf"), "answer is inf, which no response can match"),
        (None, "answer is None, expected text or a number"),
        (True, "answer is True, expected text or a number"),
        ([4], r"answer is \[4\], expected text or a number"),
        ("see </answer>", "answer contains </answer>, which no response can match"),
        ("<think> 4", "answer contains <think>, which no response can match"),
        ("half \ud83d of an emoji", r"half of a character, '\\ud83d', is in its text"),
        ("Two. Two.\n#### 14", "ends with '#### 14'; did you mean --task gsm8k"),
        (r"So it is $\boxed{\frac{1}{2}}$.", "did you mean --task math"),
    ],
)
def test_a_row_whose_answer_cannot_be_judged_is_refused_with_file_and_number(tmp_path, answer, message):
    """CHECKLIST 60."""
    rows = [{"question": "Good?", "answer": "4"}, {"question": "Bad?", "answer": answer}]
    file = write(tmp_path / "a" / "b.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        MathDataset(tmp_path / "a")
    assert str(error.value).startswith(f"{file}, row 2: ")
    assert "\n" not in str(error.value)


def test_half_of_a_character_is_refused_in_every_task(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "\udc00?", "answer": "#### 4"}])
    for task in ("gsm8k", "jsonl"):
        with pytest.raises(ValueError, match=r"a\.jsonl, row 1: half of a character"):
            make_task(task, data=str(file))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [-3, 5], "target": 2}, "found the number -3; an answer can only use numbers from 0 up"),
        ({"nums": [float("nan"), 5], "target": 2}, "expected whole numbers"),
        ({"nums": [3.0, 5.0], "target": 8}, "expected whole numbers"),
        ({"nums": [7], "target": 8}, "the number 7 alone cannot reach the target 8"),
        ({"nums": [10**9] * 40, "target": 8}, "the numbers need 439 characters; an answer has at most 200"),
        ({"nums": [], "target": 8}, "expected whole numbers"),
        ({"nums": [1, 2], "target": 2.5}, "expected whole numbers"),
        ({"nums": [1, "2"], "target": 3}, "expected whole numbers"),
        ({"nums": None, "target": 3}, "expected whole numbers"),
    ],
)
def test_a_countdown_row_that_no_answer_can_solve_is_refused_with_file_and_number(tmp_path, row, message):
    file = write(tmp_path / "a.jsonl", [{"nums": [1, 2], "target": 3}, row])
    with pytest.raises(ValueError, match=message) as error:
        CountdownTask(data=str(file))
    assert str(error.value).startswith(f"{file}, row 2: ")


def test_numbers_of_your_own_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="can only use numbers from 0 up"):
        CountdownTask().problem([-3, 5], target=2)
    assert CountdownTask().problem([7], target=-7)


@pytest.mark.parametrize(
    ("answers", "type_", "right", "wrong"),
    [
        ([1e-05, 2e-05], pa.float64(), ["0.00001", "1e-5", "1/100000"], ["0.0001", "0"]),
        ([0.1 + 0.2, 1 / 3], pa.float64(), ["0.3", "3/10", "0.30000000000000004"], ["0.3000001", "0"]),
        ([100 / 3, 1.0], pa.float64(), ["100/3"], ["33.33", "33.3333333"]),
        ([2**60, 1], pa.int64(), [str(2**60)], [str(2**60 + 1)]),
        ([0.1, 0.2], pa.float32(), ["0.1", "1/10", ".1"], ["0.10000000149", "0.2"]),
        ([2.5, 0.2], pa.float16(), ["2.5", "5/2"], ["2.4"]),
        ([1e300, 0.2], pa.float64(), ["1e300", "1" + "0" * 300], ["1e299"]),
        ([Decimal("1.50"), Decimal("2.00")], pa.decimal128(5, 2), ["1.5", "3/2"], ["15"]),
        ([7, 8], pa.int8(), ["7", "+7", "7.0"], ["8"]),
    ],
)
def test_numbers_from_parquet_are_compared_by_value(tmp_path, answers, type_, right, wrong):
    table = pa.table({"question": ["A?", "B?"], "answer": pa.array(answers, type_)})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    task = MathDataset(tmp_path / "a.parquet")
    problem = task.problem_from(*next(iter(task)))
    for answer in right:
        assert task.is_correct(problem, answer) or len(answer) > 200, answer  # 10^300 written out is too long to read
    assert not any(task.is_correct(problem, answer) for answer in wrong)
    assert not task.is_correct(problem, "")


def test_text_answers_are_equal_in_either_unicode_form():
    task = make_task("arithmetic")
    assert task.is_correct(task.problem_from("Where?", "Orl\u00e9ans  station"), "Orle\u0301ans station")


@pytest.mark.parametrize("answer", ["", "  ", float("nan"), "</answer>"])
def test_a_question_from_outside_is_checked_too(answer):
    with pytest.raises(ValueError, match="answer"):
        make_task("arithmetic").problem_from("What?", answer)


# ---------------------------------------------------------------------------------------------------------------------
# Columns and paths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "arithmetic", "data": "a.jsonl"}, "task arithmetic reads no file, so --data a.jsonl has no effect"),
        ({"task": "arithmetic", "answer_column": "x"}, "so --answer-column x has no effect; take --task jsonl"),
        ({"task": "countdown", "question_column": "x"}, "columns of a data file are named, but there is none"),
        ({"task": "jsonl", "data": ""}, "--data is empty"),
        ({"task": "jsonl", "data": "a.jsonl", "question_column": " "}, "--question-column is empty"),
        ({"task": "arithmetic", "reward": ""}, "--reward is empty"),
        ({"task": "jsonl", "data": "FILE", "question_column": "answer"}, "the column answer is given twice"),
        ({"task": "jsonl", "data": "x" * 5000}, "no such data file or folder"),
        ({"task": "x" * 5000 + ".py:T"}, "no such file"),
        ({"task": "a.py:"}, "expected path/to/file.py:MyTask"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, message):
    file = write(tmp_path / "a.jsonl", [{"question": "A?", "answer": "B"}])
    options = {name: str(file) if value == "FILE" else value for name, value in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        task_from_config(Config(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("countdown", {"question": "A?", "answer": 1}, "no column nums, target; .*; did you mean --task jsonl?"),
        ("jsonl", {"nums": [1, 2], "target": 3}, "no column question, answer; .*; did you mean --task countdown?"),
        ("jsonl", {"problem": "A?", "solution": "1"}, "; did you mean --task math?"),
        ("gsm8k", {"question": "A?", "answer": 1}, "expected text in question and answer, found 1; .* --task jsonl"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "expected text in question and answer, found ' '"),
        ("gsm8k", {"question": "A?", "answer": "1"}, "no final answer in answer: .*'1'; .* take --task jsonl"),
    ],
)
def test_rows_of_another_task_name_it(tmp_path, task, row, message):
    file = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        make_task(task, data=str(file))


def test_files_of_windows_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "A?", "answer": "B"}\r\n' * 1)
    assert list(make_task("jsonl", data=str(tmp_path / "a.jsonl"))) == [("A?", "B")]


def test_text_in_parquet_that_is_not_utf8_is_refused_with_file_and_number(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    pa.parquet.write_table(pa.table({"question": text, "answer": ["1", "2"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: not UTF-8 text"):
        make_task("jsonl", data=str(tmp_path / "a.parquet"))


def test_columns_by_name(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "2 + 2?", "reference": 4, "answer": "no"}] * 3)
    task = make_task("jsonl", data=str(file), question_column="prompt", answer_column="reference")
    assert list(task) == [("2 + 2?", "4")] * 3
    with pytest.raises(ValueError, match=r"no column question; found prompt, .*--question-column and --answer-column"):
        make_task("jsonl", data=str(file))
    write(file, [{"q": "2 + 2?", "solution": "#### 4"}])
    assert (
        make_task("gsm8k", data=str(file), question_column="q", answer_column="solution").train_problem(0).target == "4"
    )
    write(file, [{"numbers": [1, 2], "goal": 3}])
    task = make_task("countdown", data=str(file), question_column="numbers", answer_column="goal")
    assert task.train_problem(0).target == {"numbers": [1, 2], "target": 3}


@pytest.mark.parametrize("task", ["jsonl", "gsm8k", "countdown"])
def test_the_home_folder_of_an_unknown_user_is_one_line(task):
    with pytest.raises(FileNotFoundError, match="there is no user 'nosuchuser'") as error:
        make_task(task, data="~nosuchuser/a.jsonl")
    assert "\n" not in str(error.value)


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": 2} for i in range(20)])
    assert len(make_task("jsonl", data="~/a.jsonl")) == 20
    assert home_path("~/a.jsonl") == tmp_path / "a.jsonl"


def test_parts_of_messages():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError("a\x1b[2J\u202eb\ud800 é")) == r"a\x1b[2J\u202eb\ud800 é"
    assert first_line(ValueError()) == "ValueError"
    assert did_you_mean("reward_preste", ["reward_preset", "seed"]) == "; did you mean reward_preset?"
    assert did_you_mean("zzz", []) == "; known are none"
    assert closest("zzz", ["a"]) == "a"
    assert closest("zzz", []) is None


def test_an_evaluation_says_which_rows_it_takes(tmp_path, capsys):
    write(tmp_path / "train.jsonl", [{"question": f"{i}?", "answer": i} for i in range(5)])
    write(tmp_path / "dev.jsonl", [{"question": "5?", "answer": 5}])
    words = ["--task", "jsonl", "--data", str(tmp_path), "--max-new-tokens", "4", "--samples", "1"]
    assert evaluate.main(words) == 0
    assert "data: training train.jsonl: 5 rows; held out dev.jsonl: 1 row\n" in capsys.readouterr().out
