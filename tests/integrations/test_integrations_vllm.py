"""vLLM's names for what this package has: values by hand, and the same results as the originals."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kda_ops
from kda_ops import config
from kda_ops.cache.spec import KDAStateSpec, Segment
from kda_ops.integrations import vllm
from kda_ops.transfer.geometry import EngineGeometry, packed_geometry, state_geometry
from kda_ops.transfer.plan import plan_reads
from kda_ops.transfer.schema import GeometryError

BF16, FP32 = torch.bfloat16, torch.float32


def test_every_name_of_the_documents_is_here() -> None:
    page = (Path(kda_ops.__file__).parent.parent / "docs" / "integrations.md").read_text()
    table = page[page.index("## For vLLM users") :].split("\n## ")[0]
    names = [n for row in table.splitlines() for n in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert len(names) == 11
    for name in names:
        here = "conv_state_layout" if name == vllm.LAYOUT_VARIABLE else name.lstrip("_")
        assert callable(getattr(vllm, here)), name


def test_the_layout_comes_from_vllms_variable() -> None:
    assert vllm.conv_state_layout({}) == "SD"
    assert vllm.conv_state_layout({"VLLM_SSM_CONV_STATE_LAYOUT": "DS"}) == "DS"
    with pytest.raises(
        ValueError, match="VLLM_SSM_CONV_STATE_LAYOUT must be one of SD, DS, got 'X'"
    ):
        vllm.conv_state_layout({"VLLM_SSM_CONV_STATE_LAYOUT": "X"})


def test_state_shapes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm.kda_state_shape(8, 32, 128) == ((3, 1536), (4, 128, 128))
    assert vllm.kda_state_shape(8, 32, 128, num_spec=2, layout="DS") == (
        (1536, 5),
        (4, 128, 128),
    )
    # grouped values, K != V: the recurrent state is (HV, V, K), q and k are not the width of v
    assert vllm.kda_state_shape(2, 8, 64, 4, 96, 3) == ((2, 2 * 2 * 96 + 4 * 64), (4, 64, 96))
    # fewer key heads than ranks: replicated
    assert vllm.kda_state_shape(4, 8, 16, 2, 16)[0] == (3, 2 * 16 + 2 * 16)
    monkeypatch.setattr(config, "conv_layout", "DS")
    assert vllm.kda_state_shape(1, 2, 8)[0] == (48, 3)


def test_state_dtypes() -> None:
    assert vllm.kda_state_dtype(BF16) == (BF16, FP32)
    assert vllm.kda_state_dtype(BF16, "float32") == (FP32, FP32)
    assert vllm.kda_state_dtype(torch.float16, "auto") == (torch.float16, FP32)
    with pytest.raises(ValueError, match="mamba_cache_dtype must be auto or one of bfloat16"):
        vllm.kda_state_dtype(BF16, "fp8")
    with pytest.raises(ValueError, match="model_dtype must be one of bfloat16"):
        vllm.kda_state_dtype(torch.int8)


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_states_are_copied_as_align_mode_wants(layout: str) -> None:
    """Shifted conv rows from the current block, the recurrent state from the accepted one's."""
    spec = vllm.kda_state_spec(1, 2, 8, num_spec=2, layout=layout)
    conv, recurrent = spec.allocate(8, layers=2)
    conv.copy_(torch.randn(conv.shape))
    recurrent.copy_(torch.randn(recurrent.shape))
    before = conv.clone(), recurrent.clone()
    copy = vllm.kda_state_copy_func(layout, num_spec=2)
    copy(conv, recurrent, [[3, 5, 6], [7, 1]], [0, 0], [2, 1], [2, 1])
    rows = -2 if layout == "SD" else -1
    for layer in range(2):
        found, given = (x[layer].movedim(rows, 1) for x in (conv, before[0]))
        assert torch.equal(found[6, :4], given[3, 1:])
        assert torch.equal(found[6, 4], given[6, 4])
        assert torch.equal(found[1], given[7])
        assert torch.equal(recurrent[layer, 6], before[1][layer, 5])
        assert torch.equal(recurrent[layer, 1], before[1][layer, 7])
    for slot in (0, 2, 3, 4, 5, 7):
        assert torch.equal(conv[:, slot], before[0][:, slot])
    with pytest.raises(ValueError, match="block_ids must hold position 2, got 2 blocks"):
        copy(conv, recurrent, [[3, 5]], [0], [1], [3])
    with pytest.raises(ValueError, match="num_accepted_tokens must be at least 1, got 0"):
        copy(conv, recurrent, [[3, 5]], [1], [1], [0])


def test_a_split_is_read_off_the_spec() -> None:
    spec = vllm.kda_state_spec(2, 8, 64, 4, 96, layout="DS")
    info = vllm.derive_mamba_conv_split(spec)
    assert (info.conv_rows, info.conv_dtype_size) == (3, 2)
    assert info.local_proj_dims == (192, 192, 256)
    assert info.ssm_sizes == ((192 + 192 + 256) * 6, 4 * 64 * 96 * 4)
    assert info.local_conv_offsets == ((0, 1152), (1152, 1152), (2304, 1536))
    with pytest.raises(ValueError, match="layout must be DS, got SD"):
        vllm.derive_mamba_conv_split(vllm.kda_state_spec(2, 8, 64, layout="SD"))


def test_blocks_that_a_state_covers() -> None:
    assert vllm.compute_mamba_phys_ratio((100, 900), 500) == 2
    assert vllm.compute_mamba_phys_ratio((100, 901), 500) == 3
    assert vllm.compute_mamba_phys_ratio((0, 2**62 + 1), 1) == 2**62 + 1
    with pytest.raises(ValueError, match="block_len must be at least 1, got 0"):
        vllm.compute_mamba_phys_ratio((1, 1), 0)


def engine(tp: int, kv_heads: int = 2) -> EngineGeometry:
    spec = KDAStateSpec(8, 8, 16, 16, conv_dtype=BF16, layout="DS", tp_size=tp)
    kv = packed_geometry(
        [Segment("k", kv_heads, 64), Segment("v", kv_heads, 64)],
        name="kv",
        kind="attention",
        dtypes={"k": "bfloat16", "v": "bfloat16"},
        tp_size=tp,
        pages=4,
        block_tokens=16,
    )
    return EngineGeometry((state_geometry(spec, pages=4, block_tokens=16), kv))


def test_who_reads_what_of_whom() -> None:
    """Two KV heads on eight prefill ranks: four of them only repeat the heads, never the states."""
    plan = vllm.HeteroTPTransferConfig(engine(1), engine(8), 0)
    assert plan.transfer_targets == list(range(8))
    assert plan.read_targets(0) == list(range(8))
    assert plan.read_targets(1) == [0, 4]
    assert [plan.should_skip(1, p) for p in range(8)] == [p not in (0, 4) for p in range(8)]
    for group in range(2):
        reads = [r for p in plan.transfer_targets for r in plan.reads(group, p).reads]
        whole = plan_reads(engine(8).groups[group], engine(1).groups[group], 0)
        assert sorted(reads) == sorted(whole)
    assert vllm.HeteroTPTransferConfig(engine(8), engine(2), 5).transfer_targets == [1]
    with pytest.raises(GeometryError, match=re.escape("dst_rank must be in [0, 2), got 2")):
        vllm.HeteroTPTransferConfig(engine(2), engine(4), 2)
    with pytest.raises(GeometryError, match="units of segment k"):
        vllm.HeteroTPTransferConfig(engine(2), engine(2, kv_heads=4), 0)


def test_prefix_hits_trim_each_group_by_itself() -> None:
    kinds = ["state", "attention", "attention"]
    remote = [[0, 0, 9], [4, 5, 6], [7, 8, 9]]
    local = [[0, 0, 3], [2], []]
    assert vllm.apply_prefix_caching(local, remote, kinds) == ([[3], [2], []], [[9], [6], []])
    assert vllm.apply_prefix_caching([[], [], []], remote, kinds) == ([[], [], []],) * 2
    options = {"num_spec": 2, "local_running": 2, "remote_running": [2, None, None]}
    speculating = [[0, 0, 3, 11, 12], [2], []], [[0, 0, 9, 13, 14], [4, 5, 6], [7, 8, 9]]
    assert vllm.apply_prefix_caching(*speculating, kinds, **options) == (
        [[3], [2], []],
        [[9], [6], []],
    )
    with pytest.raises(ValueError, match="local_running must name the running block of group 0"):
        vllm.apply_prefix_caching([[3, 11], [2], []], [[9], *remote[1:]], kinds, num_spec=2)
    with pytest.raises(ValueError, match="local group 1 must have at most 3 blocks"):
        vllm.apply_prefix_caching([[3], [1, 2, 3, 4, 5], []], remote, kinds)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    B, T, H, HV, K, V = 1, 100, 2, 4, 16, 8
    return {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, HV, V),
        "raw_g": torch.randn(B, T, HV, K),
        "raw_beta": torch.randn(B, T, HV),
        "A_log": torch.randn(1, 1, HV, 1),
        "g_bias": torch.randn(HV * K),
        "initial_state": torch.randn(2, HV, V, K),
        "cu_seqlens": torch.tensor([0, 33, 100]),
    }


GATES: list[tuple[dict[str, Any], float | None]] = [
    ({}, None),
    ({"lower_bound": -4.0}, -4.0),
    ({"safe_gate": True}, -5.0),
    ({"safe_gate": True, "lower_bound": -2.0}, -2.0),
    ({"safe_gate": False, "lower_bound": -5.0}, None),
]


@pytest.mark.parametrize(("gate", "bound"), GATES, ids=str)
def test_the_fused_gate_is_gate_cumsum(gate: dict[str, Any], bound: float | None) -> None:
    x = inputs()
    out = vllm.fused_kda_gate_chunk_cumsum(
        x["raw_g"], x["A_log"], x["g_bias"], cu_seqlens=x["cu_seqlens"], **gate
    )
    expected = kda_ops.gate_cumsum(
        x["raw_g"],
        x["A_log"].flatten(),
        x["g_bias"],
        lower_bound=bound,
        cu_seqlens=x["cu_seqlens"],
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_the_fused_chunks_are_the_recurrence_token_by_token(raw: bool, norm: bool) -> None:
    """In fp64, against the definition; the final states too."""
    x = {n: t.double() if t.is_floating_point() else t for n, t in inputs().items()}
    if not norm:
        x |= {n: x[n] / x[n].norm(dim=-1, keepdim=True) for n in ("q", "k")}
    raw_beta = x.pop("raw_beta")
    beta = {"raw_beta": raw_beta} if raw else {"beta": raw_beta.sigmoid()}
    o, final = vllm.chunk_kda_with_fused_gate(
        **x, **beta, output_final_state=True, use_qk_l2norm_in_kernel=norm
    )
    q, k = (kda_ops.l2norm(x[n]) if norm else x[n] for n in ("q", "k"))
    q, k = (t[0].repeat_interleave(2, dim=1) for t in (q, k))
    a = x["A_log"].flatten().exp()[:, None]
    z = x["raw_g"][0] + x["g_bias"].view(4, 16)
    g = -a * torch.nn.functional.softplus(z, threshold=100)
    expected = torch.empty_like(x["v"][0])
    for n, (start, end) in enumerate(((0, 33), (33, 100))):
        S = x["initial_state"][n].transpose(1, 2).clone()  # [HV, K, V]
        for t in range(start, end):
            S = S * g[t].exp()[..., None]
            error = x["v"][0, t] - torch.einsum("hk,hkv->hv", k[t], S)
            S = S + torch.einsum("h,hk,hv->hkv", raw_beta[0, t].sigmoid(), k[t], error)
            expected[t] = torch.einsum("hkv,hk->hv", S, q[t]) * 16**-0.5
        torch.testing.assert_close(final[n], S.transpose(1, 2))
    torch.testing.assert_close(o[0], expected)


def test_one_beta() -> None:
    x = inputs()
    del x["raw_beta"]
    with pytest.raises(ValueError, match="one of beta and raw_beta must be given, got none"):
        vllm.chunk_kda_with_fused_gate(**x)
    with pytest.raises(ValueError, match="one of beta and raw_beta must be given, got both"):
        vllm.chunk_kda_with_fused_gate(**x, beta=x["q"], raw_beta=x["q"])
