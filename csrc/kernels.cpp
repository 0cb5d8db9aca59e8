// The CPU kernels, one source for all instruction sets: compiled once for each with its own flags and LASTRERANK_ISA.
//
// Vectors are the compiler's own (GCC, Clang); only the int8 dot product and the conversions have per-ISA lines.

#include "kernels.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LASTRERANK_JOIN_(a, b) a##b
#define LASTRERANK_JOIN(a, b) LASTRERANK_JOIN_(a, b)

namespace lastrerank {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of a register tile: 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a register tile and of a packed panel

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

inline float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// exp(x), relative error about 2 ulp for x in [-87, 88]; 0 below. Cephes' range reduction and polynomial.
inline Vec exp(Vec x) {
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
  const IVec bits = (n + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return underflow ? splat(0.0f) : p * power;
}

inline float bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float element(const void* weight, bool is_bf16, long i) {
  return is_bf16 ? bf16(static_cast<const uint16_t*>(weight)[i]) : static_cast<const float*>(weight)[i];
}

// ---- fp32 matrix product ----------------------------------------------------------------------------------------

// c[R, kPanel] (+)= a[R, k] @ panel[k, kPanel]: one register tile. Only `columns` of c are touched. a is in rows of
// `lda`, or kRows rows interleaved.
template <int R, bool kInterleaved>
inline void tile_f32(const float* __restrict a, long lda, const float* __restrict panel, long k, float* c, long ldc,
                     bool accumulate, long columns) {
  Vec acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec{};
  for (long i = 0; i < k; ++i) {
    const Vec b0 = load(panel + i * kPanel), b1 = load(panel + i * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(kInterleaved ? a[i * kRows + r] : a[r * lda + i]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
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

using TileF32 = void (*)(const float*, long, const float*, long, float*, long, bool, long);

template <bool kInterleaved, int... R>
constexpr TileF32 tile_of(int rows, std::integer_sequence<int, R...>) {
  constexpr TileF32 table[] = {tile_f32<R + 1, kInterleaved>...};
  return table[rows - 1];
}

// c[m, columns] (+)= a[m, k] @ panel, in register tiles. Interleaved, a tile of rows starts at a + row * lda.
template <bool kInterleaved>
inline void panel_f32(const float* a, long lda, long m, const float* panel, long k, float* c, long ldc, bool accumulate,
                      long columns) {
  long i = 0;
  for (; i + kRows <= m; i += kRows)
    tile_f32<kRows, kInterleaved>(a + i * lda, lda, panel, k, c + i * ldc, ldc, accumulate, columns);
  if (i < m)
    tile_of<kInterleaved>(static_cast<int>(m - i), std::make_integer_sequence<int, kRows>())(
        a + i * lda, lda, panel, k, c + i * ldc, ldc, accumulate, columns);
}

long packed_f32_size(long n, long k) { return ceil_div(n, kPanel) * kPanel * k; }

void pack_f32(const void* weight, bool is_bf16, long n, long k, float* packed) {
  for (long p = 0; p < ceil_div(n, kPanel); ++p)
    for (long i = 0; i < k; ++i)
      for (long j = 0; j < kPanel; ++j) {
        const long column = p * kPanel + j;
        packed[(p * k + i) * kPanel + j] = column < n ? element(weight, is_bf16, column * k + i) : 0.0f;
      }
}

void unpack_f32(const float* packed, long n, long k, float* weight) {
  for (long column = 0; column < n; ++column)
    for (long i = 0; i < k; ++i)
      weight[column * k + i] = packed[(column / kPanel * k + i) * kPanel + column % kPanel];
}

// Blocks: a panel's slice of kDepth stays in L1 over a block of kBlockRows rows of x, which stays in L2.
constexpr long kDepth = 256, kBlockRows = 20 * kRows, kBlockPanels = 16;

void linear_f32(int threads, const float* x, long ldx, long m, long k, const float* packed, long n, const float* bias,
                float* out, long ldo) {
  // A tile's rows interleaved: widths are multiples of 4 KiB, so rows side by side would share a few cache sets.
  std::unique_ptr<float[]> storage(new float[ceil_div(m, kRows) * kRows * k]);
  float* tiles = storage.get();
  parallel_for(threads, ceil_div(m, kRows), [=](long task) {
    const long first = task * kRows, rows = std::min<long>(kRows, m - first);
    float* tile = tiles + first * k;
    for (long i = 0; i < k; ++i)
      for (long r = 0; r < rows; ++r) tile[i * kRows + r] = x[(first + r) * ldx + i];
  });
  const long panels = ceil_div(n, kPanel), row_blocks = ceil_div(m, kBlockRows),
             column_blocks = ceil_div(panels, kBlockPanels);
  parallel_for(threads, row_blocks * column_blocks, [=](long task) {
    const long row = task / column_blocks * kBlockRows, rows = std::min(kBlockRows, m - row);
    const long first = task % column_blocks * kBlockPanels, last = std::min(first + kBlockPanels, panels);
    for (long depth = 0; depth < k; depth += kDepth) {
      const long span = std::min(kDepth, k - depth);
      for (long p = first; p < last; ++p)
        panel_f32<true>(tiles + row * k + depth * kRows, k, rows, packed + (p * k + depth) * kPanel, span,
                  out + row * ldo + p * kPanel, ldo, depth > 0, std::min<long>(kPanel, n - p * kPanel));
    }
    if (bias != nullptr)
      for (long r = row; r < row + rows; ++r)
        for (long j = first * kPanel; j < std::min(last * kPanel, n); ++j) out[r * ldo + j] += bias[j];
  });
}

// ---- int8 matrix product ----------------------------------------------------------------------------------------

// acc[j] += sum of a[0..3] * b[4j .. 4j + 3]: a unsigned 8 bits, broadcast; b signed 7 bits, so that the pairwise
// 16-bit sums of maddubs can't saturate (2 * 255 * 64 < 32768).
#if defined(__AVX512VNNI__)
inline IVec dot4(IVec acc, const uint8_t* a, const int8_t* b) {
  int32_t four;
  std::memcpy(&four, a, 4);
  return (IVec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(four), _mm512_loadu_si512(b));
}
#elif defined(__AVX512BW__)
inline IVec dot4(IVec acc, const uint8_t* a, const int8_t* b) {
  int32_t four;
  std::memcpy(&four, a, 4);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(four), _mm512_loadu_si512(b));
  return (IVec)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
inline IVec dot4(IVec acc, const uint8_t* a, const int8_t* b) {
  int32_t four;
  std::memcpy(&four, a, 4);
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_set1_epi32(four), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return (IVec)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
inline IVec dot4(IVec acc, const uint8_t* a, const int8_t* b) {
  for (int j = 0; j < kLanes; ++j)
    acc[j] += a[0] * b[4 * j] + a[1] * b[4 * j + 1] + a[2] * b[4 * j + 2] + a[3] * b[4 * j + 3];
  return acc;
}
#endif

constexpr int kWeightMax = 64;

// Packed: per panel, per group of 4 inputs, kPanel columns of 4 bytes.
long packed_i8_size(long n, long k) { return ceil_div(n, kPanel) * kPanel * ceil_div(k, 4) * 4; }

// A weight beyond this many root mean squares of its output's weights would cost all the others their precision: a
// Gaussian has one such in two million, a row with a few large weights loses nothing else once they are out.
constexpr double kOutlier = 5.0;

long pack_i8(const void* weight, bool is_bf16, long n, long k, bool scaled, int8_t* packed, float* scales,
             int32_t* sums, Outlier* outliers, long room) {
  const long groups = ceil_div(k, 4);
  long count = 0;
  std::memset(packed, 0, packed_i8_size(n, k));
  std::vector<float> row(k);
  for (long column = 0; column < n; ++column) {
    double squares = 0;
    for (long i = 0; i < k; ++i) {
      row[i] = element(weight, is_bf16, column * k + i);
      squares += double(row[i]) * row[i];
    }
    // With a scale given, what its grid can't hold.
    const float limit = scaled ? (kWeightMax + 0.5f) * scales[column]
                               : static_cast<float>(kOutlier * std::sqrt(squares / static_cast<double>(k)));
    float largest = 0;
    for (long i = 0; i < k; ++i)
      if (std::fabs(row[i]) <= limit) largest = std::max(largest, std::fabs(row[i]));
    // A scale is a normal number, so that it can be divided by and is one when it is loaded again.
    if (!scaled) scales[column] = largest > 0 ? std::max(largest / kWeightMax, FLT_MIN) : 1.0f;
    int32_t total = 0;
    for (long i = 0; i < k; ++i) {
      if (std::fabs(row[i]) > limit) {
        if (count < room) outliers[count] = {static_cast<int32_t>(column), static_cast<int32_t>(i), row[i]};
        ++count;
        continue;
      }
      const int q = static_cast<int>(std::lrint(row[i] / scales[column]));
      packed[((column / kPanel * groups + i / 4) * kPanel + column % kPanel) * 4 + i % 4] = static_cast<int8_t>(q);
      total += q;
    }
    sums[column] = total;
  }
  return count;
}

void unpack_i8(const int8_t* packed, const float* scales, const Outlier* outliers, long count, long n, long k,
               float* weight) {
  const long groups = ceil_div(k, 4);
  for (long column = 0; column < n; ++column)
    for (long i = 0; i < k; ++i) {
      const long at = ((column / kPanel * groups + i / 4) * kPanel + column % kPanel) * 4 + i % 4;
      weight[column * k + i] = static_cast<float>(packed[at]) * scales[column];
    }
  for (long e = 0; e < count; ++e) weight[outliers[e].output * k + outliers[e].input] = outliers[e].value;
}

template <int R>
inline void tile_i8(const uint8_t* __restrict a, long lda, const float* row_scales, const int8_t* __restrict panel,
                    long groups, const float* scales, const int32_t* sums, const float* bias, float* c, long ldc,
                    long columns) {
  IVec acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = IVec{};
  for (long i = 0; i < groups; ++i) {
    const int8_t* b = panel + i * kPanel * 4;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] = dot4(acc[r][0], a + r * lda + 4 * i, b);
      acc[r][1] = dot4(acc[r][1], a + r * lda + 4 * i, b + 4 * kLanes);
    }
  }
  int32_t spilled[R][kPanel];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    std::memcpy(spilled[r], &acc[r][0], sizeof acc[r][0]);
    std::memcpy(spilled[r] + kLanes, &acc[r][1], sizeof acc[r][1]);
  }
  for (int r = 0; r < R; ++r)
    for (long j = 0; j < columns; ++j) {
      // x = row_scale * (a - 128), so the weights' sum is taken off 128 times.
      const int32_t value = spilled[r][j] - 128 * sums[j];
      c[r * ldc + j] = static_cast<float>(value) * (row_scales[r] * scales[j]) + (bias != nullptr ? bias[j] : 0.0f);
    }
}

using TileI8 = void (*)(const uint8_t*, long, const float*, const int8_t*, long, const float*, const int32_t*,
                        const float*, float*, long, long);

constexpr int kRowsI8 = kLanes == 16 ? 12 : 4;  // leaves registers for the products

template <int... R>
constexpr TileI8 tile_i8_of(int rows, std::integer_sequence<int, R...>) {
  constexpr TileI8 table[] = {tile_i8<R + 1>...};
  return table[rows - 1];
}

// One row to unsigned 8 bits around 128; returns the scale.
inline float quantize_row(const float* x, long k, uint8_t* q) {
  // A row that is not finite must not turn into numbers: x * 0 is then NaN, and so become its scale and its outputs.
  Vec top{}, zeros{};
  long i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    const Vec v = load(x + i);
    zeros += v * 0.0f;
    const Vec magnitude = v < 0.0f ? -v : v;
    top = magnitude > top ? magnitude : top;
  }
  float largest = 0;
  for (int j = 0; j < kLanes; ++j) largest = std::max(largest, top[j]);
  float zero = sum(zeros);
  for (; i < k; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    zero += x[i] * 0.0f;
  }
  if (zero != 0.0f) {
    std::memset(q, 128, ceil_div(k, 4) * 4);
    return NAN;
  }
  largest = std::max(largest, 1e-30f);  // the inverse of less would overflow
  const float inverse = 127.0f / largest;
  for (i = 0; i + kLanes <= k; i += kLanes) {
    const Vec v = load(x + i) * inverse;
    const IVec rounded = __builtin_convertvector(v + (v < 0.0f ? splat(-0.5f) : splat(0.5f)), IVec) + 128;
    for (int j = 0; j < kLanes; ++j) q[i + j] = static_cast<uint8_t>(rounded[j]);
  }
  for (; i < k; ++i) {
    const float v = x[i] * inverse;
    q[i] = static_cast<uint8_t>(static_cast<int>(v + (v < 0 ? -0.5f : 0.5f)) + 128);
  }
  for (; i % 4; ++i) q[i] = 128;  // meets zero weights
  return largest / 127.0f;
}

void linear_i8(int threads, const float* x, long ldx, long m, long k, const int8_t* packed, const float* scales,
               const int32_t* sums, const Outlier* outliers, long count, long n, const float* bias, float* out,
               long ldo) {
  constexpr long block_rows = 24 * kRowsI8;
  const long groups = ceil_div(k, 4), width = groups * 4;
  std::unique_ptr<uint8_t[]> quantized(new uint8_t[m * width]);
  std::unique_ptr<float[]> row_scales(new float[m]);
  uint8_t* q = quantized.get();
  float* rs = row_scales.get();
  parallel_for(threads, ceil_div(m, 16), [=](long task) {
    for (long r = task * 16; r < std::min(m, task * 16 + 16); ++r) rs[r] = quantize_row(x + r * ldx, k, q + r * width);
  });
  const long panels = ceil_div(n, kPanel), row_blocks = ceil_div(m, block_rows),
             column_blocks = ceil_div(panels, kBlockPanels);
  parallel_for(threads, row_blocks * column_blocks, [=](long task) {
    const long row = task / column_blocks * block_rows, end = std::min(row + block_rows, m);
    const long first = task % column_blocks * kBlockPanels, last = std::min(first + kBlockPanels, panels);
    for (long p = first; p < last; ++p) {
      const long column = p * kPanel, columns = std::min<long>(kPanel, n - column);
      const int8_t* panel = packed + p * groups * kPanel * 4;
      const float* b = bias == nullptr ? nullptr : bias + column;
      long r = row;
      for (; r + kRowsI8 <= end; r += kRowsI8)
        tile_i8<kRowsI8>(q + r * width, width, rs + r, panel, groups, scales + column, sums + column, b,
                         out + r * ldo + column, ldo, columns);
      if (r < end)
        tile_i8_of(static_cast<int>(end - r), std::make_integer_sequence<int, kRowsI8>())(
            q + r * width, width, rs + r, panel, groups, scales + column, sums + column, b, out + r * ldo + column, ldo,
            columns);
    }
    auto before = [](const Outlier& outlier, long column) { return outlier.output < column; };
    const Outlier *begin = std::lower_bound(outliers, outliers + count, first * kPanel, before),
                  *stop = std::lower_bound(begin, outliers + count, last * kPanel, before);
    if (begin != stop)
      for (long r = row; r < end; ++r)
        for (const Outlier* o = begin; o != stop; ++o) out[r * ldo + o->output] += x[r * ldx + o->input] * o->value;
  });
}

// ---- row kernels ------------------------------------------------------------------------------------------------

constexpr long kRowsPerTask = 16;

inline float inverse_rms(const float* x, long width, float eps) {
  Vec squares{};
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < width; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

inline void scale_by(const float* x, float factor, const float* weight, long width, float* out) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

void add_rms_norm(int threads, float* residual, long ldr, const float* x, long ldx, const float* weight, float eps,
                  long rows, long width, float* out, long ldo) {
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [=](long task) {
    for (long r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r) {
      float* row = residual + r * ldr;
      if (x != nullptr) {
        const float* add = x + r * ldx;
        for (long i = 0; i < width; ++i) row[i] += add[i];
      }
      scale_by(row, inverse_rms(row, width, eps), weight, width, out + r * ldo);
    }
  });
}

void swiglu(int threads, const float* gate_up, long ldg, long rows, long width, float* out, long ldo) {
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [=](long task) {
    for (long r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r) {
      const float *gate = gate_up + r * ldg, *up = gate + width;
      float* row = out + r * ldo;
      long i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        const Vec g = load(gate + i);
        store(row + i, g / (1.0f + exp(-g)) * load(up + i));
      }
      for (; i < width; ++i) row[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
  });
}

void qk_norm_rope(int threads, float* qkv, long ld, long rows, long heads, long kv_heads, long dim,
                  const float* q_weight, const float* k_weight, const float* cos, const float* sin,
                  const int64_t* positions, float eps) {
  const long half = dim / 2;
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [=](long task) {
    for (long r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r) {
      const float *c = cos + positions[r] * half, *s = sin + positions[r] * half;
      for (long h = 0; h < heads + kv_heads; ++h) {
        float* head = qkv + r * ld + h * dim;
        const float* weight = h < heads ? q_weight : k_weight;
        if (weight != nullptr) scale_by(head, inverse_rms(head, dim, eps), weight, dim, head);
        for (long i = 0; i < half; ++i) {
          const float a = head[i], b = head[i + half];
          head[i] = a * c[i] - b * s[i];
          head[i + half] = b * c[i] + a * s[i];
        }
      }
    }
  });
}

// ---- attention --------------------------------------------------------------------------------------------------

constexpr long kKeys = 64;        // keys of a tile
constexpr long kQueryRows = 96;  // query rows of a task, the group's heads together

void attention(int threads, const float* q, long ldq, long rows, const int64_t* positions, const float* k, long ldk,
               const float* v, long ldv, long length, const float* prefix_k, const float* prefix_v, long prefix,
               long heads, long kv_heads, long dim, long window, float scale, float* out, long ldo) {
  // Keys are tiled from the beginning of what the sequence continues: its rows are bitwise what they would be in one.
  length += prefix;
  auto key_row = [=](long key) { return key < prefix ? prefix_k + key * ldk : k + (key - prefix) * ldk; };
  auto value_row = [=](long key) { return key < prefix ? prefix_v + key * ldv : v + (key - prefix) * ldv; };
  const long group = heads / kv_heads, tile_rows = std::max<long>(1, kQueryRows / group),
             key_panels = ceil_div(length, kPanel), value_panels = ceil_div(dim, kPanel);
  // Keys transposed into panels once, for all row tiles: [kv_heads][key_panels][dim][kPanel].
  std::unique_ptr<float[]> storage(new float[kv_heads * key_panels * dim * kPanel]);
  float* packed = storage.get();
  parallel_for(threads, kv_heads * key_panels, [=](long task) {
    const long head = task / key_panels, panel = task % key_panels;
    float* target = packed + task * dim * kPanel;
    for (long j = 0; j < kPanel; ++j) {
      const long key = panel * kPanel + j;
      const float* source = key < length ? key_row(key) + head * dim : nullptr;
      for (long i = 0; i < dim; ++i) target[i * kPanel + j] = source != nullptr ? source[i] : 0.0f;
    }
  });

  const long row_tiles = ceil_div(rows, tile_rows);
  parallel_for(threads, row_tiles * kv_heads, [=](long task) {
    // Heaviest first: the last rows see the most keys.
    const long tile = row_tiles - 1 - task / kv_heads, head = task % kv_heads;
    const long first = tile * tile_rows, count = std::min(tile_rows, rows - first), m = count * group;
    auto position = [=](long r) { return prefix + (positions == nullptr ? first + r : positions[first + r]); };

    std::vector<float> queries(m * dim), values(kKeys * value_panels * kPanel), p(m * kKeys),
        result(m * value_panels * kPanel), top(m, -INFINITY), total(m, 0.0f);
    long low = length, high = 0;
    for (long r = 0; r < count; ++r) {
      low = std::min<long>(low, position(r));
      high = std::max<long>(high, position(r) + 1);
      for (long g = 0; g < group; ++g)
        for (long i = 0; i < dim; ++i)
          queries[(r * group + g) * dim + i] = q[(first + r) * ldq + (head * group + g) * dim + i] * scale;
    }
    const long start = window > 0 ? std::max<long>(0, low - window + 1) / kKeys * kKeys : 0;
    for (long key = start; key < high; key += kKeys) {
      const long span = std::min(kKeys, high - key);
      for (long panel = 0; panel < ceil_div(span, kPanel); ++panel)
        panel_f32<false>(queries.data(), dim, m, packed + (head * key_panels + key / kPanel + panel) * dim * kPanel, dim,
                  p.data() + panel * kPanel, kKeys, false, kPanel);
      for (long j = 0; j < span; ++j)
        for (long panel = 0; panel < value_panels; ++panel) {
          const long columns = std::min<long>(kPanel, dim - panel * kPanel);
          float* target = &values[(panel * kKeys + j) * kPanel];
          std::memcpy(target, value_row(key + j) + head * dim + panel * kPanel, columns * sizeof(float));
        }
      for (long r = 0; r < m; ++r) {
        const long at = position(r / group);
        // Visible keys of this tile: begin .. end - 1.
        const long begin = window > 0 ? std::clamp<long>(at - window + 1 - key, 0, span) : 0,
                   end = std::clamp<long>(at + 1 - key, begin, span);
        float* row = &p[r * kKeys];
        for (long j = 0; j < begin; ++j) row[j] = -INFINITY;
        for (long j = end; j < kKeys; ++j) row[j] = -INFINITY;
        if (begin == end) {
          std::fill(row, row + kKeys, 0.0f);
          continue;
        }
        Vec most = load(row);
        for (long j = kLanes; j < kKeys; j += kLanes) {
          const Vec x = load(row + j);
          most = x > most ? x : most;
        }
        float next = top[r];
        for (int j = 0; j < kLanes; ++j) next = std::max(next, most[j]);
        Vec sums{};
        for (long j = 0; j < kKeys; j += kLanes) {
          const Vec e = exp(load(row + j) - next);
          sums += e;
          store(row + j, e);
        }
        const float shrink = std::exp(top[r] - next);
        total[r] = total[r] * shrink + sum(sums);
        if (shrink != 1.0f)
          for (long i = 0; i < value_panels * kPanel; ++i) result[r * value_panels * kPanel + i] *= shrink;
        top[r] = next;
      }
      for (long panel = 0; panel < value_panels; ++panel)
        panel_f32<false>(p.data(), kKeys, m, &values[panel * kKeys * kPanel], span, result.data() + panel * kPanel,
                  value_panels * kPanel, true, kPanel);
    }
    for (long r = 0; r < m; ++r) {
      float* target = out + (first + r / group) * ldo + (head * group + r % group) * dim;
      for (long i = 0; i < dim; ++i) target[i] = result[r * value_panels * kPanel + i] / total[r];
    }
  });
}

// No exception may cross the C interface: what is thrown here, or on a thread of the pool, becomes a number.
template <auto kKernel, typename... A>
int guarded(A... arguments) {
  try {
    kKernel(arguments...);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const std::system_error&) {
    return 2;
  } catch (...) {
    return 3;
  }
}

template <auto kKernel, typename... A>
constexpr auto guard(void (*)(A...)) {
  return &guarded<kKernel, A...>;
}

long pack_i8_guarded(const void* weight, bool is_bf16, long n, long k, bool scaled, int8_t* packed, float* scales,
                     int32_t* sums, Outlier* outliers, long room) {
  try {
    return pack_i8(weight, is_bf16, n, k, scaled, packed, scales, sums, outliers, room);
  } catch (...) {
    return -1;
  }
}

}  // namespace

extern const Kernels LASTRERANK_JOIN(kernels_, LASTRERANK_ISA) = {
#define LASTRERANK_STRING_(x) #x
#define LASTRERANK_STRING(x) LASTRERANK_STRING_(x)
    LASTRERANK_STRING(LASTRERANK_ISA),
    packed_f32_size,
    packed_i8_size,
    pack_f32,
    unpack_f32,
    pack_i8_guarded,
    unpack_i8,
    guard<linear_f32>(linear_f32),
    guard<linear_i8>(linear_i8),
    guard<add_rms_norm>(add_rms_norm),
    guard<swiglu>(swiglu),
    guard<qk_norm_rope>(qk_norm_rope),
    guard<attention>(attention),
};

}  // namespace lastrerank
