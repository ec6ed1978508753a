// Sixteen lanes in four 128-bit registers: NEON, with the dot products that the unit is compiled for.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace edgekit {
namespace {

struct Floats {
  float32x4_t v[4];
};
struct Ints {
  int32x4_t v[4];
};
template <int Registers>
struct BytesOf {
  uint8x16_t v[Registers];
};
using Bytes = BytesOf<4>;  // 16 lanes of 4 bytes

constexpr int kAtOnce = 4;  // sums that the registers hold beside their operands
constexpr int kAbreast = 1;     // rows of one plane that stand side by side

inline Floats all(float x) {
  const float32x4_t four = vdupq_n_f32(x);
  return {{four, four, four, four}};
}
inline Floats zeros() { return all(0.0f); }
inline Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
// Conversions of halves are in every 64-bit Arm; arithmetic on them is not.
inline float32x4_t load_half4(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats load_half(const uint16_t* p) {
  return {{load_half4(p), load_half4(p + 4), load_half4(p + 8), load_half4(p + 12)}};
}
inline void store_half(uint16_t* p, Floats x) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats sub(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats mul(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats div(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vdivq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
// b where a is not a number, as in `min`
inline Floats max(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmaxnmq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats min(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vminnmq_f32(a.v[i], b.v[i]);
  return a;
}
inline Floats magnitude(Floats a) {
  for (float32x4_t& four : a.v) four = vabsq_f32(four);
  return a;
}
inline Floats round(Floats a) {
  for (float32x4_t& four : a.v) four = vrndnq_f32(four);
  return a;
}
// Halves are added to halves, as on every path, so that rounding agrees.
inline float sum(Floats a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float largest(Floats a) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.v[0], a.v[1]), vmaxnmq_f32(a.v[2], a.v[3])));
}
// The sums of four, in the same order on every path.
inline void store_sums(float* p, const Floats (&x)[4]) {
  float32x4_t fours[4];
  for (int i = 0; i < 4; ++i) {
    const float32x4_t a = vaddq_f32(vzip1q_f32(x[0].v[i], x[1].v[i]), vzip2q_f32(x[0].v[i], x[1].v[i]));
    const float32x4_t b = vaddq_f32(vzip1q_f32(x[2].v[i], x[3].v[i]), vzip2q_f32(x[2].v[i], x[3].v[i]));
    const float64x2_t c = vreinterpretq_f64_f32(a), d = vreinterpretq_f64_f32(b);
    fours[i] = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(c, d)), vreinterpretq_f32_f64(vzip2q_f64(c, d)));
  }
  vst1q_f32(p, vaddq_f32(vaddq_f32(fours[0], fours[2]), vaddq_f32(fours[1], fours[3])));
}
// The lanes in which a is at most b, as bits; none where one is not a number.
inline unsigned at_most(Floats a, Floats b) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  unsigned lanes = 0;
  for (int i = 0; i < 4; ++i) lanes |= vaddvq_u32(vandq_u32(vcleq_f32(a.v[i], b.v[i]), bits)) << (4 * i);
  return lanes;
}
// x * 2^n for whole n from -126 to 127
inline Floats scale_by_power(Floats x, Floats n) {
  for (int i = 0; i < 4; ++i) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  return x;
}

inline Ints all(int32_t x) {
  const int32x4_t four = vdupq_n_s32(x);
  return {{four, four, four, four}};
}
inline Floats to_float(Ints a) {
  return {{vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1]), vcvtq_f32_s32(a.v[2]), vcvtq_f32_s32(a.v[3])}};
}
inline Ints sub(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vsubq_s32(a.v[i], b.v[i]);
  return a;
}
inline Ints max(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmaxq_s32(a.v[i], b.v[i]);
  return a;
}
inline Ints nearest(Floats a) {
  return {{vcvtnq_s32_f32(a.v[0]), vcvtnq_s32_f32(a.v[1]), vcvtnq_s32_f32(a.v[2]), vcvtnq_s32_f32(a.v[3])}};
}
// The lanes in which a is at least b, as bits.
inline unsigned at_least(Ints a, Ints b) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  unsigned lanes = 0;
  for (int i = 0; i < 4; ++i) lanes |= vaddvq_u32(vandq_u32(vcgeq_s32(a.v[i], b.v[i]), bits)) << (4 * i);
  return lanes;
}
inline Ints load(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}}; }
inline void store(int32_t* p, Ints x) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.v[i]);
}
// Lanes of two numbers of 16 bits without a sign, the first in the low half.
inline Ints load_halves(const uint16_t* p) {
  Ints x;
  for (int i = 0; i < 4; ++i) x.v[i] = vreinterpretq_s32_u16(vld1q_u16(p + 8 * i));
  return x;
}
inline void store_halves(uint16_t* p, Ints low, Ints high) {
  for (int i = 0; i < 4; ++i) vst1q_u16(p + 8 * i, vreinterpretq_u16_s32(vorrq_s32(low.v[i], vshlq_n_s32(high.v[i], 16))));
}
inline Ints low_half(Ints a) {
  for (int32x4_t& four : a.v) four = vandq_s32(four, vdupq_n_s32(0xffff));
  return a;
}
inline Ints high_half(Ints a) {
  for (int32x4_t& four : a.v) four = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(four), 16));
  return a;
}
inline Ints max_halves(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vreinterpretq_s32_u16(vmaxq_u16(vreinterpretq_u16_s32(a.v[i]), vreinterpretq_u16_s32(b.v[i])));
  return a;
}
// Less `x`, or 0.
inline Ints lower_halves(Ints a, uint16_t x) {
  for (int32x4_t& four : a.v) four = vreinterpretq_s32_u16(vqsubq_u16(vreinterpretq_u16_s32(four), vdupq_n_u16(x)));
  return a;
}
// (1 + f) * 2^n for 256 * (n + 127 + f), n from -126 to 127: bits of a float.
inline Floats power_bits(Ints a) {
  Floats y;
  for (int i = 0; i < 4; ++i) y.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(a.v[i], 15));
  return y;
}
inline Floats widen(const uint8_t* p) {  // 16 bytes as floats
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}
inline Floats widen(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return to_float(Ints{{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                        vmovl_s16(vget_high_s16(high))}});
}
// 16 whole floats in -127..127 as signed bytes
inline void store_codes(int8_t* p, Floats x) {
  int16x4_t whole[4];
  for (int i = 0; i < 4; ++i) whole[i] = vmovn_s32(vcvtq_s32_f32(x.v[i]));
  const int16x8_t first = vcombine_s16(whole[0], whole[1]), last = vcombine_s16(whole[2], whole[3]);
  vst1q_s8(p, vcombine_s8(vmovn_s16(first), vmovn_s16(last)));
}

inline Bytes load_bytes(const uint8_t* p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
// Each byte shifted down by Down bits (up where it is negative), of which the bits of Mask stay.
template <int Down, int Mask, int N>
inline BytesOf<N> field(BytesOf<N> b) {
  constexpr bool kAllLeft = Down >= 0 && Mask == 255 >> Down;
  for (uint8x16_t& bytes : b.v) {
    if constexpr (Down > 0) bytes = vshrq_n_u8(bytes, Down);
    if constexpr (Down < 0) bytes = vshlq_n_u8(bytes, -Down);
    if constexpr (!kAllLeft) bytes = vandq_u8(bytes, vdupq_n_u8(Mask));
  }
  return b;
}
template <int N>
inline BytesOf<N> either(BytesOf<N> a, BytesOf<N> b) {
  for (int i = 0; i < N; ++i) a.v[i] = vorrq_u8(a.v[i], b.v[i]);
  return a;
}

// Codes of two bits: number Part of the four in each byte.
template <int Part>
inline Bytes quarter(Bytes b) {
  for (uint8x16_t& bytes : b.v) {
    if constexpr (Part > 0) bytes = vshrq_n_u8(bytes, 2 * Part);
    bytes = vandq_u8(bytes, vdupq_n_u8(3));
  }
  return b;
}

// Sixteen rows of 16 bytes, `stride` bytes apart, turned: y[k] holds bytes 4k to 4k + 3 of every row.
inline void turn(const uint8_t* p, int64_t stride, Bytes (&y)[4]) {
  for (int i = 0; i < 4; ++i, p += 4 * stride) {
    const uint32x4_t a = vreinterpretq_u32_u8(vld1q_u8(p)), b = vreinterpretq_u32_u8(vld1q_u8(p + stride));
    const uint32x4_t c = vreinterpretq_u32_u8(vld1q_u8(p + 2 * stride)), d = vreinterpretq_u32_u8(vld1q_u8(p + 3 * stride));
    const uint64x2_t even_ab = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), odd_ab = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    const uint64x2_t even_cd = vreinterpretq_u64_u32(vtrn1q_u32(c, d)), odd_cd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    y[0].v[i] = vreinterpretq_u8_u64(vzip1q_u64(even_ab, even_cd));
    y[1].v[i] = vreinterpretq_u8_u64(vzip1q_u64(odd_ab, odd_cd));
    y[2].v[i] = vreinterpretq_u8_u64(vzip2q_u64(even_ab, even_cd));
    y[3].v[i] = vreinterpretq_u8_u64(vzip2q_u64(odd_ab, odd_cd));
  }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

constexpr int kWideZero = 128;  // 8-bit codes multiply as they are: unsigned
inline Bytes signed_wide(Bytes b) {  // signed bytes in the form that `dot` wants
  for (uint8x16_t& bytes : b.v) bytes = veorq_u8(bytes, vdupq_n_u8(128));
  return b;
}
template <int N>
inline BytesOf<N> wide(BytesOf<N> b) {
  return b;
}

template <int Run>
inline int32x4_t dot_run(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
  return vusdotq_laneq_s32(acc, codes, x, Run);
}

#else

constexpr int kWideZero = 0;  // 8-bit codes multiply as signed numbers
template <int N>
inline BytesOf<N> wide(BytesOf<N> b) {
  for (uint8x16_t& bytes : b.v) bytes = veorq_u8(bytes, vdupq_n_u8(128));
  return b;
}
inline Bytes signed_wide(Bytes b) { return b; }

#if defined(__ARM_FEATURE_DOTPROD)
template <int Run>
inline int32x4_t dot_run(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
  return vdotq_laneq_s32(acc, vreinterpretq_s8_u8(codes), x, Run);
}
#endif

#endif

#if defined(__ARM_FEATURE_DOTPROD)

// Codes of a group fill all registers: so they are unpacked for eight rows of the tile, used, and then for the others.
constexpr int kParts = 2;
using Part = BytesOf<2>;
inline Part load_part(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16)}}; }
// `codes`, to be read when the first part's sums are there: the compiler would mix both parts, and spill registers.
template <int Planes, int Rows>
inline const uint8_t* settled(Ints (&acc)[Planes][Rows], const uint8_t* codes) {
  for (auto& rows : acc) {
    for (Ints& sum : rows) __asm__ volatile("" : "+r"(codes), "+w"(sum.v[0]), "+w"(sum.v[1]));
  }
  return codes;
}

// Activations of 32 columns.
struct Row {
  int8x16_t low, high;
};
inline Row load_row(const int8_t* x) { return {vld1q_s8(x), vld1q_s8(x + 16)}; }

// acc + the sum over a lane's 4 * Runs codes times x, 32 or 16, for the lanes that `codes` holds, from register `first`
// of acc on. codes[k] holds columns 4k to 4k + 3 of every lane.
template <int Runs, int N>
inline Ints dot_row(Ints acc, const BytesOf<N>* codes, Row x, int first) {
  for (int i = 0; i < N; ++i) {
    int32x4_t& sum = acc.v[first + i];
    sum = dot_run<0>(sum, codes[0].v[i], x.low);
    sum = dot_run<1>(sum, codes[1].v[i], x.low);
    sum = dot_run<2>(sum, codes[2].v[i], x.low);
    sum = dot_run<3>(sum, codes[3].v[i], x.low);
    if constexpr (Runs == 4) continue;
    sum = dot_run<0>(sum, codes[4].v[i], x.high);
    sum = dot_run<1>(sum, codes[5].v[i], x.high);
    sum = dot_run<2>(sum, codes[6].v[i], x.high);
    sum = dot_run<3>(sum, codes[7].v[i], x.high);
  }
  return acc;
}
template <int Bits>
inline Ints dot_part(Ints acc, int part, const Part* codes, Row x) {
  return dot_row<8>(acc, codes, x, 2 * part);
}
template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  return dot_row<Runs>(acc, codes, Row{vld1q_s8(x), vld1q_s8(x + 4 * Runs - 16)}, 0);
}

#else

// The same with products in 16 bits. They hold the sum of 8 products with codes of up to 4 bits, and of the neighbour's
// 8, 2 * 8 * 15 * 127 = 30480; of 8 products with codes of 5 bits, 8 * 31 * 127 = 31496, of 4 with codes of 6 bits,
// 4 * 63 * 127 = 32004, and of 2 with codes of 8 bits, 2 * 128 * 127 = 32512.
template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  constexpr int kRuns = Bits <= 5 ? Runs : Bits == 6 ? 4 : 2;
  int8x16_t four[Runs];
  for (int k = 0; k < Runs; ++k) {
    int32_t bytes;
    std::memcpy(&bytes, x + 4 * k, 4);
    four[k] = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
  }
  for (int i = 0; i < 4; ++i) {
    int32x4_t low_pairs = vdupq_n_s32(0), high_pairs = low_pairs;
    for (int first = 0; first < Runs; first += kRuns) {
      int16x8_t low = vdupq_n_s16(0), high = low;
      for (int k = first; k < first + kRuns; ++k) {
        const int8x16_t run = vreinterpretq_s8_u8(codes[k].v[i]);
        low = vmlal_s8(low, vget_low_s8(run), vget_low_s8(four[k]));
        high = vmlal_high_s8(high, run, four[k]);
      }
      if constexpr (Bits <= 4) {
        acc.v[i] = vpadalq_s16(acc.v[i], vpaddq_s16(low, high));
      } else {
        low_pairs = vpadalq_s16(low_pairs, low);
        high_pairs = vpadalq_s16(high_pairs, high);
      }
    }
    if constexpr (Bits > 4) acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(low_pairs, high_pairs));
  }
  return acc;
}

#endif

#if !defined(__ARM_FEATURE_DOTPROD)
#include "vec_whole.h"
#endif
// acc + the sum over a lane's 4 * Runs signed bytes times x, which is 0 to 127.
template <int Runs>
inline Ints dot_signed(Ints acc, const Bytes* codes, const int8_t* x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  for (int k = 0; k < Runs; ++k) {
    int32_t bytes;
    std::memcpy(&bytes, x + 4 * k, 4);
    const uint8x16_t four = vreinterpretq_u8_s32(vdupq_n_s32(bytes));
    for (int i = 0; i < 4; ++i) acc.v[i] = vusdotq_s32(acc.v[i], four, vreinterpretq_s8_u8(codes[k].v[i]));
  }
  return acc;
#else
  return dot<8, Runs>(acc, codes, x);
#endif
}

#include "vec_pick.h"

// Zero points join the integers: shift - zero of sixteen rows, times a block's sum, which has 15 bits.
constexpr bool kIntegerZeros = true;
struct Zeros {
  int16x8_t v[2];
};
template <int Shift>
inline Zeros load_zeros(const uint8_t* p) {
  const uint8x16_t zeros = vld1q_u8(p), shift = vdupq_n_u8(Shift);
  return {{vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(shift), vget_low_u8(zeros))),
           vreinterpretq_s16_u16(vsubl_high_u8(shift, zeros))}};
}
inline Ints times(Zeros zeros, const int32_t* sum) {
  const int16x4_t factor = vreinterpret_s16_s32(vld1_dup_s32(sum));  // its lower half is first
  return {{vmull_lane_s16(vget_low_s16(zeros.v[0]), factor, 0), vmull_high_lane_s16(zeros.v[0], factor, 0),
           vmull_lane_s16(vget_low_s16(zeros.v[1]), factor, 0), vmull_high_lane_s16(zeros.v[1], factor, 0)}};
}

// kPlane * high + low, exact until it is rounded.
inline Floats joined(Ints high, Ints low) {
  for (int i = 0; i < 4; ++i) low.v[i] = vmlaq_n_s32(low.v[i], high.v[i], kPlane);
  return to_float(low);
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace edgekit
