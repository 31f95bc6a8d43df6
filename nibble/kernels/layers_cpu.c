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

#if defined(__AVX512BW__)
static inline __mmask16 lanes(int64_t count)
{
    return (__mmask16)(count < LANES ? (1u << count) - 1 : 0xffff);
}
#endif

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

/* `count` values, 16 at most; zeros behind them. */
static inline Floats load_some(const float *from, int64_t count)
{
#if defined(__AVX512BW__)
    return (Floats)_mm512_maskz_loadu_ps(lanes(count), from);
#else
    Floats value = {0};
    memcpy(&value, from, (size_t)(count < LANES ? count : LANES) * sizeof *from);
    return value;
#endif
}

static inline void store_some(float *to, Floats value, int64_t count)
{
#if defined(__AVX512BW__)
    _mm512_mask_storeu_ps(to, lanes(count), (__m512)value);
#else
    memcpy(to, &value, (size_t)(count < LANES ? count : LANES) * sizeof *to);
#endif
}

static inline float sum_of(Floats value)
{
#if defined(__AVX512BW__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += value[i];
    return sum;
#endif
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
#if defined(__AVX512BW__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float found = value[0];
    for (int i = 1; i < LANES; i++)
        found = value[i] > found ? value[i] : found;
    return found;
#endif
}

/* The first `count` lanes of a, the others of b. */
static inline Floats first_of(Floats a, Floats b, int64_t count)
{
#if defined(__AVX512BW__)
    return (Floats)_mm512_mask_blend_ps(lanes(count), (__m512)b, (__m512)a);
#else
    Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Words is_first = (Words)(lane < (int32_t)(count < LANES ? count : LANES));
    return (Floats)(((Words)a & is_first) | ((Words)b & ~is_first));
#endif
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

/* A row of scores becomes probabilities of the first `seen` keys. `row` has room for a row. */
static inline void attend_row(float *scores, float scale, int64_t seen, int64_t keys, float *row)
{
    float inverse = exponentials(scores, scale, seen, row);
    for (int64_t i = 0; i < seen; i += LANES)
        store_some(scores + i, load_floats(row + i) * inverse, seen - i);
    memset(scores + seen, 0, (size_t)(keys - seen) * sizeof *scores);
}

/* A row of scores becomes probabilities p, and the gradient of p that of scores / scale, times scale:
 * scale p (grad - sum(p grad)). */
static inline void attend_gradient_row(float *scores, float *grad, float scale, int64_t seen,
                                       int64_t keys, float *row)
{
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

/* Scores (matrices, rows, keys) become probabilities; row r sees all keys but the last
 * rows - 1 - r. Returns nonzero without memory. */
int nibble_attend(float *scores, float scale, int64_t matrices, int64_t rows, int64_t keys)
{
    float *row = malloc((size_t)(keys + LANES) * sizeof *row);
    if (!row)
        return 1;
    unsigned before = flush_subnormals();
    for (int64_t r = 0; r < matrices * rows; r++, scores += keys)
        attend_row(scores, scale, keys - rows + 1 + r % rows, keys, row);
    restore(before);
    free(row);
    return 0;
}

/* The same, and the gradient of the probabilities becomes that of the scores. */
int nibble_attend_gradient(float *scores, float *grad, float scale, int64_t matrices, int64_t rows,
                           int64_t keys)
{
    float *row = malloc((size_t)(keys + LANES) * sizeof *row);
    if (!row)
        return 1;
    unsigned before = flush_subnormals();
    for (int64_t r = 0; r < matrices * rows; r++, scores += keys, grad += keys)
        attend_gradient_row(scores, grad, scale, keys - rows + 1 + r % rows, keys, row);
    restore(before);
    free(row);
    return 0;
}

/* ---- attention of whole documents, its products in float32 ----------------------------------- */

#if defined(__AVX512F__)
enum { TILE = 8, VECTORS = 2 };
#else
enum { TILE = 4, VECTORS = 1 };
#endif
enum { ACROSS = VECTORS * LANES, BLOCK = 32 };

/* A factor; its values lie `row` apart in a column and `step` apart in a row. */
typedef struct {
    const float *at;
    int64_t row, step;
} Matrix;

/* c = a b, or c += a b, for a (rows, depth) and b (depth, columns); rows come in multiples of TILE,
 * columns of ACROSS: a tile of c stays in registers. Rows of b and c are dense. */
static void multiply(Matrix a, Matrix b, float *c, int64_t c_row, int64_t rows, int64_t columns,
                     int64_t depth, int add)
{
    for (int64_t j = 0; j < columns; j += ACROSS)
        for (int64_t i = 0; i < rows; i += TILE) {
            const float *down = a.at + i * a.row, *along = b.at + j;
            float *to = c + i * c_row + j;
            Floats sums[TILE][VECTORS];
            for (int r = 0; r < TILE; r++)
                for (int n = 0; n < VECTORS; n++)
                    sums[r][n] = add ? load_floats(to + r * c_row + n * LANES) : (Floats){0};
            for (int64_t d = 0; d < depth; d++, down += a.step, along += b.row) {
                Floats values[VECTORS];
                for (int n = 0; n < VECTORS; n++)
                    values[n] = load_floats(along + n * LANES);
                for (int r = 0; r < TILE; r++)
                    for (int n = 0; n < VECTORS; n++)
                        sums[r][n] += all(down[r * a.row]) * values[n];
            }
            for (int r = 0; r < TILE; r++)
                for (int n = 0; n < VECTORS; n++)
                    store_floats(to + r * c_row + n * LANES, sums[r][n]);
        }
}

static inline int64_t up_to(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

/* Tokens of a document and width of a head; `padded` and `across` are what they take up in memory. */
typedef struct {
    int64_t tokens, padded, width, across;
    float scale;
} Sizes;

static Sizes sizes_of(int64_t tokens, int64_t width, float scale)
{
    int64_t padded = up_to(tokens, ACROSS);
    if (padded % 256 == 0) /* rows that begin whole pages apart push each other out of the cache */
        padded += ACROSS;
    return (Sizes){tokens, padded, width, up_to(width, ACROSS), scale};
}

/* Floats that `nibble_attention` (or its gradient) needs for documents up to this length. */
int64_t nibble_attention_floats(int64_t tokens, int64_t width, int is_gradient)
{
    Sizes s = sizes_of(tokens, width, 0);
    int64_t by_token = s.padded * s.across, by_block = BLOCK * (s.padded + 2 * s.across);
    int64_t row = s.padded + LANES;
    if (is_gradient)
        return 3 * by_token + 2 * s.width * s.padded + by_block + BLOCK * (s.padded + s.across) + row;
    return by_token + s.width * s.padded + by_block + row;
}

/* One head: token t begins at at + t * stride. */
typedef struct {
    bfloat16 *at;
    int64_t stride;
} Head;

/* Head `head` from `token` on, of states with two strides each: of heads and of tokens. */
static Head head_of(bfloat16 *const *states, const int64_t *strides, int which, int64_t head,
                    int64_t token)
{
    int64_t stride = strides[2 * which + 1];
    return (Head){states[which] + head * strides[2 * which] + token * stride, stride};
}

/* The first tokens in float32, zeros behind and below. */
static void widen(Head head, int64_t tokens, Sizes s, float *to, int64_t rows)
{
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < s.across; i += LANES, to += LANES) {
            int64_t count = t < tokens && i < s.width ? s.width - i : 0;
            store_floats(to, count ? load(head.at + t * head.stride + i, count) : (Floats){0});
        }
}

static void narrow(const float *from, int64_t tokens, Sizes s, Head head)
{
    for (int64_t t = 0; t < tokens; t++, from += s.across)
        for (int64_t i = 0; i < s.width; i += LANES)
            store(head.at + t * head.stride + i, load_floats(from + i), s.width - i);
}

/* (padded, across) -> (width, padded). */
static void transpose(const float *from, Sizes s, float *to)
{
    for (int64_t t = 0; t < s.padded; t++, from += s.across)
        for (int64_t i = 0; i < s.width; i++)
            to[i * s.padded + t] = from[i];
}

/* q, k, v, y of a document: heads from `head` on that share the key head `key_head`. */
static void attend_document(bfloat16 *const *states, const int64_t *strides, int64_t head,
                            int64_t num_heads, int64_t key_head, int64_t token, Sizes s,
                            float *memory)
{
    float *values = memory, *keys = values + s.padded * s.across;
    float *scores = keys + s.width * s.padded, *query = scores + BLOCK * s.padded;
    float *out = query + BLOCK * s.across, *row = out + BLOCK * s.across;
    widen(head_of(states, strides, 1, key_head, token), s.tokens, s, values, s.padded);
    transpose(values, s, keys);
    widen(head_of(states, strides, 2, key_head, token), s.tokens, s, values, s.padded);
    for (int64_t h = head; h < head + num_heads; h++)
        for (int64_t first = 0; first < s.tokens; first += BLOCK) {
            int64_t rows = s.tokens - first < BLOCK ? s.tokens - first : BLOCK;
            int64_t tiled = up_to(rows, TILE), seen = up_to(first + rows, ACROSS);
            widen(head_of(states, strides, 0, h, token + first), rows, s, query, tiled);
            multiply((Matrix){query, s.across, 1}, (Matrix){keys, s.padded, 1}, scores, s.padded,
                     tiled, seen, s.width, 0);
            for (int64_t r = 0; r < rows; r++)
                attend_row(scores + r * s.padded, s.scale, first + r + 1, seen, row);
            multiply((Matrix){scores, s.padded, 1}, (Matrix){values, s.across, 1}, out, s.across,
                     tiled, s.across, first + rows, 0);
            narrow(out, rows, s, head_of(states, strides, 3, h, token + first));
        }
}

/* q, k, v, the gradient of y, and the gradients of q, k, v that it makes. */
static void attend_document_gradient(bfloat16 *const *states, const int64_t *strides, int64_t head,
                                     int64_t num_heads, int64_t key_head, int64_t token, Sizes s,
                                     float *memory)
{
    int64_t by_token = s.padded * s.across, by_block = BLOCK * s.across;
    float *keys = memory, *grad_keys = keys + by_token, *grad_values = grad_keys + by_token;
    float *keys_turned = grad_values + by_token, *values_turned = keys_turned + s.width * s.padded;
    float *scores = values_turned + s.width * s.padded, *grad_scores = scores + BLOCK * s.padded;
    float *query = grad_scores + BLOCK * s.padded, *grad = query + by_block, *out = grad + by_block;
    float *row = out + by_block;
    widen(head_of(states, strides, 2, key_head, token), s.tokens, s, keys, s.padded);
    transpose(keys, s, values_turned);
    widen(head_of(states, strides, 1, key_head, token), s.tokens, s, keys, s.padded);
    transpose(keys, s, keys_turned);
    memset(grad_keys, 0, (size_t)(2 * by_token) * sizeof *grad_keys);
    for (int64_t h = head; h < head + num_heads; h++)
        for (int64_t first = 0; first < s.tokens; first += BLOCK) {
            int64_t rows = s.tokens - first < BLOCK ? s.tokens - first : BLOCK;
            int64_t tiled = up_to(rows, TILE), seen = up_to(first + rows, ACROSS);
            Matrix q = {query, s.across, 1}, g = {grad, s.across, 1};
            widen(head_of(states, strides, 0, h, token + first), rows, s, query, tiled);
            widen(head_of(states, strides, 3, h, token + first), rows, s, grad, tiled);
            multiply(q, (Matrix){keys_turned, s.padded, 1}, scores, s.padded, tiled, seen, s.width,
                     0);
            multiply(g, (Matrix){values_turned, s.padded, 1}, grad_scores, s.padded, tiled, seen,
                     s.width, 0);
            for (int64_t r = 0; r < rows; r++)
                attend_gradient_row(scores + r * s.padded, grad_scores + r * s.padded, s.scale,
                                    first + r + 1, seen, row);
            int64_t keys_seen = up_to(first + rows, TILE);
            multiply((Matrix){scores, 1, s.padded}, g, grad_values, s.across, keys_seen, s.across,
                     rows, 1);
            multiply((Matrix){grad_scores, 1, s.padded}, q, grad_keys, s.across, keys_seen,
                     s.across, rows, 1);
            multiply((Matrix){grad_scores, s.padded, 1}, (Matrix){keys, s.across, 1}, out, s.across,
                     tiled, s.across, first + rows, 0);
            narrow(out, rows, s, head_of(states, strides, 4, h, token + first));
        }
    narrow(grad_keys, s.tokens, s, head_of(states, strides, 5, key_head, token));
    narrow(grad_values, s.tokens, s, head_of(states, strides, 6, key_head, token));
}

/* Parts `first` to `stop` of attention: part p is key head p % key_heads of document p / key_heads,
 * which goes from token documents[d] to documents[d + 1]. */
void nibble_attention(bfloat16 *const *states, const int64_t *strides, const int64_t *documents,
                      int64_t heads, int64_t key_heads, int64_t width, float scale, int is_gradient,
                      int64_t first, int64_t stop, float *memory)
{
    unsigned before = flush_subnormals();
    int64_t shared = heads / key_heads;
    for (int64_t part = first; part < stop; part++) {
        int64_t key_head = part % key_heads, token = documents[part / key_heads];
        Sizes s = sizes_of(documents[part / key_heads + 1] - token, width, scale);
        if (is_gradient)
            attend_document_gradient(states, strides, key_head * shared, shared, key_head, token, s,
                                     memory);
        else
            attend_document(states, strides, key_head * shared, shared, key_head, token, s, memory);
    }
    restore(before);
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

/* ---- attention of new tokens to what their sequences keep ------------------------------------ */

/* One new token of each sequence. What a key head keeps: keys (width, room), values (room, width);
 * 32 keys can be read from any key on. */
typedef struct {
    const bfloat16 *query, *key, *value;    /* of the new tokens */
    bfloat16 *y;                            /* (tokens, heads, width) */
    bfloat16 *const *keys, *const *values;  /* by sequence */
    const int64_t *lengths, *rooms;         /* keys kept before, and room for keys, by sequence */
    int64_t strides[6];                     /* of heads and tokens: query, key, value */
    int64_t heads, key_heads, width;
    int64_t window;                         /* keys seen at most */
    float scale, softcap;                   /* a cap of 0 is none */
} Cached;

enum { SHARED = 4, KEYS = 2 * LANES };

/* Scores of some heads with `seen` keys from `keys` on, shaped. */
static inline __attribute__((always_inline)) void score_keys(
    const Cached *c, const bfloat16 *keys, int64_t room, int64_t seen, const float *query,
    float *scores, int64_t padded, const int heads)
{
    for (int64_t j = 0; j < seen; j += KEYS) {
        Floats low[SHARED] = {0}, high[SHARED] = {0};
        for (int64_t i = 0; i < c->width; i++) {
            Floats a = load(keys + i * room + j, LANES), b = load(keys + i * room + j + LANES, LANES);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                low[h] += all(query[h * c->width + i]) * a;
                high[h] += all(query[h * c->width + i]) * b;
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            store_floats(scores + h * padded + j, shaped(low[h], c->scale, c->softcap, NULL));
            store_floats(scores + h * padded + j + LANES,
                         shaped(high[h], c->scale, c->softcap, NULL));
        }
    }
}

/* The values of some heads, weighted: `vectors` vectors of them from `values` on. */
static inline __attribute__((always_inline)) void weigh_values(
    const Cached *c, const bfloat16 *values, int64_t seen, const float *scores, int64_t padded,
    bfloat16 *y, int64_t count, const int heads, const int vectors)
{
    Floats sums[SHARED][4] = {0};
    for (int64_t j = 0; j < seen; j++, values += c->width)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) {
            Floats value = load(values + n * LANES, vectors == 1 ? count : LANES);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                sums[h][n] += all(scores[h * padded + j]) * value;
        }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++)
            store(y + h * c->width + n * LANES, sums[h][n], vectors == 1 ? count : LANES);
}

static inline __attribute__((always_inline)) void attend_heads(
    const Cached *c, int64_t token, const bfloat16 *keys, const bfloat16 *values, int64_t seen,
    int64_t head, float *memory, const int heads)
{
    int64_t padded = up_to(seen, KEYS), i = 0;
    float *query = memory, *scores = query + SHARED * up_to(c->width, LANES);
    float *row = scores + SHARED * padded;
    for (int h = 0; h < heads; h++)
        for (int64_t at = 0; at < c->width; at++)
            query[h * c->width + at] = load(c->query + (head + h) * c->strides[0] +
                                            token * c->strides[1] + at, 1)[0];
    score_keys(c, keys, c->rooms[token], seen, query, scores, padded, heads);
    for (int h = 0; h < heads; h++)
        attend_row(scores + h * padded, 1.0f, seen, seen, row);
    bfloat16 *y = c->y + (token * c->heads + head) * c->width;
    for (; i + 4 * LANES <= c->width; i += 4 * LANES)
        weigh_values(c, values + i, seen, scores, padded, y + i, 0, heads, 4);
    for (; i < c->width; i += LANES) {
        int64_t count = c->width - i < LANES ? c->width - i : LANES;
        weigh_values(c, values + i, seen, scores, padded, y + i, count, heads, 1);
    }
}

/* Floats that a call needs for so many keys. */
int64_t nibble_cached_floats(int64_t keys, int64_t width)
{
    return SHARED * (up_to(width, LANES) + up_to(keys, KEYS)) + up_to(keys, KEYS) + LANES;
}

/* Keep the new tokens and attend to all: parts `first` to `stop`, part p is key head p % key_heads
 * of sequence p / key_heads. */
void nibble_cached_attention(const Cached *c, int64_t first, int64_t stop, float *memory)
{
    unsigned before = flush_subnormals();
    int64_t shared = c->heads / c->key_heads;
    for (int64_t part = first; part < stop; part++) {
        int64_t key_head = part % c->key_heads, token = part / c->key_heads;
        int64_t length = c->lengths[token], room = c->rooms[token];
        bfloat16 *keys = c->keys[token] + key_head * room * c->width;
        bfloat16 *values = c->values[token] + key_head * room * c->width;
        const bfloat16 *key = c->key + key_head * c->strides[2] + token * c->strides[3];
        const bfloat16 *value = c->value + key_head * c->strides[4] + token * c->strides[5];
        for (int64_t i = 0; i < c->width; i++)
            keys[i * room + length] = key[i];
        memcpy(values + length * c->width, value, (size_t)c->width * sizeof *value);
        int64_t from = length + 1 > c->window ? length + 1 - c->window : 0;
        int64_t seen = length + 1 - from, head = key_head * shared, rest = shared;
        keys += from, values += from * c->width;
        for (; rest >= SHARED; rest -= SHARED, head += SHARED)
            attend_heads(c, token, keys, values, seen, head, memory, SHARED);
        switch (rest) {
        case 3: attend_heads(c, token, keys, values, seen, head, memory, 3); break;
        case 2: attend_heads(c, token, keys, values, seen, head, memory, 2); break;
        case 1: attend_heads(c, token, keys, values, seen, head, memory, 1); break;
        }
    }
    restore(before);
}
