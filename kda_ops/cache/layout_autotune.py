"""Autotunes the layout of the convolution state on the kernels that read and write it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kda_ops.tuning import choose

SEQUENCES = 64  # of the step, and of the prompts
PROMPT = 64  # tokens
EPS = 1e-5


@torch.compiler.assume_constant_result
def faster_layout(
    H: int,
    HV: int,
    K: int,
    V: int,
    W: int,
    num_spec: int,
    conv_dtype: str,
    recurrent_dtype: str,
    device: str,
) -> str:
    """`"SD"` or `"DS"`, whichever is faster for a decode step and the convolution of a batch of
    prompts at these sizes. SD where nothing can be timed.

    A constant in traced code: the arguments are numbers and names.
    """
    on = torch.device(device)

    def bench(values: dict[str, Any]) -> Callable[[], Any]:
        layout = values["layout"]
        dtype, state_dtype = (
            getattr(torch, name.removeprefix("torch.")) for name in (conv_dtype, recurrent_dtype)
        )
        D, L, tokens = 2 * H * K + HV * V, W - 1 + num_spec, 1 + num_spec
        generator = torch.Generator(on).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=on).to(dtype)

        # a page for each token of a sequence's step; the convolution state is in the first
        pages = SEQUENCES * tokens + 1
        table = torch.arange(1, pages, device=on).view(SEQUENCES, tokens)
        state_indices = table[:, 0].contiguous()
        conv = random(pages, *((L, D) if layout == "SD" else (D, L)))
        state = torch.zeros(pages, HV, V, K, dtype=state_dtype, device=on)
        weight, x = random(D, W), random(SEQUENCES * tokens, D)
        prompts = random(SEQUENCES * PROMPT, D)
        count = torch.arange(SEQUENCES + 1, device=on)
        has_initial = torch.ones(SEQUENCES, dtype=torch.bool, device=on)
        f, z, beta = (random(1, SEQUENCES * tokens, HV, *dim) for dim in ((K,), (V,), ()))
        rates, norm = torch.zeros(HV, device=on), random(V)
        step = (
            (table, torch.ones_like(state_indices), count * tokens)
            if num_spec
            else (state_indices, None, None)
        )
        ops = torch.ops.kda_ops

        def run() -> None:
            ops.short_conv.state(
                prompts,
                weight,
                None,
                "silu",
                conv,
                state_indices,
                has_initial,
                count * PROMPT,
                layout,
                None,
                None,
                0,
            )
            ops.kda_decode(
                x, conv, weight, None, "silu", f, beta, z, rates, None, None, 1.0, norm, EPS,
                EPS, K**-0.5, state, *step, "VK", layout,
            )  # fmt: skip

        return run

    values = choose(
        "conv_layout",
        on,
        bench=bench,
        H=H,
        HV=HV,
        K=K,
        V=V,
        W=W,
        num_spec=num_spec,
        conv=conv_dtype,
        recurrent=recurrent_dtype,
    )
    return str(values["layout"])
