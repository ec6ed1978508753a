"""Our operators as ONNX functions of standard operators and onnxruntime's own: what runs where no native kernel does.

A model carries these bodies, and onnxruntime puts one in the place of each node that no registered kernel takes. What
depends on constants alone is computed once, when the session is made (at every graph optimisation level but "disable
all"): tiles become the row-major codes of MatMulNBits, in 4 bits up to 4 and else in 8, 8-bit scales become floats, and
of the branches on bits and minima one stays. So a product runs as one to three nodes, and no weight is ever unpacked to
floats. While it is made, a session takes some 10 bytes a weight.

Where a body differs from the native kernel: activations have 8 bits however few rows they are, and beside minima only
what is measured from the middle code meets rounded activations; attention multiplies in float16 and leaves the cache
past the last token undefined; a negative id is not refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import AttributeProto, helper, parser

from edgekit.kernels.attention_functions import attention_bodies
from edgekit.kernels.opset import DOMAIN, OPS, layer_attributes, layer_inputs, layer_parts

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
"""

# What takes bytes apart into codes. Run k of a group has the low bits of its codes in line k mod F of the plane of F
# bits, shifted by F (k / F), and the rest in the plane after it; without such a plane its mask is 0.
_BYTES = """
  start = Constant <value_int = 0> ()
  run_end = Constant <value_int = 8> ()
  run_step = Constant <value_int = 1> ()
  run_numbers = Range (start, run_end, run_step)
  is_small = LessOrEqual (bits, four)
  is_smallest = Less (bits, four)
  not_largest = Less (bits, eight)
  four_or_eight = Where (not_largest, four, eight)
  low_bits = Where (is_smallest, two, four_or_eight)
  high_bits = Sub (bits, low_bits)
  high_width = Max (high_bits, one)
  last_line = Sub (bits, one)
  low_line = Mod (run_numbers, low_bits)
  low_turn = Div (run_numbers, low_bits)
  low_shift = Mul (low_turn, low_bits)
  high_mod = Mod (run_numbers, high_width)
  high_after = Add (high_mod, low_bits)
  high_line = Min (high_after, last_line)
  high_turn = Div (run_numbers, high_width)
  high_shift = Mul (high_turn, high_width)
  run_axes = Constant <value_ints = [1, 2]> ()
  low_shift_bytes = Cast <to = 2> (low_shift)
  high_shift_bytes = Cast <to = 2> (high_shift)
  low_shifts = Unsqueeze (low_shift_bytes, run_axes)
  high_shifts = Unsqueeze (high_shift_bytes, run_axes)
  low_values = Pow (two, low_bits)
  high_values = Pow (two, high_bits)
  low_mask_int = Sub (low_values, one)
  high_mask_int = Sub (high_values, one)
  low_mask = Cast <to = 2> (low_mask_int)
  high_mask = Cast <to = 2> (high_mask_int)
  high_up = Cast <to = 2> (low_bits)
  values = Pow (two, bits)
  whole_columns = Mul (blocks, block)
  groups = Div (whole_columns, group)
"""

# OUT (..., 8 runs, A, 4) from IN (..., lines, A, 4), whose lines are on axis AXIS.
_UNPACKED = """
  low_lines = Gather <axis = AXIS> (IN, low_line)
  low_moved = BitShift <direction = "RIGHT"> (low_lines, low_shifts)
  low_codes = BitwiseAnd (low_moved, low_mask)
  high_lines = Gather <axis = AXIS> (IN, high_line)
  high_moved = BitShift <direction = "RIGHT"> (high_lines, high_shifts)
  high_codes = BitwiseAnd (high_moved, high_mask)
  high_in_place = BitShift <direction = "LEFT"> (high_codes, high_up)
  OUT = BitwiseOr (low_codes, high_in_place)
"""

# C (N, blocks, block): each row's codes in order, a byte each.
_CODES = """
  lines_shape = Concat <axis = 0> (rest, parts, groups, bits, sixteen, four)
  lines = Reshape (codes, lines_shape)
UNPACKED
  turned = Transpose <perm = [1, 0, 4, 2, 3, 5]> (runs)
  whole_shape = Concat <axis = 0> (parts, rest, blocks, block)
  whole = Reshape (turned, whole_shape)
  cut = Slice (whole, zero, part_rows, one)
  C_shape = Concat <axis = 0> (N, blocks, block)
  C = Reshape (cut, C_shape)
""".replace("UNPACKED", _UNPACKED.replace("OUT", "runs").replace("IN", "lines").replace("AXIS", "3"))

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

# Scales and minima as floats, whatever their type: steps are one where they are float16, and the last is the minima's.
_STEPPED = """
  steps_float = Cast <to = 1> (steps)
  scale_steps = Slice (steps_float, zero, one, one)
  minimum_steps = Slice (steps_float, rest, two, one)
  scales_cast = Cast <to = 1> (scales)
  scales_float = Mul (scales_cast, scale_steps)
  minima_cast = Cast <to = 1> (minima)
  minima_float = Mul (minima_cast, minimum_steps)
"""

_FLOATS = """
  S = Identity (scales_float_rows)
  zeros_float = Cast <to = 1> (zeros_rows)
"""

# offsets (N, blocks): beside minima the values are S * (code - middle) + offsets, so that codes are small where they
# meet rounded activations. zero_points (N, blocks): what codes are measured from. (Size would do for minima_count, but
# has no float16 kernel and is not folded.)
_OFFSETS = """
  minima_shape = Shape (minima)
  minima_count = ReduceProd (minima_shape)
  has_minima = Greater (minima_count, one)
  middle_values = Div (values, two)
  middle_byte = Cast <to = 2> (middle_values)
  zero_points = Where (has_minima, middle_byte, zeros_rows)
  middle = Cast <to = 1> (middle_values)
  way = Mul (S, middle)
  offsets = Add (way, minima_float_rows)
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

# Two codes to a byte.
_HALVES = """
      NAME_pairs_shape = Concat <axis = 0> (N, BLOCKS, rest, two)
      NAME_pairs = Reshape (FROM, NAME_pairs_shape)
      NAME_first = Gather <axis = 3> (NAME_pairs, start)
      NAME_second = Gather <axis = 3> (NAME_pairs, run_step)
      NAME_up = BitShift <direction = "LEFT"> (NAME_second, small_shift)
      NAME = BitwiseOr (NAME_first, NAME_up)
"""

# product = n W^T. MatMulNBits takes the codes less their zero points; beside minima, the offsets from there multiply
# the blocks' sums.
_PRODUCT = (
    """
  from_zero = If (is_small) <
    then_branch = in_four () => (float small_product) {
      small_shift_int = Squeeze (four)
      small_shift = Cast <to = 2> (small_shift_int)
"""
    + _HALVES.replace("NAME", "small_B").replace("FROM", "C").replace("BLOCKS", "blocks")
    + """
      minus_blocks = Neg (blocks)
      missing_zeros = Mod (minus_blocks, two)
      zeros_pads = Concat <axis = 0> (zero, zero, zero, missing_zeros)
      zeros_padded = Pad (zero_points, zeros_pads)
"""
    + _HALVES.replace("NAME", "small_pairs").replace("FROM", "zeros_padded").replace("BLOCKS", "one")
    + """
      small_Z = Squeeze (small_pairs, one)
      small_product = com.microsoft.MatMulNBits <
        N: int = @N, K: int = @K, bits = 4, block_size: int = @block, accuracy_level = LEVEL
      > (n, small_B, S, small_Z)
    },
    else_branch = in_eight () => (float large_product) {
      large_product = com.microsoft.MatMulNBits <
        N: int = @N, K: int = @K, bits = 8, block_size: int = @block, accuracy_level = LEVEL
      > (n, C, S, zero_points)
    }
  >
  product = If (has_minima) <
    then_branch = with_minima () => (float with) {
      width = Mul (blocks, block)
      missing = Sub (width, K)
      pads = Concat <axis = 0> (zero, missing)
      padded = Pad (n, pads, , rest)
      leading = Shape <end = -1> (n)
      sums_shape = Concat <axis = 0> (leading, blocks, block)
      in_blocks = Reshape (padded, sums_shape)
      sums = ReduceSum <keepdims = 0> (in_blocks, rest)
      columns = Transpose <perm = [1, 0]> (offsets)
      share = MatMul (sums, columns)
      with = Add (from_zero, share)
    },
    else_branch = without_minima () => (float without) {
      without = Identity (from_zero)
    }
  >
"""
)

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
  lines_shape = Concat <axis = 0> (rest, groups, bits, sixteen, four)
  lines = Reshape (picked, lines_shape)
  lanes_first = Transpose <perm = [0, 3, 1, 2, 4]> (lines)
  picked_row = GatherND <batch_dims = 1> (lanes_first, lane)
  lane_axis = Constant <value_ints = [3]> ()
  row = Unsqueeze (picked_row, lane_axis)
UNPACKED
  blocks_shape = Concat <axis = 0> (rest, blocks, block)
  in_blocks = Reshape (row_codes, blocks_shape)
  row_values = Cast <to = 1> (in_blocks)
  row_zeros = Gather (zeros_float, ids_flat)
  row_scales = Gather (S, ids_flat)
  row_minima = Gather (minima_float_rows, ids_flat)
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
""".replace("UNPACKED", _UNPACKED.replace("OUT", "row_codes").replace("IN", "row").replace("AXIS", "2"))


def function_bodies(*, int8_activations: bool = True) -> list[onnx.FunctionProto]:
    """A function for each operator of the table: to be a model's `functions`, beside an import of their domain.

    With `int8_activations` products round activations to 8 bits a block and multiply in integers, as the native kernels
    do with many rows, where the processor has instructions for it (accuracy level 4 of MatMulNBits); else they are in
    float32, several times slower.
    """
    linear, gated = (_matrix(parts=parts) + _CODES + _OFFSETS for parts in (1, 2))
    norm = _norm("x", "norm", "n")
    product = _PRODUCT.replace("LEVEL", "4" if int8_activations else "0")
    biased = "biased = Add (product, bias) y = Add (biased, residual)"
    bodies = {
        "QuantLinear": linear + "n = Identity (x)" + product + biased,
        "NormQuantLinear": linear + norm + product + "y = Add (product, bias)",
        "GatedNormQuantLinear": gated + norm + product + _GATE,
        "QuantEmbedding": _matrix(parts=1) + _EMBEDDING,
        **attention_bodies(_norm("q_heads", "q_norm", "q_normed") + _norm("k_heads", "k_norm", "k_normed")),
    }
    layers = [_layer(name) for name in bodies if "Attention" in name]
    return [*(_function(name, body) for name, body in bodies.items()), *layers]


def _layer(attention: str) -> onnx.FunctionProto:
    """A layer, of functions of the operators that it is made of."""
    op = OPS[f"{attention}Layer"]
    fed = {"qkv_": ["x"], "": ["qkv_y"], "out_": ["mixed"], "gate_": ["state"], "down_": ["gated"]}
    made = {"qkv_": ["qkv_y"], "": ["mixed", *op.outputs[1:]], "out_": ["state"], "gate_": ["gated"], "down_": ["y"]}
    residuals = {"out_": "x", "down_": "state"}
    nodes = []
    for prefix, part in layer_parts(attention).items():
        given = iter(layer_inputs(prefix, part))
        passed = iter(fed[prefix])
        inputs = [
            residuals[prefix] if name == "residual" else next(passed) if name in ("x", "qkv") else next(given)
            for name in part.inputs
        ]
        node = helper.make_node(part.name, inputs, made[prefix], domain=DOMAIN)
        for name, outer in layer_attributes(prefix, part).items():
            kind = AttributeProto.FLOAT if name == "epsilon" else AttributeProto.INT
            node.attribute.append(AttributeProto(name=name, type=kind, ref_attr_name=outer))
        nodes.append(node)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]
    defaults = [helper.make_attribute(name, value) for name, value in op.defaults.items()]
    return helper.make_function(
        DOMAIN, op.name, op.inputs, op.outputs, nodes, opsets, attributes=op.attributes, attribute_protos=defaults
    )


def _matrix(*, parts: int) -> str:
    rows = "".join(_ROWS.replace("NAME", name) for name in ("scales_float", "zeros", "minima_float"))
    return _SHAPES.replace("PARTS", str(parts)) + _BYTES + _STEPPED + rows + _FLOATS


def _norm(x: str, weight: str, normed: str) -> str:
    return _NORM.replace("NORMED", normed).replace("WEIGHT", weight).replace("X", x)


def _function(name: str, body: str) -> onnx.FunctionProto:
    op = OPS[name]
    given = (*op.attributes, *(f"{name}: int = {value}" for name, value in op.defaults.items()))
    attributes, inputs, outputs = (", ".join(names) for names in (given, op.inputs, op.outputs))
    function = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": 21, "com.microsoft": 1]>\n'
        f"{name} <{attributes}> ({inputs}) => ({outputs}) {{{_NUMBERS}{body}}}"
    )
    _forget_shapes(function.node)
    return function


def _forget_shapes(nodes: Iterable[onnx.NodeProto]) -> None:
    """Of the outputs of branches: the text can only say "scalar", but x has any rank."""
    for node in nodes:
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            branch.output[0].type.tensor_type.ClearField("shape")
            _forget_shapes(branch.node)
