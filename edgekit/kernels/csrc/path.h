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

// Bits of the low plane of codes: 2 = 2, 3 = 2 + 1, 4 = 4, 5 = 4 + 1, 6 = 4 + 2, 8 = 8.
constexpr int low_bits(int bits) { return bits < 4 ? 2 : bits < 8 ? 4 : 8; }

enum class Offset { kSymmetric, kZeroPoint, kMinimum };

// A quantised matrix in tiles of 16 rows; the last tile is padded with rows of zeros.
//
//   codes    [tiles][blocks][16 * block * bits / 8]. A group of 32 columns has 8 runs of 64 codes: run k holds columns
//            4k..4k+3 of row 0, then of row 1 ... The low low_bits(bits) bits of all codes come first, then the rest of
//            their bits. A plane of F bits is F lines of 64 bytes; line i holds the runs i, i + F, i + 2F ..., the first
//            in the lowest F bits of each byte.
//            A block is a number of groups, or half a group where codes are symmetric and have 6 bits.
//   scales   [tiles][blocks][16] float16, or uint8 where there are steps
//   offsets  kZeroPoint: [tiles][blocks][16] uint8; kMinimum: as scales, but int8 for uint8; kSymmetric: none
//   steps    [tiles][1][16] float16, the value of a unit of a row's scales; [tiles][2][16] with minima, theirs last
//
// The value of code q is scale * (q - zero point), or scale * q + minimum; the symmetric zero point is 2^(bits-1).
struct Matrix {
  const uint8_t* codes;
  const void* scales;
  const void* offsets;
  Offset offset;
  int bits;
  int block;
  int64_t rows;
  int64_t columns;
  const uint16_t* steps = nullptr;
  // Always inline, here and below: the linker keeps one copy of a function, and that may be for another processor.
  // A block is a power of two, and a division for each tile was a twentieth of decoding.
  [[gnu::always_inline]] int64_t blocks() const { return (columns + block - 1) >> __builtin_ctz(static_cast<unsigned>(block)); }
  [[gnu::always_inline]] int64_t tiles() const { return (rows + kLanes - 1) / kLanes; }
  [[gnu::always_inline]] int64_t tile_codes() const { return blocks() * kLanes * block * bits / 8; }
};

// Rows of activations as integers: value = scale * q within a block, where q is an 8-bit code (one plane), or
// kPlane * high + low of two (two planes): 15 bits, for twice the dot products. Sums are of a block's codes.
//
// Rows of one plane may stand `abreast`, so that one pointer serves them: 4 columns of the first row, of the second ..., then
// the next 4 columns; scales and sums likewise, block by block.
//
// Or as bfloat16 (no plane), on a path with `many_planes` of 0: squares of 16 rows and 32 columns, row by row, the squares
// of the first 16 rows first. `codes` then holds activation_codes(...) bytes and the others nothing.
struct Activations {
  int8_t* codes;   // [planes][rows][blocks * block], the high plane first; [rows / abreast][blocks * block / 4][abreast][4]
  float* scales;   // [rows][blocks]; [rows / abreast][blocks][abreast]
  int32_t* sums;   // [planes][rows][blocks]; as scales
  int planes;
  int64_t rows;
  int64_t width;   // blocks * block
  int64_t blocks;
  int abreast = 1;
  // Rows from..to, which are all unless there is one plane, `from` a multiple of `abreast`.
  [[gnu::always_inline]] Activations part(int64_t from, int64_t to) const {
    Activations some = *this;
    some.codes += from * width;
    some.scales += from * blocks;
    some.sums += from * blocks;
    some.rows = to - from;
    return some;
  }
};

constexpr int kSquares = 2;  // of 16 rows, multiplied at once
constexpr int64_t kPanel = 512;  // columns of unpacked weights that stay in the first cache

constexpr int64_t padded_rows(int64_t rows) { return (rows + kSquares * kLanes - 1) / (kSquares * kLanes) * kSquares * kLanes; }

constexpr int64_t activation_codes(int planes, int64_t rows, int64_t width) {
  return planes ? planes * rows * width : 2 * padded_rows(rows) * width;
}

// Of two tiles: a panel of weights, as bfloat16 or as bytes beside what scales and shifts each block, and the products of all
// rows as floats.
constexpr int64_t multiply_scratch(const Activations& x) {
  if (x.planes != 0 && x.abreast == 1) return 0;
  return 64 + 2 * kLanes * (2 * kPanel + 4 * padded_rows(x.rows));
}

// What happens to a product before it is stored.
struct Epilogue {
  const float* bias;      // [rows of the matrix] or null
  const float* residual;  // [activation rows][stride] or null
  bool gated;             // tiles come in pairs (gate, up); silu(gate) * up is stored
};

// Keys or values of one key-value head, [positions][head_dim]: float16, or whole numbers that a float16 scale a row
// multiplies. Of 8 bits they are -127..127; of 4 bits -8..7, plus 8, of Hadamard-transformed rows, and byte i of a row
// holds channel i in its low half and channel i + head_dim / 2 in its high half.
struct Rows {
  const void* data;
  const uint16_t* scales;  // null: data are float16
  int bits;                // 16, 8 or 4
  [[gnu::always_inline]] int64_t bytes(int64_t head_dim) const { return head_dim * bits / 8; }
  [[gnu::always_inline]] Rows from(int64_t position, int64_t head_dim) const {
    return {static_cast<const uint8_t*>(data) + position * bytes(head_dim), scales ? scales + position : nullptr, bits};
  }
  // Send for a row, which takes as long as dozens of rows do to compute.
  [[gnu::always_inline]] void fetch(int64_t position, int64_t head_dim) const {
    const Rows row = from(position, head_dim);
    for (int64_t c = 0; c < bytes(head_dim); c += 64) __builtin_prefetch(static_cast<const uint8_t*>(row.data) + c, 0, 2);
    if (scales) __builtin_prefetch(row.scales, 0, 2);
  }
};

constexpr int64_t kKeyBlock = 64;  // keys that many tokens attend to at once

// The query heads of one key-value head, many tokens: see attention.inl. Lengths are in elements.
struct AttentionTask {
  const float* q;  // [tokens][q_stride]: rotated queries of the group's heads, heads * head_dim of each row
  Rows keys;
  Rows values;
  float* out;      // as q
  int64_t q_stride;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t first;   // position of the first token
  int64_t window;  // attend to the last `window` positions only; 0: to all
  float scale;
  float* scratch;  // attention_scratch(...) floats
  const int32_t* blocks = nullptr;  // of kKeyBlock keys, to attend to no others, in ascending order; null: all
  int64_t block_count = 0;
};

constexpr int64_t attention_scratch(int64_t tokens, int64_t heads, int64_t head_dim) {
  const int64_t rows = (tokens * heads + kLanes - 1) / kLanes * kLanes;
  return 2 * kKeyBlock * head_dim + 2 * kKeyBlock * kLanes + rows * (2 * head_dim + 3) + kLanes;
}

// The same for one token and a stretch of the cache; leaves sums that several stretches can be joined from.
struct DecodeTask {
  const float* q;  // [heads][head_dim], rotated
  Rows keys;       // [count]
  Rows values;
  int64_t count;
  int64_t count_padded;  // the next multiple of 16
  int64_t heads;
  int64_t head_dim;
  float scale;
  float* out;      // [heads][head_dim]: sum_j e^(s_j - maximum) v_j
  float* maxima;   // [heads]
  float* sums;     // [heads]: sum_j e^(s_j - maximum)
  float* scratch;  // 4 * count_padded floats
  const int32_t* at = nullptr;  // which rows of keys and values, [count]; null: the first ones
};

constexpr int64_t kPageTokens = 16;    // positions that share a mean value
constexpr int64_t kBlockTokens = 256;  // positions whose codes stand together
// A block's mean values: whole numbers, as in `Rows`, and then the scales of its 16 pages. Sixteen channels are four lines of
// 64 bytes: byte 4 * lane + k of line r holds channel `lane` of page 4r + k.
constexpr int64_t mean_bytes(int64_t head_dim) { return kLanes * (head_dim + 2); }

// How keys of one key-value head become codes, and queries integers: see sparse.inl.
struct KeyCoder {
  const float* center;   // [head_dim]
  const float* encoder;  // [head_dim][channels]
  const float* decoder;  // [head_dim][channels]
  int64_t head_dim;
  int64_t channels;      // that have a code, a multiple of 16
  int64_t fine;          // of those, with four bits; the others have two
};

// Logarithms of weights are whole numbers of kGrains to a power of two. That of 2^n (1 + f) is kGrains * (n + 127 + f), which
// are bits of a float; 0 stands for no weight.
constexpr int32_t kGrains = 256;
constexpr int kLogShift = 15;       // from such a logarithm to the bits of a float
constexpr int32_t kLeastShare = -63;  // powers of two: shares that are smaller count as none

// Where a place stands among the logarithms: sixteen of the next tile lie between those of a tile, so that 32 bits hold two.
[[gnu::always_inline]] inline int64_t stored(int64_t place) {
  return place / (2 * kLanes) * (2 * kLanes) + place % kLanes * 2 + place / kLanes % 2;
}
[[gnu::always_inline]] inline float weight_of(uint16_t log) {
  const uint32_t bits = uint32_t{log} << kLogShift;
  float weight;
  __builtin_memcpy(&weight, &bits, sizeof weight);
  return weight;
}

// Hadamard sparse attention over the query heads of one key-value head, for the blocks first_block..last_block of the
// cache. `estimate` fills logs, references and sums. When the gains of all blocks are known, weight * gain being a
// position's share of the whole, `select` chooses what is attended otherwise, and `weigh` sums up what is left in the pages.
struct SparseTask {
  const int8_t* q_codes;    // [heads][channels]
  const float* factors;     // [heads]
  const float* constants;   // [heads]
  const uint8_t* codes;     // [blocks][16][4 * head_dim]
  const uint8_t* means;     // [blocks][mean_bytes]
  int64_t heads;
  int64_t head_dim;
  int64_t channels;
  int64_t fine;
  int64_t first_block;
  int64_t last_block;
  int64_t blocks;           // in all
  int64_t sinks;            // positions below are no candidates
  int64_t recent;           // nor are those from here on
  int64_t stride;           // positions of all blocks
  uint16_t* logs;           // [heads][stride]: of weights, as `stored` says
  float* page_weights;      // [heads][blocks][16]: the sums of each page's weights
  float* references;        // [heads][blocks]
  float* sums;              // [heads][blocks]
  const float* gains;       // [heads][blocks]
  const uint16_t* lowered;  // [heads][blocks]: a log less this is a share's, above kLeastShare
  float* totals;            // [heads]
  float* out;               // [heads][head_dim]
};

// What `select` is to choose, and where it leaves it. A place is where a position stands in the order of tiles. Up to 16 more
// places may be written than are found.
struct SparseChoice {
  int64_t exact_count;
  int64_t following_count;
  int32_t* shares;         // [stride + 16]: logarithms, to work in
  int32_t* places;         // [stride + 16], to work in
  int32_t* exact;          // [exact_count + 16]
  int32_t* following;      // [following_count + 16]
  int64_t* exact_found;
  int64_t* following_found;
};

struct Path {
  const char* name;
  // In how many planes it wants many rows of activations: 1, or 0 for bfloat16.
  int many_planes;
  // How many rows of one plane it wants abreast, where there are as many.
  int abreast;
  // Quantise rows of x [rows][columns], after RMSNorm with `norm` where it is not null.
  void (*quantize)(const float* x, int64_t columns, const float* norm, float epsilon, int block, const Activations& out,
                   int64_t first, int64_t last);
  // y[:, tile rows] for tiles first..last of the matrix, all rows of the activations. y has `stride` floats a row, `work`
  // multiply_scratch(x) bytes.
  void (*multiply)(const Matrix& w, const Activations& x, const Epilogue& end, float* y, int64_t stride, int64_t first,
                   int64_t last, uint8_t* work);
  // Row `row` of the matrix as floats, [columns].
  void (*row)(const Matrix& w, int64_t row, float* out);
  void (*to_half)(const float* x, uint16_t* out, int64_t count);
  void (*attend)(const AttentionTask& task);
  void (*decode)(const DecodeTask& task);
  // See sparse.inl.
  void (*encode)(const KeyCoder& coder, const Rows& keys, int64_t count, int64_t position, uint8_t* codes);
  void (*encode_query)(const KeyCoder& coder, const float* q, float scale, float* spread, int8_t* codes, float* factor,
                       float* constant);
  void (*estimate)(const SparseTask& task);
  // The sum of the blocks' sums, each times 2^(reference - most); `most` becomes the largest reference.
  float (*add_blocks)(const float* references, const float* sums, int64_t blocks, float* most);
  // What makes weights shares of a whole, whose logarithm to base 2 is `whole`.
  void (*find_gains)(const float* references, int64_t blocks, float whole, float* gains, uint16_t* lowered);
  void (*select)(const SparseTask& task, const SparseChoice& choice);
  void (*weigh)(const SparseTask& task);
  // The mean of `count` rows, as page `page` of a block's means; and out[h] += sum_i weights[h][i] * rows[at[i]], with
  // `stride` weights a head.
  void (*mean)(const Rows& rows, int64_t count, int64_t head_dim, int64_t page, uint8_t* means);
  void (*gather)(const Rows& rows, const int32_t* at, int64_t count, int64_t heads, const float* weights, int64_t stride,
                 int64_t head_dim, float* out);
  // A row as whole numbers of 8 or 4 bits, as in `Rows`; returns their scale.
  uint16_t (*round_row)(const float* x, int64_t count, int bits, uint8_t* codes);
  // Rows of `head_dim`, each run of as many channels as the largest power of two in head_dim times the normalised
  // Hadamard matrix.
  void (*hadamard)(float* x, int64_t rows, int64_t head_dim);
  // See adamas.inl: planes of a key or query; the weights of blocks by their codes' distances.
  void (*planes)(float* x, int64_t head_dim, float threshold, uint8_t* out);
  void (*distances)(const SparseTask& task);
  // See peak.inl.
  int64_t (*near_peak)(const float* x, int64_t count, float peak, float factor, float floor, int32_t* indices,
                       float* weights, double* total);
};

const Path& path();                       // the one in use
bool choose_path(const char* name);       // false when this processor or build lacks it
int known_paths(const char** names, int most);

}  // namespace edgekit
