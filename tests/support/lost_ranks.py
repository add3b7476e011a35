"""What one rank of `tests/nn/test_parallel.py` runs where a rank is lost or means something else:
`python -m tests.support.lost_ranks RANK WORLD STORE WHEN`. Prints the error, as JSON.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kda_ops import KimiDeltaAttention
from kda_ops.nn import parallelize
from tests.support.processes import connect

TIMEOUT_S = 10
WHEN = ("before sharding", "before a backward", "another mesh")


def die(rank: int) -> None:
    if rank == 1:
        os._exit(0)


def main(rank: int, world: int, when: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    other = init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))["tp"]
    if when == "before sharding":
        die(rank)
    layer = KimiDeltaAttention(32, 8, 4)
    parallelize(layer, other if when == "another mesh" and rank == 1 else mesh)
    if when == "another mesh":  # alone with its mesh, a rank finds out when it next meets another
        dist.barrier()
    x = torch.randn(1, 8, 32, requires_grad=True)
    out = layer(x)
    if when == "before a backward":
        die(rank)
    out.sum().backward()


if __name__ == "__main__":
    connect(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], TIMEOUT_S)
    error = None
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4])
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    print(json.dumps(error), flush=True)
    os._exit(0)  # no farewell to ranks that are gone
