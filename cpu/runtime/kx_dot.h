// tl.dot on packed tiles: register-blocked micro-kernels over panels of B.
#pragma once
#include "kx_cast.h"
#include "kx_math.h"

namespace kx {

constexpr int W = KX_VECTOR_BYTES / 4; // fp32 lanes of a register
typedef V<float, W> fv;
typedef V<uint32_t, W> uv;

// c + odd products, then + even products; products of bf16 are exact in fp32, so every machine
// gives the same bits (the instruction flushes subnormals)
AI fv dot2(fv c, uv a, uv b) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2,%1,%0" : "+v"(c) : "v"(a), "v"(b));
  return c;
#else
  c = mad(bits<fv>(a & 0xffff0000u), bits<fv>(b & 0xffff0000u), c);
  return mad(bits<fv>(a << 16), bits<fv>(b << 16), c);
#endif
}

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

// Packed B: panels of P columns, each [rows of words][P]; here from its transpose [N][K words]
template <int N, int KW, int P> static void transpose_words(const uint32_t *b, uint32_t *out) {
  if constexpr (N % W == 0 && KW % W == 0) {
    for (int n = 0; n < N; n += W)
      for (int k = 0; k < KW; k += W) {
        uv r[W];
        KX_UNROLL(32) for (int i = 0; i < W; i++) r[i] = load<uint32_t, W>(b + (n + i) * KW + k);
        transpose(r);
        KX_UNROLL(32) for (int i = 0; i < W; i++) store<uint32_t, W>(out + n / P * (KW * P) + (k + i) * P + n % P, r[i]);
      }
  } else
    for (int k = 0; k < KW; k++)
      for (int n = 0; n < N; n++) out[n / P * (KW * P) + k * P + n % P] = b[n * KW + k];
}

// rows k and k + 1 of B [K][N] as words of pairs, in the same panels
template <int N, int K, int P> static void pair_rows(const uint16_t *b, uint32_t *out) {
  for (int k = 0; k < K / 2; k++)
    for (int n = 0; n < N; n += W) {
      const uint16_t *p = b + 2 * k * N + n;
      uv low = cast<uint32_t>(load<uint16_t, W>(p)), high = cast<uint32_t>(load<uint16_t, W>(p + N));
      store<uint32_t, W>(out + n / P * (K / 2 * P) + k * P + n % P, low | (high << 16));
    }
}

template <int MR, int NV>
static void block_bf16(const uint16_t *a, int lda, const uint32_t *b, int ldb, float *c, int ldc, int pairs) {
  fv s[MR][NV];
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = load<float, W>(c + i * ldc + j * W);
  for (int k = 0; k < pairs; k++) {
    uv r[NV];
    KX_UNROLL(32) for (int j = 0; j < NV; j++) r[j] = load<uint32_t, W>(b + k * ldb + j * W);
    KX_UNROLL(32) for (int i = 0; i < MR; i++) {
      uint32_t x;
      memcpy(&x, a + i * lda + 2 * k, 4);
      KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = dot2(s[i][j], uv{} + x, r[j]);
    }
  }
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) store<float, W>(c + i * ldc + j * W, s[i][j]);
}
template <class T, int MR, int NV>
static void block_fma(const T *a, int lda, const T *b, int ldb, T *c, int ldc, int depth) {
  const int L = KX_VECTOR_BYTES / sizeof(T);
  typedef V<T, L> R;
  R s[MR][NV];
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = load<T, L>(c + i * ldc + j * L);
  for (int k = 0; k < depth; k++) {
    R r[NV];
    KX_UNROLL(32) for (int j = 0; j < NV; j++) r[j] = load<T, L>(b + k * ldb + j * L);
    KX_UNROLL(32) for (int i = 0; i < MR; i++) {
      R x = R{} + a[i * lda + k];
      KX_UNROLL(32) for (int j = 0; j < NV; j++) {
        if constexpr ((T)0.5 != 0) s[i][j] = fma(x, r[j], s[i][j]); else s[i][j] += x * r[j];
      }
    }
  }
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) store<T, L>(c + i * ldc + j * L, s[i][j]);
}

// A few rows of A against rows of B: lanes run along K, so that B is read once and as it lies.
// W sums at a time, each in the lanes of one register; `words` are pairs of bf16 or single floats.
constexpr bool few_rows(int m, int n, int words) {
  return m <= 16 && (m & (m - 1)) == 0 && words % W == 0 && n % (m >= 4 ? W / 4 : W / m) == 0;
}
AI fv few_step(fv c, uv a, uv b) { return dot2(c, a, b); }
AI fv few_step(fv c, fv a, fv b) { return fma(a, b, c); }
// lane i of the result is the sum of r[i]
template <int H = W / 2> AI fv sum_each(fv *r) {
  KX_UNROLL(32) for (int i = 0; i < H; i++) r[i] = groups<H, false>(r[i], r[i + H]) + groups<H, true>(r[i], r[i + H]);
  if constexpr (H > 1) return sum_each<H / 2>(r);
  return r[0];
}
template <class T, int M, int N, int WORDS> static void dot_few_rows(const T *a, const T *b, float *c) {
  constexpr int MB = M >= 4 ? 4 : M, NB = W / MB;
  for (int n = 0; n < N; n += NB)
    for (int m = 0; m < M; m += MB) {
      fv s[W]{};
      for (int k = 0; k < WORDS; k += W) {
        V<T, W> x[MB];
        KX_UNROLL(32) for (int i = 0; i < MB; i++) x[i] = load<T, W>(a + (m + i) * WORDS + k);
        KX_UNROLL(32) for (int j = 0; j < NB; j++) {
          V<T, W> y = load<T, W>(b + (n + j) * WORDS + k);
          KX_UNROLL(32) for (int i = 0; i < MB; i++) s[i * NB + j] = few_step(s[i * NB + j], x[i], y);
        }
      }
      fv sum = sum_each(s);
      for (int i = 0; i < MB; i++)
        for (int j = 0; j < NB; j++) c[(m + i) * N + n + j] += sum[i * NB + j];
    }
}

// registers: 32 of 64 bytes (and on aarch64), 16 elsewhere
#if KX_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 3, VECTORS = 4;
#endif

template <int M, int N, int K, bool TRANSPOSED>
static void dot_bf16(const uint16_t *a, const uint16_t *b, float *c, int32_t *panels) {
  if constexpr (TRANSPOSED && K % 2 == 0 && few_rows(M, N, K / 2)) {
    dot_few_rows<uint32_t, M, N, K / 2>((const uint32_t *)a, (const uint32_t *)b, c);
  } else if constexpr (K % 2 || N % W) {
    for (int i = 0; i < M; i++)
      for (int k = 0; k < K; k++) {
        float x = bf16_to_f32(a[i * K + k]);
        for (int j = 0; j < N; j++)
          c[i * N + j] = __builtin_fmaf(x, bf16_to_f32(b[TRANSPOSED ? j * K + k : k * N + j]), c[i * N + j]);
      }
  } else {
    constexpr int NV = N / W < VECTORS ? N / W : VECTORS, P = NV * W, TAIL = M % ROWS;
    uint32_t *p = (uint32_t *)panels;
    if constexpr (TRANSPOSED) transpose_words<N, K / 2, P>((const uint32_t *)b, p);
    else pair_rows<N, K, P>(b, p);
    for (int j = 0; j < N; j += P, p += K / 2 * P) {
      int i = 0;
      for (; i + ROWS <= M; i += ROWS) block_bf16<ROWS, NV>(a + i * K, K, p, P, c + i * N + j, N, K / 2);
      if constexpr (TAIL != 0) block_bf16<TAIL, NV>(a + i * K, K, p, P, c + i * N + j, N, K / 2);
    }
  }
}

template <class T, int M, int N, int K, bool TRANSPOSED>
static void dot_fma(const T *a, const T *b, T *c, T *panels) {
  constexpr int L = KX_VECTOR_BYTES / sizeof(T);
  if constexpr (TRANSPOSED && sizeof(T) == 4 && (T)0.5 != 0 && few_rows(M, N, K)) {
    dot_few_rows<T, M, N, K>(a, b, c);
  } else if constexpr (N % L) {
    for (int i = 0; i < M; i++)
      for (int k = 0; k < K; k++)
        for (int j = 0; j < N; j++) {
          T y = b[TRANSPOSED ? j * K + k : k * N + j];
          if constexpr ((T)0.5 != 0) c[i * N + j] = fma(a[i * K + k], y, c[i * N + j]);
          else c[i * N + j] += a[i * K + k] * y;
        }
  } else {
    constexpr int NV = N / L < VECTORS ? N / L : VECTORS, P = NV * L, TAIL = M % ROWS;
    constexpr bool packed = TRANSPOSED && sizeof(T) == 4;
    const T *p = b;
    if constexpr (packed) transpose_words<N, K, P>((const uint32_t *)b, (uint32_t *)panels);
    else if constexpr (TRANSPOSED)
      for (int k = 0; k < K; k++) for (int j = 0; j < N; j++) panels[k * N + j] = b[j * K + k];
    if constexpr (TRANSPOSED) p = panels;
    constexpr int step = packed ? K * P : P, ldb = packed ? P : N;
    for (int j = 0; j < N; j += P, p += step) {
      int i = 0;
      for (; i + ROWS <= M; i += ROWS) block_fma<T, ROWS, NV>(a + i * K, K, p, ldb, c + i * N + j, N, K);
      if constexpr (TAIL != 0) block_fma<T, TAIL, NV>(a + i * K, K, p, ldb, c + i * N + j, N, K);
    }
  }
}
template <int M, int N, int K, bool TR> static void dot_f32(const float *a, const float *b, float *c, float *p) { dot_fma<float, M, N, K, TR>(a, b, c, p); }
template <int M, int N, int K, bool TR> static void dot_f64(const double *a, const double *b, double *c, double *p) { dot_fma<double, M, N, K, TR>(a, b, c, p); }
template <int M, int N, int K, bool TR> static void dot_i32(const int32_t *a, const int32_t *b, int32_t *c, int32_t *p) { dot_fma<int32_t, M, N, K, TR>(a, b, c, p); }

// ---- microscaled operands (OCP MX): blocks of K share one scale; all values are exact in fp32
struct e8m0 { static float scale(uint8_t s) { return s == 255 ? __builtin_nanf("") : __builtin_ldexpf(1, (int)s - 127); } };
struct e4m3_scale { static float scale(uint8_t s) { return e4m3_to_f32(s); } };
struct unscaled { static float scale(uint8_t) { return 1; } };
AI float e2m1_to_f32(int nibble) {
  const float values[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return nibble & 8 ? -values[nibble & 7] : values[nibble & 7];
}
// `value(row, k)` of an operand whose scales are [row][K / GROUP], written to out[row * rs + k * ks]
template <class SCALE, int ROWS_, int K, int GROUP, class F>
static void scaled_tile(F value, const uint8_t *scales, float *out, int rs, int ks) {
  for (int r = 0; r < ROWS_; r++)
    for (int k = 0; k < K; k++)
      out[r * rs + k * ks] = value(r, k) * SCALE::scale(scales ? scales[r * (K / GROUP) + k / GROUP] : 0);
}
} // namespace kx
