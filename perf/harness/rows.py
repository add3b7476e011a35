"""A row: one provider of one case; how it is checked and measured, and what is recorded."""

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kda_ops._cases import Case, operator_packages, public_function
from kda_ops._registry import OPERATORS
from perf.harness import timing
from perf.harness.machine import Ceilings, ceilings

OURS = "kda_ops"
COMPILED = "kda_ops, compiled"
AGREEMENT = (
    0.02  # relative Frobenius error to the fp32-accumulating reference; bf16 operands reach 0.005
)
SEED = 0
COMPARED_AT_ONCE = 1 << 28  # elements: caches of many pages would not fit memory in fp64
REMEMBERED_BYTES = 4 << 30  # expected results kept for the next row of the same case

Inputs = dict[str, Any]
Call = Callable[[], Any]
Prepare = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Row:
    """One provider of one case.

    Attributes:
        stage: What is computed; rows of one stage and case are compared with one another.
        case: Name of the input.
        provider: The implementation.
        make: Makes random inputs on a device.
        prepare: Returns a call without arguments from inputs; its own work is not timed.
        expected: The same call through the eager references. None if there is nothing to check
            against.
        mutated: Inputs that the call writes and that are checked like results.
        bytes_moved: Bytes that any implementation reads and writes.
        flops: FLOPs in GEMMs.
        poison: Fill uninitialized memory with NaN while checking. Not for compiled code, which it
            would recompile, nor for baselines, which may read what they then mask.
        graph: Time replays of a CUDA graph; otherwise calls, one queued after another.
        ahead: Without a graph: let the GPU wait until all calls are queued, as it is busy in a
            training step, so that what the host takes does not count.
        limit: The largest relative error of a result that is measured.
    """

    stage: str
    case: str
    provider: str
    make: Callable[[torch.device], Inputs]
    prepare: Prepare
    expected: Prepare | None
    mutated: tuple[str, ...] = ()
    bytes_moved: int = 0
    flops: int = 0
    poison: bool = True
    graph: bool = True
    ahead: bool = False
    limit: float = AGREEMENT

    def __str__(self) -> str:
        return f"{self.stage}-{self.case}-{self.provider}".replace(" ", "")


class RunReferences(TorchDispatchMode):
    """Runs the eager reference of every operator, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            return OPERATORS[func].reference(*args)
        return func(*args, **(kwargs or {}))


def through_references(function: Callable[..., Any]) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        def call() -> Any:
            with RunReferences():
                return function(**inputs)

        return call

    return prepare


def direct(function: Callable[..., Any]) -> Prepare:
    return lambda inputs: lambda: function(**inputs)


def compiled(function: Callable[..., Any]) -> Prepare:
    """The function under `torch.compile`, compiled when it is first called."""

    def prepare(inputs: Inputs) -> Call:
        fast = torch.compile(function, fullgraph=True)
        return lambda: fast(**inputs)

    return prepare


def function_rows(
    stage: str,
    case: Case,
    function: Callable[..., Any],
    *,
    baselines: dict[str, Callable[[Case], Prepare | None]],
    compile_too: bool,
) -> list[Row]:
    """Rows of one function on one case: the baselines first, then ours, for its ratio to them."""
    common: dict[str, Any] = {
        "stage": stage,
        "case": case.name,
        "make": case.make,
        "expected": through_references(function),
        "bytes_moved": case.bytes_moved,
        "flops": case.flops,
    }
    rows = [
        Row(provider=provider, prepare=prepare, poison=False, **common)
        for provider, baseline in baselines.items()
        if (prepare := baseline(case)) is not None
    ]
    rows.append(Row(provider=OURS, prepare=direct(function), mutated=case.mutated, **common))
    if compile_too:
        rows.append(
            Row(
                provider=COMPILED,
                prepare=compiled(function),
                mutated=case.mutated,
                poison=False,
                **common,
            )
        )
    return rows


def operator_rows(
    name: str,
    *,
    baselines: dict[str, Callable[[Case], Prepare | None]] | None = None,
    compile_too: bool = False,
) -> list[Row]:
    """Rows of an operator's benchmark cases.

    Args:
        name: The operator, found in its `cases.py`.
        baselines: By name, a function from the case to `prepare` (None if unsupported).
        compile_too: Also measure the compiled operator (what its lowering generates).
    """
    function = public_function(name)
    cases = importlib.import_module(f"{operator_packages()[name]}.cases").CASES
    return [
        row
        for case in cases
        if case.perf
        for row in function_rows(
            name, case, function, baselines=baselines or {}, compile_too=compile_too
        )
    ]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)]


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖ in fp64; infinite if anything is not finite."""
    error = scale = 0.0
    parts = (x.flatten().split(COMPARED_AT_ONCE) for x in (out, expected))
    for part, right in zip(*parts, strict=True):
        part64, right64 = part.double(), right.double()
        if not bool(part64.isfinite().all()):
            return float("inf")
        scale += float(right64.square().sum())
        error += float((part64 - right64).square().sum())
    return (error if scale == 0.0 else error / scale) ** 0.5


def expected_tensors(row: Row, device: torch.device) -> list[Tensor]:
    """The row's expected results, from the eager references."""
    if row.expected is None:
        return []
    torch.manual_seed(SEED)
    inputs = row.make(device)
    return tensors(row.expected(inputs)()) + tensors([inputs[name] for name in row.mutated])


def check(row: Row, device: torch.device, expected: list[Tensor] | None = None) -> float:
    """The row's error against the eager references (`expected`, computed if None); raises if it is
    too large.
    """
    if row.expected is None:
        return 0.0
    if expected is None:
        expected = expected_tensors(row, device)
    torch.manual_seed(SEED)
    inputs = row.make(device)
    call = row.prepare(inputs)
    if row.poison:
        with timing.poisoned():
            result = call()
    else:
        result = call()
    found = tensors(result) + tensors([inputs[name] for name in row.mutated])
    if not row.provider.startswith(OURS):
        expected = expected[: len(found)]  # a baseline may not return a state
    if len(found) != len(expected):
        raise ValueError(f"{row} gave {len(found)} tensors, expected {len(expected)}")
    worst = 0.0
    for i, (out, reference) in enumerate(zip(found, expected, strict=True)):
        if out.numel() != reference.numel():
            raise ValueError(
                f"{row} result {i} has shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
            )
        worst = max(worst, relative_error(out.reshape(reference.shape), reference))
    if not worst <= row.limit:
        raise ValueError(
            f"{row} is off by {worst:.2e} (relative Frobenius), more than {row.limit}: not measured"
        )
    return worst


@dataclass
class Stopwatch:
    """Host seconds of each step of measuring a row."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 3)


@dataclass
class Measurer:
    """Checks and measures rows; remembers the baselines, for our ratios to them, and the last
    case's expected results, which its next row shares.
    """

    device: torch.device
    l2_bytes: int
    facts: dict[str, Any]
    baseline_seconds: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    remembered: tuple[Any, list[Tensor]] | None = None

    def __call__(self, row: Row, benchmark: Any) -> None:
        with torch.no_grad():
            try:
                self._measure(row, benchmark)
            finally:
                gc.collect()
                torch.cuda.empty_cache()

    def _expected(self, row: Row) -> list[Tensor]:
        """The expected results, computed once for consecutive rows of a case."""
        key = (row.stage, row.case, row.mutated, row.expected)
        if self.remembered is None or self.remembered[0] != key:
            self.remembered = None
            self.remembered = (key, expected_tensors(row, self.device))
        expected = self.remembered[1]
        if sum(x.numel() * x.element_size() for x in expected) > REMEMBERED_BYTES:
            self.remembered = None
        return expected

    def _measure(self, row: Row, benchmark: Any) -> None:
        watch = Stopwatch()
        torch._dynamo.reset()
        with watch.step("reference"):
            expected = self._expected(row)
        with watch.step("check"):
            error = check(row, self.device, expected)
        del expected
        torch.cuda.empty_cache()
        with watch.step("inputs"):
            calls = calls_of(row, self.device, self.l2_bytes)
        benchmark.group = f"{row.stage} {row.case}"
        with watch.step("measure"):
            seconds = _measured_seconds(calls, benchmark, row.graph, row.ahead)
        with watch.step("profile"):
            launched = timing.kernels(calls[0])
        with watch.step("eager"):
            eager = timing.eager_seconds(calls)
        workspace = timing.workspace_bytes(calls[0])
        benchmark.extra_info.update(
            describe(row, seconds, ceilings(), self.baseline_seconds.get((row.stage, row.case), {}))
            | {
                "eager_us": round(eager * 1e6, 2),
                "kernel_us": round(sum(us for _, us in launched.values()), 2),
                "workspace_MB": round(workspace * 1e-6, 1),
                "error": error,
                "input_sets": len(calls),
                "launches": sum(count for count, _ in launched.values()),
                "kernels": {name: [count, round(us, 2)] for name, (count, us) in launched.items()},
                "host_seconds": watch.seconds,
            }
            | self.facts
        )
        if not row.provider.startswith(OURS):
            self.baseline_seconds.setdefault((row.stage, row.case), {})[row.provider] = seconds


def calls_of(row: Row, device: torch.device, l2_bytes: int) -> list[Call]:
    """The row's call on so many sets of inputs that no cache holds one until its next turn."""
    torch.manual_seed(SEED)
    sets = [row.make(device)]
    more = timing.rotations(_input_bytes(sets[0]), l2_bytes) - 1
    sets += [row.make(device) for _ in range(more)]
    return [row.prepare(inputs) for inputs in sets]


def _measured_seconds(calls: list[Call], benchmark: Any, graph: bool, ahead: bool) -> float:
    """Median seconds of one call, each round making every call once."""
    if graph:
        captured, _results = timing.capture(calls)
        work = captured.replay
    else:

        def work() -> None:
            for call in calls:
                call()

    timing.warm_up(work)
    cycles = timing.queueing_cycles(work) if ahead and not graph else timing.SPIN_CYCLES

    def measured() -> None:
        timing.CLOCK.advance(timing.event_seconds(work, cycles) / len(calls))

    benchmark.pedantic(measured, rounds=timing.ROUNDS)
    return benchmark.stats.stats.median


def _input_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors in the inputs, views counted at their own size."""
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def describe(
    row: Row, seconds: float, ceiling: Ceilings, baseline_seconds: dict[str, float]
) -> dict[str, Any]:
    """Figures derived from a row's time: rates, its percentage of the roofline, and how much slower
    the fastest baseline is.
    """
    roofline = ceiling.roofline_seconds(row.bytes_moved, row.flops)
    facts: dict[str, Any] = {
        "stage": row.stage,
        "case": row.case,
        "provider": row.provider,
        "us": round(seconds * 1e6, 3),
        "roofline_us": round(roofline * 1e6, 3),
        "percent_of_roofline": round(100 * roofline / seconds, 1),
        "GB_per_s": round(row.bytes_moved / seconds * 1e-9, 1),
        "TFLOP_per_s": round(row.flops / seconds * 1e-12, 2),
        "copy_TB_per_s": round(ceiling.bytes_per_second * 1e-12, 3),
        "matmul_TFLOP_per_s": round(ceiling.flops_per_second * 1e-12, 1),
    }
    if row.provider.startswith(OURS) and baseline_seconds:
        baseline = min(baseline_seconds, key=lambda provider: baseline_seconds[provider])
        facts |= {
            "baseline": baseline,
            "baseline_us": round(baseline_seconds[baseline] * 1e6, 3),
            "baseline_ratio": round(baseline_seconds[baseline] / seconds, 3),
        }
    return facts
