/* unit-config.h - the configuration that tests/unit.c is compiled with. Entries are as in
 * config.def.h, where they are explained; those that tests change while they run are not const. */

#define config_version CONFIG_VERSION

static const struct listener listeners[] = {
	{ "127.0.0.1", "0",    WS },
	{ "127.0.0.1", "0",    REDIRECT },
	{ "127.0.0.1", "8443", WSS },
};

static const struct cert certs[] = {
	{ NULL,          "unit-cert.pem",  "unit-key.pem" },
	{ "*.b.example", "unit-cert2.pem", "unit-key2.pem" },
	{ "y.b.example", "unit-cert.pem",  "unit-key.pem" },
};

enum { A, B, BACKUP, LIMITED, NAMED, CHAT, CHAT_X, IN_FILE, SHOP, SHOP_X, BELOW, BELOW_B };

static const struct backend backends[] = {
	[A]       = { .host = "192.0.2.1", .port = "3000" },
	[B]       = { .host = "2001:db8::1", .port = "3000", .weight = 2 },
	[BACKUP]  = { .host = "192.0.2.2", .port = "3000", .backup = 1 },
	[LIMITED] = { .host = "192.0.2.3", .port = "3000", .max_conns = 2 },
	[NAMED]   = { .host = "name.example", .port = "3000" },
	[CHAT]    = { .host = "192.0.2.4", .port = "3000", .path = "/chat", .tls = TLS_VERIFY,
	              .sni = "chat.example", .ca = "unit-ca.pem" },
	[CHAT_X]  = { .host = "192.0.2.5", .port = "3000", .path = "/chat/x" },
	[IN_FILE] = { .host = "unix:/run/backend", .path = "/file" },
	[SHOP]    = { .host = "192.0.2.6", .port = "3000", .name = "Shop.test", .path = "/s" },
	[SHOP_X]  = { .host = "192.0.2.7", .port = "3000", .name = "shop.test", .path = "/s/x" },
	[BELOW]   = { .host = "192.0.2.8", .port = "3000", .name = "*.shop.test" },
	[BELOW_B] = { .host = "192.0.2.9", .port = "3000", .name = "*.b.shop.test", .path = "/s" },
};

static enum balance balance = ROUND_ROBIN;
static const unsigned hash_bits4 = 24;
static const unsigned hash_bits6 = 64;
static const char cookie_name[] = "wssproxy";
static const char cookie_secret[] = "secret";
static const unsigned tls_min = BR_TLS12;
static const unsigned tls_max = BR_TLS12;
static const int ciphers_by_cpu = 1;
static const char *const redirect_port = NULL;
static const uint16_t ciphers[] = {
	BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
};
#define resolve_names 1
#define make_way 1
#define tls_backends 1
#define session_cache 8
static const unsigned record_max = 16384;
static const char *const client_ca = NULL;
static enum http http = REFUSE;
static const unsigned http_idle_ms = 5000;
static const char *origins[4];
static enum x_forwarded_for x_forwarded_for = APPEND;
static const int check_accept = 1;

/* Few, so that a test can use them up. */
#define max_sessions 24
#define max_busy 4
static const unsigned max_per_ip = 12;
static const unsigned source_bits6 = 62;
#define head_max 8192
#define frames 1
#ifndef PING_MS
#define PING_MS 0
#define MAX_AGE_MS 0
#endif
static const unsigned ping_ms = PING_MS;
static const unsigned max_age_ms = MAX_AGE_MS;

static const unsigned handshake_ms = 10000;
static const unsigned head_ms      = 9000;
static const unsigned connect_ms   = 3000;
static const unsigned response_ms  = 30000;
static const unsigned idle_ms      = 3600000;
static const unsigned linger_ms    = 5000;
static const unsigned stall_ms     = 4000;
static const unsigned drain_ms     = 10000;
static const unsigned max_fails    = 2;
static const unsigned fail_ms      = 10000;
static const unsigned check_ms     = 0;
static const unsigned resolve_ms   = 5000;
static const unsigned refresh_ms   = 60000;
static const unsigned keepalive_s          = 60;
static const unsigned keepalive_interval_s = 15;
static const unsigned keepalive_probes     = 4;
static const unsigned user_timeout_ms      = 120000;
static const char *const user       = NULL;
static const char *const group      = NULL;
static const char *const chroot_dir = NULL;
static const int seccomp = 0;
static const enum log_to log_to     = STDERR;
static const int log_time           = 0;
static const enum log_sessions log_sessions = ALL;
static const unsigned log_rejects   = 5;
static const int log_probes         = 1;
