// Sixteen lanes in two 256-bit registers: AVX2 with FMA and F16C, and with AVX-VNNI where the unit is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgekit {
namespace {

struct Floats {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};
struct Bytes {  // 16 lanes of 4 bytes
  __m256i lo, hi;
};

constexpr int kAtOnce = 4;  // sums that the registers hold beside their operands
constexpr int kAbreast = 1;     // rows of one plane that stand side by side

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline __m256 load_half8(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_half(const uint16_t* p) { return {load_half8(p), load_half8(p + 8)}; }
inline void store_half(uint16_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats magnitude(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Floats round(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
// Halves are added to halves, as on every path, so that rounding agrees.
inline float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline __m256 sums_of_fours(__m256 x0, __m256 x1, __m256 x2, __m256 x3) {
  const __m256d a = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(x0, x1), _mm256_unpackhi_ps(x0, x1)));
  const __m256d b = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(x2, x3), _mm256_unpackhi_ps(x2, x3)));
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
}
// The sums of four, in the same order on every path.
inline void store_sums(float* p, const Floats (&x)[4]) {
  const __m256 two = _mm256_add_ps(sums_of_fours(x[0].lo, x[1].lo, x[2].lo, x[3].lo),
                                   sums_of_fours(x[0].hi, x[1].hi, x[2].hi, x[3].hi));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}
// The lanes in which a is at most b, as bits; none where one is not a number.
inline unsigned at_most(Floats a, Floats b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ));
  return static_cast<unsigned>(low) | static_cast<unsigned>(high) << 8;
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// x * 2^n for whole n from -126 to 127
inline Floats scale_by_power(Floats x, Floats n) { return mul(x, {power_of_two(n.lo), power_of_two(n.hi)}); }

inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints sub(Ints a, Ints b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
inline Floats to_float(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Ints nearest(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
// The lanes in which a is at least b, as bits.
inline unsigned at_least(Ints a, Ints b) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.lo, a.lo)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.hi, a.hi)));
  return 0xffffu & ~(static_cast<unsigned>(low) | static_cast<unsigned>(high) << 8);
}
inline Ints load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store(int32_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.hi);
}
// Lanes of two numbers of 16 bits without a sign, the first in the low half.
inline Ints load_halves(const uint16_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }
inline void store_halves(uint16_t* p, Ints low, Ints high) {
  store(reinterpret_cast<int32_t*>(p), Ints{_mm256_or_si256(low.lo, _mm256_slli_epi32(high.lo, 16)),
                                            _mm256_or_si256(low.hi, _mm256_slli_epi32(high.hi, 16))});
}
inline Ints low_half(Ints a) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline Ints high_half(Ints a) { return {_mm256_srli_epi32(a.lo, 16), _mm256_srli_epi32(a.hi, 16)}; }
inline Ints max_halves(Ints a, Ints b) { return {_mm256_max_epu16(a.lo, b.lo), _mm256_max_epu16(a.hi, b.hi)}; }
// Less `x`, or 0.
inline Ints lower_halves(Ints a, uint16_t x) {
  const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(x));
  return {_mm256_subs_epu16(a.lo, less), _mm256_subs_epu16(a.hi, less)};
}
// (1 + f) * 2^n for 256 * (n + 127 + f), n from -126 to 127: bits of a float.
inline Floats power_bits(Ints a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 15)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 15))};
}
inline Floats widen(const uint8_t* p) {  // 16 bytes as floats
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return to_float(Ints{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
inline Floats widen(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return to_float(Ints{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}
// 16 whole floats in -127..127 as signed bytes
inline void store_codes(int8_t* p, Floats x) {
  const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
  const __m128i first = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i last = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(first, last));
}

inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
// Each byte shifted down by Down bits (up where it is negative), of which the bits of Mask stay.
template <int Down>
inline __m256i shifted(__m256i b) {
  if constexpr (Down > 0) return _mm256_srli_epi16(b, Down);
  if constexpr (Down < 0) return _mm256_slli_epi16(b, -Down);
  return b;
}
template <int Down, int Mask>
inline Bytes field(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(Mask);
  return {_mm256_and_si256(shifted<Down>(b.lo), mask), _mm256_and_si256(shifted<Down>(b.hi), mask)};
}
inline Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }

// Codes of two bits: number Part of the four in each byte.
template <int Part>
inline Bytes quarter(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(3);
  return {_mm256_and_si256(_mm256_srli_epi16(b.lo, 2 * Part), mask), _mm256_and_si256(_mm256_srli_epi16(b.hi, 2 * Part), mask)};
}

inline void turn8(const uint8_t* p, int64_t stride, __m256i (&y)[4]) {
  __m256i rows[4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(p + (i + 4) * stride),
                                  reinterpret_cast<const __m128i*>(p + i * stride));
  }
  const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
  const __m256i c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
  y[0] = _mm256_unpacklo_epi64(a, c);
  y[1] = _mm256_unpackhi_epi64(a, c);
  y[2] = _mm256_unpacklo_epi64(b, d);
  y[3] = _mm256_unpackhi_epi64(b, d);
}
// Sixteen rows of 16 bytes, `stride` bytes apart, turned: y[k] holds bytes 4k to 4k + 3 of every row.
inline void turn(const uint8_t* p, int64_t stride, Bytes (&y)[4]) {
  __m256i lo[4], hi[4];
  turn8(p, stride, lo);
  turn8(p + 8 * stride, stride, hi);
  for (int k = 0; k < 4; ++k) y[k] = {lo[k], hi[k]};
}

inline __m256i four_times_eight(const int8_t* x) {  // 4 bytes, the same for 8 lanes
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)

constexpr int kWideZero = 128;  // 8-bit codes multiply as they are: unsigned
inline Bytes wide(Bytes b) { return b; }
inline Bytes signed_wide(Bytes b) {  // signed bytes in the form that `dot` wants
  const __m256i sign = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(b.lo, sign), _mm256_xor_si256(b.hi, sign)};
}

template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  for (int k = 0; k < Runs; ++k) {
    const __m256i four = four_times_eight(x + 4 * k);
    acc.lo = _mm256_dpbusd_avx_epi32(acc.lo, codes[k].lo, four);
    acc.hi = _mm256_dpbusd_avx_epi32(acc.hi, codes[k].hi, four);
  }
  return acc;
}
// acc + the sum over a lane's 4 * Runs signed bytes times x, which is 0 to 127.
template <int Runs>
inline Ints dot_signed(Ints acc, const Bytes* codes, const int8_t* x) {
  for (int k = 0; k < Runs; ++k) {
    const __m256i four = four_times_eight(x + 4 * k);
    acc.lo = _mm256_dpbusd_avx_epi32(acc.lo, four, codes[k].lo);
    acc.hi = _mm256_dpbusd_avx_epi32(acc.hi, four, codes[k].hi);
  }
  return acc;
}

#else

constexpr int kWideZero = 0;  // 8-bit codes multiply as signed numbers
inline Bytes wide(Bytes b) {
  const __m256i sign = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(b.lo, sign), _mm256_xor_si256(b.hi, sign)};
}
inline Bytes signed_wide(Bytes b) { return b; }

// vpmaddubsw adds two products in 16 bits. Codes of up to 4 bits: eight such sums stay within 8 * 2 * 15 * 127 = 30480;
// of 5 bits, four within 4 * 2 * 31 * 127 = 31496; of 6 bits, two within 2 * 2 * 63 * 127 = 32004. Codes of 8 bits: the
// code's sign moves over to x, and one sum stays within 2 * 128 * 127 = 32512.
inline __m256i signed_pairs(__m256i codes, __m256i x) {
  return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}

template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  constexpr int kRuns = Bits <= 4 ? Runs : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i lo = _mm256_setzero_si256(), hi = _mm256_setzero_si256();
  for (int first = 0; first < Runs; first += kRuns) {
    __m256i short_lo = _mm256_setzero_si256(), short_hi = _mm256_setzero_si256();
    for (int k = first; k < first + kRuns; ++k) {
      const __m256i four = four_times_eight(x + 4 * k);
      if constexpr (Bits == 8) {
        short_lo = signed_pairs(codes[k].lo, four);
        short_hi = signed_pairs(codes[k].hi, four);
      } else {
        short_lo = _mm256_add_epi16(short_lo, _mm256_maddubs_epi16(codes[k].lo, four));
        short_hi = _mm256_add_epi16(short_hi, _mm256_maddubs_epi16(codes[k].hi, four));
      }
    }
    lo = _mm256_add_epi32(lo, _mm256_madd_epi16(short_lo, ones));
    hi = _mm256_add_epi32(hi, _mm256_madd_epi16(short_hi, ones));
  }
  return {_mm256_add_epi32(acc.lo, lo), _mm256_add_epi32(acc.hi, hi)};
}
// acc + the sum over a lane's 4 * Runs signed bytes times x, which is 0 to 127.
template <int Runs>
inline Ints dot_signed(Ints acc, const Bytes* codes, const int8_t* x) {
  return dot<8, Runs>(acc, codes, x);
}

#endif

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#include "vec_whole.h"
#include "vec_pick.h"
#include "vec_float_zeros.h"

}  // namespace
}  // namespace edgekit
