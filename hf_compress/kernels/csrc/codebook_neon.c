/* NEON: 16 columns in four registers. `tbl` looks up 16 bytes, so a table of floats is four tables of bytes. */
#include "codebook.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define FUNCTION static inline __attribute__((always_inline)) TARGET
#define ROW_BLOCK 2
#define X_BLOCK 2

typedef float32x4x4_t floats;
/* Byte k of the 16 floats, for k = 0 to 3. */
typedef uint8x16x4_t table;

#define EACH(expression)                                \
    do {                                                \
        floats value_;                                  \
        for (int k = 0; k < 4; k++) value_.val[k] = (expression); \
        return value_;                                  \
    } while (0)

FUNCTION floats zero(void) { EACH(vdupq_n_f32(0)); }
FUNCTION floats load(const float *from) { EACH(vld1q_f32(from + 4 * k)); }
FUNCTION void store(float *to, floats value) {
    for (int k = 0; k < 4; k++) vst1q_f32(to + 4 * k, value.val[k]);
}
FUNCTION floats add(floats a, floats b) { EACH(vaddq_f32(a.val[k], b.val[k])); }
FUNCTION floats multiply(floats a, float b) { EACH(vmulq_n_f32(a.val[k], b)); }
FUNCTION floats multiply_add(floats a, floats b, floats c) { EACH(vfmaq_f32(c.val[k], a.val[k], b.val[k])); }
FUNCTION float sum(floats value) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(value.val[0], value.val[1]), vaddq_f32(value.val[2], value.val[3])));
}

FUNCTION floats load_as(int32_t type, const void *from) {
    const uint16_t *half = from;
    if (type == HFC_FLOAT32) return load(from);
    if (type == HFC_FLOAT16) EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * k))));
    if (type == HFC_BFLOAT16) EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + 4 * k), 16)));
    const uint8x16_t bytes = vld1q_u8(from);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    const uint16x4_t parts[4] = {vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)};
    EACH(vcvtq_f32_u32(vmovl_u16(parts[k])));
}

/* To nearest, ties to even; a NaN stays one. */
FUNCTION uint16x4_t to_bfloat16(float32x4_t value) {
    const uint32x4_t word = vreinterpretq_u32_f32(value), upper = vshrq_n_u32(word, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
    const uint32x4_t up = vshrq_n_u32(vaddq_u32(word, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(value, value), up, vorrq_u32(upper, vdupq_n_u32(0x40))));
}

FUNCTION void store_as(int32_t type, void *to, floats value) {
    uint16_t *half = to;
    for (int k = 0; k < 4; k++) {
        if (type == HFC_FLOAT32) {
            vst1q_f32((float *)to + 4 * k, value.val[k]);
        } else if (type == HFC_FLOAT16) {
            vst1_u16(half + 4 * k, vreinterpret_u16_f16(vcvt_f16_f32(value.val[k])));
        } else {
            vst1_u16(half + 4 * k, to_bfloat16(value.val[k]));
        }
    }
}

FUNCTION floats load_table(int bits, const float *from) {
    EACH(vld1q_f32(from + 4 * (bits == 2 ? 0 : bits == 3 ? k & 1 : k)));
}

FUNCTION table make_table(int bits, floats base, float scale) {
    (void)bits;
    float scaled[16];
    for (int k = 0; k < 4; k++) vst1q_f32(scaled + 4 * k, vmulq_n_f32(base.val[k], scale));
    return vld4q_u8((const uint8_t *)scaled);
}

/* The codes of 16 columns as bytes. */
FUNCTION uint8x16_t codes_of(int bits, const uint32_t *unit, int half) {
    if (bits == 4) {
        static const uint8_t place[16] = {0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7};
        static const int8_t shift[16] = {0, 0, -4, -4, 0, 0, -4, -4, 0, 0, -4, -4, 0, 0, -4, -4};
        const uint8x8_t words = vreinterpret_u8_u32(vld1_u32(unit + 2 * half));
        const uint8x16_t bytes = vqtbl1q_u8(vcombine_u8(words, words), vld1q_u8(place));
        return vandq_u8(vshlq_u8(bytes, vld1q_s8(shift)), vdupq_n_u8(15));
    }
    static const uint8_t place[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    static const int8_t shift[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    const uint8x16_t word = vreinterpretq_u8_u32(vdupq_n_u32(unit[half]));
    uint8x16_t codes = vandq_u8(vshlq_u8(vqtbl1q_u8(word, vld1q_u8(place)), vld1q_s8(shift)), vdupq_n_u8(3));
    if (bits == 3) {
        static const uint8_t high_place[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
        static const uint8_t high_bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const uint8x16_t high = vreinterpretq_u8_u32(vdupq_n_u32(unit[2] >> (16 * half)));
        const uint8x16_t present = vtstq_u8(vqtbl1q_u8(high, vld1q_u8(high_place)), vld1q_u8(high_bit));
        codes = vorrq_u8(codes, vandq_u8(present, vdupq_n_u8(4)));
    }
    return codes;
}

FUNCTION floats look_up(int bits, const uint32_t *unit, int half, table values) {
    const uint8x16_t codes = codes_of(bits, unit, half);
    const uint8x16_t byte0 = vqtbl1q_u8(values.val[0], codes), byte1 = vqtbl1q_u8(values.val[1], codes);
    const uint8x16_t byte2 = vqtbl1q_u8(values.val[2], codes), byte3 = vqtbl1q_u8(values.val[3], codes);
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
    const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    const floats value = {
        {vreinterpretq_f32_u16(vzip1q_u16(low0, high0)), vreinterpretq_f32_u16(vzip2q_u16(low0, high0)),
         vreinterpretq_f32_u16(vzip1q_u16(low1, high1)), vreinterpretq_f32_u16(vzip2q_u16(low1, high1))}};
    return value;
}

#include "codebook_body.h"

const hfc_kernels *hfc_kernels_neon(void) { return &kernels; }
#else
const hfc_kernels *hfc_kernels_neon(void) { return NULL; }
#endif
