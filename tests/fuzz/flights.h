/* flights.h - handshake messages in the clear: what hellos say, and how the input edits them. */

#define LIT(s)  (s), sizeof(s) - 1

enum {
	FLIGHT = 8192,          /* bytes that are said at once */
	EDITS_MAX = 24,
	FIXED = 4 + 2 + 32,     /* of a hello, up to its session ID */
};

enum alpn { ALPN_NONE, ALPN_HTTP11, ALPN_LACKING, ALPN_BROKEN };

struct flight {                 /* messages under way */
	unsigned char b[FLIGHT];
	size_t len;
	size_t split;           /* bytes of a record, 0: all */
	unsigned before;        /* bits: fronts[], and a HelloRequest */
};

static struct input script;

/* ---- what hellos say ---- */

/* A number of so many bytes. */
static size_t number(const unsigned char *p, unsigned bytes)
{
	size_t n = 0;

	while (bytes-- > 0)
		n = n << 8 | *p++;
	return n;
}

static void number_add(unsigned char *p, unsigned bytes, size_t more)
{
	for (more += number(p, bytes); bytes-- > 0; more >>= 8)
		p[bytes] = (unsigned char)more;
}

/* Where a hello's extensions are, with their length in front. 0: nowhere. */
static size_t exts_find(const unsigned char *p, size_t len)
{
	size_t at = FIXED;

	if (len < FIXED + 1 || (p[0] != 1 && p[0] != 2))
		return 0;
	at += 1u + p[at];
	if (p[0] == 1) {
		at += at + 2 <= len ? 2 + number(p + at, 2) : len;
		at += at + 1 <= len ? 1u + p[at] : len;
	} else {
		at += 3;
	}
	return at <= len ? at : 0;
}

static enum alpn alpn_list(const unsigned char *p, size_t len)
{
	static const char name[] = "\x08http/1.1";
	enum alpn a = ALPN_LACKING;
	size_t n;

	if (len < 2 || number(p, 2) != len - 2)
		return ALPN_BROKEN;
	for (p += 2, len -= 2; len > 0; p += n, len -= n) {
		if ((n = 1u + p[0]) > len)
			return ALPN_BROKEN;
		if (n == sizeof name - 1 && memcmp(p, name, n) == 0)
			a = ALPN_HTTP11;
	}
	return a;
}

/* What a ClientHello comes to, of several lists the last. */
static enum alpn alpn_find(const unsigned char *p, size_t len)
{
	enum alpn a = ALPN_NONE;
	size_t at, n;

	for (; len >= 4 && number(p, 4) == 0; p += 4, len -= 4)
		;       /* HelloRequests, which both sides pass over */
	if (len < 4 || p[0] != 1 || number(p + 1, 3) > len - 4)
		return ALPN_BROKEN;
	len = 4 + number(p + 1, 3);
	if ((at = exts_find(p, len)) == len)
		return ALPN_NONE;
	if (at == 0 || at + 2 > len || number(p + at, 2) != len - at - 2)
		return ALPN_BROKEN;
	for (at += 2; at < len; at += n) {
		if (at + 4 > len || (n = 4 + number(p + at + 2, 2)) > len - at)
			return ALPN_BROKEN;
		if (number(p + at, 2) == 16 && (a = alpn_list(p + at + 4, n - 4)) == ALPN_BROKEN)
			return a;
	}
	return a;
}

/* ---- edits ---- */

/* Puts bytes in the place of others. */
static int bytes_put(struct flight *f, size_t at, size_t old, const void *new, size_t len)
{
	if (at > f->len || old > f->len - at || f->len - old + len > sizeof f->b)
		return 0;
	memmove(f->b + at + len, f->b + at + old, f->len - at - old);
	memcpy(f->b + at, new, len);
	f->len += len - old;
	return 1;
}

/* The same in the first message at or behind its extensions' length, which is kept right. */
static void exts_put(struct flight *f, size_t at, size_t old, const void *new, size_t len)
{
	size_t exts = exts_find(f->b, f->len);

	if (exts == 0 || at < exts || !bytes_put(f, at, old, new, len))
		return;
	number_add(f->b + 1, 3, len - old);
	if (at > exts)
		number_add(f->b + exts, 2, len - old);
}

/* The extension of that number, from its type on, and its length. 0: there is none. */
static size_t ext_at(const struct flight *f, unsigned nth, size_t *len)
{
	size_t at = exts_find(f->b, f->len), end, n = 0, first = at + 2;

	if (at == 0 || at + 2 > f->len || (end = at + 2 + number(f->b + at, 2)) > f->len)
		return 0;
	for (at = first; at + 4 <= end; at += *len, n++) {
		*len = 4 + number(f->b + at + 2, 2);
		if (*len > end - at)
			return 0;
		if (n == nth)
			return at;
	}
	return n > 0 ? ext_at(f, nth % (unsigned)n, len) : 0;
}

/* At the end of all, after those of its type have gone if it comes in their place. */
static void ext_put(struct flight *f, const void *ext, size_t len, int instead)
{
	const unsigned char *e = ext;
	size_t at = exts_find(f->b, f->len), n;
	unsigned i = 0;

	if (at > 0 && at + 2 > (size_t)4 + number(f->b + 1, 3))
		exts_put(f, at, 0, "\0", 2);
	for (; instead && (at = ext_at(f, i, &n)) > 0 && i < 64; i++)
		if (memcmp(f->b + at, e, 2) == 0)
			exts_put(f, at, n, "", 0), i = (unsigned)-1;
	if ((at = exts_find(f->b, f->len)) > 0 && at + 2 <= f->len)
		exts_put(f, at + 2 + number(f->b + at, 2), 0, ext, len);
}

static const struct { const char *text; size_t len; } spare[] = {
	{ LIT("\0\x10\0\x0b\0\x09\x08http/1.1") },
	{ LIT("\0\x10\0\x05\0\x03\x02h2") },
	{ LIT("\0\x10\0\x0e\0\x0c\x02h2\x08http/1.1") },
	{ LIT("\0\x10\0\x0e\0\x0c\x08http/1.1\x02h2") },
	{ LIT("\0\x10\0\x02\0\0") },                    /* no names */
	{ LIT("\0\x10\0\0") },                          /* not even a list */
	{ LIT("\0\x10\0\x03\0\x01\0") },                /* an empty name */
	{ LIT("\0\x10\0\x0b\0\x09\x09http/1.1") },      /* past the end */
	{ LIT("\0\x10\0\x0c\0\x09\x08http/1.1\0") },    /* bytes behind */
	{ LIT("\0\x10\0\x0b\0\x0a\x08http/1.1") },
	{ LIT("\0\x10\0\x0b\0\x09\x08HTTP/1.1") },
	{ LIT("\0\x10\0\x0c\0\x0a\x09http/1.1\0") },
	{ LIT("\0\0\0\x0e\0\x0c\0\0\x09" "a.example") },
	{ LIT("\0\0\0\x0f\0\x0d\0\0\x0a" "a.example.") },
	{ LIT("\0\0\0\x10\0\x0e\0\0\x0b" "x.b.example") },
	{ LIT("\0\0\0\x10\0\x0e\0\0\x0b" "y.b.example") },
	{ LIT("\0\0\0\x10\0\x0e\0\0\x0b" "Y.B.EXAMPLE") },
	{ LIT("\0\0\0\x1c\0\x1a\0\0\x0b" "x.b.example\0\0\x09" "a.example") },
	{ LIT("\0\0\0\x1c\0\x1a\0\0\x09" "a.example\0\0\x0b" "x.b.example") },
	{ LIT("\0\0\0\x0f\0\x0d\x01\0\x0a" "1.1.1.1.1.") },     /* a name of another kind */
	{ LIT("\0\0\0\x1d\0\x1b\x01\0\x0a" "1.1.1.1.1.\0\0\x0b" "x.b.example") },
	{ LIT("\0\0\0\x05\0\x03\0\0\0") },
	{ LIT("\0\0\0\x06\0\x04\0\0\x01.") },
	{ LIT("\0\0\0\x02\0\0") },
	{ LIT("\0\0\0\0") },
	{ LIT("\0\0\0\x0f\0\x0d\0\0\x0a" "a.example\0") },
	{ LIT("\0\0\0\x0e\0\x0c\0\0\x0a" "a.example") },        /* past the end */
	{ LIT("\0\x01\0\x01\x01") }, { LIT("\0\x01\0\x01\x04") }, { LIT("\0\x01\0\x01\x05") },
	{ LIT("\0\x17\0\0") }, { LIT("\0\x23\0\0") }, { LIT("\0\x16\0\0") },
	{ LIT("\xff\x01\0\x01\0") }, { LIT("\xff\x01\0\x02\x01\0") }, { LIT("\xff\x01\0\0") },
	{ LIT("\0\x0a\0\x02\0\0") }, { LIT("\0\x0a\0\x04\0\x02\0\x17") },
	{ LIT("\0\x0a\0\x04\0\x02\0\x1d") }, { LIT("\0\x0d\0\x04\0\x02\x02\x03") },
	{ LIT("\0\x0d\0\x02\0\0") }, { LIT("\0\x0d\0\x04\0\x02\x08\x04") },
	{ LIT("\0\x2b\0\x05\x04\x03\x04\x03\x03") },
};

/* Records that can come before: empty ones, warnings, one of them in halves, what is early. */
static const struct { unsigned char type; const char *text; size_t len; } fronts[] = {
	{ 22, LIT("") }, { 21, LIT("\x01\x5a") }, { 21, LIT("") }, { 23, LIT("") },
	{ 20, LIT("\x01") }, { 21, LIT("\x01") }, { 21, LIT("\x5a") },
};

enum { EDIT_END, EDIT_DROP, EDIT_TWICE, EDIT_FIRST, EDIT_ADD, EDIT_INSTEAD, EDIT_ALTER, EDIT_OWN,
	EDIT_BYTE, EDIT_INSERT, EDIT_CUT, EDIT_LENGTH, EDIT_SPLIT, EDIT_BEFORE, EDIT_MESSAGE,
	EDIT_SUITES, EDITS };

/* Drops a message of the flight, or says it twice. */
static void message_edit(struct flight *f, unsigned arg)
{
	unsigned char copy[FLIGHT];
	size_t at = 0, len = 0;
	unsigned i;

	for (i = 0; i <= arg >> 1; i++, at += len) {
		if (at + 4 > f->len || (len = 4 + number(f->b + at + 1, 3)) > f->len - at)
			return;
	}
	memcpy(copy, f->b + at - len, len);
	bytes_put(f, at - len, arg & 1 ? 0 : len, copy, arg & 1 ? len : 0);
}

/* A hello of another version, with a session ID of another length, or with fewer suites. */
static void hello_edit(struct flight *f, unsigned arg)
{
	const size_t id_len = f->b[FIXED], at = FIXED + 1;
	size_t n;

	if (exts_find(f->b, f->len) == 0)
		return;
	if (arg >= 192) {
		f->b[5] = (unsigned char)(arg - 192);
	} else if (arg >= 160) {
		n = arg - 160;
		if (bytes_put(f, at, id_len, f->b + at, n)) {
			number_add(f->b + 1, 3, n - id_len);
			f->b[FIXED] = (unsigned char)n;
		}
	} else if (f->b[0] == 1) {
		n = number(f->b + at + id_len, 2);
		if (2 * arg < n && bytes_put(f, at + id_len + 2, n - 2 * arg, "", 0)) {
			number_add(f->b + at + id_len, 2, 2 * arg - n);
			number_add(f->b + 1, 3, 2 * arg - n);
		}
	}
}

/* One edit; the input says where and what. */
static void edit(struct flight *f, unsigned op, unsigned arg)
{
	unsigned char ext[4 + 255] = { 0, (unsigned char)arg, 0, 0 };
	const uint8_t *bytes;
	size_t len, n, at = op < EDIT_BYTE ? ext_at(f, arg, &len) : 0;

	switch (op) {
	case EDIT_DROP: case EDIT_TWICE: case EDIT_FIRST:
		if (at == 0 || len > sizeof ext)
			return;
		memcpy(ext, f->b + at, len);
		if (op != EDIT_TWICE)
			exts_put(f, at, len, "", 0);
		if (op == EDIT_TWICE)
			ext_put(f, ext, len, 0);
		else if (op == EDIT_FIRST)
			exts_put(f, exts_find(f->b, f->len) + 2, 0, ext, len);
		break;
	case EDIT_ADD: case EDIT_INSTEAD:
		ext_put(f, spare[arg % LENGTH(spare)].text, spare[arg % LENGTH(spare)].len,
			op == EDIT_INSTEAD);
		break;
	case EDIT_ALTER:
		n = input_byte(&script);
		if (at > 0)
			f->b[at + n % len] = (unsigned char)input_byte(&script);
		break;
	case EDIT_OWN:
		ext[3] = (unsigned char)input_byte(&script);
		n = input_bytes(&script, ext[3], &bytes);
		memcpy(ext + 4, bytes, n);
		ext_put(f, ext, 4u + ext[3], 0);
		break;
	case EDIT_BYTE: case EDIT_INSERT: case EDIT_CUT:
		at = (arg | (size_t)input_byte(&script) << 8) % (f->len + 1);
		n = input_byte(&script);
		if (op == EDIT_BYTE && at < f->len)
			f->b[at] = (unsigned char)n;
		else if (op == EDIT_INSERT)
			n = input_bytes(&script, n, &bytes), bytes_put(f, at, 0, bytes, n);
		else if (op == EDIT_CUT)
			bytes_put(f, at, n < f->len - at ? n : f->len - at, "", 0);
		break;
	case EDIT_LENGTH:
		if (f->len >= 4)
			number_add(f->b + 1, 3, (size_t)(signed char)arg);
		break;
	case EDIT_SPLIT: f->split = arg; break;
	case EDIT_BEFORE: f->before |= arg; break;
	case EDIT_MESSAGE: message_edit(f, arg); break;
	case EDIT_SUITES: hello_edit(f, arg); break;
	}
}

static void flight_edit(struct flight *f)
{
	unsigned op, arg, n;

	for (n = 0; n < EDITS_MAX && (op = input_byte(&script) % EDITS) != EDIT_END; n++) {
		arg = input_byte(&script);
		TRACE("\tedit %u, %u\n", op, arg);
		edit(f, op, arg);
	}
	if (f->before & 128)
		bytes_put(f, 0, 0, "\0\0\0", 4);
}
