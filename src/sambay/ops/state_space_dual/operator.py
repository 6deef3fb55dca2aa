"""Turning the chunked forward and its hand-written backward into a torch operator.

As an operator the scan is one node for `torch.compile`, activation checkpointing and autograd, with
shapes known without running it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sambay.ops.second_derivative import refuse_second_derivative

INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, "
    "Tensor? initial_state, Tensor? resets"
)
_library = torch.library.Library("sambay", "FRAGMENT")


def define(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    chunk: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A differentiable function of the nine inputs of the scan, giving (y, final state).

    `forward(*inputs, save)` gives (y, final state, saved): the states (chunks + 1, B, H, P, N)
    before, between and after the chunks of tokens if `save`, else nothing.
    `backward(dy, dfinal, *inputs, saved)` gives the gradients of x, delta, A, B, C, D, delta_bias
    and the initial state (empty without one); dfinal may be None.
    """
    _library.define(f"{name}({INPUTS}, bool save) -> (Tensor, Tensor, Tensor)")
    _library.define(
        f"{name}_backward(Tensor dy, Tensor? dfinal, {INPUTS}, Tensor saved) -> "
        f"({', '.join(['Tensor'] * 8)})"
    )
    for op, implementation in ((name, forward), (f"{name}_backward", backward)):
        _library.impl(op, _without_autocast(implementation), "CompositeExplicitAutograd")

    @torch.library.register_fake(f"sambay::{name}", lib=_library)
    def _(x, delta, A, B, C, D, delta_bias, initial_state, resets, save):  # pyright: ignore
        return outputs_for(x, A, B, chunk, save)

    @torch.library.register_fake(f"sambay::{name}_backward", lib=_library)
    def _(dy, dfinal, x, delta, A, B, C, D, delta_bias, initial_state, resets, saved):
        return gradients_for(x, delta, A, B, initial_state)

    backward_op = getattr(torch.ops.sambay, f"{name}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # zeros for `saved` would cost as much as a pass over x
        ctx.save_for_backward(*inputs[:9], output[2])

    def differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(inputs[0])
        *gradients, dinitial = backward_op(dy, dfinal, *inputs)
        return *gradients, None if inputs[7] is None else dinitial, None, None

    torch.library.register_autograd(
        f"sambay::{name}", differentiate, setup_context=keep, lib=_library
    )

    refuse = refuse_second_derivative("the chunked scan of Mamba-2", "reference")
    torch.library.register_autograd(f"sambay::{name}_backward", refuse, lib=_library)
    operator = getattr(torch.ops.sambay, name).default

    def scan(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        differentiable = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in inputs
        )
        y, final_state, _ = operator(*inputs, differentiable)
        return y, final_state

    return scan


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose matrix products stay in the precision it chose."""

    @functools.wraps(implementation)
    def run(first: Tensor, *others: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return implementation(first, *others)
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *others)

    return run


def outputs_for(
    x: Tensor, A: Tensor, B: Tensor, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (y, final state, saved states)."""
    rows, length, heads, channels = x.shape
    state = (heads, channels, B.shape[2])
    borders = (length + chunk - 1) // chunk + 1 if save else 0
    return (
        x.new_empty(x.shape),
        A.new_empty(rows, *state),
        A.new_empty(borders, rows, *state),
    )


def gradients_for(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, ...]:
    """Uninitialised gradients of x, delta, A, B, C, D, delta_bias and the initial state."""
    return (
        x.new_empty(x.shape),
        delta.new_empty(delta.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        B.new_empty(B.shape),
        A.new_empty(A.shape),
        A.new_empty(A.shape),
        A.new_empty(0 if initial_state is None else initial_state.shape),
    )
