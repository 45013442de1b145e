/* fuzz.h - what the fuzz targets have in common. wssproxy.c is compiled into each, so that its static
 * functions can be called; libFuzzer calls LLVMFuzzerTestOneInput. A target looks for more than
 * crashes: MUST names what does not hold. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define main wssproxy_main
#include "../../wssproxy.c"
#undef main

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(condition) must((condition) ? 1 : 0, __FILE__, __LINE__, #condition)

static void must(int holds, const char *file, int line, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
	abort();
}

/* The input, taken from the front. */
struct input {
	const uint8_t *p;
	size_t len;
};

static unsigned input_byte(struct input *in)
{
	if (in->len == 0)
		return 0;
	in->len--;
	return *in->p++;
}

/* Up to `len` bytes; how many there are. */
static size_t input_bytes(struct input *in, size_t len, const uint8_t **p)
{
	len = len < in->len ? len : in->len;
	*p = in->p;
	in->p += len;
	in->len -= len;
	return len;
}

/* The rest in memory of its very size, so that one byte too many is seen. */
static char *input_rest(struct input *in, size_t *len)
{
	char *buf = malloc(in->len ? in->len : 1);

	*len = in->len;
	if (in->len)
		memcpy(buf, in->p, in->len);
	return buf;
}
