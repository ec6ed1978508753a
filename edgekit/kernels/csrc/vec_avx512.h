// Sixteen lanes in one 512-bit register: AVX-512 with VNNI.
#pragma once

// GCC's own header reads what it calls undefined on purpose, and GCC 12 warns of that.
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace edgekit {
namespace {

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Bytes {  // 16 lanes of 4 bytes
  __m512i v;
};

constexpr int kAtOnce = 8;      // sums that the registers hold beside their operands
constexpr int kAbreast = 8;     // rows of one plane that stand side by side
constexpr int kWideZero = 128;  // 8-bit codes multiply as they are: unsigned

inline Floats zeros() { return {_mm512_setzero_ps()}; }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_half(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where a or b is not a number, as in `min`
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
// The sums of four, in the same order on every path.
inline void store_sums(float* p, const Floats (&x)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(fours),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(fours), 1)));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}
// The lanes in which a is at most b, as bits; none where one is not a number.
inline unsigned at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
// x * 2^n for whole n from -126 to 127
inline Floats scale_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }

inline Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints sub(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Floats to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
// The lanes in which a is at least b, as bits.
inline unsigned at_least(Ints a, Ints b) { return _mm512_cmpge_epi32_mask(a.v, b.v); }
inline Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }
// Lanes of two numbers of 16 bits without a sign, the first in the low half.
inline Ints load_halves(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_halves(uint16_t* p, Ints low, Ints high) {
  _mm512_storeu_si512(p, _mm512_or_si512(low.v, _mm512_slli_epi32(high.v, 16)));
}
inline Ints low_half(Ints a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
inline Ints high_half(Ints a) { return {_mm512_srli_epi32(a.v, 16)}; }
inline Ints max_halves(Ints a, Ints b) { return {_mm512_max_epu16(a.v, b.v)}; }
// Less `x`, or 0.
inline Ints lower_halves(Ints a, uint16_t x) { return {_mm512_subs_epu16(a.v, _mm512_set1_epi16(static_cast<int16_t>(x)))}; }
// (1 + f) * 2^n for 256 * (n + 127 + f), n from -126 to 127: bits of a float.
inline Floats power_bits(Ints a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 15))}; }
inline Floats widen(const uint8_t* p) {  // 16 bytes as floats
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats widen(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// 16 whole floats in -127..127 as signed bytes
inline void store_codes(int8_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// Each byte shifted down by Down bits (up where it is negative), of which the bits of Mask stay.
template <int Down, int Mask>
inline Bytes field(Bytes b) {
  if constexpr (Down > 0) b.v = _mm512_srli_epi16(b.v, Down);
  if constexpr (Down < 0) b.v = _mm512_slli_epi16(b.v, -Down);
  return {_mm512_and_si512(b.v, _mm512_set1_epi8(Mask))};
}
inline Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Codes of two bits: number Part of the four in each byte.
template <int Part>
inline Bytes quarter(Bytes b) {
  return {_mm512_and_si512(_mm512_srli_epi16(b.v, 2 * Part), _mm512_set1_epi8(3))};
}
inline Bytes wide(Bytes b) { return b; }  // 8-bit codes in the form that `dot` wants

// Signed bytes in the form that `dot` wants.
inline Bytes signed_wide(Bytes b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8(-128))}; }

// Sixteen rows of 16 bytes, `stride` bytes apart, turned: y[k] holds bytes 4k to 4k + 3 of every row.
inline void turn(const uint8_t* p, int64_t stride, Bytes (&y)[4]) {
  __m512i rows[4];  // rows[i] holds rows i, i + 4, i + 8 and i + 12
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (i + at) * stride)); };
    rows[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
    rows[i] = _mm512_inserti32x4(_mm512_inserti32x4(rows[i], row(8), 2), row(12), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  y[0].v = _mm512_unpacklo_epi64(a, c);
  y[1].v = _mm512_unpackhi_epi64(a, c);
  y[2].v = _mm512_unpacklo_epi64(b, d);
  y[3].v = _mm512_unpackhi_epi64(b, d);
}

// acc + the sum over a lane's 4 * Runs codes times x, 32 or 16. codes[k] holds columns 4k to 4k + 3 of every lane.
template <int Bits, int Runs = 8>
inline Ints dot(Ints acc, const Bytes* codes, const int8_t* x) {
  for (int k = 0; k < Runs; ++k) {
    int32_t four;
    std::memcpy(&four, x + 4 * k, 4);
    acc.v = _mm512_dpbusd_epi32(acc.v, codes[k].v, _mm512_set1_epi32(four));
  }
  return acc;
}
// acc + the sum over a lane's 4 * Runs signed bytes times x, which is 0 to 127.
template <int Runs>
inline Ints dot_signed(Ints acc, const Bytes* codes, const int8_t* x) {
  for (int k = 0; k < Runs; ++k) {
    int32_t four;
    std::memcpy(&four, x + 4 * k, 4);
    acc.v = _mm512_dpbusd_epi32(acc.v, _mm512_set1_epi32(four), codes[k].v);
  }
  return acc;
}
// The numbers of the chosen lanes, one after the other; up to sixteen are written.
template <class T>
inline void pick(unsigned lanes, const T* from, T* to) {
  const __m512i numbers = _mm512_loadu_si512(from);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), numbers));
}
inline void pick(unsigned lanes, Ints x, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), x.v));
}
inline void pick_places(unsigned lanes, int32_t first, int32_t* to) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), places));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#include "vec_whole.h"
#include "vec_float_zeros.h"

}  // namespace
}  // namespace edgekit
