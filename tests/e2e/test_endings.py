"""How sessions end: what was sent arrives first, and each end sees the ending that it should. What
goes through these tunnels is no frames, and the proxy puts none of its own there: test_frames.py has
tunnels that end with a Close."""

import os
import re
import socket
import threading
from pathlib import Path

import pytest

from gnutls import FATAL, INTERNAL_ERROR, USER_CANCELED, WARNING, GnutlsClient
from harness import FORWARD, REPO, WS, WSS, eventually
from more import answer, idle_cpu, request
from peers import Stream, connect, open_tunnel, pattern, switching, tcp, upgrade

BULK = pattern(2 << 20)
KINDS = pytest.mark.parametrize("kind", [WSS, WS])


@pytest.fixture
def tunnel(proxy, scripted):
    def start(kind=WSS, **config):
        backend = scripted()
        p = proxy(backend, listeners=[("127.0.0.1", "0", kind)], frames=0, **config)
        return p, *open_tunnel(p, backend)
    return start


# ---- the backend ends ----

@KINDS
def test_all_that_the_backend_sent_arrives_before_the_end(tunnel, kind):
    p, client, server = tunnel(kind)
    sender = threading.Thread(target=lambda: (server.send(BULK), server.close()))
    sender.start()
    assert client.read_to_end() == BULK
    sender.join()
    client.close()
    line = p.log.wait("close", by="backend", why="eof")
    assert int(line["tx"]) >= len(BULK)


def test_end_of_the_backend_is_a_close_notify(tunnel):
    p, client, server = tunnel()
    server.send(b"last words")
    server.close()
    assert client.read_to_end() == b"last words"
    assert client.saw_close_notify
    assert client.sock.recv(1) == b""       # and a FIN


@KINDS
def test_what_the_backend_sent_survives_a_client_that_still_sends(tunnel, kind):
    """Unread input makes a kernel answer with a reset, which would destroy what is on its way."""
    p, client, server = tunnel(kind)
    server.send(BULK[:200000])
    server.half_close()
    for _ in range(50):
        client.send(bytes(1000))
    assert client.read_to_end() == BULK[:200000]


@KINDS
def test_client_that_never_closes_is_cut_after_linger_ms(tunnel, kind):
    p, client, server = tunnel(kind, linger_ms=300)
    server.close()
    p.log.wait("close", by="backend", why="eof")
    with pytest.raises(OSError):
        for _ in range(10000):
            client.sock.sendall(bytes(1000))


# ---- the client ends ----

def test_all_that_the_client_sent_arrives_before_its_close_notify(tunnel):
    p, client, server = tunnel()

    def send():
        client.send(BULK)
        client.close_notify()
    sender = threading.Thread(target=send)
    sender.start()
    assert server.read_to_end() == BULK
    sender.join()
    server.close()
    line = p.log.wait("close", by="client", why="eof")
    assert int(line["rx"]) >= len(BULK)


@KINDS
def test_all_that_the_client_sent_arrives_before_its_fin(tunnel, kind):
    p, client, server = tunnel(kind)

    def send():
        client.send(BULK)
        client.half_close()
    sender = threading.Thread(target=send)
    sender.start()
    assert server.read_to_end() == BULK
    sender.join()
    server.close()
    p.log.wait("close", by="client", why="eof")


def test_close_notify_is_answered(tunnel):
    p, client, server = tunnel()
    client.close_notify()
    assert server.read_to_end() == b""
    server.close()
    assert client.read_to_end() == b""
    assert client.saw_close_notify


def test_client_that_half_closes_still_gets_the_answer(tunnel):
    p, client, server = tunnel(WS)
    client.send(b"a question")
    client.half_close()
    assert server.read_to_end() == b"a question"
    server.send(BULK[:100000])
    server.close()
    assert client.read_to_end() == BULK[:100000]


def test_client_that_ends_without_close_notify_still_gets_the_answer(tunnel):
    """A bare FIN inside TLS: the client's direction is over, the other is not."""
    p, client, server = tunnel()
    client.send(b"a question")
    client.half_close()
    assert server.read_to_end() == b"a question"
    server.send(b"an answer")
    server.close()
    assert client.read_to_end() == b"an answer"


@KINDS
def test_backend_that_never_closes_is_cut_after_linger_ms(tunnel, kind):
    p, client, server = tunnel(kind, linger_ms=300)
    client.half_close()
    p.log.wait("close", by="client", why="eof")
    assert server.read_to_end() == b""
    with pytest.raises(OSError):
        for _ in range(10000):
            server.send(bytes(1000))


# ---- a side that is slow to take the end ----

@pytest.fixture
def slow_ends(proxy, scripted):
    """A tunnel between ends for which their kernels take little ahead of need."""
    def start(kind, **config):
        backend = scripted()
        p = proxy(backend, listeners=[("127.0.0.1", "0", kind)], **config)
        client, server = open_tunnel(p, backend)
        for end in client, server:
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        return p, client, server
    return start


def take_slowly(stream, n):
    """In many times linger_ms; and says something now and then, to which a closed socket would
    answer with a reset, by which the rest would be lost."""
    taken, pace = b"", threading.Event()
    while len(taken) < n:
        pace.wait(0.05)
        more = stream.receive()
        assert more, f"ended after {len(taken)} of {n} bytes"
        taken += more
        stream.send(b"p")
    return taken


@KINDS
def test_slow_client_gets_the_tail_of_what_was_sent(slow_ends, kind):
    p, client, server = slow_ends(kind, linger_ms=1000)
    sender = threading.Thread(target=lambda: (server.send(BULK), server.half_close()))
    sender.start()
    assert take_slowly(client, len(BULK)) == BULK
    assert client.read_to_end() == b""
    sender.join()
    client.close()
    assert p.log.wait("close", by="backend", why="eof")["tx"] == str(len(BULK))


@KINDS
def test_slow_backend_gets_the_tail_of_what_was_sent(slow_ends, kind):
    p, client, server = slow_ends(kind, linger_ms=1000)
    sender = threading.Thread(target=lambda: (client.send(BULK), client.half_close()))
    sender.start()
    assert take_slowly(server, len(BULK)) == BULK
    assert server.read_to_end() == b""
    sender.join()
    server.close()
    p.log.wait("close", by="client", why="eof")


@KINDS
def test_client_that_takes_nothing_is_cut_and_not_counted_as_served(slow_ends, kind):
    p, client, server = slow_ends(kind, linger_ms=300)
    tail = pattern(100_000)             # of which its kernel takes a part
    server.send(tail)
    server.close()
    assert int(p.log.wait("close", by="backend", why="eof")["tx"]) < len(tail)


# ---- resets ----

def upload_until_it_stops(client):
    """As much as the ends' kernels take while nobody reads."""
    client.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            client.send(bytes(100000))


@KINDS
def test_reset_is_seen_while_the_backend_takes_nothing(proxy, scripted, kind):
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", kind)])
    p.totals()      # its loop runs
    before = p.descriptors()
    tunnels = [open_tunnel(p, backend) for _ in range(5)]
    for client, _ in tunnels:
        upload_until_it_stops(client)
    eventually(lambda: idle_cpu(p) < 0.1)
    for client, _ in tunnels:
        client.reset()
    eventually(lambda: p.descriptors() == before)
    for n, (_, server) in enumerate(tunnels):
        p.log.wait("close", nth=n + 1, by="client", why="reset")
        with pytest.raises(ConnectionResetError):
            server.read_to_end()


@KINDS
def test_end_is_not_taken_for_a_reset_while_the_backend_takes_nothing(tunnel, kind):
    """A client that has sent its last and ended is heard to its end."""
    p, client, server = tunnel(kind)
    sender = threading.Thread(target=lambda: (client.send(BULK * 8), client.close()))
    sender.start()
    eventually(lambda: p.totals()["records"] != "0")
    eventually(lambda: idle_cpu(p) < 0.1)
    assert server.read_to_end() == BULK * 8
    sender.join()
    server.close()
    p.log.wait("close", by="client", why="eof")


@KINDS
@pytest.mark.parametrize("what", ["tunnel", "answer"])
def test_reset_that_a_send_meets_is_a_reset(proxy, scripted, kind, what):
    """It takes the error with it: recv then tells of an end in order, which would make what was cut
    off look whole."""
    backend = scripted()
    p = proxy(backend, listeners=[("127.0.0.1", "0", kind)], http=FORWARD)
    client = connect(p)
    client.send(upgrade() if what == "tunnel" else request(method="POST", Content_Length="4000000"))
    server = backend.accept()
    server.read_head()
    server.send((switching() if what == "tunnel" else answer()) + b"the first half")
    assert client.read_until(b"half").endswith(b"the first half")
    client.send(BULK)
    server.read(300000)
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    p.log.wait("close", by="backend", why="reset")


@KINDS
def test_reset_of_the_client_resets_the_backend(tunnel, kind):
    p, client, server = tunnel(kind)
    client.reset()
    with pytest.raises(ConnectionResetError):
        server.read_to_end()
    p.log.wait("close", by="client", why="reset")


@KINDS
def test_reset_of_the_backend_resets_the_client(tunnel, kind):
    p, client, server = tunnel(kind)
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    p.log.wait("close", by="backend", why="reset")


@KINDS
def test_reset_of_the_backend_resets_a_client_that_has_ended(tunnel, kind):
    p, client, server = tunnel(kind)
    client.half_close()
    assert server.read_to_end() == b""
    server.send(b"the first half")
    assert client.read_until(b"half") == b"the first half"
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    p.log.wait("close", by="client", why="eof")


@pytest.mark.parametrize("end", ["client", "backend"])
def test_reset_of_a_session_at_rest(tunnel, end):
    p, client, server = tunnel()
    eventually(lambda: p.totals()["records"] == "0")
    ends = {"client": (client, server), "backend": (server, client)}
    ends[end][0].reset()
    with pytest.raises(ConnectionResetError):
        ends[end][1].read_to_end()
    p.log.wait("close", by=end, why="reset")


def test_reset_in_the_middle_of_bulk(tunnel):
    p, client, server = tunnel()
    sender = threading.Thread(target=send_until_it_breaks, args=(server,))
    sender.start()
    client.read(500000)
    client.reset()
    sender.join()
    p.log.wait("close", by="client", why="reset")


def send_until_it_breaks(stream):
    with pytest.raises(OSError):
        while True:
            stream.send(bytes(100000))


def test_backend_that_dies_in_the_middle_of_bulk(tunnel):
    p, client, server = tunnel()
    server.send(BULK[:300000])
    client.read(1000)
    server.reset()
    with pytest.raises(ConnectionResetError):
        client.read_to_end()
    p.log.wait("close", by="backend", why="reset")


# ---- broken TLS in a tunnel ----

def wait_for_end(stream):
    """A FIN or a reset."""
    try:
        stream.read_to_end()
    except ConnectionResetError:
        pass


def test_bad_record_ends_the_session(tunnel):
    p, client, server = tunnel()
    record = bytearray(client.records(b"to be spoilt"))
    record[-1] ^= 1
    client.sock.sendall(record)
    p.log.wait("close", by="client", why="tls-error")
    wait_for_end(server)


def test_alert_in_the_clear_is_no_alert(tunnel):
    """Anyone on the way could have sent it."""
    p, client, server = tunnel()
    client.sock.sendall(b"\x15\x03\x03\x00\x02\x02\x28")
    p.log.wait("close", by="client", why="tls-error")


def gnutls_tunnel(proxy, backend, keeper):
    client = keeper(GnutlsClient(tcp(proxy).sock))
    client.send(upgrade())
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert client.receive().startswith(b"HTTP/1.1 101 ")
    return client, server


def test_fatal_alert_ends_the_session(proxy, scripted, keeper):
    backend = scripted()
    p = proxy(backend)
    client, server = gnutls_tunnel(p, backend, keeper)
    client.alert(FATAL, INTERNAL_ERROR)
    p.log.wait("close", by="client", why="tls-alert")
    wait_for_end(server)


def test_endless_warning_alerts_end_the_session(proxy, scripted, keeper):
    backend = scripted()
    p = proxy(backend)
    client, server = gnutls_tunnel(p, backend, keeper)
    with pytest.raises(OSError):
        for _ in range(100000):
            client.alert(WARNING, USER_CANCELED)
    p.log.wait("close", by="client", why="flood")


def test_some_warning_alerts_do_no_harm(proxy, scripted, keeper):
    backend = scripted()
    p = proxy(backend)
    client, server = gnutls_tunnel(p, backend, keeper)
    for _ in range(50):
        client.alert(WARNING, USER_CANCELED)
        client.send(b"data")
        assert server.read(4) == b"data"


# ---- time ----

@KINDS
def test_idle_session_is_closed_after_idle_ms(tunnel, kind):
    p, client, server = tunnel(kind, head_ms=1000, idle_ms=1200)
    assert client.read_to_end() == b""
    assert server.read_to_end() == b""
    client.close()
    p.log.wait("close", by="proxy", why="idle")


def test_idle_session_at_rest_is_closed_too(tunnel):
    p, client, server = tunnel(head_ms=1000, idle_ms=1200)
    assert client.read_to_end() == b""
    client.close()
    p.log.wait("close", by="proxy", why="idle")


@pytest.mark.parametrize("talker", ["client", "backend"])
def test_session_that_talks_is_not_idle(tunnel, talker):
    """Either direction keeps it, for more than twice idle_ms."""
    p, client, server = tunnel(head_ms=1000, idle_ms=2000)
    speak, listen = (client, server) if talker == "client" else (server, client)
    silence = threading.Event()
    for _ in range(45):
        silence.wait(0.1)
        speak.send(b".")
        assert listen.read(1) == b"."


@KINDS
def test_urgent_byte_wakes_a_session_at_rest_once(tunnel, kind):
    """It is nobody's, and must not be told of again and again."""
    p, client, server = tunnel(kind)
    for source, sink in ((client, server), (server, client)):
        source.sock.send(b"!", socket.MSG_OOB)
        assert idle_cpu(p) < 0.1
        source.send(b"behind it")
        assert sink.read(9) == b"behind it"


def test_idle_0_is_for_ever(tunnel):
    p, client, server = tunnel(head_ms=1000, idle_ms=0)
    eventually(lambda: p.totals()["records"] == "0")
    client.send(b"still here")
    assert server.read(10) == b"still here"


@pytest.mark.parametrize("taker", ["client", "backend"])
def test_peer_that_takes_nothing_is_given_up_after_user_timeout(tunnel, taker):
    """A window that stays closed is a dead peer to TCP_USER_TIMEOUT."""
    p, client, server = tunnel(user_timeout_ms=1000, keepalive_s=0)
    send_until_it_breaks(server if taker == "client" else client)
    p.log.wait("close", by=taker, why="timeout")


def keepalive_timers(pid):
    """Seconds until the next probe, of each established connection of that process."""
    mine = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    timers = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        state, (timer, ticks), inode = fields[3], fields[5].split(":"), fields[9]
        if state == "01" and timer == "02" and f"socket:[{inode}]" in mine:
            timers.append(int(ticks, 16) / os.sysconf("SC_CLK_TCK"))
    return timers


def test_keepalive_is_on_at_both_ends(tunnel):
    p, client, server = tunnel(keepalive_s=77, keepalive_probes=2)
    timers = []

    def both():
        timers[:] = keepalive_timers(p.pid)
        return len(timers) == 2
    eventually(both)
    assert all(60 < timer <= 77 for timer in timers)


def test_lost_keepalive_answer_is_no_end(proxy, scripted, neighbour):
    """By default, with all times a fifteenth of that."""
    defaults = {name: int(value) for name, value in re.findall(
        r"^static const unsigned (keepalive_\w+|user_timeout_ms) *= (\d+);",
        (REPO / "config.def.h").read_text(), re.M)}
    scaled = {name: value if name == "keepalive_probes" else value // 15
              for name, value in defaults.items()}
    backend = scripted()
    p = proxy(backend, listeners=[("10.77.0.1", "0", WS)], **scaled)
    client = Stream(neighbour.connect(p.address()))
    client.send(upgrade())
    server = backend.accept()
    server.read_head()
    server.send(switching())
    assert client.read_head().status == 101
    before = neighbour.segments()
    neighbour.run("ip route add blackhole 10.77.0.1/32")
    eventually(lambda: neighbour.segments() > before)
    neighbour.run("ip route del blackhole 10.77.0.1/32")
    eventually(lambda: neighbour.segments() > before + 1)
    client.send(b"still here")
    assert server.read(10) == b"still here"
