// y = x W^T for many rows of activations in one plane, 8 of them abreast: two tiles of weights at a time, of AVX-512.
//
// Weights are unpacked to bytes once for all rows, so that one loop serves all bits and offsets, and each activation that is
// loaded meets 32 rows of weights. A block's integers are those of linear.inl, and so are its floats, but for zero points,
// which are subtracted as integers.

namespace edgekit {
namespace {

static_assert(kAbreast == 8);

// Some columns of two tiles. What belongs to a block is there for each of its rows of weights.
struct Panel {
  const uint8_t* codes[2];             // [columns / 4][64]
  float scales[kPanel / 16][2][kLanes];
  float minima[kPanel / 16][2][kLanes];
  int32_t zeros[kPanel / 16][2][kLanes];  // less than nothing, in the lower half; the upper is 0
  alignas(64) uint8_t unpacked[2][kPanel * kLanes];
};
static_assert(sizeof(Panel) <= 2 * kLanes * 2 * kPanel);

// Columns from..to of one tile.
template <int Bits, Offset Kind>
[[gnu::noinline]] void unpack_tile(const Matrix& w, int64_t tile, int64_t from, int64_t to, int side, Panel& panel) {
  const int shift = __builtin_ctz(static_cast<unsigned>(w.block));
  TileScales<Bits, Kind> scales(w, tile, w.steps != nullptr);
  scales.next(from >> shift);
  for (int64_t b = 0; b < (to - from) >> shift; ++b, scales.next()) {
    const Floats scale = scales.scale();
    store(panel.scales[b][side], scale);
    if (Kind == Offset::kMinimum) store(panel.minima[b][side], scales.offset(scale));
    const __m512i zero = Kind == Offset::kMinimum ? _mm512_setzero_si512() : _mm512_cvtps_epi32(scales.zero().v);
    const __m512i negative = _mm512_sub_epi32(_mm512_setzero_si512(), zero);
    _mm512_storeu_si512(panel.zeros[b][side], _mm512_and_si512(negative, _mm512_set1_epi32(0xffff)));
  }
  const uint8_t* codes = w.codes + tile * w.tile_codes() + from * kLanes * Bits / 8;
  panel.codes[side] = Bits == 8 ? codes : panel.unpacked[side];
  if constexpr (Bits != 8) {
    uint8_t* out = panel.unpacked[side];
    for (int64_t column = from; column < to; column += 32, codes += kLanes * 32 * Bits / 8) {
      for (int line = 0; line < Bits; ++line) prefetch(codes + kAhead + 64 * line);
      Bytes runs[8];
      unpack<Bits>(codes, runs);
      for (int k = 0; k < 8; ++k, out += 64) _mm512_storeu_si512(out, runs[k].v);
    }
  }
}

// The products of 8 rows with a panel of some blocks, added to `sums` [8][2][16] unless it is the first.
template <bool Minima>
[[gnu::noinline]] void panel_product(const Panel& panel, int64_t blocks, int block, const int8_t* x, const float* x_scales,
                                     const int32_t* x_sums, bool first, float* sums) {
  const uint8_t *left = panel.codes[0], *right = panel.codes[1];
  for (int64_t b = 0; b < blocks; ++b, x_scales += kAbreast, x_sums += kAbreast) {
    __m512i acc[kAbreast][2];
    for (int m = 0; m < kAbreast; ++m) {
      for (int side = 0; side < 2; ++side) {
        const __m512i zeros = _mm512_loadu_si512(panel.zeros[b][side]);
        acc[m][side] = Minima ? _mm512_setzero_si512()
                              : _mm512_dpwssd_epi32(_mm512_setzero_si512(), zeros, _mm512_set1_epi32(x_sums[m]));
      }
    }
    for (int run = 0; run < block / 4; run += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k, left += 64, right += 64, x += 4 * kAbreast) {
        const __m512i codes[2] = {_mm512_loadu_si512(left), _mm512_loadu_si512(right)};
#pragma GCC unroll 8
        for (int m = 0; m < kAbreast; ++m) {
          const __m512i four = _mm512_set1_epi32(read(reinterpret_cast<const int32_t*>(x) + m));
          acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], codes[0], four);
          acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], codes[1], four);
        }
      }
    }
    float shifts[kLanes];  // what minima are multiplied by
    if (Minima) {
      const Floats sums_of_rows = to_float({_mm512_maskz_loadu_epi32(0xff, x_sums)});
      store(shifts, mul({_mm512_maskz_loadu_ps(0xff, x_scales)}, sums_of_rows));
    }
    for (int side = 0; side < 2; ++side) {
      const Floats scale = load(panel.scales[b][side]), minimum = load(panel.minima[b][side]);
      for (int m = 0; m < kAbreast; ++m) {
        float* at = sums + (2 * m + side) * kLanes;
        Floats total = first && b == 0 ? zeros() : load(at);
        total = fma(to_float({acc[m][side]}), mul(scale, all(x_scales[m])), total);
        if (Minima) total = fma(minimum, all(shifts[m]), total);
        store(at, total);
      }
    }
  }
}

// The results of two tiles, the first of which is `tile`, for all rows; the second counts where `both`.
[[gnu::noinline]] void finish_pair(const Matrix& w, const Activations& x, const Epilogue& end, const float* sums, int64_t tile,
                                   bool both, float* y, int64_t stride) {
  const int64_t width = end.gated ? w.rows / 2 : w.rows, column = (end.gated ? tile / 2 : tile) * kLanes;
  const bool whole = column + (both ? 2 : 1) * kLanes <= width;
  const auto ended = [&](Floats value, int64_t from, int64_t at) {
    if (!whole) return finish(end, value, y, at, from, width);
    if (end.bias && !end.gated) value = add(value, load(end.bias + from));
    if (end.residual) value = add(value, load(end.residual + at));
    store(y + at, value);
  };
  for (int64_t row = 0; row < x.rows; ++row, sums += 2 * kLanes) {
    const Floats value = load(sums), second = load(sums + kLanes);
    ended(end.gated ? mul(silu(value), second) : value, column, row * stride + column);
    if (both) ended(second, column + kLanes, row * stride + column + kLanes);
  }
}

// Tiles first..last, rows of one plane abreast; others by linear.inl.
struct PanelRows {
  template <int Bits, Offset Kind, int Planes>
  static void of(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                 int64_t last, uint8_t* work) {
    if (Planes != 1 || x.abreast == 1) return VectorRows::of<Bits, Kind, Planes>(w, x, end, y, stride, first, last, work);
    work += -reinterpret_cast<uintptr_t>(work) & 63;
    auto& panel = *reinterpret_cast<Panel*>(work);
    auto* sums = reinterpret_cast<float*>(work + 2 * kLanes * 2 * kPanel);
    const int64_t parts = end.gated ? 2 : 1;
    for (int64_t tile = parts * first; tile < parts * last; tile += 2) {
      const bool both = !end.gated && tile + 1 < last;
      for (int64_t from = 0; from < x.width; from += kPanel) {
        const int64_t to = from + kPanel < x.width ? from + kPanel : x.width;
        unpack_tile<Bits, Kind>(w, tile, from, to, 0, panel);
        // A tile that has no second is multiplied twice.
        unpack_tile<Bits, Kind>(w, both || end.gated ? tile + 1 : tile, from, to, 1, panel);
        const int64_t block = from / w.block, blocks = (to - from) / w.block;
        for (int64_t row = 0; row < x.rows; row += kAbreast) {
          const int64_t at = row * x.blocks + kAbreast * block;
          panel_product<Kind == Offset::kMinimum>(panel, blocks, w.block, x.codes + row * x.width + kAbreast * from,
                                                  x.scales + at, x.sums + at, from == 0, sums + row * 2 * kLanes);
        }
      }
      finish_pair(w, x, end, sums, tile, both, y, stride);
    }
  }
};

}  // namespace
}  // namespace edgekit
