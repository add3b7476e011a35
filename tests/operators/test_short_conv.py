"""short_conv against the definition token by token, its state, its errors and its compiled code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import config, short_conv, short_conv_update
from kda_ops._cases import Case, paged_conv_state
from kda_ops.tuning import override
from kda_ops.tuning.configs import DEFAULTS
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import cases, run_kernels
from tests.support.oracle import assert_accurate

CPU = torch.device("cpu")
LENGTHS = (1, 0, 9, 2, 3, 5)
T = 24  # four rows of padding
OFFSETS = torch.tensor((0, *LENGTHS)).cumsum(0)
SLOTS = torch.tensor([3, 5, 1, 0, 6, 2])
INITIAL = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
layouts = pytest.mark.parametrize("layout", ["SD", "DS"])
shapes = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def rows_of(state: Tensor, layout: str) -> Tensor:
    """`[slots, L, D]` from either layout."""
    return state if layout == "SD" else state.transpose(1, 2)


def naive_sequence(
    history: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """One sequence, one token at a time: outputs, and the final window."""
    window, outputs = list(history), []
    for token in x:
        window.append(token)
        y = sum(
            weight[:, w] * window[len(window) - weight.shape[1] + w] for w in range(weight.shape[1])
        )
        if bias is not None:
            y = y + bias
        outputs.append(y / (1 + torch.exp(-y)) if silu else y)
    return outputs, window[len(window) - len(history) :]


def arguments(W: int = 4, D: int = 12, layout: str = "SD", num_spec: int = 1) -> dict[str, Any]:
    return {
        "x": torch.randn(T, D, dtype=torch.float64),
        "weight": torch.randn(D, W, dtype=torch.float64),
        "bias": torch.randn(D, dtype=torch.float64),
        "conv_state": paged_conv_state(7, W - 1 + num_spec, D, layout, torch.float64, CPU),
        "state_indices": SLOTS,
        "has_initial_state": INITIAL,
        "cu_seqlens": OFFSETS,
        "layout": layout,
    }


@layouts
@pytest.mark.parametrize("W", [2, 3, 4, 5])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_against_the_definition(W: int, activation: str | None, layout: str) -> None:
    inputs = arguments(W, layout=layout) | {"activation": activation}
    state = rows_of(inputs["conv_state"], layout).clone()
    y = short_conv(**inputs)
    expected = torch.zeros_like(y)
    for n, slot in enumerate(SLOTS.tolist()):
        if slot == 0:
            continue
        start, end = OFFSETS[n], OFFSETS[n + 1]
        history = [state[slot, i] if INITIAL[n] else torch.zeros(12) for i in range(W - 1)]
        outputs, window = naive_sequence(
            history,
            inputs["x"][start:end],
            inputs["weight"],
            inputs["bias"],
            activation is not None,
        )
        for i, output in enumerate(outputs):
            expected[start + i] = output
        state[slot, : W - 1] = torch.stack(window)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(rows_of(inputs["conv_state"], layout), state)


def test_dense_batch_equals_its_sequences() -> None:
    x, weight = torch.randn(3, 7, 8), torch.randn(8, 4)
    y = short_conv(x, weight)
    for n in range(3):
        torch.testing.assert_close(y[n], short_conv(x[n], weight))
    offsets = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    assert torch.equal(
        y.reshape(1, 21, 8), short_conv(x.reshape(1, 21, 8), weight, cu_seqlens=offsets)
    )


@layouts
def test_pieces_and_decode_steps_equal_the_whole(layout: str) -> None:
    x, weight = torch.randn(2, 23, 8), torch.randn(8, 4)
    state_indices = torch.tensor([2, 1])
    state = paged_conv_state(3, 3, 8, layout, torch.float32, CPU)
    whole_state = state.clone()
    kw: dict[str, Any] = {"state_indices": state_indices, "layout": layout}
    whole = short_conv(x, weight, conv_state=whole_state, **kw)
    torch.testing.assert_close(whole, short_conv(x, weight))
    pieces, known = [], None
    for a, b in ((0, 9), (9, 11), (11, 11), (11, 12), (12, 18)):
        piece = x[:, a:b]
        pieces.append(short_conv(piece, weight, conv_state=state, has_initial_state=known, **kw))
        known = torch.ones(2, dtype=torch.bool)
    pieces += [short_conv_update(x[:, t], state, weight, **kw)[:, None] for t in range(18, 23)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, whole_state)


def test_layouts_agree() -> None:
    sd = arguments()
    ds = sd | {"conv_state": sd["conv_state"].transpose(1, 2).contiguous(), "layout": "DS"}
    assert torch.equal(short_conv(**sd), short_conv(**ds))
    assert torch.equal(sd["conv_state"], ds["conv_state"].transpose(1, 2))


def poisoned_arguments(layout: str) -> dict[str, Any]:
    """NaN wherever nothing may be read: padding, null block, states of sequences without one."""
    inputs = arguments(layout=layout)
    inputs |= {
        n: t.float() for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    inputs["x"][OFFSETS[-1] :] = float("nan")
    inputs["x"][OFFSETS[3] : OFFSETS[4]] = float("nan")
    rows = rows_of(inputs["conv_state"], layout)
    rows[0] = float("nan")
    rows[SLOTS[~INITIAL]] = float("nan")
    return inputs


def check_poisoned(function: Any, layout: str) -> None:
    inputs = poisoned_arguments(layout)
    y = function(**inputs)
    skipped = torch.zeros(T, dtype=torch.bool)
    skipped[OFFSETS[-1] :] = skipped[OFFSETS[3] : OFFSETS[4]] = True
    assert (y[skipped] == 0).all()
    assert y.isfinite().all()
    rows = rows_of(inputs["conv_state"], layout)
    assert rows[0].isnan().all()
    assert rows[SLOTS[SLOTS != 0], :3].isfinite().all()
    assert (rows[SLOTS[~INITIAL], 3:]).isnan().all()


@layouts
def test_skipped_rows_are_not_read(layout: str) -> None:
    check_poisoned(short_conv, layout)


@layouts
@pytest.mark.interpreter
def test_skipped_rows_are_not_read_by_the_kernel(layout: str) -> None:
    check_poisoned(run_kernels(short_conv), layout)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "offsets",
    [[5, 3, 1], [0, 900, 2], [-70, 4, 24], [2**31, -(2**40), 7], [24, 24, 24], [0, 200, 400]],
)
def test_kernel_stays_in_bounds_for_all_offsets(offsets: list[int]) -> None:
    pool = torch.zeros(3 * T, 8)
    pool[T : 2 * T] = torch.randn(T, 8)
    inputs = {"weight": torch.randn(8, 4), "cu_seqlens": torch.tensor(offsets)}
    state = torch.zeros(9, 3, 8)
    kw: dict[str, Any] = {"state_indices": torch.tensor([1, 2]), "layout": "SD"}
    kw["has_initial_state"] = torch.ones(2, dtype=torch.bool)
    run_kernels(short_conv)(x=pool[T : 2 * T], conv_state=state[3:6], **inputs, **kw)
    assert (state[:4] == 0).all()
    assert (state[6:] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("slot", [-1, 7, 2**31 - 1])
def test_kernel_skips_slots_out_of_range(slot: int) -> None:
    inputs = poisoned_arguments("SD") | {"state_indices": SLOTS.where(SLOTS != 1, slot)}
    before = inputs["conv_state"][[0, 1, 4]].clone()
    y = run_kernels(short_conv)(**inputs)
    assert (y[OFFSETS[2] : OFFSETS[3]] == 0).all()
    assert (y[OFFSETS[4] : OFFSETS[5]] != 0).all()
    assert torch.equal(inputs["conv_state"][[0, 1, 4]].nan_to_num(), before.nan_to_num())


@pytest.mark.interpreter
@pytest.mark.parametrize("case", cases("short_conv"), ids=lambda case: case.name)
def test_kernel_in_several_steps(case: Case) -> None:
    """As in the large sizes: programs that carry their window from step to step."""
    ((_, values),) = DEFAULTS["short_conv"]
    with override({"short_conv": {**values, "PROGRAMS": 1, "MAX_STEPS": 3}}):
        assert_accurate(run_kernels(short_conv), short_conv, case)


def test_gradients_of_padding_are_zero() -> None:
    x = torch.randn(T, 8)
    x[OFFSETS[-1] :] = float("nan")
    x.requires_grad_()
    weight = torch.randn(8, 4, requires_grad=True)
    short_conv(x, weight, cu_seqlens=OFFSETS).sum().backward()
    assert weight.grad.isfinite().all()
    assert (x.grad[OFFSETS[-1] :] == 0).all()
    assert (x.grad[: OFFSETS[-1]] != 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(T)}, r"x must have 2 or 3 dimensions, got shape \(24,\)"),
        ({"x": torch.zeros(T, 0)}, r"x must have at least one channel, got shape \(24, 0\)"),
        ({"x": torch.zeros(T, 12).int()}, r"x must have dtype .*, got int32"),
        ({"x": torch.zeros(2, T, 12)}, r"x must have batch size 1 with cu_seqlens, got 2"),
        ({"weight": torch.zeros(12)}, r"weight must have 2 dimensions, got shape \(12,\)"),
        ({"weight": torch.zeros(12, 1)}, r"weight must have shape \[D, W\] with W at least 2, got"),
        ({"weight": torch.zeros(8, 4)}, r"weight must have shape \[12, 4\], got \(8, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[12\], got \(4,\)"),
        ({"activation": "gelu"}, r"activation must be 'silu', 'swish' or None, got 'gelu'"),
        ({"layout": "LD"}, r"layout must be one of SD, DS, auto, got 'LD'"),
        ({"layout": "DS"}, r"conv_state must have shape \[slots, 12, L\] with L at least 3 in"),
        (
            {"conv_state": torch.zeros(7, 2, 12)},
            r"with L at least 3 in layout SD, got \(7, 2, 12\)",
        ),
        ({"conv_state": torch.zeros(7, 3, 12).int()}, r"conv_state must have dtype .*, got int32"),
        ({"conv_state": None}, r"state_indices must come with conv_state, got state_indices alone"),
        (
            {"state_indices": torch.zeros(6)},
            r"state_indices must have dtype int32, int64, got float32",
        ),
        (
            {"state_indices": torch.zeros(5).int()},
            r"state_indices must have shape \[6\], got \(5,\)",
        ),
        ({"state_indices": SLOTS + 1}, r"state_indices must be below 7, got 7"),
        (
            {"state_indices": SLOTS.clamp(max=2)},
            r"state_indices must not repeat, got 2 more than once",
        ),
        ({"has_initial_state": SLOTS}, r"has_initial_state must have dtype bool, got int64"),
        ({"has_initial_state": INITIAL[1:]}, r"has_initial_state must have shape \[6\], got"),
        ({"cu_seqlens": OFFSETS.float()}, r"cu_seqlens must have dtype int32, int64, got float32"),
        ({"cu_seqlens": OFFSETS[None]}, r"cu_seqlens must have shape \[N \+ 1\], got \(1, 7\)"),
        ({"cu_seqlens": OFFSETS + 1}, r"cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": OFFSETS * 2}, r"cu_seqlens must end at or before 24 tokens, got 40"),
        ({"cu_seqlens": OFFSETS.to("meta")}, r"cu_seqlens must be on cpu like x, got meta"),
    ],
)
def test_errors(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        short_conv(**arguments() | change)


def step(x: Tensor, weight: Tensor, state: Tensor, state_indices: Tensor, known: Tensor) -> Tensor:
    kw: dict[str, Any] = {"state_indices": state_indices, "has_initial_state": known}
    return short_conv(x * 2, weight, conv_state=state, **kw) + 1


def step_arguments(layout: str, D: int = 16) -> list[Tensor]:
    state = paged_conv_state(4, 4, D, layout, torch.float32, CPU)
    known = torch.tensor([True, False])
    return [torch.randn(2, 9, D), torch.randn(D, 4), state, torch.tensor([3, 1]), known]


@layouts
@shapes
def test_compiled_does_not_copy_the_state(
    layout: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(config, "conv_layout", layout)
    inputs = step_arguments(layout)
    inputs[2] = inputs[2].clone()
    eager = [t.clone() for t in inputs]
    expected = step(*eager)
    y, (source,) = run_and_get_code(torch.compile(step, fullgraph=True, dynamic=dynamic), *inputs)
    torch.testing.assert_close(y, expected)
    assert torch.equal(inputs[2], eager[2])
    assert summary(source).externs == ["torch.ops.kda_ops.native_short_conv.state"]
    _, (source,) = cuda_code(step, *inputs, dynamic=dynamic)
    found = summary(source)
    assert found.externs == []
    assert found.launches[1] == "short_conv_kernel"
    assert len(found.launches) == 3
    assert found.allocations == 2  # x * 2, y


@shapes
def test_compiled_without_a_state_is_one_launch(dynamic: bool) -> None:
    _, (source,) = cuda_code(short_conv, torch.randn(2, 9, 16), torch.randn(16, 4), dynamic=dynamic)
    found = summary(source)
    assert (found.launches, found.externs, found.allocations) == (["short_conv_kernel"], [], 1)


def test_a_changed_layout_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(step, fullgraph=True)
    for layout in ("SD", "DS", "SD"):
        monkeypatch.setattr(config, "conv_layout", layout)
        inputs = step_arguments("SD", D=4)  # a state that is valid in both layouts
        eager = [t.clone() for t in inputs]
        torch.testing.assert_close(compiled(*inputs), step(*eager))
        assert torch.equal(inputs[2], eager[2])


def test_equal_sequences_before_padding() -> None:
    """Sequences of equal length, followed by padding rows."""
    x, weight = torch.randn(7, 12, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    cu_seqlens = torch.arange(0, 7, 2)
    y = short_conv(x, weight, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(y[:6], short_conv(x[:6], weight, cu_seqlens=cu_seqlens))
    assert (y[6:] == 0).all()


def test_an_eager_layer_convolves_and_activates_in_one_pass() -> None:
    """Weights are parameters, which require gradients also where none are recorded."""
    x, weight = torch.randn(2, 20, 16), torch.nn.Parameter(torch.randn(16, 4))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        y = short_conv(x, weight)
    names = {event.name for event in profile.events()}
    assert "mkldnn::_convolution_pointwise" in names
    assert not names & {"aten::silu", "aten::silu_"}
    with torch.enable_grad():
        recorded = short_conv(x, weight)
    torch.testing.assert_close(recorded.detach(), y)
    (gradient,) = torch.autograd.grad(recorded.sum(), weight)
    assert gradient.abs().sum() > 0
