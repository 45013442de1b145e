/* peers.h - the world of the session target: the far ends of the proxy's connections, which are real
 * socketpairs, in the clear or behind BearSSL's engines; and in place of some system calls ones that
 * let the input decide: who connects, what a dial comes to, what time it is. All else is the
 * kernel's. */
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <arpa/inet.h>
#include <bearssl.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int world_poll(struct pollfd *p, nfds_t n, int ms);
static int world_watch(int fd, struct epoll_event *ev);
static int world_events(struct epoll_event *ev, int most);
static int world_accept(int fd, struct sockaddr *sa, socklen_t *len);
static int world_socket(int family);
static int world_connect(int fd);
static int world_error(int fd, int name, void *value, socklen_t *len);
static int world_close(int fd);
static int world_clock(clockid_t clock, struct timespec *t);
static ssize_t world_random(void *buf, size_t len);
static ssize_t world_log(int fd, const void *line, size_t len);
static ssize_t world_send(int fd, const void *p, size_t len, int flags);
static ssize_t world_recv(int fd, void *p, size_t len, int flags);

#define poll(p, n, ms)                  world_poll(p, n, ms)
#define epoll_ctl(set, op, fd, ev)      world_watch(fd, ev)
#define epoll_wait(set, ev, most, ms)   world_events(ev, most)
#define accept4(fd, sa, len, flags)     world_accept(fd, sa, len)
#define socket(family, type, protocol)  world_socket(family)
#define connect(fd, sa, len)            ((void)(sa), (void)(len), world_connect(fd))
#define getsockopt(fd, level, name, value, len) world_error(fd, name, value, len)
#define close(fd)                       world_close(fd)
#define clock_gettime(clock, t)         world_clock(clock, t)
#define getrandom(buf, len, flags)      ((void)(flags), world_random(buf, len))
#define write(fd, p, len)               world_log(fd, p, len)
#define send(fd, p, len, flags)         world_send(fd, p, len, flags)
#define recv(fd, p, len, flags)         world_recv(fd, p, len, flags)
#include "fuzz.h"
#undef poll
#undef epoll_ctl
#undef epoll_wait
#undef accept4
#undef socket
#undef connect
#undef getsockopt
#undef close
#undef clock_gettime
#undef getrandom
#undef write
#undef send
#undef recv

#include "../unit-pem.h"

/* A certificate for chat.example, of the key PEM_EC_KEY. */
#define PEM_CHAT_CERT \
	"-----BEGIN CERTIFICATE-----\n" \
	"MIIBnTCCAUSgAwIBAgIUeiNtcOozqMyPbMX8K2ScvFCdjOowCgYIKoZIzj0EAwIw\n" \
	"FzEVMBMGA1UEAwwMY2hhdC5leGFtcGxlMCAXDTI2MTEyNDAyMTY0MVoYDzIxMjYx\n" \
	"MDMxMDIxNjQxWjAXMRUwEwYDVQQDDAxjaGF0LmV4YW1wbGUwWTATBgcqhkjOPQIB\n" \
	"BggqhkjOPQMBBwNCAAQ1IJyW5jMl0b6b+jxrnn46vuohczNpjvqBbQ7W7Q9R4zgz\n" \
	"PZraWh2K1v/LkrM0Fx5W32HIP11GhtdwNHYHkAoyo2wwajAdBgNVHQ4EFgQUlG1/\n" \
	"Ru7kqNP98WvB8EtTPhKnlYcwHwYDVR0jBBgwFoAUlG1/Ru7kqNP98WvB8EtTPhKn\n" \
	"lYcwDwYDVR0TAQH/BAUwAwEB/zAXBgNVHREEEDAOggxjaGF0LmV4YW1wbGUwCgYI\n" \
	"KoZIzj0EAwIDRwAwRAIgFO2dyUMTRuTCOvwUrNmrJXDJ+NqYC3JTdgWn3O8vhsIC\n" \
	"IF3aLpWxR1ZazJavEIw7LNN/dcMi+evZzaAdu2jMBX/W\n" \
	"-----END CERTIFICATE-----\n"

enum {
	PEERS = 48,
	STREAM = 1 << 17,
	SENT_MAX = STREAM - 2 * HEAD_ROOM,      /* heads grow on their way */
	FDS = 1024,
	LOG_FD = 1000000,       /* the log is no descriptor of the kernel's */
	START_MS = 1000000,
};

struct stream {                 /* application bytes, from the first on */
	char *data;
	size_t len;
};

/* A connection as seen from the other side. */
struct peer {
	int near, far;          /* the proxy's descriptor and ours, -1: closed */
	int is_backend;
	int owner;              /* of a backend: the client that it serves, -1; and which of its */
	unsigned request;       /* requests, from 1 */
	int server;             /* of a backend: which, -1 */
	enum { UP, PENDING, FAILED } dial;
	int error;              /* of a dial that failed */
	enum listener_kind kind;
	struct address address;
	struct stream sent, got;
	int eof;                /* nothing more comes from the proxy */
	int shut;               /* we said that nothing more comes */
	int wild;               /* bytes were sent past its engine */
	unsigned empty_records; /* sent */
	int ended;              /* the proxy has read its end */
	br_ssl_engine_context *eng;
};

struct tls {
	union {
		br_ssl_client_context client;
		br_ssl_server_context server;
	} u;
	br_x509_minimal_context unused;
	br_x509_knownkey_context known;
	unsigned char buf[BR_SSL_BUFSIZE_BIDI];
};

static struct peer peers[PEERS];
static struct tls tls[PEERS];
static unsigned peers_len;
static char streams[PEERS][2][STREAM];
static int peer_of[FDS];                /* by the proxy's descriptor, -1 */
static int listening[LISTENERS], signals_in = -1;
static int waiting[LISTENERS][PEERS];   /* clients not accepted yet */
static unsigned waiting_len[LISTENERS];
static uint64_t clock_ms, random_seed;
static unsigned progress;               /* calls of the proxy that moved something */
static int dial_next;                   /* what becomes of the next dials: DIAL_* */
static int no_descriptors;              /* accept and socket fail */
static int small_buffers;
static int epoll_fd = -1;               /* the proxy's set */
static struct {
	uint64_t data;
	unsigned due;                   /* events that the proxy has yet to be told of */
} watched[FDS];
static int watched_len;                 /* descriptors from 0 on */
static struct epoll_event events[FDS];
static int events_len;

enum { DIAL_UP, DIAL_PENDING, DIAL_REFUSED, DIAL_LATER, DIALS };

static int trace;                       /* TRACE=1 in the environment: tells what happens */

#define TRACE(...) (trace ? (void)fprintf(stderr, __VA_ARGS__) : (void)0)

static struct identity chat;            /* what TLS backends show */
static br_x509_decoder_context known_keys[2];   /* of certs[] 0 and 1 */
static br_ssl_session_parameters resumable;     /* a session of a client, from before all inputs */
static br_ssl_session_cache_lru chat_cache;
static unsigned char chat_store[2000];

static struct peer *peer_at(int fd)
{
	MUST(fd >= 0 && fd < FDS && peer_of[fd] >= 0);
	MUST(peers[peer_of[fd]].near == fd);
	return &peers[peer_of[fd]];
}

static struct peer *peer_new(int is_backend)
{
	struct peer *p = &peers[peers_len];
	int pair[2], least = 1;

	if (peers_len == PEERS ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) < 0)
		return NULL;
	memset(p, 0, sizeof *p);
	p->near = pair[0];
	p->far = pair[1];
	p->is_backend = is_backend;
	p->owner = p->server = -1;
	p->sent.data = streams[peers_len][0];
	p->got.data = streams[peers_len][1];
	if (small_buffers & 1)
		setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
	if (small_buffers & 2)
		setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
	MUST(pair[0] < FDS);
	peer_of[pair[0]] = (int)peers_len++;
	return p;
}

/* ---- system calls of the proxy ---- */

static int world_accept(int fd, struct sockaddr *sa, socklen_t *len)
{
	uint64_t one;
	unsigned i;

	for (i = 0; i < LISTENERS && listening[i] != fd; i++)
		;
	MUST(i < LISTENERS);
	errno = no_descriptors ? EMFILE : EAGAIN;
	if (no_descriptors || read(fd, &one, sizeof one) < 0)
		return -1;
	MUST(waiting_len[i] > 0);
	fd = waiting[i][0];
	memmove(waiting[i], waiting[i] + 1, --waiting_len[i] * sizeof waiting[i][0]);
	MUST(*len >= sizeof peers[fd].address);
	*len = sizeof peers[fd].address;
	memcpy(sa, &peers[fd].address, *len);
	progress++;
	return peers[fd].near;
}

static int world_socket(int family)
{
	struct peer *p;

	(void)family;
	errno = EMFILE;
	if (no_descriptors || (p = peer_new(1)) == NULL)
		return -1;
	progress++;
	return p->near;
}

static int world_connect(int fd)
{
	static const int refusals[] = { ECONNREFUSED, ENETUNREACH, ETIMEDOUT, EACCES, EAGAIN,
		ENOENT };
	struct peer *p = peer_at(fd);
	const int how = dial_next % DIALS;

	p->dial = how == DIAL_PENDING || how == DIAL_LATER ? PENDING : UP;
	p->error = refusals[(unsigned)dial_next / DIALS % LENGTH(refusals)];
	errno = p->dial == PENDING ? EINPROGRESS : p->error;
	if (how == DIAL_REFUSED)
		return -1;
	return p->dial == PENDING ? -1 : 0;
}

/* What a socket failed of; or what TCP knows of a client that has been silent, but not asked yet. */
static int world_error(int fd, int name, void *value, socklen_t *len)
{
	struct peer *p = peer_at(fd);
	int error = p->dial == FAILED ? p->error : 0;
	const struct tcp_info info = { .tcpi_last_data_recv = 6000, .tcpi_last_ack_recv = 6000 };

	if (name == TCP_INFO) {
		MUST(*len == sizeof info && !p->is_backend);
		memcpy(value, &info, sizeof info);
		return 0;
	}
	MUST(name == SO_ERROR && *len == sizeof error && p->dial != PENDING);
	memcpy(value, &error, sizeof error);
	return 0;
}

static int world_close(int fd)
{
	unsigned i;

	if (fd == -1)           /* a door that is not there */
		return -1;
	MUST(fd >= 0 && fd < FDS);
	watched[fd].due = 0;
	progress++;
	if (peer_of[fd] >= 0) {
		TRACE("\tclose %d\n", peer_of[fd]);
		peer_at(fd)->near = -1;
		peer_of[fd] = -1;
	}
	for (i = 0; i < LISTENERS; i++) {
		if (listening[i] != fd)
			continue;
		listening[i] = -1;
		for (; waiting_len[i] > 0; waiting_len[i]--) {
			struct peer *p = &peers[waiting[i][waiting_len[i] - 1]];

			close(p->near);
			peer_of[p->near] = -1;
			p->near = -1;
		}
	}
	i = (unsigned)close(fd);
	MUST(i == 0);
	return 0;
}

static int world_clock(clockid_t clock, struct timespec *t)
{
	t->tv_sec = (time_t)(clock_ms / 1000);
	if (clock == CLOCK_REALTIME)
		t->tv_sec += (time_t)BUILD_TIME + 30 * 86400;
	t->tv_nsec = (long)(clock_ms % 1000) * 1000000;
	return 0;
}

static ssize_t world_random(void *buf, size_t len)
{
	unsigned char *p = buf;
	size_t i;

	for (i = 0; i < len; i++)
		p[i] = (unsigned char)hash_mix(++random_seed);
	return (ssize_t)len;
}

/* What came from outside can't break out of its line. */
static ssize_t world_log(int fd, const void *line, size_t len)
{
	const char *p = line;
	size_t i;

	MUST(fd == LOG_FD && len > 1 && len <= LOG_LINE && p[len - 1] == '\n');
	for (i = 0; i + 1 < len; i++)
		MUST(p[i] >= ' ' && p[i] < 0x7f);
	TRACE("\t%.*s", (int)len, p);
	return (ssize_t)len;
}

static ssize_t world_send(int fd, const void *p, size_t len, int flags)
{
	struct peer *peer = peer_at(fd);
	ssize_t n;

	MUST(peer->dial == UP && len > 0 && (flags & MSG_NOSIGNAL));
	n = send(fd, p, len, flags);
	TRACE("\tsend %d: %zd of %zu\n", peer_of[fd], n, len);
	progress += n > 0;
	return n;
}

static ssize_t world_recv(int fd, void *p, size_t len, int flags)
{
	struct peer *peer = peer_at(fd);
	ssize_t n;

	MUST(peer->dial == UP && len > 0);
	n = recv(fd, p, len, flags);
	TRACE("\trecv %d: %zd of %zu\n", peer_of[fd], n, len);
	progress += n > 0 && !(flags & MSG_PEEK);
	if (n == 0 || (n < 0 && errno != EAGAIN)) {
		progress += !peer->ended;
		peer->ended = 1;
	}
	return n;
}

static int is_shut(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLRDHUP };

	return poll(&p, 1, 0) == 1;
}

/* Local sockets do not heed SO_RCVLOWAT, as TCP's do. */
static short lowat_revents(int fd, short revents)
{
	int mark, there;
	socklen_t len = sizeof mark;

	if ((revents & (POLLIN | POLLHUP | POLLERR | POLLRDHUP)) != POLLIN ||
	    getsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &mark, &len) < 0 || mark == 1)
		return revents;
	MUST(ioctl(fd, FIONREAD, &there) == 0);
	return (short)(there < mark && !is_shut(fd) ? revents & ~POLLIN : revents);
}

static int events_collect(void);

/* The kernel's poll, but for dials that are under way or have failed, and the epoll set. */
static int sockets_poll(struct pollfd *p, nfds_t n)
{
	static struct pollfd copy[FDS];
	int ready;
	nfds_t i;

	MUST(n <= FDS);
	memcpy(copy, p, n * sizeof *p);
	for (i = 0; i < n; i++)
		if (copy[i].fd >= 0 && copy[i].fd < FDS && peer_of[copy[i].fd] >= 0 &&
		    peer_at(copy[i].fd)->dial != UP)
			copy[i].fd = -1;
		else if (copy[i].fd == epoll_fd)
			copy[i].fd = -1;
	ready = poll(copy, n, 0);
	for (i = 0; i < n; i++) {
		p[i].revents = lowat_revents(copy[i].fd, copy[i].revents);
		ready -= copy[i].revents && !p[i].revents;
		MUST(!(p[i].revents & POLLNVAL));
		if (p[i].fd == epoll_fd) {
			p[i].revents = events_collect() ? POLLIN : 0;
			ready += p[i].revents != 0;
		} else if (copy[i].fd < 0 && p[i].fd >= 0 && peer_at(p[i].fd)->dial == FAILED) {
			p[i].revents = POLLOUT | POLLERR | POLLHUP;
			ready++;
		}
	}
	return ready;
}

/* The proxy's epoll set. The kernel tells of what has come; this keeps it back while a dial is under
 * way, and bytes while they are fewer than SO_RCVLOWAT, and tells, like the kernel, all that is so at
 * that moment. */
static int world_watch(int fd, struct epoll_event *ev)
{
	struct epoll_event mine = { .events = ev->events, .data.fd = fd };

	MUST(fd >= 0 && fd < FDS);
	watched[fd].data = ev->data.u64;
	watched[fd].due = 0;
	if (fd >= watched_len)
		watched_len = fd + 1;
	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &mine);
}

/* What is so at a descriptor of the proxy's, of what the epoll set tells. */
static unsigned fd_is(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLRDHUP | POLLPRI };

	return sockets_poll(&p, 1) > 0 ? (unsigned)p.revents : 0;
}

/* Whether the set has something to tell. */
static int events_collect(void)
{
	struct epoll_event ev[FDS];
	int i, fd, n = epoll_wait(epoll_fd, ev, FDS, 0);

	for (i = 0; i < n; i++)
		watched[ev[i].data.fd].due |= ev[i].events;
	events_len = 0;
	for (fd = 0; fd < watched_len; fd++) {
		unsigned is = watched[fd].due ? fd_is(fd) : 0;

		if (!(is & (watched[fd].due | POLLHUP | POLLERR)))
			continue;
		events[events_len].data.u64 = watched[fd].data;
		events[events_len++].events = is;
		watched[fd].due &= ~is;
	}
	return events_len > 0;
}

static int world_events(struct epoll_event *ev, int most)
{
	int n = events_len < most ? events_len : most;

	memcpy(ev, events, (size_t)n * sizeof *ev);
	events_len -= n;
	memmove(events, events + n, (size_t)events_len * sizeof *ev);
	return n;
}

/* ---- the far ends ---- */

static void stream_add(struct stream *s, const void *p, size_t len)
{
	MUST(len <= STREAM - s->len);
	memcpy(s->data + s->len, p, len);
	s->len += len;
}

/* Nothing more comes from the proxy. */
static int far_recv(struct peer *p, void *buf, size_t len)
{
	ssize_t n = p->far < 0 || p->eof || len == 0 ? -1 : recv(p->far, buf, len, 0);

	if (p->far >= 0 && (n == 0 || (n < 0 && errno == ECONNRESET)))
		p->eof = 1;
	return n > 0 ? (int)n : 0;
}

/* Records both ways, at most `most` bytes each, and what they hold. What was moved. */
static size_t far_pump(struct peer *p, size_t most)
{
	size_t moved = 0, left = most, len;
	unsigned char *buf;
	ssize_t n;

	while (left > 0 && p->far >= 0 && !p->shut &&
	    (buf = br_ssl_engine_sendrec_buf(p->eng, &len)) != NULL) {
		n = send(p->far, buf, len < left ? len : left, MSG_NOSIGNAL);
		if (n <= 0)
			break;
		br_ssl_engine_sendrec_ack(p->eng, (size_t)n);
		left -= (size_t)n;
		moved += (size_t)n;
	}
	for (left = most;;) {
		while ((buf = br_ssl_engine_recvapp_buf(p->eng, &len)) != NULL) {
			if (len > STREAM - p->got.len)
				return moved;
			stream_add(&p->got, buf, len);
			br_ssl_engine_recvapp_ack(p->eng, len);
			moved += len;
		}
		buf = br_ssl_engine_recvrec_buf(p->eng, &len);
		if (!buf || (n = far_recv(p, buf, len < left ? len : left)) == 0)
			break;
		br_ssl_engine_recvrec_ack(p->eng, (size_t)n);
		left -= (size_t)n;
		moved += (size_t)n;
	}
	if (br_ssl_engine_current_state(p->eng) == BR_SSL_CLOSED && !p->eof) {
		static char sink[4096];

		p->wild |= br_ssl_engine_last_error(p->eng) != 0;
		while (far_recv(p, sink, sizeof sink) > 0)      /* after close_notify */
			moved++;
	}
	return moved;
}

/* Reads up to so many bytes. What was moved. */
static size_t far_read(struct peer *p, size_t most)
{
	size_t room = STREAM - p->got.len;
	int n;

	if (p->far < 0 || p->dial != UP)
		return 0;
	if (p->eng)
		return far_pump(p, most);
	n = far_recv(p, p->got.data + p->got.len, most < room ? most : room);
	p->got.len += (size_t)n;
	return (size_t)n;
}

/* Sends application bytes, as far as there is room. */
static void far_write(struct peer *p, const void *data, size_t len)
{
	unsigned char *room;
	size_t size;
	ssize_t n;

	len = len < SENT_MAX - p->sent.len ? len : SENT_MAX - p->sent.len;
	if (p->far < 0 || p->shut || len == 0 || p->dial != UP)
		return;
	if (!p->eng) {
		n = send(p->far, data, len, MSG_NOSIGNAL);
		if (n > 0)
			stream_add(&p->sent, data, (size_t)n);
	} else if ((room = br_ssl_engine_sendapp_buf(p->eng, &size)) != NULL) {
		len = len < size ? len : size;
		memcpy(room, data, len);
		br_ssl_engine_sendapp_ack(p->eng, len);
		br_ssl_engine_flush(p->eng, 0);
		stream_add(&p->sent, data, len);
		far_pump(p, SIZE_MAX);
	}
}

static void far_shut(struct peer *p)
{
	if (p->far >= 0)
		shutdown(p->far, SHUT_WR);
	p->shut = 1;
}

static void far_close(struct peer *p, int read_first)
{
	while (read_first && far_read(p, SIZE_MAX) > 0)
		;
	if (p->far >= 0)
		close(p->far);
	p->far = -1;
}

static void far_client_tls(struct peer *p, unsigned how)
{
	static const char *const names[] = { "a.example", "x.b.example", NULL, "y.b.example" };
	struct tls *t = &tls[p - peers];
	const char *name = names[how % LENGTH(names)];
	const br_x509_pkey *pk = br_x509_decoder_get_pkey(&known_keys[how % LENGTH(names) == 1]);
	const int resume = name == names[0] && !(how & 4);
	unsigned char seed[32];

	br_ssl_client_init_full(&t->u.client, &t->unused, NULL, 0);
	p->eng = &t->u.client.eng;
	if (pk->key_type == BR_KEYTYPE_RSA)
		br_x509_knownkey_init_rsa(&t->known, &pk->key.rsa,
			BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN);
	else
		br_x509_knownkey_init_ec(&t->known, &pk->key.ec, BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN);
	br_ssl_engine_set_x509(p->eng, &t->known.vtable);
	world_random(seed, sizeof seed);
	br_ssl_engine_inject_entropy(p->eng, seed, sizeof seed);
	br_ssl_engine_set_buffer(p->eng, t->buf, sizeof t->buf, 1);
	if (resume)
		br_ssl_engine_set_session_parameters(p->eng, &resumable);
	MUST(br_ssl_client_reset(&t->u.client, name, resume));
}

static void far_server_tls(struct peer *p)
{
	struct tls *t = &tls[p - peers];
	unsigned char seed[32];

	br_ssl_server_init_full_ec(&t->u.server, chat.chain, chat.chain_len, BR_KEYTYPE_EC,
		br_skey_decoder_get_ec(&chat.key));
	p->eng = &t->u.server.eng;
	world_random(seed, sizeof seed);
	br_ssl_engine_inject_entropy(p->eng, seed, sizeof seed);
	br_ssl_server_set_cache(&t->u.server, &chat_cache.vtable);
	br_ssl_engine_set_buffer(p->eng, t->buf, sizeof t->buf, 1);
	MUST(br_ssl_server_reset(&t->u.server));
}

/* Someone connects. */
static struct peer *far_connect(unsigned listener, unsigned who)
{
	uint64_t one = 1;
	struct peer *p;

	listener %= LISTENERS;
	if (listening[listener] < 0 || (p = peer_new(0)) == NULL)
		return NULL;
	p->kind = listeners[listener].kind;
	p->address = (struct address){ .in = { .sin_family = AF_INET,
		.sin_port = htons((uint16_t)(p - peers + 1)),
		.sin_addr.s_addr = htonl(0xc0000200 + who % 3u) } };
	if (who & 4) {
		p->address.any.sa_family = AF_INET6;
		p->address.in6.sin6_addr.s6_addr[0] = 0x20;
		p->address.in6.sin6_addr.s6_addr[3] = (unsigned char)(who % 3);
	}
	if (p->kind == WSS && (who & 8) == 0)
		far_client_tls(p, who >> 4);
	waiting[listener][waiting_len[listener]++] = (int)(p - peers);
	MUST(write(listening[listener], &one, sizeof one) == sizeof one);
	return p;
}

static void signal_send(unsigned number)
{
	struct signalfd_siginfo info = { .ssi_signo = number };

	MUST(write(signals_in, &info, sizeof info) == sizeof info);
}

/* ---- the proxy's insides, here and nowhere else ---- */

static unsigned sessions_open(void)
{
	return session_pool.lent;
}

/* Finds out which client a backend serves. */
static void owners_note(void)
{
	unsigned i, k;

	for (i = 0; i < peers_len; i++) {
		struct peer *p = &peers[i];

		for (k = 0; k < max_sessions && p->is_backend && p->owner < 0 && p->near >= 0; k++) {
			if (sessions[k].state == FREE || sessions[k].backend.fd != p->near)
				continue;
			p->owner = ntohs(sessions[k].peer.in.sin_port) - 1;
			p->server = sessions[k].server;
			p->request = sessions[k].request;
			if (backends[p->server].tls != TLS_OFF)
				far_server_tls(p);
		}
	}
}

/* All is given back. */
static void proxy_must_rest(void)
{
	const struct pool *pools[] = { &session_pool, &records_pool, &shelf_pool, &note_pool,
		&source_pool };
	unsigned i;

	for (i = 0; i < LENGTH(pools); i++)
		MUST(pools[i]->lent == 0 && link_alone(&pools[i]->waiters));
	for (i = 0; i < STATES; i++)
		MUST(link_alone(&queues[i].list));
	MUST(link_alone(&queues[Q_STALL].list));
	MUST(link_alone(&queues[Q_YOUNG].list) && link_alone(&queues[Q_GROWN].list) && link_alone(&queues[Q_ASKED].list));
	MUST(link_alone(&turns[0]) && link_alone(&turns[1]) && link_alone(&runnable) && link_alone(&queues[Q_REDIAL].list));
	MUST(keyrings[0].users == 0 && keyrings[1].users == 0);
	for (i = 0; i < BACKENDS; i++)
		MUST(servers[i].active == 0);
	for (i = 0; i < peers_len; i++)
		MUST(peers[i].near < 0);
}

static struct {                 /* as every input finds it */
	struct server servers[BACKENDS];
	br_ssl_session_cache_lru cache, chat_cache;
	unsigned char store[sizeof cache_store], chat_store[sizeof chat_store];
} first;

static void proxy_save(void)
{
	memcpy(first.servers, servers, sizeof servers);
	memcpy(first.store, cache_store, sizeof cache_store);
	memcpy(first.chat_store, chat_store, sizeof chat_store);
	first.cache = cache;
	first.chat_cache = chat_cache;
}

static void proxy_reset(void)
{
	memset(sessions, 0, sizeof sessions);
	session_pool.free = NULL;       /* it was in there */
	session_pool.lent = session_pool.fresh = 0;
	memset(upstreams, 0, sizeof upstreams);
	tables_init();
	memcpy(servers, first.servers, sizeof servers);
	memcpy(cache_store, first.store, sizeof cache_store);
	memcpy(chat_store, first.chat_store, sizeof chat_store);
	cache = first.cache;
	chat_cache = first.chat_cache;
	memset(currents, 0, sizeof currents);
	memset(&totals, 0, sizeof totals);
	last_id = 0;
	accept_after = drain_until = 0;
	stops = reload_due = 0;
}

static void world_open(void)
{
	int pair[2];
	unsigned i;

	clock_ms = now = START_MS;
	random_seed = progress = 0;
	peers_len = 0;
	dial_next = no_descriptors = small_buffers = 0;
	memset(peer_of, 0xff, sizeof peer_of);
	proxy_reset();
	for (i = 0; i < LISTENERS; i++) {
		listening[i] = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
		fds[FD_LISTEN + i].fd = listening[i];
		waiting_len[i] = 0;
	}
	MUST(pipe2(pair, O_NONBLOCK | O_CLOEXEC) == 0);
	fds[FD_SIGNAL].fd = pair[0];
	signals_in = pair[1];
	fds[FD_EPOLL].fd = epoll_fd;
}

static void world_end(void)
{
	unsigned i;

	close(fds[FD_SIGNAL].fd);
	close(signals_in);
	for (i = 0; i < LISTENERS; i++)
		if (listening[i] >= 0)
			world_close(listening[i]);
	for (i = 0; i < peers_len; i++)
		if (peers[i].far >= 0)
			close(peers[i].far);
}

static void file_put(const char *path, const char *text)
{
	FILE *f = fopen(path, "w");

	MUST(f != NULL && fputs(text, f) >= 0 && fclose(f) == 0);
	chmod(path, 0600);
}

/* In the directory where it runs lie the files that unit-config.h names. */
static void proxy_start(void)
{
	static char text[] = PEM_CHAT_CERT " ", key[] = PEM_EC_KEY " ";
	unsigned i;

	trace = getenv("TRACE") != NULL;
	log_fd = LOG_FD;
	memset(peer_of, 0xff, sizeof peer_of);
	memset(listening, 0xff, sizeof listening);
	file_put("unit-cert.pem", PEM_EC_CERT);
	file_put("unit-key.pem", PEM_EC_KEY);
	file_put("unit-cert2.pem", PEM_RSA_CERT);
	file_put("unit-key2.pem", PEM_RSA_KEY);
	file_put("unit-ca.pem", PEM_CHAT_CERT);
	tables_init();
	suites_init();
	servers_init();
	keyring_load(keyring);
	reads = RELOAD;
	MUST(!pem_walk(chain_add, &chat, text, sizeof text - 2, "none"));
	br_skey_decoder_init(&chat.key);
	MUST(!pem_walk(key_add, &chat, key, sizeof key - 2, "none"));
	for (i = 0; i < 2; i++) {
		br_x509_decoder_init(&known_keys[i], NULL, NULL);
		br_x509_decoder_push(&known_keys[i], keyring->id[i].chain[0].data,
			keyring->id[i].chain[0].data_len);
	}
	br_ssl_session_cache_lru_init(&chat_cache, chat_store, sizeof chat_store);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	proxy_save();
}
