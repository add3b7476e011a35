"""`state_copy` beyond the common cases: definition, layouts, shifts, bad plans, errors, code."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.cache.state_copy.cases import CASES, MIXED, copy_inputs
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import run_kernels

CPU = torch.device("cpu")
CASE = {case.name: case for case in CASES}
Copy = Callable[..., None]


def copied(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both states after the plan, one row and one layer at a time, from the states before."""
    conv, recurrent = x["conv"].clone(), x["recurrent"].clone()
    old_conv, old_recurrent = x["conv"].clone(), x["recurrent"].clone()
    length_axis = 0 if x["layout"] == "SD" else 1
    L = conv.shape[-2 + length_axis]
    for conv_src, recurrent_src, dst, bias in x["plan"].tolist():
        if dst <= 0 or not 0 <= bias < L:
            continue
        for layer in range(len(conv)):
            if conv_src >= 0:
                source = old_conv[layer, conv_src].narrow(length_axis, bias, L - bias)
                conv[layer, dst].narrow(length_axis, 0, L - bias).copy_(source)
            if recurrent_src >= 0:
                recurrent[layer, dst] = old_recurrent[layer, recurrent_src]
    return conv, recurrent


def check_definition(call: Copy, layout: str) -> None:
    x = copy_inputs(MIXED, 15, 6, 40, (2, 8, 24), layout=layout, device=CPU)
    conv, recurrent = copied(x)
    call(**x)
    assert torch.equal(x["conv"], conv)
    assert torch.equal(x["recurrent"], recurrent)


def check_shift_on_the_spot(call: Copy, layout: str, bias: int) -> None:
    """A slot shifted in place by many programs is moved, not smeared."""
    x = copy_inputs([(2, 2, 2, bias)], 4, 6, 5000, (1, 4, 4), layout=layout, layers=1, device=CPU)
    conv, recurrent = copied(x)
    call(**x)
    assert torch.equal(x["conv"], conv)
    assert torch.equal(x["recurrent"], recurrent)


def check_bits(call: Copy, dtype: torch.dtype, recurrent_dtype: torch.dtype, layout: str) -> None:
    """Any bits of any dtype arrive unchanged, NaN payloads included."""
    x = copy_inputs([(1, 3, 2, 1)], 4, 4, 24, (2, 4, 16), layout=layout, padding=0, device=CPU)
    for name, wanted in (("conv", dtype), ("recurrent", recurrent_dtype)):
        size = (*x[name].shape[:-1], x[name].shape[-1] * wanted.itemsize)
        x[name] = torch.randint(0, 256, size, dtype=torch.uint8).view(wanted)
    bits = {n: x[n].view(torch.uint8).clone() for n in ("conv", "recurrent")}
    call(**x)
    for name in bits:
        x[name] = x[name].view(torch.uint8).unflatten(-1, (-1, x[name].element_size()))
        bits[name] = bits[name].unflatten(-1, (-1, x[name].shape[-1]))
    axis = 2 if layout == "SD" else 3
    kept, moved = x["conv"].select(1, 2).split([3, 1], axis - 1), bits["conv"].select(1, 1)
    assert torch.equal(kept[0], moved.narrow(axis - 1, 1, 3))
    assert torch.equal(kept[1], bits["conv"].select(1, 2).narrow(axis - 1, 3, 1))
    assert torch.equal(x["recurrent"][:, 2], bits["recurrent"][:, 3])


LAYOUTS = pytest.mark.parametrize("layout", ["SD", "DS"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "recurrent_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float32, torch.float8_e5m2),
    ],
    ids=["2-4", "1-2", "4-1"],
)


@LAYOUTS
def test_reference_is_the_definition(layout: str) -> None:
    check_definition(kda_ops.state_copy, layout)


@pytest.mark.interpreter
@LAYOUTS
def test_kernel_is_the_definition(layout: str) -> None:
    check_definition(run_kernels(kda_ops.state_copy), layout)


@LAYOUTS
@pytest.mark.parametrize("bias", [1, 3, 5])
def test_shift_in_place(layout: str, bias: int) -> None:
    check_shift_on_the_spot(kda_ops.state_copy, layout, bias)


@pytest.mark.interpreter
@LAYOUTS
@pytest.mark.parametrize("bias", [1, 3, 5])
def test_kernel_shift_in_place(layout: str, bias: int) -> None:
    check_shift_on_the_spot(run_kernels(kda_ops.state_copy), layout, bias)


@LAYOUTS
@DTYPES
def test_bits(dtype: torch.dtype, recurrent_dtype: torch.dtype, layout: str) -> None:
    check_bits(kda_ops.state_copy, dtype, recurrent_dtype, layout)


@pytest.mark.interpreter
@LAYOUTS
def test_kernel_bits(layout: str) -> None:
    check_bits(run_kernels(kda_ops.state_copy), torch.int8, torch.int16, layout)


@LAYOUTS
def test_pages_of_the_spec(layout: str) -> None:
    """The copy of a whole slot in a buffer of pages leaves every other byte of the buffer alone."""
    spec = KDAStateSpec(2, 6, 24, 40, conv_dtype=torch.float16, num_spec=2, layout=layout)
    conv, recurrent = spec.allocate(5, layers=3)
    buffer = torch.empty(0, dtype=torch.uint8).set_(conv.untyped_storage())
    buffer.copy_(torch.randint(0, 256, buffer.shape))
    pages = buffer.view(3, 5, spec.page_bytes)
    expected = pages.clone()
    conv_bytes = spec.conv_length * spec.conv_dim * 2
    start, size = spec.offset("recurrent"), spec.local_bytes("recurrent")
    expected[:, 4, :conv_bytes] = pages[:, 1, :conv_bytes]
    expected[:, 4, start : start + size] = pages[:, 2, start : start + size]
    kda_ops.state_copy(conv, recurrent, torch.tensor([[1, 2, 4, 0]]), layout=layout)
    assert torch.equal(pages, expected)


@LAYOUTS
def test_compiled_on_pages_of_the_spec(layout: str) -> None:
    """Both states of a page are written by one graph, although they share their bytes."""
    spec = KDAStateSpec(2, 2, 16, 16, conv_dtype=torch.bfloat16, num_spec=1, layout=layout)
    conv, recurrent = spec.allocate(4, layers=2)
    x = {"conv": conv.copy_(torch.randn(conv.shape)), "layout": layout}
    x |= {"recurrent": recurrent.copy_(torch.randn(recurrent.shape))}
    x |= {"plan": torch.tensor([[1, 2, 3, 1]])}
    expected = copied(x)
    torch.compile(kda_ops.state_copy, fullgraph=True)(**x)
    assert torch.equal(conv, expected[0])
    assert torch.equal(recurrent, expected[1])


@pytest.mark.interpreter
@pytest.mark.parametrize(("D", "heads"), [(0, 2), (3, 0), (0, 0)])
def test_kernel_of_an_empty_part(D: int, heads: int) -> None:
    conv, recurrent = torch.randn(3, 4, D), torch.randn(3, heads, 2, 2)
    plan = torch.tensor([[1, 1, 2, 1]])
    expected = conv[1, 1:].clone(), recurrent[1].clone()
    run_kernels(kda_ops.state_copy)(conv=conv, recurrent=recurrent, plan=plan, layout="SD")
    assert torch.equal(conv[2, :3], expected[0])
    assert torch.equal(recurrent[2], expected[1])


def test_layout_comes_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    x = copy_inputs([(1, 1, 2, 1)], 3, 4, 8, (1, 2, 2), layout="DS", device=CPU)
    conv, _ = copied(x)
    del x["layout"]
    monkeypatch.setattr(kda_ops.config, "conv_layout", "DS")
    kda_ops.state_copy(**x)
    assert torch.equal(x["conv"], conv)


@pytest.mark.interpreter
@LAYOUTS
def test_kernel_stays_in_bounds_for_any_plan(layout: str) -> None:
    """Rows with a slot or a bias that does not exist are skipped, the good one is copied."""
    far = 2**31 - 1
    bad = [
        (15, 15, 2, 0),
        (far, far, 2, 0),
        (1, 1, 15, 0),
        (1, 1, -1, 0),
        (1, 1, far, 1),
        (1, 1, 0, 1),
        (1, 1, 2, 6),
        (1, 1, 2, -1),
        (1, 1, 2, far),
        (-far, -far, 2, 1),
    ]
    x = copy_inputs([*bad, (4, 5, 6, 2)], 15, 6, 40, (2, 8, 24), layout=layout, device=CPU)
    good = dict(x, plan=x["plan"][-1:])
    conv, recurrent = copied(good)
    run_kernels(kda_ops.state_copy)(**x)
    assert torch.equal(x["conv"], conv)
    assert torch.equal(x["recurrent"], recurrent)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ((15, 1, 2, 0), {}, "plan must have conv_src below 15, got 15 in row 1"),
        ((1, 99, 2, 0), {}, "plan must have recurrent_src below 15, got 99 in row 1"),
        ((1, 1, 15, 0), {}, "plan must have dst below 15, got 15 in row 1"),
        ((1, 1, 2, 6), {}, "plan must have bias in [0, 5], got 6 in row 1"),
        ((1, 1, 2, -1), {}, "plan must have bias in [0, 5], got -1 in row 1"),
        ((1, 1, 2, 3), {"num_spec": 2}, "plan must have bias in [0, 2], got 3 in row 1"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_value_errors(
    row: tuple[int, ...], options: dict[str, int], message: str, compiled: bool
) -> None:
    x = copy_inputs([(3, 3, 4, 0), row], 15, 6, 40, (2, 8, 24), layout="SD", device=CPU)
    before = x["conv"].clone()
    call = torch.compile(kda_ops.state_copy, fullgraph=True) if compiled else kda_ops.state_copy
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**x, **options)
    assert torch.equal(x["conv"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv": lambda x: x[0, 0]}, "conv must have 3 or 4 dimensions, got shape (6, 40)"),
        (
            {"recurrent": lambda x: x[0]},
            "recurrent must have 5 dimensions, got shape (15, 2, 8, 24)",
        ),
        (
            {"recurrent": lambda x: x[:, :14]},
            "recurrent must have as many layers and slots as conv, (2, 15), got (2, 14)",
        ),
        (
            {"recurrent": lambda x: x.to(torch.complex64)},
            "recurrent must have real elements of 1, 2, 4 or 8 bytes, got torch.complex64",
        ),
        (
            {"conv": lambda x: x[..., ::2]},
            "conv must be dense in its last 1 axes, got shape (2, 15, 6, 20)",
        ),
        (
            {"recurrent": lambda x: x.transpose(-1, -2)},
            "recurrent must be dense in its last 3 axes, got shape (2, 15, 2, 24, 8)",
        ),
        (
            {"layout": lambda _: "DS", "conv": lambda x: x[..., :5]},
            "conv must be dense in its last 2 axes, got shape (2, 15, 6, 5)",
        ),
        ({"plan": lambda x: x.float()}, "plan must have dtype int32, int64, got float32"),
        ({"plan": lambda x: x[:, :3]}, "plan must have shape [R, 4], got (9, 3)"),
        ({"layout": lambda _: "LD"}, "layout must be one of SD, DS, auto, got 'LD'"),
        ({"num_spec": lambda _: 6}, "num_spec must be in [0, 6), got 6"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    x = CASE["mixed-SD"].make(CPU)
    with pytest.raises(ValueError, match=re.escape(message)):
        kda_ops.state_copy(**x | {name: f(x.get(name)) for name, f in change.items()})


def test_no_gradients() -> None:
    x = CASE["mixed-SD"].make(CPU)
    with pytest.raises(RuntimeError, match="argument recurrent requires grad"):
        kda_ops.state_copy(**x | {"recurrent": x["recurrent"].requires_grad_()})


def test_opcheck() -> None:
    x = CASE["mixed-DS"].make(CPU)
    torch.library.opcheck(
        torch.ops.kda_ops.state_copy.default, (x["conv"], x["recurrent"], x["plan"], "DS", 5)
    )


def copy_some_layers(
    conv: Tensor, recurrent: Tensor, plan: Tensor, layout: str, first: int
) -> Tensor:
    """The operator between pointwise ops, on some of the layers of a cache."""
    kda_ops.state_copy(conv[first:], recurrent[first:], plan + 1, layout=layout)
    return recurrent[-1, 2] * 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@LAYOUTS
@pytest.mark.parametrize("first", [0, 1], ids=["whole", "slice"])
def test_generated_code_writes_the_caches_in_place(layout: str, dynamic: bool, first: int) -> None:
    plan = [(0, 0, 1, 0), (2, 2, 2, 0)]
    x = copy_inputs(plan, 6, 4, 16, (2, 4, 8), layout=layout, padding=0, device=CPU)
    eager = {n: v.clone() if isinstance(v, Tensor) else v for n, v in x.items()}
    expected = copy_some_layers(**eager, first=first)
    out, (code,) = cuda_code(copy_some_layers, dynamic=dynamic, first=first, **x)
    assert torch.equal(out, expected)
    assert torch.equal(x["conv"], eager["conv"])
    assert torch.equal(x["recurrent"], eager["recurrent"])
    found = summary(code)
    before, kernel, after = found.launches
    assert (before[:6], kernel, after[:6]) == ("triton", "state_copy_kernel", "triton")
    # the plan plus one and the result are allocated: no copy of a cache
    assert (found.externs, found.allocations) == ([], 2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@LAYOUTS
def test_compiled_cpu_writes_the_caches_in_place(layout: str, dynamic: bool) -> None:
    plan = [(0, 0, 1, 0), (2, 2, 2, 0)]
    x = copy_inputs(plan, 6, 4, 16, (2, 4, 8), layout=layout, padding=0, device=CPU)
    eager = {n: v.clone() if isinstance(v, Tensor) else v for n, v in x.items()}
    expected = copy_some_layers(**eager, first=1)
    compiled = torch.compile(copy_some_layers, fullgraph=True, dynamic=dynamic)
    out, (code,) = torch._inductor.utils.run_and_get_code(compiled, **x, first=1)
    assert torch.equal(out, expected)
    assert torch.equal(x["conv"], eager["conv"])
    assert torch.equal(x["recurrent"], eager["recurrent"])
    body = code[code.index("def call(") :]
    assert body.count("torch.ops.kda_ops.state_copy.default(") == 1
    assert body.count("= empty_strided_cpu(") == 2
