"""Compiled training on a GPU: the kernels that both graphs launch, against fp64."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from kda_ops import KimiDeltaAttention
from tests.lowering.test_training import gradients
from tests.support.oracle import assert_close

pytestmark = pytest.mark.gpu

HIDDEN, T = 96, 300
CU = torch.tensor([0, 70, 70, 200, 290], dtype=torch.int32)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softplus": ({}, {}),
    "bounded": ({"lower_bound": -5.0, "safe_gate": True}, {}),
    "negative-eigenvalues": ({"allow_neg_eigval": True}, {}),
    "value-heads": ({"num_v_heads": 4}, {}),
    "sequences": ({}, {"cu_seqlens": CU}),
    "fp16": ({"dtype": torch.float16}, {}),
}


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_compiled_layer(variant: str, K: int) -> None:
    """Twice on other inputs, with the same bits for the same ones."""
    options, kwargs = VARIANTS[variant]
    torch.manual_seed(0)
    module = KimiDeltaAttention(HIDDEN, K, 2, **{"dtype": torch.bfloat16, **options})
    wide, on_device = copy.deepcopy(module).double(), copy.deepcopy(module).cuda()
    moved = {name: x.cuda() for name, x in kwargs.items()}
    call = torch.compile(on_device, fullgraph=True)
    for _ in range(2):
        x = torch.randn(1, T, HIDDEN, dtype=module.in_proj.weight.dtype).requires_grad_()
        given = x.detach().cuda().requires_grad_()
        results = gradients(call, on_device, given, **moved)
        again = gradients(call, on_device, given, **moved)
        assert all(map(torch.equal, results, again)), "two runs differ"
        low = gradients(module, module, x, **kwargs)
        high = gradients(wide, wide, x.detach().double().requires_grad_(), **kwargs)
        for result, eager, exact in zip(results, low, high, strict=True):
            assert_close(result, eager, exact, x.dtype)


# PyTorch starts its tree of graphs with an empty one
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_in_cuda_graphs() -> None:
    """Captured forward and backward, replayed with other inputs."""
    torch.manual_seed(0)
    # of two heads A_log's two gradients, sums that mostly cancel, are as good as luck has it
    module = KimiDeltaAttention(HIDDEN, 64, 8, dtype=torch.bfloat16)
    wide, on_device = copy.deepcopy(module).double(), copy.deepcopy(module).cuda()
    call = torch.compile(on_device, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    for _ in range(4):
        x = torch.randn(1, T, HIDDEN, dtype=torch.bfloat16).requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        results = gradients(call, on_device, x.detach().cuda().requires_grad_())
        results = [y.detach().clone() for y in results]
        low = gradients(module, module, x)
        high = gradients(wide, wide, x.detach().double().requires_grad_())
        for result, eager, exact in zip(results, low, high, strict=True):
            assert_close(result, eager, exact, x.dtype)
    assert counters["inductor"]["cudagraph_skips"] == 0
