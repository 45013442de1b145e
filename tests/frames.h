/* frames.h - the reference for frames (RFC 6455 5.2): it has all the bytes before it. */

static uint64_t big_endian(const unsigned char *p, size_t len)
{
	uint64_t n = 0;

	while (len-- > 0)
		n = n << 8 | *p++;
	return n;
}

/* The length of the frame at p, 0: cut off; -1: not the grammar. `fragmented` 1: a message has more
 * to come. */
static int64_t frame_length(const unsigned char *p, size_t len, unsigned masked, int fragmented)
{
	unsigned op, n, wide;
	uint64_t size;

	if (len >= 1) {
		op = p[0] & 15;
		if ((op > 2 && op < 8) || op > 10 || (op >= 8 && !(p[0] & 0x80)))
			return -1;
		if (op < 8 && (op == 0) != fragmented)
			return -1;
	}
	if (len < 2)
		return 0;
	n = p[1] & 0x7f;
	if ((p[1] & 0x80) != (masked ? 0x80 : 0) || (op >= 8 && n > 125) || (op == 8 && n == 1))
		return -1;
	wide = n == 126 ? 2 : n == 127 ? 8 : 0;
	if (len < 2 + wide)
		return 0;
	size = wide ? big_endian(p + 2, wide) : n;
	if (size >> 63 || (wide == 2 && size < 126) || (wide == 8 && size < 65536))
		return -1;
	size += 2 + wide + (masked ? 4 : 0);
	return size > len ? 0 : (int64_t)size;
}
