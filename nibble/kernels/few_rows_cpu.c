/* Products of few rows with a frozen weight on a CPU: y = x W^T + b, W dense or in 4 bits.
 * Reference: few_rows.py; the 4-bit format: nf4_reference.py.
 *
 * A sum is one chain of vectors along a row of W, whatever the number of rows of x and of threads.
 * With instructions for products of bfloat16 pairs, rows of x and W stay in bfloat16:
 *
 *   64 codes = 32 bytes  ->  the high halves are values 0 2 4 ... 62, the low ones 1 3 5 ... 63;
 *   x is put in the same order once a call, so that codes need no weaving.
 *
 * Elsewhere both are widened to float32. Weights are rounded to the type of x, as when they are
 * decoded for a product of many rows.
 */
#include <stdint.h>
#include <string.h>

#include "nf4_weight.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { LANES = 16, CHUNK = 64 };
/* Rows of W and of x that are multiplied at once: their sums fill half of the registers. */
enum { TILE = 4 };
/* So that sums stay in registers. */
#define UNROLLED _Pragma("GCC unroll 4")

typedef uint16_t bfloat16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

/* What a call multiplies. `dense` is NULL for a weight in 4 bits. */
typedef struct {
    const Weight *weight;
    const void *dense;
    const void *x;
    const void *bias;           /* NULL, or of the kind of x */
    void *y;
    int64_t rows, in, out;      /* T, I, O */
    int64_t kind;               /* of x, y, bias and a dense weight */
    int64_t y_kind;
} Product;

const char *nibble_few_rows_instructions(void)
{
#if HAS_PAIRS
    return "AVX-512 BF16";
#elif defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "portable";
#endif
}

static inline float widened(bfloat16 half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest, ties to even; NaN stays NaN. */
static inline bfloat16 narrowed(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bfloat16)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

static inline int64_t up_to(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void write(const Product *p, int64_t row, int64_t column, float sum)
{
    int64_t at = row * p->out + column;
    if (p->bias)
        sum += p->kind == FLOAT32 ? ((const float *)p->bias)[column]
                                  : widened(((const bfloat16 *)p->bias)[column]);
    if (p->y_kind == FLOAT32)
        ((float *)p->y)[at] = sum;
    else
        ((bfloat16 *)p->y)[at] = narrowed(sum);
}

/* ---- float32 --------------------------------------------------------------------------------- */

static inline Floats load_floats(const float *from)
{
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline float sum_of(Floats value)
{
#if defined(__AVX512BW__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float half[8], quarter[4];
    for (int i = 0; i < 8; i++)
        half[i] = value[i] + value[i + 8];
    for (int i = 0; i < 4; i++)
        quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
#endif
}

/* `count` values from any place on, zeros up to a whole vector. */
static void widen(const void *from, int64_t start, int64_t count, int64_t kind, float *to)
{
    if (kind == FLOAT32)
        memcpy(to, (const float *)from + start, (size_t)count * sizeof *to);
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = widened(((const bfloat16 *)from)[start + i]);
    for (int64_t i = count; i % LANES; i++)
        to[i] = 0;
}

/* 16 codes, 8 whole bytes, to their values. */
static inline void look_up_16(const float *table, const uint8_t *codes, float *to)
{
#if defined(__AVX512BW__)
    const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    __m128i byte = _mm_loadl_epi64((const __m128i *)codes);
    __m512i lane = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(byte, byte)), shift);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(lane, _mm512_loadu_ps(table)));
#elif defined(__AVX2__)
    const __m256i shift = _mm256_set_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    __m128i byte = _mm_loadl_epi64((const __m128i *)codes);
    __m128i twice = _mm_unpacklo_epi8(byte, byte);
    __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
    for (int half = 0; half < 2; half++) {
        __m256i lane = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(twice), shift);
        __m256 low = _mm256_permutevar8x32_ps(first, lane);
        __m256 high = _mm256_permutevar8x32_ps(second, lane);
        __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(lane, 28));
        _mm256_storeu_ps(to + 8 * half, _mm256_blendv_ps(low, high, is_high));
        twice = _mm_srli_si128(twice, 8);
    }
#else
    for (int i = 0; i < 8; i++) {
        to[2 * i] = table[codes[i] >> 4];
        to[2 * i + 1] = table[codes[i] & 15];
    }
#endif
}

/* Row `row` of a 4-bit weight, rounded to `kind`, zeros up to a whole vector. */
static void decode(const Weight *w, int64_t row, int64_t in, int64_t kind, float *to)
{
    float table[16];
    int64_t stop = (row + 1) * in;
    for (int64_t at = row * in; at < stop;) {
        int64_t block = at / w->block_size, end = least((block + 1) * w->block_size, stop);
        float scale = scale_of(w, block);
        for (int i = 0; i < 16; i++) {
            float value = w->codebook[i] * scale;
            table[i] = kind == FLOAT32 ? value : widened(narrowed(value));
        }
        while (at < end) {
            if (at % 2 == 0 && at + LANES <= end) {
                look_up_16(table, w->codes + at / 2, to);
                at += LANES, to += LANES;
            } else {
                uint8_t byte = w->codes[at / 2];
                *to++ = table[at % 2 ? byte & 15 : byte >> 4];
                at++;
            }
        }
    }
    for (int64_t i = in; i % LANES; i++)
        *to++ = 0;
}

static inline __attribute__((always_inline)) void multiply_floats(
    const Product *p, const float *const *w, const float *x, int64_t row, int64_t column,
    int64_t num_columns, const int num_rows)
{
    int64_t width = up_to(p->in, LANES);
    Floats sum[TILE][TILE] = {0};
    for (int64_t i = 0; i < width; i += LANES)
        UNROLLED for (int c = 0; c < TILE; c++) {
            Floats weight = load_floats(w[c] + i);
            UNROLLED for (int r = 0; r < num_rows; r++)
                sum[c][r] += weight * load_floats(x + r * width + i);
        }
    UNROLLED for (int c = 0; c < TILE; c++)
        UNROLLED for (int r = 0; r < num_rows; r++)
            if (c < num_columns)
                write(p, row + r, column + c, sum_of(sum[c][r]));
}

/* Columns [first, stop) of y. `memory`: (rows + TILE) rows of floats. */
static void product_of_floats(const Product *p, int64_t first, int64_t stop, float *memory)
{
    int64_t width = up_to(p->in, LANES);
    float *x = memory, *tile = memory + p->rows * width;
    const float *w[TILE];
    for (int64_t r = 0; r < p->rows; r++)
        widen(p->x, r * p->in, p->in, p->kind, x + r * width);
    for (int64_t column = first; column < stop; column += TILE) {
        int64_t num_columns = least(TILE, stop - column);
        for (int64_t c = 0; c < TILE; c++) {
            int64_t at = column + least(c, num_columns - 1);
            w[c] = tile + least(c, num_columns - 1) * width;
            if (c >= num_columns)
                continue;
            if (!p->dense)
                decode(p->weight, at, p->in, p->kind, tile + c * width);
            else if (p->kind == FLOAT32 && p->in % LANES == 0)
                w[c] = (const float *)p->dense + at * p->in;
            else
                widen(p->dense, at * p->in, p->in, p->kind, tile + c * width);
        }
        for (int64_t c = num_columns; c < TILE; c++)
            w[c] = w[0];
        int64_t row = 0;
        for (; row + TILE <= p->rows; row += TILE)
            multiply_floats(p, w, x + row * width, row, column, num_columns, TILE);
        switch (p->rows - row) {
        case 3: multiply_floats(p, w, x + row * width, row, column, num_columns, 3); break;
        case 2: multiply_floats(p, w, x + row * width, row, column, num_columns, 2); break;
        case 1: multiply_floats(p, w, x + row * width, row, column, num_columns, 1); break;
        }
    }
}

/* ---- pairs of bfloat16 ----------------------------------------------------------------------- */

#if HAS_PAIRS

static inline __m512 add_pairs(__m512 sum, __m512i w, __m512i x)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

static inline __mmask32 lanes_of_pairs(int64_t count)
{
    return count >= 32 ? 0xffffffffu : (__mmask32)((1u << count) - 1);
}

/* The values of 64 codes of one block, of 2^shift values: 0 2 4 ... and 1 3 5 ... */
static inline void decode_chunk(const Weight *w, __m512 codebook, int64_t at, int shift,
                                __m512i *even, __m512i *odd)
{
    __m512 scale = _mm512_set1_ps(scale_of(w, at >> shift));
    __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, scale));
    /* Twice in a row: the fifth bit of an index does no harm. */
    __m512i table = _mm512_broadcast_i64x4(half);
    __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w->codes + at / 2)));
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), table);
    *odd = _mm512_permutexvar_epi16(byte, table);
}

/* Rows of x, each chunk of 64 as its 32 even and its 32 odd values. */
static void order_pairs(const Product *p, bfloat16 *to)
{
    const bfloat16 *x = p->x;
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t at = 0; at < p->rows * p->in; at += CHUNK) {
        __m512i a = _mm512_loadu_si512(x + at), b = _mm512_loadu_si512(x + at + 32);
        __m256i even_a = _mm512_cvtepi32_epi16(_mm512_and_si512(a, low));
        __m256i even_b = _mm512_cvtepi32_epi16(_mm512_and_si512(b, low));
        __m256i odd_a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16));
        __m256i odd_b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16));
        _mm512_storeu_si512(to + at, _mm512_inserti64x4(_mm512_castsi256_si512(even_a), even_b, 1));
        _mm512_storeu_si512(to + at + 32,
                            _mm512_inserti64x4(_mm512_castsi256_si512(odd_a), odd_b, 1));
    }
}

static inline __attribute__((always_inline)) void write_sums(
    const Product *p, __m512 sum[TILE][TILE], int64_t row, int64_t column, int64_t num_columns,
    const int num_rows)
{
    /* Constant bounds: the sums stay in registers. */
    UNROLLED for (int c = 0; c < TILE; c++)
        UNROLLED for (int r = 0; r < num_rows; r++)
            if (c < num_columns)
                write(p, row + r, column + c, _mm512_reduce_add_ps(sum[c][r]));
}

/* Codes are used as they are decoded. */
static inline __attribute__((always_inline)) void multiply_codes(
    const Product *p, const bfloat16 *x, int64_t column, int64_t num_columns, const int num_rows)
{
    __m512 codebook = _mm512_loadu_ps(p->weight->codebook), sum[TILE][TILE];
    int64_t start[TILE];
    const int shift = __builtin_ctzll((uint64_t)p->weight->block_size);
    /* Codes of the tiles after the next: rows are short, and the CPU guesses the jumps late. */
    const int64_t ahead = 2 * TILE * p->in / 2;
    UNROLLED for (int c = 0; c < TILE; c++) {
        start[c] = (column + least(c, num_columns - 1)) * p->in;
        UNROLLED for (int r = 0; r < num_rows; r++)
            sum[c][r] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < p->in; i += CHUNK)
        UNROLLED for (int c = 0; c < TILE; c++) {
            __m512i even, odd;
            _mm_prefetch((const char *)p->weight->codes + (start[c] + i) / 2 + ahead, _MM_HINT_T0);
            decode_chunk(p->weight, codebook, start[c] + i, shift, &even, &odd);
            UNROLLED for (int r = 0; r < num_rows; r++) {
                const bfloat16 *at = x + r * p->in + i;
                sum[c][r] = add_pairs(sum[c][r], even, _mm512_loadu_si512(at));
                sum[c][r] = add_pairs(sum[c][r], odd, _mm512_loadu_si512(at + 32));
            }
        }
    write_sums(p, sum, 0, column, num_columns, num_rows);
}

/* Rows of W and x in the same order, I of them; what is behind a row of x is zero. */
static inline __attribute__((always_inline)) void multiply_pairs(
    const Product *p, const bfloat16 *const *w, const bfloat16 *x, int64_t row, int64_t column,
    int64_t num_columns, const int num_rows)
{
    int64_t width = up_to(p->in, 32);
    __m512 sum[TILE][TILE];
    UNROLLED for (int c = 0; c < TILE; c++)
        UNROLLED for (int r = 0; r < num_rows; r++)
            sum[c][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < p->in; i += 32) {
        __mmask32 mask = lanes_of_pairs(p->in - i);
        UNROLLED for (int c = 0; c < TILE; c++) {
            __m512i weight = _mm512_maskz_loadu_epi16(mask, w[c] + i);
            UNROLLED for (int r = 0; r < num_rows; r++)
                sum[c][r] = add_pairs(sum[c][r], weight, _mm512_loadu_si512(x + r * width + i));
        }
    }
    write_sums(p, sum, row, column, num_columns, num_rows);
}

static void product_of_tile(const Product *p, const bfloat16 *const *w, const bfloat16 *x,
                            int64_t column, int64_t num_columns)
{
    int64_t width = up_to(p->in, 32), row = 0;
    for (; row + TILE <= p->rows; row += TILE)
        multiply_pairs(p, w, x + row * width, row, column, num_columns, TILE);
    x += row * width;
    switch (p->rows - row) {
    case 3: multiply_pairs(p, w, x, row, column, num_columns, 3); break;
    case 2: multiply_pairs(p, w, x, row, column, num_columns, 2); break;
    case 1: multiply_pairs(p, w, x, row, column, num_columns, 1); break;
    }
}

static void product_of_dense(const Product *p, int64_t first, int64_t stop, bfloat16 *x)
{
    int64_t width = up_to(p->in, 32);
    const bfloat16 *w[TILE], *given = p->x;
    for (int64_t r = 0; r < p->rows; r++) {
        memcpy(x + r * width, given + r * p->in, (size_t)p->in * sizeof *x);
        memset(x + r * width + p->in, 0, (size_t)(width - p->in) * sizeof *x);
    }
    for (int64_t column = first; column < stop; column += TILE) {
        int64_t num_columns = least(TILE, stop - column);
        for (int64_t c = 0; c < TILE; c++)
            w[c] = (const bfloat16 *)p->dense + (column + least(c, num_columns - 1)) * p->in;
        product_of_tile(p, w, x, column, num_columns);
    }
}

/* I is a multiple of 64, so that a chunk lies in one row and in one block. */
static void product_of_codes(const Product *p, int64_t first, int64_t stop, bfloat16 *x)
{
    bfloat16 *tile = x + p->rows * p->in;
    const bfloat16 *w[TILE];
    __m512 codebook = _mm512_loadu_ps(p->weight->codebook);
    const int shift = __builtin_ctzll((uint64_t)p->weight->block_size);
    order_pairs(p, x);
    for (int64_t column = first; column < stop; column += TILE) {
        int64_t num_columns = least(TILE, stop - column);
        switch (p->rows) {
        case 1: multiply_codes(p, x, column, num_columns, 1); continue;
        case 2: multiply_codes(p, x, column, num_columns, 2); continue;
        case 3: multiply_codes(p, x, column, num_columns, 3); continue;
        case 4: multiply_codes(p, x, column, num_columns, 4); continue;
        }
        for (int64_t c = 0; c < TILE; c++) {
            w[c] = tile + least(c, num_columns - 1) * p->in;
            if (c >= num_columns)
                continue;
            for (int64_t i = 0; i < p->in; i += CHUNK) {
                __m512i even, odd;
                decode_chunk(p->weight, codebook, (column + c) * p->in + i, shift, &even, &odd);
                _mm512_storeu_si512(tile + c * p->in + i, even);
                _mm512_storeu_si512(tile + c * p->in + i + 32, odd);
            }
        }
        product_of_tile(p, w, x, column, num_columns);
    }
}

#endif

/* ---- calls ----------------------------------------------------------------------------------- */

/* Floats of memory that a call needs. */
int64_t nibble_few_rows_memory(int64_t rows, int64_t in)
{
    return (rows + TILE) * up_to(in, 32);
}

/* Write columns [first, stop) of y. */
void nibble_few_rows(const Product *p, int64_t first, int64_t stop, float *memory)
{
#if HAS_PAIRS
    if (p->kind == BFLOAT16 && p->dense) {
        product_of_dense(p, first, stop, (bfloat16 *)memory);
        return;
    }
    if (p->kind == BFLOAT16 && p->in % CHUNK == 0 && p->weight->block_size % CHUNK == 0) {
        product_of_codes(p, first, stop, (bfloat16 *)memory);
        return;
    }
#endif
    product_of_floats(p, first, stop, memory);
}

/* `count` values, 16 at most, zeros behind them. */
static inline Floats load_values(const void *from, int64_t start, int64_t count, int64_t kind)
{
    if (count == LANES && kind == FLOAT32)
        return load_floats((const float *)from + start);
    if (count == LANES) {
        Halves halves;
        memcpy(&halves, (const bfloat16 *)from + start, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    float values[LANES] = {0};
    widen(from, start, count, kind, values);
    return load_floats(values);
}

/* y += scale * xa B^T from B^T (R, O); xa is float32, b and y are of `kind`. */
void nibble_add_update(const float *xa, const void *b, float scale, int64_t rows, int64_t rank,
                       int64_t out, int64_t kind, void *y)
{
    for (int64_t t = 0; t < rows; t++)
        for (int64_t o = 0; o < out; o += LANES) {
            int64_t count = least(LANES, out - o), at = t * out + o;
            Floats sum = {0};
            for (int64_t r = 0; r < rank; r++)
                sum += xa[t * rank + r] * load_values(b, r * out + o, count, kind);
            sum = load_values(y, at, count, kind) + scale * sum;
            for (int64_t i = 0; i < count; i++) {
                if (kind == FLOAT32)
                    ((float *)y)[at + i] = sum[i];
                else
                    ((bfloat16 *)y)[at + i] = narrowed(sum[i]);
            }
        }
}
