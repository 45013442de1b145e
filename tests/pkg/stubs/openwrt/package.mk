# A file that is to be downloaded has to be in DL_DIR; hashes are for the tests to look at.
define Download
$(eval $(Download/$(1)))
compile: $(DL_DIR)/$(strip $(subst FILE:=,,$(filter FILE:=%,$(Download/$(1)))))
endef

Build/Prepare/Default = tar -C $(TOPDIR)/build -xzf $(CURDIR)/$(PKG_SOURCE)

define BuildPackage
compile:
	mkdir -p $(TOPDIR)/build
	$(Build/Prepare)
	$(Build/Compile)
	$(call Package/$(1)/install,$(TOPDIR)/root)

show-licences:
	cd $(PKG_BUILD_DIR) && ls $(PKG_LICENSE_FILES)
endef
