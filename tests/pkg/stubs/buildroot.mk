# As much of Buildroot as the recipe uses: the steps in Buildroot's order, for this machine.
# make -f buildroot.stub.mk PKGDIR=... BUILD_DIR=... TARGET_DIR=... [BR2_...=...]
qstrip = $(strip $(subst ",,$(1)))#"))
INSTALL = install
SED = sed -i -e
TARGET_CONFIGURE_OPTS = CC="$(CC)" AR=ar CFLAGS="-O1" LDFLAGS=""
WSSPROXY_PKGDIR = $(PKGDIR)
define line


endef

define generic-package
$$(BUILD_DIR)/stamp:
	cp -a $$(WSSPROXY_SITE)/. $$(BUILD_DIR)/
	$$(foreach hook,$$(WSSPROXY_PRE_BUILD_HOOKS),$$($$(hook))$$(line))
	$$(WSSPROXY_BUILD_CMDS)
	$$(WSSPROXY_INSTALL_TARGET_CMDS)
	$$(WSSPROXY_INSTALL_INIT_SYSV)
	$$(WSSPROXY_INSTALL_INIT_SYSTEMD)
	touch $$@
endef

include $(PKGDIR)/wssproxy.mk
