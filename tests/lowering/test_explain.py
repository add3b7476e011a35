"""`kda_ops.explain`: which rewrites fired, which nearly did and why, the savings, the page."""

import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import kda_ops
from kda_ops.cache.batch import KDABatch
from kda_ops.explain.graph_drawing import joined, order, placed, rows_of
from kda_ops.explain.result import Explanation, GraphNode, Layer, NearMiss, Side
from tests.lowering.test_fusion_decode import inputs as step_inputs
from tests.lowering.test_fusion_decode import variant
from tests.lowering.test_launch_contract import DECODE, HIDDEN, KINDS, PREFILL, H, K, Stack, paged

GEMMS = {"extern_kernels.mm": 3, "extern_kernels.addmm": 1}
T, BF16 = 104, torch.bfloat16


@pytest.fixture(scope="module")
def prefill() -> Explanation:
    """Two layers, without gradients."""
    with torch.no_grad():
        return kda_ops.explain(Stack(2 * KINDS[:1]), torch.randn(1, T, HIDDEN, dtype=BF16))


def chunked(q: Tensor, k: Tensor, v: Tensor, x: Tensor, beta: Tensor, A_log: Tensor) -> Any:
    G = kda_ops.gate_cumsum(x, A_log)
    o, _ = kda_ops.chunk_kda(q, k, v, G, torch.sigmoid(beta.float()))
    return o, G.exp()


def heads() -> list[Tensor]:
    q, k, v, x = (torch.randn(1, T, H, K, dtype=BF16) for _ in range(4))
    return [q, k, v, x, torch.randn(1, T, H, dtype=BF16), torch.randn(H)]


def line_of(text: str) -> str:
    """The location of a line of this file, as in a report."""
    here = Path(__file__)
    number = here.read_text()[: here.read_text().index(text)].count("\n") + 1
    return f"{here.relative_to(Path.cwd())}:{number}"


def test_a_layer_shows_what_fired_and_what_it_launches(prefill: Explanation) -> None:
    assert [(layer.path, layer.kind) for layer in prefill.layers] == [
        ("layers.0", "KimiDeltaAttention"),
        ("layers.1", "KimiDeltaAttention"),
    ]
    for layer in prefill.layers:
        assert [fired.rewrite for fired in layer.fired] == ["chunk_kda_gated", "chunk_norms"]
        assert layer.fired[0].removed == ("gate_cumsum", "chunk_kda")
        assert layer.fired[1].removed == ("l2norm", "l2norm", "chunk_kda_gated")
        assert "kda_ops/nn/mixing.py" in layer.fired[0].source
        assert layer.fired[0].source.endswith("in prefill: o, _ = chunk_kda(...)")
        assert layer.near_misses == ()
        for name, part in zip(layer.after.launches, PREFILL, strict=True):
            assert part in name
        assert "gate_cumsum_kernel" in layer.before.launches
        assert len(layer.before.launches) == 8
        assert Counter(layer.before.calls) == Counter(layer.after.calls) == GEMMS
    assert prefill.launches == (16, 8)


def test_bytes_match_a_count_by_hand(prefill: Explanation) -> None:
    """Per layer, written once and read once: normalized q and k, the cumulative gate in fp32, and
    beta in fp32.
    """
    normalized, G, beta = 2 * T * H * K * 2, T * H * K * 4, T * H * 4
    saved = 2 * (normalized + G + beta)
    assert [layer.bytes_saved for layer in prefill.layers] == [saved, saved]
    assert prefill.bytes_saved == 2 * saved
    # the second layer's result is returned and not an intermediate one
    first, second = prefill.layers
    assert first.after.bytes_moved - second.after.bytes_moved == 2 * T * HIDDEN * 2


def test_symbolic_sizes_count_with_their_hints() -> None:
    def f(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = kda_ops.short_conv(x, weight).split([H * K, H * K, H * K], dim=-1)
        q, k = (kda_ops.l2norm(y.unflatten(-1, (H, K))) for y in (q, k))
        return q, k, v * 2

    args = torch.randn(1, T, 3 * H * K, dtype=BF16), torch.randn(3 * H * K, 4, dtype=BF16)
    for dynamic in (False, True):
        (layer,) = kda_ops.explain(f, *args, dynamic=dynamic).layers
        assert [fired.rewrite for fired in layer.fired] == ["short_conv_qkv"]
        assert (layer.path, layer.kind) == ("", "graph")
        assert layer.before.bytes_moved == 2 * T * 3 * H * K * 2  # what the convolution makes
        assert layer.after.bytes_moved == 2 * T * H * K * 2  # v, for the product
        assert layer.bytes_saved == 2 * T * 2 * H * K * 2


def test_decode_with_states_runs_nothing() -> None:
    stack = Stack(KINDS[3:])
    states = paged(stack)
    for state in states:
        for x in state:
            x.normal_()
    copies = [[x.clone() for x in state] for state in states]
    with torch.no_grad():
        x, batch = torch.randn(1, 3, HIDDEN, dtype=BF16), KDABatch.decode([1, 2, 3])
        explanation = kda_ops.explain(stack, x, states, dynamic=True, batch=batch)
    (layer,) = explanation.layers
    assert explanation.shapes == "dynamic"
    assert [fired.rewrite for fired in layer.fired] == ["kda_decode"]
    assert list(layer.after.launches) == DECODE
    assert len(layer.before.launches) > 1
    for state, copy in zip(states, copies, strict=True):
        for x, y in zip(state, copy, strict=True):
            assert torch.equal(x, y)


def test_a_broken_guard_is_a_near_miss() -> None:
    step = variant(norm_eps=(1e-6, 1e-5))
    (layer,) = kda_ops.explain(step, *step_inputs().values()).layers
    assert "kda_decode" not in [fired.rewrite for fired in layer.fired]
    (miss,) = [miss for miss in layer.near_misses if miss.rewrite == "kda_decode"]
    assert miss.operator == "recurrent_kda"
    assert miss.rejected_by == "guard"
    assert miss.reason == "q and k have different eps: 1e-06 and 1e-05"
    assert miss.blamed == miss.node  # the refusal is about no other
    assert "tests/lowering/test_fusion_decode.py" in miss.source
    assert "in __call__: o = kda_ops.recurrent_kda(" in miss.source
    assert f"nearly fired   kda_decode at recurrent_kda ({miss.node})" in str(
        Explanation("here", "static", (layer,))
    )


def test_an_intermediate_that_is_needed_is_a_near_miss() -> None:
    explanation = kda_ops.explain(chunked, *heads())
    (layer,) = explanation.layers
    assert layer.fired == ()
    (miss,) = layer.near_misses
    assert (miss.rewrite, miss.operator, miss.rejected_by) == (
        "chunk_kda_gated",
        "chunk_kda",
        "has_external_users",
    )
    assert miss.reason == f"gate_cumsum is also used by {miss.blamed}"
    assert miss.source.startswith(line_of("o, _ = kda_ops.chunk_kda("))
    assert miss.blamed_source == f"{line_of('return o, G.exp()')} in chunked: return o, G.exp()"
    assert layer.before.launches == layer.after.launches
    assert explanation.bytes_saved == 0
    text = str(explanation)
    assert f"still needed: gate_cumsum is also used by {miss.blamed}" in text
    assert f"{miss.blamed} is {miss.blamed_source}" in text


def test_graphs_mark_what_a_rewrite_removes_and_makes(prefill: Explanation) -> None:
    layer = prefill.layers[0]
    taken = {node.operator: node.rewrite for node in layer.before.graph if node.rewrite}
    made = {
        node.operator: node.rewrite
        for node in layer.after.graph
        if node.rewrite and node.operator != "getitem"
    }
    assert taken["l2norm"] == "chunk_norms"
    assert taken["chunk_kda"] == taken["gate_cumsum"] == taken["aten.sigmoid"] == "chunk_kda_gated"
    assert "short_conv" not in taken
    assert made == {"chunk_kda_gated": "chunk_norms"}
    names = [{node.name for node in side.graph} for side in (layer.before, layer.after)]
    for node in layer.before.graph:  # marked if and only if it is gone
        assert (node.rewrite is None) == (node.name in names[1]), node
    gemm = next(node for node in layer.before.graph if node.operator == "aten.mm")
    assert gemm.value == f"bfloat16[{T}, {3 * H * K + 2 * K + 64}]"  # beta in a whole row


def test_equal_layers_are_reported_once(prefill: Explanation) -> None:
    text = str(prefill)
    assert text.startswith("compiled for NVIDIA H200 (described, not present), static shapes\n")
    assert "layers.0  KimiDeltaAttention\n  fired          chunk_kda_gated at chunk_kda\n" in text
    assert "launches       8 -> 4" in text
    assert "3 x extern_kernels.mm" in text
    saved = f"{prefill.bytes_saved / 1024:.4g} KiB less through memory"
    assert text.endswith(f"whole graph: 16 -> 8 launches, {saved}")
    first = prefill.layers[0]
    twins = Explanation("here", "static", (first, first, prefill.layers[1]))
    assert [len(others) for _, others in twins.distinct_layers()] == [1, 0]
    assert str(twins).count("launches       8 -> 4") == 2


class Nested(nn.Module):
    """A layer whose convolution is in its own module, between layers of another kind."""

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H * K, 4, dtype=BF16))

        def forward(self, x: Tensor) -> Tensor:
            return kda_ops.short_conv(x, self.weight)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = Nested.Convolution()

        def forward(self, x: Tensor) -> Tensor:
            x = self.convolution(x).unflatten(-1, (H, K))
            o, _ = kda_ops.chunk_kda(x, x, x, x.float().cumsum(1), x[..., 0].float())
            return o.flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(H * K, H * K, dtype=BF16)
        self.attention = nn.Sequential(Nested.Attention())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.first(x).relu())


def test_a_layer_includes_everything_inside_it() -> None:
    with torch.no_grad():
        explanation = kda_ops.explain(Nested(), torch.randn(1, T, H * K, dtype=BF16))
    layer, rest = explanation.layers
    assert (layer.path, layer.kind) == ("attention.0", "Attention")
    assert "short_conv_kernel" in layer.after.launches
    assert layer.after.calls == ()
    assert rest.title == "outside of the layers"
    assert len(rest.after.calls) == 1
    assert rest.after.bytes_moved == 2 * 2 * T * H * K * 2  # the projection, and its relu
    assert [name for name in rest.after.launches if "relu" in name]


def test_code_compiled_before_is_unaffected() -> None:
    stack, x = Stack(KINDS[:1]), torch.randn(1, 8, HIDDEN, dtype=BF16)
    with torch.no_grad():
        compiled = torch.compile(stack, backend="eager", fullgraph=True)
        before = compiled(x)
        launches = kda_ops.explain(compiled, x).launches
        assert launches == kda_ops.explain(stack, x).launches
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(x), before)


def test_rewrites_and_near_misses_of_plain_pytorch() -> None:
    """A norm and a near miss; plain PyTorch, without an operator to name, is reported too."""

    def norms(x: Tensor) -> Tensor:
        q = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
        k = torch.nn.functional.normalize(x, dim=-1)
        return kda_ops.conv_split(q[0], [1, 1, 1], layout="SD")[0] + kda_ops.l2norm(k).sum()

    lines = str(kda_ops.explain(norms, torch.randn(1, 2, 4, 3))).splitlines()
    fired = next(i for i, line in enumerate(lines) if "  fired" in line)
    missed = next(i for i, line in enumerate(lines) if "nearly fired" in line)
    assert "plain_l2norm" in lines[fired]
    assert lines[fired + 2].strip() == "replaces plain PyTorch"
    assert "plain_l2norm" in lines[missed]
    assert lines[missed + 2].endswith("eps belongs below the root")
    assert lines[missed + 3].startswith("  launches")  # the line of source once


def test_errors() -> None:
    with pytest.raises(ValueError, match="model must be a module or a function, got int"):
        kda_ops.explain(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its graph is empty"):
        kda_ops.explain(lambda x: 3, torch.ones(2))
    with pytest.raises(TypeError, match="positional argument"):
        kda_ops.explain(lambda x: x + 1)


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self'].layers.0.f_proj", "layers.0.f_proj"),
        ("L['self']", ""),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("L['self'].layers[3].mixer", "layers.3.mixer"),
        ("G['model'].layer", "layer"),
        ("L['fn'].__closure__[0].cell_contents.block", "block"),
    ],
)
def test_paths_are_those_of_named_modules(written: str, path: str) -> None:
    from kda_ops.lowering.graph.provenance import layer_of

    node = torch.fx.Graph().placeholder("x")
    assert layer_of(node) == ""
    node.meta["nn_module_stack"] = {"k": (written, nn.Linear)}
    assert layer_of(node) == path


class Page(HTMLParser):
    """Checks that every element is closed in order, and records what it saw."""

    void = ("meta", "br", "rect", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_self_contained(prefill: Explanation) -> None:
    html = prefill.to_html()
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "use", "image")
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(attributes)
    assert not re.search(r"https?:|url\(|@import|//\w", html)
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == [
        f"layers.{i}  KimiDeltaAttention, {when} the rewrites"
        for i in (0, 1)
        for when in ("before", "after")
    ]
    drawn = [attributes.get("class") for tag, attributes in page.tags if tag == "g"]
    assert drawn.count("fused") > 10
    before, after = html.split('<figure class="after">')[:2]
    for operator, where in (("short_conv<", before), ("chunk_kda_gated<", after)):
        assert f">{operator}" in where
    assert ">chunk_kda_gated<" not in before
    assert "16 -> 8 launches" in page.text
    for name in ("chunk_gated_prepare_kernel", "3 x extern_kernels.mm", "in prefill"):
        assert name in page.text


def test_the_page_shows_near_misses_and_escapes_text() -> None:
    miss = NearMiss("r<1>", "op", "n", "a&b.py:3", "guard", "x < 3 & <b>", "y", "c.py:4")
    graph = (GraphNode("y", "a<b>", (), "f<3>", 'say "x"'), GraphNode("z", "c", ("y", "w")))
    page = Page(
        Explanation("<d>", "static", (Layer("p", "<K>", (), (miss,), Side(), Side(graph=graph)),))
        .to_html()
    )  # fmt: skip
    for text in ("r<1> at op (n)", "rejected by the guard: x < 3 & <b>", "a<b>", "p  <K>", "<d>"):
        assert text in page.text
    assert [a["class"] for tag, a in page.tags if tag == "g"] == ["input", "plain marked", "plain"]


def test_drawn_nodes_are_below_their_inputs_and_do_not_overlap(prefill: Explanation) -> None:
    nodes = joined(prefill.layers[0].before.graph)
    assert all(node.operator != "getitem" for node in nodes)
    rows = rows_of(nodes)
    order(rows)
    places, width, height = placed(rows)
    assert places.keys() == {node.name for node in nodes}
    for node in nodes:
        x, y, w, h = places[node.name]
        assert x >= 0 <= y
        assert x + w <= width
        assert y + h <= height
        for name in node.inputs:
            assert places[name][1] + places[name][3] < y
    for row in rows:
        spans = sorted((places[n.name][0], places[n.name][0] + places[n.name][2]) for n in row)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.gpu
def test_on_a_real_device(prefill: Explanation) -> None:
    stack, x = Stack(2 * KINDS[:1]).cuda(), torch.randn(1, T, HIDDEN, dtype=BF16, device="cuda")
    # Inductor may pad the two columns of beta's projection, one more kernel, if a timing says so.
    with torch.no_grad(), inductor_config.patch(shape_padding=False):
        explanation = kda_ops.explain(stack, x)
    assert explanation.device == torch.cuda.get_device_name()
    for there, here in zip(explanation.layers, prefill.layers, strict=True):
        assert there.before.launches == here.before.launches
        assert there.after.launches == here.after.launches
    assert explanation.bytes_saved == prefill.bytes_saved
