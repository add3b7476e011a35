"""The core of cuDNN's frontend, forward and backward, if installed: `pip install --no-deps
nvidia-cudnn-frontend==1.32.0 apache-tvm-ffi` beside a torch for CUDA 13.

On Hopper its gradient takes one form of the problem: bf16 q and k that are normalized, the gate in
nats and beta after its sigmoid in fp32, as many heads of values as of keys, K = V = 128. So norms,
gate and sigmoid, which are in the time of every other core, are not in its time.
"""

from typing import Any

import torch
from torch import Tensor

import kda_ops
from perf.bench_core import NAMES
from perf.harness.gradients import UnavailableError, differentiated
from perf.harness.machine import version
from perf.harness.rows import Call, Inputs, Prepare

CUDNN = "cuDNN frontend"  # its name in rows begins with it


def cudnn(baseline: Any) -> dict[str, Any]:
    """A baseline under its name in reports, or nothing if it is not installed."""
    installed = version("nvidia-cudnn-frontend")
    return {} if installed is None else {f"{CUDNN} {installed}, activated gates": baseline}


def activated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw_gate: Tensor,
    raw_beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
) -> list[Tensor]:
    """What it takes, `[T, H, ...]`, of one sequence of raw projections `[1, T, H, ...]`."""
    g = kda_ops.gate(raw_gate, A_log, dt_bias, lower_bound=lower_bound)
    parts = (kda_ops.l2norm(q), kda_ops.l2norm(k), v, g, raw_beta.float().sigmoid())
    return [x.squeeze(0).contiguous() for x in parts]


def offsets_of(inputs: Inputs) -> Tensor:
    """Those of one sequence."""
    q = inputs["q"]
    return torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)


def chunks(parts: list[Tensor], offsets: Tensor) -> Tensor:
    """Its core of one sequence, `[T, H, 128]`."""
    from cudnn.linear_attention import kimi_delta_attention

    o: Tensor = kimi_delta_attention(*parts, offsets)[0]
    return o


def tried(make: Any) -> Call:
    """A call that has been made once, since plans and kernels are built by the first one.

    Raises:
        UnavailableError: It fails.
    """
    try:
        call: Call = make()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # whatever its parts raise where one is missing or refuses
        reason = f"{type(error).__name__}: {error}"
        raise UnavailableError(f"{CUDNN} cannot run here: {reason}") from error
    return call


def cudnn_core(forward: bool) -> Prepare:
    """Its gradients of what it takes; norms, gate and sigmoid are not timed."""

    def prepare(inputs: Inputs) -> Call:
        with torch.no_grad():
            raw = activated(*(inputs[name] for name in NAMES), inputs["lower_bound"])
        leaves = [x.detach().requires_grad_() for x in raw]
        offsets, do = offsets_of(inputs), inputs["do"].squeeze(0)
        return tried(lambda: differentiated(forward, leaves, lambda: chunks(leaves, offsets), do))

    return prepare


def cudnn_from_raw(inputs: Inputs) -> Call:
    """Its gradients of the raw projections, with ours of norms and gate, for their errors."""
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    offsets = offsets_of(inputs)

    def output() -> Tensor:
        return chunks(activated(*leaves, inputs["lower_bound"]), offsets).unsqueeze(0)

    return tried(lambda: differentiated(True, leaves, output, inputs["do"]))
