"""The warm start: honest traces, a tokenizer that suits them, a loss on responses only, and the bundled checkpoint."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import warm_start
from math_task import ArithmeticTask, CountdownTask
from model import linear
from qwen2_llm import Qwen2ForCausalLM
from tasks import search_traces
from tasks.expressions import evaluate_expression, false_sums
from tasks.search_traces import LARGEST_RESULT, Searcher, draw_searcher, write_trace
from tasks.sum_traces import Habits, draw_habits, write_working
from tokenizer import Tokenizer
from warm_start import Options

ASSET = Path(__file__).parents[1] / "assets" / "countdown-tiny"
TASK = CountdownTask(numbers=(3, 4), max_number=25, prompt_style="short")


def traces(n: int, room: int = 300):
    rng = random.Random(5)
    for problem in TASK.problems("train", n):
        numbers, target = problem.target["numbers"], problem.target["target"]
        yield problem, write_trace(numbers, target, draw_searcher(rng), rng, room, count_tokens=len)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    warm_start.make_tokenizer(folder, warm_start.tokenizer_texts(TASK, seed=0, n=300))
    return Tokenizer.from_pretrained(folder)


# --- traces


def test_every_sum_in_a_trace_is_true_and_uses_what_is_there():
    dead_ends = 0
    for problem, trace in traces(300):
        assert false_sums(trace)[0] == 0
        for line in trace.split("\n</think>")[0].removesuffix("\ngive up").split("\n"):
            have = list(problem.target["numbers"])
            steps, verdict = line.rsplit(" ", 1)
            for shown in steps.split(","):
                expression, _, result = shown.partition("=")
                value, used = evaluate_expression(expression)
                for number in used:
                    have.remove(number)
                have.append(int(result) if result else None)
                if not result:  # a dead end: fractions, 0, or too large a number for this searcher
                    dead_ends += 1
                    assert value.denominator > 1 or not 1 <= value <= LARGEST_RESULT
            assert len(have) == 1 or have[-1] is None
            assert verdict == ("ok" if have == [problem.target["target"]] else "no")
    assert dead_ends > 10


def test_a_trace_has_the_full_format_and_is_solved_exactly_when_it_says_ok():
    outcomes = set()
    for problem, trace in traces(300):
        reward = TASK.reward(problem, trace)
        assert reward.parts["format"] == 1.0
        assert (reward.parts["answer"] == 1.0) == (" ok\n" in trace) == ("give up" not in trace)
        outcomes.add(reward.parts["answer"])
    assert outcomes == {0.0, 1.0}


def test_no_attempt_is_made_twice():
    stubborn = Searcher(patience=99, notice=0.0, thoughts=1)
    for seed in range(50):
        trace = write_trace([1, 2, 2], 97, stubborn, random.Random(seed), room=2000, count_tokens=len)
        attempts = trace.split("\n")[:-3]
        assert len(attempts) > 5
        assert len(set(attempts)) == len(attempts)


def test_giving_up_answers_with_the_closest_attempt():
    stubborn = Searcher(patience=99, notice=0.0, thoughts=1)
    for seed in range(30):
        trace = write_trace([7, 3, 5], 90, stubborn, random.Random(seed), room=2000, count_tokens=len)
        results = [
            int(line.rsplit("=", 1)[1].removesuffix(" no"))
            for line in trace.split("\n")[:-3]
            if "=" in line.rsplit(",", 1)[-1]
        ]
        answer = trace.split("<answer>")[1].removesuffix("</answer>")
        assert "give up" in trace
        assert abs(evaluate_expression(answer)[0] - 90) == min(abs(result - 90) for result in results)


def test_a_trace_fits_the_room_it_is_given():
    """An episode that outgrows the cap on new tokens would be cut, and its honest end lost."""
    stubborn = Searcher(patience=99, notice=0.0, thoughts=1)
    longest = 0
    for seed in range(100):
        trace = write_trace([21, 13, 5, 8], 99, stubborn, random.Random(seed), room=150, count_tokens=len)
        assert len(trace) <= 150
        longest = max(longest, len(trace))
    assert longest > 110  # it uses the room, too
    with pytest.raises(ValueError, match="more room"):
        write_trace([21, 13, 5, 8], 99, stubborn, random.Random(0), room=30, count_tokens=len)


def test_noticing_and_thinking_find_more():
    """The habits that reinforcement learning shall choose from make a difference to begin with."""
    rng, solved = random.Random(0), {}
    for habits in ((0.0, 1), (1.0, 1), (0.0, 5)):
        searcher = Searcher(1, *habits)
        problems = [p.target for p in TASK.problems("train", 400)]
        texts = [write_trace(p["numbers"], p["target"], searcher, rng, 300, len) for p in problems]
        solved[habits] = sum(" ok\n" in text for text in texts) / 400
    assert solved[0.0, 1] < 0.2 < solved[1.0, 1]
    assert solved[0.0, 5] > 0.25


def orderly_attempts(seed: int, notice: float = 0.0, thoughts: int = 1, target: int = 97) -> list[str]:
    """The lines of a search that tries everything; 97 is out of reach of 7, 3 and 5."""
    searcher = Searcher(99, notice, thoughts, orderly=True)
    trace = write_trace([7, 3, 5], target, searcher, random.Random(seed), room=5000, count_tokens=len)
    return trace.partition("\ngive up")[0].partition("\n</think>")[0].split("\n")


def test_an_orderly_search_makes_every_attempt_once_and_goes_round(monkeypatch):
    monkeypatch.setattr(search_traces, "DEAD_ENDS", 0.0)
    first = orderly_attempts(seed=0)
    begins = set()
    for seed in range(60):
        attempts = orderly_attempts(seed)
        at = first.index(attempts[0])
        begins.add(at)
        assert attempts == first[at:] + first[:at]  # what follows an attempt is the same in every search
    assert len(begins) > 15
    # 7 and 3, 7 and 5, 3 and 5; + - and * each, no quotient is whole; then what can be made with the third number
    order = [line.partition(",")[0] for line in first]
    assert set(order) == {"7+3=10", "7-3=4", "7*3=21", "7+5=12", "7-5=2", "7*5=35", "5+3=8", "5-3=2", "5*3=15"}
    assert len(set(first)) == len(first)


def test_an_orderly_search_that_notices_makes_one_attempt_with_each_first_sum(monkeypatch):
    monkeypatch.setattr(search_traces, "DEAD_ENDS", 0.0)
    attempts = orderly_attempts(seed=0, notice=1.0)
    assert len(attempts) == 9
    assert len({line.partition(",")[0] for line in attempts}) == 9
    assert "7+3=10,10*5=50 no" in attempts  # the one of 15, 5, 50 and 2 that comes closest to 97


def test_an_orderly_search_begins_with_the_best_of_its_thoughts():
    begins = {thoughts: [orderly_attempts(s, thoughts=thoughts, target=20) for s in range(40)] for thoughts in (1, 60)}
    solved_at_once = {thoughts: sum(len(lines) == 1 for lines in begins[thoughts]) for thoughts in begins}
    assert solved_at_once[1] < 20
    assert solved_at_once[60] > 30


def test_an_orderly_search_is_true_runs_into_dead_ends_and_fits_its_room():
    rng, dead_ends = random.Random(3), 0
    for problem in TASK.problems("train", 60):
        numbers, target = problem.target["numbers"], problem.target["target"]
        trace = write_trace(numbers, target, Searcher(99, 0.5, 1, orderly=True), rng, 200, count_tokens=len)
        assert len(trace) <= 200
        assert false_sums(trace)[0] == 0
        assert (TASK.reward(problem, trace).parts["answer"] == 1.0) == (" ok\n" in trace)
        dead_ends += sum("=" not in line.rsplit(",", 1)[-1] for line in trace.split("\n") if line.endswith(" no"))
    assert dead_ends > 3


# --- arithmetic, worked out


def test_every_working_is_true_whole_and_right():
    task, rng = ArithmeticTask(num_terms=(1, 2, 4), num_digits=(1, 2, 3)), random.Random(5)
    texts = []
    for problem in task.problems("train", 300):
        expression = problem.messages[-1]["content"].removeprefix("What is ").partition("?")[0]
        text = write_working(expression, draw_habits(rng))
        assert task.reward(problem, f"\n{text}").parts == {"format": 1.0, "answer": 1.0}
        assert false_sums(text.partition("</think>")[0])[0] == 0
        texts.append((expression, text))
    long = [(e, t) for e, t in texts if e.count(" ") > 4]
    assert 0.03 < sum(t.startswith(f"{e} = ") for e, t in long) / len(long) < 0.2  # the habit of one in ten


def test_three_in_four_split_products_and_one_in_ten_guesses():
    rng = random.Random(0)
    habits = [draw_habits(rng) for _ in range(2000)]
    assert 0.70 < sum(h.splits for h in habits) / 2000 < 0.80
    assert 0.08 < sum(h.in_one_go for h in habits) / 2000 < 0.12


def test_a_file_in_place_of_the_folder_is_refused_before_any_training(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file, expected a folder"):
        warm_start.main(Options(out=str(tmp_path / "taken"), ckpt="countdown-tiny", tokens=100))
    assert (tmp_path / "taken").read_text() == "mine"


def test_products_come_first_and_are_put_together_from_digits_or_known_by_heart():
    digits, by_heart = Habits(in_one_go=False, splits=True), Habits(in_one_go=False, splits=False)
    end = "76 - 6175 = -6099\n</think>\n<answer>-6099</answer>"
    product = [
        "65 * 95 = 65 * 90 + 65 * 5",
        "65 * 90 = 60 * 90 + 5 * 90 = 5400 + 450 = 5850",
        "65 * 5 = 60 * 5 + 5 * 5 = 300 + 25 = 325",
        "65 * 95 = 5850 + 325 = 6175",
    ]
    assert write_working("76 - 65 * 95", digits).splitlines() == [*product, *end.splitlines()]
    assert write_working("76 - 65 * 95", by_heart) == "65 * 95 = 6175\n" + end
    in_one_go = write_working("76 - 65 * 95", Habits(in_one_go=True, splits=True))
    assert in_one_go.startswith("76 - 65 * 95 = -6099\n</think>")


@pytest.mark.parametrize(
    ("question", "lines"),
    [
        ("20 * 30", ["20 * 30 = 600"]),  # nothing to make easier
        ("5 * 95", ["5 * 95 = 475"]),
        ("12 * 30", ["12 * 30 = 10 * 30 + 2 * 30 = 300 + 60 = 360"]),
        ("30 * 12", ["30 * 12 = 30 * 10 + 30 * 2", "30 * 10 = 300", "30 * 2 = 60", "30 * 12 = 300 + 60 = 360"]),
        ("123 * 40", ["123 * 40 = 4920"]),  # a number above 99 stays whole
    ],
)
def test_only_what_is_hard_is_split(question, lines):
    working = write_working(question, Habits(in_one_go=False, splits=True))
    assert working.partition("\n</think>")[0].splitlines() == lines


def test_the_default_room_holds_the_longest_working_of_the_default_questions(tokenizer):
    longest = write_working("99 * 98 * 97", Habits(in_one_go=False, splits=True))
    assert 172 < len(tokenizer.encode(longest)) < Options(task="arithmetic").room
    assert Options(task="arithmetic", room=20).room == 20
    assert Options().room == 172


def test_a_question_that_cannot_be_worked_out_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"for \+ - \* only"):
        write_working("7 / 2", Habits(in_one_go=False, splits=False))
    with pytest.raises(ValueError, match=r"--operators '\+/'"):
        warm_start.main(Options(task="arithmetic", operators="+/"))
    with pytest.raises(ValueError, match="give more --room"):
        next(warm_start.examples(ArithmeticTask(num_terms=(9,), prompt_style="short"), tokenizer, Options(room=20)))


# --- the tokenizer


def test_digits_line_breaks_and_tags_are_tokens_of_their_own(tokenizer):
    trace = "12*13=156,156-4=152 no\ngive up\n</think>\n<answer>(12*13)-4</answer>"
    ids = tokenizer.encode(trace)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == trace
    assert [p for p in pieces if p.isdigit()] == [c for c in trace if c.isdigit()]
    assert pieces.count("\n") == 3
    assert not any("\n" in p for p in pieces if p != "\n")
    assert {"</think>", "<answer>", "</answer>", " no", ","} <= set(pieces)


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Grüße, 世界!\t\x00  \r\n the (quick) fox's 3.14 ** 2 <think> </answer>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stop_ids_and_padding(tokenizer):
    im_end, end_of_text = tokenizer.encode("<|im_end|>")[0], tokenizer.encode("<|endoftext|>")[0]
    assert set(tokenizer.eos_token_ids) == {im_end, end_of_text}
    assert tokenizer.pad_token_id == end_of_text
    assert tokenizer.vocab_size <= 576


def test_the_prompt_is_short(tokenizer):
    problem = TASK.problem([24, 13, 5, 11], target=97)
    prompt = tokenizer.render_chat(TASK.prompt(problem)) + problem.response_prefix
    assert prompt.endswith("[24, 13, 5, 11] = 97<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert len(tokenizer.encode(prompt)) <= 36


# --- training


def tiny(tokenizer) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_config(warm_start.tiny_config(tokenizer), seed=1)


@pytest.mark.parametrize("traces_per_problem", [1, 3])
def test_the_loss_is_the_cross_entropy_of_responses_and_their_stop_token(traces_per_problem, tokenizer):
    """CHECKLIST 8: the stop token is learnt. The prompt is not. Traces that share a prompt do not see each other."""
    model = tiny(tokenizer)
    stream = warm_start.examples(TASK, tokenizer, Options(traces_per_problem=traces_per_problem))
    batch = list(itertools.islice(stream, 5))
    responses = [(example.prompt_ids, response) for example in batch for response in example.responses]
    assert len(responses) == 5 * traces_per_problem
    assert all(response[-1] == tokenizer.encode("<|im_end|>")[0] for _, response in responses)
    total, count = torch.zeros(()), 0
    for prompt, response in responses:  # one at a time, from whole logits
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(response), reduction="sum")
        count += len(response)
    torch.testing.assert_close(warm_start.response_loss(model, batch), total / count)


def test_a_problem_has_as_many_traces_as_asked_and_its_prompt_counts_once(tokenizer):
    example = next(warm_start.examples(TASK, tokenizer, Options(traces_per_problem=8)))
    assert len(set(map(tuple, example.responses))) > 4  # each has habits of its own
    assert len(example) == len(example.prompt_ids) + sum(map(len, example.responses))
    assert len(example.responses) == 8
    with pytest.raises(ValueError, match="--traces-per-problem 0: expected 1 or more"):
        warm_start.main(Options(traces_per_problem=0))


@pytest.mark.parametrize("orderly", [False, True])
def test_searches_are_orderly_where_asked(orderly, tokenizer, monkeypatch):
    drawn = []
    monkeypatch.setattr(warm_start, "draw_searcher", lambda *args: drawn.append(draw_searcher(*args)) or drawn[-1])
    next(warm_start.examples(TASK, tokenizer, Options(traces_per_problem=4, orderly=orderly)))
    assert [searcher.orderly for searcher in drawn] == [orderly] * 4


def test_examples_stay_within_the_room_and_are_training_problems(tokenizer):
    stream = warm_start.examples(TASK, tokenizer, Options(room=100))
    for index, example in enumerate(itertools.islice(stream, 100)):
        problem = TASK.train_problem(index)
        assert len(example.responses[0]) <= 100
        prompt = tokenizer.render_chat(TASK.prompt(problem)) + problem.response_prefix
        assert example.prompt_ids == tokenizer.encode(prompt)


def test_the_full_prompt_style_gets_a_line_break_before_the_trace(tokenizer):
    task = CountdownTask(numbers=(3,), max_number=25, prompt_style="full")
    example = next(warm_start.examples(task, tokenizer, Options(room=184)))
    assert tokenizer.decode(example.prompt_ids).endswith("<think>")
    text = tokenizer.decode(example.responses[0])
    assert text[0] == "\n"
    assert text[1].isdigit()


def test_batches_lose_no_example():
    stream = [warm_start.Example([0] * 3, [[0] * n]) for n in (4, 5, 6, 7, 8)]
    found = list(warm_start.batches(iter(stream), batch_tokens=10))
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert [example for batch in found for example in batch] == stream


@pytest.mark.parametrize("task", ["countdown", "arithmetic", "calculator"])
def test_from_nothing_to_a_folder_and_on_from_there(task, tmp_path, capsys):
    """Both ways to call it. The same seed gives the same weights. Training lowers the loss."""
    options = {"task": task, "tokens": 6000, "batch_tokens": 1000, "threads": 1, "eval_problems": 4}
    for name in ("a", "b"):
        warm_start.main(Options(out=str(tmp_path / name), **options))
    weights = [Qwen2ForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "sampled" in capsys.readouterr().out
    warm_start.main(
        Options(out=str(tmp_path / "c"), ckpt=str(tmp_path / "a"), room=250, **{**options, "eval_problems": 0})
    )
    moved = Qwen2ForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert not torch.equal(moved["model.norm.weight"], weights[0]["model.norm.weight"])
    assert Tokenizer.from_pretrained(tmp_path / "c").vocab_size == Tokenizer.from_pretrained(tmp_path / "a").vocab_size


@pytest.mark.parametrize("ckpt", [None, "FOLDER"])
def test_a_large_model_gathers_gradients_in_place_and_learns_the_same(ckpt, tokenizer, monkeypatch):
    """Without it, and without giving memory back, a cold start of a 0.5B model grew to 14 GiB."""
    returned, in_place, losses = [], [], []

    def loss_of(model, batch):
        in_place.append(linear._in_place)
        losses.append(warm_start_loss(model, batch))
        return losses[-1]

    warm_start_loss = warm_start.response_loss
    monkeypatch.setattr(warm_start, "response_loss", loss_of)
    monkeypatch.setattr(warm_start, "return_free_memory", lambda: returned.append(len(losses)))
    options = Options(ckpt=ckpt, tokens=4000, batch_tokens=400, lr=3e-3)
    warm_start.train(tiny(tokenizer), warm_start.examples(TASK, tokenizer, options), options)
    assert in_place == [ckpt is not None] * len(losses)
    assert returned == (list(range(0, len(losses), warm_start.RETURN_EVERY)) if ckpt else [])
    last = torch.tensor([loss.item() for loss in losses])
    monkeypatch.setattr(warm_start, "gradients_in_place", lambda enabled: linear.gradients_in_place(not enabled))
    losses.clear()
    warm_start.train(tiny(tokenizer), warm_start.examples(TASK, tokenizer, options), options)
    torch.testing.assert_close(torch.tensor([loss.item() for loss in losses]), last, rtol=1e-3, atol=1e-3)


def test_the_schedule_rises_and_falls_to_zero():
    assert warm_start.cosine(0.01) == pytest.approx(0.5)
    assert warm_start.cosine(0.5) == pytest.approx(0.5)
    assert warm_start.cosine(1.0) == pytest.approx(0.0)


# --- the bundled checkpoint


def test_the_bundled_checkpoint_opens_in_transformers_with_equal_logits_and_ids():
    transformers = pytest.importorskip("transformers")
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(ASSET), Tokenizer.from_pretrained(ASSET)
    problem = TASK.problem([24, 13, 5], target=97)
    prompt = tokenizer.render_chat(TASK.prompt(problem)) + problem.response_prefix
    theirs = transformers.AutoTokenizer.from_pretrained(ASSET)
    assert (
        theirs.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True) + "<think>\n" == prompt
    )
    ids = tokenizer.encode(prompt)
    assert theirs.encode(prompt, add_special_tokens=False) == ids
    reference = transformers.AutoModelForCausalLM.from_pretrained(ASSET).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])), reference(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4
        )


def test_the_bundled_checkpoint_searches_honestly_and_imperfectly():
    """The start that the default run improves on: full format, hardly a false sum, a low but living solve rate."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(ASSET), Tokenizer.from_pretrained(ASSET)
    rates = warm_start.evaluate(model, tokenizer, TASK, 64, max_new_tokens=192, temperature=1.0)
    assert rates["format"] >= 0.9
    assert rates["false_sums"] <= 0.03
    assert 0.05 <= rates["solved"] <= 0.5
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 5e6
