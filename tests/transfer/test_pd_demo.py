"""Prefill and decode on different engines give the tokens of one process."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from kda_ops.__main__ import main
from kda_ops.demos.disaggregated import serve
from kda_ops.demos.disaggregated.model import SIZES, Caches, Stack, StackConfig
from kda_ops.demos.disaggregated.rank import Place, Rank
from kda_ops.demos.disaggregated.sequence import Sequences


def alone(**config: object) -> Sequences:
    made = StackConfig(**config)
    return Sequences(Stack(made), Caches(made, 1))


@pytest.mark.nixl
@pytest.mark.parametrize(
    ("prefill", "decode", "layout", "spec"),
    [
        (1, 1, "SD", 2),
        (1, 2, "DS", 2),
        (1, 4, "DS", 0),
        (2, 1, "DS", 1),
        (2, 2, "SD", 1),
        (2, 4, "DS", 2),
        (4, 1, "DS", 2),
        (4, 2, "DS", 1),
        (4, 4, "DS", 3),
    ],
)
def test_any_two_sizes_give_the_tokens_of_one_process(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    prefill: int,
    decode: int,
    layout: str,
    spec: int,
) -> None:
    arguments = ["--prefill-tp", prefill, "--decode-tp", decode, "--layout", layout]
    arguments += ["--spec", spec, "--tokens", 17, "--layers", "KKA", "--json", tmp_path / "x.json"]
    status = main(["pd-demo", *map(str, arguments)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count(" equal") >= 7
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["requests"]) >= 7
    assert all(request["equal"] for request in found["requests"])
    rows = found["requests"]
    assert sum(row["bytes"] for row in rows) < sum(
        sum(one["bytes"].values()) for one in found["transfers"]
    )  # and a request that warms up
    hits = {row["name"] for row in rows if not row["bytes"]}
    assert hits == {row["name"] for row in rows if not row["reads"]}
    assert hits == {"the same again", "its own answer"}
    assert all(row["first_token_ms"] > row["read_ms"] > 0 for row in rows)
    assert all(row["first_token_alone_ms"] > 0 for row in rows)
    assert found["copy"]["bytes"] == max(row["bytes"] for row in rows)
    assert 0 < found["copy"]["seconds"] < found["copy"]["read_seconds"]
    assert len(found["transfers"]) == decode
    for hit in ("none", "partial", "full", "all but the state"):
        assert f"  {hit} " in printed
    sizes = dict(re.findall(r"^(k\w+\.\w+) +(\d+)$", printed, re.MULTILINE))
    assert sizes.keys() == {"kda.q", "kda.k", "kda.v", "kda.recurrent", "kv.k", "kv.v"}
    (total,) = re.findall(r"^total +(\d+) +[1-9]\d* reads, [1-9]\d* ranges$", printed, re.MULTILINE)
    assert int(total) == sum(map(int, sizes.values())) > 0
    assert re.search(r"^time of a request +<= .* ms: \d", printed, re.MULTILINE)
    if spec:
        kept = printed.split("steps by tokens kept")[1].splitlines()[0]
        assert all(f"{n}:" in kept for n in range(1, 2 + spec)), kept


@pytest.mark.nixl
def test_a_long_prompt_is_read_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    arguments = ["--decode-tp", "1", "--tokens", "17", "--layers", "KKA", "--prompt", "700"]
    assert main(["pd-demo", *arguments, "--json", str(tmp_path / "x.json")]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["requests"]
    long = rows[-1]
    assert (long["name"], long["prompt"], long["hit"], long["equal"]) == ("long", 700, 0, True)
    assert long["bytes"] == max(row["bytes"] for row in rows)
    assert "a plain copy of its bytes, cpu to cpu: " in capsys.readouterr().out


def test_ranks_take_all_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two, engines of one rank have one each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert serve.devices_of("cuda", 2) == ["cuda:0", "cuda:1"]
    assert serve.devices_of("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert serve.devices_of("cpu", 3) == ["cpu"] * 3


def test_the_size_of_kimi_linear() -> None:
    """27 layers, a KDA state of 32 heads of 128 x 128 in fp32 per layer."""
    with torch.device("meta"):
        config = StackConfig(**SIZES["kimi-linear"], pages=2, device="meta")
    assert (config.layers.count("K"), config.layers.count("A")) == (20, 7)
    recurrent = Caches(config, 1).recurrent
    assert recurrent.shape == (20, 2, 32, 128, 128)


@pytest.mark.gpu
@pytest.mark.nixl
def test_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """On as many as there are."""
    arguments = ["--device", "cuda", "--decode-tp", "1", "--tokens", "17", "--prompt", "700"]
    status = main(["pd-demo", *arguments])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count(" equal") >= 8
    assert "a plain copy of its bytes, cuda:0 to cuda:" in printed


@pytest.mark.nixl
def test_an_offer_outlasts_a_read() -> None:
    """The notice of a read comes after the reader has generated all tokens, which may take long."""
    place = Place("prefill", 1, 0, "", 0, timeout_s=0.01, secret=b"")
    threads = torch.get_num_threads()
    rank = Rank(place, StackConfig(layers="KA", pages=9))
    try:
        rank.prefill("request", list(range(40)))
        time.sleep(0.1)
        rank.idle()
        assert rank.releases() == {}
    finally:
        torch.set_num_threads(threads)
        assert rank.close() == []


@pytest.mark.nixl
def test_a_wrong_token_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = serve.answer_alone

    def wrong(alone: Sequences, tokens: list[int], count: int) -> list[int]:
        made = right(alone, tokens, count)
        return [*made[:-1], (made[-1] + 1) % 256]

    monkeypatch.setattr(serve, "answer_alone", wrong)
    assert main(["pd-demo", "--decode-tp", "1", "--tokens", "17", "--layers", "KKA"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("DIFFERENT") == 7
    assert "plain: expected [" in printed


def test_without_nixl_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert main(["pd-demo"]) == 2
    error = capsys.readouterr().err
    assert "pd-demo: error: it needs NIXL: pip install 'kda-ops[nixl]'" in error


@pytest.mark.parametrize("tokens", ["16", "-3", "many"])
def test_too_few_tokens(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pd-demo", "--tokens", tokens])
    assert stop.value.code == 2
    message = f"argument --tokens: must be a whole number from 17, got {tokens!r}"
    assert message in capsys.readouterr().err


def test_the_row_interleaved_layout_needs_equal_numbers_of_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reported before any process starts; otherwise the engines reject one another."""
    assert main(["pd-demo", "--layout", "SD", "--prefill-tp", "1", "--decode-tp", "2"]) == 2
    assert "--layout SD needs as many prefill as decode ranks, got 1 and 2" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("tokens", "spec"), [(24, 0), (600, 0), (600, 3)])
def test_there_are_pages_for_any_number_of_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokens: int, spec: int
) -> None:
    """More than all requests need on an engine that frees none."""
    made: list[StackConfig] = []

    def start(config: StackConfig, *sizes: int) -> None:
        made.append(config)
        raise RuntimeError("stop here")

    monkeypatch.setattr(serve, "engines", start)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    assert main(["pd-demo", "--tokens", str(tokens), "--spec", str(spec)]) == 1
    assert "FAILED: stop here" in capsys.readouterr().out
    (config,) = made
    size, answers = config.block_tokens, {"whole blocks": [0] * tokens}
    prompts = [len(r.tokens) for r in serve.requests(serve.TEXT, size, answers)]
    assert sum(-(-(n + tokens + spec) // size) + spec for n in prompts) < config.pages


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_speculative_steps_on_checkpoints_give_the_plain_tokens(layout: str) -> None:
    """On one process: drafts, right and wrong, change nothing; its own checkpoints are used."""
    prompt = list(serve.TEXT[:50])
    expected = serve.answer_alone(alone(layout=layout), prompt, 40)
    sequences = alone(layout=layout, num_spec=3)
    _, (table, blocks) = sequences.prefill(prompt[:-1])
    drafts = serve.spoil(expected, 256, 0)
    tokens, kept = sequences.generate(list(prompt), 40, table, blocks, drafts)
    assert tokens == expected
    assert set(kept) == {1, 2, 3, 4}

    longer = prompt + expected
    hit = sequences.hit(longer[:80])
    assert len(hit.blocks) == 5
    assert hit.state is not None
    again, _ = sequences.generate(longer[:81], 9, [0, 0, 0, 0, hit.state], hit.blocks)
    assert again == longer[81:90]


def test_a_wrong_state_changes_the_tokens() -> None:
    prompt = list(serve.TEXT[:50])
    expected = serve.answer_alone(alone(), prompt, 12)
    for spoiled in ("conv", "recurrent", "kv"):
        sequences = alone()
        _, (table, blocks) = sequences.prefill(prompt[:-1])
        torch.neg(x := getattr(sequences.caches, spoiled), out=x)
        tokens, _ = sequences.generate(list(prompt), 12, table, blocks)
        assert tokens != expected
