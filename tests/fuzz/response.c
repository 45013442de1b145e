/* response.c - fuzzes the response head and a chunked body: response_parse, response_check,
 * response_render, chunked_scan. The first byte says what was asked, the second how the bytes are cut
 * into pieces; the rest is what the backend sent. */
#include <ctype.h>
#include <strings.h>

#include "fuzz.h"
#include "heads.h"

#define ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

static enum why parse_pieces(struct response *r, const char *buf, size_t len, unsigned piece)
{
	enum why why = WHY_MORE;
	size_t n = 0;

	memset(r, 0, sizeof *r);
	do {
		n = n + piece < len ? n + piece : len;
		why = response_parse(r, buf, n);
	} while (why == WHY_MORE && n < len);
	return why;
}

static void rendered_must(const struct response *r, const char *out, size_t len)
{
	MUST(fields_of(out, len, "Content-Length") <= 1);
	MUST(fields_of(out, len, "Keep-Alive") == 0);
	MUST(fields_of(out, len, "Transfer-Encoding") == 0 ||
		fields_of(out, len, "Content-Length") == 0);
	if (r->framing == BODY_TUNNEL)
		MUST(field_is(out, len, "Connection", "Upgrade") &&
			field_is(out, len, "Upgrade", "websocket"));
	else
		MUST(fields_of(out, len, "Upgrade") == 0);
	if (r->status >= 200)
		MUST(field_is(out, len, "Connection", "close"));
	if (check_accept && r->framing == BODY_TUNNEL)
		MUST(field_is(out, len, "Sec-WebSocket-Accept", ACCEPT));
}

/* Whoever reads what was passed on finds the same body. */
static void again_must(const struct response *r, int upgrade, int head, const char *out, size_t len)
{
	static char twice[HEAD_ROOM];
	struct response q;
	enum why why = parse_pieces(&q, out, len, head_max);

	if (why != WHY_NONE && (len > head_max || r->head.nfields + 2 > HEAD_FIELDS))
		return;                 /* too large by what was added */
	MUST(why == WHY_NONE && q.head.size == len);
	MUST(response_check(&q, out, upgrade, head, ACCEPT) == WHY_NONE);
	MUST(q.status == r->status && q.framing == r->framing);
	MUST(q.framing != BODY_LENGTH || q.length == r->length);
	/* a field named as the option that is always added goes the second time */
	if (fields_of(out, len, "Close") > 0)
		return;
	MUST(response_render(&q, out, twice, sizeof twice) == len);
	MUST(memcmp(out, twice, len) == 0);
}

static void render_must(const struct response *r, int upgrade, int head, const char *buf)
{
	static char room[HEAD_ROOM + HEAD_ROOM];
	size_t len = response_render(r, buf, room, sizeof room);
	char *out = malloc(len);

	MUST(len > 0);
	MUST(response_render(r, buf, out, len) == len);
	MUST(memcmp(out, room, len) == 0);
	MUST(response_render(r, buf, out, len - 1) == 0);
	memcpy(out, room, len);
	rendered_must(r, out, len);
	again_must(r, upgrade, head, out, len);
	free(out);
}

/* A chunked body ends where it ends, in one piece or many. */
static void chunked_must(const char *buf, size_t len, unsigned piece)
{
	struct chunked whole = { 0 }, pieces = { 0 };
	size_t end = chunked_scan(&whole, buf, len, NULL), n = 0, step, took;

	MUST(end <= len && !(whole.done && whole.bad));
	MUST(whole.done || whole.bad || end == len);
	while (n < len && !pieces.done && !pieces.bad) {
		step = n + piece < len ? piece : len - n;
		took = chunked_scan(&pieces, buf + n, step, NULL);
		MUST(took == step || pieces.done || pieces.bad);
		n += took;
	}
	MUST(n == end && whole.done == pieces.done && whole.bad == pieces.bad);
	MUST(!whole.done || (end >= 5 && memcmp(buf + end - 2, "\r\n", 2) == 0));
}

/* What is passed on of one that is whole is a body of its own, with the same end, in which nothing
 * is to be dropped; and it is the same whatever is taken at a time. */
static void chunked_clean_must(const char *buf, size_t len, unsigned piece)
{
	struct chunked whole = { 0 }, pieces = { 0 }, again = { 0 };
	char *out = malloc(len + 1);
	size_t n = 0, at = 0, took, end = chunked_scan(&whole, buf, len, NULL);
	int kept = 0, done = 0;

	while (!done && !pieces.done && !pieces.bad) {
		const size_t step = end - at < piece ? end - at : piece;

		took = chunked_scan(&pieces, buf + at, step, &kept);
		done = step == 0;
		memcpy(out + n, buf + at, kept ? took : 0);
		n += kept ? took : 0;
		at += took;
	}
	MUST(pieces.bad ? pieces.dropped > head_max : at == end && pieces.done == whole.done);
	if (whole.done && pieces.done) {
		MUST(chunked_scan(&again, out, n, NULL) == n && again.done);
		MUST(again.dropped == 0 && n + whole.dropped == end);
	}
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct response whole, pieces;
	struct input in = { data, size };
	unsigned asked = input_byte(&in), piece = input_byte(&in) + 1;
	const int upgrade = asked & 1, head = !upgrade && asked & 2;
	size_t len, skip = 0;
	enum why why;
	char *buf;

	buf = input_rest(&in, &len);
	memset(&whole, 0, sizeof whole);
	why = response_parse(&whole, buf, len);
	MUST(why == parse_pieces(&pieces, buf, len, piece));
	MUST(why == WHY_NONE || why == WHY_BAD_RESPONSE || why == WHY_LARGE_RESPONSE ||
		(why == WHY_MORE && len < head_max));
	if (why == WHY_NONE) {
		MUST(whole.head.size == pieces.head.size);
		MUST(whole.head.nfields == pieces.head.nfields);
		head_must(&whole.head, buf, len);
		why = response_check(&whole, buf, upgrade, head, ACCEPT);
		MUST(why == WHY_NONE || why == WHY_BAD_RESPONSE || why == WHY_BAD_ACCEPT);
		skip = whole.head.size;
		if (why == WHY_NONE) {
			MUST(whole.status >= 100 && whole.status < 600);
			MUST((whole.framing == BODY_TUNNEL) == (whole.status == 101));
			render_must(&whole, upgrade, head, buf);
		}
	}
	chunked_must(buf + skip, len - skip, piece);
	chunked_clean_must(buf + skip, len - skip, piece);
	free(buf);
	return 0;
}
