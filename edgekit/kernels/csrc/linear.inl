// y = x W^T over the tiles of path.h, written once for all instruction sets against the sixteen-lane vectors of vec_*.h.
//
// Activations are integers with a scale a block, so a block contributes
//
//   scale_w * scale_x * (sum q_w q_x - zero * sum q_x)        (kMinimum: ... + minimum * scale_x * sum q_x)
//
// in integers up to the scales. The integer accumulator starts at -zero * sum q_x, so symmetric weights cost no more
// than bare dot products. kAtOnce rows of activations share each unpacking of the weights. With two planes of
// activations, sum q_w q_x is kPlane times the high plane's sum plus the low one's.
#include <utility>

namespace edgekit {
namespace {

// What the innermost loops call is always inline, and they themselves never are: left alone, the compiler stops inlining
// when a path has grown large, and copies whole loops where nothing is gained.

// Run k of a plane of Width bits, each code shifted up by Up bits; `lines` are the plane's own.
template <int Width, int Up, int Run>
[[gnu::always_inline]] inline Bytes run_of(const Bytes* lines) {
  constexpr int kDown = Width * (Run / Width) - Up;
  return field<kDown, ((1 << Width) - 1) << Up>(lines[Run % Width]);
}

template <int Bits, int... Runs>
[[gnu::always_inline]] inline void unpack_runs(const uint8_t* p, Bytes* codes, std::integer_sequence<int, Runs...>) {
  constexpr int kLow = low_bits(Bits), kHigh = Bits - kLow;
  Bytes lines[Bits];
  for (int i = 0; i < Bits; ++i) lines[i] = load_bytes(p + 64 * i);
  if constexpr (kHigh == 0) {
    ((codes[Runs] = run_of<kLow, 0, Runs>(lines)), ...);
  } else {
    ((codes[Runs] = either(run_of<kLow, 0, Runs>(lines), run_of<kHigh, kLow, Runs>(lines + kLow))), ...);
  }
}

// Columns of 32 of one tile as 8 vectors of codes.
template <int Bits>
[[gnu::always_inline]] inline void unpack(const uint8_t* p, Bytes* codes) {
  if constexpr (Bits == 8) {
    for (int g = 0; g < 8; ++g) codes[g] = wide(load_bytes(p + 64 * g));
  } else {
    unpack_runs<Bits>(p, codes, std::make_integer_sequence<int, 8>());
  }
}

template <int Bits>
constexpr int zero_of() {
  return Bits == 8 ? kWideZero : 1 << (Bits - 1);
}

// How far ahead weights are fetched, in bytes of codes: every line of them, and the scales that go with them. A processor
// that guesses the next lines itself gets to a third of its memory's rate with codes and scales as two streams.
constexpr int64_t kAhead = 4096;

// The scales of one tile and its offsets, block by block. Where scales have 8 bits, a scale is a code times the row's
// step, which is exact in a float: so the result is that of float16 scales, had they those values.
template <int Bits, Offset Kind>
struct TileScales {
  const uint16_t* scales;
  const uint8_t* small_scales;  // the same place as bytes, and so on
  const uint8_t* zero_points;
  const uint16_t* minima;
  const int8_t* small_minima;
  const bool small;
  Floats step = zeros(), minimum_step = zeros();

  [[gnu::always_inline]] TileScales(const Matrix& w, int64_t tile) : small(w.steps != nullptr) {
    const int64_t at = tile * w.blocks() * kLanes;
    scales = static_cast<const uint16_t*>(w.scales) + at;
    small_scales = static_cast<const uint8_t*>(w.scales) + at;
    zero_points = static_cast<const uint8_t*>(w.offsets) + at;
    minima = static_cast<const uint16_t*>(w.offsets) + at;
    small_minima = static_cast<const int8_t*>(w.offsets) + at;
    if (small) {
      constexpr int kNumbers = Kind == Offset::kMinimum ? 2 : 1;
      step = load_half(w.steps + tile * kNumbers * kLanes);
      if constexpr (kNumbers == 2) minimum_step = load_half(w.steps + (2 * tile + 1) * kLanes);
    }
  }
  [[gnu::always_inline]] Floats scale(int64_t b) const {
    return small ? mul(widen(small_scales + b * kLanes), step) : load_half(scales + b * kLanes);
  }
  // What a unit of the sum of a block's activations adds, beside a scale.
  [[gnu::always_inline]] Floats offset(int64_t b, Floats scale) const {
    if constexpr (Kind == Offset::kZeroPoint) {
      const Floats shift = all(static_cast<float>(Bits == 8 ? 128 - kWideZero : 0));
      return mul(sub(shift, widen(zero_points + b * kLanes)), scale);
    } else if constexpr (Kind == Offset::kMinimum) {
      const Floats minimum = small ? mul(widen(small_minima + b * kLanes), minimum_step) : load_half(minima + b * kLanes);
      return Bits == 8 && kWideZero == 0 ? fma(scale, all(128.0f), minimum) : minimum;
    }
    return zeros();
  }
  [[gnu::always_inline]] Floats zero(int64_t b) const {
    return Kind == Offset::kZeroPoint ? widen(zero_points + b * kLanes) : all(static_cast<float>(1 << (Bits - 1)));
  }
  [[gnu::always_inline]] void fetch(int64_t b) const {
    prefetch(small ? small_scales + b * kLanes : reinterpret_cast<const uint8_t*>(scales + b * kLanes));
    if constexpr (Kind == Offset::kZeroPoint) prefetch(zero_points + b * kLanes);
    if constexpr (Kind == Offset::kMinimum) {
      prefetch(small ? small_minima + b * kLanes : reinterpret_cast<const int8_t*>(minima + b * kLanes));
    }
  }
};

// The products of one tile with Rows rows of activations, from row `first`.
template <int Bits, Offset Kind, int Planes, int Rows>
[[gnu::noinline]] void tile_product(const Matrix& w, int64_t tile, const Activations& x, int64_t first, Floats* sums) {
  const int64_t blocks = w.blocks();
  const int groups = w.block / 32;
  constexpr int kGroupBytes = kLanes * 32 * Bits / 8;
  const uint8_t* codes = w.codes + tile * w.tile_codes();
  const TileScales<Bits, Kind> scales(w, tile);
  // The first rows bring the tile into the cache, the others find it there.
  const bool streams = first == 0;
  const int64_t ahead = (kAhead / kGroupBytes) >> __builtin_ctz(static_cast<unsigned>(groups));
  for (int m = 0; m < Rows; ++m) sums[m] = zeros();
  for (int64_t b = 0; b < blocks; ++b) {
    Ints acc[Planes][Rows];
    for (int p = 0; p < Planes; ++p) {
      for (int m = 0; m < Rows; ++m) {
        const int32_t sum = x.sums[(p * x.rows + first + m) * blocks + b];
        // Codes of 8 bits may be shifted to signed by `wide`: then zero_of is 0, and TileScales shifts other offsets.
        acc[p][m] = all(Kind == Offset::kSymmetric ? -zero_of<Bits>() * sum : 0);
      }
    }
    for (int g = 0; g < groups; ++g) {
      Bytes unpacked[8];
      unpack<Bits>(codes, unpacked);
      if (streams) {
        for (int line = 0; line < Bits; ++line) prefetch(codes + kAhead + 64 * line);
      }
      codes += kGroupBytes;
      for (int p = 0; p < Planes; ++p) {
        for (int m = 0; m < Rows; ++m) {
          const int8_t* row = x.codes + (p * x.rows + first + m) * x.width + b * w.block + 32 * g;
          acc[p][m] = dot<Bits>(acc[p][m], unpacked, row);
        }
      }
    }
    if (streams) scales.fetch(b + ahead);
    const Floats scale = scales.scale(b), offset = scales.offset(b, scale);
    for (int m = 0; m < Rows; ++m) {
      const int64_t at = (first + m) * blocks + b;
      const Floats scale_x = all(x.scales[at]);
      Floats product = to_float(acc[0][m]);
      if constexpr (Planes == 2) product = fma(product, all(static_cast<float>(kPlane)), to_float(acc[1][m]));
      sums[m] = fma(product, mul(scale, scale_x), sums[m]);
      if constexpr (Kind != Offset::kSymmetric) {
        float sum = static_cast<float>(x.sums[at]);
        if constexpr (Planes == 2) sum = sum * kPlane + static_cast<float>(x.sums[x.rows * blocks + at]);
        sums[m] = fma(offset, all(x.scales[at] * sum), sums[m]);
      }
    }
  }
}

// e^x to about 2 ulp for x <= 88, and 0 far below: 2^n * p(r) with n = round(x / ln 2), |r| <= ln 2 / 2.
inline Floats exponential(Floats x) {
  x = max(min(x, all(88.0f)), all(-87.0f));
  const Floats n = round(mul(x, all(1.44269504088896341f)));
  Floats r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, all(1.0f)));
  return scale_by_power(p, n);
}

inline Floats silu(Floats x) { return div(x, add(all(1.0f), exponential(sub(zeros(), x)))); }

// Store the lanes of one tile that are rows of the matrix.
[[gnu::noinline]] void finish(const Epilogue& end, Floats value, float* y, int64_t at, int64_t column, int64_t rows) {
  const int64_t count = rows - column < kLanes ? rows - column : kLanes;
  if (count == kLanes) {
    if (end.bias && !end.gated) value = add(value, load(end.bias + column));
    if (end.residual) value = add(value, load(end.residual + at));
    store(y + at, value);
    return;
  }
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) {
    if (end.bias && !end.gated) lanes[i] += read(end.bias + column + i);
    if (end.residual) lanes[i] += read(end.residual + at + i);
    y[at + i] = lanes[i];
  }
}

template <int Bits, Offset Kind, int Planes, int Rows>
void rows_product(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t tile,
                  int64_t first) {
  Floats sums[Rows];
  if (!end.gated) {
    tile_product<Bits, Kind, Planes, Rows>(w, tile, x, first, sums);
    for (int m = 0; m < Rows; ++m) {
      finish(end, sums[m], y, (first + m) * stride + tile * kLanes, tile * kLanes, w.rows);
    }
    return;
  }
  Floats up[Rows];
  tile_product<Bits, Kind, Planes, Rows>(w, 2 * tile, x, first, sums);
  tile_product<Bits, Kind, Planes, Rows>(w, 2 * tile + 1, x, first, up);
  for (int m = 0; m < Rows; ++m) {
    const Floats value = mul(silu(sums[m]), up[m]);
    finish(end, value, y, (first + m) * stride + tile * kLanes, tile * kLanes, w.rows / 2);
  }
}

// One tile with the rows of activations from `row` on.
template <int Bits, Offset Kind, int Planes>
inline void tile_rows(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t tile,
                      int64_t row) {
  constexpr int kMost = kAtOnce / Planes, kPair = kMost < 2 ? 1 : 2;
  for (; row + kMost <= x.rows; row += kMost) rows_product<Bits, Kind, Planes, kMost>(w, x, end, y, stride, tile, row);
  for (; row + kPair <= x.rows; row += kPair) rows_product<Bits, Kind, Planes, kPair>(w, x, end, y, stride, tile, row);
  if (row < x.rows) rows_product<Bits, Kind, Planes, 1>(w, x, end, y, stride, tile, row);
}

// Tiles first..last by `Rows::of`, which is tile_rows but on a path that has better for many rows.
struct VectorRows {
  template <int Bits, Offset Kind, int Planes>
  static void of(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                 int64_t last, uint8_t*) {
    if constexpr (Planes != 0) {
      for (int64_t tile = first; tile < last; ++tile) tile_rows<Bits, Kind, Planes>(w, x, end, y, stride, tile, 0);
    }
  }
};

template <class Rows, int Bits, Offset Kind>
void planes_product(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                    int64_t last, uint8_t* work) {
  switch (x.planes) {
    case 2: return Rows::template of<Bits, Kind, 2>(w, x, end, y, stride, first, last, work);
    case 1: return Rows::template of<Bits, Kind, 1>(w, x, end, y, stride, first, last, work);
    default: return Rows::template of<Bits, Kind, 0>(w, x, end, y, stride, first, last, work);
  }
}

template <class Rows, int Bits>
void multiply_bits(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                   int64_t last, uint8_t* work) {
  constexpr Offset kSymmetric = Offset::kSymmetric, kZeroPoint = Offset::kZeroPoint, kMinimum = Offset::kMinimum;
  switch (w.offset) {
    case kSymmetric: return planes_product<Rows, Bits, kSymmetric>(w, x, end, y, stride, first, last, work);
    case kZeroPoint: return planes_product<Rows, Bits, kZeroPoint>(w, x, end, y, stride, first, last, work);
    case kMinimum: return planes_product<Rows, Bits, kMinimum>(w, x, end, y, stride, first, last, work);
  }
}

template <class Rows>
void multiply(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
              int64_t last, uint8_t* work) {
  switch (w.bits) {
    case 2: return multiply_bits<Rows, 2>(w, x, end, y, stride, first, last, work);
    case 3: return multiply_bits<Rows, 3>(w, x, end, y, stride, first, last, work);
    case 4: return multiply_bits<Rows, 4>(w, x, end, y, stride, first, last, work);
    case 5: return multiply_bits<Rows, 5>(w, x, end, y, stride, first, last, work);
    case 6: return multiply_bits<Rows, 6>(w, x, end, y, stride, first, last, work);
    default: return multiply_bits<Rows, 8>(w, x, end, y, stride, first, last, work);
  }
}

// Store `count` values, a multiple of 16, as integers in one plane or two, and their sums.
void store_planes(const float* values, int count, float inverse, const Activations& out, int64_t at, int64_t sum_at) {
  const float most = out.planes == 2 ? kPlane * 127.0f + 126.0f : 127.0f;
  int32_t high_sum = 0, low_sum = 0;
  for (int i = 0; i < count; i += kLanes) {
    // What is not a number, or too small for `inverse` to be one, still gives a code.
    const Floats q = round(min(max(mul(load(values + i), all(inverse)), all(-most)), all(most)));
    if (out.planes == 1) {
      high_sum += store_codes(out.codes + at + i, q);
      continue;
    }
    const Floats high = round(mul(q, all(1.0f / kPlane)));
    high_sum += store_codes(out.codes + at + i, high);
    low_sum += store_codes(out.codes + out.rows * out.width + at + i, fma(high, all(-static_cast<float>(kPlane)), q));
  }
  out.sums[sum_at] = high_sum;
  if (out.planes == 2) out.sums[out.rows * out.blocks + sum_at] = low_sum;
}

// 1 / RMS of a row.
float gain_of(const float* row, int64_t columns, float epsilon) {
  Floats squares = zeros();
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) squares = fma(load(row + i), load(row + i), squares);
  float total = sum(squares);
  for (; i < columns; ++i) total += row[i] * row[i];
  return 1.0f / sqrtf(total / static_cast<float>(columns) + epsilon);
}

// `block` numbers of a row from `from` on, times gain and norm where there is one, and zeros beyond the row; returns the
// largest magnitudes.
Floats block_of(const float* row, int64_t columns, const float* norm, float gain, int64_t from, int block, float* values) {
  const int64_t count = columns - from < block ? columns - from : block;
  Floats top = zeros();
  for (int i = 0; i < block; i += kLanes) {
    if (i + kLanes <= count) {
      Floats v = load(row + from + i);
      if (norm) v = mul(mul(v, all(gain)), load(norm + from + i));
      store(values + i, v);
      top = max(top, magnitude(v));
    } else {
      for (int j = i; j < i + kLanes; ++j) {
        values[j] = j < count ? row[from + j] * (norm ? gain * read(norm + from + j) : 1.0f) : 0.0f;
      }
      top = max(top, magnitude(load(values + i)));
    }
  }
  return top;
}

void quantize(const float* x, int64_t columns, const float* norm, float epsilon, int block, const Activations& out,
              int64_t first, int64_t last) {
  float values[128];
  for (int64_t row = first; row < last; ++row) {
    const float* in = x + row * columns;
    const float gain = norm ? gain_of(in, columns, epsilon) : 1.0f;
    for (int64_t b = 0; b < out.blocks; ++b) {
      const float peak = largest(block_of(in, columns, norm, gain, b * block, block, values));
      const float most = out.planes == 2 ? kPlane * 127.0f + 126.0f : 127.0f;
      store_planes(values, block, peak > 0 ? most / peak : 0.0f, out, row * out.width + b * block, row * out.blocks + b);
      out.scales[row * out.blocks + b] = peak / most;
    }
  }
}

// The bits of one code that lie in a plane of `width` bits.
inline int plane_bits(const uint8_t* plane, int width, int64_t lane, int column) {
  const int run = column / 4;
  return plane[64 * (run % width) + 4 * lane + column % 4] >> (width * (run / width)) & ((1 << width) - 1);
}

void matrix_row(const Matrix& w, int64_t row, float* out) {
  const int64_t tile = row / kLanes, lane = row % kLanes, blocks = w.blocks();
  const int group_bytes = kLanes * 32 * w.bits / 8, low = low_bits(w.bits), high = w.bits - low;
  float lanes[kLanes];
  const auto half_at = [&](const void* halves, int64_t at) {
    store(lanes, load_half(static_cast<const uint16_t*>(halves) + at));
    return lanes[lane];
  };
  const int numbers = w.offset == Offset::kMinimum ? 2 : 1;
  const float step = w.steps ? half_at(w.steps, tile * numbers * kLanes) : 0.0f;
  const float minimum_step = w.steps && numbers == 2 ? half_at(w.steps, (2 * tile + 1) * kLanes) : 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = (tile * blocks + b) * kLanes;
    const float scale = w.steps ? static_cast<const uint8_t*>(w.scales)[at + lane] * step : half_at(w.scales, at);
    float zero = static_cast<float>(1 << (w.bits - 1)), minimum = 0.0f;
    if (w.offset == Offset::kZeroPoint) zero = static_cast<const uint8_t*>(w.offsets)[at + lane];
    if (w.offset == Offset::kMinimum) {
      minimum = w.steps ? static_cast<const int8_t*>(w.offsets)[at + lane] * minimum_step : half_at(w.offsets, at);
      zero = 0.0f;
    }
    const uint8_t* codes = w.codes + tile * w.tile_codes() + b * kLanes * w.block * w.bits / 8;
    for (int i = 0; i < w.block && b * w.block + i < w.columns; ++i) {
      const uint8_t* group = codes + (i / 32) * group_bytes;
      int code = plane_bits(group, low, lane, i % 32);
      if (high) code |= plane_bits(group + 64 * low, high, lane, i % 32) << low;
      out[b * w.block + i] = scale * (static_cast<float>(code) - zero) + minimum;
    }
  }
}

void floats_to_half(const float* x, uint16_t* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_half(out + i, load(x + i));
  if (i == count) return;
  float lanes[kLanes] = {};
  uint16_t halves[kLanes];
  std::memcpy(lanes, x + i, (count - i) * sizeof(float));
  store_half(halves, load(lanes));
  std::memcpy(out + i, halves, (count - i) * sizeof(uint16_t));
}

}  // namespace
}  // namespace edgekit
