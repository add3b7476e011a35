"""Accelerated models of transformers under `torch.compile`: one graph, few, the right numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from kda_ops.integrations.transformers import KDALayer, accelerate, restore
from tests.support.fake_cuda import cuda_code, summary
from tests.support.transformers_models import (
    bailing,
    glm,
    kimi,
    kimi_moe,
    prompt,
    relative_error,
)

FP32 = 2e-6  # of the largest logit
TWO_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense"],
}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}


class Compiled:
    """A model in one graph per call, and how many graphs there are. Graphs run as they were traced:
    what Inductor makes of the operators is tested with them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counter = CompileCounterWithBackend("eager")
        self.call = torch.compile(model, backend=self.counter, fullgraph=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self.call(*args, **kwargs)[0]

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


def new_cache(model: Any, kind: str) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=160)
    return DynamicCache(config=model.config) if kind == "dynamic" else None


def steps(run: Callable[..., Tensor], model: nn.Module, kind: str) -> list[Tensor]:
    """Prefill with and without a mask, then more of the prompt, then two decode steps."""
    ids, mask = prompt(2, 79), torch.ones(2, 79, dtype=torch.long)
    mask[0, :5] = 0
    found = [run(ids[:, :70], cache=new_cache(model, kind), use_cache=kind != "none")]
    cache = new_cache(model, kind)
    masked = {"attention_mask": mask[:, :70]}
    found.append(run(ids[:, :70], cache=cache, use_cache=kind != "none", **masked))
    if cache is None:
        return found
    for first, last in ((70, 77), (77, 78), (78, 79)):
        masked = {"attention_mask": mask[:, :last]}
        found.append(run(ids[:, first:last], cache=cache, **masked))
    return found


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", ["kimi", "kimi_moe", "bailing"])
def test_one_graph(name: str, kind: str) -> None:
    build = {
        "kimi": lambda: kimi(**TWO_LAYERS),
        "kimi_moe": lambda: kimi_moe(**{**TWO_LAYERS, **SPARSE}),
        "bailing": lambda: bailing(**TWO_LAYERS),
    }[name]
    model = build()
    with torch.no_grad():
        expected = steps(lambda *args, **kwargs: model(*args, **kwargs)[0], model, kind)
    compiled = Compiled(accelerate(model))
    for found, logits in zip(steps(compiled, model, kind), expected, strict=True):
        assert relative_error(found, logits) < FP32


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_two_graphs_for_all_lengths(kind: str) -> None:
    """The second is for any number of tokens."""
    model = accelerate(kimi(**TWO_LAYERS))
    compiled = Compiled(model)
    for tokens in (64, 100, 130):
        ids = prompt(2, tokens)
        found = compiled(ids, cache=new_cache(model, kind), use_cache=kind != "none")
        with torch.no_grad():
            assert relative_error(found, model(ids, use_cache=False)[0]) < FP32
    assert compiled.graphs <= 2


@pytest.mark.parametrize("name", ["kimi", "bailing"])
def test_attention_of_a_prompt_has_no_mask(name: str) -> None:
    """Its kernels skip what the causal flag rules out; padding and packed sequences need a mask."""
    model, ids = {"kimi": kimi, "bailing": bailing}[name](**TWO_LAYERS), prompt(2, 70)
    padding, positions = torch.ones_like(ids), torch.arange(70).remainder(40)[None]
    padding[0, :5] = 0
    given: list[tuple[dict[str, Any], bool]] = [
        ({"use_cache": False}, True),
        ({"use_cache": True}, True),
        ({"attention_mask": padding}, False),
        ({"position_ids": positions, "use_cache": False}, False),
    ]
    for kwargs, flag in given:
        with torch.no_grad():
            expected = model(ids, **copy.deepcopy(kwargs))[0]
        compiled = Compiled(accelerate(model))
        assert relative_error(compiled(ids, **kwargs), expected) < FP32
        (attention,) = [
            node
            for node in compiled.counter.graphs[-1].graph.nodes
            if node.target is torch.nn.functional.scaled_dot_product_attention
        ]
        assert attention.kwargs["is_causal"] is flag
        assert (attention.kwargs["attn_mask"] is None) is flag
        restore(model)


def test_decode_steps_share_a_graph() -> None:
    model = accelerate(kimi(**TWO_LAYERS))
    compiled, cache, ids = Compiled(model), new_cache(model, "static"), prompt(2, 80)
    compiled(ids[:, :70], cache=cache)
    for token in ids[:, 70:].split(1, dim=1):
        compiled(token, cache=cache)
    assert compiled.graphs == 2


@pytest.mark.parametrize("build", [kimi, bailing])
def test_a_decode_step_is_one_kernel_on_a_gpu(build: Callable[[], nn.Module]) -> None:
    """On the cache's own tensors, besides what belongs to the projections."""
    model = accelerate(build())
    layer = next(x for x in model.modules() if isinstance(x, KDALayer))
    cache, x = DynamicCache(config=model.config), torch.randn(2, 71, 32)
    with torch.no_grad():
        layer(x[:, :70], cache=cache)
        eager = copy.deepcopy(cache)
        found, (code,) = cuda_code(lambda y: layer(y, cache=cache), x[:, 70:])
        expected = layer(x[:, 70:], cache=eager)
    assert relative_error(found, expected) < FP32
    kernels = [name for name in summary(code).launches if not name.startswith("triton")]
    assert kernels == ["kda_decode_kernel"]


@pytest.mark.parametrize("build", [glm, bailing])
def test_layers_have_no_breaks(build: Callable[[], nn.Module]) -> None:
    """Each layer for itself, where the model around it may break."""
    model = build()
    layer = next(x for x in accelerate(model).modules() if isinstance(x, KDALayer))
    pieces = torch.randn(2, 75, 32).split([70, 3, 1, 1], dim=1)
    mask = torch.ones(2, 70)
    mask[0, :5] = 0

    def outputs(run: Callable[..., Tensor]) -> Tensor:
        cache = DynamicCache(config=model.config)
        masks = [{"attention_mask": mask}, {}, {}, {}]
        with torch.no_grad():
            found = [run(x, cache=cache, **m) for x, m in zip(pieces, masks, strict=True)]
        return torch.cat(found, dim=1)

    found = outputs(torch.compile(layer, backend="eager", fullgraph=True))
    assert relative_error(found, outputs(restore(layer))) < FP32


def test_a_change_of_class_compiles_anew() -> None:
    model, ids = kimi(**TWO_LAYERS), prompt(1, 20)
    compiled = Compiled(model)
    expected = compiled(ids, use_cache=False)
    accelerate(model)
    found = compiled(ids, use_cache=False)
    assert compiled.graphs == 2
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < FP32
    restore(model)
    found = compiled(ids, use_cache=False)
    assert compiled.graphs == 2
    assert torch.equal(found, expected)


def test_inductor() -> None:
    """The whole way once: a prefill, and decode steps that follow it."""
    model, ids = kimi(**TWO_LAYERS), prompt(2, 72)
    with torch.no_grad():
        expected = model(ids, use_cache=False)[0]
    compiled = torch.compile(accelerate(model), fullgraph=True)
    cache = new_cache(model, "static")
    with torch.no_grad():
        pieces = ids.split([70, 1, 1], dim=1)
        found = torch.cat([compiled(piece, cache=cache)[0] for piece in pieces], dim=1)
    assert relative_error(found, expected) < FP32


def test_training() -> None:
    """Gradients of a compiled layer are those of the unmodified one."""
    layer = next(x for x in accelerate(kimi()).modules() if isinstance(x, KDALayer))
    x = torch.randn(2, 70, 32)

    def gradients(run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        layer.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 1, y.numel()).cos().view_as(y)).sum().backward()
        return {name: p.grad.clone() for name, p in layer.named_parameters()}

    found = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    expected = gradients(restore(layer))
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 5e-5, name


class Logits(nn.Module):
    """A model as a function of its tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("make", [kimi, bailing])
def test_exported_for_any_length(make: Callable[..., Any]) -> None:
    model = make(**TWO_LAYERS).requires_grad_(False)
    shapes = {"ids": {1: torch.export.Dim("tokens", max=512)}}
    program = torch.export.export(
        Logits(accelerate(model)), (prompt(1, 70),), dynamic_shapes=shapes
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "kda_ops.chunk_kda_gated.default" in called
    restore(model)
    for tokens in (70, 130):
        ids = prompt(1, tokens)
        assert relative_error(program.module()(ids), Logits(model)(ids)) < FP32
