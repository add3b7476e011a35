"""The lowerings that are one of two forms. What is more has a file of its own beside this one."""

from kda_ops._registry import OPERATORS
from kda_ops.cache.state_copy.op import state_copy_op
from kda_ops.conv.short_conv.op import short_conv_op, short_conv_state_op
from kda_ops.conv.short_conv_qkv.op import (
    short_conv_qkv_op,
    short_conv_qkv_state_op,
    short_conv_qkv_unpacked_op,
    short_conv_qkv_unpacked_state_op,
)
from kda_ops.conv.short_conv_update.op import short_conv_update_op
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op, chunk_kda_state_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op, chunk_kda_gated_state_op
from kda_ops.delta_rule.chunk_kda_gated_affine.op import chunk_kda_gated_affine_op
from kda_ops.delta_rule.kda_decode.op import kda_decode_op, kda_decode_unpacked_op
from kda_ops.delta_rule.recurrent_kda.op import recurrent_kda_op
from kda_ops.gating.gate.op import gate_op
from kda_ops.lowering.inline import lower_to_kernel, lower_to_reference
from kda_ops.norm.l2norm.op import l2norm_op
from kda_ops.norm.rms_norm_gated.op import rms_norm_gated_op

# Pointwise work and reductions: the reference as IR, which fuses with producers and consumers.
REFERENCES = (gate_op, l2norm_op, rms_norm_gated_op)

# Hand-written kernels, on states in place: their launches on a GPU, a call elsewhere. As IR the
# taps of a convolution are shifted reads of x, which take twice the time of a sliding window in
# registers.
KERNELS = (
    chunk_kda_op,
    chunk_kda_state_op,
    chunk_kda_gated_op,
    chunk_kda_gated_state_op,
    chunk_kda_gated_affine_op,
    kda_decode_op,
    kda_decode_unpacked_op,
    recurrent_kda_op,
    short_conv_op,
    short_conv_state_op,
    short_conv_qkv_op,
    short_conv_qkv_state_op,
    short_conv_qkv_unpacked_op,
    short_conv_qkv_unpacked_state_op,
    short_conv_update_op,
    state_copy_op,
)

# Gradients with kernels of their own, which are launched from the graph likewise.
GRADIENTS = (chunk_kda_op, chunk_kda_gated_op)

for op in REFERENCES:
    lower_to_reference(OPERATORS[op])
for op in KERNELS:
    lower_to_kernel(OPERATORS[op])
for op in GRADIENTS:
    backward = OPERATORS[op].backward
    assert backward is not None
    lower_to_kernel(backward)
    saving = OPERATORS[op].saving
    assert saving is not None
    lower_to_kernel(saving.forward)
    lower_to_kernel(saving.backward)
