/* unit-frames.h - flow_scan: where frames end, whatever pieces they come in. The reference has the
 * whole stream before it. */
#include "frames.h"

#define SERVED  0
#define MASKED  1

struct framed {                 /* what the reference says of a stream */
	size_t ends[64];        /* behind each whole frame, */
	unsigned len;
	unsigned frames_of_data;
	unsigned code;
	size_t over;            /* and where it is over, or its length */
	int is_over;
};

static void framed_read(struct framed *f, const unsigned char *p, size_t len, unsigned masked)
{
	size_t i = 0, cut;
	int64_t n = 0;
	int fragmented = 0;

	memset(f, 0, sizeof *f);
	f->over = len;
	while (!f->is_over && (n = frame_length(p + i, len - i, masked, fragmented)) > 0) {
		const unsigned op = p[i] & 15, size = p[i + 1] & 0x7f;

		if (op < 8) {
			fragmented = !(p[i] & 0x80);
			f->frames_of_data++;
		}
		if (op == 8) {
			const unsigned char *key = p + i + 2, *text = key + (masked ? 4 : 0);

			f->is_over = 1;
			f->code = size == 0 ? 1005 : masked ?
				(unsigned)((text[0] ^ key[0]) << 8 | (text[1] ^ key[1])) :
				(unsigned)(text[0] << 8 | text[1]);
		}
		i += (size_t)n;
		f->ends[f->len++] = i;
		f->over = f->is_over ? i : len;
	}
	/* the first byte that is not the grammar is that without which it could still be */
	for (cut = i; n < 0 && !f->is_over && cut <= len; cut++)
		if (frame_length(p + i, cut - i, masked, fragmented) < 0) {
			f->over = cut;
			f->is_over = 1;
		}
}

/* What is known behind `at` bytes. */
static void flow_check(const struct flow *f, const struct framed *want, size_t at)
{
	unsigned i;
	int between = at == 0;

	for (i = 0; i < want->len; i++)
		between |= want->ends[i] == at;
	if (want->is_over && at >= want->over)
		between = 0;
	CHECK_INT(flow_between(f), between);
}

/* In two pieces at each place, then byte by byte. */
static void flow_sweep(const unsigned char *p, size_t len, unsigned masked)
{
	struct framed want;
	struct flow f;
	size_t cut, i, end, last;

	framed_read(&want, p, len, masked);
	for (cut = 0; cut <= len; cut++) {
		with("a cut at %zu", cut);
		memset(&f, 0, sizeof f);
		end = flow_scan(&f, masked, p, cut);
		for (i = 0, last = 0; i < want.len; i++)
			last = want.ends[i] <= cut ? want.ends[i] : last;
		CHECK_INT(end, last);
		flow_check(&f, &want, cut);
		end = flow_scan(&f, masked, p + cut, len - cut);
		last = want.len > 0 && want.ends[want.len - 1] > cut ? want.ends[want.len - 1] - cut : 0;
		CHECK_INT(end, last);
		flow_check(&f, &want, len);
		CHECK_INT(f.frames_of_data, want.frames_of_data);
		CHECK_INT(f.over, want.is_over);
		CHECK_INT(f.over ? f.code : 0, want.code);
	}
	memset(&f, 0, sizeof f);
	for (i = 0; i < len; i++) {
		with("byte %zu", i);
		end = flow_scan(&f, masked, p + i, 1);
		flow_check(&f, &want, i + 1);
		for (cut = 0, last = 0; cut < want.len; cut++)
			last |= want.ends[cut] == i + 1;
		CHECK_INT(end, last);
	}
}

static const struct {
	const char *in;
	size_t len;
	unsigned masked;
	unsigned frames_of_data, code;
	int over;
} flows[] = {
	{ LIT("\x81\0"), SERVED, 1, 0, 0 },
	{ LIT("\x81\5hello\x82\2\1\2"), SERVED, 2, 0, 0 },
	{ LIT("\x81\x85\1\2\3\4hello"), MASKED, 1, 0, 0 },
	{ LIT("\1\3abc\0\3def\x80\0\x81\1x"), SERVED, 4, 0, 0 },
	{ LIT("\1\3abc\x89\0\0\3def\x8a\2hi\x80\0"), SERVED, 3, 0, 0 },
	{ LIT("\xc1\5hello\x41\1a\x80\1b"), SERVED, 3, 0, 0 },           /* compressed */
	{ LIT("\x88\2\3\xe8"), SERVED, 0, 1000, 1 },
	{ LIT("\x88\0"), SERVED, 0, 1005, 1 },
	{ LIT("\x88\x82\1\2\3\4\2\xea"), MASKED, 0, 1000, 1 },
	{ LIT("\x88\x80\1\2\3\4"), MASKED, 0, 1005, 1 },
	{ LIT("\x88\6\x0f\xa1 bye"), SERVED, 0, 4001, 1 },
	{ LIT("\1\1a\x88\2\3\xe9"), SERVED, 1, 1001, 1 },                 /* between fragments */
	{ LIT("\x88\2\3\xe8\x81\1x"), SERVED, 0, 1000, 1 },               /* behind it, no matter */
	/* not the grammar */
	{ LIT("\x81\1a\x83\0"), SERVED, 1, 0, 1 },
	{ LIT("\x8b\0"), SERVED, 0, 0, 1 },
	{ LIT("\x80\1a"), SERVED, 0, 0, 1 },                              /* continues nothing */
	{ LIT("\1\1a\x81\1b"), SERVED, 1, 0, 1 },                         /* amid a message */
	{ LIT("\x09\0"), SERVED, 0, 0, 1 },                               /* a Ping in fragments */
	{ LIT("\x89\x7e\0\x7e"), SERVED, 0, 0, 1 },                       /* a long one */
	{ LIT("\x88\1\3"), SERVED, 0, 0, 1 },
	{ LIT("\x81\x85\1\2\3\4hello"), SERVED, 0, 0, 1 },
	{ LIT("\x81\5hello"), MASKED, 0, 0, 1 },
	{ LIT("\x81\x7e\0\x7d"), SERVED, 0, 0, 1 },                       /* lengths not in short */
	{ LIT("\x81\x7f\0\0\0\0\0\0\xff\xff"), SERVED, 0, 0, 1 },
	{ LIT("\x81\x7f\x80\0\0\0\0\1\0\0"), SERVED, 0, 0, 1 },
	{ LIT("GET / HTTP/1.1\r\n"), MASKED, 0, 0, 1 },
};

static void test_frames(void)
{
	struct flow f;
	size_t i;

	for (i = 0; i < COUNT(flows); i++) {
		const unsigned char *p = (const unsigned char *)flows[i].in;

		at("flow %zu", i);
		memset(&f, 0, sizeof f);
		flow_scan(&f, flows[i].masked, p, flows[i].len);
		CHECK_INT(f.frames_of_data, flows[i].frames_of_data);
		CHECK_INT(f.over, flows[i].over);
		CHECK_INT(f.over ? f.code : 0, flows[i].code);
		flow_sweep(p, flows[i].len, flows[i].masked);
	}
}

/* Payload that fits no buffer is counted, at each width of a length. */
static void test_frames_long(void)
{
	static const struct { const char *head; size_t len; uint64_t size; } rows[] = {
		{ LIT("\x82\x7d"), 125 },
		{ LIT("\x82\x7e\0\x7e"), 126 },
		{ LIT("\x82\x7e\xff\xff"), 65535 },
		{ LIT("\x82\x7f\0\0\0\0\0\1\0\0"), 65536 },
		{ LIT("\x82\x7f\0\0\0\1\0\0\0\5"), 0x100000005 },
	};
	static const unsigned char zeros[1 << 16];
	struct flow f;
	size_t i, n;

	for (i = 0; i < COUNT(rows); i++) {
		uint64_t left = rows[i].size;

		at("%" PRIu64 " bytes", left);
		memset(&f, 0, sizeof f);
		CHECK_INT(flow_scan(&f, SERVED, (const unsigned char *)rows[i].head, rows[i].len), 0);
		for (; left > 0; left -= n) {
			CHECK(!flow_between(&f));
			n = left < sizeof zeros ? (size_t)left : sizeof zeros;
			CHECK_INT(flow_scan(&f, SERVED, zeros, n), n == left ? n : 0);
		}
		CHECK(flow_between(&f));
		CHECK_INT(f.frames_of_data, 1);
	}
}

/* Frames of all kinds in any order, in any pieces; some with a byte that is not theirs. */
static void test_frames_random(void)
{
	static const unsigned char ops[] = { 0x81, 0x82, 1, 0, 0x80, 0x89, 0x8a, 0x88, 0xc1, 0x41 };
	unsigned char p[400];
	unsigned round, k, frames_len, size;
	size_t len;

	for (round = 0; round < 20000; round++) {
		const unsigned masked = random_below(2);

		at("round %u", round);
		len = 0;
		for (frames_len = 1 + random_below(5); frames_len > 0; frames_len--) {
			const unsigned wide = random_below(16) == 0;

			p[len++] = ops[random_below(COUNT(ops))];
			size = wide ? 126 + random_below(4) : random_below(4);
			p[len++] = (unsigned char)(masked << 7 | (wide ? 126 : size));
			if (wide) {
				p[len++] = 0;
				p[len++] = (unsigned char)size;
			}
			for (k = 0; k < size + 4 * masked && len < sizeof p - 140; k++)
				p[len++] = (unsigned char)random_next();
			if (len >= sizeof p - 140)
				break;
		}
		if (random_below(4) == 0)
			p[random_below((unsigned)len)] = (unsigned char)random_next();
		flow_sweep(p, len, masked);
	}
}
