/* Learned scalar codebooks on the CPU: what the entry points and the instruction sets share.
 *
 *   W[r, c] = scale[r, c / column_group] * codebooks[row_codebook[r], code[r, c]]
 *
 * Codes are packed in units of 32 columns, `bits` words each (see packing.py for the places of the bits). Padding codes
 * are 0 and the activations' padding is 0, so no loop has to treat the end of a row apart.
 */
#ifndef HFC_CODEBOOK_H
#define HFC_CODEBOOK_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Changes with every change of the structures or signatures: the loader refuses another number. */
#define HFC_VERSION 3

#define HFC_UNIT 32 /* columns that `bits` words hold */
#define HFC_STEP 16 /* columns that one look-up treats */

enum hfc_type { HFC_FLOAT32 = 0, HFC_BFLOAT16 = 1, HFC_FLOAT16 = 2, HFC_UINT8 = 3 };
enum hfc_status { HFC_OK = 0, HFC_NO_MEMORY = 1, HFC_BAD_CODEBOOK = 2 };

/* A compressed matrix of `rows` rows. Python's Matrix in library.py has the same fields in the same order. */
typedef struct {
    const uint32_t *codes;    /* (rows, bits * units) */
    const void *codebooks;    /* (codebook_count, 2^bits) of codebook_type */
    const void *scales;       /* (rows, groups) of scale_type */
    const void *row_scales;   /* (rows,) of row_scale_type, or NULL */
    const void *row_codebook; /* (rows,) int16 or int32; or NULL */
    int64_t rows, columns, units, groups, group_units;
    int64_t codebook_count, codebook_rows; /* without row_codebook: rows that follow each other and share one */
    int32_t bits, codebook_type, scale_type, row_scale_type, index_bytes;
} hfc_matrix;

/* One call: y = x W^T + bias, or rows of W. Threads claim rows from `next`. */
typedef struct {
    const hfc_matrix *matrix;
    const float *tables; /* the codebooks as floats, and HFC_STEP more that may be read */
    const float *x;      /* (count, stride), zero from `columns` on; NULL to dequantize */
    int64_t stride, count;
    const void *bias; /* (rows,) of `type`, or NULL */
    void *out;        /* (count, rows), or (last_row - first_row, last_column - first_column), of `type` */
    int32_t type, threads;
    int64_t first_row, last_row;
    int64_t first_column, last_column; /* to dequantize; the first is a multiple of HFC_UNIT */
    /* What the threads write, in a cache line of its own: all the rest they read all the time. */
    _Alignas(64) int64_t next; /* atomic */
    int32_t status;            /* atomic; the first error */
} hfc_job;

/* What an instruction set offers. Scratch has hfc_scratch_floats() elements. */
typedef struct {
    void (*to_float)(float *to, const void *from, int32_t type, size_t count);
    int32_t (*linear)(const hfc_job *job, int64_t first, int64_t last, float *scratch);
    int32_t (*dequantize)(const hfc_job *job, int64_t first, int64_t last, float *scratch);
} hfc_kernels;

#define HFC_CHUNK 32      /* rows that a thread prepares at once */
#define HFC_TABLES (HFC_CHUNK * HFC_STEP)
#define HFC_CACHED 131072 /* floats of x that are to stay in the second cache */
#define HFC_AHEAD 1024    /* words beyond the next rows of codes that are fetched ahead of use */

static inline size_t hfc_type_bytes(int32_t type) {
    return type == HFC_FLOAT32 ? 4 : type == HFC_UINT8 ? 1 : 2;
}

/* The tables, the scales and the results of a chunk. */
static inline size_t hfc_scratch_floats(const hfc_job *job) {
    return HFC_TABLES + (size_t)HFC_CHUNK * (size_t)(job->matrix->groups + (job->x ? job->count : 0));
}

/* NULL where the compiler's target or the running processor lacks the instructions. */
const hfc_kernels *hfc_kernels_scalar(void);
const hfc_kernels *hfc_kernels_avx2(void);
const hfc_kernels *hfc_kernels_avx512(void);
const hfc_kernels *hfc_kernels_neon(void);

#endif
