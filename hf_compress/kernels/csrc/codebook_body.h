/* The loops, written once for every instruction set. The including file defines
 *
 *   TARGET                   function attribute that enables its instructions
 *   ROW_BLOCK, X_BLOCK       rows of W and of x that are treated together
 *   floats, table            16 floats; a table of 2^bits floats, ready for look-up
 *   load, store              16 floats, unaligned
 *   load_as, store_as        the same with conversion from or to an hfc_type
 *   zero, add, multiply_add, sum
 *   load_table, make_table   2^bits floats repeated to fill the registers; the table of these times a scale
 *   look_up(bits, unit, half, table)
 *
 * A row of y is summed in the same order whatever block it falls into: results depend neither on the number of threads
 * nor on the number of rows of x.
 */
#include "codebook.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE void convert_in(float *to, const void *from, int32_t type, size_t count) {
    const size_t bytes = hfc_type_bytes(type);
    size_t i = 0;
    for (; i + HFC_STEP <= count; i += HFC_STEP) store(to + i, load_as(type, (const char *)from + i * bytes));
    if (i < count) {
        char source[HFC_STEP * 4] = {0};
        float converted[HFC_STEP];
        memcpy(source, (const char *)from + i * bytes, (count - i) * bytes);
        store(converted, load_as(type, source));
        memcpy(to + i, converted, (count - i) * sizeof(float));
    }
}

INLINE void store_some(int32_t type, void *to, floats value, size_t count) {
    if (count == HFC_STEP) {
        store_as(type, to, value);
    } else {
        char converted[HFC_STEP * 4];
        store_as(type, converted, value);
        memcpy(to, converted, count * hfc_type_bytes(type));
    }
}

static TARGET void to_float(float *to, const void *from, int32_t type, size_t count) {
    convert_in(to, from, type, count);
}

/* Row scales of rows [first, last) into scales (rows, groups); `spare` holds a chunk of floats. */
INLINE void load_scales(const hfc_matrix *matrix, int64_t first, int64_t last, float *scales, float *spare) {
    const size_t groups = (size_t)matrix->groups, rows = (size_t)(last - first);
    const size_t skip = (size_t)first * groups * hfc_type_bytes(matrix->scale_type);
    convert_in(scales, (const char *)matrix->scales + skip, matrix->scale_type, rows * groups);
    if (matrix->row_scales) {
        const size_t row_skip = (size_t)first * hfc_type_bytes(matrix->row_scale_type);
        convert_in(spare, (const char *)matrix->row_scales + row_skip, matrix->row_scale_type, rows);
        for (size_t row = 0; row < rows; row++)
            for (size_t group = 0; group < groups; group++) scales[row * groups + group] *= spare[row];
    }
}

/* The table of a row, or NULL if the row names a codebook that is not there. */
INLINE const float *table_of(const hfc_job *job, int64_t row) {
    const hfc_matrix *matrix = job->matrix;
    int64_t index = 0;
    if (matrix->row_codebook)
        index = matrix->index_bytes == 2 ? ((const int16_t *)matrix->row_codebook)[row]
                                         : ((const int32_t *)matrix->row_codebook)[row];
    if (index < 0 || index >= matrix->codebook_count) return NULL;
    return job->tables + ((size_t)index << matrix->bits);
}

/* out[i * HFC_CHUNK + r] = sum over columns of x[i, c] * W[row + r, c], for `rows` rows of W and `count` of x. */
INLINE void block(const int bits, const int rows, const int count, const hfc_job *job, int64_t row,
                  const float *const *tables, const float *scales, const float *x, float *out) {
    const hfc_matrix *matrix = job->matrix;
    const size_t words = (size_t)(matrix->units * bits), stride = (size_t)job->stride;
    const uint32_t *codes[ROW_BLOCK], *ahead = matrix->codes + (size_t)(row + rows) * words + HFC_AHEAD;
    floats base[ROW_BLOCK], sums[ROW_BLOCK][X_BLOCK];
    table scaled[ROW_BLOCK];
    UNROLL for (int r = 0; r < rows; r++) {
        codes[r] = matrix->codes + (size_t)(row + r) * words;
        base[r] = load_table(bits, tables[r]);
        scaled[r] = make_table(bits, base[r], scales[r * matrix->groups]);
        UNROLL for (int i = 0; i < count; i++) sums[r][i] = zero();
    }
    for (int64_t unit = 0, next = matrix->group_units; unit < matrix->units; unit++, x += HFC_UNIT) {
        if (unit == next) {
            scales++;
            next += matrix->group_units;
            /* With many sums no register is left for the tables as they were. */
            UNROLL for (int r = 0; r < rows; r++)
                scaled[r] = make_table(bits, count > 2 ? load_table(bits, tables[r]) : base[r],
                                       scales[r * matrix->groups]);
        }
        /* The next rows, in the order of memory: the processor itself sees short pieces of several rows. */
        if (count <= 2) __builtin_prefetch(ahead + (size_t)unit * rows * bits, 0, 2);
        UNROLL for (int half = 0; half < 2; half++) {
            UNROLL for (int r = 0; r < rows; r++) {
                const floats weights = look_up(bits, codes[r], half, scaled[r]);
                UNROLL for (int i = 0; i < count; i++)
                    sums[r][i] = multiply_add(weights, load(x + i * stride + half * HFC_STEP), sums[r][i]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) codes[r] += bits;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < count; i++) out[i * HFC_CHUNK + r] = sum(sums[r][i]);
}

/* Functions of their own, so that nothing around the loop takes its registers. */
typedef void block_function(const hfc_job *job, int64_t row, const float *const *tables, const float *scales,
                            const float *x, float *out);
#define BLOCK(name, bits, rows, count)                                                               \
    static __attribute__((noinline)) TARGET void name(const hfc_job *job, int64_t row,               \
                                                      const float *const *tables, const float *scales, \
                                                      const float *x, float *out) {                  \
        block(bits, rows, count, job, row, tables, scales, x, out);                                  \
    }
#define BLOCKS(bits, count)                             \
    BLOCK(block_##bits##_##count, bits, ROW_BLOCK, count) \
    BLOCK(row_##bits##_##count, bits, 1, count)

BLOCKS(2, 1)
BLOCKS(3, 1)
BLOCKS(4, 1)
#if X_BLOCK == 1
#define NAMES(kind, bits) {kind##_##bits##_1}
#else
BLOCKS(2, 2)
BLOCKS(3, 2)
BLOCKS(4, 2)
#if X_BLOCK == 2
#define NAMES(kind, bits) {kind##_##bits##_1, kind##_##bits##_2}
#else
BLOCKS(2, 3)
BLOCKS(3, 3)
BLOCKS(4, 3)
BLOCKS(2, 4)
BLOCKS(3, 4)
BLOCKS(4, 4)
#define NAMES(kind, bits) {kind##_##bits##_1, kind##_##bits##_2, kind##_##bits##_3, kind##_##bits##_4}
#endif
#endif

/* By bits and rows of x - 1. */
static block_function *const row_blocks[5][X_BLOCK] = {
    [2] = NAMES(block, 2), [3] = NAMES(block, 3), [4] = NAMES(block, 4)};
static block_function *const single_rows[5][X_BLOCK] = {[2] = NAMES(row, 2), [3] = NAMES(row, 3), [4] = NAMES(row, 4)};

/* The scales of the row block that begins at `row`: they are read in bursts, once for a chunk. */
INLINE void prefetch_scales(const hfc_matrix *matrix, int64_t row) {
    const size_t bytes = (size_t)matrix->groups * hfc_type_bytes(matrix->scale_type);
    const char *scales = (const char *)matrix->scales + (size_t)row * bytes;
    for (size_t place = 0; place < ROW_BLOCK * bytes; place += 64) __builtin_prefetch(scales + place, 0, 2);
}

/* results[i * HFC_CHUNK + r] for rows `first` to `last` of W and all rows of x. */
static TARGET int32_t multiply(const hfc_job *job, int64_t first, int64_t last, const float *scales, float *results) {
    const int64_t groups = job->matrix->groups, rows = last - first;
    const float *tables[HFC_CHUNK];
    for (int64_t r = 0; r < rows; r++)
        if (!(tables[r] = table_of(job, first + r))) return HFC_BAD_CODEBOOK;
    /* So many rows of x at a time that they stay in the second cache while the rows of W pass. */
    const int64_t most = HFC_CACHED / job->stride / X_BLOCK * X_BLOCK, step = most > X_BLOCK ? most : X_BLOCK;
    for (int64_t from = 0; from < job->count; from += step) {
        const int64_t to = from + step < job->count ? from + step : job->count;
        for (int64_t r = 0, next; r < rows; r = next) {
            const int whole = r + ROW_BLOCK <= rows;
            block_function *const *functions = (whole ? row_blocks : single_rows)[job->matrix->bits];
            next = r + (whole ? ROW_BLOCK : 1);
            prefetch_scales(job->matrix, first + r + HFC_CHUNK);
            for (int64_t i = from; i < to; i += X_BLOCK) {
                const int64_t count = to - i < X_BLOCK ? to - i : X_BLOCK;
                functions[count - 1](job, first + r, tables + r, scales + r * groups, job->x + i * job->stride,
                                     results + i * HFC_CHUNK + r);
            }
        }
    }
    return HFC_OK;
}

/* y[:, first:last] for at most HFC_CHUNK rows of W. */
static TARGET int32_t linear(const hfc_job *job, int64_t first, int64_t last, float *scratch) {
    const hfc_matrix *matrix = job->matrix;
    const size_t rows = (size_t)(last - first), bytes = hfc_type_bytes(job->type);
    float *scales = scratch + 2 * HFC_CHUNK, *results = scales + HFC_CHUNK * matrix->groups, *bias = NULL;
    load_scales(matrix, first, last, scales, scratch);
    const int32_t status = multiply(job, first, last, scales, results);
    if (status) return status;
    if (job->bias) {
        bias = scratch + HFC_CHUNK;
        convert_in(bias, (const char *)job->bias + (size_t)first * bytes, job->type, rows);
    }
    for (int64_t i = 0; i < job->count; i++) {
        char *out = (char *)job->out + (size_t)(i * matrix->rows + first) * bytes;
        for (size_t r = 0; r < rows; r += HFC_STEP) {
            floats value = load(results + i * HFC_CHUNK + r);
            if (bias) value = add(value, load(bias + r));
            store_some(job->type, out + r * bytes, value, rows - r < HFC_STEP ? rows - r : HFC_STEP);
        }
    }
    return HFC_OK;
}

INLINE void unpack_row(const int bits, const int32_t type, const hfc_job *job, const uint32_t *codes,
                       const float *row_table, const float *scales, char *out) {
    const int64_t group_units = job->matrix->group_units, first = job->first_column / HFC_UNIT;
    const int64_t whole = job->last_column / HFC_UNIT, rest = job->last_column % HFC_UNIT;
    const size_t step = HFC_STEP * hfc_type_bytes(type);
    const floats base = load_table(bits, row_table);
    scales += first / group_units;
    codes += first * bits;
    table scaled = make_table(bits, base, scales[0]);
    int64_t unit = first, next = (first / group_units + 1) * group_units;
    for (; unit < whole; unit++, codes += bits, out += 2 * step) {
        if (unit == next) {
            scaled = make_table(bits, base, *++scales);
            next += group_units;
        }
        store_as(type, out, look_up(bits, codes, 0, scaled));
        store_as(type, out + step, look_up(bits, codes, 1, scaled));
    }
    if (rest) {
        if (unit == next) scaled = make_table(bits, base, *++scales);
        store_some(type, out, look_up(bits, codes, 0, scaled), rest < HFC_STEP ? (size_t)rest : HFC_STEP);
        if (rest > HFC_STEP) store_some(type, out + step, look_up(bits, codes, 1, scaled), (size_t)rest - HFC_STEP);
    }
}

INLINE int32_t unpack_rows(const int bits, const int32_t type, const hfc_job *job, int64_t first, int64_t last,
                           const float *scales) {
    const hfc_matrix *matrix = job->matrix;
    const size_t row_bytes = (size_t)(job->last_column - job->first_column) * hfc_type_bytes(type);
    for (int64_t row = first; row < last; row++) {
        const float *row_table = table_of(job, row);
        if (!row_table) return HFC_BAD_CODEBOOK;
        unpack_row(bits, type, job, matrix->codes + (size_t)(row * matrix->units * bits), row_table,
                   scales + (row - first) * matrix->groups,
                   (char *)job->out + (size_t)(row - job->first_row) * row_bytes);
    }
    return HFC_OK;
}

INLINE int32_t unpack_rows_as(const int32_t type, const hfc_job *job, int64_t first, int64_t last,
                              const float *scales) {
    switch (job->matrix->bits) {
    case 2: return unpack_rows(2, type, job, first, last, scales);
    case 3: return unpack_rows(3, type, job, first, last, scales);
    default: return unpack_rows(4, type, job, first, last, scales);
    }
}

/* Rows [first, last) of W into `out`, whose first row is `first_row`. */
static TARGET int32_t dequantize(const hfc_job *job, int64_t first, int64_t last, float *scratch) {
    float *scales = scratch + 2 * HFC_CHUNK;
    load_scales(job->matrix, first, last, scales, scratch);
    switch (job->type) {
    case HFC_FLOAT32: return unpack_rows_as(HFC_FLOAT32, job, first, last, scales);
    case HFC_FLOAT16: return unpack_rows_as(HFC_FLOAT16, job, first, last, scales);
    default: return unpack_rows_as(HFC_BFLOAT16, job, first, last, scales);
    }
}

static const hfc_kernels kernels = {to_float, linear, dequantize};
