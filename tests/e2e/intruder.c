/* Preloaded: somebody who runs code in the process. Once the file named by INTRUDER is there, the next
 * call of getrandom (the first TLS handshake has one) or getaddrinfo (the resolver) makes the system call
 * that the file names instead, and if it comes back, says on stderr with what. With -DALONE: a program
 * that makes the call at once, to see what this kernel does of it where nobody forbids it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static char here[4096];

/* What the kernel takes for another machine: read(-1), whose number is that of close on x86-64. */
static long foreign(void)
{
#ifdef __x86_64__
	long result;

	__asm__ volatile ("int $0x80" : "=a" (result) : "a" (3L), "b" (-1L), "c" (0L), "d" (0L) : "memory");
	return result;
#else
	return 0;
#endif
}

#define OPEN(how) syscall(SYS_openat, AT_FDCWD, getenv("INTRUDER"), how, 0600)
#define CALLS(CALL) \
	CALL("execve", syscall(SYS_execve, "/bin/true", NULL, NULL)) \
	CALL("fork", syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL)) \
	CALL("fork-of-threads", syscall(SYS_clone, CLONE_VM | CLONE_THREAD | CLONE_SIGHAND, NULL, NULL, NULL, NULL)) \
	CALL("fork-and-share", syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL)) \
	CALL("fork-into-user", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL)) \
	CALL("fork-into-pids", syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, NULL, NULL, NULL, NULL)) \
	CALL("vfork", syscall(SYS_clone, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, NULL)) \
	CALL("clone3", syscall(SYS_clone3, NULL, 0)) \
	CALL("ptrace", syscall(SYS_ptrace, PTRACE_TRACEME, 0, NULL, NULL)) \
	CALL("kill", syscall(SYS_kill, getppid(), 0)) \
	CALL("tkill", syscall(SYS_tkill, getppid(), 0)) \
	CALL("tgkill", syscall(SYS_tgkill, getppid(), getppid(), 0)) \
	CALL("mmap", syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) \
	CALL("mprotect", syscall(SYS_mprotect, (long)here & -4096, 4096, PROT_READ | PROT_EXEC)) \
	CALL("open-to-write", OPEN(O_WRONLY)) \
	CALL("open-and-create", OPEN(O_RDONLY | O_CREAT)) \
	CALL("open-and-truncate", OPEN(O_RDONLY | O_TRUNC)) \
	CALL("open-to-read", OPEN(O_RDONLY) < 0) \
	CALL("unlink", syscall(SYS_unlinkat, AT_FDCWD, getenv("INTRUDER"), 0)) \
	CALL("netlink", syscall(SYS_socket, AF_NETLINK, SOCK_RAW, 0)) \
	CALL("packet", syscall(SYS_socket, AF_PACKET, SOCK_RAW, 0)) \
	CALL("udp", syscall(SYS_socket, AF_INET, SOCK_DGRAM, 0)) \
	CALL("sctp", syscall(SYS_socket, AF_INET, SOCK_STREAM, 132)) \
	CALL("unix", syscall(SYS_socket, AF_UNIX, SOCK_STREAM, 0)) \
	CALL("prlimit", syscall(SYS_prlimit64, getppid(), 0, NULL, NULL)) \
	CALL("io_uring", syscall(SYS_io_uring_setup, 0, NULL)) \
	CALL("raw", syscall(SYS_socket, AF_INET, SOCK_RAW, 1)) \
	CALL("bind", syscall(SYS_bind, -1, here, 16)) \
	CALL("listen", syscall(SYS_listen, -1, 1)) \
	CALL("sendmsg", syscall(SYS_sendmsg, -1, here, 0)) \
	CALL("setuid", syscall(SYS_setuid, 0)) \
	CALL("setgid", syscall(SYS_setgid, 0)) \
	CALL("setuid-other", syscall(SYS_setuid, 1)) \
	CALL("chroot", syscall(SYS_chroot, "/")) \
	CALL("sethostname", syscall(SYS_sethostname, "intruder", 8)) \
	CALL("foreign", foreign())

static void intrude(void)
{
	const char *name = getenv("INTRUDER");
	char call[32] = "", line[96];
	ssize_t len = -1;
	int fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
	long result;

	if (fd < 0)
		return;
	len = read(fd, call, sizeof call - 1);
	close(fd);
	errno = 0;
#define CALL(text, does) if (len > 0 && strcmp(call, text) == 0) result = does; else
	CALLS(CALL)
		return;
	len = snprintf(line, sizeof line, "intruder call=%s result=%ld errno=%s\n", call, result < 0 ? -1L : 0L,
		errno == EPERM ? "EPERM" : "other");
	if (write(STDERR_FILENO, line, (size_t)len) < 0)
		_exit(9);
}

#ifdef ALONE
int main(void)
{
	intrude();
	return 0;
}
#else
ssize_t getrandom(void *buf, size_t len, unsigned flags)
{
	intrude();
	return syscall(SYS_getrandom, buf, len, flags);
}

int getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list)
{
	(void)host, (void)port, (void)hints, (void)list;
	intrude();
	return EAI_FAIL;
}
#endif
