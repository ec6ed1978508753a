"""The attention operators as ONNX functions: `edgekit.kernels.functions` puts them together.

They are onnxruntime's GroupQueryAttention over a float16 cache; one in 8 or 4 bits is made float16 for each step, all
of it. Sparse attention is exact here.
"""

from __future__ import annotations

from edgekit.kernels.opset import OPS

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

# What all attention begins with. Turned in float32 and then rounded, keys get the very bits that the native kernel
# writes: a cache fits both.
_TURNED = """
  next = Constant <value = int32[1] {1}> ()
  total = Add (last, next)
  total_long = Cast <to = 7> (total)
  tokens = Shape <start = 1, end = 2> (qkv)
  position = Sub (total_long, tokens)
  turned = com.microsoft.RotaryEmbedding (qk, position, cos, sin)
"""

_GROUPED = """
  mixed, KEY, VALUE = com.microsoft.GroupQueryAttention <
    num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, local_window_size: int = @local_window_size
  > (halves, , , PAST_KEY, PAST_VALUE, last, total)
  y = Cast <to = 1> (mixed)
"""

_ATTENTION = (
    (
        _TURNED
        + """
  joined = Concat <axis = 2> (turned, v)
  halves = Cast <to = 10> (joined)
"""
        + _GROUPED.replace("PAST_KEY", "past_key").replace("PAST_VALUE", "past_value")
    )
    .replace("KEY", "present_key")
    .replace("VALUE", "present_value")
)

# The new rows are rounded and written into the cache, which is made float16 for onnxruntime's operator: all of it, for
# every token. That operator writes the new rows once more, where they are. The bits of a cache say what stands
# for MOST, LEAST, STEP, TURN, WRITTEN, READ, OLD_ROWS and NEW_ROWS, of which none is a part of another.
_ATTENTION_WHOLE = (
    (
        _TURNED
        + """
  turned_widths = Concat <axis = 0> (q_width, kv_width)
  q_turned, k_turned = Split <axis = 2> (turned, turned_widths)
  new_flat = Concat <axis = 2> (k_turned, v)
  rows_shape = Concat <axis = 0> (zero, zero, rest, width)
  new_rows = Reshape (new_flat, rows_shape)
  plain_rows = Transpose <perm = [0, 2, 1, 3]> (new_rows)
  TURN
  most = Constant <value_float = MOST> ()
  least = Constant <value_float = LEAST> ()
  nothing = Constant <value_float = 0.0> ()
  sizes = Abs (rows)
  peaks = ReduceMax (sizes, rest)
  STEP
  step_halves = Cast <to = 10> (exact_steps)
  steps = Cast <to = 1> (step_halves)
  step_sizes = Abs (steps)
  has_step = Greater (step_sizes, nothing)
  inverse_steps = Reciprocal (steps)
  factors = Where (has_step, inverse_steps, nothing)
  scaled = Mul (rows, factors)
  whole = Round (scaled)
  clipped = Clip (whole, least, most)
  WRITTEN
  new_key, new_value = Split <axis = 1, num_outputs = 2> (codes)
  new_scales = Squeeze (step_halves, rest)
  first_place = Squeeze (position)
  end_place = Squeeze (total_long)
  one_place = Squeeze (one)
  places = Range (first_place, end_place, one_place)
  places_column = Unsqueeze (places, rest)
  key_shape = Shape (new_key)
  scales_shape = Shape (new_scales)
  row_places = Expand (places_column, key_shape)
  scale_places = Expand (places, scales_shape)
  present_key = ScatterElements <axis = 2> (past_key, row_places, new_key)
  present_value = ScatterElements <axis = 2> (past_value, row_places, new_value)
  present_scales = ScatterElements <axis = 2> (past_scales, scale_places, new_scales)
  all_codes = Concat <axis = 1> (present_key, present_value)
  code_floats = Cast <to = 1> (all_codes)
  READ
  all_scales = Cast <to = 1> (present_scales)
  scale_columns = Unsqueeze (all_scales, rest)
  kept_rows = Mul (all_whole, scale_columns)
  OLD_ROWS
  all_halves = Cast <to = 10> (all_rows)
  half_key, half_value = Split <axis = 1, num_outputs = 2> (all_halves)
  new_kept = Mul (clipped, steps)
  NEW_ROWS
  rounded_rows = Transpose <perm = [0, 2, 1, 3]> (rounded)
  flat_rows_shape = Constant <value_ints = [0, 0, -1]> ()
  rounded_flat = Reshape (rounded_rows, flat_rows_shape)
  joined = Concat <axis = 2> (q_turned, rounded_flat)
  halves = Cast <to = 10> (joined)
"""
        + _GROUPED.replace("PAST_KEY", "half_key").replace("PAST_VALUE", "half_value")
    )
    .replace("KEY", "kept_key")
    .replace("VALUE", "kept_value")
)

_INT8 = {
    "MOST": "127.0",
    "LEAST": "-127.0",
    "STEP": "exact_steps = Div (peaks, most)",
    "TURN": "rows = Identity (plain_rows)",
    "READ": "all_whole = Identity (code_floats)",
    "WRITTEN": "codes = Cast <to = 3> (clipped)",
    "NEW_ROWS": "rounded = Identity (new_kept)",
    "OLD_ROWS": "all_rows = Identity (kept_rows)",
}

# The Hadamard matrix has -1 where the places in a run share an odd number of bits: halving folds them into the last.
_INT4 = {
    "MOST": "7.0",
    "LEAST": "-8.0",
    "STEP": """
  highs = ReduceMax (rows, rest)
  is_high = Equal (highs, peaks)
  falling = Neg (peaks)
  largest = Where (is_high, falling, peaks)
  eighth = Constant <value_float = 8.0> ()
  exact_steps = Div (largest, eighth)
""",
    "TURN": """
  channel_start = Constant <value_int = 0> ()
  channel_step = Constant <value_int = 1> ()
  channels = Range (channel_start, head_dim, channel_step)
  against = Neg (head_dim)
  run = BitwiseAnd (head_dim, against)
  whole_runs = Div (channels, run)
  before = Mul (whole_runs, run)
  in_run = Sub (channels, before)
  run_rows = Unsqueeze (whole_runs, one)
  run_columns = Unsqueeze (whole_runs, zero)
  same_run = Equal (run_rows, run_columns)
  place_rows = Unsqueeze (in_run, one)
  place_columns = Unsqueeze (in_run, zero)
  shared = BitwiseAnd (place_rows, place_columns)
  by_256 = Constant <value_ints = [256]> ()
  by_16 = Constant <value_ints = [16]> ()
  by_4 = Constant <value_ints = [4]> ()
  by_2 = Constant <value_ints = [2]> ()
  high_8 = Div (shared, by_256)
  folded_8 = BitwiseXor (shared, high_8)
  high_4 = Div (folded_8, by_16)
  folded_4 = BitwiseXor (folded_8, high_4)
  high_2 = Div (folded_4, by_4)
  folded_2 = BitwiseXor (folded_4, high_2)
  high_1 = Div (folded_2, by_2)
  folded = BitwiseXor (folded_2, high_1)
  odd = BitwiseAnd (folded, one)
  is_odd = Equal (odd, one)
  run_float = Cast <to = 1> (run)
  root = Sqrt (run_float)
  plus = Reciprocal (root)
  minus = Neg (plus)
  no_share = Constant <value_float = 0.0> ()
  signs = Where (is_odd, minus, plus)
  hadamard = Where (same_run, signs, no_share)
  rows = MatMul (plain_rows, hadamard)
""",
    "READ": """
  all_sixteenths = Div (code_floats, sixteen)
  high_whole = Floor (all_sixteenths)
  high_part = Mul (high_whole, sixteen)
  low_whole = Sub (code_floats, high_part)
  raised_whole = Concat <axis = -1> (low_whole, high_whole)
  all_whole = Sub (raised_whole, middle)
""",
    "WRITTEN": """
  middle = Constant <value_float = 8.0> ()
  sixteen = Constant <value_float = 16.0> ()
  raised = Add (clipped, middle)
  low_codes, high_codes = Split <axis = -1, num_outputs = 2> (raised)
  high_shifted = Mul (high_codes, sixteen)
  packed = Add (low_codes, high_shifted)
  codes = Cast <to = 2> (packed)
""",
    "NEW_ROWS": "rounded = MatMul (new_kept, hadamard)",
    "OLD_ROWS": "all_rows = MatMul (kept_rows, hadamard)",
}


def _whole(parts: dict[str, str]) -> str:
    text = _ATTENTION_WHOLE
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


# Exact attention needs no summaries of the cache: they stay as they are.
_SUMMARIES = """
  present_codes = Identity (past_codes)
  present_means = Identity (past_means)
"""


def attention_bodies(norms: str) -> dict[str, str]:
    """The bodies of all attention operators; `norms` makes q_normed and k_normed of q_heads and k_heads."""
    heads = {"": _HEADS + _PLAIN_HEADS, "Norm": _HEADS + _SPLIT_HEADS + norms + _JOINED_HEADS}
    summaries = {"Attention": "", "HadamardSparseAttention": _SUMMARIES}
    caches = {"": _ATTENTION, "Int8": _whole(_INT8), "Int4": _whole(_INT4)}
    return {
        f"{norm}{kind}{cache}": head + body + beside
        for cache, body in caches.items()
        for kind, beside in summaries.items()
        for norm, head in heads.items()
        if f"{norm}{kind}{cache}" in OPS
    }
