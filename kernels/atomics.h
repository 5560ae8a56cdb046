/* Atomics, futexes and the steps of the test build.
 *
 * GCC's __atomic builtins rather than C11 <stdatomic.h>: the words live in memory that other
 * processes map, declared in one struct for both, and _Atomic would change the structs' types.
 */
#ifndef GATEWAY_ATOMICS_H
#define GATEWAY_ATOMICS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* In the test build every atomic step may yield, sleep for a moment or kill the process, driven by a
 * seed, so that a stress test visits interleavings that a fast machine never shows.
 *
 * It also has a store buffer, of one store and for each thread: a plain store may stay there, past any
 * loads, until a fence, a read-modify-write, the next store, a system call or chance lets it out. Real
 * processors do so for nanoseconds, which a test hits once in a blue moon; here a missing fence fails. */
#if GATEWAY_RING_STEPS
static uint64_t gw_step_seed = 0;
static int64_t gw_steps_to_death = -1;
static __thread struct { void *at; uint64_t value; int bytes; } gw_buffer;

static inline void gw_drain(void) {
    if (gw_buffer.at == NULL) return;
    if (gw_buffer.bytes == 8) __atomic_store_n((uint64_t *)gw_buffer.at, gw_buffer.value, __ATOMIC_RELEASE);
    else __atomic_store_n((uint32_t *)gw_buffer.at, (uint32_t)gw_buffer.value, __ATOMIC_RELEASE);
    gw_buffer.at = NULL;
}
static inline void gw_buffer_store(void *at, uint64_t value, int bytes) {
    gw_drain();
    gw_buffer.at = at;
    gw_buffer.value = value;
    gw_buffer.bytes = bytes;
    if (gw_step_seed == 0 || (gw_step_seed >> 32 & 1)) gw_drain();
}
/* Before a load: a thread sees its own stores. */
static inline void gw_before_load(const void *at) {
    if (gw_buffer.at == at || (gw_step_seed >> 33 & 7) == 0) gw_drain();
}
static inline void gw_step(void) {
    if (gw_steps_to_death >= 0 && gw_steps_to_death-- == 0) kill(getpid(), SIGKILL);
    if (gw_step_seed == 0) return;
    gw_step_seed ^= gw_step_seed << 13;
    gw_step_seed ^= gw_step_seed >> 7;
    gw_step_seed ^= gw_step_seed << 17;
    switch (gw_step_seed & 15) {
    case 0: { struct timespec pause = {0, (long)((gw_step_seed >> 8) & 0xffff)};
              nanosleep(&pause, NULL); break; }
    case 1: case 2: case 3: sched_yield(); break;
    default: break;
    }
}
static inline int gw_set_steps(uint64_t seed, int64_t deaths) {
    gw_step_seed = seed;
    gw_steps_to_death = deaths;
    return 1;
}
#else
static inline void gw_step(void) {}
static inline void gw_drain(void) {}
static inline void gw_before_load(const void *at) { (void)at; }
static inline int gw_set_steps(uint64_t seed, int64_t deaths) { (void)seed; (void)deaths; return 0; }
#endif

static inline uint64_t gw_load64(const uint64_t *p) {
    gw_step();
    gw_before_load(p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint64_t gw_peek64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void gw_poke64(uint64_t *p, uint64_t v) {
    gw_drain();
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
static inline void gw_store64(uint64_t *p, uint64_t v) {
    gw_step();
#if GATEWAY_RING_STEPS
    gw_buffer_store(p, v, 8);
#else
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
#endif
}
static inline int gw_cas64(uint64_t *p, uint64_t expected, uint64_t desired) {
    gw_step();
    gw_drain();
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint64_t gw_swap64(uint64_t *p, uint64_t v) {
    gw_step();
    gw_drain();
    return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);
}
static inline void gw_set_bits64(uint64_t *p, uint64_t bits) {
    gw_step();
    gw_drain();
    __atomic_fetch_or(p, bits, __ATOMIC_ACQ_REL);
}
static inline void gw_clear_bits64(uint64_t *p, uint64_t bits) {
    gw_step();
    gw_drain();
    __atomic_fetch_and(p, ~bits, __ATOMIC_ACQ_REL);
}
static inline uint32_t gw_load32(const uint32_t *p) {
    gw_step();
    gw_before_load(p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void gw_store32(uint32_t *p, uint32_t v) {
    gw_step();
#if GATEWAY_RING_STEPS
    gw_buffer_store(p, v, 4);
#else
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
#endif
}
static inline uint32_t gw_swap32(uint32_t *p, uint32_t v) {
    gw_step();
    gw_drain();
    return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);
}
static inline int gw_cas32(uint32_t *p, uint32_t expected, uint32_t desired) {
    gw_step();
    gw_drain();
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
/* Store-load order is what both sleepers rely on: acquire and release do not give it. */
static inline void gw_fence(void) {
    gw_drain();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    gw_step();
}
static inline int gw_first_bit(uint64_t bits) { return __builtin_ctzll(bits); }

/* Sleep while *word == expected, until `until_ns` on CLOCK_MONOTONIC (0: for ever). Not FUTEX_PRIVATE:
 * the waker is another process. Returns 0 or errno (EAGAIN, EINTR and ETIMEDOUT all mean: look again). */
static inline int gw_futex_wait(uint32_t *word, uint32_t expected, uint64_t until_ns) {
    gw_step();
    gw_drain();
    struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
    long r = syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, until_ns ? &until : NULL, NULL,
                     FUTEX_BITSET_MATCH_ANY);
    return r == 0 ? 0 : errno;
}
static inline void gw_futex_wake(uint32_t *word) {
    gw_step();
    gw_drain();
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Ring an eventfd. It is non-blocking and its counter cannot overflow in practice; a bell that is
 * already ringing needs no second ring, so the result does not matter. */
static inline void gw_ring_bell(int fd) {
    gw_step();
    gw_drain();
    uint64_t one = 1;
    ssize_t r = write(fd, &one, sizeof one);
    (void)r;
}
/* Tells the core that this is a loop that waits. */
static inline void gw_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline uint64_t gw_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
#endif
