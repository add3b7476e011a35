"""short_conv_update against the definition token by token, speculation, errors, compiled code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops import config, short_conv, short_conv_update
from kda_ops._cases import paged_conv_state
from tests.operators.test_short_conv import CPU, layouts, naive_sequence, rows_of, shapes
from tests.support.fake_cuda import cuda_code, summary
from tests.support.operators import run_kernels

LENGTHS = (3, 0, 1, 2, 3, 1)
T = 12  # two rows of padding
OFFSETS = torch.tensor((0, *LENGTHS)).cumsum(0)
SLOTS = torch.tensor([3, 5, 1, 0, 6, 2])
ACCEPTED = torch.tensor([1, 2, 3, 1, 3, 2])


def arguments(W: int = 4, D: int = 12, layout: str = "SD") -> dict[str, Any]:
    return {
        "x": torch.randn(T, D, dtype=torch.float64),
        "conv_state": paged_conv_state(7, W + 1, D, layout, torch.float64, CPU),
        "weight": torch.randn(D, W, dtype=torch.float64),
        "bias": torch.randn(D, dtype=torch.float64),
        "state_indices": SLOTS,
        "num_accepted": ACCEPTED,
        "cu_seqlens": OFFSETS,
        "layout": layout,
    }


@layouts
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_against_the_definition(W: int, activation: str | None, layout: str) -> None:
    inputs = arguments(W, layout=layout) | {"activation": activation}
    state = rows_of(inputs["conv_state"], layout).clone()
    y = short_conv_update(**inputs)
    expected = torch.zeros_like(y)
    for n, slot in enumerate(SLOTS.tolist()):
        x = inputs["x"][OFFSETS[n] : OFFSETS[n + 1]]
        if slot == 0 or len(x) == 0:
            continue
        first = int(ACCEPTED[n]) - 1
        history = list(state[slot, first : first + W - 1].clone())
        outputs, _ = naive_sequence(
            history, x, inputs["weight"], inputs["bias"], activation is not None
        )
        for i, output in enumerate(outputs):
            expected[OFFSETS[n] + i] = output
        rows = [*history[1:], *x]
        state[slot, : len(rows)] = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    assert torch.equal(rows_of(inputs["conv_state"], layout), state)


@layouts
def test_any_accepted_prefix_continues_the_whole(layout: str) -> None:
    """Three tokens are proposed each step; however many are kept, the kept ones equal prefill."""
    x, weight = torch.randn(2, 20, 8), torch.randn(8, 4)
    state_indices = torch.tensor([2, 1])
    state = paged_conv_state(3, 5, 8, layout, torch.float32, CPU)
    whole = short_conv(x, weight)
    short_conv(x[:, :4], weight, conv_state=state, state_indices=state_indices, layout=layout)
    position, accepted = [4, 4], [1, 1]
    for keep in ((1, 3), (2, 1), (3, 2), (1, 1), (3, 3)):
        proposal = torch.randn(2, 3, 8)
        for n in range(2):
            proposal[n, : keep[n]] = x[n, position[n] : position[n] + keep[n]]
        y = short_conv_update(
            proposal,
            state,
            weight,
            state_indices=state_indices,
            num_accepted=torch.tensor(accepted),
            layout=layout,
        )
        for n in range(2):
            expected = whole[n, position[n] : position[n] + keep[n]]
            torch.testing.assert_close(y[n, : keep[n]], expected)
            position[n] += keep[n]
        accepted = list(keep)


def test_forms_of_a_call_agree() -> None:
    """[N, q, D], ragged with equal lengths, and single steps; a slot table counts by column 0."""
    x, weight = torch.randn(3, 2, 8), torch.randn(8, 4)
    state_indices = torch.tensor([4, 1, 2], dtype=torch.int32)
    table = torch.stack([state_indices, state_indices + 10], 1)
    states = [torch.randn(5, 4, 8)]
    states += [states[0].clone() for _ in range(2)]
    y = short_conv_update(x, states[0], weight, state_indices=state_indices)
    offsets = torch.tensor([0, 2, 4, 6])
    ragged = short_conv_update(
        x.reshape(6, 8), states[1], weight, state_indices=table, cu_seqlens=offsets
    )
    torch.testing.assert_close(ragged, y.reshape(6, 8))
    assert torch.equal(states[0], states[1])
    steps = [
        short_conv_update(x[:, i], states[2], weight, state_indices=state_indices) for i in range(2)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), y)


def test_layouts_agree() -> None:
    sd = arguments()
    ds = sd | {"conv_state": sd["conv_state"].transpose(1, 2).contiguous(), "layout": "DS"}
    assert torch.equal(short_conv_update(**sd), short_conv_update(**ds))
    assert torch.equal(sd["conv_state"], ds["conv_state"].transpose(1, 2))


def check_poisoned(function: Any, layout: str) -> None:
    """NaN wherever nothing may be read: padding, null block, rows outside the window."""
    inputs = arguments(layout=layout)
    inputs |= {
        n: t.float() for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    inputs["x"][OFFSETS[-1] :] = float("nan")
    inputs["x"][OFFSETS[3] : OFFSETS[4]] = float("nan")
    rows = rows_of(inputs["conv_state"], layout)
    rows[0] = float("nan")
    for slot, accepted in zip(SLOTS.tolist(), ACCEPTED.tolist(), strict=True):
        rows[slot, : accepted - 1] = rows[slot, accepted + 2 :] = float("nan")
    before = rows.clone()
    y = function(**inputs)
    skipped = torch.zeros(T, dtype=torch.bool)
    skipped[OFFSETS[-1] :] = skipped[OFFSETS[3] : OFFSETS[4]] = True
    assert (y[skipped] == 0).all()
    assert y.isfinite().all()
    for slot, length in zip(SLOTS.tolist(), LENGTHS, strict=True):
        written = 0 if slot == 0 or length == 0 else 2 + length
        assert rows[slot, :written].isfinite().all()
        kept, old = rows[slot, written:], before[slot, written:]
        assert torch.equal(kept.nan_to_num(9.0), old.nan_to_num(9.0))


@layouts
def test_skipped_rows_are_not_read(layout: str) -> None:
    check_poisoned(short_conv_update, layout)


@layouts
@pytest.mark.interpreter
def test_skipped_rows_are_not_read_by_the_kernel(layout: str) -> None:
    check_poisoned(run_kernels(short_conv_update), layout)


@pytest.mark.interpreter
@pytest.mark.parametrize("state_indices", [[-1, 3], [3, 2**31 - 1], [4, 3]])
@pytest.mark.parametrize("accepted", [[0, 9], [-(2**31), 2**31 - 1]])
@pytest.mark.parametrize("offsets", [[0, 2, 4], [0, 900, 3], [5, -3, 7], [2**31, 0, -1]])
def test_kernel_stays_in_bounds_for_any_values(
    state_indices: list[int], accepted: list[int], offsets: list[int]
) -> None:
    pool, state = torch.zeros(15, 8), torch.zeros(10, 4, 8)
    pool[5:10] = torch.randn(5, 8)
    run_kernels(short_conv_update)(
        x=pool[5:10],
        conv_state=state[3:7],
        weight=torch.randn(8, 4),
        state_indices=torch.tensor(state_indices),
        num_accepted=torch.tensor(accepted),
        cu_seqlens=torch.tensor(offsets),
        layout="SD",
    )
    assert (state[:4] == 0).all()
    assert (state[7:] == 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(2, 6, 12)}, r"x must have 2 dimensions, got shape \(2, 6, 12\)"),
        (
            {"x": torch.zeros(6, 4, 12), "cu_seqlens": None},
            r"x must have at most 3 tokens per sequence .* \(7, 5, 12\), got 4",
        ),
        ({"x": torch.zeros(12), "cu_seqlens": None}, r"x must have 2 or 3 dimensions, got"),
        ({"weight": torch.zeros(8, 4)}, r"weight must have shape \[12, 4\], got \(8, 4\)"),
        ({"bias": torch.zeros(12).long()}, r"bias must have dtype .*, got int64"),
        ({"activation": "relu"}, r"activation must be 'silu', 'swish' or None, got 'relu'"),
        ({"layout": "ds"}, r"layout must be one of SD, DS, auto, got 'ds'"),
        (
            {"conv_state": torch.zeros(7, 2, 12)},
            r"with L at least 3 in layout SD, got \(7, 2, 12\)",
        ),
        (
            {"state_indices": SLOTS.float()},
            r"state_indices must have dtype int32, int64, got float32",
        ),
        ({"state_indices": SLOTS[1:]}, r"state_indices must have shape \[6\], got \(5,\)"),
        (
            {"state_indices": SLOTS[:, None][:, :0]},
            r"state_indices must have a column for each of 1 tokens",
        ),
        ({"state_indices": SLOTS + 1}, r"state_indices must be below 7, got 7"),
        (
            {"state_indices": SLOTS.clamp(max=3)},
            r"state_indices must not repeat, got 3 more than once",
        ),
        ({"num_accepted": ACCEPTED.float()}, r"num_accepted must have dtype int32, int64, got"),
        ({"num_accepted": ACCEPTED[1:]}, r"num_accepted must have shape \[6\], got \(5,\)"),
        ({"num_accepted": ACCEPTED - 1}, r"num_accepted must be in \[1, 3\], got 0"),
        ({"num_accepted": ACCEPTED + 1}, r"num_accepted must be in \[1, 3\], got 4"),
        ({"cu_seqlens": OFFSETS[:-1]}, r"state_indices must have shape \[5\], got \(6,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 4, 5, 6, 7, 8])},
            r"cu_seqlens must have at most 3 tokens in a sequence, got 4",
        ),
        ({"cu_seqlens": OFFSETS.flip(0)}, r"cu_seqlens must start at 0, got 10"),
        ({"num_accepted": ACCEPTED.to("meta")}, r"num_accepted must be on cpu like x, got meta"),
    ],
)
def test_errors(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        short_conv_update(**arguments() | change)


def step(
    x: Tensor, weight: Tensor, state: Tensor, state_indices: Tensor, accepted: Tensor
) -> Tensor:
    return (
        short_conv_update(x * 2, state, weight, state_indices=state_indices, num_accepted=accepted)
        + 1
    )


def step_arguments(layout: str, D: int = 16) -> list[Tensor]:
    state = paged_conv_state(4, 4, D, layout, torch.float32, CPU)
    return [
        torch.randn(2, 2, D),
        torch.randn(D, 4),
        state,
        torch.tensor([3, 1]),
        torch.tensor([2, 1]),
    ]


@layouts
@shapes
def test_compiled_does_not_copy_the_state(
    layout: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(config, "conv_layout", layout)
    inputs = step_arguments(layout)
    eager = [t.clone() for t in inputs]
    expected = step(*eager)
    y, (source,) = run_and_get_code(torch.compile(step, fullgraph=True, dynamic=dynamic), *inputs)
    torch.testing.assert_close(y, expected)
    assert torch.equal(inputs[2], eager[2])
    assert summary(source).externs == ["torch.ops.kda_ops.short_conv_update.default"]
    _, (source,) = cuda_code(step, *inputs, dynamic=dynamic)
    found = summary(source)
    assert found.externs == []
    assert found.launches[1] == "short_conv_update_kernel"
    assert len(found.launches) == 3
    assert found.allocations == 2  # x * 2, y


def test_a_changed_layout_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(step, fullgraph=True)
    for layout in ("SD", "DS", "SD"):
        monkeypatch.setattr(config, "conv_layout", layout)
        inputs = step_arguments("SD", D=4)  # a state that is valid in both layouts
        eager = [t.clone() for t in inputs]
        torch.testing.assert_close(compiled(*inputs), step(*eager))
        assert torch.equal(inputs[2], eager[2])
