/* lacking.c - runs a program as on a kernel that lacks things. See LICENSE for copyright.
 *
 *     lacking THING... -- PROGRAM [ARGUMENT...]
 *
 * Things are epoll, getrandom (ENOSYS), entropy (getrandom has nothing yet for who asks for one
 * byte without waiting: EAGAIN), user-timeout (ENOPROTOOPT), ipv6 (EAFNOSUPPORT), accept4, prctl (ENOSYS). */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARG(n)  (offsetof(struct seccomp_data, args) + 8 * (n))         /* little endian: its low half */

/* A call fails with this error; if arg[] is not -1, only with that value of that argument. */
static const struct rule {
	const char *thing;
	long call;
	int error;
	int at[2];
	unsigned value[2];
} rules[] = {
	{ "epoll", SYS_epoll_create1, ENOSYS, { -1, -1 }, { 0, 0 } },
#ifdef SYS_epoll_create
	{ "epoll", SYS_epoll_create, ENOSYS, { -1, -1 }, { 0, 0 } },
#endif
	{ "getrandom", SYS_getrandom, ENOSYS, { -1, -1 }, { 0, 0 } },
	{ "entropy", SYS_getrandom, EAGAIN, { 1, 2 }, { 1, GRND_NONBLOCK } },
	{ "user-timeout", SYS_setsockopt, ENOPROTOOPT, { 1, 2 }, { IPPROTO_TCP, TCP_USER_TIMEOUT } },
	{ "ipv6", SYS_socket, EAFNOSUPPORT, { 0, -1 }, { AF_INET6, 0 } },
	{ "accept4", SYS_accept4, ENOSYS, { -1, -1 }, { 0, 0 } },
	{ "prctl", SYS_prctl, ENOSYS, { -1, -1 }, { 0, 0 } },
};

static struct sock_filter code[128];
static unsigned short len;

static void add(unsigned op, unsigned k, unsigned jt, unsigned jf)
{
	code[len++] = (struct sock_filter)BPF_JUMP(op, k, jt, jf);
}

static void rule_add(const struct rule *r)
{
	unsigned tests = 1 + (unsigned)(r->at[0] >= 0) + (unsigned)(r->at[1] >= 0), i;

	/* each test is a load and a jump; the last of the rule is the return */
	add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
	add(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)r->call, 0, 2 * (tests - 1) + 1);
	for (i = 0; i + 1 < tests; i++) {
		add(BPF_LD | BPF_W | BPF_ABS, (unsigned)ARG((unsigned)r->at[i]), 0, 0);
		add(BPF_JMP | BPF_JEQ | BPF_K, r->value[i], 0, 2 * (tests - 2 - i) + 1);
	}
	add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)r->error, 0, 0);
}

int main(int argc, char *argv[])
{
	struct sock_fprog program = { .filter = code };
	unsigned j, known;
	int i;

	for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
		for (j = known = 0; j < sizeof rules / sizeof rules[0]; j++)
			if (strcmp(argv[i], rules[j].thing) == 0) {
				rule_add(&rules[j]);
				known = 1;
			}
		if (!known) {
			fprintf(stderr, "lacking: %s: not known\n", argv[i]);
			return 2;
		}
	}
	if (i + 1 >= argc) {
		fputs("usage: lacking THING... -- PROGRAM [ARGUMENT...]\n", stderr);
		return 2;
	}
	add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	program.len = len;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) < 0) {
		perror("lacking: seccomp");
		return 2;
	}
	execv(argv[i + 1], argv + i + 1);
	perror(argv[i + 1]);
	return 2;
}
