/* pem.c - fuzzes the files of certificates and keys: chain_add, key_add, anchor_add,
 * identity_check. The first byte chooses what the rest is: PEM; or DER, to be wrapped as PEM, for
 * base64 keeps a fuzzer from what lies behind it. */
#include "fuzz.h"

static struct identity identity;
static struct keyring ring;

/* Parses a copy with one byte of room, as pem_walk asks for; `cr` puts CR before each LF. */
static const char *parse(pem_take *what, void *owner, const char *text, size_t len, int cr)
{
	char *copy = malloc(2 * len + 1);
	const char *error;
	size_t i, n = 0;

	for (i = 0; i < len; i++) {
		if (cr && text[i] == '\n')
			copy[n++] = '\r';
		copy[n++] = text[i];
	}
	copy = realloc(copy, n + 1);
	if (what == chain_add)
		identity.chain_len = identity.der_len = 0;
	else if (what == key_add)
		br_skey_decoder_init(&identity.key);
	error = pem_walk(what, owner, copy, n, "none");
	free(copy);
	return error;
}

static void chain_must(const char *error)
{
	size_t i;

	MUST(identity.chain_len <= CHAIN_MAX);
	MUST(error || identity.chain_len > 0);
	for (i = 0; i < identity.chain_len; i++) {
		const br_x509_certificate *c = &identity.chain[i];

		MUST(c->data >= identity.der && c->data_len > 0);
		MUST(c->data_len <= sizeof identity.der - (size_t)(c->data - identity.der));
		MUST(i == 0 || c->data == c[-1].data + c[-1].data_len);
	}
}

static void within_ring(const unsigned char *p, size_t len)
{
	MUST((char *)p >= ring.bytes && (char *)p + len <= ring.bytes + ring.kept.len);
}

static void anchors_must(const char *error)
{
	unsigned i;

	MUST(ring.anchors <= ANCHORS_MAX && ring.kept.len <= sizeof ring.bytes);
	MUST(error || ring.anchors > 0);
	for (i = 0; i < ring.anchors; i++) {
		const br_x509_trust_anchor *a = &ring.anchor[i];

		within_ring(a->dn.data, a->dn.len);
		if (a->pkey.key_type == BR_KEYTYPE_RSA) {
			within_ring(a->pkey.key.rsa.n, a->pkey.key.rsa.nlen);
			within_ring(a->pkey.key.rsa.e, a->pkey.key.rsa.elen);
		} else {
			MUST(a->pkey.key_type == BR_KEYTYPE_EC);
			within_ring(a->pkey.key.ec.q, a->pkey.key.ec.qlen);
		}
	}
}

static void text_must(const char *text, size_t len)
{
	const char *chain = parse(chain_add, &identity, text, len, 0), *key;
	size_t certificates = identity.chain_len;

	chain_must(chain);
	MUST(parse(chain_add, &identity, text, len, 1) == chain);
	MUST(identity.chain_len == certificates);
	key = parse(key_add, &identity, text, len, 0);
	MUST(key || br_skey_decoder_key_type(&identity.key) != 0);
	MUST(parse(key_add, &identity, text, len, 1) == key);
	if (!chain && !key)
		identity_check(&identity);
	log_fd = -1;            /* anchors that are skipped */
	ring.anchors = 0;
	ring.read = &ring.trust[0];
	ring.trust[0].path = "none";
	ring.kept = (struct text){ .p = ring.bytes, .size = sizeof ring.bytes };
	anchors_must(parse(anchor_add, &ring, text, len, 0));
	anchors_must(parse(anchor_add, &ring, text, len, 0));        /* a second file */
}

/* A certificate chain of the other side as it comes in records: in pieces, and with more behind. */
static void judge_must(const br_x509_class **ctx, const unsigned char *der, size_t len,
	size_t piece)
{
	const br_x509_class *judge = *ctx;
	size_t at, n;
	int i;

	judge->start_chain(ctx, "any.example");
	for (i = 0; i < 2; i++) {
		judge->start_cert(ctx, (uint32_t)len);
		for (at = 0; at < len; at += n) {
			n = len - at < piece ? len - at : piece;
			judge->append(ctx, der + at, n);
		}
		judge->end_cert(ctx);
	}
	if (judge->end_chain(ctx) == 0)
		MUST(judge->get_pkey(ctx, NULL) != NULL);
}

static void peer_must(const unsigned char *der, size_t len, size_t piece)
{
	static br_ssl_engine_context eng;
	struct verifier v;
	struct trust all = { .count = ring.anchors };

	verifier_first(&v, &eng, NULL);
	judge_must(&v.u.first.known.vtable, der, len, piece);
	verifier_chain(&v, &eng, &ring, &all);
	judge_must(&v.u.minimal.vtable, der, len, piece);
}

/* DER as PEM under one of these names, `times` times. */
static void der_must(unsigned name, unsigned times, const unsigned char *der, size_t len)
{
	static const char *const names[] = { "CERTIFICATE", "X509 CERTIFICATE", "EC PRIVATE KEY",
		"RSA PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "EC PARAMETERS" };
	size_t size = times * (2 * len + 128) + 1, n = 0;
	char *text = malloc(size);

	name %= LENGTH(names);
	while (times-- > 0)
		n += br_pem_encode(text + n, der, len, names[name], 0);
	text_must(text, n);
	free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	unsigned how = input_byte(&in);
	size_t len;
	char *buf = input_rest(&in, &len);

	if (how & 1) {
		der_must(how >> 1 & 7, 1 + (how >> 4), (unsigned char *)buf, len);
		if ((how >> 1 & 7) < 2)
			peer_must((unsigned char *)buf, len, 1 + (how >> 4) * 37);
	} else {
		text_must(buf, len);
	}
	free(buf);
	return 0;
}
