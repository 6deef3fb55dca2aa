"""What a model computes on the way to its logits, seen by hooks that leave it as it was.

Shape letters: B batch, T columns, D hidden, E inner, H query heads, K key heads, P head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sambay.layers.attention import SelfAttention
from sambay.layers.mamba import Mamba
from sambay.model import LanguageModel
from sambay.model.block import Block
from sambay.ops.selective_scan import selective_scan
from sambay.spec import LayerKind, LayerSpec

LOGITS = "logits"
ATTENTION_LOGITS, LARGEST_ATTENTION_LOGIT = "attention logits", "largest attention logit"
RESIDUAL = {
    4: "residual at 1/4 of the depth",
    2: "residual at 1/2 of the depth",
    1: "residual at the end",
}
# Names of the mixers by what they are, not by how the pattern writes them.
MIXER_NAMES = {
    LayerKind.SLIDING: "window attention",
    LayerKind.FULL: "full attention",
    LayerKind.GATED_MEMORY: "gated memory unit",
    LayerKind.CROSS: "cross-attention",
}

Captured = dict[str, list[Tensor]]  # one tensor per layer that has the quantity
Put = Callable[[str, Tensor], None]


def mixer_name(model: LanguageModel, layer: LayerSpec) -> str:
    """What the mixer of a layer is called in reports."""
    if layer.kind is LayerKind.MAMBA:
        return str(getattr(model.config, "recurrent_kind", "mamba")).replace("_", " ")
    return MIXER_NAMES[layer.kind]


@torch.no_grad()
def activations(model: LanguageModel, input_ids_BT: Tensor) -> Captured:
    """Every recorded activation of a forward, by quantity, one tensor per layer that has it.

    Mixers and the MLP are taken before the residual multiplier, the final norm before the logit
    multiplier; x, delta and y are the input, the time step (after its softplus) and the output
    (with the D skip, before the gate) of the scan of Mamba-1. Attention logits are those of the
    last self-attention layer, of the visible columns.
    """
    found: Captured = {}
    with _hooked(model, found):
        model.eval()
        model(input_ids_BT)
    return found


@torch.no_grad()
def updates(model: LanguageModel, first: dict[str, Tensor], input_ids_BT: Tensor) -> Captured:
    """The part of every linear map's output that is due to what its weight has learned.

    That is (W - W_first) x for the x of this forward, by the mixer and the name of the map (or
    "MLP" and its name, "embedding", "logits"); `first` holds all parameters before training.
    """
    found: Captured = {}
    owners = {
        f"blocks.{layer.index}.mixer.": mixer_name(model, layer) for layer in model.config.layers
    } | {f"blocks.{layer.index}.mlp.": "MLP" for layer in model.config.layers}

    def hook_for(quantity: str, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            change = module.get_parameter("weight") - first[name]
            apply = F.embedding if isinstance(module, nn.Embedding) else _swapped_linear
            found.setdefault(quantity, []).append(apply(inputs[0], change))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            quantity = "embedding"
        elif module is model.head:
            quantity, name = LOGITS, "embedding" if model.config.tie_embeddings else name
        elif isinstance(module, nn.Linear):
            owner = next(prefix for prefix in owners if name.startswith(prefix))
            quantity = f"{owners[owner]} {name.removeprefix(owner)}"
        else:
            continue
        handles.append(module.register_forward_hook(hook_for(quantity, f"{name}.weight")))
    with _removed(handles):
        model.eval()
        model(input_ids_BT)
    return found


def _swapped_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@contextlib.contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooked(model: LanguageModel, found: Captured) -> Iterator[None]:
    """Hooks that put what they see into `found`."""

    def put(quantity: str, value: Tensor) -> None:
        found.setdefault(quantity, []).append(value)

    def at_embedding(module: nn.Module, inputs: object, output: Tensor) -> None:
        put("embedding", output * model.config.embedding_multiplier)

    handles = [
        model.embedding.register_forward_hook(at_embedding),
        model.norm.register_forward_hook(_putting(put, "final norm")),
        model.head.register_forward_hook(_putting(put, LOGITS)),
    ]
    depth, last_own_keys = len(model.blocks), None
    ends = {depth // part - 1: quantity for part, quantity in RESIDUAL.items() if depth >= part}
    for layer, block in zip(model.config.layers, model.blocks, strict=True):
        assert isinstance(block, Block)
        handles += _block_hooks(block, layer, mixer_name(model, layer), put, ends.get(layer.index))
        if isinstance(block.mixer, Mamba):
            handles += _scan_hooks(block.mixer, put)
        if isinstance(block.mixer, SelfAttention):
            last_own_keys = block.mixer
    if last_own_keys is not None:
        handles.append(last_own_keys.maps.register_forward_pre_hook(_attention_hook(put)))
    with _removed(handles):
        yield


def _putting(put: Put, quantity: str) -> Any:
    """A hook for modules whose output is a tensor, or a tuple that begins with one."""

    def hook(module: nn.Module, inputs: object, output: Any) -> None:
        put(quantity, output[0] if isinstance(output, tuple) else output)

    return hook


def _block_hooks(
    block: Block, layer: LayerSpec, name: str, put: Put, residual: str | None
) -> list[RemovableHandle]:
    def memory(module: nn.Module, inputs: object, output: Any) -> None:
        put("memory", output[1].memory)

    hooks = [(block.mixer, _putting(put, name)), (block.mlp, _putting(put, "MLP"))]
    if residual is not None:
        hooks.append((block, _putting(put, residual)))
    if layer.publishes_memory is not None:
        hooks.append((block, memory))
    return [module.register_forward_hook(hook) for module, hook in hooks]


def _scan_hooks(mixer: Mamba, put: Put) -> list[RemovableHandle]:
    """Hooks on the two projections before the scan, which is then computed a second time."""
    before: list[Tensor] = []  # x and the projection of it, from one hook for the next

    def at_x_proj(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before[:] = [inputs[0], output]

    def at_dt_proj(module: nn.Module, inputs: object, delta_BTE: Tensor) -> None:
        x_BTE, projected = before
        _, B_BTN, C_BTN = projected.split(mixer.splits, dim=-1)
        A_EN = -torch.exp(mixer.A_log)
        y_BTE, _ = selective_scan(
            x_BTE, delta_BTE, A_EN, B_BTN, C_BTN, mixer.D, delta_bias_E=mixer.dt_bias
        )
        put("mamba x", x_BTE)
        put("mamba delta", F.softplus(delta_BTE + mixer.dt_bias))
        put("mamba y", y_BTE)

    return [
        mixer.x_proj.register_forward_hook(at_x_proj),
        mixer.dt_proj.register_forward_hook(at_dt_proj),
    ]


def _attention_hook(put: Put) -> Any:
    def at_maps(maps: Any, inputs: tuple[Any, ...]) -> None:
        q_BHTP, k_BKSP = inputs[0].float(), inputs[1].float()
        k_BHSP = k_BKSP.repeat_interleave(q_BHTP.shape[1] // k_BKSP.shape[1], dim=1)
        columns = torch.arange(q_BHTP.shape[2], device=q_BHTP.device)
        distance = columns[:, None] - columns
        visible = (distance >= 0) & (distance < (maps.window or len(columns)))
        put(ATTENTION_LOGITS, (q_BHTP @ k_BHSP.mT * maps.scale)[:, :, visible])

    return at_maps
