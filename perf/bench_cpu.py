"""What a user of a CPU sees: `short_conv` beside a copy of its bytes, a compiled layer beside its
eager self. fp32, hidden 512, 8 heads of 64, two threads. Needs no GPU.

The two sides of a ratio take turns, so that whatever else the machine does meets both: in blocks of
calls, as a step of a server follows a step.
"""

import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kda_ops
from kda_ops.cache.batch import KDABatch
from kda_ops.nn.layer import KimiDeltaAttention
from perf.harness import machine
from perf.harness.rows import AGREEMENT, Call, relative_error

pytestmark = pytest.mark.host
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

HIDDEN, HEADS, HEAD_DIM, TOKENS, TAPS = 512, 8, 64, 1024, 4
THREADS, ROUNDS, WARM_UP, BLOCK = 2, 400, 10, 10
SETS = 24  # 6 MB each: more than the last cache of most machines, targets counted too
CHANNELS = 3 * HEADS * HEAD_DIM
CONV_TARGET, PREFILL_TARGET, DECODE_TARGET = 3.0, 1.5, 3.0
Pair = Callable[..., None]


@pytest.fixture(autouse=True, scope="module")
def _freed_memory_is_kept() -> None:
    """Else glibc may return a result's pages to the system, and each call faults them in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 1 << 30)
        mallopt(MMAP_THRESHOLD, 1 << 30)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def measure_pair(
    benchmark: Any,
    work: str,
    case: str,
    call: Call,
    against: str,
    other: Call,
    target: float,
    *,
    at_most: bool = False,
    rounds: int = ROUNDS,
) -> None:
    """Measures a call beside another in turns, and writes down the ratio of their medians: how many
    times as long the call takes (`at_most`), or how many times as fast it is.
    """
    times: dict[Call, list[float]] = {call: [], other: []}

    def block(of: Call) -> None:
        for _ in range(BLOCK):
            start = time.perf_counter()
            of()
            times[of].append(time.perf_counter() - start)

    for _ in range(WARM_UP):
        other()
        call()
    benchmark.group = f"{work} {case}"
    benchmark.pedantic(lambda: block(call), setup=lambda: block(other), rounds=rounds // BLOCK)
    own, others = (statistics.median(times[of]) for of in (call, other))
    ratio = own / others if at_most else others / own
    benchmark.extra_info.update(
        work=work,
        case=case,
        us=round(own * 1e6, 2),
        against=against,
        against_us=round(others * 1e6, 2),
        ratio=round(ratio, 3),
        target=target,
        at_most=at_most,
        met=ratio <= target if at_most else ratio >= target,
        threads=THREADS,
        cpu=machine.cpu(),
        torch=torch.__version__,
    )


@pytest.fixture
def pair(benchmark: Any) -> Pair:
    return functools.partial(measure_pair, benchmark)


@pytest.mark.parametrize("sets", [1, SETS], ids=["in-cache", "in-memory"])
def bench_short_conv(pair: Pair, sets: int) -> None:
    """One input over and over, which a cache may hold, and so many in turn that none does."""
    weight = torch.randn(CHANNELS, TAPS)
    inputs = [torch.randn(1, TOKENS, CHANNELS) for _ in range(sets)]
    targets = [torch.empty_like(x) for x in inputs]
    copies = itertools.cycle(zip(targets, inputs, strict=True))
    convolved = itertools.cycle(inputs[1:] + inputs[:1])

    def copy() -> None:
        target, x = next(copies)
        target.copy_(x)

    pair(
        "short_conv",
        f"T{TOKENS}-D{CHANNELS}-in-{'cache' if sets == 1 else 'memory'}",
        lambda: kda_ops.short_conv(next(convolved), weight),
        "copy of its bytes",
        copy,
        CONV_TARGET,
        at_most=True,
    )


def layer() -> KimiDeltaAttention:
    return KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS).eval()


def beside_eager(pair: Pair, case: str, target: float, rounds: int, **inputs: Any) -> None:
    """A compiled layer and the same layer eager. In decode each goes on from where the other left
    the states.
    """
    module = layer()
    fast = torch.compile(module, fullgraph=True)
    states = inputs.get("state", ())
    before = [x.clone() for x in states]
    expected = module(**inputs)
    for x, old in zip(states, before, strict=True):
        x.copy_(old)
    assert relative_error(fast(**inputs), expected) <= AGREEMENT
    pair(
        "layer, compiled",
        case,
        lambda: fast(**inputs),
        "eager",
        lambda: module(**inputs),
        target,
        rounds=rounds,
    )


def bench_prefill(pair: Pair) -> None:
    hidden_states = torch.randn(1, TOKENS, HIDDEN)
    case = f"prefill-T{TOKENS}"
    beside_eager(pair, case, PREFILL_TARGET, ROUNDS // 4, hidden_states=hidden_states)


@pytest.mark.parametrize("sequences", [1, 8])
def bench_decode(pair: Pair, sequences: int) -> None:
    beside_eager(
        pair,
        f"decode-batch{sequences}",
        DECODE_TARGET,
        ROUNDS,
        hidden_states=torch.randn(1, sequences, HIDDEN),
        state=layer().state_spec().allocate(sequences + 1),
        batch=KDABatch.decode(range(1, sequences + 1)),
    )
