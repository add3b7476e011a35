"""What a compiled Kimi layer launches between its projections, from the generated CUDA code.

At most four kernels for prefill, exactly one for decode, for any gate, layout and lengths; no state
copies, no fills, no synchronization, one graph for a stack of layers. The stack has one layer of
each kind, so that one compilation covers them all.
"""

import re
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import kda_ops
from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from kda_ops.tuning import override
from kda_ops.varlen import prepare_chunk_indices
from tests.support.fake_cuda import Summary, captured, cuda_code, summary
from tests.support.launches import DECODE, PREFILL, expect, launches

HIDDEN, K, H = 64, 64, 2
KINDS: list[dict[str, Any]] = [
    {"conv_layout": layout, "lower_bound": bound, "allow_neg_eigval": bound is not None}
    for layout in ("SD", "DS")
    for bound in (None, -5.0)
]
JOIN = ["_cat_"]  # copies the few rows of the decodes in front of the prefills'
lengths = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


class Stack(nn.Module):
    """Consecutive layers, with nothing between them."""

    def __init__(self, kinds: list[dict[str, Any]] = KINDS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            KimiDeltaAttention(HIDDEN, K, H, layer_idx=i, dtype=torch.bfloat16, **kind)
            for i, kind in enumerate(kinds)
        )

    def forward(self, x: Tensor, states: Any = None, **how: Any) -> Tensor:
        for i, layer in enumerate(self.layers):
            state = None if states is None else states[i]
            x = layer(x, state=state, **how)
        return x


def compiled(
    stack: Stack, tokens: int, dynamic: bool, states: Any = None, entries: int = 1, **how: Any
) -> Summary:
    x = torch.randn(entries, tokens, HIDDEN, dtype=torch.bfloat16)
    return launches(stack, x, states, dynamic=dynamic, **how)


def paged(stack: Stack, slots: int = 6, num_spec: int = 0) -> list[Any]:
    return [layer.state_spec(num_spec=num_spec).allocate(slots) for layer in stack.layers]


@lengths
def test_decode_is_one_launch(dynamic: bool) -> None:
    stack = Stack()
    batch = KDABatch.decode([1, 2, 3])
    expect(compiled(stack, 3, dynamic, paged(stack), batch=batch), 4 * DECODE)


@lengths
def test_speculative_decode_is_one_launch_too(dynamic: bool) -> None:
    stack = Stack()
    batch = KDABatch.decode([[1, 2], [3, 4]], lengths=[2, 1], num_accepted=[2, 1], num_tokens=5)
    expect(compiled(stack, 5, dynamic, paged(stack, num_spec=1), batch=batch), 4 * DECODE)


@lengths
def test_paged_prefill_is_four_launches(dynamic: bool) -> None:
    stack = Stack()
    batch = KDABatch.prefill([70, 30], [1, 2], has_initial_state=[True, False], num_tokens=104)
    expect(compiled(stack, 104, dynamic, paged(stack), batch=batch), 4 * PREFILL)


@lengths
def test_mixed_batch_is_a_decode_and_a_prefill(dynamic: bool) -> None:
    stack = Stack(KINDS[::3])
    batch = KDABatch.mixed(
        [1, 1, 1], [70, 30], [1, 2, 3, 4, 5], has_initial_state=[True, False], num_tokens=106
    )
    found = compiled(stack, 106, dynamic, paged(stack), batch=batch)
    expect(found, 2 * [*DECODE, *PREFILL, *JOIN])


def test_sizes_of_a_step_are_32_bit_arguments() -> None:
    """Although a graph knows none of them; see `kda_ops.cache.batch.SMALL`."""
    layer = Stack(KINDS[:1]).layers[0].requires_grad_(False)
    batch = KDABatch.prefill([70, 30], [1, 2], num_tokens=104)
    x = torch.randn(1, 104, HIDDEN, dtype=torch.bfloat16)
    _, (source,) = cuda_code(
        layer, x, state=layer.state_spec().allocate(6), batch=batch, dynamic=None
    )
    sizes = dict(re.findall(r"'(T|N|NC|xnumel)': '(\w+)'", source))
    assert sizes == dict.fromkeys(("T", "N", "NC", "xnumel"), "i32")


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "default"])
@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
def test_a_cuda_graph_writes_only_the_states(kind: str, dynamic: bool | None) -> None:
    """A graph that writes another input is not captured."""
    layer = Stack(KINDS[:1]).layers[0].requires_grad_(False)
    batch = {
        "decode": KDABatch.decode([1, 2, 3]),
        "prefill": KDABatch.prefill([70, 30], [1, 2], has_initial_state=[True, False]),
        "mixed": KDABatch.mixed([1, 1], [70], [1, 2, 3], has_initial_state=[True]),
    }[kind]
    state = layer.state_spec().allocate(6)
    x = torch.randn(1, batch.num_tokens, HIDDEN, dtype=torch.bfloat16)
    with captured() as found:
        cuda_code(layer, x, state=state, batch=batch, dynamic=dynamic)
    (graph,) = found
    written = {tuple(graph.example_inputs[i].shape) for i in graph.mutated_input_idxs}
    assert written == {tuple(pages.shape) for pages in state}


@lengths
def test_packed_sequences_are_four_launches(dynamic: bool) -> None:
    cu = torch.tensor([0, 50, 130], dtype=torch.int32)
    stack = Stack(KINDS[:2])  # without a state there is no layout
    found = compiled(
        stack, 130, dynamic, cu_seqlens=cu, chunk_indices=prepare_chunk_indices(cu, 130)
    )
    expect(found, 2 * PREFILL)


@lengths
@pytest.mark.parametrize("batch", [1, 3])
def test_sequences_of_one_length_are_four_launches(batch: int, dynamic: bool) -> None:
    expect(compiled(Stack(KINDS[:2]), 130, dynamic, entries=batch), 2 * PREFILL)


class Sliced(nn.Module):
    """A projection of odd width: one part is projected again, another convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, 3 * H * K + K + 2, bias=False, dtype=torch.bfloat16)
        self.low = nn.Linear(K, 3 * H * K, bias=False, dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.randn(3 * H * K, 4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.proj(x.flatten(0, 1))
        low = self.low(y[:, :K])
        convolved = y[:, K + 1 : K + 1 + 3 * H * K].unflatten(0, x.shape[:2])
        return low, kda_ops.short_conv(convolved, self.weight)


@pytest.mark.parametrize("entries", [1, 3])
def test_padded_rows_of_a_projection_are_not_copied(entries: int) -> None:
    """Inductor pads rows of more than 1024 elements; here all, to the next 128 bytes."""
    x = torch.randn(entries, 5, HIDDEN, dtype=torch.bfloat16)
    with inductor_config.patch(padding_stride_threshold=0), torch.no_grad():
        _, (source,) = cuda_code(Sliced(), x)
    assert f"empty_strided_cuda(({5 * entries}, 450), (512, 1), torch.bfloat16)" in source
    assert summary(source).launches == ["short_conv_kernel"]


def test_padded_rows_of_unknown_number_do_not_overlap() -> None:
    """Symbolic padded strides are not traced: a copy, with the graph's strides."""
    x = torch.randn(3, 130, HIDDEN, dtype=torch.bfloat16)
    pads = {"padding_stride_threshold": 0, "pad_dynamic_shapes": True}
    with inductor_config.patch(pads), torch.no_grad():
        _, (source,) = cuda_code(Sliced(), x, dynamic=True)
    strides = re.findall(r"\((\d+)\*s\d+, (\d+), 1\)", source)
    assert ("450", "450") in strides
    assert all(outer == inner for outer, inner in strides), strides


@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_rows_of_the_layers_projection_are_whole(heads: int) -> None:
    """The parts of a row that kernels read start at aligned transactions, for any heads."""
    layer = KimiDeltaAttention(HIDDEN, K, heads, output_gate_rank=None, output_gate_bias=False)
    assert sum(layer.in_sizes.values()) % 64 == 0
    assert list(layer.in_sizes)[-1] == "pad"


def test_a_length_that_is_a_difference_costs_no_copy() -> None:
    """Its strides are in terms of `Max(1, T - first)`, what is allocated for it must be too."""

    def some_rows(*args: Any) -> Tensor:
        *heads, first = args
        return kda_ops.chunk_kda(*(x[:, first:] for x in heads))[0]

    heads = [torch.nn.functional.normalize(torch.randn(1, 200, H, K), dim=-1) for _ in range(3)]
    G = -torch.rand(1, 200, H, K).cumsum(1) / 200
    inputs = [*(x.bfloat16() for x in heads), G, torch.rand(1, 200, H), 37]
    result, (source,) = cuda_code(some_rows, *inputs, dynamic=True)
    assert torch.equal(result, some_rows(*inputs))
    assert summary(source).launches == ["chunk_prepare_kernel", "chunk_scan_kernel"]


def test_a_separate_gate_kernel_if_tuning_chooses_it() -> None:
    with override({"chunk_kda_gated.form": {"form": "separate"}}):
        found = compiled(Stack(KINDS[:1]), 130, False)
    kernels = [name for name in found.launches if name.endswith("_kernel")]
    separate = ["gate_cumsum_kernel", "chunk_prepare_kernel", "chunk_scan_kernel"]
    assert kernels == ["short_conv_qkv_kernel", *separate]
    assert found.externs == []
