/* unit.h - what the unit tests are written in: checks that count and name what differs, and memory
 * that ends at a page which can't be touched, so that reading or writing one byte too many crashes. */

#include <ctype.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct test {
	const char *name;
	void (*run)(void);
};

#define SHOWN_MAX 20            /* failures of one test that are printed */

static unsigned failures;       /* of the running test */
static char context[1200];      /* what it is at, printed with each failure, */
static char detail[80];         /* and the inner loop's part of that */

/* ---- checks ---- */

#define CHECK(condition) \
	check_true(__FILE__, __LINE__, #condition, (condition) ? 1 : 0)
#define CHECK_INT(got, want) \
	check_int(__FILE__, __LINE__, #got, (intmax_t)(got), (intmax_t)(want))
#define CHECK_STR(got, want) \
	check_str(__FILE__, __LINE__, #got, (got), (want))
#define CHECK_BYTES(got, len, ...) /* want, want_len */ \
	check_bytes(__FILE__, __LINE__, #got, (got), (len), __VA_ARGS__)

static int shown(const char *file, int line)
{
	failures++;
	if (failures == SHOWN_MAX + 1)
		printf("\t... more failures of this test are not shown\n");
	if (failures > SHOWN_MAX)
		return 0;
	printf("%s:%d: ", file, line);
	return 1;
}

static void print_escaped(const char *s, size_t len)
{
	size_t i;

	putchar('"');
	for (i = 0; i < len && i < 400; i++) {
		unsigned char c = (unsigned char)s[i];

		if (c == '\r')
			fputs("\\r", stdout);
		else if (c == '\n')
			fputs("\\n", stdout);
		else if (c == '"' || c == '\\')
			printf("\\%c", c);
		else if (c < 0x20 || c > 0x7e)
			printf("\\x%02x", c);
		else
			putchar(c);
	}
	printf(i < len ? "\"... (%zu bytes)" : "\"", len);
}

static void print_context(void)
{
	if (context[0] != '\0')
		printf("\tat %s\n", context);
	if (detail[0] != '\0')
		printf("\twith %s\n", detail);
}

static void check_true(const char *file, int line, const char *what, int ok)
{
	if (ok || !shown(file, line))
		return;
	printf("%s: does not hold\n", what);
	print_context();
}

static void check_int(const char *file, int line, const char *what, intmax_t got, intmax_t want)
{
	if (got == want || !shown(file, line))
		return;
	printf("%s: expected %jd, got %jd\n", what, want, got);
	print_context();
}

static void check_bytes(const char *file, int line, const char *what, const char *got, size_t len,
	const char *want, size_t want_len)
{
	if (len == want_len && (len == 0 || memcmp(got, want, len) == 0))
		return;
	if (!shown(file, line))
		return;
	printf("%s:\n\texpected ", what);
	print_escaped(want, want_len);
	printf("\n\tgot      ");
	print_escaped(got, len);
	putchar('\n');
	print_context();
}

static void check_str(const char *file, int line, const char *what, const char *got, const char *want)
{
	check_bytes(file, line, what, got, strlen(got), want, strlen(want));
}

__attribute__((format(printf, 1, 2)))
static void at(const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	vsnprintf(context, sizeof context, format, ap);
	va_end(ap);
	detail[0] = '\0';
}

__attribute__((format(printf, 1, 2)))
static void with(const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	vsnprintf(detail, sizeof detail, format, ap);
	va_end(ap);
}

/* A table's input as context: printable, cut to what is worth reading. */
static void at_input(int line, const char *in, size_t len)
{
	size_t n, i;

	n = (size_t)snprintf(context, sizeof context, "line %d: ", line);
	detail[0] = '\0';
	for (i = 0; i < len && n < sizeof context - 8; i++) {
		unsigned char c = (unsigned char)in[i];

		if (c == '\r' || c == '\n')
			n += (size_t)sprintf(context + n, c == '\r' ? "\\r" : "\\n");
		else if (c < 0x20 || c > 0x7e)
			n += (size_t)sprintf(context + n, "\\x%02x", c);
		else
			context[n++] = (char)c;
	}
	context[n] = '\0';
}

/* ---- memory before a guard page ---- */

#define GUARD_SIZE 65536        /* room before the page */

struct guard {
	char *end;                  /* the first byte that can't be touched */
};

static void guard_open(struct guard *g)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	char *p = mmap(NULL, GUARD_SIZE + page, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED || mprotect(p + GUARD_SIZE, page, PROT_NONE) < 0) {
		perror("guard page");
		exit(2);
	}
	g->end = p + GUARD_SIZE;
}

/* The last `len` bytes before the page, filled with a byte that no test expects. */
static char *guard_room(struct guard *g, size_t len)
{
	if (g->end == NULL)
		guard_open(g);
	memset(g->end - len, 0xdb, len);
	return g->end - len;
}

/* A copy that ends at the page; what an earlier, longer copy left before it is wiped. */
static char *guard_copy(struct guard *g, const void *data, size_t len)
{
	size_t before = len + 256 < GUARD_SIZE ? 256 : GUARD_SIZE - len;

	guard_room(g, len + before);
	if (len != 0)
		memcpy(g->end - len, data, len);
	return g->end - len;
}

/* ---- numbers that are the same in each run ---- */

static uint64_t random_state = 1;

static uint64_t random_next(void)
{
	uint64_t z = random_state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

static unsigned random_below(unsigned n)
{
	return (unsigned)(random_next() % n);
}

/* ---- running ---- */

#define TEST_SECONDS 120

static int test_passes(const struct test *t)
{
	failures = 0;
	context[0] = detail[0] = '\0';
	random_state = 1;
	t->run();
	return failures == 0;
}

/* In a child, so that a crash, an endless loop or an exit is one failed test and no more. */
static int test_isolated(const struct test *t)
{
	pid_t pid;
	int status;

	fflush(NULL);
	pid = fork();
	if (pid < 0) {
		perror("fork");
		exit(2);
	}
	if (pid == 0) {
		alarm(TEST_SECONDS);
		exit(test_passes(t) ? 0 : 1);
	}
	if (waitpid(pid, &status, 0) != pid) {
		perror("waitpid");
		exit(2);
	}
	if (WIFSIGNALED(status))
		printf("%s: ended by signal %d%s\n", t->name, WTERMSIG(status),
			WTERMSIG(status) == SIGALRM ? " (took too long)" : "");
	else if (WEXITSTATUS(status) > 1)
		printf("%s: ended with status %d\n", t->name, WEXITSTATUS(status));
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
