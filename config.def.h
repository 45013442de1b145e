/* config.h - the configuration of wssproxy; made from config.def.h by make. Edit it, make again.
 * wssproxy -t checks what the compiler can't: addresses, files, keys. Times are in milliseconds
 * where the name ends in _ms, in seconds where it ends in _s. */

/* Of which config.def.h this is. Another one has other entries: `diff config.h config.def.h` shows
 * them; give config.h those, then its number. */
#define config_version  2

/* Where clients connect. The table costs a descriptor and a poll slot an entry. */
static const struct listener listeners[] = {
	/* address      port    kind: WSS (TLS), WS (clear), REDIRECT (308 to https) */
	{ "::",         "443",  WSS },                  /* "::" takes IPv4 as well */
	/* One that is REDIRECT passes on to a backend with .path = "/.well-known/acme-challenge/"
	 * what a certificate authority asks for there (ACME, HTTP-01), whatever http says.
	 * More of one that is WSS: .client_ca, in place of the entry below; .verify_client,
	 * VERIFY_REQUIRED (which client_ca means), VERIFY_OPTIONAL (who shows no certificate is
	 * served, who shows a bad one is not) or VERIFY_OFF. */
};

/* The port that a REDIRECT listener sends clients to, when NAT or a container shows another one
 * than listeners[] has, such as "443"; NULL: that of the first WSS listener. */
static const char *const redirect_port = NULL;

/* What the proxy shows to clients: a chain in file order and its key, PEM. EC keys (P-256) are
 * what a small device wants: one RSA-2048 signature costs 5, RSA-4096 40 times a P-256 one. */
static const struct cert certs[] = {
	/* server name  chain                           key */
	{ NULL,         "/etc/wssproxy/cert.pem",       "/etc/wssproxy/key.pem" },
};

/* Where requests go. All that can be said of one:
 *   .host, .port    name, IPv4 or IPv6; or "unix:/path" and no port. Names are resolved in the
 *                   background: one that does not resolve is a backend that is down; of one that
 *                   has several addresses, up to 8 serve in turn
 *   .name           only requests for this Host ("a.example"), or those below it ("*.example":
 *                   a.example, a.b.example, not example), whatever the port; the longest that
 *                   fits wins, before those without (NULL: any)
 *   .path           of these, only requests under this path ("/chat": /chat, /chat/x, not
 *                   /chatty); the longest that fits wins
 *   .weight         share of the load, 1 to 256 (0 means 1)
 *   .backup         1: serves when no other can
 *   .max_conns      sessions at a time, 0: no limit
 *   .host_header    the Host that it gets, for servers that know themselves by another name than
 *                   clients do; they find the one asked for in X-Forwarded-Host. NULL: as asked
 *   .proxy          1: connections begin with the PROXY protocol's header, version 2, which tells
 *                   the client's address and the one that it came to; the server must expect it
 *   .tls            TLS_OFF, TLS_VERIFY, TLS_PIN, TLS_NOVERIFY
 *   .sni            name to send and to verify, NULL: host
 *   .ca             PEM: trust anchors (TLS_VERIFY; 256 in all, a file that several name counts
 *                   once), the one certificate to accept (TLS_PIN)
 *   .cert, .key     PEM: client certificate chain and key */
static const struct backend backends[] = {
	{ .host = "127.0.0.1", .port = "3000" },
};

/* 1: some of them have .tls. 0 leaves the TLS client out: 15 to 30 KB of program, 4 KB for each
 * of max_sessions, 50 KB for each of max_busy. */
#define tls_backends    0

/* 1: the host of some of them is a name. 0 leaves the resolver out: 25 to 45 KB of a static
 * program, and the process that waits for the name servers. */
#define resolve_names   0

/* 1: SIGUSR2 makes way for the program that is started next: the process ends, a copy of it lets
 * its sessions end over drain_ms, and nobody who comes is refused. 0 leaves that out: 1.5 KB of
 * program. It costs a descriptor and a poll slot for each listener; while there is a copy, twice
 * the memory. */
#define make_way        0

/* How a backend is chosen: ROUND_ROBIN, IP_HASH, LEAST_CONN, STICKY_COOKIE. */
static const enum balance balance = ROUND_ROBIN;

/* Leading bits of the client's address that IP_HASH looks at: 1 to 32, 1 to 128. (nginx: 24, 128.
 * An IPv6 client has a whole /64 to choose from, so more than 64 spreads one client.) */
static const unsigned hash_bits4 = 32;
static const unsigned hash_bits6 = 64;

/* STICKY_COOKIE: the cookie's name, and any text that keeps outsiders from computing which address
 * a cookie stands for. */
static const char cookie_name[] = "wssproxy";
static const char cookie_secret[] = "";

/* TLS versions and cipher suites for clients, best first; BR_TLS10 to BR_TLS12 (BearSSL has no
 * TLS 1.3). Versions below 1.2 need CBC suites in the list; 1.2 alone links no CBC code.
 * With ciphers_by_cpu the ChaCha20 suites move to the front where the CPU has no AES
 * instructions (constant-time AES in software is 4 to 8 times slower), to the back elsewhere. */
static const unsigned tls_min = BR_TLS12;
static const unsigned tls_max = BR_TLS12;
static const int ciphers_by_cpu = 1;
static const uint16_t ciphers[] = {
	BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
};

/* Sessions that can be resumed: 100 bytes each, 0: off. A resumed handshake costs a seventh of a
 * full one, so after a flap of the uplink all that there can be should come back by one. */
#define session_cache   max_sessions

/* Bytes of the largest record that clients are sent, 512 to 16384; BearSSL knows 512, 1024, 2048,
 * 4096 and 16384: the next of them below counts. Less than 16384 is for clients that have no room
 * for such records, and do not say so (max_fragment_length; who does gets what it asks for). It
 * costs them 29 bytes, and the CPU a call, a record. */
static const unsigned record_max = 16384;

/* PEM file: clients must show a certificate signed by one of these, at most 16 (with tls_backends
 * 256, those of .ca included); NULL: none is asked for. listeners[] can say otherwise. Backends are
 * told its common name in X-SSL-Client-CN, which they never get from a client. Where certificates
 * are asked for, no session is resumed. */
static const char *const client_ca = NULL;

/* Requests that are no WebSocket upgrade: FORWARD or REFUSE (426). A connection whose request was
 * answered is kept for the next one for so long; 0: one request a connection. One that waits so
 * costs 6 KB, and is the first to go when there is no place for a newcomer. */
static const enum http http = FORWARD;
static const unsigned http_idle_ms = 5000;

/* Origins that may open a WebSocket, like "https://a.example"; "same": that of the Host asked for;
 * "none": programs, which send no Origin, as browsers always do. Empty (NULL): any. Others get 403
 * before a backend is dialled. */
static const char *const origins[] = { NULL };

/* X-Forwarded-For: APPEND the client's address, REPLACE what came, or OFF (with it go
 * X-Forwarded-Proto and X-Real-IP: what came passes, which is right behind another proxy that sets
 * them, if nobody else can connect). */
static const enum x_forwarded_for x_forwarded_for = APPEND;

/* A 101 of the backend must carry the right Sec-WebSocket-Accept; 0 is for backends that can't. */
static const int check_accept = 1;

/* How many sessions there can be, and how many of them have buffers at one moment. A session costs
 * 4.5 KB (6 KB until its answer); each of max_busy costs 75 KB: record buffers (50 KB), and two
 * places (12 KB) for heads above 0.8 KB that wait for their rest or their backend. A session has
 * buffers for a turn, not while it waits for somebody, so 8 serve bulk on all sessions at once as
 * fast as 64. Many requests with long heads at a time (cookies) to backends far away may want more.
 * No memory is taken after start; wssproxy -t prints the sum. What the kernel holds comes on top:
 * of each connection 64 KB that are not on their way yet, and what has come in and waits. */
#define max_sessions    512
#define max_busy        8

/* Sessions of one address, 0: no limit, as a balancer wants whose address all clients have; NAT may
 * want more. IPv6 addresses with the same source_bits6 (1 to 64) in
 * front count as one. Sites have a /56 or a /48 as well, which is 256 or 65536 of /64: with 64,
 * four of them fill the table; with 48, some providers' customers share one. */
static const unsigned max_per_ip   = 128;
static const unsigned source_bits6 = 64;

/* Bytes of a request or response head, 1024 to 16000; more, or more than 100 header lines, is 431
 * (414 when the request line alone is longer), or 502. */
#define head_max        8192

/* How long each phase of a session may take, all in all or (*) without a byte of application data;
 * 0 is not allowed but for idle_ms. */
static const unsigned handshake_ms = 10000;     /* TLS with the client */
static const unsigned head_ms      = 10000;     /* the request head: 408 */
static const unsigned connect_ms   = 3000;      /* one connect to a backend: the next one */
static const unsigned response_ms  = 30000;     /* * a request's body and its answer's head: 504 */
static const unsigned idle_ms      = 3600000;   /* * a tunnel, a plain answer; 0: for ever */
static const unsigned linger_ms    = 5000;      /* * after one side ended, for the other to end;
                                                 * as long as that takes bytes, it begins anew */

/* 1: of tunnels it is known where a WebSocket frame ends. So those that the proxy ends (drain_ms,
 * idle_ms, max_age_ms), or whose other side is lost, end with a Close, 1001 or 1012, that says so;
 * the log has codes and frames. 0 leaves that out: 2 KB of program. */
#define frames          1

/* A tunnel whose client has sent nothing for so long is sent a Ping, and given up if it is silent
 * for as long again; 0: off. Before the idle limits of what is between, NAT and proxies; and for
 * clients that vanish. Answers do not count for idle_ms. */
static const unsigned ping_ms      = 0;

/* A tunnel that is so old, a tenth more or less, is ended with 1001, so that its client connects
 * anew: to another backend, with a new certificate; 0: off. */
static const unsigned max_age_ms   = 0;

/* Who keeps others waiting for buffers for so long, and moves less than 16 KB meanwhile, is closed;
 * before its answer, its connect_ms, handshake_ms or response_ms counts as over. It must hold what
 * can't be put down: a long head, a certificate chain amid its check, bytes that nobody takes. */
static const unsigned stall_ms     = 5000;

/* SIGTERM, SIGUSR2: how long sessions may go on before they are closed. Tunnels leave one by one in
 * that time, those that rest first, and their clients come again, with a full handshake each:
 * at 60000, 512 of them are 9 a second. */
static const unsigned drain_ms     = 10000;

/* Health: max_fails failures within fail_ms put a backend aside for fail_ms (0: never, whatever
 * check_ms finds). A failure is a connection, or its TLS, that does not come about; what happens
 * after a request was written is none, for that may be why. check_ms: a TCP connect to each backend
 * that often, 0: off. */
static const unsigned max_fails    = 1;
static const unsigned fail_ms      = 10000;
static const unsigned check_ms     = 0;

/* A name that did not resolve is tried again that often; one that did is asked for again when its
 * backend fails, on SIGHUP, and every refresh_ms, 0: off. An address that it has no more gets no
 * new sessions; those that it has go on. */
static const unsigned resolve_ms   = 5000;
static const unsigned refresh_ms   = 0;

/* Dead peers, on both sides: TCP keepalive (first probe, interval, probes; keepalive_s = 0: off),
 * and how long sent bytes may stay unacknowledged (0: the system's 15 minutes or so). Linux counts
 * bytes that the peer is too slow to take as well: who takes nothing for so long is reset. It also
 * looks at this instead of keepalive_probes, so it must not be below (keepalive_s +
 * keepalive_interval_s * keepalive_probes) * 1000: one lost answer would end a silent session.
 * While somebody waits for one of max_sessions places, silent clients are asked at once, whatever
 * these say, and are gone if they do not answer within 5 s. */
static const unsigned keepalive_s          = 60;
static const unsigned keepalive_interval_s = 15;
static const unsigned keepalive_probes     = 4;
static const unsigned user_timeout_ms      = 120000;

/* After start: become this user and group, and no other group (names in /etc/passwd and /etc/group;
 * numbers will do, and are the way for users of LDAP and the like; NULL: stay, which for root the
 * log warns of), and see no files but those under this directory (NULL: none). On SIGHUP,
 * certificates are read as that user, in there; a syslog daemon that starts later, or again, is
 * found only if its dev/log is in there, too.
 * Whoever it is, capabilities are given up: root itself then reads only what root's mode bits let
 * it. */
static const char *const user       = NULL;
static const char *const group      = NULL;
static const char *const chroot_dir = NULL;

/* 1: after start, a system call that the loop does not need ends the program (SIGSYS; the kernel's
 * log says which). It costs 1.4 KB of program and less than 0.1 us a call on a PC. Without effect,
 * and the log says so, on kernels without CONFIG_SECCOMP_FILTER and on machines other than x86,
 * ARM, MIPS and 64-bit RISC-V. 0 is for tools with calls of their own: sanitizers, valgrind. */
static const int seccomp            = 1;

/* STDERR or SYSLOG (facility daemon; stderr while there is no /dev/log). log_time = 1: lines on
 * stderr begin with the time, for those who have no supervisor that adds it.
 * log_sessions: which have lines open and close: NONE, TUNNELS (requests for an upgrade), or ALL:
 * one page with its parts may have a hundred of these, 20 KB.
 * log_rejects: lines reject a second, so that no flood fills the log; one line counts the rest. 0:
 * no limit. log_probes = 1: also for connections that ask nothing, as health checks make them; the
 * totals (SIGUSR1) count these in any case. */
static const enum log_to log_to             = STDERR;
static const int log_time                   = 0;
static const enum log_sessions log_sessions = TUNNELS;
static const unsigned log_rejects           = 20;
static const int log_probes                 = 0;
