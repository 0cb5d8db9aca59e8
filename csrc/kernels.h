// The kernels of one instruction set, as a table; `kernels.cpp` is compiled once for each (see CMakeLists.txt).
//
// All matrices are row-major with a row stride in elements ("ld"). Every output element is computed in an order that
// depends on the operation's inner sizes alone, so a row's result is bitwise the same whatever rows stand beside it.
#pragma once

#include <cstdint>

namespace lastrerank {

// As they are; rounded to bf16; integers on a grid a row and head, softmax's weights on one a row and tile of keys.
enum Precision : int { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

// Nothing here throws. What returns an int returns 0, or 1 (no memory), 2 (no thread) or 3 (anything else), and has then
// written some of its output. Shapes are not checked: `lastrerank/ops/shapes.py` does that before a pointer is taken.
struct Kernels {
  const char* name;
  // Whether linear_widened is faster than linear_f32: on AMX, where bf16 numbers have units of their own.
  bool widened_is_faster;
  // What attention multiplies in kInt8: bf16 numbers on AMX, integers of 8 bits on other processors with units for them,
  // elsewhere of 16, as fast there. "in bf16", "in 8 bits", "in 16 bits".
  const char* int8_attention;
  // Columns of a packed panel.
  int panel;

  // Elements of storage of a packed [n, k] weight.
  long (*packed_f32_size)(long n, long k);
  long (*packed_bf16_size)(long n, long k);
  long (*packed_i8_size)(long n, long k);
  // Pack a weight [n, k] from fp32 (or bf16) rows: columns in panels, zero-padded.
  void (*pack_f32)(const void* weight, bool bf16, long n, long k, float* packed);
  void (*unpack_f32)(const float* packed, long n, long k, float* weight);
  // The same in bf16; what is no bf16 number is rounded to nearest, ties to even.
  void (*pack_bf16)(const void* weight, bool bf16, long n, long k, uint16_t* packed);
  void (*unpack_bf16)(const uint16_t* packed, long n, long k, float* weight);
  // Rotate (`rotate` in vectors.h) and quantise to 7 bits a weight, symmetric, one scale an output, found here unless
  // `scaled`; sums: of each output's quantised weights.
  int (*pack_i8)(const void* weight, bool bf16, long n, long k, bool scaled, int8_t* packed, float* scales,
                 int32_t* sums);

  // The quantised weight [n, k] in fp32, turned back.
  void (*unpack_i8)(const int8_t* packed, const float* scales, long n, long k, float* weight);

  // out[m, n] = x[m, k] @ weight.T (+ bias[n] unless null). gated: the first half of the n outputs gate the second,
  // out[m, n / 2] = silu(gate) * up, as `swiglu` of the product; n is a multiple of two panels and bias null then.
  int (*linear_f32)(int threads, const float* x, long ldx, long m, long k, const float* packed, long n,
                    const float* bias, bool gated, float* out, long ldo);
  // The same with x rounded to bf16: exact products, sums in fp32.
  int (*linear_bf16)(int threads, const float* x, long ldx, long m, long k, const uint16_t* packed, long n,
                     const float* bias, bool gated, float* out, long ldo);
  // The same with x as it is, in fp32; on AMX as three bf16 numbers each (`split` in amx.h says within which range).
  int (*linear_widened)(int threads, const float* x, long ldx, long m, long k, const uint16_t* packed, long n,
                        const float* bias, bool gated, float* out, long ldo);
  // The same with x rotated and quantised on the fly, 8 bits, symmetric, one scale a row.
  int (*linear_i8)(int threads, const float* x, long ldx, long m, long k, const int8_t* packed, const float* scales,
                   const int32_t* sums, long n, const float* bias, bool gated, float* out, long ldo);

  // residual += x (unless x is null), out = residual / rms(residual) * weight
  int (*add_rms_norm)(int threads, float* residual, long ldr, const float* x, long ldx, const float* weight, float eps,
                      long rows, long width, float* out, long ldo);
  // out[rows, width] = silu(gate) * up, gate_up [rows, 2 width]
  int (*swiglu)(int threads, const float* gate_up, long ldg, long rows, long width, float* out, long ldo);
  // In place on the first heads + kv_heads heads of each row; null weights skip the norm; cos, sin [positions, dim / 2].
  int (*qk_norm_rope)(int threads, float* qkv, long ld, long rows, long heads, long kv_heads, long dim,
                      const float* q_weight, const float* k_weight, const float* cos, const float* sin,
                      const int64_t* positions, float eps);
  // Causal grouped-query attention of one sequence that continues another one's first `prefix` rows (0: none): keys
  // 0 .. prefix - 1 are the rows at prefix_k and prefix_v, the others its own `length` at k and v. q rows are its own at
  // `positions`, counted from its first (null: 0, 1, 2, ...). window <= 0: none. Head h of q at q + h * dim, of k and v
  // likewise. out may be q. precision: what queries, keys, values and softmax's weights are before they are multiplied;
  // logits, softmax and sums are in fp32.
  int (*attention)(int precision, int threads, const float* q, long ldq, long rows, const int64_t* positions,
                   const float* k, long ldk, const float* v, long ldv, long length, const float* prefix_k,
                   const float* prefix_v, long prefix, long heads, long kv_heads, long dim, long window, float scale,
                   float* out, long ldo);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;
extern const Kernels kernels_dotprod;
extern const Kernels kernels_armv86;

}  // namespace lastrerank
