"""The gated delta rule over a sequence, and one step of it.

    S' = exp(g_t) S_{t-1}
    S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T
    o_t = scale * S_t^T q_t

(arXiv 2412.06464, section 3.1.) A head's state S is a memory that maps keys to values: it decays,
then what it holds under k_t moves towards v_t. With unit keys and beta in [0, 2] every transition
I - beta k k^T has eigenvalues 1 and 1 - beta, down to -1.
Shape letters: B rows, T positions, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sambay.ops import registry
from sambay.ops.gated_delta import chunked, fla, reference
from sambay.ops.gated_delta.keys import l2_normalise
from sambay.ops.gated_delta.step import gated_delta_step

__all__ = ["gated_delta", "gated_delta_step", "l2_normalise"]

registry.register("gated_delta", "reference", 0, reference.scan)
registry.register("gated_delta", "torch", 10, chunked.scan)
registry.register("gated_delta", "fla", 20, fla.scan, fla.why_unavailable)


def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    resets_BT: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, final state): o (B, T, H, V) in v's dtype, the state (B, H, K, V) after the last token.

    q, k and v share one floating dtype; q and k are expected to have unit length (`l2_normalise`).
    log_decay (at most 0), beta and the states are float32 (float64 if v is), and so is all
    computation but that of "fla", whose matrix products take their factors in v's dtype.
    `resets_BT` (bool) marks tokens that start a document: the state is zeroed before them, also
    the initial one. Where beta and log_decay are 0 the state passes unchanged. Differentiable in
    every floating input and in both outputs; only the reference has second derivatives.

    Raises:
        BackendUnavailable: the named one ("reference", "torch", "fla") cannot serve the call.
    """
    rows, length, heads, keys = k_BTHK.shape
    values = v_BTHV.shape[-1]
    assert length > 0, "the rule needs at least one token"
    assert q_BTHK.shape == k_BTHK.shape, (q_BTHK.shape, k_BTHK.shape)
    assert v_BTHV.shape == (rows, length, heads, values), (v_BTHV.shape, k_BTHK.shape)
    assert log_decay_BTH.shape == beta_BTH.shape == (rows, length, heads), log_decay_BTH.shape
    assert q_BTHK.dtype == k_BTHK.dtype == v_BTHV.dtype, (q_BTHK.dtype, k_BTHK.dtype, v_BTHV.dtype)
    compute = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    assert log_decay_BTH.dtype == beta_BTH.dtype == compute, (log_decay_BTH.dtype, beta_BTH.dtype)
    if initial_state_BHKV is not None:
        assert initial_state_BHKV.shape == (rows, heads, keys, values), initial_state_BHKV.shape
        assert initial_state_BHKV.dtype == compute, initial_state_BHKV.dtype
    if resets_BT is not None:
        assert resets_BT.shape == (rows, length), resets_BT.shape
        assert resets_BT.dtype == torch.bool, resets_BT.dtype
    scan = registry.choose("gated_delta", backend, k_BTHK)
    return scan(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_BTH,
        beta_BTH,
        initial_state_BHKV,
        resets_BT,
        scale,
    )
