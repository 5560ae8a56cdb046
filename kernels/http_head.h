/* Reads the head of a plain HTTP/1.1 request for the fast lane.
 *
 * Not a parser of HTTP: it knows one narrow form of POST and hands everything else to aiohttp, which
 * accepts or refuses it and words the refusal. So it may be stricter than HTTP anywhere and laxer than
 * aiohttp nowhere: whatever it calls plain, aiohttp reads in the same way, ending at the same byte.
 * That is why headers matter here that no inference needs: aiohttp closes a connection on
 * Proxy-Connection, and refuses a second User-Agent.
 *
 * Rejected: llhttp, whose callbacks cost more than this whole function and whose leniency is not ours;
 * and a parser with a state kept between reads: heads come in one piece, so an incomplete one is read
 * from its start again.
 *
 * RFC 9110 (fields), RFC 9112 (messages), W3C Trace Context (traceparent). */
#ifndef GATEWAY_HTTP_HEAD_H
#define GATEWAY_HTTP_HEAD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define GW_HEAD_MAX_BYTES 8000  /* of a whole head; bounds what is read again when bytes were missing */
#define GW_HEAD_MAX_FIELDS 64   /* header lines; aiohttp takes 128 */
#define GW_HEAD_MAX_TARGET 512  /* bytes; the longest path that the gateway serves is shorter */
#define GW_HEAD_MAX_DIGITS 15   /* of a number; no sum of two such numbers overflows */
#define GW_HEAD_MAX_ID 128      /* bytes of an x-request-id that is repeated to the caller */

enum gw_head_verdict {
    GW_HEAD_ASIDE = -1, /* not for the fast lane, whatever may follow */
    GW_HEAD_MORE = 0,   /* no bad byte, no bad line, no end yet */
    GW_HEAD_PLAIN = 1
};

enum gw_media {
    GW_MEDIA_NONE = 0, /* no Content-Type */
    GW_MEDIA_JSON = 1,
    GW_MEDIA_OCTETS = 2,
    GW_MEDIA_MSGPACK = 3,
    GW_MEDIA_X_MSGPACK = 4,
    GW_MEDIA_VND_MSGPACK = 5,
    GW_MEDIA_OTHER = 6
};

/* What a plain head says. Offsets are into the bytes that were parsed; -1: the header is not there. */
typedef struct {
    int32_t head_bytes;                   /* request line, headers and the empty line */
    int32_t target, target_len;
    int64_t content_length;
    int64_t json_bytes;                   /* Inference-Header-Content-Length, or -1 */
    int32_t media;                        /* gw_media */
    int32_t request_id, request_id_len;   /* x-request-id: safe to repeat as it is */
    int32_t traceparent, traceparent_len; /* version 00, well-formed */
} gw_head;

/* -- bytes ----------------------------------------------------------------------------------------- */

enum { GW_TOKEN = 1, GW_TARGET = 2, GW_HOST = 4, GW_ID = 8, GW_ALL = 15 };

static const uint8_t GW_BYTES[256] = {
    ['0' ... '9'] = GW_ALL, ['A' ... 'Z'] = GW_ALL, ['a' ... 'z'] = GW_ALL,
    ['-'] = GW_ALL, ['.'] = GW_ALL, ['_'] = GW_ALL,
    ['!'] = GW_TOKEN, ['#'] = GW_TOKEN, ['$'] = GW_TOKEN, ['%'] = GW_TOKEN, ['&'] = GW_TOKEN,
    ['\''] = GW_TOKEN, ['*'] = GW_TOKEN, ['^'] = GW_TOKEN, ['`'] = GW_TOKEN, ['|'] = GW_TOKEN,
    ['~'] = GW_TOKEN | GW_TARGET, ['+'] = GW_TOKEN | GW_ID,
    [':'] = GW_TARGET | GW_HOST | GW_ID, ['/'] = GW_TARGET | GW_ID,
    ['['] = GW_HOST, [']'] = GW_HOST,
    ['='] = GW_ID, ['@'] = GW_ID,
};

/* Where the run of bytes of a class that begins at `at` ends: at most `n`. */
static inline size_t gw_run_end(const char *data, size_t at, size_t n, int byte_class) {
    while (at < n && (GW_BYTES[(unsigned char)data[at]] & byte_class)) at++;
    return at;
}

/* Where a field value ends: at the first byte that is neither visible ASCII nor space nor tab. */
static inline size_t gw_value_end(const char *data, size_t at, size_t n) {
#ifdef __SSE2__
    const __m128i space = _mm_set1_epi8(' '), tab = _mm_set1_epi8('\t'), del = _mm_set1_epi8(0x7f);
    for (; n - at >= 16; at += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(data + at));
        /* Signed: bytes from 0x80 on are below the space, too. */
        const __m128i stops = _mm_or_si128(_mm_cmplt_epi8(bytes, space), _mm_cmpeq_epi8(bytes, del));
        const int mask = _mm_movemask_epi8(_mm_andnot_si128(_mm_cmpeq_epi8(bytes, tab), stops));
        if (mask) return at + (size_t)__builtin_ctz((unsigned)mask);
    }
#endif
    while (at < n && ((data[at] >= ' ' && data[at] < 0x7f) || data[at] == '\t')) at++;
    return at;
}

static inline int gw_is_ows(char byte) { return byte == ' ' || byte == '\t'; }

/* Whether `text` is `lower` but for case. Setting 0x20 folds letters; the other bytes of the words below
 * have it set already, and what would fold to them is a control byte, which no name or value holds. */
static inline int gw_folds_to(const char *text, const char *lower, size_t length) {
    unsigned differ = 0;
    for (size_t i = 0; i < length; i++) differ |= (unsigned)((text[i] | 0x20) ^ lower[i]);
    return differ == 0;
}
#define GW_IS(text, length, lower) \
    ((length) == sizeof(lower) - 1 && gw_folds_to(text, lower, sizeof(lower) - 1))

/* -- values of the headers that matter -------------------------------------------------------------- */

/* A number of bytes: 1 to GW_HEAD_MAX_DIGITS digits and nothing else; -1 if it is not. */
static inline int64_t gw_read_size(const char *text, size_t length) {
    if (length == 0 || length > GW_HEAD_MAX_DIGITS) return -1;
    int64_t size = 0;
    for (size_t i = 0; i < length; i++) {
        const unsigned digit = (unsigned)(text[i] - '0');
        if (digit > 9) return -1;
        size = size * 10 + (int64_t)digit;
    }
    return size;
}

static inline int gw_media_named(const char *name, size_t length) {
    if (GW_IS(name, length, "application/json")) return GW_MEDIA_JSON;
    if (GW_IS(name, length, "application/octet-stream")) return GW_MEDIA_OCTETS;
    if (GW_IS(name, length, "application/msgpack")) return GW_MEDIA_MSGPACK;
    if (GW_IS(name, length, "application/x-msgpack")) return GW_MEDIA_X_MSGPACK;
    if (GW_IS(name, length, "application/vnd.msgpack")) return GW_MEDIA_VND_MSGPACK;
    return GW_MEDIA_OTHER;
}

/* A media type, alone or with `charset=utf-8`; -1 if it is anything else, as with other parameters. */
static inline int gw_read_media(const char *text, size_t length) {
    const size_t slash = gw_run_end(text, 0, length, GW_TOKEN);
    if (slash == 0 || slash == length || text[slash] != '/') return -1;
    const size_t end = gw_run_end(text, slash + 1, length, GW_TOKEN);
    if (end == slash + 1) return -1;
    size_t at = end;
    if (at < length) {
        while (at < length && gw_is_ows(text[at])) at++;
        if (at == length || text[at++] != ';') return -1;
        while (at < length && gw_is_ows(text[at])) at++;
        if (!GW_IS(text + at, length - at, "charset=utf-8")) return -1;
    }
    return gw_media_named(text, end);
}

/* 1: lower-case hex digits, not all zero; 0: all zero; -1: something else. */
static inline int gw_read_hex(const char *text, size_t length) {
    int found = 0;
    for (size_t i = 0; i < length; i++) {
        const char c = text[i];
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return -1;
        found |= c != '0';
    }
    return found;
}

/* 00-<trace id: 32 digits>-<parent id: 16>-<flags: 2>; neither id is all zero. */
static inline int gw_is_traceparent(const char *text, size_t length) {
    return length == 55 && memcmp(text, "00-", 3) == 0 && gw_read_hex(text + 3, 32) == 1 &&
           text[35] == '-' && gw_read_hex(text + 36, 16) == 1 && text[52] == '-' &&
           gw_read_hex(text + 53, 2) >= 0;
}

/* -- headers ---------------------------------------------------------------------------------------- */

/* The headers that matter. Those before GW_FIELD_ASIDE may come once. */
enum gw_field {
    GW_FIELD_HOST, GW_FIELD_CONTENT_LENGTH, GW_FIELD_CONTENT_TYPE, GW_FIELD_CONTENT_ENCODING,
    GW_FIELD_CONNECTION, GW_FIELD_JSON_BYTES, GW_FIELD_REQUEST_ID, GW_FIELD_TRACEPARENT,
    GW_FIELD_AUTHORIZATION, GW_FIELD_USER_AGENT,
    GW_FIELD_ASIDE, /* its presence alone makes a request not plain */
    GW_FIELD_ANY    /* means nothing here */
};

/* Which header a valid name is. */
static inline enum gw_field gw_field_named(const char *name, size_t length) {
#define GW_NAMED(lower, field) if (gw_folds_to(name, lower, sizeof(lower) - 1)) return field
    switch (length) {
    case 4:
        GW_NAMED("host", GW_FIELD_HOST);
        GW_NAMED("etag", GW_FIELD_ASIDE);
        break;
    case 6:
        GW_NAMED("expect", GW_FIELD_ASIDE);
        GW_NAMED("server", GW_FIELD_ASIDE);
        break;
    case 7:
        GW_NAMED("upgrade", GW_FIELD_ASIDE);
        GW_NAMED("trailer", GW_FIELD_ASIDE);
        break;
    case 10:
        GW_NAMED("user-agent", GW_FIELD_USER_AGENT);
        GW_NAMED("connection", GW_FIELD_CONNECTION);
        break;
    case 11:
        GW_NAMED("traceparent", GW_FIELD_TRACEPARENT);
        break;
    case 12:
        GW_NAMED("content-type", GW_FIELD_CONTENT_TYPE);
        GW_NAMED("x-request-id", GW_FIELD_REQUEST_ID);
        GW_NAMED("max-forwards", GW_FIELD_ASIDE);
        break;
    case 13:
        GW_NAMED("authorization", GW_FIELD_AUTHORIZATION);
        GW_NAMED("content-range", GW_FIELD_ASIDE);
        break;
    case 14:
        GW_NAMED("content-length", GW_FIELD_CONTENT_LENGTH);
        break;
    case 16:
        GW_NAMED("content-encoding", GW_FIELD_CONTENT_ENCODING);
        GW_NAMED("content-location", GW_FIELD_ASIDE);
        GW_NAMED("proxy-connection", GW_FIELD_ASIDE);
        break;
    case 17:
        GW_NAMED("transfer-encoding", GW_FIELD_ASIDE);
        break;
    case 18:
        GW_NAMED("sec-websocket-key1", GW_FIELD_ASIDE);
        break;
    case 31:
        GW_NAMED("inference-header-content-length", GW_FIELD_JSON_BYTES);
        break;
    default:
        break;
    }
    return GW_FIELD_ANY;
#undef GW_NAMED
}

/* Takes what a header says into `head`; 0 if it is not plain. The value is data[at:end], trimmed. */
static inline int gw_take_field(gw_head *head, enum gw_field field, const char *data, size_t at, size_t end) {
    const char *value = data + at;
    const size_t length = end - at;
    switch (field) {
    case GW_FIELD_HOST:
        return length > 0 && gw_run_end(value, 0, length, GW_HOST) == length;
    case GW_FIELD_CONTENT_LENGTH:
        return (head->content_length = gw_read_size(value, length)) >= 0;
    case GW_FIELD_CONTENT_TYPE:
        return (head->media = gw_read_media(value, length)) >= 0;
    case GW_FIELD_CONTENT_ENCODING:
        return GW_IS(value, length, "identity");
    case GW_FIELD_CONNECTION:
        return GW_IS(value, length, "keep-alive");
    case GW_FIELD_JSON_BYTES:
        return (head->json_bytes = gw_read_size(value, length)) >= 0;
    case GW_FIELD_REQUEST_ID:
        head->request_id = (int32_t)at;
        head->request_id_len = (int32_t)length;
        return length > 0 && length <= GW_HEAD_MAX_ID && gw_run_end(value, 0, length, GW_ID) == length;
    case GW_FIELD_TRACEPARENT:
        head->traceparent = (int32_t)at;
        head->traceparent_len = (int32_t)length;
        return gw_is_traceparent(value, length);
    case GW_FIELD_AUTHORIZATION:
    case GW_FIELD_USER_AGENT:
    case GW_FIELD_ANY:
        return 1;
    case GW_FIELD_ASIDE:
        break;
    }
    return 0;
}

/* -- the head --------------------------------------------------------------------------------------- */

/* Whether `word` follows at `at`; MORE if the data ends within it, and so far it does. */
static inline int gw_follows(const char *data, size_t at, size_t n, const char *word, size_t length) {
    const size_t there = n - at < length ? n - at : length;
    if (memcmp(data + at, word, there) != 0) return GW_HEAD_ASIDE;
    return there == length ? GW_HEAD_PLAIN : GW_HEAD_MORE;
}
#define GW_FOLLOWS(data, at, n, word) gw_follows(data, at, n, word, sizeof(word) - 1)

/* Reads the request line at 0 and moves `at` behind it. */
static inline int gw_read_request_line(const char *data, size_t n, size_t *at, gw_head *head) {
    const size_t target = sizeof("POST ") - 1, last = target + GW_HEAD_MAX_TARGET;
    int verdict = GW_FOLLOWS(data, 0, n, "POST /");
    if (verdict != GW_HEAD_PLAIN) return verdict;
    const size_t end = gw_run_end(data, target, n < last ? n : last, GW_TARGET);
    verdict = GW_FOLLOWS(data, end, n, " HTTP/1.1\r\n");
    head->target = (int32_t)target;
    head->target_len = (int32_t)(end - target);
    *at = end + sizeof(" HTTP/1.1\r\n") - 1;
    return verdict;
}

/* Reads the header line at `at` and moves `at` behind it. `seen` has a bit for each gw_field. */
static inline int gw_read_field(const char *data, size_t n, size_t *at, gw_head *head, unsigned *seen) {
    const size_t colon = gw_run_end(data, *at, n, GW_TOKEN);
    if (colon == n) return GW_HEAD_MORE;
    if (colon == *at || data[colon] != ':') return GW_HEAD_ASIDE;
    size_t begin = colon + 1, end = gw_value_end(data, begin, n);
    const int verdict = GW_FOLLOWS(data, end, n, "\r\n");
    if (verdict != GW_HEAD_PLAIN) return verdict;
    const enum gw_field field = gw_field_named(data + *at, colon - *at);
    *at = end + 2;
    if (field == GW_FIELD_ANY) return GW_HEAD_PLAIN;
    if (*seen & 1u << field) return GW_HEAD_ASIDE;
    *seen |= 1u << field;
    while (begin < end && gw_is_ows(data[begin])) begin++;
    while (begin < end && gw_is_ows(data[end - 1])) end--;
    return gw_take_field(head, field, data, begin, end) ? GW_HEAD_PLAIN : GW_HEAD_ASIDE;
}

/* Reads the head of a request.
 *
 * data, n: what the connection has sent since the last request ended. Nothing beyond `n` is read, and
 *     nothing behind the head is looked at.
 * head: filled in if the answer is GW_HEAD_PLAIN, otherwise left in any state.
 *
 * Returns a gw_head_verdict. After GW_HEAD_MORE call again with the same bytes and those that came; a bad
 * byte is told at once, a header that means something else once its line is complete. Linear in the head,
 * and bounded by GW_HEAD_MAX_BYTES. */
static inline int gw_parse_head(const char *data, size_t n, gw_head *head) {
    const int more = n < GW_HEAD_MAX_BYTES ? GW_HEAD_MORE : GW_HEAD_ASIDE;
    const size_t limit = n < GW_HEAD_MAX_BYTES ? n : GW_HEAD_MAX_BYTES;
    const unsigned needed = 1u << GW_FIELD_HOST | 1u << GW_FIELD_CONTENT_LENGTH;
    unsigned seen = 0;
    size_t at = 0;
    *head = (gw_head){.json_bytes = -1, .request_id = -1, .traceparent = -1};
    int verdict = gw_read_request_line(data, limit, &at, head);
    for (int fields = 0; verdict == GW_HEAD_PLAIN; fields++) {
        if (at == limit) return more;
        if (data[at] == '\r') {
            verdict = GW_FOLLOWS(data, at, limit, "\r\n");
            if (verdict != GW_HEAD_PLAIN) break;
            head->head_bytes = (int32_t)(at + 2);
            return (seen & needed) == needed ? GW_HEAD_PLAIN : GW_HEAD_ASIDE;
        }
        if (fields == GW_HEAD_MAX_FIELDS) return GW_HEAD_ASIDE;
        verdict = gw_read_field(data, limit, &at, head, &seen);
    }
    return verdict == GW_HEAD_MORE ? more : GW_HEAD_ASIDE;
}
#endif
