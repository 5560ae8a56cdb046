/* Looks at JSON text 64 bytes at a time, for the brackets and commas in it and what else is there. */

#ifndef GW_JSON_BLOCKS_H
#define GW_JSON_BLOCKS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* One bit for each of 64 bytes, the first in the lowest. */
typedef struct {
    uint64_t open, close, comma;
    /* Quotes, braces and letters but e: what JSON's other values have and numbers do not. Bytes
     * that JSON has nowhere are not among them; they are refused with the number. */
    uint64_t foreign;
} gw_block;

#ifdef __SSE2__
static inline void gw_classify_block(const char *text, gw_block *block)
{
    block->open = block->close = block->comma = block->foreign = 0;
    for (int i = 0; i < 64; i += 16) {
        #define IS(vector, byte) _mm_cmpeq_epi8(vector, _mm_set1_epi8(byte))
        #define BITS(vector) ((uint64_t)(uint32_t)_mm_movemask_epi8(vector) << i)
        __m128i bytes = _mm_loadu_si128((const __m128i *)(text + i));
        __m128i open = IS(bytes, '['), close = IS(bytes, ']');
        __m128i native = _mm_or_si128(open, close);
        native = _mm_or_si128(native, IS(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), 'e'));
        __m128i foreign = _mm_andnot_si128(native, _mm_cmpgt_epi8(bytes, _mm_set1_epi8('9')));
        foreign = _mm_or_si128(foreign, IS(bytes, '"'));
        block->open |= BITS(open);
        block->close |= BITS(close);
        block->comma |= BITS(IS(bytes, ','));
        block->foreign |= BITS(foreign);
        #undef IS
        #undef BITS
    }
}
#else
static inline void gw_classify_block(const char *text, gw_block *block)
{
    block->open = block->close = block->comma = block->foreign = 0;
    for (int i = 0; i < 64; i++) {
        unsigned char byte = (unsigned char)text[i];
        int native = byte == '[' || byte == ']' || (byte | 0x20) == 'e';
        block->open |= (uint64_t)(byte == '[') << i;
        block->close |= (uint64_t)(byte == ']') << i;
        block->comma |= (uint64_t)(byte == ',') << i;
        block->foreign |= (uint64_t)(byte == '"' || (byte > '9' && byte < 0x80 && !native)) << i;
    }
}
#endif

/* As above of `n` bytes, of which there may be fewer than 64; the missing are foreign. */
static inline void gw_classify(const char *text, ptrdiff_t n, gw_block *block)
{
    char last[64];
    if (n < 64) {
        memset(last, '"', sizeof last);
        memcpy(last, text, (size_t)n);
        text = last;
    }
    gw_classify_block(text, block);
}

static inline int gw_lowest(uint64_t bits)
{
    return __builtin_ctzll(bits);
}

/* The bits that are set; the builtin is a call on processors of the x86-64 baseline. */
static inline int gw_count(uint64_t bits)
{
    bits -= bits >> 1 & 0x5555555555555555;
    bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F;
    return (int)(bits * 0x0101010101010101 >> 56);
}

#endif
