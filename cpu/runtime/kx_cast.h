// Casts between storage formats: round to nearest even, fp8 saturates, NaN stays NaN.
#pragma once
#include "kx_base.h"

namespace kx {

template <class T> AI as<T, float> bf16_to_f32(T v) {
  return bits<as<T, float>>(cast<uint32_t>((U<T>)v) << 16);
}
template <class T> AI as<T, uint16_t> f32_to_bf16(T x) {
  auto u = bits<U<T>>(x);
#if defined(__AVX512BF16__)
  // the instruction rounds alike but takes subnormals for zero
  if constexpr (lanes<T> == 16) {
    uint16_t small;
    bool none;
    U<T> exponents = U<T>{} + 0x7f800000u;
    asm("vptestnmd %2,%3,%0\n\tkortestw %0,%0" : "=Yk"(small), "=@ccz"(none) : "v"(exponents), "v"(u));
    if (LIKELY(none)) {
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
// fp8 to bf16, which holds it exactly, in 16-bit lanes. Bits as a function of bits are concave: the
// least of the lines through its pieces, one for each binade of subnormals and one for the rest
template <class T> AI T least(T a, T b) { return a < b ? a : b; }
template <class T> AI as<T, uint16_t> e4m3_to_bf16(T v) {
  typedef as<T, int16_t> H;
  H h = (H)cast<uint16_t>((U<T>)v), x = h & 0x7f;
  H y = least<H>(least<H>((x << 4) + 0x3c00, (x << 5) + 0x3b80),
                 least<H>((x << 6) + 0x3b00, least<H>(x, (H)(H{} + 2)) * 0x3b00));
  y = x == 0x7f ? (H)(H{} + 0x7fc0) : y;
  return (as<T, uint16_t>)(y | ((h << 8) & (int16_t)-0x8000));
}
template <class T> AI as<T, uint16_t> e5m2_to_bf16(T v) {
  typedef as<T, int16_t> H;
  H h = (H)cast<uint16_t>((U<T>)v), x = h & 0x7f;
  H y = least<H>((x << 5) + 0x3800, least<H>((x << 6) + 0x3780, least<H>(x, (H)(H{} + 2)) * 0x3780));
  y = x >= 0x7c ? (H)(y + 0x3800) : y;
  return (as<T, uint16_t>)(y | ((h << 8) & (int16_t)-0x8000));
}
#if defined(__AVX512VBMI__)
struct Halves { alignas(64) uint8_t low[128], high[128]; };
constexpr Halves e4m3_table() {
  Halves t{};
  for (int x = 0; x < 128; x++) {
    int m = x & 7, small = m >= 4 ? (m << 5) + 0x3b80 : m >= 2 ? (m << 6) + 0x3b00 : m * 0x3b00;
    int y = x == 127 ? 0x7fc0 : x >= 8 ? (x << 4) + 0x3c00 : small;
    t.low[x] = y & 255;
    t.high[x] = y >> 8;
  }
  return t;
}
static constexpr Halves e4m3_halves = e4m3_table();
// every byte twice, then both looked up
AI V<uint16_t, 32> e4m3_to_bf16(V<uint8_t, 32> v) {
  typedef V<uint8_t, 64> bytes;
  bytes twice, x, low[2], high[2];
  for (int i = 0; i < 64; i++) twice[i] = i / 2;
  memcpy(low, e4m3_halves.low, 128);
  memcpy(high, e4m3_halves.high, 128);
#if defined(__clang__)
  // clang 19 prints %g1 of registers above the 15th as those of another kind
  bytes wide{};
  memcpy(&wide, &v, sizeof v);
  asm("vpermb %1,%2,%0" : "=v"(x) : "v"(wide), "v"(twice));
#else
  asm("vpermb %g1,%2,%0" : "=v"(x) : "v"(v), "v"(twice));
#endif
  bytes y = x;
  uint64_t even = 0x5555555555555555ull;
  asm("vpermi2b %2,%1,%0%{%3%}" : "+v"(y) : "v"(low[0]), "v"(low[1]), "Yk"(even));
  asm("vpermi2b %2,%1,%0%{%3%}" : "+v"(y) : "v"(high[0]), "v"(high[1]), "Yk"(~even));
  return bits<V<uint16_t, 32>>(y) | (bits<V<uint16_t, 32>>(x) & (uint16_t)0x8000);
}
#endif

// MANTISSA bits kept. A power of two, so much larger than x (or than the least normal number) that the
// sum has no further bits, rounds x: what is added to its bits is the rounded multiple of a step.
template <int MANTISSA, int BIAS, class T> AI as<T, uint8_t> f32_to_fp8(T x, float largest, uint32_t nan) {
  typedef U<T> W;
  constexpr int shift = 23 - MANTISSA;
  W u = bits<W>(x), a = u & 0x7fffffffu, most = splat<W>(bits<uint32_t>(largest)), low = splat<W>((128u - BIAS) << 23);
  W held = least<W>(a, most), exponent = held & 0x7f800000u;
  exponent = exponent > low ? exponent : low;
  W power = exponent + ((uint32_t)shift << 23);
  W r = bits<W>(bits<T>(held) + bits<T>(power)) - power + (exponent >> shift) - ((128u - BIAS) << MANTISSA);
  r = a > splat<W>(0x7f800000u) ? splat<W>(nan) : r;
  return cast<uint8_t>(r | ((u >> 24) & 0x80));
}
template <class T> AI as<T, uint8_t> f32_to_e4m3(T x) { return f32_to_fp8<3, 7>(x, 448.0f, 0x7f); }
template <class T> AI as<T, uint8_t> f32_to_e5m2(T x) { return f32_to_fp8<2, 15>(x, 57344.0f, 0x7f); }

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
