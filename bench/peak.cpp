// The machine's peaks: products that never leave the registers, in independent chains, on every thread. fp32 by fused
// multiply-adds; bf16 and 8 bits by the units that the processor has for them.
// `g++ -O2 -march=native bench/peak.cpp -pthread -o peak && ./peak THREADS` prints a line each, a name and billions of
// operations a second, the best of nine.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
#if defined(__aarch64__)
#define IN_REGISTER(v) "+w"(v)
#else
#define IN_REGISTER(v) "+x"(v)
#endif

// Twelve chains hide four cycles of latency at two instructions a cycle, and fit sixteen registers with x and y.
static void chains(long steps, float* out) {
  volatile float one = 0.999f;
  const Vec x = Vec{} + one, y = Vec{} + one / 1000;
  Vec a = y, b = y, c = y, d = y, e = y, f = y, g = y, h = y, i = y, j = y, k = y, l = y;
  for (long step = 0; step < steps; ++step) {
    a = a * x + y, b = b * x + y, c = c * x + y, d = d * x + y, e = e * x + y, f = f * x + y;
    g = g * x + y, h = h * x + y, i = i * x + y, j = j * x + y, k = k * x + y, l = l * x + y;
    // Else the twelve are found to be one.
    asm volatile("" : IN_REGISTER(a), IN_REGISTER(b), IN_REGISTER(c), IN_REGISTER(d), IN_REGISTER(e), IN_REGISTER(f));
    asm volatile("" : IN_REGISTER(g), IN_REGISTER(h), IN_REGISTER(i), IN_REGISTER(j), IN_REGISTER(k), IN_REGISTER(l));
  }
  *out = (a + b + c + d + e + f + g + h + i + j + k + l)[0];
}

#if defined(TILES)
// Four sums hide a tile product's latency, as two tiles of rows and two of columns give them.
template <bool kIntegers>
static void tiles(long steps, float* out) {
  struct alignas(64) {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {};
    unsigned char rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
  alignas(64) unsigned short numbers[512];
  for (int i = 0; i < 512; ++i) numbers[i] = static_cast<unsigned short>(0x3c00 + i * 37 % 512);  // not zeros: power
  _tile_loadd(4, numbers, 64l);
  _tile_loadd(5, numbers, 64l);
  _tile_loadd(6, numbers, 64l);
  _tile_loadd(7, numbers, 64l);
  for (long step = 0; step < steps; ++step) {
    if constexpr (kIntegers) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  float sums[256];
  _tile_stored(0, sums, 64l);
  _tile_release();
  *out = sums[0];
}
#endif

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
// As `chains`: twelve sums of 16 lanes, of two bf16 numbers or four of 8 bits each.
template <typename Sum, typename Dot>
static void dots(long steps, float* out, const Dot& dot) {
  Sum sums[12] = {};
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (Sum& sum : sums) {
      sum = dot(sum);
      asm volatile("" : "+x"(sum));
    }
  }
  *out = reinterpret_cast<const float*>(sums)[0];
}
#endif

// The best of nine runs of `run(steps, out)`, of `operations` each step.
template <typename Run>
static void report(const char* name, int threads, long steps, double operations, const Run& run) {
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {
    std::vector<std::thread> pool;
    std::vector<float> out(threads * 64);
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) pool.emplace_back(run, steps, &out[t * 64]);
    for (auto& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations * static_cast<double>(steps) * threads / seconds.count() / 1e9);
  }
  std::printf("%s %.0f\n", name, best);
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  report("float32", threads, 20'000'000, 2.0 * 12 * kLanes, chains);
#if defined(TILES)
  if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) {  // Linux is asked for AMX's registers
    report("bfloat16", threads, 2'000'000, 4 * 2.0 * 16 * 16 * 32, tiles<false>);
    report("int8", threads, 2'000'000, 4 * 2.0 * 16 * 16 * 64, tiles<true>);
    return 0;
  }
#endif
#if defined(__AVX512BF16__)
  report("bfloat16", threads, 10'000'000, 2.0 * 12 * 32, [](long steps, float* out) {
    const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.999f), _mm512_set1_ps(0.5f));
    dots<__m512>(steps, out, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, x, x); });
  });
#endif
#if defined(__AVX512VNNI__)
  report("int8", threads, 10'000'000, 2.0 * 12 * 64, [](long steps, float* out) {
    const __m512i x = _mm512_set1_epi8(3);
    dots<__m512i>(steps, out, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, x); });
  });
#endif
}
