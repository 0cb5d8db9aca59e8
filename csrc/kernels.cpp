// The CPU kernels, one source for all instruction sets: compiled once for each with its own flags and LASTRERANK_ISA.
//
// Vectors are the compiler's own (`vectors.h`); only products have lines per instruction set (`tiles.h`, `amx.h`).

#include "kernels.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <system_error>
#include <vector>

#include "amx.h"
#include "parallel.h"

#define LASTRERANK_JOIN_(a, b) a##b
#define LASTRERANK_JOIN(a, b) LASTRERANK_JOIN_(a, b)

namespace lastrerank {
namespace {

inline float element(const void* weight, bool is_bf16, long i) {
  return is_bf16 ? bf16(static_cast<const uint16_t*>(weight)[i]) : static_cast<const float*>(weight)[i];
}

// Where input i of a column is in packed panels: each of `width` inputs, `together` of which stand together.
inline long packed_at(long column, long i, long width, long together) {
  return column / kPanel * kPanel * width + (i / together * kPanel + column % kPanel) * together + i % together;
}

// ---- fp32 matrix product ----------------------------------------------------------------------------------------

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
    for (long i = 0; i < k; ++i) weight[column * k + i] = packed[packed_at(column, i, k, 1)];
}

// Blocks: a panel stays in L2 over a block of kBlockRows rows of x, and those over kBlockPanels panels.
constexpr long kBlockRows = 20 * kRows, kBlockPanels = 16;
// Panels of gates at a time, and as many of what they gate: both products of a block stay in L2, too.
constexpr long kGatedPanels = 4;

// m rows as tiles of kRows rows interleaved, so that a tile is read from end to end: widths are multiples of 4 KiB, and
// rows side by side would share a few cache sets. write(row, tile, r) puts a row at place r of its tile of `size`.
template <typename T, typename Write>
std::unique_ptr<T[]> interleaved(int threads, long m, long size, const Write& write) {
  std::unique_ptr<T[]> tiles(new T[ceil_div(m, kRows) * size]);
  T* first = tiles.get();
  parallel_for(threads, ceil_div(m, kRows), [=](long task) {
    for (long row = task * kRows; row < std::min(m, (task + 1) * kRows); ++row)
      write(row, first + task * size, row % kRows);
  });
  return tiles;
}

// out = silu(gate) * up
inline void gate_by(const float* gate, const float* up, long width, float* out) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec g = load(gate + i);
    store(out + i, g / (1.0f + exp(-g)) * load(up + i));
  }
  for (; i < width; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// Where a product goes: out[m, n] (+ bias[n] unless null), or with `gated`, where the first half of the n columns are
// gates of the second, silu(gate) * up, [m, n / 2]; halves are whole panels then.
struct Target {
  long n;
  const float* bias;
  bool gated;
  float* out;
  long ldo;
};

// block(first row, last row, first panel, last panel, c, ldc) for all blocks of a product; c is of the block alone.
template <typename Block>
void in_blocks(int threads, long m, Target to, long block_rows, const Block& block) {
  const long panels = to.gated ? to.n / kPanel / 2 : ceil_div(to.n, kPanel),
             step = to.gated ? kGatedPanels : kBlockPanels, row_blocks = ceil_div(m, block_rows),
             column_blocks = ceil_div(panels, step);
  parallel_for(threads, row_blocks * column_blocks, [=](long task) {
    const long row = task / column_blocks * block_rows, end = std::min(row + block_rows, m);
    const long first = task % column_blocks * step, last = std::min(first + step, panels);
    const long width = (last - first) * kPanel;
    float* c = to.out + row * to.ldo + first * kPanel;
    if (to.gated) {  // what doesn't leave the processor's cache needn't be read again from memory
      std::unique_ptr<float[]> gate(new float[2 * (end - row) * width]);
      float* up = gate.get() + (end - row) * width;
      block(row, end, first, last, gate.get(), width);
      block(row, end, first + panels, last + panels, up, width);
      for (long r = 0; r < end - row; ++r) gate_by(gate.get() + r * width, up + r * width, width, c + r * to.ldo);
      return;
    }
    block(row, end, first, last, c, to.ldo);
    if (to.bias != nullptr)
      for (long r = 0; r < end - row; ++r)
        for (long j = 0; j < std::min(width, to.n - first * kPanel); ++j)
          c[r * to.ldo + j] += to.bias[first * kPanel + j];
  });
}

void linear_f32(int threads, const float* x, long ldx, long m, long k, const float* packed, long n, const float* bias,
                bool gated, float* out, long ldo) {
  const auto storage = interleaved<float>(threads, m, kRows * k, [=](long row, float* tile, long r) {
    for (long i = 0; i < k; ++i) tile[i * kRows + r] = x[row * ldx + i];
  });
  const float* tiles = storage.get();
  const Target to{n, bias, gated, out, ldo};
  in_blocks(threads, m, to, kBlockRows, [=](long row, long end, long first, long last, float* c, long ldc) {
    for (long p = first; p < last; ++p)
      in_tiles<kRows>(row, end, [&](auto rows, long r) {
        tile_f32<rows.value, true>(tiles + r * k, k, packed + p * k * kPanel, k,
                                   c + (r - row) * ldc + (p - first) * kPanel, ldc, false,
                                   std::min<long>(kPanel, n - p * kPanel));
      });
  });
}

// ---- bf16 matrix product ----------------------------------------------------------------------------------------

// Packed: per panel, per word of inputs, kPanel columns.
constexpr long kWordBf16 = kWord / 2;
long bf16_width(long k) { return padded(k, 2); }
long packed_bf16_size(long n, long k) { return ceil_div(n, kPanel) * kPanel * bf16_width(k); }

void pack_bf16(const void* weight, bool is_bf16, long n, long k, uint16_t* packed) {
  const long width = bf16_width(k);
  std::memset(packed, 0, packed_bf16_size(n, k) * sizeof(uint16_t));
  for (long column = 0; column < n; ++column)
    for (long i = 0; i < k; ++i)
      packed[packed_at(column, i, width, kWordBf16)] = to_bf16(element(weight, is_bf16, column * k + i));
}

void unpack_bf16(const uint16_t* packed, long n, long k, float* weight) {
  const long width = bf16_width(k);
  for (long column = 0; column < n; ++column)
    for (long i = 0; i < k; ++i) weight[column * k + i] = bf16(packed[packed_at(column, i, width, kWordBf16)]);
}

// Products with a weight in bf16, of x in as many bf16 numbers each as AMX multiplies: one rounds it, three don't.
template <int kParts>
void linear_by_tiles(int threads, const float* x, long ldx, long m, long k, const uint16_t* packed, Target to) {
  const long width = bf16_width(k), steps = width / (2 * kStepWords);
  const RowStorage tiled(m, steps, kParts);
  const RowStorage* rows = &tiled;
  parallel_for(threads, ceil_div(m, kTileRows), [=](long task) {
    for (long r = task * kTileRows; r < std::min(m, (task + 1) * kTileRows); ++r)
      split<kParts>(x + r * ldx, k, rows->row(r));
  });
  const long block_rows = tiled.block_rows(m);
  in_blocks(threads, m, to, block_rows, [=](long row, long end, long first, long last, float* c, long ldc) {
    [[maybe_unused]] const TileShape shape;
    const long products = ceil_div(end - row, kPairRows);
    for (long p = first; p < last; ++p) {
      const uint16_t *panel = packed + p * width * kPanel, *next = panel + width * kPanel;
      for (long r = row; r < end; r += kPairRows)
        product_bf16<kParts>(rows->at(r), std::min(kPairRows, end - r), panel, steps,
                             c + (r - row) * ldc + (p - first) * kPanel, ldc,
                             std::min<long>(kPanel, to.n - p * kPanel),
                             p + 1 < last ? share_of(next, steps, (r - row) / kPairRows, products) : kNothing);
    }
  });
}

// Products with a weight in bf16, on every processor: those without units for it compute them in fp32. kRounded: x is
// rounded to bf16 first.
template <bool kRounded>
void linear_bf16_weight(int threads, const float* x, long ldx, long m, long k, const uint16_t* packed, long n,
                        const float* bias, bool gated, float* out, long ldo) {
  const Target to{n, bias, gated, out, ldo};
  if constexpr (kAmx) {
    linear_by_tiles<kRounded ? 1 : kPartsOfFp32>(threads, x, ldx, m, k, packed, to);
    return;
  }
  constexpr bool in_words = kBf16Units && kRounded;
  using Input = std::conditional_t<in_words, uint16_t, float>;
  constexpr long inputs = in_words ? kWordBf16 : 1;  // that stand together
  const long width = bf16_width(k), size = width * kRows;
  const auto storage = interleaved<Input>(threads, m, size, [=](long row, Input* tile, long r) {
    for (long at = 0; at < width; at += kLanes) {
      const Vec v = load_some(x + row * ldx, at, k);
      Input numbers[kLanes];
      if constexpr (in_words) {
        store_bf16(numbers, v);
      } else {
        store(numbers, kRounded ? rounded_to_bf16(v) : v);
      }
      const long some = std::min<long>(kLanes, width - at);
      for (long i = 0; i < some; i += inputs) std::copy_n(numbers + i, inputs, tile + (at + i) * kRows + r * inputs);
    }
  });
  const Input* tiles = storage.get();
  in_blocks(threads, m, to, kBlockRows, [=](long row, long end, long first, long last, float* c, long ldc) {
    for (long p = first; p < last; ++p)
      in_tiles<kRows>(row, end, [&](auto rows, long r) {
        const Input* a = tiles + r / kRows * size;
        const uint16_t* panel = packed + p * width * kPanel;
        float* target = c + (r - row) * ldc + (p - first) * kPanel;
        const long columns = std::min<long>(kPanel, n - p * kPanel);
        if constexpr (in_words) {
          tile_bf16<rows.value, true>(a, 0, panel, width / kWordBf16, target, ldc, false, columns);
        } else {
          tile_widened<rows.value>(a, panel, width / 2, target, ldc, columns);
        }
      });
  });
}

// ---- int8 matrix product ----------------------------------------------------------------------------------------

constexpr int kWeightMax = 64;

// Packed: per panel, per word of inputs, kPanel columns.
long i8_width(long k) { return padded(k, 1); }
long packed_i8_size(long n, long k) { return ceil_div(n, kPanel) * kPanel * i8_width(k); }

void pack_i8(const void* weight, bool is_bf16, long n, long k, bool scaled, int8_t* packed, float* scales,
             int32_t* sums) {
  const long width = i8_width(k);
  std::memset(packed, 0, packed_i8_size(n, k));
  std::vector<float> row(k);
  for (long column = 0; column < n; ++column) {
    for (long i = 0; i < k; ++i) row[i] = element(weight, is_bf16, column * k + i);
    rotate(row.data(), k, row.data());
    float largest = 0, zero = 0;  // what is not finite makes NaN of zero
    for (long i = 0; i < k; ++i) {
      largest = std::max(largest, std::fabs(row[i]));
      zero += row[i] * 0.0f;
    }
    // A scale is a normal number, so that it can be divided by and is one when it is loaded again.
    if (!scaled) scales[column] = largest > 0 ? std::max(largest / kWeightMax, FLT_MIN) : 1.0f;
    if (zero != 0.0f) scales[column] = NAN;  // and of every product
    int32_t total = 0;
    for (long i = 0; i < k && zero == 0.0f; ++i) {
      // More would saturate in vpmaddubsw.
      const long q = std::clamp<long>(std::lrint(row[i] / scales[column]), -kWeightMax, kWeightMax);
      packed[packed_at(column, i, width, kWord)] = static_cast<int8_t>(q);
      total += static_cast<int32_t>(q);
    }
    sums[column] = total;
  }
}

void unpack_i8(const int8_t* packed, const float* scales, long n, long k, float* weight) {
  const long width = i8_width(k);
  for (long column = 0; column < n; ++column) {
    for (long i = 0; i < k; ++i)
      weight[column * k + i] = static_cast<float>(packed[packed_at(column, i, width, kWord)]) * scales[column];
    rotate(weight + column * k, k, weight + column * k);
  }
}

constexpr int kRowsI8 = kLanes == 8 ? 4 : kRows;  // leaves registers for the products

void linear_i8(int threads, const float* x, long ldx, long m, long k, const int8_t* packed, const float* scales,
               const int32_t* sums, long n, const float* bias, bool gated, float* out, long ldo) {
  const long width = i8_width(k), steps = width / kStepBytes;
  // x in rows of `width`, or as AMX's registers.
  const RowStorage tiled(kAmx ? m : 0, steps, 1);
  std::unique_ptr<uint8_t[]> quantized(new uint8_t[kAmx ? 0 : m * width]);
  std::unique_ptr<float[]> row_scales(new float[m]);
  const RowStorage* rows = &tiled;
  uint8_t* q = quantized.get();
  float* rs = row_scales.get();
  parallel_for(threads, ceil_div(m, 16), [=](long task) {
    std::vector<float> rotated(width);  // zeros beyond k, which meet zero weights
    for (long r = task * 16; r < std::min(m, task * 16 + 16); ++r) {
      const float largest = rotate(x + r * ldx, k, rotated.data());
      if constexpr (kAmx) {
        rs[r] = quantize(rotated.data(), width, largest, 127.0f, 0, rows->row(r), kStepBytes, kTileBytes);
      } else {
        rs[r] = quantize(rotated.data(), width, largest, 127.0f, kZero, q + r * width);
      }
    }
  });
  const long block_rows = kAmx ? tiled.block_rows(m) : 24 * kRowsI8;
  const Target to{n, nullptr, gated, out, ldo};  // the bias is added where the sums are scaled
  in_blocks(threads, m, to, block_rows, [=](long row, long end, long first, long last, float* c, long ldc) {
    [[maybe_unused]] const TileShape shape;
    [[maybe_unused]] const long products = ceil_div(end - row, kPairRows);
    for (long p = first; p < last; ++p) {
      const long column = p * kPanel, columns = std::min<long>(kPanel, n - column);
      [[maybe_unused]] const int8_t *panel = packed + p * width * kPanel, *next = panel + width * kPanel;
      const float* shift = bias == nullptr ? nullptr : bias + column;
      float* target = c + (p - first) * kPanel;
      if constexpr (kAmx) {
        for (long r = row; r < end; r += kPairRows)
          product_i8(rows->at(r), std::min(kPairRows, end - r), rs + r, panel, steps, scales + column, shift,
                     target + (r - row) * ldc, ldc, columns,
                     p + 1 < last ? share_of(next, steps, (r - row) / kPairRows, products) : kNothing);
      } else {
        in_tiles<kRowsI8>(row, end, [&](auto some, long r) {
          tile_integers<some.value>(q + r * width, width, rs + r, kZero, panel, width / kWord, scales + column,
                                    sums + column, shift, target + (r - row) * ldc, ldc, false, columns);
        });
      }
    }
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
    for (long r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r)
      gate_by(gate_up + r * ldg, gate_up + r * ldg + width, width, out + r * ldo);
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

// What attention multiplies. Logits, softmax and sums are in fp32 in each.
//
// Fp32: numbers as they are. Rounded: the nearest bf16 numbers, in fp32. Units: the same, for units that multiply them.
// Grid16, Grid8: integers of 16 and of 8 bits, on a grid each row and head (queries, keys, values) or each row and tile
// (softmax's weights); those of 8 bits are rotated first, as what linears multiply is.
enum class Format { kFp32, kRounded, kUnits, kGrid16, kGrid8 };

constexpr long kKeys = 256;  // of a tile: softmax's weights are rounded under the largest logit up to the tile's end
constexpr long kAhead = 4;   // rows that are asked for before the one that is read
constexpr float kLog2E = 1.44269504f;

// For quantize_by, of each key of a tile: evenly spread in every stretch of keys.
struct Offsets {
  constexpr Offsets() : of() {
    for (int i = 0; i < kKeys; ++i) of[i] = (static_cast<float>(i * 159 % kKeys) + 0.5f) / kKeys;
  }
  float of[kKeys];
};
constexpr Offsets offsets;

template <Format kFormat>
struct Of {
  static constexpr bool kEight = kFormat == Format::kGrid8, kGrid = kEight || kFormat == Format::kGrid16;
  // Whether AMX multiplies them: rows are filled up to whole registers, inputs to whole steps.
  static constexpr bool kTiled = kAmx && kFormat == Format::kUnits;
  using Integer = std::conditional_t<kEight, uint8_t, int16_t>;
  using Number = std::conditional_t<kGrid, Integer, std::conditional_t<kFormat == Format::kUnits, uint16_t, float>>;
  static constexpr long kInputs = sizeof(Number) == 4 ? 1 : kWord / sizeof(Number);  // that stand together
  static constexpr long kStep = kTiled ? kStepWords * kInputs : kInputs;             // what widths are multiples of
  static constexpr long kQueryRows = kTiled ? 128 : 96;  // query rows of a task, the group's heads together
  static constexpr long kBlock = kTiled ? kPairRows : kRows;  // of them, multiplied with the keys that one of them sees
  // Steps of grids to either side of zero, but for softmax's weights, none of which is below it.
  static constexpr float kWeightGrid = kEight ? (kZero == 0 ? 127.0f : 255.0f) : 2895.0f,
                         kValueGrid = kEight ? 127.0f : 2895.0f;
  // The largest that is still finite as one of them: halfway to the number after bf16's largest it is an infinity.
  static constexpr float kLargest = kFormat == Format::kFp32 ? 0x1.fffffep127f : 0x1.fefffep127f;
  static_assert(double(kKeys) * kWeightGrid * kValueGrid < 2147483648.0, "a tile's sum must fit");

  // The same of queries and keys, whose sum is over a head's width.
  static float logit_grid(long dim) {
    const float most = std::floor(std::sqrt(2147483647.0f / static_cast<float>(dim + dim % 2)) - 1.0f);
    return kEight ? 127.0f : std::min(8191.0f, most);
  }

  static constexpr long padded_rows(long rows) { return kTiled ? ceil_div(rows, kTileRows) * kTileRows : rows; }

  // n numbers of a row, zeros up to `width`; returns what they are to be multiplied with. Integers are around `zero`.
  // scratch: of n numbers.
  static float encode(const float* x, long n, long width, float factor, float grid, int zero, float* scratch,
                      Number* out) {
    std::fill(out + n, out + width, Number{0});
    if constexpr (kEight) {
      const float largest = rotate(x, n, scratch);
      return quantize(scratch, n, largest, grid, zero, out) * factor;
    } else if constexpr (kGrid) {
      return quantize(x, n, magnitude(x, n), grid, zero, out) * factor;
    } else {
      long i = 0;
      for (; i + kLanes <= n; i += kLanes) put(out + i, load(x + i) * factor);
      if (i < n) {
        Number last[kLanes];
        put(last, load_some(x, i, n) * factor);
        std::copy_n(last, n - i, out + i);
      }
      return 1.0f;
    }
  }

  // Numbers that are on no grid.
  static void put(Number* out, Vec v) {
    if constexpr (kFormat == Format::kUnits) {
      store_bf16(out, v);
    } else {
      store(out, kFormat == Format::kRounded ? rounded_to_bf16(v) : v);
    }
  }

  // A panel's numbers of as many rows as stand together.
  static void put_together(const Number* rows, long ld, Number* out) {
    for (long i = 0; i < kPanel; ++i)
      if constexpr (kInputs == 1) {
        out[i] = rows[i];
      } else {
        std::conditional_t<kWord == 8, uint64_t, uint32_t> word = 0;
        for (long l = 0; l < kInputs; ++l)
          word |= decltype(word){static_cast<std::make_unsigned_t<Number>>(rows[l * ld + i])}
                  << (8 * sizeof(Number) * l);
        std::memcpy(out + i * kInputs, &word, sizeof word);
      }
  }

  // c[m, kPanel] (+)= a[m, inputs] @ panel; scales and sums as tile_integers takes them
  static void multiply(const Number* a, long lda, long m, const Number* panel, long inputs, const float* row_scales,
                       int zero, const float* scales, const int32_t* sums, float* c, long ldc, bool accumulate) {
    if constexpr (kTiled) {
      const long row = lda * static_cast<long>(sizeof(Number));
      for (long r = 0; r < m; r += kPairRows) {
        const auto product = m - r > kTileRows ? multiply_tiles<false, 2, 1> : multiply_tiles<false, 1, 1>;
        product({reinterpret_cast<const char*>(a + r * lda), row, kTileRows * row, kStepBytes, 0},
                reinterpret_cast<const char*>(panel), ceil_div(inputs, kStep), c + r * ldc,
                ldc * static_cast<long>(sizeof(float)), accumulate, kNothing);
      }
      return;
    }
    in_tiles<kRows>(0, m, [&](auto rows, long r) {
      const Number* first = a + r * lda;
      float* target = c + r * ldc;
      if constexpr (kGrid) {
        tile_integers<rows.value>(first, lda, row_scales + r, zero, panel, ceil_div(inputs, kInputs), scales, sums,
                                  nullptr, target, ldc, accumulate, kPanel);
      } else if constexpr (kFormat == Format::kUnits) {
        tile_bf16<rows.value, false>(first, lda, panel, ceil_div(inputs, kInputs), target, ldc, accumulate, kPanel);
      } else {
        tile_f32<rows.value, false>(first, lda, panel, inputs, target, ldc, accumulate, kPanel);
      }
    });
  }
};

template <Format kFormat>
void attention_in(int threads, const float* q, long ldq, long rows, const int64_t* positions, const float* k, long ldk,
                  const float* v, long ldv, long length, const float* prefix_k, const float* prefix_v, long prefix,
                  long heads, long kv_heads, long dim, long window, float scale, float* out, long ldo) {
  using F = Of<kFormat>;
  using Number = typename F::Number;
  constexpr long inputs = F::kInputs;
  // Softmax's weights stay where the logits were, if they are fp32 numbers.
  constexpr bool in_place = std::is_same_v<Number, float>;
  constexpr int zero = F::kEight ? kZero : 0;  // of queries
  // Keys are tiled from the beginning of what the sequence continues: its rows are bitwise what they would be in one.
  length += prefix;
  auto key_row = [=](long key) { return key < prefix ? prefix_k + key * ldk : k + (key - prefix) * ldk; };
  auto value_row = [=](long key) { return key < prefix ? prefix_v + key * ldv : v + (key - prefix) * ldv; };
  const long group = heads / kv_heads, tile_rows = std::max<long>(1, F::kQueryRows / group),
             tiles = ceil_div(length, kKeys), width = ceil_div(dim, F::kStep) * F::kStep,
             value_panels = ceil_div(dim, kPanel), value_columns = value_panels * kPanel, key_size = kKeys * width,
             value_size = kKeys * value_columns;
  const float logits = F::logit_grid(dim);

  // A tile's keys transposed into panels, [panel][input][kPanel]; values as [panel][key][kPanel]; `inputs` together.
  // Beyond the sequence's end are zeros. scales: of each key, if it is on a grid; sums: of its integers. A value that is
  // not finite is zeros with a scale of NaN: it must show in the rows that see it, and 0 * NaN in none.
  auto packed_keys = [=](long tile) {  // as far as products read
    return std::min(kKeys, ceil_div(length - tile * kKeys, kPanel) * kPanel);
  };
  auto pack_keys = [=](long head, long tile, Number* target, float* scales, [[maybe_unused]] int32_t* sums) {
    std::vector<Number> row(width);
    std::vector<float> scratch(width);
    for (long j = 0; j < packed_keys(tile); ++j) {
      const long key = tile * kKeys + j, there = key < length ? dim : 0;
      if (key + kAhead < length) prefetch(key_row(key + kAhead) + head * dim, dim);
      scales[j] = F::encode(there ? key_row(key) + head * dim : nullptr, there, width, 1.0f, logits, 0,
                            scratch.data(), row.data());
      if constexpr (F::kEight)
        sums[j] = std::accumulate(row.begin(), row.end(), 0, [](int a, int b) { return a + static_cast<int8_t>(b); });
      Number* column = target + j / kPanel * kPanel * width + j % kPanel * inputs;
      for (long i = 0; i < width; i += inputs) std::copy_n(&row[i], inputs, column + i * kPanel);
    }
  };
  auto pack_values = [=](long head, long tile, Number* target, float* scales) {
    std::vector<Number> row(inputs * value_columns);
    std::vector<float> scratch(value_columns);
    bool finite = true;
    for (long j = 0; j < packed_keys(tile); j += inputs) {
      for (long i = 0; i < inputs; ++i) {
        const long key = tile * kKeys + j + i, there = key < length ? dim : 0;
        const float* value = there ? value_row(key) + head * dim : nullptr;
        if (key + kAhead < length) prefetch(value_row(key + kAhead) + head * dim, dim);
        Number* to = &row[i * value_columns];
        scales[j + i] = F::encode(value, there, value_columns, 1.0f, F::kValueGrid, 0, scratch.data(), to);
        if (!F::kGrid && !(magnitude(value, there) <= F::kLargest)) {
          std::fill(to, to + value_columns, Number{0});
          scales[j + i] = NAN;
        }
        finite = finite && !std::isnan(scales[j + i]);
      }
      for (long panel = 0; panel < value_panels; ++panel)
        F::put_together(&row[panel * kPanel], value_columns, target + (panel * kKeys + j) * kPanel);
    }
    return finite;
  };
  // Packed once for all row tiles: rows of a long sequence lie pages apart and share a few cache sets. In fp32 half of
  // the heads are packed at a time, so that all formats take the room of the keys in fp32.
  const long heads_at_once = ceil_div(kv_heads, in_place ? 2 : 1), places = heads_at_once * tiles;
  std::unique_ptr<Number[]> packed(new Number[places * (key_size + value_size)]);
  std::unique_ptr<float[]> steps(new float[places * kKeys * 2]);
  std::unique_ptr<int32_t[]> sums_of_keys(new int32_t[F::kEight ? places * kKeys : 0]);
  std::unique_ptr<bool[]> finite(new bool[places]);
  Number *all_keys = packed.get(), *all_values = all_keys + places * key_size;
  float *key_steps = steps.get(), *value_steps = key_steps + places * kKeys;
  int32_t* key_sums = sums_of_keys.get();
  bool* finite_values = finite.get();
  const long row_tiles = ceil_div(rows, tile_rows);
  for (long first_head = 0; first_head < kv_heads; first_head += heads_at_once) {
    const long some_heads = std::min(heads_at_once, kv_heads - first_head);
    parallel_for(threads, some_heads * tiles, [=](long place) {
      const long head = first_head + place / tiles, tile = place % tiles;
      pack_keys(head, tile, all_keys + place * key_size, key_steps + place * kKeys, key_sums + place * kKeys);
      finite_values[place] = pack_values(head, tile, all_values + place * value_size, value_steps + place * kKeys);
    });
    parallel_for(threads, row_tiles * some_heads, [=](long task) {
      // A head after the other: its keys and values stay in the cache. Heaviest first: the last rows see the most keys.
      const long row_tile = row_tiles - 1 - task % row_tiles, head = first_head + task / row_tiles;
      const long first = row_tile * tile_rows, count = std::min(tile_rows, rows - first), m = count * group;
      auto position = [=](long r) { return prefix + (positions == nullptr ? first + r : positions[first + r]); };

      [[maybe_unused]] const std::conditional_t<F::kTiled, TileShape, int> shape{};
      const long padded = F::padded_rows(m);
      // What is written before it is read need not be zero.
      const std::unique_ptr<float[]> p(new float[padded * kKeys]);
      const std::unique_ptr<Number[]> own_weights(new Number[in_place ? 0 : padded * kKeys]);
      std::vector<Number> queries(padded * width);
      std::vector<float> result(padded * value_columns), top(m, -INFINITY), totals(m * kLanes), query_steps(m),
          weight_steps(m), scratch(width);
      Number* weights;
      if constexpr (in_place) {
        weights = p.get();
      } else {
        weights = own_weights.get();
      }
      // Keys that a row of a block sees: low[block] .. high[block] - 1.
      const long blocks = ceil_div(m, F::kBlock);
      std::vector<long> low(blocks, length), high(blocks, 0);
      for (long r = 0; r < count; ++r) {
        if (r + kAhead < count) prefetch(q + (first + r + kAhead) * ldq + head * group * dim, group * dim);
        for (long g = 0; g < group; ++g) {
          const long at = r * group + g, block = at / F::kBlock;
          low[block] = std::min<long>(low[block], window > 0 ? std::max<long>(0, position(r) - window + 1) : 0);
          high[block] = std::max<long>(high[block], position(r) + 1);
          query_steps[at] = F::encode(q + (first + r) * ldq + (head * group + g) * dim, dim, width,
                                      F::kGrid ? scale * kLog2E : scale, logits, zero, scratch.data(),
                                      &queries[at * width]);
        }
      }
      const long lowest = *std::min_element(low.begin(), low.end()),
                 highest = *std::max_element(high.begin(), high.end());
      for (long tile = lowest / kKeys; tile * kKeys < highest; ++tile) {
        const long key = tile * kKeys, place = (head - first_head) * tiles + tile;
        auto span_of = [&](long block) { return std::clamp<long>(high[block] - key, 0, kKeys); };
        const float *key_step = key_steps + place * kKeys, *value_step = value_steps + place * kKeys;
        const int32_t* key_sum = F::kEight ? key_sums + place * kKeys : nullptr;
        const Number* values = all_values + place * value_size;
        for (long panel = 0; panel < ceil_div(std::min(kKeys, highest - key), kPanel); ++panel) {
          const long begin = panel * kPanel;
          auto sees = [&](long block) { return span_of(block) > begin && low[block] < key + begin + kPanel; };
          long from = 0, to = blocks;
          while (from < to && !sees(from)) ++from;
          while (from < to && !sees(to - 1)) --to;
          if (from == to) continue;
          const long row = from * F::kBlock;
          F::multiply(&queries[row * width], width, std::min(m, to * F::kBlock) - row,
                      all_keys + place * key_size + begin * width, width, &query_steps[row], zero, key_step + begin,
                      F::kEight ? key_sum + begin : nullptr, &p[row * kKeys + begin], kKeys, false);
        }
        for (long r = 0; r < m; ++r) {
          const long at = position(r / group), span = span_of(r / F::kBlock);
          const long used = ceil_div(span, kPanel) * kPanel;  // what products read of a row
          // Visible keys of this tile: begin .. end - 1.
          const long begin = window > 0 ? std::clamp<long>(at - window + 1 - key, 0, span) : 0,
                     end = std::clamp<long>(at + 1 - key, begin, span);
          float* row = &p[r * kKeys];
          Number* weight = weights + r * kKeys;
          if (begin == end) {
            std::fill(weight, weight + used, Number{0});
            weight_steps[r] = 0.0f;
            continue;
          }
          for (long j = 0; j < begin; ++j) row[j] = -INFINITY;
          for (long j = end; j < used; ++j) row[j] = -INFINITY;
          Vec most = load(row);
          for (long j = kLanes; j < used; j += kLanes) most = larger(load(row + j), most);
          const float next = std::max(top[r], largest(most));
          Vec sums{};
          if constexpr (F::kGrid) {  // logits are in base 2; each weight takes its value's step along
            const float* step = value_step;
            float seen[kKeys];  // a step that is NaN must not show where its value is hidden
            if (begin > 0 || end < used) {
              std::fill(seen, seen + used, 0.0f);
              std::copy(value_step + begin, value_step + end, seen + begin);
              step = seen;
            }
            Vec most_scaled = splat(1e-30f), scaled{};
            for (long j = 0; j < used; j += kLanes) {
              const Vec e = exp2_coarse(load(row + j) - next), x = e * load(step + j);
              sums += e;
              scaled += x;
              most_scaled = larger(x, most_scaled);
              store(row + j, x);
            }
            const float not_finite = sum(scaled) * 0.0f;  // NaN if a weight is
            const float most_of_all = largest(most_scaled) + not_finite;
            if constexpr (F::kEight) {
              weight_steps[r] = quantize_by(offsets.of, row, used, most_of_all, F::kWeightGrid, weight);
            } else {
              weight_steps[r] = quantize(row, used, most_of_all, F::kWeightGrid, 0, weight);
            }
          } else {
            for (long j = 0; j < used; j += kLanes) {
              const Vec x = load(row + j) - next, e = kFormat == Format::kFp32 ? exp(x) : exp2_coarse(x * kLog2E);
              sums += e;
              F::put(weight + j, e);
            }
            if (!finite_values[place])
              for (long j = begin; j < end; ++j) sums += value_step[j] * 0.0f;
          }
          const float change = top[r] - next;
          const float shrink = change == 0.0f ? 1.0f : F::kGrid ? std::exp2(change) : std::exp(change);
          store(&totals[r * kLanes], load(&totals[r * kLanes]) * shrink + sums);
          if (shrink != 1.0f)
            for (long i = 0; i < value_columns; ++i) result[r * value_columns + i] *= shrink;
          top[r] = next;
        }
        for (long panel = 0; panel < value_panels; ++panel)
          for (long block = 0; block < blocks; ++block) {
            const long row = block * F::kBlock, span = span_of(block);
            if (span > 0)
              F::multiply(weights + row * kKeys, kKeys, std::min(m - row, F::kBlock), values + panel * kKeys * kPanel,
                          span, &weight_steps[row], 0, nullptr, nullptr,
                          &result[row * value_columns + panel * kPanel], value_columns, true);
          }
      }
      for (long r = 0; r < m; ++r) {
        float* target = out + (first + r / group) * ldo + (head * group + r % group) * dim;
        const float total = sum(load(&totals[r * kLanes]));
        float* row = &result[r * value_columns];
        if constexpr (F::kEight) rotate(row, dim, row);
        for (long i = 0; i < dim; ++i) target[i] = row[i] / total;
      }
    });
  }
}

void attention(int precision, int threads, const float* q, long ldq, long rows, const int64_t* positions,
               const float* k, long ldk, const float* v, long ldv, long length, const float* prefix_k,
               const float* prefix_v, long prefix, long heads, long kv_heads, long dim, long window, float scale,
               float* out, long ldo) {
  constexpr Format bf16_format = kBf16Units ? Format::kUnits : Format::kRounded,
                   int8_format = kAmx ? bf16_format : kInt8Units ? Format::kGrid8 : Format::kGrid16;
  const auto in = precision == kBf16 ? attention_in<bf16_format>
                  : precision == kInt8 ? attention_in<int8_format> : attention_in<Format::kFp32>;
  in(threads, q, ldq, rows, positions, k, ldk, v, ldv, length, prefix_k, prefix_v, prefix, heads, kv_heads, dim, window,
     scale, out, ldo);
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

}  // namespace

extern const Kernels LASTRERANK_JOIN(kernels_, LASTRERANK_ISA) = {
#define LASTRERANK_STRING_(x) #x
#define LASTRERANK_STRING(x) LASTRERANK_STRING_(x)
    LASTRERANK_STRING(LASTRERANK_ISA),
    kAmx,
    kAmx ? "in bf16" : kInt8Units ? "in 8 bits" : "in 16 bits",
    kPanel,
    packed_f32_size,
    packed_bf16_size,
    packed_i8_size,
    pack_f32,
    unpack_f32,
    pack_bf16,
    unpack_bf16,
    guard<pack_i8>(pack_i8),
    unpack_i8,
    guard<linear_f32>(linear_f32),
    guard<linear_bf16_weight<true>>(linear_bf16_weight<true>),
    guard<linear_bf16_weight<false>>(linear_bf16_weight<false>),
    guard<linear_i8>(linear_i8),
    guard<add_rms_norm>(add_rms_norm),
    guard<swiglu>(swiglu),
    guard<qk_norm_rope>(qk_norm_rope),
    guard<attention>(attention),
};

}  // namespace lastrerank
