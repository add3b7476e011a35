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

    from kda_ops.nn.context import ContextParallel

# Dimensions of the mesh, outermost first: neighbors, on the fastest links, are tensor parallel. The
# tokens of a batch, by sequences and then by parts of them, are spread over the first two, of which
# one has a single rank; the first holds replicas of the weights, the second shards.
REPLICATE, SHARD, TENSOR = "replicate", "shard", "tp"
DATA, CONTEXT = "dp", "cp"  # the first two, as they spread tokens: in a mesh of its own
TIMEOUT_S = 600  # how long a rank waits for another, which may be compiling


@dataclass(frozen=True)
class Ranks:
    """The processes, and which of them this one is.

    Attributes:
        tp: Tensor-parallel ranks.
        dp: Data-parallel ranks.
        cp: Context-parallel ranks.
        fsdp: Whether data- and context-parallel ranks share weights, gradients and optimizer.
        rank: This one, in `range(tp * cp * dp)`.
        local_rank: This one among those of its machine.
        local_world: The processes of its machine.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    fsdp: bool = False
    rank: int = 0
    local_rank: int = 0
    local_world: int = 1

    def __str__(self) -> str:
        sharing = ", FSDP2" if self.fsdp else ""
        return f"{self.dp} data x {self.cp} context x {self.tp} tensor parallel{sharing}"

    @property
    def world(self) -> int:
        """All processes."""
        return self.tp * self.cp * self.dp

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def mesh(self, device: str) -> "DeviceMesh":
        """All ranks, by `REPLICATE`, `SHARD` and `TENSOR`. A collective."""
        from torch.distributed.device_mesh import init_device_mesh

        parts = self.dp * self.cp
        sizes = (1, parts, self.tp) if self.fsdp else (parts, 1, self.tp)
        return init_device_mesh(device, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR))

    def context(self, device: str) -> "ContextParallel | None":
        """The ranks that share this one's sequences; None if it is alone. A collective."""
        if self.cp == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        from kda_ops.nn.context import ContextParallel

        sizes, names = (self.dp, self.cp, self.tp), (DATA, CONTEXT, TENSOR)
        return ContextParallel(init_device_mesh(device, sizes, mesh_dim_names=names)[CONTEXT])

    def share(self, text: Tensor) -> Tensor:
        """This rank's part of its sequences of a batch.

        Args:
            text: `[B, T + 1]`, each byte but the first the target of the one before.

        Returns:
            `[B / dp, T / cp + 1]`, with the target of the last byte too.
        """
        size = (text.shape[1] - 1) // self.cp
        row, part = divmod(self.rank // self.tp, self.cp)
        return text.chunk(self.dp)[row][:, part * size : (part + 1) * size + 1]

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
    dp = args.dp or max(1, world // (args.tp * args.cp))
    options = f"--tp {args.tp} --cp {args.cp} --dp {dp}"
    needed = args.tp * args.cp * dp
    if needed != world:
        started = f"got {world}" if "WORLD_SIZE" in environment else "got one without torchrun"
        raise Refused(
            f"{options} must run in {needed} processes, as torchrun --nproc-per-node "
            f"{needed} -m kda_ops train starts them, {started}"
        )
    if args.fsdp and args.cp * dp == 1:
        raise Refused(f"--fsdp must have --cp x --dp of at least 2, got {options}")
    if world == 1:
        return Ranks()
    rank = int(environment["RANK"])
    return Ranks(
        args.tp,
        dp,
        args.cp,
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
