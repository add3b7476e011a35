"""The shipped kernel choices: measured values for known GPUs, defaults and candidates for others.

A kernel has a list of rows `(condition, values)`; the first row whose condition matches the
launcher's key is used. A condition maps keys to required values; an empty one always matches.

Upper-case values that are constants of a kernel are passed unchanged. The others size them:

* `TILE`: elements of one program's tile; the launcher divides it by the row length.
* `BYTES`: likewise, in bytes.
* `LINE`: contiguous bytes of a row across the lanes of a warp.
* `MAX_STEPS`, `PROGRAMS`: a program takes up to MAX_STEPS steps along the tokens, fewer if there
  would be fewer than PROGRAMS programs.
* `STAGES`: chunks in shared memory at a time, fewer if they do not fit.

`perf/notes/` has the measurements behind the rows of SM90, at K = V = 128.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

Values = Mapping[str, Any]
Rows = list[tuple[Values, Values]]

SM90: dict[str, Rows] = {
    "backward_prepare": [({}, {"num_warps": 4, "num_stages": 1})],
    "backward_tiles": [({}, {"num_warps": 4, "num_stages": 1})],
    "chunk_cumsum": [({}, {"BLOCK": 512, "STEP": 16, "num_warps": 4})],
    # "fused": the gate inside prepare; "separate": its own kernel, sums through memory
    "chunk_kda_gated.form": [({}, {"form": "fused"})],
    "chunk_gated_prepare": [({}, {"num_warps": 4, "num_stages": 1})],
    # with 2 stages ptxas 12.8 takes a wrong descriptor (`tests/support/sass.py`)
    "chunk_gradient": [({}, {"BK": 32, "BV": 32, "STAGES": 4, "num_warps": 4, "num_stages": 1})],
    "chunk_inputs": [({}, {"BLOCK": 32, "num_warps": 4})],
    "chunk_prepare": [({}, {"num_warps": 4, "num_stages": 1})],
    # fewer (sequence, head) pairs need narrower blocks to fill the GPU
    "chunk_scan": [
        ({"programs": 16}, {"BV": 16, "STAGES": 3, "num_warps": 4}),
        ({"programs": 32}, {"BV": 32, "STAGES": 3, "num_warps": 4}),
        ({}, {"BV": 64, "STAGES": 3, "num_warps": 4}),
    ],
    "chunk_scan_fp32": [({}, {"BV": 32, "BLOCK": 32, "num_warps": 4})],
    # at 8 heads the core is 6 % slower with 32 columns, 10 % with 128
    "chunk_segments": [({}, {"BE": 64, "STAGES": 3, "num_warps": 4})],
    "conv_split": [({}, {"BLOCK": 1024, "num_warps": 4})],
    "gate": [({}, {"TILE": 4096, "num_warps": 4})],
    # 32 loads in flight beat 16 by 6 %; 128 to 512 channels are equally fast
    "gate_cumsum": [({}, {"BLOCK": 256, "STEP": 32, "num_warps": 4})],
    # the hand-written "kernel", or the "scan" that Inductor generates
    "gate_cumsum.form": [({}, {"form": "kernel"})],
    # fewer warps where the tile is small
    "kda_decode": [
        ({"several": True}, {"TILE": 16384, "LINE": 64, "num_warps": 4}),
        ({"few": True}, {"TILE": 16384, "LINE": 64, "num_warps": 4}),
        ({}, {"TILE": 16384, "LINE": 256, "num_warps": 4}),
    ],
    "l2norm": [({}, {"TILE": 2048, "num_warps": 4})],
    # best at batch 1 to 64, 1 % slower at 256
    "recurrent_kda": [({}, {"TILE": 2048, "num_warps": 8})],
    "rms_norm_gated": [
        ({"dense": True}, {"TILE": 1024, "num_warps": 4}),
        ({}, {"TILE": 2048, "num_warps": 4}),
    ],
    # a thread owns 8 elements, whose loads are under way at once: of more, some wait for others
    "rms_norm_gated_backward": [({}, {"TILE": 1024, "PROGRAMS": 2112, "num_warps": 4})],
    # a thread owns 8 channels, 16 bytes of bf16
    "short_conv": [
        ({}, {"STEP_T": 8, "BLOCK_D": 256, "MAX_STEPS": 2, "PROGRAMS": 4096, "num_warps": 1})
    ],
    # a thread owns 2 channels: of 4 it cannot have the loads of 8 rows under way
    "short_conv_backward": [
        ({}, {"STEP_T": 8, "BLOCK_D": 128, "MAX_STEPS": 32, "PROGRAMS": 2048, "num_warps": 2})
    ],
    # 2 warps instead of 1: the norm across a head needs the registers
    "short_conv_qkv": [
        ({}, {"STEP_T": 8, "BLOCK_D": 256, "MAX_STEPS": 2, "PROGRAMS": 4096, "num_warps": 2})
    ],
    "short_conv_update": [({}, {"BLOCK_D": 256, "num_warps": 2})],
    "state_copy": [({}, {"BYTES": 32768, "num_warps": 8})],
    # as of `chunk_scan`: 16 heads are 17 % faster in blocks of 16 columns than of 32
    "states_backward": [
        ({"programs": 16}, {"BV": 16, "STAGES": 3, "num_warps": 4}),
        ({}, {"BV": 32, "STAGES": 3, "num_warps": 4}),
    ],
    # the first launch of a scan in segments, which has columns of M as well
    "states_backward.first": [({}, {"BV": 64, "STAGES": 3, "num_warps": 4})],
    "states_forward": [
        ({"programs": 16}, {"BV": 16, "STAGES": 4, "num_warps": 4}),
        ({}, {"BV": 32, "STAGES": 4, "num_warps": 4}),
    ],
    "states_forward.first": [({}, {"BV": 64, "STAGES": 4, "num_warps": 4})],
}

# By architecture: `sm_90`, or AMD's name such as `gfx942`.
TABLE: dict[str, dict[str, Rows]] = {"sm_90": SM90}

# For GPUs outside the table until something is timed, and for the CPU. The layout of the
# convolution state is not in the table: it depends on the model's sizes.
DEFAULTS: dict[str, Rows] = {
    **SM90,
    # 64 columns spill elsewhere
    "chunk_segments": [({}, {"BE": 32, "STAGES": 3, "num_warps": 4})],
    "conv_layout": [({}, {"layout": "SD"})],
}


def _grid(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


# What is timed on GPUs outside the table, besides the default. Kernels without an entry keep the
# default: their speed is secondary.
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "chunk_cumsum": _grid(BLOCK=(128, 256, 512), STEP=(16, 32), num_warps=(4,)),
    "chunk_gated_prepare": _grid(num_warps=(4, 8), num_stages=(1,)),
    "chunk_kda_gated.form": _grid(form=("fused", "separate")),
    "chunk_prepare": _grid(num_warps=(4, 8), num_stages=(1,)),
    "conv_layout": _grid(layout=("SD", "DS")),
    "chunk_scan": _grid(BV=(16, 32, 64), STAGES=(2, 3), num_warps=(4,)),
    "gate": _grid(TILE=(2048, 4096, 8192), num_warps=(4, 8)),
    "gate_cumsum": _grid(BLOCK=(128, 256, 512), STEP=(16, 32), num_warps=(4,)),
    "gate_cumsum.form": _grid(form=("kernel", "scan")),
    "kda_decode": _grid(TILE=(8192, 16384), LINE=(64, 128, 256), num_warps=(4, 8)),
    "l2norm": _grid(TILE=(1024, 2048, 4096), num_warps=(4, 8)),
    "recurrent_kda": _grid(TILE=(2048, 4096, 8192), num_warps=(4, 8)),
    "rms_norm_gated": _grid(TILE=(1024, 2048, 4096), num_warps=(4, 8)),
    "short_conv": _grid(
        STEP_T=(4, 8, 16), BLOCK_D=(256,), MAX_STEPS=(2, 8), PROGRAMS=(4096,), num_warps=(1, 2)
    ),
    "short_conv_qkv": _grid(
        STEP_T=(4, 8), BLOCK_D=(256,), MAX_STEPS=(2, 8), PROGRAMS=(4096,), num_warps=(1, 2, 4)
    ),
    "short_conv_update": _grid(BLOCK_D=(128, 256, 512), num_warps=(1, 2, 4)),
    "state_copy": _grid(BYTES=(8192, 16384, 32768), num_warps=(4, 8)),
}


def row_for(rows: Rows, key: Values) -> Values:
    """The values of the first row whose condition matches the key.

    Raises:
        LookupError: No condition matches.
    """
    for condition, values in rows:
        if all(key.get(name) == wanted for name, wanted in condition.items()):
            return values
    raise LookupError(f"no row for {dict(key)}")
