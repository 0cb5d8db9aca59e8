// AVX-512's and AMX's instructions that the kernels use, as plain loops by their published definition, so that the code
// for processors with them runs on one without. Included before everything else (-include); what it proves is the kernels'
// use of the instructions, not the compiler's.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#if defined(STAND_IN_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(STAND_IN_BF16)
#define __AVX512BF16__ 1
#endif
#if defined(STAND_IN_AMX)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
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
inline __m512 maskz_max_ps(unsigned mask, __m512 a, __m512 b) {
  return vector<__m512, float>([&](unsigned i) {
    const float x = lane<float>(a, i), y = lane<float>(b, i);
    return mask >> i & 1 ? x > y ? x : y : 0.0f;
  });
}
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

// To nearest, ties to even, what is smaller than a normal number to zero.
inline __m256bh cvtneps_pbh(__m512 x) {
  return vector<__m256bh, uint16_t>([&](unsigned i) {
    const float value = lane<float>(x, i);
    const uint32_t u = lane<uint32_t>(x, i);
    if (value != value) return static_cast<uint16_t>(u >> 16 | 0x40);
    if (std::fpclassify(value) == FP_SUBNORMAL) return static_cast<uint16_t>(u >> 16 & 0x8000);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  });
}

// AMX: eight registers a thread, and their shape; without one, or with another than the kernels', nothing is computed.
struct Tile {
  alignas(64) char bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool shaped = false;

inline Tile& tile(int number) {
  if (!shaped) std::abort();
  return tiles[number];
}
inline void tile_loadconfig(const void* shape) {
  const auto* bytes = static_cast<const uint8_t*>(shape);
  shaped = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    shaped = shaped && row_bytes == 64 && bytes[48 + i] == 16;
  }
  std::memset(tiles, 0xff, sizeof tiles);  // NaN, so that what was never loaded shows
}
inline void tile_release() { shaped = false; }
inline void tile_zero(int number) { std::memset(&tile(number), 0, sizeof(Tile)); }
inline void tile_loadd(int number, const void* from, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(number).bytes[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void tile_stored(int number, void* to, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(number).bytes[r], 64);
}
// Sums of the even and of the odd inputs first, then both, then onto what was there.
inline void tile_dpbf16ps(int sums, int rows, int columns) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float parts[2] = {};
      for (int k = 0; k < 32; ++k) {
        uint16_t a, b;
        std::memcpy(&a, tile(rows).bytes[m] + 2 * k, 2);
        std::memcpy(&b, tile(columns).bytes[k / 2] + 4 * n + 2 * (k % 2), 2);
        parts[k % 2] = std::fma(widened(a), widened(b), parts[k % 2]);
      }
      float sum;
      std::memcpy(&sum, tile(sums).bytes[m] + 4 * n, 4);
      sum += parts[0] + parts[1];
      std::memcpy(tile(sums).bytes[m] + 4 * n, &sum, 4);
    }
}
inline void tile_dpbssd(int sums, int rows, int columns) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, tile(sums).bytes[m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<int8_t>(tile(rows).bytes[m][k]) *
               static_cast<int8_t>(tile(columns).bytes[k / 4][4 * n + k % 4]);
      std::memcpy(tile(sums).bytes[m] + 4 * n, &sum, 4);
    }
}

}  // namespace stand_in

#define _mm512_set1_epi32 stand_in::set1_epi32
#define _mm512_set1_epi16 stand_in::set1_epi16
#define _mm512_add_epi32 stand_in::add_epi32
#define _mm512_madd_epi16 stand_in::madd_epi16
#define _mm512_maddubs_epi16 stand_in::maddubs_epi16
#define _mm512_dpwssd_epi32 stand_in::dpwssd_epi32
#define _mm512_dpbusd_epi32 stand_in::dpbusd_epi32
#define _mm512_maskz_max_ps stand_in::maskz_max_ps
#define _mm512_dpbf16_ps stand_in::dpbf16_ps
#define _mm512_cvtneps_pbh stand_in::cvtneps_pbh
#undef _tile_loadconfig
#define _tile_loadconfig stand_in::tile_loadconfig
#undef _tile_release
#define _tile_release stand_in::tile_release
#undef _tile_zero
#define _tile_zero stand_in::tile_zero
#undef _tile_loadd
#define _tile_loadd stand_in::tile_loadd
#undef _tile_stored
#define _tile_stored stand_in::tile_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps stand_in::tile_dpbf16ps
#undef _tile_stream_loadd
#define _tile_stream_loadd stand_in::tile_loadd
#undef _tile_dpbssd
#define _tile_dpbssd stand_in::tile_dpbssd
