"""The main process: starts both engines, routes requests, compares tokens."""

import argparse
import importlib.util
import math
import multiprocessing
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kda_ops import config as package_config
from kda_ops.demos import arguments
from kda_ops.demos.disaggregated.model import SIZES, Caches, Stack, StackConfig
from kda_ops.demos.disaggregated.rank import Continuation, Place, Work, run_rank
from kda_ops.demos.disaggregated.sequence import Sequences

TEXT = (
    b"State is checkpointed only at block boundaries. A state is the last inputs of a short "
    b"convolution and one matrix per head; it moves between machines as a few ranges of bytes. "
) * 4
PATIENCE_S = 120.0
REQUESTS, LONGEST_PROMPT = 7, 96
COPIES = 5
WARM_UP = "warm-up"
FEWEST = 17  # new tokens: one more than a block, so that an answer can be a prefix hit


@dataclass(frozen=True)
class Request:
    """A prompt, and the part of it that the decode engine will have cached by then."""

    name: str
    tokens: list[int]
    hit: str


def requests(text: bytes, block: int, generated: dict[str, list[int]]) -> Iterator[Request]:
    """Prompts in order; later ones share prefixes with earlier ones and their answers.

    Args:
        text: Source of the prompts.
        block: Tokens of a block.
        generated: New tokens of the requests so far.
    """
    tokens = list(text)
    yield Request("plain", tokens[: 3 * block + 6], "none")
    yield Request("same start", [*tokens[: 2 * block], *tokens[7 * block : 8 * block]], "partial")
    yield Request("whole blocks", tokens[5 : 4 * block + 6], "none")
    yield Request("the same again", tokens[5 : 4 * block + 6], "full")
    yield Request("no state kept", tokens[: 3 * block + 1], "all but the state")
    longer = tokens[5 : 4 * block + 6] + generated["whole blocks"]
    yield Request("its own answer", longer[: 5 * block + 1], "full")
    yield Request("and further", [*longer[: 5 * block + 3], *tokens[:9]], "partial")


class Engine:
    """The processes of one engine."""

    def __init__(
        self,
        name: str,
        devices: Sequence[str],
        config: StackConfig,
        folder: str,
        padding: int,
        secret: bytes,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kda_ops.demos.disaggregated.rank"])
        self.name, self.pipes, self.processes = name, [], []
        # on a GPU the first commands compile kernels
        self.patience_s = PATIENCE_S if devices[0] == "cpu" else 5 * PATIENCE_S
        for rank, device in enumerate(devices):
            place = Place(
                name, len(devices), rank, f"{folder}/{name}", padding, PATIENCE_S / 4, secret,
                device,
            )  # fmt: skip
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(place, config, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def receive(self) -> list[Any]:
        """One answer from every rank.

        Raises:
            RuntimeError: A rank failed or did not answer in time.
        """
        answers, deadline = [], time.monotonic() + self.patience_s
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"{self.name} rank {rank} did not answer in time")
            try:
                answer, error = pipe.recv()
            except EOFError:
                raise RuntimeError(f"{self.name} rank {rank} has died") from None
            if error is not None:
                raise RuntimeError(error)
            answers.append(answer)
        return answers

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Runs a command on every rank."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return self.receive()

    def stop(self) -> None:
        """Ends the processes unconditionally."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def devices_of(kind: str, ranks: int) -> list[str]:
    """The device of each rank: GPUs in turn, so that with two each engine of one rank has one."""
    if kind == "cpu":
        return ["cpu"] * ranks
    return [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(ranks)]


def copy_seconds(nbytes: int, source: str, target: str) -> float:
    """The median of plain copies of so many bytes from one device to another."""
    x = torch.zeros(nbytes, dtype=torch.uint8, device=source)
    y = torch.empty_like(x, device=target)
    found = []
    for _ in range(COPIES):
        start = time.perf_counter()
        y.copy_(x)
        for device in {x.device, y.device}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@contextmanager
def engines(
    config: StackConfig, prefill_tp: int, decode_tp: int
) -> Iterator[tuple[Engine, Engine, list[tuple[str, int]]]]:
    """Both engines, and the addresses of the prefill ranks."""
    with tempfile.TemporaryDirectory() as folder:
        started: list[Engine] = []
        secret = secrets.token_bytes(32)
        try:
            devices = devices_of(config.device, prefill_tp + decode_tp)
            for name, own, padding in (
                ("prefill", devices[:prefill_tp], 0),
                ("decode", devices[prefill_tp:], 512),
            ):
                started.append(Engine(name, own, config, folder, padding, secret))
            prefill, decode = started
            addresses = prefill.receive()
            decode.receive()
            yield prefill, decode, addresses
        finally:
            for engine in started:
                engine.stop()


def answer_alone(alone: Sequences, tokens: list[int], count: int) -> list[int]:
    """The single-process answer to a prompt: prefill of all of it, then plain decode."""
    logits, (table, blocks) = alone.prefill(tokens)
    first = int(logits[-1].argmax())
    alone.prefilled_at = time.perf_counter()
    rest, _ = alone.generate([*tokens, first], count - 1, table, blocks)
    return [first, *rest]


def spoil(tokens: list[int], vocabulary: int, seed: int) -> list[int]:
    """Drafts that are wrong about a third of the time."""
    rng = random.Random(seed)
    return [t if rng.random() < 0.67 else (t + 1) % vocabulary for t in tokens]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m kda_ops pd-demo`."""
    for name in ("prefill", "decode"):
        parser.add_argument(
            f"--{name}-tp",
            type=int,
            choices=(1, 2, 4),
            default=1 if name == "prefill" else 2,
            help=f"tensor-parallel ranks of the {name} engine, a process each",
        )
    parser.add_argument(
        "--layout",
        choices=package_config.LAYOUTS,
        default="DS",
        help="layout of the convolution state; SD needs equal numbers of ranks",
    )
    parser.add_argument(
        "--spec", type=int, choices=range(4), default=0, help="speculative tokens per decode step"
    )
    parser.add_argument(
        "--tokens", type=_tokens, default=24, help=f"new tokens per request, at least {FEWEST}"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="sizes of the stack; kimi-linear has 20 KDA and 7 attention layers, 32 heads of 128",
    )
    parser.add_argument("--layers", type=_layers, help="K: KDA, A: attention; default: the size's")
    parser.add_argument(
        "--prompt", type=_prompt, default=0, help="tokens of one more, long prompt; 0: none"
    )
    parser.add_argument(
        "--device",
        type=arguments.device,
        default="cpu",
        help="of weights and pages: cpu, or cuda, of which the ranks take all in turn",
    )


def enough_pages(config: StackConfig, tokens: int, prompt: int = 0) -> int:
    """Pages of each group, with the null block, for all requests, the one that warms up and one of
    `prompt` tokens: none is ever freed.
    """

    def pages(longest: int) -> int:
        return -(-(longest + tokens + config.num_spec) // config.block_tokens) + config.num_spec

    return 1 + (REQUESTS + 1) * pages(LONGEST_PROMPT) + pages(prompt) * (prompt > 0)


def _tokens(value: str) -> int:
    if not value.isdecimal() or int(value) < FEWEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from {FEWEST}, got {value!r}")
    return int(value)


def _prompt(value: str) -> int:
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {value!r}")
    return int(value)


def _layers(value: str) -> str:
    if set(value) != {"K", "A"}:
        raise argparse.ArgumentTypeError(f"must be made of K and A, with both, got {value!r}")
    return value


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Returns 0 if all tokens match."""
    if args.layout == "SD" and args.prefill_tp != args.decode_tp:
        return _refuse(
            f"--layout SD needs as many prefill as decode ranks, got {args.prefill_tp} and "
            f"{args.decode_tp}"
        )
    if importlib.util.find_spec("nixl") is None:
        return _refuse("it needs NIXL: pip install 'kda-ops[nixl]', or make nixl in a checkout")
    sizes = SIZES[args.size] | ({} if args.layers is None else {"layers": args.layers})
    config = StackConfig(
        **sizes, layout=args.layout, num_spec=args.spec, device=args.device.type
    )  # fmt: skip
    pages = enough_pages(config, args.tokens, args.prompt)
    config = replace(config, pages=max(64 if args.device.type == "cuda" else config.pages, pages))
    plain = replace(config, num_spec=0)
    alone = Sequences(Stack(plain), Caches(plain, 1))
    print(
        f"prefill on {args.prefill_tp}, decode on {args.decode_tp} ranks; "
        f"layers {config.layers}, layout {args.layout}, {args.spec} speculative tokens, "
        f"on {args.device.type}",
        flush=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one core per rank, and for the process that checks them
    try:
        with engines(config, args.prefill_tp, args.decode_tp) as (prefill, decode, addresses):
            return _serve(args, results, config, alone, prefill, decode, addresses)
    except RuntimeError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        torch.set_num_threads(threads)


def _refuse(message: str) -> int:
    print(f"python -m kda_ops pd-demo: error: {message}", file=sys.stderr)
    return 2


def _serve(
    args: argparse.Namespace,
    results: dict[str, Any],
    config: StackConfig,
    alone: Sequences,
    prefill: Engine,
    decode: Engine,
    addresses: list[tuple[str, int]],
) -> int:
    """Serves all requests in order; returns what is wrong, as messages."""
    decode.ask("connect", prefill.name, addresses)
    results["requests"] = []
    generated: dict[str, list[int]] = {}
    wrong: list[str] = []
    kept: Counter[int] = Counter()
    _warm_up(args.tokens, alone, prefill, decode)
    print(
        f"{'request':<16}{'prompt':>7}{'hit':>5}  {'cached':<18}{'kB':>9}{'reads':>6}{'read ms':>9}"
        f"{'MB/s':>9}{'first ms':>9}{'alone':>8}  tokens",
        flush=True,
    )
    for i, request in enumerate(all_requests(config.block_tokens, generated, args.prompt)):
        start = time.perf_counter()
        expected = answer_alone(alone, request.tokens, args.tokens)
        alone_s = alone.prefilled_at - start
        generated[request.name] = expected
        start = time.perf_counter()
        (blocks, *others) = prefill.ask("prefill", request.name, request.tokens)
        prefill_s = time.perf_counter() - start
        if any(other != blocks for other in others):
            wrong.append(f"{request.name}: prefill ranks took different blocks")
        drafts = spoil(expected, config.vocabulary, i)
        work = Work(request.name, request.tokens, args.tokens, drafts, blocks)
        continued: list[Continuation] = decode.ask("read_and_continue", prefill.name, work)
        first = continued[0]
        kept.update(first.kept)
        same = all(result.tokens == expected for result in continued)
        if not same:
            wrong.append(f"{request.name}: expected {expected}, got {first.tokens}")
        found = _describe(first.hit, len(request.tokens) - 1)
        if found != request.hit:
            wrong.append(f"{request.name}: expected a hit of {request.hit!r}, got {found!r}")
        row: dict[str, Any] = {
            "name": request.name,
            "prompt": len(request.tokens),
            "hit": first.hit[0],
            "equal": same,
            "bytes": sum(x.nbytes for x in continued),
            "reads": sum(x.reads for x in continued),
            "read_ms": max(x.seconds for x in continued) * 1e3,
            "first_token_ms": (prefill_s + max(x.first_token_s for x in continued)) * 1e3,
            "first_token_alone_ms": alone_s * 1e3,
        }
        results["requests"].append(row)
        print(
            f"{request.name:<16}{row['prompt']:>7}{row['hit']:>5}  {found:<18}"
            f"{row['bytes'] * 1e-3:>9.1f}{row['reads']:>6}{row['read_ms']:>9.2f}"
            f"{row['bytes'] / row['read_ms'] * 1e-3:>9.1f}{row['first_token_ms']:>9.1f}"
            f"{row['first_token_alone_ms']:>8.1f}  {'equal' if same else 'DIFFERENT'}",
            flush=True,
        )
    wrong += _check_releases(prefill, list(generated))
    results["transfers"] = decode.ask("counters")
    _print_transfers(results["transfers"])
    results["copy"] = _copy(args, results["requests"])
    if config.num_spec:
        steps = ", ".join(f"{n}: {kept[n]}" for n in sorted(kept))
        print(f"\nsteps by tokens kept   {steps}")
    for engine in (decode, prefill):
        if any(engine.ask("close")):
            wrong.append(f"{engine.name}: reads were left in flight")
    results["faults"] = wrong
    print("\n" + "\n".join(wrong or ["all tokens equal those of one process"]))
    return 1 if wrong else 0


def all_requests(
    block: int, generated: dict[str, list[int]], prompt: int
) -> Iterator[Request]:  # fmt: skip
    """`requests`, and one of `prompt` tokens."""
    yield from requests(TEXT, block, generated)
    if prompt:
        rng = random.Random(prompt)
        yield Request("long", [rng.randrange(256) for _ in range(prompt)], "none")


def _warm_up(count: int, alone: Sequences, prefill: Engine, decode: Engine) -> None:
    """A request that is not timed: kernels are compiled, and connections made."""
    tokens = [7] * LONGEST_PROMPT
    answer_alone(alone, tokens, count)
    (blocks, *_) = prefill.ask("prefill", WARM_UP, tokens)
    decode.ask("read_and_continue", prefill.name, Work(WARM_UP, tokens, count, [], blocks))


def _copy(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A plain copy of what the largest request has read, from its first to its first rank, beside
    it.
    """
    row = max(rows, key=lambda x: x["bytes"])
    devices = devices_of(args.device.type, args.prefill_tp + args.decode_tp)
    seconds = copy_seconds(row["bytes"], devices[0], devices[args.prefill_tp])
    read, copied = (row["bytes"] / x * 1e-6 for x in (row["read_ms"] * 1e-3, seconds))
    print(
        f"largest request       {read:,.0f} MB/s; a plain copy of its bytes, {devices[0]} to "
        f"{devices[args.prefill_tp]}: {copied:,.0f} MB/s"
    )
    return {"bytes": row["bytes"], "seconds": seconds, "read_seconds": row["read_ms"] * 1e-3}


def _describe(hit: tuple[int, bool], ready: int) -> str:
    tokens, state = hit
    if tokens == ready:
        return "full" if state else "all but the state"
    return "partial" if tokens else "none"


def _check_releases(prefill: Engine, names: list[str]) -> list[str]:
    """Checks that every prefill rank has its pages back."""
    deadline = time.monotonic() + PATIENCE_S / 4
    while True:
        released = prefill.ask("releases")
        missing = [
            f"prefill rank {rank} still holds {name}"
            for rank, found in enumerate(released)
            for name in names
            if found.get(name) != "done"
        ]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.01)


def _print_transfers(counters: list[dict[str, Any]]) -> None:
    """Prints what the decode ranks have read in total."""
    nbytes: Counter[str] = Counter()
    latency: Counter[int] = Counter()
    for one in counters:
        nbytes.update(one["bytes"])
        latency.update(one["latency"])
    print(f"\n{'segment':<16}{'bytes':>12}")
    for name, count in nbytes.items():
        print(f"{name:<16}{count:>12}")
    reads, ranges = (sum(one[name] for one in counters) for name in ("reads", "ranges"))
    print(f"{'total':<16}{sum(nbytes.values()):>12}   {reads} reads, {ranges} ranges")
    times = ", ".join(f"<= {math.ldexp(1, n):g} ms: {latency[n]}" for n in sorted(latency))
    print(f"time of a request     {times}")
