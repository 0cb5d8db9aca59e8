// AVX-512's instructions that the kernels use, as plain loops by their published definition, so that the code for
// processors with them runs on one without. Included before everything else (-include); what it proves is the kernels'
// use of the instructions, not the compiler's.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#if defined(STAND_IN_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(STAND_IN_BF16)
#define __AVX512BF16__ 1
#endif

namespace stand_in {

// out[i] = f(i), as a vector of type V.
template <typename V, typename T, typename F>
V vector(const F& f) {
  T lanes[sizeof(V) / sizeof(T)];
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) lanes[i] = f(i);
  V v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

template <typename T, typename V>
T lane(const V& v, unsigned i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof value);
  return value;
}

inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int saturated(int x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }

inline __m512i set1_epi32(int x) { return vector<__m512i, int32_t>([=](unsigned) { return x; }); }
inline __m512i set1_epi16(short x) { return vector<__m512i, int16_t>([=](unsigned) { return x; }); }
inline __m512i add_epi32(__m512i a, __m512i b) {
  return vector<__m512i, int32_t>([&](unsigned i) { return lane<int32_t>(a, i) + lane<int32_t>(b, i); });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  return vector<__m512i, int32_t>([&](unsigned i) {
    const unsigned j = 2 * i;
    return lane<int16_t>(a, j) * lane<int16_t>(b, j) + lane<int16_t>(a, j + 1) * lane<int16_t>(b, j + 1);
  });
}
inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  return vector<__m512i, int16_t>([&](unsigned i) {
    return static_cast<int16_t>(saturated(lane<uint8_t>(a, 2 * i) * lane<int8_t>(b, 2 * i) +
                                          lane<uint8_t>(a, 2 * i + 1) * lane<int8_t>(b, 2 * i + 1)));
  });
}
inline __m512i dpwssd_epi32(__m512i c, __m512i a, __m512i b) { return add_epi32(c, madd_epi16(a, b)); }
inline __m512i dpbusd_epi32(__m512i c, __m512i a, __m512i b) {
  return vector<__m512i, int32_t>([&](unsigned i) {
    int32_t sum = lane<int32_t>(c, i);
    for (unsigned j = 4 * i; j < 4 * i + 4; ++j) sum += lane<uint8_t>(a, j) * lane<int8_t>(b, j);
    return sum;
  });
}
inline __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  return vector<__m512, float>([&](unsigned i) {
    const float odd = lane<float>(c, i) + widened(lane<uint16_t>(a, 2 * i + 1)) * widened(lane<uint16_t>(b, 2 * i + 1));
    return odd + widened(lane<uint16_t>(a, 2 * i)) * widened(lane<uint16_t>(b, 2 * i));
  });
}

}  // namespace stand_in

#define _mm512_set1_epi32 stand_in::set1_epi32
#define _mm512_set1_epi16 stand_in::set1_epi16
#define _mm512_add_epi32 stand_in::add_epi32
#define _mm512_madd_epi16 stand_in::madd_epi16
#define _mm512_maddubs_epi16 stand_in::maddubs_epi16
#define _mm512_dpwssd_epi32 stand_in::dpwssd_epi32
#define _mm512_dpbusd_epi32 stand_in::dpbusd_epi32
#define _mm512_dpbf16_ps stand_in::dpbf16_ps
