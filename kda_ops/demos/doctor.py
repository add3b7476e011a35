"""What this installation can do: versions, GPUs, kernels, caches, configuration, known bad
combinations.

Every operator is run once on a small input on each device (its first call compiles its kernels),
and its results are compared with its definition in fp64. Nothing is changed; what the kernels
compile to stays in the caches.

Exits with 1 if something does not work; warnings alone exit with 0.
"""

import argparse
import contextlib
import importlib
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from kda_ops import config
from kda_ops._cases import Case, operator_packages, public_function
from kda_ops._progress import progress
from kda_ops._registry import lowering_module
from kda_ops._versions import version
from kda_ops.tuning import configs, disk_cache

SUMMARY = "say what works here: versions, kernels, caches, known bad combinations"
PACKAGES = (
    "kda-ops", "torch", "triton", "transformers", "fla-core", "flash-linear-attention", "vllm",
    "sglang", "nixl", "numpy",
)  # fmt: skip
VARIABLES = (
    "KDA_OPS_CONV_LAYOUT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_INTERPRET",
    "TRITON_PTXAS_PATH", "TORCH_COMPILE_DISABLE", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
OLDEST_TORCH = (2, 11)
TRANSFORMERS = (5, 24)  # the first with all models that have KDA


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is "ok", "warning" or "error"."""

    topic: str
    name: str
    status: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops doctor`."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="run the operators on this device only; all that are there by default",
    )
    parser.add_argument("--no-run", action="store_true", help="run no operator")


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """The command; returns its exit status."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no CUDA device here (see --help)", file=sys.stderr)
        return 2
    # the configuration first: Inductor sets some of the variables when it is imported
    found = [*software(), *devices(), *configuration(), *caches(), *combinations()]
    if not args.no_run:
        found += operators([args.device] if args.device else available())
    results["findings"] = [asdict(finding) for finding in found]
    print_report(found)
    return int(any(finding.status == "error" for finding in found))


def print_report(found: list[Finding]) -> None:
    marks = {"ok": " ", "warning": "!", "error": "x"}
    width = max(len(finding.name) for finding in found)
    topic = None
    for finding in found:
        if finding.topic != topic:
            topic = finding.topic
            print(f"\n{topic}")
        print(f"{marks[finding.status]} {finding.name:<{width}}  {finding.text}")
    counts = {status: sum(x.status == status for x in found) for status in ("warning", "error")}
    print(f"\n{counts['error']} errors (x), {counts['warning']} warnings (!)")


def numbers(text: str | None) -> tuple[int, ...]:
    """The first two numbers of a version."""
    parts = (text or "0").split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def software() -> Iterator[Finding]:
    yield Finding("software", "python", "ok", platform.python_version())
    for name in PACKAGES:
        found = version(name)
        if name == "torch" and numbers(found) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            yield Finding("software", name, "error", f"{found}: {oldest} or newer is needed")
        elif found is None and name == "triton":
            yield Finding("software", name, "warning", "not installed: no kernels for GPUs")
        else:
            yield Finding("software", name, "ok", found or "not installed")


def available() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def devices() -> Iterator[Finding]:
    topic = "devices"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "this build of PyTorch has no support for one" if built is None else "none was found"
        yield Finding(topic, "GPU", "ok", why)
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        architecture = (
            getattr(facts, "gcnArchName", "").partition(":")[0]
            if torch.version.hip
            else f"sm_{facts.major}{facts.minor}"
        )
        measured = architecture in configs.TABLE
        text = f"{facts.name}, {architecture}, {facts.total_memory >> 30} GiB"
        choices = "shipped kernel choices" if measured else "kernel choices are timed on first use"
        yield Finding(topic, f"GPU {i}", "ok", f"{text}; {choices}")


def caches() -> Iterator[Finding]:
    folders: dict[str, str] = lowering_module("compat").cache_folders()
    if "TRITON_CACHE_DIR" in os.environ:
        folders["Triton"] = os.environ["TRITON_CACHE_DIR"]
    for name, path in (folders | {"kernel choices": str(disk_cache.folder())}).items():
        there = path
        while there and not os.path.exists(there):
            there = os.path.dirname(there)
        writable = os.access(there or "/", os.W_OK)
        status = "ok" if writable else "warning"
        text = path if writable else f"{path} cannot be written: everything is compiled each time"
        yield Finding("caches", name, status, text)


def configuration() -> Iterator[Finding]:
    for name in ("impl", "conv_layout", "check_values", "deterministic_tuning"):
        value = getattr(config, name)
        slow = (name == "impl" and value != "auto") or (name == "check_values" and value)
        yield Finding("configuration", name, "warning" if slow else "ok", str(value))
    for name in VARIABLES:
        if name in os.environ:
            slow = name in ("TRITON_INTERPRET", "TORCH_COMPILE_DISABLE") and os.environ[name] != "0"
            status = "warning" if slow else "ok"
            yield Finding("configuration", name, status, os.environ[name])


def combinations() -> Iterator[Finding]:
    """What is known not to work together."""
    topic, gpu = "combinations", torch.cuda.is_available()
    found = {name: version(name) for name in PACKAGES}
    wanted = [text for text in metadata.requires("torch") or [] if text.startswith("triton==")]
    pinned = wanted[0].partition(";")[0].strip().removeprefix("triton==") if wanted else None
    if gpu and pinned and found["triton"] and found["triton"] != pinned:
        text = f"this PyTorch was built for triton {pinned}, installed is {found['triton']}"
        yield Finding(topic, "torch and triton", "warning", text)
    if found["fla-core"] and not gpu:
        text = (
            "FLA is importable but has no device: models of transformers with KDA crash here "
            "unless they are accelerated (kda_ops.integrations.transformers)"
        )
        yield Finding(topic, "FLA without a GPU", "warning", text)
    if found["transformers"] and numbers(found["transformers"]) < TRANSFORMERS:
        oldest = ".".join(map(str, TRANSFORMERS))
        text = f"{found['transformers']} lacks models with KDA; {oldest} has all of them"
        yield Finding(topic, "transformers", "warning", text)
    if not gpu:
        from kda_ops import native

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiles = native.compiles()
        text = str(caught[0].message) if caught else "compiles"
        yield Finding(topic, "C++ compiler", "ok" if compiles else "warning", text)


def by_size(name: str) -> list[Case]:
    """The operator's cases for kernels, those with the fewest elements first."""
    cases: list[Case] = importlib.import_module(f"{operator_packages()[name]}.cases").CASES

    def size(case: Case) -> int:
        inputs = tree_leaves(case.make(torch.device("cpu")))
        return sum(x.numel() for x in inputs if isinstance(x, Tensor))

    torch.manual_seed(0)
    return sorted((case for case in cases if not case.perf and not case.cpu_only), key=size)


def operators(where: list[str]) -> list[Finding]:
    found = []
    for device in where:
        for name in operator_packages():
            with _progress_to_stderr(f"{name} on {device}"):
                found.append(tried(name, device))
    return found


@contextlib.contextmanager
def _progress_to_stderr(what: str) -> Iterator[None]:
    quiet = not sys.stderr.isatty()
    with progress(what, io.StringIO() if quiet else sys.stderr):
        yield


def tried(name: str, device: str) -> Finding:
    """The smallest call of an operator that does not give zeros, compared with its definition in
    fp64.
    """
    topic, worst = f"operators on {device}", None
    try:
        function = public_function(name)
        for case in by_size(name):
            worst = error_of(function, case, device)
            if worst is not None:
                break
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        return Finding(topic, name, "error", f"{type(error).__name__}: {first}")
    assert worst is not None, f"{name} has no case with a result"
    good = worst < 0.02
    text = f"relative error {worst:.1e}" if good else f"wrong: relative error {worst:.1e}"
    return Finding(topic, name, "ok" if good else "error", text)


def error_of(function: Callable[..., Any], case: Case, device: str) -> float | None:
    """The largest relative (Frobenius) error among results and written arguments; None if a result
    is zero or empty.
    """

    def exact(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.cpu().double() if x.is_floating_point() else x.cpu().clone()

    torch.manual_seed(0)
    inputs = case.make(torch.device("cpu"))
    wide = tree_map(exact, inputs)
    here = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
    with torch.no_grad():
        results = [function(**here), [here[name] for name in case.mutated]]
        with config.reference():
            expected = [function(**wide), [wide[name] for name in case.mutated]]
    worst = 0.0
    for x, y in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            scale = float(y.norm())
            if scale == 0:
                return None
            worst = max(worst, float((x.cpu().double() - y).norm()) / scale)
    return worst
