/* The layout of the memory that front ends and workers share: the one place that fixes it.
 * tests/twins/ring.py restates the sizes and offsets, and a test holds the two together. */
#ifndef GATEWAY_RING_LAYOUT_H
#define GATEWAY_RING_LAYOUT_H
#include <stdint.h>

#define GW_MAGIC 0x474e5247u /* "GRNG" */
#define GW_LAYOUT 3u
#define GW_MAX_SLOTS 512
#define GW_BITMAP_WORDS (GW_MAX_SLOTS / 64)
#define GW_LINE 64

/* phase:4 | owner:12 | rows:16 | generation:32 */
enum gw_phase {
    GW_FREE = 0, GW_OPEN = 1, GW_EDIT = 2, GW_SEALED = 3, GW_DONE = 4, GW_FAILED = 5, GW_RETRY = 6
};
#define GW_WORD(phase, owner, rows, generation) \
    (((uint64_t)(phase) << 60) | ((uint64_t)(owner) << 48) | ((uint64_t)(rows) << 32) | \
     (uint64_t)(uint32_t)(generation))
#define GW_PHASE(word) ((unsigned)((word) >> 60))
#define GW_OWNER(word) ((unsigned)(((word) >> 48) & 0xfff))
#define GW_ROWS(word) ((unsigned)(((word) >> 32) & 0xffff))
#define GW_GENERATION(word) ((uint32_t)(word))

/* Head of a lane's control memory. Each writer's words have cache lines of their own. */
typedef struct {
    uint32_t magic, layout, slot_count, dims_per_slot;
    uint8_t pad0[GW_LINE - 16];
    uint32_t armed;                       /* front end sleeps: ring the bell */
    uint8_t pad1[GW_LINE - 4];
    uint64_t open_bits[GW_BITMAP_WORDS];  /* slots that may be sealed (a hint) */
    uint64_t done_bits[GW_BITMAP_WORDS];  /* slots that may be answered (a hint) */
} gw_lane;

/* Record of one slot, followed by dims_per_slot int64 dims, rounded up to a cache line. The word and
 * what the front end writes share a line, what the worker writes has its own. */
typedef struct {
    uint64_t word;
    uint64_t oldest_ns;  /* when its first row was appended */
    uint64_t shape_id;   /* same id, same dims: the worker's cache key */
    uint64_t capacity;   /* rows this shape may fill; also the stride of the inputs' offsets */
    uint64_t complete;   /* nothing will be appended any more: not worth holding back */
    uint64_t due_ns;     /* earliest deadline of its rows, 0: none (a hint) */
    uint8_t pad0[GW_LINE - 48];
    uint64_t started_ns, finished_ns;
    uint8_t pad1[GW_LINE - 16];
} gw_slot;

/* A worker's place on the board of its version. */
enum gw_bell { GW_RUNNING = 0, GW_WAITING = 1 };
typedef struct {
    uint32_t state;         /* gw_bell; the futex */
    uint32_t incarnation;
    uint64_t batches;       /* completed, since the incarnation began */
    uint64_t busy_since_ns; /* 0 while it holds no sealed slot */
    uint32_t best_rows;     /* beyond which a batch gains nothing, 0: unknown (a hint) */
    uint8_t pad[GW_LINE - 28];
} gw_seat;
#endif
