// Register tiles: R rows times one packed panel of kPanel columns, in fp32, bf16 and integers of 8 and 16 bits.
//
// A panel holds its columns side by side for every input (fp32) or every word of inputs (16 and 8 bits), so that one
// vector load feeds one product of every lane. Included by `kernels.cpp` alone.
#pragma once

#include <type_traits>

#include "vectors.h"

// A function of its own, so that nothing around it wants registers.
#define LASTRERANK_TILE __attribute__((noinline))

namespace lastrerank {
namespace {

// tile(R, row) for rows first .. last - 1: kMost of them at a time, what remains in one tile.
template <int kMost, typename Tile>
inline void in_tiles(long first, long last, const Tile& tile) {
  for (; first + kMost <= last; first += kMost) tile(std::integral_constant<int, kMost>(), first);
  if constexpr (kMost > 1) {
    if (first + kMost - 1 == last) {
      tile(std::integral_constant<int, kMost - 1>(), first);
    } else if (first < last) {
      in_tiles<kMost - 1>(first, last, tile);
    }
  }
}

// c (+)= acc, of which `columns` are there.
template <int R>
LASTRERANK_INLINE void store_tile(const Vec (&acc)[R][2], float* c, long ldc, bool accumulate, long columns) {
  if (columns == kPanel) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float* row = c + r * ldc;
      store(row, accumulate ? load(row) + acc[r][0] : acc[r][0]);
      store(row + kLanes, accumulate ? load(row + kLanes) + acc[r][1] : acc[r][1]);
    }
    return;
  }
  float spilled[R][kPanel];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(spilled[r], acc[r][0]);
    store(spilled[r] + kLanes, acc[r][1]);
  }
  for (int r = 0; r < R; ++r)
    for (long j = 0; j < columns; ++j) c[r * ldc + j] = accumulate ? c[r * ldc + j] + spilled[r][j] : spilled[r][j];
}

// acc[R, kPanel] = what add(from, to) leaves there for the steps from .. to - 1, kSpan of them at a time: their sums are
// added to one another, since a chain of all additions would lose more.
template <long kSpan, int R, typename Add>
LASTRERANK_INLINE void in_spans(long steps, Vec (&acc)[R][2], const Add& add) {
  Vec sums[R][2] = {};
  long from = 0;
  do {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec{};
    add(from, std::min(from + kSpan, steps));
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) {
        if (from > 0) acc[r][half] += sums[r][half];
        if (from + kSpan < steps) sums[r][half] = acc[r][half];
      }
    from += kSpan;
  } while (from < steps);
}

// ---- fp32 ---------------------------------------------------------------------------------------------------------

constexpr long kDepth = 128;  // steps of a span

// c[R, columns] (+)= a[R, k] @ panel[k, kPanel]. a is in rows of `lda`, or kRows rows interleaved.
template <int R, bool kInterleaved>
LASTRERANK_TILE void tile_f32(const float* __restrict a, long lda, const float* __restrict panel, long k, float* c,
                              long ldc, bool accumulate, long columns) {
  Vec acc[R][2];
  in_spans<kDepth>(k, acc, [&](long from, long to) {
    for (long i = from; i < to; ++i) {
      const Vec b0 = load(panel + i * kPanel), b1 = load(panel + i * kPanel + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec x = splat(kInterleaved ? a[i * kRows + r] : a[r * lda + i]);
        acc[r][0] += x * b0;
        acc[r][1] += x * b1;
      }
    }
  });
  store_tile<R>(acc, c, ldc, accumulate, columns);
}

// ---- words --------------------------------------------------------------------------------------------------------

// Bytes of a row or a column that are multiplied together: a lane's, or half a register where a matrix unit takes two rows
// and two columns.
#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kMatrixUnits = true;
#else
constexpr bool kMatrixUnits = false;
#endif
constexpr long kWord = kMatrixUnits ? 8 : 4;

// acc[R, kPanel] = sums of kDot over words: `words` of each row of a and of a panel's columns. a's rows are `row` bytes
// apart, its words `step`. acc is aligned: Sums forgets that vectors needn't be.
template <auto kDot, int R, typename Sums>
LASTRERANK_INLINE void multiply_words(const void* a, long row, long step, const void* panel, long words,
                                      Sums (&acc)[R][2]) {
  const char *first = static_cast<const char*>(a), *columns = static_cast<const char*>(panel);
  if constexpr (kMatrixUnits) {
    constexpr int kPairs = (R + 1) / 2;
    alignas(4 * kLanes) Sums squares[kPairs][4] = {};  // two rows by two columns each
    for (long i = 0; i < words; ++i) {
      UVec x[kPairs];
#pragma GCC unroll 6
      for (int p = 0; p < kPairs; ++p) {
        const char* word = first + 2 * p * row + i * step;
        x[p] = load_two(word, 2 * p + 1 < R ? word + row : word);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const UVec b = load_words(columns + kWord * (i * kPanel + 2 * j));
#pragma GCC unroll 6
        for (int p = 0; p < kPairs; ++p) squares[p][j] = kDot(squares[p][j], x[p], b);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) {
        const Sums *two = &squares[r / 2][2 * half];
        for (int i = 0; i < kLanes; ++i) acc[r][half][i] = two[i / 2][r % 2 * 2 + i % 2];
      }
  } else {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Sums{};
    for (long i = 0; i < words; ++i) {
      const UVec b0 = load_words(columns + kWord * i * kPanel), b1 = load_words(columns + kWord * (i * kPanel + kLanes));
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const uint32_t x = load_word(first + r * row + i * step);
        acc[r][0] = kDot(acc[r][0], x, b0);
        acc[r][1] = kDot(acc[r][1], x, b1);
      }
    }
  }
}

// ---- bf16 ---------------------------------------------------------------------------------------------------------

// acc[j] += a[0] * b[2j] + a[1] * b[2j + 1], of bf16 numbers, in fp32; of a matrix unit acc[2i + j] += the sum of
// a[4i .. 4i + 3] * b[4j .. 4j + 3].
#if defined(__AVX512BF16__)
constexpr bool kBf16Units = true;
LASTRERANK_INLINE Vec dot_bf16(Vec acc, uint32_t a, UVec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#elif defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kBf16Units = true;
LASTRERANK_INLINE Vec dot_bf16(Vec acc, UVec a, UVec b) {
  return (Vec)vbfmmlaq_f32((float32x4_t)acc, bits<bfloat16x8_t>(a), bits<bfloat16x8_t>(b));
}
#else
constexpr bool kBf16Units = false;
// What it means; tile_widened is what computes without units.
LASTRERANK_INLINE Vec dot_bf16(Vec acc, uint32_t a, UVec b) {
  return acc + splat(bits<float>(a << 16)) * bits<Vec>(b << 16) +
         splat(bits<float>(a & 0xffff0000u)) * bits<Vec>(b & 0xffff0000u);
}
#endif

// c[R, columns] (+)= a[R, inputs] @ panel: a and panel bf16, in words. a as in tile_f32, in words.
template <int R, bool kInterleaved>
LASTRERANK_TILE void tile_bf16(const uint16_t* __restrict a, long lda, const uint16_t* __restrict panel, long words,
                               float* c, long ldc, bool accumulate, long columns) {
  constexpr long numbers = kWord / 2, step = kInterleaved ? numbers * kRows : numbers;
  alignas(4 * kLanes) Vec acc[R][2];
  in_spans<2 * kDepth / numbers>(words, acc, [&](long from, long to) {
    multiply_words<dot_bf16>(a + from * step, kInterleaved ? kWord : 2 * lda, 2 * step, panel + from * numbers * kPanel,
                             to - from, acc);
  });
  store_tile<R>(acc, c, ldc, accumulate, columns);
}

// Two bf16 numbers of each of kLanes columns: the pair's number, and which half of the panel.
LASTRERANK_INLINE UVec pair_of(const uint16_t* panel, long pair, int half) {
  if constexpr (kWord == 4) return load_words(panel + 2 * (pair * kPanel + half * kLanes));
  const uint16_t* words = panel + 4 * (pair / 2 * kPanel + half * kLanes) + pair % 2 * 2;
  uint32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = load_word(words + 4 * i);
  return load_words(lanes);
}

// The same without units for bf16: a in fp32 (of bf16 numbers), interleaved; the panel is widened on the way.
template <int R>
LASTRERANK_TILE void tile_widened(const float* __restrict a, const uint16_t* __restrict panel, long pairs, float* c,
                                  long ldc, long columns) {
  Vec acc[R][2];
  in_spans<kDepth / 2>(pairs, acc, [&](long from, long to) {
    for (long i = from; i < to; ++i) {
      const UVec b0 = pair_of(panel, i, 0), b1 = pair_of(panel, i, 1);
      const Vec even0 = bits<Vec>(b0 << 16), even1 = bits<Vec>(b1 << 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec x = splat(a[2 * i * kRows + r]);
        acc[r][0] += x * even0;
        acc[r][1] += x * even1;
      }
      const Vec odd0 = bits<Vec>(b0 & 0xffff0000u), odd1 = bits<Vec>(b1 & 0xffff0000u);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec x = splat(a[(2 * i + 1) * kRows + r]);
        acc[r][0] += x * odd0;
        acc[r][1] += x * odd1;
      }
    }
  });
  store_tile<R>(acc, c, ldc, false, columns);
}

// ---- integers of 16 bits ------------------------------------------------------------------------------------------

// acc[j] += a[0] * b[2j] + a[1] * b[2j + 1], signed. Without units for 8 bits as many multiplications as for those.
#if defined(__AVX512VNNI__)
LASTRERANK_INLINE IVec dot_i16(IVec acc, uint32_t a, UVec b) {
  return (IVec)_mm512_dpwssd_epi32((__m512i)acc, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
}
#elif defined(__AVX512BW__)
LASTRERANK_INLINE IVec dot_i16(IVec acc, uint32_t a, UVec b) {
  return acc + (IVec)_mm512_madd_epi16(_mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
}
#elif defined(__AVX2__)
LASTRERANK_INLINE IVec dot_i16(IVec acc, uint32_t a, UVec b) {
  return acc + (IVec)_mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(a)), (__m256i)b);
}
#else
LASTRERANK_INLINE IVec dot_i16(IVec acc, uint32_t a, UVec b) {
  return acc + static_cast<int16_t>(a & 0xffff) * ((IVec)(b << 16) >> 16) +
         static_cast<int16_t>(a >> 16) * ((IVec)b >> 16);
}
#endif

// ---- integers of 8 bits -------------------------------------------------------------------------------------------

// acc[j] += sum of a[0..3] * b[4j .. 4j + 3]: b signed, a 8 bits around kZero, unsigned on x86; of a matrix unit
// acc[2i + j] += the sum of a[8i .. 8i + 7] * b[8j .. 8j + 7]. Without units for it b is of 7 bits, so that the pairwise
// 16-bit sums of maddubs can't saturate (2 * 255 * 64 < 32768).
#if defined(__AVX512VNNI__)
constexpr bool kInt8Units = true;
constexpr int kZero = 128;
LASTRERANK_INLINE IVec dot_i8(IVec acc, uint32_t a, UVec b) {
  return (IVec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
}
#elif defined(__AVX512BW__)
constexpr bool kInt8Units = false;
constexpr int kZero = 128;
LASTRERANK_INLINE IVec dot_i8(IVec acc, uint32_t a, UVec b) {
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
  return (IVec)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
constexpr bool kInt8Units = false;
constexpr int kZero = 128;
LASTRERANK_INLINE IVec dot_i8(IVec acc, uint32_t a, UVec b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(static_cast<int>(a)), (__m256i)b);
  return (IVec)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kInt8Units = true;
constexpr int kZero = 0;
LASTRERANK_INLINE IVec dot_i8(IVec acc, UVec a, UVec b) {
  return (IVec)vmmlaq_s32((int32x4_t)acc, bits<int8x16_t>(a), bits<int8x16_t>(b));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool kInt8Units = true;
constexpr int kZero = 0;
LASTRERANK_INLINE IVec dot_i8(IVec acc, uint32_t a, UVec b) {
  return (IVec)vdotq_s32((int32x4_t)acc, (int8x16_t)vdupq_n_u32(a), (int8x16_t)b);
}
#else
constexpr bool kInt8Units = false;
constexpr int kZero = 0;
LASTRERANK_INLINE IVec dot_i8(IVec acc, uint32_t a, UVec b) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    acc += static_cast<int8_t>(a >> 8 * i & 0xff) * ((IVec)(b << (24 - 8 * i)) >> 24);
  return acc;
}
#endif

// c[R, columns] (+)= (a[R, inputs] @ panel - zero * sums) * row_scales * scales + bias: of integers of 8 or 16 bits, in
// words. sums: of a column's numbers, where a's are around `zero`; none, and no scales or bias: null. The caller
// sees to it that no sum overflows.
template <int R, typename Number>
LASTRERANK_TILE void tile_integers(const Number* __restrict a, long lda, const float* row_scales, int zero,
                                   const void* panel, long words, const float* scales, const int32_t* sums,
                                   const float* bias, float* c, long ldc, bool accumulate, long columns) {
  alignas(4 * kLanes) IVec acc[R][2];
  if constexpr (sizeof(Number) == 1) {
    multiply_words<dot_i8>(a, lda, kWord, panel, words, acc);
  } else {
    multiply_words<dot_i16>(a, 2 * lda, kWord, panel, words, acc);
  }
  Vec products[R][2];
  for (int half = 0; half < 2; ++half) {
    const long at = half * kLanes;
    const IVec offset = sums == nullptr ? IVec{} : zero * load_some(sums, at, columns);
    const Vec scale = scales == nullptr ? splat(1.0f) : load_some(scales, at, columns),
              shift = bias == nullptr ? Vec{} : load_some(bias, at, columns);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      products[r][half] = __builtin_convertvector(acc[r][half] - offset, Vec) * (row_scales[r] * scale) + shift;
  }
  store_tile<R>(products, c, ldc, accumulate, columns);
}

}  // namespace
}  // namespace lastrerank
