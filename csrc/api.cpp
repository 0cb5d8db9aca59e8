// The C interface: plain pointers and sizes, no Python and no PyTorch, so that one build serves every version of both.
// `lastrerank/ops/native.py` is the other side. Rows and strides in elements, see kernels.h.

#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(_WIN32)
#define LASTRERANK_EXPORT extern "C" __declspec(dllexport)
#else
#define LASTRERANK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using lastrerank::Kernels;

#if defined(LASTRERANK_ARM)
// Whether this processor has 8-bit dot products, or bf16 ones (Arm's FEAT_DotProd, FEAT_BF16).
bool has(const char* feature) {
#if defined(__linux__)
  return std::strcmp(feature, "DotProd") == 0 ? getauxval(AT_HWCAP) >> 20 & 1 : getauxval(AT_HWCAP2) >> 14 & 1;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  const std::string name = std::string("hw.optional.arm.FEAT_") + feature;
  return sysctlbyname(name.c_str(), &found, &size, nullptr, 0) == 0 && found != 0;
#else
  return false;
#endif
}
#endif

// The instruction sets this build has and this processor runs, best first.
const Kernels* const* available() {
  static const Kernels* list[6];
  static const bool filled = [] {
    int n = 0;
#if defined(LASTRERANK_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
      list[n++] = &lastrerank::kernels_avx512bf16;
    if (avx512 && __builtin_cpu_supports("avx512vnni")) list[n++] = &lastrerank::kernels_avx512vnni;
    if (avx512) list[n++] = &lastrerank::kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list[n++] = &lastrerank::kernels_avx2;
#elif defined(LASTRERANK_ARM)
    if (has("DotProd") && has("BF16")) list[n++] = &lastrerank::kernels_armbf16;
    if (has("DotProd")) list[n++] = &lastrerank::kernels_dotprod;
#endif
    list[n++] = &lastrerank::kernels_portable;
    list[n] = nullptr;
    return true;
  }();
  (void)filled;
  return list;
}

}  // namespace

// Raised whenever a signature changes; the Python side refuses a library of another version.
LASTRERANK_EXPORT int lastrerank_version() { return 6; }

// The kernels of instruction set number i, best first, or null.
LASTRERANK_EXPORT const Kernels* lastrerank_kernels(int i) {
  const Kernels* const* list = available();
  for (int n = 0; list[n] != nullptr; ++n)
    if (n == i) return list[n];
  return nullptr;
}
