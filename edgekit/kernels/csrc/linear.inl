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
template <int Width, int Up, int Run, class Line>
[[gnu::always_inline]] inline Line run_of(const Line* lines) {
  constexpr int kDown = Width * (Run / Width) - Up;
  return field<kDown, ((1 << Width) - 1) << Up>(lines[Run % Width]);
}

template <int Bits, int... Runs>
[[gnu::always_inline]] inline void unpack_runs(const uint8_t* p, Part* codes, std::integer_sequence<int, Runs...>) {
  constexpr int kLow = low_bits(Bits), kHigh = Bits - kLow;
  Part lines[Bits];
  for (int i = 0; i < Bits; ++i) lines[i] = load_part(p + 64 * i);
  if constexpr (kHigh == 0) {
    ((codes[Runs] = run_of<kLow, 0, Runs>(lines)), ...);
  } else {
    ((codes[Runs] = either(run_of<kLow, 0, Runs>(lines), run_of<kHigh, kLow, Runs>(lines + kLow))), ...);
  }
}

// Columns of 32 of a part of one tile as 8 vectors of codes.
template <int Bits>
[[gnu::always_inline]] inline void unpack(const uint8_t* p, Part* codes) {
  if constexpr (Bits == 8) {
    for (int g = 0; g < 8; ++g) codes[g] = wide(load_part(p + 64 * g));
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

// The scales of one tile and its offsets, those of one block after the other. Where scales have 8 bits, a scale is a code times the row's
// step, which is exact in a float: so the result is that of float16 scales, had they those values.
template <int Bits, Offset Kind>
struct TileScales {
  const bool small;
  const int64_t stride, offset_stride;  // bytes of a block
  const uint8_t* scales;  // of the block at hand
  const uint8_t* offsets;
  Floats step = zeros(), minimum_step = zeros();

  [[gnu::always_inline]] TileScales(const Matrix& w, int64_t tile, bool small)
      : small(small), stride(small ? kLanes : 2 * kLanes),
        offset_stride(Kind == Offset::kZeroPoint ? kLanes : stride) {
    scales = static_cast<const uint8_t*>(w.scales) + tile * w.blocks() * stride;
    offsets = static_cast<const uint8_t*>(w.offsets) + tile * w.blocks() * offset_stride;
    if (small) {
      constexpr int kNumbers = Kind == Offset::kMinimum ? 2 : 1;
      step = load_half(w.steps + tile * kNumbers * kLanes);
      if constexpr (kNumbers == 2) minimum_step = load_half(w.steps + (2 * tile + 1) * kLanes);
    }
  }
  [[gnu::always_inline]] Floats scale() const {
    return small ? mul(widen(scales), step) : load_half(reinterpret_cast<const uint16_t*>(scales));
  }
  // What a unit of the sum of a block's activations adds, beside a scale.
  [[gnu::always_inline]] Floats offset(Floats scale) const {
    if constexpr (Kind == Offset::kZeroPoint) {
      const Floats shift = all(static_cast<float>(Bits == 8 ? 128 - kWideZero : 0));
      return mul(sub(shift, widen(offsets)), scale);
    } else if constexpr (Kind == Offset::kMinimum) {
      const Floats minimum = small ? mul(widen(reinterpret_cast<const int8_t*>(offsets)), minimum_step)
                                   : load_half(reinterpret_cast<const uint16_t*>(offsets));
      return Bits == 8 && kWideZero == 0 ? fma(scale, all(128.0f), minimum) : minimum;
    }
    return zeros();
  }
  // What codes are measured from, where there are no minima.
  [[gnu::always_inline]] Floats zero() const {
    return Kind == Offset::kZeroPoint ? widen(offsets) : all(static_cast<float>(1 << (Bits - 1)));
  }
  [[gnu::always_inline]] void fetch(int64_t ahead) const {
    prefetch(scales + ahead * stride);
    if constexpr (Kind != Offset::kSymmetric) prefetch(offsets + ahead * offset_stride);
  }
  [[gnu::always_inline]] void next(int64_t blocks = 1) {
    scales += blocks * stride;
    offsets += blocks * offset_stride;
  }
};

// Activations from one row and block on: what the loops below step through.
template <int Planes>
struct Columns {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  const int64_t width, blocks, plane, sums_plane;  // codes and sums of a row, and of all rows of a plane

  [[gnu::always_inline]] Columns(const Activations& x, int64_t row)
      : codes(x.codes + row * x.width), scales(x.scales + row * x.blocks), sums(x.sums + row * x.blocks), width(x.width),
        blocks(x.blocks), plane(x.rows * x.width), sums_plane(x.rows * x.blocks) {}
  [[gnu::always_inline]] const int32_t* sum(int p, int m) const { return sums + p * sums_plane + m * blocks; }
  [[gnu::always_inline]] float whole_sum(int m) const {
    const float high = static_cast<float>(*sum(0, m));
    return Planes == 2 ? high * kPlane + static_cast<float>(*sum(Planes - 1, m)) : high;
  }
};

// Products of a group's 32 columns, for a part of the tile's rows.
template <int Bits, int Number, int Planes, int Rows>
[[gnu::always_inline]] inline void add_part(Ints (&acc)[Planes][Rows], const uint8_t* codes, const Row (&x)[Planes][Rows]) {
  Part unpacked[8];
  unpack<Bits>(codes + 64 / kParts * Number, unpacked);
  for (int p = 0; p < Planes; ++p) {
    for (int m = 0; m < Rows; ++m) acc[p][m] = dot_part<Bits>(acc[p][m], Number, unpacked, x[p][m]);
  }
}

// The products of one tile with Rows rows of activations, from row `first`. Usual: blocks of 32 with float16 scales.
template <int Bits, Offset Kind, int Planes, int Rows, bool Usual>
[[gnu::noinline]] void tile_product(const Matrix& w, int64_t tile, const Activations& activations, int64_t first,
                                    Floats* sums) {
  const int64_t blocks = w.blocks();
  const int groups = Usual ? 1 : w.block / 32;
  constexpr int kGroupBytes = kLanes * 32 * Bits / 8;
  const uint8_t* codes = w.codes + tile * w.tile_codes();
  TileScales<Bits, Kind> scales(w, tile, !Usual && w.steps);
  Columns<Planes> x(activations, first);
  // The first rows bring the tile into the cache, the others find it there.
  const bool streams = Rows == 1 || first == 0;
  const int64_t ahead = (kAhead / kGroupBytes) >> __builtin_ctz(static_cast<unsigned>(groups));
  Floats total[Rows];  // in registers: stores through `sums` could be to anything
  for (int m = 0; m < Rows; ++m) total[m] = zeros();
  // Codes of 8 bits may be shifted to signed by `wide`: then zero_of is 0, and other offsets are shifted, too.
  constexpr bool kWholeZeros = Kind == Offset::kZeroPoint && kIntegerZeros;
  constexpr int kShift = Bits == 8 ? 128 - kWideZero : 0;
  for (int64_t b = 0; b < blocks; ++b) {
    Ints acc[Planes][Rows];
    Zeros zero_points;
    if constexpr (kWholeZeros) zero_points = load_zeros<kShift>(scales.offsets);
    for (int p = 0; p < Planes; ++p) {
      for (int m = 0; m < Rows; ++m) {
        const int32_t* sum = x.sum(p, m);
        acc[p][m] = kWholeZeros ? times(zero_points, sum) : all(Kind == Offset::kSymmetric ? -zero_of<Bits>() * *sum : 0);
      }
    }
    int g = groups;
    do {
      if (streams) {
        for (int line = 0; line < Bits; ++line) prefetch(codes + kAhead + 64 * line);
      }
      Row rows[Planes][Rows];
      for (int p = 0; p < Planes; ++p) {
        for (int m = 0; m < Rows; ++m) rows[p][m] = load_row(x.codes + p * x.plane + m * x.width);
      }
      add_part<Bits, 0, Planes, Rows>(acc, codes, rows);
      if constexpr (kParts == 2) {
        codes = settled(acc, codes);
        add_part<Bits, 1, Planes, Rows>(acc, codes, rows);
      }
      codes += kGroupBytes;
      x.codes += 32;
    } while (--g);
    if (streams) scales.fetch(ahead);
    const Floats scale = scales.scale(), offset = scales.offset(scale);
    scales.next();
    for (int m = 0; m < Rows; ++m) {
      const float scale_x = x.scales[m * x.blocks];
      const Floats product = Planes == 2 ? joined(acc[0][m], acc[Planes - 1][m]) : to_float(acc[0][m]);
      total[m] = fma(product, mul(scale, all(scale_x)), total[m]);
      if constexpr (Kind != Offset::kSymmetric && !kWholeZeros) {
        total[m] = fma(offset, all(scale_x * x.whole_sum(m)), total[m]);
      }
    }
    ++x.scales;
    ++x.sums;
  }
  for (int m = 0; m < Rows; ++m) sums[m] = total[m];
}

// The runs Runs of a group of 6-bit codes, which is half of it.
template <int... Runs>
[[gnu::always_inline]] inline void unpack_half(const uint8_t* p, Bytes* codes, std::integer_sequence<int, Runs...>) {
  constexpr int kLow = low_bits(6), kHigh = 6 - kLow;
  Bytes lines[6];
  for (int i = 0; i < 6; ++i) lines[i] = load_bytes(p + 64 * i);
  ((codes[Runs % 4] = either(run_of<kLow, 0, Runs>(lines), run_of<kHigh, kLow, Runs>(lines + kLow))), ...);
}

// As tile_product, for one row, of symmetric codes of 6 bits in blocks of 16: two blocks to a group.
template <int Planes>
[[gnu::noinline]] Floats halves_product(const Matrix& w, int64_t tile, const Activations& activations, int64_t row) {
  const uint8_t* codes = w.codes + tile * w.tile_codes();
  TileScales<6, Offset::kSymmetric> scales(w, tile, w.steps != nullptr);
  Columns<Planes> x(activations, row);
  Floats total = zeros();
  const auto add_block = [&](auto runs) {
    Bytes unpacked[4];
    unpack_half(codes, unpacked, runs);
    Ints acc[Planes];
    for (int p = 0; p < Planes; ++p) {
      acc[p] = dot<6, 4>(all(-zero_of<6>() * *x.sum(p, 0)), unpacked, x.codes + p * x.plane);
    }
    const Floats product = Planes == 2 ? joined(acc[0], acc[Planes - 1]) : to_float(acc[0]);
    total = fma(product, mul(scales.scale(), all(*x.scales)), total);
    scales.next();
    x.codes += 16;
    ++x.scales;
    ++x.sums;
  };
  for (int64_t b = 0; b < x.blocks; b += 2, codes += kLanes * 32 * 6 / 8) {
    for (int line = 0; line < 6; ++line) prefetch(codes + kAhead + 64 * line);
    scales.fetch(kAhead / (kLanes * 16 * 6 / 8));
    add_block(std::integer_sequence<int, 0, 1, 2, 3>());
    add_block(std::integer_sequence<int, 4, 5, 6, 7>());
  }
  return total;
}

// tile_product, or what stands in for it.
template <int Bits, Offset Kind, int Planes, int Rows, bool Usual>
void product_of(const Matrix& w, int64_t tile, const Activations& x, int64_t first, Floats* sums) {
  if constexpr (Bits == 6 && Kind == Offset::kSymmetric) {
    if (w.block < 32) {
      for (int m = 0; m < Rows; ++m) sums[m] = halves_product<Planes>(w, tile, x, first + m);
      return;
    }
  }
  tile_product<Bits, Kind, Planes, Rows, Usual>(w, tile, x, first, sums);
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

template <int Bits, Offset Kind, int Planes, int Rows, bool Usual>
void rows_product(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t tile,
                  int64_t first) {
  Floats sums[Rows];
  if (!end.gated) {
    product_of<Bits, Kind, Planes, Rows, Usual>(w, tile, x, first, sums);
    for (int m = 0; m < Rows; ++m) {
      finish(end, sums[m], y, (first + m) * stride + tile * kLanes, tile * kLanes, w.rows);
    }
    return;
  }
  Floats up[Rows];
  product_of<Bits, Kind, Planes, Rows, Usual>(w, 2 * tile, x, first, sums);
  product_of<Bits, Kind, Planes, Rows, Usual>(w, 2 * tile + 1, x, first, up);
  for (int m = 0; m < Rows; ++m) {
    const Floats value = mul(silu(sums[m]), up[m]);
    finish(end, value, y, (first + m) * stride + tile * kLanes, tile * kLanes, w.rows / 2);
  }
}

// One tile with the rows of activations from `row` on.
template <int Bits, Offset Kind, int Planes>
inline void tile_rows(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t tile,
                      int64_t row) {
  // Many rows of one plane stand abreast where a path has a loop for that: no other is made.
  constexpr int kMost = Planes == 1 && kAbreast > 1 ? 2 : kAtOnce / Planes, kPair = kMost < 2 ? 1 : 2;
  for (; row + kMost <= x.rows; row += kMost) rows_product<Bits, Kind, Planes, kMost, false>(w, x, end, y, stride, tile, row);
  for (; row + kPair <= x.rows; row += kPair) rows_product<Bits, Kind, Planes, kPair, false>(w, x, end, y, stride, tile, row);
  if (row == x.rows) return;
  // Small processors wait for instructions when they decode, and not for memory alone: they get a loop without choices.
  if (kParts > 1 && w.block == 32 && !w.steps) {
    rows_product<Bits, Kind, Planes, 1, (kParts > 1)>(w, x, end, y, stride, tile, row);
  } else {
    rows_product<Bits, Kind, Planes, 1, false>(w, x, end, y, stride, tile, row);
  }
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

struct PlaneSums {
  int32_t high, low;
};

// Store `count` values, a multiple of 16, as integers in one plane, or in two where `low` is not null. Floats add up such
// sums exactly.
PlaneSums store_planes(const float* values, int count, float inverse, int8_t* high, int8_t* low) {
  const float most = low ? kPlane * 127.0f + 126.0f : 127.0f;
  Floats high_sum = zeros(), low_sum = zeros();
  for (int i = 0; i < count; i += kLanes) {
    // What is not a number, or too small for `inverse` to be one, still gives a code.
    Floats q = round(min(max(mul(load(values + i), all(inverse)), all(-most)), all(most)));
    if (low) {
      const Floats wide = round(mul(q, all(1.0f / kPlane)));
      const Floats rest = fma(wide, all(-static_cast<float>(kPlane)), q);
      store_codes(low + i, rest);
      low_sum = add(low_sum, rest);
      q = wide;
    }
    store_codes(high + i, q);
    high_sum = add(high_sum, q);
  }
  return {static_cast<int32_t>(sum(high_sum)), low ? static_cast<int32_t>(sum(low_sum)) : 0};
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
  int8_t codes[128];
  const float most = out.planes == 2 ? kPlane * 127.0f + 126.0f : 127.0f;
  for (int64_t row = first; row < last; ++row) {
    const float* in = x + row * columns;
    const float gain = norm ? gain_of(in, columns, epsilon) : 1.0f;
    const int64_t lane = row % out.abreast, group = row - lane;
    for (int64_t b = 0; b < out.blocks; ++b) {
      const float peak = largest(block_of(in, columns, norm, gain, b * block, block, values));
      const float inverse = peak > 0 ? most / peak : 0.0f;
      int8_t* to = out.codes + group * out.width + b * block * out.abreast + 4 * lane;
      const int64_t at = group * out.blocks + b * out.abreast + lane;
      out.scales[at] = peak / most;
      if (out.planes == 2) {
        const PlaneSums sums = store_planes(values, block, inverse, to, to + out.rows * out.width);
        out.sums[at] = sums.high;
        out.sums[out.rows * out.blocks + at] = sums.low;
        continue;
      }
      out.sums[at] = store_planes(values, block, inverse, out.abreast == 1 ? to : codes, nullptr).high;
      if (out.abreast == 1) continue;
      for (int i = 0; i < block; i += 4) std::memcpy(to + i * out.abreast, codes + i, 4);
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
    for (int64_t i = b * w.block; i < (b + 1) * w.block && i < w.columns; ++i) {
      const uint8_t* group = w.codes + tile * w.tile_codes() + i / 32 * group_bytes;
      const int column = static_cast<int>(i % 32);
      int code = plane_bits(group, low, lane, column);
      if (high) code |= plane_bits(group + 64 * low, high, lane, column) << low;
      out[i] = scale * (static_cast<float>(code) - zero) + minimum;
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
