// Products on AMX's tiles: registers of 16 rows by 64 bytes; 32 rows by one packed panel at a time.
//
// A panel is the one of `tiles.h`: words of 32 bits, each of two bf16 numbers or four of 8 bits, side by side for every
// column. Sixteen words of sixteen columns are a register, so a column's words are padded to whole steps of sixteen.
// Included by `kernels.cpp` alone.
#pragma once

#include <memory>

#include "tiles.h"

namespace lastrerank {
namespace {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif

constexpr long kStepWords = 16, kStepBytes = 4 * kStepWords, kTileRows = 16, kTileBytes = kTileRows * kStepBytes;
constexpr long kPairRows = 2 * kTileRows;  // what one product takes

// Inputs of a column in a packed panel, `bytes` each: whole words, on AMX whole steps.
constexpr long padded(long inputs, long bytes) {
  const long together = (kAmx ? kStepBytes : kWord) / bytes;
  return ceil_div(inputs, together) * together;
}

// bf16 numbers that make one of fp32: three times eight bits of significand, each of what the one before left.
constexpr int kPartsOfFp32 = 3;

// n numbers as kParts bf16 numbers each, in steps of registers: rounded to nearest, ties to even, then what that left,
// and so on, in the registers that follow. Three parts are the number itself, from 2^-110 (below, bits go) to 3.39e38
// (what rounds to an infinity and what is one becomes NaN in a product).
template <int kParts>
inline void split(const float* x, long n, char* row) {
  constexpr long numbers = 2 * kStepWords;
  for (long i = 0; i < n; i += numbers, row += kParts * kTileBytes) {
    float last[numbers] = {};
    const float* from = x + i;
    if (n - i < numbers) from = static_cast<const float*>(std::memcpy(last, from, (n - i) * sizeof(float)));
    for (long j = 0; j < numbers; j += kLanes) {
      Vec rest = load(from + j);
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) {
        const Bf16Vec nearest = to_bf16(rest);
        std::memcpy(row + p * kTileBytes + 2 * j, &nearest, sizeof nearest);
        rest -= widened(nearest);
      }
    }
  }
}

// Rows as a product reads them: where 16 of them begin, and the bytes between rows, to the next 16, to a step's next
// register and to the next part.
struct RowView {
  const char* data;
  long row, next, step, part;
};

// Rows as whole registers, of every 16 rows `steps` times `parts`; rows that fill up the last 16 are zeros.
struct RowStorage {
  RowStorage(long rows, long steps, long parts)
      : next(steps * parts * kTileBytes), step(parts * kTileBytes),
        storage(new char[ceil_div(rows, kTileRows) * next + kStepBytes]) {
    char* start = storage.get();
    first = start + (-reinterpret_cast<uintptr_t>(start) & (kStepBytes - 1));
    if (rows % kTileRows != 0) std::memset(first + rows / kTileRows * next, 0, next);
  }
  char* row(long r) const { return first + r / kTileRows * next + r % kTileRows * kStepBytes; }
  RowView at(long r) const { return {first + r / kTileRows * next, kStepBytes, next, step, kTileBytes}; }
  // Rows of a block, of which there are `rows` in all: at most 640 KiB or so, which stay in L2 beside the panels that pass
  // by and the sums that leave; but two products' at least, or panels would come from memory too often.
  long block_rows(long rows) const {
    const long most = std::max(2l, (5l << 17) / (2 * next)) * kPairRows, all = std::max(1l, rows);
    return ceil_div(ceil_div(all, ceil_div(all, most)), kPairRows) * kPairRows;
  }

  long next, step;
  std::unique_ptr<char[]> storage;
  char* first;
};

// What a product fetches into L2 meanwhile, that many lines of the cache a step: weights come from memory, too late for a
// product that waits for them.
struct Fetch {
  const char* from;
  long lines;
};
constexpr Fetch kNothing = {nullptr, 0};

// Of `products` that share the fetching of the next panel, of `steps`, what number `index` does.
inline Fetch share_of(const void* next, long steps, long index, long products) {
  const long lines = ceil_div(2 * kTileBytes / kStepBytes, products);
  return {static_cast<const char*>(next) + index * steps * lines * kStepBytes, lines};
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

// All registers whole. A constant: what is computed at load would be computed on processors without AMX, too.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileConfiguration() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kStepBytes;
      rows[i] = kTileRows;
    }
  }
};
constexpr TileConfiguration kWholeTiles;

// This thread's registers as the products here want them, for as long as it lives: others' code has them otherwise.
struct TileShape {
  TileShape() { _tile_loadconfig(&kWholeTiles); }
  ~TileShape() { _tile_release(); }
};

// Registers have to be literals.
#define LASTRERANK_MULTIPLY(sums, rows, columns) \
  if constexpr (kIntegers) { \
    _tile_dpbssd(sums, rows, columns); \
  } else { \
    _tile_dpbf16ps(sums, rows, columns); \
  }

// Integers pass by a panel that stays in L1 for them all: they are loaded as what won't be needed again.
#define LASTRERANK_LOAD_ROWS(number, rows, stride) \
  if constexpr (kIntegers) { \
    _tile_stream_loadd(number, rows, stride); \
  } else { \
    _tile_loadd(number, rows, stride); \
  }

// c[16 kTiles, kPanel] (+)= a @ panel, in fp32 of bf16 numbers or in integers of 8 bits, signed.
// Registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 columns, each loaded right before it is first multiplied. Structures by
// reference: one by value, read in one piece, would wait until the sums of the product before are in the cache.
template <bool kIntegers, int kTiles, int kParts>
LASTRERANK_TILE void multiply_tiles(const RowView& a, const char* panel, long steps, void* c, long ldc, bool accumulate,
                                    const Fetch& fetch) {
  char *upper = static_cast<char*>(c), *lower = upper + kTileRows * ldc;
  if (accumulate) {
    _tile_loadd(0, upper, ldc);
    _tile_loadd(1, upper + kStepBytes, ldc);
    if constexpr (kTiles == 2) {
      _tile_loadd(2, lower, ldc);
      _tile_loadd(3, lower + kStepBytes, ldc);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* ahead = fetch.from;
  const long lines = fetch.lines;
  for (long s = 0; s < steps; ++s) {
    const char *rows = a.data + s * a.step, *columns = panel + s * 2 * kTileBytes;
    for (long i = 0; i < lines; ++i, ahead += kStepBytes) __builtin_prefetch(ahead, 0, 2);
    for (int i = 0; i < kParts; ++i, rows += a.part) {
      LASTRERANK_LOAD_ROWS(4, rows, a.row)
      if (i == 0) _tile_loadd(6, columns, 2 * kStepBytes);
      LASTRERANK_MULTIPLY(0, 4, 6)
      if (i == 0) _tile_loadd(7, columns + kStepBytes, 2 * kStepBytes);
      LASTRERANK_MULTIPLY(1, 4, 7)
      if constexpr (kTiles == 2) {
        LASTRERANK_LOAD_ROWS(5, rows + a.next, a.row)
        LASTRERANK_MULTIPLY(2, 5, 6)
        LASTRERANK_MULTIPLY(3, 5, 7)
      }
    }
  }
  _tile_stored(0, upper, ldc);
  _tile_stored(1, upper + kStepBytes, ldc);
  if constexpr (kTiles == 2) {
    _tile_stored(2, lower, ldc);
    _tile_stored(3, lower + kStepBytes, ldc);
  }
}

#undef LASTRERANK_MULTIPLY
#undef LASTRERANK_LOAD_ROWS

#else

struct TileShape {};

template <bool, int, int>
void multiply_tiles(const RowView&, const char*, long, void*, long, bool, const Fetch&) {}

#endif

// c[rows, columns] = a @ panel, for rows up to kPairRows.
template <int kParts>
inline void product_bf16(const RowView& a, long rows, const void* panel, long steps, float* c, long ldc, long columns,
                         const Fetch& fetch) {
  const auto product = rows > kTileRows ? multiply_tiles<false, 2, kParts> : multiply_tiles<false, 1, kParts>;
  const char* packed = static_cast<const char*>(panel);
  if (columns == kPanel && rows % kTileRows == 0) {
    product(a, packed, steps, c, ldc * sizeof(float), false, fetch);
    return;
  }
  float whole[kPairRows][kPanel];
  product(a, packed, steps, whole, sizeof whole[0], false, fetch);
  for (long r = 0; r < rows; ++r) std::memcpy(c + r * ldc, whole[r], columns * sizeof(float));
}

// The same of integers of 8 bits around 0, scaled as in `tile_integers`.
inline void product_i8(const RowView& a, long rows, const float* row_scales, const void* panel, long steps,
                       const float* scales, const float* bias, float* c, long ldc, long columns, const Fetch& fetch) {
  int32_t whole[kPairRows][kPanel];
  const auto product = rows > kTileRows ? multiply_tiles<true, 2, 1> : multiply_tiles<true, 1, 1>;
  product(a, static_cast<const char*>(panel), steps, whole, sizeof whole[0], false, fetch);
  Vec scale[2], shift[2];
  for (int half = 0; half < 2; ++half) {
    scale[half] = load_some(scales, half * kLanes, columns);
    shift[half] = bias == nullptr ? Vec{} : load_some(bias, half * kLanes, columns);
  }
  for (long r = 0; r < rows; ++r) {
    float row[kPanel];
    float* target = columns == kPanel ? c + r * ldc : row;
    for (int half = 0; half < 2; ++half) {
      const IVec value = bits<IVec>(load_words(whole[r] + half * kLanes));
      store(target + half * kLanes, __builtin_convertvector(value, Vec) * (scale[half] * row_scales[r]) + shift[half]);
    }
    if (target == row) std::memcpy(c + r * ldc, row, columns * sizeof(float));
  }
}

}  // namespace
}  // namespace lastrerank
