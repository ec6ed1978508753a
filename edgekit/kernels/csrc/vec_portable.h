// Sixteen lanes in the vectors of GCC and Clang, which compile for any processor: four floats, four ints, eight shorts.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgekit {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Uint4 = uint32_t __attribute__((vector_size(16)));
using Short8 = int16_t __attribute__((vector_size(16)));
using Byte8 = uint8_t __attribute__((vector_size(8)));

struct Floats {
  Float4 v[4];
};
struct Ints {
  Int4 v[4];
};
struct Bytes {  // 16 lanes of 4 codes, each in 16 bits
  Short8 v[8];
};

constexpr int kAtOnce = 2;    // sums that the registers hold beside their operands
constexpr int kAbreast = 1;     // rows of one plane that stand side by side
constexpr int kWideZero = 0;  // 8-bit codes multiply as signed numbers

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline Float4 float4(const float* p) {
  Float4 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats all(float x) {
  const Float4 four = {x, x, x, x};
  return {{four, four, four, four}};
}
inline Floats zeros() { return all(0.0f); }
inline Floats load(const float* p) { return {{float4(p), float4(p + 4), float4(p + 8), float4(p + 12)}}; }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }

// Subnormal halves become normal floats by subtracting the exponent that they were given too much.
inline float half_to_float(uint16_t half) {
  const uint32_t exponent = half & 0x7c00u, bits = (half & 0x7fffu) << 13;
  float value = bits_as<float>(bits + (112u << 23));
  if (exponent == 0) value = bits_as<float>(bits + (113u << 23)) - bits_as<float>(113u << 23);
  if (exponent == 0x7c00u) value = bits_as<float>(bits + (224u << 23));
  return bits_as<float>(bits_as<uint32_t>(value) | (half & 0x8000u) << 16);
}
// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u, x = bits & 0x7fffffffu;
  uint32_t half = (x + 0xfffu + (x >> 13 & 1u) - (112u << 23)) >> 13;
  if (x < 113u << 23) half = bits_as<uint32_t>(bits_as<float>(x) + 0.5f) - bits_as<uint32_t>(0.5f);  // subnormal
  if (x >= 0x477ff000u) half = 0x7c00u;                                                             // 65520 and above
  if (x > 0x7f800000u) half = 0x7e00u | (x >> 13 & 0x3ffu);                                         // not a number
  return static_cast<uint16_t>(half | sign);
}
inline Floats load_half(const uint16_t* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = half_to_float(read(p + i));
  return load(lanes);
}
inline void store_half(uint16_t* p, Floats x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(lanes[i]);
}

inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline Floats sub(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Floats mul(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Floats div(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] /= b.v[i];
  return a;
}
// Two roundings: processors that add and multiply in one have a path of their own.
inline Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
// b where either is not a number
inline Floats max(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Floats min(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Floats magnitude(Floats a) {
  for (Float4& four : a.v) four = bits_as<Float4>(bits_as<Int4>(four) & 0x7fffffff);
  return a;
}
// To the nearest whole number, ties to even, for |a| < 2^22: floats beyond 2^23 have no fraction.
inline Floats round(Floats a) {
  const Floats shift = all(12582912.0f);  // 1.5 * 2^23
  return sub(add(a, shift), shift);
}
// Halves are added to halves, as on every path, so that rounding agrees.
inline float sum(Floats a) {
  const Float4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float largest(Floats a) {
  float lanes[16];
  store(lanes, a);
  float top = lanes[0];
  for (const float lane : lanes) top = lane > top ? lane : top;
  return top;
}

// The sums of four, in the same order on every path.
inline void store_sums(float* p, const Floats (&x)[4]) {
  for (int k = 0; k < 4; ++k) {
    float fours[4];
    for (int i = 0; i < 4; ++i) fours[i] = (x[k].v[i][0] + x[k].v[i][2]) + (x[k].v[i][1] + x[k].v[i][3]);
    p[k] = (fours[0] + fours[2]) + (fours[1] + fours[3]);
  }
}
// The lanes in which a is at most b, as bits; none where one is not a number.
inline unsigned at_most(Floats a, Floats b) {
  unsigned lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<unsigned>(a.v[i / 4][i % 4] <= b.v[i / 4][i % 4]) << i;
  return lanes;
}

inline Ints all(int32_t x) {
  const Int4 four = {x, x, x, x};
  return {{four, four, four, four}};
}
inline Floats to_float(Ints a) {
  Floats y;
  for (int i = 0; i < 4; ++i) y.v[i] = __builtin_convertvector(a.v[i], Float4);
  return y;
}
inline Ints sub(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Ints max(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Ints nearest(Floats a) {
  Ints y;
  for (int i = 0; i < 16; ++i) y.v[i / 4][i % 4] = static_cast<int32_t>(__builtin_nearbyintf(a.v[i / 4][i % 4]));
  return y;
}
// The lanes in which a is at least b, as bits.
inline unsigned at_least(Ints a, Ints b) {
  unsigned lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<unsigned>(a.v[i / 4][i % 4] >= b.v[i / 4][i % 4]) << i;
  return lanes;
}
inline Ints load(const int32_t* p) {
  Ints x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline void store(int32_t* p, Ints x) { std::memcpy(p, x.v, sizeof x.v); }
// Lanes of two numbers of 16 bits without a sign, the first in the low half.
inline Ints load_halves(const uint16_t* p) {
  Ints x;
  for (int i = 0; i < 16; ++i) x.v[i / 4][i % 4] = static_cast<int32_t>(p[2 * i] | static_cast<uint32_t>(p[2 * i + 1]) << 16);
  return x;
}
inline void store_halves(uint16_t* p, Ints low, Ints high) {
  for (int i = 0; i < 16; ++i) {
    p[2 * i] = static_cast<uint16_t>(low.v[i / 4][i % 4]);
    p[2 * i + 1] = static_cast<uint16_t>(high.v[i / 4][i % 4]);
  }
}
inline Ints low_half(Ints a) {
  for (Int4& four : a.v) four &= 0xffff;
  return a;
}
inline Ints high_half(Ints a) {
  for (Int4& four : a.v) four = four >> 16 & 0xffff;
  return a;
}
inline Ints joined_halves(Ints low, Ints high) {
  for (int i = 0; i < 4; ++i) low.v[i] |= bits_as<Int4>(bits_as<Uint4>(high.v[i]) << 16);
  return low;
}
inline Ints max_halves(Ints a, Ints b) {
  return joined_halves(max(low_half(a), low_half(b)), max(high_half(a), high_half(b)));
}
// Less `x`, or 0.
inline Ints lower_halves(Ints a, uint16_t x) {
  const Ints less = all(int32_t{x}), none = all(int32_t{0});
  return joined_halves(max(sub(low_half(a), less), none), max(sub(high_half(a), less), none));
}
// (1 + f) * 2^n for 256 * (n + 127 + f), n from -126 to 127: bits of a float.
inline Floats power_bits(Ints a) {
  Floats y;
  for (int i = 0; i < 4; ++i) y.v[i] = bits_as<Float4>(a.v[i] << 15);
  return y;
}
// x * 2^n for whole n from -126 to 127
inline Floats scale_by_power(Floats x, Floats n) {
  for (int i = 0; i < 4; ++i) x.v[i] *= bits_as<Float4>((__builtin_convertvector(n.v[i], Int4) + 127) << 23);
  return x;
}
inline Floats widen(const uint8_t* p) {  // 16 bytes as floats
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Floats widen(const int8_t* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = p[i];
  return load(lanes);
}
// 16 whole floats in -127..127 as signed bytes
inline void store_codes(int8_t* p, Floats x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i / 4][i % 4]);
}

inline Short8 short8(const uint8_t* p) {
  Byte8 bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Short8);
}
inline Bytes load_bytes(const uint8_t* p) {
  Bytes y;
  for (int i = 0; i < 8; ++i) y.v[i] = short8(p + 8 * i);
  return y;
}
// Each byte shifted down by Down bits (up where it is negative), of which the bits of Mask stay.
template <int Down, int Mask>
inline Bytes field(Bytes b) {
  for (Short8& eight : b.v) {
    if constexpr (Down > 0) eight >>= Down;
    if constexpr (Down < 0) eight <<= -Down;
    eight &= static_cast<int16_t>(Mask);
  }
  return b;
}
inline Bytes either(Bytes a, Bytes b) {
  for (int i = 0; i < 8; ++i) a.v[i] |= b.v[i];
  return a;
}
// Codes of two bits: number Part of the four in each byte.
template <int Part>
inline Bytes quarter(Bytes b) {
  for (Short8& eight : b.v) {
    eight >>= short{2 * Part};
    eight &= 3;
  }
  return b;
}
inline Bytes wide(Bytes b) {
  for (Short8& eight : b.v) eight -= 128;
  return b;
}

// Signed bytes in the form that `dot` wants.
inline Bytes signed_wide(Bytes b) {
  for (Short8& eight : b.v) eight = (eight ^ 128) - 128;
  return b;
}
// Sixteen rows of 16 bytes, `stride` bytes apart, turned: y[k] holds bytes 4k to 4k + 3 of every row.
inline void turn(const uint8_t* p, int64_t stride, Bytes (&y)[4]) {
  for (int k = 0; k < 4; ++k) {
    uint8_t bytes[64];
    for (int i = 0; i < 16; ++i) std::memcpy(bytes + 4 * i, p + i * stride + 4 * k, 4);
    y[k] = load_bytes(bytes);
  }
}

// The sums of neighbours.
inline Int4 pairs(Short8 a) {
  const Int4 both = bits_as<Int4>(a);
  return (both << 16 >> 16) + (both >> 16);
}

// acc + the sum over a lane's 4 * Runs codes times x, 32 or 16. codes[k] holds columns 4k to 4k + 3 of every lane.
//
// 16 bits hold the sum of 8 products with codes of up to 5 bits, 8 * 31 * 127 = 31496, of 4 with codes of 6 bits,
// 4 * 63 * 127 = 32004, and of 2 with codes of 8 bits, 2 * 128 * 127 = 32512.
template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  constexpr int kRuns = Bits <= 5 ? Runs : Bits == 6 ? 4 : 2;
  for (int first = 0; first < Runs; first += kRuns) {
    Short8 four[kRuns];
    for (int k = 0; k < kRuns; ++k) {
      const int8_t* from = x + 4 * (first + k);
      four[k] = Short8{from[0], from[1], from[2], from[3], from[0], from[1], from[2], from[3]};
    }
    for (int i = 0; i < 4; ++i) {
      Short8 low = codes[first].v[2 * i] * four[0], high = codes[first].v[2 * i + 1] * four[0];
      for (int k = 1; k < kRuns; ++k) {
        low += codes[first + k].v[2 * i] * four[k];
        high += codes[first + k].v[2 * i + 1] * four[k];
      }
      const Int4 a = pairs(low), b = pairs(high);
      acc.v[i] += Int4{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
    }
  }
  return acc;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

#include "vec_whole.h"
// acc + the sum over a lane's 4 * Runs signed bytes times x, which is 0 to 127.
template <int Runs>
inline Ints dot_signed(Ints acc, const Bytes* codes, const int8_t* x) {
  Bytes wider[Runs];
  for (int k = 0; k < Runs; ++k) wider[k] = signed_wide(codes[k]);
  return dot<8, Runs>(acc, wider, x);
}

#include "vec_pick.h"
#include "vec_float_zeros.h"

}  // namespace
}  // namespace edgekit
