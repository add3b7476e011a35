"""For vLLM users: a plugin that gives vLLM's Kimi KDA layer to this package's operators, and vLLM's
names for KDA states, their transfer and its two fused functions.

The functions are thin wrappers of this package's own, so that an engine can migrate one call at a
time. Names and argument order are vLLM's where the meaning is the same; where it is not, the
docstring says how it differs. Only `register` imports vLLM.
"""

from kda_ops.integrations.vllm.functions import (
    QK_NORM_EPS,
    SAFE_GATE_BOUND,
    chunk_kda_with_fused_gate,
    fused_kda_gate_chunk_cumsum,
)
from kda_ops.integrations.vllm.metadata import batch_of_metadata
from kda_ops.integrations.vllm.plugin import register
from kda_ops.integrations.vllm.states import (
    LAYOUT_VARIABLE,
    CopyStates,
    conv_state_layout,
    kda_state_copy_func,
    kda_state_dtype,
    kda_state_shape,
    kda_state_spec,
)
from kda_ops.integrations.vllm.transfer import (
    HeteroTPTransferConfig,
    MambaConvSplitInfo,
    apply_prefix_caching,
    compute_mamba_phys_ratio,
    derive_mamba_conv_split,
)

__all__ = [
    "LAYOUT_VARIABLE",
    "QK_NORM_EPS",
    "SAFE_GATE_BOUND",
    "CopyStates",
    "HeteroTPTransferConfig",
    "MambaConvSplitInfo",
    "apply_prefix_caching",
    "batch_of_metadata",
    "chunk_kda_with_fused_gate",
    "compute_mamba_phys_ratio",
    "conv_state_layout",
    "derive_mamba_conv_split",
    "fused_kda_gate_chunk_cumsum",
    "kda_state_copy_func",
    "kda_state_dtype",
    "kda_state_shape",
    "kda_state_spec",
    "register",
]
