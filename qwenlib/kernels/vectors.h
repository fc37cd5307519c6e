/* Vectors of fp32 in GCC's and clang's own types, as wide as the processor's registers. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define inlined static inline __attribute__((always_inline))

#define VECTOR(bytes) __attribute__((vector_size(bytes), aligned(4), may_alias))
typedef float vec VECTOR(4 * LANES);
typedef int32_t ivec VECTOR(4 * LANES);
typedef uint32_t uvec VECTOR(4 * LANES);
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float quad VECTOR(16);
typedef float octet VECTOR(32);

inlined vec load(const float *at) { return *(const vec *)at; }
inlined void store(float *at, vec value) { *(vec *)at = value; }
inlined vec all(float value) { return value - (vec){0}; }
inlined vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
inlined vec larger(vec a, vec b) { return choose(a > b, a, b); } /* b, where either is NaN */
inlined vec smaller(vec a, vec b) { return choose(a < b, a, b); }

/* e^x = 2^n e^r with |r| <= ln 2 / 2; eight terms of the series leave 1e-8. NaN stays NaN. */
inlined vec exponential(vec x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x)); /* 2^n within what an exponent holds */
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23 rounds to a whole number */
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec sum = all(1.0f / 5040);
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

inlined float total(vec value) {
#if LANES == 16
    octet half[2];
    memcpy(half, &value, sizeof value);
    half[0] += half[1];
    quad part[2];
    memcpy(part, half, sizeof part);
    const quad four = part[0] + part[1];
#elif LANES == 8
    quad part[2];
    memcpy(part, &value, sizeof value);
    const quad four = part[0] + part[1];
#else
    const quad four = value;
#endif
    return (four[0] + four[1]) + (four[2] + four[3]);
}

inlined float largest(vec value) {
    float most = value[0];
    for (int i = 1; i < LANES; i++) most = value[i] > most ? value[i] : most;
    return most;
}

/* bf16 is the upper half of fp32. */
inlined vec load_bf16(const uint16_t *at) {
    return (vec)(__builtin_convertvector(*(const halves *)at, uvec) << 16);
}

inlined void store_bf16(uint16_t *at, vec value) { /* to the nearest, ties to even */
    uvec bits = (uvec)value;
    bits += 0x7fff + ((bits >> 16) & 1);
    *(halves *)at = __builtin_convertvector(bits >> 16, halves);
}
