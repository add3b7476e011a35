"""flash-linear-attention's KDA, computed by this package's operators.

    patch()  # `unpatch()` undoes it

The functions here have the names, signatures and defaults of flash-linear-attention 0.6 (MIT,
https://github.com/fla-org/flash-linear-attention); `patch` puts them in their places. Its layers
then run on a CPU too, and compile without graph breaks. Only `patch`, `unpatch` and
`register_backend` import `fla`.

Shapes are FLA's: states `[N, HV, K, V]`, or `[N, HV, V, K]` with `state_v_first`, convolution
states `[N, D, W]`.
"""

from kda_ops.integrations.fla.convolutions import (
    causal_conv1d,
    causal_conv1d_update,
    repad_hidden_states,
    short_convolution_forward,
    short_convolution_step,
    unpad_hidden_states,
)
from kda_ops.integrations.fla.patching import patch, register_backend, unpatch
from kda_ops.integrations.fla.pointwise import (
    fused_kda_gate,
    fused_rms_norm_gated_forward,
    kda_gate_chunk_cumsum,
    l2norm,
)
from kda_ops.integrations.fla.recurrence import (
    chunk_kda,
    fused_recurrent_kda,
    fused_recurrent_kda_fwd,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_kda",
    "fused_kda_gate",
    "fused_recurrent_kda",
    "fused_recurrent_kda_fwd",
    "fused_rms_norm_gated_forward",
    "kda_gate_chunk_cumsum",
    "l2norm",
    "patch",
    "register_backend",
    "repad_hidden_states",
    "short_convolution_forward",
    "short_convolution_step",
    "unpad_hidden_states",
    "unpatch",
]
