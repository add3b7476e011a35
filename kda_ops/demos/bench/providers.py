"""Who computes the layer: ours in each way, and the baselines that can run here."""

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kda_ops import config
from kda_ops._versions import version
from kda_ops.cache.batch import KDABatch
from kda_ops.demos.bench.naive import naive_layer
from kda_ops.demos.training.baseline import fla_layer, fla_version
from kda_ops.nn.layer import KimiDeltaAttention

NAIVE = "PyTorch, token by token"
NAIVE_TOKENS = 512  # of a training step: every token's state is kept for the gradient


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        kind: `"prefill"`, `"decode"` or `"train"`.
        layer: The layer.
        x: `[batch, tokens, hidden]`; for a decode step `[1, batch, hidden]`.
    """

    kind: str
    layer: KimiDeltaAttention
    x: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device


class LeftOut(Exception):
    """Why a provider does not take part."""


Call = Callable[[], Tensor]
Make = Callable[[Task], Call]


def providers(task: Task, compiled: bool, eager: bool) -> Iterator[tuple[str, Make]]:
    """Names, and functions that return a call or raise `LeftOut`."""
    if compiled:
        yield "kda_ops, compiled", ours_compiled
    if eager:
        yield "kda_ops, eager", ours
    if task.device.type == "cuda":
        yield "definitions in PyTorch", definitions
    yield NAIVE, naive
    yield f"FLA {fla_version() or ''}".strip(), fla
    yield f"transformers {version('transformers') or ''}".strip(), transformers


def on(task: Task, forward: Callable[[Tensor], Tensor], weights: nn.Module) -> Call:
    """A call of what maps hidden states to the output, and for training its gradients."""
    if task.kind != "train":

        def call() -> Tensor:
            with torch.no_grad():
                return forward(task.x)

        return call

    x = task.x.clone().requires_grad_()
    gradient = torch.randn_like(task.x)
    trained = [x, *weights.parameters()]

    def step() -> Tensor:
        for p in trained:
            p.grad = None
        out = forward(x)
        out.backward(gradient)
        return out.detach()

    return step


def stepping(task: Task, layer: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """A decode step of ours, from pages that it writes."""
    count = task.x.shape[1]
    state = task.layer.state_spec().allocate(count + 1, device=task.device)
    batch = KDABatch.decode(range(1, count + 1), device=task.device)
    return lambda x: layer(x, state=state, batch=batch)


def ours(task: Task) -> Call:
    forward = stepping(task, task.layer) if task.kind == "decode" else task.layer
    return on(task, forward, task.layer)


def ours_compiled(task: Task) -> Call:
    layer = torch.compile(task.layer, fullgraph=True)
    return on(task, stepping(task, layer) if task.kind == "decode" else layer, task.layer)


def definitions(task: Task) -> Call:
    eager = ours(task)

    def call() -> Tensor:
        with config.reference():
            return eager()

    return call


def naive(task: Task) -> Call:
    if task.kind == "train" and task.x.shape[1] > NAIVE_TOKENS:
        raise LeftOut(f"it keeps every token's state, for {NAIVE_TOKENS} tokens at most")
    return on(task, lambda x: by_sequence(task, x, task.layer), task.layer)


def by_sequence(task: Task, x: Tensor, layer: KimiDeltaAttention) -> Tensor:
    """The naive layer; a decode step's row of tokens is as many sequences."""
    if task.kind == "decode":
        return naive_layer(layer, x.transpose(0, 1)).transpose(0, 1)
    return naive_layer(layer, x)


def exact(task: Task) -> Tensor:
    """The token-by-token result in fp32, for the first call of a provider."""
    with torch.no_grad():
        return by_sequence(task, task.x.float(), copy.deepcopy(task.layer).float())


def fla(task: Task) -> Call:
    if fla_version() is None:
        raise LeftOut("not installed")
    if task.device.type != "cuda":
        raise LeftOut("its kernels need a GPU")
    if task.layer.num_heads != task.layer.num_v_heads:
        raise LeftOut("only with as many value heads as heads")
    theirs = fla_layer(task.layer).to(task.device)
    if task.kind != "decode":
        return on(task, lambda x: theirs(x)[0], theirs)
    theirs.eval()
    theirs.layer_idx = 0
    cache = importlib.import_module("fla.models.utils").Cache()

    def step(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)
        return theirs(rows, past_key_values=cache, use_cache=True)[0].transpose(0, 1)

    return from_zero(task, step, lambda: cache[0])


def transformers(task: Task) -> Call:
    if importlib.util.find_spec("transformers") is None:
        raise LeftOut("not installed")
    if importlib.util.find_spec("transformers.models.kimi_linear") is None:
        raise LeftOut("it has no Kimi Linear")
    if fla_version() is not None and task.device.type != "cuda":
        raise LeftOut("where FLA is installed it needs a GPU")
    layer = task.layer
    if layer.num_heads != layer.num_v_heads or layer.lower_bound is not None:
        raise LeftOut("only with the softplus gate and as many value heads as heads")
    theirs = transformers_layer(layer).to(task.device)
    if task.kind != "decode":
        return on(task, theirs, theirs)
    cache = importlib.import_module("transformers").DynamicCache(config=theirs.config)

    def step(x: Tensor) -> Tensor:
        return theirs(x.transpose(0, 1), cache).transpose(0, 1)

    return from_zero(task, step, lambda: [cache.get_conv_state(0), cache.get_recurrent_state(0)])


def from_zero(task: Task, step: Callable[[Tensor], Tensor], states: Callable[[], Any]) -> Call:
    """A decode step with a dense cache of theirs, whose states a first token has made."""
    call = on(task, step, task.layer)
    call()
    for state in tree_leaves(states()):
        if isinstance(state, Tensor):
            state.zero_()
    return call


def transformers_layer(ours: KimiDeltaAttention) -> Any:
    """The layer of transformers with copies of the weights of ours. It has no bias on its output
    gate: that of ours is to be zero.
    """
    name = "transformers.models.kimi_linear"
    configuration = importlib.import_module(f"{name}.configuration_kimi_linear").KimiLinearConfig(
        hidden_size=ours.hidden_size,
        linear_head_dim=ours.head_k_dim,
        linear_num_heads=ours.num_heads,
        linear_conv_kernel_dim=ours.conv_size,
        rms_norm_eps=ours.norm_eps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
    )
    modeling = importlib.import_module(f"{name}.modeling_kimi_linear")
    theirs: Any = modeling.KimiLinearDeltaAttention(configuration, 0)
    theirs.config = configuration
    parts = ours.in_parts()
    weights = {f"{x}_proj.weight": parts[x] for x in "qkvb"}
    weights |= {"forget_gate.f_a_proj.weight": parts["f"], "g_a_proj.weight": parts["g"]}
    own = dict(ours.named_parameters())
    weights |= {
        "forget_gate.f_b_proj.weight": own["f_proj.weight"],
        "forget_gate.A_log": own["A_log"],
        "forget_gate.dt_bias": own["dt_bias"],
        "g_b_proj.weight": own["g_proj.weight"],
        "conv1d.weight": own["conv_weight"],
        "o_norm.weight": own["o_norm_weight"],
        "o_proj.weight": own["o_proj.weight"],
    }
    for name, parameter in theirs.named_parameters():
        parameter.data = weights[name].detach().clone().reshape(parameter.shape)
    return theirs
