// The machine's fp32 peak: independent chains of fused multiply-adds that never leave the registers, on every thread.
// `g++ -O2 -march=native bench/peak.cpp -pthread -o peak && ./peak THREADS` prints GFLOP/s, the best of nine.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

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

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const long steps = 20'000'000;
  double best = 0;
  for (int run = 0; run < 9; ++run) {
    std::vector<std::thread> pool;
    std::vector<float> out(threads * 64);
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) pool.emplace_back(chains, steps, &out[t * 64]);
    for (auto& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2.0 * 12 * kLanes * steps * threads / seconds.count() / 1e9);
  }
  std::printf("%.0f\n", best);
}
