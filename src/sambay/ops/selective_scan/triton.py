"""The selective scan by Triton kernels, on CUDA devices.

Floors, per token and channel with bfloat16 inputs and N = 16: the forward moves 8 bytes (x, delta
and y, and 2 of the states it saves for the backward), the backward 20 (x, delta and dy, dx and
ddelta, the saved states, and parts of dB and dC, written and summed). But it also takes N
exponentials forwards and 2 N backwards, at 16 per clock and multiprocessor: on an H200 (132
multiprocessors, 1.8 GHz, 4.3 TB/s) these take 2.3 times as long as the bytes forwards and 1.8 times
backwards. So what the kernels save is instructions: no state leaves the registers of its thread.

One warp advances 32 channels. Where rows and channels do not fill the machine, the sequence is cut
into segments that are scanned side by side after a first pass has found the state before each,
which takes the exponentials once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.selective_scan.operator import define, gradients_for, outputs_for
from sambay.ops.triton.launch import launch, power_of_two, processors, why_unavailable

__all__ = ["scan", "why_unavailable"]

CHUNK = 32  # tokens between saved states
CHANNELS = 32  # of one program, which is one warp
FORWARD_STEPS = 8  # tokens loaded ahead
BACKWARD_STEPS = 4  # tokens whose states are in registers at once
LANES = 8  # of a warp along the channels in the backward; the others divide the states
WARPS = 8  # per multiprocessor that are worth cutting a sequence for
SHORTEST = 8 * CHUNK  # tokens of a segment: below, its first pass costs more than it gains


class _Call:
    """The arguments that forward and backward share, as the kernels take them."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        initial_state: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        self.x, self.delta = _dense_channels(x), _dense_channels(delta)
        # Every program of a row reads all of B and C, so they are converted once, here.
        self.B, self.C = B.float().contiguous(), C.float().contiguous()
        self.A, self.D, self.bias = A.contiguous(), D.contiguous(), delta_bias.contiguous()
        self.initial = None if initial_state is None else initial_state.contiguous()
        # An absent tensor's place is taken by one that is not read.
        self.resets = self.A if resets is None else resets.contiguous().view(torch.uint8)
        self.rows, self.length, self.channels = x.shape
        self.states = A.shape[1]
        self.blocks = -(-self.channels // CHANNELS)
        self.segment = segment_length(x.shape, x.device)
        self.segments = -(-self.length // self.segment)
        self.constants = {
            "STATES": self.states,
            "BLOCK_N": power_of_two(self.states),
            "HAS_RESETS": resets is not None,
            "num_warps": 1,
        }

    def carries(self, values: Tensor, B: Tensor, begin: Tensor | None, reverse: bool) -> Tensor:
        """What enters every segment, (B, segments, N, E): states, or in reverse their gradients."""
        shape = (self.rows, self.segments, self.states, self.channels)
        folds, carries = self.A.new_empty(shape), self.A.new_empty(shape)
        sums = self.A.new_empty(self.rows, self.segments, self.channels)
        launch(
            "scan_segments",
            "scan_fold",
            (self.blocks, self.rows, self.segments),
            values,
            self.delta,
            self.A,
            B,
            self.bias,
            self.resets,
            folds,
            sums,
            self.length,
            self.channels,
            self.segments,
            self.segment,
            *values.stride()[:2],
            *self.delta.stride()[:2],
            **self.constants,
            BLOCK_E=CHANNELS,
            STEPS=FORWARD_STEPS,
            REVERSE=reverse,
        )
        launch(
            "scan_segments",
            "scan_chain",
            (self.blocks, self.rows),
            folds,
            sums,
            self.A,
            self.A if begin is None else begin,
            carries,
            self.channels,
            self.segments,
            STATES=self.states,
            BLOCK_N=power_of_two(self.states),
            BLOCK_E=CHANNELS,
            REVERSE=reverse,
            HAS_BEGIN=begin is not None,
            num_warps=4,
        )
        return carries


def segment_length(shape: torch.Size, device: torch.device) -> int:
    """Tokens that one program advances through: all of them where there are programs enough."""
    rows, length, channels = shape
    programs = rows * -(-channels // CHANNELS)
    wanted = WARPS * processors(device)
    if 2 * programs > wanted:
        return -(-length // CHUNK) * CHUNK
    segments = max(min(-(-wanted // programs), length // SHORTEST), 1)
    return -(-length // (segments * CHUNK)) * CHUNK


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, saved states), see `operator.define`."""
    call = _Call(x, delta, A, B, C, D, delta_bias, initial_state, resets)
    y, final_state, saved = outputs_for(x, A, CHUNK, save)
    if call.segments > 1:
        starts = call.carries(call.x, call.B, call.initial, reverse=False)
        strides = (starts.stride(0), starts.stride(1), 1, call.channels)
    else:
        starts = call.A if call.initial is None else call.initial
        strides = (call.channels * call.states, 0, call.states, 1)
    launch(
        "scan_forward",
        "scan_forward",
        (call.blocks, call.rows, call.segments),
        call.x,
        call.delta,
        call.A,
        call.B,
        call.C,
        call.D,
        call.bias,
        starts,
        call.resets,
        y,
        final_state,
        saved if save else call.A,
        call.length,
        call.channels,
        saved.shape[1],
        call.segment,
        *call.x.stride()[:2],
        *call.delta.stride()[:2],
        *strides,
        **call.constants,
        BLOCK_E=CHANNELS,
        STEPS=FORWARD_STEPS,
        CHUNK=CHUNK,
        HAS_START=starts is not call.A,
        SAVE=save and saved.numel() > 0,
    )
    return y, final_state, saved


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients, see `operator.define`."""
    call = _Call(x, delta, A, B, C, D, delta_bias, initial_state, resets)
    dy = _dense_channels(dy)
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    dlast = call.A
    if call.segments > 1:
        dlast = call.carries(dy, call.C, dfinal, reverse=True)
    elif dfinal is not None:
        dlast = dfinal.transpose(1, 2).contiguous()
    start = call.A if call.initial is None else call.initial.transpose(1, 2).contiguous()
    dx, ddelta, *_ = gradients_for(x, A, B, initial_state)
    parts = (call.rows, call.segments)
    dA = A.new_empty(*parts, call.states, call.channels)
    dD, dbias = A.new_empty(2, *parts, call.channels)
    dfirst = torch.empty_like(dA)
    dB, dC = A.new_empty(2, call.blocks, *B.shape)
    per_thread = CHANNELS // LANES
    tile = CHANNELS * power_of_two(call.states)
    programs = call.blocks * call.rows * call.segments
    launch(
        "scan_backward",
        "scan_backward",
        (call.blocks, *parts),
        dy,
        dlast,
        call.x,
        call.delta,
        A.t().contiguous(),
        call.B,
        call.C,
        call.D,
        call.bias,
        start,
        call.resets,
        saved if saved.numel() else call.A,
        A.new_empty(programs * (CHUNK // BACKWARD_STEPS) * tile),
        dx,
        ddelta,
        dA,
        dB,
        dC,
        dD,
        dbias,
        dfirst,
        call.length,
        call.channels,
        saved.shape[1],
        call.segment,
        *dy.stride()[:2],
        *call.x.stride()[:2],
        *call.delta.stride()[:2],
        **call.constants,
        R=per_thread,
        L=LANES,
        STEPS=BACKWARD_STEPS,
        CHUNK=CHUNK,
        HAS_LAST=dlast is not call.A,
        HAS_START=call.initial is not None,
    )
    return (
        dx,
        ddelta,
        dA.sum((0, 1)).t().contiguous(),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum((0, 1)),
        dbias.sum((0, 1)),
        dfirst[:, 0].transpose(1, 2).contiguous() if initial_state is not None else A.new_empty(0),
    )


def _dense_channels(tensor: Tensor) -> Tensor:
    """The tensor, its channels beside each other; rows and tokens may have any stride."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


scan = define("selective_scan_triton", forward, backward, CHUNK)
