// Products on AMX's tiles: registers of 16 rows by 64 bytes; 32 rows by one packed panel at a time.
//
// A panel is the one of `tiles.h`: words of 32 bits, each of two bf16 numbers or four of 8 bits, side by side for every
// column. Sixteen words of sixteen columns are a register, so a column's words are padded to whole steps of sixteen.
// Included by `kernels.cpp` alone.
#pragma once

#include <memory>
#include <new>

#include "tiles.h"

namespace lastrerank {
namespace {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
constexpr bool kTileUnits = true;
#else
constexpr bool kTileUnits = false;
#endif

constexpr long kStepWords = 16, kStepBytes = 4 * kStepWords, kTileRows = 16, kTileBytes = kTileRows * kStepBytes;
constexpr long kPairRows = 2 * kTileRows;  // what one product takes

// A column's words in a packed panel.
constexpr long padded_words(long words) { return kTileUnits ? ceil_div(words, kStepWords) * kStepWords : words; }

// bf16 numbers that make one of fp32: three times eight bits of significand, each of what the one before left.
constexpr int kWhole = 3;

// n numbers, times a factor, as kParts bf16 numbers each: rounded to nearest, ties to even, then what that left, and so on; three parts
// are the number itself (NaN where it is not finite). Steps of 32 numbers, the last filled up with zeros, are `step`
// bytes apart, parts `part`.
template <int kParts>
inline void split(const float* x, long n, float factor, char* out, long step, long part) {
  constexpr long numbers = 2 * kStepWords;
  for (long i = 0; i < n; i += numbers, out += step) {
    float last[numbers] = {};
    const float* from = x + i;
    if (n - i < numbers) from = static_cast<const float*>(std::memcpy(last, from, (n - i) * sizeof(float)));
    for (long j = 0; j < numbers; j += kLanes) {
      Vec rest = load(from + j) * factor;
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) {
        const Bf16Vec nearest = to_bf16(rest);
        std::memcpy(out + p * part + 2 * j, &nearest, sizeof nearest);
        rest -= widened(nearest);
      }
    }
  }
}

// Where 16 rows begin, and how many bytes lie between rows, the next 16 of them, steps and parts.
struct TileRows {
  const char* data;
  long row, tile, step, part;
};

// Rows for products, as whole registers: of every 16 rows `steps` times `parts` of them. Zeros until written.
struct TiledRows {
  TiledRows(long rows, long steps, long parts)
      : tile(steps * parts * kTileBytes), parts(parts),
        storage(new (std::align_val_t(kStepBytes)) char[ceil_div(rows, kTileRows) * tile]()) {}
  char* row(long r) const { return storage.get() + r / kTileRows * tile + r % kTileRows * kStepBytes; }
  TileRows at(long r) const {
    return {storage.get() + r / kTileRows * tile, kStepBytes, tile, parts * kTileBytes, kTileBytes};
  }
  // Rows of a block, of which there are `rows` in all: at most about three quarters of a megabyte, so that it stays in L2
  // over the panels that pass by.
  long block_rows(long rows) const {
    const long most = std::max(1l, (3l << 18) / (2 * tile)) * kPairRows, blocks = std::max(1l, ceil_div(rows, most));
    return ceil_div(ceil_div(rows, blocks), kPairRows) * kPairRows;
  }

  struct Free {
    void operator()(char* p) const { operator delete[](p, std::align_val_t(kStepBytes)); }
  };
  long tile, parts;
  std::unique_ptr<char[], Free> storage;
};

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

// The registers of this thread, all of them whole, for as long as this lives; others' code shapes them as it likes.
struct TileUnits {
  TileUnits() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = kStepBytes;
      shape.rows[i] = kTileRows;
    }
    _tile_loadconfig(&shape);
  }
  ~TileUnits() { _tile_release(); }
};

// c[16 kTiles, kPanel] (+)= a @ panel, in fp32 of bf16 numbers or in integers of 8 bits (a unsigned, the panel signed).
// Registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 columns.
template <bool kIntegers, int kTiles, int kParts>
LASTRERANK_TILE void tile_units(TileRows a, const char* panel, long steps, void* c, long ldc, bool accumulate) {
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
  for (long s = 0; s < steps; ++s) {
    const char *rows = a.data + s * a.step, *columns = panel + s * 2 * kTileBytes;
    _tile_loadd(6, columns, 2 * kStepBytes);
    _tile_loadd(7, columns + kStepBytes, 2 * kStepBytes);
    for (int i = 0; i < kParts; ++i) {
      _tile_loadd(4, rows + i * a.part, a.row);
      if constexpr (kTiles == 2) _tile_loadd(5, rows + i * a.part + a.tile, a.row);
      if constexpr (kIntegers) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if constexpr (kTiles == 2) {
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTiles == 2) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
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

#else

struct TileUnits {};

template <bool, int, int>
void tile_units(TileRows, const char*, long, void*, long, bool) {}

#endif

// c[rows, columns] = a @ panel, for rows up to kPairRows.
template <int kParts>
inline void product_bf16(TileRows a, long rows, const void* panel, long steps, float* c, long ldc, long columns) {
  const auto product = rows > kTileRows ? tile_units<false, 2, kParts> : tile_units<false, 1, kParts>;
  const char* packed = static_cast<const char*>(panel);
  if (columns == kPanel && rows % kTileRows == 0) {
    product(a, packed, steps, c, ldc * sizeof(float), false);
    return;
  }
  float whole[kPairRows][kPanel];
  product(a, packed, steps, whole, sizeof whole[0], false);
  for (long r = 0; r < rows; ++r) std::memcpy(c + r * ldc, whole[r], columns * sizeof(float));
}

// The same of integers around kZero, as `tile_i8`.
inline void product_i8(TileRows a, long rows, const float* row_scales, const void* panel, long steps,
                       const float* scales, const int32_t* sums, const float* bias, float* c, long ldc, long columns) {
  int32_t whole[kPairRows][kPanel];
  const auto product = rows > kTileRows ? tile_units<true, 2, 1> : tile_units<true, 1, 1>;
  product(a, static_cast<const char*>(panel), steps, whole, sizeof whole[0], false);
  float own_scales[kPanel] = {}, shift[kPanel] = {};
  int32_t zeros[kPanel] = {};
  for (long j = 0; j < columns; ++j) {
    own_scales[j] = scales[j];
    zeros[j] = kZero * sums[j];
    if (bias != nullptr) shift[j] = bias[j];
  }
  for (long r = 0; r < rows; ++r) {
    float row[kPanel];
    float* target = columns == kPanel ? c + r * ldc : row;
    for (long j = 0; j < kPanel; j += kLanes) {
      const IVec value = bits<IVec>(load_words(whole[r] + j)) - bits<IVec>(load_words(zeros + j));
      store(target + j, __builtin_convertvector(value, Vec) * (load(own_scales + j) * row_scales[r]) + load(shift + j));
    }
    if (target == row) std::memcpy(c + r * ldc, row, columns * sizeof(float));
  }
}

}  // namespace
}  // namespace lastrerank
