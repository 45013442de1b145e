/* unit-files.h - PEM files, keys and certificates, whether they belong together, trust anchors. */

static struct identity identity;
static struct guard pem_text;

/* The parsers may write one byte behind the text; more would meet the guard page. */
static const char *pem_parse_into(struct identity *id, pem_take *what, const char *pem, size_t len)
{
	char *text = guard_room(&pem_text, len + 1);

	memcpy(text, pem, len);
	if (what == chain_add)
		id->chain_len = id->der_len = 0;
	else
		br_skey_decoder_init(&id->key);
	return pem_walk(what, id, text, len, "none");
}

static const char *pem_parse(pem_take *what, const char *pem, size_t len)
{
	return pem_parse_into(&identity, what, pem, len);
}

static const char *chain_of(const char *pem)
{
	return pem_parse(chain_add, pem, strlen(pem));
}

static const char *key_of(const char *pem)
{
	return pem_parse(key_add, pem, strlen(pem));
}

/* The text with each line end replaced. */
static const char *with_line_ends(const char *pem, const char *end)
{
	static char out[16384];
	size_t n = 0;

	for (; *pem != '\0'; pem++)
		if (*pem == '\n')
			n += (size_t)sprintf(out + n, "%s", end);
		else
			out[n++] = *pem;
	out[n] = '\0';
	return out;
}

static const char *without_last(const char *pem, size_t bytes)
{
	static char out[16384];
	size_t len = strlen(pem) - bytes;

	memcpy(out, pem, len);
	out[len] = '\0';
	return out;
}

#define CHECK_GOOD(...)  check_str_or_null(__FILE__, __LINE__, #__VA_ARGS__, (__VA_ARGS__), 1)
#define CHECK_ERROR(error) check_str_or_null(__FILE__, __LINE__, #error, (error), 0)

/* Parsers return NULL, or what is wrong. */
static void check_str_or_null(const char *file, int line, const char *what, const char *error,
	int good)
{
	if ((error == NULL) == good || !shown(file, line))
		return;
	if (good)
		printf("%s: unexpected error: %s\n", what, error);
	else
		printf("%s: no error\n", what);
	print_context();
}

/* ---- chains ---- */

/* What chain_of left: so many certificates, each one DER object. */
static void check_chain(size_t want)
{
	size_t i;

	CHECK_INT(identity.chain_len, want);
	for (i = 0; i < want && i < identity.chain_len; i++) {
		const unsigned char *d = identity.chain[i].data;

		CHECK(identity.chain[i].data_len > 4 && d[0] == 0x30 && d[1] == 0x82);
		CHECK_INT(identity.chain[i].data_len, 4 + (d[2] << 8 | d[3]));
	}
}

#define EC_AND_EC2 PEM_EC_CERT PEM_EC2_CERT

static void test_pem_chain(void)
{
	static const struct { const char *name, *pem; size_t count; } good[] = {
		{ "one", PEM_EC_CERT, 1 },
		{ "RSA", PEM_RSA_CERT, 1 },
		{ "two", EC_AND_EC2, 2 },
		{ "a blank line", PEM_EC_CERT "\n\n" PEM_EC2_CERT "\n", 2 },
		{ "text around", "subject=CN = x\n\n" PEM_EC_CERT "a comment\n" PEM_EC2_CERT "the end", 2 },
		{ "bag attributes", "Bag Attributes\n    localKeyID: 01 \nsubject=/CN=x\n\nissuer=/CN=x\n\n" PEM_EC_CERT, 1 },
		{ "key first", PEM_EC_KEY PEM_EC_CERT PEM_EC2_CERT, 2 },
		{ "key last", PEM_EC_CERT PEM_EC2_CERT PEM_RSA_KEY8, 2 },
		{ "key between", PEM_EC_CERT PEM_EC_PARAMETERS PEM_EC_KEY PEM_EC2_CERT, 2 },
	};
	size_t i;

	for (i = 0; i < COUNT(good); i++) {
		at("%s", good[i].name);
		with("LF");
		CHECK_GOOD(chain_of(good[i].pem));
		check_chain(good[i].count);
		with("CRLF");
		CHECK_GOOD(chain_of(with_line_ends(good[i].pem, "\r\n")));
		check_chain(good[i].count);
		with("no final newline");
		CHECK_GOOD(chain_of(without_last(good[i].pem, 1)));
		check_chain(good[i].count);
		with("CRLF, none at the end");
		CHECK_GOOD(chain_of(without_last(with_line_ends(good[i].pem, "\r\n"), 2)));
		check_chain(good[i].count);
		with("CRLF, a CR at the end");
		CHECK_GOOD(chain_of(without_last(with_line_ends(good[i].pem, "\r\n"), 1)));
		check_chain(good[i].count);
	}
}

static void test_pem_chain_order(void)
{
	unsigned char first[2048], second[2048];
	size_t first_len, second_len;

	CHECK_GOOD(chain_of(PEM_EC_CERT));
	memcpy(first, identity.chain[0].data, first_len = identity.chain[0].data_len);
	CHECK_GOOD(chain_of(PEM_RSA_CERT));
	memcpy(second, identity.chain[0].data, second_len = identity.chain[0].data_len);
	CHECK_GOOD(chain_of(PEM_EC_CERT PEM_EC_KEY PEM_RSA_CERT));
	check_chain(2);
	CHECK_BYTES((char *)identity.chain[0].data, identity.chain[0].data_len, (char *)first, first_len);
	CHECK_BYTES((char *)identity.chain[1].data, identity.chain[1].data_len, (char *)second, second_len);
}

static void test_pem_chain_bad(void)
{
	static const struct { const char *name, *pem; size_t len; } bad[] = {
		{ "empty", LIT("") },
		{ "a newline", LIT("\n") },
		{ "text", LIT("this is no PEM file\n") },
		{ "bytes", LIT("\x30\x82\0\0\xff\xfe\r\n\0-----") },
		{ "a key and no certificate", LIT(PEM_EC_KEY) },
		{ "an object without bytes", LIT("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n") },
		{ "no base64", LIT("-----BEGIN CERTIFICATE-----\nMII!AAAA\n-----END CERTIFICATE-----\n") },
		{ "a NUL in it", LIT("-----BEGIN CERTIFICATE-----\nMII\0AAAA\n-----END CERTIFICATE-----\n") },
		{ "a begin inside", LIT("-----BEGIN CERTIFICATE-----\nAAAA\n" PEM_EC_CERT) },
	};
	size_t i;

	for (i = 0; i < COUNT(bad); i++) {
		at("%s", bad[i].name);
		CHECK_ERROR(pem_parse(chain_add, bad[i].pem, bad[i].len));
	}
	at("a good one after all that");
	CHECK_GOOD(chain_of(PEM_EC_CERT));
	check_chain(1);
}

static void test_pem_chain_limits(void)
{
	static char text[32768];
	size_t i, n;

	at("CHAIN_MAX certificates, and one more");
	for (i = n = 0; i < CHAIN_MAX; i++)
		n += (size_t)sprintf(text + n, PEM_EC_CERT);
	CHECK_GOOD(chain_of(text));
	check_chain(CHAIN_MAX);
	sprintf(text + n, PEM_EC_CERT);
	CHECK_ERROR(chain_of(text));
	at("larger than CHAIN_BYTES");
	n = (size_t)sprintf(text, "-----BEGIN CERTIFICATE-----\n");
	while (n < sizeof text - 200)
		n += (size_t)sprintf(text + n, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
	sprintf(text + n, "-----END CERTIFICATE-----\n");
	CHECK_ERROR(chain_of(text));
	CHECK_GOOD(chain_of(PEM_EC_CERT));
}

static void truncate_all(pem_take *what, const char *pem, size_t from,
	size_t to)
{
	size_t n;

	for (n = from; n <= to; n++) {
		with("%zu bytes", n);
		CHECK_ERROR(pem_parse(what, pem, n));
	}
}

/* A copy that broke off is not taken, wherever that was: up to the line that ends the object, before
 * which nothing says that all of it is there. */
static void test_pem_truncated(void)
{
	static const char chain[] = PEM_EC_CERT, two[] = EC_AND_EC2, key[] = PEM_EC_KEY,
		parameters[] = PEM_EC_PARAMETERS PEM_EC_KEY, rsa[] = PEM_RSA_KEY8;

	at("a certificate");
	truncate_all(chain_add, chain, 0, sizeof chain - sizeof "-----END CERTIFICATE-----\n");
	at("the second of two");
	truncate_all(chain_add, two, sizeof chain - 1 + strlen("-----BEGIN C"),
		sizeof two - sizeof "-----END CERTIFICATE-----\n");
	at("a key");
	truncate_all(key_add, key, 0, sizeof key - sizeof "-----END EC PRIVATE KEY-----\n");
	at("a key behind its parameters");
	truncate_all(key_add, parameters, 0, sizeof parameters - sizeof "-----END EC PRIVATE KEY-----\n");
	at("an RSA key");
	truncate_all(key_add, rsa, 0, sizeof rsa - sizeof "-----END PRIVATE KEY-----\n");
}

/* ---- keys ---- */

static void test_pem_key(void)
{
	static const struct { const char *name, *pem; int type; } good[] = {
		{ "EC, SEC1", PEM_EC_KEY, BR_KEYTYPE_EC },
		{ "EC, PKCS#8", PEM_EC_KEY8, BR_KEYTYPE_EC },
		{ "EC behind its parameters", PEM_EC_PARAMETERS PEM_EC_KEY, BR_KEYTYPE_EC },
		{ "P-384", PEM_P384_KEY, BR_KEYTYPE_EC },
		{ "RSA, PKCS#1", PEM_RSA_KEY, BR_KEYTYPE_RSA },
		{ "RSA, PKCS#8", PEM_RSA_KEY8, BR_KEYTYPE_RSA },
		{ "RSA 4096", PEM_RSA4096_KEY, BR_KEYTYPE_RSA },
		{ "a certificate before it", PEM_EC_CERT PEM_EC2_CERT PEM_EC_KEY, BR_KEYTYPE_EC },
		{ "a certificate behind it", PEM_EC_KEY PEM_EC_CERT, BR_KEYTYPE_EC },
		{ "text around it", "a comment\n" PEM_EC_KEY "x", BR_KEYTYPE_EC },
	};
	size_t i;

	for (i = 0; i < COUNT(good); i++) {
		at("%s", good[i].name);
		with("LF");
		CHECK_GOOD(key_of(good[i].pem));
		CHECK_INT(br_skey_decoder_key_type(&identity.key), good[i].type);
		with("CRLF");
		CHECK_GOOD(key_of(with_line_ends(good[i].pem, "\r\n")));
		CHECK_INT(br_skey_decoder_key_type(&identity.key), good[i].type);
		with("no final newline");
		CHECK_GOOD(key_of(without_last(good[i].pem, 1)));
		with("CRLF, none at the end");
		CHECK_GOOD(key_of(without_last(with_line_ends(good[i].pem, "\r\n"), 2)));
	}
}

static void test_pem_key_bad(void)
{
	static const struct { const char *name, *pem; } bad[] = {
		{ "empty", "" },
		{ "text", "no key at all\n" },
		{ "a certificate only", PEM_EC_CERT },
		{ "parameters only", PEM_EC_PARAMETERS },
		{ "two keys", PEM_EC_KEY PEM_EC2_KEY },
		{ "the same twice", PEM_EC_KEY PEM_EC_KEY8 },
		{ "two types", PEM_RSA_KEY PEM_EC_KEY },
		{ "Ed25519", PEM_ED25519_KEY },
		{ "encrypted, PKCS#8", PEM_ENCRYPTED_KEY },
		{ "encrypted, PKCS#1", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
			"DEK-Info: AES-128-CBC,6E2C07EBB15388BE992C9F853D0CF32A\n\n"
			"7o2AVBCMvzOBo0I27YSFwbmjHnpnjHeZc4EQVnBzJxf1Gf4fWkDNlZePbMxhSA+9\n"
			"-----END RSA PRIVATE KEY-----\n" },
		{ "no bytes", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n" },
		{ "other bytes", "-----BEGIN PRIVATE KEY-----\nAAAAAAAA\n-----END PRIVATE KEY-----\n" },
	};
	size_t i;

	for (i = 0; i < COUNT(bad); i++) {
		at("%s", bad[i].name);
		CHECK_ERROR(key_of(bad[i].pem));
		CHECK_ERROR(key_of(with_line_ends(bad[i].pem, "\r\n")));
	}
	at("the message for an encrypted key");
	CHECK(strstr(key_of(PEM_ENCRYPTED_KEY), "encrypted") != NULL);
	at("a good one after all that");
	CHECK_GOOD(key_of(PEM_EC_KEY));
}

/* Bytes behind the key's end, which BearSSL's decoder must not be given. */
static void test_pem_key_longer(void)
{
	static const char longer[] = "-----BEGIN EC PRIVATE KEY-----\n"
		"MHcCAQEEIATRA5WQpnR3eJRcGWEyMhGUL9ESlyV8wRi3LQLkKxIxoAoGCCqGSM49\n"
		"AwEHoUQDQgAENSCcluYzJdG+m/o8a55+Or7qIXMzaY76gW0O1u0PUeM4Mz2a2lod\n"
		"itb/y5KzNBceVt9hyD9dRobXcDR2B5AKMgAA";
	static char pem[4096];
	size_t n = (size_t)sprintf(pem, "%s", longer), i;

	for (i = 0; i < 500; i++)
		n += (size_t)sprintf(pem + n, i % 16 == 0 ? "\n%s" : "%s", "AAAA");
	sprintf(pem + n, "\n-----END EC PRIVATE KEY-----\n");
	key_of(pem);
	CHECK_GOOD(key_of(PEM_EC_KEY));
}

/* DER of an INTEGER of that many bytes. */
static size_t der_integer(unsigned char *out, size_t len)
{
	memcpy(out, (unsigned char[]){ 2, 0x82, (unsigned char)(len >> 8), (unsigned char)len }, 4);
	memset(out + 4, 0x11, len);
	return 4 + len;
}

/* A key whose numbers are longer than BearSSL's buffer for them spoils nothing behind it. */
static void test_pem_key_large(void)
{
	static struct { struct identity id; unsigned char behind[64]; } owner;
	unsigned char der[4096];
	char pem[8192];
	size_t large, len, i, n;

	for (large = 1500; large <= 1600; large++) {
		at("prime of %zu bytes", large);
		memcpy(der, "\x30\x82..\2\1\0", 7);
		for (len = 7, i = 0; i < 8; i++)        /* n e d p q dp dq iq */
			len += der_integer(der + len, i == 3 ? large : 1);
		der[2] = (unsigned char)((len - 4) >> 8);
		der[3] = (unsigned char)(len - 4);
		n = br_pem_encode(pem, der, len, "RSA PRIVATE KEY", 0);
		memset(owner.behind, 0xdb, sizeof owner.behind);
		pem_parse_into(&owner.id, key_add, pem, n);
		for (i = 0; i < sizeof owner.behind; i++)
			CHECK_INT(owner.behind[i], 0xdb);
	}
}

/* Every certificate with every key. */
static void test_key_matches(void)
{
	static const struct { const char *cert, *key, *key8; } pairs[] = {
		{ PEM_EC_CERT, PEM_EC_KEY, PEM_EC_KEY8 },
		{ PEM_EC2_CERT, PEM_EC2_KEY, PEM_EC2_KEY },
		{ PEM_P384_CERT, PEM_P384_KEY, PEM_P384_KEY },
		{ PEM_RSA_CERT, PEM_RSA_KEY, PEM_RSA_KEY8 },
		{ PEM_RSA4096_CERT, PEM_RSA4096_KEY, PEM_RSA4096_KEY },
		{ NULL, PEM_RSA2_KEY, PEM_RSA2_KEY },
	};
	size_t i, k;

	for (i = 0; i < COUNT(pairs); i++) {
		for (k = 0; k < COUNT(pairs) && pairs[i].cert != NULL; k++) {
			at("certificate %zu, key %zu", i, k);
			CHECK_GOOD(chain_of(pairs[i].cert));
			CHECK_GOOD(key_of(pairs[k].key));
			check_str_or_null(__FILE__, __LINE__, "match", identity_check(&identity), i == k);
			CHECK_GOOD(key_of(pairs[k].key8));
			check_str_or_null(__FILE__, __LINE__, "match", identity_check(&identity), i == k);
		}
	}
	at("the key of the second certificate");
	CHECK_GOOD(chain_of(EC_AND_EC2));
	CHECK_GOOD(key_of(PEM_EC2_KEY));
	CHECK_ERROR(identity_check(&identity));
	at("bytes that are no certificate");
	CHECK_GOOD(chain_of(PEM_NO_CERT));
	CHECK_ERROR(identity_check(&identity));
}

/* ---- trust anchors ---- */

static struct trust ring_trust;

static struct keyring *ring_empty(void)
{
	memset(&keyrings[1], 0, sizeof keyrings[1]);
	keyrings[1].read = &ring_trust;
	ring_trust = (struct trust){ .path = "none" };
	keyrings[1].kept = (struct text){ .p = keyrings[1].bytes, .size = ANCHOR_BYTES };
	return &keyrings[1];
}

static const char *anchors_of(struct keyring *ring, const char *pem)
{
	size_t len = strlen(pem);
	char *text = malloc(len + 1);
	const char *error;

	if (text == NULL)
		exit(2);
	memcpy(text, pem, len);
	error = pem_walk(anchor_add, ring, text, len, "none");
	free(text);                     /* the anchors must not point into it */
	return error;
}

/* An anchor has the certificate's subject and key. */
static void check_anchor(const br_x509_trust_anchor *a, const char *cert)
{
	br_x509_decoder_context dc;
	const br_x509_pkey *pk;

	CHECK_GOOD(chain_of(cert));
	br_x509_decoder_init(&dc, NULL, NULL);
	br_x509_decoder_push(&dc, identity.chain[0].data, identity.chain[0].data_len);
	pk = br_x509_decoder_get_pkey(&dc);
	CHECK(pk != NULL);
	if (pk == NULL)
		return;
	CHECK_INT(a->pkey.key_type, pk->key_type);
	CHECK(a->dn.len > 10 && a->dn.data[0] == 0x30);
	CHECK_INT(a->dn.len, 2 + a->dn.data[1]);
	if (pk->key_type == BR_KEYTYPE_RSA && a->pkey.key_type == BR_KEYTYPE_RSA) {
		CHECK_BYTES((char *)a->pkey.key.rsa.n, a->pkey.key.rsa.nlen,
			(char *)pk->key.rsa.n, pk->key.rsa.nlen);
		CHECK_BYTES((char *)a->pkey.key.rsa.e, a->pkey.key.rsa.elen,
			(char *)pk->key.rsa.e, pk->key.rsa.elen);
	} else if (a->pkey.key_type == BR_KEYTYPE_EC) {
		CHECK_INT(a->pkey.key.ec.curve, pk->key.ec.curve);
		CHECK_BYTES((char *)a->pkey.key.ec.q, a->pkey.key.ec.qlen,
			(char *)pk->key.ec.q, pk->key.ec.qlen);
	}
}

static void test_anchors(void)
{
	struct keyring *ring = ring_empty();

	CHECK_GOOD(anchors_of(ring, PEM_EC_CERT PEM_EC_KEY PEM_RSA_CERT));
	CHECK_INT(ring->anchors, 2);
	CHECK_GOOD(anchors_of(ring, with_line_ends(PEM_P384_CERT PEM_RSA4096_CERT, "\r\n")));
	CHECK_INT(ring->anchors, 4);
	check_anchor(&ring->anchor[0], PEM_EC_CERT);
	check_anchor(&ring->anchor[1], PEM_RSA_CERT);
	check_anchor(&ring->anchor[2], PEM_P384_CERT);
	check_anchor(&ring->anchor[3], PEM_RSA4096_CERT);
	CHECK(ring->anchor[0].flags & BR_X509_TA_CA);   /* openssl req -x509 says so in it */
	CHECK(memmem(ring->anchor[0].dn.data, ring->anchor[0].dn.len, "ec.example", 10) != NULL);
}

static void test_anchors_bad(void)
{
	struct keyring *ring = ring_empty();
	char *text = calloc(ANCHORS_MAX + 2, 2048);
	size_t n = 0, i;

	if (text == NULL)
		exit(2);
	at("none");
	CHECK_ERROR(anchors_of(ring, ""));
	CHECK_ERROR(anchors_of(ring, PEM_EC_KEY));
	at("no certificate");
	CHECK_ERROR(anchors_of(ring, PEM_NO_CERT));
	at("truncated");
	CHECK_ERROR(anchors_of(ring, without_last(PEM_EC_CERT, 40)));
	CHECK_ERROR(anchors_of(ring, without_last(EC_AND_EC2, 40)));
	at("ANCHORS_MAX, and one more");
	ring = ring_empty();
	for (i = 0; i < ANCHORS_MAX; i++)
		n += (size_t)sprintf(text + n, PEM_EC_CERT);
	CHECK_GOOD(anchors_of(ring, text));
	CHECK_INT(ring->anchors, ANCHORS_MAX);
	check_anchor(&ring->anchor[ANCHORS_MAX - 1], PEM_EC_CERT);
	CHECK_ERROR(anchors_of(ring, PEM_EC_CERT));
	CHECK(ring->anchors <= ANCHORS_MAX);
	at("more than ANCHOR_BYTES");
	ring = ring_empty();
	for (i = n = 0; i < ANCHORS_MAX; i++)
		n += (size_t)sprintf(text + n, PEM_RSA4096_CERT);
	CHECK_ERROR(anchors_of(ring, text));
	CHECK(ring->kept.len <= ANCHOR_BYTES);
	free(text);
}

/* ---- files ---- */

static char directory[] = "/tmp/wssproxy-unit-XXXXXX";

static void file_write(const char *name, const char *text, size_t len)
{
	FILE *f = fopen(name, "w");

	if (f == NULL || fwrite(text, 1, len, f) != len || fclose(f) != 0) {
		perror(name);
		exit(2);
	}
}

static void directory_enter(void)
{
	if (mkdtemp(directory) == NULL || chdir(directory) < 0) {
		perror(directory);
		exit(2);
	}
}

static void directory_leave(void)
{
	static const char *const names[] = { "unit-cert.pem", "unit-key.pem", "unit-cert2.pem",
		"unit-key2.pem", "unit-ca.pem", "large", "passwd" };
	size_t i;

	for (i = 0; i < COUNT(names); i++)
		unlink(names[i]);
	if (chdir("/") < 0 || rmdir(directory) < 0)
		perror(directory);
}

/* The log is a pipe for a while. */
static int log_pipe[2];

static void log_open_pipe(void)
{
	if (pipe(log_pipe) < 0) {
		perror("pipe");
		exit(2);
	}
	log_fd = log_pipe[1];
}

static const char *log_read(void)
{
	static char text[8192];
	struct pollfd p = { .fd = log_pipe[0], .events = POLLIN };
	ssize_t n = 0;

	if (poll(&p, 1, 0) == 1)
		n = read(log_pipe[0], text, sizeof text - 1);
	text[n > 0 ? n : 0] = '\0';
	return text;
}

/* What certs[] names is read, and each error names the entry and the file: here, as after the start,
 * in the log. */
static void test_keyring_load(void)
{
	static const char *const names[] = { "unit-cert.pem", "unit-key.pem", "unit-cert2.pem",
		"unit-key2.pem", "unit-ca.pem" };
	static const struct { const char *text[5], *culprit; } cases[] = {
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_KEY, PEM_RSA_CERT }, NULL },
		{ { PEM_EC_CERT PEM_EC_KEY, PEM_EC_CERT PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_KEY, EC_AND_EC2 }, NULL },
		{ { "", PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_KEY, PEM_EC_CERT }, "certs[0]: unit-cert.pem" },
		{ { PEM_EC_CERT, "x", PEM_RSA_CERT, PEM_RSA_KEY, PEM_EC_CERT }, "certs[0]: unit-key.pem" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_KEY, PEM_RSA_KEY, PEM_EC_CERT }, "certs[1]: unit-cert2.pem" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_CERT, PEM_EC_CERT }, "certs[1]: unit-key2.pem" },
		{ { PEM_EC_CERT, PEM_EC2_KEY, PEM_RSA_CERT, PEM_RSA_KEY, PEM_EC_CERT }, "certs[0]: unit-" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA2_KEY, PEM_EC_CERT }, "certs[1]: unit-" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, NULL, PEM_EC_CERT }, "certs[1]: unit-key2.pem" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_KEY, PEM_EC_KEY }, "backends[5]: unit-ca.pem" },
		{ { PEM_EC_CERT, PEM_EC_KEY, PEM_RSA_CERT, PEM_RSA_KEY, NULL }, "backends[5]: unit-ca.pem" },
		{ { PEM_EC_CERT, PEM_EC_KEY, "", PEM_RSA_KEY, "" }, "backends[5]: unit-ca.pem" },
	};
	const char *got;
	size_t i, k;

	reads = RELOAD;
	umask(077);             /* or it warns of the keys */
	log_open_pipe();
	directory_enter();
	for (i = 0; i < COUNT(cases); i++) {
		at("case %zu", i);
		for (k = 0; k < COUNT(names); k++) {
			unlink(names[k]);
			if (cases[i].text[k] != NULL)
				file_write(names[k], cases[i].text[k], strlen(cases[i].text[k]));
		}
		CHECK_INT(keyring_load(&keyrings[0]), cases[i].culprit == NULL);
		got = log_read();
		if (cases[i].culprit == NULL || strstr(got, cases[i].culprit) == NULL)
			CHECK_STR(got, cases[i].culprit ? cases[i].culprit : "");
	}
	directory_leave();
}

static int is_wiped(const void *p, size_t len)
{
	const unsigned char *c = p;

	while (len > 0 && *c == 0)
		c++, len--;
	return len == 0;
}

/* Keys that are used no more are gone when the last handshake that had them ends. */
static void test_keyring_wiped(void)
{
	struct session s = { .ring = &keyrings[1] }, t = s;
	br_skey_decoder_context *key = &keyrings[1].id[CERTS - 1].key;

	CHECK_GOOD(key_of(PEM_RSA_KEY));
	*key = identity.key;
	keyrings[1].users = 1;
	keyring = &keyrings[1];
	at("the ring that is used");
	tls_ring_release(&s);
	CHECK(!is_wiped(key, sizeof *key));
	at("the ring of before, with another handshake");
	keyring = &keyrings[0];
	keyrings[1].users = 2;
	s.ring = &keyrings[1];
	tls_ring_release(&s);
	CHECK(!is_wiped(key, sizeof *key));
	at("the last one");
	tls_ring_release(&t);
	CHECK(is_wiped(key, sizeof *key));
}

/* A file that is as large as there is room for, or is none. */
static void test_pem_load(void)
{
	static char large[sizeof file_text];

	reads = RELOAD;         /* faults go to the log */
	directory_enter();
	memset(large, '\n', sizeof large);
	memcpy(large, PEM_EC_CERT, strlen(PEM_EC_CERT));
	file_write("large", large, sizeof large - 2);
	CHECK_INT(pem_load(chain_add, &identity, "large", "none"), 1);
	CHECK(is_wiped(file_text, sizeof file_text));
	/* never so much that no byte is left behind it */
	file_write("large", large, sizeof large - 1);
	CHECK_INT(pem_load(chain_add, &identity, "large", "none"), 0);
	CHECK_STR(fault, ": large: too large");
	CHECK(is_wiped(file_text, sizeof file_text));
	CHECK_INT(pem_load(chain_add, &identity, "missing", "none"), 0);
	CHECK_STR(fault, ": missing: No such file or directory");
	CHECK_INT(pem_load(chain_add, &identity, ".", "none"), 0);
	CHECK_STR(fault, ": .: Is a directory");
	directory_leave();
}

/* ---- server names ---- */

/* The very name (3 here), before a name with one label for the star (2), before a default. */
static void test_name_fits(void)
{
	static const struct { const char *pattern, *name; size_t len; unsigned fits; } cases[] = {
		{ "a.example", LIT("a.example"), 3 },
		{ "a.example", LIT("A.EXAMPLE"), 3 },
		{ "a.example", LIT("a.example."), 3 },
		{ "a.example.", LIT("a.example."), 3 }, { "a.example.", LIT("a.example"), 3 },
		{ "a.example", LIT("a.example.."), 0 },
		{ "a.example", LIT("."), 0 },
		{ "*.a.example", LIT("x.a.example."), 2 },
		{ "*.a.example", LIT("."), 0 },
		{ NULL, LIT("."), 1 },
		{ "A.Example", LIT("a.example"), 3 },
		{ "192.0.2.1", LIT("192.0.2.1"), 3 },
		{ "a.example", LIT("b.example"), 0 },
		{ "a.example", LIT("a.exampl"), 0 },
		{ "a.example", LIT("a.example2"), 0 },
		{ "a.example", LIT("x.a.example"), 0 },
		{ "a.example", LIT(""), 0 },
		{ "a.example", LIT("a.example\0"), 0 },
		{ "a.example", LIT("a.example\0.b"), 0 },
		{ "a-example", LIT("a\x0d" "example"), 0 },     /* one bit apart */
		{ "a[example", LIT("a{example"), 0 },
		{ "*.a.example", LIT("x.a.example"), 2 },
		{ "*.a.example", LIT("X.A.example"), 2 },
		{ "*.a.example", LIT("x.y.a.example"), 0 },
		{ "*.a.example", LIT("a.example"), 0 },
		{ "*.a.example", LIT(".a.example"), 0 },
		{ "*.a.example", LIT("x.b.example"), 0 },
		{ "*.a.example", LIT("x.a.exampl"), 0 },
		{ "*.a.example", LIT("x.a.example.b"), 0 },
		{ "*.a.example", LIT("x"), 0 },
		{ "*.a.example", LIT(""), 0 },
		{ NULL, LIT("a.example"), 1 },
		{ NULL, LIT(""), 1 },
	};
	size_t i, n;

	for (i = 0; i < COUNT(cases); i++) {
		at("%s, %s", cases[i].pattern ? cases[i].pattern : "NULL", cases[i].name);
		n = cases[i].fits < 2 ? cases[i].fits : 1 + strlen("a.example") +
			(cases[i].fits == 2);
		CHECK_INT(name_fits(cases[i].pattern, guard_copy(&input, cases[i].name, cases[i].len),
			cases[i].len, 1), n);
	}
	at("any labels");
	CHECK_INT(name_fits("*.example", LIT("x.a.example"), 0), 9);
	CHECK_INT(name_fits("*.a.example", LIT("x.a.EXAMPLE."), 0), 11);
	CHECK_INT(name_fits("*.a.example", LIT("a.example"), 0), 0);
	CHECK_INT(name_fits("*.a.example", LIT(".a.example"), 0), 0);
	CHECK_INT(name_fits("*.a.example", LIT("x.b.example"), 0), 0);
}

/* Users and groups: numbers, and lines of /etc. */
static void test_ids(void)
{
	static const struct { const char *line; unsigned field, want; } lines[] = {
		{ "0", 0, 0 }, { "65534", 0, 65534 }, { "4294967294", 0, 4294967294 },
		{ "4294967295", 0, UINT_MAX }, { "18446744073709551617", 0, UINT_MAX },
		{ "", 0, UINT_MAX }, { "-1", 0, UINT_MAX }, { "1x", 0, UINT_MAX }, { " 1", 0, UINT_MAX },
		{ "a:x:7:8:", 2, 7 }, { "a:x:7:8:", 3, 8 }, { "a:x:7", 2, 7 }, { "a:x:7", 3, UINT_MAX },
		{ "a:x:", 2, UINT_MAX }, { "a:x", 2, UINT_MAX }, { "a:x::8", 2, UINT_MAX },
		{ "a:x:-7:8", 2, UINT_MAX }, { "a::07:8", 2, 7 },
	};
	static const char text[] = "ab:x:1:2:\n#a:x:3:4:\n\na\nA:x:5:6\na:x::7:\na:x:8:9:A a:/:/a\n"
		"a:x:10:11:\nz:x:12:13";
	size_t i;

	for (i = 0; i < COUNT(lines); i++) {
		at("%s, field %u", lines[i].line, lines[i].field);
		CHECK_INT(id_parse(lines[i].line, lines[i].field), lines[i].want);
	}
	directory_enter();
	file_write("passwd", text, sizeof text - 1);
	at("the first line of that very name with a number");
	CHECK_INT(id_find("user", "a", "passwd", 2), 8);
	CHECK_INT(id_find("user", "ab", "passwd", 3), 2);
	at("a last line without an end");
	CHECK_INT(id_find("user", "z", "passwd", 3), 13);
	at("a number needs no file");
	CHECK_INT(id_find("user", "1000", "missing", 3), 1000);
	directory_leave();
}
