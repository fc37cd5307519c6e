/* A dense Qwen2.5 model over a list of tokens, fp32, on a CPU: what a decoding step costs here is
 * arithmetic alone, where a step written as some hundred tensor operations pays for each of them.
 *
 * Tokens are columns. They are taken in blocks of 32, and an activation of a block is stored as
 * [size][32]: a vector register holds one feature of 16 tokens (8 or 4 with shorter registers), so
 * norms and SwiGLU are plain loops, and a product with a weight matrix (row-major, as PyTorch
 * keeps it) multiplies single weights by such vectors. No weight is copied or reordered.
 *
 * Any number of tokens of any rows may stand in one call: a prompt, or one new token of each row.
 * All of them write their keys and values before any of them looks. The last block is filled up
 * with columns that belong to no token: they are computed along and nothing reads them.
 *
 * Every number is made by one thread, in an order that depends on the model's sizes alone: neither
 * the number of threads nor the other tokens of the call change a bit of it.
 *
 * Shapes: T tokens, N rows, D hidden, H query heads, G key/value heads, K head dim, S columns of
 * the cache, F ffn, V vocabulary.
 */

#include "vectors.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#if LANES == 16
#define ROWS 12 /* 12 rows x 2 vectors of sums, of 32 registers */
#else
#define ROWS 3 /* 3 x 4 of 16 registers; 3 x 8 of 32 */
#endif
#define BLOCK 32
#define VECTORS (BLOCK / LANES)
#define COLUMNS(left) (int)((left) < BLOCK ? (left) : BLOCK)
#ifdef _OPENMP
#define BARRIER _Pragma("omp barrier")
#else
#define BARRIER
#endif
/* Rows of a matrix in panels of ROWS, dealt out to the threads. */
#define EACH_PANEL(end) \
    for (int64_t f = (int64_t)thread * ROWS; f < (end); f += (int64_t)threads * ROWS)

typedef struct {
    const float *norm_1, *qkv, *qkv_bias, *out, *norm_2, *gate_up, *down;
    float *keys, *values; /* (N, G, S, K) */
} Layer;

typedef struct {
    int64_t layers, hidden, heads, groups, head_dim, ffn, vocabulary, columns;
    float eps, scale;
    const float *embedding, *norm, *head, *cos, *sin; /* cos, sin: (S, K), as rope_tables has them */
    const Layer *layer;
} Model;

typedef struct {
    int64_t tokens, wanted, threads, own_size;
    const int64_t *ids, *row, *column; /* of each token; column: its place in the cache */
    const int64_t *first;              /* of each row: the column of its first real token */
    const int64_t *want;               /* the tokens whose logits are wanted */
    float *logits;                     /* (wanted, V) */
    float *x, *qkv, *mixed, *hidden;   /* room: blocks of D, tokens of (H+2G)K, blocks of HK, of F */
    float *own;                        /* own_size = max(32 D, S + 16) for each thread */
} Call;

inlined int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* sums[r][v] = row r of the panel times the block's columns, the first `vectors` of them; the other
 * sums are zero. Meanwhile the panel `next` is fetched from memory. */
inlined void product(
    const float *panel, const float *next, const float *x, int64_t size, int vectors,
    vec sums[ROWS][VECTORS]
) {
    vec acc[ROWS][VECTORS];
    const float *three[ROWS / 3]; /* every third row: the ones between are reached by the stride */
#pragma GCC unroll 16
    for (int r = 0; r < ROWS / 3; r++) three[r] = panel + 3 * r * size;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) acc[r][v] = all(0);
    for (int64_t d = 0; d < size; d++) {
        if (d % 16 == 0)
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(next + r * size + d);
        vec xs[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) xs[v] = load(x + d * BLOCK + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) acc[r][v] += three[r / 3][r % 3 * size] * xs[v];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS / 3; r++) three[r]++;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) sums[r][v] = v < vectors ? acc[r][v] : all(0);
}

/* Sums of ROWS rows of a matrix of `end` >= ROWS rows from `first`; returns how many of them are
 * rows before it: the last panel begins earlier, so that it is whole. */
static int panel_product(
    const float *weight, int64_t first, int64_t end, const float *x, int64_t size, int columns,
    int threads, vec sums[ROWS][VECTORS]
) {
    const int64_t begin = least(first, end - ROWS);
    const float *panel = weight + begin * size;
    /* This thread's next one. */
    const float *next = weight + least(first + (int64_t)threads * ROWS, end - ROWS) * size;
    if (columns > BLOCK / 2)
        product(panel, next, x, size, VECTORS, sums);
    else
        product(panel, next, x, size, VECTORS / 2, sums);
    return (int)(first - begin);
}

inlined void rms_norm(
    const float *x, const float *gain, int64_t size, float eps, float *y
) {
    for (int v = 0; v < BLOCK; v += LANES) {
        vec squares = all(0);
        for (int64_t d = 0; d < size; d++) {
            vec value = load(x + d * BLOCK + v);
            squares += value * value;
        }
        vec inverse = squares / (float)size + eps;
        for (int i = 0; i < LANES; i++) inverse[i] = 1.0f / __builtin_sqrtf(inverse[i]);
        for (int64_t d = 0; d < size; d++)
            store(y + d * BLOCK + v, load(x + d * BLOCK + v) * inverse * gain[d]);
    }
}

/* out[t][r] = sums[r][t] + bias[r] for the panel's rows from `skip`: from columns back to rows. */
static void store_rows(
    vec sums[ROWS][VECTORS], int skip, int columns, const float *bias, float *out, int64_t width
) {
    const float *sum = (const float *)sums;
    int r = skip;
    for (; r + 4 <= ROWS; r += 4) {
        const float *at = sum + r * BLOCK;
        quad add = bias ? *(const quad *)(bias + r) : (quad){0};
        for (int t = 0; t < columns; t++)
            *(quad *)(out + t * width + r) = add +
                (quad){at[t], at[t + BLOCK], at[t + 2 * BLOCK], at[t + 3 * BLOCK]};
    }
    for (; r < ROWS; r++)
        for (int t = 0; t < columns; t++)
            out[t * width + r] = sum[r * BLOCK + t] + (bias ? bias[r] : 0);
}

inlined void rotate(float *head, const float *cos, const float *sin, int64_t size) {
    int64_t half = size / 2;
    for (int64_t k = 0; k < half; k++) {
        float a = head[k], b = head[k + half];
        head[k] = a * cos[k] + b * sin[k];
        head[k + half] = b * cos[k + half] + a * sin[k + half];
    }
}

/* One query over `count` keys; weights: room for them. Writes `size` values, BLOCK apart. */
inlined void attend_of(
    const float *query, const float *keys, const float *values, int64_t count, int64_t size,
    float scale, float *weights, float *out
) {
    for (int64_t s = 0; s < count; s++, keys += size) {
        vec sum = load(query) * load(keys);
        for (int64_t k = LANES; k < size; k += LANES) sum += load(query + k) * load(keys + k);
        weights[s] = total(sum) * scale;
    }
    const int64_t end = (count + LANES - 1) / LANES * LANES;
    for (int64_t s = count; s < end; s++) weights[s] = -__builtin_inff();
    vec most = load(weights), mass = all(0);
    for (int64_t s = LANES; s < end; s += LANES) most = larger(most, load(weights + s));
    const float top = largest(most);
    for (int64_t s = 0; s < end; s += LANES) {
        const vec score = load(weights + s);
        const vec weight = choose(score == -__builtin_inff(), all(0), exponential(score - top));
        store(weights + s, weight);
        mass += weight;
    }
    const float share = 1.0f / total(mass);
    for (int64_t k = 0; k < size; k += LANES) {
        vec part[4] = {0}; /* four chains of sums, as each addition waits for the last */
        const float *value = values + k;
        int64_t s = 0;
        for (; s + 4 <= count; s += 4, value += 4 * size)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) part[i] += weights[s + i] * load(value + i * size);
        for (; s < count; s++, value += size) part[0] += weights[s] * load(value);
        const vec sum = ((part[0] + part[1]) + (part[2] + part[3])) * share;
        for (int i = 0; i < LANES; i++) out[(k + i) * BLOCK] = sum[i];
    }
}

/* The same, with the usual head sizes known to the compiler. */
static void attend(
    const float *query, const float *keys, const float *values, int64_t count, int64_t size,
    float scale, float *weights, float *out
) {
    if (size == 32)
        attend_of(query, keys, values, count, 32, scale, weights, out);
    else if (size == 64)
        attend_of(query, keys, values, count, 64, scale, weights, out);
    else if (size == 128)
        attend_of(query, keys, values, count, 128, scale, weights, out);
    else
        attend_of(query, keys, values, count, size, scale, weights, out);
}

/* x += weight y, for the panels of this thread. */
static void add_product(
    const float *weight, const float *y, int64_t size, float *x, const Model *m, const Call *c,
    int thread, int threads
) {
    vec sums[ROWS][VECTORS];
    for (int64_t b = 0; b * BLOCK < c->tokens; b++)
        EACH_PANEL(m->hidden) {
            const int skip = panel_product(
                weight, f, m->hidden, y + b * size * BLOCK, size, COLUMNS(c->tokens - b * BLOCK),
                threads, sums
            );
            for (int r = skip; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) {
                    float *at = x + (b * m->hidden + f - skip + r) * BLOCK + v * LANES;
                    store(at, load(at) + sums[r][v]);
                }
        }
}

static void layer_of(const Model *m, const Layer *l, const Call *c, int thread, int threads) {
    const int64_t D = m->hidden, H = m->heads, G = m->groups, K = m->head_dim, F = m->ffn;
    const int64_t width = (H + 2 * G) * K, T = c->tokens, blocks = (T + BLOCK - 1) / BLOCK;
    float *own = c->own + thread * c->own_size;
    vec sums[ROWS][VECTORS];

    for (int64_t b = 0; b < blocks; b++) {
        rms_norm(c->x + b * D * BLOCK, l->norm_1, D, m->eps, own);
        EACH_PANEL(width) {
            const int columns = COLUMNS(T - b * BLOCK);
            const int skip = panel_product(l->qkv, f, width, own, D, columns, threads, sums);
            const int64_t from = f - skip;
            store_rows(
                sums, skip, columns, l->qkv_bias + from, c->qkv + b * BLOCK * width + from, width
            );
        }
    }
    BARRIER
    for (int64_t t = thread; t < T; t += threads) {
        float *heads = c->qkv + t * width;
        const int64_t s = c->column[t], position = s - c->first[c->row[t]];
        for (int64_t h = 0; h < H + G; h++)
            rotate(heads + h * K, m->cos + position * K, m->sin + position * K, K);
        for (int64_t g = 0; g < G; g++) {
            const int64_t at = ((c->row[t] * G + g) * m->columns + s) * K;
            memcpy(l->keys + at, heads + (H + g) * K, K * sizeof(float));
            memcpy(l->values + at, heads + (H + G + g) * K, K * sizeof(float));
        }
    }
    BARRIER
    for (int64_t i = thread; i < T * H; i += threads) {
        const int64_t t = i / H, h = i % H, first = c->first[c->row[t]];
        const int64_t at = ((c->row[t] * G + h / (H / G)) * m->columns + first) * K;
        attend(
            c->qkv + t * width + h * K, l->keys + at, l->values + at, c->column[t] + 1 - first, K,
            m->scale, own, c->mixed + (t / BLOCK * H * K + h * K) * BLOCK + t % BLOCK
        );
    }
    BARRIER
    add_product(l->out, c->mixed, H * K, c->x, m, c, thread, threads);
    BARRIER
    for (int64_t b = 0; b < blocks; b++) {
        rms_norm(c->x + b * D * BLOCK, l->norm_2, D, m->eps, own);
        EACH_PANEL(F) {
            vec gate[ROWS][VECTORS];
            const int columns = COLUMNS(T - b * BLOCK);
            const float *up = l->gate_up + F * D;
            panel_product(l->gate_up, f, F, own, D, columns, threads, gate);
            const int skip = panel_product(up, f, F, own, D, columns, threads, sums);
            for (int r = skip; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    store(
                        c->hidden + (b * F + f - skip + r) * BLOCK + v * LANES,
                        gate[r][v] / (1.0f + exponential(-gate[r][v])) * sums[r][v]
                    );
        }
    }
    BARRIER
    add_product(l->down, c->hidden, F, c->x, m, c, thread, threads);
    BARRIER
}

void qwen_forward(const Model *m, const Call *c) {
    const int64_t D = m->hidden, T = c->tokens, V = m->vocabulary;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)c->threads)
#endif
    {
        int thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num();
        threads = omp_get_num_threads();
#endif
        float *own = c->own + thread * c->own_size;
        vec sums[ROWS][VECTORS];
        const int64_t padded = (T + BLOCK - 1) / BLOCK * BLOCK;
        for (int64_t t = thread; t < padded; t += threads)
            for (int64_t d = 0; d < D; d++)
                c->x[(t / BLOCK * D + d) * BLOCK + t % BLOCK] =
                    t < T ? m->embedding[c->ids[t] * D + d] : 0;
        BARRIER
        for (int64_t l = 0; l < m->layers; l++) layer_of(m, m->layer + l, c, thread, threads);
        for (int64_t first = 0; first < c->wanted; first += BLOCK) {
            const int columns = COLUMNS(c->wanted - first);
            memset(own, 0, D * BLOCK * sizeof(float));
            for (int i = 0; i < columns; i++) {
                const int64_t t = c->want[first + i];
                for (int64_t d = 0; d < D; d++)
                    own[d * BLOCK + i] = c->x[(t / BLOCK * D + d) * BLOCK + t % BLOCK];
            }
            rms_norm(own, m->norm, D, m->eps, own);
            EACH_PANEL(V) {
                const int skip = panel_product(m->head, f, V, own, D, columns, threads, sums);
                store_rows(sums, skip, columns, 0, c->logits + first * V + f - skip, V);
            }
        }
    }
}
