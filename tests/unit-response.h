/* unit-response.h - response_parse, response_check, response_render, chunked_scan, accept_key. */

#define ACCEPT  "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
#define OK      "HTTP/1.1 200 OK\r\n"
#define SWITCH  "HTTP/1.1 101 Switching Protocols\r\n"
#define AGREE   "Upgrade: websocket\r\nConnection: Upgrade\r\n"
#define PROVE   "Sec-WebSocket-Accept: " ACCEPT "\r\n"

struct response_case {
	int line;
	const char *in;
	size_t len;
	int upgrade, head;          /* what was asked */
	enum why why, or;
	unsigned status;            /* these if good; 0: not looked at */
	enum framing framing;
	uint64_t length;
};

/* The answer to a GET, to a HEAD, to an upgrade. */
#define TO_GET(s, st, f, n)     { __LINE__, LIT(s), 0, 0, WHY_NONE, WHY_NONE, st, f, n }
#define TO_HEAD(s, st, f, n)    { __LINE__, LIT(s), 0, 1, WHY_NONE, WHY_NONE, st, f, n }
#define TO_UPGRADE(s, st, f, n) { __LINE__, LIT(s), 1, 0, WHY_NONE, WHY_NONE, st, f, n }
#define BAD_GET(s)              { __LINE__, LIT(s), 0, 0, WHY_BAD_RESPONSE, WHY_BAD_RESPONSE, 0, 0, 0 }
#define BAD_UPGRADE(s, w, o)    { __LINE__, LIT(s), 1, 0, w, o, 0, 0, 0 }
#define NO_SWITCH(s)            BAD_UPGRADE(s, WHY_BAD_ACCEPT, WHY_BAD_ACCEPT)
#define PART(s)                 { __LINE__, LIT(s), 0, 0, WHY_MORE, WHY_MORE, 0, 0, 0 }
/* A head that may be taken so, or be refused. */
#define GET_OR_BAD(s, st, f, n) { __LINE__, LIT(s), 0, 0, WHY_NONE, WHY_BAD_RESPONSE, st, f, n }

static const struct response_case response_lines[] = {
	PART(""),
	PART("H"),
	PART("HTTP/1.1 200 OK"),
	PART("HTTP/1.1 200 OK\r"),
	PART("HTTP/1.1 200 OK\r\n"),
	PART("HTTP/1.1 200 OK\r\nA: b\r\n"),
	PART("HTTP/1.1 200 OK\r\nA: b\r\n\r"),
	TO_GET("HTTP/1.1 200 OK\r\n" END, 200, BODY_EOF, 0),
	TO_GET("HTTP/1.1 200 \r\n" END, 200, BODY_EOF, 0),              /* the reason may be empty */
	TO_GET("HTTP/1.1 299 Any  thing\tat all: (\x80\xff)\r\n" END, 299, BODY_EOF, 0),
	TO_GET("HTTP/1.1 599 x\r\n" CL "0\r\n" END, 599, BODY_LENGTH, 0),
	GET_OR_BAD("HTTP/1.1 200\r\n" CL "0\r\n" END, 200, BODY_LENGTH, 0),     /* no second space */
	/* HTTP/1.0 servers are servers */
	TO_GET("HTTP/1.0 200 OK\r\n" END, 200, BODY_EOF, 0),
	TO_GET("HTTP/1.0 200 OK\r\n" CL "5\r\n" END, 200, BODY_LENGTH, 5),
	TO_GET("HTTP/1.0 404 Not Found\r\nServer: x\r\n" END, 404, BODY_EOF, 0),

	BAD_GET("HTTP/2.0 200 OK\r\n" END),
	BAD_GET("HTTP/0.9 200 OK\r\n" END),
	BAD_GET("HTTP/1 200 OK\r\n" END),
	BAD_GET("HTTP/1.11 200 OK\r\n" END),
	BAD_GET("http/1.1 200 OK\r\n" END),
	BAD_GET("ICY 200 OK\r\n" END),
	BAD_GET("200 OK\r\n" END),
	BAD_GET(" HTTP/1.1 200 OK\r\n" END),
	BAD_GET("HTTP/1.1\r\n" END),
	BAD_GET("HTTP/1.1 \r\n" END),
	BAD_GET("HTTP/1.1  200 OK\r\n" END),
	BAD_GET("HTTP/1.1\t200 OK\r\n" END),
	BAD_GET("HTTP/1.1 20 OK\r\n" END),
	BAD_GET("HTTP/1.1 2000 OK\r\n" END),
	BAD_GET("HTTP/1.1 0200 OK\r\n" END),
	BAD_GET("HTTP/1.1 2x0 OK\r\n" END),
	BAD_GET("HTTP/1.1 +20 OK\r\n" END),
	BAD_GET("HTTP/1.1 -20 OK\r\n" END),
	BAD_GET("HTTP/1.1 20: OK\r\n" END),
	BAD_GET("HTTP/1.1 20/ OK\r\n" END),
	BAD_GET("HTTP/1.1 099 OK\r\n" END),
	BAD_GET("HTTP/1.1 000 OK\r\n" END),
	BAD_GET("HTTP/1.1 600 OK\r\n" END),
	BAD_GET("HTTP/1.1 999 OK\r\n" END),
	BAD_GET("HTTP/1.1 OK 200\r\n" END),
	BAD_GET("HTTP/1.1 200 a\0b\r\n" END),
	BAD_GET("HTTP/1.1 200 a\x1b[0m\r\n" END),
	BAD_GET("HTTP/1.1 200 a\x7f\r\n" END),
	BAD_GET("HTTP/1.1 200 OK\n" END),
	BAD_GET("HTTP/1.1 200 OK\n\n"),
	BAD_GET("HTTP/1.1 200 a\rb\r\n" END),
	BAD_GET("HTTP/1.1 200 a\nb\r\n" END),
	BAD_GET("HTTP/1.1 200 OK\r\r\n" END),
	BAD_GET("GET / HTTP/1.1\r\n" HOST END),
	BAD_GET("SSH-2.0-OpenSSH_9.2\r\n"),
	BAD_GET("+OK ready\r\n"),
	BAD_GET("\x15\x03\x03\0\x02\x02\x0a\r\n"),
	BAD_GET("<html>\r\n"),
	BAD_GET("\r\n\r\n" OK END),
	/* header lines: the rules of a request */
	TO_GET(OK "A:\r\nB:c\r\nD: e\tf \x80\r\n" END, 200, BODY_EOF, 0),
	BAD_GET(OK "A\r\n" END),
	BAD_GET(OK ": b\r\n" END),
	BAD_GET(OK "A B: c\r\n" END),
	BAD_GET(OK "A\x80: c\r\n" END),
	BAD_GET(OK "A: b\0\r\n" END),
	BAD_GET(OK "A: b\x08\r\n" END),
	BAD_GET(OK "A: b\rc\r\n" END),
	BAD_GET(OK "A: b\nC: d\r\n" END),
	BAD_GET(OK "A: b\r\r\n" END),
	BAD_GET(OK "A: b\r\n\n"),
	BAD_GET(OK " A: b\r\n" END),
	BAD_GET(OK "A: b\r\n c\r\n" END),               /* 502 is one of 9112 5.2's two ways */
	GET_OR_BAD(OK "A : b\r\n" END, 200, BODY_EOF, 0),       /* 9112 5.1: or the space goes */
};

static const struct response_case response_bodies[] = {
	TO_GET(OK CL "0\r\n" END, 200, BODY_LENGTH, 0),
	TO_GET(OK CL "5\r\n" END "hello", 200, BODY_LENGTH, 5),
	TO_GET(OK CL "5\r\n" END "hello and more", 200, BODY_LENGTH, 5),
	TO_GET(OK "CONTENT-length:5 \r\n" END, 200, BODY_LENGTH, 5),
	TO_GET(OK CL "100000000000000000\r\n" END, 200, BODY_LENGTH, 100000000000000000u),
	GET_OR_BAD(OK CL "9223372036854775807\r\n" END, 200, BODY_LENGTH, INT64_MAX),
	TO_GET(OK CL "5\r\n" CL "5\r\n" END, 200, BODY_LENGTH, 5),
	GET_OR_BAD(OK CL "5, 5\r\n" END, 200, BODY_LENGTH, 5),
	BAD_GET(OK CL "5\r\n" CL "6\r\n" END),
	BAD_GET(OK CL "5, 6\r\n" END),
	BAD_GET(OK CL "\r\n" END),
	BAD_GET(OK CL "-1\r\n" END),
	BAD_GET(OK CL "+1\r\n" END),
	BAD_GET(OK CL "1x\r\n" END),
	BAD_GET(OK CL "0x1\r\n" END),
	BAD_GET(OK CL "1 2\r\n" END),
	BAD_GET(OK CL "18446744073709551616\r\n" END),
	BAD_GET(OK CL "18446744073709551617\r\n" END),

	TO_GET(OK TE "chunked\r\n" END "0\r\n\r\n", 200, BODY_CHUNKED, 0),
	TO_GET(OK "transfer-encoding: Chunked\r\n" END, 200, BODY_CHUNKED, 0),
	TO_GET("HTTP/1.1 500 x\r\n" TE "chunked\r\n" END, 500, BODY_CHUNKED, 0),
	GET_OR_BAD(OK TE "gzip, chunked\r\n" END, 200, BODY_CHUNKED, 0),
	GET_OR_BAD(OK TE "gzip\r\n" TE "chunked\r\n" END, 200, BODY_CHUNKED, 0),
	GET_OR_BAD(OK TE "gzip\r\n" END, 200, BODY_EOF, 0),
	GET_OR_BAD(OK TE "chunked, gzip\r\n" END, 200, BODY_EOF, 0),
	GET_OR_BAD(OK TE "chunked\r\n" TE "gzip\r\n" END, 200, BODY_EOF, 0),
	GET_OR_BAD(OK TE "xchunked\r\n" END, 200, BODY_EOF, 0),
	BAD_GET(OK CL "5\r\n" TE "chunked\r\n" END),
	BAD_GET(OK TE "chunked\r\n" CL "5\r\n" END),
	BAD_GET(OK TE "chunked\r\n" CL "0\r\n" END),
	/* faulty framing (9112 6.1): refused, or read up to the end of the connection */
	GET_OR_BAD("HTTP/1.0 200 OK\r\n" TE "chunked\r\n" END, 200, BODY_EOF, 0),

	/* no body, whatever the fields say (9112 6.3) */
	TO_GET("HTTP/1.1 204 No Content\r\n" END, 204, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 204 No Content\r\n" CL "0\r\n" END, 204, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 304 Not Modified\r\n" END, 304, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 304 Not Modified\r\n" CL "5\r\n" END, 304, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 304 Not Modified\r\n" TE "chunked\r\n" END, 304, BODY_LENGTH, 0),
	GET_OR_BAD("HTTP/1.1 204 No Content\r\n" CL "5\r\n" END, 204, BODY_LENGTH, 0),
	GET_OR_BAD("HTTP/1.1 204 No Content\r\n" TE "chunked\r\n" END, 204, BODY_LENGTH, 0),
	TO_HEAD(OK END, 200, BODY_LENGTH, 0),
	TO_HEAD(OK CL "5\r\n" END, 200, BODY_LENGTH, 0),
	TO_HEAD(OK TE "chunked\r\n" END, 200, BODY_LENGTH, 0),
	TO_HEAD("HTTP/1.0 404 x\r\n" CL "500\r\n" END, 404, BODY_LENGTH, 0),
	/* 205 has a body like any other (9110 15.3.6 asks the server for an empty one) */
	TO_GET("HTTP/1.1 205 Reset\r\n" CL "0\r\n" END, 205, BODY_LENGTH, 0),

	/* interim answers */
	TO_GET("HTTP/1.1 100 Continue\r\n" END, 100, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 100 Continue\r\n" END OK END, 100, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 102 x\r\n" END, 102, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n" END, 103, BODY_LENGTH, 0),
	TO_GET("HTTP/1.1 199 x\r\n" END, 199, BODY_LENGTH, 0),
	TO_UPGRADE("HTTP/1.1 103 Early Hints\r\nLink: x\r\n" END, 103, BODY_LENGTH, 0),
	TO_UPGRADE("HTTP/1.1 100 Continue\r\n" END SWITCH, 100, BODY_LENGTH, 0),
};

static const struct response_case response_upgrades[] = {
	TO_UPGRADE(SWITCH AGREE PROVE END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH AGREE PROVE END "\x81\x02hi", 101, BODY_TUNNEL, 0),
	TO_UPGRADE("HTTP/1.1 101 \r\n" AGREE PROVE END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE("HTTP/1.1 101 Web Socket Protocol Handshake\r\n" PROVE AGREE END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH PROVE "UPGRADE: WebSocket\r\nCONNECTION: UPGRADE\r\n" END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH PROVE "upgrade:websocket\r\nconnection:upgrade\r\n" END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH PROVE "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n" END,
		101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH PROVE "Upgrade: websocket\r\nConnection: keep-alive\r\nConnection: ,upgrade ,\r\n"
		END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH AGREE "sec-websocket-accept:\t" ACCEPT "\t\r\n" END, 101, BODY_TUNNEL, 0),
	TO_UPGRADE(SWITCH AGREE PROVE "Sec-WebSocket-Protocol: chat\r\nServer: x\r\nSet-Cookie: a=b\r\n"
		"Sec-WebSocket-Extensions: permessage-deflate\r\n" END, 101, BODY_TUNNEL, 0),
	/* some servers announce the body that a 101 can't have */
	TO_UPGRADE(SWITCH AGREE PROVE CL "0\r\n" END, 101, BODY_TUNNEL, 0),

	NO_SWITCH(SWITCH END),
	NO_SWITCH(SWITCH PROVE END),
	NO_SWITCH(SWITCH AGREE END),
	NO_SWITCH(SWITCH PROVE "Upgrade: websocket\r\n" END),
	NO_SWITCH(SWITCH PROVE "Connection: Upgrade\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade: h2c\r\nConnection: Upgrade\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade: websockets\r\nConnection: Upgrade\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade:\r\nConnection: Upgrade\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade: websocket\r\nConnection: close\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade: websocket\r\nConnection: upgraded\r\n" END),
	NO_SWITCH(SWITCH PROVE "Upgrade: websocket\r\nConnection: keep-alive\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept:\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: x\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: " KEY "\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: " ACCEPT "=\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: S3PPLMBITXAQ9KYGZZHZRBK+XOO=\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: t3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo!\r\n" END),
	NO_SWITCH(SWITCH AGREE PROVE PROVE END),                /* once (6455 11.3.3) */
	NO_SWITCH(SWITCH AGREE PROVE "Sec-WebSocket-Accept: x\r\n" END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: x\r\n" PROVE END),
	NO_SWITCH(SWITCH AGREE "Sec-WebSocket-Accept: " ACCEPT ", " ACCEPT "\r\n" END),
	BAD_UPGRADE("HTTP/1.0 101 x\r\n" AGREE PROVE END, WHY_BAD_ACCEPT, WHY_BAD_RESPONSE),
	BAD_UPGRADE(SWITCH AGREE PROVE "A : b\r\n" END, WHY_BAD_RESPONSE, WHY_NONE),
	BAD_UPGRADE(SWITCH AGREE PROVE "A: b\n" END, WHY_BAD_RESPONSE, WHY_BAD_RESPONSE),
	/* a 101 that no one asked for */
	{ __LINE__, LIT(SWITCH AGREE PROVE END), 0, 0, WHY_BAD_ACCEPT, WHY_BAD_RESPONSE, 0, 0, 0 },
	{ __LINE__, LIT(SWITCH AGREE PROVE END), 0, 1, WHY_BAD_ACCEPT, WHY_BAD_RESPONSE, 0, 0, 0 },

	/* a refusal is a plain answer, with whatever it carries */
	TO_UPGRADE(OK CL "5\r\n" END "hello", 200, BODY_LENGTH, 5),
	TO_UPGRADE(OK AGREE PROVE CL "5\r\n" END, 200, BODY_LENGTH, 5),
	TO_UPGRADE("HTTP/1.1 401 x\r\nWWW-Authenticate: Basic\r\n" CL "0\r\n" END, 401, BODY_LENGTH, 0),
	TO_UPGRADE("HTTP/1.1 403 x\r\nConnection: close\r\n" END, 403, BODY_EOF, 0),
	TO_UPGRADE("HTTP/1.1 302 x\r\nLocation: /y\r\n" TE "chunked\r\n" END, 302, BODY_CHUNKED, 0),
	TO_UPGRADE("HTTP/1.1 426 x\r\n" AGREE "Sec-WebSocket-Version: 13\r\n" CL "0\r\n" END,
		426, BODY_LENGTH, 0),
	TO_UPGRADE("HTTP/1.0 503 x\r\n" END, 503, BODY_EOF, 0),
	TO_UPGRADE("HTTP/1.1 204 x\r\n" END, 204, BODY_LENGTH, 0),
};

static enum why response_feed(struct response *r, const struct response_case *c, enum feeding how,
	size_t cut, const char **buf)
{
	size_t all = c->len < head_max ? c->len : head_max;
	size_t n = how == ONCE ? all : how == TWICE ? cut : 0;
	enum why why;

	memset(r, 0, sizeof *r);
	for (;;) {
		*buf = guard_copy(&input, c->in, n);
		why = response_parse(r, *buf, n);
		if (why != WHY_MORE || n == all)
			break;
		n = how == BYTES ? n + 1 : all;
	}
	return why == WHY_NONE ? response_check(r, *buf, c->upgrade, c->head, ACCEPT) : why;
}

static void response_case_run(const struct response_case *c)
{
	size_t cut, all = c->len < head_max ? c->len : head_max;
	unsigned before = failures;
	struct response r, again;
	const char *buf;
	enum why why;

	at_input(c->line, c->in, c->len);
	why = response_feed(&r, c, ONCE, 0, &buf);
	if (why != c->or)
		CHECK_WHY(why, c->why);
	if (why == WHY_NONE && c->status != 0) {
		CHECK_INT(r.head.size, head_end(c->in, c->len));
		CHECK_INT(r.status, c->status);
		CHECK_INT(r.framing, c->framing);
		if (c->framing == BODY_LENGTH)
			CHECK_INT(r.length, c->length);
	}
	for (cut = 0; cut <= all && failures == before; cut++) {
		with("a cut at %zu", cut);
		CHECK_WHY(response_feed(&again, c, cut < all ? TWICE : BYTES, cut, &buf), why);
		if (why != WHY_NONE)
			continue;
		check_same_head(&again.head, &r.head);
		CHECK_INT(again.status, r.status);
		CHECK_INT(again.framing, r.framing);
		CHECK_INT(again.length, r.length);
	}
}

static void response_table(const struct response_case *c, size_t n)
{
	for (; n != 0; n--, c++)
		response_case_run(c);
}

static void test_response_line(void)    { response_table(response_lines, COUNT(response_lines)); }
static void test_response_body(void)    { response_table(response_bodies, COUNT(response_bodies)); }
static void test_response_upgrade(void) { response_table(response_upgrades, COUNT(response_upgrades)); }

static void response_limit_case(size_t len, enum why want)
{
	struct response_case c = { 0, large, len, 0, 0, want, want, 0, 0, 0 };

	response_case_run(&c);
}

static void test_response_limits(void)
{
	size_t len;
	unsigned i;

	response_limit_case(head_fill(OK, head_max), WHY_NONE);
	response_limit_case(head_fill(OK, head_max + 1), WHY_LARGE_RESPONSE);
	len = head_fill("HTTP/1.1 200 x", head_max);
	memset(large + 14, 'x', 4);
	response_limit_case(len, WHY_NONE);             /* one long line */
	memset(large, 'x', sizeof large);
	response_limit_case(head_max, WHY_LARGE_RESPONSE);

	len = (size_t)sprintf(large, OK);
	for (i = 0; i < HEAD_FIELDS; i++)
		len += (size_t)sprintf(large + len, "A%u: b\r\n", i);
	memcpy(large + len, "\r\n", 2);
	response_limit_case(len + 2, WHY_NONE);
	memcpy(large + len, "B: c\r\n\r\n", 8);
	response_limit_case(len + 8, WHY_LARGE_RESPONSE);
}

/* ---- rendering ---- */

static size_t response_rendered(const char *in, size_t len, int upgrade, int head)
{
	struct response_case c = { 0, in, len, upgrade, head, WHY_NONE, WHY_NONE, 0, 0, 0 };
	struct response r;
	const char *buf;
	size_t n, size;
	enum why why;

	rendered[0] = '\0';
	why = response_feed(&r, &c, ONCE, 0, &buf);
	CHECK_WHY(why, WHY_NONE);
	if (why != WHY_NONE)
		return 0;
	n = response_render(&r, buf, rendered, sizeof rendered - 1);
	CHECK(n != 0);
	rendered[n] = '\0';
	for (size = 0; size < n; size++) {
		with("%zu bytes for a head of %zu", size, n);
		CHECK_INT(response_render(&r, buf, guard_room(&output, size), size), 0);
	}
	with("exactly %zu bytes", n);
	CHECK_INT(response_render(&r, buf, guard_room(&output, n), n), n);
	CHECK_BYTES(output.end - n, n, rendered, n);
	detail[0] = '\0';
	CHECK(head_is_clean(rendered, n));
	return n;
}

struct response_render_case {
	int line;
	const char *in;
	size_t len;
	int upgrade, head;
	const char *connection, *kept;
};

static const struct response_render_case response_renders[] = {
	/* an answer ends its connection */
	{ __LINE__, LIT(OK CL "5\r\n" END "hello"), 0, 0, "close", OK CL "5\r\n" END },
	{ __LINE__, LIT(OK END), 0, 0, "close", OK END },
	{ __LINE__, LIT(OK "Connection: keep-alive\r\nKeep-Alive: 5\r\n" CL "5\r\n" END), 0, 0, "close",
		OK CL "5\r\n" END },
	{ __LINE__, LIT(OK "Connection: close\r\n" CL "5\r\n" END), 0, 0, "close", OK CL "5\r\n" END },
	{ __LINE__, LIT("HTTP/1.1 599 A b\tc \x80\r\nb: 2\r\nA: 1\r\nb: 3\r\nE: \xc3\xa4\r\n" END), 0, 0, "close",
		"HTTP/1.1 599 A b\tc \x80\r\nb: 2\r\nA: 1\r\nb: 3\r\nE: \xc3\xa4\r\n" END },
	{ __LINE__, LIT(OK "Set-Cookie: a=b; Path=/\r\nSet-Cookie: c=d\r\n" END), 0, 0, "close",
		OK "Set-Cookie: a=b; Path=/\r\nSet-Cookie: c=d\r\n" END },
	{ __LINE__, LIT(OK "Connection: x-hop, A\r\nX-HOP: 1\r\na: 2\r\nB: 3\r\n" END), 0, 0, "close",
		OK "B: 3\r\n" END },
	{ __LINE__, LIT(OK "Connection: x-hop\r\nConnection: A\r\nX-HOP: 1\r\na: 2\r\nB: 3\r\n" END), 0, 0, "close",
		OK "B: 3\r\n" END },
	{ __LINE__, LIT(OK "Proxy-Connection: x\r\nB: 3\r\n" END), 0, 0, "close", OK "B: 3\r\n" END },
	/* the body goes through as it is, so what frames it stays */
	{ __LINE__, LIT(OK TE "chunked\r\nA: b\r\n" END), 0, 0, "close", OK TE "chunked\r\nA: b\r\n" END },
	{ __LINE__, LIT(OK CL "5\r\nConnection: content-length\r\n" END), 0, 0, "close", OK CL "5\r\n" END },
	{ __LINE__, LIT(OK TE "chunked\r\nConnection: transfer-encoding\r\n" END), 0, 0, "close",
		OK TE "chunked\r\n" END },
	{ __LINE__, LIT(OK CL "5\r\n" END), 0, 1, "close", OK CL "5\r\n" END },
	{ __LINE__, LIT("HTTP/1.1 304 x\r\n" CL "5\r\nETag: y\r\n" END), 0, 0, "close",
		"HTTP/1.1 304 x\r\n" CL "5\r\nETag: y\r\n" END },
	/* the version is the proxy's own (9110 6.2) */
	{ __LINE__, LIT("HTTP/1.0 200 OK\r\nA: b\r\n" END), 0, 0, "close", OK "A: b\r\n" END },
	{ __LINE__, LIT("HTTP/1.0 403 x\r\nConnection: keep-alive\r\n" CL "1\r\n" END), 1, 0, "close",
		"HTTP/1.1 403 x\r\n" CL "1\r\n" END },
	/* a tunnel */
	{ __LINE__, LIT(SWITCH AGREE PROVE END "\x81\x02hi"), 1, 0, "Upgrade", SWITCH PROVE END },
	{ __LINE__, LIT(SWITCH "Server: x\r\nConnection: keep-alive, upgrade, X-Hop\r\nX-Hop: 1\r\nSet-Cookie: a=b\r\n"
		"Upgrade: WebSocket\r\nsec-websocket-accept: " ACCEPT "\r\nSec-WebSocket-Protocol: chat\r\n"
		"Sec-WebSocket-Extensions: permessage-deflate\r\n" END), 1, 0, "Upgrade",
		SWITCH "Server: x\r\nSet-Cookie: a=b\r\nsec-websocket-accept: " ACCEPT "\r\n"
		"Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Extensions: permessage-deflate\r\n" END },
	{ __LINE__, LIT(SWITCH PROVE "Upgrade: websocket\r\nConnection: upgrade, sec-websocket-accept,"
		" Sec-WebSocket-Protocol\r\nSec-WebSocket-Protocol: chat\r\n" END), 1, 0, "Upgrade",
		SWITCH PROVE "Sec-WebSocket-Protocol: chat\r\n" END },
};

static void test_response_render(void)
{
	const struct response_render_case *c;
	const char *connection;

	for (c = response_renders; c < response_renders + COUNT(response_renders); c++) {
		at_input(c->line, c->in, c->len);
		response_rendered(c->in, c->len, c->upgrade, c->head);
		connection = take("Connection");
		if (strcasecmp(connection, c->connection) != 0)
			CHECK_STR(connection, c->connection);
		CHECK_STR(take("Upgrade"), c->upgrade && strcmp(c->connection, "Upgrade") == 0 ?
			"websocket" : "(none)");
		CHECK_STR(rendered, c->kept);
	}
}

/* What a client could read in two ways never goes out, whatever came in. */
static void test_response_render_framing(void)
{
	static const struct { const char *in; int head; } cases[] = {
		{ OK CL "5\r\n" CL "5\r\n" END, 0 },
		{ OK CL "5, 5\r\n" END, 0 },
		{ OK TE "gzip\r\n" TE "chunked\r\n" END, 0 },
		{ "HTTP/1.1 204 x\r\n" TE "chunked\r\n" END, 0 },
		{ "HTTP/1.0 200 x\r\n" TE "chunked\r\n" END, 0 },
		{ OK TE "gzip\r\n" END, 0 },
		{ OK "A : b\r\n" END, 0 },
		{ "HTTP/1.1 204 x\r\n" CL "5\r\n" END, 0 },
		{ "HTTP/1.1 103 x\r\n" CL "0\r\n" END, 0 },
		{ "HTTP/1.1 103 x\r\n" TE "chunked\r\n" END, 0 },
		{ SWITCH AGREE PROVE CL "0\r\n" END, 0 },
		{ SWITCH AGREE PROVE TE "chunked\r\n" END, 0 },
	};
	const char *length, *coding;
	struct response r;
	size_t i, n;

	for (i = 0; i < COUNT(cases); i++) {
		int upgrade = strncmp(cases[i].in, SWITCH, 12) == 0;
		struct response_case c = { 0, cases[i].in, strlen(cases[i].in), upgrade, cases[i].head,
			WHY_NONE, WHY_NONE, 0, 0, 0 };
		const char *buf;

		at_input(__LINE__, c.in, c.len);
		if (response_feed(&r, &c, ONCE, 0, &buf) != WHY_NONE)
			continue;
		n = response_rendered(c.in, c.len, upgrade, c.head);
		CHECK(head_is_clean(rendered, n));
		length = take("Content-Length");
		coding = take("Transfer-Encoding");
		if (r.framing == BODY_LENGTH && r.status == 200)
			CHECK_STR(length, "5");
		if (r.framing == BODY_CHUNKED)
			CHECK(strstr(coding, "chunked") != NULL);
		if (r.status < 200 || r.status == 204) {        /* 9110 8.6, 9112 6.1: MUST NOT */
			CHECK_STR(length, "(none)");
			CHECK_STR(coding, "(none)");
		}
	}
}

/* An interim answer that is passed on doesn't announce the end of the connection. */
static void test_response_render_interim(void)
{
	response_rendered(LIT("HTTP/1.1 103 Early Hints\r\nLink: x\r\nA: b\r\n" END), 1, 0);
	CHECK_STR(take("Connection"), "(none)");
	CHECK_STR(take("Upgrade"), "(none)");
	CHECK_STR(rendered, "HTTP/1.1 103 Early Hints\r\nLink: x\r\nA: b\r\n" END);
}

/* ---- chunked bodies ---- */

struct chunked_case {
	int line;
	const char *in;
	size_t len;
	size_t taken;               /* of a good one */
	int done, bad;
	int either;                 /* good or bad, as the reader likes */
};

#define WHOLE(s, rest)  { __LINE__, LIT(s rest), sizeof(s) - 1, 1, 0, 0 }
#define LENIENT(s)      { __LINE__, LIT(s), sizeof(s) - 1, 1, 0, 1 }
#define OPEN(s)         { __LINE__, LIT(s), sizeof(s) - 1, 0, 0, 0 }
#define BROKEN(s)       { __LINE__, LIT(s), 0, 0, 1, 0 }
#define A256            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
	"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
	"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

static const struct chunked_case chunked_cases[] = {
	WHOLE("0\r\n\r\n", ""),
	WHOLE("0\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
	WHOLE("0\r\n\r\n", "\r\n"),
	WHOLE("0\r\n\r\n", "0\r\n\r\n"),
	WHOLE("5\r\nhello\r\n0\r\n\r\n", ""),
	WHOLE("5\r\nhello\r\n0\r\n\r\n", "x"),
	WHOLE("5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", ""),
	WHOLE("2\r\n\r\n\r\n0\r\n\r\n", ""),
	WHOLE("7\r\n0\r\n\r\n0\r\r\n0\r\n\r\n", "x"),
	WHOLE("a\r\n0123456789\r\n0\r\n\r\n", ""),
	WHOLE("A\r\n0123456789\r\n0\r\n\r\n", ""),
	WHOLE("F\r\n0123456789abcde\r\nf\r\n0123456789abcde\r\n0\r\n\r\n", ""),
	WHOLE("1A\r\n0123456789abcdef0123456789\r\n0\r\n\r\n", ""),
	WHOLE("100\r\n" A256 "\r\n0\r\n\r\n", "x"),
	WHOLE("0005\r\nhello\r\n0000\r\n\r\n", ""),
	WHOLE("000000000005\r\nhello\r\n0\r\n\r\n", ""),
	LENIENT("0000000000000005\r\nhello\r\n0\r\n\r\n"),
	LENIENT("00000000000000000000000005\r\nhello\r\n0\r\n\r\n"),
	LENIENT("5\r\nhello\r\n00000000000000000000000\r\n\r\n"),
	/* extensions */
	WHOLE("5;a\r\nhello\r\n0;b\r\n\r\n", "x"),
	WHOLE("5;a=b\r\nhello\r\n0\r\n\r\n", ""),
	WHOLE("5;a=b;c=\"d e;\\\"f\"\r\nhello\r\n0\r\n\r\n", ""),
	WHOLE("5 ; a = b\r\nhello\r\n0\r\n\r\n", ""),
	WHOLE("5\t;a\r\nhello\r\n0\r\n\r\n", ""),
	LENIENT("5 \r\nhello\r\n0\r\n\r\n"),
	LENIENT("5;\r\nhello\r\n0\r\n\r\n"),
	/* trailers */
	WHOLE("0\r\nA: b\r\n\r\n", "x"),
	WHOLE("5\r\nhello\r\n0\r\nA: b\r\nCd:\r\n\r\n", "\r\n"),
	WHOLE("0\r\nA: 0\r\nB: \r\n\r\n", "x"),
	/* not all there */
	OPEN(""),
	OPEN("5"),
	OPEN("5\r"),
	OPEN("5\r\n"),
	OPEN("5\r\nhell"),
	OPEN("5\r\nhello"),
	OPEN("5\r\nhello\r"),
	OPEN("5\r\nhello\r\n"),
	OPEN("5\r\nhello\r\n0"),
	OPEN("5\r\nhello\r\n0\r\n"),
	OPEN("5\r\nhello\r\n0\r\n\r"),
	OPEN("0\r\nA: b\r\n"),
	OPEN("0\r\nA: b\r\n\r"),
	OPEN("5;a"),
	OPEN("7fffffffffff\r\nhello"),
	OPEN("FFFFFFFF\r\nhello"),
	OPEN("100000000\r\nhello"),
	/* bad */
	BROKEN("\r\n"),
	BROKEN("\r\n0\r\n\r\n"),
	BROKEN("g\r\n"),
	BROKEN("G\r\n"),
	BROKEN("@\r\n"),
	BROKEN("`\r\n"),
	BROKEN("/\r\n"),
	BROKEN(":\r\n"),
	BROKEN("x5\r\n"),
	BROKEN("0x5\r\nhello\r\n"),
	BROKEN("5x\r\nhello\r\n"),
	BROKEN(" 5\r\nhello\r\n"),
	BROKEN("-5\r\nhello\r\n"),
	BROKEN("+5\r\nhello\r\n"),
	BROKEN("5,\r\nhello\r\n"),
	BROKEN("5 5\r\nhello\r\n"),
	BROKEN(";a\r\n"),
	BROKEN("5\nhello\r\n"),
	BROKEN("5\n"),
	BROKEN("5\rhello\r\n"),
	BROKEN("5\r\r\nhello\r\n"),
	BROKEN("5;a\nhello\r\n"),
	BROKEN("5;a\rb\r\nhello\r\n"),
	BROKEN("5;a\0\r\nhello\r\n"),
	BROKEN("5\0\r\nhello\r\n"),
	BROKEN("5\r\nhellox"),
	BROKEN("5\r\nhello\n"),
	BROKEN("5\r\nhello0\r\n"),
	BROKEN("5\r\nhello\rx"),
	BROKEN("5\r\nhello\r\n\r\n"),
	BROKEN("0\n\n"),
	BROKEN("0\r\n\n"),
	BROKEN("0\r\n\rx"),
	BROKEN("0\r\nA: b\n\r\n"),
	BROKEN("0\r\nA: b\rc\r\n\r\n"),
	BROKEN("0\r\nA: b\0c\r\n\r\n"),
	BROKEN("0\r\n A: b\r\n\r\n"),
	/* sizes that no 64 bits hold: those that wrap to 0, to 5, to something large */
	BROKEN("10000000000000000\r\n\r\n"),
	BROKEN("10000000000000005\r\nhello\r\n0\r\n\r\n"),
	BROKEN("ffffffffffffffff0\r\n"),
	BROKEN("100000000000000000000000000000005\r\nhello\r\n"),
	BROKEN("1ffffffffffffffff\r\n"),
};

/* Feeds the rest from `from` on; what was taken in all. */
static size_t chunked_feed(struct chunked *c, const struct chunked_case *t, size_t from, size_t to)
{
	size_t n = chunked_scan(c, guard_copy(&input, t->in + from, to - from), to - from, NULL);

	CHECK(n <= to - from);
	if (!c->done && !c->bad)
		CHECK_INT(n, to - from);
	return n;
}

static void chunked_check(const struct chunked_case *t, const struct chunked *c, size_t taken,
	int bad)
{
	CHECK_INT(c->bad != 0, bad);
	CHECK_INT(c->done != 0, bad ? 0 : t->done);
	if (!bad)
		CHECK_INT(taken, t->taken);
}

static void chunked_case_run(const struct chunked_case *t)
{
	struct chunked c = { 0 };
	unsigned before = failures;
	size_t taken, cut;
	int bad;

	at_input(t->line, t->in, t->len);
	taken = chunked_feed(&c, t, 0, t->len);
	bad = t->either ? c.bad != 0 : t->bad;
	chunked_check(t, &c, taken, bad);
	if (c.done)
		CHECK_INT(chunked_scan(&c, "0\r\n\r\n", 5, NULL), 0);

	for (cut = 0; cut <= t->len && failures == before; cut++) {
		with("a cut at %zu", cut);
		memset(&c, 0, sizeof c);
		taken = chunked_feed(&c, t, 0, cut);
		if (!c.done && !c.bad)
			taken += chunked_feed(&c, t, cut, t->len);
		chunked_check(t, &c, taken, bad);
	}
	if (failures != before)
		return;
	with("a byte at a time");
	memset(&c, 0, sizeof c);
	for (cut = taken = 0; cut < t->len && !c.done && !c.bad; cut++)
		taken += chunked_feed(&c, t, cut, cut + 1);
	chunked_check(t, &c, taken, bad);
}

static void test_chunked(void)
{
	const struct chunked_case *t;

	for (t = chunked_cases; t < chunked_cases + COUNT(chunked_cases); t++)
		chunked_case_run(t);
}

/* A chunk larger than any buffer: its data is counted down over many calls. */
static void test_chunked_large(void)
{
	static char data[65536];
	struct chunked c = { 0 };
	uint64_t left = 0x123456789u;
	size_t n;

	memset(data, '\n', sizeof data);
	CHECK_INT(chunked_scan(&c, LIT("123456789\r\n"), NULL), 11);
	while (left != 0 && failures == 0) {
		n = left < sizeof data ? (size_t)left : sizeof data;
		CHECK_INT(chunked_scan(&c, data, n, NULL), n);
		CHECK_INT(c.done || c.bad, 0);
		left -= n;
	}
	CHECK_INT(chunked_scan(&c, LIT("\r\n0\r\n\r\nrest"), NULL), 7);
	CHECK_INT(c.done, 1);
	CHECK_INT(c.bad, 0);
}

/* What of a request's body is passed on, however it comes. */
static void test_chunked_clean(void)
{
	static const struct { int line; const char *in, *out; } cases[] = {
		{ __LINE__, "0\r\n\r\n", "0\r\n\r\n" },
		{ __LINE__, "5\r\nhello\r\n0\r\n\r\nGET", "5\r\nhello\r\n0\r\n\r\n" },
		{ __LINE__, "5;a=b;c\r\nhello\r\n0;d\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n" },
		{ __LINE__, "5 \t\r\n;a\r\n;\r\n0 ;x\r\n\r\n", "5\r\n;a\r\n;\r\n0\r\n\r\n" },
		{ __LINE__, "1\r\nx\r\n0\r\nA: b\r\nHost: c\r\n\r\n0", "1\r\nx\r\n0\r\n\r\n" },
		{ __LINE__, "0\r\nA: 0\r\nB:\r\n\r\n", "0\r\n\r\n" },
	};
	struct chunked c;
	size_t i, step, at, n, len;
	char out[64];
	int kept;

	for (i = 0; i < COUNT(cases); i++) {
		for (step = 1, len = strlen(cases[i].in); step <= len; step++) {
			at_input(cases[i].line, cases[i].in, len);
			memset(&c, 0, sizeof c);
			for (at = n = 0; at < len && !c.done && !c.bad; at += step) {
				size_t end = at + step < len ? at + step : len, took;

				for (; at < end && !c.done && !c.bad; at += took) {
					took = chunked_scan(&c, cases[i].in + at, end - at, &kept);
					memcpy(out + n, cases[i].in + at, kept ? took : 0);
					n += kept ? took : 0;
				}
				at = end - step;
			}
			CHECK_BYTES(out, n, cases[i].out, strlen(cases[i].out));
			CHECK_INT(c.done, 1);
		}
	}
}

/* Extensions and trailers of a request are bounded, in all; data is not. */
static void test_chunked_bounded(void)
{
	static const char *const starts[] = { "5;", "5 ", "0\r\na:" };
	struct chunked c;
	size_t i, n, took;
	int kept;

	for (i = 0; i < COUNT(starts); i++) {
		memset(&c, 0, sizeof c);
		for (n = 0; n < strlen(starts[i]); n += took)
			took = chunked_scan(&c, starts[i] + n, strlen(starts[i]) - n, &kept);
		for (n = 0; n < 2 * head_max && !c.bad; n++)
			chunked_scan(&c, " ", 1, &kept);
		CHECK_INT(c.bad, 1);
		CHECK(n <= head_max && n >= head_max - 3);
	}
}

/* ---- accept_key ---- */

static void test_accept_key(void)
{
	struct guard key = { 0 };
	char out[29];

	memset(out, 'x', sizeof out);
	accept_key(guard_copy(&key, KEY, 24), out);             /* the example of 6455 1.3 */
	CHECK_BYTES(out, 29, ACCEPT, 29);
	accept_key(guard_copy(&key, "x3JJHMbDL1EzLkh9GBhXDw==", 24), out);
	CHECK_BYTES(out, 29, "HSmrc0sMlYUkAGmm5OPpG2HaGWk=", 29);
	accept_key(guard_copy(&key, "AAAAAAAAAAAAAAAAAAAAAA==", 24), out);
	CHECK_BYTES(out, 29, "ICX+Yqv66kxgM0FcWaLWlFLwTAI=", 29);
}
