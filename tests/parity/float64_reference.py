"""Logits of an official Phi4Flash checkpoint in numpy float64: slow, plain, shares no code with us.

It is written from the published description only, as loops over heads and positions, so that the
model of the package and a port in another language can both be compared with it. Sources:

* [SambaY] arXiv 2507.06607: the decoder-hybrid-decoder, its gated memory units and the layout of
  Phi-4-mini-flash (section 2 and the appendices), with the tensor index, `config.json` and model
  class published with microsoft/Phi-4-mini-flash-reasoning for names, layouts and eps.
* [Mamba] arXiv 2312.00752: the selective state space layer (section 3, algorithm 2).
* [Diff] arXiv 2410.05258: differential attention (section 2).

There are no positions to encode (no rotary embedding or other position signal) and no multipliers.

    python tests/parity/float64_reference.py FOLDER 5 3 9      # prints the eight largest logits
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Tensors = Mapping[str, np.ndarray[Any, Any]]
SUB_NORM_EPS = 1e-5  # of the norm inside differential attention; a constant of the official class


class Evaluation(NamedTuple):
    """All numbers of one sequence of T tokens."""

    logits: Array  # (T, V)
    hidden: list[Array]  # d + 1 arrays (T, w): the embeddings, then the residual after each layer


def evaluate(tensors: Tensors, config: Mapping[str, Any], token_ids: Sequence[int]) -> Evaluation:
    """The logits at every position of one sequence, and the residual stream after every layer.

    `tensors` are the official names with their arrays (bfloat16 already widened, see
    `read_folder`), `config` is the content of the official `config.json`.
    """
    depth, half = config["num_hidden_layers"], config["num_hidden_layers"] // 2
    eps = config["layer_norm_eps"]
    memory: Array | None = None  # what the gated memory units read
    shared: tuple[Array, Array] | None = None  # the keys and values the cross-attention reads
    hidden = [wide(tensors["model.embed_tokens.weight"])[list(token_ids)]]
    for index in range(depth):
        layer = below(tensors, f"model.layers.{index}.")
        mixer = below(layer, "attn.")
        # Each layer is two sub-blocks, each with its own norm before and added to the residual:
        # x + Mixer(norm(x)), then x + MLP(norm(x)) ([SambaY] section 2; the pre-norm decoder).
        normed = layer_norm(hidden[-1], below(layer, "input_layernorm."), eps)
        kind = layer_kind(index, depth)
        if kind == "mamba":
            mixed, scan = mamba(normed, mixer)
            if index == half:  # the last Mamba layer is the memory ([SambaY] section 2)
                memory = scan
        elif kind in ("sliding", "full"):
            q, k, v = self_projections(normed, mixer, config)
            window = sliding_window(config, index) if kind == "sliding" else None
            mixed = differential_attention(q, k, v, mixer, index, window)
            if kind == "full":  # its keys and values serve every later attention layer (YOCO)
                shared = k, v
        elif kind == "gated memory":
            assert memory is not None
            mixed = gated_memory(normed, mixer, memory)
        else:
            assert shared is not None
            q = split_heads(linear(normed, mixer, "Wqkv"), config["num_attention_heads"])
            mixed = differential_attention(q, *shared, mixer, index, window=None)
        after_mixer = hidden[-1] + mixed
        normed = layer_norm(after_mixer, below(layer, "post_attention_layernorm."), eps)
        hidden.append(after_mixer + swiglu(normed, below(layer, "mlp.")))
    final = layer_norm(hidden[-1], below(tensors, "model.final_layernorm."), eps)
    tied = config.get("tie_word_embeddings", True)
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return Evaluation(final @ wide(head).T, hidden)


def layer_kind(index: int, depth: int) -> str:
    """The mixer of a layer, counted from 0 ([SambaY] section 2; Phi-4-mini-flash has depth 32).

    The self-decoder is layers 0 .. d/2 + 1: Mamba at even indices, sliding window attention at odd
    ones, the last of which (d/2 + 1) attends to everything. In the cross-decoder after it, gated
    memory units are at even and cross-attention at odd indices.
    """
    if index <= depth // 2 + 1:
        if index % 2 == 0:
            return "mamba"
        return "full" if index == depth // 2 + 1 else "sliding"
    return "gated memory" if index % 2 == 0 else "cross"


def sliding_window(config: Mapping[str, Any], index: int) -> int:
    """How many positions layer `index` sees, itself included; one number, or a list by layer."""
    window = config["sliding_window"]
    return window if isinstance(window, int) else window[index]


def mamba(u: Array, tensors: Tensors) -> tuple[Array, Array]:
    """The output (T, w) of a Mamba layer, and its scan output y (T, di), which is the memory.

    y includes the skip D x and is taken before the gate silu(z) ([SambaY] section 2, the memory of
    the gated memory unit; the model class agrees).
    """
    length = len(u)
    x, z = halves(linear(u, tensors, "in_proj"))
    # A depth-wise causal convolution; its last column multiplies the current token, and before the
    # text there are zeros (its place in the block: [Mamba] section 3.4).
    kernel, bias = wide(tensors["conv1d.weight"])[:, 0, :], wide(tensors["conv1d.bias"])
    width = kernel.shape[1]
    convolved = np.empty_like(x)
    for t in range(length):
        total = bias.copy()
        for w in range(width):
            source = t - (width - 1) + w
            if source >= 0:
                total += kernel[:, w] * x[source]
        convolved[t] = silu(total)
    x = convolved
    # The input chooses the step size and both projections ([Mamba] algorithm 2): rows of x_proj
    # are [dt | B | C], and the step is softplus(dt_proj dt + bias).
    a = -np.exp(wide(tensors["A_log"]))  # (di, N)
    states, rank = a.shape[1], tensors["dt_proj.weight"].shape[1]
    parts = linear(x, tensors, "x_proj")
    dt, b, c = parts[:, :rank], parts[:, rank : rank + states], parts[:, rank + states :]
    delta = softplus(linear(dt, tensors, "dt_proj"))
    # s_t = exp(delta A) s_(t-1) + delta B x_t and y_t = C s_t + D x_t ([Mamba] equations 2 and 4;
    # as in the released Mamba code, A is discretised exactly and B by its first order, delta B).
    skip = wide(tensors["D"])
    state = np.zeros_like(a)
    y = np.empty_like(x)
    for t in range(length):
        state = np.exp(delta[t][:, None] * a) * state
        state += (delta[t] * x[t])[:, None] * b[t][None, :]
        y[t] = state @ c[t] + skip * x[t]
    return linear(y * silu(z), tensors, "out_proj"), y


def self_projections(
    normed: Array, tensors: Tensors, config: Mapping[str, Any]
) -> tuple[Array, Array, Array]:
    """Queries (T, Hq, hd), keys and values (T, Hk, hd); rows of Wqkv: all q, all k, all v."""
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // queries
    rows = linear(normed, tensors, "Wqkv")
    q = rows[:, : queries * size]
    k = rows[:, queries * size : (queries + keys) * size]
    v = rows[:, (queries + keys) * size :]
    return split_heads(q, queries), split_heads(k, keys), split_heads(v, keys)


def differential_attention(
    q: Array, k: Array, v: Array, tensors: Tensors, index: int, window: int | None
) -> Array:
    """The output (T, w) of causal differential attention ([Diff] section 2).

    Heads pair up by neighbours: differential head j uses query heads 2j and 2j + 1, and key/value
    heads 2p and 2p + 1 with p = j // (Hq / Hk). The two maps share the concatenated values of the
    pair. lambda is one number for the whole layer.
    """
    length, queries, size = q.shape
    repeat = queries // k.shape[1]
    maps = below(tensors, "inner_cross_attn.")
    start = lambda_init(index)
    first = math.exp(float(np.sum(wide(maps["lambda_q1"]) * wide(maps["lambda_k1"]))))
    second = math.exp(float(np.sum(wide(maps["lambda_q2"]) * wide(maps["lambda_k2"]))))
    weight = first - second + start  # [Diff] equation 2
    out = np.empty((length, queries, size))
    for j in range(queries // 2):
        pair = j // repeat
        values = np.concatenate([v[:, 2 * pair], v[:, 2 * pair + 1]], axis=1)  # (T, 2 hd)
        for t in range(length):
            # The window counts the current position: t - window + 1 .. t.
            oldest = 0 if window is None else max(0, t - window + 1)
            seen = slice(oldest, t + 1)
            map1 = softmax(k[seen, 2 * pair] @ q[t, 2 * j] / math.sqrt(size))
            map2 = softmax(k[seen, 2 * pair + 1] @ q[t, 2 * j + 1] / math.sqrt(size))
            head = (map1 - weight * map2) @ values[seen]  # [Diff] equation 1
            # Each head is normalised over its 2 hd values and scaled by 1 - lambda_init
            # ([Diff] equation 3); its halves are the output heads 2j and 2j + 1.
            head = (1 - start) * rms_norm(head, wide(maps["subln.weight"]))
            out[t, 2 * j], out[t, 2 * j + 1] = head[:size], head[size:]
    return linear(out.reshape(length, queries * size), tensors, "out_proj")


def lambda_init(index: int) -> float:
    """0.8 - 0.6 exp(-0.3 l) with l the index of the layer in the whole stack, counted from 0.

    [Diff] section 2 counts from 1 and writes l - 1; layers of every kind count.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * index)


def gated_memory(normed: Array, tensors: Tensors, memory: Array) -> Array:
    """W2 (memory * silu(W1 x)), position by position: the gate is the projection of this layer's
    input, the memory enters as it is ([SambaY] section 2, the gated memory unit)."""
    return linear(silu(linear(normed, tensors, "in_proj")) * memory, tensors, "out_proj")


def swiglu(x: Array, tensors: Tensors) -> Array:
    """fc2 (silu(gate) * value), the first half of the rows of fc1 being the gate."""
    gate, value = halves(linear(x, tensors, "fc1"))
    return linear(silu(gate) * value, tensors, "fc2")


def layer_norm(x: Array, tensors: Tensors, eps: float) -> Array:
    """LayerNorm over the last axis with weight and bias, the variance that of the population."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    return centred / scale * wide(tensors["weight"]) + wide(tensors["bias"])


def rms_norm(x: Array, weight: Array) -> Array:
    """One vector divided by its root mean square, times a weight."""
    return x / math.sqrt(float(np.mean(x * x)) + SUB_NORM_EPS) * weight


def linear(x: Array, tensors: Tensors, name: str) -> Array:
    """weight x + bias for every position; a weight's rows are outputs; the bias may be absent."""
    out = x @ wide(tensors[f"{name}.weight"]).T
    bias = tensors.get(f"{name}.bias")
    return out if bias is None else out + wide(bias)


def silu(x: Array) -> Array:
    """x sigmoid(x), without overflow: sigmoid by the exponential of a number of at most 0."""
    small = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def softplus(x: Array) -> Array:
    """ln(1 + e^x), without overflow and exact for very negative x."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def softmax(scores: Array) -> Array:
    """The exponentials of one row of scores, divided by their sum."""
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def halves(x: Array) -> tuple[Array, Array]:
    """The first and the second half of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def split_heads(x: Array, heads: int) -> Array:
    """(T, heads * hd) as (T, heads, hd)."""
    return x.reshape(len(x), heads, -1)


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with a prefix, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def wide(array: np.ndarray[Any, Any]) -> Array:
    """The same numbers in float64."""
    return array.astype(np.float64)


def read_folder(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """All tensors of the safetensors files of a folder in float64, and its config.json.

    A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON and
    the bytes of the tensors, row-major; a bfloat16 is the upper half of a float32.
    """
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            content = raw[start + first : start + last]
            if entry["dtype"] == "BF16":
                bits = np.frombuffer(content, "<u2").astype(np.uint32) << 16
                numbers = bits.view(np.float32)
            else:
                numbers = np.frombuffer(
                    content, {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[entry["dtype"]]
                )
            tensors[name] = wide(numbers.reshape(entry["shape"]))
    return tensors, json.loads((folder / "config.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    stored, settings = read_folder(Path(sys.argv[1]))
    last = evaluate(stored, settings, [int(word) for word in sys.argv[2:]]).logits[-1]
    for token in np.argsort(-last)[:8]:
        print(f"{token:8d}  {last[token]:+.9f}")
