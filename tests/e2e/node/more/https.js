// An HTTPS backend by Node. Its orders are JSON in the first argument:
//   host, port, cert, key (files), clientCa (file: asks clients for a certificate),
//   refuse (false: takes those that have none, or another)
// GET / tells what it knows of the request as JSON; POST /sink counts the body; /source/N is N
// bytes of zeros; WebSockets are echoed. Prints "ready", then a line for each connection that is
// refused.
'use strict';
const fs = require('fs');
const https = require('https');
const WebSocket = require('ws');

const orders = JSON.parse(process.argv[2]);
const server = https.createServer({
	cert: fs.readFileSync(orders.cert), key: fs.readFileSync(orders.key),
	ca: orders.clientCa ? fs.readFileSync(orders.clientCa) : undefined,
	requestCert: Boolean(orders.clientCa), rejectUnauthorized: orders.refuse,
}, answer);
const block = Buffer.alloc(1 << 20);

function facts(request) {
	const socket = request.socket;
	const peer = socket.getPeerCertificate();
	return {
		method: request.method, url: request.url, headers: request.headers,
		reused: socket.isSessionReused(), sni: socket.servername, alpn: socket.alpnProtocol,
		authorized: socket.authorized, subject: peer && peer.subject ? peer.subject.CN : null,
		tls: socket.getProtocol(),
	};
}

function answer(request, response) {
	if (request.url.startsWith('/source/'))
		return source(response, Number(request.url.slice(8)));
	let size = 0;
	request.on('data', (data) => { size += data.length; });
	request.on('end', () => {
		const text = JSON.stringify({ ...facts(request), size });
		response.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': text.length });
		response.end(text);
	});
}

function source(response, left) {
	response.writeHead(200, { 'Content-Length': left });
	const more = () => {
		while (left > 0) {
			const part = left < block.length ? block.subarray(0, left) : block;
			left -= part.length;
			if (!response.write(part))
				return response.once('drain', more);
		}
		response.end();
	};
	more();
}

const sockets = new WebSocket.Server({ server, maxPayload: 1 << 28 });
sockets.on('connection', (ws, request) => {
	ws.on('error', () => {});
	ws.on('message', (data, binary) => ws.send(data, { binary }));
	if (request.url === '/facts')
		ws.send(JSON.stringify(facts(request)));
});
server.on('tlsClientError', (e) => console.log(`refused why=${e.code}`));
server.listen(orders.port, orders.host, () => console.log('ready'));
