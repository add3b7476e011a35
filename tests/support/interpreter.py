"""Makes Triton's interpreter treat bf16 as a GPU does.

Unpatched, a dot multiplies the operands' bit patterns, and a cast from fp32 truncates instead of
rounding to nearest.
"""

from typing import Any

import numpy as np


def patch_interpreter() -> None:
    import triton.runtime.interpreter as interpreter

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == interpreter.tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(values(a), values(b))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    convert_float = interpreter._convert_float

    def round_to_nearest(
        x: np.ndarray, input_dtype: Any, output_dtype: Any, rounding_mode: Any
    ) -> np.ndarray:
        tl = interpreter.tl
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert_float(x, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(x.shape)

    def with_boolean_mask(access: Any, position: int) -> Any:
        def call(self: Any, *args: Any) -> Any:
            mask = args[position]
            mask = interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype.scalar)
            return access(self, *args[:position], mask, *args[position + 1 :])

        return call

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    # Triton 3.6 asks for the `int` of an array with an axis, which NumPy 2.4 refuses
    interpreter._patch_lang_tensor = patch_tensor_and_index

    # Triton 3.9 takes no other, and makes int32 of two comparisons that are joined by `&`
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = with_boolean_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_boolean_mask(builder.create_masked_store, 2)
    interpreter._convert_float = round_to_nearest
    builder.create_dot = create_dot
    np.seterr(all="ignore")  # a kernel may overflow to inf where a GPU would, without a warning
