"""decode_graph.py and decoding.py: a recorded step equals the plain one, stays static, never waits. Rows are reused.

There need be no GPU: `recorded` stands in for CUDA's capture. It traces the step into the operations that it performs
on the very tensors that it touches, with every number of Python's frozen, and replays those and nothing else.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from emulated_cuda import EmulatedCuda
from plain_decode import decode_plainly
from test_generation import PROMPTS, stopping_model
from torch.fx.experimental.proxy_tensor import make_fx

from model import memory
from model.lora import add_lora, lora_layers
from model.memory import rows_that_fit
from rollout import decode_graph, decoding, generation
from rollout.decode_graph import Recorder, shelf
from rollout.decoding import Decoder, _pieces, _reach, stop_string_end
from rollout.generation import generate
from rollout.sampling import SamplingParams


def state(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Every tensor that outlives a step."""
    return {
        f"{owner.__class__.__name__}.{name}": value
        for owner in (decoder, decoder.cache)
        for name, value in vars(owner).items()
        if isinstance(value, torch.Tensor) and name not in ("mask", "prompt_mask")
    }


def recorded(step):
    """Record a bound `Decoder.step` as a CUDA graph would be: nothing has happened when this returns."""
    tensors = state(step.__self__)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    graph = make_fx(lambda: step())()
    for name, tensor in tensors.items():
        tensor.copy_(before[name])
    return graph


def decoder_for(model, tokenizer, capture=recorded, rows: int = 512, prompts=PROMPTS, seed: int = 0, **params):
    params = SamplingParams(**({"n": 3, "max_new_tokens": 40} | params))
    uniforms = generation.uniform_numbers(prompts, params, seed)
    return Decoder(model, prompts, uniforms, params, tokenizer, rows, capture)


def assert_same(answers: decoding.Responses, expected: decoding.Responses) -> None:
    assert torch.equal(answers.lengths, expected.lengths)
    assert torch.equal(answers.stopped, expected.stopped)
    for row, length in enumerate(expected.lengths.tolist()):
        assert torch.equal(answers.sampled[row, :length], expected.sampled[row, :length])
        torch.testing.assert_close(
            answers.logprobs[row, :length], expected.logprobs[row, :length], atol=1e-4, rtol=0
        )  # fmt: skip


@pytest.mark.parametrize("rows", [512, 6, 1])
@pytest.mark.parametrize(
    "params", [{"n": 9}, {"n": 1}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.9}, {"stop": ("e",)}]
)
def test_recorded_steps_give_the_answers_of_the_slow_twin(rows, params, tokenizer, monkeypatch):
    """CHECKLIST 27, CHECKLIST 38. Ragged prompts, idle rows, sizes that shrink, a reach that grows, rows handed on."""
    monkeypatch.setattr(decoding, "SHORTEST_REACH", 16)
    model, captures = stopping_model(1.0), []

    def capture(step):
        captures.append((step.__self__.cache.n_groups, step.__self__.cache.reach))
        return recorded(step)

    decoder = decoder_for(model, tokenizer, capture, rows, **params)
    expected = decode_plainly(model, PROMPTS, decoder.uniforms[:-1], decoder.params, tokenizer, 512)
    assert len(set(expected.lengths.tolist())) > 1 or params == {"temperature": 0.0}
    assert_same(decoder.run(), expected)
    assert len(captures) == len(set(captures)), "a shape was recorded twice"
    assert captures
    assert set(captures) < decoder.recorder.warm | {None}


def test_replays_change_nothing_but_numbers(tokenizer):
    """No tensor of the state moves or changes its shape from the first step to the last."""
    model = stopping_model(0.5)
    decoder = decoder_for(model, tokenizer)
    before = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in state(decoder).items()}
    decoder.run()
    assert len(decoder.recorder.replays) > 0
    assert (decoder.cache.lengths[: decoder.cache.n_rows] == 0).all(), "an idle row grows beyond its room"
    after = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in state(decoder).items()}
    assert before == after
    assert len(before) > 12


def test_a_step_reads_no_number_back(tokenizer):
    """On the meta device there are no numbers: every call that would wait (item, tolist, nonzero, a branch) raises."""
    model = make_model()
    decoder = decoder_for(model, tokenizer, top_k=5, top_p=0.9, min_p=0.1)
    with torch.inference_mode():
        decoder.refill(decoder.running_rows())
        for owner in (decoder, decoder.cache):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    setattr(owner, name, value.to("meta"))
        decoder.model.to("meta")
        decoder.model.model.rope.frequencies[torch.device("meta")] = torch.empty(8, device="meta")
        decoder.step()
        with pytest.raises((RuntimeError, NotImplementedError)):
            decoder.running_rows()


def test_torch_compile_takes_a_step_whole(tokenizer):
    """No graph break: a compiler may be laid around the step."""
    model = stopping_model(1.0)
    compiled = decoder_for(model, tokenizer, lambda step: torch.compile(step, fullgraph=True, backend="eager"), n=2)
    assert_same(compiled.run(), decoder_for(model, tokenizer, None, n=2).run())


def test_a_shape_is_run_then_recorded_then_replayed():
    log = []
    recorder = Recorder(lambda: log.append("run"), lambda step: log.append("record") or (lambda: log.append("replay")))
    for shape in ("a", "a", "b", "a", "b", "a"):
        recorder(shape)
    assert log == ["run", "record", "replay", "run", "replay", "record", "replay", "replay"]


def test_waiting_prompts_take_the_rows_of_answers_that_have_ended(tokenizer, monkeypatch):
    """CHECKLIST 38. Twelve rows for 36 answers: never more, seldom fewer, in fewer steps than piece after piece."""
    prompts, model, seen, steps = PROMPTS * 3, stopping_model(1.5), [], []
    real = Decoder.step

    def watched(self):
        seen.append(self.cache.n_rows)
        real(self)

    monkeypatch.setattr(Decoder, "step", watched)
    for rows in (12, 512):
        decoder = decoder_for(model, tokenizer, None, rows, prompts)
        answers = decoder.run()
        expected = decode_plainly(model, prompts, decoder.uniforms[:-1], decoder.params, tokenizer, 12)
        assert_same(answers, expected)
        steps.append(decoder.steps)
        if rows == 12:
            assert max(seen) == 12
            assert decoder.cache.k.shape[1] == 12, "memory for more rows than were allowed"
    pieces = [expected.lengths[i : i + 12].max().item() - 1 for i in (0, 12, 24)]
    assert steps[0] < sum(pieces)


def test_prompts_are_prefilled_in_bounded_pieces(tokenizer, monkeypatch):
    """The answers do not depend on it."""
    model, sizes, real = stopping_model(1.0), [], decoding.prefill_prompts
    whole = decoder_for(model, tokenizer, None).run()
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 5)
    monkeypatch.setattr(
        decoding, "prefill_prompts", lambda m, ids: sizes.append(sum(map(len, ids))) or real(m, ids)
    )  # fmt: skip
    assert_same(decoder_for(model, tokenizer, None).run(), whole)
    assert sizes == [4, 9, 2]
    assert _pieces([7, 8, 9], [3, 2, 1], 5) == [[7, 8], [9]]


def test_a_rollout_takes_no_more_memory_than_the_machine_has_to_spare(monkeypatch, tokenizer):
    """Rows are as many as a part of memory holds, for any max_rows. At least one."""
    model, given = make_model(), []
    token = 2 * 2 * 2 * 16 * 4  # bytes: keys and values, layers, heads, head size, fp32
    machine = SimpleNamespace(total=4 * 30 * 21 * token)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    assert rows_that_fit(model.config, 21, model.dtype, model.device) == 30
    assert rows_that_fit(model.config, 10**9, model.dtype, model.device) == 1
    real = generation.decode
    monkeypatch.setattr(generation, "decode", lambda *a: given.append(a[5]) or real(*a))
    generate(model, PROMPTS, SamplingParams(n=3, max_new_tokens=12), tokenizer=tokenizer)
    assert given == [30]  # the longest prompt has 9 tokens


@pytest.mark.parametrize("tokens", [1, 128, 129, 500, 1000])
def test_a_recorded_step_reads_enough_and_not_much_more(tokens):
    reach = _reach(tokens, 1000)
    assert tokens <= reach <= max(128, 2 * tokens)
    assert len({_reach(t, 1000) for t in range(1, 1001)}) == 4


def test_graphs_need_cuda(tokenizer):
    with pytest.raises(ValueError, match="only CUDA"):
        generate(make_model(), PROMPTS, SamplingParams(), tokenizer=tokenizer, graphs=True)


# --- from one rollout to the next


OTHER_PROMPTS = [prompt[::-1] for prompt in PROMPTS]  # as many, and as long


@pytest.fixture
def gpu():
    """An emulated GPU without decoders of earlier tests."""
    shelf.kept.clear()
    shelf.crowded.clear()
    with EmulatedCuda() as device:
        yield device
    shelf.kept.clear()


def sampled(model, tokenizer, prompts=PROMPTS, seed: int = 0, n: int = 3, **options) -> list[list[int]]:
    params = SamplingParams(n=n, max_new_tokens=24)
    return [c.response_ids for c in generate(model, prompts, params, tokenizer=tokenizer, seed=seed, **options)]


@pytest.mark.parametrize("change", ["nothing", "prompts", "seed", "weights"])
def test_a_second_rollout_replays_the_recordings_of_the_first(change, tokenizer, gpu):
    """CHECKLIST 28. Nothing is recorded again, and the responses are those of a CPU with the same weights."""
    model, on_cpu = stopping_model(1.0), stopping_model(1.0)
    model.to("cuda")
    first = sampled(model, tokenizer)
    recordings = len(gpu.captured)
    assert recordings > 0
    options = {"prompts": OTHER_PROMPTS} if change == "prompts" else {"seed": 5} if change == "seed" else {}
    if change == "weights":
        with torch.no_grad():
            for one in (model, on_cpu):
                one.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    second = sampled(model, tokenizer, **options)
    assert second == sampled(on_cpu, tokenizer, **options)
    assert (second == first) == (change == "nothing")
    recorder = next(iter(shelf.kept[model].values())).recorder
    assert len(gpu.captured) == len(recorder.replays), "a shape was recorded twice"
    if change == "nothing":
        assert len(gpu.captured) == recordings


@pytest.mark.parametrize("change", ["n", "more prompts", "longer prompts", "moved weights", "adapters", "temperature"])
def test_another_rollout_does_not_replay_recordings_that_do_not_fit(change, tokenizer, gpu):
    model, on_cpu = stopping_model(1.0), stopping_model(1.0)
    model.to("cuda")
    sampled(model, tokenizer)
    prompts, n, temperature = PROMPTS, 3, 1.0
    if change == "n":
        n = 5
    elif change == "more prompts":
        prompts = [*PROMPTS, PROMPTS[0]]
    elif change == "longer prompts":
        prompts = [PROMPTS[0] * 20, *PROMPTS[1:]]
    elif change == "temperature":
        temperature = 0.5
    elif change == "moved weights":
        model.to("cpu").to("cuda")
    elif change == "adapters":
        for one in (model, on_cpu):
            add_lora(one, 2)
            for layer in lora_layers(one).values():
                layer.lora_B.data.fill_(0.3)
    params = SamplingParams(n=n, max_new_tokens=24, temperature=temperature)
    found, expected = (
        [c.response_ids for c in generate(one, prompts, params, tokenizer=tokenizer)] for one in (model, on_cpu)
    )
    assert found == expected


def test_keys_of_a_broken_rollout_are_not_read_by_the_next(tokenizer, gpu):
    """CHECKLIST 44. A NaN in the cache would pass through the mask."""
    model, on_cpu = stopping_model(1.0).to("cuda"), stopping_model(1.0)
    with torch.no_grad():
        good = model.model.layers[0].self_attn.k_proj.weight.clone()
        model.model.layers[0].self_attn.k_proj.weight.fill_(torch.nan)
        sampled(model, tokenizer, must_be_finite=False)
        model.model.layers[0].self_attn.k_proj.weight.copy_(good)
    assert sampled(model, tokenizer) == sampled(on_cpu, tokenizer)


def test_a_kept_decoder_does_not_keep_the_model(tokenizer, gpu):
    model = stopping_model(1.0).to("cuda")
    sampled(model, tokenizer)
    reference = weakref.ref(model)
    assert len(shelf.kept) == 1
    del model
    gc.collect()
    assert reference() is None
    assert len(shelf.kept) == 0


def test_large_decoders_are_not_kept(tokenizer, monkeypatch, gpu):
    """The update needs the memory: kept decoders take at most a share of the device's, the newest first."""
    model = stopping_model(1.0).to("cuda")
    sampled(model, tokenizer)
    size = shelf.nbytes(model)
    assert size > 0
    monkeypatch.setattr(decode_graph, "KEEP_SHARE", 1.5 * size / gpu.memory)
    sampled(model, tokenizer, n=4)
    (one,) = shelf.kept[model].values()
    assert one.params.n == 4
    assert shelf.nbytes(model) <= 1.5 * size
    held = gpu.allocated
    monkeypatch.setattr(decode_graph, "KEEP_SHARE", 0.1 * size / gpu.memory)
    sampled(model, tokenizer, n=5)
    assert not shelf.kept[model]
    assert gpu.allocated < held


def test_kept_decoders_go_first_if_memory_runs_out(tokenizer, gpu):
    """The update runs again with all its tokens, and from then on no decoder is kept."""
    model = stopping_model(1.0).to("cuda")
    sampled(model, tokenizer)
    before, sizes = gpu.allocated, []

    def work(size: int) -> None:
        sizes.append(size)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory.halve_when_out_of_memory(work, 64)
    assert sizes == [64, 64]
    assert gpu.allocated < before
    sampled(model, tokenizer)
    assert not shelf.kept.get(model)


# --- what must not end in an index error


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value, temperature, tokenizer):
    """CHECKLIST 44. One clear line, on a GPU no fault of the device."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    params = SamplingParams(n=2, max_new_tokens=20, temperature=temperature)
    with pytest.raises(ValueError, match=r"logits are not finite at token 0 of a response to prompt 0") as error:
        generate(model, PROMPTS, params, tokenizer=tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("capture", [None, recorded])
def test_a_special_token_may_be_a_stop_string(capture, tokenizer):
    """257 is <|im_start|>, no stop id. The string ends with it, looked for at every token or every 16."""
    model = stopping_model(2.0, (257,))
    decoder = decoder_for(model, tokenizer, capture, n=12, stop=("<|im_start|>",))
    answers = decoder.run()
    assert answers.stopped.any()
    for ids, length, stopped in zip(answers.sampled.tolist(), answers.lengths.tolist(), answers.stopped.tolist()):
        body = ids[: length - 1]
        assert 257 not in body
        assert stopped == (ids[length - 1] in (256, 257, 258))


def test_a_stop_string_ends_at_the_token_that_completes_it(tokenizer):
    ids = tokenizer.encode("xxabxxab")
    assert stop_string_end(ids, 8, ("ab",), tokenizer) == 4
    assert stop_string_end(ids[4:], 2, ("ab",), tokenizer) == 4
    assert stop_string_end(ids[:5], 1, ("bx",), tokenizer) == 5
    assert stop_string_end(ids, 8, ("abc",), tokenizer) is None


def test_recorded_steps_keep_the_same_ids(tokenizer):
    """A step that is recorded once and replayed, as a CUDA graph is, fills the table of the kept ids, too."""
    settings = {"top_k": 5, "top_p": 0.9, "keep_mask": True}
    model = make_model()
    replayed = decoder_for(model, tokenizer, **settings).run()
    plain = decoder_for(model, tokenizer, capture=None, **settings).run()
    assert_same(replayed, plain)
    for row, length in enumerate(plain.lengths.tolist()):
        assert torch.equal(replayed.kept[row, :length], plain.kept[row, :length])
    assert (plain.kept >= 0).any()
