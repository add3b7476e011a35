"""Launches for the gate, its cumsum, and the norms, counted in generated CUDA code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.testing import FileCheck

import kda_ops
from kda_ops._numerics import RCP_LN2
from kda_ops.tuning import override
from kda_ops.varlen import prepare_chunk_indices
from tests.support import generated
from tests.support.fake_cuda import REINDEXES, cuda_code, summary
from tests.support.oracle import assert_close, tensors
from tests.support.rewritten import rewritten

H, K = 2, 64
CU = torch.tensor([0, 100, 100, 200], dtype=torch.int32)
LENGTHS = ["static", "dynamic-length", "all-dynamic"]
every_length = pytest.mark.parametrize("lengths", LENGTHS)


def code(function: Callable[..., Any], *args: Tensor, lengths: str = "static", **how: Any) -> str:
    """Generated code of one graph; `T` is axis 1 of the arguments of four dimensions."""
    torch._dynamo.reset()
    if lengths == "dynamic-length":
        for x in args:
            if x.dim() == 4:
                torch._dynamo.mark_dynamic(x, 1)
    dynamic = {"static": False, "dynamic-length": None, "all-dynamic": True}[lengths]
    result, (source,) = cuda_code(function, *args, dynamic=dynamic, **how)
    with torch.no_grad():
        expected = tensors(function(*args))
        fp64 = tensors(function(*(x.double() if x.is_floating_point() else x for x in args)))
    for r, e, e64 in zip(tensors(result), expected, fp64, strict=True):
        assert_close(r, e, e64)
        assert r.stride() == e.stride()
    return source


def launches(function: Callable[..., Any], *args: Tensor, lengths: str = "static") -> list[str]:
    found = summary(code(function, *args, lengths=lengths))
    assert found.externs == []
    return found.launches


def gate_inputs(T: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, T, H, K, dtype=torch.bfloat16), torch.randn(H), torch.randn(H, K)


def scaled_after(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    return kda_ops.chunk_cumsum(kda_ops.gate(x, A_log, bias)) * RCP_LN2


def scaled_after_views(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    g = kda_ops.gate(x, A_log, bias).flatten(2).float()
    return kda_ops.chunk_cumsum(g).view(x.shape).float() * RCP_LN2


def bounded(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    g = kda_ops.gate(x, A_log, bias, lower_bound=-5.0)
    return kda_ops.chunk_cumsum(g) * RCP_LN2


def produced(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    return kda_ops.chunk_cumsum(kda_ops.gate(x * 0.5, A_log, bias)) * RCP_LN2


def in_nats(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    return kda_ops.chunk_cumsum(kda_ops.gate(x, A_log, bias), chunk_size=32)


def projected(x: Tensor, A_log: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return scaled_after((x.flatten(2) @ weight).view(x.shape), A_log, bias)


def varlen(
    x: Tensor, A_log: Tensor, bias: Tensor, cu_seqlens: Tensor, chunk_indices: Tensor
) -> Tensor:
    g = kda_ops.gate(x, A_log, bias)
    return kda_ops.chunk_cumsum(g, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices) * RCP_LN2


def varlen_produced(
    x: Tensor, A_log: Tensor, bias: Tensor, cu_seqlens: Tensor, chunk_indices: Tensor
) -> Tensor:
    return varlen(x * 0.5, A_log, bias, cu_seqlens, chunk_indices)


@every_length
@pytest.mark.parametrize(("T", "batch"), [(256, 1), (200, 3)])
@pytest.mark.parametrize("function", [scaled_after, scaled_after_views, bounded, produced, in_nats])
def test_gate_cumsum_and_scale_are_one_kernel(
    function: Callable[..., Tensor], T: int, batch: int, lengths: str
) -> None:
    assert len(launches(function, *gate_inputs(T, batch), lengths=lengths)) == 1


@every_length
@pytest.mark.parametrize("function", [varlen, varlen_produced])
def test_varlen_gate_cumsum_and_scale_are_one_kernel(
    function: Callable[..., Tensor], lengths: str
) -> None:
    inputs = (*gate_inputs(256), CU, prepare_chunk_indices(CU, 256))
    assert len(launches(function, *inputs, lengths=lengths)) == 1


@pytest.mark.parametrize("lengths", ["static", "dynamic-length"])
def test_in_log2_the_hand_written_kernel_is_taken(lengths: str) -> None:
    inputs = gate_inputs(200)
    for function in (scaled_after, scaled_after_views, bounded):
        assert launches(function, *inputs, lengths=lengths) == ["gate_cumsum_kernel"]
    tables = (CU, prepare_chunk_indices(CU, 200))
    assert launches(varlen, *inputs, *tables, lengths=lengths) == ["gate_cumsum_kernel"]
    weight = torch.randn(H * K, H * K, dtype=torch.bfloat16)
    found = summary(code(projected, *inputs, weight, lengths=lengths))
    assert found.launches == ["gate_cumsum_kernel"]
    assert len(found.externs) == 1  # the projection


@pytest.mark.parametrize("function", [produced, in_nats])
def test_elsewhere_the_scan_is_generated(function: Callable[..., Tensor]) -> None:
    (name,) = launches(function, *gate_inputs(200))
    assert "chunk_cumsum" in name
    assert "gate" in name


def test_a_gate_with_another_user_stays() -> None:
    def both(x: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        g = kda_ops.gate(x, A_log, bias)
        return g, kda_ops.chunk_cumsum(g, scale=RCP_LN2)

    assert "gate_cumsum_kernel" not in launches(both, *gate_inputs(256))


def test_the_scale_is_inside_the_kernel() -> None:
    source = code(produced, *gate_inputs(256))
    FileCheck().check("1.442695").check("associative_scan").check("tl.store").run(source)


def test_a_cumsum_with_another_user_keeps_its_scale() -> None:
    def both(x: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        sums = kda_ops.chunk_cumsum(kda_ops.gate(x, A_log, bias))
        return sums, sums * RCP_LN2

    assert len(launches(both, *gate_inputs(256))) == 2


def narrowed(x: Tensor) -> Tensor:
    """Rounded to a dtype that Inductor of torch 2.11 does not optimize away, as it does bf16."""
    return x.to(torch.float8_e5m2).float()


def test_a_narrowing_cast_stays_before_the_scale() -> None:
    """The product of a rounded sum is not the rounded product."""

    def rounded(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
        return narrowed(kda_ops.chunk_cumsum(kda_ops.gate(x, A_log, bias))) * RCP_LN2

    assert len(launches(rounded, *gate_inputs(256))) == 2


def outcomes(function: Callable[..., Any], *args: Tensor) -> list[tuple[str, str | None]]:
    from kda_ops.lowering.rewrites.framework import recording

    with recording() as found:
        code(function, *args)
    return [(outcome.rewrite, outcome.reason) for outcome in found]


def test_both_rewrites_are_recorded_with_their_place() -> None:
    from kda_ops.lowering.rewrites.framework import recording

    class Gate(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return scaled_after_views(*args)

    model = torch.nn.Sequential()
    model.add_module("forget", Gate())
    with recording() as found:
        cuda_code(lambda *args: model.forget(*args), *gate_inputs(200))
    assert [(o.rewrite, o.reason) for o in found] == [("cumsum_scale", None), ("gate_cumsum", None)]
    # the second is found at a node that the first one made
    assert all("forget" in o.layer for o in found)
    assert found[1].removed == ("kda_ops.gate.default", "kda_ops.chunk_cumsum.default")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda g, f: narrowed(s := kda_ops.chunk_cumsum(g)) * RCP_LN2 + s.sum(),
            [],
        ),
        (
            lambda g, f: narrowed(kda_ops.chunk_cumsum(g)) * 2,
            [("cumsum_scale", "rounds before the product")],
        ),
        (
            lambda g, f: (s := kda_ops.chunk_cumsum(g), s * 2),
            [("cumsum_scale", "is returned")],
        ),
        (
            lambda g, f: kda_ops.chunk_cumsum(g.bfloat16()) * f,
            [("cumsum_scale", "would be rounded to torch.bfloat16")],
        ),
        (lambda g, f: kda_ops.chunk_cumsum(g) * f, [("cumsum_scale", None)]),
        (lambda g, f: f * kda_ops.chunk_cumsum(g).flatten(2), [("cumsum_scale", None)]),
        (lambda g, f: kda_ops.chunk_cumsum(g) * g, []),
    ],
    ids=["other-user", "rounded", "returned", "bf16", "tensor", "before", "no-scalar"],
)
def test_when_a_factor_moves_into_the_cumsum(
    function: Callable[..., Any], expected: list[tuple[str, str | None]]
) -> None:
    found = outcomes(function, torch.randn(1, 100, H, K), torch.tensor(1.5))
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, reason), (_, part) in zip(found, expected, strict=True):
        assert reason is part is None or part in reason


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_a_complex_factor_stays() -> None:
    def function(g: Tensor, f: Tensor) -> Tensor:
        return (kda_ops.chunk_cumsum(g) * f.to(torch.complex64)).real

    found = rewritten(function, torch.randn(1, 100, H, K), torch.tensor(1.5))
    assert found.refused == [("cumsum_scale", "the product is in torch.complex64")]


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (produced, "fuses with the scan"),
        (lambda *a: kda_ops.chunk_cumsum(kda_ops.gate(*a)), "not 1 / ln 2"),
        (
            lambda *a: kda_ops.chunk_cumsum(
                kda_ops.gate(*a)[0].unflatten(0, (2, -1)), scale=RCP_LN2
            ),
            "has another batch or length",
        ),
        (
            lambda *a: (g := kda_ops.gate(*a), kda_ops.chunk_cumsum(g, scale=RCP_LN2)),
            "is returned",
        ),
    ],
    ids=["producer", "nats", "folded", "returned"],
)
def test_when_gate_and_cumsum_stay_separate(function: Callable[..., Any], part: str) -> None:
    found = outcomes(function, *gate_inputs(200))
    (reason,) = [reason for name, reason in found if name == "gate_cumsum"]
    assert part in reason


@pytest.mark.parametrize("lengths", ["static", "dynamic-length"])
def test_the_cumulative_gate_is_its_kernel(lengths: str) -> None:
    assert launches(kda_ops.gate_cumsum, *gate_inputs(200), lengths=lengths) == [
        "gate_cumsum_kernel"
    ]

    def ragged(
        x: Tensor, A: Tensor, bias: Tensor, cu_seqlens: Tensor, chunk_indices: Tensor
    ) -> Tensor:
        return kda_ops.gate_cumsum(x, A, bias, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)

    inputs = (*gate_inputs(256), CU, prepare_chunk_indices(CU, 256))
    assert launches(ragged, *inputs, lengths=lengths) == ["gate_cumsum_kernel"]


@pytest.mark.parametrize("lengths", ["static", "dynamic-length"])
def test_the_norm_reads_and_writes_once(lengths: str) -> None:
    def norm(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return kda_ops.rms_norm_gated(o, gate * 2, weight).flatten(2).float()

    o = torch.randn(1, 100, H, K, dtype=torch.bfloat16)
    kernels = launches(norm, o, o.clone(), torch.randn(K), lengths=lengths)
    assert len(kernels) == (1 if REINDEXES else 2)


@pytest.mark.parametrize("lengths", ["static", "dynamic-length"])
def test_the_norms_of_queries_and_keys_need_no_copy(lengths: str) -> None:
    def norms(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = torch.nn.functional.silu(x).split(H, dim=2)
        return kda_ops.l2norm(q), kda_ops.l2norm(k)

    x = torch.randn(1, 100, 2 * H, K, dtype=torch.bfloat16)
    found = summary(code(norms, x, lengths=lengths))
    assert len(found.launches) == found.allocations == 2
    assert found.externs == []


def gate_cumsum(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    return kda_ops.gate_cumsum(x * 2, A_log, bias)


def varlen_gate_cumsum(x: Tensor, A_log: Tensor, bias: Tensor, cu: Tensor, table: Tensor) -> Tensor:
    return kda_ops.gate_cumsum(x * 2, A_log, bias, cu_seqlens=cu, chunk_indices=table)


SCAN = {"gate_cumsum.form": {"form": "scan"}}


@every_length
def test_the_generated_scan_if_tuning_chooses_it(lengths: str) -> None:
    """It also absorbs the producer of x."""
    inputs = gate_inputs(200)
    assert len(launches(gate_cumsum, *inputs, lengths=lengths)) == 2
    with override(SCAN):
        (launch,) = launches(gate_cumsum, *inputs, lengths=lengths)
        assert launch.startswith("triton_")
        tables = (CU, prepare_chunk_indices(CU, 200))
        assert len(launches(varlen_gate_cumsum, *inputs, *tables, lengths=lengths)) == 1


@pytest.mark.interpreter
@every_length
def test_the_chosen_scan_is_right(lengths: str) -> None:
    x, A_log, bias = gate_inputs(230)
    with override(SCAN):
        code(gate_cumsum, x, A_log, bias, lengths=lengths, load=generated.load)
        x[:, 200:] = torch.nan
        inputs = (x, A_log, bias, CU, prepare_chunk_indices(CU, 230))
        code(varlen_gate_cumsum, *inputs, lengths=lengths, load=generated.load)


@pytest.mark.interpreter
@every_length
@pytest.mark.parametrize(("T", "batch"), [(128, 1), (70, 2)])
def test_the_generated_scan_is_right(T: int, batch: int, lengths: str) -> None:
    code(produced, *gate_inputs(T, batch), lengths=lengths, load=generated.load)


@pytest.mark.interpreter
@every_length
def test_the_generated_varlen_scan_is_right(lengths: str) -> None:
    x, A_log, bias = gate_inputs(230)
    x[:, 200:] = torch.nan
    inputs = (x, A_log, bias, CU, prepare_chunk_indices(CU, 230))
    code(varlen_produced, *inputs, lengths=lengths, load=generated.load)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cu_seqlens", "chunk_indices"),
    [
        ([0, -7, 1000], [[0, 5], [7, 0], [1, -1]]),
        ([-100, 50, 20], [[0, 0], [-3, 2], [0, 1]]),
        ([2**31 - 1, -(2**31), 5], [[0, 2**31 - 1], [1, 0], [0, 0]]),
        ([90, 10, 10**6], [[1, 0], [1, 1], [1, 2**31 - 1]]),
    ],
)
def test_the_generated_varlen_scan_stays_in_bounds(
    cu_seqlens: list[int], chunk_indices: list[list[int]]
) -> None:
    """A read outside x would yield an infinity; `tests.support.generated` detects a write outside
    the result.
    """
    memory = torch.full((3, 90, H, K), torch.inf)
    memory[1] = 1
    tables = (torch.tensor(table, dtype=torch.int32) for table in (cu_seqlens, chunk_indices))
    inputs = (memory[1:2], torch.zeros(H), torch.zeros(H, K), *tables)
    result, _ = cuda_code(varlen_produced, *inputs, load=generated.load)
    assert not result.isinf().any()
    assert memory[[0, 2]].isposinf().all()
    assert memory[1].eq(1).all()
