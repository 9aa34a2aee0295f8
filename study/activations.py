"""Look at every activation of a forward pass by name, and change one on the way: on the very model that trains.

    trace = record(model, ids)                                    # a dictionary: name -> tensor
    trace["model.layers.2.self_attn.weights"]                     # [H, N, N] attention of all heads
    with edit(model, "model.layers.2.self_attn.z", lambda z: z.index_fill(1, torch.tensor([3]), 0.0)):
        without_head_3 = record(model, ids)["logits"]             # ablation
    with edit(model, "model.layers.1", lambda x: other["model.layers.1"]):
        patched = model(ids[None])                                # patching, through the fast attention

Names follow the module tree: a module's name is that of its output, so `model.layers.2` is the residual stream behind
block 2. Values between two modules have names, too:

    model.layers.L.self_attn.q, .k, .v    [N, H, K], [N, G, K], [N, G, K]: heads, q and k already rotated
    model.layers.L.self_attn.weights      [H, N, N] softmax of the scores; only the eager reference has them
    model.layers.L.self_attn.z            [N, H, K] output of each head, before o_proj
    model.layers.L.mlp.act                [N, F] silu(gate) * up, before down_proj
    logits                                [N, V]

An edit works for every computation inside the `with`: a plain call, training, sampling with a cache (there a row
is a token of an answer). Edits of one name apply in the order in which they were made, and a record sees all of them.

Shape letters: N flat tokens, H query heads, G key-value heads, K head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from model.attention import Attend, EagerAttention
from model.layout import Layout
from qwen2_llm import MLP, Attention, Qwen2ForCausalLM
from tasks.messages import closest

Edit = Callable[[Tensor], Tensor]
HEADS = ("q", "k", "v")  # where in attend(layer, q, k, v) they stand


class Trace(dict[str, Tensor]):
    """Name -> activation of one forward pass. `ids` [N] are the tokens; a wrong name is answered with the nearest."""

    def __init__(self, ids: Tensor):
        super().__init__()
        self.ids = ids

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(_unknown(name, list(self)))


@torch.no_grad()
def record(model: Qwen2ForCausalLM, ids: Sequence[int] | Tensor) -> Trace:
    """Run the tokens `ids` [N] through the eager reference and keep every named activation.

    Quadratic in N, and everything is kept: for texts, not for batches. Raises ValueError for an empty text.
    """
    ids = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected one text [N] of at least one token")
    trace, layout = Trace(ids), Layout.causal([len(ids)])

    def keep(name: str, x: Tensor) -> Tensor:
        trace[name] = x.detach().clone()
        return x

    was_training = model.training
    model.eval()
    try:
        with ExitStack() as taps:
            for name in names(model):
                taps.enter_context(edit(model, name, partial(keep, name)))
            attend = EagerAttention(layout.mask(model.device))
            model.logits(model.hidden_states(ids, layout.positions(model.device), attend))
    finally:
        model.train(was_training)
    return trace


def names(model: Qwen2ForCausalLM) -> list[str]:
    """Every name that `record` gives and `edit` takes, in the order of the module tree."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            found += [f"{name}.{what}" for what in (*HEADS, "weights", "z")]
        if isinstance(module, MLP):
            found.append(f"{name}.act")
        if name not in ("", "model", "model.layers", "model.rope", "lm_head"):  # lm_head's output is called logits
            found.append(name)
    return [*found, "logits"]


@contextmanager
def edit(model: Qwen2ForCausalLM, name: str, fn: Edit) -> Iterator[None]:
    """Within the context, the activation `name` is the result of `fn` on it: a tensor of the same shape.

    Raises ValueError for an unknown name, with the nearest one, and where `fn` returns anything else.
    """
    if name not in names(model):
        raise ValueError(_unknown(name, names(model)))
    handle = _tap(model, name, partial(_checked, name, fn))
    try:
        yield
    finally:
        handle()


def _checked(name: str, fn: Edit, x: Tensor) -> Tensor:
    y = fn(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the edit of {name} returned {found}, expected a tensor of shape {tuple(x.shape)}")
    return y.to(x.dtype)


def _tap(model: Qwen2ForCausalLM, name: str, fn: Edit) -> Callable[[], None]:
    """Let the activation pass through `fn` from now on. The result is a function that undoes it."""
    if name == "logits":
        return _tap_logits(model, fn)
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, Attention) and leaf in (*HEADS, "weights", "z"):
        # Hooks wrap `attend` one around the other. An input must pass the latest edit last, so the latest is innermost.
        hook = partial(_wrap_attend, leaf, fn)
        return parent.register_forward_pre_hook(hook, prepend=leaf != "z").remove
    if isinstance(parent, MLP) and leaf == "act":
        return parent.down_proj.register_forward_pre_hook(lambda module, args: (fn(args[0]),)).remove
    return model.get_submodule(name).register_forward_hook(lambda module, args, out: fn(out)).remove


def _tap_logits(model: Qwen2ForCausalLM, fn: Edit) -> Callable[[], None]:
    before = vars(model).get("logits")  # an earlier edit's
    inner = model.logits
    model.logits = lambda hidden: fn(inner(hidden))

    def undo() -> None:
        if before is None:
            del model.logits
        else:
            model.logits = before

    return undo


def _wrap_attend(leaf: str, fn: Edit, module: nn.Module, args: tuple) -> tuple:
    x, cos, sin, attend = args
    return x, cos, sin, _TappedAttention(attend, leaf, fn)


class _TappedAttention:
    """An attention strategy whose queries, keys, values, weights or result pass through a function."""

    def __init__(self, attend: Attend, leaf: str, fn: Edit):
        self.attend, self.leaf, self.fn = attend, leaf, fn

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.leaf == "z":
            z = self.attend(layer, q, k, v)  # some strategies return [N, H, K], some [N, H * K]
            return self.fn(z.view(q.shape)).view(z.shape)
        if self.leaf == "weights":
            return self._with_weights(layer, q, k, v)
        heads = dict(zip(HEADS, (q, k, v)))
        heads[self.leaf] = self.fn(heads[self.leaf])
        return self.attend(layer, *heads.values())

    def _with_weights(self, layer: int, *qkv: Tensor) -> Tensor:
        base = self.attend
        while isinstance(base, _TappedAttention):
            base = base.attend
        if not isinstance(base, EagerAttention):
            raise ValueError(
                f"attention weights can be edited only where they exist: in the eager reference, that is in record(); "
                f"{type(base).__name__} never makes them. Edit z, the result of each head, instead"
            )
        base.on_weights.append(self.fn)
        try:
            return self.attend(layer, *qkv)
        finally:
            base.on_weights.pop()


def _unknown(name: str, known: list[str]) -> str:
    near = closest(name, known)
    return f"no activation is called {name!r}; the nearest is {near!r} (activations.names(model) lists all)"
