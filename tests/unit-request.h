/* unit-request.h - request_parse, request_check, request_render. What is expected is read off
 * RFC 9110, 9112, 3986 and 6455, and the design's section HTTP, not off the code. */

#define LIT(s)  (s), sizeof(s) - 1

#define KEY     "dGhlIHNhbXBsZSBub25jZQ=="
#define GET     "GET / HTTP/1.1\r\n"
#define HOST    "Host: a.example\r\n"
#define ASK     "Connection: Upgrade\r\nUpgrade: websocket\r\n"
#define KEYED   "Sec-WebSocket-Key: " KEY "\r\n"
#define V13     "Sec-WebSocket-Version: 13\r\n"
#define UPGRADE GET HOST ASK KEYED V13
#define END     "\r\n"
#define REST    HOST KEYED V13

struct request_case {
	int line;
	const char *in;
	size_t len;
	enum why why, or;           /* `or`: what a reader of the same sentence may choose as well */
	int upgrade;                /* these if good; NULL: not looked at */
	const char *target, *host;
	uint64_t length;
};

#define BAD(s, w)            { __LINE__, LIT(s), w, w, 0, NULL, NULL, 0 }
#define BAD2(s, w, o)        { __LINE__, LIT(s), w, o, 0, NULL, NULL, 0 }
#define GOOD(s, u, t, h, n)  { __LINE__, LIT(s), WHY_NONE, WHY_NONE, u, t, h, n }
#define PLAIN(s)             GOOD(s, 0, NULL, NULL, 0)
#define SOCKET(s)            GOOD(s, 1, NULL, NULL, 0)
#define SHORT(s)             BAD(s, WHY_MORE)

static const struct request_case request_lines[] = {
	/* not all there */
	SHORT(""),
	SHORT("G"),
	SHORT("GET / HTTP/1.1"),
	SHORT("GET / HTTP/1.1\r"),
	SHORT("GET / HTTP/1.1\r\n"),
	SHORT("GET / HTTP/1.1\r\nHost: a.example"),
	SHORT("GET / HTTP/1.1\r\nHost: a.example\r"),
	SHORT("GET / HTTP/1.1\r\nHost: a.example\r\n"),
	SHORT("GET / HTTP/1.1\r\nHost: a.example\r\n\r"),

	/* the shortest, and each good target */
	GOOD(GET HOST END, 0, "/", "a.example", 0),
	GOOD("GET /chat HTTP/1.1\r\n" HOST END, 0, "/chat", "a.example", 0),
	GOOD("GET /a/b?c=d&e HTTP/1.1\r\n" HOST END, 0, "/a/b?c=d&e", "a.example", 0),
	GOOD("GET //double/ HTTP/1.1\r\n" HOST END, 0, "//double/", "a.example", 0),
	GOOD("GET /? HTTP/1.1\r\n" HOST END, 0, "/?", "a.example", 0),
	GOOD("GET /%20%7e;v=1,2/@:!$&'()*+= HTTP/1.1\r\n" HOST END, 0,
		"/%20%7e;v=1,2/@:!$&'()*+=", "a.example", 0),
	/* no URI, but what browsers put there all the same */
	GOOD("GET /x?a={b}|[c] HTTP/1.1\r\n" HOST END, 0, "/x?a={b}|[c]", "a.example", 0),
	GOOD("GET /x?http://b.example/y HTTP/1.1\r\n" HOST END, 0, "/x?http://b.example/y", "a.example", 0),
	GOOD("OPTIONS * HTTP/1.1\r\n" HOST END, 0, "*", "a.example", 0),
	GOOD("OPTIONS /x HTTP/1.1\r\n" HOST END, 0, "/x", "a.example", 0),
	PLAIN("HEAD / HTTP/1.1\r\n" HOST END),
	PLAIN("POST / HTTP/1.1\r\n" HOST END),
	PLAIN("get / HTTP/1.1\r\n" HOST END),   /* another method: case counts (9110 9.1) */
	PLAIN("!#$%&'*+-.^_`|~09azAZ / HTTP/1.1\r\n" HOST END),

	/* absolute-form: Host is the target's */
	GOOD("GET http://b.example/x?y HTTP/1.1\r\n" HOST END, 0, "/x?y", "b.example", 0),
	GOOD("GET http://b.example:8080/ HTTP/1.1\r\n" HOST END, 0, "/", "b.example:8080", 0),
	GOOD("GET https://b.example/x HTTP/1.1\r\n" HOST END, 0, "/x", "b.example", 0),
	GOOD("GET HTTP://b.example/x HTTP/1.1\r\n" HOST END, 0, "/x", "b.example", 0),
	GOOD("GET http://[2001:db8::1]:80/x HTTP/1.1\r\n" HOST END, 0, "/x", "[2001:db8::1]:80", 0),
	GOOD("GET http://b.example HTTP/1.1\r\n" HOST END, 0, NULL, "b.example", 0),
	GOOD("GET http://b.example?y/z HTTP/1.1\r\n" HOST END, 0, NULL, "b.example", 0),
	GOOD("GET http://b.example/x HTTP/1.1\r\n" HOST ASK KEYED V13 END, 1, "/x", "b.example", 0),
	BAD2("GET http:///x HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://:80/x HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://user@b.example/ HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://u:p@b.example/ HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://b.example:x/ HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://b.example\\x/ HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://b.example:80:81/ HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://[::1/x HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD2("GET http://b.example#f HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_HOST),
	BAD("GET http:/b.example/x HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET http:b.example HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET :// HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET ://b.example/ HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET 1http://b.example/ HTTP/1.1\r\n" HOST END, WHY_TARGET),
	/* a Host is needed all the same, and a good one (9112 3.2) */
	BAD("GET http://b.example/x HTTP/1.1\r\n" END, WHY_HOST),
	BAD("GET http://b.example/x HTTP/1.1\r\n" HOST HOST END, WHY_HOST),
	BAD("GET http://b.example/x HTTP/1.1\r\nHost: a b\r\n" END, WHY_HOST),

	/* bad targets */
	BAD("GET chat HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET ?x HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET a.example:80 HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET * HTTP/1.1\r\n" HOST END, WHY_TARGET),         /* OPTIONS only (9112 3.2.4) */
	BAD("OPTIONS *x HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD("GET /x#fragment HTTP/1.1\r\n" HOST END, WHY_TARGET),
	BAD2("GET /\x80 HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /\xc3\xa4 HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /\x7f HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /\x01 HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /a\tb HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /a\0b HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),
	BAD2("GET /a\rb HTTP/1.1\r\n" HOST END, WHY_TARGET, WHY_REQUEST_LINE),

	/* CONNECT, in any form */
	BAD("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n" END, WHY_METHOD),
	BAD("CONNECT / HTTP/1.1\r\n" HOST END, WHY_METHOD),
	BAD2("CONNECT a.example:443 HTTP/1.0\r\n" END, WHY_METHOD, WHY_HTTP_VERSION),

	/* versions */
	BAD("GET / HTTP/1.0\r\n" HOST END, WHY_HTTP_VERSION),
	BAD("GET / HTTP/1.2\r\n" HOST END, WHY_HTTP_VERSION),
	BAD("GET / HTTP/0.9\r\n" HOST END, WHY_HTTP_VERSION),
	BAD("GET / HTTP/2.0\r\n" HOST END, WHY_HTTP_VERSION),
	BAD("GET / HTTP/3.0\r\n" HOST END, WHY_HTTP_VERSION),
	BAD("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", WHY_HTTP_VERSION),
	BAD("GET / HTTP/1.0\r\n" HOST ASK KEYED V13 END, WHY_HTTP_VERSION),
	BAD("GET / HTTP/1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/2\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/1.\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/1.10\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/11.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/1,1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/x.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP 1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / http/1.1\r\n" HOST END, WHY_REQUEST_LINE),   /* case counts (9112 2.3) */
	BAD("GET / HTTPS/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/1.1x\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / ICY/1.1\r\n" HOST END, WHY_REQUEST_LINE),

	/* not method SP target SP version CRLF */
	BAD("GET /\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD2("GET  HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD(" / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD(" GET / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD2("GET  / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD2("GET /  HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD2("GET /a b HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD("GET / HTTP/1.1 \r\n" HOST END, WHY_REQUEST_LINE),
	BAD("GET / HTTP/1.1\t\r\n" HOST END, WHY_REQUEST_LINE),
	BAD2("GET\t/ HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD2("GET /\tHTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_TARGET),
	BAD("G(T / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("G\xc3\xa4T / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD2("G\0T / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE, WHY_FIELD),
	BAD("GET: / HTTP/1.1\r\n" HOST END, WHY_REQUEST_LINE),
	BAD("\x16\x03\x01\x02\r\n\r\n", WHY_REQUEST_LINE),
	/* one empty line before it may be skipped (9112 2.2), but two heads' worth never */
	BAD2("\r\n" GET HOST END, WHY_REQUEST_LINE, WHY_NONE),
	BAD("\r\n\r\n\r\n\r\n" GET HOST END, WHY_REQUEST_LINE),
	/* CRLF and nothing else ends a line */
	BAD2("GET / HTTP/1.1\n" HOST END, WHY_REQUEST_LINE, WHY_FIELD),
	BAD2("GET / HTTP/1.1\nHost: a\n\n", WHY_REQUEST_LINE, WHY_FIELD),
	BAD2("GET / HTTP/1.1\r" HOST END, WHY_REQUEST_LINE, WHY_FIELD),
	BAD2("GET / HTTP/1.1\r\r\n" HOST END, WHY_REQUEST_LINE, WHY_FIELD),
	BAD2("\n" GET HOST END, WHY_REQUEST_LINE, WHY_FIELD),
};

static const struct request_case request_fields[] = {
	/* good lines */
	PLAIN(GET HOST "A:\r\n" END),
	PLAIN(GET HOST "A: \t \r\n" END),
	PLAIN(GET HOST "A:b\r\n" END),
	PLAIN(GET HOST "A:\t b \t\r\n" END),
	PLAIN(GET HOST "A: b\tc  d\r\n" END),
	PLAIN(GET HOST "A: :b:c:\r\n" END),
	PLAIN(GET HOST "A: \x80\xff\xc3\xa4\r\n" END),
	PLAIN(GET HOST "A: \"(<>)[]{}\\,;=?/@~^`|\r\n" END),
	PLAIN(GET HOST "!#$%&'*+-.^_`|~09azAZ: b\r\n" END),
	PLAIN(GET HOST "a: b\r\na: b\r\nA: c\r\n" END),
	GOOD(GET "hOST:a.example\r\n" END, 0, "/", "a.example", 0),
	GOOD(GET "A: b\r\nHost: \t a.example \t\r\n" END, 0, "/", "a.example", 0),

	/* bad names */
	BAD(GET HOST "A : b\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\t: b\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\r\n" END, WHY_FIELD),
	BAD(GET HOST ": b\r\n" END, WHY_FIELD),
	BAD(GET HOST ":\r\n" END, WHY_FIELD),
	BAD(GET HOST "A B: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A(: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A@: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A/: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\\: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A[: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A{: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\": c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A;: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A,: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A=: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\x7f: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\x80: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\xff: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\x01: c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A\0B: c\r\n" END, WHY_FIELD),
	BAD(GET "Host : a.example\r\n" END, WHY_FIELD),
	BAD(GET HOST "GET / HTTP/1.1\r\n" HOST END, WHY_FIELD),

	/* folding, and white space before the first line */
	BAD(GET HOST "A: b\r\n c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\n\tc\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\n \r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\n c: d\r\n" END, WHY_FIELD),
	BAD(GET " " HOST END, WHY_FIELD),
	BAD(GET " \r\n" HOST END, WHY_FIELD),
	BAD(GET "\t" HOST END, WHY_FIELD),

	/* control bytes, each of them */
	BAD(GET HOST "A: \0\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\0c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x01\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x08" "c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x0b" "c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A:\x0c" "c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x1b[0mc\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x1f" "c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\x7f" "c\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\rc\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: \r\r\n" END, WHY_FIELD),
	BAD(GET HOST "A:\r\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\nC: d\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\n\n", WHY_FIELD),
	BAD(GET HOST "\n", WHY_FIELD),
	BAD(GET HOST "\rA: b\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\r\n\r\r\n", WHY_FIELD),
	BAD(GET HOST "A: b\rTransfer-Encoding: chunked\r\n" END, WHY_FIELD),
	BAD(GET HOST "A: b\nTransfer-Encoding: chunked\r\n" END, WHY_FIELD),
};

static const struct request_case request_hosts[] = {
	GOOD(GET "Host: a\r\n" END, 0, "/", "a", 0),
	GOOD(GET "Host: a.example:8443\r\n" END, 0, "/", "a.example:8443", 0),
	GOOD(GET "Host: a.example:\r\n" END, 0, "/", "a.example:", 0),  /* port may be empty (3986) */
	GOOD(GET "Host: A.Example.\r\n" END, 0, "/", "A.Example.", 0),
	GOOD(GET "Host: a_b-c.example\r\n" END, 0, "/", "a_b-c.example", 0),
	GOOD(GET "Host: 192.0.2.1:80\r\n" END, 0, "/", "192.0.2.1:80", 0),
	GOOD(GET "Host: [2001:db8::1]\r\n" END, 0, "/", "[2001:db8::1]", 0),
	GOOD(GET "Host: [::ffff:192.0.2.1]:443\r\n" END, 0, "/", "[::ffff:192.0.2.1]:443", 0),
	GOOD(GET "Host: xn--nxasmq6b\r\n" END, 0, "/", "xn--nxasmq6b", 0),
	BAD(GET END, WHY_HOST),
	BAD(GET "A: b\r\n" END, WHY_HOST),
	BAD(GET "Host:\r\n" END, WHY_HOST),             /* http:/// names no one (9110 4.2.1) */
	BAD(GET "Host: \t\r\n" END, WHY_HOST),
	BAD(GET "Host: :80\r\n" END, WHY_HOST),
	BAD(GET HOST HOST END, WHY_HOST),
	BAD(GET HOST "Host: b.example\r\n" END, WHY_HOST),
	BAD(GET HOST "A: b\r\nhost:\r\n" END, WHY_HOST),
	BAD(GET "Host: a b\r\n" END, WHY_HOST),
	BAD(GET "Host: a, b\r\n" END, WHY_HOST),
	BAD(GET "Host: a\tb\r\n" END, WHY_HOST),
	BAD(GET "Host: a/b\r\n" END, WHY_HOST),
	BAD(GET "Host: a?b\r\n" END, WHY_HOST),
	BAD(GET "Host: a#b\r\n" END, WHY_HOST),
	BAD(GET "Host: user@a\r\n" END, WHY_HOST),
	BAD(GET "Host: http://a/\r\n" END, WHY_HOST),
	BAD(GET "Host: a\\b\r\n" END, WHY_HOST),
	BAD(GET "Host: a<b\r\n" END, WHY_HOST),
	BAD(GET "Host: \"a\"\r\n" END, WHY_HOST),
	BAD(GET "Host: a\x80\r\n" END, WHY_HOST),
	BAD(GET "Host: a:b\r\n" END, WHY_HOST),
	BAD(GET "Host: a:80:90\r\n" END, WHY_HOST),
	BAD(GET "Host: a:-1\r\n" END, WHY_HOST),
	BAD(GET "Host: a:80 \t x\r\n" END, WHY_HOST),
	BAD(GET "Host: ::1\r\n" END, WHY_HOST),
	BAD(GET "Host: [::1\r\n" END, WHY_HOST),
	BAD(GET "Host: [\r\n" END, WHY_HOST),
	BAD(GET "Host: []\r\n" END, WHY_HOST),
	BAD(GET "Host: [::1]x\r\n" END, WHY_HOST),
	BAD(GET "Host: [::1]:x\r\n" END, WHY_HOST),
	BAD(GET "Host: [::1]]\r\n" END, WHY_HOST),
	BAD(GET "Host: ::1]\r\n" END, WHY_HOST),
	BAD(GET "Host: a[::1]\r\n" END, WHY_HOST),
	BAD(GET "Host: [a/b]\r\n" END, WHY_HOST),
	/* an upgrade is no excuse */
	BAD(GET ASK KEYED V13 END, WHY_HOST),
	BAD(UPGRADE HOST END, WHY_HOST),
};

#define POST    "POST /x HTTP/1.1\r\n" HOST
#define CL      "Content-Length: "
#define TE      "Transfer-Encoding: "

static const struct request_case request_bodies[] = {
	GOOD(POST CL "0\r\n" END, 0, "/x", NULL, 0),
	GOOD(POST CL "5\r\n" END, 0, "/x", NULL, 5),
	GOOD(POST CL "5\r\n" END "hello", 0, "/x", NULL, 5),
	GOOD(POST CL "5\r\n" END "hello, world", 0, "/x", NULL, 5),
	GOOD(POST "content-LENGTH:\t5 \r\n" END, 0, "/x", NULL, 5),
	GOOD(POST CL "007\r\n" END, 0, "/x", NULL, 7),
	GOOD(POST CL "4294967296\r\n" END, 0, "/x", NULL, 4294967296u),
	GOOD(POST CL "100000000000000000\r\n" END, 0, "/x", NULL, 100000000000000000u),
	GOOD(GET HOST CL "5\r\n" END, 0, "/", NULL, 5),
	BAD(POST CL "18446744073709551616\r\n" END, WHY_FRAMING),
	BAD(POST CL "18446744073709551621\r\n" END, WHY_FRAMING),
	BAD(POST CL "99999999999999999999999\r\n" END, WHY_FRAMING),
	BAD(POST CL "184467440737095516160\r\n" END, WHY_FRAMING),
	BAD(POST CL "\r\n" END, WHY_FRAMING),
	BAD(POST CL "+5\r\n" END, WHY_FRAMING),
	BAD(POST CL "-5\r\n" END, WHY_FRAMING),
	BAD(POST CL "5a\r\n" END, WHY_FRAMING),
	BAD(POST CL "a\r\n" END, WHY_FRAMING),
	BAD(POST CL "0x5\r\n" END, WHY_FRAMING),
	BAD(POST CL "5.0\r\n" END, WHY_FRAMING),
	BAD(POST CL "5 5\r\n" END, WHY_FRAMING),
	BAD(POST CL "\"5\"\r\n" END, WHY_FRAMING),
	BAD(POST CL "\xb2\r\n" END, WHY_FRAMING),
	BAD(POST CL "5, 6\r\n" END, WHY_FRAMING),
	BAD(POST CL "5,\r\n" END, WHY_FRAMING),
	BAD(POST CL "5\r\n" CL "6\r\n" END, WHY_FRAMING),
	BAD(POST CL "0\r\n" CL "6\r\n" END, WHY_FRAMING),
	BAD(POST CL "6\r\n" CL "0\r\n" END, WHY_FRAMING),
	BAD(POST CL "5\r\n" CL "\r\n" END, WHY_FRAMING),
	/* more than anyone will ever send, though 64 bits hold it */
	{ __LINE__, LIT(POST CL "9223372036854775807\r\n" END), WHY_NONE, WHY_FRAMING, 0, "/x", NULL, INT64_MAX },
	{ __LINE__, LIT(POST CL "00000000000000000000000000007\r\n" END), WHY_NONE, WHY_FRAMING, 0, "/x", NULL, 7 },
	/* the same twice may be made one (9110 8.6); request_render_body sees to the rest */
	{ __LINE__, LIT(POST CL "5\r\n" CL "5\r\n" END), WHY_NONE, WHY_FRAMING, 0, "/x", NULL, 5 },
	{ __LINE__, LIT(POST CL "5, 5\r\n" END), WHY_NONE, WHY_FRAMING, 0, "/x", NULL, 5 },

	GOOD(POST TE "chunked\r\n" END, 0, "/x", NULL, 0),
	GOOD(POST TE "chunked\r\n" END "0\r\n\r\n", 0, "/x", NULL, 0),
	GOOD(POST "transfer-encoding:\tCHUNKED \r\n" END, 0, "/x", NULL, 0),
	GOOD(GET HOST TE "chunked\r\n" END, 0, "/", NULL, 0),
	BAD(POST TE "gzip\r\n" END, WHY_CODING),
	BAD(POST TE "identity\r\n" END, WHY_CODING),
	BAD(POST TE "xchunked\r\n" END, WHY_CODING),
	BAD(POST TE "chunkedx\r\n" END, WHY_CODING),
	BAD(POST TE "chunke\r\n" END, WHY_CODING),
	BAD(POST TE "\x0b" "chunked\r\n" END, WHY_FIELD),
	BAD2(POST TE "gzip, chunked\r\n" END, WHY_CODING, WHY_FRAMING),
	BAD2(POST TE "gzip\r\n" TE "chunked\r\n" END, WHY_CODING, WHY_FRAMING),
	BAD2(POST TE "chunked, gzip\r\n" END, WHY_CODING, WHY_FRAMING),
	BAD2(POST TE "chunked\r\n" TE "gzip\r\n" END, WHY_CODING, WHY_FRAMING),
	BAD2(POST TE "\r\n" END, WHY_CODING, WHY_FRAMING),
	BAD(POST CL "5\r\n" TE "chunked\r\n" END, WHY_FRAMING),
	BAD(POST TE "chunked\r\n" CL "5\r\n" END, WHY_FRAMING),
	BAD(POST TE "chunked\r\n" CL "0\r\n" END, WHY_FRAMING),
	BAD2(POST TE "gzip\r\n" CL "5\r\n" END, WHY_FRAMING, WHY_CODING),
	BAD2(POST TE "\r\n" CL "5\r\n" END, WHY_FRAMING, WHY_CODING),
};

static const struct request_case request_upgrades[] = {
	GOOD(UPGRADE END, 1, "/", "a.example", 0),
	GOOD(UPGRADE END "\x81\x85" "frames", 1, "/", "a.example", 0),
	GOOD("GET /chat?room=1 HTTP/1.1\r\n" HOST ASK KEYED V13 END, 1, "/chat?room=1", "a.example", 0),
	SOCKET(GET V13 KEYED "Upgrade: websocket\r\nConnection: Upgrade\r\n" HOST END),
	SOCKET(UPGRADE "Origin: https://a.example\r\nSec-WebSocket-Protocol: chat, superchat\r\n"
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" END),
	/* any case, lists, several lines, empty elements */
	SOCKET(GET HOST KEYED V13 "CONNECTION: UPGRADE\r\nUPGRADE: WEBSOCKET\r\n" END),
	SOCKET(GET HOST KEYED V13 "connection: uPgRaDe\r\nupgrade: WebSocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: Upgrade,keep-alive\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: a ,\tupgrade\t, b\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: ,,upgrade,\r\nUpgrade: , websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: upgrade\r\nConnection: a\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: h2c, websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: websocket, h2c\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n" END),
	SOCKET(GET HOST KEYED V13 "Connection:\r\nConnection: upgrade\r\nUpgrade:websocket\r\n" END),

	/* no upgrade: one of the four is missing */
	PLAIN("POST / HTTP/1.1\r\n" HOST ASK KEYED V13 END),
	PLAIN("get / HTTP/1.1\r\n" HOST ASK KEYED V13 END),
	PLAIN("HEAD / HTTP/1.1\r\n" HOST ASK KEYED V13 END),
	PLAIN(GET HOST KEYED V13 END),
	PLAIN(GET HOST KEYED V13 "Connection: Upgrade\r\n" END),
	PLAIN(GET HOST KEYED V13 "Upgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: keep-alive\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: h2c\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade:\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgraded\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrad\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: no-upgrade\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: \"upgrade\"\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: keep-alive upgrade\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: keep-alive;upgrade\r\nUpgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: websockets\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: web socket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nUpgrade: xwebsocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Connection: upgrade\r\nX-Upgrade: websocket\r\n" END),
	PLAIN(GET HOST KEYED V13 "Proxy-Connection: upgrade\r\nUpgrade: websocket\r\n" END),
	/* and then what only an upgrade must have is not asked for */
	PLAIN(GET HOST "Sec-WebSocket-Key: x\r\n" END),
	PLAIN(GET HOST "Upgrade: websocket\r\nSec-WebSocket-Version: 8\r\n" END),

	/* the key: once, 16 bytes of base64 */
	SOCKET(GET HOST ASK V13 "sec-websocket-key:AAAAAAAAAAAAAAAAAAAAAA==\r\n" END),
	SOCKET(GET HOST ASK V13 "Sec-WebSocket-Key: ++//09azAZ++//09azAZ+w==\r\n" END),
	SOCKET(GET HOST ASK V13 "Sec-WebSocket-Key: \t /////////////////////w== \t\r\n" END),
	BAD(GET HOST ASK V13 END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key:\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: x\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ===\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQA=\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQAA\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZ===\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j====\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBs=SBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: -GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: _GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBs ZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBs\x80SBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: @GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: [GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: {GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: :GhlIHNhbXBsZSBub25jZQ==\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 KEYED KEYED END, WHY_KEY),
	BAD(GET HOST ASK V13 KEYED "Sec-WebSocket-Key:\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: x\r\n" KEYED END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key: " KEY ", " KEY "\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec-WebSocket-Key1: " KEY "\r\n" END, WHY_KEY),
	BAD(GET HOST ASK V13 "Sec_WebSocket_Key: " KEY "\r\n" END, WHY_KEY),

	/* the version */
	SOCKET(GET HOST ASK KEYED "sec-websocket-version:\t13\t\r\n" END),
	BAD(GET HOST ASK KEYED END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version:\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 8\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 14\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 1\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 131\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 013\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 13, 8\r\n" END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED "Sec-WebSocket-Version: 8\r\n" V13 END, WHY_WS_VERSION),
	BAD(GET HOST ASK KEYED V13 "Sec-WebSocket-Version: 8\r\n" END, WHY_WS_VERSION),
	BAD2(GET HOST ASK END, WHY_KEY, WHY_WS_VERSION),

	/* no body */
	SOCKET(UPGRADE CL "0\r\n" END),
	BAD(UPGRADE CL "5\r\n" END, WHY_UPGRADE_BODY),
	BAD(UPGRADE CL "5\r\n" END "hello", WHY_UPGRADE_BODY),
	BAD(UPGRADE TE "chunked\r\n" END, WHY_UPGRADE_BODY),
	BAD2(UPGRADE TE "gzip\r\n" END, WHY_UPGRADE_BODY, WHY_CODING),
	BAD2(UPGRADE CL "0\r\n" CL "5\r\n" END, WHY_FRAMING, WHY_UPGRADE_BODY),
	BAD2(UPGRADE CL "0\r\n" TE "chunked\r\n" END, WHY_FRAMING, WHY_UPGRADE_BODY),
	BAD(UPGRADE CL "x\r\n" END, WHY_FRAMING),
};

/* ---- feeding ---- */

#define CHECK_WHY(got, want) \
	check_why(__FILE__, __LINE__, #got, (got), (want))

static void check_why(const char *file, int line, const char *what, enum why got, enum why want)
{
	if (got != want)
		check_str(file, line, what, whys[got].text, whys[want].text);
}

enum feeding { ONCE, TWICE, BYTES };

static struct guard input;

/* What a connection that delivers the head so ends up with. No caller offers more than head_max
 * bytes: its buffer has no more. Each call sees the bytes somewhere else, before the guard page. */
static enum why request_feed(struct request *r, const char *in, size_t len, enum feeding how,
	size_t cut, const char **buf)
{
	size_t all = len < head_max ? len : head_max;
	size_t n = how == ONCE ? all : how == TWICE ? cut : 0;
	enum why why;

	memset(r, 0, sizeof *r);
	for (;;) {
		*buf = guard_copy(&input, in, n);
		why = request_parse(r, *buf, n);
		if (why != WHY_MORE || n == all)
			break;
		n = how == BYTES ? n + 1 : all;
	}
	return why == WHY_NONE ? request_check(r, *buf) : why;
}

static void check_same_span(const struct span *a, const struct span *b)
{
	CHECK_INT(a->len, b->len);
	if (a->len != 0)
		CHECK_INT(a->at, b->at);
}

static void check_same_head(const struct head *a, const struct head *b)
{
	int i;

	CHECK_INT(a->size, b->size);
	CHECK_INT(a->nfields, b->nfields);
	for (i = 0; i < 3; i++)
		check_same_span(&a->part[i], &b->part[i]);
	for (i = 0; i < a->nfields && i < b->nfields && i < HEAD_FIELDS; i++) {
		check_same_span(&a->field[i].name, &b->field[i].name);
		check_same_span(&a->field[i].value, &b->field[i].value);
	}
}

static void check_same_request(const struct request *a, const struct request *b)
{
	check_same_head(&a->head, &b->head);
	check_same_span(&a->target, &b->target);
	check_same_span(&a->host, &b->host);
	check_same_span(&a->key, &b->key);
	CHECK_INT(a->upgrade, b->upgrade);
	CHECK_INT(a->length, b->length);
}

/* The answer is the same wherever the head was cut, and for one byte at a time. */
static void request_cuts(const struct request *whole, const char *in, size_t len, enum why want)
{
	struct request r;
	const char *buf;
	size_t cut, all = len < head_max ? len : head_max;
	enum why why;

	for (cut = 0; cut <= all; cut++) {
		with("a cut at %zu", cut);
		why = request_feed(&r, in, len, cut < all ? TWICE : BYTES, cut, &buf);
		CHECK_WHY(why, want);
		if (why == WHY_NONE && want == WHY_NONE)
			check_same_request(&r, whole);
	}
}

/* Where the empty line ends. */
static size_t head_end(const char *in, size_t len)
{
	size_t i;

	for (i = 4; i <= len; i++)
		if (memcmp(in + i - 4, "\r\n\r\n", 4) == 0)
			return i;
	return 0;
}

static void request_case_run(const struct request_case *c)
{
	unsigned before = failures;
	struct request r;
	const char *buf;
	enum why why;

	at_input(c->line, c->in, c->len);
	why = request_feed(&r, c->in, c->len, ONCE, 0, &buf);
	if (why != c->or)
		CHECK_WHY(why, c->why);
	if (why == WHY_NONE && c->why == WHY_NONE) {
		CHECK_INT(r.head.size, head_end(c->in, c->len));
		CHECK_INT(r.upgrade, c->upgrade);
		CHECK_INT(r.length, c->length);
		if (c->target != NULL)
			CHECK_BYTES(buf + r.target.at, r.target.len, c->target, strlen(c->target));
		if (c->host != NULL)
			CHECK_BYTES(buf + r.host.at, r.host.len, c->host, strlen(c->host));
		if (c->upgrade)
			CHECK_INT(r.key.len, 24);
	}
	if (failures == before)
		request_cuts(&r, c->in, c->len, why);
}

static void request_table(const struct request_case *c, size_t n)
{
	for (; n != 0; n--, c++)
		request_case_run(c);
}

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static void test_request_line(void)    { request_table(request_lines, COUNT(request_lines)); }
static void test_request_field(void)   { request_table(request_fields, COUNT(request_fields)); }
static void test_request_host(void)    { request_table(request_hosts, COUNT(request_hosts)); }
static void test_request_body(void)    { request_table(request_bodies, COUNT(request_bodies)); }
static void test_request_upgrade(void) { request_table(request_upgrades, COUNT(request_upgrades)); }

/* Every byte in every kind of place: a table of its own would be 1000 lines. */
static void test_request_bytes(void)
{
	static const char token[] = "!#$%&'*+-.^_`|~";
	char in[200];
	struct request r;
	const char *buf;
	int c, n, alnum, visible;

	for (c = 0; c < 256; c++) {
		at("byte 0x%02x", (unsigned)c);
		alnum = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
		visible = c > 0x20 && c < 0x7f;

		with("in a name");
		n = sprintf(in, GET HOST "A%cB: c\r\n\r\n", c);
		CHECK_WHY(request_feed(&r, in, (size_t)n, ONCE, 0, &buf),
			c == ':' || alnum || (c != 0 && strchr(token, c) != NULL) ? WHY_NONE : WHY_FIELD);

		with("in a value");
		n = sprintf(in, GET HOST "A: b%cc\r\n\r\n", c);
		CHECK_WHY(request_feed(&r, in, (size_t)n, ONCE, 0, &buf),
			visible || c == ' ' || c == '\t' || c >= 0x80 ? WHY_NONE : WHY_FIELD);

		with("in the target");
		n = sprintf(in, "GET /a%cb HTTP/1.1\r\n" HOST "\r\n", c);
		if (alnum || (c != 0 && strchr("-._~%!$&'()*+,;=:@/?", c) != NULL))
			CHECK_WHY(request_feed(&r, in, (size_t)n, ONCE, 0, &buf), WHY_NONE);
		else if (!visible || c == '#')
			CHECK(request_feed(&r, in, (size_t)n, ONCE, 0, &buf) != WHY_NONE);

		with("in the method");
		n = sprintf(in, "G%cT / HTTP/1.1\r\n" HOST "\r\n", c);
		CHECK((request_feed(&r, in, (size_t)n, ONCE, 0, &buf) == WHY_NONE) ==
			(alnum || (c != 0 && strchr(token, c) != NULL)));

		with("in the key");
		n = sprintf(in, GET HOST ASK V13 "Sec-WebSocket-Key: dGhlIHNhb%cBsZSBub25jZQ==\r\n\r\n", c);
		CHECK((request_feed(&r, in, (size_t)n, ONCE, 0, &buf) == WHY_NONE) ==
			(alnum || c == '+' || c == '/'));
	}
}

/* ---- limits ---- */

static char large[2 * head_max + 4096];

/* A head of exactly `size` bytes: `start`, then fields, then one that fills it up. */
static size_t head_fill(const char *start, size_t size)
{
	size_t n = (size_t)sprintf(large, "%sX: ", start);

	memset(large + n, 'x', size - n - 4);
	memcpy(large + size - 4, "\r\n\r\n", 4);
	return size;
}

/* A request line of exactly `size` bytes with its CRLF, and a small rest. */
static size_t line_fill(size_t size)
{
	size_t n = (size_t)sprintf(large, "GET /");

	memset(large + n, 'x', size - n);
	memcpy(large + size - 11, " HTTP/1.1\r\n", 11);
	return size + (size_t)sprintf(large + size, HOST END);
}

static void limit_case(size_t len, enum why want)
{
	struct request r;
	const char *buf;

	CHECK_WHY(request_feed(&r, large, len, ONCE, 0, &buf), want);
	request_cuts(&r, large, len, want);
}

static void test_request_limit_head(void)
{
	struct request r;
	const char *buf;

	at("a head of head_max bytes");
	limit_case(head_fill(UPGRADE, head_max), WHY_NONE);
	request_feed(&r, large, head_max, ONCE, 0, &buf);
	CHECK_INT(r.head.size, head_max);
	at("one byte less");
	limit_case(head_fill(UPGRADE, head_max - 1), WHY_NONE);
	at("one byte more");
	limit_case(head_fill(UPGRADE, head_max + 1), WHY_LARGE_HEAD);
	at("twice as much");
	limit_case(head_fill(UPGRADE, 2 * head_max), WHY_LARGE_HEAD);
	at("a good head, and the buffer full of what follows");
	limit_case(head_fill(UPGRADE, 400) + (size_t)(memset(large + 400, 'y', head_max), head_max),
		WHY_NONE);
}

static void test_request_limit_line(void)
{
	size_t n;

	at("a request line that leaves room for the rest");
	limit_case(line_fill(head_max - sizeof(HOST END) + 1), WHY_NONE);
	at("one byte more");
	limit_case(line_fill(head_max - sizeof(HOST END) + 2), WHY_LARGE_HEAD);
	at("a request line of head_max bytes");
	limit_case(line_fill(head_max), WHY_LARGE_HEAD);
	at("one byte more");
	limit_case(line_fill(head_max + 1), WHY_LONG_TARGET);
	at("two bytes more");
	limit_case(line_fill(head_max + 2), WHY_LONG_TARGET);
	at("twice as much");
	limit_case(line_fill(2 * head_max), WHY_LONG_TARGET);

	/* what is wrong with an earlier line is said first, however long the rest */
	at("a bad line, then too much");
	n = head_fill(GET HOST "A : b\r\n", 2 * head_max);
	limit_case(n, WHY_FIELD);
	at("a bad version, then too much");
	n = head_fill("GET / HTTP/2.0\r\n" HOST, 2 * head_max);
	limit_case(n, WHY_HTTP_VERSION);
}

static size_t fields_fill(unsigned n)
{
	size_t len = (size_t)sprintf(large, GET HOST);
	unsigned i;

	for (i = 1; i < n; i++)
		len += (size_t)sprintf(large + len, "A%u: b\r\n", i);
	return len + (size_t)sprintf(large + len, "\r\n");
}

static void test_request_limit_fields(void)
{
	struct request r;
	const char *buf;

	at("HEAD_FIELDS lines");
	limit_case(fields_fill(HEAD_FIELDS), WHY_NONE);
	request_feed(&r, large, fields_fill(HEAD_FIELDS), ONCE, 0, &buf);
	CHECK_INT(r.head.nfields, HEAD_FIELDS);
	at("one more");
	limit_case(fields_fill(HEAD_FIELDS + 1), WHY_LARGE_HEAD);
	at("twice as many");
	limit_case(fields_fill(2 * HEAD_FIELDS), WHY_LARGE_HEAD);
	at("the Host beyond the limit");
	limit_case(fields_fill(HEAD_FIELDS + 1) - 2, WHY_LARGE_HEAD);
}

/* ---- rendering ---- */

#define CLIENT  "192.0.2.9"

static struct guard output;
static char rendered[GUARD_SIZE];

/* Parses, checks and renders; the output ends before a guard page, and each size below what is
 * needed gives 0. The result is in `rendered`, with a NUL behind. */
static size_t request_rendered(const char *in, size_t len, const char *client, const char *proto)
{
	struct forwarded f = { .client = client, .proto = proto };
	struct request r;
	const char *buf;
	size_t n, size;
	enum why why;

	rendered[0] = '\0';
	why = request_feed(&r, in, len, ONCE, 0, &buf);
	CHECK_WHY(why, WHY_NONE);
	if (why != WHY_NONE)
		return 0;
	n = request_render(&r, buf, &f, rendered, sizeof rendered - 1);
	CHECK(n != 0);
	rendered[n] = '\0';
	for (size = 0; size < n; size++) {
		with("%zu bytes for a head of %zu", size, n);
		CHECK_INT(request_render(&r, buf, &f, guard_room(&output, size), size), 0);
	}
	with("exactly %zu bytes", n);
	CHECK_INT(request_render(&r, buf, &f, guard_room(&output, n), n), n);
	CHECK_BYTES(output.end - n, n, rendered, n);
	detail[0] = '\0';
	return n;
}

/* What a strict reader says of a rendered head: lines that end with CRLF and nowhere else, a token
 * and a colon in each but the first. */
static int head_is_clean(const char *s, size_t len)
{
	const char *line = s, *end = s + len, *cr, *p;

	for (; line < end; line = cr + 2) {
		cr = memchr(line, '\r', (size_t)(end - line));
		if (cr == NULL || cr + 1 == end || cr[1] != '\n')
			return 0;
		if (cr == line)
			return cr + 2 == end;
		for (p = line; p < cr; p++)
			if (((unsigned char)*p < 0x20 && *p != '\t') || *p == 0x7f)
				return 0;
		if (line == s)
			continue;
		for (p = line; p < cr && *p != ':'; p++)
			if (!isalnum((unsigned char)*p) && strchr("!#$%&'*+-.^_`|~", *p) == NULL)
				return 0;
		if (p == line || p == cr)
			return 0;
	}
	return 0;
}

static int is_name(const char *line, size_t len, const char *name)
{
	return strlen(name) == len && strncasecmp(line, name, len) == 0;
}

/* Takes the lines of that name out of `rendered`; their values, joined by " | ". */
static const char *take(const char *name)
{
	static char values[5][2048];
	static unsigned turn;
	char *v = values[turn++ % 5], *line, *next, *colon, *p;

	v[0] = '\0';
	for (line = strstr(rendered, "\r\n"); line != NULL && strncmp(line, "\r\n\r\n", 4) != 0;
	    line = next) {
		line += 2;
		next = strstr(line, "\r\n");
		if (next == NULL)
			break;
		colon = memchr(line, ':', (size_t)(next - line));
		if (colon == NULL || !is_name(line, (size_t)(colon - line), name))
			continue;
		for (p = colon + 1; *p == ' ' || *p == '\t'; p++)
			;
		if (v[0] != '\0')
			strcat(v, " | ");
		strncat(v, p, (size_t)(next - p));
		if (p == next && v[0] == '\0')
			strcpy(v, "(empty)");
		memmove(line, next + 2, strlen(next + 2) + 1);
		next = line - 2;
	}
	return v[0] != '\0' ? v : "(none)";
}

/* Renders, and takes what the proxy adds to each upgrade out of it; the rest is in `rendered`. */
static void upgrade_rendered(const char *in, size_t len, const char *x_forwarded_for_wanted)
{
	size_t n = request_rendered(in, len, CLIENT, "https");

	CHECK(head_is_clean(rendered, n));
	CHECK_STR(take("Connection"), "Upgrade");
	CHECK_STR(take("Upgrade"), "websocket");
	CHECK_STR(take("X-Forwarded-For"), x_forwarded_for_wanted);
	CHECK_STR(take("X-Forwarded-Proto"), "https");
	CHECK_STR(take("X-Real-IP"), CLIENT);
}

struct render_case {
	int line;
	const char *in;
	size_t len;
	const char *kept;
	const char *x_forwarded_for;
};

#define RENDER(in, kept, xff)   { __LINE__, LIT(in), kept, xff }

static const struct render_case request_renders[] = {
	/* order and bytes of the rest */
	RENDER(GET HOST ASK KEYED V13 END, GET REST END, CLIENT),
	RENDER(GET V13 KEYED ASK HOST END, GET V13 KEYED HOST END, CLIENT),
	RENDER(GET HOST ASK KEYED V13 END "\x81\x80" "abcd", GET REST END, CLIENT),
	RENDER("GET /a%2Fb/../c?d=%20&e HTTP/1.1\r\n" REST ASK END,
		"GET /a%2Fb/../c?d=%20&e HTTP/1.1\r\n" REST END, CLIENT),
	RENDER(GET REST ASK "b: 2\r\nA: 1\r\nb: 3\r\nCookie: x=\"y\"; z\r\nCookie: w\r\n" END,
		GET REST "b: 2\r\nA: 1\r\nb: 3\r\nCookie: x=\"y\"; z\r\nCookie: w\r\n" END, CLIENT),
	RENDER(GET REST ASK "a: b\tc   d\r\nE: \xc3\xa4\xff\x80\r\n" END,
		GET REST "a: b\tc   d\r\nE: \xc3\xa4\xff\x80\r\n" END, CLIENT),
	RENDER(GET REST ASK "Origin: https://a.example\r\nSec-WebSocket-Protocol: a, b\r\n"
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x\r\n"
		"Sec-WebSocket-Extensions: y\r\nUser-Agent: z (w)\r\nAuthorization: Basic eA==\r\n" END,
		GET REST "Origin: https://a.example\r\nSec-WebSocket-Protocol: a, b\r\n"
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x\r\n"
		"Sec-WebSocket-Extensions: y\r\nUser-Agent: z (w)\r\nAuthorization: Basic eA==\r\n" END,
		CLIENT),
	RENDER(GET "hOsT: A.Example:8443\r\n" KEYED V13 ASK END,
		GET "hOsT: A.Example:8443\r\n" KEYED V13 END, CLIENT),

	/* hop by hop: the known ones, what Connection lists, in any case and several lines */
	RENDER(GET REST ASK "Keep-Alive: 5\r\nProxy-Connection: x\r\nTE: trailers\r\nA: b\r\n" END,
		GET REST "A: b\r\n" END, CLIENT),
	RENDER(GET REST ASK "keep-alive: 5\r\nPROXY-CONNECTION: x\r\nte: trailers\r\nA: b\r\n" END,
		GET REST "A: b\r\n" END, CLIENT),
	RENDER(GET REST "Connection: keep-alive, Upgrade, X-Hop\r\nUpgrade: websocket\r\n"
		"X-Hop: 1\r\nX-Hop2: 2\r\nX-Ho: 3\r\nx-hOP: 4\r\n" END,
		GET REST "X-Hop2: 2\r\nX-Ho: 3\r\n" END, CLIENT),
	RENDER(GET "X-Hop: 1\r\n" REST "Connection: ,x-hop ,\r\nConnection:\tUpgrade\r\n"
		"Connection: y\r\nUpgrade: websocket\r\nY: 1\r\nZ: 2\r\n" END,
		GET REST "Z: 2\r\n" END, CLIENT),
	RENDER(GET REST "Connection: Upgrade, close\r\nUpgrade: websocket\r\nClose: 1\r\nA: b\r\n" END,
		GET REST "A: b\r\n" END, CLIENT),
	RENDER(GET REST "Connection: Upgrade, \"A\", A;q, B C\r\nUpgrade: websocket\r\nA: 1\r\nB: 2\r\n" END,
		GET REST "A: 1\r\nB: 2\r\n" END, CLIENT),
	RENDER(GET REST "Connection: Upgrade, Cookie, Authorization\r\nUpgrade: websocket\r\n"
		"Cookie: a\r\nAuthorization: b\r\n" END, GET REST END, CLIENT),
	/* what can't be taken away so */
	RENDER(GET REST "Connection: Upgrade, Host, sec-websocket-key, Sec-WebSocket-Version,"
		"Sec-WebSocket-Protocol,sec-websocket-EXTENSIONS\r\nUpgrade: websocket\r\n"
		"Sec-WebSocket-Protocol: a\r\nSec-WebSocket-Extensions: b\r\n" END,
		GET REST "Sec-WebSocket-Protocol: a\r\nSec-WebSocket-Extensions: b\r\n" END, CLIENT),
	RENDER(GET REST "Connection: Upgrade, X-Forwarded-For, x-forwarded-host, X-Forwarded-Proto,"
		" X-Forwarded-Port, X-Real-IP\r\nUpgrade: websocket\r\nX-Forwarded-For: 198.51.100.1\r\n"
		"X-Forwarded-Host: h\r\nX-Forwarded-Port: 1\r\n" END,
		GET REST "X-Forwarded-Host: h\r\nX-Forwarded-Port: 1\r\n" END, "198.51.100.1, " CLIENT),
	/* other Upgrade tokens are never passed on */
	RENDER(GET REST "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c, websocket\r\n"
		"Upgrade: TLS/1.0\r\nHTTP2-Settings: AAMAAABkAAQ\r\n" END, GET REST END, CLIENT),

	/* X-Forwarded-For and its kin */
	RENDER(GET REST ASK "X-Forwarded-For: 198.51.100.1\r\nA: b\r\n" END,
		GET REST "A: b\r\n" END, "198.51.100.1, " CLIENT),
	RENDER(GET REST ASK "x-forwarded-FOR:198.51.100.1, 203.0.113.7\r\n" END,
		GET REST END, "198.51.100.1, 203.0.113.7, " CLIENT),
	RENDER(GET "X-Forwarded-For: 198.51.100.1\r\n" REST ASK "X-Forwarded-For: 203.0.113.7, x\r\n"
		"A: b\r\nx-forwarded-for: unknown\r\n" END,
		GET REST "A: b\r\n" END, "198.51.100.1, 203.0.113.7, x, unknown, " CLIENT),
	RENDER(GET REST ASK "X-Forwarded-For:\r\n" END, GET REST END, CLIENT),
	RENDER(GET REST ASK "X-Forwarded-For: a\r\nX-Forwarded-For: \t\r\nX-Forwarded-For: b\r\n" END,
		GET REST END, "a, b, " CLIENT),
	RENDER(GET REST ASK "X-Forwarded-Proto: http\r\nX-Real-IP: 198.51.100.1\r\n"
		"x-forwarded-proto: ftp\r\nx-real-ip: 203.0.113.7\r\nA: b\r\n" END,
		GET REST "A: b\r\n" END, CLIENT),
	/* CGI and its heirs read '_' as '-': nothing of these may arrive */
	RENDER(GET REST ASK "X_Forwarded_For: 198.51.100.1\r\nx-forwarded_for: 198.51.100.2\r\n"
		"X_Forwarded-Proto: http\r\nX_Real_IP: 198.51.100.3\r\nx_real-ip: 198.51.100.4\r\n"
		"A_B: c\r\n" END, GET REST "A_B: c\r\n" END, CLIENT),
	RENDER(GET REST ASK "X_Forwarded_For: 198.51.100.1\r\nX-Forwarded-For: 198.51.100.2\r\n" END,
		GET REST END, "198.51.100.2, " CLIENT),

	/* absolute-form goes out in origin-form, its authority as Host */
	RENDER("GET http://b.example/x?y HTTP/1.1\r\n" REST ASK END,
		"GET /x?y HTTP/1.1\r\nHost: b.example\r\n" KEYED V13 END, CLIENT),
	RENDER("GET https://b.example:8443 HTTP/1.1\r\n" REST ASK END,
		"GET / HTTP/1.1\r\nHost: b.example:8443\r\n" KEYED V13 END, CLIENT),
	RENDER("GET http://[2001:db8::1]?y=http://c/ HTTP/1.1\r\n" REST ASK END,
		"GET /?y=http://c/ HTTP/1.1\r\nHost: [2001:db8::1]\r\n" KEYED V13 END, CLIENT),
	RENDER("GET http://b.example/ HTTP/1.1\r\n" HOST KEYED V13
		"Connection: Upgrade, Host\r\nUpgrade: websocket\r\n" END,
		GET "Host: b.example\r\n" KEYED V13 END, CLIENT),
};

static void test_request_render(void)
{
	const struct render_case *c;

	for (c = request_renders; c < request_renders + COUNT(request_renders); c++) {
		at_input(c->line, c->in, c->len);
		upgrade_rendered(c->in, c->len, c->x_forwarded_for);
		CHECK_STR(rendered, c->kept);
	}
}

static void test_request_render_client(void)
{
	static const char in[] = UPGRADE "X-Forwarded-For: x\r\nX-Forwarded-Proto: y\r\n" END;

	request_rendered(LIT(in), "2001:db8::9", "http");
	CHECK_STR(take("X-Forwarded-For"), "x, 2001:db8::9");
	CHECK_STR(take("X-Real-IP"), "2001:db8::9");
	CHECK_STR(take("X-Forwarded-Proto"), "http");
}

/* What the certificate says of the client goes to the backend, and nobody else can say it. */
static void test_request_render_subject(void)
{
	static const char in[] = GET REST "Connection: Upgrade, X-SSL-Client-CN\r\nUpgrade: websocket\r\n"
		"X-SSL-Client-CN: forged\r\nx_ssl_client-cn: forged\r\nX_SSL_CLIENT_CN: forged\r\nA: b\r\n" END;
	struct forwarded f = { .client = CLIENT, .proto = "https" };
	struct request r;
	const char *buf;
	unsigned i;

	for (i = 0; i < 3; i++) {
		f.subject = i == 0 ? NULL : i == 1 ? "" : "Ann Example";
		at("subject %s", i == 0 ? "NULL" : f.subject);
		CHECK_WHY(request_feed(&r, LIT(in), ONCE, 0, &buf), WHY_NONE);
		rendered[request_render(&r, buf, &f, rendered, sizeof rendered - 1)] = '\0';
		CHECK(strstr(rendered, "forged") == NULL);
		CHECK_STR(take("X-SSL-Client-CN"), i < 2 ? "(none)" : "Ann Example");
	}
}

/* A body is announced to the backend once, as checked, and the connection ends with it. */
static void test_request_render_plain(void)
{
	static const char *const in[] = {
		POST CL "5\r\nA: b\r\n" END "hello",
		POST "Connection: keep-alive\r\n" CL "5\r\nA: b\r\nKeep-Alive: 5\r\n" END "hello",
		POST "Connection: Content-Length\r\n" CL "5\r\nA: b\r\n" END "hello",
		POST CL "5\r\n" "Connection: upgrade\r\nA: b\r\nUpgrade: h2c\r\n" END "hello",
		POST CL "5\r\n" CL "5\r\nA: b\r\n" END "hello",
		POST CL "5, 5\r\nA: b\r\n" END "hello",
	};
	struct request r;
	const char *buf;
	size_t i, n;

	for (i = 0; i < COUNT(in); i++) {
		at_input(__LINE__, in[i], strlen(in[i]));
		if (i >= 4 && request_feed(&r, in[i], strlen(in[i]), ONCE, 0, &buf) != WHY_NONE)
			continue;                       /* refused is as good */
		n = request_rendered(in[i], strlen(in[i]), CLIENT, "http");
		CHECK(head_is_clean(rendered, n));
		CHECK_STR(take("Connection"), "close");
		CHECK_STR(take("Upgrade"), "(none)");
		CHECK_STR(take("Content-Length"), "5");
		CHECK_STR(take("X-Forwarded-For"), CLIENT);
		CHECK_STR(take("X-Forwarded-Proto"), "http");
		CHECK_STR(take("X-Real-IP"), CLIENT);
		CHECK_STR(rendered, POST "A: b\r\n" END);
	}
}

/* OPTIONS for a whole server, asked of a proxy: the last one makes it "*" again (9112 3.2.4). */
static void test_request_render_options(void)
{
	request_rendered(LIT("OPTIONS http://b.example:8001 HTTP/1.1\r\n" HOST END), CLIENT, "http");
	CHECK_BYTES(rendered, strcspn(rendered, "\r"), LIT("OPTIONS * HTTP/1.1"));
	CHECK_STR(take("Host"), "b.example:8001");
	request_rendered(LIT("OPTIONS * HTTP/1.1\r\n" HOST END), CLIENT, "http");
	CHECK_BYTES(rendered, strcspn(rendered, "\r"), LIT("OPTIONS * HTTP/1.1"));
	CHECK_STR(take("Host"), "a.example");
	request_rendered(LIT("OPTIONS http://b.example/ HTTP/1.1\r\n" HOST END), CLIENT, "http");
	CHECK_BYTES(rendered, strcspn(rendered, "\r"), LIT("OPTIONS / HTTP/1.1"));
}

/* The largest head that is taken can be rendered, or gives 0: never more than there is room for. */
static void test_request_render_large(void)
{
	size_t n, len = head_fill(UPGRADE, head_max);

	n = request_rendered(large, len, "2001:db8:1111:2222:3333:4444:5555:6666", "https");
	CHECK(n > head_max - 100 && n < head_max + 400);
	CHECK(head_is_clean(rendered, n));

	len = fields_fill(HEAD_FIELDS);
	n = request_rendered(large, len, CLIENT, "https");
	CHECK(head_is_clean(rendered, n));
	CHECK_STR(take("A63"), "b");
}

/* Whatever of head_max bytes is good fits into HEAD_ROOM when it is rendered. */
static void test_request_render_room(void)
{
	static char subject[128], start[4096];
	struct forwarded f = { "2001:db8:1111:2222:3333:4444:5555:6666", "https", subject };
	struct request r;
	const char *buf;
	size_t n, len;
	unsigned i;

	memset(subject, 'x', sizeof subject - 1);
	n = (size_t)sprintf(start, "GET / HTTP/1.1\r\nHost:a\r\nConnection:upgrade\r\nUpgrade:websocket\r\n"
		"Sec-WebSocket-Key:" KEY "\r\nSec-WebSocket-Version:13\r\nX-Forwarded-For:a\r\n");
	for (i = 6; i < HEAD_FIELDS - 1; i++)           /* each grows by a space */
		n += (size_t)sprintf(start + n, "A:b\r\n");
	len = head_fill(start, head_max);
	CHECK_WHY(request_feed(&r, large, len, ONCE, 0, &buf), WHY_NONE);
	CHECK_INT(r.head.nfields, HEAD_FIELDS);
	n = request_render(&r, buf, &f, guard_room(&output, HEAD_ROOM), HEAD_ROOM);
	CHECK(n > head_max && n <= HEAD_ROOM);
	f.renamed = 1;                                  /* and a .host_header of 128 */
	n = request_render(&r, buf, &f, guard_room(&output, HEAD_ROOM), HEAD_ROOM);
	CHECK(n > head_max && n + strlen("Host: \r\nX-Forwarded-") + 128 <= HEAD_ROOM);
}

/* For a backend that may want another Host: it is first, and what a client says was asked for is not
 * there, however it is written. */
static void test_request_render_renamed(void)
{
	static const char in[] = "GET http://b.example/x HTTP/1.1\r\nA: b\r\nX-Forwarded-Host: c\r\n"
		"x_forwarded_host: d\r\n" HOST "X-Forwarded-Hosts: e\r\n" END;
	static const char out[] = "GET /x HTTP/1.1\r\nHost: b.example\r\nA: b\r\n"
		"X-Forwarded-Hosts: e\r\nX-Forwarded-For: ";
	struct forwarded f = { .client = CLIENT, .proto = "https", .renamed = 1 };
	struct request r;
	const char *buf;
	size_t n;

	CHECK_WHY(request_feed(&r, LIT(in), ONCE, 0, &buf), WHY_NONE);
	n = request_render(&r, buf, &f, rendered, sizeof rendered - 1);
	CHECK_BYTES(rendered, n < sizeof out ? n : sizeof out - 1, out, sizeof out - 1);
}

/* ---- heads by chance ---- */

/* Good heads with a few bytes changed, dropped, doubled or swapped: the answer never depends on
 * how they arrive, and what is taken is clean and means the same when it is read again. */
static void test_request_random(void)
{
	static const char *const seeds[] = {
		UPGRADE "Origin: x\r\nX-Forwarded-For: y\r\n" END "frames",
		"GET http://b.example:80/x?y HTTP/1.1\r\n" HOST ASK KEYED V13 "A: b\r\n" END,
		POST CL "5\r\nConnection: close, A\r\nA: b\r\n" END "hello",
		POST TE "chunked\r\n" END,
	};
	static const char bytes[] = "\r\n\r\n :,\t/AzG9%@\x80[]=;\"";
	struct forwarded f = { .client = CLIENT, .proto = "https" };
	struct request r, again;
	char in[600], copy[1200];
	const char *buf;
	size_t len, n, p;
	unsigned i, changes;
	enum why why;

	for (i = 0; i < 4000; i++) {
		len = strlen(seeds[i % COUNT(seeds)]);
		memcpy(in, seeds[i % COUNT(seeds)], len);
		for (changes = 1 + random_below(3); changes != 0; changes--) {
			p = random_below((unsigned)len);
			switch (random_below(4)) {
			case 0:
				in[p] = bytes[random_below(sizeof bytes)];
				break;
			case 1:
				memmove(in + p, in + p + 1, --len - p);
				break;
			case 2:
				memmove(in + p + 1, in + p, len++ - p);
				break;
			default:
				n = random_below((unsigned)len);
				in[p] = in[n];
			}
		}
		at_input((int)i, in, len);
		why = request_feed(&r, in, len, ONCE, 0, &buf);
		request_cuts(&r, in, len, why);
		if (why != WHY_NONE)
			continue;
		buf = guard_copy(&input, in, len);
		n = request_render(&r, buf, &f, copy, sizeof copy);
		CHECK(head_is_clean(copy, n));
		detail[0] = '\0';
		CHECK_WHY(request_feed(&again, copy, n, ONCE, 0, &buf), WHY_NONE);
		CHECK_INT(again.head.size, n);
		CHECK_INT(again.upgrade, r.upgrade);
		CHECK_INT(again.length, r.length);
	}
}
