// The attention operators by name, with the types of their inputs and outputs.
#pragma once

#include "attend.h"
#include "session.h"

namespace edgekit {
namespace {

constexpr ort::Type kF = ort::kFloat, kH = ort::kHalf, kI = ort::kInt32, kB = ort::kInt8, kU = ort::kUint8;

struct Attention : Attend {
  explicit Attention(const Info& info) : Attend(info, {false, false, 16}) {}
  static constexpr const char* kName = "Attention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH};
};

struct NormAttention : Attend {
  explicit NormAttention(const Info& info) : Attend(info, {true, false, 16}) {}
  static constexpr const char* kName = "NormAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH};
};

struct HadamardSparseAttention : Attend {
  explicit HadamardSparseAttention(const Info& info) : Attend(info, {false, true, 16}) {}
  static constexpr const char* kName = "HadamardSparseAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH, kU, kU};
};

struct NormHadamardSparseAttention : Attend {
  explicit NormHadamardSparseAttention(const Info& info) : Attend(info, {true, true, 16}) {}
  static constexpr const char* kName = "NormHadamardSparseAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH, kU, kU};
};

struct AttentionInt8 : Attend {
  explicit AttentionInt8(const Info& info) : Attend(info, {false, false, 8}) {}
  static constexpr const char* kName = "AttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH};
};

struct NormAttentionInt8 : Attend {
  explicit NormAttentionInt8(const Info& info) : Attend(info, {true, false, 8}) {}
  static constexpr const char* kName = "NormAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH};
};

struct AttentionInt4 : Attend {
  explicit AttentionInt4(const Info& info) : Attend(info, {false, false, 4}) {}
  static constexpr const char* kName = "AttentionInt4";
  static constexpr ort::Type kInputs[] = {kF, kU, kU, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kU, kU, kH};
};

struct NormAttentionInt4 : Attend {
  explicit NormAttentionInt4(const Info& info) : Attend(info, {true, false, 4}) {}
  static constexpr const char* kName = "NormAttentionInt4";
  static constexpr ort::Type kInputs[] = {kF, kU, kU, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kU, kU, kH};
};

struct HadamardSparseAttentionInt8 : Attend {
  explicit HadamardSparseAttentionInt8(const Info& info) : Attend(info, {false, true, 8}) {}
  static constexpr const char* kName = "HadamardSparseAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH, kU, kU};
};

struct NormHadamardSparseAttentionInt8 : Attend {
  explicit NormHadamardSparseAttentionInt8(const Info& info) : Attend(info, {true, true, 8}) {}
  static constexpr const char* kName = "NormHadamardSparseAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH, kU, kU};
};

}  // namespace
}  // namespace edgekit
