"""linear.py: gradients of weights and of embeddings against autograd in fp64."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import EmulatedCuda

from model.linear import Embedding, Linear, gradients_in_place, sum_of_equal_ids

V, D = 7, 5


def embedding_gradient(ids: torch.Tensor, dy: torch.Tensor, in_place: bool, device: str = "cpu") -> torch.Tensor:
    layer = Embedding(V, D).to(device, dy.dtype)
    with gradients_in_place(in_place):
        layer(ids.to(device)).backward(dy.to(device))
    return layer.weight.grad.cpu()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_a_common_token_is_summed_in_fp32(dtype, in_place):
    """Token 3 stands in the batch 4,000 times. Summed in bf16 one by one, its gradient stops to grow at 256 times a
    summand. The error left is the one of rounding once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((4000,), 3), torch.tensor([0, 1, 0, 5])])[torch.randperm(4004, generator=generator)]
    dy = (torch.randn(4004, D, generator=generator) * 0.1 + 1).to(dtype)
    exact = torch.zeros(V, D, dtype=torch.float64).index_add_(0, ids, dy.double())
    mine = embedding_gradient(ids, dy, in_place)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=0)
    assert (mine[[2, 4, 6]] == 0).all(), "a token that is not in the batch"


@pytest.mark.parametrize("n", [0, 1, 4, 30])
def test_equal_ids_are_summed_and_the_rest_is_zero(n):
    generator = torch.Generator().manual_seed(n)
    ids, values = torch.randint(V, (n,), generator=generator), torch.randn(n, D, generator=generator)
    rows, sums = sum_of_equal_ids(ids, values, V)
    distinct = sorted(set(ids.tolist()))
    assert rows[: len(distinct)].tolist() == distinct
    assert ((rows >= 0) & (rows < V)).all()
    assert (sums[len(distinct) :] == 0).all()
    total = torch.zeros(V, D).index_add_(0, rows, sums)
    torch.testing.assert_close(total, torch.zeros(V, D).index_add_(0, ids, values))


def test_a_gradient_is_added_to_the_one_that_is_there():
    """CHECKLIST 17. Micro-batches of one step. With a tied head its gradient is there before."""
    layer, ids = Embedding(V, D), torch.tensor([1, 1, 6])
    with gradients_in_place():
        for _ in range(3):
            layer(ids).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [0, 6, 0, 0, 0, 0, 3]


def test_the_embeddings_gradient_does_not_wait_for_the_device():
    ids = torch.tensor([1, 1, 6, 0])
    dy = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    with EmulatedCuda() as gpu:
        layer, on_gpu, dy_on_gpu = Embedding(V, D).to("cuda"), ids.to("cuda"), dy.to("cuda")
        gpu.syncs.clear()
        with gradients_in_place():
            layer(on_gpu).backward(dy_on_gpu)
        assert not gpu.syncs
        assert torch.equal(layer.weight.grad.cpu(), embedding_gradient(ids, dy, True))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_linear_layers_gradients_are_autograds(in_place):
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(0)
    layer = Linear(D, 3)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    F.linear(*exact).square().sum().backward()
    with gradients_in_place() if in_place else contextlib.nullcontext():
        layer(x).square().sum().backward()
    for mine, reference in zip((x, layer.weight, layer.bias), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)
