/* AVX-512F: 16 columns a register. `vpermps` looks up 16 floats by the four low bits of each index. */
#include "codebook.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f")))
#define FUNCTION static inline __attribute__((always_inline)) TARGET
#define ROW_BLOCK 4
#define X_BLOCK 4

typedef __m512 floats;
typedef __m512 table;

FUNCTION floats zero(void) { return _mm512_setzero_ps(); }
FUNCTION floats load(const float *from) { return _mm512_loadu_ps(from); }
FUNCTION void store(float *to, floats value) { _mm512_storeu_ps(to, value); }
FUNCTION floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
FUNCTION floats multiply(floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
FUNCTION floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
FUNCTION float sum(floats value) { return _mm512_reduce_add_ps(value); }

FUNCTION floats load_as(int32_t type, const void *from) {
    switch (type) {
    case HFC_FLOAT32: return _mm512_loadu_ps(from);
    case HFC_FLOAT16: return _mm512_cvtph_ps(_mm256_loadu_si256(from));
    case HFC_BFLOAT16:
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16));
    default: return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from)));
    }
}

/* To nearest, ties to even; a NaN stays one. */
FUNCTION __m256i to_bfloat16(floats value) {
    const __m512i word = _mm512_castps_si512(value), upper = _mm512_srli_epi32(word, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), nan, upper, _mm512_set1_epi32(0x40)));
}

FUNCTION void store_as(int32_t type, void *to, floats value) {
    switch (type) {
    case HFC_FLOAT32: _mm512_storeu_ps(to, value); break;
    case HFC_FLOAT16: _mm256_storeu_si256(to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)); break;
    default: _mm256_storeu_si256(to, to_bfloat16(value)); break;
    }
}

/* Repeated over the register, so that the bits above a code need no masking. */
FUNCTION floats load_table(int bits, const float *from) {
    if (bits == 2) return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    if (bits == 3) return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd((const double *)from)));
    return _mm512_loadu_ps(from);
}

FUNCTION table make_table(int bits, floats base, float scale) {
    (void)bits;
    return _mm512_mul_ps(base, _mm512_set1_ps(scale));
}

FUNCTION floats look_up(int bits, const uint32_t *unit, int half, table values) {
    const __m512i twos = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i fours = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i index;
    if (bits == 4) {
        long long pair;
        memcpy(&pair, unit + 2 * half, sizeof pair);
        index = _mm512_srlv_epi32(_mm512_set1_epi64(pair), fours);
    } else {
        index = _mm512_srlv_epi32(_mm512_set1_epi32((int)unit[half]), twos);
    }
    if (bits == 3) {
        /* The high bit of column l is bit l (first half) or 16 + l of the third word; it has to come to bit 2. */
        const __m512i first = _mm512_setr_epi32(30, 31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13);
        const __m512i turn = _mm512_add_epi32(first, _mm512_set1_epi32(16 * half));
        const __m512i high = _mm512_rorv_epi32(_mm512_set1_epi32((int)unit[2]), turn);
        index = _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), index, high, 0xca);
    }
    return _mm512_permutexvar_ps(index, values);
}

#include "codebook_body.h"

const hfc_kernels *hfc_kernels_avx512(void) { return __builtin_cpu_supports("avx512f") ? &kernels : NULL; }
#else
const hfc_kernels *hfc_kernels_avx512(void) { return NULL; }
#endif
