"""head_logprobs.py against the plain computation, closed-form numbers and fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.head_logprobs import scale_logits, token_logprobs
from update.losses import policy_loss, weighted_sum


def token_logprobs_eager(
    hidden_MD: Tensor, head_weight_VD: Tensor, targets_M: Tensor, temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reference implementation of `token_logprobs`: plain autograd through complete logits [M, V]."""
    logp_MV = F.log_softmax(scale_logits(hidden_MD @ head_weight_VD.T, temperature, vocab_size), dim=-1)
    return logp_MV.gather(-1, targets_M[:, None]).squeeze(-1), -(logp_MV.exp() * logp_MV).sum(-1)


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def head_inputs(M=7, D=6, V=23, dtype=torch.float64, seed=0):
    hidden = randn(M, D, seed=seed, dtype=dtype).requires_grad_()
    weight = randn(V, D, seed=seed + 1, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V - 4, (M,), generator=torch.Generator().manual_seed(seed + 2))
    return hidden, weight, targets


def test_scale_logits_casts_cuts_and_divides():
    """CHECKLIST 3, 6: one function for temperature and for ids beyond the tokenizer's vocabulary."""
    logits = randn(2, 3, 10).bfloat16()
    scaled = scale_logits(logits, temperature=0.5, vocab_size=8)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, logits[:, :, :8].float() / 0.5)
    assert torch.equal(scale_logits(logits), logits.float())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_scale_logits_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        scale_logits(torch.zeros(2), temperature)


@pytest.mark.parametrize("vocab_size", [None, 19])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_logprobs_equals_its_slow_twin(chunk, vocab_size, dtype):
    """CHECKLIST 6: values and gradients, for every way to cut the vocabulary. Rows beyond it get gradient 0."""
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-12}
    results = []
    for function, options in ((token_logprobs, {"chunk": chunk}), (token_logprobs_eager, {})):
        hidden, weight, targets = head_inputs(dtype=dtype)
        logp, entropy = function(hidden, weight, targets, 0.7, vocab_size, **options)
        (logp @ randn(7, seed=5, dtype=dtype) + entropy @ randn(7, seed=6, dtype=dtype)).backward()
        results.append((logp, entropy, hidden.grad, weight.grad))
    for ours, slow in zip(*results):
        torch.testing.assert_close(ours, slow, **tolerance)
    if vocab_size is not None:
        assert not results[0][3][vocab_size:].any()


def test_token_logprobs_passes_gradcheck():
    hidden, weight, targets = head_inputs(M=4, D=3, V=9)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 1.3, 8, chunk=3), (hidden, weight))


def test_token_logprobs_by_hand():
    """CHECKLIST 1: row i of the hidden states scores target i, no shift here. Logits are ln 1, ln 2, ln 5."""
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]
    logp, entropy = token_logprobs(torch.ones(3, 1), weight, torch.tensor([2, 0, 1]))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    torch.testing.assert_close(logp, p[[2, 0, 1]].log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum().expand(3))


@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_token_logprobs_with_one_output_used(which):
    """CHECKLIST 23: the entropy alone has a gradient. An output that is not used costs nothing and adds nothing."""
    grads = []
    for function in (token_logprobs, token_logprobs_eager):
        hidden, weight, targets = head_inputs()
        logp, entropy = function(hidden, weight, targets)
        (logp if which == "logp" else entropy).sum().backward()
        grads.append(hidden.grad)
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("frozen", "other"), [(0, 1), (1, 0)])
def test_token_logprobs_with_a_frozen_side(frozen, other):
    """A frozen head (LoRA) or frozen hidden states get no gradient, the other side gets the same as ever."""
    inputs, slow = head_inputs(), head_inputs()
    inputs[frozen].requires_grad_(False)
    token_logprobs(*inputs)[0].sum().backward()
    token_logprobs_eager(*slow)[0].sum().backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[other].grad, slow[other].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e9])
def test_junk_in_a_row_of_weight_0_reaches_nothing(junk):
    """CHECKLIST 18: from the hidden state through log-probability, loss and entropy back to the head's weight."""
    lengths, weights = torch.tensor([4, 3]), torch.tensor([1, 1, 0, 1, 1, 1, 0]) / 5.0
    losses, grads = [], []
    for value in (0.5, junk):
        hidden, weight, targets = head_inputs(dtype=torch.float32)
        dirty = torch.where((weights == 0)[:, None], value, hidden)
        logp, entropy = token_logprobs(dirty, weight, targets, chunk=5)
        terms = policy_loss(logp, logp.detach() + 0.1, torch.tensor([1.0, -2.0]), lengths, keep=weights != 0)
        loss = weighted_sum(terms.loss, weights) - 0.1 * weighted_sum(entropy, weights)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([hidden.grad, weight.grad]))
    assert torch.isfinite(grads[1]).all()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(*grads)


def test_token_logprobs_of_no_tokens():
    hidden, weight, targets = head_inputs(M=0)
    logp, entropy = token_logprobs(hidden, weight, targets)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert not weight.grad.any()


def test_token_logprobs_survives_huge_logits():
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    logp, entropy = token_logprobs(hidden * 1e4, weight, targets, chunk=5)
    slow_logp, slow_entropy = token_logprobs_eager(hidden.double() * 1e4, weight.double(), targets)
    torch.testing.assert_close(logp, slow_logp.float(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(entropy, slow_entropy.float(), rtol=0, atol=1e-2)


def test_bf16_weights_round_their_gradient_once():
    """In bf16 both gradients are as near to the fp64 ones as one rounding, over 4,000 tokens and 256 slices."""
    hidden, weight, targets = (x.detach() for x in head_inputs(M=4000, D=8, V=256, dtype=torch.float64))
    inputs = [x.bfloat16().requires_grad_() for x in (hidden, weight / 4)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    token_logprobs(*inputs, targets, chunk=1)[0].sum().backward()
    token_logprobs_eager(*exact, targets)[0].sum().backward()
    for ours, true in zip(inputs, exact):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - true.grad).norm() / true.grad.norm() < 2**-8


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation gave back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("function", "options", "bounded"),
    [(token_logprobs, {"chunk": 32}, True), (token_logprobs, {}, True), (token_logprobs_eager, {}, False)],
)
def test_no_tensor_of_tokens_by_vocabulary(function, options, bounded, monkeypatch):
    """CHECKLIST 33: forward and backward, nothing is larger than a slice of logits. The reference shows that the
    probe sees them."""
    M, D, V, chunk = 64, 4, 1024, 32
    monkeypatch.setattr("model.head_logprobs.LOGITS_AT_ONCE", M * chunk)
    hidden, weight, targets = head_inputs(M, D, V, dtype=torch.bfloat16)
    with LargestTensor() as largest:
        logp, entropy = function(hidden, weight, targets, 0.9, V - 4, **options)
        torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert (largest.numel <= max(M * chunk, V * D)) == bounded


@pytest.mark.parametrize("shapes", [((4, 3), (9, 2), (4,)), ((4, 3), (9, 3), (4, 1)), ((2, 2, 3), (9, 3), (4,))])
def test_token_logprobs_refuses_wrong_shapes(shapes):
    hidden, weight, targets = torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.zeros(shapes[2], dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected \[M, D\], \[V, D\] and \[M\]"):
        token_logprobs(hidden, weight, targets)


def test_token_logprobs_refuses_a_vocabulary_beyond_the_head():
    with pytest.raises(ValueError, match="vocab_size is 24, expected 1 to 23"):
        token_logprobs(*head_inputs(), vocab_size=24)


@pytest.mark.parametrize("target", [-1, 19])
def test_token_logprobs_refuses_an_id_outside_the_vocabulary(target):
    """CHECKLIST 6: an id that can not be sampled is not scored either."""
    hidden, weight, targets = head_inputs()
    targets[3] = target
    with pytest.raises(ValueError, match="expected ids from 0 to 18"):
        token_logprobs(hidden, weight, targets, vocab_size=19)
