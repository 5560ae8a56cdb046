/* The layout of the ledger, the counters behind the seats of a version's board: the one place that
 * fixes it. tests/twins/ledger.py restates it, and a test holds the two together.
 *
 * A section for each worker's seat, then one for each front end. Each has one writer at a time. */
#ifndef GATEWAY_LEDGER_LAYOUT_H
#define GATEWAY_LEDGER_LAYOUT_H
#include <stddef.h>
#include <stdint.h>

#define GW_LEDGER_MAGIC 0x5244474cu /* "LGDR" */
#define GW_LEDGER_LAYOUT 1u

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
#define GW_CODES 17
static const int gw_codes[GW_CODES] = {
    200, 400, 403, 404, 405, 408, 413, 415, 429, 431, 499, 500, 501, 503, 504, 507, 0
};

/* Runs are counted by their exact number of rows up to this one, and in one more cell beyond. */
#define GW_EXACT_ROWS 1024

/* One front end's. Gauges first; from `codes` on there are only counters. */
typedef struct {
    uint32_t magic, layout;
    uint64_t in_flight, waiting, last_inference_ms;
    uint64_t codes[GW_CODES];
    uint64_t rows, success_ns, fail_ns, queue_ns, compute_ns;
    uint64_t request_buckets[GW_DURATION_BOUNDS + 1];
    uint64_t queue_buckets[GW_DURATION_BOUNDS + 1];
} __attribute__((aligned(64))) gw_requests;
#define GW_FIRST_COUNTER (offsetof(gw_requests, codes) / 8)

typedef struct { uint64_t count, ns; } gw_runs;

/* One worker's. Its tail is long, and `most_rows` says how much of it was ever touched: what a reader
 * does not look at costs no memory. */
typedef struct {
    uint32_t magic, layout;
    uint64_t starts, most_rows;
    uint64_t rows, run_ns, copied_rows, held_ns;
    uint64_t row_buckets[GW_ROW_BOUNDS + 1];
    uint64_t run_buckets[GW_DURATION_BOUNDS + 1];
    gw_runs by_rows[GW_EXACT_ROWS + 2];
} __attribute__((aligned(64))) gw_batches;
#endif
