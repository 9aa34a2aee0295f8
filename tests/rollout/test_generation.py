"""generation.py: sampled answers against full forwards and a plain sampler, their distribution, stops and seeds."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from conftest import make_config, make_model, write_tokenizer

from model.linear import Linear, can_pack
from rollout import decoding, generation, sampling
from rollout.generation import generate
from rollout.sampling import SamplingParams, filter_weights, inverse_cdf, sample
from tokenizer import Tokenizer

PROMPTS = [[72, 101, 108], [10], [72, 101, 108, 108, 111, 44, 32, 119, 111], [5, 6]]


@torch.no_grad()
def reference_logprobs(model, ids: list[int], temperature: float = 1.0, vocab_size: int = 259) -> torch.Tensor:
    """[T, vocab_size] log-probabilities of the token after each of `ids`, by one forward of that text alone."""
    return (model(torch.tensor([ids]))[0, :, :vocab_size].double() / temperature).log_softmax(dim=-1)


def reference_answer(model, prompt: list[int], u: list[float], temperature: float, stops=(256, 258)) -> list[int]:
    """Invert the cumulative distribution token by token, with a full forward each time."""
    ids = list(prompt)
    for number in u:
        cumulative = reference_logprobs(model, ids, temperature)[-1].exp().cumsum(0)
        ids.append(int((cumulative <= number * cumulative[-1]).sum()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def answers(model, prompts, tokenizer, seed: int = 0, max_rows: int = 512, **params):
    settings = {"n": 3, "max_new_tokens": 12} | params
    return generate(
        model, prompts, SamplingParams(**settings), tokenizer=tokenizer, seed=seed, max_rows=max_rows
    )  # fmt: skip


def response_ids(completions) -> list[list[int]]:
    return [completion.response_ids for completion in completions]


def stopping_model(bias: float, stops: tuple[int, ...] = (256, 258)):
    """A model that stops often: its head leans towards the stop ids, or away from them where `bias` is negative."""
    model = make_model(make_config(tie_word_embeddings=False))
    direction = model.model.norm.weight.detach() * 0
    direction[0] = 1.0
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0] = 0  # channel 0 of the residual stream: a constant
        model.model.layers[-1].self_attn.o_proj.weight[0] = 0
        model.model.layers[0].mlp.down_proj.weight[0] = 0
        model.model.layers[0].self_attn.o_proj.weight[0] = 0
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[list(stops)] = direction * bias
    return model


# --- what is sampled


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_answers_are_those_of_a_plain_sampler(temperature, tokenizer):
    """CHECKLIST 27, CHECKLIST 36. Ragged prompts, rows that leave: id for id those of full forwards."""
    model = stopping_model(2.0)
    completions = answers(model, PROMPTS, tokenizer, temperature=temperature)
    uniforms = generation.uniform_numbers(PROMPTS, SamplingParams(n=3, max_new_tokens=12), seed=0)
    assert len({len(ids) for ids in response_ids(completions)}) > 2
    for i, (completion, u) in enumerate(zip(completions, uniforms.tolist(), strict=True)):
        assert completion.prompt_index == i // 3
        assert completion.prompt_ids == PROMPTS[i // 3]
        assert completion.response_ids == reference_answer(model, PROMPTS[i // 3], u, temperature)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_logprobs_are_those_training_computes(temperature, filters, tokenizer):
    """CHECKLIST 2, CHECKLIST 3, CHECKLIST 4, CHECKLIST 6. At this temperature, over all ids of the tokenizer."""
    model = make_model()
    for completion in answers(model, PROMPTS, tokenizer, temperature=temperature, **filters):
        prompt, response = completion.prompt_ids, completion.response_ids
        expected = reference_logprobs(model, prompt + response, temperature)[len(prompt) - 1 : -1]
        expected = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_greedy_takes_the_likeliest_each_time(tokenizer):
    """Temperature 0. The log-probability stays that of temperature 1."""
    model = make_model()
    for completion in answers(model, PROMPTS, tokenizer, temperature=0.0, n=1):
        ids = completion.prompt_ids + completion.response_ids
        rows = reference_logprobs(model, ids)[len(completion.prompt_ids) - 1 : -1]
        assert completion.response_ids == rows.argmax(dim=-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), rows.amax(-1), atol=1e-4, rtol=0)


def test_ids_beyond_the_tokenizer_are_never_sampled(tokenizer):
    """CHECKLIST 6. The head has 275 rows, the tokenizer 259 ids. The 16 others are by far the likeliest."""
    model = make_model(make_config(tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[259:] = 50 * model.lm_head.weight[:16]
    raw = model(torch.tensor([PROMPTS[0]])).argmax(dim=-1)
    assert (raw >= 259).any()
    for temperature in (0.0, 1.0, 5.0):
        sampled = response_ids(answers(model, PROMPTS, tokenizer, temperature=temperature))
        assert max(max(ids) for ids in sampled) < 259


def test_generation_config_of_a_checkpoint_changes_nothing_but_stops(tokenizer, tmp_path):
    """CHECKLIST 5. A repetition penalty, top-k, temperature and forced ids are not obeyed."""
    folder, model = write_tokenizer(tmp_path), make_model()
    leak = {"repetition_penalty": 3.0, "top_k": 1, "temperature": 0.01, "do_sample": False, "max_new_tokens": 2}
    leak |= {"eos_token_id": [258, 256], "suppress_tokens": list(range(100)), "bos_token_id": 257}
    (folder / "generation_config.json").write_text(json.dumps(leak))
    ours = answers(model, PROMPTS, Tokenizer.from_pretrained(folder))
    assert ours == answers(model, PROMPTS, tokenizer)


def test_the_pad_id_in_a_prompt_is_a_token_like_any_other(tokenizer):
    """CHECKLIST 7. Also at the ends of a ragged batch's prompts."""
    model, pad = make_model(), tokenizer.pad_token_id
    prompts = [[pad, 5, pad], [7, pad, pad, pad, 8, pad], [pad]]
    uniforms = generation.uniform_numbers(prompts, SamplingParams(n=2, max_new_tokens=5), seed=0).tolist()
    for i, completion in enumerate(answers(model, prompts, tokenizer, n=2, max_new_tokens=5)):
        assert completion.response_ids == reference_answer(model, prompts[i // 2], uniforms[i], 1.0)


def test_texts_and_their_ids_are_the_same_prompt(tokenizer):
    """CHECKLIST 12. Ids that are handed in are used as they are, special tokens and all."""
    model, texts = make_model(), ["Hello", "<|im_start|>user\nhi<|im_end|>"]
    ids = [tokenizer.encode(text) for text in texts]
    assert answers(model, texts, tokenizer) == answers(model, ids, tokenizer)
    assert answers(model, ids, tokenizer)[0].prompt_ids == ids[0]


# --- stops


@pytest.mark.parametrize("stops", [(256, 258), (258,), (256,), (65, 66)])
def test_every_stop_id_stops_and_is_the_last_id(stops, tmp_path):
    """CHECKLIST 8, CHECKLIST 9. Pad is 256, a stop id here; 65 is no special token. Text leaves it out, ids keep it."""
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, eos_token_ids=stops))
    stops = set(tokenizer.eos_token_ids)  # 258 always: tokenizer_config.json names it
    assert tokenizer.pad_token_id == 256
    completions = answers(stopping_model(1.2, tuple(stops)), PROMPTS, tokenizer, n=16, max_new_tokens=10)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert {c.response_ids[-1] for c in completions if c.finish_reason == "stop"} == stops
    for completion in completions:
        *body, last = completion.response_ids
        assert not stops & set(body)
        assert (completion.finish_reason == "stop") == (last in stops)
        assert completion.finish_reason == "stop" or len(completion.response_ids) == 10
        assert completion.text == tokenizer.decode(body if last in stops else [*body, last])
        assert len(completion.logprobs) == len(completion.response_ids)


def test_stopping_on_the_last_allowed_token_is_a_stop(tokenizer):
    """CHECKLIST 9. Truncated and stopped-at-the-limit are told apart."""
    completions = answers(stopping_model(1.2), [PROMPTS[0]], tokenizer, n=64, max_new_tokens=1)
    reasons = {(c.response_ids[0] in (256, 258), c.finish_reason) for c in completions}
    assert reasons == {(True, "stop"), (False, "length")}


@pytest.mark.parametrize("stop", ["ab", "éé", "b", "\n\n"])
def test_stop_strings_end_an_answer_where_they_are_completed(stop, tokenizer):
    """The string stays in the text. A model that only says a, b, é and line breaks meets them often."""
    model = stopping_model(-20.0)
    wanted = sorted({i for text in ("a", "b", "é", "\n") for i in tokenizer.encode(text)})
    others = torch.tensor([i for i in range(275) if i not in wanted])
    with torch.no_grad():
        model.lm_head.weight[others] = 0
        model.lm_head.weight[others, 0] = -20.0
    completions = answers(model, PROMPTS, tokenizer, n=32, max_new_tokens=24, stop=(stop, "z"))
    free = answers(model, PROMPTS, tokenizer, n=32, max_new_tokens=24)
    assert {c.finish_reason for c in completions} >= {"stop"}
    for completion, whole in zip(completions, free, strict=True):
        ends = [t for t in range(1, 25) if stop in tokenizer.decode(whole.response_ids[:t])]
        expected = whole.response_ids[: ends[0]] if ends else whole.response_ids
        assert completion.response_ids == expected
        assert completion.text == tokenizer.decode(expected)
        assert completion.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("cap", [1, 2, 7])
def test_max_new_tokens_is_exact_for_each_prompt_length(cap, tokenizer):
    """CHECKLIST 37."""
    model = stopping_model(-20.0)
    for completion in answers(model, [[7] * n for n in range(1, 12)], tokenizer, n=2, max_new_tokens=cap):
        assert len(completion.response_ids) == len(completion.logprobs) == cap
        assert completion.finish_reason == "length"


def test_a_prompt_may_fill_the_context_and_not_a_token_more(tokenizer):
    """CHECKLIST 37. The refusal names the prompt and the numbers, before anything is computed."""
    model = make_model(make_config(max_position_embeddings=20))
    assert len(answers(model, [[7] * 15], tokenizer, n=1, max_new_tokens=5)[0].response_ids) <= 5
    with pytest.raises(ValueError, match=r"prompt 1 has 16 tokens, and 5 new ones .* context of 20"):
        answers(model, [[7], [7] * 16], tokenizer, max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        answers(model, [[7], [7], []], tokenizer)


def test_no_prompts_give_no_answers(tokenizer):
    assert answers(make_model(), [], tokenizer) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}, {"top_p": math.nan},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="expected") as error:
        SamplingParams(**wrong)
    assert "\n" not in str(error.value)


# --- randomness


def test_many_rows_are_drawn_as_each_of_them_alone(monkeypatch):
    """On a CPU they are taken in pieces, here of 8 rows."""
    monkeypatch.setattr(sampling, "LOGITS_AT_A_TIME", 8 * 50)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 50, generator=generator)
    u = torch.rand(70, generator=generator, dtype=torch.float64)
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_p=0.8), SamplingParams(temperature=0.0)):
        ids, logprobs = sample(logits, u, params, vocab_size=45)
        alone = [sample(logits[i : i + 1], u[i : i + 1], params, vocab_size=45) for i in range(70)]
        assert torch.equal(ids, torch.cat([a for a, _ in alone]))
        torch.testing.assert_close(logprobs, torch.cat([b for _, b in alone]))


def test_samples_of_a_prompt_differ_and_so_do_copies_of_a_prompt(tokenizer):
    """CHECKLIST 36, CHECKLIST 13. Four samples of one prompt given three times: twelve different answers."""
    sampled = response_ids(answers(make_model(), [PROMPTS[0]] * 3, tokenizer, n=4))
    assert len({tuple(ids) for ids in sampled}) == 12


def test_the_same_seed_gives_the_same_answers(tokenizer):
    """CHECKLIST 38. For any use of torch's own generator in between, and another seed gives others."""
    model = make_model()
    first = answers(model, PROMPTS, tokenizer, seed=5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert answers(model, PROMPTS, tokenizer, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    others = response_ids(answers(model, PROMPTS, tokenizer, seed=6))
    assert all(a != b for a, b in zip(others, response_ids(first), strict=True))


def test_an_answer_does_not_depend_on_the_batch_around_it(tokenizer):
    """CHECKLIST 38. Alone, in another order, in slices of any size, among more samples."""
    model = stopping_model(2.0)
    together = response_ids(answers(model, PROMPTS, tokenizer))
    for i, prompt in enumerate(PROMPTS):
        assert response_ids(answers(model, [prompt], tokenizer)) == together[3 * i : 3 * i + 3]
        assert response_ids(answers(model, [prompt], tokenizer, n=5))[:3] == together[3 * i : 3 * i + 3]
    backwards = response_ids(answers(model, PROMPTS[::-1], tokenizer))
    assert [backwards[i : i + 3] for i in (9, 6, 3, 0)] == [together[i : i + 3] for i in (0, 3, 6, 9)]
    for max_rows in (1, 3, 7, 9):
        sliced = answers(model, PROMPTS, tokenizer, max_rows=max_rows)
        assert response_ids(sliced) == together
        assert [c.prompt_index for c in sliced] == [i // 3 for i in range(12)]
    shorter = response_ids(answers(model, PROMPTS, tokenizer, max_new_tokens=4))
    assert shorter == [ids[:4] for ids in together]


def assert_fits(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square, cells of fewer than 5 expected counts merged, within 5 deviations of its mean."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 10
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocabulary", [16, 17, 100, 103, 259])
def test_inverse_cdf_draws_by_the_weights(vocabulary):
    """CHECKLIST 36. Chi-square, with vocabularies that are no square number. A weight of 0 is never drawn."""
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.randn(vocabulary, generator=generator).exp()
    weights[torch.randperm(vocabulary, generator=generator)[: vocabulary // 5]] = 0.0
    u = torch.rand(100_000, generator=generator, dtype=torch.float64)
    counts = torch.bincount(inverse_cdf(weights.expand(len(u), -1), u), minlength=vocabulary)
    assert counts[weights == 0].sum() == 0
    assert_fits(counts, weights / weights.sum())


def test_inverse_cdf_never_draws_what_has_no_weight_at_the_edges():
    """CHECKLIST 36. u = 0, the largest u below 1, and each boundary of the cumulative sum."""
    rows = [
        [0, 0, 1, 0],
        [0, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0] * 8 + [1],
        [0, 1e-30, 0, 1, 0],
        [0] * 9 + [3, 0],
    ]
    for row in rows:
        weights = torch.tensor([row], dtype=torch.float32)
        cumulative = (weights.double().cumsum(1) / weights.double().sum())[0].tolist()
        numbers = [0.0, 0.3, 0.999, math.nextafter(1.0, 0.0), *(c for c in cumulative if c < 1)]
        for u in numbers:
            drawn = int(inverse_cdf(weights, torch.tensor([u], dtype=torch.float64)))
            assert row[drawn] > 0, (row, u)
            first_above = next(i for i, c in enumerate(cumulative) if c > u)
            assert drawn == first_above or u > 0.999


def test_inverse_cdf_is_monotonic_in_u_and_hits_each_id():
    """CHECKLIST 36. Equal weights: id i exactly for u in [i / V, (i + 1) / V)."""
    for vocabulary in (1, 2, 3, 10, 16, 37):
        u = (torch.arange(vocabulary, dtype=torch.float64) + 0.5) / vocabulary
        assert inverse_cdf(torch.ones(vocabulary, vocabulary), u).tolist() == list(range(vocabulary))


def test_generate_samples_the_softmax(tokenizer):
    """CHECKLIST 36. Chi-square of the first and second token of 12,000 answers, through the whole of `generate`."""
    model, prompt = make_model(), PROMPTS[0]
    sampled = response_ids(answers(model, [prompt], tokenizer, n=12_000, max_new_tokens=2, temperature=0.8))
    first = torch.tensor([ids[0] for ids in sampled])
    assert_fits(torch.bincount(first, minlength=259), reference_logprobs(model, prompt, 0.8)[-1].exp())
    likeliest = Counter(first.tolist()).most_common(1)[0][0]
    second = torch.tensor([ids[1] for ids in sampled if ids[0] == likeliest and len(ids) > 1])
    expected = reference_logprobs(model, [*prompt, likeliest], 0.8)[-1].exp()
    assert_fits(torch.bincount(second, minlength=259), expected)


# --- filters


def kept_by_definition(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """min-p, then top-k, then top-p on the rest, by sorting."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    order = [i for i in order if probabilities[i] >= min_p * probabilities[order[0]]]
    order = order[:top_k] if top_k else order
    total, kept, mass = sum(probabilities[i] for i in order), set(), 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.add(i)
        mass += probabilities[i]
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 4, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_filters_keep_what_their_definitions_keep(top_k, top_p, min_p):
    """CHECKLIST 4. And leave the weights of kept tokens as they are."""
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)) * 2
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = filter_weights(weights, params) if params.filtered else weights
    for row, out in zip(weights, filtered, strict=True):
        kept = kept_by_definition(row.double().tolist(), top_k, top_p, min_p)
        assert set(out.nonzero()[:, 0].tolist()) == kept
        assert all(out[i] == row[i] for i in kept)


def test_a_filtered_id_is_never_drawn(tokenizer):
    """CHECKLIST 36. And each kept token is drawn by its share of the kept weight."""
    logits = torch.randn(259, generator=torch.Generator().manual_seed(2)) * 2
    params = SamplingParams(top_k=60, top_p=0.8, temperature=1.3)
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids, logprobs = sample(logits.expand(len(u), -1), u, params, vocab_size=250)
    probabilities = (logits[:250].double() / 1.3).softmax(dim=0)
    kept = kept_by_definition(probabilities.tolist(), 60, 0.8, 0.0)
    counts = torch.bincount(ids, minlength=250)
    assert {i for i, count in enumerate(counts.tolist()) if count} <= kept
    share = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probabilities.tolist())])
    assert_fits(counts, share / share.sum())
    torch.testing.assert_close(logprobs.double(), probabilities.log()[ids], atol=1e-5, rtol=0)


def test_a_logit_of_minus_infinity_is_never_drawn():
    """CHECKLIST 36."""
    logits = torch.zeros(1000, 20)
    logits[:, ::2] = -torch.inf
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    ids, logprobs = sample(logits, u, SamplingParams(), vocab_size=None)
    assert (ids % 2 == 1).all()
    torch.testing.assert_close(logprobs, torch.full((1000,), -math.log(10)))


# --- the model that is used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_changed_between_two_calls_are_seen(dtype, tokenizer):
    """CHECKLIST 28. Changed in place, and back: no packed copy of a weight outlives a call."""
    model = make_model().to(dtype)
    first = answers(model, PROMPTS, tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for changed in before:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
                parameter.copy_(before[name] + noise if name == changed else before[name])
        now = answers(model, PROMPTS, tokenizer)
        logprobs = [[c.logprobs[0] for c in completions] for completions in (first, now)]
        assert logprobs[0] != logprobs[1], changed
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    assert answers(model, PROMPTS, tokenizer) == first


def test_generating_between_updates_leaves_training_alone(tokenizer):
    """CHECKLIST 28. Gradients after a call equal those without one, the answers then follow the update."""
    models, ids = [make_model(), make_model()], torch.arange(10)[None]
    answers(models[0], PROMPTS, tokenizer)
    for model in models:
        model(ids).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine.grad, other.grad)
    assert answers(models[0], PROMPTS, tokenizer) == answers(models[1], PROMPTS, tokenizer)


def test_packed_weights_are_forgotten_when_a_call_ends(tokenizer, monkeypatch):
    """CHECKLIST 28. Also when it ends by an error. A packed weight left behind would cut training's gradients."""
    model, seen = make_model(make_config(tie_word_embeddings=False)).bfloat16(), []

    def packed() -> list[bool]:
        linears = [m for m in model.modules() if isinstance(m, Linear) and m is not model.lm_head]  # packed_head is its
        return [module.packed is not None for module in linears] + [model.packed_head is not None]

    def interrupted(*_):
        seen.extend(packed())
        raise KeyboardInterrupt

    answers(model, PROMPTS[:1], tokenizer, max_new_tokens=2)
    assert not any(packed())
    monkeypatch.setattr(decoding, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(model, PROMPTS[:1], tokenizer, max_new_tokens=2)
    assert all(seen) == can_pack(model.head_weight)
    assert not any(packed())


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(training, tokenizer):
    model = make_model().train(training)
    answers(model, PROMPTS[:1], tokenizer, max_new_tokens=2)
    assert model.training == training


@pytest.mark.parametrize("pack_weights", [True, False])
def test_bf16_answers_are_scored_near_rounding(pack_weights, tokenizer, monkeypatch):
    """CHECKLIST 2. Packed weights or not: the sampler's log-probabilities are those of the same bf16 weights."""
    model = make_model().bfloat16()
    params = SamplingParams(n=8, max_new_tokens=10)
    if not pack_weights:
        monkeypatch.setattr("model.linear.can_pack", lambda weight: False)
    completions = generate(model, PROMPTS, params, tokenizer=tokenizer)
    differences = []
    for completion in completions:
        ids = completion.prompt_ids + completion.response_ids
        rows = reference_logprobs(model, ids)[len(completion.prompt_ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
        differences.append((torch.tensor(completion.logprobs).double() - expected).abs())
    assert torch.cat(differences).mean() < 0.02
    assert torch.cat(differences).max() < 0.2


def test_an_answer_ends_where_logits_are_not_finite_or_the_call_is_refused(tiny_model, tmp_path):
    """CHECKLIST 44: one token of the vocabulary has an embedding that overflows. A response that draws it cannot go
    on."""
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path))
    tokenizer.eos_token_ids = (256,)  # of logits that are no numbers the last id is drawn: it must not be a stop id
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(n=4, max_new_tokens=12)
    whole = generate(tiny_model, prompts, params, tokenizer=tokenizer)
    drawn = whole[2].response_ids[4]
    tiny_model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == drawn)[:, None], torch.inf)
    )
    with pytest.raises(ValueError, match=r"not finite at token \d+ of a response to prompt \d"):
        generate(tiny_model, prompts, params, tokenizer=tokenizer)
    found = generate(tiny_model, prompts, params, tokenizer=tokenizer, must_be_finite=False)
    for a, b in zip(whole, found):
        cut = a.response_ids.index(drawn) + 1 if drawn in a.response_ids[:-1] else len(a.response_ids)
        broken = cut < len(a.response_ids)
        assert b.response_ids[:cut] == a.response_ids[:cut]
        assert b.logprobs[:cut] == a.logprobs[:cut]
        assert len(b.response_ids) == len(b.logprobs) == cut + broken
        assert b.finish_reason == ("not_finite" if broken else a.finish_reason)
        assert math.isnan(b.logprobs[-1]) == broken
    assert found[2].finish_reason == "not_finite"
