/* Plain C for every other processor: 16 columns in an array. */
#include "codebook.h"

#define TARGET
#define FUNCTION static inline __attribute__((always_inline)) TARGET
#define ROW_BLOCK 1
#define X_BLOCK 1

typedef struct {
    float at[HFC_STEP];
} floats;
typedef floats table;

#define EACH(expression)                                                    \
    do {                                                                    \
        floats value_;                                                      \
        for (int k = 0; k < HFC_STEP; k++) value_.at[k] = (expression);     \
        return value_;                                                      \
    } while (0)

FUNCTION floats zero(void) { EACH(0.0f); }
FUNCTION floats load(const float *from) { EACH(from[k]); }
FUNCTION void store(float *to, floats value) { memcpy(to, value.at, sizeof value.at); }
FUNCTION floats add(floats a, floats b) { EACH(a.at[k] + b.at[k]); }
FUNCTION floats multiply(floats a, float b) { EACH(a.at[k] * b); }
FUNCTION floats multiply_add(floats a, floats b, floats c) { EACH(a.at[k] * b.at[k] + c.at[k]); }
FUNCTION float sum(floats value) {
    for (int width = HFC_STEP / 2; width; width /= 2)
        for (int k = 0; k < width; k++) value.at[k] += value.at[k + width];
    return value.at[0];
}

static float as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}
static uint32_t as_word(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
    if (exponent == 0) {
        const float tiny = (float)fraction * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

static uint16_t to_half(float value) {
    const uint32_t word = as_word(value), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to 65520 or more: infinity */
    /* Adding a power of two rounds the fraction of a subnormal half to nearest, ties to even. */
    if (size < 0x38800000u) return (uint16_t)(sign | (as_word(as_float(size) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13);
}

static uint16_t to_bfloat16(float value) {
    const uint32_t word = as_word(value);
    if ((word & 0x7fffffff) > 0x7f800000u) return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

FUNCTION floats load_as(int32_t type, const void *from) {
    uint16_t half[HFC_STEP];
    const uint8_t *byte = from;
    if (type == HFC_UINT8) EACH((float)byte[k]);
    if (type == HFC_FLOAT32) {
        floats value;
        memcpy(value.at, from, sizeof value.at);
        return value;
    }
    memcpy(half, from, sizeof half);
    if (type == HFC_FLOAT16) EACH(from_half(half[k]));
    EACH(as_float((uint32_t)half[k] << 16));
}

FUNCTION void store_as(int32_t type, void *to, floats value) {
    uint16_t half[HFC_STEP];
    if (type == HFC_FLOAT32) {
        memcpy(to, value.at, sizeof value.at);
    } else {
        for (int k = 0; k < HFC_STEP; k++)
            half[k] = type == HFC_FLOAT16 ? to_half(value.at[k]) : to_bfloat16(value.at[k]);
        memcpy(to, half, sizeof half);
    }
}

FUNCTION floats load_table(int bits, const float *from) { EACH(from[k & ((1 << bits) - 1)]); }

FUNCTION table make_table(int bits, floats base, float scale) {
    (void)bits;
    EACH(base.at[k] * scale);
}

FUNCTION floats look_up(int bits, const uint32_t *unit, int half, table values) {
    if (bits == 4) EACH(values.at[unit[2 * half + (k & 1)] >> 4 * (k >> 1) & 15]);
    if (bits == 2) EACH(values.at[unit[half] >> 2 * k & 3]);
    EACH(values.at[(unit[half] >> 2 * k & 3) | (unit[2] >> (16 * half + k) & 1) << 2]);
}

#include "codebook_body.h"

const hfc_kernels *hfc_kernels_scalar(void) { return &kernels; }
