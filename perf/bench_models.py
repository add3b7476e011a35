"""transformers' Kimi-Linear, three KDA layers and one of latent attention with dense MLPs, in bf16:
unmodified and accelerated, eager and compiled.

Prefill without a cache, and a decode step on a static one. `us` is the time of calls that are
queued one after another, `eager_us` that of one call on an idle GPU, what the host does included,
`kernel_us` the sum of its kernels. `compile_seconds` are those of a compiled row's first call, with
the caches of the compiler as they are. A decode step is the host's time: one row's calls took 70 %
longer than those of the next minute. So ours also take turns with the unmodified model's, `in_turn`
times as long.
Before a row is timed, the RMSE of its logits to those of the unmodified model in fp32 is held
against that of the unmodified model in bf16: `error_ratio`.

The unmodified model's prefill is not compiled unless `KDA_OPS_PERF_SLOW=1` is set: under
`torch.compile` transformers unrolls its PyTorch, which compiled for 244 s on an H200.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from perf.baselines import kimi_linear
from perf.baselines.kimi_linear import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    LATENT,
    LAYER_TYPES,
    ROTARY,
    VOCABULARY,
    accelerated,
    sharing_weights,
    transformers,
    unmodified,
)
from perf.bench_layer import WEIGHTS
from perf.harness.gradients import UnavailableError
from perf.harness.rows import COMPILED, OURS, SEED, Call, Inputs, Prepare, Row, relative_error
from perf.harness.timing import times_of_first

DEVICE = torch.device("cuda")
SLOW = "KDA_OPS_PERF_SLOW"
SLOW_SECONDS = 1200  # for a row that has compiled for 244 s, more tokens and a slower host
WORSE = 1.05  # the most of RMSE, as a multiple of the unmodified model's
PREFILLS, BATCHES = (4096, 8192), (1, 16)
PROMPT = 64  # tokens before the first decode step
STEPS = 32  # that are checked: one of a single sequence has too few logits to tell 5 % from chance
# Warming up and measuring make fewer than 200 steps of a cache, each as long as reading weights.
CACHE_TOKENS = 512
EAGER = f"{OURS}, eager"
MLA_WEIGHTS = (
    HIDDEN * (HEADS * (HEAD_DIM + ROTARY) + LATENT + ROTARY)  # q, and the latents
    + LATENT * HEADS * 2 * HEAD_DIM  # k and v of latents
    + HEADS * HEAD_DIM * HIDDEN
)
LAYERS = len(LAYER_TYPES)
MODEL_WEIGHTS = (
    (LAYERS - 1) * WEIGHTS + MLA_WEIGHTS + LAYERS * 3 * HIDDEN * INTERMEDIATE + HIDDEN * VOCABULARY
)
STATE_BYTES = (LAYERS - 1) * 4 * HEADS * HEAD_DIM**2  # of a sequence


def tokens_of(device: torch.device, *shape: int) -> Tensor:
    """Random tokens, the same for all rows."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(2, VOCABULARY, shape, generator=generator).to(device)


@dataclass(frozen=True)
class Prefill:
    """One prompt."""

    tokens: int

    def inputs(self, device: torch.device) -> Inputs:
        return {"input_ids": tokens_of(device, 1, self.tokens), "use_cache": False}

    def logits(self, model: Any, call: Any, device: torch.device) -> Tensor:
        """Those that are checked."""
        found: Tensor = call(**self.inputs(device)).logits
        return found


@dataclass(frozen=True)
class Decode:
    """A token of each sequence, after a prompt."""

    batch: int

    def inputs(self, device: torch.device, model: Any = None) -> Inputs:
        """With a cache that an eager model has filled, the unmodified one if it is None."""
        filling = unmodified(device) if model is None else model
        cache = kimi_linear.static_cache(filling, CACHE_TOKENS)
        filling(input_ids=tokens_of(device, self.batch, PROMPT), cache=cache)
        return {"input_ids": tokens_of(device, self.batch, 1), "cache": cache}

    def logits(self, model: Any, call: Any, device: torch.device) -> Tensor:
        """Those that are checked, of several steps after the prompt, which `model` has read."""
        cache = self.inputs(device, model)["cache"]
        steps = tokens_of(device, self.batch, STEPS).split(1, dim=1)
        # Copies, as a compiled call may use its memory again.
        return torch.cat([call(input_ids=x, cache=cache).logits.clone() for x in steps], dim=1)


Case = Prefill | Decode


@functools.lru_cache(maxsize=1)  # rows of a case follow one another
def reference(case: Case, device: torch.device) -> tuple[Tensor, float]:
    """The logits of the unmodified model in fp32, and how far it is from them in bf16."""
    with kimi_linear.without_kernels():
        model = kimi_linear.exact(device)
        logits = case.logits(model, model, device)
    model = unmodified(device)
    error = relative_error(case.logits(model, model, device), logits)
    if not 0.0 < error < 1.0:
        raise ValueError(f"{case}: the unmodified model is off by {error:.2e} in bf16")
    return logits, error


@dataclass(frozen=True)
class Side:
    """A way to run the model."""

    ours: bool
    compiled: bool

    def prepare(self, case: Case) -> Prepare:
        def prepare(inputs: Inputs) -> Call:
            run, arguments = checked(self, case, inputs["device"]), inputs["arguments"]
            return lambda: run.call(**arguments).logits

        return prepare


@dataclass(frozen=True)
class Run:
    """A model that has been checked, and what is recorded of it."""

    call: Any
    facts: dict[str, Any]


@functools.lru_cache(maxsize=1)  # those of a row: another one has a module of its own
def checked(side: Side, case: Case, device: torch.device) -> Run:
    """Makes, compiles and checks a model.

    Raises:
        ValueError: It is further from fp32 than the unmodified model.
    """
    exact, allowed = reference(case, device)
    model = accelerated(device) if side.ours else sharing_weights(unmodified(device))
    # Ours must be one graph; transformers' may break.
    call = torch.compile(model, fullgraph=side.ours) if side.compiled else model
    facts: dict[str, Any] = {}
    if side.compiled:
        inputs = case.inputs(device)
        start = time.perf_counter()
        call(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        facts["compile_seconds"] = round(time.perf_counter() - start, 1)
    error = relative_error(case.logits(unmodified(device), call, device), exact)
    facts |= {"error": error, "error_ratio": round(error / allowed, 4)}
    if not error <= WORSE * allowed:
        raise ValueError(
            f"{side} of {case} is off by {error:.2e}, {error / allowed:.3f} times as far as the "
            f"unmodified model, more than {WORSE}: not measured"
        )
    return Run(call, facts)


def in_turn(side: Side, case: Case) -> float:
    """How many times as long a call of the unmodified model takes, in the same way."""
    sides = (side, Side(ours=False, compiled=side.compiled))
    return times_of_first(*(x.prepare(case)(inputs_of(case, DEVICE)) for x in sides))


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """With the weights, which are read too: so large that no cache holds them until the next
    call.
    """
    weights = list(unmodified(device).parameters())
    return {"arguments": case.inputs(device), "weights": weights, "device": device}


def sides(case: Case) -> dict[str, Side]:
    """By name; the baselines first. Nothing without transformers."""
    theirs = {f"{name}, eager": side for name, side in transformers(Side(False, False)).items()}
    if isinstance(case, Decode) or os.environ.get(SLOW) == "1":
        compiled = transformers(Side(False, True))
        theirs |= {f"{name}, compiled": side for name, side in compiled.items()}
    ours = {EAGER: Side(True, False), COMPILED: Side(True, True)}
    return theirs | ours if theirs else {}


Rows = dict[Row, tuple[Side, Case]]


def rows_of(case: Case, stage: str, name: str, bytes_moved: int, flops: int) -> Rows:
    """What is measured, and how it runs."""
    found = {}
    for provider, side in sides(case).items():
        row = Row(
            stage=stage,
            case=name,
            provider=provider,
            make=functools.partial(inputs_of, case),
            prepare=side.prepare(case),
            expected=None,  # checked when it is prepared
            bytes_moved=bytes_moved,
            flops=flops,
            graph=False,
        )
        found[row] = (side, case)
    return found


def model_rows() -> Rows:
    found: Rows = {}
    for tokens in PREFILLS:
        attention = tokens**2 * HEADS * (2 * HEAD_DIM + ROTARY)  # the causal half, q k and p v
        flops = 2 * tokens * MODEL_WEIGHTS + attention
        found |= rows_of(Prefill(tokens), "model prefill", f"T{tokens}", 2 * MODEL_WEIGHTS, flops)
    for batch in BATCHES:
        moved = 2 * MODEL_WEIGHTS + 2 * batch * STATE_BYTES  # states are read and written
        flops = 2 * batch * MODEL_WEIGHTS
        found |= rows_of(Decode(batch), "model decode", f"batch{batch}", moved, flops)
    return found


ROWS = model_rows()


def with_limit(row: Row) -> Any:
    """The row as a parameter, with a time limit of its own if it unrolls."""
    side, case = ROWS[row]
    slow = side.compiled and not side.ours and isinstance(case, Prefill)
    marks = [pytest.mark.timeout(SLOW_SECONDS)] if slow else []
    return pytest.param(row, id=str(row), marks=marks)


@pytest.fixture(scope="module", autouse=True)
def _released() -> Iterator[None]:
    """No memory is kept for the rows of other files."""
    yield
    for cached in (checked, reference, unmodified):
        cached.cache_clear()


@pytest.mark.parametrize("row", [with_limit(row) for row in ROWS])
def bench_models(row: Row, measure: Callable[[Row], None], benchmark: Any) -> None:
    try:
        measure(row)
    except UnavailableError as error:
        pytest.skip(f"{row}: {error}")
    side, case = ROWS[row]
    benchmark.extra_info.update(checked(side, case, DEVICE).facts)
    if side.ours and isinstance(case, Decode):
        benchmark.extra_info["in_turn"] = round(in_turn(side, case), 4)
