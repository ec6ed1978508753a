// A path: the kernels compiled for one instruction set. The library holds several and picks one when it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgekit {

constexpr int kLanes = 16;   // rows of a tile: one lane each
constexpr int kPlane = 254;  // so that the low plane lies in -127..127 too

// A number of a model, whose file need not align it.
template <class T>
[[gnu::always_inline]] inline T read(const T* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

enum class Offset { kSymmetric, kZeroPoint, kMinimum };

// A quantised matrix in tiles of 16 rows; the last tile is padded with rows of zeros.
//
//   codes    [tiles][blocks][16 * block * bits / 8]. In each group of 32 columns: at 8 bits, 8 runs of 64 bytes, run g
//            holding columns 4g..4g+3 of row 0, then of row 1 ...; at 4 bits, 4 runs, run g holding columns 4g..4g+3 in
//            the low halves and 16+4g..16+4g+3 in the high halves.
//   scales   [tiles][blocks][16] float16
//   offsets  kZeroPoint: [tiles][blocks][16] uint8; kMinimum: [tiles][blocks][16] float16; kSymmetric: none
//
// The value of code q is scale * (q - zero point), or scale * q + minimum; the symmetric zero point is 2^(bits-1).
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;
  const void* offsets;
  Offset offset;
  int bits;
  int block;
  int64_t rows;
  int64_t columns;
  // Always inline, here and below: the linker keeps one copy of a function, and that may be for another processor.
  [[gnu::always_inline]] int64_t blocks() const { return (columns + block - 1) / block; }
  [[gnu::always_inline]] int64_t tiles() const { return (rows + kLanes - 1) / kLanes; }
  [[gnu::always_inline]] int64_t tile_codes() const { return blocks() * kLanes * block * bits / 8; }
};

// Rows of activations as integers: value = scale * q within a block, where q is an 8-bit code (one plane), or
// kPlane * high + low of two (two planes): 15 bits, for twice the dot products. Sums are of a block's codes.
struct Activations {
  int8_t* codes;   // [planes][rows][blocks * block], the high plane first
  float* scales;   // [rows][blocks]
  int32_t* sums;   // [planes][rows][blocks]
  int planes;
  int64_t rows;
  int64_t width;   // blocks * block
  int64_t blocks;
};

// What happens to a product before it is stored.
struct Epilogue {
  const float* bias;      // [rows of the matrix] or null
  const float* residual;  // [activation rows][stride] or null
  bool gated;             // tiles come in pairs (gate, up); silu(gate) * up is stored
};

// The query heads of one key-value head, many tokens: see attention.inl. Lengths are in elements.
struct AttentionTask {
  const float* q;          // [tokens][q_stride]: rotated queries of the group's heads, heads * head_dim of each row
  const uint16_t* keys;    // [positions][head_dim] float16
  const uint16_t* values;  // [positions][head_dim] float16
  float* out;              // as q
  int64_t q_stride;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t first;   // position of the first token
  int64_t window;  // attend to the last `window` positions only; 0: to all
  float scale;
  float* scratch;  // attention_scratch(...) floats
};

constexpr int64_t attention_scratch(int64_t tokens, int64_t heads, int64_t head_dim) {
  const int64_t rows = (tokens * heads + kLanes - 1) / kLanes * kLanes;
  return 2 * 64 * head_dim + 64 * kLanes + rows * (2 * head_dim + 3);
}

// The same for one token and a stretch of the cache; leaves sums that several stretches can be joined from.
struct DecodeTask {
  const float* q;          // [heads][head_dim], rotated
  const uint16_t* keys;    // [count][head_dim] float16
  const uint16_t* values;
  int64_t count;
  int64_t count_padded;  // the next multiple of 16
  int64_t heads;
  int64_t head_dim;
  float scale;
  float* out;      // [heads][head_dim]: sum_j e^(s_j - maximum) v_j
  float* maxima;   // [heads]
  float* sums;     // [heads]: sum_j e^(s_j - maximum)
  float* scratch;  // 4 * count_padded floats
};

struct Path {
  const char* name;
  // Quantise rows of x [rows][columns], after RMSNorm with `norm` where it is not null.
  void (*quantize)(const float* x, int64_t columns, const float* norm, float epsilon, int block, const Activations& out,
                   int64_t first, int64_t last);
  // y[:, tile rows] for tiles first..last of the matrix, all rows of the activations. y has `stride` floats a row.
  void (*multiply)(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                   int64_t last);
  // Row `row` of the matrix as floats, [columns].
  void (*row)(const Matrix& w, int64_t row, float* out);
  void (*to_half)(const float* x, uint16_t* out, int64_t count);
  void (*attend)(const AttentionTask& task);
  void (*decode)(const DecodeTask& task);
  // See peak.inl.
  int64_t (*near_peak)(const float* x, int64_t count, float peak, float factor, float floor, int32_t* indices,
                       float* weights, double* total);
};

const Path& path();                       // the one in use
bool choose_path(const char* name);       // false when this processor or build lacks it
int known_paths(const char** names, int most);

}  // namespace edgekit
