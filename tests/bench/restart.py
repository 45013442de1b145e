"""restart.py - a restart under load, for bench.py: tunnels that talk, and newcomers one after the
other, who count what they notice of it. See LICENSE.

refused    newcomers that got no answer
cut        tunnels that ended without a Close, or inside a frame
lost       messages that were sent on a tunnel before it ended, and had no echo
herd       most tunnels that came again within 100 ms, of those that ended"""

import asyncio
import base64
import contextlib
import os
import ssl
import time

TALK_S = 0.2            # between two messages of a tunnel
NEWCOMER_S = 0.01       # and two newcomers
MASK = bytes(4)


class Restart:
    def __init__(self, port):
        self.port = port
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        self.tls.maximum_version = ssl.TLSVersion.TLSv1_2
        self.over, self.open = False, 0
        self.refused = self.cut = self.lost = self.newcomers = 0
        self.again = []                 # when tunnels came again

    async def enter(self):
        """A tunnel."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(f"GET /echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                     f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head[:15]:
            raise ConnectionError(head)
        return reader, writer

    @staticmethod
    async def frame(reader):
        """The opcode of the next one."""
        first, size = await reader.readexactly(2)
        await reader.readexactly(size)
        return first & 15

    async def tunnel(self):
        """Talks until it is ended."""
        reader, writer = await self.enter()
        self.open += 1
        waiting, close = 0, False
        try:
            while not self.over and not close:
                waiting = 1
                writer.write(b"\x82\x88" + MASK + os.urandom(8))
                close = await self.frame(reader) == 8
                waiting -= not close
                with contextlib.suppress(asyncio.TimeoutError):
                    close = close or await asyncio.wait_for(self.frame(reader), TALK_S) == 8
            writer.write(b"\x88\x82" + MASK + b"\x03\xe9")
        except (OSError, EOFError):
            self.cut += 1
        self.lost += waiting
        writer.transport.abort()

    async def client(self):
        while not self.over:
            try:
                await self.tunnel()
                self.again.append(time.monotonic())
            except (OSError, EOFError):
                await asyncio.sleep(0.1)

    async def newcomer(self):
        self.newcomers += 1
        try:
            (await asyncio.wait_for(self.enter(), 10))[1].transport.abort()
        except (OSError, EOFError, asyncio.TimeoutError):
            self.refused += 1

    async def run(self, tunnels, restart, seconds):
        clients = [asyncio.create_task(self.client()) for _ in range(tunnels)]
        while self.open < tunnels:
            await asyncio.sleep(0.05)
        tasks, begin, done = [], time.monotonic(), None
        while time.monotonic() < begin + seconds:
            tasks.append(asyncio.create_task(self.newcomer()))
            await asyncio.sleep(NEWCOMER_S)
            if not done and time.monotonic() > begin + 1:
                done = asyncio.get_running_loop().run_in_executor(None, restart)
        times = sorted(self.again)
        herd = max((sum(t <= other < t + 0.1 for other in times) for t in times), default=0)
        found = {"refused": self.refused, "cut": self.cut, "lost": self.lost, "herd": herd,
                 "again": len(times), "newcomers": self.newcomers}
        self.over = True
        await done
        await asyncio.gather(*tasks)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return found


def measure(port, tunnels, restart, seconds):
    """What is noticed of restart(), which is called after a second."""
    return asyncio.run(Restart(port).run(tunnels, restart, seconds))
