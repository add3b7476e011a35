"""What the forward of a training graph on a GPU saves for its gradient, and when."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import config
from kda_ops._registry import OPERATORS
from kda_ops.delta_rule.chunk_kda.op import chunk_kda_op
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.lowering.rewrites.framework import for_virtual_gpu
from tests.lowering.test_training import gradients, stepped, whole_layer, with_states
from tests.support.oracle import assert_close
from tests.support.training import trained

REWRITE = "save_chunks"
OPS = [chunk_kda_op, chunk_kda_gated_op]
ROW = {"tiles": 64 * (3 * 64 + 64 + 128) * 2, "rows": (5 * 64 + 192) * 4, "states": 64 * 64 * 2}


def test_what_is_saved() -> None:
    """Tiles, rows and states of each chunk and head, by their bytes."""
    module, x = whole_layer()
    call, found = trained(module)
    with for_virtual_gpu():
        call(x)
    assert found.fired.count(REWRITE) == 1
    assert "chunk_kda_gated_saving" in found.operators(0)
    rows = 140 // 64 + 1
    kept = [y.nbytes for y in found.saved(1).values() if y.shape[:2] == (rows, 4)]
    assert sorted(kept) == sorted(4 * rows * size for size in ROW.values())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gradients_are_the_same(dynamic: bool) -> None:
    module, x = whole_layer()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    call, found = trained(module)
    with for_virtual_gpu():
        results = gradients(call, module, x)
    assert found.fired.count(REWRITE) == 1
    assert "chunk_kda_gated_saved_backward" in found.operators(1)
    for result, eager in zip(results, gradients(module, module, x), strict=True):
        assert_close(result, eager, eager.double(), torch.bfloat16)


def test_sequences() -> None:
    """With offsets, of which a fake implementation sees no table of chunks."""
    module, x = whole_layer()
    offsets = torch.tensor([0, 40, 40, 130], dtype=torch.int32)
    call, found = trained(module)
    with for_virtual_gpu():
        results = gradients(call, module, x, cu_seqlens=offsets)
    assert found.fired.count(REWRITE) == 1
    for result, eager in zip(
        results, gradients(module, module, x, cu_seqlens=offsets), strict=True
    ):
        assert_close(result, eager, eager.double(), torch.bfloat16)


def test_states() -> None:
    with for_virtual_gpu():
        found = stepped(with_states, torch.bfloat16)
    assert found.fired.count(REWRITE) == 1


def test_of_an_operator_alone() -> None:
    """A model that calls the fused operator itself."""
    T, H, K = 70, 2, 64
    q, k, v, x = (torch.randn(1, T, H, K, dtype=torch.bfloat16) for _ in range(4))
    beta, A_log = torch.randn(1, T, H, dtype=torch.bfloat16), torch.zeros(H)

    def call(q: Tensor, x: Tensor) -> Tensor:
        from kda_ops.fused import chunk_kda_gated

        return chunk_kda_gated(q, k, v, x, beta, A_log, qk_norm_eps=1e-6)[0]

    compiled, found = trained(call)
    inputs = [q.requires_grad_(), x.requires_grad_()]
    with for_virtual_gpu():
        out = compiled(*inputs)
        results = torch.autograd.grad(out.float().square().sum(), inputs)
    assert found.fired == [REWRITE]
    expected = torch.autograd.grad(call(*inputs).float().square().sum(), inputs)
    for result, eager in zip(results, expected, strict=True):
        assert_close(result, eager, eager.double(), torch.bfloat16)


def refusals(function: Any, *inputs: Any) -> list[str]:
    call, found = trained(function)
    with for_virtual_gpu():
        call(*inputs)
    assert REWRITE not in found.fired
    return [why for name, why in found.refused if name == REWRITE]


def test_not_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = whole_layer()
    size = 4 * 3 * sum(ROW.values())
    for allowed in (0, size - 1):
        monkeypatch.setattr(config, "saved_bytes", allowed)
        assert refusals(module, x) == [
            "saving takes more than kda_ops.config.saved_bytes, or other kernels"
        ]
    monkeypatch.setattr(config, "saved_bytes", size)
    call, found = trained(module)
    with for_virtual_gpu():
        call(x)
    assert REWRITE in found.fired


def test_not_what_is_recomputed() -> None:
    module, x = whole_layer()

    def block(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    assert refusals(block, x) == ["the forward is recomputed for its gradient"]


def test_not_on_a_cpu() -> None:
    module, x = whole_layer()
    call, found = trained(module)
    call(x)
    assert REWRITE not in found.fired
    assert REWRITE not in dict(found.refused)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_other_kernels_save_nothing(op: Any) -> None:
    """In fp32, and for sizes of heads that the fast kernels do not take."""
    saving = OPERATORS[op].saving
    assert saving is not None
    for dtype, K, applies in (
        (torch.bfloat16, 64, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 40, False),
    ):
        q = torch.empty(1, 70, 2, K, dtype=dtype)
        given = {"q": q, "v": q}
        names = [x.name for x in op._schema.arguments]
        assert saving.applies([given.get(name) for name in names]) == applies


@pytest.mark.gpu
def test_eager_code_saves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward there is more memory in use; the gradients are the same."""
    module = whole_layer()[0].cuda()
    x = torch.randn(1, 1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(x)
    held, found = [], []
    for allowed in (0, 0, 10**9):  # what is allocated once is with the first
        monkeypatch.setattr(config, "saved_bytes", allowed)
        before = torch.cuda.memory_allocated()
        out = module(x)
        held.append(torch.cuda.memory_allocated() - before)
        found.append(torch.autograd.grad((out * weight).sum(), [x, *module.parameters()]))
        del out
    rows = 1024 // 64 + 1
    assert held[2] - held[1] >= 4 * rows * sum(ROW.values()) * 0.9
    for saved, plain in zip(found[2], found[1], strict=True):
        assert_close(saved, plain, plain.cpu().double(), torch.bfloat16)


@pytest.mark.gpu
def test_an_output_that_has_been_written_is_refused() -> None:
    """The gradient would read it."""
    from kda_ops.fused import chunk_kda_gated

    inputs = [torch.randn(1, 70, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    beta, A_log = torch.randn(1, 70, 2, device="cuda"), torch.zeros(2, device="cuda")
    inputs[0].requires_grad_()
    o, _ = chunk_kda_gated(*inputs, beta, A_log, qk_norm_eps=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.mul_(2).sum().backward()
