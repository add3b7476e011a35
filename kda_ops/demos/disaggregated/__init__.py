"""Prefill and decode on different engines: real processes, real NIXL, the same tokens.

A small Kimi stack with random weights runs tensor-parallel on the CPU, each rank a process. The
prefill engine computes prompts but their last token, the decode engine reads states and keys and
values over NIXL and goes on, with prefix hits and speculative steps. One process that does all by
itself says which tokens are right.

Exits with 1 if a token differs, a hit is not what it should be, or a page is not released.
"""

from kda_ops.demos.disaggregated.serve import add_arguments, run

SUMMARY = "prefill on one engine, read its states over NIXL, decode on another"

__all__ = ["SUMMARY", "add_arguments", "run"]
