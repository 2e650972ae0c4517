/* The loops, written once for every instruction set. The including file defines
 *
 *   TARGET                   function attribute that enables its instructions
 *   ROW_BLOCK, X_BLOCK       rows of W and of x that are treated together
 *   floats, table            16 floats; a table of 2^bits floats, ready for look-up
 *   load, store              16 floats, unaligned
 *   load_as, store_as        the same with conversion from or to an hfc_type
 *   zero, add, multiply, multiply_add, sum
 *   load_table, make_table   the first 2^bits floats as the look-up needs them; the table of these times a scale
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

/* The codebook of a row, or NULL if the row names one that is not there. */
INLINE const float *codebook_of(const hfc_job *job, int64_t row) {
    const hfc_matrix *matrix = job->matrix;
    int64_t index;
    if (matrix->row_codebook)
        index = matrix->index_bytes == 2 ? ((const int16_t *)matrix->row_codebook)[row]
                                         : ((const int32_t *)matrix->row_codebook)[row];
    else
        index = row / matrix->codebook_rows;
    if (index < 0 || index >= matrix->codebook_count) return NULL;
    return job->tables + ((size_t)index << matrix->bits);
}

/* For the rows of a chunk: their tables, which contain the row scale, and their scales (rows, groups) as floats. */
INLINE int32_t prepare_rows(const hfc_job *job, int64_t first, int64_t last, const float *tables[HFC_CHUNK],
                            float *scratch) {
    const hfc_matrix *matrix = job->matrix;
    const size_t rows = (size_t)(last - first), groups = (size_t)matrix->groups;
    const size_t skip = (size_t)first * groups * hfc_type_bytes(matrix->scale_type);
    float *scaled = scratch, row_scales[HFC_CHUNK];
    convert_in(scratch + HFC_TABLES, (const char *)matrix->scales + skip, matrix->scale_type, rows * groups);
    if (matrix->row_scales) {
        const size_t row_skip = (size_t)first * hfc_type_bytes(matrix->row_scale_type);
        convert_in(row_scales, (const char *)matrix->row_scales + row_skip, matrix->row_scale_type, rows);
    }
    for (size_t r = 0; r < rows; r++, scaled += HFC_STEP) {
        if (!(tables[r] = codebook_of(job, first + (int64_t)r))) return HFC_BAD_CODEBOOK;
        if (!matrix->row_scales) continue;
        /* 2 and 3 bits: what follows the codebook comes along, unused. */
        store(scaled, multiply(load(tables[r]), row_scales[r]));
        tables[r] = scaled;
    }
    return HFC_OK;
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
INLINE void multiply_rows(const hfc_job *job, int64_t first, int64_t last, const float *const *tables,
                          const float *scales, float *results) {
    const int64_t groups = job->matrix->groups, rows = last - first;
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
}

/* y[:, first:last] for at most HFC_CHUNK rows of W. */
static TARGET int32_t linear(const hfc_job *job, int64_t first, int64_t last, float *scratch) {
    const hfc_matrix *matrix = job->matrix;
    const size_t rows = (size_t)(last - first), bytes = hfc_type_bytes(job->type);
    const float *tables[HFC_CHUNK], *scales = scratch + HFC_TABLES;
    float *results = scratch + HFC_TABLES + HFC_CHUNK * matrix->groups, *bias = NULL;
    if (prepare_rows(job, first, last, tables, scratch)) return HFC_BAD_CODEBOOK;
    multiply_rows(job, first, last, tables, scales, results);
    if (job->bias) {
        bias = scratch; /* the tables have been used */
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

INLINE void unpack_rows(const int bits, const int32_t type, const hfc_job *job, int64_t first, int64_t last,
                        const float *const *tables, const float *scales) {
    const hfc_matrix *matrix = job->matrix;
    const size_t row_bytes = (size_t)(job->last_column - job->first_column) * hfc_type_bytes(type);
    for (int64_t row = first; row < last; row++)
        unpack_row(bits, type, job, matrix->codes + (size_t)(row * matrix->units * bits), tables[row - first],
                   scales + (row - first) * matrix->groups,
                   (char *)job->out + (size_t)(row - job->first_row) * row_bytes);
}

INLINE void unpack_rows_as(const int32_t type, const hfc_job *job, int64_t first, int64_t last,
                           const float *const *tables, const float *scales) {
    switch (job->matrix->bits) {
    case 2: unpack_rows(2, type, job, first, last, tables, scales); break;
    case 3: unpack_rows(3, type, job, first, last, tables, scales); break;
    default: unpack_rows(4, type, job, first, last, tables, scales); break;
    }
}

/* Rows [first, last) of W into `out`, whose first row is `first_row`. */
static TARGET int32_t dequantize(const hfc_job *job, int64_t first, int64_t last, float *scratch) {
    const float *tables[HFC_CHUNK], *scales = scratch + HFC_TABLES;
    if (prepare_rows(job, first, last, tables, scratch)) return HFC_BAD_CODEBOOK;
    switch (job->type) {
    case HFC_FLOAT32: unpack_rows_as(HFC_FLOAT32, job, first, last, tables, scales); break;
    case HFC_FLOAT16: unpack_rows_as(HFC_FLOAT16, job, first, last, tables, scales); break;
    default: unpack_rows_as(HFC_BFLOAT16, job, first, last, tables, scales); break;
    }
    return HFC_OK;
}

static const hfc_kernels kernels = {to_float, linear, dequantize};
