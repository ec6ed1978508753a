// The operators of domain ai.edgekit as ONNX Runtime sees them: they check shapes, split work and call the path.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "path.h"
#include "session.h"

namespace edgekit {

const OrtApi* ort::g_api = nullptr;

namespace {

using ort::Context;
using ort::fail;
using ort::Info;
using ort::Tensor;

int g_decode_threads = 1, g_prefill_threads = 1;

// Up to so many rows activations have 15 bits: decoding waits for the weights, so the second dot product is free there.
constexpr int64_t kFineRows = 64;

// What scratch memory is for; pieces for different uses may be held at the same time.
enum class Use { kCodes, kScales, kSums, kQueries, kPartials, kScores };

// Memory of one thread that grows and stays, so that no step allocates.
template <class T, Use>
T* scratch(size_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// How many pieces to cut `units` of work into: a few a thread, so that none waits long for another.
size_t pieces(int64_t units, int threads, int64_t least_units) {
  if (threads <= 1) return 1;
  return static_cast<size_t>(std::clamp<int64_t>(units / least_units, 1, 4 * threads));
}

int64_t share(int64_t units, size_t piece, size_t pieces) {
  return units * static_cast<int64_t>(piece) / static_cast<int64_t>(pieces);
}

// The attributes of a matrix, with its zero points and minima still unknown.
Matrix read_matrix(const Info& info) {
  Matrix w{};
  w.rows = info.integer("N", 1, int64_t{1} << 24);
  w.columns = info.integer("K", 1, int64_t{1} << 24);
  w.bits = static_cast<int>(info.integer("bits", 4, 8));
  w.block = static_cast<int>(info.integer("block", 32, 128));
  if (w.bits != 4 && w.bits != 8) fail("attribute bits must be 4 or 8: got %d", w.bits);
  if (w.block != 32 && w.block != 64 && w.block != 128) fail("attribute block must be 32, 64 or 128: got %d", w.block);
  return w;
}

// The constants of a matrix from input `first`: codes, scales, zero points, minima. A single zero point means a
// symmetric matrix, a single minimum means none. `tiles` differs from w.tiles() for a gated matrix, whose halves are
// padded apart.
void read_weights(const Info& info, size_t first, int64_t tiles, Matrix& w) {
  const int64_t entries = tiles * w.blocks() * kLanes;
  w.codes = info.constant(first, "codes", ort::kUint8, tiles * w.tile_codes()).as<uint8_t>();
  w.scales = info.constant(first + 1, "scales", ort::kHalf, entries).as<uint16_t>();
  const Tensor zeros = info.constant(first + 2, "zeros", ort::kUint8);
  const Tensor minima = info.constant(first + 3, "minima", ort::kHalf);
  if (minima.count() == entries) {
    w.offset = Offset::kMinimum;
    w.offsets = minima.data;
  } else if (zeros.count() == entries) {
    w.offset = Offset::kZeroPoint;
    w.offsets = zeros.data;
  } else {
    w.offset = Offset::kSymmetric;
  }
  const int zero = zeros.count() == 1 ? *zeros.as<uint8_t>() : -1;
  if (w.offset != Offset::kMinimum && (minima.count() != 1 || read(minima.as<uint16_t>()) != 0)) {
    fail("minima must be %lld numbers or a single zero: got %lld", (long long)entries, (long long)minima.count());
  }
  if (w.offset == Offset::kMinimum ? zero != 0 : w.offset == Offset::kSymmetric && zero != 1 << (w.bits - 1)) {
    fail("zeros must be %lld numbers, or a single %d (0 beside minima): got %lld, the first %d", (long long)entries,
         1 << (w.bits - 1), (long long)zeros.count(), zero);
  }
}

enum class Form { kPlain, kNorm, kGated };

// y = x W^T + bias + residual; after RMSNorm (kNorm); or silu(gate) * up of both halves of W (kGated, after RMSNorm).
template <Form kForm>
class Linear {
  static constexpr bool kNormed = kForm != Form::kPlain, kHalves = kForm == Form::kGated;
  static constexpr size_t kWeights = kNormed ? 2 : 1;  // index of the codes

 public:
  explicit Linear(const Info& info) : w_(read_matrix(info)) {
    if (kHalves && w_.rows % 2) fail("a gated matrix must have as many gate rows as up rows: N is %lld", (long long)w_.rows);
    width_ = kHalves ? w_.rows / 2 : w_.rows;
    tiles_ = (width_ + kLanes - 1) / kLanes;
    read_weights(info, kWeights, kHalves ? 2 * tiles_ : tiles_, w_);
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
    codes.planes = rows <= kFineRows ? 2 : 1;
    codes.blocks = w_.blocks();
    codes.width = codes.blocks * w_.block;
    codes.codes = scratch<int8_t, Use::kCodes>(codes.planes * rows * codes.width);
    codes.scales = scratch<float, Use::kScales>(rows * codes.blocks);
    codes.sums = scratch<int32_t, Use::kSums>(codes.planes * rows * codes.blocks);
    const size_t cuts = rows < 8 ? 1 : pieces(rows, threads, 8);
    context.parallel(cuts, [&](size_t i) {
      path().quantize(x.as<float>(), w_.columns, norm_, epsilon_, w_.block, codes, share(rows, i, cuts),
                      share(rows, i + 1, cuts));
    });
    const Epilogue end{bias_, residual, kHalves};
    const int64_t tile_work = w_.tile_codes() * (kHalves ? 2 : 1) * rows;
    const size_t parts = pieces(tiles_, threads, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, tile_work)));
    context.parallel(parts, [&](size_t i) {
      path().multiply(w_, codes, end, y, width_, share(tiles_, i, parts), share(tiles_, i + 1, parts));
    });
  }

 private:
  Matrix w_;
  int64_t width_ = 0, tiles_ = 0;
  float epsilon_ = 0.0f;
  const float* norm_ = nullptr;
  const float* bias_ = nullptr;
};

struct QuantLinear : Linear<Form::kPlain> {
  using Linear::Linear;
  static constexpr const char* kName = "QuantLinear";  // x, codes, scales, zeros, minima, bias, residual
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kUint8, ort::kHalf, ort::kUint8,
                                          ort::kHalf,  ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct NormQuantLinear : Linear<Form::kNorm> {
  using Linear::Linear;
  static constexpr const char* kName = "NormQuantLinear";  // x, norm, codes, scales, zeros, minima, bias
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kHalf,
                                          ort::kUint8, ort::kHalf,  ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

struct GatedNormQuantLinear : Linear<Form::kGated> {
  using Linear::Linear;
  static constexpr const char* kName = "GatedNormQuantLinear";  // x, norm, codes, scales, zeros, minima
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kHalf, ort::kUint8, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};
};

// Rows of a quantised table, as floats.
class QuantEmbedding {
 public:
  static constexpr const char* kName = "QuantEmbedding";  // ids, codes, scales, zeros, minima
  static constexpr ort::Type kInputs[] = {ort::kInt64, ort::kUint8, ort::kHalf, ort::kUint8, ort::kHalf};
  static constexpr ort::Type kOutputs[] = {ort::kFloat};

  explicit QuantEmbedding(const Info& info) : w_(read_matrix(info)) { read_weights(info, 1, w_.tiles(), w_); }

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

// Rotary embedding, cache append and exact attention; with RMSNorm of each query and key head before the rotation
// where kNormed. The cache's buffers may be both past and present.
template <bool kNormed>
class Attend {
 public:
  explicit Attend(const Info& info) {
    kv_heads_ = info.integer("kv_num_heads", 1, 1024);
    const int64_t heads = info.integer("num_heads", 1, 1024);
    head_dim_ = info.integer("head_dim", kLanes, 1024);
    window_ = info.integer("local_window_size", -1, int64_t{1} << 31);
    if (heads % kv_heads_) fail("num_heads must be a multiple of kv_num_heads: got %lld and %lld", (long long)heads, (long long)kv_heads_);
    if (head_dim_ % kLanes) fail("head_dim must be a multiple of 16: got %lld", (long long)head_dim_);
    group_ = heads / kv_heads_;
    if (window_ == 0) fail("attribute local_window_size must be -1 or at least 1: got 0");
    if (window_ < 0) window_ = 0;
    if (kNormed) {
      epsilon_ = info.number("epsilon");
      q_norm_ = info.constant(6, "q_norm", ort::kFloat, head_dim_).template as<float>();
      k_norm_ = info.constant(7, "k_norm", ort::kFloat, head_dim_).template as<float>();
    }
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "qkv"), past_keys = context.input(1, "past_key"),
                 past_values = context.input(2, "past_value"), last = context.input(3, "last"),
                 cosine = context.input(4, "cos"), sine = context.input(5, "sin");
    const int64_t d = head_dim_, q_width = kv_heads_ * group_ * d, width = q_width + 2 * kv_heads_ * d;
    if (x.rank != 3 || x.dims[0] != 1 || x.dims[2] != width) {
      fail("qkv must have shape (1, tokens, %lld): got %s; batches are not supported", (long long)width,
           x.shape().c_str());
    }
    const int64_t tokens = x.dims[1], cache = past_keys.rank == 4 ? past_keys.dims[2] : 0;
    for (const auto& [name, past] : {std::pair{"past_key", &past_keys}, {"past_value", &past_values}}) {
      if (past->rank != 4 || past->dims[0] != 1 || past->dims[1] != kv_heads_ || past->dims[2] != cache || past->dims[3] != d) {
        fail("%s must have shape (1, %lld, length, %lld): got %s", name, (long long)kv_heads_, (long long)d,
             past->shape().c_str());
      }
    }
    if (last.count() != 1) fail("the index of the last token must be one number: got %lld", (long long)last.count());
    const int64_t total = int64_t{read(last.as<int32_t>())} + 1, first = total - tokens;
    if (first < 0 || total > cache) {
      fail("tokens %lld to %lld must lie in the cache of %lld", (long long)first, (long long)total - 1, (long long)cache);
    }
    for (const auto& [name, table] : {std::pair{"cos", &cosine}, {"sin", &sine}}) {
      if (table->rank != 2 || table->dims[0] < total || table->dims[1] != d / 2) {
        fail("%s must have shape (at least %lld, %lld): got %s", name, (long long)total, (long long)(d / 2),
             table->shape().c_str());
      }
    }
    const int64_t dims[3] = {1, tokens, q_width};
    float* out = static_cast<float*>(context.output(0, dims, 3));
    uint16_t* keys = append(context, 1, past_keys);
    uint16_t* values = append(context, 2, past_values);
    if (tokens == 0) return;

    float* q = scratch<float, Use::kQueries>(tokens * (q_width + kv_heads_ * d));
    float* rotated_keys = q + tokens * q_width;
    const int threads = tokens == 1 ? g_decode_threads : g_prefill_threads;
    const size_t cuts = pieces(tokens, threads, 8);
    context.parallel(cuts, [&](size_t i) {
      for (int64_t t = share(tokens, i, cuts); t < share(tokens, i + 1, cuts); ++t) {
        const float* row = x.as<float>() + t * width;
        const float* c = cosine.as<float>() + (first + t) * (d / 2);
        const float* s = sine.as<float>() + (first + t) * (d / 2);
        for (int64_t h = 0; h < kv_heads_ * group_; ++h) rotate(row + h * d, c, s, q_norm_, q + t * q_width + h * d);
        for (int64_t h = 0; h < kv_heads_; ++h) {
          float* key = rotated_keys + (t * kv_heads_ + h) * d;
          rotate(row + q_width + h * d, c, s, k_norm_, key);
          path().to_half(key, keys + (h * cache + first + t) * d, d);
          path().to_half(row + q_width + (kv_heads_ + h) * d, values + (h * cache + first + t) * d, d);
        }
      }
    });
    if (tokens == 1) {
      decode(context, q, keys, values, cache, total, out);
    } else {
      prefill(context, q, keys, values, cache, first, tokens, out);
    }
  }

 private:
  // The present buffer, holding what the past one holds.
  static uint16_t* append(const Context& context, size_t index, const Tensor& past) {
    void* present = context.output(index, past.dims, 4);
    if (present != past.data) std::memcpy(present, past.data, past.count() * sizeof(uint16_t));
    return static_cast<uint16_t*>(present);
  }

  // Norm where there is one, then the rotation of halves.
  void rotate(const float* x, const float* c, const float* s, const float* norm, float* out) const {
    const int64_t half = head_dim_ / 2;
    float gain = 1.0f;
    if (norm) {
      float total = 0.0f;
      for (int64_t i = 0; i < head_dim_; ++i) total += x[i] * x[i];
      gain = 1.0f / std::sqrt(total / static_cast<float>(head_dim_) + epsilon_);
    }
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i] * (norm ? gain * read(norm + i) : 1.0f);
      const float b = x[half + i] * (norm ? gain * read(norm + half + i) : 1.0f);
      out[i] = a * read(c + i) - b * read(s + i);
      out[half + i] = b * read(c + i) + a * read(s + i);
    }
  }

  void prefill(const Context& context, const float* q, const uint16_t* keys, const uint16_t* values, int64_t cache,
               int64_t first, int64_t tokens, float* out) const {
    constexpr int64_t kTokens = 64;
    const int64_t parts = (tokens + kTokens - 1) / kTokens, width = kv_heads_ * group_ * head_dim_;
    context.parallel(static_cast<size_t>(kv_heads_ * parts), [&](size_t i) {
      // The last tokens see the most keys: they begin first.
      const int64_t head = static_cast<int64_t>(i) % kv_heads_, part = parts - 1 - static_cast<int64_t>(i) / kv_heads_;
      AttentionTask task{};
      task.tokens = std::min(kTokens, tokens - part * kTokens);
      const int64_t at = part * kTokens * width + head * group_ * head_dim_;
      task.q = q + at;
      task.out = out + at;
      task.q_stride = width;
      task.keys = keys + head * cache * head_dim_;
      task.values = values + head * cache * head_dim_;
      task.heads = group_;
      task.head_dim = head_dim_;
      task.first = first + part * kTokens;
      task.window = window_;
      task.scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
      task.scratch = scratch<float, Use::kScores>(attention_scratch(kTokens, group_, head_dim_));
      path().attend(task);
    });
  }

  // One token: the cache is cut into stretches, and the stretches' sums are joined.
  void decode(const Context& context, const float* q, const uint16_t* keys, const uint16_t* values, int64_t cache,
              int64_t total, float* out) const {
    const int64_t d = head_dim_, from = window_ > 0 ? std::max<int64_t>(0, total - window_) : 0, length = total - from;
    // Stretches depend on the length alone, so that results do not depend on the number of threads.
    const int64_t stretches = std::clamp<int64_t>(length / 128, 1, 16), parts = kv_heads_ * stretches;
    float* joined = scratch<float, Use::kPartials>(static_cast<size_t>(parts * group_ * (d + 2)));
    const bool small = g_decode_threads <= 1 || length * kv_heads_ < 96;
    auto work = [&](int64_t i) {
      const int64_t head = i / stretches, stretch = i % stretches;
      const int64_t begin = from + length * stretch / stretches, end = from + length * (stretch + 1) / stretches;
      DecodeTask task{};
      task.q = q + head * group_ * d;
      task.keys = keys + (head * cache + begin) * d;
      task.values = values + (head * cache + begin) * d;
      task.count = end - begin;
      task.count_padded = (task.count + kLanes - 1) / kLanes * kLanes;
      task.heads = group_;
      task.head_dim = d;
      task.scale = 1.0f / std::sqrt(static_cast<float>(d));
      task.out = joined + i * group_ * (d + 2);
      task.maxima = task.out + group_ * d;
      task.sums = task.maxima + group_;
      task.scratch = scratch<float, Use::kScores>(static_cast<size_t>(4 * task.count_padded));
      path().decode(task);
    };
    if (small) {
      for (int64_t i = 0; i < parts; ++i) work(i);
    } else {
      context.parallel(static_cast<size_t>(parts), [&](size_t i) { work(static_cast<int64_t>(i)); });
    }
    for (int64_t head = 0; head < kv_heads_; ++head) {
      for (int64_t h = 0; h < group_; ++h) join(joined + head * stretches * group_ * (d + 2), stretches, h, out + (head * group_ + h) * d);
    }
  }

  void join(const float* parts, int64_t stretches, int64_t h, float* out) const {
    const int64_t d = head_dim_, size = group_ * (d + 2);
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < stretches; ++i) top = std::max(top, parts[i * size + group_ * d + h]);
    std::fill(out, out + d, 0.0f);
    for (int64_t i = 0; i < stretches; ++i) {
      const float* part = parts + i * size;
      const float weight = std::exp(part[group_ * d + h] - top);
      total += weight * part[group_ * (d + 1) + h];
      for (int64_t c = 0; c < d; ++c) out[c] += weight * part[h * d + c];
    }
    for (int64_t c = 0; c < d; ++c) out[c] /= total;
  }

  int64_t kv_heads_, group_, head_dim_, window_;
  float epsilon_ = 0.0f;
  const float* q_norm_ = nullptr;
  const float* k_norm_ = nullptr;
};

struct Attention : Attend<false> {
  using Attend::Attend;
  static constexpr const char* kName = "Attention";  // qkv, past_key, past_value, last, cos, sin
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf, ort::kHalf, ort::kInt32, ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf};
};

struct NormAttention : Attend<true> {
  using Attend::Attend;
  static constexpr const char* kName = "NormAttention";  // ... q_norm, k_norm
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf,  ort::kHalf,  ort::kInt32,
                                          ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf};
};

}  // namespace
}  // namespace edgekit

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace edgekit;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    // Too old for version 18, but every version since 1 can make a status.
    ort::g_api = base->GetApi(1);
    return ort::status(std::string("edgekit's kernels need onnxruntime 1.18 or newer: this one is ") + base->GetVersionString());
  }
  ort::g_api = api;
  static const OrtCustomOp ops[] = {ort::make_op<QuantLinear>(),          ort::make_op<NormQuantLinear>(),
                                    ort::make_op<GatedNormQuantLinear>(), ort::make_op<QuantEmbedding>(),
                                    ort::make_op<Attention>(),            ort::make_op<NormAttention>()};
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

__attribute__((visibility("default"))) int64_t edgekit_near_peak(const float* x, int64_t count, float peak, float factor,
                                                                 float floor, int32_t* indices, float* weights,
                                                                 double* total) {
  return edgekit::path().near_peak(x, count, peak, factor, floor, indices, weights, total);
}

__attribute__((visibility("default"))) const char* edgekit_path() { return edgekit::path().name; }

__attribute__((visibility("default"))) int edgekit_choose_path(const char* name) { return edgekit::choose_path(name); }

__attribute__((visibility("default"))) int edgekit_known_paths(const char** names, int most) {
  return edgekit::known_paths(names, most);
}

}  // extern "C"
