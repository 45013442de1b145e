// A backend by Node's ws. Usage: server.js HOST PORT. Prints "ready", then [code, reason] of each
// session that ends. /headers sends what it was asked as JSON, /ping says when its ping was
// answered, /close/4001 closes with that code, all echo. The subprotocol 'chat' is spoken where it is offered.
'use strict';
const WebSocket = require('ws');

const [host, port] = process.argv.slice(2);
const server = new WebSocket.Server({
	host, port: Number(port), maxPayload: 1 << 28,
	perMessageDeflate: { threshold: 0 },
	handleProtocols: (offered) => (offered.has('chat') ? 'chat' : false),
});

server.on('listening', () => console.log('ready'));
server.on('connection', (ws, request) => {
	ws.on('error', () => {});
	ws.on('close', (code, reason) => console.log(JSON.stringify([code, reason.toString()])));
	ws.on('message', (data, binary) => ws.send(data, { binary }));
	if (request.url === '/headers') {
		const pairs = [];
		for (let i = 0; i < request.rawHeaders.length; i += 2)
			pairs.push([request.rawHeaders[i], request.rawHeaders[i + 1]]);
		ws.send(JSON.stringify(pairs));
	}
	if (request.url === '/ping') {
		ws.on('pong', () => ws.send('pong seen'));
		ws.ping('are you there?');
	}
	if (request.url.startsWith('/close/'))
		ws.close(Number(request.url.split('/')[2]), 'as you wish');
});
