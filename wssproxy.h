/* wssproxy.h - the types that config.h is written in, and the pure functions that tests/unit.c
 * calls. See LICENSE for copyright. */
#ifndef WSSPROXY_H
#define WSSPROXY_H

#include <stddef.h>
#include <stdint.h>

/* ---- types of config.h ---- */

/* Goes up with each entry or field that config.def.h gains, loses or gives another sense, so that a
 * config.h of before is not compiled as if nothing had happened. */
#define CONFIG_VERSION 2

/* In config.h, whatever CFLAGS say: a number where a string is wanted, which a start would die of,
 * and a word of another entry are errors; fields may be left out. */
#pragma GCC diagnostic error "-Wint-conversion"
#pragma GCC diagnostic error "-Wenum-conversion"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

enum listener_kind {
	WSS,            /* TLS, then HTTP/1.1 */
	WS,             /* HTTP/1.1 in the clear */
	REDIRECT,       /* in the clear; all but ACME's challenges is answered with 308 to https */
};

enum verify_client {
	VERIFY_DEFAULT,         /* VERIFY_REQUIRED if there is a client_ca, else VERIFY_OFF */
	VERIFY_REQUIRED,        /* who shows no certificate is refused */
	VERIFY_OPTIONAL,        /* who shows none is served, without X-SSL-Client-CN */
	VERIFY_OFF,             /* none is asked for */
};

struct listener {
	const char *address;    /* IPv4 or IPv6 literal; "::" is dual stack */
	const char *port;       /* decimal; "0": the kernel chooses, the log tells */
	enum listener_kind kind;
	const char *client_ca;  /* PEM file, WSS: as the entry client_ca; NULL: that one */
	enum verify_client verify_client;
};

struct cert {
	const char *name;       /* server name (SNI) that it serves, NULL: the default */
	const char *chain;      /* PEM file: own certificate first, then its issuers */
	const char *key;        /* PEM file: PKCS#1, SEC1 or PKCS#8, RSA or EC, not encrypted */
};

enum tls_mode {
	TLS_OFF,        /* ws:// */
	TLS_VERIFY,     /* wss://, chain up to .ca, name and dates checked */
	TLS_PIN,        /* wss://, the key of the certificate in .ca and no other */
	TLS_NOVERIFY,   /* wss://, anyone will do: a warning at every start */
};

struct backend {
	const char *host;       /* name, IPv4 or IPv6 literal, or "unix:/path" */
	const char *port;       /* decimal; NULL for unix: */
	const char *name;       /* only requests for this Host; "*.a.example": all below; the name
				 * that fits best wins; NULL: any */
	const char *path;       /* of these, only requests under this path; the longest wins;
				 * NULL: all */
	unsigned weight;        /* share of the load, 0 means 1, at most 256 */
	int backup;             /* 1: serves when no other can */
	unsigned max_conns;     /* sessions at a time, 0: no limit */
	const char *host_header; /* the Host that it gets; NULL: as requested */
	int proxy;              /* 1: begin connections with the PROXY protocol, version 2 */
	enum tls_mode tls;
	const char *sni;        /* name to send and to verify, NULL: host */
	const char *ca;         /* PEM file, see enum tls_mode */
	const char *cert, *key; /* PEM files: client certificate chain and its key, or NULL */
};

enum balance {
	ROUND_ROBIN,    /* smooth weighted round robin: A B C A B C for equal weights */
	IP_HASH,        /* weighted rendezvous over the client's address */
	LEAST_CONN,     /* fewest sessions for its weight */
	STICKY_COOKIE,  /* the backend that an earlier answer's cookie names, else ROUND_ROBIN */
};

enum http {
	FORWARD,        /* requests that are no WebSocket upgrade: forward */
	REFUSE,         /* answer them with 426 */
};

enum x_forwarded_for {
	APPEND,         /* behind what the client sent */
	REPLACE,        /* drop what the client sent */
	OFF,            /* pass what the client sent, add nothing */
};

enum log_to {
	STDERR,
	SYSLOG,
};

enum log_sessions {
	NONE,
	TUNNELS,        /* of requests for an upgrade */
	ALL,
};

/* ---- why a session ends: WHY(name, status of the answer or 0, text for the log) ---- */

#define WHYS(WHY) \
	WHY(NONE, 0, "none")                       /* none yet; of a parser: whole and good */ \
	WHY(MORE, 0, "more")                       /* of a parser: more bytes are needed */ \
	/* the request, before a backend is dialled */ \
	WHY(REQUEST_LINE, 400, "request-line")     /* not method SP target SP version CRLF */ \
	WHY(TARGET, 400, "target")                 /* not origin-form, absolute-form or "*" */ \
	WHY(FIELD, 400, "field")                   /* a line that breaks RFC 9112 5 */ \
	WHY(HOST, 400, "host")                     /* none, several or a malformed Host */ \
	WHY(CONNECTION, 400, "connection")         /* lists more than 32 options */ \
	WHY(FRAMING, 400, "framing")               /* Content-Length no number, twofold, or TE */ \
	WHY(CHUNKS, 400, "chunks")                 /* a body that breaks RFC 9112 7.1 */ \
	WHY(UPGRADE_BODY, 400, "upgrade-body")     /* an upgrade request that announces a body */ \
	WHY(KEY, 400, "bad-key")                   /* not once 16 bytes in base64 */ \
	WHY(PLAIN_HTTP, 400, "plain-http")         /* HTTP in the clear on a TLS port */ \
	WHY(ORIGIN, 403, "origin")                 /* Origin is not in origins[] */ \
	WHY(NO_PATH, 404, "no-path")               /* under no backend's .path */ \
	WHY(METHOD, 405, "method")                 /* CONNECT */ \
	WHY(HEAD_TIMEOUT, 408, "head-timeout")     /* head not complete within head_ms */ \
	WHY(LONG_TARGET, 414, "long-target")       /* the request line alone exceeds head_max */ \
	WHY(NO_NAME, 421, "no-name")               /* its Host is no backend's .name */ \
	WHY(NOT_WEBSOCKET, 426, "not-websocket")   /* no WebSocket upgrade, and http = REFUSE */ \
	WHY(WS_VERSION, 426, "ws-version")         /* Sec-WebSocket-Version is not 13 */ \
	WHY(LARGE_HEAD, 431, "large-head")         /* exceeds head_max or HEAD_FIELDS lines */ \
	WHY(CODING, 501, "coding")                 /* a Transfer-Encoding other than chunked */ \
	WHY(HTTP_VERSION, 505, "http-version")     /* not HTTP/1.1 */ \
	WHY(REDIRECT, 308, "redirect")             /* REDIRECT listener */ \
	/* the backend, before the client has an answer */ \
	WHY(NO_BACKEND, 502, "no-backend")         /* none could be reached */ \
	WHY(BAD_RESPONSE, 502, "bad-response")     /* malformed, or its head cut off */ \
	WHY(LARGE_RESPONSE, 502, "large-response") /* exceeds head_max or HEAD_FIELDS lines */ \
	WHY(BAD_ACCEPT, 502, "bad-accept")         /* a 101 that does not match the request */ \
	WHY(FULL, 503, "full")                     /* every backend is at max_conns */ \
	WHY(NO_RESOURCES, 503, "no-resources")     /* ours: no descriptor, memory or port */ \
	WHY(RESPONSE_TIMEOUT, 504, "response-timeout") /* no answer within response_ms */ \
	/* no answer is possible: the client's TLS is not up, or it is gone */ \
	WHY(HANDSHAKE_TIMEOUT, 0, "handshake-timeout") /* TLS not up within handshake_ms */ \
	WHY(TLS_VERSION, 0, "tls-version")         /* no common TLS version */ \
	WHY(TLS_CIPHER, 0, "tls-cipher")           /* no common suite, curve or signature */ \
	WHY(ALPN, 0, "alpn")                       /* its ALPN has no http/1.1 */ \
	WHY(NOT_TLS, 0, "not-tls")                 /* what it sent is no TLS at all */ \
	WHY(TLS_ALERT, 0, "tls-alert")             /* the client sent a fatal alert */ \
	WHY(CLIENT_CERT, 0, "client-cert")         /* no certificate that client_ca accepts */ \
	WHY(TLS_ERROR, 0, "tls-error")             /* any other failure of TLS */ \
	WHY(PER_IP, 0, "per-ip")                   /* its address has max_per_ip sessions */ \
	WHY(DISPLACED, 0, "displaced")             /* table full, and it was not finished */ \
	WHY(NO_RANDOM, 0, "no-random")             /* the system has no entropy */ \
	/* endings of a session of any age */ \
	WHY(EOF, 0, "eof")                         /* ended in order: FIN, close_notify */ \
	WHY(RESET, 0, "reset")                     /* RST, or another socket error */ \
	WHY(TIMEOUT, 0, "timeout")                 /* TCP gave the peer up */ \
	WHY(IDLE, 0, "idle")                       /* no application byte for idle_ms */ \
	WHY(MAX_AGE, 0, "max-age")                 /* a tunnel as old as max_age_ms allows */ \
	WHY(NO_PONG, 0, "no-pong")                 /* a Ping, and nothing for ping_ms again */ \
	WHY(STALL, 0, "stall")                     /* sat on a buffer while others waited */ \
	WHY(FLOOD, 0, "flood")                     /* FLOOD_RECORDS without application data */ \
	WHY(DONE, 0, "done")                       /* an answer was relayed whole */ \
	WHY(SHORT, 0, "short")                     /* the backend ended inside its answer */ \
	WHY(DRAIN, 0, "drain")                     /* the program ends, and it was its turn */

enum why {
#define WHY(name, status, text) WHY_##name,
	WHYS(WHY)
#undef WHY
};

/* ---- HTTP heads: pure functions over a byte range, no I/O ---- */

#define HEAD_FIELDS 100         /* header lines of one head */

struct span {                   /* bytes of the head buffer */
	uint16_t at, len;
};

struct field {
	struct span name, value;    /* value without the white space around it */
	uint8_t is;                 /* which of field_names[] */
	uint8_t dropped;            /* 1: not passed on; not known before the head is judged */
};

/* What a parser knows of a head; zero it before the first call. All spans point into the buffer
 * that the calls are given, which may have moved between them. */
struct head {
	uint16_t at;                /* start of the first line that is not parsed yet */
	uint16_t scanned;           /* no line end before this */
	uint16_t size;              /* once whole: bytes up to and with the empty line */
	uint16_t nfields;
	struct span part[3];        /* method, target, version; or version, code, reason */
	struct field field[HEAD_FIELDS];
};

struct request {
	struct head head;
	struct span target;         /* path and query, to be sent in origin-form */
	struct span host;           /* Host, or the authority of an absolute-form target, */
	struct span name;           /* and that without a port */
	struct span origin;         /* Origin, the last one; empty: none */
	struct span key;            /* Sec-WebSocket-Key, of an upgrade */
	int upgrade;                /* 1: a well-formed WebSocket upgrade */
	int close;                  /* 1: the client's last on its connection */
	uint64_t length;            /* bytes of body that follow, */
	int chunked;                /* or 1: chunks */
};

enum framing {
	BODY_TUNNEL,                /* 101: no end but that of the connection */
	BODY_LENGTH,                /* so many bytes; none for HEAD, 204 and 304 */
	BODY_CHUNKED,
	BODY_EOF,                   /* up to the end of the connection */
};

struct response {
	struct head head;
	unsigned status;            /* 100 to 599 */
	enum framing framing;
	uint64_t length;            /* of BODY_LENGTH */
	int keep;                   /* for response_render: 0: the connection ends behind it */
};

/* What request_render adds. */
struct forwarded {
	const char *client;         /* client's address, no port, no brackets */
	const char *proto;          /* "https" or "http" */
	const char *subject;        /* common name of its verified certificate, or NULL, "" */
	int renamed;                /* 1: Host comes first, X-Forwarded-Host not at all: a backend
	                             * may get its own, and the one that was asked for as that */
};

/* Parses what is there of a head, request or response; call it again with more bytes behind the
 * same ones. WHY_MORE, WHY_NONE (whole: head.size), or what is wrong. */
static enum why request_parse(struct request *r, const char *buf, size_t len);
static enum why response_parse(struct response *r, const char *buf, size_t len);

/* Judges a whole request head: Host, framing, upgrade. Fills the rest. */
static enum why request_check(struct request *r, const char *buf);

/* Judges a whole response head for a request of that kind: framing; a 101 must be an answer to an
 * upgrade and carry `accept` (28 characters and NUL). `head` 1: the request's method was HEAD. */
static enum why response_check(struct response *r, const char *buf, int upgrade, int head,
	const char *accept);

/* Write the head as it is passed on. Bytes written, or 0: more than `size`. */
static size_t request_render(const struct request *r, const char *buf, const struct forwarded *f,
	char *out, size_t size);
static size_t response_render(const struct response *r, const char *buf, char *out, size_t size);

/* Sec-WebSocket-Accept for a key of 24 characters (RFC 6455 4.2.2): 28 characters and NUL. */
static void accept_key(const char *key, char out[29]);

/* The end of a body, in chunks (RFC 9112 7.1) or of so many bytes: takes up to `len` of it, and
 * returns how many belong to it; c->done is set behind its last one, c->bad where it breaks the
 * grammar. `kept` not NULL: those that it takes are either all to be passed on, *kept 1, or none, 0
 * (extensions and trailers, which are bad above head_max bytes in all). */
struct chunked {
	uint64_t left;              /* of the data, or the chunk's size read so far */
	uint32_t dropped;           /* bytes of extensions and trailers */
	uint8_t state, digits, done, bad;
	uint8_t plain;              /* 1: no chunks, only data */
};
static struct chunked body_start(int chunks, uint64_t length);  /* UINT64_MAX: it has no end */
static size_t chunked_scan(struct chunked *c, const char *buf, size_t len, int *kept);

/* Where one direction of a tunnel stands among its frames (RFC 6455 5.2). Zeroed: at the start of
 * the first one. Payload is counted, not read, but for the code of a Close. */
struct flow {
	uint64_t left;              /* bytes of the payload */
	uint32_t frames_of_data;    /* that went by */
	uint16_t code;              /* of a Close that did; 1005: it had none (7.4.1); 0 */
	uint8_t seen;               /* bytes of the header; 0: between two frames */
	uint8_t first, size;        /* FIN, RSV, opcode; the length as in the second byte */
	uint8_t mask[2];            /* the front of the key */
	uint8_t amid;               /* 1: the message has more fragments to come */
	uint8_t over;               /* 1: it had a Close, or broke the grammar, and is not looked
	                             * at any more; nothing may be put behind */
};

/* Takes the next bytes of a direction; `masked` 1: the client's. How many of them lie before the
 * end of the last frame that ends among them; 0: none does. */
static size_t flow_scan(struct flow *f, unsigned masked, const unsigned char *p, size_t len);

/* Whether a frame of our own may stand behind what went by. */
static int flow_between(const struct flow *f);

/* ---- backends ---- */

#define BACKENDS_MAX 64         /* sets of backends are uint64_t */
#define WEIGHT_MAX 256

/* Smooth weighted round robin (nginx): `current` starts at 0 and is the caller's to keep. Returns
 * the index chosen among the set bits of `allowed`, -1 when it is empty. */
static int round_robin_pick(const unsigned *weight, int *current, unsigned n, uint64_t allowed);

/* Weighted rendezvous: the index among `allowed` whose id and weight win for these address bits. */
static int rendezvous_pick(const uint64_t *id, const unsigned *weight, unsigned n,
	uint64_t allowed, const unsigned char *address, unsigned bits);

/* Whether the target (path and query) lies under the prefix, at a segment border. */
static int path_under(const char *target, size_t len, const char *prefix);

#endif
