// The operators of domain ai.edgekit as ONNX Runtime sees them: they check shapes, split work and call the path.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "attention_ops.h"
#include "path.h"
#include "session.h"
#include "work.h"

namespace edgekit {

const OrtApi* ort::g_api = nullptr;

namespace {

using ort::Context;
using ort::fail;
using ort::Info;
using ort::Tensor;

// The attributes of a matrix, with its zero points and minima still unknown.
Matrix read_matrix(const Info& info) {
  Matrix w{};
  w.rows = info.integer("N", 1, int64_t{1} << 24);
  w.columns = info.integer("K", 1, int64_t{1} << 24);
  w.bits = static_cast<int>(info.integer("bits", 2, 8));
  w.block = static_cast<int>(info.integer("block", 32, 128));
  if (w.bits == 7) fail("attribute bits must be 2, 3, 4, 5, 6 or 8: got %d", w.bits);
  if (w.block != 32 && w.block != 64 && w.block != 128) fail("attribute block must be 32, 64 or 128: got %d", w.block);
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

enum class Form { kPlain, kNorm, kGated };

// y = x W^T + bias + residual; after RMSNorm (kNorm); or silu(gate) * up of both halves of W (kGated, after RMSNorm).
template <Form kForm>
class Linear {
  static constexpr bool kNormed = kForm != Form::kPlain, kHalves = kForm == Form::kGated;
  static constexpr size_t kWeights = kNormed ? 2 : 1;  // index of the codes
  static constexpr size_t kSteps = kWeights + (kForm == Form::kPlain ? 6 : kForm == Form::kNorm ? 5 : 4);

 public:
  static constexpr bool kLastOptional = true;
  explicit Linear(const Info& info) : w_(read_matrix(info)) {
    const int64_t activations = info.integer_or("activation_bits", 15);
    if (activations != 8 && activations != 15) fail("attribute activation_bits must be 8 or 15: got %lld", (long long)activations);
    fine_rows_ = activations == 8 ? 0 : g_fine_rows;
    if (kHalves && w_.rows % 2) fail("a gated matrix must have as many gate rows as up rows: N is %lld", (long long)w_.rows);
    width_ = kHalves ? w_.rows / 2 : w_.rows;
    tiles_ = (width_ + kLanes - 1) / kLanes;
    read_weights(info, kWeights, kSteps, kHalves ? 2 * tiles_ : tiles_, w_);
    if (kNormed) {
      epsilon_ = info.number("epsilon");
      norm_ = info.constant(1, "norm", ort::kFloat, w_.columns).template as<float>();
    }
    if (!kHalves) {
      const Tensor bias = info.constant(kWeights + 4, "bias", ort::kFloat);
      if (bias.count() == w_.rows) {
        bias_ = bias.as<float>();
      } else if (bias.count() != 1 || read(bias.as<float>()) != 0.0f) {
        fail("bias must be %lld numbers or a single zero: got %lld", (long long)w_.rows, (long long)bias.count());
      }
    }
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "x");
    if (x.rank < 1 || x.dims[x.rank - 1] != w_.columns) {
      fail("the last dimension of x must be %lld: got %lld", (long long)w_.columns,
           (long long)(x.rank ? x.dims[x.rank - 1] : 0));
    }
    const int64_t rows = x.count() / w_.columns;
    const float* residual = nullptr;
    if (kForm == Form::kPlain) {
      const Tensor added = context.input(kWeights + 5, "residual");
      if (added.count() == rows * width_) {
        residual = added.as<float>();
      } else if (added.count() != 1 || read(added.as<float>()) != 0.0f) {
        fail("residual must be %lld numbers or a single zero: got %lld", (long long)(rows * width_),
             (long long)added.count());
      }
    }
    int64_t dims[6];
    std::copy(x.dims, x.dims + x.rank, dims);
    dims[x.rank - 1] = width_;
    float* y = static_cast<float*>(context.output(0, dims, x.rank));
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
    context.parallel(cuts, [&](size_t i) {
      path().quantize(x.as<float>(), w_.columns, norm_, epsilon_, w_.block, codes, share(rows, i, cuts),
                      share(rows, i + 1, cuts));
    });
    multiply(context, codes, residual, y, threads);
  }

 private:
  // In pieces of some rows and some tiles. Some rows meet all tiles before the next rows do: they stay in a cache that way,
  // and lines of y are written side by side. Where there are many rows, a path reads tiles in pairs.
  void multiply(const Context& context, const Activations& x, const float* residual, float* y, int threads) const {
    const int64_t most = x.planes == 1 ? kRowsAtOnce : x.rows, chunks = (x.rows + most - 1) / most;
    const int64_t chunk = round_up((x.rows + chunks - 1) / chunks, x.abreast);
    const int64_t unit = kHalves || x.rows < 8 ? 1 : 2, units = (tiles_ + unit - 1) / unit;
    const int64_t unit_work = w_.tile_codes() * (kHalves ? 2 : unit) * chunk;
    const auto wanted = static_cast<int64_t>(pieces(units, threads, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, unit_work))));
    const int64_t bands = std::max<int64_t>(1, wanted / chunks);
    context.parallel(static_cast<size_t>(chunks * bands), [&](size_t i) {
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

struct QuantLinear : Linear<Form::kPlain> {
  using Linear::Linear;
  static constexpr const char* kName = "QuantLinear";  // x, codes, scales, zeros, minima, bias, residual, steps
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kUint8, ort::kAny,   ort::kUint8,
                                          ort::kAny,   ort::kFloat, ort::kFloat, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct NormQuantLinear : Linear<Form::kNorm> {
  using Linear::Linear;
  static constexpr const char* kName = "NormQuantLinear";  // x, norm, codes, scales, zeros, minima, bias, steps
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kAny,
                                          ort::kUint8, ort::kAny,   ort::kFloat, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct GatedNormQuantLinear : Linear<Form::kGated> {
  using Linear::Linear;
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

// Order positive weights and their indices by falling weight, equal weights by index.
void sort_falling(int32_t* indices, float* weights, int64_t count) {
  std::vector<uint64_t> keys(count);  // the bits of positive floats rise with their values
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, weights + i, sizeof bits);
    keys[i] = uint64_t{~bits} << 32 | static_cast<uint32_t>(indices[i]);
  }
  std::sort(keys.begin(), keys.end());
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = ~static_cast<uint32_t>(keys[i] >> 32);
    std::memcpy(weights + i, &bits, sizeof bits);
    indices[i] = static_cast<int32_t>(static_cast<uint32_t>(keys[i]));
  }
}

}  // namespace
}  // namespace edgekit

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace edgekit;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    // Too old, but every version since 1 can make a status.
    ort::g_api = base->GetApi(1);
    return ort::status(std::string("edgekit's kernels need onnxruntime 1.24 or newer: this one is ") + base->GetVersionString());
  }
  ort::g_api = api;
  static const OrtCustomOp ops[] = {ort::make_op<QuantLinear>(),          ort::make_op<NormQuantLinear>(),
                                    ort::make_op<GatedNormQuantLinear>(), ort::make_op<QuantEmbedding>(),
                                    ort::make_op<Attention>(),            ort::make_op<NormAttention>(),
                                    ort::make_op<HadamardSparseAttention>(),
                                    ort::make_op<NormHadamardSparseAttention>(),
                                    ort::make_op<AttentionInt8>(),        ort::make_op<NormAttentionInt8>(),
                                    ort::make_op<AttentionInt4>(),        ort::make_op<NormAttentionInt4>(),
                                    ort::make_op<HadamardSparseAttentionInt8>(),
                                    ort::make_op<NormHadamardSparseAttentionInt8>()};
  // One domain for all sessions of the process; onnxruntime keeps a pointer to it.
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    if (OrtStatus* bad = ort::call<OrtStatus*>(ort::CreateCustomOpDomain, "ai.edgekit", &domain)) return bad;
    for (const OrtCustomOp& op : ops) {
      if (OrtStatus* bad = ort::call<OrtStatus*>(ort::CustomOpDomain_Add, domain, &op)) return bad;
    }
  }
  return ort::call<OrtStatus*>(ort::AddCustomOpDomain, options, domain);
}

__attribute__((visibility("default"))) void edgekit_set_threads(int decode, int prefill) {
  edgekit::g_decode_threads = decode;
  edgekit::g_prefill_threads = prefill;
}

// Bits of activations of up to kFineRows rows, 8 or 15, in sessions that are made from now on.
__attribute__((visibility("default"))) void edgekit_set_activations(int bits) {
  edgekit::g_fine_rows = bits == 8 ? 0 : edgekit::kFineRows;
}

// The sum of `count` words: what a plain reading loop gets from memory.
__attribute__((visibility("default"))) uint64_t edgekit_read(const uint64_t* words, size_t count) {
  uint64_t sums[16] = {};
  for (size_t i = 0; i + 16 <= count; i += 16) {
    for (int k = 0; k < 16; ++k) sums[k] += words[i + k];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

// What peak.inl finds, on request by falling weight and then by index; `sums` gets the running sums of the weights.
__attribute__((visibility("default"))) int64_t edgekit_near_peak(const float* x, int64_t count, float peak, float factor,
                                                                 float floor, int falling, int32_t* indices,
                                                                 float* weights, double* sums, double* total) {
  const int64_t found = edgekit::path().near_peak(x, count, peak, factor, floor, indices, weights, total);
  if (falling) edgekit::sort_falling(indices, weights, found);
  double sum = 0.0;
  for (int64_t i = 0; i < found; ++i) sums[i] = sum += weights[i];
  return found;
}

__attribute__((visibility("default"))) const char* edgekit_path() { return edgekit::path().name; }

__attribute__((visibility("default"))) int edgekit_choose_path(const char* name) { return edgekit::choose_path(name); }

__attribute__((visibility("default"))) int edgekit_known_paths(const char** names, int most) {
  return edgekit::known_paths(names, most);
}

}  // extern "C"
