"""A layer of your shapes, timed against every baseline that is installed.

What is timed is one whole layer, projections included: a prefill of --batch sequences of --tokens,
a decode step of one token for each of --batch sequences (ours from paged states, theirs from their
own caches), or a training step, forward and backward. The baselines have the same weights:

* plain PyTorch that computes token by token, as the formulas are written;
* on a GPU, this package's definitions in eager PyTorch (on a CPU they are what eager calls run);
* flash-linear-attention's layer, on a GPU;
* transformers' Kimi Linear layer, unmodified (on a CPU only without flash-linear-attention).

Calls are timed in rounds, one sample of each per round, after a warm-up in which everything
compiles. A sample is as many calls in a row as take 5 ms, by the host's clock, up to the end of the
GPU's work. The median is shown, with the middle half of the samples. "error" is the relative
(Frobenius) distance from the token-by-token result in fp32.

Exits with 1 if an error is not that of a correct result, with 2 if an option is wrong.
"""

from kda_ops.demos.bench.command import add_arguments, run

SUMMARY = "time a layer of your shapes against the baselines that are installed"

__all__ = ["SUMMARY", "add_arguments", "run"]
