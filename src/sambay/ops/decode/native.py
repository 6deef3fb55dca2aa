"""The operations of a decode step in C++ (ops/native), on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.decode import reference
from sambay.ops.native.library import rows_of, serves
from sambay.ops.native.recording import call, recording

# Below so many bytes a single thread is done before a second has woken up.
PARALLEL_BYTES = 1 << 17
_BFLOAT16 = torch.bfloat16
_TYPES = (torch.float32, torch.bfloat16)
_WEIGHT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def serves_decoding(tensor: Tensor | None) -> str | None:
    """None if the kernels can serve an operation on this tensor, else the reason."""
    if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"it takes plain tensors, not {type(tensor).__name__}"
    return why_unseen() or serves(tensor)


def why_unseen() -> str | None:
    """None if nobody has to see what the kernels compute, else who has to."""
    # Traced code cannot see what the kernels do with an address.
    if torch.compiler.is_compiling():
        return "it cannot be traced"
    # Nor can what counts or records torch's operations; a recorder is told of the kernels as well.
    if torch._C._len_torch_dispatch_stack() > recording():
        return "a mode that watches torch's operations is active"
    return None


def attend(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_B: Tensor | None = None,
) -> Tensor:
    """See `decode_attention`; a row's columns begin at starts_B[b] (int64)."""
    queries = _Queries(q_BHP, k_BKSP, v_BKSP, lengths_B, starts_B)
    call("sambay_decode_attention", *queries.arguments, scale, queries.threads)
    return queries.out


def attend_differential(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    weight: Tensor,
    norm_weight_2P: Tensor | None,
    scale: float,
    eps: float,
    factor: float,
    starts_B: Tensor | None = None,
) -> Tensor:
    """See `decode_differential_attention`; without a norm weight there is no factor either."""
    queries = _Queries(q_BHP, k_BKSP, v_BKSP, lengths_B, starts_B)
    weight = weight.float()
    if norm_weight_2P is not None:
        norm_weight_2P = norm_weight_2P.float().contiguous()
    call(
        "sambay_decode_differential",
        *queries.arguments,
        weight,
        norm_weight_2P,
        scale,
        eps,
        factor,
        queries.threads,
    )
    return queries.out.flatten(1)


def store(
    keys_BKP: Tensor, values_BKP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, columns_B: Tensor
) -> None:
    """See `store_columns`."""
    if k_BKSP.dtype not in _TYPES or v_BKSP.dtype != k_BKSP.dtype:
        reference.store(keys_BKP, values_BKP, k_BKSP, v_BKSP, columns_B)
        return
    assert k_BKSP.stride(3) == v_BKSP.stride(3) == 1, "the cache is written in place"
    keys, values = rows_of(keys_BKP.to(k_BKSP.dtype)), rows_of(values_BKP.to(v_BKSP.dtype))
    columns = columns_B.contiguous()
    call(
        "sambay_store_columns",
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        k_BKSP,
        *k_BKSP.stride()[:3],
        v_BKSP,
        *v_BKSP.stride()[:3],
        columns,
        columns.dtype == torch.int64,
        *keys.shape,
        k_BKSP.dtype == _BFLOAT16,
    )


def linear(
    x_BD: Tensor, weight_FD: Tensor, bias: Tensor | None, scale_F: Tensor | None = None
) -> Tensor:
    """See `skinny_linear`."""
    kind = _WEIGHT_KINDS.get(weight_FD.dtype)
    if kind is None:
        return reference.linear(x_BD, weight_FD, bias, scale_F)
    if scale_F is not None:
        scale_F = scale_F.float().contiguous()
    x, weight = rows_of(x_BD), rows_of(weight_FD)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    features, size = weight.shape
    y = x.new_empty(x.shape[0], features)
    call(
        "sambay_skinny_linear",
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        scale_F,
        bias,
        y,
        x.shape[0],
        size,
        features,
        x.dtype == _BFLOAT16,
        kind,
        threads_for(weight.nbytes),
    )
    return y


def step_mamba(
    u_BE: Tensor,
    conv_weight_EW: Tensor,
    conv_bias_E: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    conv_state_BCE: Tensor,
    ssm_state_BEN: Tensor,
) -> Tensor:
    """See `mamba_step`."""
    conv, ssm = conv_state_BCE.float().contiguous(), ssm_state_BEN.contiguous()
    u, dtype = rows_of(u_BE), u_BE.dtype
    narrow = [conv_weight_EW, conv_bias_E, x_proj_weight, dt_proj_weight_ER]
    narrow = [tensor.to(dtype).contiguous() for tensor in narrow]
    wide = [tensor.float().contiguous() for tensor in (dt_bias_E, A_log_EN, D_E)]
    y = u.new_empty(u.shape)
    call(
        "sambay_mamba_step",
        u,
        u.stride(0),
        *narrow,
        *wide,
        conv,
        ssm,
        y,
        *u.shape,
        conv_weight_EW.shape[1],
        A_log_EN.shape[1],
        dt_proj_weight_ER.shape[1],
        dtype == _BFLOAT16,
        threads_for(x_proj_weight.nbytes + dt_proj_weight_ER.nbytes + 2 * ssm.nbytes),
    )
    for state, updated in ((conv_state_BCE, conv), (ssm_state_BEN, ssm)):
        if state is not updated:
            state.copy_(updated)
    return y


def threads_for(num_bytes: int) -> int:
    """The threads that share work on so much memory."""
    return torch.get_num_threads() if num_bytes >= PARALLEL_BYTES else 1


class _Queries:
    """The values of QUERY_PARAMETERS in decode_attention.h."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None
    ) -> None:
        if k.dtype != v.dtype or k.dtype not in _TYPES:
            k, v = k.float(), v.float()
        q, k, v, lengths = rows_of(q), rows_of(k), rows_of(v), lengths.contiguous()
        if starts is not None:
            starts = starts.contiguous()
        self.out = q.new_empty(q.shape)
        self.threads = threads_for(k.nbytes)
        B, H, P = q.shape
        self.arguments = (
            q,
            *q.stride()[:2],
            k,
            *k.stride()[:3],
            v,
            *v.stride()[:3],
            lengths,
            lengths.dtype == torch.int64,
            starts,
            self.out,
            B,
            H,
            *k.shape[1:3],
            P,
            q.dtype == _BFLOAT16,
            k.dtype == _BFLOAT16,
        )
