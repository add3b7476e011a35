"""Kimi Delta Attention as one module that compiles to one graph."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kda_ops import config
from kda_ops._checks import (
    STATES,
    check_cu_seqlens_shape,
    check_device,
    check_dtype,
    check_gate_parameters,
    check_head_dim,
    check_integer,
    check_kernel_dtype,
    check_lower_bound,
    check_not_negative,
    check_number,
    check_rank,
    check_shape,
    check_writable,
)
from kda_ops._gradients import refuse_derivatives
from kda_ops._numerics import accumulation_dtype
from kda_ops._tracing import open_sizes, reads_values
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.cache.state_copy import state_copy
from kda_ops.config import AUTO, configured_layout, resolve_layout
from kda_ops.conv.short_conv import short_conv
from kda_ops.conv.short_conv_update import short_conv_update
from kda_ops.delta_rule.chunk_kda import chunk_kda
from kda_ops.delta_rule.recurrent_kda import recurrent_kda
from kda_ops.gating.gate import gate
from kda_ops.gating.gate_cumsum import gate_cumsum
from kda_ops.nn.checkpoints import convert_state_dict
from kda_ops.nn.fsdp import keep_exact
from kda_ops.norm.l2norm import l2norm
from kda_ops.norm.rms_norm_gated import rms_norm_gated
from kda_ops.varlen import prepare_chunk_indices

State = tuple[Tensor | None, Tensor]
MODES = ("chunk", "fused_recurrent")
ROW = 64  # elements: rows that are read in parts begin at whole memory transactions


class KimiDeltaAttention(nn.Module):
    """The KDA layer of Kimi Linear, Kimi K3 and GLM-5-Next.

    Per token, with q, k and v of the value head's key head:

        q, k, v = silu(conv(W_qkv x));    q, k <- q / |q|, k / |k|
        g = gate(W_f x);    beta = sigmoid(W_b x)
        S <- diag(exp(g)) S;    S <- S + beta k (v - k^T S)^T;    o = K^-0.5 S^T q
        y = W_o (rms_norm(o) * sigmoid(W_g x))

    What is projected from x is one matrix `in_proj`, with the rows of `in_sizes`: q | k | v | f | g
    | b | pad, of a gate of low rank its first factor, the second being `f_proj` or `g_proj` (and a
    full-rank output gate with a bias is `g_proj` alone); `pad` rows, zero in a checkpoint that is
    loaded and never read, make a multiple of 64. A decode step is held up by the number of its
    products, not by their size. The convolutions are one weight `conv_weight [D, conv_size]` with
    `D = H*K + H*K + HV*V`, in the order q | k | v. `load_checkpoint` packs the checkpoints of FLA,
    Hugging Face and Moonshot that way. `A_log` and `dt_bias` stay in fp32 when the layer is cast to
    a 16-bit dtype, and when FSDP2 (`fully_shard`) shards it, in whatever dtypes.

    Source: Kimi Linear (arXiv:2510.26692), section 4. The arguments up to `norm_eps` are those of
    FLA's layer of this name.

    Args:
        hidden_size: Width of the input and output.
        head_dim: K, the width of a query or key head.
        num_heads: H, query and key heads.
        num_v_heads: HV, value heads, a multiple of `num_heads`. None means `num_heads`.
        expand_v: V / K.
        mode: `"chunk"` or `"fused_recurrent"`, for configurations written for FLA. The batch
            decides here: decode rows step, all other rows go by chunks.
        use_short_conv: Convolve q, k and v; without it they are only activated, and the convolution
            state is None.
        allow_neg_eigval: `beta = 2 * sigmoid(...)`.
        safe_gate: FLA's name for a bounded gate whose `A_log` starts at 0; needs `lower_bound`.
        lower_bound: None for the softplus gate, or the bound of the sigmoid gate in `[-5, 0)`, in
            nats.
        conv_size: Taps of the convolution.
        conv_bias: Whether the convolution has a bias.
        layer_idx: Kept for the caller.
        norm_eps: eps of the output norm.
        forget_gate_rank: Rank of the forget gate: a number, `"head"` for V (FLA, Kimi Linear), or
            None for one full-rank matrix.
        output_gate_rank: Rank of the output gate, likewise (None: Kimi K3).
        output_gate_bias: Whether the output gate ends in a bias (FLA has one, Moonshot's
            checkpoints have none).
        conv_layout: `"SD"`, `"DS"`, `"auto"`, or None to follow `kda_ops.config.conv_layout`.
            `"auto"` goes by the shape of the state that a call gets.
        device: Where the parameters are made.
        dtype: Of all parameters but `A_log` and `dt_bias`.

    Raises:
        ValueError: Sizes that do not fit, an unknown mode or layout, a `lower_bound` outside
            `[-5, 0)`.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int = 128,
        num_heads: int = 16,
        *,
        num_v_heads: int | None = None,
        expand_v: float = 1.0,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        forget_gate_rank: int | str | None = "head",
        output_gate_rank: int | str | None = "head",
        output_gate_bias: bool = True,
        conv_layout: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        for name, value in (
            ("hidden_size", hidden_size),
            ("head_dim", head_dim),
            ("num_heads", num_heads),
        ):
            check_integer(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_integer("num_v_heads", num_v_heads)
        check_number("expand_v", expand_v)
        check_integer("conv_size", conv_size)
        if num_v_heads < 1 or num_v_heads % num_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of num_heads = {num_heads}, got {num_v_heads}"
            )
        width = head_dim * float(expand_v)
        head_v_dim = round(width) if math.isfinite(width) else 0
        if head_v_dim < 1 or not math.isclose(width, head_v_dim, rel_tol=1e-5):
            raise ValueError(
                f"expand_v must make head_dim * expand_v = {head_dim} * expand_v an integer, "
                f"got {expand_v}"
            )
        check_head_dim("head_dim", head_dim)
        check_head_dim("head_dim * expand_v", head_v_dim)
        check_not_negative("norm_eps", norm_eps)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {conv_size}")
        if safe_gate and lower_bound is None:
            raise ValueError("lower_bound must be given with safe_gate, got None")
        check_lower_bound(lower_bound)
        if conv_layout is not None:
            configured_layout(conv_layout)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.allow_neg_eigval = allow_neg_eigval
        self.safe_gate = safe_gate
        self.lower_bound = lower_bound
        self.layer_idx = layer_idx
        self.norm_eps = norm_eps
        self.conv_layout = conv_layout

        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        gate_dim, value_dim = num_v_heads * head_dim, self.value_dim
        f_rank = self._gate_rank("forget_gate_rank", forget_gate_rank)
        g_rank = self._gate_rank("output_gate_rank", output_gate_rank)
        self.in_sizes = {
            "q": self.key_dim,
            "k": self.key_dim,
            "v": self.value_dim,
            "f": gate_dim if f_rank is None else f_rank,
            "g": value_dim if g_rank is None else g_rank,
            "b": num_v_heads,
        }
        if g_rank is None and output_gate_bias:
            del self.in_sizes["g"]
        self.in_sizes["pad"] = -sum(self.in_sizes.values()) % ROW
        self.in_proj = nn.Linear(hidden_size, sum(self.in_sizes.values()), bias=False, **kw)
        if use_short_conv:
            self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, conv_size, **kw))
        else:
            self.register_parameter("conv_weight", None)
        if use_short_conv and conv_bias:
            self.conv_bias = nn.Parameter(torch.empty(self.conv_dim, **kw))
        else:
            self.register_parameter("conv_bias", None)
        self.f_proj = None if f_rank is None else nn.Linear(f_rank, gate_dim, bias=False, **kw)
        self.A_log = nn.Parameter(torch.empty(num_v_heads, device=device, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(gate_dim, device=device, dtype=torch.float32))
        self.g_proj = None
        if g_rank is not None or output_gate_bias:
            rank = hidden_size if g_rank is None else g_rank
            self.g_proj = nn.Linear(rank, value_dim, bias=output_gate_bias, **kw)
        self.o_norm_weight = nn.Parameter(torch.empty(head_v_dim, **kw))
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False, **kw)
        self.reset_parameters()

    def _gate_rank(self, name: str, rank: int | str | None) -> int | None:
        if rank == "head":
            return self.head_v_dim
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f'{name} must be a positive number, "head" or None, got {rank!r}')
        return rank

    @property
    def key_dim(self) -> int:
        """Channels of q, and of k."""
        return self.num_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        """Channels of v."""
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        """D, the channels of q, k and v together."""
        return 2 * self.key_dim + self.value_dim

    def in_parts(self) -> dict[str, Tensor]:
        """The rows of `in_proj` by the names in `in_sizes`, without `pad`: views of its weight."""
        parts = self.in_proj.weight.split(list(self.in_sizes.values()))
        named = dict(zip(self.in_sizes, parts, strict=True))
        del named["pad"]
        return named

    def in_padded(self, rows: Tensor) -> Tensor:
        """A weight for `in_proj` from the rows of its parts, one behind the other."""
        return F.pad(rows, (0, 0, 0, self.in_sizes["pad"]))

    def extra_repr(self) -> str:
        gate = "softplus" if self.lower_bound is None else f"bounded at {self.lower_bound}"
        return (
            f"heads={self.num_heads}, value_heads={self.num_v_heads}, K={self.head_k_dim}, "
            f"V={self.head_v_dim}, conv_size={self.conv_size}, gate={gate}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the parameters that are no `nn.Linear` as FLA does."""
        if self.safe_gate:
            self.A_log.zero_()
        else:
            self.A_log.uniform_(1, 16).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus
        bound = self.conv_size**-0.5
        for parameter in (self.conv_weight, self.conv_bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)
        self.o_norm_weight.fill_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KimiDeltaAttention":
        """Keeps `A_log` and `dt_bias` out of 16-bit dtypes: rates are their exponentials."""
        exact = [x for p in (self.A_log, self.dt_bias) for x in (p, p.grad) if x is not None]

        def apply(x: Tensor) -> Tensor:
            out = fn(x)
            if out.dtype.itemsize < 4 and any(x is y for y in exact):
                return x.to(out.device)
            return out

        return super()._apply(apply, recurse)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> Any:
        """As in `nn.Module`. FSDP2 does so for each parameter that it shards."""
        keep_exact(hook)
        return super().register_load_state_dict_post_hook(hook)

    def load_checkpoint(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Loads the layer's weights from a checkpoint of FLA, Hugging Face or Moonshot, or from
        this class's own.

        Args:
            state_dict: Tensors by name.
            prefix: What the layer's names start with in it, such as `"model.layers.0.self_attn."`.

        Raises:
            ValueError: Missing or unexpected names, or shapes that do not fit; see
                `kda_ops.nn.checkpoints.convert_state_dict`.
        """
        self.load_state_dict(convert_state_dict(state_dict, self, prefix))

    def state_spec(
        self, *, num_spec: int = 0, recurrent_dtype: Any = "auto", transfer: bool = False
    ) -> KDAStateSpec:
        """The states of this layer; its `allocate` makes what `forward` takes as `state`.

        Layout `"auto"` is decided here, for the device of the weights. `transfer`: the states will
        be moved between ranks or engines.
        """
        conv_size: Any = self.conv_size if self.use_short_conv else None
        spec = KDAStateSpec(
            self.num_heads,
            self.num_v_heads,
            self.head_k_dim,
            self.head_v_dim,
            conv_size=conv_size,
            num_spec=num_spec,
            conv_dtype=self.in_proj.weight.dtype,
            recurrent_dtype=recurrent_dtype,
            layout=configured_layout(self.conv_layout),
        )
        return spec.decide_layout(self.in_proj.weight.device, transfer=transfer)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        batch: KDABatch | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        output_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Applies the layer.

        * Without a state: every batch entry is one sequence, or `cu_seqlens` packs several into one
          row. Differentiable.
        * With `state` and `batch`: a server's step on paged states, written in place: prefill,
          chunked prefill, decode, speculative decode, or all of them in one call. Not
          differentiable.

        Args:
            hidden_states: `[B, T, hidden_size]`; B is 1 with `batch` or `cu_seqlens`.
            state: `(conv, recurrent)` as `state_spec().allocate(...)` makes it: `conv [slots, L,
                D]` in layout SD or `[slots, D, L]` in DS with `L = conv_size - 1 + num_spec`, and
                `recurrent [slots, HV, V, K]`. Pages may be padded. Without a convolution conv is
                None. Needs `batch`.
            batch: Rows, sequences and slots of the step. Needs `state`.
            cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences; first 0,
                non-decreasing, last at most T. Only without `batch`.
            chunk_indices: `prepare_chunk_indices(cu_seqlens, T)` if the caller has it already.
            output_state: Also return the states: those passed, or without any, fresh pages in which
                sequence n ends in slot n + 1 (slot 0 is the null block).

        Returns:
            `[B, T, hidden_size]`, and `(conv, recurrent)` with `output_state`. Rows that belong to
            no sequence are zero.

        Raises:
            ValueError: Shapes, devices or arguments that do not fit together, before anything is
                written.
            RuntimeError: Gradients were asked for together with a state.
        """
        if isinstance(batch, KDABatch) and torch.compiler.is_dynamo_compiling():
            open_sizes(batch, hidden_states)
        self._check(hidden_states, state, batch, cu_seqlens, chunk_indices)
        conv = None if state is None else state[0]
        layout = resolve_layout(self.conv_layout, conv, self.conv_dim)
        x, f, z, beta = self._project(hidden_states)
        if batch is not None and state is not None:
            self._check_step(hidden_states, x, f, beta, state)
            o = self._step(x, f, beta, z, state, batch, layout)
        else:
            state_indices = None
            if cu_seqlens is not None and chunk_indices is None:
                chunk_indices = prepare_chunk_indices(cu_seqlens, x.shape[1])
            if output_state:
                layout = self._fresh_layout(x)
                sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
                state = self._fresh_state(sequences + 1, x, layout)
                state_indices = torch.arange(1, sequences + 1, device=x.device)
            o = self._prefill(
                x, f, beta, z, state, state_indices, None, cu_seqlens, chunk_indices, layout
            )
        output = self.o_proj(o.flatten(-2))
        return (output, state) if output_state else output

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes into the convolution, both gates by head, and beta before its sigmoid."""
        sizes = self.in_sizes
        names = [name for name in sizes if name not in "qkv"]
        widths = [self.conv_dim, *(sizes[name] for name in names)]
        # products of rows: `nn.Linear` would add the bias of a slice with more axes on its own
        rows = hidden_states.flatten(0, 1)
        x, *rest = self.in_proj(rows).split(widths, dim=-1)
        parts = dict(zip(names, rest, strict=True))
        f, z, beta = parts["f"], parts.get("g", rows), parts["b"]
        if self.f_proj is not None:
            f = self.f_proj(f)
        if self.g_proj is not None:
            z = self.g_proj(z)
        x, f, z, beta = (y.unflatten(0, hidden_states.shape[:2]) for y in (x, f, z, beta))
        f = f.unflatten(-1, (self.num_v_heads, self.head_k_dim))
        return x, f, z.unflatten(-1, (self.num_v_heads, self.head_v_dim)), beta

    def _step(
        self,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        z: Tensor,
        state: State,
        batch: KDABatch,
        layout: str,
    ) -> Tensor:
        """One step of a server: decode rows, then prefill rows and padding."""
        if batch.prefill_copies is not None:
            conv, recurrent = state
            window = layout
            if conv is None:  # the copy takes two states
                conv, window = (
                    recurrent.new_zeros(len(recurrent), batch.state_indices.shape[1], 1),
                    "SD",
                )
            num_spec = batch.state_indices.shape[1] - 1
            state_copy(conv, recurrent, batch.prefill_copies, layout=window, num_spec=num_spec)
        if batch.kind == "decode":
            return self._decode(x, f, beta, z, state, batch, layout)
        if batch.kind == "prefill":
            return self._prefill_pages(x, f, beta, z, state, batch, layout)
        _, decode_rows, _, _, prefill_rows, *_ = batch.counts.shape
        rows = (decode_rows, prefill_rows)
        (x, x2), (f, f2), (beta, beta2), (z, z2) = (y.split(rows, dim=1) for y in (x, f, beta, z))
        decoded = self._decode(x, f, beta, z, state, batch, layout)
        prefilled = self._prefill_pages(x2, f2, beta2, z2, state, batch, layout)
        return torch.cat([decoded, prefilled], dim=1)

    def _decode(
        self,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        z: Tensor,
        state: State,
        batch: KDABatch,
        layout: str,
    ) -> Tensor:
        """A few tokens of each decode, step by step from its pages."""
        conv, recurrent = state
        cu_seqlens, state_indices = batch.decodes()
        if self.use_short_conv:
            x = short_conv_update(
                x[0],
                conv,
                self.conv_weight,
                self.conv_bias,
                state_indices=state_indices,
                num_accepted=batch.num_accepted,
                cu_seqlens=cu_seqlens,
                layout=layout,
            )[None]
        else:
            x = F.silu(x)
        q, k, v = self._heads(x)
        g = gate(f, self.A_log, self.dt_bias, lower_bound=self.lower_bound)
        o = recurrent_kda(
            q,
            k,
            v,
            g,
            self._beta(beta),
            recurrent,
            state_indices,
            num_accepted=batch.num_accepted,
            cu_seqlens=cu_seqlens,
        )
        # padding follows the last sequence of the whole batch
        return self._norm(o, z, None if batch.kind == "mixed" else cu_seqlens)

    def _prefill_pages(
        self,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        z: Tensor,
        state: State,
        batch: KDABatch,
        layout: str,
    ) -> Tensor:
        """The prompts of a step, from and into their pages."""
        state_indices, continues = batch.prefills()
        return self._prefill(
            x,
            f,
            beta,
            z,
            state,
            state_indices if state_indices.dim() == 1 else state_indices[:, 0],
            continues,
            batch.prefill_cu_seqlens,
            batch.chunk_indices,
            layout,
        )

    def _prefill(
        self,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        z: Tensor,
        state: State | None,
        state_indices: Tensor | None,
        has_initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
        layout: str,
    ) -> Tensor:
        """Whole sequences, chunk by chunk; with a state from and into its slots."""
        conv, recurrent = (None, None) if state is None else state
        if self.use_short_conv:
            x = short_conv(
                x,
                self.conv_weight,
                self.conv_bias,
                conv_state=conv,
                state_indices=state_indices,
                has_initial_state=has_initial_state,
                cu_seqlens=cu_seqlens,
                layout=layout,
            )
        else:
            x = F.silu(x)
        q, k, v = self._heads(x)
        g_cumsum = gate_cumsum(
            f,
            self.A_log,
            self.dt_bias,
            lower_bound=self.lower_bound,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
        )
        o, _ = chunk_kda(
            q,
            k,
            v,
            g_cumsum,
            self._beta(beta),
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            state=recurrent,
            state_indices=state_indices,
            has_initial_state=has_initial_state,
        )
        return self._norm(o, z, cu_seqlens)

    def _beta(self, beta: Tensor) -> Tensor:
        """The step size of the delta rule from its projection."""
        beta = torch.sigmoid(beta.to(accumulation_dtype(beta)))
        return 2 * beta if self.allow_neg_eigval else beta

    def _norm(self, o: Tensor, z: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The output norm; rows past the last sequence are zero whatever their gate is."""
        o = rms_norm_gated(o, z, self.o_norm_weight, eps=self.norm_eps)
        if cu_seqlens is None:
            return o
        real = torch.arange(o.shape[1], device=o.device) < cu_seqlens[-1]
        # expanded, as torch 2.11 computes what is unsqueezed at an unknown size on its own
        return torch.where(real.expand(1, 1, -1).permute(2, 0, 1), o, 0)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q and k, and v, of the convolved channels."""
        q, k, v = x.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (y.unflatten(-1, (self.num_heads, self.head_k_dim)) for y in (q, k))
        return l2norm(q), l2norm(k), v.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _fresh_layout(self, x: Tensor) -> str:
        """The layout of a state that is allocated here."""
        layout = configured_layout(self.conv_layout)
        if layout != AUTO or not self.use_short_conv:
            return layout
        from kda_ops.cache.layout_autotune import faster_layout  # loads Dynamo

        return faster_layout(
            self.num_heads,
            self.num_v_heads,
            self.head_k_dim,
            self.head_v_dim,
            self.conv_size,
            0,
            str(self._state_dtype(x)),
            str(accumulation_dtype(x)),
            str(x.device),
        )

    def _state_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of a convolution state that is allocated here: the weights', as in the spec."""
        autocast = torch.is_autocast_enabled(x.device.type)
        return self.in_proj.weight.dtype if autocast else x.dtype

    def _fresh_state(self, slots: int, x: Tensor, layout: str) -> State:
        """Zeroed states for `slots`, without the padding of pages."""
        conv = None
        if self.use_short_conv:
            L = self.conv_size - 1
            conv_shape = (L, self.conv_dim) if layout == "SD" else (self.conv_dim, L)
            conv = x.new_zeros((slots, *conv_shape), dtype=self._state_dtype(x))
        shape = (slots, self.num_v_heads, self.head_v_dim, self.head_k_dim)
        return conv, x.new_zeros(shape, dtype=accumulation_dtype(x))

    def _check(
        self,
        hidden_states: Tensor,
        state: State | None,
        batch: KDABatch | None,
        cu_seqlens: Tensor | None,
        chunk_indices: Tensor | None,
    ) -> None:
        check_rank("hidden_states", hidden_states, 3)
        check_dtype("hidden_states", hidden_states)
        check_device(A_log=self.A_log, hidden_states=hidden_states)
        B, T = hidden_states.shape[:2]
        check_shape("hidden_states", hidden_states, (B, T, self.hidden_size))
        if (state is None) != (batch is None):
            given, missing = ("state", "batch") if batch is None else ("batch", "state")
            raise ValueError(f"{missing} must be given with {given}, got None")
        if cu_seqlens is not None:
            check_cu_seqlens_shape(cu_seqlens)
            if B != 1:
                raise ValueError(f"hidden_states must have batch size 1 with cu_seqlens, got {B}")
        if chunk_indices is not None and cu_seqlens is None:
            raise ValueError("chunk_indices must come with cu_seqlens, got chunk_indices alone")
        if batch is None or state is None:
            return
        if not isinstance(batch, KDABatch):
            raise ValueError(f"batch must be a KDABatch, got {type(batch).__name__}")
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None with batch, which has its own")
        batch.check_rows(hidden_states)
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise ValueError(f"state must be (conv, recurrent), got {type(state).__name__}")
        conv, recurrent = state
        check_rank("recurrent", recurrent, 4)
        check_dtype("recurrent", recurrent, STATES)
        check_shape(
            "recurrent",
            recurrent,
            (recurrent.shape[0], self.num_v_heads, self.head_v_dim, self.head_k_dim),
        )
        if (conv is None) == self.use_short_conv:
            expected = "a tensor" if self.use_short_conv else "None"
            raise ValueError(f"conv must be {expected}, got {type(conv).__name__}")
        if conv is not None:
            check_rank("conv", conv, 3)
            layout = resolve_layout(self.conv_layout, conv, self.conv_dim)
            L = conv.shape[1 if layout == "SD" else 2]
            shape = (L, self.conv_dim) if layout == "SD" else (self.conv_dim, L)
            check_shape("conv", conv, (recurrent.shape[0], *shape))
            num_spec = 0 if batch.state_indices.dim() == 1 else batch.state_indices.shape[1] - 1
            fewest = self.conv_size - 1 + num_spec
            if fewest > L:
                raise ValueError(f"conv must have a state length of at least {fewest}, got {L}")
        check_device(
            hidden_states=hidden_states,
            conv=conv,
            recurrent=recurrent,
            state_indices=batch.state_indices,
        )
        if (
            recurrent.is_cuda and config.impl == "auto"
        ):  # what the operators behind the first write would refuse
            for name, x in (
                ("recurrent", recurrent),
                ("A_log", self.A_log),
                ("dt_bias", self.dt_bias),
                ("o_norm_weight", self.o_norm_weight),
            ):
                check_kernel_dtype(name, x)
        on_cpu = recurrent.device.type == "cpu"
        if (on_cpu or config.check_values) and reads_values(batch.state_indices):
            batch.check_slots(recurrent.shape[0])

    def _check_step(
        self, hidden_states: Tensor, x: Tensor, f: Tensor, beta: Tensor, state: State
    ) -> None:
        """What the operators behind the first write of a state would refuse. (In compiled code they
        do while they are traced.)
        """
        if torch.compiler.is_compiling():
            return
        conv, recurrent = state
        check_gate_parameters(f, self.A_log, self.dt_bias, self.lower_bound, name="f")
        check_shape("o_norm_weight", self.o_norm_weight, (self.head_v_dim,))
        check_dtype("o_norm_weight", self.o_norm_weight)
        check_device(hidden_states=hidden_states, o_norm_weight=self.o_norm_weight)
        check_not_negative("norm_eps", self.norm_eps)
        if type(self.o_proj) is nn.Linear and not torch.is_autocast_enabled(x.device.type):
            weight = self.o_proj.weight
            check_shape("o_proj.weight", weight, (weight.shape[0], self.value_dim))
            check_dtype("o_proj.weight", weight, (x.dtype,))
        if recurrent.device.type == "cpu":
            check_writable(conv=conv, recurrent=recurrent)
        refuse_derivatives(
            type(self).__name__,
            {
                "hidden_states": hidden_states,
                "the output of in_proj": x,
                "the output of f_proj": f,
                "beta": beta,
                "conv_weight": self.conv_weight,
                "conv_bias": self.conv_bias,
                "A_log": self.A_log,
                "dt_bias": self.dt_bias,
                "conv": conv,
                "recurrent": recurrent,
            },
        )
