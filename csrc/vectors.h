// Vectors of one instruction set, as the compiler's own (GCC, Clang), and what is computed on whole rows of them.
//
// Included by `kernels.cpp` alone, which is compiled once for each instruction set: everything here is local to it.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Where a call would put a tile's registers on the stack.
#define LASTRERANK_INLINE inline __attribute__((always_inline))

namespace lastrerank {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of a register tile: 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a register tile and of a packed panel

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4), aligned(4)));

// What will be read soon: where rows lie pages apart, no hardware sees them coming.
inline void prefetch(const float* p, long n) {
  for (long i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
// The numbers from `at` of the n at p, zeros beyond.
inline Vec load_some(const float* p, long at, long n) {
  if (at + kLanes <= n) return load(p + at);
  float some[kLanes] = {};
  for (long i = at; i < n; ++i) some[i - at] = p[i];
  return load(some);
}
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }
constexpr long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() reinterprets");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 32 bits a lane, whatever is in them: two of 16 bits, four of 8.
inline UVec load_words(const void* p) {
  UVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline IVec load_some(const int32_t* p, long at, long n) {
  if (at + kLanes <= n) return (IVec)load_words(p + at);
  int32_t some[kLanes] = {};
  for (long i = at; i < n; ++i) some[i - at] = p[i];
  return (IVec)load_words(some);
}
inline uint32_t load_word(const void* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}
// Eight bytes at a and eight at b, in the first four lanes.
LASTRERANK_INLINE UVec load_two(const void* a, const void* b) {
  typedef uint64_t Halves __attribute__((vector_size(kLanes * 4)));
  Halves both{};
  std::memcpy(&both, a, 8);
  uint64_t second;
  std::memcpy(&second, b, 8);
  both[1] = second;
  return bits<UVec>(both);
}

// Lanes in pairs, then pairs in pairs: a chain of all would take longer than what is summed.
template <typename F>
LASTRERANK_INLINE float reduced(Vec v, const F& combine) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}
inline float sum(Vec v) {
  return reduced(v, [](float a, float b) { return a + b; });
}
inline float largest(Vec v) {
  return reduced(v, [](float a, float b) { return a > b ? a : b; });
}

// x > y ? x : y in each lane, y where one is no number: an instruction, which compilers don't find.
LASTRERANK_INLINE Vec larger(Vec x, Vec y) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y);  // without a mask GCC 12 warns of its own header
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
#endif
}

// exp(x), relative error about 2 ulp for x in [-87, 88]; 0 below. Cephes' range reduction and polynomial.
LASTRERANK_INLINE Vec exp(Vec x) {
  const IVec underflow = x < -87.0f;
  x = underflow ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec scaled = x * 1.44269504088896341f;
  const IVec n = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), IVec);
  const Vec nf = __builtin_convertvector(n, Vec);
  const Vec r = (x - nf * 0.693359375f) - nf * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return underflow ? splat(0.0f) : p * bits<Vec>((n + 127) << 23);
}

// 2^x for x <= 0, relative error below 3e-6; 0 below -126.5. Enough for what becomes a number of 16 bits.
LASTRERANK_INLINE Vec exp2_coarse(Vec x) {
  x = larger(splat(-127.0f), x);
  // In the last bits of a number near 1.5 * 2^23 stands the nearest integer, and 127 more: the exponent to be.
  constexpr float kShift = 12582912.0f + 127.0f;
  const Vec shifted = x + kShift, r = x - (shifted - kShift);
  Vec p = splat(9.5701e-3f);
  p = p * r + 5.591786e-2f;
  p = p * r + 2.4024745e-1f;
  p = p * r + 6.9312181e-1f;
  p = p * r + 9.9999926e-1f;
  return p * bits<Vec>(bits<IVec>(shifted) << 23);
}

// ---- bf16 ---------------------------------------------------------------------------------------------------------

inline float bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; what is no number stays none.
inline uint16_t to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return static_cast<uint16_t>(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// The same of a vector; the units' own rounding takes what is smaller than a normal number for zero.
typedef uint16_t Bf16Vec __attribute__((vector_size(kLanes * 2), aligned(2)));
#if defined(__AVX512BF16__)
inline Bf16Vec to_bf16(Vec x) { return bits<Bf16Vec>(_mm512_cvtneps_pbh((__m512)x)); }
#else
inline Bf16Vec to_bf16(Vec x) {
  const UVec u = bits<UVec>(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __builtin_convertvector(x != x ? u >> 16 | 0x40 : rounded, Bf16Vec);
}
#endif
inline Vec widened(Bf16Vec x) { return bits<Vec>(__builtin_convertvector(x, UVec) << 16); }
inline void store_bf16(uint16_t* p, Vec x) { *reinterpret_cast<Bf16Vec*>(p) = to_bf16(x); }
inline Vec rounded_to_bf16(Vec x) { return widened(to_bf16(x)); }

// ---- magnitude ----------------------------------------------------------------------------------------------------

constexpr uint32_t kSign = 0x80000000;

// The largest |x| of vectors, at least 1e-30, of which the inverse is still a number; NaN if one is not finite.
struct Magnitude {
  LASTRERANK_INLINE void add(Vec v) {
    zeros += v * 0.0f;  // NaN where v is not finite
    top = larger(bits<Vec>(bits<UVec>(v) & ~kSign), top);
  }
  float largest() const { return sum(zeros) == 0.0f ? std::max(1e-30f, lastrerank::largest(top)) : NAN; }

  Vec top{}, zeros{};
};

inline float magnitude(const float* x, long n) {
  Magnitude all;
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) all.add(load(x + i));
  if (i < n) all.add(load_some(x, i, n));
  return all.largest();
}

// ---- rotation -----------------------------------------------------------------------------------------------------

template <int kStep, int... I>
LASTRERANK_INLINE Vec partners(Vec v, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (I ^ kStep)...);
#else
  return __builtin_shuffle(v, IVec{(I ^ kStep)...});
#endif
}
template <int kStep, int... I>
LASTRERANK_INLINE Vec signs(std::integer_sequence<int, I...>) {
  return Vec{(I & kStep ? -1.0f : 1.0f)...};
}

// Sums of lanes kStep apart in the first of each two, differences in the second.
template <int kStep>
LASTRERANK_INLINE Vec butterfly(Vec v) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  return v * signs<kStep>(lanes) + partners<kStep>(v, lanes);
}

// Inputs of a rotated block: the largest power of two that divides n, at most 64 (MOST_ROTATED of lastrerank/config.py).
inline long rotated_block(long n) { return std::min<long>(64, n & -n); }

// Each block of x times the Walsh-Hadamard matrix of its size, an orthogonal one that is its own inverse: what stands
// out in a block is shared among all its numbers. out may be x. Returns the magnitude of what was written.
inline float rotate(const float* x, long n, float* out) {
  const long block = rotated_block(n);
  if (block == 64) {
    constexpr int vectors = 64 / kLanes;
    Magnitude all;
    for (long at = 0; at < n; at += 64) {
      Vec v[vectors];
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) {
        v[i] = butterfly<2>(butterfly<1>(load(x + at + i * kLanes) * 0.125f));
        if constexpr (kLanes > 4) v[i] = butterfly<4>(v[i]);
        if constexpr (kLanes > 8) v[i] = butterfly<8>(v[i]);
      }
#pragma GCC unroll 4
      for (int step = 1; step < vectors; step *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i)
          if ((i & step) == 0) {
            const Vec a = v[i], b = v[i | step];
            v[i] = a + b;
            v[i | step] = a - b;
          }
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) {
        store(out + at + i * kLanes, v[i]);
        all.add(v[i]);
      }
    }
    return all.largest();
  }
  const float root = 1.0f / std::sqrt(static_cast<float>(block));
  for (long i = 0; i < n; ++i) out[i] = x[i] * root;
  for (long step = 1; step < block; step *= 2)
    for (long i = 0; i < n; ++i)
      if ((i & step) == 0) {  // blocks begin at multiples of their size
        const float a = out[i], b = out[i + step];
        out[i] = a + b;
        out[i + step] = a - b;
      }
  return magnitude(out, n);
}

// ---- integers -----------------------------------------------------------------------------------------------------

// n numbers on a symmetric grid around `zero`, `inverse` steps of which are 1.
template <typename Integer>
inline void to_grid(const float* x, long n, float inverse, int zero, Integer* out) {
  typedef Integer Short __attribute__((vector_size(kLanes * sizeof(Integer)), aligned(1)));
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i) * inverse, half = bits<Vec>((bits<UVec>(v) & kSign) | bits<UVec>(splat(0.5f)));
    *reinterpret_cast<Short*>(out + i) = __builtin_convertvector(__builtin_convertvector(v + half, IVec) + zero, Short);
  }
  for (; i < n; ++i) {
    const float v = x[i] * inverse;
    out[i] = static_cast<Integer>(static_cast<int>(v + (v < 0 ? -0.5f : 0.5f)) + zero);
  }
}

// x on a symmetric grid of `grid` steps to either side of `zero`, the outermost at `largest`, its magnitude; returns
// the step. A row that is not finite must not turn into numbers: its step is NaN, and so becomes what is made of it.
// Blocks of `block` numbers are `stride` apart in `out`.
template <typename Integer>
inline float quantize(const float* x, long n, float largest, float grid, int zero, Integer* out,
                      long block = LONG_MAX, long stride = 0) {
  const bool finite = largest == largest;
  for (long at = 0, some; at < n; at += some, out += stride) {
    some = std::min(block, n - at);
    if (finite) {
      to_grid(x + at, some, grid / largest, zero, out);
    } else {
      std::fill(out, out + some, static_cast<Integer>(zero));
    }
  }
  return largest / grid;
}

// The same of n numbers, whole vectors of them, none below 0: rounded up where what is left of a step and its offset,
// one in (0, 1), make a whole one. Beside a large number many small ones are all nearest to zero, but together they
// weigh something.
inline float quantize_by(const float* offsets, const float* x, long n, float largest, float grid, uint8_t* out) {
  typedef uint8_t Short __attribute__((vector_size(kLanes), aligned(1)));
  if (largest == largest) {
    for (long i = 0; i < n; i += kLanes) {
      const Vec v = load(x + i) * (grid / largest) + load(offsets + i);
      *reinterpret_cast<Short*>(out + i) = __builtin_convertvector(__builtin_convertvector(v, IVec), Short);
    }
  } else {
    std::fill(out, out + n, uint8_t{0});
  }
  return largest / grid;
}

}  // namespace
}  // namespace lastrerank
