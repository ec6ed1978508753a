// y = x W^T for many rows of activations on Intel's matrix unit (AMX): tiles of 16 rows of weights times 16 of activations.
//
// Unpacked, a group of 32 columns of path.h is what the unit wants of its second operand: 8 rows of 64 bytes, four
// columns of each of the 16 rows. One instruction multiplies it by 16 rows of activations; scales follow block by block in
// the order of linear.inl, so results equal the avx512 path's to the bit. Symmetric codes are made signed as they are
// unpacked. Rows beyond the last sixteen, and two planes of activations, are linear.inl's.

namespace edgekit {
namespace {

// What the unit's registers hold: 0 is the product, 1 activations, 2 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 32, 64};
  uint8_t rows[16] = {16, 16, 8};
};

// GCC's own intrinsics do not say which memory they read.
inline void set_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }
inline void clear_product() { __asm__ volatile("tilezero %tmm0"); }
inline void load_rows(const int8_t* p, int64_t stride) {
  using Rows = int8_t[1 << 24];  // at most
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(p), "r"(stride), "m"(*reinterpret_cast<const Rows*>(p)));
}
inline void load_weights(const uint8_t* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(p), "r"(stride), "m"(*reinterpret_cast<const uint8_t(*)[512]>(p)));
}
template <bool Signed>  // whether the weights are
inline void add_product() {
  if constexpr (Signed) {
    __asm__ volatile("tdpbssd %tmm2, %tmm1, %tmm0");
  } else {
    __asm__ volatile("tdpbsud %tmm2, %tmm1, %tmm0");
  }
}
inline void store_product(int32_t* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm0, (%1,%2,1)" : "=m"(*reinterpret_cast<int32_t(*)[256]>(p)) : "r"(p), "r"(stride));
}

// The codes of one tile as bytes, [columns / 4][16][4].
template <int Bits, Offset Kind>
[[gnu::noinline]] void unpack_tile(const Matrix& w, int64_t tile, uint8_t* out) {
  const uint8_t* codes = w.codes + tile * w.tile_codes();
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(1 << (Bits - 1)));
  for (int64_t column = 0; column < w.blocks() * w.block; column += 32) {
    Bytes unpacked[8];
    unpack<Bits>(codes, unpacked);
    for (int line = 0; line < Bits; ++line) prefetch(codes + kAhead + 64 * line);
    codes += kLanes * 32 * Bits / 8;
    for (const Bytes& run : unpacked) {
      _mm512_storeu_si512(out, Kind == Offset::kSymmetric ? _mm512_sub_epi8(run.v, zero) : run.v);
      out += 64;
    }
  }
}

// The scales of all rows of activations, and scale times sum: [rows / 16][blocks][16] of each, one behind the other.
void turn_scales(const Activations& x, float* out) {
  float* sums = out + x.rows / kLanes * kLanes * x.blocks;
  for (int64_t row = 0; row < x.rows / kLanes * kLanes; ++row) {
    for (int64_t b = 0; b < x.blocks; ++b) {
      const int64_t to = (row / kLanes * x.blocks + b) * kLanes + row % kLanes, from = row * x.blocks + b;
      out[to] = x.scales[from];
      sums[to] = x.scales[from] * static_cast<float>(x.sums[from]);
    }
  }
}

constexpr int64_t kBlocksAtOnce = 16;  // blocks that are multiplied before they are scaled

// The products of one tile with 16 rows of activations.
template <int Bits, Offset Kind>
[[gnu::noinline]] void square(const Matrix& w, int64_t tile, const uint8_t* codes, const Activations& x, int64_t first,
                   const float* scales_x, Floats* sums) {
  const int64_t blocks = w.blocks(), block = w.block, width = x.width, line = 64;
  TileScales<Bits, Kind> scales(w, tile, w.steps != nullptr);
  const float* scale_x = scales_x + first * blocks;
  const float* sum_x = scale_x + x.rows / kLanes * kLanes * blocks;
  const int8_t* rows = x.codes + first * width;
  // Products lie in memory for a while before they are read: what the unit has just stored is not at hand at once.
  alignas(64) int32_t products[kBlocksAtOnce][kLanes * kLanes];
  Floats acc[kLanes];  // in registers: stores through `sums` could be to anything
  for (int m = 0; m < kLanes; ++m) acc[m] = zeros();
  for (int64_t from = 0; from < blocks; from += kBlocksAtOnce) {
    const int64_t count = blocks - from < kBlocksAtOnce ? blocks - from : kBlocksAtOnce;
    for (int64_t i = 0; i < count; ++i) {
      clear_product();
      for (int64_t column = 0; column < block; column += 32) {
        load_rows(rows, width);
        load_weights(codes, line);
        add_product<Kind == Offset::kSymmetric>();
        rows += 32;
        codes += 32 * kLanes;
      }
      store_product(products[i], line);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = from + i;
      const Floats scale = scales.scale(), offset = scales.offset(scale);
      scales.next();
      for (int m = 0; m < kLanes; ++m) {
        const Ints product = {_mm512_load_si512(products[i] + m * kLanes)};
        acc[m] = fma(to_float(product), mul(scale, all(scale_x[b * kLanes + m])), acc[m]);
        if constexpr (Kind != Offset::kSymmetric) acc[m] = fma(offset, all(sum_x[b * kLanes + m]), acc[m]);
      }
    }
  }
  for (int m = 0; m < kLanes; ++m) sums[m] = acc[m];
}

// Tiles that are unpacked together, so that each row of activations is read, and of the result written, in longer pieces.
constexpr int64_t kTilesAtOnce = 4;

struct MatrixRows {
  template <int Bits, Offset Kind, int Planes>
  static void of(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                 int64_t last, uint8_t* work) {
    const int64_t rows = Planes == 1 ? x.rows / kLanes * kLanes : 0, bytes = kLanes * x.width, parts = end.gated ? 2 : 1;
    auto* scales = reinterpret_cast<float*>(work + 2 * kTilesAtOnce * bytes);
    if (rows > 0) {
      turn_scales(x, scales);
      set_shapes(TileShapes{});
    }
    for (int64_t from = first; from < last; from += kTilesAtOnce) {
      const int64_t to = from + kTilesAtOnce < last ? from + kTilesAtOnce : last;
      if (rows > 0) {
        for (int64_t i = parts * from; i < parts * to; ++i) unpack_tile<Bits, Kind>(w, i, work + (i - parts * from) * bytes);
      }
      for (int64_t row = 0; row < rows; row += kLanes) {
        for (int64_t tile = from; tile < to; ++tile) {
          const uint8_t* codes = work + parts * (tile - from) * bytes;
          Floats sums[kLanes];
          square<Bits, Kind>(w, parts * tile, codes, x, row, scales, sums);
          if (end.gated) {
            Floats up[kLanes];
            square<Bits, Kind>(w, parts * tile + 1, codes + bytes, x, row, scales, up);
            for (int m = 0; m < kLanes; ++m) sums[m] = mul(silu(sums[m]), up[m]);
          }
          for (int m = 0; m < kLanes; ++m) {
            finish(end, sums[m], y, (row + m) * stride + tile * kLanes, tile * kLanes, w.rows / parts);
          }
        }
      }
      for (int64_t tile = from; tile < to; ++tile) tile_rows<Bits, Kind, Planes>(w, x, end, y, stride, tile, rows);
    }
    if (rows > 0) release_tiles();
  }
};

}  // namespace
}  // namespace edgekit
