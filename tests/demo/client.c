/* client.c - one WebSocket conversation, spoken on standard input and output to whatever is
 * there: in the demo `openssl s_client`, which does the TLS. It tells on standard error what
 * happens and ends with 0 when all went as RFC 6455 says. See LICENSE for copyright. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

enum opcode { TEXT = 1, CLOSE = 8, PING, PONG };

/* RFC 6455 1.3 has this key and its answer. Another client takes 16 random bytes each time. */
static const char request[] =
	"GET /echo HTTP/1.1\r\n"
	"Host: localhost\r\n"
	"Connection: Upgrade\r\n"
	"Upgrade: websocket\r\n"
	"Sec-WebSocket-Version: 13\r\n"
	"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
	"\r\n";
static const char accept_line[] = "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";

__attribute__((format(printf, 1, 2)))
static _Noreturn void
fail(const char *format, ...)
{
	va_list args;

	fprintf(stderr, "  failed: ");
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, "\n");
	exit(1);
}

static void
put(const void *p, size_t n)
{
	if (fwrite(p, 1, n, stdout) != n || fflush(stdout) == EOF)
		fail("the connection is gone");
}

static int
get(void)
{
	int c = getchar();

	if (c == EOF)
		fail("the connection ended early");
	return c;
}

/* Sends a frame of at most 125 bytes, masked as a client must. */
static void
frame_put(enum opcode opcode, const char *payload, size_t n)
{
	static const unsigned char mask[4] = { 0x37, 0xfa, 0x21, 0x3d };
	unsigned char frame[6 + 125];
	size_t i;

	frame[0] = (unsigned char)(0x80 | opcode);
	frame[1] = (unsigned char)(0x80 | n);
	memcpy(frame + 2, mask, 4);
	for (i = 0; i < n; i++)
		frame[6 + i] = (unsigned char)payload[i] ^ mask[i % 4];
	put(frame, 6 + n);
}

/* The next frame must be this one. */
static void
frame_expect(enum opcode opcode, const char *payload, size_t n)
{
	size_t i, len;
	int first = get();

	if (first != (0x80 | (int)opcode))
		fail("a frame began with %02x where %02x was due", first, 0x80 | (unsigned)opcode);
	len = (size_t)get();
	if (len != n)
		fail("a frame of length %zu where %zu was due", len, n);
	for (i = 0; i < n; i++)
		if (get() != (unsigned char)payload[i])
			fail("byte %zu of a frame is another than was sent", i);
}

static void
handshake(void)
{
	char head[8192];
	size_t n = 0;

	fprintf(stderr, "  > GET /echo, Upgrade: websocket\n");
	put(request, strlen(request));
	do {
		if (n == sizeof head - 1)
			fail("the answer's head is too large");
		head[n++] = (char)get();
		head[n] = 0;
	} while (n < 4 || strcmp(head + n - 4, "\r\n\r\n") != 0);
	fprintf(stderr, "  < %.*s\n", (int)strcspn(head, "\r"), head);
	if (strncmp(head, "HTTP/1.1 101 ", 13) != 0)
		fail("the answer is no 101");
	if (!strcasestr(head, accept_line))
		fail("Sec-WebSocket-Accept is absent or wrong");
}

int
main(void)
{
	static const char hello[] = "Hello through wssproxy: \xc3\xa4\xc3\xb6\xc3\xbc \xe2\x82\xac";
	static const char normal[] = "\x03\xe8";        /* 1000 */
	struct timespec from, to;
	double ms;

	alarm(20);
	handshake();

	fprintf(stderr, "  > text \"%s\"\n", hello);
	clock_gettime(CLOCK_MONOTONIC, &from);
	frame_put(TEXT, hello, strlen(hello));
	frame_expect(TEXT, hello, strlen(hello));
	clock_gettime(CLOCK_MONOTONIC, &to);
	ms = (double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) / 1e6;
	fprintf(stderr, "  < the same, %.2f ms later\n", ms);

	frame_put(PING, "are you there", 13);
	frame_expect(PONG, "are you there", 13);
	fprintf(stderr, "  > ping, < pong\n");

	frame_put(CLOSE, normal, 2);
	frame_expect(CLOSE, normal, 2);
	if (getchar() != EOF)
		fail("bytes behind the last frame");
	fprintf(stderr, "  > close 1000, < close 1000, and the end of the connection\n");
	return 0;
}
