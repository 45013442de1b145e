/* backend.c - a WebSocket echo server (RFC 6455), and the page that talks to it: what stands behind
 * wssproxy in the demo and in measurements. See LICENSE for copyright.
 *
 *     backend [-a address] [-p port] [-v] [page.html]
 *
 * One epoll loop. An echo is made in place: the frame that goes back is four bytes shorter than the
 * one that came, as it has no mask, so the answer overwrites the request in the one buffer that all
 * clients share, and no message is ever collected, however long it is. What a client does not take
 * at once is kept for it, and it is not read again before that is gone.
 *
 * Of HTTP it knows GET and HEAD of "/", which is the page, one request a connection. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	HEAD_MAX = 8192,        /* bytes of a request head */
	READ_MAX = 65536,       /* bytes taken from a client at a time */
	CONTROL_MAX = 125,      /* payload of a control frame (RFC 6455 5.5) */
};

enum opcode { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG };

enum close_code { PROTOCOL_ERROR = 1002, BAD_TEXT = 1007 };

enum state {
	REQUEST,        /* the head of the HTTP request is not complete */
	OPEN,           /* frames */
	ENDING,         /* all is said; read to the end so that the last bytes are not lost by a reset */
};

struct client {
	int fd;
	enum state state;
	/* the message and the data frame that are under way */
	enum opcode message;    /* TEXT or BINARY; CONTINUATION: none */
	int fin;                /* the frame is the message's last */
	uint64_t left;          /* payload of the frame that has not come yet */
	unsigned char mask[4];  /* turned so that mask[0] is for the next byte */
	/* a character of a TEXT that is under way: bytes due, and the range of the next one */
	unsigned char due, low, high;
	/* input that makes no sense before more has come: a piece of a head, of a frame's header */
	unsigned char kept[HEAD_MAX];
	size_t nkept;
	/* output that the client did not take yet */
	char *out;
	size_t out_at, out_len;
};

static unsigned char buffer[HEAD_MAX + READ_MAX + 16];  /* what was kept, what came; a last frame */
static int epoll_fd, listen_fd;
static int verbose;
static char *page;
static size_t page_len;

static _Noreturn void
die(const char *what)
{
	fprintf(stderr, "backend: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* SHA-1 (RFC 3174) of a text of at most 119 bytes, two blocks with the padding. */

static uint32_t
rol(uint32_t x, int n)
{
	return x << n | x >> (32 - n);
}

static void
sha1_block(uint32_t h[5], const unsigned char *p)
{
	uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f, k, next;
	int i;

	for (i = 0; i < 16; i++, p += 4)
		w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
	for (; i < 80; i++)
		w[i] = rol(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
	for (i = 0; i < 80; i++) {
		if (i < 20)
			f = (b & c) | (~b & d), k = 0x5a827999;
		else if (i < 40)
			f = b ^ c ^ d, k = 0x6ed9eba1;
		else if (i < 60)
			f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
		else
			f = b ^ c ^ d, k = 0xca62c1d6;
		next = rol(a, 5) + f + e + k + w[i];
		e = d;
		d = c;
		c = rol(b, 30);
		b = a;
		a = next;
	}
	h[0] += a;
	h[1] += b;
	h[2] += c;
	h[3] += d;
	h[4] += e;
}

static void
sha1(const char *text, size_t len, unsigned char digest[20])
{
	uint32_t h[5] = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0 };
	unsigned char block[128] = { 0 };
	size_t size = len < 56 ? 64 : 128;
	int i;

	memcpy(block, text, len);
	block[len] = 0x80;
	block[size - 2] = (unsigned char)(len * 8 >> 8);
	block[size - 1] = (unsigned char)(len * 8);
	sha1_block(h, block);
	if (size == 128)
		sha1_block(h, block + 64);
	for (i = 0; i < 20; i++)
		digest[i] = (unsigned char)(h[i / 4] >> (24 - 8 * (i % 4)));
}

/* Sec-WebSocket-Accept for a key of 24 characters (RFC 6455 4.2.2). */
static void
accept_key(const char *key, char out[29])
{
	static const char digits[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	unsigned char digest[21] = { 0 };       /* 20 and a zero, to be read in threes */
	char text[64];
	uint32_t three;
	int i;

	snprintf(text, sizeof text, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
	sha1(text, strlen(text), digest);
	for (i = 0; i < 28; i += 4) {
		const unsigned char *d = digest + i / 4 * 3;

		three = (uint32_t)d[0] << 16 | (uint32_t)d[1] << 8 | d[2];
		out[i] = digits[three >> 18];
		out[i + 1] = digits[three >> 12 & 63];
		out[i + 2] = digits[three >> 6 & 63];
		out[i + 3] = digits[three & 63];
	}
	out[27] = '=';
	out[28] = 0;
}

/* Clients: what epoll shall tell of one follows from its state. */

static void
client_watch(struct client *c, int op)
{
	struct epoll_event ev = { .events = c->out ? EPOLLOUT : EPOLLIN, .data.ptr = c };

	if (epoll_ctl(epoll_fd, op, c->fd, &ev) < 0)
		die("epoll_ctl");
}

static void
listener_watch(int on)
{
	static int now = 1;
	struct epoll_event ev = { .events = on ? EPOLLIN : 0, .data.ptr = NULL };

	if (on != now && epoll_ctl(epoll_fd, EPOLL_CTL_MOD, listen_fd, &ev) < 0)
		die("epoll_ctl");
	now = on;
}

static void
clients_accept(void)
{
	struct client *c;
	int fd, one = 1;

	while ((fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		c = calloc(1, sizeof *c);
		if (!c)
			die("out of memory");
		c->fd = fd;
		client_watch(c, EPOLL_CTL_ADD);
	}
	/* No descriptor is left: wait until a client goes, see client_close.
	 * (epoll has the only pointer to a client, which the analyzer takes for a leak.) */
	if (errno == EMFILE || errno == ENFILE)         /* NOLINT(clang-analyzer-unix.Malloc) */
		listener_watch(0);
}

static void
client_close(struct client *c)
{
	close(c->fd);
	free(c->out);
	free(c);
	listener_watch(1);
}

/* Writes what is due and says whether all went. */
static int
client_flush(struct client *c, const char *p, size_t len, size_t *sent)
{
	ssize_t n;

	for (*sent = 0; *sent < len; *sent += (size_t)n) {
		n = send(c->fd, p + *sent, len - *sent, MSG_NOSIGNAL);
		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
	}
	if (c->state == ENDING)
		shutdown(c->fd, SHUT_WR);
	return 1;
}

/* Sends, and keeps what does not go. 0, or -1: the client is gone. */
static int
client_send(struct client *c, const void *p, size_t len)
{
	size_t sent = 0;
	int r = c->out ? 0 : client_flush(c, p, len, &sent);
	char *out;

	if (r)
		return r < 0 ? -1 : 0;
	out = realloc(c->out, c->out_len + len - sent);
	if (!out)
		die("out of memory");
	memcpy(out + c->out_len, (const char *)p + sent, len - sent);
	c->out = out;
	c->out_len += len - sent;
	client_watch(c, EPOLL_CTL_MOD);
	return 0;
}

static int
client_send_kept(struct client *c)
{
	size_t sent;
	int r = client_flush(c, c->out + c->out_at, c->out_len - c->out_at, &sent);

	c->out_at += sent;
	if (r <= 0)
		return r;
	free(c->out);
	c->out = NULL;
	c->out_at = c->out_len = 0;
	client_watch(c, EPOLL_CTL_MOD);
	return 0;
}

/* Frames. */

/* Takes the mask off n bytes; `to` is before or at `from`, and they may overlap. */
static void
unmask(unsigned char *to, const unsigned char *from, size_t n, unsigned char mask[4])
{
	unsigned char turned[4];
	uint64_t m, word;
	size_t i, j;

	memcpy(&m, mask, 4);
	memcpy((unsigned char *)&m + 4, mask, 4);
	for (i = 0; i + 8 <= n; i += 8) {
		memcpy(&word, from + i, 8);
		word ^= m;
		memcpy(to + i, &word, 8);
	}
	for (; i < n; i++)
		to[i] = from[i] ^ mask[i % 4];
	for (j = 0; j < 4; j++)
		turned[j] = mask[(n + j) % 4];
	memcpy(mask, turned, 4);
}

/* A lead byte of UTF-8 beyond ASCII (RFC 3629 4): how many follow, and the range of the first. */
static int
text_lead(struct client *c, unsigned char b)
{
	c->low = 0x80;
	c->high = 0xbf;
	if (b >= 0xc2 && b <= 0xdf) {
		c->due = 1;
	} else if (b >= 0xe0 && b <= 0xef) {
		c->due = 2;
		if (b == 0xe0)
			c->low = 0xa0;
		if (b == 0xed)
			c->high = 0x9f;
	} else if (b >= 0xf0 && b <= 0xf4) {
		c->due = 3;
		if (b == 0xf0)
			c->low = 0x90;
		if (b == 0xf4)
			c->high = 0x8f;
	} else {
		return 0;
	}
	return 1;
}

/* Whether n more bytes of a text are UTF-8. */
static int
text_check(struct client *c, const unsigned char *p, size_t n)
{
	uint64_t word;
	size_t i = 0;

	while (i < n) {
		if (c->due) {
			if (p[i] < c->low || p[i] > c->high)
				return 0;
			c->low = 0x80;
			c->high = 0xbf;
			c->due--;
			i++;
			continue;
		}
		for (; i + 8 <= n; i += 8) {    /* most of it is ASCII */
			memcpy(&word, p + i, 8);
			if (word & 0x8080808080808080)
				break;
		}
		for (; i < n && p[i] < 0x80; i++)
			;
		if (i < n && !text_lead(c, p[i++]))
			return 0;
	}
	return 1;
}

struct header {
	int fin, opcode;
	size_t size;            /* of the header, mask included */
	uint64_t len;           /* of the payload */
	const unsigned char *mask;
};

/* Reads a frame's header (RFC 6455 5.2). 1, 0: more bytes are needed, -1: it breaks the rules. */
static int
header_parse(struct header *h, const unsigned char *p, size_t n)
{
	unsigned i, more;

	if (n < 2)
		return 0;
	h->fin = p[0] >> 7;
	h->opcode = p[0] & 15;
	h->len = p[1] & 127;
	if (p[0] & 0x70 || !(p[1] & 0x80))
		return -1;              /* no extension was agreed; a client must mask */
	if ((h->opcode > BINARY && h->opcode < CLOSE) || h->opcode > PONG)
		return -1;
	if (h->opcode >= CLOSE && (!h->fin || h->len > CONTROL_MAX))
		return -1;
	more = h->len == 126 ? 2 : h->len == 127 ? 8 : 0;
	h->size = 2 + more + 4;
	if (n < h->size)
		return 0;
	if (more)
		for (h->len = 0, i = 0; i < more; i++)
			h->len = h->len << 8 | p[2 + i];
	h->mask = p + 2 + more;
	return h->len >> 63 ? -1 : 1;
}

static size_t
header_write(unsigned char *out, int fin, int opcode, uint64_t len)
{
	unsigned i, more = len < 126 ? 0 : len < 65536 ? 2 : 8;

	out[0] = (unsigned char)(fin << 7 | opcode);
	out[1] = (unsigned char)(more == 0 ? len : more == 2 ? 126 : 127);
	for (i = 0; i < more; i++)
		out[2 + i] = (unsigned char)(len >> 8 * (more - 1 - i));
	return 2 + more;
}

/* Frames are answered in place: `out` is before or at `in`, but for the very last frame. */
struct flow {
	const unsigned char *in, *end;
	unsigned char *out;
};

/* What a step of it returns; anything else is the code that the connection has to be closed with. */
enum { MORE, GO };

/* Our last frame. */
static void
close_write(struct client *c, struct flow *f, int code)
{
	c->state = ENDING;
	f->out += header_write(f->out, 1, CLOSE, code ? 2 : 0);
	if (code) {
		*f->out++ = (unsigned char)(code >> 8);
		*f->out++ = (unsigned char)code;
	}
}

/* A Close is answered by its own code (RFC 6455 7.4), when it may have one like that. */
static int
close_answer(struct client *c, struct flow *f, const unsigned char *payload, size_t len)
{
	int code = 0;

	if (len > 0) {
		code = len > 1 ? payload[0] << 8 | payload[1] : 0;
		if (code < 1000 || code > 4999 || (code >= 1004 && code <= 1006) ||
		    (code >= 1015 && code < 3000))
			return PROTOCOL_ERROR;
		c->due = 0;
		if (!text_check(c, payload + 2, len - 2) || c->due)
			return BAD_TEXT;
	}
	close_write(c, f, code);
	return GO;
}

static int
control_answer(struct client *c, struct flow *f, const struct header *h)
{
	unsigned char payload[CONTROL_MAX], mask[4];
	size_t len = (size_t)h->len;

	if ((size_t)(f->end - f->in) < h->size + len)
		return MORE;
	memcpy(mask, h->mask, 4);
	unmask(payload, f->in + h->size, len, mask);
	f->in += h->size + len;
	if (h->opcode == CLOSE)
		return close_answer(c, f, payload, len);
	if (h->opcode == PING) {
		f->out += header_write(f->out, 1, PONG, len);
		memcpy(f->out, payload, len);
		f->out += len;
	}
	return GO;
}

static int
frame_end(struct client *c)
{
	if (c->fin && c->message == TEXT && c->due)
		return BAD_TEXT;
	if (c->fin)
		c->message = CONTINUATION;
	return GO;
}

static int
frame_start(struct client *c, struct flow *f)
{
	struct header h;
	int r = header_parse(&h, f->in, (size_t)(f->end - f->in));

	if (r <= 0)
		return r < 0 ? PROTOCOL_ERROR : MORE;
	if (h.opcode >= CLOSE)
		return control_answer(c, f, &h);
	if ((h.opcode == CONTINUATION) != (c->message != CONTINUATION))
		return PROTOCOL_ERROR;
	if (h.opcode != CONTINUATION) {
		c->message = (enum opcode)h.opcode;
		c->due = 0;
	}
	c->fin = h.fin;
	c->left = h.len;
	memcpy(c->mask, h.mask, 4);
	f->in += h.size;
	f->out += header_write(f->out, h.fin, h.opcode, h.len);
	return c->left ? GO : frame_end(c);
}

static int
payload_echo(struct client *c, struct flow *f)
{
	size_t n = (size_t)(f->end - f->in);

	if (n == 0)
		return MORE;
	if (n > c->left)
		n = (size_t)c->left;
	unmask(f->out, f->in, n, c->mask);
	if (c->message == TEXT && !text_check(c, f->out, n))
		return BAD_TEXT;
	f->in += n;
	f->out += n;
	c->left -= n;
	return c->left ? GO : frame_end(c);
}

/* Turns n bytes of frames in the buffer into the answers to them. Returns how many bytes these
 * are, and keeps what can't be judged yet. */
static size_t
frames_answer(struct client *c, unsigned char *buf, size_t n)
{
	struct flow f = { buf, buf + n, buf };
	int r;

	while (c->state == OPEN) {
		r = c->left ? payload_echo(c, &f) : frame_start(c, &f);
		if (r == MORE)
			break;
		if (r == GO)
			continue;
		if (c->left)            /* in the middle of a frame there is no place for a Close */
			c->state = ENDING;
		else
			close_write(c, &f, r);
	}
	c->nkept = (size_t)(f.end - f.in);
	if (c->state == OPEN)
		memcpy(c->kept, f.in, c->nkept);
	return (size_t)(f.out - buf);
}

/* HTTP. */

/* The value of a header field, the white space before it left out; "" when there is none. `head`
 * is a whole request head and a NUL. */
static const char *
field(const char *head, const char *name)
{
	size_t len = strlen(name);
	const char *line;

	for (line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
		if (strncasecmp(line + 2, name, len) == 0 && line[2 + len] == ':') {
			line += 3 + len;
			return line + strspn(line, " \t");
		}
	return "";
}

/* Whether a comma-separated list, up to the end of the line, has that token, in any case. */
static int
has_token(const char *list, const char *token)
{
	size_t n;

	for (; *list && *list != '\r'; list += strcspn(list, ",\r"), list += *list == ',') {
		list += strspn(list, " \t");
		n = strcspn(list, ", \t\r");
		if (n == strlen(token) && strncasecmp(list, token, n) == 0)
			return 1;
	}
	return 0;
}

static int
reply(struct client *c, const char *status, const char *extra, const char *body, size_t len, int send_body)
{
	char head[512];
	int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Type: text/%s; charset=utf-8\r\n"
		"Content-Length: %zu\r\n%sConnection: close\r\n\r\n",
		status, body == page ? "html" : "plain", len, extra);
	char *whole = malloc((size_t)n + len);
	int r;

	if (!whole)
		die("out of memory");
	memcpy(whole, head, (size_t)n);
	memcpy(whole + n, body, len);
	c->state = ENDING;
	r = client_send(c, whole, (size_t)n + (send_body ? len : 0));
	free(whole);
	return r;
}

static int
refuse(struct client *c, const char *status, const char *extra)
{
	return reply(c, status, extra, status, strlen(status), 1);
}

static int
upgrade(struct client *c, const char *head)
{
	const char *key = field(head, "Sec-WebSocket-Key");
	char accept[29], answer[256];
	int n;

	if (!has_token(field(head, "Sec-WebSocket-Version"), "13"))
		return refuse(c, "426 Upgrade Required", "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n");
	if (strcspn(key, " \t\r") != 24)
		return refuse(c, "400 Bad Request", "");
	accept_key(key, accept);
	n = snprintf(answer, sizeof answer, "HTTP/1.1 101 Switching Protocols\r\n"
		"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept);
	c->state = OPEN;
	return client_send(c, answer, (size_t)n);
}

/* Answers a whole request head. 0, or -1: the client is gone. */
static int
request_answer(struct client *c, const char *head)
{
	int get = strncmp(head, "GET ", 4) == 0, is_head = strncmp(head, "HEAD ", 5) == 0;
	const char *target = head + strcspn(head, " ");
	const char *from = field(head, "X-Forwarded-For"), *host = field(head, "Host");

	if (verbose)
		printf("backend: %.*s; Host %.*s, X-Forwarded-For %.*s\n",
			(int)strcspn(head, "\r"), head, (int)strcspn(host, "\r"), host,
			*from ? (int)strcspn(from, "\r") : 4, *from ? from : "none");
	if (!get && !is_head)
		return refuse(c, "405 Method Not Allowed", "Allow: GET, HEAD\r\n");
	if (get && has_token(field(head, "Upgrade"), "websocket") &&
	    has_token(field(head, "Connection"), "upgrade"))
		return upgrade(c, head);
	if (!page || strncmp(target, " /", 2) != 0 || !strchr(" ?", target[2]))
		return refuse(c, "404 Not Found", "");
	return reply(c, "200 OK", "Cache-Control: no-cache\r\n", page, page_len, get);
}

/* n bytes of `buf`, and a NUL behind them, begin with a request. */
static int
request_read(struct client *c, char *buf, size_t n)
{
	char *end = memmem(buf, n, "\r\n\r\n", 4);

	if (!end) {
		if (n >= HEAD_MAX)
			return refuse(c, "431 Request Header Fields Too Large", "");
		memcpy(c->kept, buf, n);
		c->nkept = n;
		return 0;
	}
	end += 2;
	*end = 0;
	if (request_answer(c, buf) < 0)
		return -1;
	end += 2;
	if (c->state != OPEN)
		return 0;
	n = frames_answer(c, (unsigned char *)end, n - (size_t)(end - buf));
	return n ? client_send(c, end, n) : 0;
}

/* Reads once, answers what can be answered. 0, or -1: the client is gone. */
static int
client_read(struct client *c)
{
	size_t kept = c->nkept;
	ssize_t r;
	size_t n;

	memcpy(buffer, c->kept, kept);
	r = recv(c->fd, buffer + kept, READ_MAX, 0);
	if (r <= 0)
		return r < 0 && errno == EAGAIN ? 0 : -1;
	c->nkept = 0;
	n = kept + (size_t)r;
	switch (c->state) {
	case REQUEST:
		buffer[n] = 0;
		return request_read(c, (char *)buffer, n);
	case OPEN:
		n = frames_answer(c, buffer, n);
		return n || c->state == ENDING ? client_send(c, buffer, n) : 0;
	case ENDING:
		break;
	}
	return 0;
}

/* Start. */

static void
page_read(const char *path)
{
	FILE *f = fopen(path, "rb");
	long size = 0;

	if (!f || fseek(f, 0, SEEK_END) < 0 || (size = ftell(f)) < 0)
		die(path);
	rewind(f);
	page_len = (size_t)size;
	page = malloc(page_len + 1);
	if (!page || fread(page, 1, page_len, f) != page_len)
		die(path);
	fclose(f);
}

static void
listener_open(const char *address, const char *port)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_PASSIVE, .ai_socktype = SOCK_STREAM };
	struct addrinfo *ai;
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = NULL };
	struct sockaddr_storage ss;
	socklen_t len = sizeof ss;
	char name[64], service[16];
	int r, one = 1;

	r = getaddrinfo(address, port, &hints, &ai);
	if (r) {
		fprintf(stderr, "backend: %s port %s: %s\n", address, port, gai_strerror(r));
		exit(1);
	}
	listen_fd = socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (listen_fd < 0)
		die("socket");
	setsockopt(listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listen_fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(listen_fd, SOMAXCONN) < 0)
		die(port);
	freeaddrinfo(ai);
	if (getsockname(listen_fd, (struct sockaddr *)&ss, &len) < 0 ||
	    getnameinfo((struct sockaddr *)&ss, len, name, sizeof name, service, sizeof service,
	    NI_NUMERICHOST | NI_NUMERICSERV))
		die("getsockname");
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listen_fd, &ev) < 0)
		die("epoll");
	printf("listen address=%s port=%s\n", name, service);
}

static void
arguments(int argc, char **argv)
{
	const char *address = "127.0.0.1", *port = "0";
	int opt;

	while ((opt = getopt(argc, argv, "a:p:v")) != -1)
		switch (opt) {
		case 'a':
			address = optarg;
			break;
		case 'p':
			port = optarg;
			break;
		case 'v':
			verbose = 1;
			break;
		default:
			fprintf(stderr, "usage: backend [-a address] [-p port] [-v] [page.html]\n");
			exit(2);
		}
	if (optind < argc)
		page_read(argv[optind]);
	listener_open(address, port);
}

int
main(int argc, char **argv)
{
	struct epoll_event events[256];
	struct rlimit files;
	struct client *c;
	int i, n;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	arguments(argc, argv);
	for (;;) {
		n = epoll_wait(epoll_fd, events, 256, -1);
		if (n < 0 && errno != EINTR)
			die("epoll_wait");
		for (i = 0; i < n; i++) {
			c = events[i].data.ptr;
			if (!c)
				clients_accept();
			else if ((c->out ? client_send_kept(c) : client_read(c)) < 0)
				client_close(c);
		}
	}
}
