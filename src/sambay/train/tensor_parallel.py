"""One model computed by several processes together: which rows and columns each of them holds.

The processes of a tensor group see the same rows of the batch and hold the same residual stream.
Each computes its own heads, channels and classes:

| module          | parameter              | each process holds                              |
| --------------- | ---------------------- | ----------------------------------------------- |
| attention       | q_proj                 | the rows of its query heads                     |
|                 | kv_proj                | the rows of its key heads, and of its values    |
|                 | lambdas, norm weight   | all                                             |
|                 | out_proj               | the columns of its heads; the bias              |
| Mamba           | in_proj                | the rows of its channels, in both halves        |
|                 | conv, dt_bias, A_log, D| its channels                                    |
|                 | x_proj                 | the columns of its channels                     |
|                 | dt_proj                | the rows of its channels                        |
|                 | out_proj               | the columns of its channels                     |
| GMU             | in_proj, out_proj      | the rows, the columns of its channels           |
| MLP             | in_proj                | the rows of its channels, of gates and of values|
|                 | out_proj               | the columns of its channels                     |
| embedding, head | weight                 | the rows of its classes                         |
| norms           | weight, bias           | all                                             |

Published keys, values and memories are those of the own heads and channels, which is what the
layers that read them need. Classes need not divide: the last process may have fewer.

Parameters are distributed tensors and torch's parallel styles do the sums: one behind each mixer,
MLP and the embedding, one before each mixer and MLP on the way back, and a small one each way for
the time step, B and C of Mamba. Norms are no distributed tensors: all compute the same there.

Where the rows are two halves (`halves` of the layers) torch believes that a process holds a run of
consecutive rows, while it holds a run of each half. Its strided sharding could say so, but products
of such tensors are not supported in all versions, and FSDP uses the same notion for its own cuts.
So `pieces_of` alone knows the true places, and weights are filled, saved and read through it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from sambay.layers.attention import CrossAttention, SelfAttention
from sambay.layers.gated_memory import GatedMemoryUnit
from sambay.layers.mamba import Mamba
from sambay.layers.mlp import SwiGLU
from sambay.model import LanguageModel
from sambay.train.distributed import TENSOR, World
from sambay.train.loss import VocabularyShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel.style import ParallelStyle


def split_layers(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Give every process of a tensor group its part of a model on the meta device."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        PrepareModuleOutput,
        RowwiseParallel,
        parallelize_module,
    )

    # The results are views of distributed tensors, which nobody ever writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    whole = Replicate()
    # Time step, B and C are whole everywhere, but each process uses them for channels of its own.
    # Made a distributed tensor here, their gradients are summed while they are this small.
    used_by_all = PrepareModuleOutput(
        output_layouts=whole, desired_output_layouts=whole, use_local_output=False
    )
    for block in model.blocks:
        for module in map(block.get_submodule, ("mixer", "mlp")):
            parallelize_module(module, mesh, _plan(module), src_data_rank=None)
            if isinstance(module, Mamba):
                parallelize_module(module.x_proj, mesh, used_by_all)
    # An embedding is a product with one-hot rows: split by classes, its result is summed.
    classes = RowwiseParallel(input_layouts=whole)
    parallelize_module(model.embedding, mesh, classes, src_data_rank=None)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    else:
        parallelize_module(model.head, mesh, _own_parameters(by_rows=True), src_data_rank=None)


def vocabulary_shard(model: LanguageModel, world: World) -> VocabularyShard | None:
    """The classes of this process, where the processes of a group share them."""
    if world.mesh is None or world.tensor_size == 1:
        return None
    mesh, count = world.mesh[TENSOR], model.config.vocab_size
    share = -(-count // world.tensor_size)
    return VocabularyShard(mesh.get_group(), min(mesh.get_local_rank() * share, count), count)


def _plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """How to split the parts of a mixer or an MLP."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
    )

    # torch names them by the transposed weight: "column-wise" splits rows of ours.
    rows, columns = ColwiseParallel(), RowwiseParallel()
    match module:
        case SelfAttention():
            # Both projections read one distributed input, so its gradient is summed once.
            layouts = (Replicate(), None, None, None)
            shared = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
            plan = {"": shared, "q_proj": rows, "kv_proj": rows, "out_proj": columns}
        case CrossAttention():
            plan = {"q_proj": rows, "out_proj": columns}
        case Mamba():
            plan = {
                "": _own_parameters(by_rows=True),
                "in_proj": rows,
                "x_proj": columns,
                "dt_proj": rows,
                "out_proj": columns,
            }
        case GatedMemoryUnit() | SwiGLU():
            plan = {"in_proj": rows, "out_proj": columns}
        case _:
            raise AssertionError(f"no way to split {type(module).__name__} is known")
    if isinstance(module, CrossAttention):
        plan["maps"] = _own_parameters(by_rows=False)
    return plan


def _own_parameters(*, by_rows: bool) -> ParallelStyle:
    """Split or repeat the parameters a module itself holds; it takes its part by `own_part`."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel.style import ParallelStyle

    class OwnParameters(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            place = Shard(0) if by_rows else Replicate()
            for name, parameter in list(module.named_parameters(recurse=False)):
                split = distribute_tensor(parameter, device_mesh, [place], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(split))
            return module

    return OwnParameters()
