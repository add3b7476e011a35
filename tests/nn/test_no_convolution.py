"""A layer without a convolution has one state: its spec, pages, steps, copies and transfers."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops import config
from kda_ops.cache import align
from kda_ops.cache import layout_autotune as layouts
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec, Segment
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.transfer.geometry import EngineGeometry, check_compatible, state_geometry
from kda_ops.transfer.messages import decode_geometry, encode_geometry
from kda_ops.transfer.pages import buffer_pages
from kda_ops.transfer.schema import GeometryError
from tests.support.operators import run_kernels
from tests.support.oracle import assert_close

BF16, FP32 = torch.bfloat16, torch.float32
HIDDEN, HEADS, HEAD_DIM, SLOTS = 32, 2, 16, 9
SPEC = KDAStateSpec(2, 4, 24, 40, conv_size=None, conv_dtype=BF16)


def make_layer(**options: Any) -> KimiDeltaAttention:
    layer = KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS, use_short_conv=False, **options)
    return layer.requires_grad_(False)


# ------------------------------------------------------------------------------------ the spec


def test_spec_by_hand() -> None:
    assert (SPEC.conv_length, SPEC.conv_sizes, SPEC.conv_dim) == (0, (0, 0, 0), 0)
    assert SPEC.segments == (Segment("recurrent", 4, 40 * 24 * 4),)
    assert SPEC.offset("recurrent") == 0
    assert SPEC.page_bytes == 4 * 40 * 24 * 4
    assert dataclasses.replace(SPEC, num_spec=3, page_bytes=None).page_bytes == SPEC.page_bytes


@pytest.mark.parametrize("layout", ["SD", "DS", "auto", None])
def test_no_layout_is_tuned(layout: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and specs that describe the same pages are equal."""
    monkeypatch.setattr(config, "conv_layout", "auto")
    monkeypatch.setattr(layouts, "faster_layout", None)
    spec = KDAStateSpec(2, 4, 24, 40, conv_size=None, conv_dtype=BF16, layout=layout)
    assert spec == SPEC
    assert spec.decide_layout() is spec
    layer = make_layer(conv_layout=layout)
    assert layer.state_spec().layout == "DS"
    layer(torch.zeros(1, 3, HIDDEN), output_state=True)


@pytest.mark.parametrize("layers", [None, 3])
def test_pages(layers: int | None) -> None:
    spec = dataclasses.replace(SPEC, page_bytes=SPEC.page_bytes + 64)
    conv, recurrent = spec.allocate(5, layers=layers)
    lead = (5,) if layers is None else (layers, 5)
    assert conv is None
    assert recurrent.shape == (*lead, 4, 40, 24)
    assert recurrent.dtype == FP32
    assert recurrent.storage_offset() == 0
    assert recurrent.stride(-4) * 4 == spec.page_bytes
    assert not recurrent.any()
    if layers is not None:
        pages = buffer_pages(recurrent, spec.page_bytes)
        assert [tuple(x.shape) for x in pages] == 3 * [(5, spec.page_bytes)]


def test_errors() -> None:
    with pytest.raises(ValueError, match="conv_size must be given for a conv state to have a sha"):
        _ = SPEC.conv_shape
    for use in (SPEC.offset, SPEC.local_bytes, SPEC.segment):
        with pytest.raises(ValueError, match="name must be recurrent, got 'q'"):
            use("q")
    with pytest.raises(ValueError, match="tp_size must divide 4 heads, got 3"):
        KDAStateSpec(4, 12, 8, 8, conv_size=None, conv_dtype=BF16, tp_size=3)


def test_transfer() -> None:
    """Any numbers of ranks read one another; a layer with a convolution is incompatible."""

    def engine(**changes: Any) -> EngineGeometry:
        spec = dataclasses.replace(SPEC, page_bytes=None, **changes)
        return EngineGeometry((state_geometry(spec, pages=3, block_tokens=64),))

    ours = engine(layout="SD")
    assert [s.name for s in ours.groups[0].segments] == ["recurrent"]
    assert decode_geometry(json.loads(json.dumps(encode_geometry(ours)))) == ours
    check_compatible(ours, engine(tp_size=4))
    with pytest.raises(
        GeometryError, match="conv_size must be the same on both engines, got 0 and 4"
    ):
        check_compatible(ours, engine(conv_size=4))


# ----------------------------------------------------------------------------------- the layer


def test_steps_from_allocated_states() -> None:
    """Prefill in chunks, decode and both in one call are the whole sequence."""
    layer = make_layer()
    x = torch.randn(2, 80, HIDDEN)
    state = layer.state_spec().allocate(SLOTS)
    run = torch.compile(layer, fullgraph=True, backend="eager")
    parts = [
        run(
            x[:, :60].reshape(1, -1, HIDDEN),
            state=state,
            batch=KDABatch.prefill([60, 60], [3, 5]),
        ).view(2, 60, HIDDEN),
        run(x[:, 60].unsqueeze(0), state=state, batch=KDABatch.decode([3, 5])).transpose(0, 1),
    ]
    rows = torch.cat([x[0, 61:62], x[1, 61:80]])[None]
    mixed = run(
        rows,
        state=state,
        batch=KDABatch.mixed([1], [19], [3, 5], has_initial_state=[True]),
    )[0]
    exact = layer.double()(x.double())
    whole = layer.float()(x)
    assert_close(torch.cat(parts, dim=1), whole[:, :61], exact[:, :61])
    assert_close(mixed[:1], whole[0, 61:62], exact[0, 61:62])
    assert_close(mixed[1:], whole[1, 61:], exact[1, 61:])
    assert not state[1][[0, 1, 2, 4, 6, 7, 8]].any()


def test_speculative_steps_from_allocated_states() -> None:
    layer = make_layer()
    x, noise = torch.randn(1, 9, HIDDEN), torch.randn(1, 2, HIDDEN)
    state = layer.state_spec(num_spec=2).allocate(SLOTS)
    slots = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    outputs = [layer(x[:, :5], state=state, batch=KDABatch.prefill([5], slots))]
    accepted = 1
    for first, right in ((5, 1), (6, 3)):
        drafts = torch.cat([x[:, first : first + right], noise[:, : 3 - right]], dim=1)
        batch = KDABatch.decode(slots, lengths=[3], num_accepted=[accepted])
        outputs.append(layer(drafts, state=state, batch=batch)[:, :right])
        accepted = right
    exact = layer.double()(x.double())
    assert_close(torch.cat(outputs, dim=1), layer.float()(x), exact)


def test_fresh_states_continue() -> None:
    layer = make_layer()
    x = torch.randn(2, 8, HIDDEN)
    out, state = layer(x[:, :7], output_state=True)
    assert state[0] is None
    last = layer(x[:, 7:].transpose(0, 1), state=state, batch=KDABatch.decode([1, 2]))
    exact = layer.double()(x.double())
    assert_close(torch.cat([out, last.transpose(0, 1)], dim=1), layer.float()(x), exact)


def test_explained() -> None:
    layer = make_layer(dtype=BF16)
    state = layer.state_spec().allocate(SLOTS)
    x = torch.randn(1, 2, HIDDEN, dtype=BF16)
    with torch.no_grad():
        found = kda_ops.explain(layer, x, state=state, batch=KDABatch.decode([1, 2]))
    (shown,) = found.layers
    assert any("recurrent_kda" in name for name in shown.after.launches)
    assert not any("conv" in name for name in shown.after.launches)


# ------------------------------------------------------------------------------------ the copy


def copied(call: Any, conv: Tensor | None, recurrent: Tensor, plan: Tensor, **options: Any) -> Any:
    recurrent = recurrent.clone()
    call(conv=conv, recurrent=recurrent, plan=plan, **options)
    return recurrent


def assert_copies_what_both_states_do(call: Any) -> None:
    """The plans of prefix caching, which ignore the convolution, including shifts by a bias."""
    computed, scheduled, accepted = (torch.tensor([n]) for n in (60, 6, 3))
    plan = align.before_forward(
        torch.tensor([[1, 2, 3, 4, 5]]),
        num_computed=computed,
        num_scheduled=scheduled,
        num_accepted=accepted,
        running_block=torch.tensor([0]),
        block_tokens=16,
    ).plan
    assert plan[0, 3] == 2
    recurrent = torch.randn(2, SLOTS, 2, 4, 8)
    both = copied(kda_ops.state_copy, torch.randn(2, SLOTS, 5, 6), recurrent, plan, layout="SD")
    for layout in ("SD", "DS", "auto"):
        assert torch.equal(copied(call, None, recurrent, plan, layout=layout), both)
    assert torch.equal(copied(call, None, recurrent, plan, num_spec=2), both)
    assert torch.equal(copied(call, None, recurrent[0], plan), both[0])
    assert not torch.equal(both, recurrent)


def test_copy() -> None:
    assert_copies_what_both_states_do(kda_ops.state_copy)


def test_copy_compiled() -> None:
    assert_copies_what_both_states_do(torch.compile(kda_ops.state_copy, fullgraph=True))


@pytest.mark.interpreter
def test_copy_of_the_kernel() -> None:
    assert_copies_what_both_states_do(run_kernels(kda_ops.state_copy))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_copy_on_the_gpu(compile: bool) -> None:
    call = torch.compile(kda_ops.state_copy, fullgraph=True) if compile else kda_ops.state_copy
    recurrent, plan = torch.randn(2, SLOTS, 2, 4, 8), torch.tensor([[1, 2, 3, 1]])
    expected = copied(kda_ops.state_copy, None, recurrent, plan)
    assert torch.equal(copied(call, None, recurrent.cuda(), plan.cuda()).cpu(), expected)


def test_errors_of_the_copy() -> None:
    recurrent, plan = torch.zeros(SLOTS, 2, 4, 8), torch.tensor([[1, 2, 3, 1]])
    with pytest.raises(ValueError, match="recurrent must have 4 or 5 dimensions"):
        kda_ops.state_copy(None, recurrent[0], plan)
    with pytest.raises(ValueError, match=r"plan must have bias in \[0, 0\], got 1 in row 0"):
        kda_ops.state_copy(None, recurrent, plan, num_spec=0)
    with pytest.raises(ValueError, match="plan must have recurrent_src below 9, got 9 in row 0"):
        kda_ops.state_copy(None, recurrent, torch.tensor([[1, 9, 3, 1]]))
