/* Reads one JSON number and rounds it correctly.
 *
 * Digits are taken eight at once (Lemire, "Number Parsing at a Gigabyte per Second", Software:
 * Practice and Experience 51(8), 2021), and decimal exponents are applied by Eisel and Lemire's
 * method from the same paper: one multiplication of the digits by 128 bits of a power of five. For
 * digits that fit in 64 bits it needs no way out (Mushtak and Lemire, "Fast Number Parsing Without
 * Fallback", 2023). Numbers of more digits go to strtod in the C locale.
 *
 * All text ends with a byte that is in no number: a caller sees to it that the last one is ']'. So
 * one byte behind a digit, a sign or a point can always be read.
 */

#ifndef GW_NUMBERS_H
#define GW_NUMBERS_H

#include <locale.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers.h takes digits in little-endian order"
#endif

enum {
    GW_MIN_POWER = -342,        /* 19 digits at a lower power of ten are below the least double */
    GW_MAX_POWER = 308,         /* and one digit at a higher one is above the largest */
    GW_EXACT_DIGITS = 19,       /* any number of so many digits fits in 64 bits */
    GW_MAX_EXPONENT_DIGITS = 8, /* keeps sums of exponents and lengths of text far from overflow */
};

/* The first 128 bits, high half first, of 5^GW_MIN_POWER to 5^GW_MAX_POWER; set once, on import. */
static uint64_t gw_powers_of_five[GW_MAX_POWER - GW_MIN_POWER + 1][2];

/* For strtod: a process may have any locale. Set once, on import. */
static locale_t gw_c_locale;

typedef struct {
    const char *text;  /* where it begins; only while the caller's text lives */
    uint64_t mantissa; /* its digits without the point; modulo 2^64 where not `exact` */
    int64_t exponent;  /* the power of ten that the digits are times */
    int negative;
    int integer; /* has neither a fraction nor an exponent */
    int exact;   /* `mantissa` is what the digits say */
} gw_number;

static inline int gw_is_digit(char byte)
{
    return (unsigned char)(byte - '0') <= 9;
}

/* Eight bytes from `at`; what lies behind `end` is not read and taken for zero bytes. */
static inline uint64_t gw_load8(const char *at, const char *end)
{
    uint64_t bytes = 0;
    if (__builtin_expect(end - at >= 8, 1))
        memcpy(&bytes, at, 8);
    else
        for (int i = 0; i < end - at; i++)
            bytes |= (uint64_t)(unsigned char)at[i] << (8 * i);
    return bytes;
}

/* The number of eight decimal digits, one a byte, the first in the lowest byte. */
static inline uint64_t gw_value8(uint64_t digits)
{
    const uint64_t mask = 0x000000FF000000FF;
    digits = digits * 10 + (digits >> 8);
    return (uint32_t)(((digits & mask) * (100 + (1000000ULL << 32)) +
                       ((digits >> 16) & mask) * (1 + (10000ULL << 32))) >> 32);
}

/* Appends the digits at `at`, if any, to `*mantissa` (modulo 2^64). Returns where they end. */
static inline const char *gw_digits(const char *at, const char *end, uint64_t *mantissa)
{
    static const uint64_t POWERS_OF_TEN[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000};
    for (;;) {
        uint64_t bytes = gw_load8(at, end);
        uint64_t digits = bytes - 0x3030303030303030;
        /* The lowest of these bits is in the first byte that is no digit; others may be carries. */
        uint64_t others = ((bytes + 0x4646464646464646) | digits) & 0x8080808080808080;
        if (others) {
            int count = __builtin_ctzll(others) >> 3;
            /* Two shifts: one by 64 bits is undefined, and a branch here is guessed badly. */
            digits = (digits << 8) << (56 - 8 * count);
            *mantissa = *mantissa * POWERS_OF_TEN[count] + gw_value8(digits);
            return at + count;
        }
        *mantissa = *mantissa * 100000000 + gw_value8(digits);
        at += 8;
    }
}

/* Whether `mantissa`, of more than GW_EXACT_DIGITS digits from `first` on, fits in 64 bits. */
static int gw_fits(const char *first, int64_t digits, uint64_t mantissa)
{
    for (; digits > GW_EXACT_DIGITS && (*first == '0' || *first == '.'); first++)
        digits -= *first == '0';
    /* From 10^19 to 2 * 10^19 - 1: had it gone round, it would now be below 10^19. */
    return digits <= GW_EXACT_DIGITS ||
           (digits == GW_EXACT_DIGITS + 1 && *first == '1' && mantissa >= 10000000000000000000U);
}

/* Reads the number that begins at `at` < `end`, where end[-1] is ']'. Returns where it ends, NULL
 * if none begins there or its exponent has too many digits. A zero ends the whole part: of 01, it
 * reads the 0. */
static inline const char *gw_read_number(const char *at, const char *end, gw_number *number)
{
    const char *first, *begin;
    int64_t digits;
    uint64_t power = 0;
    int minus;
    number->text = at;
    number->mantissa = 0;
    number->exponent = 0;
    number->negative = *at == '-';
    at += number->negative;
    first = at;
    if (!gw_is_digit(*at))
        return NULL;
    if ((*at == '0') | !gw_is_digit(at[1])) /* one branch: which of the two it is, is chance */
        number->mantissa = (uint64_t)(*at++ - '0');
    else
        at = gw_digits(at, end, &number->mantissa);
    digits = at - first;
    number->integer = 1;
    if (*at == '.') {
        number->integer = 0;
        begin = ++at;
        at = gw_digits(at, end, &number->mantissa);
        if (at == begin)
            return NULL;
        number->exponent = begin - at;
        digits += at - begin;
    }
    number->exact = digits <= GW_EXACT_DIGITS || gw_fits(first, digits, number->mantissa);
    if ((*at | 0x20) == 'e') {
        number->integer = 0;
        at++;
        minus = *at == '-';
        at += minus || *at == '+';
        begin = at;
        at = gw_digits(at, end, &power);
        if (at == begin || at - begin > GW_MAX_EXPONENT_DIGITS)
            return NULL;
        number->exponent += minus ? -(int64_t)power : (int64_t)power;
    }
    return at;
}

/* The double next to mantissa * 10^power, by Eisel and Lemire; infinity where that is too large. */
static inline double gw_scale(uint64_t mantissa, int64_t power)
{
    if (mantissa == 0 || power < GW_MIN_POWER)
        return 0.0;
    if (power > GW_MAX_POWER)
        return INFINITY;
    const uint64_t *five = gw_powers_of_five[power - GW_MIN_POWER];
    int zeros = __builtin_clzll(mantissa);
    unsigned __int128 product = (unsigned __int128)(mantissa << zeros) * five[0];
    /* Where all the bits below those that a double keeps are ones, the low half may carry over. */
    if ((product >> 64 & 0x1FF) == 0x1FF)
        product += (unsigned __int128)(mantissa << zeros) * five[1] >> 64;
    uint64_t high = (uint64_t)(product >> 64), low = (uint64_t)product;
    int top = (int)(high >> 63);
    uint64_t bits = high >> (top + 9); /* 53 bits, and one to round by */
    /* (217706 * power) >> 16 is floor(log2(10^power)) in this range; 1023 is a double's bias. */
    int64_t exponent = ((217706 * power) >> 16) + 63 + top - zeros + 1023;
    if (exponent <= 0) { /* below the normal doubles: fewer bits are left */
        if (exponent <= -63)
            return 0.0;
        bits >>= 1 - exponent;
        bits = (bits + (bits & 1)) >> 1; /* ties are no concern: none lies so low */
        exponent = 0;                    /* a carry into bit 52 makes it 1, as it should be */
    } else {
        /* A tie, which only these powers can give, goes to the even one: down, if it is at ...01. */
        if (low <= 1 && power >= -4 && power <= 23 && (bits & 3) == 1 && bits << (top + 9) == high)
            bits &= ~(uint64_t)1;
        bits = (bits + (bits & 1)) >> 1;
        /* Bit 52 adds one to the exponent, and a carry into bit 53 one more. */
        exponent -= 1;
    }
    bits += (uint64_t)exponent << 52;
    if (bits >= (uint64_t)0x7FF << 52)
        return INFINITY;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* The double next to a number as JSON parsers read it: an integer -0 is an int, which has no sign.
 * Infinity where the number is too large for a double. */
static inline double gw_to_double(const gw_number *number)
{
    /* Doubles that are exact, so that one operation on two of them rounds correctly (Clinger). */
    static const double POWERS_OF_TEN[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                           1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                           1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    double value;
    uint64_t bits, minus = (uint64_t)number->negative << 63;
    if (!number->exact)
        return strtod_l(number->text, NULL, gw_c_locale);
    if (number->integer) {
        value = (double)number->mantissa;
        minus *= number->mantissa != 0;
    } else if (number->mantissa <= 1ULL << 53 && number->exponent <= 0 && number->exponent >= -22) {
        value = (double)number->mantissa / POWERS_OF_TEN[-number->exponent];
    } else {
        value = gw_scale(number->mantissa, number->exponent);
    }
    memcpy(&bits, &value, 8); /* no branch on the sign, which is chance */
    bits ^= minus;
    memcpy(&value, &bits, 8);
    return value;
}

enum { GW_REFUSED, GW_WHOLE, GW_REAL };
typedef struct {
    int kind;
    int itemsize;            /* bytes */
    uint64_t highest, lowest; /* magnitudes of the largest and of the least integer */
} gw_element;

/* In the order of DataType.index (gateway/tensors.py). */
static const gw_element GW_ELEMENTS[] = {
    {GW_WHOLE, 1, 1, 0},                              /* BOOL */
    {GW_WHOLE, 1, UINT8_MAX, 0},
    {GW_WHOLE, 2, UINT16_MAX, 0},
    {GW_WHOLE, 4, UINT32_MAX, 0},
    {GW_WHOLE, 8, UINT64_MAX, 0},
    {GW_WHOLE, 1, INT8_MAX, (uint64_t)INT8_MAX + 1},
    {GW_WHOLE, 2, INT16_MAX, (uint64_t)INT16_MAX + 1},
    {GW_WHOLE, 4, INT32_MAX, (uint64_t)INT32_MAX + 1},
    {GW_WHOLE, 8, INT64_MAX, (uint64_t)INT64_MAX + 1},
    {GW_REFUSED, 2, 0, 0},                            /* FP16 */
    {GW_REAL, 4, 0, 0},
    {GW_REAL, 8, 0, 0},
    {GW_REFUSED, 2, 0, 0},                            /* BF16 */
    {GW_REFUSED, 0, 0, 0},                            /* BYTES */
};

#endif
