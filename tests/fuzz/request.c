/* request.c - fuzzes the request head: request_parse, request_check, request_render. The first byte
 * chooses configuration, the second how the head is cut into pieces; the rest is the head. */
#include <ctype.h>
#include <strings.h>

#include "fuzz.h"
#include "heads.h"

static const struct forwarded forwarded = { .client = "192.0.2.9", .proto = "https",
	.subject = "a subject" };

static void configure(unsigned byte)
{
	static const char *const some[] = { NULL, "same", "https://a.example", "https://" };

	x_forwarded_for = (enum x_forwarded_for)(byte % 3);
	origins[0] = some[byte / 3 % 4];
}

/* The same whether it comes at once or in pieces. */
static enum why parse_pieces(struct request *r, const char *buf, size_t len, unsigned piece)
{
	enum why why = WHY_MORE;
	size_t n = 0;

	memset(r, 0, sizeof *r);
	do {
		n = n + piece < len ? n + piece : len;
		why = request_parse(r, buf, n);
	} while (why == WHY_MORE && n < len);
	return why;
}

/* What a backend gets has one reading: a good head, without what concerns this connection alone. */
static void rendered_must(const struct request *r, const char *out, size_t len)
{
	const char *value;
	size_t n;

	MUST(fields_of(out, len, "Host") == 1);
	MUST(fields_of(out, len, "Content-Length") <= 1);
	MUST(r->chunked ? field_is(out, len, "Transfer-Encoding", "chunked") &&
		fields_of(out, len, "Content-Length") == 0 :
		fields_of(out, len, "Transfer-Encoding") == 0);
	MUST(fields_of(out, len, "TE") == 0);
	MUST(fields_of(out, len, "Keep-Alive") == 0);
	MUST(field_is(out, len, "Connection", r->upgrade ? "Upgrade" : "close"));
	MUST(r->upgrade ? field_is(out, len, "Upgrade", "websocket") :
		fields_of(out, len, "Upgrade") == 0);
	MUST(field_is(out, len, "X-SSL-Client-CN", "a subject"));
	if (r->upgrade)
		MUST(fields_of(out, len, "Sec-WebSocket-Key") == 1 &&
			field_is(out, len, "Sec-WebSocket-Version", "13"));
	if (x_forwarded_for == OFF)
		return;
	MUST(field_is(out, len, "X-Real-IP", "192.0.2.9"));
	MUST(field_is(out, len, "X-Forwarded-Proto", "https"));
	MUST(field_count(out, len, "X-Forwarded-For", &value, &n) == 1);
	MUST(n >= 9 && memcmp(value + n - 9, "192.0.2.9", 9) == 0);
	MUST(x_forwarded_for == APPEND || n == 9);
}

/* What was passed on would be taken, means the same, and is passed on as it is. */
static void again_must(const struct request *r, const char *buf, const char *out, size_t len)
{
	static char twice[HEAD_ROOM];
	struct request q;
	enum why why;

	why = parse_pieces(&q, out, len, head_max);
	if (why == WHY_LARGE_HEAD || why == WHY_LONG_TARGET)
		return;                 /* by what was added */
	MUST(why == WHY_NONE && q.head.size == len);
	MUST(request_check(&q, out) == WHY_NONE);
	MUST(q.upgrade == r->upgrade && q.length == r->length && q.chunked == r->chunked);
	MUST(q.host.len == r->host.len);
	MUST(memcmp(out + q.host.at, buf + r->host.at, q.host.len) == 0);
	if (r->target.len > 0 && buf[r->target.at] == '/')
		MUST(q.target.len == r->target.len &&
			memcmp(out + q.target.at, buf + r->target.at, q.target.len) == 0);
	/* a field named as the option that is always added goes the second time */
	if (x_forwarded_for == APPEND || fields_of(out, len, "Close") > 0)
		return;
	MUST(request_render(&q, out, &forwarded, twice, sizeof twice) == len);
	MUST(memcmp(out, twice, len) == 0);
}

static void render_must(const struct request *r, const char *buf)
{
	static char room[HEAD_ROOM + HEAD_ROOM];
	size_t len = request_render(r, buf, &forwarded, room, sizeof room);
	char *out = malloc(len);

	MUST(len > 0);
	MUST(request_render(r, buf, &forwarded, out, len) == len);      /* fits exactly, */
	MUST(memcmp(out, room, len) == 0);
	MUST(request_render(r, buf, &forwarded, out, len - 1) == 0);    /* or not at all */
	memcpy(out, room, len);
	rendered_must(r, out, len);
	again_must(r, buf, out, len);
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct request whole, pieces;
	struct input in = { data, size };
	unsigned piece;
	enum why why;
	size_t len;
	char *buf;

	configure(input_byte(&in));
	piece = input_byte(&in) + 1;
	buf = input_rest(&in, &len);
	memset(&whole, 0, sizeof whole);
	why = request_parse(&whole, buf, len);
	MUST(why == parse_pieces(&pieces, buf, len, piece));
	MUST(why != WHY_MORE || len < head_max);
	if (why == WHY_NONE) {
		MUST(whole.head.size == pieces.head.size);
		MUST(whole.head.nfields == pieces.head.nfields);
		MUST(memcmp(whole.head.part, pieces.head.part, sizeof whole.head.part) == 0);
		MUST(memcmp(whole.head.field, pieces.head.field,
			whole.head.nfields * sizeof whole.head.field[0]) == 0);
		head_must(&whole.head, buf, len);
		why = request_check(&whole, buf);
		MUST(why != WHY_MORE);
		if (why == WHY_NONE)
			render_must(&whole, buf);
	}
	free(buf);
	return 0;
}
