"""The planners of state checkpoints against a simulation that counts tokens."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kda_ops
from kda_ops.cache.align import after_sampling, before_forward

HISTORY = 3  # rows of a convolution of width 4
Copier = Callable[[np.ndarray, np.ndarray, torch.Tensor], None]


def copy_naively(conv: np.ndarray, recurrent: np.ndarray, plan: torch.Tensor) -> None:
    """Executes the plan row by row: `conv [slots, L]`, `recurrent [slots]`."""
    L = conv.shape[1]
    for conv_src, recurrent_src, dst, bias in plan.tolist():
        if conv_src < 0 or recurrent_src < 0:
            continue
        assert 0 not in (conv_src, recurrent_src, dst)
        assert 0 <= bias <= L - HISTORY
        conv[dst, : L - bias] = conv[conv_src, bias:].copy()
        recurrent[dst] = recurrent[recurrent_src]


def copy_by_operator(layout: str) -> Copier:
    def copy(conv: np.ndarray, recurrent: np.ndarray, plan: torch.Tensor) -> None:
        state = torch.from_numpy(conv)[:, :, None].repeat(1, 1, 2)
        state = state if layout == "SD" else state.transpose(1, 2).contiguous()
        matrix = torch.from_numpy(recurrent)[:, None, None, None].clone()
        spec = conv.shape[1] - HISTORY
        kda_ops.state_copy(state, matrix, plan, layout=layout, num_spec=spec)
        rows = state if layout == "SD" else state.transpose(1, 2)
        conv[:] = rows[:, :, 1].numpy()
        recurrent[:] = matrix.flatten().numpy()

    return copy


class Server:
    """Requests whose state is the list of tokens they have seen.

    Every input is unique; the recurrent state after t tokens of request r is
    `1000 * r + t`, the conv state the inputs themselves.
    """

    def __init__(self, rng: np.random.Generator, requests: int, block: int, num_spec: int) -> None:
        self.rng, self.block, self.num_spec = rng, block, num_spec
        slots = 1 + requests * 400
        self.conv = np.full((slots, HISTORY + num_spec), -7, np.int32)
        self.recurrent = np.full(slots, -7, np.int32)
        self.free = list(rng.permutation(np.arange(1, slots)))
        self.fresh = iter(range(1, 1 << 30))
        self.inputs: list[list[int]] = [[] for _ in range(requests)]
        self.computed = np.zeros(requests, int)
        self.accepted = rng.integers(1, 2 + num_spec, requests)
        self.running = np.full(requests, -1)
        self.tables: list[list[int]] = [[] for _ in range(requests)]
        self.checkpoints: list[dict[int, tuple[int, list[int]]]] = [{} for _ in range(requests)]
        for prompt in self.inputs:
            prompt.extend(next(self.fresh) for _ in range(rng.integers(1, 4 * block)))

    def history(self, r: int, tokens: int) -> list[int]:
        return ([0] * HISTORY + self.inputs[r][:tokens])[-HISTORY:]

    def restart(self, r: int) -> None:
        """Preemption: everything after some checkpoint is recomputed, as a prompt."""
        kept = [0, *self.checkpoints[r]]
        self.computed[r] = kept[self.rng.integers(len(kept))]
        self.tables[r] = [0] * (self.computed[r] // self.block)
        if self.computed[r]:
            self.tables[r][-1] = self.checkpoints[r][self.computed[r]][0]
        self.running[r] = -1
        self.accepted[r] = self.rng.integers(1, 2 + self.num_spec)

    def schedule(self, r: int) -> tuple[int, int]:
        """Tokens and drafts of the next step."""
        action = self.rng.random()
        if action < 0.1:
            return 0, 0
        if action < 0.2:
            self.restart(r)
        left = len(self.inputs[r]) - self.computed[r]
        if left:
            # a chunk ends at a block boundary, or with the prompt
            ends = [e for e in range(1, left) if (self.computed[r] + e) % self.block == 0]
            return self.rng.choice([*ends, left]), 0
        draft = self.rng.integers(0, self.num_spec + 1)
        return 1 + draft, draft

    def step(self, copy: Copier) -> None:
        requests = range(len(self.inputs))
        scheduled, draft = (np.array(x) for x in zip(*map(self.schedule, requests), strict=True))
        needed = -(-(self.computed + scheduled) // self.block) + self.num_spec
        for r in requests:
            while len(self.tables[r]) < needed[r]:
                self.tables[r].append(int(self.free.pop()))
        width = max(map(len, self.tables)) or 1
        table = torch.tensor([t + [0] * (width - len(t)) for t in self.tables])
        known = {
            "num_computed": torch.from_numpy(self.computed),
            "num_scheduled": torch.from_numpy(scheduled),
            "block_tokens": self.block,
        }

        plan, accepted, running = before_forward(
            table,
            num_accepted=torch.from_numpy(self.accepted),
            running_block=torch.from_numpy(self.running),
            **known,
        )
        copy(self.conv, self.recurrent, plan)
        self.accepted, self.running = accepted.numpy(), running.numpy()
        for r in requests:
            if scheduled[r]:
                self.forward(r, scheduled[r], draft[r])
        plan, accepted, running = after_sampling(
            table,
            num_draft=torch.from_numpy(draft),
            num_accepted=torch.from_numpy(self.accepted),
            running_block=torch.from_numpy(self.running),
            **known,
        )
        kept = self.accepted.copy()
        copy(self.conv, self.recurrent, plan)
        self.accepted, self.running = accepted.numpy(), running.numpy()
        for r in requests:
            if scheduled[r]:
                self.finish(r, scheduled[r] - draft[r], kept[r])

    def forward(self, r: int, scheduled: int, draft: int) -> None:
        """Reads the state of `computed` tokens, and writes that of every token of the step."""
        at, bias = self.running[r], self.accepted[r] - 1
        slots = self.tables[r][at:]
        prefill = len(self.inputs[r]) > self.computed[r]
        if self.computed[r]:
            assert self.recurrent[slots[bias]] == 1000 * r + self.computed[r]
            found = self.conv[slots[0], bias : bias + HISTORY]
            assert found.tolist() == self.history(r, self.computed[r])
        self.accepted[r] = 1
        if prefill:
            end = self.computed[r] + scheduled
            self.recurrent[slots[0]] = 1000 * r + end
            self.conv[slots[0], :HISTORY] = self.history(r, end)
            return
        new = [next(self.fresh) for _ in range(scheduled)]
        window = [*self.history(r, self.computed[r])[1:], *new]
        self.conv[slots[0], : len(window)] = window
        for j in range(scheduled):
            self.recurrent[slots[j]] = 1000 * r + self.computed[r] + j + 1
        self.accepted[r] = self.rng.integers(1, 2 + draft)
        self.inputs[r].extend(new[: self.accepted[r]])

    def finish(self, r: int, verified: int, kept: int) -> None:
        first = self.computed[r] + verified
        self.computed[r] = first + kept - 1
        for boundary in range(first, self.computed[r] + 1):
            if boundary % self.block == 0:
                slot = self.tables[r][boundary // self.block - 1]
                self.checkpoints[r][boundary] = (slot, self.history(r, boundary))
        for boundary, (slot, rows) in self.checkpoints[r].items():
            assert self.recurrent[slot] == 1000 * r + boundary
            assert self.conv[slot, :HISTORY].tolist() == rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    requests=st.integers(1, 4),
    block=st.integers(4, 9),
    num_spec=st.integers(0, 3),
)
def test_every_boundary_keeps_its_state(
    seed: int, requests: int, block: int, num_spec: int
) -> None:
    server = Server(np.random.default_rng(seed), requests, block, num_spec)
    for _ in range(25):
        server.step(copy_naively)


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_the_operator_executes_the_plans(layout: str) -> None:
    server = Server(np.random.default_rng(0), 3, 4, 2)
    for _ in range(40):
        server.step(copy_by_operator(layout))
    assert all(server.checkpoints)


def columns(**values: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column) for name, column in values.items()}


def test_the_two_sources_differ_by_the_bias() -> None:
    table = torch.tensor([[11, 12, 13, 14]])
    counts = columns(num_computed=[7], num_scheduled=[3], num_accepted=[3], running_block=[0])
    plan, accepted, running = before_forward(table, **counts, block_tokens=8)
    assert plan.tolist() == [[11, 13, 12, 2]]
    assert plan.dtype == torch.int32
    assert (accepted.tolist(), running.tolist()) == ([1], [1])
    assert counts["num_accepted"].tolist() == [3]


def test_a_preempted_request_continues_from_its_last_computed_block() -> None:
    table = torch.tensor([[11, 12, 13, 14]] * 3)
    counts = columns(
        num_computed=[8, 0, 8],
        num_scheduled=[3, 3, 0],
        num_accepted=[3, 3, 3],
        running_block=[-1, -1, -1],
    )
    plan, accepted, running = before_forward(table, **counts, block_tokens=8)
    assert plan.tolist() == [[11, 11, 12, 0], [-1, -1, 0, 0], [-1, -1, 0, 0]]
    assert accepted.tolist() == [1, 1, 3]
    assert running.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("computed", "draft", "kept", "row", "left"),
    [
        (5, 2, 2, [-1, -1, 0, 0], 2),  # 7 tokens: no boundary yet
        (5, 2, 3, [11, 13, 11, 2], 1),  # 8: the running block ends here, and shifts in place
        (7, 0, 1, [-1, -1, 0, 0], 1),  # 8 without a draft: it is there already
        (7, 2, 1, [12, 12, 11, 0], 1),  # the step runs in block 1, the boundary is block 0's
        (6, 3, 3, [12, 13, 11, 1], 3),
        (8, 2, 3, [-1, -1, 0, 0], 3),  # the boundary was passed before
    ],
)
def test_accepted_tokens_pass_a_boundary(
    computed: int, draft: int, kept: int, row: list[int], left: int
) -> None:
    table = torch.tensor([[11, 12, 13, 14]])
    known = columns(num_computed=[computed], num_scheduled=[1 + draft])
    current = -(-(computed + 1 + draft) // 8) - 1
    plan, accepted, running = after_sampling(
        table,
        **known,
        **columns(num_draft=[draft], num_accepted=[kept], running_block=[current]),
        block_tokens=8,
    )
    assert plan.tolist() == [row]
    assert (accepted.tolist(), running.tolist()) == ([left], [current])


def test_planners_compile_to_one_graph() -> None:
    table = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]], dtype=torch.int32)
    counts = columns(num_computed=[7, 5], num_scheduled=[3, 3], num_accepted=[3, 1])
    running = torch.tensor([0, 0])
    draft = torch.tensor([2, 2])

    def plans() -> tuple[torch.Tensor, ...]:
        before = before_forward(table, **counts, running_block=running, block_tokens=8)
        given = counts | {"num_accepted": counts["num_accepted"] * 0 + 3}
        after = after_sampling(
            table, **given, num_draft=draft, running_block=before.running_block, block_tokens=8
        )
        return (*before, *after)

    compiled = torch.compile(plans, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(), plans(), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_without_value_checks_a_missing_block_copies_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kda_ops.cache.align._reads_values", lambda x: False)
    table = torch.tensor([[11, 12]])
    counts = columns(num_computed=[7], num_scheduled=[3], num_accepted=[9], running_block=[0])
    step = before_forward(table, **counts, block_tokens=8)
    assert step.plan.tolist() == [[-1, -1, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_computed": [-1]}, "num_computed must be at least 0, got -1 in row 0"),
        ({"num_scheduled": [-1]}, "num_scheduled must be at least 0, got -1 in row 0"),
        ({"num_accepted": [0]}, "num_accepted must be at least 1, got 0 in row 0"),
        ({"num_accepted": [4]}, "num_accepted must be at most 3, got 4 in row 0"),
        ({"num_draft": [3]}, r"num_draft must be in \[0, 3\), got 3 in row 0"),
        ({"num_draft": [-1]}, r"num_draft must be in \[0, 3\), got -1 in row 0"),
        ({"num_accepted": [1, 1]}, r"num_accepted must have shape \[1\], got \(2,\)"),
        ({"num_accepted": [1.0]}, "num_accepted must have dtype int32, int64, got float32"),
        ({"running_block": [9]}, "block_table must hold a block at position 9 of row 0"),
        ({"block_tokens": 0}, "block_tokens must be at least 1, got 0"),
        ({"table": [11]}, "block_table must have 2 dimensions"),
        (
            {"table": torch.zeros(1, 0, dtype=torch.int32)},
            r"block_table must have shape \[R, blocks\]",
        ),
        ({"table": [[11.0]]}, "block_table must have dtype int32, int64, got float32"),
        ({"table": [[0, 12]]}, "block_table must hold a block at position 0 of row 0"),
    ],
)
def test_errors(changes: dict[str, object], match: str) -> None:
    given: dict[str, object] = {
        "num_computed": [7],
        "num_scheduled": [3],
        "num_draft": [2],
        "num_accepted": [1],
        "running_block": [1],
        "table": [[11, 12]],
        "block_tokens": 8,
    }
    given |= changes
    table, block_tokens = torch.as_tensor(given.pop("table")), given.pop("block_tokens")
    counts = {name: torch.tensor(values) for name, values in given.items()}
    with pytest.raises(ValueError, match=match):
        after_sampling(table, **counts, block_tokens=block_tokens)
