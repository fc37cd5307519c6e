/* Rows of logits into the gradients of their cross-entropy, by way of a copy of one row that stays
 * in a cache (8 KB for 2,048 tokens, 600 KB for 151,936). PyTorch's operations take the whole
 * matrix through memory eight times.
 *
 * Shapes: M rows, V vocabulary.
 */

#include <math.h>

#include "vectors.h"

/* scores: the row's logits, padded with -inf to whole vectors; they become the gradients. */
inlined void gradients(
    float *scores, int64_t size, int64_t target, float *loss, int64_t *likeliest
) {
    vec most = load(scores), mass = all(0);
    for (int64_t v = LANES; v < size; v += LANES) most = larger(most, load(scores + v));
    const float top = largest(most), picked = scores[target];
    *likeliest = picked == top;
    for (int64_t v = 0; v < target && *likeliest; v++) *likeliest = scores[v] < top;
    for (int64_t v = 0; v < size; v += LANES) {
        const vec part = exponential(load(scores + v) - top);
        store(scores + v, part);
        mass += part;
    }
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += mass[i];
    *loss = (top - picked) + (float)log(sum);
    const float share = (float)(1 / sum);
    for (int64_t v = 0; v < size; v += LANES) store(scores + v, load(scores + v) * share);
    scores[target] -= 1;
}

/* room: V + LANES floats for each thread. bf16: whether the logits are bf16, else fp32. */
void cross_entropy(
    void *logits, int64_t bf16, int64_t M, int64_t V, const int64_t *target, float *loss,
    int64_t *likeliest, float *rooms, int64_t threads
) {
    const int64_t size = (V + LANES - 1) / LANES * LANES, whole = V / LANES * LANES;
#ifdef _OPENMP
#pragma omp parallel for num_threads((int)threads) schedule(static)
#endif
    for (int64_t part = 0; part < threads; part++) {
        float *scores = rooms + part * (V + LANES);
        for (int64_t m = part * M / threads; m < (part + 1) * M / threads; m++) {
            float *row = (float *)logits + m * V;
            uint16_t *row_bf16 = (uint16_t *)logits + m * V;
            for (int64_t v = whole; v < size; v++) scores[v] = -INFINITY;
            if (bf16) {
                for (int64_t v = 0; v < whole; v += LANES)
                    store(scores + v, load_bf16(row_bf16 + v));
                for (int64_t v = whole; v < V; v++) {
                    const uint32_t bits = (uint32_t)row_bf16[v] << 16;
                    memcpy(scores + v, &bits, 4);
                }
            } else
                memcpy(scores, row, V * sizeof(float));
            gradients(scores, size, target[m], loss + m, likeliest + m);
            if (bf16) {
                for (int64_t v = 0; v < whole; v += LANES)
                    store_bf16(row_bf16 + v, load(scores + v));
                for (int64_t v = whole; v < V; v++) {
                    uint32_t bits;
                    memcpy(&bits, scores + v, 4);
                    row_bf16[v] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                }
            } else
                memcpy(row, scores, V * sizeof(float));
        }
    }
}
