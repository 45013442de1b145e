# wssproxy. `make` builds it after config.h, which it makes from config.def.h the first time.
# What is set by ?= can be set on the command line or in the environment as well; what the sources
# need apart from that is in FLAGS.
CC      ?= cc
CFLAGS  ?= -Os -fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
CPPFLAGS ?=
# Both are overridden by static programs, LDFLAGS=-static: they have no use for them.
LDFLAGS ?= -pie -Wl,-z,relro -Wl,-z,now
PIC     ?= -fPIE
LDLIBS  ?=
PREFIX  ?= /usr/local
DESTDIR ?=
# The configuration, and the program to make of it.
CONFIG  ?= config.h
OUT     ?= wssproxy
# A source tree of BearSSL, which is built with the same compiler and linked in; empty: the
# system's library.
BEARSSL ?=
# Added for its curves, which are most of a full handshake: half their time on x86-64, three fifths
# on aarch64, three quarters on riscv64, four fifths on 32-bit ARM, for 7 to 13 KB. MIPS gains next
# to nothing by it.
CURVE_CFLAGS ?= $$(case $$($(CC) -dumpmachine) in (x86_64*|aarch64*|riscv64*|arm*) echo -O3;; esac)
# Where `make demo` listens.
PORT    ?= 8443
# How long `make fuzz` runs each target, and `make soak`.
SECONDS ?= 60
MINUTES ?= 60

VERSION = 0.1
SRC     = wssproxy.c
# In static programs, data that begin in the file where the code ends: up to 4 KB less on MIPS and
# ARM, and 46 on aarch64; on the latter two, read-only relocations keep them apart, which musl never
# protects in those. The linker moves data to the next of the common pages where that saves one in
# memory, so small ones leave it no choice. (max-page-size stays: programs with a smaller one saved no more, and do not
# start on kernels with pages of 16 or 64 KB.)
PAGES   = $$(case "$$($(CC) -dumpmachine) $(LDFLAGS)" in (mips*-static*) echo -Wl,-z,common-page-size=16;; \
	(aarch64*-static* | arm*-static*) echo -Wl,-z,common-page-size=16,-z,norelro;; esac)
SMALL   = -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables
FLAGS   = -std=c11 -D_GNU_SOURCE -DVERSION='"$(VERSION)"' -DCONFIG='"$(CONFIG)"' -I. \
	$(BEARSSL:%=-isystem %/inc) $(PIC) $(SMALL) $(CPPFLAGS) $(CFLAGS) \
	-Wl,--gc-sections $(PAGES) $(LDFLAGS)
# Objects of the library lie inside its tree, apart for each compiler and its flags. The curves come
# first, with theirs; `lib` finds them made.
OBJECTS = build/$$(echo '$(CC) $(LIBFLAGS)' $(CURVE_CFLAGS) | cksum | tr -dc 0-9)
# -fstack-protector-strong without its last word: in the library, whose functions of arithmetic have
# arrays of numbers, that is 2 to 3 KB.
LIBFLAGS = $(PIC) $(SMALL) $(CFLAGS:-strong=)
LIBMAKE = $(MAKE) BUILD=$(OBJECTS) CC='$(CC)' AR="$${AR:-$$($(CC) -print-prog-name=ar)}"
CURVES  = $$(for f in src/ec/ec_[cp]*_m[36]?.c; do echo $(OBJECTS)/obj/$$(basename $$f c)o; done)

all: $(OUT)

$(OUT): $(SRC) wssproxy.c wssproxy.h $(CONFIG) $(OUT).flags
	@test -z '$(BEARSSL)' || { cd '$(BEARSSL)' && mkdir -p $(OBJECTS)/obj && \
	$(LIBMAKE) CFLAGS='$(LIBFLAGS) '"$(CURVE_CFLAGS)" $(CURVES) && $(LIBMAKE) CFLAGS='$(LIBFLAGS)' lib; }
	build=$$(cat wssproxy.c wssproxy.h $(CONFIG) | cksum | tr ' ' -); tree='$(BEARSSL)'; \
	$(CC) $(FLAGS) -DBUILD="\"$$build\"" $${SOURCE_DATE_EPOCH:+-DBUILD_TIME=$$SOURCE_DATE_EPOCH} \
	-o $@ $(SRC) $(LDLIBS) $${tree:+-L$$tree/$(OBJECTS)} -lbearssl

# What the program was last built with: another compiler or other flags build it again.
$(OUT).flags: FORCE
	@echo '$(CC) $(FLAGS) $(LDLIBS) $(BEARSSL)' $(CURVE_CFLAGS) "$$SOURCE_DATE_EPOCH" >$@.new; \
	if cmp -s $@.new $@; then rm -f $@.new; else mv $@.new $@; fi

config.h: config.def.h
	@if test -f $@; then echo 'warning: config.def.h is newer than config.h: compare, then touch config.h' >&2; \
	else cp config.def.h $@; fi

# Installs what was built before, whatever it was built with.
install:
	@test -f $(OUT) || $(MAKE) $(OUT)
	mkdir -p '$(DESTDIR)$(PREFIX)/sbin' '$(DESTDIR)$(PREFIX)/share/man/man8'
	cp -f $(OUT) '$(DESTDIR)$(PREFIX)/sbin/wssproxy'
	chmod 755 '$(DESTDIR)$(PREFIX)/sbin/wssproxy'
	cp -f wssproxy.8 '$(DESTDIR)$(PREFIX)/share/man/man8/wssproxy.8'
	chmod 644 '$(DESTDIR)$(PREFIX)/share/man/man8/wssproxy.8'

uninstall:
	rm -f '$(DESTDIR)$(PREFIX)/sbin/wssproxy' '$(DESTDIR)$(PREFIX)/share/man/man8/wssproxy.8'

DIST = wssproxy-$(VERSION)
dist:
	rm -rf $(DIST) && mkdir $(DIST)
	cp -R .ci .gitignore LICENSE Makefile README config.def.h wssproxy.8 wssproxy.c wssproxy.h tests $(DIST)
	rm -rf $(DIST)/tests/build && find $(DIST) -name '__pycache__' -prune -exec rm -rf {} +
	tar cf - $(DIST) | gzip -9n >$(DIST).tar.gz
	rm -rf $(DIST)
	@sha256sum $(DIST).tar.gz

# config.h stays: it is the user's.
clean:
	rm -rf $(OUT) $(OUT).flags $(DIST) $(DIST).tar.gz tests/build

# The demo, and the tests: `check` runs all but what takes longer in emulators (check-cross,
# check-valgrind) or needs a whole one (check-device), and installs what they need.
demo:
	@CC='$(CC)' MAKE='$(MAKE)' PORT='$(PORT)' sh tests/demo/run

check check-unit check-e2e check-valgrind check-soak check-cross check-device check-warnings lint:
	@CC='$(CC)' MAKE='$(MAKE)' sh tests/check $@

# Targets of libFuzzer, for SECONDS each.
fuzz:
	@MAKE='$(MAKE)' FUZZ_SECONDS='$(SECONDS)' sh tests/check $@

# An hour of mixed load, or MINUTES of it.
soak:
	@CC='$(CC)' MINUTES='$(MINUTES)' sh tests/soak/run

# Beside nginx, haproxy, hitch, stunnel and lighttpd: a table and a plot in tests/build/bench.
bench:
	@sh tests/bench/run

FORCE:

.PHONY: all install uninstall dist clean demo check check-unit check-e2e check-valgrind check-soak \
	check-cross check-device check-warnings lint fuzz soak bench FORCE
