"""A language model of bytes that trains: blocks of Kimi Delta Attention and a gated MLP.

Each block compiles as one graph forward and one backward (fullgraph=True). AdamW, 20 steps of
warm-up, gradients clipped at norm 1. Prints the loss as it falls, then its curve. Without --text it
learns the help topics that come with Python.

A run is a function of its options: on the CPU --resume gives the losses, bit for bit, that one
longer run would have given. Ctrl-C ends a run after the current step; --save still saves it.

Under torchrun it trains in several processes, with gloo on CPUs and NCCL on GPUs, with the losses
of one. --resume takes what any number of them has saved.

Exits with 1 if the loss is not finite or the device is out of memory, with 2 if an option is wrong,
with 130 after Ctrl-C.
"""

from kda_ops.demos.training.command import run
from kda_ops.demos.training.options import add_arguments

SUMMARY = "train a byte-level language model of KDA blocks on a text"

__all__ = ["SUMMARY", "add_arguments", "run"]
