"""A model spread over the processes of a run, with weights that do not depend on how.

FSDP2 shards the matrices of every block as one group and all that is left (embedding, head, norms,
convolutions, SSM parameters) as another. The first group travels and computes in bfloat16 with
precision bf16, the second always in float32: autocast in one process rounds exactly the same
values, so one process and many agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sambay.model import LanguageModel
from sambay.model.folder import materialise
from sambay.model.init import value_makers
from sambay.model.roles import halved_parameters
from sambay.train.config import Precision, RunConfig
from sambay.train.distributed import REPLICATE, SHARD, TENSOR, World
from sambay.train.pieces import pieces_of
from sambay.train.tensor_parallel import split_layers


def build_model(config: RunConfig, world: World) -> LanguageModel:
    """The freshly initialised model of a run, of which each process holds its part.

    No process ever holds more of the whole model than one parameter.
    """
    with torch.device("meta"):
        model = LanguageModel(config.model)
    makers = value_makers(model, config.init_scheme, config.seed)
    model.recompute = config.activation_checkpointing.value
    if config.compile:
        _compile_blocks(model)
    if world.mesh is None:
        empty = {id(p): torch.empty(p.shape, device=world.device) for p in model.parameters()}
        materialise(model, empty)
    else:
        parallelise(model, config, world)
        model.to_empty(device=world.device)
        if config.model.tie_embeddings:  # to_empty makes one parameter of each name
            model.head.weight = model.embedding.weight
    fill(model, makers)
    return model


def _compile_blocks(model: LanguageModel) -> None:
    """Compile the blocks one by one, each for itself."""
    # They share one function, of which torch by default keeps no more than eight versions: one for
    # each block, with and without gradients, in up to two sizes.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(model.blocks))
    torch._dynamo.config.recompile_limit = limit
    # Blocks publish views, which later layers read and never write.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:
        block.compile()


@torch.no_grad()
def fill(model: nn.Module, makers: dict[str, Callable[[], Tensor]]) -> None:
    """Give every parameter its value, or this process's part of it."""
    halved = halved_parameters(model)
    for name, parameter in model.named_parameters():
        value = makers[name]()
        for part in pieces_of(parameter, in_halves=name in halved).parts:
            part.values.copy_(value[part.place])


def parallelise(model: LanguageModel, config: RunConfig, world: World) -> None:
    """Split and shard a model on the meta device over the processes of a run."""
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    assert world.mesh is not None
    if world.tensor_size > 1:  # before FSDP, which cuts what each process of a group holds
        split_layers(model, world.mesh[TENSOR])
    replicas = world.mesh[REPLICATE].size()
    mesh = world.mesh[REPLICATE, SHARD] if replicas > 1 else world.mesh[SHARD]
    # Autocast inside the modules decides about inputs; FSDP only brings the weights.
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = narrow if config.precision is Precision.BF16 else plain
    groups: list[FSDPModule] = []
    for block in model.blocks:
        if config.compile:
            # Gathering inside of a compiled block would cut it into small graphs; so all of its
            # parameters come before it starts, and in float32, since one group has one dtype.
            groups.append(fully_shard(block, mesh=mesh, mp_policy=plain))
        else:
            matrices: list[nn.Module] = [
                module for module in block.modules() if isinstance(module, nn.Linear)
            ]
            groups.append(fully_shard(matrices, mesh=mesh, mp_policy=policy)[0])
    groups.append(fully_shard(model, mesh=mesh, mp_policy=plain, reshard_after_forward=False))
    for group in groups:
        # The loss is divided by the tokens of all processes, so gradients are summed.
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")


def release(model: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without backward leaves behind."""
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()
