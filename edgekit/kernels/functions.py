"""Our operators as ONNX functions of standard operators and onnxruntime's own: what runs where no native kernel does.

A model carries these bodies, and onnxruntime puts one in the place of each node that no registered kernel takes. What
depends on constants alone is computed once, when the session is made (at every graph optimisation level but "disable
all"): tiles become the row-major codes of MatMulNBits, and of the branch on minima one side stays. So a product runs as
one to three nodes, and no weight is ever unpacked to floats. While it is made, a session takes some 6 bytes a weight of
4 bits and 12 of 8.

Where a body differs from the native kernel: activations have 8 bits however few rows they are, and beside minima only
what is measured from the middle code meets rounded activations; attention multiplies in float16 and leaves the cache
past the last token undefined; a negative id is not refused.
"""

from __future__ import annotations

import onnx
from onnx import parser

from edgekit.kernels.opset import DOMAIN, OPS

# The bodies' text is put together from the parts below. N and K are those of the table; B, S and Z are what
# MatMulNBits takes; other capitals are replaced.

_NUMBERS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
"""

# The attributes of a matrix as vectors of one number, as shapes want them, and what follows from them. A matrix is made
# of PARTS matrices whose tiles take turns.
_SHAPES = """
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
  last_code = Sub (codes_a_byte, one)
  up_bits = Sub (eight, bits)
  up = Cast <to = 2> (up_bits)
"""

# What takes a byte apart into codes.
_BYTES = """
  start = Constant <value_int = 0> ()
  end = Constant <value_int = 8> ()
  shifts_int = Range (start, end, bits_number)
  shifts_byte = Cast <to = 2> (shifts_int)
  values = Pow (two, bits)
  mask_int = Sub (values, one)
  mask = Cast <to = 2> (mask_int)
  block_groups = Div (block, group)
  groups = Mul (blocks, block_groups)
"""

# B (N, blocks, bytes): each row's codes in order, low bits first. In the tiles, the codes that share a byte are half a
# group of columns apart: they are taken from neighbouring columns instead, one for each half.
_CODES = """
  shift_axes = Constant <value_ints = [1, 2, 3]> ()
  shifts = Unsqueeze (shifts_byte, shift_axes)
  pairs = Div (four, codes_a_byte)
  runs_shape = Concat <axis = 0> (rest, parts, groups, one, bits, sixteen, pairs, codes_a_byte)
  runs = Reshape (codes, runs_shape)
  first_byte = Gather <axis = 7> (runs, start)
  last_number = Squeeze (last_code)
  last_byte = Gather <axis = 7> (runs, last_number)
  first_shifted = BitShift <direction = "RIGHT"> (first_byte, shifts)
  last_shifted = BitShift <direction = "RIGHT"> (last_byte, shifts)
  low = BitwiseAnd (first_shifted, mask)
  high = BitShift <direction = "LEFT"> (last_shifted, up)
  packed = BitwiseOr (low, high)

  turned = Transpose <perm = [1, 0, 5, 2, 3, 4, 6]> (packed)
  bytes = Div (block, codes_a_byte)
  whole_shape = Concat <axis = 0> (parts, rest, blocks, bytes)
  whole = Reshape (turned, whole_shape)
  cut = Slice (whole, zero, part_rows, one)
  B_shape = Concat <axis = 0> (N, blocks, bytes)
  B = Reshape (cut, B_shape)
"""

# NAME_rows (N, blocks) from NAME, which has an entry for each row and block of the tiles, or one for all.
_ROWS = """
  NAME_all = Expand (NAME, entries)
  NAME_lanes_shape = Concat <axis = 0> (rest, parts, blocks, sixteen)
  NAME_lanes = Reshape (NAME_all, NAME_lanes_shape)
  NAME_turned = Transpose <perm = [1, 0, 3, 2]> (NAME_lanes)
  NAME_whole_shape = Concat <axis = 0> (parts, rest, blocks)
  NAME_whole = Reshape (NAME_turned, NAME_whole_shape)
  NAME_cut = Slice (NAME_whole, zero, part_rows, one)
  NAME_rows_shape = Concat <axis = 0> (N, blocks)
  NAME_rows = Reshape (NAME_cut, NAME_rows_shape)
"""

_FLOATS = """
  S = Cast <to = 1> (scales_rows)
  zeros_float = Cast <to = 1> (zeros_rows)
  minima_float = Cast <to = 1> (minima_rows)
"""

# offsets (N, blocks): the values are S * (code - middle) + offsets, the middle being 2^(bits-1).
_OFFSETS = """
  middle_int = Div (values, two)
  middle = Cast <to = 1> (middle_int)
  steps = Sub (middle, zeros_float)
  way = Mul (S, steps)
  offsets = Add (way, minima_float)
"""

# Z (N, bytes): zero points packed as the codes are.
_ZEROS = """
  minus_blocks = Neg (blocks)
  missing_zeros = Mod (minus_blocks, codes_a_byte)
  zeros_pads = Concat <axis = 0> (zero, zero, zero, missing_zeros)
  zeros_padded = Pad (zeros_rows, zeros_pads)
  zeros_shape = Concat <axis = 0> (N, rest, codes_a_byte)
  zeros_pairs = Reshape (zeros_padded, zeros_shape)
  zeros_first = Gather <axis = 2> (zeros_pairs, zero)
  zeros_last = Gather <axis = 2> (zeros_pairs, last_code)
  zeros_high = BitShift <direction = "LEFT"> (zeros_last, up)
  zeros_packed = BitwiseOr (zeros_first, zeros_high)
  Z = Squeeze (zeros_packed, rest)
"""

# NORMED = RMSNorm(X) * WEIGHT. onnxruntime fuses this to one node; its own SimplifiedLayerNormalization would crash it
# inside a function (1.32).
_NORM = """
  X_exponent = Constant <value_float = 2.0> ()
  X_epsilon = Constant <value_float: float = @epsilon> ()
  X_squares = Pow (X, X_exponent)
  X_mean = ReduceMean (X_squares, rest)
  X_above_zero = Add (X_mean, X_epsilon)
  X_length = Sqrt (X_above_zero)
  X_unit = Div (X, X_length)
  NORMED = Mul (X_unit, WEIGHT)
"""

# product = n W^T. Without zero points MatMulNBits takes the middle code for zero, and the offsets from there multiply
# the blocks' sums. (Size would do for minima_count, but has no float16 kernel and is not folded.)
_PRODUCT = """
  minima_shape = Shape (minima)
  minima_count = ReduceProd (minima_shape)
  has_minima = Greater (minima_count, one)
  product = If (has_minima) <
    then_branch = with_minima () => (float with) {
      from_middle = com.microsoft.MatMulNBits <
        N: int = @N, K: int = @K, bits: int = @bits, block_size: int = @block, accuracy_level = LEVEL
      > (n, B, S)
      width = Mul (blocks, block)
      missing = Sub (width, K)
      pads = Concat <axis = 0> (zero, missing)
      padded = Pad (n, pads, , rest)
      leading = Shape <end = -1> (n)
      blocks_shape = Concat <axis = 0> (leading, blocks, block)
      in_blocks = Reshape (padded, blocks_shape)
      sums = ReduceSum <keepdims = 0> (in_blocks, rest)
      columns = Transpose <perm = [1, 0]> (offsets)
      share = MatMul (sums, columns)
      with = Add (from_middle, share)
    },
    else_branch = without_minima () => (float without) {
      without = com.microsoft.MatMulNBits <
        N: int = @N, K: int = @K, bits: int = @bits, block_size: int = @block, accuracy_level = LEVEL
      > (n, B, S, Z)
    }
  >
"""

_GATE = """
  gate, other = Split <axis = -1, num_outputs = 2> (product)
  active = com.microsoft.QuickGelu <alpha = 1.0> (gate)
  y = Mul (active, other)
"""

# The ids' tiles are picked before they are taken apart, so that the table is not copied.
_EMBEDDING = """
  ids_flat = Reshape (ids, rest)
  tile = Div (ids_flat, sixteen)
  lane_number = Mod (ids_flat, sixteen)
  lane = Unsqueeze (lane_number, rest)
  picked = Gather (codes, tile)
  runs_shape = Concat <axis = 0> (rest, groups, bits, sixteen, four)
  runs = Reshape (picked, runs_shape)
  lanes_first = Transpose <perm = [0, 3, 1, 2, 4]> (runs)
  row = GatherND <batch_dims = 1> (lanes_first, lane)
  half_axis = Constant <value_ints = [2]> ()
  row_halves = Unsqueeze (row, half_axis)
  shift_axes = Constant <value_ints = [1, 2]> ()
  shifts = Unsqueeze (shifts_byte, shift_axes)
  shifted = BitShift <direction = "RIGHT"> (row_halves, shifts)
  row_codes = BitwiseAnd (shifted, mask)
  blocks_shape = Concat <axis = 0> (rest, blocks, block)
  in_blocks = Reshape (row_codes, blocks_shape)
  row_values = Cast <to = 1> (in_blocks)
  row_zeros = Gather (zeros_float, ids_flat)
  row_scales = Gather (S, ids_flat)
  row_minima = Gather (minima_float, ids_flat)
  zero_column = Unsqueeze (row_zeros, rest)
  scale_column = Unsqueeze (row_scales, rest)
  minimum_column = Unsqueeze (row_minima, rest)
  from_zero = Sub (row_values, zero_column)
  scaled = Mul (from_zero, scale_column)
  shifted_up = Add (scaled, minimum_column)
  width = Mul (blocks, block)
  padded_shape = Concat <axis = 0> (rest, width)
  padded = Reshape (shifted_up, padded_shape)
  flat = Slice (padded, zero, K, one)
  ids_shape = Shape (ids)
  y_shape = Concat <axis = 0> (ids_shape, K)
  y = Reshape (flat, y_shape)
"""

_HEADS = """
  num_heads = Constant <value_int: int = @num_heads> ()
  kv_num_heads = Constant <value_int: int = @kv_num_heads> ()
  head_dim = Constant <value_int: int = @head_dim> ()
  width = Unsqueeze (head_dim, zero)
  q_width = Mul (num_heads, width)
  kv_width = Mul (kv_num_heads, width)
"""

_PLAIN_HEADS = """
  qk_width = Add (q_width, kv_width)
  widths = Concat <axis = 0> (qk_width, kv_width)
  qk, v = Split <axis = 2> (qkv, widths)
"""

_SPLIT_HEADS = """
  widths = Concat <axis = 0> (q_width, kv_width, kv_width)
  q, k, v = Split <axis = 2> (qkv, widths)
  heads_shape = Concat <axis = 0> (zero, zero, rest, width)
  q_heads = Reshape (q, heads_shape)
  k_heads = Reshape (k, heads_shape)
"""

_JOINED_HEADS = """
  flat_shape = Constant <value_ints = [0, 0, -1]> ()
  q_flat = Reshape (q_normed, flat_shape)
  k_flat = Reshape (k_normed, flat_shape)
  qk = Concat <axis = 2> (q_flat, k_flat)
"""

# Turned in float32 and then rounded, keys get the very bits that the native kernel writes: a cache fits both.
_ATTENTION = """
  next = Constant <value = int32[1] {1}> ()
  total = Add (last, next)
  total_long = Cast <to = 7> (total)
  tokens = Shape <start = 1, end = 2> (qkv)
  position = Sub (total_long, tokens)
  turned = com.microsoft.RotaryEmbedding (qk, position, cos, sin)
  joined = Concat <axis = 2> (turned, v)
  halves = Cast <to = 10> (joined)
  mixed, present_key, present_value = com.microsoft.GroupQueryAttention <
    num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, local_window_size: int = @local_window_size
  > (halves, , , past_key, past_value, last, total)
  y = Cast <to = 1> (mixed)
"""


def function_bodies(*, int8_activations: bool = True) -> list[onnx.FunctionProto]:
    """A function for each operator of the table: to be a model's `functions`, beside an import of their domain.

    With `int8_activations` products round activations to 8 bits a block and multiply in integers, as the native kernels
    do with many rows, where the processor has instructions for it (accuracy level 4 of MatMulNBits); else they are in
    float32, several times slower.
    """
    linear, gated = (_matrix(parts=parts) + _CODES + _ZEROS + _OFFSETS for parts in (1, 2))
    norm = _norm("x", "norm", "n")
    head_norms = _norm("q_heads", "q_norm", "q_normed") + _norm("k_heads", "k_norm", "k_normed")
    product = _PRODUCT.replace("LEVEL", "4" if int8_activations else "0")
    biased = "biased = Add (product, bias) y = Add (biased, residual)"
    bodies = {
        "QuantLinear": linear + "n = Identity (x)" + product + biased,
        "NormQuantLinear": linear + norm + product + "y = Add (product, bias)",
        "GatedNormQuantLinear": gated + norm + product + _GATE,
        "QuantEmbedding": _matrix(parts=1) + _EMBEDDING,
        "Attention": _HEADS + _PLAIN_HEADS + _ATTENTION,
        "NormAttention": _HEADS + _SPLIT_HEADS + head_norms + _JOINED_HEADS + _ATTENTION,
    }
    return [_function(name, body) for name, body in bodies.items()]


def _matrix(*, parts: int) -> str:
    rows = "".join(_ROWS.replace("NAME", name) for name in ("scales", "zeros", "minima"))
    return _SHAPES.replace("PARTS", str(parts)) + _BYTES + rows + _FLOATS


def _norm(x: str, weight: str, normed: str) -> str:
    return _NORM.replace("NORMED", normed).replace("WEIGHT", weight).replace("X", x)


def _function(name: str, body: str) -> onnx.FunctionProto:
    op = OPS[name]
    attributes, inputs, outputs = (", ".join(names) for names in (op.attributes, op.inputs, op.outputs))
    function = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": 21, "com.microsoft": 1]>\n'
        f"{name} <{attributes}> ({inputs}) => ({outputs}) {{{_NUMBERS}{body}}}"
    )
    for node in function.node:
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            branch.output[0].type.tensor_type.ClearField("shape")  # the text can only say "scalar", but x has any rank
    return function
