// tl.dot: register-blocked micro-kernels over packed operands, and a stream for a few rows.
#pragma once
#include "kx_pack.h"

namespace kx {

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

// C [MR][NV registers] + A B: A's words are AM apart along M and AK along K, B's rows P words
template <int MR, int NV, int AM, int AK>
static void block_bf16(const uint32_t *a, const uint32_t *b, float *c, int ldc, int pairs) {
  fv s[MR][NV];
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = load<float, W>(c + i * ldc + j * W);
  for (int k = 0; k < pairs; k++) {
    uv r[NV];
    KX_UNROLL(32) for (int j = 0; j < NV; j++) r[j] = load<uint32_t, W>(b + (k * NV + j) * W);
    KX_UNROLL(32) for (int i = 0; i < MR; i++) {
      uv x = uv{} + a[i * AM + k * AK];
      KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = dot2(s[i][j], x, r[j]);
    }
  }
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) store<float, W>(c + i * ldc + j * W, s[i][j]);
}
template <class T, int MR, int NV, int AM, int AK>
static void block_fma(const T *a, const T *b, int ldb, T *c, int ldc, int depth) {
  const int L = KX_VECTOR_BYTES / sizeof(T);
  typedef V<T, L> R;
  R s[MR][NV];
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) s[i][j] = load<T, L>(c + i * ldc + j * L);
  for (int k = 0; k < depth; k++) {
    R r[NV];
    KX_UNROLL(32) for (int j = 0; j < NV; j++) r[j] = load<T, L>(b + k * ldb + j * L);
    KX_UNROLL(32) for (int i = 0; i < MR; i++) {
      R x = R{} + a[i * AM + k * AK];
      KX_UNROLL(32) for (int j = 0; j < NV; j++) {
        if constexpr ((T)0.5 != 0) s[i][j] = fma(x, r[j], s[i][j]); else s[i][j] += x * r[j];
      }
    }
  }
  KX_UNROLL(32) for (int i = 0; i < MR; i++) KX_UNROLL(32) for (int j = 0; j < NV; j++) store<T, L>(c + i * ldc + j * L, s[i][j]);
}

// registers: 32 of 64 bytes (and on aarch64), 16 elsewhere
#if KX_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 3, VECTORS = 4;
#endif

// A few rows of A against rows of B that lie along K: B is read once, where it is. A register of LANES
// lanes (of several registers, where they are narrower) holds G words of each of the M rows of A; it is
// multiplied by G words of a row of B, repeated M times. Each sum is taken in G lanes and then in a tree,
// the same one for every width of registers.
constexpr int BYTES_AHEAD = 32768;
constexpr int LANES = 16, PARTS = LANES / W;
constexpr bool few_rows(int m, int n, int words) {
  return m <= LANES && (m & (m - 1)) == 0 && words % LANES == 0 && n % LANES == 0;
}
// rows of B whose sums are held in registers at a time
constexpr int HELD = PARTS == 1 ? 16 : ROWS == 6 ? 4 : 8 / PARTS;
AI fv few_step(fv c, uv a, uv b) { return dot2(c, a, b); }
AI fv few_step(fv c, fv a, fv b) { return fma(a, b, c); }
// register `part` of G words, repeated
template <int G> AI uv repeat(const uint32_t *p, int part) {
  if constexpr (G >= W) return load<uint32_t, W>(p + part * W % G);
  else if constexpr (G == 1) return uv{} + *p;
  else if constexpr (G == 2) {
    uint64_t two; memcpy(&two, p, 8);
    return bits<uv>(V<uint64_t, W / 2>{} + two);
  }
#if defined(__AVX512F__)
  else if constexpr (G == 4) { uv r; asm("vbroadcasti32x4 %1,%0" : "=v"(r) : "m"(*(const uint32_t(*)[4])p)); return r; }
  else { uv r; asm("vbroadcasti64x4 %1,%0" : "=v"(r) : "m"(*(const uint32_t(*)[8])p)); return r; }
#else
  else { uv r; for (int i = 0; i < W; i++) r[i] = p[i % G]; return r; }
#endif
}
// sums over groups of G lanes of 16 rows: r[m * G] gets row m of the result, a lane for each of the 16
template <int G, int H = LANES / 2> AI void exchange_rows(fv (*r)[PARTS]) {
  KX_UNROLL(32) for (int i = 0; i < LANES; i += G)
    if (!(i & H))
      KX_UNROLL(32) for (int p = 0; p < PARTS; p++) {
        if constexpr (H < W) {
          fv x = r[i][p], y = r[i + H][p];
          r[i][p] = groups<H, false>(x, y), r[i + H][p] = groups<H, true>(x, y);
        } else if (!(p & H / W)) {
          fv x = r[i][p | H / W];
          r[i][p | H / W] = r[i + H][p], r[i + H][p] = x;
        }
      }
  if constexpr (H > G) exchange_rows<G, H / 2>(r);
}
template <int G, int H = G / 2> AI void sum_groups(fv (*r)[PARTS]) {
  if constexpr (H > 0) {
    // not the rows that an earlier round has added to others: they have one of its bits
    KX_UNROLL(32) for (int i = 0; i < LANES; i++)
      if (!(i & H) && (i & (G - 1)) < 2 * H)
        KX_UNROLL(32) for (int p = 0; p < PARTS; p++) {
          if constexpr (H < W) r[i][p] = groups<H, false>(r[i][p], r[i + H][p]) + groups<H, true>(r[i][p], r[i + H][p]);
          else if (!(p & H / W)) {
            fv one = r[i][p] + r[i][p | H / W], other = r[i + H][p] + r[i + H][p | H / W];
            r[i][p] = one, r[i][p | H / W] = other;
          }
        }
    sum_groups<G, H / 2>(r);
  } else if constexpr (G < LANES) exchange_rows<G>(r);
}
template <int M, int WORDS> static void pack_few(const uint32_t *a, uint32_t *out) {
  constexpr int G = LANES / M;
  if constexpr (M == LANES && PARTS == 1) transpose_words<M, WORDS, M>(Tile<uint32_t, WORDS>{a}, out);
  else if constexpr (M > 1)
    for (int k = 0; k < WORDS; k += G)
      KX_UNROLL(32) for (int m = 0; m < M; m++) memcpy(out + k * M + m * G, a + m * WORDS + k, 4 * G);
}
template <int M, int N, int WORDS, class B> static void dot_few_rows(const uint32_t *a, B b, float *c, uint32_t *packed) {
  typedef typename B::type T;
  constexpr int G = LANES / M, STEP = per_word<T>;
  // 16 rows' chunk at a time, copied (and converted) where registers do not hold the addresses
  constexpr int CHUNK = WORDS % 128 == 0 ? 128 : WORDS % 64 == 0 ? 64 : WORDS % 32 == 0 ? 32 : 16;
  constexpr bool copied = G < 4 || (sizeof(T) == 1 && M > 1);
  alignas(64) uint32_t held[copied ? LANES * CHUNK : 1];
  // sums of floats are taken in four parts at least: their own rounding is all that limits them
  constexpr int SETS = sizeof(T) == 4 && G < 4 ? 4 / G : 1, HERE = HELD > SETS ? HELD / SETS : 1;
  constexpr int BLOCKS = N / LANES * (WORDS / CHUNK), AHEAD = BYTES_AHEAD / (LANES * CHUNK * STEP * (int)sizeof(T));
  if constexpr (M > 1) { pack_few<M, WORDS>(a, packed); a = packed; }
  for (int n = 0; n < N; n += LANES) {
    fv s[LANES][PARTS], u[LANES][SETS][PARTS]{};
    for (int from = 0; from < WORDS; from += CHUNK) {
      if constexpr (copied)
        for (int i = 0; i < LANES; i++)
          for (int k = 0; k < CHUNK; k += W) store<uint32_t, W>(held + i * CHUNK + k, words(b(n + i) + (from + k) * STEP));
      // the rows and the column that will be read a while later, of this tile or a later one
      const int later = n / LANES * (WORDS / CHUNK) + from / CHUNK + AHEAD;
      const int row = later / (WORDS / CHUNK) % (N / LANES) * LANES, column = later % (WORDS / CHUNK) * CHUNK * STEP;
      KX_UNROLL(32) for (int first = 0; first < LANES; first += HERE) {
        fv t[HERE][SETS][PARTS];
        memcpy(t, u[first], sizeof t);
        for (int block = 0; block < CHUNK; block += LANES) {
          KX_UNROLL(32) for (int i = 0; i < HERE; i++) b.fetch(row + first + i, column + block * STEP, later / BLOCKS);
          for (int at = block; at < block + LANES; at += G * SETS)
            KX_UNROLL(32) for (int each = 0; each < SETS * PARTS; each++) {
              const int set = each / PARTS, p = each % PARTS, k = at + set * G;
              uv x = load<uint32_t, W>(a + (from + k) * M + p * W);
              KX_UNROLL(32) for (int i = 0; i < HERE; i++) {
                uv y;
                if constexpr (copied) y = repeat<G>(held + (first + i) * CHUNK + k, p);
                else if constexpr (M == 1) y = words(b(n + first + i) + (from + k + p * W) * STEP);
                else y = repeat<G>((const uint32_t *)b(n + first + i) + from + k, p);
                if constexpr (sizeof(T) == 4) t[i][set][p] = few_step(t[i][set][p], bits<fv>(x), bits<fv>(y));
                else t[i][set][p] = few_step(t[i][set][p], x, y);
              }
            }
        }
        memcpy(u[first], t, sizeof t);
      }
    }
    KX_UNROLL(32) for (int i = 0; i < LANES; i++)
      KX_UNROLL(32) for (int p = 0; p < PARTS; p++) {
        KX_UNROLL(32) for (int h = SETS / 2; h >= 1; h /= 2)
          KX_UNROLL(32) for (int set = 0; set < h; set++) u[i][set][p] += u[i][set + h][p];
        s[i][p] = u[i][0][p];
      }
    sum_groups<G>(s);
    KX_UNROLL(32) for (int m = 0; m < M; m++)
      KX_UNROLL(32) for (int p = 0; p < PARTS; p++) {
        float *at = c + m * N + n + p * W;
        store<float, W>(at, load<float, W>(at) + s[m * G][p]);
      }
  }
}

// One operand packed for all: a tile as it is, or copied to one
template <int R, int C, class T, int LD> AI const T *as_tile(Tile<T, LD> x, T *) { return x.base; }
template <int R, int C, class X, class T> AI const T *as_tile(X x, T *out) {
  constexpr int STEP = per_word<typename X::type>;
  if constexpr (C % (W * STEP) == 0) copy_words<C / STEP, R>(x, (uint32_t *)out);
  else for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r * C + c] = stored(x(r)[c]);
  return out;
}

// A is [M][K], or [K][M] where AT; B is [K][N], or [N][K] where BT
template <int M, int N, int K, bool AT, bool BT, class A, class B>
static void dot_bf16(A a, B b, float *c, void *scratch) {
  uint32_t *panels = (uint32_t *)scratch;
  if constexpr (K % 2 || N % W) {
    for (int i = 0; i < M; i++)
      for (int k = 0; k < K; k++) {
        float x = number(AT ? a(k)[i] : a(i)[k]);
        for (int j = 0; j < N; j++) c[i * N + j] = __builtin_fmaf(x, number(BT ? b(j)[k] : b(k)[j]), c[i * N + j]);
      }
  } else if constexpr (!AT && BT && few_rows(M, N, K / 2)) {
    const uint32_t *tile = (const uint32_t *)as_tile<M, K>(a, (uint16_t *)panels);
    dot_few_rows<M, N, K / 2>(tile, b, c, panels + M * K / 2);
  } else {
    constexpr int NV = N / W < VECTORS ? N / W : VECTORS, P = NV * W, TAIL = M % ROWS;
    // apart from a power of two, for the first-level cache
    constexpr int LD = M + 16, AM = AT ? 1 : K / 2, AK = AT ? LD : 1;
    const uint32_t *p = panels, *left = panels + K / 2 * N;
    if constexpr (AT) pair_rows<M, K, M, LD>(a, panels + K / 2 * N);
    else left = (const uint32_t *)as_tile<M, K>(a, (uint16_t *)left);
    if constexpr (BT) transpose_words<N, K / 2, P>(b, panels);
    else pair_rows<N, K, P>(b, panels);
    for (int j = 0; j < N; j += P, p += K / 2 * P) {
      int i = 0;
      for (; i + ROWS <= M; i += ROWS) block_bf16<ROWS, NV, AM, AK>(left + i * AM, p, c + i * N + j, N, K / 2);
      if constexpr (TAIL != 0) block_bf16<TAIL, NV, AM, AK>(left + i * AM, p, c + i * N + j, N, K / 2);
    }
  }
}

template <class T, int M, int N, int K, bool AT, bool BT, class A, class B>
static void dot_fma(A a, B b, T *c, void *scratch) {
  constexpr int L = KX_VECTOR_BYTES / sizeof(T);
  T *panels = (T *)scratch;
  if constexpr (!AT && BT && sizeof(T) == 4 && (T)0.5 != 0 && few_rows(M, N, K)) {
    const uint32_t *tile = (const uint32_t *)as_tile<M, K>(a, panels);
    dot_few_rows<M, N, K>(tile, b, c, (uint32_t *)panels + M * K);
  } else if constexpr (N % L) {
    for (int i = 0; i < M; i++)
      for (int k = 0; k < K; k++) {
        T x = AT ? a(k)[i] : a(i)[k];
        for (int j = 0; j < N; j++) {
          T y = BT ? b(j)[k] : b(k)[j];
          if constexpr ((T)0.5 != 0) c[i * N + j] = fma(x, y, c[i * N + j]);
          else c[i * N + j] += x * y;
        }
      }
  } else {
    constexpr int NV = N / L < VECTORS ? N / L : VECTORS, P = NV * L, TAIL = M % ROWS;
    constexpr bool packed = BT && sizeof(T) == 4;
    constexpr int step = packed ? K * P : P, ldb = packed ? P : N, AM = AT ? 1 : K, AK = AT ? M : 1;
    const T *p = panels, *left = AT ? as_tile<K, M>(a, panels + K * N) : as_tile<M, K>(a, panels + K * N);
    if constexpr (packed) transpose_words<N, K, P>(b, (uint32_t *)panels);
    else if constexpr (BT)
      for (int k = 0; k < K; k++) for (int j = 0; j < N; j++) panels[k * N + j] = b(j)[k];
    else p = as_tile<K, N>(b, panels);
    for (int j = 0; j < N; j += P, p += step) {
      int i = 0;
      for (; i + ROWS <= M; i += ROWS) block_fma<T, ROWS, NV, AM, AK>(left + i * AM, p, ldb, c + i * N + j, N, K);
      if constexpr (TAIL != 0) block_fma<T, TAIL, NV, AM, AK>(left + i * AM, p, ldb, c + i * N + j, N, K);
    }
  }
}
template <int M, int N, int K, bool AT, bool BT, class A, class B> static void dot_f32(A a, B b, float *c, void *p) { dot_fma<float, M, N, K, AT, BT>(a, b, c, p); }
template <int M, int N, int K, bool AT, bool BT, class A, class B> static void dot_f64(A a, B b, double *c, void *p) { dot_fma<double, M, N, K, AT, BT>(a, b, c, p); }
template <int M, int N, int K, bool AT, bool BT, class A, class B> static void dot_i32(A a, B b, int32_t *c, void *p) { dot_fma<int32_t, M, N, K, AT, BT>(a, b, c, p); }

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
