# As much of OpenWrt as the recipe uses, for this machine: make -C RECIPE TOPDIR=here compile
INCLUDE_DIR = $(TOPDIR)
DL_DIR = $(TOPDIR)/dl
PKG_BUILD_DIR = $(TOPDIR)/build/$(PKG_NAME)-$(PKG_VERSION)
TAR = tar
CP = cp -fpR
INSTALL_DIR = install -d -m0755
INSTALL_BIN = install -m0755
TARGET_CFLAGS = -O0
TARGET_LDFLAGS =
TARGET_CONFIGURE_OPTS = CC="$(CC)" AR=ar
