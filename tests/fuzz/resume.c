/* resume.c - fuzzes TLS with a memory: the real loop() of wssproxy, several clients one after the
 * other, with sessions in the cache from before, and TLS backends that resume as well (peers.h). The
 * far ends are BearSSL's engines, but what they say in the clear, hellos above all, is edited by the
 * input before it counts: their hash of the handshake is made anew from what was really sent, so
 * that handshakes with an edited hello still come to their end, or to a resumption.
 *
 * An input is a list of clients: what they resume, whom they ask for and how (client_connect), and,
 * in the order in which they are sent, the edits of all messages of all far ends (flight_edit).
 *
 * What must hold, whatever they say:
 * - a session that is resumed was made under the same server name;
 * - who offers protocols (ALPN), but not http/1.1, or says what can't be read, gets no byte of HTTP,
 *   and no backend hears of it;
 * - the next client, that does all as it should, gets an answer;
 * - when its peers are gone, every session ends, and gives back all it had. */
#include "peers.h"

#include <stddef.h>
#include <strings.h>

#include "flights.h"

enum {
	CLIENTS = 12,           /* of an input */
	SESSIONS = 16,              /* sessions that clients can resume */
	POLLS_MAX = 20000,
};

struct wire {                   /* between a far end's engine and its socket */
	size_t out_at, out_len, in_at, in_len, said_len;
	int hidden_out, hidden_in;      /* what follows is encrypted */
	int up;                 /* its handshake is done */
	int asked;              /* it sent its request, or answer */
	enum alpn alpn;         /* of a client's hello */
	struct verifier verifier;
	unsigned char out[8 * FLIGHT], in[5 + 65535];
	unsigned char said[4 * FLIGHT]; /* messages of both sides, in the clear */
};

struct made {                   /* a session, and the name that it was made under */
	unsigned char id[32];
	char name[256];
};

static struct wire wires[PEERS];
static br_ssl_session_parameters kept[SESSIONS], kept_first[SESSIONS];
static struct made made[SESSIONS + CLIENTS + 1];
static unsigned kept_len, made_len, made_first;
static unsigned clients_len, polls;
static int client, stays;               /* the client whose turn it is, -1; is not closed at its end */
static enum { SCRIPT, LAST, GONE, OVER } phase;

/* ---- between the engines and the sockets ---- */

static void wire_put(struct wire *w, const void *p, size_t len)
{
	MUST(len <= sizeof w->out - w->out_len);
	memcpy(w->out + w->out_len, p, len);
	w->out_len += len;
}

/* A record of the version of that one. */
static void wire_record(struct wire *w, const unsigned char *like, unsigned char type, const void *p,
	size_t len)
{
	const unsigned char head[] = { type, like[1], like[2], (unsigned char)(len >> 8),
		(unsigned char)len };

	wire_put(w, head, sizeof head);
	wire_put(w, p, len);
}

static void wire_say(struct wire *w, const void *p, size_t len)
{
	len = len < sizeof w->said - w->said_len ? len : sizeof w->said - w->said_len;
	memcpy(w->said + w->said_len, p, len);
	w->said_len += len;
}

/* Messages in the clear go out edited, and count as that for the engine that made them. */
static void wire_edit(struct peer *p, struct wire *w, const unsigned char *record, size_t len)
{
	struct flight f;
	size_t at, n;
	unsigned i;

	f.split = f.before = 0;
	f.len = len - 5 < sizeof f.b ? len - 5 : sizeof f.b;
	memcpy(f.b, record + 5, f.len);
	flight_edit(&f);
	if (w->said_len == 0)
		w->alpn = alpn_find(f.b, f.len);
	if (f.len >= FIXED && f.b[0] == 1)
		memcpy(p->eng->client_random, f.b + 6, 32);
	wire_say(w, f.b, f.len);
	br_multihash_init(&p->eng->mhash);
	br_multihash_update(&p->eng->mhash, w->said, w->said_len);
	for (i = 0; i < LENGTH(fronts); i++)
		if (f.before >> i & 1)
			wire_record(w, record, fronts[i].type, fronts[i].text, fronts[i].len);
	for (at = 0; at < f.len; at += n) {
		n = f.split > 0 && f.split < f.len - at ? f.split : f.len - at;
		wire_record(w, record, 22, f.b + at, n);
	}
}

static size_t wire_send(struct peer *p, struct wire *w)
{
	unsigned char *buf;
	size_t len;
	ssize_t n;

	if (w->out_at == w->out_len && (buf = br_ssl_engine_sendrec_buf(p->eng, &len)) != NULL) {
		w->out_at = w->out_len = 0;
		w->hidden_out |= buf[0] == 20;
		if (!w->hidden_out && buf[0] == 22)
			wire_edit(p, w, buf, len);
		else
			wire_put(w, buf, len);
		br_ssl_engine_sendrec_ack(p->eng, len);
	}
	n = w->out_at < w->out_len ?
		send(p->far, w->out + w->out_at, w->out_len - w->out_at, MSG_NOSIGNAL) : 0;
	w->out_at = n < 0 && errno != EAGAIN ? w->out_len : w->out_at + (size_t)(n > 0 ? n : 0);
	return n > 0;
}

/* Takes records one at a time, for the engine's hash must be known to the message. */
static size_t wire_recv(struct peer *p, struct wire *w)
{
	size_t need = w->in_len < 5 ? 5 : 5 + number(w->in + 3, 2), len;
	int n = w->in_len < need ? far_recv(p, w->in + w->in_len, need - w->in_len) : 0;
	unsigned char *buf;

	w->in_len += (size_t)n;
	while (w->in_len >= 5 && w->in_len == 5 + number(w->in + 3, 2) && w->in_at < w->in_len &&
	    (buf = br_ssl_engine_recvrec_buf(p->eng, &len)) != NULL) {
		len = len < w->in_len - w->in_at ? len : w->in_len - w->in_at;
		memcpy(buf, w->in + w->in_at, len);
		br_ssl_engine_recvrec_ack(p->eng, len);
		w->in_at += len;
		n = 1;
	}
	if (w->in_len >= 5 && w->in_at == w->in_len) {
		w->hidden_in |= w->in[0] == 20;
		if (!w->hidden_in && w->in[0] == 22)
			wire_say(w, w->in + 5, w->in_len - 5);
		w->in_at = w->in_len = 0;
	}
	while ((buf = br_ssl_engine_recvapp_buf(p->eng, &len)) != NULL) {
		stream_add(&p->got, buf, len);
		br_ssl_engine_recvapp_ack(p->eng, len);
		n = 1;
	}
	return n > 0;
}

/* ---- clients and backends ---- */

static int names_equal(const char *a, const char *b)
{
	size_t a_len = strlen(a), b_len = strlen(b);

	a_len -= a_len > 1 && a[a_len - 1] == '.';
	b_len -= b_len > 1 && b[b_len - 1] == '.';
	return a_len == b_len && strncasecmp(a, b, a_len) == 0;
}

/* A client's handshake is done: how does the proxy see that? */
static void client_up(struct peer *p)
{
	br_ssl_session_parameters seen;
	const char *name;
	unsigned i, k;

	br_ssl_engine_get_session_parameters(p->eng, &kept[kept_len++ % (SESSIONS - 1) + 1]);
	for (i = 0; i < max_sessions; i++) {
		if (sessions[i].state == FREE || sessions[i].client.fd != p->near)
			continue;
		br_ssl_engine_get_session_parameters(&sessions[i].tls.eng, &seen);
		name = br_ssl_engine_get_server_name(&sessions[i].tls.eng);
		for (k = 0; k < made_len && memcmp(made[k].id, seen.session_id, 32) != 0; k++)
			;
		TRACE("\tunder the name %s, %s\n", name, k < made_len ? "resumed" : "new");
		MUST((k < made_len) == (sessions[i].tls.policy_vtable == &policy));
		if (k < made_len) {
			MUST(names_equal(name, made[k].name));
			continue;
		}
		MUST(made_len < LENGTH(made));
		MUST(phase != LAST || made_len != made_first);  /* nothing has displaced its */
		memcpy(made[made_len].id, seen.session_id, 32);
		string_format(made[made_len++].name, sizeof made[0].name, "%s", name);
	}
}

/* A head byte for each: what is resumed, the name, version and buffers, the request. */
static void client_connect(void)
{
	static const char *const names[] = { "a.example", "x.b.example", NULL, "y.b.example",
		"a.example.", "A.Example", "z.b.example", "" };
	static const char *const protocols[] = { "http/1.1" };
	static const unsigned buffers[] = { 512, 1024, 2048, 4096 };
	const unsigned session = input_byte(&script), who = input_byte(&script),
		how = input_byte(&script), k = session % SESSIONS;
	br_ssl_engine_context *eng;
	unsigned char seed[32];
	struct peer *p;
	struct wire *w;
	struct tls *t;

	small_buffers = how >> 5 & 3;
	p = far_connect(2, 8 | (phase == LAST));
	MUST(p != NULL);
	client = (int)(p - peers);
	w = &wires[client];
	t = &tls[client];
	stays = how >> 7;
	br_ssl_client_init_full(&t->u.client, &t->unused, NULL, 0);
	p->eng = eng = &t->u.client.eng;
	memset(&w->verifier, 0, sizeof w->verifier);
	verifier_first(&w->verifier, eng, NULL);
	br_ssl_engine_set_protocol_names(eng, (const char **)protocols, 1);
	br_ssl_engine_set_versions(eng, BR_TLS10, how & 1 ? BR_TLS12 - (how >> 1 & 1) : BR_TLS12);
	world_random(seed, sizeof seed);
	br_ssl_engine_inject_entropy(eng, seed, sizeof seed);
	br_ssl_engine_set_buffer(eng, t->buf, how & 4 ?
		buffers[how >> 3 & 3] + 512 + 325 + 85u : sizeof t->buf, 1);
	if (session < 128 && kept[k].session_id_len > 0)
		br_ssl_engine_set_session_parameters(eng, &kept[k]);
	MUST(br_ssl_client_reset(&t->u.client, names[who % LENGTH(names)], session < 128));
	TRACE("client %d: session %u, name %s, how %u\n", client, session, names[who % LENGTH(names)],
		how);
}

static void peer_write(struct peer *p, const char *text)
{
	size_t len;
	unsigned char *buf;

	if (!p->eng) {
		(void)!send(p->far, text, strlen(text), MSG_NOSIGNAL);
	} else if ((buf = br_ssl_engine_sendapp_buf(p->eng, &len)) != NULL && len >= strlen(text)) {
		memcpy(buf, text, strlen(text));
		br_ssl_engine_sendapp_ack(p->eng, strlen(text));
		br_ssl_engine_flush(p->eng, 0);
	}
}

static size_t peer_pump(struct peer *p)
{
	struct wire *w = &wires[p - peers];
	size_t moved, was = p->got.len;

	if (p->far < 0 || p->dial != UP)
		return 0;
	if (!p->eng && p->is_backend && p->owner < 0)
		return 0;       /* not known yet whether it speaks TLS */
	moved = p->eng ? wire_send(p, w) + wire_recv(p, w) : far_read(p, SIZE_MAX);
	if (p->eng && !w->up &&
	    (br_ssl_engine_current_state(p->eng) & (BR_SSL_SENDAPP | BR_SSL_RECVAPP))) {
		w->up = 1;
		TRACE("\t%d is up\n", (int)(p - peers));
		if (!p->is_backend)
			client_up(p);
	}
	if (p->is_backend && p->got.len > was && !w->asked &&
	    memmem(p->got.data, p->got.len, "\r\n\r\n", 4)) {
		w->asked = 1;
		moved++;
		peer_write(p, memmem(p->got.data, p->got.len, "Sec-WebSocket-Key", 17) ?
			"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
			"Upgrade: websocket\r\n"
			"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n" :
			"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
	}
	return moved;
}

static size_t all_pump(void)
{
	size_t moved = 0;
	unsigned i;

	owners_note();
	for (i = 0; i < peers_len; i++)
		moved += peer_pump(&peers[i]);
	return moved;
}

/* Nothing moves any more for the client whose turn it is. */
static void client_end(void)
{
	const struct peer *p = &peers[client];
	const struct wire *w = &wires[client];
	unsigned i;

	for (i = 0; i < peers_len; i++) {
		if (peers[i].is_backend && peers[i].owner == client)
			MUST(w->alpn < ALPN_LACKING);
		if ((i == (unsigned)client || peers[i].owner == client) && !stays)
			far_close(&peers[i], 0);
	}
	MUST(w->alpn < ALPN_LACKING || p->got.len == 0);
	MUST(phase != LAST || memmem(p->got.data, p->got.len, "HTTP/1.1 ", 9));
	client = -1;
}

static void client_ask(void)
{
	static const char *const requests[] = {
		"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET /any HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET /verify HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET /pin HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET /any HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\n"
			"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
			"Sec-WebSocket-Version: 13\r\n\r\n",
		"GET /",
	};

	const unsigned what = input_byte(&script);

	if (what & 128) /* the backends were started anew, and know of no sessions */
		br_ssl_session_cache_lru_init(&chat_cache, chat_store, sizeof chat_store);
	wires[client].asked = 1;
	peer_write(&peers[client], requests[(what & 127) % LENGTH(requests)]);
}

/* The proxy sleeps, and so do all peers: what comes next. */
static void act(void)
{
	unsigned i;

	if (client >= 0 && wires[client].up && !wires[client].asked) {
		client_ask();
	} else if (client >= 0) {
		client_end();
	} else if (phase == SCRIPT) {
		if (script.len == 0 || clients_len++ == CLIENTS) {
			phase = LAST;
			script.len = 0;
		}
		client_connect();
	} else if (phase == LAST) {
		for (i = 0; i < peers_len; i++)
			far_close(&peers[i], 0);
		phase = GONE;
	} else {
		MUST(phase == GONE && sessions_open() == 0);
		signal_send(SIGINT);
		signal_send(SIGINT);
		phase = OVER;
	}
}

static int world_poll(struct pollfd *p, nfds_t n, int ms)
{
	int ready;

	if (n == 1 && p->fd == LOG_FD) {
		p->revents = POLLOUT;
		return 1;
	}
	if (n == 1)
		return sockets_poll(p, n);
	MUST(polls++ < POLLS_MAX);
	while ((ready = sockets_poll(p, n)) == 0 && ms != 0)
		if (all_pump() == 0)
			act();
	TRACE("turn: %d ready of %d ms\n", ready, ms);
	return ready;
}

/* ---- one input ---- */

static void play(const uint8_t *data, size_t size)
{
	unsigned i;

	for (i = 0; i < peers_len; i++)
		memset(&wires[i], 0, offsetof(struct wire, out));
	script = (struct input){ data, size };
	client = -1;
	clients_len = polls = 0;
	phase = SCRIPT;
	world_open();
	loop();
	sessions_end();
	proxy_must_rest();
	world_end();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	/* clients of each name, and of each backend: their sessions can be resumed from now on */
	static const uint8_t first_words[] = {
		255, 0, 0, 0, 0, 0,             255, 1, 0, 0, 0, 0,
		255, 2, 0, 0, 0, 0,             255, 3, 0, 0, 0, 0,
		255, 0, 0, 0, 0, 1, 0,          255, 0, 0, 0, 0, 2, 0,
		255, 0, 1, 0, 0, 3, 0,          255, 1, 3, 0, 0, 0,
	};

	(void)argc;
	(void)argv;
	signal(SIGPIPE, SIG_IGN);
	http = FORWARD;
	proxy_start();
	play(first_words, sizeof first_words);
	made_first = made_len;
	MUST(made_first == 9 && servers[1].session_until && servers[2].session_until && servers[3].session_until);
	proxy_save();
	kept[0] = kept[made_first];     /* for the last client */
	memcpy(kept_first, kept, sizeof kept);
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	memcpy(kept, kept_first, sizeof kept);
	kept_len = made_len = made_first;
	play(data, size);
	return 0;
}
