// A socket.io client. Reads its orders from stdin as JSON:
//   url, ca (file), from (local address or null), transports, upgrade (wait for it), messages
// Prints what it saw as JSON: first and last transport, names of the servers that answered, the
// session's id at the start and at the end; or { error }.
'use strict';
const fs = require('fs');
const https = require('https');
const { once } = require('events');
const { io } = require('socket.io-client');

async function main() {
	const orders = JSON.parse(fs.readFileSync(0, 'utf8'));
	const ca = fs.readFileSync(orders.ca);
	const agent = new https.Agent({ ca, localAddress: orders.from || undefined });
	const socket = io(orders.url, {
		ca, agent, transports: orders.transports, reconnection: false, forceNew: true,
		withCredentials: true, timeout: orders.patience * 1000,
	});
	socket.on('connect_error', (e) => finish({ error: e.message }));
	const engine = socket.io.engine;
	const seen = { names: [] };
	let upgraded = null;
	engine.once('open', () => {
		seen.first = engine.transport.name;
		seen.sid = engine.id;
		if (orders.upgrade && seen.first !== 'websocket')
			upgraded = once(engine, 'upgrade');
	});
	engine.on('close', (reason) => finish({ error: reason }));
	await once(socket, 'connect');

	for (let i = 0; i < orders.messages; i++) {
		if (i === orders.messages >> 1)
			await upgraded;
		const text = `message ${i} ` + 'ü'.repeat(i % 7 === 3 ? 30000 : 10);
		const [echo, name] = await new Promise((resolve) =>
			socket.emit('echo', text, (...answer) => resolve(answer)));
		if (echo !== text)
			return finish({ error: `echo ${i} differs` });
		seen.names.push(name);
	}
	const bytes = Buffer.alloc(100000, 7);
	socket.emit('push', bytes);
	const [pushed] = await once(socket, 'pushed');
	if (!bytes.equals(Buffer.from(pushed)))
		return finish({ error: 'binary echo differs' });
	finish({
		...seen, names: [...new Set(seen.names)],
		last: engine.transport.name, same: engine.id === seen.sid,
	});
}

function finish(seen) {
	console.log(JSON.stringify(seen));
	process.exit(0);
}

main().catch((e) => finish({ error: e.stack }));
