/* heads.h - what must hold of any head: of one that was taken, and of one that is passed on. The
 * reader here is not wssproxy's: it knows lines that end in CRLF, and nothing else. */

/* Whether a span lies in what was parsed. */
static void span_must(struct span s, const struct head *h)
{
	MUST(s.at + s.len <= h->size);
}

/* No line break, NUL or other control byte in any part of a head that was taken. */
static void head_must(const struct head *h, const char *buf, size_t len)
{
	unsigned i;
	size_t k;

	MUST(h->size > 0 && h->size <= len && h->size <= head_max && h->nfields <= HEAD_FIELDS);
	MUST(memcmp(buf + h->size - 4, "\r\n\r\n", 4) == 0);
	for (i = 0; i < 3; i++) {
		span_must(h->part[i], h);
		for (k = 0; k < h->part[i].len; k++)
			MUST(!iscntrl((unsigned char)buf[h->part[i].at + k]) ||
				buf[h->part[i].at + k] == '\t');
	}
	for (i = 0; i < h->nfields; i++) {
		const struct field *f = &h->field[i];

		span_must(f->name, h);
		span_must(f->value, h);
		MUST(f->name.len > 0);
		for (k = 0; k < f->name.len; k++)
			MUST(isgraph((unsigned char)buf[f->name.at + k]) &&
				buf[f->name.at + k] != ':');
		for (k = 0; k < f->value.len; k++)
			MUST(!iscntrl((unsigned char)buf[f->value.at + k]) ||
				buf[f->value.at + k] == '\t');
	}
}

/* The lines of a rendered head. */
struct lines {
	const char *p, *end;
};

/* The next line, NULL at the empty one, which must be the last. */
static const char *line_next(struct lines *l, size_t *len)
{
	const char *line = l->p, *lf = memchr(line, '\n', (size_t)(l->end - line));
	const char *c;

	MUST(lf != NULL && lf > line && lf[-1] == '\r');
	*len = (size_t)(lf - 1 - line);
	l->p = lf + 1;
	for (c = line; c < lf - 1; c++)
		MUST(*c != '\0' && *c != '\r');
	if (*len > 0)
		return line;
	MUST(l->p == l->end);
	return NULL;
}

/* How many fields of this name a rendered head has; the value of the last, NULL: none. */
static unsigned field_count(const char *head, size_t len, const char *name, const char **value,
	size_t *n)
{
	struct lines l = { head, head + len };
	size_t k, name_len = strlen(name);
	unsigned count = 0;
	const char *line = line_next(&l, &k);

	*value = NULL;
	*n = 0;
	while ((line = line_next(&l, &k)) != NULL) {
		MUST(memchr(line, ':', k) != NULL && line[0] != ' ' && line[0] != '\t');
		if (k < name_len + 2 || line[name_len] != ':' ||
		    strncasecmp(line, name, name_len) != 0)
			continue;
		MUST(line[name_len + 1] == ' ');
		*value = line + name_len + 2;
		*n = k - name_len - 2;
		count++;
	}
	return count;
}

/* Whether the rendered head has exactly one field of this name, with that value. */
static int field_is(const char *head, size_t len, const char *name, const char *want)
{
	const char *value;
	size_t n;

	return field_count(head, len, name, &value, &n) == 1 && n == strlen(want) &&
		memcmp(value, want, n) == 0;
}

static unsigned fields_of(const char *head, size_t len, const char *name)
{
	const char *value;
	size_t n;

	return field_count(head, len, name, &value, &n);
}
