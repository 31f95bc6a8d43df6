/* What stands between the products of a layer, in bfloat16 on a CPU: norms, gated units, rotations,
 * the softmax of attention and of the head. References: layers.py, rotary.py, attention.py,
 * cross_entropy.py.
 *
 * Values are read and written once, computed in float32 and rounded where the reference rounds.
 * Vectors of 16 values in the C of gcc and clang; the compiler cuts them to what the CPU has.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { LANES = 16 };
enum { SILU = 0, GELU_TANH = 1 };

typedef uint16_t bfloat16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

/* ---- vectors --------------------------------------------------------------------------------- */

static inline Floats all(float value)
{
    return value - (Floats){0};
}

static inline Floats widened(Halves halves)
{
#if defined(__AVX512BW__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

/* To nearest, ties to even; NaN stays NaN. Below 1.2e-38 some CPUs give 0. */
static inline Halves narrowed(Floats value)
{
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    Words bits = (Words)value;
    Words sum = bits + 0x7fff + ((bits >> 16) & 1);
    Words is_nan = (Words)(value != value);
    sum = (sum & ~is_nan) | ((bits | 0x400000) & is_nan);
    return __builtin_convertvector(sum >> 16, Halves);
#endif
}

static inline Floats rounded(Floats value)
{
    return widened(narrowed(value));
}

/* `count` values, 16 at most; zeros behind them. */
static inline Floats load(const bfloat16 *from, int64_t count)
{
    Halves halves = {0};
    if (count >= LANES)
        memcpy(&halves, from, sizeof halves);
    else
        memcpy(&halves, from, (size_t)count * sizeof *from);
    return widened(halves);
}

static inline void store(bfloat16 *to, Floats value, int64_t count)
{
    Halves halves = narrowed(value);
    if (count >= LANES)
        memcpy(to, &halves, sizeof halves);
    else
        memcpy(to, &halves, (size_t)count * sizeof *to);
}

static inline Floats load_floats(const float *from)
{
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store_floats(float *to, Floats value)
{
    memcpy(to, &value, sizeof value);
}

static inline float sum_of(Floats value)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += value[i];
    return sum;
}

/* b where one of them is no number. */
static inline Floats larger(Floats a, Floats b)
{
#if defined(__AVX512BW__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    Words is_more = (Words)(a > b);
    return (Floats)(((Words)a & is_more) | ((Words)b & ~is_more));
#endif
}

static inline float largest_of(Floats value)
{
    float found = value[0];
    for (int i = 1; i < LANES; i++)
        found = value[i] > found ? value[i] : found;
    return found;
}

/* The first `count` lanes of a, the others of b. */
static inline Floats first_of(Floats a, Floats b, int64_t count)
{
    Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Words is_first = (Words)(lane < (int32_t)(count < LANES ? count : LANES));
    return (Floats)(((Words)a & is_first) | ((Words)b & ~is_first));
}

/* value * 2^n for whole n; from -127 (0) to 128 (infinite) on some CPUs. */
static inline Floats scaled(Floats value, Floats n)
{
#if defined(__AVX512BW__)
    return (Floats)_mm512_scalef_ps((__m512)value, (__m512)n);
#else
    return value * (Floats)((Words)(__builtin_convertvector(n, Ints) + 127) << 23);
#endif
}

/* 2^n e^r with |r| <= ln(2) / 2 and Taylor's series to r^7: within 1 unit in the last place where
 * the result is a normal number; infinite from 88.8 on, on some CPUs from 88.4. */
static inline Floats exponential(Floats x)
{
    x = -larger(all(-89.0f), -larger(all(-88.0f), x));
    const Floats magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    Floats n = (x * 1.44269504f + magic) - magic;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return scaled(p, n);
}

static inline Floats hyperbolic_tangent(Floats x)
{
    return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

/* ---- norms ----------------------------------------------------------------------------------- */

static inline Floats factor(const bfloat16 *weight, int64_t count, int unit_offset)
{
    return load(weight, count) + (unit_offset ? 1.0f : 0.0f);
}

/* y = x * rstd, scaled; with an offset in float32, else after rounding. */
static inline void scale_row(const bfloat16 *x, const bfloat16 *weight, float rstd, int unit_offset,
                             int64_t width, bfloat16 *y)
{
    for (int64_t i = 0; i < width; i += LANES) {
        Floats normed = load(x + i, width - i) * rstd;
        Floats w = factor(weight + i, width - i, unit_offset);
        store(y + i, unit_offset ? normed * w : rounded(normed) * w, width - i);
    }
}

void nibble_norm(const bfloat16 *x, const bfloat16 *weight, float eps, int unit_offset, int64_t rows,
                 int64_t width, bfloat16 *y, float *rstd)
{
    for (int64_t row = 0; row < rows; row++, x += width, y += width) {
        Floats squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats value = load(x + i, width - i);
            squares += value * value;
        }
        rstd[row] = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
        scale_row(x, weight, rstd[row], unit_offset, width, y);
    }
}

void nibble_norm_again(const bfloat16 *x, const bfloat16 *weight, const float *rstd, int unit_offset,
                       int64_t rows, int64_t width, bfloat16 *y)
{
    for (int64_t row = 0; row < rows; row++)
        scale_row(x + row * width, weight, rstd[row], unit_offset, width, y + row * width);
}

/* grad_x = rstd (s - n mean(s n)) with s = grad * scale and n = x * rstd. */
void nibble_norm_gradient(const bfloat16 *x, const bfloat16 *weight, const float *rstd,
                          const bfloat16 *grad, int unit_offset, int64_t rows, int64_t width,
                          bfloat16 *grad_x)
{
    for (int64_t row = 0; row < rows; row++, x += width, grad += width, grad_x += width) {
        Floats along = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats s = load(grad + i, width - i) * factor(weight + i, width - i, unit_offset);
            along += (unit_offset ? s : rounded(s)) * (load(x + i, width - i) * rstd[row]);
        }
        float mean = sum_of(along) / (float)width;
        for (int64_t i = 0; i < width; i += LANES) {
            Floats s = load(grad + i, width - i) * factor(weight + i, width - i, unit_offset);
            Floats normed = load(x + i, width - i) * rstd[row];
            Floats out = ((unit_offset ? s : rounded(s)) - normed * mean) * rstd[row];
            store(grad_x + i, out, width - i);
        }
    }
}

/* ---- gated units ----------------------------------------------------------------------------- */

/* act(x), and its derivative if `slope` is given. */
static inline Floats activated(Floats x, int activation, Floats *slope)
{
    const float root = 1.5957691216f, cubic = 0.044715f; /* 2 sqrt(2 / pi) */
    Floats square = x * x;
    int is_silu = activation == SILU;
    /* Both are x sigmoid(z): (1 + tanh(u)) / 2 = sigmoid(2u). */
    Floats z = is_silu ? x : root * x * (1.0f + cubic * square);
    Floats sigmoid = 1.0f / (1.0f + exponential(-z));
    if (slope) {
        Floats rise = is_silu ? all(1.0f) : root * (1.0f + 3.0f * cubic * square);
        *slope = sigmoid + x * sigmoid * (1.0f - sigmoid) * rise;
    }
    return x * sigmoid;
}

/* Rows of `width` values; those of gate and up begin `stride` values apart. */
void nibble_gated(const bfloat16 *gate, const bfloat16 *up, int activation, int64_t rows,
                  int64_t width, int64_t stride, bfloat16 *y)
{
    for (int64_t row = 0; row < rows; row++, gate += stride, up += stride, y += width)
        for (int64_t i = 0; i < width; i += LANES) {
            Floats act = rounded(activated(load(gate + i, width - i), activation, NULL));
            store(y + i, act * load(up + i, width - i), width - i);
        }
}

void nibble_gated_gradient(const bfloat16 *gate, const bfloat16 *up, const bfloat16 *grad,
                           int activation, int64_t rows, int64_t width, int64_t stride,
                           bfloat16 *grad_gate, bfloat16 *grad_up)
{
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < width; i += LANES) {
            Floats slope, g = load(grad + i, width - i);
            Floats act = activated(load(gate + i, width - i), activation, &slope);
            store(grad_up + i, rounded(act) * g, width - i);
            store(grad_gate + i, rounded(g * load(up + i, width - i)) * slope, width - i);
        }
        gate += stride, up += stride, grad += width, grad_gate += width, grad_up += width;
    }
}

/* ---- rotations ------------------------------------------------------------------------------- */

/* y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin for the halves of each head; `sign` -1 turns back.
 * Values of a head and token begin at head * strides[0] + token * strides[1] of x, strides[2] and
 * strides[3] of y. cos and sin are (tokens, turned); what is behind the turned part is copied. */
void nibble_rotate(const bfloat16 *x, const bfloat16 *cos, const bfloat16 *sin, float sign,
                   const int64_t sizes[4], const int64_t strides[4], bfloat16 *y)
{
    int64_t heads = sizes[0], tokens = sizes[1], width = sizes[2], turned = sizes[3];
    int64_t half = turned / 2;
    for (int64_t head = 0; head < heads; head++)
        for (int64_t token = 0; token < tokens; token++) {
            const bfloat16 *from = x + head * strides[0] + token * strides[1];
            bfloat16 *to = y + head * strides[2] + token * strides[3];
            const bfloat16 *c = cos + token * turned, *s = sin + token * turned;
            for (int64_t i = 0; i < half; i += LANES) {
                Floats x1 = load(from + i, half - i), x2 = load(from + half + i, half - i);
                Floats s1 = load(s + i, half - i), s2 = load(s + half + i, half - i);
                /* Forward the sines belong to where a value goes, backward to where it came from. */
                Floats turn1 = x2 * (sign > 0 ? s1 : s2), turn2 = x1 * (sign > 0 ? s2 : s1);
                Floats y1 = rounded(x1 * load(c + i, half - i)) - sign * rounded(turn1);
                Floats y2 = rounded(x2 * load(c + half + i, half - i)) + sign * rounded(turn2);
                store(to + i, y1, half - i);
                store(to + half + i, y2, half - i);
            }
            memcpy(to + turned, from + turned, (size_t)(width - turned) * sizeof *to);
        }
}

/* ---- attention ------------------------------------------------------------------------------- */

/* `count` values, 16 at most; zeros behind them. */
static inline Floats load_some(const float *from, int64_t count)
{
    Floats value = {0};
    if (count >= LANES)
        memcpy(&value, from, sizeof value);
    else
        memcpy(&value, from, (size_t)count * sizeof *from);
    return value;
}

static inline void store_some(float *to, Floats value, int64_t count)
{
    if (count >= LANES)
        memcpy(to, &value, sizeof value);
    else
        memcpy(to, &value, (size_t)count * sizeof *to);
}

/* Results below the normal numbers become 0 until `restore`. With them in its factors a product takes
 * ten times as long on some CPUs, and probabilities of far keys have them. */
static inline unsigned flush_subnormals(void)
{
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void restore(unsigned before)
{
#if defined(__SSE2__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* exp(scale * (scores - max)) of the first `seen` values into `row`; returns one over their sum. */
static inline float exponentials(const float *scores, float scale, int64_t seen, float *row)
{
    Floats none = all(-INFINITY), high = none, total = {0};
    for (int64_t i = 0; i < seen; i += LANES)
        high = larger(high, first_of(load_some(scores + i, seen - i) * scale, none, seen - i));
    float highest = largest_of(high);
    for (int64_t i = 0; i < seen; i += LANES) {
        Floats e = exponential(load_some(scores + i, seen - i) * scale - highest);
        e = first_of(e, (Floats){0}, seen - i);
        total += e;
        store_floats(row + i, e);
    }
    return 1.0f / sum_of(total);
}

/* Scores (matrices, rows, keys) become probabilities; row r sees all keys but the last
 * rows - 1 - r. Returns nonzero without memory. */
int nibble_attend(float *scores, float scale, int64_t matrices, int64_t rows, int64_t keys)
{
    float *row = malloc((size_t)(keys + LANES) * sizeof *row);
    if (!row)
        return 1;
    unsigned before = flush_subnormals();
    for (int64_t r = 0; r < matrices * rows; r++, scores += keys) {
        int64_t seen = keys - rows + 1 + r % rows;
        float inverse = exponentials(scores, scale, seen, row);
        for (int64_t i = 0; i < seen; i += LANES)
            store_some(scores + i, load_floats(row + i) * inverse, seen - i);
        memset(scores + seen, 0, (size_t)(keys - seen) * sizeof *scores);
    }
    restore(before);
    free(row);
    return 0;
}

/* Scores become probabilities p, and the gradient of p that of scores / scale, times scale:
 * scale p (grad - sum(p grad)). */
int nibble_attend_gradient(float *scores, float *grad, float scale, int64_t matrices, int64_t rows,
                           int64_t keys)
{
    float *row = malloc((size_t)(keys + LANES) * sizeof *row);
    if (!row)
        return 1;
    unsigned before = flush_subnormals();
    for (int64_t r = 0; r < matrices * rows; r++, scores += keys, grad += keys) {
        int64_t seen = keys - rows + 1 + r % rows;
        float inverse = exponentials(scores, scale, seen, row);
        Floats along = {0};
        for (int64_t i = 0; i < seen; i += LANES)
            along += load_floats(row + i) * load_some(grad + i, seen - i);
        float sum = sum_of(along) * inverse;
        for (int64_t i = 0; i < seen; i += LANES) {
            Floats p = load_floats(row + i) * inverse;
            store_some(scores + i, p, seen - i);
            store_some(grad + i, (load_some(grad + i, seen - i) - sum) * p * scale, seen - i);
        }
        memset(scores + seen, 0, (size_t)(keys - seen) * sizeof *scores);
        memset(grad + seen, 0, (size_t)(keys - seen) * sizeof *grad);
    }
    restore(before);
    free(row);
    return 0;
}

/* ---- the head -------------------------------------------------------------------------------- */

/* A logit of the raw product, and its derivative if `slope` is given; a cap of 0 is none. */
static inline Floats shaped(Floats raw, float scale, float cap, Floats *slope)
{
    if (cap == 0.0f) {
        if (slope)
            *slope = all(scale);
        return raw * scale;
    }
    Floats t = hyperbolic_tangent(raw * scale / cap);
    if (slope)
        *slope = (1.0f - t * t) * scale;
    return cap * t;
}

/* Raw products (rows, width) become the gradients of the summed cross-entropy; returns the sum. */
double nibble_head(bfloat16 *raw, const int64_t *labels, float scale, float cap, int64_t rows,
                   int64_t width)
{
    double loss = 0;
    for (int64_t r = 0; r < rows; r++, raw += width) {
        Floats none = all(-INFINITY), high = none, total = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats z = shaped(load(raw + i, width - i), scale, cap, NULL);
            high = larger(high, first_of(z, none, width - i));
        }
        float highest = largest_of(high);
        for (int64_t i = 0; i < width; i += LANES) {
            Floats z = shaped(load(raw + i, width - i), scale, cap, NULL);
            total += first_of(exponential(z - highest), (Floats){0}, width - i);
        }
        float sum = sum_of(total), inverse = 1.0f / sum;
        Floats slope, at_label = shaped(load(raw + labels[r], 1), scale, cap, &slope);
        float target = at_label[0];
        loss += (double)highest + log((double)sum) - (double)target;
        float there = (expf(target - highest) * inverse - 1.0f) * slope[0];
        for (int64_t i = 0; i < width; i += LANES) {
            Floats z = shaped(load(raw + i, width - i), scale, cap, &slope);
            store(raw + i, exponential(z - highest) * inverse * slope, width - i);
        }
        store(raw + labels[r], all(there), 1);
    }
    return loss;
}
