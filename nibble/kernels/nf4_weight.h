/* A weight in 4 bits, as nf4_reference.py describes it. */
#ifndef NIBBLE_NF4_WEIGHT_H
#define NIBBLE_NF4_WEIGHT_H

#include <stdint.h>

enum { NESTED_BLOCK = 256 };

typedef struct {
    const uint8_t *codes;
    const float *codebook;      /* 16 values */
    const void *absmax;         /* float, or uint8_t when `nested` is given */
    const float *map;           /* 256 values */
    const float *nested;        /* NULL without double quantisation */
    const float *offset;
    int64_t block_size;
} Weight;

/* Product and sum are rounded one by one, if compiled with -ffp-contract=off. */
static inline float scale_of(const Weight *w, int64_t block)
{
    if (!w->nested)
        return ((const float *)w->absmax)[block];
    float nested = w->nested[(uint64_t)block / NESTED_BLOCK];
    return w->map[((const uint8_t *)w->absmax)[block]] * nested + *w->offset;
}

#endif
