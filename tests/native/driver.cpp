// Runs every path that this processor has on the same seeded numbers, without onnxruntime:
//
//   driver [quick | full | threads]
//
// What is computed in integers must be the same to the last bit on all paths: codes and their sums, halves, rows of a
// matrix, and products whose scales are whole numbers. The rest is held against sums in double. One line a path; exit
// status 1 when something differs. Buffers end where their data end and may start at odd places, for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "order.h"
#include "path.h"
#include "team.h"

using namespace edgekit;

namespace {

// Numbers that are the same everywhere (Marsaglia's xorshift64*).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545F4914F6CDD1Dull >> 32);
  }
  int64_t below(int64_t n) { return bits() % n; }
  float number() { return static_cast<float>(below(2001) - 1000) / 500.0f; }  // from -2 to 2
  uint16_t half() { return static_cast<uint16_t>(0x2000 + below(0x1800) + (below(2) << 15)); }  // 2^-7 to 0.5, signed

 private:
  uint64_t state_;
};

// Exactly `count` elements, the first one `shift` elements past the start of an allocation.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t shift = 0) : memory_(new T[count + shift]()), count_(count), shift_(shift) {}
  T* data() { return memory_.get() + shift_; }
  const T* data() const { return memory_.get() + shift_; }
  T* begin() { return data(); }
  T* end() { return data() + count_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t count() const { return count_; }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t count_, shift_;
};

// Checksum of what must not differ (FNV-1a), and the largest differences of what may.
struct Findings {
  uint64_t integers = 14695981039346656037ull;
  double product = 0, attention = 0;
  std::string wrong;

  template <class T>
  void add(Buffer<T>& values) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.count() * sizeof(T); ++i) integers = (integers ^ bytes[i]) * 1099511628211ull;
  }
  void expect(bool right, const std::string& what) {
    if (!right && wrong.empty()) wrong = what;
  }
};

float half_value(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return static_cast<float>(half & 0x8000 ? -size : size);
}

// Where a row's code and its block's scale are among rows abreast, by the layout in path.h.
int64_t abreast_code(int64_t row, int64_t column, int64_t width, int abreast) {
  return row / abreast * abreast * width + column / 4 * 4 * abreast + row % abreast * 4 + column % 4;
}
int64_t abreast_block(int64_t row, int64_t block, int64_t blocks, int abreast) {
  return (row / abreast * blocks + block) * abreast + row % abreast;
}

// A case of matrix and activations: sizes, then what fills them.
struct Case {
  int bits, block;
  Offset offset;
  int64_t rows, columns, inputs;
  int planes;
  bool gated, exact;  // exact: all scales are 1, so that sums stay whole numbers
  int64_t shift;
  bool small;  // scales and minima of 8 bits
  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "%d bits, block %d, offset %d, %lld x %lld, %lld inputs of %d%s%s%s", bits, block,
                  static_cast<int>(offset), static_cast<long long>(rows), static_cast<long long>(columns),
                  static_cast<long long>(inputs), planes, gated ? ", gated" : "", exact ? ", exact" : "",
                  small ? ", small scales" : "");
    return text;
  }
};

struct Problem {
  Case c;
  int64_t width, tiles, blocks;  // rows of the output; tiles and blocks of the matrix
  Buffer<uint8_t> codes, zeros, small_scales;
  Buffer<int8_t> small_minima;
  Buffer<uint16_t> scales, minima, steps;
  Buffer<int8_t> x_codes;
  Buffer<float> x_scales, bias, residual;
  Buffer<int32_t> x_sums;
  std::vector<int8_t> abreast_codes;
  std::vector<float> abreast_scales;
  std::vector<int32_t> abreast_sums;

  Problem(const Case& of, uint64_t seed)
      : c(of),
        width(c.gated ? c.rows / 2 : c.rows),
        tiles((width + kLanes - 1) / kLanes * (c.gated ? 2 : 1)),
        blocks((c.columns + c.block - 1) / c.block),
        codes(tiles * blocks * kLanes * c.block * c.bits / 8, c.shift),
        zeros(tiles * blocks * kLanes, c.shift),
        small_scales(tiles * blocks * kLanes, c.shift),
        small_minima(tiles * blocks * kLanes, c.shift),
        scales(tiles * blocks * kLanes, c.shift),
        minima(tiles * blocks * kLanes, c.shift),
        steps(tiles * kLanes * (c.offset == Offset::kMinimum ? 2 : 1), c.shift),
        x_codes(c.planes * c.inputs * blocks * c.block, c.shift),
        x_scales(c.inputs * blocks, c.shift),
        bias(width, c.shift),
        residual(c.inputs * width, c.shift),
        x_sums(c.planes * c.inputs * blocks, c.shift) {
    Random random(seed);
    const bool whole = c.exact && c.planes == 2;       // the high plane must stay small
    const bool largest = !whole && random.below(4) == 0;  // the products that come nearest to overflow
    for (uint8_t& code : codes) code = largest ? (c.bits < 8 ? 0xff : random.below(2) * 255) : random.bits();
    for (uint8_t& zero : zeros) zero = random.below(1 << c.bits);
    for (uint16_t& scale : scales) scale = c.exact ? 0x3c00 : random.half();
    for (uint16_t& minimum : minima) minimum = c.exact ? 0x4000 | (random.below(2) << 15) : random.half();
    for (uint8_t& scale : small_scales) scale = c.exact ? 1 : random.below(256);
    for (int8_t& minimum : small_minima) minimum = static_cast<int8_t>(c.exact ? 2 - 4 * random.below(2) : random.below(256) - 128);
    for (uint16_t& step : steps) step = c.exact ? 0x3c00 : random.half() & 0x7fff;
    for (float& value : bias) value = c.exact ? random.below(100) : random.number();
    for (float& value : residual) value = c.exact ? random.below(100) : random.number();
    for (float& scale : x_scales) scale = c.exact ? 1.0f : random.number() * 0.01f;
    for (int64_t i = 0; i < x_codes.count(); ++i) {
      const bool inside = i % (blocks * c.block) < c.columns, high = i < c.inputs * blocks * c.block;
      const int most = whole && high ? 1 : 127, code = static_cast<int>(random.below(2 * most + 1)) - most;
      x_codes[i] = static_cast<int8_t>(!inside ? 0 : !largest ? code : random.below(8) ? 127 : -127);
      x_sums[i / c.block] += x_codes[i];
    }
  }
  Matrix matrix() const {
    const void* least = c.small ? static_cast<const void*>(small_minima.data()) : minima.data();
    const void* offsets = c.offset == Offset::kZeroPoint ? static_cast<const void*>(zeros.data())
                          : c.offset == Offset::kMinimum ? least
                                                         : nullptr;
    const void* factors = c.small ? static_cast<const void*>(small_scales.data()) : scales.data();
    return {codes.data(), factors, offsets, c.offset, c.bits, c.block, c.rows, c.columns, c.small ? steps.data() : nullptr};
  }
  Activations activations(const Path& path) {
    const int64_t width = blocks * c.block;
    if (c.planes != 1 || c.inputs < path.abreast || path.abreast == 1) {
      return {x_codes.data(), x_scales.data(), x_sums.data(), c.planes, c.inputs, width, blocks};
    }
    const int64_t room = (c.inputs + path.abreast - 1) / path.abreast * path.abreast;
    abreast_codes.assign(room * width, 0);
    abreast_scales.assign(room * blocks, NAN);
    abreast_sums.assign(room * blocks, 0);
    for (int64_t m = 0; m < c.inputs; ++m) {
      for (int64_t k = 0; k < width; ++k) {
        abreast_codes[abreast_code(m, k, width, path.abreast)] = x_codes[m * width + k];
        abreast_scales[abreast_block(m, k / c.block, blocks, path.abreast)] = x_scales[m * blocks + k / c.block];
        abreast_sums[abreast_block(m, k / c.block, blocks, path.abreast)] = x_sums[m * blocks + k / c.block];
      }
    }
    return {abreast_codes.data(), abreast_scales.data(), abreast_sums.data(), 1, c.inputs, width, blocks, path.abreast};
  }
  Epilogue epilogue() const { return {c.gated ? nullptr : bias.data(), c.gated ? nullptr : residual.data(), c.gated}; }

  // The code at a row of a tile and a column, by the layout in path.h.
  int code(int64_t tile, int64_t lane, int64_t column) {
    const int64_t group = (tile * blocks * c.block + column / 32 * 32) * kLanes * c.bits / 8;
    const int low = low_bits(c.bits), high = c.bits - low, run = column % 32 / 4;
    const int64_t at = group + 4 * lane + column % 4;
    int code = codes[at + 64 * (run % low)] >> (low * (run / low)) & ((1 << low) - 1);
    if (high) code |= (codes[at + 64 * (low + run % high)] >> (high * (run / high)) & ((1 << high) - 1)) << low;
    return code;
  }
  double scale(int64_t tile, int64_t lane, int64_t at) const {
    if (!c.small) return half_value(scales.data()[at]);
    return static_cast<double>(small_scales.data()[at]) *
           half_value(steps.data()[(c.offset == Offset::kMinimum ? 2 : 1) * tile * kLanes + lane]);
  }
  double minimum(int64_t tile, int64_t lane, int64_t at) const {
    if (c.offset != Offset::kMinimum) return 0;
    if (!c.small) return half_value(minima.data()[at]);
    return static_cast<double>(small_minima.data()[at]) * half_value(steps.data()[(2 * tile + 1) * kLanes + lane]);
  }
  double input(int64_t m, int64_t column) {
    const int64_t width = blocks * c.block, at = m * width + column;
    const double q = c.planes == 1 ? x_codes[at] : kPlane * x_codes[at] + x_codes[c.inputs * width + at];
    return q * x_scales[m * blocks + column / c.block];
  }
  double weight(int64_t tile, int64_t lane, int64_t column) {
    const int64_t at = (tile * blocks + column / c.block) * kLanes + lane;
    const double q = code(tile, lane, column);
    if (c.offset == Offset::kMinimum) return scale(tile, lane, at) * q + minimum(tile, lane, at);
    return scale(tile, lane, at) * (q - (c.offset == Offset::kZeroPoint ? zeros[at] : 1 << (c.bits - 1)));
  }
  // The product of input row m with a row of a tile, and the size of the terms that a kernel may take it apart into.
  double dot(int64_t m, int64_t tile, int64_t lane, double* size) {
    double total = 0;
    for (int64_t k = 0; k < c.columns; ++k) {
      const int64_t at = (tile * blocks + k / c.block) * kLanes + lane;
      const double x = input(m, k);
      total += weight(tile, lane, k) * x;
      const double s = std::abs(scale(tile, lane, at)), least = std::abs(minimum(tile, lane, at));
      *size += std::abs(x) * (s * (code(tile, lane, k) + (1 << c.bits)) + least);
    }
    return total;
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

void check_products(const Path& path, const Case& c, uint64_t seed, Findings& found) {
  Problem p(c, seed);
  Buffer<float> y(c.inputs * p.width, c.shift);
  std::fill(y.begin(), y.end(), NAN);
  const int64_t units = p.tiles / (c.gated ? 2 : 1), cut = units / 2;
  const Activations x = p.activations(path);
  std::vector<uint8_t> work(multiply_scratch(x));
  path.multiply(p.matrix(), x, p.epilogue(), y.data(), p.width, cut, units, work.data());
  path.multiply(p.matrix(), x, p.epilogue(), y.data(), p.width, 0, cut, work.data());
  for (int64_t m = 0; m < c.inputs; ++m) {
    for (int64_t n = 0; n < p.width; ++n) {
      const int64_t tile = n / kLanes, lane = n % kLanes;
      double size = 1e-30, expected;
      if (c.gated) {
        const double gate = p.dot(m, 2 * tile, lane, &size), up = p.dot(m, 2 * tile + 1, lane, &size);
        expected = silu(gate) * up;
        size *= std::abs(up) + std::abs(gate) + 1;
      } else {
        expected = p.dot(m, tile, lane, &size) + p.bias[n] + p.residual[m * p.width + n];
        size += std::abs(p.bias[n]) + std::abs(p.residual[m * p.width + n]);
      }
      const double error = std::abs(y[m * p.width + n] - expected) / size;
      found.product = std::max(found.product, error);
      found.expect(error < 5e-7 && (!c.exact || error == 0), "product: " + c.name());
    }
  }
  if (c.exact) found.add(y);
  if (c.gated) return;
  Buffer<float> row(c.columns, c.shift);
  for (int64_t n = 0; n < c.rows; n += 5) {
    path.row(p.matrix(), n, row.data());
    for (int64_t k = 0; k < c.columns; ++k) {
      const double expected = p.weight(n / kLanes, n % kLanes, k);
      found.expect(std::abs(row[k] - expected) <= 1e-4 * (1 + std::abs(expected)), "row: " + c.name());
    }
    found.add(row);
  }
}

// Codes against their definition; `extreme` has numbers that are none.
void check_quantize(const Path& path, int64_t columns, int block, int64_t rows, int planes, bool normed, bool extreme,
                    uint64_t seed, Findings& found) {
  Random random(seed);
  const int64_t blocks = (columns + block - 1) / block, shift = random.below(4);
  Buffer<float> x(rows * columns, shift), norm(columns, shift), scales(rows * blocks, shift);
  Buffer<int8_t> codes(planes * rows * blocks * block, shift);
  Buffer<int32_t> sums(planes * rows * blocks, shift);
  for (float& value : x) value = random.below(7) ? random.number() : 0.0f;
  for (float& value : norm) value = random.number();
  constexpr float kExtremes[] = {NAN, INFINITY, -INFINITY, 1e-45f, 1e-38f, 3e38f, -3e38f, -0.0f};
  if (extreme) {
    for (float& value : x) value = random.below(3) ? value : kExtremes[random.below(8)];
  }
  const bool lined = planes == 1 && rows >= path.abreast && path.abreast > 1;
  const int64_t room = lined ? (rows + path.abreast - 1) / path.abreast * path.abreast : rows, width = blocks * block;
  Buffer<float> room_scales(room * blocks, shift);
  Buffer<int8_t> room_codes(planes * room * width, shift);
  Buffer<int32_t> room_sums(planes * room * blocks, shift);
  const Activations out{room_codes.data(), room_scales.data(), room_sums.data(), planes, rows, width, blocks, lined ? path.abreast : 1};
  const float epsilon = 1e-5f;
  path.quantize(x.data(), columns, normed ? norm.data() : nullptr, epsilon, block, out, rows / 2, rows);
  path.quantize(x.data(), columns, normed ? norm.data() : nullptr, epsilon, block, out, 0, rows / 2);
  if (extreme) return;
  // One row after the other, on whatever path.
  for (int64_t i = 0; i < codes.count(); ++i) codes[i] = room_codes[lined ? abreast_code(i / width, i % width, width, path.abreast) : i];
  for (int64_t i = 0; i < sums.count(); ++i) sums[i] = room_sums[lined ? abreast_block(i / blocks, i % blocks, blocks, path.abreast) : i];
  for (int64_t i = 0; i < scales.count(); ++i) scales[i] = room_scales[lined ? abreast_block(i / blocks, i % blocks, blocks, path.abreast) : i];
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t k = 0; k < columns; ++k) squares += static_cast<double>(x[row * columns + k]) * x[row * columns + k];
    const double gain = normed ? 1 / std::sqrt(squares / columns + epsilon) : 1;
    for (int64_t b = 0; b < blocks; ++b) {
      const double scale = scales[row * blocks + b];
      int32_t totals[2] = {};
      for (int64_t k = b * block; k < (b + 1) * block; ++k) {
        const int64_t at = row * blocks * block + k;
        const double value = k < columns ? x[row * columns + k] * gain * (normed ? norm[k] : 1) : 0;
        const int low = planes == 2 ? codes[rows * blocks * block + at] : 0;
        const double back = scale * (planes == 2 ? kPlane * codes[at] + low : codes[at]);
        // Half a step, and at 15 bits the rounding of the float itself.
        found.expect(std::abs(back - value) <= 0.5001 * scale + 1e-6 * std::abs(value), "quantize: a code is too far");
        totals[0] += codes[at];
        totals[1] += low;
      }
      for (int plane = 0; plane < planes; ++plane) {
        found.expect(sums[(plane * rows + row) * blocks + b] == totals[plane], "quantize: a sum is wrong");
      }
    }
  }
  if (!normed) {
    found.add(codes);
    found.add(sums);
    found.add(scales);
  }
}

// All halves, and floats around everything that rounds in its own way.
void check_halves(const Path& path, Findings& found) {
  Random random(7);
  constexpr int64_t kCount = 40003;
  Buffer<float> floats(kCount, 1);
  Buffer<uint16_t> halves(kCount, 1);
  for (float& value : floats) {
    const uint32_t near = (random.below(40) + 100) << 23 | (random.bits() & 0x7fe000) | (random.below(3) + 0xfff);
    const uint32_t bits = random.below(2) ? random.bits() : near | random.below(2) << 31;
    std::memcpy(&value, &bits, 4);
  }
  path.to_half(floats.data(), halves.data(), kCount);
  found.add(halves);
  for (int64_t i = 0; i < kCount; ++i) {
    if (std::isnan(floats[i])) continue;
    const double size = std::abs(static_cast<double>(floats[i]));
    const bool infinite = (halves[i] & 0x7fff) == 0x7c00;
    found.expect(infinite == (size >= 65520) && (halves[i] >> 15 != 0) == std::signbit(floats[i]), "to_half: sign or infinity");
    if (infinite) continue;
    const double step = std::ldexp(1.0, std::max(std::ilogb(std::max(size, 1e-30)), -14) - 10);
    found.expect(std::abs(half_value(halves[i]) - static_cast<double>(floats[i])) <= step / 2, "to_half: not the nearest");
  }
  // A row of ones times each half.
  constexpr int64_t kRows = 65536;
  Buffer<uint8_t> codes(kRows * 32), zeros(kRows);
  Buffer<uint16_t> scales(kRows);
  std::fill(codes.begin(), codes.end(), 1);
  for (int64_t i = 0; i < kRows; ++i) scales[i] = static_cast<uint16_t>(i);
  const Matrix w{codes.data(), scales.data(), zeros.data(), Offset::kZeroPoint, 8, 32, kRows, 1};
  for (int64_t i = 0; i < kRows; ++i) {
    float value;
    path.row(w, i, &value);
    const bool finite = (i & 0x7c00) != 0x7c00, nan = !finite && (i & 0x3ff);
    const float expected = finite ? half_value(scales[i]) : i >> 15 ? -INFINITY : INFINITY;
    found.expect(nan ? std::isnan(value) : value == expected, "a half is read wrongly");
  }
}

struct Shape {
  int64_t tokens, heads, head_dim, first, window;
};

// Rows of a cache of 16, 8 or 4 bits, and what they count as; those of 4 bits as they are kept, transformed.
struct Kept {
  int64_t head_dim;
  int bits;
  Buffer<uint16_t> halves, scales;
  Buffer<uint8_t> codes;
  Kept(int64_t rows, int64_t d, int64_t shift, int width)
      : head_dim(d), bits(width), halves(rows * d, shift), scales(rows, shift), codes(rows * d * width / 8, shift) {}
  Rows rows() const {
    return bits < 16 ? Rows{codes.data(), scales.data(), bits} : Rows{halves.data(), nullptr, bits};
  }
  int code(int64_t row, int64_t i) const {
    if (bits == 8) return static_cast<int8_t>(codes.data()[row * head_dim + i]);
    const int64_t half = head_dim / 2;
    return (codes.data()[row * half + i % half] >> (i < half ? 0 : 4) & 15) - 8;
  }
  double value(int64_t row, int64_t i) const {
    if (bits == 16) return half_value(halves.data()[row * head_dim + i]);
    return code(row, i) * static_cast<double>(half_value(scales.data()[row]));
  }
};

float bfloat16(double x) {
  const auto number = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16;
  float nearest;
  std::memcpy(&nearest, &bits, sizeof nearest);
  return nearest;
}

// Products of many rows, on a path that wants them in bfloat16.
void check_many(const Path& path, const Case& c, uint64_t seed, Findings& found) {
  Problem p(c, seed);
  Random random(seed);
  const int64_t width = p.blocks * c.block;
  Buffer<float> x(c.inputs * c.columns, c.shift), y(c.inputs * p.width, c.shift);
  for (float& value : x) value = random.number();
  Buffer<int8_t> squares(activation_codes(0, c.inputs, width), c.shift);
  const Activations codes{squares.data(), nullptr, nullptr, 0, c.inputs, width, p.blocks};
  const int64_t units = p.tiles / (c.gated ? 2 : 1), cut = units / 2, half = c.inputs / 2;
  std::vector<uint8_t> work(multiply_scratch(codes));
  path.quantize(x.data(), c.columns, nullptr, 0, c.block, codes, half, c.inputs);
  path.quantize(x.data(), c.columns, nullptr, 0, c.block, codes, 0, half);
  path.multiply(p.matrix(), codes, p.epilogue(), y.data(), p.width, cut, units, work.data());
  path.multiply(p.matrix(), codes, p.epilogue(), y.data(), p.width, 0, cut, work.data());
  for (int64_t m = 0; m < c.inputs; m += 7) {
    for (int64_t n = 0; n < p.width; ++n) {
      double sums[2] = {}, size = 1e-30;
      for (int part = 0; part < (c.gated ? 2 : 1); ++part) {
        for (int64_t k = 0; k < c.columns; ++k) {
          const double term = static_cast<double>(bfloat16(x[m * c.columns + k])) *
                              bfloat16(p.weight((c.gated ? 2 : 1) * (n / kLanes) + part, n % kLanes, k));
          sums[part] += term;
          size += std::abs(term);
        }
      }
      double expected = sums[0];
      if (c.gated) {
        expected = silu(sums[0]) * sums[1];
        size *= std::abs(sums[0]) + std::abs(sums[1]) + 1;
      } else {
        expected += p.bias[n] + p.residual[m * p.width + n];
        size += std::abs(p.bias[n]) + std::abs(p.residual[m * p.width + n]);
      }
      const double error = std::abs(y[m * p.width + n] - expected) / size;
      found.product = std::max(found.product, error);
      found.expect(error < 1e-6, "many rows: " + c.name());
    }
  }
}

// Rows of whole numbers come back within half a step.
void round_rows(const Path& path, Kept& kept, Random& random, Findings& found) {
  Buffer<float> row(kept.head_dim, 1);
  for (int64_t r = 0; r < kept.scales.count(); ++r) {
    const float size = std::ldexp(1.0f, static_cast<int>(random.below(6)) - 6);
    for (float& value : row) value = r % 7 == 6 ? 0.0f : size * random.number();
    kept.scales[r] = path.round_row(row.data(), kept.head_dim, kept.bits, kept.codes.data() + r * kept.head_dim * kept.bits / 8);
    const double scale = half_value(kept.scales[r]);
    for (int64_t i = 0; i < kept.head_dim; ++i) {
      found.expect(std::abs(kept.code(r, i) * scale - row[i]) <= (kept.bits == 8 ? 0.501 : 1.002) * std::abs(scale), "round_row: a code is too far");
    }
  }
  found.add(kept.codes);
  found.add(kept.scales);
}

void check_attention(const Path& path, const Shape& s, int bits, uint64_t seed, Findings& found) {
  const bool small = bits < 16;
  Random random(seed);
  const int64_t length = s.first + s.tokens, d = s.head_dim, stride = s.heads * d + 16;
  const int64_t count = (s.tokens - 1) * stride + s.heads * d;
  Buffer<float> q(count, 1), out(count, 3), scratch(attention_scratch(s.tokens, s.heads, d), 1);
  Kept keys(length, d, 1, bits), values(length, d, 3, bits);
  for (float& value : q) value = random.number() * 3;
  if (small) {
    round_rows(path, keys, random, found);
    round_rows(path, values, random, found);
  }
  for (uint16_t& key : keys.halves) key = random.half() + 0x800;
  for (uint16_t& value : values.halves) value = random.half();
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  path.attend({q.data(), keys.rows(), values.rows(), out.data(), stride, s.tokens, s.heads, d, s.first, s.window, scale,
               scratch.data()});
  std::vector<double> weights(length);
  for (int64_t token = 0; token < s.tokens; ++token) {
    const int64_t last = s.first + token, begin = s.window > 0 ? std::max<int64_t>(0, last + 1 - s.window) : 0;
    Buffer<float> one(s.heads * d, 1), maxima(s.heads, 1), sums(s.heads, 1);
    const int64_t seen = last + 1 - begin, padded = (seen + kLanes - 1) / kLanes * kLanes;
    Buffer<float> scores(4 * padded, 1);
    const bool decoded = token + 1 == s.tokens;
    if (decoded) {
      path.decode({q.data() + token * stride, keys.rows().from(begin, d), values.rows().from(begin, d), seen, padded,
                   s.heads, d, scale, one.data(), maxima.data(), sums.data(), scores.data()});
    }
    for (int64_t h = 0; h < s.heads; ++h) {
      const float* row = q.data() + token * stride + h * d;
      double top = -1e300, total = 0;
      for (int64_t j = begin; j <= last; ++j) {
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += static_cast<double>(row[i]) * keys.value(j, i);
        weights[j] = score * scale;
        top = std::max(top, weights[j]);
      }
      for (int64_t j = begin; j <= last; ++j) total += weights[j] = std::exp(weights[j] - top);
      for (int64_t i = 0; i < d; ++i) {
        double expected = 0;
        for (int64_t j = begin; j <= last; ++j) expected += weights[j] / total * values.value(j, i);
        double error = std::abs(out[token * stride + h * d + i] - expected);
        if (decoded) error = std::max(error, std::abs(one[h * d + i] / static_cast<double>(sums[h]) - expected));
        if (!small) found.attention = std::max(found.attention, error);
        // One token's query has 15 bits where the cache has 8, and numbers on the matrix unit have 16.
        const bool squares = path.many_planes == 0;
        found.expect(error < (small && decoded ? 5e-4 : small || squares ? 2e-5 : 2e-6), "attention: tokens " + std::to_string(s.tokens) + ", first " + std::to_string(s.first));
      }
    }
  }
}

// One token over codes: estimates and what is left of pages against sums in double, what is chosen against sorting. Heads of
// `d` channels, `heads` to a selection; candidates are positions sinks..recent - 1.
void check_sparse(const Path& path, int64_t d, int64_t heads, int64_t blocks, int64_t sinks, int64_t recent, uint64_t seed,
                  Findings& found) {
  Random random(seed);
  const int64_t fine = d / 64 * kLanes, channels = d - fine, stride = blocks * kBlockTokens;
  Buffer<uint8_t> codes(blocks * kPageTokens * 4 * d), means(blocks * mean_bytes(d));
  Buffer<int8_t> q(heads * channels);
  Buffer<float> factors(heads), constants(heads), page_weights(heads * blocks * kLanes);
  Buffer<uint16_t> logs(heads * stride), lowered(heads * blocks);
  Buffer<float> references(heads * blocks), sums(heads * blocks), gains(heads * blocks), totals(heads), out(heads * d);
  for (uint8_t& code : codes) code = random.bits();
  for (int8_t& code : q) code = static_cast<int8_t>(random.below(255) - 127);
  for (float& factor : factors) factor = 0.5f;
  for (float& constant : constants) constant = 256 * (random.number() + 80.0f * static_cast<float>(&constant - constants.data()));
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < kLanes * d; ++i) means[b * mean_bytes(d) + i] = static_cast<uint8_t>(random.below(255) - 127);
    for (int64_t page = 0; page < kLanes; ++page) {
      const uint16_t scale = 0x2000 + random.below(0x1800);
      std::memcpy(means.data() + b * mean_bytes(d) + kLanes * d + 2 * page, &scale, 2);
    }
  }
  SparseTask t{};
  t.q_codes = q.data(), t.factors = factors.data(), t.constants = constants.data();
  t.codes = codes.data(), t.means = means.data();
  t.heads = heads, t.head_dim = d, t.channels = channels, t.fine = fine;
  t.last_block = t.blocks = blocks, t.sinks = sinks, t.recent = recent, t.stride = stride;
  t.logs = logs.data(), t.lowered = lowered.data(), t.page_weights = page_weights.data(), t.references = references.data(), t.sums = sums.data();
  t.gains = gains.data(), t.totals = totals.data(), t.out = out.data();
  path.estimate(t);
  const auto position = [](int64_t place) {
    return place / kBlockTokens * kBlockTokens + place % kLanes * kPageTokens + place % kBlockTokens / kLanes;
  };
  for (int64_t h = 0; h < heads; ++h) {
    float most;
    const float whole = path.add_blocks(references.data() + h * blocks, sums.data() + h * blocks, blocks, &most);
    double expected = 0;
    for (int64_t place = 0; place < stride; ++place) {
      const int64_t p = position(place), b = place / kBlockTokens, lane = place % kLanes, j = place % kBlockTokens / kLanes;
      const uint8_t* line = codes.data() + (b * kPageTokens + j) * 4 * d + 4 * lane;
      int64_t sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t in = c < fine ? c : c - fine, run = c < fine ? 8 : 16, bits = c < fine ? 4 : 2;
        const int64_t at = (c < fine ? 0 : fine / 8) + in / run;
        sum += (line[64 * at + in % 4] >> (bits * (in % run / 4)) & ((1 << bits) - 1)) * q[h * channels + c];
      }
      const double estimate = factors[h] * static_cast<double>(sum) + constants[h];
      const bool candidate = p >= sinks && p < recent;
      // In 256ths of a power of two; the bits of a float are near a power 15 higher.
      const double whole = std::nearbyint(estimate) - 15 - 256.0 * references[h * blocks + b], power = std::floor(whole / 256);
      const double weight = candidate ? std::ldexp(1 + whole / 256 - power, static_cast<int>(power)) : 0.0;
      const double off = std::abs(weight_of(logs[h * stride + stored(place)]) - weight);
      // Floats may round it the other way.
      const bool between = std::abs(std::abs(estimate - std::nearbyint(estimate)) - 0.5) < 1e-3;
      found.expect(off <= (between ? 4e-3 : 0.0) * weight, "sparse: an estimate");
      if (candidate) found.expect(std::abs(weight / std::exp2(estimate / 256 - references[h * blocks + b]) - 1) < 0.045, "sparse: a power");
      expected += candidate ? std::exp2(estimate / 256 - most) : 0.0;
    }
    found.expect(std::abs(whole - expected) <= 0.045 * expected, "sparse: the whole");
    const float log = most + std::log2(whole);
    path.find_gains(references.data() + h * blocks, blocks, log, gains.data() + h * blocks, lowered.data() + h * blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      const double gain = std::exp2(references[h * blocks + b] - static_cast<double>(log));
      found.expect(std::abs(gains[h * blocks + b] - gain) <= 1e-5 * gain + 1e-35, "sparse: a gain");
    }
  }
  for (const int64_t exact : {int64_t{0}, int64_t{7}, int64_t{100}}) {
    const int64_t following = 2 * exact + 16;
    Buffer<int32_t> shares(stride + kLanes), share(stride), places(stride + kLanes), chosen(exact + kLanes), next(following + kLanes);
    int64_t exact_found = 0, following_found = 0;
    SparseChoice c{};
    c.exact_count = exact, c.following_count = following;
    c.shares = shares.data(), c.places = places.data(), c.exact = chosen.data(), c.following = next.data();
    c.exact_found = &exact_found, c.following_found = &following_found;
    path.select(t, c);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < stride; ++i) share[i] = std::max(share[i], int32_t{logs[h * stride + stored(i)]} - lowered[h * blocks + i / kBlockTokens]);
    }
    std::vector<int32_t> order(stride);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return share[a] > share[b]; });
    order.resize(std::min<int64_t>(exact + following, std::count_if(share.begin(), share.end(), [](int32_t x) { return x > 0; })));
    std::vector<int32_t> first(order.begin(), order.begin() + std::min<int64_t>(exact, order.size())), rest(order.begin() + first.size(), order.end());
    std::sort(first.begin(), first.end());
    std::sort(rest.begin(), rest.end());
    found.expect(exact_found == static_cast<int64_t>(first.size()) && std::equal(first.begin(), first.end(), chosen.data()), "sparse: what is chosen");
    found.expect(following_found == static_cast<int64_t>(rest.size()) && std::equal(rest.begin(), rest.end(), next.data()), "sparse: what follows");
  }
  path.weigh(t);
  for (int64_t h = 0; h < heads; ++h) {
    double total = 0;
    for (int64_t i = 0; i < d; ++i) {
      double expected = 0, size = 1e-9;
      for (int64_t page = 0; page < blocks * kLanes; ++page) {
        const uint8_t* block = means.data() + page / kLanes * mean_bytes(d);
        uint16_t scale;
        std::memcpy(&scale, block + kLanes * d + 2 * (page % kLanes), 2);
        const double weight = static_cast<double>(page_weights[h * blocks * kLanes + page]) * gains[h * blocks + page / kLanes];
        const auto number = static_cast<int8_t>(block[(i / kLanes * 4 + page % kLanes / 4) * 64 + i % kLanes * 4 + page % 4]);
        expected += weight * half_value(scale) * number;
        size += weight * half_value(scale) * 127;
        if (i == 0) total += weight;
      }
      found.expect(std::abs(out[h * d + i] - expected) <= 0.02 * size, "sparse: the means");  // pages' shares have 8 bits
    }
    found.expect(std::abs(totals[h] - total) <= 1e-5 * total, "sparse: the totals");
  }
}

Findings check_path(const Path& path, bool full) {
  Findings found;
  Random random(42);
  uint64_t seed = 1;
  constexpr int64_t kColumns[] = {1, 2, 3, 31, 33, 575, 577, 1023}, kRows[] = {1, 2, 16, 33, 46}, kInputs[] = {0, 1, 2, 3, 11, 37};
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int block : {32, 64, 128}) {
      for (const Offset offset : {Offset::kSymmetric, Offset::kZeroPoint, Offset::kMinimum}) {
        for (const int64_t columns : kColumns) {
          for (const int form : {0, 1, 2}) {  // floats, whole numbers, gated
            for (int i = 0; i < (full ? 5 : 1); ++i) {
              const int64_t rows = full ? kRows[i] : kRows[random.below(5)], inputs = kInputs[random.below(6)];
              const int planes = 1 + static_cast<int>(random.below(2));
              const Case c{bits, block, offset, form == 2 ? 2 * rows : rows, columns, inputs, planes, form == 2, form == 1,
                           random.below(4), random.below(2) == 1};
              check_products(path, c, ++seed, found);
            }
          }
        }
      }
    }
  }
  for (const int64_t columns : {32, 96, 576, 1024}) {  // whose blocks may be half a group
    for (int i = 0; i < (full ? 40 : 10); ++i) {
      const bool gated = i % 2 == 0;
      const Case c{6, 16, Offset::kSymmetric, (gated ? 2 : 1) * kRows[i % 5], columns, kInputs[random.below(6)],
                   1 + static_cast<int>(random.below(2)), gated, !gated && i % 4 == 1, random.below(4), random.below(2) == 1};
      check_products(path, c, ++seed, found);
    }
  }
  for (const int block : {16, 32, 64, 128}) {
    for (const int64_t columns : kColumns) {
      for (const int64_t rows : {0, 1, 5, 11}) {
        for (const int planes : {1, 2}) {
          for (const bool normed : {false, true}) {
            for (const bool extreme : {false, true}) {
              check_quantize(path, columns, block, rows, planes, normed, extreme, ++seed, found);
            }
          }
        }
      }
    }
  }
  check_halves(path, found);
  constexpr Shape kShapes[] = {{1, 1, 16, 0, 0},   {1, 3, 64, 0, 0},     {1, 9, 64, 130, 0},  {2, 4, 48, 63, 0},
                               {7, 3, 64, 64, 0},  {64, 3, 64, 0, 0},    {33, 2, 32, 200, 0}, {5, 5, 16, 100, 10},
                               {70, 1, 64, 90, 1}, {17, 6, 128, 70, 64}, {3, 7, 80, 200, 65}};
  for (const Shape& shape : kShapes) {
    for (const int bits : {16, 8, 4}) {
      if (bits > 4 || shape.head_dim % (2 * kLanes) == 0) check_attention(path, shape, bits, ++seed, found);
    }
  }
  for (const int64_t d : {16, 64, 80, 128}) {
    for (const int64_t heads : {1, 3, 4}) {
      for (const int64_t blocks : {1, 3, 20}) {
        check_sparse(path, d, heads, blocks, blocks == 3 ? 0 : 4, blocks * kBlockTokens - (blocks == 3 ? 1 : 40), ++seed, found);
      }
    }
  }
  for (int i = 0; path.many_planes == 0 && i < 4; ++i) {
    const Case c{6, 16, Offset::kSymmetric, 2 * kRows[i + 1], 32 * (1 + 13 * i), 65 + random.below(70), 1, i == 3, false, 1, i == 2};
    check_many(path, c, ++seed, found);
  }
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const Offset offset : {Offset::kSymmetric, Offset::kZeroPoint, Offset::kMinimum}) {
      for (int i = 0; path.many_planes == 0 && i < 4; ++i) {
        const bool gated = i == 3;
        const Case c{bits, 32 << random.below(3), offset, (gated ? 2 : 1) * kRows[random.below(5)], kColumns[random.below(8)],
                     65 + random.below(70), 1, gated, false, random.below(4), random.below(2) == 1};
        check_many(path, c, ++seed, found);
      }
    }
  }
  return found;
}

int check_all(bool full) {
  const char* names[16];
  const int count = known_paths(names, 16);
  uint64_t integers = 0;
  bool right = true;
  for (int i = count - 1; i >= 0; --i) {  // the portable path first
    if (!choose_path(names[i])) return 1;
    Findings found = check_path(path(), full);
    if (i == count - 1) integers = found.integers;
    found.expect(found.integers == integers, "integers differ from the portable path's");
    std::printf("%-12s integers %016llx, off by at most: products %.1e, attention %.1e: %s\n", path().name,
                static_cast<unsigned long long>(found.integers), found.product, found.attention,
                found.wrong.empty() ? "ok" : found.wrong.c_str());
    right &= found.wrong.empty();
  }
  return right ? 0 : 1;
}

// Tiles of one product on several threads: first those that find the path, then each path.
int check_threads() {
  constexpr int kThreads = 4;
  Problem p({3, 32, Offset::kMinimum, 160, 577, 11, 2, false, false, 1, true}, 3);
  const char* names[16];
  int different = 0;
  std::vector<uint8_t> work(multiply_scratch(p.activations(path())));
  for (int i = -1, count = 0; i < count; ++i) {
    if (i >= 0) choose_path(names[i]);
    Buffer<float> together(p.c.inputs * p.width, 1), alone(p.c.inputs * p.width, 1);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::vector<uint8_t> own(work.size());
        path().multiply(p.matrix(), p.activations(path()), p.epilogue(), together.data(), p.width, p.tiles * t / kThreads,
                        p.tiles * (t + 1) / kThreads, own.data());
      });
    }
    for (std::thread& thread : threads) thread.join();
    path().multiply(p.matrix(), p.activations(path()), p.epilogue(), alone.data(), p.width, 0, p.tiles, work.data());
    const bool same = std::equal(alone.begin(), alone.end(), together.begin());
    std::printf("%-12s %d threads: %s\n", path().name, kThreads, same ? "ok" : "differs from one thread");
    different += !same;
    count = known_paths(names, 16);
  }
  return different ? 1 : 0;
}

// A team whose leader shares many small loops, of no piece, one and many.
int check_team() {
  constexpr int kThreads = 4, kLoops = 3000;
  std::vector<int64_t> sums(kLoops, -1);
  std::vector<uint8_t> next(1 << 16);
  for (int members = 1; members <= kThreads; ++members) {
    Team team;
    const auto lead = [&] {
      std::vector<int64_t> values(41);
      for (int loop = 0; loop < kLoops; ++loop) {
        const size_t count = loop % 41;
        std::fill(values.begin(), values.end(), 0);
        team.expect({next.data() + loop, static_cast<int64_t>(next.size()) - loop});
        team.parallel(count, [&](size_t i) { values[i] += loop + static_cast<int64_t>(i); });
        sums[loop] = std::accumulate(values.begin(), values.end(), int64_t{0});
      }
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < members; ++t) threads.emplace_back([&] { team.join(lead); });
    for (std::thread& thread : threads) thread.join();
    for (int64_t loop = 0; loop < kLoops; ++loop) {
      const int64_t count = loop % 41;
      if (sums[loop] == count * loop + count * (count - 1) / 2) continue;
      std::printf("team of %d: loop %lld is wrong\n", members, static_cast<long long>(loop));
      return 1;
    }
    std::fill(sums.begin(), sums.end(), -1);
  }
  std::printf("teams of 1 to %d: ok\n", kThreads);
  return 0;
}

// Pieces of which each leaves what the next kind needs, so that one that comes too early finds something else.
struct Pieces {
  int64_t heads, units, segments, loop;
  mutable std::vector<int64_t> read, estimated, chosen, attended, joined;
  Pieces(int64_t heads, int64_t units, int64_t segments, int64_t loop)
      : heads(heads), units(units), segments(segments), loop(loop), read(heads), estimated(units * segments), chosen(units),
        attended(units * segments), joined(units) {}
  void estimate(int64_t unit, int64_t segment) const { estimated[unit * segments + segment] += read[unit * heads / units] + segment; }
  void choose(int64_t unit) const { chosen[unit] += sum(estimated, unit); }
  void attend(int64_t unit, int64_t segment) const { attended[unit * segments + segment] += chosen[unit] + 1; }
  void join(int64_t unit) const { joined[unit] += sum(attended, unit); }
  int64_t sum(const std::vector<int64_t>& of, int64_t unit) const {
    return std::accumulate(of.begin() + unit * segments, of.begin() + (unit + 1) * segments, int64_t{0});
  }
  bool right() const {
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t choice = segments * (loop + unit * heads / units) + segments * (segments - 1) / 2;
      if (joined[unit] != segments * (choice + 1)) return false;
    }
    return true;
  }
};

// The order of a sparse token's pieces, by teams and by one thread alone.
int check_order() {
  constexpr int kThreads = 4;
  for (int members = 1; members <= kThreads; ++members) {
    Team team;
    int wrong = 0;
    const auto lead = [&] {
      for (int64_t loop = 0; loop < 400; ++loop) {
        const int64_t heads = 1 + loop % 5, units = heads * (1 + loop / 5 % 3), segments = 1 + loop / 15 % 4;
        const Pieces pieces(heads, units, segments, loop);
        Order order(heads, units, segments);
        team.parallel(order.count(), [&](size_t i) { order.take(i, [&](int64_t head) { pieces.read[head] += loop + head; }, pieces); });
        wrong += !pieces.right();
      }
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < members; ++t) threads.emplace_back([&] { team.join(lead); });
    for (std::thread& thread : threads) thread.join();
    if (wrong == 0) continue;
    std::printf("order of a team of %d: %d loops are wrong\n", members, wrong);
    return 1;
  }
  std::printf("orders of teams of 1 to %d: ok\n", kThreads);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "quick";
  if (mode == "threads") return check_threads() | check_team() | check_order();
  if (mode == "quick" || mode == "full") return check_all(mode == "full");
  std::fprintf(stderr, "usage: driver [quick | full | threads]\n");
  return 2;
}
