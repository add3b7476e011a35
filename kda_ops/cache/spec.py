"""The two states of a KDA layer: their segments, and their layout in a page.

A layer keeps exactly two states per sequence: the last inputs of its short convolution and the
recurrent matrix of every value head. Both are in one page, `conv | recurrent | padding`, and one
page is one slot. `KDAStateSpec` has the ordered segments q, k, v, recurrent, each as a number of
heads and the bytes of one. Code that allocates, copies, splits or transfers a state asks the spec
and never infers a size from a total: q, k and v are not equal thirds if heads or dimensions differ.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kda_ops._checks import check_at_least, check_integer, check_multiple
from kda_ops._tracing import reads_values
from kda_ops.config import AUTO, configured_layout

CONV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RECURRENT_DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}
RECURRENT_ALIGNMENT = 128
PAGE_ALIGNMENT = 512


@dataclass(frozen=True)
class Segment:
    """One part of a state, over all ranks.

    Attributes:
        name: `"q"`, `"k"`, `"v"` or `"recurrent"` of a `KDAStateSpec`.
        units: Heads of the whole layer, before tensor parallelism.
        bytes_per_unit: Bytes of one head in one page, the same on every rank.
    """

    name: str
    units: int
    bytes_per_unit: int


def units_held(units: int, tp_size: int, rank: int) -> range:
    """The heads of a segment that a tensor-parallel rank holds.

    With at least as many heads as ranks, a contiguous shard of `units / tp_size`. With fewer, the
    one head `rank * units // tp_size`, replicated over contiguous groups of ranks.

    Args:
        units: Heads of the whole segment.
        tp_size: Ranks.
        rank: In `[0, tp_size)`.

    Raises:
        ValueError: The rank does not exist, there are no units, or neither of units and tp_size
            divides the other.
    """
    check_at_least("units", units, 1)
    if not 0 <= rank < tp_size:
        raise ValueError(f"rank must be in [0, {tp_size}), got {rank}")
    if units >= tp_size:
        if units % tp_size:
            raise ValueError(f"tp_size must divide {units} heads, got {tp_size}")
        share = units // tp_size
        return range(rank * share, (rank + 1) * share)
    if tp_size % units:
        raise ValueError(f"tp_size must be a multiple of {units} replicated heads, got {tp_size}")
    unit = rank * units // tp_size
    return range(unit, unit + 1)


def mamba2_segments(
    num_heads: int,
    head_dim: int,
    n_groups: int,
    state_size: int,
    *,
    conv_size: int = 4,
    num_spec: int = 0,
    conv_dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[Segment, Segment, Segment, Segment]:
    """The states of a Mamba2 layer, for hybrid models with KDA layers.

    For `kda_ops.transfer.geometry.packed_geometry`. Fewer groups than ranks are replicated.

    Args:
        num_heads: Heads of x and of the state.
        head_dim: Channels of a head of x.
        n_groups: Groups of heads that share B and C.
        state_size: Channels of a group of B or C.
        conv_size: Width of the short convolution.
        num_spec: Speculative tokens per step; each adds a row to the conv state.
        conv_dtype: Dtype of the conv state.
        state_dtype: Dtype of the recurrent state.

    Returns:
        x, B, C (conv, layout DS) and ssm `[heads, head_dim, state_size]`, in page order.

    Raises:
        ValueError: A size below its minimum, or heads that are not a multiple of the groups.
    """
    for name, size, least in (
        ("num_heads", num_heads, 1),
        ("head_dim", head_dim, 1),
        ("n_groups", n_groups, 1),
        ("state_size", state_size, 1),
        ("conv_size", conv_size, 2),
        ("num_spec", num_spec, 0),
    ):
        check_at_least(name, size, least)
    check_multiple("num_heads", num_heads, "n_groups", n_groups)
    row = (conv_size - 1 + num_spec) * conv_dtype.itemsize
    return (
        Segment("x", num_heads, head_dim * row),
        Segment("B", n_groups, state_size * row),
        Segment("C", n_groups, state_size * row),
        Segment("ssm", num_heads, head_dim * state_size * state_dtype.itemsize),
    )


@dataclass(frozen=True)
class KDAStateSpec:
    """Shapes, dtypes, segments and page of the two states of a KDA layer.

    It also describes a Gated DeltaNet layer, whose gate is one number per head and whose states are
    the same.

    Head counts and segments are those of the whole layer; shapes, `conv_dim`, `conv_sizes`,
    `offset` and `page_bytes` are those of one tensor-parallel rank (the same on all ranks). The
    spec is a value: frozen, compared by its fields, hashable.

    Args:
        num_k_heads: H, query and key heads.
        num_v_heads: HV, value heads, a multiple of H.
        head_k_dim: K.
        head_v_dim: V.
        conv_size: W, the width of the short convolution. None for a layer without one: its only
            state is the recurrent one, and `allocate` returns None for the other.
        num_spec: Speculative tokens per step; each adds a row to the conv state.
        conv_dtype: bf16, fp16 or fp32: the dtype of the model.
        recurrent_dtype: fp32 or bf16, as a dtype or its name; `"auto"` is fp32. Resolved on
            construction.
        layout: `"SD"`, `"DS"` or `"auto"`; None means `kda_ops.config.conv_layout`. Resolved on
            construction; `"auto"` only for more than one rank (to DS), else by `decide_layout`.
            Without a convolution it has no effect, and is DS, whose pages any TP size may read.
        tp_size: Tensor-parallel ranks.
        page_bytes: Size of a page, if it must be larger than the two states (for example in an
            allocator shared with attention layers). None means the states rounded up to 512 bytes.
            Resolved on construction.

    Raises:
        ValueError: A size below its minimum, heads that do not divide, an invalid dtype or layout,
            a `page_bytes` that is too small or not a multiple of both element sizes.
    """

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_size: int | None = field(default=4, kw_only=True)
    num_spec: int = field(default=0, kw_only=True)
    conv_dtype: torch.dtype = field(kw_only=True)
    recurrent_dtype: torch.dtype | str = field(default="auto", kw_only=True)
    layout: str | None = field(default=None, kw_only=True)
    tp_size: int = field(default=1, kw_only=True)
    page_bytes: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        minima = {"num_spec": 0} if self.conv_size is None else {"conv_size": 2, "num_spec": 0}
        sizes = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "tp_size")
        for name in (*sizes, *minima):
            check_at_least(name, getattr(self, name), minima.get(name, 1))
        check_multiple("num_v_heads", self.num_v_heads, "num_k_heads", self.num_k_heads)
        if self.conv_dtype not in CONV_DTYPES:
            allowed = ", ".join(_dtype_name(d) for d in CONV_DTYPES)
            raise ValueError(f"conv_dtype must be {allowed}, got {_dtype_name(self.conv_dtype)}")
        if self.recurrent_dtype not in RECURRENT_DTYPES:
            raise ValueError(
                "recurrent_dtype must be auto, float32 or bfloat16, "
                f"got {_dtype_name(self.recurrent_dtype)}"
            )
        self._resolve("recurrent_dtype", RECURRENT_DTYPES[self.recurrent_dtype])
        layout = configured_layout(self.layout)
        ranged = self.conv_size is None or (layout == AUTO and self.tp_size > 1)
        self._resolve("layout", "DS" if ranged else layout)
        for units in (self.num_k_heads, self.num_v_heads):
            units_held(units, self.tp_size, 0)
        needed = self.offset("recurrent") + self.local_bytes("recurrent")
        if self.page_bytes is None:
            self._resolve("page_bytes", _align(needed, PAGE_ALIGNMENT))
        check_integer("page_bytes", self.page_bytes)
        if self.page_bytes < needed:
            raise ValueError(f"page_bytes must be at least {needed}, got {self.page_bytes}")
        element = self.recurrent_dtype.itemsize
        if self.conv_size is not None:
            element = max(self.conv_dtype.itemsize, element)
        if self.page_bytes % element:
            raise ValueError(f"page_bytes must be a multiple of {element}, got {self.page_bytes}")

    def _resolve(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def decide_layout(
        self, device: torch.device | str | None = None, *, transfer: bool = False
    ) -> "KDAStateSpec":
        """This spec with `"auto"` resolved; itself if the layout is already decided.

        DS for states to be transferred, in which each of q, k and v is one range of a page. Else
        the faster of the two, timed once per GPU and shapes (see `kda_ops.tuning`), SD on the CPU.
        The answer is fixed for the life of the process.

        Args:
            device: Device of the state; None is the default device.
            transfer: Whether the state will be moved between ranks or engines.
        """
        if self.layout != AUTO:
            return self
        if transfer:
            return replace(self, layout="DS")
        from kda_ops.cache.layout_autotune import faster_layout  # loads Dynamo

        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return replace(
            self,
            layout=faster_layout(
                self.num_k_heads,
                self.num_v_heads,
                self.head_k_dim,
                self.head_v_dim,
                self.conv_size,
                self.num_spec,
                str(self.conv_dtype),
                str(self.recurrent_dtype),
                str(device),
            ),
        )

    def _check_decided(self) -> None:
        if self.layout == AUTO:
            raise ValueError('layout must be decided first (decide_layout), got "auto"')

    @property
    def conv_length(self) -> int:
        """L, rows of the conv state: the last `W - 1` inputs, and one per speculative token; 0
        without a convolution.
        """
        return 0 if self.conv_size is None else self.conv_size - 1 + self.num_spec

    @property
    def conv_sizes(self) -> tuple[int, int, int]:
        """Channels of q, k and v on one rank: the sizes for `conv_split`. Zeros without a
        convolution.
        """
        if self.conv_size is None:
            return (0, 0, 0)
        k_heads, v_heads = self.local_units("k"), self.local_units("v")
        return (k_heads * self.head_k_dim, k_heads * self.head_k_dim, v_heads * self.head_v_dim)

    @property
    def conv_dim(self) -> int:
        """D, channels of the conv state on one rank."""
        return sum(self.conv_sizes)

    @property
    def conv_shape(self) -> tuple[int, int]:
        """One slot's conv state on one rank: `(L, D)` in layout SD, `(D, L)` in DS.

        Raises:
            ValueError: The layout is `"auto"`, or there is no convolution.
        """
        if self.conv_size is None:
            raise ValueError("conv_size must be given for a conv state to have a shape, got None")
        self._check_decided()
        shape = (self.conv_length, self.conv_dim)
        return shape if self.layout == "SD" else shape[::-1]

    @property
    def recurrent_shape(self) -> tuple[int, int, int]:
        """One slot's recurrent state on one rank: `(HV, V, K)`."""
        return (self.local_units("recurrent"), self.head_v_dim, self.head_k_dim)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """q, k, v, recurrent, in page order, over all ranks; recurrent alone without a
        convolution.
        """
        row = self.conv_length * self.conv_dtype.itemsize
        matrix = self.head_v_dim * self.head_k_dim * self.recurrent_dtype.itemsize
        conv = (
            Segment("q", self.num_k_heads, self.head_k_dim * row),
            Segment("k", self.num_k_heads, self.head_k_dim * row),
            Segment("v", self.num_v_heads, self.head_v_dim * row),
        )
        recurrent = Segment("recurrent", self.num_v_heads, matrix)
        return (recurrent,) if self.conv_size is None else (*conv, recurrent)

    def segment(self, name: str) -> Segment:
        """The segment of that name.

        Raises:
            ValueError: There is none.
        """
        for segment in self.segments:
            if segment.name == name:
                return segment
        names = "recurrent" if self.conv_size is None else "q, k, v or recurrent"
        raise ValueError(f"name must be {names}, got {name!r}")

    def units_held(self, name: str, rank: int) -> range:
        """The heads of a segment that a rank holds; see the module's `units_held`."""
        return units_held(self.segment(name).units, self.tp_size, rank)

    def local_units(self, name: str) -> int:
        """Heads of a segment on each rank."""
        return len(self.units_held(name, 0))

    def local_bytes(self, name: str) -> int:
        """Bytes of a segment in a page of one rank."""
        return self.local_units(name) * self.segment(name).bytes_per_unit

    def offset(self, name: str) -> int:
        """Byte offset of a segment in a page.

        The recurrent state starts at a multiple of 128 bytes, so that every state in a buffer is
        aligned for vector loads. In layout DS each of q, k and v is one range of `local_bytes` from
        its offset. In SD they are interleaved row by row, and the offset is that of the segment's
        first row.

        Raises:
            ValueError: There is no such segment, or its place depends on the layout `"auto"`.
        """
        if name != "recurrent":
            self._check_decided()
        row_bytes = self.conv_dtype.itemsize * (self.conv_length if self.layout == "DS" else 1)
        q, k, v = self.conv_sizes
        channels = {"q": 0, "k": q, "v": q + k}
        self.segment(name)
        if name in channels:
            return channels[name] * row_bytes
        conv_bytes = (q + k + v) * self.conv_length * self.conv_dtype.itemsize
        return _align(conv_bytes, RECURRENT_ALIGNMENT)

    def allocate(
        self,
        num_slots: int,
        *,
        layers: int | None = None,
        device: torch.device | str | None = None,
        transfer: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Both states of every slot, zeroed, as views of one buffer of pages.

        Slot 0 is the null block: padding maps to it, and operators never write it. The views have
        the strides of the pages; the buffer lives as long as either.

        Args:
            num_slots: Slots, including the null block.
            layers: Layers to allocate in one buffer, layer first; None is one layer without the
                axis.
            device: Where to allocate.
            transfer: For layout `"auto"`: whether states will be moved; see `decide_layout`.

        Returns:
            conv `[slots, *conv_shape]` and recurrent `[slots, *recurrent_shape]`, or with `layers`
            `[layers, slots, ...]`. Without a convolution conv is None.

        Raises:
            ValueError: `num_slots` or `layers` below 1.
        """
        check_at_least("num_slots", num_slots, 1)
        if layers is not None:
            check_integer("layers", layers)
            if layers < 1:
                raise ValueError(f"layers must be None or at least 1, got {layers}")
        if self.layout == AUTO:
            decided = self.decide_layout(device, transfer=transfer)
            return decided.allocate(num_slots, layers=layers, device=device)
        lead = (num_slots,) if layers is None else (layers, num_slots)
        pages = torch.zeros(*lead, self.page_bytes, dtype=torch.uint8, device=device)
        # the recurrent states view the same bytes through a second storage object: compiled graphs
        # reject two mutated inputs of different dtypes in one storage (what a graph allocates is
        # not an input)
        twin = torch.from_dlpack(pages) if reads_values(pages) else pages

        def view(buffer: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            elements = torch.Size(shape).numel()
            start = offset // dtype.itemsize
            return buffer.view(dtype)[..., start : start + elements].unflatten(-1, shape)

        conv = None
        if self.conv_size is not None:
            conv = view(pages, 0, self.conv_shape, self.conv_dtype)
        offset = self.offset("recurrent")
        return conv, view(twin, offset, self.recurrent_shape, self.recurrent_dtype)


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
