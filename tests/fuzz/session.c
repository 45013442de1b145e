/* session.c - fuzzes whole sessions: the real loop() of wssproxy over socketpairs, with clients and
 * backends that do what the input says (peers.h). The first byte chooses configuration, the second
 * the end; then come operations, a byte and what it takes. They go on while the proxy sleeps, and
 * where the input says so while it is busy. Compiled with TLS, clients speak TLS as well.
 *
 * What must hold, whatever they do:
 * - a backend gets the rendering of a request that was accepted, what the client sent behind it as
 *   far as the request's length or chunks or a verified 101 allow, and nothing else; behind an answer
 *   that has an end and does not say that it is the last, another backend gets the next request;
 * - a client gets the rendering of its backend's answer and what came behind, as far as the answer
 *   goes, or an answer of the proxy's own, and nothing else, but for the answer to its next request;
 * - but frames of the proxy's own in tunnels: Pings, and one Close, between frames;
 * - while no time passes and no one goes, all of that arrives;
 * - nobody is told of what is there and then leaves it alone: none sleeps while what it waits for is there;
 * - when its peers are gone, or time passes, every session ends, and gives back all it had. */
#define PING_MS         20000
#define MAX_AGE_MS      200000
#include "peers.h"
#include "../frames.h"

#ifndef TLS
#define TLS 0
#endif

#define LIT(s)  (s), sizeof(s) - 1
#define KEYED   "Connection: Upgrade\r\nUpgrade: websocket\r\n" \
	"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"

static struct input script;
static int clients[PEERS], dialled[PEERS];
static unsigned clients_len, dialled_len;
static int timed;               /* time has passed, or the proxy was told to end */
static int settle;              /* all read and wait until nothing moves */
static int expire;              /* the next sleep lasts to its end */
static unsigned phase, ending;
static unsigned turns_idle, turns_zero, turns_expired;
static int last_ready, last_ms, last_acted;
static unsigned reloads;

enum { SCRIPT, FLUSH, HALF, HALF_FLUSH, GONE, OVER, SLOW, STOP };
enum { END_CLOSE, END_HALF, END_SLOW, END_STOP, ENDINGS };

/* ---- what the sessions should have come to ---- */

struct asked {                  /* a client's request */
	const char *p;          /* in what it sent, */
	size_t size;            /* so many bytes; 0: they are not all there */
	int taken;
	struct request r;
	int is_head, bad;       /* bad: its body is, so that no answer need come, or go on */
	char accept[29];
	char head[HEAD_ROOM];
	size_t len;             /* of head, as backends get it */
};

struct answer {                 /* a backend's */
	int whole;              /* its head is there and good */
	struct response r;
	char head[HEAD_ROOM];
	size_t len;
	size_t body, body_len;  /* where it begins in what was sent, how much of that is its, */
	int ended;              /* up to its end */
};

/* What of a request's body is passed on, as far as it is there and good. */
static struct text body_clean(const struct request *r, const char *p, size_t len, struct chunked *c)
{
	static char clean[STREAM];
	struct text t = { .p = clean, .size = sizeof clean };
	size_t took;
	int kept = 0;

	memset(c, 0, sizeof *c);
	if (!r->chunked) {
		c->done = r->length <= len;
		text_add(&t, p, c->done ? (size_t)r->length : len);
	}
	for (; r->chunked && len > 0 && !c->done && !c->bad; p += took, len -= took) {
		took = chunked_scan(c, p, len, &kept);
		text_add(&t, p, kept ? took : 0);
	}
	return t;
}

/* The request that begins at p. */
static void asked_read(const struct peer *c, const char *p, struct asked *a)
{
	size_t left = (size_t)(c->sent.data + c->sent.len - p);
	struct chunked end;
	struct text body;
	struct forwarded f = { address_format(&c->address, 0),
		c->kind == WSS ? "https" : "http", "" };

	memset(&a->r, 0, sizeof a->r);
	a->p = p;
	a->size = 0;
	a->taken = a->is_head = a->bad = 0;
	if (request_parse(&a->r, p, left) != WHY_NONE)
		return;
	a->is_head = span_is(p, a->r.head.part[0], "head");
	if (request_check(&a->r, p) != WHY_NONE || c->kind == REDIRECT ||
	    (http == REFUSE && !a->r.upgrade))
		return;
	if (a->r.upgrade)
		accept_key(p + a->r.key.at, a->accept);
	a->len = request_render(&a->r, p, &f, a->head, sizeof a->head);
	a->taken = a->len > 0;
	body = body_clean(&a->r, p + a->r.head.size, left - a->r.head.size, &end);
	a->bad = end.bad;
	if (end.done)
		a->size = a->r.head.size + body.len + end.dropped;
}

static void answer_read(const struct peer *b, const struct asked *a, struct answer *n)
{
	const char *p = b->sent.data;
	size_t len = b->sent.len;
	struct chunked c = { 0 };
	unsigned interim = 0;

	n->whole = 0;
	do {
		if (n->body = (size_t)(p - b->sent.data), interim++ > INTERIM_MAX)
			return;
		memset(&n->r, 0, sizeof n->r);
		if (response_parse(&n->r, p, len) != WHY_NONE ||
		    response_check(&n->r, p, a->r.upgrade, a->is_head, a->accept) != WHY_NONE)
			return;
		n->len = response_render(&n->r, p, n->head, sizeof n->head);
		p += n->r.head.size;
		len -= n->r.head.size;
	} while (n->r.status < 200 && n->r.status != 101);
	n->whole = n->len > 0;
	n->body = (size_t)(p - b->sent.data);
	n->body_len = n->r.framing == BODY_LENGTH && n->r.length < len ? (size_t)n->r.length :
		n->r.framing == BODY_CHUNKED ? chunked_scan(&c, p, len, NULL) : len;
	n->ended = n->whole && (n->r.framing == BODY_LENGTH ? n->body_len == n->r.length : c.done);
}

/* The head of an answer as it is if its client's connection is kept. */
static void answer_keep(const struct peer *b, struct answer *n)
{
	const char *p = b->sent.data + n->body - n->r.head.size;

	n->r.keep = 1;
	n->len = response_render(&n->r, p, n->head, sizeof n->head);
}

/* Whether a connection may go on behind it. */
static int may_keep(const struct asked *a, const struct answer *n)
{
	return a->taken && a->size > 0 && !a->r.close && !a->r.upgrade && n->whole &&
		n->r.framing != BODY_EOF && n->r.framing != BODY_TUNNEL;
}

/* The backend that has that request of a client, NULL: none. Dials that came to nothing sent nothing. */
static struct peer *backend_of(const struct peer *c, unsigned request)
{
	struct peer *found = NULL;
	unsigned i;

	for (i = 0; i < peers_len; i++)
		if (peers[i].is_backend && peers[i].owner == (int)(c - peers) &&
		    peers[i].request == request && peers[i].dial == UP)
			found = &peers[i];
	return found;
}

/* The length of a frame of the proxy's own, as far as it is there; 0: it is none. */
static size_t own_length(const unsigned char *p, size_t len, int up)
{
	static const unsigned char ping[] = { 0x89, 0 };
	unsigned char close[8] = { 0x88, up ? 0x82 : 2 };
	const size_t size = up ? 8 : 4, got = len < size ? len : size;
	unsigned code;

	if (!up && memcmp(p, ping, len < 2 ? len : 2) == 0)
		return 2;
	memcpy(close + 2, p + 2, got > 2 ? got - 2 : 0);
	code = up ? (unsigned)((close[6] ^ close[2]) << 8 | (close[7] ^ close[3])) :
		(unsigned)(close[2] << 8 | close[3]);
	return memcmp(p, close, got) != 0 || (len >= size && code != 1001 && code != 1012) ? 0 : size;
}

/* What one side of a tunnel got is what the other sent, and frames of the proxy's own where one may
 * stand. How much of the other's it is. */
static size_t tunnel_must(const char *got, size_t len, const char *sent, size_t sent_len, int up)
{
	const unsigned char *g = (const unsigned char *)got, *p = (const unsigned char *)sent;
	size_t i = 0, own;
	int64_t n;
	int fragmented = 0, over = 0;

	while (len > sent_len - i || memcmp(g, p + i, len) != 0) {
		MUST(!over && len > 0);
		own = own_length(g, len, up);
		if (own > 0 && (own != 2 || i == sent_len || memcmp(g, p + i, 2) != 0)) {
			if (own != 2 || len < 2) {
				MUST(len <= own);       /* nothing behind a Close */
				return i;
			}
			g += own;
			len -= own;
			continue;
		}
		n = frame_length(p + i, sent_len - i, (unsigned)up, fragmented);
		MUST(n > 0 && (size_t)n <= len && memcmp(g, p + i, (size_t)n) == 0);
		over = (p[i] & 15) == 8;
		if ((p[i] & 15) < 8)
			fragmented = !(p[i] & 0x80);
		g += n;
		len -= (size_t)n;
		i += (size_t)n;
	}
	return i + len;
}

static void up_must(const struct peer *b, const struct asked *a, const struct answer *n,
	const struct peer *c)
{
	struct chunked end;
	struct text body;

	if (b->got.len == 0)
		return;
	MUST(a->taken);
	MUST(memcmp(b->got.data, a->head, b->got.len < a->len ? b->got.len : a->len) == 0);
	if (b->got.len <= a->len)
		return;
	body.p = c->sent.data + (a->p - c->sent.data) + a->r.head.size;
	body.len = (size_t)(c->sent.data + c->sent.len - body.p);
	if (a->r.upgrade && n->whole && n->r.status == 101) {
		tunnel_must(b->got.data + a->len, b->got.len - a->len, body.p, body.len, 1);
		return;
	}
	if (!a->r.upgrade)
		body = body_clean(&a->r, body.p, body.len, &end);
	else
		body.len = 0;
	MUST(b->got.len - a->len <= body.len);
	MUST(memcmp(b->got.data + a->len, body.p, b->got.len - a->len) == 0);
}

/* An answer of the proxy's own: a line of text, and nothing behind. One that comes before the request
 * was read has it even for HEAD. */
static void own_must(const struct response *r, const char *p, size_t len)
{
	static const unsigned own[] = { 308, 400, 403, 405, 408, 414, 426, 431, 501, 502, 503,
		504, 505 };
	char text[8];
	unsigned i;

	for (i = 0; i < LENGTH(own) && own[i] != r->status; i++)
		;
	MUST(i < LENGTH(own));
	snprintf(text, sizeof text, "%u ", r->status);
	len -= r->head.size;
	MUST(len < 100 && (r->length == 0 || len <= r->length));
	MUST(memcmp(p + r->head.size, text, len < 4 ? len : 4) == 0);
}

/* Whether the head at p is that of the answer: but for a cookie, it is. */
static int head_is(const char *p, size_t size, const struct answer *n)
{
	static const char cookie[] = "Set-Cookie: wssproxy=";

	return size >= n->len && memcmp(p, n->head, n->len - 2) == 0 && (size == n->len ||
		(balance == STICKY_COOKIE && memcmp(p + n->len - 2, cookie, sizeof cookie - 1) == 0));
}

/* How much of the answer's head and body the client has, 0: another answer, or not even the head. *next:
 * behind its end, if another may follow; NULL. */
static size_t down_must(const struct peer *c, const char *p, const struct asked *a,
	const struct peer *b, struct answer *n, const char **next)
{
	const char *end;
	size_t len = (size_t)(c->got.data + c->got.len - p), size, got;
	struct response r;
	enum why why;

	*next = NULL;
	do {
		memset(&r, 0, sizeof r);
		why = response_parse(&r, p, len);
		if (why == WHY_LARGE_RESPONSE && r.head.nfields == HEAD_FIELDS) {
			/* the proxy's own lines came on top of as many as it takes */
			end = memmem(p, len, "\r\n\r\n", 4);
			MUST(end != NULL);
			size = (size_t)(end + 4 - p);
			break;
		}
		MUST(why == WHY_NONE || why == WHY_MORE);
		if (why == WHY_MORE)
			return 0;
		MUST(response_check(&r, p, a->r.upgrade, a->is_head, a->accept) == WHY_NONE);
		size = r.head.size;
		if (r.status >= 200 || r.status == 101)
			break;
		p += size;
		len -= size;
	} while (1);
	got = len - size;
	if (b && may_keep(a, n) && !head_is(p, size, n)) {
		answer_keep(b, n);
		if (n->ended && got > n->body_len)
			got = n->body_len;
		if (n->ended && got == n->body_len)
			*next = p + size + got;
	}
	if (!b || !n->whole || !head_is(p, size, n)) {
		own_must(&r, p, len);
		*next = NULL;
		return 0;
	}
	if (n->r.status == 101)
		return n->len + tunnel_must(p + size, got, b->sent.data + n->body, n->body_len, 0);
	MUST(got <= n->body_len);
	MUST(memcmp(p + size, b->sent.data + n->body, got) == 0);
	return n->len + got;
}

/* While nobody is gone and no time has passed, nothing stays under way. */
static void arrived_must(const struct peer *c, const struct asked *a, const struct peer *b,
	const struct answer *n, size_t down)
{
	if (!a->taken || a->bad || !b || b->server < 0 || c->wild || b->wild || c->shut || b->shut ||
	    c->far < 0 || b->far < 0 || clients_len > max_busy - max_busy / 4)
		return;
	if (b->eng && !(br_ssl_engine_current_state(b->eng) & (BR_SSL_SENDAPP | BR_SSL_RECVAPP)))
		return;
	if (!b->eof)
		MUST(b->got.len >= a->len);
	if (n->whole)
		MUST(down == n->len + n->body_len);
	if (n->whole && n->r.status == 101)
		MUST(b->got.len == a->len + c->sent.len - (size_t)(a->p - c->sent.data) -
			a->r.head.size);
}

/* What the backends of a client's requests got. A later one has one only where the answer to the one
 * before has an end. */
static void backends_must(const struct peer *c)
{
	static struct asked a;
	static struct answer n;
	const char *p = c->sent.data;
	unsigned request, i;
	int may = 1;

	for (request = 1; may; request++, p += a.size) {
		asked_read(c, p, &a);
		may = 0;
		for (i = 0; i < peers_len; i++) {
			if (!peers[i].is_backend || peers[i].owner != (int)(c - peers) ||
			    peers[i].request != request)
				continue;
			answer_read(&peers[i], &a, &n);
			up_must(&peers[i], &a, &n, c);
			may |= may_keep(&a, &n) && n.ended;
		}
	}
	for (i = 0; i < peers_len; i++)
		MUST(!peers[i].is_backend || peers[i].owner != (int)(c - peers) ||
			peers[i].request < request);
}

/* What a client got, and whether it is all there. */
static void client_must(const struct peer *c, int arrived)
{
	static struct asked a;
	static struct answer n;
	const char *p = c->sent.data, *got = c->got.data;
	const struct peer *b;
	unsigned request;
	size_t down;

	for (request = 1; got; request++, p += a.size) {
		asked_read(c, p, &a);
		b = backend_of(c, request);
		n.whole = 0;
		if (b)
			answer_read(b, &a, &n);
		down = down_must(c, got, &a, b, &n, &got);
		if (arrived)
			arrived_must(c, &a, b, &n, down);
	}
}

static void peers_must(int arrived)
{
	unsigned i;

	for (i = 0; i < peers_len; i++) {
		if (peers[i].is_backend) {
			MUST(peers[i].owner >= 0 || peers[i].got.len == 0);
			continue;
		}
		backends_must(&peers[i]);
		if (peers[i].kind != WSS || peers[i].eng)       /* or records that nobody reads */
			client_must(&peers[i], arrived && !timed);
	}
}

/* ---- operations ---- */

static struct peer *choose(const int *list, unsigned len, unsigned who)
{
	return len > 0 ? &peers[list[(len - 1 + who) % len]] : NULL;
}

#define A10     "aaaaaaaaaa"
#define A100    A10 A10 A10 A10 A10 A10 A10 A10 A10 A10
#define A1000   A100 A100 A100 A100 A100 A100 A100 A100 A100 A100

static const struct { const char *text; size_t len; } requests[] = {
	{ LIT("GET /x HTTP/1.1\r\nHost: a.example\r\n" KEYED "\r\n") },
	{ LIT("GET /chat HTTP/1.1\r\nHost: a.example\r\n" KEYED "\r\n") },
	{ LIT("GET /file?q HTTP/1.1\r\nHost: a.example\r\n" KEYED
		"Origin: https://a.example\r\n\r\nbehind") },
	{ LIT("GET / HTTP/1.1\r\nHost: a.example\r\nCookie: wssproxy=\r\n\r\n") },
	{ LIT("POST /chat/x/y HTTP/1.1\r\nHost: a.example\r\nContent-Length: 10\r\n\r\n01234567") },
	{ LIT("HEAD / HTTP/1.1\r\nHost: a.example\r\n\r\n") },
	{ LIT("POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100000\r\n\r\n") },
	{ LIT("POST /chat HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100000\r\n\r\n") },
	{ LIT("GET /x HTTP/1.1\r\nHost: a.example\r\nSec-WebSocket-Version: 12\r\n" KEYED "\r\nbad") },
	{ LIT("GET /x HTTP/1.1\r\nHost: ") },
	{ LIT("GET /x HTTP/1.1\r\nHost: a\r\nX: ") },
	{ LIT(A1000) },
	{ LIT("\r\n\r\n") },
	{ LIT("GET / HTTP/1.1\r\nHost: a\r\nCookie: a=b; wssproxy=9f686a4e4b5159d4" /* A's */
		"\r\n\r\n") },
	{ LIT("CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n") },
	{ LIT("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n") },
	{ LIT("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n") },
	{ LIT("GET http://b:80?x HTTP/1.1\r\nHost: a:80\r\n\r\n") },
	{ LIT("\x81\x82\1\2\3\4ab\x8a\x80\1\2\3\4") },
	{ LIT("\1\x81\1\2\3\4a") },
	{ LIT("\x80\x80\1\2\3\4") },
	{ LIT("\x82\xfe\1\0\1\2\3\4half") },
	{ LIT("\x88\x82\1\2\3\4\2\xea") },
	{ LIT("5;a=b\r\nhello\r\n") },
	{ LIT("2000 \r\n") },
	{ LIT("\r\n") },
	{ LIT("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n123"
		"GET /3 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /4 HTTP/1.1\r\n") },
	{ LIT("0\r\nA: b\r\n\r\n") },
};

#define GOOD_101 "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" \
	"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

static const struct { const char *text; size_t len; } responses[] = {
	{ LIT(GOOD_101) },
	{ LIT("HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
		"Sec-WebSocket-Accept: x\r\n\r\n") },
	{ LIT("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello") },
	{ LIT("HTTP/1.1 100 Continue\r\n\r\n") },
	{ LIT("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") },
	{ LIT("5\r\nhello\r\n") },
	{ LIT("0\r\n\r\n") },
	{ LIT("HTTP/1.0 404 no\r\n\r\nwithout a length") },
	{ LIT("HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n") },
	{ LIT("HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n") },
	{ LIT("HTTP/1.1 103 a\r\n\r\nHTTP/1.1 103 b\r\n\r\n" GOOD_101 "behind") },
	{ LIT("HTTP/1.1 101 ") },
	{ LIT("HTTP/1.1 200 OK\r\nX: ") },
	{ LIT(A1000) },
	{ LIT("\r\n\r\n") },
	{ LIT("\x81\2ab\x89\0") },
	{ LIT("\1\1a") },
	{ LIT("\x80\0") },
	{ LIT("\x82\x7e\1\0half") },
	{ LIT("\x88\2\3\xe8") },
	{ LIT(GOOD_101 "\x82\1a") },
};

/* Bytes that differ from one place of a stream to the next. */
static void filler_write(struct peer *p, size_t len)
{
	static char text[STREAM + 65536];
	size_t i;

	for (i = 0; text[1] == 0 && i < sizeof text; i++)
		text[i] = (char)hash_mix(i);
	for (i = 0; i < len; i += 16000)
		far_write(p, text + p->sent.len, len - i < 16000 ? len - i : 16000);
}

/* What only TLS can do: ask for another handshake, say that it ends, send records without bytes, or
 * bytes that are no records. */
static void tls_act(struct peer *p, unsigned arg)
{
	const uint8_t *bytes;
	unsigned i;
	size_t len;

	if (!p->eng && (p->is_backend || p->kind != WSS))
		return;
	if (!p->eng || arg % 4 == 3) {
		len = input_bytes(&script, arg / 4, &bytes);
		p->wild |= len > 0;
		if (p->far >= 0 && !p->shut && len > 0)
			(void)!send(p->far, bytes, len, MSG_NOSIGNAL);
		return;
	}
	if (arg % 4 == 0)
		br_ssl_engine_renegotiate(p->eng);
	else if (arg % 4 == 1)
		br_ssl_engine_close(p->eng);
	for (i = 0; arg % 4 == 2 && i < 8 * (arg / 4); i++) {
		br_ssl_engine_flush(p->eng, 1);
		far_pump(p, SIZE_MAX);
		p->wild |= p->empty_records++ > FLOOD_RECORDS / 2;
	}
	p->wild |= arg % 4 != 2;
	far_pump(p, SIZE_MAX);
}

/* The same operations for both sides. */
static void peer_act(struct peer *p, unsigned what, unsigned arg)
{
	const uint8_t *bytes;
	size_t len;

	if (!p)
		return;
	switch (what) {
	case 0:
		len = input_bytes(&script, arg, &bytes);
		far_write(p, bytes, len);
		break;
	case 1:
		if (p->is_backend)
			far_write(p, responses[arg % LENGTH(responses)].text,
				responses[arg % LENGTH(responses)].len);
		else
			far_write(p, requests[arg % LENGTH(requests)].text,
				requests[arg % LENGTH(requests)].len);
		break;
	case 2: filler_write(p, arg * arg); break;
	case 3: far_read(p, arg * arg + 1); break;
	case 4: far_shut(p); break;
	case 5: far_close(p, arg & 1); break;
	case 6: tls_act(p, arg); break;
	case 7:
		if (p->dial == PENDING) {
			p->dial = arg & 1 ? FAILED : UP;
			p->error = arg & 2 ? ETIMEDOUT : ECONNREFUSED;
		}
		break;
	}
}

static void time_act(unsigned arg)
{
	static const unsigned ms[] = { 1, 100, 500, 999, 1000, 3000, 4000, 5000, 9000, 10000, 30000,
		3600000 };

	timed = 1;
	if (arg == 0)
		expire = 1;
	else
		clock_ms += ms[arg % LENGTH(ms)];
}

static void signal_act(unsigned arg)
{
	if (arg == 0)
		signal_send(SIGUSR1);
	else if (arg == 2 && reloads++ == 0)
		signal_send(SIGHUP);
	else if (arg == 1 && !timed)
		timed = 1, signal_send(SIGTERM);
}

/* One operation: low bits what, high bits who. 0: the proxy's turn. */
static int script_act(void)
{
	unsigned op = input_byte(&script), who = op >> 5, arg;
	struct peer *p;

	op &= 31;
	if (op >= 24)
		return op < 28 ? 0 : (settle = 1, 0);
	arg = input_byte(&script);
	TRACE("operation %u by %u, %u\n", op, who, arg);
	switch (op) {
	case 0: case 1:
		if ((p = far_connect(TLS && op == 0 ? 2 : who % (2 + TLS), arg)) != NULL)
			clients[clients_len++] = (int)(p - peers);
		break;
	case 2: case 3: case 4: case 5: case 6: case 7: case 8:
		peer_act(choose(clients, clients_len, who), op - 2, arg);
		break;
	case 9: case 10: case 11: case 12: case 13: case 14: case 15: case 16:
		peer_act(choose(dialled, dialled_len, who), op - 9, arg);
		break;
	case 17: time_act(arg); break;
	case 18: dial_next = (int)arg; break;
	case 19: no_descriptors = arg & 1; break;
	case 20: signal_act(arg); break;
	case 21: small_buffers = (int)arg; break;
	default: settle = 1; break;
	}
	return 1;
}

/* ---- the loop's poll ---- */

static size_t all_read(void)
{
	size_t moved = 0;
	unsigned i;

	for (i = 0; i < peers_len; i++)
		if (peers[i].far >= 0)
			moved += far_read(&peers[i], SIZE_MAX);
	return moved;
}

static void backends_note(void)
{
	unsigned i;

	owners_note();
	for (i = dialled_len ? (unsigned)dialled[dialled_len - 1] + 1 : 0; i < peers_len; i++)
		if (peers[i].is_backend)
			dialled[dialled_len++] = (int)i;
}

/* The proxy sleeps and the script is over: the next step of the end. 0: time passes. */
static int end_act(int ms)
{
	unsigned i;

	switch (phase) {
	case SCRIPT:
		phase = ending == END_SLOW ? SLOW : ending == END_STOP ? STOP : FLUSH;
		no_descriptors = 0;
		for (i = 0; i < peers_len && phase == FLUSH; i++)
			if (peers[i].dial == PENDING)
				peers[i].dial = UP;
		dial_next = DIAL_UP;
		return 1;
	case FLUSH:
		if (all_read() > 0)
			return 1;
		peers_must(1);
		phase = ending == END_HALF ? HALF : GONE;
		return 1;
	case HALF:
		for (i = 0; i < clients_len; i++)
			far_shut(&peers[clients[i]]);
		phase = HALF_FLUSH;
		return 1;
	case HALF_FLUSH:
		if (all_read() > 0)
			return 1;
		phase = GONE;
		return 1;
	case GONE:
		for (i = 0; i < peers_len; i++)
			far_close(&peers[i], 1);
		phase = OVER;
		return 1;
	case OVER:
		MUST(sessions_open() == 0);
		phase = STOP;
		return 1;
	case SLOW:
		if (sessions_open() == 0) {
			phase = STOP;
			return 1;
		}
		MUST(ms > 0 && ++turns_expired < 10000);
		timed = 1;
		clock_ms += (uint64_t)ms;
		return 0;
	default:
		signal_send(SIGINT);
		signal_send(SIGINT);
		return 1;
	}
}

static void turn_must(void)
{
	turns_idle = last_ready > 0 && last_ms != 0 && !last_acted && progress == 0 ?
		turns_idle + 1 : 0;
	turns_zero = last_ms == 0 && !last_acted && progress == 0 ? turns_zero + 1 : 0;
	MUST(turns_idle < 10 && turns_zero < 20000);
	progress = 0;
	last_acted = 0;
}

static int is_waiting(const struct session *s, const struct link *list)
{
	const struct link *l = list->next;

	while (l != list && l != &s->wait)
		l = l->next;
	return l == &s->wait;
}

/* What a session that waits for a peer holds is what can't be put down: bytes that a socket did not take,
 * plaintext that the other side did not, a record that came in pieces, though no handshake's; a verifier
 * that has begun, a long head. 1: it holds record buffers for a record in pieces. */
static int holder_must(const struct session *s)
{
	const struct leg *l, *legs[] = { &s->client, &s->backend };
	int i, held = 0, ends = 0;
	size_t n;

	for (i = 0; i < 2 && s->rec; i++) {
		l = legs[i];
		held |= leg_pending(l, &n) || leg_readable(l, &n) || l->at < l->end || l->spare;
		ends |= l->eof || l->fin || (l->fd >= 0 && is_shut(l->fd));
	}
	MUST(!hd);
	MUST(!s->shelf || head_len(s) > NOTE_TEXT || s->shelf->verifier.begun || s->rec);
	MUST(!s->rec || held || ends || (s->state != HANDSHAKE && s->state != BACKEND_HANDSHAKE));
	return s->rec && !held && !ends;
}

/* Whether what a side sends would have to wait, for the other takes nothing. */
static int leg_dammed(const struct session *s, const struct leg *l)
{
	const struct leg *to = l == &s->client ? &s->backend : &s->client;

	return to->full && !to->fin && (l == &s->backend || !s->body.done);
}

/* What a leg would be polled for, if it were polled. One with buffers reads when all before was taken; an
 * engine that was closed, or that nobody listens to, may want no more records, but its end is awaited. */
static unsigned leg_wish(const struct session *s, const struct leg *l)
{
	unsigned state = l->eng ? br_ssl_engine_current_state(l->eng) : BR_SSL_RECVREC;
	int in = !l->eof && !leg_dammed(s, l) && !(l == &s->client && s->state == EXCHANGE && s->keep);
	size_t len;

	if (l->buf)
		in = in && l->at == l->end && ((state & BR_SSL_RECVREC) ||
			(l->fin && !(state & BR_SSL_RECVAPP)));
	return (in ? POLLIN : 0u) | (!l->fin && (l->full || leg_pending(l, &len)) ? POLLOUT : 0u);
}

static unsigned client_wish(const struct session *s)
{
	if (is_watched(s))
		return POLLRDHUP | (s->client.full ? POLLOUT : 0u);
	return s->state == HANDSHAKE && !s->client.eng ? POLLIN : leg_wish(s, &s->client);
}

static unsigned backend_wish(const struct session *s)
{
	const struct leg *l = &s->backend;
	size_t len;
	int in, out;

	if (s->state == CONNECT || s->state == REQUEST)
		return POLLOUT;
	if (l->eng)
		return leg_wish(s, l);
	in = !l->eof && !leg_dammed(s, l) && (s->state == RESPONSE || s->client.fin || !s->rec ||
		(head_len(s) == 0 && leg_room(&s->client, &len)));
	out = !l->fin && (l->full || (!s->body.done && leg_readable(&s->client, &len)));
	return (in ? POLLIN : 0u) | (out ? POLLOUT : 0u);
}

/* While the proxy sleeps: each session waits for a buffer, or for something that is not so, and nothing
 * is so that it has not been told of. */
static void sleepers_must(void)
{
	unsigned i, holders = 0, waiters = 0, pieces = 0;

	for (i = 0; i < max_sessions; i++) {
		const struct session *s = &sessions[i];

		if (s->state == FREE)
			continue;
		if (!link_alone(&s->wait)) {
			MUST(is_waiting(s, &shelf_pool.waiters) || is_waiting(s, &records_pool.waiters));
			waiters++;
			continue;
		}
		MUST(!(fd_is(s->client.fd) & client_wish(s)));
		if (s->backend.fd >= 0)
			MUST(!(fd_is(s->backend.fd) & backend_wish(s)));
		holders += s->rec || s->shelf;
		pieces += (unsigned)holder_must(s);
	}
	MUST(waiters == 0 || holders > 0);
	MUST(pieces <= max_busy / 2);
}

static int world_poll(struct pollfd *p, nfds_t n, int ms)
{
	const uint64_t start = clock_ms;
	int ready;

	if (n == 1 && p->fd == LOG_FD) {
		p->revents = POLLOUT;
		return 1;
	}
	if (n == 1)
		return sockets_poll(p, n);
	turn_must();
	backends_note();
	for (;;) {
		while (!settle && script.len > 0 && script_act())
			last_acted = 1;
		ready = sockets_poll(p, n);
		if (ready > 0 || ms == 0 || (ms > 0 && clock_ms - start >= (uint64_t)ms))
			break;
		sleepers_must();
		if (settle) {
			settle = all_read() > 0;
			last_acted = 1;
		} else if (expire && ms > 0) {
			expire = 0;
			clock_ms = start + (uint64_t)ms;
			break;
		} else if (script.len > 0) {
			expire = 0;
		} else if (last_acted = 1, !end_act(ms)) {
			break;
		}
	}
	for (nfds_t i = 0; trace && i < n; i++)
		if (p[i].revents)
			TRACE("\t%d: %x of %x\n", peer_of[p[i].fd], (unsigned)p[i].revents,
				(unsigned)p[i].events);
	TRACE("turn at %llu: %d ready of %d ms, end %u\n", (unsigned long long)clock_ms, ready, ms,
		phase);
	last_ready = ready;
	last_ms = ms;
	return ready;
}

/* ---- one input ---- */

static void play(const uint8_t *data, size_t size)
{
	unsigned config;

	script = (struct input){ data, size };
	config = input_byte(&script);
	ending = input_byte(&script) % ENDINGS;
	balance = (enum balance)(config & 3);
	http = config & 4 ? REFUSE : FORWARD;
	x_forwarded_for = (enum x_forwarded_for)((config >> 3 & 3) % 3);
	origins[0] = config & 32 ? "same" : NULL;
	clients_len = dialled_len = 0;
	timed = settle = expire = last_ready = last_ms = last_acted = 0;
	phase = SCRIPT;
	turns_idle = turns_zero = turns_expired = reloads = 0;
	world_open();
	small_buffers = config >> 6;
	loop();
	sessions_end();
	all_read();
	peers_must(0);
	proxy_must_rest();
	world_end();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	/* a client with TLS asks a backend with TLS: both sessions can be resumed from now on */
	static const uint8_t first_words[] = { 0, END_CLOSE, 0, 16 * 4, 22, 0, 3, 1, 22, 0,
		10, 0, 22, 0 };

	(void)argc;
	(void)argv;
	signal(SIGPIPE, SIG_IGN);
	proxy_start();
	if (TLS) {
		play(first_words, sizeof first_words);
		br_ssl_engine_get_session_parameters(peers[0].eng, &resumable);
		MUST(resumable.session_id_len > 0 && servers[CHAT].session_until > 0);
		proxy_save();
	}
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	play(data, size);
	return 0;
}
