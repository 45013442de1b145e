################################################################################
#
# wssproxy
#
################################################################################

WSSPROXY_VERSION = 0.1
WSSPROXY_SITE = $(WSSPROXY_PKGDIR)/src
WSSPROXY_SITE_METHOD = local
WSSPROXY_LICENSE = ISC
WSSPROXY_LICENSE_FILES = LICENSE
WSSPROXY_DEPENDENCIES = bearssl

WSSPROXY_CONFIG = $(call qstrip,$(BR2_PACKAGE_WSSPROXY_CONFIG))
ifneq ($(WSSPROXY_CONFIG),)
define WSSPROXY_COPY_CONFIG
	$(INSTALL) -m 0644 $(WSSPROXY_CONFIG) $(@D)/config.h
endef
WSSPROXY_PRE_BUILD_HOOKS += WSSPROXY_COPY_CONFIG
endif

define WSSPROXY_BUILD_CMDS
	$(TARGET_MAKE_ENV) $(MAKE) $(TARGET_CONFIGURE_OPTS) -C $(@D)
endef

define WSSPROXY_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/wssproxy $(TARGET_DIR)/usr/sbin/wssproxy
endef

define WSSPROXY_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/tests/pkg/wssproxy.service \
		$(TARGET_DIR)/usr/lib/systemd/system/wssproxy.service
endef

$(eval $(generic-package))
