// What the CPU can do beyond the least that every program may count on.
#pragma once

enum class Cpu { BASE, AVX2, AVX512 };

// The flags by which build.rs compiles the loops for a set are those that are asked for here.
inline Cpu cpu() {
#if defined(LORA_SGEMM)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Cpu::AVX512 : avx2 ? Cpu::AVX2 : Cpu::BASE;
#else
  return Cpu::BASE;
#endif
}
