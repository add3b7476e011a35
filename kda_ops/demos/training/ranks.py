"""The processes of a run: which part of the work each has, and what they agree on."""

import argparse
import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kda_ops.demos.training.options import Refused

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Dimensions of the mesh, outermost first: neighbors, on the fastest links, are tensor parallel. The
# batch is spread over the first two, of which one has a single rank; the first holds replicas of
# the weights, the second shards. One that splits sequences belongs between these and `TENSOR`: its
# ranks have the same rows, and the mean of the losses is over them too.
REPLICATE, SHARD, TENSOR = "dp_replicate", "dp_shard", "tp"
TIMEOUT_S = 600  # how long a rank waits for another, which may be compiling


@dataclass(frozen=True)
class Ranks:
    """The processes, and which of them this one is.

    Attributes:
        tp: Tensor-parallel ranks.
        dp: Data-parallel ranks.
        fsdp: Whether the data-parallel ranks share weights, gradients and optimizer.
        rank: This one, in `range(tp * dp)`.
        local_rank: This one among those of its machine.
        local_world: The processes of its machine.
    """

    tp: int = 1
    dp: int = 1
    fsdp: bool = False
    rank: int = 0
    local_rank: int = 0
    local_world: int = 1

    def __str__(self) -> str:
        sharing = " by FSDP2" if self.fsdp else ""
        return f"{self.dp} data parallel{sharing} x {self.tp} tensor parallel"

    @property
    def world(self) -> int:
        """All processes."""
        return self.tp * self.dp

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def mesh(self, device: str) -> "DeviceMesh":
        """All ranks, by `REPLICATE`, `SHARD` and `TENSOR`. A collective."""
        from torch.distributed.device_mesh import init_device_mesh

        sizes = (1, self.dp, self.tp) if self.fsdp else (self.dp, 1, self.tp)
        return init_device_mesh(device, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR))

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's sequences of a batch."""
        return batch.chunk(self.dp)[self.rank // self.tp]

    def mean(self, losses: Tensor) -> Tensor:
        """The mean over all ranks, whose parts of the batch are of one size. A collective."""
        if self.world > 1:
            torch.distributed.all_reduce(losses)
        return losses / self.world

    def largest(self, value: int) -> int:
        """The largest of all ranks, by way of the CPU: waits for no device. A collective."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Checks that all ranks have the same options. A collective.

        Raises:
            Refused: They have not, on all of them.
        """
        if self.world == 1:
            return
        said: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(said, dict(facts))
        for name, value in said[0].items():
            for rank, other in enumerate(said):
                if other[name] != value:
                    raise Refused(
                        f"all processes must have the same {name}, "
                        f"got {value} on rank 0 and {other[name]} on rank {rank}"
                    )


def ranks_of(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Ranks:
    """The processes that torchrun started, as the options arrange them.

    Raises:
        Refused: Options and processes do not fit.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    dp = args.dp or max(1, world // args.tp)
    options = f"--tp {args.tp} --dp {dp}"
    if args.tp * dp != world:
        started = f"got {world}" if "WORLD_SIZE" in environment else "got one without torchrun"
        raise Refused(
            f"{options} must run in {args.tp * dp} processes, as torchrun --nproc-per-node "
            f"{args.tp * dp} -m kda_ops train starts them, {started}"
        )
    if args.fsdp and dp == 1:
        raise Refused(f"--fsdp must have at least 2 data-parallel processes, got {options}")
    if world == 1:
        return Ranks()
    rank = int(environment["RANK"])
    return Ranks(
        args.tp,
        dp,
        args.fsdp,
        rank,
        int(environment.get("LOCAL_RANK", rank)),
        int(environment.get("LOCAL_WORLD_SIZE", world)),
    )


def device_of(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of this rank.

    Raises:
        Refused: There are not enough.
    """
    if ranks.world == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise Refused(f"--device must be cuda in several processes, got {device}")
    if ranks.local_world > torch.cuda.device_count():
        raise Refused(
            f"{ranks.local_world} processes of a machine must have a GPU each, "
            f"it has {torch.cuda.device_count()}"
        )
    return torch.device("cuda", ranks.local_rank)


@contextmanager
def connected(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connects the processes: by gloo, and by NCCL for what is on GPUs."""
    if ranks.world == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    try:
        yield
    except Refused:  # by all ranks; after another error some may be gone, and need no farewell
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()
