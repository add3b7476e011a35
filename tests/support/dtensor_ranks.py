"""What one rank of `tests/nn/test_parallel.py` runs for operators on DTensors, in the processes of
`tests/support/parallel_ranks.py`.

Every operator, sharded by each axis that its rule allows, against the same call in one process in
fp64; and a model of DTensors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import kda_ops
from kda_ops import fused
from kda_ops._sharding import RULES

SCENARIOS: dict[str, Callable[[DeviceMesh], None]] = {}
B, T, H, HV, K, V, W, SLOTS, HIDDEN = 4, 70, 4, 8, 8, 16, 4, 9, 32
FP64 = torch.float64


def scenario(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    SCENARIOS[function.__name__] = function
    return function


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(randn(*shape, seed=seed), dim=-1)


# name -> (function, tensors by argument name, other arguments)
Call = tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]


def calls() -> dict[str, Call]:
    """One call per operator and overload, by the names of `RULES`."""
    qkv = {"q": unit(B, T, H, K), "k": unit(B, T, H, K, seed=1), "v": randn(B, T, HV, V)}
    steps = {name: x[:, :2] for name, x in qkv.items()}
    raw = {
        "raw_gate": randn(B, T, HV, K), "raw_beta": randn(B, T, HV), "A_log": randn(HV),
        "dt_bias": randn(HV * K),
    }  # fmt: skip
    g_cumsum = torch.cumsum(-torch.rand(B, T, HV, K, dtype=FP64) * 0.1, 1)
    beta = torch.rand(B, T, HV, dtype=FP64)
    slots = torch.arange(1, B + 1)
    paged = {"state": randn(SLOTS, HV, V, K), "state_indices": slots}
    blocks = {"block_table": slots[:, None] + B}
    D = 2 * H * K + HV * V
    conv = {"x": randn(B, T, D), "weight": randn(D, W), "bias": randn(D)}
    kernel = {
        "q_weight": randn(H * K, W), "k_weight": randn(H * K, W), "v_weight": randn(HV * V, W),
    }  # fmt: skip
    separate = {"q": randn(B, T, H * K), "k": randn(B, T, H * K), "v": randn(B, T, HV * V)}
    windows = {
        "q_state": randn(SLOTS, W, H * K), "k_state": randn(SLOTS, W, H * K),
        "v_state": randn(SLOTS, W, HV * V),
    }  # fmt: skip
    packed = {"conv_state": randn(SLOTS, W, D), "state_indices": slots}
    op = torch.ops.kda_ops
    return {
        "gate": (kda_ops.gate, {k: raw[k] for k in ("raw_gate", "A_log", "dt_bias")}, {}),
        "chunk_cumsum": (kda_ops.chunk_cumsum, {"g": randn(B, T, HV, K)}, {}),
        "gate_cumsum": (
            kda_ops.gate_cumsum, {k: raw[k] for k in ("raw_gate", "A_log", "dt_bias")}, {},
        ),
        "conv_split": (
            kda_ops.conv_split, {"conv_state": randn(B, W, D)},
            {"sizes": (H * K, H * K, HV * V), "layout": "SD"},
        ),
        "short_conv": (kda_ops.short_conv, conv, {}),
        "short_conv.state": (
            kda_ops.short_conv, conv | packed | blocks, {"layout": "SD", "block_tokens": 64},
        ),
        "short_conv_update": (
            kda_ops.short_conv_update, conv | packed | {"x": randn(B, D)}, {"layout": "SD"},
        ),
        "short_conv_qkv": (
            lambda **x: op.short_conv_qkv(
                x["x"], x["weight"], x["bias"], "silu", H * K, K, 1e-6, None
            ), conv, {},
        ),
        "short_conv_qkv.state": (
            lambda **x: op.short_conv_qkv.state(
                x["x"], x["weight"], x["bias"], "silu", H * K, K, 1e-6, x["conv_state"],
                x["state_indices"], None, None, "SD", None, None, 0,
            ), conv | packed, {},
        ),
        "short_conv_qkv.unpacked": (
            lambda **x: op.short_conv_qkv.unpacked(
                *x.values(), None, None, None, "silu", K, 1e-6, None
            ), separate | kernel, {},
        ),
        "short_conv_qkv.unpacked_state": (
            lambda state_indices, q_state, k_state, v_state, **x: (
                op.short_conv_qkv.unpacked_state(
                    *x.values(), None, None, None, "silu", K, 1e-6, q_state, k_state, v_state,
                    state_indices, None, None, "SD", None, None, 0,
                )
            ), separate | kernel | windows | {"state_indices": slots}, {},
        ),
        "l2norm": (kda_ops.l2norm, {"x": randn(B, T, H, K)}, {}),
        "rms_norm_gated": (
            kda_ops.rms_norm_gated,
            {"o": randn(B, T, HV, V), "output_gate": randn(B, T, HV, V), "weight": randn(V)},
            {},
        ),
        "chunk_kda": (
            kda_ops.chunk_kda,
            qkv | {"g_cumsum": g_cumsum, "beta": beta, "initial_state": randn(B, HV, V, K)},
            {"output_final_state": True},
        ),
        "chunk_kda.state": (
            kda_ops.chunk_kda, qkv | {"g_cumsum": g_cumsum, "beta": beta} | paged | blocks,
            {"block_tokens": 64},
        ),
        "chunk_kda_gated": (fused.chunk_kda_gated, qkv | raw, {}),
        "chunk_kda_gated.state": (fused.chunk_kda_gated, qkv | raw | paged, {}),
        "chunk_kda_gated_affine": (
            fused.chunk_kda_gated_affine,
            qkv | raw | {
                "initial_state": randn(B, HV, V, K), "entered": torch.tensor([True, False] * B)[:B]
            },
            {},
        ),
        "recurrent_kda": (
            kda_ops.recurrent_kda,
            steps | {"g": -torch.rand(B, 2, HV, K, dtype=FP64), "beta": beta[:, :2]} | paged, {},
        ),
        "kda_decode": (
            fused.kda_decode,
            conv | {"x": randn(B, D)} | packed | {
                "raw_gate": randn(B, HV, K), "raw_beta": randn(B, HV),
                "output_gate": randn(B, HV, V), "A_log": raw["A_log"], "dt_bias": raw["dt_bias"],
                "norm_weight": randn(V),
            } | paged, {"layout": "SD"},
        ),
        "kda_decode.unpacked": (
            lambda **x: op.kda_decode.unpacked(
                x["q"], x["k"], x["v"], x["q_state"], x["k_state"], x["v_state"], x["q_weight"],
                x["k_weight"], x["v_weight"], None, None, None, "silu", x["raw_gate"],
                x["raw_beta"], x["output_gate"], x["A_log"], x["dt_bias"], None, 1.0,
                x["norm_weight"], 1e-5, 1e-6, K**-0.5, x["state"], x["state_indices"], None, None,
                "VK", "SD",
            ),
            {name: x[:, 0] for name, x in separate.items()} | kernel | windows | {
                "raw_gate": randn(B, HV, K), "raw_beta": randn(B, HV),
                "output_gate": randn(B, HV, V), "A_log": raw["A_log"], "dt_bias": raw["dt_bias"],
                "norm_weight": randn(V),
            } | paged, {},
        ),
        "state_copy": (
            lambda **x: kda_ops.state_copy(**x, layout="SD", num_spec=1),
            {
                "conv": randn(SLOTS, W, D), "recurrent": randn(SLOTS, HV, V, K),
                "plan": torch.tensor([[1, 1, 2, 0], [3, 3, 4, 1]]),
            }, {},
        ),
    }  # fmt: skip


def placed(name: str, argument: str, x: Tensor, letter: str | None, mesh: DeviceMesh) -> DTensor:
    """A tensor sharded along an axis of the operator's rule."""
    from kda_ops._sharding import expand, parse

    axes = expand(parse(RULES[name]).arguments.get(argument, ()), x.dim(), "SD")
    placement = Shard(axes.index(letter)) if letter in axes else Replicate()
    return distribute_tensor(x.clone(), mesh, [placement], src_data_rank=None)


def letters(name: str) -> list[str | None]:
    used = {axis.lstrip("l") for axis in RULES[name].replace(",", " ").split() if axis != "->"}
    return [None, *sorted(x for x in used if x.isupper() and len(x) == 1)]


def results(out: Any) -> list[Tensor]:
    if out is None:
        return []
    return [x for x in (out if isinstance(out, (tuple, list)) else [out]) if x is not None]


def assert_equal(found: Any, expected: Tensor, what: str = "") -> None:
    found = found.full_tensor() if isinstance(found, DTensor) else found
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-10 * max(1.0, largest), msg=lambda m: f"{what}: {m}"
    )


@scenario
def every_operator(mesh: DeviceMesh) -> None:
    """By every axis, without communication, forward and backward; written states too."""
    made = calls()
    assert made.keys() == RULES.keys()
    for name, (function, tensors, others) in made.items():
        written = {x for x in tensors if x.endswith("state") or x in ("conv", "recurrent")}
        written = written if "state" in name or name in (
            "short_conv_update", "recurrent_kda", "kda_decode", "kda_decode.unpacked"
        ) else set()  # fmt: skip
        for letter in letters(name):
            what = f"{name} by {letter}"
            whole = {k: x.clone() for k, x in tensors.items()}
            sharded = {k: placed(name, k, x, letter, mesh) for k, x in tensors.items()}
            differentiable = [k for k, x in whole.items() if not written and x.is_floating_point()]
            for k in differentiable:
                whole[k].requires_grad_()
                sharded[k].requires_grad_()
            with CommDebugMode() as comms:
                found = results(function(**sharded, **others))
            assert comms.get_total_counts() == 0, what
            expected = results(function(**whole, **others))
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert isinstance(a, DTensor), what
                if letter is not None and a.numel():
                    assert a.placements[0].is_shard(), what
                assert_equal(a, b, what)
            for k in sorted(written):
                assert_equal(sharded[k], whole[k], f"{what}: {k}")
            if written or name == "state_copy":
                continue
            pairs = [
                (a, b)
                for a, b in zip(found, expected, strict=True)
                if b.requires_grad and b.numel()
            ]
            sum((a.square().sum() for a, _ in pairs)).backward()
            sum((b.square().sum() for _, b in pairs)).backward()
            for k in differentiable:
                assert_equal(sharded[k].grad, whole[k].grad, f"{what}: gradient of {k}")


class Mixer(nn.Module):
    """A KDA layer as a user writes one, with a projection for each of its parts."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in (
            ("q", H * K), ("k", H * K), ("v", HV * V), ("f", HV * K), ("g", HV * V), ("b", HV),
        ):  # fmt: skip
            setattr(self, f"{name}_proj", nn.Linear(HIDDEN, width, bias=False))
            if name in "qkv":
                setattr(self, f"{name}_conv", nn.Parameter(torch.randn(width, W) / 2))
        self.A_log = nn.Parameter(torch.rand(HV))
        self.dt_bias = nn.Parameter(torch.randn(HV * K))
        self.norm = nn.Parameter(torch.ones(V))
        self.o_proj = nn.Linear(HV * V, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            kda_ops.short_conv(getattr(self, f"{n}_proj")(x), getattr(self, f"{n}_conv"))
            for n in "qkv"
        )
        q, k = (kda_ops.l2norm(y.unflatten(-1, (H, K))) for y in (q, k))
        g_cumsum = kda_ops.gate_cumsum(
            self.f_proj(x).unflatten(-1, (HV, K)), self.A_log, self.dt_bias
        )
        o, _ = kda_ops.chunk_kda(
            q, k, v.unflatten(-1, (HV, V)), g_cumsum, torch.sigmoid(self.b_proj(x))
        )
        z = self.g_proj(x).unflatten(-1, (HV, V))
        return self.o_proj(kda_ops.rms_norm_gated(o, z, self.norm).flatten(-2))


ONE_SUM = {"all_reduce": 1}


def parallel(mixer: Mixer, mesh: DeviceMesh) -> Mixer:
    columns = ColwiseParallel(use_local_output=False)
    plan: dict[str, Any] = {f"{name}_proj": columns for name in "qkvfgb"}
    plan["o_proj"] = RowwiseParallel(use_local_output=False)
    parallelize_module(mixer, mesh, plan)
    for name, p in list(mixer.named_parameters(recurse=False)):
        placement = Replicate() if name == "norm" else Shard(0)
        setattr(mixer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    return mixer


def collectives(comms: CommDebugMode) -> dict[str, int]:
    return {str(k).partition(".")[2]: n for k, n in comms.get_comm_counts().items() if n}


def step(model: nn.Module, x: Any) -> tuple[Tensor, dict[str, int], dict[str, int]]:
    with CommDebugMode() as forward:
        out = model(x)
    with CommDebugMode() as backward:
        out.square().sum().backward()
    return out, collectives(forward), collectives(backward)


def compare(sharded: nn.Module, whole: nn.Module, out: Any, expected: Tensor) -> None:
    assert_equal(out, expected, "output")
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert_equal(p.grad, q.grad, name)
        p.grad = None


@scenario
def a_model_of_dtensors(mesh: DeviceMesh) -> None:
    """Heads stay sharded from the projections to the last one, whose sum is the one collective."""
    whole = Mixer().double()
    torch.manual_seed(0)
    sharded = parallel(Mixer().double(), mesh)
    sharded.load_state_dict(
        {
            name: distribute_tensor(x, mesh, sharded.get_parameter(name).placements)
            for name, x in whole.state_dict().items()
        }
    )
    x = randn(2, T, HIDDEN)
    expected = whole(x)
    expected.square().sum().backward()
    replicated = distribute_tensor(x, mesh, [Replicate()])
    out, forward, backward = step(sharded, replicated)
    assert forward == ONE_SUM, forward
    assert backward == {}, backward
    compare(sharded, whole, out, expected)

    if mesh.size() > 2:  # time: compilation does not depend on the number of ranks
        return

    # compiled: the same, counted in the graphs
    from tests.support.graph_code import Graphs  # loads Dynamo

    graphs = Graphs()
    out = torch.compile(sharded, fullgraph=True, backend=graphs)(replicated)
    out.square().sum().backward()
    assert [g.count("kda_ops.chunk_kda") for g in graphs.code] == [1, 1]
    assert [g.count("all_reduce.default(") for g in graphs.code] == [1, 0]
    for gathering in ("all_gather", "all_to_all", "reduce_scatter", "broadcast"):
        assert not any(gathering in g for g in graphs.code), gathering
    compare(sharded, whole, out, expected)

    # a step that writes a sharded state
    function, tensors, _ = calls()["recurrent_kda"]
    shards = {k: placed("recurrent_kda", k, x, "H", mesh) for k, x in tensors.items()}
    graphs = Graphs()
    with torch.no_grad():
        out = torch.compile(function, fullgraph=True, backend=graphs)(**shards)
    assert not any("c10d" in code for code in graphs.code)
    assert_equal(out, function(**tensors))
    assert_equal(shards["state"], tensors["state"])


@scenario
def definitions_and_inference_mode(mesh: DeviceMesh) -> None:
    """The operators' twins of `kda_ops.reference()` have the same rules."""
    for name in ("chunk_kda", "gate", "conv_split"):
        function, tensors, others = calls()[name]
        letter = letters(name)[-1]
        sharded = {k: placed(name, k, x, letter, mesh) for k, x in tensors.items()}
        expected = results(function(**tensors, **others))
        with kda_ops.reference():
            found = results(function(**sharded, **others))
        with torch.inference_mode():
            found += results(function(**sharded, **others))
        for a, b in zip(found, [*expected, *expected], strict=True):
            assert a.placements[0].is_shard(), name
            assert_equal(a, b, name)


@scenario
def moved_states_are_refused(mesh: DeviceMesh) -> None:
    """A state stays where it is: what would have to move it is an error."""
    name = "recurrent_kda"
    function, tensors, others = calls()[name]
    for letter, placement in ((None, Shard(0)), ("H", Shard(2))):
        sharded = {k: placed(name, k, x, letter, mesh) for k, x in tensors.items()}
        sharded["state"] = distribute_tensor(tensors["state"][:4], mesh, [placement])
        with pytest.raises(Exception, match="recurrent_kda writes state"):
            function(**sharded, **others)
    # the other arguments follow the state
    sharded = {k: placed(name, k, x, None, mesh) for k, x in tensors.items()}
    sharded["state"] = placed(name, "state", tensors["state"], "H", mesh)
    out = function(**sharded, **others)
    whole = {k: x.clone() for k, x in tensors.items()}
    assert out.placements == (Shard(2),)
    assert_equal(out, function(**whole, **others))
    assert_equal(sharded["state"], whole["state"])
    # fewer heads of keys than ranks: everything is gathered, and right
    q = unit(B, T, 1, K)
    function, tensors, others = calls()["chunk_kda"]
    tensors = tensors | {"q": q, "k": q}
    sharded = {
        k: placed("chunk_kda", k, x, None if k in "qk" else "H", mesh) for k, x in tensors.items()
    }
    for a, b in zip(function(**sharded, **others), function(**tensors, **others), strict=True):
        assert_equal(a, b)


@scenario
def two_dimensions(mesh: DeviceMesh) -> None:
    """Batch on one, heads on the other, without communication."""
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    function, tensors, others = calls()["chunk_kda"]
    axes = {k: Shard(1 if k == "initial_state" else 2) for k in tensors}
    sharded = {
        k: distribute_tensor(x, grid, [Shard(0), axes[k]]).requires_grad_()
        for k, x in tensors.items()
    }
    whole = {k: x.clone().requires_grad_() for k, x in tensors.items()}
    with CommDebugMode() as comms:
        found = function(**sharded, **others)
        found[0].sum().backward()
    assert comms.get_total_counts() == 0
    expected = function(**whole, **others)
    expected[0].sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)
    for k, x in whole.items():
        assert_equal(sharded[k].grad, x.grad, k)
    function, tensors, others = calls()["gate"]
    raw = distribute_tensor(tensors["raw_gate"], grid, [Shard(0), Shard(2)])
    A_log = distribute_tensor(tensors["A_log"], grid, [Replicate(), Shard(0)]).requires_grad_()
    function(raw, A_log).sum().backward()
    assert A_log.grad.placements == (Partial(), Shard(0))
