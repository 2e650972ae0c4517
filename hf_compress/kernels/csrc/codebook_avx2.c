/* AVX2 and FMA: 16 columns in two registers. `vpermps` looks up 8 floats by the three low bits of each index. */
#include "codebook.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FUNCTION static inline __attribute__((always_inline)) TARGET
#define ROW_BLOCK 2
#define X_BLOCK 2

typedef struct {
    __m256 first, second;
} floats;
/* 4 bits: codes 0 to 7 and 8 to 15. 2 and 3 bits: both alike. */
typedef floats table;

FUNCTION floats pair(__m256 first, __m256 second) {
    const floats value = {first, second};
    return value;
}
FUNCTION floats zero(void) { return pair(_mm256_setzero_ps(), _mm256_setzero_ps()); }
FUNCTION floats load(const float *from) { return pair(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
FUNCTION void store(float *to, floats value) {
    _mm256_storeu_ps(to, value.first);
    _mm256_storeu_ps(to + 8, value.second);
}
FUNCTION floats add(floats a, floats b) {
    return pair(_mm256_add_ps(a.first, b.first), _mm256_add_ps(a.second, b.second));
}
FUNCTION floats multiply(floats a, float b) {
    return pair(_mm256_mul_ps(a.first, _mm256_set1_ps(b)), _mm256_mul_ps(a.second, _mm256_set1_ps(b)));
}
FUNCTION floats multiply_add(floats a, floats b, floats c) {
    return pair(_mm256_fmadd_ps(a.first, b.first, c.first), _mm256_fmadd_ps(a.second, b.second, c.second));
}
FUNCTION float sum(floats value) {
    const __m256 eight = _mm256_add_ps(value.first, value.second);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FUNCTION __m256 from_bfloat16(__m128i value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(value), 16));
}

FUNCTION floats load_as(int32_t type, const void *from) {
    const __m128i *half = from;
    if (type == HFC_FLOAT32) return load(from);
    const __m128i first = _mm_loadu_si128(half);
    if (type == HFC_UINT8)
        return pair(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(first)),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(first, 8))));
    const __m128i second = _mm_loadu_si128(half + 1);
    if (type == HFC_FLOAT16) return pair(_mm256_cvtph_ps(first), _mm256_cvtph_ps(second));
    return pair(from_bfloat16(first), from_bfloat16(second));
}

/* To nearest, ties to even, in the lower half of each 32 bits; a NaN stays one. */
FUNCTION __m256i rounded(__m256 value) {
    const __m256i word = _mm256_castps_si256(value), upper = _mm256_srli_epi32(word, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
}

FUNCTION void store_as(int32_t type, void *to, floats value) {
    __m128i *half = to;
    if (type == HFC_FLOAT32) {
        store(to, value);
    } else if (type == HFC_FLOAT16) {
        _mm_storeu_si128(half, _mm256_cvtps_ph(value.first, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(half + 1, _mm256_cvtps_ph(value.second, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i both = _mm256_packus_epi32(rounded(value.first), rounded(value.second));
        _mm256_storeu_si256(to, _mm256_permute4x64_epi64(both, 0xd8));
    }
}

FUNCTION floats load_table(int bits, const float *from) {
    if (bits == 4) return load(from);
    const __m256 all = bits == 3 ? _mm256_loadu_ps(from) : _mm256_broadcast_ps((const __m128 *)from);
    return pair(all, all);
}

FUNCTION table make_table(int bits, floats base, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256 first = _mm256_mul_ps(base.first, factor);
    return pair(first, bits == 4 ? _mm256_mul_ps(base.second, factor) : first);
}

/* Columns 8 * part to 8 * part + 7 of a half. */
FUNCTION __m256 look_up_eight(int bits, const uint32_t *unit, int half, int part, table values) {
    if (bits == 4) {
        const __m256i fours = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
        long long words;
        memcpy(&words, unit + 2 * half, sizeof words);
        const __m256i shift = _mm256_add_epi32(fours, _mm256_set1_epi32(16 * part));
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi64x(words), shift);
        const __m256 low = _mm256_permutevar8x32_ps(values.first, index);
        const __m256 high = _mm256_permutevar8x32_ps(values.second, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
    const __m256i twos = _mm256_add_epi32(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), _mm256_set1_epi32(16 * part));
    __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32((int)unit[half]), twos);
    if (bits == 3) {
        /* The high bit of column l is bit l (first half) or 16 + l of the third word; it has to come to bit 2. */
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), three = _mm256_set1_epi32(3);
        const int column = 16 * half + 8 * part;
        __m256i high = _mm256_set1_epi32((int)unit[2]);
        if (column) {
            high = _mm256_srlv_epi32(high, _mm256_add_epi32(lane, _mm256_set1_epi32(column - 2)));
        } else {
            high = _mm256_srlv_epi32(_mm256_slli_epi32(high, 2), lane);
        }
        index = _mm256_or_si256(_mm256_and_si256(index, three), _mm256_andnot_si256(three, high));
    }
    return _mm256_permutevar8x32_ps(values.first, index);
}

FUNCTION floats look_up(int bits, const uint32_t *unit, int half, table values) {
    return pair(look_up_eight(bits, unit, half, 0, values), look_up_eight(bits, unit, half, 1, values));
}

#include "codebook_body.h"

const hfc_kernels *hfc_kernels_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : NULL;
}
#else
const hfc_kernels *hfc_kernels_avx2(void) { return NULL; }
#endif
