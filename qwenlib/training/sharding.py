"""A model shared out over processes with FSDP2: each keeps a part of every weight, gradient and
moment, and has a block's whole weights only while it computes with them.

    model = shard(Qwen(config).initialise(0), autocast=config.autocast)
    result = train(model, by_rank(batches), next_token_loss, config)
    weights = whole_weights(model)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from qwenlib.data.sampler import MicroBatches
from qwenlib.model.transformer import Qwen
from qwenlib.training.distributed import rank, world_size


def shard(
    model: Qwen, *, replicas: int = 1, autocast: str = "none", sum_each: bool = False
) -> Qwen:
    """The same model, its parameters now DTensors of which this rank holds a part; in place.

    Make the optimiser and the weights' average afterwards. Every rank must give the same weights.
    Without a process group nothing happens. Each block is a unit, its experts with it; embedding,
    last norm and head make another, so that tied weights stay one tensor and a loss can take the
    head's weight. That unit stays whole from the forward pass to the end of the backward pass, and
    after a pass without gradients until `let_go`.

    Gradients are *summed* over ranks, not averaged: the loop divides by its own denominator.

    Args:
        replicas: groups of ranks that hold a copy of the model each (hybrid sharding): inside one
            weights are shared out, between them only gradients travel. With one group a node,
            `world_size() // int(os.environ["LOCAL_WORLD_SIZE"])`, weights stay inside a node.
        autocast: as `TrainConfig.autocast`. "bfloat16" gathers and computes with bf16 copies of the
            weights; the parts, gradients' sums and moments stay in the model's own dtype (fp32).
        sum_each: sum gradients over ranks after each micro-batch of a step. Else it is done once,
            after the last, and until then every rank holds whole gradients (4 bytes a parameter).
    Raises ValueError when the ranks do not divide into `replicas`, or autocast is undecided.
    """
    if autocast not in ("none", "bfloat16"):
        raise ValueError(f"autocast must be 'none' or 'bfloat16' here, got {autocast!r}")
    if not (dist.is_available() and dist.is_initialized()):
        return model
    weight = model.lm_head.weight
    options: dict[str, Any] = {"mesh": _mesh(weight.device.type, replicas)}
    if autocast == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=weight.dtype)
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "hidden")  # losses call it in place of forward
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no product before a sum
    model.sum_each = sum_each
    return model


def _mesh(device: str, replicas: int) -> DeviceMesh:
    ranks = world_size()
    if replicas < 1 or ranks % replicas:
        raise ValueError(f"{ranks} ranks do not divide into {replicas} replicas of the model")
    if replicas == 1:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    shape = (replicas, ranks // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` gave this rank a part of it."""
    return isinstance(model, FSDPModule)


def let_go(model: nn.Module) -> None:
    """Give up the whole weights that a pass without gradients left in a sharded model.

    Else the next pass would compute with them, whatever has become of the parts in the meantime.
    """
    if is_sharded(model):
        model.reshard()


def one_sum(model: nn.Module, micro_batches: Sequence[Any]) -> Iterator[Any]:
    """The micro-batches of a step; a sharded model sums gradients over ranks in the last alone
    (see `shard`).

    Raises ValueError when ranks have unequal numbers: their passes would wait for each other.
    """
    if not is_sharded(model):
        yield from micro_batches
        return
    let_go(model)
    ours = len(micro_batches)
    device = next(model.parameters()).device
    counts = torch.tensor([ours, -ours], device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    most, least = int(counts[0]), -int(counts[1])
    if most != least:
        raise ValueError(
            f"rank {rank()} has {ours} micro-batches, others {least} to {most}; a sharded model "
            "needs as many on each (see by_rank)"
        )
    for i, micro_batch in enumerate(micro_batches, 1):
        model.set_requires_gradient_sync(i == ours or model.sum_each)
        yield micro_batch


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, on rank 0; elsewhere it is empty.

    All ranks must call it. A model that is not sharded gives its own state dict.
    """
    if not is_sharded(model):
        return model.state_dict()
    let_go(model)
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def by_rank(batches: Callable[[int], Sequence[Any]]) -> Callable[[int], Sequence[Any]]:
    """`batches` (step -> all micro-batches of a step, the same on each rank), this rank's part.

    Rank r of R takes the r-th of R equal runs of micro-batches; when they do not divide evenly, the
    r-th part of each: what its `part(r, R)` says, or else of its rows (`rows(start, stop)`).
    Together the ranks then have each row once, in the order of one process. Alone, it is `batches`
    itself.
    """
    ranks = world_size()
    return batches if ranks == 1 else lambda step: part_of(batches(step), rank(), ranks)


def part_of(micro_batches: Sequence[Any], number: int, ranks: int) -> Sequence[Any]:
    """Part `number` of `ranks` of a step's micro-batches (see `by_rank`), made one by one.

    Raises ValueError for fewer rows than ranks, and for micro-batches that cannot be cut.
    """
    count, rest = divmod(len(micro_batches), ranks)
    if not rest:
        return MicroBatches(lambda i: micro_batches[number * count + i], count)

    def cut(i: int) -> Any:
        whole = micro_batches[i]
        if hasattr(whole, "part"):
            return whole.part(number, ranks)
        if not callable(getattr(whole, "rows", None)):
            raise ValueError(
                f"{len(micro_batches)} micro-batches do not divide into {ranks} ranks, and a "
                f"{type(whole).__name__} has neither part(number, of) nor rows(start, stop)"
            )
        rows, _ = whole.row_shape
        if rows < ranks:
            raise ValueError(f"micro-batch {i + 1} has {rows} rows, too few for {ranks} ranks")
        return whole.rows(rows * number // ranks, rows * (number + 1) // ranks)

    return MicroBatches(cut, len(micro_batches))
