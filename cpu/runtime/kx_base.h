// Vector types, lane access, loads and stores. GCC vector extensions only; no immintrin.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AI static inline __attribute__((always_inline))
#define COLD static __attribute__((noinline, cold))
#define KX_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define KX_UNROLL(n) KX_PRAGMA(clang loop unroll_count(n))
#else
#define KX_UNROLL(n) KX_PRAGMA(GCC unroll n)
#endif
#define LIKELY(x) __builtin_expect(!!(x), 1)

typedef int64_t i64;

namespace kx {

template <class T, int N> struct vector_of { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <class T> struct vector_of<T, 1> { typedef T type; };
template <class T, int N> using V = typename vector_of<T, N>::type;

// element type and lane count of a scalar or vector
template <class T> struct lane_type { typedef T type; static const int lanes = 1; };
#define KX_LANES(T, N) \
  template <> struct lane_type<V<T, N>> { typedef T type; static const int lanes = N; };
#define KX_ALL_LANES(T) KX_LANES(T, 2) KX_LANES(T, 4) KX_LANES(T, 8) KX_LANES(T, 16)
KX_ALL_LANES(float) KX_ALL_LANES(double) KX_ALL_LANES(int8_t) KX_ALL_LANES(uint8_t)
KX_ALL_LANES(int16_t) KX_ALL_LANES(uint16_t) KX_ALL_LANES(int32_t) KX_ALL_LANES(uint32_t)
KX_ALL_LANES(int64_t) KX_ALL_LANES(uint64_t)
KX_LANES(uint8_t, 32) KX_LANES(uint16_t, 32) KX_LANES(int16_t, 32)
template <class T> using E = typename lane_type<T>::type;
template <class T> constexpr int lanes = lane_type<T>::lanes;
// the same lane count with another element type
template <class T, class U> using as = V<U, lanes<T>>;

template <int N> struct sized_int;
template <> struct sized_int<1> { typedef int8_t s; typedef uint8_t u; };
template <> struct sized_int<2> { typedef int16_t s; typedef uint16_t u; };
template <> struct sized_int<4> { typedef int32_t s; typedef uint32_t u; };
template <> struct sized_int<8> { typedef int64_t s; typedef uint64_t u; };
template <class T> using S = as<T, typename sized_int<sizeof(E<T>)>::s>;
template <class T> using U = as<T, typename sized_int<sizeof(E<T>)>::u>;

template <class T> AI E<T> lane(T v, int i) {
  if constexpr (lanes<T> == 1) return v; else return v[i];
}
template <class To, class From> AI To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits");
  To out; __builtin_memcpy(&out, &v, sizeof out); return out;
}
template <class To, class From> AI as<From, To> cast(From v) {
  if constexpr (lanes<From> == 1) return (To)v;
#if defined(__AVX512F__)
  // one instruction each; GCC 12 makes three or four of them
  else if constexpr (sizeof(To) == 4 && sizeof(E<From>) == 2 && lanes<From> == 16 && (E<From>)-1 > 0 && (To)0.5 == 0) {
    V<To, 16> w; asm("vpmovzxwd %1,%0" : "=v"(w) : "v"(v)); return w;
  } else if constexpr (sizeof(To) == 2 && sizeof(E<From>) == 4 && lanes<From> == 16 && (To)0.5 == 0 && (E<From>)0.5 == 0) {
    V<To, 16> w; asm("vpmovdw %1,%0" : "=v"(w) : "v"(v)); return w;
  } else if constexpr (sizeof(To) == 4 && sizeof(E<From>) == 1 && lanes<From> == 16 && (E<From>)-1 > 0 && (To)0.5 == 0) {
    V<To, 16> w; asm("vpmovzxbd %1,%0" : "=v"(w) : "v"(v)); return w;
  } else if constexpr (sizeof(To) == 1 && sizeof(E<From>) == 4 && lanes<From> == 16 && (E<From>)0.5 == 0) {
    V<To, 16> w; asm("vpmovdb %1,%0" : "=v"(w) : "v"(v)); return w;
  } else if constexpr (sizeof(To) == 2 && sizeof(E<From>) == 1 && lanes<From> == 32 && (E<From>)-1 > 0) {
    V<To, 32> w; asm("vpmovzxbw %1,%0" : "=v"(w) : "v"(v)); return w;
  } else if constexpr (sizeof(To) == 2 && sizeof(E<From>) == 1 && lanes<From> == 16 && (E<From>)-1 > 0) {
    V<To, 16> w; asm("vpmovzxbw %1,%0" : "=v"(w) : "v"(v)); return w;
  }
#endif
  // u8 -> 32 bit in one step becomes dozens of instructions in GCC 12; two steps do not
  else if constexpr (sizeof(To) == 4 && sizeof(E<From>) == 1) {
    typedef typename sized_int<2>::s s16; typedef typename sized_int<2>::u u16;
    if constexpr ((E<From>)-1 < 0)
      return __builtin_convertvector(__builtin_convertvector(v, V<s16, lanes<From>>), V<To, lanes<From>>);
    else
      return __builtin_convertvector(__builtin_convertvector(v, V<u16, lanes<From>>), V<To, lanes<From>>);
  } else return __builtin_convertvector(v, V<To, lanes<From>>);
}
template <class T, class X> AI T splat(X x) {
  if constexpr (lanes<T> == 1) return (T)x; else return (T){} + (E<T>)x;
}
template <class T> AI T splatf(E<T> x) {
  T out;
  if constexpr (lanes<T> == 1) out = x;
  else { for (int i = 0; i < lanes<T>; i++) out[i] = x; }
  return out;
}

// masks: bool for one lane, else int32 lanes of 0 or -1
template <int N> struct mask_of { typedef V<int32_t, N> type; };
template <> struct mask_of<1> { typedef bool type; };
template <class T> using M = typename mask_of<lanes<T>>::type;
template <class T, class C> AI M<T> to_mask(C c) {
  if constexpr (lanes<T> == 1) return (bool)c;
  else if constexpr (sizeof(E<C>) == 4) return (M<T>)c;
  else return __builtin_convertvector(c, M<T>);
}
template <int N> AI typename mask_of<N>::type splat_mask(bool b) {
  if constexpr (N == 1) return b; else return V<int32_t, N>{} - (int32_t)b;
}
template <class T> AI T select(M<T> m, T a, T b) {
  if constexpr (lanes<T> == 1) return m ? a : b;
  else return __builtin_convertvector(m, S<T>) ? a : b;
}
// mask to and from integers
template <class To, class From> AI as<From, To> mask_to_int(From m, bool sign) {
  if constexpr (lanes<From> == 1) return sign ? -(To)m : (To)m;
  else { auto w = __builtin_convertvector(m, V<To, lanes<From>>); return sign ? w : (w & (To)1); }
}
template <class T> AI M<T> int_to_mask(T v) {
  if constexpr (lanes<T> == 1) return (bool)(v & 1);
  else return __builtin_convertvector(-(v & (E<T>)1), M<T>);
}

template <int N> AI V<int32_t, N> iota() {
  if constexpr (N == 1) return 0;
  else if constexpr (N == 2) return V<int32_t, N>{0, 1};
  else if constexpr (N == 4) return V<int32_t, N>{0, 1, 2, 3};
  else if constexpr (N == 8) return V<int32_t, N>{0, 1, 2, 3, 4, 5, 6, 7};
  else return V<int32_t, N>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
// lanes whose numbers are known: GCC takes a vector of them, clang a list
template <int... I> struct order {};
template <class T, T... I> struct numbers { typedef order<(int)I...> type; };
#if defined(__clang__)
template <int N> using each_lane = typename __make_integer_seq<numbers, int, N>::type;
template <class T, int... I> AI T shuffled(T a, T b, order<I...>) { return __builtin_shufflevector(a, b, I...); }
#else
template <int N> using each_lane = order<__integer_pack(N)...>;
template <class T, int... I> AI T shuffled(T a, T b, order<I...>) { return __builtin_shuffle(a, b, S<T>{I...}); }
#endif
template <int H, int... I> AI auto rotated(order<I...>) { return order<((I + H) & (int)(sizeof...(I) - 1))...>{}; }
template <int H, class T> AI T rotate(T v) { return shuffled(v, v, rotated<H>(each_lane<lanes<T>>{})); }
// groups of H lanes of a and of b in turn: the even groups of both, or the odd ones
template <int H, bool ODD, int... I> AI auto in_turn(order<I...>) {
  return order<((I & H) ? (int)sizeof...(I) + I - (ODD ? 0 : H) : I + (ODD ? H : 0))...>{};
}
template <int H, bool ODD, class T> AI T groups(T a, T b) { return shuffled(a, b, in_turn<H, ODD>(each_lane<lanes<T>>{})); }
template <int N> AI V<int32_t, N> in_range(i64 lo, i64 hi) {
  V<int32_t, N> at = iota<N>();
  int32_t l = lo < 0 ? 0 : lo > N ? N : (int32_t)lo, h = hi < 0 ? 0 : hi > N ? N : (int32_t)hi;
  return (at >= l) & (at < h);
}

template <class T, int N> AI V<T, N> load(const T *p) {
  V<T, N> v; __builtin_memcpy(&v, p, sizeof v); return v;
}
template <class T, int N> AI void store(T *p, V<T, N> v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T, int N> COLD void load_some(V<T, N> *out, const T *p, i64 lo, i64 hi) {
  for (i64 i = lo < 0 ? 0 : lo; i < hi && i < N; i++) (*out)[i] = p[i];
}
template <class T, int N> COLD void store_some(T *p, const V<T, N> *v, i64 lo, i64 hi) {
  for (i64 i = lo < 0 ? 0 : lo; i < hi && i < N; i++) p[i] = (*v)[i];
}
// strips known to lie inside the bounds, and strips that must look
struct whole {};
struct part {};
template <class T, int N> AI V<T, N> load_range(whole, const T *p, i64 lo, i64 hi, V<T, N> other) {
  return load<T, N>(p);
}
template <class T, int N> AI V<T, N> load_range(part, const T *p, i64 lo, i64 hi, V<T, N> other) {
  if (LIKELY(lo <= 0 && hi >= N)) return load<T, N>(p);
  if (lo < N && hi > 0) { V<T, N> v = other; load_some<T, N>(&v, p, lo, hi); return v; }
  return other;
}
template <class T, int N> AI void store_range(whole, T *p, i64 lo, i64 hi, V<T, N> v) { store<T, N>(p, v); }
template <class T, int N> AI void store_range(part, T *p, i64 lo, i64 hi, V<T, N> v) {
  if (LIKELY(lo <= 0 && hi >= N)) store<T, N>(p, v);
  else if (lo < N && hi > 0) store_some<T, N>(p, &v, lo, hi);
}
template <int N> AI V<int32_t, N> in_range(whole, i64 lo, i64 hi) { return V<int32_t, N>{} - 1; }
template <int N> AI V<int32_t, N> in_range(part, i64 lo, i64 hi) { return in_range<N>(lo, hi); }
template <class T> AI bool all_true(T m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 64) {
    uint16_t k; asm("vptestmd %1,%1,%0" : "=Yk"(k) : "v"(m)); return k == 0xffff;
  } else
#endif
  if constexpr (sizeof(T) < 16) { for (int i = 0; i < lanes<T>; i++) if (!m[i]) return false; return true; }
  else {
    typedef long long L2 __attribute__((vector_size(16)));
    L2 part[sizeof(T) / 16]; __builtin_memcpy(part, &m, sizeof m);
    for (unsigned i = 1; i < sizeof(T) / 16; i++) part[0] &= part[i];
    return (part[0][0] & part[0][1]) == -1;
  }
}
template <class T, int N> AI V<T, N> load_masked(const T *p, V<int32_t, N> m, V<T, N> other) {
  for (int i = 0; i < N; i++) if (m[i]) other[i] = p[i];
  return other;
}
template <class T, int N> AI void store_masked(T *p, V<int32_t, N> m, V<T, N> v) {
  for (int i = 0; i < N; i++) if (m[i]) p[i] = v[i];
}
// lanes at byte address p + i * stride + offset(i)
template <class T, int N, class F>
AI V<T, N> gather(i64 p, i64 stride, V<int32_t, N> m, V<T, N> v, F offset) {
  for (int i = 0; i < N; i++) if (m[i]) v[i] = *(const T *)(p + i * stride + offset(i));
  return v;
}
template <class T, int N, class F>
AI void scatter(i64 p, i64 stride, V<int32_t, N> m, V<T, N> v, F offset) {
  for (int i = 0; i < N; i++) if (m[i]) *(T *)(p + i * stride + offset(i)) = v[i];
}
// lanes at p + offset[i] * sizeof(T); consecutive offsets, the usual case, are one vector load
template <class T, int N, class O>
AI V<T, N> gather_or_load(i64 p, O offset, V<int32_t, N> m, V<T, N> v) {
  E<O> first = offset[0];
  if (LIKELY(all_true(m & to_mask<O>(offset - cast<E<O>>(iota<N>()) == splat<O>(first)))))
    return load<T, N>((const T *)p + (i64)first);
  for (int i = 0; i < N; i++) if (m[i]) v[i] = ((const T *)p)[(i64)offset[i]];
  return v;
}
template <class T, int N> AI void store_strided(T *p, i64 stride, V<T, N> v) {
  for (int i = 0; i < N; i++) p[i * stride] = v[i];
}
template <class T, int N> AI V<T, N> load_strided(const T *p, i64 stride) {
  if (stride == 1) return load<T, N>(p);
  V<T, N> v;
  for (int i = 0; i < N; i++) v[i] = p[i * stride];
  return v;
}
struct Context {
  const int32_t *grid;
  const uint64_t *extents;
  const char *volatile fault;
  void *check;
  char message[1024];
};
AI void fail(Context *c, const char *message) {
  const char *none = nullptr;
  __atomic_compare_exchange_n(&c->fault, &none, message, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

} // namespace kx
