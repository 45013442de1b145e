// A client by Node's ws. Reads its orders from stdin as JSON:
//   url, host (to connect to), ca (file), patience (seconds),
//   protocols, deflate, sizes (of messages to send, each awaits its echo), close: [code, reason],
//   wait: 1, for the other side to close
// Prints what it saw as JSON: protocol, extensions, echoed, pong, code, reason.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const { once } = require('events');
const WebSocket = require('ws');

async function main() {
	const orders = JSON.parse(fs.readFileSync(0, 'utf8'));
	setTimeout(() => fail('took too long'), orders.patience * 3000).unref();
	const ws = new WebSocket(orders.url, orders.protocols || [], {
		host: orders.host, ca: fs.readFileSync(orders.ca), servername: 'localhost',
		perMessageDeflate: orders.deflate ? { threshold: 0 } : false, maxPayload: 1 << 28,
	});
	ws.on('error', (e) => fail(e.message));
	const closed = once(ws, 'close');
	await once(ws, 'open');
	const seen = { protocol: ws.protocol, extensions: ws.extensions, echoed: 0, pong: false };

	for (const size of orders.sizes || [])
		for (const message of [crypto.randomBytes(size), 'ü'.repeat(size / 2)]) {
			ws.send(message);
			const [data, binary] = await once(ws, 'message');
			if (binary !== Buffer.isBuffer(message) || !data.equals(Buffer.from(message)))
				fail(`echo of ${size} bytes differs`);
			seen.echoed++;
		}

	if (orders.ping) {
		ws.ping('are you there?');
		const [data] = await once(ws, 'pong');
		seen.pong = data.toString() === 'are you there?';
	}
	if (orders.close)
		ws.close(...orders.close);
	else if (!orders.wait && !orders.url.includes('/close/'))
		ws.close(1000);
	const [code, reason] = await closed;
	console.log(JSON.stringify({ ...seen, code, reason: reason.toString() }));
	process.exit(0);
}

function fail(message) {
	console.error(message);
	process.exit(1);
}

main().catch((e) => fail(e.stack));
