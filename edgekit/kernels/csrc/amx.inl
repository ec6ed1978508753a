// y = x W^T for many rows of activations on Intel's matrix unit (AMX), in bfloat16: squares of 32 rows by 32 of weights.
//
// Weights are unpacked and scaled once for all rows, so that sums run over whole rows of them inside the unit, in float32,
// and no product is scaled. Rounding to 8 bits of fraction at any size of number is finer than codes of 8 bits whose
// scale is their block's largest. Few rows, in one plane or two, are linear.inl's.

namespace edgekit {
namespace {

// Registers 0 to 3 are products, 4 and 5 activations, 6 and 7 weights: all of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's own intrinsics do not say which memory they read.
constexpr int64_t kSquareBytes = 16 * 64;
using Square = uint8_t[kSquareBytes];
inline void set_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }
template <int Register>
inline void load_square(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Register), "m"(*static_cast<const Square*>(p)));
}
template <int Register>
inline void store_square(float* p, int64_t stride) {
  using Lines = float[1 << 24];  // at most
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*reinterpret_cast<Lines*>(p)) : "r"(p), "r"(stride), "i"(Register));
}

// The first 16 numbers and the second 16 take turns.
inline __m512i in_turns(__m512i numbers) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(turns, numbers);
}

// Columns from..to of one tile as bfloat16: each 32 are a square, 16 lines of two columns of each row, as the unit wants its
// second operand.
template <int Bits, Offset Kind>
[[gnu::noinline]] void scale_tile(const Matrix& w, int64_t tile, int64_t from, int64_t to, uint8_t* out) {
  TileScales<Bits, Kind> scales(w, tile, w.steps != nullptr);
  const uint8_t* codes = w.codes + tile * w.tile_codes() + from * kLanes * Bits / 8;
  const __m512i byte = _mm512_set1_epi32(255);
  scales.next(from >> __builtin_ctz(static_cast<unsigned>(w.block)));
  for (int64_t column = from; column < to; column += 32) {
    Bytes unpacked[8];
    unpack<Bits>(codes, unpacked);
    for (int line = 0; line < Bits; ++line) prefetch(codes + kAhead + 64 * line);
    codes += kLanes * 32 * Bits / 8;
    for (int half = 0; half < 2; ++half) {  // the smallest block
      const Floats scale = scales.scale(), minimum = scales.offset(scale), zero = scales.zero();
      if ((column + 16 * (half + 1)) % w.block == 0) scales.next();
      for (int run = 4 * half; run < 4 * half + 4; ++run) {
        const auto value = [&](int at) {
          const Ints code = {_mm512_and_si512(_mm512_srli_epi32(unpacked[run].v, 8 * at), byte)};
          return Kind == Offset::kMinimum ? fma(to_float(code), scale, minimum).v : mul(sub(to_float(code), zero), scale).v;
        };
        for (int at = 0; at < 4; at += 2, out += 64) {
          const auto pair = (__m512i)_mm512_cvtne2ps_pbh(value(at + 1), value(at));
          _mm512_storeu_si512(out, in_turns(pair));
        }
      }
    }
  }
}

// Products of 32 rows with two tiles over `groups` of 32 columns, added to `sums` unless they are the first.
[[gnu::noinline]] void square(const int8_t* x, int64_t next_rows, const uint8_t* tiles, int64_t next_tile, int64_t groups,
                              bool first, float* sums) {
  constexpr int64_t kLine = 64, kRow = 2 * kLanes * sizeof(float);
  float* lower = sums + kLanes * 2 * kLanes;
  if (first) {
    __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  } else {
    load_square<0>(sums, kRow);
    load_square<1>(sums + kLanes, kRow);
    load_square<2>(lower, kRow);
    load_square<3>(lower + kLanes, kRow);
  }
  for (int64_t g = 0; g < groups; ++g, x += kSquareBytes, tiles += kSquareBytes) {
    load_square<6>(tiles, kLine);
    load_square<4>(x, kLine);
    load_square<7>(tiles + next_tile, kLine);
    load_square<5>(x + next_rows, kLine);
    __asm__ volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
    __asm__ volatile("tdpbf16ps %tmm7, %tmm4, %tmm1");
    __asm__ volatile("tdpbf16ps %tmm6, %tmm5, %tmm2");
    __asm__ volatile("tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  store_square<0>(sums, kRow);
  store_square<1>(sums + kLanes, kRow);
  store_square<2>(lower, kRow);
  store_square<3>(lower + kLanes, kRow);
}

struct MatrixRows {
  template <int Bits, Offset Kind, int Planes>
  static void of(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                 int64_t last, uint8_t* work) {
    if (Planes) return PanelRows::of<Bits, Kind, Planes ? Planes : 1>(w, x, end, y, stride, first, last, work);
    work += -reinterpret_cast<uintptr_t>(work) & 63;
    constexpr int64_t kNextTile = kPanel / 32 * kSquareBytes;
    auto* sums = reinterpret_cast<float*>(work + 2 * kNextTile);
    const int64_t parts = end.gated ? 2 : 1, next_rows = x.width / 32 * kSquareBytes;
    set_shapes(TileShapes{});
    for (int64_t tile = parts * first; tile < parts * last; tile += 2) {
      const bool both = !end.gated && tile + 1 < last;
      for (int64_t from = 0; from < x.width; from += kPanel) {
        const int64_t to = from + kPanel < x.width ? from + kPanel : x.width;
        scale_tile<Bits, Kind>(w, tile, from, to, work);
        if (both || end.gated) scale_tile<Bits, Kind>(w, tile + 1, from, to, work + kNextTile);
        for (int64_t row = 0; row < x.rows; row += kSquares * kLanes) {
          square(x.codes + row / kLanes * next_rows + from / 32 * kSquareBytes, next_rows, work, kNextTile, (to - from) / 32,
                 from == 0, sums + row * 2 * kLanes);
        }
      }
      finish_pair(w, x, end, sums, tile, both, y, stride);
    }
    release_tiles();
  }
};

// Rows first..last of x, after RMSNorm with `norm` where it is not null: as integers, or as bfloat16 in squares.
void quantize_rows(const float* x, int64_t columns, const float* norm, float epsilon, int block, const Activations& out,
                   int64_t first, int64_t last) {
  if (out.planes) return quantize(x, columns, norm, epsilon, block, out, first, last);
  float values[32];
  for (int64_t row = first; row < last; ++row) {
    const float* in = x + row * columns;
    const float gain = norm ? gain_of(in, columns, epsilon) : 1.0f;
    int8_t* to = out.codes + row / kLanes * (out.width / 32) * kSquareBytes + row % kLanes * 64;
    for (int64_t from = 0; from < out.width; from += 32, to += kSquareBytes) {
      Floats low, high;
      if (from + 32 <= columns) {
        low = load(in + from), high = load(in + from + kLanes);
        if (norm) low = mul(mul(low, all(gain)), load(norm + from)), high = mul(mul(high, all(gain)), load(norm + from + kLanes));
      } else {
        block_of(in, columns, norm, gain, from, 32, values);
        low = load(values), high = load(values + kLanes);
      }
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
  }
}

}  // namespace
}  // namespace edgekit
