// Casts between storage formats: round to nearest even, fp8 saturates, NaN stays NaN.
#pragma once
#include "kx_base.h"

namespace kx {

template <class T> AI as<T, float> bf16_to_f32(T v) {
  return bits<as<T, float>>(cast<uint32_t>((U<T>)v) << 16);
}
// where the value has at most 8 digits, as every 8-bit float: nothing to round
template <class T> AI as<T, uint16_t> top_half(T x) { return cast<uint16_t>(bits<U<T>>(x) >> 16); }
template <class T> AI as<T, uint16_t> f32_to_bf16(T x) {
  auto u = bits<U<T>>(x);
#if defined(__AVX512BF16__)
  // the instruction rounds alike but takes subnormals for zero
  if constexpr (lanes<T> == 16) {
    uint16_t small;
    U<T> exponents = U<T>{} + 0x7f800000u;
    asm("vptestnmd %1,%2,%0" : "=Yk"(small) : "v"(exponents), "v"(u));
    if (LIKELY(!small)) {
      as<T, uint16_t> r;
      asm("vcvtneps2bf16 %1,%0" : "=v"(r) : "v"(x));
      return r;
    }
  }
#endif
  auto r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  r = select<U<T>>(to_mask<T>(x != x), (u >> 16) | 0x40, r);
  return cast<uint16_t>(r);
}
template <class T> AI as<T, uint16_t> f32_to_bf16_rtz(T x) {
  auto u = bits<U<T>>(x);
  return cast<uint16_t>(select<U<T>>(to_mask<T>(x != x), (u >> 16) | 0x40, u >> 16));
}

// fp16 in integer arithmetic: the same bits on every machine
template <class T> AI as<T, float> f16_to_f32(T v) {
  auto h = cast<uint32_t>((U<T>)v);
  typedef decltype(h) W;
  typedef as<T, float> F;
  auto magnitude = bits<F>((h & 0x7fff) << 13) * 0x1p112f;
  auto special = bits<F>(bits<W>(magnitude) | 0x7f800000);
  auto wide = select<F>(to_mask<W>((h & 0x7fff) >= splat<W>(0x7c00)), special, magnitude);
  return bits<F>(bits<W>(wide) | ((h & 0x8000) << 16));
}
template <class T> AI as<T, uint16_t> f32_to_f16(T x) {
  typedef U<T> W;
  W u = bits<W>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  W normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  // below 2^-14: adding 0.5 lets the float adder round at bit 2^-24
  W small = bits<W>(bits<T>(a) + 0.5f) - 0x3f000000;
  W r = select<W>(to_mask<W>(a < splat<W>(0x38800000)), small, normal);
  r = select<W>(to_mask<W>(a >= splat<W>(0x477ff000)), splat<W>(0x7c00), r);
  r = select<W>(to_mask<W>(a > splat<W>(0x7f800000)), (a >> 13) | 0x7e00, r);
  return cast<uint16_t>((r & 0x7fff) | sign);
}
template <class T> AI as<T, uint16_t> f32_to_f16_rtz(T x) {
  typedef U<T> W;
  W u = bits<W>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  W normal = (a - 0x38000000) >> 13;
  // multiples of 2^-24 below 2^-14, truncated
  W small = cast<uint32_t>(cast<int32_t>(bits<T>(select<W>(to_mask<W>(a < splat<W>(0x38800000)), a, a ^ a)) * 0x1p24f));
  W r = select<W>(to_mask<W>(a < splat<W>(0x38800000)), small, normal);
  r = select<W>(to_mask<W>(a >= splat<W>(0x47800000)), splat<W>(0x7bff), r);
  r = select<W>(to_mask<W>(a == splat<W>(0x7f800000)), splat<W>(0x7c00), r);
  r = select<W>(to_mask<W>(a > splat<W>(0x7f800000)), (a >> 13) | 0x7e00, r);
  return cast<uint16_t>((r & 0x7fff) | sign);
}

// fp8 e4m3fn: bias 7, no infinity, NaN is 0x7f; e5m2: bias 15, IEEE-like
template <class T> AI as<T, float> e4m3_to_f32(T v) {
  auto h = cast<uint32_t>((U<T>)v);
  typedef decltype(h) W;
  typedef as<T, float> F;
  auto wide = bits<F>((h & 0x7f) << 20) * 0x1p120f;
  auto w = bits<W>(wide);
  w = select<W>(to_mask<W>((h & 0x7f) == splat<W>(0x7f)), splat<W>(0x7fc00000), w);
  return bits<F>(w | ((h & 0x80) << 24));
}
template <class T> AI as<T, float> e5m2_to_f32(T v) {
  return f16_to_f32(cast<uint16_t>((U<T>)v) << 8);
}
// MANTISSA bits kept, exponents below MIN are subnormal, above MOST saturates
template <int MANTISSA, int BIAS, class T> AI U<T> f32_to_fp8_bits(T x, uint32_t most) {
  typedef U<T> W;
  const int shift = 23 - MANTISSA;
  const uint32_t least = (uint32_t)(128 - BIAS) << 23;
  W u = bits<W>(x), a = u & 0x7fffffff;
  W normal = (a - ((uint32_t)(127 - BIAS) << 23) + ((1u << (shift - 1)) - 1) + ((a >> shift) & 1)) >> shift;
  // half an ulp of `magic` is half a step of the subnormals
  const float magic = bits<float>((uint32_t)(127 + 23 + 1 - BIAS - MANTISSA) << 23);
  W small = bits<W>(bits<T>(a) + magic) - bits<uint32_t>(magic);
  W r = select<W>(to_mask<W>(a < splat<W>(least)), small, normal);
  return select<W>(to_mask<W>(r > splat<W>(most)), splat<W>(most), r);
}
template <class T> AI as<T, uint8_t> f32_to_e4m3(T x) {
  typedef U<T> W;
  W u = bits<W>(x), a = u & 0x7fffffff;
  W r = f32_to_fp8_bits<3, 7>(x, 0x7e);
  r = select<W>(to_mask<W>(a >= splat<W>(0x43f00000)), splat<W>(0x7e), r);
  r = select<W>(to_mask<W>(a > splat<W>(0x7f800000)), splat<W>(0x7f), r);
  return cast<uint8_t>(r | ((u >> 24) & 0x80));
}
template <class T> AI as<T, uint8_t> f32_to_e5m2(T x) {
  typedef U<T> W;
  W u = bits<W>(x), a = u & 0x7fffffff;
  W r = f32_to_fp8_bits<2, 15>(x, 0x7b);
  r = select<W>(to_mask<W>(a >= splat<W>(0x47700000)), splat<W>(0x7b), r);
  r = select<W>(to_mask<W>(a > splat<W>(0x7f800000)), splat<W>(0x7f), r);
  return cast<uint8_t>(r | ((u >> 24) & 0x80));
}

// double -> narrow through float rounded to odd, so that the second rounding is exact
template <class T> AI as<T, float> f64_to_f32_odd(T x) {
  typedef as<T, float> F;
  F f = cast<float>(x);
  auto back = cast<double>(f);
  auto u = bits<U<F>>(f);
  auto inexact = to_mask<T>((back != x) & (x == x));
  auto away = to_mask<T>((bits<U<T>>(back) << 1) > (bits<U<T>>(x) << 1));
  u = select<U<F>>(inexact, select<U<F>>(away, u - 1, u) | 1, u);
  return bits<F>(u);
}
} // namespace kx
