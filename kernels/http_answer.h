/* Writes the changing parts of an answer's head: numbers, request ids and dates.
 *
 * Each function writes to where it is told and nothing behind that, without a terminator. */
#ifndef GATEWAY_HTTP_ANSWER_H
#define GATEWAY_HTTP_ANSWER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GW_UINT_MAX_CHARS 20
#define GW_REQUEST_ID_CHARS 32
#define GW_DATE_CHARS 29
#define GW_DATE_MAX_S INT64_C(253402300799) /* 9999-12-31 23:59:59: the form has four digits for a year */

/* A number in decimal. Returns how many characters it took: 1 to GW_UINT_MAX_CHARS. */
static inline size_t gw_put_uint(char *out, uint64_t value) {
    char digits[GW_UINT_MAX_CHARS];
    size_t at = sizeof digits;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    memcpy(out, digits + at, sizeof digits - at);
    return sizeof digits - at;
}

/* The output function of splitmix64 (Steele, Lea and Flood, 2014): one to one. */
static inline uint64_t gw_mix64(uint64_t x) {
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* A new request id, in lower-case hex.
 *
 * state: two words that the process filled with random bits when it began; this moves them on. Ids of one
 *     state do not repeat within 2^64 calls; those of two processes are as unlikely to meet as their 128
 *     bits. Unique, not secret: one id tells the next. */
static inline void gw_request_id(char out[GW_REQUEST_ID_CHARS], uint64_t state[2]) {
    static const char digits[] = "0123456789abcdef";
    for (int half = 0; half < 2; half++) {
        uint64_t bits = gw_mix64(state[half] += UINT64_C(0x9e3779b97f4a7c15));
        for (int i = 16; i-- > 0; bits >>= 4) out[half * 16 + i] = digits[bits & 15];
    }
}

static inline void gw_put_two(char *out, unsigned value) {
    out[0] = (char)('0' + value / 10);
    out[1] = (char)('0' + value % 10);
}

/* A time as HTTP writes it (IMF-fixdate, RFC 9110 §5.6.7): "Sun, 06 Nov 1994 08:49:37 GMT".
 *
 * unix_s: seconds since 1970; what is before that or after the year 9999 is written as the nearest.
 *
 * strftime would name days and months in the locale's language. Days to dates after H. Hinnant,
 * "chrono-compatible low-level date algorithms": eras of 400 years that begin on 1 March. */
static inline void gw_put_date(char out[GW_DATE_CHARS], int64_t unix_s) {
    const int64_t clamped = unix_s < 0 ? 0 : unix_s > GW_DATE_MAX_S ? GW_DATE_MAX_S : unix_s;
    const unsigned days = (unsigned)(clamped / 86400), second = (unsigned)(clamped % 86400);
    const unsigned since = days + 719468; /* 0000-03-01 */
    const unsigned era = since / 146097, day_of_era = since % 146097;
    const unsigned year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    const unsigned day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const unsigned month = (5 * day_of_year + 2) / 153; /* 0: March */
    const unsigned year = era * 400 + year_of_era + (month >= 10);
    memcpy(out, "Thu, Fri, Sat, Sun, Mon, Tue, Wed, " + 5 * (days % 7), 5);
    gw_put_two(out + 5, day_of_year - (153 * month + 2) / 5 + 1);
    memcpy(out + 7, " Mar  Apr  May  Jun  Jul  Aug  Sep  Oct  Nov  Dec  Jan  Feb  " + 5 * month, 5);
    gw_put_two(out + 12, year / 100);
    gw_put_two(out + 14, year % 100);
    out[16] = ' ';
    gw_put_two(out + 17, second / 3600);
    out[19] = ':';
    gw_put_two(out + 20, second / 60 % 60);
    out[22] = ':';
    gw_put_two(out + 23, second % 60);
    memcpy(out + 25, " GMT", 4);
}
#endif
