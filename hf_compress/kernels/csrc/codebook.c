/* Entry points for ctypes: choice of the instruction set, threads, and the preparation that all rows share. */
#include "codebook.h"

#include <stdlib.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* GOMP_parallel of the OpenMP runtime that torch runs on: a second runtime's threads would fight with it. */
typedef void (*parallel_function)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

static const hfc_kernels *active;
static parallel_function parallel;

static const hfc_kernels *kernels_of(int32_t set) {
    switch (set) {
    case 0: return hfc_kernels_scalar();
    case 1: return hfc_kernels_neon();
    case 2: return hfc_kernels_avx2();
    case 3: return hfc_kernels_avx512();
    default: return NULL;
    }
}

EXPORT int32_t hfc_version(void) { return HFC_VERSION; }

/* Whether this processor runs an instruction set: 0 scalar, 1 NEON, 2 AVX2, 3 AVX-512. */
EXPORT int32_t hfc_supported(int32_t set) { return kernels_of(set) != NULL; }

/* To be called before anything else. `function` may be NULL: then all work stays in the calling thread. */
EXPORT int32_t hfc_configure(int32_t set, void *function) {
    active = kernels_of(set);
    memcpy(&parallel, &function, sizeof parallel);
    return active != NULL;
}

/* Gives the calling thread rows from `first` on and returns how many: none at the end or after an error. The shares
 * shrink: few and large ones keep what a thread fetches ahead its own, small ones at the end keep no thread waiting. */
static int64_t claim(hfc_job *job, int64_t *first) {
    int64_t share;
    *first = __atomic_load_n(&job->next, __ATOMIC_RELAXED);
    do {
        const int64_t rest = job->last_row - *first, part = rest / job->threads / HFC_CHUNK * HFC_CHUNK;
        if (rest <= 0 || __atomic_load_n(&job->status, __ATOMIC_RELAXED)) return 0;
        share = part ? part : rest < HFC_CHUNK ? rest : HFC_CHUNK;
    } while (!__atomic_compare_exchange_n(&job->next, first, *first + share, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return share;
}

static void work(void *data) {
    hfc_job *job = data;
    float *scratch = NULL;
    for (int64_t first, share; (share = claim(job, &first)) > 0;) {
        int32_t status = HFC_OK;
        if (!scratch && !(scratch = malloc(hfc_scratch_floats(job) * sizeof(float)))) status = HFC_NO_MEMORY;
        for (const int64_t end = first + share; !status && first < end; first += HFC_CHUNK) {
            const int64_t last = first + HFC_CHUNK < end ? first + HFC_CHUNK : end;
            status = (job->x ? active->linear : active->dequantize)(job, first, last, scratch);
        }
        if (status) __atomic_store_n(&job->status, status, __ATOMIC_RELAXED);
    }
    free(scratch);
}

static int32_t run(hfc_job *job) {
    const hfc_matrix *matrix = job->matrix;
    const size_t codes = (size_t)matrix->codebook_count << matrix->bits;
    float *tables = malloc((codes + HFC_STEP) * sizeof(float));
    if (!tables) return HFC_NO_MEMORY;
    active->to_float(tables, matrix->codebooks, matrix->codebook_type, codes);
    memset(tables + codes, 0, HFC_STEP * sizeof(float));
    job->tables = tables;
    if (job->threads > 1) {
        parallel(work, job, (unsigned)job->threads, 0);
    } else {
        work(job);
    }
    free(tables);
    return job->status;
}

/* y (count, rows) = x (count, columns) W^T + bias; x, bias and y contiguous and of one type. */
EXPORT int32_t hfc_linear(const hfc_matrix *matrix, const void *x, const void *bias, void *y, int64_t count,
                          int32_t type, int32_t threads) {
    const size_t columns = (size_t)matrix->columns, bytes = hfc_type_bytes(type);
    const size_t stride = (size_t)matrix->units * HFC_UNIT;
    float *copy = NULL;
    if (type != HFC_FLOAT32 || stride != columns) {
        copy = malloc((size_t)count * stride * sizeof(float));
        if (!copy) return HFC_NO_MEMORY;
        for (size_t i = 0; i < (size_t)count; i++) {
            active->to_float(copy + i * stride, (const char *)x + i * columns * bytes, type, columns);
            memset(copy + i * stride + columns, 0, (stride - columns) * sizeof(float));
        }
    }
    hfc_job job = {.matrix = matrix, .x = copy ? copy : x, .stride = (int64_t)stride, .count = count, .bias = bias,
                   .out = y, .type = type, .threads = parallel ? threads : 1, .last_row = matrix->rows};
    const int32_t status = run(&job);
    free(copy);
    return status;
}

/* out, contiguous = rows `first_row` to `last_row`, columns `first_column` (a multiple of 32) to `last_column` of W. */
EXPORT int32_t hfc_dequantize(const hfc_matrix *matrix, void *out, int64_t first_row, int64_t last_row,
                              int64_t first_column, int64_t last_column, int32_t type, int32_t threads) {
    hfc_job job = {.matrix = matrix, .out = out, .type = type, .threads = parallel ? threads : 1,
                   .first_row = first_row, .last_row = last_row, .first_column = first_column,
                   .last_column = last_column, .next = first_row};
    return run(&job);
}
