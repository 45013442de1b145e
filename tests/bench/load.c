/* load.c - the clients of the benchmark: many wss:// connections to one proxy, in one epoll loop.
 * See LICENSE for copyright.
 *
 *     load [options] -p port echo      each client sends a message, awaits its echo, sends the next
 *     load [options] -p port up        each client sends frames without end
 *     load [options] -p port down      each client reads frames without end
 *     load [options] -p port connect   each client connects, upgrades, closes, connects again
 *     load [options] -p port storm     all clients come at once, each gives up when its patience is
 *                                      over and comes again; ends once all are in
 *     load [options] -p port pieces    each client sends records of 16 KB, a piece now and then
 *     load [options] -p port stuck     each client takes nothing of a download
 *     load [options] -p port hold N... has N sessions that rest after one message, says when they
 *                                      do, awaits a line of its input, goes on to the next N
 *
 *     -c clients      at work at a time (1)
 *     -r sessions     that rest beside them after one message each (0)
 *     -s bytes        of a message (64)
 *     -t seconds      to measure (1), after a tenth of it, at least 0.1 s, to warm up
 *     -w seconds      to wait before that, once sessions rest (0)
 *     -R              sessions are resumed, but for the first
 *     -k              a connection that ends is counted (cut), and those of `connect` come again;
 *                     a line `open` says when all are there
 *     -T seconds      the patience of a storm
 *     -a address      to connect from; -m: each client has the next one
 *     -C suite        OpenSSL's name of the one cipher suite (ECDHE-ECDSA-AES128-GCM-SHA256)
 *     -P pid,...      processes whose CPU time is counted
 *
 * The one line of the result is key=value: count (of messages or connections), bytes (of bulk),
 * seconds, cpu (seconds of the processes of -P, user and kernel), full (handshakes that were not
 * resumed although -R asked for it), cut (connections that ended, or were given up), p50, p99 and
 * worst (microseconds of a round trip, or from connect to 101, or so far when that has not come).
 *
 * Anything that goes otherwise than it should ends the program with 1: an echo that is not what was
 * sent, another suite, a connection that ends. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	MESSAGE_MAX = 1 << 19,
	BULK_FRAME = 65536,
	BULK_ROUNDS = 8,        /* records in a row, so that no client holds the loop */
	OPENING_MAX = 16,       /* connections that are being opened at a time */
	PIECE = 900,            /* bytes, and their pace: 3.6 KB/s */
	PIECE_MS = 250,
	TICK_MS = 10,           /* how often a client looks whether its time has come */
	PIDS_MAX = 64,
};

enum role { ECHO, UP, DOWN, CONNECT, REST, STORM, PIECES, STUCK };

/* The steps of a connection; each goes on to the next one, or around in its last. */
enum step { TCP, TLS, REQUEST, RESPONSE, SEND, RECV, SILENT, HELD, GONE };

struct conn {
	struct conn *next;      /* of all */
	struct conn *waiting;   /* the next one that waits for a place among the OPENING_MAX */
	int fd;
	SSL *ssl;
	enum role role;
	enum step step;
	unsigned events;        /* what epoll tells of it */
	uint64_t since;         /* ns: start of the round trip, or of the connection; when the next
	                         * piece is due, or who is GONE comes again */
	in_addr_t source;       /* 0: any */
	size_t at;              /* progress of the step, in bytes */
	uint32_t tail;          /* the last four bytes of a response so far */
	uint64_t serial;        /* of the message */
};

static struct {
	enum role role;
	unsigned clients, resting;
	size_t size;
	double seconds, settle, patience;
	int resume, lenient, many;
	in_addr_t source;
	const char *suite;
	in_port_t port;
	clockid_t pid[PIDS_MAX];
	unsigned pids;
} opt = { .clients = 1, .size = 64, .seconds = 1, .suite = "ECDHE-ECDSA-AES128-GCM-SHA256" };

static SSL_CTX *tls;
static SSL_SESSION *ticket;     /* what -R resumes */
static int epoll_fd;
static unsigned opening;        /* connections before SEND */
static unsigned silent;         /* sessions that rest */
static struct conn *conns, *waiting;
static int measuring;
static unsigned up;             /* of a storm */
static uint64_t count, bytes, full, cut, tick;
static uint32_t *latency;       /* microseconds */
static size_t latencies;
static unsigned char request[512], scratch[65536];
static size_t request_len;
static unsigned char payload[MESSAGE_MAX], message[MESSAGE_MAX + 14], bulk[14 + BULK_FRAME];

static _Noreturn void die(const char *format, ...)
{
	va_list args;

	fprintf(stderr, "load: ");
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, "\n");
	ERR_print_errors_fp(stderr);
	exit(1);
}

static uint64_t clock_ns(clockid_t id)
{
	struct timespec ts;

	if (clock_gettime(id, &ts) < 0)
		die("the proxy has ended");
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* CPU time of the proxy's processes: all threads, those that ended as well. */
static uint64_t cpu_ns(void)
{
	uint64_t sum = 0;
	unsigned i;

	for (i = 0; i < opt.pids; i++)
		sum += clock_ns(opt.pid[i]);
	return sum;
}

/* Messages. A message is its serial number and a pattern. Its mask follows from the serial number,
 * so that what did not go at once can be made again. */

static size_t header_write(unsigned char *p, size_t len, int masked)
{
	unsigned i, more = len < 126 ? 0 : len < 65536 ? 2 : 8;

	p[0] = 0x82;
	p[1] = (unsigned char)((masked ? 128 : 0) | (more == 0 ? len : more == 2 ? 126 : 127));
	for (i = 0; i < more; i++)
		p[2 + i] = (unsigned char)(len >> 8 * (more - 1 - i));
	return 2 + more;
}

/* The expected bytes of an echo are a header and `payload` with the serial in front. */
static void serial_write(const struct conn *c)
{
	memcpy(payload, &c->serial, opt.size < sizeof c->serial ? opt.size : sizeof c->serial);
}

static size_t message_write(const struct conn *c)
{
	size_t i, at = header_write(message, opt.size, 1);
	uint32_t half = (uint32_t)(c->serial * 0x9e3779b97f4a7c15 >> 32);
	uint64_t mask = half | (uint64_t)half << 32, word;

	memcpy(message + at, &half, 4);
	at += 4;
	serial_write(c);
	for (i = 0; i < opt.size; i += 8) {     /* payload and message are larger than any size */
		memcpy(&word, payload + i, 8);
		word ^= mask;
		memcpy(message + at + i, &word, 8);
	}
	return at + opt.size;
}

/* Whether n bytes are what has to come at that place of an echo. */
static int echo_check(const struct conn *c, const unsigned char *p, size_t n)
{
	unsigned char header[10];
	size_t len = header_write(header, opt.size, 0), at = c->at, part;

	serial_write(c);
	if (at < len) {
		part = n < len - at ? n : len - at;
		if (memcmp(p, header + at, part) != 0)
			return 0;
		p += part, n -= part, at += part;
	}
	return at - len + n <= opt.size && memcmp(p, payload + at - len, n) == 0;
}

static size_t echo_size(void)
{
	unsigned char header[10];

	return header_write(header, opt.size, 0) + opt.size;
}

static void message_start(struct conn *c)
{
	c->serial++;
	c->since = clock_ns(CLOCK_MONOTONIC);
	c->step = SEND;
}

static void latency_add(uint64_t since)
{
	if ((latencies & (latencies - 1)) == 0)
		latency = realloc(latency, (latencies ? 2 * latencies : 1) * sizeof *latency);
	if (!latency)
		die("out of memory");
	latency[latencies++] = (uint32_t)((clock_ns(CLOCK_MONOTONIC) - since) / 1000);
}

/* Connections. */

static void conn_watch(struct conn *c, unsigned events)
{
	struct epoll_event ev = { .events = events, .data.ptr = c };

	if (c->events == events)
		return;
	if (epoll_ctl(epoll_fd, c->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &ev) < 0)
		die("epoll_ctl: %s", strerror(errno));
	c->events = events;
}

static void conn_opened(void);

/* A connection has ended, or was given up. */
static void conn_lost(struct conn *c)
{
	uint64_t now = clock_ns(CLOCK_MONOTONIC);

	if (c->role == CONNECT && measuring)
		latency_add(c->since);
	if (c->step < SEND)
		conn_opened();
	if (c->ssl)     /* or OpenSSL takes its session for a bad one, which all others share */
		SSL_set_shutdown(c->ssl, SSL_SENT_SHUTDOWN);
	SSL_free(c->ssl);
	c->ssl = NULL;
	close(c->fd);
	cut++;
	c->step = GONE;
	c->since = now + (c->role != STORM ? 0 :
		(uint64_t)(opt.patience * 1e9 * (.2 + .8 * (double)rand() / RAND_MAX)));
}

/* What to do after an SSL call that did not go through: wait for what it says. */
static void conn_wait(struct conn *c, int result)
{
	static const char *const steps[] = { "connect", "handshake", "request", "response", "send",
		"receive", "silence", "hold" };
	int error = SSL_get_error(c->ssl, result);

	if (error == SSL_ERROR_WANT_READ)
		conn_watch(c, EPOLLIN);
	else if (error == SSL_ERROR_WANT_WRITE)
		conn_watch(c, EPOLLOUT);
	else if (opt.lenient)
		conn_lost(c);
	else
		die("a connection ended in its %s: %s", steps[c->step],
			errno ? strerror(errno) : "EOF");
}

/* Writes the rest of a buffer, of which c->at bytes went. 1: all is gone. */
static int conn_write(struct conn *c, const unsigned char *p, size_t len)
{
	while (c->at < len) {
		int n = SSL_write(c->ssl, p + c->at, (int)(len - c->at));

		if (n <= 0) {
			conn_wait(c, n);
			return 0;
		}
		c->at += (size_t)n;
	}
	c->at = 0;
	return 1;
}

static void conn_open(struct conn *c)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
		.sin_port = htons(opt.port) };
	struct sockaddr_in own = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(c->source) };
	int one = 1;

	if (opening == OPENING_MAX && c->role != CONNECT && c->role != STORM) {
		c->waiting = waiting;
		waiting = c;
		return;
	}
	opening++;
	c->step = TCP;
	c->events = 0;
	c->at = 0;
	c->since = clock_ns(CLOCK_MONOTONIC);
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		die("socket: %s", strerror(errno));
	setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
	if (c->source && bind(c->fd, (struct sockaddr *)&own, sizeof own) < 0)
		die("bind: %s", strerror(errno));
	if (connect(c->fd, (struct sockaddr *)&sa, sizeof sa) < 0 && errno != EINPROGRESS)
		die("connect: %s", strerror(errno));
	conn_watch(c, EPOLLOUT);
}

static void conn_opened(void)
{
	struct conn *c = waiting;

	opening--;
	if (c) {
		waiting = c->waiting;
		conn_open(c);
	}
}

static int tcp_step(struct conn *c)
{
	int error = 0;
	socklen_t len = sizeof error;

	getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
	if (error && !opt.lenient)
		die("connect: %s", strerror(error));
	if (error) {
		conn_lost(c);
		return 0;
	}
	c->ssl = SSL_new(tls);
	if (!c->ssl || !SSL_set_fd(c->ssl, c->fd) || !SSL_set_tlsext_host_name(c->ssl, "localhost"))
		die("SSL_new");
	if (opt.resume && ticket)
		SSL_set_session(c->ssl, ticket);
	c->step = TLS;
	return 1;
}

/* All proxies have to do the same work. */
static void suite_check(SSL *ssl)
{
	EVP_PKEY *key;

	if (strcmp(SSL_get_cipher_name(ssl), opt.suite) != 0)
		die("suite %s, not %s", SSL_get_cipher_name(ssl), opt.suite);
	if (SSL_session_reused(ssl))
		return;
	if (!SSL_get_peer_tmp_key(ssl, &key) || EVP_PKEY_get_id(key) != EVP_PKEY_X25519)
		die("the key exchange is not X25519");
	EVP_PKEY_free(key);
}

static int tls_step(struct conn *c)
{
	int n = SSL_connect(c->ssl);

	if (n <= 0) {
		conn_wait(c, n);
		return 0;
	}
	suite_check(c->ssl);
	if (opt.resume && measuring)
		full += !SSL_session_reused(c->ssl);
	if (opt.resume && !ticket)
		ticket = SSL_get1_session(c->ssl);
	c->step = REQUEST;
	return 1;
}

static int request_step(struct conn *c)
{
	if (!conn_write(c, request, request_len))
		return 0;
	c->step = RESPONSE;
	return 1;
}

/* It is in, and stays: of a storm until its end, others with a record that has begun, or bytes that
 * they do not take. */
static int conn_hold(struct conn *c)
{
	c->step = HELD;
	if (c->role == STORM) {
		latency_add(c->since);
		up++;
	}
	if (c->role == PIECES)
		SSL_set0_wbio(c->ssl, BIO_new(BIO_s_mem()));
	conn_watch(c, EPOLLRDHUP);
	return 0;
}

/* Reads the answer's head a byte at a time, for what follows it is counted elsewhere. OpenSSL has
 * the record, so that costs no system call. Then the session rests, or waits for the others. */
static int response_step(struct conn *c)
{
	static const char status[] = "HTTP/1.1 101";
	char b;
	int n;

	while ((n = SSL_read(c->ssl, &b, 1)) > 0) {
		if (c->at < sizeof status - 1 && b != status[c->at++]) {
			if (!opt.lenient)
				die("the answer to an upgrade is not 101");
			conn_lost(c);
			return 0;
		}
		c->tail = c->tail << 8 | (unsigned char)b;
		if (c->tail == 0x0d0a0d0a) {
			c->at = 0;
			conn_opened();
			if (c->role >= STORM)
				return conn_hold(c);
			if (c->role == ECHO || c->role == REST)
				message_start(c);
			else
				c->step = c->role == DOWN ? RECV : SEND;
			conn_watch(c, EPOLLIN);
			return c->role == CONNECT || c->role == REST;
		}
	}
	conn_wait(c, n);
	return 0;
}

/* One connection of `connect` is complete. */
static void connect_done(struct conn *c)
{
	if (measuring) {
		count++;
		latency_add(c->since);
	}
	SSL_shutdown(c->ssl);
	SSL_free(c->ssl);
	close(c->fd);
	conn_open(c);
}

static int up_step(struct conn *c)
{
	int i, n;

	for (i = 0; i < BULK_ROUNDS; i++) {
		size_t left = sizeof bulk - c->at;

		n = SSL_write(c->ssl, bulk + c->at, (int)(left < 16384 ? left : 16384));
		if (n <= 0) {
			conn_wait(c, n);
			return 0;
		}
		if (measuring)
			bytes += (uint64_t)n;
		c->at = (c->at + (size_t)n) % sizeof bulk;
	}
	conn_watch(c, EPOLLOUT);
	return 0;
}

static int down_step(struct conn *c)
{
	int i, n;

	for (i = 0; i < BULK_ROUNDS; i++) {
		n = SSL_read(c->ssl, scratch, sizeof scratch);
		if (n <= 0) {
			conn_wait(c, n);
			return 0;
		}
		if (measuring)
			bytes += (uint64_t)n;
	}
	conn_watch(c, EPOLLIN);
	return 0;
}

static int send_step(struct conn *c)
{
	if (c->role == CONNECT) {
		connect_done(c);
		return 0;
	}
	if (c->role == UP)
		return up_step(c);
	if (!conn_write(c, message, message_write(c)))
		return 0;
	c->step = RECV;
	conn_watch(c, EPOLLIN);
	return 0;       /* the echo can't be there yet */
}

static int recv_step(struct conn *c)
{
	int n;

	if (c->role == DOWN)
		return down_step(c);
	while ((n = SSL_read(c->ssl, scratch, sizeof scratch)) > 0) {
		if (!echo_check(c, scratch, (size_t)n))
			die("an echo is not what was sent");
		c->at += (size_t)n;
		if (c->at == echo_size()) {
			c->at = 0;
			if (c->role == REST) {
				c->step = SILENT;
				silent++;
				return 0;
			}
			if (measuring) {
				count++;
				latency_add(c->since);
			}
			message_start(c);
			return 1;
		}
	}
	conn_wait(c, n);
	return 0;
}

static int silent_step(struct conn *c)
{
	die("a session that rests has got something: %d", SSL_read(c->ssl, scratch, 1));
}

static int held_step(struct conn *c)
{
	up -= c->role == STORM;
	conn_lost(c);
	return 0;
}

static int gone_step(struct conn *c)
{
	(void)c;
	return 0;
}

/* A part of a record of the largest size. */
static void piece_send(struct conn *c, uint64_t now)
{
	BIO *out = SSL_get_wbio(c->ssl);
	size_t left = sizeof bulk - c->at, n = left < 16384 ? left : 16384;
	unsigned char piece[PIECE];

	c->since = now + (uint64_t)PIECE_MS * 1000000;
	if (BIO_pending(out) < PIECE) {
		SSL_write(c->ssl, bulk + c->at, (int)n);
		c->at = (c->at + n) % sizeof bulk;
	}
	n = (size_t)BIO_read(out, piece, PIECE);
	if (send(c->fd, piece, n, MSG_NOSIGNAL) != (ssize_t)n)
		conn_lost(c);
}

/* What is done at a time, not at an event. */
static void conn_tick(struct conn *c, uint64_t now)
{
	if (c->step == GONE && (c->role == STORM || c->role == CONNECT) && now >= c->since)
		conn_open(c);
	else if (c->role == STORM && c->step < SEND && now - c->since > opt.patience * 1e9)
		conn_lost(c);
	else if (c->role == PIECES && c->step == HELD && now >= c->since)
		piece_send(c, now);
}

static void conns_tick(uint64_t now)
{
	struct conn *c;

	if (!opt.lenient || now < tick)
		return;
	tick = now + (uint64_t)TICK_MS * 1000000;
	for (c = conns; c; c = c->next)
		conn_tick(c, now);
}

/* Steps a connection until it waits. */
static void conn_run(struct conn *c)
{
	static int (*const steps[])(struct conn *) = { tcp_step, tls_step, request_step,
		response_step, send_step, recv_step, silent_step, held_step, gone_step };

	errno = 0;
	ERR_clear_error();
	while (steps[c->step](c))
		;
}

static void conns_open(unsigned n, enum role role)
{
	for (; n > 0; n--) {
		struct conn *c = calloc(1, sizeof *c);

		if (!c)
			die("out of memory");
		c->role = role;
		c->source = opt.source;
		opt.source += opt.source && opt.many;
		c->next = conns;
		conns = c;
		conn_open(c);
		while (opt.resume && !ticket) {
			struct epoll_event ev;

			if (epoll_wait(epoll_fd, &ev, 1, 10000) != 1)
				die("the first handshake does not end");
			conn_run(ev.data.ptr);
		}
	}
}

/* Runs what comes until the time, or while *what is not `value`. */
static void run(double seconds, const unsigned *what, unsigned value)
{
	uint64_t end = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(seconds * 1e9), now;
	struct epoll_event events[64];
	int i, n;

	while ((!what || *what != value) && (now = clock_ns(CLOCK_MONOTONIC)) < end) {
		n = epoll_wait(epoll_fd, events, 64,
			opt.lenient ? TICK_MS : (int)((end - now) / 1000000 + 1));
		if (n < 0 && errno != EINTR)
			die("epoll_wait: %s", strerror(errno));
		for (i = 0; i < n; i++)
			conn_run(events[i].data.ptr);
		conns_tick(clock_ns(CLOCK_MONOTONIC));
	}
	if (what && *what != value && !opt.lenient)
		die("waited too long for sessions to open");
}

static int latency_compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static uint32_t latency_at(double share)
{
	size_t i = (size_t)(share * (double)latencies);

	return latencies == 0 ? 0 : latency[i < latencies ? i : latencies - 1];
}

/* The line of the result, of what was since then. */
static void result(uint64_t began, uint64_t cpu)
{
	struct conn *c;

	cpu = cpu_ns() - cpu;
	began = clock_ns(CLOCK_MONOTONIC) - began;
	for (c = conns; c && opt.lenient; c = c->next)
		if ((c->role == CONNECT || c->role == STORM) && c->step < SEND)
			latency_add(c->since);
	qsort(latency, latencies, sizeof *latency, latency_compare);
	printf("count=%llu bytes=%llu seconds=%.4f cpu=%.6f full=%llu cut=%llu p50=%u p99=%u "
		"worst=%u\n", (unsigned long long)count, (unsigned long long)bytes,
		(double)began / 1e9, (double)cpu / 1e9, (unsigned long long)full,
		(unsigned long long)cut, latency_at(.5), latency_at(.99), latency_at(1));
}

/* The first one comes alone, for -R. */
static void storm(void)
{
	uint64_t began, cpu;

	conns_open(1, REST);
	run(30, &silent, 1);
	measuring = 1;
	began = clock_ns(CLOCK_MONOTONIC);
	cpu = cpu_ns();
	conns_open(opt.clients, STORM);
	run(opt.seconds, &up, opt.clients);
	count = up;
	result(began, cpu);
}

static void measure(void)
{
	uint64_t began, cpu;
	struct conn *c;

	conns_open(opt.resting, REST);
	run(30 + opt.resting / 50.0, &silent, opt.resting);
	conns_open(opt.clients, opt.role);
	if (opt.role != CONNECT) {
		run(30, &opening, 0);
		run(opt.settle, NULL, 0);
	}
	if (opt.lenient) {
		printf("open\n");
		fflush(stdout);
	}
	for (c = conns; c && opt.role != CONNECT; c = c->next)
		if (c->role == opt.role && c->step != HELD)
			conn_run(c);
	run(opt.seconds < 1 ? 0.1 : opt.seconds / 10, NULL, 0);
	measuring = 1;
	began = clock_ns(CLOCK_MONOTONIC);
	cpu = cpu_ns();
	run(opt.seconds, NULL, 0);
	result(began, cpu);
}

static void hold(int n, char **counts)
{
	unsigned want;

	for (; n > 0; n--, counts++) {
		want = (unsigned)atoi(*counts);
		if (want < silent)
			die("hold: counts must grow");
		conns_open(want - silent, REST);
		run(60 + want / 50.0, &silent, want);
		run(opt.settle, NULL, 0);
		printf("holding=%u\n", silent);
		fflush(stdout);
		if (getchar() == EOF)
			return;
	}
}

/* Start. */

static void pids_parse(char *list)
{
	char *p;

	for (p = strtok(list, ","); p; p = strtok(NULL, ","))
		if (opt.pids == PIDS_MAX ||
		    clock_getcpuclockid((pid_t)atoi(p), &opt.pid[opt.pids++]))
			die("no process %s", p);
}

static void tls_init(void)
{
	tls = SSL_CTX_new(TLS_client_method());
	if (!tls || !SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION) ||
	    !SSL_CTX_set_max_proto_version(tls, TLS1_2_VERSION) ||
	    !SSL_CTX_set_cipher_list(tls, opt.suite) ||
	    !SSL_CTX_set1_groups_list(tls, "X25519:P-256"))
		die("OpenSSL");
	SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_read_ahead(tls, 1);
}

static void messages_init(void)
{
	static const char *const paths[] = { "/echo", "/sink", "/source", "/echo", "/echo",
		"/echo", "/sink", "/source" };
	size_t at;

	memset(payload, 'm', sizeof payload);
	at = header_write(bulk, BULK_FRAME, 1);
	memset(bulk + at, 0x5a, sizeof bulk - at);
	request_len = (size_t)snprintf((char *)request, sizeof request,
		"GET %s HTTP/1.1\r\nHost: localhost:%u\r\n"
		"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: https://localhost:%u\r\n"
		"User-Agent: load\r\n\r\n", paths[opt.role], opt.port, opt.port);
}

static _Noreturn void usage(void)
{
	fprintf(stderr, "usage: load [-Rkm] [-a address] [-c clients] [-r resting] [-s size]\n"
		"\t[-t seconds] [-w seconds] [-T patience] [-C suite] [-P pids] -p port\n"
		"\techo|up|down|connect|storm|pieces|stuck|hold [n...]\n");
	exit(2);
}

static void arguments(int argc, char **argv)
{
	static const char *const roles[] = { "echo", "up", "down", "connect", "hold", "storm",
		"pieces", "stuck" };
	const unsigned n = sizeof roles / sizeof *roles;
	unsigned i;
	int o;

	while ((o = getopt(argc, argv, "C:P:RT:a:c:kmp:r:s:t:w:")) != -1)
		switch (o) {
		case 'C': opt.suite = optarg; break;
		case 'P': pids_parse(optarg); break;
		case 'R': opt.resume = 1; break;
		case 'T': opt.patience = atof(optarg); break;
		case 'a': opt.source = ntohl(inet_addr(optarg)); break;
		case 'k': opt.lenient = 1; break;
		case 'm': opt.many = 1; break;
		case 'c': opt.clients = (unsigned)atoi(optarg); break;
		case 'p': opt.port = (in_port_t)atoi(optarg); break;
		case 'r': opt.resting = (unsigned)atoi(optarg); break;
		case 's': opt.size = (size_t)atol(optarg); break;
		case 't': opt.seconds = atof(optarg); break;
		case 'w': opt.settle = atof(optarg); break;
		default: usage();
		}
	for (i = 0; optind < argc && i < n && strcmp(argv[optind], roles[i]) != 0; i++)
		;
	if (optind == argc || i == n || opt.port == 0)
		usage();
	if (opt.size == 0 || opt.size > MESSAGE_MAX - 8 || opt.clients == 0)
		usage();
	opt.role = (enum role)i;
	opt.lenient |= opt.role >= STORM;
}

int main(int argc, char **argv)
{
	struct rlimit files;

	arguments(argc, argv);
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0)
		die("epoll_create1: %s", strerror(errno));
	tls_init();
	messages_init();
	signal(SIGPIPE, SIG_IGN);
	if (opt.role == STORM)
		storm();
	else if (opt.role == REST)
		hold(argc - optind - 1, argv + optind + 1);
	else
		measure();
	fflush(stdout);
	_exit(0);       /* all connections at once, and nothing of theirs is freed one by one */
}
