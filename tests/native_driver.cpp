// Every CPU kernel on odd shapes in exactly sized heap buffers, against literal loops, from several threads at once and
// in a forked child. Built by test_native.py with the address, undefined-behaviour and thread sanitizers.

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using lastrerank::Kernels;
extern "C" const Kernels* lastrerank_kernels(int i);

namespace {

int failures = 0;

void expect(bool ok, const char* what, const char* isa) {
  if (!ok) {
    std::fprintf(stderr, "%s: %s is wrong\n", isa, what);
    __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  }
}

// Exactly n elements on the heap at an odd address multiple of 4, so that overruns and alignment faults show.
struct Buffer {
  explicit Buffer(long n) : storage(new float[n + 1]), data(storage.get() + 1), size(n) {}
  std::unique_ptr<float[]> storage;
  float* data;
  long size;
};

Buffer random_buffer(std::mt19937& rng, long n) {
  Buffer b(n);
  std::normal_distribution<float> normal;
  for (long i = 0; i < n; ++i) b.data[i] = normal(rng);
  return b;
}

// The nearest bf16 number.
float rounded(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Blocks of a row times the Walsh-Hadamard matrix of their size.
void rotate(std::vector<double>& row) {
  const long n = row.size(), block = std::min<long>(64, n & -n);
  const std::vector<double> before = row;
  for (long i = 0; i < n; ++i) {
    row[i] = 0;
    for (long j = 0; j < block; ++j)
      row[i] += before[i / block * block + j] * (__builtin_popcountl(i % block & j) % 2 ? -1 : 1) / std::sqrt(block);
  }
}

// What attention multiplies of n numbers: as they are, rounded to bf16, or on a grid of 8 bits after rotation, turned back.
std::vector<double> multiplied(const float* x, long n, double factor, const std::string& how) {
  std::vector<double> row(n);
  for (long i = 0; i < n; ++i) row[i] = how == "in bf16" ? rounded(x[i] * float(factor)) : x[i] * factor;
  if (how != "in 8 bits") return row;
  rotate(row);
  double largest = 0;
  for (double y : row) largest = std::max(largest, std::fabs(y));
  for (double& y : row) y = std::round(y / largest * 127) * largest / 127;
  rotate(row);
  return row;
}

bool close(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance * (1 + std::fabs(b)); }

void linears(const Kernels& k, std::mt19937& rng, int threads) {
  const long m = 1 + rng() % 150, n = 1 + rng() % 90, pad = rng() % 5;
  const long d = rng() % 2 ? 1 + rng() % 600 : 64 * (1 + rng() % 9);  // blocks of 64 are rotated by vectors
  Buffer x = random_buffer(rng, m * (d + pad)), w = random_buffer(rng, n * d), bias = random_buffer(rng, n),
         out(m * (n + pad)), back(n * d);
  std::vector<float> packed(k.packed_f32_size(n, d));
  k.pack_f32(w.data, false, n, d, packed.data());
  k.unpack_f32(packed.data(), n, d, back.data);
  bool same = true, right = true, right_i8 = true;
  for (long i = 0; i < n * d; ++i) same &= back.data[i] == w.data[i];
  k.linear_f32(threads, x.data, d + pad, m, d, packed.data(), n, bias.data, false, out.data,
               n + pad);
  std::vector<double> truth(m * n);
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) {
      double s = bias.data[j];
      for (long l = 0; l < d; ++l) s += double(x.data[i * (d + pad) + l]) * w.data[j * d + l];
      truth[i * n + j] = s;
      right &= close(out.data[i * (n + pad) + j], s, 1e-4);
    }
  std::vector<uint16_t> packed16(k.packed_bf16_size(n, d));
  k.pack_bf16(w.data, false, n, d, packed16.data());
  k.unpack_bf16(packed16.data(), n, d, back.data);
  k.linear_bf16(threads, x.data, d + pad, m, d, packed16.data(), n, bias.data, false, out.data, n + pad);
  Buffer whole(m * n);
  k.linear_widened(threads, x.data, d + pad, m, d, packed16.data(), n, bias.data, false, whole.data, n);
  bool same_bf16 = true, right_bf16 = true, right_widened = true;
  for (long i = 0; i < n * d; ++i) same_bf16 &= back.data[i] == rounded(w.data[i]);
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) {
      double s = bias.data[j], t = s;
      for (long l = 0; l < d; ++l) {
        s += double(rounded(x.data[i * (d + pad) + l])) * rounded(w.data[j * d + l]);
        t += double(x.data[i * (d + pad) + l]) * rounded(w.data[j * d + l]);
      }
      right_bf16 &= close(out.data[i * (n + pad) + j], s, 1e-4);
      right_widened &= close(whole.data[i * n + j], t, 1e-4);
    }
  expect(same_bf16, "unpack_bf16", k.name);
  expect(right_bf16, "linear_bf16", k.name);
  expect(right_widened, "linear_widened", k.name);
  std::vector<int8_t> packed8(k.packed_i8_size(n, d));
  std::vector<float> scales(n);
  std::vector<int32_t> sums(n);
  expect(k.pack_i8(w.data, false, n, d, false, packed8.data(), scales.data(), sums.data()) == 0, "pack_i8", k.name);
  k.linear_i8(threads, x.data, d + pad, m, d, packed8.data(), scales.data(), sums.data(), n, bias.data, false, out.data,
              n + pad);
  k.unpack_i8(packed8.data(), scales.data(), n, d, back.data);
  for (long i = 0; i < n; ++i) {  // half a step each before it is turned, in whatever direction after it
    double off = 0;
    for (long l = 0; l < d; ++l) off += std::pow(double(back.data[i * d + l]) - w.data[i * d + l], 2);
    right_i8 &= std::sqrt(off) <= 0.501 * scales[i] * std::sqrt(double(d));
  }
  for (long i = 0; i < m * n; ++i)
    right_i8 &= std::fabs(out.data[i / n * (n + pad) + i % n] - truth[i]) < 0.12 * std::sqrt(double(d)) + 0.1;
  expect(same, "unpack_f32", k.name);
  expect(right, "linear_f32", k.name);
  expect(right_i8, "linear_i8", k.name);
}

// Products whose first half are gates of the second are bitwise swiglu of the product.
void gated(const Kernels& k, std::mt19937& rng, int threads) {
  const long m = 1 + rng() % 300, half = k.panel * (1 + rng() % 6), n = 2 * half;
  const long d = rng() % 2 ? 1 + rng() % 300 : 64 * (1 + rng() % 5);
  Buffer x = random_buffer(rng, m * d), w = random_buffer(rng, n * d), product(m * n), apart(m * half), out(m * half);
  const auto same = [&](const auto& linear) {
    linear(false, product.data, n);
    linear(true, out.data, half);
    k.swiglu(threads, product.data, n, m, half, apart.data, half);
    return std::memcmp(apart.data, out.data, m * half * sizeof(float)) == 0;
  };
  std::vector<float> f32(k.packed_f32_size(n, d));
  k.pack_f32(w.data, false, n, d, f32.data());
  expect(same([&](bool gate, float* to, long ld) {
    k.linear_f32(threads, x.data, d, m, d, f32.data(), n, nullptr, gate, to, ld);
  }), "linear_f32, gated", k.name);
  std::vector<uint16_t> bf16(k.packed_bf16_size(n, d));
  k.pack_bf16(w.data, false, n, d, bf16.data());
  for (const auto linear : {k.linear_bf16, k.linear_widened})
    expect(same([&](bool gate, float* to, long ld) {
      linear(threads, x.data, d, m, d, bf16.data(), n, nullptr, gate, to, ld);
    }), "a linear of bf16 weights, gated", k.name);
  std::vector<int8_t> i8(k.packed_i8_size(n, d));
  std::vector<float> scales(n);
  std::vector<int32_t> sums(n);
  k.pack_i8(w.data, false, n, d, false, i8.data(), scales.data(), sums.data());
  expect(same([&](bool gate, float* to, long ld) {
    k.linear_i8(threads, x.data, d, m, d, i8.data(), scales.data(), sums.data(), n, nullptr, gate, to, ld);
  }), "linear_i8, gated", k.name);
}

void rows(const Kernels& k, std::mt19937& rng, int threads) {
  const long m = 1 + rng() % 70, d = 1 + rng() % 300;
  Buffer residual = random_buffer(rng, m * d), x = random_buffer(rng, m * d), w = random_buffer(rng, d), out(m * d),
         gate_up = random_buffer(rng, m * 2 * d);
  std::vector<float> before(residual.data, residual.data + m * d);
  k.add_rms_norm(threads, residual.data, d, x.data, d, w.data, 1e-6f, m, d, out.data, d);
  bool norm = true, gate = true;
  for (long i = 0; i < m; ++i) {
    double s = 0;
    for (long j = 0; j < d; ++j) s += std::pow(double(before[i * d + j]) + x.data[i * d + j], 2);
    for (long j = 0; j < d; ++j)
      norm &= close(out.data[i * d + j],
                    (double(before[i * d + j]) + x.data[i * d + j]) / std::sqrt(s / d + 1e-6) * w.data[j], 1e-4);
  }
  k.swiglu(threads, gate_up.data, 2 * d, m, d, out.data, d);
  for (long i = 0; i < m * d; ++i) {
    const double g = gate_up.data[i / d * 2 * d + i % d];
    gate &= close(out.data[i], g / (1 + std::exp(-g)) * gate_up.data[i / d * 2 * d + d + i % d], 1e-5);
  }
  expect(norm, "add_rms_norm", k.name);
  expect(gate, "swiglu", k.name);
}

void attention(const Kernels& k, std::mt19937& rng, int threads, int precision) {
  const long length = 1 + rng() % (rng() % 3 ? 200 : 600), kv_heads = 1 + rng() % 3, group = 1 + rng() % 3, heads = kv_heads * group,
             dim = 2 * (1 + rng() % 20), window = rng() % 2 ? 0 : 1 + rng() % 100;
  const long ld = (heads + 2 * kv_heads) * dim;
  Buffer qkv = random_buffer(rng, length * ld), cos = random_buffer(rng, length * dim / 2),
         sin = random_buffer(rng, length * dim / 2), weight = random_buffer(rng, dim);
  std::vector<int64_t> positions(length);
  for (long i = 0; i < length; ++i) positions[i] = i;
  k.qk_norm_rope(threads, qkv.data, ld, length, heads, kv_heads, dim, weight.data, weight.data, cos.data, sin.data,
                 positions.data(), 1e-6f);
  std::vector<float> copy(qkv.data, qkv.data + length * ld);
  const float *q = copy.data(), *keys = q + heads * dim, *values = keys + kv_heads * dim;
  // As one sequence, or as one of `shared` rows and another that continues it.
  const long shared = rng() % 2 ? 0 : rng() % length;
  float *first_k = qkv.data + heads * dim, *first_v = first_k + kv_heads * dim;
  if (shared > 0)
    k.attention(precision, threads, qkv.data, ld, shared, nullptr, first_k, ld, first_v, ld, shared, nullptr, nullptr,
                0, heads, kv_heads, dim, window, 0.3f, qkv.data, ld);
  const long at = shared * ld, own = length - shared;
  k.attention(precision, threads, qkv.data + at, ld, own, nullptr, first_k + at, ld, first_v + at, ld, own, first_k,
              first_v, shared, heads, kv_heads, dim, window, 0.3f, qkv.data + at, ld);
  // The truth is of what is multiplied, in 16 bits of what it is made of. What remains is softmax's weights, rounded by
  // up to 2^-9 of each in bf16, in 8 bits by up to a 255th of the largest.
  const std::string how = precision == lastrerank::kFp32   ? "in fp32"
                          : precision == lastrerank::kBf16 ? "in bf16"
                                                           : k.int8_attention;
  const double tolerance = how == "in fp32" ? 1e-4 : how == "in 16 bits" ? 5e-3 : how == "in bf16" ? 1e-2 : 1e-1;
  std::vector<std::vector<double>> own_keys, own_values;
  for (long j = 0; j < length * kv_heads; ++j) {
    const long from = j / kv_heads * ld + j % kv_heads * dim;
    own_keys.push_back(multiplied(keys + from, dim, 1, how));
    own_values.push_back(multiplied(values + from, dim, 1, how));
  }
  bool right = true;
  for (long i = 0; i < length; i += 7)
    for (long h = 0; h < heads; ++h) {
      const long first = window > 0 ? std::max<long>(0, i - window + 1) : 0;
      const auto query = multiplied(q + i * ld + h * dim, dim, 0.3f, how);
      std::vector<double> p;
      double top = -1e300, total = 0;
      for (long j = first; j <= i; ++j) {
        double s = 0;
        for (long c = 0; c < dim; ++c) s += query[c] * own_keys[j * kv_heads + h / group][c];
        p.push_back(s);
        top = std::max(top, p.back());
      }
      for (double& s : p) total += s = std::exp(s - top);
      for (long c = 0; c < dim; ++c) {
        double s = 0;
        for (long j = first; j <= i; ++j) s += p[j - first] / total * own_values[j * kv_heads + h / group][c];
        right &= close(qkv.data[i * ld + h * dim + c], s, tolerance);
      }
    }
  expect(right, "attention", k.name);
}

void all(unsigned seed, int rounds, int threads) {
  std::mt19937 rng(seed);
  for (int isa = 0; const Kernels* k = lastrerank_kernels(isa); ++isa)
    for (int round = 0; round < rounds; ++round) {
      linears(*k, rng, threads);
      gated(*k, rng, threads);
      rows(*k, rng, threads);
      for (int precision : {lastrerank::kFp32, lastrerank::kBf16, lastrerank::kInt8})
        attention(*k, rng, threads, precision);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 5;
#if defined(__x86_64__) && defined(__linux__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // as api.cpp asks for AMX, where kernels for it are linked
#endif
  all(1, rounds, 3);
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 3; ++i) callers.emplace_back([=] { all(10 + i, rounds, 2); });
  for (std::thread& caller : callers) caller.join();
  const bool with_fork = argc > 2 && std::string(argv[2]) == "fork";  // the thread sanitizer doesn't follow forks
  if (with_fork) {
    const pid_t child = fork();
    if (child == 0) {
      all(99, rounds, 3);
      _exit(failures ? 1 : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked child", "all");
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
