/* 4-bit codes on a CPU: the inner loops of nf4.py, bit for bit.
 *
 * A weight is flat; a block is block_size values (a multiple of 32) with one float32 scale; two
 * codes share a byte, the first in the high nibble. Work is split over threads by blocks.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { MAX_THREADS = 64 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef struct {
    int64_t first, last; /* values, multiples of block_size but for the end */
    int64_t block_size;
    const float *absmax, *table, *values;
    const uint8_t *order;
    uint8_t *codes;
    void *out;
    int type;
    uint8_t zero; /* number of thresholds below 0 */
} Job;

static inline uint16_t round_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static void store(const Job *job, int64_t i, float value) {
    if (job->type == FLOAT32)
        ((float *)job->out)[i] = value;
    else
        ((uint16_t *)job->out)[i] = round_to_bfloat16(value);
}

static void decode_range(const Job *job, int64_t first, int64_t last, float scale) {
    for (int64_t i = first; i < last; i++) {
        uint8_t byte = job->codes[i / 2];
        store(job, i, job->table[i % 2 ? byte & 15 : byte >> 4] * scale);
    }
}

#ifdef __AVX512F__
static inline __m512i rounded(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
}

/* 32 values from 16 bytes: the two values of a byte are the halves of one 32-bit word. */
static void decode_block(const Job *job, int64_t first, int64_t last, float scale) {
    if (job->type != BFLOAT16 || first % 2) {
        decode_range(job, first, last, scale);
        return;
    }
    __m512 table = _mm512_loadu_ps(job->table), wide = _mm512_set1_ps(scale);
    int64_t i = first;
    for (; i + 32 <= last; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(job->codes + i / 2));
        __m512i words = _mm512_cvtepu8_epi32(bytes);
        __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
        __m512 low = _mm512_permutexvar_ps(_mm512_and_si512(words, _mm512_set1_epi32(15)), table);
        __m512i a = _mm512_srli_epi32(rounded(_mm512_mul_ps(high, wide)), 16);
        __m512i b = rounded(_mm512_mul_ps(low, wide));
        b = _mm512_and_si512(b, _mm512_set1_epi32((int)0xFFFF0000u));
        _mm512_storeu_si512((uint16_t *)job->out + i, _mm512_or_si512(a, b));
    }
    decode_range(job, i, last, scale);
}
#else
#define decode_block decode_range
#endif

static void *decode(void *argument) {
    const Job *job = argument;
    for (int64_t i = job->first; i < job->last; i += job->block_size) {
        int64_t end = i + job->block_size < job->last ? i + job->block_size : job->last;
        decode_block(job, i, end, job->absmax[i / job->block_size]);
    }
    return 0;
}

static void *encode(void *argument) {
    const Job *job = argument;
    for (int64_t i = job->first; i < job->last; i += job->block_size) {
        int64_t end = i + job->block_size < job->last ? i + job->block_size : job->last;
        float scale = fmaxf(job->absmax[i / job->block_size], 1e-38f);
        int whole = end - i == job->block_size;
        float factor = 1.0f / scale;
        uint8_t place[4097];
        for (int64_t j = 0; j < end - i; j++) {
            float value = whole ? job->values[i + j] * factor : job->values[i + j] / scale;
            uint8_t above = 0;
            for (int k = 0; k < 15; k++) above += value > job->table[k];
            place[j] = above;
        }
        if ((end - i) % 2) place[end - i] = job->zero;
        for (int64_t j = 0; j < end - i; j += 2) {
            uint8_t pair = (uint8_t)(job->order[place[j]] << 4 | job->order[place[j + 1]]);
            job->codes[(i + j) / 2] = pair;
        }
    }
    return 0;
}

static void run(void *(*work)(void *), Job job, int64_t count, int num_threads) {
    pthread_t threads[MAX_THREADS];
    Job jobs[MAX_THREADS];
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (count < (1 << 17) || num_threads < 1) num_threads = 1;
    int64_t blocks = (count + job.block_size - 1) / job.block_size;
    int started[MAX_THREADS] = {0};
    for (int t = num_threads - 1; t >= 0; t--) {
        jobs[t] = job;
        jobs[t].first = blocks * t / num_threads * job.block_size;
        jobs[t].last = blocks * (t + 1) / num_threads * job.block_size;
        if (jobs[t].last > count) jobs[t].last = count;
        if (t > 0) started[t] = pthread_create(&threads[t], 0, work, &jobs[t]) == 0;
        if (!started[t]) work(&jobs[t]);
    }
    for (int t = 1; t < num_threads; t++)
        if (started[t]) pthread_join(threads[t], 0);
}

/* out[i] = table[code i] * absmax[i / block_size], type 0 float32 or 1 bfloat16. */
void nibble_decode(const uint8_t *codes, const float *absmax, const float *table, void *out,
                   int64_t count, int64_t block_size, int type, int num_threads) {
    Job job = {.block_size = block_size, .absmax = absmax, .table = table,
               .codes = (uint8_t *)codes, .out = out, .type = type};
    run(decode, job, count, num_threads);
}

/* codes of order[number of midpoints below values[i] / absmax[i / block_size]]. */
void nibble_encode(const float *values, const float *absmax, const float *midpoints,
                   const uint8_t *order, uint8_t *codes, int64_t count, int64_t block_size,
                   int num_threads) {
    Job job = {.block_size = block_size, .absmax = absmax, .table = midpoints,
               .values = values, .order = order, .codes = codes};
    for (int k = 0; k < 15; k++) job.zero += midpoints[k] < 0;
    run(encode, job, count, num_threads);
}
