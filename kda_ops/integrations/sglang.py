"""A plugin of SGLang: prompts of its KDA layers run on this package's chunked operator.

SGLang calls `register` at its start, in every process, as an entry point of the group
`sglang.srt.plugins`. It hooks one method, `extend` of SGLang's Triton KDA kernel, which gets q, k
and v after their convolution. A decode step stays SGLang's: the convolution before it and the norm
after it are called apart, so that this package's fused step does not fit between them.

What was read for it, in SGLang 0.5.23, below `sglang/srt/`:

* `plugins/__init__.py`, `plugins/hook_registry.py`: plugins and hooks
* `layers/attention/linear/kda_backend.py`, `kda_prefill_graph.py`: who calls the kernels
* `layers/attention/linear/kernels/kda_triton.py`, `kernel_backend.py`: the method that is hooked
* `mem_cache/allocator/mamba.py`: slot 0 is nobody's
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kda_ops._numerics import QK_NORM_EPS
from kda_ops._versions import why_unknown
from kda_ops.delta_rule.chunk_kda_gated import chunk_kda_gated

log = logging.getLogger(__name__)

READ = "0.5.23"  # the version whose source was read
EXTEND = "sglang.srt.layers.attention.linear.kernels.kda_triton.TritonKDAKernel.extend"


def register(*, any_version: bool = False) -> bool:
    """Lets SGLang run the prompts of KDA layers with `kda_ops.fused.chunk_kda_gated`.

    The entry point of the plugin; `SGLANG_PLUGINS` says which plugins SGLang loads. Does nothing
    but log a warning without SGLang, or in a version of it that was not read.

    Args:
        any_version: Also in versions of SGLang that were not read.

    Returns:
        Whether SGLang hooks the method when it has loaded its plugins.
    """
    reason = why_unknown("SGLang", READ, any_version)
    if reason is None:
        try:
            hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
            hooks.HookRegistry.register(EXTEND, extend, hooks.HookType.AROUND)
        except (ImportError, AttributeError) as error:
            reason = f"this SGLang has another interface: {error}"
    if reason is not None:
        log.warning("kda_ops leaves SGLang's KDA kernels as they are: %s", reason)
    return reason is None


def extend(
    original: Callable[..., Any],
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,
) -> Any:
    """The hook: prompts, or chunks of them, on SGLang's own states.

    SGLang's kernel runs where the result is more than the output: where states inside of a prompt
    are wanted for the prefix cache, and for drafts, whose states are rolled back.

    Args:
        original: SGLang's method.
        kernel: The object it belongs to.
        q: `[1, T, H, K]`, convolved and not normalized.
        k: `[1, T, H, K]`, likewise.
        v: `[1, T, HV, V]`, convolved.
        g: `[1, T, HV, K]`, the gate's input.
        beta: `[1, T, HV]`, before its sigmoid if `beta_is_raw`.
        **options: SGLang's other arguments. Of these are used `A_log`, `dt_bias`, `lower_bound`,
            `query_start_loc [N + 1]`, `cache_indices [N]` and `ssm_states [slots, HV, V, K]`, which
            are written in place; negative slots and slot 0 are padding.

    Returns:
        `[1, T, HV, V]`, or what SGLang's method returns.

    Raises:
        ValueError: As `chunk_kda_gated`.
    """
    more = (
        options.get("track_state") is not None
        or options.get("return_intermediate_states")
        or options.get("is_spec_decode")
    )
    raw = options.get("A_log") is not None and options.get("beta_is_raw")
    if more or not raw:
        return original(kernel, q, k, v, g, beta, **options)
    o, _ = chunk_kda_gated(
        q,
        k,
        v,
        g,
        beta,
        options["A_log"],
        options["dt_bias"],
        lower_bound=options.get("lower_bound"),
        qk_norm_eps=QK_NORM_EPS,
        cu_seqlens=options["query_start_loc"],
        state=options["ssm_states"],
        state_indices=options["cache_indices"],
    )
    return o
