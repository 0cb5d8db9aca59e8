// The C interface: plain pointers and sizes, no Python and no PyTorch, so that one build serves every version of both.
// `lastrerank/ops/native.py` is the other side. Rows and strides in elements, see kernels.h.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(LASTRERANK_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

// Whether an Arm processor has dot products of 8 bits (FEAT_DotProd), and products of matrices, two rows by two columns, of
// 8 bits and of bf16 (FEAT_I8MM, FEAT_BF16).
#if defined(LASTRERANK_ARM) && defined(__linux__)
// Bits of Linux's arch/arm64/include/uapi/asm/hwcap.h, by number for headers that are older than they.
bool has_dotprod() { return getauxval(AT_HWCAP) & 1 << 20; }  // HWCAP_ASIMDDP
bool has_matrices() {
  constexpr unsigned long wanted = 1 << 13 | 1 << 14;  // HWCAP2_I8MM, HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & wanted) == wanted;
}
#elif defined(LASTRERANK_ARM) && defined(__APPLE__)
bool has(const char* feature) {
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_matrices() { return has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16"); }
#elif defined(LASTRERANK_ARM)
bool has_dotprod() { return false; }
bool has_matrices() { return false; }
#endif

#if defined(LASTRERANK_AMX)
// Whether the processor has AMX with bf16 and 8 bits, and Linux lets this process use it: it wants to be asked, since a
// signal's frame is larger with the registers in it.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// The instruction sets this build has and this processor runs, best first.
const Kernels* const* available() {
  static const Kernels* list[7];
  static const bool filled = [] {
    int n = 0;
#if defined(LASTRERANK_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#if defined(LASTRERANK_AMX)
    if (bf16 && has_amx()) list[n++] = &lastrerank::kernels_amx;
#endif
    if (bf16) list[n++] = &lastrerank::kernels_avx512bf16;
    if (avx512 && __builtin_cpu_supports("avx512vnni")) list[n++] = &lastrerank::kernels_avx512vnni;
    if (avx512) list[n++] = &lastrerank::kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list[n++] = &lastrerank::kernels_avx2;
#elif defined(LASTRERANK_ARM)
    if (has_dotprod() && has_matrices()) list[n++] = &lastrerank::kernels_armv86;
    if (has_dotprod()) list[n++] = &lastrerank::kernels_dotprod;
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
LASTRERANK_EXPORT int lastrerank_version() { return 11; }

// The kernels of instruction set number i, best first, or null.
LASTRERANK_EXPORT const Kernels* lastrerank_kernels(int i) {
  const Kernels* const* list = available();
  for (int n = 0; list[n] != nullptr; ++n)
    if (n == i) return list[n];
  return nullptr;
}
