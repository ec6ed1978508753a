// What lies near the largest of many numbers: a sampler's one pass over the logits.

namespace edgekit {
namespace {

// Weights are e^((x - peak) * factor). Stores the index and weight of each that reaches `floor`, in order, and leaves the
// sum of all in `total`; returns how many were stored. `floor` must be at least 1e-37, which is more than what
// `exponential` gives for numbers far below the peak.
int64_t near_peak(const float* x, int64_t count, float peak, float factor, float floor, int32_t* indices, float* weights,
                  double* total) {
  constexpr int64_t kRun = 4 * kLanes, kRunsASum = 64;
  int64_t found = 0;
  double sums = 0.0;
  Floats partial = zeros();
  const Floats top = all(peak), slope = all(factor);
  float run[kRun];
  for (int64_t from = 0; from < count; from += kRun) {
    const int64_t length = count - from < kRun ? count - from : kRun;
    const float* source = x + from;
    float rest[kRun];
    if (length < kRun) {
      std::memcpy(rest, source, length * sizeof(float));
      for (int64_t i = length; i < kRun; ++i) rest[i] = -INFINITY;
      source = rest;
    }
    Floats high = zeros();
    for (int64_t i = 0; i < kRun; i += kLanes) {
      const Floats weight = exponential(mul(sub(load(source + i), top), slope));
      store(run + i, weight);
      partial = add(partial, weight);
      high = max(high, weight);
    }
    if (largest(high) >= floor) {
      for (int64_t i = 0; i < length; ++i) {
        if (run[i] < floor) continue;
        indices[found] = static_cast<int32_t>(from + i);
        weights[found++] = run[i];
      }
    }
    if (from / kRun % kRunsASum == kRunsASum - 1) {
      sums += sum(partial);
      partial = zeros();
    }
  }
  *total = sums + sum(partial);
  return found;
}

}  // namespace
}  // namespace edgekit
