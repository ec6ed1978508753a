// ONNX Runtime's C functions as C++: tensors that know their shape, failures that become statuses, parallel loops.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

#include "ort_abi.h"

namespace edgekit::ort {

extern const OrtApi* g_api;

template <class R, class... A>
R call(Slot slot, A... arguments) {
  return reinterpret_cast<R (*)(A...)>(g_api->slots[slot])(arguments...);
}

// What a kernel throws; it leaves the library as an OrtStatus.
struct Failure {
  std::string text;
};

[[noreturn]] inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{text};
}

inline OrtStatus* status(const std::string& text) {
  return call<OrtStatus*>(CreateStatus, kInvalidArgument, text.c_str());
}

inline void check(OrtStatus* status, const char* what) {
  if (!status) return;
  call<void>(ReleaseStatus, status);
  fail("onnxruntime refused %s", what);
}

// A tensor's place, element type and shape. `data` is null for an absent optional input.
struct Tensor {
  void* data = nullptr;
  int type = 0;
  size_t rank = 0;
  int64_t dims[6] = {};

  int64_t count() const {
    int64_t n = 1;
    for (size_t i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
  std::string shape() const {
    std::string text = "(";
    for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + ")";
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline Tensor describe(const OrtValue* value, const char* name) {
  Tensor tensor;
  if (!value) return tensor;
  const int64_t* dims = nullptr;  // the value's own
  check(call<OrtStatus*>(GetTensorElementTypeAndShapeDataReference, value, &tensor.type, &dims, &tensor.rank), name);
  if (tensor.rank > 6) fail("%s must have at most 6 dimensions: got %zu", name, tensor.rank);
  std::copy(dims, dims + tensor.rank, tensor.dims);
  check(call<OrtStatus*>(GetTensorMutableData, const_cast<OrtValue*>(value), &tensor.data), name);
  static int64_t empty;
  if (!tensor.data) tensor.data = &empty;  // an empty tensor is present all the same
  return tensor;
}

// A kernel at its creation: attributes and constant inputs.
class Info {
 public:
  explicit Info(const OrtKernelInfo* info) : info_(info) {}

  // `name` as a prefix is there in attributes of an operator that is made of several.
  int64_t integer(const std::string& full, int64_t least, int64_t most) const {
    const char* name = full.c_str();
    int64_t value = 0;
    given(call<OrtStatus*>(KernelInfoGetAttribute_int64, info_, name, &value), name);
    if (value < least || value > most) {
      fail("attribute %s must be from %lld to %lld: got %lld", name, (long long)least, (long long)most, (long long)value);
    }
    return value;
  }
  // `otherwise` where the model does not give it.
  int64_t integer_or(const char* name, int64_t otherwise) const {
    int64_t value = otherwise;
    if (OrtStatus* status = call<OrtStatus*>(KernelInfoGetAttribute_int64, info_, name, &value)) {
      call<void>(ReleaseStatus, status);
      return otherwise;
    }
    return value;
  }
  float number(const char* name) const {
    float value = 0;
    given(call<OrtStatus*>(KernelInfoGetAttribute_float, info_, name, &value), name);
    return value;
  }
  // A constant of the model, of `count` elements; the short form takes any number of them.
  Tensor constant(size_t index, const char* name, int type, int64_t count) const {
    const Tensor tensor = constant(index, name, type);
    if (tensor.count() != count) {
      fail("input %s must have %lld elements: got %lld", name, (long long)count, (long long)tensor.count());
    }
    return tensor;
  }
  // Without data where the model does not give it; of any element type.
  Tensor optional_constant(size_t index, const char* name) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(call<OrtStatus*>(KernelInfoGetConstantInput_tensor, info_, index, &is_constant, &value), name);
    return is_constant ? describe(value, name) : Tensor{};
  }
  Tensor constant(size_t index, const char* name, int type) const {
    const Tensor tensor = optional_constant(index, name);
    if (!tensor.data) fail("input %s must be a constant of the model", name);
    if (type != kAny && tensor.type != type) fail("input %s must be of element type %d: got %d", name, type, tensor.type);
    return tensor;
  }

 private:
  static void given(OrtStatus* status, const char* name) {
    if (!status) return;
    call<void>(ReleaseStatus, status);
    fail("attribute %s must be given, and of its own type", name);
  }

  const OrtKernelInfo* info_;
};

// A stretch of memory.
struct Bytes {
  const uint8_t* begin = nullptr;
  int64_t count = 0;
};

// Who shares the pieces of a loop.
class Pool {
 public:
  // work(i) for i in 0..count-1. `work` must not throw.
  template <class Work>
  void parallel(size_t count, const Work& work) const {
    if (count > 1) {
      return run(count, [](void* user, size_t i) { (*static_cast<const Work*>(user))(i); },
                 const_cast<void*>(static_cast<const void*>(&work)));
    }
    if (count == 1) work(size_t{0});
  }
  // What is read next, for those who wait to fetch.
  virtual void expect(Bytes) const {}
  // Whether a loop costs next to nothing to enter.
  virtual bool enters_at_once() const { return false; }

 protected:
  ~Pool() = default;
  virtual void run(size_t count, void (*piece)(void*, size_t), void* user) const = 0;
};

// A kernel at work: inputs, outputs, and the session's threads.
class Context final : public Pool {
 public:
  explicit Context(OrtKernelContext* context) : context_(context) {}

  Tensor input(size_t index, const char* name) const {
    const OrtValue* value = nullptr;
    check(call<OrtStatus*>(KernelContext_GetInput, static_cast<const OrtKernelContext*>(context_), index, &value), name);
    return describe(value, name);
  }
  void* output(size_t index, const int64_t* dims, size_t rank) const {
    OrtValue* value = nullptr;
    check(call<OrtStatus*>(KernelContext_GetOutput, context_, index, dims, rank, &value), "an output's shape");
    void* data = nullptr;
    check(call<OrtStatus*>(GetTensorMutableData, value, &data), "an output's data");
    return data;
  }

 protected:
  void run(size_t count, void (*piece)(void*, size_t), void* user) const override {
    const auto* context = static_cast<const OrtKernelContext*>(context_);
    check(call<OrtStatus*>(KernelContext_ParallelFor, context, piece, count, count, user), "a parallel loop");
  }

 private:
  OrtKernelContext* context_;
};

// Fills an OrtCustomOp from a class with kName, kInputs, kOutputs (element types; all are required, but the last input
// where the class says kLastOptional), a constructor from Info and compute(Context).
template <class Op>
OrtCustomOp make_op() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return int{Op::kInputs[i]}; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
  op.GetOutputType = [](const OrtCustomOp*, size_t i) { return int{Op::kOutputs[i]}; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputs); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    constexpr int kRequired = 0, kOptional = 1;
    if constexpr (requires { Op::kLastOptional; }) return i + 1 == std::size(Op::kInputs) ? kOptional : kRequired;
    return kRequired;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    try {
      *kernel = new Op(Info(info));
      return nullptr;
    } catch (const Failure& failure) {
      return status(std::string(Op::kName) + ": " + failure.text);
    } catch (const std::exception& problem) {
      return status(std::string(Op::kName) + ": " + problem.what());
    }
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    try {
      static_cast<Op*>(kernel)->compute(Context(context));
      return nullptr;
    } catch (const Failure& failure) {
      return status(std::string(Op::kName) + ": " + failure.text);
    } catch (const std::exception& problem) {
      return status(std::string(Op::kName) + ": " + problem.what());
    }
  };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

}  // namespace edgekit::ort

namespace edgekit {
using ort::Context;
using ort::fail;
using ort::Info;
using ort::Pool;
using ort::Tensor;
}  // namespace edgekit
