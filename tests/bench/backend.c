/* backend.c - the WebSocket server behind the proxies of the benchmark: as cheap as it can be, for
 * it may have to share a CPU with the load. See LICENSE for copyright.
 *
 *     backend
 *
 * Listens on a port of 127.0.0.1 that the kernel chooses, tells it in its first line, and ends with
 * its standard input. What a client gets depends on the path it asks for:
 *
 *     /echo       each frame, whole, comes back
 *     /sink       what comes is thrown away without a look
 *     /source     frames of SOURCE_FRAME bytes without end
 *     /page       no WebSocket: a page of PARTS parts
 *     /part/n     one of them, PART_SIZE bytes
 *
 * One epoll loop. All clients share one buffer; what one of them can't do yet is kept apart. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	READ_MAX = 65536,               /* bytes taken from a client at a time */
	FRAME_MAX = 1 << 20,            /* of an echo */
	SOURCE_FRAME = 65536,
	SOURCE_HEAD = 10,
	PARTS = 40,
	PART_SIZE = 10000,
	SOURCE_ROUNDS = 4,              /* sends in a row, so that no client holds the loop */
};

enum role { REQUEST, ECHO, SINK, SOURCE };

struct client {
	int fd;
	enum role role;
	unsigned events;        /* what epoll tells of it */
	unsigned char *in;      /* the beginning of a request or a frame */
	size_t in_len;
	unsigned char *out;     /* of an echo, not taken yet: out_at to out_len */
	size_t out_at, out_len; /* of a source, out_at is the place in its frame */
};

static unsigned char buffer[FRAME_MAX + READ_MAX + 1];
static unsigned char frame[SOURCE_HEAD + SOURCE_FRAME] = {
	0x82, 127, 0, 0, 0, 0, 0, SOURCE_FRAME >> 16, 0, 0
};
static int epoll_fd, listen_fd;

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "backend: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void *copy(const void *p, size_t len)
{
	void *q = malloc(len + 1);

	if (!q)
		die("malloc");
	memcpy(q, p, len);
	return q;
}

static void client_watch(struct client *c, int op, unsigned events)
{
	struct epoll_event ev = { .events = events, .data.ptr = c };

	if (c->events == events)
		return;
	c->events = events;
	if (epoll_ctl(epoll_fd, op, c->fd, &ev) < 0)
		die("epoll_ctl");
}

static void client_close(struct client *c)
{
	close(c->fd);
	free(c->in);
	free(c->out);
	free(c);
}

static void client_accept(void)
{
	struct client *c;
	int fd, one = 1;

	while ((fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		c = calloc(1, sizeof *c);
		if (!c)
			die("calloc");
		c->fd = fd;
		client_watch(c, EPOLL_CTL_ADD, EPOLLIN);
	}
	/* epoll has the only pointer to a client, which the analyzer takes for a leak */
	if (errno != EAGAIN && errno != ECONNABORTED)   /* NOLINT(clang-analyzer-unix.Malloc) */
		die("accept");
}

/* Sends what there is; 0, or -1: the client is gone. */
static int client_send(struct client *c, const unsigned char *p, size_t len)
{
	ssize_t n = send(c->fd, p, len, MSG_NOSIGNAL);

	if (n < 0 && errno != EAGAIN)
		return -1;
	n = n < 0 ? 0 : n;
	if ((size_t)n < len) {
		c->out = copy(p + n, len - (size_t)n);
		c->out_at = 0;
		c->out_len = len - (size_t)n;
		client_watch(c, EPOLL_CTL_MOD, EPOLLOUT);
	}
	return 0;
}

static int client_send_rest(struct client *c)
{
	ssize_t n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);

	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	c->out_at += (size_t)n;
	if (c->out_at == c->out_len) {
		free(c->out);
		c->out = NULL;
		client_watch(c, EPOLL_CTL_MOD, EPOLLIN);
	}
	return 0;
}

static void unmask(unsigned char *to, const unsigned char *from, size_t n,
	const unsigned char *mask)
{
	uint32_t half;
	uint64_t m, word;
	size_t i;

	memcpy(&half, mask, 4);
	m = half | (uint64_t)half << 32;
	for (i = 0; i + 8 <= n; i += 8) {
		memcpy(&word, from + i, 8);
		word ^= m;
		memcpy(to + i, &word, 8);
	}
	for (; i < n; i++)
		to[i] = from[i] ^ mask[i % 4];
}

/* Takes the mask off each whole frame, in place: `*out` is at or before `*in`. */
static void frames_echo(const unsigned char **in, const unsigned char *end, unsigned char **out)
{
	unsigned char mask[4];
	size_t i, more, len, left;

	while ((left = (size_t)(end - *in)) >= 2) {
		const unsigned char *p = *in;

		len = p[1] & 127;
		more = len == 126 ? 2 : len == 127 ? 8 : 0;
		if (left < 2 + more + 4)
			return;
		for (len = more ? 0 : len, i = 0; i < more; i++)
			len = len << 8 | p[2 + i];
		if (len > FRAME_MAX - 14) {
			fprintf(stderr, "backend: too long a frame: %zu\n", len);
			exit(1);
		}
		if (left < 2 + more + 4 + len)
			return;
		memcpy(mask, p + 2 + more, 4);
		memmove(*out, p, 2 + more);
		(*out)[1] &= 127;
		unmask(*out + 2 + more, p + 2 + more + 4, len, mask);
		*in += 2 + more + 4 + len;
		*out += 2 + more + len;
	}
}

static int client_echo(struct client *c, size_t len)
{
	const unsigned char *in = buffer, *end = buffer + len;
	unsigned char *out = buffer;

	frames_echo(&in, end, &out);
	if (in < end) {
		c->in_len = (size_t)(end - in);
		c->in = copy(in, c->in_len);
	}
	return out > buffer ? client_send(c, buffer, (size_t)(out - buffer)) : 0;
}

static int client_source(struct client *c)
{
	int i;

	for (i = 0; i < SOURCE_ROUNDS; i++) {
		ssize_t n = send(c->fd, frame + c->out_at, sizeof frame - c->out_at, MSG_NOSIGNAL);

		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
		c->out_at = (c->out_at + (size_t)n) % sizeof frame;
	}
	return 0;
}

/* Answers a request for a page or a part of one. */
static int client_page(struct client *c, int page)
{
	static char text[4096 + PART_SIZE], body[PART_SIZE];
	size_t len = 0;
	int i, n;

	for (i = 0; i < PARTS && page; i++)
		len += (size_t)snprintf(body + len, sizeof body - len,
			"<script src=\"/part/%d\"></script>", i);
	if (!page) {
		memset(body, '/', len = sizeof body);
		memcpy(body, "document.title += '.'; ", 23);
	}
	n = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Type: text/%s\r\n"
		"Content-Length: %zu\r\n\r\n", page ? "html" : "javascript", len);
	memcpy(text + n, body, len);
	return client_send(c, (unsigned char *)text, (size_t)n + len);
}

/* Answers an upgrade whose head is the buffer's first `len` bytes, a zero behind them. */
static int client_upgrade(struct client *c, size_t len)
{
	static const char name[] = "\r\nsec-websocket-key:";
	static const char guid[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
	const char *head = (const char *)buffer, *key = strcasestr(head, name);
	unsigned char digest[SHA_DIGEST_LENGTH], accept[32];
	char text[256];
	int n;

	if (strncmp(head + len - 4, "\r\n\r\n", 4) != 0) {
		c->in = copy(buffer, len);
		c->in_len = len;
		return len < READ_MAX ? 0 : -1;
	}
	if (strncmp(head, "GET /pa", 7) == 0)
		return client_page(c, head[7] == 'g');
	if (!key)
		return -1;
	key += sizeof name - 1;
	key += strspn(key, " ");
	n = snprintf(text, sizeof text, "%.24s%s", key, guid);
	SHA1((unsigned char *)text, (size_t)n, digest);
	EVP_EncodeBlock(accept, digest, sizeof digest);
	n = snprintf(text, sizeof text, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
		"Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept);
	c->role = strncmp(head, "GET /sink", 9) == 0 ? SINK :
		strncmp(head, "GET /source", 11) == 0 ? SOURCE : ECHO;
	if (client_send(c, (unsigned char *)text, (size_t)n) < 0)
		return -1;
	if (c->role == SOURCE)
		client_watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
	return 0;
}

static int client_read(struct client *c)
{
	size_t kept = c->in_len;
	ssize_t n;

	if (c->role == SINK) {
		n = recv(c->fd, buffer, sizeof buffer, MSG_TRUNC);      /* the kernel drops it */
		return n > 0 || (n < 0 && errno == EAGAIN) ? 0 : -1;
	}
	if (c->in) {
		memcpy(buffer, c->in, kept);
		free(c->in);
		c->in = NULL;
		c->in_len = 0;
	}
	n = recv(c->fd, buffer + kept, READ_MAX, 0);
	if (n <= 0)
		return -1;
	kept += (size_t)n;
	buffer[kept] = 0;
	return c->role == REQUEST ? client_upgrade(c, kept) : client_echo(c, kept);
}

static int client_event(struct client *c, unsigned events)
{
	if (events & EPOLLIN)
		return client_read(c);
	if (c->role == SOURCE && !(events & (EPOLLHUP | EPOLLERR)))
		return client_source(c);
	return c->out ? client_send_rest(c) : -1;
}

static void start(void)
{
	struct sockaddr_in sa = { .sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = &listen_fd };
	socklen_t len = sizeof sa;
	struct rlimit files;

	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	memset(frame + SOURCE_HEAD, 'x', SOURCE_FRAME);
	listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (listen_fd < 0 || bind(listen_fd, (struct sockaddr *)&sa, sizeof sa) < 0 ||
	    listen(listen_fd, SOMAXCONN) < 0 ||
	    getsockname(listen_fd, (struct sockaddr *)&sa, &len) < 0)
		die("listen");
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listen_fd, &ev) < 0)
		die("epoll");
	ev.data.ptr = NULL;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &ev) < 0)
		die("standard input must be a pipe");
	printf("%u\n", ntohs(sa.sin_port));
	fflush(stdout);
}

int main(void)
{
	struct epoll_event events[256];
	int i, n;

	start();
	for (;;) {
		n = epoll_wait(epoll_fd, events, 256, -1);
		if (n < 0 && errno != EINTR)
			die("epoll_wait");
		for (i = 0; i < n; i++) {
			struct client *c = events[i].data.ptr;

			if (!c)
				return 0;
			if (events[i].data.ptr == &listen_fd)
				client_accept();
			else if (client_event(c, events[i].events) < 0)
				client_close(c);
		}
	}
}
