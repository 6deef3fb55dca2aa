"""One call of transformers' classes: caches, padding, packing, and what they refuse."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, DynamicCache, StaticCache

from sambay.errors import ConfigError
from sambay.hf.configuration import SambaYConfig
from sambay.hf.modeling import SambaYForCausalLM
from sambay.spec import footprint, presets
from tests.hf.tiny_hf import OFFICIAL, PAD, VARIANTS, fresh_pair, padded, pair, twin
from tests.tiny import VOCAB, random_ids, tiny_model

# Logits of the tiny models are about 0.2.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-6)
WITHOUT_ATTENTION = "4xM"


def borders(length: int, rng: random.Random) -> list[int]:
    """Random chunk borders, some chunks of a single column."""
    ends = [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + rng.choice([1, 1, 2, 3, 7, 11])))
    return ends


def continued(
    model: SambaYForCausalLM, ids: Tensor, mask: Tensor, ends: list[int], cache: Cache | None
) -> Tensor:
    """All logits, (B, T, V), computed chunk after chunk."""
    parts = []
    for a, b in itertools.pairwise(ends):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def ragged(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [random_ids(1, length, seed + i)[0] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_the_language_model(name: str) -> None:
    model, other = pair(name)
    ids = random_ids(2, 19)
    assert torch.equal(other(ids).logits, model(ids))
    ids, mask = padded(ragged((19, 4)), "left")
    starts = (mask == 0).sum(1)
    assert torch.equal(other(ids, attention_mask=mask).logits, model(ids, starts=starts))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", [*VARIANTS, "sambay-2", "s-gdny"])
@torch.no_grad()
def test_cached_equals_uncached_under_left_padding_chunks_and_steps(
    name: str, static: bool
) -> None:
    _, model = pair(name)
    # Chunks and steps of the delta rule round differently: by 1e-5 (float64: 1e-14).
    close = functools.partial(assert_close, atol=3e-5) if name == "s-gdny" else assert_close
    rng = random.Random(f"{name}{static}")
    for seed in range(2):
        rows = ragged((25, rng.randrange(1, 20), rng.randrange(1, 20)), seed)
        ids, mask = padded(rows, "left")
        ends = borders(25, rng) if seed else list(range(26))
        cache = StaticCache(config=model.config, max_cache_len=27) if static else None
        logits = continued(model, ids, mask, ends, cache)
        assert torch.isfinite(logits).all()
        for row, found in zip(rows, logits, strict=True):
            expected = model(row[None], use_cache=False).logits[0]
            close(found[-len(row) :], expected, msg=f"chunks {ends}, row of {len(row)}")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_right_padded_rows_equal_the_unpadded_ones(name: str) -> None:
    """Also with a cache that is new, and in the columns of the hidden states."""
    _, model = pair(name)
    rows = ragged((14, 3, 9))
    ids, mask = padded(rows, "right")
    for use_cache in (False, True):
        out = model(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
        for index, row in enumerate(rows):
            alone = model(row[None], use_cache=False, output_hidden_states=True)
            assert_close(out.logits[index, : len(row)], alone.logits[0])
            for h, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
                assert_close(h[index, : len(row)], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sambay", OFFICIAL])
@torch.no_grad()
def test_padding_in_the_middle_of_a_row_is_as_if_it_were_not_there(name: str) -> None:
    _, model = pair(name)
    (row,) = ragged((8,))
    holes = [0, 3, 4, 9]
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, holes] = 0
    ids = torch.full((1, 12), PAD)
    ids[mask == 1] = row
    expected = model(row[None]).logits
    assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected[0])


@torch.no_grad()
def test_padding_behind_cached_columns_is_refused() -> None:
    _, model = pair("sambay")
    ids, mask = padded(ragged((6, 4)), "right")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    mask = torch.cat((mask, torch.tensor([[1], [0]])), dim=1)
    with pytest.raises(ConfigError, match="attention_mask: a row has padding behind"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4), r"shape \(2, 4\), expected \(2, 5\)"),
        ((1, 5), r"shape \(1, 5\), expected \(2, 5\)"),
        ((2, 1, 5, 5), r"shape \(2, 1, 5, 5\); give \(batch, columns\)"),
    ],
)
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    _, model = pair("sambay")
    with pytest.raises(ConfigError, match=message):
        model(random_ids(2, 5), attention_mask=torch.ones(shape))


@torch.no_grad()
def test_a_mask_must_cover_the_cache_too() -> None:
    _, model = pair("sambay")
    cache = model(random_ids(2, 5), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=r"expected \(2, 6\) \(5 in the cache and 1 new\)"):
        model(random_ids(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_arguments_that_exclude_each_other_are_refused() -> None:
    _, model = pair("sambay")
    ids = random_ids(1, 3)
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="no columns"):
        model(ids[:, :0])


@torch.no_grad()
def test_caches_that_do_not_belong_are_refused() -> None:
    _, model = pair("sambay")
    with pytest.raises(ConfigError, match=r"layer 0 is missing.*config=model.config"):
        model(random_ids(1, 3), past_key_values=DynamicCache())
    cache = model(random_ids(2, 3), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="past_key_values holds 2 rows, the input 3"):
        model(random_ids(3, 1), past_key_values=cache)
    small = StaticCache(config=model.config, max_cache_len=4)
    with pytest.raises(ConfigError, match="column 5 does not fit a static cache of 4"):
        model(random_ids(1, 5), past_key_values=small)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_positions_that_start_again_separate_packed_documents(name: str) -> None:
    _, model = pair(name)
    lengths = (7, 1, 12)
    documents = ragged(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(torch.cat(documents)[None], position_ids=positions, use_cache=False).logits[0]
    alone = [model(document[None], use_cache=False).logits[0] for document in documents]
    assert_close(packed, torch.cat(alone))
    plain = model(torch.cat(documents)[None], use_cache=False).logits[0]
    assert (plain - packed).abs().max() > 1e-3  # there was something to separate


@pytest.mark.parametrize("name", ["sambay", "mambay", OFFICIAL])
@torch.no_grad()
def test_hidden_states_are_the_embeddings_every_block_and_the_final_norm(name: str) -> None:
    native, model = pair(name)
    ids = random_ids(2, 6)
    out = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(h.shape == (2, 6, model.config.hidden_size) for h in out.hidden_states)
    embedded = native.embedding(ids) * native.config.embedding_multiplier
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(out.hidden_states[-1], native.hidden_states(ids))
    assert torch.equal(model.model(ids).last_hidden_state, out.hidden_states[-1])
    assert out.logits.shape == (2, 1, VOCAB)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["transformer++", "sambay", "mambay", OFFICIAL])
@torch.no_grad()
def test_logits_to_keep(name: str, side: str) -> None:
    _, model = pair(name)
    ids, mask = padded(ragged((9, 4, 7)), side)
    whole = model(ids, attention_mask=mask).logits
    for count in (2, 9, 20):
        kept = model(ids, attention_mask=mask, logits_to_keep=count).logits
        if side == "left" or count >= 9:
            # A row's padding holds no promise but being finite.
            assert_close(kept[0], whole[0, -count:])
            assert_close(kept[:, -1], whole[:, -1])
    last = model(ids, attention_mask=mask, logits_to_keep=1).logits[:, 0]
    ends = torch.full((3,), 8) if side == "left" else mask.sum(1) - 1
    assert_close(last, whole[torch.arange(3), ends])
    chosen = torch.tensor([7, 0, 3])
    kept = model(ids, attention_mask=mask, logits_to_keep=chosen).logits
    assert_close(kept, whole[:, chosen])


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids() -> None:
    for name in ("sambay", OFFICIAL):
        _, model = pair(name)
        ids, mask = padded(ragged((9, 4)), "right")
        embeds = model.get_input_embeddings()(ids)
        assert_close(
            model(inputs_embeds=embeds, attention_mask=mask).logits,
            model(ids, attention_mask=mask).logits,
        )


def test_labels_give_the_cross_entropy_of_the_next_token() -> None:
    _, model = pair("sambay")
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels, logits_to_keep=1)
    assert out.logits.shape == (2, 9, VOCAB)
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    assert_close(out.loss, expected)
    # Trainers that accumulate gradients divide by the tokens of all their batches.
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 50)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["sambay", "sambay-mlp", OFFICIAL])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    _, model = fresh_pair(name)
    model.train()
    ids = random_ids(2, 9)

    def gradients() -> dict[str, Any]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: value.grad for key, value in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls: list[int] = []
    block = model.model.blocks[-1]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients()
    assert len(calls) == 2, "the block did not run again in the backward pass"
    for key, value in plain.items():
        assert value.abs().sum() > 0, key
        assert_close(recomputed[key], value, msg=key)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_model_without_attention_continues_its_cache(static: bool) -> None:
    """No layer of such a cache counts columns; the mask does."""
    model = twin(tiny_model("sambay", dtype=torch.float32, layer_pattern=WITHOUT_ATTENTION))
    rows = ragged((15, 6))
    ids, mask = padded(rows, "left")
    cache = StaticCache(config=model.config, max_cache_len=20) if static else None
    logits = continued(model, ids, mask, [0, 4, 5, 12, 13, 14, 15], cache)
    for row, found in zip(rows, logits, strict=True):
        assert_close(found[-len(row) :], model(row[None], use_cache=False).logits[0])


def product_flops(model: SambaYForCausalLM, run: str, ids: Tensor) -> int:
    """What torch counts in matrix products with parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if run == "generate":
            model.generate(ids, max_new_tokens=1, do_sample=False, use_cache=True)
        elif run == "last":
            model(ids, logits_to_keep=1)
        elif run == "all":
            model(ids)
        elif run == "labels":
            model(ids, labels=ids, logits_to_keep=1)
        elif run == "hidden states":
            model(ids, output_hidden_states=True, logits_to_keep=1)
        else:
            model(ids, logits_to_keep=torch.tensor([ids.shape[1] - 1]))
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op.__name__ in ("mm", "addmm"))


@pytest.mark.parametrize("name", ["sambay", "mambay", "sambay-aa", "samba+yoco", "transformer++"])
def test_prefill_computes_one_column_behind_the_last_state(name: str) -> None:
    """arXiv 2507.06607, section 2: counted by torch, at a real depth, against the arithmetic."""
    config = presets.build(
        name, 16, vocab_size=VOCAB, hidden_size=48, intermediate_size=96, head_dim=4
    )
    model = SambaYForCausalLM(SambaYConfig.from_model_config(config)).eval()
    tokens = 50
    ids = random_ids(1, tokens)
    costs = [footprint.layer_cost(config, layer) for layer in config.layers]
    layers = 2 * sum(cost.mixer_matmul + cost.mlp for cost in costs)
    head = 2 * config.vocab_size * config.hidden_size
    share = footprint.prefill_share(config)
    skipping = round(tokens * share * layers + (1 - share) * layers) + head
    everything = tokens * (layers + head)
    assert product_flops(model, "all", ids) == everything
    assert product_flops(model, "generate", ids) == skipping
    assert product_flops(model, "last", ids) == skipping
    assert skipping < (0.97 if name == "transformer++" else 0.67) * everything
    for run in ("labels", "tensor"):
        unskipped = product_flops(model, run, ids)
        assert unskipped == everything - (head * (tokens - 1) if run == "tensor" else 0), run
    assert product_flops(model, "hidden states", ids) == everything - head * (tokens - 1)
