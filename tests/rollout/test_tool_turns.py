"""Rollouts with a tool against the whole model on the whole sequence, for every boundary and limit.

CHECKLIST 75, CHECKLIST 76.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_config, make_model
from plain_tools import respond_plainly
from test_decode_graph import recorded

import grpo
from data_types import MiniBatch, Problem, Reward, Turn
from qwen2_llm import Qwen2ForCausalLM
from rollout import decoding, tool_turns
from rollout.generation import generate, uniform_numbers
from rollout.sampling import SamplingParams
from rollout.tool_turns import Environment, ToolDecoder
from run.config import Config
from run.pretrained import locate_pretrained
from tasks.task_base import Task
from tokenizer import Tokenizer
from update.token_traces import TokenTraces

PROMPTS = [[72, 101, 108], [10], [72, 101, 108, 108, 111, 44, 32, 119, 111], [5, 6]]
CAP = 40


def echo(prompt: int, text: str) -> str | None:
    """Depends on the whole text, so that a wrong text changes the response. About one call in nine ends it."""
    number = sum(map(ord, text)) % 97
    return None if number % 9 == 0 else f"[{prompt}:{number}]"


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(tie_word_embeddings=False))


@pytest.fixture(scope="module")
def stops(model, tokenizer) -> tuple[str, ...]:
    """Letters that the model writes often."""
    counts = torch.zeros(256)
    for completion in generate(model, PROMPTS, SamplingParams(8, CAP), tokenizer=tokenizer, seed=1):
        for i in completion.response_ids:
            if i < 256 and tokenizer.decode([i]).isascii():
                counts[i] += 1
    return tuple(tokenizer.decode([int(i)]) for i in counts.topk(24).indices)


def expected(model, tokenizer, environment, params: SamplingParams, seed: int = 0) -> list:
    uniforms = uniform_numbers(PROMPTS, params, seed)
    return [
        respond_plainly(model, tokenizer, i // params.n, PROMPTS[i // params.n], u, params.temperature, environment)
        for i, u in enumerate(uniforms)
    ]


def assert_same(found: list, plain: list) -> None:
    for a, b in zip(found, plain, strict=True):
        assert replace(a, logprobs=[]) == replace(b, logprobs=[])
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


def compare(model, tokenizer, environment, *, n=3, cap=CAP, temperature=1.0, **options) -> list:
    """The responses of `generate`, which must be those of the reference implementation."""
    params = SamplingParams(n, cap, temperature)
    found = generate(model, PROMPTS, params, tokenizer=tokenizer, environment=environment, **options)
    assert_same(found, expected(model, tokenizer, environment, params))
    return found


# --- the same responses


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("n", "max_rows"), [(1, 512), (5, 512), (3, 4), (8, 8)])
def test_responses_are_those_of_the_whole_model(model, tokenizer, stops, temperature, n, max_rows):
    """With few rows, prompts wait as well as rows."""
    found = compare(model, tokenizer, Environment(echo, stops), n=n, max_rows=max_rows, temperature=temperature)
    assert sum(not all(c.sampled) for c in found) >= len(found) / 2
    assert max(len(c.turns) for c in found) > 3
    assert {c.finish_reason for c in found} == {"stop", "length"} or temperature == 0


@pytest.mark.parametrize("rows", [512, 6])
@pytest.mark.parametrize("n", [3, 9])
def test_recorded_steps_give_the_same_responses(model, tokenizer, stops, rows, n, monkeypatch):
    """As on a GPU: rows go on behind their call, and some finish there, until the next check finds the call."""
    monkeypatch.setattr(decoding, "SHORTEST_REACH", 16)
    environment, params = Environment(echo, stops), SamplingParams(n, CAP)
    uniforms = uniform_numbers(PROMPTS, params, 0)
    decoder = ToolDecoder(model, PROMPTS, uniforms, params, tokenizer, rows, environment, recorded)
    assert decoder.check_every > 1
    answers = decoder.run()
    for i, plain in enumerate(expected(model, tokenizer, environment, params)):
        length = len(plain.response_ids)
        assert answers.lengths[i] == length
        assert answers.sampled[i, :length].tolist() == plain.response_ids
        assert bool(answers.stopped[i]) == (plain.finish_reason == "stop")
        given = [t for a, b in decoder.given[i] for t in range(a, b)]
        assert given == [t for t, s in enumerate(plain.sampled) if not s]


def test_packed_rows_that_are_checked_rarely_give_the_same_responses(model, tokenizer, stops, monkeypatch):
    """A GPU without graphs. Rows in lockstep must not write into the tokens of waiting ones."""
    monkeypatch.setattr(ToolDecoder, "check_every", property(lambda self: 7, lambda self, value: None), raising=False)
    compare(model, tokenizer, Environment(echo, stops), n=8)
    compare(model, tokenizer, Environment(echo, stops), n=3, max_rows=4)


def test_a_response_does_not_depend_on_its_neighbours(model, tokenizer, stops):
    """Alone, in a group, with few rows, and when rows return one by one or all together."""
    environment, params = Environment(echo, stops), SamplingParams(6, CAP)
    whole = generate(model, PROMPTS, params, tokenizer=tokenizer, environment=environment)
    for i in range(len(PROMPTS)):
        alone = generate(
            model, PROMPTS, params, tokenizer=tokenizer, environment=environment, only=range(i, i + 1), max_rows=6
        )
        assert_same(alone, whole[6 * i : 6 * (i + 1)])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_time_of_the_return_changes_no_response(model, tokenizer, stops, share, monkeypatch):
    monkeypatch.setattr(tool_turns, "RETURN", share)
    compare(model, tokenizer, Environment(echo, stops), n=6)


def test_many_small_prefills_give_the_same_responses(model, tokenizer, stops, monkeypatch):
    monkeypatch.setattr(tool_turns, "PREFILL_SCORES", 1)
    compare(model, tokenizer, Environment(echo, stops), n=6)


# --- the boundary


def test_the_token_that_completes_a_stop_string_is_kept_whole(bundled):
    """A token of the bundled vocabulary has several letters. The stop string is the first of them."""
    model, tokenizer, prompts = bundled
    params = SamplingParams(4, 24)
    free = generate(model, prompts, params, tokenizer=tokenizer)
    long = [i for c in free for i in c.response_ids if len(tokenizer.decode([i]).strip()) > 1]
    token = max(set(long), key=long.count)
    stop = tokenizer.decode([token])[:-1]
    found = generate(model, prompts, params, tokenizer=tokenizer, environment=Environment(lambda i, t: " 7", (stop,)))
    cut = [c for c in found if not all(c.sampled)]
    assert cut
    for completion, whole in zip(found, free, strict=True):
        first = completion.sampled.index(False) if not all(completion.sampled) else len(completion.sampled)
        assert completion.response_ids[:first] == whole.response_ids[:first]
        sampled_text = tokenizer.decode(completion.response_ids[:first])
        if first < len(completion.sampled):
            assert stop in sampled_text
            assert stop not in tokenizer.decode(completion.response_ids[: first - 1])
            assert completion.turns[1] == Turn(" 7", True)
    assert any(not tokenizer.decode(c.response_ids[: c.sampled.index(False)]).endswith(stop) for c in cut)


@pytest.fixture(scope="module")
def bundled():
    folder = locate_pretrained("countdown-tiny")
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(f"<|im_start|>user\n[{i}, 4, 5] = 17<|im_end|>\n") for i in (3, 12)]
    return Qwen2ForCausalLM.from_pretrained(folder), tokenizer, prompts


def test_a_stop_string_must_lie_in_its_turn(model, tokenizer, stops):
    """The observation ends with the begin of every two-letter stop string, so any next letter would complete one."""
    letter = stops[0]
    pairs = tuple(letter + other for other in stops)
    found = compare(model, tokenizer, Environment(lambda i, t: letter, pairs), n=8)
    turns = [c.turns for c in found if len(c.turns) > 1]
    assert turns
    for sampled, given, *_ in turns:
        assert sampled.text[-2:] in pairs
        assert given == Turn(letter, True)


def test_stop_strings_may_be_special_tokens_and_have_letters_beyond_ascii(model, tokenizer, stops):
    """A stop token that is a stop string ends a turn and not the response."""
    with torch.no_grad():
        model = make_model(make_config(tie_word_embeddings=False))
        model.lm_head.weight[258] = model.lm_head.weight[tokenizer.encode(stops[0])[0]]
    found = compare(model, tokenizer, Environment(lambda i, t: "é", ("<|im_end|>", "é")), n=8)
    assert any(258 in c.response_ids[:-1] for c in found)


def test_an_observation_is_encoded_once_and_sampled_tokens_never(model, tokenizer, stops, monkeypatch):
    """Ids that no encoder gives stay as they were sampled."""
    encoded, asked, real = [], [], type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: encoded.append(text) or real(self, text))

    def respond(prompt: int, text: str) -> str:
        asked.append(f"[{len(asked)}]")
        return asked[-1]

    found = generate(
        model, PROMPTS, SamplingParams(5, CAP), tokenizer=tokenizer, environment=Environment(respond, stops)
    )
    assert encoded == asked
    assert any(real(tokenizer, c.text) != c.response_ids for c in found)


def test_no_token_is_computed_twice(model, tokenizer, stops, monkeypatch):
    """Every prompt passes through the model once, and every token of a response except the last one. With COMPACT 1
    finished rows leave the batch at once, as waiting ones do."""
    monkeypatch.setattr(decoding, "COMPACT", 1.0)
    counts, real = [], type(model).hidden_states
    monkeypatch.setattr(
        type(model), "hidden_states", lambda self, ids, *args: counts.append(len(ids)) or real(self, ids, *args)
    )
    found = generate(model, PROMPTS, SamplingParams(4, CAP), tokenizer=tokenizer, environment=Environment(echo, stops))
    computed = sum(len(c.response_ids) - 1 for c in found) + sum(map(len, PROMPTS))
    assert sum(counts) == computed


def test_a_waiting_row_is_in_no_decode_step(model, tokenizer, stops, monkeypatch):
    monkeypatch.setattr(tool_turns, "RETURN", 1.0)
    seen, real = [], ToolDecoder.step

    def step(self):
        batch = self.placed[: self.cache.n_rows]
        seen.append(len(self.calls))
        assert not set(batch) & self.calls.keys()
        assert len(batch) == len(set(batch))
        real(self)

    monkeypatch.setattr(ToolDecoder, "step", step)
    compare(model, tokenizer, Environment(echo, stops), n=6)
    assert max(seen) > 2


def test_the_uniform_numbers_are_those_of_sampled_tokens(model, tokenizer, stops):
    """Two environments whose observations have different lengths: the k-th sampled token has the same number. The
    reference takes its numbers in order."""
    for text in ("x", "a longer observation"):
        compare(model, tokenizer, Environment(lambda i, t, text=text: text, stops), n=4, cap=60)


# --- limits


@pytest.mark.parametrize("max_turns", [1, 2])
def test_one_call_more_than_max_turns_ends_the_response(model, tokenizer, stops, max_turns):
    found = compare(model, tokenizer, Environment(lambda i, t: ".", stops, max_turns), n=6)
    calls = [sum(turn.given for turn in c.turns) for c in found]
    assert max(calls) == max_turns
    ended = [c for c in found if len(c.response_ids) < CAP and c.response_ids[-1] not in tokenizer.eos_token_ids]
    assert ended
    assert {c.finish_reason for c in ended} == {"length"}


@pytest.mark.parametrize("most", [1, 3])
def test_a_turn_has_at_most_max_turn_tokens(model, tokenizer, stops, most):
    """A call that its last token completes is answered."""
    found = compare(model, tokenizer, Environment(lambda i, t: ".", stops, max_turn_tokens=most), n=24)
    runs = [run for c in found for run in "".join(".x"[s] for s in c.sampled).split(".")]
    assert max(map(len, runs)) == most
    assert any(sum(turn.given for turn in c.turns) > 0 for c in found)


@pytest.mark.parametrize("cap", [1, 2, 5, 9])
def test_max_new_tokens_counts_all_tokens(model, tokenizer, stops, cap):
    """An observation that leaves no room for a sampled token behind it ends the response before it."""
    found = compare(model, tokenizer, Environment(lambda i, t: "abc", stops), n=16, cap=cap)
    assert max(len(c.response_ids) for c in found) <= cap
    assert all(c.sampled[-1] for c in found)
    short = [c for c in found if len(c.response_ids) < cap and c.response_ids[-1] not in tokenizer.eos_token_ids]
    assert {c.finish_reason for c in short} <= {"length"}
    assert short or cap == 1


def test_an_observation_longer_than_the_room_ends_the_response_as_truncated(model, tokenizer, stops):
    found = compare(model, tokenizer, Environment(lambda i, t: "long " * 10_000, stops), n=6)
    assert all(all(c.sampled) for c in found)
    called = [c for c in found if c.text[-1:] in stops]
    assert called
    assert {c.finish_reason for c in called} == {"length"}


def test_an_empty_observation_continues_the_response(model, tokenizer, stops):
    found = compare(model, tokenizer, Environment(lambda i, t: "", stops, max_turns=3), n=6)
    assert all(all(c.sampled) for c in found)
    assert max(len(c.turns) for c in found) == 7


def test_none_ends_the_response(model, tokenizer, stops):
    found = compare(model, tokenizer, Environment(lambda i, t: None, stops), n=6)
    assert {c.finish_reason for c in found if c.text[-1:] in stops} == {"stop"}


def test_not_finite_logits_end_a_response_with_calls(tokenizer, stops):
    """A later token of a row is NaN: the row ends, and its call before that was answered."""
    model = make_model(make_config(tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("~")[0]] = torch.nan
    environment = Environment(lambda i, t: "~", stops)
    found = generate(
        model, PROMPTS, SamplingParams(6, CAP), tokenizer=tokenizer, environment=environment, must_be_finite=False
    )
    broken = [c for c in found if c.finish_reason == "not_finite"]
    assert broken
    assert all(len(c.sampled) == len(c.response_ids) == len(c.logprobs) for c in found)
    assert all(c.response_ids[-2:-1] == tokenizer.encode("~") for c in broken)
    assert any(not c.sampled[-2] for c in broken)


# --- mistakes


@pytest.mark.parametrize("stop_strings", ["</calc>", ("",), ("a", 3)])
def test_stop_strings_that_mean_nothing_are_refused(stop_strings):
    with pytest.raises(ValueError, match="expected a tuple of texts, none empty"):
        Environment(echo, stop_strings)


def test_stop_strings_of_the_sampling_beside_an_environment_are_refused(model, tokenizer, stops):
    params = SamplingParams(1, 4, stop=("x",))
    with pytest.raises(ValueError, match="stop strings of its own"):
        generate(model, PROMPTS, params, tokenizer=tokenizer, environment=Environment(echo, stops))


def test_the_text_of_the_turns_is_the_text_of_the_response(model, tokenizer, stops):
    for completion in generate(
        model, PROMPTS, SamplingParams(6, CAP), tokenizer=tokenizer, environment=Environment(echo, stops)
    ):
        ids, start = completion.response_ids, 0
        for turn, given in zip(completion.turns, [False, True] * 99):
            assert turn.given == given
        assert all(tokenizer.encode(turn.text) for turn in completion.turns if turn.given)
        assert start == 0
        assert len(ids) == len(completion.sampled)


# --- the step of a training


class Caller(Task):
    """Pays by the number of observations, so that the rewards of a group differ."""

    max_turns = 3

    def train_problem(self, index: int) -> Problem:
        return Problem(str(index), [{"role": "user", "content": f"{index}"}], index)

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        return echo(problem.target, text_so_far)

    def reward_turns(self, problem: Problem, turns) -> Reward:
        return Reward(float(sum(turn.given for turn in turns)), {"calls": float(len(turns))})

    def diagnostics(self, problem: Problem, response: str) -> dict[str, float]:
        return {}


@pytest.fixture
def caller(stops):
    task = Caller()
    task.stop_strings = stops
    return task


def test_episodes_have_the_mask_the_turns_and_the_reward_of_the_turns(model, tokenizer, caller):
    batch = MiniBatch.from_problems(caller.problems("train", 3), tokenizer)
    episodes = grpo.rollout(model, tokenizer, caller, batch, SamplingParams(4, CAP))
    uniforms = uniform_numbers(batch.prompt_ids, SamplingParams(4, CAP), 0)
    for i, (e, u) in enumerate(zip(episodes, uniforms, strict=True)):
        environment = Environment.of(caller, batch.problems)
        plain = respond_plainly(model, tokenizer, i // 4, batch.prompt_ids[i // 4], u, 1.0, environment)
        assert (e.response_ids, e.sampled, e.turns, e.text) == (
            plain.response_ids, plain.sampled, plain.turns, plain.text,
        )  # fmt: skip
        assert e.reward == sum(turn.given for turn in plain.turns)
    assert len({e.reward for e in episodes}) > 2


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "importance_correction": "truncate_token"}])
def test_a_step_learns_from_sampled_tokens_only(model, tokenizer, caller, options):
    """Sampler and trainer agree on every sampled token, and the metrics count those."""
    config = Config(
        prompts_per_step=3, group_size=4, max_new_tokens=CAP, overlong_buffer=5, prompt_style="short", **options
    )
    policy, reference = make_model(make_config(tie_word_embeddings=False)), make_model(make_config())
    trainer = grpo.GRPO(config, model=policy, tokenizer=tokenizer, task=caller, reference=reference)
    episodes, metrics = trainer.step(MiniBatch.from_problems(caller.problems("train", 3), tokenizer))
    sampled = sum(sum(e.sampled) for e in episodes)
    given = sum(len(e.sampled) for e in episodes) - sampled
    assert 0 < metrics["update/tokens"] <= sampled
    assert metrics["completions/mean_length"] == pytest.approx(sampled / 12)
    assert metrics["tools/given_tokens"] == pytest.approx(given / 12)
    assert metrics["tools/calls"] == pytest.approx(sum(turn.given for e in episodes for turn in e.turns) / 12)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    prompts = sum(len(e.prompt_ids) for e in episodes)
    assert metrics["num_tokens"] == sampled + given + prompts


def test_a_task_without_stop_strings_has_no_environment(tokenizer):
    assert Environment.of(Caller(), []) is None


def test_an_observation_that_is_no_text_is_an_error_of_one_line(model, tokenizer, caller):
    caller.respond = lambda problem, text: 3
    batch = MiniBatch.from_problems(caller.problems("train", 1), tokenizer)
    with pytest.raises(TypeError, match=r"Caller.respond returned int, expected text or None"):
        grpo.rollout(model, tokenizer, caller, batch, SamplingParams(8, CAP))


def test_a_dry_run_has_no_environment(model, tokenizer, caller):
    """Its responses never stop, so that it shows the largest step."""
    batch = MiniBatch.from_problems(caller.problems("train", 1), tokenizer)
    episodes = grpo.rollout(model, tokenizer, caller, batch, SamplingParams(4, CAP, ignore_eos=True))
    assert {len(e.response_ids) for e in episodes} == {CAP}
    assert {e.sampled for e in episodes} == {None}


def test_a_sampling_mask_is_that_of_sampled_tokens(model, tokenizer, caller):
    """With --keep-sampling-mask the update sees the ids that were left to sample, and none for given tokens."""
    config = Config(prompts_per_step=3, group_size=4, max_new_tokens=CAP, top_k=20, keep_sampling_mask=True,
                    prompt_style="short")  # fmt: skip
    trainer = grpo.GRPO(config, model=make_model(make_config(tie_word_embeddings=False)), tokenizer=tokenizer,
                        task=caller)  # fmt: skip
    episodes, metrics = trainer.step(MiniBatch.from_problems(caller.problems("train", 3), tokenizer))
    assert any(not all(e.sampled) for e in episodes)
    for e in episodes:
        assert all(e.response_ids[t] in e.kept[t] for t in e.sampled_positions)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_token_trace_has_a_number_for_each_sampled_token_and_none_for_given_ones(model, tokenizer, caller):
    batch = MiniBatch.from_problems(caller.problems("train", 2), tokenizer)
    episodes = grpo.compute_advantages(grpo.rollout(model, tokenizer, caller, batch, SamplingParams(4, CAP)))
    policy = make_model(make_config(tie_word_embeddings=False))
    traces = TokenTraces(set(range(len(episodes))))
    grpo.update_policy(policy, torch.optim.SGD(policy.parameters(), lr=0.0), episodes, traces=traces)
    traces.attach(episodes)
    trained = [e for e in episodes if "logp" in e.trace]
    assert any(not all(e.sampled) for e in trained)
    for e in trained:
        assert [x is not None for x in e.trace["logp"]] == e.sampled
        assert [x is not None for x in e.trace["coefficient"]] == e.sampled
