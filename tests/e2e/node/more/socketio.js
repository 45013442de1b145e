// A socket.io server. Arguments: HOST PORT NAME. 'echo' is acknowledged with what it brought and
// NAME; 'push' sends an event 'pushed' back.
'use strict';
const http = require('http');
const { Server } = require('socket.io');

const [host, port, name] = process.argv.slice(2);
const server = http.createServer((request, response) => response.end('no socket.io'));
const io = new Server(server, { serveClient: false, maxHttpBufferSize: 1e8 });

io.on('connection', (socket) => {
	console.log(`connection transport=${socket.conn.transport.name}`);
	socket.conn.on('upgrade', () => console.log(`upgrade transport=${socket.conn.transport.name}`));
	socket.on('echo', (data, acknowledge) => acknowledge(data, name));
	socket.on('push', (data) => socket.emit('pushed', data));
});
server.listen(Number(port), host, () => console.log('ready'));
