"""The operations of a decode step: one new token for every slot of a batch.

Rows stand at places of their own: each operation takes what differs between them as tensors and
never reads a tensor's value on the host of a GPU, so that a captured step can be replayed.
Shape letters: B slots, H query heads, K key heads, S columns there is room for, P head dimension,
D input and F output features, E inner channels, N state, R rank of the time step, C = W - 1 earlier
inputs of a convolution of width W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.decode import native, reference, triton
from sambay.ops.decode.gradients import without_gradients
from sambay.ops.decode.groups import grouped_linear, pack_int4
from sambay.ops.decode.rows import (
    add_rows,
    count_columns,
    embed_rows,
    gate_rows,
    norm_rows,
    rotary_turns,
    rotate_heads,
    slot_places,
)

__all__ = [
    "add_rows",
    "count_columns",
    "decode_attention",
    "decode_differential_attention",
    "embed_rows",
    "gate_rows",
    "grouped_linear",
    "mamba_step",
    "norm_rows",
    "pack_int4",
    "rotary_turns",
    "rotate_heads",
    "skinny_linear",
    "slot_places",
    "store_columns",
]

registry.register("decode_attention", "reference", 0, reference.attend)
registry.register("decode_attention", "native", 20, native.attend, native.serves_decoding)
registry.register("decode_differential_attention", "reference", 0, reference.attend_differential)
registry.register(
    "decode_differential_attention",
    "native",
    20,
    native.attend_differential,
    native.serves_decoding,
)
registry.register("store_columns", "reference", 0, reference.store)
registry.register("store_columns", "native", 20, native.store, native.serves_decoding)
registry.register("skinny_linear", "reference", 0, reference.linear)
registry.register("skinny_linear", "native", 20, native.linear, native.serves_decoding)
registry.register("mamba_step", "reference", 0, reference.step_mamba)
registry.register("mamba_step", "native", 20, native.step_mamba, native.serves_decoding)
for _op, _function in (
    ("decode_attention", triton.attend),
    ("decode_differential_attention", triton.attend_differential),
    ("store_columns", triton.store),
    ("mamba_step", triton.step_mamba),
):
    registry.register(_op, "triton", 20, _function, triton.why_unavailable)


@without_gradients
def decode_attention(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """The attended values, (B, H, P) in the dtype of the queries; computed in float32.

    Row b sees the columns [0, lengths_B[b]) (int32 or int64), its own among them; a row of length 0
    gives zeros. Query head h reads key head h // (H / K). The order of columns does not matter, so
    a ring of W columns is passed with min(length, W). Keys and values may have another floating
    dtype than the queries.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    B, H, P = q_BHP.shape
    K, S = k_BKSP.shape[1:3]
    assert k_BKSP.shape == v_BKSP.shape, (k_BKSP.shape, v_BKSP.shape)
    assert k_BKSP.shape == (B, K, S, P), (q_BHP.shape, k_BKSP.shape)
    assert H % K == 0, (H, K)
    assert lengths_B.shape == (B,), lengths_B.shape
    attend = registry.choose("decode_attention", backend, q_BHP)
    return attend(q_BHP, k_BKSP, v_BKSP, lengths_B, scale)


@without_gradients
def decode_differential_attention(
    q_BHP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    lengths_B: Tensor,
    weight: Tensor,
    norm_weight_2P: Tensor,
    *,
    scale: float,
    eps: float,
    factor: float,
    backend: str | None = None,
) -> Tensor:
    """factor * RMSNorm(O1 - weight * O2) of every pair of heads, (B, H * P) in the queries' dtype.

    Heads are paired as in `sambay.ops.differential`: each pair fills the places of its two heads.
    `weight` is the scalar lambda as a float32 tensor; `factor` is 1 - lambda_init. Visibility and
    dtypes are those of `decode_attention`; a row of length 0 gives zeros.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    B, H, P = q_BHP.shape
    K, S = k_BKSP.shape[1:3]
    assert k_BKSP.shape == v_BKSP.shape, (k_BKSP.shape, v_BKSP.shape)
    assert k_BKSP.shape == (B, K, S, P), (q_BHP.shape, k_BKSP.shape)
    assert H % K == K % 2 == 0, (H, K)
    assert lengths_B.shape == (B,), lengths_B.shape
    assert norm_weight_2P.shape == (2 * P,), norm_weight_2P.shape
    attend = registry.choose("decode_differential_attention", backend, q_BHP)
    return attend(q_BHP, k_BKSP, v_BKSP, lengths_B, weight, norm_weight_2P, scale, eps, factor)


@without_gradients
def store_columns(
    keys_BKP: Tensor,
    values_BKP: Tensor,
    k_BKSP: Tensor,
    v_BKSP: Tensor,
    columns_B: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the new column of every row at columns_B[b] (int32 or int64) of the cache, in place.

    A negative column writes nothing: its slot is idle. The new columns are converted to the dtype
    of the cache.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert keys_BKP.shape == values_BKP.shape, (keys_BKP.shape, values_BKP.shape)
    assert k_BKSP.shape == v_BKSP.shape, (k_BKSP.shape, v_BKSP.shape)
    assert columns_B.shape == keys_BKP.shape[:1], columns_B.shape
    registry.choose("store_columns", backend, keys_BKP)(
        keys_BKP, values_BKP, k_BKSP, v_BKSP, columns_B
    )


@without_gradients
def skinny_linear(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias: Tensor | None = None,
    *,
    scale_F: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias for few rows, (B, F) in x's dtype; not differentiable.

    Few means up to 32: then reading the weight takes longer than multiplying by it. An int8 weight
    comes with `scale_F` (float32), by which each of its rows is to be multiplied.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    assert x_BD.shape[1] == weight_FD.shape[1], (x_BD.shape, weight_FD.shape)
    assert (scale_F is not None) == (weight_FD.dtype == torch.int8), weight_FD.dtype
    linear = registry.choose("skinny_linear", backend, x_BD)
    return linear(x_BD, weight_FD, bias, scale_F)


@without_gradients
def mamba_step(
    u_BE: Tensor,
    conv_weight_EW: Tensor,
    conv_bias_E: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    *,
    conv_state_BCE: Tensor,
    ssm_state_BEN: Tensor,
    backend: str | None = None,
) -> Tensor:
    """y (B, E) of one more token between the input projection and the gate, in u's dtype.

    Convolution with SiLU, x_proj (R + 2 N, E) to the time step, B and C, dt_proj, the state update
    with A = -exp(A_log), and the D skip. Both states are advanced in place; `ssm_state_BEN` is
    float32, the convolution's inputs are float32 or have u's dtype. The matrices have u's dtype.

    Raises:
        BackendUnavailable: the named backend cannot serve this call.
    """
    B, E = u_BE.shape
    N, R = A_log_EN.shape[1], dt_proj_weight_ER.shape[1]
    assert x_proj_weight.shape == (R + 2 * N, E), x_proj_weight.shape
    assert ssm_state_BEN.shape == (B, E, N), ssm_state_BEN.shape
    assert conv_state_BCE.shape == (B, conv_weight_EW.shape[1] - 1, E), conv_state_BCE.shape
    step = registry.choose("mamba_step", backend, u_BE)
    return step(
        u_BE,
        conv_weight_EW,
        conv_bias_E,
        x_proj_weight,
        dt_proj_weight_ER,
        dt_bias_E,
        A_log_EN,
        D_E,
        conv_state_BCE,
        ssm_state_BEN,
    )
