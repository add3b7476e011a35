"""Training: gradients of the core, the convolution and the gated norm, and a step of a whole layer.

Core: from raw projections, the gradients of q, k, v, the gate's input and parameters, and beta;
backward alone, and with its forward. cuDNN's core has less to do: norms, gate and sigmoid are not
in its time. Layer: the gradients of its input and all parameters, compiled and eager, FLA's with
the same weights. Gradients of operators are checked against those of their references, but cuDNN's,
which are others, and a layer's, which `perf.bench_layer` checks forward.
`peak_MB` is the memory of arguments, results and all between them, without weights; a compiled
layer's CUDA graphs keep theirs from before.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kda_ops._registry import OPERATORS
from kda_ops.delta_rule.chunk_kda_gated.op import chunk_kda_gated_op
from kda_ops.nn.layer import KimiDeltaAttention
from perf.baselines.cudnn import CUDNN, cudnn, cudnn_core
from perf.baselines.fla import fla
from perf.bench_core import NAMES, core_inputs
from perf.bench_layer import (
    COMPILE_SECONDS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    WEIGHTS,
    fla_layer_like,
)
from perf.harness.gradients import (
    UnavailableError,
    arguments_of,
    differentiated,
    reference_gradients,
    without_output,
)
from perf.harness.rows import COMPILED, OURS, Call, Inputs, Prepare, Row

D = 128
CORES: dict[str, tuple[tuple[int, ...], int, float | None]] = {
    "softplus-T8192-H32": ((8192,), 32, None),
    "softplus-T4096-H16": ((4096,), 16, None),
    "softplus-T2048-H32": ((2048,), 32, None),
    "softplus-T8192-H8": ((8192,), 8, None),
    "bounded-T8192-H64": ((8192,), 64, -5.0),
    "softplus-8x1024-H32": ((1024,) * 8, 32, None),
}
FLA_COMPILED_AT = 8192  # tokens: once is enough, since FLA's layer breaks into many graphs
GRAPHS = f"{COMPILED}, CUDA graphs"


def with_gradient(inputs: Inputs) -> Inputs:
    """The inputs of the core, and the gradient of its output."""
    return inputs | {"do": torch.randn_like(inputs["v"])}


def all_arguments(inputs: Inputs) -> Inputs:
    """With the constants that the public function adds."""
    constants = {"beta_scale": 1.0, "qk_norm_eps": 1e-6, "scale": D**-0.5}
    return inputs | constants | {"output_final_state": False}


def core_reference(inputs: Inputs) -> Call:
    return reference_gradients(chunk_kda_gated_op, all_arguments(inputs), NAMES, inputs["do"])


def our_core(forward: bool) -> Prepare:
    """As eager code calls them: the forward that saves, and the gradient from what it saved."""
    saving: Any = OPERATORS[chunk_kda_gated_op].saving
    needs = [argument.name in NAMES for argument in chunk_kda_gated_op._schema.arguments]

    def prepare(inputs: Inputs) -> Call:
        arguments = arguments_of(chunk_kda_gated_op, all_arguments(inputs))
        kept = None if forward else saving.forward.op(*arguments)

        def call() -> Any:
            found = saving.forward.op(*arguments) if kept is None else kept
            results, saved = saving.split_results(found)
            gradients = saving.backward.op(*arguments, *saved.values(), inputs["do"], None, needs)
            return results[0], gradients[: len(NAMES)]

        return call

    return prepare


def fla_core(forward: bool) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        from fla.ops.kda import chunk_kda

        leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
        lower_bound = inputs["lower_bound"]

        def output() -> Tensor:
            q, k, v, x, beta, A_log, dt_bias = leaves
            o: Tensor = chunk_kda(
                q,
                k,
                v,
                x,
                beta,
                A_log=A_log,
                dt_bias=dt_bias.reshape(-1),
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                safe_gate=lower_bound is not None,
                lower_bound=lower_bound,
                cu_seqlens=inputs.get("cu_seqlens"),
            )[0]
            return o

        return differentiated(forward, leaves, output, inputs["do"])

    return prepare


def core_rows() -> list[Row]:
    found = []
    for name, (lengths, H, lower_bound) in CORES.items():
        n = 2 * sum(lengths) * H * D  # bytes of one tensor
        for stage, forward in (("core backward", False), ("core training", True)):
            for provider, side in core_providers(lengths).items():
                row = Row(
                    stage=stage,
                    case=name,
                    provider=provider,
                    make=lambda device, sizes=(lengths, H, lower_bound): with_gradient(
                        core_inputs(device, *sizes)
                    ),
                    prepare=side(forward),
                    expected=None if provider.startswith(CUDNN) else core_reference,
                    poison=provider == OURS,
                    # q, k, v, the gate's input, do and four gradients; forward four of them and o
                    bytes_moved=(14 if forward else 9) * n,
                    graph=False,
                    ahead=True,
                )
                found.append(row)
    return found


def core_providers(lengths: tuple[int, ...]) -> dict[str, Callable[[bool], Prepare]]:
    """The baselines first, for our ratio to them; cuDNN's for one sequence."""
    one = len(lengths) == 1
    return {**fla(fla_core), **(cudnn(cudnn_core) if one else {}), OURS: our_core}


CHANNELS, TOKENS, NORM_EPS = 12288, 8192, 1e-5


def conv_inputs(device: torch.device) -> Inputs:
    x, dy = torch.randn(2, 1, TOKENS, CHANNELS, device=device, dtype=torch.bfloat16)
    return {"x": x, "dy": dy, "weight": torch.randn(CHANNELS, 4, device=device).bfloat16()}


CONV, NORM = torch.ops.kda_ops.short_conv.default, torch.ops.kda_ops.rms_norm_gated.default


def conv_reference(inputs: Inputs) -> Call:
    given = inputs | {"activation": "silu"}
    return without_output(reference_gradients(CONV, given, ("x", "weight"), inputs["dy"]))


def our_convolution(inputs: Inputs) -> Call:
    backward = torch.ops.kda_ops.short_conv_backward.default
    arguments = (inputs["x"], inputs["weight"], None, "silu", None, inputs["dy"])
    return lambda: backward(*arguments, [True, True, False, False, False])[:2]


def fla_convolution(inputs: Inputs) -> Call:
    from fla.modules.convolution import causal_conv1d

    x, weight = (inputs[name].detach().requires_grad_() for name in ("x", "weight"))

    def output() -> Tensor:
        y: Tensor = causal_conv1d(x, weight, activation="silu")[0]
        return y

    return without_output(differentiated(False, [x, weight], output, inputs["dy"]))


def norm_inputs(device: torch.device) -> Inputs:
    shape = (1, TOKENS, HEADS, HEAD_DIM)
    o, gate, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.ones(HEAD_DIM, device=device, dtype=torch.bfloat16)
    return {"o": o, "output_gate": gate, "weight": weight, "dy": dy}


def norm_reference(inputs: Inputs) -> Call:
    given = inputs | {"eps": NORM_EPS}
    names = ("o", "output_gate", "weight")
    return without_output(reference_gradients(NORM, given, names, inputs["dy"]))


def our_norm(inputs: Inputs) -> Call:
    backward = torch.ops.kda_ops.rms_norm_gated_backward.default
    arguments = (*(inputs[name] for name in ("o", "output_gate", "weight")), NORM_EPS, inputs["dy"])
    return lambda: backward(*arguments, [True, True, True, False])


def fla_norm(inputs: Inputs) -> Call:
    from fla.modules.fused_norm_gate import rms_norm_gated

    leaves = [inputs[name].detach().requires_grad_() for name in ("o", "output_gate", "weight")]

    def output() -> Tensor:
        y: Tensor = rms_norm_gated(*leaves, None, activation="sigmoid", eps=NORM_EPS)
        return y

    return without_output(differentiated(False, leaves, output, inputs["dy"]))


def small_rows() -> list[Row]:
    found = []
    conv = (conv_inputs, fla_convolution, our_convolution, conv_reference, 3 * CHANNELS)
    norm = (norm_inputs, fla_norm, our_norm, norm_reference, 5 * HEADS * HEAD_DIM)
    for stage, (make, theirs, ours, reference, count) in (
        ("short_conv backward", conv),
        ("rms_norm_gated backward", norm),
    ):
        for provider, prepare in {**fla(theirs), OURS: ours}.items():
            row = Row(
                stage=stage,
                case=f"T{TOKENS}-H{HEADS}",
                provider=provider,
                make=make,
                prepare=prepare,
                expected=reference,
                bytes_moved=2 * TOKENS * count,
                poison=provider == OURS,
                graph=False,
                ahead=True,
            )
            found.append(row)
    return found


@functools.cache
def trained_layer() -> KimiDeltaAttention:
    torch.manual_seed(0)
    return KimiDeltaAttention(HIDDEN, HEAD_DIM, HEADS, device="cuda", dtype=torch.bfloat16)


def layer_inputs(device: torch.device, tokens: int) -> Inputs:
    x, do = torch.randn(2, 1, tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    return {"hidden_states": x, "do": do}


def step_of(module: nn.Module, call: Any, inputs: Inputs) -> Call:
    x = inputs["hidden_states"].detach().requires_grad_()
    leaves = [x, *module.parameters()]

    def output() -> Tensor:
        result = call(x)
        return result[0] if isinstance(result, tuple) else result

    return differentiated(True, leaves, output, inputs["do"])


@functools.cache
def compiled_layer(mode: str | None) -> Any:
    """Made once for all sets of inputs of a row."""
    return torch.compile(trained_layer(), fullgraph=True, mode=mode, dynamic=False)


def our_step(mode: str | None) -> Prepare:
    return lambda inputs: step_of(trained_layer(), compiled_layer(mode), inputs)


def our_eager_step(inputs: Inputs) -> Call:
    module = trained_layer()
    return step_of(module, module, inputs)


@functools.cache
def trained_fla_layer() -> nn.Module:
    return fla_layer_like(trained_layer()).train()


@functools.cache
def compiled_fla_layer() -> Any:
    return torch.compile(trained_fla_layer(), dynamic=False)


def fla_step(inputs: Inputs) -> Call:
    return step_of(trained_fla_layer(), trained_fla_layer(), inputs)


def compiled_fla_step(inputs: Inputs) -> Call:
    return step_of(trained_fla_layer(), compiled_fla_layer(), inputs)


def layer_rows() -> list[Row]:
    found = []
    for tokens in (8192, 2048):
        sides = {f"{name}, eager": step for name, step in fla(fla_step).items()}
        if tokens == FLA_COMPILED_AT:
            sides |= {f"{name}, compiled": step for name, step in fla(compiled_fla_step).items()}
        sides |= {
            OURS: our_eager_step,
            COMPILED: our_step(None),
            GRAPHS: our_step("reduce-overhead"),
        }
        for provider, prepare in sides.items():
            row = Row(
                stage="layer training",
                case=f"T{tokens}-H{HEADS}",
                provider=provider,
                make=lambda device, tokens=tokens: layer_inputs(device, tokens),
                prepare=prepare,
                expected=None,
                flops=6 * tokens * WEIGHTS,
                bytes_moved=3 * 2 * WEIGHTS,
                graph=False,
                ahead=True,
            )
            found.append(row)
    return found


ROWS = [*layer_rows(), *small_rows(), *core_rows()]


def with_limit(row: Row) -> Any:
    """The row as a parameter, with a time limit if it compiles FLA's layer, in both directions."""
    slow = row.prepare is compiled_fla_step
    marks = [pytest.mark.timeout(2 * COMPILE_SECONDS)] if slow else []
    return pytest.param(row, id=str(row), marks=marks)


def peak_bytes(row: Row, device: torch.device) -> int:
    """The most memory of a row's second call, with its inputs."""
    before = torch.cuda.memory_allocated()
    call = row.prepare(row.make(device))
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("row", [with_limit(row) for row in ROWS])
def bench_training(row: Row, measure: Callable[[Row], None], benchmark: Any) -> None:
    try:
        measure(row)
    except UnavailableError as error:
        pytest.skip(f"{row}: {error}")
    if row.provider != GRAPHS:
        peak = peak_bytes(row, torch.device("cuda"))
        benchmark.extra_info["peak_MB"] = round(peak * 1e-6)
