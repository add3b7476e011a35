"""How kernels are chosen: from the table, by timing (here with a fake timer), and from an earlier
process's cache.
"""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.lowering import lowerings as inductor_lowerings
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import kda_ops
from kda_ops import config, lowering, tuning
from kda_ops._numerics import RCP_LN2
from kda_ops._registry import OPERATORS, define_op
from kda_ops._roles import BLOCKS, CHUNKS, CONTEXTS, CONV_PAGES, COPIES, OFFSETS, SLOTS, STATE_PAGES
from kda_ops.gating.gate_cumsum.op import gate_cumsum_op
from kda_ops.tuning import benchmark, choose, disk_cache, override
from kda_ops.tuning.configs import CANDIDATES, DEFAULTS, SM90, TABLE, row_for
from kda_ops.tuning.example_inputs import examples
from tests.support.fake_cuda import cuda_code
from tests.support.operators import NAMES, cases, public_function, run_kernels
from tests.support.oracle import assert_accurate
from tests.support.rewritten import rewritten

ROOT = Path(kda_ops.__file__).parent.parent
CPU = torch.device("cpu")
KERNEL = "recurrent_kda"
DEFAULT = SM90[KERNEL][0][1]


class Timer:
    """Replaces the GPU and its clock: the candidate with the given values is fastest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: tuple[str, str] = ("sm_80", "A100")):
        self.fastest: dict[str, Any] = {"TILE": 4096, "num_warps": 4}
        self.current: dict[str, Any] = {}
        self.timed: list[dict[str, Any]] = []
        self.capturing = False
        monkeypatch.setattr(benchmark, "gpu", Gpu(gpu))
        monkeypatch.setattr(benchmark, "capturing", lambda: self.capturing)
        monkeypatch.setattr(benchmark, "time_call", self.time_call)

    def time_call(self, call: Callable[[], Any], device: torch.device) -> float:
        call()
        self.timed.append(self.current)
        return 1.0 if self.current == self.fastest else 2.0 + len(self.timed)

    def bench(self, values: dict[str, Any]) -> Callable[[], Any]:
        """What `choose` calls for each candidate."""

        def run() -> None:
            self.current = values

        return run

    def choose(self, **key: Any) -> Any:
        return choose(KERNEL, CPU, bench=self.bench, **(key or {"K": 128, "V": 128}))


class Gpu:
    """Pretends that the device is a GPU."""

    def __init__(self, gpu: tuple[str, str]) -> None:
        self.gpu = gpu

    def __call__(self, device: torch.device) -> tuple[str, str]:
        return self.gpu

    def cache_clear(self) -> None:
        pass


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test starts and ends with empty caches."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tuning.clear_cache()
    yield tmp_path / "kda_ops"
    tuning.clear_cache()


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    return Timer(monkeypatch)


def test_the_fastest_is_chosen_once(timer: Timer) -> None:
    assert timer.choose() == timer.fastest
    assert timer.timed == [DEFAULT, *(x for x in CANDIDATES[KERNEL] if x != DEFAULT)]
    assert timer.choose() == timer.fastest
    assert len(timer.timed) == len(CANDIDATES[KERNEL])


def test_each_key_has_its_own_choice(timer: Timer) -> None:
    timer.choose(K=128)
    timer.fastest = {"TILE": 8192, "num_warps": 8}
    assert timer.choose(K=64) == timer.fastest
    assert timer.choose(K=128) == {"TILE": 4096, "num_warps": 4}


def test_a_second_process_does_not_time(timer: Timer, folder: Path) -> None:
    timer.choose()
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["answer"] == timer.fastest
    timed = len(timer.timed)
    tuning.clear_cache()
    assert timer.choose() == timer.fastest
    assert len(timer.timed) == timed


@pytest.mark.parametrize("other", ["gpu", "torch", "kernels"])
def test_another_gpu_or_version_measures_again(
    timer: Timer, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.choose()
    timed = len(timer.timed)
    tuning.clear_cache()
    if other == "gpu":
        monkeypatch.setattr(benchmark, "gpu", Gpu(("sm_80", "A100 with more memory")))
    else:
        versions = {**disk_cache.versions(), other: "another"}
        monkeypatch.setattr(disk_cache, "versions", lambda: versions)
    timer.fastest = {"TILE": 8192, "num_warps": 8}
    assert timer.choose() == timer.fastest
    assert len(timer.timed) == 2 * timed


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[]",
        '{"question": 1, "answer": {"TILE": 4096, "num_warps": 4}}',
        '{"answer": {"TILE": 4096, "num_warps": 4}}',
    ],
)
def test_a_damaged_or_foreign_file_is_a_cache_miss(
    timer: Timer, folder: Path, content: str
) -> None:
    timer.choose()
    (file,) = folder.iterdir()
    file.write_text(content)
    tuning.clear_cache()
    timed = len(timer.timed)
    assert timer.choose() == timer.fastest
    assert len(timer.timed) == 2 * timed
    assert json.loads(file.read_text())["answer"] == timer.fastest


def test_a_cached_answer_that_is_no_candidate_is_ignored(timer: Timer, folder: Path) -> None:
    timer.choose()
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    content["answer"]["TILE"] = 4000
    file.write_text(json.dumps(content))
    tuning.clear_cache()
    assert timer.choose() == timer.fastest


def test_an_unwritable_cache_folder(
    timer: Timer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.joinpath("kda_ops").write_text("a file in the folder's place")
    assert timer.choose() == timer.fastest
    assert "not remembered" in caplog.text


def test_deterministic_tuning_uses_only_the_table(
    timer: Timer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer.choose()  # earlier timings do not count either
    timed = len(timer.timed)
    monkeypatch.setattr(config, "deterministic_tuning", True)
    assert timer.choose() == DEFAULT
    tuning.clear_cache()
    assert timer.choose() == DEFAULT
    assert len(timer.timed) == timed
    monkeypatch.setattr(config, "deterministic_tuning", False)
    assert timer.choose() == timer.fastest


def test_nothing_is_timed_while_a_stream_is_captured(timer: Timer, folder: Path) -> None:
    timer.capturing = True
    assert timer.choose() == DEFAULT
    assert timer.timed == []
    assert not folder.exists()
    timer.capturing = False
    assert timer.choose() == timer.fastest
    timer.capturing = True
    assert timer.choose() == timer.fastest


def test_a_known_gpu_takes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, ("sm_90", "H200"))
    for kernel in SM90:
        values = choose(kernel, CPU, bench=timer.bench, K=7)
        assert values == row_for(TABLE["sm_90"][kernel], {"K": 7})
    assert timer.timed == []


def test_the_cpu_takes_the_default() -> None:
    assert choose(KERNEL, CPU, K=128) == DEFAULT


def test_a_failing_candidate_is_skipped(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Any, device: torch.device) -> float:
        call()
        if timer.current == DEFAULT:
            raise RuntimeError("out of resources")
        return timer.time_call(call, device)

    monkeypatch.setattr(benchmark, "time_call", fail)
    assert timer.choose() == timer.fastest
    assert DEFAULT not in timer.timed

    def never(call: Any, device: torch.device) -> float:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(benchmark, "time_call", never)
    assert timer.choose(K=64) == DEFAULT


def test_no_memory_for_example_inputs_is_not_an_error(
    timer: Timer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "examples", fail)
    with tuning.calling(fail, {"x": None}, [torch.ones(3)]):
        assert choose(KERNEL, CPU, K=64) == DEFAULT
    assert "cannot be timed: no memory" in caplog.text


def test_a_symbolic_number_stays_symbolic(timer: Timer) -> None:
    """A choice neither needs its value nor makes it static."""
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        timer.choose(D=x.shape[0])
        return x * x.shape[0]

    traced = make_fx(f, tracing_mode="symbolic")(torch.ones(13))
    assert isinstance(seen[-1], torch.SymInt)
    assert torch.equal(traced(torch.ones(5)), torch.full((5,), 5.0))
    assert timer.choose(D="dynamic") == timer.fastest
    assert len(timer.timed) == len(CANDIDATES[KERNEL])


def test_each_choice_is_one_line_of_the_log(
    timer: Timer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="kda_ops.tuning"):
        timer.choose()
        timer.choose()
        tuning.clear_cache()
        timer.choose()
        monkeypatch.setattr(benchmark, "gpu", Gpu(("sm_90", "H200")))
        timer.choose(K=64)
    measured, remembered, table = caplog.messages
    assert re.match(
        r"recurrent_kda\(K=128 V=128\) on cpu: TILE=4096 num_warps=4 \(measured\): "
        r"TILE=2048 num_warps=8 3.0 us, .*TILE=4096 num_warps=4 1.0 us",
        measured,
    )
    assert remembered == "recurrent_kda(K=128 V=128) on cpu: TILE=4096 num_warps=4 (remembered)"
    assert table == "recurrent_kda(K=64) on cpu: TILE=2048 num_warps=8 (table of sm_90)"


def test_tables_are_consistent() -> None:
    """Every kernel has a row for every key, and its candidates name what its rows name."""
    for kernel, rows in DEFAULTS.items():
        default = row_for(rows, {})
        for values in [x for _, x in rows] + CANDIDATES.get(kernel, []):
            assert values.keys() == default.keys(), kernel
    assert CANDIDATES.keys() <= DEFAULTS.keys()
    for table in TABLE.values():
        assert table.keys() <= DEFAULTS.keys()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_kernel_is_timed_while_it_is_compiled(
    dynamic: bool, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real tensors of the hinted sizes, though the launcher is traced on fake ones; what was
    chosen is in the generated code.
    """
    fastest = {"BLOCK": 128, "STEP": 16, "num_warps": 4}
    calls = []

    def on_the_cpu(names: Any, arguments: Any, device: torch.device) -> Any:
        assert device.type == "cuda"
        calls.append(examples(names, arguments, CPU))
        return calls[-1]

    def measure(kernel: str, device: torch.device, candidates: Any, bench: Any) -> Any:
        if kernel == "gate_cumsum.form":
            return {0: 1.0}
        assert kernel == "gate_cumsum"
        return {candidates.index(fastest): 1.0}

    monkeypatch.setattr(tuning, "examples", on_the_cpu)
    monkeypatch.setattr(tuning, "_measure", measure)
    x, A_log = torch.randn(2, 100, 2, 64, dtype=torch.bfloat16), torch.zeros(2)
    _, (source,) = cuda_code(lambda *args: kda_ops.gate_cumsum(*args), x, A_log, dynamic=dynamic)
    ((found, rates, *_),) = calls
    assert type(found) is torch.Tensor
    assert (found.shape, found.stride(), found.dtype) == (x.shape, x.stride(), x.dtype)
    assert rates.shape == (2,)
    assert found.float().std() > 0.5
    constants = re.findall(r"'BLOCK': (\d+).*?'STEP': (\d+)", source)
    assert set(constants) == {("128", "16")}


ROLES = {
    **dict.fromkeys(("conv_state", "q_state", "k_state", "v_state", "conv"), CONV_PAGES),
    **dict.fromkeys(("state", "recurrent"), STATE_PAGES),
    "state_indices": SLOTS,
    "cu_seqlens": OFFSETS,
    "chunk_indices": CHUNKS,
    "plan": COPIES,
    "block_table": BLOCKS,
    "context_lens": CONTEXTS,
}


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_every_argument_has_its_role(op: Any) -> None:
    """A name means the same in all operators. (`conv_split` reads the whole of its state.)"""
    found = OPERATORS[op].parameters
    assert list(found) == [argument.name for argument in op._schema.arguments]
    if op is not torch.ops.kda_ops.conv_split.default:
        assert found == {name: ROLES.get(name) for name in found}


def test_roles_of_unknown_arguments_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"roles of kda_ops::test_roles name \['y'\]"):
        define_op(
            "test_roles(Tensor x) -> Tensor",
            reference=torch.clone,
            fake=torch.empty_like,
            cuda="torch:clone",
            roles={"y": SLOTS},
        )


def test_blocks_of_example_arguments_take_no_further_pages() -> None:
    """They are written: the boundaries are where those of a prompt are."""
    arguments = [torch.zeros(1, 200, 2), torch.zeros(99, 5, 4), torch.zeros(2).int(),
                 torch.zeros(3).int(), torch.full((2, 4), 50), torch.ones(2).int()]  # fmt: skip
    parameters = {"x": None, "pages": CONV_PAGES, "to": SLOTS, "offsets": OFFSETS,
                  "blocks": BLOCKS, "contexts": CONTEXTS}  # fmt: skip
    _, pages, slots, _, blocks, contexts = examples(parameters, arguments, CPU)
    assert len(pages) == 3
    assert blocks.tolist() == [[slot] * 4 for slot in slots.tolist()]
    assert contexts.tolist() == [0, 0]


def test_tables_of_example_arguments() -> None:
    """Every sequence has tokens, every slot is another, and pages are no more than are used."""
    table = torch.zeros(3, 2, dtype=torch.int32)
    chunk_table = torch.zeros(8 // 4 + 2, 2, dtype=torch.int32)
    arguments = [torch.zeros(1, 8, 2), torch.zeros(99, 5, 4), table, torch.zeros(3).int(),
                 chunk_table, 4, torch.zeros(3, dtype=torch.bool)]  # fmt: skip
    parameters = {"x": None, "pages": CONV_PAGES, "to": SLOTS, "offsets": OFFSETS,
                  "chunks": CHUNKS, "chunk_size": None, "flags": None}  # fmt: skip
    _, pages, slots, offsets, chunks, _, flags = examples(parameters, arguments, CPU)
    assert pages.shape == (7, 5, 4)
    assert slots.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert offsets.tolist() == [0, 4, 8]
    assert chunks[:2].tolist() == [[0, 0], [1, 0]]
    assert flags.all()
    for offsets, pages in ((None, 9), (torch.zeros(4, dtype=torch.int32), 4)):
        dense = {"x": None, "pages": CONV_PAGES, "to": SLOTS, "offsets": OFFSETS}
        made = [torch.zeros(8, 5), torch.zeros(50, 5, 4), None, offsets]
        assert len(examples(dense, made, CPU)[1]) == pages  # sequence n on page n
    conv = torch.zeros(2, 50, 3, 4)  # of two layers
    plan = torch.zeros(4, 4, dtype=torch.int32)
    pages, plan = examples({"conv": CONV_PAGES, "plan": COPIES}, [conv, plan], CPU)
    assert pages.shape == (2, 9, 3, 4)
    assert plan[1].tolist() == [3, 3, 4, 0]


def test_list_arguments_are_timed_on_separate_tensors() -> None:
    """The gradients that the launcher of a backward operator takes."""
    x = torch.zeros(3, 2).t()
    arguments = [x, [x, None], [True, False]]
    parameters = dict.fromkeys(("x", "output_gradients", "needs"))
    found, gradients, needs = examples(parameters, arguments, CPU)
    assert (gradients[1], needs) == (None, [True, False])
    for made in (found, gradients[0]):
        assert (made.shape, made.stride()) == (x.shape, x.stride())
        assert made.std() > 0


def test_generated_code_is_compiled_and_timed_while_something_else_is_compiled(
    timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowering.install()
    lowered = importlib.import_module("kda_ops.lowering.operators.gate_cumsum")
    timed = []
    monkeypatch.setattr(benchmark, "time_call", lambda call, device: timed.append(call()) or 1.0)
    x, A_log = torch.randn(2, 100, 2, 64), torch.zeros(2)
    forms = []

    def lower(*args: Any) -> Any:
        forms.append(lowered.form_of(lowered.fake_arguments()))
        return lowered.call_operator(*args)

    monkeypatch.setitem(inductor_lowerings, gate_cumsum_op, lower)
    with fresh_cache():
        out = torch.compile(lambda x, a: kda_ops.gate_cumsum(x, a), fullgraph=True)(x, A_log)
    assert torch.equal(out, kda_ops.gate_cumsum(x, A_log))
    # the nested compilation lowers the operator too, and has what is forced
    assert sorted(forms) == ["kernel", "scan"]
    kernel, scan = timed
    assert scan.shape == kernel.shape == x.shape
    assert scan.isfinite().all()


@pytest.mark.parametrize("of_tokens", [False, True], ids=["cumulative", "of-tokens"])
def test_the_fused_gate_is_timed_against_a_separate_kernel(
    of_tokens: bool, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a gate of another shape than the recurrence's."""
    timed = []

    def time_call(call: Any, device: torch.device) -> float:
        with RecordOperators() as operators:
            call()
        timed.append(operators.names)
        return 3.0 - len(timed)

    monkeypatch.setattr(benchmark, "time_call", time_call)
    H, K, T = 2, 16, 70

    def f(q: Any, k: Any, v: Any, x: Any, beta: Any, A_log: Any, state: Any, slots: Any) -> Any:
        if of_tokens:
            g = kda_ops.gate(x.flatten(0, 1), A_log).view(x.shape)
            G = kda_ops.chunk_cumsum(g, scale=RCP_LN2)
        else:
            G = kda_ops.gate_cumsum(x, A_log)
        pages = {"state": state, "state_indices": slots}
        return kda_ops.chunk_kda(q, k, v, G, torch.sigmoid(beta.float()), **pages)[0]

    inputs = [torch.randn(2, T, H, K, dtype=torch.bfloat16) for _ in range(4)]
    inputs += [torch.randn(2, T, H), torch.zeros(H), torch.zeros(9, H, K, K)]
    found = rewritten(f, *inputs, torch.tensor([3, 1]), written=(6,))
    assert timed == [
        ["kda_ops::chunk_kda_gated.state"],
        ["kda_ops::gate_cumsum", "kda_ops::chunk_kda.state"],
    ]
    assert found.operators[:-1] == (["gate", "chunk_cumsum"] if of_tokens else ["gate_cumsum"])
    assert found.refused == [("chunk_kda_gated", "the gate is faster in a kernel of its own here")]


class RecordOperators(TorchDispatchMode):
    """The operators of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_deterministic_tuning_is_part_of_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def misses() -> int:
        torch._dynamo.reset()
        counters.clear()
        x = torch.ones(3, 2, 4)
        torch.compile(lambda x: kda_ops.gate(x, torch.zeros(2)) * 3, fullgraph=True)(x)
        return counters["inductor"]["fxgraph_cache_miss"]

    with fresh_cache():
        assert (misses(), misses()) == (1, 0)
        monkeypatch.setattr(config, "deterministic_tuning", True)
        assert (misses(), misses()) == (1, 0)
        with override({KERNEL: DEFAULT}):
            assert misses() == 1


def test_the_log_switch(tmp_path: Path) -> None:
    """`TORCH_LOGS` takes the name of the log as it is."""
    script = "import torch, kda_ops.tuning as c; c.choose('gate', torch.device('cpu'), K=64)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TORCH_LOGS": "kda_ops.tuning", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gate(K=64) on cpu: TILE=4096 num_warps=4 (default)" in done.stderr


CASE = {
    "chunk_cumsum": "varlen",
    "chunk_kda": "pages",
    "chunk_kda_gated": "pages",
    "chunk_kda_gated_affine": "T1",
    "conv_split": "DS-bf16",
    "gate": "softplus-bf16",
    "gate_cumsum": "varlen",
    "kda_decode": "DS-ragged-several",
    "l2norm": "strided",
    "recurrent_kda": "ragged",
    "rms_norm_gated": "strided",
    "short_conv": "SD-ragged",
    "short_conv_qkv": "SD-ragged",
    "short_conv_update": "SD-speculative",
    "state_copy": "mixed-SD",
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_runs_and_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the arguments made for timing, and then instead of the default."""
    Timer(monkeypatch)
    timed: dict[str, Any] = {}

    def measure(kernel: str, device: torch.device, candidates: Any, bench: Any) -> Any:
        distinct = {  # the interpreter knows no warps
            str({k: x for k, x in values.items() if k[:4] != "num_"}): values
            for values in candidates
        }
        timed[kernel] = list(distinct.values())
        for values in timed[kernel]:
            bench(values)()
        return {0: 1.0}

    monkeypatch.setattr(tuning, "_measure", measure)
    function = public_function(name)
    (case,) = [case for case in cases(name) if case.name == CASE[name]]
    run_kernels(function)(**case.make(CPU))
    assert timed or name not in CANDIDATES
    for kernel, candidates in timed.items():
        for values in candidates:
            with override({kernel: values}):
                assert_accurate(run_kernels(function), function, case)


@pytest.fixture
def unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """This machine's GPU, as if it were in no table."""
    monkeypatch.setattr(tuning, "TABLE", {})
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_gpu_is_timed(name: str, unknown_gpu: torch.device, folder: Path) -> None:
    (case,) = [case for case in cases(name) if case.name == CASE[name]]
    assert_accurate(public_function(name), public_function(name), case, "cuda")
    if name not in CANDIDATES and not name.startswith("chunk_kda"):
        return
    files = list(folder.iterdir())
    assert files
    for file in files:
        times = json.loads(file.read_text())["microseconds"].values()
        assert len(times) > 1
        assert all(0 < time < 1e5 for time in times)


@pytest.mark.gpu
def test_kernel_and_generated_code_are_timed(
    unknown_gpu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """While a graph is compiled, which then gives the right answer."""
    (case,) = [case for case in cases("gate_cumsum") if case.name == CASE["gate_cumsum"]]
    with fresh_cache(), caplog.at_level(logging.INFO, logger="kda_ops.tuning"):
        compiled = torch.compile(kda_ops.gate_cumsum, fullgraph=True)
        assert_accurate(compiled, kda_ops.gate_cumsum, case, "cuda")
    assert "does not run" not in caplog.text
    (line,) = [line for line in caplog.messages if line.startswith("gate_cumsum.form(")]
    assert re.search(r"form=kernel [\d.]+ us, form=scan [\d.]+ us", line)


@pytest.mark.gpu
def test_a_captured_call_takes_the_default(unknown_gpu: torch.device, folder: Path) -> None:
    x, A_log = torch.randn(3, 2, 64, device=unknown_gpu), torch.zeros(2, device=unknown_gpu)
    with override({"gate": DEFAULTS["gate"][0][1]}):  # compiles it
        expected = kda_ops.gate(x, A_log)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kda_ops.gate(x, A_log)
    graph.replay()
    assert torch.equal(captured, expected)
    assert not folder.exists()
    assert torch.equal(kda_ops.gate(x, A_log), expected)
    assert len(list(folder.iterdir())) == 1
