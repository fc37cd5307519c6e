/* The merges of byte-level BPE over counted words: the same as `readable_merges` in trainer.py.
 *
 * A word is a run of token ids. A pair of neighbours knows how often it occurs in all words, and
 * which words have held it: the inverted index; a word may be listed that holds it no longer. A
 * merge makes pairs with the new id and takes others away, so a pair's count is highest when it is
 * made. Then it goes into the heap, once; a count that has fallen is put right when it comes to
 * the top. The top is the highest count, of equal ones the pair with the smallest ids.
 *
 * Functions return -1 where memory runs out; then the trainer can only be freed.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint64_t ids; /* left << 32 | right: ordered as (left, right) is */
    int64_t count;
    uint32_t *words;
    int64_t size, room;
} Pair;

typedef struct {
    int64_t count;
    uint64_t ids;
    uint32_t pair; /* its place in `pairs` */
} Entry;

typedef struct {
    int32_t *ids;                        /* of all words, one after the other */
    int64_t *start, *length, *frequency; /* of each word */
    Pair *pairs;
    int64_t size, room;
    uint32_t *slots; /* hash table, open addressing: 1 + the pair's place, 0 for free */
    int bits;        /* it has 2^bits slots */
    Entry *heap;
    int64_t heap_size, heap_room;
} Trainer;

/* The array, with room for one more element than `size`; NULL where there is none. */
static void *grow(void *array, int64_t size, int64_t *room, size_t element) {
    if (size < *room) return array;
    const int64_t more = *room ? 2 * *room : 4;
    void *larger = realloc(array, (size_t)more * element);
    if (larger) *room = more;
    return larger;
}

static uint64_t key(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* The slot that holds a pair, or the free one where it belongs. */
static uint32_t *slot_of(const Trainer *t, uint64_t ids) {
    const uint64_t last = ((uint64_t)1 << t->bits) - 1;
    uint64_t at = (ids * 0x9e3779b97f4a7c15u) >> (64 - t->bits);
    while (t->slots[at] && t->pairs[t->slots[at] - 1].ids != ids) at = (at + 1) & last;
    return t->slots + at;
}

static int widen(Trainer *t) {
    uint32_t *slots = calloc((size_t)2 << t->bits, sizeof *slots);
    if (!slots) return -1;
    free(t->slots);
    t->slots = slots;
    t->bits++;
    for (int64_t i = 0; i < t->size; i++) *slot_of(t, t->pairs[i].ids) = (uint32_t)i + 1;
    return 0;
}

/* The pair of these ids occurs n times more, in this word (fewer times: n < 0). */
static int change(Trainer *t, int32_t left, int32_t right, int64_t n, int64_t word) {
    const uint64_t ids = key(left, right);
    uint32_t *slot = slot_of(t, ids);
    if (!*slot) {
        if (t->size >= UINT32_MAX - 1) return -1;
        if (2 * (t->size + 1) > (int64_t)1 << t->bits) {
            if (widen(t)) return -1;
            slot = slot_of(t, ids);
        }
        Pair *pairs = grow(t->pairs, t->size, &t->room, sizeof *pairs);
        if (!pairs) return -1;
        t->pairs = pairs;
        t->pairs[t->size] = (Pair){.ids = ids};
        *slot = (uint32_t)++t->size;
    }
    Pair *pair = t->pairs + *slot - 1;
    pair->count += n;
    if (n < 0 || (pair->size && pair->words[pair->size - 1] == (uint32_t)word)) return 0;
    uint32_t *words = grow(pair->words, pair->size, &pair->room, sizeof *words);
    if (!words) return -1;
    pair->words = words;
    pair->words[pair->size++] = (uint32_t)word;
    return 0;
}

static int before(Entry a, Entry b) {
    return a.count != b.count ? a.count > b.count : a.ids < b.ids;
}

static void sift_down(Trainer *t) {
    const Entry moved = t->heap[0];
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= t->heap_size) break;
        if (child + 1 < t->heap_size && before(t->heap[child + 1], t->heap[child])) child++;
        if (!before(t->heap[child], moved)) break;
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = moved;
}

/* The pairs made since there were `known` go into the heap. */
static int queue(Trainer *t, int64_t known) {
    for (int64_t i = known; i < t->size; i++) {
        Entry *heap = grow(t->heap, t->heap_size, &t->heap_room, sizeof *heap);
        if (!heap) return -1;
        t->heap = heap;
        const Entry entry = {t->pairs[i].count, t->pairs[i].ids, (uint32_t)i};
        int64_t at = t->heap_size++;
        for (; at && before(entry, heap[(at - 1) / 2]); at = (at - 1) / 2)
            heap[at] = heap[(at - 1) / 2];
        heap[at] = entry;
    }
    return 0;
}

void bpe_free(Trainer *t) {
    if (!t) return;
    for (int64_t i = 0; i < t->size; i++) free(t->pairs[i].words);
    free(t->pairs);
    free(t->slots);
    free(t->heap);
    free(t->ids);
    free(t->start);
    free(t->length);
    free(t->frequency);
    free(t);
}

/* A trainer of `words` words, below 2^32. ids: those of all words' bytes, one after the other.
 * NULL where memory runs out. */
Trainer *bpe_new(
    int64_t words, const uint8_t *ids, const int64_t *length, const int64_t *frequency
) {
    Trainer *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    int64_t total = 0;
    for (int64_t w = 0; w < words; w++) total += length[w];
    const size_t size = (size_t)(words + 1) * sizeof(int64_t);
    t->bits = 12;
    t->slots = calloc((size_t)1 << t->bits, sizeof *t->slots);
    t->ids = malloc((size_t)(total + 1) * sizeof *t->ids);
    t->start = malloc(size);
    t->length = malloc(size);
    t->frequency = malloc(size);
    if (!t->slots || !t->ids || !t->start || !t->length || !t->frequency) goto failed;
    for (int64_t i = 0; i < total; i++) t->ids[i] = ids[i];
    int64_t start = 0;
    for (int64_t w = 0; w < words; w++) {
        t->start[w] = start;
        t->length[w] = length[w];
        t->frequency[w] = frequency[w];
        for (int64_t i = start + 1; i < start + length[w]; i++)
            if (change(t, t->ids[i - 1], t->ids[i], frequency[w], w)) goto failed;
        start += length[w];
    }
    if (queue(t, 0)) goto failed;
    return t;
failed:
    bpe_free(t);
    return NULL;
}

/* The count of the most frequent pair, whose ids go to `pair`; 0 where no word has a pair. */
int64_t bpe_best(Trainer *t, int32_t *pair) {
    while (t->heap_size) {
        Entry *top = t->heap;
        const int64_t count = t->pairs[top->pair].count;
        if (top->count == count) {
            pair[0] = (int32_t)(top->ids >> 32);
            pair[1] = (int32_t)(top->ids & UINT32_MAX);
            return count;
        }
        if (count) {
            top->count = count;
        } else {
            *top = t->heap[--t->heap_size];
        }
        if (t->heap_size) sift_down(t);
    }
    return 0;
}

/* How often a pair occurs; overlapping ones count, "aaa" has (a, a) twice. */
int64_t bpe_count(const Trainer *t, int32_t left, int32_t right) {
    const uint32_t slot = *slot_of(t, key(left, right));
    return slot ? t->pairs[slot - 1].count : 0;
}

/* Replace the pair in one word, from the left; only neighbours of what changes are counted. */
static int rewrite(Trainer *t, int64_t word, int32_t left, int32_t right, int32_t new_id) {
    int32_t *ids = t->ids + t->start[word];
    const int64_t length = t->length[word], n = t->frequency[word];
    int64_t to = 0;
    int fresh = 0; /* whether the id before is a new one, which was `right` at its end */
    for (int64_t from = 0; from < length; to++) {
        if (from + 1 < length && ids[from] == left && ids[from + 1] == right) {
            if (to) {
                if (change(t, fresh ? right : ids[to - 1], left, -n, word)) return -1;
                if (change(t, ids[to - 1], new_id, n, word)) return -1;
            }
            if (change(t, left, right, -n, word)) return -1;
            ids[to] = new_id;
            fresh = 1;
            from += 2;
        } else {
            if (fresh) {
                if (change(t, right, ids[from], -n, word)) return -1;
                if (change(t, new_id, ids[from], n, word)) return -1;
            }
            ids[to] = ids[from];
            fresh = 0;
            from++;
        }
    }
    t->length[word] = to;
    return 0;
}

/* Replace the pair in all words by a new id. */
int bpe_merge(Trainer *t, int32_t left, int32_t right, int32_t new_id) {
    const uint32_t slot = *slot_of(t, key(left, right));
    if (!slot) return 0;
    Pair *pair = t->pairs + slot - 1;
    uint32_t *words = pair->words;
    const int64_t size = pair->size, known = t->size;
    pair->words = NULL; /* `pair` itself may move while others are added */
    pair->size = pair->room = 0;
    int failed = 0;
    for (int64_t i = 0; i < size && !failed; i++)
        failed = rewrite(t, words[i], left, right, new_id);
    free(words);
    return failed || queue(t, known) ? -1 : 0;
}
