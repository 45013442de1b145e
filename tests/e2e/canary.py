"""canary.py PROXY PORT PLACE PORT CA: both ends of one tunnel to /canary, which echoes until stdin
ends: numbered messages of many sizes, each of which must come back whole and in order. A process of
its own, so that nothing but the proxy and the machine delays it. Prints 'ready', 'beats N' now and
then, and at its end what it measured, as JSON."""

import json
import select
import socket
import ssl
import struct
import sys
import time

from harness import PATIENCE
from peers import KEY, pattern, switching, upgrade

CALM = 200              # echoes before 'ready', to compare with
REPORT = 50             # echoes between two lines 'beats'
NOISE = pattern(4096)


def read(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        if not more:
            raise EOFError(f"ended after {len(data)} of {n} bytes")
        data += more
    return data


def read_head(stream):
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += read(stream, 1)
    return data


def pass_on(source, sink, message):
    source.sendall(message)
    came = read(sink, len(message))
    if came != message:
        raise ValueError(f"sent {message[:16]!r}..., got {came[:16]!r}...")


def echo(client, server, number):
    """Seconds that a message and its echo took."""
    message = struct.pack("!QQ", number, number * 0x9e3779b97f4a7c15 % (1 << 64)) \
        + NOISE[:number * 37 % 2000]
    start = time.monotonic()
    pass_on(client, server, message)
    pass_on(server, client, message)
    return time.monotonic() - start


def open_tunnel(address, listener, ca):
    context = ssl.create_default_context(cafile=ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = context.wrap_socket(socket.create_connection(address, 4 * PATIENCE),
                                 server_hostname="localhost")
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(upgrade("/canary"))
    server = listener.accept()[0]
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.settimeout(4 * PATIENCE)
    read_head(server)
    server.sendall(switching(KEY))
    assert read_head(client).startswith(b"HTTP/1.1 101 ")
    return client, server


def main():
    proxy, port, place, own_port, ca = sys.argv[1:]
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((place, int(own_port)))
    listener.listen()
    client, server = open_tunnel((proxy, int(port)), listener, ca)
    times = [echo(client, server, n) for n in range(CALM)]
    calm = max(times)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        times.append(echo(client, server, len(times)))
        if len(times) % REPORT == 0:
            print(f"beats {len(times)}", flush=True)
    times = sorted(times[CALM:])
    print(json.dumps({"beats": len(times), "calm": calm, "p99": times[len(times) * 99 // 100],
                      "worst": times[-1]}))


if __name__ == "__main__":
    main()
