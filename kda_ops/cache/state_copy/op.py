"""The state copy: schema, fake implementation, public function."""

from torch import Tensor

from kda_ops._checks import INTEGERS, check_device, check_dtype, check_integer, check_rank
from kda_ops._registry import define_op, selected
from kda_ops._roles import CONV_PAGES, COPIES, STATE_PAGES
from kda_ops.cache.state_copy.reference import INTEGER_OF_SIZE, state_copy_reference
from kda_ops.config import resolve_layout


def state_copy_fake() -> None:
    return None


def check_state_copy_values(conv: Tensor, plan: Tensor, max_bias: int) -> None:
    slots = conv.shape[-3]
    for r, (conv_src, recurrent_src, dst, bias) in enumerate(plan.tolist()):
        if conv_src < 0 and recurrent_src < 0:
            continue
        for name, slot in (("conv_src", conv_src), ("recurrent_src", recurrent_src)):
            if slot >= slots:
                raise ValueError(f"plan must have {name} below {slots}, got {slot} in row {r}")
        if dst >= slots:
            raise ValueError(f"plan must have dst below {slots}, got {dst} in row {r}")
        if not 0 <= bias <= max_bias:
            raise ValueError(f"plan must have bias in [0, {max_bias}], got {bias} in row {r}")


state_copy_op = define_op(
    "state_copy(Tensor(a!) conv, Tensor(b!) recurrent, Tensor plan, str layout, int max_bias) "
    "-> ()",
    reference=state_copy_reference,
    fake=state_copy_fake,
    cuda="kda_ops.cache.state_copy.kernel:launch_state_copy",
    roles={"conv": CONV_PAGES, "recurrent": STATE_PAGES, "plan": COPIES},
    check_values=check_state_copy_values,
    moves_only=True,
)


def state_copy(
    conv: Tensor | None,
    recurrent: Tensor,
    plan: Tensor,
    *,
    layout: str | None = None,
    num_spec: int | None = None,
) -> None:
    """Copies states between slots, in place: all requests and layers in one launch.

    For prefix caching: checkpoints a running state, with speculative decode the state after the
    accepted tokens only. Per row of the plan, with `b` the bias:

    * rows `[0, L - b)` of the destination's conv state become rows `[b, L)` of the source's, along
      the state-length axis in either layout; the tail is unchanged. Source and destination may be
      the same slot (a shift);
    * the whole recurrent state of its own source slot goes to the same destination.

    A negative source skips that part. Slot 0 is the null block, and a negative slot is as good:
    nothing is written to it. Requests are copied in no particular order: no row may write what
    another one reads or writes.

    Args:
        conv: `[layers, slots, L, D]` in layout SD, `[layers, slots, D, L]` in DS, or one layer
            without the first axis. Elements of 1, 2, 4 or 8 bytes. The last two axes are dense
            (rows of SD may be strided), layers and slots may be padded pages. None for layers
            without a convolution.
        recurrent: `[layers, slots, HV, V, K]`, or one layer; dense from HV on, otherwise like conv.
        plan: `[R, 4]`, int32 or int64: rows `(conv_src, recurrent_src, dst, bias)` of slots, with
            `bias = num_accepted - 1`.
        layout: `"SD"` or `"DS"`; None means `kda_ops.config.conv_layout`.
        num_spec: The largest bias; None means `L - 1`, or any without a convolution.

    Raises:
        ValueError: An invalid shape, stride, dtype, device or layout; on the CPU, or with
            `kda_ops.config.check_values`, also a slot that does not exist or a bias outside
            `[0, num_spec]` in a row that copies something. On CUDA without the checks such a row is
            skipped.
        RuntimeError: A state requires grad while grad mode is on.
    """
    if conv is None:
        check_rank("recurrent", recurrent, 4, 5)
        layout = resolve_layout(layout)
        rows = (1, 0) if layout == "SD" else (0, 1)  # zero channels: nothing to copy
        conv, L = recurrent.new_empty(*recurrent.shape[:-3], *rows), 2**31
    else:
        check_rank("conv", conv, 3, 4)
        check_rank("recurrent", recurrent, conv.dim() + 1)
        layout = resolve_layout(layout, conv)
        L = conv.shape[-2 if layout == "SD" else -1]
    leading = conv.dim() - 2
    if conv.shape[:leading] != recurrent.shape[:leading]:
        raise ValueError(
            f"recurrent must have as many layers and slots as conv, {tuple(conv.shape[:leading])}, "
            f"got {tuple(recurrent.shape[:leading])}"
        )
    for name, x in (("conv", conv), ("recurrent", recurrent)):
        if x.element_size() not in INTEGER_OF_SIZE or x.dtype.is_complex:
            raise ValueError(f"{name} must have real elements of 1, 2, 4 or 8 bytes, got {x.dtype}")
    _check_dense("conv", conv, 1 if layout == "SD" else 2)
    _check_dense("recurrent", recurrent, 3)
    check_dtype("plan", plan, INTEGERS)
    if plan.dim() != 2 or plan.shape[1] != 4:
        raise ValueError(f"plan must have shape [R, 4], got {tuple(plan.shape)}")
    check_device(conv=conv, recurrent=recurrent, plan=plan)
    if L < 1:
        raise ValueError(f"conv must have a state length of at least 1, got {L}")
    num_spec = L - 1 if num_spec is None else num_spec
    check_integer("num_spec", num_spec)
    if not 0 <= num_spec < L:
        raise ValueError(f"num_spec must be in [0, {L}), got {num_spec}")
    selected(state_copy_op)(conv, recurrent, plan, layout, num_spec)


def _check_dense(name: str, x: Tensor, axes: int) -> None:
    """The last `axes` axes have no gaps."""
    dense = 1
    for axis in range(1, axes + 1):
        if x.shape[-axis] != 1 and x.stride(-axis) != dense:
            raise ValueError(
                f"{name} must be dense in its last {axes} axes, got shape {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )
        dense *= x.shape[-axis]
