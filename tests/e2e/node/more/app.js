// An application by Express with ws beside it, as they are written every day. Arguments: HOST PORT.
//   /            a page; /static/app.js an asset with an ETag; /info what Express knows of the client
//   /parts       a page of 40 parts, /part/0 to /part/39
//   /login       a form: sets a cookie and redirects to /home, which wants that cookie
//   /upload      counts the bytes of what is posted
//   /events      server-sent events: one at once, one for each request of /tick
//   /chat        a WebSocket echo, for who has the cookie; /close closes it with 4001
'use strict';
const express = require('express');
const http = require('http');
const WebSocket = require('ws');

const [host, port] = process.argv.slice(2);
const app = express();
const listeners = new Set();

app.set('trust proxy', 'loopback');
app.use(express.urlencoded({ extended: false }));
app.get('/', (request, response) => response.send('<!DOCTYPE html><title>app</title>Hello'));
app.get('/static/app.js', (request, response) =>
	response.type('js').set('Cache-Control', 'max-age=60').send('"use strict";'));
app.get('/info', (request, response) => response.json({
	ip: request.ip, ips: request.ips, secure: request.secure, protocol: request.protocol,
	hostname: request.hostname,
}));

app.get('/parts', (request, response) => response.send('<!DOCTYPE html><title>0</title>' +
	[...Array(40).keys()].map((n) => `<script src="/part/${n}"></script>`).join('')));
app.get('/part/:n', (request, response) =>
	response.type('js').send(`document.title = Number(document.title) + 1; // ${' '.repeat(5000)}`));

const signedIn = (request) => /(^|; )session=42($|;)/.test(request.headers.cookie || '');

app.post('/login', (request, response) => {
	if (request.body.password !== 'right')
		return response.status(401).send('wrong password');
	response.cookie('session', '42', { httpOnly: true, secure: request.secure });
	response.redirect(303, '/home');
});
app.get('/home', (request, response) =>
	(signedIn(request) ? response.send('welcome home') : response.redirect(303, '/')));
app.post('/upload', (request, response) => {
	let size = 0;
	request.on('data', (data) => { size += data.length; });
	request.on('end', () => response.json({ size, type: request.headers['content-type'] }));
});
app.get('/events', (request, response) => {
	response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-store' });
	const tell = (n) => response.write(`data: tick ${n}\n\n`);
	tell(0);
	listeners.add(tell);
	request.on('close', () => {
		listeners.delete(tell);
		console.log('listener left');
	});
});
let ticks = 0;
app.post('/tick', (request, response) => {
	ticks++;
	listeners.forEach((tell) => tell(ticks));
	response.sendStatus(204);
});

const server = http.createServer(app);
const sockets = new WebSocket.Server({ noServer: true });
server.on('upgrade', (request, socket, head) => {
	if (request.url !== '/chat' || !signedIn(request)) {
		socket.end('HTTP/1.1 401 Unauthorized\r\nContent-Length: 6\r\nConnection: close\r\n\r\nlogin!');
		return;
	}
	sockets.handleUpgrade(request, socket, head, (ws) => {
		ws.on('error', () => {});
		ws.on('message', (data, binary) =>
			(data.toString() === '/close' ? ws.close(4001, 'as you wish') : ws.send(data, { binary })));
	});
});
server.listen(Number(port), host, () => console.log('ready'));
