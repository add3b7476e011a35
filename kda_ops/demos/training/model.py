"""A language model of bytes: blocks of Kimi Delta Attention and a gated MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kda_ops.nn.layer import KimiDeltaAttention

BYTES = 256
MLP_RATIO = 8 / 3  # three matrices as large as the two of a plain MLP of ratio 4


def mlp_width(hidden: int) -> int:
    """Width of an MLP."""
    return -(-int(MLP_RATIO * hidden) // 64) * 64


class Mlp(nn.Module):
    """A gated MLP. Rows of gate and up alternate, so that a part of them is a part of each."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        width = mlp_width(hidden)
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A mixer and an MLP, each behind a norm and beside the residual stream."""

    def __init__(self, hidden: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(hidden)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(hidden)
        self.mlp = Mlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """The loss: cross entropy of the next bytes, in nats per byte."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.logits = nn.Linear(hidden, BYTES, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.norm(x)).flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets.flatten())


class ByteModel(nn.Module):
    """Embedding, blocks, head: `(bytes [B, T + 1]) -> loss`. Needs no positions: the recurrence
    decays.
    """

    def __init__(self, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, KimiDeltaAttention(hidden, hidden // heads, heads, layer_idx=i))
            for i in range(layers)
        )
        self.head = Head(hidden)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text[:, :-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x, text[:, 1:])

    def compile_blocks(self, fullgraph: bool) -> None:
        """Compiles each block and the head, in place, without the hooks that FSDP2 adds to them.

        All blocks share one forward and one backward graph, so that compiling takes as long for one
        as for forty.
        """
        for module in (*self.blocks, self.head):
            module.forward = torch.compile(module.forward, fullgraph=fullgraph, dynamic=False)

    def replace_mixers(self, make: Callable[[KimiDeltaAttention], nn.Module]) -> None:
        """Another layer in the place of each of ours."""
        for block in self.blocks:
            block.mixer = make(block.mixer)
