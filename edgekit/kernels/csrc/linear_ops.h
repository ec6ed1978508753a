// Products with quantised matrices, as parts of operators and as operators.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "path.h"
#include "session.h"
#include "work.h"

namespace edgekit {
namespace {

// The attributes of a matrix, with its zero points and minima still unknown; their names begin with `prefix`.
Matrix read_matrix(const Info& info, const std::string& prefix = "") {
  Matrix w{};
  w.rows = info.integer(prefix + "N", 1, int64_t{1} << 24);
  w.columns = info.integer(prefix + "K", 1, int64_t{1} << 24);
  w.bits = static_cast<int>(info.integer(prefix + "bits", 2, 8));
  w.block = static_cast<int>(info.integer(prefix + "block", 16, 128));
  if (w.bits == 7) fail("attribute bits must be 2, 3, 4, 5, 6 or 8: got %d", w.bits);
  if (w.block == 16 && (w.bits != 6 || w.columns % 32)) {
    fail("attribute block must be 32, 64 or 128, or 16 for 6 bits and a K of whole 32: got 16, %d bits and %lld", w.bits,
         (long long)w.columns);
  }
  if (w.block < 16 || w.block & (w.block - 1)) fail("attribute block must be 32, 64 or 128: got %d", w.block);
  return w;
}

// The constants of a matrix: codes, scales, zero points and minima from input `first`, and steps. A single zero point
// means a symmetric matrix, a single minimum means none; float16 scales have a single step of one, or none in models of
// before there were steps. `tiles` differs from w.tiles() for a gated matrix, whose halves are padded apart.
void read_weights(const Info& info, size_t first, size_t steps_index, int64_t tiles, Matrix& w) {
  const int64_t entries = tiles * w.blocks() * kLanes;
  w.codes = info.constant(first, "codes", ort::kUint8, tiles * w.tile_codes()).as<uint8_t>();
  const Tensor scales = info.constant(first + 1, "scales", ort::kAny, entries);
  const bool small = scales.type == ort::kUint8;
  if (!small && scales.type != ort::kHalf) {
    fail("input scales must be of element type %d or %d: got %d", ort::kHalf, ort::kUint8, scales.type);
  }
  w.scales = scales.data;
  const Tensor zeros = info.constant(first + 2, "zeros", ort::kUint8);
  const Tensor minima = info.constant(first + 3, "minima", ort::kAny);
  if (minima.type != ort::kHalf && minima.type != ort::kInt8) {
    fail("input minima must be of element type %d or %d: got %d", ort::kHalf, ort::kInt8, minima.type);
  }
  if (minima.count() == entries) {
    w.offset = Offset::kMinimum;
    w.offsets = minima.data;
    if (minima.type != (small ? ort::kInt8 : ort::kHalf)) {
      fail("minima of element type %d do not go with scales of %d", minima.type, scales.type);
    }
  } else if (zeros.count() == entries) {
    w.offset = Offset::kZeroPoint;
    w.offsets = zeros.data;
  } else {
    w.offset = Offset::kSymmetric;
  }
  if (w.block == 16 && w.offset != Offset::kSymmetric) fail("blocks of 16 must be symmetric: got zeros or minima");
  const int zero = zeros.count() == 1 ? *zeros.as<uint8_t>() : -1;
  if (w.offset != Offset::kMinimum) {
    const auto single = [&] { return minima.type == ort::kInt8 ? *minima.as<uint8_t>() : read(minima.as<uint16_t>()); };
    if (minima.count() != 1 || single() != 0) {
      fail("minima must be %lld numbers or a single zero: got %lld", (long long)entries, (long long)minima.count());
    }
  }
  if (w.offset == Offset::kMinimum ? zero != 0 : w.offset == Offset::kSymmetric && zero != 1 << (w.bits - 1)) {
    fail("zeros must be %lld numbers, or a single %d (0 beside minima): got %lld, the first %d", (long long)entries,
         1 << (w.bits - 1), (long long)zeros.count(), zero);
  }
  const Tensor steps = info.optional_constant(steps_index, "steps");
  if (steps.data && steps.type != ort::kHalf) fail("input steps must be of element type %d: got %d", ort::kHalf, steps.type);
  if (!small) {
    constexpr uint16_t kOne = 0x3c00;
    if (steps.data && (steps.count() != 1 || read(steps.as<uint16_t>()) != kOne)) {
      fail("steps beside float16 scales must be a single one: got %lld", (long long)steps.count());
    }
    return;
  }
  const int64_t wanted = tiles * kLanes * (w.offset == Offset::kMinimum ? 2 : 1);
  if (!steps.data) fail("steps must be a constant of the model, of %lld numbers, beside scales of 8 bits", (long long)wanted);
  if (steps.count() != wanted) {
    fail("steps must be %lld numbers beside scales of 8 bits: got %lld", (long long)wanted, (long long)steps.count());
  }
  w.steps = steps.as<uint16_t>();
}

// y = x W^T + bias + residual; after RMSNorm (kNorm); or silu(gate) * up of both halves of W (kGated, after RMSNorm).
enum class Form { kPlain, kNorm, kGated };

// Where the inputs of a product stand among its operator's; the norm before the codes, which scales, zeros and minima follow.
struct Places {
  size_t codes, bias, steps;
};

template <Form kForm>
class Linear {
 public:
  static constexpr bool kNormed = kForm != Form::kPlain, kHalves = kForm == Form::kGated;

  Linear(const Info& info, Places places, const std::string& prefix = "") : w_(read_matrix(info, prefix)) {
    const int64_t activations = info.integer_or("activation_bits", 15);
    if (activations != 8 && activations != 15) fail("attribute activation_bits must be 8 or 15: got %lld", (long long)activations);
    fine_rows_ = activations == 8 ? 0 : g_fine_rows;
    if (kHalves && w_.rows % 2) fail("a gated matrix must have as many gate rows as up rows: N is %lld", (long long)w_.rows);
    width_ = kHalves ? w_.rows / 2 : w_.rows;
    tiles_ = (width_ + kLanes - 1) / kLanes;
    read_weights(info, places.codes, places.steps, kHalves ? 2 * tiles_ : tiles_, w_);
    if (kNormed) {
      epsilon_ = info.number("epsilon");
      norm_ = info.constant(places.codes - 1, "norm", ort::kFloat, w_.columns).template as<float>();
    }
    if (!kHalves) {
      const Tensor bias = info.constant(places.bias, "bias", ort::kFloat);
      if (bias.count() == w_.rows) {
        bias_ = bias.as<float>();
      } else if (bias.count() != 1 || read(bias.as<float>()) != 0.0f) {
        fail("bias must be %lld numbers or a single zero: got %lld", (long long)w_.rows, (long long)bias.count());
      }
    }
  }

  int64_t columns() const { return w_.columns; }
  int64_t width() const { return width_; }
  ort::Bytes weights() const { return {w_.codes, tiles_ * (kHalves ? 2 : 1) * w_.tile_codes()}; }

  // Rows of a tensor whose last dimension is this product's.
  int64_t rows(const Tensor& x) const {
    if (x.rank < 1 || x.dims[x.rank - 1] != w_.columns) {
      fail("the last dimension of x must be %lld: got %lld", (long long)w_.columns,
           (long long)(x.rank ? x.dims[x.rank - 1] : 0));
    }
    return x.count() / w_.columns;
  }

  // `rows` of x; residual may be null. `next` is what will be multiplied next, if that is known.
  void run(const Pool& pool, const float* x, int64_t rows, const float* residual, float* y, ort::Bytes next = {}) const {
    if (rows == 0) return;
    const int threads = rows == 1 ? g_decode_threads : g_prefill_threads;
    Activations codes{};
    codes.rows = rows;
    codes.planes = rows <= fine_rows_ ? 2 : rows <= kFineRows ? 1 : path().many_planes;
    codes.abreast = codes.planes == 1 && rows >= path().abreast ? path().abreast : 1;
    codes.blocks = w_.blocks();
    codes.width = codes.blocks * w_.block;
    const int64_t room = round_up(rows, codes.abreast);
    codes.codes = scratch<int8_t, Use::kCodes>(activation_codes(codes.planes, room, codes.width));
    codes.scales = scratch<float, Use::kScales>(room * codes.blocks);
    codes.sums = scratch<int32_t, Use::kSums>(codes.planes * room * codes.blocks);
    const size_t cuts = rows < 8 ? 1 : pieces(rows, threads, 8);
    pool.parallel(cuts, [&](size_t i) {
      path().quantize(x, w_.columns, norm_, epsilon_, w_.block, codes, share(rows, i, cuts), share(rows, i + 1, cuts));
    });
    if (next.count > 0) pool.expect(next);
    multiply(pool, codes, residual, y, threads);
  }

 private:
  // In pieces of some rows and some tiles. Some rows meet all tiles before the next rows do: they stay in a cache that way,
  // and lines of y are written side by side. Where there are many rows, a path reads tiles in pairs.
  void multiply(const Pool& pool, const Activations& x, const float* residual, float* y, int threads) const {
    const int64_t most = x.planes == 1 ? kRowsAtOnce : x.rows, chunks = (x.rows + most - 1) / most;
    const int64_t chunk = round_up((x.rows + chunks - 1) / chunks, x.abreast);
    const int64_t unit = kHalves || x.rows < 8 ? 1 : 2, units = (tiles_ + unit - 1) / unit;
    const int64_t unit_work = w_.tile_codes() * (kHalves ? 2 : unit) * chunk;
    const auto wanted = static_cast<int64_t>(pieces(units, threads, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, unit_work))));
    const int64_t bands = std::max<int64_t>(1, wanted / chunks);
    pool.parallel(static_cast<size_t>(chunks * bands), [&](size_t i) {
      const int64_t from = static_cast<int64_t>(i) / bands * chunk, to = std::min(x.rows, from + chunk);
      if (from >= to) return;
      const size_t band = i % static_cast<size_t>(bands);
      const auto tile = [&](size_t at) { return std::min(tiles_, unit * share(units, at, static_cast<size_t>(bands))); };
      const Activations some = chunks == 1 ? x : x.part(from, to);
      const Epilogue end{bias_, residual ? residual + from * width_ : nullptr, kHalves};
      uint8_t* work = scratch<uint8_t, Use::kUnpacked>(multiply_scratch(some));
      path().multiply(w_, some, end, y + from * width_, width_, tile(band), tile(band + 1), work);
    });
  }

  Matrix w_;
  int64_t fine_rows_ = 0;
  int64_t width_ = 0, tiles_ = 0;
  float epsilon_ = 0.0f;
  const float* norm_ = nullptr;
  const float* bias_ = nullptr;
};

// One product as an operator.
template <Form kForm>
class LinearOp {
  static constexpr size_t kCodes = kForm == Form::kPlain ? 1 : 2, kBias = kCodes + 4;
  static constexpr size_t kSteps = kBias + (kForm == Form::kPlain ? 2 : kForm == Form::kNorm ? 1 : 0);

 public:
  static constexpr bool kLastOptional = true;
  explicit LinearOp(const Info& info) : linear_(info, {kCodes, kBias, kSteps}) {}

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "x");
    const int64_t rows = linear_.rows(x), width = linear_.width();
    const float* residual = nullptr;
    if (kForm == Form::kPlain) {
      const Tensor added = context.input(kBias + 1, "residual");
      if (added.count() == rows * width) {
        residual = added.as<float>();
      } else if (added.count() != 1 || read(added.as<float>()) != 0.0f) {
        fail("residual must be %lld numbers or a single zero: got %lld", (long long)(rows * width), (long long)added.count());
      }
    }
    int64_t dims[6];
    std::copy(x.dims, x.dims + x.rank, dims);
    dims[x.rank - 1] = width;
    float* y = static_cast<float*>(context.output(0, dims, x.rank));
    linear_.run(context, x.as<float>(), rows, residual, y);
  }

 private:
  Linear<kForm> linear_;
};

struct QuantLinear : LinearOp<Form::kPlain> {
  using LinearOp::LinearOp;
  static constexpr const char* kName = "QuantLinear";  // x, codes, scales, zeros, minima, bias, residual, steps
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kUint8, ort::kAny,   ort::kUint8,
                                          ort::kAny,   ort::kFloat, ort::kFloat, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct NormQuantLinear : LinearOp<Form::kNorm> {
  using LinearOp::LinearOp;
  static constexpr const char* kName = "NormQuantLinear";  // x, norm, codes, scales, zeros, minima, bias, steps
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kAny,
                                          ort::kUint8, ort::kAny,   ort::kFloat, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct GatedNormQuantLinear : LinearOp<Form::kGated> {
  using LinearOp::LinearOp;
  static constexpr const char* kName = "GatedNormQuantLinear";  // x, norm, codes, scales, zeros, minima, steps
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kAny,
                                          ort::kUint8, ort::kAny,   ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

// Rows of a quantised table, as floats.
class QuantEmbedding {
 public:
  static constexpr const char* kName = "QuantEmbedding";  // ids, codes, scales, zeros, minima, steps
  static constexpr ort::Type kInputs[] = {ort::kInt64, ort::kUint8, ort::kAny, ort::kUint8, ort::kAny, ort::kHalf};
  static constexpr bool kLastOptional = true;
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit QuantEmbedding(const Info& info) : w_(read_matrix(info)) { read_weights(info, 1, 5, w_.tiles(), w_); }

  void compute(const Context& context) const {
    const Tensor ids = context.input(0, "ids");
    if (ids.rank > 5) fail("ids must have at most 5 dimensions: got %zu", ids.rank);
    int64_t dims[6];
    std::copy(ids.dims, ids.dims + ids.rank, dims);
    dims[ids.rank] = w_.columns;
    float* y = static_cast<float*>(context.output(0, dims, ids.rank + 1));
    const int64_t count = ids.count();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = read(ids.as<int64_t>() + i);
      if (id < 0 || id >= w_.rows) fail("ids must be from 0 to %lld: got %lld", (long long)(w_.rows - 1), (long long)id);
    }
    const size_t parts = pieces(count, g_prefill_threads, 16);
    context.parallel(parts, [&](size_t p) {
      for (int64_t i = share(count, p, parts); i < share(count, p + 1, parts); ++i) {
        path().row(w_, read(ids.as<int64_t>() + i), y + i * w_.columns);
      }
    });
  }

 private:
  Matrix w_;
};

}  // namespace
}  // namespace edgekit
