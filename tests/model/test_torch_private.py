"""model/torch_private.py: each private operator of torch against public ones, and none of them anywhere else."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import EmulatedCuda

from model import torch_private
from optimizer import adamw_

ROOT = Path(__file__).resolve().parent.parent.parent
# An attribute with an underscore of torch or of one of its parts: torch._C, torch.ops.aten._x, torch.ops.mkldnn._x.
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]|\baten\._|\bmkldnn\._", re.IGNORECASE)


def code_of(file: Path) -> str:
    """The code without comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def imported_names(file: Path) -> list[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "torch"]
    return [f"{n.module}.{alias.name}" for n in imports for alias in n.names]


def test_private_operators_stand_in_one_file_only():
    folders = ("model", "update", "rollout", "parallel", "run", "tasks", "study")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).glob("*.py"))]
    assert len(files) > 30
    found = [
        (file.name, text)
        for file in files
        if file.name != "torch_private.py"
        for text in [*(m[0] for m in PRIVATE.finditer(code_of(file))), *(n for n in imported_names(file) if "._" in n)]
    ]
    assert found == []
    assert PRIVATE.search(code_of(ROOT / "model" / "torch_private.py")), "the search finds nothing at all"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(q, k, v, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, written out."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "added"])
def test_flash_cpu_is_attention_with_its_log_sum_exp_and_gradients(mask, dtype):
    q, k, v, do = (random(2, 3, n, 8, seed=i, dtype=dtype) for i, n in enumerate((5, 5, 5, 5)))
    added = None
    if mask == "added":
        added = torch.zeros(2, 1, 5, 5, dtype=dtype).masked_fill(torch.arange(5) > 2, -torch.inf)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    seen = torch.full((5, 5), -torch.inf, dtype=torch.double).triu(1) if mask == "causal" else None
    expected, expected_lse = attention(*exact, added.double() if added is not None else seen)
    out, lse = torch_private.flash_cpu(q, k, v, mask == "causal", added)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    if mask == "added":  # used without a gradient only
        return
    expected.backward(do.double())
    for mine, leaf in zip(
        torch_private.flash_cpu_backward(do, q, k, v, out, lse, mask == "causal"), exact, strict=True
    ):
        torch.testing.assert_close(mine.double(), leaf.grad, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("masked", [True, False])
def test_efficient_attention_is_attention_with_its_log_sum_exp(masked):
    """On the emulated device, which has the kernel's conditions. tests/test_gpu.py compares a real one."""
    q, k, v = random(2, 3, 4, 8), random(2, 3, 16, 8, seed=1), random(2, 3, 16, 8, seed=2)
    mask = torch.zeros(2, 1, 1, 16).masked_fill(torch.arange(16) > 9, -torch.inf) if masked else None
    expected = attention(q, k, v, mask)
    with EmulatedCuda():
        on_gpu = [x.to("cuda") for x in (q, k, v)]
        found = torch_private.efficient_attention(*on_gpu, mask.to("cuda").expand(-1, 3, 4, -1) if masked else None)
        for mine, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), reference)


def test_efficient_varlen_is_causal_attention_of_each_sequence():
    q, k, v = (random(5, 2, 8, seed=i) for i in range(3))
    expected = []
    for rows in (slice(0, 2), slice(2, 5)):
        qs, ks, vs = (x[rows].transpose(0, 1) for x in (q, k, v))
        expected.append(F.scaled_dot_product_attention(qs, ks, vs, is_causal=True).transpose(0, 1))
    with EmulatedCuda():
        cu = torch.tensor([0, 2, 5], dtype=torch.int32, device="cuda")
        out = torch_private.efficient_varlen(*(x.to("cuda") for x in (q, k, v)), cu, cu, 3, 3)
        torch.testing.assert_close(out.cpu(), torch.cat(expected))


@pytest.mark.parametrize("amsgrad", [True, False])
def test_fused_adamw_is_adamw(amsgrad):
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    mine, reference = ([random(33, seed=i).abs() for i in range(4 + amsgrad)] for _ in range(2))
    for step in (1.0, 2.0, 3.0):
        largest = [*mine[4:], None][0], [*reference[4:], None][0]
        torch_private.fused_adamw_(*mine[:4], largest[0], torch.tensor(step), **settings)
        adamw_(*reference[:4], largest[1], step, **settings)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(mine[0], random(33).abs())


@pytest.mark.skipif(not torch_private.has_bf16_products(), reason="no bf16 products on this CPU")
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_multiplies_like_the_weight(bias):
    x, weight = random(6, 32, dtype=torch.bfloat16), random(48, 32, seed=1, dtype=torch.bfloat16)
    b = random(48, seed=2, dtype=torch.bfloat16) if bias else None
    packed = torch_private.pack_weight(weight, 6)
    expected = F.linear(x.float(), weight.float(), None if b is None else b.float())
    torch.testing.assert_close(torch_private.linear_packed(x, packed, b).float(), expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "cap", "expected"),
    [
        (True, True, False, "", True), (True, False, True, "", True), (False, True, True, "", False),
        (True, False, False, "", False),  # AVX-512 alone: oneDNN says yes, and converts to fp32
        (True, True, True, "AVX512_CORE_VNNI", False), (True, True, True, "avx2_vnni_2", False),
        (True, True, True, "AVX512_CORE_BF16", True), (True, True, True, "AVX512_CORE_AMX", True),
    ],
)  # fmt: skip
def test_bf16_products_need_instructions(onednn, avx512_bf16, amx, cap, expected, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch_private.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert torch_private.has_bf16_products() is expected
    monkeypatch.setattr(torch_private.platform, "machine", lambda: "arm64")
    assert torch_private.has_bf16_products() is onednn


def test_bf16_products_are_asked_for_only_where_there_is_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch_private.has_bf16_products() is False
