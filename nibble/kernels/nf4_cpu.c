/* 4-bit weights on a CPU: encode blocks, decode ranges, search scales. Format and references:
 * nf4_reference.py, nf4_search.py.
 *
 * Decoding multiplies the 16 codebook values of a block by its scale and rounds them once; every
 * value is then a look-up of 16 or 32 bits. So the result is exactly round(code * scale), and the
 * rounding costs 16 operations a block instead of one a value.
 *
 * Must be compiled with -ffp-contract=off and without -ffast-math: product and sum of a nested
 * scale, and the sums of a search, are rounded one by one.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "nf4_weight.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { MAX_BLOCK = 4096 };

const char *nibble_instructions(void)
{
#if defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "portable";
#endif
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest, ties to even; NaN stays NaN. */
static uint16_t to_bfloat16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* To nearest, ties to even; overflow is infinite, NaN stays NaN. */
static uint16_t to_float16(float value)
{
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) /* 65520, half way past the largest */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* below 2^-14: a sum with 0.5 rounds at 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

/* ---- decode ---------------------------------------------------------------------------------- */

typedef union {
    float f32[16];
    uint32_t u32[16];
    uint16_t u16[16];
} Table;

static void fill_table(Table *table, const float *codebook, float scale, int kind)
{
    float value[16];
    for (int i = 0; i < 16; i++)
        value[i] = codebook[i] * scale;
    if (kind == FLOAT32)
        memcpy(table->f32, value, sizeof value);
    else if (kind == BFLOAT16)
        for (int i = 0; i < 16; i++)
            table->u16[i] = to_bfloat16(value[i]);
    else
        for (int i = 0; i < 16; i++)
            table->u16[i] = to_float16(value[i]);
}

/* Values [start, stop), one at a time. */
static void look_up(const Table *table, const uint8_t *codes, int64_t start, int64_t stop,
                    void *out, int kind)
{
    for (int64_t i = start; i < stop; i++) {
        int code = i & 1 ? codes[i >> 1] & 15 : codes[i >> 1] >> 4;
        if (kind == FLOAT32)
            ((uint32_t *)out)[i - start] = table->u32[code];
        else
            ((uint16_t *)out)[i - start] = table->u16[code];
    }
}

#if defined(__AVX512BW__)

/* The 16 products, rounded, twice in a row: a stray fifth bit of an index does no harm. */
static __m512i rounded_twice(__m512 value, int kind)
{
    __m256i half;
    if (kind == FLOAT16) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m512i bits = _mm512_castps_si512(value);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        sum = _mm512_mask_or_epi32(sum, is_nan, bits, _mm512_set1_epi32(0x400000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
    }
    return _mm512_broadcast_i64x4(half);
}

/* `count` values of one block, a multiple of 32, from a whole byte on. */
static void look_up_many(const float *codebook, float scale, const uint8_t *codes, int64_t count,
                         void *out, int kind)
{
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
    if (kind == FLOAT32) {
        /* Each byte stands twice; the even lane shifts its high code down. */
        const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
        for (int64_t i = 0; i < count; i += 16) {
            __m128i byte = _mm_loadl_epi64((const __m128i *)(codes + i / 2));
            __m512i lane = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(byte, byte));
            lane = _mm512_srlv_epi32(lane, shift);
            _mm512_storeu_ps((float *)out + i, _mm512_permutexvar_ps(lane, value));
        }
        return;
    }
    __m512i table = rounded_twice(value, kind);
    for (int64_t i = 0; i < count; i += 32) {
        /* A 32-bit lane holds byte b as b >> 4 | b << 16: its halves are the two codes. */
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i code = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512((uint16_t *)out + i, _mm512_permutexvar_epi16(code, table));
    }
}

#elif defined(__AVX2__)

/* As above. The low and the high bytes of the table are looked up apart and woven together. */
static void look_up_many(const float *codebook, float scale, const uint8_t *codes, int64_t count,
                         void *out, int kind)
{
    Table table;
    fill_table(&table, codebook, scale, kind);
    if (kind == FLOAT32) {
        look_up(&table, codes, 0, count, out, kind);
        return;
    }
    const __m128i mask = _mm_set1_epi8(15), low_byte = _mm_set1_epi16(255);
    __m128i first_half = _mm_loadu_si128((const __m128i *)table.u16);
    __m128i second_half = _mm_loadu_si128((const __m128i *)(table.u16 + 8));
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(first_half, low_byte),
                                          _mm_and_si128(second_half, low_byte));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first_half, 8),
                                           _mm_srli_epi16(second_half, 8));
    for (int64_t i = 0; i < count; i += 32) {
        __m128i byte = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        __m128i even = _mm_and_si128(_mm_srli_epi16(byte, 4), mask);
        __m128i odd = _mm_and_si128(byte, mask);
        __m128i code[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int h = 0; h < 2; h++) {
            __m128i l = _mm_shuffle_epi8(lows, code[h]), u = _mm_shuffle_epi8(highs, code[h]);
            __m128i *to = (__m128i *)((uint16_t *)out + i + 16 * h);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(l, u));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, u));
        }
    }
}

#else

static void look_up_many(const float *codebook, float scale, const uint8_t *codes, int64_t count,
                         void *out, int kind)
{
    Table table;
    fill_table(&table, codebook, scale, kind);
    look_up(&table, codes, 0, count, out, kind);
}

#endif

/* Write values [start, start + count) of the weight to `out`, counted flat. */
void nibble_decode(const Weight *w, int64_t start, int64_t count, void *out, int kind)
{
    int64_t width = kind == FLOAT32 ? 4 : 2, stop = start + count;
    for (int64_t at = start; at < stop;) {
        int64_t block = at / w->block_size, end = (block + 1) * w->block_size;
        if (end > stop)
            end = stop;
        char *to = (char *)out + (at - start) * width;
        float scale = scale_of(w, block);
        int64_t many = at & 1 ? 0 : (end - at) / 32 * 32;
        if (many)
            look_up_many(w->codebook, scale, w->codes + at / 2, many, to, kind);
        if (at + many < end) {
            Table table;
            fill_table(&table, w->codebook, scale, kind);
            look_up(&table, w->codes, at + many, end, to + many * width, kind);
        }
        at = end;
    }
}

/* ---- encode ---------------------------------------------------------------------------------- */

static void load(const void *values, int64_t start, int64_t count, int kind, float *to)
{
    if (kind == FLOAT32) {
        memcpy(to, (const float *)values + start, (size_t)count * sizeof(float));
        return;
    }
    const uint16_t *from = (const uint16_t *)values + start;
    for (int64_t i = 0; i < count; i++)
        to[i] = float_of((uint32_t)from[i] << 16);
}

/* The largest magnitude. As integers the order of finite values is the same, and NaN is on top. */
static float measure_absmax(const float *values, int64_t count)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(largest);
}

/* rank = how many of the 15 bounds lie below the value. */
static void rank_values(const float *values, int64_t count, const float *bounds, int32_t *rank)
{
    for (int64_t i = 0; i < count; i++) {
        int32_t below = 0;
        for (int k = 0; k < 15; k++)
            below += values[i] > bounds[k];
        rank[i] = below;
    }
}

/* Encode `count` values from block boundary on; `kind` is FLOAT32 or BFLOAT16. A last, shorter
 * block is divided by its scale, a full one is multiplied by the reciprocal. */
void nibble_encode(const void *values, int kind, int64_t count, int64_t block_size,
                   const float *bounds, const uint8_t *order, int measure, float *scale,
                   uint8_t *codes)
{
    const float smallest = 1e-38f;
    float scaled[MAX_BLOCK + 1];
    int32_t rank[MAX_BLOCK + 1];
    for (int64_t block = 0, at = 0; at < count; block++, at += block_size) {
        int is_full = count - at >= block_size;
        int64_t length = is_full ? block_size : count - at;
        load(values, at, length, kind, scaled);
        if (measure) {
            float absmax = measure_absmax(scaled, length);
            scale[block] = !is_full && absmax < smallest ? smallest : absmax;
        }
        float divisor = scale[block] < smallest ? smallest : scale[block];
        if (scale[block] < 0)
            divisor = scale[block] > -smallest ? -smallest : scale[block];
        float reciprocal = 1.0f / divisor;
        for (int64_t i = 0; i < length; i++)
            scaled[i] = is_full ? scaled[i] * reciprocal : scaled[i] / divisor;
        scaled[length] = 0.0f; /* the nibble that an odd count leaves */
        rank_values(scaled, length + (length & 1), bounds, rank);
        uint8_t *to = codes + at / 2;
        for (int64_t i = 0; i < (length + 1) / 2; i++)
            to[i] = (uint8_t)(order[rank[2 * i]] << 4 | order[rank[2 * i + 1]]);
    }
}

/* ---- search ---------------------------------------------------------------------------------- */

enum { LANES = 16, NUM_LEVELS = 16 };

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Masks __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *bounds;        /* 15 */
    const float *levels;        /* 16, ascending */
    const float *factors;
    int64_t num_factors;
    int64_t num_refits;
    float smallest, largest;    /* magnitudes that are searched */
    float least_gain;
} Search;

typedef struct {
    float factor, gain;
} Found;

static float sum_lanes(Lanes lane)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static Lanes load_lanes(const float *values)
{
    Lanes lanes;
    memcpy(&lanes, values, sizeof lanes);
    return lanes;
}

#if defined(__AVX512BW__)

/* The levels of sixteen values between the bounds `limit`, found by halving. */
static inline Lanes nearest_levels(Lanes value, const float *limit, const float *levels)
{
    __m512 limits = _mm512_loadu_ps(limit);
    __m512i rank = _mm512_setzero_si512();
    for (int half = 8; half; half /= 2) {
        __m512i middle = _mm512_add_epi32(rank, _mm512_set1_epi32(half - 1));
        __m512 bound = _mm512_permutexvar_ps(middle, limits);
        __mmask16 is_above = _mm512_cmp_ps_mask((__m512)value, bound, _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, is_above, rank, _mm512_set1_epi32(half));
    }
    return (Lanes)_mm512_permutexvar_ps(rank, _mm512_loadu_ps(levels));
}

#else

static inline Lanes nearest_levels(Lanes value, const float *limit, const float *levels)
{
    Lanes level = levels[0] - (Lanes){0};
    for (int k = 0; k < NUM_LEVELS - 1; k++) {
        Masks is_above = value > limit[k] - (Lanes){0}, above = (Masks)(levels[k + 1] - (Lanes){0});
        level = (Lanes)((is_above & above) | (~is_above & (Masks)level));
    }
    return level;
}

#endif

static void set_limits(const Search *s, float factor, float *limit)
{
    for (int k = 0; k < NUM_LEVELS - 1; k++)
        limit[k] = factor * s->bounds[k];
    limit[NUM_LEVELS - 1] = INFINITY;
}

/* Take the best factor of the levels at `factor` if it gains more than what is found. */
static void try_factor(const Search *s, const float *values, int64_t count, float factor,
                       Found *found)
{
    float limit[NUM_LEVELS];
    Lanes product = {0}, square = {0};
    set_limits(s, factor, limit);
    for (int64_t at = 0; at < count; at += LANES) {
        Lanes value = load_lanes(values + at), level = nearest_levels(value, limit, s->levels);
        product += value * level;
        square += level * level;
    }
    float p = sum_lanes(product), q = sum_lanes(square), gain = p * p / q;
    if (gain > found->gain)
        *found = (Found){p / q, gain};
}

static float squared_error(const Search *s, const float *values, int64_t count, float factor)
{
    float limit[NUM_LEVELS];
    Lanes error = {0};
    set_limits(s, factor, limit);
    for (int64_t at = 0; at < count; at += LANES) {
        Lanes value = load_lanes(values + at);
        Lanes rest = value - factor * nearest_levels(value, limit, s->levels);
        error += rest * rest;
    }
    return sum_lanes(error);
}

/* The factor of least error, or 1. `values` lie in [-1, 1]; `negated` is for them the other way. */
static float search_block(const Search *s, const float *values, float *negated, int64_t count)
{
    const float *side[2] = {values, negated};
    Found found = {1.0f, 0.0f};
    int best = 0;
    for (int64_t i = 0; i < count; i++)
        negated[i] = -values[i];
    for (int n = 0; n < 2; n++) {
        float before = found.gain;
        for (int64_t f = 0; f < s->num_factors; f++)
            try_factor(s, side[n], count, s->factors[f], &found);
        best = found.gain > before ? n : best;
    }
    for (int64_t n = 0; n < s->num_refits; n++)
        try_factor(s, side[best], count, found.factor, &found);
    float saved = squared_error(s, values, count, 1.0f);
    saved -= squared_error(s, side[best], count, found.factor);
    if (!(saved > count * s->least_gain))
        return 1.0f;
    return best ? -found.factor : found.factor;
}

/* Write the scale of least squared error of each block of `count` values to `scale`. */
void nibble_search(const Search *s, const void *values, int kind, int64_t count, int64_t block_size,
                   const float *absmax, float *scale)
{
    float scaled[MAX_BLOCK], negated[MAX_BLOCK];
    for (int64_t block = 0, at = 0; at < count; block++, at += block_size) {
        int64_t length = count - at < block_size ? count - at : block_size;
        scale[block] = absmax[block];
        if (!(absmax[block] >= s->smallest && absmax[block] <= s->largest))
            continue;
        load(values, at, length, kind, scaled);
        memset(scaled + length, 0, (size_t)(block_size - length) * sizeof(float));
        float reciprocal = 1.0f / absmax[block];
        for (int64_t i = 0; i < length; i++)
            scaled[i] *= reciprocal;
        scale[block] *= search_block(s, scaled, negated, block_size);
    }
}
