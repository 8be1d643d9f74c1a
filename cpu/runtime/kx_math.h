// Elementwise functions over scalars and vectors: own polynomials for fp32, libm lane by lane for
// fp64 and for the rare functions. Integer division never traps.
#pragma once
#include "kx_base.h"
#include <math.h>

namespace kx {

// ---- fused multiply-add: one rounding, also with contraction switched off
template <class T> AI T fma(T a, T b, T c) {
  typedef E<T> X;
#if defined(__FMA__)
  if constexpr (lanes<T> > 1 && sizeof(T) >= 16 && sizeof(T) <= KX_VECTOR_BYTES) {
    if constexpr (sizeof(X) == 4) asm("vfmadd231ps %2,%1,%0" : "+v"(c) : "v"(a), "v"(b));
    else asm("vfmadd231pd %2,%1,%0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 16) {
    if constexpr (sizeof(X) == 4) asm("fmla %0.4s,%1.4s,%2.4s" : "+w"(c) : "w"(a), "w"(b));
    else asm("fmla %0.2d,%1.2d,%2.2d" : "+w"(c) : "w"(a), "w"(b));
    return c;
  }
#endif
  if constexpr (lanes<T> == 1) {
    if constexpr (sizeof(X) == 4) return __builtin_fmaf(a, b, c); else return __builtin_fma(a, b, c);
  } else {
    for (int i = 0; i < lanes<T>; i++)
      if constexpr (sizeof(X) == 4) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
      else c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
  }
}
// multiply-add where either rounding will do
template <class T> AI T mad(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
template <class T> AI T poly(T x, float last) { return splatf<T>(last); }
template <class T, class... R> AI T poly(T x, float first, R... rest) {
  return mad(x, poly(x, rest...), splatf<T>(first));
}

template <class T, class F> AI T each(T x, F f) {
  if constexpr (lanes<T> == 1) return f(x);
  else { for (int i = 0; i < lanes<T>; i++) x[i] = f(x[i]); return x; }
}
template <class T, class F> AI T each2(T x, T y, F f) {
  if constexpr (lanes<T> == 1) return f(x, y);
  else { for (int i = 0; i < lanes<T>; i++) x[i] = f(x[i], y[i]); return x; }
}
template <class T, class F> COLD T each_cold(T x, F f) { return each(x, f); }
template <class T> AI bool any(T mask) {
  if constexpr (lanes<T> == 1) return mask;
  else { E<T> r = 0; for (int i = 0; i < lanes<T>; i++) r |= mask[i]; return r; }
}

template <class T> AI T absf(T x) { return bits<T>(bits<U<T>>(x) & (((typename sized_int<sizeof(E<T>)>::u)-1) >> 1)); }
template <class T> AI T infinity() { return splatf<T>(__builtin_inff()); }
template <class T> AI T copysign(T x, T y) {
  const auto top = (E<U<T>>)1 << (8 * sizeof(E<T>) - 1);
  return bits<T>((bits<U<T>>(x) & (E<U<T>>)(top - 1)) | (bits<U<T>>(y) & top));
}
template <class T> AI T floor(T x) {
  if constexpr (sizeof(E<T>) == 4) return each(x, [](float v) { return __builtin_floorf(v); });
  else return each(x, [](double v) { return __builtin_floor(v); });
}
template <class T> AI T ceil(T x) { return -floor(-x); }
template <class T> AI T sqrt(T x) {
  if constexpr (sizeof(E<T>) == 4) return each(x, [](float v) { return __builtin_sqrtf(v); });
  else return each(x, [](double v) { return __builtin_sqrt(v); });
}
template <class T> AI T rsqrt(T x) { return splatf<T>(1) / sqrt(x); }
// nearest even for |x| < 2^22
template <class T> AI T nearest(T x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// ---- NaN rules: `num` forms return the number, the others propagate NaN
template <class T> AI T max_num(T a, T b) { return select<T>(to_mask<T>((a > b) | (b != b)), a, b); }
template <class T> AI T min_num(T a, T b) { return select<T>(to_mask<T>((a < b) | (b != b)), a, b); }
template <class T> AI T max_nan(T a, T b) { return select<T>(to_mask<T>((a > b) | (a != a)), a, b); }
template <class T> AI T min_nan(T a, T b) { return select<T>(to_mask<T>((a < b) | (a != a)), a, b); }
template <class T> AI T max_int(T a, T b) { return select<T>(to_mask<T>(a > b), a, b); }
template <class T> AI T min_int(T a, T b) { return select<T>(to_mask<T>(a < b), a, b); }
template <class T> AI T max_unsigned(T a, T b) { return select<T>(to_mask<T>((U<T>)a > (U<T>)b), a, b); }
template <class T> AI T min_unsigned(T a, T b) { return select<T>(to_mask<T>((U<T>)a < (U<T>)b), a, b); }

// ---- integers
template <class T> AI T div_signed(T a, T b) {
  return each2(a, b, [](E<T> x, E<T> y) -> E<T> { return y == 0 ? -1 : y == -1 ? -x : x / y; });
}
template <class T> AI T rem_signed(T a, T b) {
  return each2(a, b, [](E<T> x, E<T> y) -> E<T> { return y == 0 ? x : y == -1 ? 0 : x % y; });
}
template <class T> AI T div_unsigned(T a, T b) {
  return (T)each2((U<T>)a, (U<T>)b, [](E<U<T>> x, E<U<T>> y) -> E<U<T>> { return y ? x / y : -1; });
}
template <class T> AI T rem_unsigned(T a, T b) {
  return (T)each2((U<T>)a, (U<T>)b, [](E<U<T>> x, E<U<T>> y) -> E<U<T>> { return y ? x % y : x; });
}
template <class T> AI T floor_div(T a, T b) {
  T q = div_signed(a, b);
  return q - select<T>(to_mask<T>((rem_signed(a, b) != 0) & ((a ^ b) < 0)), splat<T>(1), splat<T>(0));
}
template <class T> AI T ceil_div(T a, T b) {
  T q = div_signed(a, b);
  return q + select<T>(to_mask<T>((rem_signed(a, b) != 0) & ((a ^ b) >= 0)), splat<T>(1), splat<T>(0));
}
template <class T> AI T ceil_div_unsigned(T a, T b) {
  return div_unsigned(a, b) + select<T>(to_mask<T>(rem_unsigned(a, b) != 0), splat<T>(1), splat<T>(0));
}
// shifts by the width or more give 0 (or the sign), as the GPU's do
template <class T> AI T shift_left(T a, T n) {
  auto out = to_mask<T>((U<T>)n >= (E<U<T>>)(8 * sizeof(E<T>)));
  return select<T>(out, splat<T>(0), (T)((U<T>)a << (U<T>)(n & (E<T>)(8 * sizeof(E<T>) - 1))));
}
template <class T> AI T shift_right(T a, T n) {
  auto out = to_mask<T>((U<T>)n >= (E<U<T>>)(8 * sizeof(E<T>)));
  return select<T>(out, splat<T>(0), (T)((U<T>)a >> (U<T>)(n & (E<T>)(8 * sizeof(E<T>) - 1))));
}
template <class T> AI T shift_arithmetic(T a, T n) {
  return a >> min_unsigned(n, splat<T>(8 * sizeof(E<T>) - 1));
}
template <class T> AI T mul_high(T a, T b) {
  if constexpr (sizeof(E<T>) == 8)
    return each2(a, b, [](i64 x, i64 y) -> i64 { return (i64)(((unsigned __int128)(uint64_t)x * (uint64_t)y) >> 64); });
  else if constexpr (lanes<T> == 1) return (T)(((uint64_t)(U<T>)a * (U<T>)b) >> (8 * sizeof(T)));
  else {
    // even and odd lanes as 64-bit products: no vector wider than the machine's
    typedef V<uint64_t, lanes<T> / 2> W;
    if constexpr (sizeof(E<T>) == 4 && lanes<T> >= 4) {
      W x = bits<W>(a), y = bits<W>(b);
      W even = ((x & 0xffffffffu) * (y & 0xffffffffu)) >> 32;
      W odd = (x >> 32) * (y >> 32) & 0xffffffff00000000ull;
      return bits<T>(even | odd);
    } else return each2(a, b, [](E<T> x, E<T> y) -> E<T> {
      return (E<T>)(((uint64_t)(E<U<T>>)x * (E<U<T>>)y) >> (8 * sizeof(E<T>))); });
  }
}
template <class T> AI T mul_high_signed(T a, T b) {
  const int top = 8 * sizeof(E<T>) - 1;
  return mul_high(a, b) - ((a >> top) & b) - ((b >> top) & a);
}
template <class T> AI T abs_int(T a) { return select<T>(to_mask<T>(a < 0), -a, a); }
// float to integer: truncates; saturates where C++ leaves it undefined, NaN gives 0
template <class To, class T> AI as<T, To> to_int(T x) {
  const E<T> top = (E<T>)(typename sized_int<sizeof(To)>::u)((typename sized_int<sizeof(To)>::u)1 << (8 * sizeof(To) - 2)) * 2;
  const bool sign = (To)-1 < 0;
  const E<T> hi = sign ? top : top * 2, lo = sign ? -top : 0;
  auto over = to_mask<T>(x >= hi), under = to_mask<T>(x < lo), nan = to_mask<T>(x != x);
  T safe = select<T>(over, splatf<T>(0), select<T>(under, splatf<T>(0), select<T>(nan, splatf<T>(0), x)));
  typedef as<T, To> R;
  typedef typename sized_int<sizeof(To)>::u UT;
  R r = cast<To>(safe);
  const To most = sign ? (To)((UT)-1 >> 1) : (To)-1, least = sign ? (To)((UT)1 << (8 * sizeof(To) - 1)) : 0;
  return select<R>(over, splat<R>(most), select<R>(under, splat<R>(least), r));
}

// ---- exponentials and logarithms (fp32 polynomials; ulp bounds in tests/cpu)
template <class T> AI T scale2(T x, S<T> n) {
  S<T> half = n >> 1;
  return x * bits<T>((half + 127) << 23) * bits<T>((n - half + 127) << 23);
}
template <class T> AI T clamp_ordered(T x, float lo, float hi) {
#if defined(__AVX512F__)
  // of a NaN and a number these return their second source, here x
  if constexpr (lanes<T> == 16) {
    T l = splatf<T>(lo), h = splatf<T>(hi);
    asm("vminps %1,%2,%0" : "=v"(x) : "v"(x), "v"(h));
    asm("vmaxps %1,%2,%0" : "=v"(x) : "v"(x), "v"(l));
    return x;
  }
#endif
  x = select<T>(to_mask<T>(x > hi), splatf<T>(hi), x);
  return select<T>(to_mask<T>(x < lo), splatf<T>(lo), x);
}
template <class T> AI T no_nan(T x) { return select<T>(to_mask<T>(x != x), splatf<T>(0), x); }

// x * 2^n for an integral n; one rounding either way
template <class T> AI T scale(T x, T n) {
#if defined(__AVX512F__)
  if constexpr (lanes<T> == 16) {
    asm("vscalefps %2,%1,%0" : "=v"(x) : "v"(x), "v"(n));
    return x;
  }
#endif
  return scale2(x, cast<int32_t>(no_nan(n)));
}

template <class T> AI T exp2(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::exp2(v); });
  else {
    T c = clamp_ordered(x, -160, 160), n = nearest(c), r = c - n;
    T p = mad(r, poly(r, 0.6931471824645996f, 0.24022647738456726f, 0.055503323674201965f,
                      0.00961843691766262f, 0.0013398875016719103f, 0.00015353360504377633f), splatf<T>(1));
    return scale(p, n);
  }
}
template <class T> AI T exp_parts(T c, T n) {
  T r = mad(n, splatf<T>(-0x1.62e4p-1f), c);
  r = mad(n, splatf<T>(-1.4286068202862268e-06f), r);
  T q = poly(r, 0.5f, 0.166665181517601f, 0.04166620597243309f, 0.008368887938559055f, 0.0013950485736131668f);
  return mad(r * r, q, r);
}
template <class T> AI T exp(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::exp(v); });
  else {
    T c = clamp_ordered(x, -110, 110), n = nearest(c * 1.44269504f);
    return scale(exp_parts(c, n) + 1.0f, n);
  }
}
template <class T> AI T expm1(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::expm1(v); });
  else return each(x, [](float v) { return ::expm1f(v); });
}
// log(x) = e ln2 + log(m), m in [sqrt(1/2), sqrt(2)); `e` and log(m) for the caller to scale
template <class T> AI void log_parts(T x, T &e, T &f, T &tail) {
  auto tiny = to_mask<T>(x < 0x1p-126f);
  T y = select<T>(tiny, x * 0x1p23f, x);
  S<T> u = bits<S<T>>(y) - 0x3f3504f3;
  e = cast<float>(u >> 23) - select<T>(tiny, splatf<T>(23), splatf<T>(0));
  f = bits<T>((u & 0x7fffff) + 0x3f3504f3) - 1.0f;
  T s = f / (f + 2.0f), z = s * s, h = f * f * 0.5f;
  tail = s * (h + z * poly(z, 0.666666667f, 0.4f, 0.285714286f, 0.222222222f)) - h;
}
template <class T> AI T log_edges(T x, T r) {
  r = select<T>(to_mask<T>(x == 0), splatf<T>(-__builtin_inff()), r);
  r = select<T>(to_mask<T>((x < 0) | (x != x)), splatf<T>(__builtin_nanf("")), r);
  return select<T>(to_mask<T>(x == splatf<T>(__builtin_inff())), x, r);
}
template <class T> AI T log(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::log(v); });
  else {
    T e, f, t;
    log_parts(x, e, f, t);
    return log_edges(x, mad(e, splatf<T>(0x1.62ep-1f), f + mad(e, splatf<T>(3.194618494528623e-05f), t)));
  }
}
template <class T> AI T log2(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::log2(v); });
  else {
    T e, f, t;
    log_parts(x, e, f, t);
    // log2(e) in two parts; the high part has 12 bits, so its product with fh is exact
    T fh = bits<T>(bits<U<T>>(f) & 0xfffff000u), fl = f - fh;
    T a = fh * 0x1.715p+0f, b = mad(fh, splatf<T>(6.8087763963387e-05f), (fl + t) * 1.44269504f);
    return log_edges(x, e + (a + b));
  }
}
template <class T> AI T log1p(T x) {
  return each(x, [](E<T> v) -> E<T> { if constexpr (sizeof(v) == 8) return ::log1p(v); else return ::log1pf(v); });
}

// ---- trigonometry: pi/2 in three parts up to 2^20, libm beyond
template <class T> AI T sin_or_cos(T x, int shift) {
  T n = nearest(x * 0.636619772f);
  T r = mad(n, splatf<T>(-0x1.92p0f), x);
  r = mad(n, splatf<T>(-0x1.fb4p-12f), r);
  r = mad(n, splatf<T>(-7.549789954891882e-08f), r);
  T z = r * r;
  S<T> q = cast<int32_t>(no_nan(clamp_ordered(n, -0x1p22f, 0x1p22f))) + shift;
  T s = mad(r * z, poly(z, -1.6666654611e-1f, 8.3321608736e-3f, -1.9515295891e-4f), r);
  T c = mad(z * z, poly(z, 4.166664568298827e-2f, -1.388731625493765e-3f, 2.443315711809948e-5f), mad(z, splatf<T>(-0.5f), splatf<T>(1)));
  T v = select<T>(to_mask<T>((q & 1) != 0), c, s);
  v = select<T>(to_mask<T>((q & 2) != 0), -v, v);
  auto huge = to_mask<T>(absf(x) > 0x1p18f);
  if (__builtin_expect(any(huge), 0))
    v = select<T>(huge, shift ? each_cold(x, [](float a) { return ::cosf(a); }) : each_cold(x, [](float a) { return ::sinf(a); }), v);
  return v;
}
template <class T> AI T sin(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::sin(v); });
  else return select<T>(to_mask<T>(x == 0), x, sin_or_cos(x, 0));
}
template <class T> AI T cos(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::cos(v); });
  else return sin_or_cos(x, 1);
}

// ---- tanh, erf
template <class T> AI T tanh(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::tanh(v); });
  else {
    T a = absf(x), z = x * x;
    T small = mad(x * z, poly(z, -0.3333328366279602f, 0.13331490755081177f, -0.053743500262498856f, 0.02065059170126915f, -0.005717048421502113f), x);
    T large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
    return select<T>(to_mask<T>(a < 0.625f), copysign(small, x), copysign(large, x));
  }
}
template <class T> AI T erf(T x) {
  if constexpr (sizeof(E<T>) == 8) return each(x, [](double v) { return ::erf(v); });
  else {
    T a = absf(x), z = x * x;
    T small = x * poly(z, 1.1283791065216064f, -0.3761262595653534f, 0.11283600330352783f, -0.02685444802045822f, 0.005189542192965746f, -0.0008020895184017718f, 7.88928591646254e-05f);
    T c = clamp_ordered(a, 0, 4);
    T large = 1.0f - exp(-poly(c, -0.00010440412734169513f, 1.1290866136550903f, 0.6344833374023438f, 0.10655812919139862f, -0.023478910326957703f, 0.0031528316903859377f, -2.3050568415783346e-05f, -8.317311585415155e-05f, 1.5030122085590847e-05f, -9.382314942740777e-07f));
    return select<T>(to_mask<T>(a < 1.0f), small, copysign(large, x));
  }
}

#define KX_LIBM1(name, fn) \
  template <class T> AI T name(T x) { \
    return each(x, [](E<T> v) -> E<T> { if constexpr (sizeof(v) == 8) return ::fn(v); else return ::fn##f(v); }); }
#define KX_LIBM2(name, fn) \
  template <class T> AI T name(T x, T y) { \
    return each2(x, y, [](E<T> v, E<T> w) -> E<T> { if constexpr (sizeof(v) == 8) return ::fn(v, w); else return ::fn##f(v, w); }); }
KX_LIBM1(log10_, log10) KX_LIBM1(tan_, tan) KX_LIBM1(asin_, asin) KX_LIBM1(acos_, acos)
KX_LIBM1(atan_, atan) KX_LIBM1(sinh_, sinh) KX_LIBM1(cosh_, cosh) KX_LIBM1(asinh_, asinh)
KX_LIBM1(acosh_, acosh) KX_LIBM1(atanh_, atanh) KX_LIBM1(cbrt_, cbrt) KX_LIBM1(erfc_, erfc)
KX_LIBM1(lgamma_, lgamma) KX_LIBM1(tgamma_, tgamma) KX_LIBM1(trunc_, trunc) KX_LIBM1(round_, round)
KX_LIBM1(rint_, rint) KX_LIBM1(exp10_, exp10) KX_LIBM1(j0_, j0) KX_LIBM1(j1_, j1)
KX_LIBM2(pow_, pow) KX_LIBM2(atan2_, atan2) KX_LIBM2(fmod_, fmod) KX_LIBM2(remainder_, remainder)
KX_LIBM2(hypot_, hypot) KX_LIBM2(fdim_, fdim) KX_LIBM2(nextafter_, nextafter)
template <class T> AI T inverse_normal_erf(T x) {
  // Giles' approximation of erfinv, then one Newton step in double
  return each(x, [](E<T> v) -> E<T> {
    double x = v, w = -::log((1 - x) * (1 + x)), p;
    if (x != x || x < -1 || x > 1) return __builtin_nanf("");
    if (x == 1 || x == -1) return v * __builtin_inff();
    if (w < 5) {
      w -= 2.5;
      p = 1.50140941 + w * (0.246640727 + w * (-0.00417768164 + w * (-0.00125372503 + w * (0.000218580870 + w * (-4.39150654e-06 + w * (-3.5233877e-06 + w * (3.43273939e-07 + w * 2.81022636e-08)))))));
    } else {
      w = ::sqrt(w) - 3;
      p = 2.83297682 + w * (1.00167406 + w * (0.00943887047 + w * (-0.0076224613 + w * (0.00573950773 + w * (-0.00367342844 + w * (0.00134934322 + w * (0.000100950558 + w * -0.000200214257)))))));
    }
    double y = p * x;
    for (int i = 0; i < 2; i++) y -= (::erf(y) - x) / (1.1283791670955126 * ::exp(-y * y));
    return (E<T>)y;
  });
}
} // namespace kx
