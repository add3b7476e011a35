"""States and batches without values: in fake modes, in graphs, in exported programs."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

import kda_ops
from kda_ops.cache.batch import COUNTS, KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.nn.layer import KimiDeltaAttention
from tests.nn.test_layer import BF16, HIDDEN, clone_state, in_fp64, make_layer, make_state
from tests.support.oracle import assert_close

ROOT = Path(kda_ops.__file__).parent.parent
PAIRS = torch.arange(1, 23, dtype=torch.int32).view(11, 2)


def batch_of(kind: str, more: int = 0) -> KDABatch:
    """A step of a kind, with all counts larger by `more`."""
    two = 2 + more
    if kind == "decode":
        return KDABatch.decode(list(range(1, 1 + two)))
    if kind == "speculative":
        lengths = [1 + n % 2 for n in range(two)]
        return KDABatch.decode(PAIRS[:two], lengths=lengths, num_accepted=lengths)
    if kind == "blocks":
        table = [[8 + n] for n in range(two)]
        return KDABatch.prefill(
            [67] * two, list(range(1, 1 + two)), block_table=table, block_tokens=64
        )
    chunk_indices = {"has_initial_state": [n % 2 == 0 for n in range(two)]}
    if kind == "prefill":
        return KDABatch.prefill([67] * two, PAIRS[:two], num_accepted=[2] * two, **chunk_indices)
    return KDABatch.mixed(
        [1] * two, [5] * two, list(range(1, 1 + 2 * two)), num_tokens=30, **chunk_indices
    )


every_kind = pytest.mark.parametrize("kind", ["decode", "speculative", "prefill", "mixed"])


# What a process does that has only the package and, second, only the import.
ALONE = """
import sys, torch
leaves, expected = torch.load(sys.argv[2])
leaves = [x for x in leaves if x is not None]
try:
    torch._inductor.aoti_load_package(sys.argv[1])
except RuntimeError as error:
    print(str(error).splitlines()[0])
import kda_ops
out = torch._inductor.aoti_load_package(sys.argv[1]).loader.boxed_run(leaves)[0]
print(float((out - expected).norm() / expected.norm()))
"""


class Step(nn.Module):
    """A server's step; arguments by position."""

    def __init__(self, layer: KimiDeltaAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], batch: KDABatch) -> Tensor:
        return self.layer(x, state=state, batch=batch)


def inputs_of(layer: KimiDeltaAttention, batch: KDABatch) -> tuple[Any, ...]:
    num_spec = batch.state_indices.dim() - 1
    return torch.randn(1, batch.num_tokens, HIDDEN), make_state(layer, num_spec=num_spec), batch


def check_step(call: Any, layer: KimiDeltaAttention, batch: KDABatch) -> None:
    """Output and states, written in place, against the eager layer and fp64."""
    x, state, _ = inputs_of(layer, batch)
    eager, exact = clone_state(state), tuple(t.double() for t in state)
    out, reference = call(x, state, batch), layer(x, state=eager, batch=batch)
    assert_close(out, reference, in_fp64(layer)(x.double(), state=exact, batch=batch))
    for states in zip(state, eager, exact, strict=True):
        assert_close(*states)


# ------------------------------------------------------------------------------------- pytree


@every_kind
def test_a_batch_is_a_tree_of_its_tensors(kind: str) -> None:
    batch = batch_of(kind)
    twin = tree_map(lambda x: None if x is None else x.clone(), batch)
    assert isinstance(twin, KDABatch)
    assert (twin.kind, twin._small) == (batch.kind, True)
    for name in COUNTS:
        assert getattr(twin, name) == getattr(batch, name), name
    for x, y in zip(tree_leaves(twin), tree_leaves(batch), strict=True):
        assert (x is None and y is None) or (x is not y and torch.equal(x, y))
    layer = make_layer()
    check_step(lambda x, state, _: layer(x, state=state, batch=twin), layer, batch)


# ---------------------------------------------------------------------------------- fake modes


@every_kind
def test_fake_mode(kind: str) -> None:
    real = batch_of(kind)
    with FakeTensorMode() as mode:
        layer = make_layer()
        state = layer.state_spec(num_spec=real.state_indices.dim() - 1).allocate(23)
        moved = tree_map(lambda x: None if x is None else mode.from_tensor(x), real)
        batch = moved if real.state_indices.dim() == 2 else batch_of(kind)  # passed, or built
        assert all(isinstance(x, FakeTensor) for x in tree_leaves(batch) if x is not None)
        out = layer(torch.randn(1, batch.num_tokens, HIDDEN), state=state, batch=batch)
        assert out.shape == (1, real.num_tokens, HIDDEN)


@pytest.mark.parametrize("layers", [None, 2])
def test_fake_states_are_like_real_ones(layers: int | None) -> None:
    spec = KDAStateSpec(2, 4, 16, 24, num_spec=1, conv_dtype=BF16)
    with FakeTensorMode():
        fake = spec.allocate(5, layers=layers)
    for x, y in zip(fake, spec.allocate(5, layers=layers), strict=True):
        assert isinstance(x, FakeTensor)
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert x.storage_offset() == y.storage_offset()


# -------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_step_in_one_graph(backend: str) -> None:
    """Allocated, described, stepped twice: both states are written in one buffer."""
    layer = make_layer(BF16)
    spec = layer.state_spec()

    def run(x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        state = spec.allocate(4)
        y = layer(x, state=state, batch=KDABatch.prefill([2, 3], [1, 2]))
        tokens = KDABatch.decode([2, 1])
        return y, layer(x[:, :2], state=state, batch=tokens), state

    x = torch.randn(1, 5, HIDDEN, dtype=BF16)
    y, z, state = torch.compile(run, fullgraph=True, backend=backend)(x)
    eager = run(x)
    twin = in_fp64(layer)
    exact = tuple(t.double() for t in spec.allocate(4))
    assert_close(y, eager[0], twin(x.double(), state=exact, batch=KDABatch.prefill([2, 3], [1, 2])))
    tokens = KDABatch.decode([2, 1])
    assert_close(z, eager[1], twin(x[:, :2].double(), state=exact, batch=tokens))
    for s, r, e in zip(state, eager[2], exact, strict=True):
        assert s.stride() == r.stride()
        assert_close(s, r, e, operand_dtype=BF16)
    assert state[0].untyped_storage().data_ptr() == state[1].untyped_storage().data_ptr()


# ------------------------------------------------------------------------------------- exports


def exported(layer: KimiDeltaAttention, batch: KDABatch, strict: bool) -> Any:
    """A program of any rows and counts of the batch's kind."""
    inputs = inputs_of(layer, batch)
    shapes = ShapesCollection()
    shapes[inputs[0]] = {1: Dim.AUTO}
    for x in tree_leaves(batch):
        if x is not None:
            axes = range(len(COUNTS)) if x is batch.counts else [0]
            shapes[x] = {axis: Dim.AUTO for axis in axes if x.shape[axis] > 1}
    return torch.export.export(Step(layer), inputs, strict=strict, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("kind", "strict"),
    [
        ("decode", True),
        ("speculative", False),
        ("prefill", False),
        ("mixed", True),
        ("decode", False),
        ("blocks", False),
    ],
)
def test_exported_steps(kind: str, strict: bool) -> None:
    layer = make_layer()
    program = exported(layer, batch_of(kind), strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    call = torch.export.load(file).module()
    for more in (0, 1):
        check_step(call, layer, batch_of(kind, more))


# what it loads was built here, for this machine
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_decode_through_aot_inductor(tmp_path: Path) -> None:
    """Here, and in a process of its own, which must import this package, as a warning says."""
    layer = make_layer()
    program = exported(layer, batch_of("decode"), False)
    with pytest.warns(UserWarning, match="a process that loads it must import kda_ops before"):
        path = torch._inductor.aoti_compile_and_package(program)
    call = torch._inductor.aoti_load_package(path)
    for more in (0, 1):
        check_step(call, layer, batch_of("decode", more))

    batch = batch_of("decode", 1)
    x, state, _ = inputs_of(layer, batch)
    leaves = tree_leaves((x, state, batch))
    torch.save((leaves, layer(x, state=clone_state(state), batch=batch)), tmp_path / "step.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, path, str(tmp_path / "step.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, error = done.stdout.splitlines()
    assert "Could not find schema for kda_ops::" in without
    assert float(error) < 1e-5


def test_wrong_values_are_still_rejected() -> None:
    with pytest.raises(ValueError, match=re.escape("cu_seqlens must not decrease")):
        KDABatch(
            cu_seqlens=torch.tensor([0, 2, 1]),
            state_indices=torch.tensor([1, 2]),
            has_initial_state=torch.tensor([True, True]),
            num_decodes=2,
            num_decode_tokens=2,
            num_prefills=0,
            num_prefill_tokens=0,
            num_tokens=2,
        )
