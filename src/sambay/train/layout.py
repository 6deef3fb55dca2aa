"""How a number of processes is cut into replicas, shards and tensor groups. Imports no torch."""

from __future__ import annotations

from sambay.errors import ConfigError
from sambay.spec import RecurrentKind
from sambay.train.config import RunConfig


def sizes_for(config: RunConfig, size: int) -> tuple[int, int, int]:
    """(replicate, shard, tensor) for this many processes.

    Raises:
        ConfigError: the sizes do not multiply to `size`, or do not divide the batch or the model.
    """
    parallel = config.parallel
    fixed = parallel.replicate * parallel.tensor
    shard = size // fixed if parallel.shard is None else parallel.shard
    if fixed * shard != size:
        sizes = f"replicate={parallel.replicate} shard={parallel.shard} tensor={parallel.tensor}"
        raise ConfigError(
            f"parallel: {sizes} do not multiply to the {size} processes of this run; start "
            "another number of processes or change parallel.shard"
        )
    rows = config.batch.global_batch_size
    if rows % (parallel.replicate * shard):
        raise ConfigError(
            f"batch.global_batch_size = {rows} cannot be divided among parallel.replicate x "
            f"parallel.shard = {parallel.replicate * shard} processes; use a multiple of it, "
            "fewer processes or a larger parallel.tensor"
        )
    _check_tensor_size(config)
    return parallel.replicate, shard, parallel.tensor


def _check_tensor_size(config: RunConfig) -> None:
    model, size = config.model, config.parallel.tensor
    if size > 1 and model.recurrent_kind is not RecurrentKind.MAMBA:
        raise ConfigError(
            f"parallel.tensor = {size}: layers of model.recurrent_kind = '{model.recurrent_kind}' "
            "cannot be divided among processes; set parallel.tensor=1 and use parallel.shard"
        )
    heads = 2 if model.attention_variant == "differential" else 1  # they work in pairs
    for name, value, unit in (
        ("num_heads", model.num_heads, heads),
        ("num_kv_heads", model.num_kv_heads, heads),
        ("intermediate_size", model.intermediate_size, 1),
        ("hidden_size", model.d_inner, 1),
    ):
        if value % (size * unit):
            what = f"{value} inner channels" if name == "hidden_size" else f"{value}"
            pairs = " in whole pairs of heads" if unit == 2 else ""
            raise ConfigError(
                f"model.{name}: {what} cannot be divided among parallel.tensor = {size} "
                f"processes{pairs}; use a parallel.tensor that divides it"
            )
    if (size - 1) * -(-model.vocab_size // size) >= model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {model.vocab_size} classes leave none for the last of "
            f"parallel.tensor = {size} processes; use a smaller parallel.tensor"
        )
