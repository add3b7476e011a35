"""What training loops do to save memory: recomputing, autocast, accumulating, freezing.

Compiled graphs run as they are partitioned, without code generation (`tests/support/training.py`).
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kda_ops import KimiDeltaAttention
from tests.support.oracle import assert_close
from tests.support.training import Training, trained

T, HIDDEN, K, H = 70, 48, 16, 2
REWRITE, RECURRENCE_BACKWARD = "chunk_kda_training", "chunk_kda_gated_backward"
FORWARD = {"chunk_kda", "chunk_kda_gated"}
WAYS = ["eager", "compiled"]
ways = pytest.mark.parametrize("way", WAYS)
# torch's own, where Dynamo reads an input that is not a leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
Call = Callable[[Tensor], Tensor]


class Pair(nn.Module):
    """Two layers beside the residual stream, each called through `around`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(KimiDeltaAttention(HIDDEN, K, H, dtype=dtype) for _ in range(2))
        self.around: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.around(layer, x)
        return x


class Recorded(TorchDispatchMode):
    """Counts the package's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "kda_ops":
            self.operators.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def inputs(dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, T, HIDDEN, generator=generator).to(dtype).requires_grad_()


def gradients(call: Call, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a random projection of it: of x and of what is trained."""
    out = call(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    model.zero_grad()
    x.grad = None
    (out * weight).sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    wanted = [x, *trainable] if x.requires_grad else trainable
    return [out.detach(), *(p.grad.clone() for p in wanted)]


def assert_exact(
    found: list[Tensor], model: Pair, x: Tensor, operand_dtype: torch.dtype | None = None
) -> None:
    """Holds results to fp64, beside plain eager ones."""
    plain = copy.deepcopy(model)
    plain.around = lambda layer, x: layer(x)
    low = gradients(plain, plain, x)
    wide = copy.deepcopy(plain).double()
    high = gradients(wide, wide, x.detach().double().requires_grad_())
    for out, eager, exact in zip(found, low, high, strict=True):
        assert_close(out, eager, exact, operand_dtype)


def run(way: str, model: Pair, x: Tensor) -> tuple[list[Tensor], list[str], Training | None]:
    """The results of a way, and the operators that ran, backward ones after forward ones."""
    if way == "eager":
        with Recorded() as recorded:
            return gradients(model, model, x), recorded.operators, None
    call, graphs = trained(model)
    found = gradients(call, model, x)
    assert len(graphs.graphs) == 2
    return found, graphs.operators(0) + graphs.operators(1), graphs


@ways
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-hooks", "reentrant"])
def test_checkpoint(way: str, use_reentrant: bool) -> None:
    """Each recurrence runs twice."""
    model, x = Pair(), inputs()
    model.around = partial(checkpoint, use_reentrant=use_reentrant)
    found, operators, _ = run(way, model, x)
    assert len([name for name in operators if name in FORWARD]) == 4
    assert_exact(found, model, x)


def keep_recurrences(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Saves what the recurrences return, traced and eager, and recomputes all else."""
    recurrences = torch.ops.kda_ops.chunk_kda.default, torch.ops.kda_ops.chunk_kda_gated.default
    if operator in recurrences:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@ways
def test_selective_checkpoint(way: str) -> None:
    """No recurrence runs twice, and convolutions do."""
    model, x = Pair(), inputs()
    model.around = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, keep_recurrences),
    )
    found, operators, _ = run(way, model, x)
    assert len([name for name in operators if name in FORWARD]) == 2
    assert operators.count("short_conv") == 4
    assert_exact(found, model, x)


def test_memory_budget() -> None:
    """The smaller the budget, the more recurrences run twice and the less is saved."""
    twice, saved = [], []
    for budget in (0.0, 0.3, 1.0):
        model, x = Pair(), inputs()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            found, operators, graphs = run("compiled", model, x)
        twice.append(operators.count("chunk_kda_gated") - 2)
        assert graphs is not None
        assert graphs.fired == [REWRITE] * 2
        saved.append(sum(y.nbytes for y in graphs.saved(1).values()))
        assert_exact(found, model, x)
    assert twice == sorted(twice, reverse=True)
    assert (twice[0], twice[-1]) == (2, 0)
    assert saved == sorted(set(saved))


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(way: str, dtype: torch.dtype) -> None:
    """As near to fp64 as a model whose weights are in the lower dtype; gradients are in fp32."""
    model, x = Pair(), inputs()
    call, graphs = (model, None) if way == "eager" else trained(model)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return call(x)

    found = gradients(under_autocast, model, x)
    if graphs is not None:
        assert graphs.fired == [REWRITE] * 2
    narrow, wide = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    low = gradients(narrow, narrow, x.detach().to(dtype).requires_grad_())
    high = gradients(wide, wide, x.detach().double().requires_grad_())
    for out, eager, exact in zip(found, low, high, strict=True):
        assert_close(out, eager.float(), exact, dtype)


@ways
def test_accumulated_gradients(way: str) -> None:
    model, x = Pair(), inputs(batch=3)
    call = model if way == "eager" else trained(model)[0]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    outs = []
    for i in range(3):
        outs.append(call(x[i : i + 1]))
        (outs[-1] * weight[i : i + 1]).sum().backward()
    found = [torch.cat(outs).detach(), x.grad, *(p.grad for p in model.parameters())]
    assert_exact([y.clone() for y in found], model, x)


def test_compiled_autograd() -> None:
    """The backward is traced once more as one graph, with the compiled forward's gradients."""
    from torch._dynamo.utils import counters

    model, x = Pair(), inputs()
    call, graphs = trained(model)
    counters.clear()
    backward = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(backward):
        found = gradients(call, model, x)
    assert counters["compiled_autograd"]["captures"] == 1
    assert graphs.fired == [REWRITE] * 2
    assert_exact(found, model, x)


FROZEN = {  # parameters, then the GEMMs and the operators' gradients that they spare
    "nothing": ("^$", 0, 0),
    "projections": ("in_proj|o_proj", 4, 0),
    "convolutions": ("conv_weight", 0, 2),
    "gates": ("A_log|dt_bias|f_proj", 2, 4),
    "norms": ("o_norm", 0, 2),
    "first-layer": (r"layers\.0", 4, 4),
    "all": ("layers", 8, 8),
}


def gradient_work(graphs: Training) -> tuple[int, int]:
    """GEMMs of the backward graph, and gradients that its operators are asked for."""
    nodes = list(graphs.graphs[1].graph.nodes)
    gemms = [node for node in nodes if node.target is torch.ops.aten.mm.default]
    masks = [node.args[-1] for node in nodes if str(node.target).startswith("kda_ops.")]
    return len(gemms), sum(map(sum, masks))


@pytest.fixture(scope="module")
def whole_work() -> tuple[int, int]:
    """What a backward does for which nothing is frozen."""
    _, _, graphs = run("compiled", Pair(), inputs())
    assert graphs is not None
    return gradient_work(graphs)


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen: str, whole_work: tuple[int, int]) -> None:
    """The backward graph computes no gradient that nobody needs."""
    pattern, gemms, gradients_spared = FROZEN[frozen]
    model, x = Pair(), inputs()
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(pattern, name) is None)
    found, _, graphs = run("compiled", model, x)
    assert graphs is not None
    assert gradient_work(graphs) == (whole_work[0] - gemms, whole_work[1] - gradients_spared)
    assert_exact(found, model, x)
    eager, _, _ = run("eager", model, x)
    assert_exact(eager, model, x)


@ways
def test_a_frozen_start(way: str) -> None:
    """Where no gradient goes, no operator computes one."""
    model = Pair()
    model.layers[0].requires_grad_(False)
    x = inputs().detach()
    _, operators, _ = run(way, model, x)
    backward = [name for name in operators if name in ("chunk_kda_backward", RECURRENCE_BACKWARD)]
    assert len(backward) == operators.count("short_conv_backward") == 1
