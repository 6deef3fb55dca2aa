"""The operations of a decode step in C++ (ops/native), on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops.decode import reference
from sambay.ops.native.library import address, kernels, rows_of, serves

# Below so many bytes a single thread is done before a second has woken up.
PARALLEL_BYTES = 1 << 17
_BFLOAT16 = torch.bfloat16
_TYPES = (torch.float32, torch.bfloat16)
_WEIGHT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def serves_decoding(call: Tensor | None) -> str | None:
    """None if the kernels can serve an operation on this tensor, else the reason."""
    # Traced code cannot see what the kernels do with an address.
    if torch.compiler.is_compiling():
        return "it cannot be traced"
    # Nor can what counts or records torch's operations.
    if torch._C._len_torch_dispatch_stack():
        return "a mode that watches torch's operations is active"
    if call is not None and type(call) not in (Tensor, torch.nn.Parameter):
        return f"it takes plain tensors, not {type(call).__name__}"
    return serves(call)


def attend(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_B: Tensor | None = None,
) -> Tensor:
    """See `decode_attention`; a row's columns begin at starts_B[b] (int64)."""
    call = _Queries(q_BHP, k_BKSP, v_BKSP, lengths_B, starts_B)
    kernels().sambay_decode_attention(*call.arguments, scale, call.threads)
    return call.out


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
    call = _Queries(q_BHP, k_BKSP, v_BKSP, lengths_B, starts_B)
    weight = weight.float()
    if norm_weight_2P is not None:
        norm_weight_2P = norm_weight_2P.float().contiguous()
    kernels().sambay_decode_differential(
        *call.arguments,
        weight.data_ptr(),
        address(norm_weight_2P),
        scale,
        eps,
        factor,
        call.threads,
    )
    return call.out.flatten(1)


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
    kernels().sambay_store_columns(
        keys.data_ptr(),
        *keys.stride()[:2],
        values.data_ptr(),
        *values.stride()[:2],
        k_BKSP.data_ptr(),
        *k_BKSP.stride()[:3],
        v_BKSP.data_ptr(),
        *v_BKSP.stride()[:3],
        columns.data_ptr(),
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
    kernels().sambay_skinny_linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        address(scale_F),
        address(bias),
        y.data_ptr(),
        x.shape[0],
        size,
        features,
        x.dtype == _BFLOAT16,
        kind,
        _threads(weight.nbytes),
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
    kernels().sambay_mamba_step(
        u.data_ptr(),
        u.stride(0),
        *(tensor.data_ptr() for tensor in narrow),
        *(tensor.data_ptr() for tensor in wide),
        conv.data_ptr(),
        ssm.data_ptr(),
        y.data_ptr(),
        *u.shape,
        conv_weight_EW.shape[1],
        A_log_EN.shape[1],
        dt_proj_weight_ER.shape[1],
        dtype == _BFLOAT16,
        _threads(x_proj_weight.nbytes + dt_proj_weight_ER.nbytes + 2 * ssm.nbytes),
    )
    for state, updated in ((conv_state_BCE, conv), (ssm_state_BEN, ssm)):
        if state is not updated:
            state.copy_(updated)
    return y


def _threads(num_bytes: int) -> int:
    return torch.get_num_threads() if num_bytes >= PARALLEL_BYTES else 1


class _Queries:
    """The values of QUERY_PARAMETERS in decode_attention.h; it keeps converted tensors alive."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None
    ) -> None:
        if k.dtype != v.dtype or k.dtype not in _TYPES:
            k, v = k.float(), v.float()
        q, k, v, lengths = rows_of(q), rows_of(k), rows_of(v), lengths.contiguous()
        if starts is not None:
            starts = starts.contiguous()
        self.tensors = (q, k, v, lengths, starts)
        self.out = q.new_empty(q.shape)
        self.threads = _threads(k.nbytes)
        B, H, P = q.shape
        self.arguments = (
            q.data_ptr(),
            *q.stride()[:2],
            k.data_ptr(),
            *k.stride()[:3],
            v.data_ptr(),
            *v.stride()[:3],
            lengths.data_ptr(),
            lengths.dtype == torch.int64,
            address(starts),
            self.out.data_ptr(),
            B,
            H,
            *k.shape[1:3],
            P,
            q.dtype == _BFLOAT16,
            k.dtype == _BFLOAT16,
        )
