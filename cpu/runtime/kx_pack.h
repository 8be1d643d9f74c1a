// How the operands of tl.dot lie, and packing them for the micro-kernels of kx_dot.h.
#pragma once
#include "kx_cast.h"
#include "kx_math.h"

#define INLINE inline __attribute__((always_inline)) // of members

namespace kx {

constexpr int W = KX_VECTOR_BYTES / 4; // fp32 lanes of a register
typedef V<float, W> fv;
typedef V<uint32_t, W> uv;
typedef V<uint16_t, 2 * W> hv;

struct e4m3 { uint8_t code; };
struct e5m2 { uint8_t code; };
AI hv halves(const uint16_t *p) { return load<uint16_t, 2 * W>(p); }
AI hv halves(const e4m3 *p) { return e4m3_to_bf16(load<uint8_t, 2 * W>((const uint8_t *)p)); }
AI hv halves(const e5m2 *p) { return e5m2_to_bf16(load<uint8_t, 2 * W>((const uint8_t *)p)); }
AI uint16_t stored(uint16_t x) { return x; }
AI uint16_t stored(e4m3 x) { return e4m3_to_bf16(x.code); }
AI uint16_t stored(e5m2 x) { return e5m2_to_bf16(x.code); }
AI float stored(float x) { return x; }
AI float number(uint16_t x) { return bf16_to_f32(x); }
AI float number(e4m3 x) { return e4m3_to_f32(x.code); }
AI float number(e5m2 x) { return e5m2_to_f32(x.code); }

// a tile in scratch memory: its row i
template <class T, int LD> struct Tile {
  typedef T type;
  const T *base;
  INLINE const T *operator()(int i) const { return base + i * LD; }
  INLINE void fetch(int i, int column, int steps = 1) const {}
};
// rows in memory, read where they lie; the next tile's are `step` bytes further
template <class T> struct Rows {
  typedef T type;
  const i64 *row;
  i64 step;
  INLINE const T *operator()(int i) const { return (const T *)row[i]; }
  // ask for elements of the tile that many steps on, where they start a cache line of the row
  INLINE void fetch(int i, int column, int steps = 1) const {
    if (column * sizeof(T) % 64 == 0)
      __builtin_prefetch((const char *)row[i] + steps * step + column * sizeof(T), 0, 2);
  }
};
// what rows with a false mask point at
constexpr int MOST_ROW_BYTES = 4096;
alignas(64) static const char nothing[MOST_ROW_BYTES]{};

// W x W words, transposed in log2(W) rounds of two-source shuffles
template <int H = W / 2> AI void transpose(uv *r) {
  KX_UNROLL(32) for (int i = 0; i < W; i++)
    if (!(i & H)) {
      uv a = r[i], b = r[i + H];
      r[i] = groups<H, false>(a, b);
      r[i + H] = groups<H, true>(a, b);
    }
  if constexpr (H > 1) transpose<H / 2>(r);
}

// one word: two neighbours in bf16, or a float
AI uv words(const float *p) { return bits<uv>(load<float, W>(p)); }
AI uv words(const uint32_t *p) { return load<uint32_t, W>(p); }
AI uv words(const int32_t *p) { return bits<uv>(load<int32_t, W>(p)); }
template <class T> AI uv words(const T *p) { return bits<uv>(halves(p)); }
template <class T> constexpr int per_word = sizeof(T) >= 4 ? 1 : 2;

// Packed B: panels of P columns, each [words along K][P]; here from rows along K, N of them
template <int N, int KW, int P, class B> static void transpose_words(B b, uint32_t *out) {
  typedef typename B::type T;
  constexpr int STEP = per_word<T>;
  if constexpr (N % W == 0 && KW % W == 0) {
    for (int n = 0; n < N; n += W)
      for (int k = 0; k < KW; k += W) {
        uv r[W];
        KX_UNROLL(32) for (int i = 0; i < W; i++) {
          b.fetch(n + i, k * STEP);
          r[i] = words(b(n + i) + k * STEP);
        }
        transpose(r);
        KX_UNROLL(32) for (int i = 0; i < W; i++) store<uint32_t, W>(out + n / P * (KW * P) + (k + i) * P + n % P, r[i]);
      }
  } else
    for (int k = 0; k < KW; k++)
      for (int n = 0; n < N; n++) {
        uint32_t word;
        if constexpr (STEP == 1) memcpy(&word, b(n) + k, 4);
        else word = stored(b(n)[2 * k]) | (uint32_t)stored(b(n)[2 * k + 1]) << 16;
        out[n / P * (KW * P) + k * P + n % P] = word;
      }
}
// words of the pairs (x[j], y[j]) in order: the lower W of them, or the higher
template <int FIRST, int... I> AI auto paired(order<I...>) { return order<(I / 2 + FIRST + (I & 1) * 2 * W)...>{}; }
AI void pair(hv x, hv y, uv *out) {
  out[0] = bits<uv>(shuffled(x, y, paired<0>(each_lane<2 * W>{})));
  out[1] = bits<uv>(shuffled(x, y, paired<W>(each_lane<2 * W>{})));
}
// the same panels from K rows of N columns; panels may be LD words per pair apart
template <int N, int K, int P, int LD = P, class B> static void pair_rows(B b, uint32_t *out) {
  for (int k = 0; k < K / 2; k++) {
    if constexpr (N % (2 * W)) {
      for (int n = 0; n < N; n++)
        out[n / P * (K / 2 * LD) + k * LD + n % P] = stored(b(2 * k)[n]) | (uint32_t)stored(b(2 * k + 1)[n]) << 16;
    } else for (int n = 0; n < N; n += 2 * W) {
      b.fetch(2 * k, n);
      b.fetch(2 * k + 1, n);
      uv r[2];
      pair(halves(b(2 * k) + n), halves(b(2 * k + 1) + n), r);
      KX_UNROLL(32) for (int h = 0; h < 2; h++) {
        int at = n + h * W;
        store<uint32_t, W>(out + at / P * (K / 2 * LD) + k * LD + at % P, r[h]);
      }
    }
  }
}
// K rows of N words, one below the other
template <int N, int K, class B> static void copy_words(B b, uint32_t *out) {
  constexpr int STEP = per_word<typename B::type>;
  for (int k = 0; k < K; k++)
    for (int n = 0; n < N; n += W) {
      b.fetch(k, n * STEP);
      store<uint32_t, W>(out + k * N + n, words(b(k) + n * STEP));
    }
}
} // namespace kx
