"""Our operators as ONNX functions of standard operators and onnxruntime's own: what runs where no native kernel does.

A model carries these bodies, and onnxruntime puts one in the place of each node that no registered kernel takes. All
that depends on constants alone is computed once, when the session is made (at any graph optimisation level but "disable
all"): the tiles become the row-major codes of MatMulNBits and GatherBlockQuantized, and of the branch on minima only
one side stays. So a linear operator runs as two or three nodes and no weight is ever unpacked to floats.

Differences from the native kernels: minima multiply the sums of the activations before their rounding to 8 bits;
attention reads queries and gives its output in float16; what the cache holds past the last token is undefined.
"""

from __future__ import annotations

import onnx
from onnx import parser

from edgekit.kernels.opset import DOMAIN, OPS

# In all bodies: numbers as vectors of one element, for shapes.
_NUMBERS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
"""

# From codes, scales, zeros, minima to B (N, blocks, bytes), S (N, blocks), Z (N, bytes) and M (N, blocks), where Z has
# its numbers packed as B has. The tiles of PARTS matrices of N / PARTS rows take turns.
_MATRIX = """
  two = Constant <value_ints = [2]> ()
  four = Constant <value_ints = [4]> ()
  eight = Constant <value_ints = [8]> ()
  sixteen = Constant <value_ints = [16]> ()
  group = Constant <value_ints = [32]> ()
  parts = Constant <value_ints = [PARTS]> ()
  N_number = Constant <value_int: int = @N> ()
  K_number = Constant <value_int: int = @K> ()
  bits_number = Constant <value_int: int = @bits> ()
  block_number = Constant <value_int: int = @block> ()
  N = Unsqueeze (N_number, zero)
  K = Unsqueeze (K_number, zero)
  bits = Unsqueeze (bits_number, zero)
  block = Unsqueeze (block_number, zero)
  part_rows = Div (N, parts)
  entries = Shape (scales)
  blocks = Shape <start = 1, end = 2> (scales)
  codes_a_byte = Div (eight, bits)
  bytes = Div (block, codes_a_byte)
  last_code = Sub (codes_a_byte, one)

  block_groups = Div (block, group)
  groups = Mul (blocks, block_groups)
  pairs = Div (four, codes_a_byte)
  tiled_shape = Concat <axis = 0> (rest, parts, groups, one, bits, sixteen, pairs, codes_a_byte)
  tiled = Reshape (codes, tiled_shape)
  first_seven = Gather <axis = 7> (tiled, zero)
  last_seven = Gather <axis = 7> (tiled, last_code)
  first = Squeeze (first_seven, rest)
  last = Squeeze (last_seven, rest)
  start = Constant <value_int = 0> ()
  end = Constant <value_int = 8> ()
  shifts_number = Range (start, end, bits_number)
  shifts_byte = Cast <to = 2> (shifts_number)
  shifts_axes = Constant <value_ints = [1, 2, 3]> ()
  shifts = Unsqueeze (shifts_byte, shifts_axes)
  power = Pow (two, bits)
  mask_number = Sub (power, one)
  mask = Cast <to = 2> (mask_number)
  up_number = Sub (eight, bits)
  up = Cast <to = 2> (up_number)
  first_code = BitShift <direction = "RIGHT"> (first, shifts)
  low = BitwiseAnd (first_code, mask)
  second_code = BitShift <direction = "RIGHT"> (last, shifts)
  high = BitShift <direction = "LEFT"> (second_code, up)
  packed = BitwiseOr (low, high)
  turned = Transpose <perm = [1, 0, 5, 2, 3, 4, 6]> (packed)
  padded_shape = Concat <axis = 0> (parts, rest, blocks, bytes)
  padded = Reshape (turned, padded_shape)
  cut = Slice (padded, zero, part_rows, one)
  B_shape = Concat <axis = 0> (N, blocks, bytes)
  B = Reshape (cut, B_shape)

  lanes_shape = Concat <axis = 0> (rest, parts, blocks, sixteen)
  lane_rows_shape = Concat <axis = 0> (parts, rest, blocks)
  rows_shape = Concat <axis = 0> (N, blocks)
"""

# From NAME, an entry for each block, to NAME_rows (N, blocks).
_ROWS = """
  NAME_all = Expand (NAME, entries)
  NAME_lanes = Reshape (NAME_all, lanes_shape)
  NAME_turned = Transpose <perm = [1, 0, 3, 2]> (NAME_lanes)
  NAME_padded = Reshape (NAME_turned, lane_rows_shape)
  NAME_cut = Slice (NAME_padded, zero, part_rows, one)
  NAME_rows = Reshape (NAME_cut, rows_shape)
"""

_ENTRIES = """
  S = Cast <to = 1> (scales_rows)
  M = Cast <to = 1> (minima_rows)
  minus_blocks = Neg (blocks)
  missing_zeros = Mod (minus_blocks, codes_a_byte)
  zeros_pads = Concat <axis = 0> (zero, zero, zero, missing_zeros)
  zeros_whole = Pad (zeros_rows, zeros_pads)
  zeros_shape = Concat <axis = 0> (N, rest, codes_a_byte)
  zeros_pairs = Reshape (zeros_whole, zeros_shape)
  zeros_first = Gather <axis = 2> (zeros_pairs, zero)
  zeros_last = Gather <axis = 2> (zeros_pairs, last_code)
  zeros_high = BitShift <direction = "LEFT"> (zeros_last, up)
  zeros_packed = BitwiseOr (zeros_first, zeros_high)
  Z = Squeeze (zeros_packed, rest)
"""

# product = n W^T.
_PRODUCT = """
  rounded = com.microsoft.MatMulNBits <
    N: int = @N, K: int = @K, bits: int = @bits, block_size: int = @block, accuracy_level = LEVEL
  > (n, B, S, Z)
  minima_shape = Shape (minima)
  minima_count = ReduceProd (minima_shape)
  has_minima = Greater (minima_count, one)
  product = If (has_minima) <
    then_branch = with_minima () => (float with) {
      width = Mul (blocks, block)
      missing = Sub (width, K)
      pads = Concat <axis = 0> (zero, missing)
      whole = Pad (n, pads, , rest)
      leading = Shape <end = -1> (n)
      blocks_shape = Concat <axis = 0> (leading, blocks, block)
      in_blocks = Reshape (whole, blocks_shape)
      sums = ReduceSum <keepdims = 0> (in_blocks, rest)
      columns = Transpose <perm = [1, 0]> (M)
      share = MatMul (sums, columns)
      with = Add (rounded, share)
    },
    else_branch = without_minima () => (float without) { without = Identity (rounded) }
  >
"""

# NORMED = RMSNorm(X) * WEIGHT over the last axis, in the form that onnxruntime fuses to one node; its own operator
# SimplifiedLayerNormalization inside a function crashes it (1.32).
_NORM = """
  X_power = Constant <value_float = 2.0> ()
  X_epsilon = Constant <value_float: float = @epsilon> ()
  X_squares = Pow (X, X_power)
  X_mean = ReduceMean (X_squares, rest)
  X_shifted = Add (X_mean, X_epsilon)
  X_length = Sqrt (X_shifted)
  X_unit = Div (X, X_length)
  NORMED = Mul (X_unit, WEIGHT)
"""

# y = silu(gate) * up, the two halves of the product.
_GATE = """
  gate, other = Split <axis = -1, num_outputs = 2> (product)
  active = com.microsoft.QuickGelu <alpha = 1.0> (gate)
  y = Mul (active, other)
"""

# GatherBlockQuantized takes the middle code for zero (it refuses zero points of unknown shape, as all are in a function):
# the difference to the true one is added with the minima.
_EMBEDDING = """
  table_shape = Concat <axis = 0> (N, rest)
  table = Reshape (B, table_shape)
  values = com.microsoft.GatherBlockQuantized <
    gather_axis = 0, quantize_axis = 1, bits: int = @bits, block_size: int = @block
  > (table, ids, S)
  top_bit = Sub (bits, one)
  middle = Pow (two, top_bit)
  middle_float = Cast <to = 1> (middle)
  zeros_float = Cast <to = 1> (zeros_rows)
  above_zero = Sub (middle_float, zeros_float)
  shift = Mul (S, above_zero)
  offsets = Add (shift, M)
  leading = Shape (ids)
  blocks_shape = Concat <axis = 0> (leading, blocks, block)
  in_blocks = Reshape (values, blocks_shape)
  offset = Gather (offsets, ids)
  offset_columns = Unsqueeze (offset, rest)
  shifted = Add (in_blocks, offset_columns)
  flat_shape = Concat <axis = 0> (leading, rest)
  flat = Reshape (shifted, flat_shape)
  y = Slice (flat, zero, K, rest)
"""

# q_and_k and v, the heads of qkv.
_HEADS = """
  num_heads = Constant <value_int: int = @num_heads> ()
  kv_num_heads = Constant <value_int: int = @kv_num_heads> ()
  head_dim = Constant <value_int: int = @head_dim> ()
  q_size = Mul (num_heads, head_dim)
  kv_size = Mul (kv_num_heads, head_dim)
  q_width = Unsqueeze (q_size, zero)
  kv_width = Unsqueeze (kv_size, zero)
"""

_PLAIN_HEADS = """
  turned_width = Add (q_width, kv_width)
  widths = Concat <axis = 0> (turned_width, kv_width)
  q_and_k, v = Split <axis = 2> (qkv, widths)
"""

_NORMED_HEADS = """
  widths = Concat <axis = 0> (q_width, kv_width, kv_width)
  q, k, v = Split <axis = 2> (qkv, widths)
  width = Unsqueeze (head_dim, zero)
  heads_shape = Concat <axis = 0> (zero, zero, rest, width)
  flat_shape = Constant <value_ints = [0, 0, -1]> ()
  q_heads = Reshape (q, heads_shape)
  k_heads = Reshape (k, heads_shape)
  Q_NORM
  K_NORM
  q_flat = Reshape (q_normed, flat_shape)
  k_flat = Reshape (k_normed, flat_shape)
  q_and_k = Concat <axis = 2> (q_flat, k_flat)
"""

# The rotation is in float32, so that the cache holds the very bits that the native kernel writes.
_ATTENTION = """
  next = Constant <value = int32[1] {1}> ()
  total = Add (last, next)
  total_number = Cast <to = 7> (total)
  tokens = Shape <start = 1, end = 2> (qkv)
  position = Sub (total_number, tokens)
  rotated = com.microsoft.RotaryEmbedding (q_and_k, position, cos, sin)
  heads = Concat <axis = 2> (rotated, v)
  halves = Cast <to = 10> (heads)
  mixed, present_key, present_value = com.microsoft.GroupQueryAttention <
    num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, local_window_size: int = @local_window_size
  > (halves, , , past_key, past_value, last, total)
  y = Cast <to = 1> (mixed)
"""


def function_bodies(*, int8_activations: bool = True) -> list[onnx.FunctionProto]:
    """A function for each of our operators: to be a model's `functions`, beside an import of their domain.

    `int8_activations` lets the products round activations to 8 bits a block, as the native kernels do, and multiply in
    integers (accuracy level 4 of MatMulNBits) where the processor is good at it; without it they are in float32.
    """
    product = _PRODUCT.replace("LEVEL", "4" if int8_activations else "0")
    norm = _norm("x", "norm", "n")
    bodies = {
        "QuantLinear": _matrix(parts=1)
        + "n = Identity (x)"
        + product
        + "biased = Add (product, bias) y = Add (biased, residual)",
        "NormQuantLinear": _matrix(parts=1) + norm + product + "y = Add (product, bias)",
        "GatedNormQuantLinear": _matrix(parts=2) + norm + product + _GATE,
        "QuantEmbedding": _matrix(parts=1) + _EMBEDDING,
        "Attention": _HEADS + _PLAIN_HEADS + _ATTENTION,
        "NormAttention": _HEADS
        + _NORMED_HEADS.replace("Q_NORM", _norm("q_heads", "q_norm", "q_normed")).replace(
            "K_NORM", _norm("k_heads", "k_norm", "k_normed")
        )
        + _ATTENTION,
    }
    return [_function(name, body) for name, body in bodies.items()]


def _matrix(*, parts: int) -> str:
    rows = "".join(_ROWS.replace("NAME", name) for name in ("scales", "zeros", "minima"))
    return _MATRIX.replace("PARTS", str(parts)) + rows + _ENTRIES


def _norm(x: str, weight: str, normed: str) -> str:
    return _NORM.replace("NORMED", normed).replace("WEIGHT", weight).replace("X", x)


def _function(name: str, body: str) -> onnx.FunctionProto:
    op = OPS[name]
    function = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": 21, "com.microsoft": 1]>\n'
        f"{name} <{', '.join(op.attributes)}> ({', '.join(op.inputs)}) => ({', '.join(op.outputs)}) {{{_NUMBERS}{body}}}"
    )
    for node in function.node:
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            branch.output[0].type.tensor_type.ClearField("shape")  # the text can only say "scalar", and x has any rank
    return function
