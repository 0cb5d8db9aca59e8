// Arm's products of matrices, as plain loops by their published definition, so that the code for processors with them runs
// on one without: as `avx512_stand_ins.h`. Vectors are the compiler's, of 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>

#define __ARM_FEATURE_MATMUL_INT8 1
#define __ARM_FEATURE_BF16_VECTOR_ARITHMETIC 1

typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef float float32x4_t __attribute__((vector_size(16)));
typedef uint16_t bfloat16x8_t __attribute__((vector_size(16)));

// c[2i + j] += the sum of a[8i + l] * b[8j + l]
inline int32x4_t vmmlaq_s32(int32x4_t c, int8x16_t a, int8x16_t b) {
  for (int at = 0; at < 4; ++at)
    for (int l = 0; l < 8; ++l) c[at] += a[at / 2 * 8 + l] * b[at % 2 * 8 + l];
  return c;
}

// c[2i + j] += the sum of a[4i + l] * b[4j + l]
inline float32x4_t vbfmmlaq_f32(float32x4_t c, bfloat16x8_t a, bfloat16x8_t b) {
  auto widened = [](uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int at = 0; at < 4; ++at)
    for (int l = 0; l < 4; ++l) c[at] += widened(a[at / 2 * 4 + l]) * widened(b[at % 2 * 4 + l]);
  return c;
}
