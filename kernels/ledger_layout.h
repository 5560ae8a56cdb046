/* The layout of the ledger, the counters behind the seats of a version's board: the one place that
 * fixes it. tests/twins/ledger.py restates it, and a test holds the two together.
 *
 * A section for each worker's seat, then one for each front end, then one more for each front end: its
 * slice's, requests that are counted by themselves so that they can be compared with a canary's. Each
 * section has one writer at a time; a sum over requests is over both kinds. */
#ifndef GATEWAY_LEDGER_LAYOUT_H
#define GATEWAY_LEDGER_LAYOUT_H
#include <stddef.h>
#include <stdint.h>

#define GW_LEDGER_MAGIC 0x5244474cu /* "LGDR" */
#define GW_LEDGER_LAYOUT 2u

/* Upper bounds of the histograms, inclusive; beyond the last there is one more bucket. Each is at least
 * twice the one before, on which `bucket` in ledger.pyx relies. A small model answers in 100 us, a large
 * one in seconds. */
#define GW_DURATION_BOUNDS 16
static const uint64_t gw_duration_bounds_ns[GW_DURATION_BOUNDS] = {
    100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 25000000, 50000000, 100000000,
    250000000, 500000000, 1000000000, 2500000000u, 5000000000u, 10000000000u
};
#define GW_ROW_BOUNDS 10
static const uint64_t gw_row_bounds[GW_ROW_BOUNDS] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};

/* HTTP statuses that are counted each for itself; what is not among them is counted as the last, 0. */
#define GW_CODES 21
static const int gw_codes[GW_CODES] = {
    200, 400, 401, 403, 404, 405, 408, 409, 412, 413, 415, 428, 429, 431, 499, 500, 501, 503, 504, 507,
    0
};

/* Runs are counted by their exact number of rows up to this one, and in one more cell beyond. */
#define GW_EXACT_ROWS 1024

/* A sketch: a histogram of durations that is fine enough to read quantiles from. Each octave from 2^10 ns
 * to 2^36 ns (1 us to 69 s) is 32 buckets of one width, 1/32 of where the octave begins. Shorter durations
 * are in the first bucket, longer ones in the last. */
#define GW_SKETCH_FIRST_BIT 10
#define GW_SKETCH_OCTAVES 26
#define GW_SKETCH_STEP_BITS 5
#define GW_SKETCH (GW_SKETCH_OCTAVES << GW_SKETCH_STEP_BITS)

/* Runs are sketched by class of rows: the first eight of gw_row_bounds, and one for all larger ones. */
#define GW_ROW_CLASSES 9

/* One front end's, or its slice's. Gauges first; from `codes` on there are only counters. */
typedef struct {
    uint32_t magic, layout;
    uint64_t waiting, last_inference_ms;
    uint64_t codes[GW_CODES];
    uint64_t rows, success_ns, fail_ns, queue_ns, compute_ns;
    uint64_t compared, agreed, shadow_dropped, shadow_failed; /* copies that came here as a shadow */
    uint64_t request_buckets[GW_DURATION_BOUNDS + 1];
    uint64_t queue_buckets[GW_DURATION_BOUNDS + 1];
    uint64_t latency[GW_SKETCH]; /* of what `codes` counts as 200 */
} __attribute__((aligned(64))) gw_requests;
#define GW_FIRST_COUNTER (offsetof(gw_requests, codes) / 8)

typedef struct { uint64_t count, ns; } gw_runs;

/* One worker's. Its tail is long; `most_rows` says how much of `by_rows` was ever touched, `row_buckets`
 * which classes of `compute`: what neither writer nor reader touches costs no memory. */
typedef struct {
    uint32_t magic, layout;
    uint64_t starts, most_rows;
    uint64_t rows, run_ns, copied_rows, held_ns;
    uint64_t row_buckets[GW_ROW_BOUNDS + 1];
    uint64_t run_buckets[GW_DURATION_BOUNDS + 1];
    gw_runs by_rows[GW_EXACT_ROWS + 2];
    uint64_t compute[GW_ROW_CLASSES][GW_SKETCH];
} __attribute__((aligned(64))) gw_batches;
#endif
