################################################################################
#
# wssproxy
#
################################################################################

WSSPROXY_VERSION = 0.1
# The source tree, as `make dist` of wssproxy packs it:
# tar xzf wssproxy-0.1.tar.gz && mv wssproxy-0.1 package/wssproxy/src
WSSPROXY_SITE = $(WSSPROXY_PKGDIR)/src
WSSPROXY_SITE_METHOD = local
WSSPROXY_LICENSE = ISC
WSSPROXY_LICENSE_FILES = LICENSE
WSSPROXY_DEPENDENCIES = bearssl

WSSPROXY_CONFIG = $(call qstrip,$(BR2_PACKAGE_WSSPROXY_CONFIG))

# Always: a config.h that lies in the source tree would win in silence. The
# defaults log to syslog, for nobody reads what scripts of init print.
define WSSPROXY_COPY_CONFIG
	$(if $(WSSPROXY_CONFIG),\
		$(INSTALL) -m 0644 $(WSSPROXY_CONFIG) $(@D)/config.h,\
		sed 's/\(log_to  *= \)STDERR/\1SYSLOG/' $(@D)/config.def.h >$(@D)/config.h)
endef
WSSPROXY_PRE_BUILD_HOOKS += WSSPROXY_COPY_CONFIG

define WSSPROXY_BUILD_CMDS
	$(TARGET_MAKE_ENV) $(MAKE) $(TARGET_CONFIGURE_OPTS) -C $(@D)
endef

define WSSPROXY_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/wssproxy $(TARGET_DIR)/usr/sbin/wssproxy
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/etc/wssproxy
endef

define WSSPROXY_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(WSSPROXY_PKGDIR)/S50wssproxy \
		$(TARGET_DIR)/etc/init.d/S50wssproxy
endef

define WSSPROXY_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/tests/pkg/wssproxy.service \
		$(TARGET_DIR)/usr/lib/systemd/system/wssproxy.service
	$(SED) 's,/usr/local/sbin,/usr/sbin,' \
		$(TARGET_DIR)/usr/lib/systemd/system/wssproxy.service
endef

$(eval $(generic-package))
