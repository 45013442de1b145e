/* unit-tls.h - the client's TLS against BearSSL's own client in memory: certificates by name, record
 * buffers that change between records, and the judges of pinned and unverified certificates. */

static br_ssl_client_context peer;
static struct verifier peer_trust;      /* anyone will do */
static unsigned char peer_buf[BR_SSL_BUFSIZE_BIDI];

static struct session *tls_session(void)
{
	struct session *s;

	tables_init();
	suites_init();
	keyring = &keyrings[0];
	CHECK_GOOD(pem_parse_into(&keyring->id[0], chain_add, LIT(EC_AND_EC2)));
	CHECK_GOOD(pem_parse_into(&keyring->id[0], key_add, LIT(PEM_EC_KEY)));
	CHECK_GOOD(pem_parse_into(&keyring->id[1], chain_add, LIT(PEM_RSA_CERT)));
	CHECK_GOOD(pem_parse_into(&keyring->id[1], key_add, LIT(PEM_RSA_KEY)));
	CHECK_GOOD(pem_parse_into(&keyring->id[2], chain_add, LIT(PEM_EC_CERT)));
	CHECK_GOOD(pem_parse_into(&keyring->id[2], key_add, LIT(PEM_EC_KEY)));
	s = session_make(0);
	CHECK(records_borrow(s));
	CHECK_INT(tls_start(s), 1);
	return s;
}

static int peer_certs;          /* that it was shown */

static void peer_start_cert(const br_x509_class **ctx, uint32_t len)
{
	(void)ctx;
	(void)len;
	peer_certs++;
}

static void peer_start(const char *name)
{
	static br_x509_class counting;
	unsigned char seed[32] = { 1 };
	br_x509_minimal_context unused;

	br_ssl_client_init_full(&peer, &unused, NULL, 0);
	memset(&peer_trust, 0, sizeof peer_trust);
	verifier_first(&peer_trust, &peer.eng, NULL);
	counting = *peer_trust.u.first.known.vtable;
	counting.start_cert = peer_start_cert;
	peer_trust.u.first.known.vtable = &counting;
	peer_certs = 0;
	br_ssl_engine_inject_entropy(&peer.eng, seed, sizeof seed);
	br_ssl_engine_set_buffer(&peer.eng, peer_buf, sizeof peer_buf, 1);
	CHECK_INT(br_ssl_client_reset(&peer, name, 0), 1);
}

/* Records of one engine, at most `most` bytes, to the other. What was moved. */
static size_t records_move(br_ssl_engine_context *from, br_ssl_engine_context *to, size_t most)
{
	unsigned char *out, *in;
	size_t n, room, moved = 0;

	while (most > 0 && (out = br_ssl_engine_sendrec_buf(from, &n)) != NULL &&
	    (in = br_ssl_engine_recvrec_buf(to, &room)) != NULL) {
		n = n < room ? n : room;
		n = n < most ? n : most;
		memcpy(in, out, n);
		br_ssl_engine_sendrec_ack(from, n);
		br_ssl_engine_recvrec_ack(to, n);
		most -= n;
		moved += n;
	}
	return moved;
}

/* Both ways, until nothing moves. */
static void records_pump(struct session *s)
{
	while (records_move(&peer.eng, &s->tls.eng, SIZE_MAX) > 0 ||
	    records_move(&s->tls.eng, &peer.eng, SIZE_MAX) > 0)
		;
}

static void tls_handshake(struct session *s)
{
	records_pump(s);
	CHECK(br_ssl_engine_current_state(&peer.eng) & BR_SSL_SENDAPP);
	CHECK(br_ssl_engine_current_state(&s->tls.eng) & BR_SSL_SENDAPP);
	CHECK_INT(br_ssl_engine_last_error(&peer.eng), 0);
	CHECK_INT(br_ssl_engine_last_error(&s->tls.eng), 0);
	s->state = RELAY;
	tls_ring_release(s);
}

/* Application bytes into an engine, flushed as one record. */
static void app_write(br_ssl_engine_context *eng, const char *data, size_t len)
{
	size_t room;
	unsigned char *p = br_ssl_engine_sendapp_buf(eng, &room);

	CHECK(p != NULL && room >= len);
	if (p == NULL || room < len)
		return;
	memcpy(p, data, len);
	br_ssl_engine_sendapp_ack(eng, len);
	br_ssl_engine_flush(eng, 0);
}

static void check_app_read(br_ssl_engine_context *eng, const char *data, size_t len)
{
	size_t n;
	unsigned char *p = br_ssl_engine_recvapp_buf(eng, &n);

	CHECK(p != NULL);
	if (p == NULL)
		return;
	CHECK_BYTES((char *)p, n, data, len);
	br_ssl_engine_recvapp_ack(eng, n);
}

/* A session rests at a record boundary and nowhere else: not with a byte of a record read, nor with
 * plaintext that waits, nor with bytes that wait for the socket. Then it gives its buffers back, and
 * goes on with others. */
static void test_tls_rest(void)
{
	struct session *s = tls_session();
	br_ssl_engine_context *eng = &s->tls.eng;
	struct records *mine;
	unsigned char *p;
	size_t size, cut, len;
	char text[64];
	int n;

	peer_start("a.example");
	tls_handshake(s);
	for (cut = 1; cut < 80; cut++) {
		at("a cut at %zu", cut);
		CHECK(session_rests(s));
		mine = s->rec;
		records_return(s);
		CHECK_INT(records_pool.lent, 0);
		memset(mine->side[0].ibuf, 0xdb, sizeof mine->side[0].ibuf);   /* another's bytes */
		memset(mine->side[0].obuf, 0xdb, sizeof mine->side[0].obuf);
		CHECK(records_borrow(session_make(1)));         /* and another has it */
		CHECK(records_borrow(s) && s->rec != mine);
		CHECK(session_rests(s));
		p = br_ssl_engine_sendapp_buf(eng, &len);
		CHECK(p >= s->rec->side[0].obuf &&
			p + len <= s->rec->side[0].obuf + sizeof s->rec->side[0].obuf);
		n = sprintf(text, "message %zu of the client, padded", cut);
		app_write(&peer.eng, text, (size_t)n);
		CHECK(br_ssl_engine_sendrec_buf(&peer.eng, &size) != NULL);
		CHECK_INT(records_move(&peer.eng, eng, cut), cut < size ? cut : size);
		CHECK(!session_rests(s));
		records_move(&peer.eng, eng, SIZE_MAX);
		CHECK(!session_rests(s));
		check_app_read(eng, text, (size_t)n);
		CHECK(session_rests(s));

		n = sprintf(text, "answer %zu", cut);
		app_write(eng, text, (size_t)n);
		CHECK(!session_rests(s));
		CHECK_INT(records_move(eng, &peer.eng, 3), 3);
		CHECK(!session_rests(s));
		records_move(eng, &peer.eng, SIZE_MAX);
		check_app_read(&peer.eng, text, (size_t)n);
		CHECK(session_rests(s));
		s->client.end = 1;                         /* a byte was read ahead */
		CHECK(!session_rests(s));
		s->client.end = 0;
		CHECK(leg_readable(&s->client, &len) == NULL);
		records_return(&sessions[1]);
	}
}

/* The largest records both ways through buffers that were just lent. */
static void test_tls_full_records(void)
{
	static char text[16384];
	struct session *s = tls_session();
	size_t room, i;

	peer_start("a.example");
	tls_handshake(s);
	for (i = 0; i < 20; i++) {
		memset(text, 'a' + (int)i, sizeof text);
		records_return(s);
		CHECK(records_borrow(s));
		CHECK(br_ssl_engine_sendapp_buf(&s->tls.eng, &room) != NULL);
		CHECK_INT(room, 16384);
		app_write(&s->tls.eng, text, sizeof text);
		records_move(&s->tls.eng, &peer.eng, SIZE_MAX);
		check_app_read(&peer.eng, text, sizeof text);
		records_return(s);
		CHECK(records_borrow(s));
		CHECK(br_ssl_engine_sendapp_buf(&peer.eng, &room) != NULL);
		app_write(&peer.eng, text, room);
		records_move(&peer.eng, &s->tls.eng, SIZE_MAX);
		check_app_read(&s->tls.eng, text, room);
		CHECK(session_rests(s));
	}
}

/* The certificate is the one for the server name asked for, the default for all others. */
static void test_tls_names(void)
{
	static const struct { const char *name; int key_type, chain_len; } cases[] = {
		{ "a.example", BR_KEYTYPE_EC, 2 },
		{ "x.b.example", BR_KEYTYPE_RSA, 1 },
		{ "X.B.EXAMPLE", BR_KEYTYPE_RSA, 1 },
		{ "y.b.example", BR_KEYTYPE_EC, 1 },    /* its own before the one with a star */
		{ "b.example", BR_KEYTYPE_EC, 2 },
		{ "x.y.b.example", BR_KEYTYPE_EC, 2 },
		{ "192.0.2.1", BR_KEYTYPE_EC, 2 },
		{ NULL, BR_KEYTYPE_EC, 2 },
	};
	br_ssl_session_parameters p;
	struct session *s;
	size_t i;

	for (i = 0; i < COUNT(cases); i++) {
		at("name %s", cases[i].name ? cases[i].name : "(none)");
		s = tls_session();
		peer_start(cases[i].name);
		tls_handshake(s);
		CHECK_INT(peer_trust.u.first.known.pkey.key_type,
			cases[i].key_type);
		CHECK_INT(peer_certs, cases[i].chain_len);
		br_ssl_engine_get_session_parameters(&s->tls.eng, &p);
		CHECK_INT(p.version, BR_TLS12);
		CHECK(suite_find(p.cipher_suite) >= 0);
		CHECK_INT(keyring->users, 0);
		records_return(s);
	}
}

/* Each number that can come has its alert, as RFC 5246 7.2.2 and those of the extensions have it,
 * and a word of its kind. */
static void test_faults(void)
{
	static const struct { int error, alert; const char *word; enum why why; } want[] = {
		{ BR_ERR_BAD_PARAM, 50, "malformed", WHY_TLS_ERROR },
		{ BR_ERR_UNSUPPORTED_VERSION, 70, "tls-version", WHY_TLS_VERSION },
		{ BR_ERR_BAD_VERSION, 70, "tls-version", WHY_TLS_VERSION },
		{ BR_ERR_BAD_LENGTH, 22, "record-length", WHY_TLS_ERROR },
		{ BR_ERR_TOO_LARGE, 22, "record-length", WHY_TLS_ERROR },
		{ BR_ERR_BAD_MAC, 20, "bad-mac", WHY_TLS_ERROR },
		{ BR_ERR_NO_RANDOM, 80, "no-random", WHY_NO_RANDOM },
		{ BR_ERR_UNEXPECTED, 10, "unexpected-message", WHY_TLS_ERROR },
		{ BR_ERR_BAD_CCS, 10, "unexpected-message", WHY_TLS_ERROR },
		{ BR_ERR_BAD_HANDSHAKE, 50, "malformed", WHY_TLS_ERROR },
		{ BR_ERR_OVERSIZED_ID, 50, "malformed", WHY_TLS_ERROR },
		{ BR_ERR_BAD_CIPHER_SUITE, 47, "tls-cipher", WHY_TLS_CIPHER },
		{ BR_ERR_BAD_COMPRESSION, 47, "illegal-parameter", WHY_TLS_ERROR },
		{ BR_ERR_BAD_FRAGLEN, 47, "illegal-parameter", WHY_TLS_ERROR },
		{ BR_ERR_BAD_SECRENEG, 40, "renegotiation", WHY_TLS_ERROR },
		{ BR_ERR_EXTRA_EXTENSION, 110, "extra-extension", WHY_TLS_ERROR },
		{ BR_ERR_BAD_SNI, 50, "malformed", WHY_TLS_ERROR },
		{ BR_ERR_BAD_HELLO_DONE, 50, "malformed", WHY_TLS_ERROR },
		{ BR_ERR_LIMIT_EXCEEDED, 80, "large-key", WHY_TLS_ERROR },
		{ BR_ERR_BAD_FINISHED, 51, "bad-finished", WHY_TLS_ERROR },
		{ BR_ERR_RESUME_MISMATCH, 47, "resume-mismatch", WHY_TLS_ERROR },
		{ BR_ERR_INVALID_ALGORITHM, 47, "bad-algorithm", WHY_TLS_ERROR },
		{ BR_ERR_BAD_SIGNATURE, 51, "bad-signature", WHY_TLS_ERROR },
		{ BR_ERR_WRONG_KEY_USAGE, 43, "key-usage", WHY_CLIENT_CERT },
		{ BR_ERR_NO_CLIENT_AUTH, 40, "no-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_INVALID_VALUE, 42, "bad-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_BAD_DN, 42, "bad-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_BAD_TIME, 42, "bad-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_UNSUPPORTED, 43, "unsupported-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_WRONG_KEY_TYPE, 43, "unsupported-certificate", WHY_CLIENT_CERT },
		{ BR_ERR_X509_BAD_SIGNATURE, 42, "bad-signature", WHY_CLIENT_CERT },
		{ BR_ERR_X509_EXPIRED, 45, "expired", WHY_CLIENT_CERT },
		{ BR_ERR_X509_DN_MISMATCH, 42, "bad-dn", WHY_CLIENT_CERT },
		{ BR_ERR_X509_BAD_SERVER_NAME, 42, "name-mismatch", WHY_CLIENT_CERT },
		{ BR_ERR_X509_CRITICAL_EXTENSION, 43, "critical-extension", WHY_CLIENT_CERT },
		{ BR_ERR_X509_NOT_CA, 48, "not-ca", WHY_CLIENT_CERT },
		{ BR_ERR_X509_FORBIDDEN_KEY_USAGE, 43, "key-usage", WHY_CLIENT_CERT },
		{ BR_ERR_X509_WEAK_PUBLIC_KEY, 42, "weak-key", WHY_CLIENT_CERT },
		{ BR_ERR_X509_NOT_TRUSTED, 48, "unknown-ca", WHY_CLIENT_CERT },
		{ BR_ERR_RECV_FATAL_ALERT + 10, 0, NULL, WHY_TLS_ALERT },
		{ BR_ERR_RECV_FATAL_ALERT + 41, 0, "certificate-refused", WHY_TLS_ALERT },
		{ BR_ERR_RECV_FATAL_ALERT + 49, 0, "certificate-refused", WHY_TLS_ALERT },
		{ BR_ERR_RECV_FATAL_ALERT + 50, 0, NULL, WHY_TLS_ALERT },
		{ BR_ERR_RECV_FATAL_ALERT + 116, 0, "certificate-refused", WHY_TLS_ALERT },
		{ BR_ERR_RECV_FATAL_ALERT + 255, 0, NULL, WHY_TLS_ALERT },
		{ BR_ERR_SEND_FATAL_ALERT + 40, 0, "tls-cipher", WHY_TLS_CIPHER },
		{ BR_ERR_SEND_FATAL_ALERT + 70, 0, "tls-version", WHY_TLS_VERSION },
		{ BR_ERR_SEND_FATAL_ALERT + 86, 0, "tls-version", WHY_TLS_VERSION },
		{ BR_ERR_SEND_FATAL_ALERT + 120, 0, "alpn", WHY_ALPN },
	};
	size_t i;

	for (i = 1; i < COUNT(faults); i++)
		CHECK(faults[i].last > faults[i - 1].last);
	for (i = 0; i < COUNT(want); i++) {
		const struct fault *f = fault_find(want[i].error);

		at("error %d", want[i].error);
		CHECK_INT(f->alert, want[i].alert);
		CHECK_STR(f->word ? f->word : "", want[i].word ? want[i].word : "");
		CHECK_STR(whys[f->why].text, whys[want[i].why].text);
	}
}

/* Why the log says that the handshake with this client failed. */
static const char *tls_refused(struct session *s)
{
	br_ssl_engine_context *eng = &s->tls.eng;
	size_t n;

	CHECK_INT(br_ssl_client_reset(&peer, "a.example", 0), 1);
	records_pump(s);
	while (br_ssl_engine_sendrec_buf(eng, &n) != NULL)      /* what the client is too cross to read */
		br_ssl_engine_sendrec_ack(eng, n);
	CHECK_INT(br_ssl_engine_current_state(eng), BR_SSL_CLOSED);
	return whys[fault_find(leg_fault(s, &s->client))->why].text;
}

/* A client that has none of our suites, or only older versions, gets no further. */
static void test_tls_refused(void)
{
	static const uint16_t other[] = { BR_TLS_RSA_WITH_AES_128_CBC_SHA };
	static const char *h2[] = { "h2" };
	struct session *s = tls_session();

	peer_start("a.example");
	br_ssl_engine_set_suites(&peer.eng, other, 1);
	CHECK_STR(tls_refused(s), "tls-cipher");
	s = tls_session();
	peer_start("a.example");
	br_ssl_engine_set_versions(&peer.eng, BR_TLS10, BR_TLS11);
	CHECK_STR(tls_refused(s), "tls-version");
	s = tls_session();
	peer_start("a.example");
	br_ssl_engine_set_protocol_names(&peer.eng, h2, 1);
	CHECK_STR(tls_refused(s), "alpn");
}

/* The look into a ClientHello stays within what is there, whatever length the record claims. */
static void test_hello_short(void)
{
	static const unsigned char types[] = { 22, 21, 23, 0 };
	static const size_t claims[] = { 39, 64, 200, 16384, READ_AHEAD, 65535 };
	unsigned char hello[64] = { 0 };
	struct bytes name;
	const unsigned char *p;
	size_t i, k, n;

	for (i = 0; i < COUNT(types); i++)
		for (k = 0; k < COUNT(claims); k++)
			for (n = 1; n <= sizeof hello; n++) {
				at("type %u, %zu bytes claimed, %zu there", types[i], claims[k], n);
				hello[0] = types[i];
				hello[3] = (unsigned char)(claims[k] >> 8);
				hello[4] = (unsigned char)claims[k];
				hello[7] = (unsigned char)((claims[k] - 4) >> 8);
				hello[8] = (unsigned char)(claims[k] - 4);
				p = (unsigned char *)guard_copy(&input, hello, n);
				if (hello_read((struct bytes){ p, p + n }, &name))
					CHECK(claims[k] + 5 <= n);
				CHECK(name.p == name.end);
			}
}

/* A ClientHello in a record of its own, with these extensions; `tail` bytes behind belong to no list. */
static size_t hello_make(unsigned char *out, const char *extensions, size_t len, size_t tail)
{
	const size_t all = 2 + 32 + 1 + 32 + 4 + 2 + 2 + len + tail;

	memset(out, 0, 5 + 4 + all);
	memcpy(out, "\x16\x03\x01", 3);
	out[3] = (unsigned char)((all + 4) >> 8);
	out[4] = (unsigned char)(all + 4);
	out[5] = 1;
	out[7] = (unsigned char)(all >> 8);
	out[8] = (unsigned char)all;
	memcpy(out + 9, "\x03\x03", 2);
	out[43] = 32;                                           /* session ID */
	memcpy(out + 76, "\0\x02\xc0\x2b\x01\0", 6);            /* a suite, no compression */
	out[82] = (unsigned char)(len >> 8);
	out[83] = (unsigned char)len;
	memcpy(out + 84, extensions, len);
	return 5 + 4 + all;
}

static int hello_good(const unsigned char *p, size_t len, struct bytes *name)
{
	p = (unsigned char *)guard_copy(&input, p, len);
	return hello_read((struct bytes){ p, p + len }, name);
}

#define SNI(extension, list, type, name, text) \
	"\0\0\0" extension "\0" list type "\0" name text
#define SNI_A SNI("\x0e", "\x0c", "\0", "\x09", "a.example")
#define ALPN(extension, list, names) "\0\x10\0" extension "\0" list names
#define ALPN_H1 ALPN("\x0b", "\x09", "\x08http/1.1")
#define ALPN_H2 ALPN("\x05", "\x03", "\x02h2")

/* Who may resume is who certainly says nothing that BearSSL would have to check then. */
static void test_hello_resumes(void)
{
	static const struct {
		const char *bytes;
		size_t len;
		int good;
		const char *name;       /* NULL: whatever */
	} hellos[] = {
		{ LIT(""), 1, "" },
		{ LIT(SNI_A), 1, "a.example" },
		{ LIT("\0\x17\0\0" SNI_A ALPN_H1 "\xff\x01\0\x01\0"), 1, "a.example" },
		{ LIT(ALPN_H1 SNI_A), 1, "a.example" },
		{ LIT(ALPN("\x0e", "\x0c", "\x02h2\x08http/1.1")), 1, "" },
		{ LIT(ALPN("\x0e", "\x0c", "\x08http/1.1\x02h2")), 1, "" },
		/* protocols without ours, or none */
		{ LIT(ALPN_H2), 0, "" },
		{ LIT(ALPN("\x0b", "\x09", "\x08http/1.0")), 0, "" },
		{ LIT(ALPN("\x0b", "\x09", "\x08HTTP/1.1")), 0, "" },
		{ LIT(ALPN("\x0c", "\x0a", "\x09http/1.1\0")), 0, "" },
		{ LIT(ALPN("\x02", "\0", "")), 0, "" },
		{ LIT("\0\x10\0\0"), 0, "" },
		/* said twice: the protocols are ours whichever counts, or not; and which name does? */
		{ LIT(ALPN_H1 ALPN_H2), 0, "" }, { LIT(ALPN_H2 ALPN_H1), 0, "" },
		{ LIT(ALPN_H1 ALPN_H1), 1, "" }, { LIT(SNI_A SNI_A), 0, NULL },
		/* lists that end amid a name, before their extension or behind it */
		{ LIT(ALPN("\x0b", "\x09", "\x09http/1.1")), 0, "" },
		{ LIT(ALPN("\x0b", "\x08", "\x08http/1.1")), 0, "" },
		{ LIT(ALPN("\x0b", "\x0a", "\x08http/1.1")), 0, "" },
		{ LIT(ALPN("\x0c", "\x09", "\x08http/1.1\0")), 0, "" },
		{ LIT(ALPN("\x0c", "\x0a", "\x08http/1.1\0")), 1, "" },        /* an empty name */
		{ LIT(ALPN("\x0c", "\x09", "\x08http/1.1")), 0, "" },
		{ LIT(ALPN_H1 "\0"), 0, "" }, { LIT(ALPN_H1 "\0\x17\0"), 0, "" },
		/* names of another type, two of them, none, cut */
		{ LIT(SNI("\x0e", "\x0c", "\x01", "\x09", "a.example")), 0, NULL },
		{ LIT(SNI("\x12", "\x10", "\0", "\x09", "a.example\0\0\x01" "b")), 0, NULL },
		{ LIT("\0\0\0\x02\0\0"), 0, NULL },
		{ LIT(SNI("\x0e", "\x0c", "\0", "\x0a", "a.example")), 0, NULL },
		{ LIT(SNI("\x0e", "\x0d", "\0", "\x09", "a.example")), 0, NULL },
	};
	unsigned char out[256];
	struct bytes name;
	size_t i, k, n;

	for (i = 0; i < COUNT(hellos); i++) {
		at("hello %zu", i);
		n = hello_make(out, hellos[i].bytes, hellos[i].len, 1);
		CHECK(!hello_good(out, n, &name));
		n = hello_make(out, hellos[i].bytes, hellos[i].len, 0);
		for (k = 0; k < n; k++)
			CHECK(!hello_good(out, k, &name));
		CHECK_INT(hello_good(out, n, &name), hellos[i].good);
		if (!hellos[i].name)
			continue;
		CHECK_INT(name.end - name.p, (long)strlen(hellos[i].name));
		CHECK(!*hellos[i].name ||
			memcmp(name.p, hellos[i].name, strlen(hellos[i].name)) == 0);
	}
	n = hello_make(out, LIT(SNI_A), 0);
	CHECK(hello_good(out, n + 7, &name));              /* another record behind it */
	CHECK(!hello_good(out, n - 1, &name));
	out[0] = 21;                                    /* other records, other messages, */
	CHECK(!hello_good(out, n, &name));
	out[0] = 22;
	out[5] = 2;
	CHECK(!hello_good(out, n, &name));
	out[5] = 1;
	out[4]++;                                       /* more than one message */
	CHECK(!hello_good(out, n + 1, &name));
}

/* Of those whose handshake waits for its turn, who has begun goes before who has not; and the last two
 * records of a client take no turn of their own: two steps make a handshake. */
static void test_turns_finish(void)
{
	struct session *s = tls_session(), *other;
	int ends[2];
	unsigned i;
	size_t n;
	unsigned char *p;

	for (i = 1; i <= 3; i++) {
		other = session_make(i);
		other->state = HANDSHAKE;
		session_resume(other);
	}
	CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends), 0);
	s->state = HANDSHAKE;
	s->client.fd = ends[0];
	s->client.left = SHARE;
	peer_start("a.example");
	for (i = 0; i < 2; i++) {
		/* all that the client has to say now */
		s->client.at = s->client.end = 0;
		while ((p = br_ssl_engine_sendrec_buf(&peer.eng, &n)) != NULL) {
			memcpy(s->client.ahead + s->client.end, p, n);
			s->client.end += n;
			br_ssl_engine_sendrec_ack(&peer.eng, n);
		}
		session_resume(s);
		CHECK(turns[0].next == &s->wait && turns[0].prev == &s->wait);
		link_drop(&s->wait);
		s->client.full = 0;
		CHECK_INT(leg_handshake(s, &s->client), (int)i);
		CHECK(link_alone(&s->wait));
		while ((p = br_ssl_engine_recvrec_buf(&peer.eng, &n)) != NULL && i == 0) {
			ssize_t got = recv(ends[1], p, n, 0);

			if (got <= 0)
				break;
			br_ssl_engine_recvrec_ack(&peer.eng, (size_t)got);
		}
	}
	CHECK(turns[1].next == &sessions[1].wait && turns[1].prev == &sessions[3].wait);
	CHECK(link_alone(&turns[0]));
	for (i = 1; i <= 3; i++)
		link_drop(&sessions[i].wait);
	close(ends[0]);
	close(ends[1]);
}

/* An engine that was closed over plaintext that nobody took never moves again: that is no fault of a
 * side that was told the end, and what it still sends is thrown away. */
static void test_tls_closed_full(void)
{
	struct session *s = tls_session();
	struct leg *l = &s->client;
	int pair[2];
	size_t len;

	peer_start("a.example");
	tls_handshake(s);
	app_write(&peer.eng, "hello", 5);
	records_move(&peer.eng, &s->tls.eng, SIZE_MAX);
	CHECK(leg_readable(l, &len) != NULL);
	br_ssl_engine_close(&s->tls.eng);
	while (br_ssl_engine_sendrec_buf(&s->tls.eng, &len) != NULL)
		br_ssl_engine_sendrec_ack(&s->tls.eng, len);
	CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), 0);
	l->fd = pair[0];
	l->fin = l->in = 1;
	l->left = SHARE;
	CHECK_INT(send(pair[1], "more", 4, 0), 4);
	leg_fill(s, l);
	CHECK(!s->broken && !l->eof);
	CHECK_INT(recv(pair[0], &len, sizeof len, 0), -1);
	close(pair[1]);
	l->in = 1;
	leg_fill(s, l);
	CHECK(!s->broken && l->eof);
	l->fin = 0;
	leg_fill(s, l);
	CHECK(s->broken);
	s->broken = 0;
	l->fin = 1;
	s->state = EXCHANGE;                    /* what comes would be missing in an answer */
	leg_fill(s, l);
	CHECK(s->broken);
}

/* An engine that has to refuse a renegotiation, and can't say so to a side that takes no more, reads
 * nothing either. */
static void test_tls_stuck(void)
{
	struct session *s = tls_session();
	struct leg l = { .fd = -1, .eng = &peer.eng };
	int i;

	peer_start("a.example");
	br_ssl_engine_add_flags(&peer.eng, BR_OPT_NO_RENEGOTIATION);
	tls_handshake(s);
	app_write(&peer.eng, "hello", 5);
	s->tls.eng.record_type_out = 22;
	for (i = 0; i < 2; i++) {
		CHECK(!leg_stuck(&l));
		app_write(&s->tls.eng, "\0\0\0", 4);   /* HelloRequest */
		records_move(&s->tls.eng, &peer.eng, SIZE_MAX);
	}
	CHECK_INT(br_ssl_engine_current_state(&peer.eng), BR_SSL_SENDREC);
	CHECK(!leg_stuck(&l));
	l.fin = 1;
	CHECK(leg_stuck(&l));
}

/* A backend that ends amid a handshake message leaves an engine that takes nothing and asks for
 * what never comes: it is done with. */
static void test_tls_ended_amid_message(void)
{
	static const unsigned char types[] = { 22, 23 };
	struct leg l = { .fd = -1, .eng = &peer.eng };
	size_t i, len;

	for (i = 0; i < COUNT(types); i++) {
		struct session *s = tls_session();

		at("record type %u", types[i]);
		peer_start("a.example");
		tls_handshake(s);
		s->tls.eng.record_type_out = types[i];
		app_write(&s->tls.eng, "", 1);
		records_move(&s->tls.eng, &peer.eng, SIZE_MAX);
		if (types[i] == 23)
			check_app_read(&peer.eng, "", 1);
		l.eof = 0;
		CHECK(!leg_over(&l));
		l.eof = 1;
		CHECK_INT(leg_over(&l), types[i] == 22);
		CHECK_INT(br_ssl_engine_sendapp_buf(&peer.eng, &len) == NULL, types[i] == 22);
	}
}

/* An answer without a length that a backend's FIN cuts off is not whole, whoever had ended before. */
static void test_tls_answer_cut(void)
{
	struct session *s = tls_session();
	int first;

	peer_start("a.example");
	tls_handshake(s);
	for (first = 0; first < 2; first++) {
		at("the client ended before: %d", first);
		s->state = EXCHANGE;
		s->framing = BODY_EOF;
		s->why = first ? WHY_EOF : WHY_NONE;
		s->broken = 0;
		s->backend.eng = &peer.eng;
		s->backend.eof = 0;
		leg_ended(s, &s->backend);
		CHECK(s->backend.eof && s->broken);
		CHECK_INT(s->why, first ? WHY_EOF : WHY_SHORT);
	}
}

/* ---- pinned and unverified certificates ---- */

/* What the judge of the unverified says of a chain that comes in pieces of that size. */
static unsigned judge(const char *pem, size_t piece)
{
	static struct verifier v;
	const br_x509_class **ctx = &v.u.first.known.vtable;
	size_t i, at_byte, n;

	verifier_first(&v, &peer.eng, NULL);
	identity.chain_len = 0;
	if (*pem != '\0')
		CHECK_GOOD(chain_of(pem));
	(*ctx)->start_chain(ctx, "any.example");
	for (i = 0; i < identity.chain_len; i++) {
		(*ctx)->start_cert(ctx, (uint32_t)identity.chain[i].data_len);
		for (at_byte = 0; at_byte < identity.chain[i].data_len; at_byte += n) {
			n = identity.chain[i].data_len - at_byte;
			n = n < piece ? n : piece;
			(*ctx)->append(ctx, identity.chain[i].data + at_byte, n);
		}
		(*ctx)->end_cert(ctx);
	}
	return (*ctx)->end_chain(ctx);
}

static void test_unverified(void)
{
	size_t piece;

	for (piece = 1; piece < 5000; piece *= 7) {
		at("pieces of %zu", piece);
		CHECK_INT(judge(PEM_EC_CERT, piece), 0);
		CHECK_INT(judge(PEM_RSA_CERT PEM_EC_CERT, piece), 0);
		CHECK(judge("", piece) != 0);
	}
}

/* Who has the pinned key is believed; another, of the same kind or not, is told from it by what it
 * has signed, or can't sign. Of two certificates the first is the one of the key that signs. */
static void test_pinned(void)
{
	static const struct { const char *pin, *name; int error; } cases[] = {
		{ PEM_EC_CERT, "a.example", 0 },
		{ PEM_EC2_CERT, "a.example", BR_ERR_BAD_SIGNATURE },
		{ PEM_P384_CERT, "a.example", BR_ERR_BAD_SIGNATURE },
		{ PEM_RSA_CERT, "a.example", BR_ERR_WRONG_KEY_USAGE },
		{ PEM_RSA_CERT, "x.b.example", 0 },
		{ PEM_RSA4096_CERT, "x.b.example", BR_ERR_BAD_SIGNATURE },
		{ PEM_EC_CERT, "x.b.example", BR_ERR_WRONG_KEY_USAGE },
	};
	struct keyring *ring;
	struct session *s;
	size_t i;

	for (i = 0; i < COUNT(cases); i++) {
		at("case %zu", i);
		ring = ring_empty();
		CHECK_GOOD(anchors_of(ring, cases[i].pin));
		s = tls_session();
		peer_start(cases[i].name);
		verifier_first(&peer_trust, &peer.eng, &ring->anchor[0].pkey);
		records_pump(s);
		CHECK_INT(br_ssl_engine_last_error(&peer.eng), cases[i].error);
		CHECK(cases[i].error != 0 ||
			(br_ssl_engine_current_state(&peer.eng) & BR_SSL_SENDAPP));
		tls_ring_release(s);
		records_return(s);
	}
}

/* A chain that goes on for ever, each of which signed the one before, costs no more than CHAIN_MAX
 * signatures. */
static void test_chain_long(void)
{
	static struct verifier v;
	struct keyring *ring = ring_empty();
	const struct trust none = { .count = 0 };
	const br_x509_class **ctx = &v.u.minimal.vtable;
	size_t i, n;

	CHECK_GOOD(chain_of(PEM_EC_CERT));
	for (n = CHAIN_MAX - 1; n <= CHAIN_MAX + 1; n++) {
		at("%zu certificates", n);
		verifier_chain(&v, &peer.eng, ring, &none);
		(*ctx)->start_chain(ctx, "");
		for (i = 0; i < n; i++) {
			(*ctx)->start_cert(ctx, (uint32_t)identity.chain[0].data_len);
			(*ctx)->append(ctx, identity.chain[0].data, identity.chain[0].data_len);
			(*ctx)->end_cert(ctx);
		}
		CHECK_INT((*ctx)->end_chain(ctx), n <= CHAIN_MAX ? BR_ERR_X509_NOT_TRUSTED :
			BR_ERR_X509_TRUNCATED);
	}
}

/* A CBC record of odd length, which BearSSL 0.6 lets through: the block ciphers that are set by
 * default touch nothing behind the buffer. */
static void test_cbc_odd(void)
{
	static struct guard ibuf;
	static const unsigned char key[20] = { 1 };
	static br_ssl_client_context c;
	br_sslrec_in_cbc_context in;
	size_t len, cut, room = BR_SSL_BUFSIZE_INPUT - 5;
	unsigned char *p;

	br_ssl_engine_set_default_aes_cbc(&c.eng);
	for (len = 1; len <= room; len += len < 200 || len > room - 200 ? 1 : 97) {
		br_sslrec_in_cbc_vtable.init(&in.vtable, c.eng.iaes_cbcdec, key, 16, &br_sha1_vtable,
			key, 20, 20, NULL);
		if (!in.vtable->inner.check_length((const br_sslrec_in_class *const *)&in.vtable, len))
			continue;
		p = (unsigned char *)guard_room(&ibuf, room);
		cut = len;
		CHECK(in.vtable->inner.decrypt((const br_sslrec_in_class **)&in.vtable, 23, BR_TLS11, p,
			&cut) == NULL);
	}
}

/* A certificate with more behind it than its own bytes, in pieces: what BearSSL's decoder must not be
 * given. */
static void test_unverified_longer(void)
{
	static struct verifier v;
	const br_x509_class **ctx = &v.u.first.known.vtable;
	static unsigned char der[4096];
	size_t piece, len, i, n;

	CHECK_GOOD(chain_of(PEM_EC_CERT));
	len = identity.chain[0].data_len;
	memcpy(der, identity.chain[0].data, len);
	for (piece = 1; piece < sizeof der; piece *= 2) {
		at("pieces of %zu", piece);
		verifier_first(&v, &peer.eng, NULL);
		(*ctx)->start_chain(ctx, "any.example");
		(*ctx)->start_cert(ctx, sizeof der);
		for (i = 0; i < sizeof der; i += n) {
			n = sizeof der - i < piece ? sizeof der - i : piece;
			(*ctx)->append(ctx, der + i, n);
		}
		(*ctx)->end_cert(ctx);
		CHECK((*ctx)->end_chain(ctx) == 0 || i > len);
		CHECK_INT(judge(PEM_EC_CERT, piece), 0);
	}
}

/* One that BearSSL does not know is left out, with a line that says which; not so where there is to
 * be one. */
static void test_anchors_skipped(void)
{
	static const struct { const char *pem, *subject; } odd[] = {
		{ PEM_ED25519_CERT, "Odd\\x20Root" }, { PEM_PSS_CERT, "Odd\\x20Unit" },
		{ PEM_RSA4104_CERT, "-" }, { PEM_NO_CERT, "-" },
	};
	char text[8192], line[300];
	struct keyring *ring;
	size_t i;

	log_open_pipe();
	for (i = 0; i < COUNT(odd); i++) {
		at("certificate %zu", i);
		ring = ring_empty();
		entry_look("backends", 3);
		ring_trust.path = "ca.pem";
		snprintf(text, sizeof text, "%s%s%s", PEM_EC_CERT, odd[i].pem, PEM_RSA_CERT);
		CHECK_GOOD(anchors_of(ring, text));
		CHECK_INT(ring->anchors, 2);
		check_anchor(&ring->anchor[0], PEM_EC_CERT);
		check_anchor(&ring->anchor[1], PEM_RSA_CERT);
		CHECK_INT(ring->kept.len, (char *)ring->anchor[1].pkey.key.rsa.e +
			ring->anchor[1].pkey.key.rsa.elen - ring->bytes);
		CHECK(ring->anchor[1].dn.data == ring->anchor[0].pkey.key.ec.q +
			ring->anchor[0].pkey.key.ec.qlen);
		snprintf(line, sizeof line, "warning backends[3]: ca.pem: subject=%s is skipped: ",
			odd[i].subject);
		CHECK(strncmp(log_read(), line, strlen(line)) == 0);
		CHECK_ERROR(anchors_of(ring_empty(), odd[i].pem));      /* none is left */
		log_read();
		ring = ring_empty();
		ring_trust.one = 1;
		CHECK_ERROR(anchors_of(ring, text));
		CHECK_STR(log_read(), "");
	}
}
