"""Kimi Delta Attention as one module that compiles to one graph."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kda_ops._tracing import open_sizes
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.config import configured_layout
from kda_ops.nn.apply import apply
from kda_ops.nn.checkpoints import convert_state_dict
from kda_ops.nn.config import check_heads, check_options, gate_rank, value_head_dim
from kda_ops.nn.context import ContextParallel
from kda_ops.nn.fsdp import keep_exact
from kda_ops.nn.input_projection import input_sizes, padded, parts_of
from kda_ops.nn.parts import join_parts
from kda_ops.nn.states import State

__all__ = ["KimiDeltaAttention", "State"]


def accept_either_form(
    layer: "KimiDeltaAttention", state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Lets a layer load packed weights and parts. A function: a layer with its hooks is copied."""
    layer.adapt_state_dict(state_dict, prefix)


class KimiDeltaAttention(nn.Module):
    """The KDA layer of Kimi Linear, Kimi K3 and GLM-5-Next.

    Per token, with q, k and v of the value head's key head:

        q, k, v = silu(conv(W_qkv x));    q, k <- q / |q|, k / |k|
        g = gate(W_f x);    beta = sigmoid(W_b x)
        S <- diag(exp(g)) S;    S <- S + beta k (v - k^T S)^T;    o = K^-0.5 S^T q
        y = W_o (rms_norm(o) * sigmoid(W_g x))

    All input projections are one GEMM, `in_proj`, with the rows of `in_sizes`: q | k | v | f | g |
    b | pad. It includes the first factor of a low-rank gate; the second is `f_proj` or `g_proj` (a
    full-rank output gate with a bias is `g_proj` alone). `pad` rows, zero in a loaded checkpoint
    and never read, round up to a multiple of 64. A decode step is bound by the number of GEMMs, not
    their size. The convolutions are one weight `conv_weight [D, conv_size]` with `D = H*K + H*K +
    HV*V`, in the order q | k | v. `load_checkpoint` packs the checkpoints of FLA, Hugging Face and
    Moonshot accordingly. `A_log` and `dt_bias` stay in fp32 when the layer is cast to a 16-bit
    dtype, and when FSDP2 (`fully_shard`) shards it, in any dtypes.

    Source: Kimi Linear (arXiv:2510.26692), section 4. The arguments up to `norm_eps` are those of
    FLA's layer of the same name.

    Args:
        hidden_size: Width of the input and output.
        head_dim: K, the width of a query or key head.
        num_heads: H, query and key heads.
        num_v_heads: HV, value heads, a multiple of `num_heads`. None means `num_heads`.
        expand_v: V / K.
        mode: `"chunk"` or `"fused_recurrent"`, accepted for configurations written for FLA, without
            effect: decode rows use the recurrent form, all other rows the chunked one.
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
        output_gate_bias: Whether the output gate has a bias (FLA has one, Moonshot's
            checkpoints have none).
        conv_layout: `"SD"`, `"DS"`, `"auto"`, or None to follow `kda_ops.config.conv_layout`.
            `"auto"` infers it from the shape of a call's state.
        device: Device of the parameters.
        dtype: Dtype of all parameters but `A_log` and `dt_bias`.

    Raises:
        ValueError: Inconsistent sizes, an unknown mode or layout, a `lower_bound` outside
            `[-5, 0)`.
    """

    context: ContextParallel | None = None  # over which `kda_ops.nn.parallelize` spreads the tokens

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
        check_heads(hidden_size, head_dim, num_heads, num_v_heads)
        head_v_dim = value_head_dim(head_dim, expand_v)
        check_options(mode, conv_size, norm_eps, safe_gate, lower_bound, conv_layout)
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
        f_rank = gate_rank("forget_gate_rank", forget_gate_rank, head_v_dim)
        g_rank = gate_rank("output_gate_rank", output_gate_rank, head_v_dim)
        self.in_sizes = input_sizes(
            self.key_dim, value_dim, gate_dim, num_v_heads, f_rank, g_rank, output_gate_bias
        )
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
        self.register_load_state_dict_pre_hook(accept_either_form)
        self.reset_parameters()

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
        """D, the total channels of q, k and v."""
        return 2 * self.key_dim + self.value_dim

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the whole layer, packed."""
        return {name: tuple(p.shape) for name, p in self.named_parameters()}

    def in_parts(self) -> dict[str, Tensor]:
        """The rows of `in_proj` by the names in `in_sizes`, without `pad`: views of its weight."""
        return parts_of(self.in_proj.weight, self.in_sizes)

    def in_padded(self, rows: Tensor) -> Tensor:
        """A weight for `in_proj` from the concatenated rows of its parts."""
        return padded(rows, self.in_sizes)

    def extra_repr(self) -> str:
        gate = "softplus" if self.lower_bound is None else f"bounded at {self.lower_bound}"
        return (
            f"heads={self.num_heads}, value_heads={self.num_v_heads}, K={self.head_k_dim}, "
            f"V={self.head_v_dim}, conv_size={self.conv_size}, gate={gate}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes the non-Linear parameters like FLA."""
        if self.safe_gate:
            self.A_log.zero_()
        else:
            self.A_log.uniform_(1, 16).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus
        bound = self.conv_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith("conv_"):
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
        """As in `nn.Module`. FSDP2 calls it for each parameter that it shards."""
        keep_exact(hook)
        return super().register_load_state_dict_post_hook(hook)

    def adapt_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Brings a state dict, in place, to the form of this layer; see `kda_ops.nn.parts`."""
        join_parts(self, state_dict, prefix)

    def load_checkpoint(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Loads the layer's weights from a checkpoint of FLA, Hugging Face, Moonshot or this class.

        Args:
            state_dict: Tensors by name.
            prefix: The prefix of the layer's names, such as `"model.layers.0.self_attn."`.

        Raises:
            ValueError: Missing or unexpected names, or wrong shapes; see
                `kda_ops.nn.checkpoints.convert_state_dict`.
        """
        self.load_state_dict(convert_state_dict(state_dict, self, prefix))

    def state_spec(
        self, *, num_spec: int = 0, recurrent_dtype: Any = "auto", transfer: bool = False
    ) -> KDAStateSpec:
        """The spec of this layer's states; its `allocate` returns the `state` of `forward`.

        Layout `"auto"` is resolved here, for the device of the weights. `transfer`: whether the
        states will be moved between ranks or engines.
        """
        return self.make_spec(
            1, num_spec=num_spec, recurrent_dtype=recurrent_dtype, transfer=transfer
        )

    def make_spec(
        self, tp_size: int, *, num_spec: int, recurrent_dtype: Any, transfer: bool
    ) -> KDAStateSpec:
        """`state_spec` for a number of ranks."""
        conv_size: Any = self.conv_size if self.use_short_conv else None
        spec = KDAStateSpec(
            self.num_heads,
            self.num_v_heads,
            self.head_k_dim,
            self.head_v_dim,
            conv_size=conv_size,
            num_spec=num_spec,
            conv_dtype=self.o_proj.weight.dtype,
            recurrent_dtype=recurrent_dtype,
            layout=configured_layout(self.conv_layout),
            tp_size=tp_size,
        )
        return spec.decide_layout(self.o_proj.weight.device, transfer=transfer)

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
            state: `(conv, recurrent)` from `state_spec().allocate(...)`: `conv [slots, L, D]` in
                layout SD or `[slots, D, L]` in DS with `L = conv_size - 1 + num_spec`, and
                `recurrent [slots, HV, V, K]`. Pages may be padded. Without a convolution conv is
                None. Needs `batch`.
            batch: Rows, sequences and slots of the step. Needs `state`.
            cu_seqlens: `[N + 1]`, int32 or int64, offsets of the sequences; first 0,
                non-decreasing, last at most T. Only without `batch`.
            chunk_indices: `prepare_chunk_indices(cu_seqlens, T)`, if already computed.
            output_state: Also return the states: those passed, or else fresh pages with the final
                state of sequence n in slot n + 1 (slot 0 is the null block).

        Returns:
            `[B, T, hidden_size]`, and `(conv, recurrent)` with `output_state`. Padding rows are
            zero.

        Raises:
            ValueError: Inconsistent shapes, devices or arguments, before anything is written.
            RuntimeError: Gradients were requested together with a state.
        """
        if isinstance(batch, KDABatch) and torch.compiler.is_dynamo_compiling():
            open_sizes(batch, hidden_states)
        return apply(
            self, hidden_states, state, batch, cu_seqlens, chunk_indices, output_state=output_state
        )
