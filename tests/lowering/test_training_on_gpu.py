"""Compiled training on a GPU: the kernels that both graphs launch, against fp64."""

import copy
from typing import Any

import pytest
import torch

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
