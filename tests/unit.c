/* unit.c - unit tests: wssproxy.c is compiled into this program, so its static functions can be
 * called. From the top of the tree:
 *
 *     cc -std=c11 -D_GNU_SOURCE -DVERSION='"test"' -DCONFIG='"tests/unit-config.h"' -I. \
 *         -fsanitize=address,undefined -o unit tests/unit.c -lbearssl
 *     ./unit              all tests, each in a process of its own; the last line counts them
 *     ./unit chunked      one of them, in this process (for a debugger)
 *     ./unit -l           their names */

#define main wssproxy_main
#include "../wssproxy.c"
#undef main

#include "unit.h"
#include "unit-request.h"
#include "unit-response.h"
#include "unit-frames.h"
#include "unit-backend.h"
#include "unit-pem.h"
#include "unit-files.h"
#include "unit-core.h"
#include "unit-tls.h"

#define TEST(name) { #name, test_##name }

static const struct test tests[] = {
	TEST(request_line),
	TEST(request_field),
	TEST(request_host),
	TEST(request_body),
	TEST(request_upgrade),
	TEST(request_bytes),
	TEST(request_limit_head),
	TEST(request_limit_line),
	TEST(request_limit_fields),
	TEST(request_render),
	TEST(request_render_client),
	TEST(request_render_subject),
	TEST(request_render_plain),
	TEST(request_render_options),
	TEST(request_render_large),
	TEST(request_render_room),
	TEST(request_render_renamed),
	TEST(request_random),
	TEST(response_line),
	TEST(response_body),
	TEST(response_upgrade),
	TEST(response_limits),
	TEST(response_render),
	TEST(response_render_framing),
	TEST(response_render_interim),
	TEST(chunked),
	TEST(chunked_large),
	TEST(chunked_clean),
	TEST(chunked_bounded),
	TEST(frames),
	TEST(frames_long),
	TEST(frames_random),
	TEST(accept_key),
	TEST(round_robin),
	TEST(round_robin_subset),
	TEST(round_robin_shares),
	TEST(rendezvous_spread),
	TEST(rendezvous_weights),
	TEST(rendezvous_moves),
	TEST(rendezvous_weight_moves),
	TEST(rendezvous_order),
	TEST(rendezvous_bits),
	TEST(rendezvous_subset),
	TEST(path_under),
	TEST(pem_chain),
	TEST(pem_chain_order),
	TEST(pem_chain_bad),
	TEST(pem_chain_limits),
	TEST(pem_truncated),
	TEST(pem_key),
	TEST(pem_key_bad),
	TEST(pem_key_longer),
	TEST(pem_key_large),
	TEST(key_matches),
	TEST(anchors),
	TEST(anchors_skipped),
	TEST(anchors_bad),
	TEST(keyring_load),
	TEST(keyring_wiped),
	TEST(pem_load),
	TEST(ids),
	TEST(cert_dates),
	TEST(cert_say),
	TEST(name_fits),
	TEST(text_format),
	TEST(text_full),
	TEST(log_escape),
	TEST(log_line),
	TEST(log_cut),
	TEST(log_session),
	TEST(log_session_long),
	TEST(text_time),
	TEST(log_rejects),
	TEST(log_full),
	TEST(lists),
	TEST(timers),
	TEST(timers_order),
	TEST(timers_next),
	TEST(leave_next),
	TEST(leave_choose),
	TEST(pool),
	TEST(pool_waiters),
	TEST(shelf_rob),
	TEST(head_store),
	TEST(records_whole),
	TEST(address),
	TEST(address_text),
	TEST(address_parse),
	TEST(sources),
	TEST(sources_many),
	TEST(sources_family),
	TEST(servers_init),
	TEST(servers_for),
	TEST(host_name),
	TEST(proxy_header),
	TEST(server_pick),
	TEST(server_pick_none),
	TEST(server_pick_balance),
	TEST(server_pick_least),
	TEST(cookies),
	TEST(cookie_add),
	TEST(server_pick_sticky),
	TEST(server_failed),
	TEST(server_stays_down),
	TEST(check_good),
	TEST(rendezvous_fixed),
	TEST(whys),
	TEST(reply_compose),
	TEST(location),
	TEST(origins),
	TEST(x_forwarded_for),
	TEST(sessions_per_ip),
	TEST(sessions_displaced),
	TEST(sessions_full),
	TEST(sessions_closed),
	TEST(told),
	TEST(told_late),
	TEST(bulk),
	TEST(relay_full),
	TEST(stallers),
	TEST(answer_take),
	TEST(resolver_is_not_trusted),
	TEST(resolver_answer),
	TEST(lending),
	TEST(suites),
	TEST(tls_rest),
	TEST(tls_full_records),
	TEST(tls_names),
	TEST(faults),
	TEST(tls_refused),
	TEST(hello_short),
	TEST(hello_resumes),
	TEST(turns_finish),
	TEST(tls_closed_full),
	TEST(tls_stuck),
	TEST(tls_ended_amid_message),
	TEST(tls_answer_cut),
	TEST(unverified),
	TEST(pinned),
	TEST(unverified_longer),
	TEST(chain_long),
	TEST(cbc_odd),
};

static int run_one(const char *name)
{
	size_t i;

	for (i = 0; i < COUNT(tests); i++)
		if (strcmp(tests[i].name, name) == 0) {
			int passed = test_passes(&tests[i]);

			printf("%d passed, %d failed\n", passed, !passed);
			return passed ? 0 : 1;
		}
	fprintf(stderr, "no test is named %s; -l lists them\n", name);
	return 2;
}

int main(int argc, char **argv)
{
	unsigned passed = 0, failed = 0;
	size_t i;

	log_fd = open("/dev/null", O_WRONLY);   /* tests that look at the log put a pipe there */
	if (argc == 2 && strcmp(argv[1], "-l") != 0)
		return run_one(argv[1]);
	for (i = 0; i < COUNT(tests); i++)
		if (argc == 2)
			puts(tests[i].name);
		else if (test_isolated(&tests[i]))
			passed++;
		else {
			printf("FAILED: %s\n", tests[i].name);
			failed++;
		}
	if (argc == 1)
		printf("%u passed, %u failed\n", passed, failed);
	return failed != 0;
}
