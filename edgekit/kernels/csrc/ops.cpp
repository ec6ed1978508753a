// The library's functions: the operators of domain ai.edgekit as ONNX Runtime sees them, and what Python calls.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "attention_ops.h"
#include "layer_ops.h"
#include "linear_ops.h"
#include "path.h"
#include "session.h"
#include "work.h"

// In place of the compiler's own, 50 to 100 KB that only the message of an uncaught exception asks for.
extern "C" char* __cxa_demangle(const char*, char*, size_t*, int* status) {
  if (status) *status = -1;  // as when there is no memory
  return nullptr;
}

namespace edgekit {

const OrtApi* ort::g_api = nullptr;

namespace {

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
  static const OrtCustomOp ops[] = {
      ort::make_op<QuantLinear>(), ort::make_op<NormQuantLinear>(), ort::make_op<GatedNormQuantLinear>(), ort::make_op<QuantEmbedding>(),
      ort::make_op<Attention>(), ort::make_op<NormAttention>(),
      ort::make_op<HadamardSparseAttention>(), ort::make_op<NormHadamardSparseAttention>(),
      ort::make_op<AttentionInt8>(), ort::make_op<NormAttentionInt8>(),
      ort::make_op<AttentionInt4>(), ort::make_op<NormAttentionInt4>(),
      ort::make_op<HadamardSparseAttentionInt8>(), ort::make_op<NormHadamardSparseAttentionInt8>(),
      ort::make_op<LayerOf<Attention>>(), ort::make_op<LayerOf<NormAttention>>(),
      ort::make_op<LayerOf<HadamardSparseAttention>>(), ort::make_op<LayerOf<NormHadamardSparseAttention>>(),
      ort::make_op<LayerOf<AttentionInt8>>(), ort::make_op<LayerOf<NormAttentionInt8>>(),
      ort::make_op<LayerOf<AttentionInt4>>(), ort::make_op<LayerOf<NormAttentionInt4>>(),
      ort::make_op<LayerOf<HadamardSparseAttentionInt8>>(), ort::make_op<LayerOf<NormHadamardSparseAttentionInt8>>(),
  };
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
