/* unit-backend.h - round_robin_pick, rendezvous_pick, path_under. */

#define ALL(n)  ((uint64_t)-1 >> (64 - (n)))

/* ---- round robin ---- */

static void check_turns(unsigned n, const unsigned *weight, uint64_t allowed, const char *want)
{
	int current[BACKENDS_MAX] = { 0 };
	char got[64];
	size_t i;

	for (i = 0; want[i] != '\0'; i++)
		got[i] = (char)('A' + round_robin_pick(weight, current, n, allowed));
	got[i] = '\0';
	CHECK_STR(got, want);
}

static void test_round_robin(void)
{
	static const unsigned equal[4] = { 1, 1, 1, 1 }, same[3] = { 7, 7, 7 };

	check_turns(1, equal, ALL(1), "AAAA");
	check_turns(2, equal, ALL(2), "ABABAB");
	check_turns(3, equal, ALL(3), "ABCABCABC");
	check_turns(4, equal, ALL(4), "ABCDABCD");
	check_turns(3, same, ALL(3), "ABCABC");
	/* nginx's own example, and what its algorithm gives for others */
	check_turns(3, (const unsigned[]){ 5, 1, 1 }, ALL(3), "AABACAAAABACAA");
	check_turns(2, (const unsigned[]){ 2, 1 }, ALL(2), "ABAABAABA");
	check_turns(3, (const unsigned[]){ 1, 2, 3 }, ALL(3), "CBACBCCBACBC");
	check_turns(2, (const unsigned[]){ 1, 3 }, ALL(2), "BABBBABB");
	check_turns(3, (const unsigned[]){ 4, 2, 1 }, ALL(3), "ABACABAABACABA");
}

static void test_round_robin_subset(void)
{
	static const unsigned equal[4] = { 1, 1, 1, 1 }, other[3] = { 5, 1, 1 };
	unsigned weight[BACKENDS_MAX];
	int current[BACKENDS_MAX] = { 0 };
	unsigned i;

	CHECK_INT(round_robin_pick(equal, current, 4, 0), -1);
	CHECK_INT(round_robin_pick(equal, current, 0, 0), -1);
	check_turns(4, equal, 1 << 1 | 1 << 3, "BDBDBD");
	check_turns(4, equal, 1 << 3, "DDD");
	check_turns(3, other, 1 << 1 | 1 << 2, "BCBC");
	check_turns(3, other, 1 << 0 | 1 << 2, "AAACAAAAAC");

	/* all bits of the set count, the last too */
	for (i = 0; i < BACKENDS_MAX; i++)
		weight[i] = 1;
	for (i = 0; i < 2 * BACKENDS_MAX; i++)
		CHECK_INT(round_robin_pick(weight, current, BACKENDS_MAX, ALL(64)), i % BACKENDS_MAX);
	CHECK_INT(round_robin_pick(weight, current, BACKENDS_MAX, (uint64_t)1 << 63), 63);

	/* one that was away gets no more than its turn when it comes back */
	memset(current, 0, sizeof current);
	for (i = 0; i < 100; i++)
		CHECK(round_robin_pick(equal, current, 3, 1 << 0 | 1 << 1) < 2);
	CHECK_INT(round_robin_pick(equal, current, 3, ALL(3)) +
		round_robin_pick(equal, current, 3, ALL(3)) +
		round_robin_pick(equal, current, 3, ALL(3)), 3);
}

/* Over as many picks as the weights add up to, each gets its weight, and then all is as at first. */
static void test_round_robin_shares(void)
{
	unsigned weight[BACKENDS_MAX], count[BACKENDS_MAX], n, i, sum, round;
	int current[BACKENDS_MAX], pick;

	for (round = 0; round < 50; round++) {
		n = 1 + random_below(BACKENDS_MAX);
		for (i = sum = 0; i < n; i++)
			sum += weight[i] = 1 + random_below(WEIGHT_MAX);
		at("round %u, %u backends", round, n);
		memset(current, 0, sizeof current);
		memset(count, 0, sizeof count);
		for (i = 0; i < sum; i++) {
			pick = round_robin_pick(weight, current, n, ALL(n));
			CHECK(pick >= 0 && pick < (int)n);
			if (failures != 0)
				return;
			count[pick]++;
		}
		for (i = 0; i < n; i++) {
			CHECK_INT(count[i], weight[i]);
			CHECK_INT(current[i], 0);
		}
	}
}

/* ---- rendezvous ---- */

#define CLIENTS 10000

enum addresses { NEIGHBOURS4, RANDOM4, NEIGHBOURS6, RANDOM6 };

/* The i-th client: 10.0.0.0 and up, or 2001:db8:0:i::1, or by chance. */
static unsigned client_address(enum addresses kind, unsigned i, unsigned char address[16])
{
	static const unsigned char first6[16] = { 0x20, 0x01, 0x0d, 0xb8, [15] = 1 };
	uint64_t z[2];

	if (kind == NEIGHBOURS4) {
		address[0] = 10;
		address[1] = (unsigned char)(i >> 16);
		address[2] = (unsigned char)(i >> 8);
		address[3] = (unsigned char)i;
	} else if (kind == NEIGHBOURS6) {
		memcpy(address, first6, 16);
		address[6] = (unsigned char)(i >> 8);
		address[7] = (unsigned char)i;
	} else {
		random_state = i;
		z[0] = random_next();
		z[1] = random_next();
		memcpy(address, z, 16);
	}
	return kind == NEIGHBOURS4 || kind == RANDOM4 ? 32 : kind == NEIGHBOURS6 ? 64 : 128;
}

static int client_pick(const uint64_t *id, const unsigned *weight, unsigned n, uint64_t allowed,
	enum addresses kind, unsigned i)
{
	unsigned char address[16];
	unsigned bits = client_address(kind, i, address);
	size_t len = kind == NEIGHBOURS4 || kind == RANDOM4 ? 4 : 16;

	return rendezvous_pick(id, weight, n, allowed,
		(const unsigned char *)guard_copy(&input, address, len), bits);
}

/* Ids as a caller may have them: small numbers, or hashes of names. */
static void fill_ids(uint64_t *id, unsigned n, int hashed)
{
	unsigned i;

	random_state = 4711;
	for (i = 0; i < n; i++)
		id[i] = hashed ? random_next() : i + 1;
}

/* Shares after the weights, `percent` off at most. */
static void check_spread(unsigned n, const unsigned *weight, unsigned percent)
{
	unsigned count[BACKENDS_MAX], i, sum, kind, hashed;
	uint64_t id[BACKENDS_MAX];
	int pick;

	for (i = sum = 0; i < n; i++)
		sum += weight[i];
	for (hashed = 0; hashed < 2; hashed++)
	for (kind = NEIGHBOURS4; kind <= RANDOM6; kind++) {
		fill_ids(id, n, (int)hashed);
		memset(count, 0, sizeof count);
		for (i = 0; i < CLIENTS; i++) {
			pick = client_pick(id, weight, n, ALL(n), (enum addresses)kind, i);
			CHECK(pick >= 0 && pick < (int)n);
			if (failures != 0)
				return;
			count[pick]++;
		}
		for (i = 0; i < n; i++) {
			unsigned want = CLIENTS * weight[i] / sum;

			with("kind %u, hashed %u, backend %u: %u of %u", kind, hashed, i, count[i], want);
			CHECK(count[i] * 100 >= want * (100 - percent));
			CHECK(count[i] * 100 <= want * (100 + percent));
		}
	}
}

static void test_rendezvous_spread(void)
{
	static const unsigned equal[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };

	at("one");
	check_spread(1, equal, 0);
	at("two");
	check_spread(2, equal, 10);
	at("three");
	check_spread(3, equal, 10);
	at("eight");
	check_spread(8, equal, 10);
	at("three of weight 7");
	check_spread(3, (const unsigned[]){ 7, 7, 7 }, 10);
}

static void test_rendezvous_weights(void)
{
	at("1 2");
	check_spread(2, (const unsigned[]){ 1, 2 }, 10);
	at("1 2 5");
	check_spread(3, (const unsigned[]){ 1, 2, 5 }, 10);
	at("10 5 5 1");
	check_spread(4, (const unsigned[]){ 10, 5, 5, 1 }, 15);
	at("256 256 128");
	check_spread(3, (const unsigned[]){ 256, 256, 128 }, 10);
	at("1 256");
	check_spread(2, (const unsigned[]){ 1, 256 }, 60);      /* 39 clients of 10000 */
}

static void test_rendezvous_moves(void)
{
	static const unsigned weight[6] = { 3, 1, 4, 1, 5, 9 };
	uint64_t id[6];
	unsigned i, gone, moved;
	int before, after;

	fill_ids(id, 6, 1);
	for (gone = 0; gone < 6; gone++) {
		at("backend %u gone", gone);
		for (i = moved = 0; i < CLIENTS; i++) {
			before = client_pick(id, weight, 6, ALL(6), NEIGHBOURS4, i);
			after = client_pick(id, weight, 6, ALL(6) & ~((uint64_t)1 << gone), NEIGHBOURS4, i);
			CHECK(after != (int)gone);
			if (before != (int)gone)
				CHECK_INT(after, before);
			else
				moved |= 1u << after;
		}
		CHECK_INT(moved, ALL(6) & ~(1u << gone));       /* and they spread over the others */
	}
}

/* A weight that grows draws clients to its backend and moves no others. */
static void test_rendezvous_weight_moves(void)
{
	uint64_t id[3];
	unsigned i;
	int before, after;

	fill_ids(id, 3, 1);
	for (i = 0; i < CLIENTS; i++) {
		before = client_pick(id, (const unsigned[]){ 2, 2, 2 }, 3, ALL(3), RANDOM4, i);
		after = client_pick(id, (const unsigned[]){ 2, 3, 2 }, 3, ALL(3), RANDOM4, i);
		CHECK(after == before || after == 1);
	}
}

static void test_rendezvous_order(void)
{
	static const unsigned weight[5] = { 3, 1, 4, 1, 5 }, place[5] = { 2, 4, 0, 3, 1 };
	uint64_t id[5], id2[5];
	unsigned weight2[5], i;

	fill_ids(id, 5, 1);
	for (i = 0; i < 5; i++) {
		id2[place[i]] = id[i];
		weight2[place[i]] = weight[i];
	}
	for (i = 0; i < CLIENTS; i++)
		CHECK_INT(client_pick(id2, weight2, 5, ALL(5), RANDOM6, i),
			place[client_pick(id, weight, 5, ALL(5), RANDOM6, i)]);
}

static void test_rendezvous_bits(void)
{
	static const unsigned weight[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
	unsigned char a[16], b[16], last[16];
	uint64_t id[8];
	unsigned bits, bytes, i, k, differ;
	int pick;

	fill_ids(id, 8, 1);
	for (bits = 1; bits <= 128; bits++) {
		at("%u bits", bits);
		bytes = (bits + 7) / 8;
		for (i = differ = 0; i < 60; i++) {
			client_address(RANDOM6, 1000 * bits + i, a);
			memcpy(b, a, 16);
			memcpy(last, a, 16);
			for (k = bits; k < 128; k++)
				b[k / 8] = (unsigned char)(b[k / 8] ^ 0x80u >> k % 8);
			last[(bits - 1) / 8] = (unsigned char)(last[(bits - 1) / 8] ^ 0x80u >> (bits - 1) % 8);
			/* not a byte more than the bits need is read */
			pick = rendezvous_pick(id, weight, 8, ALL(8),
				(unsigned char *)guard_copy(&input, a, bytes), bits);
			CHECK_INT(rendezvous_pick(id, weight, 8, ALL(8), a, bits), pick);
			CHECK_INT(rendezvous_pick(id, weight, 8, ALL(8), b, bits), pick);
			differ += rendezvous_pick(id, weight, 8, ALL(8), last, bits) != pick;
		}
		if (bits >= 8)                  /* enough keys for chance: 7 in 8 are to be expected */
			CHECK(differ > 30);
	}
}

static void test_rendezvous_subset(void)
{
	static const unsigned char address[4] = { 192, 0, 2, 1 };
	uint64_t id[BACKENDS_MAX];
	unsigned weight[BACKENDS_MAX], i, seen = 0;

	fill_ids(id, BACKENDS_MAX, 1);
	for (i = 0; i < BACKENDS_MAX; i++)
		weight[i] = 1 + i % 3;
	CHECK_INT(rendezvous_pick(id, weight, 3, 0, address, 32), -1);
	CHECK_INT(rendezvous_pick(id, weight, 0, 0, address, 32), -1);
	for (i = 0; i < BACKENDS_MAX; i++)
		CHECK_INT(rendezvous_pick(id, weight, BACKENDS_MAX, (uint64_t)1 << i, address, 32), i);
	for (i = 0; i < 200; i++)
		seen |= 1u << client_pick(id, weight, 5, 1 << 1 | 1 << 2 | 1 << 4, RANDOM4, i);
	CHECK_INT(seen, 1 << 1 | 1 << 2 | 1 << 4);
}

/* ---- paths ---- */

static void test_path_under(void)
{
	static const struct { const char *target, *prefix; int under; } cases[] = {
		{ "/", "/", 1 },
		{ "/x", "/", 1 },
		{ "/?x", "/", 1 },
		{ "/x/y/z?a/b", "/", 1 },
		{ "/chat", "/chat", 1 },
		{ "/chat/", "/chat", 1 },
		{ "/chat/x", "/chat", 1 },
		{ "/chat?x", "/chat", 1 },
		{ "/chat?/x", "/chat", 1 },
		{ "/chat/x", "/chat/", 1 },
		{ "/chat/", "/chat/", 1 },
		{ "/chat/x", "/chat/x", 1 },
		{ "/chat/x/y", "/chat/x", 1 },
		{ "/chatty", "/chat", 0 },
		{ "/chat-x", "/chat", 0 },
		{ "/chat.x", "/chat", 0 },
		{ "/chat%2Fx", "/chat", 0 },
		{ "/chat;x", "/chat", 0 },
		{ "/cha", "/chat", 0 },
		{ "/ch?at", "/chat", 0 },
		{ "/", "/chat", 0 },
		{ "/Chat", "/chat", 0 },
		{ "/x/chat", "/chat", 0 },
		{ "/x?/chat", "/chat", 0 },
		{ "//chat", "/chat", 0 },
		{ "/chatx/", "/chat/", 0 },
		{ "/chat/xy", "/chat/x", 0 },
		{ "*", "/chat", 0 },
		{ "", "/chat", 0 },
	};
	size_t i, len;

	for (i = 0; i < COUNT(cases); i++) {
		at("target %s, prefix %s", cases[i].target, cases[i].prefix);
		len = strlen(cases[i].target);
		CHECK_INT(path_under(guard_copy(&input, cases[i].target, len), len, cases[i].prefix) != 0,
			cases[i].under);
	}
	/* the target's length counts, not what lies behind it */
	at("lengths");
	CHECK_INT(path_under("/chatty", 5, "/chat"), 1);
	CHECK_INT(path_under("/chat", 4, "/chat"), 0);
}
