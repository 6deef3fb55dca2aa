"""Official Phi4Flash checkpoints whose every number comes from a formula anyone can repeat.

docs/porting.md states the same formula in prose with a test vector. `salt` goes into the names
that are hashed, so that tests can have as many different checkpoints as they like.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MASK = (1 << 64) - 1
FLOAT32_SUFFIXES = ("A_log", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def official_config(**fields: Any) -> dict[str, Any]:
    """The fields of the published config.json, at a size for tests; depth 8 is M S M S M F U X."""
    return {
        "architectures": ["Phi4FlashForCausalLM"],
        "model_type": "phi4flash",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-5,
        "lm_head_bias": False,
        "max_position_embeddings": 4096,
        "mb_per_layer": 2,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 61,
    } | fields


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official tensor name of this configuration and its shape, in the published order."""
    w, wide = config["hidden_size"], config["intermediate_size"]
    depth, inner = config["num_hidden_layers"], config.get("mamba_expand", 2) * w
    states, width = config.get("mamba_d_state", 16), config.get("mamba_d_conv", 4)
    rank = -(-w // 16)
    head = w // config["num_attention_heads"]
    rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], w)}
    for index in range(depth):
        layer = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table |= {f"{layer}{norm}.weight": (w,), f"{layer}{norm}.bias": (w,)}
        table |= {f"{layer}mlp.fc1.weight": (2 * wide, w), f"{layer}mlp.fc2.weight": (w, wide)}
        attn = f"{layer}attn."
        if index % 2 == 0 and index <= depth // 2:
            table |= {
                f"{attn}A_log": (inner, states),
                f"{attn}D": (inner,),
                f"{attn}in_proj.weight": (2 * inner, w),
                f"{attn}conv1d.weight": (inner, 1, width),
                f"{attn}conv1d.bias": (inner,),
                f"{attn}x_proj.weight": (rank + 2 * states, inner),
                f"{attn}dt_proj.weight": (inner, rank),
                f"{attn}dt_proj.bias": (inner,),
                f"{attn}out_proj.weight": (w, inner),
            }
        elif index % 2 == 0:
            table |= {f"{attn}in_proj.weight": (inner, w), f"{attn}out_proj.weight": (w, inner)}
        else:
            own = rows if index <= depth // 2 + 1 else w
            table |= {
                f"{attn}Wqkv.weight": (own, w),
                f"{attn}Wqkv.bias": (own,),
                f"{attn}out_proj.weight": (w, w),
                f"{attn}out_proj.bias": (w,),
                **{
                    f"{attn}inner_cross_attn.lambda_{name}": (head,)
                    for name in ("q1", "k1", "q2", "k2")
                },
                f"{attn}inner_cross_attn.subln.weight": (2 * head,),
            }
    table |= {"model.final_layernorm.weight": (w,), "model.final_layernorm.bias": (w,)}
    if not config["tie_word_embeddings"]:
        table["lm_head.weight"] = (config["vocab_size"], w)
    return table


def tensors(config: Mapping[str, Any], salt: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of the checkpoint, float64; each value is exact in bfloat16 too."""
    return {name: fill(name, shape, salt) for name, shape in shapes(config).items()}


def fill(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray[Any, Any]:
    """One tensor by the formula: seven hashed bits per element, placed by the kind of tensor."""
    k = hashed_bits(salt + name, int(np.prod(shape))).astype(np.float64).reshape(shape)
    centred = (2 * k - 127) / 128  # odd numerators -127 .. 127
    last = name.split(".")[-2:]
    if last[-1] == "A_log":
        return k / 64
    if last == ["dt_proj", "bias"]:
        return -(64 + k) / 32
    if last[-1] == "D" or (last[-1] == "weight" and "norm" in name) or "subln" in name:
        return (64 + k) / 128
    if last[-1] == "bias":
        return centred / 4
    if last[-1].startswith("lambda"):
        return centred / 2
    if last[0] in ("embed_tokens", "lm_head"):  # small, or the last token would predict itself
        return centred / 8
    fan_in = shape[-1]
    exponent = 0
    while 4 ** (exponent + 1) <= fan_in:
        exponent += 1
    return centred / 2**exponent


def hashed_bits(name: str, count: int) -> np.ndarray[Any, Any]:
    """`count` integers of 0 .. 127: FNV-1a of the name plus SplitMix64 of the position."""
    start = fnv1a(name)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64 by intent
        z = np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z >> np.uint64(57)


def fnv1a(name: str) -> int:
    """The 64-bit FNV-1a hash of the UTF-8 bytes of a name."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def write_folder(
    folder: Path, config: Mapping[str, Any], values: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """The checkpoint as an official folder, in the official dtypes (bfloat16, some float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    payload = bytearray()
    for name, array in values.items():
        bits = array.astype(np.float32).view(np.uint32)
        if name.endswith(FLOAT32_SUFFIXES):
            dtype, content = "F32", bits.tobytes()
        else:
            assert not np.any(bits & np.uint32(0xFFFF)), f"{name} is not exact in bfloat16"
            dtype, content = "BF16", (bits >> np.uint32(16)).astype("<u2").tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(payload), len(payload) + len(content)],
        }
        payload += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)
