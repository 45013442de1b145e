/* unit-core.h - text, the log, timers, pools, addresses, sources, and the choice among backends. */

/* ---- text ---- */

/* The same as libc's, whole or cut to any size, and not a byte behind it. Each conversion that is
 * used in wssproxy.c. */
#define CHECK_FORMAT(...) do { \
	char want[200]; \
	struct text t; \
	size_t size, len = (size_t)snprintf(want, sizeof want, __VA_ARGS__); \
	for (size = 0; size <= len + 1; size++) { \
		t = (struct text){ .p = guard_room(&output, size), .size = size }; \
		text_format(&t, __VA_ARGS__); \
		with("%zu bytes of room", size); \
		CHECK_BYTES(t.p, t.len, want, size < len ? size : len); \
		CHECK_INT(t.full, size < len); \
	} \
	for (size = 1; size <= len + 2; size++) { \
		char *out = guard_room(&output, size); \
		with("a string of %zu bytes", size); \
		CHECK_INT(string_format(out, size, __VA_ARGS__), size - 1 < len ? size - 1 : len); \
		CHECK_BYTES(out, strlen(out), want, size - 1 < len ? size - 1 : len); \
	} \
} while (0)

static void test_text_format(void)
{
	static const unsigned long long edge[] = { 0, 1, 9, 10, 15, 16, 99, 100, 255, 256, 65535, 65536,
		INT_MAX, (unsigned)INT_MIN, UINT_MAX, UINT_MAX + 1ull, INT64_MAX, 1ull << 63, UINT64_MAX };
	size_t i;

	CHECK_FORMAT("no conversion");
	CHECK_FORMAT("%s", "");
	CHECK_FORMAT("%s%s", "a", "%s %d%");            /* what comes in is no format */
	CHECK_FORMAT("<%s|%s>", "a string", "another");
	CHECK_FORMAT("close s=%llu.%u", 12ull, 3u);
	CHECK_FORMAT("%d %d %d %d %d", INT_MIN, INT_MIN + 1, -1, 0, INT_MAX);
	for (i = 0; i < COUNT(edge) + 1000; i++) {
		unsigned long long n = i < COUNT(edge) ? edge[i] :
			random_next() >> random_below(64);

		at("%llu", n);
		CHECK_FORMAT("%llu,%u,%d", n, (unsigned)n, (int)n);
		CHECK_FORMAT("%x %02x 0x%04x", (unsigned)n, (unsigned)n, (unsigned)n);
	}
}

/* What follows what did not fit is left out as well, even if it were short enough. */
static void test_text_full(void)
{
	char out[8];
	struct text t = { .p = out, .size = sizeof out };

	text_string(&t, "12345678");
	CHECK_INT(t.full, 0);
	t = (struct text){ .p = out, .size = sizeof out };
	text_string(&t, "12345");
	text_format(&t, "%d", -6789);
	text_string(&t, "");
	CHECK_INT(t.full, 1);
	text_string(&t, "x");
	CHECK_BYTES(out, t.len, "12345-67", 8);
}

/* ---- the log ---- */

/* Undoes \xNN. The length, -1: not something that log_escape may write. */
static long unescape(const char *s, char *out)
{
	static const char hex[] = "0123456789abcdef";
	long n = 0;

	for (; *s != '\0'; s++) {
		if (*s <= ' ' || *s >= 0x7f || *s == '"')
			return -1;
		if (*s != '\\') {
			out[n++] = *s;
			continue;
		}
		if (s[1] != 'x' || s[2] == '\0' || strchr(hex, s[2]) == NULL ||
		    s[3] == '\0' || strchr(hex, s[3]) == NULL)
			return -1;
		out[n++] = (char)((strchr(hex, s[2]) - hex) << 4 | (strchr(hex, s[3]) - hex));
		s += 3;
	}
	return n;
}

/* Whatever comes in: one word that can't end the line, the word or a quotation, and says exactly
 * what came, cut where the room ends. */
static void check_escape(const char *in, size_t len, size_t size)
{
	char *out = guard_room(&output, size), back[2048] = "";
	long n;

	log_escape(out, size, guard_copy(&input, in, len), len);
	CHECK(memchr(out, '\0', size) != NULL);
	n = unescape(out, back);
	CHECK(n >= 0 && (size_t)n <= len);
	if (n < 0)
		return;
	CHECK_BYTES(back, (size_t)n, in, (size_t)n);
	if (size > 4 * len)
		CHECK_INT(n, len);
	else if ((size_t)n < len)
		CHECK(strlen(out) + 5 > size);          /* as much as there was room for */
}

static void test_log_escape(void)
{
	static const char line[] = "x\r\nopen id=1 client=127.0.0.1:1 path=\"/\"\\x41\t\x1b[31m\x7f\xc3\xa4\0y";
	char out[100], bytes[256];
	size_t size;
	int c;

	log_escape(out, sizeof out, LIT("/chat/a-b_c.d~e;f:g@h,i!$&'()*+"));
	CHECK_STR(out, "/chat/a-b_c.d~e;f:g@h,i!$&'()*+");
	log_escape(out, sizeof out, LIT("a b\nc\"d\\e\xff"));
	CHECK_STR(out, "a\\x20b\\x0ac\\x22d\\x5ce\\xff");
	log_escape(out, sizeof out, LIT(""));
	CHECK_STR(out, "");
	for (c = 0; c < 256; c++)
		bytes[c] = (char)c;
	for (size = 1; size < 1100; size++) {
		at("%zu bytes of room", size);
		check_escape(bytes, sizeof bytes, size);
		check_escape(line, sizeof line - 1, size);
	}
}

static void test_log_line(void)
{
	char text[3000];
	const char *got;
	size_t n;

	log_open_pipe();
	log_line(LOG_INFO, "open id=%u", 7u);
	CHECK_STR(log_read(), "open id=7\n");
	memset(text, 'x', sizeof text);
	for (n = LOG_LINE - 20; n < LOG_LINE + 20; n++) {
		at("%zu bytes", n);
		text[n] = '\0';
		log_line(LOG_INFO, "%s", text);
		got = log_read();
		CHECK(strlen(got) <= LOG_LINE);
		CHECK(strlen(got) >= (n < LOG_LINE - 10 ? n + 1 : LOG_LINE - 10));
		CHECK(strchr(got, '\n') == got + strlen(got) - 1);
		text[n] = 'x';
	}
}

/* The next line is not written behind a part of one: a disk that was full has room again. */
static void test_log_cut(void)
{
	static const char want[] = "a whole line\na part of \nthe next\n";
	char got[100];
	struct rlimit limit = { 23, 100 };
	FILE *f = tmpfile();

	if (f == NULL || setrlimit(RLIMIT_FSIZE, &limit) < 0)
		exit(2);
	signal(SIGXFSZ, SIG_IGN);
	log_fd = fileno(f);
	log_line(LOG_INFO, "a whole line");
	log_line(LOG_INFO, "a part of one");
	log_line(LOG_INFO, "nothing of one");
	CHECK_INT(totals.log_lost, 2);
	limit.rlim_cur = 100;
	setrlimit(RLIMIT_FSIZE, &limit);
	log_line(LOG_INFO, "the next");
	CHECK_INT(totals.log_lost, 2);
	CHECK_BYTES(got, (size_t)pread(log_fd, got, sizeof got, 0), want, sizeof want - 1);
}

static unsigned lines_of(const char *text)
{
	unsigned n = 0;

	for (; *text != '\0'; text++)
		n += *text == '\n';
	return n;
}

/* The time is libc's, on each day and at each end of one. */
static void test_text_time(void)
{
	static const long long days[] = { 0, 58, 59, 364, 365, 789, 790, 11015, 11016, 11017, 11322,
		11323, 20784, 24855, 47540, 47541, 47542 };
	char got[64], want[64];
	size_t i;

	for (i = 0; i < 40000 + COUNT(days); i++) {
		time_t t = (time_t)((i < COUNT(days) ? days[i] : (long long)i) * 86400 +
			(i % 3 == 0 ? 0 : i % 3 == 1 ? 86399 : 45296));
		struct timespec ts = { .tv_sec = t, .tv_nsec = (long)(i % 1000) * 1000000 };
		struct text out = { .p = got, .size = sizeof got - 1 };

		text_time(&out, &ts);
		got[out.len] = '\0';
		strftime(want, sizeof want, "%Y-%m-%dT%H:%M:%S", gmtime(&t));
		sprintf(want + strlen(want), ".%03uZ ", (unsigned)(i % 1000));
		CHECK_STR(got, want);
	}
}

/* A reader that does not read costs lines, never time. */
static void test_log_full(void)
{
	uint64_t lost = totals.log_lost;
	unsigned i;

	log_open_pipe();
	for (i = 0; i < 100000 / 40; i++)
		log_line(LOG_INFO, "a line of some forty bytes, number %u", i);
	CHECK(totals.log_lost > lost);
}

/* ---- lists and timers ---- */

/* All items are there again, whoever has them. */
static void pool_reset(struct pool *p)
{
	p->free = NULL;
	p->lent = p->fresh = 0;
}

static struct session *session_make(unsigned i)
{
	static struct source nobody;
	struct session *s = &sessions[i];

	memset(s, 0, sizeof *s);
	s->source = &nobody;
	s->note = memset(&notes[i], 0, sizeof notes[i]);
	s->client.fd = s->backend.fd = -1;
	s->server = s->sticky = -1;
	s->id = i;
	hd = NULL;
	return s;
}

/* A session's lines, byte for byte. */
static void test_log_session(void)
{
	struct session *s;

	tables_init();
	servers_init();
	log_open_pipe();
	now = 5000;
	s = session_make(7);
	s->born = now - 12345;
	address_parse(&s->peer, "192.0.2.9", "51234");
	log_session(s, REJECT, 0, WHY_HANDSHAKE_TIMEOUT);
	CHECK_STR(log_read(), "reject id=7 client=192.0.2.9:51234 status=- why=handshake-timeout\n");
	head_load(s);
	log_session(s, REJECT, 431, WHY_LARGE_HEAD);
	CHECK_STR(log_read(), "reject id=7 client=192.0.2.9:51234 status=431 why=large-head\n");
	strcpy(s->note->path, "/chat");
	log_session(s, REJECT, 400, WHY_HOST);
	CHECK_STR(log_read(), "reject id=7 client=192.0.2.9:51234 status=400 why=host host=- "
		"path=/chat backend=-\n");
	strcpy(s->note->host, "a.example");
	s->server = B;
	log_session(s, REJECT, 504, WHY_RESPONSE_TIMEOUT);
	CHECK_STR(log_read(), "reject id=7 client=192.0.2.9:51234 status=504 why=response-timeout "
		"host=a.example path=/chat backend=[2001:db8::1]:3000\n");
	s->plain = s->upgrade = 1;
	log_session(s, OPEN, 101, WHY_NONE);
	CHECK_STR(log_read(), "open id=7 client=192.0.2.9:51234 tls=- suite=- resumed=0 cn=- "
		"host=a.example path=/chat backend=[2001:db8::1]:3000 status=101 ms=12345\n");
	s->by = BY_CLIENT;
	s->rx = 1234;
	s->tx = 5678;
	log_session(s, CLOSE, 0, WHY_EOF);
	CHECK_STR(log_read(), "close id=7 by=client why=eof rx=1234 tx=5678 s=12.3\n");
}

/* Each field as long as it may get, and escaped all through: one whole line. */
static void test_log_session_long(void)
{
	struct session *s;
	const char *got;

	tables_init();
	servers_init();
	log_open_pipe();
	s = session_make(0);
	s->id = UINT32_MAX;
	address_parse(&s->peer, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "65535");
	s->server = A;
	memset(servers[A].name, 'n', sizeof servers[A].name - 1);
	now = UINT64_MAX;
	head_load(s);
	memset(hd->bytes, '\n', 4096);
	hd->u.request.origin = hd->u.request.host = span_of(0, 4096);
	hd->u.request.target = span_of(0, 4096);
	hd->bytes[0] = '/';
	request_note(s);
	CHECK(strlen(s->note->path) > sizeof s->note->path - 5);
	CHECK(strlen(s->note->host) > sizeof s->note->host - 5);
	memset(s->note->subject, '\n', sizeof s->note->subject - 1);
	log_session(s, REJECT, 403, WHY_ORIGIN);
	got = log_read();
	CHECK(strlen(got) < LOG_LINE - 100);
	CHECK(strstr(got, "origin=/\\x0a\\x0a") != NULL && strchr(got, '\n') == got + strlen(got) - 1);
	CHECK_INT(lines_of(got), 1);
	log_session(s, OPEN, 101, WHY_NONE);
	got = log_read();
	CHECK(strlen(got) < LOG_LINE - 100);
	CHECK(strstr(got, "cn=\\x0a\\x0a") != NULL && strstr(got, " status=101 ms=") != NULL);
	CHECK_INT(lines_of(got), 1);
}

/* A flood has its first few lines and then, when its second is over, one that counts the rest. */
static void test_log_rejects(void)
{
	struct session *s;
	unsigned second, i;

	tables_init();
	log_open_pipe();
	s = session_make(0);
	now = 5000;
	for (second = 0; second < 3; second++) {
		at("second %u", second);
		for (i = 0; i < log_rejects + 7 * second; i++) {
			session_reject(s, 400, WHY_KEY);
			now += 10;
			timers_run();
		}
		CHECK_INT(lines_of(log_read()), log_rejects);
		CHECK(timers_next() > 0 && timers_next() <= 1000);
		now += 1000;
		timers_run();
		CHECK_STR(log_read(), second == 0 ? "" : second == 1 ? "reject suppressed=7\n" :
			"reject suppressed=14\n");
		CHECK_INT(timers_next(), -1);
	}
	for (i = 0; i < log_rejects + 3; i++)
		session_reject(s, 400, WHY_KEY);
	log_read();
	sessions_end();
	CHECK_STR(log_read(), "reject suppressed=3\n");
	CHECK_INT(totals.rejected, 4 * log_rejects + 7 + 14 + 3);
}

static void test_lists(void)
{
	struct link list = { &list, &list }, l[4] = { { NULL, NULL } };
	unsigned i;

	CHECK(link_alone(&list) && link_alone(&l[0]));
	for (i = 0; i < 4; i++)
		link_append(&list, &l[i]);
	CHECK(list.next == &l[0] && l[0].next == &l[1] && l[3].next == &list && list.prev == &l[3]);
	link_append(&list, &l[1]);              /* moves to the end */
	CHECK(l[0].next == &l[2] && l[2].prev == &l[0] && list.prev == &l[1] && l[3].next == &l[1]);
	link_drop(&l[0]);
	CHECK(list.next == &l[2] && l[2].prev == &list && link_alone(&l[0]));
	link_drop(&l[0]);                       /* harmless */
	CHECK(link_alone(&l[0]) && list.next == &l[2]);
	for (i = 0; i < 4; i++)
		link_drop(&l[i]);
	CHECK(link_alone(&list));
}

static void test_timers(void)
{
	struct queue q = { .ms = 100 }, never = { .ms = 0 };
	struct timer t[4] = { { .due = 0 } };
	unsigned i;

	link_drop(&q.list);
	link_drop(&never.list);
	CHECK(timer_take(&q) == NULL);
	for (i = 0; i < 3; i++) {
		now = 1000 + 10 * i;
		timer_start(&q, &t[i]);
	}
	now = 1099;
	CHECK(timer_take(&q) == NULL);
	now = 1100;
	CHECK(timer_take(&q) == &t[0]);
	CHECK(timer_take(&q) == NULL);
	timer_start(&q, &t[1]);                 /* restarted: behind the others */
	now = 1120;
	CHECK(timer_take(&q) == &t[2] && link_alone(&t[2].link));
	CHECK(timer_take(&q) == NULL);
	now = 1200;
	CHECK(timer_take(&q) == &t[1]);
	timer_start(&never, &t[1]);             /* moves to another queue, where it is never due, */
	timer_start(&never, &t[0]);             /* but in order */
	CHECK(timer_take(&q) == NULL);
	now = UINT64_MAX / 2;
	CHECK(timer_take(&never) == NULL && never.list.next == &t[1].link);
}

/* A million starts and ends later the queue is still in order, and holds whom it should. */
static void test_timers_order(void)
{
	struct queue q = { .ms = 50 };
	struct timer t[64] = { { .due = 0 } };
	const struct link *l;
	uint64_t last;
	unsigned i, k, running = 0;

	link_drop(&q.list);
	now = 1;
	for (i = 0; i < 100000; i++) {
		k = random_below(COUNT(t));
		now += random_below(3);
		if (random_below(4) == 0)
			link_drop(&t[k].link);
		else
			timer_start(&q, &t[k]);
	}
	for (l = q.list.next, last = 0, i = 0; l != &q.list; l = l->next, i++) {
		const struct timer *x = (const struct timer *)(const void *)l;

		CHECK(x->due >= last && x->due <= now + 50);
		last = x->due;
	}
	for (k = 0; k < COUNT(t); k++)
		running += !link_alone(&t[k].link);
	CHECK_INT(i, running);
}

/* How long poll may wait: until the first of all queues' first. */
static void test_timers_next(void)
{
	struct session *s, *other;

	tables_init();
	s = session_make(0);
	other = session_make(1);
	now = 5000;
	CHECK_INT(timers_next(), -1);
	timer_start(&queues[RELAY], &s->timer);
	CHECK_INT(timers_next(), idle_ms);
	timer_start(&queues[HEAD], &other->timer);
	CHECK_INT(timers_next(), head_ms);
	timer_start(&queues[Q_REDIAL], &s->stall);
	CHECK_INT(timers_next(), REDIAL_MS);
	now += REDIAL_MS - 1;
	CHECK_INT(timers_next(), 1);
	now += 1;
	CHECK_INT(timers_next(), 0);
	now += 1000000;
	CHECK_INT(timers_next(), 0);
	now -= 1000000;
	link_drop(&s->stall.link);
	CHECK_INT(timers_next(), head_ms - REDIAL_MS);
	/* who sits on a buffer is of interest only while others wait for one */
	timer_start(&queues[Q_STALL], &s->stall);
	CHECK_INT(timers_next(), head_ms - REDIAL_MS);
	link_append(&records_pool.waiters, &other->wait);
	CHECK_INT(timers_next(), stall_ms);
	link_append(&shelf_pool.waiters, &other->wait);
	CHECK_INT(timers_next(), stall_ms);
	link_drop(&other->wait);
	CHECK_INT(timers_next(), head_ms - REDIAL_MS);
	/* drain and the pause of the listeners count as well */
	accept_after = now + 300;
	CHECK_INT(timers_next(), 300);
	drain_until = now + 200;
	CHECK_INT(timers_next(), 200);
	drain_until = now;                              /* the loop is over */
}

/* Of n tunnels one leaves at once, and each next one an nth of nine tenths of drain_ms later. */
static void test_leave_next(void)
{
	now = 1000000;
	drain_until = now + drain_ms;
	CHECK(leave_next() == UINT64_MAX);
	for (tunnels_first = 1; tunnels_first <= 100000; tunnels_first = tunnels_first * 3 + 1)
		for (tunnels = tunnels_first; tunnels > 0; tunnels--)
			CHECK_INT(leave_next(), now + ((uint64_t)drain_ms * 9 / 10 *
				(tunnels_first - tunnels) + tunnels_first - 1) / tunnels_first);
	tunnels_first = 3;
	tunnels = 5;                    /* two more came about: the first goes now */
	CHECK_INT(leave_next(), now);
	tunnels_first = 0;
	CHECK_INT(leave_next(), now);
	tunnels = 0;
	drain_until = 0;
}

/* Who rests leaves first; of those that talk, one that was answered, and that last. */
static void test_leave_choose(void)
{
	unsigned i;

	tables_init();
	now = 1000000;
	for (i = 0; i < 4; i++) {
		sessions[i].active = (uint32_t)now + i;
		timer_start(&queues[RELAY], &sessions[i].timer);
	}
	now += 3;
	CHECK(leave_choose() == &sessions[0]);          /* none was */
	sessions[1].answered = sessions[2].answered = 1;
	CHECK(leave_choose() == &sessions[2]);
	now += REST_MS - 4;
	CHECK(leave_choose() == &sessions[2]);
	now++;
	CHECK(leave_choose() == &sessions[0]);
	for (i = 0; i < 4; i++)
		link_drop(&sessions[i].timer.link);
}

/* ---- pools ---- */

static void test_pool(void)
{
	struct item { void *next; uint64_t value[3]; } items[5];
	struct item *got[5], *again;
	struct pool POOL(p, items);
	unsigned i, k;

	memset(items, 0xdb, sizeof items);      /* memory that was never lent is never looked at */
	CHECK(!pool_empty(&p));
	for (i = 0; i < COUNT(items); i++) {
		got[i] = pool_lend(&p);
		CHECK(got[i] == &items[i]);     /* in order, so that few pages are touched */
		CHECK_INT(p.lent, i + 1);
		for (k = 0; k < i; k++)
			CHECK(got[k] != got[i]);
	}
	CHECK(pool_empty(&p));
	CHECK(pool_lend(&p) == NULL);
	CHECK_INT(p.lent, COUNT(items));
	pool_return(&p, got[1]);
	pool_return(&p, got[3]);
	CHECK_INT(p.lent, 3);
	CHECK(!pool_empty(&p));
	CHECK(pool_lend(&p) == got[3]);         /* last in, first out */
	CHECK(pool_lend(&p) == got[1]);
	CHECK(pool_lend(&p) == NULL);
	for (i = 0; i < COUNT(items); i++)
		pool_return(&p, got[i]);
	CHECK_INT(p.lent, 0);
	for (i = COUNT(items); i-- > 0; ) {
		again = pool_lend(&p);
		CHECK(again == got[i]);
	}
	CHECK(pool_lend(&p) == NULL);
}

/* A client amid a long head loses its place to one whose address holds less by two, and no other
 * does: of the address that holds most, and not while it waits for us. */
static void test_shelf_rob(void)
{
	static struct source many, some[SHELVES], none;
	struct session *s[SHELVES + 2];
	struct shelf *shelf;
	unsigned i;

	tables_init();
	for (i = 0; i < COUNT(s); i++) {
		s[i] = session_make(i);
		s[i]->source = i < 3 ? &many : i < SHELVES ? &some[i] : &none;
		session_enter(s[i], HEAD);
		s[i]->note->len = NOTE_TEXT + 1;
		if (i < SHELVES)
			CHECK_INT(shelf_borrow(s[i]), 1);
		if (i < SHELVES)
			timer_start(&queues[Q_STALL], &s[i]->stall);
	}
	CHECK_INT(many.shelves, 3);
	CHECK_INT(some[3].shelves, 1);
	link_append(&runnable, &s[0]->wait);            /* waits for us */
	s[1]->state = CONNECT;                          /* its backend */
	shelf = s[2]->shelf;
	CHECK_INT(shelf_borrow(s[SHELVES]), 1);
	CHECK(s[SHELVES]->shelf == shelf);
	CHECK(s[2]->shelf == NULL && s[2]->note->len == 0);
	CHECK(timer_take(&queues[FREE]) == &s[2]->timer);
	CHECK(s[0]->shelf && s[1]->shelf && s[3]->shelf);
	CHECK_INT(many.shelves, 2);
	CHECK_INT(none.shelves, 1);

	CHECK_INT(shelf_borrow(s[SHELVES + 1]), 0);    /* 2 is no more than its own by two */
	CHECK(!link_alone(&s[SHELVES + 1]->wait));
	s[1]->state = HEAD;
	none.shelves = 0;
	CHECK_INT(shelf_borrow(s[SHELVES + 1]), 1);
	CHECK(!s[1]->shelf);
	for (i = 0; i < COUNT(s); i++) {
		link_drop(&s[i]->timer.link);
		link_drop(&s[i]->place.link);
		link_drop(&s[i]->stall.link);
	}
}

/* Who finds no buffer waits, and is served first come, first served. */
static void test_pool_waiters(void)
{
	struct session *s[SHELVES + 3];
	struct records *r;
	struct buffers *b;
	unsigned i;

	tables_init();
	for (i = 0; i < COUNT(s); i++)
		s[i] = session_make(i);
	for (i = 0; i < max_busy + 3; i++) {
		s[i]->plain = 1;
		CHECK_INT(records_borrow(s[i]), i < max_busy);
		CHECK((s[i]->rec != NULL) == (i < max_busy));
		CHECK(link_alone(&s[i]->wait) == (i < max_busy));
	}
	CHECK_INT(records_borrow(s[0]), 1);             /* has them already */
	r = s[2]->rec;
	b = &r->side[0];
	b->out_at = 1;
	b->out_end = 2;
	records_return(s[2]);
	CHECK(s[2]->rec == NULL);
	CHECK(s[max_busy]->rec == r);                   /* the first of those that wait */
	CHECK(b->out_at == b->out_end);      /* nothing of another's is in it */
	CHECK(runnable.next == &s[max_busy]->wait && runnable.prev == runnable.next);
	records_return(s[2]);                           /* has none: harmless */
	link_drop(&s[max_busy + 1]->wait);              /* one gave up */
	records_return(s[0]);
	CHECK(s[max_busy + 1]->rec == NULL && s[max_busy + 2]->rec != NULL);
	CHECK(runnable.prev == &s[max_busy + 2]->wait);
	CHECK(link_alone(&records_pool.waiters));
	CHECK_INT(records_pool.lent, max_busy);
	records_return(s[1]);
	CHECK_INT(records_pool.lent, max_busy - 1);

	for (i = 0; i < SHELVES; i++)
		CHECK_INT(shelf_borrow(s[i]), 1);
	s[1]->shelf->verifier.begun = 1;
	CHECK_INT(shelf_borrow(s[SHELVES]), 0);
	CHECK_INT(shelf_borrow(s[SHELVES + 1]), 0);
	shelf_return(s[1]);
	CHECK(s[1]->shelf == NULL && s[SHELVES]->shelf != NULL);
	CHECK_INT(s[SHELVES]->shelf->verifier.begun, 0);
	shelf_return(s[2]);
	CHECK(s[SHELVES + 1]->shelf && link_alone(&shelf_pool.waiters));
}

/* A head that waits is the same when it is wanted again, wherever it lay. */
static void test_head_store(void)
{
	static const size_t lens[] = { 1, NOTE_TEXT, NOTE_TEXT + 1, HEAD_ROOM };
	struct session *s, *other;
	size_t i;

	for (i = 0; i < COUNT(lens); i++) {
		at("%u bytes", (unsigned)lens[i]);
		tables_init();
		s = session_make(0);
		other = session_make(1);
		CHECK_INT(head_len(s), 0);
		head_load(s);
		CHECK(hd == &head_buffer && hd->len == 0);
		CHECK_INT(head_store(s), 1);
		CHECK(!hd && head_len(s) == 0);
		head_load(s);
		head_buffer.len = lens[i];
		head_buffer.off = lens[i] / 2;
		memset(head_buffer.bytes, 'a', lens[i]);
		CHECK_INT(head_store(s), 1);
		CHECK_INT(head_len(s), lens[i]);
		CHECK_INT(s->shelf != NULL, lens[i] > NOTE_TEXT);
		CHECK_INT(shelf_rests(s) || !s->shelf, lens[i] <= NOTE_TEXT);
		head_load(other);
		memset(head_buffer.bytes, 'b', HEAD_ROOM);
		head_buffer.u.request.head.at = 7;
		hd = NULL;
		head_load(s);
		CHECK_INT(head_buffer.len, lens[i]);
		CHECK_INT(head_buffer.off, lens[i] / 2);
		CHECK_INT(head_buffer.u.request.head.at, 0);
		CHECK(head_buffer.bytes[0] == 'a' && head_buffer.bytes[lens[i] - 1] == 'a');
		head_buffer.off = lens[i];              /* all is out */
		CHECK_INT(head_store(s), 1);
		CHECK_INT(head_len(s), 0);
	}
	while (!pool_empty(&shelf_pool))
		pool_lend(&shelf_pool);
	head_load(other);
	hd->len = NOTE_TEXT + 1;
	CHECK_INT(head_store(other), 0);
}

/* What is whole of the records that have come, and what the first one lacks. */
static void test_records_whole(void)
{
	static const struct { const char *bytes; size_t len, whole, need; } cases[] = {
		{ "", 0, 0, 5 },
		{ "\x16", 1, 0, 5 }, { "\x16\3\3\0", 4, 0, 5 }, { "\x17\3\3\0\2", 5, 0, 7 },
		{ "\x17\3\3\0\2a", 6, 0, 7 }, { "\x17\3\3\0\2ab", 7, 7, 0 },
		{ "\x17\3\3\0\0", 5, 5, 0 }, { "\x17\3\3\0\2ab\x15", 8, 7, 0 },
		{ "\x17\3\3\0\1a\x17\3\3\0\2a", 12, 6, 0 },
		{ "\x17\3\3\0\1a\x14\3\3\0\1b", 12, 12, 0 },
		{ "\x14\3\3\0\1a\x16\3\3\0\1b\x17\3\3\0\1c", 18, 12, 0 },
		{ "\x17\3\3\0\1a\x17\3\3\0\1b", 12, 6, 0 },
		{ "\x17\3\3\x41\xfb", 5, 0, READ_AHEAD },
		{ "\x17\3\3\x41\xfc", 5, 5, 0 },            /* larger than any */
		{ "\x18\3\3\0\2", 5, 0, 7 }, { "\x17\2\3\0\2", 5, 5, 0 }, { "GET ", 4, 0, 5 }, { "GET /", 5, 5, 0 },
		{ "\x17\3\3\0\1aGET /", 11, 11, 0 }, { "\x13\3\4\0\1", 5, 0, 6 },
	};
	size_t i, need;

	for (i = 0; i < COUNT(cases); i++) {
		at("case %u", (unsigned)i);
		CHECK_INT(records_whole((const unsigned char *)cases[i].bytes, cases[i].len, &need),
			cases[i].whole);
		if (cases[i].need)
			CHECK_INT(need, cases[i].need);
	}
}

/* ---- addresses ---- */

/* Read from a socket address, written to one, read again, and shown. */
static void check_address(const char *literal, unsigned port, const char *shown_as,
	const char *with_port)
{
	struct address a;
	char number[8];

	at("%s port %u", literal, port);
	sprintf(number, "%u", port);
	CHECK_INT(address_parse(&a, literal, number), 1);
	address_unmap(&a);
	CHECK_INT(a.in.sin_port, htons((uint16_t)port));
	CHECK_STR(address_format(&a, 0), shown_as);
	CHECK_STR(address_format(&a, 1), with_port);
}

static void test_address(void)
{
	struct address a, b;

	check_address("192.0.2.9", 51234, "192.0.2.9", "192.0.2.9:51234");
	check_address("255.255.255.255", 65535, "255.255.255.255", "255.255.255.255:65535");
	check_address("0.0.0.0", 0, "0.0.0.0", "0.0.0.0:0");
	check_address("::", 443, "::", "[::]:443");
	check_address("::1", 1, "::1", "[::1]:1");
	check_address("2001:DB8:0:0::9", 443, "2001:db8::9", "[2001:db8::9]:443");
	check_address("2001:db8:1111:2222:3333:4444:5555:6666", 65535,
		"2001:db8:1111:2222:3333:4444:5555:6666", "[2001:db8:1111:2222:3333:4444:5555:6666]:65535");
	/* a client of a dual stack listener is an IPv4 client */
	check_address("::ffff:192.0.2.9", 80, "192.0.2.9", "192.0.2.9:80");
	check_address("::fffe:192.0.2.9", 80, "::fffe:c000:209", "[::fffe:c000:209]:80");
	at("equal whichever way it came");
	address_parse(&a, "::ffff:192.0.2.9", "80");
	address_unmap(&a);
	address_parse(&b, "192.0.2.9", "80");
	address_unmap(&b);
	CHECK_BYTES((char *)&a, offsetof(struct sockaddr_in, sin_zero),
		(char *)&b, offsetof(struct sockaddr_in, sin_zero));
	CHECK_INT(a.any.sa_family, AF_INET);
}

/* As inet_ntop has it, which knows RFC 5952, but for one thing: it shows some addresses with an
 * IPv4 one at their end (::192.0.2.9). */
static void check_address_text(const unsigned char ip[16])
{
	static const unsigned char zero[12];
	struct address a = { .in6 = { .sin6_family = AF_INET6, .sin6_port = htons(443) } };
	char want[INET6_ADDRSTRLEN + 8], text[sizeof want];

	memcpy(&a.in6.sin6_addr, ip, 16);
	address_unmap(&a);
	if (a.any.sa_family == AF_INET)
		inet_ntop(AF_INET, ip + 12, want, sizeof want);
	else if (memcmp(ip, zero, 12) == 0 && (ip[12] | ip[13]))
		snprintf(want, sizeof want, "::%x:%x", ip[12] << 8 | ip[13], ip[14] << 8 | ip[15]);
	else
		inet_ntop(AF_INET6, ip, want, sizeof want);
	CHECK_STR(address_format(&a, 0), want);
	if (a.any.sa_family == AF_INET6) {
		snprintf(text, sizeof text, "[%s]:443", want);
		strcpy(want, text);
		CHECK_STR(address_format(&a, 1), want);
	}
}

/* Each pattern of zero and other groups, with other groups of one to four digits. */
static void test_address_text(void)
{
	unsigned char ip[16];
	unsigned zeros, i, k;

	for (zeros = 0; zeros < 256; zeros++) {
		for (k = 0; k < 40; k++) {
			for (i = 0; i < 8; i++) {
				unsigned group = zeros >> i & 1 ? 0 :
					1 + random_below(0xffff >> 4 * random_below(4));

				ip[2 * i] = (unsigned char)(group >> 8);
				ip[2 * i + 1] = (unsigned char)group;
			}
			at("groups of zeros: %#x, try %u", zeros, k);
			check_address_text(ip);
		}
	}
	memset(ip, 0, 16);
	ip[10] = ip[11] = 0xff;
	for (k = 0; k < 100; k++) {
		for (i = 12; i < 16; i++)
			ip[i] = (unsigned char)random_next();
		at("IPv4, try %u", k);
		check_address_text(ip);
	}
	for (i = 0; i < 10000; i++) {
		for (k = 0; k < 16; k++)
			ip[k] = (unsigned char)(random_below(3) ? 0 : random_next());
		at("random, try %u", i);
		check_address_text(ip);
	}
}

static void test_address_parse(void)
{
	static const struct { const char *host, *port; } names[] = {
		{ "a.example", "80" }, { "", "80" }, { "192.0.2", "80" }, { "192.0.2.256", "80" },
		{ "192.0.2.1 ", "80" }, { "192.0.2.1:80", "80" }, { "[::1]", "80" }, { "::1::", "80" },
		{ "192.0.2.1", "" }, { "192.0.2.1", "x" }, { "192.0.2.1", "80x" }, { "192.0.2.1", "-1" },
		{ "192.0.2.1", "+80" }, { "192.0.2.1", " 80" }, { "192.0.2.1", "65536" },
		{ "192.0.2.1", "4294967376" }, { "192.0.2.1", "18446744073709551696" }, { "192.0.2.1", NULL },
	};
	struct address a;
	size_t i;

	for (i = 0; i < COUNT(names); i++) {
		at("host \"%s\", port \"%s\"", names[i].host, names[i].port ? names[i].port : "NULL");
		CHECK_INT(address_parse(&a, names[i].host, names[i].port), 0);
	}
}

/* ---- sources ---- */

static struct address address_of(const char *literal, const char *port)
{
	struct address a;

	if (!address_parse(&a, literal, port))
		exit(2);
	address_unmap(&a);
	return a;
}

/* NULL if it has no session. */
static struct source *source_find(const struct address *a)
{
	unsigned char key[9];

	return *source_place(a, key);
}

static void test_sources(void)
{
	struct address a = address_of("192.0.2.1", "1"), b = address_of("192.0.2.1", "2"),
		c = address_of("192.0.2.2", "1"), mapped = address_of("::ffff:192.0.2.1", "3"),
		n1 = address_of("2001:db8:0:1::1", "1"), n2 = address_of("2001:db8:0:3:ffff::2", "1"),
		n3 = address_of("2001:db8:0:4::1", "1");
	struct source *sa, *sc, *s1, *s3;

	tables_init();
	CHECK(source_find(&a) == NULL);
	sa = source_take(&a);
	CHECK_INT(sa->sessions, 1);
	CHECK(source_find(&a) == sa && source_find(&b) == sa);  /* ports don't count */
	CHECK(source_take(&b) == sa);
	CHECK(source_take(&mapped) == sa);
	CHECK_INT(sa->sessions, 3);
	sc = source_take(&c);
	CHECK(sc != sa);
	/* source_bits6 of an IPv6 address count */
	s1 = source_take(&n1);
	CHECK(source_take(&n2) == s1);
	s3 = source_take(&n3);
	CHECK(s3 != s1 && s1 != sa && s1 != sc);
	CHECK_INT(s1->sessions, 2);
	CHECK_INT(source_pool.lent, 4);
	source_release(sa, &a);
	source_release(sa, &mapped);
	CHECK(source_find(&a) == sa);
	source_release(sa, &b);
	CHECK(source_find(&a) == NULL);
	CHECK(source_find(&c) == sc && source_find(&n2) == s1 && source_find(&n3) == s3);
	source_release(s1, &n2);
	source_release(s1, &n1);
	CHECK(source_find(&n1) == NULL);
	source_release(sc, &c);
	source_release(s3, &n3);
	CHECK_INT(source_pool.lent, 0);
}

/* As many addresses as there are sessions, over and over: none is lost or taken for another. */
static void test_sources_many(void)
{
	struct address a[max_sessions];
	struct source *o[max_sessions];
	unsigned char *ip;
	unsigned i, k, round;

	tables_init();
	for (round = 0; round < 300; round++) {
		for (i = 0; i < max_sessions; i++) {
			memset(&a[i], 0, sizeof a[i]);
			a[i].any.sa_family = random_below(2) ? AF_INET : AF_INET6;
			ip = a[i].any.sa_family == AF_INET ? (unsigned char *)&a[i].in.sin_addr :
				a[i].in6.sin6_addr.s6_addr;
			for (k = 0; k < (a[i].any.sa_family == AF_INET ? 4 : 16); k++)
				ip[k] = (unsigned char)random_next();
			o[i] = source_take(&a[i]);
			CHECK_INT(o[i]->sessions, 1);
		}
		CHECK(pool_empty(&source_pool));
		for (i = 0; i < max_sessions; i++)
			CHECK(source_find(&a[i]) == o[i]);
		for (i = round % max_sessions, k = 0; k < max_sessions; k++) {
			source_release(o[i], &a[i]);
			CHECK(source_find(&a[i]) == NULL);
			i = (i + 7) % max_sessions;     /* 7 and max_sessions have no common divisor */
		}
		CHECK_INT(source_pool.lent, 0);
	}
}

/* An IPv4 address and an IPv6 network whose bytes are the same are two. */
static void test_sources_family(void)
{
	struct address four = { .any = { .sa_family = AF_INET } },
		six = { .any = { .sa_family = AF_INET6 } };
	struct source *o;
	unsigned i;

	tables_init();
	for (i = 0; i < 20000 && failures == 0; i++) {  /* enough that both land in one bucket */
		four.in.sin_addr.s_addr = htonl(0x20010000 + i);
		memcpy(&six.in6.sin6_addr, &four.in.sin_addr, 4);
		o = source_take(&four);
		CHECK(source_find(&six) == NULL);
		source_release(o, &four);
	}
}

/* ---- backends ---- */

static void servers_up(void)
{
	tables_init();
	memset(servers, 0, sizeof servers);
	memset(currents, 0, sizeof currents);
	servers_init();
	now = 1000000;
	servers[NAMED].addresses = 1;           /* as if it had been resolved */
}

#define SET(i) ((uint64_t)1 << (i))

static const uint64_t everywhere = SET(A) | SET(B) | SET(BACKUP) | SET(LIMITED) | SET(NAMED);

static void test_servers_init(void)
{
	servers_up();
	CHECK_STR(servers[A].name, "192.0.2.1:3000");
	CHECK_STR(servers[B].name, "[2001:db8::1]:3000");
	CHECK_STR(servers[NAMED].name, "name.example:3000");
	CHECK_STR(servers[IN_FILE].name, "unix:/run/backend");
	CHECK_INT(servers[A].address[0].any.sa_family, AF_INET);
	CHECK_INT(servers[A].address[0].in.sin_port, htons(3000));
	CHECK_INT(servers[B].address[0].any.sa_family, AF_INET6);
	CHECK_INT(servers[IN_FILE].address[0].any.sa_family, AF_UNIX);
	CHECK(servers[NAMED].by_name && !servers[A].by_name && !servers[IN_FILE].by_name);
	CHECK_INT(weights[A], 1);
	CHECK_INT(weights[B], 2);
	CHECK(server_ids[A] != server_ids[B] && server_ids[A] != 0);
}

static uint64_t servers_of(const char *host, const char *target)
{
	uint64_t set;
	const size_t host_len = strlen(host), len = strlen(target);
	const enum why why = servers_for(guard_copy(&input, host, host_len), host_len,
		guard_copy(&output, target, len), len, &set);

	CHECK(why == WHY_NO_NAME || why == (set ? WHY_NONE : WHY_NO_PATH));
	return set;
}

static void test_servers_for(void)
{
	static const struct { const char *host, *target; uint64_t set; } cases[] = {
		{ "b.example", "/chatty", everywhere },
		{ "b.example", "/x/chat", everywhere },
		{ "", "/", everywhere },
		{ "b.example", "/chat", SET(CHAT) },
		{ "b.example", "/chat?x", SET(CHAT) },
		{ "b.example", "/chat/y", SET(CHAT) },
		{ "b.example", "/chat/xy", SET(CHAT) },
		{ "b.example", "/chat/x", SET(CHAT_X) },        /* the longest wins */
		{ "b.example", "/chat/x/y?z", SET(CHAT_X) },
		{ "b.example", "/file", SET(IN_FILE) },
		/* a name goes before a path, and is not left for one */
		{ "shop.test", "/s", SET(SHOP) }, { "SHOP.test.", "/s?x", SET(SHOP) },
		{ "shop.test", "/s/x", SET(SHOP_X) },
		{ "shop.test", "/chat", 0 },
		{ "a.shop.test", "/chat", SET(BELOW) },
		{ "a.b.c.shop.test", "/s", SET(BELOW) },
		{ "b.shop.test", "/s", SET(BELOW) },
		{ "a.b.shop.test", "/s", SET(BELOW_B) },
		{ "a.b.shop.test", "/", 0 },
		{ "xshop.test", "/s", everywhere }, { ".shop.test", "/s", everywhere },
		{ "shop.test.x", "/s", everywhere }, { "test", "/s", everywhere },
	};
	size_t i;

	servers_up();
	for (i = 0; i < COUNT(cases); i++) {
		at("%s %s", cases[i].host, cases[i].target);
		CHECK_INT(servers_of(cases[i].host, cases[i].target), cases[i].set);
	}
}

/* What a Host names, NULL: it is none; and what .name may be. */
static void test_host_name(void)
{
	static const struct { const char *host, *name; int valid; } cases[] = {
		{ "a.example", "a.example", 1 }, { "a.example:8443", "a.example", 0 },
		{ "a.example:", "a.example", 0 }, { "a.example.:443", "a.example.", 0 },
		{ "[2001:db8::1]", "[2001:db8::1]", 1 }, { "[2001:db8::1]:443", "[2001:db8::1]", 0 },
		{ "[::1]:", "[::1]", 0 }, { "192.0.2.1:80", "192.0.2.1", 0 }, { "", NULL, 0 },
		{ "192.0.2.1", "192.0.2.1", 1 }, { "*.example", "*.example", 1 },
		{ "*.[::1]", NULL, 0 }, { "*", "*", 0 }, { "*.", "*.", 0 },
		{ "*.*.example", "*.*.example", 0 }, { ".example", ".example", 0 },
		{ "a b", NULL, 0 }, { "a/b", NULL, 0 }, { "a*.example", "a*.example", 0 },
	};
	size_t i;

	for (i = 0; i < COUNT(cases); i++) {
		const size_t len = strlen(cases[i].host);
		const char *copy = guard_copy(&input, cases[i].host, len);
		struct span s;

		at("%s", cases[i].host);
		CHECK_INT(host_parse(copy, (struct span){ 0, (uint16_t)len }, &s),
			cases[i].name != NULL);
		if (cases[i].name)
			CHECK_BYTES(copy + s.at, s.len, cases[i].name, strlen(cases[i].name));
		CHECK_INT(name_valid(cases[i].host), cases[i].valid);
	}
}

/* By the examples of its specification's section 2.2. */
static void test_proxy_header(void)
{
	static const char v4[] = "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"
		"\xc0\0\x02\x09" "\x7f\0\0\x01" "\xc8\x22\x01\xbb";
	static const char v6[] = "\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24"
		"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x09"
		"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01" "\xff\xff\0\x01";
	struct address from = address_of("192.0.2.9", "51234"), to = address_of("127.0.0.1", "443");
	char out[PROXY_MAX];

	CHECK_BYTES(out, proxy_header(&from, &to, (unsigned char *)out), v4, sizeof v4 - 1);
	from = address_of("2001:db8::9", "65535");
	to = address_of("::1", "1");
	CHECK_BYTES(out, proxy_header(&from, &to, (unsigned char *)out), v6, sizeof v6 - 1);
	CHECK_INT(sizeof v6 - 1, PROXY_MAX);
	CHECK_BYTES(out, proxy_header(NULL, NULL, (unsigned char *)out),
		"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", 16);
}

/* A session that may go anywhere, from that address. */
static struct session *session_for(uint64_t allowed, const char *literal)
{
	struct session *s = session_make(0);

	s->group = allowed;
	s->peer = address_of(literal, "1");
	return s;
}

static void check_picks(const struct session *s, uint64_t want)
{
	uint64_t seen = 0;
	int i, pick;

	for (i = 0; i < 20; i++) {
		pick = server_pick(s);
		CHECK(pick >= 0);
		if (pick >= 0)
			seen |= SET(pick);
	}
	CHECK_INT(seen, want);
}

static void test_server_pick(void)
{
	struct session *s;

	servers_up();
	s = session_for(everywhere, "192.0.2.77");
	at("all good");
	check_picks(s, everywhere & ~SET(BACKUP));
	at("one was tried");
	s->tried = SET(A);
	check_picks(s, SET(B) | SET(LIMITED) | SET(NAMED));
	s->tried = 0;
	at("one is aside");
	servers[B].aside_until = now + 1;
	check_picks(s, SET(A) | SET(LIMITED) | SET(NAMED));
	at("not any more");
	servers[B].aside_until = now;
	check_picks(s, everywhere & ~SET(BACKUP));
	at("one at max_conns");
	servers[LIMITED].active = 2;
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
	servers[LIMITED].active = 1;
	check_picks(s, everywhere & ~SET(BACKUP));
	servers[LIMITED].active = 2;
	at("one without an address");
	servers[NAMED].addresses = 0;
	check_picks(s, SET(A) | SET(B));
	at("backups serve when no other can");
	servers[A].aside_until = servers[B].aside_until = now + 1;
	check_picks(s, SET(BACKUP));
	at("when all are aside, they are tried all the same");
	servers[BACKUP].aside_until = now + 1;
	check_picks(s, SET(A) | SET(B) | SET(BACKUP));
	at("only what its path allows");
	s->group = SET(CHAT);
	check_picks(s, SET(CHAT));
}

static void test_server_pick_none(void)
{
	struct session *s;

	servers_up();
	s = session_for(everywhere, "192.0.2.77");
	s->tried = everywhere;
	CHECK_INT(server_pick(s), PICK_NONE);
	s->tried = everywhere & ~SET(LIMITED);
	servers[LIMITED].active = 2;
	CHECK_INT(server_pick(s), PICK_FULL);           /* 503 */
	s->tried = everywhere & ~SET(NAMED);
	servers[NAMED].addresses = 0;
	servers[NAMED].pending = servers[NAMED].down = 1;
	CHECK_INT(server_pick(s), PICK_NONE);           /* the resolver said no: 502 */
	servers[NAMED].down = 0;
	CHECK_INT(server_pick(s), PICK_WAIT);           /* the resolver has not answered yet */
}

static void test_server_pick_balance(void)
{
	static const char *const near[] = { "192.0.2.1", "192.0.2.200", "192.0.2.255" };
	uint64_t seen = 0;
	char literal[20];
	struct session *s;
	int first, i;

	servers_up();
	at("ROUND_ROBIN");                              /* weight 2 for B */
	s = session_for(SET(A) | SET(B), "192.0.2.77");
	CHECK_INT(server_pick(s), B);
	CHECK_INT(server_pick(s), A);
	CHECK_INT(server_pick(s), B);
	CHECK_INT(server_pick(s), B);
	CHECK_INT(server_pick(s), A);

	at("IP_HASH");
	balance = IP_HASH;
	first = server_pick(session_for(everywhere, near[0]));
	for (i = 0; i < 10; i++)                        /* hash_bits4 = 24 */
		CHECK_INT(server_pick(session_for(everywhere, near[i % 3])), first);
	for (i = 0; i < 100; i++) {
		sprintf(literal, "10.0.%d.1", i);
		seen |= SET(server_pick(session_for(everywhere, literal)));
	}
	CHECK_INT(seen, everywhere & ~SET(BACKUP));
	at("IP_HASH, its backend aside: only its clients move, and come back");
	for (i = 0; i < 100; i++) {
		sprintf(literal, "10.0.%d.1", i);
		first = server_pick(session_for(everywhere, literal));
		servers[A].aside_until = now + 1;
		if (first == A)
			CHECK(server_pick(session_for(everywhere, literal)) != A);
		else
			CHECK_INT(server_pick(session_for(everywhere, literal)), first);
		servers[A].aside_until = 0;
		CHECK_INT(server_pick(session_for(everywhere, literal)), first);
	}
	at("IP_HASH, IPv6: the /64");
	first = server_pick(session_for(everywhere, "2001:db8:0:1::1"));
	CHECK_INT(server_pick(session_for(everywhere, "2001:db8:0:1:ffff:ffff:ffff:ffff")), first);
}

static void test_server_pick_least(void)
{
	struct session *s;
	unsigned i;

	servers_up();
	balance = LEAST_CONN;
	s = session_for(SET(A) | SET(B) | SET(NAMED), "192.0.2.77");
	at("all idle");
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
	at("one has none");
	servers[A].active = servers[B].active = 1;
	check_picks(s, SET(NAMED));
	at("for its weight: 1, 1 of 2, 1");
	servers[NAMED].active = 1;
	check_picks(s, SET(B));
	at("1, 2 of 2, 1");
	servers[B].active = 2;
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
	at("1, 3 of 2, 2");
	servers[B].active = 3;
	servers[NAMED].active = 2;
	check_picks(s, SET(A));
	at("3, 4 of 2, 2");
	servers[A].active = 3;
	servers[B].active = 4;
	check_picks(s, SET(B) | SET(NAMED));
	at("sessions fill up evenly");
	servers[A].active = servers[B].active = servers[NAMED].active = 0;
	for (i = 0; i < 400; i++)
		servers[server_pick(s)].active++;
	CHECK_INT(servers[A].active, 100);
	CHECK_INT(servers[B].active, 200);
	CHECK_INT(servers[NAMED].active, 100);
	at("backups still wait");
	s = session_for(everywhere, "192.0.2.77");
	for (i = 0; i < 50; i++)
		CHECK(server_pick(s) != BACKUP);
}

static int cookie_of(const char *lines)
{
	char in[2048];
	struct request r;
	const char *buf;
	int n = snprintf(in, sizeof in, UPGRADE "%s\r\n", lines);

	if (request_feed(&r, in, (size_t)n, ONCE, 0, &buf) != WHY_NONE)
		return -2;
	return cookie_find(&r.head, buf, UINT64_MAX);
}

/* An id that says nothing of the address, the same each time, and found among other cookies. */
static void test_cookies(void)
{
	static const struct { const char *format; int found; } cases[] = {
		{ "Cookie: %s\r\n", 1 },
		{ "cookie:%s\r\n", 1 },
		{ "Cookie: a=b; %s\r\n", 1 },
		{ "Cookie: %s; a=b\r\n", 1 },
		{ "Cookie: a=b; %s; c=d\r\n", 1 },
		{ "Cookie: a=b;%s;c=d\r\n", 1 },
		{ "Cookie: a=b\r\nCookie: %s\r\n", 1 },
		{ "Cookie: wssproxy=; %s\r\n", 1 },
		{ "Cookie: wssproxy=0123456789abcdef; %s\r\n", 1 },
		{ "Cookie: x%s\r\n", 0 },
		{ "Cookie: %sx\r\n", 0 },
		{ "Cookie: a=%s\r\n", 0 },
		{ "Cookie: a %s\r\n", 0 },
		{ "Cookie: a=\"%s\"\r\n", 0 },
		{ "Set-Cookie: %s\r\n", 0 },
		{ "X-Cookie: %s\r\n", 0 },
		{ "Cookie:\r\nA: %s\r\n", 0 },
	};
	char lines[1024], first[sizeof servers[0].cookie];
	unsigned i, k;

	servers_up();
	strcpy(first, servers[B].cookie);
	servers_up();
	CHECK_STR(servers[B].cookie, first);
	for (i = 0; i < BACKENDS; i++) {
		at("backend %u", i);
		CHECK(strncmp(servers[i].cookie, "wssproxy=", 9) == 0);
		CHECK_INT(strlen(servers[i].cookie), 9 + 16);
		CHECK_INT(strspn(servers[i].cookie + 9, "0123456789abcdef"), 16);
		for (k = 0; k < i; k++)
			CHECK(strcmp(servers[i].cookie, servers[k].cookie) != 0);
		sprintf(lines, "Cookie: %s\r\n", servers[i].cookie);
		CHECK_INT(cookie_of(lines), i);
	}
	for (i = 0; i < COUNT(cases); i++) {
		at("%s", cases[i].format);
		sprintf(lines, cases[i].format, servers[B].cookie);
		CHECK_INT(cookie_of(lines), cases[i].found ? B : -1);
	}
	at("none");
	CHECK_INT(cookie_of(""), -1);
	CHECK_INT(cookie_of("Cookie: wssproxy\r\n"), -1);
	CHECK_INT(cookie_of("Cookie: wssproxy=\r\n"), -1);
	CHECK_INT(cookie_of("Cookie: ;;; ;\r\n"), -1);
}

static void test_cookie_add(void)
{
	struct session *s;
	char want[300];
	size_t len;
	unsigned plain;

	servers_up();
	for (plain = 0; plain < 2; plain++) {
		s = session_for(everywhere, "192.0.2.77");
		s->server = B;
		s->plain = (uint8_t)plain;
		strcpy(rendered, OK "A: b\r\n" END);
		len = cookie_add(s, rendered, strlen(rendered));
		rendered[len] = '\0';
		sprintf(want, OK "A: b\r\nSet-Cookie: %s; Path=/; HttpOnly; %sSameSite=Lax\r\n" END,
			servers[B].cookie, plain ? "" : "Secure; ");
		CHECK_STR(rendered, want);
	}
}

/* The cookie decides while its backend can serve, and only then. */
static void test_server_pick_sticky(void)
{
	struct session *s;

	servers_up();
	balance = STICKY_COOKIE;
	s = session_for(everywhere, "192.0.2.77");
	s->sticky = NAMED;
	at("its backend");
	check_picks(s, SET(NAMED));
	at("aside");
	servers[NAMED].aside_until = now + 1;
	check_picks(s, SET(A) | SET(B) | SET(LIMITED));
	at("back");
	servers[NAMED].aside_until = now;
	check_picks(s, SET(NAMED));
	at("tried");
	s->tried = SET(NAMED);
	check_picks(s, SET(A) | SET(B) | SET(LIMITED));
	at("full");
	s->tried = 0;
	s->sticky = LIMITED;
	check_picks(s, SET(LIMITED));
	servers[LIMITED].active = 2;
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
	at("a cookie of another path");
	s->sticky = CHAT;
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
	at("none");
	s->sticky = -1;
	check_picks(s, SET(A) | SET(B) | SET(NAMED));
}

/* max_fails failures within fail_ms put a backend aside for fail_ms. */
static void test_server_failed(void)
{
	struct server *v = &servers[A];

	servers_up();
	log_open_pipe();
	server_failed(v, "refused");
	CHECK(v->aside_until <= now);                   /* max_fails is 2 */
	CHECK_STR(log_read(), "");
	now += fail_ms + 1;                             /* the first is forgotten */
	server_failed(v, "refused");
	CHECK(v->aside_until <= now);
	now += fail_ms;
	server_failed(v, "refused");
	CHECK_INT(v->aside_until, now + fail_ms);
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 down why=refused s=0 requests=0\n");
	CHECK_INT(v->failures, 3);
	server_failed(v, "timeout");                    /* tried all the same, and failed */
	CHECK_INT(v->aside_until, now + fail_ms);
	CHECK_STR(log_read(), "");                      /* said once */
	now += 1500;
	server_good(v);
	CHECK(v->aside_until <= now);
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 up s=1 requests=0\n");
	server_good(v);
	CHECK_STR(log_read(), "");
	server_failed(v, "refused");                    /* a new count */
	CHECK(v->aside_until <= now);
}

/* One that stays down says so once a minute, with what it costs. */
static void test_server_stays_down(void)
{
	struct server *v = &servers[A];
	struct session *s;
	char want[100];
	unsigned i;

	servers_up();
	log_open_pipe();
	s = session_make(0);
	s->state = CONNECT;
	s->group = (uint64_t)1 << A;
	server_failed(v, "refused");
	for (i = 0; i < 180; i++) {
		at("second %u", i);
		server_failed(v, i < 100 ? "refused" : "timeout");
		sprintf(want, "backend name=192.0.2.1:3000 down why=%s s=%u requests=%u\n",
			i < 100 ? "refused" : "timeout", i, i);
		CHECK_STR(log_read(), i % 60 ? "" : want);
		session_reject(s, 502, WHY_NO_BACKEND);
		log_read();
		now += 1000;
	}
	s->state = RESPONSE;                            /* that has a backend */
	session_reject(s, 502, WHY_BAD_RESPONSE);
	s->state = CONNECT;
	s->group = (uint64_t)1 << B;                    /* that would not have gone there */
	session_reject(s, 502, WHY_NO_BACKEND);
	log_read();
	server_good(v);
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 up s=180 requests=180\n");
	now += 1000;                                    /* a new count, said at once */
	server_failed(v, "reset");
	server_failed(v, "reset");
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 down why=reset s=0 requests=0\n");
}

/* A check that connects lifts what failed connects have set, and nothing else. */
static void test_check_good(void)
{
	struct server *v = &servers[A];

	servers_up();
	log_open_pipe();
	fds[FD_CHECK + A].fd = -1;
	fds[FD_CHECK + A].revents = POLLOUT;
	at("connects");
	server_failed(v, "refused");
	server_failed(v, "refused");
	CHECK(v->aside_until > now);
	checks_poll();
	CHECK(v->aside_until <= now);
	log_read();
	at("TLS");
	server_failed(v, "expired");
	v->held_until = now + fail_ms;
	checks_poll();
	CHECK_INT(v->fails, 1);                         /* it counts on */
	server_failed(v, "expired");
	v->held_until = now + fail_ms;
	CHECK_INT(v->aside_until, now + fail_ms);
	checks_poll();
	CHECK_INT(v->aside_until, now + fail_ms);
	at("TLS, then connects");
	now += fail_ms / 2;
	server_failed(v, "refused");
	CHECK_INT(v->aside_until, now + fail_ms);
	checks_poll();
	CHECK_INT(v->aside_until, now + fail_ms / 2);
	at("the time of TLS is over");
	now += fail_ms + 1;
	checks_poll();
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 down why=expired s=0 requests=0\n");
	server_failed(v, "refused");
	server_failed(v, "refused");
	checks_poll();
	CHECK(v->aside_until <= now);
	CHECK_STR(log_read(), "backend name=192.0.2.1:3000 up s=15 requests=0\n");
	fds[FD_CHECK + A].revents = 0;
}

/* Where clients go is the same on each machine and after each release: these values are fixed. */
static void test_rendezvous_fixed(void)
{
	static const unsigned weight[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
	uint64_t ids[8], sum = 0;
	unsigned i;

	fill_ids(ids, 8, 1);
	for (i = 0; i < 1000; i++)
		sum = sum * 31 + (uint64_t)client_pick(ids, weight, 8, ALL(8), RANDOM6, i);
	CHECK_INT(sum, 4842451436704906765);
}

/* ---- answers of our own ---- */

static const unsigned statuses[] = { 308, 400, 403, 404, 405, 408, 414, 421, 426, 431, 501, 502, 503,
	504, 505 };

/* The reasons have the statuses of the design, all of them, and each its own word in the log. */
static void test_whys(void)
{
	uint64_t seen = 0;
	unsigned i, k;

	for (i = 0; i < COUNT(whys); i++) {
		at("reason %u", i);
		CHECK(whys[i].text != NULL && whys[i].text[0] != '\0');
		CHECK(strcspn(whys[i].text, " =\"\\") == strlen(whys[i].text));
		for (k = 0; k < i; k++)
			CHECK(strcmp(whys[k].text, whys[i].text) != 0);
		if (whys[i].status == 0)
			continue;
		for (k = 0; k < COUNT(statuses) && statuses[k] != whys[i].status; k++)
			;
		CHECK(k < COUNT(statuses));
		seen |= SET(k);
		CHECK(strcmp(status_text(whys[i].status), "Error") != 0);
	}
	CHECK_INT(seen, ALL(COUNT(statuses)));
	CHECK_STR(whys[WHY_KEY].text, "bad-key");
}

/* A session whose request is this one, and has no answer yet. */
static struct session *session_asking(const char *request)
{
	struct session *s = session_make(0);
	const char *buf;

	tables_init();
	head_load(s);
	request_feed(&hd->u.request, request, strlen(request), ONCE, 0, &buf);
	memcpy(hd->bytes, request, strlen(request));
	hd->len = strlen(request);
	return s;
}

/* Our own answers are good HTTP by our own rules. */
static void test_reply_compose(void)
{
	struct session *s;
	struct response r;
	size_t body;
	unsigned i, head;

	for (i = 0; i < COUNT(whys); i++)
	for (head = 0; head < 2; head++) {
		if (whys[i].status == 0)
			continue;
		at("%s, HEAD %u", whys[i].text, head);
		s = session_asking(UPGRADE END);
		s->head = (uint8_t)head;
		reply_compose(s, (enum why)i);
		CHECK_INT(hd->off, 0);
		memset(&r, 0, sizeof r);
		CHECK_WHY(response_parse(&r, hd->bytes, hd->len), WHY_NONE);
		CHECK_WHY(response_check(&r, hd->bytes, 1, (int)head, ACCEPT), WHY_NONE);
		CHECK_INT(r.status, whys[i].status);
		CHECK_INT(r.framing, BODY_LENGTH);
		body = hd->len - r.head.size;
		CHECK_INT(body, head ? 0 : r.length);
		CHECK(body < 200);
		memcpy(rendered, hd->bytes, r.head.size);
		rendered[r.head.size] = '\0';
		CHECK(head_is_clean(rendered, r.head.size));
		CHECK(strncmp(take("Content-Type"), "text/plain", 10) == 0);
		CHECK(strstr(take("Connection"), "close") != NULL);
		if (r.status == 426) {
			CHECK_STR(take("Sec-WebSocket-Version"), "13");
			CHECK_STR(take("Upgrade"), "websocket");        /* 9110 15.5.22: MUST */
		}
		if (r.status == 405)
			CHECK(strstr(take("Allow"), "GET") != NULL);    /* 9110 15.5.6: MUST */
		if (r.status == 308)
			CHECK_STR(take("Location"), "https://a.example:8443/");
	}
}

static void test_location(void)
{
	static const struct { const char *request, *want; } cases[] = {
		{ GET HOST END, "https://a.example:8443/" },
		{ "GET /x/y?z=1&w HTTP/1.1\r\n" HOST END, "https://a.example:8443/x/y?z=1&w" },
		{ GET "Host: a.example:80\r\n" END, "https://a.example:8443/" },
		{ GET "Host: a.example:\r\n" END, "https://a.example:8443/" },
		{ GET "Host: localhost\r\n" END, "https://localhost:8443/" },
		{ GET "Host: a1\r\n" END, "https://a1:8443/" },
		{ GET "Host: 192.0.2.1:8080\r\n" END, "https://192.0.2.1:8443/" },
		{ GET "Host: [2001:db8::1]\r\n" END, "https://[2001:db8::1]:8443/" },
		{ GET "Host: [2001:db8::1]:8080\r\n" END, "https://[2001:db8::1]:8443/" },
		{ GET "Host: [::1]\r\n" END, "https://[::1]:8443/" },
		{ "GET http://b.example:80/x HTTP/1.1\r\n" HOST END, "https://b.example:8443/x" },
		{ "GET http://b.example HTTP/1.1\r\n" HOST END, "https://b.example:8443/" },
		{ "GET http://b.example?y HTTP/1.1\r\n" HOST END, "https://b.example:8443/?y" },
		{ "OPTIONS * HTTP/1.1\r\n" HOST END, "https://a.example:8443/" },
		{ "GET //evil.example/ HTTP/1.1\r\n" HOST END, "https://a.example:8443//evil.example/" },
	};
	struct session *s;
	size_t i;

	for (i = 0; i < COUNT(cases); i++) {
		at_input(__LINE__, cases[i].request, strlen(cases[i].request));
		s = session_asking(cases[i].request);
		reply_compose(s, WHY_REDIRECT);
		memcpy(rendered, hd->bytes, hd->len);
		rendered[hd->len] = '\0';
		CHECK_STR(take("Location"), cases[i].want);
	}
}

/* ---- what configuration decides about a request ---- */

static enum why why_of(const char *request)
{
	struct request r;
	const char *buf;

	return request_feed(&r, request, strlen(request), ONCE, 0, &buf);
}

#define FROM(origin) UPGRADE "Origin: " origin "\r\n" END

static void test_origins(void)
{
	at("any");
	CHECK_WHY(why_of(UPGRADE END), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://evil.example")), WHY_NONE);

	at("a list");
	origins[0] = "https://a.example";
	origins[1] = "https://b.example:8443";
	CHECK_WHY(why_of(FROM("https://a.example")), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://b.example:8443")), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://b.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("http://a.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://a.example.evil")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://a.exampl")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://a.example/")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("null")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("")), WHY_ORIGIN);
	CHECK_WHY(why_of(UPGRADE END), WHY_ORIGIN);
	CHECK_WHY(why_of(UPGRADE "Origin: https://a.example\r\nOrigin: https://evil\r\n" END), WHY_ORIGIN);
	CHECK_WHY(why_of(UPGRADE "Origin: https://evil\r\nOrigin: https://a.example\r\n" END), WHY_ORIGIN);
	CHECK_WHY(why_of(GET HOST "Origin: https://evil.example\r\n" END), WHY_NONE);  /* no upgrade */

	at("none");
	origins[2] = "none";
	CHECK_WHY(why_of(UPGRADE END), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://a.example")), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://evil.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("none")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("")), WHY_ORIGIN);
	CHECK_WHY(why_of(UPGRADE "Origin: https://evil\r\nOrigin: https://evil\r\n" END), WHY_ORIGIN);
	origins[2] = NULL;

	at("same");
	origins[0] = "same";
	origins[1] = NULL;
	CHECK_WHY(why_of(FROM("https://a.example")), WHY_NONE);
	CHECK_WHY(why_of(FROM("http://a.example")), WHY_NONE);
	CHECK_WHY(why_of(FROM("https://b.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://a.example:8443")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("a.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("ftp://a.example")), WHY_ORIGIN);
	CHECK_WHY(why_of(FROM("https://a.example.b")), WHY_ORIGIN);
	CHECK_WHY(why_of(UPGRADE END), WHY_ORIGIN);
}

static void test_x_forwarded_for(void)
{
	static const char in[] = UPGRADE "X-Forwarded-For: 198.51.100.1\r\nX-Forwarded-Proto: ftp\r\n"
		"X-Real-IP: 198.51.100.1\r\nX_Forwarded_For: 198.51.100.2\r\nA: b\r\n" END;

	at("REPLACE");
	x_forwarded_for = REPLACE;
	upgrade_rendered(LIT(in), CLIENT);
	CHECK_STR(rendered, GET REST "A: b\r\n" END);

	at("OFF");
	x_forwarded_for = OFF;
	request_rendered(LIT(in), CLIENT, "https");
	CHECK_STR(take("X-Forwarded-For"), "198.51.100.1");
	CHECK_STR(take("X-Forwarded-Proto"), "ftp");
	CHECK_STR(take("X-Real-IP"), "198.51.100.1");
	CHECK_STR(take("Connection"), "Upgrade");
	CHECK_STR(take("Upgrade"), "websocket");
	CHECK_STR(rendered, GET REST "X_Forwarded_For: 198.51.100.2\r\nA: b\r\n" END);
}

/* ---- sessions ---- */

static int far_ends[4 * max_sessions];
static unsigned far_count;

/* As a listener takes it: a connection from that address. */
static void client_connects(const char *literal)
{
	static int set;
	struct address a = address_of(literal, "1");
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) < 0) {
		perror("socketpair");
		exit(2);
	}
	if (!set)
		set = epoll_create1(EPOLL_CLOEXEC);
	fds[FD_EPOLL].fd = set;
	far_ends[far_count++] = pair[1];
	listener_take(pair[0], &a, 0);
}

/* Whether the one that connected last was turned away. */
static int client_turned_away(void)
{
	char byte;

	return recv(far_ends[far_count - 1], &byte, 1, 0) == 0;
}

static struct session *session_of(const char *literal)
{
	struct address a = address_of(literal, "1");
	const struct source *o = source_find(&a);
	unsigned i;

	for (i = 0; i < max_sessions; i++)
		if (sessions[i].state != FREE && sessions[i].source == o)
			return &sessions[i];
	return NULL;
}

static unsigned sessions_of(const char *literal)
{
	struct address a = address_of(literal, "1");
	const struct source *o = source_find(&a);

	return o != NULL ? o->sessions : 0;
}

static void test_sessions_per_ip(void)
{
	unsigned i;

	tables_init();
	log_open_pipe();
	for (i = 0; i < max_per_ip; i++)
		client_connects("192.0.2.1");
	CHECK_INT(sessions_of("192.0.2.1"), max_per_ip);
	CHECK_STR(log_read(), "");
	client_connects("192.0.2.1");
	CHECK_INT(sessions_of("192.0.2.1"), max_per_ip);
	CHECK_STR(log_read(), "reject id=13 client=192.0.2.1:1 status=- why=per-ip\n");
	CHECK(client_turned_away());
	client_connects("192.0.2.2");                   /* another is not concerned */
	CHECK_INT(sessions_of("192.0.2.2"), 1);
	session_close(session_of("192.0.2.1"));
	client_connects("192.0.2.1");
	CHECK_INT(sessions_of("192.0.2.1"), max_per_ip);
}

/* Somebody who finds a place, if need be of one who gives way. */
static void newcomer_connects(const char *literal)
{
	CHECK(place_find());
	client_connects(literal);
	CHECK(!client_turned_away());
	CHECK_INT(sessions_of(literal), 1);
	CHECK_INT(session_pool.lent, max_sessions);
}

static void table_fill(void)
{
	unsigned i;
	char literal[24];

	tables_init();
	log_open_pipe();
	now = accept_after = 5000;
	for (i = 0; i < max_sessions; i++, now++) {
		CHECK(place_find());
		sprintf(literal, "198.51.100.%u", i);
		client_connects(literal);
	}
	CHECK(!place_find());
	CHECK_STR(log_read(), "");
}

/* A full table: the one that has not asked for longest gives way, once it has had its time. */
static void test_sessions_displaced(void)
{
	table_fill();
	now = 5000 + DISPLACE_MS - 1;
	CHECK(!place_find());
	now++;
	newcomer_connects("192.0.2.1");
	CHECK_STR(log_read(), "reject id=1 client=198.51.100.0:1 status=- why=displaced\n");
	CHECK(!place_find());                           /* the next came 1 ms later */
	now++;
	newcomer_connects("192.0.2.2");
	CHECK_STR(log_read(), "reject id=2 client=198.51.100.1:1 status=- why=displaced\n");

	/* who waits for something of ours does not give way */
	now++;
	link_append(&shelf_pool.waiters, &session_of("198.51.100.2")->wait);
	CHECK(!place_find());
	now++;
	newcomer_connects("192.0.2.3");
	CHECK_STR(log_read(), "reject id=4 client=198.51.100.3:1 status=- why=displaced\n");

	/* each step forward gives as long again: to another state, */
	now += 2;
	session_enter(session_of("198.51.100.4"), HANDSHAKE);
	newcomer_connects("192.0.2.4");
	CHECK_STR(log_read(), "reject id=6 client=198.51.100.5:1 status=- why=displaced\n");
	/* or its ClientHello */
	now = 5000 + 2 * DISPLACE_MS;
	place_start(session_of("198.51.100.4"));
	CHECK_STR(log_read(), "");
	newcomer_connects("192.0.2.6");
	CHECK_STR(log_read(), "reject id=7 client=198.51.100.6:1 status=- why=displaced\n");
	CHECK_INT(sessions_of("198.51.100.2") + sessions_of("198.51.100.4"), 2);

	/* nor does who is past its request */
	rejects_over();
	session_enter(session_of("198.51.100.7"), RELAY);
	newcomer_connects("192.0.2.7");
	CHECK_STR(log_read(), "reject id=9 client=198.51.100.8:1 status=- why=displaced\n");

	/* of those at max_per_ip nobody is let in for another */
	session_of("192.0.2.7")->source->sessions = max_per_ip;
	CHECK(place_find());
	client_connects("192.0.2.7");
	CHECK(client_turned_away());
	CHECK_STR(log_read(), "reject id=31 client=192.0.2.7:1 status=- why=per-ip\n");
	CHECK_INT(session_pool.lent, max_sessions);
}

/* Without a place, and nobody who gives way, listeners are looked at now and then. */
static void test_sessions_full(void)
{
	unsigned i;
	char literal[24];

	table_fill();
	for (i = 0; i < max_sessions; i++) {
		sprintf(literal, "198.51.100.%u", i);
		session_enter(session_of(literal), RELAY);
	}
	now += 10 * DISPLACE_MS;
	CHECK(!place_find());
	listeners_watch();
	CHECK_INT(fds[FD_LISTEN].events, POLLIN);
	full_said = 1;
	listener_event(0);                              /* somebody is there */
	listeners_watch();
	CHECK_INT(fds[FD_LISTEN].events, 0);
	CHECK_INT(timers_next(), KNOCK_MS);
	now += KNOCK_MS;
	listeners_watch();
	CHECK_INT(fds[FD_LISTEN].events, POLLIN);
	listener_event(0);
	session_close(session_of("198.51.100.1"));
	listeners_watch();
	CHECK_INT(fds[FD_LISTEN].events, POLLIN);       /* at once */
	accept_after = now + 1;                         /* after EMFILE */
	listeners_watch();
	CHECK_INT(fds[FD_LISTEN].events, 0);
}

/* Whatever the order in which sessions end, nothing stays behind. */
static void test_sessions_closed(void)
{
	unsigned i, k, round;
	char literal[24], byte;

	tables_init();
	for (round = 0; round < 50; round++) {
		far_count = 0;
		for (i = 0; i < max_sessions; i++) {
			sprintf(literal, "192.0.2.%u", i % 5 + 1);
			client_connects(literal);
		}
		for (i = 0, k = round % max_sessions; i < max_sessions; i++, k = (k + 5) % max_sessions)
			session_close(&sessions[k]);
		for (i = 0; i < far_count; i++) {
			CHECK_INT(recv(far_ends[i], &byte, 1, 0), 0);   /* its end was closed */
			close(far_ends[i]);
		}
		CHECK_INT(session_pool.lent, 0);
		CHECK_INT(source_pool.lent, 0);
		CHECK_INT(records_pool.lent, 0);
		CHECK_INT(shelf_pool.lent, 0);
		rejects_over();
		for (i = 0; i < QUEUES; i++)
			CHECK(link_alone(&queues[i].list));
	}
}

/* A tunnel in the clear whose far ends are the last of far_ends[] and *backend. */
static struct session *tunnel_open(int *backend)
{
	struct session *s;
	int pair[2];

	tables_init();
	servers_up();
	log_open_pipe();
	client_connects("192.0.2.1");
	s = session_of("192.0.2.1");
	CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), 0);
	s->backend.fd = pair[0];
	CHECK(leg_watch(s, &s->backend));
	*backend = pair[1];
	s->framing = BODY_TUNNEL;
	s->upgrade = 1;
	s->body = body_start(0, UINT64_MAX);
	session_enter(s, RELAY);
	session_run(s, 0);
	return s;
}

/* One of the loop, as far as sessions have to do with it. */
static void turn(void)
{
	sessions_epoll();
	sessions_turn();
}

static void tunnel_says(int from, size_t len, int to)
{
	static char bytes[1 << 17];
	size_t got = 0;
	ssize_t n;

	CHECK_INT(send(from, bytes, len, 0), len);
	turn();
	while ((n = recv(to, bytes, sizeof bytes, 0)) > 0)
		got += (size_t)n;
	CHECK_INT(got, len);
}

/* What the epoll set told once is not forgotten: bytes that a run has left, an end behind bytes. */
static void test_told(void)
{
	int backend, client, i;
	struct session *s = tunnel_open(&backend);
	size_t got = 0;
	ssize_t n;
	char byte;

	client = far_ends[far_count - 1];
	for (i = 0; i < 20; i++) {
		tunnel_says(client, 10, backend);
		tunnel_says(backend, 20000, client);    /* more than one read */
	}
	/* what both said before it ran is two events */
	CHECK_INT(send(client, "ab", 2, 0), 2);
	tunnel_says(backend, 1, client);
	CHECK_INT(recv(backend, &byte, 1, 0) + recv(backend, &byte, 1, 0), 2);
	CHECK(link_alone(&s->wait));
	/* more than one run may take */
	for (i = 0; i < 10; i++)
		CHECK_INT(send(client, scratch, 16384, 0), 16384);
	turn();
	for (i = 1; !link_alone(&runnable); i++) {
		CHECK(!link_alone(&s->wait));
		while ((n = recv(backend, scratch, sizeof scratch, 0)) > 0)
			got += (size_t)n;
		sessions_turn();
	}
	CHECK(i >= 2);
	while ((n = recv(backend, scratch, sizeof scratch, 0)) > 0)
		got += (size_t)n;
	CHECK_INT(got, 10 * 16384);
	/* an end behind bytes */
	CHECK_INT(send(backend, "a", 1, 0), 1);
	shutdown(backend, SHUT_WR);
	turn();
	CHECK_INT(recv(client, &byte, 1, 0), 1);
	CHECK(s->backend.eof);
	session_close(s);
	close(backend);
}

/* An event of a connection that is no more does not count for the next one, neither a backend's, nor
 * a client's who was in the same slot and whose descriptor somebody still has. */
static void test_told_late(void)
{
	int backend, pair[2];
	struct session *s = tunnel_open(&backend);

	s->state = CONNECT;
	s->backend.full = 1;
	CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), 0);
	close(backend);
	close(s->backend.fd);
	s->backend.fd = pair[0];
	sessions_epoll();
	CHECK(s->backend.full && !s->backend.gone && link_alone(&runnable));
	s->id++;
	shutdown(far_ends[far_count - 1], SHUT_WR);
	sessions_epoll();
	CHECK(!s->client.gone && link_alone(&runnable));
	session_close(s);
	close(pair[1]);
}

/* Who sends bulk is read ahead into a spare set of buffers, while they abound and bytes are there. */
static void test_bulk(void)
{
	unsigned i, k, busy;
	int ends[2], least = 1;

	for (k = 0; k < 2; k++)
		for (busy = 0; busy <= max_busy - 1; busy++) {
			struct session *s = (pool_reset(&records_pool),
				tunnel_open(&ends[1]));
			struct leg *l = k == 0 ? &s->client : &s->backend;

			at("%s sends, %u of %u busy", k == 0 ? "client" : "backend", busy, max_busy);
			ends[0] = far_ends[far_count - 1];
			for (i = 0; i < busy; i++)
				CHECK(pool_lend(&records_pool) != NULL);
			for (i = 0; i < 8; i++)
				CHECK_INT(send(ends[k], scratch, 16384 + 512, 0), 16384 + 512);
			for (i = 0; i < 3; i++) {
				uint64_t before = s->rx + s->tx;

				l->in = 1;
				session_run(s, 0);              /* takes its share */
				CHECK(s->rx + s->tx - before < SHARE + BULK);
			}
			CHECK_INT(l->filled, 2);
			CHECK(l->spare == NULL);                /* nothing is in it, but it was there */
			CHECK_INT(records_pool.fresh, busy + 1 + (busy + 1 < max_busy / 2));
			/* bytes that the other does not take stay in it, and go with it; when buffers
			 * are scarce they are not read at all */
			setsockopt(k == 0 ? s->backend.fd : s->client.fd, SOL_SOCKET, SO_SNDBUF, &least,
				sizeof least);
			for (i = 0; i < 8; i++)
				(void)!send(ends[k], scratch, sizeof scratch, 0);
			l->in = 1;
			session_run(s, 0);
			CHECK_INT(l->spare != NULL, busy + 1 < max_busy / 2);
			CHECK_INT(records_pool.lent, busy + (l->spare ? 2 : busy + 1 <= max_busy / 2));
			session_close(s);
			CHECK_INT(records_pool.lent, busy);
			close(ends[1]);
			close(ends[0]);
		}
}

/* A backend that reads nothing until it is read from, like an echo that is full both ways: what it has
 * sent goes on, and the loop does not turn around it. */
static void test_relay_full(void)
{
	int backend, least = 1;
	struct session *s = tunnel_open(&backend);
	char bytes[4096] = { 0 };
	unsigned i;

	setsockopt(s->backend.fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
	for (i = 0; i < 20; i++) {
		send(far_ends[far_count - 1], bytes, sizeof bytes, 0);
		turn();
	}
	CHECK(s->backend.full);
	CHECK_INT(send(backend, "hello", 5, 0), 5);
	turn();
	CHECK(link_alone(&s->wait));
	CHECK_INT(recv(far_ends[far_count - 1], bytes, sizeof bytes, 0), 5);
	session_close(s);
	close(backend);
}

/* Who sits on a buffer without progress for stall_ms loses it, but only when another wants it. */
static void test_stallers(void)
{
	unsigned i, busy;
	struct session *s;

	tables_init();
	log_open_pipe();
	now = 1000;
	client_connects("192.0.2.1");                   /* has another kind of buffer: not in the way */
	CHECK(shelf_borrow(&sessions[0]));
	timer_start(&queues[Q_STALL], &sessions[0].stall);
	for (i = 0; i < max_busy; i++) {
		client_connects("192.0.2.2");
		s = &sessions[i + 1];
		CHECK(records_borrow(s));
		timer_start(&queues[Q_STALL], &s->stall);
		now += 10;
	}
	now += 100 * stall_ms;
	stallers_close();
	CHECK_INT(session_pool.lent, max_busy + 1);     /* nobody wants one */
	CHECK_INT(records_borrow(&sessions[0]), 0);
	now = 1000 + stall_ms - 1;
	stallers_close();
	CHECK_INT(session_pool.lent, max_busy + 1);     /* not long enough */
	now += 1;
	stallers_close();
	CHECK_INT(session_pool.lent, max_busy);
	CHECK_INT(sessions[1].state, FREE);             /* the one that has moved nothing for longest */
	CHECK(sessions[0].rec != NULL);
	CHECK(strstr(log_read(), "why=stall\n") != NULL);
	now += 100 * stall_ms;
	stallers_close();
	CHECK_INT(session_pool.lent, max_busy);         /* no one waits any more */
	for (i = busy = 0; i < max_sessions; i++)
		busy += sessions[i].state != FREE && sessions[i].rec != NULL;
	CHECK_INT(busy, max_busy);
}

/* How much of what a backend sends belongs to its answer, and what its end is called. */
static void test_answer_take(void)
{
	struct session *s = session_make(0);

	at("a length");
	s->framing = BODY_LENGTH;
	s->answer = body_start(0, 10);
	CHECK_INT(answer_take(s, "01234", 5), 5);
	CHECK(!s->backend.eof && s->why == WHY_NONE);
	CHECK_INT(answer_take(s, "56789abc", 8), 5);
	CHECK(s->backend.eof && s->why == WHY_DONE && s->by == BY_BACKEND);

	at("a length of 0");
	s = session_make(0);
	s->framing = BODY_LENGTH;
	s->answer = body_start(0, 0);
	CHECK_INT(answer_take(s, "x", 1), 0);
	CHECK(s->backend.eof && s->why == WHY_DONE);

	at("chunks");
	s = session_make(0);
	s->framing = BODY_CHUNKED;
	CHECK_INT(answer_take(s, "5\r\nhel", 6), 6);
	CHECK(!s->backend.eof && s->why == WHY_NONE);
	CHECK_INT(answer_take(s, "lo\r\n0\r\n\r\nmore", 13), 9);
	CHECK(s->backend.eof && s->why == WHY_DONE);

	at("bad chunks");
	s = session_make(0);
	s->framing = BODY_CHUNKED;
	CHECK(answer_take(s, "5\r\nhelloX", 9) <= 9);
	CHECK(s->backend.eof && s->why == WHY_SHORT);

	at("up to the end of the connection");
	s = session_make(0);
	s->framing = BODY_EOF;
	s->answer = body_start(0, UINT64_MAX);
	CHECK_INT(answer_take(s, "hello", 5), 5);
	s->framing = BODY_TUNNEL;
	CHECK_INT(answer_take(s, "hello", 5), 5);
	CHECK(!s->backend.eof && s->why == WHY_NONE);
}

/* It reads what comes from outside: what is no answer to a question of ours is its end. */
static void test_resolver_is_not_trusted(void)
{
	const struct resolved good = { .index = NAMED, .count = ADDRESSES_MAX,
		.address = { [0 ... ADDRESSES_MAX - 1] = { .any.sa_family = AF_INET },
			[1] = { .any.sa_family = AF_INET6 } } };
	struct resolved bad[5];
	unsigned i;
	int pair[2];

	servers_up();
	CHECK(resolved_valid(&good));
	for (i = 0; i < LENGTH(bad); i++)
		bad[i] = good;
	bad[0].index = BACKENDS;
	bad[1].index = A;                       /* which is no name */
	bad[2].count = ADDRESSES_MAX + 1;
	bad[3].count = 255;
	bad[4].address[3].any.sa_family = AF_UNIX;
	for (i = 0; i < LENGTH(bad); i++) {
		servers_up();
		log_open_pipe();
		CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
		fds[FD_RESOLVER].fd = pair[0];
		CHECK(send(pair[1], &bad[i], sizeof bad[i], 0) == sizeof bad[i]);
		resolver_event();
		CHECK(strstr(log_read(), "resolver died") != NULL);
		CHECK_INT(fds[FD_RESOLVER].fd, -1);
		CHECK(servers[NAMED].addresses <= ADDRESSES_MAX);
		close(pair[1]);
	}
}

/* What the resolver says: addresses replace the old ones, their absence does not, and whoever waited
 * for the first answer goes on. */
static void test_resolver_answer(void)
{
	struct server *v = &servers[NAMED];
	struct resolved r = { .index = NAMED, .count = 2 };

	servers_up();
	log_open_pipe();
	fds[FD_RESOLVER].fd = 0;        /* there is one to ask again */
	v->addresses = 0;
	v->pending = 1;

	at("no address");
	r.count = 0;
	resolver_answer(&r);
	CHECK(!v->pending && v->down && v->addresses == 0);
	CHECK_STR(log_read(), "backend name=name.example:3000 down why=unresolved s=0 requests=0\n");
	CHECK(!link_alone(&v->retry.link));             /* asked again */
	CHECK_INT(v->retry.due, now + resolve_ms);
	resolver_answer(&r);
	CHECK_STR(log_read(), "");                      /* said once */

	at("two addresses");
	r.count = 2;
	r.address[0] = address_of("192.0.2.50", "3000");
	r.address[1] = address_of("2001:db8::50", "3000");
	CHECK(resolved_valid(&r));
	resolver_answer(&r);
	CHECK_INT(v->addresses, 2);
	CHECK_INT(v->address[1].any.sa_family, AF_INET6);
	CHECK_STR(log_read(), "backend name=name.example:3000 up s=0 requests=0\n");

	at("none any more: the old ones stay");
	r.count = 0;
	resolver_answer(&r);
	CHECK_INT(v->addresses, 2);
	CHECK_STR(log_read(), "");
}

/* BearSSL lets its buffers be lent, as the start of the program finds out. */
static void test_lending(void)
{
	tables_init();
	suites_init();
	lending_test();
}

/* ---- suites ---- */

static void test_suites(void)
{
	unsigned i, k, moves = 0, found;

	suites_init();
	for (i = 0; i < LENGTH(ciphers); i++) {
		for (k = found = 0; k < LENGTH(suites); k++)
			found += suites[k] == ciphers[i];
		CHECK_INT(found, 1);
	}
	/* ChaCha20 on one side, AES on the other, each in the order of ciphers[] */
	for (i = 1; i < LENGTH(suites); i++)
		moves += suite_names[suite_find(suites[i])].chacha !=
			suite_names[suite_find(suites[i - 1])].chacha;
	CHECK_INT(moves, 1);
	CHECK(suites[0] == ciphers[0] || suites[0] == ciphers[1]);
	CHECK_INT(suite_names[suite_find(suites[0])].chacha,
		br_aes_x86ni_ctr_get_vtable() == NULL && br_aes_pwr8_ctr_get_vtable() == NULL);
	CHECK_INT(suite_find(BR_TLS_RSA_WITH_AES_128_CBC_SHA), -1);     /* no forward secrecy */
}

/* ---- what certificates say of themselves ---- */

/* The day that a certificate ends on, and how far that is. */
static void test_cert_dates(void)
{
	static const struct { const char *der, *text; int days; } cases[] = {
		{ "700101000000Z", "1970-01-01", 0 },
		{ "691231235959Z", "1969-12-31", -1 },
		{ "500101000000Z", "1950-01-01", -7305 },
		{ "491231235959Z", "2049-12-31", 29219 },
		{ "000229010203Z", "2000-02-29", 11016 },
		{ "000301000000Z", "2000-03-01", 11017 },
		{ "380119031408Z", "2038-01-19", 24855 },
	};
	static const struct { unsigned days; const char *text; } later[] = {
		{ 29220, "2050-01-01" }, { 47541, "2100-03-01" }, { 157113, "2400-02-29" },
		{ 2932896, "9999-12-31" },
	};
	const int today = (int)(clock_floor() / 86400);
	char want[64], date[16];
	unsigned char *p;
	const char *line;
	size_t i;

	log_open_pipe();
	CHECK_GOOD(chain_of(PEM_EC_CERT));
	p = memmem(identity.der, identity.chain[0].data_len, "\x17\x0d", 2);
	for (i = 0; i < COUNT(cases); i++) {
		at("%s", cases[i].der);
		memcpy(p + 15, "\x17\x0d", 2);
		memcpy(p + 17, cases[i].der, 13);
		cert_say(&identity.chain[0], "path", "");
		line = log_read();
		sprintf(want, " until=%s days=%d\n", cases[i].text, cases[i].days - today);
		CHECK(strstr(line, want) != NULL);
		CHECK_INT(strstr(line, "path has expired\n") != NULL, cases[i].days < today);
		memcpy(p + 2, cases[i].der, 13);
		cert_say(&identity.chain[0], "path", "");
		sprintf(want, "path is not valid before %s, or", cases[i].text);
		CHECK_INT(strstr(log_read(), want) != NULL, cases[i].days > today);
	}
	for (i = 0; i < COUNT(later); i++)
		CHECK_STR(date_format(later[i].days + 719468, date), later[i].text);
}

/* Bytes of any kind: no read beyond them, and always one line. */
static void test_cert_say(void)
{
	static const char *const pems[] = { PEM_EC_CERT, PEM_RSA_CERT };
	static struct guard room;
	br_x509_certificate c;
	size_t i, len;
	int n;

	log_open_pipe();
	entry_look("certs", 0);
	for (i = 0; i < COUNT(pems); i++) {
		CHECK_GOOD(chain_of(pems[i]));
		for (len = 0; len <= identity.chain[0].data_len; len++) {
			at("certificate %zu cut to %zu bytes", i, len);
			c.data = (unsigned char *)guard_copy(&room, identity.der, len);
			c.data_len = len;
			cert_say(&c, "path", "");
			CHECK(strstr(log_read(), "cert entry=certs[0] names=") != NULL);
		}
		for (n = 0; n < 20000; n++) {
			unsigned char *p = c.data;

			memcpy(p, identity.der, c.data_len);
			p[random_below((unsigned)c.data_len)] = (unsigned char)random_next();
			p[random_below((unsigned)c.data_len)] = (unsigned char)random_next();
			cert_say(&c, "path", "");
			CHECK(lines_of(log_read()) <= 3);
		}
	}
}
