"""transformers' Kimi-Linear with random weights: one copy of them, in modules that are changed, and
compiled, each for itself.

The vocabulary is small: an embedding and a head, which are the same for all, take no time.
transformers picks FLA's kernels where FLA is importable, when its model is imported.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from kda_ops.demos.training.baseline import fla_version
from kda_ops.integrations.transformers import LAYERS, accelerate
from perf.bench_layer import HEAD_DIM, HEADS, HIDDEN
from perf.harness.gradients import UnavailableError
from perf.harness.machine import version
from perf.harness.rows import SEED

VOCABULARY = 4096
INTERMEDIATE = 9216  # of Kimi-Linear's dense MLP
LATENT, ROTARY = 512, 64  # of its multi-head latent attention
LAYER_TYPES = (*["linear_attention"] * 3, "full_attention")
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": len(LAYER_TYPES),
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_rope_head_dim": ROTARY,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "linear_head_dim": HEAD_DIM,
    "linear_num_heads": HEADS,
    "layer_types": list(LAYER_TYPES),
    "mlp_layer_types": ["dense"] * len(LAYER_TYPES),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODULE = LAYERS["KimiLinearDeltaAttention"]
FUNCTIONS = (  # of that module, which FLA and causal-conv1d may replace
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)


def transformers(baseline: Any) -> dict[str, Any]:
    """A baseline under its name in reports, or nothing if transformers is not installed."""
    installed, fla = version("transformers"), fla_version()
    kernels = ", no kernels" if fla is None else f" with FLA {fla}"
    return {} if installed is None else {f"transformers {installed}{kernels}": baseline}


@functools.cache
def unmodified(device: torch.device) -> Any:
    """The model in bf16, as transformers makes it. Nothing changes it.

    Raises:
        UnavailableError: This version of transformers has no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, KimiLinearConfig
    except ImportError as error:
        raise UnavailableError(f"transformers has no Kimi-Linear: {error}") from error
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(KimiLinearConfig(**CONFIG), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def sharing_weights(model: Any) -> Any:
    """Another module with the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(x): x for x in tensors})


def accelerated(device: torch.device) -> Any:
    """The same weights in a module with our layers.

    Raises:
        UnavailableError: This version of transformers is too old for them.
    """
    model = sharing_weights(unmodified(device))
    try:
        return accelerate(model)
    except ImportError as error:
        raise UnavailableError(f"transformers is too old: {error}") from error


def static_cache(model: Any, tokens: int) -> Any:
    """An empty one.

    Raises:
        UnavailableError: This version of transformers has caches of another kind.
    """
    from transformers import Cache, StaticCache

    if not hasattr(Cache, "get_conv_state"):
        raise UnavailableError("transformers is older than 5.24: its caches are others")
    return StaticCache(config=model.config, max_cache_len=tokens)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """What transformers has in PyTorch, in the place of FLA's kernels, without TF32."""
    kimi = importlib.import_module(MODULE)
    own = {name: inspect.unwrap(getattr(kimi, name)) for name in FUNCTIONS}
    with mock.patch.multiple(kimi, **own), torch.backends.cudnn.flags(allow_tf32=False):
        yield


def exact(device: torch.device) -> nn.Module:
    """The unmodified model in fp32; to be called `without_kernels`."""
    found: nn.Module = copy.deepcopy(unmodified(device)).float()
    return found
