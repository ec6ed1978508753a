// The attention operators by name, with the types of their inputs and outputs.
#pragma once

#include "attend.h"
#include "session.h"

namespace edgekit {
namespace {

constexpr ort::Type kF = ort::kFloat, kH = ort::kHalf, kI = ort::kInt32, kB = ort::kInt8, kU = ort::kUint8;

struct Attention : Attend {
  static constexpr AttentionForm kForm = {false, false, 16};
  explicit Attention(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "Attention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH};
};

struct NormAttention : Attend {
  static constexpr AttentionForm kForm = {true, false, 16};
  explicit NormAttention(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "NormAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH};
};

struct HadamardSparseAttention : Attend {
  static constexpr AttentionForm kForm = {false, true, 16};
  explicit HadamardSparseAttention(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "HadamardSparseAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH, kU, kU};
};

struct NormHadamardSparseAttention : Attend {
  static constexpr AttentionForm kForm = {true, true, 16};
  explicit NormHadamardSparseAttention(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "NormHadamardSparseAttention";
  static constexpr ort::Type kInputs[] = {kF, kH, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kH, kH, kU, kU};
};

struct AttentionInt8 : Attend {
  static constexpr AttentionForm kForm = {false, false, 8};
  explicit AttentionInt8(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "AttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH};
};

struct NormAttentionInt8 : Attend {
  static constexpr AttentionForm kForm = {true, false, 8};
  explicit NormAttentionInt8(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "NormAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH};
};

struct AttentionInt4 : Attend {
  static constexpr AttentionForm kForm = {false, false, 4};
  explicit AttentionInt4(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "AttentionInt4";
  static constexpr ort::Type kInputs[] = {kF, kU, kU, kH, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kU, kU, kH};
};

struct NormAttentionInt4 : Attend {
  static constexpr AttentionForm kForm = {true, false, 4};
  explicit NormAttentionInt4(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "NormAttentionInt4";
  static constexpr ort::Type kInputs[] = {kF, kU, kU, kH, kI, kF, kF, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kU, kU, kH};
};

struct HadamardSparseAttentionInt8 : Attend {
  static constexpr AttentionForm kForm = {false, true, 8};
  explicit HadamardSparseAttentionInt8(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "HadamardSparseAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH, kU, kU};
};

struct NormHadamardSparseAttentionInt8 : Attend {
  static constexpr AttentionForm kForm = {true, true, 8};
  explicit NormHadamardSparseAttentionInt8(const Info& info) : Attend(info, kForm) {}
  static constexpr const char* kName = "NormHadamardSparseAttentionInt8";
  static constexpr ort::Type kInputs[] = {kF, kB, kB, kH, kU, kU, kI, kF, kF, kF, kF, kF, kI, kF, kF};
  static constexpr ort::Type kOutputs[] = {kF, kB, kB, kH, kU, kU};
};

}  // namespace
}  // namespace edgekit
