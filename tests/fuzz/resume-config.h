/* resume-config.h - what the target resume is compiled with: unit-config.h, but for backends of every
 * kind of TLS, and old versions and their suites as well. */
#define backends        unit_backends
#define ciphers         unit_ciphers
#define tls_min         unit_tls_min
#include "../unit-config.h"
#undef backends
#undef ciphers
#undef tls_min
#undef session_cache
#define session_cache   16

static const struct backend backends[] = {
	{ .host = "192.0.2.1", .port = "3000" },
	{ .host = "192.0.2.2", .port = "3000", .path = "/any", .tls = TLS_NOVERIFY,
	  .sni = "any.example" },
	{ .host = "192.0.2.3", .port = "3000", .path = "/verify", .tls = TLS_VERIFY,
	  .sni = "chat.example", .ca = "unit-ca.pem" },
	{ .host = "192.0.2.4", .port = "3000", .path = "/pin", .tls = TLS_PIN, .ca = "unit-ca.pem" },
};

static const unsigned tls_min = BR_TLS10;
static const uint16_t ciphers[] = {
	BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA,
	BR_TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
};
