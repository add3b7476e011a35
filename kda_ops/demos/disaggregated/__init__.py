"""Prefill and decode on different engines: real processes, real NIXL, the same tokens.

A small Kimi stack with random weights runs tensor-parallel on the CPU, one process per rank. The
prefill engine computes all of a prompt but its last token, the decode engine reads states, keys and
values over NIXL and continues, with prefix hits and speculative steps. A single-process run gives
the expected tokens.

Exits with 1 if a token differs, a prefix hit is not as expected, or a page is not released.
"""

from kda_ops.demos.disaggregated.serve import add_arguments, run

SUMMARY = "prefill on one engine, read its states over NIXL, decode on another"

__all__ = ["SUMMARY", "add_arguments", "run"]
