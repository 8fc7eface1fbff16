// Formats: what a 32-bit register of elements becomes, and how it is multiplied.

#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

namespace lightning_mat {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class Narrow>
__device__ __forceinline__ uint32_t pack(Narrow low, Narrow high) {
  uint16_t bits[2];
  std::memcpy(&bits[0], &low, 2);
  std::memcpy(&bits[1], &high, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

struct Float32AsTF32 {
  using Element = float;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) {
    parts[0] = to_tf32(__uint_as_float(word));
  }
  __device__ static uint32_t word(const float* values) { return __float_as_uint(values[0]); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

// x = high + low, high being the nearest TF32 number: with three of the four products, and of `low`
// what the tensor cores do not ignore, an element's error is about 2^-22. One of the parts of a NaN
// or an infinity is not finite.
struct Float32InTwo : Float32AsTF32 {
  static constexpr int kParts = 2;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) {
    parts[0] = (word + 0x1000u) & 0xffffe000u;
    parts[1] = __float_as_uint(__uint_as_float(word) - __uint_as_float(parts[0]));
  }
};

struct BFloat16 {
  using Element = __nv_bfloat16;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) { parts[0] = word; }
  __device__ static uint32_t word(const float* values) {
    return pack(__float2bfloat16_rn(values[0]), __float2bfloat16_rn(values[1]));
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

struct Float16 {
  using Element = __half;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) { parts[0] = word; }
  __device__ static uint32_t word(const float* values) {
    return pack(__float2half_rn(values[0]), __float2half_rn(values[1]));
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

// Elements of any type, products and sums in float64, without tensor cores.
struct AnyInFloat64 {
  using Sum = double;
};

}  // namespace lightning_mat
