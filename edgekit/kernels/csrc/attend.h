// The attention operators: rotation, cache append, and attention over the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "path.h"
#include "session.h"
#include "work.h"

namespace edgekit {
namespace {

using ort::Context;
using ort::fail;
using ort::Info;
using ort::Tensor;

// Rotary embedding, cache append and exact attention; with RMSNorm of each query and key head before the rotation
// where kNormed. The cache's buffers may be both past and present.
//
// Where kSparse, one token attends to the positions that small codes of the keys find, and
// the others count by their estimates: docs/sparse-attention.md. Further inputs: past_codes and past_means behind
// past_value; center, encoder, decoder and budget behind sin. Further outputs: present_codes, present_means.
template <bool kNormed, bool kSparse>
class Attend {
  static constexpr size_t kLast = kSparse ? 5 : 3, kCos = kLast + 1, kSin = kLast + 2, kCenter = kLast + 3;
  static constexpr size_t kBudget = kLast + 6, kNorms = kSparse ? kLast + 7 : kLast + 3;

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
    if (kSparse) {
      sinks_ = info.integer("sinks", 0, 1 << 20);
      recent_ = info.integer("recent", 1, 1 << 20);
      followers_ = info.integer("followers", 0, 1 << 20);
      dense_below_ = info.integer("dense_below", 0, int64_t{1} << 31);
      if (window_ > 0) fail("local_window_size must be -1 for sparse attention: got %lld", (long long)window_);
      fine_ = head_dim_ / 64 * kLanes;
      channels_ = head_dim_ - fine_;
      const int64_t size = kv_heads_ * head_dim_;
      center_ = info.constant(kCenter, "center", ort::kFloat, size).template as<float>();
      encoder_ = info.constant(kCenter + 1, "encoder", ort::kFloat, size * channels_).template as<float>();
      decoder_ = info.constant(kCenter + 2, "decoder", ort::kFloat, size * channels_).template as<float>();
    }
    if (kNormed) {
      epsilon_ = info.number("epsilon");
      q_norm_ = info.constant(kNorms, "q_norm", ort::kFloat, head_dim_).template as<float>();
      k_norm_ = info.constant(kNorms + 1, "k_norm", ort::kFloat, head_dim_).template as<float>();
    }
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "qkv"), past_keys = context.input(1, "past_key"),
                 past_values = context.input(2, "past_value"), last = context.input(kLast, "last"),
                 cosine = context.input(kCos, "cos"), sine = context.input(kSin, "sin");
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
    uint16_t* keys = static_cast<uint16_t*>(append(context, 1, past_keys, sizeof(uint16_t)));
    uint16_t* values = static_cast<uint16_t*>(append(context, 2, past_values, sizeof(uint16_t)));
    Summary summary{};
    if (kSparse) summary = summaries(context, cache);
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
          if (kSparse) {
            float spread[kWidest];
            path().encode(coder(h), key, first + t, spread, summary.codes + h * summary.code_bytes);
          }
        }
      }
    });
    if (kSparse) average(context, values, cache, first, total, summary);
    if (kSparse && tokens == 1 && total > std::max(dense_below_, summary.budget)) {
      select(context, q, keys, values, cache, total, summary, out);
    } else if (tokens == 1) {
      decode(context, q, keys, values, cache, total, out);
    } else {
      prefill(context, q, keys, values, cache, first, tokens, out);
    }
  }

 private:
  static constexpr int64_t kWidest = 1024;

  // What stands beside keys and values in a sparse cache.
  struct Summary {
    uint8_t* codes;      // [kv_heads][code_bytes]
    uint16_t* means;     // [kv_heads][pages][head_dim]
    int64_t code_bytes;
    int64_t pages;
    int64_t budget;
  };

  // The present buffer, holding what the past one holds.
  static void* append(const Context& context, size_t index, const Tensor& past, size_t size) {
    void* present = context.output(index, past.dims, past.rank);
    if (present != past.data) std::memcpy(present, past.data, past.count() * size);
    return present;
  }

  Summary summaries(const Context& context, int64_t cache) const {
    const Tensor codes = context.input(3, "past_codes"), means = context.input(4, "past_means"),
                 budget = context.input(kBudget, "budget");
    const int64_t blocks = (cache + kBlockTokens - 1) / kBlockTokens, pages = blocks * kLanes;
    Summary s{};
    s.code_bytes = blocks * kPageTokens * 4 * head_dim_;
    s.pages = pages;
    if (codes.rank != 3 || codes.dims[0] != 1 || codes.dims[1] != kv_heads_ || codes.dims[2] != s.code_bytes) {
      fail("past_codes must have shape (1, %lld, %lld): got %s", (long long)kv_heads_, (long long)s.code_bytes,
           codes.shape().c_str());
    }
    if (means.rank != 4 || means.dims[0] != 1 || means.dims[1] != kv_heads_ || means.dims[2] != pages || means.dims[3] != head_dim_) {
      fail("past_means must have shape (1, %lld, %lld, %lld): got %s", (long long)kv_heads_, (long long)pages,
           (long long)head_dim_, means.shape().c_str());
    }
    if (budget.count() != 1) fail("the budget must be one number: got %lld", (long long)budget.count());
    s.budget = read(budget.as<int32_t>());
    if (s.budget < 1) fail("the budget must be at least 1: got %lld", (long long)s.budget);
    s.codes = static_cast<uint8_t*>(append(context, 3, codes, 1));
    s.means = static_cast<uint16_t*>(append(context, 4, means, sizeof(uint16_t)));
    return s;
  }

  // The mean values of the pages that tokens first..total - 1 lie in.
  void average(const Context& context, const uint16_t* values, int64_t cache, int64_t first, int64_t total,
               const Summary& s) const {
    const int64_t from = first / kPageTokens, to = (total + kPageTokens - 1) / kPageTokens, d = head_dim_;
    auto work = [&](size_t i) {
      const int64_t h = static_cast<int64_t>(i) / (to - from), page = from + static_cast<int64_t>(i) % (to - from);
      const int64_t begin = page * kPageTokens, end = std::min(begin + kPageTokens, total);
      path().mean(values + (h * cache + begin) * d, end - begin, d, s.means + (h * s.pages + page) * d);
    };
    const int64_t count = kv_heads_ * (to - from);
    if (count <= 4 * kv_heads_) {
      for (int64_t i = 0; i < count; ++i) work(static_cast<size_t>(i));
    } else {
      context.parallel(static_cast<size_t>(count), work);
    }
  }

  KeyCoder coder(int64_t head) const {
    const int64_t at = head * head_dim_;
    return {center_ + at, encoder_ + at * channels_, decoder_ + at * channels_, head_dim_, channels_, fine_};
  }

  // One token over a long cache: estimate every position, attend exactly to `budget` of them, and let the others count
  // with their estimated weights, the next ones with their own values, the rest with their pages' means. The blocks are
  // cut into segments, by the length alone, so that results do not depend on the number of threads.
  void select(const Context& context, const float* q, const uint16_t* keys, const uint16_t* values, int64_t cache,
              int64_t total, const Summary& s, float* out) const {
    const int64_t blocks = (total + kBlockTokens - 1) / kBlockTokens, segments = std::clamp<int64_t>(blocks / 4, 1, 8);
    const Selection selection(*this, q, keys, values, cache, total, blocks, segments, s);
    const auto count = static_cast<size_t>(kv_heads_ * segments);
    // Who estimates a head's last segment also chooses.
    int64_t* left = scratch<int64_t, Use::kLeft>(static_cast<size_t>(kv_heads_));
    std::fill(left, left + kv_heads_, segments);
    context.parallel(count, [&](size_t i) {
      const int64_t head = static_cast<int64_t>(i) / segments, segment = static_cast<int64_t>(i) % segments;
      path().estimate(selection.task(head, segment));
      if (__atomic_sub_fetch(left + head, 1, __ATOMIC_ACQ_REL) == 0) selection.choose(head);
    });
    context.parallel(count, [&](size_t i) {
      selection.attend(static_cast<int64_t>(i) / segments, static_cast<int64_t>(i) % segments);
    });
    for (int64_t h = 0; h < kv_heads_ * group_; ++h) selection.join(h, out + h * head_dim_);
  }

  // The work of one token over a long cache. Its memory belongs to the thread that made it, which waits for the others.
  class Selection {
   public:
    Selection(const Attend& op, const float* q, const uint16_t* keys, const uint16_t* values, int64_t cache,
              int64_t total, int64_t blocks, int64_t segments, const Summary& summary)
        : op_(op), q_(q), keys_(keys), values_(values), cache_(cache), total_(total), blocks_(blocks),
          segments_(segments), summary_(summary),
          sinks_(std::min(op.sinks_, summary.budget - std::min(op.recent_, summary.budget))),
          recent_(total - std::min(op.recent_, summary.budget)),
          exact_(summary.budget - (total - recent_) - sinks_),
          following_((op.followers_ + kLanes - 1) / kLanes * kLanes),
          scale_(1.0f / std::sqrt(static_cast<float>(op.head_dim_))) {
      const auto heads = static_cast<size_t>(op.kv_heads_ * op.group_), kv_heads = static_cast<size_t>(op.kv_heads_);
      codes_ = scratch<int8_t, Use::kCodes>(heads * op.channels_);
      factors_ = scratch<float, Use::kScales>(2 * heads);
      weights_ = scratch<float, Use::kScores>(heads * stride());
      blockwise_ = scratch<float, Use::kSums>(3 * heads * blocks);
      whole_ = scratch<float, Use::kWholes>(heads);
      places_ = scratch<int32_t, Use::kPlaces>(kv_heads * (exact_ + following_));
      kept_ = scratch<float, Use::kTails>(heads * following_);
      found_ = scratch<int64_t, Use::kFound>(2 * kv_heads);
      parts_ = scratch<float, Use::kPartials>(kv_heads * (2 * segments + 2) * part_size());
      for (int64_t h = 0; h < op.kv_heads_ * op.group_; ++h) {
        float spread[kWidest];
        path().encode_query(op.coder(h / op.group_), q + h * op.head_dim_, scale_, spread, codes_ + h * op.channels_,
                            factors_ + h, factors_ + heads + h);
      }
    }

    SparseTask task(int64_t head, int64_t segment) const {
      const int64_t first = head * op_.group_, heads = op_.kv_heads_ * op_.group_;
      SparseTask t{};
      t.q_codes = codes_ + first * op_.channels_;
      t.factors = factors_ + first;
      t.constants = factors_ + heads + first;
      t.codes = summary_.codes + head * summary_.code_bytes;
      t.means = summary_.means + head * summary_.pages * op_.head_dim_;
      t.heads = op_.group_;
      t.head_dim = op_.head_dim_;
      t.channels = op_.channels_;
      t.fine = op_.fine_;
      t.first_block = blocks_ * segment / segments_;
      t.last_block = blocks_ * (segment + 1) / segments_;
      t.blocks = blocks_;
      t.sinks = sinks_;
      t.recent = recent_;
      t.stride = stride();
      t.weights = weights_ + first * stride();
      t.references = blockwise_ + first * blocks_;
      t.sums = t.references + heads * blocks_;
      t.gains = t.sums + heads * blocks_;
      return t;
    }

    // The window and the sinks exactly, then each head's whole, and what is selected.
    void choose(int64_t head) const {
      const SparseTask t = task(head, 0);
      exactly(head, keys_ + head * cache_ * t.head_dim, values_ + head * cache_ * t.head_dim, sinks_, sink_part(head));
      const int64_t from = (head * cache_ + recent_) * t.head_dim;
      exactly(head, keys_ + from, values_ + from, total_ - recent_, sink_part(head) + part_size());
      const float *sinks = sink_part(head) + t.heads * t.head_dim, *recent = sinks + part_size();
      for (int64_t h = 0; h < t.heads; ++h) {
        const float *references = t.references + h * blocks_, *sums = t.sums + h * blocks_;
        float top = std::max(read(sinks + h), read(recent + h)), whole = 0.0f;
        for (int64_t b = 0; b < blocks_; ++b) top = std::max(top, references[b] / kLog2E);
        for (const float* part : {sinks, recent}) whole += std::exp(part[h] - top) * part[t.heads + h];
        float* gains = const_cast<float*>(t.gains) + h * blocks_;
        for (int64_t b = 0; b < blocks_; ++b) whole += sums[b] * (gains[b] = std::exp(references[b] / kLog2E - top));
        for (int64_t b = 0; b < blocks_; ++b) gains[b] /= whole;
        whole_[head * t.heads + h] = top + std::log(whole);
      }
      SparseChoice c{};
      c.exact_count = exact_;
      c.following_count = op_.followers_;
      c.shares = scratch<float, Use::kDistances>(static_cast<size_t>(stride()));
      c.highest = scratch<float, Use::kHighest>(static_cast<size_t>(stride()));
      c.places = scratch<int32_t, Use::kNear>(static_cast<size_t>(stride()));
      c.exact = places(head);
      c.following = c.exact + exact_;
      c.kept = kept_ + head * t.heads * following_;
      c.kept_stride = following_;
      c.exact_found = found_ + 2 * head;
      c.following_found = c.exact_found + 1;
      path().select(t, c);
    }

    // What is left of a segment by its shares, and what was chosen there exactly.
    void attend(int64_t head, int64_t segment) const {
      SparseTask t = task(head, segment);
      const int64_t d = t.head_dim;
      float pages[kMostHeads * kLanes];
      t.out = tail_part(head, segment);
      t.totals = t.out + t.heads * d;
      t.pages = t.heads <= kMostHeads ? pages : scratch<float, Use::kPages>(static_cast<size_t>(t.heads * kLanes));
      path().weigh(t);
      follow(t, head);
      const auto [from, to] = inside(t, places(head), found_[2 * head]);
      const int64_t count = to - from;
      uint16_t* rows = scratch<uint16_t, Use::kGathered>(static_cast<size_t>(2 * count * d));
      for (const auto& [source, row] : {std::pair{keys_, rows}, {values_, rows + count * d}}) {
        for (int64_t i = 0; i < count; ++i) {
          const int32_t* at = places(head) + from + i;
          if (i + 8 < count) __builtin_prefetch(source + (head * cache_ + position(at[8])) * d);
          std::memcpy(row + i * d, source + (head * cache_ + position(at[0])) * d, static_cast<size_t>(d) * sizeof(uint16_t));
        }
      }
      exactly(head, rows, rows + count * d, count, t.out + part_size());
    }

    // A head's parts are joined; the tails' maximum is the logarithm of the whole that they are shares of.
    void join(int64_t h, float* out) const {
      const int64_t d = op_.head_dim_, head = h / op_.group_, own = h % op_.group_;
      const float *tails = tail_part(head, 0), *sums = tails + op_.group_ * d + own;
      float top = whole_[h], total = 0.0f;
      const auto is_tail = [&](int64_t i) { return i < 2 * segments_ && i % 2 == 0; };
      for (int64_t i = 0; i < 2 * segments_ + 2; ++i) {
        if (!is_tail(i)) top = std::max(top, sums[i * part_size()]);
      }
      std::fill(out, out + d, 0.0f);
      for (int64_t i = 0; i < 2 * segments_ + 2; ++i) {
        const float* part = tails + i * part_size();
        const float maximum = part[op_.group_ * d + own], sum = part[op_.group_ * (d + 1) + own];
        const float factor = std::exp((is_tail(i) ? whole_[h] : maximum) - top);
        total += factor * (is_tail(i) ? maximum : sum);
        for (int64_t c = 0; c < d; ++c) out[c] += factor * part[own * d + c];
      }
      for (int64_t c = 0; c < d; ++c) out[c] /= total;
    }

   private:
    static constexpr int64_t kMostHeads = 16;
    static constexpr float kLog2E = 1.44269504088896341f;

    int64_t stride() const { return blocks_ * kBlockTokens; }

    // Of a part: sums of values, [group][head_dim], and [group] maxima and [group] sums of weights; or [group] totals of shares.
    // A head has a tail and an exact part for each segment, in turns, then the sinks and the newest positions.
    int64_t part_size() const { return op_.group_ * (op_.head_dim_ + 2); }
    float* tail_part(int64_t head, int64_t segment) const {
      return parts_ + (head * (2 * segments_ + 2) + 2 * segment) * part_size();
    }
    float* sink_part(int64_t head) const { return tail_part(head, segments_); }
    int32_t* places(int64_t head) const { return places_ + head * (exact_ + following_); }

    static int32_t position(int32_t place) {
      constexpr int32_t kPage = kPageTokens, kBlock = kBlockTokens;
      return place / kBlock * kBlock + place % kLanes * kPage + place % kBlock / kLanes;
    }

    // Which of ascending places lie in the task's blocks.
    static std::pair<int64_t, int64_t> inside(const SparseTask& t, const int32_t* places, int64_t count) {
      const auto below = [&](int64_t block) { return std::lower_bound(places, places + count, block * kBlockTokens) - places; };
      return {below(t.first_block), below(t.last_block)};
    }

    // Add what follows in the task's blocks, with its own values.
    void follow(const SparseTask& t, int64_t head) const {
      const int32_t* following = places(head) + exact_;
      const auto [from, to] = inside(t, following, found_[2 * head + 1]);
      if (from == to) return;
      int32_t* positions = scratch<int32_t, Use::kPositions>(static_cast<size_t>(to - from));
      for (int64_t i = from; i < to; ++i) positions[i - from] = position(following[i]);
      const float* kept = kept_ + head * t.heads * following_;
      for (int64_t h = 0; h < t.heads; ++h) {
        for (int64_t i = from; i < to; ++i) t.totals[h] += kept[h * following_ + i];
      }
      path().gather(values_ + head * cache_ * t.head_dim, positions, to - from, t.heads, kept + from, following_,
                    t.head_dim, t.out);
    }

    // Exact attention of a head's group to rows that stand together.
    void exactly(int64_t head, const uint16_t* keys, const uint16_t* values, int64_t count, float* out) const {
      DecodeTask task{};
      task.heads = op_.group_;
      task.head_dim = op_.head_dim_;
      task.q = q_ + head * task.heads * task.head_dim;
      task.keys = keys;
      task.values = values;
      task.count = count;
      task.count_padded = (count + kLanes - 1) / kLanes * kLanes;
      task.scale = scale_;
      task.out = out;
      task.maxima = out + task.heads * task.head_dim;
      task.sums = task.maxima + task.heads;
      task.scratch = scratch<float, Use::kChosen>(static_cast<size_t>(4 * task.count_padded));
      path().decode(task);
    }

    const Attend& op_;
    const float* q_;
    const uint16_t *keys_, *values_;
    int64_t cache_, total_, blocks_, segments_;
    const Summary& summary_;
    int64_t sinks_, recent_;  // positions below and from here on are attended to in any case
    int64_t exact_, following_;
    float scale_;
    int8_t* codes_;
    float *factors_, *weights_, *blockwise_, *whole_, *kept_, *parts_;
    int32_t* places_;  // [kv_heads][exact and following]
    int64_t* found_;   // [kv_heads][2]
  };

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
  int64_t sinks_ = 0, recent_ = 1, followers_ = 0, dense_below_ = 0, fine_ = 0, channels_ = 0;
  const float* center_ = nullptr;
  const float* encoder_ = nullptr;
  const float* decoder_ = nullptr;
  float epsilon_ = 0.0f;
  const float* q_norm_ = nullptr;
  const float* k_norm_ = nullptr;
};

struct Attention : Attend<false, false> {
  using Attend::Attend;
  static constexpr const char* kName = "Attention";  // qkv, past_key, past_value, last, cos, sin
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf, ort::kHalf, ort::kInt32, ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf};
};

struct NormAttention : Attend<true, false> {
  using Attend::Attend;
  static constexpr const char* kName = "NormAttention";  // ... q_norm, k_norm
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf,  ort::kHalf,  ort::kInt32,
                                          ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf};
};

struct HadamardSparseAttention : Attend<false, true> {
  using Attend::Attend;
  // qkv, past_key, past_value, past_codes, past_means, last, cos, sin, center, encoder, decoder, budget
  static constexpr const char* kName = "HadamardSparseAttention";
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf,  ort::kHalf,  ort::kUint8, ort::kHalf, ort::kInt32,
                                          ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt32};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf, ort::kUint8, ort::kHalf};
};

struct NormHadamardSparseAttention : Attend<true, true> {
  using Attend::Attend;
  static constexpr const char* kName = "NormHadamardSparseAttention";  // ... q_norm, k_norm
  static constexpr ort::Type kInputs[] = {ort::kFloat, ort::kHalf,  ort::kHalf,  ort::kUint8, ort::kHalf,
                                          ort::kInt32, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                          ort::kFloat, ort::kInt32, ort::kFloat, ort::kFloat};
  static constexpr ort::Type kOutputs[] = {ort::kFloat, ort::kHalf, ort::kHalf, ort::kUint8, ort::kHalf};
};

}  // namespace
}  // namespace edgekit
