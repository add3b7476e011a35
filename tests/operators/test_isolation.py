"""Contents of a sequence, a padding row or another slot do not affect anything else: every operator
over sequences, on a GPU, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kda_ops._cases import with_pages
from kda_ops.conv.short_conv_qkv.cases import short_conv_qkv_inputs
from kda_ops.delta_rule.chunk_kda.cases import chunk_kda_inputs
from kda_ops.delta_rule.chunked.example_inputs import chunk_kda_gated_inputs
from kda_ops.delta_rule.kda_decode.cases import kda_decode_inputs
from kda_ops.delta_rule.recurrent_kda.cases import recurrent_inputs
from tests.support.operators import public_function
from tests.support.oracle import evaluate, poisoned

DEVICE = torch.device("cuda")
Inputs = dict[str, Any]
BAD, EMPTY = 1, 2  # the sequence that is spoiled, the one without tokens
PREFILL = (40, 70, 0, 30)
DECODE = (1, 2, 0, 1)
PADDING = 10
SLOTS = [3, 1, 4, 2]


@dataclass(frozen=True)
class Subject:
    """An operator on four sequences and padding rows.

    Attributes:
        name: The operator.
        make: Its inputs on a device.
        tokens: Arguments with a row per token: axis 0 of two, axis 1 of more.
        lengths: Tokens of each sequence.
        states: Arguments with a page per slot, which the call writes.
        label: Its distinguishing feature.
    """

    name: str
    make: Callable[[torch.device], Inputs]
    tokens: tuple[str, ...]
    lengths: tuple[int, ...]
    states: tuple[str, ...] = ()
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.label}"

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Results, then the states."""
        with poisoned():
            return evaluate(public_function(self.name), inputs, self.states)

    def rows(self, n: int) -> slice:
        start = sum(self.lengths[:n])
        return slice(start, start + self.lengths[n])


def offsets(device: torch.device) -> list[int]:
    return torch.tensor((0, *PREFILL)).cumsum(0).tolist()


def gate_cumsum_inputs(device: torch.device) -> Inputs:
    inputs = chunk_kda_gated_inputs(
        device, T=sum(PREFILL) + PADDING, H=2, cu_seqlens=offsets(device)
    )
    return {name: inputs[name] for name in ("raw_gate", "A_log", "dt_bias", "cu_seqlens")}


def chunk_cumsum_inputs(device: torch.device) -> Inputs:
    inputs = gate_cumsum_inputs(device)
    return {"g": inputs["raw_gate"].float(), "cu_seqlens": inputs["cu_seqlens"]}


def chunk(make: Callable[..., Inputs], **options: Any) -> Callable[[torch.device], Inputs]:
    def pages(device: torch.device) -> Inputs:
        T = sum(PREFILL) + PADDING
        inputs = make(device, T=T, H=2, cu_seqlens=offsets(device), **options)
        return with_pages(inputs, SLOTS, [0])

    return pages


def conv(layout: str, only: tuple[str, ...] = ()) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        inputs = short_conv_qkv_inputs(
            *(1, sum(PREFILL) + PADDING, 2, 128, 256),
            lengths=PREFILL,
            layout=layout,
            state_indices=tuple(SLOTS),
            initial=(0, 1, 1, 1),
            device=device,
        )
        return {name: inputs[name] for name in only or inputs}

    return make


def decode(layout: str) -> Callable[[torch.device], Inputs]:
    return lambda device: kda_decode_inputs(
        *(len(DECODE), 2, 2, 128, 128),
        layout=layout,
        lengths=DECODE,
        padding_rows=PADDING,
        room=2,
        device=device,
    )


def conv_update(layout: str) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        inputs = decode(layout)(device)
        kept = {name: inputs[name] for name in ("x", "conv_state", "weight", "cu_seqlens")}
        return kept | {"state_indices": inputs["state_indices"], "layout": layout}

    return make


def recurrent(device: torch.device) -> Inputs:
    inputs = recurrent_inputs(
        *(len(DECODE), 0, 2, 2, 128, 128),
        lengths=list(DECODE),
        padding_rows=PADDING,
        device=device,
    )
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, sum(DECODE) :] = torch.nan
    return inputs


CONV = ("x", "weight", "conv_state", "state_indices", "has_initial_state", "cu_seqlens", "layout")
QKV, RAW = ("q", "k", "v", "g_cumsum", "beta"), ("q", "k", "v", "raw_gate", "raw_beta")
GENERAL = {"K": 48, "V": 80}
SUBJECTS = [
    Subject("gate_cumsum", gate_cumsum_inputs, ("raw_gate",), PREFILL),
    Subject("chunk_cumsum", chunk_cumsum_inputs, ("g",), PREFILL),
    Subject("chunk_kda", chunk(chunk_kda_inputs), QKV, PREFILL, ("state",)),
    Subject("chunk_kda", chunk(chunk_kda_inputs, **GENERAL), QKV, PREFILL, ("state",), "-general"),
    *(
        Subject(
            "chunk_kda_gated",
            chunk(chunk_kda_gated_inputs, norm=True, gate=gate, **sizes),
            RAW,
            PREFILL,
            ("state",),
            f"-{gate}{'-general' if sizes else ''}",
        )
        for gate in ("softplus", "bounded")
        for sizes in ({}, GENERAL)
    ),
    *(
        subject
        for layout in ("SD", "DS")
        for subject in (
            Subject(
                "short_conv", conv(layout, CONV), ("x",), PREFILL, ("conv_state",), f"-{layout}"
            ),
            Subject("short_conv_qkv", conv(layout), ("x",), PREFILL, ("conv_state",), f"-{layout}"),
            Subject(
                "short_conv_update",
                conv_update(layout),
                ("x",),
                DECODE,
                ("conv_state",),
                f"-{layout}",
            ),
            Subject(
                "kda_decode",
                decode(layout),
                ("x", "raw_gate", "raw_beta", "output_gate"),
                DECODE,
                ("conv_state", "state"),
                f"-{layout}",
            ),
        )
    ),
    Subject("recurrent_kda", recurrent, ("q", "k", "v", "g", "beta"), DECODE, ("state",)),
]
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def copied(inputs: Inputs) -> Inputs:
    """Dense copies on the same device."""
    return {name: y.clone() if isinstance(y, Tensor) else y for name, y in inputs.items()}


def token_axis(y: Tensor) -> int:
    return 0 if y.dim() == 2 else 1


def of_rows(y: Tensor, rows: slice) -> Tensor:
    return y[rows] if token_axis(y) == 0 else y[:, rows]


def slot_of(inputs: Inputs, n: int) -> int:
    return int(inputs["state_indices"][n])


def assert_identical(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit; all NaNs are equal."""
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(), b.nan_to_num()), what


@pytest.mark.gpu
@every_subject
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_bad_sequence_does_not_affect_others(subject: Subject, bad: float) -> None:
    inputs = subject.make(DEVICE)
    spoiled = copied(inputs)
    inputs = copied(inputs)
    bad_rows = subject.rows(BAD)
    for name in subject.tokens:
        of_rows(spoiled[name], bad_rows).fill_(bad)
    for name in subject.states:
        spoiled[name][slot_of(inputs, BAD)] = bad
    expected, found = subject.run(inputs), subject.run(spoiled)
    results = len(found) - len(subject.states)
    for out, clean in zip(found[:results], expected[:results], strict=True):
        assert clean.isfinite().all()
        changed = of_rows(out, bad_rows)
        kept = changed.isfinite() & (changed > torch.finfo(out.dtype).min)  # a gate's sum, at least
        assert not kept.any(), "the sequence was not spoiled"
        for rows in (slice(0, bad_rows.start), slice(bad_rows.stop, None)):
            assert_identical(of_rows(out, rows), of_rows(clean, rows), "another sequence changed")
    for name, pages, clean in zip(subject.states, found[results:], expected[results:], strict=True):
        others = [s for s in range(len(pages)) if s != slot_of(inputs, BAD)]
        assert_identical(pages[others], clean[others], f"another slot of {name} changed")


@pytest.mark.gpu
@every_subject
def test_padding_rows_are_not_read(subject: Subject) -> None:
    """NaN after the last sequence gives the same as zeros."""
    inputs = copied(subject.make(DEVICE))
    zeroed = copied(inputs)
    padding = slice(sum(subject.lengths), None)
    for name in subject.tokens:
        assert of_rows(inputs[name], padding).isnan().all(), f"{name} has no padding"
        of_rows(zeroed[name], padding).zero_()
    for found, expected in zip(subject.run(inputs), subject.run(zeroed), strict=True):
        assert_identical(found, expected, "a padding row was read")


@pytest.mark.gpu
@every_subject
def test_a_sequence_without_tokens_changes_nothing(subject: Subject) -> None:
    inputs = copied(subject.make(DEVICE))
    without = copied(inputs)
    for name in ("state_indices", "has_initial_state", "cu_seqlens"):
        if name in without:
            kept = [i for i in range(len(without[name])) if i != EMPTY]
            without[name] = without[name][kept]
    before = {name: inputs[name].clone() for name in subject.states}
    found, expected = subject.run(inputs), subject.run(without)
    for out, clean in zip(found, expected, strict=True):
        assert_identical(out, clean, "the others' results changed")
    for name in subject.states:
        slot = slot_of(inputs, EMPTY)
        assert_identical(inputs[name][slot], before[name][slot], f"{name} of it was written")
