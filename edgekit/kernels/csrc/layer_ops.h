// A whole layer of a decoder as one operator: NormQuantLinear, attention, QuantLinear, GatedNormQuantLinear and QuantLinear,
// of which the last two QuantLinear add their residual.
//
// One token takes some 80 us a layer, of which five nodes of their own, each with loops on the session's pool, would be a
// third. So its threads form a team, which enters the pool once.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include "attention_ops.h"
#include "linear_ops.h"
#include "team.h"

namespace edgekit {
namespace {

// Inputs: x; norm, codes, scales, zeros, minima, bias, steps of q, k and v; those of the attention operator, without qkv;
// codes, scales, zeros, minima, bias, steps of the output projection; norm, codes, scales, zeros, minima, steps of gate and
// up; codes, scales, zeros, minima, bias, steps of the down projection. Outputs: those of attention.
class Layer {
 protected:
  static constexpr size_t kAttention = 8;  // where its inputs begin
  static constexpr size_t kMatrix = 6;     // inputs of each matrix after it

 public:
  // `out`: where the inputs of the output projection begin.
  Layer(const Info& info, AttentionForm form, size_t out)
      : qkv_(info, {2, 6, 7}, "qkv_"),
        attend_(info, form, kAttention - 1),
        out_(info, {out, out + 4, out + 5}, "out_"),
        gate_(info, {out + kMatrix + 1, 0, out + kMatrix + 5}, "gate_"),
        down_(info, {out + 2 * kMatrix, out + 2 * kMatrix + 4, out + 2 * kMatrix + 5}, "down_") {
    const auto expect = [](const char* name, int64_t found, int64_t wanted) {
      if (found != wanted) fail("the layer's %s must be %lld: got %lld", name, (long long)wanted, (long long)found);
    };
    expect("qkv_N", qkv_.width(), attend_.width());
    expect("out_K", out_.columns(), attend_.mixed_width());
    expect("out_N", out_.width(), qkv_.columns());
    expect("gate_K", gate_.columns(), out_.width());
    expect("down_K", down_.columns(), gate_.width());
    expect("down_N", down_.width(), out_.width());
  }

  void compute(const Context& context) const {
    const Tensor x = context.input(0, "x");
    const int64_t rows = qkv_.rows(x);
    if (x.rank != 3 || x.dims[0] != 1) {
      fail("x must have shape (1, tokens, %lld): got %s; batches are not supported", (long long)qkv_.columns(),
           x.shape().c_str());
    }
    const Attend::Task task = attend_.prepare(context, rows);
    float* y = static_cast<float*>(context.output(0, x.dims, x.rank));
    if (rows == 0) return;
    const int64_t widths[] = {qkv_.width(), out_.columns(), out_.width(), gate_.width()};
    float* room = scratch<float, Use::kLayer>(static_cast<size_t>(rows * (widths[0] + widths[1] + widths[2] + widths[3])));
    float *heads = room, *mixed = heads + rows * widths[0], *state = mixed + rows * widths[1], *gated = state + rows * widths[2];
    const auto work = [&](const Pool& pool) {
      pool.expect(qkv_.weights());
      qkv_.run(pool, x.as<float>(), rows, nullptr, heads, out_.weights());
      attend_.run(pool, task, heads, mixed);
      out_.run(pool, mixed, rows, x.as<float>(), state, gate_.weights());
      gate_.run(pool, state, rows, nullptr, gated, down_.weights());
      down_.run(pool, gated, rows, state, y);
    };
    if (rows > 1 || g_decode_threads <= 1) return work(context);
    Team team;
    context.parallel(static_cast<size_t>(g_decode_threads), [&](size_t) { team.join([&] { work(team); }); });
  }

 private:
  Linear<Form::kNorm> qkv_;
  Attend attend_;
  Linear<Form::kPlain> out_;
  Linear<Form::kGated> gate_;
  Linear<Form::kPlain> down_;
};

template <class AttentionOp>
struct LayerOf : Layer {
  static constexpr size_t kOut = kAttention + std::size(AttentionOp::kInputs) - 1;

  explicit LayerOf(const Info& info) : Layer(info, AttentionOp::kForm, kOut) {}

  static constexpr std::array<ort::Type, kOut + 3 * kMatrix> inputs() {
    std::array<ort::Type, kOut + 3 * kMatrix> types{};
    size_t at = 0;
    const auto matrix = [&](bool norm, bool bias) {
      if (norm) types[at++] = ort::kFloat;
      for (const ort::Type type : {ort::kUint8, ort::kAny, ort::kUint8, ort::kAny}) types[at++] = type;
      if (bias) types[at++] = ort::kFloat;
      types[at++] = ort::kHalf;
    };
    types[at++] = ort::kFloat;
    matrix(true, true);
    for (size_t i = 1; i < std::size(AttentionOp::kInputs); ++i) types[at++] = AttentionOp::kInputs[i];
    matrix(false, true);
    matrix(true, false);
    matrix(false, true);
    return types;
  }
  // The attention operator's, and "Layer".
  static constexpr auto name() {
    constexpr std::string_view kAttentionName = AttentionOp::kName, kEnd = "Layer";
    std::array<char, kAttentionName.size() + kEnd.size() + 1> text{};
    std::copy(kEnd.begin(), kEnd.end(), std::copy(kAttentionName.begin(), kAttentionName.end(), text.begin()));
    return text;
  }
  static constexpr auto kText = name();
  static constexpr const char* kName = kText.data();
  static constexpr auto kInputs = inputs();
  static constexpr auto& kOutputs = AttentionOp::kOutputs;
};

}  // namespace
}  // namespace edgekit
