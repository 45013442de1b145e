/* bytes.c - fuzzes the small readers of bytes from outside: the look into a ClientHello, beside
 * BearSSL's own reading of it; names, cookies, paths, addresses; and what goes to the log. The first
 * byte chooses, the rest is the bytes. */
#include <ctype.h>

#include "fuzz.h"

/* ---- ClientHello ---- */

static char seen[sizeof ((br_ssl_engine_context *)0)->server_name];
static int was_seen;            /* the choice was made */

/* BearSSL has read the whole ClientHello: notes what it found, and refuses. */
static int note_choose(const br_ssl_server_policy_class **ctx, const br_ssl_server_context *cc,
	br_ssl_server_choices *choices)
{
	(void)ctx;
	(void)choices;
	snprintf(seen, sizeof seen, "%s", br_ssl_engine_get_server_name(&cc->eng));
	was_seen = 1;
	return 0;
}

static const br_ssl_server_policy_class note_class = { .choose = note_choose };
static const br_ssl_server_policy_class *note = &note_class;

/* Its error. */
static int bearssl_read(const unsigned char *p, size_t len)
{
	static br_ssl_server_context cc;
	static unsigned char buf[BR_SSL_BUFSIZE_BIDI];
	unsigned char *room;
	size_t n;

	br_ssl_server_zero(&cc);
	MUST(engine_make(&cc.eng));
	br_ssl_engine_set_buffer(&cc.eng, buf, sizeof buf, 1);
	br_ssl_server_set_policy(&cc, &note);
	br_ssl_engine_add_flags(&cc.eng, BR_OPT_FAIL_ON_ALPN_MISMATCH);
	MUST(br_ssl_server_reset(&cc));
	was_seen = 0;
	while (len > 0 && (room = br_ssl_engine_recvrec_buf(&cc.eng, &n)) != NULL) {
		n = n < len ? n : len;
		memcpy(room, p, n);
		br_ssl_engine_recvrec_ack(&cc.eng, n);
		p += n;
		len -= n;
	}
	return br_ssl_engine_last_error(&cc.eng);
}

/* Of a hello that may resume, BearSSL reads what we do: the name that the certificate is chosen by (it
 * keeps none that is longer than its buffer or holds a NUL), and our protocol if any is listed. */
static void hello_must(const unsigned char *p, size_t len)
{
	struct bytes name;
	size_t name_len, n, record, whole, last, need;
	int known;

	for (n = whole = 0; n <= len; n++) {
		last = whole;
		whole = records_whole(p, n, &need);
		MUST(whole <= n && whole >= last && (whole > 0 || (need > n && need <= READ_AHEAD)));
	}
	known = hello_read((struct bytes){ p, p + len }, &name);
	name_len = (size_t)(name.end - name.p);
	MUST(name_len == 0 || (name.p > p && name.end <= p + len));
	if (!known)
		return;
	record = 5 + (size_t)(p[3] << 8 | p[4]);
	MUST(bearssl_read(p, record < len ? record : len) != BR_ERR_SEND_FATAL_ALERT + 120);
	if (!was_seen)
		return;
	if (name_len < sizeof seen && !memchr(name.p, 0, name_len))
		MUST(strlen(seen) == name_len && memcmp(seen, name.p, name_len) == 0);
}

/* ---- the rest ---- */

/* Whatever comes in: one word of one line that says exactly what came, as far as there is room. */
static void escape_must(unsigned size, const char *in, size_t len)
{
	char *out = malloc(size), *p, back[3];
	size_t n = 0;

	log_escape(out, size, in, len);
	MUST(memchr(out, '\0', size) != NULL);
	for (p = out; *p; n++) {
		MUST(n < len && isgraph((unsigned char)*p) && *p != '"' && *p != '=');
		if (*p != '\\') {
			MUST(*p++ == in[n]);
			continue;
		}
		MUST(p[1] == 'x' && isxdigit((unsigned char)p[2]) && isxdigit((unsigned char)p[3]));
		snprintf(back, sizeof back, "%.2s", p + 2);
		MUST(strtoul(back, NULL, 16) == (unsigned char)in[n]);
		p += 4;
	}
	MUST(n == len || strlen(out) + 5 > size);
	free(out);
}

/* A NUL-terminated copy of its size. */
static char *text_of(const char *p, size_t len)
{
	char *s = malloc(len + 1);

	memcpy(s, p, len);
	s[len] = '\0';
	return s;
}

static void names_must(const char *p, size_t len)
{
	size_t half = len / 2, i;
	char *pattern = text_of(p, half);
	size_t fits = name_fits(pattern, p + half, len - half, 1);
	size_t lit = name_fits("*.b.example", p, len, 1), below = name_fits("*.b.example", p, len, 0);

	MUST(fits <= strlen(pattern) + 1);
	MUST(below == 0 || below == 11);
	MUST(lit == 0 || lit == below);
	for (i = 0; lit && i + 10 + (p[len - 1] == '.') < len; i++)
		MUST(p[i] != '.');
	if (strlen(pattern) == len - half && half > 0 && memcmp(pattern, p + half, half) == 0 &&
	    strncmp(pattern, "*.", 2) != 0)
		MUST(fits == 1 + half - (pattern[half - 1] == '.'));
	free(pattern);
}

static void paths_must(const char *p, size_t len)
{
	uint64_t set;
	const enum why why = servers_for(p, len / 2, p + len / 2, len - len / 2, &set);
	unsigned i;

	MUST(why == (set ? WHY_NONE : WHY_NO_PATH));    /* backends without a name serve all */
	MUST(servers_for("", 0, p, len, &set) == WHY_NONE);
	for (i = 0; i < BACKENDS; i++)
		if (set >> i & 1)
			MUST(path_under(p, len, backends[i].path ? backends[i].path : ""));
}

static void cookies_must(const char *p, size_t len)
{
	static const char pair[] = "wssproxy=0123456789abcdef";
	char *header = malloc(len + sizeof pair + 2);
	size_t n;

	cookie_has(p, len, pair);
	memcpy(header, p, len);
	n = len + (size_t)sprintf(header + len, "; %s", pair);
	MUST(cookie_has(header, n, pair));
	free(header);
}

static void addresses_must(const char *p, size_t len)
{
	char *host = text_of(p, len);
	struct address a, b;

	if (address_parse(&a, host, "443")) {
		MUST(address_parse(&b, address_format(&a, 0), "443"));
		MUST(memcmp(&a, &b, sizeof a) == 0);
		address_format(&a, 1);
		address_unmap(&a);
		MUST(a.in.sin_port == htons(443));
	}
	if (address_parse(&a, "::1", host))
		MUST(ntohs(a.in.sin_port) == strtoul(host, NULL, 10));
	free(host);
}

/* Host and Origin, and the Location made of a Host. */
static void hosts_must(const char *p, size_t len)
{
	struct span whole = { 0, (uint16_t)(len & 0xfff) }, list = whole, s;
	size_t i;

	if (host_parse(p, whole, &s))
		for (i = 0; i < whole.len; i++)
			MUST(isgraph((unsigned char)p[i]) && !strchr("/?#@\\\"<>", p[i]));
	while (list_next(p, &list, &s))
		MUST(s.len > 0 && s.at + s.len <= whole.len && !memchr(p + s.at, ',', s.len) &&
			p[s.at] != ' ' && p[s.at + s.len - 1] != ' ');
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	suites_init();
	servers_init();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	unsigned which = input_byte(&in);
	size_t len;
	char *buf = input_rest(&in, &len);

	switch (which % 7) {
	case 0: hello_must((unsigned char *)buf, len); break;
	case 1: escape_must(which + 1, buf, len); break;
	case 2: names_must(buf, len); break;
	case 3: paths_must(buf, len); break;
	case 4: cookies_must(buf, len); break;
	case 5: addresses_must(buf, len); break;
	default: hosts_must(buf, len); break;
	}
	free(buf);
	return 0;
}
