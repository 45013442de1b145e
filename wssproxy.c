/* wssproxy - a proxy for secure WebSockets that fits on a router. See LICENSE for copyright.
 *
 * One process, one thread, one poll() loop. It terminates TLS, checks and rewrites the HTTP/1.1
 * Upgrade handshake, picks a backend and relays bytes both ways until one side is done.
 *
 *                  fill             up
 *     client ----> [ engine's input buffer ] ----> backend
 *     client <---- [ engine's output buffer ] <---- backend
 *                  send             down
 *
 * The TLS engine's record buffers are the only relay buffers: plaintext goes to the backend
 * straight out of the input buffer and comes from it straight into the output buffer. While it
 * waits there, the engine takes no further record, so the client is not read: backpressure needs
 * no code. A client in the clear (listener kind WS) uses the same buffers without an engine.
 * Records are read ahead of it, and bulk into a spare set of buffers: a copy for fewer calls. Where
 * a tunnel's frames end is counted as its bytes go by, so that a Close can stand there.
 *
 * A session is one slot of a static table, with two descriptors and a TLS context. It borrows
 * record buffers for a turn: who waits for a peer waits with empty hands, but for what can't be put
 * down (see 'what sessions borrow'). So few buffers serve many, in the order in which they ask. At
 * rest it owns nothing but its slot and, before its answer, a note of what was asked. Descriptors
 * of sessions wait in an epoll set, one entry of poll()'s array: those that rest cost nothing.
 *
 * A session is in one state; states[] says how to step it, and what it ends with when its time
 * there, which has a queue of its own, is over:
 *
 *     FREE > HANDSHAKE > HEAD > CONNECT > (BACKEND_HANDSHAKE >) REQUEST > RESPONSE >
 *            RELAY or EXCHANGE, or after any of these REPLY, > DRAIN > FREE
 *                      EXCHANGE > BETWEEN > HEAD, for the next request of a connection
 *
 * A step moves what it can without blocking and returns the state to be in; FREE ends the session.
 * session_run alone changes states; no step closes its own session. The set tells each thing once,
 * and a leg remembers it until a call finds it otherwise: so a run goes on as long as anything can
 * move, or asks for another. Nothing in the loop walks all sessions.
 *
 * To understand everything else, start reading main(). */
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <bearssl.h>
#include <ctype.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include "wssproxy.h"
#ifndef CONFIG
#define CONFIG "config.h"
#endif
#include CONFIG

#define QUOTED(number)  #number
#define NUMBER_TEXT(macro) QUOTED(macro)
#ifndef config_version
#define config_version 0        /* there was none */
#endif
_Static_assert(config_version == CONFIG_VERSION, CONFIG " is of config_version "
	NUMBER_TEXT(config_version) ", config.def.h of " NUMBER_TEXT(CONFIG_VERSION)
	": diff the two, give it the entries that it lacks, then that number");

#ifndef VERSION
#define VERSION "0.1"
#endif
#ifndef BUILD
#define BUILD "-"               /* made by hand */
#endif
#ifndef BUILD_TIME
#define BUILD_TIME 1795305600   /* of this release: no certificate is judged by an earlier clock */
#endif

#define LENGTH(a)       (sizeof(a) / sizeof((a)[0]))
#define wipe(p, len)    explicit_bzero(p, len)
#define OWNER(p, type, member)  ((type *)(void *)((char *)(p) - offsetof(type, member)))

enum {
	HEAD_EXTRA = 672,       /* what request_render and head_address may add to a head */
	HEAD_ROOM = head_max + HEAD_EXTRA,
	NOTE_TEXT = 1024,       /* bytes of a head that waits without a shelf, */
	SHELVES = 2 * max_busy, /* of which there are so many */
	READ_AHEAD = 16384 + 512, /* bytes of records that one recv may bring: a record, at least */
	BULK = 3 * 16384,       /* bytes in the clear that one recv brings of who sends bulk, */
	READ_BULK = BULK + 512, /* and bytes of records */
	SHARE = 32768,          /* bytes read of a side in one run: others wait (bulk, slow CPU) */
	UNSENT = 65536,         /* bytes not on their way yet that a socket takes (slow readers) */
	RECEIVE_ROOM = 1 << 18, /* bytes of a receive buffer that may hold a record for long */
	ACCEPTS = 16,           /* connections taken from a listener in one turn */
	PROXY_MAX = 16 + 2 * 16 + 4, /* bytes of the PROXY protocol's header */
	CHAIN_MAX = 8,          /* certificates of a chain */
	CHAIN_BYTES = 16384,    /* their DER, in all */
	ANCHORS_MAX = tls_backends ? 256 : 16,  /* trust anchors, of all .ca and client_ca */
	ANCHOR_BYTES = ANCHORS_MAX * 512,       /* their names and keys, in all */
	ADDRESSES_MAX = 8,      /* of one backend's name */
	INTERIM_MAX = 8,        /* 1xx answers before the final one */
	OPTIONS_MAX = 32,       /* of Connection: each is looked for among all fields */
	FIRST_RECORD = 1400,    /* bytes of the first record after a rest: they fit one segment */
	STALL_BYTES = 16384,    /* within stall_ms: what a buffer holds; less is no progress */
	FLOOD_RECORDS = 1000,   /* records in a row without application data */
	DISPLACE_LOOK = 64,     /* unfinished sessions looked at to find the one to displace, */
	DISPLACE_MS = 1000,     /* which has had so long for what it has yet to say */
	RESUME_MS = 3600000,    /* how long a session with a backend is resumed */
	ACCEPT_PAUSE_MS = 500,  /* after accept found no descriptor or memory, */
	POLL_PAUSE_MS = 50,     /* and poll */
	KNOCK_MS = 100,         /* until those who found no place are looked at again, */
	LOOKS = 1 + max_sessions / 16, /* and sessions looked at meanwhile: are they there? */
	SILENT_MS = 2000,       /* after which that has to be asked, */
	ASK_MS = 5000,          /* and after which who has not answered is gone: */
	PROBES_MIN = 4,         /* keepalive's, one a second, */
	RETRANSMITS_MIN = 6,    /* or what is sent again, which takes 12 s at least */
	FULL_PAUSE_MS = 10000,  /* between two lines `full` */
	DOWN_PAUSE_MS = 60000,  /* and two `down` of a backend that stays so */
	REDIAL_MS = 20,         /* until sessions that could not dial yet look again */
	REST_MS = 1000,         /* of silence make a tunnel one that rests, */
	LEAVE_LOOK = 32,        /* others looked at to find one that leaves at a drain */
	WAY_MS = 5000,          /* until who makes way closes listeners that nobody took over */
	LOG_LINE = 1024,
	LISTENERS = LENGTH(listeners), CERTS = LENGTH(certs), BACKENDS = LENGTH(backends),
	/* causes that BearSSL has no number for, and numbers that it has no cause for: faults[] */
	FAULT_NOT_TLS = BR_ERR_IO, FAULT_NOT_YET_VALID = BR_ERR_X509_TIME_UNKNOWN,
	FAULT_PIN = BR_ERR_X509_NOT_TRUSTED + 1,
};

_Static_assert(LENGTH(backends) <= BACKENDS_MAX, "config.h: backends[]: at most 64 entries");
_Static_assert(LENGTH(listeners) <= 255, "config.h: listeners[]: at most 255 entries");
_Static_assert(READ_BULK <= UINT16_MAX, "struct leg: at, end");
_Static_assert(LENGTH(ciphers) <= BR_MAX_CIPHER_SUITES, "config.h: ciphers[]: too many entries");
_Static_assert(max_sessions >= 1 && max_sessions <= 100000, "config.h: max_sessions: 1 to 100000");
_Static_assert(max_busy >= 1 && max_busy <= max_sessions, "config.h: max_busy: 1 to max_sessions");
_Static_assert(head_max >= 1024 && head_max <= 16000, "config.h: head_max: 1024 to 16000");
_Static_assert(tls_backends == 0 || tls_backends == 1, "config.h: tls_backends: 0 or 1");
_Static_assert(frames == 0 || frames == 1, "config.h: frames: 0 or 1");
_Static_assert(sizeof cookie_name > 1 && sizeof cookie_name <= 100,
	"config.h: cookie_name: 1 to 99 characters");

/* ---- types and statics ---- */

enum party { BY_PROXY, BY_CLIENT, BY_BACKEND };

/* Directions of a tunnel; what may be in its `say`, with our codes of a Close (RFC 6455 7.4.1). */
enum { TO_BACKEND, TO_CLIENT, SAY_PING, SAID, GOING_AWAY = 1001, SERVICE_RESTART = 1012 };

enum state {
	FREE,           /* no session; from a step: close it */
	HANDSHAKE,      /* TLS with the client */
	BETWEEN,        /* between two requests */
	HEAD,           /* the request head is being read */
	CONNECT,        /* a backend is being dialled */
	BACKEND_HANDSHAKE, /* TLS with the backend */
	REQUEST,        /* the rendered head goes to the backend */
	RESPONSE,       /* the response head is being read */
	RELAY,          /* a tunnel, both ways */
	EXCHANGE,       /* a plain answer, up to its end */
	REPLY,          /* an answer of our own */
	DRAIN,          /* one side was told the end; the other finishes */
	STATES
};

/* Queues of timers, each of one timeout, so in order of deadlines: the states' own (FREE: of those
 * whose time in theirs was cut short), and these. */
enum {
	Q_STALL = STATES,       /* sessions that hold what others may want, by last progress */
	Q_RESOLVE,              /* backends whose name is to be tried again, */
	Q_REFRESH,              /* or, for it was found, to be asked for again */
	Q_CHECK,                /* backends whose next active check is due */
	Q_REDIAL,               /* sessions that could not dial yet, instead of Q_STALL */
	Q_YOUNG,                /* sessions that have yet to ask: due ones may be displaced; */
	Q_GROWN,                /* the others: due ones may be looked at, whether they are there; */
	Q_ASKED,                /* those of them that are asked */
	QUEUES
};

struct link {                   /* of a ring; alone when it points to itself, or is zeroed */
	struct link *prev, *next;
};

struct timer {
	struct link link;
	uint64_t due;
};

struct queue {
	struct link list;
	uint64_t ms;            /* 0: never due, but in order all the same */
};

struct address {        /* of AF_UNIX, the family alone; the port has one place in both others */
	union {
		struct sockaddr any;
		struct sockaddr_in in;
		struct sockaddr_in6 in6;
	};
};

struct text {           /* appended to a bound: what is past it is left out, and full is set */
	char *p;
	size_t len, size;
	int full;
};

struct session;

struct pool {
	char *base;
	size_t size;            /* of an item; its first bytes are ours while it is free */
	unsigned count, lent;
	unsigned fresh;         /* from here on none was ever lent, so their pages are untouched */
	void *free;             /* last in, first out: what is lent again is still in the cache */
	struct link waiters;    /* sessions, in the order in which they came */
};

#define POOL(name, items) name = { .base = (char *)(items), .size = sizeof (items)[0], \
	.count = LENGTH(items), .waiters = { &(name).waiters, &(name).waiters } }

struct source { /* sessions of an address (IPv6: of those with the same source_bits6 in front) */
	struct source *next;    /* of the free list, or of its bucket */
	unsigned char key[9];   /* IPv4 address, or the front of an IPv6 one; family */
	unsigned sessions, shelves;     /* which are lent to them */
};

struct identity {               /* a certificate chain and its key */
	br_x509_certificate chain[CHAIN_MAX];
	unsigned char der[CHAIN_BYTES];
	size_t chain_len, der_len;
	union {
		br_skey_decoder_context key;    /* the key's numbers lie in here */
		/* BearSSL 0.6 takes its last field, key_data, to be 24 bytes larger than it is */
		unsigned char room[sizeof(br_skey_decoder_context) + 24];
	};
};

struct trust {                  /* a file's part of a keyring's anchors */
	unsigned first, count;
	const char *path;       /* NULL: none is wanted */
	int one;                /* 1: it has one, which is needed */
};

/* All certificates and keys that config.h names. Of two rings, SIGHUP fills the one not in use. */
struct keyring {
	/* of certs[], then of backends[], where chain_len 0 is none */
	struct identity id[CERTS + (tls_backends ? BACKENDS : 0)];
	struct trust trust[LISTENERS + BACKENDS];       /* their .client_ca, .ca */
	br_x509_trust_anchor anchor[ANCHORS_MAX];
	unsigned anchors;
	char bytes[ANCHOR_BYTES];
	struct text kept;       /* in there: what the anchors point to */
	const struct trust *read;       /* whose file is being read */
	unsigned users;         /* handshakes that may still point into it */
};

/* The buffers of one connection: an engine's record buffers and the records read ahead of it; or,
 * for a client in the clear, what was read (ahead) and what is to be sent (obuf). */
struct buffers {
	size_t out_at, out_end; /* of obuf, without an engine: not sent yet */
	unsigned char ibuf[BR_SSL_BUFSIZE_INPUT];
	unsigned char obuf[BR_SSL_BUFSIZE_OUTPUT];
	unsigned char ahead[READ_AHEAD];
};

/* Lent while bytes are on their way. A spare one serves to read ahead of a side that sends bulk. */
struct records {
	union {
		struct buffers side[1 + tls_backends];  /* the client's, the backend's */
		unsigned char bulk[READ_BULK];
	};
};

struct verifier {       /* judges the certificate chain of the other side during a handshake */
	unsigned begun;         /* above 0: it has seen of a chain what nobody will show again; of
				 * one to be validated, certificates + 1 */
	br_ssl_engine_context *eng;
	br_name_element name;           /* where the subject's common name goes */
	union {
		br_x509_minimal_context minimal;
		struct {
			br_x509_knownkey_context known; /* what of them counts: a key */
			br_x509_decoder_context decoder;
		} first;
	} u;
};

/* Where heads are read, judged and rendered, for the session that runs. What waits is put aside. */
struct head_buffer {
	size_t len, off;        /* bytes in use; of them, sent */
	union {
		struct request request;         /* in HEAD */
		struct response response;       /* in RESPONSE */
	} u;
	char bytes[HEAD_ROOM];
};

struct shelf {                  /* lent for what has to stay where it is while a peer is awaited */
	struct verifier verifier;       /* of a handshake that asks for certificates, */
	char text[HEAD_ROOM];           /* a head too long for the note */
};

struct note {   /* what is remembered of a session until its answer; there is one for each */
	uint64_t name_hash;     /* of the server name in its ClientHello */
	uint16_t len, off;      /* of a head that was put aside; 0: none */
	char text[NOTE_TEXT];   /* where it lies unless it is longer */
	unsigned interim;       /* 1xx answers so far */
	char accept[29];        /* the Sec-WebSocket-Accept that a 101 must carry */
	char host[128], path[256];      /* for the log, cut to size */
	char subject[128];      /* common name of the client's verified certificate, "" */
};

struct leg {                    /* one of the two connections of a session */
	int fd;                         /* -1: none */
	uint16_t at, end;               /* what was read ahead and not taken yet, of `ahead` */
	br_ssl_engine_context *eng;     /* NULL: in the clear */
	struct buffers *buf;            /* NULL: at rest, or a backend in the clear */
	struct records *spare;          /* of who sends bulk: where it is read ahead */
	unsigned char *ahead;           /* in there or in buf */
	uint16_t empty_records;         /* in a row, without application data */
	uint16_t mark;                  /* its SO_RCVLOWAT: bytes of an awaited record; 0: any */
	uint16_t left;                  /* bytes that it may still be read in this run */
	uint8_t in;                     /* the set told of bytes, and no read found their end; */
	uint8_t last;                   /* behind what a read stops at: the end, an urgent byte; */
	uint8_t gone;                   /* its end: 1, in order; 2, or reset */
	uint8_t full;                   /* its socket takes no more until the set says so */
	_Bool grown;                    /* its receive buffer was, see leg_peek */
	_Bool more;                     /* what is sent now has more coming behind it, */
	_Bool corked;                   /* and the kernel may hold back what was sent last */
	_Bool started;                  /* since it rested, plaintext was put into it */
	uint8_t filled;                 /* reads in a row, up to 2, that filled their room */
	_Bool reset;                    /* a send said so, and no later call will */
	uint8_t eof;                    /* all that it sent was taken, and no more comes */
	uint8_t fin;                    /* it was told the same: close_notify and FIN are out */
};

struct session {
	struct source *source;  /* while it is FREE, this place is the pool's */
	struct address peer;
	uint32_t id, request;   /* of the connection, and of its requests, from 1 */
	uint8_t state, listener; /* enum state; index of the one that it came to */
	uint8_t plain, asked;   /* 1: no TLS with the client; TCP asks if it is there: place_look */
	/* From here up to the client's leg all is of the request: see request_begin. */
	uint8_t why, by;        /* enum why, party */
	uint8_t opened;         /* 1: has its line `open` in the log */
	uint8_t upgrade, head;  /* 1: the request is an upgrade, has the method HEAD */
	uint8_t framing, keep;  /* of the answer, enum framing; 1: the connection outlives it */
	uint8_t broken;         /* enum party: whose side broke, see session_broke; 0: none */
	uint8_t expired;        /* in this run: the state's time is over; */
	uint8_t moved, fed;     /* it, or bytes of a head, moved; application bytes did */
	uint8_t first, address; /* of the backend's: where it began, and how many had their try */
	uint8_t starved;        /* 1: a backend could not be tried for lack of something of ours */
	int8_t server, sticky;  /* index of the backend, of the one that its cookie names; -1 */
	int unsent;             /* bytes in its sockets' queues when its time to end began */
	uint32_t stall_from;    /* application bytes when the timer `stall` was started */
	const char *fault;      /* why an address of this backend failed; NULL: none yet */
	uint64_t tried, group;  /* backends; those that its Host and path allow */
	struct chunked body;    /* what may go up: the request's, or all of a tunnel's client */
	union {
		struct chunked answer;  /* its body */
		struct flow flow[2];    /* of a tunnel */
	};
	uint32_t heard, active; /* of a tunnel: when its client, and when either side sent last */
	uint16_t say;           /* to its client: SAY_PING, a Close's code; SAID: no more; 0 */
	uint16_t code;          /* of the first Close that went by, 0: none did, */
	uint8_t code_by;        /* and whose it was, enum party */
	uint8_t pinged, answered; /* 1: its client was sent a Ping; its backend sent the last */
	uint64_t rx, tx;        /* application bytes from and for the client */
	uint64_t born;          /* ms */
	struct leg backend;
	struct leg client;
	struct records *rec;
	struct shelf *shelf;
	struct note *note;
	struct keyring *ring;   /* while a handshake is under way */
	struct link wait;       /* for buffers, a shelf, a handshake turn, or in runnable */
	struct timer timer, stall, place;       /* the state's; see Q_STALL, Q_REDIAL; Q_YOUNG */
	br_ssl_server_context tls;      /* from here on it survives the session */
};

struct server {                 /* a backend at run time */
	char name[128];         /* host:port, for the log */
	char cookie[sizeof cookie_name + 17];   /* name=id */
	br_ssl_session_parameters session;      /* of its last full TLS handshake, */
	uint64_t session_until;                 /* to be resumed before then; 0: not at all */
	struct address address[ADDRESSES_MAX];
	uint8_t addresses, turn;        /* of them, which is next */
	uint8_t by_name, pending;       /* 1: the resolver is asked; it was, and has not answered */
	uint8_t down;           /* 1: has its line `down` in the log, */
	uint64_t down_since, down_after;        /* so since then; may be said again then, */
	unsigned lost;          /* and so many requests found no backend meanwhile */
	uint8_t checked;        /* address that the active check is at, */
	const char *check_why;  /* and why one before it failed; NULL: none did */
	unsigned active, fails; /* sessions; failures since fail_since */
	uint64_t fail_since, aside_until;
	uint64_t held_until;    /* aside until then for what no check sees; 0: for connects alone */
	unsigned long long sessions, failures;  /* totals */
	struct timer retry, check;
};

/* poll()'s array; FD_EPOLL: the set of sessions, FD_DOOR: see 'making way', FD_CHECK: backends. */
enum { FD_SIGNAL, FD_RESOLVER, FD_EPOLL, FD_LISTEN, FD_DOOR = FD_LISTEN + LISTENERS,
	FD_CHECK = FD_DOOR + LISTENERS, FD_COUNT = FD_CHECK + BACKENDS };

static struct session sessions[max_sessions];
static struct records records[max_busy];
static struct head_buffer head_buffer, *hd;     /* NULL: the session that runs has no head there */
static struct shelf shelves[SHELVES];
static struct note notes[max_sessions];
/* TLS contexts for backends, beside sessions[]: apart, for sessions without don't touch them. */
static br_ssl_client_context upstreams[tls_backends ? max_sessions : 1];
static struct source sources[max_sessions];
static struct source *buckets[1024];
static struct keyring keyrings[2], *keyring = keyrings;
static struct server servers[BACKENDS];
static unsigned weights[BACKENDS];
static int currents[BACKENDS];
static uint64_t server_ids[BACKENDS];   /* hash of the name, whatever its place in the list */
static unsigned char cache_store[session_cache * 100 + 1];
static br_ssl_session_cache_lru cache;
static uint16_t suites[LENGTH(ciphers)];        /* ciphers[], in this CPU's order */

static struct pool POOL(session_pool, sessions), POOL(records_pool, records),
	POOL(shelf_pool, shelves), POOL(note_pool, notes), POOL(source_pool, sources);
static struct queue queues[QUEUES];
/* Sessions whose handshake has input: begun, not begun. */
static struct link turns[2] = { { &turns[0], &turns[0] }, { &turns[1], &turns[1] } };
/* Sessions that the epoll set told of, that were given what they waited for, or go on. */
static struct link runnable = { &runnable, &runnable };
static struct pollfd fds[FD_COUNT];
static int log_fd = STDERR_FILENO;
static int log_flags = -1;      /* those of log_fd, a terminal that others share; -1: none does */
static int log_socket = -1;     /* of the syslog daemon, */
static int log_syslog;          /* which has this one's other end: 1, or 0: it is not there */
static uint64_t now;            /* ms of CLOCK_MONOTONIC, as of this turn */
static uint64_t accept_after;   /* listeners rest until then */
static uint64_t way_until, drain_until; /* 0: not waiting for who takes listeners; not draining */
static unsigned tunnels, tunnels_first; /* sessions in RELAY; and when the drain began */
static uint32_t last_id;
static struct { unsigned long long opened, rejected, probes, rx, tx, log_lost, full; } totals;
static int full_said;           /* the last line was `full`, not `room` */
static uint64_t full_after;     /* the next `full` may be said */
static unsigned rejects;        /* within a second, */
static uint64_t rejects_until;  /* which ends then; 0: there were none */
static size_t ignored;          /* a length that nobody asks for */
static char scratch[HEAD_ROOM + HEAD_ROOM];     /* of one call: renderings, what is thrown away */
static char file_text[ANCHORS_MAX * 2048];      /* a PEM file */
static int reload_due;          /* SIGHUP came; 0 again when it was done */
static char checked[32];        /* "backends[3]" while that is looked at, or "" */
static char fault[LOG_LINE / 2]; /* what was found to be wrong with it, or a file of it, */
static unsigned faults_found;   /* so many times */
static int stops, copied;       /* SIGTERM and SIGINT so far; 1: it is a copy that SIGUSR2 made */

/* For the log, and what the answer is; 0: none is possible. */
static const struct { const char *text; unsigned status; } whys[] = {
#define WHY(name, status, text) { text, status },
	WHYS(WHY)
#undef WHY
};

/* ---- text ----
 *
 * No printf: a static musl's is 12 KB, most of it floating point that MIPS routers emulate. */

/* To a struct text. BearSSL's decoders call it as well. */
static void text_add(void *to, const void *p, size_t len)
{
	struct text *t = to;

	if (len > t->size - t->len) {
		len = t->size - t->len;
		t->full = 1;
	}
	memcpy(t->p + t->len, p, len);
	t->len += len;
}

static void text_string(struct text *t, const char *s)
{
	text_add(t, s, strlen(s));
}

static const char *text_or(const char *s)
{
	return s ? s : "NULL";
}

/* memmem(), of which musl has 1.4 KB. */
static void *bytes_find(const void *in, size_t len, const char *what, size_t n)
{
	const char *p = in;

	for (; len >= n; p++, len--)
		if (memcmp(p, what, n) == 0)
			return (void *)(uintptr_t)p;
	return NULL;
}

/* At least so many digits, up to 9. */
static void text_number(struct text *t, uint64_t n, unsigned base, unsigned digits)
{
	char buf[20], *const end = buf + sizeof buf, *p = end;

	do {
		*--p = "0123456789abcdef"[n % base];
		n /= base;
	} while (n > 0 || p > end - digits);
	text_add(t, p, (size_t)(end - p));
}

#define SPAN(buf, s) (int)(s).len, (buf) + (s).at       /* for %.*s: a part of a head */

/* The compiler checks arguments; what it would take and this does not, lint finds: there are only
 * %s %.*s %d %u %llu %x, and %0Nu %0Nx of at least N digits. */
__attribute__((format(printf, 2, 0)))
static void text_append(struct text *t, const char *format, va_list ap)
{
	for (const char *next; *(next = strchrnul(format, '%')); format = next + 1) {
		unsigned digits = 0;
		int d;

		text_add(t, format, (size_t)(next - format));
		if (*++next == '0') {
			digits = (unsigned)(next[1] - '0');
			next += 2;
		}
		switch (*next) {
		case 's':
			text_string(t, va_arg(ap, const char *));
			break;
		case '.':
			next += 2;
			d = va_arg(ap, int);
			text_add(t, va_arg(ap, const char *), (size_t)d);
			break;
		case 'd':
			d = va_arg(ap, int);
			text_add(t, "-", d < 0);
			text_number(t, d < 0 ? 0 - (unsigned)d : (unsigned)d, 10, 0);
			break;
		case 'l':
			next += 2;
			text_number(t, va_arg(ap, unsigned long long), 10, 0);
			break;
		default:
			text_number(t, va_arg(ap, unsigned), *next == 'x' ? 16 : 10, digits);
		}
	}
	text_string(t, format);
}

__attribute__((format(printf, 2, 3)))
static void text_format(struct text *t, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	text_append(t, format, ap);
	va_end(ap);
}

/* A string, cut to size. Its length. */
__attribute__((format(printf, 3, 4)))
static size_t string_format(char *out, size_t size, const char *format, ...)
{
	struct text t = { .p = out, .size = size - 1 };
	va_list ap;

	va_start(ap, format);
	text_append(&t, format, ap);
	va_end(ap);
	out[t.len] = '\0';
	return t.len;
}

/* A day, from March 1 of the year 0, as 2028-01-31: years end here with their leap day. */
static const char *date_format(unsigned day, char out[16])
{
	const unsigned era = day / 146097;                      /* of 400 years */

	day %= 146097;
	const unsigned year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
	day -= 365 * year + year / 4 - year / 100;
	const unsigned month = (5 * day + 2) / 153;
	day -= (153 * month + 2) / 5;
	string_format(out, 16, "%04u-%02u-%02u", era * 400 + year + month / 10,
		(month + 2) % 12 + 1, day + 1);
	return out;
}

/* The time by UTC (ISO 8601). */
static void text_time(struct text *t, const struct timespec *ts)
{
	const uint64_t day = (uint64_t)ts->tv_sec / 86400;
	const unsigned s = (unsigned)(ts->tv_sec % 86400);
	char date[16];

	text_format(t, "%sT%02u:%02u:%02u.%03uZ ", date_format((unsigned)day + 719468, date),
		s / 3600, s / 60 % 60, s % 60, (unsigned)ts->tv_nsec / 1000000);
}

/* ---- diagnostics ---- */

/* Before the loop: a line, which is in scratch. 1, or 0: it can't be written. */
static int scratch_print(int fd, size_t len)
{
	scratch[len] = '\n';
	return write(fd, scratch, len + 1) > 0;
}

#define print(fd, ...) scratch_print(fd, string_format(scratch, sizeof scratch, __VA_ARGS__))

/* Before the loop: says what is wrong and ends. */
#define die(...) (print(STDERR_FILENO, "wssproxy: " __VA_ARGS__), exit(1))

/* An entry of config.h is looked at from now on. */
static void entry_look(const char *name, unsigned i)
{
	string_format(checked, sizeof checked, "%s[%u]", name, i);
}

/* Says the fault that was found in config.h and goes on: one run tells all there are. */
static void wrong_say(void)
{
	print(STDERR_FILENO, "wssproxy: config.h: %s%s", checked, fault);
	faults_found++;
}

#define wrong(is, ...) \
	((is) ? (string_format(fault, sizeof fault, __VA_ARGS__), wrong_say()) : (void)0)

/* Whether the next line goes to the syslog daemon: connects the log's socket to it. */
static int log_connect(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX, .sun_path = "/dev/log" };

	return log_syslog = log_to == SYSLOG && connect(log_socket, (void *)&sun, sizeof sun) == 0;
}

/* Begins the log's one next line. What came from outside must have gone through log_escape. */
static struct text log_begin(int priority)
{
	static char line[LOG_LINE];
	struct text t = { .p = line, .size = sizeof line - 1 };
	struct timespec ts;

	if (log_syslog || log_connect()) {
		text_format(&t, "<%d>wssproxy[%d]: ", LOG_DAEMON | priority, (int)getpid());
	} else if (log_time) {
		clock_gettime(CLOCK_REALTIME, &ts);
		text_time(&t, &ts);
	}
	if (make_way && copied && !log_syslog)
		text_format(&t, "[%d] ", (int)getpid());
	return t;
}

/* Ends and writes it. The loop does not wait for a slow reader of the log: a line that can't be
 * written at once is counted and dropped, or its rest. A pipe with POLLOUT takes PIPE_BUF bytes
 * without blocking, a terminal that could not be opened again less than that: its flag is all
 * processes' that have it from the same parent, so it is set for the calls alone. */
static void log_end(struct text *t)
{
	static int cut;         /* 1: the last line lacks its end */
	struct pollfd p = { .fd = log_fd, .events = POLLOUT };
	ssize_t n = -1;

	if (log_syslog) {
		n = write(log_socket, t->p, t->len);
		/* a daemon that was started again has another socket */
		if (n < 0 && errno != EAGAIN && log_connect())
			n = write(log_socket, t->p, t->len);
	} else if (poll(&p, 1, 0) == 1) {
		t->p[t->len++] = '\n';
		if (log_flags >= 0)
			fcntl(log_fd, F_SETFL, log_flags | O_NONBLOCK);
		cut = cut && write(log_fd, "\n", 1) < 1;
		n = cut ? -1 : write(log_fd, t->p, t->len);
		cut |= n > 0 && n < (ssize_t)t->len;
		if (log_flags >= 0)
			fcntl(log_fd, F_SETFL, log_flags);
	}
	totals.log_lost += n < (ssize_t)t->len;
}

/* One line to the log, of a format. */
__attribute__((format(printf, 2, 3)))
static void log_line(int priority, const char *format, ...)
{
	struct text t = log_begin(priority);
	va_list ap;

	va_start(ap, format);
	text_append(&t, format, ap);
	va_end(ap);
	log_end(&t);
}

/* Copies bytes from outside so that they stay one word of one line: all but visible ASCII, and
 * the quote, backslash and equals sign, become \xNN. Cut to size. */
static void log_escape(char *out, size_t size, const char *in, size_t len)
{
	struct text t = { .p = out, .size = size };

	for (size_t i = 0; i < len && t.len + 5 <= size; i++) {
		const unsigned char c = (unsigned char)in[i];

		if (c > ' ' && c < 0x7f && !strchr("\"\\=", c))
			text_add(&t, in + i, 1);
		else
			text_format(&t, "\\x%02x", c);
	}
	out[t.len] = '\0';
}

static const char *or_dash(const char *s)
{
	return *s ? s : "-";
}

/* Where the log goes. The daemon's socket is opened before chroot; while there is no daemon, stderr
 * serves. A terminal or console that is slow, or was stopped, is opened again, for a description of
 * its own that does not block; without /proc, see log_end. */
static void log_open(void)
{
	const int fd = isatty(STDERR_FILENO) ?
		open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) : log_fd;

	if (fd >= 0)
		log_fd = fd;
	else
		log_flags = fcntl(STDERR_FILENO, F_GETFL);
	if (log_to != SYSLOG)
		return;
	log_socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (!log_connect())
		log_line(LOG_WARNING, "warning log_to: /dev/log: %s: stderr has the log until a "
			"syslog daemon is there", strerror(errno));
}

/* ---- lists, hashes, time and timers ---- */

static int link_alone(const struct link *l)
{
	return !l->next || l->next == l;
}

static void link_drop(struct link *l)
{
	if (l->next) {
		l->prev->next = l->next;
		l->next->prev = l->prev;
	}
	l->prev = l->next = l;
}

/* Moves l from where it is to the end of the list. */
static void link_append(struct link *list, struct link *l)
{
	link_drop(l);
	l->prev = list->prev;
	l->next = list;
	list->prev->next = l;
	list->prev = l;
}

/* Hashes that tell apart, not ones that protect; the same on every machine. The finish of
 * splitmix64 spreads what FNV-1a leaves in the low bits. */
static uint64_t hash_mix(uint64_t h)
{
	h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
	h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
	return h ^ (h >> 31);
}

static uint64_t hash_bytes(uint64_t h, const void *data, size_t len)
{
	const unsigned char *p = data;

	for (h ^= 0xcbf29ce484222325; len > 0; len--)
		h = (h ^ *p++) * 0x100000001b3;
	return hash_mix(h);
}

static void clock_read(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	now = (uint64_t)t.tv_sec * 1000 + (unsigned)t.tv_nsec / 1000000;
}

/* Starts or restarts a timer. All of a queue run equally long, so appending keeps its order. */
static void timer_start(struct queue *q, struct timer *t)
{
	t->due = q->ms == 0 ? UINT64_MAX : now + q->ms;
	link_append(&q->list, &t->link);
}

/* Takes out the first timer of a queue if it is due, else NULL. */
static struct timer *timer_take(const struct queue *q)
{
	struct timer *t = OWNER(q->list.next, struct timer, link);

	if (link_alone(&q->list) || t->due > now)
		return NULL;
	link_drop(&t->link);
	return t;
}

/* ---- pools ---- */

static int pool_empty(const struct pool *p)
{
	return p->lent == p->count;
}

/* Whether somebody waits for an item: all are lent, or what is left is not for those who wait. */
static int pool_wanted(const struct pool *p)
{
	return !link_alone(&p->waiters);
}

/* An item, NULL when all are lent. */
static void *pool_lend(struct pool *p)
{
	void *item = p->free;

	if (pool_empty(p))
		return NULL;
	p->lent++;
	if (!item)
		return p->base + p->size * p->fresh++;
	memcpy(&p->free, item, sizeof p->free);
	return item;
}

static void pool_return(struct pool *p, void *item)
{
	memcpy(item, &p->free, sizeof p->free);
	p->free = item;
	p->lent--;
}

/* ---- addresses ---- */

/* IPv4 that came through IPv6 is IPv4. */
static void address_unmap(struct address *a)
{
	if (a->any.sa_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&a->in6.sin6_addr))
		return;
	a->any.sa_family = AF_INET;
	memcpy(&a->in.sin_addr, a->in6.sin6_addr.s6_addr + 12, 4);
}

static const unsigned char *address_ip(const struct address *a)
{
	return a->any.sa_family == AF_INET ? (const unsigned char *)&a->in.sin_addr :
		a->in6.sin6_addr.s6_addr;
}

/* Its leading bits; what is behind them in key stays as it is. */
static void address_prefix(unsigned char *key, const unsigned char *ip, unsigned bits)
{
	memcpy(key, ip, (bits + 7) / 8);
	if (bits % 8)
		key[bits / 8] &= (unsigned char)(0xff00 >> bits % 8);
}

/* Whether it is a socket's path, not an address or a name. */
static int is_unix(const struct backend *b)
{
	return strncmp(b->host, "unix:", 5) == 0;
}

/* RFC 5952: "::" for the first of the longest runs of zeros above one. musl's brings printf. */
static void text_ip6(struct text *t, const unsigned char ip[16])
{
	unsigned i, run = 0, longest = 1, from = 8;

	for (i = 0; i < 8; i++) {
		run = ip[2 * i] | ip[2 * i + 1] ? 0 : run + 1;
		if (run > longest) {
			longest = run;
			from = i + 1 - run;
		}
	}
	for (i = 0; i < 8; i++) {
		if (i == from) {
			text_string(t, "::");
			i += longest - 1;
		} else {
			text_format(t, i == 0 || i == from + longest ? "%x" : ":%x",
				(unsigned)ip[2 * i] << 8 | ip[2 * i + 1]);
		}
	}
}

/* "192.0.2.9" or "2001:db8::1"; "192.0.2.9:443" or "[2001:db8::1]:443". Until the next call. */
static const char *address_format(const struct address *a, int with_port)
{
	static char out[INET6_ADDRSTRLEN + 8];
	struct text t = { .p = out, .size = sizeof out - 1 };
	const unsigned char *ip = address_ip(a);

	if (a->any.sa_family == AF_INET) {
		text_format(&t, "%u.%u.%u.%u", ip[0], ip[1], ip[2], ip[3]);
	} else {
		text_string(&t, with_port ? "[" : "");
		text_ip6(&t, ip);
		text_string(&t, with_port ? "]" : "");
	}
	if (with_port)
		text_format(&t, ":%u", ntohs(a->in.sin_port));
	out[t.len] = '\0';
	return out;
}

static int is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Digits only, at most 18 of them. */
static int number_parse(const char *p, size_t len, uint64_t *out)
{
	*out = 0;
	for (size_t i = 0; i < len; i++) {
		if (!is_digit(p[i]))
			return 0;
		*out = *out * 10 + (uint64_t)(p[i] - '0');
	}
	return len > 0 && len <= 18;
}

/* A literal and a decimal port. 1 if it is one, 0 if not (then it may be a name). */
static int address_parse(struct address *a, const char *host, const char *port)
{
	uint64_t n;

	memset(a, 0, sizeof *a);
	if (!host || !port || !number_parse(port, strlen(port), &n) || n > 65535)
		return 0;
	a->in.sin_port = htons((uint16_t)n);
	a->any.sa_family = AF_INET6;
	if (inet_pton(AF_INET6, host, &a->in6.sin6_addr) == 1)
		return 1;
	a->any.sa_family = AF_INET;
	return inet_pton(AF_INET, host, &a->in.sin_addr) == 1;
}

/* ---- PEM and keys ---- */

/* Takes an object of a PEM file by its name. NULL: taken; pem_other; or what is wrong. */
typedef const char *pem_take(void *owner, const char *name, const unsigned char *der, size_t len);
static const char pem_other[] = "";

/* Reads a text, which is lost: DER is shorter, and written over it. The decoder wants no CR, and a
 * last newline, which editors forget: text[len] is room for it. NULL, what is wrong, or `none`. */
static const char *pem_walk(pem_take *take, void *owner, char *text, size_t len, const char *none)
{
	struct text der = { .p = text, .size = len };
	br_pem_decoder_context dc;
	const char *error = NULL;
	size_t i, n = 0;
	int inside = 0;

	for (i = 0; i < len; i++)
		if (text[i] != '\r')
			text[n++] = text[i];
	text[n++] = '\n';
	br_pem_decoder_init(&dc);
	for (i = 0; i < n && !error; ) {
		i += br_pem_decoder_push(&dc, text + i, n - i);
		switch (br_pem_decoder_event(&dc)) {
		case BR_PEM_BEGIN_OBJ:
			inside = 1;
			der.len = 0;
			br_pem_decoder_setdest(&dc, text_add, &der);
			break;
		case BR_PEM_END_OBJ:
			inside = 0;
			error = take(owner, br_pem_decoder_name(&dc),
				(unsigned char *)der.p, der.len);
			none = error ? none : NULL;
			error = error == pem_other ? NULL : error;
			break;
		case BR_PEM_ERROR:
			error = "not valid PEM, or encrypted: decrypt it (openssl pkey)";
		}
	}
	wipe(&dc, sizeof dc);           /* may hold bytes of a key */
	return error ? error : inside ? "ends inside a PEM object" : none;
}

static int is_certificate(const char *name, size_t len)
{
	return len && (strcmp(name, "CERTIFICATE") == 0 || strcmp(name, "X509 CERTIFICATE") == 0);
}

static const char *chain_add(void *owner, const char *name, const unsigned char *der, size_t len)
{
	struct identity *id = owner;
	unsigned char *p = id->der + id->der_len;

	if (!is_certificate(name, len))
		return pem_other;
	if (id->chain_len == CHAIN_MAX)
		return "more certificates than CHAIN_MAX";
	if (len > sizeof id->der - id->der_len)
		return "larger than CHAIN_BYTES";
	memcpy(p, der, len);
	id->der_len += len;
	id->chain[id->chain_len++] = (br_x509_certificate){ p, len };
	return NULL;
}

static const char *key_add(void *owner, const char *name, const unsigned char *der, size_t len)
{
	br_skey_decoder_context *key = &((struct identity *)owner)->key;
	const char *kind = bytes_find(name, strlen(name), "PRIVATE KEY", 11);

	if (strcmp(name, "ENCRYPTED PRIVATE KEY") == 0)
		return "the key is encrypted: decrypt it (openssl pkey)";
	if (!kind || strcmp(kind, "PRIVATE KEY") != 0)
		return pem_other;
	if (br_skey_decoder_key_type(key))
		return "more than one private key";
	br_skey_decoder_push(key, der, len);
	return br_skey_decoder_last_error(key) ? "not an RSA (up to 4096 bits) or EC key" : NULL;
}

/* For the log: a subject's common name, or its last attribute of X.520. */
static void subject_text(char *out, size_t size, const unsigned char *p, const unsigned char *end)
{
	const unsigned char *name = NULL;

	for (; end - p > 7 && !(name && name[4] == 3); p++)
		if (memcmp(p, "\6\3\x55\4", 4) == 0 && p[6] < 0x80 && p[6] <= end - p - 7)
			name = p;
	log_escape(out, size, name ? (const char *)name + 7 : "-", name ? name[6] : 1);
}

static unsigned char *anchor_keep(struct text *kept, const void *data, size_t len)
{
	unsigned char *p = (unsigned char *)kept->p + kept->len;

	text_add(kept, data, len);
	return p;
}

/* A certificate becomes a trust anchor: its subject and its key. One of a kind that BearSSL does
 * not know takes no others with it: bundles grow by such, at an update that nobody watches. */
static const char *anchor_add(void *owner, const char *name, const unsigned char *der, size_t len)
{
	struct keyring *ring = owner;
	struct text *kept = &ring->kept, before = *kept;
	br_x509_trust_anchor *a = &ring->anchor[ring->anchors];
	br_x509_decoder_context dc;
	char subject[80];

	if (!is_certificate(name, len))
		return pem_other;
	if (ring->anchors == ANCHORS_MAX)
		return "more certificates than ANCHORS_MAX";
	br_x509_decoder_init(&dc, text_add, kept);
	br_x509_decoder_push(&dc, der, len);
	const br_x509_pkey *pk = br_x509_decoder_get_pkey(&dc);
	a->dn = (br_x500_name){ (unsigned char *)before.p + before.len, kept->len - before.len };
	if (!pk || (pk->key_type == BR_KEYTYPE_RSA && pk->key.rsa.nlen > 512)) {
		if (ring->read->one)
			return "it is not valid X.509 with an RSA (up to 4096 bits) or EC key";
		subject_text(subject, sizeof subject, a->dn.data, a->dn.data + a->dn.len);
		log_line(LOG_WARNING, "warning %s: %s: subject=%s is skipped: not valid X.509 with "
			"an RSA (up to 4096 bits) or EC key", checked, ring->read->path, subject);
		*kept = before;
		return pem_other;
	}
	a->pkey = *pk;
	a->flags = br_x509_decoder_isCA(&dc) ? BR_X509_TA_CA : 0;
	if (pk->key_type == BR_KEYTYPE_RSA) {
		a->pkey.key.rsa.n = anchor_keep(kept, pk->key.rsa.n, pk->key.rsa.nlen);
		a->pkey.key.rsa.e = anchor_keep(kept, pk->key.rsa.e, pk->key.rsa.elen);
	} else {
		a->pkey.key.ec.q = anchor_keep(kept, pk->key.ec.q, pk->key.ec.qlen);
	}
	if (kept->full)
		return "more certificates than ANCHOR_BYTES hold";
	ring->anchors++;
	return NULL;
}

/* Whether what one signs, the other verifies: BearSSL computes no modulus of 4096 bits. */
static int key_matches_rsa(const br_rsa_private_key *sk, const br_rsa_public_key *pk)
{
	const unsigned char *oid = BR_HASH_OID_SHA256;
	unsigned char hash[br_sha256_SIZE] = { 1 }, back[br_sha256_SIZE], signature[512];
	size_t len = (sk->n_bitlen + 7) / 8;

	return len <= sizeof signature &&
		br_rsa_pkcs1_sign_get_default()(oid, hash, sizeof hash, sk, signature) &&
		br_rsa_pkcs1_vrfy_get_default()(signature, len, oid, sizeof back, pk, back) &&
		memcmp(hash, back, sizeof hash) == 0;
}

/* Whether the key is that of the chain's first certificate. NULL, or what is wrong. */
static const char *identity_check(const struct identity *id)
{
	const br_rsa_private_key *rsa = br_skey_decoder_get_rsa(&id->key);
	const br_ec_private_key *ec = br_skey_decoder_get_ec(&id->key);
	unsigned char q[BR_EC_KBUF_PUB_MAX_SIZE];
	br_x509_decoder_context dc;

	br_x509_decoder_init(&dc, NULL, NULL);
	br_x509_decoder_push(&dc, id->chain[0].data, id->chain[0].data_len);
	const br_x509_pkey *pk = br_x509_decoder_get_pkey(&dc);
	if (!pk)
		return "its first certificate is not valid X.509 with an RSA or EC key";
	if (pk->key_type == BR_KEYTYPE_RSA ? rsa && key_matches_rsa(rsa, &pk->key.rsa) :
	    ec && ec->curve == pk->key.ec.curve &&
	    br_ec_compute_pub(br_ec_get_default(), NULL, q, ec) == pk->key.ec.qlen &&
	    memcmp(q, pk->key.ec.q, pk->key.ec.qlen) == 0)
		return NULL;
	return "its first certificate is not that of the key";
}

/* What files are read for; LOOK: once, but to say which of them SIGHUP will not find. */
static enum { START, LOOK, RELOAD } reads;

/* Says what is wrong with a file, unless NULL. 1: nothing is, or it does not matter now. */
static int fault_none(const char *path, const char *what)
{
	if (!what)
		return 1;
	string_format(fault, sizeof fault, ": %s: %s", path, what);
	if (reads == LOOK)
		log_line(LOG_WARNING, "warning %s%s for user and chroot_dir: SIGHUP will fail",
			checked, fault);
	else if (reads == RELOAD)
		log_line(LOG_ERR, "reload failed config.h: %s%s: the old certificates stay",
			checked, fault);
	else
		wrong_say();
	return reads == LOOK;
}

/* Reads a file into file_text, all of it and a NUL. NULL, or what is wrong. */
static const char *file_read(const char *path, size_t *len)
{
	const size_t room = sizeof file_text - 1;
	const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	ssize_t n = fd;                 /* below 0: errno says why */

	*len = 0;
	while (n >= 0 && *len < room && (n = read(fd, file_text + *len, room - *len)) > 0)
		*len += (size_t)n;
	const char *what = n < 0 ? strerror(errno) : *len == room ? "too large" : NULL;
	file_text[*len] = '\0';
	close(fd);
	return what;
}

/* Reads a PEM file. 1, or 0 and the fault. */
static int pem_load(pem_take *take, void *owner, const char *path, const char *none)
{
	size_t len;
	const char *what = file_read(path, &len);

	if (!what && reads != LOOK)
		what = pem_walk(take, owner, file_text, len, none);
	wipe(file_text, len + 1);
	return fault_none(path, what);
}

/* Without files there is none, which is right, or was said to be wrong. */
static int identity_load(struct identity *id, const char *chain, const char *key)
{
	struct stat st;

	id->chain_len = id->der_len = 0;
	br_skey_decoder_init(&id->key);
	if (!chain || !key)
		return 1;
	const int good = pem_load(chain_add, id, chain, "no certificate in it") &
		pem_load(key_add, id, key, "no private key in it");
	if (!good || reads == LOOK)
		return good;
	if (stat(key, &st) == 0 && (st.st_mode & (S_IRWXG | S_IRWXO)))
		log_line(LOG_WARNING, "warning key=%s is open to group or others: chmod 600", key);
	return fault_none(chain, identity_check(id));
}

/* Whose client certificates a listener wants to see; NULL: it asks for none. */
__attribute__((always_inline)) static inline const char *listener_ca(unsigned i)
{
	const struct listener *l = &listeners[i];

	return l->kind != WSS || l->verify_client == VERIFY_OFF ? NULL :
		l->client_ca ? l->client_ca : client_ca;
}

/* Whether any may. The compiler knows of up to four, and leaves out what is for that alone. */
__attribute__((always_inline)) static inline int clients_asked(void)
{
#define ASKS(i) (LISTENERS > (i) && listener_ca(LISTENERS > (i) ? (i) : 0))
	return ASKS(0) || ASKS(1) || ASKS(2) || ASKS(3) || LISTENERS > 4;
#undef ASKS
}

/* Those who trust the same file in the same way share what is read of it: it may be a bundle. */
static int trust_load(struct keyring *ring, struct trust *t, const char *path, int one)
{
	const struct trust *same = ring->trust;

	*t = (struct trust){ ring->anchors, 0, path, one };
	if (!path)
		return 1;
	while (!same->path || same->one != one || strcmp(same->path, path) != 0)
		same++;         /* at the latest, it is t */
	if (same < t) {
		*t = *same;
		return 1;
	}
	ring->read = t;
	if (!pem_load(anchor_add, ring, path, "no certificate in it that can be used"))
		return 0;
	t->count = ring->anchors - t->first;
	return fault_none(path, one && t->count > 1 ?
		"one certificate is wanted, there are several" : NULL);
}

/* Leaves nothing of its keys. */
static void keyring_wipe(struct keyring *ring)
{
	for (unsigned i = 0; i < LENGTH(ring->id); i++)
		wipe(ring->id[i].room, sizeof ring->id[i].room);
}

/* Fills a keyring with what config.h names. 1, or 0: it said each fault. */
static int keyring_load(struct keyring *ring)
{
	int good = 1;

	ring->anchors = 0;
	ring->kept = (struct text){ .p = ring->bytes, .size = sizeof ring->bytes };
	for (unsigned i = 0; i < CERTS; i++) {
		entry_look("certs", i);
		good &= identity_load(&ring->id[i], certs[i].chain, certs[i].key);
	}
	for (unsigned i = 0; clients_asked() && i < LISTENERS; i++) {
		entry_look(listeners[i].client_ca ? "listeners" : "client_ca", i);
		good &= trust_load(ring, &ring->trust[i], listener_ca(i), 0);
	}
	for (unsigned i = 0; tls_backends && i < BACKENDS; i++) {
		const struct backend *b = &backends[i];
		const int one = b->tls == TLS_PIN;

		entry_look("backends", i);
		good &= identity_load(&ring->id[CERTS + i], b->cert, b->key);
		good &= trust_load(ring, &ring->trust[LISTENERS + i],
			one || b->tls == TLS_VERIFY ? b->ca : NULL, one);
	}
	return good;
}

/* ---- sockets ---- */

static int would_block(int error)
{
	return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}

/* Our machine's errors, not the other side's: no descriptor, memory, port, or room in the set. */
static int is_our_shortage(int error)
{
	return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM ||
		error == EADDRNOTAVAIL || error == ENOSPC;
}

/* What the kernel lacks we do without. */
static void socket_option(int fd, int level, int name, unsigned value)
{
	setsockopt(fd, level, name, &value, sizeof value);
}

/* How a peer that says nothing is found to be gone; idle_s = 0: not at all. */
static void socket_keepalive(int fd, unsigned idle_s, unsigned interval_s, unsigned probes,
	unsigned timeout_ms)
{
	socket_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, timeout_ms);
	socket_option(fd, IPPROTO_TCP, TCP_KEEPCNT, probes);
	socket_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, interval_s);
	socket_option(fd, SOL_SOCKET, SO_KEEPALIVE, idle_s > 0);
	socket_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, idle_s);   /* the last: it sends what is due */
}

/* What both sides' connections have; accepted ones inherit it from their listener. */
static void socket_tune(int fd)
{
	socket_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	socket_keepalive(fd, keepalive_s, keepalive_interval_s, keepalive_probes, user_timeout_ms);
	socket_option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT);
}

/* Makes close send RST instead of FIN. */
static void socket_abort(int fd)
{
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 }, sizeof(struct linger));
}

/* What has happened to a connection, 0: nothing. */
static int socket_error(int fd)
{
	int error = 0;

	getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &(socklen_t){ sizeof error });
	return error;
}

/* Bytes that its peer has yet to acknowledge. (musl's ioctl knows other devices', too: 2 KB.) */
static int socket_unsent(int fd)
{
	int n;

	return syscall(SYS_ioctl, fd, TIOCOUTQ, &n) == 0 ? n : 0;
}

/* Milliseconds since TCP has heard of the peer; without TCP it is heard of all the time. */
static uint32_t socket_silent(int fd, struct tcp_info *info)
{
	memset(info, 0, sizeof *info);
	getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &(socklen_t){ sizeof *info });
	return info->tcpi_last_data_recv < info->tcpi_last_ack_recv ? info->tcpi_last_data_recv :
		info->tcpi_last_ack_recv;
}

/* A listening socket for an address, -1 and errno. */
static int listener_bind(const struct address *a, int dual)
{
	int fd = socket(a->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -1;
	socket_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	socket_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, !dual);    /* IPv4 has no such option */
	socket_tune(fd);
	if (bind(fd, &a->any, sizeof *a) == 0 && listen(fd, SOMAXCONN) == 0)
		return fd;
	close(fd);              /* which leaves errno alone */
	return -1;
}

/* ---- making way ----
 *
 * Who is started while another makes way takes over that one's listening sockets themselves, with
 * the connections in their queues, half-open ones as well: none is lost, whatever the kernel. (Its
 * own beside them, by SO_REUSEPORT, would lack those; and from then on any program of that user
 * could bind there: since Linux 4.11 the kernel remembers that the port was shared.) So each
 * listener has a door, a unix: socket of an abstract name, which chroot does not hide: who finds
 * the address in use knocks there. Who serves turns it away; the copy that makes way hands it the
 * listener, and the door. Each looks whether the other is, or was at its start, the same user. */

/* Sends a listener and its door, or receives them. Whether it could. */
static int handover(int fd, int pair[2], int receive)
{
	_Alignas(struct cmsghdr) char room[CMSG_SPACE(2 * sizeof(int))] = { 0 };
	struct iovec byte = { &(char){ 0 }, 1 };        /* there must be one */
	struct msghdr m = { .msg_iov = &byte, .msg_iovlen = 1,
		.msg_control = room, .msg_controllen = sizeof room };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	*c = (struct cmsghdr){ .cmsg_len = CMSG_LEN(2 * sizeof(int)), .cmsg_level = SOL_SOCKET,
		.cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(c), pair, 2 * sizeof(int));
	if (!receive)
		return sendmsg(fd, &m, MSG_NOSIGNAL) == 1;
	if (recvmsg(fd, &m, MSG_CMSG_CLOEXEC) != 1 || m.msg_controllen < CMSG_LEN(0) ||
	    c->cmsg_len != CMSG_LEN(2 * sizeof(int)))
		return 0;
	memcpy(pair, CMSG_DATA(c), 2 * sizeof(int));
	return 1;
}

/* Who the other end of a unix: socket was when it connected, or a listening one when that began. */
static uid_t socket_user(int fd)
{
	struct ucred who = { .uid = (uid_t)-1 };

	getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &(socklen_t){ sizeof who });
	return who.uid;
}

/* A socket at the door of an address: it listens there, or knocks. -1 and errno. */
static int door_socket(const struct address *a, int listens)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	const socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
		string_format(sun.sun_path + 1, sizeof sun.sun_path - 1, "wssproxy %s",
			address_format(a, 1)));
	const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (listens ? bind(fd, (void *)&sun, len) == 0 && listen(fd, SOMAXCONN) == 0 :
	    connect(fd, (void *)&sun, len) == 0)
		return fd;
	close(fd);              /* which leaves errno alone */
	return -1;
}

/* Asks for the listener of an address that is in use, and its door, if who has them makes way. */
static void door_knock(const struct address *a, int pair[2])
{
	const int fd = door_socket(a, 0);
	struct pollfd p = { .fd = fd, .events = POLLIN };

	if (fd >= 0 && socket_user(fd) == geteuid() && poll(&p, 1, WAY_MS) == 1 &&
	    handover(fd, pair, 1))
		socket_tune(pair[0]);   /* as this config.h has it */
	close(fd);
	errno = EADDRINUSE;
}

static const char *const kinds[] = { "WSS", "WS", "REDIRECT" };

static void listener_open(unsigned i)
{
	const struct listener *l = &listeners[i];
	const int dual = strcmp(l->address, "::") == 0;
	struct address a;

	address_parse(&a, l->address, l->port);
	int pair[2] = { listener_bind(&a, dual), -1 };
	if (pair[0] < 0 && dual && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)) {
		a.any.sa_family = AF_INET;      /* a kernel without IPv6 */
		pair[0] = listener_bind(&a, dual);
	}
	if (make_way && pair[0] < 0 && errno == EADDRINUSE)
		door_knock(&a, pair);
	if (pair[0] < 0)
		die("config.h: listeners[%u]: %s port %s: %s", i, l->address, l->port,
			strerror(errno));
	getsockname(pair[0], &a.any, &(socklen_t){ sizeof a });
	address_unmap(&a);
	if (make_way && pair[1] < 0 && (pair[1] = door_socket(&a, 1)) < 0)
		log_line(LOG_WARNING, "warning make_way: unix: socket \"@wssproxy %s\": %s: nobody "
			"can take over this listener", address_format(&a, 1), strerror(errno));
	fds[FD_LISTEN + i].fd = pair[0];
	fds[FD_DOOR + i].fd = pair[1];
	log_line(LOG_INFO, "listen address=%s kind=%s", address_format(&a, 1), kinds[l->kind]);
}

/* ---- privileges ---- */

static unsigned become_uid, become_gid; /* who it becomes, found while /etc is in sight */

/* The number in a field, from 0, of a line like that of a user. UINT_MAX: there is none. */
static unsigned id_parse(const char *line, unsigned field)
{
	uint64_t n;

	for (; *line && field > 0; line++)
		field -= *line == ':';
	return number_parse(line, strcspn(line, ":"), &n) && n < UINT_MAX ? (unsigned)n : UINT_MAX;
}

/* An id of a user or group: it is a number, or in the line of /etc that begins with the name.
 * getpwnam is 20 KB of a static program, which would ask no LDAP either. */
static unsigned id_find(const char *entry, const char *name, const char *path, unsigned field)
{
	const size_t name_len = strlen(name);
	unsigned id = id_parse(name, 0);
	size_t len;

	if (id != UINT_MAX)
		return id;
	const char *what = file_read(path, &len);
	while (what && len > 0 && file_text[len - 1] != '\n')
		file_text[--len] = '\0';        /* a line that is cut */
	for (char *l = strtok(file_text, "\n"); l && id == UINT_MAX; l = strtok(NULL, "\n"))
		if (strncmp(l, name, name_len) == 0 && l[name_len] == ':')
			id = id_parse(l, field);
	if (id == UINT_MAX)
		die("config.h: %s \"%s\": %s: %s: add it, or give a number", entry, name, path,
			what ? what : "not in there, and LDAP and the like are not asked");
	return id;
}

static void become_find(void)
{
	become_uid = user ? id_find("user", user, "/etc/passwd", 2) : getuid();
	become_gid = group ? id_find("group", group, "/etc/group", 2) :
		user ? id_find("user", user, "/etc/passwd", 3) : getgid();
}

/* Nothing of a key is to be found in a core file, or by another process of the same user. */
static void core_forbid(void)
{
	prlimit(0, RLIMIT_CORE, &(struct rlimit){ 0, 0 }, NULL);
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

/* Calls of the kernel's own: musl's setuid and the like stop all other threads first, of which
 * there are none, with 5 KB. On 32-bit machines the first numbers take 16 bits. */
#ifdef SYS_setuid32
#define ID_CALL(name) SYS_##name##32
#else
#define ID_CALL(name) SYS_##name
#endif

/* For good: checks that there is no way back. */
static void become_do(const char *root)
{
	const int changes = user || group;
	struct { uint32_t version; int pid; } header = { 0x20080522, 0 };       /* version 3 */
	static const struct { uint32_t effective, permitted, inheritable; } none[2];

	if (root && (chroot(root) < 0 || chdir("/") < 0))
		die("config.h: chroot_dir \"%s\": %s", root, strerror(errno));
	for (unsigned long i = 0; prctl(PR_CAPBSET_READ, i, 0, 0, 0) >= 0; i++)
		prctl(PR_CAPBSET_DROP, i, 0, 0, 0);     /* others than root have none */
	if (changes && syscall(ID_CALL(setgroups), 1, &become_gid) < 0 && errno != EPERM)
		die("config.h: group: setgroups: %s", strerror(errno));
	if (changes && syscall(ID_CALL(setgid), become_gid) < 0)
		die("config.h: group: setgid %u: %s", become_gid, strerror(errno));
	if (changes && syscall(ID_CALL(setuid), become_uid) < 0)
		die("config.h: user: setuid %u: %s", become_uid, strerror(errno));
	/* No capability in any set: ports are bound and keys are read. The ambient set follows the
	 * permitted one. What a kernel without CONFIG_MULTIUSER can't do, it can't. */
	if (syscall(SYS_capset, &header, none) < 0 && errno != ENOSYS)
		die("capset: %s", strerror(errno));
	if (changes && ((become_uid != 0 && syscall(ID_CALL(setuid), 0) == 0) ||
	    (become_gid != 0 && syscall(ID_CALL(setgid), 0) == 0)))
		die("config.h: user: root can be regained");
	/* kernels that lack it have no filter either, which is said */
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 && errno != EINVAL && errno != ENOSYS)
		die("prctl: PR_SET_NO_NEW_PRIVS: %s", strerror(errno));
	core_forbid();          /* which a change of user may have undone */
}

/* What is not, or will not be, as it should: files out of SIGHUP's reach, or a syslog daemon. */
static void become_warn(void)
{
	reads = LOOK;
	keyring_load(&keyrings[1]);
	reads = RELOAD;
	if (!user && getuid() == 0)
		log_line(LOG_WARNING, "warning user: it stays root, without capabilities: name "
			"another in config.h");
	if (log_to == SYSLOG && chroot_dir && access("/dev/log", F_OK) < 0)
		log_line(LOG_WARNING, "warning chroot_dir: dev/log in it: %s: a syslog daemon that "
			"starts later is not found", strerror(errno));
}

/* ---- the system calls that the loop makes ----
 *
 * Once it runs, a call that is not on the list ends the process with SIGSYS; the kernel's log names
 * its number. A list is a program of the kernel's packet filter over struct seccomp_data: number at
 * 0, machine at 4, arguments from 16, 64 bits each; written out, for a libc may come without the
 * kernel's headers. Numbers are one machine's, so that comes first, and x32 has its own. There are
 * those for what glibc and musl make of our calls, hot ones first (clock_gettime: without vDSO). */

#define FILTER_LITTLE (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0x40000000 : 0)
#if defined(__x86_64__) && !defined(__ILP32__)
#define FILTER_MACHINE (EM_X86_64 | 0xc0000000)         /* 64 bits, little endian */
#elif defined(__i386__)
#define FILTER_MACHINE (EM_386 | 0x40000000)
#elif defined(__ARM_EABI__) && !defined(__ARMEB__)      /* of which kernels disagree */
#define FILTER_MACHINE (EM_ARM | FILTER_LITTLE)
#elif defined(__aarch64__) && !defined(__ILP32__)
#define FILTER_MACHINE (EM_AARCH64 | 0xc0000000)
#elif defined(__riscv) && __riscv_xlen == 64
#define FILTER_MACHINE (243 | 0xc0000000)               /* EM_RISCV */
#elif defined(__mips__) && _MIPS_SIM != _ABIN32
#define FILTER_MACHINE (EM_MIPS | FILTER_LITTLE | (sizeof(long) == 8 ? 0x80000000 : 0))
#endif

struct filter_op {              /* struct sock_filter */
	uint16_t code;
	uint8_t yes, no;        /* to skip */
	uint32_t k;
};

enum { LOAD = 0x20, EQUAL = 0x15, ABOVE = 0x35, AND = 0x54, RETURN = 0x06 };
#define KILL 0x80000000         /* before Linux 4.14: the thread, of which there is one */
#define LET 0x7fff0000
#ifdef FILTER_MACHINE
#define FAIL (0x00050000 | EPERM)
#define FILTER_START { LOAD, 0, 0, 4 }, { EQUAL, 1, 0, FILTER_MACHINE }, { RETURN, 0, 0, KILL }, \
	{ LOAD, 0, 0, 0 }
#define ON(name, verdict) { EQUAL, 0, 1, SYS_##name }, { RETURN, 0, 0, verdict }
/* What becomes of it by those bits of an argument (an int): if they have that value, or unless. */
#define IF(call, argument, mask, value, yes, no, verdict) { EQUAL, 0, 5, call }, \
	{ LOAD, 0, 0, 16 + 8 * (argument) + (FILTER_LITTLE ? 0 : 4) }, \
	{ AND, 0, 0, (uint32_t)(mask) }, \
	{ EQUAL, yes, no, value }, { RETURN, 0, 0, verdict }, { LOAD, 0, 0, 0 }
#define LET_IF(name, argument, mask, value) IF(SYS_##name, argument, mask, value, 0, 1, LET)
#define KILL_UNLESS(name, argument, mask, value) IF(SYS_##name, argument, mask, value, 1, 0, KILL)
#define READING (O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_LARGEFILE)

static struct filter_op loop_calls[] = {
	FILTER_START,
	ON(read, LET), ON(write, LET), ON(recvfrom, LET), ON(sendto, LET),
#ifdef SYS_send
	ON(recv, LET), ON(send, LET),
#endif
	ON(ppoll, LET), ON(epoll_ctl, LET), ON(epoll_pwait, LET), ON(restart_syscall, LET),
#ifdef SYS_poll                         /* all but the youngest machines */
	ON(poll, LET), ON(epoll_wait, LET), ON(stat, LET), LET_IF(open, 1, ~READING, 0),
#endif
#ifndef SYS_clock_gettime
#define SYS_clock_gettime SYS_clock_gettime32   /* musl's name for it */
#endif
	ON(clock_gettime, LET),
#ifdef SYS_clock_gettime64
	ON(clock_gettime64, LET),
#endif
	ON(accept4, LET), ON(connect, LET), ON(close, LET), ON(shutdown, LET), ON(getpid, LET),
	ON(getsockname, LET), ON(getsockopt, LET), ON(setsockopt, LET), ON(getrandom, LET),
	KILL_UNLESS(socket, 1, ~(SOCK_CLOEXEC | SOCK_NONBLOCK), SOCK_STREAM),
	KILL_UNLESS(socket, 2, -1, 0), LET_IF(socket, 0, -1, AF_INET),
	LET_IF(socket, 0, -1, AF_INET6), LET_IF(ioctl, 1, -1, TIOCOUTQ),
#ifdef __i386__
	ON(socketcall, LET),            /* all of the above; its arguments are out of reach */
#endif
#if make_way
	LET_IF(clone, 0, -1, SIGCHLD),  /* a copy that shares nothing, */
	ON(sendmsg, LET),               /* which hands over the listeners */
#endif
	LET_IF(openat, 2, ~READING, 0), /* from here on: certificates, at SIGHUP; and the end */
	LET_IF(fcntl, 1, -1, F_SETFD),  /* musl's open, for O_CLOEXEC */
	LET_IF(fcntl, 1, -1, F_SETFL),  /* a terminal, for each line */
#ifdef SYS_fcntl64                      /* 32 bits */
	LET_IF(fcntl64, 1, -1, F_SETFD), LET_IF(fcntl64, 1, -1, F_SETFL),
	ON(stat64, LET), ON(fstatat64, LET),
#else
	ON(newfstatat, LET),
#endif
#ifdef SYS_statx
	ON(statx, LET),
#endif
	ON(exit_group, LET),
	IF(SYS_socket, 0, -1, AF_UNIX, 0, 1, KILL), /* other daemons', unless a backend is one */
	{ RETURN, 0, 0, KILL },
};

/* Nobody can list what nsswitch.conf makes of the resolver, which parses what comes from outside.
 * What none does fails: programs, other processes, waiting for callers. */
static const struct filter_op resolver_calls[] = {
	FILTER_START,
#ifdef __x86_64__
	{ ABOVE, 0, 1, 0x40000000 }, { RETURN, 0, 0, FAIL },    /* x32 */
#endif
	ON(execve, FAIL), ON(execveat, FAIL),
	ON(ptrace, FAIL), ON(process_vm_readv, FAIL), ON(process_vm_writev, FAIL),
	LET_IF(prlimit64, 0, -1, 0), ON(prlimit64, FAIL),
	ON(kill, FAIL), ON(tkill, FAIL), ON(tgkill, FAIL),
	ON(rt_sigqueueinfo, FAIL), ON(rt_tgsigqueueinfo, FAIL),
#ifdef SYS_io_uring_setup               /* whose calls no filter sees; of the same Linux, 5.1 */
	ON(io_uring_setup, FAIL), ON(pidfd_send_signal, FAIL),
#endif
	ON(listen, FAIL), ON(accept4, FAIL),
	{ RETURN, 0, 0, LET },
};
#else
static const struct filter_op resolver_calls[1];
static struct filter_op loop_calls[8];
#endif
#define UNIX_VERDICT loop_calls[LENGTH(loop_calls) - 3].k       /* on sockets of AF_UNIX */

/* For good. no_new_privs is set. Whether the kernel took it. */
static int filter_set(const struct filter_op *ops, unsigned short n)
{
	const struct { unsigned short n; const struct filter_op *ops; } program = { n, ops };

	return prctl(PR_SET_SECCOMP, 2 /* SECCOMP_MODE_FILTER */, &program, 0, 0) == 0;
}

/* ---- HTTP: pure functions, no I/O ----
 *
 * A head is parsed line by line as it comes: `at` is where the first unfinished line begins, and
 * nothing before `scanned` is looked at again, so a head that comes byte by byte costs no more.
 * Strict (RFC 9112: CRLF only, no folding, no white space before the colon, no control bytes), and
 * what is passed on is rendered anew: backend and proxy can't read the same bytes in two ways. */

/* Where letters, digits, and the others given, end. */
static size_t word_end(const char *buf, size_t at, size_t end, const char *others)
{
	while (at < end && buf[at] && (isalnum((unsigned char)buf[at]) || strchr(others, buf[at])))
		at++;
	return at;
}

static const char in_token[] = "!#$%&'*+-.^_`|~";       /* RFC 9110 5.6.2 */

/* What no text of a head may hold; a tab is white space. */
static int is_control(unsigned char c)
{
	return (c < ' ' && c != '\t') || c == 0x7f;
}

/* From byte `at` up to `end`. */
static struct span span_of(size_t at, size_t end)
{
	return (struct span){ (uint16_t)at, (uint16_t)(end - at) };
}

/* The same without the white space around it. */
static struct span span_trimmed(const char *buf, size_t at, size_t end)
{
	while (at < end && (buf[at] == ' ' || buf[at] == '\t'))
		at++;
	while (end > at && (buf[end - 1] == ' ' || buf[end - 1] == '\t'))
		end--;
	return span_of(at, end);
}

/* In any case. There is no NUL in what was parsed. */
static int span_is(const char *buf, struct span s, const char *word)
{
	return s.len == strlen(word) && strncasecmp(buf + s.at, word, s.len) == 0;
}

/* Takes the next element, trimmed and not empty, off a list (RFC 9110 5.6.1). 0: no more. */
static int list_next(const char *buf, struct span *list, struct span *out)
{
	const size_t end = (size_t)list->at + list->len;
	size_t at = list->at, stop;

	while (at < end && (buf[at] == ',' || buf[at] == ' ' || buf[at] == '\t'))
		at++;
	for (stop = at; stop < end && buf[stop] != ','; stop++)
		;
	*list = span_of(stop, end);
	if (at < stop)
		*out = span_trimmed(buf, at, stop);
	return at < stop;
}

enum {  /* fields that mean something here, and what becomes of them when a head is passed on */
	HOP  = 1,       /* hop-by-hop: dropped (RFC 9110 7.6.1) */
	KEPT = 2,       /* Connection can't take it away: steers, frames, says who the client is */
	LIKE = 4,       /* '_' is as good as '-': to CGI and its heirs both are one variable */
	OURS = 8,       /* the proxy's to write: what a client sent is not believed, */
	PEER = 16,      /* or only with x_forwarded_for = OFF */
	SITE = 32,      /* the host asked for: see struct forwarded */
	BODY = 64,      /* not of an answer that has none (RFC 9110 8.6, RFC 9112 6.1) */
};

enum { NAME_OTHER, NAME_HOST, NAME_ORIGIN, NAME_COOKIE, NAME_LENGTH, NAME_CODING, NAME_CONNECTION,
	NAME_UPGRADE, NAME_KEY, NAME_VERSION, NAME_ACCEPT };

/* The first that fits; one with '-' at its end stands for all that begins so. */
static const struct { const char *text; int flags; } field_names[] = {
	[NAME_HOST] = { "host", KEPT | SITE },
	[NAME_ORIGIN] = { "origin", 0 }, [NAME_COOKIE] = { "cookie", 0 },
	[NAME_LENGTH] = { "content-length", KEPT | BODY },
	[NAME_CODING] = { "transfer-encoding", KEPT | OURS | BODY },
	[NAME_CONNECTION] = { "connection", HOP }, [NAME_UPGRADE] = { "upgrade", HOP },
	[NAME_KEY] = { "sec-websocket-key", KEPT },
	[NAME_VERSION] = { "sec-websocket-version", KEPT },
	[NAME_ACCEPT] = { "sec-websocket-accept", KEPT },
	{ "x-ssl-client-cn", LIKE | OURS }, { "x-forwarded-host", KEPT | LIKE | SITE },
	{ "sec-websocket-", KEPT }, { "proxy-connection", HOP }, { "keep-alive", HOP },
	{ "x-forwarded-for", KEPT | LIKE | PEER }, { "x-forwarded-proto", KEPT | LIKE | PEER },
	{ "x-forwarded-", KEPT | LIKE }, { "x-real-ip", KEPT | LIKE | PEER }, { "te", HOP },
};

static unsigned name_find(const char *buf, struct span s)
{
	for (unsigned k = 1; k < LENGTH(field_names); k++) {
		const char *text = field_names[k].text, *p = buf + s.at;
		size_t i = 0;

		while (i < s.len && text[i] && (tolower((unsigned char)p[i]) == text[i] ||
		    (p[i] == '_' && text[i] == '-' && (field_names[k].flags & LIKE))))
			i++;
		if (!text[i] && (i < s.len) == (text[i - 1] == '-'))
			return k;
	}
	return NAME_OTHER;
}

/* A header line from `at` up to `end`, without its CRLF. */
static int field_parse(struct head *h, const char *buf, size_t at, size_t end)
{
	struct field *f = &h->field[h->nfields];
	const size_t colon = word_end(buf, at, end, in_token);

	if (colon == at || colon == end || buf[colon] != ':')
		return 0;
	f->name = span_of(at, colon);
	f->is = (uint8_t)name_find(buf, f->name);
	f->value = span_trimmed(buf, colon + 1, end);
	h->nfields++;
	return 1;
}

static enum why request_line_parse(struct head *h, const char *buf, size_t end)
{
	const size_t method = word_end(buf, 0, end, in_token);
	const char *space = method < end && buf[method] == ' ' ?
		memchr(buf + method + 1, ' ', end - method - 1) : NULL;

	if (!space || method == 0)
		return WHY_REQUEST_LINE;
	const size_t stop = (size_t)(space - buf);
	h->part[0] = span_of(0, method);
	h->part[1] = span_of(method + 1, stop);
	h->part[2] = span_of(stop + 1, end);
	if (h->part[1].len == 0 || h->part[2].len != 8 || memcmp(space, " HTTP/", 6) != 0 ||
	    !is_digit(space[6]) || space[7] != '.' || !is_digit(space[8]))
		return WHY_REQUEST_LINE;
	for (size_t i = method + 1; i < stop; i++)
		if ((unsigned char)buf[i] <= ' ' || (unsigned char)buf[i] >= 0x7f || buf[i] == '#')
			return WHY_TARGET;
	return memcmp(space + 6, "1.1", 3) == 0 ? WHY_NONE : WHY_HTTP_VERSION;
}

static enum why status_line_parse(struct head *h, const char *buf, size_t end)
{
	/* the reason phrase and even the space before it may be missing */
	if (end < 12 || buf[8] != ' ' || (end > 12 && buf[12] != ' ') ||
	    memcmp(buf, "HTTP/1.", 7) != 0 || (buf[7] != '0' && buf[7] != '1') ||
	    buf[9] < '1' || buf[9] > '5' || !is_digit(buf[10]) || !is_digit(buf[11]))
		return WHY_BAD_RESPONSE;
	h->part[1] = span_of(9, 12);
	h->part[2] = span_of(end > 12 ? 13 : 12, end);
	return WHY_NONE;
}

/* The common part of both parsers; see wssproxy.h. `start` reads the first line. */
static enum why head_parse(struct head *h, const char *buf, size_t len,
	enum why (*start)(struct head *, const char *, size_t))
{
	if (len > head_max)
		len = head_max;
	for (;;) {
		const char *lf = memchr(buf + h->scanned, '\n', len - h->scanned);
		enum why why;

		if (!lf) {
			h->scanned = (uint16_t)len;
			return len < head_max ? WHY_MORE :
				h->at == 0 ? WHY_LONG_TARGET : WHY_LARGE_HEAD;
		}
		const size_t end = (size_t)(lf - buf);
		if (end == h->at || buf[end - 1] != '\r')
			return h->at == 0 ? WHY_REQUEST_LINE : WHY_FIELD;
		if (h->at == 0) {
			if ((why = start(h, buf, end - 1)) != WHY_NONE)
				return why;
		} else if (end - 1 == h->at) {
			h->size = (uint16_t)(end + 1);
			return WHY_NONE;
		} else if (h->nfields == HEAD_FIELDS) {
			return WHY_LARGE_HEAD;
		} else if (!field_parse(h, buf, h->at, end - 1)) {
			return WHY_FIELD;
		}
		for (; h->at < end - 1; h->at++)
			if (is_control((unsigned char)buf[h->at]))
				return WHY_FIELD;
		h->at = h->scanned = (uint16_t)(end + 1);
	}
}

static enum why request_parse(struct request *r, const char *buf, size_t len)
{
	return head_parse(&r->head, buf, len, request_line_parse);
}

static enum why response_parse(struct response *r, const char *buf, size_t len)
{
	enum why why = head_parse(&r->head, buf, len, status_line_parse);

	return why == WHY_NONE || why == WHY_MORE ? why :
		why == WHY_LARGE_HEAD || why == WHY_LONG_TARGET ? WHY_LARGE_RESPONSE :
		WHY_BAD_RESPONSE;
}

struct facts {                  /* what the fields of a head say of the connection and the body */
	struct span value[LENGTH(field_names)]; /* the last one's */
	unsigned count[LENGTH(field_names)];
	int upgrade, close, websocket;  /* Connection has the first two, Upgrade the third */
	unsigned options;       /* of Connection, the empty ones among them */
	int bad_framing;        /* Content-Length is no number, or two differ, or with a coding */
	uint64_t length;
};

/* Connection lists that name. */
static void option_read(struct facts *f, struct head *h, const char *buf, struct span option)
{
	f->upgrade |= span_is(buf, option, "upgrade");
	f->close |= span_is(buf, option, "close");
	for (unsigned i = 0; i < h->nfields; i++) {
		struct field *field = &h->field[i];

		field->dropped |= !(field_names[field->is].flags & KEPT) &&
			field->name.len == option.len &&
			strncasecmp(buf + field->name.at, buf + option.at, option.len) == 0;
	}
}

static void facts_read(struct facts *f, struct head *h, const char *buf)
{
	uint64_t n;

	memset(f, 0, sizeof *f);
	for (unsigned i = 0; i < h->nfields; i++) {
		const unsigned is = h->field[i].is;
		const struct span value = h->field[i].value;
		struct span rest = value, s;

		if (is == NAME_CONNECTION) {
			f->options++;
			for (unsigned k = 0; k < value.len; k++)
				f->options += buf[value.at + k] == ',';
			while (f->options <= OPTIONS_MAX && list_next(buf, &rest, &s))
				option_read(f, h, buf, s);
		} else if (is == NAME_UPGRADE) {
			while (list_next(buf, &rest, &s))
				f->websocket |= span_is(buf, s, "websocket");
		} else if (is == NAME_LENGTH) {
			f->bad_framing |= !number_parse(buf + value.at, value.len, &n) ||
				(f->count[is] > 0 && n != f->length);
			f->length = n;
			h->field[i].dropped = f->count[is] > 0;
		}
		f->value[is] = value;
		f->count[is]++;
	}
	f->bad_framing |= f->count[NAME_LENGTH] > 0 && f->count[NAME_CODING] > 0;
}

/* Host or authority (RFC 9110 7.2, RFC 3986 3.2.2): a name that is not empty [ ":" port ]. */
static int host_parse(const char *buf, struct span s, struct span *name)
{
	size_t i = s.at, end = i + s.len;

	if (s.len > 0 && buf[i] == '[') {
		while (++i < end && (isxdigit((unsigned char)buf[i]) || buf[i] == ':' ||
		    buf[i] == '.'))
			;
		if (i == s.at + 1u || i == end || buf[i++] != ']')
			return 0;
	} else if ((i = word_end(buf, i, end, "-._~!$&'()*+,;=%")) == s.at) {
		return 0;
	}
	*name = span_of(s.at, i);
	if (i < end && buf[i] == ':')
		for (i++; i < end && is_digit(buf[i]); i++)
			;
	return i == end;
}

/* The target in origin-form, its authority as Host (RFC 9112 3.2). Behind it is a space. */
static enum why target_parse(struct request *r, const char *buf)
{
	static const char *const schemes[] = { "http://", "https://", "ws://", "wss://" };
	const struct span t = r->head.part[1];
	unsigned k = 0;

	r->target = t;
	if (buf[t.at] == '/')
		return WHY_NONE;
	if (t.len == 1 && buf[t.at] == '*')
		return span_is(buf, r->head.part[0], "options") ? WHY_NONE : WHY_TARGET;
	while (strncasecmp(buf + t.at, schemes[k], strlen(schemes[k])) != 0)
		if (++k == LENGTH(schemes))
			return WHY_TARGET;
	const size_t at = t.at + strlen(schemes[k]), end = at + strcspn(buf + at, "/? ");
	const struct span host = span_of(at, end);
	if (!host_parse(buf, host, &r->name))
		return WHY_TARGET;
	r->host = host;
	r->target = span_of(end, (size_t)t.at + t.len);
	for (unsigned i = 0; i < r->head.nfields; i++)
		if (r->head.field[i].is == NAME_HOST)
			r->head.field[i].value = host;
	return WHY_NONE;
}

/* Less that at its end, if it is there and not all. */
static struct span span_without(const char *buf, struct span s, const char *end)
{
	const size_t len = strlen(end);

	if (s.len > len && memcmp(buf + s.at + s.len - len, end, len) == 0)
		s.len = (uint16_t)(s.len - len);
	return s;
}

/* Whether an Origin is that Host: in any case, its scheme's port left out or not (RFC 6454 4). */
static int origin_same(const char *buf, struct span origin, struct span host)
{
	const char *const o = buf + origin.at;
	const int tls = strncmp(o, "https://", 8) == 0;
	const char *const port = tls ? ":443" : ":80";

	if (!tls && strncmp(o, "http://", 7) != 0)
		return 0;
	origin = span_of(origin.at + 7u + (unsigned)tls, (size_t)origin.at + origin.len);
	origin = span_without(buf, origin, port);
	host = span_without(buf, host, port);
	return origin.len == host.len &&
		strncasecmp(buf + origin.at, buf + host.at, host.len) == 0;
}

/* Whether the value of Origin is one of origins[], or there is none, which only programs send. */
static int origin_allowed(const char *buf, const struct facts *f, struct span host)
{
	const struct span origin = f->value[NAME_ORIGIN];
	const unsigned count = f->count[NAME_ORIGIN];
	const char *o;

	for (unsigned i = 0; i < LENGTH(origins) && (o = origins[i]) != NULL; i++) {
		if (strcmp(o, "none") == 0 ? count == 0 : count == 1 && (strcmp(o, "same") == 0 ?
		    origin_same(buf, origin, host) : origin.len == strlen(o) &&
		    memcmp(o, buf + origin.at, origin.len) == 0))
			return 1;
	}
	return !origins[0];
}

static enum why upgrade_check(struct request *r, const char *buf, const struct facts *f)
{
	const struct span key = f->value[NAME_KEY];
	const size_t digits = key.at + 22u;     /* 16 bytes in base64 end there, with "==" */

	if (f->count[NAME_KEY] != 1 || key.len != 24 ||
	    word_end(buf, key.at, digits, "+/") != digits || memcmp(buf + digits, "==", 2) != 0)
		return WHY_KEY;
	if (f->count[NAME_VERSION] != 1 || !span_is(buf, f->value[NAME_VERSION], "13"))
		return WHY_WS_VERSION;
	if (f->count[NAME_CODING] > 0 || f->length > 0)
		return WHY_UPGRADE_BODY;
	if (!origin_allowed(buf, f, r->host))
		return WHY_ORIGIN;
	r->upgrade = 1;
	r->key = key;
	return WHY_NONE;
}

static enum why request_check(struct request *r, const char *buf)
{
	struct facts f;
	enum why why;

	facts_read(&f, &r->head, buf);
	r->host = f.value[NAME_HOST];
	r->origin = f.value[NAME_ORIGIN];
	if (memcmp(buf, "CONNECT ", 8) == 0)
		return WHY_METHOD;
	if (f.count[NAME_HOST] != 1 || !host_parse(buf, r->host, &r->name))
		return WHY_HOST;
	if ((why = target_parse(r, buf)) != WHY_NONE)
		return why;
	if (f.options > OPTIONS_MAX)
		return WHY_CONNECTION;
	if (f.bad_framing)
		return WHY_FRAMING;
	r->length = f.length;
	r->close = f.close;
	if (f.upgrade && f.websocket && memcmp(buf, "GET ", 4) == 0)
		return upgrade_check(r, buf, &f);
	r->chunked = f.count[NAME_CODING] == 1 && span_is(buf, f.value[NAME_CODING], "chunked");
	return r->chunked || f.count[NAME_CODING] == 0 ? WHY_NONE : WHY_CODING;
}

static enum why response_check(struct response *r, const char *buf, int upgrade, int head,
	const char *accept)
{
	struct facts f;

	facts_read(&f, &r->head, buf);
	r->status = (unsigned)(buf[9] * 100 + buf[10] * 10 + buf[11] - '0' * 111);
	r->length = f.length;
	if (f.bad_framing || f.options > OPTIONS_MAX)
		return WHY_BAD_RESPONSE;
	if (r->status == 101) {
		r->framing = BODY_TUNNEL;
		if (!upgrade || buf[7] != '1')
			return WHY_BAD_RESPONSE;
		return f.upgrade && f.websocket && (!check_accept || (f.count[NAME_ACCEPT] == 1 &&
			f.value[NAME_ACCEPT].len == 28 &&
			memcmp(buf + f.value[NAME_ACCEPT].at, accept, 28) == 0)) ?
			WHY_NONE : WHY_BAD_ACCEPT;
	}
	r->framing = f.count[NAME_LENGTH] > 0 ? BODY_LENGTH : BODY_EOF;
	if (r->status < 200 || r->status == 204 || r->status == 304 || head) {
		r->framing = BODY_LENGTH;
		r->length = 0;
	} else if (f.count[NAME_CODING] > 0) {
		struct span rest = f.value[NAME_CODING], last = rest;

		if (buf[7] == '0' || f.count[NAME_CODING] > 1)
			return WHY_BAD_RESPONSE;
		while (list_next(buf, &rest, &last))
			;
		r->framing = span_is(buf, last, "chunked") ? BODY_CHUNKED : BODY_EOF;
	}
	return WHY_NONE;
}

/* The fields as they came, white space around their values normalized, but for those that
 * Connection lists, a Content-Length said again, and those that have one of some flags. */
static void text_fields(struct text *t, const struct head *h, const char *buf, int without)
{
	for (unsigned i = 0; i < h->nfields; i++) {
		const struct field *f = &h->field[i];

		if (!f->dropped && !(field_names[f->is].flags & without))
			text_format(t, "%.*s: %.*s\r\n", SPAN(buf, f->name), SPAN(buf, f->value));
	}
}

static size_t request_render(const struct request *r, const char *buf, const struct forwarded *f,
	char *out, size_t size)
{
	const struct head *h = &r->head;
	struct text t = { .p = out, .size = size };
	const int none = r->target.len == 0;

	text_format(&t, "%.*s %s%.*s HTTP/1.1\r\n", SPAN(buf, h->part[0]),
		none && span_is(buf, h->part[0], "options") ? "*" :     /* RFC 9112 3.2.4 */
		none || buf[r->target.at] == '?' ? "/" : "", SPAN(buf, r->target));
	if (f->renamed)
		text_format(&t, "Host: %.*s\r\n", SPAN(buf, r->host));
	text_fields(&t, h, buf, HOP | OURS | (x_forwarded_for == OFF ? 0 : PEER) |
		(f->renamed ? SITE : 0));
	if (x_forwarded_for != OFF)
		text_string(&t, "X-Forwarded-For: ");
	for (unsigned i = 0; i < h->nfields && x_forwarded_for == APPEND; i++)
		if (h->field[i].value.len > 0 &&
		    span_is(buf, h->field[i].name, "x-forwarded-for"))
			text_format(&t, "%.*s, ", SPAN(buf, h->field[i].value));
	if (x_forwarded_for != OFF)
		text_format(&t, "%s\r\nX-Forwarded-Proto: %s\r\nX-Real-IP: %s\r\n", f->client,
			f->proto, f->client);
	if (f->subject && *f->subject)
		text_format(&t, "X-SSL-Client-CN: %s\r\n", f->subject);
	text_string(&t, r->upgrade ? "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" :
		r->chunked ? "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" :
		"Connection: close\r\n\r\n");
	return t.full ? 0 : t.len;
}

static size_t response_render(const struct response *r, const char *buf, char *out, size_t size)
{
	const struct head *h = &r->head;
	struct text t = { .p = out, .size = size };

	text_format(&t, "HTTP/1.1 %.*s %.*s\r\n", SPAN(buf, h->part[1]), SPAN(buf, h->part[2]));
	text_fields(&t, h, buf, HOP | (r->status < 200 || r->status == 204 ? BODY : 0));
	if (r->framing == BODY_TUNNEL)
		text_string(&t, "Connection: Upgrade\r\nUpgrade: websocket\r\n");
	else if (r->status >= 200 && !r->keep)
		text_string(&t, "Connection: close\r\n");
	text_string(&t, "\r\n");
	return t.full ? 0 : t.len;
}

static void accept_key(const char *key, char out[29])
{
	const char *digit = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	unsigned char hash[br_sha1_SIZE + 1] = { 0 };   /* the last digit takes bits of this 0 */
	br_sha1_context c;

	br_sha1_init(&c);
	br_sha1_update(&c, key, 24);
	br_sha1_update(&c, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
	br_sha1_out(&c, hash);
	for (unsigned bit = 0; bit < 8 * br_sha1_SIZE; bit += 6)
		*out++ = digit[(hash[bit / 8] << 8 | hash[bit / 8 + 1]) >> (10 - bit % 8) & 63];
	memcpy(out, "=", 2);
}

/* A chunked body's grammar, a byte at a time but for data (RFC 9112 7.1). Servers pad sizes. */
enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_DATA_END, CHUNK_TRAILER, CHUNK_END,
	CHUNK_BLANK, CHUNK_EXT, CHUNK_TRAILER_LINE, CHUNK_TRAILERS, /* behind what is dropped */
	CHUNK_LF = 16 };        /* and one of these: which is next behind the line feed */

/* One byte outside of a chunk's data. Returns the next state, -1: not the grammar. */
static int chunked_byte(struct chunked *c, char b)
{
	const int ends = b == '\r', bad = is_control((unsigned char)b);

	if (c->state >= CHUNK_LF)
		return b == '\n' ? c->state - CHUNK_LF : -1;
	switch (c->state) {
	case CHUNK_DATA_END:
		c->digits = 0;
		return ends ? CHUNK_LF + CHUNK_SIZE : -1;
	case CHUNK_TRAILER:
	case CHUNK_TRAILERS:
		return ends ? CHUNK_LF + CHUNK_END :
			word_end(&b, 0, 1, in_token) ? CHUNK_TRAILER_LINE : -1;
	case CHUNK_TRAILER_LINE:
		return ends ? CHUNK_LF + CHUNK_TRAILERS : bad ? -1 : CHUNK_TRAILER_LINE;
	}
	/* the size line: its digits, then blanks, then an extension */
	if (c->state == CHUNK_SIZE && isxdigit((unsigned char)b) && c->digits < 15) {
		c->left = c->left << 4 | (unsigned)((b & 15) + (b > '9' ? 9 : 0));
		c->digits++;
		return CHUNK_SIZE;
	}
	if (c->digits == 0)
		return -1;
	if (ends)
		return CHUNK_LF + (c->left > 0 ? CHUNK_DATA : CHUNK_TRAILER);
	if (c->state == CHUNK_EXT)
		return bad ? -1 : CHUNK_EXT;
	return b == ';' ? CHUNK_EXT : b == ' ' || b == '\t' ? CHUNK_BLANK : -1;
}

static struct chunked body_start(int chunks, uint64_t length)
{
	return (struct chunked){ .left = chunks ? 0 : length, .plain = !chunks,
		.state = chunks ? CHUNK_SIZE : CHUNK_DATA, .done = !chunks && length == 0 };
}

static size_t chunked_scan(struct chunked *c, const char *buf, size_t len, int *kept)
{
	size_t i, n;

	for (i = 0; i < len && !c->done && !c->bad; i += n) {
		const int data = c->state == CHUNK_DATA;
		const int next = data ? CHUNK_DATA : chunked_byte(c, buf[i]);
		const int keep = (next & (CHUNK_LF - 1)) < CHUNK_BLANK;

		n = !data ? 1 : c->left < len - i ? (size_t)c->left : len - i;
		if (kept && i == 0)
			*kept = keep;
		if (kept && keep != *kept)
			break;
		c->left -= data ? n : 0;
		c->dropped += !keep;
		c->bad = next < 0 || (kept && c->dropped > head_max);
		c->done = c->plain ? c->left == 0 : next == CHUNK_END;
		c->state = (uint8_t)(data && c->left == 0 ? CHUNK_DATA_END : next);
		n = c->bad ? 0 : n;
	}
	return i;
}

/* Bytes of a frame's header, as far as that is known. */
static unsigned flow_header(const struct flow *f, unsigned masked)
{
	if (f->seen < 2)
		return 2;
	return 2 + 4 * masked + (f->size < 126 ? 0 : f->size == 126 ? 2 : 8);
}

/* One of them. 0: not the grammar. Reserved bits are for extensions to use. */
static int flow_byte(struct flow *f, unsigned masked, unsigned char b)
{
	const unsigned at = f->seen++, op = b & 15;

	if (at == 0) {
		f->first = b;
		return op < 3 ? (op == 0) == f->amid : op >= 8 && op <= 10 && (b & 0x80);
	}
	if (at == 1) {
		f->size = b & 127;
		f->left = f->size < 126 ? f->size : 0;
		return b >> 7 == masked && (!(f->first & 8) || f->size < 126) &&
			((f->first & 15) != 8 || f->size != 1); /* half a code */
	}
	const unsigned key = flow_header(f, 0);
	if (at < key) {
		f->left = f->left << 8 | b;
		return at + 1 < key || (f->left >> 63 == 0 && f->left >= (key == 4 ? 126 : 65536));
	}
	if (at < key + 2)
		f->mask[at - key] = b;
	return 1;
}

static size_t flow_scan(struct flow *f, unsigned masked, const unsigned char *p, size_t len)
{
	size_t i = 0, end = 0;

	while (i < len && !f->over) {
		if (f->seen < flow_header(f, masked)) {
			f->over = !flow_byte(f, masked, p[i++]);
		} else {
			const size_t n = f->left < len - i ? (size_t)f->left : len - i;
			unsigned at = f->size - (unsigned)f->left;

			for (size_t k = i; (f->first & 15) == 8 && at < 2 && k < i + n; k++)
				f->code = (uint16_t)(f->code << 8 | (p[k] ^ f->mask[at++]));
			f->left -= n;
			i += n;
		}
		if (!f->over && f->left == 0 && f->seen == flow_header(f, masked)) {
			const unsigned op = f->first & 15;

			f->seen = 0;
			f->frames_of_data += op < 3;
			f->amid = op < 3 ? !(f->first & 0x80) : f->amid;
			f->over = op == 8;
			f->code = op == 8 && f->size == 0 ? 1005 : f->code;
			end = i;
		}
	}
	return end;
}

static int flow_between(const struct flow *f)
{
	return f->seen == 0 && !f->over;
}

/* ---- backends ---- */

static int round_robin_pick(const unsigned *weight, int *current, unsigned n, uint64_t allowed)
{
	int best = -1, total = 0;

	for (unsigned i = 0; i < n; i++) {
		if (!(allowed >> i & 1))
			continue;
		current[i] += (int)weight[i];
		total += (int)weight[i];
		if (best < 0 || current[i] > current[best])
			best = (int)i;
	}
	if (best >= 0)
		current[best] -= total;
	return best;
}

/* A backend of weight w (NULL: 1) has w tickets; the highest wins. So weights are their shares,
 * and who comes or goes moves only its own clients; machines of either byte order agree. */
static int rendezvous_pick(const uint64_t *id, const unsigned *weight, unsigned n, uint64_t allowed,
	const unsigned char *address, unsigned bits)
{
	unsigned char key[16] = { 0 };
	uint64_t client, top = 0;
	int best = -1;

	address_prefix(key, address, bits);
	client = hash_bytes(bits, key, sizeof key);
	for (unsigned i = 0; i < n; i++) {
		for (unsigned w = 0; w < (weight ? weight[i] : 1) && (allowed >> i & 1); w++) {
			const uint64_t ticket = hash_mix(client ^ hash_mix(hash_mix(id[i]) + w));

			if (best < 0 || ticket > top) {
				best = (int)i;
				top = ticket;
			}
		}
	}
	return best;
}

/* How well an entry's name fits one that was asked for: by how much of that it says, so the very
 * name comes before all with a "*." in front, and a longer one of these before a shorter one; 1:
 * the entry is for all; 0: not at all. A star stands for any labels, or (`label` 1, as in
 * certificates) for one. Browsers send the dot of https://a.example./; RFC 6066 3 has none. */
static size_t name_fits(const char *pattern, const char *name, size_t len, int label)
{
	if (!pattern)
		return 1;
	const int wild = pattern[0] == '*' && pattern[1] == '.';
	pattern += wild;
	len -= len > 0 && name[len - 1] == '.';
	size_t n = strlen(pattern);
	n -= n > 0 && pattern[n - 1] == '.';
	if (n > len)
		return 0;
	const size_t front = len - n;
	return (front > 0) == wild && !(label && memchr(name, '.', front)) &&
		strncasecmp(pattern, name + front, n) == 0 ? 1 + n : 0;
}

static int path_under(const char *target, size_t len, const char *prefix)
{
	const size_t n = strlen(prefix);

	return n <= len && memcmp(target, prefix, n) == 0 && (n == len || n == 0 ||
		prefix[n - 1] == '/' || target[n] == '/' || target[n] == '?');
}

/* The backends for a name and a target: of those that the name fits best, the ones with the longest
 * path that the target lies under. So what is under a name is never looked for under another. */
static enum why servers_for(const char *host, size_t host_len, const char *target, size_t len,
	uint64_t *set)
{
	size_t named = 0, longest = 0;
	unsigned i;

	for (*set = 0, i = 0; i < BACKENDS; i++) {
		const struct backend *b = &backends[i];
		const char *path = b->path ? b->path : "";
		const size_t n = strlen(path), fits = name_fits(b->name, host, host_len, 0);

		if (fits < named || fits == 0)
			continue;
		if (fits > named)
			*set = longest = 0;
		named = fits;
		if (!path_under(target, len, path) || n < longest)
			continue;
		*set = (n > longest ? 0 : *set) | (uint64_t)1 << i;
		longest = n;
	}
	return named == 0 ? WHY_NO_NAME : *set == 0 ? WHY_NO_PATH : WHY_NONE;
}

/* Those of a set that have the fewest sessions for their weight. */
static uint64_t servers_least(uint64_t set)
{
	uint64_t least = 0;
	unsigned best = 0;

	for (unsigned i = 0; i < BACKENDS; i++) {
		const uint64_t mine = (uint64_t)servers[i].active * weights[best];
		const uint64_t top = (uint64_t)servers[best].active * weights[i];

		if (!(set >> i & 1) || (least && mine > top))
			continue;
		least = (mine < top ? 0 : least) | (uint64_t)1 << i;
		best = i;
	}
	return least;
}

/* The one of a set that is the client's, whoever comes or goes. */
static int peer_pick(const struct session *s, const uint64_t *id, const unsigned *weight,
	unsigned n, uint64_t set)
{
	return rendezvous_pick(id, weight, n, set, address_ip(&s->peer),
		s->peer.any.sa_family == AF_INET ? hash_bits4 : hash_bits6);
}

/* The address to try first: each in its turn, or, to come to the same again, the client's own. */
static unsigned address_pick(const struct session *s, struct server *v)
{
	uint64_t id[ADDRESSES_MAX];

	if (balance != IP_HASH && balance != STICKY_COOKIE)
		return v->turn++ % v->addresses;
	for (unsigned i = 0; i < v->addresses; i++) {
		const struct address *a = &v->address[i];

		id[i] = hash_bytes(0, address_ip(a), a->any.sa_family == AF_INET ? 4 : 16);
	}
	return (unsigned)peer_pick(s, id, NULL, v->addresses, UINT64_MAX);
}

enum { PICK_NONE = -1, PICK_FULL = -2, PICK_WAIT = -3 };

/* The backend to try next: first those in order, then the backups, then those set aside. */
static int server_pick(const struct session *s)
{
	uint64_t tier[3] = { 0, 0, 0 };
	int full = 0, pending = 0;

	for (unsigned i = 0; i < BACKENDS; i++) {
		const struct server *v = &servers[i];
		const uint64_t bit = (uint64_t)1 << i;

		if (!(s->group & ~s->tried & bit))
			continue;
		if (v->addresses == 0)
			pending |= v->pending && !v->down;      /* its first answer is awaited */
		else if (backends[i].max_conns > 0 && v->active >= backends[i].max_conns)
			full = 1;
		else
			tier[v->aside_until > now ? 2 : backends[i].backup ? 1 : 0] |= bit;
	}
	if (s->sticky >= 0 && (tier[0] | tier[1]) >> s->sticky & 1)
		return s->sticky;
	const uint64_t set = tier[0] ? tier[0] : tier[1] ? tier[1] : tier[2];
	if (set == 0)
		return pending ? PICK_WAIT : full ? PICK_FULL : PICK_NONE;
	if (balance == IP_HASH)
		return peer_pick(s, server_ids, weights, BACKENDS, set);
	return round_robin_pick(weights, currents, BACKENDS,
		balance == LEAST_CONN ? servers_least(set) : set);
}

/* A connection stands: the backend is no longer aside. */
static void server_good(struct server *v)
{
	v->fails = 0;
	v->aside_until = v->held_until = 0;
	if (v->down)
		log_line(LOG_NOTICE, "backend name=%s up s=%llu requests=%u", v->name,
			(now - v->down_since) / 1000ull, v->lost);
	v->down = 0;
}

/* It is down: said at once, and again, if that is found again, once a minute. */
static void server_down(struct server *v, const char *why)
{
	if (!v->down) {
		v->down_since = v->down_after = now;
		v->lost = 0;
	}
	v->down = 1;
	if (now < v->down_after)
		return;
	v->down_after = now + DOWN_PAUSE_MS;
	log_line(LOG_WARNING, "backend name=%s down why=%s s=%llu requests=%u", v->name, why,
		(now - v->down_since) / 1000ull, v->lost);
}

/* Asks for the addresses of a backend's name, if it has one; see 'names'. */
static void resolver_ask(struct server *v)
{
	unsigned char index = (unsigned char)(v - servers);

	link_drop(&v->retry.link);
	if (!v->by_name || v->pending || fds[FD_RESOLVER].fd < 0)
		return;
	v->pending = send(fds[FD_RESOLVER].fd, &index, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1;
	if (!v->pending)
		timer_start(&queues[Q_RESOLVE], &v->retry);
}

/* A connection failed, for all its addresses. */
static void server_failed(struct server *v, const char *why)
{
	v->failures++;
	if (v->held_until <= now)
		v->held_until = 0;
	if (now - v->fail_since > fail_ms)
		v->fails = 0;
	if (v->fails++ == 0)
		v->fail_since = now;
	if (max_fails == 0 || v->fails < max_fails)
		return;
	v->aside_until = now + fail_ms;
	server_down(v, why);
	resolver_ask(v);
}

/* For the log: why a connection to a backend failed; NULL: of a shortage of ours. */
static const char *connect_why(int error)
{
	if (is_our_shortage(error))
		return NULL;
	switch (error) {
	case ECONNREFUSED:              return "refused";
	case ENOENT:                    return "no-socket";
	case ECONNRESET: case EPIPE:    return "reset";
	case ETIMEDOUT:                 return "timeout";
	case EAGAIN:                    return "full";          /* backlog of a unix: socket */
	case EHOSTUNREACH: case ENETUNREACH: case EAFNOSUPPORT: return "unreachable";
	case EACCES: case EPERM:        return "forbidden";
	default:                        return "error";
	}
}

/* A connect under way, or -1 and errno. */
static int server_dial(unsigned i, unsigned which)
{
	const struct address *a = &servers[i].address[which];
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	const int local = a->any.sa_family == AF_UNIX;
	int fd = socket(a->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -1;
	if (local)
		string_format(sun.sun_path, sizeof sun.sun_path, "%s", backends[i].host + 5);
	else
		socket_tune(fd);
	if (connect(fd, local ? (struct sockaddr *)&sun : &a->any,
	    local ? sizeof sun : sizeof *a) == 0 || errno == EINPROGRESS)
		return fd;
	close(fd);              /* which leaves errno alone */
	return -1;
}

/* The header of the PROXY protocol, version 2, for a connection between two addresses of a family;
 * `from` NULL: for one of our own (LOCAL, UNSPEC). Bytes written, at most PROXY_MAX. */
static size_t proxy_header(const struct address *from, const struct address *to, unsigned char *out)
{
	struct text t = { .p = (char *)out, .size = PROXY_MAX };
	const int v4 = from && from->any.sa_family == AF_INET;
	const size_t ip = v4 ? 4 : 16;

	text_add(&t, "\r\n\r\n\0\r\nQUIT\n", 12);
	text_add(&t, v4 ? "\x21\x11\0\x0c" : from ? "\x21\x21\0\x24" : "\x20\0\0\0", 4);
	if (from) {
		text_add(&t, address_ip(from), ip);
		text_add(&t, address_ip(to), ip);
		text_add(&t, &from->in.sin_port, 2);
		text_add(&t, &to->in.sin_port, 2);
	}
	return t.len;
}

/* Tells a backend that wants to know whom a new connection is for, before all else: that client, or
 * nobody (-1, NULL). It fits an empty socket, or the connection has failed: errno. More follows. */
static int proxy_tell(unsigned i, int fd, int client, const struct address *peer)
{
	unsigned char out[PROXY_MAX];
	struct address to = { .in6 = { 0 } };

	if (!backends[i].proxy)
		return 0;
	if (client >= 0 && getsockname(client, &to.any, &(socklen_t){ sizeof to }) == 0)
		address_unmap(&to);
	const size_t n = proxy_header(peer && to.any.sa_family == peer->any.sa_family ? peer : NULL,
		&to, out);
	return send(fd, out, n, MSG_NOSIGNAL | MSG_MORE) == (ssize_t)n ? 0 : errno;
}

/* Active checks: every check_ms a TCP connect, to each address until one answers before the next is
 * due. If none does, the backend is aside until a check succeeds, or, should they stop, a while. A
 * lack of ours is no failure, nor is a full backlog. `error`: an address's; 0: a new round. */
static void check_next(unsigned i, int error)
{
	struct server *v = &servers[i];
	struct pollfd *p = &fds[FD_CHECK + i];

	if (error) {
		close(p->fd);
	} else {
		v->checked = 0;
		v->check_why = NULL;
	}
	for (p->fd = -1; v->checked < v->addresses; v->checked++, error = 0) {
		if (!error && (p->fd = server_dial(i, v->checked)) >= 0)
			return;
		error = error ? error : errno;
		if (error != EAGAIN && connect_why(error))
			v->check_why = connect_why(error);
	}
	if (v->check_why)
		server_failed(v, v->check_why);
	if (v->check_why && v->down)
		v->aside_until = now + (v->addresses + 1) * (uint64_t)check_ms + fail_ms;
}

/* An address that answers lifts what failed connects have set: it says nothing of TLS. */
static void checks_poll(void)
{
	for (unsigned i = 0; i < BACKENDS; i++) {
		struct server *v = &servers[i];
		struct pollfd *p = &fds[FD_CHECK + i];
		const int error = p->revents ? socket_error(p->fd) : 0;

		if (error)
			check_next(i, error);
		if (error || !p->revents)
			continue;
		proxy_tell(i, p->fd, -1, NULL);         /* its log would name the lack */
		close(p->fd);
		p->fd = -1;
		if (!v->held_until)
			server_good(v);
		else if (v->aside_until > v->held_until)
			v->aside_until = v->held_until;
	}
}

/* ---- names ----
 *
 * getaddrinfo blocks, for half a minute when it likes, so a child calls it if a backend has a name:
 * forked before keys are read and chroot hides /etc, but after signals were blocked, it lives as
 * long as we do. One byte asks for a backend, and struct resolved comes back. */

struct resolved {
	uint8_t index, count;
	struct address address[ADDRESSES_MAX];
};

static void resolver_child(int fd)
{
	static const struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	static struct resolved r;
	struct addrinfo *list, *ai;

	become_do(NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (seccomp)
		filter_set(resolver_calls, LENGTH(resolver_calls));
	while (read(fd, &r.index, 1) == 1 && r.index < BACKENDS) {
		const struct backend *from = &backends[r.index];

		r.count = 0;
		if (getaddrinfo(from->host, from->port, &hints, &list) == 0) {
			for (ai = list; ai && r.count < ADDRESSES_MAX; ai = ai->ai_next) {
				memcpy(&r.address[r.count], ai->ai_addr, ai->ai_addrlen);
				address_unmap(&r.address[r.count++]);
			}
			freeaddrinfo(list);
		}
		if (send(fd, &r, sizeof r, MSG_NOSIGNAL) < 0)
			break;
	}
	_exit(0);
}

static void resolver_start(void)
{
	unsigned i = 0;
	int pair[2];

	while (!servers[i].by_name)
		if (++i == BACKENDS)
			return;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		die("resolver: socketpair: %s", strerror(errno));
	const pid_t pid = fork();
	if (pid < 0)
		die("resolver: fork: %s", strerror(errno));
	if (pid == 0) {
		close(pair[0]);
		resolver_child(pair[1]);
	}
	close(pair[1]);
	fds[FD_RESOLVER].fd = pair[0];
	for (i = 0; i < BACKENDS; i++)
		resolver_ask(&servers[i]);
}

/* No address: the old ones stay, if any, and the resolver, while there is one, is asked again.
 * Others: an address that is not among them gets no new sessions. */
static void resolver_answer(const struct resolved *r)
{
	struct server *v = &servers[r->index];

	v->pending = 0;
	if (r->count > 0) {
		memcpy(v->address, r->address, r->count * sizeof r->address[0]);
		if (v->addresses == 0 && v->down)
			server_good(v);
		v->addresses = r->count;
	} else if (v->addresses == 0) {
		server_down(v, "unresolved");
	}
	if (fds[FD_RESOLVER].fd >= 0)
		timer_start(&queues[r->count > 0 ? Q_REFRESH : Q_RESOLVE], &v->retry);
}

/* There is none any more, nor another, for /etc was given up: what is known must do. */
static void resolver_end(void)
{
	struct resolved r = { .count = 0 };

	close(fds[FD_RESOLVER].fd);
	fds[FD_RESOLVER].fd = -1;
	for (; r.index < BACKENDS; r.index++)
		if (servers[r.index].by_name)
			resolver_answer(&r);
}

/* Whether an answer is one: the resolver reads what comes from outside, so it is not trusted. */
static int resolved_valid(const struct resolved *r)
{
	if (r->index >= BACKENDS || !servers[r->index].by_name || r->count > ADDRESSES_MAX)
		return 0;
	for (unsigned i = 0; i < r->count; i++)
		if (r->address[i].any.sa_family != AF_INET &&
		    r->address[i].any.sa_family != AF_INET6)
			return 0;
	return 1;
}

static void resolver_event(void)
{
	struct resolved r;
	ssize_t n = recv(fds[FD_RESOLVER].fd, &r, sizeof r, MSG_DONTWAIT);

	if (n == sizeof r && resolved_valid(&r)) {
		resolver_answer(&r);
	} else if (n >= 0 || !would_block(errno)) {
		log_line(LOG_ERR, "resolver died: backends keep the addresses they have, those "
			"without one stay down; start again");
		resolver_end();
	}
}

/* The name to send and to verify; NULL for an address. */
static const char *backend_sni(const struct backend *b)
{
	struct address a;

	return b->sni ? b->sni : address_parse(&a, b->host, "1") || is_unix(b) ? NULL : b->host;
}

/* What STICKY_COOKIE calls a backend, at any place in the list, with no word of its address. */
static void cookie_make(struct server *v)
{
	struct text t = { .p = v->cookie, .size = sizeof v->cookie - 1 };
	br_sha256_context c;
	unsigned char hash[br_sha256_SIZE];

	br_sha256_init(&c);
	br_sha256_update(&c, cookie_secret, sizeof cookie_secret);
	br_sha256_update(&c, v->name, strlen(v->name));
	br_sha256_out(&c, hash);
	text_format(&t, "%s=", cookie_name);
	for (unsigned i = 0; i < 8; i++)
		text_format(&t, "%02x", hash[i]);
}

/* A backend's host is a socket's path, an address, or a name. */
static void servers_init(void)
{
	for (unsigned i = 0; i < BACKENDS; i++) {
		const struct backend *b = &backends[i];
		struct server *v = &servers[i];
		const int local = is_unix(b);

		if (check_ms > 0)
			link_append(&queues[Q_CHECK].list, &v->check.link);     /* due at once */
		weights[i] = b->weight ? b->weight : 1;
		v->addresses = local || address_parse(&v->address[0], b->host, b->port);
		v->by_name = !v->addresses;
		if (local) {
			v->address[0].any.sa_family = AF_UNIX;
			UNIX_VERDICT = LET;
		}
		string_format(v->name, sizeof v->name, local ? "%s%s" : strchr(b->host, ':') ?
			"[%s]:%s" : "%s:%s", b->host, local ? "" : b->port);
		server_ids[i] = hash_bytes(0, v->name, strlen(v->name));
		cookie_make(v);
	}
}

/* ---- sources: how many sessions an address has ---- */

/* Where the source of an address hangs, or, if it has no session, would. */
static struct source **source_place(const struct address *a, unsigned char key[9])
{
	struct source **p;

	memset(key, 0, 9);
	key[8] = (unsigned char)a->any.sa_family;
	address_prefix(key, address_ip(a), key[8] == AF_INET ? 32 : source_bits6);
	p = &buckets[hash_bytes(0, key, 9) % LENGTH(buckets)];
	while (*p && memcmp((*p)->key, key, 9) != 0)
		p = &(*p)->next;
	return p;
}

/* One session more; there are as many sources as sessions, so one is always free. */
static struct source *source_take(const struct address *a)
{
	unsigned char key[9];
	struct source **p = source_place(a, key);

	if (!*p) {
		*p = pool_lend(&source_pool);
		memset(*p, 0, sizeof **p);
		memcpy((*p)->key, key, sizeof key);
	}
	(*p)->sessions++;
	return *p;
}

static void source_release(struct source *o, const struct address *a)
{
	unsigned char key[9];

	if (--o->sessions > 0)
		return;
	*source_place(a, key) = o->next;
	pool_return(&source_pool, o);
}

/* ---- what sessions borrow ----
 *
 * Buffers are borrowed for a turn, when the bytes that they are for are there and can go on. While
 * it waits for a peer, a session holds what can't be put down, and nothing else:
 *
 *   record buffers  with what a socket did not take, or a record whose rest has yet to come. From
 *                   half of them lent on, no record is read that is not there to its end, nor one
 *                   while the side that it is for is not writable (slow readers, and uploads and
 *                   tunnels whose records come in pieces); handshakes never read one in pieces
 *   a shelf         with a verifier that has begun, or a head that is longer than a note
 *
 * Who holds record buffers does not wait for a shelf, so those who hold a shelf get theirs. */

static unsigned char no_records[32];    /* what a resting engine's offsets are based on */

/* The only place that writes private fields of BearSSL (leg_fault, policy_choose and text_tls read
 * some): the buffers of an engine at a record boundary hold nothing, so their bases can change. */
static void engine_lend(br_ssl_engine_context *eng, unsigned char *ibuf, unsigned char *obuf)
{
	eng->ibuf = ibuf;
	eng->obuf = obuf;
}

static void leg_attach(struct leg *l, struct buffers *b)
{
	b->out_at = b->out_end = 0;
	l->buf = b;
	l->ahead = b->ahead;
	l->started = 0;
	if (l->eng)
		engine_lend(l->eng, b->ibuf, b->obuf);
}

/* Gives it a shelf, or record buffers. */
static void session_lend(struct session *s, const struct pool *p, void *item)
{
	if (p == &shelf_pool) {
		s->shelf = item;
		s->shelf->verifier.begun = 0;
		s->source->shelves++;
		return;
	}
	s->rec = item;
	leg_attach(&s->client, &s->rec->side[0]);
	if (tls_backends && s->backend.eng)
		leg_attach(&s->backend, &s->rec->side[tls_backends]);
}

/* It may keep its place for a while before others look at it. */
static void place_start(struct session *s)
{
	const int young = s->state == HANDSHAKE || s->state == HEAD;

	timer_start(&queues[s->asked ? Q_ASKED : young ? Q_YOUNG : Q_GROWN], &s->place);
}

/* 0: s waits for an item, and will be run when it has one. */
static int session_borrow(struct session *s, struct pool *p)
{
	void *item = pool_lend(p);

	if (item)
		session_lend(s, p, item);
	else
		link_append(&p->waiters, &s->wait);
	return item != NULL;
}

/* An item is free: for who has waited longest, if anyone does. */
static void session_pass(struct pool *p, void *item)
{
	if (!pool_wanted(p)) {
		pool_return(p, item);
		return;
	}
	struct session *next = OWNER(p->waiters.next, struct session, wait);
	session_lend(next, p, item);
	link_append(&runnable, &next->wait);
}

static int records_borrow(struct session *s)
{
	return s->rec || session_borrow(s, &records_pool);
}

static void spare_return(struct leg *l)
{
	if (l->spare)
		session_pass(&records_pool, l->spare);
	l->spare = NULL;
	l->at = l->end = 0;
}

static void leg_detach(struct leg *l)
{
	spare_return(l);
	l->buf = NULL;
	if (l->eng)
		engine_lend(l->eng, no_records, no_records);
}

static void records_return(struct session *s)
{
	leg_detach(&s->client);
	leg_detach(&s->backend);
	if (s->rec)
		session_pass(&records_pool, s->rec);
	s->rec = NULL;
}

static void *shelf_release(struct session *s)
{
	struct shelf *shelf = s->shelf;

	s->shelf = NULL;
	s->source->shelves--;
	return shelf;
}

static void shelf_return(struct session *s)
{
	if (s->shelf)
		session_pass(&shelf_pool, shelf_release(s));
}

/* Takes the shelf of a client amid its long head, whose time is over, of the address with most, if
 * s's own holds less by two: no address has them all, and a crowd behind one waits among itself.
 * (Heads of 1.1 KB without an end, from one address.) */
static void shelf_rob(struct session *s)
{
	const struct link *list = &queues[Q_STALL].list;        /* all who hold one are there */
	struct session *victim = NULL;

	for (const struct link *l = list->next; l != list; l = l->next) {
		struct session *o = OWNER(l, struct session, stall.link);
		const unsigned most = victim ? victim->source->shelves : s->source->shelves + 1;

		if (o->shelf && o->state == HEAD && link_alone(&o->wait) &&
		    o->source->shelves > most)
			victim = o;
	}
	if (!victim)
		return;
	session_lend(s, &shelf_pool, shelf_release(victim));
	victim->note->len = 0;
	victim->timer.due = now;
	link_append(&queues[FREE].list, &victim->timer.link);
}

static int shelf_borrow(struct session *s)
{
	if (!s->shelf && pool_empty(&shelf_pool))
		shelf_rob(s);
	return s->shelf || session_borrow(s, &shelf_pool);
}

static void note_return(struct session *s)
{
	if (s->note)
		pool_return(&note_pool, s->note);
	s->note = NULL;
}

/* Bytes of a head that are there, put aside or not. */
static size_t head_len(const struct session *s)
{
	return hd ? hd->len : s->note ? s->note->len : 0;
}

static char *head_place(const struct session *s)
{
	return s->note->len > NOTE_TEXT ? s->shelf->text : s->note->text;
}

/* Loads the head. What was put aside is parsed anew: it is little, or its pieces cost more. */
static void head_load(struct session *s)
{
	if (hd)
		return;
	struct note *note = s->note;
	hd = &head_buffer;
	memset(hd, 0, offsetof(struct head_buffer, bytes));
	hd->len = note->len;
	hd->off = note->off;
	memcpy(hd->bytes, head_place(s), hd->len);
	note->len = note->off = 0;
}

/* The run is over: puts aside what has to wait. 0: there is no place. */
static int head_store(struct session *s)
{
	const struct head_buffer *head = hd;

	hd = NULL;
	if (!head || head->off == head->len)
		return 1;
	if (head->len > NOTE_TEXT && !shelf_borrow(s))
		return 0;
	s->note->len = (uint16_t)head->len;
	s->note->off = (uint16_t)head->off;
	memcpy(head_place(s), head->bytes, head->len);
	return 1;
}

/* ---- TLS set-up ---- */

static const struct {
	uint16_t id;
	const char *name;
	int chacha, cbc;
} suite_names[] = {
	{ BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE_ECDSA_CHACHA20", 1, 0 },
	{ BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE_RSA_CHACHA20", 1, 0 },
	{ BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, "ECDHE_ECDSA_AES128_GCM", 0, 0 },
	{ BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, "ECDHE_RSA_AES128_GCM", 0, 0 },
	{ BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, "ECDHE_ECDSA_AES256_GCM", 0, 0 },
	{ BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, "ECDHE_RSA_AES256_GCM", 0, 0 },
	{ BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, "ECDHE_ECDSA_AES128_CBC", 0, 1 },
	{ BR_TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, "ECDHE_RSA_AES128_CBC", 0, 1 },
	{ BR_TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA, "ECDHE_ECDSA_AES256_CBC", 0, 1 },
	{ BR_TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA, "ECDHE_RSA_AES256_CBC", 0, 1 },
};

/* Index in suite_names, -1: none that we serve. */
static int suite_find(unsigned id)
{
	for (unsigned i = 0; i < LENGTH(suite_names); i++)
		if (suite_names[i].id == id)
			return (int)i;
	return -1;
}

/* ciphers[] for this CPU: without instructions for AES, ChaCha20 is faster in constant time. */
static void suites_init(void)
{
	const int aes = br_aes_x86ni_ctr_get_vtable() || br_aes_pwr8_ctr_get_vtable();
	unsigned n = 0;

	for (int pass = 0; pass < 2; pass++)
		for (unsigned i = 0; i < LENGTH(ciphers); i++)
			if (pass == (ciphers_by_cpu &&
			    suite_names[suite_find(ciphers[i])].chacha == aes))
				suites[n++] = ciphers[i];
}

/* By BearSSL's ids. */
static const br_hash_class *const hashes[] = {
	[br_sha1_ID] = &br_sha1_vtable, [br_sha224_ID] = &br_sha224_vtable,
	[br_sha256_ID] = &br_sha256_vtable, [br_sha384_ID] = &br_sha384_vtable,
	[br_sha512_ID] = &br_sha512_vtable,
};

/* Certificate and suite for a ClientHello: the first suite that one of the certificates serves that
 * fit its server name best, with a hash that the client takes: BearSSL chooses that, and signs.
 * (It offers suites of ECDSA as well to who has hashes for RSA-PSS alone.) */
static int policy_choose(const br_ssl_server_policy_class **ctx, const br_ssl_server_context *cc,
	br_ssl_server_choices *choices)
{
	struct session *s = OWNER(cc, struct session, tls);
	const char *name = br_ssl_engine_get_server_name(&cc->eng);
	size_t fits[CERTS], best = 1, n;
	const br_suite_translated *suite = br_ssl_server_get_client_suites(cc, &n);

	(void)ctx;
	for (unsigned i = 0; i < CERTS; i++) {
		fits[i] = name_fits(certs[i].name, name, strlen(name), 1);
		best = fits[i] > best ? fits[i] : best;
	}
	for (size_t u = 0; u < n; u++) {
		for (unsigned i = 0; i < CERTS; i++) {
			const struct identity *id = &s->ring->id[i];
			const br_ec_private_key *ec = br_skey_decoder_get_ec(&id->key);

			if (fits[i] != best || suite[u][1] >> 12 !=
			    (ec ? BR_SSLKEYX_ECDHE_ECDSA : BR_SSLKEYX_ECDHE_RSA) ||
			    (ec && !(br_ssl_server_get_client_curves(cc) >> ec->curve & 1)))
				continue;
			if (ec)
				br_ssl_server_set_single_ec(&s->tls, id->chain, id->chain_len, ec,
					BR_KEYTYPE_SIGN, 0, br_ec_get_default(),
					br_ecdsa_sign_asn1_get_default());
			else
				br_ssl_server_set_single_rsa(&s->tls, id->chain, id->chain_len,
					br_skey_decoder_get_rsa(&id->key), BR_KEYTYPE_SIGN, NULL,
					br_rsa_pkcs1_sign_get_default());
			if ((*s->tls.policy_vtable)->choose(s->tls.policy_vtable, cc, choices))
				return 1;
		}
	}
	return 0;
}

static const br_ssl_server_policy_class policy_class = { .choose = policy_choose };
static const br_ssl_server_policy_class *policy = &policy_class;

/* Fills buf from the kernel's generator. 0: it has none. (No handler of a signal interrupts it.) */
static int random_bytes(void *buf, size_t len, unsigned flags)
{
	return getrandom(buf, len, flags) == (ssize_t)len;
}

static const char *protocols[] = { "http/1.1" };        /* of ALPN, 8 bytes */

/* Bytes of the whole records in front, up to the first with application data, or that alone; if
 * none is, need gets what the first has. Where BearSSL fails at a header, all is: no more helps. */
static size_t records_whole(const unsigned char *p, size_t len, size_t *need)
{
	size_t at = 0;

	for (;;) {
		const size_t left = len - at;

		*need = left < 5 ? 5 : 5 + (size_t)(p[at + 3] << 8 | p[at + 4]);
		if (left >= 5 && (p[at + 1] != 3 || *need > READ_AHEAD))
			return len;
		if (left < *need || (at > 0 && p[at] == 23))
			return at;
		at += *need;
	}
}

struct bytes {
	const unsigned char *p, *end;
};

/* Takes so many off the front. Where there are fewer, they and what is left are { NULL, NULL }. */
static struct bytes bytes_take(struct bytes *from, size_t len)
{
	struct bytes taken = *from;

	if (!from->p || len > (size_t)(from->end - from->p))
		return *from = (struct bytes){ NULL, NULL };
	taken.end = from->p += len;
	return taken;
}

static size_t number_take(struct bytes *from, size_t size)
{
	struct bytes b = bytes_take(from, size);
	size_t n = 0;

	while (b.p < b.end)
		n = n << 8 | *b.p++;
	return n;
}

/* The length of the vector has that many bytes. */
static struct bytes vector_take(struct bytes *from, size_t size)
{
	return bytes_take(from, number_take(from, size));
}

/* An extension: one server name (RFC 6066 3), or protocols with ours (RFC 7301 3.1). 0: not so. */
static int hello_extension(size_t type, struct bytes v, struct bytes *name)
{
	int good = 0;

	if (type != 0 && type != 16)
		return 1;
	struct bytes list = vector_take(&v, 2);
	if (type == 0) {
		good = name->p == name->end && number_take(&list, 1) == 0;
		*name = vector_take(&list, 2);
	}
	while (type == 16 && list.p < list.end) {
		const struct bytes protocol = vector_take(&list, 1);

		good |= protocol.end - protocol.p == 8 && memcmp(protocol.p, protocols[0], 8) == 0;
	}
	return good && list.p && list.p == list.end && v.p == v.end;
}

/* Reads the first record of a handshake (RFC 5246 7.4.1.2). BearSSL looks a session up before it
 * has come to the extensions, and if there is one, nothing that they say is checked: of protocols
 * without ours its answer would even be read from far behind our table. So whoever asks to resume
 * is read here first, strictly. (Twice by BearSSL costs as much as a resumed handshake.) 0: doubts;
 * a full handshake is the answer, in which BearSSL checks. 1, and its server name; empty: none. */
static int hello_read(struct bytes b, struct bytes *name)
{
	const size_t content = number_take(&b, 3) >> 16;
	struct bytes record = vector_take(&b, 2);
	const size_t message = number_take(&record, 1);
	struct bytes hello = vector_take(&record, 3);

	*name = (struct bytes){ b.end, b.end };
	if (content != 22 || message != 1 || !record.p || record.p != record.end)
		return 0;
	bytes_take(&hello, 2 + 32);                     /* version, random */
	vector_take(&hello, 1);                         /* session ID */
	vector_take(&hello, 2);                         /* cipher suites */
	vector_take(&hello, 1);                         /* compression methods */
	struct bytes list = hello.p < hello.end ? vector_take(&hello, 2) : hello;
	while (list.p < list.end) {
		const size_t type = number_take(&list, 2);

		if (!hello_extension(type, vector_take(&list, 2), name))
			return 0;
	}
	return list.p && hello.p == hello.end;
}

/* The session cache: BearSSL's, with the server name mixed into the session ID, so that no client
 * resumes under another name by mistake. (One that wants to can: no right hangs on the name.) */
static void cache_key(br_ssl_server_context *cc, br_ssl_session_parameters *p)
{
	uint64_t id;

	memcpy(&id, p->session_id, sizeof id);
	id ^= OWNER(cc, struct session, tls)->note->name_hash;
	memcpy(p->session_id, &id, sizeof id);
}

static void cache_save(const br_ssl_session_cache_class **ctx, br_ssl_server_context *cc,
	const br_ssl_session_parameters *params)
{
	br_ssl_session_parameters p = *params;

	(void)ctx;
	cache_key(cc, &p);
	cache.vtable->save(&cache.vtable, cc, &p);
	wipe(&p, sizeof p);
}

static int cache_load(const br_ssl_session_cache_class **ctx, br_ssl_server_context *cc,
	br_ssl_session_parameters *params)
{
	(void)ctx;
	cache_key(cc, params);
	const int found = cache.vtable->load(&cache.vtable, cc, params);
	cache_key(cc, params);
	return found;
}

static const br_ssl_session_cache_class named_class = { .save = cache_save, .load = cache_load };
static const br_ssl_session_cache_class *named_cache = &named_class;

static int client_asked(const struct session *s)
{
	return clients_asked() && listener_ca(s->listener) != NULL;
}

/* What engines of both sides have in common, set once in the life of a slot, which begins as zeros:
 * no context is ever copied, and one that was never used costs no memory. 0: no entropy. */
static int engine_make(br_ssl_engine_context *eng)
{
	unsigned char seed[32];

	if (!random_bytes(seed, sizeof seed, GRND_NONBLOCK))
		return 0;
	br_ssl_engine_set_versions(eng, tls_min, tls_max);
	br_ssl_engine_set_suites(eng, suites, LENGTH(suites));
	br_ssl_engine_set_default_ec(eng);
	for (int i = br_sha1_ID; i < (int)LENGTH(hashes); i++)
		br_ssl_engine_set_hash(eng, i, hashes[i]);
	br_ssl_engine_set_prf_sha256(eng, &br_tls12_sha256_prf);
	br_ssl_engine_set_prf_sha384(eng, &br_tls12_sha384_prf);
	br_ssl_engine_set_default_aes_gcm(eng);
#if defined __SIZEOF_INT128__ && !defined __SSE2__
	/* the default less the second Poly1305, of no use to 64-bit machines, 2 KB */
	br_ssl_engine_set_chapol(eng, &br_sslrec_in_chapol_vtable, &br_sslrec_out_chapol_vtable);
	br_ssl_engine_set_chacha20(eng, br_chacha20_ct_run);
	br_ssl_engine_set_poly1305(eng, br_poly1305_ctmulq_get());
#else
	br_ssl_engine_set_default_chapol(eng);
#endif
	if (tls_min < BR_TLS12) {
		br_ssl_engine_set_hash(eng, br_md5_ID, &br_md5_vtable);
		br_ssl_engine_set_prf10(eng, &br_tls10_prf);
		br_ssl_engine_set_default_aes_cbc(eng);
	}
	if (tls_backends || clients_asked()) {
		br_ssl_engine_set_default_rsavrfy(eng);
		br_ssl_engine_set_default_ecdsa(eng);
	}
	br_ssl_engine_set_protocol_names(eng, protocols, LENGTH(protocols));
	br_ssl_engine_add_flags(eng, BR_OPT_NO_RENEGOTIATION);
	br_ssl_engine_inject_entropy(eng, seed, sizeof seed);
	wipe(seed, sizeof seed);
	return 1;
}

/* Gives a leg an engine, and that its buffers: of the one for output as much as the largest record
 * needs, to BearSSL 512, 1024, 2048, 4096 or 16384 bytes, handshakes as well. 0: no entropy. */
static int leg_start(struct session *s, struct leg *l, br_ssl_engine_context *eng, size_t largest)
{
	if (!br_ssl_engine_get_flags(eng) && !engine_make(eng))
		return 0;
	s->ring = keyring;
	keyring->users++;
	l->eng = eng;
	br_ssl_engine_set_buffers_bidi(eng, l->buf->ibuf, sizeof l->buf->ibuf,
		l->buf->obuf, sizeof l->buf->obuf - 16384 + largest);
	return 1;
}

/* The time, but not before this program was made: a device without a clock boots in 1970. */
static time_t clock_floor(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec > (time_t)BUILD_TIME ? t.tv_sec : (time_t)BUILD_TIME;
}

/* Whoever shows a certificate needs a good one, wanted or not: without any, this is not called. */
static void chain_start(const br_x509_class **ctx, const char *name)
{
	struct verifier *v = OWNER(ctx, struct verifier, u.minimal.vtable);

	v->begun = 1;
	br_ssl_engine_remove_flags(v->eng, BR_OPT_TOLERATE_NO_CLIENT_AUTH);
	br_x509_minimal_vtable.start_chain(ctx, name);
}

/* A certificate without length ends the chain: each costs a signature, a stranger may have made
 * them all, and BearSSL takes as many as come, dozens in a step of the handshake. */
static void chain_start_cert(const br_x509_class **ctx, uint32_t len)
{
	struct verifier *v = OWNER(ctx, struct verifier, u.minimal.vtable);

	br_x509_minimal_vtable.start_cert(ctx, v->begun++ <= CHAIN_MAX ? len : 0);
}

/* Validates a chain up to the given anchors (RFC 5280, as far as BearSSL's minimal engine goes). */
static void verifier_chain(struct verifier *v, br_ssl_engine_context *eng,
	const struct keyring *ring, const struct trust *trust)
{
	static br_x509_class class;
	br_x509_minimal_context *m = &v->u.minimal;
	const time_t t = clock_floor();

	br_x509_minimal_init(m, &br_sha256_vtable, ring->anchor + trust->first, trust->count);
	br_x509_minimal_set_rsa(m, br_rsa_pkcs1_vrfy_get_default());
	br_x509_minimal_set_ecdsa(m, br_ec_get_default(), br_ecdsa_vrfy_asn1_get_default());
	for (int i = br_sha224_ID; i < (int)LENGTH(hashes); i++)
		br_x509_minimal_set_hash(m, i, hashes[i]);
	br_x509_minimal_set_time(m, (uint32_t)(t / 86400) + 719528, (uint32_t)(t % 86400));
	class = br_x509_minimal_vtable;
	class.start_chain = chain_start;
	class.start_cert = chain_start_cert;
	m->vtable = &class;
	v->eng = eng;
	br_ssl_engine_set_x509(eng, &m->vtable);
}

/* Readies the verifier of a client's certificate, whose common name is noted. */
static void client_verify(struct session *s)
{
	static unsigned char oid_cn[] = { 3, 0x55, 4, 3 };
	struct verifier *v = &s->shelf->verifier;

	verifier_chain(v, &s->tls.eng, s->ring, &s->ring->trust[s->listener]);
	v->name = (br_name_element){ oid_cn, s->note->subject, sizeof s->note->subject, 0 };
	br_x509_minimal_set_name_elements(&v->u.minimal, &v->name, 1);
}

/* A handshake is over. The last one that used the keys of before SIGHUP takes them with it. */
static void tls_ring_release(struct session *s)
{
	if (s->ring && --s->ring->users == 0 && s->ring != keyring)
		keyring_wipe(s->ring);
	s->ring = NULL;
}

/* Unverified backends: only the chain's first certificate counts, and of it the key. Bytes behind
 * its end, which crash BearSSL's decoder, are left out, and with them the others. */
static void first_append(const br_x509_class **ctx, const unsigned char *buf, size_t len)
{
	struct verifier *v = OWNER(ctx, struct verifier, u.first.known.vtable);

	v->begun = 1;
	if (br_x509_decoder_last_error(&v->u.first.decoder) == BR_ERR_X509_TRUNCATED)
		br_x509_decoder_push(&v->u.first.decoder, buf, len);
}

static unsigned first_end_chain(const br_x509_class **ctx)
{
	struct verifier *v = OWNER(ctx, struct verifier, u.first.known.vtable);
	const br_x509_pkey *pk = br_x509_decoder_get_pkey(&v->u.first.decoder);

	if (pk)
		v->u.first.known.pkey = *pk;
	return (unsigned)br_x509_decoder_last_error(&v->u.first.decoder);
}

/* Takes any chain of who signs with the pinned key, whatever it says; NULL: with its first one. */
static void verifier_first(struct verifier *v, br_ssl_engine_context *eng,
	const br_x509_pkey *pinned)
{
	static br_x509_class class;

	class = br_x509_knownkey_vtable;
	class.append = first_append;
	class.end_chain = first_end_chain;
	v->u.first.known.vtable = pinned ? &br_x509_knownkey_vtable : &class;
	if (pinned)
		v->u.first.known.pkey = *pinned;
	v->u.first.known.usages = BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN;
	br_x509_decoder_init(&v->u.first.decoder, NULL, NULL);
	br_ssl_engine_set_x509(eng, &v->u.first.known.vtable);
}

/* Readies the verifier of a backend's certificate. */
static void backend_verify(struct session *s)
{
	const struct trust *trust = &s->ring->trust[LISTENERS + s->server];
	const enum tls_mode mode = backends[s->server].tls;

	if (mode == TLS_VERIFY)
		verifier_chain(&s->shelf->verifier, s->backend.eng, s->ring, trust);
	else
		verifier_first(&s->shelf->verifier, s->backend.eng, mode == TLS_PIN ?
			&s->ring->anchor[trust->first].pkey : NULL);
}

/* Readies an engine for the backend that was just connected to. 0: no entropy. */
static int tls_dial(struct session *s)
{
	br_ssl_client_context *cc = &upstreams[tls_backends ? s - sessions : 0];
	const struct server *server = &servers[s->server];
	const int resumes = now < server->session_until;
	const struct identity *id = &keyring->id[CERTS + s->server];

	leg_attach(&s->backend, &s->rec->side[tls_backends]);
	if (!leg_start(s, &s->backend, &cc->eng, 16384))
		return 0;
	br_ssl_client_set_client_certificate(cc, NULL);
	if (id->chain_len > 0 && br_skey_decoder_get_rsa(&id->key))
		br_ssl_client_set_single_rsa(cc, id->chain, id->chain_len,
			br_skey_decoder_get_rsa(&id->key), br_rsa_pkcs1_sign_get_default());
	else if (id->chain_len > 0)
		br_ssl_client_set_single_ec(cc, id->chain, id->chain_len,
			br_skey_decoder_get_ec(&id->key), BR_KEYTYPE_SIGN, 0,
			br_ec_get_default(), br_ecdsa_sign_asn1_get_default());
	if (resumes)
		br_ssl_engine_set_session_parameters(&cc->eng, &server->session);
	return br_ssl_client_reset(cc, backend_sni(&backends[s->server]), resumes) != 0;
}

/* What BearSSL's errors mean, each range by its last number: the alert (RFC 5246 7.2.2; only the
 * last four it sends by itself), why a client's session ends, the log's word; NULL: its number. */
static const struct fault {
	uint16_t last;
	uint8_t alert, why;
	const char *word;
} faults[] = {
	{ BR_ERR_OK, 0, WHY_EOF, "tls-eof" },
	{ BR_ERR_BAD_PARAM, 50, WHY_TLS_ERROR, "malformed" },           /* decode_error */
	{ BR_ERR_BAD_VERSION, 70, WHY_TLS_VERSION, "tls-version" },     /* protocol_version */
	{ BR_ERR_TOO_LARGE, 22, WHY_TLS_ERROR, "record-length" },       /* record_overflow */
	{ BR_ERR_BAD_MAC, 20, WHY_TLS_ERROR, "bad-mac" },               /* bad_record_mac */
	{ BR_ERR_NO_RANDOM, 80, WHY_NO_RANDOM, "no-random" },           /* internal_error */
	{ BR_ERR_BAD_CCS, 10, WHY_TLS_ERROR, "unexpected-message" },
	{ BR_ERR_OVERSIZED_ID, 50, WHY_TLS_ERROR, "malformed" },
	{ BR_ERR_BAD_CIPHER_SUITE, 47, WHY_TLS_CIPHER, "tls-cipher" },  /* illegal_parameter */
	{ BR_ERR_BAD_FRAGLEN, 47, WHY_TLS_ERROR, "illegal-parameter" },
	{ BR_ERR_BAD_SECRENEG, 40, WHY_TLS_ERROR, "renegotiation" },    /* RFC 5746 3.4 */
	{ BR_ERR_EXTRA_EXTENSION, 110, WHY_TLS_ERROR, "extra-extension" },
	{ BR_ERR_BAD_HELLO_DONE, 50, WHY_TLS_ERROR, "malformed" },
	{ BR_ERR_LIMIT_EXCEEDED, 80, WHY_TLS_ERROR, "large-key" },
	{ BR_ERR_BAD_FINISHED, 51, WHY_TLS_ERROR, "bad-finished" },     /* decrypt_error */
	{ BR_ERR_RESUME_MISMATCH, 47, WHY_TLS_ERROR, "resume-mismatch" },
	{ BR_ERR_INVALID_ALGORITHM, 47, WHY_TLS_ERROR, "bad-algorithm" },
	{ BR_ERR_BAD_SIGNATURE, 51, WHY_TLS_ERROR, "bad-signature" },
	{ BR_ERR_WRONG_KEY_USAGE, 43, WHY_CLIENT_CERT, "key-usage" },
	{ BR_ERR_NO_CLIENT_AUTH, 40, WHY_CLIENT_CERT, "no-certificate" },
	{ FAULT_NOT_TLS, 70, WHY_NOT_TLS, "not-tls" },
	{ BR_ERR_X509_BAD_TIME, 42, WHY_CLIENT_CERT, "bad-certificate" },
	{ BR_ERR_X509_WRONG_KEY_TYPE, 43, WHY_CLIENT_CERT, "unsupported-certificate" },
	{ BR_ERR_X509_BAD_SIGNATURE, 42, WHY_CLIENT_CERT, "bad-signature" },
	{ FAULT_NOT_YET_VALID, 45, WHY_CLIENT_CERT, "not-yet-valid" },
	{ BR_ERR_X509_EXPIRED, 45, WHY_CLIENT_CERT, "expired" },
	{ BR_ERR_X509_DN_MISMATCH, 42, WHY_CLIENT_CERT, "bad-dn" },
	{ BR_ERR_X509_BAD_SERVER_NAME, 42, WHY_CLIENT_CERT, "name-mismatch" },
	{ BR_ERR_X509_CRITICAL_EXTENSION, 43, WHY_CLIENT_CERT, "critical-extension" },
	{ BR_ERR_X509_NOT_CA, 48, WHY_CLIENT_CERT, "not-ca" },          /* unknown_ca */
	{ BR_ERR_X509_FORBIDDEN_KEY_USAGE, 43, WHY_CLIENT_CERT, "key-usage" },
	{ BR_ERR_X509_WEAK_PUBLIC_KEY, 42, WHY_CLIENT_CERT, "weak-key" },
	{ BR_ERR_X509_NOT_TRUSTED, 48, WHY_CLIENT_CERT, "unknown-ca" },
	{ FAULT_PIN, 42, WHY_CLIENT_CERT, "pin-mismatch" },
	/* alerts that came, those on our certificate and on the lack of one apart */
	{ BR_ERR_RECV_FATAL_ALERT + 40, 0, WHY_TLS_ALERT, NULL },
	{ BR_ERR_RECV_FATAL_ALERT + 49, 0, WHY_TLS_ALERT, "certificate-refused" },
	{ BR_ERR_RECV_FATAL_ALERT + 115, 0, WHY_TLS_ALERT, NULL },
	{ BR_ERR_RECV_FATAL_ALERT + 116, 0, WHY_TLS_ALERT, "certificate-refused" },
	{ BR_ERR_RECV_FATAL_ALERT + 255, 0, WHY_TLS_ALERT, NULL },
	{ BR_ERR_SEND_FATAL_ALERT + 40, 0, WHY_TLS_CIPHER, "tls-cipher" }, /* and that were sent */
	{ BR_ERR_SEND_FATAL_ALERT + 70, 0, WHY_TLS_VERSION, "tls-version" },
	{ BR_ERR_SEND_FATAL_ALERT + 86, 0, WHY_TLS_VERSION, "tls-version" },    /* RFC 7507 */
	{ UINT16_MAX, 0, WHY_ALPN, "alpn" },
};

/* The error of a leg's engine. BearSSL has one number for too early and too late: the top of its
 * verifier's stack is what is left of Validity, whose end is read only when the begin was good. */
static int leg_fault(const struct session *s, const struct leg *l)
{
	const int error = l->eng ? br_ssl_engine_last_error(l->eng) : BR_ERR_OK;
	const br_x509_minimal_context *m = s->shelf ? &s->shelf->verifier.u.minimal : NULL;

	if (error == BR_ERR_UNSUPPORTED_VERSION && l->buf && l->buf->ibuf[1] != 3)
		return FAULT_NOT_TLS;
	if (tls_backends && (error == BR_ERR_BAD_SIGNATURE || error == BR_ERR_WRONG_KEY_USAGE) &&
	    l == &s->backend && backends[s->server].tls == TLS_PIN)
		return FAULT_PIN;               /* another key has signed, or is of another kind */
	return error == BR_ERR_X509_EXPIRED && m && m->cpu.dp > m->dp_stack && m->cpu.dp[-1] > 0 ?
		FAULT_NOT_YET_VALID : error;
}

static const struct fault *fault_find(int error)
{
	const struct fault *f = faults;

	while (f->last < error)
		f++;
	return f;
}

/* Readies the engine for a ClientHello. One with TLS 1.3 alone in its list of versions (RFC 8446
 * 4.2.1) has 1.2 where BearSSL looks for one: there it gets SSL 2, to be refused for its version,
 * not for its suites. Who may resume has the cache; a resumed session shows no certificate, so none
 * is kept or taken where one is asked for, wherever the client has it from. 0: no entropy. */
static int tls_start(struct session *s)
{
	struct leg *l = &s->client;
	const struct trust *t = &keyring->trust[s->listener];
	struct bytes name;

	if (!leg_start(s, l, &s->tls.eng, record_max))
		return 0;
	const int good = hello_read((struct bytes){ l->ahead + l->at, l->ahead + l->end }, &name);
	s->note->name_hash = hash_bytes(0, name.p, (size_t)(name.end - name.p));
	if (bytes_find(l->ahead + l->at, l->end - l->at, "\0\x2b\0\3\2\3\4", 7))
		l->ahead[l->at + 9] = 2;
	place_start(s);
	br_ssl_engine_set_all_flags(l->eng, BR_OPT_NO_RENEGOTIATION | BR_OPT_FAIL_ON_ALPN_MISMATCH |
		BR_OPT_ENFORCE_SERVER_PREFERENCES | (listeners[s->listener].verify_client ==
		VERIFY_OPTIONAL ? BR_OPT_TOLERATE_NO_CLIENT_AUTH : 0));
	br_ssl_server_set_cache(&s->tls, session_cache > 0 && good && !client_asked(s) ?
		&named_cache : NULL);
	br_ssl_server_set_policy(&s->tls, &policy);
	if (clients_asked())            /* it may have served another listener before */
		br_ssl_server_set_trust_anchor_names_alt(&s->tls, &keyring->anchor[t->first],
			t->count);
	return br_ssl_server_reset(&s->tls) != 0;
}

/* ---- what certificates say of themselves: their dates by BearSSL's decoder, their names ---- */

/* Takes the next element of some. Its tag, or 0: there is none. */
static unsigned der_take(struct bytes *from, struct bytes *out)
{
	const unsigned tag = (unsigned)number_take(from, 1);
	const size_t len = number_take(from, 1);

	*out = bytes_take(from, len < 0x80 ? len : number_take(from, len - 0x80));
	return out->p ? tag : 0;
}

/* Names of hosts among the extensions, in the one subjectAltName, with commas between. */
static void der_names(struct bytes list, struct text *names)
{
	struct bytes value;
	unsigned tag;

	list.p = bytes_find(list.p, (size_t)(list.end - list.p), "\6\3\x55\x1d\x11", 5);
	while ((tag = der_take(&list, &value)) && tag != 4)
		;                               /* the id, and a flag or not */
	der_take(&value, &list);
	while ((tag = der_take(&list, &value)))
		if (tag == 0x82) {
			text_add(names, ",", names->len > 0);
			text_add(names, value.p, (size_t)(value.end - value.p));
		}
}

/* A line for a certificate, and one more if it is not valid now. */
static void cert_say(const br_x509_certificate *c, const char *path, const char *changed)
{
	const uint64_t t = (uint64_t)clock_floor() + 719528 * 86400ull; /* since the year 0 */
	struct bytes cert = { c->data, c->data + c->data_len }, part;
	char raw[LOG_LINE / 4], names[LOG_LINE / 2] = "-", issuer[100] = "-", date[16];
	struct text list = { .p = raw, .size = sizeof raw };
	br_x509_decoder_context dc;
	unsigned tag, n = 0;

	br_x509_decoder_init(&dc, NULL, NULL);
	br_x509_decoder_push(&dc, c->data, c->data_len);
	der_take(&cert, &cert);
	der_take(&cert, &cert);
	while ((tag = der_take(&cert, &part))) {
		n += tag == 0x30;               /* algorithm, issuer, validity, subject, key */
		if (tag == 0x30 && n == 2)
			subject_text(issuer, sizeof issuer, part.p, part.end);
		else if (tag == 0x30 && n == 4)
			subject_text(names, sizeof names, part.p, part.end);
		else if (tag == 0xa3)
			der_names(part, &list);
	}
	if (list.len > 0)
		log_escape(names, sizeof names, raw, list.len);
	if (t < dc.notbefore_days * 86400ull + dc.notbefore_seconds)
		log_line(LOG_WARNING, "warning %s: %s is not valid before %s, or the clock is "
			"wrong", checked, path, date_format(dc.notbefore_days - 60, date));
	if (t > dc.notafter_days * 86400ull + dc.notafter_seconds)
		log_line(LOG_WARNING, "warning %s: %s has expired", checked, path);
	log_line(LOG_NOTICE, "cert entry=%s names=%s issuer=%s until=%s days=%d%s", checked,
		names, issuer, date_format(dc.notafter_days - 60, date),
		(int)(dc.notafter_days - (unsigned)(t / 86400)), changed);
}

/* What a keyring has, at its start or in place of another. How many are not what that had. */
static unsigned certs_say(const struct keyring *ring, const struct keyring *before)
{
	unsigned changed = 0;

	for (unsigned i = 0; i < LENGTH(ring->id); i++) {
		const struct identity *id = &ring->id[i], *old = &(before ? before : ring)->id[i];
		const unsigned k = i < CERTS ? i : i - CERTS;
		const int same = id->der_len == old->der_len &&
			memcmp(id->der, old->der, id->der_len) == 0;

		changed += !same;
		entry_look(i < CERTS ? "certs" : "backends", k);
		if (id->chain_len > 0)
			cert_say(&id->chain[0], i < CERTS ? certs[k].chain : backends[k].cert,
				!before ? "" : same ? " changed=0" : " changed=1");
	}
	return changed;
}

/* ---- moves: bytes between sockets and buffers ----
 *
 * Each moves what it can at once and says whether any moved; relay_pump repeats them until each
 * waits on a descriptor, for decrypted bytes raise no event, nor does what the epoll set has told
 * before. A read that does not fill its room has emptied the socket, but for what leg.last says. */

static int is_tunnel(const struct session *s)
{
	return s->opened && s->framing == BODY_TUNNEL;
}

static void session_end(struct session *s, enum party by, enum why why)
{
	if (s->why == WHY_NONE) {
		s->why = (uint8_t)why;
		s->by = (uint8_t)by;
	}
}

/* A socket error, or a TLS failure: no order any more. */
static void session_broke(struct session *s, const struct leg *l, enum why why)
{
	s->broken = l == &s->client ? BY_CLIENT : BY_BACKEND;
	session_end(s, (enum party)s->broken, why);
}

/* What the last socket call of a leg means for the session: nothing, or its end. */
static void leg_error(struct session *s, const struct leg *l)
{
	if (!would_block(errno))
		session_broke(s, l, errno == ETIMEDOUT ? WHY_TIMEOUT : WHY_RESET);
}

/* Has the epoll set tell of a leg; closing its descriptor takes it out. 0, and errno: no room. */
static int leg_watch(const struct session *s, struct leg *l)
{
	struct epoll_event ev = {
		.events = (uint32_t)(EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET),
		.data.u64 = (uint64_t)s->id << 32 | (uint32_t)(s - sessions) * 2 |
			(l == &s->backend),
	};

	return epoll_ctl(fds[FD_EPOLL].fd, EPOLL_CTL_ADD, l->fd, &ev) == 0;
}

/* Whether the engine is done with for good: failed, or closed by both. */
static int leg_closed(const struct leg *l)
{
	return l->eng && br_ssl_engine_current_state(l->eng) == BR_SSL_CLOSED;
}

/* A side ended in order. To an answer without a length that is its end, if TLS says so as well (RFC
 * 9112 9.8); one with a length came short. */
static void leg_ended(struct session *s, struct leg *l)
{
	enum framing framing = l == &s->backend ? s->framing : BODY_TUNNEL;
	enum why why = framing == BODY_TUNNEL ? WHY_EOF :
		framing == BODY_EOF && (!l->eng || leg_closed(l)) ? WHY_DONE : WHY_SHORT;

	session_end(s, l == &s->client ? BY_CLIENT : BY_BACKEND, why);
	if (framing == BODY_EOF && why == WHY_SHORT)
		s->broken = BY_BACKEND; /* or its end would look like one */
	l->eof = 1;
}

/* Whether it takes nothing any more: its engine is done, or awaits the rest of what has ended. */
static int leg_over(const struct leg *l)
{
	return leg_closed(l) || (l->eng && l->eof && !(br_ssl_engine_current_state(l->eng) &
		(BR_SSL_SENDREC | BR_SSL_SENDAPP | BR_SSL_RECVAPP)));
}

/* Plaintext that nobody has taken yet; NULL: none. */
static unsigned char *leg_readable(const struct leg *l, size_t *len)
{
	*len = l->eng ? 0 : l->end - l->at;
	if (l->eng && l->buf)
		return br_ssl_engine_recvapp_buf(l->eng, len);
	return *len > 0 ? l->ahead + l->at : NULL;
}

/* `len` of it, above 0, were taken. */
static void leg_consume(struct leg *l, size_t len)
{
	l->empty_records = 0;
	if (l->eng)
		br_ssl_engine_recvapp_ack(l->eng, len);
	else
		l->at = (uint16_t)(l->at + len);
}

/* Room for plaintext; NULL: none until what is there is sent. */
static unsigned char *leg_room(const struct leg *l, size_t *len)
{
	*len = l->buf && l->buf->out_end == 0 ? sizeof l->buf->obuf : 0;
	if (l->eng && l->buf)
		return br_ssl_engine_sendapp_buf(l->eng, len);
	return *len > 0 ? l->buf->obuf : NULL;
}

/* `len` bytes, above 0, were put there: they make one record. */
static void leg_put(struct leg *l, size_t len)
{
	if (!l->eng) {
		l->buf->out_end = len;
	} else {
		br_ssl_engine_sendapp_ack(l->eng, len);
		br_ssl_engine_flush(l->eng, 0);
	}
}

/* Bytes that wait for the socket; NULL: none. */
static unsigned char *leg_pending(const struct leg *l, size_t *len)
{
	*len = l->buf ? l->buf->out_end - l->buf->out_at : 0;
	if (l->eng && l->buf)
		return br_ssl_engine_sendrec_buf(l->eng, len);
	return *len > 0 ? l->buf->obuf + l->buf->out_at : NULL;
}

/* What is left of the request's body goes nowhere; so what comes behind is no request. */
static void body_drop(struct session *s)
{
	s->keep = s->keep && s->body.done;
	s->body.done = 1;
}

/* Memory to socket, with a hint when more follows at once, that the kernel fills its segments and
 * wakes the other side once; leg_settle lets go of what it held back when nothing followed. Bytes
 * taken. A backend that takes no more may have sent something before that is still there to read;
 * if it was reset, send took the error, and behind those bytes recv tells of an end in order. */
static size_t leg_write(struct session *s, struct leg *l, const void *p, size_t len)
{
	const ssize_t n = send(l->fd, p, len, MSG_NOSIGNAL | (l->more ? MSG_MORE : 0));

	l->full = n < (ssize_t)len;
	l->corked = l->more && !l->full;
	if (n >= 0)
		return (size_t)n;
	if (l == &s->client || (errno != EPIPE && errno != ECONNRESET)) {
		leg_error(s, l);
		return 0;
	}
	l->reset = errno == ECONNRESET;         /* EPIPE: it ended in order */
	if (s->state == RELAY)
		session_end(s, BY_BACKEND, l->reset ? WHY_RESET : WHY_EOF);
	if (s->state > REQUEST)
		body_drop(s);           /* before, another backend may get it */
	l->fin = l->in = l->last = 1;
	return 0;
}

/* After a run. */
static void leg_settle(struct leg *l)
{
	if (l->corked)
		socket_option(l->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	l->corked = 0;
	if (l->at == l->end)
		spare_return(l);
}

/* Buffer to socket. */
static int leg_send(struct session *s, struct leg *l)
{
	unsigned char *p;
	size_t len;
	int moved = 0;

	while (!l->full && !l->fin && !s->broken && (p = leg_pending(l, &len)) != NULL &&
	    (len = leg_write(s, l, p, len)) > 0) {
		moved = 1;
		if (l->eng)
			br_ssl_engine_sendrec_ack(l->eng, len);
		else if ((l->buf->out_at += len) == l->buf->out_end)
			l->buf->out_at = l->buf->out_end = 0;
	}
	return moved;
}

/* How many bytes the epoll set is to wait for, 0: any. */
static void leg_mark(struct leg *l, size_t bytes)
{
	if (bytes != l->mark)
		socket_option(l->fd, SOL_SOCKET, SO_RCVLOWAT, bytes ? (unsigned)bytes : 1);
	l->mark = (uint16_t)bytes;
}

/* Whether there may be something to read in this run. */
static int leg_in(const struct leg *l)
{
	return l->in && !l->eof && l->left > 0;
}

/* A read of so many bytes brought n of them. */
static void leg_took(struct leg *l, ssize_t n, size_t room)
{
	if (n < 0)
		l->last = 0;
	if (n < (ssize_t)room && !l->last)
		l->in = 0;
	l->left = n < l->left ? (uint16_t)(l->left - (n > 0 ? n : 0)) : 0;
}

/* Socket to memory. Bytes, 0: none now. */
static size_t leg_read(struct session *s, struct leg *l, unsigned char *p, size_t room, int flags)
{
	ssize_t n = recv(l->fd, p, room, flags);

	leg_mark(l, 0);
	leg_took(l, n, room);
	l->filled = n < (ssize_t)room ? 0 : l->filled < 2 ? l->filled + 1 : 2;
	if (n < 0)
		leg_error(s, l);
	else if (n == 0 && l->reset)
		session_broke(s, l, WHY_RESET);
	else if (n == 0)
		leg_ended(s, l);
	return n > 0 ? (size_t)n : 0;
}

/* Whether the engine stands between two records of its side. */
static int leg_between(const struct leg *l)
{
	size_t len;

	return br_ssl_engine_recvrec_buf(l->eng, &len) == l->buf->ibuf && len == 5;
}

/* Whether what is read must be there to its end, and go on at once. */
static int records_scarce(void)
{
	return records_pool.lent > records_pool.count / 2;
}

/* Whether a side may be read: not while the other takes nothing, so that it would wait. */
static int leg_heard(struct session *s, struct leg *l)
{
	struct leg *to = l == &s->client ? &s->backend : &s->client;
	struct pollfd p = { .fd = to->fd, .events = POLLOUT };

	if (!to->full && to->fd >= 0 && records_scarce() && poll(&p, 1, 0) == 0)
		to->full = 1;
	return !to->full || to->fin || (l == &s->client && s->body.done);
}

/* Chooses the place to read ahead into, when all before was taken. A side that twice in a row has
 * filled its room sends bulk: it is read into a spare set of buffers as long as they abound, and
 * one call brings several records. leg_settle gives that back when it is empty. */
static void leg_place(struct session *s, struct leg *l)
{
	l->at = l->end = 0;
	if (!l->spare && s->state >= RESPONSE && l->filled == 2 &&
	    records_pool.lent < records_pool.count / 2)
		l->spare = pool_lend(&records_pool);
	l->ahead = l->spare ? l->spare->bulk : l->buf ? l->buf->ahead : NULL;
}

/* How many of the bytes that a socket has are to be read, so that none is of a record that is not
 * whole. 0: none; the set tells when the first one is, or shows its length. If it tells of less, no
 * more will come, or the socket has no room: all are read, then. Room is made before, for what is
 * left of a page counts as a page (records in pieces, for a minute). */
static size_t leg_peek(struct session *s, struct leg *l, unsigned char *p, size_t room)
{
	ssize_t n = recv(l->fd, p, room, MSG_PEEK);
	size_t need, whole = n > 0 ? records_whole(p, (size_t)n, &need) : 0;

	if (whole == (size_t)n && whole < room && !l->last)
		l->in = 0;                              /* that is all */
	if (n == 0 || whole > 0)
		return whole + (n == 0);                /* its end is there to be read */
	if (n < 0) {
		leg_took(l, n, 1);
		leg_error(s, l);
		return 0;
	}
	if (n < l->mark || l->last)
		return (size_t)n;
	if (!l->grown)
		socket_option(l->fd, SOL_SOCKET, SO_RCVBUF, RECEIVE_ROOM);
	l->grown = 1;
	leg_mark(l, need);
	l->in = 0;
	return 0;
}

/* Socket to read-ahead, behind what is there. A long head may have to wait for its rest, or its
 * backend, on a shelf, so that must be there, or no more is read, and it waits for one. */
static int leg_recv(struct session *s, struct leg *l)
{
	const int tls = l->eng || (l == &s->client && !s->plain);
	const size_t most = NOTE_TEXT - HEAD_EXTRA / 2, have = head_len(s);
	size_t room, rest;

	if (l->at == l->end)
		leg_place(s, l);
	room = (l->spare ? sizeof l->spare->bulk : sizeof l->buf->ahead) - l->end;
	if (tls && l->end == 0 && (s->state < REQUEST || records_scarce())) {
		if (!l->eng || leg_between(l))
			room = leg_peek(s, l, l->ahead, room);
		else if (br_ssl_engine_recvrec_buf(l->eng, &rest) && rest < room)
			room = rest;
	}
	if (s->state == HEAD && !s->shelf && room > 0 && have + room > most) {
		room = !tls && have < most ? most - have : shelf_borrow(s) ? room : 0;
		l->in = l->in || room == 0;     /* whatever the peek saw, it is there yet */
	}
	room = room > 0 ? leg_read(s, l, l->ahead + l->end, room, 0) : 0;
	l->end = (uint16_t)(l->end + room);
	return room > 0;
}

/* Read-ahead to engine, at most up to the end of one record. */
static int leg_feed(struct session *s, struct leg *l)
{
	unsigned char *p;
	size_t len, left;
	int moved = 0;

	while ((left = l->end - l->at) > 0 && (p = br_ssl_engine_recvrec_buf(l->eng, &len))) {
		if (p == l->buf->ibuf && len == 5) {
			if (!moved && ++l->empty_records > FLOOD_RECORDS)
				session_broke(s, l, WHY_FLOOD);
			if (moved || s->broken)
				break;
		}
		len = len < left ? len : left;
		memcpy(p, l->ahead + l->at, len);
		l->at = (uint16_t)(l->at + len);
		moved = 1;
		br_ssl_engine_recvrec_ack(l->eng, len);
	}
	return moved;
}

/* Whether an engine never moves again: BearSSL does not wake up from renegotiations that come
 * faster than it refuses them, nor, closed, with plaintext not taken or words that can't go. */
static int leg_stuck(const struct leg *l)
{
	return !(br_ssl_engine_current_state(l->eng) &
		(BR_SSL_RECVREC | BR_SSL_RECVAPP | (l->fin ? 0u : BR_SSL_SENDREC)));
}

/* Reads and forgets, so that closing does not reset what the peer has yet to read. */
static void leg_discard(struct leg *l)
{
	while (leg_in(l)) {
		const ssize_t n = recv(l->fd, scratch, sizeof scratch, 0);

		leg_took(l, n, sizeof scratch);
		l->eof = n == 0 || (n < 0 && !would_block(errno));
	}
}

/* Socket to engine. The socket is read when all before was taken: its end is that of everything. */
static int leg_fill(struct session *s, struct leg *l)
{
	int moved = leg_in(l) && l->at == l->end && !leg_readable(l, &ignored) &&
		leg_heard(s, l) && leg_recv(s, l);

	if (!l->eng || (l->eof && l->fin && is_tunnel(s)))
		return moved;
	while (!s->broken && leg_feed(s, l))
		moved = 1;
	if (leg_closed(l)) {
		l->at = l->end;
		if (br_ssl_engine_last_error(l->eng))
			session_broke(s, l, (enum why)fault_find(leg_fault(s, l))->why);
		else if (!l->eof)
			leg_ended(s, l);
	} else if (leg_stuck(l)) {
		l->at = l->end;
		if (l->fin && s->state != EXCHANGE)
			leg_discard(l);
		else
			session_broke(s, l, WHY_TLS_ERROR);     /* nor may an answer look whole */
	}
	return moved;
}

/* ---- relaying ---- */

static void code_note(struct session *s, unsigned code, enum party by)
{
	if (s->code == 0) {
		s->code = (uint16_t)code;
		s->code_by = (uint8_t)by;
	}
}

/* Notes bytes that go on in a tunnel. What flow_scan returns. */
static size_t tunnel_passed(struct session *s, unsigned way, const void *p, size_t len)
{
	struct flow *f = &s->flow[way];
	const size_t end = flow_scan(f, way == TO_BACKEND, p, len);

	if (f->over)            /* else that may be half a code */
		code_note(s, f->code, way == TO_BACKEND ? BY_CLIENT : BY_BACKEND);
	return end;
}

/* To a side: into its buffers, or of a backend in the clear straight to its socket. Bytes taken. */
static size_t leg_pass(struct session *s, struct leg *l, const void *p, size_t len)
{
	size_t room;
	unsigned char *to = leg_room(l, &room);

	if (!l->eng && !l->buf)
		return l->full ? 0 : leg_write(s, l, p, len);
	len = len < room ? len : room;
	if (len == 0)
		return 0;
	memcpy(to, p, len);
	leg_put(l, len);
	return len;
}

/* Puts a frame of our own where one may stand: a Close, or a Ping; masked for a backend (5.3). */
static void frame_put(struct session *s, unsigned way, unsigned code)
{
	const size_t mask = way == TO_BACKEND ? 4 : 0, text = code == SAY_PING ? 0 : 2;
	unsigned char p[8] = { text ? 0x88 : 0x89, (unsigned char)(mask << 5 | text) };

	if (mask)
		random_bytes(p + 2, mask, GRND_NONBLOCK);
	if (text) {
		p[2 + mask] = (unsigned char)(code >> 8 ^ p[2]);
		p[3 + mask] = (unsigned char)(code ^ p[3]);
		s->flow[way].over = 1;
		code_note(s, code, BY_PROXY);
	}
	leg_pass(s, way == TO_BACKEND ? &s->backend : &s->client, p, 2 + mask + text);
	if (way == TO_CLIENT) {
		s->say = text > 0 ? SAID : 0;
		s->pinged = text == 0;
		s->heard = (uint32_t)now;
	}
}

/* A tunnel ends for a reason of ours. Its client is told at a frame's end; what the backend sends
 * behind that is nobody's, what the client sends, its answer last, still goes to the backend, whose
 * end is that of both. Who does not follow, or uses no frames, is told by FIN after linger_ms. */
static void tunnel_leave(struct session *s, enum why why)
{
	session_end(s, BY_PROXY, why);
	s->say = GOING_AWAY;
	s->backend.eof |= !frames || s->flow[TO_CLIENT].over;
}

static int tunnel_leaving(const struct session *s)
{
	return s->say > SAY_PING;
}

/* A tunnel's client was not heard for ping_ms: asks it, once, unless it is seen to live. */
static void tunnel_ask(struct session *s)
{
	struct tcp_info info;
	const int unsent = socket_unsent(s->client.fd) > 0;

	s->heard = (uint32_t)now;
	/* what it has sent waits for the backend, its answer behind that; or it takes bytes */
	if (s->client.in || (unsent && socket_silent(s->client.fd, &info) < ping_ms))
		s->pinged = 0;
	else if (s->pinged)
		session_broke(s, &s->client, WHY_NO_PONG);
	else if (unsent)
		s->pinged = 1;          /* by that */
	else
		s->say = SAY_PING;
}

/* What the time that a tunnel has stood, or was silent, asks for. To each, max_age_ms is a tenth
 * more or less, for those who came together need not go together. */
static void tunnel_look(struct session *s)
{
	if (idle_ms > 0 && (uint32_t)now - s->active >= idle_ms)
		tunnel_leave(s, WHY_IDLE);
	else if (max_age_ms > 0 && now - s->born >= max_age_ms *
	    (922 + hash_mix(s->born << 32 ^ s->id) % 205) >> 10)
		tunnel_leave(s, WHY_MAX_AGE);
	else if (ping_ms > 0 && (uint32_t)now - s->heard >= ping_ms)
		tunnel_ask(s);
}

/* Whether nothing of ours may be put into a direction: it is amid a frame, was told a Close, or one
 * side has begun to close, and the other's answer is its own. */
static int tunnel_taken(const struct session *s, unsigned way)
{
	return !frames || !is_tunnel(s) || !flow_between(&s->flow[way]) ||
		(s->code > 0 && s->code_by != BY_PROXY);
}

/* A side of a tunnel was lost. 1: the other can be told, and is, as if that had ended in order. */
static int tunnel_survives(struct session *s)
{
	static const struct sockaddr nowhere = { .sa_family = AF_UNSPEC };
	const int client = s->broken == BY_CLIENT;
	struct leg *lost = client ? &s->client : &s->backend;
	struct leg *other = client ? &s->backend : &s->client;

	if (other->fin || tunnel_taken(s, client ? TO_BACKEND : TO_CLIENT))
		return 0;
	(void)connect(lost->fd, &nowhere, sizeof nowhere);      /* a reset, if it had none */
	lost->at = lost->end;
	lost->eof = lost->fin = 1;
	s->body.done = 1;
	s->broken = 0;
	leg_send(s, other);
	return 1;
}

/* Tells a side the end, behind all that is pending: of a tunnel, a Close to who has not ended, and
 * had none; close_notify; then FIN. Again while fin is 0. */
static void leg_finish(struct session *s, struct leg *l)
{
	if (s->broken)
		return;
	const unsigned way = l == &s->client ? TO_CLIENT : TO_BACKEND;
	if (!l->fin && (!l->eof || tunnel_leaving(s)) && !tunnel_taken(s, way) &&
	    (!l->buf || leg_room(l, &ignored)))
		frame_put(s, way, tunnel_leaving(s) ? GOING_AWAY : s->code ? s->code :
			way == TO_CLIENT ? SERVICE_RESTART : GOING_AWAY);
	leg_send(s, l);         /* or the engine is not asked to close */
	if (l->eng && l->buf && (br_ssl_engine_current_state(l->eng) & BR_SSL_SENDAPP))
		br_ssl_engine_close(l->eng);
	leg_send(s, l);
	if (leg_pending(l, &ignored) || s->broken)
		return;
	shutdown(l->fd, SHUT_WR);
	leg_mark(l, 0);         /* the kernel tells what that kept back, one before 4.18 later */
	l->fin = 1;
}

/* Whether a whole record of application data was read ahead behind the one that is being taken. */
static int leg_has_more(const struct leg *l)
{
	return l->eng && l->at < l->end && l->ahead[l->at] == 23 &&
		records_whole(l->ahead + l->at, l->end - l->at, &ignored) > 0;
}

/* Client to backend, as far as the request may go: bytes of a tunnel, or of a body; of chunks one
 * piece, no extensions and trailers. What was not taken is judged anew the next time. */
static int relay_up(struct session *s)
{
	struct leg *to = &s->backend;
	size_t len;
	unsigned char *p = leg_readable(&s->client, &len);

	if (leg_over(to))
		body_drop(s);
	if (p && s->body.done && s->state == EXCHANGE && !s->keep) {
		leg_consume(&s->client, len);   /* nobody's; its end is awaited */
		return 1;
	}
	if (!p || s->body.done || to->fin)
		return 0;
	to->more = leg_has_more(&s->client);
	struct chunked ahead = s->body;
	int kept = 1;
	const size_t its = chunked_scan(&ahead, (const char *)p, len, &kept);
	len = kept && its > 0 ? leg_pass(s, to, p, its) : its;
	if (len == its)
		s->body = ahead;
	else
		chunked_scan(&s->body, (const char *)p, len, &kept);
	if (s->body.bad)
		session_broke(s, &s->client, WHY_CHUNKS);
	if (len == 0)
		return 0;
	if (frames && is_tunnel(s))
		tunnel_passed(s, TO_BACKEND, p, len);
	leg_consume(&s->client, len);
	s->rx += len;
	/* what only our Ping has brought makes no tunnel less idle */
	s->fed |= !(s->pinged && s->flow[TO_BACKEND].first == 0x8a);
	s->pinged = s->answered = 0;
	s->heard = (uint32_t)now;
	return 1;
}

/* Bytes from the backend, in the clear straight from its socket but for bulk; 0: none now. */
static size_t backend_read(struct session *s, unsigned char *out, size_t size)
{
	struct leg *l = &s->backend;
	size_t len;

	if (!l->eng && l->at == l->end) {
		if (!leg_in(l) || !leg_heard(s, l))
			return 0;
		leg_place(s, l);
		if (!l->spare)
			return leg_read(s, l, out, size, 0);
		l->end = (uint16_t)leg_read(s, l, l->ahead, BULK, 0);   /* makes full records */
	}
	const unsigned char *p = leg_readable(l, &len);
	len = len < size ? len : size;
	if (len > 0) {
		memcpy(out, p, len);
		leg_consume(l, len);
	}
	return len;
}

/* How many of `len` bytes from the backend belong to the answer; notes its end. In a tunnel none do
 * behind a Close of ours; if one is to be said, those up to the last frame's end. */
static size_t answer_take(struct session *s, const char *p, size_t len)
{
	if (s->framing != BODY_TUNNEL) {
		len = chunked_scan(&s->answer, p, len, NULL);
		if (s->answer.done || s->answer.bad) {
			session_end(s, BY_BACKEND, s->answer.bad ? WHY_SHORT : WHY_DONE);
			s->backend.eof = 1;
		}
		return len;
	}
	if (s->say == SAID)
		return 0;
	const size_t end = frames ? tunnel_passed(s, TO_CLIENT, p, len) : 0;
	if (s->say <= SAY_PING || end == 0 || s->flow[TO_CLIENT].over)
		return len;
	s->flow[TO_CLIENT].seen = 0;
	return end;
}

/* Backend to client. Records are as large as they can be but for the first after a rest, so that
 * its bytes are not held back on a slow line until 16 KB are there. */
static int relay_down(struct session *s)
{
	struct leg *to = &s->client;
	size_t size, len;
	unsigned char *room = leg_room(to, &size);

	if (room && hd) {               /* the answer's head goes before anything else */
		hd->off += leg_pass(s, to, hd->bytes + hd->off, hd->len - hd->off);
		hd = hd->off < hd->len ? hd : NULL;
		return 1;
	}
	if (!room || s->backend.eof)
		return 0;
	if (s->say && size >= 4 && !tunnel_taken(s, TO_CLIENT)) {
		frame_put(s, TO_CLIENT, s->say);
		return 1;
	}
	if (to->eng && !to->started && size > FIRST_RECORD)
		size = FIRST_RECORD;
	len = backend_read(s, room, size);
	if (len == 0)
		return 0;
	to->started = 1;
	s->answered = s->fed = 1;
	to->more = s->backend.eng ? leg_has_more(&s->backend) :
		s->backend.at < s->backend.end || (len == size && leg_in(&s->backend));
	len = answer_take(s, (char *)room, len);
	to->more &= !s->backend.eof;
	s->tx += len;
	if (len > 0)
		leg_put(to, len);
	return 1;
}

/* Both ways; before an answer that is the request's body, and what its backend sends. What a client
 * whose connection is kept sends behind its request waits in the socket, if it came alone. */
static void relay_pump(struct session *s)
{
	const int answered = s->state != RESPONSE;
	int moved;

	do {
		moved = (!s->body.done || (answered && !s->keep)) && leg_fill(s, &s->client);
		moved |= relay_up(s);
		moved |= leg_send(s, &s->backend);
		moved |= s->backend.eng && leg_fill(s, &s->backend);
		moved |= answered && relay_down(s);
		moved |= leg_send(s, &s->client);
	} while (moved && !s->broken);
}

/* ---- answers of our own ---- */

static const char *status_text(unsigned status)
{
	static const struct { unsigned status; const char *text; } texts[] = {
		{ 308, "Permanent Redirect" }, { 400, "Bad Request" }, { 403, "Forbidden" },
		{ 404, "Not Found" }, { 405, "Method Not Allowed" }, { 408, "Request Timeout" },
		{ 414, "URI Too Long" }, { 421, "Misdirected Request" },
		{ 426, "Upgrade Required" }, { 431, "Request Header Fields Too Large" },
		{ 501, "Not Implemented" }, { 502, "Bad Gateway" }, { 503, "Service Unavailable" },
		{ 504, "Gateway Timeout" }, { 505, "HTTP Version Not Supported" },
	};
	unsigned i = 0;

	while (i < LENGTH(texts) - 1 && texts[i].status != status)
		i++;
	return texts[i].text;
}

/* Location of a redirect: the host asked for, with redirect_port, or the first WSS listener's. */
static void text_location(struct text *t)
{
	const struct request *r = &hd->u.request;
	const char *port = redirect_port;

	text_format(t, "\r\nLocation: https://%.*s", SPAN(hd->bytes, r->name));
	for (unsigned i = 0; i < LISTENERS && !port; i++)
		port = listeners[i].kind == WSS ? listeners[i].port : NULL;
	if (port && strcmp(port, "443") != 0)
		text_format(t, ":%s", port);
	if (r->target.len == 0 || hd->bytes[r->target.at] != '/')
		text_string(t, "/");
	if (hd->bytes[r->target.at] != '*')
		text_format(t, "%.*s", SPAN(hd->bytes, r->target));
}

/* Puts the answer for `why` in place of the request in the head buffer. */
static void reply_compose(struct session *s, enum why why)
{
	struct text t = { .p = scratch, .size = HEAD_ROOM };
	const unsigned status = whys[why].status;
	char body[96];
	const size_t len = string_format(body, sizeof body, "%u %s: %s\n", status,
		status_text(status), whys[why].text);

	head_load(s);
	text_format(&t, "HTTP/1.1 %u %s\r\nContent-Type: text/plain\r\nContent-Length: %u\r\n"
		"Connection: close", status, status_text(status), (unsigned)len);
	if (status == 426)
		text_string(&t, ", Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13");
	else if (status == 405)
		text_string(&t, "\r\nAllow: GET");
	else if (status == 308)
		text_location(&t);
	text_format(&t, "\r\n\r\n%s", s->head ? "" : body);
	memcpy(hd->bytes, scratch, t.len);
	hd->len = t.len;
	hd->off = 0;
}

/* Of a line of the log: what TLS with the client has come to. */
static void text_tls(struct text *t, const struct session *s)
{
	if (s->plain) {
		text_string(t, " tls=- suite=- resumed=0 cn=-");
		return;
	}
	br_ssl_session_parameters p;
	char name[sizeof s->note->subject];
	br_ssl_engine_get_session_parameters(&s->tls.eng, &p);
	const int k = suite_find(p.cipher_suite);
	log_escape(name, sizeof name, s->note->subject, strlen(s->note->subject));
	/* policy_choose, if it was asked, has put another policy in its place */
	text_format(t, " tls=1.%d suite=%s resumed=%d cn=%s", (int)p.version - BR_TLS10,
		k < 0 ? "?" : suite_names[k].name, s->tls.policy_vtable == &policy, or_dash(name));
	wipe(&p, sizeof p);
}

/* What was asked for, as far as that is known; of an Origin that is refused, which. */
static void text_asked(struct text *t, const struct session *s, enum why why)
{
	const struct note *note = s->note;
	char origin[sizeof note->host];

	if (!note || !note->path[0])
		return;
	text_format(t, " host=%s path=%s backend=%s", or_dash(note->host), note->path,
		s->server < 0 ? "-" : servers[s->server].name);
	if (why != WHY_ORIGIN)
		return;
	const struct span o = hd->u.request.origin;
	log_escape(origin, sizeof origin, hd->bytes + o.at, o.len);
	text_format(t, " origin=%s", or_dash(origin));
}

static const char *const parties[] = { "proxy", "client", "backend" };

/* What a session that ends has come to. */
static void text_ended(struct text *t, const struct session *s)
{
	const int counted = frames && is_tunnel(s);
	const uint64_t ms = now - s->born;

	if (counted)
		text_format(t, s->code ? " code=%u code-by=%s" : " code=-", s->code,
			parties[s->code_by]);
	text_format(t, " rx=%llu tx=%llu", (unsigned long long)s->rx, (unsigned long long)s->tx);
	if (counted)
		text_format(t, " rx-frames=%u tx-frames=%u", s->flow[TO_BACKEND].frames_of_data,
			s->flow[TO_CLIENT].frames_of_data);
	text_format(t, " s=%llu.%u", ms / 1000ull, (unsigned)(ms / 100 % 10));
}

enum event { OPEN, CLOSE, REJECT };

/* The log's line of a session that begins (a tunnel stands, or a plain answer is on its way), ends,
 * or ends without a backend's answer. `status` is that of the answer, 0: none. */
static void log_session(const struct session *s, enum event event, unsigned status, enum why why)
{
	if (event != REJECT && log_sessions != ALL && !(log_sessions == TUNNELS && s->upgrade))
		return;
	static const char *const words[] = { "open", "close", "reject" };
	const int error = leg_fault(s, s->by == BY_BACKEND ? &s->backend : &s->client);
	struct text t = log_begin(event == REJECT ? LOG_NOTICE : LOG_INFO);
	text_format(&t, "%s id=%u", words[event], (unsigned)s->id);
	if (s->request > 1)
		text_format(&t, ".%u", (unsigned)s->request);
	text_format(&t, event == CLOSE ? " by=%s" : " client=%s", event == CLOSE ? parties[s->by] :
		address_format(&s->peer, 1));
	if (event == OPEN)
		text_tls(&t, s);
	if (event == REJECT)
		text_format(&t, status ? " status=%u" : " status=-", status);
	if (event != OPEN)
		text_format(&t, " why=%s", whys[why].text);
	if (why == WHY_TLS_ALERT)
		text_format(&t, " alert=%d", error - BR_ERR_RECV_FATAL_ALERT);
	else if (error && (why == WHY_TLS_ERROR || why == WHY_CLIENT_CERT))
		text_format(&t, " cause=%s", fault_find(error)->word);
	if (event != CLOSE)
		text_asked(&t, s, why);
	if (event == OPEN)
		text_format(&t, " status=%u ms=%llu", status, now - s->born + 0ull);
	if (event == CLOSE)
		text_ended(&t, s);
	log_end(&t);
}

/* Counts a line `reject`. Whether it is one of those that may be written in this second. */
static int reject_counts(void)
{
	totals.rejected++;
	if (rejects_until == 0)
		rejects_until = now + 1000;
	return rejects++ < log_rejects || log_rejects == 0;
}

/* A session ends without a backend's answer. A probe's client left, or its time is over, and it has
 * asked nothing: not a byte, or TLS and then none. What nobody had a buffer for is asked. */
static void session_reject(const struct session *s, unsigned status, enum why why)
{
	const int probe = (why == WHY_EOF || why == WHY_RESET || why == WHY_TIMEOUT ||
		why == WHY_HANDSHAKE_TIMEOUT || why == WHY_HEAD_TIMEOUT) && head_len(s) == 0 &&
		(s->state == HANDSHAKE ? !s->client.eng : s->state == HEAD) &&
		s->client.at == s->client.end && recv(s->client.fd, scratch, 1, MSG_PEEK) <= 0;

	for (unsigned i = 0; i < BACKENDS && s->state == CONNECT; i++)
		servers[i].lost += servers[i].down && (s->group >> i & 1);
	if (probe && s->request > 1)
		return;         /* it has asked before, and nothing since */
	totals.probes += (unsigned)probe;
	if ((!probe || log_probes) && reject_counts())
		log_session(s, REJECT, status, why);
}

/* A second of rejects is over: says how many had no line of their own. */
static void rejects_over(void)
{
	if (rejects > log_rejects && log_rejects > 0)
		log_line(LOG_NOTICE, "reject suppressed=%u", rejects - log_rejects);
	rejects_until = rejects = 0;
}

/* Forgets the connection to a backend. */
static void backend_hangup(struct session *s)
{
	if (s->backend.fd >= 0)
		close(s->backend.fd);
	spare_return(&s->backend);
	memset(&s->backend, 0, sizeof s->backend);
	s->backend.fd = -1;
	tls_ring_release(s);
}

static void server_leave(struct session *s)
{
	backend_hangup(s);
	if (s->server >= 0)
		servers[s->server].active--;
	s->server = -1;
}

/* A backend is of no use to its session any more, nor its trouble: it is free for others. */
static void backend_leave(struct session *s)
{
	server_leave(s);
	body_drop(s);
	s->broken = 0;
	s->backend.eof = s->backend.fin = 1;
}

/* Ends a session that has no answer yet: with one, when it can be given. The next state. */
static enum state session_fail(struct session *s, enum why why)
{
	session_end(s, BY_PROXY, why);
	if (!whys[why].status)
		return FREE;
	session_reject(s, whys[why].status, why);
	s->keep = 0;
	reply_compose(s, why);
	backend_leave(s);
	return REPLY;
}

/* ---- steps ---- */

/* One step of a leg's TLS handshake: a record, for its arithmetic takes 2 ms on a PC and 100 ms on
 * a small MIPS; and a ChangeCipherSpec with the Finished behind it, for theirs takes none. What
 * else was read ahead has another turn. 1: TLS stands; 0: not yet, or never: it broke or ended. */
static int leg_handshake(struct session *s, struct leg *l)
{
	int light, fed;

	if (leg_in(l) && l->at == l->end)
		leg_recv(s, l);
	if (l->eof || s->broken)
		return 0;
	l->more = 1;            /* a flight is of several records */
	if (!leg_send(s, l)) {
		do {
			light = l->at < l->end && l->ahead[l->at] == 20;
			const int ended = light && leg_between(l) && l->end - l->at >= 6 &&
				memcmp(l->ahead + l->at + 3, "\0\1\1", 3) == 0;

			fed = leg_feed(s, l);
			/* the engine took it, so the other side's certificate was checked; an
			 * empty one it ignores, in the middle of a chain as well */
			if (ended && s->shelf && !leg_closed(l))
				s->shelf->verifier.begun = 0;
		} while (fed && l->at < l->end && (light || l->ahead[l->at] == 20));
	}
	leg_send(s, l);
	l->more = 0;
	while (l->fin && leg_feed(s, l))
		;               /* it takes no more: its last words may say why */
	if (leg_closed(l) || l->fin) {
		const struct fault *f = fault_find(leg_fault(s, l));
		const unsigned char alert[] = { 21, 3, 3, 0, 2, 2, f->alert };

		if (f->alert)   /* still in the clear */
			send(l->fd, alert, sizeof alert, MSG_NOSIGNAL);
		leg_discard(l); /* or a reset would overtake it */
		session_broke(s, l, (enum why)f->why);
	}
	return !s->broken && (br_ssl_engine_current_state(l->eng) & BR_SSL_SENDAPP);
}

/* The ClientHello is awaited whole, for its server name; then the engine is started. */
static enum state handshake_step(struct session *s)
{
	struct leg *l = &s->client;

	if ((client_asked(s) && !shelf_borrow(s)) || !records_borrow(s))
		return HANDSHAKE;
	if (!l->eng) {
		if (leg_in(l))
			leg_recv(s, l);
		if (l->eof || s->broken)
			return FREE;
		const unsigned char *p = l->ahead;
		if (!records_whole(p, l->end, &ignored))
			return HANDSHAKE;
		if (isalnum(p[0]) && isalnum(p[1]) && (isalnum(p[2]) || p[2] == ' ')) { /* HTTP */
			s->plain = 1;
			l->at = l->end;
			return session_fail(s, WHY_PLAIN_HTTP);
		}
		if (!tls_start(s))
			return session_fail(s, WHY_NO_RANDOM);
	}
	if (client_asked(s) && !s->shelf->verifier.begun)
		client_verify(s);
	if (leg_handshake(s, l))
		return HEAD;
	return s->broken || l->eof ? FREE : HANDSHAKE;
}

/* Whether a Cookie value has this name=value pair (RFC 6265 4.2.1). */
static int cookie_has(const char *p, size_t len, const char *pair)
{
	const char *end = p + len;
	size_t n = strlen(pair);

	while (p) {
		while (p < end && (*p == ' ' || *p == ';'))
			p++;
		len = (size_t)(end - p);
		if (len >= n && memcmp(p, pair, n) == 0 && (len == n || p[n] == ';' || p[n] == ' '))
			return 1;
		p = memchr(p, ';', len);
	}
	return 0;
}

/* The backend of a set that the request's cookies name, -1: none. */
static int cookie_find(const struct head *h, const char *buf, uint64_t set)
{
	for (unsigned i = 0; i < h->nfields; i++)
		for (unsigned k = 0; k < BACKENDS && h->field[i].is == NAME_COOKIE; k++)
			if ((set >> k & 1) && cookie_has(buf + h->field[i].value.at,
			    h->field[i].value.len, servers[k].cookie))
				return (int)k;
	return -1;
}

/* Notes for the log what is asked for, as far as it was parsed; and who serves it, or why none. */
static enum why request_note(struct session *s)
{
	const struct request *r = &hd->u.request;
	const struct span target = r->target.len > 0 ? r->target : r->head.part[1];
	const char *path = hd->bytes + target.at, *query = memchr(path, '?', target.len);
	size_t len = query ? (size_t)(query - path) : target.len;

	if (target.len == 0)
		return WHY_NONE;
	if (*path != '/') {
		path = "/";
		len = 1;
	}
	log_escape(s->note->path, sizeof s->note->path, path, len);
	log_escape(s->note->host, sizeof s->note->host, hd->bytes + r->host.at, r->host.len);
	return servers_for(hd->bytes + r->name.at, r->name.len, path, len, &s->group);
}

/* Whether a REDIRECT listener passes a request on: one for the proof that a certificate authority
 * asks for in the clear (RFC 8555 8.3), if its path has a backend that those beside it have not.
 * Nothing but what such a URL can be: no way of reading it leads elsewhere. */
static int is_challenge(const struct session *s)
{
	static const char under[] = "/.well-known/acme-challenge/";
	const struct request *r = &hd->u.request;
	const char *buf = hd->bytes;
	const size_t token = r->target.at + sizeof under - 1, end = r->target.at + r->target.len;
	uint64_t beside;

	servers_for(buf + r->name.at, r->name.len, under, sizeof "/.well-known/" - 1, &beside);
	return token < end && memcmp(buf + r->target.at, under, sizeof under - 1) == 0 &&
		word_end(buf, token, end, "-_") == end && s->group != beside && r->length == 0 &&
		!r->upgrade && !r->chunked && (s->head || memcmp(buf, "GET ", 4) == 0);
}

/* The request is whole, or no good: judges it, and puts what the backend gets in its place. */
static enum state head_done(struct session *s, enum why why)
{
	struct request *r = &hd->u.request;
	struct forwarded f = { .proto = s->plain ? "http" : "https", .subject = s->note->subject };
	const int redirects = listeners[s->listener].kind == REDIRECT;

	if (why == WHY_NONE)
		why = request_check(r, hd->bytes);
	const enum why routed = request_note(s);
	s->head = r->head.part[0].len == 4 && memcmp(hd->bytes, "HEAD", 4) == 0;
	if (why == WHY_NONE && !(redirects && is_challenge(s)))
		why = redirects ? WHY_REDIRECT : !r->upgrade && http == REFUSE ? WHY_NOT_WEBSOCKET :
			routed;
	if (why != WHY_NONE)
		return session_fail(s, why);
	if (balance == STICKY_COOKIE)
		s->sticky = (int8_t)cookie_find(&r->head, hd->bytes, s->group);
	s->upgrade = (uint8_t)r->upgrade;
	s->keep = http_idle_ms > 0 && !r->close;
	s->body = body_start(r->chunked, r->length);
	if (r->upgrade)
		accept_key(hd->bytes + r->key.at, s->note->accept);
	f.client = address_format(&s->peer, 0);
	for (unsigned i = 0; i < BACKENDS; i++)
		f.renamed |= (s->group >> i & 1) && backends[i].host_header;
	for (char *p = s->note->subject; *p; p++)
		if (is_control((unsigned char)*p))
			*p = '?';
	hd->len = request_render(r, hd->bytes, &f, scratch, HEAD_ROOM);
	memcpy(hd->bytes, scratch, hd->len);
	return hd->len > 0 ? CONNECT : session_fail(s, WHY_LARGE_HEAD);
}

static enum state head_step(struct session *s)
{
	if (!records_borrow(s))
		return HEAD;
	head_load(s);
	const unsigned char *p;
	size_t len;
	do {
		leg_send(s, &s->client);
		while ((p = leg_readable(&s->client, &len)) != NULL) {
			const size_t room = head_max - hd->len;

			len = len < room ? len : room;
			memcpy(hd->bytes + hd->len, p, len);
			enum why why = request_parse(&hd->u.request, hd->bytes, hd->len + len);
			if (why == WHY_NONE)
				len = hd->u.request.head.size - hd->len;
			leg_consume(&s->client, len);
			hd->len += len;
			if (why != WHY_MORE)
				return head_done(s, why);
		}
	} while (leg_fill(s, &s->client) && !s->broken);
	return s->client.eof || s->broken ? FREE : HEAD;
}

/* The connection to a backend's address failed, why NULL: for lack of something of ours. The next
 * address, or none of this backend's, which has failed if one of them has. */
static void connect_failed(struct session *s, const char *why)
{
	backend_hangup(s);
	timer_start(&queues[CONNECT], &s->timer);
	s->moved = 1;           /* the next one has its own time */
	if (why)
		s->fault = why;
	struct server *v = &servers[s->server];
	if (++s->address < v->addresses)
		return;
	s->tried |= (uint64_t)1 << s->server;
	server_leave(s);
	if (s->fault)
		server_failed(v, s->fault);
	else
		s->starved = 1;
}

/* Dials until a connect is under way or no backend is left. One whose name is not known yet, or
 * whose backlog is full for the moment, is tried again soon, as long as the session may be here. */
static enum state connect_next(struct session *s)
{
	for (;;) {
		int i = s->server < 0 ? server_pick(s) : s->server;

		if (i == PICK_WAIT)
			return CONNECT;
		if (i < 0)
			return session_fail(s, s->starved ? WHY_NO_RESOURCES :
				i == PICK_FULL ? WHY_FULL : WHY_NO_BACKEND);
		if (s->server < 0) {
			s->server = (int8_t)i;
			s->first = (uint8_t)address_pick(s, &servers[i]);
			s->address = 0;
			s->fault = NULL;
			servers[i].active++;
			timer_start(&queues[CONNECT], &s->timer);
		}
		s->backend.fd = server_dial((unsigned)i,
			(unsigned)(s->first + s->address) % servers[i].addresses);
		s->backend.full = 1;    /* until it is connected */
		if (s->backend.fd < 0 ? errno == EAGAIN : leg_watch(s, &s->backend))
			return CONNECT;
		connect_failed(s, connect_why(errno));
	}
}

static enum state connect_step(struct session *s)
{
	int error;

	if (s->expired && s->server < 0)
		return session_fail(s, WHY_NO_BACKEND);
	if (s->expired)
		error = s->backend.fd < 0 ? EAGAIN : ETIMEDOUT;
	else if (s->backend.fd < 0)
		return connect_next(s);
	else if (s->backend.full)
		return CONNECT;
	else if ((error = socket_error(s->backend.fd)) == 0)
		error = proxy_tell((unsigned)s->server, s->backend.fd, s->client.fd, &s->peer);
	if (error == 0)
		return backends[s->server].tls == TLS_OFF ? REQUEST : BACKEND_HANDSHAKE;
	connect_failed(s, connect_why(error));
	return connect_next(s);
}

/* Keeps a backend's new session for resumption, for an hour: then its certificate is looked at
 * again. One that was verified by a keyring of the past is not kept. */
static void server_remember(struct server *v, const struct session *s)
{
	br_ssl_session_parameters p;

	br_ssl_engine_get_session_parameters(s->backend.eng, &p);
	if (s->ring != keyring || p.session_id_len == 0 ||
	    memcmp(p.session_id, v->session.session_id, sizeof p.session_id) == 0)
		return;
	v->session = p;
	v->session_until = now + RESUME_MS;
}

/* A backend that is connected failed, and has not seen a byte of the request: another may. */
static enum state backend_failed(struct session *s, const char *why)
{
	struct server *v = &servers[s->server];

	s->address = ADDRESSES_MAX;
	connect_failed(s, why);
	v->held_until = now + fail_ms;
	s->broken = 0;
	s->why = WHY_NONE;
	return CONNECT;
}

static enum state backend_handshake_step(struct session *s)
{
	static char text[24];
	struct leg *l = &s->backend;
	struct server *v = &servers[s->server];

	if (s->expired ? !l->eng : s->rec && !s->shelf && pool_empty(&shelf_pool))
		return session_fail(s, WHY_NO_RESOURCES);       /* or they would wait in a ring */
	if (!s->expired) {
		if (!shelf_borrow(s) || !records_borrow(s))
			return BACKEND_HANDSHAKE;
		if (!l->eng && !tls_dial(s))
			return session_fail(s, WHY_NO_RESOURCES);
		if (!s->shelf->verifier.begun)
			backend_verify(s);
		if (leg_handshake(s, l)) {
			server_remember(v, s);
			return REQUEST;
		}
		if (!s->broken && !l->eof)
			return BACKEND_HANDSHAKE;
	}
	v->session_until = 0;
	const int error = leg_fault(s, l);
	const char *word = s->expired ? "tls-timeout" : fault_find(error)->word;
	if (!word)
		string_format(text, sizeof text, "tls-alert-%d", error - BR_ERR_RECV_FATAL_ALERT);
	return backend_failed(s, word ? word : text);
}

/* The head as its backend gets it: .host_header as Host, the one asked for, which comes first, as
 * X-Forwarded-Host. It is not put in place yet: until something is written, another may get it. */
static struct text head_address(const struct session *s)
{
	const char *host = backends[s->server].host_header;
	struct text t = { .p = scratch, .size = HEAD_ROOM };

	if (!host || hd->off > 0)
		return (struct text){ .p = hd->bytes, .len = hd->len };
	const size_t line = strcspn(hd->bytes, "\n") + 1;
	text_add(&t, hd->bytes, line);
	text_format(&t, "Host: %s\r\nX-Forwarded-", host);
	text_add(&t, hd->bytes + line, hd->len - line);
	return t;
}

static enum state request_step(struct session *s)
{
	if (s->backend.eng && !records_borrow(s))
		return REQUEST;
	head_load(s);
	const struct text t = head_address(s);
	if (t.full)
		return session_fail(s, WHY_LARGE_HEAD);
	const size_t n = leg_pass(s, &s->backend, t.p + hd->off, t.len - hd->off);
	const int sent = leg_send(s, &s->backend);      /* what its engine made of that */
	if (s->broken || s->backend.fin)
		return hd->off > 0 || sent ? session_fail(s, WHY_BAD_RESPONSE) :
			backend_failed(s, connect_why(errno));
	s->moved |= n > 0;
	if (n > 0 && t.p == scratch) {
		memcpy(hd->bytes, t.p, t.len);
		hd->len = t.len;
	}
	hd->off += n;
	if (hd->off < hd->len || leg_pending(&s->backend, &ignored))
		return REQUEST;
	servers[s->server].sessions++;
	memset(hd, 0, offsetof(struct head_buffer, bytes));
	return RESPONSE;
}

/* Adds its backend's cookie to a rendered head, in front of the empty line. The new length. */
static size_t cookie_add(const struct session *s, char *head, size_t len)
{
	struct text t = { .p = head, .len = len - 2, .size = HEAD_ROOM };

	text_format(&t, "Set-Cookie: %s; Path=/; HttpOnly;%s SameSite=Lax\r\n\r\n",
		servers[s->server].cookie, s->plain ? "" : " Secure;");
	return t.full ? len : t.len;
}

/* Puts a rendered answer head, and what came behind it, in place of what came. 0: no room. */
static int answer_place(struct session *s, const struct response *r)
{
	const char *tail = hd->bytes + r->head.size;
	struct text t = { .p = scratch, .size = HEAD_ROOM };

	t.len = response_render(r, hd->bytes, scratch, HEAD_ROOM);
	if (t.len == 0)
		return 0;
	if (balance == STICKY_COOKIE && s->sticky != s->server)
		t.len = cookie_add(s, scratch, t.len);
	s->tx = answer_take(s, tail, hd->len - r->head.size);
	text_add(&t, tail, (size_t)s->tx);
	memcpy(hd->bytes, scratch, t.len);
	hd->len = t.len;
	hd->off = 0;
	return !t.full;
}

/* A 1xx before the answer goes to the client if there is room for it at once. */
static enum state interim_done(struct session *s)
{
	if (++s->note->interim > INTERIM_MAX)
		return session_fail(s, WHY_BAD_RESPONSE);
	const size_t size = hd->u.response.head.size;
	const size_t len = response_render(&hd->u.response, hd->bytes, scratch, HEAD_ROOM);
	size_t room;
	if (leg_room(&s->client, &room) && len <= room) {
		leg_pass(s, &s->client, scratch, len);
		leg_send(s, &s->client);
	}
	memmove(hd->bytes, hd->bytes + size, hd->len - size);
	hd->len -= size;
	memset(&hd->u, 0, sizeof hd->u);
	return s->broken ? FREE : RESPONSE;
}

/* The head is whole. A refused upgrade never becomes a tunnel: nothing of the client goes up. */
static enum state response_done(struct session *s)
{
	struct response *r = &hd->u.response;
	enum why why = response_check(r, hd->bytes, s->upgrade, s->head, s->note->accept);

	if (why != WHY_NONE)
		return session_fail(s, why);
	server_good(&servers[s->server]);
	if (r->status < 200 && r->status != 101)
		return interim_done(s);
	s->framing = (uint8_t)r->framing;
	if (r->framing == BODY_TUNNEL)
		s->body = body_start(0, UINT64_MAX);
	else
		s->answer = body_start(r->framing == BODY_CHUNKED,
			r->framing == BODY_LENGTH ? r->length : UINT64_MAX);
	/* what follows an upgrade, or a body that was not taken, may be no request */
	s->keep &= !s->upgrade && s->body.done && r->framing != BODY_EOF && !drain_until;
	r->keep = s->keep;
	if (!answer_place(s, r))
		return session_fail(s, WHY_LARGE_RESPONSE);
	totals.opened++;
	s->opened = 1;
	log_session(s, OPEN, r->status, WHY_NONE);
	s->heard = s->active = (uint32_t)now;
	return r->framing == BODY_TUNNEL ? RELAY : EXCHANGE;
}

/* Looks for a whole head; reads when there is none. A backend that ends before it is whole fails
 * this request alone, which may be why, and may have been acted on: it is not sent to another. */
static enum state response_step(struct session *s)
{
	if ((s->body.done && !leg_in(&s->backend) && !s->rec) || !records_borrow(s))
		return RESPONSE;
	enum state next;
	enum why why;
	size_t n;
	do {
		relay_pump(s);
		head_load(s);
		n = backend_read(s, (unsigned char *)hd->bytes + hd->len, head_max - hd->len);
		if (s->broken || s->backend.eof || (s->client.eof && !s->body.done &&
		    !leg_readable(&s->client, &ignored))) {
			session_end(s, BY_CLIENT, WHY_EOF);     /* amid the request's body */
			return session_fail(s, s->by == BY_BACKEND ? WHY_BAD_RESPONSE :
				(enum why)s->why);
		}
		hd->len += n;
		s->moved |= n > 0;
		while ((why = response_parse(&hd->u.response, hd->bytes, hd->len)) == WHY_NONE)
			if ((next = response_done(s)) != RESPONSE)
				return next;
		if (why != WHY_MORE)
			return session_fail(s, why);
	} while (n > 0);
	return RESPONSE;
}

/* Whether nothing more goes up: the client has ended, and what it sent is through. */
static int relay_up_over(const struct session *s)
{
	return s->body.done || !leg_readable(&s->client, &ignored);
}

/* Whether nothing more goes down: the backend has ended, or its answer, and all is sent. A tunnel
 * waits until the client's bytes are through as well: close_notify would drop them. */
static int relay_down_over(const struct session *s)
{
	if (leg_closed(&s->client))
		return s->backend.fin || s->backend.eof;        /* first what it sent */
	if (!s->backend.eof || hd || leg_pending(&s->client, &ignored))
		return 0;
	return s->framing != BODY_TUNNEL || s->backend.fin || relay_up_over(s);
}

/* The state's time begins, or begins anew: at an end as long as a slow side still takes what was
 * sent to it before, for closing would lose that. */
static void state_timer_start(struct session *s)
{
	timer_start(&queues[s->state], &s->timer);
	if (s->state == REPLY || s->state == DRAIN)
		s->unsent = socket_unsent(s->client.fd) + socket_unsent(s->backend.fd);
}

/* The session's next request: nothing is known of it, nor left of the one before. */
static void request_begin(struct session *s)
{
	memset((char *)s + offsetof(struct session, why), 0,
		offsetof(struct session, client) - offsetof(struct session, why));
	s->backend.fd = -1;
	s->server = s->sticky = -1;
	s->born = now;
	s->request++;
}

/* Whether a plain answer is over, and its client's connection kept: then its request is one of the
 * past. The note stays, for the name of the client. */
static int exchange_over(struct session *s)
{
	if (s->backend.eof && s->backend.fd >= 0) {
		leg_finish(s, &s->backend);
		backend_leave(s);       /* whatever its client takes its time for */
	}
	if (!s->keep || s->why != WHY_DONE || !relay_down_over(s))
		return 0;
	log_session(s, CLOSE, 0, s->why);
	totals.rx += s->rx;
	totals.tx += s->tx;
	s->note->interim = 0;
	s->note->path[0] = '\0';
	request_begin(s);
	return 1;
}

/* Between two requests: owns nothing but its slot and note. What has come is HEAD's to read, which
 * has head_ms for it from now; when its time is over, the client is told if that needs no wait. */
static enum state between_step(struct session *s)
{
	struct leg *c = &s->client;
	const int none = c->at == c->end && (!c->eng || !c->buf || leg_between(c));

	if (s->expired && c->eng && records_borrow(s))
		leg_finish(s, c);
	if (s->expired)
		return FREE;
	if (none && !(leg_in(c) && leg_read(s, c, &(unsigned char){ 0 }, 1, MSG_PEEK)))
		return c->eof || s->broken ? FREE : BETWEEN;
	s->born = now;
	return HEAD;
}

/* Tunnels, plain answers, our own, and their endings. */
static enum state relay_step(struct session *s)
{
	struct leg *c = &s->client, *b = &s->backend;
	const int unsent = s->unsent;

	s->keep = s->keep && !c->gone && !drain_until;
	if (s->expired) {
		state_timer_start(s);
		s->expired = s->unsent >= unsent;
	}
	if (s->state == RELAY && !tunnel_leaving(s)) {
		tunnel_look(s);
	} else if (s->expired) {
		session_end(s, BY_PROXY, WHY_IDLE);
		if (!tunnel_leaving(s) || b->eof || c->fin)
			return FREE;
		b->eof = 1;
	}
	if (!c->fin && records_borrow(s)) {
		if (head_len(s) > 0)
			head_load(s);
		relay_pump(s);
		if (s->broken && !tunnel_survives(s))
			return FREE;
		if (s->state == EXCHANGE && exchange_over(s))
			return BETWEEN;
		if (c->eof && !b->fin && relay_up_over(s)) {
			/* an engine that was closed takes nothing more: the answer would be cut */
			if (s->state == EXCHANGE && b->eng && !b->eof && !leg_closed(c))
				return FREE;
			leg_finish(s, b);
		}
		if (relay_down_over(s))
			leg_finish(s, c);
		if (c->fin && !b->fin)
			leg_finish(s, b);
		if (s->broken)
			return FREE;
	}
	if (c->fin) {
		b->fin = 1;             /* no one takes what may still come */
		leg_discard(c);
		leg_discard(b);
		return c->eof && b->eof ? FREE : DRAIN;
	}
	return tunnel_leaving(s) || (s->state == RELAY && (b->fin || leg_closed(c))) ? DRAIN :
		s->state;
}

/* Each state's step, and how long and why its time there ends a session; WHY_NONE: the step
 * decides; 0: never, but see look_ms. */
static const struct {
	enum state (*step)(struct session *);
	enum why expired;
	unsigned ms;
} states[STATES] = {
	[HANDSHAKE] = { handshake_step, WHY_HANDSHAKE_TIMEOUT, handshake_ms },
	[BETWEEN]   = { between_step, WHY_NONE, http_idle_ms },
	[HEAD]      = { head_step, WHY_HEAD_TIMEOUT, head_ms },
	[CONNECT]   = { connect_step, WHY_NONE, connect_ms },
	[BACKEND_HANDSHAKE] = { tls_backends ? backend_handshake_step : NULL, WHY_NONE,
		handshake_ms },
	[REQUEST]   = { request_step, WHY_RESPONSE_TIMEOUT, response_ms },
	[RESPONSE]  = { response_step, WHY_RESPONSE_TIMEOUT, response_ms },
	[RELAY]     = { relay_step, WHY_NONE, 0 },
	[EXCHANGE]  = { relay_step, WHY_NONE, idle_ms },
	[REPLY]     = { relay_step, WHY_NONE, linger_ms },
	[DRAIN]     = { relay_step, WHY_NONE, linger_ms },
};

/* ---- sessions: opened, run, watched, closed ---- */

/* Whether a client that ends now has gone, and nothing is computed for it: it waits for a buffer or
 * its turn, or a backend is sought or asked. Where its body goes up, its end is behind that. */
static int is_watched(const struct session *s)
{
	return s->state < CONNECT ? !link_alone(&s->wait) :
		s->state <= RESPONSE && !(s->state == RESPONSE && !s->body.done);
}

static void session_enter(struct session *s, enum state state)
{
	tunnels += (state == RELAY) - (unsigned)(s->state == RELAY);
	s->state = (uint8_t)state;
	tls_ring_release(s);
	place_start(s);
	state_timer_start(s);
	s->moved = 1;
}

/* The one end of every session. A reset of one side resets the other. */
static void session_close(struct session *s)
{
	uint64_t unsent = s->tx > 0 ? (uint64_t)socket_unsent(s->client.fd) : 0;

	s->tx -= unsent < s->tx ? unsent : s->tx;
	if (s->opened)
		log_session(s, CLOSE, 0, s->why);
	else if (s->state < RELAY && s->state != BETWEEN)       /* those in REPLY were rejected */
		session_reject(s, 0, s->why);
	totals.rx += s->rx;
	totals.tx += s->tx;
	/* nor may an answer that was cut off look whole */
	if (s->opened && !s->client.fin && (s->broken || s->state == EXCHANGE))
		socket_abort(s->client.fd);
	if (s->broken && s->backend.fd >= 0)
		socket_abort(s->backend.fd);
	close(s->client.fd);
	hd = NULL;
	server_leave(s);
	records_return(s);
	shelf_return(s);
	note_return(s);
	source_release(s->source, &s->peer);
	link_drop(&s->wait);
	link_drop(&s->timer.link);
	link_drop(&s->stall.link);
	link_drop(&s->place.link);
	tunnels -= s->state == RELAY;
	s->state = FREE;
	if (pool_empty(&session_pool))
		accept_after = 0;       /* there is a place */
	pool_return(&session_pool, s);
}

/* We end it, unless it has its end already. */
static void session_drop(struct session *s, enum why why)
{
	session_end(s, BY_PROXY, why);
	session_close(s);
}

/* Whether nothing is on its way in a leg's buffers: its engine is at a record boundary both ways
 * (what is put there makes a record at once), or its side has ended amid one. */
static int leg_rests(const struct leg *l)
{
	return l->at == l->end && !leg_pending(l, &ignored) && (!l->buf || !l->eng ||
		leg_between(l) || (l->eof && !leg_readable(l, &ignored)));
}

/* Whether record buffers are of no use now: what comes behind the client's end is thrown away. */
static int session_rests(const struct session *s)
{
	return s->client.fin || (leg_rests(&s->client) && leg_rests(&s->backend));
}

/* The same of its shelf: no long head lies there, and no verifier is at work. */
static int shelf_rests(const struct session *s)
{
	const int handshake = s->state == HANDSHAKE || s->state == BACKEND_HANDSHAKE;

	return head_len(s) <= NOTE_TEXT && !(handshake && (s->rec || s->shelf->verifier.begun)) &&
		link_alone(&s->wait);
}

/* After a run: gives back what is not needed, restarts what measures progress. */
static void session_settle(struct session *s)
{
	const int redial = s->state == CONNECT && s->backend.fd < 0;
	const struct leg *l = s->state == HANDSHAKE ? &s->client :
		s->state == BACKEND_HANDSHAKE ? &s->backend : NULL;

	leg_settle(&s->client);
	leg_settle(&s->backend);
	if (s->rec && session_rests(s))
		records_return(s);
	if (s->shelf && shelf_rests(s))
		shelf_return(s);
	if (s->state >= RELAY && !s->keep && head_len(s) == 0)
		note_return(s);
	if (!s->rec && !s->shelf && !redial)
		link_drop(&s->stall.link);
	else if (link_alone(&s->stall.link) || s->moved ||
	    (uint32_t)(s->rx + s->tx) - s->stall_from >= STALL_BYTES) {
		timer_start(&queues[redial ? Q_REDIAL : Q_STALL], &s->stall);
		s->stall_from = (uint32_t)(s->rx + s->tx);
	}
	/* a client that was told our Close may finish its frame */
	if (s->fed && !(s->say == SAID && s->flow[TO_BACKEND].seen == 0))
		state_timer_start(s);
	if (s->fed)
		s->active = (uint32_t)now;
	/* it stopped for others to have their turn, or with records of a handshake that were not
	 * taken or read yet; when what keeps the others ends, the set tells */
	if (link_alone(&s->wait) && (l ? (l->in || (l->eng && l->at < l->end)) && !l->full :
	    s->client.left == 0 || s->backend.left == 0))
		link_append(&runnable, &s->wait);
}

/* Whether the client's end is the session's: its connection is dead, and is not read any more (a
 * backend that takes nothing keeps it from that), or nothing is to be computed for who has gone. */
static int client_gone(struct session *s)
{
	const struct leg *c = &s->client;

	if (c->gone > 1 && (s->state <= RESPONSE || (leg_in(c) && !c->fin)))
		session_broke(s, c, socket_error(c->fd) == ETIMEDOUT ? WHY_TIMEOUT : WHY_RESET);
	else if (c->gone && is_watched(s))
		session_end(s, BY_CLIENT, WHY_EOF);
	else
		return 0;
	return 1;
}

/* Steps a session until its state stays, then settles it. The one place where states change. */
static void session_run(struct session *s, int expired)
{
	link_drop(&s->wait);
	s->expired = (uint8_t)expired;
	s->client.more = s->backend.more = 0;
	s->client.left = s->backend.left = SHARE;
	s->moved = s->fed = 0;
	enum state next = expired && states[s->state].expired ?
		session_fail(s, states[s->state].expired) : states[s->state].step(s);
	while (next != FREE && next != (enum state)s->state) {
		session_enter(s, next);
		s->expired = 0;
		next = states[next].step(s);
	}
	if (next == FREE)
		session_close(s);
	else if (client_gone(s) || !head_store(s))
		session_drop(s, WHY_NO_RESOURCES);      /* it has its cause, or this */
	else
		session_settle(s);
}

static void session_open(int fd, const struct address *peer, unsigned listener)
{
	struct session *s = pool_lend(&session_pool);

	memset(s, 0, offsetof(struct session, tls));
	s->id = ++last_id;
	s->listener = (uint8_t)listener;
	s->plain = listeners[listener].kind != WSS;
	s->client.fd = fd;
	s->peer = *peer;
	s->source = source_take(peer);
	s->note = memset(pool_lend(&note_pool), 0, sizeof *s->note);
	request_begin(s);
	session_enter(s, s->plain ? HEAD : HANDSHAKE);
	if (!leg_watch(s, &s->client))
		session_drop(s, WHY_NO_RESOURCES);
}

/* A session can go on: a handshake waits for its turn, everything else runs. When everybody comes
 * at once, after a reboot or a flap of the uplink, there is work for longer than anyone has
 * patience: who has begun goes first, or all would have their first half, and nobody the second
 * before it has gone. Who has gone ends, unless its turn is next: its last words may say why. */
static void session_resume(struct session *s)
{
	const int turn = s->state == HANDSHAKE || s->state == BACKEND_HANDSHAKE;
	const int next = turn && link_alone(&turns[0]) && link_alone(&turns[1]);

	if (turn)
		link_append(&turns[s->state == HANDSHAKE && !s->client.eng], &s->wait);
	if (s->state <= RESPONSE && s->client.gone > next && client_gone(s))
		session_close(s);
	else if (!turn)
		session_run(s, 0);
}

/* Notes what the epoll set tells of a leg. 0: nothing new. An urgent byte is nobody's. */
static int leg_told(struct leg *l, unsigned events)
{
	const uint8_t gone = events & (EPOLLHUP | EPOLLERR) ? 2 : (events & EPOLLRDHUP) != 0;
	const int in = !l->in && (gone > 1 || (events & EPOLLIN));
	const int out = l->full && (gone > 1 || (events & EPOLLOUT));
	const int ends = gone > l->gone;

	if (events & EPOLLPRI)
		recv(l->fd, scratch, 1, MSG_OOB);
	l->in = l->in || in;
	l->full = l->full && !out;
	l->gone = ends ? gone : l->gone;
	l->last = l->last || gone || (events & EPOLLPRI);
	return in || out || ends;
}

/* ---- the loop ---- */

/* Who has waited longest between two requests, NULL: nobody does. */
static struct session *between_first(void)
{
	struct link *l = queues[BETWEEN].list.next;

	return link_alone(l) ? NULL : OWNER(OWNER(l, struct timer, link), struct session, timer);
}

/* Who gives its place to a newcomer when the table is full: who has waited longest between two
 * requests; else, of those that have yet to ask, and wait for nothing of ours, who has kept us
 * waiting longest; NULL: nobody, for long enough. DISPLACE_MS are for a ClientHello, then for the
 * rest of TLS, then for the request's head: each takes a round trip, and of 300 ms it can lose a
 * segment. Without it those accepted in a turn would displace each other: of 50 at the last place
 * none would finish. So silent connections, of one address or 1000, go at max_sessions a second, in
 * order of arrival: a newcomer waits for those before it in the backlog (4096: 8 s), a byte now and
 * then gains nothing, and what keeps a place longer has cost a handshake. */
static struct session *displace_find(void)
{
	struct session *s = between_first();

	if (s)
		return s;
	const struct link *list = &queues[Q_YOUNG].list, *l = list->next;
	for (unsigned looked = 0; l != list && looked < DISPLACE_LOOK; looked++, l = l->next) {
		s = OWNER(l, struct session, place.link);
		if (s->place.due > now)
			break;
		if (link_alone(&s->wait))
			return s;
	}
	return NULL;
}

/* Newcomers find no place. After an uplink has failed, the table may be full of the dead, whom
 * keepalive as configured leaves there for a minute or two. So all of the table are looked at in
 * turn, within 2 s; those whose client is silent are asked at once, by keepalive of a second, and
 * when ASK_MS are over they are left alone again, or gone. TCP_USER_TIMEOUT is off meanwhile: it
 * would end who was silent for longer than that after one probe. Where bytes are unacknowledged
 * there are no probes, but these are sent again, ever more rarely: what counts is how often. */
static void place_look(struct session *s)
{
	const int fd = s->client.fd;
	struct tcp_info info;
	const uint32_t silent = socket_silent(fd, &info);

	if (s->asked && silent >= ASK_MS && (info.tcpi_probes >= PROBES_MIN ||
	    info.tcpi_retransmits >= RETRANSMITS_MIN)) {
		session_broke(s, &s->client, WHY_TIMEOUT);
		place_start(s);         /* it may have to wait for a buffer */
		if (s->state == RELAY)
			session_run(s, 0);
		else
			session_close(s);
		return;
	}
	if (s->asked)
		socket_tune(fd);
	s->asked = !s->asked && silent >= SILENT_MS;
	if (s->asked && socket_unsent(fd) == 0)
		socket_keepalive(fd, SILENT_MS / 1000, 1, 127, 0);
	place_start(s);
}

/* Whether there is a place for a newcomer, or somebody who makes room. */
static int place_find(void)
{
	return !pool_empty(&session_pool) || displace_find();
}

/* A connection to open a session for, or to turn away, which costs nobody a place. */
static void listener_take(int fd, const struct address *peer, unsigned listener)
{
	unsigned char key[9];
	const struct source *o = *source_place(peer, key);

	if (max_per_ip > 0 && o && o->sessions >= max_per_ip) {
		if (reject_counts())
			log_line(LOG_NOTICE, "reject id=%u client=%s status=- why=%s", ++last_id,
				address_format(peer, 1), whys[WHY_PER_IP].text);
		close(fd);
		return;
	}
	if (pool_empty(&session_pool))
		session_drop(displace_find(), WHY_DISPLACED);
	session_open(fd, peer, listener);
}

/* A connection from a listener's or a door's queue, -1: none. For lack of something of ours to take
 * it with, all of them rest for a while; where the peer has gone again, nothing is to be done. */
static int connection_accept(int fd, struct address *peer)
{
	fd = accept4(fd, &peer->any, &(socklen_t){ sizeof *peer }, SOCK_NONBLOCK | SOCK_CLOEXEC);
	if (fd < 0 && is_our_shortage(errno)) {
		log_line(LOG_WARNING, "accept paused ms=%d why=\"%s\"", ACCEPT_PAUSE_MS,
			strerror(errno));
		accept_after = now + ACCEPT_PAUSE_MS;
	}
	return fd;
}

static void listener_event(unsigned i)
{
	struct address peer = { .in6.sin6_family = 0 };
	struct timer *t;

	if (!place_find()) {
		accept_after = now + KNOCK_MS;
		for (int n = 0; n < LOOKS && (t = timer_take(&queues[Q_GROWN])) != NULL; n++)
			place_look(OWNER(t, struct session, place));
	}
	for (int n = 0; n < ACCEPTS && place_find(); n++) {
		const int fd = connection_accept(fds[FD_LISTEN + i].fd, &peer);

		if (fd < 0)
			return;
		address_unmap(&peer);
		listener_take(fd, &peer, i);
	}
}

/* Polls listeners and their doors unless they rest. Says when there is no place, and when again. */
static void listeners_watch(void)
{
	const int full = pool_empty(&session_pool) && !between_first();

	if (full != full_said && (!full || full_after <= now)) {
		full_said = full;
		full_after = now + FULL_PAUSE_MS;
		totals.full += (unsigned)full;
		log_line(full ? LOG_WARNING : LOG_NOTICE, "%s sessions=%u", full ? "full" : "room",
			session_pool.lent);
	}
	for (unsigned i = FD_LISTEN; i < FD_CHECK; i++)
		fds[i].events = accept_after <= now ? POLLIN : 0;
}

/* When the next tunnel is to leave, UINT64_MAX: none is. They do one by one, evenly over nine
 * tenths of drain_ms: of n, one when that begins, the next an nth of it later, and so on; the last
 * tenth is for the last to end. Who ends by itself slows that down, a new one makes it faster. */
static uint64_t leave_next(void)
{
	const unsigned most = tunnels > tunnels_first ? tunnels : tunnels_first;
	const uint64_t room = drain_ms / 10;

	return drain_until && tunnels > 0 ?
		drain_until - room - (drain_ms - room) * tunnels / most : UINT64_MAX;
}

/* Which one that is: that has been silent longest, if it rests; of those that talk, one whose
 * backend has just had the last word, for the longest silent is the next to say something, which
 * would cross the Close (a restart under load lost 33 answers of 200 so). */
static struct session *leave_choose(void)
{
	const struct link *list = &queues[RELAY].list, *l = list->prev;
	struct session *first = OWNER(list->next, struct session, timer);
	const unsigned looks = (uint32_t)now - first->active >= REST_MS ? 0 : LEAVE_LOOK;

	for (unsigned looked = 0; l != list && looked < looks; looked++, l = l->prev) {
		struct session *s = OWNER(l, struct session, timer);

		if (s->answered)
			return s;
	}
	return first;
}

static int buffers_wanted(void)
{
	return pool_wanted(&records_pool) || pool_wanted(&shelf_pool);
}

/* Milliseconds until the next timer, -1: none. */
static int timers_next(void)
{
	const uint64_t also[] = { accept_after, way_until, drain_until, rejects_until,
		!full_said && pool_empty(&session_pool) ? full_after : 0 };
	uint64_t due = leave_next();

	for (unsigned i = 0; i < QUEUES; i++) {
		const struct timer *t = OWNER(queues[i].list.next, struct timer, link);

		if (i != Q_YOUNG && i != Q_GROWN && (i != Q_STALL || buffers_wanted()) &&
		    !link_alone(&queues[i].list) && t->due < due)
			due = t->due;
	}
	for (unsigned i = 0; i < LENGTH(also); i++)
		if (also[i] > now && also[i] < due)
			due = also[i];
	return due == UINT64_MAX ? -1 : due <= now ? 0 : due - now > INT_MAX ? INT_MAX :
		(int)(due - now);
}

/* When others wait for what a session holds, ends who made too little progress for stall_ms. */
static void stallers_close(void)
{
	struct timer *t;

	while (buffers_wanted() && (t = timer_take(&queues[Q_STALL])) != NULL) {
		struct session *s = OWNER(t, struct session, stall);

		if (!link_alone(&s->wait) || !((s->rec && pool_wanted(&records_pool)) ||
		    (s->shelf && pool_wanted(&shelf_pool)))) {
			timer_start(&queues[Q_STALL], &s->stall);
			continue;
		}
		if (s->state >= CONNECT && s->state <= RESPONSE)
			session_run(s, 1);      /* the next backend, or an answer */
		else
			session_drop(s, WHY_STALL);
		return;
	}
}

static void timers_run(void)
{
	struct timer *t;

	for (unsigned i = 0; i < STATES; i++)
		while ((t = timer_take(&queues[i])) != NULL)
			session_run(OWNER(t, struct session, timer), 1);
	while ((t = timer_take(&queues[Q_RESOLVE])) || (t = timer_take(&queues[Q_REFRESH])))
		resolver_ask(OWNER(t, struct server, retry));
	while ((t = timer_take(&queues[Q_CHECK])) != NULL) {
		timer_start(&queues[Q_CHECK], t);
		const unsigned i = (unsigned)(OWNER(t, struct server, check) - servers);
		check_next(i, fds[FD_CHECK + i].fd >= 0 ? ETIMEDOUT : 0);
	}
	if (rejects_until && rejects_until <= now)
		rejects_over();
	while (leave_next() <= now) {
		struct session *s = leave_choose();

		tunnel_leave(s, WHY_DRAIN);
		session_run(s, 0);
	}
	while ((t = timer_take(&queues[Q_ASKED])) != NULL)
		place_look(OWNER(t, struct session, place));
	while ((t = timer_take(&queues[Q_REDIAL])) != NULL)
		session_run(OWNER(t, struct session, stall), 0);
	stallers_close();
}

/* Notes all that the set has to tell, but no end of it: timers run behind, and may be those of
 * sessions whose bytes are there. Nobody runs meanwhile, so none of it is of a descriptor that was
 * closed, unless the process that this is a copy of has yet to end. */
static void sessions_epoll(void)
{
	struct epoll_event ev[64];
	int n = LENGTH(ev);

	for (int most = 2 * max_sessions; most > 0 && n == LENGTH(ev); most -= n) {
		n = epoll_wait(fds[FD_EPOLL].fd, ev, LENGTH(ev), 0);
		for (int i = 0; i < n; i++) {
			struct session *s = &sessions[(uint32_t)ev[i].data.u64 / 2];
			struct leg *l = ev[i].data.u64 % 2 ? &s->backend : &s->client;

			/* who waits for a buffer or its turn wishes but to see its client's end */
			if (s->state != FREE && s->id == ev[i].data.u64 >> 32 &&
			    leg_told(l, ev[i].events) &&
			    (link_alone(&s->wait) || (s->client.gone && is_watched(s))))
				link_append(&runnable, &s->wait);
		}
	}
}

/* All that the set told of, or that were given what they waited for, or stopped for others, once;
 * then a handshake step. Of those not begun, the last is first: others are nearer to giving up. */
static void sessions_turn(void)
{
	struct link *l, end = { &end, &end };

	link_append(&runnable, &end);
	while ((l = runnable.next) != &end) {
		link_drop(l);
		session_resume(OWNER(l, struct session, wait));
	}
	link_drop(&end);
	l = link_alone(&turns[0]) ? turns[1].prev : turns[0].next;
	if (l != &turns[1])
		session_run(OWNER(l, struct session, wait), 0);
}

/* ---- signals ---- */

/* Signals come through a descriptor: none is lost between a look and the wait, or delayed. */
static void signals_init(void)
{
	static const int taken[] = { SIGHUP, SIGTERM, SIGINT, SIGUSR1, SIGUSR2 };
	sigset_t set;

	sigemptyset(&set);
	for (unsigned i = 0; i < LENGTH(taken) - !make_way; i++)
		sigaddset(&set, taken[i]);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);       /* a log that is as long as it may get */
	signal(SIGCHLD, SIG_IGN);       /* the resolver's end is seen on its socket */
	sigprocmask(SIG_BLOCK, &set, NULL);
	if ((fds[FD_SIGNAL].fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC)) < 0)
		die("signalfd: %s", strerror(errno));
}

/* SIGHUP: certificates and keys from their files, names from the resolver. New ones are for new
 * handshakes; whatever fails leaves the old ones. Waits while a handshake uses the other ring. */
static void reload(void)
{
	struct keyring *const old = keyring, *other = &keyrings[old == keyrings];

	if (other->users > 0)
		return;
	reload_due = 0;
	for (unsigned i = 0; i < BACKENDS; i++) {
		resolver_ask(&servers[i]);
		servers[i].session_until = 0;
	}
	if (keyring_load(other)) {      /* or each fault is said */
		log_line(LOG_NOTICE, "reload ok certs=%d changed=%u", CERTS, certs_say(other, old));
		keyring = other;
		other = old;
	}
	if (other->users == 0)
		keyring_wipe(other);
}

/* SIGUSR1 */
static void stats(void)
{
	log_line(LOG_INFO, "stats sessions=%u records=%u heads=%u opened=%llu rejected=%llu "
		"probes=%llu full=%llu rx=%llu tx=%llu log-lost=%llu", session_pool.lent,
		records_pool.lent, shelf_pool.lent, totals.opened, totals.rejected, totals.probes,
		totals.full, totals.rx, totals.tx, totals.log_lost);
	for (const struct server *v = servers; v < servers + BACKENDS; v++)
		log_line(LOG_INFO, "stats backend=%s state=%s active=%u sessions=%llu "
			"failures=%llu", v->name, v->addresses == 0 ? "unresolved" :
			v->aside_until > now ? "aside" : "up", v->active, v->sessions, v->failures);
}

static void listener_close(unsigned i)
{
	close(fds[FD_LISTEN + i].fd);
	close(fds[FD_DOOR + i].fd);
	fds[FD_LISTEN + i].fd = fds[FD_DOOR + i].fd = -1;
}

/* SIGTERM, SIGINT, or way was made: no new connections; sessions have drain_ms. */
static void drain_start(const char *name)
{
	log_line(LOG_NOTICE, "stop signal=%s sessions=%u", name, session_pool.lent);
	for (unsigned i = 0; i < LISTENERS; i++)
		listener_close(i);
	way_until = 0;
	drain_until = now + drain_ms;
	tunnels_first = tunnels;
	for (struct session *s; (s = between_first()) != NULL; )
		session_run(s, 1);
}

/* SIGUSR2: the process that the supervisor knows ends, so that it starts the next one, while a copy
 * goes on with all that it had: open files, which is what the epoll set knows, stay open; it reads
 * its own signals by the same signalfd. It serves newcomers until the next has the listeners. */
static void way_start(void)
{
	if (way_until || drain_until)
		return;
	const long pid = getpid() == 1 ? -1 : syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
	if (pid > 0)
		_exit(0);
	if (pid < 0) {
		log_line(LOG_ERR, "way failed why=\"%s\"", getpid() == 1 ?
			"process 1 can't end before others" : strerror(errno));
		return;
	}
	copied = stops = 1;             /* the next signal to end is the second */
	way_until = now + WAY_MS;
	log_line(LOG_NOTICE, "way pid=%d sessions=%u", (int)getpid(), session_pool.lent);
	if (fds[FD_RESOLVER].fd >= 0)
		resolver_end();         /* it ends with its parent */
}

/* Who knocks gets in if way is made for that user. When all listeners have been handed over, the
 * drain begins; or when nobody has come for them: what is in their queues then is their last. */
static void doors_poll(void)
{
	const int over = way_until && way_until <= now;
	unsigned left = 0;

	for (unsigned i = 0; i < LISTENERS; i++) {
		if (fds[FD_DOOR + i].revents & POLLIN) {
			int pair[2] = { fds[FD_LISTEN + i].fd, fds[FD_DOOR + i].fd };
			struct address peer;
			const int fd = connection_accept(pair[1], &peer);

			if (way_until && socket_user(fd) == socket_user(pair[1]) &&
			    handover(fd, pair, 0))
				listener_close(i);
			close(fd);
		}
		if (over && fds[FD_LISTEN + i].fd >= 0)
			listener_event(i);
		left += fds[FD_LISTEN + i].fd >= 0;
	}
	if (over || (way_until && left == 0))
		drain_start("SIGUSR2");
}

/* The loop has ended: whoever is left is told why. */
static void sessions_end(void)
{
	for (struct session *s = sessions; s < sessions + max_sessions; s++)
		if (s->state != FREE)
			session_drop(s, WHY_DRAIN);
	rejects_over();
}

static void signals_take(void)
{
	struct signalfd_siginfo info;

	while (read(fds[FD_SIGNAL].fd, &info, sizeof info) == (ssize_t)sizeof info) {
		if (info.ssi_signo == SIGHUP)
			reload_due = 1;
		else if (info.ssi_signo == SIGUSR1)
			stats();
		else if (make_way && info.ssi_signo == SIGUSR2)
			way_start();
		else if (stops++ == 0)
			drain_start(info.ssi_signo == SIGINT ? "SIGINT" : "SIGTERM");
	}
}

static void loop(void)
{
	while (stops < 2 && !(drain_until && (drain_until <= now || session_pool.lent == 0))) {
		const int ms = link_alone(&turns[0]) && link_alone(&turns[1]) &&
			link_alone(&runnable) ? timers_next() : 0;

		listeners_watch();
		const int n = poll(fds, FD_COUNT, ms);
		if (n < 0 && errno != EINTR) {
			/* no memory, or somebody has lowered our limit of descriptors */
			poll(NULL, 0, POLL_PAUSE_MS);
			signals_take();
		}
		clock_read();
		if (n > 0) {
			if (fds[FD_SIGNAL].revents)
				signals_take();
			if (fds[FD_EPOLL].revents)
				sessions_epoll();
			if (fds[FD_RESOLVER].revents)
				resolver_event();
			checks_poll();
		}
		if (make_way)
			doors_poll();   /* what it finds if poll failed, it has seen before */
		sessions_turn();
		timers_run();
		if (reload_due)
			reload();       /* a handshake that it waited for may have ended */
		for (unsigned i = 0; n > 0 && i < LISTENERS; i++)
			if (fds[FD_LISTEN + i].revents & POLLIN)
				listener_event(i);
	}
}

/* ---- start ---- */

static void tables_init(void)
{
	static const unsigned times[QUEUES] = {
		[Q_STALL] = stall_ms, [Q_RESOLVE] = resolve_ms, [Q_REFRESH] = refresh_ms,
		[Q_CHECK] = check_ms, [Q_REDIAL] = REDIAL_MS, [Q_YOUNG] = DISPLACE_MS,
		[Q_GROWN] = SILENT_MS, [Q_ASKED] = ASK_MS,
	};
	/* When a tunnel at rest is to be looked at, at the latest. All have that time, so those
	 * that have been silent longest are first in its queue, whatever is configured. */
	uint64_t look_ms = idle_ms > 0 ? idle_ms : (uint64_t)1 << 62;

	look_ms = ping_ms > 0 && ping_ms < look_ms ? ping_ms : look_ms;
	if (max_age_ms > 0 && max_age_ms / 16 < look_ms)
		look_ms = max_age_ms / 16 + 1;
	for (unsigned i = 0; i < QUEUES; i++) {
		link_drop(&queues[i].list);
		queues[i].ms = i < STATES ? states[i].ms : times[i];
	}
	queues[RELAY].ms = look_ms;
	for (unsigned i = 0; i < FD_COUNT; i++)
		fds[i] = (struct pollfd){ .fd = -1, .events = i < FD_CHECK ? POLLIN : POLLOUT };
	br_ssl_session_cache_lru_init(&cache, cache_store, sizeof cache_store);
}

/* Lending record buffers rests on how BearSSL counts in them: tries that on an engine. */
static void lending_test(void)
{
	struct session *s = &sessions[0];
	br_ssl_engine_context *eng = &s->tls.eng;
	size_t len;

	s->client.buf = &records[0].side[0];
	leg_start(s, &s->client, eng, record_max);
	tls_ring_release(s);
	if (!br_ssl_server_reset(&s->tls))
		die("BearSSL: br_ssl_server_reset: error %d", br_ssl_engine_last_error(eng));
	engine_lend(eng, no_records, no_records);
	if (br_ssl_engine_recvrec_buf(eng, &len) != no_records || len != 5)
		die("BearSSL: this version does not let its buffers be lent: use 0.6");
	br_ssl_engine_set_all_flags(eng, 0);    /* its first session sets it up anew */
}

/* Numbers of config.h, and what they may be. */
static const struct { const char *name; unsigned value, min, max; } numbers[] = {
#define NUMBER(name, min, max) { #name, name, min, max }
	NUMBER(config_version, 1, UINT_MAX), NUMBER(ciphers_by_cpu, 0, 1),
	NUMBER(hash_bits4, 1, 32), NUMBER(hash_bits6, 1, 128), NUMBER(session_cache, 0, UINT_MAX),
	NUMBER(check_accept, 0, 1), NUMBER(tls_backends, 0, 1), NUMBER(resolve_names, 0, 1),
	NUMBER(make_way, 0, 1), NUMBER(max_sessions, 1, 100000), NUMBER(record_max, 512, 16384),
	NUMBER(max_busy, 1, max_sessions), NUMBER(max_per_ip, 0, UINT_MAX),
	NUMBER(head_max, 1024, 16000), NUMBER(handshake_ms, 1, INT_MAX),
	NUMBER(http_idle_ms, 0, INT_MAX), NUMBER(head_ms, 1, INT_MAX),
	NUMBER(connect_ms, 1, INT_MAX), NUMBER(response_ms, 1, INT_MAX),
	NUMBER(idle_ms, 0, INT_MAX), NUMBER(linger_ms, 1, INT_MAX), NUMBER(stall_ms, 1, INT_MAX),
	NUMBER(drain_ms, 1, INT_MAX), NUMBER(max_fails, 0, UINT_MAX), NUMBER(fail_ms, 0, INT_MAX),
	NUMBER(check_ms, 0, INT_MAX), NUMBER(resolve_ms, 1, INT_MAX),
	NUMBER(refresh_ms, 0, INT_MAX), NUMBER(keepalive_s, 0, 32767),
	NUMBER(keepalive_interval_s, 1, 32767), NUMBER(keepalive_probes, 1, 127),
	NUMBER(user_timeout_ms, 0, INT_MAX), NUMBER(log_time, 0, 1), NUMBER(seccomp, 0, 1),
	NUMBER(frames, 0, 1), NUMBER(ping_ms, 0, INT_MAX), NUMBER(max_age_ms, 0, INT_MAX),
	NUMBER(log_rejects, 0, INT_MAX), NUMBER(source_bits6, 1, 64), NUMBER(log_probes, 0, 1),
#undef NUMBER
};

/* Whether browsers could send it: scheme, host and port in lower case, no path (RFC 6454 6.1). */
static int origin_valid(const char *o)
{
	const char *host = o + strcspn(o, ":");

	if (strcmp(o, "same") == 0 || strcmp(o, "null") == 0 || strcmp(o, "none") == 0)
		return 1;
	if (strncmp(host, "://", 3) != 0 || strpbrk(host + 3, "/*"))
		return 0;
	while (*o && *o == tolower((unsigned char)*o))
		o++;
	return !*o;
}

/* Whether a Host could fit it: a name, "*." and a name, or an address as in a URL; no port. */
static int name_valid(const char *name)
{
	const int wild = strncmp(name, "*.", 2) == 0;
	const char *rest = name + 2 * wild;
	const size_t len = strlen(rest);
	struct span whole = span_of(0, len);

	if (len == 0 || len > 253 || *rest == '.')
		return 0;
	return !rest[word_end(rest, 0, len, "-._")] || (!wild && *rest == '[' &&
		rest[len - 1] == ']' && host_parse(rest, whole, &whole));
}

static void backend_check(const struct backend *b)
{
	const char *host = b->host ? b->host : "", *url = bytes_find(host, strlen(host), "://", 3);
	const int local = strncmp(host, "unix:", 5) == 0;
	struct address a;
	const int name = !address_parse(&a, host, "1") && *host && !local;
	/* what a resolver could know: "_" is in names of containers */
	const int odd = name && host[word_end(host, 0, strlen(host), "-._")];
	const char *sni = b->host || b->sni ? text_or(backend_sni(b)) : "";
	const char *named = text_or(b->host_header);
	struct span whole = span_of(0, strlen(named));

	wrong(!*host, ".host is missing");
	wrong(url != NULL, ".host \"%s\" has a scheme: give the name alone; its port is .port, its "
		"path .path, and wss: or https: .tls = TLS_VERIFY", host);
	wrong(odd && !url, ".host \"%s\" is no address and can't be a name: no port, path, "
		"brackets or zone", host);
	wrong(name && !odd && !resolve_names, ".host \"%s\" is a name: set resolve_names to 1",
		host);
	wrong(local && (!host[5] || strlen(host) >= 5 + sizeof ((struct sockaddr_un *)0)->sun_path),
		".host \"%s\": path missing or too long", host);
	wrong(a.any.sa_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&a.in6.sin6_addr),
		".host \"%s\" is link-local, which needs an interface, too: give it an address "
		"that is not, or a unix: socket", host);
	wrong(!local && (!address_parse(&a, "::", b->port) || a.in.sin_port == 0),
		".port \"%s\": give 1 to 65535", text_or(b->port));
	wrong(b->name && !name_valid(b->name), ".name \"%s\": give it as in a URL, without scheme, "
		"port and path: a.example, *.example, [2001:db8::1]; NULL for any", b->name);
	wrong(b->path && *b->path && *b->path != '/', ".path \"%s\": begin it with /", b->path);
	wrong(b->host_header && (strlen(named) > 128 || !host_parse(named, whole, &whole)),
		".host_header \"%s\": give a name or address of at most 128 characters, no scheme "
		"or path", named);
	wrong(b->weight > WEIGHT_MAX, ".weight = %u: at most %d", b->weight, WEIGHT_MAX);
	wrong(b->tls != TLS_OFF && !tls_backends, ".tls: set tls_backends to 1");
	wrong(b->tls == TLS_OFF && (b->sni || b->ca || b->cert || b->key), ".tls is missing, "
		"without which .sni, .ca, .cert and .key say nothing: TLS_VERIFY?");
	wrong((b->tls == TLS_VERIFY || b->tls == TLS_PIN) && !b->ca, ".ca is missing: a PEM file, "
		"for TLS_VERIFY with its authorities, for TLS_PIN with its certificate");
	wrong(b->tls == TLS_VERIFY && (!*sni || !backend_sni(b)), ".sni is missing: TLS_VERIFY "
		"needs a name, the certificate's");
	wrong(b->tls != TLS_OFF && strlen(sni) > 255, ".sni is longer than 255");
	wrong(!b->cert != !b->key, ".%s is missing: .cert and .key go together",
		b->key ? "cert" : "key");
}

static void listener_check(unsigned i)
{
	const struct listener *l = &listeners[i];
	struct address a;

	wrong(!address_parse(&a, l->address, l->port), ": \"%s\", \"%s\": give an IPv4 or IPv6 "
		"literal and a decimal port", text_or(l->address), text_or(l->port));
	wrong(l->client_ca && l->kind != WSS, ".client_ca: only WSS asks for certificates");
	wrong((unsigned)l->verify_client > VERIFY_OFF || (!listener_ca(i) &&
		l->verify_client != VERIFY_DEFAULT && l->verify_client != VERIFY_OFF),
		".verify_client: VERIFY_OFF, or one that needs kind WSS and a client_ca");
}

static void ciphers_check(void)
{
	unsigned cbc = 0;

	wrong(tls_min < BR_TLS10 || tls_min > tls_max || tls_max > BR_TLS12, "tls_min, tls_max: "
		"BR_TLS10, BR_TLS11 or BR_TLS12, in order");
	for (unsigned i = 0; i < LENGTH(ciphers); i++) {
		const int k = suite_find(ciphers[i]), is_cbc = k >= 0 && suite_names[k].cbc;

		wrong(k < 0, "ciphers[%u]: 0x%04x is not served: choose ECDHE suites with AES-GCM, "
			"ChaCha20 or AES-CBC-SHA", i, (unsigned)ciphers[i]);
		wrong(is_cbc && tls_min >= BR_TLS12, "ciphers[%u]: CBC suites need tls_min below "
			"BR_TLS12", i);
		cbc |= (unsigned)is_cbc;
	}
	wrong(!cbc && tls_min < BR_TLS12, "tls_min: TLS 1.0 and 1.1 need CBC suites in ciphers[], "
		"such as BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA");
}

/* What the compiler can't know. */
static void config_check(void)
{
	const unsigned probing_s = keepalive_s + keepalive_interval_s * keepalive_probes;
	struct address a;

	for (unsigned i = 0; i < LENGTH(numbers); i++)
		wrong(numbers[i].value < numbers[i].min || numbers[i].value > numbers[i].max,
			"%s = %u: give %u to %u", numbers[i].name, numbers[i].value,
			numbers[i].min, numbers[i].max);
	wrong(idle_ms > 0 && idle_ms <= head_ms, "idle_ms: must be above head_ms, or 0");
	wrong(keepalive_s > 0 && user_timeout_ms > 0 && user_timeout_ms / 1000 < probing_s,
		"user_timeout_ms = %u leaves no time for keepalive_probes: give %u000 or more, "
		"or 0", user_timeout_ms, probing_s);
	wrong(ping_ms > 0 && !frames, "ping_ms: set frames to 1");
	ciphers_check();
	wrong(redirect_port && (!address_parse(&a, "::", redirect_port) || a.in.sin_port == 0),
		"redirect_port \"%s\": give 1 to 65535, or NULL", redirect_port);
	wrong(cookie_name[word_end(cookie_name, 0, strlen(cookie_name), in_token)] != '\0',
		"cookie_name \"%s\": no token (RFC 6265 4.1.1): letters, digits, - and _ will do",
		cookie_name);
	for (unsigned i = 0; i < LENGTH(origins); i++) {
		const char *o = origins[i];

		wrong(o && !origin_valid(o), "origins[%u] \"%s\": give it as browsers do, in lower "
			"case, without a path, each one by itself: https://a.example; or NULL for "
			"any, \"none\" for those that send none", i, o);
	}
	for (unsigned i = 0; i < LISTENERS; i++) {
		entry_look("listeners", i);
		listener_check(i);
	}
	for (unsigned i = 0; i < CERTS; i++) {
		entry_look("certs", i);
		wrong(!certs[i].chain, ".chain is missing: a PEM file");
		wrong(!certs[i].key, ".key is missing: a PEM file");
	}
	for (unsigned i = 0; i < BACKENDS; i++) {
		entry_look("backends", i);
		backend_check(&backends[i]);
	}
	checked[0] = '\0';
}

/* What depends on the machine. */
static void system_check(void)
{
	const char *dir = text_or(chroot_dir);
	const int fd = chroot_dir ? open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
	const char *what = !chroot_dir ? NULL : fd < 0 ? strerror(errno) :
		dir[0] != '/' ? "not an absolute path" : NULL;
	const unsigned need = 2 * max_sessions + FD_COUNT + 16; /* two of each session */
	struct rlimit r = { 0, 0 };

	wrong(what != NULL, "chroot_dir \"%s\": %s: make that directory, or give NULL", dir, what);
	close(fd);
	prlimit(0, RLIMIT_NOFILE, NULL, &r);
	const struct rlimit more = { need, r.rlim_max < need ? need : r.rlim_max };
	wrong(r.rlim_cur < need && prlimit(0, RLIMIT_NOFILE, &more, NULL) < 0, "max_sessions = %u "
		"needs %u descriptors, which the system does not grant (%s): raise the limit "
		"(ulimit -n) or lower max_sessions", (unsigned)max_sessions, need, strerror(errno));
}

/* What the linker has set aside for tables. */
static unsigned memory_kb(void)
{
	extern char edata[], end[];

	return (unsigned)((uintptr_t)end - (uintptr_t)edata) / 1024;
}

/* wssproxy -v */
static int version_print(void)
{
	const char *const balances[] = { "ROUND_ROBIN", "IP_HASH", "LEAST_CONN", "STICKY_COOKIE" };
	static const char *const verifies[] = { "VERIFY_DEFAULT", "VERIFY_REQUIRED",
		"VERIFY_OPTIONAL", "VERIFY_OFF" };
	static const char *const forwards[] = { "APPEND", "REPLACE", "OFF" };
	static const char *const logged[] = { "NONE", "TUNNELS", "ALL" };
	static const char *const modes[] = { "TLS_OFF", "TLS_VERIFY", "TLS_PIN", "TLS_NOVERIFY" };
	const struct { const char *name, *value; } texts[] = {
		{ "balance", balances[balance] }, { "cookie_name", cookie_name },
		{ "client_ca", client_ca }, { "http", http == FORWARD ? "FORWARD" : "REFUSE" },
		{ "x_forwarded_for", forwards[x_forwarded_for] }, { "user", user },
		{ "group", group }, { "chroot_dir", chroot_dir },
		{ "log_to", log_to == STDERR ? "STDERR" : "SYSLOG" },
		{ "log_sessions", logged[log_sessions] }, { "redirect_port", redirect_port },
	};
	const int out = STDOUT_FILENO;

	print(out, "wssproxy %s build=%s", VERSION, BUILD);
	for (unsigned i = 0; i < LISTENERS; i++)
		print(out, "listeners[%u] = %s %s %s client_ca=%s verify_client=%s", i,
			listeners[i].address, listeners[i].port, kinds[listeners[i].kind],
			text_or(listeners[i].client_ca), verifies[listeners[i].verify_client]);
	for (unsigned i = 0; i < CERTS; i++)
		print(out, "certs[%u] = %s %s %s", i, text_or(certs[i].name),
			text_or(certs[i].chain), text_or(certs[i].key));
	for (unsigned i = 0; i < BACKENDS; i++) {
		const struct backend *b = &backends[i];

		print(out, "backends[%u] = %s name=%s path=%s weight=%u backup=%d max_conns=%u "
			"proxy=%d host_header=%s tls=%s sni=%s ca=%s cert=%s key=%s", i,
			servers[i].name, text_or(b->name), text_or(b->path), weights[i],
			b->backup, b->max_conns, b->proxy, text_or(b->host_header), modes[b->tls],
			text_or(b->sni), text_or(b->ca), text_or(b->cert), text_or(b->key));
	}
	print(out, "tls_min = 1.%u\ntls_max = 1.%u", tls_min - BR_TLS10, tls_max - BR_TLS10);
	for (unsigned i = 0; i < LENGTH(suites); i++)
		print(out, "ciphers[%u] = %s", i, suite_names[suite_find(suites[i])].name);
	for (unsigned i = 0; i < LENGTH(origins) && origins[i]; i++)
		print(out, "origins[%u] = %s", i, origins[i]);
	for (unsigned i = 0; i < LENGTH(texts); i++)
		print(out, "%s = %s", texts[i].name, text_or(texts[i].value));
	for (unsigned i = 0; i < LENGTH(numbers); i++)
		print(out, "%s = %u", numbers[i].name, numbers[i].value);
	for (const br_config_option *o = br_get_config(); o->name; o++)
		print(out, "BearSSL %s = %d", o->name, (int)o->value);
	return 0;
}

/* Descriptors 0 to 2 are there, so that none of ours becomes one. */
static void standard_descriptors(void)
{
	int fd;

	while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd <= 2)
		;
	close(fd);
}

/* Waits for the kernel's generator, which has nothing in the first seconds of a device. */
static void entropy_wait(void)
{
	unsigned char byte;

	if (!random_bytes(&byte, 1, GRND_NONBLOCK) && errno == EAGAIN)
		log_line(LOG_NOTICE, "start waits for entropy");
	if (!random_bytes(&byte, 1, 0))
		die("getrandom: %s: a kernel of 3.17 or later is needed", strerror(errno));
}

/* What works, but should be meant so. */
static void warnings_print(void)
{
	for (unsigned i = 0; i < BACKENDS; i++)
		if (backends[i].tls == TLS_NOVERIFY)
			log_line(LOG_WARNING, "warning backend=%s TLS_NOVERIFY: anyone who can "
				"reach its address can pass for it", servers[i].name);
	if (balance == STICKY_COOKIE && !cookie_secret[0])
		log_line(LOG_WARNING, "warning cookie_secret is empty: anyone can compute which "
			"backend a cookie stands for");
}

/* wssproxy -t */
static int check_print(void)
{
	keyring_load(keyring);
	become_find();
	if (faults_found > 0)
		return 1;
	servers_init();
	warnings_print();
	certs_say(keyring, NULL);
	if (getuid() == 0) {
		become_do(chroot_dir);
		become_warn();
	}
	return !print(STDOUT_FILENO, "wssproxy: config.h and its files are good\n"
		"memory: at most %u KB of tables: %u sessions of %u bytes, %u busy of %u bytes",
		memory_kb(), (unsigned)max_sessions, (unsigned)sizeof sessions[0],
		(unsigned)max_busy, (unsigned)(sizeof records[0] + sizeof shelves[0]));
}

int main(int argc, char *argv[])
{
	const int checks = argc == 2 && strcmp(argv[1], "-t") == 0;
	const int tells = argc == 2 && strcmp(argv[1], "-v") == 0;

	standard_descriptors();
	if (argc > 1 && !checks && !tells) {
		print(STDERR_FILENO, "usage: wssproxy [-t | -v]");
		return 2;
	}
	core_forbid();
	clock_read();
	tables_init();
	config_check();
	if (!tells)
		system_check();
	if (checks)
		return check_print();
	if (faults_found > 0)
		return 1;
	suites_init();
	servers_init();
	if (tells)
		return version_print();
	become_find();
	log_open();
	entropy_wait();
	signals_init();
	if (resolve_names)
		resolver_start();
	keyring_load(keyring);
	if (faults_found > 0)
		return 1;
	lending_test();
	warnings_print();
	log_line(LOG_NOTICE, "start version=%s sessions=%u busy=%u memory=%uKB", VERSION,
		(unsigned)max_sessions, (unsigned)max_busy, memory_kb());
	certs_say(keyring, NULL);
	for (unsigned i = 0; i < LISTENERS; i++)
		listener_open(i);
	if ((fds[FD_EPOLL].fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
		die("epoll_create1: %s: a kernel with CONFIG_EPOLL is needed", strerror(errno));
	become_do(chroot_dir);
	become_warn();
	if (seccomp && !filter_set(loop_calls, LENGTH(loop_calls)))
		log_line(LOG_WARNING, "warning seccomp: this kernel or machine has no filter: "
			"none is set");
	loop();
	sessions_end();
	log_line(LOG_NOTICE, "stop sessions=0");
	return 0;
}
