// The attention operators: rotation, cache append, and attention over the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "order.h"
#include "path.h"
#include "prefill.h"
#include "select.h"
#include "session.h"
#include "work.h"

namespace edgekit {
namespace {

// Which of the operators: with RMSNorm of each query and key head before the rotation; sparse, where one token attends to
// the positions that small codes of the keys find (docs/sparse-attention.md); with a cache of 16, 8 or 4 bits.
struct AttentionForm {
  bool normed, sparse;
  int bits;
  [[nodiscard]] bool whole() const { return bits < 16; }
};

// Rotary embedding, cache append and exact or sparse attention. The cache's buffers may be both past and present.
//
// Inputs: qkv, past_key, past_value, [past_scales], [past_codes, past_means], last, cos, sin,
//         [center, encoder, decoder, budget], [q_norm, k_norm]; outputs: y and the present of what is past.
class Attend {
 public:
  // `before`: where past_key stands, less its place above.
  explicit Attend(const Info& info, AttentionForm form, size_t before = 0) : form_(form), before_(before) {
    kv_heads_ = info.integer("kv_num_heads", 1, 1024);
    const int64_t heads = info.integer("num_heads", 1, 1024);
    head_dim_ = info.integer("head_dim", kLanes, Selection::kWidest);
    window_ = info.integer("local_window_size", -1, int64_t{1} << 31);
    if (heads % kv_heads_) fail("num_heads must be a multiple of kv_num_heads: got %lld and %lld", (long long)heads, (long long)kv_heads_);
    const int64_t step = form_.bits == 4 ? 2 * kLanes : kLanes;
    if (head_dim_ % step) fail("head_dim must be a multiple of %lld: got %lld", (long long)step, (long long)head_dim_);
    group_ = heads / kv_heads_;
    if (window_ == 0) fail("attribute local_window_size must be -1 or at least 1: got 0");
    if (window_ < 0) window_ = 0;
    if (form_.sparse) read_sparse(info);
    if (form_.normed) {
      const size_t norms = before_ + sine_input() + (form_.sparse ? 5 : 1);
      epsilon_ = info.number("epsilon");
      q_norm_ = info.constant(norms, "q_norm", ort::kFloat, head_dim_).as<float>();
      k_norm_ = info.constant(norms + 1, "k_norm", ort::kFloat, head_dim_).as<float>();
    }
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "qkv");
    if (x.rank != 3 || x.dims[0] != 1 || x.dims[2] != width()) {
      fail("qkv must have shape (1, tokens, %lld): got %s; batches are not supported", (long long)width(),
           x.shape().c_str());
    }
    const Task task = prepare(context, x.dims[1]);
    const int64_t dims[3] = {1, task.tokens, mixed_width()};
    run(context, task, x.as<float>(), static_cast<float*>(context.output(0, dims, 3)));
  }

  int64_t mixed_width() const { return kv_heads_ * group_ * head_dim_; }
  int64_t width() const { return mixed_width() + 2 * kv_heads_ * head_dim_; }

  // What a run reads beside q, k and v, and the caches that it writes.
  struct Task {
    int64_t tokens, first, total;
    const float *cosine, *sine;
    Cache cache;
    Summary summary;
  };

  Task prepare(const Context& context, int64_t tokens) const {
    const size_t sine_at = before_ + sine_input();
    const Tensor past_keys = context.input(before_ + 1, "past_key"), past_values = context.input(before_ + 2, "past_value"),
                 last = context.input(sine_at - 2, "last"), cosine = context.input(sine_at - 1, "cos"),
                 sine = context.input(sine_at, "sin");
    const int64_t d = head_dim_, length = past_keys.rank == 4 ? past_keys.dims[2] : 0;
    const int64_t row_size = form_.bits == 4 ? d / 2 : d;  // places of a row
    for (const auto& [name, past] : {std::pair{"past_key", &past_keys}, {"past_value", &past_values}}) {
      if (past->rank != 4 || past->dims[0] != 1 || past->dims[1] != kv_heads_ || past->dims[2] != length || past->dims[3] != row_size) {
        fail("%s must have shape (1, %lld, length, %lld): got %s", name, (long long)kv_heads_, (long long)row_size,
             past->shape().c_str());
      }
    }
    if (last.count() != 1) fail("the index of the last token must be one number: got %lld", (long long)last.count());
    const int64_t total = int64_t{read(last.as<int32_t>())} + 1, first = total - tokens;
    if (first < 0 || total > length) {
      fail("tokens %lld to %lld must lie in the cache of %lld", (long long)first, (long long)total - 1, (long long)length);
    }
    for (const auto& [name, table] : {std::pair{"cos", &cosine}, {"sin", &sine}}) {
      if (table->rank != 2 || table->dims[0] < total || table->dims[1] != d / 2) {
        fail("%s must have shape (at least %lld, %lld): got %s", name, (long long)total, (long long)(d / 2),
             table->shape().c_str());
      }
    }
    Task task{tokens, first, total, cosine.as<float>(), sine.as<float>(), present(context, past_keys, past_values, length), {}};
    if (form_.sparse) task.summary = summaries(context, length);
    return task;
  }

  // x: [tokens][width()]; out: [tokens][mixed_width()]
  void run(const Pool& pool, const Task& task, const float* x, float* out) const {
    const auto& [tokens, first, total, cosine, sine, cache, summary] = task;
    if (tokens == 0) return;
    const int64_t d = head_dim_, q_width = mixed_width();
    float* q = scratch<float, Use::kQueries>(tokens * q_width);
    // One key-value head of a token: its queries, key and value.
    const auto read_head = [&, first = first, cosine = cosine, sine = sine, &cache = cache, &summary = summary](int64_t t, int64_t h) {
      const float* row = x + t * width();
      const float* c = cosine + (first + t) * (d / 2);
      const float* s = sine + (first + t) * (d / 2);
      float* queries = q + t * q_width + h * group_ * d;
      for (int64_t i = 0; i < group_; ++i) rotate(row + (h * group_ + i) * d, c, s, q_norm_, queries + i * d);
      if (form_.bits == 4) path().hadamard(queries, group_, d);
      float key[Selection::kWidest];
      rotate(row + q_width + h * d, c, s, k_norm_, key);
      keep(key, cache.keys_from(h, first + t));
      keep(row + q_width + (kv_heads_ + h) * d, cache.values_from(h, first + t));
      if (form_.sparse && sparse_.adamas) {
        path().planes(key, d, read(sparse_.center + 2 * h + 1), summary.codes + h * summary.code_bytes + (first + t) * d / 4);
      }
    };
    if (form_.sparse && tokens == 1) {
      // Over a long cache: estimate every position, attend exactly to `budget` of them, and let the others count with their
      // estimated weights, the next ones with their own values, the rest with their pages' means.
      std::optional<Selection> selection;
      if (total > std::max(dense_below_, summary.budget)) selection.emplace(sparse_, q, cache, total, summary, out);
      // A page's codes and mean are made when it is whole, so that the matrix of codes is read once for sixteen keys. Before
      // that only a selection wants them: it makes the mean of its own page, and its codes if the window leaves some of it out.
      const int64_t page = (total - 1) / kPageTokens;
      const bool whole = total % kPageTokens == 0, averages = !sparse_.adamas && (selection || whole);
      const bool encodes = !sparse_.adamas && (whole || (selection && selection->recent() > page * kPageTokens));
      const auto read = [&, total = total, &cache = cache, &summary = summary](int64_t h) {
        read_head(0, h);
        if (encodes) encode_page(cache, h, page, total, summary);
        if (averages) average_page(cache, h, page, total, summary);
        if (selection) selection->encode(h);
      };
      if (selection) {
        Order order(kv_heads_, sparse_.units(), selection->segments());
        return pool.parallel(order.count(), [&](size_t i) { order.take(i, read, *selection); });
      }
      pool.parallel(static_cast<size_t>(kv_heads_), [&](size_t i) { read(static_cast<int64_t>(i)); });
      return decode(pool, q, cache, total, out);
    }
    const int threads = tokens == 1 ? g_decode_threads : g_prefill_threads;
    const size_t cuts = pieces(tokens, threads, 8);
    pool.parallel(cuts, [&](size_t i) {
      for (int64_t t = share(tokens, i, cuts); t < share(tokens, i + 1, cuts); ++t) {
        for (int64_t h = 0; h < kv_heads_; ++h) read_head(t, h);
      }
    });
    if (form_.sparse && !sparse_.adamas) summarise(pool, cache, first, total, summary);
    if (tokens == 1) {
      decode(pool, q, cache, total, out);
    } else {
      prefill(pool, q, cache, first, tokens, summary, out);
    }
    if (form_.bits == 4) {  // outputs are sums of transformed rows
      pool.parallel(cuts, [&](size_t i) {
        const int64_t begin = share(tokens, i, cuts), end = share(tokens, i + 1, cuts);
        path().hadamard(out + begin * q_width, (end - begin) * kv_heads_ * group_, d);
      });
    }
  }

 private:
  size_t sine_input() const { return 5 + (form_.whole() ? 1 : 0) + (form_.sparse ? 2 : 0); }
  size_t codes_input() const { return form_.whole() ? 4 : 3; }  // and output

  void read_sparse(const Info& info) {
    SparseShape& s = sparse_;
    s.kv_heads = kv_heads_;
    s.group = group_;
    s.head_dim = head_dim_;
    s.sinks = info.integer("sinks", 0, 1 << 20);
    s.recent = info.integer("recent", 1, 1 << 20);
    s.followers = info.integer("followers", 0, 1 << 20);
    dense_below_ = info.integer("dense_below", 0, int64_t{1} << 31);
    prefill_budget_ = info.integer("prefill_budget", 0, 1 << 20);
    if (window_ > 0) fail("local_window_size must be -1 for sparse attention: got %lld", (long long)window_);
    const size_t center = before_ + sine_input() + 1;
    s.heads = info.integer("per_query_head", 0, 1) ? 1 : group_;
    s.adamas = info.integer("adamas", 0, 1) != 0;
    if (s.adamas) {
      if (head_dim_ & (head_dim_ - 1)) fail("head_dim must be a power of two for adamas: got %lld", (long long)head_dim_);
      if (prefill_budget_ > 0) fail("prefill_budget must be 0 for adamas: got %lld", (long long)prefill_budget_);
      if (s.followers > 0) fail("followers must be 0 for adamas, which drops what it does not select: got %lld", (long long)s.followers);
      s.channels = head_dim_ / 4;  // bytes
      s.center = info.constant(center, "center", ort::kFloat, 2 * kv_heads_).as<float>();
      return;
    }
    s.fine = head_dim_ / 64 * kLanes;
    s.channels = head_dim_ - s.fine;
    const int64_t size = kv_heads_ * head_dim_;
    s.center = info.constant(center, "center", ort::kFloat, size).as<float>();
    s.encoder = info.constant(center + 1, "encoder", ort::kFloat, size * s.channels).as<float>();
    s.decoder = info.constant(center + 2, "decoder", ort::kFloat, size * s.channels).as<float>();
  }

  // A present buffer, holding what the past one holds.
  static void* append(const Context& context, size_t index, const Tensor& past, size_t size) {
    void* present = context.output(index, past.dims, past.rank);
    if (present != past.data) std::memcpy(present, past.data, past.count() * size);
    return present;
  }

  // The present keys and values, and their scales: [2][kv_heads][length], the keys' first.
  Cache present(const Context& context, const Tensor& keys, const Tensor& values, int64_t length) const {
    const size_t size = form_.whole() ? sizeof(int8_t) : sizeof(uint16_t);
    Cache cache{{append(context, 1, keys, size), nullptr, form_.bits}, {append(context, 2, values, size), nullptr, form_.bits},
                length, head_dim_};
    if (form_.whole()) {
      const Tensor scales = context.input(before_ + 3, "past_scales");
      if (scales.rank != 3 || scales.dims[0] != 1 || scales.dims[1] != 2 * kv_heads_ || scales.dims[2] != length) {
        fail("past_scales must have shape (1, %lld, %lld): got %s", (long long)(2 * kv_heads_), (long long)length,
             scales.shape().c_str());
      }
      cache.keys.scales = static_cast<const uint16_t*>(append(context, 3, scales, sizeof(uint16_t)));
      cache.values.scales = cache.keys.scales + kv_heads_ * length;
    }
    return cache;
  }

  // Write a row of the cache.
  void keep(const float* x, const Rows& row) const {
    void* to = const_cast<void*>(row.data);
    if (row.scales) {
      float turned[Selection::kWidest];
      if (row.bits == 4) {
        std::copy(x, x + head_dim_, turned);
        path().hadamard(turned, 1, head_dim_);
        x = turned;
      }
      *const_cast<uint16_t*>(row.scales) = path().round_row(x, head_dim_, row.bits, static_cast<uint8_t*>(to));
    } else {
      path().to_half(x, static_cast<uint16_t*>(to), head_dim_);
    }
  }

  Summary summaries(const Context& context, int64_t length) const {
    const size_t at = codes_input();
    const Tensor codes = context.input(before_ + at, "past_codes"), means = context.input(before_ + at + 1, "past_means"),
                 budget = context.input(before_ + sine_input() + 4, "budget");
    Summary s{};
    s.blocks = (length + kBlockTokens - 1) / kBlockTokens;
    s.code_bytes = s.blocks * kPageTokens * 4 * head_dim_;
    if (codes.rank != 3 || codes.dims[0] != 1 || codes.dims[1] != kv_heads_ || codes.dims[2] != s.code_bytes) {
      fail("past_codes must have shape (1, %lld, %lld): got %s", (long long)kv_heads_, (long long)s.code_bytes,
           codes.shape().c_str());
    }
    const int64_t bytes = s.blocks * mean_bytes(head_dim_);
    if (means.rank != 3 || means.dims[0] != 1 || means.dims[1] != kv_heads_ || means.dims[2] != bytes) {
      fail("past_means must have shape (1, %lld, %lld): got %s", (long long)kv_heads_, (long long)bytes,
           means.shape().c_str());
    }
    if (budget.count() != 1) fail("the budget must be one number: got %lld", (long long)budget.count());
    s.budget = read(budget.as<int32_t>());
    if (s.budget < 1) fail("the budget must be at least 1: got %lld", (long long)s.budget);
    s.codes = static_cast<uint8_t*>(append(context, at, codes, 1));
    s.means = static_cast<uint8_t*>(append(context, at + 1, means, 1));
    return s;
  }

  // Codes and mean values of the pages that tokens first..total - 1 lie in.
  void summarise(const Pool& pool, const Cache& cache, int64_t first, int64_t total, const Summary& s) const {
    const int64_t from = first / kPageTokens, to = (total + kPageTokens - 1) / kPageTokens;
    pool.parallel(static_cast<size_t>(kv_heads_ * (to - from)), [&](size_t i) {
      const int64_t head = static_cast<int64_t>(i) / (to - from), page = from + static_cast<int64_t>(i) % (to - from);
      encode_page(cache, head, page, total, s);
      average_page(cache, head, page, total, s);
    });
  }

  void encode_page(const Cache& cache, int64_t head, int64_t page, int64_t total, const Summary& s) const {
    const int64_t begin = page * kPageTokens, end = std::min(begin + kPageTokens, total);
    path().encode(sparse_.coder(head), cache.keys_from(head, begin), end - begin, begin, s.codes + head * s.code_bytes);
  }

  void average_page(const Cache& cache, int64_t head, int64_t page, int64_t total, const Summary& s) const {
    const int64_t begin = page * kPageTokens, end = std::min(begin + kPageTokens, total);
    path().mean(cache.values_from(head, begin), end - begin, head_dim_, page % kLanes,
                s.means + (head * s.blocks + page / kLanes) * mean_bytes(head_dim_));
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

  void prefill(const Pool& pool, const float* q, const Cache& cache, int64_t first, int64_t tokens,
               const Summary& summary, float* out) const {
    constexpr int64_t kTokens = 64;
    const int64_t parts = (tokens + kTokens - 1) / kTokens, width = kv_heads_ * group_ * head_dim_;
    pool.parallel(static_cast<size_t>(kv_heads_ * parts), [&](size_t i) {
      // The last tokens see the most keys: they begin first.
      const int64_t head = static_cast<int64_t>(i) % kv_heads_, part = parts - 1 - static_cast<int64_t>(i) / kv_heads_;
      AttentionTask task{};
      task.tokens = std::min(kTokens, tokens - part * kTokens);
      const int64_t at = part * kTokens * width + head * group_ * head_dim_;
      task.q = q + at;
      task.out = out + at;
      task.q_stride = width;
      task.keys = cache.keys_from(head, 0);
      task.values = cache.values_from(head, 0);
      task.heads = group_;
      task.head_dim = head_dim_;
      task.first = first + part * kTokens;
      task.window = window_;
      task.scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
      task.scratch = scratch<float, Use::kScores>(attention_scratch(kTokens, group_, head_dim_));
      if (prefill_budget_ > 0) {
        auto* blocks = scratch<int32_t, Use::kPlaces>(static_cast<size_t>((first + tokens) / kKeyBlock + 2));
        task.block_count = choose_blocks(sparse_, task.q, width, task.tokens, task.first, head, summary,
                                         prefill_budget_ / kKeyBlock, blocks);
        if (task.block_count > 0) task.blocks = blocks;
      }
      path().attend(task);
    });
  }

  // One token: the cache is cut into stretches, and the stretches' sums are joined.
  void decode(const Pool& pool, const float* q, const Cache& cache, int64_t total, float* out) const {
    const int64_t d = head_dim_, from = window_ > 0 ? std::max<int64_t>(0, total - window_) : 0, length = total - from;
    // Stretches depend on the length alone, so that results do not depend on the number of threads.
    const int64_t stretches = std::clamp<int64_t>(length / 128, 1, 16), parts = kv_heads_ * stretches;
    float* joined = scratch<float, Use::kPartials>(static_cast<size_t>(parts * group_ * (d + 2)));
    const bool small = g_decode_threads <= 1 || (length * kv_heads_ < 96 && !pool.enters_at_once());
    auto work = [&](int64_t i) {
      const int64_t head = i / stretches, stretch = i % stretches;
      const int64_t begin = from + length * stretch / stretches, end = from + length * (stretch + 1) / stretches;
      DecodeTask task{};
      task.q = q + head * group_ * d;
      task.keys = cache.keys_from(head, begin);
      task.values = cache.values_from(head, begin);
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
      pool.parallel(static_cast<size_t>(parts), [&](size_t i) { work(static_cast<int64_t>(i)); });
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

  AttentionForm form_;
  size_t before_;
  int64_t kv_heads_, group_, head_dim_, window_, dense_below_ = 0, prefill_budget_ = 0;
  SparseShape sparse_{};
  float epsilon_ = 0.0f;
  const float* q_norm_ = nullptr;
  const float* k_norm_ = nullptr;
};

}  // namespace
}  // namespace edgekit
