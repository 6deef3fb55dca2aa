"""From logits to the next token, for many rows at once, each with its own settings.

Order of the processors: repetition penalty, temperature, top-k, top-p, draw.

Ranking is by penalised logit, descending; equal logits rank by token id, ascending. So top-k keeps
exactly k tokens and top-p the shortest prefix of that ranking which holds the wanted mass, on every
device and whatever the order in which a sort happens to leave ties.

Shape letters: B rows, V vocabulary, M ranked candidates.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sambay.errors import ConfigError

FIRST_CANDIDATES = 256
"""How many ranked tokens a top-p search looks at before it looks at more."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens; the default is greedy.

    temperature: 0 is greedy, otherwise logits are divided by it.
    top_k: keep the k highest-ranked tokens; 0 keeps all.
    top_p: keep the shortest ranked prefix that holds this probability, after top-k; 1 keeps all.
    repetition_penalty: logits of tokens in the prompt or already produced are divided by it if
        positive and multiplied by it if negative (CTRL, arXiv 1909.05858, section 4.1); 1 is off.
    seed: the random stream of this request; no other request reads from it.

    Raises:
        ConfigError: a field outside its range (names the field and the range).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = sys.float_info.min
        _check(self, "temperature", float, 0, 1e6, "a number from 0 (greedy) to 1e6")
        _check(self, "top_k", int, 0, 2**31, "an integer from 0 (every token) to 2**31")
        _check(self, "top_p", float, smallest, 1, "a number above 0, at most 1 (every token)")
        _check(self, "repetition_penalty", float, 0.01, 100, "a number from 0.01 to 100 (1 is off)")
        _check(self, "seed", int, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p can remove a token."""
        return self.top_k > 0 or self.top_p < 1


def _check(
    params: SamplingParams, field: str, kind: type, low: float, high: float, wanted: str
) -> None:
    value = getattr(params, field)
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ConfigError(f"{field} is {value!r}; it must be {wanted}")


GREEDY = SamplingParams()


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample number `index` of one prompt; sample 0 has `seed` itself.

    Hashed rather than added, so that runs with seeds 0 and 1 share no sample.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_stream(seed: int) -> random.Random:
    """A request's own source of uniforms in [0, 1): the same on every device and version."""
    return random.Random(seed)


class SamplingTable:
    """The settings of several requests as tensors, one row each; built once per batch."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.params = tuple(params)
        drawn = [row for row, p in enumerate(params) if not p.greedy]
        # Three groups of rows, fixed for the life of the table: decoding looks nothing up.
        self.num_drawn = len(drawn)
        self.whole = column([r for r in drawn if not params[r].truncates], torch.int64)
        self.cut = column([r for r in drawn if params[r].truncates], torch.int64)
        cut = [params[r] for r in drawn if params[r].truncates]
        self.num_cut = len(cut)
        self.largest_top_k = max((p.top_k for p in cut), default=0)
        self.every_cut_has_top_k = all(p.top_k > 0 for p in cut)
        self.top_k_B = column([p.top_k for p in cut], torch.int64)
        self.top_p_B = column([p.top_p for p in cut], torch.float64)
        self.temperature_B = column([p.temperature for p in params], torch.float64)
        self.penalises = any(p.repetition_penalty != 1 for p in params)
        self.penalty_B = column([p.repetition_penalty for p in params], torch.float32)


def penalise_repeats(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Logits with every token marked in `seen_BV` (bool) made less likely by its row's penalty."""
    penalty_B1 = penalty_B.to(logits_BV.dtype)[:, None]
    lowered = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, lowered, logits_BV)


def choose_tokens(
    logits_BV: Tensor, table: SamplingTable, seen_BV: Tensor | None, uniforms: Sequence[float]
) -> Tensor:
    """The next token of each row, (B,) int64.

    logits_BV float32; seen_BV bool, the tokens of prompt and continuation, needed where a penalty
    is set; uniforms: one number in [0, 1) per row, read only by rows that are not greedy.
    """
    if table.penalises:
        assert seen_BV is not None
        logits_BV = penalise_repeats(logits_BV, seen_BV, table.penalty_B)
    tokens_B = logits_BV.argmax(-1)
    if table.num_drawn == 0:
        return tokens_B
    uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
    if table.num_cut < table.num_drawn:
        weights_BV = _weights(logits_BV[table.whole], table.temperature_B[table.whole])
        tokens_B[table.whole] = draw(weights_BV, uniforms_B[table.whole])
    if table.num_cut > 0:
        weights_BM, ids_BM = _truncated(logits_BV[table.cut], table)
        places_B = draw(weights_BM, uniforms_B[table.cut])
        tokens_B[table.cut] = ids_BM.gather(1, places_B[:, None])[:, 0]
    return tokens_B


def draw(weights_BM: Tensor, uniforms_B: Tensor) -> Tensor:
    """The place chosen in each row by inverting the cumulated weights at the row's uniform.

    weights_BM: float64, at least 0, with a positive sum in each row; they need not sum to 1.
    """
    cumulated_BM = weights_BM.cumsum(-1)
    total_B1 = cumulated_BM[:, -1:]
    # The product may round up to the total, which no cumulated weight exceeds.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, below_B1)
    return torch.searchsorted(cumulated_BM, target_B1, right=True)[:, 0]


def ranked(logits_BV: Tensor, count: int) -> Tensor:
    """Ids of the `count` highest logits of each row, (B, count), ties by ascending id."""
    assert logits_BV.dtype == torch.float32
    vocab_size = logits_BV.shape[-1]
    # One integer per token, ordered as (logit, -id): the bits of a float order like an integer
    # once those of negative numbers are flipped. Adding zero turns -0.0 into 0.0.
    bits_BV = (logits_BV + 0.0).view(torch.int32)
    order_BV = (bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)).to(torch.int64)
    backwards_V = torch.arange(vocab_size - 1, -1, -1, device=logits_BV.device)
    keys_BV = (order_BV << 32) | backwards_V
    keys_BM = keys_BV.topk(count, dim=-1).values
    return vocab_size - 1 - (keys_BM & 0xFFFFFFFF)


def _weights(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Unnormalised probabilities in float64; the highest is exactly 1 at any temperature."""
    wide_BV = logits_BV.to(torch.float64)
    wide_BV = wide_BV - wide_BV.amax(-1, keepdim=True)
    return (wide_BV / temperature_B[:, None]).exp()


def _truncated(logits_BV: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    """Weights and ids of ranked candidates, zero where top-k or top-p removed them.

    Looks at few candidates first and at more only while some row's nucleus is still open; the
    answer does not depend on how many were looked at.
    """
    vocab_size = logits_BV.shape[-1]
    weights_BV = _weights(logits_BV, table.temperature_B[table.cut])
    top_k_B1, top_p_B1 = table.top_k_B[:, None], table.top_p_B[:, None]
    without_top_k_B1 = top_k_B1 == 0
    everything_B1 = weights_BV.sum(-1, keepdim=True)
    count = table.largest_top_k
    if not table.every_cut_has_top_k:
        count = max(count, FIRST_CANDIDATES)
    count = min(count, vocab_size)
    while True:
        ids_BM = ranked(logits_BV, count)
        weights_BM = weights_BV.gather(1, ids_BM)
        place_M = torch.arange(count, device=logits_BV.device)
        weights_BM = weights_BM * (without_top_k_B1 | (place_M < top_k_B1))
        cumulated_BM = weights_BM.cumsum(-1)
        total_B1 = torch.where(without_top_k_B1, everything_B1, cumulated_BM[:, -1:])
        wanted_B1 = torch.where(top_p_B1 < 1, top_p_B1 * total_B1, math.inf)
        # A token stays while the tokens ranked before it do not yet hold the wanted mass.
        before_BM = torch.nn.functional.pad(cumulated_BM[:, :-1], (1, 0))
        open_B1 = without_top_k_B1 & (cumulated_BM[:, -1:] < wanted_B1)
        if count == vocab_size or not bool(open_B1.any()):
            return weights_BM * (before_BM < wanted_B1), ids_BM
        # The first few serve a trained model; ranking 64 times as many costs eight times as much.
        count = min(count * 64, vocab_size)
