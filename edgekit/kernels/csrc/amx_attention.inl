// `attend` on Intel's matrix unit (AMX), for heads of whole 64 channels.
//
// The unit multiplies bfloat16, which is too coarse for what becomes an exponent. So each number is two of them, what it
// rounds to and what that leaves, and a product is three: high by high, high by low and low by high; what is missing is
// 2^-16 of it. Both products of attention have lanes for query rows, as scores, maxima and sums do in attention.inl:
//
//   scores (keys, rows)     =  keys (keys, channels)     * queries (channels, rows)
//   outputs (channels, rows) += values (channels, keys)  * weights (keys, rows)
//
// Squares are 16 lines of 64 bytes: of the first operand 16 rows and 32 columns, of the second 16 pairs of rows, whose
// numbers take turns, and 16 columns.

namespace edgekit {
namespace {

// What 32 numbers round to, and what that leaves.
struct Split {
  __m512i high, low;
};

inline Split split(Floats a, Floats b) {
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  const auto back = [](__m256i halves) {
    return Floats{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  };
  const Floats rest_a = sub(a, back(_mm512_castsi512_si256(high))), rest_b = sub(b, back(_mm512_extracti64x4_epi64(high, 1)));
  return {high, (__m512i)_mm512_cvtne2ps_pbh(rest_b.v, rest_a.v)};
}

// Sixteen lines of sixteen words, turned about their diagonal.
[[gnu::noinline]] void turn_square(const __m512i* in, uint8_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), odd_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88),
                  odd_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_storeu_si512(out + 64 * i, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + 64 * (i + 4), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + 64 * (i + 8), _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + 64 * (i + 12), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

// Squares of the first operand with their low parts, which lie `low` bytes behind.
template <int Product>
inline void add_split(const uint8_t* a, int64_t low) {
  load_square<4>(a, 64);
  __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm%c0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm%c0" : : "i"(Product));
  load_square<5>(a + low, 64);
  __asm__ volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm%c0" : : "i"(Product));
}

// Four squares of products one below the other: `groups` squares of `a` side by side in each row of them times as many of
// `b` one below the other, added to what `out` holds where `added`.
[[gnu::noinline]] void four_squares(const uint8_t* a, int64_t low_a, const uint8_t* b, int64_t low_b, int64_t groups, bool added,
                                    float* out) {
  if (added) {
    load_square<0>(out, 64);
    load_square<1>(out + 256, 64);
    load_square<2>(out + 512, 64);
    load_square<3>(out + 768, 64);
  } else {
    __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  }
  const int64_t next = groups * kSquareBytes;
  for (int64_t g = 0; g < groups; ++g, a += kSquareBytes, b += kSquareBytes) {
    load_square<6>(b, 64);
    load_square<7>(b + low_b, 64);
    add_split<0>(a, low_a);
    add_split<1>(a + next, low_a);
    add_split<2>(a + 2 * next, low_a);
    add_split<3>(a + 3 * next, low_a);
  }
  store_square<0>(out, 64);
  store_square<1>(out + 256, 64);
  store_square<2>(out + 512, 64);
  store_square<3>(out + 768, 64);
}

// Keys of one block, [64][head_dim], as squares of 16 keys and 32 channels.
void split_keys(const float* keys, int64_t d, uint8_t* out, int64_t low) {
  for (int64_t j = 0; j < kKeyBlock; ++j) {
    uint8_t* to = out + j / 16 * (d / 32) * kSquareBytes + j % 16 * 64;
    for (int64_t i = 0; i < d; i += 32, to += kSquareBytes) {
      const Split parts = split(load(keys + j * d + i), load(keys + j * d + i + kLanes));
      _mm512_storeu_si512(to, parts.high);
      _mm512_storeu_si512(to + low, parts.low);
    }
  }
}

// Values of one block, [64][head_dim], as squares of 16 channels and 32 keys.
void split_values(const float* values, int64_t d, uint8_t* out, int64_t low) {
  __m512i high[16], rest[16];
  for (int64_t i = 0; i < d; i += kLanes) {
    for (int64_t j = 0; j < kKeyBlock; j += 32, out += kSquareBytes) {
      for (int pair = 0; pair < 16; ++pair) {
        const float* at = values + (j + 2 * pair) * d + i;
        const Split parts = split(load(at), load(at + d));
        high[pair] = in_turns(parts.high);
        rest[pair] = in_turns(parts.low);
      }
      turn_square(high, out);
      turn_square(rest, out + low);
    }
  }
}

// Sixteen query rows times `scale` as squares of 16 pairs of channels; rows from `count` on are zeros.
void split_queries(const AttentionTask& t, int64_t first, int64_t count, uint8_t* out, int64_t low) {
  __m512i high[16] = {}, rest[16] = {};
  const Floats scale = all(t.scale);
  for (int64_t i = 0; i < t.head_dim; i += 32, out += kSquareBytes) {
    for (int64_t r = 0; r < count; ++r) {
      const float* from = t.q + (first + r) / t.heads * t.q_stride + (first + r) % t.heads * t.head_dim + i;
      const Split parts = split(mul(load(from), scale), mul(load(from + kLanes), scale));
      high[r] = parts.high;
      rest[r] = parts.low;
    }
    turn_square(high, out);
    turn_square(rest, out + low);
  }
}

// Scores of one block become weights, as squares of 16 pairs of keys; returns their sums.
Floats split_weights(const float* scores, Floats top, uint8_t* out, int64_t low) {
  Floats total = zeros();
  for (int j = 0; j < kKeyBlock; j += 2, out += 64) {
    const Floats a = exponential(sub(load(scores + j * kLanes), top));
    const Floats b = exponential(sub(load(scores + (j + 1) * kLanes), top));
    total = add(total, add(a, b));
    const Split parts = split(a, b);
    _mm512_storeu_si512(out, in_turns(parts.high));
    _mm512_storeu_si512(out + low, in_turns(parts.low));
  }
  return total;
}

constexpr int64_t kWidestHead = 256;

// Row r of the work is token r / heads, head r % heads, as in `attend`.
void attend_squares(const AttentionTask& t) {
  const int64_t rows = t.tokens * t.heads, groups = (rows + kLanes - 1) / kLanes, d = t.head_dim, block = kKeyBlock * d;
  if (d % 64 || d > kWidestHead) return attend(t);
  float* keys = t.scratch + (-reinterpret_cast<uintptr_t>(t.scratch) / sizeof(float) & 15);
  float* values = keys + block;                    // as squares in the end
  float* scores = values + block;                  // [64][16]
  float* weights = scores + kKeyBlock * kLanes;    // as squares
  float* q = weights + kKeyBlock * kLanes;         // [groups], as squares
  float* out = q + groups * d * kLanes;            // [groups][head_dim][16]
  float* maxima = out + groups * kLanes * d;       // [groups * 16]
  float* sums = maxima + groups * kLanes;
  float* positions = sums + groups * kLanes;
  const auto bytes = [](float* p) { return reinterpret_cast<uint8_t*>(p); };
  // Low parts lie behind the high ones: half of the bytes that floats take.
  const int64_t low_block = 2 * block, low_weights = 2 * kKeyBlock * kLanes, low_q = 2 * d * kLanes;
  float wide[kKeyBlock * kWidestHead];
  set_shapes(TileShapes{});
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
    split_queries(t, g * kLanes, count, bytes(q + g * d * kLanes), low_q);
    for (int64_t row = g * kLanes; row < (g + 1) * kLanes; ++row) {
      positions[row] = static_cast<float>(t.first + (row < rows ? row / t.heads : t.tokens - 1));
    }
    store(maxima + g * kLanes, all(kHidden));
    store(sums + g * kLanes, zeros());
  }
  std::memset(out, 0, sizeof(float) * groups * kLanes * d);
  const int64_t end = t.first + t.tokens;
  int64_t begin = t.window > 0 && t.first >= t.window ? t.first - t.window + 1 : 0;
  begin -= begin % kKeyBlock;
  for (int64_t i = 0, from = begin;; ++i) {
    from = t.blocks ? (i < t.block_count ? t.blocks[i] * kKeyBlock : end) : begin + i * kKeyBlock;
    if (from >= end) break;
    const int64_t count = end - from < kKeyBlock ? end - from : kKeyBlock;
    widen_block(t.keys.from(from, d), count, d, wide);
    split_keys(wide, d, bytes(keys), low_block);
    widen_block(t.values.from(from, d), count, d, wide);
    split_values(wide, d, bytes(values), low_block);
    for (int64_t g = 0; g < groups; ++g) {
      const float* position = positions + g * kLanes;
      if (static_cast<float>(from) > position[kLanes - 1]) continue;  // all of it lies ahead
      four_squares(bytes(keys), low_block, bytes(q + g * d * kLanes), low_q, d / 32, false, scores);
      const Floats top = hide_and_peak(scores, load(position), from, t.window, load(maxima + g * kLanes));
      const Floats shrink = exponential(sub(load(maxima + g * kLanes), top));
      const Floats total = split_weights(scores, top, bytes(weights), low_weights);
      store(maxima + g * kLanes, top);
      store(sums + g * kLanes, fma(load(sums + g * kLanes), shrink, total));
      for (int64_t i = 0; i < d; i += 64) {
        float* to = out + (g * d + i) * kLanes;
        for (int c = 0; c < 64; ++c) store(to + c * kLanes, mul(load(to + c * kLanes), shrink));
        four_squares(bytes(values) + i / 16 * 2 * kSquareBytes, low_block, bytes(weights), low_weights, 2, true, to);
      }
    }
  }
  release_tiles();
  __m512i lines[16];
  for (int64_t g = 0; g < groups; ++g) {
    const Floats inverse = div(all(1.0f), load(sums + g * kLanes));
    const int64_t count = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
    for (int64_t i = 0; i < d; i += kLanes) {
      for (int c = 0; c < kLanes; ++c) {
        lines[c] = _mm512_castps_si512(mul(load(out + (g * d + i + c) * kLanes), inverse).v);
      }
      turn_square(lines, bytes(scores));
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = g * kLanes + r;
        store(t.out + row / t.heads * t.q_stride + row % t.heads * d + i, load(scores + r * kLanes));
      }
    }
  }
}

}  // namespace
}  // namespace edgekit
